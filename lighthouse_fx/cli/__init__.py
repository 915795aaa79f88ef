"""The `lighthouse` command."""
