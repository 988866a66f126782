"""What people look at: progress, plots, and the report of a run that diverged."""
