# Sourced by the scripts beside it. By itself it only sets:
#   root     the project's folder
#   python   .venv's Python if .venv is there, else python3
# and defines functions. It exports two settings of glibc's allocator, unless the user has set them.
# shellcheck shell=bash

# Keep freed memory for the next training step. By default glibc returns it to the system at the end of each step and
# gets it back page by page, zeroed: 8 % of a step of 0.1 s on CPU (docs/performance.md).
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}

root=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

fail() {
  echo "topoflow: $*" >&2
  exit 2
}

# make_venv [EXTRA]: .venv with the package, its dependencies and those of EXTRA (a list from setup.cfg such as
# test,lint), at the versions of constraints.txt. Does nothing if all that is there; two at once wait for each other.
make_venv() {
  local extra=${1:-} wanted
  # what was installed is known by its full recipe; the folder is in it because a moved .venv does not work
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
    echo "topoflow: making $venv with $base" >&2
    "$base" -m venv --clear "$venv" || fail "$venv: '$base -m venv' failed"
    echo "$root" >"$venv/made-in"
  fi
  echo "topoflow: installing${extra:+ [$extra]} into $venv; the first time this takes a few minutes" >&2
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
    --constraint "$root/launch/constraints.txt" --editable "$root${extra:+[$extra]}" ||
    fail "$venv: pip could not install the package, see above"
  printf '%s\n' "$wanted" >"$venv/installed-$extra"
}

# The first Python on the PATH that is new enough and can make a venv; PYTHON names another one.
find_python() {
  local candidate found=
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.{14..11}; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    found=$candidate
    # Debian leaves ensurepip out of a Python without its venv package
    "$candidate" -c 'import ensurepip, venv' 2>/dev/null && echo "$candidate" && return
  done
  [ -z "$found" ] || fail "$found has no venv module: expected one (Debian and Ubuntu: apt-get install python3-venv)"
  fail "$(python3 --version 2>/dev/null || echo 'no python3') found: expected Python 3.11 or newer (or set PYTHON)"
}

# run_dir_of CONFIG [section.key=value ...]: prints run.dir; a config that cannot be used is one line and status 2.
run_dir_of() {
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m topoflow.config_io --print run.dir "$@"
}

# require_free RUN_DIR: one line and status 2 if this job could not have the run directory; takes nothing.
require_free() {
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} \
    "$python" -m topoflow.run_dir "$1" "${SLURM_JOB_ID-}" "${SLURM_RESTART_COUNT-}"
}

# status_of RUN_DIR STATUS: prints the program's own exit status, given the launcher's. torchrun ends with 1 whatever
# its processes ended with, srun with the highest status, which is that of a task it killed because another had ended.
status_of() {
  local run_dir=$1 status=$2 told=0
  if [ "$status" -ne 0 ] && [ -f "$run_dir/exit.json" ]; then
    told=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["status"])' "$run_dir/exit.json")
  fi
  [ "$told" -eq 0 ] || status=$told
  echo "$status"
}

# wait_for PID: its exit status. A signal with a trap ends a wait, not the process, so each trap calls pass_on.
wait_for() {
  local status
  while :; do
    signalled='' status=0
    wait "$1" || status=$?
    [ -n "$signalled" ] || return "$status"
  done
}

# pass_on SIGNAL PID
pass_on() {
  signalled=1
  kill -s "$1" "$2" 2>/dev/null || true
}

# run_job RUN_DIR SRUN...: the body of a batch job, which ends here. If the tasks of SRUN end with 75 (stopped on request
# after a checkpoint was committed), the job goes back into the queue, and resumes by itself.
run_job() {
  local run_dir=$1 status=0 step told
  shift
  rm -f -- "${run_dir:-.}/exit.json"
  # srun takes this from the job no longer by itself (since SLURM 22.05)
  SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} "$@" &
  step=$!
  # SLURM sends signals to the tasks. It sends them to this shell as well, or alone, if asked to (--signal=B:...), and
  # TERM when the job is cancelled or requeued: srun itself would kill its tasks at once on TERM, so they get USR1.
  # shellcheck disable=SC2064
  trap "pass_on USR1 $step" USR1 TERM
  wait_for "$step" || status=$?
  told=$(status_of "$run_dir" "$status")
  status=${told:-$status} # nothing is told where SLURM has begun to kill this job
  if [ "$status" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] && [ ! -e "$run_dir/checkpoints/last" ]; then
    echo "topoflow: stopped $((SLURM_RESTART_COUNT + 1)) times before a first checkpoint: expected a longer --time" >&2
  elif [ "$status" -eq 75 ]; then
    requeue
  fi
  exit "$status"
}

# requeue: puts this job back into the queue if it is running. Otherwise SLURM is about to do so itself (scontrol
# requeue, preemption, node failure), or the job was cancelled, and scontrol would bring it back to life.
requeue() {
  local job=$SLURM_JOB_ID state
  # all tasks of an array have the number of the last one in common
  [ -z "${SLURM_ARRAY_TASK_ID-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  for _ in 1 2 3; do
    state=$(squeue --noheader --jobs="$job" --format=%T 2>/dev/null) || state=
    case $state in
      RUNNING) scontrol requeue "$job" && return ;;
      ?*) echo "topoflow: job $job is $state: left to SLURM, not requeued" >&2 && return ;;
    esac
    sleep 20 # the controller does not answer
  done
  echo "topoflow: job $job could not be put back into the queue: expected it to be sent again" >&2
}
