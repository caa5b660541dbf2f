#!/usr/bin/env bash
# Packs ImageNet's training images. In the folder of the clone:
#   IMAGES=/datasets/ILSVRC2012/train sbatch slurm/pack_imagenet.sh
# Before its time limit, and when it is preempted, it leaves and is requeued; packing goes on where it was.
# Where compute nodes have no network, VAE is a folder.
#SBATCH --job-name=pack_imagenet
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

IMAGES=${IMAGES:-ILSVRC2012/train}
VAE=${VAE:-stabilityai/sd-vae-ft-ema}
OUT=${OUT:-data/imagenet256}

pack imagenet --images "$IMAGES" --vae "$VAE" --out "$OUT" --device cuda "$@"
