"""Pallas kernels for GPU (Mosaic GPU, Hopper): bodies, their configs, and the chips."""
