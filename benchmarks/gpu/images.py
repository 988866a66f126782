"""What the networks for images multiply; the standard library alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.table import Workload

STAGES = {"tiny": (1, 1, 1), "50": (3, 4, 6, 3)}
"""Blocks of each stage of a "resnet", by its size; those of "50" are bottlenecks."""


def products(workload: Workload) -> int:
    """Multiplications of a forward pass of one image, of convolutions, products and attention.

    ResNet-50 needs the 4.1e9 that the literature gives for it, ViT-B/16 17.5e9.

    Args:
      workload: a "resnet" or a "vit".
    """
    return _resnet(workload) if workload.kind == "resnet" else _vit(workload)


def _resnet(w: Workload) -> int:
    side = _half(w.features)
    total = side**2 * 7 * 7 * 3 * w.width
    side, inputs, bottleneck = _half(side), w.width, w.size == "50"
    for stage, blocks in enumerate(STAGES[w.size]):
        width = w.width * 2**stage
        outputs = 4 * width if bottleneck else width
        for block in range(blocks):
            before, after = side, _half(side) if stage and not block else side
            if bottleneck:
                total += before**2 * inputs * width
                total += after**2 * width * (9 * width + outputs)
            else:
                total += after**2 * 9 * (inputs + width) * width
            if after != before or inputs != outputs:
                total += after**2 * inputs * outputs
            side, inputs = after, outputs
    return total + inputs * w.classes


def _vit(w: Workload) -> int:
    patches = (w.features // w.patch) ** 2
    block = 12 * w.width**2 + 2 * patches * w.width
    return patches * (3 * w.patch**2 * w.width + w.depth * block) + w.width * w.classes


def _half(side: int) -> int:
    return -(-side // 2)
