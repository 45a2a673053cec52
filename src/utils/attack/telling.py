"""What random layers are told, so that an image's draws do not depend on the images beside it.

    with telling(chance):              # the images of a batch: attacks and evaluations say this
        with passing(rows):            # those of them that a forward pass holds: core.forward
            model(x)                   # a layer in it: told(x, generator).uniform(2)

Every image counts its own draws, in the order in which it passes through random layers.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch

from utils.attack.chance import chance_of


class _Batch:
    """The images of one telling(), how many draws each has had, which of them pass now."""

    def __init__(self, chance):
        self.chance, self.turn, self.rows = chance, torch.zeros_like(chance.images), slice(None)


_batches = []  # the innermost telling() is the last


@contextmanager
def telling(chance):
    """Random layers draw from `chance`, which has an image for each one of the batch."""
    _batches.append(_Batch(chance))
    try:
        yield
    finally:
        _batches.pop()


@contextmanager
def passing(rows):
    """Only these rows of the batch are in the forward passes inside; slice(None): as outside."""
    if not _batches:
        yield
        return
    batch = _batches[-1]
    before, whole = batch.rows, isinstance(rows, slice) and rows == slice(None)
    batch.rows = before if whole else rows
    try:
        yield
    finally:
        batch.rows = before


def told(x, generator):
    """The Chance of a random layer's input x (n, ...), another one every time.

    Where nobody tells, or tells of another number of images: images 0 .. n - 1 under a new seed of
    the generator, a torch.Generator.
    """
    if _batches:
        batch = _batches[-1]
        chance = batch.chance[batch.rows]
        if len(chance) == len(x):
            turn = batch.turn[batch.rows].clone()  # of a slice, it would be a view
            batch.turn[batch.rows] += 1
            return replace(chance, turn=turn)
    return chance_of(generator, x)
