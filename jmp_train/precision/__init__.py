"""Numbers: dtypes, policies and casts. Depends on JAX alone."""
