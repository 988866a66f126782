"""The scripts of deploy/: their syntax, their manifest, the options that they give, and when they start again."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_experiment
from jmp_train.cli.train import TrainArguments
from jmp_train.config.find import find_experiment

DEPLOY = Path(__file__).parents[1] / "deploy"
# Of JobSet's API, v1alpha2: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
JOBSET = {"failurePolicy", "managedBy", "network", "replicatedJobs", "startupPolicy", "successPolicy",
          "suspend", "ttlSecondsAfterFinished", "coordinator"}  # fmt: skip
REPLICATED_JOB = {"name", "groupName", "replicas", "template", "dependsOn"}


def parsed(words):
    """Return the arguments of `jmp-train train`, which ends with a status for wrong ones."""
    name, options = take_experiment(words, "train")
    return parse(TrainArguments, TrainArguments(find_experiment(name)), options, "train")


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu-pod.sh"])
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--shell=bash", DEPLOY / script], check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_job_of_the_manifest_is_valid():
    (manifest,) = yaml.safe_load_all((DEPLOY / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["spec"].keys() <= JOBSET
    assert manifest["spec"]["failurePolicy"].keys() <= {"maxRestarts", "rules", "restartStrategy"}
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job.keys() <= REPLICATED_JOB
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
    kubernetes_validate.validate({**whole, **job["template"]}, "1.30", strict=True)
    wrong = {**whole, "spec": {**job["template"]["spec"], "paralelism": 4}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


def test_the_pods_of_the_manifest_meet():
    manifest = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert words[:2] == ["jmp-train", "train"]
    index = {"$(JOB_COMPLETION_INDEX)": "1"}
    given = parsed([w.replace(*pair) for w in words[2:] for pair in index.items()])
    assert (given.processes, given.process) == (spec["completions"], 1)
    # The first pod of the first job: JobSet's name of its host, in the service of the set.
    host, _, port = given.coordinator.partition(":")
    name = manifest["metadata"]["name"]
    assert host == f"{name}-{job['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    devices = spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    sizes = dict(part.split("=") for part in given.experiment.mesh.split(","))
    assert devices == int(sizes["data"]) * int(sizes["fsdp"])
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(str(given.run_dir).startswith(mount) for mount in mounts)


def run_with(tmp_path, script, words, **tools):
    """Run a script with stand-ins for the programs that it calls; return its status and their calls."""
    log = tmp_path / "calls"
    log.touch()
    for name, body in tools.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> {shlex.quote(str(log))}\n{body}\n'
        )
        tool.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", DEPLOY / script, *words], env=environment, cwd=tmp_path,
                          check=False, capture_output=True, text=True, timeout=60)  # fmt: skip
    return done.returncode, log.read_text().splitlines(), done.stderr


@pytest.mark.parametrize(
    "status,again",
    [(0, False), (2, False), (3, False), (4, False), (5, True), (138, True), (143, True)],
)
def test_a_slurm_job_queues_itself_again_after_a_signal_or_a_loss(tmp_path, status, again):
    found, calls, _ = run_with(
        tmp_path,
        "slurm.sbatch",
        ["mlp_bf16", "--steps", "7"],
        srun=f"exit {status}",
        scontrol="true",
    )
    assert found == status
    assert calls[1:] == (["scontrol requeue 77"] if again else [])
    words = shlex.split(calls[0])
    assert words[words.index("jmp-train") + 1] == "train"
    given = parsed(words[words.index("train") + 1 :])
    assert given.experiment.steps == 7 and given.run_dir.name == "job-77"


@pytest.mark.parametrize("status,attempts", [(0, 1), (2, 1), (3, 1), (4, 1), (5, 20), (143, 20)])
def test_a_pod_starts_again_after_a_loss(tmp_path, status, attempts):
    words = ["my-tpu", "us-central2-b", "/mnt/runs/a b", "mlp_bf16", "--steps", "7"]
    found, calls, err = run_with(
        tmp_path, "tpu-pod.sh", words, gcloud=f"exit {status}", sleep="true"
    )
    gcloud = [call for call in calls if call.startswith("gcloud")]
    assert len(gcloud) == attempts
    assert found == (status if attempts == 1 else 1), err
    assert "--worker=all" in gcloud[0]
    command = shlex.split(gcloud[0].partition("--command=")[2])
    given = parsed(command[2:])
    assert given.experiment.steps == 7 and str(given.run_dir) == "/mnt/runs/a b"


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu-pod.sh"])
def test_a_script_without_arguments_says_how_it_is_used(tmp_path, script):
    status, calls, err = run_with(tmp_path, script, [], srun="true", gcloud="true")
    assert status == 2 and calls == [] and err.startswith("usage:")
