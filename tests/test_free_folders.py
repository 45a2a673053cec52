"""free_at.py on class folders and CIFAR-100: any number of classes, any network, any size."""

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import free_at
from utils import models
from utils.data import load, to_float
from utils.finished import images_for

OWN = ("--data_dir", "own", "--epochs", 1, "--replays", 1, "--batch_size", 6, "--guard", "off",
       "--device", "cpu", "--workers", 0, "--save", "run")
EVERY = ("--device", "cpu", "--workers", 0)


@pytest.fixture
def own(tmp_path):
    """A folder of three classes, eight photographs each; every class has its own colour."""
    return drawn(tmp_path / "own")


def drawn(folder):
    for k, name in enumerate(("ape", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            coarse = np.random.default_rng(10 * i + k).integers(0, 120, (5, 5, 3), dtype=np.uint8)
            coarse[..., k] += 130
            Image.fromarray(coarse).resize((90, 70), Image.BICUBIC).save(folder / name / f"{i}.png")
    return folder


def facts_in(folder):
    path, = set(folder.glob("*_*.json")) - set(folder.glob("*_best.json"))
    return json.loads(path.read_text()), path.with_suffix(".pth")


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A folder with own/ and, in run/, a network trained on it at 64 pixels."""
    folder, said = tmp_path_factory.mktemp("trained"), io.StringIO()
    drawn(folder / "own")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["free_at.py", *map(str, OWN), "--method", "natural", "--epochs",
                                    "8", "--model_name", "cnn_bn", "--image_size", "64",
                                    "--hold_out", "0.25"])
        free_at.main(free_at.get_args())
    assert "18 images of own in 3 classes, cnn_bn" in said.getvalue()
    return folder


@pytest.fixture
def taught(trained_once, own, tmp_path, monkeypatch):
    """The facts and the .pth of a copy of that run in tmp_path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_once / "run", tmp_path / "run")
    return facts_in(tmp_path / "run")


# ------------------------------------------------------------------ class folders

def test_a_network_of_three_classes_is_measured_by_every_script(taught, own, run_here, tmp_path):
    facts, path = taught
    assert (facts["head"], facts["classes"], facts["image_size"], facts["kind"]) == (
        "own", ["ape", "bee", "cat"], 64, "folder")
    model = models.load_model("cnn_bn", weights=str(path), kind="folder")
    tested, _ = images_for([("run", facts, "own", "data")])
    few = load(tested.prepared(64, None), workers=0)
    with torch.no_grad():
        logits = model(to_float(few.pixels))
    right = int((logits.argmax(1) == few.labels).sum())
    assert logits.shape == (6, 3) and right == 6 and len(set(few.labels.tolist())) == 3
    by_run = run_here("eval_net.py", "--runs", "run", "--attacks", "none", "--save", "a", *EVERY)
    by_name = run_here("eval_net.py", "--data_dir", "own", "--model_name", "cnn_bn", "--weights",
                       path, "--attacks", "none", "--save", "b", *EVERY)
    for done, folder in ((by_run, "a"), (by_name, "b")):
        assert done.returncode == 0, done.stderr
        assert "64 pixels" in done.stdout
        saved = json.loads((tmp_path / folder / "results.json").read_text())
        assert saved["settings"]["n"] == 6
        assert [cell["right"]["clean"] if "right" in cell else sum(cell["after"])
                for cell in saved["cells"].values()] == [6]
    torch.save(torch.full((3, 64, 64), 4 / 255), tmp_path / "x.pth")
    given = ("--data_dir", "own", "--model_name", "cnn_bn", "--weights", path)
    uap = run_here("eval_uap.py", *given, "--uaps", "x.pth", "--save", "c", *EVERY)
    gcm = run_here("gcm.py", *given, "--attacks", "fgsm", "--save", "d", *EVERY)
    for done in (uap, gcm):
        assert done.returncode == 0, done.stderr
        assert "64 pixels" in done.stdout and "n: 6" in done.stdout


def test_no_accuracy_is_measured_without_labels(taught, own, run_here, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    about = json.dumps({"info": {"features": {"label": {"names": ["ape", "bee", "cat"]}}}})
    images = [{"bytes": path.read_bytes()} for path in sorted(own.glob("*/0.png"))]
    table = pa.table({"image": pa.array(images), "label": pa.array([-1, -1, -1])})
    (tmp_path / "shards").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": about}),
                   tmp_path / "shards" / "test-0.parquet")
    torch.save(torch.full((3, 64, 64), 4 / 255), tmp_path / "x.pth")
    done = run_here("eval_uap.py", "--data_dir", "shards", "--model_name", "cnn_bn", "--weights",
                    taught[1], "--uaps", "x.pth", "--save", "c", *EVERY)
    assert done.returncode == 0, done.stderr
    assert "accuracies are not" in done.stdout and "clean_acc" not in done.stdout
    row, = json.loads((tmp_path / "c" / "results.json").read_text())["rows"]
    assert row["fooling_ratio"]["n"] == 3 and "clean_acc" not in row


def test_images_of_other_classes_are_refused(taught, own, run_here, refused):
    own.joinpath("cat").rename(own / "dog")
    for given in (("--runs", "run"), ("--model_name", "cnn_bn", "--weights", taught[1])):
        refused(run_here("eval_net.py", *given, "--data_dir", "own", "--attacks", "none", *EVERY),
                "its 3 classes are not those of the network (3)")


@pytest.mark.parametrize(("key", "value"), [("head", "wall"), ("classes", []), ("classes", [3])])
def test_unusable_facts_are_refused(taught, run_here, refused, key, value):
    facts, path = taught
    path.with_suffix(".json").write_text(json.dumps(facts | {key: value}))
    refused(run_here("eval_net.py", "--runs", "run", "--attacks", "none", *EVERY), key)


def test_photographs_are_cropped_anew_in_every_pass(own, run_here, monkeypatch):
    monkeypatch.setattr(free_at, "load", None)  # never all in memory
    seen, real = [], free_at.FreeTraining.step
    monkeypatch.setattr(free_at.FreeTraining, "step",
                        lambda self, x, y: seen.append(x.detach()) or real(self, x, y))
    done = run_here("free_at.py", *OWN, "--method", "natural", "--epochs", 2, "--model_name", "mlp",
                    "--image_size", 36)
    assert done.returncode == 0, done.stderr
    assert {tuple(x.shape[1:]) for x in seen} == {(3, 36, 36)}
    passes = [torch.cat(seen[k:k + len(seen) // 2]).flatten(1) for k in (0, len(seen) // 2)]
    assert len(passes[0]) == 22 and not (torch.cdist(*passes) < 0.1).any()


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm/test_resnet", "resnet_small", "lenet",
                                  "mine.py:network"])
def test_networks_of_every_source_get_as_many_outputs_as_there_are_classes(
        own, run_here, tmp_path, name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef network(num_classes=10):\n    return nn.Sequential(\n"
        "        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "        nn.Flatten(), nn.Linear(8, num_classes))\n")
    done = run_here("free_at.py", *OWN, "--model_name", name, "--image_size", 40)
    assert done.returncode == 0, done.stderr
    facts, path = facts_in(tmp_path / "run")
    assert facts["model_name"] == name and facts["classes"] == ["ape", "bee", "cat"]
    assert path.name == f"free1_{name.replace('mine.py:', '').removeprefix('timm/')}.pth"
    assert len(list(torch.load(path, weights_only=True).values())[-1]) == 3  # the last bias
    trusted = ("--model_name", name) if name.startswith("mine.py") else ()
    done = run_here("eval_net.py", "--runs", "run", *trusted, "--attacks", "none", *EVERY)
    assert done.returncode == 0 and "n: 2 test images" in done.stdout, done.stderr


def test_folders_named_by_imagenet_indices_are_trained_on_and_measured_as_such(own, run_here,
                                                                               tmp_path):
    for name, index in (("ape", "7"), ("bee", "217"), ("cat", "30")):
        (own / name).rename(own / index)
    done = run_here("free_at.py", *OWN, "--classes", "imagenet", "--model_name", "resnet_small",
                    "--image_size", 32)
    assert done.returncode == 0 and "in 1000 classes" in done.stdout, done.stderr
    facts, path = facts_in(tmp_path / "run")
    assert facts["kind"] == facts["classes_are"] == "imagenet" and "head" not in facts
    tested, _ = images_for([("run", facts, "own", "data", None, "imagenet")])
    assert set(tested.labels.tolist()) <= {7, 30, 217} and tested.kind == "imagenet"
    assert len(list(torch.load(path, weights_only=True).values())[-1]) == 1000


def test_a_function_that_needs_the_number_of_classes_gets_it(own, run_here, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef network(num_classes):\n    return nn.Sequential(\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n")
    done = run_here("free_at.py", *OWN, "--model_name", "mine.py:network", "--image_size", 40)
    assert done.returncode == 0 and "--runs run --model_name mine.py:network" in done.stdout
    done = run_here("eval_net.py", "--runs", "run", "--model_name", "mine.py:network", "--attacks",
                    "none", *EVERY)
    assert done.returncode == 0, done.stderr


def test_the_image_size_defaults_to_that_of_the_weights(own, run_here, tmp_path, taught):
    done = run_here("free_at.py", *OWN, "--model_name", "cnn_bn", "--pretrained", taught[1],
                    "--method", "natural", "--lr", 0, "--save", "second")
    assert done.returncode == 0, done.stderr
    facts, path = facts_in(tmp_path / "second")
    assert facts["image_size"] == 64
    first, second = (torch.load(file, weights_only=True) for file in (taught[1], path))
    assert all(torch.equal(first[key], second[key]) for key, _ in
               models.trainable("cnn_bn", kind="folder", classes=3)[1].named_parameters())


@pytest.mark.parametrize(("flags", "words"), [
    (("--data_dir", "digits", "--image_size", 64), ("--image_size 64", "digits images are 28")),
    (("--model_name", "mine.py:table"), ("mine.py:table", "not logits")),
    (("--model_name", "mine.py:fixed"), ("mine.py:fixed", "gives 7 numbers", "wanted 3")),
    (("--model_name", "mine.py:frozen"), ("mine.py:frozen", "no gradient")),
    (("--labels", "gone.txt"), ("--labels gone.txt", "has class folders")),
    (("--image_size", 8), ("--image_size", "at least 28")),
    (("--recipe", "free"), ("--recipe free", "not for folder"))], ids=str)
def test_bad_input_gives_one_line(own, run_here, refused, tmp_path, flags, words):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Seven(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))\n"
        "    def forward(self, x):\n        found = self.net(x)\n"
        "        return torch.cat([found, found[:, :1].expand(-1, 4)], 1)\n"
        "class Frozen(Seven):\n    @torch.no_grad()\n    def forward(self, x):\n"
        "        return super().forward(x)[:, :3]\n"
        "def frozen():\n    return Frozen()\n"
        "def fixed():\n    return Seven()\ndef table():\n    return nn.Conv2d(3, 4, 3)\n")
    said = run_here("free_at.py", *OWN, "--model_name", "cnn_bn", "--image_size", 32, *flags)
    said.stderr = said.stderr.replace("warning: ", "")
    refused(said, *words)
    assert not list(tmp_path.rglob("*.pth"))


def test_a_single_class_or_missing_labels_are_refused(own, run_here, refused, tmp_path):
    for name in ("bee", "cat"):
        for path in (own / name).iterdir():
            path.unlink()
        (own / name).rmdir()
    refused(run_here("free_at.py", *OWN), "--data_dir own", "one class, 'ape'")
    refused(run_here("free_at.py", *OWN, "--data_dir", own / "ape"), "without labels")


def test_labels_of_the_training_images_are_not_given_to_the_test_images(own, run_here, tmp_path):
    for split, shift in (("train", 0), ("val", 1)):  # the same file names, other classes
        (tmp_path / "flat" / split).mkdir(parents=True)
        lines = []
        for k, name in enumerate(("ape", "bee", "cat")):
            for i in range(8):
                file = f"{3 * i + (k + shift) % 3}.png"
                shutil.copy(own / name / f"{i}.png", tmp_path / "flat" / split / file)
                lines.append(f"{file} {name}\n")
        beside = tmp_path / ("train.labels.txt" if split == "train" else "flat/val/val.txt")
        beside.write_text("".join(lines))
    done = run_here("free_at.py", *OWN, "--data_dir", "flat", "--labels", "train.labels.txt",
                    "--method", "natural", "--epochs", 8, "--model_name", "cnn_bn", "--image_size",
                    64)
    assert done.returncode == 0, done.stderr
    assert facts_in(tmp_path / "run")[0]["labels"] == "train.labels.txt"
    done = run_here("eval_net.py", "--runs", "run", "--attacks", "none", "--save", "a", *EVERY)
    assert done.returncode == 0, done.stderr
    cell, = json.loads((tmp_path / "a" / "results.json").read_text())["cells"].values()
    assert cell["n"] == 24 and cell["right"]["clean"] > 18  # a third with the labels of training


# --------------------------------------------------------------------------- CIFAR-100

def test_cifar100_trains_and_is_measured(run_here, tmp_path, monkeypatch):
    def data(dataset, root, *, train):
        numbers = np.random.default_rng(int(train))
        return SimpleNamespace(
            data=numbers.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8),
            targets=[i % 100 for i in range(200)], classes=[f"class {i}" for i in range(100)])
    monkeypatch.setattr("utils.named._torchvision", data)
    done = run_here("free_at.py", "--data_dir", "cifar100", "--model_name", "cnn_bn", "--replays",
                    2, "--weight_steps", 4, "--batch_size", 50, "--guard", "off", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    facts, path = facts_in(tmp_path / "runs" / "cifar100_free2_cnn_bn")
    assert facts["classes"] == [f"class {i}" for i in range(100)] and facts["image_size"] == 32
    assert len(list(torch.load(path, weights_only=True).values())[-1]) == 100
    done = run_here("eval_net.py", "--runs", path.parent, "--attacks", "none", *EVERY)
    assert done.returncode == 0 and "n: 200 test images" in done.stdout, done.stderr
