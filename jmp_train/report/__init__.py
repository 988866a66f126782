"""What people look at: comparisons and plots."""
