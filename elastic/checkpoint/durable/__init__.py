"""From host memory to the run's storage, complete or invisible."""
