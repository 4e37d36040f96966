#!/usr/bin/env bash
# Usage: srun --kill-on-bad-exit=1 [options of srun] launch/srun.sh CONFIG [section.key=value ...]
# Run one task of a SLURM step. The program reads rank, size and address from the step's variables. It replaces this
# shell, so that SLURM's signals reach it and its exit status is the task's.
trap 'exit 75' INT TERM USR1 # a request to stop before anything has started
for word; do
  case $word in -h | --help) sed -n '2,${/^# /!q;s/^# //p;}' "$0" && exit ;; esac
done
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

require_torch
# one thread, as under torchrun, because bits on CPU depend on the number of threads; run.threads overrides it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# block stop signals until the program has started and unblocks them
blocked=(env "--block-signal=INT,TERM,USR1")
"${blocked[@]}" true 2>/dev/null || blocked=() # before coreutils 8.31
exec "${blocked[@]}" "$python" "$root/train.py" "$@"
