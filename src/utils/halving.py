"""A network that takes a batch in parts once memory has run out, instead of ending the command."""

import sys

import torch
from torch import nn
from tqdm import tqdm

from utils.precision import out_of_memory


class Halving(nn.Module):
    """The same forward pass; where memory runs out, half as many images at a time from there on.

    It stands behind a defence, which draws its random numbers for the whole batch, so that the
    batch decides nothing. A forward pass whose gradient with respect to the images is wanted is
    not divided, as that would free nothing: where an attack runs out of memory the command ends.
    """

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name, self.most = model, name, None  # None: all at once

    def forward(self, x):
        """(n, C, H, W) -> (n, K)"""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.model(x)
        while True:
            parts = x.split(self.most) if self.most else [x]
            try:
                found = [self.model(part) for part in parts]
                return found[0] if len(found) == 1 else torch.cat(found)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or len(parts[0]) < 2:
                    raise
            self.halve(len(parts[0]), x.device)  # here the failed pass no longer holds its memory

    def halve(self, n, device):
        """From here on half of n images at a time, which one line on stderr says."""
        self.most = n // 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
        tqdm.write(f"warning: {self.name}: out of memory with {n} images at a time (--batch_size), "
                   f"{self.most} from here on", file=sys.stderr)
