"""A multilayer perceptron on handwritten digits; the precisions share it."""

from jmp_train.config.experiment import Experiment
from jmp_train.data import DigitsConfig
from jmp_train.models import MlpConfig
from jmp_train.optim import OptimizerConfig


def experiment(policy: str) -> Experiment[MlpConfig, DigitsConfig]:
    """The family's settings under a policy."""
    return Experiment(
        model=MlpConfig(hidden=(256, 256)),
        data=DigitsConfig(),
        policy=policy,
        steps=2000,
        batch_size=128,
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=1e-2, warmup_steps=100),
    )
