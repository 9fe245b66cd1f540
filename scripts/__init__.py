"""Entry points and tools; run from the repository, `python -m scripts.<name>`."""
