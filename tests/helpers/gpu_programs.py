"""Runs on the CPU what XLA makes of programs for an H100 that is not here: `pytest -p tests.helpers.gpu_programs`.

Each program of one device is compiled for the GPU, the optimised program is read as text, its fusions are
made calls, and the CPU's compiler makes it executable: the GPU's dtypes, casts that are left out, fused
operations and kinds of products, in another order of sums. What calls a library (cuBLAS, cuDNN) or the
host cannot be run so, and runs as on any CPU; `COUNTS` says how many. Where a transfer to the host is
disallowed, texts and numbers of arrays raise the error that they raise on a GPU.
"""

import collections
import contextlib
import functools
import json
import os
import re
from unittest import mock

import jax
import numpy as np
import pytest
from jax._src import compiler, stages
from jax._src.array import ArrayImpl
from jaxlib import _hlo, _jax, xla_client
from jaxlib._jax import guard_lib

from jmp_train.plan.compiled import devices_of
from jmp_train.plan.devices import DEVICES
from jmp_train.plan.program import Instruction

COUNTS = collections.Counter()
_PATCHES = pytest.StashKey()
_TEXTS = {}  # by executable, which is kept so that no other has its id

_DEFINITION = re.compile(
    r"^\s*(?P<root>ROOT )?(?P<name>%[\w.-]+) = (?P<dtype>\w+)\[(?P<shape>[\d,]*)\]"
    r"(?:\{(?P<layout>[\d,]*)[^}]*\})? (?P<operation>[\w-]+)\((?P<operands>[^)]*)"
)
_TUPLE_OF_ONE = r"\(\w+\[[\d,]*\](?:\{[^{}]*\})?\)"


@contextlib.contextmanager
def programs_of_a_gpu():
    """Compile programs for a GPU and run them on the CPU; `as_text` of a program is that of the GPU."""
    with (
        mock.patch.object(compiler, "backend_compile_and_load", _compile),
        mock.patch.object(stages.Compiled, "as_text", _as_text),
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(ArrayImpl, "_value", property(_value)),
    ):
        yield


_on_cpu = compiler.backend_compile_and_load
_own_text = stages.Compiled.as_text
_own_value = ArrayImpl._value
_gpu = functools.cache(lambda: devices_of(DEVICES["h100"], 1)[0])


def _compile(backend, module, devices, options, host_callbacks):
    if options.num_replicas * options.num_partitions > 1 or host_callbacks:
        COUNTS["several devices or callbacks"] += 1
        return _on_cpu(backend, module, devices, options, host_callbacks)
    gpu_options = xla_client.CompileOptions.ParseFromString(options.SerializeAsString())
    places = np.array([[_gpu().id]], np.int32)
    gpu_options.device_assignment = xla_client.DeviceAssignment.create(places)
    try:
        program = _gpu().client.compile(
            module,
            executable_devices=xla_client.DeviceList((_gpu(),)),
            compile_options=gpu_options,
        )
    except jax.errors.JaxRuntimeError:  # of LAPACK, which a GPU's program does not have
        COUNTS["not for a GPU"] += 1
        return _on_cpu(backend, module, devices, options, host_callbacks)
    whole = _hlo.HloPrintOptions()
    whole.print_large_constants = True
    text = program.hlo_modules()[0].to_string(whole)
    if "custom-call(" in text:
        COUNTS["of a library"] += 1
        executable = _on_cpu(backend, module, devices, options, host_callbacks)
    else:
        COUNTS["run"] += 1
        proto = _hlo.hlo_module_from_text(_for_cpu(text)).as_serialized_hlo_module_proto()
        again = _jax.mlir.xla_computation_to_mlir_module(_hlo.XlaComputation(proto))
        executable = backend.compile_and_load(
            again, executable_devices=devices, compile_options=options
        )
    _TEXTS[id(executable)] = executable, text
    return executable


def _as_text(self):
    executable = self._executable.xla_executable
    return _TEXTS[id(executable)][1] if id(executable) in _TEXTS else _own_text(self)


def _value(self):
    """Return what the host has of an array; on a GPU, it has nothing before the first read."""
    if self._npy_value is None:
        level = jax.config.jax_transfer_guard_device_to_host
        if level == "disallow" and not guard_lib.thread_local_state().explicit_device_get:
            raise jax.errors.JaxRuntimeError("Disallowed device-to-host transfer")
        self._npy_value = np.array(_own_value.fget(self))
        self._npy_value.flags.writeable = False
    return self._npy_value


def _for_cpu(text):
    """Return a GPU's program without what a CPU's compiler does not take, and without layouts."""
    text = re.sub(r", entry_computation_layout=\{.*?\)->.*?\}(?=, \w+=|\n)", "", text, count=1)
    text = text.replace("is_scheduled=true", "is_scheduled=false")
    text = re.sub(
        r", (?:backend_config=\{.*\}|metadata=\{[^{}]*\})(?=, |$)", "", text, flags=re.MULTILINE
    )
    # A fusion on another stream, from jaxlib 0.11 on: its start has the shapes of operands and result.
    text = re.sub(
        r"= (\(.*\)) (fusion-start)\(",
        lambda found: f"= {Instruction('', *found.groups(), '').result} fusion(",
        text,
    )
    text = text.replace(" fusion-done(", " copy(")
    text = re.sub(r" fusion\((.*?)\), kind=k\w+,.*? calls=", r" call(\1), to_apply=", text)
    text = re.sub(r"(?<=[({ ])-0(?=[,)} ])", "-0.0", text)  # else read as the integer 0
    text = _without_tuples_of_one(_without_bitcasts(text))
    return re.sub(r"\]\{[\d,]*(?::[^{}]*)?\}", "]", text)


def _without_tuples_of_one(text):
    """Replace tuples of one array by the array: a call that returns one is not read back."""
    names = "|".join(map(re.escape, re.findall(rf"(%[\w.-]+) = {_TUPLE_OF_ONE} ", text)))
    if names:
        text = re.sub(rf" get-tuple-element\(({names})\), index=0", r" copy(\1)", text)
    text = re.sub(
        rf"(= |-> |: ){_TUPLE_OF_ONE}",
        lambda found: found[1] + found[0].split("(", 1)[1][:-1],
        text,
    )
    return re.sub(r" tuple\((%[\w.-]+)\)", r" copy(\1)", text)


def _without_bitcasts(text):
    """Replace `bitcast`, which reads bytes in another shape, by operations that know no layout."""
    lines, arrays = [], {}
    for line in text.splitlines():
        found = _DEFINITION.match(line)
        if found:
            numbers = [
                [int(n) for n in (found[k] or "").split(",") if n] for k in ("shape", "layout")
            ]
            arrays[found["name"]] = found["dtype"], *numbers
        if not found or found["operation"] != "bitcast":
            lines.append(line)
            continue
        name, operand = found["name"], found["operands"].split(" ")[-1]
        dtype, shape, layout = arrays[name]
        dtype_before, shape_before, layout_before = arrays[operand]
        if dtype_before != dtype:
            lines.append(f"{name}.c = {_shape(dtype, shape_before)} bitcast-convert({operand})")
            operand = f"{name}.c"
        slowest, slowest_before = layout[::-1], layout_before[::-1]
        in_memory = [shape_before[i] for i in slowest_before]
        lines.append(_transpose(f"{name}.t", dtype, in_memory, operand, slowest_before))
        in_memory = _shape(dtype, [shape[i] for i in slowest])
        lines.append(f"{name}.r = {in_memory} reshape({name}.t)")
        back = list(np.argsort(slowest)) if slowest else []
        lines.append((found["root"] or "") + _transpose(name, dtype, shape, f"{name}.r", back))
    return "\n".join(lines)


def _shape(dtype, shape):
    return f"{dtype}[{','.join(map(str, shape))}]"


def _transpose(name, dtype, shape, operand, order):
    order = ",".join(map(str, order))
    return f"{name} = {_shape(dtype, shape)} transpose({operand}), dimensions={{{order}}}"


def pytest_configure(config):
    config.stash[_PATCHES] = contextlib.ExitStack()
    config.stash[_PATCHES].enter_context(programs_of_a_gpu())


def pytest_unconfigure(config):
    config.stash[_PATCHES].close()
    if file := os.environ.get("COUNTS_OF_PROGRAMS"):
        with open(file, "w") as out:
            json.dump(COUNTS, out)
