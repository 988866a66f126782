"""Figures of devices from their datasheets, and how their programs are compiled without them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as its maker describes it; rates are those of dense products."""

    name: str
    platform: str
    """Of the compiler: "cuda", "tpu" or "cpu"."""
    memory: int
    """Bytes that a program can use."""
    bandwidth: float
    """Bytes a second between memory and processor."""
    flops: Mapping[str, float]
    """Floating-point operations a second of products, by the dtype of their operands. float32 is that of
    JAX's default precision: TF32 on GPUs, bfloat16 passes on TPUs."""
    link: float
    """Bytes a second that a device sends to others of its host or slice, in one direction."""
    source: str
    gpus: int = 0
    """Of a GPU: their number on a host. Those of TPUs and others are on the links that `link` describes."""
    network: float = 0.0
    """Bytes a second that a GPU sends to other hosts, in one direction."""
    compute_capability: int = 0
    """Of a GPU."""
    clock_ghz: float = 0.0
    cores: int = 0
    """Streaming multiprocessors of a GPU."""
    l2_bytes: int = 0
    topology: str = ""
    """Of a TPU: its name for the compiler, before the shape."""
    host: tuple[int, ...] = ()
    """Of a TPU: the shape of the devices of a host."""


def _gpu(name: str, gib: float, terabytes: float, half: float, tf32: float, link: float,
         capability: int, cores: int, l2: int, source: str, clock: float,
         network: float = 0.0) -> Device:  # fmt: skip
    return Device(
        name,
        "cuda",
        int(gib * GIB),
        terabytes * 1e12,
        {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": tf32 * 1e12},
        link * 1e9,
        source,
        gpus=8 if network else 0,
        network=network * 1e9,
        compute_capability=capability,
        clock_ghz=clock,
        cores=cores,
        l2_bytes=l2 * 2**20,
    )


def _tpu(name: str, gib: float, gigabytes: float, bf16: float, link: float, topology: str,
         host: tuple[int, ...], source: str) -> Device:  # fmt: skip
    # A float32 product is one pass in bfloat16 by default; float16 is converted.
    flops: dict[str, float] = dict.fromkeys(("bfloat16", "float16", "float32"), bf16 * 1e12)
    return Device(
        name, "tpu", int(gib * GIB), gigabytes * 1e9, flops, link * 1e9, source,
        topology=topology, host=host,
    )  # fmt: skip


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h100", 79.1, 3.35, 989, 495, 450, 9, 132, 50,
             "NVIDIA H100 SXM datasheet: 80 GB HBM3, 3.35 TB/s, 989 TFLOP/s, NVLink 900 GB/s both ways; DGX: a network card of 400 Gbit/s for each", 1.98, 50),
        _gpu("h200", 139.8, 4.8, 989, 495, 450, 9, 132, 50,
             "NVIDIA H200 SXM datasheet: 141 GB HBM3e, 4.8 TB/s, 989 TFLOP/s, NVLink 900 GB/s both ways; DGX: a network card of 400 Gbit/s for each", 1.98, 50),
        _gpu("a100", 79.2, 2.04, 312, 156, 300, 8, 108, 40,
             "NVIDIA A100 80GB SXM datasheet: 2.04 TB/s, 312 TFLOP/s, NVLink 600 GB/s both ways; DGX: a network card of 200 Gbit/s for each", 1.41, 25),
        _gpu("b200", 178.0, 8.0, 2250, 1125, 900, 10, 148, 126,
             "NVIDIA DGX B200 datasheet, an eighth: 180 GB HBM3e, 8 TB/s, 2.25 PFLOP/s, NVLink 1.8 TB/s both ways; a network card of 400 Gbit/s for each", 1.96, 50),
        _gpu("rtx4090", 23.5, 1.008, 165.2, 82.6, 16, 8, 128, 72,
             "NVIDIA Ada whitepaper: 24 GB GDDR6X, 1,008 GB/s, 165.2 TFLOP/s with float32 sums; PCIe 4.0 x16, "
             "half of it reached", 2.52),
        _tpu("tpu-v5e", 15.75, 819, 197, 90, "v5e", (2, 4),
             "Google Cloud TPU v5e: 16 GB HBM, 819 GB/s, 197 TFLOP/s; links of 45 GB/s each way, two of them "
             "along a ring"),
        _tpu("tpu-v5p", 95.0, 2765, 459, 180, "v5", (2, 2, 1),
             "Google Cloud TPU v5p: 95 GB HBM, 2,765 GB/s, 459 TFLOP/s; links of 90 GB/s each way, two of them "
             "along a ring"),
        _tpu("tpu-v6e", 31.25, 1640, 918, 180, "v6e", (2, 4),
             "Google Cloud TPU v6e: 32 GB HBM, 1,640 GB/s, 918 TFLOP/s; links of 90 GB/s each way, two of them "
             "along a ring"),
        Device("cpu", "cpu", 16 * GIB, 2e10, dict.fromkeys(("bfloat16", "float16", "float32"), 1e11), 1e10,
               "two cores of a server, as measured for this project: a guess for any other"),
    )
}  # fmt: skip
"""By name. The memory of a GPU is that of its datasheet, less what the driver keeps."""


def host_of(device: Device, count: int) -> int:
    """Return how many of so many GPUs are on a host; 0 where all devices are on one kind of link.

    >>> host_of(DEVICES["h100"], 64), host_of(DEVICES["h100"], 12), host_of(DEVICES["tpu-v5e"], 64)
    (8, 4, 0)
    """
    return math.gcd(count, device.gpus) if device.gpus else 0


def target_config(device: Device) -> str:
    """Return the description of a GPU that XLA compiles for, a `GpuTargetConfigProto` as text.

    Limits that all GPUs since Ampere share are constants; XLA tiles its loops by the others.
    """
    optin = {8: 101_376, 9: 232_448, 10: 232_448}[device.compute_capability]
    minor = 9 if device.name == "rtx4090" else 0
    if device.name == "a100":
        optin = 166_912
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {optin + 1024}
  threads_per_core_limit: {1536 if minor else 2048}
  core_count: {device.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(device.bandwidth)}
  l2_cache_size: {device.l2_bytes}
  clock_rate_ghz: {device.clock_ghz}
  device_memory_size: {device.memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {device.compute_capability} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "{device.name}"
"""


def tpu_topology(device: Device, count: int) -> str:
    """Return the name of a slice of so many TPUs, such as v5e:2x4.

    Raises:
      ValueError: for a number that no slice has.
    """
    shapes = _SHAPES[len(device.host)]
    if count not in shapes:
        raise ValueError(
            f"the mesh has {count} devices, and no slice of {device.name} does; expected one of "
            f"{', '.join(map(str, shapes))}"
        )
    return f"{device.topology}:{'x'.join(map(str, shapes[count]))}"


_SHAPES: dict[int, dict[int, tuple[int, ...]]] = {
    2: {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
        512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)},
}  # fmt: skip
