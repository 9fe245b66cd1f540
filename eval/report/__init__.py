"""What is written down: metrics.json, pages, figures, the page of a run, published numbers."""
