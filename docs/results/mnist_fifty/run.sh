#!/bin/sh
# Training against FGS for all fifty epochs, one seed: 321 s of training on two cores.
#   sh docs/results/mnist_fifty/run.sh        from the root of the repository
set -eu
DATA=${DATA:-mnist}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/mnist_fifty}

"$PYTHON" src/fgsm_mnist.py --data_dir "$DATA" --train fgs --save "$RUNS" "$@"
