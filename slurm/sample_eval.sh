#!/usr/bin/env bash
# Draws 50,000 samples of a run's newest checkpoint and scores them. In the folder of the clone:
#   RUN=runs/dit_l2_imagenet256 REFERENCE=VIRTUAL_imagenet256_labeled.npz CFG_SCALE="1.0 1.5" sbatch slurm/sample_eval.sh
# Options after the script's name go to eval.sample (--step for another checkpoint); those of eval.score are in SCORE,
# separated by blanks, which no value may hold:
#   SCORE='--extractor inception --inception-weights /models/weights-inception-2015-12-05-6726825d.pth'
# Before its time limit, and when it is preempted, it leaves and is requeued; drawing goes on where it was, with the
# checkpoint that it began with.
#SBATCH --job-name=sample_eval
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

RUN=${RUN:-runs/dit_l2_imagenet256}
REFERENCE=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}
OUT=${OUT:-$RUN/eval}
NUM_SAMPLES=${NUM_SAMPLES:-50000}
read -r -d '' -a scales <<<"${CFG_SCALE:-1.5}"
read -r -d '' -a score <<<"${SCORE:-}"
mapfile -t sets < <(alone -c 'import sys; [print(f"{sys.argv[1]}/cfg{float(s)}") for s in sys.argv[2:]]' "$OUT" "${scales[@]}")

draw sample "$RUN" --out "$OUT" --num-samples "$NUM_SAMPLES" --cfg-scale "${scales[@]}" "$@"
status=$?
if [ $status -eq 0 ]; then
    # One process on one GPU: features of 50,000 images are a matter of minutes.
    run_ranks --ntasks=1 "${python[@]}" -m eval.score "${sets[@]}" --reference "$REFERENCE" "${score[@]}"
    status=$?
fi
leave $status
