"""Pictures, labels and prompts as users have them: files, folders, archives and data sets."""
