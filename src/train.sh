#!/bin/sh
# Makes a universal perturbation; flags of train_sga.py pass through.
#   sh src/train.sh                                           digits, offline, one to two minutes
#   DATA=/data/imagenet/train MODEL=vgg16 sh src/train.sh         the paper's setting
#   DATA=imagenette sh src/train.sh --augment                     downloaded; ours, for few images
set -eu
DATA=${DATA:-digits}     # digits, mnist, cifar10, imagenette, or a folder (docs/data.md)
MODEL=${MODEL:-}         # surrogate; empty: the data set's own (digits: cnn, ImageNet: vgg16)

. "$(dirname "$0")/env.sh"
exec "$PYTHON" "$root/src/train_sga.py" --data_dir "$DATA" ${MODEL:+--model_name "$MODEL"} "$@"
