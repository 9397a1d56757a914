"""Other engines that run V4, each behind the same small protocol."""
