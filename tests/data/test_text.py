"""Text: each held-out byte is scored once and never trained on; baselines match the compressors."""

import bz2
import hashlib
import lzma
import zlib
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmp_train.data import TextConfig, compression_baselines, eval_batches, iterate, train_batches
from jmp_train.data.text import documentation
from jmp_train.data.windows import held_out_windows


def test_the_text_is_every_topic_in_order_and_its_end_is_held_out():
    text = documentation()
    assert len(text) == sum(len(t.encode()) for t in topics.values()) > 300_000
    data = TextConfig(length=64).load()
    facts = data.facts()
    assert facts["sha256"] == hashlib.sha256(text).hexdigest()
    assert facts["held_out_bytes"] == round(0.1 * len(text))
    assert facts["training_bytes"] + facts["held_out_bytes"] == len(text)
    scored = data.eval["tokens"][:, 1:][data.eval["mask"]]
    assert scored.tobytes() == text[facts["training_bytes"] :]
    assert data.spec.example["tokens"].shape == (65,) and data.spec.classes == 256


@settings(deadline=None, max_examples=50)
@given(size=st.integers(4, 400), length=st.integers(2, 40), share=st.floats(0.05, 0.9))
def test_every_held_out_byte_is_predicted_once_with_half_a_window_before_it(size, length, share):
    split = size - round(share * size)
    if not length < split < size:
        return
    # Each byte of this text is its own place in it.
    windows = held_out_windows(np.arange(size), split, length)
    tokens, mask = windows["tokens"], windows["mask"]
    assert tokens.shape == (len(mask), length + 1)
    np.testing.assert_array_equal(np.diff(tokens, axis=1), 1)
    np.testing.assert_array_equal(tokens[:, 1:][mask], np.arange(split, size))
    context = np.broadcast_to(np.arange(1, length + 1), mask.shape)[mask]
    assert context.min() >= length / 2


def write(tmp_path, size):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(size)))
    return str(path)


def test_training_windows_cover_the_training_text_evenly_and_nothing_else(tmp_path):
    config = TextConfig(path=write(tmp_path, 200), length=10, eval_share=0.25)
    data = config.load()
    parts = len(data.train)
    assert parts == 14  # 150 bytes, of which 140 begin a window
    draws = 500
    batches = train_batches(data.train, parts, seed=0)
    tokens = np.stack([batches[i]["tokens"] for i in range(draws)])
    assert tokens.dtype == np.uint8
    np.testing.assert_array_equal(np.diff(tokens.astype(int), axis=-1), 1)
    assert tokens.max() == 149
    # An epoch takes one window of each part; every start is as likely as every other: of 500 * 14
    # draws each of 140 starts gets 50 on average, with a binomial deviation of 6.7; five of them.
    starts = np.sort(tokens[..., 0], axis=1)
    np.testing.assert_array_equal(starts // 10, np.tile(np.arange(14), (draws, 1)))
    assert np.abs(np.bincount(starts.ravel(), minlength=140) - 50).max() < 34


def test_a_restored_iterator_continues_with_the_same_windows():
    data = TextConfig(length=16).load()

    def make():
        return iterate(train_batches(data.train, 4, seed=1))

    first, second = make(), make()
    for _ in range(7):
        next(first)
    second.set_state(first.get_state())
    for _ in range(5):
        np.testing.assert_array_equal(next(first)["tokens"], next(second)["tokens"])


def test_a_filled_up_batch_scores_no_byte_twice():
    arrays = {"tokens": np.arange(6).reshape(3, 2), "mask": np.array([[True], [False], [True]])}
    masks = [batch["mask"].tolist() for batch in eval_batches(arrays, 2)]
    assert masks == [[[True], [False]], [[True], [False]]]


def test_baselines_are_the_sizes_that_the_compressors_give():
    text = documentation()
    train, held_out = text[:20_000], text[20_000:24_000]

    streams = {
        "gzip": lambda: zlib.compressobj(9, zlib.DEFLATED, 31),
        "bz2": lambda: bz2.BZ2Compressor(9),
        "lzma": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    }

    def size(name, data):
        stream = streams[name]()
        return len(stream.compress(data) + stream.flush())

    for name, bits in compression_baselines(train, held_out).items():
        assert bits["alone"] == size(name, held_out) * 8 / 4000
        grown = size(name, train + held_out) - size(name, train)
        assert bits["after_training_text"] == grown * 8 / 4000


def test_a_large_file_is_not_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr("jmp_train.data.text._LARGEST_COMPRESSED", 100)
    facts = TextConfig(path=write(tmp_path, 101), length=4).load().facts()
    assert set(facts) == {"sha256", "training_bytes", "held_out_bytes"}


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"length": 1}, "length is 1"),
        ({"eval_share": 1.0}, "eval_share is 1.0"),
        ({"path": "/nowhere/a.txt"}, "/nowhere/a.txt does not exist"),
    ],
)
def test_an_invalid_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**fields)


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="length is 128; expected less than the 45 bytes"):
        TextConfig(path=write(tmp_path, 50)).load()
