"""Small data sets of Hugging Face and of TFDS, written by these libraries."""

import io

import numpy as np
from PIL import Image

_rng = np.random.default_rng(0)
PIXELS = _rng.integers(0, 256, (30, 6, 6, 3), np.uint8)
POINTS = _rng.normal(size=(30, 3)).astype(np.float32)
LABELS = np.arange(30) % 3
NAMES = ["ash", "elm", "oak"]


def assert_written(batch, which):
    """Assert that a batch has the examples with these numbers, as they were written."""
    np.testing.assert_array_equal(batch["image"], PIXELS[which] / np.float32(255))
    np.testing.assert_array_equal(batch["points"], POINTS[which])
    np.testing.assert_array_equal(batch["label"], LABELS[which])
    dtypes = {name: str(array.dtype) for name, array in batch.items() if name != "number"}
    assert dtypes == {"image": "float32", "points": "float32", "label": "int32"}


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows(part):
    """A `Dataset` of images, points, labels and texts."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "points": datasets.List(datasets.Value("float32"), length=3),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=NAMES),
        }
    )
    columns = {
        "image": [Image.fromarray(pixels) for pixels in PIXELS[part]],
        "points": POINTS[part],
        "text": [NAMES[label] for label in LABELS[part]],
        "label": LABELS[part],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def save_hugging_face(folder):
    """Write splits of 24 and 6 rows; return the folder."""
    import datasets

    splits = datasets.DatasetDict({"train": rows(slice(24)), "test": rows(slice(24, 30))})
    splits.save_to_disk(folder, num_shards={"train": 3, "test": 1})
    return str(folder)


def prepare_tfds(folder, version="1.0.0", file_format="array_record", name="trees"):
    """Prepare splits of 24 and 6 examples with TFDS; return the folder."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = None  # finding it imports importlib_resources, which TFDS does not require

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "points": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=NAMES),
                "number": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._examples(range(24)), "test": self._examples(range(24, 30))}

        def _generate_examples(self, *args):
            raise AssertionError("the splits are given")

        def _examples(self, indices):
            for index in indices:
                yield (
                    index,
                    {
                        "image": io.BytesIO(png(PIXELS[index])),
                        "points": POINTS[index],
                        "text": NAMES[LABELS[index]],
                        "label": LABELS[index],
                        "number": index,
                    },
                )

    Builder.name = name
    Builder(data_dir=folder, file_format=file_format).download_and_prepare()
    return str(folder)
