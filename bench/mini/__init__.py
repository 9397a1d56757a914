"""v4-mini, one random model in every format with identical values."""
