#!/usr/bin/env bash
# Trains an experiment on all hosts of a Cloud TPU pod slice, and starts again after a pre-emption:
#
#   deploy/tpu-pod.sh my-tpu us-central2-b /mnt/bucket/runs/gpt gpt_1b3_bf16 --mesh fsdp=-1
#
# The hosts find each other. Each must have jmp-train[tpu] installed, and the folder of the run mounted.
set -uo pipefail

if [[ $# -lt 4 ]]; then
  echo "usage: deploy/tpu-pod.sh TPU ZONE RUN_DIR EXPERIMENT [OPTIONS]" >&2
  exit 2
fi
tpu=$1 zone=$2 run_dir=$3
shift 3
command="jmp-train train $(printf '%q ' "$@") --run-dir $(printf '%q' "$run_dir")"

for attempt in {1..20}; do
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$command" && exit 0
  status=$?
  if [[ $status -eq 2 || $status -eq 3 || $status -eq 4 ]]; then
    exit "$status" # wrong options, divergence or no usable checkpoint: the same would happen again
  fi
  echo "attempt $attempt ended with status $status; the run resumes in 60 s" >&2
  sleep 60
done
exit 1
