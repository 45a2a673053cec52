#!/bin/sh
# Three networks behind GCM, a naive and an adaptive attacker, 300 photographs: 1.8 hours of
# attacks on one thread.
#   sh docs/results/gcm_photographs/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/gcm_photographs}

for m in squeezenet1_0 squeezenet1_1 mobilenet_v2; do
    "$PYTHON" src/gcm.py --data_dir "$SAMPLE/val" --weights "$WEIGHTS" --model_name "$m" \
        --save "$RUNS/$m"
done
