#!/bin/sh
# Settings tried for --augment: without and with momentum, 10 epochs. The row with rotation has no
# flag: set ROTATE = 20.0 in src/utils/attack/universal.py.
#   sh docs/results/uap_augment_settings/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uap_augment_settings}

for momentum in 0 0.9; do
    "$PYTHON" src/train_sga.py --data_dir "$SAMPLE/train" --model_name squeezenet1_0 \
        --weights "$WEIGHTS" --layout channels_last --amp bf16 --epochs 10 --augment \
        --momentum "$momentum" --save "$RUNS/momentum_$momentum" --resume
done
"$PYTHON" src/eval_uap.py --uaps "$RUNS" --data_dir "$SAMPLE/val" --weights "$WEIGHTS" \
    --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --save "$RUNS/eval"
