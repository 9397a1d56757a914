"""How fast against what the machine can do: timing, ceilings, ops, whole models over context."""
