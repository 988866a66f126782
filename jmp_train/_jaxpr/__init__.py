"""Programs as JAX traces them: reading equations, their bodies and source lines, and one walk over them."""
