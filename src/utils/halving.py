"""Batches that are split once memory runs out, instead of ending the command.

    halves = Halves("vgg16")
    halves(work, add, x, y)         # work(x, y), or add(work of one half, work of the other)
    model = Halving(net, "vgg16")   # the same for the forward passes of a network
"""

import sys
from functools import reduce

import torch
from torch import nn
from tqdm import tqdm

from utils.precision import out_of_memory


class Halves:
    """How many images at a time fit into memory, found by running out of it."""

    def __init__(self, name):
        self.name, self.most = name, None  # None: all at once

    def __call__(self, work, add, *batch):
        """work(*batch) of tensors (n, ...); add joins the results for parts of the batch.

        Where memory runs out, it takes half as many images at a time from there on and says so on
        stderr. If one image alone does not fit, the error is raised.
        """
        n = len(batch[0])
        if self.most is None or n <= self.most:
            try:
                return work(*batch)
            except (RuntimeError, MemoryError) as error:
                if n < 2 or not (out_of_memory(error) or _no_workspace(error)):
                    raise
            self._halve(n)  # here the failed work no longer holds its memory
        parts = zip(*(tensor.split(self.most) for tensor in batch), strict=True)
        return reduce(add, (self(work, add, *part) for part in parts))

    def _halve(self, n):
        self.most = n // 2
        torch.cuda.empty_cache()  # does nothing without a GPU
        tqdm.write(f"warning: {self.name}: out of memory with {n} images at a time, {self.most} "
                   "from here on", file=sys.stderr)


def _no_workspace(error):
    """Whether cuDNN found no algorithm, which it also reports if it cannot get memory for one."""
    return any(words in str(error) for words in (
        "unable to find an engine", "valid cuDNN algorithm"))


class Halving(nn.Module):
    """The same forward pass, in parts where memory runs out.

    It comes after a defence, which draws its random numbers for the whole batch, so splitting does
    not change them. A forward pass that needs gradients is not split, as that would free nothing:
    there the whole attack is split (utils/cells.py).
    """

    def __init__(self, model, name):
        super().__init__()
        self.model, self.halves = model, Halves(name)

    def forward(self, x):
        """(n, C, H, W) -> (n, K)"""
        if torch.is_grad_enabled() and (x.requires_grad or any(
                p.requires_grad for p in self.parameters())):
            return self.model(x)
        return self.halves(self.model, _joined, x)


def _joined(one, other):
    return torch.cat([one, other])
