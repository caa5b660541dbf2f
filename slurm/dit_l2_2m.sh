#!/usr/bin/env bash
# DiT-L/2 on ImageNet 256x256 for 2M steps. In the folder of the clone: sbatch slurm/dit_l2_2m.sh
# Edit the #SBATCH lines for your cluster; every other setting is a variable with a default, for example
#   RUN=/scratch/me/dit_l2 DATA=/scratch/me/imagenet256 sbatch slurm/dit_l2_2m.sh --optimizer.lr 2e-4
# Before its time limit, and when it is preempted, the run saves and leaves; the job is requeued, and resumes with the
# curriculum index intact. So it does after a crash, until MAX_RESTARTS starts in a row brought no new checkpoint.
# With --nodes=1-4 it takes the nodes that are free, and more of them at a later start.
#   scancel JOB            saves and ends the job
#   scancel -s USR1 JOB    saves and starts it again
#SBATCH --job-name=dit_l2_2m
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

RUN=${RUN:-runs/dit_l2_imagenet256}
DATA=${DATA:-data/imagenet256}

train dit_l2_imagenet256 --output "$RUN" --data.path "$DATA" "$@"
