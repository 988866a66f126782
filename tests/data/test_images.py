"""Folders of images: what an example is, and what is refused."""

import os

import numpy as np
import pytest
from helpers.command_line import call
from PIL import Image

import jmp_train as jt
from jmp_train.data import DataError, ImageFolder, image_folder
from jmp_train.data.images import read_image

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
    assert dataset.spec.classes == 2
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
    refused("flower does not exist; did you mean 'flowers'", tmp_path / "flower")
    refused("README is a file; expected a folder", flowers / "README")
    refused("deeper has no folders; expected one for each class", flowers / "rose" / "deeper")
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


@pytest.mark.parametrize(
    "damage", [truncate, replace_by_text, claim_many_pixels, store_16_bits, os.remove]
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


def test_the_command_line_trains_on_a_folder_and_predicts_on_one_of_images(here, capsys):
    status, out, err = call(capsys, "train", "flowers", "--run-dir", "run", "--data.size", "6")
    assert status == 0 and "image_folder: 10 training examples, 3 held out" in out, err
    status, out, err = call(capsys, "predict", "run", "flowers/tulip")
    rows = [line.split() for line in out.splitlines()[1:7]]
    assert status == 0 and err == ""
    assert [row[0] for row in rows] == [f"{n}.png" for n in range(6)]
    # The images of training, read by the same function, have the same probabilities.
    images = ImageFolder("flowers", 6)
    found = jt.load_run("run").predict(
        {"image": np.stack([images[i]["image"] for i in range(7, 13)])}
    )
    assert [row[1] for row in rows] == [str(c) for c in found["class"]]
    assert [row[2] for row in rows] == [f"{p:.4f}" for p in found["probability"].max(-1)]


def test_a_missing_folder_ends_with_status_2(here, capsys):
    status, _, err = call(capsys, "train", "flowers", "--data.path", "flower")
    assert (status, err) == (2, "jmp-train: flower does not exist; did you mean 'flowers'?\n")
