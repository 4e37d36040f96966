#!/usr/bin/env bash
# One task of a SLURM step: srun --kill-on-bad-exit=1 [options] launch/srun.sh CONFIG [section.key=value ...]
# The program reads rank, size and address from the step's own variables. It takes the place of this shell, so that
# SLURM's signals reach it and its exit status is the task's.
trap 'exit 75' INT TERM USR1 # a request to stop before anything was begun
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# as torchrun does: bits on CPU depend on the number of threads (run.threads sets it for good)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# a request to stop waits until the program, which takes a while to start, asks for it
later=(env "--block-signal=INT,TERM,USR1")
"${later[@]}" true 2>/dev/null || later=() # before coreutils 8.31
exec "${later[@]}" "$python" "$root/train.py" "$@"
