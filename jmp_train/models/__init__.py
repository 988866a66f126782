"""Networks that the experiments share; each takes its dtypes as arguments."""

from jmp_train.models.gpt import Gpt, GptConfig
from jmp_train.models.mlp import Mlp, MlpConfig

__all__ = ["Gpt", "GptConfig", "Mlp", "MlpConfig"]
