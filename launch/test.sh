#!/usr/bin/env bash
# Usage: launch/test.sh [--all | pytest arguments]
# Create .venv and run tests. Without arguments: the tests that show whether the installation works.
# --all: every test; those that need SLURM or a GPU are skipped without one. Both run in three processes.
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

# Two of three parts that run concurrently, of about equal length; the first mostly waits, for SLURM and for nodes. No
# test of theirs measures time. Bash starts them in the background with SIGINT ignored, so none sends Ctrl-C.
waiting=(tests/slurm tests/doctor tests/test_benchmarks.py)
computing=(tests/data tests/model tests/physics tests/lightning tests/checkpoint tests/prepare tests/test_{evaluation,gpu_benchmark}.py
  tests/program/test_{base,canonical,durability,evaluate,faults,refusals,training,weather}.py)
rest=("${waiting[@]/#/--ignore=}" "${computing[@]/#/--ignore=}")
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf -- "$logs"' EXIT
trap 'exit 130' INT
"$python" -m pytest "${waiting[@]}" "${selected[@]}" >"$logs/waiting" 2>&1 &
parts=($!)
"$python" -m pytest "${computing[@]}" "${selected[@]}" >"$logs/computing" 2>&1 &
parts+=($!) status=0
"$python" -m pytest "${rest[@]}" "${selected[@]}" || status=$?
for part in "${parts[@]}"; do wait "$part" || status=$?; done
cat "$logs"/*
exit "$status"
