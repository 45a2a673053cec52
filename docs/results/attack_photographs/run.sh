#!/bin/sh
# Eight attacks on three undefended networks, 300 photographs, compared with other libraries.
# Needs requirements-dev.txt. The table gives the seconds of every attack.
#   sh docs/results/attack_photographs/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/attack_photographs}

for m in squeezenet1_0 squeezenet1_1 mobilenet_v2; do
    PYTHONPATH=src "$PYTHON" benchmarks/attack_table.py --data_dir "$SAMPLE/val" \
        --weights "$WEIGHTS" --model_name "$m" --stop_early --results "$RUNS/$m"
done
