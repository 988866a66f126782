"""A vision transformer on handwritten digits."""

from jmp_train.config import Experiment
from jmp_train.data import DigitsConfig
from jmp_train.models import Model, Vit
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        Vit,
        image=lambda spec: spec.example["image"].shape,
        classes=lambda spec: spec.classes,
        patch=2,
    ),
    data=DigitsConfig(),
    task="classification",
    steps=600,
    batch_size=128,
    ema_decay=0.99,
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=5e-2, warmup_steps=100),
)
