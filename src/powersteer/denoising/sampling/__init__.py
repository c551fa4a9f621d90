"""Pictures from prompts and conditions, in files that say how they were made."""
