"""Networks, and how an experiment names one with its settings."""

from jmp_train.models.batch_norm import ShareBatchNorm
from jmp_train.models.gpt import Gpt
from jmp_train.models.mlp import Mlp
from jmp_train.models.model import Model
from jmp_train.models.resnet import ResNet
from jmp_train.models.vit import Vit

__all__ = ["Gpt", "Mlp", "Model", "ResNet", "ShareBatchNorm", "Vit"]
