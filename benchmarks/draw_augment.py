"""Draws docs/figures/augment.png: samples of each transform of `jmp_train.data.augment`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from jmp_train.data import GlyphsConfig, augment
from jmp_train.data.glyphs import FONTS

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "augment.png"
COLUMNS = 10
TRANSFORMS = {
    "as it is": augment.chain(),
    "random_crop(4)": augment.random_crop(4),
    "random_resized_crop()": augment.random_resized_crop(),
    "random_flip()": augment.random_flip(),
    "color_jitter(0.4, 0.4, 0.4, 0.2)": augment.color_jitter(0.4, 0.4, 0.4, 0.2),
    "rand_augment(2, 9)": augment.rand_augment(2, 9),
    "rand_augment(2, 20)": augment.rand_augment(2, 20),
}


def main() -> None:
    """Draw the figure: a row for each transform of the same images."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    glyphs = GlyphsConfig(noise=0.02).draw(COLUMNS, FONTS, purpose=0)["image"]
    # Grey images, given a colour each, so that changes of hue and saturation are seen.
    ink = np.random.default_rng(5).uniform(0, 1, (2, COLUMNS, 1, 1, 3)).astype(np.float32)
    images = ink[0] * glyphs + ink[1] * (1 - glyphs)
    height = len(TRANSFORMS)
    figure, axes = plt.subplots(height, COLUMNS, figsize=(9, 0.72 * height), dpi=100)
    for row, (name, transform) in zip(axes, TRANSFORMS.items(), strict=True):
        changed = transform({"image": images}, np.random.default_rng(1))["image"]
        for cell, image in zip(row, changed, strict=True):
            cell.imshow(image, interpolation="nearest", vmin=0, vmax=1)
            cell.set_axis_off()
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", size=9)
    figure.subplots_adjust(
        left=0.27, right=0.995, top=0.995, bottom=0.005, wspace=0.05, hspace=0.05
    )
    figure.savefig(FIGURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
