"""Assertions on dtypes of products of `jax.experimental.sparse`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

from jmp_train.testing import assert_contractions_in

EYE = np.eye(4, dtype=np.float32)
SAMPLED = {"dimension_numbers": (((1,), (0,)), ((), ()))}
MATRIX = [sparse.BCOO, sparse.BCSR, sparse.COO, sparse.CSR]
PRODUCTS = {
    **{f"{kind.__name__}_matrix": (kind, lambda s, x: s @ x) for kind in MATRIX},
    **{f"{kind.__name__}_vector": (kind, lambda s, x: s @ x[0]) for kind in MATRIX},
    "sparse_by_sparse": (sparse.BCOO, lambda s, x: (s @ s).data),
    "sampled": (
        sparse.BCOO,
        lambda s, x: sparse.bcoo_dot_general_sampled(x, x, s.indices, **SAMPLED),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_sparse_arrays_are_checked(name):
    kind, product = PRODUCTS[name]
    dense = lambda x: x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)
    both = lambda s, x: (product(s, x), dense(x))
    half = EYE.astype(jnp.bfloat16)
    assert_contractions_in(both, kind.fromdense(half), half)
    with pytest.raises(AssertionError, match=r"found 1 of 2 in another dtype:\n  \w+  float32"):
        assert_contractions_in(both, kind.fromdense(EYE), EYE)


def test_the_product_of_a_matrix_with_its_transpose_is_checked():
    square = lambda x: jax.lax.linalg.symmetric_product(x, x)
    assert_contractions_in(square, EYE.astype(jnp.bfloat16))
    with pytest.raises(AssertionError, match="symmetric_product  float32"):
        assert_contractions_in(square, EYE)
