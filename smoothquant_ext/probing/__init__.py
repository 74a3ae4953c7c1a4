"""What a model is made of, found by running its parts, not by class names."""
