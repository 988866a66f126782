"""A residual network on drawn characters."""

from jmp_train.config import Experiment
from jmp_train.data import GlyphsConfig
from jmp_train.models import Model, ResNet
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        ResNet,
        channels=lambda spec: (*spec.example["image"].shape, 1)[2],
        classes=lambda spec: spec.classes,
        reduce=2,
    ),
    data=GlyphsConfig(),
    task="classification",
    steps=800,
    batch_size=128,
    optimizer=OptimizerConfig(learning_rate=2e-2, weight_decay=5e-2, warmup_steps=50),
)
