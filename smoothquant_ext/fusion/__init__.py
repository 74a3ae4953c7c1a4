"""Modules of a quantized model replaced by fused ops, where their function stays the same."""
