"""A plan as text."""

from __future__ import annotations

from jmp_train.plan.devices import GIB
from jmp_train.plan.plan import SPARE, Plan
from jmp_train.types import Json


def report(plan: Plan) -> str:
    """Return a plan as a table of lines, the most important first."""
    found, device = plan.found, plan.device
    count = plan.mesh.data * plan.mesh.fsdp * plan.mesh.tensor
    lines = [_verdict(plan), "", f"memory per device, GiB of {device.memory / GIB:.1f}"]
    rows = _memory(found)
    lines += [f"  {name:<22}{value / GIB:>9.2f}" for name, value in rows]
    if found.get("peak") is not None:
        lines.append(f"  {'in all':<22}{found['peak'] / GIB:>9.2f}")
    lines += ["", f"operations of a step, {found['flops'] / 1e12:,.4g} TFLOP"]
    total = sum(found["products"].values())
    lines += [
        f"  {'products in ' + dtype:<22}{n / total:>9.1%}"
        for dtype, n in sorted(found["products"].items(), key=lambda pair: -pair[1])
    ]
    if found.get("collectives"):
        lines += ["", "collectives of a step", f"  {'kind':<20}{'dtype':<7}{'devices':>8}{'times':>7}{'MB':>12}{'MB sent':>12}"]  # fmt: skip
        lines += [
            f"  {c['kind']:<20}{c['dtype']:<7}{c['devices']:>8}{c['count']:>7}{c['bytes'] / 1e6:>12,.2f}"
            f"{c['sent'] / 1e6:>12,.2f}{_between_hosts(c)}"
            for c in found["collectives"]
        ]
    if found.get("unread"):
        lines += [
            "",
            f"collectives of a step: not known, for the program cannot be read: {found['unread']}",
        ]
    if plan.times:
        lines += ["", "time of a step, if one of them alone limits it"]
        what = {"products": _rates(plan), "memory": f"{device.bandwidth / 1e12:.3g} TB/s",
                "links": _links(plan)}  # fmt: skip
        for name, seconds in plan.times.items():
            if name != "links" or count > 1:
                lines.append(f"  {name:<22}{seconds * 1e3:>9,.3f} ms at {what[name]}")
    lines += ["", f"{device.name}: {device.source}"]
    lines.append(
        "The program is that of XLA for the device, compiled here; the times are bounds from the datasheet, "
        "which no program reaches."
    )
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    found, count = plan.found, plan.mesh.data * plan.mesh.fsdp * plan.mesh.tensor
    on = f"{plan.device.name}" if count == 1 else f"{count} x {plan.device.name}, mesh {plan.mesh}"
    head = f"{plan.name} on {on}: {found['parameters'] / 1e6:,.4g} M parameters"
    if plan.fits:
        name, seconds = max(plan.times.items(), key=lambda pair: pair[1])
        return f"{head}; fits\nlongest bound of a step: {name}, {seconds * 1e3:,.3f} ms"
    peak = found.get("peak")
    needs = "more than it has" if peak is None else f"{(peak + SPARE) / GIB:.2f} GiB"
    line = f"{head}; does not fit: it needs {needs} of {plan.device.memory / GIB:.2f}"
    if plan.change:
        return f"{line}\nfits with {plan.change}"
    return f"{line}\nnone of the changes that were tried makes it fit; expected more devices"


def _memory(found: Json) -> list[tuple[str, float]]:
    given = found["arguments"]
    rows = [
        ("parameters", given["parameters"]),
        ("optimizer state", given["optimizer"]),
        ("moving average", given["average"]),
        ("other state, batch", given["other state"] + given["batch"]),
    ]
    if "temporary_bytes" in found:
        # What the backward pass needs is a part of the temporaries, and so are gradients.
        temporary = found["temporary_bytes"]
        kept = min(found["activations"], temporary)
        gradients = min(found["gradients"], temporary - kept)
        rows += [
            ("activations kept", kept),
            ("gradients", gradients),
            ("other temporaries", temporary - kept - gradients),
        ]
    else:
        rows += [("activations kept", found["activations"]), ("gradients", found["gradients"])]
    return [(name, value) for name, value in rows if value]


def _rates(plan: Plan) -> str:
    rates = {
        d: plan.device.flops.get(d, plan.device.flops["float32"]) for d in plan.found["products"]
    }
    return ", ".join(f"{rate / 1e12:,.4g} TFLOP/s in {dtype}" for dtype, rate in rates.items())


def _between_hosts(collective: Json) -> str:
    hosts = collective.get("hosts", 1)
    return f"  on {hosts:,} hosts" if hosts > 1 else ""


def _links(plan: Plan) -> str:
    device = plan.device
    text = f"{device.link / 1e9:.4g} GB/s each way"
    if any(_between_hosts(c) for c in plan.found["collectives"] or ()):
        text += f", {device.network / 1e9:.4g} GB/s of each device between hosts"
    return text
