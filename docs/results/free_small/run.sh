#!/bin/sh
# Natural, free, K-PGD and fast training of a smaller network on CIFAR-10: an hour on one
# thread, then the attacks.
#   sh docs/results/free_small/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
DATA=${DATA:-cifar10}            # we used the same images as a folder of JPEG files
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/free_small}

train() {  # train NAME FLAG...
    name=$1; shift
    "$PYTHON" src/free_at.py --data_dir "$DATA" --model_name cnn_bn --epochs 8 \
        --schedule onecycle --amp bf16 --save "$RUNS/$name" --resume "$@"
}
train natural --method natural
for m in 2 4 8; do train "free$m" --method free --replays "$m"; done
train pgd --method pgd
train fast --method fast
"$PYTHON" src/eval_net.py --runs "$RUNS/natural" "$RUNS/free2" "$RUNS/free4" "$RUNS/free8" \
    "$RUNS/pgd" "$RUNS/fast" --num_images 300 --save "$RUNS"
