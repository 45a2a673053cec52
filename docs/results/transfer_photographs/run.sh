#!/bin/sh
# MI-FGSM images of three networks on each of them, 300 photographs; then with DI and TI.
#   sh docs/results/transfer_photographs/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/transfer_photographs}

for d in mim diverse; do
    case $d in mim) flag= ;; diverse) flag=--diverse ;; esac
    "$PYTHON" src/eval_net.py --data_dir "$SAMPLE/val" --weights "$WEIGHTS" --eps 16/255 \
        --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --attacks none --transfer $flag \
        --save "$RUNS/$d"
done
