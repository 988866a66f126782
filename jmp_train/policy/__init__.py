"""Precision policies: their grammar, rules by module path, and both as one value."""
