"""Packed documents: their layout, the plan of a batch, and variable-length attention that stays inside each document."""
