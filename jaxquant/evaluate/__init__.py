"""F5: quality, bytes and speed of a quantized model beside its float one."""
