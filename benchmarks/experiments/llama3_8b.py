"""`Gpt` with the sizes of Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783, table 3).

`Gpt` has all heads for keys and values, where Llama 3 8B has 8 of 32, and one table for embedding and
head. `--model.hidden 12288` takes the parameters of the additional heads from SwiGLU.
"""

from jmp_train.config import Experiment
from jmp_train.data import TextConfig
from jmp_train.models import Gpt, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(Gpt, vocabulary=128256, width=4096, depth=32, heads=32, hidden=14336, remat="dots"),
    data=TextConfig(length=8192),
    task="language_modelling",
    steps=100,
    batch_size=8,
    optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.1, warmup_steps=50, b2=0.95),
)
