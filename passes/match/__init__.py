"""Find attention calls, in every spelling. Changes nothing that the graph computes."""
