"""Numbers: features and their statistics in one pass, the distances between them, and the named metrics made of these."""
