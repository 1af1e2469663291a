"""F5: measuring what quantization costs: quality by slice and in the tail, bytes, time; reports."""

from jaxquant.evaluate.bootstrap import Interval
from jaxquant.evaluate.compare import compare
from jaxquant.evaluate.latency import LatencyOptions, measure_latency
from jaxquant.evaluate.report import Report

__all__ = ["Interval", "LatencyOptions", "Report", "compare", "measure_latency"]
