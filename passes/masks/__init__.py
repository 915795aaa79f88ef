"""What an attention mask shows, and the proof that it is the causal mask."""
