"""FAB: the nearest adversarial image, along the decision boundary (Croce and Hein, ICML 2020).

    paper                                      here
    arXiv:1907.02044, Eq. 5, proj_p            to_plane
    Alg. 1, lines 8-16, one iteration          _step, _note
    Eq. 9, the weight of the clean image       _step, `a`
    Sec. 3.4, final search                     _search
    2003.01690, Sec. 5, targeted FAB           fab, `targets`
"""

import math
from dataclasses import dataclass

import torch

from utils.attack.balls import (
    FIXED,
    NORMS,
    ROUNDS,
    TINY,
    column,
    free_of,
    norm_of,
    random_point,
    room_of,
    unit,
)
from utils.attack.chance import chance_of
from utils.attack.core import (
    Rows,
    Tally,
    ascend,
    attack,
    forward,
    gradient,
    is_fooled,
    likeliest_wrong,
    margin_towards,
    measure,
    one_of,
)
from utils.attack.waits import due, free_to_ask

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9  # as published
SEARCHES = 3                           # steps of the final search
SHORT = 0.999  # unlike the paper: steps end just beyond the boundary, on which rounding decides


@attack
def fab(model, x, y, *, norm="linf", eps=math.inf, steps=100, restarts=1, targets=9,
        targeted=False, generator=None, report=None):
    """Fast adaptive boundary attack: adversarial images as near to x as it can find, in `norm`.

    Runs start at x; restarts, at a random point at half of the smallest norm so far (of eps, if
    smaller). They go towards each of the `targets` most likely wrong classes (with K classes, at
    most K - 1). With eps, only images within it count, and they leave the batch once found
    (utils/attack/waits.py); without, all runs look for smaller norms.
    -> (x_adv, success (N,)); x itself where the attack failed, or where x is fooled already.
    """
    one_of("norm", norm, NORMS)
    tally, own = Tally(x), chance_of(generator, x)
    found, size = x.clone(), torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    climbed, goals = ascend("margin", targeted), []
    if len(x):
        goals = _goals(model, x, y, targets, targeted)
        size[measure(model, x, y, climbed, targeted)[1]] = 0.0
    for k, goal in enumerate(goals * restarts):
        who = (size > (eps if eps < math.inf else 0)).nonzero()[:, 0]
        if not len(who):
            break
        start = _start(x[who], size[who], eps, norm, own[who].fold(k)) if k >= len(goals) \
            else x[who]
        found[who], size[who] = _run(
            model, x[who], y[who], goal[who], start, found[who], size[who], norm=norm, eps=eps,
            steps=steps, targeted=targeted, tally=tally, who=who)
    who = ((size > (eps if eps < math.inf else 0)) & size.isfinite()).nonzero()[:, 0]
    if len(who):
        found[who], size[who] = _search(model, x[who], y[who], found[who], size[who], climbed,
                                        targeted, norm, tally, who)
    tally.fill(report)
    success = size <= eps if eps < math.inf else size.isfinite()
    return torch.where(column(success, x), found, x), success


def _goals(model, x, y, targets, targeted):
    """[goal (N,)], one for each run; if targeted, y itself."""
    with torch.no_grad():
        logits = forward(model, x, y)
    return [y] if targeted else likeliest_wrong(logits, y, targets)


def _start(x, size, eps, norm, own):
    """A random point at half of the smallest norm so far, of eps or of the box: the least."""
    room = norm_of(torch.maximum(x, 1 - x), norm)
    radius = torch.minimum(size, room).clamp_max(eps) / 2
    return (x + column(radius, x) * unit(random_point(x, 1.0, norm, own), norm)).clamp_(0, 1)


# ------------------------------------------------------------------------ one run

@dataclass
class _State(Rows):
    """The state of a run, with a row for each image in the batch."""
    row: torch.Tensor    # which image of the run, int64
    x: torch.Tensor      # (n, ...) the clean image
    y: torch.Tensor
    goal: torch.Tensor   # class to run towards
    at: torch.Tensor     # (n, ...) the current point
    found: torch.Tensor  # (n, ...) the nearest adversarial image of all runs
    size: torch.Tensor   # its norm
    done: torch.Tensor   # whether it is within eps; such images only wait to leave the batch


def _run(model, x, y, goal, start, found, size, *, norm, eps, steps, targeted, tally, who):
    """One run towards one class -> the nearest adversarial images (n, ...), their norms (n,)."""
    s = _State(torch.arange(len(x), device=x.device), x, y, goal, start, found, size,
               torch.zeros(len(x), dtype=torch.bool, device=x.device))
    found, size = found.clone(), size.clone()
    climbed = ascend("margin", targeted)
    for t in range(steps):
        if due(t, x):
            left = (~s.done).nonzero()[:, 0]
            if len(left) < len(s.row):
                found[s.row], size[s.row] = s.found, s.size
                s = s.select(left)
                if not len(left):
                    break

        def gain(logits, y, goal=s.goal):  # 0 on the boundary between the two classes
            return climbed(logits, y) if targeted else margin_towards(goal)(logits, y)
        logits, f, g = gradient(model, s.at, s.y, gain, tally, who[s.row], s.done)
        _note(s, is_fooled(logits, s.y, targeted), norm, eps)  # unlike the paper: it costs nothing
        s.at = _step(s, f, g, norm)
        fooled = measure(model, s.at, s.y, climbed, targeted, tally, who[s.row])[1]
        _note(s, fooled, norm, eps)
        s.at = torch.where(column(fooled, x), s.x + BETA * (s.at - s.x), s.at)
    found[s.row], size[s.row] = s.found, s.size
    return found, size


def _note(s, fooled, norm, eps):
    """Keep the current point where it is adversarial and the nearest so far."""
    here = norm_of(s.at - s.x, norm)
    nearer = fooled & (here < s.size) & ~s.done
    s.found = torch.where(column(nearer, s.x), s.at, s.found)
    s.size = torch.where(nearer, here, s.size)
    if eps < math.inf:
        s.done = s.size <= eps


def _step(s, f, g, norm):
    """The next point: just beyond the plane f + <g, z - at> = 0, biased towards the clean image.

    f (n,), g (n, ...): value and gradient at s.at. Both projections run as one batch of 2n.
    """
    both, n = torch.cat([s.at, s.x]), len(f)
    f_x = f + (g * (s.x - s.at)).flatten(1).sum(1)
    delta = to_plane(both, torch.cat([g, g]), -torch.cat([f, f_x]), norm)
    size = norm_of(delta, norm)
    a = (size[:n] / (size[:n] + size[n:]).clamp_min(TINY)).clamp_max(ALPHA_MAX)
    beyond = both + ETA * delta
    return (beyond[:n] + column(a, g) * (beyond[n:] - beyond[:n])).clamp_(0, 1)


def _search(model, x, y, found, size, climbed, targeted, norm, tally, who):
    """Three false-position steps on the margin, between x and the image found."""
    near, far = x, found  # not fooled; fooled
    below, above = (measure(model, z, y, climbed, targeted, tally, who)[0] for z in (near, far))
    for _ in range(SEARCHES):
        t = (above / (above - below).clamp_min(TINY)).clamp(0, 1)
        z = far + SHORT * column(t, x) * (near - far)
        f, hit = measure(model, z, y, climbed, targeted, tally, who)
        here = norm_of(z - x, norm)
        good = hit & (here < size)
        found = torch.where(column(good, x), z, found)
        size = torch.where(good, here, size)
        near, far = (torch.where(column(hit == side, x), z, old)
                     for side, old in ((False, near), (True, far)))
        below, above = torch.where(hit, below, f), torch.where(hit, f, above)
    return found, size


# ------------------------------------------------------------------------ projection on a plane

def to_plane(z, g, need, norm):
    """The smallest delta (n, ...) in `norm` with <g, delta> = need (n,) and z + delta in [0, 1].

    Where the box does not reach that far: its corner that comes nearest. z, g (n, ...).
    """
    side = column(need.sign(), g) * g.sign()
    scale = norm_of(g, "linf").clamp_min(TINY)
    slope, need = g.abs() / column(scale, g), need.abs() / scale
    room = room_of(z, side) * side.abs()
    fill = _fill_l1 if norm == "l1" else _fill
    return side * fill(slope, room, need, norm)


def _fill(slope, room, need, norm):
    """min(t * speed, room) with sum(slope * that) = need: one t for all coordinates, up to the box.

    The speed is 1 in Linf and the slope in L2. The sum is concave in t, so Newton steps from 0
    never pass the solution; they end once no further coordinate meets the box.
    """
    dims, asks = tuple(range(1, slope.dim())), free_to_ask(slope)
    gain = slope * slope if norm == "l2" else slope
    t, moved = torch.zeros_like(need), torch.zeros_like(slope)
    for _ in range(ROUNDS if asks else FIXED):
        short = need - (slope * moved).sum(dims)
        rate = (gain * free_of(moved, room)).sum(dims)
        reached = (short <= 4 * torch.finfo(need.dtype).eps * need) | (rate <= TINY)
        if asks and bool(reached.all()):
            break
        t = torch.where(reached, t, t + short / rate.clamp_min(TINY))
        far = column(t, slope)
        moved = torch.minimum(far * slope if norm == "l2" else far, room)
    return moved


def _fill_l1(slope, room, need, norm):
    """Coordinates move to the box in order of decreasing slope, the last one in part."""
    flat, order = slope.flatten(1).sort(1, descending=True)
    width = room.flatten(1).gather(1, order)
    before = (flat * width).cumsum(1) - flat * width  # gained by the coordinates before
    moved = ((need[:, None] - before) / flat.clamp_min(TINY)).clamp_min(0).minimum(width)
    return torch.zeros_like(moved).scatter_(1, order, moved).view_as(slope)
