"""A byte-level language model of 77.8 B parameters, for hosts of GPUs and a larger `--data.path`.

The sizes of well-known models of 70 B, whose keys and values have an eighth of the heads; those of
`Gpt` have all heads, which adds 9.4 B.
"""

from jmp_train.config import Experiment
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        Gpt, vocabulary=lambda spec: spec.classes, width=8192, depth=80, heads=64, hidden=28672,
        remat="full",
    ),
    data=TextConfig(length=4096),
    task="language_modelling",
    steps=5000,
    batch_size=256,
    log_every=50,
    optimizer=OptimizerConfig(learning_rate=1.5e-4, weight_decay=0.1, warmup_steps=500, b2=0.95),
)  # fmt: skip
