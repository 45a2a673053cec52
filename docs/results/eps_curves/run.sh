#!/bin/sh
# Robust accuracy against the Linf radius, on 200 images of CIFAR-10: natural, free-8 and K-PGD training,
# and the natural network behind GCM. Needs the networks of docs/results/free_cifar10/run.sh.
#   sh docs/results/eps_curves/run.sh        from the root of the repository
set -eu
DATA=${DATA:-cifar10}            # we used the same images as a folder of JPEG files
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/eps_curves}
FREE=${FREE:-runs/free_cifar10}

"$PYTHON" src/eval_net.py --runs "$FREE/natural" "$FREE/free8" "$FREE/pgd" --num_images 200 \
    --model_name docs/results/free_cifar10/net.py:small --attacks none --eps_curve \
    --save "$RUNS/trainings"
"$PYTHON" src/eval_net.py --data_dir "$DATA" --model_name docs/results/free_cifar10/net.py:small \
    --weights "$FREE/natural/natural_small.pth" --defense gcm --num_images 200 --attacks none \
    --eps_curve --save "$RUNS/gcm"
"$PYTHON" src/figures.py --eps_curves "$RUNS/trainings" "$RUNS/gcm" \
    --rows natural "small:natural, behind GCM" free8 pgd --out "$RUNS/eps_curves.png"
