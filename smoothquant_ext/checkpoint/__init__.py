"""W8A8 models on disk: formats, saving, loading, model cards."""
