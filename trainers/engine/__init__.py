"""What runs the updates, whatever they are: loop, draws, optimisers, EMA, checkpoints, log. It knows no objective by name."""
