"""What only an accelerator can say about itself; at toy sizes also where it is emulated, then without times."""
