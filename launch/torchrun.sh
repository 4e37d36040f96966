#!/usr/bin/env bash
# Usage: launch/torchrun.sh [options of torchrun, as --name=value] CONFIG [section.key=value ...]
# Train on the devices of this machine or, with torchrun's own options, of several machines.
# Without --nproc-per-node: one process per visible GPU, or one without a GPU. Without --nnodes: this machine alone.
# Exits with the program's own status; torchrun returns 1 for every failure.
for word; do
  case $word in -h | --help) sed -n '2,${/^# /!q;s/^# //p;}' "$0" && exit ;; esac
done
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

options=() option=''
while [[ ${1:-} = -* ]]; do
  option=$1
  options+=("$1")
  shift
done
[ $# -gt 0 ] || fail "no config: expected launch/torchrun.sh [options of torchrun] CONFIG [section.key=value ...]"
case $option in
  '' | *=* | --standalone) ;;
  *) [ -f "$1" ] || fail "$option $1: expected $option=$1 (options of torchrun as --name=value), then CONFIG" ;;
esac

# refuse an unusable config with one line, before launching anything
run_dir=$(run_dir_of "$@")
require_free "$run_dir" || exit
rm -f -- "${run_dir:-.}/exit.json"

case " ${options[*]-} " in
  *" --nproc"[-_]"per"[-_]"node="*) ;;
  *) options+=("--nproc-per-node=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')") ;;
esac
case " ${options[*]-} " in
  *" --nnodes="* | *" --standalone "*) ;;
  *) options+=(--standalone) ;;
esac

# time for ranks to commit a checkpoint after a signal; torchrun's default is 30 s, after which it kills them
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# The program sets this itself (see set_torch_defaults in topoflow/environment.py), but torchrun would set another value first.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-2}
# set -m: torchrun gets its own process group, so that Ctrl-C reaches it once, through the trap
set -m
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
  "$python" -m torch.distributed.run "${options[@]}" "$root/train.py" "$@" &
torchrun=$!
set +m
trap 'pass_on INT "$torchrun"' INT
# torchrun would not forward USR1 (SLURM's warning) to the processes, and would itself be killed by it
trap 'pass_on TERM "$torchrun"' TERM HUP USR1
status=0
wait_for "$torchrun" || status=$?
exit "$(status_of "$run_dir" "$status")"
