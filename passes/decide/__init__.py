"""Judge each attention call: whether it may be rewritten, and whether it should be."""
