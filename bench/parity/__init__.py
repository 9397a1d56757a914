"""Is it the same model: metrics and verdicts, whole models, layers, goldens, other engines as witnesses, invariances."""
