#!/bin/sh
# Natural, free, K-PGD and fast training, then all the networks under attack in one table. Flags go
# to free_at.py.
#   sh src/train_free.sh                                            digits, offline
#   DATA=mnist REPLAYS="2 4 8" sh src/train_free.sh                 free with three values of m
#   DATA=cifar10 sh src/train_free.sh --schedule onecycle           PreActResNet-18; needs a GPU
#   DATA=cifar10 METHODS="natural free pgd" sh src/train_free.sh --recipe free    WRN-32-10; needs a GPU
# shellcheck disable=SC2086  # lists, separated by spaces
set -eu
DATA=${DATA:-digits}                         # digits, mnist, cifar10, cifar100, or a folder
MODEL=${MODEL:-}                             # network; empty: the data set's own (digits: mlp)
METHODS=${METHODS:-natural free pgd fast}    # what to train
REPLAYS=${REPLAYS:-}                         # m of free; several, separated by spaces; empty: 8, or
                                             # that of --recipe or --replays
RUNS=${RUNS:-runs/free}                      # parent folder of the runs; the table is in it too
EVAL_IMAGES=${EVAL_IMAGES:-}                 # test images to attack; empty: all
PROCESSES=${PROCESSES:-}                     # processes that share a training, then the images; empty: one

. "$(dirname "$0")/env.sh"
again=
case " $* " in *" --overwrite "*) again=--overwrite ;; esac
case " $* " in *" --recipe"* | *" --replays"*) ;; *) REPLAYS=${REPLAYS:-8} ;; esac
trained=
train() {  # train NAME FLAG...
    name=$1; shift
    trained="$trained $name"
    "$PYTHON" $torchrun "$root/src/free_at.py" --data_dir "$DATA" ${MODEL:+--model_name "$MODEL"} \
        --save "$RUNS/$name" "$@"
}
for method in $METHODS; do
    if [ "$method" = free ] && [ "$REPLAYS" ]; then
        for m in $REPLAYS; do train "free$m" --method free --replays "$m" "$@"; done
    else
        train "$method" --method "$method" "$@"
    fi
done
table "$trained" "$again ${EVAL_IMAGES:+--num_images $EVAL_IMAGES}" "$@"
