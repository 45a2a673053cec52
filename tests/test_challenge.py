"""train_gcm.py: losses, steps, stages, resuming, several processes, own images, bad input."""

import csv
import gc
import io
import os
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
import torch.nn.functional as F
from conftest import SRC
from torch import nn
from tqdm import tqdm

import train_gcm
from attacks import fgsm
from utils import loop
from utils.challenge import settle
from utils.data import hold_out, open_images, to_float, unseen
from utils.defenses import GradientConcealment
from utils.errors import UserError
from utils.lists import read_list
from utils.models import load_model, trainable
from utils.nets import RECIPE_VERSION, build_small
from utils.run import load_json, make_generator
from utils.team import Team

SMALL = ("--num_images", 80, "--epochs", 2, "--batch_size", 38, "--device", "cpu", "--workers", 0)
PLAIN = ("--augment", "none", "--w_mixup", 0, "--w_cutmix", 0, "--w_fgsm", 0)
READ = ("kind", "data_dir", "model_name", "head", "classes", "hold_out", "given_images", "defense",
        "low", "image_size", "stage", "augment", "w_fgsm", "seconds", "best_epoch")  # elsewhere
CPU = torch.device("cpu")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path):
    return torch.load(path, weights_only=True)


def run_in(folder, *flags):
    """What train_gcm.py prints, run with these flags in the folder."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train_gcm.py", *map(str, flags)])
        train_gcm.main(train_gcm.get_args())
    gc.collect()  # the folder's lock goes with the objects of the run
    return said.getvalue()


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """A folder in which runs/stage1 is a finished run of stage 1, and what the run printed."""
    folder = tmp_path_factory.mktemp("challenge")
    return folder, run_in(folder, *SMALL, "--save", "runs/stage1")


def curved(classes=4):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 20), nn.Tanh(),
                         nn.Linear(20, classes)).double()


# --------------------------------------------------------------- the losses

def minibatch(n=5, classes=4):
    generator = make_generator(1)
    x = torch.rand((n, 3, 6, 6), generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def loss_of(net, x, y, attack=None, seed=0, **weights):
    torch.manual_seed(seed)
    weights = {f"w_{name}": weights.get(name, 0.0) for name in ("clean", "mixup", "cutmix", "fgsm")}
    return train_gcm.weighted_loss(net, x, y, attack, classes=4, **weights)


def by_hand(net, x, y):
    return -sum(net(x[i:i + 1]).float().log_softmax(1)[0, y[i]] for i in range(len(x)))


def test_the_clean_and_the_adversarial_loss_by_hand():
    net, (x, y) = curved(), minibatch()
    total, logits = loss_of(net, x, y, clean=2.0)
    assert torch.allclose(total, 2 * by_hand(net, x, y)) and torch.allclose(logits, net(x).float())
    attacked = fgsm(net, x, y, eps=0.1)
    total, logits = loss_of(net, x, y, attack=lambda x, y: fgsm(net, x, y, eps=0.1), fgsm=0.5)
    assert logits is None and torch.allclose(total, 0.5 * by_hand(net, attacked, y))
    assert total > 0.5 * by_hand(net, x, y) * 1.05


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_labels(kind):
    seen, net, (x, y) = [], curved(), minibatch()

    def watched(z):
        seen.append(z)
        return net(z)
    total, _ = loss_of(watched, x, y, seed=5, **{kind: 1.0})
    mixed, partner, at = seen[0], x.roll(1, 0), y.roll(1, 0)
    if kind == "mixup":
        share = ((mixed - partner) * (x - partner)).sum() / (x - partner).square().sum()
        assert torch.allclose(mixed, share * x + (1 - share) * partner)
    else:
        own = (mixed == x).all(1)
        assert ((mixed == partner).all(1) | own).all()
        share = own[0].double().mean()
        assert torch.equal(own, own[:1].expand_as(own))  # the same rectangle in every image
    assert 0.02 < share < 0.98
    wanted = share * by_hand(net, mixed, y) + (1 - share) * by_hand(net, mixed, at)
    assert torch.allclose(total.double(), wanted.double(), rtol=1e-5)


def test_terms_add_up_and_those_of_weight_zero_are_not_computed():
    net, (x, y) = curved(), minibatch()

    def attack(x, y):
        return fgsm(net, x, y, eps=0.05)
    parts = {name: loss_of(net, x, y, attack=attack, **{name: 1.0})[0]
             for name in ("clean", "mixup", "fgsm")}
    total, _ = loss_of(net, x, y, attack=attack, clean=0.3, mixup=0.5, fgsm=2.0)
    assert torch.allclose(total, 0.3 * parts["clean"] + 0.5 * parts["mixup"] + 2 * parts["fgsm"])
    assert torch.isfinite(loss_of(net, x, y, attack=None, clean=1.0)[0])


# ------------------------------------------------------------------- a step

def built(monkeypatch, tmp_path, *flags):
    """The training of a command line, before its first step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gcm.py", *map(str, (*SMALL, *flags))])
    return train_gcm.ChallengeTraining(*settle(train_gcm.get_args(), Team(), CPU), Team(), CPU)


def test_the_training_attack_passes_around_gcm(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path, "--w_fgsm", 1, "--head", "own", "--model_name",
                     "vgg_small")
    assert isinstance(training.defended[0], GradientConcealment)
    found, real = {}, train_gcm.weighted_loss

    def spied(net, x, y, attack, **options):
        found["x_adv"], found["eps"] = attack(x, y), attack.keywords["eps"]
        found["undefended"] = fgsm(training.model, x, y, eps=found["eps"])
        found["through gcm"] = fgsm(training.defended, x, y, eps=found["eps"])
        return real(net, x, y, attack, **options)
    monkeypatch.setattr(train_gcm, "weighted_loss", spied)
    before = [p.clone() for p in training.model.parameters()]
    training.step(to_float(training.images.pixels[:30]), training.images.labels[:30], 30)
    same = (found["x_adv"] - found["undefended"]).abs() < 1e-6
    assert same.double().mean() > 0.999
    assert ((found["through gcm"] - found["undefended"]).abs() > 1e-3).double().mean() > 0.1
    assert 0.01 <= found["eps"] <= 0.08
    assert any(not torch.equal(a, b) for a, b in
               zip(before, training.model.parameters(), strict=True))


def test_eps_of_the_training_attack_is_one_of_twenty(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path, "--w_fgsm", 1, "--fgsm_eps", 0.02, 0.2)
    drawn = []
    monkeypatch.setattr(train_gcm, "weighted_loss", lambda net, x, y, attack, **options: (
        drawn.append(attack.keywords["eps"]) or net(x).sum(), None))
    x = torch.rand(4, 1, 28, 28)
    for _ in range(60):
        training.step(x, torch.zeros(4, dtype=torch.int64), 4)
    allowed = torch.linspace(0.02, 0.2, 20)
    assert all((allowed - eps).abs().min() < 1e-7 for eps in drawn) and len(set(drawn)) > 8


@pytest.mark.slow
@pytest.mark.parametrize("still", ["head", "backbone"])
def test_head_and_backbone_have_learning_rates_of_their_own(monkeypatch, tmp_path, still):
    moving = "backbone" if still == "head" else "head"
    training = built(monkeypatch, tmp_path, *PLAIN, f"--lr_{still}", 0, f"--lr_{moving}", 0.01,
                     "--model_name", "vgg_small", "--weight_decay", 0)
    before = {k: v.clone() for k, v in training.model[1].state_dict().items()}
    training.one_pass(tqdm(disable=True))
    moved = {k for k, v in training.model[1].state_dict().items() if not torch.equal(v, before[k])}
    part = "0." if still == "head" else "1."
    assert moved and all(k.startswith(part) for k in moved)
    assert {k for k in before if k.startswith(part)} == moved


def test_learning_rates_are_cut_in_steps(run_here, tmp_path):
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--epochs", 5, "--step_epochs", 2, "--gamma",
                    0.1, "--lr_head", 0.5, "--lr_backbone", 0.001, "--save", "run")
    assert done.returncode == 0, done.stderr
    assert [float(row["lr_head"]) for row in rows(tmp_path / "run/log.csv")] == [
        0.5, 0.5, 0.05, 0.05, 0.005]


def test_augmentations_are_drawn_anew_in_every_epoch(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path, "--augment", "gaussian_noise", "--p", 1)
    seen = []
    monkeypatch.setattr(training, "step", lambda x, y, joint: seen.append(x) or torch.ones(3))
    for _ in range(2):
        training.one_pass(tqdm(disable=True))
    half = len(seen) // 2
    clean = to_float(training.images.pixels)

    def nearest(x):
        return (x[:, None] - clean[None]).flatten(2).norm(dim=2).min(1)
    first, second = torch.cat(seen[:half]), torch.cat(seen[half:])
    near = nearest(first)
    assert (near.values > 0.1).all() and near.indices.sort().values.tolist() == list(
        range(len(clean)))
    again = second[nearest(second).indices.argsort()] - first[near.indices.argsort()]
    assert (again.flatten(1).norm(dim=1) > 0.1).all()


# --------------------------------------------------------------- runs, stages

@pytest.mark.slow
def test_a_run_leaves_the_network_of_its_best_epoch_and_what_made_it(stage1):
    folder, said = stage1
    assert "76 images of digits in 10 classes, 4 held out" in said and "behind gcm\n" in said
    assert said.splitlines()[-1] == ("saved runs/stage1/stage1_cnn_bn.pth; to measure it: python "
                                     "eval_net.py --runs runs/stage1")
    run = folder / "runs/stage1"
    assert {path.name for path in run.iterdir()} == {
        ".lock", "checkpoint.pth", "curve.png", "log.csv", "stage1_cnn_bn.json",
        "stage1_cnn_bn.pth"}
    facts = load_json(run / "stage1_cnn_bn.json")
    assert facts["head"] == "fc" and facts["defense"] == "gcm" and facts["held_out"] == 4
    assert set(READ) <= set(facts)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    log = rows(run / "log.csv")
    best = max(log, key=lambda row: float(row["val_acc"]) + float(row["val_aug_acc"]))
    assert facts["best_epoch"] == int(best["epoch"])


def test_stage_two_starts_from_the_weights_of_stage_one(stage1, run_here, tmp_path):
    shutil.copytree(stage1[0] / "runs", tmp_path / "runs")
    done = run_here("train_gcm.py", *SMALL, "--stage", 2, "--lr_head", 0, "--lr_backbone", 0,
                    "--epochs", 1, "--save", "runs/stage2")
    assert done.returncode == 0, done.stderr
    assert "from runs/stage1/stage1_cnn_bn.pth, behind gcm+resizepad" in done.stdout
    one, two = (weights_of(tmp_path / f"runs/stage{k}/stage{k}_cnn_bn.pth") for k in (1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one if "running" not in key
               and "tracked" not in key)  # learning rates of 0


def test_stage_two_without_stage_one_says_what_to_type(run_here, refused):
    refused(run_here("train_gcm.py", *SMALL, "--stage", 2), "no runs/gcm_digits_cnn_bn/stage1",
            "--stage 1 first")


def test_a_killed_run_that_resumes_ends_with_the_same_bytes(run_here, tmp_path, monkeypatch):
    flags = (*SMALL, "--ema", 0.9, "--defense", "gcm+resizepad", "--w_fgsm", 1)
    assert run_here("train_gcm.py", *flags, "--save", "whole").returncode == 0
    real = loop.save_csv

    def dies(path, value):
        real(path, value)
        raise KeyboardInterrupt
    monkeypatch.setattr(loop, "save_csv", dies)
    assert run_here("train_gcm.py", *flags, "--save", "killed").returncode == 130
    monkeypatch.setattr(loop, "save_csv", real)
    assert len(rows(tmp_path / "killed/log.csv")) == 1
    done = run_here("train_gcm.py", *flags, "--save", "killed", "--resume")
    assert done.returncode == 0, done.stderr
    whole, killed = ((tmp_path / name / "stage1_cnn_bn.pth").read_bytes()
                     for name in ("whole", "killed"))
    assert whole == killed


def test_the_running_mean_of_the_weights_is_saved(run_here, tmp_path):
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--epochs", 1, "--ema", 0.5, "--model_name",
                    "vgg_small", "--head", "own", "--save", "run")
    assert done.returncode == 0, done.stderr
    saved = weights_of(tmp_path / "run/stage1_vgg_small.pth")
    state = weights_of(tmp_path / "run/checkpoint.pth")
    start = trainable("vgg_small", kind="digits").state_dict()
    last = state["net"]
    for key, value in saved.items():  # two steps: the first is copied, then half and half
        mean = state["mean"]["module.1." + key]
        assert torch.equal(mean, value)
        assert not torch.equal(value, last["1." + key]) or torch.equal(
            start["1." + key], last["1." + key])


def test_the_network_of_the_best_epoch_is_saved(run_here, tmp_path, monkeypatch):
    scores, kept = iter([(0.2, 0.2), (0.9, 0.4), (0.6, 0.6), (0.95, 0.35)]), []

    def validate(training):
        kept.append({k: v.clone() for k, v in training.model[1].state_dict().items()})
        return next(scores)
    monkeypatch.setattr(train_gcm.ChallengeTraining, "validate", validate)
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--epochs", 4, "--save", "run")
    assert done.returncode == 0, done.stderr
    saved = weights_of(tmp_path / "run/stage1_cnn_bn.pth")
    assert load_json(tmp_path / "run/stage1_cnn_bn.json")["best_epoch"] == 2
    assert all(torch.equal(saved[k], kept[1][k]) for k in saved)
    assert not all(torch.equal(saved[k], kept[3][k]) for k in saved)


ONE_STEP = (*SMALL, "--augment", "none", "--w_mixup", 0, "--w_cutmix", 0, "--w_fgsm", 1, "--head",
            "own", "--lr_head", 0.001, "--lr_backbone", 0.001, "--weight_decay", 1, "--epochs", 1,
            "--batch_size", 76)
ALL = (*SMALL, "--defense", "gcm+resizepad", "--ema", 0.9, "--w_fgsm", 1)
TWICE = """
import os, sys
import train_gcm
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # every run has a store of its own
for port, flags in {runs}:
    os.environ["MASTER_PORT"], sys.argv = str(port), ["train_gcm.py", *flags]
    train_gcm.main(train_gcm.get_args())
"""


def free_ports(n):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with runs of two processes: `two`, of ONE_STEP, and `all`; one launch for both."""
    folder = tmp_path_factory.mktemp("two_processes")
    runs = [[str(flag) for flag in (*flags, "--save", name)]
            for name, flags in (("two", ONE_STEP), ("all", ALL))]
    (folder / "twice.py").write_text(TWICE.format(runs=list(zip(free_ports(2), runs, strict=True))))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "twice.py"], cwd=folder, check=False, timeout=300, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC)})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(two_processes):
    """One step only: Adamax follows signs, so that rounding of what is nearly zero shows at once;
    the weight decay makes the signs depend on the gradient's scale."""
    run_in(two_processes, *ONE_STEP, "--save", "one")
    one, two = (weights_of(two_processes / name / "stage1_cnn_bn.pth") for name in ("one", "two"))
    start = trainable("cnn_bn", kind="digits")[1].state_dict()
    for key in one:
        apart = (one[key].double() - two[key].double()).abs()
        assert (apart < 2e-5).double().mean() > 0.99, key
        assert not torch.equal(one[key], start[key])
    first, second = (rows(two_processes / name / "log.csv")[0] for name in ("one", "two"))
    assert float(first["loss"]) == pytest.approx(float(second["loss"]), abs=1e-4)
    assert first["train_acc"] == second["train_acc"]


@pytest.mark.slow
def test_all_losses_defences_and_the_running_mean_train_in_two_processes(two_processes):
    facts = load_json(two_processes / "all/stage1_cnn_bn.json")
    assert facts["processes"] == 2 and len(rows(two_processes / "all/log.csv")) == 2


@pytest.mark.slow
def test_the_shell_script_trains_and_measures_both_stages(tmp_path):
    done = subprocess.run(
        ["sh", str(SRC / "train_gcm.sh"), *map(str, SMALL), "--epochs", "1", "--pretrained",
         "random"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "ATTACKED": "6", "TESTED": "6",
             "EPOCHS2": "2"})
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs/challenge"
    assert len(rows(runs / "stage2/log.csv")) == 2
    assert "from runs/challenge/stage1/stage1_cnn_bn.pth" in done.stdout
    assert all((runs / f"stage{k}/gcm/results.csv").is_file() for k in (1, 2))
    table = (runs / "results.md").read_text()
    assert "| stage1 |" in table and "| stage2 |" in table
    assert "| - |" not in table  # gcm.py measured both


def test_training_starts_from_a_small_network_of_ours(run_here, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))  # holds V1, as if it were trained
    first = build_small("vgg_small", 1, 28).state_dict()
    cached = tmp_path / f"cache/hub/small/digits_vgg_small_{RECIPE_VERSION}.pth"
    cached.parent.mkdir(parents=True)
    torch.save(first, cached)
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--pretrained", "V1", "--lr_backbone", 0,
                    "--weight_decay", 0, "--model_name", "vgg_small", "--save", "run")
    assert done.returncode == 0, done.stderr
    saved = weights_of(tmp_path / "run/stage1_vgg_small.pth")
    assert all(torch.equal(saved[f"0.{k}"], v) for k, v in first.items() if f"0.{k}" in saved)
    assert "0.0.weight" in saved and saved["1.2.weight"].shape[0] == 128


# ---------------------------------------------------------------- own images

def photographs(tmp_path, picture, classes=3, each=6):
    names = []
    for k in range(classes):
        for i in range(each):
            names.append((f"{10 * k + i}.jpg", k))
            picture(tmp_path / "phase1/images" / names[-1][0], seed=100 * k + i)
    return names


OWN = ("--model_name", "squeezenet1_1", "--head", "own", "--image_size", 64, "--epochs", 1,
       "--batch_size", 5, "--hold_out", 0.25, "--device", "cpu", "--workers", 0)


def test_an_image_list_of_the_challenge_is_trained_on_and_attacked(run_here, tmp_path, picture):
    names = photographs(tmp_path, picture)
    (tmp_path / "phase1/label.txt").write_text("".join(f"{n} {k}\n" for n, k in names))
    done = run_here("train_gcm.py", "--data_dir", "phase1/label.txt", *OWN, "--save", "run")
    assert done.returncode == 0, done.stderr
    assert "14 images" in done.stdout and "3 classes, 4 held out" in done.stdout
    weights = weights_of(tmp_path / "run/stage1_squeezenet1_1.pth")
    assert weights["classifier.1.weight"].shape[0] == 3
    table = run_here("gcm.py", "--data_dir", "phase1", "--model_name", "squeezenet1_1",
                     "--weights", "run/stage1_squeezenet1_1.pth", "--attacks", "fgsm", "--device",
                     "cpu", "--workers", 0)
    said = table.stdout + table.stderr
    assert "n: 4" in said or "none of these images right" in said
    assert "64 pixels" in said or table.returncode == 2


def class_folders(tmp_path, picture):
    for split, each in (("train", 5), ("val", 2)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(each):
                picture(tmp_path / "own" / split / name / f"{i}.png", seed=50 * k + i)


def test_ml_decoder_trains_on_class_folders(run_here, tmp_path, picture):
    class_folders(tmp_path, picture)
    done = run_here("train_gcm.py", "--data_dir", "own", *OWN, "--batch_size", 4, "--head",
                    "ml_decoder", "--defense", "gcm+resizepad", "--save", "run")
    assert done.returncode == 0, done.stderr
    assert "8 images of own in 2 classes, 2 held out" in done.stdout
    assert load_json(tmp_path / "run/stage1_squeezenet1_1.json")["classes"] == ["cat", "dog"]
    model = load_model("squeezenet1_1", weights=str(tmp_path / "run/stage1_squeezenet1_1.pth"),
                       kind="folder")
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.slow
def test_photographs_train_a_convnext_unless_another_network_is_given(monkeypatch, tmp_path,
                                                                      picture):
    class_folders(tmp_path, picture)
    training = built(monkeypatch, tmp_path, "--data_dir", "own", *OWN[4:], "--batch_size", 4,
                     "--head", "ml_decoder", "--image_size", 32)
    assert training.s.model_name == "convnext_tiny"
    before = [p.clone() for p in training.model.parameters()]
    training.step(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), 4)
    moved = [not torch.equal(a, b) for a, b in
             zip(before, training.model.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(("name", "text", "classes"), [
    ("label.txt", "0.jpg 1\n10.jpg 0\n", ("0", "1")),
    ("label.txt", "images/0.jpg wolf\n\nimages/10.jpg ape\n", ("ape", "wolf")),
    ("train.json", '{"1": ["0.jpg"], "0": ["10.jpg"]}', ("0", "1")),
    ("train.json", '[["0.jpg", 2], ["10.jpg", 0]]', ("0", "1", "2"))])
def test_image_lists_of_every_form_are_read(tmp_path, picture, name, text, classes):
    photographs(tmp_path, picture, 2, 1)
    path = tmp_path / "phase1" / name
    path.write_text(text)
    images = open_images(str(tmp_path / "phase1"), split="train")
    assert images.classes == classes and images.labels.tolist() == [len(classes) - 1, 0]
    assert images.kind == "folder" and images[1].shape == (3, 224, 224)
    assert open_images(str(path), split="test").names == images.names


@pytest.mark.parametrize(("name", "text", "words"), [
    ("label.txt", "", "no images in it"), ("label.txt", "0.jpg\n", "line 1: '0.jpg'"),
    ("label.txt", "0.jpg 1\n99.jpg 0\n", "no file 99.jpg"),
    ("train.json", "{", "not JSON"), ("train.json", "[1]", "not an image list"),
    ("train.json", '{"a": 3}', "not an image list")])
def test_a_bad_list_is_refused_in_one_line(tmp_path, picture, name, text, words):
    photographs(tmp_path, picture, 2, 1)
    path = tmp_path / "phase1" / name
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_list(path)


def test_class_folders_win_over_a_list_in_the_same_folder(tmp_path, picture):
    picture(tmp_path / "data/val/n01440764/a.png")
    (tmp_path / "data/val.txt").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    assert open_images(str(tmp_path / "data"), split="test").names == ("n01440764/a.png",)


def test_held_out_images_are_spread_over_the_classes():
    labels = torch.arange(10).repeat_interleave(20)[torch.randperm(200, generator=make_generator(
        0))]
    held = hold_out(labels, 0.1)
    assert torch.equal(labels[held].bincount(), torch.full((10,), 2))
    assert torch.equal(held, hold_out(labels, 0.1))
    assert hold_out(torch.arange(400), 0.05).sum() == 20  # one class in twenty


def test_training_held_out_and_test_images_do_not_overlap(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path)
    test = open_images("digits", split="test")
    trained, held = set(training.images.names), set(training.held.names)
    assert len(trained) == 76 and len(held) == 4
    assert not trained & held and not (trained | held) & set(test.names)


def test_a_data_set_with_a_test_split_is_tested_on_it():
    images, held = unseen("digits", "data", 0.1, None)
    assert images.names == open_images("digits", split="test").names and not held


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize(("flags", "words"), [
    (("--model_name", "resnet9000"), ("resnet9000",)), (("--augment", "hail"), ("--augment hail",)),
    (("--batch_size", 500), ("--batch_size 500", "76 training images")),
    (("--pretrained", "nowhere.pth"), ("--pretrained nowhere.pth",)), (("--p", 2), ("at most 1",)),
    (("--model_name", "mlp"), ("no feature map", "--head own")),
    (("--fgsm_eps", 0.2, 0.1), ("the smaller one first",)),
    (("--image_size", 40), ("digits images are 28",)), (("--hold_out", 0.9), ("at most 0.5",)),
    ((*PLAIN, "--w_clean", 0), ("nothing to train on",)), (("--stage", 3), ("invalid choice",)),
    (("--low", 40), ("low=40",)), (("--data_dir", "nowhere"), ("nowhere", "no such folder"))],
    ids=str)
def test_bad_input_is_refused_before_training(run_here, refused, tmp_path, flags, words):
    extra = ("--defense", "gcm+resizepad") if flags[0] == "--low" else ()
    refused(run_here("train_gcm.py", *SMALL, *flags, *extra), *words)
    assert not list(tmp_path.rglob("*.pth"))


def test_a_loss_that_explodes_ends_the_run_with_advice(run_here, refused, tmp_path):
    refused(run_here("train_gcm.py", *SMALL, *PLAIN, "--lr_head", 1e30, "--save", "run"),
            "type a smaller --lr_head")
    assert not list(tmp_path.rglob("stage1_*.pth"))


def test_without_tensorboard_the_flag_is_refused_and_no_run_is_lost(
        stage1, run_here, refused, monkeypatch, tmp_path):
    shutil.copytree(stage1[0] / "runs/stage1", tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(run_here("train_gcm.py", *SMALL, *PLAIN, "--save", "run", "--overwrite",
                     "--tensorboard"), "pip install tensorboard")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_one_class_is_refused(run_here, refused, tmp_path, picture):
    photographs(tmp_path, picture)  # images/, and no list beside it
    refused(run_here("train_gcm.py", "--data_dir", "phase1", *OWN), "one class, 'images'")


def test_tensorboard_gets_every_column_of_the_log(run_here, monkeypatch, tmp_path):
    got = []

    class Writer:
        def __init__(self, folder):
            got.append(folder)

        def add_scalar(self, key, value, step):
            got.append((key, step))

        def close(self):
            got.append("closed")
    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--tensorboard", "--save", "run")
    assert done.returncode == 0, done.stderr
    assert got[0] == "run/tensorboard" and got[-1] == "closed"
    assert {("loss", 1), ("val_aug_acc", 2), ("images_per_s", 2)} <= set(got[1:-1])


def test_cross_entropy_of_soft_labels_is_their_weighted_mean():
    logits, y = torch.randn(3, 4), torch.tensor([0, 3, 1])
    soft = F.one_hot(y, 4) * 0.7 + F.one_hot(y.roll(1), 4) * 0.3
    wanted = 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y.roll(1))
    assert torch.allclose(F.cross_entropy(logits, soft), wanted)
