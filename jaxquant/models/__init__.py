"""Plain Flax models, as a user would write them: nothing here imports jaxquant."""
