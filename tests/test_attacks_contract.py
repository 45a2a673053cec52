"""The contract of every attack, with every norm, step and projection: where the result lies, what
is left unchanged, what depends on what, what is refused.
"""

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attacks
from attack_toys import (
    K,
    chances,
    flat,
    linear,
    margins,
    pictures,
    predicted,
    random_weight,
    size,
    toy,
)
from utils.attack import several
from utils.defenses import ResizePad
from utils.errors import UserError

EPS = {"linf": 0.04, "l2": 0.5, "l1": 5.0}
ALPHA = {"linf": 0.02, "l2": 0.3, "l1": 3.0}
N = 6


@dataclass
class Case:
    """attack(model, x, y, **options) -> x_adv, within eps in norm, if it has a radius."""
    attack: object
    norm: str = "linf"
    eps: float | None = None
    options: dict = None
    random: bool = False     # the result depends on the generator
    gradients: bool = True

    def __call__(self, model, x, y, **changed):
        x_adv = self.attack(model, x, y, **self.options | changed)
        return x_adv[0] if isinstance(x_adv, tuple) else x_adv


STARTING = (attacks.pgd, attacks.apgd, attacks.square)  # from a random point


def case(attack, norm="linf", **options):
    """A Case with these options, and by default the eps of the norm."""
    named = {"norm": norm} if attack in (*STARTING, attacks.fab) else {}
    start = options.get("random_start", attack in STARTING or "diverse" in options
                        or "restarts" in options)
    options = {"eps": EPS[norm]} | named | options
    return Case(attack, norm, options["eps"], options, random=start,
                gradients=attack is not attacks.square)


def parts(targeted, eps):
    """The attacks that worst_case runs in these tests."""
    same = {"eps": eps, "targeted": targeted}
    return {"pgd": functools.partial(attacks.pgd, alpha=eps / 4, steps=2, **same),
            "apgd": functools.partial(attacks.apgd, steps=4, **same),
            "square": functools.partial(attacks.square, queries=5, **same)}


def worst_case(model, x, y, *, eps, targeted=False, **options):
    return attacks.worst_case(model, x, y, parts(targeted, eps), targeted=targeted, **options)


def autoattack(model, x, y, **options):
    """With fewer steps than its defaults."""
    few = functools.partial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several, "QUERIES", 5)
        patch.setattr(several, "apgd", few(attacks.apgd, steps=3))
        patch.setattr(several, "fab", few(attacks.fab, steps=2))
        return attacks.autoattack(model, x, y, **options)


CASES = {
    "fgsm": case(attacks.fgsm),
    "fgv": Case(attacks.fgv, eps=0.04, options={"alpha": 0.04}),
    "bim": case(attacks.bim, alpha=0.02, steps=4),
    "mim": case(attacks.mim, alpha=0.02, steps=4),
    "mim diverse blur": case(attacks.mim, alpha=0.02, steps=4, diverse=0.5, blur=3),
    "cw_l2": Case(attacks.cw_l2, options={"steps": 40, "binary_steps": 3, "c": 10.0}),
    "worst_case": Case(worst_case, "linf", 0.15, {"eps": 0.15}, random=True),
    "strongest_quick": Case(attacks.strongest_quick, "linf", 0.15, {"eps": 0.15, "queries": 20},
                            random=True),
    "square linf": case(attacks.square, queries=20),
    "square l2": case(attacks.square, "l2", queries=20),
    "square l1": case(attacks.square, "l1", queries=20, eps=20.0),
    "autoattack": Case(autoattack, "linf", 0.15, {"eps": 0.15}, random=True),
    "pgd restarts": case(attacks.pgd, alpha=0.02, steps=3, restarts=3),
    "pgd stop_early": case(attacks.pgd, alpha=0.02, steps=4, stop_early=True),
    "apgd linf restarts": case(attacks.apgd, steps=6, restarts=2),
    "fab restarts": case(attacks.fab, "l1", steps=2, restarts=4, targets=1, eps=20.0),
}
CASES |= {f"fab {norm}": case(attacks.fab, norm, steps=4, targets=K - 1, eps=3 * EPS[norm])
          for norm in EPS}  # no image is nearer than EPS in Linf
CASES |= {f"apgd {norm} {loss}": case(attacks.apgd, norm, steps=8, loss=loss, targets=K - 1)
          for norm in EPS for loss in ("ce", "dlr", "dlr_targeted")}
CASES |= {f"pgd {norm} {step} {projection}": case(
    attacks.pgd, norm, steps=4, step=step, projection=projection,
    alpha=ALPHA[{"sign": "linf", "normalized": "l2"}.get(step, "l1")])
    for norm in EPS for step in ("sign", "normalized", "dense", "sparse")
    for projection in ("exact", "rescale")}
MAIN = ["fgsm", "fgv", "bim", "mim", "cw_l2", "worst_case", "strongest_quick", "square linf",
        "square l2", "fab linf", "pgd linf sign exact", "pgd l1 sparse exact", "apgd linf ce",
        "apgd l2 dlr_targeted"]
every_case = pytest.mark.parametrize("name", CASES)
main_case = pytest.mark.parametrize("name", MAIN)  # one of each kind is enough to test refusals


@pytest.fixture(scope="module")
def world():
    """A model, images and labels; image 2 is misclassified from the start."""
    model, x = toy(), pictures(N)
    y = predicted(model, x)
    y[2] = (y[2] + 1) % K
    return model, x, y


# ------------------------------------------------------------- where the result lies

@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_result_is_in_the_ball_and_in_the_box_and_worse_than_the_clean_image(name, dtype):
    case, model, x = CASES[name], toy(dtype), pictures(N, dtype)
    y = predicted(model, x)
    x_adv = case(model, x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and x_adv.device == x.device
    assert not x_adv.requires_grad and x_adv.grad_fn is None
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    if case.eps is not None:
        slack = 1e-6 if case.norm == "linf" else 1e-5 * case.eps
        for before, after in zip(x, x_adv, strict=True):
            assert size(flat(after) - flat(before), case.norm) <= case.eps + slack
    assert (margins(model, x_adv, y) > margins(model, x, y)).sum() >= N // 2
    assert (margins(model, x_adv, y) - margins(model, x, y)).mean() > 0.05


@every_case
def test_the_result_shares_no_memory_with_the_images(name, world):
    model, x, y = world
    mine = x.clone()
    CASES[name](model, mine, y).fill_(0.5)
    assert torch.equal(mine, x)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.eps])
def test_a_radius_of_zero_gives_the_images_back(name, world):
    zero = {"alpha": 0.0} if name == "fgv" else {"eps": 0.0}
    assert torch.equal(CASES[name](*world, **zero), world[1])


@every_case
def test_any_memory_layout_gives_the_same_images(name, world):
    model, x, y = world
    odd = torch.empty(N, 3, 8, 16)[..., ::2].copy_(x).to(memory_format=torch.channels_last)
    torch.testing.assert_close(CASES[name](toy(torch.float64), odd.double(), y),
                               CASES[name](toy(torch.float64), x.double(), y), rtol=0, atol=1e-6)


# ------------------------------------------------------------------ what is left unchanged

class Fragile(nn.Module):
    """BatchNorm, dropout, frozen and free weights, some with gradients, mixed modes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(),
                                      nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, K))
            self.body(torch.rand(8, 3, 8, 8))  # running statistics that are not 0 and 1
        self.body[0].weight.requires_grad_(False)
        self.body[5].weight.grad = torch.ones_like(self.body[5].weight)
        self.body[5].bias.grad = torch.ones_like(self.body[5].bias)
        self.body[5].bias.requires_grad_(False)
        self.train()
        self.body[2].eval()
        self.fail_at, self.calls = None, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise ZeroDivisionError("the model's own trouble")
        return self.body(x)


def state(model, x, y):
    """Everything that an attack could change, in comparable form."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {
        "weights": weights, "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone()
                  for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
                  for name, m in model.named_modules()},
        "images": x.detach().clone(), "labels": y.clone(), "image flag": x.requires_grad,
        "image grad": x.grad, "grad mode": torch.is_grad_enabled(),
        "torch": torch.get_rng_state(), "numpy": np.random.get_state()[1:],  # noqa: NPY002
        "python": random.getstate()}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, tuple):
        return all(np.array_equal(u, v) for u, v in zip(a, b, strict=True))
    return a == b


def changed(before, after):
    return [name for name in before if not same(before[name], after[name])]


@every_case
def test_model_images_labels_and_the_global_rng_are_left_unchanged(name):
    model, x = Fragile(), pictures(N).requires_grad_(True)
    y = torch.arange(N) % K
    before = state(model, x, y)
    x_adv = CASES[name](model, x, y, targeted=False)
    assert not changed(before, state(model, x, y))
    assert model.calls > 0 and not x_adv.requires_grad


@every_case
def test_an_attack_runs_the_model_in_eval_mode_whatever_its_mode_even_under_no_grad(name, world):
    _, x, y = world
    reference = CASES[name](Fragile().eval(), x, y)
    assert torch.equal(CASES[name](Fragile(), x, y), reference)
    with torch.no_grad():
        assert torch.equal(CASES[name](Fragile(), x, y), reference)
        assert not torch.is_grad_enabled()
    model = Fragile()
    with torch.inference_mode():
        assert torch.equal(CASES[name](model, x.clone(), y.clone()), reference)


def test_the_judge_of_cw_decides_success_and_is_left_unchanged(world):
    model, x, _ = world
    y, options = predicted(model, x), {"steps": 40, "binary_steps": 3, "c": 10.0}
    reference, success = attacks.cw_l2(model, x, y, **options)
    assert success.all()
    torch.testing.assert_close(attacks.cw_l2(model, x, y, judge=model, **options)[0], reference)
    stubborn = linear(torch.zeros(K, 192), 9.0 * torch.eye(K)[y[0]])  # never leaves that class
    x_adv, success = attacks.cw_l2(model, x, y, judge=stubborn, **options)
    assert torch.equal(success, y != y[0]) and torch.equal(x_adv[~success], x[~success])
    judge = Fragile()
    before = state(judge, x, y)
    attacks.cw_l2(model, x, y, judge=judge, **options)
    assert not changed(before, state(judge, x, y))


@main_case
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_model_that_fails_midway_gets_its_modes_and_flags_back(name, call):
    model, x = Fragile(), pictures(N)
    y = torch.arange(N) % K
    before, model.fail_at = state(model, x, y), call
    if call > 1 and name in ("fgsm", "fgv"):
        CASES[name](model, x, y)  # one call is all they make
    else:
        with pytest.raises(ZeroDivisionError):
            CASES[name](model, x, y)
    assert not changed(before, state(model, x, y))


# ------------------------------------------------------------------ what depends on what

@every_case
def test_the_same_seed_gives_the_same_bytes_and_another_seed_different_ones(name, world):
    case = CASES[name]
    one, two, three = (case(*world, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert torch.equal(one, three) != case.random
    random.seed(5), torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    first = case(*world)
    random.seed(6), torch.manual_seed(6)
    np.random.seed(6)  # noqa: NPY002
    assert torch.equal(first, case(*world))


@every_case
def test_an_image_gets_the_same_result_alone_and_in_a_batch(name):
    model, x = toy(torch.float64), pictures(N, torch.float64)
    y = predicted(model, x)
    y[2] = (y[2] + 1) % K
    for own in (chances, lambda n: torch.Generator().manual_seed(9)):
        batch = CASES[name](model, x, y, generator=own(N))
        count = N if own is chances else 1
        for i in range(count):
            alone = CASES[name](model, x[i:i + 1], y[i:i + 1],
                                generator=own(N)[i:i + 1] if own is chances else own(1))
            torch.testing.assert_close(alone, batch[i:i + 1], rtol=0, atol=1e-6)


@every_case
def test_every_call_draws_one_number_from_the_generator(name, world):
    own, other = (torch.Generator().manual_seed(4) for _ in range(2))
    CASES[name](*world, generator=own)
    torch.randint(2 ** 63 - 1, (), generator=other)
    assert torch.equal(own.get_state(), other.get_state())


def test_random_numbers_follow_their_images(world):
    _, x, y = world
    turn = torch.tensor([5, 3, 4, 1, 0, 2])
    for name in ("pgd linf sign exact", "apgd linf ce", "square linf", "worst_case",
                 "strongest_quick"):
        there = CASES[name](toy(torch.float64), x[turn].double(), y[turn],
                            generator=chances(N)[turn])
        here = CASES[name](toy(torch.float64), x.double(), y, generator=chances(N))
        torch.testing.assert_close(there, here[turn], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*MAIN, "pgd restarts", "pgd stop_early", "apgd linf restarts"])
def test_a_random_layer_gives_an_image_the_same_draws_alone_and_in_a_batch_that_others_leave(name):
    x = pictures(N, torch.float64)
    y = predicted(toy(torch.float64), x)
    y[2] = (y[2] + 1) % K
    defended = attacks.eot(nn.Sequential(ResizePad(6, 8), toy(torch.float64)), 2)
    batch = CASES[name](defended, x, y, generator=chances(N))
    assert not torch.equal(batch, CASES[name](defended, x, y, generator=chances(N, seed=1)))
    for i in range(N):
        alone = CASES[name](defended, x[i:i + 1], y[i:i + 1], generator=chances(N)[i:i + 1])
        torch.testing.assert_close(alone, batch[i:i + 1], rtol=0, atol=1e-6)


@every_case
def test_an_empty_batch_gives_an_empty_batch(name, world):
    model, x, y = world
    report = {}
    assert CASES[name](model, x[:0], y[:0], report=report).shape == (0, 3, 8, 8)


# -------------------------------------------------------------------------- targets

@every_case
def test_a_targeted_attack_moves_the_image_closer_to_the_target_class(name, world):
    model, x, _ = world
    y = predicted(model, x)
    y = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)  # the likeliest other class
    x_adv = CASES[name](model, x, y, targeted=True)
    before, after = margins(model, x, y), margins(model, x_adv, y)
    assert (after < before - 0.01).sum() >= N // 2 and (after - before).mean() < -0.02


@main_case
def test_a_targeted_attack_reaches_its_target_if_the_radius_is_large(name):
    model, x = linear(0.3 * random_weight(K, 192)), pictures(N)
    y = model(x).argmin(1)
    wide = {"linf": 0.3, "l2": 4.0, "l1": 60.0}[CASES[name].norm]
    more = {"eps": wide, "alpha": wide / 4, "steps": 60, "queries": 1000}
    options = {k: v for k, v in more.items() if k in CASES[name].options}
    options |= {"fgv": {"alpha": 0.9}, "cw_l2": {"lr": 0.05, "binary_steps": 5},
                "pgd l1 sparse exact": {"q": 0.3}}.get(name, {})
    assert (predicted(model, CASES[name](model, x, y, targeted=True, **options)) == y).all()


# -------------------------------------------------------------------------- reports

class Counted(nn.Module):
    """Counts the images that go forward through it, and the gradients that come back."""

    def __init__(self, model):
        super().__init__()
        self.model, self.there, self.back = model, 0, 0

    def forward(self, x):
        self.there += len(x)
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda g: setattr(self, "back", self.back + len(g)))
        return self.model(x)


@every_case
def test_the_report_counts_gradients_and_queries_as_the_model_saw_them(name, world):
    if name == "worst_case":
        pytest.skip("its report is that of its parts")
    model, report = Counted(world[0]), {}
    CASES[name](model, *world[1:], report=report)
    assert report["gradients"] == model.back
    if CASES[name].gradients:
        assert report["queries"] == 0 and model.there >= model.back > 0
    else:
        assert report["queries"] == model.there - N  # the clean images are not counted


class Dead(nn.Module):
    """Constant logits, with a path to the pixels, for images darker than 0.2; toy for others."""

    def __init__(self):
        super().__init__()
        self.toy = toy()

    def forward(self, x):
        alive = (x.detach().flatten(1).mean(1) > 0.2).float()[:, None]
        return self.toy(x) * alive + (1 - alive) * torch.eye(K)[0]


@every_case
def test_images_without_a_gradient_are_reported_and_not_moved(name):
    case, x, report = CASES[name], pictures(N), {}
    dark = torch.tensor([True, False, False, True, False, True])
    x[dark] *= 0.1
    y = predicted(Dead(), x)
    x_adv = case(Dead(), x, y, report=report)
    if name == "worst_case":
        assert report["apgd"]["zero_gradient"] == report["pgd"]["zero_gradient"] == 3
    else:
        assert report["zero_gradient"].dtype == torch.bool
        assert torch.equal(report["zero_gradient"], dark & case.gradients)
    assert (predicted(Dead(), x_adv)[dark] == y[dark]).all()
    if name in ("fgsm", "fgv", "bim", "mim", "cw_l2"):
        assert torch.equal(x_adv[dark], x[dark])


class Root(nn.Module):
    """Adds the square root of zero: finite logits, NaN gradient."""

    def forward(self, x):
        return x + ((x - x) * x).sqrt()


@main_case
def test_a_nan_gradient_is_refused_in_one_line_that_names_the_cause(name, world):
    model, x, y = world
    if not CASES[name].gradients:
        pytest.skip("it takes no gradient")
    with pytest.raises(UserError, match=r"(?i)nan") as error:
        CASES[name](nn.Sequential(Root(), model), x, y)
    assert "logits are finite" in str(error.value) and "\n" not in str(error.value)


@main_case
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused_and_never_count_as_fooled(name, value, world):
    model, x, _ = world
    y = predicted(model, x)
    with pytest.raises(UserError, match="finite"):  # finite on x, broken once a pixel differs
        CASES[name](lambda z: model(z) + (z[:, :1, 0, 0] != x[:1, :1, 0, 0]) * value, x[:1], y[:1])
    with pytest.raises(UserError, match="finite"):
        CASES[name](lambda z: model(z) * value, x, y)


# ------------------------------------------------------------------------ what is refused

def refused(word, function, *args, **options):
    """UserError of one line that contains the word."""
    with pytest.raises(UserError) as error:
        function(*args, **options)
    said = str(error.value)
    assert said and "\n" not in said and word in said, said


@main_case
@pytest.mark.parametrize(("word", "spoil"), [
    ("uint8", lambda x, y: ((x * 255).to(torch.uint8), y)),
    ("[0, 1]", lambda x, y: (x * 255, y)),
    ("[0, 1]", lambda x, y: (x - 0.01, y)),
    ("NaN", lambda x, y: (x.masked_fill(x == 1, torch.nan), y)),
    ("shape", lambda x, y: (x, y[:-1])),
    ("shape", lambda x, y: (x, y[:, None])),
    ("int64", lambda x, y: (x, y.float())),
    ("int64", lambda x, y: (x, y.int())),
    ("classes", lambda x, y: (x, y + K)),
    ("classes", lambda x, y: (x, y - K))],
    ids=["uint8", "255", "below 0", "nan", "too few labels", "column of labels", "float labels",
         "int32 labels", "label too large", "label negative"])
def test_bad_images_and_labels_are_refused_in_one_line(name, word, spoil, world):
    model, x, y = world
    refused(word, CASES[name], model, *spoil(x, y))


@pytest.mark.parametrize("name", ["fgsm", "square linf"])
def test_the_advice_to_divide_by_255_is_given_for_integer_images_only(name, world):
    model, x, y = world
    for dtype, advice in ((torch.uint8, " / 255"), (torch.float16, ""), (torch.bfloat16, "")):
        with pytest.raises(UserError) as error:
            CASES[name](model, x.to(dtype), y)
        assert str(error.value).endswith(f"type x.float(){advice}")


def test_attacks_that_end_with_square_refuse_vectors_before_they_begin(world):
    model, x, y = world
    seen, flat_x = [], x.flatten(1)

    def watched(z):
        seen.append(len(z))
        return model(z.view(-1, 3, 8, 8))
    for attack in (attacks.strongest_quick, attacks.autoattack):
        refused("(N, C, H, W)", attack, watched, flat_x, y, eps=0.1)
    assert not seen
    autoattack(watched, flat_x, y, eps=0.1, version="rand")  # without Square


def test_mim_refuses_what_its_transfer_options_cannot_handle(world):
    model, x, y = world
    for options in ({"blur": 3}, {"diverse": 0.5}):
        refused("(N, C, H, W)", CASES["mim"], lambda z: model(z.view(-1, 3, 8, 8)), x.flatten(1), y,
                **options)
    refused("leave out stop_early", CASES["mim"], model, x, y, diverse=0.5, stop_early=True)
    CASES["mim"](model, x, y, blur=3, stop_early=True)


OPTIONS = [
    ("eps", [-0.1, float("inf"), float("nan"), "inf"], ["fgsm", "bim", "mim", "pgd linf sign exact",
                                                        "apgd linf ce", "square linf",
                                                        "strongest_quick"]),
    ("alpha", [-0.1, float("inf"), "0.1"], ["fgv", "bim", "mim", "pgd linf sign exact"]),
    ("steps", [0, -1, 2.5], ["bim", "mim", "pgd linf sign exact", "apgd linf ce", "cw_l2"]),
    ("restarts", [0, -1], ["pgd linf sign exact", "apgd linf ce", "square linf"]),
    ("queries", [0, 1.5], ["square linf", "strongest_quick"]),
    ("norm", ["l3", "Linf", None], ["pgd linf sign exact", "apgd linf ce", "square linf"]),
    ("loss", ["mse", None], ["fgsm", "fgv", "bim", "mim", "pgd linf sign exact", "apgd linf ce"]),
    ("step", ["big"], ["pgd linf sign exact"]),
    ("projection", ["none"], ["pgd linf sign exact"]),
    ("q", [0.0, -0.5, 1.5], ["pgd l1 sparse exact"]),
    ("mu", [-1.0, float("nan")], ["mim"]),
    ("diverse", [-0.1, 1.5], ["mim"]),
    ("blur", [-1, 2, 2.5, 3.0], ["mim"]),
    ("binary_steps", [0], ["cw_l2"]),
    ("c", [-1.0], ["cw_l2"]),
    ("lr", [-0.01], ["cw_l2"]),
    ("targets", [0], ["apgd l2 dlr_targeted"]),
]


@pytest.mark.parametrize(("name", "option", "value"), [
    (name, option, value) for option, values, names in OPTIONS for name in names
    for value in values])
def test_a_bad_option_is_refused_in_one_line_that_names_it(name, option, value, world):
    refused(option, CASES[name], *world, **{option: value})


@every_case
def test_a_model_of_one_class_is_refused_in_one_line_that_says_what_to_do_with_a_single_logit(
        name, world):
    model, x, y = world
    refused("torch.cat([0 * z, z], 1)", CASES[name], lambda x: model(x)[:, :1], x, y * 0)


@main_case
def test_a_model_that_does_not_return_logits_per_image_is_refused(name, world):
    model, x, y = world
    refused("logits", CASES[name], lambda x: model(x).mean(1), x, y)
    refused("logits", CASES[name], lambda x: model(x)[:1], x, y)


@pytest.mark.parametrize("name", ["pgd linf sign exact", "apgd linf ce", "square linf",
                                  "worst_case", "strongest_quick"])
def test_random_numbers_for_a_different_number_of_images_are_refused(name, world):
    refused("chance[rows]", CASES[name], *world, generator=chances(N - 1))


def test_bpda_and_eot_refuse_what_cannot_work(world):
    model, x, y = world
    shrink = attacks.bpda(nn.AvgPool2d(2))
    refused("backward", attacks.fgsm, nn.Sequential(shrink, model), x, y, eps=0.1)
    for draws in (0, -1, 1.5):
        refused("draws", attacks.eot, model, draws)


def test_a_model_without_a_path_from_logits_to_pixels_is_refused(world):
    """Rounding by a table, argmax, numpy: the message should say bpda."""
    model, x, y = world
    refused("gradient", attacks.fgsm, lambda x: model(x.detach()), x, y, eps=0.1)


def test_none_is_accepted_only_where_the_default_is_none(world):
    model, x, y = world
    found = [attacks.pgd(model, x, y, eps=0.04, steps=2, **more) for more in ({}, {"alpha": None})]
    assert torch.equal(*found)
    for name, run in (("alpha", attacks.fgv), ("eps", attacks.pgd)):
        with pytest.raises(UserError, match=f"{name}=None; wanted a number"):
            run(model, x, y, **{name: None})


def test_a_default_may_be_passed_explicitly(world):
    model, x, y = world
    found = [attacks.fab(model, x, y, steps=2, targets=4, **more)
             for more in ({}, {"eps": math.inf}, {"eps": float("inf")})]
    assert all(torch.equal(one, found[0][0]) for one, _ in found)
    with pytest.raises(UserError, match="eps=inf; wanted a number"):
        attacks.pgd(model, x, y, eps=math.inf)


def test_diverse_inputs_refuse_images_that_are_not_square_in_one_line(world):
    model, x, y = world
    with pytest.raises(UserError, match="images of 6 x 8 pixels; wanted square ones"):
        attacks.mim(lambda x: model(F.pad(x, (0, 0, 0, 2))), x[:, :, :6], y, eps=0.1, alpha=0.1,
                    steps=2, diverse=0.5)
