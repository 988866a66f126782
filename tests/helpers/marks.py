"""Parameters of a test whose quick run takes one of several."""

from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """Return a parameter set of a test that runs in `make test-all` alone."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def first_quick(values: Any) -> list[Any]:
    """Return the values, of which all but the first carry the slow marker."""
    first, *others = values
    return [first, *map(slow, others)]
