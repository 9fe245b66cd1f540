"""One file an objective; `trainers.distill.build_objective` lists them."""
