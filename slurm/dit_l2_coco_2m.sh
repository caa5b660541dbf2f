#!/usr/bin/env bash
# DiT-L/2 on COCO captions at 256x256 for 2M steps, text to image. In the folder of the clone:
#   sbatch slurm/dit_l2_coco_2m.sh
# Its settings, and how it stops and is requeued, are those of slurm/dit_l2_2m.sh.
#SBATCH --job-name=dit_l2_coco_2m
#SBATCH --nodes=2
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

RUN=${RUN:-runs/dit_l2_coco256}
DATA=${DATA:-data/coco256}

train dit_l2_coco256 --output "$RUN" --data.path "$DATA" "$@"
