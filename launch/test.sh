#!/usr/bin/env bash
# From a fresh machine to the tests: launch/test.sh [pytest arguments]
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_venv test
cd "$root"
exec "$python" -m pytest "$@"
