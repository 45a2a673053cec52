"""What every attack uses: the contract, losses, gradients.

`attack` is the decorator that enforces the contract of attacks.py; `gradient` is the only place
where a model is differentiated.
"""

import functools
import inspect
import math
import warnings
from contextlib import contextmanager
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import nn

from utils.attack.adaptive import draws_of
from utils.attack.balls import column, norm_of
from utils.attack.chance import chance_of
from utils.attack.random_layers import drawing_from, rows_passing
from utils.attack.waits import free_to_ask
from utils.errors import UserError
from utils.precision import out_of_memory

NUMBERS = ("eps", "alpha", "mu", "q", "c", "lr", "confidence", "rho", "p")  # at least 0
COUNTS = ("steps", "binary_steps", "restarts", "targets", "queries")         # whole, at least 1
LAYERS = 1 << 32  # the stream of random layers; attacks fold in small numbers for theirs


def attack(function):
    """Check the input, run the attack in eval mode with gradients on, then restore both.

    If the attack takes a `generator`, turn it into a Chance, from which random layers draw too.
    """
    parameters = inspect.signature(function).parameters
    draws = "generator" in parameters
    default = {name: one.default for name, one in parameters.items()}

    @functools.wraps(function)
    def wrapped(model, x, y, *args, **options):
        _check(x, y, {name: value for name, value in options.items()
                      if not isinstance(value, (Real, type(None))) or value != default.get(name)})
        with (_evaluating(model, options.get("judge")), torch.inference_mode(False),
              torch.enable_grad()):
            x, y = x.detach().clone(), y.detach().to(x.device, copy=True)
            if not draws:
                return function(model, x, y, *args, **options)
            own = chance_of(options.get("generator"), x)
            with drawing_from(own.fold(LAYERS)):
                return function(model, x, y, *args, **options | {"generator": own})
    return wrapped


@contextmanager
def _evaluating(*models):
    modes = {part: part.training for model in models if isinstance(model, nn.Module)
             for part in model.modules()}
    try:
        for module in modes:
            module.training = False  # not .eval(): some networks override train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check(x, y, options):
    if not torch.is_tensor(x) or not torch.is_tensor(y):
        raise UserError(f"images and labels are {type(x).__name__} and {type(y).__name__}; wanted "
                        "tensors: type torch.as_tensor(x)")
    if x.dtype not in (torch.float32, torch.float64):
        scale = "" if x.is_floating_point() else " / 255"
        raise UserError(f"images are {x.dtype}; wanted float32 in [0, 1]: type x.float(){scale}")
    lowest, highest = x.aminmax() if x.numel() else (0, 0)
    if not (lowest >= 0) & (highest <= 1):  # NaN is neither
        raise UserError("images hold pixels outside [0, 1] or NaN; attacks work on pixels: put "
                        "Normalize into the model")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(f"labels are {y.dtype} of shape {tuple(y.shape)}; wanted int64 of shape "
                        f"({len(x)},), one class index per image")
    for names, kind, least in ((NUMBERS, Real, 0), (COUNTS, Integral, 1)):
        for name in names:
            value = options.get(name, least)
            if not isinstance(value, kind) or not least <= value < math.inf:
                raise UserError(f"{name}={value!r}; wanted a {'whole ' * least}number of at least "
                                f"{least}")
    norm = options.get("norm", "linf")
    if getattr(norm, "name", norm) == "linf" and options.get("eps", 0) > 1:
        raise UserError(f"eps={options['eps']} in linf, but pixels live in [0, 1]; type eps=8/255")


def one_of(name, value, choices):
    if value not in choices:
        raise UserError(f"{name}={value!r}; wanted one of {', '.join(map(repr, choices))}")
    return value


class Tally:
    """What an attack reports about a batch of images, and what is wrong with the model.

    `first`: whether this is the attack's first step, which checks labels and raises errors at once.
    """

    def __init__(self, x):
        self.seen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.nonzero = self.seen.clone()
        self.gradients = self.queries = 0  # numbers, or tensors on the device
        self.losses, self.first, self.wrong = [], True, []

    def refuse(self, fine, message):
        """UserError unless all of `fine` are True: now, or in `fill` if asking now costs waiting.

        {} in the message stands for how many are not.
        """
        if not (self.first or free_to_ask(fine)):
            self.wrong.append(((~fine).sum(), message))
        elif not bool(fine.all()):
            _raise_for(int((~fine).sum()), message)

    def take(self, g, draws, index, left=None):
        """Count and check gradients. -> g (n, ...); on a GPU, 0 for images where not finite."""
        peak, counted = norm_of(g, "linf"), len(g)
        fine = peak.isfinite()
        if not free_to_ask(g):  # the error comes later; until then no image becomes NaN
            g = g.masked_fill(column(~fine, g), 0)
        if left is not None:
            peak, fine, counted = peak.masked_fill(left, 0), fine | left, (~left).sum()
        self.refuse(
            fine, f"the model's gradient is NaN or infinite for {{}} of {len(g)} images although "
            "its logits are finite: a layer without a finite derivative (a root or a logarithm at "
            "0, a concealed gradient, an overflow in half precision); put bpda(layer) in its "
            "place, or run in float32")
        self.seen[index] |= True  # '= True' copies the number to the device, and waits
        self.nonzero[index] |= peak > 0
        self.gradients += draws * counted
        self.first = False
        return g

    def follow(self, value):
        """Note the losses (n,) of a step; the report has them if all images took all steps."""
        self.losses.append(value)

    def fill(self, report):
        """End the attack: UserError for the first thing that went wrong, or fill the report."""
        if self.wrong:
            bad, messages = zip(*self.wrong, strict=True)
            for k, message in zip(torch.stack(bad).tolist(), messages, strict=True):
                _raise_for(k, message)
        if report is None:
            return
        report.update(zero_gradient=self.seen & ~self.nonzero, gradients=int(self.gradients),
                      queries=int(self.queries))
        if self.losses and all(len(value) == len(self.seen) for value in self.losses):
            report["losses"] = self.losses


def _raise_for(k, message):
    if k:
        raise UserError(message.format(k))


class Rows:
    """Base class for dataclasses of tensors with a row for each image in the batch."""

    def select(self, rows):
        """These rows of every tensor."""
        return type(self)(**{name: part[rows] for name, part in vars(self).items()})


# ------------------------------------------------------- losses and gradients

def cross_entropy(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits, y):
    """max_{j != y} z_j - z_y (N,): positive if the image is misclassified."""
    label = logits.gather(1, y[:, None])
    return (logits.scatter(1, y[:, None], -math.inf).amax(1, keepdim=True) - label)[:, 0]


def dlr(logits, y):
    """Difference of logits ratio: the margin over z_1 - z_3, so that scale does not matter.

    If the model has too few classes for it: the margin alone, and a one-line warning.
    """
    if _too_few(logits, 3):
        return margin(logits, y)
    top = logits.topk(3).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def _dlr_to(logits, y):
    """The DLR loss with y as the class to reach."""
    # unlike the papers, whose ratio is constant while y ranks third
    return -margin(logits, y) / _targeted_scale(logits)


def _targeted_scale(logits):
    """z_1 - (z_3 + z_4) / 2, or 1 if the model has too few classes for it."""
    if _too_few(logits, 4):
        return 1
    top = logits.topk(4).values
    return top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12


def _too_few(logits, wanted):
    classes = logits.shape[1]
    if classes < wanted:
        warnings.warn(f"{'targeted ' * (wanted > 3)}DLR needs {wanted} classes and the model has "
                      f"{classes}: the margin loss takes its place", stacklevel=1)
    return classes < wanted


def likeliest_wrong(logits, y, targets):
    """[(N,)] of the `targets` most likely classes other than y, likeliest first. With K classes, at
    most K - 1; a one-line warning says so if more are asked for.
    """
    wrong = logits.shape[1] - 1
    if targets > wrong:
        warnings.warn(f"targets={targets}, but the model has {wrong + 1} classes, {wrong} of "
                      f"them wrong: {wrong} will be targets", stacklevel=1)
    ranked = logits.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
    return list(ranked[:, :min(targets, wrong)].unbind(1))


def margin_towards(target):
    """From y to the target: z_target - z_y."""
    def loss(logits, y):
        return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    return loss


def dlr_towards(target):
    """Targeted DLR, from y to the target: (z_target - z_y) / (z_1 - (z_3 + z_4) / 2)."""
    gain = margin_towards(target)
    return lambda logits, y: gain(logits, y) / _targeted_scale(logits)


LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def ascend(loss, targeted):
    """The loss that the attack climbs: loss(logits (n, K), y (n,)) -> (n,), negated if targeted."""
    function = loss if callable(loss) else LOSSES[one_of("loss", loss, LOSSES)]
    if targeted and loss == "dlr":
        return _dlr_to
    return (lambda logits, y: -function(logits, y)) if targeted else function


def is_fooled(logits, y, targeted):
    return (logits.argmax(1) == y) == targeted


def two_or_more(classes):
    """UserError if the model has no second class."""
    if classes < 2:
        raise UserError(f"the model gives {classes} logit per image; wanted one for each of two or "
                        "more classes: after a single logit z type torch.cat([0 * z, z], 1)")


def forward(model, x, y, tally=None, index=slice(None)):
    """Logits (n, K) in x's dtype; UserError if they are not finite or the labels do not fit.

    tally: the attack's, if this is a step of one; labels are then checked in its first step only.
    index: the positions of these images in the batch that the attack was given.
    """
    tally, version = tally or Tally(x), x._version
    with rows_passing(index):
        try:
            logits, changed = model(x).to(x.dtype), x._version != version
        except RuntimeError as error:
            if out_of_memory(error) or not (changed := _changes(model, x)):
                raise
    if changed:
        raise UserError("the model changes its input, the attacked image, in place; type "
                        "inplace=False in its first layer")
    if logits.dim() != 2 or len(logits) != len(x):
        raise UserError(f"the model gives {tuple(logits.shape)}; wanted logits ({len(x)}, classes)")
    two_or_more(logits.shape[1])
    # before a loss uses them as indices, which on a GPU would end the process
    if tally.first and bool(((y < 0) | (y >= logits.shape[1])).any()):
        raise UserError(f"labels go from {int(y.min())} to {int(y.max())}, but the model has "
                        f"{logits.shape[1]} classes")
    tally.refuse(logits.isfinite(), "the model's logits are not finite: broken weights, or an "
                 "overflow in half precision; run it in float32")
    return logits


@torch.no_grad()
def _changes(model, x):
    """Whether the model changes its input in place, which torch refuses if x needs a gradient."""
    given = x.detach().clone()
    model(given)
    return given._version > 0


def per_image(loss, logits, y):
    """loss(logits, y) (n,); UserError if it is a mean or a sum over the batch."""
    value = loss(logits, y)
    if value.shape != y.shape:
        raise UserError(f"the loss gives {tuple(value.shape)}; wanted one value per image, "
                        f"({len(y)},): type reduction='none'")
    return value


def gradient(model, x, y, loss, tally, index, left=None):
    """Logits (n, K), losses (n,) and their gradients at x (n, ...), averaged over an eot's draws.

    index: the positions of these images in the batch that the attack was given. left (n,) bool:
    images that the attack is done with, which do not count.
    """
    draws, total = draws_of(model), None
    for _ in range(draws):
        x = x.detach().requires_grad_()
        logits = forward(model, x, y, tally, index)
        value = per_image(loss, logits, y)
        if not value.requires_grad:
            raise UserError("the model has no gradient: no path leads from its logits back to the "
                            "pixels; put bpda(layer) in place of the layer that interrupts it")
        g, = torch.autograd.grad(value.sum(), x)
        one = (logits.detach(), value.detach(), g)
        total = one if total is None else [a + b for a, b in zip(total, one, strict=True)]
    logits, value, g = total if draws == 1 else [t / draws for t in total]
    return logits, value, tally.take(g, draws, index, left)


@torch.no_grad()
def mean_logits(model, x, y, index):
    """Logits (n, K), averaged over an eot's draws."""
    draws = draws_of(model)
    return sum(forward(model, x, y, index=index) for _ in range(draws)) / draws


@torch.no_grad()
def measure(model, x, y, loss, targeted, tally=None, index=slice(None)):
    """Losses of images, and which are fooled, (n,) each; tally, index: see forward."""
    draws, value, mean = draws_of(model), 0, 0
    for _ in range(draws):
        logits = forward(model, x, y, tally, index)
        value, mean = value + per_image(loss, logits, y), mean + logits
    if tally is not None:
        tally.first = False
    return value / draws, is_fooled(mean, y, targeted)
