"""The networks for images in PyTorch: those of `jmp_train.models`, in the layout that is quickest.

PyTorch pads both sides of an image alike, and JAX's "SAME" one side more where a stride of 2 meets an
even size. So images of 224 pixels are sampled a pixel apart, at the same cost; those of 33 are not.
"""

# torch is no dependency of the project.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from benchmarks.gpu.images import STAGES

if TYPE_CHECKING:
    from benchmarks.gpu.table import Workload


class Residual(nn.Module):
    """Two convolutions, or three with a bottleneck, added to their input."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            parts = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            parts = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        self.convs = nn.ModuleList(_conv(*part) for part in parts)
        self.norms = nn.ModuleList(nn.BatchNorm2d(part[1]) for part in parts)
        changes = stride != 1 or inputs != outputs
        self.shortcut = _conv(inputs, outputs, 1, stride) if changes else None
        self.shortcut_norm = nn.BatchNorm2d(outputs) if changes else None

    def forward(self, x_BxCxHxW: torch.Tensor) -> torch.Tensor:
        y_BxCxHxW = x_BxCxHxW
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y_BxCxHxW = norm(conv(F.relu(y_BxCxHxW) if index else y_BxCxHxW))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x_BxCxHxW = self.shortcut_norm(self.shortcut(x_BxCxHxW))
        return F.relu(x_BxCxHxW + y_BxCxHxW)


class ResNet(nn.Module):
    """The network of `jmp_train.models.ResNet`; called with a batch, it returns the mean loss."""

    def __init__(self, workload: Workload):
        super().__init__()
        bottleneck, inputs = workload.size == "50", workload.width
        self.stem = _conv(3, inputs, 7, 2)
        self.stem_norm = nn.BatchNorm2d(inputs)
        blocks = []
        for stage, count in enumerate(STAGES[workload.size]):
            width = workload.width * 2**stage
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(Residual(inputs, width, stride, bottleneck))
                inputs = 4 * width if bottleneck else width
        self.blocks = nn.ModuleList(blocks)
        self.head = skip_init(nn.Linear, inputs, workload.classes)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        # Channels are last in memory already, so that nothing is copied.
        x_BxCxHxW = batch["image"].permute(0, 3, 1, 2).to(dtype)
        x_BxCxHxW = F.relu(self.stem_norm(self.stem(x_BxCxHxW)))
        x_BxCxHxW = F.max_pool2d(x_BxCxHxW, 3, 2, 1)
        for block in self.blocks:
            x_BxCxHxW = block(x_BxCxHxW)
        return _loss(self.head(x_BxCxHxW.mean((2, 3))), batch)


class EncoderBlock(nn.Module):
    """Attention, then a perceptron, each behind a norm and added."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = _layer_norm(width), _layer_norm(width)
        self.qkv, self.out = (skip_init(nn.Linear, width, n * width) for n in (3, 1))
        self.up = skip_init(nn.Linear, width, 4 * width)
        self.down = skip_init(nn.Linear, 4 * width, width)

    def forward(self, x_BxTxD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BxTxD.shape
        qkv = self.qkv(self.norm1(x_BxTxD)).view(batch, length, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x_BxTxD = x_BxTxD + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        inner_BxTxF = F.gelu(self.up(self.norm2(x_BxTxD)), approximate="tanh")
        return x_BxTxD + self.down(inner_BxTxF)


class Vit(nn.Module):
    """The network of `jmp_train.models.Vit`; called with a batch, it returns the mean loss."""

    def __init__(self, workload: Workload):
        super().__init__()
        width, patch = workload.width, workload.patch
        self.embed = skip_init(nn.Conv2d, 3, width, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, (workload.features // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            EncoderBlock(width, workload.heads) for _ in range(workload.depth)
        )
        self.norm = _layer_norm(width)
        self.head = skip_init(nn.Linear, width, workload.classes)

    def forward(self, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        x_BxDxHxW = self.embed(batch["image"].permute(0, 3, 1, 2).to(dtype))
        x_BxTxD = x_BxDxHxW.flatten(2).transpose(1, 2)
        x_BxTxD = x_BxTxD + self.positions.to(x_BxTxD.dtype)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD)
        return _loss(self.head(self.norm(x_BxTxD).mean(1)), batch)


def by_torch_name(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Our parameters, or gradients of them, under the names and in the layout of these networks."""
    named: dict[str, np.ndarray] = {}
    for key, value in params.items():
        if key == "attention":
            named |= _attention(value, prefix)
        elif isinstance(value, dict):
            named |= by_torch_name(value, f"{prefix}{key}.")
        elif key == "kernel":
            kernel = np.asarray(value)
            named[f"{prefix}weight"] = kernel.transpose(
                (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
            )
        else:
            named[prefix + ("weight" if key == "scale" else key)] = np.asarray(value)
    return named


def _attention(params: Any, prefix: str) -> dict[str, np.ndarray]:
    """Query, key and value as one product; each of ours has an axis of heads."""
    three = [params[part] for part in ("query", "key", "value")]
    kernels = [np.asarray(x["kernel"]) for x in three]
    width = len(kernels[0])
    out = {name: np.asarray(x) for name, x in params["out"].items()}
    return {
        f"{prefix}qkv.weight": np.concatenate([x.reshape(width, -1).T for x in kernels]),
        f"{prefix}qkv.bias": np.concatenate([np.asarray(x["bias"]).reshape(-1) for x in three]),
        f"{prefix}out.weight": out["kernel"].reshape(-1, width).T,
        f"{prefix}out.bias": out["bias"],
    }


def _loss(logits_BxC: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits_BxC.float(), batch["label"].long())


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """Its numbers are copied in later."""
    conv = skip_init(nn.Conv2d, inputs, outputs, kernel, stride, kernel // 2, bias=False)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)
