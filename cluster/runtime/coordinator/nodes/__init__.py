"""The nodes of a run: what is known of each, and what each needs."""
