"""The profile of the GPU benchmark: time by kind of operation, from made-up and real traces."""

import json

import pytest

from benchmarks.gpu import profile, table


def process(pid, name):
    return {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}


def lane(pid, tid, name):
    return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}


def ran(pid, tid, name, start, length, op=""):
    args = {"hlo_op": op or name, "hlo_module": "jit_step"}
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "ts": start,
        "dur": length,
        "args": args,
    }


GPU = [
    process(1, "/device:GPU:0"),
    process(7, "/host:CPU"),
    lane(1, 13, "Stream #13(Compute)"),
    lane(1, 14, "Stream #14(MemcpyD2D)"),
    lane(1, 20, "XLA Ops"),
    lane(1, 21, "XLA Modules"),
    ran(1, 13, "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", 0, 4000, "custom-call.3"),
    ran(1, 13, "gemm_fusion_dot_12", 4000, 1000),
    ran(1, 13, "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", 5000, 2000, "c.1"),
    ran(1, 13, "loop_multiply_fusion_3", 7000, 1500),
    ran(1, 13, "input_reduce_fusion_1", 8500, 500),
    ran(1, 13, "ncclDevKernel_AllReduce_Sum_bf16_RING", 9000, 300, "all-reduce.1"),
    ran(1, 13, "RedzoneAllocator", 9300, 100),
    ran(1, 14, "MemcpyD2D", 10000, 600, "copy.4"),  # 600 us after the one before ended
    ran(1, 20, "loop_multiply_fusion_3", 7000, 1500),  # these lanes repeat the streams
    ran(1, 21, "jit_step", 0, 10600),
    ran(7, 1, "dot.1", 0, 99999),  # and the host waits
]


def test_kinds_of_a_gpu_trace_have_the_known_sums():
    found = {k["kind"]: k for k in profile.by_kind(GPU, steps=2)}
    # Milliseconds a step: half of the sums above.
    assert {kind: k["ms"] for kind, k in found.items()} == {
        "matrix product": 2.5,
        "attention": 1.0,
        "elementwise fusion": 0.75,
        "reduction": 0.25,
        "copy": 0.3,
        "idle/gap": 0.3,
        "collective": 0.15,
        "other": 0.05,
    }
    assert sum(k["share"] for k in found.values()) == pytest.approx(1)
    assert found["matrix product"]["share"] == pytest.approx(5000 / 10600)


def test_largest_kind_comes_first():
    kinds = profile.by_kind(GPU, steps=2)
    assert [k["ms"] for k in kinds] == sorted((k["ms"] for k in kinds), reverse=True)
    assert profile.text_of(kinds).splitlines()[1].split() == [
        *("matrix", "product", "2.500", "47.2", "%")
    ]


def test_cpu_threads_count_operations_without_their_loops():
    events = [
        process(3, "/host:CPU"),
        lane(3, 1, "tf_XLAEigen/1"),
        lane(3, 2, "tf_XLAPjRtCpuClient/2"),
        ran(3, 2, "while.3", 0, 1000),
        ran(3, 1, "ynn_fusion.2", 0, 400),
        ran(3, 2, "transpose_copy_fusion", 100, 200),
        ran(3, 1, "reduce-precision_convert_fusion", 500, 100),
        {"ph": "X", "pid": 3, "tid": 1, "name": "ThreadPool", "ts": 0, "dur": 5000},
    ]
    found = {k["kind"]: k["ms"] for k in profile.by_kind(events, steps=1)}
    assert found == {
        "matrix product": 0.4,
        "copy": 0.2,
        "elementwise fusion": 0.1,
        "idle/gap": 0.1,
    }


def test_overlapping_streams_leave_no_gap():
    events = [*GPU[:4], ran(1, 13, "dot.1", 0, 100), ran(1, 14, "MemcpyD2D", 50, 100)]
    found = {k["kind"]: k["ms"] for k in profile.by_kind(events, steps=1)}
    assert found == {"matrix product": 0.1, "copy": 0.1, "idle/gap": 0.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix product"),
        ("cutlass_80_tensorop_s1688gemm_128x128_16x5_nn_align4", "matrix product"),
        ("dot_general.3", "matrix product"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80", "attention"),
        ("reduce-scatter.1", "collective"),
        ("all-gather-start", "collective"),
        ("triton_softmax_4", "reduction"),
        ("loop_dynamic_update_slice_fusion", "copy"),
        ("input_transpose_fusion", "copy"),
        ("wrapped_convert.2", "elementwise fusion"),
        ("fusion_7", "elementwise fusion"),
        ("rng-bit-generator", "other"),
    ],
)
def test_kind_of_operation_by_name(name, kind):
    assert profile.kind_of(name) == kind


def test_trace_without_device_operations_is_refused():
    with pytest.raises(ValueError, match="has no operations of a device"):
        profile.by_kind([process(3, "/host:CPU")], steps=1)


@pytest.mark.parametrize("row_id", ["gpt_124m/bf16/PyTorch", "ceiling/bf16/jmp_train"])
def test_row_without_steps_in_jax_is_refused(row_id):
    with pytest.raises(ValueError, match=f"row is '{row_id}'; expected one with steps in JAX"):
        profile.profile(table.row(row_id), True)


def test_profile_is_kept_in_a_measured_row(tmp_path):
    path = tmp_path / "gpu-cpu.json"
    kinds = profile.by_kind(GPU, steps=2)
    assert not profile.keep(path, "a/b/c", kinds)
    path.write_text(json.dumps({"rows": {"a/b/c": {"status": "ok"}}}))
    assert not profile.keep(path, "a/b/d", kinds)
    assert profile.keep(path, "a/b/c", kinds)
    assert json.loads(path.read_text())["rows"]["a/b/c"] == {"status": "ok", "profile": kinds}
    assert [p.name for p in tmp_path.iterdir()] == ["gpu-cpu.json"]


@pytest.mark.slow
def test_real_trace_has_products_and_reductions():
    row = table.row("mlp_digits/fp32/jmp_train/steps=50")
    found = {k["kind"]: k for k in profile.by_kind(profile.trace(row, 8, True, 2), steps=2)}
    assert found["matrix product"]["ms"] > 0
    assert sum(k["share"] for k in found.values()) == pytest.approx(1)
