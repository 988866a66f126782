"""A decorator that runs one test under several policies, with pytest, absl and chex."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jmp_train.errors import UsageError
from jmp_train.policy.precision import get_precision
from jmp_train.types import Function


def policies(*names: str) -> Callable[[Function], Any]:
    """Run a test once for each policy, which it receives as its argument `policy`.

    The tests are named by their policies: `test_loss[mixed_float16]` in pytest,
    `test_loss_mixed_float16` in a `chex.TestCase` or another absl `parameterized.TestCase`. There
    `chex.variants` goes around it:

        class LossTest(chex.TestCase):
            @chex.variants(with_jit=True, without_jit=True)
            @testing.policies("float32", "mixed_bfloat16")
            def test_loss(self, policy):
                loss = self.variant(loss_under(policy))
                ...

    Marks of pytest may stand above or below it, below `chex.variants` in any case. `parametrize` does
    not work in a `TestCase`, where pytest ignores it; there
    `parameterized.product(policy=[...], n=[...])` in place of both makes a test for each pair. Every other
    decorator of a method goes below.

    Args:
      *names: policy strings; see `get_policy`.

    Raises:
      ValueError: for an unknown policy, or one that occurs twice, when the test is defined.
      TypeError: for no policy, a test without an argument `policy`, or one that absl has parametrized;
        when the class is made, in a `unittest.TestCase` that is not absl's, in Python 3.11 as the cause
        of a RuntimeError.
      UsageError: for `pytest.mark.parametrize` in a `TestCase`, when the class is made; for another
        decorator above it, and for a method that a `TestCase` inherits from a plain class, when the test
        runs.

    >>> @policies("float32", "mixed_bfloat16")
    ... def test_casts(policy):
    ...     assert get_precision(policy).whole is not None
    >>> [mark.args for mark in test_casts.pytestmark]
    [('policy', ('float32', 'mixed_bfloat16'))]
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"policies{names!r}; expected policy strings, such as 'mixed_bfloat16'")
    for name in names:
        get_precision(name)
    if len(set(names)) < len(names):
        raise ValueError(f"policies{names!r}; expected policies that are all different")

    def decorate(test: Function) -> Any:
        if isinstance(test, type) or not callable(test):
            raise TypeError(f"policies decorates {test!r}; expected a test function or method")
        if isinstance(test, Iterable):
            raise TypeError(
                f"policies decorates {test!r}, of which absl has made several tests; expected "
                f"parameterized.product(policy={list(names)}, ...) in place of both decorators"
            )
        parameters = list(inspect.signature(test).parameters)
        if "policy" not in parameters:
            raise TypeError(
                f"{test.__name__} has no argument 'policy'; expected one for the policy"
            )
        return _Method(test, names) if parameters[0] == "self" else _pytest(test, names)

    return decorate


def _pytest(test: Function, names: tuple[str, ...]) -> Any:
    import pytest

    return pytest.mark.parametrize("policy", names, ids=names)(test)


class _Method:
    """A decorated method, until its class is made and shows which framework runs it.

    absl's metaclass and `chex.variants` iterate over it, and never put it into a class. Any other
    class calls `__set_name__`, and gets the method as pytest parametrizes it. It is callable and has a
    name, because `pytest.mark` adds marks to nothing else.
    """

    def __init__(self, test: Function, names: tuple[str, ...]):
        self._test = test
        self._names = names
        self.__name__ = test.__name__
        self.pytestmark: list[Any] = []  # marks that stand above

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            f"{self.__name__} has a decorator above @testing.policies that takes it for a function; "
            "expected chex.variants or marks of pytest there, and other decorators below"
        )

    def __iter__(self) -> Iterator[Function]:
        from absl.testing import parameterized

        marks = self._all_marks()
        if any(mark.name == "parametrize" for mark in marks):
            raise UsageError(
                f"{self.__name__} has a mark 'parametrize' in a TestCase, where pytest ignores it; "
                "expected a plain class, whose methods pytest parametrizes"
            )
        cases = [{"testcase_name": f"_{_identifier(name)}", "policy": name} for name in self._names]
        tests: Any = parameterized.named_parameters(*cases)(self._test)
        for test in tests:
            if marks:
                test.pytestmark = marks
            yield test

    def _all_marks(self) -> list[Any]:
        return [*getattr(self._test, "pytestmark", []), *self.pytestmark]

    def __set_name__(self, owner: type, name: str) -> None:
        import unittest

        if issubclass(owner, unittest.TestCase):
            raise TypeError(
                f"{owner.__name__}.{name} is in a unittest.TestCase, which cannot be parametrized; "
                "expected chex.TestCase"
            )
        method = _pytest(_of_plain_class(self._test, owner.__name__), self._names)
        method.pytestmark = [*method.pytestmark, *self.pytestmark]
        setattr(owner, name, method)


def _of_plain_class(test: Function, owner: str) -> Function:
    """Return a method that says why it gets no policy, which pytest gives to no `TestCase`."""
    if inspect.iscoroutinefunction(test):  # for plugins, which run no other function so
        return test

    @functools.wraps(test)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and "policy" not in kwargs:
            raise UsageError(
                f"{type(self).__name__}.{test.__name__} is of {owner}, which is not a TestCase, and gets no "
                f"policy; expected {owner} to be a chex.TestCase"
            )
        return test(self, *args, **kwargs)

    return method


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
