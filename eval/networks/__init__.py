"""The networks behind the metrics, and where their weights lie."""
