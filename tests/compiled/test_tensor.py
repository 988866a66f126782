"""Bundled models with a mesh axis `tensor`, compiled for 8 H100s: what each device computes and sends.

The oracle is the scheme of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), counted by hand: in a
block, two sums of activations over `tensor` forward and two backward, in the dtype of the compute.
"""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
from helpers.hlo import product_flops, sent_arrays

from jmp_train.config.find import find_experiment
from jmp_train.models import vit as vit_module
from jmp_train.plan.compiled import lower_step
from jmp_train.plan.devices import DEVICES
from jmp_train.plan.program import Program
from jmp_train.runs.build import load_dataset
from jmp_train.sharding.mesh import MeshShape

pytestmark = pytest.mark.compiled

MESHES = ["data=2,fsdp=2,tensor=2", "data=4,tensor=2", "data=2,tensor=4"]
DTYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
SIZES = {"f32": 4, "f16": 2, "bf16": 2}
BATCH = 80  # its shares, of 20 or 40 rows, are no size of a parameter
CHUNK = 640  # tokens whose logits are computed at once; a device has two of them
D, F, DEPTH, T, V = 256, 704, 2, 128, 256  # of the gpt


@functools.cache
def compiled(name, mesh, **fields):
    """The program of a step, and the operations of its products on all devices, from its jaxpr."""
    own = find_experiment(name)
    if name.startswith("gpt"):
        fields = {
            "model": dataclasses.replace(
                own.model, width=D, depth=DEPTH, loss_chunk=CHUNK, **fields
            )
        }
    own = dataclasses.replace(own, mesh=mesh, batch_size=BATCH, **fields)
    lowered, found = lower_step(own, load_dataset(own).spec, DEVICES["h100"], 8)
    return Program(lowered.compile().as_text()), sum(found["products"].values())


def activations(program, mesh, length, classes=0):
    """The arrays of collectives that have an axis of a share of the batch, or of its tokens; but for
    those of one axis, which are gradients of several parameters in one sum."""
    rows = BATCH // mesh.shards
    sizes = {n // parts for n in (rows, rows * length) for parts in (1, mesh.tensor)}
    sizes -= {1, length, classes}
    return [x for x in sent_arrays(program) if len(x[2]) > 1 and sizes & set(x[2])]


@pytest.mark.parametrize(
    "precision,mesh", [("bf16", MESHES[0]), ("bf16", MESHES[1]), ("bf16", MESHES[2]), ("fp16", MESHES[0]), ("fp32", MESHES[0])]
)  # fmt: skip
def test_a_gpt_sends_the_sums_of_megatron(precision, mesh):
    program, _ = compiled(f"gpt_{precision}", mesh)
    mesh, dtype = MeshShape.parse(mesh), DTYPES[precision]
    tokens = BATCH // mesh.shards * T
    found = activations(program, mesh, T)
    sums = [x for x in found if x[0] == "all-reduce"]
    assert sum(times for *_, times in sums) == 4 * DEPTH
    assert {(math.prod(dims), d) for _, d, dims, _ in sums} == {(tokens * D, dtype)}
    # The loss: each device has a share of the tokens, and sends the gradient of its features.
    (loss,) = [x for x in found if x[0] != "all-reduce"]
    assert loss[0] == "all-gather" and loss[1] == dtype and math.prod(loss[2]) == tokens * D
    # Kernels move between the shares that are stored and those of heads: once forward, once backward.
    moved = [x for x in sent_arrays(program) if x[0] == "all-to-all"]
    size = sum(math.prod(dims) * times for _, _, dims, times in moved)
    assert size == 2 * DEPTH * (3 * D * D + 2 * D * F) // (mesh.fsdp * mesh.tensor)
    assert {x[1] for x in moved} == {dtype}
    # And the rest are the gathers and sums of parameters.
    kernels = DEPTH * (4 * D * D + 3 * D * F)
    others = [x for x in sent_arrays(program) if x not in found and x not in moved]
    size = sum(math.prod(dims) * times for _, _, dims, times in others)
    assert size <= 3 * kernels // mesh.tensor + 4 * V * D + 8 * DEPTH * D


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_of_a_gpt_computes_its_share_of_all_products(mesh):
    """Forward and twice as much backward; the logits once more, which the backward pass recomputes."""
    program, _ = compiled("gpt_bf16", mesh)
    each = 3 * DEPTH * (2 * (4 * D * D + 3 * D * F) + 4 * T * D) + 4 * 2 * V * D
    ideal = BATCH * T * each / 8
    assert product_flops(program) == pytest.approx(ideal, rel=1e-3)


def test_the_page_on_scale_has_the_figures_of_gpt_124m():
    own = dataclasses.replace(find_experiment("gpt_124m_bf16"), mesh=MESHES[0])
    lowered, found = lower_step(own, load_dataset(own).spec, DEVICES["h100"], 8)
    program, whole = Program(lowered.compile().as_text()), sum(found["products"].values())
    assert product_flops(program) == pytest.approx(whole / 8, rel=1e-3)
    arrays = sent_arrays(program)
    sums = [x for x in arrays if x[:3] == ("all-reduce", "bf16", (8, 1024, 896))]
    moved = [x for x in arrays if x[0] == "all-to-all"]
    assert sum(times for *_, times in sums) == 4 * 13
    size = {name: sum(2 * math.prod(d) * n for _, _, d, n in x) / 1e6 for name, x in (("sums", sums), ("moved", moved))}  # fmt: skip
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text()
    assert f"an eighth of all products, {whole / 8e12:.2f} TFLOP" in page
    assert f"sums {size['sums']:.0f} MB of activations" in page
    assert f"moves {size['moved']:.0f} MB of kernels" in page


def test_without_the_rules_a_device_computes_more(monkeypatch):
    """What the two tests above would see."""
    monkeypatch.setattr("jmp_train.runs.devices.placement_of", lambda model: ())
    own = find_experiment("mlp_bf16")
    own = dataclasses.replace(own, mesh=MESHES[0], batch_size=BATCH)
    lowered, found = lower_step(own, load_dataset(own).spec, DEVICES["h100"], 8)
    whole = sum(found["products"].values())
    assert product_flops(Program(lowered.compile().as_text())) > 1.5 * whole / 8


@pytest.mark.parametrize("remat,forward", [("dots", 2), ("full", 4)])
def test_with_remat_only_whole_blocks_sum_again(remat, forward):
    program, _ = compiled("gpt_bf16", MESHES[0], remat=remat)
    found = activations(program, MeshShape.parse(MESHES[0]), T)
    count = sum(times for kind, *_, times in found if kind == "all-reduce")
    assert count <= (forward + 2) * DEPTH


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_vit_sends_the_sums_of_megatron(precision, monkeypatch):
    width, depth, length = 64, 2, 16
    monkeypatch.setitem(vit_module.SIZES, "tiny", vit_module._Shape(width, depth, 4))
    compiled.cache_clear()
    program, whole = compiled(f"vit_{precision}", MESHES[0])
    compiled.cache_clear()
    mesh, dtype = MeshShape.parse(MESHES[0]), DTYPES[precision]
    found = activations(program, mesh, length, classes=10)
    tokens = BATCH // mesh.shards * length
    assert {(kind, d, math.prod(dims)) for kind, d, dims, _ in found} == {
        ("all-reduce", dtype, tokens * width)
    }
    assert sum(times for *_, times in found) == 4 * depth
    # The head of 10 classes is computed by all of `tensor`.
    assert product_flops(program) <= 1.02 * whole / 8


def test_an_mlp_sums_once_forward_and_once_backward():
    program, whole = compiled("mlp_bf16", MESHES[0])
    rows = BATCH // MeshShape.parse(MESHES[0]).shards
    large = [x for x in sent_arrays(program) if x[2] == (rows, 256)]
    assert [x[:2] for x in large] == [("all-reduce", "bf16")] * 2
    assert product_flops(program) <= 1.02 * whole / 8
    # Of the 10 classes, the largest logit and the sums of the softmax: a few numbers a row.
    found = activations(program, MeshShape.parse(MESHES[0]), 1)
    small = sum(math.prod(dims) * times for *_, dims, times in found if dims != (rows, 256))
    assert small <= 10 * rows
