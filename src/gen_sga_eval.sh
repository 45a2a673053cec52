#!/bin/sh
# Fooling ratios of what train.sh made, on five target networks; flags of eval_uap.py pass through.
#   sh src/gen_sga_eval.sh                         all perturbations in runs/, one to two minutes
#   DATA=/data/imagenet/val sh src/gen_sga_eval.sh                those made on ImageNet
#   DATA=/data/imagenet/val UAPS="a.pth b.npy" MODELS="vgg16 resnet50" sh src/gen_sga_eval.sh
set -eu
DATA=${DATA:-digits}     # as in train.sh; its test split is used
UAPS=${UAPS:-runs}       # files, or folders with runs on this kind of data
MODELS=${MODELS:-}       # targets; empty: the data set's five (ImageNet: the paper's)
PROCESSES=${PROCESSES:-} # processes that share the images; empty: one

. "$(dirname "$0")/env.sh"
# shellcheck disable=SC2086  # lists, separated by spaces
exec "$PYTHON" $torchrun "$root/src/eval_uap.py" --data_dir "$DATA" --uaps $UAPS \
    ${MODELS:+--model_name $MODELS} "$@"
