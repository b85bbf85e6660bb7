"""Decide which ranks there are, and what they cost. See README.md in this folder."""
