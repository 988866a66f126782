"""Result files of the GPU benchmark, and the figures that follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parents[1] / "results"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
PROGRAMS = ("jmp_train", "autocast", "apply_policy", "hand-written JAX", "PyTorch")
LOSS_BOUND = 0.05
"""Largest difference in nats from jmp_train's fp32 loss after 100 steps at which a speed counts."""


class Row(NamedTuple):
    """One measured row with the figures that need other rows of the same file."""

    id: str
    data: dict[str, Any]
    speed_up: float | None
    """Rate over that of jmp_train's strict fp32 step of the same workload."""
    memory_ratio: float | None
    """Peak memory over that of jmp_train's strict fp32 step."""
    mfu_ceiling: float | None
    """Model FLOP/s over the matrix-product rate measured in the same run and precision."""
    loss_step: int | None
    """Last step, at most 100, at which both this row and jmp_train's strict fp32 kept a loss."""
    loss_difference: float | None
    """Loss after `loss_step` steps minus that of jmp_train's strict fp32 step, in nats."""

    @property
    def rate(self) -> float:
        """Tokens or examples a second."""
        return self.data["per_second"]

    @property
    def counts(self) -> bool:
        """Whether the loss after `loss_step` steps is within `LOSS_BOUND` of fp32's."""
        # A NaN compares false, so a row that diverged does not count.
        return self.loss_difference is not None and abs(self.loss_difference) <= LOSS_BOUND


class Result(NamedTuple):
    """One result file: a device, its versions and its rows by identifier."""

    name: str
    data: dict[str, Any]

    @property
    def device(self) -> str:
        """The device's name, as the driver gives it."""
        return self.data["device"]["kind"]

    def row(
        self, workload: str, precision: str, program: str = "jmp_train", **options: Any
    ) -> Row | None:
        """Return the row of a workload, or None where it was not measured."""
        for key, data in self.data["rows"].items():
            named = tuple(data.get(field) for field in ("workload", "precision", "program"))
            if named == (workload, precision, program) and data.get("options", {}) == options:
                return self.derive(key)
        return None

    def derive(self, key: str) -> Row | None:
        """Return the row of an identifier with its ratios; None for a row without a rate."""
        data = self.data["rows"].get(key)
        if not _measured(data):
            return None
        base = self.data["rows"].get(f"{data['workload']}/fp32/jmp_train")
        base = base if _measured(base) else {}
        losses, base_losses = _losses(data), _losses(base)
        step = max(losses.keys() & base_losses.keys(), default=None)
        return Row(
            id=key,
            data=data,
            speed_up=_ratio(data, base, "per_second"),
            memory_ratio=_ratio(data, base, "peak_memory_bytes"),
            mfu_ceiling=self._mfu(data),
            loss_step=step,
            loss_difference=None if step is None else losses[step] - base_losses[step],
        )

    def ceiling(self, precision: str) -> float | None:
        """Return the measured matrix-product rate of a precision in TFLOP/s."""
        row = self.data["rows"].get(f"ceiling/{precision}/jmp_train", {})
        rate = row.get("tflops") if row.get("status") == "ok" else None
        return rate.get(precision) if isinstance(rate, dict) else rate

    def copy_bandwidth(self) -> float | None:
        """Return the measured copy bandwidth in GB/s."""
        row = self.data["rows"].get("ceiling/copy/jmp_train", {})
        return row.get("gb_per_s") if row.get("status") == "ok" else None

    def why_missing(self, key: str) -> str:
        """Return why the row of an identifier has no figures, in a few words."""
        row = self.data["rows"].get(key)
        if row is None:
            return "not measured yet"
        if row["status"] == "timeout":
            return "not measured: ran into its time limit"
        reason = str(row.get("reason", "")).strip().splitlines()
        return f"failed: {reason[-1][:160]}" if reason else "failed"

    def _mfu(self, data: dict[str, Any]) -> float | None:
        ceiling, rate = self.ceiling(data["precision"]), _number(data, "model_tflops")
        return rate / ceiling if ceiling and rate is not None else None


def read(paths: Sequence[Path]) -> list[Result]:
    """Return the result files, newest first."""
    found = [Result(path.name, json.loads(path.read_text())) for path in sorted(paths)]
    return sorted(found, key=lambda result: str(result.data["date"]), reverse=True)


def _measured(row: dict[str, Any] | None) -> bool:
    return bool(row and row.get("status") == "ok" and row.get("per_second"))


def _losses(row: dict[str, Any]) -> dict[int, float]:
    """Return the losses by step; NaN for one that is not finite, which strict JSON keeps as null."""
    kept = dict(row.get("losses") or {})
    if not kept and row.get("loss_100") is not None:
        kept = {"100": row["loss_100"]}
    return {int(step): math.nan if x is None else float(x) for step, x in kept.items()}


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _ratio(row: dict[str, Any], base: dict[str, Any], key: str) -> float | None:
    value, by = _number(row, key), _number(base, key)
    return value / by if value is not None and by else None
