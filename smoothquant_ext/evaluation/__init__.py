"""How accurate, fast and large a model is."""
