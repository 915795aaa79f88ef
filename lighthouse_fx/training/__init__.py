"""What accompanies a training run: stages, its log, and the monitors on it."""
