"""Writes data/gradscaler_trajectories.json: what PyTorch's GradScaler does, for machines without it.

    python tests/loss_scales/make_gradscaler_trajectories.py

Each case holds the hyper-parameters, the run lengths of finite and non-finite steps in turn, and
the steps after which the scale is another, with the scale.
"""

import itertools
import json
import pathlib
import random

PATH = pathlib.Path(__file__).parent / "data" / "gradscaler_trajectories.json"


def gradscaler_trajectory(
    finite, *, init_scale, growth_factor, backoff_factor, growth_interval
) -> list[tuple[float, int]]:
    """Scale and growth tracker after each step of `torch.amp.GradScaler` on the CPU."""
    import torch  # pyright: ignore[reportMissingImports]

    scaler = torch.amp.GradScaler("cpu", init_scale, growth_factor, backoff_factor, growth_interval)
    parameter = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([parameter])
    scaler.scale(torch.zeros(()))  # makes the scale a tensor
    trajectory = []
    for ok in finite:
        parameter.grad = torch.zeros(()) if ok else torch.full((), torch.inf)
        scaler.step(optimizer)
        scaler.update()
        trajectory.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return trajectory


def cases():
    rng = random.Random(0)

    def steps(number, skips):
        return [rng.random() >= skips for _ in range(number)]

    common = [(2.0, 0.5), (2.0, 0.25), (1.5, 0.75), (4.0, 0.5)]
    for (growth, backoff), interval in itertools.product(common, (1, 2, 3, 10)):
        skips = 0.5 if interval == 1 else 0.5 / interval
        yield steps(100, skips), (2.0**16, growth, backoff, interval)
    yield steps(20_000, 1e-3), (2.0**16, 2.0, 0.5, 2000)  # GradScaler's defaults
    yield [True] * 12_001, (2.0**16, 2.0, 0.5, 2000)
    yield [True] * 30, (2.0**120, 2.0, 0.5, 1)  # stays at 2^127
    yield [True] * 30 + [False] * 3 + [True] * 30, (2.0**120, 2.0, 0.5, 2)
    yield [True] * 30 + [False] + [True] * 9, (2.0**120, 1.5, 0.75, 1)
    yield [False] * 100, (2.0**16, 2.0, 0.5, 10)  # below one, as far as 2^-84
    yield steps(200, 0.2), (2.0**16, 1.1, 0.9, 2)  # factors that float32 rounds
    yield steps(200, 0.2), (1000.0, 3.0, 0.3, 3)


def main() -> None:
    import torch  # pyright: ignore[reportMissingImports]

    written = []
    for finite, (init_scale, growth_factor, backoff_factor, growth_interval) in cases():
        numbers = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
        }
        trajectory = gradscaler_trajectory(finite, **numbers)
        scales = [init_scale, *(scale for scale, _ in trajectory)]
        written.append(
            numbers
            | {
                "first_run_is_finite": finite[0],
                "runs": [len(list(run)) for _, run in itertools.groupby(finite)],
                "changes": [
                    [step, after]
                    for step, (before, after) in enumerate(itertools.pairwise(scales))
                    if before != after
                ],
                "last_growth_tracker": trajectory[-1][1],
            }
        )
    text = {"torch": torch.__version__, "cases": written}
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(text) + "\n")


if __name__ == "__main__":
    main()
