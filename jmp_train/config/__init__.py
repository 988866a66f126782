"""What an experiment is, and how it is found and changed."""
