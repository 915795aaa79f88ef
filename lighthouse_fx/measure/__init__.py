"""How fast is it, and where does the time go? Layer timing, the cost model, tune and profile."""
