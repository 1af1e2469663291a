"""F5: checkpoints."""
