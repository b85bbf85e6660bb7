"""What the coordinator writes down, and how it gets to the run's storage."""
