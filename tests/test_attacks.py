"""The attacks compared with independent answers: closed-form optima of linear models, naive
textbook loops, projections by bisection, gradients averaged by hand.
"""

import functools
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F

import attacks
from attack_toys import (
    K,
    best_linear,
    bisect,
    chances,
    flat,
    greys,
    linear,
    margins,
    naive_gradient,
    naive_pgd,
    nearest_allowed,
    nearest_linear,
    pictures,
    predicted,
    random_weight,
    size,
    toy,
)
from utils.attack import balls
from utils.errors import UserError

SMALL = (3, 4, 4)
D = 48
EPS = {"linf": 0.1, "l2": 0.6, "l1": 2.5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------- two classes: the optimum is known

def gains(attack, x, norm, weight):
    """Each image's gain in margin over the largest possible gain, for both labels: (2 * N,)."""
    share = []
    for label in (0, 1):
        w = flat(weight[1 - label] - weight[label])
        best = [w @ best_linear(w, flat(image), EPS[norm], norm) for image in x]
        bias = torch.zeros(2)  # the label wins by a narrow margin: no image is fooled and stops
        bias[label] = 0.5 + max(w @ flat(image) + gain for image, gain in zip(x, best, strict=True))
        x_adv = attack(linear(weight, bias), x, torch.full((len(x),), label))
        share += [w @ (flat(after) - flat(before)) / gain
                  for before, after, gain in zip(x, x_adv, best, strict=True)]
    return np.array(share)


FAR = {"steps": 60}
OPTIMAL = {
    "fgsm": ("linf", functools.partial(attacks.fgsm, eps=0.1)),
    "bim": ("linf", functools.partial(attacks.bim, eps=0.1, alpha=0.02, steps=12)),
    "mim": ("linf", functools.partial(attacks.mim, eps=0.1, alpha=0.02, steps=12)),
    "pgd linf": ("linf", functools.partial(attacks.pgd, eps=0.1, alpha=0.05, **FAR)),
    "pgd l2": ("l2", functools.partial(attacks.pgd, norm="l2", eps=0.6, alpha=1.2, **FAR)),
    "pgd l1 dense": ("l1", functools.partial(attacks.pgd, norm="l1", step="dense", eps=2.5,
                                             alpha=20.0, steps=300)),
    "pgd linf margin": ("linf", functools.partial(attacks.pgd, eps=0.1, alpha=0.05, loss="margin",
                                                  **FAR)),
    "apgd linf": ("linf", functools.partial(attacks.apgd, eps=0.1, **FAR)),
    "apgd l2": ("l2", functools.partial(attacks.apgd, norm="l2", eps=0.6, **FAR)),
    "apgd l1": ("l1", functools.partial(attacks.apgd, norm="l1", eps=2.5, **FAR)),
}
SLACK = {"apgd linf": 1e-3, "apgd l2": 1e-3, "apgd l1": 1e-2}  # of the optimum


@pytest.mark.parametrize("kind", [greys, pictures], ids=["inside the box", "at the box"])
@pytest.mark.parametrize("name", OPTIMAL)
def test_attacks_reach_the_optimum_of_a_linear_model_and_do_not_exceed_it(name, kind):
    norm, attack = OPTIMAL[name]
    share = gains(attack, kind(6, shape=SMALL), norm, 0.3 * random_weight(2, D))
    assert share.max() < 1 + 2e-5
    assert share.min() > 1 - SLACK.get(name, 1e-4), share


def test_sparse_steps_of_one_coordinate_put_all_mass_on_the_largest_weight():
    weight = 0.3 * random_weight(2, D)
    attack = functools.partial(attacks.pgd, norm="l1", eps=0.3, alpha=0.3, q=1 / D, steps=12)
    for label in (0, 1):
        x, y = greys(6, shape=SMALL), torch.full((6,), label)
        delta = attack(linear(weight), x, y) - x
        top = (weight[1] - weight[0]).abs().argmax()
        torch.testing.assert_close(delta.flatten(1)[:, top].abs(), torch.full((6,), 0.3))
        torch.testing.assert_close(delta.flatten(1).abs().sum(1), torch.full((6,), 0.3))


def test_sparse_steps_skip_pixels_that_the_box_holds_back():
    """As published (SLIDE, arXiv:1904.13000): gradients that point out of the box do not count."""
    weight, x = 0.3 * random_weight(2, D), greys(6, shape=SMALL)
    w = weight[1] - weight[0]
    held = w.abs() > w.abs().sort().values[-13]
    x.flatten(1)[:, held] = (w[held] > 0).float()  # the 12 best cannot move
    y = torch.zeros(6, dtype=torch.int64)
    model = linear(weight, torch.stack([(x.flatten(1) @ w).max() + 4, torch.tensor(0.0)]))
    delta = attacks.pgd(model, x, y, norm="l1", eps=0.3, alpha=0.3, q=4 / D, steps=12) - x
    best = min(w.double() @ torch.from_numpy(best_linear(flat(w), flat(image), 0.3, "l1"))
               for image in x)
    assert (delta.flatten(1) @ w > 0.9 * best).all()


@pytest.mark.slow
def test_square_finds_the_corner_given_by_the_signs_of_the_weights():
    attack = functools.partial(attacks.square, eps=0.1, queries=2000)
    for kind in (greys, pictures):
        share = gains(attack, kind(3, shape=SMALL), "linf", 0.3 * random_weight(2, D))
        assert share.max() < 1 + 2e-5 and share.min() > 0.995, share


@pytest.mark.slow
def test_square_in_l2_fools_if_half_the_radius_suffices_and_never_if_the_radius_does_not():
    weight = 0.3 * random_weight(2, D)
    x = greys(6, shape=SMALL)
    w = weight[1] - weight[0]
    reach = 0.6 * w.norm()  # what the best perturbation of norm 0.6 gains
    for share, fooled in ((0.4, True), (1.001, False)):
        for i in range(len(x)):
            bias = torch.tensor([(x[i].flatten() @ w + share * reach).item(), 0.0])
            model, y = linear(weight, bias), torch.zeros(1, dtype=torch.int64)
            x_adv = attacks.square(model, x[i:i + 1], y, eps=0.6, norm="l2", queries=400)
            assert (predicted(model, x_adv) == 1).item() == fooled


def nearest_radius(w, pixels, need, norm):
    """The radius at which the best d in ball and box gains w.d = need; infinite if none does."""
    if norm == "l2":
        d = nearest_linear(w, pixels, need)
        return np.inf if d is None else size(d, "l2")
    if w @ best_linear(w, pixels, 1e3, norm) < need:
        return np.inf
    return bisect(lambda r: w @ best_linear(w, pixels, r, norm), need)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dlr_targeted", "ce"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_apgd_fools_exactly_where_the_closed_form_says_it_is_possible(norm, loss):
    """At the box, for several classes: the critical radius is that of the nearest class."""
    classes = K if loss == "dlr_targeted" else 2
    x = pictures(3, shape=SMALL)
    model = linear(0.3 * random_weight(classes, D))
    z, y = model(x), predicted(model, x).tolist()
    weight = model[1].weight
    for i in range(len(x)):
        radius = min(nearest_radius(flat(weight[j] - weight[y[i]]), flat(x[i]),
                                    (z[i, y[i]] - z[i, j]).item(), norm)
                     for j in range(classes) if j != y[i])
        for share, fooled in ((0.99, False), (1.05 if norm == "l1" else 1.02, True)):
            x_adv = attacks.apgd(model, x[i:i + 1], torch.tensor(y[i:i + 1]), norm=norm,
                                 eps=share * radius, loss=loss, targets=K - 1, steps=100)
            assert (predicted(model, x_adv).item() != y[i]) == fooled, (i, share)


class Bowl(nn.Module):
    """Two classes; the margin of class 1 is highest, but negative, at the image `top`."""

    def __init__(self, top, height=-1.0):
        super().__init__()
        self.top, self.height = top, height

    def forward(self, x):
        z = self.height - 30 * (x - self.top).flatten(1).square().sum(1)
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_halves_its_step_until_it_reaches_a_maximum_inside_the_ball(norm):
    x = greys(1, shape=SMALL)
    top = x + {"linf": 0.6, "l2": 0.1}[norm] * EPS[norm] * (2 * pictures(1, shape=SMALL) - 1)
    assert size(top - x, norm) < 0.7 * EPS[norm]
    x_adv = attacks.apgd(Bowl(top), x, torch.zeros(1, dtype=torch.int64), eps=EPS[norm], norm=norm,
                         steps=100)
    assert size(x_adv - top, norm) < EPS[norm] / 20


# ------------------------------------------------------------- the smallest L2 norm

def ways_out(model, image, label, confidence=0.0):
    """L2 norms of the smallest perturbations in the box to each other class, sorted."""
    w, bias = model[1].weight.double().numpy(), model[1].bias.double().numpy()
    z = w @ flat(image) + bias
    ways = [nearest_linear(w[j] - w[label], flat(image), z[label] - z[j] + confidence)
            for j in range(len(w)) if j != label]
    return sorted(np.inf if d is None else size(d, "l2") for d in ways)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "bias", "kind", "confidence"), [
    (2, 0.0, greys, 0.0), (2, -50.0, pictures, 0.0), (K, 0.0, greys, 0.0),
    (K, -50.0, pictures, 0.0), (2, 0.0, pictures, 2.0)],
    ids=["two", "two at the box, negative logits", "five", "five at the box, negative logits",
         "two with confidence"])
def test_cw_is_within_2_percent_of_the_shortest_way_out_of_the_class(classes, bias, kind,
                                                                     confidence):
    model = linear(0.5 * random_weight(classes, D, seed=2), torch.full((classes,), bias))
    x = kind(40, shape=SMALL)
    y = predicted(model, x)
    ways = [ways_out(model, image, label, confidence)
            for image, label in zip(x, y.tolist(), strict=True)]
    # clear cases: not next to the decision boundary, and no second class about as near
    clear = [i for i, way in enumerate(ways) if way[0] > 0.1 and min(way[1:] + [9]) > 1.5 * way[0]]
    x, y, best = x[clear[:6]], y[clear[:6]], [ways[i][0] for i in clear[:6]]
    x_adv, success = attacks.cw_l2(model, x, y, steps=300, confidence=confidence)
    assert len(x) == 6 and success.all() and success.dtype == torch.bool
    assert (predicted(model, x_adv) != y).all()
    assert (margins(model, x_adv, y) >= confidence).all()
    for d, shortest in zip(x_adv - x, best, strict=True):
        assert shortest * (1 - 1e-4) <= size(d, "l2") <= 1.02 * shortest


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "distance"), [
    (SMALL, 0.01), (SMALL, 0.02), ((3, 32, 32), 0.1), ((3, 32, 32), 0.2)])
def test_cw_is_as_close_if_the_decision_boundary_is_nearer_than_one_step_of_adam(shape, distance):
    """A step of lr 0.01 is 0.03 and 0.3 long; CIFAR images lie 0.1 to 0.3 from the boundary."""
    x = greys(3, shape=shape)
    weight = random_weight(2, x[0].numel())
    w = (weight[1] - weight[0]) / (weight[1] - weight[0]).norm()
    x = x - ((x.flatten(1) @ w + distance)[:, None] * w).view_as(x)  # that far into class 0
    x_adv, success = attacks.cw_l2(linear(weight), x, torch.zeros(3, dtype=torch.int64), steps=300)
    assert success.all()
    assert max(size(d, "l2") for d in x_adv - x) <= 1.02 * distance


def test_cw_moves_black_and_white_pixels_inwards_if_only_they_matter():
    """The weights pull pixels at 0 up and pixels at 1 down, and are zero for the rest."""
    x = pictures(1, shape=SMALL)
    weight = torch.stack([torch.zeros(D), ((x == 0).float() - (x == 1).float()).flatten()])
    bias = torch.tensor([1.0 + (weight[1] @ x.flatten()).item(), 0.0])
    y = torch.zeros(1, dtype=torch.int64)
    model = linear(weight, bias)
    x_adv, success = attacks.cw_l2(model, x, y, steps=300)
    moved = (weight[1] != 0).view(SMALL)
    assert success.all()
    best = 1 / moved.sum().sqrt().item()
    assert ways_out(model, x[0], 0) == [pytest.approx(best, rel=1e-5)]
    assert size(x_adv - x, "l2") <= 1.02 * best
    assert ((x_adv != x) | ~moved).all()


def test_cw_towards_a_target_is_within_2_percent_of_the_shortest_way_to_it():
    x, weight = pictures(4, shape=SMALL), 0.5 * random_weight(2, D)
    model = linear(weight)
    y = predicted(model, x)
    x_adv, success = attacks.cw_l2(model, x, 1 - y, steps=300, targeted=True)
    assert success.all() and (predicted(model, x_adv) == 1 - y).all()
    for before, after, label in zip(x, x_adv, y.tolist(), strict=True):
        best, = ways_out(model, before, label)
        assert best * (1 - 1e-4) <= size(after - before, "l2") <= 1.02 * best


def test_cw_reports_where_it_failed_and_returns_the_clean_image_there():
    """Class 1 holds the images whose pixels add up to more than a threshold."""
    x, y = pictures(4, shape=SMALL), torch.zeros(4, dtype=torch.int64)
    x[2:] *= torch.tensor([0.5, 0.2]).view(2, 1, 1, 1)  # too far for the budget of steps
    weight = torch.stack([torch.zeros(D), torch.ones(D)])
    brightest = x.flatten(1).sum(1).max().item()
    for threshold, some in ((D + 0.5, False), (brightest + 1, True)):  # no image adds up to D + 0.5
        model = linear(weight, torch.tensor([threshold, 0.0]))
        x_adv, success = attacks.cw_l2(model, x, y, steps=30, binary_steps=3, c=0.1)
        assert bool(success.any()) == some and not success.all()
        assert torch.equal(success, predicted(model, x_adv) == 1)
        assert torch.equal(x_adv[~success], x[~success])


def test_cw_on_a_constant_model_fails_without_a_change():
    x = pictures(3)
    x_adv, success = attacks.cw_l2(linear(torch.zeros(K, 192), torch.arange(K) * 1.0), x,
                                   torch.full((3,), K - 1), steps=20)
    assert not success.any() and torch.equal(x_adv, x)


def test_cw_neither_moves_nor_reports_an_image_that_is_already_misclassified():
    model, x, report = toy(), pictures(4), {}
    x_adv, success = attacks.cw_l2(model, x, (predicted(model, x) + 1) % K, steps=20,
                                   report=report)
    assert success.all() and (x_adv - x).abs().max() < 1e-6
    assert not report["zero_gradient"].any()


# ----------------------------------------------------- attacks compared with textbooks

@pytest.fixture(scope="module")
def world():
    model, x = toy(torch.float64), pictures(4, torch.float64)
    return model, x, predicted(model, x)


def naive_fgv(model, x, y, alpha, **loss):
    """Image by image."""
    g = torch.stack([naive_gradient(model, image, label, **loss)
                     for image, label in zip(x, y.tolist(), strict=True)])
    return (x + alpha * torch.stack([one / one.abs().max() for one in g])).clamp(0, 1)


def close(ours, naive):
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-9)


RADII = {"linf": (0.05, 0.02), "l2": (0.8, 0.4), "l1": (8.0, 5.0)}  # eps, alpha


@pytest.mark.parametrize("projection", ["exact", "rescale"])
@pytest.mark.parametrize("step", ["sign", "normalized", "dense", "sparse"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_is_the_naive_loop_for_every_norm_step_and_projection(world, norm, step, projection):
    eps, alpha = RADII[norm]
    own = {"sign": "linf", "normalized": "l2"}.get(step, "l1")  # the norm that alpha refers to
    same = {"eps": eps, "alpha": alpha if own == norm else RADII[own][1], "steps": 5, "norm": norm,
            "step": step, "q": 1 / 16, "projection": projection}
    ours = attacks.pgd(*world, random_start=False, **same)
    close(ours, naive_pgd(*world, **same))
    assert max(size(d, norm) for d in ours - world[1]) > 0.5 * eps  # the ball was reached


@pytest.mark.parametrize(("loss", "targeted"), [
    ("ce", False), ("margin", False), ("dlr", False), ("ce", True), ("margin", True)])
def test_pgd_climbs_the_given_loss_away_from_labels_or_towards_targets(world, loss, targeted):
    model, x, y = world
    y = (y + 1) % K if targeted else y
    same = {"eps": 0.05, "alpha": 0.02, "steps": 5, "loss": loss, "targeted": targeted}
    close(attacks.pgd(model, x, y, random_start=False, **same), naive_pgd(model, x, y, **same))
    one = {"loss": loss, "targeted": targeted}
    close(attacks.fgsm(model, x, y, eps=0.02, **one),
          naive_pgd(model, x, y, eps=0.02, alpha=0.02, steps=1, **one))
    close(attacks.fgv(model, x, y, alpha=0.02, **one), naive_fgv(model, x, y, 0.02, **one))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_targeted_dlr_makes_progress_from_every_rank_of_the_target(rank):
    """The untargeted ratio, (z_1 - z_target) / (z_1 - z_3), is constant if the target is third."""
    model, x = toy(), pictures(8)
    y = model(x).argsort(1, descending=True)[:, rank]
    same = {"eps": 0.05, "loss": "dlr", "targeted": True}
    for x_adv in (attacks.bim(model, x, y, alpha=0.01, steps=10, **same),
                  attacks.apgd(model, x, y, steps=30, **same)):
        assert (margins(model, x_adv, y) - margins(model, x, y)).mean() < -0.05


def test_pgd_defaults_to_the_step_of_its_norm(world):
    for norm, step in (("linf", "sign"), ("l2", "normalized"), ("l1", "sparse")):
        eps, alpha = RADII[norm]
        same = {"eps": eps, "alpha": alpha, "steps": 3, "norm": norm, "random_start": False}
        assert torch.equal(attacks.pgd(*world, **same), attacks.pgd(*world, step=step, **same))


def test_a_custom_loss_is_maximized(world):
    model, x, y = world
    with torch.enable_grad():
        pixels = x.clone().requires_grad_(True)
        model(pixels).gather(1, y[:, None]).sum().backward()
    x_adv = attacks.fgsm(model, x, y, eps=0.02, loss=lambda z, y: -z.gather(1, y[:, None])[:, 0])
    close(x_adv, (x - 0.02 * pixels.grad.sign()).clamp(0, 1))


@pytest.mark.parametrize("mu", [1.0, 0.5])
def test_mim_equals_the_naive_loop_with_momentum_over_gradients_of_l1_norm_1(world, mu):
    same = {"eps": 0.05, "alpha": 0.01, "steps": 8, "mu": mu}
    ours = attacks.mim(*world, **same)
    close(ours, naive_pgd(*world, **same))
    assert (ours - attacks.mim(*world, **same | {"mu": 0.0})).abs().max() > 0.01


def test_mim_without_momentum_and_pgd_from_the_image_equal_bim_and_one_step_of_bim_is_fgsm(world):
    same = {"eps": 0.05, "alpha": 0.02, "steps": 5}
    bim = attacks.bim(*world, **same)
    assert torch.equal(attacks.mim(*world, mu=0.0, **same), bim)
    assert torch.equal(attacks.pgd(*world, random_start=False, **same), bim)
    assert torch.equal(attacks.fgsm(*world, eps=0.05),
                       attacks.bim(*world, eps=0.05, alpha=0.05, steps=1))
    assert not torch.equal(bim, attacks.fgsm(*world, eps=0.05))


def test_fgv_moves_the_pixel_of_the_largest_gradient_by_alpha_and_the_others_in_proportion(world):
    model, _, y = world
    x = greys(4, torch.float64)  # no pixel meets the box
    x_adv = attacks.fgv(model, x, y, alpha=0.03)
    peak = (x_adv - x).flatten(1).abs().amax(1)
    torch.testing.assert_close(peak, torch.full_like(peak, 0.03), rtol=1e-12, atol=0)
    close(x_adv, naive_fgv(model, x, y, 0.03))
    x = pictures(4, torch.float64)
    close(attacks.fgv(model, x, y, alpha=0.03), naive_fgv(model, x, y, 0.03))


@pytest.mark.parametrize("targeted", [False, True])
def test_stop_early_freezes_each_image_at_its_first_fooling_step_and_no_other(targeted):
    model, x = toy(torch.float64), pictures(10, torch.float64)
    y = predicted(model, x)
    y[3] = (y[3] + 1) % K  # misclassified from the start
    y = (y + 1) % K if targeted else y
    same = {"eps": 0.1, "alpha": 0.01, "steps": 8, "targeted": targeted}
    ours = attacks.bim(model, x, y, stop_early=True, **same)
    close(ours, naive_pgd(model, x, y, stop_early=True, **same))
    close(attacks.mim(model, x, y, stop_early=True, **same),
          naive_pgd(model, x, y, stop_early=True, mu=1.0, **same))
    on, off = ((predicted(model, z) == y) == targeted
               for z in (ours, attacks.bim(model, x, y, **same)))
    assert not (off & ~on).any() and 2 <= on.sum() < 10
    if not targeted:
        assert torch.equal(ours[3], x[3])


# ------------------------------------------------------------- random starts, restarts

class Hills(nn.Module):
    """One pixel, three classes, label 0: hills at 0.3 and 0.7 that gradient steps cannot leave.

    left, right: the peak logits of classes 1 and 2 on each hill; the logit of class 0 is 3.
    """

    def __init__(self, left, right):
        super().__init__()
        self.gain = torch.tensor([left, right])

    def forward(self, x):
        a, b = (torch.exp(-((x.flatten(1) - at) / 0.1) ** 2) for at in (0.3, 0.7))
        others = a * self.gain[0] + b * self.gain[1]
        return torch.cat([torch.full_like(a, 3.0), others], 1)


def on_the_right(hills, restarts):
    """Share of 64 one-pixel images that end on the hill at 0.7."""
    x, y = torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.int64)
    x_adv = attacks.pgd(hills, x, y, eps=0.4, alpha=0.01, steps=50, restarts=restarts)
    return ((x_adv - 0.7).abs() < 0.03).float().mean().item()


@pytest.mark.parametrize(("left", "right"), [
    ([2.0, 2.0], [2.5, 2.5]),      # fools nowhere: the higher loss is kept
    ([2.9, 2.9], [3.5, -10.0])],   # 1.03 on the left, 0.97 on the right, where alone it fools
    ids=["the higher loss", "the fooled one"])
def test_the_worst_of_all_restarts_is_kept(left, right):
    assert 0.3 < on_the_right(Hills(left, right), 1) < 0.7
    assert on_the_right(Hills(left, right), 12) > 0.98
    assert on_the_right(Hills(right, left), 12) < 0.02  # not simply the last, nor the right


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts_are_spread_evenly_over_the_ball(norm):
    x = greys(300, shape=SMALL)
    delta = balls.random_point(x, EPS[norm], norm, chances(300))
    sizes = np.array([size(d, norm) for d in delta]) / EPS[norm]
    assert sizes.max() <= 1 + 1e-5
    for share in (0.1, 0.5, 0.9):  # in D dimensions, whatever the norm: P(size < s) = s ** D
        s = share ** (1 / D)
        assert (sizes < s).mean() == pytest.approx(share, abs=0.08)
    assert abs(delta.mean()) < 4 * delta.std() / delta.numel() ** 0.5
    assert len({tuple(d.flatten().tolist()) for d in delta}) == 300


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_pgd_starts_at_a_random_point_inside_the_ball_and_the_box(world, norm):
    model, x, y = world
    still = {"eps": EPS[norm], "alpha": 0.0, "steps": 1, "norm": norm}
    start = attacks.pgd(model, x, y, **still)
    assert start.min() >= 0 and start.max() <= 1
    assert all(0.3 * EPS[norm] < size(d, norm) <= EPS[norm] * (1 + 1e-5) for d in start - x)
    assert torch.equal(attacks.pgd(model, x, y, random_start=False, **still), x)


# ------------------------------------------------------------------- projections

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_projection_is_the_nearest_allowed_point(norm, dtype):
    g, rough = seeded(), 1e-5 if dtype == torch.float32 else 1e-10
    for x in (pictures(12, dtype, shape=SMALL), greys(12, dtype, shape=SMALL)):
        for spread in (1e-3, 0.05, 0.5, 5.0, 50.0):
            delta = spread * torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype)
            ours = balls.project(delta, x, EPS[norm], norm)
            assert ours.dtype == dtype
            for d, image, p in zip(delta, x, ours, strict=True):
                naive = nearest_allowed(flat(d), flat(image), EPS[norm], norm)
                np.testing.assert_allclose(flat(p), naive, rtol=0, atol=rough * max(spread, 1))
                assert size(p, norm) <= EPS[norm] * (1 + 1e-5)
                assert -1e-6 <= flat(image + p).min() <= flat(image + p).max() <= 1 + 1e-6
            again = balls.project(ours, x, EPS[norm], norm)
            torch.testing.assert_close(again, ours, rtol=0, atol=rough)
            other = balls.project(torch.randn(x.shape, generator=g).to(x), x, EPS[norm], norm)
            ahead = ((delta - ours).double() * (other - ours).double()).flatten(1).sum(1)
            assert (ahead <= 10 * rough * max(spread, 1) ** 2).all()  # no allowed point is nearer


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_projection_is_in_the_ball_however_far_away_the_point_is(norm):
    x, g = pictures(12), seeded()
    for spread in (1e3, 1e4):
        ours = balls.project(spread * torch.randn(x.shape, generator=g), x, EPS[norm], norm)
        sizes = [size(p, norm) for p in ours]
        assert max(sizes) <= EPS[norm] * (1 + 1e-5) and min(sizes) > 0.99 * EPS[norm]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_projection_leaves_allowed_points_alone_and_is_zero_for_radius_zero(norm):
    x = pictures(5)
    nothing = torch.zeros_like(x)
    assert torch.equal(balls.project(nothing, x, 0.1, norm), nothing)
    far = torch.randn(x.shape, generator=seeded())
    assert balls.project(far, x, 0.0, norm).abs().max() == 0
    assert torch.equal(balls.nearest(x + far, x, 0.0, norm), x)
    inside = balls.project(0.01 * torch.randn(x.shape, generator=seeded()), x, 50.0, "l1")
    torch.testing.assert_close(balls.project(inside, x, 50.0, norm), inside, rtol=0, atol=1e-7)


def test_rescaling_scales_to_the_ball_first_and_clips_to_the_box_second():
    x, delta = pictures(4), torch.randn((4, 3, 8, 8), generator=seeded())
    for norm, eps in EPS.items():
        ours = balls.project(delta, x, eps, norm, how="rescale")
        for d, image, p in zip(delta, x, ours, strict=True):
            scaled = d.clamp(-eps, eps) if norm == "linf" else d * eps / size(d, norm)
            torch.testing.assert_close(p, (image + scaled).clamp(0, 1) - image)


def test_norms_are_taken_per_image():
    delta = torch.tensor([[[3.0, -4.0]], [[0.0, 0.5]]])
    for norm, wanted in (("linf", [4.0, 0.5]), ("l2", [5.0, 0.5]), ("l1", [7.0, 0.5])):
        assert balls.norm_of(delta, norm).tolist() == wanted


# ---------------------------------------------------- gradients around a defence

class Grey(torch.autograd.Function):
    """Rounds to 5 levels; its own gradient is zero everywhere."""

    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Shattered(torch.autograd.Function):
    """The identity with a gradient that points the wrong way."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_bpda_around_an_identity_with_a_wrong_gradient_gives_the_attack_on_the_bare_model(world):
    model, x, y = world
    shattered = Layer(Shattered.apply)
    for attack in (functools.partial(attacks.bim, eps=0.05, alpha=0.02, steps=5),
                   functools.partial(attacks.apgd, eps=0.05, steps=10),
                   functools.partial(attacks.fgv, alpha=0.05)):
        bare = attack(model, x, y)
        assert torch.equal(attack(nn.Sequential(attacks.bpda(shattered), model), x, y), bare)
        assert not torch.equal(attack(nn.Sequential(shattered, model), x, y), bare)


def test_bpda_goes_forward_through_the_layer_and_back_through_the_identity(world):
    model, x, y = world
    x = 0.3 + 0.4 * x
    defended = nn.Sequential(attacks.bpda(Layer(Grey.apply)), model)
    assert torch.equal(defended(x), model(Grey.apply(x)))
    x_adv = attacks.fgv(defended, x, y, alpha=0.03)
    for i in range(len(x)):
        g = naive_gradient(model, Grey.apply(x[i]), y[i].item())  # at the rounded image
        close(x_adv[i] - x[i], 0.03 * g / g.abs().max())


def test_bpda_goes_back_through_the_function_it_is_given(world):
    model, x, y = world
    x = 0.3 + 0.4 * x
    defended = nn.Sequential(attacks.bpda(Layer(Grey.apply), lambda x: x ** 3), model)
    assert torch.equal(defended(x), model(Grey.apply(x)))
    x_adv = attacks.fgv(defended, x, y, alpha=0.03)
    for i in range(len(x)):
        g = naive_gradient(model, Grey.apply(x[i]), y[i].item()) * 3 * x[i] ** 2
        close(x_adv[i] - x[i], 0.03 * g / g.abs().max())


class Noise(nn.Module):
    """Adds the next of its noise images, in any mode."""

    def __init__(self, count, shape, scale=0.3):
        super().__init__()
        self.noise = scale * torch.randn((count, *shape), generator=seeded(7), dtype=torch.float64)
        self.turn = 0

    def forward(self, x):
        self.turn += 1
        return x + self.noise[(self.turn - 1) % len(self.noise)]


def test_eot_averages_the_gradients_of_the_loss_over_its_draws(world):
    model, _, y = world
    x = greys(4, torch.float64)
    noise = Noise(5, x.shape[1:])
    x_adv = attacks.fgv(attacks.eot(nn.Sequential(noise, model), 5), x, y, alpha=0.03)
    for i in range(len(x)):
        g = sum(naive_gradient(model, x[i] + n, y[i].item()) for n in noise.noise) / 5
        close(x_adv[i] - x[i], 0.03 * g / g.abs().max())
    one = attacks.fgv(attacks.eot(nn.Sequential(Noise(5, x.shape[1:]), model), 1), x, y, alpha=0.03)
    assert (one - x_adv).abs().max() > 1e-3
    assert torch.equal(attacks.eot(model, 5)(x), model(x))  # forward is one draw


def test_eot_also_averages_as_part_of_a_larger_model(world):
    model, _, y = world
    x = greys(4, torch.float64)

    def attacked(around):
        random_model = nn.Sequential(Noise(5, x.shape[1:]), model)
        return attacks.fgv(around(attacks.eot(random_model, 5)), x, y, alpha=0.03)

    whole = attacked(lambda defended: defended)
    close(attacked(lambda defended: nn.Sequential(nn.Identity(), defended)), whole)


def test_an_attribute_named_draws_of_another_model_is_ignored(world):
    model, x, y = world
    named = nn.Sequential(model)
    named.draws = "many"
    assert torch.equal(attacks.fgsm(named, x, y, eps=0.05), attacks.fgsm(model, x, y, eps=0.05))


# --------------------------------------------------------------------- worst_case

def picker(calls, who, move=0.5):
    """An attack that moves the images whose first pixel is in `who` and notes its input."""
    def attack(model, x, y, *, generator=None, report=None):
        calls.append((x.clone(), y.clone()))
        hit = torch.tensor([round(v.item(), 3) in who for v in x[:, 0, 0, 0]])
        report["zero_gradient"] = ~hit
        return torch.where(hit.view(-1, 1, 1, 1) & (torch.arange(4) == 3), move, x)
    return attack


class Last(nn.Module):
    """Class 1 where the last column holds exactly 0.5, else class 0."""

    def forward(self, x):
        hit = (x[:, 0, :, 3] == 0.5).any(1).float()
        return torch.stack([1 - hit, hit], 1)


def test_worst_case_runs_each_attack_on_survivors_only_and_combines_what_they_fooled():
    x = torch.zeros(6, 1, 4, 4)
    x[:, 0, 0, 0] = torch.arange(6) / 10
    y = torch.tensor([0, 0, 0, 1, 0, 0])  # image 3 is misclassified from the start
    first, second, third, report = [], [], [], {}
    x_adv = attacks.worst_case(Last(), x, y, {
        "first": picker(first, {0.1, 0.4}), "second": picker(second, {0.0, 0.1, 0.3}),
        "third": picker(third, {0.2}, move=0.25)}, report=report)
    for calls, who in ((first, [0, 1, 2, 4, 5]), (second, [0, 2, 5]), (third, [2, 5])):
        assert len(calls) == 1
        assert torch.equal(calls[0][0], x[who]) and torch.equal(calls[0][1], y[who])
    assert torch.equal(predicted(Last(), x_adv) != y,
                       torch.tensor([True, True, False, True, True, False]))
    assert torch.equal(x_adv[3], x[3])
    for i in (0, 1, 4):
        assert (x_adv[i, 0, :, 3] == 0.5).all()
    assert [report[name]["tried"] for name in ("first", "second", "third")] == [5, 3, 2]
    assert [report[name]["fooled"] for name in ("first", "second", "third")] == [2, 1, 0]
    assert [report[name]["zero_gradient"] for name in ("first", "second", "third")] == [3, 2, 1]


def test_worst_case_calls_no_attack_once_all_images_are_fooled():
    x, calls = torch.zeros(3, 1, 4, 4), []
    x_adv = attacks.worst_case(Last(), x, torch.zeros(3, dtype=torch.int64), {
        "all": lambda model, x, y, generator=None, report=None: torch.full_like(x, 0.5),
        "none": picker(calls, set())})
    assert (predicted(Last(), x_adv) == 1).all() and not calls
    y = torch.ones(3, dtype=torch.int64)  # misclassified from the start
    assert torch.equal(attacks.worst_case(Last(), x, y, {"none": picker(calls, set())}), x)
    assert not calls


def test_worst_case_fools_every_image_that_any_of_its_attacks_fools_alone():
    model, x = toy(), pictures(16)
    y = predicted(model, x)
    parts = {"weak": functools.partial(attacks.fgsm, eps=0.03),
             "l2": functools.partial(attacks.pgd, eps=0.6, alpha=0.2, steps=10, norm="l2",
                                     random_start=False),
             "cw": functools.partial(attacks.cw_l2, steps=30, binary_steps=1, lr=0.03, c=1.0)}
    alone, report = torch.zeros(16, dtype=torch.bool), {}
    for attack in parts.values():
        x_adv = attack(model, x, y)
        alone |= predicted(model, x_adv[0] if isinstance(x_adv, tuple) else x_adv) != y
    x_adv = attacks.worst_case(model, x, y, parts, report=report)
    assert torch.equal(predicted(model, x_adv) != y, alone)
    assert all(report[name]["fooled"] for name in parts) and not alone.all(), report
    assert torch.equal(x_adv[~alone], x[~alone])


class OneForEach(nn.Module):
    """Each kind of image needs its own attack: dark ones are rounded and give no gradient, the
    cross-entropy of bright ones underflows to zero, the others are as in toy.
    """

    def __init__(self, classes):
        super().__init__()
        self.toy, self.classes, self.back = toy(), classes, 0

    def forward(self, x):
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda g: setattr(self, "back", self.back + len(g)))
        level = x.detach().flatten(1).mean(1)[:, None]
        rounded = (x.detach() * 16).round() / 16 + 0 * x
        z = self.toy(torch.where((level < 0.25)[:, :, None, None], rounded, x))
        return (z * torch.where(level > 0.75, 1000, 1))[:, :self.classes]


def test_pgd_takes_twenty_steps_of_a_quarter_of_the_radius_by_default():
    model, x = toy(), pictures()
    y, report = predicted(model, x), {}
    short = attacks.pgd(model, x, y, eps=8 / 255, report=report)
    assert report["gradients"] == 20 * len(x)
    assert torch.equal(short, attacks.pgd(model, x, y, eps=8 / 255, alpha=2 / 255, steps=20,
                                          norm="linf", step="sign", projection="exact"))


def test_a_norm_object_holds_its_step_and_projection():
    model, x = toy(), pictures()
    y, same = predicted(model, x), {"eps": 5.0, "alpha": 1.0, "steps": 4}
    choices = {"step": "dense", "projection": "rescale"}
    norm = attacks.Norm("l1", **choices)
    ours = attacks.pgd(model, x, y, norm=norm, **same)
    assert torch.equal(ours, attacks.pgd(model, x, y, norm="l1", **choices, **same))
    assert not torch.equal(ours, attacks.pgd(model, x, y, norm="l1", **same))
    assert torch.equal(attacks.pgd(model, x, y, norm=norm, step="sparse", **same), attacks.pgd(
        model, x, y, norm="l1", step="sparse", projection="rescale", **same))
    with pytest.raises(TypeError, match=r"pgd\(\) got an unexpected keyword argument 'stepp'"):
        attacks.pgd(model, x, y, norm="l1", stepp="dense", **same)


@pytest.mark.parametrize(("classes", "name", "loss"), [
    (4, "APGD-T (3 targets)", "dlr_targeted"), (3, "APGD-T (2 targets, margin loss)",
                                                "margin_targeted"),
    (2, "APGD-T (1 target, margin loss)", "margin_targeted")])
def test_the_strongest_attack_runs_its_members_in_turn_on_the_surviving_images(classes, name, loss):
    model, x, report, queries = OneForEach(classes), pictures(12), {}, 200
    x[:4], x[4:8] = 0.25 * x[:4], 0.75 + 0.25 * x[4:8]
    y = predicted(model, x)
    members = {"APGD-CE": functools.partial(attacks.apgd, loss="ce"),
               name: functools.partial(attacks.apgd, loss=loss, targets=classes - 1)}
    members["Square 200"] = functools.partial(attacks.square, queries=queries)
    own = chances(12, int(torch.randint(2 ** 63 - 1, (), generator=seeded(3))))
    wanted, left, counted = x.clone(), list(range(12)), []
    for k, attack in enumerate(members.values()):
        one = {}
        z = attack(model, x[left], y[left], eps=0.06, generator=own[left].fold(k), report=one)
        fooled = (predicted(model, z) != y[left]).tolist()
        counted.append((len(left), sum(fooled), one.get("gradients", 0)))
        for i, image, hit in zip(left, z, fooled, strict=True):
            wanted[i] = image if hit else x[i]
        left = [i for i, hit in zip(left, fooled, strict=True) if not hit]
    assert all(fooled for _, fooled, _ in counted) and counted[-1][0] >= 3  # every member is needed
    model.back = 0
    x_adv = attacks.strongest_quick(model, x, y, eps=0.06, queries=queries, generator=seeded(3),
                              report=report)
    assert torch.equal(x_adv, wanted)
    assert attacks.quick_title(classes, queries) == " + ".join(members)
    assert [(one["tried"], one["fooled"], one.get("gradients", 0))
            for one in (report[name] for name in members)] == counted
    assert report["gradients"] == model.back
    assert report["queries"] == report["Square 200"]["queries"] > 0
    assert torch.equal(report["zero_gradient"], torch.arange(12) < 4)  # the dark ones


def test_titles_of_the_strongest_attack_say_how_few_classes_change_it():
    titles = {k: attacks.quick_title(k, 500) for k in (2, 3, 4, 9, 10, 1000)}
    assert titles == {
        2: "APGD-CE + APGD-T (1 target, margin loss) + Square 500",
        3: "APGD-CE + APGD-T (2 targets, margin loss) + Square 500",
        4: "APGD-CE + APGD-T (3 targets) + Square 500",
        9: "APGD-CE + APGD-T (8 targets) + Square 500",
        10: "APGD-CE + APGD-T + Square 500", 1000: "APGD-CE + APGD-T + Square 500"}
    with pytest.raises(UserError, match="two or more classes"):
        attacks.quick_title(1, 500)


# -------------------------------------------------------------------------- square

def test_square_never_gets_worse_with_more_queries_and_counts_them():
    model, x = toy(), pictures(6)
    y, last = predicted(model, x), None
    for queries in (1, 10, 100):
        report = {}
        x_adv = attacks.square(model, x, y, eps=0.01, queries=queries, generator=seeded(3),
                               report=report)
        gap = margins(model, x_adv, y).clamp(max=0)
        assert last is None or (gap >= last - 1e-6).all()
        assert report["queries"] <= 6 * (queries + 1)
        last = gap
    assert (last > margins(model, x, y) + 0.05).any()


@pytest.mark.parametrize("page", ["README.md", "docs/attacks.md"])
def test_the_python_code_in_the_pages_runs_as_it_stands(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x = toy(), pictures(4)
    known = {"torch": torch, "model": model, "x": x, "y": predicted(model, x)}
    for lines in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S):
        for path in re.findall(r'"([\w./]+\.pth)"', lines):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.zeros(3, 8, 8), tmp_path / path)
        exec(lines, known)
    assert not torch.equal(known["x_adv"], x)
    if page == "docs/attacks.md":
        assert known["report"]["apgd"]["tried"] == 4
        assert set(known["report"]) == {"apgd", "square"}


# ------------------------------------------------- bugs found by a review of the attacks

@pytest.mark.parametrize("how", ["exact", "rescale"])
@pytest.mark.parametrize("level", [0.3, 0.6, 0.9])
def test_rounding_errors_of_many_pixels_do_not_push_an_image_out_of_the_l1_ball(how, level):
    """All pixels of the first image are rounded in the same direction; the second is at the box."""
    x = torch.stack([torch.full((3, 64, 64), level), pictures(1, shape=(3, 64, 64))[0]])
    for eps in torch.linspace(0.2, 0.3, 8).tolist():
        moved = balls.nearest(x + eps / x[0].numel() * 1.01, x, eps, "l1", how)
        length = [size(flat(a) - flat(b), "l1") for a, b in zip(moved, x, strict=True)]
        assert max(length) <= eps * (1 + 1e-5) and length[0] > 0.99 * eps
        assert moved.min() >= 0 and moved.max() <= 1


def test_a_custom_loss_is_maximized_or_minimized_as_the_built_in_one_is():
    model, x = toy(), pictures(4)
    y = (predicted(model, x) + 1) % K
    for targeted in (False, True):
        mine, named = (attacks.pgd(model, x, y, eps=0.05, steps=4, targeted=targeted, loss=loss)
                       for loss in (functools.partial(F.cross_entropy, reduction="none"), "ce"))
        assert torch.equal(mine, named)


class Swaying(nn.Module):
    """A large bias towards each class in turn, which cancels in the mean of two draws."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sign = model, 1.0

    def forward(self, x):
        self.sign = -self.sign
        return self.model(x) + self.sign * torch.tensor([3.0, -3.0])


@pytest.mark.parametrize("confidence", [0.0, 0.5])
def test_cw_under_eot_comes_close_to_the_nearest_image_that_fools_the_mean_logits(confidence):
    """Not every draw need be fooled; the judge decides by the same rule."""
    plain, x = linear(0.5 * random_weight(2, D, seed=2)), greys(3, shape=SMALL)
    y, options = predicted(plain, x), {"steps": 60, "confidence": confidence}
    model = attacks.eot(Swaying(plain), 2)
    best = [ways_out(plain, image, label, confidence)[0]
            for image, label in zip(x, y.tolist(), strict=True)]
    for judge in (None, model):
        x_adv, success = attacks.cw_l2(model, x, y, judge=judge, **options)
        assert success.all() and (margins(plain, x_adv, y) >= confidence - 1e-5).all()
        assert all(size(d, "l2") <= 1.1 * shortest
                   for d, shortest in zip(x_adv - x, best, strict=True))


class InPlace(torch.nn.Module):
    """Halves values above 0.5, in its input tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.no_grad():
            x[x > 0.5] *= 0.5
        return self.model(x)


def test_a_model_that_works_in_place_on_its_input_is_refused():
    model = toy()
    x = pictures(4)
    y = predicted(model, x)
    with pytest.raises(UserError, match="in place"):
        attacks.square(InPlace(model), x, y, eps=0.05, queries=5)
    for run in (attacks.fgsm, attacks.apgd):  # torch itself refuses it, with its own message
        with pytest.raises(UserError, match="in place"):
            run(lambda x: model(x.sub_(0.5)), x, y, eps=0.05)
    with pytest.raises(UserError, match="in place"):
        attacks.cw_l2(lambda x: model(x.sub_(0.5)), x, y, steps=2)
    with pytest.raises(RuntimeError, match="mat1"):
        attacks.fgsm(lambda x: model(x) @ torch.ones(2, 3), x, y, eps=0.05)


def test_bpda_gives_the_same_for_a_layer_that_works_in_place():
    x = pictures(4)
    y = predicted(toy(), x)
    twins = [torch.nn.Sequential(attacks.bpda(torch.nn.Hardtanh(0, 0.5, inplace=inplace)), toy())
             for inplace in (False, True)]
    a, b = (attacks.bim(model, x, y, eps=0.05, alpha=0.02, steps=4) for model in twins)
    assert torch.equal(a, b)
    assert not torch.equal(a, x)


class Noisy(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.generator = model, seeded(7)

    def forward(self, x):
        logits = self.model(x)
        return logits + 3 * torch.randn(logits.shape, generator=self.generator).to(logits)


def test_an_image_counts_as_fooled_by_the_mean_over_draws_and_not_by_one_lucky_draw():
    """Logit noise has standard deviation 3, or 0.15 in the mean of 400; margins are above 1."""
    x = pictures(200)
    y = predicted(toy(), x)
    clear = -margins(toy(), x, y) > 1
    x, y = x[clear][:8], y[clear][:8]
    assert len(x) == 8
    report = {}
    attacks.worst_case(attacks.eot(Noisy(toy()), 400), x, y, {
        "still": functools.partial(attacks.pgd, eps=1e-9, alpha=1e-9, steps=1),
        "square": functools.partial(attacks.square, eps=1e-9, queries=2)}, report=report)
    assert [report[name]["tried"] for name in report] == [8, 8]
    assert report["square"]["fooled"] == 0
    assert report["square"]["queries"] == 2 * 8 * 400


def test_worst_case_tells_its_attacks_that_they_are_targeted():
    model, x = toy(), pictures(6)
    target = (predicted(model, x) + 1) % K
    x_adv = attacks.worst_case(model, x, target, {
        "pgd": functools.partial(attacks.pgd, eps=0.3, alpha=0.05, steps=20)}, targeted=True)
    assert (predicted(model, x_adv) == target).sum() >= 5


def test_a_loss_that_averages_over_the_batch_is_refused():
    model, x = toy(), pictures(4)
    with pytest.raises(UserError, match="reduction='none'"):
        attacks.fgsm(model, x, predicted(model, x), eps=0.1, loss=torch.nn.CrossEntropyLoss())


@pytest.mark.parametrize("options", [
    {"generator": 0}, {"generator": 5}, {"generator": [1, 2]}, {"eps": 8},
    {"restarts": 5, "random_start": False}], ids=str)
def test_obviously_wrong_options_are_refused(options):
    x = pictures(2)
    with pytest.raises(UserError):
        attacks.pgd(toy(), x, predicted(toy(), x), **{"eps": 0.1, "alpha": 0.1, "steps": 1,
                                                      **options})
    attacks.pgd(toy(), x, predicted(toy(), x), norm="l2", eps=8, alpha=1, steps=1)


def test_a_list_of_attacks_without_names_is_refused():
    x = pictures(2)
    with pytest.raises(UserError, match="by name"):
        attacks.worst_case(toy(), x, predicted(toy(), x), [attacks.fgsm])


def test_cw_with_many_constants_ends_without_success_if_there_is_none():
    model = linear(torch.zeros(2, D), torch.tensor([1.0, 0.0]))
    x = pictures(3, shape=SMALL)
    x_adv, success = attacks.cw_l2(model, x, torch.zeros(3, dtype=torch.int64), steps=2,
                                   binary_steps=45)
    assert not success.any()
    assert torch.equal(x_adv, x)


def test_stop_early_restarts_only_images_that_are_not_yet_fooled():
    model, x = toy(), pictures(8)
    y = predicted(model, x)
    reports, fooled = [{}, {}], []
    for stop_early, report in zip((False, True), reports, strict=True):
        x_adv = attacks.pgd(model, x, y, eps=0.03, alpha=0.01, steps=5, restarts=4,
                            stop_early=stop_early, generator=seeded(), report=report)
        fooled.append(int((predicted(model, x_adv) != y).sum()))
    assert 0 < fooled[0] <= fooled[1]
    assert reports[0]["gradients"] == 8 * 5 * 4
    assert reports[1]["gradients"] < reports[0]["gradients"]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_exact_projections_at_photograph_size_reach_the_edge_of_the_ball_and_stay_inside(norm):
    """150,528 numbers, too many for naive float32 sums. Two fifths of the pixels are 0 or 1."""
    x = pictures(2, shape=(3, 224, 224))
    delta = torch.randn(x.shape, generator=seeded()) * 0.3
    eps = {"l1": 1600.0, "l2": 8.0}[norm]
    found = balls.project(delta, x, eps, norm).double().flatten(1)
    length = found.abs().sum(1) if norm == "l1" else found.norm(dim=1)
    assert length.tolist() == pytest.approx([eps, eps], rel=2e-6)
