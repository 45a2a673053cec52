"""Better transfer to other networks: random sizes, and gradients of shifted images.

    paper                                            here
    DI, Xie et al., arXiv:1803.06978, Eq. 5          Diverse
    TI, Dong et al., arXiv:1904.02884, Eq. 7         blurred
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.attack.balls import column
from utils.attack.random_layers import chance_for
from utils.defenses import ResizePad
from utils.errors import UserError

SMALLEST = 299 / 330  # of the side: the paper pads 299 to 329 pixels to 330
SPREAD = 3            # the kernel reaches this many standard deviations to each side


class Diverse(nn.Module):
    """The model on images that are scaled and pasted on black, each with probability p.

    Unlike the paper, whose images grow from 299 to 330 pixels, images keep their size.
    """

    def __init__(self, model, p):
        super().__init__()
        self.model, self.p, self.pad = model, p, {}  # a layer for each size, not in state_dict()

    def forward(self, x):
        size = x.shape[-1]
        if x.shape[-2] != size:
            raise UserError(f"diverse={self.p}: images of {x.shape[-2]} x {size} pixels; wanted "
                            "square ones, or diverse=0")
        if size not in self.pad:
            self.pad[size] = ResizePad(max(1, round(SMALLEST * size)), size)
        moved = chance_for(x, self.pad[size].generator).uniform().to(x) < self.p
        return self.model(torch.where(column(moved, x), self.pad[size](x), x))


def blurred(g, side):
    """Gradients (n, C, H, W) convolved, channel by channel, with a Gaussian of this odd side."""
    at = torch.linspace(-SPREAD, SPREAD, side, device=g.device, dtype=g.dtype)
    line = torch.exp(-at.square() / 2)
    kernel = torch.outer(line, line) / line.sum().square()
    channels = g.shape[1]
    return F.conv2d(g, kernel.expand(channels, 1, side, side), padding=side // 2, groups=channels)
