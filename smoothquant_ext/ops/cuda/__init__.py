"""The ops on NVIDIA GPUs: what computes them, and who decides that."""
