"""What would large runs need? Plans for devices that are not here: docs/paper.md and docs/scale.md show them.

    python benchmarks/plans.py            # compiles what results/plans-cpu.json does not have yet
    python benchmarks/plans.py --tables   # prints the tables of the pages

Each row is a `jmp-train plan ... --output`, run in this folder, whose experiments are llama3_8b and
maxtext_32b. It needs the extra `plan`, or the folder .plan that `make test-compiled` makes; a row takes
half a minute to several minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS, keep

HERE = Path(__file__).resolve().parent
FILE = RESULTS / "plans-cpu.json"


class Row(NamedTuple):
    """A plan: an experiment, a device, a mesh, and the tokens of a step."""

    name: str
    device: str
    mesh: str
    batch_size: int
    length: int
    options: str = ""

    @property
    def command(self) -> str:
        """The command line after `jmp-train`."""
        text = f"plan {self.name} --device {self.device} --mesh {self.mesh} --batch-size {self.batch_size}"
        return f"{text} {self.options}".strip()


COLLECTIVES = {
    (mesh, dtype): Row("gpt_1b3_bf16", "h100", mesh, 16, 2048, f"--reduce-dtype {dtype}")
    for mesh in ("data=8", "data=2,fsdp=4", "fsdp=8")
    for dtype in ("bfloat16", "float32")
}
PUBLISHED = {
    "torchao": Row("llama3_8b_bf16", "h100", "fsdp=8", 8, 8192),
    "torchao, parameters of grouped heads": Row("llama3_8b_bf16", "h100", "fsdp=8", 8, 8192, "--model.hidden 12288"),
    "torchao, nothing computed again": Row("llama3_8b_bf16", "h100", "fsdp=8", 8, 8192, "--model.remat none"),
    "torchao, blocks computed again": Row("llama3_8b_bf16", "h100", "fsdp=8", 8, 8192, "--model.remat full"),
    "torchao, rows of 512": Row(
        "llama3_8b_bf16", "h100", "fsdp=8", 128, 512, "--data.length 512"
    ),
    "MaxText, v5e": Row("maxtext_32b_bf16", "tpu-v5e", "fsdp=256", 1024, 2048),
    "MaxText, v5p, 4 rows a chip": Row(
        "maxtext_32b_bf16", "tpu-v5p", "fsdp=64", 256, 2048, "--model.remat dots"
    ),
}  # fmt: skip
PAPER = [
    Row("gpt_1b3_bf16", "h100", "fsdp=8", 16, 2048),
    Row("gpt_1b3_bf16", "tpu-v5e", "fsdp=16", 32, 2048),
    Row("gpt_1b3_bf16", "h100", "data=1024,fsdp=8", 16384, 2048),
    Row("gpt_7b_bf16", "h100", "fsdp=8", 64, 4096),
    Row("gpt_7b_bf16", "tpu-v5e", "fsdp=64", 64, 4096),
    Row("gpt_7b_bf16", "tpu-v5p", "fsdp=64", 256, 4096),
    Row("gpt_7b_bf16", "h100", "data=1024,fsdp=8", 8192, 4096),
    Row("gpt_70b_bf16", "h100", "fsdp=64", 128, 4096),
    Row("gpt_70b_bf16", "tpu-v5e", "fsdp=256", 256, 4096),
    Row("gpt_70b_bf16", "tpu-v5p", "fsdp=64", 128, 4096),
    Row("gpt_70b_bf16", "h100", "data=128,fsdp=64", 8192, 4096),
    Row("gpt_70b_bf16", "h100", "fsdp=8192", 8192, 4096),
    Row("gpt_70b_bf16", "tpu-v5p", "data=64,fsdp=64", 4096, 4096),
]


def rows() -> list[Row]:
    """Return all rows, each once."""
    return list(dict.fromkeys([*COLLECTIVES.values(), *PUBLISHED.values(), *PAPER]))


def plan(row: Row) -> dict[str, Any]:
    """Return the plan of a row as JSON values, and the seconds that it took; what it said if it failed."""
    path = os.pathsep.join(
        [str(HERE.parent), str(HERE.parent / ".plan"), os.environ.get("PYTHONPATH", "")]
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "jmp_train", *row.command.split(), "--output", str(file)]
        done = subprocess.run(
            command,
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"failed": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}
        found = json.loads(file.read_text(encoding="utf-8"))
    return {
        **found,
        "tokens": row.batch_size * row.length,
        "took_s": round(time.perf_counter() - began),
    }


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the pages by name, from plans by command."""
    return {
        "collectives": _collectives({key: found[row.command] for key, row in COLLECTIVES.items()}),
        "published": _published({key: found[row.command] for key, row in PUBLISHED.items()}),
        "paper": _paper([found[row.command] for row in PAPER]),
        "hosts": _between_hosts([found[row.command] for row in PAPER]),
    }


def _collectives(plans: Mapping[tuple[str, str], Any]) -> str:
    """Return the collectives of a step for each mesh, those of both reduction dtypes beside each other."""
    lines = [
        "| mesh | collective | dtype | devices | `bfloat16`: times | MB | `float32`: times | MB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mesh in dict.fromkeys(mesh for mesh, _ in plans):
        cells: dict[Any, dict[str, Any]] = {}
        for dtype in ("bfloat16", "float32"):
            for c in plans[mesh, dtype]["collectives"]:
                cells.setdefault((c["kind"], c["dtype"], c["devices"]), {})[dtype] = c
        for (kind, dtype, devices), each in cells.items():
            texts = [
                f"{each[d]['count']} | {each[d]['bytes'] / 1e6:,.2f}" if d in each else "- | -"
                for d in ("bfloat16", "float32")
            ]
            lines.append(f"| `{mesh}` | {kind} | {dtype} | {devices} | {texts[0]} | {texts[1]} |")
        sent = [
            sum(c["sent"] for c in plans[mesh, d]["collectives"]) for d in ("bfloat16", "float32")
        ]
        texts = [f" | {total / 1e6:,.2f}" for total in sent]
        lines.append(f"| `{mesh}` | sent by each device | | | {texts[0]} | {texts[1]} |")
    return "\n".join(lines)


def _published(plans: Mapping[str, Any]) -> str:
    """Return what is planned for published set-ups."""
    lines = [
        "| set-up | parameters, M | GB a device | products, s | memory, s | links, s | tokens a second and device at most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, plan in plans.items():
        fits = "" if plan["fits"] else ", does not fit"
        lines.append(
            f"| {name} | {plan['parameters'] / 1e6:,.0f} | {plan['peak'] / 1e9:.2f}{fits} | "
            f"{_times(plan, 1, 3)} | {_rate(plan, _devices(plan))} |"
        )
    return "\n".join(lines)


def _paper(plans: list[Any]) -> str:
    """Return memory and bounds of the presets."""
    lines = [
        "| preset | devices | mesh | tokens a step | GiB of | products, ms | memory, ms | links, ms | tokens a second at most |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for plan in plans:
        fits = "" if plan["fits"] else ", does not fit"
        room = f"{plan['peak'] / 2**30:.1f} of {plan['device_memory'] / 2**30:.1f}{fits}"
        lines.append(
            f"| `{plan['experiment']}` | {_devices(plan):,} x {plan['device']} | `{plan['mesh']}` | "
            f"{plan['tokens']:,} | {room} | {_times(plan, 1000, 1)} | {_rate(plan)} |"
        )
    return "\n".join(lines)


def _times(plan: Mapping[str, Any], unit: int, digits: int) -> str:
    """Return the bounds of a step as cells; of memory, where the program tells what it moves."""
    seconds = plan["seconds"]
    cells = {name: f"{unit * value:,.{digits}f}" for name, value in seconds.items()}
    if not cells or plan["device"].startswith("tpu"):
        cells["memory"] = "-"
    return " | ".join(cells.get(name, "-") for name in ("products", "memory", "links"))


def _rate(plan: Mapping[str, Any], devices: int = 1) -> str:
    """Return the tokens a second that products and links allow."""
    if not plan["seconds"]:
        return "-"
    slowest = max(plan["seconds"]["products"], plan["seconds"].get("links", 0))
    return f"{plan['tokens'] / devices / slowest:,.0f}"


def _between_hosts(plans: list[Any]) -> str:
    """Return what the plans of many hosts send, and over how many hosts; a slice of TPUs has no network."""
    lines = [
        "| preset | mesh | collective | dtype | devices | hosts | times | GB sent by each device |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for plan in plans:
        for c in plan.get("collectives", ()) if _devices(plan) > 1000 else ():
            if c["sent"] > 1e8:
                lines.append(
                    f"| `{plan['experiment']}` | `{plan['mesh']}` | {c['kind']} | {c['dtype']} | {c['devices']:,} | "
                    f"{'-' if plan['device'].startswith('tpu') else format(c['hosts'], ',')} | {c['count']} | {c['sent'] / 1e9:,.2f} |"
                )
    return "\n".join(lines)


def _devices(plan: Mapping[str, Any]) -> int:
    return math.prod(int(part.partition("=")[2]) for part in plan["mesh"].split(","))


def main() -> None:
    """Makes the plans that are missing, and keeps each as it is made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="print the tables of the pages")
    parser.add_argument("--only", default="", help="compile rows whose command has this text alone")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(FILE.read_text())["rows"] if FILE.exists() else {}
    if options.tables:
        for name, table in tables(found).items():
            print(f"{name}\n\n{table}\n")
        return
    for row in rows():
        if row.command in found or options.only not in row.command:
            continue
        made = plan(row)
        said = (
            made.get("failed")
            or f"{made['took_s']} s, {'fits' if made['fits'] else 'does not fit'}"
        )
        print(f"{row.command}: {said}", flush=True)
        if "failed" not in made:
            found[row.command] = made
            keep("plans", found)


if __name__ == "__main__":
    main()
