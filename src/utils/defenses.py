"""Defences as layers in front of a network, on [0, 1] pixels, and the adaptive attacker's view.

    GradientConcealment   x + epsilon sin(w x)           Pei et al., arXiv:2205.10617
    ResizePad             random size, random place      Xie et al., arXiv:1711.01991
    adaptive              the network that an adaptive attacker differentiates: bpda for the first
                          layer, eot for the second      Athalye et al., arXiv:1802.00420

    model = nn.Sequential(GradientConcealment(), model)                   # any model, one line
    model = defend(model, "gcm+resizepad", size=224, generator=generator)
    x_adv = pgd(adaptive(model, draws=20), x, y, ...)
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.attack.adaptive import bpda, eot
from utils.attack.chance import below
from utils.attack.random_layers import chance_for
from utils.errors import UserError
from utils.run import make_generator

DEFENSES = ("none", "gcm", "resizepad", "gcm+resizepad")
PUBLISHED_LOW = 218 / 224  # of the input's side: ResizedPaddingLayer(l=218) of the authors


class GradientConcealment(nn.Module):
    """x + epsilon * sin(w * x) (arXiv:2205.10617, Sec. 3): identity forward, noise backward.

    x (N, ...) float32 or float64 in [0, 1], before Normalize. In float32, 42 of the 256 grey levels
    of an 8-bit image change, by at most 1.5e-8. In the backward pass each pixel's gradient is
    multiplied by 1 + epsilon * w * cos(w * x), by default up to 1e12 and of either sign.
    UserError: float16, where w is infinite.
    """

    def __init__(self, w=1e20, epsilon=1e-8):
        super().__init__()
        if not (0 < w < torch.finfo(torch.float32).max and 0 < epsilon < 1):
            raise UserError(f"GradientConcealment(w={w}, epsilon={epsilon}); wanted w above 0 and "
                            "within float32, epsilon in (0, 1), such as w=1e20, epsilon=1e-8")
        self.w, self.epsilon = float(w), float(epsilon)

    def forward(self, x):
        if x.dtype == torch.float16:
            raise UserError("GradientConcealment takes no float16: w and the gradient overflow, "
                            "and every attack would get NaN; type x.float(), or keep the layer in "
                            "float32")
        return x + self.epsilon * torch.sin(self.w * x)

    def extra_repr(self):
        return f"w={self.w:g}, epsilon={self.epsilon:g}"


class ResizePad(nn.Module):
    """(N, C, H, W) -> (N, C, size, size): scaled to a side from low to size, on a black square.

    Side and place are drawn anew for every image at every call. Attacks and evaluations say which
    images they pass (utils/attack/random_layers.py), so that an image's draws do not depend on the
    others; otherwise every call takes a seed from `generator` (a CPU torch.Generator; None: its
    own, seed 0). Bilinear without antialiasing, like F.interpolate; differentiable. UserError
    unless 1 <= low <= size.
    """

    def __init__(self, low=218, size=224, generator=None):
        super().__init__()
        if not 1 <= low <= size:
            raise UserError(f"ResizePad(low={low}, size={size}); wanted 1 <= low <= size")
        self.low, self.size = low, size
        self.generator = make_generator(0) if generator is None else generator

    def forward(self, x):
        return place(x, *self.draw(x), self.size)

    def draw(self, x):
        """Sides, tops and lefts, each (n,) int64, for images x (n, ...)."""
        one, *two = chance_for(x, self.generator).words(3).unbind(1)
        side = self.low + below(one, self.size - self.low + 1)
        return side, *(below(word, self.size - side + 1) for word in two)

    def extra_repr(self):
        return f"low={self.low}, size={self.size}"


def place(x, side, top, left, size):
    """x (N, C, H, W), each image scaled to its side and pasted at (top, left) on a black square."""
    at = torch.arange(size, device=x.device)
    row, column = at - top[:, None], at - left[:, None]  # (N, size), within the scaled image
    inside = _within(row, side)[:, None, :, None] & _within(column, side)[:, None, None, :]
    y, x_ = (_grid(line, side, length, x.dtype)
             for line, length in ((row, x.shape[-2]), (column, x.shape[-1])))
    grid = torch.stack([x_[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    return F.grid_sample(x, grid, align_corners=False) * inside.to(x)


def _within(line, side):
    return (line >= 0) & (line < side[:, None])


def _grid(line, side, length, dtype):
    """Pixels of the scaled image -> grid_sample's [-1, 1], clamped to the centres at the border."""
    edge, wide = 1 - 1 / length, torch.promote_types(dtype, torch.float32)  # no float64 on MPS
    side = side[:, None]
    return ((2 * line + 1 - side).to(wide) / side).clamp(-edge, edge).to(dtype)


# ---------------------------------------------------------- defended networks

def defend(model, name, *, size, generator=None, w=1e20, epsilon=1e-8, low=None):
    """Sequential(defence layers, model) for a name of DEFENSES; the model itself for 'none'.

    size: side of the network's input; low: smallest side that resizepad draws, None: 218 of 224.
    UserError: no such defence.
    """
    if name not in DEFENSES:
        raise UserError(f"--defense {name}: wanted one of {', '.join(DEFENSES)}")
    parts, layers = name.split("+"), []
    if "gcm" in parts:
        layers.append(GradientConcealment(w, epsilon))
    if "resizepad" in parts:
        low = round(size * PUBLISHED_LOW) if low is None else low
        layers.append(ResizePad(low, size, generator))
    return nn.Sequential(*layers, model) if layers else model


def is_random(name):
    """Whether two forward passes through this defence may differ."""
    return "resizepad" in name.split("+")


def describe(name, *, size, w=1e20, epsilon=1e-8, low=None):
    """The defence with its settings, for a table."""
    parts = {"gcm": f"GCM w={w:g} epsilon={epsilon:g}",
             "resizepad": f"ResizePad to {round(size * PUBLISHED_LOW) if low is None else low}-"
                          f"{size} of {size} pixels, drawn per image and forward pass"}
    return " + ".join(parts[part] for part in name.split("+") if part in parts) or "none"


def means(names, draws):
    """What an adaptive attacker does about these defences, in words: 'BPDA, EOT of 10'."""
    return ", ".join(["BPDA"] * any("gcm" in name for name in names)
                     + [f"EOT of {draws}"] * any(map(is_random, names)))


def adaptive(model, draws=1):
    """A model of defend() as an adaptive attacker differentiates it; the same forward pass.

    GradientConcealment: its backward pass is the identity (bpda). ResizePad: gradients, losses and
    logits are means over `draws` forward passes (eot).
    """
    if not isinstance(model, nn.Sequential):
        return model
    seen = nn.Sequential(*(bpda(layer) if isinstance(layer, GradientConcealment) else layer
                           for layer in model))
    return eot(seen, draws) if any(isinstance(layer, ResizePad) for layer in model) else seen
