"""A configuration refuses a value of another type than it says."""

import dataclasses
from typing import Literal

import numpy as np
import pytest

from jmp_train.fields import check_fields, fits


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = 1
    rate: float = 0.5
    name: str = "a"
    flag: bool = False
    maybe: float | None = None
    choice: Literal["adam", "sgd"] = "adam"
    widths: tuple[int, ...] = ()
    other: object = None

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    "fields",
    [
        {"count": 3}, {"count": np.int64(3)}, {"rate": 3}, {"rate": np.float32(3)}, {"maybe": None},
        {"maybe": 2}, {"choice": "sgd"}, {"widths": (1, 2)}, {"other": [3]}, {"flag": True},
    ],
)  # fmt: skip
def test_what_fits_is_taken(fields):
    Config(**fields)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"count": 3.0}, "count is 3.0; expected an integer"),
        ({"count": True}, "count is True; expected an integer"),
        ({"count": None}, "count is None; expected an integer"),
        ({"rate": "1e-3"}, "rate is '1e-3'; expected a number"),
        ({"rate": 1j}, "rate is 1j; expected a number"),
        ({"name": b"a"}, "name is b'a'; expected text"),
        ({"flag": 1}, "flag is 1; expected True or False"),
        ({"maybe": "no"}, "maybe is 'no'; expected a number or None"),
        ({"choice": "adamx"}, "choice is 'adamx'; did you mean 'adam'?"),
        ({"choice": 3}, "choice is 3; expected one of adam, sgd"),
        ({"widths": [1]}, "widths is [1]; expected a tuple, each an integer"),
        ({"widths": (1, "2")}, "widths is (1, '2'); expected a tuple, each an integer"),
        ({"widths": 3}, "widths is 3; expected a tuple, each an integer"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(fields, words):
    with pytest.raises(ValueError) as raised:
        Config(**fields)
    assert str(raised.value) == words


def test_true_is_no_choice_of_one():
    assert not fits(True, Literal[1, 2]) and fits(1, Literal[1, 2])
