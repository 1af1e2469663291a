"""jaxquant: quantization for JAX models."""

__version__ = "0.1.0"
