"""utils/augment.py: properties of every operation, and the published strengths."""

import io
import math

import matplotlib.colors
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from attack_toys import chances, operations
from utils import augment
from utils.attack.chance import Chance
from utils.augment import OPS
from utils.errors import UserError

NAMES = sorted(OPS)
NOTHING_DRAWN = ("horizontal_flip", "vertical_flip", "blur")
OFTEN_UNCHANGED = ("rotation", "rgb_shuffle")  # by less than half a pixel; the same order
WANTED = """pepper_salt colour_points gaussian_noise mosaic_block rgb_shuffle colour_jitter rotation
    horizontal_flip vertical_flip random_cut motion_blur gaussian_blur blur rain snow extend
    block_shuffle local_shuffle random_padding fog frost shot_noise impulse_noise speckle_noise
    glass_blur defocus_blur zoom_blur elastic spatter contrast brightness saturation jpeg
    pixelate"""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=6, size=(36, 44), channels=3, seed=0):
    """The same smooth picture n times, with some black and white, uint8."""
    coarse = torch.rand((1, channels, 5, 5), generator=seeded(seed))
    x = F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)
    x[:, :, :4, :4], x[:, :, -4:, -4:] = 0, 1
    return (x * 255).round().to(torch.uint8).expand(n, -1, -1, -1).clone()


def test_every_operation_exists_and_belongs_to_one_family():
    assert set(WANTED.split()) == set(OPS)
    assert sorted(sum(augment.FAMILIES.values(), ())) == sorted(OPS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "channels"), [((36, 44), 3), ((28, 28), 1), ((33, 32), 3)])
def test_shape_dtype_and_range_are_kept_and_the_input_is_not_changed(name, size, channels):
    pixels = pictures(4, size, channels)
    for x in (pixels, pixels.float() / 255, pixels.double() / 255):
        before = x.clone()
        out = OPS[name](x, generator=seeded())
        assert out.shape == x.shape and out.dtype == x.dtype
        assert torch.equal(x, before)
        assert out.dtype == torch.uint8 or (out.min() >= 0 and out.max() <= 1)
        assert torch.isfinite(out.float()).all()


@pytest.mark.parametrize("name", NAMES)
def test_uint8_and_float_images_give_the_same_result(name):
    x = pictures(5)
    levels = OPS[name](x, generator=seeded(2)).float()
    floats = 255 * OPS[name](x.float() / 255, generator=seeded(2))
    assert (levels - floats).abs().max() < 1.6  # rounding, in resizing twice


@pytest.mark.parametrize("name", NAMES)
def test_images_differ_and_the_same_seed_repeats_them(name):
    x, p = pictures(8), 0.5 if name in NOTHING_DRAWN else 1.0
    state = torch.get_rng_state()
    out = OPS[name](x, p=p, generator=seeded(1))
    assert len({tuple(one.flatten().tolist()) for one in out}) >= (
        2 if name in (*NOTHING_DRAWN, "gaussian_blur") else 3)
    assert torch.equal(out, OPS[name](x, p=p, generator=seeded(1)))
    assert not torch.equal(out, OPS[name](x, p=p, generator=seeded(3)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_p_is_the_share_of_changed_images(name):
    x = pictures(40, (24, 24))
    assert torch.equal(OPS[name](x, p=0.0, generator=seeded()), x)
    changed = (OPS[name](x, p=0.5, generator=seeded()) != x).flatten(1).any(1)
    assert 8 <= changed.sum() <= 30
    least = 16 if name in OFTEN_UNCHANGED else 32
    assert (OPS[name](x, generator=seeded()) != x).flatten(1).any(1).sum() >= least


def test_several_operations_are_applied_in_turn():
    x, own = pictures(12), chances(12, 2)
    before = x.clone()
    out = augment.augment(x, {"rain": 0.7, "rotation": 0.4}, generator=own)
    one = OPS["rain"](x, p=0.7, generator=own)
    assert torch.equal(out, OPS["rotation"](one, p=0.4, generator=own))
    assert torch.equal(x, before) and not torch.equal(out, one)
    with pytest.raises(UserError, match="wanted one of"):
        augment.augment(x, {"hail": 1.0}, generator=seeded())


def mixed(n, size):
    """n different pictures, uint8, and the Chance of images 3, 1, 4, ... of a list."""
    x = torch.cat([pictures(1, size, seed=k) for k in range(n)])
    return x, Chance(6, torch.tensor([3, 1, 4, 15, 9, 2, 65])[:n])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_gets_the_same_result_alone_and_in_any_batch_or_order(name):
    x, own = mixed(7, (36, 44))
    for images in (x, x.float() / 255):
        whole = OPS[name](images, p=0.8, generator=own)
        for rows in ([2], [6, 0, 3], slice(1, 7, 2), [5, 5, 1]):
            part = OPS[name](images[rows], p=0.8, generator=own[rows])
            assert torch.equal(part, whole[rows]) or images is not x and torch.allclose(
                part, whole[rows], rtol=0, atol=1e-5)  # sums in another order
    assert not torch.equal(whole, images)


def test_the_pipeline_treats_an_image_of_the_published_size_alone_as_in_a_batch():
    x, own = mixed(4, (224, 224))
    chances = dict.fromkeys(OPS, 0.3)
    whole = augment.augment(x, chances, generator=own)
    for rows in ([3], [2, 0]):
        assert torch.equal(augment.augment(x[rows], chances, generator=own[rows]), whole[rows])
    assert (whole != x).flatten(1).any(1).all()


@pytest.mark.parametrize("name", sorted({*NAMES} - {"jpeg", "random_cut", "random_padding"}))
def test_no_operation_loops_over_images(name):
    """Except three: the codec and resizing to several sizes take one image at a time."""
    OPS[name](pictures(1), generator=seeded())  # fills caches
    counts = []
    for n in (2, 30):
        x = pictures(n)
        counts.append(operations(lambda x=x: OPS[name](x, generator=chances(len(x)))))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("mean", [0.0, 0.0624, 1.0, 7.77, 29.99, 60.0])
def test_poisson_numbers_follow_the_distribution_of_their_mean(mean):
    u, v = chances(50, 3).uniform(2, 4000).unbind(1)
    found = augment.poisson(torch.full_like(u, mean), u, v).flatten()
    n, counts = len(found), torch.bincount(found).double()
    k = torch.arange(len(counts)).double()
    wanted = n * (torch.special.xlogy(k, k.new_tensor(mean)) - mean - torch.lgamma(k + 1)).exp()
    often = wanted > 5
    chi2, free = ((counts - wanted) ** 2 / wanted)[often].sum(), max(1, int(often.sum()) - 1)
    assert abs(chi2 - free) < 5 * math.sqrt(2 * free) or mean == 0 and not found.any()
    assert wanted[~often].sum() * 5 + 30 > counts[~often].sum()


RELEASED = [
    "pepper_salt", "colour_points", "gaussian_noise", "mosaic_block", "rgb_shuffle", "rotation",
    "horizontal_flip", "vertical_flip", "gaussian_blur", "blur", "rain", "extend", "block_shuffle",
    "local_shuffle", "random_padding", "fog", "shot_noise", "impulse_noise", "speckle_noise",
    "glass_blur", "defocus_blur", "motion_blur", "zoom_blur", "frost", "snow", "spatter",
    "contrast", "brightness", "saturation", "jpeg", "pixelate", "elastic"]  # revision dab6e50
PHASE1 = {  # revision b42da2e
    0.1: """pepper_salt colour_points gaussian_noise mosaic_block horizontal_flip shot_noise
        impulse_noise speckle_noise glass_blur defocus_blur motion_blur zoom_blur snow spatter
        pixelate elastic""",
    0.05: "rgb_shuffle rotation rain block_shuffle fog contrast brightness saturation",
    0.01: "vertical_flip extend local_shuffle random_padding jpeg", 0.001: "gaussian_blur blur"}


def test_the_presets_are_the_published_tables_in_the_published_order():
    assert set(augment.PRESETS) == {"released", "phase1"}
    assert list(augment.PRESETS["released"].items()) == [(name, 0.05) for name in RELEASED]
    phase1 = {name: p for p, names in PHASE1.items() for name in names.split()}
    assert augment.PRESETS["phase1"] == phase1
    assert list(augment.PRESETS["phase1"]) == [name for name in RELEASED if name != "frost"]
    assert len(RELEASED) == 32 and set(OPS) - set(RELEASED) == {"random_cut", "colour_jitter"}


@pytest.mark.parametrize(("preset", "least", "most"), [("released", 40, 56), ("phase1", 44, 59)])
def test_a_preset_changes_about_four_images_of_five(preset, least, most):
    x = pictures(60, (32, 32))
    out = augment.augment(x, augment.PRESETS[preset], generator=seeded())
    assert least <= (out != x).flatten(1).any(1).sum() <= most
    assert torch.equal(out, augment.augment(x, augment.PRESETS[preset], generator=seeded()))


@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64)])
def test_anything_but_a_batch_of_images_is_refused(x):
    with pytest.raises(UserError, match="wanted images"):
        OPS["rain"](x, generator=seeded())


# ----------------------------------------------------------------- by hand

def numbered(n, size):
    """n images whose pixels hold their own numbers, and function(images) -> those numbers."""
    count = size * size
    x = torch.arange(count, dtype=torch.float64).view(1, 1, size, size).expand(n, -1, -1, -1)
    return x / count, lambda out: (out * count).round().long()[:, 0]


def test_block_shuffle_swaps_two_parts_cut_at_40_to_60_percent():
    x, numbers = numbered(60, 200)
    cuts = {0: set(), 1: set()}
    for one in numbers(OPS["block_shuffle"](x, generator=seeded())):
        down, right = divmod(one[0, 0].item(), 200)
        assert (down == 0) != (right == 0)
        assert torch.equal(one, numbers(x)[0].roll((-down, -right), (0, 1)))
        cuts[int(down == 0)].add(max(down, right))
    wanted = {int(share * 200 + 1e-4) for share in np.linspace(0.4, 0.6, 10)}
    assert cuts[0] | cuts[1] == wanted and min(map(len, cuts.values())) > 4


def test_local_shuffle_permutes_patches_of_80_to_100_pixels():
    x, numbers = numbered(30, 224)
    sides = set()
    for one in numbers(OPS["local_shuffle"](x, generator=seeded())):
        fits = [side for side in range(80, 101) if is_a_permutation(one, side)]
        assert fits
        sides |= set(fits[:1])
    assert len(sides) > 10 and min(sides) < 83 and max(sides) > 97


def is_a_permutation(one, side):
    """Whether the image of numbers consists of nine patches of that side, later ones on top."""
    starts, patches = (0, side, 224 - side), []
    for top, bottom in zip(starts, (side, 224 - side, 224), strict=True):
        for left, right in zip(starts, (side, 224 - side, 224), strict=True):
            first = one[top, left].item()
            patches.append(divmod(first, 224))
            offset = torch.arange(bottom - top)[:, None] * 224 + torch.arange(right - left)
            if not torch.equal(one[top:bottom, left:right], first + offset):
                return False
    return sorted(patches) == [(top, left) for top in starts for left in starts]


def test_extend_takes_each_pixel_from_a_random_place_further_down_and_right():
    x, numbers = numbered(60, 224)
    row, column = torch.arange(224)[:, None], torch.arange(224)
    farthest = []
    for one in numbers(OPS["extend"](x, generator=seeded())):
        down, right = one // 224 - row, one % 224 - column
        assert down.min() == 0 == right.min() and down.max() == right.max()
        most = down.max().item()
        inner = down[:-most, :-most]
        assert abs(inner.double().mean() - most / 2) < 0.1  # each of 0 .. most equally often
        assert (inner[:, 1:] != inner[:, :-1]).double().mean() > 0.9 * most / (most + 1)
        assert (inner != right[:-most, :-most]).double().mean() > 0.9 * most / (most + 1)
        farthest.append(most)
    assert set(farthest) == {2, 3, 4, 5, 6, 7, 8}


def test_sizes_in_pixels_scale_with_the_image():
    x, numbers = numbered(40, 28)
    moved = numbers(OPS["extend"](x, generator=seeded())) - numbers(x)
    assert set(moved.unique().tolist()) <= {0, 1, 28, 29}
    hit = OPS["mosaic_block"](x * 0 + 0.3, generator=seeded())[:, 0] != 0.3
    assert set(hit.any(1).sum(1).tolist()) == {2, 3} == set(hit.any(2).sum(1).tolist())


def test_rotation_stays_within_five_degrees():
    x = torch.zeros(80, 1, 224, 224, dtype=torch.uint8)
    x[:, :, 110:114, 200:204] = 255  # 89.5 pixels to the right of the centre
    out = OPS["rotation"](x, generator=seeded(1))[:, 0]
    assert set(out.unique().tolist()) == {0, 255}  # the nearest pixel
    angles = []
    for one in out:
        row, column = one.nonzero().double().mean(0).tolist()
        assert math.hypot(row - 111.5, column - 111.5) == pytest.approx(90, abs=0.6)
        angles.append(math.degrees(math.atan2(row - 111.5, column - 111.5)))
    angles = torch.tensor(angles)
    assert 4.5 < angles.max() < 5.2 and -5.2 < angles.min() < -4.5
    assert ((angles + 5) * 4 / 10).long().clamp(0, 3).bincount().min() > 10  # equally often


def test_random_padding_shrinks_images_to_65_to_95_percent_on_grey_or_random_pixels():
    x = torch.full((60, 3, 100, 100), 80, dtype=torch.uint8)
    greys, sides, coloured = set(), set(), 0
    for one in OPS["random_padding"](x, generator=seeded()):
        inside = (one == 80).all(0)
        side = inside.any(1).sum().item()
        assert inside.any(0).sum() == side and inside.sum() == side ** 2
        back = one[:, ~inside]
        sides.add(side)
        if (back == back[0, 0]).all():
            greys.add(back[0, 0].item())
        else:
            coloured += 1
            assert len(back.unique(dim=1)[0]) > 0.95 * back.shape[1]
    assert greys <= {round(255 * k / 9) for k in range(10)} and len(greys) > 6
    assert sides == {int(100 * scale + 1e-4) for scale in np.linspace(0.65, 0.95, 10)}
    assert 15 < coloured < 45


def test_rgb_shuffle_draws_any_of_the_six_orders():
    x = torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8, generator=seeded())
    out, seen = OPS["rgb_shuffle"](x, generator=seeded()), set()
    for one, other in zip(x, out, strict=True):
        order = tuple(next(k for k in range(3) if torch.equal(c, one[k])) for c in other)
        assert sorted(order) == [0, 1, 2]
        seen.add(order)
    assert len(seen) == 6


def test_turning_the_hue_keeps_luma_and_a_full_turn_keeps_everything():
    x = torch.rand((5, 3, 6, 6), generator=seeded(), dtype=torch.float64)
    angle = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    assert torch.allclose(augment.luma(augment.turned(x, angle)), augment.luma(x), atol=1e-9)
    whole = torch.full_like(angle, 2 * math.pi)
    assert torch.allclose(augment.turned(x, whole), x, atol=1e-9)
    assert not torch.allclose(augment.turned(x, angle)[0], x[0], atol=1e-2)


@pytest.mark.parametrize(("size", "kernel"), [((9, 10), (5, 3)), ((40, 37), (33, 29))])
def test_each_image_is_filtered_with_its_own_kernel(size, kernel):
    x = torch.rand((3, 2, *size), generator=seeded(), dtype=torch.float64)
    kernels = torch.rand((3, *kernel), generator=seeded(), dtype=torch.float64)
    out, (k, m) = augment.filtered(x, kernels), kernel
    padded = F.pad(x, (m // 2, m // 2, k // 2, k // 2), mode="reflect")
    for n, c, i, j in ((0, 0, 0, 0), (1, 1, size[0] - 1, size[1] - 1), (2, 0, 4, 5)):
        wanted = (padded[n, c, i:i + k, j:j + m] * kernels[n]).sum()
        assert out[n, c, i, j] == pytest.approx(wanted.item(), abs=1e-9)


def test_smooth_noise_is_a_gaussian_blur_with_wrapped_borders():
    noise = torch.rand((2, 1, 40, 60), generator=seeded(), dtype=torch.float64)
    sigma = torch.tensor([1.5, 3.0], dtype=torch.float64).view(-1, 1, 1, 1)
    out = augment.smooth(noise, sigma)
    t = torch.arange(-15, 16, dtype=torch.float64)
    for one, s, found in zip(noise, sigma, out, strict=True):
        k = (-(t / s.item()) ** 2 / 2).exp()
        k = (k[:, None] * k) / k.sum() ** 2
        padded = F.pad(one[None], (15, 15, 15, 15), mode="circular")
        assert torch.allclose(F.conv2d(padded, k[None, None])[0], found, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian_blur", "blur", "motion_blur", "defocus_blur",
                                  "zoom_blur", "glass_blur"])
def test_a_blur_does_not_change_a_uniform_image(name):
    x = torch.full((4, 3, 40, 40), 0.3)
    assert torch.allclose(OPS[name](x, generator=seeded()), x, atol=1e-5)


@pytest.mark.parametrize(("angle", "along"), [(0.0, 1), (math.pi / 2, 0)])
def test_line_kernels_follow_their_angle(angle, along):
    k = augment.line_kernels(5.0, 1.0, torch.tensor(angle).view(1, 1, 1, 1))[0]
    line = k.sum(1 - along)
    assert line.tolist() == pytest.approx([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0], abs=1e-5)
    assert torch.allclose(k.sum(along)[3], torch.tensor(1.0), atol=1e-5)
    wide = augment.line_kernels(5.0, 3.0, torch.tensor(angle).view(1, 1, 1, 1))[0].sum(along)
    assert wide.tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.25, 0, 0], abs=1e-5)


# ------------------------------------------------------------- published strengths

def near(share, wanted, n):
    """Whether a share of n draws agrees with its probability within five standard errors."""
    return abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / n)


def test_one_percent_of_the_pixels_are_pepper_or_salt():
    x = torch.full((50, 3, 90, 90), 0.5)
    out = OPS["pepper_salt"](x, generator=seeded())
    assert (out == out[:, :1]).all() and set(out.unique().tolist()) == {0.0, 0.5, 1.0}
    for value in (0.0, 1.0):
        assert near((out == value).float().mean().item(), 0.005, 50 * 90 * 90)
    assert ((out != 0.5).float().mean((1, 2, 3)) < 0.02).all()


def test_one_percent_of_the_pixels_are_points_of_pure_or_random_colour():
    x = torch.full((50, 3, 90, 90), 0.5)
    out = OPS["colour_points"](x, generator=seeded())
    points = out.movedim(1, 3)[(out != 0.5).any(1)]
    assert near(len(points) / (50 * 90 * 90), 0.01, 50 * 90 * 90)
    rest = torch.ones(len(points), dtype=torch.bool)
    for pure in ((0, 1, 0), (1, 0, 0), (0, 0, 1)):
        same = (points == torch.tensor(pure)).all(1)
        assert near(same.float().mean().item(), 0.25, len(points))
        rest &= ~same
    others = points[rest]
    assert len(others.unique(dim=0)) == len(others)
    assert (others.mean(0) - 0.5).abs().max() < 0.05 and (others.std(0) > 0.25).all()
    grey = OPS["colour_points"](x[:, :1], generator=seeded())
    assert near((grey != 0.5).float().mean().item(), 0.01, 50 * 90 * 90)
    assert len(grey.unique()) > 3000


def test_the_standard_deviation_of_gaussian_noise_is_0_to_0_15():
    x = torch.full((200, 1, 60, 60), 0.5, dtype=torch.float64)
    std = OPS["gaussian_noise"](x, generator=seeded()).std((1, 2, 3))
    assert std.min() == 0 and 0.14 < std.max() < 0.156
    assert std.mean() == pytest.approx(0.075, abs=0.01)


def test_the_mosaic_is_a_square_of_random_pixels_or_black_or_white_or_grey():
    x, kinds, sides = torch.full((300, 3, 224, 224), 64, dtype=torch.uint8), [], set()
    for one in OPS["mosaic_block"](x, generator=seeded()):
        hit = (one != 64).any(0)
        rows, columns = hit.any(1).nonzero()[:, 0], hit.any(0).nonzero()[:, 0]
        side = len(rows)
        assert len(columns) == side and hit.sum() == side ** 2
        for first in (rows[0], columns[0]):
            assert 2 * side <= first < 224 - 2 * side
        colours = one[:, hit].unique(dim=1).T.tolist()
        assert len(colours) == 1 or len(colours) > 0.95 * side ** 2
        kinds.append(tuple(colours[0]) if len(colours) == 1 else "random")
        sides.add(side)
    assert sides == set(range(13, 27))
    for kind, p in (("random", 0.7), ((0, 0, 0), 0.1), ((255, 255, 255), 0.1),
                    ((127, 127, 127), 0.1)):
        assert near(kinds.count(kind) / 300, p, 300)
    assert len(set(kinds)) == 4


def test_rain_has_one_of_ten_whites_and_slants_by_30_degrees_at_most():
    x = torch.zeros(60, 1, 224, 224)
    out = OPS["rain"](x, generator=seeded())[:, 0]
    steps = (out.amax((1, 2)) - 0.7) / 0.3 * 9
    assert (steps - steps.round()).abs().max() < 1e-3 and len(steps.round().unique()) == 10
    spectrum = torch.fft.fft2(out - out.mean((1, 2), keepdim=True)).abs() ** 2
    f = torch.fft.fftfreq(224)
    y, z = f[:, None].expand(224, 224), f.expand(224, 224)
    xx, yy, xy = ((spectrum * w).sum((1, 2)) for w in (z * z, y * y, z * y))
    slant = torch.atan2(2 * xy, xx - yy).rad2deg() / 2  # coarse: streaks are 3 pixels wide
    assert slant.abs().max() < 38 and slant.min() < -20 and slant.max() > 20


def test_blur_equals_that_of_pil():
    x = pictures(1, (60, 50))
    wanted = pil_to_tensor(to_pil_image(x[0]).filter(ImageFilter.BLUR))
    assert (OPS["blur"](x, generator=seeded())[0].int() - wanted.int()).abs().max() <= 1


def hsv(x, channel, change):
    """change(values) of one channel of HSV, on an image (3, H, W) uint8."""
    pixels = matplotlib.colors.rgb_to_hsv(x.permute(1, 2, 0).numpy() / 255)
    pixels[..., channel] = np.clip(change(pixels[..., channel]), 0, 1)
    return torch.from_numpy(matplotlib.colors.hsv_to_rgb(pixels) * 255).permute(2, 0, 1)


def through_jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def squares(image, share):
    small = image.resize([int(share * side) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


BY_OTHER_CODE = {  # {operation: the result at each strength}
    "jpeg": [lambda x, q=q: through_jpeg(to_pil_image(x), q) for q in (25, 18, 15, 10, 7)],
    "pixelate": [lambda x, c=c: squares(to_pil_image(x), c) for c in (0.6, 0.5, 0.4, 0.3, 0.25)],
    "brightness": [lambda x, c=c: hsv(x, 2, lambda v: v + c) for c in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "saturation": [lambda x, a=a, b=b: hsv(x, 1, lambda s: a * s + b) for a, b in (
        (0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))],
    "contrast": [lambda x, c=c: (x - x.double().mean((1, 2), keepdim=True)) * (c - 1) + x
                 for c in (0.4, 0.3, 0.2, 0.1, 0.05)]}


@pytest.mark.parametrize("name", BY_OTHER_CODE)
def test_each_of_the_five_severities_is_drawn_and_gives_the_published_result(name):
    x, seen = pictures(60, (72, 88)), []
    wanted = [make(x[0]) for make in BY_OTHER_CODE[name]]
    wanted = [one if torch.is_tensor(one) else pil_to_tensor(one) for one in wanted]
    for one in OPS[name](x, generator=seeded()):
        off = torch.tensor([(one.double() - other.double()).abs().max() for other in wanted])
        assert off.min() <= 1.001
        seen.append(off.argmin().item())
    assert all(near(seen.count(k) / 60, 0.2, 60) for k in range(5))


def test_gaussian_blur_has_a_radius_of_one_or_two_pixels():
    x, seen = F.interpolate(pictures(20).float(), (224, 224)).to(torch.uint8), []
    wanted = [pil_to_tensor(to_pil_image(x[0]).filter(ImageFilter.GaussianBlur(r))) for r in (1, 2)]
    for one in OPS["gaussian_blur"](x, generator=seeded()):
        off = torch.tensor([(one.float() - other.float()).abs().mean() for other in wanted])
        assert off.min() < 0.5 < off.max()  # PIL blurs by boxes
        seen.append(off.argmin().item())
    assert set(seen) == {0, 1}


def dot(at=(112, 112)):
    """60 images of a white pixel on black."""
    x = torch.zeros(60, 1, 224, 224)
    x[:, :, at[0], at[1]] = 1
    return x


def impulse(op):
    return (op(torch.full((60, 3, 80, 80), 0.5)) != 0.5).double().mean((1, 2, 3))


def speckle(op):
    off = (op(torch.full((60, 3, 80, 80), 0.25)) / 0.25 - 1).abs()
    return off.flatten(1).median(1).values / 0.6745  # clipping does not move the median


def shot(op):
    return torch.stack([1 / one.unique().diff().min() for one in op(torch.full((60, 3, 50, 50),
                                                                             0.5).double())])


def fog(op):
    return 0.25 / op(torch.full((60, 1, 64, 64), 0.5)).amin((1, 2, 3)) - 0.5


def frost(op):
    low, high = (op(torch.full((60, 3, 32, 32), value)) for value in (0.0, 0.05))
    return (high - low).flatten(1).median(1).values / 0.05


def snow(op):  # 1.5 x + 0.5 has the weight 1 - keep
    low, high = (op(torch.full((60, 1, 64, 64), value)) for value in (0.0, 0.05))
    return 3 - 2 * torch.stack([(b - a)[b < 1].median() / 0.05
                                for a, b in zip(low, high, strict=True)])


def defocus(op):
    out = op(dot())[:, 0, 112]
    return ((out > 0.25 * out.amax(1, keepdim=True)).sum(1) - 1) / 2


def motion(op):
    out, t = op(dot())[:, 0].double(), torch.arange(224) - 112
    down, right = ((out.sum(axis) * t).sum(1) / out.sum((1, 2)) for axis in (2, 1))
    assert torch.atan2(down, right.abs()).rad2deg().abs().max() < 46
    return torch.hypot(down, right)


def drawn_out(radius, sigma):
    """The mean of half a normal curve, cut off at 2 radius."""
    t = torch.arange(2 * radius + 1).double()
    k = (-(t / sigma) ** 2 / 2).exp()
    return (t * k).sum().item() / k.sum().item()


def zoom(op):  # the dot's right end is 61.5 pixels from the centre
    right = op(dot((112, 172)))[:, 0].sum(1)  # (n, W)
    return torch.stack([(one > 1e-6).nonzero().max() - 111.5 for one in right]) / 61.5


MEASURED = {  # {operation: (measure(op) -> strengths; published strengths; tolerance)}
    "impulse_noise": (impulse, (0.03, 0.06, 0.09, 0.17, 0.27), 0.012),
    "speckle_noise": (speckle, (0.15, 0.2, 0.35, 0.45, 0.6), 0.02),
    "shot_noise": (shot, (60, 25, 12, 5, 3), 0.01),
    "fog": (fog, (1.5, 2, 2.5, 2.5, 3), 0.01),
    "frost": (frost, (1, 0.8, 0.7, 0.65, 0.6), 0.01),
    "snow": (snow, (0.8, 0.7, 0.7, 0.65, 0.55), 0.01),
    "defocus_blur": (defocus, (3, 4, 6, 8, 10), 0.01),
    "motion_blur": (motion, [drawn_out(*c) for c in ((10, 3), (15, 5), (15, 8), (15, 12),
                                                     (20, 15))], 0.5),
    "zoom_blur": (zoom, (1.1, 1.15, 1.2, 1.25, 1.3), 0.02)}


@pytest.mark.parametrize("name", MEASURED)
def test_the_five_published_strengths_are_measured_equally_often(name):
    measure, strengths, exactly = MEASURED[name]
    found = measure(lambda x: OPS[name](x, generator=seeded()))
    off = (found.double()[:, None] - torch.tensor(strengths).double()).abs()
    assert off.min(1).values.max() < exactly
    seen = off.argmin(1).tolist()  # the first of two equal ones
    for k in set(seen):
        assert near(seen.count(k) / 60, 0.2 * strengths.count(strengths[k]), 60)
    assert {strengths[k] for k in seen} == set(strengths)


def test_glass_blur_moves_pixels_twice_by_up_to_four():
    out = OPS["glass_blur"](torch.cat([dot()] * 2), generator=seeded())[:, 0]
    row, column = torch.arange(224)[:, None] - 112, torch.arange(224) - 112
    far = torch.maximum(row.abs(), column.abs()).expand(len(out), -1, -1)
    reach = torch.where(out > 1e-6, far, 0).amax((1, 2))
    assert 8 < reach.max() <= 2 * 4 + 2 * 4  # and two blurs with a standard deviation of 1.5


def test_elastic_moves_points_and_then_pixels():
    t = (torch.arange(224).double() + 0.5) / 224
    x = torch.stack([t[:, None].expand(224, 224), t.expand(224, 224)])[None].expand(60, -1, -1, -1)
    moved = 224 * (OPS["elastic"](x, generator=seeded(2)) - x)[:, :, 60:-60, 60:-60]
    rough = moved.diff(n=2).abs().flatten(1).median(1).values  # 0 under an affine map
    coarse = rough < 0.02
    assert near(coarse.double().mean().item(), 0.4, 60)  # two severities of five
    assert moved[coarse].abs().max() > 30 and moved[~coarse].abs().max() < 20
    spread = moved[~coarse].std((2, 3))
    assert spread.min() > 0.7 and spread.max() < 4


def test_the_spatter_covers_the_published_shares():
    x = torch.full((60, 3, 90, 90), 0.5)
    out = OPS["spatter"](x, generator=seeded())
    covered = ((out - 0.5).abs().amax(1) > 1e-6).float().mean((1, 2))
    lighter = out.mean((1, 2, 3)) > 0.5
    assert near(lighter.float().mean().item(), 0.6, 60)  # three severities of five are water
    assert 0.01 < covered[lighter].min() < 0.06 and 0.2 < covered[lighter].max() < 0.27
    assert covered[~lighter].min() > 0.08 and covered[~lighter].max() < 0.3
