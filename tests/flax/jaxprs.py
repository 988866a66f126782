"""Reading jaxprs, for tests: which operations ran in which dtype."""

from collections import Counter


def equations(jaxpr):
    """Every equation, bodies included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for param in eqn.params.values():
            for item in param if isinstance(param, (tuple, list)) else [param]:
                if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                    yield from equations(item)


PRODUCTS = ("dot_general", "conv_general_dilated")


def ran_in(jaxpr, *names):
    """How many of the named operations had a result of which dtype."""
    names = names or PRODUCTS
    return Counter(
        str(eqn.outvars[0].aval.dtype) for eqn in equations(jaxpr) if eqn.primitive.name in names
    )
