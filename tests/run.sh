#!/bin/sh
# The whole suite, from a bare checkout; pytest flags are passed on.
#   sh tests/run.sh                        everything, one process per processor
#   sh tests/run.sh -m quick               a minute or two: starts no script, trains nothing
#   sh tests/run.sh tests/test_sga.py      one file
set -eu
MODULES="pytest xdist ruff foolbox art pyautoattack torchattacks adv_lib timm safetensors pyarrow nbclient ipykernel"
REQUIREMENTS=requirements-dev.txt

. "$(dirname "$0")/../src/env.sh"
cd "$root"
exec "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
