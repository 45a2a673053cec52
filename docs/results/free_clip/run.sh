#!/bin/sh
# Free-8 training on the first 20,000 images of MNIST, with delta clipped to the ball alone (the
# paper's) and to the ball and [0, 1] (--clip_delta box), three seeds each. A run takes two minutes
# on one undisturbed thread, the attacks on all six a quarter of an hour.
#   sh docs/results/free_clip/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
DATA=${DATA:-mnist}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/free_clip}

for seed in 0 1 2; do
    for clip in ball box; do
        "$PYTHON" src/free_at.py --data_dir "$DATA" --num_images 20000 --epochs 16 --lr 0.03 \
            --schedule onecycle --amp bf16 --method free --replays 8 --clip_delta "$clip" \
            --seed "$seed" --save "$RUNS/${clip}_$seed" --resume
    done
done
"$PYTHON" src/eval_net.py --runs "$RUNS/ball_0" "$RUNS/ball_1" "$RUNS/ball_2" \
    "$RUNS/box_0" "$RUNS/box_1" "$RUNS/box_2" --num_images 300 --save "$RUNS"
