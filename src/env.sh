# Sourced by every script. Sets PYTHON to an interpreter that has all that the scripts import, and
# torchrun to the arguments that start PROCESSES processes (empty for one); defines `table`.
# PYTHON is the caller's if it has torch, torchvision and the rest; else that of .venv beside src/,
# made once from requirements.txt: about a minute and 5 GB, or on top of the caller's torch if that
# is 2.4 or newer and not in a virtual environment.

case ${PYTHON:-} in  # some scripts change directory
/*) ;;
*/*) PYTHON=$PWD/$PYTHON ;;
esac
root=$(CDPATH='' cd -- "$(dirname "$0")/.." && pwd)
case ${PROCESSES:-1} in
1) torchrun= ;;
0* | *[!0-9]*)
    echo "error: PROCESSES=$PROCESSES: wanted a number, 1 or more; type PROCESSES=4" >&2
    exit 2 ;;
*) torchrun="-m torch.distributed.run --standalone --nproc_per_node $PROCESSES" ;;
esac
modules="torch torchvision numpy tqdm PIL matplotlib sklearn ${MODULES:-}"

has() {  # has PYTHON MODULE...: whether all of them are installed and new enough
    python=$1
    shift
    command -v "$python" >/dev/null 2>&1 && "$python" -c '
import sys
if sys.version_info < (3, 10):
    sys.exit(1)
from importlib.metadata import version
from importlib.util import find_spec
if any(find_spec(name) is None for name in sys.argv[1:]):
    sys.exit(1)
sys.exit([int(n) for n in version("torch").split(".")[:2]] < [2, 4])' "$@"
}

choose_python() {
    base=${PYTHON:-python3}
    for PYTHON in "$base" "$root/.venv/bin/python"; do
        # shellcheck disable=SC2086  # a list of names
        if has "$PYTHON" $modules; then return 0; fi
    done
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $base is not Python 3.10 or newer; type PYTHON=/path/to/python3 before sh" >&2
        exit 2
    fi
    echo "$base lacks one of: $modules; installing them into $root/.venv (once)" >&2
    list=$root/${REQUIREMENTS:-requirements.txt}
    if [ -e "$root/.venv/pyvenv.cfg" ]; then  # perhaps uv's, without pip
        if ! "$PYTHON" -m pip --version >/dev/null 2>&1 &&
            ! "$PYTHON" -m ensurepip >/dev/null 2>&1; then
            echo "error: $root/.venv has no pip; install $list into it, or remove it;" \
                "on Debian: apt install python3-venv" >&2
            exit 2
        fi
    else
        if has "$base" torch torchvision; then site=--system-site-packages; else site=; fi
        if ! "$base" -m venv $site "$root/.venv"; then
            echo "error: $base cannot make an environment; on Debian: apt install python3-venv" >&2
            exit 2
        fi
    fi
    "$PYTHON" -m pip install --quiet -r "$list"
    sed -n 's/^# --no-deps //p' "$list" | while read -r package; do
        "$PYTHON" -m pip install --quiet --no-deps "$package"
    done
}

choose_python

# table "NAME..." "OPTION..." FLAG...: runs eval_net.py with these options on these runs in $RUNS. Of
# the training flags it passes on those that only say how to compute.
table() {
    names=$1 options=$2 left=$(($# - 2)) model=${MODEL:-}
    shift 2
    while [ "$left" -gt 0 ]; do
        flag=$1 left=$((left - 1))
        shift
        case $flag in
        --device=* | --workers=* | --cache=*) set -- "$@" "$flag" ;;
        --device | --workers | --cache) set -- "$@" "$flag" "${1-}" ;;
        --model_name=*) model=${flag#*=} ;;
        --model_name) model=${1-} ;;
        esac
    done
    case $model in *.py:*) set -- "$@" --model_name "$model" ;; esac  # its code is run
    set -- "$@" --runs
    for name in $names; do set -- "$@" "$RUNS/$name"; done
    # shellcheck disable=SC2086  # lists, separated by spaces
    exec "$PYTHON" $torchrun "$root/src/eval_net.py" "$@" --save "$RUNS" $options
}
