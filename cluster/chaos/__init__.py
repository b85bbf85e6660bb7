"""Faults on schedule against a real local cluster."""
