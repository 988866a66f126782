"""Programs as JAX traces them: equations, their bodies and source lines, and one walk over them."""
