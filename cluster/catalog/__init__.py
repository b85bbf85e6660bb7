"""What GPUs can do and what they cost, each number with its source; `cluster/catalog/load.py` brings it together."""
