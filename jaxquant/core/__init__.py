"""F1: types, the container, recipes and primitives that the passes work with."""
