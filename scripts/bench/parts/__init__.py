"""What the benchmarks share: the rivals that they compare with, a judge of pictures, networks with random weights."""
