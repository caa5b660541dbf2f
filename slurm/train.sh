#!/usr/bin/env bash
# Trains any preset on a node of 8 GPUs, as the paper's rows are (docs/paper.md). In the folder of the clone:
#   PRESET=dit_b2_imagenet256 sbatch slurm/train.sh --train.ds-config ds_configs/zero2_fp32.json
#   PRESET=dit_b2_imagenet256 RUN=runs/vanilla DATA=/scratch/me/imagenet256 sbatch slurm/train.sh --curriculum.pacing none
# Options after the script's name go to largescale.train. How it stops and is requeued is that of slurm/dit_l2_2m.sh.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
# Not the folder of this file: Slurm runs a copy of it.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[ -r slurm/env.sh ] || { echo "error: no slurm/env.sh in $PWD; type sbatch in the clone's folder" >&2; exit 2; }
. slurm/env.sh
[ -n "${PRESET:-}" ] || { echo "error: no PRESET; give one: PRESET=dit_b2_imagenet256 sbatch slurm/train.sh" >&2; exit 2; }

RUN=${RUN:-runs/$PRESET}

train "$PRESET" --output "$RUN" ${DATA:+--data.path "$DATA"} "$@"
