#!/bin/sh
# Trains both stages of the challenge's classifier, then makes a robustness table for each and one
# table of both stages' accuracy under corruptions. Any flag of train_gcm.py applies to both stages.
#   sh src/train_gcm.sh                                          digits, offline, 5 minutes
#   DATA=/data/train_phase1/label.txt sh src/train_gcm.sh        the challenge: ConvNeXt-T, needs a GPU
#   DATA=/data/photos PROCESSES=4 sh src/train_gcm.sh            four GPUs
# shellcheck disable=SC2086  # lists, separated by spaces
set -eu
DATA=${DATA:-digits}         # digits, mnist, cifar10, or a folder or list (docs/data.md)
MODEL=${MODEL:-}             # network, also timm/NAME; empty: convnext_tiny; for small images, the data set's own
RUNS=${RUNS:-runs/challenge}  # parent folder of the runs
EPOCHS2=${EPOCHS2:-}         # epochs of stage 2; empty: those of stage 1
ATTACKED=${ATTACKED:-}       # test images of the robustness tables; empty: all
TESTED=${TESTED:-}           # test images of the corruption table; empty: all
PROCESSES=${PROCESSES:-}     # processes that share a training, then the images; empty: one

. "$(dirname "$0")/env.sh"
again=
case " $* " in *" --overwrite "*) again=--overwrite ;; esac
measure() {  # measure WEIGHTS DEFENSE FLAG...: the robustness table, with the flags that gcm.py has too
    weights=$1 defense=$2 left=$(($# - 2))
    model=${weights##*/stage"$stage"_}
    model=${MODEL:-${model%.pth}}
    shift 2
    while [ "$left" -gt 0 ]; do
        flag=$1 left=$((left - 1))
        shift
        case $flag in
        --[a-z]*=*)  # flag and value in one word
            value=${flag#*=}
            flag=${flag%%=*} ;;
        --*)
            value=${1-} ;;
        esac
        case $flag in
        --data_root | --labels | --classes | --image_size | --low | --device | --cache | --workers)
            set -- "$@" "$flag" "$value" ;;
        --defense) defense=$value ;;
        --model_name) model=$value ;;
        esac
    done
    "$PYTHON" $torchrun "$root/src/gcm.py" --data_dir "$DATA" --weights "$weights" \
        --model_name "$model" --defense "$defense" \
        --save "$RUNS/stage$stage/gcm" ${ATTACKED:+--num_images "$ATTACKED"} $again "$@"
}
digest() {  # of the stage's network, if there is one
    cat "$RUNS/stage$stage"/stage"$stage"_*.pth 2>/dev/null | cksum
}
weights= epochs= defense=gcm
for stage in 1 2; do
    before=$(digest)
    "$PYTHON" $torchrun "$root/src/train_gcm.py" --stage $stage --data_dir "$DATA" \
        ${MODEL:+--model_name "$MODEL"} --save "$RUNS/stage$stage" "$@" \
        ${epochs:+--epochs "$epochs"} ${weights:+--pretrained "$weights"}
    [ "$before" = "$(digest)" ] || again=--overwrite  # the old network's tables are stale
    for weights in "$RUNS/stage$stage"/stage"$stage"_*.pth; do
        measure "$weights" "$defense" "$@"
    done
    epochs=$EPOCHS2 defense=gcm+resizepad  # of stage 2, which starts from these weights
done
table "stage1 stage2" "--corruptions --attacks none $again ${TESTED:+--num_images $TESTED}" "$@"
