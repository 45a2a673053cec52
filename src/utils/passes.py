"""A pass over shuffled training images, for any number of processes that share every minibatch."""

import torch
import torch.nn.functional as F

from utils.data import crop_flip, random_crops


def one_pass(images, batch_size, generator, team, *, vary, smallest, workers):
    """Yields (n of the joint minibatch, index (m,) of this process's images, x (m, C, H, W) uint8).

    The processes of the team take turns in every minibatch; one of fewer than `smallest` images,
    the last, is left out. vary: photographs are cut by RandomResizedCrop and mirrored, CIFAR-10 is
    shifted by up to four pixels and mirrored, digits stay as they are. However many processes there
    are, every image is varied in the same way.
    """
    order = torch.randperm(len(images), generator=generator)
    u = torch.rand((3, len(images)), generator=generator)
    seeds = torch.randint(2 ** 62, (len(images),), generator=generator)
    joint = [part for part in torch.arange(len(images)).split(batch_size) if len(part) >= smallest]
    own = [part[team.rank::team.size] for part in joint]
    if images.pixels is None and vary:
        plan = [list(zip(order[p].tolist(), seeds[p].tolist(), strict=True)) for p in own]
        found = random_crops(images, plan, workers=workers)
    else:
        found = ((order[p], _pixels(images, order[p], u[:, p], vary)) for p in own)
    for part, (index, x) in zip(joint, found, strict=True):
        yield len(part), index, x


def _pixels(images, index, u, vary):
    pixels = images.pixels[index.to(images.pixels.device)]
    if not vary or images.kind in ("digits", "mnist"):
        return pixels
    return crop_flip(F.pad(pixels, (4,) * 4), images.size, u)
