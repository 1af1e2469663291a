"""Core types of jaxquant: qtypes, the QTensor container, recipes and the primitives.

Called by every floor above; imports only `jaxquant.pallas_kernels`.
"""
