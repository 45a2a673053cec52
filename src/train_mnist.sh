#!/bin/sh
# The exercise: trains all eight variations, then puts them into one table, one picture of curves and
# one of examples. Flags of fgsm_mnist.py are passed on.
#   sh src/train_mnist.sh                                     digits, offline, a minute and a half
#   DATA=mnist sh src/train_mnist.sh --seeds 3                MNIST, downloaded by torchvision
#   DATA=mnist TRAIN="fgs" sh src/train_mnist.sh --epochs 10  fgs alone, with and without BatchNorm
set -eu
DATA=${DATA:-digits}                     # digits, mnist, cifar10, or a folder that holds MNIST
TRAIN=${TRAIN:-clean noise fgs fgv}      # what is added to the clean batches
RUNS=${RUNS:-runs/exercise}              # parent folder of the runs

. "$(dirname "$0")/env.sh"
trained=
for bn in "" _bn; do
    for name in $TRAIN; do
        trained="$trained $name$bn"
        "$PYTHON" "$root/src/fgsm_mnist.py" --data_dir "$DATA" --train "$name" \
            ${bn:+--batch_norm} --save "$RUNS/$name$bn" "$@"
    done
done
set --
for name in $trained; do set -- "$@" "$RUNS/$name"; done
exec "$PYTHON" "$root/src/fgsm_mnist.py" --summary "$@" --save "$RUNS"
