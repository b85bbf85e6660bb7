"""One trainer: its parts, its loop, its steps, its time. `run` puts it together."""
