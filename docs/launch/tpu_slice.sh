#!/usr/bin/env bash
# A run on a Cloud TPU slice, one process per host; JAX finds the hosts by itself:
#
#     docs/launch/tpu_slice.sh NAME ZONE configs/quickstart.yaml gs://BUCKET/runs/tpu
#
# The same command again continues a run that was stopped. NAME is a TPU VM of any size, made for instance by
#     gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite
set -euo pipefail
name="$1" zone="$2" config="$3" run="$4"

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"; }

gcloud compute tpus tpu-vm scp --recurse --zone "$zone" --worker=all . "$name":lmobj
on_all_hosts "cd lmobj && python3 -m venv ~/venv && ~/venv/bin/pip install -q '.[tpu,gcs]'"

if gcloud storage ls "$run/config.yaml" >/dev/null 2>&1; then
  command="resume '$run'"
else
  command="train '$config' run='$run'"
fi
on_all_hosts "cd lmobj && ~/venv/bin/lmobj $command --distributed"
