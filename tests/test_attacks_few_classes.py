"""Attacks on networks with two and three classes: where the loss or the number of targets is
reduced to fit, one line says so, and a naive attack maximizes the same loss.
"""

import warnings
from functools import partial

import pytest
import torch
from test_attacks_contract import CASES

import attacks
from attack_toys import (
    best_linear,
    chances,
    flat,
    linear,
    margins,
    naive_pgd,
    pictures,
    predicted,
    random_weight,
    size,
    toy,
)
from utils.attack.core import ascend, dlr_towards

QUIET = pytest.mark.filterwarnings("ignore:.*(DLR|targets).*:UserWarning")
N = 6


def other_of(classes):
    """A network, images, its predictions as labels, and the likeliest other classes."""
    model, x = toy(torch.float64, 2, classes), pictures(N, torch.float64, 3)
    y = predicted(model, x)
    return model, x, y, model(x).scatter(1, y[:, None], -torch.inf).argmax(1)


def said(recwarn):
    """The distinct warning messages."""
    return {str(warning.message) for warning in recwarn}


@QUIET
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_attack_moves_away_from_the_label_or_towards_the_target(name, classes):
    model, x, y, other = other_of(classes)
    away, there = (CASES[name](model, x, *goal, generator=chances(N), **more)
                   for goal, more in (((y,), {}), ((other,), {"targeted": True})))
    for x_adv, gained in ((away, margins(model, away, y) - margins(model, x, y)),
                          (there, margins(model, x, other) - margins(model, there, other))):
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert gained.min() >= 0 and gained.mean() > 0.02
        assert (gained > 0.01).sum() >= N // 2
        if CASES[name].eps is not None:
            for delta in x_adv - x:
                assert size(delta, CASES[name].norm) <= CASES[name].eps * (1 + 1e-9)


@QUIET
@pytest.mark.parametrize("name", CASES)
def test_with_two_classes_leaving_one_means_reaching_the_other(name):
    """Both move to the same images: every loss is the margin, or rises with it."""
    model, x, y, other = other_of(2)
    assert torch.equal(other, 1 - y)
    away = CASES[name](model, x, y, generator=chances(N))
    there = CASES[name](model, x, other, targeted=True, generator=chances(N))
    torch.testing.assert_close(away, there, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------ naive oracles

@QUIET
@pytest.mark.parametrize(("classes", "targeted", "climbed"), [
    (2, False, "margin"), (2, True, "margin"), (3, False, "dlr"), (3, True, "margin")])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_on_dlr_equals_naive_pgd_on_the_loss_used_instead(classes, targeted, climbed, norm):
    model, x, y, other = other_of(classes)
    same = {"eps": 0.1 if norm == "linf" else 0.5, "alpha": 0.03 if norm == "linf" else 0.15,
            "steps": 5, "norm": norm, "targeted": targeted}
    goal, step = other if targeted else y, "sign" if norm == "linf" else "normalized"
    ours = attacks.pgd(model, x, goal, loss="dlr", random_start=False, **same)
    naive = naive_pgd(model, x, goal, loss=climbed, step=step, **same)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-8)


def reach(model, image, label, norm, eps):
    """The largest margin over the label within this radius."""
    weight, bias = model[1].weight.double().numpy(), model[1].bias.double().numpy()
    pixels, best = flat(image), -float("inf")
    for j in range(len(weight)):
        if j != label:
            w = weight[j] - weight[label]
            best = max(best, w @ (pixels + best_linear(w, pixels, eps, norm))
                       + bias[j] - bias[label])
    return best


BORDER = {f"apgd {loss}": partial(attacks.apgd, loss=loss, steps=50)
          for loss in ("ce", "dlr", "dlr_targeted", "margin", "margin_targeted")}
BORDER |= {f"pgd {loss}": partial(attacks.pgd, loss=loss, steps=40) for loss in ("margin", "dlr")}
BORDER |= {"strongest_quick": partial(attacks.strongest_quick, queries=20)}


@QUIET
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", BORDER)
def test_attacks_on_a_linear_model_fool_exactly_where_the_closed_form_says_so(name, classes):
    """Just inside and just outside the radius at which the nearest class can be reached."""
    model, x = linear(0.3 * random_weight(classes, 192, 4)), pictures(4)
    y = predicted(model, x)
    for i, label in enumerate(y.tolist()):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if reach(model, x[i], label, "linf", middle) > 0 else (
                middle, high)
        for share, fooled in ((0.99, False), (1.03, True)):
            eps = share * high
            more = {"alpha": eps / 5} if name.startswith("pgd") else {}
            x_adv = BORDER[name](model, x[i:i + 1], y[i:i + 1], eps=eps, **more)
            assert (predicted(model, x_adv).item() != label) == fooled, (i, share)


# ---------------------------------------------------------------------- one line says so

@pytest.mark.parametrize(("loss", "targeted", "classes", "line"), [
    ("dlr", False, 2, "DLR needs 3 classes and the model has 2: the margin loss takes its place"),
    ("dlr", True, 3,
     "targeted DLR needs 4 classes and the model has 3: the margin loss takes its place"),
    ("dlr", False, 3, None), ("dlr", True, 4, None)])
def test_a_warning_says_when_the_margin_loss_replaces_dlr(loss, targeted, classes, line, recwarn):
    for logits in (torch.randn(3, classes), 5 * torch.randn(3, classes)):
        value = ascend(loss, targeted)(logits, torch.tensor([0, 1, 0]))
        assert (value == ascend("margin", targeted)(logits, torch.tensor([0, 1, 0]))).all() == (
            line is not None)
    assert said(recwarn) == ({line} if line else set())


def test_a_warning_says_when_there_are_fewer_wrong_classes_than_targets(recwarn):
    for classes, targets in ((2, 1), (3, 2), (5, 4)):
        model, x, y, _ = other_of(classes)
        run = partial(attacks.apgd, model, x, y, eps=1e-6, steps=2, loss="margin_targeted")
        report, capped = {}, {}
        x_adv = run(targets=targets, report=report)
        assert said(recwarn) == set()
        assert torch.equal(run(targets=targets + 3, report=capped), x_adv)
        assert said(recwarn) == {f"targets={targets + 3}, but the model has {classes} classes, "
                                 f"{targets} of them wrong: {targets} will be targets"}
        assert report["gradients"] == capped["gradients"] == N * targets * 3  # steps and a start
        recwarn.clear()


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_the_strongest_attack_needs_no_warning_because_its_title_says_what_runs(classes):
    model, x, y, other = other_of(classes)
    for goal, targeted in ((y, False), (other, True)):
        report = {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attacks.strongest_quick(model, x, goal, eps=0.01, queries=3, targeted=targeted,
                              report=report)
        assert " + ".join(list(report)[:3]) == attacks.quick_title(classes, 3)


@QUIET
def test_targeted_dlr_of_three_classes_is_the_target_logit_minus_the_label_logit():
    logits = torch.tensor([[1.0, 4.0, 2.5], [0.0, -1.0, 7.0]])
    value = dlr_towards(torch.tensor([2, 0]))(logits, torch.tensor([1, 2]))
    assert value.tolist() == [-1.5, -7.0]
