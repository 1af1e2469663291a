"""Measurements that are too slow for tests; each writes its table into benchmarks/results/."""
