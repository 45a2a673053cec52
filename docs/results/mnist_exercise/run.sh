#!/bin/sh
# All eight variations of the exercise on MNIST, three epochs, three seeds.
#   sh docs/results/mnist_exercise/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
DATA=${DATA:-mnist}
RUNS=${RUNS:-runs/mnist_exercise}

export DATA RUNS
sh src/train_mnist.sh --seeds 3 --epochs 3 "$@"
