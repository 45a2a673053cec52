#!/bin/sh
# Makes the perturbations of imgs/uaps and measures them. Finished runs are kept; a stopped run
# continues from its checkpoint. UAPS=imgs/uaps ROWS= only measures those already there.
#   sh docs/results/uaps/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
CIFAR=${CIFAR:-cifar10}          # we used the same images as a folder of JPEG files
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uaps}
UAPS=${UAPS:-$RUNS/uaps}         # where finished ones go; ours are in imgs/uaps
ROWS=${ROWS-photographs digits cifar10}   # what to make; everything in $UAPS is measured

run() {  # run NAME FLAG...: a perturbation, and its picture and facts in $UAPS
    name=$1; shift
    if [ ! -d "$RUNS/done/$name" ]; then
        "$PYTHON" src/train_sga.py --amp bf16 --layout channels_last --seed 0 \
            --save "$RUNS/training/$name" --resume "$@"
        [ -f "$RUNS/training/$name/checkpoint.pth" ] || return 0
        mkdir -p "$RUNS/done/$name.part"
        cp "$RUNS/training/$name"/*_*.png "$RUNS/done/$name.part/$name.png"
        cp "$RUNS/training/$name"/*.json "$RUNS/done/$name.part/$name.json"
        mv "$RUNS/done/$name.part" "$RUNS/done/$name"
    fi
    "$PYTHON" - "$RUNS/done/$name" "$UAPS" <<'END'
import json
import pathlib
import shutil
import sys

made, kept = map(pathlib.Path, sys.argv[1:])
kept.mkdir(parents=True, exist_ok=True)
facts = json.loads((made / f"{made.name}.json").read_text())
del facts["data_dir"]  # this machine's path is of no use elsewhere
(kept / f"{made.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
shutil.copy(made / f"{made.name}.png", kept)
END
}
photographs() {  # NAME NETWORK FLAG...
    name=$1 network=$2; shift 2
    run "$name" --data_dir "$SAMPLE/train" --weights "$WEIGHTS" --model_name "$network" "$@"
}
for row in $ROWS; do
    case $row in
    photographs)
        photographs squeezenet1_0_transfer squeezenet1_0 --preset transfer
        photographs squeezenet1_1_transfer squeezenet1_1 --preset transfer --epochs 4
        photographs mobilenet_v2_transfer mobilenet_v2 --preset transfer --epochs 4
        photographs squeezenet1_0_cosine squeezenet1_0 --preset transfer --loss cosine --epochs 4
        photographs squeezenet1_0_few_images squeezenet1_0 --preset few_images --batch_size 50 --epochs 4
        photographs squeezenet1_0_to_8 squeezenet1_0 --augment --loss logit --batch_size 50 --epochs 4 \
            --target 8
        photographs ensemble_transfer squeezenet1_0,mobilenet_v2 --preset transfer --epochs 2
        ;;
    digits)
        run digits_sga --data_dir digits
        run digits_to_8 --data_dir digits --target 8
        run digits_transfer --data_dir digits --model_name vgg_small --preset transfer
        ;;
    cifar10)
        run cifar10_sga --data_dir "$CIFAR" --model_name cnn_bn --num_images 2000
        run cifar10_transfer --data_dir "$CIFAR" --model_name cnn_bn --num_images 2000 --preset transfer
        ;;
    esac
done
for kind in imagenet digits cifar10; do
    grep -qs "\"kind\": \"$kind\"" "$UAPS"/*.json || continue
    case $kind in
    imagenet) set -- --data_dir "$SAMPLE/val" --weights "$WEIGHTS" \
        --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 ;;
    digits) set -- --data_dir digits ;;
    cifar10) set -- --data_dir "$CIFAR" --model_name cnn_bn cnn --num_images 1000 ;;
    esac
    "$PYTHON" src/eval_uap.py --uaps "$UAPS" --save "$RUNS/eval/$kind" "$@"
done
