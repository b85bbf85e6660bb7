"""One file per way to spread a model over ranks."""
