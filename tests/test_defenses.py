"""The layers compared with formulas and naive oracles; what an adaptive attacker sees."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack_toys import chances, pictures, predicted, toy
from attacks import apgd, bim, cw_l2, fgsm, mim, pgd, square
from utils.attack.adaptive import bpda, draws_of, eot
from utils.attack.core import LAYERS
from utils.attack.random_layers import chance_for, drawing_from, rows_passing
from utils.defenses import (
    DEFENSES,
    GradientConcealment,
    ResizePad,
    adaptive,
    defend,
    describe,
)
from utils.errors import UserError

LEVELS = torch.arange(256, dtype=torch.float32) / 255


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def eight_bit(n=8, seed=0):
    """Images on the grid k/255, including black and white pixels."""
    return LEVELS[(255 * pictures(n, seed=seed)).round().long()]


# ------------------------------------------------------------------- the module

def test_the_forward_pass_changes_42_of_the_256_grey_levels_by_at_most_15_billionths():
    moved = GradientConcealment()(LEVELS) - LEVELS
    assert int((moved != 0).sum()) == 42
    assert moved.abs().max() <= 1.5e-8
    assert int(moved.nonzero().max()) == 62


@pytest.mark.parametrize("seed", range(3))
def test_the_forward_pass_is_the_identity_within_2e_8(seed):
    x = torch.rand((4, 3, 16, 16), generator=seeded(seed))
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    before = x.clone()
    assert (GradientConcealment()(x) - x).abs().max() <= 2e-8
    assert torch.equal(x, before)


def test_gcm_computes_the_formula_of_the_paper():
    x = torch.rand(50, dtype=torch.float64, generator=seeded())
    for w, epsilon in ((1e20, 1e-8), (30.0, 0.01)):
        assert torch.allclose(GradientConcealment(w, epsilon)(x), x + epsilon * torch.sin(w * x),
                              rtol=0, atol=1e-15)


def test_the_gradient_is_multiplied_by_one_plus_epsilon_w_cos_w_x():
    x = torch.rand(50, dtype=torch.float64, generator=seeded(), requires_grad=True)
    g, = torch.autograd.grad(GradientConcealment(40.0, 0.05)(x).sum(), x)
    assert torch.allclose(g, 1 + 0.05 * 40.0 * torch.cos(40.0 * x))
    assert (g < 0).any() and (g > 1).any()


def test_by_default_the_gradient_is_multiplied_by_up_to_a_trillion_with_either_sign():
    x = LEVELS[1:].clone().requires_grad_()
    g, = torch.autograd.grad(GradientConcealment()(x).sum(), x)
    assert g.isfinite().all()
    assert g.abs().median() > 1e11
    assert 0.3 < (g < 0).float().mean() < 0.7


def test_gcm_goes_in_front_of_any_model_in_one_line_and_has_no_weights():
    model, x = toy(), eight_bit()
    defended = nn.Sequential(GradientConcealment(), model)
    assert torch.allclose(defended(x), model(x), rtol=0, atol=1e-5)
    assert not GradientConcealment().state_dict()
    assert set(defended.state_dict()) == {f"1.{key}" for key in model.state_dict()}


def test_float16_is_refused_and_the_message_says_what_to_type():
    with pytest.raises(UserError, match=r"float16.*type x\.float\(\)"):
        GradientConcealment()(torch.rand(2, 3).half())


@pytest.mark.parametrize("given", [{"w": 0}, {"w": float("inf")}, {"w": 1e39},
                                   {"w": float("nan")}, {"epsilon": 0}, {"epsilon": 1}])
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(UserError, match="wanted w above 0"):
        GradientConcealment(**given)


# ---------------------------------------------------------------- resize and pad

def naive_place(x, side, top, left, size):
    out = torch.zeros((len(x), x.shape[1], size, size), dtype=x.dtype)
    for i in range(len(x)):
        s, t, at = int(side[i]), int(top[i]), int(left[i])
        out[i, :, t:t + s, at:at + s] = F.interpolate(
            x[i:i + 1], size=(s, s), mode="bilinear", align_corners=False)[0]
    return out


@pytest.mark.parametrize("shape", [(32, 32), (20, 45), (7, 3), (1, 1)])
@pytest.mark.parametrize(("low", "size"), [(20, 24), (1, 24), (40, 64)])
def test_every_image_is_scaled_and_pasted_on_black(shape, low, size):
    x, layer = torch.rand((9, 3, *shape), generator=seeded()), ResizePad(low, size, seeded(4))
    side, top, left = ResizePad(low, size, seeded(4)).draw(x)
    out = layer(x)
    assert out.shape == (9, 3, size, size) and out.dtype == x.dtype
    assert torch.allclose(out, naive_place(x, side, top, left, size), rtol=0, atol=2e-5)


def test_every_image_and_every_call_has_its_own_draw_and_a_seed_repeats_them():
    x = torch.rand((1, 1, 24, 24), generator=seeded()).expand(6, -1, -1, -1)
    layer, twin = ResizePad(16, 24, seeded(3)), ResizePad(16, 24, seeded(3))
    first, second = layer(x), layer(x)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 6
    assert not torch.equal(first, second)
    assert torch.equal(twin(x), first) and torch.equal(twin(x), second)
    assert not torch.equal(ResizePad(16, 24, seeded(2))(x), first)


def test_all_sides_and_places_occur_within_the_square():
    side, top, left = ResizePad(5, 8, seeded()).draw(torch.zeros(4000, 1))
    assert set(side.tolist()) == {5, 6, 7, 8}
    for corner in (top, left):
        assert corner.min() == 0 and bool((corner + side <= 8).all())
        assert set(corner[side == 5].tolist()) == {0, 1, 2, 3}
    assert torch.bincount(side)[5:].min() > 4000 / 4 * 0.85
    assert not torch.equal(top, left)


def test_resize_and_pad_at_full_size_is_the_identity():
    x = pictures(3, shape=(3, 16, 16))
    assert torch.allclose(ResizePad(16, 16)(x), x, rtol=0, atol=1e-6)


def test_resize_and_pad_is_differentiable_and_leaves_the_global_random_numbers_alone():
    x = torch.rand((2, 1, 5, 4), dtype=torch.float64, generator=seeded(), requires_grad=True)
    state = torch.get_rng_state()
    assert torch.autograd.gradcheck(lambda x: ResizePad(3, 7, seeded(3))(x), x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("low", "size"), [(0, 5), (6, 5), (-1, 4)])
def test_a_smallest_side_out_of_range_is_refused(low, size):
    with pytest.raises(UserError, match="wanted 1 <= low <= size"):
        ResizePad(low, size)


# ---------------------------------------------------- networks behind a defence

def test_none_is_the_model_itself_and_layers_follow_the_order_of_their_names():
    model = toy()
    assert defend(model, "none", size=8) is model
    kinds = {name: [type(part).__name__ for part in defend(model, name, size=8)][:-1]
             for name in DEFENSES[1:]}
    assert kinds == {"gcm": ["GradientConcealment"], "resizepad": ["ResizePad"],
                     "gcm+resizepad": ["GradientConcealment", "ResizePad"]}
    assert defend(model, "resizepad", size=224)[0].low == 218
    assert defend(model, "resizepad", size=8, low=5)[0].low == 5
    with pytest.raises(UserError, match="--defense jpeg: wanted one of none, gcm"):
        defend(model, "jpeg", size=8)


def test_the_description_contains_the_settings():
    assert describe("none", size=8) == "none"
    said = describe("gcm+resizepad", size=224, w=100.0)
    assert "w=100 epsilon=1e-08" in said and "218-224" in said


def test_an_adaptive_attacker_sees_the_same_forward_pass_and_averages_only_random_layers():
    model, x = toy(), eight_bit()
    for name, draws in (("gcm", 1), ("resizepad", 7), ("gcm+resizepad", 7)):
        defended, twin = (defend(model, name, size=8, generator=seeded(3), low=6)
                          for _ in range(2))
        seen = adaptive(defended, 7)
        assert torch.equal(seen(x), twin(x))
        assert draws_of(seen) == draws
        assert any(isinstance(part, bpda) for part in seen.modules()) == ("gcm" in name)
        assert any(isinstance(part, eot) for part in seen.modules()) == ("resize" in name)
    assert adaptive(model) is not None and draws_of(adaptive(model)) == 1


ATTACKS = {
    "fgsm": partial(fgsm, eps=0.05),
    "bim": partial(bim, eps=0.05, alpha=0.01, steps=8),
    "mim": partial(mim, eps=0.05, alpha=0.01, steps=8),
    "pgd_linf": partial(pgd, eps=0.05, alpha=0.01, steps=8),
    "pgd_l2": partial(pgd, norm="l2", eps=0.6, alpha=0.1, steps=8),
    "pgd_l1": partial(pgd, norm="l1", eps=6.0, alpha=1.0, steps=8, step="dense"),
    "pgd_l1 sparse": partial(pgd, norm="l1", eps=6.0, alpha=1.0, steps=8),
    "margin": partial(pgd, norm="l2", eps=0.6, alpha=0.1, steps=8, loss="margin"),
    "apgd": partial(apgd, eps=0.03, steps=12),
    "square": partial(square, eps=0.05, queries=60),
    "cw_l2": lambda *args, **more: cw_l2(*args, steps=40, binary_steps=3, c=1.0, lr=0.02, **more)[0]
}


FIXED_STEPS = [name for name in ATTACKS if name not in ("apgd", "cw_l2")]


@pytest.mark.parametrize("name", FIXED_STEPS)
@pytest.mark.parametrize("seed", range(3))
def test_an_adaptive_attack_on_gcm_gives_the_images_of_the_undefended_network(name, seed):
    model, x = toy(seed=seed), eight_bit(seed=seed)
    y, attack = predicted(model, x), ATTACKS[name]
    bare = attack(model, x, y, generator=seeded(seed))
    seen = attack(adaptive(defend(model, "gcm", size=8)), x, y, generator=seeded(seed))
    assert (bare - x).abs().max() > 1e-3
    assert (seen - bare).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ATTACKS)
def test_any_adaptive_attack_on_gcm_matches_the_undefended_one_if_no_pixel_changes(name):
    """apgd and cw_l2 choose steps by the loss, which amplifies 1e-8 to 1e-3, but not 1e-16."""
    model, x = toy(dtype=torch.float64), eight_bit().double()
    y, attack = predicted(model, x), ATTACKS[name]
    bare = attack(model, x, y, generator=seeded())
    defended = defend(model, "gcm", size=8, epsilon=1e-16)
    naive = attack(defended, x, y, generator=seeded())
    assert name == "square" or (naive - bare).abs().max() > 1e-3
    assert (attack(adaptive(defended), x, y, generator=seeded()) - bare).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["fgsm", "pgd_linf", "pgd_l2", "margin"])
def test_a_naive_attack_on_gcm_fools_fewer_images(name):
    model, x = toy(seed=1), eight_bit(40, seed=5)
    y, attack = predicted(model, x), ATTACKS[name]
    defended = defend(model, "gcm", size=8)
    bare, naive = (attack(each, x, y, generator=seeded()) for each in (model, defended))
    fooled = [int((predicted(model, images) != y).sum()) for images in (bare, naive)]
    assert fooled[1] < 0.7 * fooled[0]


def test_the_gradient_of_an_adaptive_attacker_is_the_mean_over_many_forward_passes():
    model, x = toy(dtype=torch.float64), pictures(4, dtype=torch.float64)
    y, draws = predicted(model, x), 16
    seen = adaptive(defend(model, "resizepad", size=8, low=5, generator=seeded(9)), draws)
    x_adv = pgd(seen, x, y, norm="l2", eps=0.5, alpha=0.3, steps=1, random_start=False,
                generator=chances(4, 7))
    layer, z = ResizePad(5, 8), x.clone().requires_grad_()
    with drawing_from(chances(4, 7).fold(LAYERS)):
        loss = sum(F.cross_entropy(model(layer(z)), y, reduction="sum") for _ in range(draws))
    g, = torch.autograd.grad(loss, z)
    step = 0.3 * g / g.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(x_adv, (x + step).clamp(0, 1), rtol=0, atol=1e-6)


def test_a_random_layer_told_of_its_images_draws_the_same_for_each_in_any_batch_and_order():
    """Every image counts its own draws: image 1 is absent from the second of four passes."""
    x, layer, own = pictures(3), ResizePad(5, 8), chances(9, 4)[[8, 2, 5]]
    passes = [[0, 1, 2], [2, 0], [1, 2], [2, 1, 0]]
    found = {0: [], 1: [], 2: []}
    with drawing_from(own):
        for rows in passes:
            with rows_passing(torch.tensor(rows)):
                for i, image in zip(rows, layer(x[rows]), strict=True):
                    found[i].append(image)
    for i, images in found.items():
        with drawing_from(own[i:i + 1]):
            alone = [layer(x[i:i + 1])[0] for _ in images]
        torch.testing.assert_close(torch.stack(images), torch.stack(alone), rtol=0, atol=1e-6)
        assert not torch.equal(alone[0], alone[1])


def test_a_random_layer_draws_from_its_generator_if_it_is_not_told_of_its_images():
    x, layer, twin = pictures(3), ResizePad(5, 8, seeded(1)), ResizePad(5, 8, seeded(1))
    with drawing_from(chances(2)):  # not for these three
        first = layer(x)
    with rows_passing([0]):
        assert torch.equal(first, twin(x)) and torch.equal(layer(x), twin(x))
    with drawing_from(chances(3)):
        with drawing_from(chances(3, 1)):
            inner = layer(x)
        outer = layer(x)
    for seed, seen in ((0, outer), (1, inner)):
        with drawing_from(chances(3, seed)):
            assert torch.equal(layer(x), seen)
    assert torch.equal(layer(x), twin(x)) and not torch.equal(inner, outer)


def test_two_calls_of_a_random_layer_draw_differently():
    layer, x = ResizePad(1, 24), torch.ones(1, 1, 24, 24)
    with drawing_from(chances(1)):
        assert not torch.equal(layer(x), layer(x))


def test_an_attacker_does_not_know_the_draws_that_judge_its_images():
    """Even if a user gives both the same Chance."""
    x, seen = pictures(4), []

    class Note(nn.Module):
        def forward(self, x):
            seen.append(chance_for(x, None).words(2))
            return toy()(x)
    model = Note()
    y = torch.arange(4)
    fgsm(model, x, y, eps=0.1, generator=chances(4))
    with drawing_from(chances(4)):
        model(x)
    assert not (seen[0][:, None] == seen[1][None]).any()


def test_a_copy_of_a_random_layer_has_its_own_generator_in_the_same_state():
    x, layer = pictures(3), ResizePad(5, 8, seeded(2))
    layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
