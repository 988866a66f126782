"""Drawn characters: exact labels, the same images from a seed, other fonts held out."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from jmp_train.data import GlyphsConfig
from jmp_train.data.glyphs import CHARACTERS, FONTS, HELD_OUT_FONTS

PLAIN = GlyphsConfig(rotation=0.0, shift=0.0, clutter=0, noise=0.0)
FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def test_the_fonts_are_there_and_no_held_out_one_is_trained_on():
    assert not set(FONTS) & set(HELD_OUT_FONTS)
    assert all((FOLDER / f"{name}.ttf").is_file() for name in (*FONTS, *HELD_OUT_FONTS))


def drawn_by_pillow(character, font):
    """A character as Pillow draws it at the size of an image, ink 1 on 0, without our transforms."""
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).text((16, 16), character, 255, ImageFont.truetype(font, 27), anchor="mm")
    return np.asarray(image) / 255.0


def similarity(a, b):
    """The largest cosine of two images over small shifts, from their means."""
    b = b - b.mean()
    best = -1.0
    for down in range(-8, 9):
        for right in range(-4, 5):
            moved = np.roll(a, (down, right), (0, 1))
            moved = moved - moved.mean()
            best = max(best, (moved * b).sum() / np.linalg.norm(moved) / np.linalg.norm(b))
    return best


def test_an_image_shows_the_character_of_its_label():
    # Of 12 images of one font, each is most like its own character among 12, as Pillow draws them.
    some = [CHARACTERS.index(c) for c in "0247AGKRaegk"]
    found = PLAIN.draw(400, ("DejaVuSans",), purpose=0)
    font = str(FOLDER / "DejaVuSans.ttf")
    references = {label: drawn_by_pillow(CHARACTERS[label], font) for label in some}
    for label in some:
        image = found["image"][list(found["label"]).index(label), ..., 0]
        image = image if image[0, 0] < 0.5 else 1 - image  # ink is darker than light paper
        scores = {other: similarity(reference, image) for other, reference in references.items()}
        assert max(scores, key=lambda other: scores[other]) == label, CHARACTERS[label]
        assert scores[label] > 0.6  # scaled by 0.85 to 1.2


def test_images_are_a_function_of_the_seed_and_begin_alike_for_any_number():
    few, many = (GlyphsConfig().draw(count, FONTS, purpose=0) for count in (30, 1100))
    for name in few:
        np.testing.assert_array_equal(few[name], many[name][:30])
    other = GlyphsConfig(draw_seed=1).draw(30, FONTS, purpose=0)
    assert not np.array_equal(other["label"], few["label"])


@pytest.mark.slow
def test_images_are_levels_of_8_bits_and_labels_are_uniform():
    found = GlyphsConfig().draw(8192, FONTS, purpose=0)
    image, label = found["image"], found["label"]
    assert image.dtype == np.float32 and image.shape == (8192, 32, 32, 1)
    np.testing.assert_array_equal(np.rint(image * 255).astype(np.float32) / np.float32(255), image)
    assert image.min() == 0 and image.max() == 1
    counts = np.bincount(label, minlength=62)
    # Chi-squared of 61 degrees of freedom: mean 61, deviation 11.
    assert ((counts - 8192 / 62) ** 2 / (8192 / 62)).sum() < 61 + 5 * 11


def test_training_and_held_out_images_differ():
    dataset = GlyphsConfig(examples=300, eval_examples=200).load()
    assert (len(dataset.train), len(dataset.eval["image"]), dataset.spec.classes) == (300, 200, 62)
    trained = {image.tobytes() for image in dataset.train.arrays["image"]}
    assert not trained & {image.tobytes() for image in dataset.eval["image"]}


@pytest.mark.parametrize(
    "field,value,expected",
    [
        ("examples", 0, "1 to 10000000"),
        ("rotation", 181.0, "0 to 180"),
        ("clutter", 9, "0 to 8"),
        ("noise", -0.1, "0 to 1"),
        ("shift", float("nan"), "0 to 32"),
    ],
)
def test_settings_out_of_range_are_one_line(field, value, expected):
    with pytest.raises(ValueError, match=rf"{field} is .*; expected {expected}"):
        GlyphsConfig(**{field: value})
