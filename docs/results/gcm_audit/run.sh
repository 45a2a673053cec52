#!/bin/sh
# Signs of gradient masking, with GCM and without. Reuses the cells that
# docs/results/gcm_photographs/run.sh measured.
#   sh docs/results/gcm_audit/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/gcm_photographs}

for m in squeezenet1_0 squeezenet1_1 mobilenet_v2; do
    for d in gcm none; do
        "$PYTHON" src/gcm.py --data_dir "$SAMPLE/val" --weights "$WEIGHTS" --model_name "$m" \
            --save "$RUNS/$m" --defense "$d" --audit
    done
done
