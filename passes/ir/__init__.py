"""What every pass reads of an FX graph: operations, subgraphs and aliasing. Decides nothing."""
