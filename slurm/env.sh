# shellcheck shell=bash
# What the batch scripts of this folder share; each sources it. Every setting is a variable with a default, for example
#   PYTHON=/opt/largescale/bin/python MAX_RESTARTS=20 sbatch slurm/dit_l2_2m.sh

_stop() { echo "error: $1" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || _stop "this is a batch script; start it with sbatch"

# CONTAINER is an image for Python to run in (docs/containers.md). Its form decides which program starts it: Apptainer
# for a .sif and for a folder that Apptainer unpacked (it holds .singularity.d), Charliecloud for any other folder, pyxis
# for a .sqsh and for docker://IMAGE. PYTHON is then a path in the image. The working directory is mounted, and every
# folder that BIND lists: BIND=/scratch,/datasets. There is no shell between srun and Python that could die of a signal
# or change the exit status: Apptainer's process passes both on, the others are replaced by Python.
python=()  # what runs Python ...
pyxis=()   # ... and srun's options for that
if [ -z "${CONTAINER:-}" ]; then
    PYTHON=${PYTHON:-.venv/bin/python}
    command -v "$PYTHON" >/dev/null || _stop "no $PYTHON in $PWD; python3 install.py train makes .venv, PYTHON=/where/it/is names another"
else
    PYTHON=${PYTHON:-/opt/venv/bin/python}
    unset PYTHONPATH PYTHONHOME  # which clusters' modules point at packages of another Python
    binds=$PWD${BIND:+,$BIND}
    [[ $CONTAINER == docker://* || -e $CONTAINER ]] ||
        _stop "no CONTAINER=$CONTAINER in $PWD; it is a .sif, a .sqsh, a folder, or docker://IMAGE"
    [[ $CONTAINER == docker://* ]] || CONTAINER=$(realpath "$CONTAINER")
    if [[ $CONTAINER == docker://* || $CONTAINER == *.sqsh ]]; then
        [[ $(srun --help) == *--container-image* ]] || _stop "CONTAINER=$CONTAINER needs pyxis, which is not installed here"
        pyxis=("--container-image=${CONTAINER#docker://}" "--container-mounts=$binds" "--container-workdir=$PWD")
    else
        if [[ $CONTAINER == *.sif || -d $CONTAINER/.singularity.d ]]; then
            python=(apptainer exec --nv --bind "$binds" --pwd "$PWD" "$CONTAINER")
        elif [ -d "$CONTAINER" ]; then
            IFS=, read -r -a folders <<<"$binds"
            export USER=${USER:-$(id -un)}  # which ch-run asks for, and not every cluster sets
            python=(ch-run "${folders[@]/#/--bind=}" "--cd=$PWD" "$CONTAINER" --)
        else
            _stop "CONTAINER=$CONTAINER is neither a .sif, a .sqsh, a folder, nor docker://IMAGE"
        fi
        command -v "${python[0]}" >/dev/null ||
            _stop "CONTAINER=$CONTAINER needs ${python[0]}, which is not on PATH; load its module before sbatch"
    fi
fi
python+=("$PYTHON")

# alone ARGUMENT...: Python once, beside this shell; with pyxis as a step of the job.
alone() {
    local step=()
    [ ${#pyxis[@]} -eq 0 ] || step=(srun --overlap --nodes=1 --ntasks=1 "${pyxis[@]}")
    "${step[@]}" "${python[@]}" "$@"
}
# Checked at the first start only: if that one works, a later failure is a registry's or a node's, not a wrong setting.
[[ -z ${CONTAINER:-} || ${SLURM_RESTART_COUNT:-0} -gt 0 ]] || alone -c "" ||
    _stop "$PYTHON does not start in CONTAINER=$CONTAINER, see above"

# Where the ranks meet: the job's first host. localhost would be another machine for the tasks of every other node.
# The port follows from the job id, so that two jobs on one node differ; Linux does not hand it out by itself.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
export MASTER_ADDR MASTER_PORT

# srun says who is which rank. What another launcher left in the environment that sbatch was typed in would overrule it.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE

# Otherwise each of a node's ranks starts a thread for each of the node's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Compile workers of a rank: Inductor's default is one for each core of the node, for every rank.
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Neighbouring ranks share a socket, as neighbouring GPUs do. Slurm's default deals ranks out to the sockets in turn, so
# that half of them would be on the other side of the machine than their GPU.
export SLURM_DISTRIBUTION=${SLURM_DISTRIBUTION:-block:block}
# A rank that crashes outside Python says where Python was.
export PYTHONFAULTHANDLER=1

# WARN logs errors only. NCCL that finds no InfiniBand silently falls back to sockets: look
# once, with NCCL_DEBUG=INFO, for "Using network" (IB or Socket) and "GPU Direct RDMA Enabled".
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Two communicators work at once, gradients and the agreed vector: NCCL starts their kernels in the host's order.
export NCCL_LAUNCH_ORDER_IMPLICIT=${NCCL_LAUNCH_ORDER_IMPLICIT:-1}
# Which network the ranks find each other on is left to them. Where nodes have several, and a start hangs or ends with
# "connection refused" or "no route to host", name the one that joins the nodes (`ip -brief address` on two of them):
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# A rank that hangs ends the run after --train.timeout-s, with a line that says where each rank was. A collective of
# GPUs that fails, or outlasts that limit by a minute, ends its process, and each rank writes its last collectives: torchfrtrace FOLDER -p NAME-JOB-nccl_rank_
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID-nccl_rank_}

# train PRESET OPTION...: the run RUN, on as many of the job's tasks as the batch can be split over. If one rank dies, Slurm ends the others after two minutes: without --wait they
# would hang in a collective, and --kill-on-bad-exit would kill a rank that still saves.
# STAGE=/local/scratch is a folder on each node's own disk that the data are copied to first, and read from; with
# CONTAINER, BIND has to list it. What is copied stays for the next job: where no job needs it any more, delete it.
train() {
    again() { worth_another_start "$RUN" "$1"; }
    [ -z "${STAGE:-}" ] || set -- "$@" --data.stage "$STAGE"
    local per_node=${SLURM_NTASKS_PER_NODE:-} tasks=${SLURM_NTASKS:-1} ranks some=()
    [ -z "$per_node" ] || tasks=$((SLURM_JOB_NUM_NODES * per_node))
    ranks=$(alone -m largescale.train "$@" --fit-ranks "$tasks") || leave $?
    if [ "$ranks" -lt "$tasks" ]; then
        echo "training on $ranks ranks: the batch cannot be split over $tasks; $((tasks - ranks)) stay idle" >&2
        some=(--ntasks="$ranks")
        [ -z "$per_node" ] || some+=(--nodes=$(((ranks + per_node - 1) / per_node)))
    fi
    run_ranks --kill-on-bad-exit=0 --wait=120 "${some[@]}" "${python[@]}" -m largescale.train "$@"
    leave $?
}

# pack SOURCE OPTION...: data_prep.SOURCE. Ranks end when their parts are packed, hours apart. Few errors of packing go
# away by themselves: only a job that was asked to stop (75) is requeued.
pack() {
    again() { [ "$1" -eq 75 ]; }
    run_ranks --kill-on-bad-exit=0 --wait=0 "${python[@]}" -m "data_prep.$1" "${@:2}"
    leave $?
}

# draw PROGRAM OPTION...: eval.PROGRAM. A job that was asked to stop is requeued, also where the signal itself ended it
# (138 is USR1, 143 TERM; both happen before the handlers are set). The ranks coordinate only through files.
draw() {
    # shellcheck disable=SC2317,SC2329  # _requeue calls it
    again() { [[ $1 -eq 75 || $1 -eq 138 || $1 -eq 143 ]]; }
    run_ranks --kill-on-bad-exit=0 --wait=0 "${python[@]}" -m "eval.$1" "${@:2}"
}

# worth_another_start RUN STATUS: whether a run that ended with this status is requeued. Slurm starts no step of a job
# that is over its time limit, so pyxis cannot ask Python then: the starts are counted, with or without progress.
worth_another_start() {
    if [[ ${#pyxis[@]} -gt 0 && $_over_limit ]]; then
        [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-5}" ] || return
        echo "asking for another start: this one ran past its time limit" >&2
    else
        alone -m largescale.requeue "$1" --status "$2" --max-restarts "${MAX_RESTARTS:-5}"
    fi
}

# run_ranks SRUN_OPTION... PROGRAM...: a rank a task; the status that the program ends with, whatever signals come.
# Slurm signals the ranks itself, this shell has only to stay. srun is in the background and waited for, or bash would
# hold the trap back until it ends. CONT comes just before TERM and must not be trapped: bash then loses the other.
run_ranks() {
    trap _over TERM
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${pyxis[@]}" "$@" &
    local srun=$!
    while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
    wait "$srun"  # its own status, also where the last wait was ended by a signal
}

# leave STATUS: ends the script, and has Slurm start the job again if it should (`again STATUS`).
leave() {
    _requeue "$1"
    exit "$1"
}

# Slurm requeues by itself after a node's failure, after `scontrol requeue`, and after a preemption that outlasted its
# grace. A job that ends within the grace, before its time limit, or of itself, is over unless it asks, whatever its
# status. One that was cancelled must not ask: it would be requeued.
_requeue() {
    local _state="" _restarts="" _over_limit=""
    for _ in 1 2 3 4 5; do
        _read_job && break
        sleep 15
    done
    if [ -z "$_state" ]; then
        echo "job $SLURM_JOB_ID is not requeued, Slurm does not answer; sbatch again to continue" >&2
        return
    fi
    # Whatever ended the job, it is COMPLETING for as long as this shell stays.
    if [[ $_state == "COMPLETING "* ]]; then
        [[ $_restarts == "${SLURM_RESTART_COUNT:-0} "* ]] || return 0  # it is requeued already
        if [[ $_state != "COMPLETING Reason=TimeLimit "* ]]; then
            echo "job $SLURM_JOB_ID was cancelled and is not requeued" >&2
            return
        fi
        _over_limit=yes
    fi
    if again "$1"; then
        scontrol requeue "$SLURM_JOB_ID"  # "Job is pending execution": Slurm was faster
    else
        echo "job $SLURM_JOB_ID is not requeued" >&2
    fi
}

# TERM here means that the job is over. If the reason is its time limit, the ranks have not left when they were asked
# to, and in a moment (KillWait) this shell is killed with them: now it can still ask.
_over() {
    local _state="" _restarts=""
    _read_job
    [[ ! $_state =~ ^[A-Z]+\ Reason=TimeLimit\  ]] || _requeue 143
}

# _read_job: sets _state ("COMPLETING Reason=TimeLimit ...") and _restarts ("0 ..."), each from the first line that
# begins so: the same words in a comment or a name, which are the user's, mean nothing.
_read_job() {
    local job
    job=$(scontrol show job "$SLURM_JOB_ID") || return
    _state=${job#*$'\n   JobState='}
    _restarts=${_state#*$'\n   Requeue='[01]" Restarts="}
}
