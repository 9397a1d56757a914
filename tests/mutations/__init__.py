"""Bugs that others shipped, as patches to this code; each must be noticed by a test that exists without it."""
