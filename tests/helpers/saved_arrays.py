"""What the newest checkpoint of a run holds, for the tests that compare runs."""

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.records.checkpoints import Checkpoints


def final_arrays(run_dir):
    """Every array of the newest checkpoint by path, read by Orbax without our state classes."""
    from orbax.checkpoint import v1 as ocp

    step = Checkpoints(run_dir / "checkpoints").steps()[-1]
    path = str((run_dir / "checkpoints" / str(step)).resolve())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever devices saved it
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
    saved = ocp.checkpointables_metadata(path).metadata["state"]
    tree = ocp.load_checkpointables(path, {"state": jax.tree.map(like, saved)})["state"]
    numbers = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    return {
        jax.tree_util.keystr(path): np.asarray(numbers(x))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_arrays(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
