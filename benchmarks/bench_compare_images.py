"""Do fp16 and bf16 reach fp32's accuracy with batch norm, and with a vision transformer?

Runs `compare` on the families `cnn` (drawn characters) and `vit` (digits) at their default sizes, with
k-nearest neighbours and a support vector machine of scikit-learn on the same split beside them. Equal
accuracy means: within two binomial standard deviations of the held-out accuracy, by two one-sided
paired t-tests at 5 % over the seeds. That is 0.0095 at 0.90 of 4,000 characters, and 0.02 at 0.96 of
359 digits; both were set before the runs.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from record import keep, keep_comparison

from jmp_train.config.find import find_experiment
from jmp_train.runs.compare import variants_of

MARGINS = {"cnn": 0.0095, "vit": 0.02}  # of accuracy


def main() -> None:
    """Compares, prints the tables and keeps JSON, tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(MARGINS), choices=list(MARGINS))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    baselines = {family: classical(find_experiment(f"{family}_fp32")) for family in MARGINS}
    print(baselines)
    print(keep("image_baselines", baselines))
    for family in options.families:
        variants = variants_of(family, "fp32,fp16,bf16")
        margin = MARGINS[family]
        keep_comparison(f"compare_{family}", family, variants, margin=margin, options=options)


def classical(experiment: Any) -> dict[str, float]:
    """Return the held-out accuracy of classifiers of scikit-learn, on pixels without noise added."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    data = experiment.data.load()
    train, held_out = data.train.arrays, data.eval
    flat = lambda arrays: np.reshape(arrays["image"], (len(arrays["image"]), -1))
    models = {"3 nearest neighbours": KNeighborsClassifier(3), "support vector machine": SVC(C=10)}
    return {
        name: float(model.fit(flat(train), train["label"]).score(flat(held_out), held_out["label"]))
        for name, model in models.items()
    }


if __name__ == "__main__":
    main()
