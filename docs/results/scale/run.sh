#!/bin/sh
# Evaluation at scale: memory by number of images, images/s by number of processes, --cache; random
# numbers per second. Nothing else may run on the machine meanwhile. No data is needed.
#   sh docs/results/scale/run.sh        from the root of the repository
set -eu
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/scale}
export OMP_NUM_THREADS=1

PYTHONPATH=src "$PYTHON" benchmarks/scale_cost.py --results "$RUNS/results.json"
PYTHONPATH=src "$PYTHON" benchmarks/chance_speed.py --threads 1 \
    --results "$RUNS/chance.json"
