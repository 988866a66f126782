"""What reads examples from files and from hubs; nothing here knows of batches, epochs or runs."""
