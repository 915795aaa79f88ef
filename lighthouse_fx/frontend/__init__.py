"""What users call to compile a model or to look at one: regional compilation and explain."""
