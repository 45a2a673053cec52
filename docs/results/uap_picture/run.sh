#!/bin/sh
# The perturbation of imgs/uaps.png, measured on 300 photographs and shown on one of scikit-learn's.
#   sh docs/results/uap_picture/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uap_picture}

"$PYTHON" src/train_sga.py --data_dir "$SAMPLE/train" --model_name squeezenet1_0 \
    --weights "$WEIGHTS" --amp bf16 --layout channels_last --seed 0 --preset transfer \
    --save "$RUNS/transfer" --resume
mkdir -p "$RUNS/photos/photographs"       # a class folder
"$PYTHON" -c 'import sys, pathlib, shutil, sklearn.datasets
folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
shutil.copy(folder / "china.jpg", sys.argv[1])' "$RUNS/photos/photographs"
for shown in eval photo; do
    case $shown in eval) data=$SAMPLE/val ;; photo) data=$RUNS/photos ;; esac
    "$PYTHON" src/eval_uap.py --uaps "$RUNS"/transfer/sga_*.pth --data_dir "$data" --weights "$WEIGHTS" \
        --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --save "$RUNS/$shown"
done
