"""The measurements behind the numbers in docs/: `make bench-<name>`, or `python -m scripts.bench.<name>`."""
