"""Cells counted by hand; RobustART's attacks; figures and thresholds of the audit."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attack_toys import K, chances, pictures, predicted, toy
from attacks import pgd
from gcm import Cell, cw_within, measure_cell, radii, robustart_attacks
from utils import audit
from utils.attack.random_layers import chance_for
from utils.data import open_images
from utils.defended import Network
from utils.defenses import GradientConcealment, ResizePad, adaptive
from utils.measure import Attack, count_right_on, figures, in_ball, run_cell, worst_of

CPU = torch.device("cpu")


class Scripted(nn.Module):
    """Predicts the class given by the first pixel times 255."""

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long() % 4, 4).float()


class Coin(nn.Module):
    """Right in every second forward pass, from the second on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        wrong = Scripted()(x).roll(1, 1)
        return wrong if self.calls % 2 else Scripted()(x)


class Listed:
    """Images in memory whose first pixel is the class that Scripted predicts."""

    def __init__(self, classes, labels):
        self.pixels = torch.zeros((len(classes), 1, 2, 2), dtype=torch.uint8)
        self.pixels[:, 0, 0, 0] = torch.tensor(classes, dtype=torch.uint8)
        self.labels = torch.tensor(labels)

    def __len__(self):
        return len(self.labels)


def cell(attack, images, model=None, draws=1, batch_size=2, seen=None):
    model = model or Scripted()
    same = {"draws": draws, "batch_size": batch_size, "chance": chances(len(images)), "device": CPU}
    before = count_right_on(model, images, **same)
    return run_cell(attack, seen or model, model, images, before, **same, desc="")


def moving(by, norm="linf", eps=0.5, seen=None):
    """Adds by/255 to the first pixel of images with an odd label, and notes the labels it got."""
    def run(model, x, y, *, generator, report):
        if seen is not None:
            seen.append(y.tolist())
        x_adv = x.clone()
        x_adv[:, 0, 0, 0] += torch.where(y % 2 == 1, by / 255, 0.0)
        report.update(zero_gradient=y == 2, gradients=3 * len(x), queries=len(x))
        return x_adv
    return Attack("moving", norm, eps, run)


# ----------------------------------------------------------------------- cells

@pytest.mark.parametrize("name", ["pgd_linf", "strongest_quick"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_cell_depends_neither_on_the_batch_size_nor_on_the_other_images(name, size):
    """Behind a random defence, under an attack that averages and that fooled images leave."""
    model = nn.Sequential(ResizePad(5, 8), toy())

    def found(images, chance, batch_size):
        same = {"draws": 3, "batch_size": batch_size, "chance": chance, "device": CPU}
        before = count_right_on(model, images, **same)
        attack = robustart_attacks({"linf": 0.03, "l2": 1.0, "l1": 1.0}, 20, K)[name]
        return run_cell(attack, adaptive(model, 2), model, images, before, **same, desc="")
    images = Grid()
    images.labels = predicted(model[1], images.pixels / 255)
    whole, parts = found(images, chances(6), 6), found(images, chances(6), size)
    assert parts["before"] == whole["before"] and parts["after"] == whole["after"]
    assert {1, 2} & set(whole["before"] + whole["after"])
    last = Listed([0] * 3, [0] * 3)
    last.pixels, last.labels = images.pixels[3:], images.labels[3:]
    some = found(last, chances(6)[3:], 2)
    assert [some[key] for key in ("before", "after")] == [whole[key][3:]
                                                          for key in ("before", "after")]


def test_draws_before_and_after_an_attack_are_independent():
    seen = []

    class Note(nn.Module):
        def forward(self, x):
            seen.append(chance_for(x, None).words(1)[:, 0])
            return Scripted()(x)

    def run(model, x, y, *, generator, report):
        seen.append(generator.words(1)[:, 0])
        return x
    cell(Attack("", "linf", 1.0, run), Listed([0, 1, 2], [0, 1, 2]), Note(), draws=2)
    assert len(set(torch.cat(seen).tolist())) == 3 * (2 + 1 + 2)


def test_attack_robustness_equals_that_counted_by_hand():
    """7 images, 5 right (labels 0 1 2 3 1), of which the odd ones are fooled: 2 of 5 stay right."""
    tried = []
    found = cell(moving(1, seen=tried), Listed([0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 3, 1, 0]))
    assert found["before"] == [1, 1, 1, 1, 0, 1, 0] and found["after"] == [1, 0, 1, 0, 0, 0, 0]
    assert tried == [[0, 1], [2, 3], [1]]  # only the right ones are attacked
    shares = figures(found)
    assert {name: (s["k"], s["n"]) for name, s in shares.items()} == {
        "clean_acc": (5, 7), "robust_acc": (2, 7), "attack_robustness": (2, 5)}
    assert shares["attack_robustness"]["value"] == 2 / 5
    assert all(type(s["k"]) is int for s in shares.values())
    assert (found["zero_gradient"], found["gradients"], found["queries"]) == (1, 15, 5)
    assert found["outside"] == 0 and found["largest"] == pytest.approx(1 / 255)


def test_figures_of_a_random_network_are_means_over_its_draws():
    """b = 4/4, 2/4, 0/4, a = 1/4, 2/4, 0: sum of a b 1 * 1/4 + 1/2 * 1/2, sum of b 1 + 1/2."""
    shares = figures({"n": 3, "draws": 4, "before": [4, 2, 0], "after": [1, 2, 0]})
    assert shares["clean_acc"]["value"] == pytest.approx(1.5 / 3)
    assert shares["robust_acc"]["value"] == pytest.approx(0.5 / 3)
    assert shares["attack_robustness"]["value"] == pytest.approx(1 / 3)
    assert shares["attack_robustness"]["n"] == 1.5
    low, high = shares["attack_robustness"]["low"], shares["attack_robustness"]["high"]
    assert 0 <= low < 1 / 3 < high <= 1


def test_draws_that_an_attack_corrects_do_not_count_as_robust():
    """Right in one of four draws before, in all four after: robust_acc is at most clean_acc."""
    shares = figures({"n": 2, "draws": 4, "before": [1, 4], "after": [4, 4]})
    assert [shares[name]["value"] for name in ("clean_acc", "robust_acc", "attack_robustness")] == [
        0.625, 0.625, 1.0]


def test_every_draw_is_counted():
    found = cell(moving(0), Listed([0, 1, 2, 3], [0, 1, 2, 3]), model=Coin(), draws=4, batch_size=4)
    assert found["before"] == found["after"] == [2, 2, 2, 2]


@pytest.mark.parametrize(("broken", "allowed"), [
    (lambda x: x + 0.6, False), (lambda x: x - 0.01, False), (lambda x: x * math.nan, False),
    (lambda x: x + 51 / 255, True)])
def test_an_image_outside_the_ball_or_the_box_counts_as_not_attacked(broken, allowed):
    attack = Attack("broken", "linf", 0.5, lambda model, x, y, generator, report: broken(x))
    found = cell(attack, Listed([0, 1], [0, 1]))
    assert found["outside"] == (0 if allowed else 2)
    assert found["after"] == ([0, 0] if allowed else [1, 1])  # 51 more is another class


def test_the_worst_case_is_taken_image_by_image_and_not_from_the_averages():
    one = {"n": 4, "draws": 2, "before": [2, 2, 2, 0], "seconds": 1.0}
    worst = worst_of([one | {"after": [2, 0, 1, 0]}, one | {"after": [0, 2, 2, 0]}])
    assert worst["after"] == [0, 0, 1, 0] and worst["seconds"] == 2.0
    assert figures(worst)["attack_robustness"]["value"] == pytest.approx(1 / 6)


# ----------------------------------------------------------------- the attacks

def test_radii_equal_those_of_robustart_at_224_pixels_and_scale_per_pixel_at_other_sizes(
        tmp_path, picture):
    picture(tmp_path / "val" / "n01440764" / "a.jpg")
    photos = open_images(str(tmp_path / "val"), split="test")
    assert radii(photos, 224) == {"linf": 8 / 255, "l2": 8.0, "l1": 1600.0}
    for size in (380, 32):  # as much per pixel
        assert radii(photos, size) == pytest.approx(
            {"linf": 8 / 255, "l2": 8 * size / 224, "l1": 1600 * (size / 224) ** 2})
    assert radii(photos, 224, linf=4 / 255)["l2"] == pytest.approx(4)
    assert radii(photos, 224, l2=0.5, l1=3.0) == {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}
    small = radii(open_images("digits", split="test"), 28)
    part = 28 * 28 / (3 * 224 * 224)
    assert small["linf"] == 0.2
    assert small["l2"] == pytest.approx(51 * part ** 0.5)
    assert small["l1"] == pytest.approx(51000 * 0.2 * part)


def test_pgd_takes_robustarts_twenty_steps_of_three_fortieths_of_eps():
    found = robustart_attacks({"linf": 8 / 255, "l2": 8.0, "l1": 1600.0}, 100)
    for name, alpha in (("pgd_linf", 0.6 / 255), ("pgd_l2", 0.6), ("pgd_l1", 120.0),
                        ("cw_pgd_l2", 0.6)):
        settings = found[name].run.keywords
        assert settings["steps"] == 20 and settings["alpha"] == pytest.approx(alpha)
        assert settings["projection"] == "rescale" and not settings["stop_early"]
    assert found["pgd_l1"].run.keywords["step"] == "dense"
    assert found["cw_pgd_l2"].run.keywords["loss"] == "margin"
    assert [found[k].title for k in ("fgsm", "pgd_l1", "pgd_l2", "pgd_linf", "cw_pgd_l2")] == [
        "FGSM Linf 8/255", "PGD L1=1600", "PGD L2=8", "PGD Linf=8/255", "C&W L2=8"]


def test_images_never_leave_pgd_early_behind_a_random_defence():
    for stop_early in (False, True):
        for draws in (0, 1, 3):
            found = robustart_attacks({"linf": 0.1, "l2": 1.0, "l1": 1.0}, 1,
                                      stop_early=stop_early, draws=draws)
            assert found["pgd_l2"].run.keywords["stop_early"] == (stop_early and not draws)
            assert found["pgd_linf x8"].run.keywords["stop_early"] == (not draws)
    assert robustart_attacks({"linf": 0.3, "l2": 1.0, "l1": 1.0}, 1)["pgd_linf x8"].eps == 1.0


def test_all_attacks_of_robustart_stay_in_their_balls():
    model, x = toy(), pictures(6, shape=(3, 8, 8))
    y = predicted(model, x)
    for name, attack in robustart_attacks({"linf": 0.03, "l2": 0.3, "l1": 2.0}, 20).items():
        x_adv = attack.run(model, x, y, generator=torch.Generator().manual_seed(0), report={})
        counted = {"largest": 0.0, "outside": 0}
        assert in_ball(x, x_adv, attack, counted).all(), name
        assert counted["largest"] > 0, name


def test_images_of_cw_count_only_within_the_radius():
    model, x = toy(), pictures(6)
    y = predicted(model, x)
    runs = {eps: cw_within(model, x, y, eps=eps, generator=None, report={})
            for eps in (100.0, 1e-4)}
    assert (runs[100.0] != x).flatten(1).any(1).sum() > 3
    assert torch.equal(runs[1e-4], x)


def test_the_float32_network_judges_the_search_of_cw_if_gradients_are_in_bf16():
    """It would end at the boundary of the bf16 copy, where float32 is often still right."""
    net = toy()
    images = Listed([0] * 32, [0] * 32)
    images.pixels = (pictures(32) * 255).to(torch.uint8)
    images.labels, images.channels, images.kind = predicted(net, images.pixels / 255), 3, "digits"
    robust = []
    for amp in ("off", "bf16"):
        s = SimpleNamespace(amp=amp, seed=0, w=1e20, epsilon=1e-8, low=None, draws=1, queries=1,
                            eps=None, eps_l2=0.6, eps_l1=None, stop_early=False, batch_size=32,
                            workers=0)
        robust.append(sum(measure_cell(Cell("toy", "none", "naive", "cw_l2", s.w),
                                       Network("toy", net, images, 8, s, CPU), s, None)["after"]))
    assert 0 < robust[0] < 28 and robust[1] <= robust[0] + 3


# ------------------------------------------------------------------- the audit

class Grid:
    """Random 8-bit images in memory."""
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5

    def __len__(self):
        return 6


def test_the_losses_of_a_cell_are_the_means_over_its_images_at_every_step():
    """Six images in batches of four and two; each step's loss is that of the images before it."""
    model, x, steps = toy(), Grid.pixels / 255, 4
    settings = {"eps": 0.05, "alpha": 0.01, "random_start": False}
    attack = Attack("", "linf", 0.05, partial(pgd, steps=steps, **settings), follow=True)
    found = run_cell(attack, model, model, Grid(), torch.ones(6, dtype=torch.int64), draws=1,
                     batch_size=4, chance=chances(6), device=CPU, desc="")
    path = [x] + [pgd(model, x, Grid.labels, steps=k, **settings) for k in range(1, steps)]
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(model(z), Grid.labels, reduction="none")
                              for z in path])
    assert found["losses"] == pytest.approx(losses.mean(1).tolist(), rel=1e-5)
    assert found["ascent"] == pytest.approx(audit.ascents(losses).mean().item(), abs=1e-6)
    assert found["ascent"] > 0.9


@pytest.mark.parametrize(("follow", "stop_early"), [(False, False), (True, True)])
def test_a_cell_has_no_losses_if_they_are_not_wanted_or_images_left_the_attack(follow, stop_early):
    model = toy()
    attack = Attack("", "linf", 0.5, partial(pgd, eps=0.5, alpha=0.1, steps=9,
                                             stop_early=stop_early), follow)
    found = run_cell(attack, model, model, Grid(), torch.ones(6, dtype=torch.int64), draws=1,
                     batch_size=6, chance=chances(6), device=CPU, desc="")
    assert 0 in found["after"] and not {"losses", "ascent"} & found.keys()


def test_only_pgd_in_linf_is_followed_and_only_if_no_image_leaves_it():
    for stop_early in (False, True):
        for draws in (0, 1, 3):
            found = robustart_attacks({"linf": 0.1, "l2": 1.0, "l1": 1.0}, 1,
                                      stop_early=stop_early, draws=draws)
            assert [name for name, attack in found.items() if attack.follow] == (
                [] if stop_early else ["pgd_linf"])


@pytest.mark.parametrize(("path", "value"), [
    ([0, 1, 2, 5], 1), ([5, 2, 1, 0], -1), ([0, 2, 1, 3], 0.6), ([1, 1, 1, 1], 0),
    ([0, 1, 0, 0], 0)])
def test_ascent_is_the_net_rise_over_the_total_variation(path, value):
    losses = torch.tensor(path, dtype=torch.float32)[:, None]
    assert audit.ascents(losses).mean().item() == pytest.approx(value)
    both = torch.cat([losses, torch.tensor([[0.0], [1], [2], [3]])], 1)
    assert audit.ascents(both).mean().item() == pytest.approx((value + 1) / 2)


def test_a_model_agrees_with_itself_and_not_at_all_with_its_negative():
    model = toy()
    same = audit.twin_differences(model, model, Grid(), chances(6), 4, CPU)
    assert same == {"changed": 0, "logits": 0, "agree": 1, "factor": 1}
    double = audit.twin_differences(nn.Sequential(Twice(), model), model, Grid(), chances(6), 4,
                                    CPU)
    assert double["agree"] == 1 and double["factor"] == pytest.approx(2, rel=1e-5)
    assert double["changed"] == 0
    turned = audit.twin_differences(nn.Sequential(Twice(-1), model), model, Grid(), chances(6), 4,
                                    CPU)
    assert turned["agree"] == 0


def test_images_without_a_gradient_are_ignored_for_direction_and_length():
    class Blind(nn.Module):
        """Twice toy(), without a gradient for the images that `hidden` selects."""

        def __init__(self, hidden):
            super().__init__()
            self.hidden, self.twice = hidden, nn.Sequential(Twice(), toy())

        def forward(self, x):
            out = self.twice(x)
            return torch.where(self.hidden(x), out.detach(), out)
    darker = (Grid().pixels / 255.0).flatten(1).mean(1).median()
    found = audit.twin_differences(Blind(lambda x: x.flatten(1).mean(1)[:, None] <= darker), toy(),
                                   Grid(), chances(6), 4, CPU)
    assert found["agree"] == 1 and found["factor"] == pytest.approx(2, rel=1e-5)
    for pair in ((Blind(lambda x: x[:, :1, 0, 0] >= 0), toy()),
                 (toy(), Blind(lambda x: x[:, :1, 0, 0] >= 0))):
        found = audit.twin_differences(*pair, Grid(), chances(6), 4, CPU)
        assert found["agree"] is None and found["factor"] is None
    lines = {line["sign"]: line for line in lines_of({"twin": found})}
    for sign in ("gradients point in other directions", "gradients have another length"):
        assert lines[sign]["flagged"] is None
        assert lines[sign]["figure"].startswith("no image with gradient entries that are nonzero")


class Twice(nn.Module):
    """The identity whose gradient is multiplied."""

    def __init__(self, by=2):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x.detach() + self.by * (x - x.detach())


def test_concealed_gradients_are_long_and_their_signs_are_random():
    model = toy()
    concealed = nn.Sequential(GradientConcealment(), model)
    found = audit.twin_differences(concealed, model, Grid(), chances(6), 4, CPU)
    assert found["factor"] > 1e10 and 0.35 < found["agree"] < 0.65
    assert found["changed"] == 0 and found["logits"] < 1e-4


SOUND = {"ar": {"fgsm": 0.30, "pgd": 0.10, "square": 0.20, "transfer": 0.30, "adaptive": 0.10},
         "radii": {"8/255": 0.10, "64/255": 0.0}, "blind": 0.0, "queries": 10,
         "losses": {"mean": [0.1, 5.0], "ascent": 0.9},
         "twin": {"changed": 0.0, "logits": 0.0, "agree": 1.0, "factor": 1.0}}
EDGES = {  # sign: (just allowed, just flagged)
    "one step beats many steps": ({"ar": {"fgsm": 0.06}}, {"ar": {"fgsm": 0.04}}),
    "a gradient-free attack beats gradient attacks": (
        {"ar": {"square": 0.06}}, {"ar": {"square": 0.04}}),
    "a transfer attack beats white-box attacks": (
        {"ar": {"transfer": 0.06}}, {"ar": {"transfer": 0.04}}),
    "an adaptive attacker does better": ({"ar": {"adaptive": 0.06}}, {"ar": {"adaptive": 0.04}}),
    "a larger radius does not reach zero": (
        {"radii": {"64/255": 0.05}}, {"radii": {"64/255": 0.06}}),
    "the loss does not rise": ({"losses": {"ascent": 0.5}}, {"losses": {"ascent": 0.49}}),
    "the gradient is zero": ({"blind": 0.05}, {"blind": 0.06}),
    "gradients point in other directions": ({"twin": {"agree": 0.75}}, {"twin": {"agree": 0.74}}),
    "gradients have another length": ({"twin": {"factor": 10.0}}, {"twin": {"factor": 0.09}}),
}


def lines_of(changed):
    given = {key: value | changed[key] if isinstance(value, dict) and key in changed else
             changed.get(key, value) for key, value in SOUND.items()}
    return audit.checklist(given.pop("ar"), **given)


def test_a_sound_network_has_no_sign_of_gradient_masking():
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


def test_two_signs_give_the_verdict_gradient_masking():
    lines = lines_of({"blind": 1.0, "losses": {"ascent": 0.0}})
    assert audit.verdict(lines) == "gradient masking"


def test_gradient_directions_are_not_judged_if_the_forward_pass_differs():
    line, = [line for line in lines_of({"twin": {"agree": 0.5, "changed": 0.02}})
             if line["sign"] == "gradients point in other directions"]
    assert line["flagged"] is None


def test_an_undefended_network_is_not_compared_with_a_twin():
    ar = {key: SOUND["ar"][key] for key in ("fgsm", "pgd", "square")}
    lines = audit.checklist(ar, **{key: SOUND[key] for key in (
        "radii", "blind", "queries", "losses")}, twin=None)
    assert len(lines) == 5 and audit.verdict(lines) == "no sign of gradient masking"
