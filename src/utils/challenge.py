"""For train_gcm.py: settings, the random choices of a weight step, and what a run saves.

Stage 1 is the authors' last script with FGSM (b42da2e, April 2022), stage 2 the one they released
(dab6e50, May 2022).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from utils import draw, run
from utils.augment import OPS, PRESETS
from utils.data import NAMED, hold_out, need_labels, opened
from utils.errors import UserError
from utils.models import check_name, input_size
from utils.precision import training_amp
from utils.sources import beside_runs, label_of
from utils.weights import head_of, weights_path

STAGES = {
    1: {"defense": "gcm", "augment": ["phase1"], "cutmix_prob": 0.3, "w_cutmix": 0.0,
        "w_fgsm": 1.0, "w_fgsm_target": 1.0},
    2: {"defense": "gcm+resizepad", "augment": ["released"], "cutmix_prob": 0.0, "w_cutmix": 1.0,
        "w_fgsm": 0.0, "w_fgsm_target": 0.0}}
RATES = {1: 1.0, 2: 0.1}  # factor of the learning rates, by stage
TERMS = {"w_clean": 1, "w_mixup": 1, "w_cutmix": 1, "w_fgsm": 2, "w_fgsm_target": 2}
DEFAULTS = {  # of these flags, by kind of data
    "digits": {"model_name": "cnn_bn", "epochs": 20, "batch_size": 64, "lr_head": 5e-3,
               "lr_backbone": 5e-3, "step_epochs": 15},
    "mnist": {"model_name": "cnn_bn", "epochs": 8, "batch_size": 128, "lr_head": 5e-3,
              "lr_backbone": 5e-3, "step_epochs": 6},
    "cifar10": {"model_name": "resnet_small", "epochs": 30, "batch_size": 128, "lr_head": 5e-3,
                "lr_backbone": 5e-3, "step_epochs": 20},
    "imagenet": {"model_name": "convnext_tiny", "epochs": 140, "batch_size": 320, "lr_head": 1e-3,
                 "lr_backbone": 1e-4, "step_epochs": 70}}
DEFAULTS |= {"cifar100": DEFAULTS["cifar10"], "folder": DEFAULTS["imagenet"]}


def settle(args, team, device):
    """Fills in flags that were not typed. -> frozen settings, training images, held-out images

    UserError: flags that cannot work.
    """
    images = opened(args, "train")
    need_labels(images, args.data_dir)
    preset = STAGES[args.stage] | DEFAULTS[images.kind]
    preset |= {flag: RATES[args.stage] * preset[flag] for flag in ("lr_head", "lr_backbone")}
    preset["p"] = 0.1
    s = run.settled(args, **{k: v for k, v in preset.items() if getattr(args, k) is None})
    check_name(s.model_name, images.kind)
    name = s.data_dir if s.data_dir in NAMED else images.kind
    path = s.save or Path("runs") / f"gcm_{name}_{label_of(s.model_name)}" / f"stage{s.stage}"
    pretrained, head = _start(s, path)
    size = s.image_size or input_size(s.model_name, images.kind, images.size, pretrained)
    s = run.settled(s, save=path, pretrained=pretrained, head=head, image_size=size,
                classes=list(images.classes), classes_are=args.classes,
                chances=_chances(s, args.p is not None), amp=training_amp(s.amp, device))
    images = images.prepared(size, s.num_images)
    held = hold_out(images.labels, s.hold_out)
    _check(s, len(images), int(held.sum()), team)
    return s, *(images.select(part.nonzero()[:, 0].tolist()) for part in (~held, held))


def _start(s, path):
    """The weights and the head that a run in `path` starts from."""
    first = path.parent / "stage1" / f"stage1_{label_of(s.model_name)}.pth"
    if s.stage == 2 and s.pretrained is None and not first.is_file():
        raise UserError(f"--stage 2: no {first}; type --stage 1 first, or --pretrained PATH")
    pretrained = s.pretrained or (str(first) if s.stage == 2 else "random")
    file = weights_path(s.model_name, pretrained, "--pretrained")
    found = head_of(file) if file else None
    return pretrained, s.head or (found[0] if found else "fc")


def _chances(s, typed):
    """{operation: probability} of --augment and --p; typed: whether --p was."""
    groups = {"all": list(OPS), "none": []}
    alone = next((name for name in s.augment if name in (*PRESETS, *groups)), None)
    if alone and len(s.augment) > 1:
        raise UserError(f"--augment {','.join(s.augment)}: {alone} cannot be combined; type it "
                        "alone, or names of operations")
    if alone in PRESETS:
        if typed:
            raise UserError(f"--p {s.p}: --augment {alone} has probabilities of its own; leave out "
                            "--p, or type --augment all or names of operations")
        return PRESETS[alone]
    chosen = groups.get(alone, s.augment)
    if typed and not chosen:
        raise UserError(f"--p {s.p}: --augment none has no operations; leave out one of them")
    for name in chosen:
        if name not in OPS:
            raise UserError(f"--augment {name}: wanted {', '.join(PRESETS)}, all, none, or some of "
                            + ", ".join(OPS))
    return dict.fromkeys(chosen, s.p)


def _check(s, count, held, team):
    """UserError if these settings cannot work on `count` images, `held` of them held out."""
    if s.fgsm_eps[0] > s.fgsm_eps[1]:
        raise UserError("--fgsm_eps {} {}: type the smaller one first".format(*s.fgsm_eps))
    if not number_of_terms(s):
        raise UserError(" ".join(f"--{flag} 0" for flag in TERMS) + ": nothing to train on")
    if not held:
        raise UserError(f"--hold_out {s.hold_out}: holds out none of {count} images; type more")
    if s.batch_size > count - held:
        raise UserError(f"--batch_size {s.batch_size}: there are {count - held} training images; "
                        "type a smaller --batch_size")
    if s.batch_size < team.size:
        raise UserError(f"--batch_size {s.batch_size}: there are {team.size} processes; wanted an "
                        "image for each")
    if len(s.classes) < 2:
        raise UserError(f"--data_dir {s.data_dir}: one class, '{s.classes[0]}'; wanted a folder "
                        "for each class, or an image list")


# ------------------------------------------------------------ a weight step, the end of a run

def number_of_terms(s):
    """Number of terms in a minibatch's loss; FGSM has one for each sign."""
    return sum(n for flag, n in TERMS.items() if getattr(s, flag))


@dataclass(frozen=True)
class Drawn:
    """The random choices for a minibatch, the same for any number of processes."""
    cutmix: bool          # whether CutMix replaces the clean images
    eps: float            # of FGSM
    eps_target: float     # of targeted FGSM
    target: torch.Tensor  # (N,) its target classes; one may be the true class


def draw_once(n, s, generator):
    """Drawn for a minibatch of n images."""
    cutmix = torch.rand((), generator=generator).item() < s.cutmix_prob
    radii = torch.linspace(*s.fgsm_eps, 20)
    eps = radii[torch.randint(20, (2,), generator=generator)].tolist()
    return Drawn(cutmix, *eps, torch.randint(len(s.classes), (n,), generator=generator))


def tensorboard():
    """TensorBoard's SummaryWriter; UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: it is not installed; type pip install tensorboard, or "
                        "leave out the flag (log.csv has the same)") from None
    return SummaryWriter


def name_of(s):
    """The name of the run's network."""
    return f"stage{s.stage}_{label_of(s.model_name)}"


def finish(training, folder):
    """Saves the best epoch's network, the facts about its training, and the curve."""
    s, name = training.s, name_of(training.s)
    facts = {"name": name, "kind": training.images.kind, "data_dir": str(s.data_dir),
             **run.result_flags(s, "num_images", "device", "tensorboard", "chances"),
             "given_images": s.num_images, "best_epoch": training.best["epoch"],
             "best_score": training.best["score"], "processes": training.team.size,
             "num_images": len(training.images), "held_out": len(training.held),
             "images_sha256": training.images.sha256(), "seconds": training.seconds,
             **run.provenance(training.device, s.deterministic)}
    run.save_pth(folder / f"{name}.pth", training.best["net"])
    run.save_json(folder / f"{name}.json", facts)
    run.write_atomic(folder / "curve.png", draw.training_curve(
        training.rows, name, val_acc="held-out images", val_aug_acc="the same, augmented"))
    print(f"saved {folder / name}.pth; to measure it: python eval_net.py --runs {folder.path}"
          + beside_runs(s.model_name))
