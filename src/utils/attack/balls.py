"""Balls of perturbations around images: norms, directions, random points, exact projections.

For images x in [0, 1], a perturbation delta is allowed if ||delta|| <= eps in its norm and if
x + delta stays in the box [0, 1]. `project` finds the nearest such delta. With how="rescale" it
scales to the ball first and clips to the box second, as most libraries do: the result is also
allowed, but not the nearest, and in L1 and L2 part of the budget stays unused.
"""

import torch

from utils.attack.waits import free_to_ask

NORMS = ("linf", "l2", "l1")
TINY = 1e-30  # against 0 / 0
ROUNDS = 100  # limit for the searches below; each ends far earlier, once nothing changes
FIXED = 16    # rounds where the host may not ask whether a search has ended; the tests' attacks
              # took 4 in L2 and 7 in L1. With too few, the point is allowed, but not the nearest


def column(values, like):
    """(N,) -> (N, 1, 1, ...), to broadcast against images like `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def norm_of(delta, norm):
    """Norm of every perturbation: (N, ...) -> (N,).

    Uses sum(), which adds pairwise: vector_norm() is off by 1e-5 on 150,000 float32 numbers.
    """
    dims = tuple(range(1, delta.dim()))
    if norm == "linf":
        return torch.maximum(delta.amax(dims), -delta.amin(dims))
    return delta.abs().sum(dims) if norm == "l1" else delta.square().sum(dims).sqrt()


def cut(x):
    """x clipped to [0, 1]; pixels at exactly 0 or 1 keep their gradient, as in TensorFlow.

    torch.clamp passes it on before 2.15 and blocks it since.
    """
    return torch.where((x < 0) | (x > 1), x.detach().clamp(0, 1), x)


def unit(g, norm):
    """g scaled to norm 1 per image; first by its largest entry, or small squares underflow."""
    g = g / column(norm_of(g, "linf").clamp_min(TINY), g)
    return g / column(norm_of(g, norm).clamp_min(TINY), g)


def sparse_sign(g, share):
    """Signs of the largest entries of every image, scaled to L1 norm 1.

    share: fraction of all entries, a float or (N,); a single entry is steepest ascent in L1.
    """
    size = g.abs().flatten(1)
    n = size.shape[1]
    if isinstance(share, float):
        least = size.topk(max(1, round(share * n)), dim=1).values[:, -1]
    else:
        rank = ((1 - share) * n).long().clamp(0, n - 1)
        least = size.sort(1).values.gather(1, rank[:, None])[:, 0]
    sign = g.sign() * (g.abs() >= column(least, g))
    return sign / column(norm_of(sign, "l1").clamp_min(1), g)


def room_of(x, side):
    """Distance from x (N, ...) to the box: up where side is 1, down where -1, any value where 0.

    Plain arithmetic, as in free_of(): on a CPU comparisons and torch.where take longer.
    """
    return torch.lerp(x, 1 - x, (side + 1).mul_(0.5))


def free_of(inside, room):
    """1.0 where `inside` is less than `room`, 0.0 where they are equal; it is never more."""
    return (room - inside).sign_()


def project(delta, x, eps, norm, how="exact"):
    """The allowed perturbation nearest to delta, by Euclidean distance; delta, x (N, ...).

    how='rescale': delta is scaled to the ball and then clipped to the box.
    """
    if norm == "linf":
        return (x + delta.clamp(-eps, eps)).clamp_(0, 1) - x
    if how == "rescale":
        size = norm_of(delta, norm)
        delta = delta * column((eps / size.clamp_min(1e-12)).clamp_max(1), delta)
        return (_inwards(x, delta, eps) if norm == "l1" else (x + delta).clamp_(0, 1)) - x
    size, side = delta.abs(), delta.sign()
    room = room_of(x, side)
    search = _scale_l2 if norm == "l2" else _shrink_l1
    inside = torch.minimum(size, room)
    outside = norm_of(inside, norm) > eps
    if not free_to_ask(delta) or bool(outside.all()):  # the usual case, without copies of the rows
        inside = search(size, room, eps, outside)
    elif bool(outside.any()):
        inside[outside] = search(size[outside], room[outside], eps, outside[outside])
    return inside * side


def nearest(x_adv, x, eps, norm, how="exact"):
    """The same for images: the allowed image nearest to x_adv, in [0, 1] to the last bit."""
    delta = x_adv - x
    delta = delta.clamp_(-eps, eps) if norm == "linf" else project(delta, x, eps, norm, how)
    return _inwards(x, delta, eps) if norm == "l1" else delta.add_(x).clamp_(0, 1)


def _inwards(x, delta, eps):
    """x + delta in [0, 1], rounded towards x where rounding errors would leave the L1 ball."""
    there = (x + delta).clamp_(0, 1)
    outside = norm_of(there - x, "l1") > eps * (1 + 16 * torch.finfo(x.dtype).eps)
    if free_to_ask(x) and not bool(outside.any()):
        return there
    beyond = column(outside, x) & ((there - x).abs_() > delta.abs())
    return torch.where(beyond, there.nextafter(x), there)


def _scale_l2(size, room, eps, outside):
    """min(t * size, room) with norm eps. KKT: one t scales every coordinate, up to the box.

    t grows from the value that would suffice without a box; coordinates that reach the box stay
    there, so no round overshoots. Images that are not `outside` (n,) keep t = 1. These are Newton
    steps on a concave function, norm^2 in terms of t^2: k rounds leave at most a share
    2^-k t / (first t) of eps^2, and usually far less.
    """
    asks, within = free_to_ask(size), ~outside
    t = torch.where(outside, eps / norm_of(size, "l2"), 1.0)
    inside = torch.minimum(column(t, size) * size, room)
    for _ in range(ROUNDS if asks else FIXED):
        reached = norm_of(inside, "l2")
        enough = ((reached >= eps * (1 - 4 * torch.finfo(size.dtype).eps)) | within).all()
        if asks and bool(enough):
            break
        free = norm_of(inside * free_of(inside, room), "l2")
        short = (eps ** 2 - reached.square()).clamp_min(0)
        t_next = t * (1 + short / free.square().clamp_min(TINY)).sqrt()
        t_next = torch.where(enough | within, t, t_next)
        if asks and torch.equal(t_next, t):
            break
        t = t_next
        inside = torch.minimum(column(t, size) * size, room)
    return inside


def _shrink_l1(size, room, eps, outside):
    """min(max(size - t, 0), room) with norm eps. KKT: one t shrinks every coordinate, down to 0.

    Newton's method on t (the norm is piecewise linear in t), kept between a t that shrinks too
    little and one that shrinks too much; a step beyond them is replaced by their midpoint. Images
    that are not `outside` (n,) keep t = 0.
    """
    dims, asks, within = tuple(range(1, size.dim())), free_to_ask(size), ~outside
    high = size.amax(dims)
    low, t = torch.zeros_like(high), torch.zeros_like(high)
    for _ in range(ROUNDS if asks else FIXED):
        inside = torch.minimum((size - column(t, size)).clamp_min_(0), room)
        excess = inside.sum(dims) - eps
        moving = (free_of(inside, room) * inside.sign()).sum(dims)
        low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
        t_next = t + excess / moving.clamp_min(1)
        t_next = torch.where((moving == 0) | (t_next <= low) | (t_next >= high),
                             (low + high) / 2, t_next)
        near = excess.abs() <= 16 * torch.finfo(size.dtype).eps * eps
        t_next = torch.where(near | within, t, t_next)
        settled = t_next == t
        if asks and bool(settled.all()):
            break
        t = t_next
    if not asks:  # at worst t shrinks too little, and the scaling below does the rest
        t = torch.where(settled, t, low)
    inside = torch.minimum((size - column(t, size)).clamp_min_(0), room)
    return inside * column((eps / norm_of(inside, "l1").clamp_min(TINY)).clamp_max(1), size)


def random_point(x, eps, norm, chance):
    """A perturbation drawn uniformly from the ball for every image; the box is ignored.

    x (N, ...) -> (N, ...); chance: the Chance of these images.
    """
    shape = x.shape[1:]
    if norm == "linf":
        drawn = 2 * chance.uniform(*shape) - 1
    else:
        drawn = (_even_l2 if norm == "l2" else _even_l1)(shape, chance.fold(0), chance.fold(1))
    return eps * drawn.to(x)


def _even_l2(shape, one, two):
    """Directions from normal variables; a share s ** D of the unit ball lies within radius s."""
    direction = one.normal(*shape)
    radius = two.uniform() ** (1 / shape.numel())
    return column(radius / norm_of(direction, "l2").clamp_min(TINY), direction) * direction


def _even_l1(shape, one, two):
    """Normalized exponential variables are uniform on the simplex; one extra fills the ball."""
    share = -torch.log(1 - one.uniform(shape.numel() + 1))
    share = share / share.sum(1, keepdim=True).clamp_min(TINY)
    return two.signs(*shape) * share[:, :-1].reshape(-1, *shape)
