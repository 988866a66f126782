"""Output for people: progress, plots and the divergence report."""
