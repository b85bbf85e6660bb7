"""What a run leaves behind: its directory, its rows, and who may write them. No torch here."""
