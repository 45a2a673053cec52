"""For fgsm_mnist.py: its optimisers, and the flags filled in for a data set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.data import load, open_both
from utils.errors import UserError
from utils.run import settled

EPOCHS, CURVE_IMAGES = 50, 500              # of MNIST
DIGITS_EPOCHS, DIGITS_CURVE_IMAGES = 30, 100


@dataclass(frozen=True)
class Optimizer:
    """make(parameters, lr), and the learning rate used if --lr is None."""
    make: Callable
    lr: float


OPTIMIZERS = {"adam": Optimizer(torch.optim.Adam, 1e-3), "sgd": Optimizer(torch.optim.SGD, 0.05)}


def settle(args):
    """-> the flags with every None filled in, training images, test images

    UserError: data of another kind, or too few images.
    """
    images, test = open_both(args.data_dir, args.data_root)
    if images.kind not in ("digits", "mnist", "cifar10"):
        raise UserError(f"--data_dir {args.data_dir}: wanted digits, mnist or cifar10, or a folder "
                        "that holds one of the last two")
    test = load(test, workers=0)
    images = load(images.prepared(images.size, args.num_images), workers=0)
    if len(images) < 2:
        raise UserError(f"--num_images {len(images)}: BatchNorm has no statistics of one image; "
                        "wanted two at least")
    label = args.label
    if label == "predicted" and args.train in ("clean", "noise"):
        print(f"--label predicted: --train {args.train} has no attack; left out", flush=True)
        label = "true"
    name, digits = args.train + "_bn" * args.batch_norm, images.kind == "digits"
    lr = OPTIMIZERS[args.optimizer].lr if args.lr is None else args.lr
    watched = args.curve_images
    if watched is None:
        watched = DIGITS_CURVE_IMAGES if digits else CURVE_IMAGES
    return settled(
        args, name=name, lr=lr, label=label, curve_images=watched,
        epochs=args.epochs or (DIGITS_EPOCHS if digits else EPOCHS),
        save=args.save or Path("runs") / f"{images.kind}_{name}"), images, test
