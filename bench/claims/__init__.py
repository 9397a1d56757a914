"""The ledger of published claims, and what answers each: arithmetic, or a measurement."""
