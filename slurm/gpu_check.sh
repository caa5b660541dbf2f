#!/usr/bin/env bash
# Measures this project on a node with GPUs (benchmarks/gpu_check.py), as one report. In the folder of the clone:
#   sbatch slurm/gpu_check.sh --full
#   OUT=/scratch/me/gpu FAST_DIT=/src/fast-DiT DIT=/src/DiT sbatch slurm/gpu_check.sh
# At its time limit, and when it is preempted, it is requeued, and does the stages that are missing. Nothing is downloaded.
#SBATCH --job-name=gpu_check
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
# Not the folder of this file: Slurm runs a copy of it.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[ -r slurm/env.sh ] || { echo "error: no slurm/env.sh in $PWD; type sbatch in the clone's folder" >&2; exit 2; }
. slurm/env.sh

OUT=${OUT:-runs/gpu}
peers=(${DIT:+--dit "$DIT"} ${FAST_DIT:+--fast-dit "$FAST_DIT"})

# shellcheck disable=SC2317,SC2329  # leave calls it
again() { [[ $1 -eq 75 || $1 -eq 138 || $1 -eq 143 ]]; }
run_ranks --ntasks=1 "${python[@]}" benchmarks/gpu_check.py --out "$OUT" "${peers[@]}" "$@"
leave $?
