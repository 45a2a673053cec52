#!/bin/sh
# The quick suite with other versions, in its own environment from the registry (6 GB, kept).
#   sh tests/versions.sh                                               the oldest pair
#   PYTHON=python3 TORCH= TORCHVISION= sh tests/versions.sh            the newest
#   TORCH=2.6.0 TORCHVISION=0.21.0 sh tests/versions.sh -k attacks     pytest flags are passed on
set -eu
PYTHON=${PYTHON:-python3.10}
TORCH=${TORCH-2.4.1}
TORCHVISION=${TORCHVISION-0.19.1}

root=$(CDPATH='' cd -- "$(dirname "$0")/.." && pwd)
VENV=${VENV:-$root/.venv-torch-${TORCH:-newest}}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: $PYTHON is not Python 3.10 or newer; type PYTHON=/path/to/python3 before sh" >&2
    exit 2
fi
if ! [ -e "$VENV/complete" ]; then
    "$PYTHON" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install --quiet -r "$root/requirements-dev.txt" \
        "torch${TORCH:+==$TORCH}" "torchvision${TORCHVISION:+==$TORCHVISION}"
    sed -n 's/^# --no-deps //p' "$root/requirements-dev.txt" | while read -r package; do
        "$VENV/bin/python" -m pip install --quiet --no-deps "$package"
    done
    touch "$VENV/complete"
fi
"$VENV/bin/python" -c '
import platform, numpy, torch, torchvision
print("Python", platform.python_version(), "torch", torch.__version__, "torchvision",
      torchvision.__version__, "numpy", numpy.__version__)'
export PYTHON="$VENV/bin/python"
exec sh "$root/tests/run.sh" -m quick "$@"
