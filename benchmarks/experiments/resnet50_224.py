"""ResNet-50 on images of 224 pixels, 1,000 classes: patterns of colours under noise."""

import numpy as np

import jmp_train as jt
from jmp_train.config import Experiment
from jmp_train.models import Model, ResNet
from jmp_train.optim import OptimizerConfig


def patterns(examples: int = 160) -> dict[str, np.ndarray]:
    """Return images (examples, 224, 224, 3), float32, and their labels."""
    rng = np.random.default_rng(0)
    colours = rng.standard_normal((1000, 8, 8, 3), np.float32)
    label = rng.integers(0, 1000, examples)
    image = colours[label].repeat(28, 1).repeat(28, 2)
    return {"image": image + rng.standard_normal(image.shape, np.float32), "label": label}


FAMILY = Experiment(
    model=Model(
        ResNet, channels=lambda spec: 3, classes=lambda spec: spec.classes, size="50", reduce=4
    ),
    data=jt.Data(patterns, classes=1000),
    task="classification",
    steps=100,
    batch_size=128,
    optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=5e-2, warmup_steps=10),
)
