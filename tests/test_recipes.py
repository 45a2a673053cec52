"""Recipes of papers in free_at.py: their learning rates, weight decay and network, by hand."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import free_at
from utils import models, recipes
from utils.data import CIFAR10, Images, imagenet_classes, paper_geometry
from utils.errors import UserError
from utils.nets import Standardize, WideUnit
from utils.team import Team

CPU = torch.device("cpu")
PUBLISHED = {  # data and --recipe: images, weight steps, passes, {weight step: learning rate}
    ("cifar10", "free"): (50_000, 80_000, 26, {
        0: 0.1, 39_999: 0.1, 40_000: 0.01, 59_999: 0.01, 60_000: 0.001, 79_999: 0.001}),
    ("cifar100", "free"): (50_000, 80_000, 26, {
        0: 0.1, 39_999: 0.1, 40_000: 0.01, 59_999: 0.01, 60_000: 0.001, 79_999: 0.001}),
    ("cifar10", "madry"): (50_000, 80_000, 205, {
        0: 0.1, 39_999: 0.1, 40_000: 0.01, 59_999: 0.01, 60_000: 0.001, 79_999: 0.001}),
    ("cifar10", "fast_adversarial"): (50_000, 10 * 391 * 8, 10, {
        0: 0.0, 391 * 8 // 2: 0.004, 391 * 20: 0.02, 391 * 40: 0.04, 391 * 60: 0.02,
        391 * 80: 0.0}),
    ("imagenet", "free"): (1_281_167, 23 * 5005 * 4, 23, {  # a tenth every ceil(30 / 4) passes
        0: 0.1, 8 * 5005 * 4 - 1: 0.1, 8 * 5005 * 4: 0.01, 16 * 5005 * 4 - 1: 0.01,
        16 * 5005 * 4: 0.001, 23 * 5005 * 4 - 1: 0.001})}


def named(kind, n):
    """n images of one kind in name only."""
    names, labels = ("x",) * n, torch.zeros(n, dtype=torch.int64)
    if kind in ("imagenet", "folder"):
        classes = imagenet_classes() if kind == "imagenet" else ("ape", "bee")
        return Images(kind, names, labels, classes, paper_geometry(224), root=Path("nowhere"))
    classes = CIFAR10 if kind == "cifar10" else tuple(map(str, range(100)))
    return Images(kind, names, labels, classes, paper_geometry(32),
                  pixels=torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(n, -1, -1, -1))


@pytest.fixture
def settle(monkeypatch):
    """settle(kind, n, *flags): settings and images for these flags, on n images of this kind."""
    def make(kind, n, *flags):
        images = named(kind, n)
        monkeypatch.setattr(sys, "argv", ["free_at.py", "--data_dir", kind, "--amp", "off",
                                          *map(str, flags)])
        monkeypatch.setattr(recipes, "opened", lambda *args: images)
        monkeypatch.setattr(recipes, "unseen", lambda *args, **more: (images, False))
        return recipes.settle(free_at.get_args(), Team(), CPU)
    return make


@pytest.mark.parametrize(("kind", "recipe"), PUBLISHED)
def test_steps_passes_and_learning_rates_are_the_published_ones(settle, monkeypatch, kind, recipe):
    n, total, passes, rates = PUBLISHED[kind, recipe]
    s, images = settle(kind, n, "--recipe", recipe)
    monkeypatch.setattr(free_at.models, "trainable", lambda *args, **more: nn.Linear(2, 2))
    training = free_at.FreeTraining(s, images, Team(), CPU)
    assert (training.total, training.passes) == (total, passes)
    for step, rate in rates.items():
        found = s.lr * recipes.rate(step, total, s.schedule, passes)
        assert found == pytest.approx(rate, abs=1e-9), step


@pytest.mark.parametrize(("kind", "recipe", "wanted"), [
    ("cifar10", "free", {
        "model_name": "wrn_32_10", "method": "free", "replays": 8, "eps": 8 / 255,
        "alpha": 8 / 255, "batch_size": 128, "momentum": 0.9, "weight_decay": 2e-4,
        "decay": "weights", "clip_delta": "ball", "shift": 2, "epochs": None}),
    ("cifar100", "free", {
        "model_name": "wrn_32_10", "method": "free", "replays": 8, "eps": 8 / 255,
        "alpha": 8 / 255, "batch_size": 128, "weight_decay": 2e-4, "decay": "weights", "shift": 2}),
    ("cifar10", "madry", {
        "model_name": "wrn_32_10", "method": "pgd", "steps": 7, "eps": 8 / 255, "alpha": 2 / 255,
        "batch_size": 128, "weight_decay": 2e-4, "decay": "weights"}),
    ("cifar10", "fast_adversarial", {
        "model_name": "preact_resnet18", "method": "free", "replays": 8, "eps": 8 / 255,
        "alpha": 8 / 255, "batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4,
        "decay": "all", "clip_delta": "box", "shift": 4}),
    ("imagenet", "free", {
        "model_name": "resnet50", "method": "free", "replays": 4, "eps": 4 / 255,
        "alpha": 4 / 255, "batch_size": 256, "momentum": 0.9, "weight_decay": 1e-4,
        "decay": "all", "clip_delta": "ball", "epochs": 90})])
def test_the_settings_are_the_published_ones(settle, kind, recipe, wanted):
    s, _ = settle(kind, 1000, "--recipe", recipe)
    assert {flag: getattr(s, flag) for flag in wanted} == wanted


def test_a_flag_overrides_the_recipe(settle):
    s, _ = settle("cifar10", 1000, "--recipe", "free", "--replays", 2, "--lr", 0.0, "--schedule",
                  "triangle", "--decay", "all", "--clip_delta", "box", "--eps", "4/255",
                  "--model_name", "cnn_bn", "--epochs", 3, "--batch_size", 50, "--shift", 0)
    assert (s.replays, s.lr, s.schedule, s.decay, s.clip_delta, s.eps, s.alpha, s.model_name,
            s.epochs, s.weight_steps, s.batch_size, s.shift) == (
                2, 0.0, "triangle", "all", "box", 4 / 255, 4 / 255, "cnn_bn", 3, None, 50, 0)
    assert s.weight_decay == 2e-4
    s, _ = settle("cifar10", 1000, "--recipe", "madry", "--method", "natural", "--weight_steps", 9)
    assert (s.method, s.model_name, s.weight_steps, s.epochs) == ("natural", "wrn_32_10", 9, None)
    s, _ = settle("cifar10", 1000, "--recipe", "fast_adversarial", "--weight_steps", 9)
    assert (s.weight_steps, s.epochs) == (9, None)


def test_without_a_recipe_the_presets_are_used(settle):
    s, _ = settle("cifar10", 1000)
    assert (s.method, s.replays, s.clip_delta, s.steps, s.schedule, s.decay, s.weight_steps,
            s.epochs, s.lr, s.weight_decay, s.model_name, s.shift) == (
                "free", 8, "ball", 7, "step", "all", None, 80, 0.1, 5e-4, "preact_resnet18", 4)
    for method, alpha in (("fast", 10 / 255), ("pgd", 2 / 255), ("free", 8 / 255)):
        s, _ = settle("cifar10", 1000, "--method", method)
        assert s.alpha == pytest.approx(alpha)


def test_the_step_of_pgd_scales_with_a_given_radius(settle):
    for kind, eps, alpha in (("cifar10", 4 / 255, 1 / 255), ("imagenet", 8 / 255, 2 / 255)):
        s, _ = settle(kind, 1000, "--method", "pgd", "--eps", eps)
        assert s.alpha == pytest.approx(alpha)
        s, _ = settle(kind, 1000, "--method", "pgd", "--eps", eps, "--alpha", 0.5)
        assert s.alpha == 0.5
    for name, preset in recipes.FREE_PRESETS.items():  # to the last bit: an old run resumes
        if name not in ("digits", "mnist"):
            assert settle(name, 1000, "--method", "pgd", "--eps", preset["eps"])[0].alpha == (
                preset["alpha"])


@pytest.mark.parametrize(("kind", "flags"), [("folder", ()), ("cifar10", ("--augment", "off"))])
def test_a_shift_that_would_have_no_effect_is_refused(settle, kind, flags):
    with pytest.raises(UserError, match="--shift 2: only CIFAR"):
        settle(kind, 1000, "--shift", 2, *flags)


def test_cifar100_has_the_preset_of_cifar10_and_class_folders_that_of_imagenet_on_resnet18(settle):
    flags = ("eps", "alpha", "model_name", "epochs", "batch_size", "lr", "weight_decay", "replays")
    (a, _), (b, _) = (settle(kind, 1000) for kind in ("cifar10", "cifar100"))
    assert [getattr(a, flag) for flag in flags] == [getattr(b, flag) for flag in flags]
    (own, images), (net, _) = (settle(kind, 1000) for kind in ("folder", "imagenet"))
    assert (own.eps, own.alpha, own.epochs, own.weight_decay) == (
        net.eps, net.alpha, net.epochs, net.weight_decay)
    assert (own.model_name, own.image_size, images.size) == ("resnet18", 224, 224)
    assert own.lr / own.batch_size == net.lr / net.batch_size


def test_photographs_have_the_given_size(settle):
    for kind in ("folder", "imagenet"):
        s, images = settle(kind, 1000, "--image_size", 64, "--model_name", "preact_resnet18")
        assert (s.image_size, images.geometry) == (64, paper_geometry(64))


@pytest.mark.parametrize(("flags", "words"), [
    (("--recipe", "madry"), ("--recipe madry", "published for cifar10, not for digits", "leave")),
    (("--recipe", "free"), ("published for cifar10, cifar100, imagenet, not for digits",)),
    (("--recipe", "trades"), ("trades", "fast_adversarial")),
    (("--epochs", 2, "--weight_steps", 5), ("--epochs 2 --weight_steps 5", "one of the two"))],
    ids=str)
def test_a_meaningless_recipe_gives_one_line(run_here, refused, tmp_path, flags, words):
    refused(run_here("free_at.py", "--num_images", 50, *flags), *words)
    assert not (tmp_path / "runs").exists()


def test_an_error_in_the_training_images_is_not_taken_for_a_missing_test_split(settle, monkeypatch):
    _, images = settle("imagenet", 1000)

    def broken(*args):
        raise UserError("broken")
    monkeypatch.setattr(recipes, "unseen", broken)
    with pytest.raises(UserError, match="broken"):
        recipes.held_out(images, free_at.get_args())


# -------------------------------------------------------------------- weight steps

def test_weight_decay_of_weights_leaves_batch_norm_and_biases_alone(settle, monkeypatch):
    made = models.trainable("cnn_bn", kind="cifar10")
    monkeypatch.setattr(free_at.models, "trainable", lambda *args, **more: made)
    for recipe, others in (("madry", 0.0), ("fast_adversarial", 5e-4)):
        s, images = settle("cifar10", 1000, "--recipe", recipe, "--model_name", "cnn_bn")
        training = free_at.FreeTraining(s, images, Team(), CPU)
        decay = {id(p): group["weight_decay"] for group in training.optimizer.param_groups
                 for p in group["params"]}
        wanted = {}
        for layer in made.modules():
            kernel = isinstance(layer, (nn.Conv2d, nn.Linear))
            for name, p in layer.named_parameters(recurse=False):
                wanted[id(p)] = s.weight_decay if kernel and name == "weight" else others
        assert decay == wanted and len(set(decay.values())) == (2 if recipe == "madry" else 1)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def lrs(monkeypatch):
    """The learning rates of all weight steps."""
    found, real = [], free_at.FreeTraining.step

    def spying(self, x, y):
        real(self, x, y)
        found.append(self.optimizer.param_groups[0]["lr"])
    monkeypatch.setattr(free_at.FreeTraining, "step", spying)
    return found


def test_the_thirds_schedule_counts_passes_over_the_images(run_here, lrs):
    done = run_here("free_at.py", "--num_images", 96, "--batch_size", 32, "--replays", 2, "--lr",
                    0.01, "--epochs", 9, "--schedule", "thirds", "--guard", "off", "--device",
                    "cpu", "--save", "run")
    assert done.returncode == 0, done.stderr
    assert "5 passes (rounded up), 30 weight steps" in done.stdout
    assert lrs == pytest.approx([1e-2] * 12 + [1e-3] * 12 + [1e-4] * 6)


@pytest.mark.parametrize(("steps", "words"), [
    (4, "1 pass, 4 weight steps"), (8, "2 passes, 8 weight steps"),
    (5, "2 passes (rounded up), 5 weight steps")])
def test_only_an_incomplete_last_pass_is_called_rounded_up(run_here, steps, words):
    done = run_here("free_at.py", "--num_images", 64, "--batch_size", 32, "--replays", 2,
                    "--weight_steps", steps, "--guard", "off", "--device", "cpu", "--save", "run")
    assert done.returncode == 0 and words in done.stdout, done.stderr


def test_a_run_ends_at_its_weight_steps_in_the_middle_of_a_pass(run_here, tmp_path, lrs):
    done = run_here("free_at.py", "--num_images", 96, "--batch_size", 32, "--replays", 4, "--lr", 1,
                    "--weight_steps", 18, "--schedule", "triangle", "--guard", "off", "--device",
                    "cpu", "--save", "run")
    assert done.returncode == 0, done.stderr
    assert "2 passes (rounded up), 18 weight steps" in done.stdout
    assert [row["weight_steps"] for row in rows(tmp_path / "run" / "log.csv")] == ["12", "18"]
    assert lrs == pytest.approx([*(k / 9 for k in range(9)), *((18 - k) / 9 for k in range(9, 18))])
    facts = json.loads((tmp_path / "run" / "free4_mlp.json").read_text())
    assert (facts["weight_steps"], facts["epochs"], facts["recipe"]) == (18, None, None)


def test_crops_move_by_up_to_the_given_shift(tmp_path):
    images = named("cifar10", 400)
    ramp = torch.arange(1, 33, dtype=torch.uint8).expand(3, 32, 32)
    images = images.select(torch.arange(400))
    images.pixels[:] = ramp
    for shift in (0, 2, 4):
        seen = set()
        for _, _, x in free_at.one_pass(images, 100, torch.Generator().manual_seed(0), Team(),
                                        vary=True, smallest=2, workers=0, shift=shift):
            middle = x[:, 0, 16, 15:17].tolist()
            seen |= {a - 16 if a < b else 17 - a for a, b in middle}
        assert seen == set(range(-shift, shift + 1))


TINY = ("--num_images", 4, "--batch_size", 4, "--amp", "off", "--guard", "off", "--device", "cpu",
        "--workers", 0, "--save", "run")


@pytest.fixture
def airplanes(tmp_path, picture):
    """A folder with train/ and test/ of small images of CIFAR-10's classes."""
    for part in ("train", "test"):
        for k, name in enumerate(CIFAR10):
            picture(tmp_path / "cifar" / part / name / "0.png", 32, 32, seed=k)


def test_fast_adversarial_trains(run_here, tmp_path, airplanes):
    done = run_here("free_at.py", "--recipe", "fast_adversarial", "--data_dir", "cifar", *TINY,
                    "--weight_steps", 2)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "free8_preact_resnet18.json").read_text())
    assert (facts["recipe"], facts["clip_delta"], facts["weight_steps"]) == (
        "fast_adversarial", "box", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name"), [("free", "free8_wrn_32_10"),
                                              ("madry", "pgd_wrn_32_10")])
def test_the_wide_network_trains_and_is_loaded_with_its_first_layer(
        run_here, tmp_path, airplanes, recipe, name):
    steps = ("--steps", 1) if recipe == "madry" else ()
    done = run_here("free_at.py", "--recipe", recipe, "--data_dir", "cifar", *TINY,
                    "--weight_steps", 1, *steps)
    assert done.returncode == 0, done.stderr
    model = models.load_model("wrn_32_10", weights=str(tmp_path / "run" / f"{name}.pth"),
                              kind="cifar10")
    assert isinstance(model[0], Standardize)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model[1](Standardize()(x)))


@pytest.mark.slow
def test_the_recipe_on_imagenet_trains(run_here, tmp_path, picture):
    for part in ("train", "val"):
        for i, wnid in enumerate(("n01440764", "n02504458")):
            for k in range(2):
                picture(tmp_path / "net" / part / wnid / f"{k}.JPEG", 90, 70, seed=2 * i + k)
    done = run_here("free_at.py", "--recipe", "free", "--data_dir", "net", *TINY, "--weight_steps",
                    1)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "free4_resnet50.json").read_text())
    assert (facts["recipe"], facts["schedule"], facts["eps"]) == ("free", "thirds", 4 / 255)


# ------------------------------------------------------------------ TensorFlow's network

def naive_unit(unit, x, first):
    """WideUnit in evaluation mode, a number at a time; x (C, H, W) float64."""
    def norm(layer, x):
        column = [t.numpy()[:, None, None] for t in (layer.running_mean, layer.running_var,
                                                     layer.weight.detach(), layer.bias.detach())]
        return (x - column[0]) / np.sqrt(column[1] + 1e-3) * column[2] + column[3]

    def leaky(x):
        return np.where(x < 0, 0.1 * x, x)

    def conv(weight, x, stride):  # padding "SAME"
        size = math.ceil(x.shape[1] / stride)
        total = (size - 1) * stride + 3 - x.shape[1]
        before = total // 2
        padded = np.zeros((len(x), x.shape[1] + total, x.shape[2] + total))
        padded[:, before:before + x.shape[1], before:before + x.shape[2]] = x
        out = np.zeros((len(weight), size, size))
        for o in range(len(weight)):
            for i in range(size):
                for j in range(size):
                    part = padded[:, stride * i:stride * i + 3, stride * j:stride * j + 3]
                    out[o, i, j] = (part * weight[o]).sum()
        return out
    weights = [layer.weight.detach().numpy() for layer in (unit.conv1, unit.conv2)]
    stride = unit.conv1.stride[0]
    activated = leaky(norm(unit.bn1, x))
    out = conv(weights[1], leaky(norm(unit.bn2, conv(weights[0], activated, stride))), 1)
    start = activated if first else x
    for c in range(len(start)):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                pool = start[c, stride * i:stride * i + stride, stride * j:stride * j + stride]
                out[c + (len(out) - len(start)) // 2, i, j] += pool.mean()
    return out


@pytest.mark.parametrize(("cin", "cout", "stride", "first"), [
    (4, 8, 1, True), (4, 8, 2, False), (6, 6, 1, False)])
def test_a_unit_of_the_wide_network_equals_tensorflows(cin, cout, stride, first):
    torch.manual_seed(0)
    unit = WideUnit(cin, cout, stride, first).double()
    for layer in (unit.bn1, unit.bn2):
        for values in (layer.weight.data, layer.bias.data, layer.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(layer.running_var, 0.01, 2)
    x = torch.randn(2, cin, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        found = unit.eval()(x)
    for one, image in zip(found, x, strict=True):
        assert np.allclose(one.numpy(), naive_unit(unit, image.numpy(), first), rtol=0, atol=1e-10)


def test_the_wide_network_has_the_published_shapes_and_parameters():
    net = models.trainable("wrn_32_10", kind="cifar10")[1]
    kernels, norms, cin = 9 * 3 * 16, 0, 16
    for width in (160, 320, 640):
        for _ in range(5):
            kernels += 9 * cin * width + 9 * width * width
            norms += 2 * cin + 2 * width
            cin = width
    total = kernels + norms + 2 * 640 + 640 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == total == 45_901_914
    shapes, x = [], torch.zeros(1, 3, 32, 32)
    for layer in net:
        x = layer(x) if not isinstance(layer, WideUnit) else torch.zeros(
            1, layer.conv1.out_channels, *[x.shape[2] // layer.stride] * 2)
        shapes.append(tuple(x.shape[1:]))
    assert [shapes[k] for k in (0, 1, 5, 6, 10, 11, 15, 17, 18, 20)] == [
        (16, 32, 32), (160, 32, 32), (160, 32, 32), (320, 16, 16), (320, 16, 16), (640, 8, 8),
        (640, 8, 8), (640, 8, 8), (640, 1, 1), (10,)]
    units = [layer for layer in net if isinstance(layer, WideUnit)]
    assert [unit.first for unit in units] == [True] + [False] * 14
    assert [unit.stride for unit in units] == [1] * 5 + [2] + [1] * 4 + [2] + [1] * 4
    assert isinstance(net[17], nn.LeakyReLU) and net[17].negative_slope == 0.1
    for layer in net.modules():  # TensorFlow's first values
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(
                (2 / (9 * layer.out_channels)) ** 0.5, rel=0.1)
    assert net[-1].weight.abs().max() <= (3 / 640) ** 0.5 and not net[-1].bias.any()


def test_images_are_standardised_as_in_tensorflow():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 4, 4, generator=g, dtype=torch.float64)
    x[1] = 0.5                              # no deviation at all
    x[2] = 0.5
    x[2, 0, 0, 0] += 0.1 / 255              # less than 1 / sqrt(48)
    x[3] *= 3e-3
    found = Standardize()(x)
    for one, image in zip(found, 255 * x.numpy(), strict=True):
        wanted = (image - image.mean()) / max(image.std(), 1 / math.sqrt(image.size))
        assert np.allclose(one.numpy(), wanted, rtol=0, atol=1e-9)
    x = x.float().requires_grad_()
    g, = torch.autograd.grad(F.mse_loss(Standardize()(x), torch.ones_like(x)), x)
    assert g.isfinite().all() and (g[1] != 0).any()


def test_only_the_wide_network_standardises():
    model = models.load_model("wrn_32_10", weights="random", kind="digits")
    assert isinstance(model[0], Standardize) and model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    other = models.load_model("preact_resnet18", weights="random", kind="cifar10")
    assert isinstance(other[0], models.Normalize)
