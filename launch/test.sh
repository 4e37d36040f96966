#!/usr/bin/env bash
# Usage: launch/test.sh [--all | pytest arguments]
# Create .venv and run tests. Without arguments: the tests that show whether the installation works.
# --all: every test; those that need SLURM or a GPU are skipped without one. Both run in two processes.
for word; do
  case $word in -h | --help) sed -n '2,${/^# /!q;s/^# //p;}' "$0" && exit ;; esac
done
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_venv test
cd "$root"
case ${1-} in
  '') selected=(-m 'not slow and not slurm') ;;
  --all) selected=("${@:2}") ;;
  *) exec "$python" -m pytest "$@" ;;
esac

# The first of two halves that run concurrently: it mostly waits for SLURM, and none of its tests measures time. Bash
# starts it in the background with SIGINT ignored, so none of its tests sends Ctrl-C.
half=(tests/slurm tests/data tests/model tests/physics tests/lightning tests/checkpoint
  tests/test_{benchmarks,evaluation,gpu_benchmark}.py tests/doctor/test_doctor.py tests/program/test_{base,canonical,durability,evaluate,faults,refusals,training}.py)
log=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f -- "$log"' EXIT
trap 'exit 130' INT
"$python" -m pytest "${half[@]}" "${selected[@]}" >"$log" 2>&1 &
second=$! status=0
"$python" -m pytest "${half[@]/#/--ignore=}" "${selected[@]}" || status=$?
wait "$second" || status=$?
cat "$log"
exit "$status"
