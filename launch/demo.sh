#!/usr/bin/env bash
# Usage: launch/demo.sh [section.key=value ...]
# Create .venv, simulate the demo data, train and evaluate: from a fresh machine to a table of scores and plots.
# Run it again and it reuses what exists: it resumes a stopped run, and evaluates a finished one again. To start over,
# remove the run directory.
for word; do
  case $word in -h | --help) sed -n '2,${/^# /!q;s/^# //p;}' "$0" && exit ;; esac
done
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_venv ''
cd "$root"
data=$("$python" -m topoflow.config_io --print data.path configs/demo.yaml "$@")
[ -e "$data" ] || "$python" -m topoflow demo-data -- "$data" # appears only once it is complete
exec "$python" train.py configs/demo.yaml "$@"
