#!/bin/sh
# The inner step of SGA compared with the published step, unchanged and in our precision and layout,
# and with bare forward and backward passes. Nothing else may run on the machine meanwhile.
#   sh docs/results/uap_speed/run.sh        from the root of the repository
set -eu
WEIGHTS=${WEIGHTS:-random}       # or a folder of NAME.pth; speed does not depend on it
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uap_speed}

PYTHONPATH=src "$PYTHON" benchmarks/uap_speed.py --model_name squeezenet1_0 vgg16 \
    --weights "$WEIGHTS" --layout channels_last --results "$RUNS/results.json"
