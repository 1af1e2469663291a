"""F0: kernels and their reference, on plain arrays (installed as jaxquant.pallas_kernels)."""
