#!/bin/sh
# kill -9 at a hundred random moments, every bad input of the suite through the real command line,
# and full disks. A stopped run continues where it left off. The last part needs the right to mount a
# tmpfs: run it as root, or with PYTHON="unshare -rm python". Needs requirements-dev.txt.
#   sh docs/results/reliability/run.sh        from the root of the repository
set -eu
KILLS=${KILLS:-20}               # for each of the five commands
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/reliability}

export OMP_NUM_THREADS=1 PYTHONPATH=src:tests
# shellcheck disable=SC2086  # perhaps several words
{
    $PYTHON benchmarks/kill_test.py --kills "$KILLS" --results "$RUNS/kills.json"
    $PYTHON benchmarks/bad_input.py --results "$RUNS/bad_input.json"
    $PYTHON benchmarks/full_disk.py --results "$RUNS/full_disk.json"
}
