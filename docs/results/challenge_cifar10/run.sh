#!/bin/sh
# The challenge's classifier on 25,000 images of CIFAR-10: both stages with the published losses, and
# stage 1 without FGSM and without augmentation. Training, then the attacks, on one thread.
#   sh docs/results/challenge_cifar10/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
DATA=${DATA:-cifar10}            # we used the same images as a folder of JPEG files
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/challenge_cifar10}

train() {  # train NAME FLAG...
    name=$1; shift
    "$PYTHON" src/train_gcm.py --data_dir "$DATA" --num_images 25000 --amp bf16 \
        --save "$RUNS/$name" --resume "$@"
}
attack() {  # attack NAME STAGE DEFENCE FOLDER FLAG...
    weights=$RUNS/$1/stage$2_resnet_small.pth defence=$3 folder=$RUNS/$1/$4; shift 4
    "$PYTHON" src/gcm.py --data_dir "$DATA" --num_images 300 --model_name resnet_small \
        --weights "$weights" --defense "$defence" --save "$folder" "$@"
}
train stage1 --epochs 16 --step_epochs 11
train nofgsm --epochs 16 --step_epochs 11 --w_fgsm 0 --w_fgsm_target 0
train plain --epochs 16 --step_epochs 11 --augment none
train stage2 --stage 2 --epochs 6 --step_epochs 4
for name in stage1 nofgsm plain; do attack "$name" 1 gcm gcm; done
attack stage2 2 gcm+resizepad gcm
attack stage2 2 resizepad resizepad
for name in stage1 nofgsm; do attack "$name" 1 none strongest --attacks pgd_linf strongest_quick; done
attack stage2 2 none strongest --attacks pgd_linf strongest_quick
"$PYTHON" src/eval_net.py --runs "$RUNS/stage1" "$RUNS/nofgsm" "$RUNS/plain" "$RUNS/stage2" \
    --attacks none --corruptions --num_images 1000 --save "$RUNS"
