"""A linear classifier of handwritten digits."""

from jmp_train.config import Experiment
from jmp_train.data import DigitsConfig
from jmp_train.models import Mlp, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        Mlp,
        inputs=lambda spec: spec.size("image"),
        outputs=lambda spec: spec.classes,
        hidden=(),
    ),
    data=DigitsConfig(),
    task="classification",
    steps=1000,
    batch_size=128,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=50),
)
