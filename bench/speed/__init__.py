"""How fast, and how much memory: ours and a peer's in turn."""
