"""F3: how Flax models and plain functions meet the passes."""
