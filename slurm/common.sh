# shellcheck shell=bash
# Functions of the batch scripts: where the scripts are, how processes are started, what happens at a signal.
# Read by them, not run.

# Exit statuses of nemo-advrm that mean "start the same command again": 75 stopped by a signal and saved;
# 138 ended by SIGUSR1 (128 + 10) before the command had begun.
readonly PREEMPTED=75 ENDED_BY_USR1=138
readonly ENDED_BY_TERM=143 SERVER_LOST=3
# that servers have to answer what they were asked before (serve.drain_seconds is 30) and to end; before a requeue nobody
# waits for their answers
readonly DRAIN_SECONDS=40 DRAIN_BEFORE_REQUEUE=10

advrm_home=${ADVRM_HOME:-$SLURM_SUBMIT_DIR}

fail() {
    echo "error: $*" >&2
    exit 2
}

# The settings of the site: the environment that sbatch was called with counts over the file.
load_site() {
    local file=${ADVRM_SITE:-$advrm_home/slurm/site.sh}
    # shellcheck source=site.sh.example
    [[ ! -r $file ]] || source "$file"
}

# Sets the command, in the container if there is one.
find_command() {
    container=()
    if [[ -n ${ADVRM_CONTAINER_IMAGE:-} ]]; then
        container=(--container-image="$ADVRM_CONTAINER_IMAGE" --container-workdir="$PWD" --no-container-mount-home)
        container+=(--container-mounts="${ADVRM_CONTAINER_MOUNTS:-$advrm_home:$advrm_home}")
        command=${ADVRM_COMMAND:-nemo-advrm}
        return
    fi
    command=${ADVRM_COMMAND:-}
    if [[ -z $command && -x $advrm_home/.venv/bin/nemo-advrm ]]; then
        command=$advrm_home/.venv/bin/nemo-advrm
    fi
    command=${command:-$(command -v nemo-advrm)} \
        || fail "nemo-advrm is not on the path: set ADVRM_COMMAND (or ADVRM_HOME, if .venv is not in $advrm_home)"
}

# The address by which SLURM itself reaches a node.
address_of() {
    local address
    address=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    echo "${address:-$1}"
}

# start NODELIST SRUN_OPTION... -- STAGE SETTING...: one step in the background, one task per GPU (or per
# ADVRM_TASKS_PER_NODE on a CPU); sets step to its process.
start() {
    local nodelist=$1 options=() first nodes tasks cpus
    unset SLURM_NTASKS SLURM_NPROCS # of the allocation; the step has its own
    shift
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    first=$(scontrol show hostnames "$nodelist" | head -n 1)
    nodes=$(scontrol show hostnames "$nodelist" | wc -l)
    tasks=${ADVRM_TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    cpus=$((${SLURM_CPUS_ON_NODE:-1} / tasks))
    # --wait: when a process has died, the others get half a minute to say which one they miss, and are then ended
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))} MASTER_ADDR=$(address_of "$first") srun --nodes="$nodes" --ntasks-per-node="$tasks" \
        --cpus-per-task=$((cpus > 0 ? cpus : 1)) --wait="${ADVRM_WAIT:-30}" --kill-on-bad-exit=0 "${options[@]}" \
        "${container[@]}" "$command" "$@" trainer.num_nodes="$nodes" trainer.devices="$tasks" &
    step=$!
}

# Returns the status of process $1; signals that come meanwhile are handled and do not end the wait.
wait_for_step() {
    local status last=0
    while true; do
        interrupted=0
        wait "$1"
        status=$?
        ((status != 127)) || return "$last" # the wait before has already collected it
        ((interrupted)) || return "$status"
        last=$status
    done
}

# A signal before the time limit, a preemption or a drain: every task gets USR1 (srun hands it on), saves and ends. One
# that is not between two training steps within the grace is ended by the requeue: it has its earlier checkpoints.
stop_step() {
    signalled=1 interrupted=1
    echo "$(date +%T) signal $1: the tasks are told to save and end" >&2
    kill -USR1 "$step" 2>/dev/null
    if [[ -z ${watchdog:-} ]]; then
        { sleep "${ADVRM_GRACE:-90}"; echo "no end within ${ADVRM_GRACE:-90} s" >&2; requeue; } &
        watchdog=$!
    fi
}

# Puts the job back into the queue, unless somebody cancelled it or it was restarted too often.
requeue() {
    local state limit=${ADVRM_MAX_RESTARTS:-100}
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T | head -n 1)
    if [[ $state != RUNNING && $state != SIGNALING ]]; then
        echo "job $SLURM_JOB_ID is $state: not requeued" >&2
    elif ((${SLURM_RESTART_COUNT:-0} >= limit)); then
        echo "job $SLURM_JOB_ID was restarted $limit times (ADVRM_MAX_RESTARTS): not requeued" >&2
    else
        echo "$(date +%T) requeued: it goes on from its last checkpoint" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
}

# The step has ended by itself.
stop_watchdog() {
    [[ -z ${watchdog:-} ]] || kill "$watchdog" 2>/dev/null
}

# Ends the batch script with the step's status; a step that was stopped to be resumed is requeued.
finish() {
    local status=$1
    stop_watchdog
    trap '' USR1 TERM
    if ((status == PREEMPTED || status == ENDED_BY_USR1 || (status > 128 && ${signalled:-0}) || (status && ${told_to_end:-0}))); then
        requeue
    elif ((status)); then
        echo "error: job $SLURM_JOB_ID ended with status $status on ${SLURM_JOB_NODELIST:-this node}" >&2
    fi
    exit "$status"
}

# run_stage STAGE SETTING...: the whole body of a job that is one stage.
run_stage() {
    load_site
    find_command
    trap 'stop_step USR1' USR1
    trap 'stop_step TERM' TERM
    start "$SLURM_JOB_NODELIST" -- "$@"
    wait_for_step "$step"
    finish $?
}

# run_with_servers STAGE SETTING...: a heterogeneous job; component k serves the k-th reward model of ADVRM_MEMBERS.
run_with_servers() {
    local members urls=() servers=() settings run_dir=. setting k nodelist host port guard status
    load_site
    find_command
    read -r -a members <<<"${ADVRM_MEMBERS:-}"
    read -r -a settings <<<"${ADVRM_SERVE_SETTINGS:-}"
    ((${#members[@]} == SLURM_HET_SIZE - 1)) \
        || fail "ADVRM_MEMBERS names ${#members[@]} reward models, the job has $((SLURM_HET_SIZE - 1)) further components"
    for setting in "$@"; do
        [[ $setting != run_dir=* ]] || run_dir=${setting#run_dir=}
    done
    # servers are open to the network, so they ask for a token that only this job knows
    export NEMO_ADVRM_TOKEN=${NEMO_ADVRM_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
    no_proxy=${no_proxy:-${NO_PROXY:-}}
    trap 'requeue; exit $ENDED_BY_TERM' USR1 TERM # nothing is trained yet
    for ((k = 1; k < SLURM_HET_SIZE; k++)); do
        nodelist=SLURM_JOB_NODELIST_HET_GROUP_$k
        host=$(address_of "$(scontrol show hostnames "${!nodelist}" | head -n 1)")
        port=$((30000 + (SLURM_JOB_ID * 16 + k) % 2700)) # neither MASTER_PORT's range nor one that systems lend out
        ADVRM_TASKS_PER_NODE=${ADVRM_TASKS_SERVE:-${ADVRM_TASKS_PER_NODE:-}} \
            start "${!nodelist}" --het-group="$k" -- serve "${settings[@]}" run_dir="$run_dir/servers/$k" \
            "ensemble.members=[${members[k - 1]}]" serve.host=0.0.0.0 serve.port="$port"
        servers+=("$step")
        urls+=("http://$host:$port")
        no_proxy=${no_proxy:+$no_proxy,}$host
    done
    export no_proxy NO_PROXY=$no_proxy
    for k in "${!servers[@]}"; do wait_for_server "$k"; done
    trap 'stop_step USR1' USR1
    trap 'stop_step TERM' TERM
    trap lose_servers USR2
    start "$SLURM_JOB_NODELIST_HET_GROUP_0" --het-group=0 -- "$@" "ensemble.members=[$(IFS=,; echo "${urls[*]}")]"
    watch_servers &
    guard=$!
    wait_for_step "$step"
    status=$?
    trap '' USR2
    kill "$guard" 2>/dev/null
    stop_watchdog
    end_servers
    finish $((${server_lost:-0} ? SERVER_LOST : status))
}

# wait_for_server K: returns when the server is ready; ends the job when it dies or takes too long.
wait_for_server() {
    local limit=$((SECONDS + 60 * ${ADVRM_SERVER_MINUTES:-30})) name="the server of ${members[$1]} at ${urls[$1]}"
    until curl --silent --fail --noproxy '*' --max-time 5 --output /dev/null "${urls[$1]}/health/ready"; do
        if ! kill -0 "${servers[$1]}" 2>/dev/null; then
            server_was_told_to_end "$1" || fail "$name ended before it was ready; its reason is above"
            requeue
            exit "$ENDED_BY_TERM"
        fi
        ((SECONDS < limit)) || fail "$name was not ready within ${ADVRM_SERVER_MINUTES:-30} minutes (ADVRM_SERVER_MINUTES)"
        sleep 2
    done
}

# server_was_told_to_end K: whether a server that has ended did so at a signal, as all steps get one at a preemption.
server_was_told_to_end() {
    wait "${servers[$1]}"
    server_status=$?
    ((server_status == 0 || server_status == PREEMPTED || server_status == ENDED_BY_TERM || server_status == ENDED_BY_USR1))
}

# Beside the policy: tells the batch script when a server has ended, for it waits for the policy only.
watch_servers() {
    local server
    while sleep 1; do
        for server in "${servers[@]}"; do
            kill -0 "$server" 2>/dev/null || { kill -USR2 $$; return; }
        done
    done
}

# A server has ended under the policy. If it was told to, so is the policy, and the job goes on later; else the job
# ends in error. The policy saves if it can: one that waits for that server's scores cannot.
lose_servers() {
    local k
    interrupted=1
    if ((${signalled:-0})); then # the job goes on later in any case
        told_to_end=1
        return
    fi
    for k in "${!servers[@]}"; do
        ! kill -0 "${servers[k]}" 2>/dev/null || continue
        if server_was_told_to_end "$k"; then
            told_to_end=1
            stop_step "to the servers"
            return
        fi
        server_lost=1
        echo "error: the server of ${members[k]} at ${urls[k]} ended with status $server_status under the attack" >&2
    done
    ((${server_lost:-0})) || return
    kill -USR1 "$step" 2>/dev/null
    # srun ends its tasks at TERM, and hands USR1 on
    { sleep "${ADVRM_GRACE:-90}"; kill -TERM "$step"; } 2>/dev/null &
    watchdog=$!
}

# Lets the servers answer what they were asked, and end. One that does not ends with the job.
end_servers() {
    local k seconds=$((${signalled:-0} ? DRAIN_BEFORE_REQUEUE : DRAIN_SECONDS)) limit
    limit=$((SECONDS + seconds))
    scancel --quiet --signal=TERM "$SLURM_JOB_ID" # to the steps, and those of the servers are left; srun would kill them
    for k in "${!servers[@]}"; do
        while kill -0 "${servers[k]}" 2>/dev/null; do
            ((SECONDS < limit)) || { echo "the server of ${members[k]} did not end within $seconds s" >&2; return; }
            sleep 0.2
        done
    done
}
