"""The modules of a quantized model."""
