"""A byte-level language model of 1.3 B parameters, for a GPU and a larger `--data.path`."""

from jmp_train.config import Experiment
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        Gpt, vocabulary=lambda spec: spec.classes, width=2048, depth=26, heads=16, remat="dots"
    ),
    data=TextConfig(length=2048),
    task="language_modelling",
    steps=5000,
    batch_size=16,
    log_every=50,
    optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=0.1, warmup_steps=500, b2=0.95),
)
