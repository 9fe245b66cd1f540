"""What configurations may say: a strict model for each section and for each command."""
