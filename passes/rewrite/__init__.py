"""The passes that change the graph."""
