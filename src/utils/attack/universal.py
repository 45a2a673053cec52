"""For universal perturbations: losses to ascend, Adam, the layer that a loss compares, diversity.

    ce, logit   of the label: a loss of (logits, y)
    cosine      -cos(logits of x + delta, logits of x)             Cos-UAP, Zhang et al., ICCV 2021
    feature     the same, of the last feature map before pooling   FG-UAP, arXiv:2209.13113

The last two need no labels. They compare the network's outputs with those for the clean image.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from utils.attack.random_layers import drawing_from
from utils.errors import UserError

LOSSES = ("ce", "logit", "cosine", "feature")
ADAMS = ("adam", "dm")    # methods whose outer step is Adam's
COMPARING = LOSSES[2:]  # they compare outputs for the perturbed and the clean image


def clamped_ce(logits, y, beta):
    """mean(min(CE, beta)); an image past beta counts as fooled and gives no gradient. Sec. 3.1"""
    return F.cross_entropy(logits, y, reduction="none").clamp(max=beta).mean()


def logit_loss(logits, y):
    """Minus the mean logit of the label."""
    return -logits.gather(1, y[:, None]).mean()


def cosine_loss(h, clean):
    """Minus the mean cosine of outputs (N, D) and those for the clean images (N, D).

    At delta = 0 its gradient is zero up to rounding errors, whose signs move delta off zero.
    """
    return -F.cosine_similarity(h, clean).mean()


def make_loss(name, beta, target):
    """loss(outputs (N, D), labels (N,) or clean outputs (N, D)) to ascend.

    With a target: minus the loss of the logits towards it.
    """
    if target is not None:  # y is unused; no clamp, which would drop images far from the target
        plain = F.cross_entropy if name == "ce" else logit_loss
        return lambda logits, y: -plain(logits, torch.full_like(y, target))
    if name in COMPARING:
        return cosine_loss
    return (lambda logits, y: clamped_ce(logits, y, beta)) if name == "ce" else logit_loss


def drawn(j, index, x, delta, y, *, augment=None, chance=None):
    """Arguments of gradient() for step j, on the images `index` of a batch x: these images, warped;
    delta; their y; and, behind a random defence, the Chance that it draws from.

    augment (M, n, 2, 3): an affine map for every image of every step; chance: the batch's.
    """
    batch = x[index] if augment is None else warp(x[index], augment[j])
    own = () if chance is None else (chance[index].fold(j),)
    return batch, delta, picked(y, index), *own


def picked(y, index):
    """Each model's labels or outputs for the images `index`; None stays None."""
    return [of_model if of_model is None else of_model[index] for of_model in y]


def drawing(chance):
    """Context in which random layers draw from `chance`; None: from their own generators."""
    return nullcontext() if chance is None else drawing_from(chance)


# ------------------------------------------------------------------ the outer step

def adam_step(delta, g, v, *, eps, alpha, step, betas=(0.9, 0.999)):
    """One ascent step of Adam (Kingma and Ba, Alg. 1), as in FG-UAP. -> delta, v

    v (2, C, H, W): running means of g and of g * g; step: counted from 1.
    """
    v = torch.cat([b * mean + (1 - b) * new for b, mean, new
                   in zip(betas, v.split(1), (g, g * g), strict=True)])
    mean, square = (of / (1 - b ** step) for b, of in zip(betas, v.split(1), strict=True))
    return (delta + alpha * mean / (square.sqrt() + 1e-8)).clamp(-eps, eps), v


# ------------------------------------------------------------- the last feature map

class _Reached(Exception):
    """Carries the layer's output out of the forward pass."""


class Features(nn.Module):
    """(N, C, H, W) -> (N, D) float32: the output of one layer of a model, flattened.

    layer: the module's name in model.named_modules(). Later layers are not computed.
    """

    def __init__(self, model, layer):
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x):
        def stop(module, args, out):
            raise _Reached(out)

        handle = self.model.get_submodule(self.layer).register_forward_hook(stop)
        try:
            self.model(x)
        except _Reached as reached:
            return reached.args[0].flatten(1).float()
        finally:
            handle.remove()
        raise AssertionError(f"{self.layer} has no part in the forward pass")


POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
AFTERWARDS = (*POOLING, nn.LayerNorm, nn.Dropout, nn.Identity)  # give no feature map of their own


def layers_of(models, s, x):
    """For each Sequential(first layer, net), the layer for --loss feature; [] for other losses.

    s: settings of train_sga.py; x (1, C, H, W) uint8. Names are those in the net.
    """
    if s.loss != "feature":
        return []
    given = s.layer or [None]
    if len(given) not in (1, len(models)):
        raise UserError(f"--layer {','.join(given)}: {len(given)} for {len(models)} networks; type "
                        "one for all, or one for each")
    x = (x / 255).repeat(2, 1, 1, 1)
    given = given * (len(models) // len(given))
    return [feature_layer(model[1], model[0](x), name, of=of)
            for model, name, of in zip(models, given, s.model_name, strict=True)]


def feature_layer(net, x, name=None, *, of="this network"):
    """The layer whose output --loss feature compares: `name`, or the last feature map of the net.

    x (N, C, H, W), N > 1: images as the net takes them; of: what an error calls the net.
    UserError: no such layer, none found, called more than once, or no tensor with a row per image.
    """
    calls, begins = _dry_run(net, x)
    if name is None:
        found = _last_feature_map(calls[:begins], len(x))
        if found is None:
            raise UserError(f"--loss feature: {of} has no feature map before its classifier; type "
                            "--layer NAME, or --loss cosine")
        return found
    outs = [out for called, _, out in calls if called == name]
    if not outs:
        some = ", ".join([called for called, *_ in calls if called.count(".") < 2][:12])
        raise UserError(f"--layer {name}: no such layer in the forward pass of {of}; wanted one of "
                        f"{some}")
    if len(outs) > 1 or not torch.is_tensor(outs[0]) or len(outs[0]) != len(x):
        raise UserError(f"--layer {name}: is called more than once in {of}, or gives no tensor "
                        "with a row for each image; type the block that it is in")
    return name


@torch.no_grad()
def _dry_run(net, x):
    """[(name, module, output)] as modules finish, and how many come before the classifier.

    The classifier is the last layer with weights; in SqueezeNet that is a convolution.
    """
    calls, begins, handles = [], [0], []
    for name, module in net.named_modules():
        if name:
            handles.append(module.register_forward_hook(
                lambda module, args, out, name=name: calls.append((name, module, out))))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(
                lambda module, args: begins.append(len(calls))))
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls, begins[-1]


def _last_feature_map(calls, n):
    """Name of the last module called once that gives n maps (C, H, W) or n token rows (T, D)."""
    names, without, found = [name for name, *_ in calls], set(), None
    for name, module, out in calls:
        if isinstance(module, AFTERWARDS):
            without.add(id(out))  # also rules out blocks that end with it: same tensor
        if (torch.is_tensor(out) and id(out) not in without and len(out) == n
                and out.ndim in (3, 4) and out[0].numel() > out.shape[1 if out.ndim == 4 else 2]
                and names.count(name) == 1):
            found = name
    return found


# ------------------------------------------------------------- input diversity

FLIP, SCALE, SHIFT, ROTATE = 0.5, (0.7, 1.3), 0.2, 0.0  # for --augment: docs/uap.md


def draw_maps(shape, generator):
    """Affine maps (*shape, 2, 3): random flip, scale, shift (share of the side), rotation."""
    u = torch.rand((5, *shape), generator=generator)
    flip = torch.where(u[0] < FLIP, -1.0, 1.0)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * u[1]
    angle = math.radians(ROTATE) * (2 * u[2] - 1)
    dx, dy = 2 * SHIFT * (2 * u[3:] - 1)  # affine_grid's side is 2 long
    cos, sin = angle.cos() / scale, angle.sin() / scale
    return torch.stack([torch.stack([flip * cos, -sin, dx], -1),
                        torch.stack([flip * sin, cos, dy], -1)], -2)


def warp(x, maps):
    """Warp every image by its own affine map, reflected at the borders. (N,C,H,W), (N,2,3)"""
    grid = F.affine_grid(maps, x.shape, align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.empty_like(x).copy_(moved)  # grid_sample does not keep x's memory layout
