"""Measurements, one script a question: README.md lists them. Run from the repository's root, as modules."""
