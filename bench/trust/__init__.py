"""Is it right: other tools, other machines, other programs, the same answers."""
