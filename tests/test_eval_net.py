"""eval_net.py: its figures compared with naive loops, its tables, resuming, bad input."""

import csv
import json
import os
import subprocess
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import SRC
from PIL import Image

import attacks
import eval_net
from attack_toys import chances, pictures, toy
from utils import augment, finished, measure, report_nets
from utils.attack.random_layers import drawing_from
from utils.data import load, open_images, to_float
from utils.defenses import defend
from utils.errors import UserError
from utils.measure import share
from utils.models import load_model, trainable
from utils.run import make_generator, save_json, save_pth
from utils.weights import described

CPU = torch.device("cpu")
FEW = ("--num_images", 20, "--queries", 10, "--device", "cpu", "--workers", 0)
TWO = ("rain", "rotation")
FREE = {"name": "free8_mlp", "kind": "digits", "data_dir": "digits", "model_name": "mlp",
        "method": "free", "replays": 8, "eps": 0.1, "alpha": 0.1, "steps": 7, "weight_steps": 24,
        "image_size": 28, "seconds": 60.0, "device": "cpu", "images_sha256": "0"}
STAGE = {"name": "stage1_cnn_bn", "kind": "digits", "data_dir": "digits", "model_name": "cnn_bn",
         "stage": 1, "head": "own", "classes": list("0123456789"), "defense": "gcm", "low": None,
         "augment": ["published"], "w_fgsm": 0.02, "image_size": 28, "hold_out": 0.05,
         "given_images": None, "seconds": 90.0, "best_epoch": 2}
SHEET = {"name": "fgs", "kind": "digits", "data_dir": "digits", "model_name": "mlp",
         "alpha_fgs": 0.3, "alpha_fgv": 0.6, "seconds": 5.0}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cells(folder):
    return json.loads((folder / "results.json").read_text())["cells"]


def digits(split, n):
    return load(open_images("digits", split=split).prepared(28, n), workers=0)


@pytest.fixture(scope="module")
def weights():
    """{name: state dict} of networks trained briefly on digits."""
    images, found = digits("train", 600), {}
    x, y = to_float(images.pixels), images.labels
    for name, steps in (("mlp", 40), ("cnn_bn", 60)):
        model = trainable(name, kind="digits")
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for k in range(steps):
            part = torch.arange(64 * k, 64 * (k + 1)) % len(x)
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        found[name] = model[1].state_dict()
    return found


@pytest.fixture
def network(weights):
    model = trainable("mlp", kind="digits")
    model[1].load_state_dict(weights["mlp"])
    return model.eval().requires_grad_(False)


def save_run(folder, facts, state):
    """Write what a training script leaves in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_pth(folder / f"{facts['name']}.pth", state)
    save_json(folder / f"{facts['name']}.json", facts)
    return folder


@pytest.fixture
def leave(tmp_path, weights):
    """leave(folder, facts, **changed): write a finished run with these facts."""
    def make(folder, facts, state=None, **changed):
        facts = {**facts, **changed}
        return save_run(tmp_path / folder, facts, state or weights[facts["model_name"]])
    return make


@pytest.fixture
def two_operations(monkeypatch):
    monkeypatch.setattr("utils.tested.OPS", {name: augment.OPS[name] for name in TWO})


# --------------------------------------------------------------- the figures, naively

def test_the_cells_equal_those_of_the_attacks_called_one_by_one(run_here, leave, tmp_path):
    folder = leave("run", FREE)
    done = run_here("eval_net.py", "--runs", "run", "--num_images", 40, *FEW[2:], "--seed", 3,
                    "--save", "out")
    assert done.returncode == 0, done.stderr
    model = load_model("mlp", weights=str(folder / "free8_mlp.pth"), kind="digits")
    images = digits("test", 40)
    x, y = to_float(images.pixels), images.labels
    before = torch.tensor([int(model(one[None]).argmax()) == label for one, label in zip(
        x, y.tolist(), strict=True)])
    step = {"eps": 0.1, "alpha": 0.025, "stop_early": True}
    calls = {
        "FGSM": (attacks.fgsm, {"eps": 0.1}), "PGD-20": (attacks.pgd, step | {"steps": 20}),
        "PGD-50-10": (attacks.pgd, step | {"steps": 50, "restarts": 10}),
        "CW-50": (attacks.pgd, step | {"steps": 50, "loss": "margin"})}
    found = cells(tmp_path / "out")
    left = {}
    for name, (attack, settings) in calls.items():
        own, report = attacks.Chance(3, before.nonzero()[:, 0]).fold(measure.ATTACK), {}
        x_adv = attack(model, x[before], y[before], generator=own, report=report, **settings)
        left[name] = before.clone()
        left[name][before] = model(x_adv).argmax(1) == y[before]
        assert found[f"free8 | {name}"]["after"] == left[name].long().tolist(), name
        assert found[f"free8 | {name}"]["before"] == before.long().tolist()
        assert found[f"free8 | {name}"]["gradients"] == report["gradients"], name
    assert len({int(right.sum()) for right in left.values()}) == 4  # the comparison is not trivial
    x_adv, alive = x[before], torch.ones(int(before.sum())).bool()
    for k, (attack, settings) in enumerate((
            (attacks.apgd, {}), (attacks.apgd, {"loss": "dlr_targeted"}),
            (attacks.square, {"queries": 10}))):
        who = alive.nonzero()[:, 0]
        if len(who):
            z = attack(model, x_adv[who], y[before][who], eps=0.1, generator=own[who].fold(k),
                       **settings)
            alive[who] = model(z).argmax(1) == y[before][who]
    last = before.clone()
    last[before] = alive
    strongest = "APGD-CE + APGD-T + Square 10"
    assert found[f"free8 | {strongest}"]["after"] == last.long().tolist()
    table = {(row["metric"], row["under"]): row for row in rows(tmp_path / "out" / "results.csv")}
    every = torch.stack([*left.values(), last]).all(0)
    for name, right in {**left, strongest: last, "worst case": every}.items():
        row = table["robust_acc", name]
        assert float(row["value"]) == int(right.sum()) / 40 and row["n"] == "40"
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert float(table["clean_acc", "none"]["value"]) == int(before.sum()) / 40
    assert f"| CW-50 | {strongest} | worst case |" in done.stdout
    assert "under attack: robust_acc, right before and still right after" in done.stdout
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines()
                if line.startswith("free8 | "))
    assert said["free8 | clean"].startswith("clean_acc ")
    assert said["free8 | FGSM"].startswith("robust_acc ")


@pytest.mark.slow
def test_the_accuracy_under_a_corruption_equals_that_of_a_plain_loop(network):
    operations = {name: augment.OPS[name] for name in TWO}
    images, model = open_images("digits", split="test").prepared(28, 130), network
    found, *others = (measure.accuracy_cell(model, images, operations, batch_size=size, workers=0,
                                             chance=chances(130, 4), device=CPU)
                      for size in (130, 100, 7))
    right = {"clean": 0, "rain": 0, "rotation": 0}
    for k, name in enumerate(right):
        for i, (x, y) in enumerate(zip(to_float(images.pixels), images.labels, strict=True)):
            own = chances(130, 4)[[i]].fold(k).fold(measure.ATTACK)
            z = x[None] if name == "clean" else augment.OPS[name](x[None], generator=own)
            right[name] += int(model(z).argmax()) == int(y)
    assert found == {"n": 130, "right": right} and others == [found, found]
    assert len(set(right.values())) > 1  # the comparison is not trivial


def test_the_mean_over_the_corruptions_leaves_out_the_clean_images():
    shares = {"clean": {"k": 9, "n": 10}, "rain": {"k": 4, "n": 10}, "fog": {"k": 1, "n": 10}}
    mean = report_nets.Measured("a", {}, None, {}, {}, shares, {}).mean
    assert mean["k"] == 5 and mean["n"] == 20 and mean["value"] == 0.25


def test_the_fooling_ratio_counts_changed_predictions_right_or_wrong(network):
    images, model = digits("test", 40), network
    delta = torch.randn(1, 28, 28, generator=make_generator(2))
    x = to_float(images.pixels)
    changed = sum(int(model(one[None]).argmax()) != int(model((one + delta).clamp(0, 1)[None])
                                                        .argmax()) for one in x)
    found = measure.fooling_cell(model, images, delta, chances(40), CPU)
    assert found == {"n": 40, "fooled": changed}
    assert 0 < changed < 40


def test_the_strongest_attack_works_with_two_and_three_classes():
    x, y = pictures(3, torch.float32), torch.tensor([0, 1, 0])
    for classes in (2, 3, 4):
        head = toy(torch.float32)

        def model(z, head=head, classes=classes):
            return head(z)[:, :classes]
        attack, report = eval_net.attacks_in("linf", 0.1, 5, classes)["strongest_quick"], {}
        x_adv = attack.run(model, x, y, generator=make_generator(0), report=report)
        assert x_adv.shape == x.shape and attack.title == " + ".join(
            name for name in report if isinstance(report[name], dict))


def test_networks_whose_strongest_attacks_differ_have_separate_columns():
    cell = {"n": 4, "draws": 1, "before": [1, 1, 1, 0], "after": [1, 0, 0, 0], "seconds": 1.0}
    clean = share(3, 4)
    head, _, *lines = report_nets.main_table([
        report_nets.Measured(name, {}, None, clean, {
            attack.title: cell for attack in eval_net.attacks_in("linf", 0.1, 5, classes).values()
            if attack.title.endswith("Square 5")}, {}, {})
        for name, classes in (("two", 2), ("ten", 10))]).splitlines()
    assert head == ("| network | clean_acc | APGD-CE + APGD-T (1 target, margin loss) + Square 5 "
                    "| APGD-CE + APGD-T + Square 5 | s |")
    assert [line.split(" | ")[2:] for line in lines] == [
        ["25.0 (4.6-69.9)", "-", "1 |"], ["-", "25.0 (4.6-69.9)", "1 |"]]


def test_corruptions_are_reported_as_adv_acc_and_attacks_as_robust_acc():
    cell = {"n": 4, "draws": 1, "before": [1, 1, 0, 0], "after": [1, 0, 0, 0], "seconds": 1.0}
    net = report_nets.Measured("a", {}, None, share(2, 4), {"FGSM": cell},
                               {"clean": share(2, 4), "fog": share(3, 4)}, {})
    assert [(row["metric"], row["under"], row["k"]) for row in report_nets.csv_rows([net])] == [
        ("clean_acc", "none", 2), ("robust_acc", "FGSM", 1), ("attack_robustness", "FGSM", 1),
        ("adv_acc", "fog", 3)]  # the clean images are not listed a second time
    assert "Accuracy under each operation, %, in one forward pass each" in report_nets.tables([net])


def test_the_table_shows_the_audit_of_the_attacks_below_and_their_seconds_beside(run_here, leave,
                                                                                 tmp_path):
    leave("free", FREE)
    leave("pgd", FREE, name="pgd_mlp", method="pgd")
    command = ("eval_net.py", "--runs", "free", "pgd", *FEW, "--attacks", "fgsm", "pgd20",
               "--transfer", "--save", "out")
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    line = "{} cells: largest norm {} of its eps, {} images outside the ball or [0, 1], {} without"
    assert "\n" + line.format(2 * 2 + 2 * 2, "1.000000", 0, 0) in done.stdout
    path, took = tmp_path / "out" / "results.json", (2.25, 4.5)
    state = json.loads(path.read_text())
    for name, seconds in zip(("FGSM", "PGD-20"), took, strict=True):
        state["cells"][f"pgd | {name}"]["seconds"] = seconds
    state["cells"]["pgd -> free8"] |= {"outside": 2, "largest": 0.15, "zero_gradient": 3}
    path.write_text(json.dumps(state))
    done = run_here(*command)
    assert "\n" + line.format(8, "1.500000", 2, 3) in done.stdout
    shown = [row.strip("| ").split(" | ") for row in done.stdout.splitlines()
             if row.startswith(("| training", "| pgd"))]
    assert shown[0][-2:] == ["worst case", "s"] and shown[1][-1] == "7"
    assert "s: seconds of computing in the attacks of the line" in done.stdout
    seconds = {(row["metric"], row["under"]): row["seconds"]
               for row in rows(tmp_path / "out" / "results.csv") if row["network"] == "pgd"}
    assert seconds["clean_acc", "none"] == ""
    assert [seconds["robust_acc", under] for under in ("FGSM", "PGD-20", "worst case")] == [
        "2.25", "4.5", "6.75"]


def test_transfers_and_saved_images_have_a_row_for_both_metrics(run_here, leave, tmp_path):
    leave("free", FREE)
    leave("pgd", FREE, name="pgd_mlp", method="pgd",
          state=trainable("mlp", kind="digits", seed=3)[1].state_dict())
    found, there, title = {}, {}, "saved: FGSM on free8, Linf eps 25.5/255"
    for k, flags in enumerate((("fgsm", "--save_images", "kept", "--transfer"), (
            "none", "--from_images", "kept/free8/FGSM", "--transfer", "--diverse"))):
        done = run_here("eval_net.py", "--runs", "free", "pgd", *FEW, "--attacks", *flags,
                        "--save", f"out{k}")
        assert done.returncode == 0, done.stderr
        found |= cells(tmp_path / f"out{k}")
        there |= {(row["network"], row["under"], row["metric"]): (int(row["k"]), int(row["n"]))
                  for row in rows(tmp_path / f"out{k}" / "results.csv")}
    for net in ("free8", "pgd"):
        eight = found[f"{net} | FGSM"]["after8"]
        wanted = {"FGSM, 8 bit": found[f"{net} | FGSM"] | {"after": eight},
                  title: found[f"{net} | {title}"]}
        wanted |= {f"MI-FGSM from {one}{more}": found[f"{one} -> {net}{more}"]
                   for one in ("free8", "pgd") for more in ("", ", DI and TI")}
        for under, cell in wanted.items():
            both = sum(b and a for b, a in zip(cell["before"], cell["after"], strict=True))
            assert there.pop((net, under, "robust_acc")) == (both, 20)
            assert there.pop((net, under, "attack_robustness")) == (both, sum(cell["before"]))
    assert {under for _, under, _ in there} == {"none", "FGSM"}


# ------------------------------------------------------------------ behind a defence

def test_a_network_behind_gcm_is_attacked_by_the_adaptive_attacker(run_here, leave, tmp_path):
    leave("defended", STAGE)
    leave("plain", STAGE, defense="none")
    done = run_here("eval_net.py", "--runs", "defended", "plain", *FEW, "--attacks", "fgsm",
                    "pgd20", "--eps", 0.1, "--save", "out")
    assert done.returncode == 0, done.stderr
    found = cells(tmp_path / "out")
    for name in ("FGSM", "PGD-20"):
        defended, plain = (found[f"{run} | {name}"] for run in ("defended", "plain"))
        assert defended["after"] == plain["after"]
        assert sum(plain["after"]) < sum(plain["before"]) - 5
    assert "attacker: adaptive (BPDA)" in done.stdout
    assert "defended behind GCM w=1e+20" in done.stdout


def test_a_network_by_name_is_measured_behind_the_defence_given_by_flag(run_here, leave, tmp_path):
    """The cells equal those of a run that has this defence itself."""
    folder = leave("run", STAGE, defense="gcm+resizepad", low=12)
    attacked = (*FEW, "--attacks", "fgsm", "--eps", 0.1, "--draws", 2)
    by_name = run_here("eval_net.py", "--model_name", "cnn_bn", "--weights",
                       folder / "stage1_cnn_bn.pth", "--defense", "gcm+resizepad", "--low", 12,
                       *attacked, "--save", "named")
    of_run = run_here("eval_net.py", "--runs", "run", *attacked, "--save", "out")
    assert by_name.returncode == of_run.returncode == 0, by_name.stderr + of_run.stderr
    assert "cnn_bn behind GCM w=1e+20" in by_name.stdout and "ResizePad to 12-28" in by_name.stdout
    found, wanted = cells(tmp_path / "named"), cells(tmp_path / "out")
    for cell in ("clean", "FGSM"):
        assert found[f"cnn_bn | {cell}"]["after"] == wanted[f"run | {cell}"]["after"]


def test_a_network_is_measured_behind_its_defence_with_all_draws(run_here, leave, tmp_path):
    folder = leave("run", STAGE, defense="resizepad", low=12)
    done = run_here("eval_net.py", "--runs", "run", *FEW, "--attacks", "fgsm", "--draws", 3,
                    "--seed", 5, "--save", "out")
    assert done.returncode == 0, done.stderr
    core = load_model("cnn_bn", weights=str(folder / "stage1_cnn_bn.pth"), kind="digits")
    model = defend(core, "resizepad", size=28, low=12)
    images = digits("test", 20)
    x, y = to_float(images.pixels), images.labels
    with drawing_from(chances(20, 5).fold(measure.BEFORE)):
        right = sum((model(x).argmax(1) == y).long() for _ in range(3))
    found = cells(tmp_path / "out")
    assert found["run | clean"]["before"] == right.tolist() and found["run | clean"]["draws"] == 3
    assert {1, 2} & set(right.tolist())
    assert found["run | FGSM"]["draws"] == 3
    assert "adaptive (EOT of 3)" in done.stdout and "always to the end" in done.stdout


def test_images_never_leave_early_if_the_network_is_random():
    for draws in (0, 3):
        found = eval_net.attacks_in("linf", 0.1, 5, 10, draws)
        assert {found[name].run.keywords["stop_early"] for name in ("pgd20", "pgd50x10", "cw50")
                } == {not draws}


@pytest.mark.parametrize("command", [
    ("eval_net.py", "--model_name", "mlp", *FEW, "--attacks", "fgsm"),
    ("gcm.py", "--model_name", "mlp", *FEW, "--attacks", "fgsm")], ids=lambda words: words[0])
def test_a_table_of_other_labels_is_not_continued(run_here, refused, tmp_path, command):
    assert run_here(*command, "--save", "out").returncode == 0
    path = tmp_path / "out/results.json"
    table = json.loads(path.read_text())
    assert len(table["settings"]["labels"]) == 16
    table["settings"]["labels"] = "0123456789abcdef"
    path.write_text(json.dumps(table))
    refused(run_here(*command, "--save", "out"), "made with labels 0123456789abcdef")


@pytest.mark.parametrize(("norm", "eps"), [("l2", 1.5), ("l1", 12.0)])
def test_networks_are_attacked_in_other_norms(run_here, tmp_path, norm, eps):
    done = run_here("eval_net.py", "--model_name", "mlp", "--num_images", 20, "--norm", norm,
                    "--eps", eps, "--attacks", "pgd20", "cw50", "--save", "out")
    assert done.returncode == 0, done.stderr
    assert f"{norm.title()} eps: {eps:g};" in (tmp_path / "out/results.md").read_text()
    cells = json.loads((tmp_path / "out/results.json").read_text())["cells"]
    images = open_images("digits", split="test").prepared(28, 20)
    model = load_model("mlp", kind="digits", data_dir="digits")
    x, y, chance = to_float(images.pixels), images.labels, chances(20, 0)
    for title, more in (("PGD-20", {"steps": 20}), ("CW-50", {"steps": 50, "loss": "margin"})):
        cell = cells[f"mlp | {title} {norm.title()}"]
        who = torch.tensor(cell["before"]).nonzero()[:, 0]
        x_adv = attacks.pgd(model, x[who], y[who], eps=eps, norm=norm, stop_early=True,
                            generator=chance[who].fold(measure.ATTACK), **more)
        right = torch.zeros(20, dtype=torch.long)
        right[who] = (model(x_adv).argmax(1) == y[who]).long()
        assert cell["after"] == right.tolist() and cell["norm"] == norm and 0 < sum(
            cell["after"]) < 20


def test_autoattack_behind_a_random_defence_says_how_many_draws_it_averages(
        run_here, leave, tmp_path, monkeypatch):
    leave("run", STAGE, defense="resizepad", low=27)
    monkeypatch.setattr("utils.attack.several.apgd", partial(attacks.apgd, steps=2))
    for script, asked, network in (("eval_net.py", [24], ("--runs", "run")), (
            "gcm.py", [20, 24], ("--model_name", "cnn_bn", "--weights", "run/stage1_cnn_bn.pth",
                                 "--defense", "gcm+resizepad", "--low", 27))):
        done = run_here(script, *network, *FEW, "--num_images", 3, "--eps", 0.001, "--attacks",
                        "autoattack", "--draws", 12, "--save", script)
        assert done.returncode == 0, done.stderr
        made = [cell for cell in cells(tmp_path / script).values()
                if "parts" in cell and cell["draws"] == 12]
        for cell, draws in zip(made, asked, strict=True):
            assert f"AutoAttack rand (EOT of {draws})" in done.stdout
            assert cell["gradients"] == 2 * 3 * 3 * draws  # both of APGD's runs, images, steps + 1


def test_changes_by_chance_are_shown_for_a_random_defence(run_here, leave, tmp_path):
    leave("run", STAGE, defense="resizepad", low=12)
    save_pth(tmp_path / "u.pth", 0.1 * torch.randn(1, 28, 28, generator=make_generator(0)))
    done = run_here("eval_net.py", "--runs", "run", *FEW, "--attacks", "none", "--uaps", "u.pth",
                    "--save", "out")
    assert done.returncode == 0, done.stderr
    found = cells(tmp_path / "out")
    assert found["run | uap none (changed by chance)"]["fooled"] > 0
    assert "| none (changed by chance) |" in done.stdout and "| u |" in done.stdout


# -------------------------------------------------------------------------- tables

def test_adversarially_trained_runs_share_one_table(run_here, leave, tmp_path):
    leave("natural", FREE, name="natural_mlp", method="natural", seconds=120.0)
    leave("eight", FREE)
    leave("quarter", FREE, alpha=0.025)
    leave("pgd", FREE, name="pgd_mlp", method="pgd", weight_steps=12, seconds=600.0)
    leave("fast", FREE, name="fast_mlp", method="fast")
    done = run_here("eval_net.py", "--runs", "natural", "eight", "quarter", "pgd/pgd_mlp.pth",
                    "fast", *FEW, "--attacks", "fgsm", "pgd20", "--save", "out")
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines[0] == ["| training", "weight steps", "backward passes", "minutes", "clean_acc",
                        "FGSM", "PGD-20", "worst case", "s |"]
    assert [line[:4] for line in lines[2:]] == [
        ["| natural", "24", "24", "2.0"], ["| free8", "24", "24", "1.0"],
        ["| free8 (alpha 0.25 eps)", "24", "24", "1.0"], ["| pgd", "12", "96", "10.0"],
        ["| fast", "24", "48", "1.0"]]
    worst = {row["network"]: 100 * float(row["value"]) for row in rows(
        tmp_path / "out" / "results.csv") if (row["metric"], row["under"]) == (
            "robust_acc", "worst case")}
    assert (f"Natural training: robust_acc {worst['natural']:.1f} % in the worst case"
            ) in done.stdout
    assert (f"free8 compared with pgd-7: {worst['free8'] - worst['pgd']:+.1f} points in the worst "
            "case, in 1/10.0 of its training time") in done.stdout
    assert (tmp_path / "out" / "results.md").read_text() in done.stdout


def test_names_of_runs_tell_box_from_ball_and_seeds_apart(leave, tmp_path):
    made = {"ball": {}, "box": {"clip_delta": "box"}, "both": {"clip_delta": "box", "alpha": 0.025},
            "first": {"replays": 4, "seed": 1}, "second": {"replays": 4, "seed": 2},
            "pgd": {"method": "pgd", "clip_delta": "box"}}
    for name, changed in made.items():
        leave(name, FREE, **changed)
    assert [name for name, *_ in finished.read_runs(tmp_path / name for name in made)] == [
        "free8", "free8 (box)", "free8 (alpha 0.25 eps, box)", "free4, seed 1", "free4, seed 2",
        "pgd"]


def test_training_times_on_different_devices_are_not_compared(run_here, leave):
    leave("eight", FREE)
    leave("pgd", FREE, name="pgd_mlp", method="pgd", device="cuda")
    done = run_here("eval_net.py", "--runs", "eight", "pgd", *FEW, "--attacks", "fgsm", "pgd20")
    assert "free8 compared with pgd-7" in done.stdout
    assert "of its training time" not in done.stdout


def columns(name="free8", eps=8 / 255, **changed):
    facts = {**FREE, "kind": "cifar10", "model_name": "wrn_32_10", "weight_steps": 80_000,
             "eps": 8 / 255, **changed}
    cell = {"n": 1, "draws": 1, "before": [1], "after": [0], "eps": eps,
            "seconds": 1.0}
    return report_nets.Measured(name, facts, None, share(1, 2), {"FGSM": cell, "PGD-20": cell},
                                {}, {})


@pytest.mark.parametrize("other", [
    {"model_name": "cnn_bn"}, {"eps": 4 / 255}, {"weight_steps": 8000}, {"kind": "mnist"},
    {"name": "free8 (box)"}, {"given_images": 500}, {"name": "pgd", "method": "pgd", "steps": 10}])
def test_the_papers_figures_are_shown_only_beside_networks_trained_as_in_the_paper(other):
    lines = report_nets.main_table([columns(), columns(**other)]).splitlines()
    assert lines[0].endswith("| s | paper: clean | paper: PGD-20-10 | paper: minutes |")
    assert lines[2].endswith("| 85.96 | 46.33 | 785 |") and lines[3].endswith("| - | - | - |")
    assert "paper" not in report_nets.main_table([columns(**other)])


def test_the_claims_name_the_papers_figures_on_cifar10_only():
    def said(kind):
        return report_nets.claims([columns("natural", kind=kind), columns("free8", kind=kind),
                                   columns("pgd", kind=kind)])
    assert "worst case (paper: 0)." in said("cifar10") and "in 1/6.9)." in said("cifar10")
    assert "paper" not in said("mnist") and "free8 compared with pgd-7" in said("mnist")


def test_no_figure_of_the_paper_is_shown_beside_another_network_on_cifar10(run_here, leave,
                                                                           tmp_path, picture):
    for k, name in enumerate(("airplane", "automobile", "bird", "cat", "deer", "dog", "frog",
                              "horse", "ship", "truck")):
        picture(tmp_path / "tiny" / "test" / name / "a.png", 32, 32, seed=k)
        picture(tmp_path / "tiny" / "train" / name / "b.png", 32, 32, seed=20 + k)
    state = trainable("mlp", kind="cifar10")[1].state_dict()
    options = {"kind": "cifar10", "data_dir": "tiny", "image_size": 32, "state": state}
    leave("eight", FREE, **options)
    leave("quarter", FREE, alpha=0.025, **options)
    done = run_here("eval_net.py", "--runs", "eight", "quarter", "--attacks", "fgsm", "--device",
                    "cpu", "--workers", 0)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines[0].endswith("| FGSM | s |") and "paper" not in done.stdout


def test_the_challenges_runs_share_one_table_with_their_robustness(run_here, leave, tmp_path,
                                                                   two_operations):
    leave("stage1", STAGE)
    leave("stage2", STAGE, name="stage2_cnn_bn", stage=2, defense="gcm+resizepad", w_fgsm=1.0,
          augment=["rain", "fog"])
    made = run_here("gcm.py", "--data_dir", "digits", "--model_name", "cnn_bn", "--weights",
                    "stage1/stage1_cnn_bn.pth", "--attacks", "fgsm", "--num_images", 20, "--save",
                    "stage1/gcm", "--device", "cpu")
    assert made.returncode == 0, made.stderr
    done = run_here("eval_net.py", "--runs", "stage1", "stage2", *FEW, "--attacks", "none",
                    "--corruptions", "--save", "both")
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines[0][:10] == [
        "| run", "stage", "defence", "augmentations", "w_fgsm", "minutes", "clean_acc",
        "mean of 2 augmentations", "AR, vanilla", "AR, naive attacker"]
    assert lines[0][10].startswith("AR, adaptive attacker")
    assert lines[2][:6] == ["| stage1", "1", "gcm", "published", "0.02", "1.5"]
    assert lines[3][:6] == ["| stage2", "2", "gcm+resizepad", "rain fog", "1", "1.5"]
    assert lines[3][8:] == ["-", "-", "- |"] and all("(" in cell for cell in lines[2][8:])
    right = cells(tmp_path / "both")["stage1 | corruptions"]["right"]
    assert lines[2][6].startswith(f"{100 * right['clean'] / 20:.1f} (")
    assert lines[2][7] == f"{100 * (right['rain'] + right['rotation']) / 40:.1f}"
    assert [line[0] for line in lines[-3:]][0] == "| clean"
    assert {line[0] for line in lines[-2:]} == {"| rain", "| rotation"}
    assert (tmp_path / "both" / "corruptions.png").read_bytes().startswith(b"\x89PNG")
    assert ("; AR: attack_robustness in gcm.py's worst case, 20 images of digits within Linf "
            "51/255 (stage1);") in done.stdout
    left_out = "\nAR left out of stage1: the folder gcm there holds a table of other weights"
    assert left_out not in done.stdout
    path = tmp_path / "stage1/gcm/results.json"
    text = path.read_text()
    state = json.loads(text)
    for cell in state["cells"].values():
        cell["seconds"] += 1
    again = ("eval_net.py", "--runs", "stage1", *FEW, "--attacks", "none", "--save", "again")
    table = path.with_name("results.csv")
    rows = table.read_text()
    table.write_text("".join(rows.splitlines(keepends=True)[:-1]))  # without the last worst case
    done = run_here(*again)
    assert done.returncode == 0 and left_out in done.stdout and "| AR, " not in done.stdout
    table.write_text(rows)
    for changed in (json.dumps(state), None, text):  # cells begun again, lost, of another network
        if changed == text:
            leave("stage1", STAGE, state=trainable("cnn_bn", kind="digits", seed=3)[1].state_dict())
        path.unlink(missing_ok=True)
        if changed:
            path.write_text(changed)
        done = run_here(*again, "--overwrite")
        assert left_out in done.stdout, done.stderr
        assert "AR, " not in done.stdout and "; AR: " not in done.stdout


def test_runs_of_all_trainings_share_one_table_with_dashes_for_missing_values(run_here, leave):
    leave("one/seed0", SHEET, name="fgs")
    leave("stage1", STAGE)
    leave("free", FREE)
    done = run_here("eval_net.py", "--runs", "one", "stage1", "free", *FEW, "--attacks", "fgsm",
                    "--eps", "8/255")
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines[0][:8] == ["| run", "weight steps", "backward passes", "stage", "defence",
                            "augmentations", "w_fgsm", "minutes"]
    assert [line[:5] for line in lines[2:]] == [
        ["| one/seed0", "-", "-", "-", "-"], ["| stage1", "-", "-", "1", "gcm"],
        ["| free8", "24", "24", "-", "-"]]


def test_runs_of_one_name_are_told_apart_by_their_paths(run_here, leave, tmp_path):
    leave("a/net", FREE)
    leave("b/net", FREE)
    done = run_here("eval_net.py", "--runs", "a/net", "b/net", "a/net", *FEW, "--attacks", "none",
                    "--save", "out")
    assert done.returncode == 0, done.stderr
    assert set(cells(tmp_path / "out")) == {"a/net/free8_mlp.pth | accuracy",
                                            "b/net/free8_mlp.pth | accuracy"}


@pytest.mark.parametrize(("script", "flags", "name"), [
    ("free_at.py", ("--model_name", "mlp", "--method", "natural", "--epochs", 1), "natural"),
    ("train_gcm.py", ("--batch_size", 40, "--epochs", 1, "--augment", "none"), "run"),
    ("fgsm_mnist.py", ("--epochs", 1, "--eval_images", 5, "--queries", 2), "run/seed0")])
def test_what_each_training_script_writes_can_be_measured(run_here, tmp_path, script, flags, name):
    made = run_here(script, "--num_images", 100, *flags, "--device", "cpu", "--save", "run")
    assert made.returncode == 0, made.stderr
    done = run_here("eval_net.py", "--runs", "run", *FEW, "--attacks", "fgsm", "--save", "out")
    assert done.returncode == 0, done.stderr
    assert f"{name} | FGSM" in cells(tmp_path / "out")


def test_a_folder_stands_for_its_perturbations_and_not_for_its_networks(run_here, leave, tmp_path):
    leave("runs/net", FREE)
    save_pth(tmp_path / "runs" / "u.pth", torch.zeros(1, 28, 28))
    (tmp_path / "runs" / "u.json").write_text(json.dumps({"kind": "digits", "scale": 1}))
    done = run_here("eval_net.py", "--runs", "runs/net", *FEW, "--attacks", "none", "--uaps",
                    "runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| u | 0.0 (") == 1


# ------------------------------------------------------------- which images, which network

def test_a_network_of_train_gcm_is_tested_on_held_out_images(run_here, leave, tmp_path, picture):
    for k in range(3):
        for i in range(6):
            picture(tmp_path / "images" / f"c{k}" / f"{i}.png", 32, 32, seed=10 * k + i)
    state = trainable("squeezenet1_1", kind="folder", head="own", classes=3)[1].state_dict()
    leave("run", STAGE, state=state, name="stage1_squeezenet1_1", model_name="squeezenet1_1",
          kind="folder", data_dir="images", classes=["c0", "c1", "c2"], image_size=64,
          hold_out=0.25)
    flags = ("--attacks", "none", "--device", "cpu", "--workers", 0)
    done = run_here("eval_net.py", "--runs", "run", *flags, "--save", "out")
    assert done.returncode == 0, done.stderr
    said = "held out of the training images, and the best epoch was chosen on them"
    assert f"n: 4 test images ({said})" in done.stdout and "64 pixels" in done.stdout
    by_name = run_here("eval_net.py", "--model_name", "squeezenet1_1", "--weights",
                       "run/stage1_squeezenet1_1.pth", "--data_dir", "images", *flags)
    assert f"n: 4 test images ({said})" in by_name.stdout, by_name.stderr
    assert "| squeezenet1_1 |" in by_name.stdout and "GCM" not in by_name.stdout
    save_pth(tmp_path / "u.pth", torch.zeros(3, 64, 64))
    flags = ("--model_name", "squeezenet1_1", "--weights", "run/stage1_squeezenet1_1.pth",
             "--data_dir", "images", "--device", "cpu", "--workers", 0)
    gcm = ("gcm.py", *flags, "--attacks", "fgsm", "--save", "gcm")
    for command in (gcm, ("eval_uap.py", *flags, "--uaps", "u.pth", "--show", 0)):
        done = run_here(*command)
        assert f"n: 4 ({said});" in done.stdout, done.stderr
    table = json.loads((tmp_path / "gcm/results.json").read_text())
    assert table["settings"].pop("note") == said
    for other in ({}, {"note": "chosen otherwise"}):  # tables made before have none
        save_json(tmp_path / "gcm/results.json", table | {"settings": table["settings"] | other})
        done = run_here(*gcm)
        assert f"n: 4 ({said});" in done.stdout, done.stderr


def test_a_network_is_never_tested_on_its_training_images(
        run_here, leave, refused, tmp_path, picture):
    for k, wnid in enumerate(("n01440764", "n02504458")):
        picture(tmp_path / "images" / wnid / "a.png", 32, 32, seed=k)
    state = trainable("squeezenet1_1", kind="imagenet")[1].state_dict()
    leave("run", FREE, state=state, name="free8_squeezenet1_1", model_name="squeezenet1_1",
          kind="imagenet", data_dir="images", image_size=224)
    flags = ("--device", "cpu", "--workers", 0)
    by_name = ("--model_name", "squeezenet1_1", "--weights", "run/free8_squeezenet1_1.pth",
               "--data_dir", "images/", *flags)
    said = "trained on all of these images"
    refused(run_here("eval_net.py", "--runs", "run", "--attacks", "none", *flags), said)
    refused(run_here("eval_net.py", *by_name, "--attacks", "none"), said)
    refused(run_here("gcm.py", *by_name), said)
    refused(run_here("eval_uap.py", *by_name), said)


def test_only_images_outside_the_training_set_are_left_for_any_pair_of_folders(tmp_path, picture):
    for part in ("train", "val", "flat", "alone/train"):
        for k in range(3):
            for i in range(2):
                picture(tmp_path / "cif" / part / f"c{k}" / f"{i}.png", 32, 32, seed=k + i)
    train, val, flat, alone = (str(tmp_path / "cif" / part)
                               for part in ("train", "val", "flat", "alone"))
    both = str(tmp_path / "cif")
    for trained, tested, n in (
            (train, val, 6), (train, train, 6), (train, f"{val}/../train", 6), (both, val, 6),
            (both, both, 6), (val, both, 0), (val, val, 0), (val, train, 0), (flat, flat, 0),
            (flat, f"{val}/../flat", 0), (flat, both, 6), (train, flat, 6), (alone, alone, 0),
            (alone, f"{alone}/train", 0), (f"{alone}/train", alone, 0), (alone, both, 6),
            ("digits", val, 6), (str(tmp_path / "gone"), val, 6)):
        facts = {"data_dir": trained}
        try:
            images, note = finished.unseen_by(facts, tested, "data")
        except UserError:
            assert n == 0, (trained, tested)
        else:
            assert (len(images), note) == (n, ""), (trained, tested)
        held = facts | {"hold_out": 0.34, "given_images": None}  # the second of every three images
        images, note = finished.unseen_by(held, tested, "data")
        here = n == 0 or trained == str(tmp_path / "gone")
        assert (len(images), note) == ((2, "held out of the training images") if here else (n, "")
                                       ), (trained, tested)
        assert images.names == ("c0/1.png", "c2/0.png") or not here
        some = facts | {"given_images": 3}  # the first of each class
        images, note = finished.unseen_by(some, tested, "data")
        assert len(images) == (n or 3), (trained, tested)
        assert n or note == "without those that a network was trained on"


def test_networks_without_a_run_are_tested_on_the_images_left_for_the_runs(tmp_path, picture):
    for k in range(3):
        for i in range(2):
            picture(tmp_path / "flat" / f"c{k}" / f"{i}.png", 32, 32, seed=k + i)
    where = (str(tmp_path / "flat"), "data")
    facts = {"data_dir": where[0], "hold_out": 0.34, "given_images": None}
    images, note = finished.images_for([("v1", {}, *where), ("ours", facts, *where)])
    assert (len(images), note) == (2, "held out of the training images")
    assert len(finished.images_for([("v1", {}, *where)])[0]) == 6
    other = facts | {"hold_out": 0.5}
    with pytest.raises(UserError, match="ours is tested on 2 .* other on 3 other"):
        finished.images_for([("other", other, *where), ("ours", facts, *where)])


def test_each_note_of_the_networks_is_given_once(monkeypatch):
    images = open_images("digits", split="test")
    monkeypatch.setattr(finished, "unseen_by", lambda facts, *_: (images, facts["said"]))
    networks = [(name, {"data_dir": name, "said": said}, name, "data") for name, said in (
        ("a", "seen"), ("b", ""), ("c", "held out"), ("d", "seen"))]
    assert finished.images_for(networks) == (images, "seen; held out")


def test_the_data_is_looked_for_where_the_training_found_it():
    none = {"data_dir": None, "data_root": None, "labels": None, "classes": None}
    s, typed = Namespace(**none), Namespace(**{**none, "data_dir": "m", "data_root": "r"})
    facts = {"data_dir": "mnist", "data_root": "/data"}
    assert eval_net.where(facts, s) == ("mnist", "/data", None, None)
    assert eval_net.where({"data_dir": "mnist"}, s) == ("mnist", "data", None, None)
    assert eval_net.where(facts, typed) == ("m", "r", None, None)
    flat = {"data_dir": "flat", "labels": "train.txt", "classes_are": "imagenet"}
    assert eval_net.where(flat, s) == ("flat", "data", None, "imagenet")  # --labels: of training
    assert eval_net.where(flat, typed) == ("m", "r", None, None)  # labels of other images
    own = Namespace(**{**none, "labels": "b.txt"})
    assert eval_net.where(flat, own) == ("flat", "data", "b.txt", "imagenet")


def test_a_torchvision_network_by_name_is_attacked_on_class_folders(run_here, tmp_path, picture):
    for k, wnid in enumerate(("n01440764", "n02504458")):
        picture(tmp_path / "val" / wnid / "a.png", seed=k)
    (tmp_path / "val" / "n01440764" / "broken.png").write_text("no image")
    done = run_here("eval_net.py", "--data_dir", "val", "--model_name", "squeezenet1_1",
                    "--weights", "random", "--attacks", "fgsm", "--device", "cpu", "--workers", 0,
                    "--save", "out")
    assert done.returncode == 0, done.stderr
    assert "Linf eps: 8/255" in done.stdout and "centre crop 224, random" in done.stdout
    assert "n: 2 test images" in done.stdout
    first = cells(tmp_path / "out")
    assert first["squeezenet1_1 | FGSM"]["n"] == 2
    for typed in ("val/", tmp_path / "val"):  # the same folder
        done = run_here("eval_net.py", "--data_dir", typed, "--model_name", "squeezenet1_1",
                        "--weights", "random", "--attacks", "fgsm", "--device", "cpu", "--workers",
                        0, "--save", "out")
        assert f"Protocol: data: {typed};" in done.stdout, done.stderr
        assert cells(tmp_path / "out") == first


def test_the_radius_is_that_of_the_training_or_the_data_set(run_here, leave, tmp_path):
    leave("free", FREE)
    leave("sheet", SHEET)
    leave("stage1", STAGE)
    for name, eps in (("free", 0.1), ("sheet", 0.3), ("stage1", 0.2)):
        done = run_here("eval_net.py", "--runs", name, *FEW, "--attacks", "fgsm", "--save",
                        f"out_{name}")
        assert done.returncode == 0, done.stderr
        cell, = (one for key, one in cells(tmp_path / f"out_{name}").items() if "FGSM" in key)
        assert cell["eps"] == eps and abs(cell["largest"] - eps) < 1e-6


# ------------------------------------------------------------------------- resuming

ALL = ("--runs", "free", "stage1", *FEW, "--attacks", "fgsm", "--eps", 0.1, "--corruptions",
       "--uaps", "u.pth", "--draws", 2)


class Killed(BaseException):
    """Stands for SIGKILL: the script must not catch it."""


def test_a_command_killed_after_a_cell_gives_the_same_tables_when_repeated(
        run_here, leave, tmp_path, monkeypatch, two_operations):
    leave("free", FREE)
    leave("stage1", STAGE, defense="gcm+resizepad", low=20)
    save_pth(tmp_path / "u.pth", 0.1 * torch.randn(1, 28, 28, generator=make_generator(0)))
    monkeypatch.setattr(report_nets.draw, "corruptions", lambda runs: b"")  # slow, not compared
    monkeypatch.setattr(measure, "time", Namespace(perf_counter=lambda: 0.0))  # in the tables
    whole = run_here("eval_net.py", *ALL, "--save", "whole")
    assert whole.returncode == 0, whole.stderr
    count = len(cells(tmp_path / "whole"))
    assert count == 2 * (2 + 1 + 2)
    real, saved = eval_net.run.save_json, []

    def watched(path, value):
        real(path, value)
        saved.append(path)
        if len(saved) == limit:
            raise Killed
    monkeypatch.setattr(eval_net.run, "save_json", watched)
    for k in (1, 2, 4, 8):  # after cells of four kinds
        limit, save = k, f"killed{k}"
        saved.clear()
        with pytest.raises(Killed):
            run_here("eval_net.py", *ALL, "--save", save)
        assert len(cells(tmp_path / save)) == k and not (tmp_path / save / "results.md").exists()
        limit = 0
        saved.clear()
        done = run_here("eval_net.py", *ALL, "--save", save)
        assert done.returncode == 0, done.stderr
        assert len(saved) == count - k  # nothing is measured twice
        for name in ("results.md", "results.csv"):
            assert (tmp_path / save / name).read_bytes() == (tmp_path / "whole" / name
                                                             ).read_bytes(), k


def test_new_columns_are_added_to_a_folder_even_with_another_batch_size(run_here, leave, tmp_path,
                                                                        two_operations):
    leave("free", FREE)
    command = ("--runs", "free", *FEW, "--save", "out")
    assert run_here("eval_net.py", *command, "--attacks", "none", "--corruptions").returncode == 0
    done = run_here("eval_net.py", *command, "--attacks", "fgsm", "--batch_size", 7)
    assert done.returncode == 0, done.stderr
    assert {key: cell["batch_size"] for key, cell in cells(tmp_path / "out").items()} == {
        "free8 | corruptions": 250, "free8 | clean": 7, "free8 | FGSM": 7}
    assert "; batches of: 7 and 250;" in done.stdout


def test_a_network_with_its_own_note_can_be_added_to_a_table(run_here, leave, tmp_path):
    leave("free", FREE)
    leave("best", FREE, best_pass=1, validated=9)
    note, flags = "the pass of free8 (best pass) was chosen on 9", (*FEW, "--attacks", "fgsm")
    for runs, said in ((("free",), False), (("free", "best"), True), (("free",), False)):
        done = run_here("eval_net.py", "--runs", *runs, *flags, "--save", "out")
        assert done.returncode == 0, done.stderr
        assert (note in done.stdout) is said
        settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
        assert (note in settings["note"]) is (len(cells(tmp_path / "out")) == 4)


def test_overwrite_measures_everything_again(run_here, leave, refused, tmp_path):
    leave("free", FREE)
    command = ("--runs", "free", *FEW, "--save", "out", "--attacks")
    assert run_here("eval_net.py", *command, "none").returncode == 0
    leave("free", FREE, state=trainable("mlp", kind="digits", seed=3)[1].state_dict())
    refused(run_here("eval_net.py", *command, "fgsm"), "network free8")
    done = run_here("eval_net.py", *command, "fgsm", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert set(cells(tmp_path / "out")) == {"free8 | clean", "free8 | FGSM"}


@pytest.mark.parametrize("script", ["train_free.sh", "train_gcm.sh"])
def test_a_training_started_over_is_measured_again(tmp_path, script):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> said\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "runs").mkdir()
    for flags, again in ((("--overwrite", "--seed", "1"), True), (("--epochs", "1"), False)):
        (tmp_path / "said").unlink(missing_ok=True)
        done = subprocess.run(["sh", str(SRC / script), *flags], cwd=tmp_path, check=False,
                              capture_output=True, text=True,
                              env={**os.environ, "PYTHON": str(tmp_path / "python")})
        assert done.returncode == 0, done.stderr
        *_, table, line = (tmp_path / "said").read_text().splitlines()
        assert "eval_net.py" in line and ("--overwrite" in line.split()) == again
        if script == "train_gcm.sh":
            assert "gcm.py" in table and ("--overwrite" in table.split()) == again


def test_the_tables_of_the_challenge_are_made_again_if_the_network_has_changed(tmp_path):
    """As by --resume --epochs MORE; starting a finished training again changes nothing."""
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$@" >> said\n'
        'case $1 in *train_gcm.py) mkdir -p runs/challenge/stage$3\n'
        'echo "$MADE" > runs/challenge/stage$3/stage$3_cnn.pth ;; esac\n')
    (tmp_path / "python").chmod(0o755)
    for made, again in (("a", True), ("a", False), ("b", True)):
        (tmp_path / "said").unlink(missing_ok=True)
        subprocess.run(["sh", str(SRC / "train_gcm.sh"), "--resume"], cwd=tmp_path, check=True,
                       capture_output=True,
                       env={**os.environ, "PYTHON": str(tmp_path / "python"), "MADE": made})
        tables = [line.split() for line in (tmp_path / "said").read_text().splitlines()
                  if "/gcm.py" in line or "/eval_net.py" in line]
        assert len(tables) == 3 and all(("--overwrite" in line) is again for line in tables), tables


def test_the_tables_of_the_challenge_are_made_with_the_flags_of_its_trainings(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nfor a; do printf "%s|" "$a"; done >> said\n'
                                     'echo >> said\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["sh", str(SRC / "train_gcm.sh"), "--data_root", "a b", "--batch_size", "7", "--low", "20",
         "--deterministic", "--device=cpu"], cwd=tmp_path, check=False, capture_output=True,
        text=True, env={**os.environ, "PYTHON": str(tmp_path / "python")})
    assert done.returncode == 0, done.stderr
    tables = [line for line in (tmp_path / "said").read_text().splitlines() if "/gcm.py|" in line]
    assert [line.split("--defense|")[1].split("|")[0] for line in tables] == [
        "gcm", "gcm+resizepad"]
    for line in tables:
        assert line.endswith("/gcm|--data_root|a b|--low|20|--device|cpu|")
    assert "/eval_net.py|--device=cpu|--runs|runs/challenge/stage1|runs/challenge/stage2|" in (
        tmp_path / "said").read_text()
    (tmp_path / "said").unlink()
    subprocess.run(["sh", str(SRC / "train_gcm.sh"), "--defense=none", "--model_name", "timm/a"],
                   cwd=tmp_path, check=True, capture_output=True,
                   env={**os.environ, "PYTHON": str(tmp_path / "python")})
    assert (tmp_path / "said").read_text().count("|--model_name|timm/a|--defense|none|") == 2
    assert "--defense|gcm" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize(("flags", "replays", "runs", "trained"), [
    ((), "", "free8", ["--method free --replays 8"]),
    (("--recipe", "free"), "", "free", ["--method free --recipe free"]),
    (("--replays=4",), "", "free", ["--method free --replays=4"]),
    (("--recipe", "free"), "2 4", "free2 free4", ["--method free --replays 2 --recipe free",
                                                  "--method free --replays 4 --recipe free"])])
def test_free_training_uses_the_replays_of_the_recipe_unless_some_are_given(tmp_path, flags,
                                                                            replays, runs, trained):
    """In a folder with a space in its name; the table gets only the flags that it accepts."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" != -c ] || exit 0\n'
                                     'for a; do printf "%s|" "$a"; done >> said; echo >> said\n')
    (tmp_path / "python").chmod(0o755)
    passed = ("--cache", "a b", "--lr", "0.1", "--workers=2", "--device", "cpu")
    done = subprocess.run(
        ["sh", str(SRC / "train_free.sh"), *flags, *passed], cwd=tmp_path, check=False,
        capture_output=True, text=True, env={
            **os.environ, "PYTHON": str(tmp_path / "python"), "RUNS": "my runs",
            "METHODS": "free natural", "REPLAYS": replays, "EVAL_IMAGES": "9",
            "MODEL": "my net.py:net"})
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    for line, name, words in zip(said, runs.split(), trained, strict=False):
        assert f"|--save|my runs/{name}|{words.replace(' ', '|')}|--cache|a b|" in line
    folders = "|".join(f"my runs/{name}" for name in (*runs.split(), "natural"))
    assert said[len(trained) + 1:] == [
        f"{SRC}/eval_net.py|--cache|a b|--workers=2|--device|cpu|--model_name|my net.py:net|--runs|"
        f"{folders}|--save|my runs|--num_images|9|"]


def test_a_clean_cell_without_its_counts_is_made_again(run_here, leave, tmp_path):
    leave("free", FREE)
    command = ("--runs", "free", *FEW, "--save", "out", "--attacks", "fgsm")
    assert run_here("eval_net.py", *command).returncode == 0
    path = tmp_path / "out" / "results.json"
    state = json.loads(path.read_text())
    whole = state["cells"]["free8 | clean"]["before"]
    state["cells"] = {"free8 | clean": {"n": 20}}
    path.write_text(json.dumps(state))
    assert run_here("eval_net.py", *command).returncode == 0
    assert cells(tmp_path / "out")["free8 | clean"]["before"] == whole


@pytest.mark.parametrize("text", [
    "[]", "{}", '{"settings": {}, "cells": []}', '{"settings": {}, "cells": {"a": 1}}',
    '{"settings": [], "cells": {}}', '{"settings": 3, "cells": {"a": {}}}'])
def test_a_damaged_table_is_kept_and_refused(refused, leave, run_here, tmp_path, text):
    leave("free", FREE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(text)
    refused(run_here("eval_net.py", "--runs", "free", *FEW, "--attacks", "none", "--save", "out"),
            "results.json", "not a table of this script", "choose another folder")
    assert (tmp_path / "out" / "results.json").read_text() == text


def test_what_cannot_be_read_or_written_is_refused_before_a_network_is_loaded(
        run_here, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(eval_net, "open_all", lambda *_: pytest.fail("networks were loaded"))
    (tmp_path / "file").write_text("")
    flags = ("--model_name", "mlp", *FEW)
    refused(run_here("eval_net.py", *flags, "--uaps", "nowhere.pth"), "nowhere.pth")
    refused(run_here("eval_net.py", *flags, "--save", "file"), "file", "cannot write there")


def test_a_table_of_another_radius_network_or_perturbation_is_refused_and_kept(run_here, leave,
                                                                               refused, tmp_path):
    leave("free", FREE)
    save_pth(tmp_path / "u.pth", torch.zeros(1, 28, 28))
    command = ("--runs", "free", *FEW, "--attacks", "fgsm", "--uaps", "u.pth", "--save", "out")
    assert run_here("eval_net.py", *command).returncode == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    refused(run_here("eval_net.py", *command, "--eps", 0.02), "--save out", "eps 0.1", "0.02")
    refused(run_here("eval_net.py", *command, "--seed", 1), "--save out", "seed 0")
    save_pth(tmp_path / "u.pth", torch.full((1, 28, 28), 0.1))
    refused(run_here("eval_net.py", *command), "--save out", "uap u")
    save_pth(tmp_path / "u.pth", torch.zeros(1, 28, 28))
    leave("free", FREE, state=trainable("mlp", kind="digits", seed=3)[1].state_dict())
    refused(run_here("eval_net.py", *command), "--save out", "network free8")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    near = run_here("eval_net.py", "--runs", "free", *FEW, "--attacks", "fgsm", "--eps", 0.02,
                    "--save", "near")
    assert near.returncode == 0, near.stderr


# ------------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("flags", "words"), [
    (("--runs", "nowhere"), ("--runs nowhere", "no such run")),
    (("--runs", "run", "nowhere.pth"), ("nowhere.pth", "nowhere.json")),
    (("--runs", "empty"), ("--runs empty", "no run there", "free_at.py")),
    (("--runs", "alone/free8_mlp.pth"), ("free8_mlp.json", "next to it")),
    (("--runs", "both"), ("--runs both", "2 networks", "natural_mlp.pth", "free8_mlp.pth")),
    (("--runs", "seeds"), ("--runs seeds", "2 networks", "seed0/fgs.pth", "seed1/fgs.pth")),
    (("--runs", "uap"), ("--runs uap", "no run there")),
    (("--runs", "run", "mnist"), ("MNIST is not in", "--data_root")),
    (("--runs", "run", "own", "--num_images", 1), (
        "own is tested on 1 folder images", "355 other digits", "the same images")),
    (("--runs", "run", "far"), ("free8 has Linf eps 0.1, fast 0.3", "--eps")),
    (("--runs", "run", "--num_images", 400), ("--num_images 400", "has 355")),
    (("--runs", "run", "--model_name", "mlp"), ("--runs", "--model_name")),
    (("--runs", "run", "--weights", "random"), ("--runs", "--weights")),
    (("--runs", "run", "--data_dir", "photos"), ("--data_dir photos", "imagenet", "on digits")),
    (("--runs", "run", "--data_dir", "nowhere"), ("nowhere", "no such folder")),
    (("--runs", "run", "--attacks", "none", "fgsm"), ("--attacks none fgsm", "none alone")),
    (("--runs", "run", "--attacks", "pgd"), ("invalid choice", "pgd20")),
    (("--runs", "run", "--uaps", "small.pth"), ("small.pth", "(1, 8, 8)", "(1, 28, 28)")),
    (("--runs", "run", "--uaps", "nowhere.pth"), ("nowhere.pth",)),
    (("--runs", "run", "--uaps", "empty"), ("empty", "no perturbation for digits images")),
    (("--runs", "run", "--save", "run/free8_mlp.pth"), ("cannot write there",)),
    (("--runs", "run", "--save", "other"), ("other", "choose another folder")),
    (("--runs", "mlp_as_cnn"), ("not the weights of cnn",)),
    (("--runs", "low"), ("low=40",)),
    (("--model_name", "resnet9000"), ("resnet9000", "wanted one of cnn")),
    (("--model_name", "mlp", "--weights", "nowhere.pth"), ("--weights nowhere.pth",)),
    (("--model_name", "mlp", "--weights", "random", "V1", "random"), ("3 given for 1",)),
    (("--data_dir", "own_images", "--model_name", "squeezenet1_1", "--weights", "random"),
     ("--data_dir own_images", "2 classes", "n01440764")),
    (("--eps", 8), ("outside (0, 1]",)), (("--draws", 0), ("at least 1",))], ids=str)
def test_bad_input_gives_one_line_and_nothing_is_measured(run_here, refused, wrong, tmp_path, flags,
                                                          words):
    for path in wrong.iterdir():
        (tmp_path / path.name).symlink_to(path)
    few = FEW[2:] if "--num_images" in flags else FEW
    refused(run_here("eval_net.py", *few, *flags), *words)
    assert not list(wrong.rglob("results.md")) and not list(tmp_path.rglob("results.md"))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, weights):
    """A folder with the files that the bad input names."""
    top = tmp_path_factory.mktemp("wrong")

    def leave(folder, facts, **changed):
        facts = {**facts, **changed}
        save_run(top / folder, facts, weights.get(str(facts["model_name"]), weights["mlp"]))
    for folder in ("run", "both", "alone"):
        leave(folder, FREE)
    (top / "alone" / "free8_mlp.json").unlink()
    leave("both", FREE, name="natural_mlp", method="natural")
    leave("seeds/seed0", SHEET)
    leave("seeds/seed1", SHEET)
    leave("mnist", FREE, kind="mnist", data_dir="mnist")
    leave("own", STAGE, kind="folder", data_dir="own_images", classes=["cat", "dog"], hold_out=0.5)
    leave("far", FREE, method="fast", eps=0.3)
    leave("mlp_as_cnn", FREE, model_name="cnn")
    leave("low", STAGE, defense="resizepad", low=40)
    leave("uap", {"name": "sga", "kind": "digits", "scale": 1, "model_name": ["mlp"]})
    (top / "empty").mkdir()
    (top / "other").mkdir()
    (top / "other" / "results.json").write_text("{}")
    save_pth(top / "small.pth", torch.zeros(1, 8, 8))
    for name in ("photos/n01440764", "own_images/cat", "own_images/dog"):
        (top / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(top / name / "a.png")
    return top


NONSENSE = [
    ("kind", "mnits"), ("kind", ["digits"]), ("model_name", 3),
    ("data_dir", None), ("method", "slow"), ("replays", 0), ("replays", True), ("eps", "8/255"),
    ("eps", 8), ("eps", float("nan")), ("alpha", -1), ("steps", 1e300), ("weight_steps", "many"),
    ("seconds", float("inf")), ("seconds", -1), ("image_size", 2.5)]
NONSENSE_STAGE = [
    ("classes", []), ("classes", "0123456789"), ("classes", [0, 1]),
    ("head", "fcc"), ("defense", "gmc"), ("low", "small"), ("low", 0), ("hold_out", 0),
    ("hold_out", "half"), ("given_images", -4), ("stage", "two"), ("augment", "published"),
    ("augment", [3]), ("w_fgsm", None), ("w_fgsm_target", -1)]


@pytest.mark.parametrize(("facts", "key", "value"), [
    *((FREE, *pair) for pair in NONSENSE), *((STAGE, *pair) for pair in NONSENSE_STAGE)],
    ids=lambda value: "" if isinstance(value, dict) else str(value))
def test_nonsense_in_name_json_is_reported_with_its_key(facts, key, value):
    with pytest.raises(UserError, match=f"NAME.json: {key} is "):
        finished.checked({**facts, key: value}, "NAME.json")


@pytest.mark.parametrize(("facts", "key", "value", "words"), [
    (FREE, "eps", 8, ("free8_mlp.json", "eps is 8", "train again")),
    (FREE, "model_name", "mlp9", ("mlp9", "did you mean mlp?")),
    (STAGE, "classes", ["0", "1"], ("10 classes", "of the network (2)"))])
def test_nonsense_gives_the_user_one_line(run_here, leave, refused, weights, facts, key, value,
                                          words):
    leave("run", facts, **{key: value}, state=weights[facts["model_name"]])
    refused(run_here("eval_net.py", "--runs", "run", *FEW), *words)


@pytest.mark.parametrize("key", ["eps", "steps", "kind", "seconds", "weight_steps"])
def test_a_missing_fact_is_named(run_here, leave, refused, tmp_path, key):
    facts = {name: value for name, value in FREE.items() if name != key}
    leave("run", facts)
    refused(run_here("eval_net.py", "--runs", "run", *FEW), "free8_mlp.json", f"{key} is missing")


@pytest.mark.parametrize(("text", "words"), [
    ("{", ("not JSON",)), ("\xff\x00", ("not JSON",)), ("[1]", ("does not say",)),
    ("3", ("does not say",)), ("{}", ("does not say how the network was trained",)),
    ('{"model_name": "mlp", "kind": "digits"}', ("does not say",))])
def test_an_invalid_name_json_gives_one_line(run_here, leave, refused, tmp_path, text, words):
    folder = leave("run", FREE)
    (folder / "free8_mlp.json").write_bytes(text.encode("latin-1"))
    refused(run_here("eval_net.py", "--runs", "run/free8_mlp.pth", *FEW), "free8_mlp.json", *words)


@pytest.mark.parametrize("text", [
    "model,row\n", "model,row,attack\nmlp,a,worst case\n",
    "row,attack,attack_robustness\nvanilla,worst case,many\n", "\x00",
    "model,row,attack,seconds,attack_robustness\nmlp,a,fgsm,1.0,1\nmlp,a,worst case,1.0,many\n"])
def test_a_broken_robustness_table_gives_one_line(run_here, leave, refused, tmp_path, text):
    folder = leave("stage1", STAGE)
    (folder / "gcm").mkdir()
    (folder / "gcm" / "results.csv").write_text(text)
    weights = described(folder / "stage1_cnn_bn.pth")
    command, cell = ("eval_net.py", "--runs", "stage1", *FEW, "--attacks", "none"), {
        "model": "mlp", "attack": "fgsm", "seconds": 1.0}
    for beside in ({}, {"settings": [], "cells": {}}, {
            "settings": {"network mlp": {"weights": weights}}, "cells": {"a": cell}}):
        (folder / "gcm" / "results.json").write_text(json.dumps(beside))
        done = run_here(*command)
        if done.returncode:
            refused(done, "results.csv", "not the table of gcm.py")
        else:
            assert "AR, " not in done.stdout


def test_every_required_fact_has_a_check():
    assert {key for keys in finished.NEEDED.values() for key in keys} <= finished.VALID.keys()
    assert all(finished.VALID[key](value) for facts in (FREE, STAGE, SHEET)
               for key, value in facts.items() if key in finished.VALID)


def test_the_command_runs_in_a_separate_process(run_script, leave, tmp_path):
    leave("run", FREE)
    done = run_script("eval_net.py", "--runs", "run", *FEW, "--attacks", "fgsm", "strongest_quick")
    assert done.returncode == 0, done.stderr
    assert "| free8 | 24 | 24 | 1.0 |" in done.stdout
    assert sorted(p.name for p in (tmp_path / "runs/eval_net").iterdir() if p.name[0] != ".") == [
        "results.csv", "results.json", "results.md"]
