"""Random changes of images against Pillow, colorsys and closed forms."""

import colorsys
import pickle

import numpy as np
import pytest
from helpers.marks import slow
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

import jmp_train as jt
from jmp_train.data import DataError, augment
from jmp_train.data.batches import eval_batches, iterate, train_batches
from jmp_train.pixels import colour, geometry
from jmp_train.pixels.operations import NAMES, operate

COUNT = 64
RNG = np.random.default_rng(0)
IMAGES = RNG.random((COUNT, 10, 12, 3), np.float32)
BYTES = RNG.integers(0, 256, (11, 13, 3), np.uint8)
ALL = {
    "random_crop": augment.random_crop(),
    "random_resized_crop": augment.random_resized_crop(),
    "random_flip": augment.random_flip(),
    "color_jitter": augment.color_jitter(0.4, 0.4, 0.4, 0.1),
    "rand_augment": augment.rand_augment(),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def changed(transform, images, seed=0):
    return transform({"image": images}, rng(seed))["image"]


@pytest.mark.parametrize("name", ALL)
def test_changes_keep_shape_dtype_and_other_arrays(name):
    transform = ALL[name]
    for images in (IMAGES, IMAGES[0], IMAGES[..., :1], (IMAGES * 255).astype(np.uint8)):
        batch = {"image": images, "label": np.arange(3)}
        before = images.copy()
        out = transform(batch, rng())
        assert out["image"].shape == images.shape and out["image"].dtype == images.dtype
        assert out["label"] is batch["label"]
        np.testing.assert_array_equal(images, before)
        assert images.ndim == 3 or (out["image"] != images).any()
        assert out["image"].min() >= 0 and out["image"].max() <= (255 if images.dtype == np.uint8 else 1)  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_changes_are_a_function_of_the_generator(name):
    one, two, other = (changed(ALL[name], IMAGES, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()
    same = changed(ALL[name], np.repeat(IMAGES[:1], COUNT, 0))
    assert len(np.unique(same.reshape(COUNT, -1), axis=0)) > 1  # each image has its own numbers


@pytest.mark.parametrize("name", ALL)
def test_a_transform_reaches_a_worker_process_as_it_is(name):
    again = pickle.loads(pickle.dumps(ALL[name]))
    assert again == ALL[name] and again != augment.random_flip(0.25)
    np.testing.assert_array_equal(changed(again, IMAGES), changed(ALL[name], IMAGES))


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_crops_are_windows_of_the_padded_image(mode):
    index = np.arange(1, 21, dtype=np.float32).reshape(4, 5, 1)
    crops = changed(augment.random_crop(2, mode), np.repeat(index[None], 2000, 0))
    padded = np.pad(index[..., 0], 2, mode=mode)
    windows = sliding_window_view(padded, (4, 5)).reshape(25, -1)
    places = [np.flatnonzero((windows == crop.ravel()).all(1)) for crop in crops]
    assert all(len(place) == 1 for place in places)
    counts = np.bincount(np.concatenate(places), minlength=25)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_flips_are_mirror_images_in_their_share():
    flipped = changed(augment.random_flip(0.3), np.repeat(IMAGES[:1], 4000, 0))
    mirror = np.asarray([np.fliplr(IMAGES[0])])
    is_mirror = (flipped == mirror).all((1, 2, 3))
    assert (is_mirror | (flipped == IMAGES[0]).all((1, 2, 3))).all()
    assert abs(is_mirror.mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    twice = augment.chain(augment.random_flip(1), augment.random_flip(1))
    np.testing.assert_array_equal(changed(twice, IMAGES), IMAGES)


def test_resized_windows_equal_those_of_pillow():
    boxes = geometry.windows(COUNT, (10, 12), rng(), (0.08, 1), (3 / 4, 4 / 3))
    ours = geometry.resized_windows(IMAGES, boxes)
    for image, (top, left, height, width), found in zip(IMAGES, boxes, ours, strict=True):
        for channel in range(3):
            part = Image.fromarray(image[..., channel])
            part = part.crop((left, top, left + width, top + height))
            part = part.resize((12, 10), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(found[..., channel], np.asarray(part), atol=1e-6)


def test_windows_have_the_area_and_ratio_of_their_ranges():
    size = 200
    top, left, height, width = geometry.windows(5000, (size, size), rng(), (0.1, 0.4), (0.5, 2.0)).T
    assert min(top.min(), left.min()) == 0
    assert max((top + height).max(), (left + width).max()) == size
    area, ratio = height * width / size**2, width / height
    assert stats.kstest(area, stats.uniform(0.1, 0.3).cdf).pvalue > 1e-3
    log = np.log(ratio) / np.log(2)
    assert stats.kstest(log, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    place = top / (size - height)
    assert abs(place.mean() - 0.5) < 4 / (12 * 5000) ** 0.5


@pytest.mark.parametrize(
    ("ratio", "box"), [((1, 1), (0, 5, 10, 10)), ((4, 4), (7, 0, 5, 20)), ((2, 2), (0, 0, 10, 20))]
)
def test_a_window_that_never_fits_is_the_largest_in_the_middle(ratio, box):
    size = (10, 20) if ratio != (4, 4) else (20, 20)
    found = geometry.windows(3, size, rng(), (1, 1), ratio)
    np.testing.assert_array_equal(found, [box] * 3)


def test_whole_windows_change_nothing():
    whole = augment.random_resized_crop((1, 1), (12 / 10, 12 / 10))
    np.testing.assert_array_equal(changed(whole, IMAGES), IMAGES)


def test_brightness_contrast_and_saturation_have_their_closed_forms():
    factor = np.linspace(0, 2, COUNT)
    each = factor[:, None, None, None]
    x = IMAGES.astype(np.float64)
    luma = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]  # ITU-R BT.601
    mean = luma.mean((1, 2, 3), keepdims=True)
    for change, wanted in (
        (colour.with_brightness, each * x),
        (colour.with_contrast, mean + each * (x - mean)),
        (colour.with_saturation, luma + each * (x - luma)),
    ):
        np.testing.assert_allclose(change(IMAGES, factor), wanted.clip(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (colour.with_brightness, ImageEnhance.Brightness),
        (colour.with_contrast, ImageEnhance.Contrast),
        (colour.with_saturation, ImageEnhance.Color),
    ],
)
def test_colours_equal_those_of_pillow_to_its_8_bits(change, kind):
    ours = change(BYTES[None] / np.float32(255), np.array([1.3]))[0] * 255
    theirs = np.asarray(kind(Image.fromarray(BYTES)).enhance(1.3))
    assert abs(ours - theirs).max() <= 1.5  # it rounds luma, mean and result to integers


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.1, 0.37, 1.0])
def test_hue_is_turned_as_colorsys_does(turn):
    images = IMAGES[:4].copy()
    images[0, 0] = 0.5  # greys have no hue
    images[0, 1] = np.eye(3)[np.arange(12) % 3]
    found = colour.with_hue(images, np.full(4, turn))
    for given, out in zip(images.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*given.astype(float))
        wanted = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        np.testing.assert_allclose(out, wanted, atol=2e-6)
    if turn in (0.0, 1.0):
        np.testing.assert_allclose(found, images, atol=2e-6)


def test_jitter_draws_its_amounts_from_their_ranges():
    grey = np.full((4000, 1, 1, 1), 0.25, np.float32)
    factor = changed(augment.color_jitter(brightness=0.5), grey).ravel() / 0.25
    assert stats.kstest(factor.astype(float), stats.uniform(0.5, 1).cdf).pvalue > 1e-3
    red = np.tile(np.float32([1, 0, 0]), (4000, 1, 1, 1))
    turned = changed(augment.color_jitter(hue=0.1), red)[:, 0, 0]
    hue = [colorsys.rgb_to_hsv(*pixel)[0] for pixel in turned.astype(float)]
    hue = (np.asarray(hue) + 0.5) % 1 - 0.5
    assert stats.kstest(hue, stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    np.testing.assert_array_equal(changed(augment.color_jitter(), IMAGES), IMAGES)


def test_the_order_of_jitter_is_random():
    """Clipping makes brightness x 2 and contrast x 0 depend on their order."""
    halves = np.zeros((200, 2, 1, 1), np.float32)
    halves[:, 0] = 0.9
    ranges = ((2, 2), (0, 0), (1, 1), (0, 0))
    out = colour.jittered(halves, rng(), ranges)[:, 0, 0, 0].round(3)
    first = np.isclose(out, 0.5)  # brightness first: the mean of 1 and 0
    assert np.isclose(out[~first], 0.9).all() and 70 < first.sum() < 130


@pytest.mark.parametrize("name", ["color_jitter", "rand_augment"])
def test_alpha_is_moved_with_the_colours_and_else_unchanged(name):
    images = RNG.integers(0, 256, (COUNT, 9, 9, 4), np.uint8)
    if name == "color_jitter":
        out = changed(ALL[name], images)
        np.testing.assert_array_equal(out[..., 3], images[..., 3])
        return
    for operation in NAMES:
        out = operate(images[0], operation, 20, 1)
        alone = operate(np.ascontiguousarray(images[0, ..., :3]), operation, 20, 1)
        np.testing.assert_array_equal(out[..., :3], alone)
        alpha = images[0, ..., 3:]
        moves = operation.startswith(("rotate", "shear", "translate"))
        wanted = operate(alpha, operation, 20, 1) if moves else alpha
        np.testing.assert_array_equal(out[..., 3:], wanted)


def stretched(x):
    """Autocontrast, in closed form."""
    low, high = x.min((0, 1)).astype(float), x.max((0, 1)).astype(float)
    return ((x - low) * (255 / (high - low))).astype(int)


OPERATIONS = {
    "identity": lambda x, sign: x,
    "autocontrast": lambda x, sign: stretched(x),
    "equalize": lambda x, sign: np.asarray(ImageOps.equalize(Image.fromarray(x))),
    "rotate": lambda x, sign: np.asarray(Image.fromarray(x).rotate(15 * sign)),
    "solarize": lambda x, sign: np.where(x < 128, x, 255 - x),
    "color": lambda x, sign: np.asarray(ImageEnhance.Color(Image.fromarray(x)).enhance(1 + 0.45 * sign)),
    "posterize": lambda x, sign: x & 0b11111100,
    "contrast": lambda x, sign: np.asarray(
        ImageEnhance.Contrast(Image.fromarray(x)).enhance(1 + 0.45 * sign)
    ),
    "brightness": lambda x, sign: (x * np.float32(1 + 0.45 * sign)).clip(0, 255).astype(np.uint8),
    "sharpness": lambda x, sign: np.asarray(
        ImageEnhance.Sharpness(Image.fromarray(x)).enhance(1 + 0.45 * sign)
    ),
}  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_closed_forms_or_pillow(name, sign):
    for x in (BYTES, BYTES[..., :1]):
        plain = x if x.shape[-1] == 3 else x[..., 0]
        wanted = np.asarray(OPERATIONS[name](plain, sign)).reshape(x.shape)
        found = operate(x, name, 15, sign).astype(int)
        assert abs(found - wanted).max() <= (1 if name == "autocontrast" else 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_translations_and_shears_move_rows_by_their_distance(sign):
    image = np.zeros((331, 331, 1), np.uint8)
    image[100:231, 165] = 255
    moved = operate(image, "translate_x", 15, sign)[..., 0]
    np.testing.assert_array_equal(moved, np.roll(image[..., 0], 75 * sign, 1))
    turned = operate(image.transpose(1, 0, 2), "translate_y", 15, sign)[..., 0]
    np.testing.assert_array_equal(turned, moved.T)
    sheared = operate(image, "shear_x", 10, sign)[..., 0]
    rows = np.arange(100, 231)
    found = sheared[rows].argmax(1)
    assert abs(found - (165 + 0.1 * sign * rows)).max() <= 1
    turned = operate(image.transpose(1, 0, 2), "shear_y", 10, sign)[..., 0]
    np.testing.assert_array_equal(turned, sheared.T)


def test_every_operation_is_equally_frequent(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "jmp_train.pixels.operations.operate", lambda image, *args: seen.append(args) or image
    )
    changed(augment.rand_augment(operations=3, magnitude=7), np.zeros((2000, 1, 1, 1), np.uint8))
    names = [NAMES.index(name) for name, _, _ in seen]
    assert len(names) == 6000 and {magnitude for _, magnitude, _ in seen} == {7}
    assert stats.chisquare(np.bincount(names, minlength=14)).pvalue > 1e-3
    assert abs(np.mean([sign for *_, sign in seen])) < 4 / 6000**0.5


def test_identity_rounds_to_8_bits():
    none = augment.rand_augment(operations=0)
    np.testing.assert_allclose(changed(none, IMAGES), np.rint(IMAGES * 255) / 255, atol=1e-7)


def scaled(batch):
    return {**batch, "image": batch["image"] * 2 - 1}


def data(**options):
    arrays = {"image": IMAGES, "label": np.arange(COUNT) % 2}
    return jt.Data(lambda: arrays, **options)


@pytest.mark.parametrize("where", ["transform", "batch_transform"])
@pytest.mark.parametrize("workers", [0, slow(2)])
def test_batches_are_the_same_from_any_position(where, workers):
    options = {where: augment.chain(*ALL.values(), scaled)}
    loaded = [data(**options).load() for _ in range(2)]
    whole = train_batches(loaded[0].train, 8, seed=3)
    wanted = [whole[i]["image"] for i in range(6)]
    batches = iterate(train_batches(loaded[1].train, 8, seed=3, workers=workers))
    batches.set_state({"next_batch": 4})
    for i in (4, 5):
        np.testing.assert_array_equal(next(batches)["image"], wanted[i])
    batches.close()
    assert wanted[0].dtype == np.float32
    assert wanted[0].min() < -0.2  # `scaled` came last


@pytest.mark.parametrize("where", ["transform", "batch_transform"])
def test_evaluation_keeps_the_steps_of_a_chain_that_are_not_random(where):
    plain = data().load().eval
    inner = augment.chain(augment.random_flip(), scaled)
    held_out = data(**{where: augment.chain(augment.random_crop(), inner)}).load().eval
    (found,) = eval_batches(held_out, len(plain["label"]))
    np.testing.assert_array_equal(found["image"], plain["image"] * 2 - 1)
    only = data(**{where: augment.chain(augment.random_crop())}).load().eval
    np.testing.assert_array_equal(only["image"], plain["image"])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: augment.random_crop(-1), "padding is -1; expected a whole number from 0 to 16384"),
        (lambda: augment.random_crop(1.5), "padding is 1.5; expected a whole number"),
        (lambda: augment.random_crop(1, "reflct"), "mode is 'reflct'; did you mean 'reflect'?"),
        (lambda: augment.random_flip(2), "p is 2; expected 0 to 1"),
        (lambda: augment.random_resized_crop((1, 0.5)), "scale is (1, 0.5); expected (least, larg"),
        (lambda: augment.random_resized_crop(0.5), "scale is 0.5; expected (least, largest)"),
        (lambda: augment.random_resized_crop(ratio=(0, 1)), "ratio is (0, 1); expected"),
        (lambda: augment.color_jitter(hue=0.6), "hue is 0.6; expected 0 to 0.5"),
        (lambda: augment.color_jitter("a"), "brightness is 'a'; expected 0 to 1000"),
        (lambda: augment.rand_augment(2, 31), "magnitude is 31; expected a whole number from 0"),
        (lambda: augment.chain(augment.random_flip(), 3), "chain has 3; expected functions"),
    ],
)
def test_wrong_arguments_are_one_line(make, line):
    with pytest.raises(DataError) as error:
        make()
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        ({"imagee": IMAGES}, "the data have no array 'image'; did you mean 'imagee'?"),
        (
            {"image": IMAGES[..., 0]},
            "'image' has shape (64, 10, 12); expected (height, width, chan",
        ),
        ({"image": IMAGES[..., :2]}, "'image' has shape (64, 10, 12, 2); expected"),
        ({"image": IMAGES.astype(int)}, "'image' has dtype int64; expected float32, or uint8"),
        ({"image": IMAGES * 2 - 1}, "'image' has values from -"),
        ({"image": IMAGES * np.nan}, "'image' has values from nan to nan; expected 0 to 1"),
    ],
)
def test_images_that_cannot_be_changed_are_one_line(batch, line):
    with pytest.raises(DataError) as error:
        ALL["color_jitter"](batch, rng())
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_wide_padding_of_a_small_image_reflects_again():
    assert changed(augment.random_crop(9, "reflect"), IMAGES[:2]).shape == (2, 10, 12, 3)
