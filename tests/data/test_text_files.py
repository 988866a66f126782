"""Text files and folders of them: which documents they have, and what is refused."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmp_train.data import DataError, TextConfig, train_batches
from jmp_train.sources.documents import hold_out, read_documents, text_files

TEXTS = {"b/2.txt": "två ord", "a.md": "# Title\n", "b/10.rst": "ten", "c.TXT": "end"}
IN_ORDER = ["a.md", "b/10.rst", "b/2.txt", "c.TXT"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def refused(match, path, **options):
    with pytest.raises(ValueError, match=match) as caught:
        TextConfig(path=str(path), **{"length": 4, **options}).load()
    assert str(caught.value).count("\n") == 0


def test_a_folder_is_read_in_the_order_of_its_paths(folder):
    for name in ("image.png", ".hidden.txt", ".git/x.txt", "empty.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\xff" if name != "empty.txt" else b"")
    os.mkfifo(folder / "pipe.txt")
    assert [f.relative_to(folder).as_posix() for f in text_files(folder)] == [
        *IN_ORDER[:4],
        "empty.txt",
    ]
    assert read_documents(folder) == [TEXTS[name].encode() for name in IN_ORDER]


def test_a_separator_divides_the_documents_of_a_file(tmp_path):
    (tmp_path / "x.txt").write_text("one<|end|>two<|end|><|end|>three\n")
    assert read_documents(tmp_path / "x.txt", "<|end|>") == [b"one", b"two", b"three\n"]
    assert read_documents(tmp_path / "x.txt", "|nowhere|") == [(tmp_path / "x.txt").read_bytes()]


def test_windows_of_a_folder_are_its_documents_with_an_end_after_each(folder):
    data = TextConfig(path=str(folder), length=4, eval_share=0.3).load()
    text = b"\0" + b"\0".join(TEXTS[name].encode() for name in IN_ORDER) + b"\0"
    scored = data.eval["tokens"][:, 1:][data.eval["mask"]].tobytes()
    assert text.endswith(scored) and scored.replace(b"\0", b"") == text.replace(b"\0", b"")[-7:]
    assert data.eval["target_bytes"][data.eval["mask"]].sum() == 7
    whole = b"".join(TEXTS[name].encode() for name in IN_ORDER)
    facts = data.facts()
    assert facts["sha256"] == hashlib.sha256(whole).hexdigest()
    assert (facts["held_out_bytes"], facts["documents"]) == (round(0.3 * len(whole)), 4)
    batch = train_batches(data.train, len(data.train), seed=0)[0]
    assert all(row.tobytes() in text for row in batch["tokens"])
    np.testing.assert_array_equal(batch["target_bytes"], batch["tokens"][:, 1:] != 0)


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text("aå€😀\n", min_size=1, max_size=9), min_size=1, max_size=6), share=st.floats(0, 1))  # fmt: skip
def test_what_is_held_out_is_the_end_of_the_text_in_whole_characters(texts, share):
    documents = [text.encode() for text in texts]
    parts = hold_out(documents, share)
    whole = b"".join(documents)
    assert b"".join(parts.train) + b"".join(parts.held_out) == whole
    for document in (*parts.train, *parts.held_out):
        assert document.decode()
    held_out = sum(map(len, parts.held_out))
    assert 0 <= held_out - round(share * len(whole)) < 4  # a character has at most 4 bytes
    joined = [*parts.train, *parts.held_out]
    if parts.cut:
        border = len(parts.train) - 1
        joined[border : border + 2] = [joined[border] + joined[border + 1]]
    assert joined == documents


def test_invalid_utf8_names_the_file_and_the_byte(folder):
    (folder / "b" / "bad.txt").write_bytes("två".encode() + b"\xff more")
    refused(r"bad\.txt is not UTF-8 at byte 4: invalid start byte; expected UTF-8", folder)
    (folder / "b" / "bad.txt").write_bytes(b"cut \xc3")
    refused(r"bad\.txt is not UTF-8 at byte 4: unexpected end", folder, tokenizer="bpe")


def test_a_zero_byte_is_for_bpe_alone(folder):
    (folder / "zero.txt").write_bytes(b"ab\0c")
    refused(r"zero\.txt has a zero at byte 2; .*: --data.tokenizer bpe takes it", folder)
    assert TextConfig(path=str(folder), length=4, tokenizer="bpe").load().spec.classes >= 257


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_read(folder, tmp_path):
    (folder / "again.txt").symlink_to(folder / "a.md")
    assert len(read_documents(folder)) == 5
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert len(read_documents(folder)) == 5
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "b" / "x.txt").symlink_to(tmp_path / "secret.txt")
    refused(r"b/x\.txt is a link that leads out of .*texts; expected a file in it", folder)
    (folder / "b" / "x.txt").unlink()
    (folder / "b" / "x").symlink_to(tmp_path, target_is_directory=True)
    refused("b/x is a link that leads out of", folder)


def test_text_larger_than_the_memory_is_refused_unread(folder, monkeypatch):
    monkeypatch.setattr("jmp_train.sources.files.available_memory", lambda: 10)
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    hint = "split the text, or write its tokens with write_records"
    refused(f"texts needs .* GiB of memory; expected at most .* free; {hint}", folder)
    refused(f"a.md needs .*; {hint}", folder / "a.md", packed=True)
    monkeypatch.setattr("jmp_train.sources.files.available_memory", lambda: 5)
    refused(f"a.md needs .*; {hint}", folder / "a.md")


def test_what_has_no_text_is_one_line(tmp_path):
    refused(r"has no text files; expected files such as .*1\.txt, .*\.txt, \.text, \.md", tmp_path)
    (tmp_path / "empty.txt").write_text("")
    refused("has no text; expected at least one document", tmp_path)
    (tmp_path / "one.txt").write_text("x")
    refused("eval_share 0.1 leaves no text held out", tmp_path)
    refused("eval_share 0.9 leaves no text to train on", tmp_path, eval_share=0.9)
    (tmp_path / "one.txt").write_text("xyz")
    refused("length is 8; expected less than the .* tokens of training text", tmp_path, length=8, eval_share=0.4)  # fmt: skip
    refused("did you mean 'one.txt'", tmp_path / "on.txt")
    refused("vocabulary is 256; expected 257 to", tmp_path, vocabulary=256)
    refused("tokenizer is 'bpf'; did you mean 'bpe'", tmp_path, tokenizer="bpf")


def test_each_topic_of_the_bundled_text_is_a_document(monkeypatch):
    monkeypatch.setattr("jmp_train.data.text._LARGEST_COMPRESSED", 0)
    data, plain = (TextConfig(length=64, packed=packed).load() for packed in (True, False))
    names = ("sha256", "training_bytes", "held_out_bytes")
    assert [data.facts()[n] for n in names] == [plain.facts()[n] for n in names]
    assert data.facts()["documents"] > 50 and data.spec == plain.spec


def test_without_tokenizers_the_package_to_install_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(r"expected the package tokenizers: pip install 'jmp-train\[tokenizers\]'", folder, tokenizer="bpe")  # fmt: skip
    assert TextConfig(path=str(folder), length=4).load().spec.classes == 256


def test_bytes_of_a_file_need_neither_utf8_nor_tokenizers(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(range(256)))
    code = f"""
import sys
from jmp_train.data import TextConfig
data = TextConfig(path={str(tmp_path / "x.bin")!r}, length=8).load()
assert sorted(data.eval) == ["mask", "tokens"] and data.spec.classes == 256 and not data.files
assert "tokenizers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_damaged_documents_are_data_errors(folder):
    (folder / "a.md").unlink()
    (folder / "a.md").symlink_to(folder / "gone")
    with pytest.raises(DataError, match=r"a\.md cannot be read: No such file"):
        read_documents(folder)
