#!/bin/sh
# AutoAttack compared with pyautoattack: small networks trained against each norm, on 200 digits;
# three torchvision networks without a defence, on 30 photographs. Needs requirements-dev.txt.
#   sh docs/results/autoattack/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/autoattack}

compare() {  # compare NAME FLAG...
    name=$1; shift
    PYTHONPATH=src "$PYTHON" benchmarks/autoattack.py --results "$RUNS/$name.json" "$@"
}
compare digits --seeds 3
compare photographs --data_dir "$SAMPLE/val" --num_images 30 --norms linf --eps 4/255 \
    --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --weights "$WEIGHTS"
