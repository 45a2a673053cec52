"""Augmentations and corruptions of a whole batch, with separate parameters for each image.

    x = augment(x, {"rain": 0.5, "rotation": 0.1}, generator=generator)   # x (n, C, H, W)
    x = augment(x, PRESETS["released"], generator=generator)              # the authors' pipeline
    x = OPS["fog"](x, generator=Chance(5, index))                         # index (n,) in a list

34 operations: the 32 augmentations of the challenge's classifier (arXiv:2205.10617) at their
published strengths, and two more, random_cut and colour_jitter. 17 of the 32 are corruptions of
ImageNet-C (arXiv:1903.12261), each time at one of its five severities, all equally likely. Sizes
in pixels are for 224-pixel images and scale with the shorter side, down to the smallest that still
changes an image.

uint8 in, uint8 out; floats in [0, 1] stay floats in [0, 1]; the result is on the device of x. All
parameters and noise fields come from utils/attack/chance.py, on that device: they belong to the
image, whatever the batch, the order and the number of processes. `generator` is the Chance of the
images, or a torch.Generator that provides a seed for images 0 .. n - 1. Unlike the published
pipeline, every call draws every parameter, for each image.
"""

import io
import math
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from utils.attack.chance import below, chance_of
from utils.data import to_float
from utils.errors import UserError
from utils.precision import moved

OPS = {}      # {name: function(x, *, p=1.0, generator) -> x}, filled by @op
CHANGES = {}  # {name: function(x, chance), which changes all images}
PARAMETERS = 8  # numbers that an operation may draw per image, besides noise fields
PHASE1 = {  # the authors' revision b42da2e: {operation: probability}, in the order of application
    "pepper_salt": 0.1, "colour_points": 0.1, "gaussian_noise": 0.1, "mosaic_block": 0.1,
    "rgb_shuffle": 0.05, "rotation": 0.05, "horizontal_flip": 0.1, "vertical_flip": 0.01,
    "gaussian_blur": 0.001, "blur": 0.001, "rain": 0.05, "extend": 0.01, "block_shuffle": 0.05,
    "local_shuffle": 0.01, "random_padding": 0.01, "fog": 0.05, "shot_noise": 0.1,
    "impulse_noise": 0.1, "speckle_noise": 0.1, "glass_blur": 0.1, "defocus_blur": 0.1,
    "motion_blur": 0.1, "zoom_blur": 0.1, "snow": 0.1, "spatter": 0.1, "contrast": 0.05,
    "brightness": 0.05, "saturation": 0.05, "jpeg": 0.01, "pixelate": 0.1, "elastic": 0.1}
RELEASED = [*PHASE1]  # dab6e50: frost before snow, and one probability for all 32
RELEASED.insert(RELEASED.index("snow"), "frost")
PRESETS = {"released": dict.fromkeys(RELEASED, 0.05), "phase1": PHASE1}
FAMILIES = {  # of operations, over which accuracies are averaged
    "noise": ("pepper_salt", "colour_points", "gaussian_noise", "shot_noise", "impulse_noise",
              "speckle_noise"),
    "blur": ("gaussian_blur", "blur", "motion_blur", "defocus_blur", "zoom_blur", "glass_blur"),
    "weather": ("rain", "snow", "fog", "frost", "spatter"),
    "digital": ("mosaic_block", "block_shuffle", "local_shuffle", "extend", "pixelate", "jpeg"),
    "geometric": ("horizontal_flip", "vertical_flip", "rotation", "random_cut", "random_padding",
                  "elastic"),
    "colour": ("rgb_shuffle", "colour_jitter", "brightness", "contrast", "saturation")}
GREY = (0.299, 0.587, 0.114)  # weights of R, G, B in luma


class Draw:
    """Random numbers for n images, on their device."""

    def __init__(self, x, chance):
        self.n, self.chance, self.used, self.fields = len(x), chance, 0, 0
        self.x = x.new_empty(0, dtype=torch.float32 if x.dtype == torch.uint8 else x.dtype)

    @cached_property
    def parameters(self):
        return self.chance.words(PARAMETERS)  # at once: eight cost as much as one

    def words(self, count):
        """(n, count): each image's next parameters, 32 random bits each."""
        self.used += count
        if self.used > PARAMETERS:
            raise ValueError(f"an operation draws {self.used} parameters, more than PARAMETERS")
        return self.parameters[:, self.used - count:self.used]

    def uniform(self, low, high, *shape):
        """(n, *shape) between low and high; shape: 1, 1, 1 if not given."""
        shape = shape or (1, 1, 1)
        u = (self.words(math.prod(shape)) >> 8).to(torch.float32) / 2 ** 24
        return (low + (high - low) * u).to(self.x).view(self.n, *shape)

    def one_of(self, values):
        """(n, 1, 1, 1): one of the values for each image; from rows, a tensor per column."""
        values = torch.as_tensor(values, dtype=torch.float64).to(self.x.dtype)
        which = self.integers(0, len(values) - 1)
        found = moved(values, self.x.device)[which].view(self.n, -1)
        columns = [column.view(-1, 1, 1, 1) for column in found.unbind(1)]
        return columns if values.dim() > 1 else columns[0]

    def integers(self, low, high):
        """(n,) int64 in low .. high."""
        return low + below(self.words(1)[:, 0], high - low + 1)

    def field(self, *shape, normal=False):
        """(n, *shape): uniform numbers in [0, 1), or normal ones; new ones at every call."""
        self.fields += 1
        own = self.chance.fold(self.fields)
        return own.normal(*shape) if normal else own.uniform(*shape)


def op(function=None, *, as_it_is=False):
    """Turns function(x, draw) into operation(x, *, p, generator) for any dtype; adds it to OPS.

    The function gets floats and may change them in place. as_it_is: it gets x itself, uint8 too,
    and must not change it; operations that only move pixels take a tenth of the time that way.
    """
    if function is None:
        return lambda function: op(function, as_it_is=as_it_is)
    name = function.__name__

    def change(x, chance):
        if as_it_is:
            z = function(x, Draw(x, chance))
            return z if z.dtype == torch.uint8 else z.clamp(0, 1)
        z = to_float(x) if x.dtype == torch.uint8 else x.clone()
        z = function(z, Draw(z, chance)).clamp_(0, 1)
        return z.mul_(255).round_().to(torch.uint8) if x.dtype == torch.uint8 else z.to(x.dtype)

    def applied(x, *, p=1.0, generator):
        return augment(x, {name: p}, generator=generator)
    applied.__name__, applied.__doc__ = name, function.__doc__
    OPS[name], CHANGES[name] = applied, change
    return applied


def augment(x, chances, *, generator):
    """Applies the operations of {name: p} in turn, each to every image with probability p.

    Under one Chance, an operation draws the same for an image alone and after other operations.
    Returns x itself if nothing is chosen. UserError: unknown operation, x not images.
    """
    numbers = {name: k for k, name in enumerate(OPS)}
    p = torch.zeros(len(OPS))
    for name, chance in chances.items():
        if name not in OPS:
            raise UserError(f"augmentation {name}: wanted one of {', '.join(OPS)}")
        p[numbers[name]] = chance
    if x.dim() != 4 or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise UserError(f"augmentations: given {tuple(x.shape)} {x.dtype}; wanted images "
                        "(n, C, H, W), uint8 or float in [0, 1]")
    own, out = chance_of(generator, x), x
    chosen = own.uniform(len(OPS)).cpu() < p  # synchronises, once for all operations
    for name in chances:
        rows, stream = chosen[:, numbers[name]], own.fold(numbers[name])
        if rows.any() and rows.all():
            out = CHANGES[name](out, stream)
        elif rows.any():
            rows = moved(rows.nonzero()[:, 0], x.device)
            out = out.clone() if out is x else out
            out[rows] = CHANGES[name](out[rows], stream[rows])
    return out


# ----------------------------------------------------------------------- tools

def grid(x):
    """Row and column numbers (H, 1) and (1, W) of the pixels."""
    h, w = x.shape[2:]
    return torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)[None]


def take(x, row, column):
    """Replaces every pixel by pixel (row, column), each (n, H, W) int64."""
    n, c, h, w = x.shape
    index = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).flatten(1)[:, None].expand(n, c, -1)
    return x.flatten(2).gather(2, index).view(x.shape)


def resample(x, theta, padding="zeros"):
    """x under the affine maps theta (n, 2, 3) from output to input coordinates in [-1, 1]."""
    at = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, at, padding_mode=padding, align_corners=False)


def scaling(scale_x, scale_y, shift_x, shift_y):
    """theta (n, 2, 3) from scales and shifts (n, 1, 1, 1)."""
    zero = torch.zeros_like(shift_x)
    return torch.cat([scale_x, zero, shift_x, zero, scale_y, shift_y], 1).view(-1, 2, 3)


def filtered(x, kernels):
    """Filters each image with its own kernel (n, K, L); borders are reflected."""
    n, c, h, w = x.shape
    k, m = kernels.shape[1:]
    padded = F.pad(x, (m // 2, m // 2, k // 2, k // 2), mode="reflect")
    if k * m > 25 ** 2:  # faster from here on
        size = padded.shape[2:]
        spectrum = torch.fft.rfft2(kernels.flip(1, 2), s=size)[:, None]
        out = torch.fft.irfft2(torch.fft.rfft2(padded) * spectrum, s=size)
        return out[:, :, k - 1:k - 1 + h, m - 1:m - 1 + w]
    weight = kernels[:, None, None].expand(n, c, 1, k, m).reshape(n * c, 1, k, m)
    out = F.conv2d(padded.reshape(1, n * c, *padded.shape[2:]), weight, groups=n * c)
    return out.view(n, c, h, w)


def constant(values, x):
    """Numbers as a tensor like x, copied without waiting."""
    return moved(torch.tensor(values, dtype=x.dtype), x.device)


def gaussian(x, sigma, most):
    """Gaussian blur with standard deviation sigma (n, 1, 1, 1) in pixels, up to `most`."""
    reach = max(1, min(math.ceil(2.5 * most), min(x.shape[2:]) - 1))
    t, sigma = torch.arange(-reach, reach + 1, device=x.device), sigma.view(-1, 1)
    k = (-(t ** 2) / (2 * sigma ** 2)).exp() * (t.abs() <= (2.5 * sigma).ceil().clamp_min(1))
    k = (k / k.sum(1, keepdim=True)).to(x)
    return filtered(filtered(x, k[:, :, None]), k[:, None, :])


def smooth(noise, sigma):
    """Gaussian blur of noise with periodic borders; sigma (n, 1, 1, 1) may exceed the side."""
    h, w = noise.shape[2:]
    f = [make(size, device=noise.device) for make, size in ((torch.fft.fftfreq, h),
                                                            (torch.fft.rfftfreq, w))]
    keep = (-2 * (math.pi * sigma) ** 2 * (f[0][:, None] ** 2 + f[1] ** 2)).exp()
    return torch.fft.irfft2(torch.fft.rfft2(noise) * keep, s=(h, w))


def scaled(x, size, least=1.0):
    """A size in pixels of a 224-pixel image, scaled to x; at least `least`. -> tensor"""
    return (torch.as_tensor(size) * (min(x.shape[2:]) / 224)).clamp_min(least)


def axes(angle, reach):
    """(n, S, S), S = 2 reach + 1: coordinates along and across a direction (n, 1, 1, 1)."""
    t, a = torch.arange(-reach, reach + 1, device=angle.device), angle.view(-1, 1, 1)
    return (t[None, None] * a.cos() + t[None, :, None] * a.sin(),
            t[None, :, None] * a.cos() - t[None, None] * a.sin())


def line_kernels(length, width, angle):
    """(n, S, S): lines of length x width pixels through the centre, at angle (n, 1, 1, 1)."""
    along, across = axes(angle, math.ceil(length / 2))
    k = (along.abs() <= length / 2) * (1 - across.abs() / (width / 2 + 0.5)).clamp_min(0)
    return k / k.sum((1, 2), keepdim=True)


def dragged(x, radius, sigma, angle, most):
    """Motion blur to one side of every pixel: half a Gaussian over up to 2 radius pixels.

    radius (n, 1, 1, 1), up to `most`.
    """
    along, across = axes(angle, math.ceil(2 * most))
    radius, sigma = radius.view(-1, 1, 1), sigma.view(-1, 1, 1)
    k = (-(along / sigma) ** 2 / 2).exp() * (1 - across.abs()).clamp_min(0)
    k = k * ((along > -0.5) & (along < 2 * radius + 0.5))
    return filtered(x, (k / k.sum((1, 2), keepdim=True)).to(x))


def clouds(draw, x, roughness):
    """(n, 1, H, W) in [0, 1]: noise on finer and finer grids, each `roughness` times as strong."""
    total, weight, cells = 0, 1.0, 3
    while cells < 2 * max(x.shape[2:]):
        coarse = draw.field(1, cells, cells)
        total = total + weight * F.interpolate(coarse, x.shape[2:], mode="bilinear",
                                               align_corners=False)
        weight, cells = weight * roughness, 2 * cells
    return stretched(total)


def stretched(x):
    """Shifts and scales each image's values to span [0, 1]."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-8)


def luma(x):
    """(n, 1, H, W)."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


# ----------------------------------------------------------------------- noise

@op
def pepper_salt(x, draw):
    """1 % of the pixels, half of them white, half black."""
    u = draw.field(1, *x.shape[2:])
    return torch.where(u < 0.01, (u < 0.005).to(x), x)


@op
def colour_points(x, draw):
    """1 % of the pixels: a quarter each green, red, blue, and random (in grey images all random).
    """
    u, colour = draw.field(1, *x.shape[2:]), draw.field(*x.shape[1:]).to(x)
    if x.shape[1] == 3:
        for k, pure in enumerate(((0, 1, 0), (1, 0, 0), (0, 0, 1))):
            mine = (u >= 0.0025 * k) & (u < 0.0025 * (k + 1))
            colour = torch.where(mine, constant(pure, colour).view(1, 3, 1, 1), colour)
    return torch.where(u < 0.01, colour, x)


@op
def gaussian_noise(x, draw):
    """Normal noise; the standard deviation is one of 30 from 0 to 0.15."""
    return x + draw.one_of(torch.linspace(0, 0.15, 30)) * draw.field(*x.shape[1:], normal=True)


@op
def shot_noise(x, draw):
    """Poisson noise with 60 to 3 photons at white."""
    photons = draw.one_of((60, 25, 12, 5, 3))
    u, v = draw.field(2, *x.shape[1:]).unbind(1)
    return poisson(x * photons, u, v).to(x) / photons


def poisson(mean, u, v):
    """Poisson numbers, int64, for means up to 60, from uniform numbers u, v of the same shape.

    Poisson(a + b) = Poisson(a) + Poisson(b): a in sixteenths, with a table of distribution
    functions, and b the rest of the mean; each by inversion.
    """
    row = (16 * mean).long()
    where = ((row << 24) + (u * 2 ** 24).long()).contiguous()  # torch warns otherwise
    found = torch.searchsorted(_distributions(mean.device), where, right=True).sub_(COUNTS * row)
    rest = mean - row / 16
    term = (-rest).exp()
    up_to = term.clone()  # P(X <= k)
    for k in range(1, 5):  # 5 or more: once in 10^8
        found += v >= up_to
        term *= rest / k
        up_to += term
    return found


COUNTS = 128  # a Poisson number of mean 60 is larger once in 10^14


@cache
def _distributions(device):
    """(961 COUNTS,) int64: 2^24 (i + P(X <= k)) for the means i / 16 and k = 0 .. COUNTS - 1."""
    i, k = torch.arange(961.0, dtype=torch.float64)[:, None], torch.arange(COUNTS).double()
    p = (torch.special.xlogy(k, i / 16) - i / 16 - torch.lgamma(k + 1)).exp().cumsum(1).clamp_max(1)
    return (2 ** 24 * i + (2 ** 24 * p).ceil()).long().flatten().to(device)


@op
def impulse_noise(x, draw):
    """Sets 3 to 27 % of the values to 0 or 1, in each channel separately."""
    u, share = draw.field(*x.shape[1:]), draw.one_of((0.03, 0.06, 0.09, 0.17, 0.27))
    return torch.where(u < share, (u < share / 2).to(x), x)


@op
def speckle_noise(x, draw):
    """Noise in proportion to the value, with standard deviation 0.15 to 0.6."""
    share = draw.one_of((0.15, 0.2, 0.35, 0.45, 0.6))
    return x * (1 + share * draw.field(*x.shape[1:], normal=True))


# ---------------------------------------------------------------------- colour

@op(as_it_is=True)
def rgb_shuffle(x, draw):
    """The channels in a random order, possibly unchanged."""
    order = draw.uniform(0, 1, x.shape[1]).argsort(1)
    return x.gather(1, order[:, :, None, None].expand_as(x))


@op
def colour_jitter(x, draw):
    """Brightness, contrast, saturation times 0.6 to 1.4; hue turned by up to 36 degrees, in YIQ."""
    x.mul_(draw.uniform(0.6, 1.4))
    x.lerp_(luma(x).mean((1, 2, 3), keepdim=True), 1 - draw.uniform(0.6, 1.4))
    if x.shape[1] != 3:
        return x
    x.lerp_(luma(x), 1 - draw.uniform(0.6, 1.4))
    return turned(x, draw.uniform(-0.2, 0.2) * math.pi)


def turned(x, angle):
    """Turns the hue by an angle (n, 1, 1, 1) and keeps the luma."""
    to = constant([GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], x)
    a, zero, one = angle.view(-1), torch.zeros_like(angle.view(-1)), torch.ones_like(angle.view(-1))
    turn = torch.stack([one, zero, zero, zero, a.cos(), -a.sin(), zero, a.sin(), a.cos()], 1)
    matrix = torch.linalg.inv(to) @ turn.view(-1, 3, 3) @ to
    return (matrix @ x.flatten(2)).view(x.shape)


@op
def brightness(x, draw):
    """Raises HSV's value by 0.1 to 0.5."""
    by, value = draw.one_of((0.1, 0.2, 0.3, 0.4, 0.5)), x.amax(1, keepdim=True)
    return torch.where(value > 0, x * ((value + by).clamp_max(1) / value), by)


@op
def contrast(x, draw):
    """Contrast reduced to 40 to 5 %, around each channel's mean."""
    share = draw.one_of((0.4, 0.3, 0.2, 0.1, 0.05))
    return x.lerp_(x.mean((2, 3), keepdim=True), 1 - share)


@op
def saturation(x, draw):
    """HSV's saturation times 0.1 to 20, and up to 0.2 more; the hue of grey is red."""
    if x.shape[1] != 3:
        return x
    times, plus = draw.one_of(((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)))
    value, span = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    share = (times * span / value.clamp_min(1e-8) + plus).clamp(0, 1)
    away = torch.where(span > 0, (value - x) / span, constant([0, 1, 1], x).view(1, 3, 1, 1))
    return value * (1 - share * away)


# -------------------------------------------------------------------- geometry

@op(as_it_is=True)
def horizontal_flip(x, draw):
    """Mirrored, left to right."""
    return x.flip(3)


@op(as_it_is=True)
def vertical_flip(x, draw):
    """Mirrored, top to bottom."""
    return x.flip(2)


@op(as_it_is=True)
def rotation(x, draw):
    """Rotated by up to 5 degrees, to the nearest pixel; the corners are black."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    a = draw.uniform(-math.radians(5), math.radians(5), 1, 1)
    y, z = row - (h - 1) / 2, column - (w - 1) / 2
    row = (a.cos() * y + a.sin() * z + (h - 1) / 2).round().long()
    column = (a.cos() * z - a.sin() * y + (w - 1) / 2).round().long()
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return take(x, row, column) * inside[:, None]


@op(as_it_is=True)
def random_cut(x, draw):
    """A crop of 50 to 95 % of each side, resized to the full size."""
    return torch.stack([
        TF.resized_crop(one, *corner, *sides, list(x.shape[2:]))
        for one, corner, sides in zip(x, *places(x, draw, draw.uniform(0.5, 0.95)), strict=True)])


@op
def random_padding(x, draw):
    """Resized to 65 to 95 % and placed anywhere on one of 10 greys or on random colours."""
    scale, grey = (draw.one_of(torch.linspace(*ends, 10)) for ends in ((0.65, 0.95), (0, 1)))
    out = torch.where(draw.uniform(0, 1) < 0.5, grey, draw.field(*x.shape[1:]).to(x))
    for canvas, one, (top, left), (high, wide) in zip(out, x, *places(x, draw, scale), strict=True):
        canvas[:, top:top + high, left:left + wide] = TF.resize(
            one, [high, wide], TF.InterpolationMode.BICUBIC)
    return out


def places(x, draw, scale):
    """n random rectangles of `scale` times the sides: their corners (top, left) and sides."""
    size = torch.tensor(x.shape[2:])
    sides = (scale.cpu().view(-1, 1) * size).long().clamp_min(1)
    corner = draw.uniform(0, 1, 2).cpu()
    return (corner * (size - sides + 1)).long().minimum(size - sides).tolist(), sides.tolist()


def level(values, x):
    """Values in [0, 1] on the scale and in the dtype of x."""
    return (255 * values).round().to(x.dtype) if x.dtype == torch.uint8 else values.to(x.dtype)


@op
def elastic(x, draw):
    """Three points moved by up to 49 pixels, then every pixel by a smooth field."""
    alpha, sigma, most = draw.one_of((
        (488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88)))
    (row, column), (h, w) = grid(x), x.shape[2:]
    small = min(h, w) / 224
    field = alpha * small ** 2 * smooth(2 * draw.field(2, h, w) - 1, sigma * small)
    there = min(h, w) // 3 * constant([[1, 1], [1, -1], [-1, -1]], x)
    moved = there + small * most[:, 0] * draw.uniform(-1, 1, 3, 2)
    one = torch.ones_like(moved[:, :, :1])
    back = torch.linalg.solve(torch.cat([moved, one], 2), there.expand_as(moved))  # (n, 3, 2)
    y, z = field[:, 0] + row - (h - 1) / 2, field[:, 1] + column - (w - 1) / 2
    at = torch.stack([z, y, torch.ones_like(y)], 3).flatten(1, 2).to(x) @ back
    at = (2 * at / constant([w, h], at)).view(len(x), h, w, 2)
    return F.grid_sample(x, at, padding_mode="reflection", align_corners=False)


# ---------------------------------------------------------------------- blocks

@op(as_it_is=True)
def mosaic_block(x, draw):
    """A square with sides of 13 to 26 pixels, its corner at least two sides from the border: in
    70 % of cases a random colour for every pixel, else black, white or grey.
    """
    n, channels, h, w = x.shape
    side = scaled(x, draw.integers(13, 26)).round().long()
    most = int(scaled(x, 26).round())
    size = moved(torch.tensor([[h], [w]]), x.device)
    corner = draw.uniform(0, 1, 2, 1) * (size - 4 * side[:, None, None]).clamp_min(0)
    t = torch.arange(most, device=x.device)
    row, column = (corner.long() + 2 * side[:, None, None] + t).unbind(1)  # (n, most)
    inside = (t[:, None] < side[:, None, None]) & (t < side[:, None, None])
    at = (torch.arange(n, device=x.device)[:, None, None], slice(None),
          row.clamp_max(h - 1)[:, :, None], column.clamp_max(w - 1)[:, None])
    kind, fill = draw.uniform(0, 1), draw.field(most, most, channels)
    for k, grey in enumerate((0.0, 1.0, 127 / 255)):
        fill = torch.where(kind >= 0.7 + 0.1 * k, torch.full_like(fill, grey), fill)
    out = x.clone()
    out[at] = torch.where(inside[..., None], level(fill, x), x[at])
    return out


@op(as_it_is=True)
def block_shuffle(x, draw):
    """Cut at 40 to 60 % of the height or the width, and the two parts swapped."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    cut = draw.one_of(torch.linspace(0.4, 0.6, 10)).view(-1, 1, 1)
    across = draw.integers(0, 1).view(-1, 1, 1).bool()
    return take(x, torch.where(across, row, (row + (cut * h).long()) % h).expand(-1, h, w),
                torch.where(across, (column + (cut * w).long()) % w, column).expand(-1, h, w))


@op(as_it_is=True)
def local_shuffle(x, draw):
    """Permutes square patches of 80 to 100 pixels; the last row and column of patches overlap."""
    grids, (h, w) = grid(x), x.shape[2:]
    side = scaled(x, draw.integers(80, 100)).round().long().view(-1, 1, 1)
    count = [(size - 1) // side + 1 for size in (h, w)]  # (n, 1, 1)
    least = int(scaled(x, 80).round())
    keys = draw.field(math.prod((size - 1) // least + 1 for size in (h, w)))
    keys = keys.masked_fill(torch.arange(keys.shape[1], device=x.device)
                            >= (count[0] * count[1])[:, 0], 2)
    order = keys.argsort(1)  # patches of the image come first, in random order
    mine = [torch.where(t >= size - side, many - 1, t // side)
            for t, size, many in zip(grids, (h, w), count, strict=True)]
    number = mine[0] * count[1] + mine[1]  # of the patch that lies on top at each pixel
    source = order.gather(1, number.flatten(1)).view(number.shape)
    return take(x, *(
        (part * side).minimum(size - side) + t - (k * side).minimum(size - side)
        for part, size, t, k in zip((source // count[1], source % count[1]), (h, w), grids, mine,
                                    strict=True)))


@op(as_it_is=True)
def extend(x, draw):
    """Takes every pixel from a random place, up to 2 to 8 pixels further down and right."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    most = scaled(x, draw.integers(2, 8)).round().view(-1, 1, 1)
    away = [(draw.field(h, w) * (most + 1)).long() for _ in range(2)]
    return take(x, row + away[0], column + away[1])


@op
def pixelate(x, draw):
    """As if resized to 60 to 25 % of the side: every pixel the mean of its block."""
    share, means = draw.one_of((0.6, 0.5, 0.4, 0.3, 0.25)).view(-1, 1), []
    for size in x.shape[2:]:
        middle = 2 * torch.arange(size, device=x.device) + 1
        block = middle * (share * size).long().clamp_min(1) // (2 * size)  # (n, size)
        same = (block[:, :, None] == block[:, None]).to(x)
        means.append(same / same.sum(2, keepdim=True))
    return means[0][:, None] @ x @ means[1][:, None]


# ------------------------------------------------------------------------ blur

@op
def gaussian_blur(x, draw):
    """Standard deviation 1 or 2 pixels; in small images at least half that."""
    radius = draw.one_of((1, 2))
    return gaussian(x, scaled(x, radius, radius / 2), scaled(x, 2, 1.0))


@op
def blur(x, draw):
    """PIL's BLUR, the same at every size: the mean of the 16 pixels two away, except at borders."""
    kernel = torch.ones_like(x[:, 0, :1, :1]).expand(-1, 5, 5).clone()
    kernel[:, 1:4, 1:4] = 0
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    x[inner] = filtered(x, kernel / 16)[inner]
    return x


@op
def motion_blur(x, draw):
    """Motion blur within 45 degrees of the horizontal, over 20 to 40 pixels at most."""
    radius, sigma = draw.one_of(((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)))
    return dragged(x, scaled(x, radius), scaled(x, sigma, 0.5),
                   draw.uniform(-math.pi / 4, math.pi / 4), scaled(x, 20))


@op
def defocus_blur(x, draw):
    """The mean over a disc with a radius of 3 to 10 pixels."""
    radius = scaled(x, draw.one_of((3, 4, 6, 8, 10)), 0.6).view(-1, 1, 1)
    reach = math.ceil(scaled(x, 10, 0.6))
    t = torch.arange(-reach, reach + 1, device=x.device)
    k = (radius + 0.5 - (t[:, None] ** 2 + t ** 2).sqrt()).clamp(0, 1)
    return filtered(x, (k / k.sum((1, 2), keepdim=True)).to(x))


@op
def zoom_blur(x, draw):
    """The mean of zoomed images, with zooms up to 1.1 to 1.3."""
    most, total = draw.one_of((0.1, 0.15, 0.2, 0.25, 0.3)), 2 * x
    for k in range(1, 11):
        scale = 1 / (1 + most * k / 10)
        total += resample(x, scaling(scale, scale, 0 * scale, 0 * scale), "border")
    return total / 12


@op
def glass_blur(x, draw):
    """Blurs, takes each pixel from up to 1 to 4 pixels away, up to three times, and blurs again."""
    sigma, most, rounds = draw.one_of(((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2),
                                       (1.5, 4, 2)))
    (row, column), (h, w) = grid(x), x.shape[2:]
    sigma, most, widest = scaled(x, sigma, 0.4), scaled(x, most).round(), scaled(x, 1.5, 0.4)
    x = gaussian(x, sigma, widest)
    for k in range(3):  # an image's last rounds may move nothing
        reach = (most * (k < rounds)).view(-1, 1, 1)
        away = [((2 * draw.field(h, w) - 1) * reach).floor().long() for _ in range(2)]
        x = take(x, row + away[0], column + away[1])
    return gaussian(x, sigma, widest)


# --------------------------------------------------------------------- weather

@op
def rain(x, draw):
    """White streaks of 10 x 3 pixels, slanted by up to 30 degrees, at 2 to 6 % of the pixels."""
    share = draw.one_of(range(500, 1501, 200)) / 25600
    angle = draw.one_of(torch.linspace(-30, 30, 10)).deg2rad() + math.pi / 2
    white = draw.one_of(torch.linspace(0.7, 1, 10))
    drops = (draw.field(1, *x.shape[2:]) < share).to(x)
    lines = line_kernels(scaled(x, 10, 3.0), scaled(x, 3), angle)
    streaks = stretched(filtered(drops, lines.to(x)))
    return x + streaks * (white - x)


@op
def snow(x, draw):
    """Flakes with downward motion blur, over a whiter, paler image."""
    mean, std, zoom, least, radius, sigma, keep = draw.one_of((
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)))
    flakes = mean + std * draw.field(1, *x.shape[2:], normal=True).to(x)
    zoom = 1 / scaled(x, zoom, 2.0)
    flakes = resample(flakes, scaling(zoom, zoom, 0 * zoom, 0 * zoom))
    flakes = torch.where(flakes < least, 0, flakes).clamp_(0, 1)
    flakes = dragged(flakes, scaled(x, radius), scaled(x, sigma, 0.5),
                     draw.uniform(-3 * math.pi / 4, -math.pi / 4), scaled(x, 12))
    white = torch.maximum(x, 1.5 * luma(x) + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.flip(2, 3)


@op
def fog(x, draw):
    """Clouds over an image with less contrast."""
    thick, decay = draw.one_of(((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)))
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + thick * clouds(draw, x, decay ** -2)) * most / (most + thick)


@op
def frost(x, draw):
    """A dimmed image plus pale blue ice, generated from the ridges of clouds."""
    keep, ice = draw.one_of(((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)))
    ridges = (1 - (2 * clouds(draw, x, 0.8) - 1).abs()) ** 4
    pale = draw.uniform(0.3, 0.6) + 0.5 * ridges
    tint = constant([0.88, 1.0, 1.08][:x.shape[1]], x).view(1, -1, 1, 1)
    return keep * x + ice * (pale * tint).clamp(0, 1)


@op
def spatter(x, draw):
    """Drops of water over 3, 14 or 24 % of the pixels, or mud."""
    sigma, cut, strength, mud = draw.one_of((  # cut: in standard deviations of the smooth noise
        (4, 1.89, 0.6, 0), (3, 1.06, 0.6, 0), (2, 0.71, 0.5, 0), (1, 0.0, 0, 1), (1, -0.18, 0, 1)))
    sigma = scaled(x, sigma, 0.7)
    depth = smooth(draw.field(1, *x.shape[2:], normal=True), sigma)
    depth = (depth - depth.mean((1, 2, 3), keepdim=True)) / depth.std((1, 2, 3), keepdim=True) - cut
    wet = depth.clamp_min(0)
    wet = strength * wet / wet.amax((1, 2, 3), keepdim=True).clamp_min(1e-8)
    dirt = gaussian((depth > 0).to(x), 1.5 * sigma, 1.5 * scaled(x, 4, 0.7))
    dirt = torch.where(dirt < 0.8, 0, dirt) * mud
    water, brown = (constant(c[:x.shape[1]], x).view(1, -1, 1, 1) / 255
                    for c in ((175, 238, 238), (63, 42, 20)))
    return x * (1 - dirt) + dirt * brown + (1 - mud) * wet * water


# --------------------------------------------------------------------- storage

@op(as_it_is=True)
def jpeg(x, draw):
    """Quality 25 to 7. The codec runs on the CPU, one image at a time."""
    pixels = (x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)).cpu()
    pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # the codec's order
    found = np.empty_like(pixels)
    qualities = draw.one_of((25, 18, 15, 10, 7)).flatten().long().tolist()
    for k, quality in enumerate(qualities):
        buffer = io.BytesIO()
        Image.fromarray(pixels[k].squeeze()).save(buffer, "JPEG", quality=quality)
        found[k] = np.asarray(Image.open(buffer, formats=("JPEG",))).reshape(found[k].shape)
    found = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous().to(x.device)
    return found if x.dtype == torch.uint8 else to_float(found).to(x)
