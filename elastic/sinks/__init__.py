"""One file per place that metric rows go to."""
