"""The host: one process per node that starts and holds its trainers. No ray here but where it is started."""
