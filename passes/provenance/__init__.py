"""Where the rows of a tensor come from."""
