"""train_gcm.py: the losses by hand, stages, resumption, processes, own images, tables."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import SRC
from torch import nn

import augment
import gcm_eval
import train_gcm
from attacks import fgsm
from utils.data import hold_out, load, open_images, to_float, unseen
from utils.defenses import GradientConcealment
from utils.lists import read_list
from utils.models import load_model, trainable
from utils.run import UserError, make_generator

SMALL = ("--num_images", 160, "--epochs", 2, "--batch_size", 50, "--eval_images", 20, "--device",
         "cpu", "--workers", 0)
PLAIN = ("--augment", "none", "--w_mixup", 0, "--w_cutmix", 0, "--w_fgsm", 0)
WEIGHTS = {"clean": 0.0, "mixup": 0.0, "cutmix": 0.0, "fgsm": 0.0}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path):
    return torch.load(path, weights_only=True)


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
    return train_gcm.losses(net, x, y, weights={**WEIGHTS, **weights}, classes=4, attack=attack)


def by_hand(net, x, y):
    return -sum(net(x[i:i + 1]).float().log_softmax(1)[0, y[i]] for i in range(len(x)))


def test_the_plain_and_the_attacked_loss_by_hand():
    net, (x, y) = curved(), minibatch()
    total, logits = loss_of(net, x, y, clean=2.0)
    assert torch.allclose(total, 2 * by_hand(net, x, y)) and torch.allclose(logits, net(x).float())
    attacked = fgsm(net, x, y, eps=0.1)
    total, logits = loss_of(net, x, y, attack=lambda x, y: fgsm(net, x, y, eps=0.1), fgsm=0.5)
    assert logits is None and torch.allclose(total, 0.5 * by_hand(net, attacked, y))
    assert total > 0.5 * by_hand(net, x, y) * 1.05


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_wanted_as_what_they_are_mixed_of(kind):
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


def test_the_terms_add_up_and_none_of_weight_zero_is_computed():
    net, (x, y) = curved(), minibatch()

    def attack(x, y):
        return fgsm(net, x, y, eps=0.05)
    parts = {name: loss_of(net, x, y, attack=attack, **{name: 1.0})[0]
             for name in ("clean", "mixup", "fgsm")}
    total, _ = loss_of(net, x, y, attack=attack, clean=0.3, mixup=0.5, fgsm=2.0)
    assert torch.allclose(total, 0.3 * parts["clean"] + 0.5 * parts["mixup"] + 2 * parts["fgsm"])
    assert torch.isfinite(loss_of(net, x, y, attack=None, clean=1.0)[0])


# ------------------------------------------------------------------- a step

def built(run_here, monkeypatch, tmp_path, *flags):
    """The Training of a command line, before its first step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gcm.py", *map(str, (*SMALL, *flags))])
    args = train_gcm.get_args()
    args.amp = "off"
    return train_gcm.prepare(args, train_gcm.join_team(torch.device("cpu"))[0],
                             torch.device("cpu"))[0]


def test_the_training_attack_knows_the_layer_that_hides_the_gradient(run_here, monkeypatch,
                                                                     tmp_path):
    training = built(run_here, monkeypatch, tmp_path, "--w_fgsm", 1, "--head", "own",
                     "--model_name", "vgg_small")
    assert isinstance(training.model[0], GradientConcealment)
    found, real = {}, train_gcm.losses

    def spied(net, x, y, **options):
        found["x_adv"] = options["attack"](x, y)
        found["eps"] = options["attack"].keywords["eps"]
        found["plain"] = fgsm(training.core, x, y, eps=found["eps"])
        found["through"] = fgsm(training.model, x, y, eps=found["eps"])
        return real(net, x, y, **options)
    monkeypatch.setattr(train_gcm, "losses", spied)
    x = to_float(load(training.images, workers=0).pixels[:30])
    before = [p.clone() for p in training.core.parameters()]
    training.step(x, training.images.labels[:30], 30)
    same = (found["x_adv"] - found["plain"]).abs() < 1e-6
    assert same.double().mean() > 0.999
    assert ((found["through"] - found["plain"]).abs() > 1e-3).double().mean() > 0.1
    assert 0.01 <= found["eps"] <= 0.08
    assert any(not torch.equal(a, b) for a, b in
               zip(before, training.core.parameters(), strict=True))


def test_eps_of_the_training_attack_is_one_of_twenty(run_here, monkeypatch, tmp_path):
    training = built(run_here, monkeypatch, tmp_path, "--w_fgsm", 1, "--fgsm_eps", 0.02, 0.2)
    drawn = []
    monkeypatch.setattr(train_gcm, "losses", lambda net, x, y, **options: (
        drawn.append(options["attack"].keywords["eps"]) or net(x).sum(), None))
    x = torch.rand(4, 1, 28, 28)
    for _ in range(60):
        training.step(x, torch.zeros(4, dtype=torch.int64), 4)
    allowed = torch.linspace(0.02, 0.2, 20)
    assert all((allowed - eps).abs().min() < 1e-7 for eps in drawn) and len(set(drawn)) > 8


@pytest.mark.parametrize("still", ["head", "backbone"])
def test_head_and_backbone_have_rates_of_their_own(run_here, monkeypatch, tmp_path, still):
    training = built(run_here, monkeypatch, tmp_path, *PLAIN, f"--lr_{still}", 0, "--lr_head" if
                     still == "backbone" else "--lr_backbone", 0.01, "--model_name", "vgg_small",
                     "--weight_decay", 0)
    before = {k: v.clone() for k, v in training.core[1].state_dict().items()}
    training.run_epoch(train_gcm.tqdm(disable=True))
    moved = {k for k, v in training.core[1].state_dict().items() if not torch.equal(v, before[k])}
    part = "0." if still == "head" else "1."
    assert moved and all(k.startswith(part) for k in moved)
    assert {k for k in before if k.startswith(part)} == moved


def test_rates_are_cut_in_steps(run_here, tmp_path):
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--epochs", 5, "--step_epochs", 2, "--gamma",
                    0.1, "--lr_head", 0.5, "--lr_backbone", 0.001, "--save", "run")
    assert done.returncode == 0, done.stderr
    assert [float(row["lr_head"]) for row in rows(tmp_path / "run/log.csv")] == [
        0.5, 0.5, 0.05, 0.05, 0.005]


def test_augmentations_are_drawn_anew_in_every_pass(run_here, monkeypatch, tmp_path):
    training = built(run_here, monkeypatch, tmp_path, "--augment", "gaussian_noise", "--p", 1)
    seen = []
    monkeypatch.setattr(training, "step", lambda x, y, joint: seen.append(x) or torch.ones(3))
    for _ in range(2):
        training.run_epoch(train_gcm.tqdm(disable=True))
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

def test_the_two_stages_and_their_tables(run_here, tmp_path):
    done = run_here("train_gcm.py", *SMALL, "--save", "runs/stage1")
    assert done.returncode == 0, done.stderr
    assert "behind gcm" in done.stdout and "| random padding |" in done.stdout
    folder = tmp_path / "runs/stage1"
    facts = json.loads((folder / "stage1_cnn_bn.json").read_text())
    assert facts["head"] == "fc" and facts["defense"] == "gcm" and facts["held_out"] == 8
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    log = rows(folder / "log.csv")
    best = max(log, key=lambda row: float(row["val_acc"]) + float(row["val_aug_acc"]))
    assert facts["best_epoch"] == int(best["epoch"])

    later = run_here("train_gcm.py", *SMALL, "--stage", 2, "--lr_head", 0, "--lr_backbone", 0,
                     "--epochs", 1, "--save", "runs/stage2")
    assert later.returncode == 0, later.stderr
    assert "from runs/stage1/stage1_cnn_bn.pth, behind gcm+resizepad" in later.stdout
    one, two = (weights_of(tmp_path / f"runs/stage{k}/stage{k}_cnn_bn.pth") for k in (1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one if "running" not in key
               and "tracked" not in key)  # a rate of 0: what it began with

    table = run_here("gcm.py", "--data_dir", "digits", "--model_name", "cnn_bn", "--weights",
                     "runs/stage1/stage1_cnn_bn.pth", "--attacks", "fgsm", "--num_images", 20,
                     "--results", "runs/stage1/gcm", "--device", "cpu")
    assert table.returncode == 0, table.stderr
    both = run_here("train_gcm.py", "--compare", "runs/stage1", "runs/stage2", "--save", "both")
    assert both.returncode == 0, both.stderr
    assert (tmp_path / "both/comparison.md").read_text() == both.stdout
    assert (tmp_path / "both/comparison.png").read_bytes().startswith(b"\x89PNG")
    lines = [line for line in both.stdout.splitlines() if line.startswith("| stage")]
    assert "AR, attacker who knows" in both.stdout and len(lines) == 2
    assert lines[0].count("-") > 3 and lines[1].endswith("| - | - | - |")
    clean = json.loads((folder / "results.json").read_text())["accuracy"]["clean"]
    assert f"{100 * clean['value']:.1f}" in lines[0]


def test_stage_two_without_stage_one_says_what_to_type(run_here, refused):
    refused(run_here("train_gcm.py", *SMALL, "--stage", 2), "no runs/gcm_digits_cnn_bn/stage1",
            "--stage 1 first")


@pytest.mark.parametrize("flags", [("--ema", 0.9), ("--defense", "gcm+resizepad")], ids=str)
def test_a_killed_run_goes_on_to_the_same_bytes(run_here, tmp_path, monkeypatch, flags):
    all_of_it = (*SMALL, *flags, "--w_fgsm", 1)
    assert run_here("train_gcm.py", *all_of_it, "--save", "whole").returncode == 0
    real = train_gcm.save_csv

    def dies(path, value):
        real(path, value)
        raise KeyboardInterrupt
    monkeypatch.setattr(train_gcm, "save_csv", dies)
    assert run_here("train_gcm.py", *all_of_it, "--save", "killed").returncode == 130
    monkeypatch.setattr(train_gcm, "save_csv", real)
    assert len(rows(tmp_path / "killed/log.csv")) == 1
    done = run_here("train_gcm.py", *all_of_it, "--save", "killed", "--resume")
    assert done.returncode == 0, done.stderr
    whole, killed = ((tmp_path / name / "stage1_cnn_bn.pth").read_bytes()
                     for name in ("whole", "killed"))
    assert whole == killed


def test_the_running_mean_is_what_is_saved(run_here, tmp_path):
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--epochs", 1, "--ema", 0.5, "--model_name",
                    "vgg_small", "--head", "own", "--save", "run", "--batch_size", 76)
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


def test_the_best_epoch_is_the_one_that_is_kept(run_here, tmp_path, monkeypatch):
    scores, kept = iter([(0.2, 0.2), (0.9, 0.4), (0.6, 0.6), (0.95, 0.35)]), []

    def validate(training):
        kept.append({k: v.clone() for k, v in training.core[1].state_dict().items()})
        return next(scores)
    monkeypatch.setattr(train_gcm.Training, "validate", validate)
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--epochs", 4, "--save", "run")
    assert done.returncode == 0, done.stderr
    saved = weights_of(tmp_path / "run/stage1_cnn_bn.pth")
    assert json.loads((tmp_path / "run/stage1_cnn_bn.json").read_text())["best_epoch"] == 2
    assert all(torch.equal(saved[k], kept[1][k]) for k in saved)
    assert not all(torch.equal(saved[k], kept[3][k]) for k in saved)


def test_two_processes_step_as_one_does(tmp_path):
    """One step: Adamax goes by signs, so that rounding of what is nearly zero shows at once; the
    weight decay makes the signs depend on the gradient's scale."""
    flags = [*map(str, SMALL), "--augment", "none", "--w_mixup", "0", "--w_cutmix", "0",
             "--w_fgsm", "1", "--head", "own", "--lr_head", "0.001", "--lr_backbone", "0.001",
             "--weight_decay", "1", "--epochs", "1", "--batch_size", "152"]
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc_per_node",
                                                "2", "--master_port", "29617"])):
        done = subprocess.run([sys.executable, *start, str(SRC / "train_gcm.py"), *flags, "--save",
                               folder], cwd=tmp_path, env=here, capture_output=True, text=True,
                              check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (weights_of(tmp_path / folder / "stage1_cnn_bn.pth") for folder in ("one", "two"))
    start = trainable("cnn_bn", kind="digits")[1].state_dict()
    for key in one:
        apart = (one[key].double() - two[key].double()).abs()
        assert (apart < 2e-5).double().mean() > 0.99, key
        assert not torch.equal(one[key], start[key])
    first, second = (rows(tmp_path / folder / "log.csv")[0] for folder in ("one", "two"))
    assert float(first["loss"]) == pytest.approx(float(second["loss"]), abs=1e-4)
    assert first["train_acc"] == second["train_acc"]


def test_everything_at_once_trains_in_two_processes(tmp_path):
    flags = [*map(str, SMALL), "--defense", "gcm+resizepad", "--ema", "0.9", "--w_fgsm", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
         "29619", str(SRC / "train_gcm.py"), *flags, "--save", "run"], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run/stage1_cnn_bn.json").read_text())
    assert facts["processes"] == 2 and len(rows(tmp_path / "run/log.csv")) == 2


def test_the_door_trains_both_stages_and_attacks_them(tmp_path):
    done = subprocess.run(
        ["sh", str(SRC / "train_gcm.sh"), *map(str, SMALL[:-4]), "--epochs", "1", "--pretrained",
         "random"], cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "ATTACKED": "8", "EPOCHS2": "2"},
        capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "runs/challenge/stage2/log.csv")) == 2
    assert "from runs/challenge/stage1/stage1_cnn_bn.pth" in done.stdout
    last = done.stdout.splitlines()[-2:]
    assert last[0].startswith("| stage1 | 1 | gcm |") and last[1].startswith(
        "| stage2 | 2 | gcm+resizepad |")
    assert all(line.count("(") == 4 for line in last)  # clean_acc and three attackers


def test_a_network_of_ours_may_be_where_it_begins(run_here, tmp_path):
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--pretrained", "V1", "--lr_backbone", 0,
                    "--weight_decay", 0, "--model_name", "vgg_small", "--save", "run")
    assert done.returncode == 0, done.stderr
    first = load_model("vgg_small", kind="digits", data_dir="digits")[1].state_dict()
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


def test_the_challenges_list_is_trained_on_and_attacked(run_here, tmp_path, picture):
    names = photographs(tmp_path, picture)
    (tmp_path / "phase1/label.txt").write_text("".join(f"{n} {k}\n" for n, k in names))
    done = run_here("train_gcm.py", "--data_dir", "phase1/label.txt", *OWN, "--save", "run")
    assert done.returncode == 0, done.stderr
    assert "14 images" in done.stdout and "3 classes, 4 held out" in done.stdout
    assert "tested on n=4" in done.stdout and "the best epoch was chosen on them" in done.stdout
    weights = weights_of(tmp_path / "run/stage1_squeezenet1_1.pth")
    assert weights["classifier.1.weight"].shape[0] == 3
    table = run_here("gcm.py", "--data_dir", "phase1", "--model_name", "squeezenet1_1",
                     "--weights", "run/stage1_squeezenet1_1.pth", "--attacks", "fgsm", "--device",
                     "cpu", "--workers", 0)
    said = table.stdout + table.stderr
    assert "n=4" in said or "none of these images right" in said
    assert "64 pixels" in said or table.returncode == 2


def test_a_convnext_with_ml_decoder_learns_own_class_folders(run_here, tmp_path, picture):
    for split, each in (("train", 5), ("val", 2)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(each):
                picture(tmp_path / "own" / split / name / f"{i}.png", seed=50 * k + i)
    done = run_here("train_gcm.py", "--data_dir", "own", *OWN[4:], "--batch_size", 4, "--head",
                    "ml_decoder", "--defense", "gcm+resizepad", "--image_size", 32, "--save", "run")
    assert done.returncode == 0, done.stderr
    assert "convnext_tiny, head ml_decoder" in done.stdout and "tested on n=4" in done.stdout
    facts = json.loads((tmp_path / "run/stage1_convnext_tiny.json").read_text())
    assert facts["classes"] == ["cat", "dog"]
    model = load_model("convnext_tiny", weights=str(tmp_path / "run/stage1_convnext_tiny.pth"),
                       kind="folder")
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(("name", "text", "classes"), [
    ("label.txt", "0.jpg 1\n10.jpg 0\n", ("0", "1")),
    ("label.txt", "images/0.jpg wolf\n\nimages/10.jpg ape\n", ("ape", "wolf")),
    ("train.json", '{"1": ["0.jpg"], "0": ["10.jpg"]}', ("0", "1")),
    ("train.json", '[["0.jpg", 2], ["10.jpg", 0]]', ("0", "1", "2"))])
def test_image_lists_in_every_form(tmp_path, picture, name, text, classes):
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
    ("train.json", "{", "not JSON"), ("train.json", "[1]", "no image list"),
    ("train.json", '{"a": 3}', "no image list")])
def test_a_bad_list_is_one_line(tmp_path, picture, name, text, words):
    photographs(tmp_path, picture, 2, 1)
    path = tmp_path / "phase1" / name
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_list(path)


def test_class_folders_are_not_taken_for_a_list_that_lies_beside_them(tmp_path, picture):
    picture(tmp_path / "data/val/n01440764/a.png")
    (tmp_path / "data/val.txt").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    assert open_images(str(tmp_path / "data"), split="test").names == ("n01440764/a.png",)


def test_what_is_held_out_is_spread_over_the_classes():
    labels = torch.arange(10).repeat_interleave(20)[torch.randperm(200, generator=make_generator(
        0))]
    held = hold_out(labels, 0.1)
    assert torch.equal(labels[held].bincount(), torch.full((10,), 2))
    assert torch.equal(held, hold_out(labels, 0.1))
    assert hold_out(torch.arange(400), 0.05).sum() == 20  # one image a class: of every twentieth


def test_no_image_that_was_trained_on_chooses_or_is_tested(run_here, monkeypatch, tmp_path):
    training = built(run_here, monkeypatch, tmp_path)
    test = open_images("digits", split="test")
    trained, held = set(training.images.names), set(training.held.names)
    assert len(trained) == 152 and len(held) == 8
    assert not trained & held and not (trained | held) & set(test.names)


def test_the_test_images_are_the_test_images():
    images, held = unseen("digits", "data", 0.1, None)
    assert images.names == open_images("digits", split="test").names and not held


# ---------------------------------------------------------------- evaluation

def test_accuracy_under_an_augmentation_is_a_plain_loop(monkeypatch):
    monkeypatch.setattr(gcm_eval, "OPS", {k: augment.OPS[k] for k in ("rain", "rotation")})
    images = open_images("digits", split="test").prepared(28, 130)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    found = gcm_eval.accuracies(model, images, torch.device("cpu"), generator=make_generator(4),
                                workers=0)
    generator, right = make_generator(4), {"clean": 0, "rain": 0, "rotation": 0}
    for part in torch.arange(130).split(100):
        x, y = to_float(images.pixels[part]), images.labels[part]
        for name in right:
            z = x if name == "clean" else augment.OPS[name](x, generator=generator)
            for image, label in zip(z, y, strict=True):
                right[name] += int(model(image[None]).argmax()) == int(label)
    assert {name: s["k"] for name, s in found.items()} == right
    assert {s["n"] for s in found.values()} == {130}
    mean = gcm_eval.corrupted(found)
    assert mean["n"] == 260 and mean["k"] == right["rain"] + right["rotation"]


def test_the_file_says_of_what_network_its_figures_are(run_here, tmp_path):
    done = run_here("train_gcm.py", *SMALL, *PLAIN, "--head", "ml_decoder", "--save", "run")
    assert done.returncode == 0, done.stderr
    again = run_here("train_gcm.py", "--evaluate", "run/stage1_cnn_bn.pth", "--eval_images", 20,
                     "--save", "later", "--device", "cpu")
    assert again.returncode == 0, again.stderr
    first, second = (json.loads((tmp_path / f / "results.json").read_text())["accuracy"]
                     for f in ("run", "later"))
    assert first == second and set(first) == {"clean", *augment.OPS}
    model = load_model("cnn_bn", weights=str(tmp_path / "run/stage1_cnn_bn.pth"), kind="digits")
    images = open_images("digits", split="test").prepared(28, 20)
    right = (model(to_float(images.pixels)).argmax(1) == images.labels).sum()
    assert first["clean"]["k"] == int(right)


def test_runs_tested_on_other_images_are_not_put_side_by_side(run_here, refused):
    for name, n in (("a", 20), ("b", 30)):
        assert run_here("train_gcm.py", *SMALL, *PLAIN, "--epochs", 1, "--eval_images", n,
                        "--save", name).returncode == 0
    refused(run_here("train_gcm.py", "--compare", "a", "b"), "--compare b", "the same images")
    refused(run_here("train_gcm.py", "--compare", "a", "nowhere"), "no finished run")


@pytest.mark.parametrize(("flags", "words"), [
    (("--model_name", "resnet9000"), ("resnet9000",)), (("--augment", "hail"), ("--augment hail",)),
    (("--batch_size", 500), ("--batch_size 500",)), (("--eval_images", 400), ("has 355",)),
    (("--pretrained", "nowhere.pth"), ("--pretrained nowhere.pth",)), (("--p", 2), ("at most 1",)),
    (("--model_name", "mlp"), ("no feature map", "--head own")),
    (("--fgsm_eps", 0.2, 0.1), ("the smaller one first",)),
    (("--image_size", 40), ("digits images are 28",)), (("--hold_out", 0.9), ("at most 0.5",)),
    ((*PLAIN, "--w_clean", 0), ("nothing to train on",)), (("--stage", 3), ("invalid choice",)),
    (("--low", 40), ("low=40",)), (("--data_dir", "nowhere"), ("nowhere", "no such folder")),
    (("--evaluate", "nowhere.pth"), ("nowhere.json",))], ids=str)
def test_bad_input_is_one_line_and_nothing_is_trained(run_here, refused, tmp_path, flags, words):
    extra = ("--defense", "gcm+resizepad") if flags[0] == "--low" else ()
    refused(run_here("train_gcm.py", *SMALL, *flags, *extra), *words)
    assert not list(tmp_path.rglob("*.pth"))


def test_a_rate_that_explodes_is_said_and_the_last_checkpoint_kept(run_here, refused, tmp_path):
    refused(run_here("train_gcm.py", *SMALL, *PLAIN, "--lr_head", 1e30, "--save", "run"),
            "type a smaller --lr_head")
    assert not list(tmp_path.rglob("stage1_*.pth"))


def test_without_tensorboard_the_flag_says_so_and_no_run_is_lost(run_here, refused, monkeypatch,
                                                                 tmp_path):
    assert run_here("train_gcm.py", *SMALL, *PLAIN, "--save", "run").returncode == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(run_here("train_gcm.py", *SMALL, *PLAIN, "--save", "run", "--overwrite",
                     "--tensorboard"), "pip install tensorboard")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_one_class_is_none(run_here, refused, tmp_path, picture):
    photographs(tmp_path, picture)  # images/, and no list beside it
    refused(run_here("train_gcm.py", "--data_dir", "phase1", *OWN), "one class, 'images'")


def test_tensorboard_gets_every_column(run_here, monkeypatch, tmp_path):
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


def test_cross_entropy_of_soft_labels_is_the_mean_over_them():
    logits, y = torch.randn(3, 4), torch.tensor([0, 3, 1])
    soft = F.one_hot(y, 4) * 0.7 + F.one_hot(y.roll(1), 4) * 0.3
    wanted = 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y.roll(1))
    assert torch.allclose(F.cross_entropy(logits, soft), wanted)
