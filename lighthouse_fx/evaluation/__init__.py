"""Is the rewrite right, and is the trained model good? verify, validate and passkeys."""
