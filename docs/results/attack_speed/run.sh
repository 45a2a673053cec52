#!/bin/sh
# Speed of our attacks and those of five other libraries, on the same network in the same
# precision and memory layout, and on the network as loaded. Needs requirements-dev.txt;
# nothing else may run on the machine meanwhile.
#   sh docs/results/attack_speed/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/attack_speed}

PYTHONPATH=src "$PYTHON" benchmarks/attack_speed.py --model_name squeezenet1_0 mobilenet_v2 \
    --data_dir "$SAMPLE/val" --weights "$WEIGHTS" --layout channels_last --batch_size 10 \
    --steps 10 --binary_steps 2 --cw_steps 10 --results "$RUNS/results.json"
