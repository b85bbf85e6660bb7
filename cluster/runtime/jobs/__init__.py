"""A run as jobs of a Ray cluster: packed, submitted, followed, and tried again."""
