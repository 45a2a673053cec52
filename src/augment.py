"""Augmentations and corruptions of a batch at once, every image with parameters of its own.

    x = augment(x, {"rain": 0.5, "rotation": 0.1}, generator=generator)   # x (n, C, H, W)
    x = augment(x, PUBLISHED, generator=generator)                        # the authors' pipeline
    x = OPS["fog"](x, generator=generator)

    python augment.py --image FILE --out imgs/augment.png      # the grid of all of them

Those of the challenge's classifier (arXiv:2205.10617) and the corruptions of ImageNet-C
(arXiv:1903.12261) at random strength. uint8 in, uint8 out; floats in [0, 1] likewise, clipped;
on the device of x. All parameters come from `generator` (on the CPU; one more, for fields of noise,
is seeded from it on the device), so that a call repeats by seed. Unlike the published pipeline,
nothing is drawn when an augmentation is made.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from utils import draw
from utils.data import to_float
from utils.run import Parser, UserError, at_least, make_generator, run_script, write_atomic

OPS = {}  # {name: function(x, *, p=1.0, generator) -> x}, filled by @op
PUBLISHED = {  # the authors' last pipeline (data_transform.py): in this order, with these p
    "pepper_salt": 0.1, "colour_points": 0.1, "gaussian_noise": 0.1, "mosaic_block": 0.1,
    "rgb_shuffle": 0.05, "rotation": 0.05, "horizontal_flip": 0.1, "vertical_flip": 0.01,
    "gaussian_blur": 0.001, "blur": 0.001, "rain": 0.05, "extend": 0.01, "block_shuffle": 0.05,
    "local_shuffle": 0.01, "random_padding": 0.01, "fog": 0.05, "shot_noise": 0.1,
    "impulse_noise": 0.1, "speckle_noise": 0.1, "glass_blur": 0.1, "defocus_blur": 0.1,
    "motion_blur": 0.1, "zoom_blur": 0.1, "snow": 0.1, "spatter": 0.1, "contrast": 0.05,
    "brightness": 0.05, "saturation": 0.05, "jpeg": 0.01, "pixelate": 0.1, "elastic": 0.1}
GREY = (0.299, 0.587, 0.114)  # of R, G, B in luma


class Draw:
    """Random numbers for n images on a device."""

    def __init__(self, x, generator):
        self.n, self.cpu, self.channels = len(x), generator, x.shape[1]
        self.x = x.new_empty(0, dtype=torch.float32 if x.dtype == torch.uint8 else x.dtype)
        seed = int(torch.randint(2 ** 62, (), generator=generator))
        self.fields = torch.Generator(x.device).manual_seed(seed)

    def uniform(self, low, high):
        """(n, 1, 1, 1), a number for each image."""
        u = torch.rand(self.n, generator=self.cpu)
        return (low + (high - low) * u).view(-1, 1, 1, 1).to(self.x)

    def integers(self, low, high):
        """(n,) int64 in low .. high."""
        return torch.randint(low, high + 1, (self.n,), generator=self.cpu).to(self.x.device)

    def field(self, *shape, normal=False):
        """(n, *shape) of uniform numbers in [0, 1), or of normal ones."""
        make = torch.randn if normal else torch.rand
        return make((self.n, *shape), generator=self.fields, device=self.x.device)

    def colour(self):
        """(n, C, 1, 1) in [0, 1]."""
        return torch.rand((self.n, self.channels, 1, 1), generator=self.cpu).to(self.x)


def op(function=None, *, as_it_is=False):
    """function(x, draw) on images becomes op(x, *, p, generator) on images of any dtype, by name.

    The function gets floats that it may write into. as_it_is: it gets uint8 too, and writes into
    nothing: operations that only move pixels need no numbers for them, and cost a tenth so.
    """
    if function is None:
        return lambda function: op(function, as_it_is=as_it_is)

    def applied(x, *, p=1.0, generator, inplace=False):
        if x.dim() != 4 or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise UserError(f"{function.__name__}: given {tuple(x.shape)} {x.dtype}; wanted images "
                            "(n, C, H, W), uint8 or float in [0, 1]")
        chosen = (torch.rand(len(x), generator=generator) < p).nonzero()[:, 0].to(x.device)
        if not len(chosen):
            return x
        part = x if len(chosen) == len(x) else x[chosen]
        if as_it_is:
            z = function(part, Draw(part, generator))
            z = z if z.dtype == torch.uint8 else z.clamp(0, 1)
        else:
            z = to_float(part) if x.dtype == torch.uint8 else part.clone()
            z = function(z, Draw(z, generator)).clamp_(0, 1)
            z = z.mul_(255).round_().to(torch.uint8) if x.dtype == torch.uint8 else z.to(x.dtype)
        if part is x and not inplace:
            return z
        out = x if inplace else x.clone()
        out[chosen] = z
        return out
    applied.__name__, applied.__doc__ = function.__name__, function.__doc__
    OPS[function.__name__] = applied
    return applied


def augment(x, chances, *, generator):
    """The operations of {name: p} one after the other, each on every image with probability p."""
    x = x.clone()  # once, not for every operation
    for name, p in chances.items():
        if name not in OPS:
            raise UserError(f"augmentation {name}: wanted one of {', '.join(OPS)}")
        OPS[name](x, p=p, generator=generator, inplace=True)
    return x


# ----------------------------------------------------------------------- tools

def grid(x):
    """Row and column numbers (H, 1) and (1, W) of the pixels."""
    h, w = x.shape[2:]
    return torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)[None]


def take(x, row, column):
    """Pixel (row, column), each (n, H, W) int64, in the place of every pixel."""
    n, c, h, w = x.shape
    index = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).flatten(1)[:, None].expand(n, c, -1)
    return x.flatten(2).gather(2, index).view(x.shape)


def warp(x, theta, padding="zeros"):
    """Affine maps theta (n, 2, 3) of the output's coordinates in [-1, 1] to the image's."""
    at = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, at, padding_mode=padding, align_corners=False)


def scaling(scale_x, scale_y, shift_x, shift_y):
    """theta (n, 2, 3) of scales and shifts (n, 1, 1, 1)."""
    zero = torch.zeros_like(shift_x)
    return torch.cat([scale_x, zero, shift_x, zero, scale_y, shift_y], 1).view(-1, 2, 3)


def filtered(x, kernels):
    """Every image (C, H, W) with its own kernel (n, K, L), borders reflected."""
    n, c, h, w = x.shape
    k, m = kernels.shape[1:]
    padded = F.pad(x, (m // 2, m // 2, k // 2, k // 2), mode="reflect")
    weight = kernels[:, None, None].expand(n, c, 1, k, m).reshape(n * c, 1, k, m)
    out = F.conv2d(padded.reshape(1, n * c, *padded.shape[2:]), weight, groups=n * c)
    return out.view(n, c, h, w)


def gaussian(x, sigma):
    """Blur of deviation sigma (n, 1, 1, 1) in pixels."""
    radius = max(1, min(math.ceil(2.5 * sigma.max().item()), min(x.shape[2:]) - 1))
    t = torch.arange(-radius, radius + 1, device=x.device)
    k = (-(t ** 2) / (2 * sigma.view(-1, 1) ** 2)).exp()
    k = (k / k.sum(1, keepdim=True)).to(x)
    return filtered(filtered(x, k[:, :, None]), k[:, None, :])


def side(x, share):
    """Pixels of a share of the shorter side, for kernels that look alike at any size."""
    return max(1.0, share * min(x.shape[2:]))


def line_kernels(length, angle, size):
    """(n, size, size): a line of `length` pixels through the middle, at `angle` (n, 1, 1, 1)."""
    t = torch.arange(size, device=angle.device) - size // 2
    a = angle.view(-1, 1, 1)
    along = t[None, None] * a.cos() + t[None, :, None] * a.sin()
    across = t[None, :, None] * a.cos() - t[None, None] * a.sin()
    k = (along.abs() <= length.view(-1, 1, 1) / 2).float() * (1 - across.abs()).clamp_min(0)
    return k / k.sum((1, 2), keepdim=True)


def clouds(draw, x, channels=1, roughness=0.6):
    """(n, channels, H, W) in [0, 1]: noise of ever finer grain, ever weaker."""
    total, weight, cells = 0, 1.0, 3
    while cells < 2 * max(x.shape[2:]):
        coarse = draw.field(channels, cells, cells)
        total = total + weight * F.interpolate(coarse, x.shape[2:], mode="bilinear",
                                               align_corners=False)
        weight, cells = weight * roughness, 2 * cells
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (total - low) / (high - low)


def luma(x):
    """(n, 1, H, W)."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


# ----------------------------------------------------------------------- noise

@op
def pepper_salt(x, draw):
    """Black and white pixels, 1 to 10 %."""
    u, share = draw.field(1, *x.shape[2:]), draw.uniform(0.01, 0.1)
    return torch.where(u < share, (u < share / 2).to(x), x)


@op
def colour_points(x, draw):
    """Pixels of random colours, 1 to 10 %."""
    hit = draw.field(1, *x.shape[2:]) < draw.uniform(0.01, 0.1)
    return torch.where(hit, draw.field(*x.shape[1:]).to(x), x)


@op
def gaussian_noise(x, draw):
    """Deviation 0.02 to 0.2."""
    return x + draw.uniform(0.02, 0.2) * draw.field(*x.shape[1:], normal=True)


@op
def shot_noise(x, draw):
    """Photons, 10 to 200 at white: Poisson."""
    photons = draw.uniform(math.log(10), math.log(200)).exp()
    return torch.poisson(x * photons, generator=draw.fields) / photons


@op
def impulse_noise(x, draw):
    """Values at 0 or 1 in each channel by itself, 1 to 15 %."""
    u, share = draw.field(*x.shape[1:]), draw.uniform(0.01, 0.15)
    return torch.where(u < share, (u < share / 2).to(x), x)


@op
def speckle_noise(x, draw):
    """In proportion to the value, deviation 0.1 to 0.5."""
    return x * (1 + draw.uniform(0.1, 0.5) * draw.field(*x.shape[1:], normal=True))


# ---------------------------------------------------------------------- colour

@op(as_it_is=True)
def rgb_shuffle(x, draw):
    """The channels in another order, never the same."""
    if x.shape[1] != 3:
        return x
    orders = torch.tensor([[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]], device=x.device)
    order = orders[draw.integers(0, 4)]
    return x.gather(1, order[:, :, None, None].expand_as(x))


@op
def colour_jitter(x, draw):
    """Brightness, contrast, saturation by 0.6 to 1.4; hue by up to 36 degrees, in YIQ."""
    x.mul_(draw.uniform(0.6, 1.4))
    x.lerp_(luma(x).mean((1, 2, 3), keepdim=True), 1 - draw.uniform(0.6, 1.4))
    if x.shape[1] != 3:
        return x
    x.lerp_(luma(x), 1 - draw.uniform(0.6, 1.4))
    return turned(x, draw.uniform(-0.2, 0.2) * math.pi)


def turned(x, angle):
    """Hue turned by an angle (n, 1, 1, 1), luma kept."""
    to = x.new_tensor([GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    a, zero, one = angle.view(-1), torch.zeros_like(angle.view(-1)), torch.ones_like(angle.view(-1))
    turn = torch.stack([one, zero, zero, zero, a.cos(), -a.sin(), zero, a.sin(), a.cos()], 1)
    matrix = torch.linalg.inv(to) @ turn.view(-1, 3, 3) @ to
    return (matrix @ x.flatten(2)).view(x.shape)


@op(as_it_is=True)
def brightness(x, draw):
    """Lighter by 0.1 to 0.5."""
    by = draw.uniform(0.1, 0.5)
    if x.dtype == torch.uint8:
        return x.to(torch.int16).add_((255 * by).round().to(torch.int16)).clamp_(0, 255).to(x.dtype)
    return x + by


@op(as_it_is=True)
def contrast(x, draw):
    """A tenth to a half of it."""
    return blend(x, lambda z: z.mean((2, 3), keepdim=True), 1 - draw.uniform(0.1, 0.5))


@op(as_it_is=True)
def saturation(x, draw):
    """None at all to three times as much."""
    return blend(x, luma, 1 - draw.uniform(0.0, 3.0))


def blend(x, other, share):
    """x, of which a share (n, 1, 1, 1), on either side of [0, 1] too, is other(x)."""
    if x.dtype != torch.uint8:
        return x.lerp(other(x), share)
    size, out = 2 if x.device.type == "cpu" else len(x), torch.empty_like(x)  # what a cache holds
    for part, to, by in zip(x.split(size), out.split(size), share.split(size), strict=True):
        z = part.float().add_(0.5)  # so that cutting off the fraction rounds
        to.copy_(z.lerp_(other(z), by).clamp_(0, 255.5))
    return out


# -------------------------------------------------------------------- geometry

@op(as_it_is=True)
def horizontal_flip(x, draw):
    """Left and right."""
    return x.flip(3)


@op(as_it_is=True)
def vertical_flip(x, draw):
    """Top and bottom."""
    return x.flip(2)


@op(as_it_is=True)
def rotation(x, draw):
    """By up to 45 degrees, corners black."""
    a, ratio = draw.uniform(-math.pi / 4, math.pi / 4), x.shape[2] / x.shape[3]
    theta = torch.cat([a.cos(), -a.sin() * ratio, 0 * a, a.sin() / ratio, a.cos(), 0 * a], 1)
    if x.dtype != torch.uint8:
        return warp(x, theta.view(-1, 2, 3))
    return warp(x.float(), theta.view(-1, 2, 3)).round_().to(torch.uint8)


@op(as_it_is=True)
def random_cut(x, draw):
    """A part of 50 to 95 % of each side, at the whole size."""
    return torch.stack([
        TF.resized_crop(one, *corner, *sides, list(x.shape[2:]))
        for one, corner, sides in zip(x, *places(x, draw, 0.5), strict=True)])


@op(as_it_is=True)
def random_padding(x, draw):
    """Resized to 60 to 95 % and put anywhere on grey or a colour."""
    back = torch.where(draw.uniform(0, 1) < 0.5, torch.full_like(draw.colour(), 0.5), draw.colour())
    out = level(back, x).expand_as(x).contiguous()
    for canvas, one, (top, left), (high, wide) in zip(out, x, *places(x, draw, 0.6), strict=True):
        canvas[:, top:top + high, left:left + wide] = TF.resize(one, [high, wide])
    return out


def places(x, draw, least):
    """Of n rectangles of `least` to 95 % of the sides: corners (top, left), sides; lists of pairs.
    """
    size = torch.tensor(x.shape[2:])
    sides = ((draw.uniform(least, 0.95).cpu().view(-1, 1) * size).round()).long().clamp_min(1)
    corner = torch.stack([draw.uniform(0, 1).cpu().flatten() for _ in range(2)], 1)
    return (corner * (size - sides + 1)).long().minimum(size - sides).tolist(), sides.tolist()


def level(values, x):
    """Values in [0, 1] as pixels of x have them."""
    return (255 * values).round().to(x.dtype) if x.dtype == torch.uint8 else values.to(x.dtype)


@op
def elastic(x, draw):
    """Moved smoothly, by up to 6 % of the side."""
    cells = 6
    shift = 2 * draw.field(2, cells, cells) - 1
    shift = F.interpolate(shift, x.shape[2:], mode="bicubic", align_corners=False)
    identity = torch.eye(2, 3, device=x.device, dtype=x.dtype).expand(len(x), 2, 3)
    at = F.affine_grid(identity, x.shape, align_corners=False)
    at = at + (draw.uniform(0.04, 0.12) * shift).permute(0, 2, 3, 1).to(x)
    return F.grid_sample(x, at, padding_mode="reflection", align_corners=False)


# ---------------------------------------------------------------------- blocks

@op(as_it_is=True)
def mosaic_block(x, draw):
    """A rectangle of 10 to 40 % of each side in a colour, black, white or grey."""
    row, column = grid(x)
    inside = torch.ones((len(x), *x.shape[2:]), dtype=torch.bool, device=x.device)
    for t, size in ((row, x.shape[2]), (column, x.shape[3])):
        length = draw.uniform(0.1, 0.4).view(-1, 1, 1) * size
        start = draw.uniform(0, 1).view(-1, 1, 1) * (size - length)
        inside &= (t >= start) & (t < start + length)
    kind, fill = draw.integers(0, 3).view(-1, 1, 1, 1), draw.colour()
    for k, grey in ((1, 0.0), (2, 1.0), (3, 0.5)):
        fill = torch.where(kind == k, torch.full_like(fill, grey), fill)
    return torch.where(inside[:, None], level(fill, x), x)


@op(as_it_is=True)
def block_shuffle(x, draw):
    """The two halves swapped, left and right or top and bottom."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    across = draw.integers(0, 1).view(-1, 1, 1).bool()
    return take(x, torch.where(across, row, (row + h // 2) % h).expand(-1, h, w),
                torch.where(across, (column + w // 2) % w, column).expand(-1, h, w))


@op(as_it_is=True)
def local_shuffle(x, draw):
    """The patches of a 2 x 2 to 4 x 4 grid in another order."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    cells = draw.integers(2, 4).view(-1, 1, 1)
    high, wide = h // cells, w // cells
    r, c = row // high, column // wide
    keys = draw.field(16).masked_fill(torch.arange(16, device=x.device) >= (cells ** 2)[:, :, 0], 2)
    order = keys.argsort(1)  # those of the grid first, in random order
    number = (r * cells + c).clamp_max(15)
    source = order.gather(1, number.flatten(1)).view(number.shape)
    whole = (r < cells) & (c < cells)  # what is over at the right and below stays
    return take(x, torch.where(whole, source // cells * high + row % high, row),
                torch.where(whole, source % cells * wide + column % wide, column))


@op(as_it_is=True)
def extend(x, draw):
    """Pixels, 0.5 to 3 %, that spread over the 3 x 3 to 7 x 7 around them."""
    n, _, h, w = x.shape
    number = torch.arange(1, h * w + 1, device=x.device).view(1, 1, h, w).double()
    seed = torch.where(draw.field(1, h, w) < draw.uniform(0.005, 0.03), number, 0 * number)
    size, spread = draw.integers(1, 3).view(-1, 1, 1, 1), 0 * seed
    for radius in (1, 2, 3):
        spread = torch.where(size == radius, F.max_pool2d(seed, 2 * radius + 1, 1, radius), spread)
    source = torch.where(spread > 0, spread, number).long()[:, 0] - 1
    return take(x, source // w, source % w)


@op(as_it_is=True)
def pixelate(x, draw):
    """In blocks of 2 pixels up to a tenth of the side."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    block = draw.integers(2, max(2, round(side(x, 0.1)))).view(-1, 1, 1)
    return take(x, (row // block * block + block // 2).expand(-1, h, w),
                (column // block * block + block // 2).expand(-1, h, w))


# ------------------------------------------------------------------------ blur

@op
def gaussian_blur(x, draw):
    """Deviation 0.3 to 1.5 % of the side, on small images 0.5 to 1.5 pixels."""
    return gaussian(x, draw.uniform(max(0.5, side(x, 0.003)), max(1.5, side(x, 0.015))))


@op
def blur(x, draw):
    """The mean of 3 x 3 to 7 x 7 pixels."""
    radius, t = draw.integers(1, 3).view(-1, 1), torch.arange(-3, 4, device=x.device)
    k = (t.abs() <= radius).to(x) / (2 * radius + 1)
    return filtered(filtered(x, k[:, :, None]), k[:, None, :])


@op
def motion_blur(x, draw):
    """Along a line of 2 to 8 % of the side, in any direction."""
    longest = min(max(3.0, side(x, 0.08)), 2 * min(x.shape[2:]) - 3)
    length = draw.uniform(max(2.0, side(x, 0.02)), longest)
    size = 2 * math.ceil(longest / 2) + 1
    return filtered(x, line_kernels(length, draw.uniform(0, math.pi), size).to(x))


@op
def defocus_blur(x, draw):
    """The mean over a disc of 1 to 3 % of the side."""
    largest = max(2.0, side(x, 0.03))
    t = torch.arange(-math.ceil(largest), math.ceil(largest) + 1, device=x.device)
    far = (t[:, None] ** 2 + t ** 2).sqrt()
    radius = draw.uniform(max(1.0, side(x, 0.01)), largest).view(-1, 1, 1)
    k = (radius + 0.5 - far).clamp(0, 1)
    return filtered(x, (k / k.sum((1, 2), keepdim=True)).to(x))


@op
def zoom_blur(x, draw):
    """The mean of eight zooms, up to 1.05 to 1.3 times."""
    most, total = draw.uniform(0.05, 0.3), x
    for k in range(1, 8):
        scale = 1 / (1 + most * k / 7)
        total = total + warp(x, scaling(scale, scale, 0 * scale, 0 * scale), "border")
    return total / 8


@op
def glass_blur(x, draw):
    """Pixels taken from up to 1 to 3 pixels away, softened."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    most = draw.integers(1, 3).view(-1, 1, 1)
    away = [((2 * draw.field(h, w) - 1) * (most + 0.5)).round().long() for _ in range(2)]
    return gaussian(take(x, row + away[0], column + away[1]), draw.uniform(0.4, 0.8))


# --------------------------------------------------------------------- weather

@op
def rain(x, draw):
    """Bright streaks, slanted by up to 30 degrees."""
    drops = (draw.field(1, *x.shape[2:]) < draw.uniform(0.004, 0.015)).to(x)
    longest = min(max(5.0, side(x, 0.1)), 2 * min(x.shape[2:]) - 3)
    size = 2 * math.ceil(longest / 2) + 1
    length = draw.uniform(0.5 * longest, longest)
    angle = math.pi / 2 + draw.uniform(-math.pi / 6, math.pi / 6)
    streaks = filtered(drops, line_kernels(length, angle, size).to(x)) * length
    return 0.9 * x + draw.uniform(0.3, 0.6) * streaks.clamp_max(1)


@op
def snow(x, draw):
    """Soft flakes on a picture that is whiter and paler."""
    flakes = (draw.field(1, *x.shape[2:]) < draw.uniform(0.005, 0.02)).to(x)
    sigma = draw.uniform(side(x, 0.003), side(x, 0.008))
    flakes = (gaussian(flakes, sigma) * 6 * sigma ** 2).clamp_max(1)
    white = draw.uniform(0.1, 0.4)
    return (1 - white) * x + white * (0.5 * luma(x) + 0.5) + flakes


@op
def fog(x, draw):
    """Clouds over a picture of less contrast."""
    thick = draw.uniform(0.3, 0.7)
    return (1 - thick) * x + thick * (0.4 + 0.6 * clouds(draw, x))


@op
def frost(x, draw):
    """Crystals: the ridges of clouds in two grains, pale blue, thick at the border."""
    ridges = (1 - (2 * clouds(draw, x, roughness=0.8) - 1).abs()) ** 4
    row, column = grid(x)
    edge = torch.maximum((2 * row / x.shape[2] - 1).abs(), (2 * column / x.shape[3] - 1).abs())
    cover = (ridges * (0.4 + edge) * draw.uniform(0.6, 1.0)).clamp(0, 0.9)
    ice = x.new_tensor([0.85, 0.93, 1.0][:x.shape[1]]).view(1, -1, 1, 1)
    return (1 - cover) * x + cover * ice


@op
def spatter(x, draw):
    """Drops of water or of mud on 5 to 20 %."""
    cells = [max(2, size // 5) for size in x.shape[2:]]
    depth = F.interpolate(draw.field(1, *cells), x.shape[2:], mode="bicubic", align_corners=False)
    edge = depth.flatten(1).sort(1).values  # the share that is covered, exactly
    rank = ((1 - draw.uniform(0.05, 0.2).view(-1, 1)) * (edge.shape[1] - 1)).long()
    cover = ((depth - edge.gather(1, rank).view(-1, 1, 1, 1)) * 20).clamp(0, 1)
    mud = draw.integers(0, 1).view(-1, 1, 1, 1).bool()
    colours = [x.new_tensor(c[:x.shape[1]]).view(1, -1, 1, 1)
               for c in ((0.25, 0.16, 0.08), (0.7, 0.85, 0.9))]
    return x + 0.8 * cover * (torch.where(mud, *colours) - x)


# --------------------------------------------------------------------- storage

@op(as_it_is=True)
def jpeg(x, draw):
    """Quality 8 to 40. The codec works on the CPU, an image at a time."""
    pixels = (x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)).cpu()
    pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # as the codec has them
    found = np.empty_like(pixels)
    for k, quality in enumerate(draw.integers(8, 40).tolist()):
        buffer = io.BytesIO()
        Image.fromarray(pixels[k].squeeze()).save(buffer, "JPEG", quality=quality)
        found[k] = np.asarray(Image.open(buffer, formats=("JPEG",))).reshape(found[k].shape)
    found = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous().to(x.device)
    return found if x.dtype == torch.uint8 else to_float(found).to(x)


# -------------------------------------------------------------------- the grid

def get_args():
    parser = Parser("Draw every augmentation of an image, by name.")
    add = parser.add_argument
    add("--image", type=Path, help="image file; None: one drawn here")
    add("--image_size", type=at_least(16), default=160, help="pixels of a side in the grid")
    add("--seed", type=at_least(0, high=2 ** 62), default=0, help="fixes everything random")
    add("--out", type=Path, default=Path("imgs/augment.png"), help="PNG file to write")
    return parser.parse_args()


def scene(size):
    """(3, size, size) uint8: sun, hills, a house and a fence, drawn by these lines."""
    t = (torch.arange(size) + 0.5) / size
    y, x = t[:, None], t[None]
    image = torch.stack([0.45 + 0.4 * y + 0 * x, 0.65 + 0.2 * y + 0 * x, 0.95 - 0.1 * y + 0 * x])

    def paint(where, *colour):
        image[:, where] = torch.tensor(colour)[:, None]
    paint((x - 0.78) ** 2 + (y - 0.2) ** 2 < 0.01, 1.0, 0.85, 0.2)
    paint(y > 0.62 + 0.07 * (9 * x).sin(), 0.35, 0.6, 0.3)
    paint(y > 0.78 + 0.03 * (14 * x).cos(), 0.2, 0.45, 0.2)
    paint((x > 0.2) & (x < 0.5) & (y > 0.45) & (y < 0.8), 0.8, 0.35, 0.25)
    paint((y > 0.28) & (y < 0.45) & ((x - 0.35).abs() < 1.2 * (y - 0.28)), 0.4, 0.2, 0.2)
    paint((x > 0.25) & (x < 0.33) & (y > 0.52) & (y < 0.62), 0.9, 0.9, 0.6)
    paint((x > 0.38) & (x < 0.45) & (y > 0.6) & (y < 0.8), 0.3, 0.2, 0.15)
    paint((y > 0.86) & (y < 0.88) & (x > -1), 0.95, 0.95, 0.9)
    paint(((x * 16) % 1 < 0.3) & (y > 0.82) & (y < 0.95), 0.95, 0.95, 0.9)
    return (image * 255).round().to(torch.uint8)


def main(args):
    if args.image:
        try:
            with Image.open(args.image) as file:
                picture = TF.pil_to_tensor(file.convert("RGB"))
        except OSError as error:
            raise UserError(f"--image {args.image}: {error}") from None
        picture = TF.center_crop(TF.resize(picture, args.image_size),
                                            args.image_size)
    else:
        picture = scene(args.image_size)
    generator = make_generator(args.seed)
    shown = {"as it is": picture} | {
        name: function(picture[None], generator=generator)[0] for name, function in OPS.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, draw.named({name: to_float(x) for name, x in shown.items()}))
    print(f"drew {args.out}: {len(OPS)} augmentations")


if __name__ == "__main__":
    run_script(get_args, main)
