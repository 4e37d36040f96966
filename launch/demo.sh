#!/usr/bin/env bash
# Usage: launch/demo.sh [section.key=value ...]
# Create .venv, simulate the demo data and weather forecasts, prepare them, train and evaluate: from a fresh machine to scores and plots.
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
forecasts=$("$python" -m topoflow.config_io --print data.forecast configs/demo.yaml "$@")
[ "$forecasts" != None ] || forecasts=$data-forecasts # data.forecast=null: made, and not used
if [ ! -e "$data" ] || [ ! -e "$forecasts" ]; then # each folder appears only once it is complete
  [ -e "$data-raw" ] || "$python" -m topoflow demo-data --forecasts="$forecasts-raw" -- "$data-raw"
  [ -e "$data" ] || "$python" -m topoflow prepare --output="$data" -- "$data-raw"
  [ -e "$forecasts" ] || "$python" -m topoflow prepare --output="$forecasts" -- "$forecasts-raw/recipe.yaml"
fi
exec "$python" train.py configs/demo.yaml "$@"
