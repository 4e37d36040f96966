#!/usr/bin/env bash
# Usage: launch/test.sh [--all] [pytest arguments]
# Create .venv and run tests. Without arguments: the tests that show whether the installation works.
# --all: every test, in two processes; those that need SLURM or a GPU are skipped without one.
for word; do
  case $word in -h | --help) sed -n '2,${/^# /!q;s/^# //p;}' "$0" && exit ;; esac
done
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_venv test
cd "$root"
if [ "${1-}" != --all ]; then
  [ $# -gt 0 ] || set -- -m 'not slow and not slurm'
  exec "$python" -m pytest "$@"
fi

shift
# One of two halves that run at once: it mostly waits for SLURM, and none of its tests measure time.
half=(tests/slurm tests/data tests/model tests/lightning tests/checkpoint tests/test_benchmarks.py)
log=$(mktemp)
trap 'rm -f -- "$log"' EXIT
"$python" -m pytest "${half[@]}" "$@" >"$log" 2>&1 &
second=$! status=0
"$python" -m pytest "${half[@]/#/--ignore=}" "$@" || status=$?
wait "$second" || status=$?
cat "$log"
exit "$status"
