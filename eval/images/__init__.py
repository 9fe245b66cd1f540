"""The images that are measured: drawn by a model or read from disk, with their captions and seeds."""
