"""Augmentations and corruptions of a whole batch, with separate parameters for each image.

    x = augment(x, {"rain": 0.5, "rotation": 0.1}, generator=generator)   # x (n, C, H, W)
    x = augment(x, PUBLISHED, generator=generator)                        # the authors' pipeline
    x = OPS["fog"](x, generator=generator)

They are the augmentations of the challenge's classifier (arXiv:2205.10617) and the corruptions of
ImageNet-C (arXiv:1903.12261), at random strength. uint8 in, uint8 out; floats in [0, 1] stay
floats in [0, 1]; the result is on the device of x. All parameters come from `generator`, on the
CPU, and fields of noise from a second generator on the device that is seeded by it, so that the
same seed gives the same result. Unlike in the published pipeline, parameters are drawn at every
call, not once when the augmentation is built.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from utils.data import to_float
from utils.errors import UserError

OPS = {}  # {name: function(x, *, p=1.0, generator) -> x}, filled by @op
PUBLISHED = {  # the authors' last pipeline (data_transform.py), in this order, with these p
    "pepper_salt": 0.1, "colour_points": 0.1, "gaussian_noise": 0.1, "mosaic_block": 0.1,
    "rgb_shuffle": 0.05, "rotation": 0.05, "horizontal_flip": 0.1, "vertical_flip": 0.01,
    "gaussian_blur": 0.001, "blur": 0.001, "rain": 0.05, "extend": 0.01, "block_shuffle": 0.05,
    "local_shuffle": 0.01, "random_padding": 0.01, "fog": 0.05, "shot_noise": 0.1,
    "impulse_noise": 0.1, "speckle_noise": 0.1, "glass_blur": 0.1, "defocus_blur": 0.1,
    "motion_blur": 0.1, "zoom_blur": 0.1, "snow": 0.1, "spatter": 0.1, "contrast": 0.05,
    "brightness": 0.05, "saturation": 0.05, "jpeg": 0.01, "pixelate": 0.1, "elastic": 0.1}
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
        """(n, *shape): uniform numbers in [0, 1), or normal ones."""
        make = torch.randn if normal else torch.rand
        return make((self.n, *shape), generator=self.fields, device=self.x.device)

    def colour(self):
        """(n, C, 1, 1) in [0, 1]."""
        return torch.rand((self.n, self.channels, 1, 1), generator=self.cpu).to(self.x)


def op(function=None, *, as_it_is=False):
    """Turns function(x, draw) into operation(x, *, p, generator) for any dtype; adds it to OPS.

    The function gets floats and may change them in place. as_it_is: it gets uint8 as well and must
    not change it in place; operations that only move pixels take a tenth of the time that way.
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
    """Applies the operations of {name: p} in turn, each to every image with probability p."""
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
    weight = kernels[:, None, None].expand(n, c, 1, k, m).reshape(n * c, 1, k, m)
    out = F.conv2d(padded.reshape(1, n * c, *padded.shape[2:]), weight, groups=n * c)
    return out.view(n, c, h, w)


def gaussian(x, sigma):
    """Gaussian blur with standard deviation sigma (n, 1, 1, 1) in pixels."""
    radius = max(1, min(math.ceil(2.5 * sigma.max().item()), min(x.shape[2:]) - 1))
    t = torch.arange(-radius, radius + 1, device=x.device)
    k = (-(t ** 2) / (2 * sigma.view(-1, 1) ** 2)).exp()
    k = (k / k.sum(1, keepdim=True)).to(x)
    return filtered(filtered(x, k[:, :, None]), k[:, None, :])


def side(x, share):
    """A share of the shorter side in pixels, so that kernels look alike at any image size."""
    return max(1.0, share * min(x.shape[2:]))


def line_kernels(length, angle, size):
    """(n, size, size): lines of `length` pixels through the centre, at `angle` (n, 1, 1, 1)."""
    t = torch.arange(size, device=angle.device) - size // 2
    a = angle.view(-1, 1, 1)
    along = t[None, None] * a.cos() + t[None, :, None] * a.sin()
    across = t[None, :, None] * a.cos() - t[None, None] * a.sin()
    k = (along.abs() <= length.view(-1, 1, 1) / 2).float() * (1 - across.abs()).clamp_min(0)
    return k / k.sum((1, 2), keepdim=True)


def clouds(draw, x, channels=1, roughness=0.6):
    """(n, channels, H, W) in [0, 1]: a sum of noise on finer and finer grids, weaker each time."""
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
    """Normal noise with standard deviation 0.02 to 0.2."""
    return x + draw.uniform(0.02, 0.2) * draw.field(*x.shape[1:], normal=True)


@op
def shot_noise(x, draw):
    """Poisson noise of 10 to 200 photons at white."""
    photons = draw.uniform(math.log(10), math.log(200)).exp()
    return torch.poisson(x * photons, generator=draw.fields) / photons


@op
def impulse_noise(x, draw):
    """Sets 1 to 15 % of the values to 0 or 1, in each channel separately."""
    u, share = draw.field(*x.shape[1:]), draw.uniform(0.01, 0.15)
    return torch.where(u < share, (u < share / 2).to(x), x)


@op
def speckle_noise(x, draw):
    """Noise in proportion to the value, with standard deviation 0.1 to 0.5."""
    return x * (1 + draw.uniform(0.1, 0.5) * draw.field(*x.shape[1:], normal=True))


# ---------------------------------------------------------------------- colour

@op(as_it_is=True)
def rgb_shuffle(x, draw):
    """Permutes the channels; never the identity."""
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
    """Turns the hue by an angle (n, 1, 1, 1) and keeps the luma."""
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
    """Reduced to 10 to 50 %."""
    return blend(x, lambda z: z.mean((2, 3), keepdim=True), 1 - draw.uniform(0.1, 0.5))


@op(as_it_is=True)
def saturation(x, draw):
    """From none to three times as much."""
    return blend(x, luma, 1 - draw.uniform(0.0, 3.0))


def blend(x, other, share):
    """(1 - share) x + share other(x), for shares (n, 1, 1, 1) that may lie outside [0, 1]."""
    if x.dtype != torch.uint8:
        return x.lerp(other(x), share)
    size, out = 2 if x.device.type == "cpu" else len(x), torch.empty_like(x)  # fits into a cache
    for part, to, by in zip(x.split(size), out.split(size), share.split(size), strict=True):
        z = part.float().add_(0.5)  # so that cutting off the fraction rounds
        to.copy_(z.lerp_(other(z), by).clamp_(0, 255.5))
    return out


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
    """Rotated by up to 45 degrees; the corners are black."""
    a, ratio = draw.uniform(-math.pi / 4, math.pi / 4), x.shape[2] / x.shape[3]
    theta = torch.cat([a.cos(), -a.sin() * ratio, 0 * a, a.sin() / ratio, a.cos(), 0 * a], 1)
    if x.dtype != torch.uint8:
        return resample(x, theta.view(-1, 2, 3))
    return resample(x.float(), theta.view(-1, 2, 3)).round_().to(torch.uint8)


@op(as_it_is=True)
def random_cut(x, draw):
    """A crop of 50 to 95 % of each side, resized to the full size."""
    return torch.stack([
        TF.resized_crop(one, *corner, *sides, list(x.shape[2:]))
        for one, corner, sides in zip(x, *places(x, draw, 0.5), strict=True)])


@op(as_it_is=True)
def random_padding(x, draw):
    """Resized to 60 to 95 % and placed anywhere on grey or on a colour."""
    back = torch.where(draw.uniform(0, 1) < 0.5, torch.full_like(draw.colour(), 0.5), draw.colour())
    out = level(back, x).expand_as(x).contiguous()
    for canvas, one, (top, left), (high, wide) in zip(out, x, *places(x, draw, 0.6), strict=True):
        canvas[:, top:top + high, left:left + wide] = TF.resize(one, [high, wide])
    return out


def places(x, draw, least):
    """n random rectangles of `least` to 95 % of the sides: their corners (top, left), their sides.
    """
    size = torch.tensor(x.shape[2:])
    sides = ((draw.uniform(least, 0.95).cpu().view(-1, 1) * size).round()).long().clamp_min(1)
    corner = torch.stack([draw.uniform(0, 1).cpu().flatten() for _ in range(2)], 1)
    return (corner * (size - sides + 1)).long().minimum(size - sides).tolist(), sides.tolist()


def level(values, x):
    """Values in [0, 1] on the scale and in the dtype of x."""
    return (255 * values).round().to(x.dtype) if x.dtype == torch.uint8 else values.to(x.dtype)


@op
def elastic(x, draw):
    """A smooth distortion, by up to 6 % of the side."""
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
    """A rectangle of 10 to 40 % of each side, filled with a colour, black, white or grey."""
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
    """The patches of a 2 x 2 to 4 x 4 grid, shuffled."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    cells = draw.integers(2, 4).view(-1, 1, 1)
    high, wide = h // cells, w // cells
    r, c = row // high, column // wide
    keys = draw.field(16).masked_fill(torch.arange(16, device=x.device) >= (cells ** 2)[:, :, 0], 2)
    order = keys.argsort(1)  # patches of the grid come first, in random order
    number = (r * cells + c).clamp_max(15)
    source = order.gather(1, number.flatten(1)).view(number.shape)
    whole = (r < cells) & (c < cells)  # the rest at the right and at the bottom stays
    return take(x, torch.where(whole, source // cells * high + row % high, row),
                torch.where(whole, source % cells * wide + column % wide, column))


@op(as_it_is=True)
def extend(x, draw):
    """Spreads 0.5 to 3 % of the pixels over the 3 x 3 to 7 x 7 pixels around them."""
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
    """Blocks of 2 pixels up to a tenth of the side."""
    (row, column), (h, w) = grid(x), x.shape[2:]
    block = draw.integers(2, max(2, round(side(x, 0.1)))).view(-1, 1, 1)
    return take(x, (row // block * block + block // 2).expand(-1, h, w),
                (column // block * block + block // 2).expand(-1, h, w))


# ------------------------------------------------------------------------ blur

@op
def gaussian_blur(x, draw):
    """Standard deviation 0.3 to 1.5 % of the side, for small images 0.5 to 1.5 pixels."""
    return gaussian(x, draw.uniform(max(0.5, side(x, 0.003)), max(1.5, side(x, 0.015))))


@op
def blur(x, draw):
    """The mean over 3 x 3 to 7 x 7 pixels."""
    radius, t = draw.integers(1, 3).view(-1, 1), torch.arange(-3, 4, device=x.device)
    k = (t.abs() <= radius).to(x) / (2 * radius + 1)
    return filtered(filtered(x, k[:, :, None]), k[:, None, :])


@op
def motion_blur(x, draw):
    """The mean along a line of 2 to 8 % of the side, in any direction."""
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
    """The mean of eight zooms, the largest 1.05 to 1.3 times."""
    most, total = draw.uniform(0.05, 0.3), x
    for k in range(1, 8):
        scale = 1 / (1 + most * k / 7)
        total = total + resample(x, scaling(scale, scale, 0 * scale, 0 * scale), "border")
    return total / 8


@op
def glass_blur(x, draw):
    """Each pixel taken from up to 1 to 3 pixels away, then softened."""
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
    """Soft flakes over a whiter, paler image."""
    flakes = (draw.field(1, *x.shape[2:]) < draw.uniform(0.005, 0.02)).to(x)
    sigma = draw.uniform(side(x, 0.003), side(x, 0.008))
    flakes = (gaussian(flakes, sigma) * 6 * sigma ** 2).clamp_max(1)
    white = draw.uniform(0.1, 0.4)
    return (1 - white) * x + white * (0.5 * luma(x) + 0.5) + flakes


@op
def fog(x, draw):
    """Clouds over an image with less contrast."""
    thick = draw.uniform(0.3, 0.7)
    return (1 - thick) * x + thick * (0.4 + 0.6 * clouds(draw, x))


@op
def frost(x, draw):
    """Pale blue ice crystals along the ridges of clouds, thickest at the border."""
    ridges = (1 - (2 * clouds(draw, x, roughness=0.8) - 1).abs()) ** 4
    row, column = grid(x)
    edge = torch.maximum((2 * row / x.shape[2] - 1).abs(), (2 * column / x.shape[3] - 1).abs())
    cover = (ridges * (0.4 + edge) * draw.uniform(0.6, 1.0)).clamp(0, 0.9)
    ice = x.new_tensor([0.85, 0.93, 1.0][:x.shape[1]]).view(1, -1, 1, 1)
    return (1 - cover) * x + cover * ice


@op
def spatter(x, draw):
    """Drops of water or mud that cover 5 to 20 %."""
    cells = [max(2, size // 5) for size in x.shape[2:]]
    depth = F.interpolate(draw.field(1, *cells), x.shape[2:], mode="bicubic", align_corners=False)
    edge = depth.flatten(1).sort(1).values  # so that exactly that share is covered
    rank = ((1 - draw.uniform(0.05, 0.2).view(-1, 1)) * (edge.shape[1] - 1)).long()
    cover = ((depth - edge.gather(1, rank).view(-1, 1, 1, 1)) * 20).clamp(0, 1)
    mud = draw.integers(0, 1).view(-1, 1, 1, 1).bool()
    colours = [x.new_tensor(c[:x.shape[1]]).view(1, -1, 1, 1)
               for c in ((0.25, 0.16, 0.08), (0.7, 0.85, 0.9))]
    return x + 0.8 * cover * (torch.where(mud, *colours) - x)


# --------------------------------------------------------------------- storage

@op(as_it_is=True)
def jpeg(x, draw):
    """Quality 8 to 40. The codec runs on the CPU, one image at a time."""
    pixels = (x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)).cpu()
    pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # the codec's order
    found = np.empty_like(pixels)
    for k, quality in enumerate(draw.integers(8, 40).tolist()):
        buffer = io.BytesIO()
        Image.fromarray(pixels[k].squeeze()).save(buffer, "JPEG", quality=quality)
        found[k] = np.asarray(Image.open(buffer, formats=("JPEG",))).reshape(found[k].shape)
    found = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous().to(x.device)
    return found if x.dtype == torch.uint8 else to_float(found).to(x)
