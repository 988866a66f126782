"""`Gpt` with the sizes of the model of 32 B that MaxText publishes times of: `global_parameter_scale=32`.

The vocabulary is that of its configuration; `Gpt` has one table for embedding and head.
"""

from jmp_train.config import Experiment
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(Gpt, vocabulary=32000, width=8192, depth=32, heads=64, hidden=28672, remat="full"),
    data=TextConfig(length=2048),
    task="language_modelling",
    steps=100,
    batch_size=1024,
    optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.1, warmup_steps=50, b2=0.95),
)
