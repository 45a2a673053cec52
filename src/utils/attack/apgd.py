"""Auto-PGD: projected gradient ascent without a step size to choose (Croce and Hein).

    paper                                      here
    2003.01690, Alg. 1, lines 7-8              _step
    conditions 1 and 2: halve the step         _adapt
    2103.01208: sparsity and step in L1        _adapt_l1
"""

import math
from dataclasses import dataclass

import torch

from utils.attack.balls import NORMS, column, nearest, random_point, sparse_sign, unit
from utils.attack.chance import chance_of
from utils.attack.core import (
    Rows,
    Tally,
    ascend,
    attack,
    dlr_towards,
    forward,
    gradient,
    is_fooled,
    likeliest_wrong,
    margin,
    margin_towards,
    measure,
    one_of,
)
from utils.attack.waits import due

TOWARDS = {"dlr_targeted": dlr_towards, "margin_targeted": margin_towards}


@attack
def apgd(model, x, y, *, eps, norm="linf", steps=100, loss="ce", restarts=1, targets=9, rho=0.75,
         stages=False, targeted=False, generator=None, report=None):
    """Auto-PGD: where progress stalls, halve the step and continue from the best point so far.

    loss: 'ce', 'margin', 'dlr', or 'dlr_targeted' and 'margin_targeted', which run once towards
    each of the `targets` most likely wrong classes (with K classes, at most K - 1).
    norm: 'linf', 'l2', or 'l1' with the adaptive sparsity of arXiv:2103.01208.
    stages: as AutoAttack does in L1, take 30 % of the steps with radius 3 eps, 30 % with 2 eps and
    the rest with eps, each stage from the projection of the previous stage's best point; below 4
    steps, all with eps. Fooled images leave the batch (utils/attack/waits.py); images misclassified
    from the start are not changed. For 'ce', 'margin' and 'dlr' the report has `flat` (N,): True
    where the attack failed and its loss never rose above that of the clean image.
    """
    one_of("norm", norm, NORMS)
    one_of("loss", loss, ("ce", "margin", "dlr", *TOWARDS))
    tally, own = Tally(x), chance_of(generator, x)
    result, alive = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
    value = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    if len(x):
        climbed, goals = _loss(model, x, y, loss, targets, targeted)
        clean = margin if loss in TOWARDS else ascend(loss, targeted)
        clean_f, fooled = measure(model, x, y, clean, targeted)
        alive = ~fooled
    for k, goal in enumerate(goals * restarts if len(x) else []):
        who = alive.nonzero()[:, 0]
        if not len(who):
            break
        end, reached, fooled = _run(
            model, x[who], y[who], goal[who], own[who].fold(k), eps=eps, norm=norm, steps=steps,
            loss=climbed, rho=rho, stages=stages, targeted=targeted, tally=tally, who=who)
        better = fooled | (reached > value[who])
        result[who[better]], value[who[better]] = end[better], reached[better]
        alive[who[fooled]] = False
    tally.fill(report)
    if report is not None and loss not in TOWARDS and len(x):
        report["flat"] = alive & (value <= clean_f)
    return result


def _loss(model, x, y, loss, targets, targeted):
    """loss(logits, y, goal) to climb, and [goal (N,)], one for each run."""
    if loss not in TOWARDS:
        plain = ascend(loss, targeted)
        return (lambda logits, y, goal: plain(logits, y)), [y]
    towards = TOWARDS[loss]
    with torch.no_grad():
        logits = forward(model, x, y)
    if targeted:  # y is the goal; the model's prediction is the label to move away from
        return (lambda logits, y, goal: towards(y)(logits, goal)), [logits.argmax(1)]
    return (lambda logits, y, goal: towards(goal)(logits, y),
            likeliest_wrong(logits, y, targets))


@dataclass
class _State(Rows):
    """The state of a run, with a row for each image in the batch."""
    row: torch.Tensor        # which image of the run, int64
    x: torch.Tensor          # (n, ...) the clean image
    y: torch.Tensor
    goal: torch.Tensor       # class to run towards
    at: torch.Tensor         # (n, ...) the current point
    g: torch.Tensor          # (n, ...) its gradient
    before: torch.Tensor     # (n, ...) the previous point
    best: torch.Tensor       # (n, ...) the best point so far
    best_g: torch.Tensor     # (n, ...) its gradient
    best_f: torch.Tensor     # its loss
    last_f: torch.Tensor     # loss at the previous point
    checked_f: torch.Tensor  # best loss at the last checkpoint
    gains: torch.Tensor      # steps since then that raised the loss
    size: torch.Tensor       # step size
    halved: torch.Tensor     # whether it was halved at the last checkpoint
    width: torch.Tensor      # L1: share of the entries that a step moves
    moved: torch.Tensor      # L1: changed entries of the best point at the last checkpoint
    fooled: torch.Tensor     # at the best point; such images only wait to leave the batch

    def see(self, f, hit):
        """Record the losses and who is fooled; the first point that fools is best, at any loss."""
        climbed, first = (f > self.best_f) & ~self.fooled, hit & ~self.fooled
        self.best = torch.where(column(climbed | first, self.x), self.at, self.best)
        self.best_g = torch.where(column(climbed, self.x), self.g, self.best_g)
        self.best_f = torch.where(climbed, f, self.best_f)
        self.gains, self.last_f = self.gains + (f > self.last_f), f
        self.fooled = self.fooled | hit

    def rest(self):
        """Let fooled images wait at the clean image, whose projection takes no rounds."""
        fooled = column(self.fooled, self.x)
        self.at, self.before = (torch.where(fooled, self.x, t) for t in (self.at, self.before))
        self.size = self.size.masked_fill(self.fooled, 0)


def _start(x, y, goal, start, eps, norm, stages):
    """The state at the start. In L1 the first steps move a fifth of an image's entries; with
    stages, 1 / 1.5 times as many as differ between start and image.
    """
    value = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    nothing, entries = torch.zeros_like(x), x[0].numel()
    moved = (start != x).flatten(1).sum(1).to(value) if stages else torch.full_like(value, entries)
    return _State(
        row=torch.arange(len(x), device=x.device), x=x, y=y, goal=goal, at=start, g=nothing,
        before=start, best=start, best_g=nothing, best_f=value, last_f=value, checked_f=value,
        gains=torch.full_like(value, -1),  # rising from -inf is no gain
        size=torch.full_like(value, eps if norm == "l1" else 2 * eps),
        halved=torch.ones(len(x), dtype=torch.bool, device=x.device),
        width=moved / entries / 1.5 if stages else torch.full_like(value, 0.2), moved=moved,
        fooled=torch.zeros(len(x), dtype=torch.bool, device=x.device))


def _run(model, x, y, goal, own, *, eps, norm, steps, stages, **how):
    """One run from a random point -> images (n, ...), losses (n,), which are fooled (n,)."""
    parts = _stages(steps) if stages else [(1, steps)]
    # unlike the authors' code, which starts on the sphere: uniform in the ball, then projected
    at = x + random_point(x, parts[0][0] * eps, norm, own)
    for times, count in parts:
        found = _climb(model, x, y, goal, nearest(at, x, times * eps, norm), eps=times * eps,
                       norm=norm, steps=count, inside=times == 1, stages=stages, **how)
        at = found[0]
    return found


def _stages(steps):
    """[(radius in eps, steps)]"""
    larger = math.ceil(0.3 * steps)
    return [(3, larger), (2, larger), (1, steps - 2 * larger)] if steps > 3 else [(1, steps)]


def _climb(model, x, y, goal, start, *, eps, norm, steps, stages, loss, rho, targeted, tally, who,
           inside):
    """The same from a given point. inside: whether fooling counts at this radius."""
    s = _start(x, y, goal, start, eps, norm, stages)
    found = [x.clone(), s.best_f.clone(), s.fooled.clone()]
    checkpoints = _checkpoints(steps, norm)
    for t in range(steps + 1):
        logits, f, s.g = gradient(model, s.at, s.y,
                                  lambda logits, y, goal=s.goal: loss(logits, y, goal),
                                  tally, who[s.row], s.fooled)
        s.see(f, is_fooled(logits, s.y, targeted) & inside)
        if t < steps and due(t, x):
            s = _without_fooled(s, found)
        if t == steps or not len(s.row):
            break
        if t in checkpoints:
            (_adapt_l1 if norm == "l1" else _adapt)(s, eps, rho * checkpoints[t])
        if not due(t, x):
            s.rest()
        s.at, s.before = _step(s, eps, norm, 0.75 if t else 1.0), s.at
    return _noted(s, found)


def _without_fooled(s, found):
    """The state without its fooled images, whose results are noted in `found`."""
    left = (~s.fooled).nonzero()[:, 0]
    if len(left) == len(s.row):
        return s
    _noted(s, found)
    return s.select(left)


def _noted(s, found):
    """`found` (best points, losses, fooled; of all images), updated with the images of s."""
    for whole, part in zip(found, (s.best, s.best_f, s.fooled), strict=True):
        whole[s.row] = part
    return found


def _checkpoints(steps, norm):
    """{step: length of the window that ends there}. 2003.01690, Sec. 3; in L1 every 4 %."""
    if norm == "l1":
        length = max(int(0.04 * steps), 1)
        return dict.fromkeys(range(length, steps, length), length)
    length, at, found = max(int(0.22 * steps), 1), 0, {}
    while at + length < steps:
        at += length
        found[at] = length
        length = max(length - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def _adapt(s, eps, wanted):
    """Halve the step where too few steps raised the loss (condition 1), or where the last
    checkpoint did not halve it and the best loss has not risen since (condition 2).
    """
    # both <= as in the authors' code; the first step from the best point is compared with it
    stalled = (s.gains <= wanted) | (~s.halved & (s.best_f <= s.checked_f))
    s.halved, s.checked_f = stalled, s.best_f
    s.gains = torch.zeros_like(s.gains)
    s.size = torch.where(stalled, s.size / 2, s.size)
    s.at = torch.where(column(stalled, s.x), s.best, s.at)
    s.g = torch.where(column(stalled, s.x), s.best_g, s.g)
    s.last_f = torch.where(stalled, s.best_f, s.last_f)


def _adapt_l1(s, eps, _):
    """The next steps move 1 / 1.5 times as many entries as differ between best point and image.
    Where that number has dropped by over 5 %, the step is eps again and starts at the best point.
    """
    x = s.x
    moved = (s.best != x).flatten(1).sum(1).to(s.moved)
    shrinking = moved / s.moved.clamp_min(1) < 0.95
    s.width, s.moved = moved / x[0].numel() / 1.5, moved
    s.size = torch.where(shrinking, torch.full_like(s.size, eps),
                         (s.size / 1.5).clamp_min(eps / 10))
    s.at = torch.where(column(shrinking, x), s.best, s.at)
    s.g = torch.where(column(shrinking, x), s.best_g, s.g)


def _step(s, eps, norm, a):
    """The next point: a step and, except in L1, momentum 1 - a. Alg. 1, lines 7-8."""
    x, at, g, size = s.x, s.at, s.g, column(s.size, s.x)
    if norm == "l1":
        return nearest(at + size * sparse_sign(g, s.width), x, eps, norm)
    z = nearest(at + size * (g.sign() if norm == "linf" else unit(g, "l2")), x, eps, norm)
    return nearest(at + a * (z - at) + (1 - a) * (at - s.before), x, eps, norm)
