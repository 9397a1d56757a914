"""The suites of `v4sdk bench run`: each module has `STAGES`, a tuple of stages in the order they run."""
