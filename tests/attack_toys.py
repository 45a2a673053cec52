"""Shared by the attack tests: toy models, images with pixels exactly 0 and 1, and answers known
without an attack, in float64 by numpy and bisection.
"""

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.attack.chance import numbered

K, SHAPE = 5, (3, 8, 8)


# ----------------------------------------------------------------- models and images

def toy(dtype=torch.float32, seed=0, classes=K):
    """Curved and smooth, (N, 3, 8, 8) -> (N, classes): gradients depend on the point."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(),
                              nn.Conv2d(6, 6, 3, stride=2), nn.Softplus(), nn.Flatten(),
                              nn.Linear(54, classes))
        for weight in model.parameters():
            weight.data *= 2.5
    return model.to(dtype).eval().requires_grad_(False)


def pictures(n=8, dtype=torch.float32, seed=1, shape=SHAPE):
    """Pixels between 0 and 1, a fifth of them exactly 0 and a fifth exactly 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand((n, *shape), generator=g, dtype=torch.float64).to(dtype)
    kind = torch.randint(0, 5, x.shape, generator=g)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, x))


def greys(n=8, dtype=torch.float32, seed=1, shape=SHAPE):
    """Pixels between 0.4 and 0.6: a small ball around them never meets the box."""
    g = torch.Generator().manual_seed(seed)
    return 0.4 + 0.2 * torch.rand((n, *shape), generator=g, dtype=torch.float64).to(dtype)


def linear(weight, bias=0.0):
    """logits = weight @ pixels + bias; weight (K, D)"""
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(torch.as_tensor(bias))
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


def random_weight(classes, size, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((classes, size), generator=g, dtype=torch.float64).to(dtype)


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def margins(model, x, y):
    """Highest other logit minus the label's (N,): positive if the image is misclassified."""
    with torch.no_grad():
        z = model(x)
    label = z.gather(1, y[:, None])[:, 0]
    return z.scatter(1, y[:, None], -torch.inf).amax(1) - label


def chances(n, seed=0):
    """The random numbers of n images."""
    return numbered(seed, n)


# ------------------------------------------------------------- answers without an attack

def flat(t):
    """One image as a float64 vector."""
    return t.detach().double().flatten().numpy()


def size(d, norm):
    """||d|| of one perturbation."""
    d = np.abs(flat(d) if torch.is_tensor(d) else d)
    return {"linf": np.max, "l1": np.sum, "l2": lambda v: np.sqrt((v ** 2).sum())}[norm](d)


def bisect(grows, wanted, high=1.0):
    """The t >= 0 at which grows(t) reaches `wanted`, or None; grows(0) <= wanted."""
    while grows(high) < wanted:
        high *= 2
        if high > 1e15:
            return None
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if grows(middle) < wanted else (low, middle)
    return high


def best_linear(w, x, eps, norm):
    """The d that maximizes w.d over ||d|| <= eps, 0 <= x + d <= 1; float64 vectors."""
    if norm == "linf":
        return np.clip(eps * np.sign(w), -x, 1 - x)
    if norm == "l2":  # KKT: d is w, scaled by one number and clipped to the box
        t = bisect(lambda t: size(np.clip(t * w, -x, 1 - x), "l2"), eps)
        return np.clip((1e15 if t is None else t) * w, -x, 1 - x)
    d, left = np.zeros_like(x), eps
    for i in np.argsort(-np.abs(w)):  # largest weight first, as far as box and budget allow
        d[i] = np.sign(w[i]) * min(left, 1 - x[i] if w[i] > 0 else x[i])
        left -= abs(d[i])
    return d


def nearest_linear(w, x, need):
    """The smallest d in L2 with w.d >= need, 0 <= x + d <= 1, or None."""
    if need <= 0:
        return np.zeros_like(x)
    t = bisect(lambda t: w @ np.clip(t * w, -x, 1 - x), need)
    return None if t is None else np.clip(t * w, -x, 1 - x)


def nearest_allowed(delta, x, eps, norm):
    """The Euclidean projection of delta onto ||d|| <= eps, 0 <= x + d <= 1; float64 vectors."""
    if norm == "linf":
        return np.clip(np.clip(delta, -eps, eps), -x, 1 - x)

    def at(t):  # KKT: L2 scales by 1 / (1 + t), L1 moves t towards zero; then the box
        moved = delta / (1 + t) if norm == "l2" else np.sign(delta) * np.maximum(abs(delta) - t, 0)
        return np.clip(moved, -x, 1 - x)

    if size(at(0.0), norm) <= eps:
        return at(0.0)
    return at(bisect(lambda t: -size(at(t), norm), -eps))


# ------------------------------------------------------------ attacks as in a textbook

def naive_loss(logits, label, loss="ce", targeted=False):
    """The loss to maximize, for one image: (K,), label -> scalar."""
    other = torch.cat([logits[:label], logits[label + 1:]]).max()
    if loss == "ce":
        value = -torch.log(logits[label].exp() / logits.exp().sum())
    else:
        value = other - logits[label]
    if loss == "dlr":
        top = logits.sort(descending=True).values
        value = value / (top[0] - top[2])
    return -value if targeted else value


def naive_gradient(model, image, label, loss="ce", targeted=False):
    with torch.enable_grad():
        pixels = image.clone().requires_grad_(True)
        naive_loss(model(pixels[None])[0], label, loss, targeted).backward()
    return pixels.grad


def naive_step(g, rule, q):
    if rule == "sign":
        return g.sign()
    if rule == "normalized":
        return g / g.square().sum().sqrt()
    if rule == "dense":
        return g / g.abs().sum()
    top = g.abs().flatten().argsort(descending=True)[:round(q * g.numel())]
    step = torch.zeros(g.numel(), dtype=g.dtype)
    step[top] = g.flatten()[top].sign() / len(top)
    return step.view_as(g)


def naive_project(delta, image, eps, norm, how):
    if how == "exact":
        near = nearest_allowed(flat(delta), flat(image), eps, norm)
        return torch.from_numpy(near).view_as(delta)
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    elif size(delta, norm) > eps:
        delta = delta * (eps / size(delta, norm))
    return (image + delta).clamp(0, 1) - image


def naive_pgd(model, x, y, *, eps, alpha, steps, norm="linf", step="sign", projection="exact",
              q=0.05, mu=None, loss="ce", targeted=False, stop_early=False):
    """PGD without a random start, or MIM if mu is given, image by image; x float64."""
    found = []
    for image, label in zip(x, y.tolist(), strict=True):
        delta, v = torch.zeros_like(image), torch.zeros_like(image)
        for _ in range(steps):
            hit = (predicted(model, (image + delta)[None]).item() == label) == targeted
            if stop_early and hit:
                break
            g = naive_gradient(model, image + delta, label, loss, targeted)
            if mu is not None:
                v = g = mu * v + g / g.abs().sum()
            if step == "sparse":  # gradients that point out of the box do not count
                at = image + delta
                out = ((at < 1e-9) & (g < 0)) | ((at > 1 - 1e-9) & (g > 0))
                g = torch.where(out, 0.0, g)
            delta = naive_project(delta + alpha * naive_step(g, step, q), image, eps, norm,
                                  projection)
        found.append((image + delta).clamp(0, 1))
    return torch.stack(found)


# ------------------------------------------------------------------ counting operations

class Operations(TorchDispatchMode):
    """Counts tensor operations, except views, which depend on the memory layout."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is not torch.ops.aten.view.default
        return function(*args, **kwargs or {})


def operations(call):
    with Operations() as seen:
        call()
    return seen.count


class Watched(nn.Module):
    """Records the points at which the model is differentiated."""

    def __init__(self, model):
        super().__init__()
        self.model, self.points = model, []

    def forward(self, x):
        if x.requires_grad:
            self.points.append(x.detach().clone())
        return self.model(x)
