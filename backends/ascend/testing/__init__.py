"""What stands in for an NPU in tests: a link-time stand-in for CANN, emulators of the vendor's ops, tables of their schemas."""
