"""Folders of images: what an example is, and what is refused."""

import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from helpers.command_line import call
from PIL import Image

import jmp_train as jt
from jmp_train.data import DataError, ImageFolder, image_folder, table
from jmp_train.sources.decode import read_image

SIZE = 8
RED, BLUE = (200, 30, 40), (20, 60, 220)


def save(path, colour=RED, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


@pytest.fixture
def flowers(tmp_path):
    folder = tmp_path / "flowers"
    for number in range(6):
        save(folder / "tulip" / f"{number}.png", BLUE)
        save(folder / "rose" / f"{number}.jpg")
    save(folder / "rose" / "deeper" / "9.PNG")
    (folder / "rose" / "notes.txt").write_text("no image")
    save(folder / "rose" / ".hidden.png")
    save(folder / ".cache" / "1.png")
    (folder / "README").write_text("no class")
    save(folder / "rose" / ".ipynb_checkpoints" / "1.png")
    os.mkfifo(folder / "rose" / "pipe.png")
    return folder


@pytest.mark.parametrize("channels,mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_an_image_of_the_right_size_has_the_bytes_of_its_file(tmp_path, channels, mode):
    shape = (5, 7, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", channels), pixels)


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (20, 20), (6, 4)])
def test_the_middle_of_the_longer_side_is_kept(tmp_path, size):
    width, height = size
    image = Image.new("RGB", size, BLUE)
    short = min(size)
    left, top = (width - short) // 2, (height - short) // 2
    image.paste(RED, (left, top, left + short, top + short))
    image.save(tmp_path / "x.png")
    pixels = read_image(tmp_path / "x.png", 3, SIZE)
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(RED), (SIZE, SIZE, 3)))


def test_an_example_is_an_image_from_0_to_1_and_the_place_of_its_class(flowers):
    images = ImageFolder(flowers, SIZE)
    assert images.class_names == ("rose", "tulip") and len(images) == 13
    labels = [int(images[i]["label"]) for i in range(13)]
    assert labels == [0] * 7 + [1] * 6
    for index, colour, within in ((0, RED, 3), (12, BLUE, 0)):  # a JPEG is off by some values
        example = images[index]
        assert example["image"].shape == (SIZE, SIZE, 3)
        assert example["image"].dtype == np.float32 and example["label"].dtype == np.int32
        expected = np.broadcast_to(np.float32(colour) / np.float32(255), (SIZE, SIZE, 3))
        np.testing.assert_allclose(example["image"], expected, rtol=0, atol=within / 255)


def test_the_data_know_their_classes(flowers):
    dataset = jt.Data(image_folder, path=str(flowers), size=SIZE, channels=1).load()
    assert dataset.spec.classes == 2 and dataset.spec.class_names == ("rose", "tulip")
    assert dataset.spec.example["image"].shape == (SIZE, SIZE, 1)
    assert (len(dataset.train), len(dataset.eval)) == (10, 3)


def test_held_out_images_have_the_labels_of_the_training_classes(flowers, tmp_path):
    save(tmp_path / "test" / "tulip" / "1.png", BLUE)
    _, held_out = image_folder(str(flowers), held_out=str(tmp_path / "test"), size=SIZE)
    assert [int(held_out[i]["label"]) for i in range(len(held_out))] == [1]
    save(tmp_path / "test" / "tulips" / "1.png", BLUE)
    with pytest.raises(DataError, match="tulips is no class .*; did you mean 'tulip'"):
        image_folder(str(flowers), held_out=str(tmp_path / "test"), size=SIZE)


def refused(match, path, **options):
    with pytest.raises(DataError, match=match) as caught:
        jt.Data(image_folder, path=str(path), **options).load()
    assert str(caught.value).count("\n") == 0


def test_folders_of_another_form_are_one_line(flowers, tmp_path):
    refused("the path is ''; expected the name of a file or a folder", "")
    refused("flower does not exist; did you mean 'flowers'", tmp_path / "flower")
    refused("README is a file; expected a folder", flowers / "README")
    refused("deeper has no folders; expected one for each class", flowers / "rose" / "deeper")
    save(tmp_path / "one" / "rose" / "1.png", BLUE)
    refused(r"one has 1 folder of images, 'rose'; expected at least 2", tmp_path / "one", classes=2)
    assert len(ImageFolder(tmp_path / "one", SIZE)) == 1  # for data without classes
    (flowers / "aster").mkdir()
    refused(r"aster has no images; expected files such as .*1\.png", flowers)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"size": 0}, "size is 0; expected 1 to 16384"),
        ({"size": 10**6}, "size is 1000000; expected 1 to 16384"),
        ({"channels": 2}, "channels is 2; expected 1, 3 or 4"),
    ],
)
def test_sizes_that_are_not_possible_are_one_line(flowers, options, match):
    refused(match, flowers, **options)


def link_file(folder, outside):
    (folder / "rose" / "x.png").symlink_to(outside / "secret" / "1.png")


def link_inner_folder(folder, outside):
    (folder / "rose" / "more").symlink_to(outside / "secret")


def link_class(folder, outside):
    (folder / "aster").symlink_to(outside / "secret")


@pytest.mark.parametrize("link", [link_file, link_inner_folder, link_class])
def test_links_out_of_the_folder_are_followed_only_when_asked_for(flowers, tmp_path, link):
    save(tmp_path / "secret" / "1.png")
    link(flowers, tmp_path)
    refused(r"is a link that leads out of .*flowers; expected a file in it, or follow", flowers)
    assert len(ImageFolder(flowers, SIZE, follow_links=True)) == 14


def test_links_inside_the_folder_and_in_a_circle_end(flowers):
    (flowers / "rose" / "same.png").symlink_to(flowers / "rose" / "deeper" / "9.PNG")
    (flowers / "rose" / "deeper" / "again").symlink_to(flowers / "rose")
    for follow in (False, True):
        assert len(ImageFolder(flowers, SIZE, follow_links=follow)) == 14


def truncate(file):
    file.write_bytes(file.read_bytes()[:50])


def replace_by_text(file):
    file.write_text("no image")


def claim_many_pixels(file):
    content = bytearray(file.read_bytes())
    content[16:24] = (2**16).to_bytes(4, "big") * 2  # width and height in the header of a PNG
    file.write_bytes(content)


def store_16_bits(file):
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(file)


def png_of_16_bits(file, kind=2, numbers=3):
    """Write a PNG as its specification says, which Pillow cannot; `kind` is its colour type."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(2 * bytes(1 + 2 * 2 * numbers))),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("kind,numbers", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_16_bits_is_refused_and_not_cut_to_8(tmp_path, kind, numbers):
    png_of_16_bits(tmp_path / "x.png", kind, numbers)
    for channels in (1, 3, 4):
        with pytest.raises(
            ValueError, match=r"16|more than 8.*; expected a complete image of 8 bits"
        ):
            read_image(tmp_path / "x.png", channels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".webp"])
def test_images_of_8_bits_or_fewer_are_read(tmp_path, mode, ending):
    if ending == ".bmp" and mode in ("LA", "RGBA"):
        mode = "RGB"
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    image.save(tmp_path / f"x{ending}", **({"lossless": True} if ending == ".webp" else {}))
    assert (read_image(tmp_path / f"x{ending}", 3) == 255).all()


def test_a_file_with_a_new_line_in_its_name_is_one_line(flowers):
    name = flowers / "tulip" / "a\nb\x1b[31m.png"
    name.write_text("no image")
    images = ImageFolder(flowers, SIZE)
    place = next(i for i in range(len(images)) if "\n" in images.describe(i))
    with pytest.raises(DataError, match=r"tulip/a\\nb\\x1b\[31m\.png cannot be read") as caught:
        images[place]
    assert str(caught.value).isprintable()
    missing = jt.Data(table, path=str(flowers / "a\nb.csv"))
    with pytest.raises(DataError, match=r"^/.*a\\nb\.csv does not exist; its folder has no .csv"):
        missing.load()


def test_a_label_out_of_range_is_named_with_its_file(flowers):
    save(flowers / "aster" / "1.png")
    loaded = jt.Data(image_folder, path=str(flowers), held_out=str(flowers), size=SIZE, classes=2)
    with pytest.raises(
        DataError, match=r"^example 8 \(.*/tulip/0\.png\): 'label' is 2; expected 0 to 1"
    ):
        loaded.load().train.draw(np.arange(14), np.random.default_rng(0))


def test_an_image_is_read_for_a_prediction_with_settings_that_are_no_options(flowers):
    data = jt.Data(image_folder, path=str(flowers), size=np.array(6), channels=1)
    assert data.image_reader(flowers / "tulip" / "1.png").shape == (6, 6, 1)


@pytest.mark.parametrize(
    "damage",
    [truncate, replace_by_text, claim_many_pixels, store_16_bits, png_of_16_bits, os.remove],
)
def test_an_image_that_cannot_be_read_is_named_with_its_example(flowers, damage):
    data = jt.Data(image_folder, path=str(flowers), held_out=str(flowers), size=SIZE)
    images = data.load().train
    damage(flowers / "tulip" / "3.png")
    with pytest.raises(DataError, match=r"^example 10: .*tulip/3\.png") as caught:
        images.draw(np.array([9, 10]), np.random.default_rng(0))
    assert str(caught.value).count("\n") == 0


EXPERIMENT = """
import jmp_train as jt
from jmp_train.data import image_folder
from jmp_train.models import Mlp, Model

EXPERIMENT = jt.Experiment(
    Model(Mlp, inputs=lambda spec: spec.size("image"), outputs=lambda spec: spec.classes, hidden=(8,)),
    jt.Data(image_folder, path="flowers", size=8),
    steps=8, batch_size=4, checkpoint_every=4, log_every=4,
)
"""


@pytest.fixture
def here(flowers, monkeypatch, quick_runs):
    monkeypatch.chdir(flowers.parent)
    (flowers.parent / "experiments").mkdir()
    (flowers.parent / "experiments" / "flowers.py").write_text(EXPERIMENT)
    return flowers


@pytest.mark.slow
def test_the_command_line_trains_on_a_folder_and_predicts_on_one_of_images(here, capsys):
    status, out, err = call(capsys, "train", "flowers", "--run-dir", "run", "--data.size", "6")
    assert status == 0 and "image_folder: 10 training examples, 3 held out" in out, err
    (here / "tulip" / "._0.png").write_text("of macOS")
    words = ["flowers/tulip", "--output", "out.json"]
    status, out, err = call(capsys, "predict", "run", *words)
    rows = [line.split() for line in out.splitlines()[1:7]]
    assert status == 0 and err == ""
    assert [row[0] for row in rows] == [f"{n}.png" for n in range(6)]
    # The images of training, read by the same function, have the same probabilities.
    images = ImageFolder("flowers", 6)
    found = jt.load_run("run").predict(
        {"image": np.stack([images[i]["image"] for i in range(7, 13)])}
    )
    assert [row[1] for row in rows] == [str(c) for c in found["class"]]
    names = [("rose", "tulip")[c] for c in found["class"]]
    assert [row[2] for row in rows] == names
    assert [row[3] for row in rows] == [f"{p:.4f}" for p in found["probability"].max(-1)]
    written = json.loads((here.parent / "out.json").read_text())
    assert [row["class_name"] for row in written] == names
    # A run of a version that stored no names has none.
    spec = json.loads((here.parent / "run" / "spec.json").read_text())
    assert spec.pop("class_names") == ["rose", "tulip"]
    (here.parent / "run" / "spec.json").write_text(json.dumps(spec))
    _, out, _ = call(capsys, "predict", "run", "flowers/tulip")
    assert "class" in out and "class_name" not in out


def test_a_missing_folder_ends_with_status_2(here, capsys):
    status, _, err = call(capsys, "train", "flowers", "--data.path", "flower")
    assert (status, err) == (2, "jmp-train: flower does not exist; did you mean 'flowers'?\n")


def photograph(path, size, mode="RGB", **options):
    """Write smooth noise, which a resize has to change."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(path, **options)
    return path


def two_taps(pixels, size):
    """Return an image resized in float64 from the four neighbours of each pixel's centre."""
    for axis in (0, 1):
        at = (np.arange(size) + 0.5) * pixels.shape[axis] / size - 0.5
        low = np.clip(np.floor(at).astype(int), 0, pixels.shape[axis] - 1)
        high = np.minimum(low + 1, pixels.shape[axis] - 1)
        share = np.clip(at - low, 0, 1).reshape(-1, *[1] * (2 - axis))
        take = lambda rows, pixels=pixels, axis=axis: np.take(pixels, rows, axis).astype(float)
        pixels = take(low) * (1 - share) + take(high) * share
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [33, 40, 62, 80])
def test_linear_is_four_neighbours_of_the_middle_of_a_jpeg(tmp_path, side, channels):
    path = photograph(tmp_path / "x.jpg", (side + 16, side), quality=95)
    pixels = read_image(path, channels)[:, 8 : side + 8]  # libjpeg-turbo in Pillow
    found = read_image(path, channels, 32, "linear")
    assert found.shape == (32, 32, channels) and found.dtype == np.float32
    if side == 80:  # decoded at half its size: near means of four
        pixels = pixels.reshape(40, 2, 40, 2, channels).mean((1, 3))
    difference = np.abs(found - two_taps(pixels, 32))
    # OpenCV computes in float32: 255 times a few roundings of 2**-24. Grey is the brightness in the
    # file; Pillow computes it from rounded colours here.
    limit = 1e-3 if channels == 3 else 3
    assert difference.max() <= (10 if side == 80 else limit) and difference.mean() < 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_linear_reads_what_pillow_reads(tmp_path, mode, channels):
    path = photograph(tmp_path / "x.png", (50, 40), mode)
    found = read_image(path, channels, 32, "linear")
    exact = two_taps(read_image(path, channels)[:, 5:45], 32)
    assert found.shape == (32, 32, channels) and np.abs(found - exact).max() <= 1e-3


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_a_much_larger_image_is_a_mean_in_both_ways(tmp_path, ending):
    """One black pixel of four, far finer than the result: neighbours alone would miss it."""
    pixels = np.full((256, 256, 3), 255, np.uint8)
    pixels[::2, ::2] = 0
    Image.fromarray(pixels).save(tmp_path / f"x{ending}")
    for resize in ("antialias", "linear"):
        found = read_image(tmp_path / f"x{ending}", 3, 16, resize)
        assert abs(float(found.mean()) - 191.25) < 2 and found.std() < 4


@pytest.mark.parametrize("size", [(12, 10), (60, 20), (20, 60)])
def test_linear_keeps_the_middle_of_images_of_every_size(tmp_path, size):
    width, height = size
    image = Image.new("RGB", size, BLUE)
    left, top = (width - min(size)) // 2, (height - min(size)) // 2
    image.paste(RED, (left, top, left + min(size), top + min(size)))
    image.save(tmp_path / "x.jpg", quality=100, subsampling=0)
    inner = read_image(tmp_path / "x.jpg", 3, 16, "linear")[2:-2, 2:-2].astype(int)
    assert np.abs(inner - RED).max() <= 24  # a JPEG rings at the edge


@pytest.mark.parametrize("damage", [truncate, replace_by_text, claim_many_pixels, os.remove])
@pytest.mark.parametrize("file", ["tulip/3.png", "rose/3.jpg"])
def test_linear_refuses_what_pillow_refuses(flowers, damage, file):
    images = jt.Data(image_folder, path=str(flowers), size=SIZE, resize="linear").load().train
    damage(flowers / file)
    with pytest.raises(DataError, match=file) as caught:
        images.draw(np.arange(10), np.random.default_rng(0))
    assert str(caught.value).count("\n") == 0


def test_a_cmyk_jpeg_is_read_by_pillow(tmp_path):
    path = photograph(tmp_path / "x.jpg", (40, 40), "CMYK")
    found = read_image(path, 3, 32, "linear")
    assert np.abs(found - two_taps(read_image(path, 3), 32)).max() <= 1e-3


def test_linear_without_its_libraries_is_one_line(flowers, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    refused("resize is 'linear', which needs cv2; .*fast-images", flowers, resize="linear")


def test_a_prediction_reads_images_as_in_training(flowers):
    data = jt.Data(image_folder, path=str(flowers), size=SIZE, resize="linear", channels=1)
    path = photograph(flowers / "rose" / "0.jpg", (90, 70))
    expected = read_image(path, 1, SIZE, "linear") / np.float32(255)
    np.testing.assert_array_equal(data.image_reader(path), expected)
