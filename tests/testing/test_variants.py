"""`testing.policies` and the fixtures, in pytest, absl and chex."""

import subprocess
import sys
import unittest

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

import jmp_train as jt
from jmp_train import testing
from jmp_train.errors import UsageError
from jmp_train.testing.fixtures import device, variant  # noqa: F401

ran = []
marked = []


@testing.policies("float32", "mixed_bfloat16")
def test_function_receives_each_policy(policy, request):
    ran.append(policy)
    assert request.node.name == f"test_function_receives_each_policy[{policy}]"


@pytest.mark.parametrize("n", [1, 2])
@testing.policies("float32", "mixed_float16")
def test_composes_with_parametrize(policy, n, request):
    assert request.node.name == f"test_composes_with_parametrize[{policy}-{n}]"


class TestPlainClass:
    @testing.policies("float32", "mixed_bfloat16")
    def test_method(self, policy, request):
        ran.append(("plain", policy))
        assert request.node.name == f"test_method[{policy}]"


class ChexTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @testing.policies("float32", "mixed_bfloat16")
    def test_variants(self, policy):
        compute = jt.get_policy(policy).compute_dtype
        out = self.variant(jt.get_policy(policy).cast_to_compute)(jnp.ones(2))
        ran.append((str(self.variant.type), policy))
        assert out.dtype == compute

    @testing.policies("p=f32,c=bf16,o=f32", "float32")
    def test_alone(self, policy):
        ran.append(("alone", policy))


class TestMarks:
    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.usefixtures("tmp_path")
    @testing.policies("float32", "mixed_bfloat16")
    def test_marked(self, policy, n, request):
        assert "tmp_path" in request.fixturenames
        marked.append((policy, n))

    def test_every_case_ran(self):
        assert sorted(marked) == [(p, n) for p in ("float32", "mixed_bfloat16") for n in (1, 2)]


class ChexMarks(chex.TestCase):
    @pytest.mark.skip(reason="a mark above")
    @testing.policies("float32")
    def test_skipped_above(self, policy):
        pytest.fail("must not run")

    @testing.policies("float32")
    @pytest.mark.skip(reason="a mark below")
    def test_skipped_below(self, policy):
        pytest.fail("must not run")

    @chex.variants(with_jit=True, without_jit=True)
    @pytest.mark.usefixtures("marked_fixture")
    @testing.policies("float32", "mixed_float16")
    def test_fixture(self, policy):
        assert self.variant(lambda x: x)(jnp.ones(2)).sum() == 2
        ran.append(("marked", str(self.variant.type), policy))


@pytest.fixture
def marked_fixture():
    ran.append("marked_fixture")


def test_marks_above_a_chex_test_reach_each_of_its_tests():
    cases = [("marked", kind, policy) for kind in ("_with_jit", "_without_jit")
             for policy in ("float32", "mixed_float16")]  # fmt: skip
    assert [item in ran for item in cases] == [True] * 4 and ran.count("marked_fixture") == 4
    ran[:] = [item for item in ran if item != "marked_fixture" and item[0] != "marked"]


def test_a_mark_that_pytest_would_ignore_is_refused_when_the_class_is_made():
    def method(self, policy, n):
        pytest.fail("must not run")

    mark, policies = pytest.mark.parametrize("n", [1]), testing.policies("float32")
    for decorated in (mark(policies(method)), policies(mark(method))):
        with pytest.raises(UsageError, match="'parametrize' in a TestCase"):
            type(chex.TestCase)("Marked", (chex.TestCase,), {"test_method": decorated})


def test_another_decorator_above_is_an_error_when_the_test_runs():
    class Stacked(chex.TestCase):
        @parameterized.parameters(1, 2)
        @testing.policies("float32")
        def test_method(self, n, policy):
            pytest.fail("must not run")

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Stacked).run(result)
    assert result.testsRun == len(result.errors) == 2
    assert all("has a decorator above @testing.policies" in text for _, text in result.errors)


def test_every_variant_ran():
    assert ran[:2] == ["float32", "mixed_bfloat16"]
    names = set(ran[2:])
    kinds = ("plain", "_with_jit", "_without_jit", "_with_device", "_without_device")
    assert names == {
        *((kind, policy) for kind in kinds for policy in ("float32", "mixed_bfloat16")),
        ("alone", "float32"),
        ("alone", "p=f32,c=bf16,o=f32"),
    }


def test_names_of_methods_are_identifiers():
    names = [name for name in vars(ChexTest) if name.startswith("test_")]
    assert "test_alone_p_f32_c_bf16_o_f32" in names
    assert "test_variants_mixed_bfloat16__with_jit" in names
    assert all(name.isidentifier() for name in names)


def test_wrong_uses_are_errors_where_the_test_is_defined():
    with pytest.raises(ValueError, match="did you mean 'mixed_bfloat16'"):
        testing.policies("mixed_bfloat17")
    with pytest.raises(TypeError, match="expected policy strings"):
        testing.policies()
    with pytest.raises(TypeError, match="expected policy strings"):
        testing.policies(lambda policy: None)
    with pytest.raises(TypeError, match="test has no argument 'policy'"):
        testing.policies("float32")(named)
    with pytest.raises((TypeError, RuntimeError)) as error:

        class Plain(unittest.TestCase):
            @testing.policies("float32")
            def test_method(self, policy):
                pytest.fail("must not run")

    causes = f"{error.value} {error.value.__cause__}"
    assert "Plain.test_method is in a unittest.TestCase" in causes
    assert "expected chex.TestCase" in causes


def named():
    pytest.fail("must not run")


named.__name__ = "test"


def test_variant_is_jit_or_nothing(variant):  # noqa: F811
    traced = []

    @variant
    def fn(x):
        traced.append(isinstance(x, jax.core.Tracer))
        return x * 2

    assert fn(jnp.float32(2)) == 4
    assert traced == [variant is jax.jit]
    assert variant(lambda n: n, static_argnums=0)(3) == 3


@pytest.mark.gpu_first
def test_device_is_the_default_during_the_test(device, request):  # noqa: F811
    assert device.platform in request.node.name
    assert jnp.ones(2).devices() == {device}
    assert jax.jit(lambda: jnp.ones(2))().devices() == {device}


TESTS = """
import jax.numpy as jnp
from jmp_train import testing
from jmp_train.testing.fixtures import variant

@testing.policies("float32", "mixed_bfloat16")
def test_sum(policy, variant):
    testing.assert_close_to_float64(variant(jnp.sum), jnp.ones(3), policy=policy, ulps=1)
"""


@pytest.mark.slow
def test_a_users_file_is_collected_with_all_its_variants(tmp_path):
    (tmp_path / "test_user.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "4 passed" in result.stdout


WITHOUT = """
import sys
for name in ("pytest", "hypothesis"):
    sys.modules[name] = None
import jax.numpy as jnp
from jmp_train import testing
from jmp_train.testing import strategies
testing.assert_close_to_float64(jnp.sum, jnp.ones(3), ulps=1)
for strategy in (strategies.floats, strategies.special_values, strategies.arrays):
    try:
        strategy("float32")
    except ImportError as error:
        print(error)
try:
    strategies.trees()
except ImportError as error:
    print(error)
"""


def test_the_module_works_without_pytest_and_hypothesis():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    line = "jmp_train.testing.strategies needs hypothesis: pip install hypothesis"
    assert result.stdout.splitlines() == [line] * 4
