"""Model code that compares classes and methods sees those that its author wrote, in both libraries."""

import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.programs import result_dtypes

from jmp_train.flax import apply_policy
from jmp_train.testing import assert_contractions_in

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (3, 4))


class Plain(nnx.Module):
    """Has a fused method for subclasses to override, as in PyTorch Geometric and jraphx."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))

    def __call__(self, x):
        assert type(self).combine is Plain.combine
        if type(self).fused is not Plain.fused:
            return self.fused(x)
        return self.combine(x)

    def combine(self, x):
        return jnp.tanh(x @ self.kernel)

    def fused(self, x) -> jax.Array:
        raise AssertionError("called only where a subclass defines it")


class Inherits(Plain):
    pass


class Overrides(Plain):
    def fused(self, x):
        return super().combine(x)


class ByClass(nnx.Module):
    def __init__(self, rngs):
        self.children = nnx.List([Plain(rngs), Inherits(rngs), Overrides(rngs)])

    def __call__(self, x):
        assert type(self) is ByClass
        assert [type(child) for child in self.children] == [Plain, Inherits, Overrides]
        assert isinstance(self.children[1], Plain)
        for child in self.children:
            x = child(x) if type(child) is not Inherits else child.combine(x)
        return x


def jaxpr_of(model):
    graph, params = nnx.split(model)
    return jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graph, p)(X).sum()))(params)


def test_nnx_code_sees_its_own_classes_and_methods():
    net = ByClass(nnx.Rngs(0))
    under = apply_policy(net, "mixed_bfloat16")
    # Three tanh of products of order 1, each rounded: a few units of 2^-8.
    np.testing.assert_allclose(under(X), net(X), atol=16 * 2**-8)
    assert_contractions_in(lambda x: net(x), X, dtype="float32")
    assert_contractions_in(lambda x: under(x), X)


def test_nnx_methods_called_from_outside_follow_their_rule():
    rules = [("children/1", "float32"), ("**", "mixed_bfloat16")]
    under = apply_policy(ByClass(nnx.Rngs(0)), rules)
    counts = result_dtypes(jax.make_jaxpr(lambda x: under(x))(X))
    assert counts == {"float32": 1, "bfloat16": 2}


class Wave(nnx.Module):
    def __call__(self, x):
        return jnp.cos(x)


class Waves(Wave):
    def __call__(self, x):
        return jnp.sin(super().__call__(x))


def test_nnx_super_calls_round_nothing_inside_the_module():
    under = apply_policy(nnx.Sequential(Waves()), "mixed_bfloat16")
    assert result_dtypes(jax.make_jaxpr(lambda x: under(x))(X), "sin") == {"float32": 1}


@nnx.custom_vjp
def by_rule(module, x):
    return module(x)


def by_rule_fwd(module, x):
    return by_rule(module, x), (module, x)


def by_rule_bwd(residuals, cotangents):
    (module, x), ((of_module, _), of_y) = residuals, cotangents
    return of_module, jax.vjp(lambda x: module(x), x)[1](of_y)[0]


by_rule.defvjp(by_rule_fwd, by_rule_bwd)


class HasRule(nnx.Module):
    def __init__(self, rngs):
        self.child = Plain(rngs)

    def __call__(self, x):
        return by_rule(self.child, x)


def test_nnx_modules_in_derivative_rules_follow_their_policy():
    under = apply_policy(
        HasRule(nnx.Rngs(0)), [("child", "mixed_float16"), ("**", "mixed_bfloat16")]
    )
    # JAX traces both rules after the model's call: two forward products and one backward.
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: under(x).sum()))(X)
    assert result_dtypes(jaxpr) == {"float16": 3}


def test_nnx_models_without_a_policy_run_as_before():
    net = ByClass(nnx.Rngs(0))
    before = str(jaxpr_of(net))
    apply_policy(net, "mixed_bfloat16")(X)
    assert str(jaxpr_of(net)) == before
    assert str(jaxpr_of(ByClass(nnx.Rngs(0)))) == before


class Waits(nnx.Module):
    """Leaves its product to a child; lets a test act in the middle of its call."""

    def __init__(self, rngs, act):
        self.child, self.act = Plain(rngs), act

    def __call__(self, x):
        self.act()
        return self.child(x)


def test_nnx_calls_of_two_threads_leave_each_other_alone():
    inside, over = threading.Event(), threading.Event()

    def pause():
        inside.set()
        assert over.wait(60)

    slow = apply_policy(Waits(nnx.Rngs(0), pause), "mixed_bfloat16")
    found = {}
    thread = threading.Thread(
        target=lambda: found.update(slow=result_dtypes(jax.make_jaxpr(lambda x: slow(x))(X)))
    )
    thread.start()
    try:
        assert inside.wait(60)
        plain = Waits(nnx.Rngs(0), lambda: None)
        half = apply_policy(plain, "mixed_float16")
        found["plain"] = result_dtypes(jax.make_jaxpr(lambda x: plain(x))(X))
        found["half"] = result_dtypes(jax.make_jaxpr(lambda x: half(x))(X))
    finally:
        over.set()
        thread.join()
    assert found == {"slow": {"bfloat16": 1}, "plain": {"float32": 1}, "half": {"float16": 1}}


class LinenPlain(nn.Module):
    @nn.compact
    def __call__(self, x):
        if type(self).fused is not LinenPlain.fused:
            return self.fused(x)
        return jnp.tanh(nn.Dense(4)(x))

    def fused(self, x) -> jax.Array:
        raise AssertionError("called only where a subclass defines it")


class LinenInherits(LinenPlain):
    pass


class LinenOverrides(LinenPlain):
    @nn.compact
    def fused(self, x):
        return jnp.tanh(nn.Dense(4)(x))


class LinenByClass(nn.Module):
    @nn.compact
    def __call__(self, x):
        assert type(self) is LinenByClass
        for child in (LinenPlain(), LinenInherits(), LinenOverrides()):
            assert type(child) in (LinenPlain, LinenInherits, LinenOverrides)
            x = child(x)
        return x


def test_linen_code_sees_its_own_classes_and_methods():
    net = LinenByClass()
    under = apply_policy(net, "mixed_bfloat16")
    variables = under.init(KEY, X)
    np.testing.assert_allclose(under.apply(variables, X), net.apply(variables, X), atol=16 * 2**-8)
    assert_contractions_in(under.apply, variables, X)


def test_jraphx_chooses_the_message_path_that_its_author_meant():
    jraphx = pytest.importorskip("jraphx")
    gin = jraphx.nn.GINConv(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    edges = jnp.array([[0, 1, 2], [1, 2, 0]])
    under = apply_policy(gin, "mixed_bfloat16")
    np.testing.assert_allclose(under(X, edges), gin(X, edges), atol=16 * 2**-8)
    assert_contractions_in(lambda x: under(x, edges), X)


class Odd(nnx.Module):
    """Methods that are not only called on an instance, by one name."""

    def __init__(self, rngs):
        self.child = nnx.Linear(4, 4, rngs=rngs)

    def double(x):  # called on the class  # pyright: ignore[reportSelfClsParameterName]
        return 2 * x

    def forward(self, x):
        assert type(self).__call__ is type(self).forward
        return Odd.double(x=self.child(x))

    __call__ = forward


def test_nnx_functions_of_a_class_and_second_names_of_a_method_work():
    net = Odd(nnx.Rngs(0))
    want = net(X)
    under = apply_policy(net, "mixed_bfloat16")
    np.testing.assert_allclose(under(X), want, rtol=2**-6, atol=2**-6)
    np.testing.assert_array_equal(net(X), want)  # and without a policy as before
    assert type(net).__call__ is type(net).forward


def test_nnx_containers_leave_the_standard_library_alone():
    before = {name: vars(Sequence)[name] for name in ("index", "count", "__contains__")}
    apply_policy(ByClass(nnx.Rngs(0)), "mixed_bfloat16")(X)
    assert {name: vars(Sequence)[name] for name in before} == before


def test_nnx_a_method_that_is_replaced_later_follows_the_policy(monkeypatch):
    def products():
        under = apply_policy(Plain(nnx.Rngs(0)), "mixed_bfloat16")
        return result_dtypes(jax.make_jaxpr(lambda x: under(x))(X))

    with monkeypatch.context() as patch:
        patch.setattr(Plain, "__call__", lambda self, x: x @ self.kernel)
        assert products() == {"bfloat16": 1}
    assert products() == {"bfloat16": 1}


class Halves(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 4, rngs=rngs), Plain(rngs)

    def __call__(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_the_policy_applied_last_holds(library):
    if library == "nnx":
        again = apply_policy(apply_policy(Halves(nnx.Rngs(0)), "mixed_bfloat16"), "float32")
        assert type(again).__mro__[1] is Halves
        jaxpr = jax.make_jaxpr(lambda x: again(x))(X)
    else:
        net = nn.Sequential([nn.Dense(4), nn.Dense(4)])
        variables = net.init(KEY, X)
        again = apply_policy(apply_policy(net, "mixed_bfloat16"), "float32")
        jaxpr = jax.make_jaxpr(again.apply)(variables, X)
    assert result_dtypes(jaxpr) == {"float32": 2}


def test_a_policy_on_the_whole_model_holds_over_one_on_a_part():
    net = Halves(nnx.Rngs(0))
    net.b = apply_policy(net.b, "mixed_float16")
    assert result_dtypes(jax.make_jaxpr(lambda x: net(x))(X)) == {"float32": 1, "float16": 1}
    under = apply_policy(net, "mixed_bfloat16")
    assert_contractions_in(lambda x: under(x), X)
    under.a = apply_policy(under.a, "mixed_float16")  # put in afterwards
    assert_contractions_in(lambda x: under(x), X)
