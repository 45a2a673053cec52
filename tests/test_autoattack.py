"""AutoAttack: its members and settings, the images each gets, its flags, another library."""

import functools

import pytest
import torch
from test_attacks_oracles import digits, library
from torch import nn

import attacks
from attack_toys import K, chances, pictures, predicted, toy
from utils.attack import balls, several
from utils.errors import UserError

EPS = {"linf": 0.02, "l2": 0.3, "l1": 2.0}


@pytest.fixture
def short(monkeypatch):
    """Members with fewer default steps."""
    monkeypatch.setattr(several, "QUERIES", 40)
    for name in ("apgd", "fab"):
        monkeypatch.setattr(several, name, functools.partial(getattr(several, name), steps=6))


def settings(norm, version, classes=10):
    """{name: keyword arguments of the attack}, without eps and norm."""
    parts = several._parts(classes, norm, 0.1, version)
    assert {(part.keywords["eps"], part.keywords["norm"]) for part in parts.values()} == {
        (0.1, norm)}
    return {name: {key: value for key, value in part.keywords.items()
                   if key not in ("eps", "norm") and (key, value) != ("stages", False)}
            for name, part in parts.items()}


# ------------------------------------------------------------------------ members

def test_the_members_have_the_settings_of_the_authors():
    """The defaults are 100 steps and p = 0.8."""
    fab, squares = {"targets": 9}, {"queries": 5000, "rescale": False}
    towards = {"loss": "dlr_targeted", "targets": 9}
    for norm in ("linf", "l2"):
        assert settings(norm, "standard") == {
            "APGD-CE": {"restarts": 1}, "APGD-T": towards, "FAB-T": fab, "Square 5000": squares}
    assert settings("l1", "standard") == {
        "APGD-CE": {"restarts": 5, "stages": True},
        "APGD-T": towards | {"targets": 5, "stages": True}, "FAB-T": fab, "Square 5000": squares}
    assert settings("linf", "plus") == {
        "APGD-CE": {"restarts": 5}, "APGD-DLR": {"loss": "dlr", "restarts": 5},
        "Square 5000": squares, "APGD-T": towards, "FAB-T": fab | {"restarts": 5}}
    assert settings("l2", "rand") == {"APGD-CE": {}, "APGD-DLR": {"loss": "dlr"}}
    assert attacks.autoattack_title(10) == attacks.autoattack_title(1000) == "AutoAttack"
    assert [attacks.autoattack_title(10, draws) for draws in (1, 8, 10, 30)] == [
        f"AutoAttack rand (EOT of {n})" for n in (20, 24, 20, 30)]


def test_the_title_says_what_is_run_on_few_classes():
    assert attacks.autoattack_title(3) == (
        "AutoAttack: APGD-CE + APGD-T (2 targets, margin loss) + FAB-T (2 targets) + Square 5000")
    assert attacks.autoattack_title(2, 10) == "AutoAttack rand (EOT of 20)"
    assert list(settings("linf", "rand", 2)) == ["APGD-CE", "APGD-margin"]
    assert settings("linf", "standard", 2)["FAB-T (1 target)"] == {"targets": 1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("norm", "classes"), [("linf", 2), ("linf", K), ("l2", 3), ("l1", K)])
def test_each_member_gets_the_remaining_images_and_the_report_adds_up(norm, classes, short):
    model, x, report = toy(classes=classes), pictures(12), {}
    y = predicted(model, x)
    y[5] = (y[5] + 1) % classes
    x_adv = attacks.autoattack(model, x, y, eps=EPS[norm], norm=norm, generator=chances(12),
                               report=report)
    wanted, counts, left = in_turn(model, x, y, several._parts(classes, norm, EPS[norm],
                                                               "standard"))
    assert torch.equal(x_adv, wanted) and 0 < len(left) < 11
    assert {name: (report[name]["tried"], report[name]["fooled"]) for name in counts} == counts
    assert (balls.norm_of(x_adv - x, norm) <= EPS[norm] * (1 + 1e-5)).all()
    assert report["gradients"] == sum(report[name].get("gradients", 0) for name in counts)


def in_turn(model, x, y, parts):
    """Run each of {name: attack} on the remaining images. -> the images, {name: (tried, fooled)},
    the indices that remain
    """
    found, counts, left = x.clone(), {}, (predicted(model, x) == y).nonzero()[:, 0]
    for k, (name, attack) in enumerate(parts.items()):
        z = attack(model, x[left], y[left], generator=chances(len(x))[left].fold(k))
        z = z[0] if isinstance(z, tuple) else z
        hit = predicted(model, z) != y[left]
        counts[name], found[left[hit]] = (len(left), int(hit.sum())), z[hit]
        left = left[~hit]
    return found, counts, left


@pytest.mark.parametrize("version", ["plus", "rand"])
def test_plus_and_rand_run_all_their_members_in_their_order(version, short):
    """With twelve classes, of which nine are targets, and the steps of `short`."""
    model, x, report, eps = toy(classes=12), pictures(12), {}, 0.02
    y, restarts = predicted(model, x), {"plus": 5, "rand": 1}[version]
    x_adv = attacks.autoattack(model, x, y, eps=eps, version=version, generator=chances(12),
                               report=report)
    climb = functools.partial(attacks.apgd, eps=eps, steps=6, restarts=restarts)
    parts = {"APGD-CE": climb, "APGD-DLR": functools.partial(climb, loss="dlr")}
    if version == "plus":
        parts |= {
            "Square 40": functools.partial(attacks.square, eps=eps, queries=40, rescale=False),
            "APGD-T": functools.partial(climb, loss="dlr_targeted", targets=9, restarts=1),
            "FAB-T": functools.partial(attacks.fab, eps=eps, steps=6, targets=9, restarts=5)}
    else:
        model = attacks.eot(model, 20)
    wanted, counts, left = in_turn(model, x, y, parts)
    assert [name for name in report if isinstance(report[name], dict)] == list(parts)
    assert {name: (report[name]["tried"], report[name]["fooled"]) for name in parts} == counts
    assert torch.equal(x_adv, wanted) and 0 < len(left) < 12


def test_rand_averages_at_least_twenty_draws_of_a_random_network(short):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy, self.calls = toy(), 0

        def forward(self, x):
            self.calls += 1
            return self.toy(x) + 0.01 * (self.calls % 7)

    model, x = Noisy(), pictures(4)
    for wrapped, draws in ((model, 20), *((attacks.eot(model, own), n) for own, n in (
            (10, 20), (3, 21), (30, 30)))):
        report = {}
        attacks.autoattack(wrapped, x, predicted(model, x), eps=1e-4, version="rand",
                           report=report)
        assert list(report)[:2] == ["APGD-CE", "APGD-DLR"]
        assert report["gradients"] == 2 * 4 * 7 * draws


@pytest.mark.parametrize("bad", [{"norm": "l0"}, {"version": "quick"}])
def test_an_unknown_norm_or_version_is_refused(bad):
    with pytest.raises(UserError, match="wanted one of"):
        attacks.autoattack(toy(), pictures(1), torch.zeros(1, dtype=torch.int64), eps=0.1, **bad)


# ------------------------------------------------------------------------ larger radii in L1

def test_the_first_steps_in_l1_are_taken_in_larger_balls():
    """30 steps within 3 eps, 30 within 2 eps, 40 within eps, each with a start."""
    points = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy = toy()

        def forward(self, x):
            if x.requires_grad:
                points.append(x.detach().clone())
            return self.toy(x)

    model, x = Watched(), pictures(4)
    y, eps = predicted(model, x), 0.05
    x_adv = attacks.apgd(model, x, y, eps=eps, norm="l1", steps=100, stages=True)
    assert (predicted(model, x_adv) == y).all()
    size = torch.stack([balls.norm_of(point - x, "l1") for point in points]) / eps
    assert len(points) == 103
    for part, radius in ((size[:31], 3), (size[31:62], 2), (size[62:], 1)):
        assert (part <= radius * (1 + 1e-5)).all() and (part.amax(0) > 0.95 * radius).all()


def test_an_image_fooled_only_outside_the_radius_does_not_count_as_fooled():
    model, x = toy(), pictures(8)
    y = predicted(model, x)
    x_adv = attacks.apgd(model, x, y, eps=1.0, norm="l1", steps=20, stages=True)
    fooled = predicted(model, x_adv) != y
    assert (balls.norm_of(x_adv - x, "l1") <= 1.0 + 1e-5).all()
    far = attacks.apgd(model, x, y, eps=3.0, norm="l1", steps=20)
    assert fooled.sum() < (predicted(model, far) != y).sum()
    near = attacks.apgd(model, x, y, eps=1.0, norm="l1", steps=20)
    assert fooled.sum() >= (predicted(model, near) != y).sum()
    left, report = ~fooled, {}
    assert (predicted(model, far) != y)[left].any()
    attacks.apgd(model, x[left], y[left], eps=1.0, norm="l1", steps=20, stages=True,
                 generator=chances(8)[left], report=report)
    assert report["gradients"] == 23 * left.sum()  # all steps, even after a larger ball fools them


# ------------------------------------------------------------------------ flags

class Masked(nn.Module):
    """Logits with zero gradient, or whose loss cannot rise, or that vary from call to call."""

    def __init__(self, kind):
        super().__init__()
        self.toy, self.kind, self.calls = toy(), kind, 0

    def forward(self, x):
        self.calls += 1
        if self.kind == "zero":
            return self.toy((x * 8).round() / 8 + 0 * x)
        if self.kind == "flat":  # uphill is where the loss falls
            return self.toy(2 * x.detach() - x)
        return self.toy(x) + 0.01 * self.calls * torch.arange(K)


@pytest.mark.parametrize(("kind", "said"), [
    ("zero", ["zero gradient: 6 of 6 images under APGD-CE"]), ("flat", ["the loss never rose: "]),
    ("random", ["random defence: the logits of 6 images"]), ("none", [])])
def test_a_flag_says_what_looks_wrong(kind, said, short):
    model, x, report = Masked(kind) if kind != "none" else toy(), pictures(6), {}
    y = predicted(model, x)
    attacks.autoattack(model, x, y, eps=0.001, report=report)
    for text in said:
        assert [line for line in report["flags"] if line.startswith(text)], report["flags"]
    assert said or report["flags"] == []
    assert not [line for line in report["flags"] if "\n" in line]


def test_square_is_flagged_above_two_images_in_a_thousand():
    found = {"APGD-CE": {"tried": 1000, "fooled": 500, "zero_gradient": 0},
             "Square 5000": {"tried": 500, "fooled": 2, "zero_gradient": 0}}
    assert several.flags_of(found, 0, 1000) == []
    found["Square 5000"]["fooled"] = 3
    assert several.flags_of(found, 0, 1000) == [
        "Square fooled 3 of 500 images that gradients had left: they may be masked"]
    found["Square 5000"]["tried"] = 1000  # gradients fooled none
    assert several.flags_of(found, 0, 1000) == [
        "Square fooled 3 of 1000 images that gradients had left: they may be masked"]


# ------------------------------------------------------------------------ another library

@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l1", 11.0)])
def test_as_many_images_are_robust_as_under_pyautoattack(norm, eps, monkeypatch):
    """10 steps and 50 queries on either side; one of 16 images may differ.
    benchmarks/autoattack.py compares them in full."""
    AutoAttack = library("pyautoattack.autoattack").AutoAttack
    model, x, y = digits(16)
    theirs = AutoAttack(model, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=eps, seed=0)
    for part in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        part.n_iter = part.n_iter_orig = 10
    theirs.square.n_queries = 49
    with torch.random.fork_rng():
        x_theirs, _ = theirs.run_standard_evaluation(x, y)
    monkeypatch.setattr(several, "QUERIES", 50)
    for name in ("apgd", "fab"):
        monkeypatch.setattr(several, name, functools.partial(getattr(several, name), steps=10))
    x_adv = attacks.autoattack(model, x, y, eps=eps, norm=norm)
    ours, other = ((predicted(model, z) == y).sum() for z in (x_adv, x_theirs))
    assert 3 <= other <= 13
    assert abs(ours - other) <= 1
