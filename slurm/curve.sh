#!/usr/bin/env bash
# Scores every kept checkpoint of one or more runs, and draws their curves. In the folder of the clone:
#   RUNS="runs/vanilla runs/curriculum" REFERENCE=VIRTUAL_imagenet256_labeled.npz sbatch slurm/curve.sh
# Options after the script's name go to eval.curve. A checkpoint that is scored is not drawn again: after a preemption
# it goes on where it was, and run again later it adds what is new.
#SBATCH --job-name=curve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
# Not the folder of this file: Slurm runs a copy of it.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[ -r slurm/env.sh ] || { echo "error: no slurm/env.sh in $PWD; type sbatch in the clone's folder" >&2; exit 2; }
. slurm/env.sh

read -r -d '' -a runs <<<"${RUNS:-runs/dit_l2_imagenet256}"
REFERENCE=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}

draw curve "${runs[@]}" --reference "$REFERENCE" "$@"
leave $?
