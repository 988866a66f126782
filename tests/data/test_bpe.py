"""Byte-pair encoding: exact bytes, the same tokens as the library's, and damaged files."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.marks import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from jmp_train.data import DataError, TextConfig
from jmp_train.data.text import documentation
from jmp_train.sources.bpe import END, Bpe, read_bpe, train_bpe

TEXT = documentation()[:60_000]
BPE = train_bpe([TEXT], 600)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BPE.to_json())
    return tmp_path / "tokenizer.json"


def library(content=None):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(BPE.to_json() if content is None else content)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_tokens_decode_to_the_same_bytes_and_have_their_sizes(text):
    raw = text.encode()
    (ids,) = BPE.encode([raw])
    assert BPE.decode(ids) == raw and BPE.sizes[ids].sum() == len(raw)
    for token in ids:
        assert len(BPE.decode([token])) == BPE.sizes[token]


def test_tokens_are_those_of_the_library_from_the_saved_file():
    (ids,) = BPE.encode([TEXT])
    assert ids.tolist() == library().encode(TEXT.decode()).ids
    assert library().decode(ids.tolist()) == TEXT.decode()
    assert library().token_to_id(END) == BPE.end == 0 and len(BPE.sizes) == 600
    assert ids.dtype == np.uint16 and len(ids) < 0.5 * len(TEXT)


def test_the_end_of_a_document_in_a_text_is_ordinary_letters():
    raw = f"{END} and {END}".encode()
    (ids,) = BPE.encode([raw])
    assert BPE.end not in ids and BPE.decode(ids) == raw
    trained = train_bpe([raw * 50], 300)
    (ids,) = trained.encode([raw])
    assert trained.end not in ids and trained.decode(ids) == raw


def test_a_long_text_is_encoded_in_pieces(monkeypatch):
    (whole,) = BPE.encode([TEXT])
    monkeypatch.setattr("jmp_train.sources.bpe._PIECE", 1000)
    (ids,) = BPE.encode([TEXT])
    assert BPE.decode(ids) == TEXT and abs(len(ids) - len(whole)) < 0.01 * len(whole)
    (ids,) = BPE.encode(["å".encode() * 2500])  # without a new line
    assert BPE.decode(ids) == "å".encode() * 2500


@pytest.mark.slow
def test_the_same_text_gives_the_same_tokenizer_in_another_process():
    code = """
import hashlib
from jmp_train.sources.bpe import train_bpe
from jmp_train.data.text import documentation
print(hashlib.sha256(train_bpe([documentation()[:60_000]], 600).to_json().encode()).hexdigest())
"""
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
        capture_output=True,
        check=True,
        text=True,
    )
    import hashlib

    assert run("1").stdout.strip() == hashlib.sha256(BPE.to_json().encode()).hexdigest()


def test_the_tokenizer_is_that_of_the_training_text_alone(tmp_path):
    (tmp_path / "x.txt").write_text("to be or not to be " * 40 + "unseen words " * 20)
    data = TextConfig(
        path=str(tmp_path / "x.txt"), length=8, eval_share=0.3, tokenizer="bpe"
    ).load()
    tokens = library(data.files["tokenizer.json"]).get_vocab()
    assert "Ġbe" in tokens and "Ġunseen" not in tokens and "Ġwo" not in tokens


@pytest.mark.parametrize("packed", [False, True])
def test_target_bytes_are_those_of_the_held_out_text(tmp_path, packed):
    (tmp_path / "x.txt").write_bytes(TEXT)
    options = {"path": str(tmp_path / "x.txt"), "vocabulary": 500, "separator": "\n\n"}
    data = TextConfig(length=32, tokenizer="bpe", packed=packed, **options).load()
    bpe = library(data.files["tokenizer.json"])
    text = TEXT.replace(b"\n\n", b"")
    held_out = text[-round(0.1 * len(text)) :].decode()
    mask, targets = data.eval["mask"], data.eval["tokens"][:, 1:]
    assert data.eval["target_bytes"][mask].sum() == len(held_out.encode())
    scored = targets[mask]
    assert (scored == 0).any()
    if not packed:  # in the order of the text
        assert bpe.decode(scored.tolist()) == held_out
    sizes = data.eval["target_bytes"][mask].tolist()
    for token, size in zip(scored.tolist(), sizes, strict=True):
        text = bpe.decode([token])
        if "\ufffd" not in text:  # whole characters
            assert len(text.encode()) == size


def test_a_vocabulary_is_as_large_as_the_text_allows():
    small = train_bpe([b"ab ab ab"], 4096)
    assert 257 < len(small.sizes) < 270
    assert small.decode(next(iter(small.encode([bytes("naïve \x00 \U0001f600", "utf-8")])))) == "naïve \x00 \U0001f600".encode()  # fmt: skip


def test_a_saved_tokenizer_is_read_back(file):
    again = read_bpe(file)
    np.testing.assert_array_equal(*(next(iter(b.encode([TEXT]))) for b in (again, BPE)))
    assert again.to_json() == BPE.to_json()


def changed(change):
    values = json.loads(BPE.to_json())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "content,match",
    [
        ("", "is damaged: Expecting value"),
        ("[" * 100_000, "is damaged: maximum recursion"),
        ("[]", "is damaged: list indices"),
        ("{}", "is damaged: it has no 'model'"),
        (b"\xff", "is damaged: .*codec can't decode"),
        (changed(lambda v: v["model"].update(vocab={})), "it has 0 tokens"),
        (changed(lambda v: v["model"].update(vocab=3)), "is damaged: 'int' object is not iterable"),
        (changed(lambda v: v["model"]["vocab"].update(a=10**30)), "are not 0 to n - 1"),
        (changed(lambda v: v["model"]["vocab"].update(a=True)), "are not 0 to n - 1"),
        (changed(lambda v: v["model"]["vocab"].update({"a b": 600})), "'a b' does not stand for"),
        (changed(lambda v: v["model"]["merges"].append(["zz", "qq"])), "not in the vocabulary"),
        (changed(lambda v: v["model"]["merges"].append(["a"])), "a merge is .* not two tokens"),
        (changed(lambda v: v["model"]["merges"].append(["a", 3])), "a merge is .* not two tokens"),
        (changed(lambda v: v.update(normalizer={"type": "Lowercase"})), "has another 'normalizer'"),
        (changed(lambda v: v.update(pre_tokenizer=None)), "has another 'pre_tokenizer'"),
        (changed(lambda v: v["model"].update(dropout=0.5)), "has another 'model'"),
        (changed(lambda v: v.update(code="import os")), "has another 'code'"),
    ],
    ids=range(17),
)
def test_a_damaged_tokenizer_is_one_line(file, content, match):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=match) as caught:
        read_bpe(file)
    assert str(caught.value).count("\n") == 0 and "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("count", [60, slow(2000)])
def test_a_changed_byte_gives_a_tokenizer_or_one_line(tmp_path, count):
    content, file = train_bpe([TEXT[:500]], 300).to_json().encode(), tmp_path / "tokenizer.json"
    rng = np.random.default_rng(0)
    for place, value in zip(rng.integers(0, len(content), count), rng.integers(1, 256, count), strict=True):  # fmt: skip
        damaged = bytearray(content)
        damaged[place] ^= value
        file.write_bytes(damaged)
        try:
            bpe = read_bpe(file)
        except DataError as error:
            assert str(error).count("\n") == 0
            continue
        (ids,) = bpe.encode([TEXT[:200]])
        assert bpe.decode(ids) == TEXT[:200]


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read: No such file"):
        read_bpe(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="it has 0 tokens"):
        Bpe({}, [])
