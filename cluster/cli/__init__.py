"""One file per verb; nothing slow is imported before it is needed."""
