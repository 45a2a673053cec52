#!/bin/sh
# What the augmentations cost, compared with torchvision's on PIL images and with a training step.
# Nothing else may run on the machine meanwhile.
#   sh docs/results/augment_cost/run.sh        from the root of the repository
set -eu
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/augment_cost}

mkdir -p "$RUNS"
PYTHONPATH=src "$PYTHON" benchmarks/augment_speed.py --threads 1 --bf16 --out "$RUNS/one.json"
PYTHONPATH=src "$PYTHON" benchmarks/augment_speed.py --threads 2 --turns 3 --out "$RUNS/two.json"
