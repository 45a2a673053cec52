"""Per-image attacks: one perturbation per image, found from gradients or from queries alone.

    fgsm           one signed step                        Goodfellow et al., arXiv:1412.6572
    fgv            one step along the gradient itself     Rozsa et al., arXiv:1605.01775
    bim, pgd       projected gradient steps               arXiv:1607.02533; Madry et al., 1706.06083
    mim            signed steps along a running mean      Dong et al., arXiv:1710.06081; with
                   DI and TI, utils/attack/diverse.py     arXiv:1803.06978, 1904.02884
    cw_l2          the smallest L2 norm that fools        Carlini and Wagner, arXiv:1608.04644
    worst_case     several attacks, each on the images not fooled so far
    strongest_quick  such a series: Auto-PGD on two losses, Square with few queries
    autoattack     the standard evaluation, utils/attack/several.py
    bpda, eot      for adaptive attackers                 Athalye et al., arXiv:1802.00420
    apgd           Auto-PGD, in utils/attack/apgd.py      Croce and Hein, arXiv:2003.01690
    fab            the nearest image, utils/attack/fab.py Croce and Hein, arXiv:1907.02044
    square         no gradient, utils/attack/square.py    Andriushchenko et al., arXiv:1912.00049

    model = load_model("resnet50")                 # [0, 1] pixels -> logits
    x_adv = pgd(model, x, y, eps=8 / 255)          # 20 steps of eps / 4 from a random start
    x_adv = pgd(model, x, y, norm="l2", eps=8.0, alpha=0.6, steps=20, generator=generator)

The contract. x (N, ...): float32 or float64 in [0, 1]. y (N,): int64, the labels to move away from,
or with targeted=True the classes to reach. The result is detached, lies within eps and [0, 1], and
has x's shape, dtype and device. x, the weights, every `.grad`, flag, buffer and mode of the model
and the global RNG are left as they were (the attack itself runs in eval mode). Losses are summed
over images, and every image has its own random numbers, also in random layers (ResizePad), so its
result does not depend on the rest of the batch. `generator`: a torch.Generator, from which every
call draws one seed, with images numbered 0 .. N - 1; None: seed 0 at every call; or a Chance(seed,
indices (N,)), which gives an image the same result in any batch of a data set. If the model is a
plain function, modes and eots inside it are not seen.

`report`, a dict, receives what the result alone does not show: `zero_gradient` (N,), True where
every gradient was zero in every entry (such an image was not attacked; its starting point is
returned); `gradients` and `queries`, how many were taken, summed over images; and `losses`, one
(N,) per step, for pgd, bim, fgsm and mim if all images took all steps. Bad input and NaN gradients
raise UserError. On a GPU, where no step after the first waits for the device (except in cw_l2 and
with stop_early), an error on the way is raised at the end (utils/attack/waits.py). With too few
classes for DLR the margin loss takes its place, and K classes give at most K - 1 targets; a
one-line warning says so.
"""

import math
from dataclasses import dataclass, replace
from numbers import Integral

import torch

from utils.attack.adaptive import bpda, eot
from utils.attack.apgd import apgd
from utils.attack.balls import (
    NORMS,
    TINY,
    column,
    nearest,
    norm_of,
    random_point,
    sparse_sign,
    unit,
)
from utils.attack.chance import Chance, chance_of
from utils.attack.core import (
    Rows,
    Tally,
    ascend,
    attack,
    gradient,
    is_fooled,
    margin,
    mean_logits,
    measure,
    one_of,
)
from utils.attack.diverse import Diverse, blurred
from utils.attack.fab import fab
from utils.attack.several import (
    autoattack,
    autoattack_title,
    quick_title,
    strongest_quick,
    worst_case,
)
from utils.attack.square import square
from utils.errors import UserError

__all__ = ["Chance", "Norm", "apgd", "autoattack", "autoattack_title", "bim", "bpda", "cw_l2",
           "eot", "fab", "fgs_step", "fgsm", "fgv", "fgv_step", "mim", "pgd", "quick_title",
           "square", "strongest_quick", "worst_case"]


# ------------------------------------------------------------------------ one step: direction, move

STEPS = {"linf": "sign", "l2": "normalized", "l1": "sparse"}


@dataclass(frozen=True)
class Norm:
    """A norm, with the step and the projection that pgd uses for it.

    name: 'linf', 'l2', 'l1'. step: 'sign', 'normalized' (g / ||g||_2), 'dense' (g / ||g||_1),
    'sparse' (signs of the largest entries, a share q of all, with L1 norm 1); None: 'sign' for
    linf, 'normalized' for l2, 'sparse' for l1. projection: 'exact', onto the intersection of ball
    and box, or 'rescale', ball then box, as in other libraries.
    """
    name: str = "linf"
    step: str = None
    q: float = 0.05
    projection: str = "exact"

    def __post_init__(self):
        one_of("norm", self.name, NORMS)
        one_of("projection", self.projection, ("exact", "rescale"))

    @property
    def direction(self):
        return _direction(self.step or STEPS[self.name], self.q)


def _direction(step, q):
    if not 0 < q <= 1:
        raise UserError(f"q={q}; wanted the share of entries that a sparse step moves, in (0, 1]")
    rules = {"sign": lambda g, _: g.sign(), "normalized": lambda g, _: unit(g, "l2"),
             "dense": lambda g, _: unit(g, "l1"),
             "sparse": lambda g, at: sparse_sign(g.masked_fill(_held(g, at), 0), float(q))}
    return rules[one_of("step", step, rules)]


def _held(g, at):
    """Pixels that the box keeps from moving along g: they take no part in a sparse step."""
    return ((at <= 1e-6) & (g < 0)) | ((at >= 1 - 1e-6) & (g > 0))


def _climb(model, x, y, x_adv, who, *, steps, alpha, direction, into_ball, loss, targeted,
           stop_early, tally):
    """x_adv after `steps` of x_adv <- into_ball(x_adv + alpha * direction(g, who, x_adv)).

    who: positions of these images in the whole batch. With stop_early, fooled images leave it.
    """
    result, row = x_adv, torch.arange(len(x), device=x.device)
    for _ in range(steps):
        logits, value, g = gradient(model, x_adv, y, loss, tally, who)
        tally.follow(value)
        if stop_early:
            left = (~is_fooled(logits, y, targeted)).nonzero()[:, 0]
            if len(left) < len(row):
                result = _put(result, row, x_adv)
                x, y, x_adv, g, who, row = (t[left] for t in (x, y, x_adv, g, who, row))
                if not len(row):
                    break
        x_adv = into_ball(torch.add(x_adv, direction(g, who, x_adv), alpha=alpha), x)
    return _put(result, row, x_adv)


def _put(whole, row, part):
    """`whole` with the rows `row` replaced by `part`."""
    if len(row) == len(whole):
        return part
    whole = whole.clone()
    whole[row] = part
    return whole


# ----------------------------------------------------------------------------- gradients and a ball

def fgsm(model, x, y, *, eps, targeted=False, loss="ce", generator=None, report=None):
    """x + eps * sign(gradient of the loss), in the Linf ball of radius eps."""
    return bim(model, x, y, eps=eps, alpha=eps, steps=1, targeted=targeted, loss=loss,
               generator=generator, report=report)


def fgs_step(x, g, eps):
    """x + eps * sign(g), in [0, 1]: fgsm with a given gradient g (N, ...)."""
    return (x + eps * g.sign()).clamp_(0, 1)


def fgv_step(x, g, alpha):
    """x + alpha * g / max|g|, the maximum per image, in [0, 1]: fgv with a given gradient g."""
    return (x + alpha * g / column(norm_of(g, "linf").clamp_min(TINY), g)).clamp_(0, 1)


@attack
def fgv(model, x, y, *, alpha, targeted=False, loss="ce", generator=None, report=None):
    """x + alpha * g / max|g|, the maximum per image, in [0, 1]: the gradient without the sign."""
    tally = Tally(x)
    if len(x):
        _, _, g = gradient(model, x, y, ascend(loss, targeted), tally, slice(None))
        x = fgv_step(x, g, alpha)
    tally.fill(report)
    return x


def bim(model, x, y, *, eps, alpha, steps, targeted=False, loss="ce", stop_early=False,
        generator=None, report=None):
    """Basic iterative method: pgd in Linf that starts at x."""
    return pgd(model, x, y, eps=eps, alpha=alpha, steps=steps, random_start=False,
               targeted=targeted, loss=loss, stop_early=stop_early, generator=generator,
               report=report)


@attack
def mim(model, x, y, *, eps, alpha, steps, mu=1.0, diverse=0.0, blur=0, targeted=False, loss="ce",
        stop_early=False, generator=None, report=None):
    """Momentum iterative method, Alg. 1: v = mu * v + g / ||g||_1, steps alpha * sign(v), Linf.

    For transfer to other networks (utils/attack/diverse.py): diverse, the probability that DI
    scales and pads an image in a step (published: 0.5); blur, the odd side of the kernel with which
    TI convolves gradients (published: 15, for 299 pixels). 0 turns either off.
    """
    if not isinstance(blur, Integral) or blur not in (0, *range(1, 1000, 2)) or not (
            0 <= diverse <= 1):
        raise UserError(f"diverse={diverse}, blur={blur}; wanted a probability, and 0 or an odd "
                        "whole number of pixels")
    if (diverse or blur) and x.dim() != 4:
        raise UserError(f"diverse={diverse}, blur={blur}: wanted images (N, C, H, W), or 0 for both"
                        f"; given {tuple(x.shape)}")
    if diverse and stop_early:
        raise UserError(f"diverse={diverse}, stop_early=True: an image fooled at one "
                        "random size only would leave; leave out stop_early")
    tally, v = Tally(x), torch.zeros_like(x)
    model = Diverse(model, diverse) if diverse else model

    def direction(g, who, _):
        g = blurred(g, blur) if blur else g
        v[who] = mu * v[who] + unit(g, "l1")
        return v[who].sign()

    if len(x):
        everyone = torch.arange(len(x), device=x.device)
        x = _climb(model, x, y, x, everyone, steps=steps, alpha=alpha, direction=direction,
                   into_ball=lambda z, x: nearest(z, x, eps, "linf"), loss=ascend(loss, targeted),
                   targeted=targeted, stop_early=stop_early, tally=tally)
    tally.fill(report)
    return x


@attack
def pgd(model, x, y, *, eps, alpha=None, steps=20, norm="linf", random_start=True, restarts=1,
        targeted=False, loss="ce", stop_early=False, generator=None, report=None, **choices):
    """Projected gradient descent from a random point in the ball; alpha defaults to eps / 4.

    norm: 'linf', 'l2', 'l1', or a Norm, which also sets step and projection. These can be given
    here too, as `choices`: norm="l1", step="dense" is norm=Norm("l1", step="dense"). loss: 'ce',
    'margin' (in L2, what tables call C&W L2=8), 'dlr', or loss(logits (n, K), y (n,)) -> (n,) to
    ascend, or with targeted=True to descend. restarts: each image keeps one that fools it, or else
    the one with the highest loss. stop_early: fooled images leave the batch and are not restarted,
    which saves time; the textbook attack takes all steps.
    """
    if unknown := choices.keys() - {"step", "q", "projection"}:
        raise TypeError(f"pgd() got an unexpected keyword argument {min(unknown)!r}")
    norm = replace(norm, **choices) if isinstance(norm, Norm) else Norm(norm, **choices)
    move, climbed, tally = norm.direction, ascend(loss, targeted), Tally(x)
    alpha = eps / 4 if alpha is None else alpha
    if restarts > 1 and not random_start:
        raise UserError(f"restarts={restarts} are all the same without a random start; type "
                        "random_start=True or restarts=1")
    own = chance_of(generator, x)
    best, fooled = x, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    value = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    for k in range(restarts):
        who = (~(fooled & stop_early)).nonzero()[:, 0]
        if not len(who):
            break
        x0, y0 = x[who], y[who]
        start = nearest(x0 + random_point(x0, eps, norm.name, own[who].fold(k)), x0, eps,
                        norm.name) if random_start else x0
        x_adv = _climb(model, x0, y0, start, who, steps=steps, alpha=alpha,
                       direction=lambda g, _, at: move(g, at),
                       into_ball=lambda z, x: nearest(z, x, eps, norm.name, norm.projection),
                       loss=climbed, targeted=targeted, stop_early=stop_early, tally=tally)
        if restarts == 1:
            best = x_adv
            break
        f, hit = measure(model, x_adv, y0, climbed, targeted, index=who)
        worse = (hit & ~fooled[who]) | ((hit == fooled[who]) & (f > value[who]))
        best = _put(best, who, torch.where(column(worse, x), x_adv, best[who]))
        value[who], fooled[who] = torch.where(worse, f, value[who]), fooled[who] | hit
    tally.fill(report)
    return best


# ----------------------------------------------------------------------------- the smallest L2 norm

SQUEEZE = 0.02  # pixels at 0 and 1 start this far inside the range of tanh, where it is not flat


@dataclass
class _Tanh(Rows):
    """x' (n, ...) in [0, 1] as a function of an unbounded w, with x'(start) = x.

    u = (tanh(w) + 1) / 2 starts at u0, x squeezed into the open interval; [0, u0] is stretched to
    [0, x] and [u0, 1] to [x, 1]. In the paper x' only starts near x, and black pixels hardly move
    because tanh is flat there. For pixels at 0 or 1, w stays on the side where x' moves.
    """
    x: torch.Tensor
    t0: torch.Tensor        # tanh(start)
    upwards: torch.Tensor   # above this tanh(w) the slope is `above`, else `below`
    above: torch.Tensor     # dx'/dtanh(w)
    below: torch.Tensor
    low: torch.Tensor       # bounds of w
    high: torch.Tensor

    @classmethod
    def around(cls, x):
        """The function and its start."""
        u0 = x * (1 - SQUEEZE) + SQUEEZE / 2
        start = torch.atanh(2 * u0 - 1)
        t0, free = start.tanh(), torch.full_like(x, math.inf)
        upwards = torch.where(x < 0.5, t0.nextafter(-free), t0)  # at t0: slope of the longer side
        return cls(x, t0, upwards, (1 - x) / (1 - u0) / 2, x / u0 / 2,
                   torch.where(x == 0, start, -free), torch.where(x == 1, start, free)), start

    def __call__(self, w):
        """x'(w), and for `back` tanh(w) and dx'/dtanh(w)."""
        t = w.tanh()
        slope = torch.where(t > self.upwards, self.above, self.below)
        return (t - self.t0).mul_(slope).add_(self.x).clamp_(0, 1), t, slope

    @staticmethod
    def back(g, t, slope):
        """The gradient with respect to w, from g with respect to x'. Overwrites g and t."""
        g.mul_(slope)
        return g.addcmul_(g, t.square_(), value=-1)

    def hold(self, w):
        """Clamp w in place: pixels at 0 or 1 do not pass their start, beyond which x' is flat."""
        return w.clamp_(self.low, self.high)


@attack
def cw_l2(model, x, y, *, steps=1000, binary_steps=9, c=1e-3, lr=0.01, confidence=0.0,
          targeted=False, abort_early=True, judge=None, generator=None, report=None):
    """Carlini and Wagner's attack: Adam on ||x' - x||_2^2 + c * max(z_y - max_j z_j, -confidence).

    c is searched per image: multiplied by ten until one succeeds, then bisected between the largest
    that failed and the smallest that succeeded. Unlike the paper, a c succeeds only if the image is
    still adversarial near the end: the first steps may be too long by chance.
    abort_early: an image leaves the batch when a tenth of the steps (at least ten) did not lower
    its loss. judge: the model that decides what is adversarial, if `model` is its faster bf16 copy.
    -> (x_adv, success (N,)); x itself where the attack failed.
    """
    tally, found = Tally(x), x.clone()
    norm2 = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    low, high = torch.zeros_like(norm2), torch.full_like(norm2, math.inf)
    c = torch.full_like(norm2, c)
    for _ in range(binary_steps if len(x) else 0):
        at, at2, success = _cw_run(model, judge, x, y, c, steps, lr, confidence, targeted,
                                   abort_early, tally)
        better = at2 < norm2
        found, norm2 = torch.where(column(better, x), at, found), torch.where(better, at2, norm2)
        low, high = torch.where(success, low, c), torch.where(success, c, high)
        c = torch.where(high.isinf(), (c * 10).clamp_max(1e10), (low + high) / 2)
    success = norm2.isfinite()
    tally.nonzero |= success  # success without any gradient needed no attack
    tally.fill(report)
    return found, success


def _cw_run(model, judge, x, y, c, steps, lr, confidence, targeted, abort_early, tally):
    """One run with c (N,) -> best images (N, ...), their squared norms (N,), who succeeded (N,)."""
    found, norm2 = x.clone(), torch.full_like(c, math.inf)
    who, (space, w) = torch.arange(len(x), device=x.device), _Tanh.around(x)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    best, best_then, every = norm2.clone(), norm2.clone(), max(steps // 10, 10)
    hit_at, end_at = torch.zeros_like(who), torch.zeros_like(who)  # last step: fooled, taken

    def shortfall(logits, y):  # climbed: the margin, capped at `confidence`
        gap = -margin(logits, y) if targeted else margin(logits, y)
        return gap.clamp(max=confidence)

    def adversarial(logits, y):
        return is_fooled(logits, y, targeted) & (shortfall(logits, y) >= confidence)

    for step in range(1, steps + 1):
        x_adv, t, slope = space(w)
        logits, gap, g = gradient(model, x_adv, y, shortfall, tally, who)
        delta = x_adv - space.x
        size2 = delta.flatten(1).square().sum(1)
        hit = adversarial(logits, y)  # not by `gap`, under eot a mean of clamped margins
        hit_at[who], end_at[who] = torch.where(hit, step, hit_at[who]), torch.full_like(who, step)
        good = (hit & (size2 < norm2[who])).nonzero()[:, 0]
        if judge is not None and len(good):
            judged = mean_logits(judge, x_adv[good], y[good], who[good])
            good = good[adversarial(judged, y[good])]
        found[who[good]], norm2[who[good]] = x_adv[good], size2[good]
        best = torch.minimum(best, size2 - c * gap)
        if abort_early and step % every == 0:
            left = (best < best_then - 1e-4 * best.abs()).nonzero()[:, 0]
            best_then = best
            if len(left) < len(who):
                y, c, w, m, v, g, t, slope, delta, who, best, best_then = (
                    part[left] for part in (y, c, w, m, v, g, t, slope, delta, who, best,
                                            best_then))
                space = space.select(left)
                if not len(who):
                    break
        g = space.back(delta.mul_(2).addcmul_(column(c, x), g, value=-1), t, slope)
        m.mul_(0.9).add_(g, alpha=0.1)  # in place: allocations would take half of the time
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        size = v.div(1 - 0.999 ** step).sqrt_().add_(1e-8)
        w = space.hold(w.addcdiv_(m, size, value=-lr / (1 - 0.9 ** step)))
    return found, norm2, norm2.isfinite() & (hit_at > end_at - every)
