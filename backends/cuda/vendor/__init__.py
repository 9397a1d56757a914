"""Libraries of others that may serve an op in place of ours: optional, and each proven by numbers before it is used."""
