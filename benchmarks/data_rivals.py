"""The files that bench_data.py reads, and how other libraries read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_CLASSES = 10
_COLUMNS = 32


class Unable(Exception):
    """A library has no reader for files of a kind, or no workers for it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Files of a kind."""

    name: str
    folder: Path
    batch_size: int
    size: int = 0
    """Height and width of an image, or bytes of a text window."""


def write_cases(folder: Path, *, images: int, rows: int) -> list[Case]:
    """Write the files of all cases."""
    (folder / "images").mkdir()
    (folder / "rows").mkdir()
    (folder / "text").mkdir()
    _write_images(folder / "images", images)
    _write_rows(folder / "rows", rows)
    _write_text(folder / "text")
    return [
        Case("images", folder / "images", 32, 224),
        Case("images, linear", folder / "images", 32, 224),
        Case("rows", folder / "rows", 1024),
        Case("columns", folder / "rows", 1024),
        Case("text", folder / "text", 64, 128),
    ]


def _write_images(folder: Path, count: int) -> None:
    """Write crops of the two photographs in scikit-learn, 256 by 256, JPEG of quality 90."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs: Any = load_sample_images().images
    rng = np.random.default_rng(0)
    for index in range(count):
        photograph = photographs[index % 2]
        top, left = rng.integers(0, np.array(photograph.shape[:2]) - 256)
        place = folder / f"class{index % _CLASSES}"
        place.mkdir(exist_ok=True)
        crop = Image.fromarray(photograph[top : top + 256, left : left + 256])
        crop.save(place / f"{index:05}.jpg", quality=90)


def _write_rows(folder: Path, count: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    for part in range(4):
        columns: dict[str, Any] = {
            f"c{i}": rng.normal(size=count // 4).astype(np.float32) for i in range(_COLUMNS)
        }
        columns["label"] = rng.integers(0, _CLASSES, count // 4)
        parquet.write_table(pa.table(columns), folder / f"{part}.parquet", row_group_size=10_000)


def _write_text(folder: Path) -> None:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        (folder / f"{name.replace('/', '-')}.txt").write_text(text)


def _image_files(case: Case) -> list[tuple[str, int]]:
    folders = sorted(case.folder.iterdir())
    return [(str(f), n) for n, folder in enumerate(folders) for f in sorted(folder.iterdir())]


def decode(path: str, size: int) -> np.ndarray:
    """Return an image as float32 from 0 to 1, in the usual way with Pillow."""
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (size, size))
        pixels = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(pixels, np.float32) / np.float32(255)


class Images:
    """The images of a folder, decoded one at a time."""

    def __init__(self, case: Case):
        self.files, self.size = _image_files(case), case.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.files[index]
        return {"image": decode(path, self.size), "label": label}


class LinearImages(Images):
    """The same, resized without antialiasing, in the usual way with OpenCV."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        import cv2

        path, label = self.files[index]
        pixels = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)  # pyright: ignore
        resized = cv2.resize(pixels, (self.size, self.size))
        return {"image": np.float32(resized) / np.float32(255), "label": label}


class Rows:
    """The rows of Parquet files, as lists of columns in memory."""

    def __init__(self, case: Case):
        from pyarrow import parquet

        whole = parquet.read_table(case.folder)
        columns = [whole[f"c{i}"].to_numpy() for i in range(_COLUMNS)]
        self.x, self.label = np.stack(columns, 1), whole["label"].to_numpy()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "label": self.label[index]}


class Windows:
    """Windows of a text, side by side."""

    def __init__(self, case: Case):
        whole = b"".join(f.read_bytes() for f in sorted(case.folder.iterdir()))
        self.size = case.size
        self.text = np.frombuffer(whole, np.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.text[index * self.size : (index + 1) * self.size + 1]}


SOURCES = {"images": Images, "images, linear": LinearImages, "columns": Rows, "text": Windows}


def grain_by_hand(case: Case, workers: int) -> Iterator[Any]:
    """Return Grain's batches, as its documentation builds them."""
    import grain

    if case.name == "rows":
        files = [str(f) for f in sorted(case.folder.iterdir())]
        if workers:
            raise Unable
        parts = [grain.experimental.ParquetIterDataset(f) for f in files]
        stream = grain.experimental.InterleaveIterDataset(parts, cycle_length=4)
        stream = grain.experimental.WindowShuffleIterDataset(stream, window_size=4096, seed=0)
        return _endless(lambda: iter(stream.batch(case.batch_size)))
    source = SOURCES[case.name](case)
    dataset = grain.MapDataset.source(source).shuffle(seed=0).repeat().batch(case.batch_size)
    stream = dataset.to_iter_dataset()
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers))
    return iter(stream)


def pytorch(case: Case, workers: int) -> Iterator[Any]:
    """Return the batches of PyTorch's DataLoader."""
    from torch.utils.data import DataLoader  # pyright: ignore[reportMissingImports]

    if case.name == "rows":
        raise Unable
    source: Any = SOURCES[case.name](case)
    options = {"persistent_workers": True} if workers else {}
    loader = DataLoader(
        source, case.batch_size, shuffle=True, num_workers=workers, drop_last=True, **options
    )
    return _endless(lambda: iter(loader))


def hugging_face(case: Case, workers: int) -> Iterator[Any]:
    """Return the batches of Hugging Face datasets with the JAX formatter, read by `iter` or PyTorch's
    workers."""
    import datasets

    if workers or case.name == "images, linear":
        raise Unable
    cache = str(case.folder.parent / "cache")
    if case.name == "images":
        files = _image_files(case)
        columns = {"image": [f for f, _ in files], "label": [n for _, n in files]}
        data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        size, bilinear = case.size, 2  # Pillow's number of the filter

        def decoded(batch: Any) -> Any:
            resized = (image.resize((size, size), bilinear) for image in batch["image"])
            images = [np.asarray(image, np.float32) / np.float32(255) for image in resized]
            return {"image": np.stack(images), "label": np.array(batch["label"])}

        data = data.with_transform(decoded)
    elif case.name == "text":
        rows = Windows(case)
        tokens = [rows[i]["tokens"] for i in range(len(rows))]
        data = datasets.Dataset.from_dict({"tokens": tokens}).with_format("jax")
    else:
        files: Any = [str(f) for f in sorted(case.folder.iterdir())]
        data: Any = datasets.Dataset.from_parquet(files, cache_dir=cache)
        data = data.with_format("jax")
    return _endless(lambda: data.shuffle().iter(case.batch_size, drop_last_batch=True))


def tf_data(case: Case, workers: int) -> Iterator[Any]:
    """Return the batches of tf.data; its threads stand for workers."""
    import tensorflow as tf  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

    if case.name == "rows":
        raise Unable
    threads = max(workers, 1)
    if case.name.startswith("images"):
        antialias = case.name == "images"
        files = _image_files(case)
        data = tf.data.Dataset.from_tensor_slices(([f for f, _ in files], [n for _, n in files]))

        def decoded(path: Any, label: Any) -> Any:
            image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
            size = (case.size, case.size)
            return tf.image.resize(image, size, antialias=antialias) / 255.0, label

        data = data.shuffle(len(files)).repeat().map(decoded, num_parallel_calls=threads)
    else:
        source = SOURCES[case.name](case)
        if case.name == "columns":
            arrays: Any = {"x": source.x, "label": source.label}
        else:
            arrays = {"tokens": np.stack([source[i]["tokens"] for i in range(len(source))])}
        data = tf.data.Dataset.from_tensor_slices(arrays).shuffle(len(source)).repeat()
    data = data.batch(case.batch_size, drop_remainder=True).prefetch(2)
    return data.as_numpy_iterator()


def _endless(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    while True:
        yield from make()


RIVALS = {
    "Grain by hand": grain_by_hand,
    "PyTorch": pytorch,
    "Hugging Face": hugging_face,
    "tf.data": tf_data,
}
LIBRARIES = {"PyTorch": "torch", "Hugging Face": "datasets", "tf.data": "tensorflow"}
