#!/bin/sh
# Ten perturbations from 400 photographs, measured on 300 others with three networks. On one thread
# while other jobs ran, a run of SGA took about 20 minutes in bf16 and 40 in float32.
#   sh docs/results/uap_photographs/run.sh        from the root of the repository
set -eu
SAMPLE=${SAMPLE:-sample}         # photographs, made by docs/results/sample.sh
WEIGHTS=${WEIGHTS:-V1}           # torchvision's; we used others, see docs/data.md
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/uap_photographs}

run() {  # run NAME FLAG...
    name=$1; shift
    "$PYTHON" src/train_sga.py --data_dir "$SAMPLE/train" --model_name squeezenet1_0 \
        --weights "$WEIGHTS" --layout channels_last --save "$RUNS/$name" --resume "$@"
}
for s in 0 1 2; do run "sga_bf16_$s" --amp bf16 --seed "$s"; done
for s in 0 1; do run "aug_bf16_$s" --amp bf16 --seed "$s" --augment; done
for s in 0 1 2; do run "spgd_bf16_$s" --amp bf16 --seed "$s" --method spgd; done
run sga_f32_0 --amp off
run spgd80_bf16_0 --amp bf16 --method spgd --epochs 80
"$PYTHON" src/eval_uap.py --uaps "$RUNS" --data_dir "$SAMPLE/val" --weights "$WEIGHTS" \
    --model_name squeezenet1_0 squeezenet1_1 mobilenet_v2 --save "$RUNS/eval"
