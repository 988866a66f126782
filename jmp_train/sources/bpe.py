"""Byte-level byte-pair encoding: trained on texts, saved as tokenizer.json, and read back unrun."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jmp_train.errors import DataError
from jmp_train.sources.tokens import token_dtype

END = "<|endoftext|>"
"""The token of the end of a document, number 0. The same letters in a text are ordinary tokens."""
SMALLEST, LARGEST = 257, 2**20  # tokens: 256 bytes and the end
_LARGEST_FILE = 2**27  # bytes
_PIECE = 2**20  # characters that are encoded together


class Bpe:
    """A byte-level byte-pair encoding.

    Its tokens are those of GPT-2's scheme (Radford et al. 2019, section 2.2): texts are split into words
    by GPT-2's pattern, and pairs of tokens within a word are merged. Texts of over a million
    characters are encoded in pieces, which are cut after a new line if they have one.

    Args:
      vocabulary: numbers of the tokens, 0 to n - 1; each character of a token stands for a byte.
      merges: pairs of tokens, in the order in which they are merged.

    Raises:
      ValueError: for other numbers, for a missing byte, and for a pair whose tokens are not in the
        vocabulary.

    >>> bpe = train_bpe([b"to be or not to be, " * 9], 270)
    >>> (ids,) = bpe.encode([b"to be"])
    >>> bpe.decode(ids), ids.dtype, len(ids) < 5, int(bpe.sizes[ids].sum())
    (b'to be', dtype('uint16'), True, 5)
    """

    end = 0

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        _check_vocabulary(vocabulary)
        self._tokenizer = _tokenizer(vocabulary, merges)
        named = sorted(vocabulary, key=vocabulary.__getitem__)
        to_byte = _byte_of_character()
        self._bytes = [b"", *(bytes(to_byte[c] for c in token) for token in named[1:])]
        self.sizes = np.array([len(token) for token in self._bytes], np.int32)

    def encode(self, texts: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yield the tokens of each text, uint16 or int32.

        Raises:
          DataError: for a text that is not UTF-8.
        """
        dtype = token_dtype(len(self.sizes))
        for text in texts:
            pieces = list(_pieces(text))
            encoded = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            yield np.concatenate([np.zeros(0, dtype), *(np.array(e.ids, dtype) for e in encoded)])

    def decode(self, tokens: np.ndarray) -> bytes:
        """Return the bytes that tokens stand for; none for the end of a document."""
        return b"".join(self._bytes[int(token)] for token in tokens)

    def to_json(self) -> str:
        """Return the content of tokenizer.json, in the format of Hugging Face's tokenizers."""
        return self._tokenizer.to_str(pretty=True) + "\n"


def train_bpe(texts: Iterable[bytes], vocabulary: int) -> Bpe:
    """Train an encoding on texts; the same texts give the same one.

    Args:
      texts: in UTF-8.
      vocabulary: largest number of tokens; small texts have fewer pairs to merge.

    Raises:
      DataError: for a text that is not UTF-8, and without the package tokenizers.
    """
    library = _library()
    tokenizer = _tokenizer({}, [])
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=sorted(_byte_of_character()),
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Bpe(model["vocab"], [(a, b) for a, b in model["merges"]])


def read_bpe(path: Path) -> Bpe:
    """Read an encoding that `Bpe.to_json` wrote.

    Only its tokens and pairs are used. A file with other settings is refused, and nothing in it runs.

    Raises:
      DataError: for a file that cannot be read, or has something else.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} has over {_LARGEST_FILE >> 20} MiB; expected a tokenizer")
        values = json.loads(path.read_text(encoding="utf-8"))
        model = values["model"]
        bpe = Bpe(dict(model["vocab"]), [_pair(merge) for merge in model["merges"]])
        others = json.loads(bpe.to_json())
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except KeyError as error:
        raise DataError(f"{path} is damaged: it has no {error}; {_EXPECTED}") from None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(f"{path} is damaged: {what}; {_EXPECTED}") from None
    differ = [name for name in {**others, **values} if values.get(name) != others.get(name)]
    if differ:
        raise DataError(
            f"{path} has another {differ[0]!r} than the tokenizers of runs; {_EXPECTED}"
        )
    return bpe


_EXPECTED = "expected the tokenizer.json of a run, a byte-level BPE"


def _pair(merge: Any) -> tuple[str, str]:
    if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(x, str) for x in merge):
        raise ValueError(f"a merge is {str(merge)[:40]!r}, not two tokens")
    return merge[0], merge[1]


def _check_vocabulary(vocabulary: dict[str, int]) -> None:
    """Raise ValueError for tokens that do not stand for bytes, or other numbers than 0 to n - 1."""
    numbers = list(vocabulary.values())
    if not all(type(n) is int for n in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise ValueError("the numbers of its tokens are not 0 to n - 1")
    if not SMALLEST <= len(numbers) <= LARGEST:
        raise ValueError(f"it has {len(numbers)} tokens, not {SMALLEST} to {LARGEST}")
    characters = set(_byte_of_character())
    if vocabulary.get(END) != 0 or not characters <= vocabulary.keys():
        raise ValueError(f"it lacks {END} as token 0, or the token of a byte")
    for token in vocabulary:
        if token != END and not (token and set(token) <= characters):
            raise ValueError(f"its token {token[:40]!r} does not stand for bytes")


def _tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    library = _library()
    known = set(vocabulary)
    for a, b in merges:  # the library stops the process at some of these
        if not {a, b, a + b} <= known or END in (a, b):
            raise ValueError(f"its merge of {a[:40]!r} and {b[:40]!r} is not in the vocabulary")
    try:
        tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # noqa: BLE001  (the library raises Exception itself)
        raise ValueError(str(error)) from None
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    if vocabulary:
        tokenizer.add_special_tokens([END])
        tokenizer.encode_special_tokens = True  # its letters in a text are ordinary tokens
    return tokenizer


def _pieces(text: bytes) -> Iterator[str]:
    """Yield a text in pieces of at most `_PIECE` characters, cut after a new line if they have one."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the text is not UTF-8 at byte {error.start}: {error.reason}; expected UTF-8"
        ) from None
    start = 0
    while len(decoded) - start > _PIECE:
        stop = decoded.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield decoded[start:stop]
        start = stop
    if start < len(decoded):
        yield decoded[start:]


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return the byte that each of GPT-2's 256 characters stands for.

    Printable characters of Latin-1 stand for themselves; the others follow from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "the tokenizer is 'bpe'; expected the package tokenizers: pip install "
            "'jmp-train[tokenizers]'"
        ) from None
    return tokenizers
