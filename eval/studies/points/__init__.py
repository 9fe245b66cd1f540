"""Models of points against the density that they should have, which is known."""
