"""Other layouts of data: ImageNet's classes by other names, the challenge's lists, CIFAR-100."""

import numpy as np
import pytest
import torchvision

from utils import imagenet
from utils.data import PRESETS, open_images
from utils.errors import UserError

# ------------------------------------------------------ --classes imagenet

@pytest.mark.parametrize(("folder", "index"), [
    ("0", 0), ("007", 7), ("999", 999), ("tench", 0), ("toilet_tissue", 999), ("n02504458", 386),
    ("African elephant", 386), ("great-white shark", 2), ("tench, Tinca tinca", 0)])
def test_class_folders_may_be_named_by_index_or_by_class_name(tmp_path, picture, folder, index):
    picture(tmp_path / folder / "x.png")
    images = open_images(tmp_path, split="test", classes="imagenet")
    assert (images.kind, images.labelled) == ("imagenet", True)
    assert images.labels.tolist() == [index] and len(images.classes) == 1000
    if folder != "n02504458":
        assert open_images(tmp_path, split="test").kind == "folder"  # without classes=


def test_every_class_folder_gets_its_own_index(tmp_path, picture):
    for name in ("10", "9", "tench", "n15075141"):
        picture(tmp_path / name / "x.png")
    images = open_images(tmp_path, split="test", classes="imagenet")
    assert dict(zip(images.names, images.labels.tolist(), strict=True)) == {
        "10/x.png": 10, "9/x.png": 9, "n15075141/x.png": 999, "tench/x.png": 0}


@pytest.mark.parametrize(("folder", "words"), [
    ("1000", "class 1000; ImageNet's indices are 0 to 999"), ("tensh", "did you mean tench"),
    ("-1", "'-1' is none of"), ("unheard of", "none of ImageNet's 1000 classes")])
def test_a_class_that_imagenet_does_not_have_is_refused(tmp_path, picture, folder, words):
    picture(tmp_path / folder / "x.png")
    with pytest.raises(UserError, match=words):
        open_images(tmp_path, split="test", classes="imagenet")


def test_a_class_name_shared_by_two_classes_is_refused():
    twice = [names for names in imagenet._by_name().items() if len(names[1]) > 1]
    for name, both in twice:
        with pytest.raises(UserError, match=f"{both[0]} and {both[1]}; use the index"):
            imagenet.class_index(name, "folder")
    assert all(imagenet.class_index(name, "") == i for i, name in enumerate(
        imagenet.imagenet_classes()) if imagenet._plain(name) not in dict(twice))


def test_a_list_may_name_imagenets_classes(tmp_path, picture):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "label.txt").write_text("a.png n02504458\nb.png 0\n")
    images = open_images(tmp_path, split="test", classes="imagenet")
    assert images.kind == "imagenet" and images.labels.tolist() == [386, 0]


# ---------------------------------------------------------- the challenge's published layout

@pytest.fixture
def challenge(tmp_path, picture):
    """Two classes: train.json, val.json with train_p2/; test_label.txt with track1_test1/."""
    for name in ("c0_1.png", "c0_2.png", "c1_1.png", "c1_2.png"):
        picture(tmp_path / "train_p2" / name)
    for name in ("1.png", "2.png"):
        picture(tmp_path / "track1_test1" / name)
    (tmp_path / "train.json").write_text('{"0": ["c0_1.png"], "1": ["c1_1.png"]}')
    (tmp_path / "val.json").write_text('{"1": ["c1_2.png"], "0": ["c0_2.png"]}')
    return tmp_path


def test_the_challenges_layout_is_read_as_published(challenge):
    train, val = (open_images(challenge, split=split) for split in ("train", "test"))
    assert train.names == ("c0_1.png", "c1_1.png") and train.labels.tolist() == [0, 1]
    assert val.names == ("c1_2.png", "c0_2.png") and val.labels.tolist() == [1, 0]
    assert train.root == val.root == challenge / "train_p2"
    (challenge / "test_label.txt").write_text("1.png 1\n2.png 0\n")
    test = open_images(challenge / "test_label.txt", split="test")
    assert test.root == challenge / "track1_test1" and test.labels.tolist() == [1, 0]
    assert open_images(challenge, split="test").names == val.names


@pytest.mark.parametrize(("name", "text"), [
    ("test_label.txt", "1.png\n2.png\n"), ("test.txt", "track1_test1/1.png\ntrack1_test1/2.png\n"),
    ("test.json", '["1.png", "2.png"]')])
def test_a_test_list_may_have_no_labels(challenge, name, text):
    (challenge / name).write_text(text)
    images = open_images(challenge / name, split="test")
    assert len(images) == 2 and not images.has_labels and images[0].shape == (3, 224, 224)
    flat = open_images(challenge / "track1_test1", split="test")
    assert flat.names == ("1.png", "2.png") and not flat.has_labels


@pytest.mark.parametrize(("name", "text", "words"), [
    ("test_label.txt", "1.png 0\n2.png\n", "line 2: '2.png'"),
    ("label.txt", "c0_1.png\nc1_1.png\n", "line 1: 'c0_1.png'"),
    ("test_label.txt", "1.png\n3.png\n", "no file 3.png")])
def test_a_list_with_some_labels_missing_is_refused(challenge, name, text, words):
    (challenge / name).write_text(text)
    with pytest.raises(UserError, match=words):
        open_images(challenge / name, split="test")


# ----------------------------------------------------------------------------- CIFAR-100

class Cifar100:
    """Stands for torchvision's, whose files are checked by their MD5."""
    classes = [f"class {i}" for i in range(100)]

    def __init__(self, root, train, download):
        if not download:
            assert root == "here" or (root / "cifar-100-python").is_dir()
        self.data = np.full((3, 32, 32, 3), 7 * train, np.uint8)
        self.targets = [0, 99, 41]


def test_cifar100_opens_by_name_and_by_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Cifar100)
    (tmp_path / "cifar-100-python").mkdir()
    for data_dir in ("cifar100", tmp_path):
        train, test = (open_images(data_dir, split=split, data_root="here")
                       for split in ("train", "test"))
        assert (test.kind, test.size, test.channels, len(test.classes)) == ("cifar100", 32, 3, 100)
        assert test.labels.tolist() == [0, 99, 41] and test.labelled
        assert int(train.pixels.max()) == 7 and int(test.pixels.max()) == 0
    assert PRESETS["cifar100"].size == 32
