"""What a run needs on a device that is not here: memory, communication and time, from its program."""
