"""What a checkpoint is as bytes: its manifest, its shards, and which rank writes and reads which of them."""
