"""A prepared folder: what it holds, where it lies, and how it is opened and read."""
