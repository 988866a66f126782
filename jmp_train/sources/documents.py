"""Documents: the texts of a file or of a folder of files, and the part of them that is held out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jmp_train.errors import DataError
from jmp_train.sources.files import check_memory, within

#: Endings of the files of a folder that are read.
TEXTS = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
HINT = "split the text, or write its tokens with write_records (docs/sources.md)"


class Parts(NamedTuple):
    """Documents to train on and held-out ones."""

    train: list[bytes]
    held_out: list[bytes]
    cut: bool
    """Whether the first held-out document is the rest of the last training document."""


def text_files(path: Path) -> list[Path]:
    """Return a file itself, or the text files below a folder, sorted by their paths in it.

    Names that begin with a dot are left out, and so are files of other endings than `TEXTS`, pipes
    and devices.

    Raises:
      DataError: for a folder without such files, and for a link that leads out of it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("b.txt", "a.md", "c.bin"):
    ...     _ = (folder / name).write_text("text")
    >>> [file.name for file in text_files(folder)]
    ['a.md', 'b.txt']
    """
    if not path.is_dir():
        return [path]
    found = []
    for place, folders, files in os.walk(path, onerror=_unreadable):
        folders[:] = [name for name in folders if name[0] != "."]
        texts = [n for n in files if n[0] != "." and os.path.splitext(n)[1].lower() in TEXTS]
        for name in (*folders, *texts):
            full = os.path.join(place, name)
            if os.path.islink(full) and not within(full, path):
                raise DataError(f"{full} is a link that leads out of {path}; expected a file in it")
        found += [full for full in (Path(place, n) for n in texts) if not _is_special(full)]
    if not found:
        raise DataError(
            f"{path} has no text files; expected files such as {path / '1.txt'}, with one of the "
            f"endings {', '.join(TEXTS)}"
        )
    return sorted(found, key=lambda file: os.fsencode(file.relative_to(path).as_posix()))


def read_documents(
    path: Path, separator: str = "", *, memory: float = 1, zero_ends: bool = False
) -> list[bytes]:
    """Return the documents of a file or a folder in UTF-8, without empty ones.

    Args:
      path: a file, or a folder whose text files are read in the order of `text_files`.
      separator: text between two documents of a file; empty: each file is one document.
      memory: bytes of memory that a byte of text needs.
      zero_ends: whether a zero byte ends a document, so that a document must not have one.

    Raises:
      DataError: for a file that cannot be read or is not UTF-8, and for files without text.
      ValueError: for files that need more memory than is free.
    """
    files = text_files(path)
    check_memory(path, int(memory * sum(map(_size, files))), HINT)
    documents = split_texts((_read(file, zero_ends) for file in files), separator)
    if not documents:
        raise DataError(f"{path} has no text; expected at least one document")
    return documents


def split_texts(texts: Iterable[bytes], separator: str) -> list[bytes]:
    """Return the documents of texts, without empty ones; arguments as in `read_documents`.

    >>> split_texts([b"a--b--", b"c"], "--")
    [b'a', b'b', b'c']
    """
    if separator:
        texts = (part for text in texts for part in text.split(separator.encode()))
    return [text for text in texts if text]


def hold_out(documents: list[bytes], share: float) -> Parts:
    """Return documents with a share of their bytes held out, from their end.

    A document at the border is cut into two, before the first byte of a character.

    >>> hold_out([b"abcd", b"efghij"], 0.3)
    Parts(train=[b'abcd', b'efg'], held_out=[b'hij'], cut=True)
    >>> hold_out([b"abcd", b"efghij"], 0.6)
    Parts(train=[b'abcd'], held_out=[b'efghij'], cut=False)
    """
    size = sum(map(len, documents))
    split = size - round(share * size)
    for index, document in enumerate(documents):
        if split < len(document):
            while split and document[split] & 0xC0 == 0x80:  # a later byte of a character
                split -= 1
            if not split:
                return Parts(documents[:index], documents[index:], cut=False)
            train, held_out = document[:split], document[split:]
            return Parts([*documents[:index], train], [held_out, *documents[index + 1 :]], cut=True)
        split -= len(document)
    return Parts(documents, [], cut=False)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _read(file: Path, zero_ends: bool) -> bytes:
    try:
        text = file.read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 at byte {error.start}: {error.reason}; expected UTF-8 text"
        ) from None
    if zero_ends and b"\0" in text:
        raise DataError(
            f"{file} has a zero at byte {text.index(0)}; expected text without it, because it marks "
            "the end of a document: --data.tokenizer bpe takes it"
        )
    return text


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _is_special(path: Path) -> bool:
    """Return whether a path is a pipe, a socket or a device, which a read would wait for."""
    return path.exists() and not path.is_file()
