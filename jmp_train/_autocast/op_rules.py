"""Which operations `autocast` runs in which dtype: torch.autocast's lists, as JAX primitives.

torch lists functions (`softmax`, `layer_norm`); a jaxpr holds the primitives that they are made of
(`reduce_max`, `sub`, `exp`, `reduce_sum`, `div`), so the lists name those.

| list | JAX primitives | torch's CUDA list |
| --- | --- | --- |
| compute | dot_general, ragged_dot_general, conv_general_dilated | matmul, mm, bmm, linear, conv1d.. |
| float32 | exp, exp2, expm1, log, log1p, pow, rsqrt | exp, expm1, log, log1p, pow, rsqrt |
| float32 | tan, sinh, cosh, asin, acos, and asinh, acosh, atanh | tan, sinh, cosh, asin, acos |
| float32 | erf_inv, and the gamma, beta, zeta and Bessel functions | erfinv |
| float32 | reduce_sum, reduce_prod, reduce_window_sum, scatter-add.. | sum, prod, norm, softmax, losses |
| float32 | cumsum, cumprod, cumlogsumexp | cumsum, cumprod |
| promote | everything else that takes floating arrays elementwise or moves them | addcmul, atan2, .. |
| (none) | factorisations, fft, callbacks, pallas_call, random bits | run as they were written |

Where the two differ: whole-number powers (`integer_pow`, `square`) are in float32 where the format
is float16, which cannot hold 256**2, or where float32 operations alone read them, as in a variance
or a loss; in bfloat16 they promote otherwise, because JAX spells activations such as gelu with
them, which torch leaves in half. A `dot_general` that is an inner product (`vdot`, which torch
does not list either) or that picks logarithms by 0 and 1 is a sum, in float32. torch's
`reciprocal` is a `div` here and promotes. Sums that a scatter or a window forms are sums (torch
leaves `avg_pool` and `scatter_add` off its float32 list); special functions that torch does not
list run in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from jmp_train._jaxpr.bodies import CONSTRUCTS
from jmp_train._jaxpr.compat import Operand, Primitive, known_primitives
from jmp_train.errors import nearest


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMPUTE = frozenset({"conv_general_dilated", "dot_general", "ragged_dot_general"})

_FLOAT32 = _names(
    "acos acosh asin asinh atanh bessel_i0e bessel_i1e cosh cumlogsumexp cumprod cumsum digamma "
    "erf_inv exp exp2 expm1 igamma igamma_grad_a igammac lgamma log log1p polygamma "
    "pow reduce_prod reduce_sum reduce_window_sum regularized_incomplete_beta rsqrt scatter-add "
    "scatter-mul scatter-sub select_and_gather_add select_and_scatter_add sinh tan "
    "zeta"
)

#: Operations that only move or select values: the widest of the dtypes that represent their
#: operands exactly represents their result, so they run in that dtype.
MOVES = _names(
    "abs all_gather all_gather_invariant all_to_all broadcast_in_dim clamp concatenate copy cummax "
    "cummin dynamic_slice dynamic_update_slice gather max min name neg pad ppermute reduce_max "
    "reduce_min reduce_window_max reduce_window_min reshape rev scatter scatter-max scatter-min "
    "select_n sharding_constraint slice split squeeze stop_gradient tile top_k transpose"
)

#: Operations on several arrays that need not share a dtype: each result has its operand's.
INDEPENDENT = _names(
    "device_put optimization_barrier pmax pmin psum psum_invariant pvary reduce_scatter reshard "
    "sort unreduced_psum"
)

#: Squares and the like: `x**3`, not `x**y`. float16 cannot hold 256**2, so they are float32 there.
POWERS = _names("integer_pow square")

#: Operations that run in float32 where float32 operations alone read them: the `x - max(x)` of a
#: softmax, the squares of a variance or of a loss.
RAISED = _names("add add_any sub") | POWERS

#: Operations that do not change the elements of an array, so that a bias stays a bias.
LAYOUT = _names(
    "broadcast_in_dim copy dynamic_slice gather name optimization_barrier reshape "
    "sharding_constraint slice squeeze transpose"
)

#: Operations that make logarithms, and those whose results are linear in logarithms.
LOGS = _names("log log1p")
LINEAR = MOVES | _names("add add_any cumsum div mul reduce_sum sub")

#: Operations that make zeros and ones of zeros and ones.
BINARY = MOVES | _names("mul")

_ARITHMETIC = _names(
    "add add_any argmax argmin atan atan2 cbrt ceil cos div eq erf erfc floor ge gt integer_pow "
    "is_finite le logistic lt mul ne rem round sign sin sqrt square sub tanh"
)

_PROMOTE = MOVES | INDEPENDENT | _ARITHMETIC

# Primitives that work on the representation of a number, or whose bodies and dtypes are their own.
_OTHER = _names(
    "approx_top_k bitcast_convert_type cholesky complex custom_linear_solve eigh fft lu nextafter "
    "pure_callback qr reduce reduce_and reduce_or reduce_precision reduce_window scaled_dot svd "
    "select_and_scatter triangular_solve tridiagonal_solve"
)

#: Primitives that autocast enters, or reads as the author's own casts: no rule can name them.
CONTROL = frozenset(CONSTRUCTS) | {"convert_element_type"}


def _valid_names() -> frozenset[str]:
    return (_COMPUTE | _FLOAT32 | _PROMOTE | _OTHER | known_primitives()) - CONTROL


@dataclasses.dataclass(frozen=True)
class OpRules:
    """Three sets of primitive names: what `autocast` runs in half, in float32, and in the widest.

    A primitive in none of the sets runs as it was written: its operands are cast back to the
    dtypes that it was traced with. The names are those that a printed jaxpr shows.

    Attributes:
      compute: run in the compute dtype ("allow" in torch).
      float32: run in float32, for operands of either half dtype ("deny").
      promote: run in the widest floating dtype among their operands.
      custom: names of primitives that JAX does not define, taken as they are spelt. `extend`
        fills it from `Primitive` objects.

    Raises:
      ValueError: for a name that no primitive has, with the nearest one; for a name in two sets;
        for a name such as `scan`, whose body autocast enters instead.

    >>> rules = default_op_rules.extend(compute=["tanh"])
    >>> "tanh" in rules.compute, "tanh" in rules.promote
    (True, False)
    >>> default_op_rules.extend(float32=["logisitc"])
    Traceback (most recent call last):
    ValueError: Unknown primitive 'logisitc' in the float32 rule; did you mean 'logistic'?
    """

    compute: frozenset[str]
    float32: frozenset[str]
    promote: frozenset[str]
    custom: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, frozenset(getattr(self, field.name)))
        valid = _valid_names() | self.custom
        for rule in ("compute", "float32", "promote"):
            for name in sorted(getattr(self, rule)):
                if name in CONTROL:
                    raise ValueError(f"{name!r} cannot be in the {rule} rule: its body is entered")
                if name not in valid:
                    hint = nearest(name, sorted(valid))
                    raise ValueError(f"Unknown primitive {name!r} in the {rule} rule; {hint}")
        pairs = ((self.compute, self.float32), (self.compute, self.promote))
        for one, other in (*pairs, (self.float32, self.promote)):
            if one & other:
                raise ValueError(f"{sorted(one & other)} are in two rules; expected one")

    def extend(
        self,
        *,
        compute: Iterable[Operand] = (),
        float32: Iterable[Operand] = (),
        promote: Iterable[Operand] = (),
        as_written: Iterable[Operand] = (),
    ) -> OpRules:
        """New rules, with the given primitives moved to the given sets.

        Args:
          compute, float32, promote: primitives to move there.
          as_written: primitives to take out of every set.

        Each primitive is a name or a `jax.extend.core.Primitive`; a primitive that JAX does not
        define has to be given as the object.
        """
        listed = {"compute": compute, "float32": float32, "promote": promote, "": as_written}
        listed = {rule: tuple(primitives) for rule, primitives in listed.items()}
        own = frozenset(p.name for ps in listed.values() for p in ps if not isinstance(p, str))
        given = {rule: frozenset(map(_name, ps)) for rule, ps in listed.items()}
        moved = frozenset[str]().union(*given.values())
        del given[""]
        for name in sorted(moved - own - _valid_names() - self.custom - CONTROL):
            rule = next((r for r, names in given.items() if name in names), "as_written")
            hint = nearest(name, sorted(_valid_names()))
            raise ValueError(f"Unknown primitive {name!r} in the {rule} rule; {hint}")
        sets = {rule: (getattr(self, rule) - moved) | names for rule, names in given.items()}
        return OpRules(**sets, custom=self.custom | (own - _valid_names()))


def _name(primitive: Primitive) -> str:
    return primitive if isinstance(primitive, str) else primitive.name


#: torch.autocast's lists, in JAX's primitives; see the table at the head of this module.
default_op_rules = OpRules(_COMPUTE, _FLOAT32, _PROMOTE)
