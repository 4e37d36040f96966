#!/usr/bin/env bash
# From a fresh machine to a scored forecast: launch/demo.sh [section.key=value ...]
# A second run makes no data and trains no step that is done: it evaluates the finished run again, or goes on with one
# that was stopped. To start anew, remove the run directory.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_venv ''
cd "$root"
data=$("$python" -m topoflow.config_io --print data.path configs/demo.yaml "$@")
if [ ! -e "$data" ]; then
  # under another name until it is whole
  rm -rf "$data.partial"
  "$python" -m topoflow demo-data "$data.partial"
  mv "$data.partial" "$data"
fi
# ends with the table of scores and the folder of the plots
exec "$python" train.py configs/demo.yaml "$@"
