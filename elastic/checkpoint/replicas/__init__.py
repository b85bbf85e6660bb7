"""Snapshots in the memory of the nodes: the server on each, its client, and copies between them. No torch here."""
