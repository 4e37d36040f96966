# Sourced by the other scripts in this folder. It sets:
#   root     the project's folder
#   python   the Python of .venv if it exists, else python3
# exports two settings of glibc's allocator, unless the user has set them, and defines functions.
# shellcheck shell=bash

# Keep freed memory for the next training step. By default glibc returns it to the system at the end of each step and
# gets it back page by page, zeroed, which costs 8 % of a step of 0.1 s on CPU (docs/performance.md).
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}

root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

fail() {
  echo "topoflow: $*" >&2 || true # stderr may be closed
  exit 2
}

# make_venv [EXTRA]: create .venv with the package, its dependencies and those of EXTRA (a list from setup.cfg such as
# test,lint), at the versions of constraints.txt. Does nothing if they are installed. Concurrent calls take turns.
make_venv() {
  local extra=${1:-} wanted
  # everything that determines the installation; the folder is part of it, because a moved .venv does not work
  wanted=$(printf '%s\n' "$root" && cat "$root/setup.cfg" "$root/pyproject.toml" "$root/launch/constraints.txt")
  if ! venv_has "$extra" "$wanted"; then
    (
      command -v flock >/dev/null && flock 9
      venv_has "$extra" "$wanted" || install_into_venv "$extra" "$wanted"
    ) 9>"$root/.venv.lock" || exit
  fi
  python=$root/.venv/bin/python
}

venv_has() {
  [ "$(cat "$root/.venv/installed-$1" 2>/dev/null)" = "$2" ] && "$root/.venv/bin/python" -c '' 2>/dev/null
}

install_into_venv() {
  local extra=$1 wanted=$2 base venv=$root/.venv
  base=$(find_python) || exit
  if [ "$(head -n 1 "$venv/made-in" 2>/dev/null)" != "$root" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    echo "topoflow: creating $venv with $base" >&2
    "$base" -m venv --clear "$venv" || fail "$venv: '$base -m venv' failed"
    echo "$root" >"$venv/made-in"
  fi
  echo "topoflow: installing${extra:+ [$extra]} into $venv; the first time this takes a few minutes" >&2
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --constraint "$root/launch/constraints.txt" --editable "$root${extra:+[$extra]}" ||
    fail "$venv: pip could not install the package, see above"
  printf '%s\n' "$wanted" >"$venv/installed-$extra"
}

# find_python: print the first Python on the PATH that is new enough and can make a venv; PYTHON overrides it.
find_python() {
  local candidate found=
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.{14..11}; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    found=$candidate
    # on Debian, Python lacks ensurepip until the package python3-venv is installed
    "$candidate" -c 'import ensurepip, venv' 2>/dev/null && echo "$candidate" && return
  done
  [ -z "$found" ] || fail "$found has no venv module: expected one (Debian and Ubuntu: apt-get install python3-venv)"
  fail "$(python3 --version 2>/dev/null || echo 'no python3') found: expected Python 3.11 or newer (or set PYTHON)"
}

# require_torch: print one line and exit with 2 if there is no .venv and python3 has no torch.
require_torch() {
  [ "$python" = python3 ] || return 0
  { command -v python3 && python3 -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))'; } >/dev/null ||
    fail "no $root/.venv, and python3 has no torch: expected .venv (bash -c '. launch/env.sh; make_venv'), or a" \
      "python3 with torch on the PATH"
}

# run_dir_of CONFIG [section.key=value ...]: print run.dir; for an unusable config, print one line and return 2.
run_dir_of() {
  require_torch
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m topoflow.config_io --print run.dir "$@"
}

# require_free RUN_DIR: print one line and return 2 if another job holds the run directory; changes nothing.
require_free() {
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} \
    "$python" -m topoflow.run_dir "$1" "${SLURM_JOB_ID-}" "${SLURM_RESTART_COUNT-}"
}

# status_of RUN_DIR STATUS: print the program's own exit status, given the launcher's. torchrun returns 1 for every
# failure. srun returns the highest status, which is that of a task it killed because another had ended.
status_of() {
  local run_dir=$1 status=$2 reported=0
  if [ "$status" -ne 0 ] && [ -f "$run_dir/exit.json" ]; then
    reported=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["status"])' "$run_dir/exit.json")
  fi
  [ "$reported" -eq 0 ] || status=$reported
  echo "$status"
}

signalled='' # not empty: a trapped signal has arrived

# wait_for PID: return its exit status. A trapped signal interrupts `wait`, so each trap calls pass_on.
wait_for() {
  local status
  while :; do
    signalled='' status=0
    wait "$1" || status=$?
    [ -n "$signalled" ] || return "$status"
  done
}

# pass_on SIGNAL PID: forward a signal.
pass_on() {
  signalled=1
  kill -s "$1" "$2" 2>/dev/null || true
}

# run_job RUN_DIR SRUN...: run the tasks of a batch job, and exit. If they end with 75 (stopped on request after a
# checkpoint was committed), requeue the job, which then resumes.
run_job() {
  local run_dir=${1:-.} status=75 last step own_status
  shift
  rm -f -- "$run_dir/exit.json"
  last=$(last_checkpoint "$run_dir")
  if [ -z "$signalled" ]; then
    # since SLURM 22.05 srun does not inherit this from the job
    SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} "$@" &
    step=$! status=0
    # SLURM sends signals to the tasks, and with --signal=B:... to this shell. When the job is cancelled or requeued, this
    # shell gets TERM. srun would kill its tasks at once on TERM, so it is sent USR1, which it forwards to them.
    # shellcheck disable=SC2064
    trap "pass_on USR1 $step" USR1 TERM
    [ -z "$signalled" ] || pass_on USR1 "$step" # one that came just before this trap
    wait_for "$step" || status=$?
  fi
  trap '' USR1 TERM # the tasks have ended; scontrol requeue makes SLURM send TERM to this shell and to scontrol itself
  own_status=$(status_of "$run_dir" "$status")
  status=${own_status:-$status} # empty if SLURM has begun to kill this job
  # 128 + SIGINT, SIGUSR1 or SIGTERM: a request to stop came before a task, or srun, could catch it
  case $status in 130 | 138 | 143) status=75 ;; esac
  if [ "$status" -eq 75 ] && may_start_again "$run_dir" "$last"; then
    requeue
  fi
  exit "$status"
}

# last_checkpoint RUN_DIR: print the name of its last checkpoint, or `none`.
last_checkpoint() {
  local name=none
  [ ! -f "$1/checkpoints/last" ] || read -r name <"$1/checkpoints/last"
  echo "$name"
}

# may_start_again RUN_DIR LAST: return whether a job that was stopped may start again. LAST is the last checkpoint before
# this start. If a task refuses to start (a broken node), srun sends TERM to the others, which is like a request to stop.
# So the number of starts in a row without a new checkpoint is limited; RUN_DIR/.stopped-early has that number.
may_start_again() {
  local most=8 job='' last='' starts=0 record=$1/.stopped-early
  [ "$(last_checkpoint "$1")" = "$2" ] || return 0
  [ ! -f "$record" ] || read -r job last starts <"$record"
  [ "$job $last" = "$SLURM_JOB_ID $2" ] || starts=0
  starts=$((starts + 1))
  if [ "$starts" -ge "$most" ]; then
    echo "topoflow: not requeued: $starts starts in a row were stopped before they committed a checkpoint:" \
      "expected a longer --time, or tasks that can all start (see their errors above)" >&2
    return 1
  fi
  mkdir -p -- "$1" && echo "$SLURM_JOB_ID $2 $starts" >"$record"
}

# requeue: requeue this job if it is running. Otherwise SLURM is about to requeue it itself (scontrol requeue, preemption,
# node failure), or the job was cancelled, and scontrol would restart it.
requeue() {
  local job=$SLURM_JOB_ID state
  # all tasks of an array share the job id of the last one
  [ -z "${SLURM_ARRAY_TASK_ID-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  for _ in 1 2 3; do
    state=$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null) || state=
    case $state in
      RUNNING) scontrol requeue "$job" && return ;;
      ?*) echo "topoflow: job $job is $state: not requeued, SLURM decides" >&2 && return ;;
    esac
    sleep 20 # no answer from the controller
  done
  echo "topoflow: job $job could not be requeued: submit it again with sbatch to resume" >&2
}
