#!/usr/bin/env bash
# The difficulty study as an array job: each task trains the model of one interval of noise levels, task 0 the full one.
# In the folder of the clone:
#   STUDY=paper DATA=/scratch/me/ffhq256 sbatch slurm/difficulty.sh
# then, with the same settings and the id of the job before, what is drawn with each model, and the report:
#   STAGES=denoise sbatch --dependency=afterok:JOB slurm/difficulty.sh --reference VIRTUAL_ffhq256.npz --vae DIR
#   STAGES="entropy report" sbatch --array=0 --dependency=afterok:JOB slurm/difficulty.sh
# Options after the script's name go to eval.difficulty, and what stands after -- to the training. A model on four GPUs:
#   NPROC=4 sbatch --gpus-per-node=4 --cpus-per-task=32 slurm/difficulty.sh
# Before its time limit, and when it is preempted, a task saves and leaves, and is requeued; so is a crashed training,
# until MAX_RESTARTS starts in a row brought no new checkpoint. Run again, it leaves alone what is done.
#SBATCH --job-name=difficulty
#SBATCH --array=0-20
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -uo pipefail
# Not the folder of this file: Slurm runs a copy of it.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[ -r slurm/env.sh ] || { echo "error: no slurm/env.sh in $PWD; type sbatch in the clone's folder" >&2; exit 2; }
. slurm/env.sh
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { echo "error: no task of an array; give sbatch --array=0-20" >&2; exit 2; }

STUDY=${STUDY:-paper}
OUT=${OUT:-runs/difficulty/$STUDY}
read -r -d '' -a stages <<<"${STAGES:-train}"
data=(${DATA:+--data "$DATA"})

# The id of an array's last task is also that of the whole array: Slurm is asked about the task by its other name.
scontrol() { command scontrol "${@:1:$#-1}" "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; }

again() {
    if [ "${stages[0]}" = train ]; then
        worth_another_start "$OUT/interval_$(printf %02d "$SLURM_ARRAY_TASK_ID")" "$1"
    else
        [[ $1 -eq 75 || $1 -eq 138 || $1 -eq 143 ]]
    fi
}

run_ranks --kill-on-bad-exit=0 --wait=120 "${python[@]}" -m eval.difficulty "$STUDY" --out "$OUT" --stages "${stages[@]}" \
    --interval "$SLURM_ARRAY_TASK_ID" --nproc "${NPROC:-1}" "${data[@]}" "$@"
leave $?
