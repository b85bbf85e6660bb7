"""How weights change: AdamW, by how a strategy spreads a model, and the learning rate."""
