"""Settings of free_at.py: presets for data sets, recipes from papers, learning rates.

    --recipe            published in                                  for
    free                Shafahi et al. 2019, arXiv:1904.12843         cifar10, cifar100, imagenet
    madry               Madry et al. 2018, arXiv:1706.06083           cifar10
    fast_adversarial    Wong et al. 2020, arXiv:2001.03994: their     cifar10
                        own free training, train_free.py

A typed flag overrides the recipe, which overrides the data set's preset. Two presets are not from
a paper: cifar100's is cifar10's; that of class folders is imagenet's with a smaller network, a
quarter of the batch size and a quarter of the learning rate.
"""

import math

import torch

from utils.data import need_labels, opened, unseen
from utils.errors import UserError
from utils.models import check_name, check_takes, input_size
from utils.precision import training_amp
from utils.run import settled
from utils.weights import weights_path

EVERYWHERE = {"method": "free", "replays": 8, "clip_delta": "ball", "steps": 7, "schedule": "step",
              "decay": "all", "shift": 4, "weight_steps": None}
FREE_PRESETS = {  # alpha: for pgd, at this eps
    "digits": {"eps": 0.1, "alpha": 0.025, "model_name": "mlp", "epochs": 80, "batch_size": 64,
               "lr": 0.03, "weight_decay": 0.0},
    "mnist": {"eps": 0.3, "alpha": 0.05, "model_name": "cnn", "epochs": 16, "batch_size": 128,
              "lr": 0.03, "weight_decay": 0.0},
    "cifar10": {"eps": 8 / 255, "alpha": 2 / 255, "model_name": "preact_resnet18", "epochs": 80,
                "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4},
    "imagenet": {"eps": 4 / 255, "alpha": 1 / 255, "model_name": "resnet50", "epochs": 90,
                 "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4}}
FREE_PRESETS["cifar100"] = FREE_PRESETS["cifar10"]
FREE_PRESETS["folder"] = FREE_PRESETS["imagenet"] | {"model_name": "resnet18", "batch_size": 64,
                                                     "lr": 0.025}
TENSORFLOW = {"model_name": "wrn_32_10", "weight_steps": 80_000, "batch_size": 128, "lr": 0.1,
              "schedule": "step", "weight_decay": 2e-4, "decay": "weights", "shift": 2}
OF_PAPERS = {  # what a recipe has in common with the data set's preset is not repeated
    "free": {"cifar10": {**TENSORFLOW, "method": "free", "replays": 8},
             "cifar100": {**TENSORFLOW, "method": "free", "replays": 8},
             "imagenet": {"model_name": "resnet50", "method": "free", "replays": 4, "epochs": 90,
                          "batch_size": 256, "lr": 0.1, "schedule": "thirds",
                          "weight_decay": 1e-4}},
    "madry": {"cifar10": {**TENSORFLOW, "method": "pgd", "steps": 7}},
    "fast_adversarial": {"cifar10": {
        "model_name": "preact_resnet18", "method": "free", "replays": 8, "clip_delta": "box",
        "epochs": 80, "batch_size": 128, "lr": 0.04, "schedule": "triangle",
        "weight_decay": 5e-4}}}

FALLS = {"step": (1 / 2, 3 / 4), "thirds": (1 / 3, 2 / 3)}  # to a tenth, after these shares
PEAKS = {"onecycle": 0.4, "triangle": 0.5}                  # from 0 up to here, and down to 0


def rate(done, total, schedule, n_passes):
    """Share of the highest rate after `done` of `total` weight steps in n_passes passes."""
    t = done / total
    if schedule in PEAKS:
        peak = PEAKS[schedule]
        return t / peak if t < peak else (1 - t) / (1 - peak)
    falls = FALLS[schedule]
    if schedule == "thirds":  # drops only between two passes
        falls = [math.ceil(n_passes * fall) / n_passes for fall in falls]
    return (1.0, 0.1, 0.01)[sum(t >= fall for fall in falls)]


def passes(s, steps):
    """Number of passes over the images, of `steps` weight steps each; the last may be partial.

    Free training takes as many weight steps as the other methods.
    """
    if s.weight_steps:
        return math.ceil(s.weight_steps / steps)
    return math.ceil(s.epochs / s.replays) if s.method == "free" else s.epochs


def decayed(model, s):
    """The model's parameters for the optimiser; with --decay weights, those of BatchNorm and biases
    are a separate group without weight decay.
    """
    if s.decay == "all":
        return model.parameters()
    weights, others = ([p for p in model.parameters() if (p.dim() > 1) is kernel]
                       for kernel in (True, False))
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


# ------------------------------------------------------------------------ settings

def settle(args, team, device):
    """Fill in flags that were not typed. -> frozen settings, training images (not yet decoded)

    UserError: flags that cannot work.
    """
    images = opened(args, "train")
    need_labels(images, args.data_dir)
    s = settled(args, **_filled(args, images.kind), amp=training_amp(args.amp, device),
                classes=list(images.classes), classes_are=args.classes)
    if len(s.classes) < 2:
        raise UserError(f"--data_dir {args.data_dir}: one class, '{s.classes[0]}'; wanted a folder "
                        "for each class, or an image list")
    check_name(s.model_name, images.kind)
    size = s.image_size or _own_size(s, images)
    images, held = held_out(images.prepared(size, args.num_images), args)
    if not team.size <= s.batch_size <= len(images):
        raise UserError(f"--batch_size {s.batch_size}: there are {len(images)} training images and "
                        f"{team.size} processes; wanted an image for each process, and no more "
                        "than there are (two at least)")
    if held and team.first:
        print(f"--data_dir {args.data_dir}: no test split; {held} of {held + len(images)} images "
              "are held out (--hold_out), on which eval_net.py measures", flush=True)
    return settled(s, image_size=size, hold_out=args.hold_out if held else None), images


def _own_size(s, images):
    """Side in pixels of the images that --pretrained was trained on, or the network's usual one."""
    path = weights_path(s.model_name, s.pretrained, "--pretrained")
    return input_size(s.model_name, images.kind, images.size, str(path or "random"))


def check_network(model, s, channels, device):
    """UserError unless the network gives a logit for every class, for images of this size."""
    found = check_takes(model.eval(), s.model_name, channels, s.image_size, device)
    if found != len(s.classes):
        raise UserError(f"--model_name {s.model_name}: gives {found} numbers for an image; wanted "
                        f"{len(s.classes)}, one for each class: give its function an argument "
                        "num_classes, or make its last layer an nn.Linear")
    if not model(torch.zeros((2, channels, *[s.image_size] * 2), device=device)).requires_grad:
        raise UserError(f"--model_name {s.model_name}: its logits have no gradient, which training "
                        "needs; wanted a network that does not run under torch.no_grad")


def _filled(args, kind):
    """{flag: value}: typed values, else those of the recipe, else those of the presets."""
    recipe = OF_PAPERS.get(args.recipe, {kind: {}})
    if kind not in recipe:
        raise UserError(f"--recipe {args.recipe}: published for {', '.join(recipe)}, not for "
                        f"{kind}; leave it out, or type another --data_dir")
    if args.epochs and args.weight_steps:
        raise UserError(f"--epochs {args.epochs} --weight_steps {args.weight_steps}: type one of "
                        "the two")
    if args.shift is not None and (kind not in ("cifar10", "cifar100") or args.augment == "off"):
        raise UserError(f"--shift {args.shift}: only CIFAR's random crops are shifted, with "
                        f"--augment auto; given {kind}, --augment {args.augment}; leave it out")
    found = EVERYWHERE | FREE_PRESETS[kind] | recipe[kind]
    found |= {flag: getattr(args, flag) for flag in found if getattr(args, flag) is not None}
    if args.alpha is None:
        scale = found["eps"] / FREE_PRESETS[kind]["eps"]
        found["alpha"] = {"free": found["eps"], "fast": 1.25 * found["eps"],
                          "pgd": found["alpha"] * scale}.get(found["method"], found["alpha"])
    return found | ({"weight_steps": None} if args.epochs else
                    {"epochs": None} if found["weight_steps"] else {})


def held_out(images, args):
    """-> training images, number held out of them (0 if there is a test split)"""
    if images.root is None:  # a named data set
        return images, 0
    try:
        opened(args, "test")
    except UserError:  # there is one, but it cannot be read yet
        return images, 0
    held, apart = unseen(args.data_dir, args.data_root, args.hold_out, args.num_images,
                         args.labels, args.classes)
    if apart and not len(held):
        raise UserError(f"--data_dir {args.data_dir}: no test split, and --hold_out "
                        f"{args.hold_out} holds out none of {len(images)} images; type more")
    return (images.without(held.names), len(held)) if apart else (images, 0)
