#!/bin/sh
# Robust accuracy over the Linf radius: a network without and behind GCM, by the naive and by the
# adaptive attacker, on 50 photographs; trainings of docs/results/free_cifar10, on 200 images.
#   sh docs/results/eps_curves/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; ours were others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/eps_curves}
FREE=${FREE:-runs/free_cifar10}  # what docs/results/free_cifar10/run.sh left

for d in none gcm; do
    "$PYTHON" src/eval_net.py --data_dir "$SAMPLE/val" --weights "$WEIGHTS" --num_images 50 \
        --model_name squeezenet1_0 --attacks none --eps_curve --defense "$d" --save "$RUNS/$d"
done
"$PYTHON" src/eval_net.py --runs "$FREE/natural" "$FREE/free8" "$FREE/pgd" --num_images 200 \
    --attacks none --eps_curve --save "$RUNS/free"
