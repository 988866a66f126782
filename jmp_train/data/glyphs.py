"""Images of characters, drawn from the fonts that Matplotlib ships: any number, with exact labels."""

from __future__ import annotations

import dataclasses
import functools
import string
from pathlib import Path
from typing import ClassVar

import numpy as np

from jmp_train.data.dataset import Arrays, Dataset
from jmp_train.fields import check_fields
from jmp_train.spec import DataSpec

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
"""The character of each label."""

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
)
"""Fonts of the training images."""
HELD_OUT_FONTS = ("DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic", "STIXGeneralBol")
"""Fonts of the held-out images, of which no training image is drawn."""

SIZE = 32  # pixels of an image
_CANVAS = 64  # pixels of a drawn character, in the middle
_EM = 40  # pixels of the font size on the canvas
_AT_ONCE = 1024  # images drawn together


@dataclasses.dataclass(frozen=True)
class GlyphsConfig:
    """Images of characters, drawn from the fonts that Matplotlib ships.

    Each image has a digit or a letter of a random font, turned, scaled and shifted, in random shades,
    with parts of other characters at its edges and noise. Held-out images have other fonts.
    """

    name: ClassVar[str] = "glyphs"

    examples: int = 20_000
    """Number of training images."""
    eval_examples: int = 4_000
    """Number of held-out images, of fonts that no training image has."""
    rotation: float = 15.0
    """Largest angle that a character is turned by, in degrees."""
    shift: float = 2.5
    """Largest distance that a character is moved by, along each axis, in pixels of 32."""
    both_shades: bool = False
    """Whether ink is lighter than the paper in some images and darker in others; else it is lighter."""
    clutter: int = 2
    """Number of other characters at the edges of an image."""
    noise: float = 0.1
    """Largest standard deviation of Gaussian noise; pixels are 0 to 1."""
    draw_seed: int = 0
    """Seed of the images."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least, largest in (
            ("examples", 1, 10**7),
            ("eval_examples", 1, 10**7),
            ("rotation", 0, 180),
            ("shift", 0, SIZE),
            ("clutter", 0, 8),
            ("noise", 0, 1),
            ("draw_seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not least <= value <= largest:
                raise ValueError(f"{name} is {value}; expected {least} to {largest}")

    def load(self) -> Dataset:
        """Draw images, float32 (n, 32, 32, 1) from 0 to 1, and labels, int32 (n,)."""
        train = self.draw(self.examples, FONTS, purpose=0)
        held_out = self.draw(self.eval_examples, HELD_OUT_FONTS, purpose=1)
        spec = DataSpec.of(held_out, classes=len(CHARACTERS))
        return Dataset(train=Arrays(train), eval=held_out, spec=spec)

    def draw(self, count: int, fonts: tuple[str, ...], *, purpose: int) -> dict[str, np.ndarray]:
        """Return images of some fonts and their labels; a pure function of its arguments.

        The first images are the same for any number of them.

        Args:
          count: number of images.
          fonts: names of fonts of Matplotlib.
          purpose: number of a stream of random numbers.

        Returns:
          `image`, float32 (count, 32, 32, 1), multiples of 1 / 255, and `label`, int32 (count,): the
          place of the character in `CHARACTERS`.
        """
        canvases = _canvases(fonts)
        parts = []
        for first in range(0, count, _AT_ONCE):
            rng = np.random.Generator(np.random.Philox([self.draw_seed, purpose, first]))
            parts.append(self._draw(_AT_ONCE, canvases, rng))
        return {key: np.concatenate([part[key] for part in parts])[:count] for key in parts[0]}

    def _draw(
        self, count: int, canvases: np.ndarray, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Return images and labels; `canvases` is uint8 (fonts, characters, height, width)."""
        fonts, characters = canvases.shape[:2]
        label = rng.integers(0, characters, count)
        drawn = canvases[rng.integers(0, fonts, count), label]
        shift = rng.uniform(-self.shift, self.shift, (count, 2))
        mask = _placed(drawn, self._turns(count, rng), shift)
        for _ in range(self.clutter):
            other = canvases[rng.integers(0, fonts, count), rng.integers(0, characters, count)]
            angle, distance = rng.uniform(0, 2 * np.pi, count), rng.uniform(17, 22, count)
            away = distance[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
            mask = np.maximum(mask, _placed(other, self._turns(count, rng), away))
        paper = rng.uniform(0, 1 if self.both_shades else 0.5, count)
        contrast = rng.uniform(0.4, 1, count)  # of the range that is left
        ink = np.where(paper < 0.5, paper + contrast * (1 - paper), paper - contrast * paper)
        paper, ink = (x.astype(np.float32)[:, None, None] for x in (paper, ink))
        image = paper + (ink - paper) * mask
        spread = rng.uniform(0, self.noise, (count, 1, 1)).astype(np.float32)
        image += spread * rng.standard_normal(image.shape, np.float32)
        levels = np.rint(image.clip(0, 1) * 255)
        return {
            "image": (levels / np.float32(255)).astype(np.float32)[..., None],
            "label": label.astype(np.int32),
        }

    def _turns(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return matrices (count, 2, 2) from pixels of an image to pixels of a canvas."""
        angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation, count))
        scale = rng.uniform(0.6, 0.8, count)  # at most 0.8 of 40 pixels: a character fits
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        return np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)


@functools.lru_cache(maxsize=4)
def _canvases(fonts: tuple[str, ...]) -> np.ndarray:
    """Return each character of each font, uint8 (fonts, characters, 64, 64); ink is 255."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = np.zeros((len(fonts), len(CHARACTERS), _CANVAS, _CANVAS), np.uint8)
    for row, name in enumerate(fonts):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), _EM)
        _, top, _, bottom = font.getbbox("Hg", anchor="ls")  # from the base line down
        for column, character in enumerate(CHARACTERS):
            image = Image.new("L", (_CANVAS, _CANVAS))
            left, _, right, _ = font.getbbox(character, anchor="ls")
            place = (_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2
            ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="ls")
            found[row, column] = np.asarray(image)
    return found


def _placed(canvases: np.ndarray, turns: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return canvases turned, scaled and shifted, float32 (count, 32, 32) from 0 to 1.

    Args:
      canvases: uint8 (count, 64, 64).
      turns: (count, 2, 2), from pixels of an image to pixels of a canvas, both from their middle.
      shift: (count, 2), rows and columns in pixels of an image.
    """
    count = len(canvases)
    steps = np.arange(SIZE) - (SIZE - 1) / 2
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(1, -1, 2)
    place = (grid - shift[:, None]) @ turns.transpose(0, 2, 1) + (_CANVAS - 1) / 2
    place = place.clip(0, _CANVAS - 1.001)  # a canvas has no ink at its edges
    whole = place.astype(np.int64)
    part = (place - whole).astype(np.float32)
    y, x = whole[..., 0], whole[..., 1]
    flat, base = canvases.reshape(-1), np.arange(count)[:, None] * _CANVAS**2 + y * _CANVAS + x
    at = lambda down, right: flat[base + down * _CANVAS + right].astype(np.float32)
    v, u = part[..., 0], part[..., 1]
    upper = at(0, 0) * (1 - u) + at(0, 1) * u
    lower = at(1, 0) * (1 - u) + at(1, 1) * u
    return ((upper * (1 - v) + lower * v) / 255).reshape(count, SIZE, SIZE)
