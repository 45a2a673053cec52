#!/bin/sh
# Cost of a weight step of natural, free, K-PGD and fast training. Nothing else may run on the
# machine meanwhile.
#   sh docs/results/free_cost/run.sh        from the root of the repository
set -eu
DATA=${DATA:-cifar10}            # we used the same images as a folder of JPEG files
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/free_cost}

PYTHONPATH=src "$PYTHON" benchmarks/free_cost.py --data_dir "$DATA" --model_name cnn_bn --bf16 \
    --results "$RUNS/results.json"
