"""free_at.py --validate: on which images, what is measured, which network is kept as the best."""

import csv
import gc
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_free import digits, options

import free_at
from attacks import pgd
from utils import free_run, models
from utils.attack.chance import Chance
from utils.data import CIFAR10, open_images
from utils.halving import Halves
from utils.images import spread
from utils.team import Team

CPU = torch.device("cpu")
SMALL = ("--model_name", "mlp", "--num_images", 150, "--epochs", 4, "--replays", 2, "--device",
         "cpu", "--workers", 0, "--save")


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def settings(**changed):
    return SimpleNamespace(**{"validate": None, "data_dir": "digits", "data_root": "data",
                              "hold_out": None, "num_images": None, "labels": None,
                              "classes_are": None, "classes": list("0123456789"), "image_size": 28,
                              "workers": 0, "cache": None} | changed)


# ------------------------------------------------------------------------- the images

def test_validation_images_are_the_last_test_images_of_each_class(capsys):
    train, test = (open_images("digits", split=split) for split in ("train", "test"))
    held = free_run.validation(settings(validate=30, classes=list(train.classes)), train, Team())
    assert len(held) == 30 and held.labels.bincount().tolist() == [3] * 10
    for k in range(10):
        names = [name for name, label in zip(test.names, test.labels, strict=True) if label == k]
        assert set(names[-3:]) <= set(held.names)
    assert not set(held.names) & {test.names[i] for i in spread(test.labels.tolist(), 100)}
    assert "validated after each pass on 30 images" in capsys.readouterr().out


def test_by_default_there_are_few_validation_images():
    train = open_images("digits", split="train")
    few = train.prepared(28, 160)
    assert len(free_run.validation(settings(classes=list(train.classes)), few, Team())) == 16
    assert free_run.validation(settings(validate=0), train, Team()) is None


def test_without_a_test_split_validation_uses_held_out_images(run_here, tmp_path, picture):
    for k, name in enumerate(CIFAR10):
        for i in range(6):
            picture(tmp_path / "sixty" / name / f"{i}.png", 32, 32, seed=10 * i + k)
    done = run_here("free_at.py", "--data_dir", "sixty", "--hold_out", 0.34, "--model_name",
                    "cnn_bn", "--image_size", 32, "--batch_size", 20, "--epochs", 1, "--replays", 1,
                    "--validate", 10, *SMALL[8:], "run")
    assert done.returncode == 0, done.stderr
    assert "validated after each pass on 10 images" in done.stdout
    facts = json.loads((tmp_path / "run" / "free1_cnn_bn_best.json").read_text())
    assert facts["validated"] == 10 and facts["num_images"] == 40 and facts["best_pass"] == 1


def test_without_validation_images_one_line_says_so_and_training_continues(run_here, tmp_path,
                                                                           picture):
    for k, name in enumerate(CIFAR10):
        picture(tmp_path / "both" / "train" / name / "0.png", 32, 32, seed=k)
        picture(tmp_path / "both" / "val" / f"other_{name}" / "0.png", 32, 32, seed=k)
    flags = ("free_at.py", "--data_dir", "both", "--model_name", "cnn_bn", "--image_size", 32,
             "--batch_size", 10, "--epochs", 1, "--replays", 1, *SMALL[8:], "run")
    done = run_here(*flags)
    assert done.returncode == 0, done.stderr
    assert "no validation: the test images have no labels, or other classes\n" in done.stdout
    assert "val_loss" not in rows(tmp_path / "run")[0]
    assert not (tmp_path / "run" / "free1_cnn_bn_best.pth").exists()


# ------------------------------------------------------------------------- what is measured

@pytest.mark.parametrize("method", ["natural", "free"])
def test_loss_accuracy_and_accuracy_under_pgd_10_equal_those_of_a_loop(method):
    held = free_run.validation(settings(validate=70, classes=list(digits().classes)),
                               open_images("digits", split="train"), Team())
    training = free_at.FreeTraining(options(method=method, epochs=30), digits(), Team(), CPU, held)
    for _ in range(training.passes):
        training.one_pass(SimpleNamespace(update=lambda: None))
    found, loss, clean, robust = training.after(), 0.0, 0, 0
    model = training.model.eval()
    for index in (slice(0, 50), slice(50, 70)):
        x, y = held.pixels[index] / 255, held.labels[index]
        logits = model(x).detach()
        loss += F.cross_entropy(logits, y).item() * len(y)
        clean += (logits.argmax(1) == y).sum().item()
        x_adv = pgd(model, x, y, eps=0.1, alpha=0.025, steps=10, stop_early=True,
                    generator=Chance(0, torch.arange(70)[index]))
        robust += (model(x_adv).argmax(1) == y).sum().item()
    assert found["val_loss"] == pytest.approx(loss / 70, rel=1e-5)
    assert found["val_acc"] == clean / 70 and 0.1 < clean / 70 < 1
    assert found["val_adv_acc"] == ("" if method == "natural" else robust / 70)
    assert robust < clean


def test_processes_share_the_blocks_and_give_the_same_result(monkeypatch):
    monkeypatch.setattr(Team, "total", lambda self, values: values)
    images, model = digits(40), models.trainable("mlp", kind="digits")
    monkeypatch.setattr(free_run, "BLOCK", 8)

    def attack(model, x, y, generator):
        return pgd(model, x, y, eps=0.1, alpha=0.025, steps=3, generator=generator)
    whole = free_run.measured(model, images, attack, Team(), CPU, Halves("blocks"))
    for size in (2, 3, 7):
        parts = [free_run.measured(model, images, attack, Team(rank, size), CPU, Halves("blocks"))
                 for rank in range(size)]
        assert torch.tensor(parts).sum(0).tolist() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("method", ["free", "pgd"])
def test_training_gives_the_same_bytes_with_and_without_validation(run_here, tmp_path, method):
    name = "free2_mlp" if method == "free" else "pgd_mlp"
    for number in (0, 20):
        done = run_here("free_at.py", "--method", method, "--validate", number, *SMALL, number)
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / number / f"{name}.pth").read_bytes() for number in ("0", "20"))
    assert one == two and not (tmp_path / "0" / f"{name}_best.pth").exists()
    for plain, row in zip(rows(tmp_path / "0"), rows(tmp_path / "20"), strict=True):
        assert {"val_loss", "val_acc", "val_adv_acc"} == row.keys() - plain.keys()
        assert all(plain[key] == row[key] for key in plain.keys() - {"seconds"})


# ------------------------------------------------------------------------- the best network

def test_the_best_network_is_chosen_under_pgd_10_then_on_clean_images_then_by_order(
        run_here, tmp_path, monkeypatch):
    found, weights = iter([(1.0, 0.9, 0.3), (2.0, 0.5, 0.4), (3.0, 0.6, 0.4), (0.5, 0.6, 0.4)]), []

    def measured(model, *_):
        weights.append({k: v.clone() for k, v in model[1].state_dict().items()})
        return next(found)
    monkeypatch.setattr(free_run, "measured", measured)
    done = run_here("free_at.py", "--method", "fast", "--guard", "off", *SMALL, "run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    saved = torch.load(run / "fast_mlp_best.pth", weights_only=True)
    assert all(torch.equal(saved[k], weights[2][k]) for k in saved)
    assert not all(torch.equal(saved[k], weights[3][k]) for k in saved)
    facts, last = (json.loads((run / f"fast_mlp{end}.json").read_text()) for end in ("_best", ""))
    assert (facts["best_pass"], facts["best_score"]) == (3, [0.4, 0.6])
    assert (facts["weight_steps"], last["weight_steps"]) == (9, 12)
    assert "best_pass" not in last and facts["seconds"] < last["seconds"]
    assert [row["val_adv_acc"] for row in rows(run)] == ["0.3", "0.4", "0.4", "0.4"]


def test_a_run_stands_for_its_last_network_and_the_best_one_is_given_by_name(run_here, tmp_path):
    assert run_here("free_at.py", *SMALL, "run").returncode == 0
    few = ("--num_images", 20, "--attacks", "none", "--device", "cpu", "--workers", 0)
    done = run_here("eval_net.py", "--runs", "run", *few, "--save", "last")
    assert done.returncode == 0, done.stderr
    assert "| free2 |" in done.stdout and "best pass" not in done.stdout
    done = run_here("eval_net.py", "--runs", "run", "run/free2_mlp_best.pth", *few, "--save", "two")
    assert done.returncode == 0, done.stderr
    assert "| free2 |" in done.stdout and "| free2 (best pass) |" in done.stdout
    assert "the pass of free2 (best pass) was chosen on 15 test or held-out" in done.stdout
    done = run_here("eval_net.py", "--model_name", "mlp", "--weights", "run/free2_mlp_best.pth",
                    *few, "--save", "named")
    assert "the pass of mlp was chosen on 15 test or held-out images" in done.stdout


def killed_after_two_passes(run_here, *flags):
    real, calls = free_at.FreeTraining.one_pass, []

    class Killed(BaseException):
        """Stands for SIGKILL: the script must not catch it."""

    def killing(self, bar):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(self, bar)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(free_at.FreeTraining, "one_pass", killing)
        with pytest.raises(Killed):
            run_here("free_at.py", "--method", "natural", *flags)
    gc.collect()


def test_a_run_that_resumes_without_validation_keeps_the_best_network_so_far(
        run_here, refused, tmp_path, monkeypatch):
    scores = iter([0.9, 0.8])
    monkeypatch.setattr(free_run, "measured", lambda *args: (1.0, next(scores), 0.0))
    killed_after_two_passes(run_here, *SMALL, "run", "--validate", 20)
    refused(run_here("free_at.py", "--method", "natural", *SMALL, "run", "--resume", "--validate",
                     30), "--validate 30", "on 20 images", "type --validate 20")
    wanted = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["chosen"]["net"]
    done = run_here("free_at.py", "--method", "natural", *SMALL, "run", "--resume", "--validate", 0)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "run" / "natural_mlp_best.pth", weights_only=True)
    assert all(torch.equal(saved[k], wanted[k]) for k in wanted)
    facts = json.loads((tmp_path / "run" / "natural_mlp_best.json").read_text())
    assert (facts["best_pass"], facts["passes"], facts["validated"]) == (1, 1, 20)
    assert len(rows(tmp_path / "run")) == 4


def test_overwriting_a_run_removes_its_best_network(run_here, tmp_path):
    assert run_here("free_at.py", *SMALL, "run").returncode == 0
    assert (tmp_path / "run" / "free2_mlp_best.pth").exists()
    done = run_here("free_at.py", *SMALL, "run", "--overwrite", "--validate", 0)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").glob("*_best.*"))
