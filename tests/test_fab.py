"""FAB: the exact nearest image of linear networks, the paper's algorithm image by image, another
library's norms.
"""

import numpy as np
import pytest
import torch
from test_attacks_oracles import digits, library

import attacks
from attack_toys import (
    K,
    Watched,
    chances,
    flat,
    greys,
    linear,
    nearest_linear,
    pictures,
    predicted,
    random_weight,
    size,
    toy,
)
from utils.attack import balls
from utils.attack.fab import to_plane

NORMS = ("linf", "l2", "l1")


# ------------------------------------------------------------------------ onto a plane

def plane_by_bisection(z, w, need, norm):
    """The smallest d with w.d = need and 0 <= z + d <= 1, or the corner that comes nearest."""
    w, need = w * np.sign(need), abs(need)
    corner = np.where(w > 0, 1 - z, np.where(w < 0, -z, 0))
    if w @ corner <= need:
        return corner
    if norm == "l2":
        return nearest_linear(w, z, need)
    if norm == "l1":  # largest weight first, as far as the box allows
        d = np.zeros_like(z)
        for i in np.argsort(-np.abs(w))[:np.count_nonzero(w)]:
            d[i] = np.sign(w[i]) * min(abs(corner[i]), (need - w @ d) / abs(w[i]))
        return d
    low, high = 0.0, 1.0
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if w @ np.clip(corner, -t, t) < need else (low, t)
    return np.clip(corner, -high, high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_onto_a_plane_equals_that_of_a_bisection(norm, dtype):
    """Pixels at 0 and 1, gradients that are partly zero, planes on both sides, near and too far."""
    z, g = pictures(24, dtype=dtype), random_weight(24, 192, dtype=dtype).view(24, 3, 8, 8)
    g[:, 0, 0] = 0
    need = torch.logspace(-3, 2.5, 24, dtype=dtype) * torch.tensor([1, -1]).repeat(12)
    found = to_plane(z, g, need, norm)
    reached = (g * found).flatten(1).sum(1)
    assert 0 < (abs(reached - need) > 0.01 * abs(need)).sum() < 12  # some planes are too far
    for d, image, w, wanted in zip(found, z, g, need.tolist(), strict=True):
        best = plane_by_bisection(flat(image), flat(w), wanted, norm)
        assert flat(d) == pytest.approx(best, abs=1e-4 if dtype == torch.float32 else 1e-9)


# ------------------------------------------------------------------------ closed forms

def nearest_of(weight, x, y, norm):
    """The norm of the smallest perturbation that changes the class of a linear network."""
    found = []
    for image, label in zip(x, y.tolist(), strict=True):
        z, w = flat(image), weight.double().numpy()
        found.append(min(size(plane_by_bisection(z, w[k] - w[label], (w[label] - w[k]) @ z, norm),
                              norm) for k in range(len(w)) if k != label))
    return torch.tensor(found)


@pytest.mark.parametrize("classes", [2, K])
@pytest.mark.parametrize("images", [greys, pictures])
@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_nearest_image_of_a_linear_network(norm, images, classes):
    """Within half a percent, and none nearer than possible."""
    weight = random_weight(classes, 192)
    model, x = linear(weight), images(10)
    y = predicted(model, x)
    x_adv, success = attacks.fab(model, x, y, norm=norm, steps=20, targets=classes - 1)
    best, found = nearest_of(weight, x, y, norm), balls.norm_of(x_adv - x, norm).double()
    assert success.all() and (predicted(model, x_adv) != y).all()
    assert (found >= best * (1 - 1e-5)).all()
    assert (found <= best * 1.005).all()


def test_fab_with_a_radius_succeeds_where_the_nearest_image_is_inside():
    weight = random_weight(K, 192)
    model, x = linear(weight), pictures(20)
    y = predicted(model, x)
    best = nearest_of(weight, x, y, "l2")
    eps = best.median().item() * 1.02
    x_adv, success = attacks.fab(model, x, y, norm="l2", eps=eps, steps=20, targets=K - 1)
    assert torch.equal(success, best <= eps) and 5 < success.sum() < 15
    assert torch.equal(x_adv[~success], x[~success])
    assert (balls.norm_of(x_adv - x, "l2") <= eps).all()


def test_images_within_the_radius_leave_the_batch():
    """All of these are, after a step or two."""
    model, x, report = Watched(toy()), pictures(6), {}
    y = predicted(model, x)
    assert attacks.fab(model, x, y, eps=0.3, steps=30, targets=1, report=report)[1].all()
    assert len(model.points) <= 3 and report["gradients"] == sum(map(len, model.points))


def test_targeted_fab_finds_the_nearest_image_of_the_target_class():
    """With two classes: with more, other boundaries may lie in between."""
    weight = random_weight(2, 192)
    model, x = linear(weight), pictures(8)
    y = predicted(model, x)
    x_adv, success = attacks.fab(model, x, 1 - y, norm="l2", steps=20, targeted=True)
    found = balls.norm_of(x_adv - x, "l2").double()
    assert success.all() and (predicted(model, x_adv) == 1 - y).all()
    assert (found <= nearest_of(weight, x, y, "l2") * 1.005).all()
    model, goal = toy(), (predicted(toy(), x) + 1) % K
    x_adv, success = attacks.fab(model, x, goal, norm="l2", steps=20, targeted=True)
    assert success.all() and (predicted(model, x_adv) == goal).all()


def test_images_that_are_already_fooled_are_not_changed():
    model, x = toy(), pictures(4)
    y = predicted(model, x)
    y[1] = (y[1] + 1) % K
    x_adv, success = attacks.fab(model, x, y, steps=3, targets=2)
    assert torch.equal(x_adv[1], x[1]) and success[1]


# ------------------------------------------------------------------------ image by image

def naive_fab(model, x, y, norm, steps, targets):
    """Alg. 1 towards each class in turn, and every point that it visits; float64."""
    points, found = [], []
    for image, label in zip(x, y.tolist(), strict=True):
        best = (np.inf, image)
        others = [k for k in model(image[None])[0].argsort(descending=True).tolist() if k != label]
        for goal in others[:targets]:
            at = image.clone()
            for _ in range(steps):
                with torch.enable_grad():
                    pixels = at.clone().requires_grad_()
                    z = model(pixels[None])[0]
                    g, = torch.autograd.grad(z[goal] - z[label], pixels)
                points.append(at)
                if z.argmax() != label and size(at - image, norm) < best[0]:
                    best = size(at - image, norm), at
                f, w = (z[goal] - z[label]).item(), flat(g)
                d = plane_by_bisection(flat(at), w, -f, norm)
                d0 = plane_by_bisection(flat(image), w, -f - w @ flat(image - at), norm)
                a = min(size(d, norm) / (size(d, norm) + size(d0, norm)), 0.1)
                z = (1 - a) * (flat(at) + 1.05 * d) + a * (flat(image) + 1.05 * d0)
                at = torch.from_numpy(z.clip(0, 1)).view_as(image)
                if predicted(model, at[None]).item() != label:
                    if size(at - image, norm) < best[0]:
                        best = size(at - image, norm), at
                    at = 0.1 * image + 0.9 * at
        found.append(best)
    return points, found


@pytest.mark.parametrize("norm", NORMS)
def test_fab_follows_its_paper_image_by_image(norm, monkeypatch):
    monkeypatch.setattr("utils.attack.fab.SEARCHES", 0)
    model, x = Watched(toy(torch.float64)), pictures(3, torch.float64)
    y = predicted(model, x)
    wanted, best = naive_fab(model.model, x, y, norm, 6, 3)
    x_adv, success = attacks.fab(model, x, y, norm=norm, steps=6, targets=3)
    points = torch.stack(model.points).transpose(0, 1).flatten(0, 1)
    assert success.all()
    assert (points - torch.stack(wanted)).abs().max() < 1e-7
    assert (x_adv - torch.stack([image for _, image in best])).abs().max() < 1e-7


def test_the_final_search_comes_nearer_by_false_position(monkeypatch):
    model, x = toy(torch.float64), pictures(6, torch.float64)
    y, found = predicted(toy(torch.float64), x), []
    for searches in (0, 3):
        monkeypatch.setattr("utils.attack.fab.SEARCHES", searches)
        x_adv, _ = attacks.fab(model, x, y, norm="l2", steps=3, targets=1)
        assert (predicted(model, x_adv) != y).all()
        found.append(balls.norm_of(x_adv - x, "l2"))
    assert (found[1] <= found[0]).all() and (found[1] < 0.999 * found[0]).any()


@pytest.mark.parametrize("eps", [None, 0.01])
def test_restarts_begin_at_half_of_the_smallest_norm_or_radius(eps):
    """No image is adversarial within 0.01."""
    model, x = Watched(toy()), pictures(3)
    y, given = predicted(model, x), {} if eps is None else {"eps": eps}
    x_adv, _ = attacks.fab(model, x, y, norm="l2", steps=4, targets=2)
    model.points.clear()
    again, _ = attacks.fab(model, x, y, norm="l2", steps=4, targets=2, restarts=2,
                           generator=chances(3), **given)
    assert len(model.points) == 16
    start = balls.norm_of(model.points[8] - x, "l2")
    if eps is None:  # the box cuts off a part of it; the final search comes after all runs
        most = balls.norm_of(x_adv - x, "l2") / 2
        assert (start > 0.5 * most).all() and (start < 1.2 * most).all()
        assert (balls.norm_of(again - x, "l2") <= balls.norm_of(x_adv - x, "l2") * 1.001).all()
    else:
        assert (start <= eps / 2 + 1e-6).all() and (start > eps / 4).all()


# ------------------------------------------------------------------------ another library

def their_norms(model, x, y, norm, steps, targets):
    """Norms of pyautoattack's FAB, without the radius at which it would stop."""
    attack = library("pyautoattack.fab_pt").FABAttack_PT(
        model, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], n_iter=steps, eps=1.0,
        targeted=True)
    best = torch.full((len(x),), torch.inf)
    for k in range(2, targets + 2):
        attack.target_class = k
        with torch.random.fork_rng():
            x_adv = attack.attack_single_run(x, y, use_rand_start=False, is_targeted=True)
        here = balls.norm_of(x_adv - x, norm)
        best = torch.where(predicted(model, x_adv) != y, torch.minimum(best, here), best)
    return best


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_median_norm_is_no_larger_than_that_of_pyautoattack(norm):
    """With the same steps and classes; 3 % are allowed."""
    model, x, y = digits(24)
    theirs = their_norms(model, x, y, norm, 20, 3)
    x_adv, success = attacks.fab(model, x, y, norm=norm, steps=20, targets=3)
    assert success.all() and theirs.isfinite().all()
    ours = balls.norm_of(x_adv - x, norm)
    assert ours.median() <= 1.03 * theirs.median()
    assert ours.median() >= 0.9 * theirs.median()
