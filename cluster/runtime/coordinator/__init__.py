"""The one process that decides who trains, and what it writes down."""
