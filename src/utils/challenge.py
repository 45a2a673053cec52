"""Settings of train_gcm.py: what data set and stage preset, and what is refused."""

from pathlib import Path

import torch

from utils.augment import OPS, PUBLISHED
from utils.data import NAMED, hold_out, open_images
from utils.errors import UserError
from utils.models import check_name, head_of, input_size, weights_path
from utils.run import settled

STAGES = {1: ("gcm", 1.0), 2: ("gcm+resizepad", 0.1)}  # defence, factor of the learning rates
DEFAULTS = {  # of these flags, by kind of data
    "digits": {"model_name": "cnn_bn", "epochs": 20, "batch_size": 64, "lr_head": 5e-3,
               "lr_backbone": 5e-3, "step_epochs": 15},
    "mnist": {"model_name": "cnn_bn", "epochs": 8, "batch_size": 128, "lr_head": 5e-3,
              "lr_backbone": 5e-3, "step_epochs": 6},
    "cifar10": {"model_name": "resnet_small", "epochs": 30, "batch_size": 128, "lr_head": 5e-3,
                "lr_backbone": 5e-3, "step_epochs": 20},
    "imagenet": {"model_name": "convnext_tiny", "epochs": 140, "batch_size": 320, "lr_head": 1e-3,
                 "lr_backbone": 1e-4, "step_epochs": 70}}
DEFAULTS["folder"] = DEFAULTS["imagenet"]


def settle(args, team, device):
    """Fills in what was not typed. -> frozen settings, training images, held-out images

    UserError: flags that cannot work.
    """
    images = open_images(args.data_dir, split="train", data_root=args.data_root)
    defense, factor = STAGES[args.stage]
    preset = {"defense": defense, **DEFAULTS[images.kind]}
    preset |= {flag: factor * preset[flag] for flag in ("lr_head", "lr_backbone")}
    s = settled(args, **{k: v for k, v in preset.items() if getattr(args, k) is None})
    check_name(s.model_name, images.kind)
    name = s.data_dir if s.data_dir in NAMED else images.kind
    path = s.save or Path("runs") / f"gcm_{name}_{s.model_name}" / f"stage{s.stage}"
    pretrained, head = _start(s, path)
    size = s.image_size or input_size(s.model_name, images.kind, images.size, pretrained)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    s = settled(s, save=path, pretrained=pretrained, head=head, image_size=size,
                classes=list(images.classes), chances=_chances(s),
                amp=s.amp if s.amp != "auto" else "bf16" if bf16 else "off")
    images = images.prepared(size, s.num_images)
    held = hold_out(images.labels, s.hold_out)
    _check(s, len(images), int(held.sum()), team)
    return s, *(images.select(part.nonzero()[:, 0].tolist()) for part in (~held, held))


def _start(s, path):
    """The weights and the head that a run in `path` starts from."""
    first = path.parent / "stage1" / f"stage1_{s.model_name}.pth"
    if s.stage == 2 and s.pretrained is None and not first.is_file():
        raise UserError(f"--stage 2: no {first}; type --stage 1 first, or --pretrained PATH")
    pretrained = s.pretrained or (str(first) if s.stage == 2 else "random")
    file = weights_path(s.model_name, pretrained, "--pretrained")
    found = head_of(file) if file else None
    return pretrained, s.head or (found[0] if found else "fc")


def _chances(s):
    """{operation: probability} of --augment and --p."""
    if s.augment == ["published"]:
        return PUBLISHED
    chosen = {"all": list(OPS), "none": []}.get(",".join(s.augment), s.augment)
    for name in chosen:
        if name not in OPS:
            raise UserError(f"--augment {name}: wanted published, all, none, or some of "
                            + ", ".join(OPS))
    return dict.fromkeys(chosen, s.p)


def _check(s, count, held, team):
    """UserError if these settings cannot work on `count` images, `held` of them held out."""
    if s.fgsm_eps[0] > s.fgsm_eps[1]:
        raise UserError("--fgsm_eps {} {}: type the smaller one first".format(*s.fgsm_eps))
    if not any((s.w_clean, s.w_mixup, s.w_cutmix, s.w_fgsm)):
        raise UserError("--w_clean 0 --w_mixup 0 --w_cutmix 0 --w_fgsm 0: nothing to train on")
    if not held:
        raise UserError(f"--hold_out {s.hold_out}: none of {count} images; type more")
    if s.batch_size > count - held:
        raise UserError(f"--batch_size {s.batch_size}: there are {count - held} training images; "
                        "type a smaller --batch_size")
    if s.batch_size < team.size:
        raise UserError(f"--batch_size {s.batch_size}: there are {team.size} processes; wanted an "
                        "image for each")
    if len(s.classes) < 2:
        raise UserError(f"--data_dir {s.data_dir}: one class, '{s.classes[0]}'; wanted a folder "
                        "for each class, or an image list")
