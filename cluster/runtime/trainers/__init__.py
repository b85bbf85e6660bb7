"""What runs in the slots of a host."""
