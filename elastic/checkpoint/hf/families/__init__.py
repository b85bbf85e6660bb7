"""One file per `model_type` of Hugging Face; it provides `FAMILY`, a `_base.Family`."""
