"""eval_net.py --predict: the class that networks give every image, with and without labels."""

import csv
import shutil

import pytest
import torch
from PIL import Image

from utils.data import CIFAR10, decode, load, open_images, paper_geometry, to_float
from utils.models import load_model
from utils.predictions import rows_of

RANDOM = ("--model_name", "squeezenet1_1", "--weights", "random", "--predict", "--workers", 0)


def predictions(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def flat(tmp_path, picture):
    for i in range(5):
        picture(tmp_path / "flat" / f"{i}.png", 40 + i, 40, seed=i)
    return tmp_path / "flat"


def test_every_image_of_a_flat_folder_gets_the_class_that_the_network_predicts(run_here, tmp_path,
                                                                               flat):
    (flat / "3.png").write_bytes(b"no image")
    done = run_here("eval_net.py", "--data_dir", flat, *RANDOM, "--save", "out")
    assert done.returncode == 0, done.stderr
    assert "3.png: cannot be decoded" in done.stderr
    rows = predictions(tmp_path / "out")
    assert [row["file"] for row in rows] == [f"{i}.png" for i in range(5)]
    assert list(rows[0]) == ["network", "file", "class", "name", "probability"]
    model, images = load_model("squeezenet1_1", weights="random"), open_images(flat, split="test")
    for i in (0, 1, 2, 4):
        x = to_float(decode(flat / f"{i}.png", paper_geometry()))
        p = model(x[None]).softmax(1)[0]
        assert int(rows[i]["class"]) == int(p.argmax())
        assert rows[i]["name"] == images.known_classes[int(p.argmax())]
        assert float(rows[i]["probability"]) == pytest.approx(float(p.max()), abs=1e-3)
    assert (rows[3]["class"], rows[3]["probability"]) == ("", "")


def test_labelled_images_have_their_labels_beside_the_predictions_of_every_network(
        run_here, tmp_path):
    done = run_here("eval_net.py", "--model_name", "mlp", "cnn", "--weights", "random",
                    "--num_images", 20, "--predict", "--save", "out")
    assert done.returncode == 0, done.stderr
    images = load(open_images("digits", split="test").prepared(28, 20), workers=0)
    rows = predictions(tmp_path / "out")
    assert [row["network"] for row in rows] == 20 * ["mlp"] + 20 * ["cnn"]
    assert [int(row["label"]) for row in rows] == 2 * images.labels.tolist()
    model = load_model("cnn", weights="random", kind="digits")
    assert [int(row["class"]) for row in rows[20:]] \
        == model(to_float(images.pixels)).argmax(1).tolist()
    assert "40 predictions by mlp, cnn" in done.stdout


def test_a_network_trained_here_predicts_unlabelled_images_in_its_own_classes(run_here, tmp_path,
                                                                             picture):
    for i in range(12):
        colour = (250, 10, 10) if i % 2 else (10, 10, 250)
        path = tmp_path / "own" / "train" / ("red" if i % 2 else "blue") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(path)
    done = run_here("train_gcm.py", "--data_dir", "own/train", "--model_name", "squeezenet1_1",
                    "--image_size", 32, "--epochs", 1, "--batch_size", 4, "--workers", 0,
                    "--hold_out", 0.2, "--save", "run", "--augment", "none", "--defense", "none")
    assert done.returncode == 0, done.stderr
    for i in range(3):
        picture(tmp_path / "test" / f"{i}.png", seed=i)
    done = run_here("eval_net.py", "--runs", "run", "--data_dir", "test", "--predict", "--save",
                    "out", "--workers", 0)
    assert done.returncode == 0, done.stderr
    rows = predictions(tmp_path / "out")
    assert len(rows) == 3 and {row["name"] for row in rows} <= {"red", "blue"}
    assert all("label" not in row for row in rows)


def test_each_network_reads_unlabelled_images_as_in_its_training(run_here, tmp_path, flat):
    for name in CIFAR10:
        (tmp_path / "ten" / name).mkdir(parents=True)
        shutil.copy(flat / "0.png", tmp_path / "ten" / name)
        shutil.copy(flat / "1.png", tmp_path / "ten" / name)
    shutil.copytree(tmp_path / "ten" / "cat", tmp_path / "two" / "bird")
    shutil.copytree(tmp_path / "ten" / "dog", tmp_path / "two" / "fish")
    for data, size in (("ten", ()), ("two", ("--image_size", 64))):
        done = run_here("free_at.py", "--data_dir", f"{data}", "--model_name", "cnn", "--method",
                        "natural", "--epochs", 1, "--batch_size", 2, "--hold_out", 0.5, "--workers",
                        0, "--save", f"run_{data}", *size)
        assert done.returncode == 0, done.stderr
    for order in (("run_ten", "run_two"), ("run_two", "run_ten")):
        done = run_here("eval_net.py", "--runs", *order, "--data_dir", flat, "--predict", "--save",
                        order[0] + "_first", "--workers", 0)
        assert done.returncode == 0, done.stderr
    first, second = (sorted(map(str, predictions(tmp_path / f"{run}_first")))
                     for run in ("run_ten", "run_two"))
    assert first == second and any(f"'name': '{name}'" in " ".join(first) for name in CIFAR10)


def test_labels_are_translated_to_the_networks_classes_by_name(picture, tmp_path):
    for name in ("cat", "dog", "horse"):
        picture(tmp_path / "some" / name / "a.png")
    images = open_images(tmp_path / "some", split="test")
    found = [torch.tensor([2, 1, 0]), torch.ones(3)]
    rows = rows_of("a", images, *found, ["bird", "cat", "dog"])
    assert [(row["class"], row["name"], row["label"]) for row in rows] == [
        (2, "dog", 1), (1, "cat", 2), (0, "bird", "")]
    assert [row["label"] for row in rows_of("a", images, *found, ())] == ["", "", ""]


def test_predict_cannot_be_combined_with_measurements(run_here, refused, flat):
    refused(run_here("eval_net.py", "--data_dir", flat, *RANDOM, "--corruptions"), "--predict")
    refused(run_here("eval_net.py", "--data_dir", flat, *RANDOM[:4]), "--predict needs none")
    assert torch.is_grad_enabled()
