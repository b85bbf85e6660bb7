"""Put a run's state together again, from the nearest place that has it."""
