"""What changes weights: objectives, posteriors, and the one loop that trains them all."""
