"""Sharded, asynchronous, committed checkpoints."""
