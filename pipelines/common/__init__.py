"""What is no model and everything may use: whole files, errors, identities, launchers, what users write in options."""
