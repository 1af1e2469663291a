"""Transforms: change the weights, keep the float function, so that quantization loses less.

`smooth` folds SmoothQuant's factors, `rotate` rotates the residual stream; both find out by
dataflow what they may change (`jaxquant.passes.channel_flow`, `jaxquant.passes.rotation_flow`), and
check on data that the function stayed.
"""
