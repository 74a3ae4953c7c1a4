"""Finds the parts of a model by running them, not by class names."""
