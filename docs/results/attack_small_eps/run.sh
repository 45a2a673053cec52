#!/bin/sh
# Six attacks at 1/32 of the usual radii, where they differ: 60 photographs, one network. Needs
# requirements-dev.txt.
#   sh docs/results/attack_small_eps/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/attack_small_eps}

PYTHONPATH=src "$PYTHON" benchmarks/attack_table.py --data_dir "$SAMPLE/val" \
    --weights "$WEIGHTS" --model_name squeezenet1_1 --num_images 60 --eps_scale 1/32 \
    --attacks fgsm pgd_linf pgd_l2 pgd_l1_dense pgd_l1 cw_pgd_l2 --results "$RUNS"
