#!/bin/sh
# The inner step of SGA compared with the plain step and with bare forward and backward passes.
# Nothing else may run on the machine meanwhile.
#   sh docs/results/uap_speed/run.sh        from the root of the repository
set -eu
WEIGHTS=${WEIGHTS:-random}       # or a folder of NAME.pth; speed does not depend on it
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uap_speed}

mkdir -p "$RUNS"
PYTHONPATH=src "$PYTHON" benchmarks/uap_speed.py --model_name squeezenet1_0 --weights "$WEIGHTS" \
    --rounds 9 --results "$RUNS/squeezenet1_0.json"
PYTHONPATH=src "$PYTHON" benchmarks/uap_speed.py --model_name vgg16 --rounds 2 --steps 2 \
    --results "$RUNS/vgg16.json"
