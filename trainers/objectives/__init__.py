"""One file an objective; `trainers.build` lists them."""
