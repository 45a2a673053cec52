# Sourced by every script: sets PYTHON to one that has what the scripts import.
# The caller's Python if it has torch, torchvision and the rest; else .venv beside src/, made once
# from requirements.txt: about a minute and 5 GB, or on top of the caller's torch if there is one.

root=$(cd "$(dirname "$0")/.." && pwd)
modules="torch torchvision numpy tqdm PIL matplotlib sklearn ${MODULES:-}"

has() {  # has PYTHON MODULE...: whether all of them are installed
    python=$1
    shift
    command -v "$python" >/dev/null 2>&1 && "$python" -c '
import sys
from importlib.util import find_spec
sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))' "$@"
}

choose_python() {
    base=${PYTHON:-python3}
    for PYTHON in "$base" "$root/.venv/bin/python"; do
        # shellcheck disable=SC2086  # a list of names
        if has "$PYTHON" $modules; then return 0; fi
    done
    if ! command -v "$base" >/dev/null 2>&1; then
        echo "error: no $base here; install Python 3.10 or newer, or type PYTHON=/path/to/python3" >&2
        exit 2
    fi
    if [ ! -x "$PYTHON" ]; then
        echo "making $root/.venv from ${REQUIREMENTS:-requirements.txt} (once)" >&2
        if has "$base" torch torchvision; then site=--system-site-packages; else site=; fi
        if ! "$base" -m venv $site "$root/.venv"; then
            echo "error: $base cannot make an environment; on Debian: apt install python3-venv" >&2
            exit 2
        fi
    fi
    "$PYTHON" -m pip install --quiet -r "$root/${REQUIREMENTS:-requirements.txt}"
}

choose_python
