"""Train a model on the ranks that are given: no ray and no cloud here. See README.md in this folder."""
