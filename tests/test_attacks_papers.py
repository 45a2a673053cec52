"""Auto-PGD and Square compared with the algorithms of their papers, written here for one image at a
time in float64: point by point, from the same random numbers.

    naive_apgd      arXiv:2003.01690, Alg. 1; in L1 arXiv:2103.01208, Alg. 1
    naive_square    arXiv:1912.00049, Alg. 1 to 3

Needs no other library, no trained network and no photographs.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import attacks
from attack_toys import (
    K,
    chances,
    flat,
    greys,
    margins,
    naive_loss,
    nearest_allowed,
    pictures,
    predicted,
    size,
    toy,
)
from utils.attack import balls

SMALL = (3, 4, 4)
EPS = {"linf": 0.1, "l2": 0.6, "l1": 2.5}


def close(ours, naive):
    np.testing.assert_allclose(np.stack(ours), np.stack(naive), rtol=0, atol=1e-8)


# ------------------------------------------------------------------- Auto-PGD, as written

def marks(steps, norm):
    """Checkpoint -> the previous one; w_j = ceil(p_j N), in L1 every 4 % of the steps."""
    if norm == "l1":
        every = steps // 25
        return {t: t - every for t in range(every, steps, every)}
    found, p, before, last = {}, Fraction(22, 100), Fraction(0), 0
    while p < 1:
        found[math.ceil(p * steps)] = last
        last = math.ceil(p * steps)
        p, before = p + max(p - before - Fraction(3, 100), Fraction(6, 100)), p
    return found


def direction(g, norm, share):
    """The step of length 1 along g; in L1 only along the `share` of largest entries."""
    if norm == "linf":
        return np.sign(g)
    if norm == "l2":
        return g / np.sqrt((g ** 2).sum())
    least = np.sort(abs(g))[min(int((1 - share) * len(g)), len(g) - 1)]
    sign = np.sign(g) * (abs(g) >= least)
    return sign / abs(sign).sum()


def naive_apgd(look, x, start, *, eps, norm, steps=100, seen=None, stages=False):
    """look(t, point) -> loss, gradient, fooled. -> every point, the end, its loss, fooled

    x, start: vectors. seen: collects the pairs (too few rises, stuck) found at the checkpoints.
    stages: whether this is one of several stages; in L1 its first step then moves few entries.
    """
    def into(point):
        return x + nearest_allowed(point - x, x, eps, norm)

    at = before = best = start
    f, g, fooled = look(0, at)
    best_f, best_g, points, rose = f, g, [at], [None]
    size, share, moved = (eps if norm == "l1" else 2 * eps), 0.2, len(x)
    if stages:
        moved = int((start != x).sum())
        share = moved / len(x) / 1.5
    halved, best_then, windows = True, f, marks(steps, norm)  # authors: not at the first check
    for t in range(1, steps + 1):
        if fooled:
            break
        z = into(at + size * direction(g, norm, share))
        a = 1.0 if t == 1 or norm == "l1" else 0.75
        at, before = into(at + a * (z - at) + (1 - a) * (at - before)) if a < 1 else z, at
        points.append(at)
        last_f, (f, g, fooled) = f, look(t, at)
        rose.append(f > last_f)
        if f > best_f:
            best, best_f, best_g = at, f, g
        if t not in windows:
            continue
        if norm == "l1":
            many = int((best != x).sum())
            back, share, moved = many < 0.95 * moved, many / len(x) / 1.5, many
            size = eps if back else max(size / 1.5, eps / 10)
        else:
            few = sum(rose[windows[t] + 1:t + 1]) <= 0.75 * (t - windows[t])  # paper: <; code: <=
            stuck = not halved and best_f == best_then
            back, best_then = few or stuck, best_f
            halved = back
            size = size / 2 if back else size
            if seen is not None:
                seen.add((bool(few), stuck))
        if back:
            at, f, g = best, best_f, best_g
    return points, *((at, f, True) if fooled else (best, best_f, False))


class Scripted(nn.Module):
    """Two classes; the loss and gradient at call t come from a script, whatever the image.

    loss (T, N) below 0, so that nothing is fooled; slope (T, N, D). Calls without a gradient, which
    measure the clean images, do not count.
    """

    def __init__(self, loss, slope):
        super().__init__()
        self.loss, self.slope, self.points = loss, slope, []

    def forward(self, x):
        v, t = x.flatten(1), min(len(self.points), len(self.loss) - 1)
        if x.requires_grad:
            self.points.append(v.detach().clone())
        z = self.loss[t] + (self.slope[t] * (v - v.detach())).sum(1)
        return torch.stack([torch.zeros_like(z), z], 1)


def script(n, size, steps=100):
    """Many kinds of losses, with ties: some rise nearly always, and some of these fall far."""
    g = np.random.default_rng(0)
    rises = g.random((steps + 1, n)) < np.linspace(0.6, 0.97, n)
    falls = np.where(np.arange(n) % 3, 0.02, 0.3)
    walk = np.where(rises, 0.01 * g.integers(0, 3, rises.shape), -falls).cumsum(0).round(2)
    slope = g.standard_normal((steps + 1, n, size))
    return torch.from_numpy(walk - walk.max() - 0.1), torch.from_numpy(slope)


@pytest.mark.parametrize(("norm", "n"), [("linf", 40), ("l2", 4), ("l1", 4)],
                         ids=["linf", "l2", "l1"])
def test_apgd_takes_the_steps_of_its_paper_whatever_the_losses(norm, n):
    """Step size, returns to the best point and its gradient, momentum, result."""
    x = pictures(n, torch.float64, shape=SMALL)
    model, seen = Scripted(*script(n, x[0].numel())), set()
    ours = attacks.apgd(model, x, torch.zeros(n, dtype=torch.int64), eps=EPS[norm], norm=norm,
                        steps=100, generator=chances(n))
    start = balls.nearest(x + balls.random_point(x, EPS[norm], norm, chances(n).fold(0)), x,
                          EPS[norm], norm)
    for i in range(n):
        def look(t, _, i=i):
            return model.loss[t, i].item(), model.slope[t, i].numpy(), False
        points, end, *_ = naive_apgd(look, flat(x[i]), flat(start[i]), eps=EPS[norm], norm=norm,
                                     seen=seen)
        close([point[i].numpy() for point in model.points], points)
        close([flat(ours[i])], [end])
    if norm == "linf":  # both conditions, alone and together
        assert seen == {(few, stuck) for few in (True, False) for stuck in (True, False)}


def test_the_l1_stages_follow_the_paper_each_from_the_best_point_of_the_one_before():
    n, eps = 4, EPS["l1"]
    x = pictures(n, torch.float64, shape=SMALL)
    model = Scripted(*script(n, x[0].numel(), steps=102))
    ours = attacks.apgd(model, x, torch.zeros(n, dtype=torch.int64), eps=eps, norm="l1", steps=100,
                        stages=True, generator=chances(n))
    start = balls.nearest(x + balls.random_point(x, 3 * eps, "l1", chances(n).fold(0)), x, 3 * eps,
                          "l1")
    for i in range(n):
        image, at = flat(x[i]), flat(start[i])
        for times, steps, first in ((3, 30, 0), (2, 30, 31), (1, 40, 62)):
            def look(t, _, i=i, first=first):
                return model.loss[first + t, i].item(), model.slope[first + t, i].numpy(), False
            at = image + nearest_allowed(at - image, image, times * eps, "l1")
            points, at, *_ = naive_apgd(look, image, at, eps=times * eps, norm="l1", steps=steps,
                                        stages=True)
            close([point[i].numpy() for point in model.points[first:first + steps + 1]], points)
        close([flat(ours[i])], [at])


def test_apgd_returns_the_point_that_fools_even_if_another_has_a_higher_loss():
    """Three classes: cross-entropy is log 3 if the label barely wins, log 2 if it loses."""
    x, points = greys(1, torch.float64, shape=SMALL), []

    def model(x):
        v = x.flatten(1)
        if x.requires_grad:
            points.append(x.detach().clone())
        z = torch.tensor([[0.0, 0.1, -9.0]] if len(points) > 1 else [[0.1, 0.0, 0.0]])
        return z + (v - v.detach()).sum(1, keepdim=True) * torch.tensor([0, 1, 0])
    x_adv = attacks.apgd(model, x, torch.tensor([0]), eps=0.1, steps=5)
    assert len(points) == 2 and not torch.equal(*points)
    assert torch.equal(x_adv, points[1])


def dlr_towards(logits, label, target):
    """-(z_y - z_t) / (z_1 - (z_3 + z_4) / 2): Eq. 7; with two or three classes -(z_y - z_t)."""
    if len(logits) < 4:
        return logits[target] - logits[label]
    z = logits.sort(descending=True).values
    return (logits[target] - logits[label]) / (z[0] - (z[2] + z[3]) / 2)


def runs(model, image, label, loss, targets, restarts):
    """The loss of each run: loss(logits) -> scalar."""
    if loss != "dlr_targeted":
        few = loss == "dlr" and model(image[None]).shape[1] < 3
        return restarts * [lambda z: naive_loss(z, label, "margin" if few else loss)]
    ranked = [j for j in model(image[None])[0].argsort(descending=True).tolist() if j != label]
    return restarts * [lambda z, j=j: dlr_towards(z, label, j) for j in ranked[:targets]]


def naive_attack(model, image, label, chance, *, eps, norm, loss, targets=9, restarts=1):
    """Runs of naive_apgd from new random points until one fools. -> image, number of gradients"""
    x, found, reached, spent = flat(image), flat(image), -math.inf, 0
    if predicted(model, image[None]) != label:
        return found, 0
    for k, value in enumerate(runs(model, image, label, loss, targets, restarts)):
        drawn = balls.random_point(image[None], eps, norm, chance.fold(k))

        def look(_, point, value=value):
            with torch.enable_grad():
                pixels = torch.from_numpy(point).view_as(image).requires_grad_(True)
                z = model(pixels[None])[0]
                g, = torch.autograd.grad(value(z), pixels)
            return value(z).item(), flat(g), z.argmax().item() != label
        points, end, f, fooled = naive_apgd(
            look, x, flat(balls.nearest(image[None] + drawn, image[None], eps, norm)), eps=eps,
            norm=norm)
        spent += len(points)
        if fooled:
            return end, spent
        if f > reached:
            found, reached = end, f
    return found, spent


@pytest.mark.parametrize(("norm", "eps", "loss", "more", "seed", "some", "spent"), [
    ("linf", 0.02, "ce", {"restarts": 2}, 3, [1, 6, 0], [2, 104, 202]),
    ("linf", 0.05, "dlr", {}, 1, [0, 1, 2], [3, 101, 101]),
    ("l2", 0.4, "ce", {}, 3, [1, 2, 7], [2, 101, 5]),
    ("linf", 0.05, "dlr_targeted", {"targets": 2}, 1, [1, 2, 3], [202, 202, 4])],
    ids=["linf ce", "linf dlr", "l2 ce", "linf dlr_targeted"])
def test_apgd_on_a_curved_network_follows_its_paper_image_by_image(norm, eps, loss, more, seed,
                                                                   some, spent):
    """One batch; some images are fooled early or after a restart, one is misclassified at first."""
    model, x = toy(torch.float64), pictures(8, torch.float64, seed)[[*some, 4]]
    y, report = predicted(model, x), {}
    y[3] = (y[3] + 1) % K
    same = {"eps": eps, "norm": norm, "loss": loss, **more}
    ours = attacks.apgd(model, x, y, steps=100, generator=chances(4), report=report, **same)
    naive = [naive_attack(model, x[i], y[i].item(), chances(4)[i:i + 1], **same) for i in range(4)]
    close([flat(one) for one in ours], [end for end, _ in naive])
    assert [count for _, count in naive] == [*spent, 0] and report["gradients"] == sum(spent)


@pytest.mark.filterwarnings("ignore:.*(DLR|targets).*:UserWarning")
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize(("loss", "norm", "eps", "targets"), [
    ("ce", "linf", 0.05, 9), ("dlr", "linf", 0.05, 9), ("dlr_targeted", "linf", 0.05, 9),
    ("dlr_targeted", "linf", 0.05, 1), ("dlr_targeted", "l2", 0.4, 9)])
def test_apgd_on_few_classes_runs_once_towards_each_wrong_class(loss, norm, eps, targets, classes):
    """All four images of every case; one is misclassified at first."""
    model, x = toy(torch.float64, 2, classes), pictures(4, torch.float64, 3)
    y, report = predicted(model, x), {}
    y[3] = (y[3] + 1) % classes
    same = {"eps": eps / 4, "norm": norm, "loss": loss, "targets": targets}
    ours = attacks.apgd(model, x, y, steps=100, generator=chances(4), report=report, **same)
    naive = [naive_attack(model, x[i], y[i].item(), chances(4)[i:i + 1], **same) for i in range(4)]
    close([flat(one) for one in ours], [end for end, _ in naive])
    assert report["gradients"] == sum(count for _, count in naive) > 100  # one at least holds out


# ----------------------------------------------------------------------- Square, as written

def naive_share(p, change, queries):
    """p at this change out of `queries`: halved after changes 10, 50, ... of 10,000."""
    at = int(change * 10000 / queries)
    return p / 2 ** len([mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
                         if at > mark])


def hill(rows, cols, power):
    """Eq. 2, eta^(rows, cols): sums of 1 / (n + 1 - k)^2 for k = 0 ... M(r, s); in L1, ^4."""
    n = max(rows, cols) // 2
    return np.array([[sum(1 / (n + 1 - k) ** power for k in range(
        n - max(abs(r - rows // 2), abs(s - cols // 2)) + 1)) for s in range(cols)]
        for r in range(rows)])


@functools.cache
def naive_pair(side, upright, norm="l2"):
    """A hill beside its negative, of norm 1; as in the authors' code, each half is scaled first."""
    power = {"l2": 2, "l1": 4}[norm]
    halves = [(1, hill(side // 2, side, power)), (-1, hill(side - side // 2, side, power))]
    pair = np.vstack([sign * half / size(half, norm) for sign, half in halves])
    pair /= size(pair, norm)
    return pair if upright else pair.T


def first_linf(x, eps, chance):
    """Vertical stripes."""
    c, _, w = x.shape
    return np.clip(x + eps * chance.signs(c, 1, w)[0].double().numpy(), 0, 1)


def first_l1(x, eps, chance):
    """Tiles, each of norm 1, then the projection."""
    return x + nearest_allowed(tiles(x, chance, "l1"), x, eps, "l1")


def first_l2(x, eps, chance):
    delta = tiles(x, chance, "l2")
    return np.clip(x + eps * delta / np.linalg.norm(delta), 0, 1)


def tiles(x, chance, norm):
    """Tiles of a fifth of the side; each is a pair of hills with one sign per channel."""
    c, h, w = x.shape
    side = h // 5
    down, across = h // side, w // side
    sign = chance.fold(0).signs(c, down, across)[0].double().numpy()
    upright = chance.fold(1).signs(down, across)[0].numpy() > 0
    delta, top, left = np.zeros_like(x), (h - down * side) // 2, (w - across * side) // 2
    for i in range(down):
        for j in range(across):
            at = (slice(top + i * side, top + (i + 1) * side),
                  slice(left + j * side, left + (j + 1) * side))
            for k in range(c):
                delta[k][at] = sign[k, i, j] * naive_pair(side, upright[i, j], norm)
    return delta


def corner(u, x, side):
    """A uniformly random square of this side: slices of rows and columns."""
    return tuple(slice(int(a * (n - side + 1)), int(a * (n - side + 1)) + side)
                 for a, n in zip(u, x.shape[1:], strict=True))


def change_linf(best, x, eps, p, u):
    """Alg. 2: +-2 eps per channel of a square, then the projection."""
    side, trial = max(round(math.sqrt(p * x[0].size)), 1), best.copy()
    at = corner(u[:2], x, side)
    for k in range(len(x)):
        trial[k][at] += 2 * eps * (-1 if u[5 + k] < 0.5 else 1)
    return np.clip(np.clip(trial, x - eps, x + eps), 0, 1)


def change_l2(best, x, eps, p, u):
    """Alg. 3. The authors' code makes an even side odd, and scales to the ball before the box."""
    side, nu = max(round(math.sqrt(p * x[0].size)), 3), best - x
    side = min(side + (side % 2 == 0), *x.shape[1:])
    one, two = corner(u[:2], x, side), corner(u[2:4], x, side)
    union = np.zeros(x.shape[1:], bool)
    union[one] = union[two] = True
    unused, old = max(eps ** 2 - (nu ** 2).sum(), 0), nu.copy()
    for k in range(len(x)):
        length = np.linalg.norm(old[k][one])
        new = (-1 if u[5 + k] < 0.5 else 1) * naive_pair(side, u[4] < 0.5) \
            + old[k][one] / max(length, 1e-12)
        room = math.sqrt((old[k][union] ** 2).sum() + unused / len(x))
        nu[k][two] = 0
        nu[k][one] = new / np.linalg.norm(new) * room
    return np.clip(x + nu * eps / np.linalg.norm(nu), 0, 1)


def change_l1(best, x, eps, p, u):
    """As in L2, with L1 norms and each channel's mass times their number; then projected."""
    side, nu = max(round(math.sqrt(p * x[0].size)), 3), best - x
    side = min(side + (side % 2 == 0), *x.shape[1:])
    one, two = corner(u[:2], x, side), corner(u[2:4], x, side)
    union = np.zeros(x.shape[1:], bool)
    union[one] = union[two] = True
    unused, old = max(eps - abs(nu).sum(), 0), nu.copy()
    for k in range(len(x)):
        new = (-1 if u[5 + k] < 0.5 else 1) * naive_pair(side, u[4] < 0.5, "l1") \
            + old[k][one] / max(abs(old[k][one]).sum(), 1e-12)
        room = (abs(old[k][union]).sum() + unused / len(x)) * len(x)
        nu[k][two] = 0
        nu[k][one] = new / abs(new).sum() * room
    return x + nearest_allowed(nu, x, eps, "l1")


def naive_square(look, x, *, eps, norm, queries, chance, p=0.8):
    """Alg. 1; look(point) -> margin, above 0 if it is fooled. -> every point, the best"""
    first, change = {"linf": (first_linf, change_linf), "l2": (first_l2, change_l2),
                     "l1": (first_l1, change_l1)}[norm]
    best = first(x, eps, chance.fold(0))
    drawn = chance.fold(1).uniform(queries, 5 + len(x))[0].double().numpy()
    best_f, points = look(best), [best]
    for i in range(1, queries):
        if best_f > 0:
            break
        trial = change(best, x, eps, naive_share(p, i - 1, queries), drawn[i])
        points.append(trial)
        f = look(trial)
        if f > best_f:
            best, best_f = trial, f
    return points, best


class Steps(nn.Module):
    """Rounded logits: many changes leave the margin unchanged. Records inputs (N, 3, 25, 30)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.Tanh(), nn.Flatten(),
                                     nn.Linear(252, K)).double().requires_grad_(False)
        self.net[0].weight *= 2
        self.points = []

    def forward(self, x):
        self.points.append(x.clone())
        return (32 * self.net(x)).round() / 32 + torch.arange(K) / 256  # no tie of two classes


@pytest.mark.parametrize(("norm", "eps", "spent"), [
    ("linf", 0.16, [16, 5, 100]), ("l2", 4.0, [25, 2, 100]), ("l1", 40.0, [25, 2, 100])],
    ids=["linf", "l2", "l1"])
def test_square_follows_its_paper_query_by_query(norm, eps, spent):
    """Every point it visits, alone and in a batch that fooled images leave."""
    model, x = Steps(), pictures(3, torch.float64, shape=(3, 25, 30))
    y, report, same = predicted(model, x), {}, {"eps": eps, "norm": norm, "queries": 100}
    whole = attacks.square(model, x, y, generator=chances(3), report=report, **same)
    for i in range(3):
        def look(point, i=i):
            return margins(model, torch.from_numpy(point)[None], y[i:i + 1]).item()
        own = chances(3)[i:i + 1]
        points, end = naive_square(look, x[i].numpy(), chance=own.fold(0), **same)
        model.points.clear()
        alone = attacks.square(model, x[i:i + 1], y[i:i + 1], generator=own, **same)
        close([one[0].numpy() for one in model.points[1:]], points)  # the first is the clean image
        close([alone[0].numpy(), whole[i].numpy()], [end, end])
        assert len(points) == spent[i]
    assert report["queries"] == sum(spent)
