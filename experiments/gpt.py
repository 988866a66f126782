"""A byte-level language model of Python's documentation topics: 0.8 M parameters.

One run takes about three minutes on two CPU cores.
"""

from jmp_train.config import Experiment
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(Gpt, vocabulary=lambda spec: spec.classes, width=128, depth=4, heads=4),
    data=TextConfig(length=128),
    task="language_modelling",
    steps=1000,
    batch_size=16,
    log_every=50,
    eval_every=250,
    checkpoint_every=250,
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, warmup_steps=100, b2=0.99),
)
