#!/bin/bash
#SBATCH --job-name=p2pfl
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --output=p2pfl-%j.log
#
# One peer for each task:  sbatch --ntasks=16 slurm.sh EXPERIMENT.toml
#
# p2pfl must be on the PATH, and the folder the job is sent from on a file system that all
# nodes share. Every job makes keys of its own. One that is queued again goes on where it was.
set -euo pipefail
umask 077

experiment=${1:?usage: sbatch slurm.sh EXPERIMENT.toml}
run=$PWD/runs/slurm-$SLURM_JOB_ID
# Two jobs on one machine should not meet; Slurm does not hand out ports.
port=$((10000 + SLURM_JOB_ID % 200 * 100))
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
mkdir -p "$run/keys"

# Every task makes a key, and says who and where it is.
# shellcheck disable=SC2016 # the tasks know their own numbers
srun bash -c '
  own=$1/keys/$SLURM_PROCID.toml
  p2pfl keys new --if-missing --keys "$own" >/dev/null &&
    key=$(p2pfl keys show --keys "$own") &&
    echo "$SLURM_PROCID $(hostname) $(($2 + SLURM_LOCALID)) $key"
' task "$run" "$port" >"$run/members"

while read -r id host at key; do
  printf '[[peers]]\nid = %d\naddress = "tcp://%s:%d"\nkey = "%s"\n\n' "$id" "$host" "$at" "$key"
done < <(sort -n "$run/members") >"$run/peers.toml"

# A peer that fails must not take the others with it, nor one that is done early.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --wait=0 bash -c '
  exec p2pfl peer "$3" --set nodes="$SLURM_NTASKS" --id "$SLURM_PROCID" \
    --bind "tcp://0.0.0.0:$(($2 + SLURM_LOCALID))" --threads "$SLURM_CPUS_PER_TASK" \
    --peers "$1/peers.toml" --keys "$1/keys/$SLURM_PROCID.toml" \
    --out "$1/peers/$(printf %03d "$SLURM_PROCID")" --resume
' task "$run" "$port" "$experiment"
