#!/bin/sh
# Natural, free, K-PGD and fast training on the first 20,000 images of MNIST. K-PGD starts from
# the naturally trained network, because from random weights it stayed at chance for five passes.
# free8 with each --clip_delta from three seeds, over which table.py takes the mean.
#   sh docs/results/free_mnist/run.sh        from the root of the repository
set -eu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # as we did
DATA=${DATA:-mnist}
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/free_mnist}

train() {  # train NAME FLAG...
    name=$1; shift
    "$PYTHON" src/free_at.py --data_dir "$DATA" --num_images 20000 --epochs 16 \
        --schedule onecycle --amp bf16 --save "$RUNS/$name" --resume "$@"
}
train natural --method natural --lr 0.03
for m in 2 4; do train "free$m" --method free --replays "$m" --lr 0.03; done
for clip in ball box; do
    for seed in 0 1 2; do
        train "free8_${clip}_$seed" --method free --replays 8 --clip_delta "$clip" --seed "$seed" \
            --lr 0.03
    done
done
train free8_alpha --method free --replays 8 --alpha 0.075 --lr 0.03
train pgd --method pgd --pretrained "$RUNS/natural/natural_cnn.pth" --lr 0.01
train fast --method fast --lr 0.03
"$PYTHON" src/eval_net.py --runs "$RUNS/natural" "$RUNS/free2" "$RUNS/free4" \
    "$RUNS/free8_ball_0" "$RUNS/free8_ball_1" "$RUNS/free8_ball_2" \
    "$RUNS/free8_box_0" "$RUNS/free8_box_1" "$RUNS/free8_box_2" \
    "$RUNS/free8_alpha" "$RUNS/pgd" "$RUNS/fast" --num_images 300 --save "$RUNS" \
    --attacks fgsm pgd20 pgd50x10 cw50 autoattack
"$PYTHON" docs/results/free_mnist/table.py "$RUNS"
