"""A multilayer perceptron on handwritten digits."""

from jmp_train.config import Experiment
from jmp_train.data import DigitsConfig
from jmp_train.models import Mlp, Model
from jmp_train.optim import OptimizerConfig

FAMILY = Experiment(
    model=Model(
        Mlp,
        inputs=lambda spec: spec.size("image"),
        outputs=lambda spec: spec.classes,
        hidden=(256, 256),
    ),
    data=DigitsConfig(),
    task="classification",
    steps=2000,
    batch_size=128,
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=1e-2, warmup_steps=100),
)

PRECISIONS = {
    # Everything in float16, including Adam's state, without a loss scale: docs/parameters.md shows the
    # failures; `compare mlp --precisions fp32,fp16,pure_fp16` compares it with correct settings.
    "pure_fp16": {
        "policy": "float16",
        "optimizer.state": "float16",
        "loss_scale.kind": "none",
    },
}
