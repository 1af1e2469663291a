"""F3: how Flax models and plain functions meet the passes."""

from jaxquant.frontends.adapter import ModelAdapter, describe
from jaxquant.frontends.decorator import quantize
from jaxquant.frontends.function import transform

__all__ = ["ModelAdapter", "describe", "quantize", "transform"]
