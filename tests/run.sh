#!/bin/sh
# The whole suite, from nothing: sh tests/run.sh   (one file: sh tests/run.sh tests/test_sga.py)
set -eu
MODULES="pytest ruff foolbox art pyautoattack torchattacks adv_lib"
REQUIREMENTS=requirements-dev.txt

. "$(dirname "$0")/../src/env.sh"
cd "$root"
exec "$PYTHON" -m pytest "$@"
