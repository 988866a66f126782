"""Data sets that need no download, and batches in an order that is a pure function of a seed."""

from jmp_train.data import augment
from jmp_train.data.arrays import NpzConfig
from jmp_train.data.batches import eval_batches, iterate, train_batches
from jmp_train.data.data import Data
from jmp_train.data.dataset import Arrays, DataError, Dataset, Source
from jmp_train.data.digits import DigitsConfig
from jmp_train.data.examples import Examples
from jmp_train.data.glyphs import GlyphsConfig
from jmp_train.data.pack import pack, write_records
from jmp_train.data.streams import Stream
from jmp_train.data.text import TextConfig, compression_baselines
from jmp_train.sources.hubs import hugging_face
from jmp_train.sources.images import ImageFolder, image_folder
from jmp_train.sources.on_disk import arrays_on_disk
from jmp_train.sources.records import Records, array_records
from jmp_train.sources.tables import table
from jmp_train.sources.tfds import tfds_data

__all__ = [
    "Arrays",
    "Data",
    "DataError",
    "Dataset",
    "DigitsConfig",
    "Examples",
    "GlyphsConfig",
    "ImageFolder",
    "NpzConfig",
    "Records",
    "Source",
    "Stream",
    "TextConfig",
    "array_records",
    "arrays_on_disk",
    "augment",
    "compression_baselines",
    "eval_batches",
    "hugging_face",
    "image_folder",
    "iterate",
    "pack",
    "table",
    "tfds_data",
    "train_batches",
    "write_records",
]
