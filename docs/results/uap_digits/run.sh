#!/bin/sh
# A perturbation for scikit-learn's digits, measured on five small networks: three minutes on one core,
# including the training of the networks.
#   sh docs/results/uap_digits/run.sh        from the root of the repository
set -eu
RUNS=${RUNS:-runs/uap_digits}
export OMP_NUM_THREADS=1  # with another number of threads the figures differ slightly

DATA=digits sh src/train.sh --amp off --layout contiguous --save "$RUNS/sga" "$@"
DATA=digits UAPS="$RUNS/sga/sga_cnn.pth" sh src/gen_sga_eval.sh --save "$RUNS/eval"
