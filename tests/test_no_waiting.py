"""No step of an attack reads a value back from the device, which would empty a GPU's queue.

Counted on the CPU, treated as a device where reading a value back is not free. Waits per step on a
toy network while no image is fooled, including copies of numbers to the device:

                             until d6ea1e3    now
    bim, mim, pgd linf       3                0
    pgd l2, l1               5, 6.6 to 9      0
    apgd linf, l2, l1        4, 9 to 13, 7    0; fooled images are looked for ever more rarely
    square linf, l2          5, 8             0; likewise
    fab linf, l2, l1         -                0; likewise
    sga, spgd, adam          0                0
"""

from functools import partial

import pytest
import torch
from test_attacks_contract import CASES, K, N, case
from torch import nn
from wait_counter import Waits

import attacks
import train_sga
import utils.attack.apgd
import utils.attack.fab
import utils.attack.square
from attack_toys import greys, pictures, predicted, toy
from utils.attack import balls, core, waits
from utils.attack.universal import COMPARING, Features, adam_step
from utils.errors import UserError
from utils.measure import Attack, UapCounts, in_ball


@pytest.fixture
def far(monkeypatch):
    """Treat the CPU as a device where reading a value back is not free."""
    monkeypatch.setattr(waits, "FREE", ())


def counted(function, *args, **options):
    with Waits() as found:
        function(*args, **options)
    return found


# ------------------------------------------------------------------------ the counter

X = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize("wait", [
    lambda: bool(X.sum() > 0), lambda: int(X.sum()), lambda: X.max().item(), lambda: X.tolist(),
    lambda: X.nonzero(), lambda: torch.equal(X, X), lambda: X[X > 1], lambda: X[:, X[0] > 1],
    lambda: X.clone().__setitem__(X > 1, X[0, :1]), lambda: X.numpy(), lambda: X.cpu(),
    lambda: torch.tensor([1, 2]), lambda: X.new_tensor(1.0), lambda: X.unique(),
    lambda: X.long().flatten().bincount(), lambda: X.clone().__setitem__(torch.arange(2), 1.0)],
    ids=["bool", "int", "item", "tolist", "nonzero", "equal", "mask", "column mask", "mask set",
         "numpy", "cpu", "tensor", "new_tensor", "unique", "bincount", "number set"])
def test_the_counter_sees_operations_that_wait(wait):
    assert counted(wait).total >= 1


@pytest.mark.parametrize("work", [
    lambda: (X * 2 + 1).clamp_(0, 1).sum(), lambda: X[torch.arange(2)], lambda: X.argmax(1) == 0,
    lambda: torch.where(X > 1, X, 0.0), lambda: X.clone().index_put_((torch.arange(2),), X),
    lambda: X.new_zeros(3), lambda: X.sort(1).values.gather(1, X.long().clamp_max(2)),
    lambda: X.clone().masked_fill_(X > 1, 0), lambda: X[:, 0].to(torch.float64)], ids=[
    "arithmetic", "index", "argmax", "where", "put", "zeros", "gather", "fill", "to"])
def test_the_counter_ignores_operations_that_do_not_wait(work):
    assert not counted(work).seen


# ------------------------------------------------------------------------ waits of a step

@pytest.fixture(scope="module")
def world():
    """A model, images and labels; image 2 is misclassified from the start."""
    model, x = toy(), pictures(N)
    y = predicted(model, x)
    y[2] = (y[2] + 1) % K
    return model, x, y


MOVING = {name: one for name, one in CASES.items() if name != "pgd stop_early"
          and {"steps", "queries"} & one.options.keys()} | {
    f"apgd {norm} margin": case(attacks.apgd, norm, loss="margin", steps=8)
    for norm in ("linf", "l2", "l1")} | {"mim margin": case(
        attacks.mim, alpha=0.02, steps=4, loss="margin")}
del MOVING["cw_l2"], MOVING["strongest_quick"]


def per_step(run, few, more=5):
    """Waits per extra step of run(few + more) over run(few)."""
    first, second = counted(run, few), counted(run, few + more)
    return {name: (second.seen[name] - first.seen[name]) / more
            for name in second.seen if second.seen[name] != first.seen[name]}


def stepping(name, world):
    """-> run(steps), in which no image is fooled"""
    model, x, y = world[0], greys(3), predicted(world[0], greys(3))
    counts = "queries" if "queries" in MOVING[name].options else "steps"
    small = {"eps": 1e-3} if counts == "queries" or name.startswith(("apgd", "fab")) else {}

    def run(steps):
        MOVING[name](model, x, y, **small, **{counts: steps})
    return run


@pytest.mark.parametrize("name", MOVING)
def test_no_step_of_an_attack_waits(name, world, far, monkeypatch):
    """Except where fooled images are looked for, which is tested below."""
    for module in (utils.attack.apgd, utils.attack.fab, utils.attack.square):
        monkeypatch.setattr(module, "due", lambda t, x: False)
    assert per_step(stepping(name, world), few=2) == {}


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("method", ["sga", "spgd", "adam"])
@pytest.mark.parametrize("loss", [("ce", 9.0, None), ("ce", 9.0, 2), ("logit", 9.0, None),
                                  ("cosine", 9.0, None), ("feature", 9.0, None)], ids=str)
def test_no_inner_step_of_sga_no_chunk_of_spgd_and_no_step_of_adam_waits(method, loss, augment):
    model, x, delta = toy(), pictures(10), torch.zeros((1, 3, 8, 8))
    seen, made = Features(model, "3") if loss[0] == "feature" else model, train_sga.make_loss(*loss)
    y = predicted(model, x)[None]
    if loss[0] in COMPARING:
        y = [None] if augment else [seen(x)]
    aggregate = train_sga.sga_gradient if method == "sga" else train_sga.spgd_gradient
    v = torch.zeros((2, 3, 8, 8)) if method == "adam" else delta
    update = partial(adam_step, step=1) if method == "adam" else partial(train_sga.update, mu=0.9)

    def run(steps):
        draws = torch.arange(2 * steps).remainder(10).view(steps, 2)
        maps = train_sga.draw_maps(draws.shape, torch.Generator()) if augment else None
        with Waits() as found:
            g = aggregate(lambda *at: train_sga.input_gradient([seen], *at, loss=made), x, y, delta,
                          draws, eps=0.04, alpha=0.01, augment=maps)[1]
            update(delta, g, v, eps=0.04, alpha=0.01)
        assert not found.seen
    run(1), run(6)


def test_an_attack_that_drops_fooled_images_looks_for_them_rarely(world, far):
    """100 steps look for fooled images 22 times; once they looked in each."""
    some = CASES["apgd linf ce"]
    assert counted(some, *world, steps=100, eps=0.03).total <= 50
    assert counted(CASES["square linf"], *world, queries=300, eps=0.03).total <= 60


def test_images_leave_at_most_a_quarter_later_than_they_could(far):
    asked = [t for t in range(5001) if waits.due(t, X)]
    assert asked[:15] == [*range(9), 10, 12, 14, 16, 20, 24] and len(asked) == 45
    late = {t: min(at for at in asked if at >= t) - t for t in range(1, 4097)}
    assert all(more <= t / 4 for t, more in late.items())


def test_on_a_cpu_images_leave_at_once():
    assert all(waits.due(t, X) for t in range(100))


# ------------------------------------------------------------------------ the same results

class OneByOne(nn.Module):
    """The output for an image does not depend on the batch size, to the last bit."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        self.sizes.append(len(x))
        return torch.cat([self.model(image[None]) for image in x])


def same(a, b):
    """Equality of tensors, numbers, lists and dicts of them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def unasked(name, strong, world, monkeypatch, replace=()):
    """Images and report equal those of asking at each step; `replace`: patches when not asking."""
    model, (_, x, y) = OneByOne(world[0]), world
    more = {key: strong * value for key, value in CASES[name].options.items()
            if key in ("eps", "alpha")}
    more |= {key: number for key, number in (("steps", 16), ("queries", 40))
             if key in CASES[name].options}
    found = []
    for free, patches in ((("cpu",), ()), ((), replace)):
        monkeypatch.setattr(waits, "FREE", free)
        for patch in patches:
            monkeypatch.setattr(*patch)
        report = {}
        found.append((CASES[name](model, x, y, report=report, **more), report))
    assert torch.equal(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("strong", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_without_asking_the_images_and_the_report_are_the_same(name, strong, world, monkeypatch):
    """To the last bit; three times the radius fools more images on the way."""
    unasked(name, strong, world, monkeypatch)


@pytest.mark.parametrize("strong", [1, 3])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith((
    "apgd", "autoattack", "fab", "square", "strongest_quick", "worst_case"))])
def test_fooled_images_that_wait_long_to_leave_change_nothing(name, strong, world, monkeypatch):
    """Neither their own results nor those of other images: they leave after 24 steps here."""
    unasked(name, strong, world, monkeypatch, [
        (f"utils.attack.{module}.due", lambda t, x: t % 25 == 24)
        for module in ("apgd", "fab", "square")])


@pytest.mark.parametrize("name", ["apgd linf ce", "apgd l2 ce", "square linf", "square l2"])
def test_fooled_images_leave_the_batch_all_the_same(name, world, far):
    model = OneByOne(world[0])
    CASES[name](model, *world[1:], eps=2.0 if "l2" in name else 0.15,
                **{"queries" if "square" in name else "steps": 60})
    assert model.sizes[0] == N and model.sizes[-1] < N


def both(monkeypatch, function, *args):
    """The results with and without asking."""
    for free in (("cpu",), ()):
        monkeypatch.setattr(waits, "FREE", free)
        yield function(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projections_in_a_fixed_number_of_rounds_are_the_same(norm, dtype, monkeypatch):
    """To the last bit, even if some images are already in the ball and others are not."""
    g = torch.Generator().manual_seed(0)
    for x in (pictures(12, dtype), greys(12, dtype)):
        for eps in (0.0, 0.3, 1.0, 3.0):
            spread = torch.logspace(-3, -0.5, 12, dtype=dtype)[torch.randperm(12, generator=g)]
            delta = torch.randn(x.shape, generator=g, dtype=dtype) * balls.column(spread, x)
            assert torch.equal(*both(monkeypatch, balls.project, delta, x, eps, norm))


@pytest.mark.parametrize("heavy", [1, 3])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_if_the_rounds_do_not_suffice_the_projection_still_fills_the_ball(norm, heavy, far):
    """From far away, and from entries of very different sizes."""
    x, g = pictures(12), torch.Generator().manual_seed(0)
    for spread in (5.0, 50.0, 1e3):
        delta = spread * torch.randn(x.shape, generator=g)
        delta = delta.sign() * delta.abs() ** heavy
        whole = torch.where(delta > 0, 1 - x, x)  # as far as the box allows
        for part in (0.01, 0.3, 0.9):
            eps = part * balls.norm_of(whole, norm).min().item()
            found = balls.project(delta, x, eps, norm)
            size = balls.norm_of(found, norm)
            assert 0.999 * eps < size.min() and size.max() <= eps * (1 + 1e-5)
            assert (x + found).min() >= -1e-6 and (x + found).max() <= 1 + 1e-6


# ------------------------------------------------------------------------ what goes wrong

class Breaks(nn.Module):
    """From its fourth call on, logits that are infinite for image 1, or gradients that are NaN."""

    def __init__(self, kind):
        super().__init__()
        self.model, self.kind, self.calls, self.clean = toy(), kind, 0, True

    def forward(self, x):
        self.calls += 1
        self.clean &= bool(x.isfinite().all())
        logits = self.model(x)
        if self.calls < 4:
            return logits
        if self.kind == "logits":
            return logits + torch.tensor([0.0, torch.inf, 0.0])[:len(x), None]
        return logits + (0 * x.flatten(1)).sqrt().sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["logits", "gradient"])
@pytest.mark.parametrize("name", [
    "bim", "mim", "cw_l2", "pgd linf sign exact", "pgd l2 normalized exact", "pgd l1 sparse exact",
    "apgd linf ce", "apgd l2 dlr", "apgd l1 ce", "fab linf", "square linf", "square l2"])
def test_what_breaks_on_the_way_is_refused_with_the_same_line(name, kind, monkeypatch):
    """And no image becomes NaN until then."""
    if kind == "gradient" and not CASES[name].gradients:
        pytest.skip("it takes no gradient")
    said, x = [], greys(3)
    y = predicted(toy(), x)
    small = {"eps": 1e-3} if CASES[name].eps else {}
    small |= {"steps": 12} if "steps" in CASES[name].options else {}
    for free in (("cpu",), ()):
        monkeypatch.setattr(waits, "FREE", free)
        model = Breaks(kind)
        with pytest.raises(UserError, match="not finite|NaN") as error:
            CASES[name](model, x, y, **small)
        said.append(str(error.value))
        assert model.clean and "\n" not in said[-1]
    assert said[0] == said[1]
    assert kind == "logits" or "for 3 of 3" in said[0]


@pytest.mark.parametrize("name", [
    "bim", "cw_l2", "apgd l2 dlr_targeted", "square linf", "worst_case"])
@pytest.mark.parametrize("shift", [K, -K])
def test_labels_are_checked_before_they_are_used_as_indices(name, shift, world, far):
    model, x, y = world
    with pytest.raises(UserError, match="labels go from"):
        CASES[name](model, x, y + shift)


def test_a_single_gradient_is_checked_at_once(world, far):
    """As in the audit and the training attack of train_gcm.py: nothing calls fill()."""
    model, x, y = world
    broken = nn.Sequential(nn.Identity(), model)
    broken[0].register_forward_hook(lambda *parts: parts[2] + ((parts[2] - parts[2]) * x).sqrt())
    with pytest.raises(UserError, match="NaN"):
        core.gradient(broken, x, y, core.cross_entropy, core.Tally(x), slice(None))


# ------------------------------------------------------------------------ what is measured

def test_the_counts_of_a_batch_are_read_back_once(world):
    model, x, y = world
    audit = {"largest": 0.0, "outside": 0}
    one = Attack("", "l2", 1.0, None)
    assert counted(in_ball, x, x.flip(1), one, audit).seen["cpu"] == 1
    logits = model(x)
    assert counted(UapCounts(target=1).add, logits, logits.flip(1), logits, y).seen["cpu"] == 1
