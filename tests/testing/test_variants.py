"""`testing.policies` and the fixtures, in pytest, absl and chex."""

import inspect
import subprocess
import sys
import unittest

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from jmp_train import testing
from jmp_train.errors import UsageError
from jmp_train.testing.fixtures import device, variant  # noqa: F401

CASES = """
import chex
import jax
import jax.numpy as jnp
import pytest

import jmp_train as jt
from jmp_train import testing

RAN = []

@testing.policies("float32", "mixed_bfloat16")
def test_function(policy):
    RAN.append(("function", policy))

@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.usefixtures("tmp_path")
@testing.policies("float32", "mixed_float16")
def test_composed(policy, n, request):
    assert "tmp_path" in request.fixturenames
    RAN.append(("composed", policy, n))

class TestPlain:
    @testing.policies("float32", "mixed_bfloat16")
    def test_method(self, policy):
        RAN.append(("method", policy))

class Chex(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @testing.policies("float32", "mixed_bfloat16")
    def test_variants(self, policy):
        out = self.variant(jt.get_policy(policy).cast_to_compute)(jnp.ones(2))
        assert out.dtype == jt.get_policy(policy).compute_dtype
        RAN.append((str(self.variant.type), policy))

    @testing.policies("p=f32,c=bf16,o=f32", "float32")
    def test_alone(self, policy):
        RAN.append(("alone", policy))

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
        RAN.append(("marked", str(self.variant.type), policy))

@pytest.fixture
def marked_fixture():
    RAN.append("marked_fixture")
"""


class Recorder:
    """Names and outcomes of the tests of a run of pytest, and what the tests recorded."""

    def __init__(self):
        self.outcomes, self.ran, self.failures = {}, [], ""

    def pytest_collection_finish(self, session):
        self.ran = session.items[0].module.RAN

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid.rpartition("::")[2]] = report.outcome
        if report.failed:
            self.failures += f"{report.nodeid}\n{report.longreprtext}\n"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The run of `CASES`."""
    file = tmp_path_factory.mktemp("cases") / "test_cases_of_policies.py"
    file.write_text(CASES)
    recorder = Recorder()
    options = ["-p", "no:cacheprovider", "-p", "no:terminal"]
    status = pytest.main([*options, "--rootdir", str(file.parent), str(file)], plugins=[recorder])
    assert status == 0, recorder.failures
    return recorder


HALVES = ("float32", "mixed_bfloat16")


def test_each_policy_is_a_test_with_its_name(cases):
    names = [f"test_function[{policy}]" for policy in HALVES]
    names += [f"test_method[{policy}]" for policy in HALVES]
    names += [f"test_composed[{p}-{n}]" for p in ("float32", "mixed_float16") for n in (1, 2)]
    names += [f"test_variants_{p}__{d}" for p in HALVES
              for d in ("with_jit", "without_jit", "with_device", "without_device")]  # fmt: skip
    names += ["test_alone_p_f32_c_bf16_o_f32", "test_alone_float32"]
    assert {name for name in names if cases.outcomes.get(name) != "passed"} == set()
    assert all(name.partition("[")[0].isidentifier() for name in cases.outcomes)


def test_every_variant_ran_once(cases):
    ran = [item for item in cases.ran if item != "marked_fixture" and item[0] != "marked"]
    kinds = ("function", "method", "_with_jit", "_without_jit", "_with_device", "_without_device")
    expected = [(kind, policy) for kind in kinds for policy in HALVES]
    expected += [("composed", p, n) for p in ("float32", "mixed_float16") for n in (1, 2)]
    expected += [("alone", "float32"), ("alone", "p=f32,c=bf16,o=f32")]
    assert sorted(ran) == sorted(expected)


def test_marks_above_a_chex_test_reach_each_of_its_tests(cases):
    expected = [("marked", kind, policy) for kind in ("_with_jit", "_without_jit")
                for policy in ("float32", "mixed_float16")]  # fmt: skip
    assert sorted(item for item in cases.ran if item[0] == "marked") == sorted(expected)
    assert cases.ran.count("marked_fixture") == 4
    skipped = [name for name, outcome in cases.outcomes.items() if outcome == "skipped"]
    assert sorted(skipped) == ["test_skipped_above_float32", "test_skipped_below_float32"]


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


def test_a_method_of_a_plain_class_in_a_test_case_says_why_it_gets_no_policy():
    class Mixin:
        @testing.policies("float32")
        def test_method(self, policy):
            pytest.fail("must not run")

    mixed = type(chex.TestCase)("Mixed", (Mixin, chex.TestCase), {})
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(mixed).run(result)
    ((_, text),) = result.errors
    assert "Mixed.test_method is of Mixin, which is not a TestCase, and gets no policy" in text


def test_a_coroutine_stays_one():
    class Plain:
        @testing.policies("float32")
        async def test_method(self, policy):
            pass

    assert inspect.iscoroutinefunction(Plain.test_method)


def test_a_test_that_absl_made_several_of_is_refused():
    several = parameterized.parameters(1, 2)(lambda self, n, policy: None)
    with pytest.raises(
        TypeError, match=r"expected parameterized.product\(policy=\['float32'\], ...\)"
    ):
        testing.policies("float32")(several)

    class Product(chex.TestCase):
        @parameterized.product(policy=["float32", "mixed_float16"], n=[1, 2])
        def test_method(self, policy, n):
            testing.policies(policy)

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Product).run(result)
    assert result.testsRun == 4 and result.wasSuccessful()


def test_wrong_uses_are_errors_where_the_test_is_defined():
    with pytest.raises(ValueError, match="did you mean 'mixed_bfloat16'"):
        testing.policies("mixed_bfloat17")
    with pytest.raises(TypeError, match="expected policy strings"):
        testing.policies()
    with pytest.raises(TypeError, match="expected policy strings"):
        testing.policies(lambda policy: None)
    with pytest.raises(ValueError, match=r"\('float32', 'float32'\); .* all different$"):
        testing.policies("float32", "float32")
    with pytest.raises(TypeError, match="test has no argument 'policy'"):
        testing.policies("float32")(named)
    with pytest.raises((TypeError, RuntimeError)) as error:  # Python 3.11 wraps it

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
