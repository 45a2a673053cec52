"""DM-UAP's inner minimisation (Zhang et al., AAAI 2025, arXiv:2503.12793): the gradient of delta is
taken at weights and images for which the surrogate is most confident of the labels.

    published code                         here
    ten steps of the weights, L2 norm rho  _surer_weights
    ten steps of the images, in L2         _surer_images
    both radii grow with the epochs        share

Unlike the published code, the weights step in eval mode (no dropout, BatchNorm with its running
statistics), delta starts at zero, x + delta is clipped to [0, 1], and Adam has no weight decay.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from utils.attack.balls import nearest, unit
from utils.attack.universal import warp

RHO, RADIUS, STEPS, SMOOTHING = 4.0, 25.0, 10, 0.2  # as in the published run.sh, for 500 images
PIXELS = 3 * 224 * 224                              # of an image for which RADIUS holds
GRADIENTS = 2 * STEPS + 1                           # per image in an outer step


def maximin_gradient(outer, model, share, gradient, x, y, delta, draws, *, augment=None, **options):
    """Run `outer`, train_sga.spgd_gradient, at weights and images of higher confidence.

    model: the surrogate that `gradient` differentiates, x (N, C, H, W) -> (N, K), with frozen
    weights; it is restored afterwards. share: of both radii, in (0, 1]; the images' radius is that
    for 224 pixels, scaled at other sizes to the same distance per pixel.
    """
    radius = share * RADIUS * math.sqrt(x[0].numel() / PIXELS)
    if augment is not None:  # draws partition the batch in its order
        x = torch.cat([warp(x[index], maps) for index, maps in zip(draws, augment, strict=True)])
    with _surer_weights(model, x, y[0], share * RHO, draws):
        x = torch.cat([_surer_images(model, x[index], y[0][index], radius) for index in draws])
        return outer(gradient, x, y, delta, draws, **options)


@contextmanager
def _surer_weights(model, x, y, rho, draws):
    """Context in which the weights have moved by at most rho to lower the smoothed cross-entropy.

    Steps are added up in float32; a bf16 model does not see changes below its resolution.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    kept = [p.detach().clone() for p in weights]
    exact = [p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in kept]
    try:
        for _ in range(STEPS):
            total = [torch.zeros_like(w) for w in exact]
            for index in draws:
                found = _weight_gradients(model, weights, x[index], y[index])
                for whole, g in zip(total, found, strict=True):
                    whole += g
            length = torch.stack([g.square().sum() for g in total]).sum().sqrt() + 1e-12
            with torch.no_grad():
                for p, w, g in zip(weights, exact, total, strict=True):
                    p.copy_(w.sub_(g * (rho / STEPS / length)))
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(weights, kept, strict=True):
                p.copy_(before)


def _weight_gradients(model, weights, x, y):
    """Gradients of the summed loss; zeros for weights that have no part in it."""
    for p in weights:
        p.requires_grad_(True)
    try:
        loss = F.cross_entropy(model(x), y, reduction="sum", label_smoothing=SMOOTHING)
        return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    finally:
        for p in weights:
            p.requires_grad_(False)


def _surer_images(model, x, y, radius):
    """Images within `radius` of x in L2, and in [0, 1], moved to lower the cross-entropy."""
    at = x
    for _ in range(STEPS):
        at = at.detach().requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)
        at = nearest(at.detach() - radius / 8 * unit(g, "l2"), x, radius, "l2", "rescale")
    return at
