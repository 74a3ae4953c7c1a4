"""Measures accuracy, speed and size of a model."""
