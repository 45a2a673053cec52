"""Cells of attacks by hand-counted examples; the audit's figures and thresholds."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import robustness
from attack_toys import pictures, toy
from robustness import Attack, catalogue, figures, radii, run_cell, worst_case
from utils import audit
from utils.data import open_images
from utils.defenses import GradientConcealment

CPU = torch.device("cpu")


class Scripted(nn.Module):
    """Says the class written in an image's first pixel, times 255."""

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long() % 4, 4).float()


class Coin(nn.Module):
    """Right at every second look, from the second on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        wrong = Scripted()(x).roll(1, 1)
        return wrong if self.calls % 2 else Scripted()(x)


class Listed:
    """Images in memory whose first pixel is the class that Scripted says."""

    def __init__(self, says, labels):
        self.pixels = torch.zeros((len(says), 1, 2, 2), dtype=torch.uint8)
        self.pixels[:, 0, 0, 0] = torch.tensor(says, dtype=torch.uint8)
        self.labels = torch.tensor(labels)

    def __len__(self):
        return len(self.labels)


def cell(attack, images, model=None, draws=1, batch_size=2, seen=None):
    model = model or Scripted()
    before = robustness.looks_at(model, images, draws=draws, batch_size=batch_size, device=CPU)
    return run_cell(attack, seen or model, model, images, before, draws=draws, device=CPU,
                    batch_size=batch_size, generator=torch.Generator(), desc="")


def moving(by, norm="linf", eps=0.5, seen=None):
    """Moves the first pixel of the images with an odd label by by/255, and notes what it got."""
    def run(model, x, y, *, generator, report):
        if seen is not None:
            seen.append(y.tolist())
        x_adv = x.clone()
        x_adv[:, 0, 0, 0] += torch.where(y % 2 == 1, by / 255, 0.0)
        report.update(zero_gradient=y == 2, gradients=3 * len(x), queries=len(x))
        return x_adv
    return Attack("moving", norm, eps, run)


# ----------------------------------------------------------------------- cells

def test_attack_robustness_by_hand():
    """7 images, 5 right (labels 0 1 2 3 1), of which the odd ones are fooled: 2 of 5 are left."""
    tried = []
    found = cell(moving(1, seen=tried), Listed([0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 3, 1, 0]))
    assert found["before"] == "1 1 1 1 0 1 0" and found["after"] == "1 0 1 0 0 0 0"
    assert tried == [[0, 1], [2, 3], [1]]  # only the right ones are attacked
    shares = figures(found)
    assert [(s["k"], s["n"]) for s in shares.values()] == [(5, 7), (2, 7), (2, 5)]
    assert shares["attack_robustness"]["value"] == 2 / 5
    assert all(type(s["k"]) is int for s in shares.values())
    assert (found["zero_gradient"], found["gradients"], found["queries"]) == (1, 15, 5)
    assert found["outside"] == 0 and found["largest"] == pytest.approx(1 / 255)


def test_of_a_random_network_the_figures_are_means_over_looks():
    """b = 4/4, 2/4, 0/4, a = 1/4, 2/4, 0: (1 * 1/4 + 1/2 * 1/2) / (1 + 1/2) = 1/3."""
    shares = figures({"n": 3, "draws": 4, "before": "4 2 0", "after": "1 2 0"})
    assert shares["clean_acc"]["value"] == pytest.approx(1.5 / 3)
    assert shares["adv_acc"]["value"] == pytest.approx(0.75 / 3)
    assert shares["attack_robustness"]["value"] == pytest.approx(1 / 3)
    assert shares["attack_robustness"]["n"] == 1.5
    low, high = shares["attack_robustness"]["low"], shares["attack_robustness"]["high"]
    assert 0 <= low < 1 / 3 < high <= 1


def test_every_look_is_counted():
    found = cell(moving(0), Listed([0, 1, 2, 3], [0, 1, 2, 3]), model=Coin(), draws=4, batch_size=4)
    assert found["before"] == found["after"] == "2 2 2 2"


@pytest.mark.parametrize(("broken", "allowed"), [
    (lambda x: x + 0.6, False), (lambda x: x - 0.01, False), (lambda x: x * math.nan, False),
    (lambda x: x + 51 / 255, True)])
def test_an_image_outside_the_ball_or_the_box_counts_as_not_attacked(broken, allowed):
    attack = Attack("broken", "linf", 0.5, lambda model, x, y, generator, report: broken(x))
    found = cell(attack, Listed([0, 1], [0, 1]))
    assert found["outside"] == (0 if allowed else 2)
    assert found["after"] == ("0 0" if allowed else "1 1")  # 51 more is another class


def test_the_worst_case_is_the_worst_of_each_image_not_of_the_averages():
    one = {"n": 4, "draws": 2, "before": "2 2 2 0", "seconds": 1.0}
    worst = worst_case([one | {"after": "2 0 1 0"}, one | {"after": "0 2 2 0"}])
    assert worst["after"] == "0 0 1 0" and worst["seconds"] == 2.0
    assert figures(worst)["attack_robustness"]["value"] == pytest.approx(1 / 6)


# ----------------------------------------------------------------- the attacks

def test_radii_are_robustarts_on_photographs_whatever_their_size_and_smaller_on_digits(
        tmp_path, picture):
    picture(tmp_path / "val" / "n01440764" / "a.jpg")
    photos = open_images(str(tmp_path / "val"), split="test")
    for size in (224, 380):
        assert radii(photos, size) == {"linf": 8 / 255, "l2": 8.0, "l1": 1600.0}
    assert radii(photos, 224, linf=4 / 255)["l2"] == pytest.approx(4)
    assert radii(photos, 224, l2=0.5, l1=3.0) == {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}
    small = radii(open_images("digits", split="test"), 28)
    part = 28 * 28 / (3 * 224 * 224)
    assert small["linf"] == 0.2
    assert small["l2"] == pytest.approx(51 * part ** 0.5)
    assert small["l1"] == pytest.approx(51000 * 0.2 * part)


def test_the_pgds_take_robustarts_twenty_steps_of_three_fortieths_of_eps():
    found = catalogue({"linf": 8 / 255, "l2": 8.0, "l1": 1600.0}, 100)
    for name, alpha in (("pgd_linf", 0.6 / 255), ("pgd_l2", 0.6), ("pgd_l1", 120.0),
                        ("cw_pgd_l2", 0.6)):
        settings = found[name].run.keywords
        assert settings["steps"] == 20 and settings["alpha"] == pytest.approx(alpha)
        assert settings["projection"] == "rescale" and not settings["stop_early"]
    assert found["pgd_l1"].run.keywords["step"] == "dense"
    assert found["cw_pgd_l2"].run.keywords["loss"] == "margin"
    assert [found[k].title for k in ("fgsm", "pgd_l1", "pgd_l2", "pgd_linf", "cw_pgd_l2")] == [
        "FGSM Linf 8/255", "PGD L1=1600", "PGD L2=8", "PGD Linf=8/255", "C&W L2=8"]


def test_images_never_leave_early_where_the_network_is_random():
    for stop_early in (False, True):
        for random in (False, True):
            found = catalogue({"linf": 0.1, "l2": 1.0, "l1": 1.0}, 1, stop_early, random)
            assert found["pgd_l2"].run.keywords["stop_early"] == (stop_early and not random)
            assert found["pgd_linf x8"].run.keywords["stop_early"] == (not random)
    assert catalogue({"linf": 0.3, "l2": 1.0, "l1": 1.0}, 1)["pgd_linf x8"].eps == 1.0


def test_every_attack_of_the_catalogue_stays_in_its_ball():
    model, x = toy(), pictures(6, shape=(3, 8, 8))
    with torch.no_grad():
        y = model(x).argmax(1)
    for name, attack in catalogue({"linf": 0.03, "l2": 0.3, "l1": 2.0}, 20).items():
        x_adv = attack.run(model, x, y, generator=torch.Generator().manual_seed(0), report={})
        counted = {"largest": 0.0, "outside": 0}
        assert robustness.in_ball(x, x_adv, attack, counted).all(), name
        assert counted["largest"] > 0, name


def test_the_search_of_cw_counts_only_within_the_radius():
    model, x = toy(), pictures(6)
    with torch.no_grad():
        y = model(x).argmax(1)
    runs = {eps: robustness.cw_within(model, x, y, eps=eps, generator=None, report={})
            for eps in (100.0, 1e-4)}
    assert (runs[100.0] != x).flatten(1).any(1).sum() > 3
    assert torch.equal(runs[1e-4], x)


# ------------------------------------------------------------------- the audit

def test_a_trace_is_taken_apart_by_steps_and_batches():
    trace, logits = audit.Trace(), torch.zeros(2, 4)
    for step in range(3):  # two images, then one, three steps each
        logits[:, 0] = float(step)
        trace(logits, torch.tensor([0, 1]))
    for _ in range(3):
        trace(torch.zeros(1, 4), torch.tensor([2]))
    found = trace.losses(3)
    assert found.shape == (3, 3)
    rows = [[math.log(math.exp(s) + 3) - s, math.log(math.exp(s) + 3), math.log(4)]
            for s in range(3)]
    assert torch.allclose(found, torch.tensor(rows))


@pytest.mark.parametrize(("path", "value"), [
    ([0, 1, 2, 5], 1), ([5, 2, 1, 0], -1), ([0, 2, 1, 3], 0.6), ([1, 1, 1, 1], 0),
    ([0, 1, 0, 0], 0)])
def test_ascent_is_the_net_rise_over_the_ups_and_downs(path, value):
    losses = torch.tensor(path, dtype=torch.float32)[:, None]
    assert audit.ascent(losses) == pytest.approx(value)
    both = torch.cat([losses, torch.tensor([[0.0], [1], [2], [3]])], 1)
    assert audit.ascent(both) == pytest.approx((value + 1) / 2)


class Grid:
    """Images of every grey level in memory, as compare() takes them."""
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5

    def __len__(self):
        return 6


def test_a_model_agrees_with_itself_and_its_negative_with_nothing():
    model = toy()
    same = audit.compare(model, model, Grid(), 4, CPU)
    assert same == {"changed": 0, "logits": 0, "agree": 1, "factor": 1}
    double = audit.compare(nn.Sequential(Twice(), model), model, Grid(), 4, CPU)
    assert double["agree"] == 1 and double["factor"] == pytest.approx(2, rel=1e-5)
    assert double["changed"] == 0
    turned = audit.compare(nn.Sequential(Twice(-1), model), model, Grid(), 4, CPU)
    assert turned["agree"] == 0


class Twice(nn.Module):
    """The identity whose gradient is multiplied."""

    def __init__(self, by=2):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x.detach() + self.by * (x - x.detach())


def test_concealed_gradients_are_long_and_point_anywhere():
    model = toy()
    found = audit.compare(nn.Sequential(GradientConcealment(), model), model, Grid(), 4, CPU)
    assert found["factor"] > 1e10 and 0.35 < found["agree"] < 0.65
    assert found["changed"] == 0 and found["logits"] < 1e-4


SOUND = {"ar": {"fgsm": 0.30, "pgd": 0.10, "square": 0.20, "transfer": 0.30, "adaptive": 0.10},
         "radii": {"8/255": 0.10, "64/255": 0.0}, "blind": 0.0, "queries": 10,
         "losses": {"mean": [0.1, 5.0], "ascent": 0.9},
         "twin": {"changed": 0.0, "logits": 0.0, "agree": 1.0, "factor": 1.0}}
EDGES = {  # sign: (what is just allowed, what is just not)
    "one step beats many": ({"ar": {"fgsm": 0.06}}, {"ar": {"fgsm": 0.04}}),
    "no gradient beats the gradient": ({"ar": {"square": 0.06}}, {"ar": {"square": 0.04}}),
    "transfer beats white-box": ({"ar": {"transfer": 0.06}}, {"ar": {"transfer": 0.04}}),
    "who knows the defence gains": ({"ar": {"adaptive": 0.06}}, {"ar": {"adaptive": 0.04}}),
    "a larger radius does not help": ({"radii": {"64/255": 0.05}}, {"radii": {"64/255": 0.06}}),
    "the loss does not rise": ({"losses": {"ascent": 0.5}}, {"losses": {"ascent": 0.49}}),
    "no gradient at all": ({"blind": 0.05}, {"blind": 0.06}),
    "gradients point elsewhere": ({"twin": {"agree": 0.75}}, {"twin": {"agree": 0.74}}),
    "gradients of another length": ({"twin": {"factor": 10.0}}, {"twin": {"factor": 0.09}}),
}


def lines_of(changed):
    given = {key: value | changed[key] if isinstance(value, dict) and key in changed else
             changed.get(key, value) for key, value in SOUND.items()}
    return audit.checklist(given.pop("ar"), **given)


def test_a_sound_network_has_no_sign_and_is_told_so():
    lines = lines_of({})
    assert {line["sign"] for line in lines} == set(EDGES)
    assert not any(line["flagged"] for line in lines)
    assert audit.verdict(lines) == "no sign of gradient masking"


@pytest.mark.parametrize("sign", EDGES)
def test_every_sign_is_flagged_beyond_its_threshold_and_not_at_it(sign):
    allowed, beyond = EDGES[sign]
    assert not any(line["flagged"] for line in lines_of(allowed))
    lines = lines_of(beyond)
    assert [line["sign"] for line in lines if line["flagged"]] == [sign]
    assert audit.verdict(lines) == "one sign of gradient masking: look closer"


def test_two_signs_are_gradient_masking():
    lines = lines_of({"blind": 1.0, "losses": {"ascent": 0.0}})
    assert audit.verdict(lines) == "gradient masking"


def test_directions_are_no_sign_where_the_forward_pass_is_another():
    line, = [line for line in lines_of({"twin": {"agree": 0.5, "changed": 0.02}})
             if line["sign"] == "gradients point elsewhere"]
    assert line["flagged"] is None


def test_an_undefended_network_has_no_twin_to_be_compared_with():
    ar = {key: SOUND["ar"][key] for key in ("fgsm", "pgd", "square")}
    lines = audit.checklist(ar, **{key: SOUND[key] for key in (
        "radii", "blind", "queries", "losses")}, twin=None)
    assert len(lines) == 5 and audit.verdict(lines) == "no sign of gradient masking"


def test_a_trace_climbs_what_it_remembers():
    model, x, trace = toy(), pictures(5), audit.Trace()
    with torch.no_grad():
        y = model(x).argmax(1)
    run = partial(robustness.pgd, model, x, y, eps=0.05, alpha=0.01, steps=4)
    assert torch.equal(run(loss=trace), run(loss="ce"))
    assert trace.losses(4).shape == (4, 5)
    assert audit.ascent(trace.losses(4)) > 0.9
