#!/bin/sh
# Makes a universal perturbation; flags of train_sga.py pass through.
#   sh src/train.sh                                           digits, offline, one to two minutes
#   DATA=/data/imagenet/train MODEL=vgg16 sh src/train.sh         the paper's setting
#   DATA=imagenette sh src/train.sh --preset transfer             downloaded; to fool other networks
#   PROCESSES=4 DATA=/data/imagenet/train sh src/train.sh --seed 0,1,2,3    a GPU for each seed
#   MODEL="cnn mlp" sh src/train.sh --target 3,5                  a perturbation for each of the four
set -eu
DATA=${DATA:-digits}     # digits, mnist, cifar10, imagenette, or a folder (docs/data.md)
MODEL=${MODEL:-}         # surrogates, one run each; a,b: one run on both; empty: the data set's own;
                         # paths with spaces: --model_name of train_sga.py
PROCESSES=${PROCESSES:-} # processes that share the runs, or the surrogates of one; empty: one

. "$(dirname "$0")/env.sh"
# shellcheck disable=SC2086  # a list, separated by spaces
exec "$PYTHON" $torchrun "$root/src/train_sga.py" --data_dir "$DATA" \
    ${MODEL:+--model_name $MODEL} "$@"
