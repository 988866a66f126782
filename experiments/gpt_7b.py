"""A byte-level language model of 6.5 B parameters, for hosts of GPUs and a larger `--data.path`."""

from jmp_train.config import Experiment
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        Gpt, vocabulary=lambda spec: spec.classes, width=4096, depth=32, heads=32, hidden=11008,
        remat="full",
    ),
    data=TextConfig(length=4096),
    task="language_modelling",
    steps=5000,
    batch_size=64,
    log_every=50,
    optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.1, warmup_steps=500, b2=0.95),
)  # fmt: skip
