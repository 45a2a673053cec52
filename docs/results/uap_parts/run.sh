#!/bin/sh
# What momentum and random transforms each bring to SGA: 400 photographs, three seeds of each part
# alone, measured on 300 others. On one thread while other jobs ran, a run took 40 to 50 minutes.
#   sh docs/results/uap_parts/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uap_parts}

run() {  # run NAME FLAG...
    name=$1; shift
    "$PYTHON" src/train_sga.py --data_dir "$SAMPLE/train" --model_name squeezenet1_0 \
        --weights "$WEIGHTS" --layout channels_last --amp bf16 --save "$RUNS/$name" \
        --resume "$@"
}
for s in 0 1 2; do run "sga_momentum_$s" --seed "$s" --momentum 0.9; done
for s in 0 1 2; do run "aug_plain_$s" --seed "$s" --augment --momentum 0; done
"$PYTHON" src/eval_uap.py --uaps "$RUNS" --data_dir "$SAMPLE/val" --weights "$WEIGHTS" \
    --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --save "$RUNS/eval"
