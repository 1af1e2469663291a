"""F2: passes over jaxprs (installed as jaxquant.passes)."""
