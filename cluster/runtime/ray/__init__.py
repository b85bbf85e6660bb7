"""All that knows Ray: its private API, its nodes, its token, and the agents it starts."""
