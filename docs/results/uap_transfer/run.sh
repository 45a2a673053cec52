#!/bin/sh
# What makes a perturbation fool other networks: presets and their parts from 400 photographs,
# measured on 300 others. Finished runs are kept; a stopped run continues from its checkpoint.
#   ROWS=adam SEEDS=0 sh docs/results/uap_transfer/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uap_transfer}
SEEDS=${SEEDS:-0 1 2}
ROWS=${ROWS:-parts adam maximin long surrogates images floor}

run() {  # run NAME EPOCHS FLAG...: trains NAME up to EPOCHS, keeps the perturbation as NAME_EPOCHS
    name=$1 epochs=$2 kept=$RUNS/uaps/$1_$2; shift 2
    [ -d "$kept" ] && return
    "$PYTHON" src/train_sga.py --data_dir "$SAMPLE/train" --weights "$WEIGHTS" --amp bf16 \
        --layout channels_last --epochs "$epochs" --save "$RUNS/training/$name" --resume "$@"
    [ -f "$RUNS/training/$name/checkpoint.pth" ] || return 0
    mkdir -p "$kept.part"
    cp "$RUNS/training/$name"/*.pth "$RUNS/training/$name"/*.json "$kept.part"
    rm "$kept.part/checkpoint.pth"
    mv "$kept.part" "$kept"
}
small() {  # on SqueezeNet 1.0
    run "$@" --model_name squeezenet1_0 --seed "$s"
}
for s in $SEEDS; do
    for rows in $ROWS; do
        case $rows in
        parts)   # 6,400 gradients: each part alone and combined, and SPGD with and without them
            small "paper_$s" 4
            small "few_images_$s" 4 --preset few_images
            small "few_images_batch50_$s" 4 --preset few_images --batch_size 50
            small "cosine_$s" 4 --preset transfer --loss cosine
            small "feature_$s" 4 --loss feature
            small "momentum_$s" 4 --momentum 0.9
            small "augment_$s" 4 --augment --momentum 0
            small "batch50_$s" 4 --batch_size 50
            small "spgd_$s" 16 --method spgd
            small "spgd_transfer_$s" 16 --method spgd --preset transfer ;;
        adam)    # the losses of Cos-UAP and FG-UAP with FG-UAP's optimiser and batch
            small "adam_cosine_$s" 16 --method adam --loss cosine --batch_size 32
            small "adam_feature_$s" 16 --method adam --loss feature --batch_size 32 ;;
        maximin) # DM-UAP with its batch; 21 gradients per image in each outer step
            small "maximin_$s" 4 --method dm --batch_size 125 ;;
        long)    # 1,600 to 32,000 gradients
            for epochs in 1 2 4 10 20; do
                small "transfer_$s" "$epochs" --preset transfer
            done ;;
        surrogates)
            for m in squeezenet1_1 mobilenet_v2; do
                run "transfer_${m}_$s" 4 --model_name "$m" --seed "$s" --preset transfer
            done ;;
        images)  # the same number of gradients from fewer photographs
            for n in 25 50 100 200 400; do
                small "transfer_n${n}_$s" $((1600 / n)) --preset transfer --num_images "$n"
                small "paper_n${n}_$s" $((1600 / n)) --num_images "$n"
                small "momentum_n${n}_$s" $((1600 / n)) --momentum 0.9 --num_images "$n"
            done ;;
        floor)   # a network that never saw an image
            (WEIGHTS=random; small "random_network_$s" 4 --preset transfer) ;;
        esac
    done
done
[ -d "$RUNS/uaps/signs" ] || "$PYTHON" - "$RUNS/uaps/signs" <<'END'
import json
import pathlib
import sys
import torch

folder = pathlib.Path(sys.argv[1])  # the floor: random signs of the largest size
folder.mkdir(parents=True)
signs = torch.randint(2, (3, 224, 224), generator=torch.Generator().manual_seed(0)) * 2 - 1
torch.save(signs * 10 / 255, folder / "signs.pth")
(folder / "signs.json").write_text(json.dumps({"kind": "imagenet", "scale": 1}))
END
"$PYTHON" src/eval_uap.py --uaps "$RUNS/uaps" --data_dir "$SAMPLE/val" --weights "$WEIGHTS" \
    --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --save "$RUNS/eval"
