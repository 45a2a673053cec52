"""train_gcm.py: losses, steps, stages, resuming, several processes, own images, bad input."""

import copy
import csv
import gc
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SRC
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import train_gcm
from attacks import fgsm
from utils import challenge, data, finished, loop
from utils.attack.random_layers import chance_for
from utils.augment import PRESETS
from utils.challenge import Drawn, draw_once, number_of_terms, settle
from utils.data import hold_out, open_images, to_float, unseen
from utils.defenses import GradientConcealment
from utils.errors import UserError
from utils.lists import read_list
from utils.measure import share
from utils.models import load_model, trainable
from utils.nets import HEADS, RECIPE_VERSION, build_small, head_parameters
from utils.report_nets import Measured, columns_of
from utils.run import RunFolder, load_json, make_generator
from utils.team import Team

SMALL = ("--num_images", 80, "--epochs", 2, "--batch_size", 38, "--device", "cpu", "--workers", 0)
PLAIN = ("--augment", "none", "--cutmix_prob", 0, "--w_mixup", 0, "--w_cutmix", 0, "--w_fgsm", 0,
         "--w_fgsm_target", 0)
READ = ("kind", "data_dir", "model_name", "head", "classes", "hold_out", "given_images", "defense",
        "low", "image_size", "stage", "augment", "w_fgsm", "w_fgsm_target", "seconds",
        "best_epoch")  # by other scripts
CPU = torch.device("cpu")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights_of(path):
    return torch.load(path, weights_only=True)


def run_in(folder, *flags):
    """Run train_gcm.py with these flags in the folder. -> what it prints"""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train_gcm.py", *map(str, flags)])
        train_gcm.main(train_gcm.get_args())
    gc.collect()  # frees the lock on the run's folder
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

WEIGHTS = ("w_clean", "w_mixup", "w_cutmix", "w_fgsm", "w_fgsm_target")


def minibatch(n=5, classes=4):
    generator = make_generator(1)
    x = torch.rand((n, 3, 6, 6), generator=generator, dtype=torch.float64)
    x[:, :, 0], x[:, :, 1] = 0, 1  # where a step leaves the box
    return x, torch.randint(classes, (n,), generator=generator)


def drawn_for(y, cutmix=False, eps=0.03, eps_target=0.07):
    return Drawn(cutmix, eps, eps_target, (y + torch.arange(len(y))) % 4)  # the first is the label


def terms_of(net, x, y, seed=0, drawn=None, **weights):
    torch.manual_seed(seed)
    s = SimpleNamespace(classes="abcd", **{w: weights.get(w, 0.0) for w in WEIGHTS})
    return list(train_gcm.terms(net, x, y, drawn or drawn_for(y), s))


def soft(y, partner, share):
    return share * F.one_hot(y, 4) + (1 - share) * F.one_hot(partner, 4)


def test_the_clean_term_uses_the_images_themselves():
    x, y = minibatch()
    (weight, images, labels), = terms_of(curved(), x, y, w_clean=2.0)
    assert weight == 2 and images is x and labels is y


@pytest.mark.parametrize("kind", ["w_mixup", "w_cutmix", "in place"])
def test_mixed_images_have_mixed_labels(kind):
    x, y = minibatch()
    x = torch.rand_like(x)  # no two pixels alike
    in_place = {"drawn": drawn_for(y, cutmix=True), "w_clean": 3.0}
    more = in_place if kind == "in place" else {kind: 3.0}
    (weight, mixed, labels), = terms_of(curved(), x, y, seed=5, **more)
    partner = x.roll(1, 0)
    if kind == "w_mixup":
        share = ((mixed - partner) * (x - partner)).sum() / (x - partner).square().sum()
        assert torch.allclose(mixed, share * x + (1 - share) * partner)
    else:
        own = (mixed == x).all(1)
        assert ((mixed == partner).all(1) | own).all()
        share = own[0].double().mean()
        assert torch.equal(own, own[:1].expand_as(own))  # the same rectangle in every image
    assert weight == 3 and 0.02 < share < 0.98
    assert torch.allclose(labels.double(), soft(y, y.roll(1), share).double(), atol=1e-6)


def test_if_cutmix_replaces_the_images_the_other_terms_see_its_images_with_the_first_label():
    net, (x, y) = curved(), minibatch()
    drawn, weights = drawn_for(y, cutmix=True), dict.fromkeys(WEIGHTS, 1.0)
    (_, cut, labels), *rest = terms_of(net, x, y, drawn=drawn, **weights)
    assert not torch.equal(cut, x) and labels.shape == (5, 4)
    torch.manual_seed(0)
    v2.CutMix(num_classes=4)(x, y)
    for mix, (_, images, labels) in zip((v2.MixUp, v2.CutMix), rest[:2], strict=True):
        wanted = mix(num_classes=4)(cut, y)
        assert torch.equal(images, wanted[0]) and torch.equal(labels, wanted[1])
    assert all(labels is y for _, _, labels in rest[2:])
    assert all(((images - cut).abs() < 0.071).all() for _, images, _ in rest[2:])


def naive_fgsm(net, x, y, eps):
    """x + eps sign(g), x - eps sign(g), image by image."""
    net, found = copy.deepcopy(net).eval(), []
    for sign in (1, -1):
        one = []
        for i in range(len(x)):
            image = x[i:i + 1].clone().requires_grad_()
            g, = torch.autograd.grad(-net(image).log_softmax(1)[0, y[i]], image)
            one.append(torch.clip(x[i:i + 1] + sign * eps * torch.sign(g), 0, 1))
        found.append(torch.cat(one))
    return found


def test_both_signs_of_both_fgsm_terms_equal_those_computed_by_hand():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
                        nn.Dropout(0.5), nn.Linear(64, 4)).double()
    net[1].running_mean += 0.3
    net[4].eval()  # a part with its own mode
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    x, y = minibatch()
    drawn, before = drawn_for(y), {k: v.clone() for k, v in net.state_dict().items()}
    found = terms_of(net, x, y, drawn=drawn, w_fgsm=2.0, w_fgsm_target=6.0)
    wanted = naive_fgsm(net, x, y, 0.03) + naive_fgsm(net, x, drawn.target, 0.07)
    assert [weight for weight, _, _ in found] == [1, 1, 3, 3]  # half of the weight for each sign
    for (_, images, labels), by_hand in zip(found, wanted, strict=True):
        assert labels is y and torch.allclose(images, by_hand, atol=1e-12)
    assert net.training and net[1].training and not net[4].training
    assert all((p.grad == 7).all() and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("missing", WEIGHTS)
def test_a_term_of_weight_zero_is_not_computed(missing):
    net, (x, y) = curved(), minibatch()
    weights = dict.fromkeys(WEIGHTS, 1.0) | {missing: 0.0}
    found = terms_of(net, x, y, **weights)
    both = missing in ("w_fgsm", "w_fgsm_target")
    assert len(found) == (5 if both else 6) == number_of_terms(SimpleNamespace(**weights))
    assert [images is x for _, images, _ in found] == [missing != "w_clean"] + [False] * (
        len(found) - 1)


def test_a_minibatch_draws_eps_targets_and_cutmix_with_the_right_probabilities():
    s = SimpleNamespace(classes="abcdef", fgsm_eps=(0.001, 0.08), cutmix_prob=0.3)
    generator = make_generator(0)
    drawn = [draw_once(7, s, generator) for _ in range(1000)]
    allowed = torch.linspace(0.001, 0.08, 20)
    for found in ([d.eps for d in drawn], [d.eps_target for d in drawn]):
        assert all((allowed - eps).abs().min() < 1e-9 for eps in found) and len(set(found)) == 20
    assert 10 < sum(d.eps == d.eps_target for d in drawn) < 110  # one in twenty: drawn apart
    counts = torch.cat([d.target for d in drawn]).bincount()
    assert len(counts) == 6 and (counts > 1000).all() and all(len(d.target) == 7 for d in drawn)
    assert 230 < sum(d.cutmix for d in drawn) < 370
    for chance in (0, 1):
        s.cutmix_prob = chance
        assert {draw_once(7, s, generator).cutmix for _ in range(50)} == {bool(chance)}


# ------------------------------------------------------------------- a step

def built(monkeypatch, tmp_path, *flags):
    """The training of a command line, before its first step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gcm.py", *map(str, (*SMALL, *flags))])
    return train_gcm.ChallengeTraining(*settle(train_gcm.get_args(), Team(), CPU), Team(), CPU)


def digits_of(training, n):
    return to_float(training.images.pixels[:n]), training.images.labels[:n]


@pytest.mark.parametrize(("stage", "wanted"), [
    (1, ("gcm", ["phase1"], 1, 1, 0, 0.3, 1, 1)),
    (2, ("gcm+resizepad", ["released"], 1, 1, 1, 0, 0, 0))])
def test_defaults_are_the_published_ones(monkeypatch, tmp_path, stage, wanted):
    s = built(monkeypatch, tmp_path, "--stage", stage, "--pretrained", "random").s
    assert (s.defense, s.augment, s.w_clean, s.w_mixup, s.w_cutmix, s.cutmix_prob, s.w_fgsm,
            s.w_fgsm_target) == wanted
    assert s.chances == PRESETS[s.augment[0]] and s.fgsm_eps == [0.001, 0.08]


def test_a_flag_overrides_the_default_of_the_stage(monkeypatch, tmp_path):
    s = built(monkeypatch, tmp_path, "--w_fgsm_target", 0.25, "--cutmix_prob", 0, "--w_cutmix", 2,
              "--augment", "rain").s
    assert (s.w_fgsm, s.w_fgsm_target, s.cutmix_prob, s.w_cutmix, s.chances) == (
        1, 0.25, 0, 2, {"rain": 0.1})


def test_the_training_attack_bypasses_gcm(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path, "--head", "own", "--model_name", "vgg_small")
    assert isinstance(training.defended[0], GradientConcealment)
    found, real = {}, train_gcm.terms

    def spied(attacked, x, y, drawn, *more):
        found["x_adv"] = fgsm(attacked, x, y, eps=drawn.eps)
        found["undefended"] = fgsm(training.model, x, y, eps=drawn.eps)
        found["through gcm"] = fgsm(training.defended, x, y, eps=drawn.eps)
        return real(attacked, x, y, drawn, *more)
    monkeypatch.setattr(train_gcm, "terms", spied)
    training.step(*digits_of(training, 30), 30)
    same = (found["x_adv"] - found["undefended"]).abs() < 1e-6
    assert same.double().mean() > 0.999
    assert ((found["through gcm"] - found["undefended"]).abs() > 1e-4).double().mean() > 0.1


EVERY = ("--w_clean", 0.5, "--w_mixup", 0.7, "--w_cutmix", 1.5, "--w_fgsm", 2, "--w_fgsm_target", 3)


@pytest.mark.parametrize("cutmix", [False, True])
def test_a_step_adds_up_the_gradients_of_all_terms(monkeypatch, tmp_path, cutmix):
    """The oracle: the sum of all losses, differentiated at once; BatchNorm and dropout included."""
    training = built(monkeypatch, tmp_path, *EVERY)
    (x, y), oracle = digits_of(training, 24), copy.deepcopy(training.defended)
    drawn = Drawn(cutmix, 0.03, 0.07, torch.arange(24) % 10)
    monkeypatch.setattr(challenge, "draw_once", lambda n, s, generator: drawn)
    torch.manual_seed(1)
    loss, right, clean, n = training.step(x, y, 24).tolist()

    torch.manual_seed(1)
    cut, labels = v2.CutMix(num_classes=10)(x, y) if cutmix else (x, y)
    logits = oracle.train()(cut)
    total = 0.5 * F.cross_entropy(logits, labels)
    for weight, mix in ((0.7, v2.MixUp), (1.5, v2.CutMix)):
        images, labels = mix(num_classes=10)(cut, y)
        total = total + weight * F.cross_entropy(oracle(images), labels)
    for weight, at, eps in ((2, y, 0.03), (3, drawn.target, 0.07)):
        twice = [F.cross_entropy(oracle(x_adv), y)
                 for x_adv in naive_fgsm(oracle[1], cut, at, eps)]  # [1]: without GCM
        total = total + weight * (twice[0] + twice[1]) / 2
    total.backward()
    assert loss / 24 == pytest.approx(total.item(), rel=1e-5) and n == 24
    assert (clean, right) == ((0, 0) if cutmix else (24, (logits.argmax(1) == y).sum().item()))
    for (name, p), q in zip(training.defended.named_parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max()), name
    for p, q in zip(training.defended.buffers(), oracle.buffers(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def peak_of_saved_tensors(training, n=16):
    """Peak number of bytes that a step keeps for its backward passes."""
    alive, peak = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.nbytes
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.nbytes
    x, y = digits_of(training, n)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        training.step(x, y, n)
    assert alive == 0
    return peak


def test_a_step_needs_only_the_memory_of_one_loss(monkeypatch, tmp_path):
    one = peak_of_saved_tensors(built(monkeypatch, tmp_path, *PLAIN))
    every = built(monkeypatch, tmp_path, "--w_mixup", 1, "--w_cutmix", 1, "--w_fgsm", 1)
    assert one > 1e6 and peak_of_saved_tensors(every) < 1.02 * one


def test_gradients_are_averaged_over_processes_once_per_step(monkeypatch, tmp_path):
    training, open_now, seen = built(monkeypatch, tmp_path, *EVERY), [], []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = training.defended

        def forward(self, x):
            seen.append(len(open_now))
            return self.module(x)

        @contextmanager
        def no_sync(self):
            open_now.append(1)
            yield
            open_now.pop()
    training.parallel = Watched()
    training.step(*digits_of(training, 8), 8)
    assert seen == [1] * 6 + [0]


def test_every_process_draws_what_one_process_draws(monkeypatch, tmp_path):
    training, found = built(monkeypatch, tmp_path), []
    real = train_gcm.terms
    monkeypatch.setattr(train_gcm, "terms", lambda attacked, x, y, drawn, *more: (
        found.append(drawn) or real(attacked, x, y, drawn, *more)))
    x, y = digits_of(training, 11)
    for team in (Team(), Team(0, 2), Team(1, 2)):
        training.team = team
        training.generator.manual_seed(4)
        own = slice(team.rank, None, team.size)
        training.step(x[own], y[own], 11)
    one, first, second = found
    assert (one.eps, one.eps_target) == (first.eps, first.eps_target) == (
        second.eps, second.eps_target)
    assert one.cutmix == first.cutmix == second.cutmix
    assert torch.equal(one.target[::2], first.target) and torch.equal(one.target[1::2],
                                                                      second.target)


@pytest.mark.slow
@pytest.mark.parametrize("still", ["head", "backbone"])
def test_head_and_backbone_have_their_own_learning_rates(monkeypatch, tmp_path, still):
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
    training = built(monkeypatch, tmp_path, "--augment", "impulse_noise", "--p", 1)
    seen = []
    monkeypatch.setattr(training, "step", lambda x, y, joint: seen.append(x) or torch.ones(4))
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


def test_augmentations_and_mixing_use_different_random_numbers(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path)
    drawn, real = set(), train_gcm.augment
    monkeypatch.setattr(train_gcm, "augment", lambda x, chances, *, generator: (
        drawn.add(generator.seed) or real(x, chances, generator=generator)))
    monkeypatch.setattr(training, "step", lambda x, y, joint: drawn.update(
        [torch.initial_seed(), chance_for(x, None).seed]) or torch.ones(4))
    for _ in range(2):
        training.one_pass(tqdm(disable=True))
    assert len(drawn) == 6  # three in each pass, including the defence's


def test_an_image_is_augmented_alike_by_any_number_of_processes(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path, "--augment", "released", "--defense", "resizepad")

    def seen(*team):
        training.team, found = OneOf(*team), []
        training.generator.manual_seed(4)
        monkeypatch.setattr(training, "step", lambda x, y, joint: found.append(
            (x, chance_for(x, None).words(2))) or torch.ones(4))
        training.one_pass(tqdm(disable=True))
        return found
    for one, *parts in zip(seen(0, 1), seen(0, 2), seen(1, 2), strict=True):
        for rank, part in enumerate(parts):
            for whole, mine in zip(one, part, strict=True):
                assert torch.equal(whole[rank::2], mine)


# --------------------------------------------------------------- runs, stages

@pytest.mark.slow
def test_a_run_saves_the_network_of_its_best_epoch_and_its_facts(stage1):
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
    flags = (*SMALL, "--ema", 0.9, "--defense", "gcm+resizepad", "--w_cutmix", 1)
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


ONE_STEP = (*SMALL, "--augment", "none", "--cutmix_prob", 0, "--w_mixup", 0, "--head", "own",
            "--lr_head", 0.001, "--lr_backbone", 0.001, "--weight_decay", 1, "--epochs", 1,
            "--batch_size", 76)  # what is left: the clean loss and both FGSM terms
ALL = (*SMALL, "--defense", "gcm+resizepad", "--ema", 0.9, "--w_cutmix", 1)
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
def test_two_processes_take_the_same_step_as_one(two_processes):
    """One step only: Adamax follows signs, so rounding of nearly zero gradients shows at once;
    weight decay makes the signs depend on the gradient's scale."""
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
        env={**os.environ, "PYTHON": sys.executable, "ATTACKED": "40", "TESTED": "6",
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


def test_the_table_has_the_weights_of_both_fgsm_terms(stage1):
    facts = load_json(stage1[0] / "runs/stage1/stage1_cnn_bn.json")
    old = {k: v for k, v in facts.items() if k != "w_fgsm_target"} | {"w_fgsm": 0.02}
    one, other = (columns_of(Measured("stage1", finished.checked(found, "NAME.json"), stage1[0],
                                      share(1, 2), {}, {}, {})) for found in (facts, old))
    assert (one["w_fgsm"], one["w_fgsm_target"]) == ("1", "1")
    assert other["w_fgsm"] == "0.02" and "w_fgsm_target" not in other  # of an older version


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


@pytest.mark.parametrize("head", HEADS)
def test_an_se_resnet_of_timm_trains_with_every_head(monkeypatch, tmp_path, picture, head):
    pytest.importorskip("timm")
    class_folders(tmp_path, picture)
    training = built(monkeypatch, tmp_path, "--data_dir", "own", *OWN[4:], *PLAIN, "--batch_size",
                     4, "--model_name", "timm/seresnet18", "--head", head, "--image_size", 64)
    x, last = torch.rand(4, 3, 64, 64), head_parameters(training.model[1])
    found = training.optimizer.param_groups[0]["params"]
    assert [id(p) for p in found] == [id(p) for p in last] and len(last) == (
        2 if head == "own" else len(list(training.model[1][1].parameters())))
    before = {name: p.clone() for name, p in training.model.named_parameters()}
    for _ in range(2):  # in the first one timm's residual branches are multiplied by zero
        training.step(x, torch.tensor([0, 1, 0, 1]), 4)
    assert not [name for name, p in training.model.named_parameters()
                if torch.equal(p, before[name])]
    training.best = {"net": training.model[1].state_dict(), "epoch": 1, "score": 0.5}
    training.rows = [{"epoch": 1, "loss": 1.0, "train_acc": 0.5, "val_acc": 0.5, "val_aug_acc": 0.5,
                      "seconds": 1.0}]
    challenge.finish(training, RunFolder(tmp_path / "run"))
    path = tmp_path / "run" / "stage1_seresnet18.pth"
    again = load_model("timm/seresnet18", weights=str(path), kind="folder")
    with torch.no_grad():
        assert torch.allclose(again(x), training.model.eval()(x), rtol=1e-4, atol=1e-4)
        if head != "own":  # the map is what timm computes before it pools
            whole = again[1][0].net
            seen = whole.forward_features(again[0](x))
            assert seen.shape == (4, 512, 2, 2) and torch.equal(again[1][1](seen), again(x))
        assert again(x).shape == (4, 2)
    assert any("SEModule" in type(layer).__name__ for layer in again.modules())


def test_without_timm_its_networks_are_refused_in_one_line(run_here, refused, monkeypatch, tmp_path,
                                                           picture):
    class_folders(tmp_path, picture)
    monkeypatch.setitem(sys.modules, "timm", None)
    for script in ("train_gcm.py", "free_at.py"):
        refused(run_here(script, "--data_dir", "own", "--model_name", "timm/seresnet50", "--save",
                         "run"), "timm/seresnet50", "timm is not installed", "pip install timm")
    assert not (tmp_path / "run").exists()


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


def test_class_folders_take_precedence_over_a_list_in_the_same_folder(tmp_path, picture):
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


@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.25, 0.3, 0.4, 0.45, 0.5])
@pytest.mark.parametrize("size", [20, 40, 100, 7, 13])
def test_the_requested_share_of_every_class_is_held_out(share, size):
    """The exact number if it is whole, else one of its two neighbours."""
    found = hold_out(torch.arange(10).repeat(size), share)
    counts = torch.arange(10).repeat(size)[found].bincount(minlength=10)
    exact = round(share * size, 6)
    assert set(counts.tolist()) <= {math.floor(exact), math.ceil(exact)}
    assert abs(int(counts.sum()) - 10 * exact) <= 0.5
    mixed = torch.arange(3).repeat_interleave(torch.tensor([size, 3 * size, 2]))  # unequal classes
    few, most, least = mixed[hold_out(mixed, share)].bincount(minlength=3).tolist()
    assert abs(few - exact) < 1 and abs(most - 3 * exact) < 1 and abs(least - 2 * share) < 1


def test_one_in_twenty_is_held_out_as_in_published_runs():
    held = hold_out(torch.zeros(200), 0.05).nonzero()[:, 0]
    assert held.tolist() == list(range(10, 200, 20))


def test_a_run_that_held_out_other_images_is_refused(tmp_path, picture):
    """It is told by their number: older versions held out half for --hold_out 0.4."""
    for i in range(20):
        picture(tmp_path / f"data/{'ab'[i % 2]}/{i}.png", seed=i)
    facts = {"data_dir": str(tmp_path / "data"), "hold_out": 0.4, "given_images": None, "stage": 1}
    assert len(finished.unseen_by({**facts, "held_out": 8}, facts["data_dir"], "data")[0]) == 8
    with pytest.raises(UserError, match="holds out 8 images today, 10 in the training"):
        finished.unseen_by({**facts, "held_out": 10}, facts["data_dir"], "data")


def test_a_network_is_tested_on_the_list_of_test_images_beside_the_training_list(tmp_path, picture):
    """Both lists name files in one folder, as in the challenge."""
    names = {"train": [], "val": []}
    for i in range(12):
        split = "val" if i % 3 == 0 else "train"
        picture(tmp_path / f"data/train_p2/{i}.png", seed=i)
        names[split].append([f"{i}.png", i % 2])
    for split, rows in names.items():
        (tmp_path / f"data/{split}.json").write_text(json.dumps(rows))
    facts = {"data_dir": str(tmp_path / "data"), "hold_out": 0.25, "given_images": None, "stage": 1}
    for data_dir in (tmp_path / "data", tmp_path / "data" / "val.json"):
        for own in (facts, {**facts, "hold_out": None}):
            images, note = finished.unseen_by(own, str(data_dir), "data")
            assert sorted(images.names) == sorted(name for name, _ in names["val"]) and note == ""


@dataclass(frozen=True)
class OneOf(Team):
    """A process whose counts are not summed over processes."""
    def total(self, values):
        return values


def test_each_process_decodes_its_own_held_out_images(monkeypatch, tmp_path, picture):
    """Any number of processes see the same images, augmented and resized in the same way."""
    names = photographs(tmp_path, picture)
    (tmp_path / "phase1/label.txt").write_text("".join(f"{n} {k}\n" for n, k in names))
    training = built(monkeypatch, tmp_path, "--data_dir", "phase1", *OWN, "--defense",
                     "gcm+resizepad")
    monkeypatch.setattr(train_gcm, "BLOCK", 2, raising=False)
    decoded, seen, real = [], [], data.decode
    monkeypatch.setattr("utils.images.decode", lambda path, *more: (
        decoded.append(path.name) or real(path, *more)))
    training.model.register_forward_pre_hook(lambda model, x: seen.append(x[0].clone()))

    def validated(*team):
        training.team = OneOf(*team)
        decoded.clear(), seen.clear()
        accuracies = training.validate()
        return list(decoded), list(seen), accuracies
    names, images, accuracies = validated()
    monkeypatch.setattr(train_gcm, "BLOCK", 3)
    assert accuracies == validated()[2]
    monkeypatch.setattr(train_gcm, "BLOCK", 2)
    parts = [validated(rank, 2) for rank in range(2)]
    assert len(names) == 4 and [part[0] for part in parts] == [names[:2], names[2:]]
    assert torch.equal(torch.cat(images), torch.cat(parts[0][1] + parts[1][1]))
    assert accuracies == tuple((a + b) / 2 for a, b in zip(parts[0][2], parts[1][2], strict=True))


def test_a_process_without_held_out_images_waits_for_the_others(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path)
    counts = []

    class Last(Team):
        def total(self, values):
            counts.append(list(values))
            return [1, 1, 1]
    training.team = Last(2, 3)
    training.validate()
    assert counts == [[0, 0, 0]]


def test_training_held_out_and_test_images_do_not_overlap(monkeypatch, tmp_path):
    training = built(monkeypatch, tmp_path)
    test = open_images("digits", split="test")
    trained, held = set(training.images.names), set(training.held.names)
    assert len(trained) == 76 and len(held) == 4
    assert not trained & held and not (trained | held) & set(test.names)


def test_a_network_is_tested_on_the_test_split_if_there_is_one():
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


def test_another_network_is_not_trained_into_the_folder_of_a_run(
        stage1, run_here, refused, tmp_path):
    """With two networks there, eval_net.py --runs could not tell which to take."""
    shutil.copytree(stage1[0] / "runs/stage1", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    name, = (path.stem for path in (tmp_path / "run").glob("stage1_*.pth"))
    other = "cnn" if name != "stage1_cnn" else "mlp"
    refused(run_here("train_gcm.py", *SMALL, *PLAIN, "--save", "run", "--overwrite",
                     "--model_name", other), f"another network, {name}.pth", "another folder")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    refused(run_here("free_at.py", "--data_dir", "digits", "--model_name", "mlp", "--save", "run",
                     "--overwrite"), f"another network, {name}.pth")


def test_data_with_a_single_class_is_refused(run_here, refused, tmp_path, picture):
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
