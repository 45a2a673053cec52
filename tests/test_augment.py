"""utils/augment.py: what holds for every operation, and some formulas by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from utils import augment
from utils.augment import OPS
from utils.errors import UserError

NAMES = sorted(OPS)
TWO = ("horizontal_flip", "vertical_flip", "block_shuffle")  # that much can happen
WANTED = """pepper_salt colour_points gaussian_noise mosaic_block rgb_shuffle colour_jitter rotation
    horizontal_flip vertical_flip random_cut motion_blur gaussian_blur blur rain snow extend
    block_shuffle local_shuffle random_padding fog frost shot_noise impulse_noise speckle_noise
    glass_blur defocus_blur zoom_blur elastic spatter contrast brightness saturation jpeg
    pixelate"""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=6, size=(36, 44), channels=3, seed=0):
    """n times the same smooth picture with black and white in it, uint8."""
    coarse = torch.rand((1, channels, 5, 5), generator=seeded(seed))
    x = F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)
    x[:, :, :4, :4], x[:, :, -4:, -4:] = 0, 1
    return (x * 255).round().to(torch.uint8).expand(n, -1, -1, -1).clone()


def test_every_operation_is_there_and_belongs_to_one_family():
    assert set(WANTED.split()) == set(OPS)
    assert sorted(sum(augment.FAMILIES.values(), ())) == sorted(OPS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "channels"), [((36, 44), 3), ((28, 28), 1), ((33, 32), 3)])
def test_shape_dtype_range_and_the_input_do_not_change(name, size, channels):
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
    x, p = pictures(6), 0.5 if name.endswith("flip") else 1.0  # a flip has no other parameter
    state = torch.get_rng_state()
    out = OPS[name](x, p=p, generator=seeded(1))
    assert len({tuple(one.flatten().tolist()) for one in out}) >= (2 if name in TWO else 3)
    assert torch.equal(out, OPS[name](x, p=p, generator=seeded(1)))
    assert not torch.equal(out, OPS[name](x, p=p, generator=seeded(3)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_p_is_the_share_of_changed_images(name):
    x = pictures(40, (16, 16))
    assert torch.equal(OPS[name](x, p=0.0, generator=seeded()), x)
    changed = (OPS[name](x, p=0.5, generator=seeded()) != x).flatten(1).any(1)
    assert 8 <= changed.sum() <= 30
    assert (OPS[name](x, generator=seeded()) != x).flatten(1).any(1).sum() >= 32


def test_several_operations_are_applied_in_turn():
    x, generator = pictures(3), seeded(2)
    before = x.clone()
    out = augment.augment(x, {"rain": 0.7, "rotation": 0.4}, generator=seeded(2))
    one = OPS["rain"](x, p=0.7, generator=generator)
    assert torch.equal(out, OPS["rotation"](one, p=0.4, generator=generator))
    assert torch.equal(x, before)
    with pytest.raises(UserError, match="wanted one of"):
        augment.augment(x, {"hail": 1.0}, generator=seeded())


def test_the_published_pipeline_changes_seven_images_of_eight():
    assert set(augment.PUBLISHED) == set(OPS) - {"frost", "colour_jitter", "random_cut"}
    assert sum(augment.PUBLISHED.values()) == pytest.approx(2.052)
    x = pictures(60, (32, 32))
    out = augment.augment(x, augment.PUBLISHED, generator=seeded())
    changed = (out != x).flatten(1).any(1)
    assert 45 <= changed.sum() <= 59


@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64)])
def test_anything_but_a_batch_of_images_is_refused(x):
    with pytest.raises(UserError, match="wanted images"):
        OPS["rain"](x, generator=seeded())


# ----------------------------------------------------------------- by hand

def test_block_shuffle_swaps_halves():
    x = torch.randint(0, 256, (30, 3, 8, 12), dtype=torch.uint8, generator=seeded())
    out = OPS["block_shuffle"](x, generator=seeded())
    ways = [torch.cat([x[:, :, :, 6:], x[:, :, :, :6]], 3),
            torch.cat([x[:, :, 4:], x[:, :, :4]], 2)]
    which = [[torch.equal(one, other[i]) for other in ways] for i, one in enumerate(out)]
    assert all(sum(pair) == 1 for pair in which) and 5 < sum(pair[0] for pair in which) < 25


def test_local_shuffle_moves_patches_and_loses_none():
    x = torch.randint(0, 256, (20, 1, 12, 12), dtype=torch.uint8, generator=seeded())
    out = OPS["local_shuffle"](x, generator=seeded())
    grids = set()
    for one, other in zip(x, out, strict=True):
        for cells in (2, 3, 4):
            size = 12 // cells
            patches = [{tuple(p.flatten().tolist()) for row in image[0].split(size)
                        for p in row.split(size, 1)} for image in (one, other)]
            if patches[0] == patches[1]:
                grids.add(cells)
                break
        else:
            pytest.fail("not the same patches")
    assert grids == {2, 3, 4}


def test_rgb_shuffle_never_keeps_the_order():
    x = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=seeded())
    out, seen = OPS["rgb_shuffle"](x, generator=seeded()), set()
    for one, other in zip(x, out, strict=True):
        order = tuple(next(k for k in range(3) if torch.equal(c, one[k])) for c in other)
        assert sorted(order) == [0, 1, 2] != list(order)
        seen.add(order)
    assert len(seen) == 5


def test_turning_the_hue_keeps_luma_and_a_full_turn_keeps_everything():
    x = torch.rand((5, 3, 6, 6), generator=seeded(), dtype=torch.float64)
    angle = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)
    assert torch.allclose(augment.luma(augment.turned(x, angle)), augment.luma(x), atol=1e-9)
    whole = torch.full_like(angle, 2 * math.pi)
    assert torch.allclose(augment.turned(x, whole), x, atol=1e-9)
    assert not torch.allclose(augment.turned(x, angle)[0], x[0], atol=1e-2)


def test_each_image_is_filtered_with_its_own_kernel():
    x = torch.rand((3, 2, 9, 10), generator=seeded(), dtype=torch.float64)
    kernels = torch.rand((3, 5, 3), generator=seeded(), dtype=torch.float64)
    out = augment.filtered(x, kernels)
    padded = F.pad(x, (1, 1, 2, 2), mode="reflect")
    for n, c, i, j in ((0, 0, 0, 0), (1, 1, 8, 9), (2, 0, 4, 5)):
        wanted = (padded[n, c, i:i + 5, j:j + 3] * kernels[n]).sum()
        assert out[n, c, i, j] == pytest.approx(wanted.item(), abs=1e-12)


@pytest.mark.parametrize("name", ["gaussian_blur", "blur", "motion_blur", "defocus_blur",
                                  "zoom_blur", "glass_blur"])
def test_a_blur_does_not_change_a_uniform_image(name):
    x = torch.full((4, 3, 40, 40), 0.3)
    assert torch.allclose(OPS[name](x, generator=seeded()), x, atol=1e-5)


@pytest.mark.parametrize(("angle", "along"), [(0.0, 1), (math.pi / 2, 0)])
def test_line_kernels_follow_their_angle(angle, along):
    k = augment.line_kernels(torch.tensor(5.0).view(1, 1, 1, 1),
                             torch.tensor(angle).view(1, 1, 1, 1), 9)[0]
    line = k.sum(1 - along)
    assert torch.allclose(line[2:7], torch.full((5,), 0.2), atol=1e-5)
    assert torch.allclose(k.sum(along)[4], torch.tensor(1.0), atol=1e-5)


def test_the_mosaic_is_one_uniform_rectangle_of_any_of_four_kinds():
    x = torch.full((80, 3, 30, 30), 0.25)
    out, kinds = OPS["mosaic_block"](x, generator=seeded()), set()
    for one in out:
        hit = (one != 0.25).any(0)
        rows, columns = hit.any(1).nonzero()[:, 0], hit.any(0).nonzero()[:, 0]
        assert hit.sum() == len(rows) * len(columns) and 2 <= len(rows) <= 13
        inside = one[:, rows[0], columns[0]]
        assert (one[:, hit] == inside[:, None]).all()
        kinds.add(inside[0].item() if (inside == inside[0]).all() else "colour")
    assert kinds == {0.0, 1.0, 0.5, "colour"}


def test_the_documented_shares_of_pixels_are_changed():
    x = torch.full((50, 3, 90, 90), 0.5)
    for name, least, most in (("pepper_salt", 0.01, 0.1), ("impulse_noise", 0.01, 0.15)):
        hit = (OPS[name](x, generator=seeded()) != 0.5).float().mean((1, 2, 3))
        assert hit.min() > least / 2 and hit.max() < 1.3 * most and hit.std() > 0.01
    covered = ((OPS["spatter"](x, generator=seeded()) - 0.5).abs().amax(1) > 1e-6).float()
    assert covered.mean((1, 2)).min() > 0.04 and covered.mean((1, 2)).max() < 0.21
