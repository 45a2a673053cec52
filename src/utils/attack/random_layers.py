"""Tells random layers which images they see, so that an image's draws do not depend on its batch.

    with drawing_from(chance):      # the images of a batch; set by attacks and evaluations
        with rows_passing(rows):    # those of them in a forward pass; set by core.forward
            model(x)                # a layer in it calls chance_for(x, generator).uniform(2)

Every image counts its own draws, in the order in which it passes through random layers.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch

from utils.attack.chance import chance_of


class _Batch:
    """The images of one drawing_from(), how many draws each has had, and which now pass."""

    def __init__(self, chance):
        self.chance, self.turn, self.rows = chance, torch.zeros_like(chance.images), slice(None)


_batches = []  # the innermost drawing_from() is the last


@contextmanager
def drawing_from(chance):
    """Context in which random layers draw from `chance`, that of the images of a batch."""
    _batches.append(_Batch(chance))
    try:
        yield
    finally:
        _batches.pop()


@contextmanager
def rows_passing(rows):
    """Context in which forward passes hold these rows of the batch; slice(None): as outside."""
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


def chance_for(x, generator):
    """The Chance of a random layer's input x (n, ...), a new one at every call.

    Outside drawing_from(), or if the number of images differs: that of images 0 .. n - 1, with a
    new seed from `generator`, a torch.Generator.
    """
    if _batches:
        batch = _batches[-1]
        chance = batch.chance[batch.rows]
        if len(chance) == len(x):
            turn = batch.turn[batch.rows].clone()  # a slice would give a view
            batch.turn[batch.rows] += 1
            return replace(chance, turn=turn)
    return chance_of(generator, x)
