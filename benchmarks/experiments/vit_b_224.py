"""ViT-B with patches of 16 on the images of `resnet50_224`."""

import dataclasses

from experiments.resnet50_224 import FAMILY as RESNET  # pyright: ignore[reportMissingImports]

from jmp_train.models import Model, Vit

FAMILY = dataclasses.replace(
    RESNET,
    model=Model(
        Vit,
        image=lambda spec: spec.example["image"].shape,
        classes=lambda spec: spec.classes,
        size="B",
        patch=16,
    ),
)
