#!/usr/bin/env bash
# DiT-L/2 on ImageNet 256x256 for 2M steps: sbatch slurm/dit_l2_2m.sh
# Edit the #SBATCH lines for your cluster; every other setting is a variable with a default, for example
#   RUN=/scratch/me/dit_l2 DATA=/scratch/me/imagenet256 sbatch slurm/dit_l2_2m.sh --optimizer.lr 2e-4
# Before its time limit, and when it is preempted, the run saves and leaves with status 75; this script then requeues itself,
# and the same command resumes with the curriculum index intact.
#SBATCH --job-name=dit_l2_2m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
RUN=${RUN:-runs/dit_l2_imagenet256}
DATA=${DATA:-data/imagenet256}
PYTHON=${PYTHON:-.venv/bin/python}

# The first host of the job: localhost would be another machine for all tasks of the other nodes.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Slurm sends TERM to this shell too; it stays, to see what the run says. In the background and waited for, or the trap would
# be held back until srun ends.
trap : TERM
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "$PYTHON" -m largescale.train dit_l2_imagenet256 --output "$RUN" --data.path "$DATA" "$@" &
wait $!
status=$?
while kill -0 $! 2>/dev/null; do wait $!; status=$?; done

if [ "$status" -eq 75 ]; then
    # "Job is pending execution": Slurm has requeued it already.
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$status"
