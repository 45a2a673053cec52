#!/bin/sh
# Natural, free, K-PGD and fast training of a small network on all of CIFAR-10, with the same number
# of weight steps each: about three hours on one thread, then the attacks. Finished runs are kept; a
# stopped run continues from its checkpoint.
#   METHODS="natural free8 pgd" sh docs/results/free_cifar10/run.sh     from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
DATA=${DATA:-cifar10}            # we used the same images as a folder of JPEG files
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/free_cifar10}
METHODS=${METHODS:-natural free2 free4 free8 pgd fast}  # or fast_stop instead of fast
N=${N:-1000}                     # test images to attack

train() {  # train NAME FLAG...
    name=$1; shift
    ls "$RUNS/$name"/*_small.pth > /dev/null 2>&1 && return
    "$PYTHON" src/free_at.py --data_dir "$DATA" --model_name docs/results/free_cifar10/net.py:small \
        --weight_steps 4692 --schedule onecycle --amp bf16 --save "$RUNS/$name" --resume "$@"
}
runs=
for name in $METHODS; do
    case $name in
    free*) train "$name" --method free --replays "${name#free}" ;;
    fast_stop) train "$name" --method fast --guard stop ;;
    *) train "$name" --method "$name" ;;
    esac
    runs="$runs $RUNS/$name"
done
[ "$N" = 0 ] || "$PYTHON" src/eval_net.py --runs $runs --num_images "$N" --save "$RUNS/eval" \
    --model_name docs/results/free_cifar10/net.py:small --attacks fgsm pgd20 pgd50x10 cw50 autoattack
