"""If memory runs out, the batch is split: the same figures, and one line says so.

The networks and attacks here raise an out-of-memory error if they get more images than fit.
"""

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fgsm_mnist
import free_at
import train_gcm
from attacks import pgd
from utils import halving, measure, models
from utils.attack.chance import numbered
from utils.cells import Progress
from utils.data import load, open_images
from utils.defenses import defend
from utils.errors import UserError
from utils.halving import Halves, Halving
from utils.run import make_generator, save_pth


class Small(nn.Module):
    """A network whose memory holds `room` images; `seen`: batch sizes of its forward passes."""

    def __init__(self, room, net=None, error=None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        self.room, self.seen = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.room:
            raise self.error
        return self.net(x)


def pictures(n=20):
    return torch.rand((n, 3, 2, 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("error", [
    None, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("GET was unable to find an engine to execute this computation")], ids=str)
def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_its_size_is_kept(capsys, error):
    small = Small(6, error=error)
    model, x = Halving(small, "vgg16"), pictures()
    with torch.no_grad():
        torch.testing.assert_close(model(x), small.net(x))  # kernels round by the batch
        assert small.seen == [20, 10, 5, 5, 5, 5]
        small.seen.clear()
        torch.testing.assert_close(model(x[:7]), small.net(x[:7]))
        assert small.seen == [5, 2]
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        f"warning: vgg16: out of memory with {n} images at a time, {n // 2} from here on"
        for n in (20, 10)]


def test_a_batch_that_fits_is_not_divided(capsys):
    small = Small(20)
    Halving(small, "vgg16")(pictures())
    assert small.seen == [20] and not capsys.readouterr().err


def test_one_image_that_does_not_fit_raises_the_original_error():
    small = Small(0)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        Halving(small, "vgg16")(pictures(3))
    assert small.seen == [3, 1]


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), UserError("wrong")], ids=str)
def test_another_error_is_not_taken_for_a_lack_of_memory(error):
    with pytest.raises(type(error), match=str(error)), torch.no_grad():
        Halving(Small(0, error=error), "vgg16")(pictures())


def test_a_forward_pass_that_needs_gradients_is_not_divided():
    small = Small(6)
    with pytest.raises(torch.OutOfMemoryError):
        Halving(small, "vgg16")(pictures().requires_grad_())
    assert small.seen == [20]


def test_a_random_defence_in_front_draws_the_same_if_the_batch_is_halved():
    def seen(room):
        got = []
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3, bias=False))
        nn.init.ones_(net[1].weight)
        net.register_forward_pre_hook(lambda _, given: got.append(given[0]))
        model = defend(Halving(Small(room, net), "vgg16"), "resizepad", size=8, low=4,
                       generator=make_generator(3))
        with torch.no_grad():
            model(torch.rand((10, 3, 8, 8), generator=make_generator(0)))
        return torch.cat(got)
    assert torch.equal(seen(10), seen(3))


def test_the_results_of_parts_are_added_and_no_part_is_done_twice(capsys):
    done, halves = [], Halves("PGD")

    def work(x, y):
        if len(x) > 6 or (len(x) > 4 and y[0] >= 6):  # as if others had filled memory meanwhile
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(x.tolist())
        return int((x * y).sum())
    x = torch.arange(12)
    assert halves(work, int.__add__, x, x) == int((x * x).sum())
    assert sum(done, []) == list(range(12)) and list(map(len, done)) == [6, 3, 3]
    assert len(capsys.readouterr().err.splitlines()) == 2


# ------------------------------------------------------------------------- attacks

class Greedy(Small):
    """A network whose memory holds the gradients of `room` images, and any number without them."""

    def forward(self, x):
        if x.requires_grad and len(x) > self.room:
            raise self.error
        return self.net(x)


def test_an_attack_that_runs_out_of_memory_continues_with_halves_of_the_batch(capsys):
    images = load(open_images("digits", split="test").prepared(28, 50), workers=0)
    net = models.freeze(models.trainable("mlp", kind="digits", seed=1)).double()
    images = replace(images, labels=net(images.pixels / 255).argmax(1))

    def measured(room):
        model = Halving(Greedy(room, net), "mlp")
        same = {"draws": 1, "batch_size": 25, "device": torch.device("cpu"),
                "chance": numbered(3, 50)}
        cell = measure.run_cell(
            measure.Attack("PGD", "linf", 0.1, partial(pgd, eps=0.01, alpha=0.003, steps=5), True),
            model, model, images, torch.ones(50, dtype=torch.long), **same, desc="mlp PGD",
            progress=Progress())
        del cell["seconds"]
        return cell, capsys.readouterr().err.splitlines()
    whole, said = measured(25)
    assert not said and 0 < sum(whole["after"]) < 50
    halved, said = measured(7)
    assert said == ["warning: mlp PGD: out of memory with 25 images at a time, 12 from here on",
                    "warning: mlp PGD: out of memory with 12 images at a time, 6 from here on"]
    losses = whole.pop("losses")
    assert halved.pop("losses") == pytest.approx(losses, rel=1e-6)
    assert halved.pop("ascent") == pytest.approx(whole.pop("ascent"), rel=1e-6)
    assert halved == whole
    with pytest.raises(torch.OutOfMemoryError):
        measured(0)


# ------------------------------------------------------------------------- evaluations

SCRIPTS = {
    "eval_net.py": ("--model_name", "mlp", "--weights", "mlp.pth", "--attacks", "none", "--uaps",
                    "u.pth"),
    "eval_uap.py": ("--model_name", "mlp", "--weights", "mlp.pth", "--uaps", "u.pth", "--show", 0),
    "gcm.py": ("--model_name", "mlp", "--weights", "mlp.pth", "--attacks", "square", "--queries",
               3)}
VARIES = {"seconds", "commit", "batch_size"}


def plain(value):
    """results.json without the fields that vary."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in VARIES}
    return [plain(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_that_runs_out_of_memory_says_so_and_prints_the_same_figures(
        run_here, tmp_path, monkeypatch, script):
    torch.manual_seed(0)
    save_pth(tmp_path / "mlp.pth", models.trainable("mlp", kind="digits")[1].state_dict())
    save_pth(tmp_path / "u.pth", 0.1 * torch.randn((1, 28, 28)).sign())
    flags = ("--num_images", 60, "--batch_size", 60, "--device", "cpu", "--save", "out",
             *SCRIPTS[script])
    found, real = {}, halving.Halving.__init__
    for room in (10 ** 6, 8):
        monkeypatch.setattr(halving.Halving, "__init__", lambda self, model, name, room=room: real(
            self, Small(room, model), name))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = run_here(script, *flags)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "out of memory" in line]
        assert len(said) == (0 if room > 8 else 3)
        found[room] = plain(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert found[8] == found[10 ** 6]


@pytest.mark.parametrize(("script", "attack"), [("eval_net.py", "pgd20"), ("gcm.py", "pgd_linf")])
def test_a_command_whose_attack_runs_out_of_memory_continues(run_here, tmp_path, monkeypatch,
                                                             script, attack):
    found, real = {}, halving.Halving.__init__
    for room in (10 ** 6, 8):
        monkeypatch.setattr(halving.Halving, "__init__", lambda self, model, name, room=room: real(
            self, Greedy(room, model), name))
        done = run_here(script, "--model_name", "mlp", "--attacks", attack, "--num_images", 60,
                        "--batch_size", 30, "--device", "cpu", "--save", room)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "out of memory" in line]
        assert bool(said) == (room == 8) and all("pgd" in line.lower() for line in said)
        cells = json.loads((tmp_path / str(room) / "results.json").read_text())["cells"]
        found[room] = {key: sum(cell["after"]) for key, cell in cells.items()}
    assert found[8] == pytest.approx(found[10 ** 6], abs=1)


# ------------------------------------------------------------------------- trainings

def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()
                 if value and key not in ("seconds", "images_per_s")}
                for row in csv.DictReader(file)]


def both(run_here, tmp_path, script, *flags, limit, same=True):
    """Run in `whole` and, after limit(), in `parts`. -> the second run's lines about memory

    same: whether both must end the same.
    """
    done = run_here(script, *flags, "--device", "cpu", "--save", "whole")
    assert done.returncode == 0 and "out of memory" not in done.stderr, done.stderr
    limit()
    done = run_here(script, *flags, "--device", "cpu", "--save", "parts")
    assert done.returncode == 0, done.stderr
    for one, other in zip(*(log_of(tmp_path / name) for name in ("whole", "parts")), strict=True):
        assert other.keys() == one.keys() and (not same or other == pytest.approx(one, rel=1e-4))
    for one in (tmp_path / "whole").glob("*.pth"):
        assert one.name == "checkpoint.pth" or not same or (
            one.read_bytes() == (tmp_path / "parts" / one.name).read_bytes())
    return [line for line in done.stderr.splitlines() if "out of memory" in line]


def test_validation_and_guard_of_free_at_are_halved_once(run_here, tmp_path, monkeypatch):
    def attack(model, x, y, **options):
        if len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pgd(model, x, y, **options)
    said = both(run_here, tmp_path, "free_at.py", "--data_dir", "digits", "--num_images", 300,
                "--epochs", 2, "--model_name", "mlp", "--batch_size", 10, "--method", "free",
                "--replays", 1, limit=lambda: monkeypatch.setattr(free_at, "pgd", attack))
    assert said == ["warning: measuring after a pass: out of memory with 30 images at a time, 15 "
                    "from here on"]


def test_validation_of_train_gcm_is_halved(run_here, tmp_path, monkeypatch):
    real = train_gcm.ChallengeTraining.behind_defense

    def limited(self, model):
        model.register_forward_pre_hook(full)
        return real(self, model)

    def full(model, given):
        if not model.training and len(given[0]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
    said = both(run_here, tmp_path, "train_gcm.py", "--num_images", 200, "--hold_out", 0.3,
                "--epochs", 2, "--model_name", "mlp", "--head", "own", "--batch_size", 10,
                "--defense", "gcm+resizepad", limit=lambda: monkeypatch.setattr(
                    train_gcm.ChallengeTraining, "behind_defense", limited))
    assert [line.split(": ")[1] for line in said] == ["measuring after a pass"] * 2


@pytest.mark.parametrize("flags", [(), ("--defense", "gcm+resizepad"), ("--loss", "cosine")])
def test_labels_and_fooling_ratios_of_train_sga_are_halved(run_here, tmp_path, monkeypatch, flags):
    real = models.Target.load
    said = both(run_here, tmp_path, "train_sga.py", "--model_name", "mlp", "--num_images", 60,
                "--epochs", 2, "--amp", "off", "--layout", "contiguous", *flags,
                same="cosine" not in flags,  # leaves zero by rounding, which halves change
                limit=lambda: monkeypatch.setattr(
                    models.Target, "load", lambda self, *a, **k: Small(20, real(self, *a, **k))))
    assert len(said) in (2, 4)  # of the network, and of its copy that makes the gradients
    assert all(line.startswith("warning: surrogate: out of memory") for line in said)


def test_the_measurements_of_the_exercise_are_halved(capsys):
    images = load(open_images("digits", split="test").prepared(28, 60), workers=0)
    net = models.freeze(models.trainable("lenet_bn", kind="digits", seed=3))
    s = SimpleNamespace(alpha_fgs=0.1, alpha_fgv=0.3)
    whole = fgsm_mnist.accuracies(net, images, s, torch.device("cpu"))
    assert not capsys.readouterr().err
    assert fgsm_mnist.accuracies(Small(20, net), images, s, torch.device("cpu")) == whole
    assert capsys.readouterr().err.count("out of memory") == 2
