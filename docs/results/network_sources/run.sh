#!/bin/sh
# A network from each source: clean accuracy and PGD-20, on 100 photographs and on digits.
# Needs timm and safetensors. A few minutes on one thread. The radius on photographs is small, because
# at 4/255 no image survives.
#   sh docs/results/network_sources/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/network_sources}
HERE=docs/results/network_sources
export WEIGHTS                   # nets.py reads it

PYTHONPATH=src "$PYTHON" "$HERE/convert.py" timm "$WEIGHTS" "$RUNS/timm.safetensors"
"$PYTHON" src/eval_net.py --data_dir "$SAMPLE/val" --num_images 100 --attacks pgd20 --eps 0.5/255 \
    --model_name squeezenet1_0 mobilenet_v2 timm/mobilenetv2_100 "$HERE/nets.py:both" \
    --weights "$WEIGHTS" "$WEIGHTS" "$RUNS/timm.safetensors" V1 --save "$RUNS/photographs"

"$PYTHON" src/free_at.py --data_dir digits --method free --save "$RUNS/free" --resume
PYTHONPATH=src "$PYTHON" "$HERE/convert.py" robust "$RUNS/free/free8_mlp.pth" "$RUNS/robust.pth"
"$PYTHON" src/eval_net.py --data_dir digits --attacks pgd20 --eps 0.1 --model_name mlp \
    --weights "$RUNS/robust.pth" --save "$RUNS/robust"
"$PYTHON" src/eval_net.py --data_dir digits --attacks pgd20 --eps 0.1 --model_name mlp \
    --weights V1 --save "$RUNS/natural"
