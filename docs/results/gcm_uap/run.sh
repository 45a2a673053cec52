#!/bin/sh
# Universal perturbations made with and without GCM in front, by a naive and by an adaptive
# attacker. About 15 minutes on one thread for each perturbation.
#   sh docs/results/gcm_uap/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/gcm_uap}

run() {  # run NAME FLAG...
    name=$1; shift
    "$PYTHON" src/train_sga.py --data_dir "$SAMPLE/train" --model_name squeezenet1_0 \
        --weights "$WEIGHTS" --layout channels_last --amp bf16 --save "$RUNS/$name" \
        --resume "$@"
}
run vanilla
run gcm_naive --defense gcm
run gcm_bpda --defense gcm --bpda
for d in none gcm; do
    "$PYTHON" src/eval_uap.py --uaps "$RUNS/vanilla" "$RUNS/gcm_naive" "$RUNS/gcm_bpda" \
        --data_dir "$SAMPLE/val" --weights "$WEIGHTS" --defense "$d" \
        --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --save "$RUNS/eval_$d"
done
