"""What became of each attention call: records, tables, graphs and pictures."""
