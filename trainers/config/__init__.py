"""What configurations may say: a strict model for each section and for each command, and how files are read into them."""
