#!/bin/sh
# The robustness table of the Gradient Concealment Module; flags of gcm.py pass through.
#   sh src/gen_gcm_eval.sh                                      digits, offline
#   DATA=/data/imagenet/val sh src/gen_gcm_eval.sh              the paper's six networks
#   DATA=/data/imagenet/val MODELS=resnet50 DEFENSE=gcm+resizepad sh src/gen_gcm_eval.sh
#   sh src/gen_gcm_eval.sh --audit                              signs of gradient masking
set -eu
DATA=${DATA:-digits}     # as in train.sh; for a named data set, its test split
MODELS=${MODELS:-}       # networks; empty: the data set's five (ImageNet: the paper's six)
DEFENSE=${DEFENSE:-gcm}  # none, gcm, resizepad, gcm+resizepad
PROCESSES=${PROCESSES:-} # processes that share the images; empty: one

. "$(dirname "$0")/env.sh"
# shellcheck disable=SC2086  # lists, separated by spaces
exec "$PYTHON" $torchrun "$root/src/gcm.py" --data_dir "$DATA" --defense "$DEFENSE" \
    ${MODELS:+--model_name $MODELS} "$@"
