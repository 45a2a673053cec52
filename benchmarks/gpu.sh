#!/bin/sh
# All measurements of speed on a GPU, in one table: SGA, PGD, adversarial training, evaluation.
# Needs requirements-dev.txt. Not run on a GPU.
#   sh benchmarks/gpu.sh                    from the root of the repository
#   DATA=/data/cifar10 sh benchmarks/gpu.sh      a CIFAR-10 that is already there
set -eu
PYTHON=${PYTHON:-python}
DATA=${DATA:-cifar10}
DEVICE=${DEVICE:-cuda}
RUNS=${RUNS:-runs/gpu}
export PYTHONPATH=src

"$PYTHON" benchmarks/uap_speed.py --model_name vgg16 resnet50 resnet152 --device "$DEVICE" \
    --steps 20 --results "$RUNS/sga.json"
"$PYTHON" benchmarks/attack_speed.py --model_name resnet50 --attacks pgd_linf --device "$DEVICE" \
    --results "$RUNS/pgd.json"
"$PYTHON" benchmarks/free_cost.py --data_dir "$DATA" --model_name preact_resnet18 --bf16 \
    --minibatches 20 --device "$DEVICE" --results "$RUNS/free.json"
exec "$PYTHON" benchmarks/gpu_table.py --tables "$RUNS/sga.csv" "$RUNS/pgd.csv" "$RUNS/free.csv" \
    --device "$DEVICE" --results "$RUNS/all.json"
