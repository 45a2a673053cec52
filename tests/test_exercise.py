"""fgsm_mnist.py: the exercise's formulas by hand, resuming, and the whole command on digits."""

import contextlib
import csv
import gc
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SRC
from torch import nn

import fgsm_mnist
from attack_toys import pictures, predicted, toy
from attacks import fgs_step, fgsm, fgv, fgv_step, strongest_quick
from utils import models
from utils.data import load, open_images
from utils.exercise import settle
from utils.measure import share
from utils.report_mnist import _read_log, suspicions, table

CPU = torch.device("cpu")
SMALL = ("--num_images", 120, "--epochs", 2, "--eval_images", 20, "--queries", 5, "--device", "cpu",
         "--curve_images", 10)


# ----------------------------------------------------------------- the formulas

@pytest.mark.parametrize("name", ["fgs", "fgv"])
def test_the_joint_step_is_the_sum_of_two_gradients_computed_separately(name):
    model, x = toy(torch.float64).requires_grad_(True), pictures(5, torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0])
    step = {"fgs": lambda x, g: fgs_step(x, g, 0.3), "fgv": lambda x, g: fgv_step(x, g, 0.6)}[name]
    losses = fgsm_mnist.joint_gradient(model, x, y, step)
    found = [p.grad.clone() for p in model.parameters()]
    attack = {"fgs": lambda: fgsm(model, x, y, eps=0.3), "fgv": lambda: fgv(model, x, y, alpha=0.6)}
    x_adv = attack[name]()
    total = [0, 0]
    for i, images in enumerate((x, x_adv)):
        loss = F.cross_entropy(model(images), y)
        total[i] = loss.item()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found = [f - g for f, g in zip(found, gradients, strict=True)]
    assert max(f.abs().max() for f in found) < 1e-7
    assert [loss.item() for loss in losses] == pytest.approx(total, abs=1e-9)
    assert not torch.equal(x, x_adv)


def test_the_joint_step_takes_two_backward_passes_and_not_three(monkeypatch):
    model, passes = toy(torch.float64).requires_grad_(True), []
    real = torch.autograd.graph._engine_run_backward
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward",
                        lambda *a, **k: passes.append(1) or real(*a, **k))
    monkeypatch.setattr(torch.autograd, "_engine_run_backward",
                        torch.autograd.graph._engine_run_backward)
    x, y = pictures(3, torch.float64), torch.tensor([0, 1, 2])
    fgsm_mnist.joint_gradient(model, x, y, lambda x, g: fgs_step(x, g, 0.3))
    assert len(passes) == 2
    fgsm_mnist.joint_gradient(model, x, y, lambda x, g: fgs_step(x, g, 0.3), label="predicted")
    assert len(passes) == 5


def exercise(*flags, train="fgs"):
    """The training for these flags on ten digits, before its first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fgsm_mnist.py", "--num_images", "10", "--train", train,
                                    *flags])
        s, images, test = settle(fgsm_mnist.get_args())
    return fgsm_mnist.ExerciseTraining(s, images, test, None, 0, CPU)


def test_sgd_takes_the_step_of_the_sheet_along_the_sum_of_both_gradients():
    training = exercise("--optimizer", "sgd", "--lr", "0.25", "--alpha_fgs", "0.1")
    x, y = fgsm_mnist.batch(training.images, torch.arange(6), CPU)
    before = [p.detach().clone() for p in training.model.parameters()]
    x_adv = fgsm(training.model, x, y, eps=0.1)
    for k in range(2):  # the second step shows that the first leaves nothing, such as momentum
        if k:
            x_adv = fgsm(training.model, x, y, eps=0.1)
        params = list(training.model.parameters())
        clean, adv = (torch.autograd.grad(F.cross_entropy(training.model(images), y), params)
                      for images in (x, x_adv))
        wanted = [p.detach() - 0.25 * (g + g_adv)
                  for p, g, g_adv in zip(params, clean, adv, strict=True)]
        training.step(x, y)
        assert max((p - w).abs().max() for p, w in zip(params, wanted, strict=True)) < 1e-6
    assert max((p - b).abs().max() for p, b in zip(params, before, strict=True)) > 1e-3


def test_adam_gets_the_sum_of_both_gradients():
    """Its first step is lr times the sign of the gradient, wherever that is far from zero."""
    training = exercise("--alpha_fgs", "0.1")
    x, y = fgsm_mnist.batch(training.images, torch.arange(6), CPU)
    params = list(training.model.parameters())
    before = [p.detach().clone() for p in params]
    x_adv = fgsm(training.model, x, y, eps=0.1)
    total = [a + b for a, b in zip(*(torch.autograd.grad(
        F.cross_entropy(training.model(images), y), params) for images in (x, x_adv)), strict=True)]
    training.step(x, y)
    seen = 0
    for p, b, g in zip(params, before, total, strict=True):
        far = g.abs() > 1e-4
        assert torch.allclose((b - p.detach())[far], 1e-3 * g.sign()[far], atol=1e-6)
        seen += int(far.sum())
    assert seen > 1000


@pytest.mark.parametrize("name", ["clean", "noise", "fgs", "fgv"])
def test_each_choice_of_train_adds_its_images_to_the_clean_batch(name):
    training = exercise("--alpha_fgs", "0.1", "--alpha_fgv", "0.2", train=name)
    x, seen = torch.rand(4, 1, 28, 28), []
    g = torch.randn(x.shape)
    state = training.generator.get_state()
    wanted = {
        "clean": lambda: None, "fgs": lambda: fgs_step(x, g, 0.1),
        "fgv": lambda: fgv_step(x, g, 0.2), "noise": lambda: fgsm_mnist.noise_step(
            x, 0.1, torch.Generator().manual_seed(0))}[name]()
    if name == "clean":
        assert training.adversary is None
        return
    assert torch.equal(training.adversary(x, g), wanted)
    assert torch.equal(training.generator.get_state(), state) is (name != "noise")
    training.adversary = lambda x, g: seen.append(g) or x  # this is what a step uses
    training.step(x, torch.tensor([0, 1, 2, 3]))
    assert seen[0].shape == x.shape


@pytest.mark.parametrize(("train", "label"), [("clean", "true"), ("noise", "true"),
                                              ("fgs", "predicted"), ("fgv", "predicted")])
def test_the_predicted_label_is_ignored_if_nothing_is_attacked(train, label, capsys):
    training = exercise("--label", "predicted", train=train)
    assert training.s.label == label
    assert ("left out" in capsys.readouterr().out) is (label == "true")


def test_each_optimiser_has_its_own_default_lr():
    assert exercise().s.lr == 0.001
    assert exercise("--optimizer", "sgd").s.lr == 0.05
    assert exercise("--optimizer", "sgd", "--lr", "0").s.lr == 0


def test_the_curve_measures_pgd_40_on_its_own_images_and_leaves_the_rng_alone(tmp_path):
    """The same figure as after the training, and the same network with and without it."""
    training = exercise(train="clean")
    training.model.eval()
    assert "pgd40" not in training.after()
    training.watched = training.test.prepared(training.test.size, 20)
    state = training.generator.get_state()
    found = training.after()["pgd40"]
    again = fgsm_mnist.stronger(training.model, training.watched, training.s, CPU)["pgd40"]
    assert found == again["value"] and again["n"] > 0
    assert torch.equal(state, training.generator.get_state())


def test_the_curve_measures_the_network_in_evaluation_mode():
    training = exercise("--batch_norm")
    training.watched = training.test.prepared(training.test.size, 20)
    training.model.train()
    found = training.after()
    assert not training.model.training
    assert found == {name: one["value"] for name, one in {
        **fgsm_mnist.accuracies(training.model, training.test, training.s, CPU),
        **fgsm_mnist.stronger(training.model, training.watched, training.s, CPU, "pgd40")}.items()}


def test_an_attack_on_the_predicted_label_does_not_use_the_true_one():
    model, x = toy(torch.float64).requires_grad_(True), pictures(4, torch.float64)
    seen = {}
    predicted = model(x).argmax(1)
    wrong = (predicted + 1) % 5
    for label in ("true", "predicted"):
        fgsm_mnist.joint_gradient(
            model, x, wrong, lambda x, g, label=label: seen.setdefault(label, fgs_step(x, g, 0.1)),
            label=label)
    assert torch.equal(seen["predicted"], fgsm(model, x, predicted, eps=0.1))
    assert torch.equal(seen["true"], fgsm(model, x, wrong, eps=0.1))
    assert not torch.equal(seen["true"], seen["predicted"])


def test_fgv_changes_the_pixel_of_the_largest_gradient_by_exactly_alpha_before_clipping():
    g = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 1e-6
    x = torch.full_like(g, 0.5)  # so far from 0 and 1 that nothing is clipped
    change = fgv_step(x, g, 0.4) - x
    assert torch.allclose(change.flatten(1).abs().amax(1), torch.full((6,), 0.4), atol=1e-7)
    ratio = change / g
    assert torch.allclose(ratio.flatten(1).amin(1), ratio.flatten(1).amax(1), rtol=1e-2)


def test_noise_is_plus_or_minus_alpha_before_clipping():
    x = torch.full((4, 1, 28, 28), 0.5)
    change = fgsm_mnist.noise_step(x, 0.3, torch.Generator().manual_seed(0)) - x
    assert torch.allclose(change.abs(), torch.full_like(x, 0.3), atol=1e-7)
    assert 0.4 < (change > 0).float().mean() < 0.6
    assert len({tuple(one.flatten().tolist()) for one in change}) == 4
    x = torch.tensor([0.1, 0.9]).view(1, 1, 1, 2).expand(50, 1, 1, 2)
    values = fgsm_mnist.noise_step(x, 0.3, torch.Generator().manual_seed(0)).unique()
    assert torch.allclose(values, torch.tensor([0, 0.4, 0.6, 1]), atol=1e-6)


def strengths(alpha_fgs, alpha_fgv):
    return SimpleNamespace(alpha_fgs=alpha_fgs, alpha_fgv=alpha_fgv)


class Ramp(nn.Module):
    """Two classes, told apart by whether the only pixel is over one half."""

    def forward(self, x):
        z = x.flatten(1) - 0.5
        return torch.cat([-z, z], 1)


def test_the_adversarial_accuracy_counts_only_images_classified_correctly_before():
    """Five pixels: right and far, right and near (two), wrong (two); a step of 0.2 moves them."""
    pixels = torch.tensor([255, 140, 120, 200, 10], dtype=torch.uint8).view(5, 1, 1, 1)
    labels = torch.tensor([1, 1, 0, 0, 1])  # the last two are wrong before

    class Five(SimpleNamespace):
        def __len__(self):
            return 5
    images = Five(pixels=pixels, labels=labels)
    found = fgsm_mnist.accuracies(Ramp(), images, strengths(0.2, 0.02), CPU)
    assert (found["clean"]["k"], found["clean"]["n"]) == (3, 5)
    assert (found["fgs"]["k"], found["fgs"]["n"]) == (1, 3)
    assert (found["fgv"]["k"], found["fgv"]["n"]) == (3, 3)
    for name, k in (("fgs", 1), ("fgv", 3)):
        assert (found[f"{name}_adv_acc"]["k"], found[f"{name}_adv_acc"]["n"]) == (k, 5)


def test_images_that_an_attack_corrects_count_in_its_accuracy_over_all_images():
    """A network whose slope points the wrong way near one half: the wrong image becomes right."""
    class Reads(nn.Module):
        def forward(self, x):
            z = x.flatten(1) - 0.5
            return torch.cat([-z, z], 1) * torch.where(z.abs() < 0.15, -1, 1)
    pixels = torch.tensor([115, 140, 120], dtype=torch.uint8).view(3, 1, 1, 1)

    class Three(SimpleNamespace):
        def __len__(self):
            return 3
    images = Three(pixels=pixels, labels=torch.tensor([1, 0, 0]))
    found = fgsm_mnist.accuracies(Reads(), images, strengths(0.2, 0.2), CPU)
    assert found["clean"] == share(2, 3) and found["fgs"] == share(2, 2)
    assert found["fgs_adv_acc"] == share(3, 3)


def test_the_accuracies_equal_those_of_the_attacks_one_image_at_a_time():
    images = load(open_images("digits", split="test").prepared(28, 30), workers=0)
    model = models.freeze(models.trainable("lenet_bn", kind="digits", seed=3))
    found = fgsm_mnist.accuracies(model, images, strengths(0.1, 0.3), CPU)
    right, left = 0, [0, 0]
    for k in range(30):
        x, y = images.pixels[k:k + 1] / 255, images.labels[k:k + 1]
        if model(x).argmax() == y:
            right += 1
            for i, x_adv in enumerate((fgsm(model, x, y, eps=0.1), fgv(model, x, y, alpha=0.3))):
                left[i] += int(model(x_adv).argmax() == y)
    assert found["clean"]["k"] == right > 0
    assert [found["fgs"]["k"], found["fgv"]["k"]] == left


def test_the_strongest_attack_of_the_exercise_is_that_of_all_scripts():
    """Plain DLR in place of its APGD-T fools one image fewer."""
    class Twelve(SimpleNamespace):
        def __len__(self):
            return 12
    model, pixels = toy(), (255 * pictures(12)).round().to(torch.uint8)
    x = pixels / 255
    images = Twelve(pixels=pixels, labels=predicted(model, x))
    found = fgsm_mnist.stronger(model, images, SimpleNamespace(alpha_fgs=0.06, queries=30), CPU)
    x_adv = strongest_quick(model, x, images.labels, eps=0.06, queries=30)
    left = int((predicted(model, x_adv) == images.labels).sum())
    shown = found["strongest_quick"]
    assert 0 < left < 12 and (shown["k"], shown["n"]) == (left, 12)


def test_suspicious_figures_are_reported():
    fine = {"clean": 0.98, "fgs": 0.9, "fgv": 0.8, "pgd40": 0.7, "strongest_quick": 0.6}
    named = dict(zip(fine, ("clean", "FGS", "FGV", "PGD-40", "APGD-CE + Square 5"), strict=True))
    assert not suspicions(fine, named)
    for weak in ("pgd40", "strongest_quick"):
        (what, figures), = suspicions(fine | {weak: 0.05}, named)
        assert what == "catastrophic overfitting"
        assert "under FGS 90.0 %" in figures and f"under {named[weak]} 5.0 %" in figures
    assert not suspicions(fine | {"fgs": 0.4, "pgd40": 0.0}, named)
    assert not suspicions(fine | {"fgs": 0.99, "fgs_adv_acc": 0.975}, named)  # of those right
    assert suspicions(fine | {"fgs_adv_acc": 0.99}, named) == [
        ("label leaking", "of all images, 99.0 % are right under FGS, 98.0 % without it")]
    assert len(suspicions(fine | {"fgs_adv_acc": 0.99, "fgv_adv_acc": 0.99, "pgd40": 0.0},
                          named)) == 3


def test_the_table_names_the_protocol_and_suspicious_figures():
    facts = {"variation": "fgs", "kind": "mnist", "epochs": 3, "alpha_fgs": 0.3, "alpha_fgv": 0.6,
             "label": "true", "num_images": 60000, "test_images": 1000, "attacked": 1000,
             "device": "cpu", "strongest_quick": "APGD-CE + APGD-T + Square 1000",
             "optimizer": "sgd, lr 0.1"}
    counts = {"clean": 980, "fgs": 853, "fgv": 500, "pgd40": 95, "strongest_quick": 17}
    text = table([(facts, [{"seed": 0, "seconds": 7.4, **{
        name: share(k, 1000) for name, k in counts.items()}}])])
    assert "training images: 60000" in text and "n=1000 test images" in text
    assert "optimizer: sgd, lr 0.1;" in text
    assert "| fgs | 98.0 (96.9-98.7) | 85.3 (83.0-87.4) |" in text and text.count("| 7 |") == 1
    assert ("catastrophic overfitting: fgs, seed 0: accuracy under FGS 85.3 %, under PGD-40 9.5 %, "
            "under APGD-CE + APGD-T + Square 1000 1.7 %\n") in text
    assert "| PGD-40 | APGD-CE + APGD-T + Square 1000 | s |" in text


def test_a_log_begun_by_an_older_version_can_be_read(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,clean,fgs_adv_acc\n1,0.5,\n2,0.75,0.25\n")
    assert _read_log(tmp_path) == [{"epoch": 1, "clean": 0.5},
                                   {"epoch": 2, "clean": 0.75, "fgs_adv_acc": 0.25}]


def test_batchnorm_comes_after_every_layer_but_the_last():
    for name, count in (("lenet", 0), ("lenet_bn", 3)):
        net = models.trainable(name, kind="mnist")[1]
        norms = [isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) for layer in net]
        assert sum(norms) == count
        learns = [isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in net]
        assert sum(learns) == 4
        if count:
            assert [norms[i + 1] for i, layer in enumerate(learns[:-1]) if layer] == [True] * 3
        assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# ---------------------------------------------------------------------- a run

def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def command(folder, *flags):
    """Run fgsm_mnist.py with these flags, in this process. -> what it prints"""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["fgsm_mnist.py", *map(str, (*SMALL, *flags))])
        fgsm_mnist.main(fgsm_mnist.get_args())
    gc.collect()  # frees the locks on its folders
    return said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with runs in runs/digits_fgs (two seeds, in a separate process) and in clean."""
    folder = tmp_path_factory.mktemp("exercise")
    done = subprocess.run(
        [sys.executable, str(SRC / "fgsm_mnist.py"), *map(str, SMALL), "--seeds", "2"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    command(folder, "--train", "clean", "--save", "clean")
    return folder


@pytest.mark.slow
def test_the_files_of_the_whole_command_on_digits_agree(finished):
    folder = finished / "runs" / "digits_fgs"
    log = rows(folder / "seed0" / "log.csv")
    assert [row["epoch"] for row in log] == ["1", "2"]
    printed = (finished / "printed.txt").read_text()
    for seed in range(2):
        curve = [float(row["pgd40"]) for row in rows(folder / f"seed{seed}" / "log.csv")]
        best = max(curve)
        assert (f"| fgs | {seed} | {100 * best:.1f} | {1 + curve.index(best)} "
                f"| {100 * curve[-1]:.1f} |") in printed
    saved = json.loads((folder / "results.json").read_text())
    assert [one["seed"] for one in saved["seeds"]] == [0, 1]
    assert saved["seeds"][0]["clean"]["value"] == pytest.approx(float(log[-1]["clean"]), abs=1e-6)
    values = [100 * one["clean"]["value"] for one in saved["seeds"]]
    wanted = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert f"| fgs | {wanted} |" in (finished / "printed.txt").read_text()
    under = [(row["metric"], row["under"]) for row in rows(folder / "results.csv")]
    assert under == 2 * [("clean_acc", "none"), *(("attack_robustness", name) for name in (
        "FGS", "FGV", "PGD-40", "APGD-CE + APGD-T + Square 5"))]
    assert "| PGD-40 | APGD-CE + APGD-T + Square 5 | s |" in (finished / "printed.txt").read_text()
    facts = json.loads((folder / "seed1" / "fgs.json").read_text())
    model = models.load_model(facts["model_name"], weights=str(folder / "seed1" / "fgs.pth"),
                              kind="digits")
    test = load(open_images("digits", split="test"), workers=0)
    right = sum(int((model(x / 255).argmax(1) == y).sum()) for x, y in zip(
        test.pixels.split(50), test.labels.split(50), strict=True))
    assert right == saved["seeds"][1]["clean"]["k"]


@pytest.mark.slow
def test_the_examples_are_right_before_and_attacked_in_one_step(finished):
    with np.load(finished / "clean" / "examples.npz") as file:
        x, seen, y = torch.from_numpy(file["x"]), file["seen"], torch.from_numpy(file["y"])
    model = models.load_model("lenet", weights=str(finished / "clean" / "seed0" / "clean.pth"),
                              kind="digits")
    assert len(x) == 3 and 0 < len(y) <= 6 and (seen[0] == y.numpy()).all()
    assert torch.equal(x[1], fgsm(model, x[0], y, eps=0.3))
    assert torch.allclose(x[2], fgv(model, x[0], y, alpha=0.6), atol=1e-6)
    for kind in range(3):
        assert (model(x[kind]).argmax(1).numpy() == seen[kind]).all()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--train", "clean"), ("--train", "noise", "--batch_norm"),
                                   ("--train", "fgv", "--label", "predicted")], ids=str)
def test_every_variation_resumes_to_the_same_bytes(finished, tmp_path, flags):
    whole = finished / "clean"
    if "clean" not in flags:
        whole = tmp_path / "whole"
        command(tmp_path, *flags, "--save", whole)
    real, calls = fgsm_mnist.ExerciseTraining.one_pass, []

    class Killed(BaseException):
        """Stands for SIGKILL: the script must not catch it."""

    def killing(self, bar):
        if calls:
            raise Killed
        calls.append(1)
        return real(self, bar)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fgsm_mnist.ExerciseTraining, "one_pass", killing)
        with pytest.raises(Killed):
            command(tmp_path, *flags, "--save", "killed")
    gc.collect()
    assert len(rows(tmp_path / "killed" / "seed0" / "log.csv")) == 1
    command(tmp_path, *flags, "--save", "killed", "--resume")
    name, = (path.name for path in (whole / "seed0").glob("*.pth") if path.stem != "checkpoint")
    for file in (f"seed0/{name}", "examples.npz", "results.csv"):
        assert (tmp_path / "killed" / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.slow
def test_the_summary_puts_variations_into_one_table(run_here, refused, finished, tmp_path):
    clean, fgs = finished / "clean", finished / "runs" / "digits_fgs"
    done = run_here("fgsm_mnist.py", "--summary", clean, fgs, "--save", "summary")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines[0].startswith("| trained on | seeds | clean |")
    assert "deviation of the seeds, of one seed its 95 % Wilson interval; s:" in done.stdout
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| clean", "1"], ["| fgs", "2"]]
    assert [line[:11] for line in lines[6:]] == ["| clean | 0", "| fgs | 0 |", "| fgs | 1 |"]
    assert len(rows(tmp_path / "summary" / "summary.csv")) == 5 + 2 * 5
    assert (tmp_path / "summary" / "curves.png").read_bytes().startswith(b"\x89PNG")
    refused(run_here("fgsm_mnist.py", "--summary", "nothing"), "no finished run")
    weak = tmp_path / "weak"
    shutil.copytree(fgs, weak)
    refused(run_here("fgsm_mnist.py", "--summary", fgs, weak), "is called fgs too")
    refused(run_here("figures.py", "--exercise", fgs, weak), "is called fgs too")
    saved = (weak / "results.json").read_text()
    assert saved.count('"label": "true"') == 1
    (weak / "results.json").write_text(saved.replace('"label": "true"', '"label": "predicted"'))
    done = run_here("fgsm_mnist.py", "--summary", fgs, weak, "--save", "labels")
    assert done.returncode == 0, done.stderr
    assert "label in training: true or predicted" in done.stdout
    assert "deviation of 2 seeds; s:" in done.stdout and "| trained on | clean |" in done.stdout
    for row in ("| fgs |", "| fgs (predicted) |", "| fgs | 1 |", "| fgs (predicted) | 1 |"):
        assert row in done.stdout
    (weak / "results.json").write_text(saved.replace('"alpha_fgs": 0.3', '"alpha_fgs": 0.1'))
    refused(run_here("fgsm_mnist.py", "--summary", clean, weak), "has alpha_fgs 0.1")
    (weak / "results.json").write_text(saved.replace("adam, lr 0.001", "sgd, lr 0.1"))
    refused(run_here("fgsm_mnist.py", "--summary", clean, weak), "has optimizer sgd, lr 0.1")
    for key in ("test_images", "attacked", "batch_size"):
        changed = json.loads(saved)
        changed["facts"][key] += 1
        (weak / "results.json").write_text(json.dumps(changed))
        refused(run_here("fgsm_mnist.py", "--summary", clean, weak), f"has {key} ")
    saved = json.loads(saved)
    assert saved["facts"].pop("batch_size") == 128
    for one in saved["seeds"]:
        assert 0 <= one.pop("fgs_adv_acc")["value"] <= 1 and one.pop("fgv_adv_acc")
    assert saved["facts"].pop("optimizer") == "adam, lr 0.001"
    assert saved["facts"].pop("strongest_quick") == "APGD-CE + APGD-T + Square 5"
    (weak / "results.json").write_text(  # of a run before it was recorded, by its older name
        json.dumps(saved).replace('"strongest_quick"', '"strongest"'))
    assert "| APGD-CE + APGD-DLR + Square |" in run_here("fgsm_mnist.py", "--summary", weak).stdout
    refused(run_here("fgsm_mnist.py", "--summary", clean, weak),
            "has strongest_quick APGD-CE + APGD-DLR + Square, ")


def test_the_shell_script_takes_a_folder_with_a_space_in_its_name(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nfor a; do printf "%s|" "$a"; done >> said\n'
                                     'echo >> said\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["sh", str(SRC / "train_mnist.sh"), "--seeds", "2"], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHON": str(tmp_path / "python"), "RUNS": "a b",
                        "TRAIN": "clean fgs"})
    *_, line = (tmp_path / "said").read_text().splitlines()
    assert line.endswith("--summary|a b/clean|a b/fgs|a b/clean_bn|a b/fgs_bn|--save|a b|")


def test_the_table_of_fifty_epochs_has_the_seeds_that_exist(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> said\n')
    (tmp_path / "python").chmod(0o755)
    for name in ("clean/seed0", "clean_bn/seed0", "clean_bn/seed10"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    subprocess.run(["sh", str(ROOT / "docs/results/mnist_fifty/run.sh"), "--seeds", "1"],
                   cwd=tmp_path, check=True, env={**os.environ, "RUNS": "runs", "TRAIN": "clean",
                                                  "PYTHON": str(tmp_path / "python"), "SGD": ""})
    *_, line = (tmp_path / "said").read_text().splitlines()
    assert "--runs runs/clean/seed0 runs/clean_bn/seed0 runs/clean_bn/seed10 --num" in line


# ------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("flags", "words"), [
    (("--train", "pgd"), ("invalid choice",)), (("--alpha_fgs", 3), ("outside (0, 1]",)),
    (("--data_dir", "nowhere"), ("nowhere",)), (("--num_images", 1), ("two at least",)),
    (("--batch_size", 1), ("--batch_size",)), (("--optimizer", "lion"), ("invalid choice",)),
    (("--curve_images", -1), ("--curve_images",))], ids=str)
def test_bad_input_gives_one_line(run_here, refused, flags, words):
    refused(run_here("fgsm_mnist.py", *SMALL, *flags), *words)


def test_a_loss_that_is_not_a_number_stops_the_run(run_here, refused, monkeypatch):
    monkeypatch.setattr(fgsm_mnist.ExerciseTraining, "one_pass",
                        lambda self, bar: {"loss": float("nan"), "loss_joined": 0.0})
    refused(run_here("fgsm_mnist.py", *SMALL), "epoch 1", "--lr")


def test_a_checkpoint_made_with_other_flags_is_refused(run_here, refused, finished):
    refused(run_here("fgsm_mnist.py", *SMALL, "--save", finished / "runs" / "digits_fgs",
                     "--batch_norm", "--resume"), "--batch_norm")
