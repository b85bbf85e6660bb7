"""Where snapshots are safe, and which of them: memory, a peer's memory, a disk of the node."""
