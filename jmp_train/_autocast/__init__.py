"""Operation-level mixed precision: trace, plan, re-emit with casts."""
