"""The rows of PyTorch: the same networks, batches and optimizer, as fast as PyTorch runs them.

`torch.compile`, `scaled_dot_product_attention`, fused AdamW, `autocast` with a `GradScaler` for
float16. Between blocks, features have the compute dtype, as in ours; under `autocast` alone they
would stay float32. On a CPU nothing is compiled, so that no C++ compiler is needed.
"""

# torch is no dependency of the project.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import torch_images
from benchmarks.gpu.measure import Trainer

if TYPE_CHECKING:
    from benchmarks.gpu.table import Row, Workload

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# cuDNN's attention is the quickest on Hopper; where a kernel does not fit, the next is taken.
_ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class RmsNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, the result in the input's dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x_BxTxD: torch.Tensor) -> torch.Tensor:
        wide = x_BxTxD.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (wide * inverse * self.scale).to(x_BxTxD.dtype)


class Block(nn.Module):
    """Causal attention with rotary positions, then SwiGLU, each behind a norm and added."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.qkv = _linear(width, 3 * width)
        self.out = _linear(width, width)
        self.up = _linear(width, 2 * inner)
        self.down = _linear(inner, width)

    def forward(
        self, x_BxTxD: torch.Tensor, cos_TxF: torch.Tensor, sin_TxF: torch.Tensor
    ) -> torch.Tensor:
        batch, length, width = x_BxTxD.shape
        qkv = self.qkv(self.norm1(x_BxTxD)).view(batch, length, 3, self.heads, width // self.heads)
        q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = qkv.permute(2, 0, 3, 1, 4)
        q_BxHxTxK, k_BxHxTxK = (_rotary(x, cos_TxF, sin_TxF) for x in (q_BxHxTxK, k_BxHxTxK))
        mixed = F.scaled_dot_product_attention(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, is_causal=True)
        x_BxTxD = x_BxTxD + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate_BxTxF, value_BxTxF = self.up(self.norm2(x_BxTxD)).chunk(2, dim=-1)
        return x_BxTxD + self.down(F.silu(gate_BxTxF) * value_BxTxF)


class Gpt(nn.Module):
    """The network of `jmp_train.models.Gpt`; called with a batch, it returns the mean loss."""

    def __init__(self, workload: Workload):
        super().__init__()
        width, heads, depth = workload.width, workload.heads, workload.depth
        inner = max(round(width * 8 / 3 / 64), 1) * 64
        self.again: Any = False
        """Whether the backward pass computes each block again, to save memory."""
        self.embed = skip_init(nn.Embedding, workload.classes, width)
        self.blocks = nn.ModuleList(Block(width, inner, heads) for _ in range(depth))
        self.norm = RmsNorm(width)
        half = width // heads // 2
        angles_TxF = torch.arange(workload.length)[:, None] * torch.tensor(
            10000.0 ** (-np.arange(half) / half), dtype=torch.float32
        )
        self.register_buffer("cos_TxF", angles_TxF.cos())
        self.register_buffer("sin_TxF", angles_TxF.sin())

    def forward(self, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        tokens_BxT1 = batch["tokens"].long()
        x_BxTxD = self.embed(tokens_BxT1[:, :-1]).to(dtype)
        for block in self.blocks:
            args = (x_BxTxD, self.cos_TxF, self.sin_TxF)
            x_BxTxD = checkpoint(block, *args, use_reentrant=False) if self.again else block(*args)
        logits_BxTxV = F.linear(self.norm(x_BxTxD), self.embed.weight).float()
        return F.cross_entropy(logits_BxTxV.flatten(0, 1), tokens_BxT1[:, 1:].flatten())


class Mlp(nn.Module):
    """The network of `jmp_train.models.Mlp`; called with a batch, it returns the mean loss."""

    def __init__(self, workload: Workload):
        super().__init__()
        hidden = [workload.width] * workload.depth
        widths = [workload.features, *hidden, workload.classes]
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(_linear(a, b, bias=True) for a, b in pairs)

    def forward(self, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        x_BxI = batch["image"].to(dtype)
        for layer in self.layers[:-1]:
            x_BxI = F.gelu(layer(x_BxI), approximate="tanh")
        return F.cross_entropy(self.layers[-1](x_BxI).float(), batch["label"].long())


def network(workload: Workload) -> nn.Module:
    """The float32 network of a workload, on the CPU; `copy_parameters` fills it."""
    networks: dict[str, type[nn.Module]] = {
        "gpt": Gpt,
        "mlp": Mlp,
        "resnet": torch_images.ResNet,
        "vit": torch_images.Vit,
    }
    return networks[workload.kind](workload)


def our_parameters(workload: Workload) -> Any:
    """The first parameters of jmp_train's rows, so that losses can be compared; made on the CPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the GPU's memory is PyTorch's
    from benchmarks.gpu import jax_rows
    from benchmarks.gpu.table import Row

    task = jax_rows.task_of(Row(workload.name, "fp32", "jmp_train"), workload)
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(task.init)(jax.random.key(0))[0]


def copy_parameters(net: nn.Module, workload: Workload, params: Any) -> None:
    """Fills a network with our parameters."""
    named = by_torch_name(workload, params)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            # Copied: an array of JAX cannot be written to.
            parameter.copy_(torch.from_numpy(named.pop(name).copy()))
    if named:
        raise ValueError(f"the network has no {', '.join(named)}; expected the one of jmp_train")


def by_torch_name(workload: Workload, params: Any) -> dict[str, np.ndarray]:
    """Our parameters, or gradients of them, under the names and in the layout of the network."""
    if workload.kind in ("resnet", "vit"):
        return torch_images.by_torch_name(params)
    named = {}
    if workload.kind == "mlp":
        for number, layer in params["layers"].items():
            named[f"layers.{number}.weight"] = np.asarray(layer["kernel"]).T
            named[f"layers.{number}.bias"] = np.asarray(layer["bias"])
        return named
    named["embed.weight"] = np.asarray(params["embed"]["embedding"])
    named["norm.scale"] = np.asarray(params["norm"]["scale"])
    blocks = params["blocks"]
    places = (("attention", "qkv"), ("attention", "out"), ("mlp", "up"), ("mlp", "down"))
    for n in range(workload.depth):
        for name in ("norm1", "norm2"):
            named[f"blocks.{n}.{name}.scale"] = np.asarray(blocks[name]["scale"][n])
        for outer, name in places:
            named[f"blocks.{n}.{name}.weight"] = np.asarray(blocks[outer][name]["kernel"][n]).T
    return named


def adamw(net: nn.Module, workload: Workload) -> torch.optim.AdamW:
    """Fused AdamW over all parameters."""
    return torch.optim.AdamW(
        net.parameters(),
        lr=workload.learning_rate,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        fused=True,
    )


def make(row: Row, workload: Workload, batch: int, toy: bool) -> Trainer:
    """The trainer of a row.

    Args:
      row: its precision counts.
      workload: sizes.
      batch: windows or examples of a step.
      toy: whether the sizes are the toy ones; both run on a GPU where there is one.

    Raises:
      ValueError: for several steps in one dispatch, which the table asks of JAX alone.
    """
    if dict(row.options).get("steps", "1") != "1":
        raise ValueError("PyTorch takes one step in a dispatch; expected a row without steps=")
    torch.set_float32_matmul_precision("highest" if row.precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = row.precision != "fp32"
    torch.backends.cudnn.benchmark = True  # the quickest convolutions
    net = network(workload)
    copy_parameters(net, workload, our_parameters(workload))
    return _trainer(net, row.precision, workload, batch)


def _trainer(net: nn.Module, precision: str, workload: Workload, batch: int) -> Trainer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    net.to(device)
    dtype = _HALF.get(precision, torch.float32)
    optimizer = adamw(net, workload)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    calls = 0
    if not cuda:  # the sizes for a CPU are tiny; threads would wait for each other
        torch.set_num_threads(1)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        half = precision in _HALF
        with torch.autocast(device.type, dtype) if half else contextlib.nullcontext():
            return net(batch, dtype)

    compiled = torch.compile(loss_of) if cuda else loss_of

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        with sdpa_kernel(list(_ATTENTION), set_priority=True):
            loss = compiled(batch)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def put(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        host = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
        if not cuda:
            return host
        return {name: x.pin_memory().to(device, non_blocking=True) for name, x in host.items()}

    def wait(loss: torch.Tensor) -> float:
        if cuda:  # the loss alone is there before the optimizer is done
            torch.cuda.synchronize()
        return float(loss)

    def skipped() -> int:
        # The fused optimizer does not count the steps that it skips.
        state = optimizer.state[next(net.parameters())]
        return calls - round(float(state["step"])) if state else 0

    def rehearse() -> None:
        """One step that changes nothing but compiles all, and takes the memory of a real one."""
        with sdpa_kernel(list(_ATTENTION), set_priority=True):
            compiled(put(_zeros(workload, batch))).backward()
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()

    began = time.perf_counter()
    full = False
    try:
        rehearse()
    except torch.OutOfMemoryError:
        full = isinstance(net, Gpt)
        if not full:
            raise
    forget()  # outside of the handler, whose traceback keeps the failed step's arrays alive
    if full and isinstance(net, Gpt):
        net.again = True
        torch.compiler.reset()
        torch.cuda.empty_cache()
        rehearse()
        forget()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return Trainer(
        step=step,
        put=put,
        wait=wait,
        peak_memory=lambda: torch.cuda.max_memory_allocated() if cuda else None,
        skipped=skipped,
        parameters=sum(p.numel() for p in net.parameters()),
        compile_s=time.perf_counter() - began,
    )


def _zeros(workload: Workload, batch: int) -> dict[str, np.ndarray]:
    """A batch of the right shapes."""
    if workload.kind == "gpt":
        return {"tokens": np.zeros((batch, workload.length + 1), np.int32)}
    side = workload.features
    shape = (side,) if workload.kind == "mlp" else (side, side, 3)
    image = np.zeros((batch, *shape), np.float32)
    return {"image": image, "label": np.zeros(batch, np.int32)}


def _rotary(x_BxHxTxK: torch.Tensor, cos_TxF: torch.Tensor, sin_TxF: torch.Tensor) -> torch.Tensor:
    a, b = x_BxHxTxK.float().chunk(2, dim=-1)
    turned = torch.cat([a * cos_TxF - b * sin_TxF, a * sin_TxF + b * cos_TxF], dim=-1)
    return turned.to(x_BxHxTxK.dtype)


def _linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """Its numbers are copied in later."""
    return skip_init(nn.Linear, inputs, outputs, bias=bias)
