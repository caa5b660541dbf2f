#!/usr/bin/env bash
# Packs COCO with its captions. In the folder of the clone:
#   IMAGES=/datasets/coco/train2014 CAPTIONS=/datasets/coco/captions_train2014.json sbatch slurm/pack_coco.sh
# Before its time limit, and when it is preempted, it leaves and is requeued; packing goes on where it was.
# Where compute nodes have no network, VAE and TEXT_ENCODER are folders (hf:/models/clip-vit-large-patch14).
#SBATCH --job-name=pack_coco
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

IMAGES=${IMAGES:-train2014}
CAPTIONS=${CAPTIONS:-annotations/captions_train2014.json}
VAE=${VAE:-stabilityai/sd-vae-ft-ema}
TEXT_ENCODER=${TEXT_ENCODER:-open_clip:ViT-L-14/openai}
OUT=${OUT:-data/coco256}

pack coco --images "$IMAGES" --captions "$CAPTIONS" --vae "$VAE" --text-encoder "$TEXT_ENCODER" --out "$OUT" \
    --device cuda "$@"
