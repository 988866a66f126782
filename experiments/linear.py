"""A linear classifier of handwritten digits."""

from jmp_train.config import Experiment
from jmp_train.data import DigitsConfig
from jmp_train.models import MlpConfig
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=MlpConfig(hidden=()),
    data=DigitsConfig(),
    steps=1000,
    batch_size=128,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=50),
)
