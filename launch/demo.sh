#!/usr/bin/env bash
# Usage: launch/demo.sh [section.key=value ...]
# Create .venv, simulate the demo data, prepare them, train and evaluate: from a fresh machine to scores and plots.
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
if [ ! -e "$data" ]; then # each folder appears only once it is complete
  [ -e "$data-raw" ] || "$python" -m topoflow demo-data -- "$data-raw"
  "$python" -m topoflow prepare --output="$data" -- "$data-raw"
fi
exec "$python" train.py configs/demo.yaml "$@"
