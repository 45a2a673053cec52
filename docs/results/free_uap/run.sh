#!/bin/sh
# Universal perturbations made on a naturally and on a free-trained network, measured on both and
# on the K-PGD network. Needs the networks of docs/results/free_small/run.sh.
#   sh docs/results/free_uap/run.sh        from the root of the repository
set -eu
DATA=${DATA:-cifar10}            # we used the same images as a folder of JPEG files
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/free_small}

for n in natural free8; do
    "$PYTHON" src/train_sga.py --data_dir "$DATA" --model_name cnn_bn --eps 8/255 \
        --num_images 5000 --weights "$RUNS/$n/${n}_cnn_bn.pth" --amp bf16 \
        --layout channels_last --save "$RUNS/uap_$n" --resume
done
"$PYTHON" src/eval_net.py --runs "$RUNS/natural" "$RUNS/free8" "$RUNS/pgd" --attacks none \
    --uaps "$RUNS/uap_natural" "$RUNS/uap_free8" --num_images 300 --save "$RUNS/uap_table"
