"""Pallas kernels for TPU: bodies, their configs, and the chips they are chosen for."""
