"""F4: ranges, roundings and transforms, composed into quantization algorithms."""
