"""A byte-level language model of 124 M parameters, for a GPU and a larger `--data.path`."""

from jmp_train.config import Experiment
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        Gpt, vocabulary=lambda spec: spec.classes, width=896, depth=13, heads=14, remat="dots"
    ),
    data=TextConfig(length=1024),
    task="language_modelling",
    steps=5000,
    batch_size=32,
    log_every=50,
    optimizer=OptimizerConfig(learning_rate=6e-4, weight_decay=0.1, warmup_steps=500, b2=0.95),
)
