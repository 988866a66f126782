"""The mlp family with everything in float16, Adam's state too, and no loss scale: how not to.

`compare mlp --precisions fp32,fp16,pure_fp16` shows it beside the right way; docs/parameters.md says
what happens.
"""

import dataclasses

from experiments.mlp import experiment
from jmp_train.loss_scales.config import LossScaleConfig

_MIXED = experiment("float16")

EXPERIMENT = dataclasses.replace(
    _MIXED,
    optimizer=dataclasses.replace(_MIXED.optimizer, state="float16"),
    loss_scale=LossScaleConfig(kind="none"),
)
