"""What a checkpoint is as bytes: its manifest, its shards, and who writes and reads which of them."""
