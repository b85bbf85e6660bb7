"""From text to this rank's tokens of one step."""
