"""One file per model family; `elastic/model_config.py` says what it provides."""
