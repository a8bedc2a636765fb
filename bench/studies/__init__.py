"""What training did: runs over seeds, settings and bases, and their answers counted again."""
