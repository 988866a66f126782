"""What is read from the text of an optimised program, against counts made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmp_train._jaxpr.flops import flops_by_dtype
from jmp_train.plan.program import Program

TEXT = """\
HloModule jit_step

%body (p: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %p = (s32[], f32[4,64]) parameter(0)
  %x = f32[4,64]{1,0} get-tuple-element(%p), index=1
  %gather = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, dimensions={1}
  %done = bf16[8,64]{1,0} all-gather-done(%gather)
  %scatter = ((f32[64]{0}), (f32[16]{0})) reduce-scatter-start(%x), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[4,64]) tuple(%x, %x)
}

%condition (p.1: (s32[], f32[4,64])) -> pred[] {
  %p.1 = (s32[], f32[4,64]) parameter(0)
  %limit = s32[] constant(7)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%fused (a: f32[7,64], b: s32[]) -> f32[1,64] {
  %a = f32[7,64]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %slice = f32[1,64]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,64}
}

%updating (c: f32[7,64], d: f32[1,64], e: s32[]) -> f32[7,64] {
  %c = f32[7,64]{1,0} parameter(0)
  %d = f32[1,64]{1,0} parameter(1)
  %e = s32[] parameter(2)
  ROOT %put = f32[7,64]{1,0} dynamic-update-slice(%c, %d, %e, %e)
}

ENTRY %main (q: f32[7,64], r: s32[]) -> f32[4,64] {
  %q = f32[7,64]{1,0} parameter(0)
  %r = s32[] parameter(1)
  %one = f32[1,64]{1,0} fusion(%q, %r), kind=kLoop, calls=%fused
  %all = f32[7,64]{1,0} fusion(%q, %one, %r), kind=kLoop, calls=%updating
  %init = (s32[], f32[4,64]) tuple(%r, %q)
  %loop = (s32[], f32[4,64]) while(%init), condition=%condition, body=%body
  %sum = bf16[100]{0} all-reduce(%one), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %again = bf16[100]{0} all-reduce(%one), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %alone = f32[9]{0} all-reduce(%one), channel_id=4, replica_groups={{0},{1}}, to_apply=%add
  ROOT %out = f32[4,64]{1,0} get-tuple-element(%loop), index=1
}
"""  # fmt: skip


def test_collectives_are_counted_by_kind_dtype_and_runs():
    found = {(c.kind, c.dtype): c for c in Program(TEXT).collectives()}
    assert set(found) == {("all-gather", "bf16"), ("reduce-scatter", "f32"), ("all-reduce", "bf16")}
    gather = found["all-gather", "bf16"]
    assert (gather.devices, gather.count, gather.bytes) == (4, 7, 7 * 8 * 64 * 2)
    assert gather.sent == 7 * 8 * 64 * 2 * 3 // 4
    scatter = found["reduce-scatter", "f32"]  # 16 numbers of each of four devices
    assert (scatter.devices, scatter.count, scatter.bytes) == (4, 7, 7 * 64 * 4)
    total = found["all-reduce", "bf16"]
    assert (total.devices, total.count, total.bytes) == (8, 1, 200)
    assert total.sent == 350  # twice 7 / 8


STARTS = """\
HloModule step, num_partitions=8

%putting (c: f32[7,64], d: f32[1,64]) -> f32[7,64] {
  %c = f32[7,64]{1,0} parameter(0)
  %d = f32[1,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %put = f32[7,64]{1,0} dynamic-update-slice(%c, %d, %zero, %zero)
}

ENTRY %main (q: f32[7,64], r: f32[1,64]) -> f32[7,64] {
  %q = f32[7,64]{1,0} parameter(0)
  %r = f32[1,64]{1,0} parameter(1)
LINES
}
"""


@pytest.mark.parametrize(
    "shape,arrays",
    [
        ("f32[7,64]{1,0}", 1),
        ("(f32[7,64]{1,0}, f32[7,64]{1,0})", 2),
        ("((f32[7,64]{1,0}), f32[7,64]{1,0})", 1),  # from jaxlib 0.11 on
        ("((f32[7,64]{1,0}, f32[7,64]{1,0}), (f32[7,64]{1,0}, f32[7,64]{1,0}))", 2),
    ],
)
def test_a_sum_that_goes_on_beside_others_counts_once(shape, arrays):
    line = f"  %sum = {shape} all-reduce-start(%q), replica_groups=[2,4]<=[8], to_apply=%add\n"
    line += f"  %done = {shape} all-reduce-done(%sum)"
    (found,) = Program(STARTS.replace("LINES", line)).collectives()
    assert (found.kind, found.count, found.bytes) == ("all-reduce", 1, arrays * 7 * 64 * 4)


def test_a_fusion_that_goes_on_beside_others_moves_what_it_does_alone():
    beside = """\
  %put-start = ((f32[7,64]{1,0}, f32[1,64]{1,0}), f32[7,64]{1,0}, u32[]) fusion-start(%q, %r), kind=kLoop, calls=%putting
  ROOT %put-done = f32[7,64]{1,0} fusion-done(%put-start)"""
    alone = "  ROOT %put.1 = f32[7,64]{1,0} fusion(%q, %r), kind=kLoop, calls=%putting"
    moved = [Program(STARTS.replace("LINES", lines)).bytes_moved() for lines in (beside, alone)]
    assert moved == [2 * 64 * 4] * 2  # reads a row, writes a row


def test_what_is_copied_or_gathered_beside_others_is_read_once_and_written_once():
    lines = """\
  %copying = (f32[7,64]{1,0}, f32[7,64]{1,0}, u32[]) copy-start(%q)
  %going_on = (f32[7,64]{1,0}, f32[7,64]{1,0}, u32[]) copy-update(%copying)
  %copied = f32[7,64]{1,0} copy-done(%going_on)
  %gathering = (f32[1,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%r), replica_groups=[1,8]<=[8], dimensions={0}
  %gathered = f32[8,64]{1,0} all-gather-done(%gathering)"""
    moved = Program(STARTS.replace("LINES", lines)).bytes_moved()
    assert moved == ((7 + 7) + (1 + 8)) * 64 * 4


@pytest.mark.parametrize(
    "groups,devices,hosts",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 1),
        ("replica_groups={{0,1,2,4},{3,5,6,7}}", 4, 2),
        ("replica_groups=[2,4]<=[8]", 4, 1),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, 2),  # 0 and 4, 1 and 5 ...
        ("replica_groups=[1,8]<=[8]", 8, 2),
        ("replica_groups={}", 8, 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, 1),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2, 2),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4, 2),  # 0, 2, 4, 6
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}", 4, 2),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 2, 1),
        ("source_target_pairs={{2,3},{3,4}}", 2, 2),
    ],
)
def test_the_hosts_of_a_collective_are_those_of_its_devices(groups, devices, hosts):
    """Eight devices, of which 0 to 3 are on one host and 4 to 7 on another."""
    kind = "collective-permute" if "pairs" in groups else "all-gather"
    text = "HloModule step, num_partitions=8\n\nENTRY %main (p: f32[8]) -> f32[8] {\n"
    text += f"  %x = f32[8]{{0}} {kind}(%p), channel_id=1, {groups}, dimensions={{0}}\n}}\n"
    (found,) = Program(text, host=4).collectives()
    assert (found.kind, found.devices, found.hosts, found.bytes) == (kind, devices, hosts, 32)
    assert Program(text).collectives()[0].hosts == 1


def test_a_slice_counts_as_a_slice_and_an_update_in_place_as_an_update():
    dropped = ("while(", "all-reduce(", "index=1")
    text = "\n".join(x for x in TEXT.splitlines() if not any(word in x for word in dropped))
    row, number = 64 * 4, 4
    sliced = (row + number) + row  # reads a row and its index, writes a row
    updated = (row + number) + row
    assert Program(text).bytes_moved() == sliced + updated


def test_the_bytes_of_a_program_are_near_those_that_xla_counts():
    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)

    args = jnp.ones((256, 256)), jnp.ones((512, 256))
    compiled = jax.jit(step).lower(*args).compile()
    ours, theirs = Program(compiled.as_text()).bytes_moved(), compiled.cost_analysis()
    assert ours == pytest.approx(theirs["bytes accessed"], rel=0.25)


def test_operations_are_those_that_xla_counts_and_that_a_hand_counts():
    def step(w, x):
        h = jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))
        return (h.astype(jnp.float32) @ w.T).sum()

    w, x = np.ones((64, 64), np.float32), np.ones((128, 64), np.float32)
    counts = flops_by_dtype(jax.make_jaxpr(step)(w, x).jaxpr)
    assert counts["bfloat16"] == counts["float32"] == 2 * 128 * 64 * 64
    compiled = jax.jit(step).lower(w, x).compile()
    assert sum(counts.values()) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize("length", [1, 5])
def test_the_body_of_a_loop_counts_once_for_each_step(length):
    w = np.ones((length, 8, 8), np.float32)
    loop = lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    counts = flops_by_dtype(jax.make_jaxpr(loop)(w, np.ones((8, 8), np.float32)).jaxpr)
    assert counts["float32"] == length * 2 * 8**3
