#!/bin/sh
# All eight variations of the exercise for all fifty epochs with Adam, training on FGS also with the
# sheet's own step (SGD), three seeds each; PGD-40 on 500 test images after every epoch; at the end
# PGD-50-10 and AutoAttack on 1000. Flags of fgsm_mnist.py are passed on.
#   sh docs/results/mnist_fifty/run.sh        from the root of the repository
# The same command continues stopped runs and skips finished ones. Two processes can share the work,
# each with its own variations; then the plain command makes the tables:
#   TRAIN="clean noise" SGD="" TABLES="" sh docs/results/mnist_fifty/run.sh
#   TRAIN="fgs fgv" TABLES="" sh docs/results/mnist_fifty/run.sh
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
DATA=${DATA:-mnist}                     # downloaded, or a folder that holds MNIST
TRAIN=${TRAIN-clean noise fgs fgv}      # variations with Adam
SGD=${SGD-fgs}                          # variations with SGD
TABLES=${TABLES-yes}                    # empty: only train
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/mnist_fifty}
flags=$*

all() {  # all OPTIMIZER PREFIX VARIATION...: trains those not finished, then makes their table
    optimizer=$1 prefix=$2 folders=
    shift 2
    for bn in "" _bn; do
        for name in "$@"; do
            save=$RUNS/$prefix$name$bn
            folders="$folders $save"
            seeds="$seeds $save/seed[0-9]*"
            if [ -f "$save/results.json" ]; then continue; fi
            # shellcheck disable=SC2086  # lists, separated by spaces
            "$PYTHON" src/fgsm_mnist.py --data_dir "$DATA" --optimizer "$optimizer" \
                --train "$name" ${bn:+--batch_norm} --seeds 3 --save "$save" --resume $flags
        done
    done
    if [ -z "$TABLES" ] || [ $# = 0 ]; then return 0; fi
    # shellcheck disable=SC2086
    "$PYTHON" src/fgsm_mnist.py --summary $folders --save "$RUNS/$optimizer"
}
seeds=
# shellcheck disable=SC2086
all adam "" $TRAIN
# shellcheck disable=SC2086
all sgd sgd_ $SGD
if [ -z "$TABLES" ]; then exit 0; fi
# shellcheck disable=SC2086
exec "$PYTHON" src/eval_net.py --runs $seeds --num_images 1000 --attacks pgd50x10 autoattack \
    --save "$RUNS/eval"
