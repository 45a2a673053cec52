#!/bin/sh
# Robustness of two networks behind GCM against its w; the table's cells come from their w_sweep.csv.
#   sh docs/results/gcm_w/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/gcm_w}

for m in squeezenet1_0 squeezenet1_1; do
    "$PYTHON" src/gcm.py --data_dir "$SAMPLE/val" --weights "$WEIGHTS" --model_name "$m" --w_sweep \
        --amp bf16 --stop_early --save "$RUNS/$m"
done
