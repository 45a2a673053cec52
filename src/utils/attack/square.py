"""Square attack: random squares, no gradient (Andriushchenko et al., ECCV 2020, arXiv:1912.00049).

    paper                              here
    Alg. 1, random search              _run
    Alg. 2, Linf sampling              _stripes, _flip
    Alg. 3, L2 sampling                _tiles, _move
    Eq. 2, eta                         _bump, _pair
    L1: 2103.01208, Sec. 4             HILLS, _move
"""

import math
from functools import lru_cache, partial

import torch

from utils.attack.adaptive import draws_of
from utils.attack.balls import NORMS, TINY, column, nearest, unit
from utils.attack.chance import chance_of
from utils.attack.core import Tally, ascend, attack, measure, one_of
from utils.attack.waits import due, free_to_ask
from utils.errors import UserError

PUBLISHED = 10000            # queries of the published schedule
HILLS = {"l2": 2, "l1": 4}   # a hill is a sum of 1 / k to this power


@attack
@torch.no_grad()
def square(model, x, y, *, eps, norm="linf", queries=5000, p=0.8, restarts=1, rescale=True,
           targeted=False, generator=None, report=None):
    """Square attack: change a random square of the image; keep the change if the margin grows.

    x (N, C, H, W); p: share of the image that the first squares cover, which shrinks as published
    (Sec. 3, for 10,000 queries; rescale: scaled to `queries`). Fooled images leave the batch, on a
    CPU at once, else a little later (utils/attack/waits.py). Queries on clean images and those
    after the one that fools are not counted. Unlike the authors' code, which climbs cross-entropy
    if targeted, it always climbs the margin.
    """
    one_of("norm", norm, NORMS)
    images_only(x)
    tally, own = Tally(x), chance_of(generator, x)
    climbed, result, alive = ascend("margin", targeted), x.clone(), torch.zeros(0)
    planned = queries if rescale else PUBLISHED
    if len(x):
        best_f, fooled = measure(model, x, y, climbed, targeted)
        alive = ~fooled
    for k in range(restarts):
        who = alive.nonzero()[:, 0]
        if not len(who):
            break
        end, f, fooled = _run(model, x[who], y[who], own[who].fold(k), eps, norm, queries, p,
                              planned, climbed, targeted, tally, who)
        better = fooled | (f > best_f[who])
        result[who[better]], best_f[who[better]] = end[better], f[better]
        alive[who[fooled]] = False
    tally.fill(report)
    return result


def images_only(x):
    """UserError unless x is (N, C, H, W)."""
    if x.dim() != 4:
        raise UserError(f"square works on images (N, C, H, W); given {tuple(x.shape)}")


def _run(model, x, y, own, eps, norm, queries, p, planned, climbed, targeted, tally, who):
    """One run -> images (n, C, H, W), margins (n,), which of them are fooled (n,)."""
    first, change = (_stripes, _flip) if norm == "linf" else (
        partial(_tiles, norm=norm), partial(_move, norm=norm))
    best = first(x, eps, own.fold(0))
    drawn = own.fold(1).uniform(queries, 5 + x.shape[1]).to(x)
    best_f, fooled = measure(model, best, y, climbed, targeted, tally, who)
    draws = draws_of(model)
    tally.queries += draws * len(x)
    end, value, hit = best.clone(), best_f.clone(), fooled.clone()
    row = torch.arange(len(x), device=x.device)
    for t in range(1, queries):
        if due(t, x) and bool(fooled.any()):
            left = (~fooled).nonzero()[:, 0]
            end[row], value[row], hit[row] = best, best_f, fooled
            x, y, best, best_f, drawn, row, fooled = (
                part[left] for part in (x, y, best, best_f, drawn, row, fooled))
            if not len(row):
                break
        trial = change(best, x, eps, _share(p, t - 1, planned), drawn[:, t])
        f, fools = measure(model, trial, y, climbed, targeted, tally, who[row])
        tally.queries += draws * (len(row) if free_to_ask(x) else (~fooled).sum())
        better = (fools | (f > best_f)) & ~fooled
        best, best_f = torch.where(column(better, x), trial, best), torch.where(better, f, best_f)
        fooled = fooled | fools
    end[row], value[row], hit[row] = best, best_f, fooled
    return end, value, hit


def _share(p, t, planned):
    """p after t of `planned` changes: halved at 10, 50, 200, 500, 1000, 2000, ... of 10,000."""
    at = t * PUBLISHED // planned
    return p / 2 ** sum(at > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def _stripes(x, eps, own):
    """Linf start: vertical stripes of +-eps."""
    sign = own.signs(x.shape[1], 1, x.shape[3]).to(x)
    return nearest(x + eps * sign, x, eps, "linf")


def _side(x, p, least):
    """Side of a square that covers the share p of the image."""
    h, w = x.shape[2:]
    return min(max(round(math.sqrt(p * h * w)), least), h, w)


def _window(u, x, s):
    """Rows (n, s) and columns (n, s) of one window of side s per image; u (n, 2) in [0, 1)."""
    side = torch.arange(s, device=x.device)
    return tuple((u[:, i] * room).long().clamp_max(room - 1)[:, None] + side
                 for i, room in enumerate((x.shape[2] - s + 1, x.shape[3] - s + 1)))


def _flip(best, x, eps, p, u):
    """Linf: +eps or -eps for each channel of one square."""
    rows, cols = _window(u[:, :2], x, _side(x, p, 1))
    sign = torch.where(u[:, 5:] < 0.5, -1.0, 1.0).to(x)  # (n, C)
    n = torch.arange(len(x), device=x.device)[:, None, None]
    trial = best.clone()
    at = (n, slice(None), rows[:, :, None], cols[:, None, :])
    clean = x[at]  # (n, s, s, C)
    trial[at] = (clean + eps * sign[:, None, None, :]).clamp_(0, 1)
    return trial


def _bump(h, w, x, norm):
    """Eq. 2: a pyramid of sums of 1 / k^2 (L1: 1 / k^4), peak in the middle, norm 1."""
    r = (torch.arange(h, device=x.device) - h // 2).abs()[:, None]
    c = (torch.arange(w, device=x.device) - w // 2).abs()[None]
    k = torch.arange(1, max(h // 2, w // 2) + 2, device=x.device, dtype=x.dtype)
    falling = (1 / k ** HILLS[norm]).flip(0).cumsum(0).flip(0)
    bump = falling[torch.maximum(r, c)]
    return bump / _length(bump, norm).clamp_min(TINY)


@lru_cache(maxsize=8)
def _pair(s, norm, dtype, device):
    """A bump above its negative: (s, s) of norm 1."""
    like = torch.empty(0, dtype=dtype, device=device)
    pair = torch.cat([_bump(s // 2, s, like, norm), -_bump(s - s // 2, s, like, norm)])
    return pair / _length(pair, norm).clamp_min(TINY)


def _length(t, norm, dims=(0, 1)):
    """Norm of t over these dimensions."""
    return t.norm(dim=dims) if norm == "l2" else t.abs().sum(dims)


def _tiles(x, eps, own, norm):
    """L2 start: a grid of pairs with random signs and orientations, scaled to the ball.
    L1 start: such a grid of pairs of norm 1, projected onto the ball.
    """
    s = max(min(x.shape[2:]) // 5, min(3, *x.shape[2:]))
    down, across = x.shape[2] // s, x.shape[3] // s
    top, left = (x.shape[2] - down * s) // 2, (x.shape[3] - across * s) // 2
    pair, delta = _pair(s, norm, x.dtype, x.device), torch.zeros_like(x)
    sign = own.fold(0).signs(x.shape[1], down, across).to(x)[:, :, :, None, :, None]
    flat = (own.fold(1).signs(1, down, across) > 0)[:, :, :, None, :, None]
    tile = torch.where(flat, pair[:, None, :], pair.T[:, None, :])  # (n, 1, down, s, across, s)
    delta[:, :, top:top + down * s, left:left + across * s] = (tile * sign).reshape(
        *x.shape[:2], down * s, across * s)
    return _into_ball(delta, x, eps, norm)


def _into_ball(delta, x, eps, norm):
    """The image with this perturbation, scaled to eps in L2, projected in L1."""
    if norm == "l1":
        return nearest(x + delta, x, eps, norm)
    return (x + eps * unit(delta, norm)).clamp_(0, 1)


def _move(best, x, eps, p, u, norm):
    """Alg. 3: a pair is added in one window, with the mass of that window and of a second one.

    The mass is the sum of squares in L2 and of absolute values in L1. In L1 only, each channel's
    mass is multiplied by the number of channels; the projection removes the excess.
    """
    s = _side(x, p, 3)
    if s % 2 == 0:
        s += 1 if s < min(x.shape[2:]) else -1
    rows, cols = _window(u[:, :2], x, s)
    rows2, cols2 = _window(u[:, 2:4], x, s)
    n = torch.arange(len(x), device=x.device)[:, None, None]
    first = (n, slice(None), rows[:, :, None], cols[:, None, :])
    second = (n, slice(None), rows2[:, :, None], cols2[:, None, :])
    power = 2 if norm == "l2" else 1
    delta = best - x
    old = delta[first]  # (n, s, s, C)
    mass = delta.abs().pow(power).sum((2, 3))  # (n, C)
    unused = (eps ** power - mass.sum(1, keepdim=True)).clamp_min(0) / x.shape[1]
    delta[first] = delta[second] = torch.zeros_like(old)
    budget = (unused + mass - delta.abs().pow(power).sum((2, 3))).clamp_min(0)
    budget = budget.sqrt() if norm == "l2" else budget * x.shape[1]
    pair = _pair(s, norm, x.dtype, x.device)
    pair = torch.where(column(u[:, 4] < 0.5, u[:, :, None]), pair, pair.T)  # (n, s, s)
    sign = torch.where(u[:, 5:] < 0.5, -1.0, 1.0).to(x)
    new = pair[..., None] * sign[:, None, None, :] \
        + old / _length(old, norm, (1, 2))[:, None, None, :].clamp_min(1e-12)
    new = new / _length(new, norm, (1, 2))[:, None, None, :].clamp_min(1e-12)
    delta[first] = new * budget[:, None, None, :]
    return _into_ball(delta, x, eps, norm)
