"""What is no model and everything may use: configurations and options, whole files, errors, identities, launchers."""
