"""Decide which ranks there are, and what they cost."""
