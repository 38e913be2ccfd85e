#!/usr/bin/env bash
# A run on 2 nodes of 8 GPUs each, one process per GPU:
#
#     sbatch docs/launch/slurm.sh configs/quickstart.yaml runs/slurm
#
# Two minutes before its time is over the job saves, requeues itself, and goes on from there.
#SBATCH --job-name=lmobj
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lmobj-%j.out
set -euo pipefail
config="$1" run="$2"  # the run folder must be on a file system that all nodes share

if [ -d "$run" ]; then command=(resume "$run"); else command=(train "$config" "run=$run"); fi
code=0
srun --kill-on-bad-exit=0 lmobj "${command[@]}" --distributed || code=$?

if [ "$code" -eq 143 ]; then  # stopped by SIGTERM and saved
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
