"""From text and conversations to a prepared folder."""
