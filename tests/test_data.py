"""Images: which ones are taken, how they are read, what their labels are, what is refused."""

import hashlib
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms as T

from utils import data
from utils.data import (
    Geometry,
    batches,
    decode,
    load,
    open_both,
    open_images,
    paper_geometry,
    read_image,
    spread,
    to_float,
)
from utils.errors import UserError
from utils.named import imagenette_folder

# the first, the second, one in the middle and the last of ImageNet's classes
WNIDS = {"n01440764": 0, "n01443537": 1, "n02504458": 386, "n15075141": 999}


# ------------------------------------------------------------------------ which ones

def naive_spread(labels, num):
    """Each round takes one more image of every class; a last round that is too long takes an even
    choice of classes."""
    taken, rank = [], 0
    classes = sorted(set(labels))
    while len(taken) < num:
        one_more = [[i for i, label in enumerate(labels) if label == c][rank:rank + 1]
                    for c in classes]
        one_more = [i for some in one_more for i in some]
        if not one_more:
            break
        left = min(num - len(taken), len(one_more))
        taken += [one_more[int(j * len(one_more) / left)] for j in range(left)]
        rank += 1
    return sorted(taken)


def test_spread_takes_the_first_ten_of_each_class():
    labels = [c for c in range(1000) for _ in range(13)]
    assert spread(labels, 10_000) == [13 * c + i for c in range(1000) for i in range(10)]


def test_spread_takes_fewer_images_than_classes_from_evenly_spaced_classes():
    labels = [c for c in range(1000) for _ in range(3)]
    assert spread(labels, 500) == [3 * c for c in range(0, 1000, 2)]
    assert len({labels[i] for i in spread(labels, 333)}) == 333


@pytest.mark.parametrize("num", [1, 9, 10, 25, 26, 28, 40])
def test_spread_with_a_remainder_and_short_classes_equals_the_naive_one(num):
    labels = [0] * 3 + [1] * 1 + [2] * 10 + [3] * 7 + [4] * 7  # 28 in all
    chosen = spread(labels, num)
    assert chosen == naive_spread(labels, num)
    assert len(chosen) == min(num, 28) == len(set(chosen))


def test_the_first_files_of_each_class_are_taken_in_sorted_order(tmp_path, picture):
    for wnid in ("n01443537", "n01440764"):
        for name in ("b.jpg", "a.JPEG", "d.png", "c.jpg"):
            picture(tmp_path / wnid / name)
    (tmp_path / "n01440764" / "0.txt").write_text("not an image")
    images = open_images(str(tmp_path), split="train").prepared(32, 5)
    assert images.names == ("n01440764/a.JPEG", "n01440764/b.jpg", "n01440764/c.jpg",
                            "n01443537/a.JPEG", "n01443537/b.jpg")
    assert images.labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("num", [None, 8, 9])
def test_asking_for_as_many_images_as_there_are_or_more_gives_all(tmp_path, picture, num):
    for i in range(8):
        picture(tmp_path / f"class{i % 2}" / f"{i}.png")
    assert len(open_images(tmp_path, split="train").prepared(32, num)) == 8


# --------------------------------------------------------------------- class indices

def test_wnid_folders_get_their_true_imagenet_index_even_if_only_some_are_there(tmp_path, picture):
    for wnid in WNIDS:
        picture(tmp_path / wnid / "x.jpg")
    images = open_images(tmp_path, split="train")
    assert images.kind == "imagenet" and images.labelled and images.size == 224
    assert images.labels.tolist() == list(WNIDS.values())
    assert [images.classes[i] for i in images.labels] == [
        "tench", "goldfish", "African elephant", "toilet tissue"]


def test_the_list_of_wnids_is_that_of_imagenet(shared):
    theirs = shared / "data" / "imagenet_wnids.txt"
    if not theirs.is_file():
        pytest.skip(f"no {theirs.name} in ../shared/data")
    ours = list(data.wnids())
    assert ours == theirs.read_text().split()
    assert ours == sorted(set(ours)) and len(ours) == 1000


def test_a_stray_folder_among_imagenet_classes_is_refused_by_name(tmp_path, picture):
    for name in ("n01440764", "elephants"):
        picture(tmp_path / name / "x.jpg")
    with pytest.raises(UserError, match="elephants"):
        open_images(tmp_path, split="train")


def test_cifar10_class_folders_get_cifar10_indices_at_32_pixels(tmp_path, picture):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
             "truck"]
    for name in names[::-1]:
        picture(tmp_path / name / "x.png", 32, 32)
    images = open_images(tmp_path, split="train")
    assert (images.kind, images.size) == ("cifar10", 32)
    assert dict(zip(images.names, images.labels.tolist(), strict=True)) \
        == {f"{name}/x.png": i for i, name in enumerate(names)}
    whole = np.asarray(Image.open(tmp_path / "cat" / "x.png"))
    assert torch.equal(images[3], torch.from_numpy(whole.copy()).permute(2, 0, 1))  # uncropped


def test_folders_with_other_names_have_no_labels_that_networks_know(tmp_path, picture):
    for name in ("cat", "dog", ".hidden"):  # two of CIFAR-10's ten names are no CIFAR-10
        picture(tmp_path / name / "x.png")
    images = open_images(tmp_path, split="train")
    assert images.kind == "folder" and not images.labelled
    assert (images.names, images.classes) == (("cat/x.png", "dog/x.png"), ("cat", "dog"))


def test_train_is_read_for_training_and_val_or_test_for_testing(tmp_path, picture):
    for sub in ("train", "val", "test"):
        picture(tmp_path / sub / "n01440764" / f"{sub}.png")
    names = {split: open_images(tmp_path, split=split).names for split in ("train", "test")}
    assert names == {"train": ("n01440764/train.png",), "test": ("n01440764/val.png",)}
    shutil.rmtree(tmp_path / "val")
    assert open_images(tmp_path, split="test").names == ("n01440764/test.png",)
    assert open_images(tmp_path / "train", split="test").names == ("n01440764/test.png",)
    shutil.rmtree(tmp_path / "test")
    for path in (tmp_path, tmp_path / "train"):  # no test images: the training images
        assert open_images(path, split="test").names == ("n01440764/train.png",)


def test_a_class_may_be_called_train(tmp_path, picture):
    for name in ("bus", "train"):
        picture(tmp_path / name / "x.png")
    assert open_images(tmp_path, split="test").names == ("bus/x.png", "train/x.png")


def test_missing_test_images_are_refused_where_both_splits_are_needed(tmp_path, picture):
    picture(tmp_path / "a" / "x.png")
    with pytest.raises(UserError, match="there are no test images"):
        open_both(tmp_path, "data")
    picture(tmp_path / "val" / "a" / "x.png")
    picture(tmp_path / "train" / "a" / "y.png")
    assert [images.names for images in open_both(tmp_path, "data")] == [("a/y.png",), ("a/x.png",)]


# ------------------------------------------------------------------- named data sets

def test_the_split_of_digits_is_fixed_and_disjoint_and_covers_all():
    train, test = (open_images("digits", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1442, 355)
    assert train.pixels.shape[1:] == (1, 28, 28) and train.pixels.dtype == torch.uint8
    again = open_images("digits", split="train")
    assert torch.equal(train.pixels, again.pixels) and torch.equal(train.labels, again.labels)
    seen = {x.numpy().tobytes() for x in train.pixels}
    assert not [x for x in test.pixels if x.numpy().tobytes() in seen]
    assert train.pixels.min() == 0 and train.pixels.max() == 255
    for digit in range(10):  # every fifth of each
        count = (train.labels == digit).sum() + (test.labels == digit).sum()
        assert (test.labels == digit).sum() == count // 5


def test_digits_have_28_pixels_and_no_other_size():
    with pytest.raises(UserError, match="--image_size 32"):
        open_images("digits", split="train").prepared(32, 10)


@pytest.mark.parametrize("by_path", [True, False])
def test_an_mnist_folder_opens_without_a_download(shared, monkeypatch, by_path):
    root = shared / "data" / "mnist"
    if not root.is_dir():
        pytest.skip("no mnist in ../shared/data")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: pytest.fail("network"))
    images = open_images(str(root) if by_path else "mnist", split="test", data_root=root)
    assert (images.kind, len(images), images.size) == ("mnist", 10_000, 28)
    assert images.pixels.shape == (10_000, 1, 28, 28) and images.labels[:4].tolist() == [7, 2, 1, 0]
    assert images.prepared(28, 100).labels.bincount().tolist() == [10] * 10


def test_a_failed_download_gives_one_line_that_says_what_to_type(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fail)
    with pytest.raises(UserError, match="no route to host.*--data_root"):
        open_images("mnist", split="train", data_root=tmp_path)


# --------------------------------------------------------------------------- reading

@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (299, 342)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 431), (120, 90)])
def test_geometry_is_exactly_that_of_torchvisions_evaluation(tmp_path, picture, size, shorter,
                                                             width, height):
    path = picture(tmp_path / "x.jpg", width, height)
    protocol = T.Compose([T.Resize(shorter), T.CenterCrop(size), T.ToTensor()])
    wanted = protocol(Image.open(path).convert("RGB"))
    x = decode(path, paper_geometry(size))
    assert x.dtype == torch.uint8 and torch.equal(to_float(x), wanted)


def test_images_are_read_in_the_geometry_that_they_were_prepared_for(tmp_path, picture):
    path = picture(tmp_path / "val" / "n01440764" / "a.jpg", 300, 431)
    images = open_images(tmp_path / "val", split="test")
    assert images.geometry == images.prepared(224, None).geometry == Geometry(224, 256)
    assert images.prepared(32, None).geometry == Geometry(32, 32)
    other = images.prepared(Geometry(96, 100, "bicubic"), None)
    protocol = T.Compose([T.Resize(100, T.InterpolationMode.BICUBIC), T.CenterCrop(96)])
    wanted = np.asarray(protocol(Image.open(path).convert("RGB")))
    assert other.size == 96
    assert np.array_equal(other[0].permute(1, 2, 0), wanted)
    assert torch.equal(load(other, workers=0).pixels[0], other[0])


def test_a_geometry_is_described_in_words():
    assert str(paper_geometry()) == "shorter side to 256 (bilinear), centre crop 224"
    assert str(Geometry(224, 224, "bicubic")) == "shorter side to 224 (bicubic), centre crop 224"
    assert str(paper_geometry(28)) == "28 pixels"


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_pictures_of_every_colour_mode_become_rgb(tmp_path, picture, mode):
    path = picture(tmp_path / "x.png")
    name = tmp_path / ("y.jpg" if mode == "CMYK" else "y.png")
    Image.open(path).convert(mode).save(name)
    assert decode(name, paper_geometry(32)).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path, name):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 200
    Image.fromarray(grey).save(tmp_path / name)
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.stack([grey >> 8] * 3, 2))


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_pixels_without_a_known_range_cannot_be_decoded(tmp_path, kind):
    Image.fromarray(np.full((16, 16), 100, kind)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="x.tif: .*no image .*wanted 8 or 16 bits"):
        read_image(tmp_path / "x.tif")
    assert decode(tmp_path / "x.tif", paper_geometry(16)) is None


def test_to_float_gives_exactly_k_over_255():
    k = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(k), torch.arange(256).float() / 255)
    assert (to_float(k)[0], to_float(k)[255]) == (0, 1)


@pytest.fixture
def photographs(tmp_path, picture):
    """Seven class folders of 10 pictures, all different; three of the 70 cannot be decoded."""
    for i in range(70):
        picture(tmp_path / f"{i // 10}" / f"{i % 10}.jpg", 30 + i % 7, 30, seed=i)
    whole = (tmp_path / "0" / "3.jpg").read_bytes()
    (tmp_path / "0" / "3.jpg").write_bytes(whole[:len(whole) // 2])  # in the first batch of 32
    (tmp_path / "3" / "2.jpg").write_text("<html>not found</html>")  # first of the second batch
    (tmp_path / "6" / "9.jpg").write_bytes(b"")                      # the last one
    return tmp_path


BROKEN = ("0/3.jpg", "3/2.jpg", "6/9.jpg")


def test_a_corrupt_image_is_reported_skipped_and_counted_and_the_rest_stays_aligned(photographs,
                                                                                    capsys):
    images = open_images(photographs, split="train").prepared(24, None)
    loaded = load(images, workers=0)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 3
    assert all(name in line for name, line in zip(BROKEN, warnings, strict=True))
    assert loaded.skipped == BROKEN
    assert loaded.names == tuple(name for name in images.names if name not in BROKEN)
    assert len(loaded) == len(loaded.pixels) == len(loaded.labels) == 67
    for name, label, x in zip(loaded.names, loaded.labels, loaded.pixels, strict=True):
        assert label == int(name.split("/")[0])
        assert torch.equal(x, decode(photographs / name, paper_geometry(24)))


def test_workers_read_the_same_pixels_as_none_and_leave_the_global_rng_alone(photographs):
    images = open_images(photographs, split="train").prepared(24, None)
    rng = torch.get_rng_state()
    one, two = (load(images, workers=workers) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(one.pixels, two.pixels) and torch.equal(one.labels, two.labels)
    assert one.names == two.names and one.skipped == two.skipped == BROKEN


def test_batches_come_in_order_with_the_positions_of_the_readable_images(photographs):
    images = open_images(photographs, split="train").prepared(24, None)
    skipped, positions = [], []
    for index, x in batches(images, 8, workers=0, skipped=skipped):
        assert len(index) == len(x) <= 8
        positions += index.tolist()
    assert positions == [i for i in range(70) if images.names[i] not in BROKEN]
    assert tuple(skipped) == BROKEN


def test_a_batch_without_a_readable_image_is_left_out(photographs):
    images = open_images(photographs, split="train").prepared(24, None)
    found = list(batches(images, 1, workers=0, skipped=[]))
    assert len(found) == 67


def test_a_folder_of_only_corrupt_images_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / "class").mkdir(exist_ok=True)
        (tmp_path / "class" / f"{i}.png").write_text("no")
    images = open_images(tmp_path, split="train").prepared(24, None)
    with pytest.raises(UserError, match="none of its 3 images"):
        load(images, workers=0)


def test_the_listing_contains_geometry_and_names_and_is_what_is_hashed(tmp_path, picture):
    for name in ("b/1.png", "a/2.png"):
        picture(tmp_path / name)
    images = open_images(tmp_path, split="train")
    read = "# shorter side to 256 (bilinear), centre crop 224\n"
    assert images.listing() == read + "a/2.png\nb/1.png\n"
    assert images.sha256() == hashlib.sha256(images.listing().encode()).hexdigest()


def test_the_hash_of_the_list_changes_with_the_geometry(tmp_path, picture):
    picture(tmp_path / "a/2.png")
    images = open_images(tmp_path, split="train")
    other, bicubic = Geometry(224, 232), Geometry(224, 256, "bicubic")
    hashes = [images.prepared(one, None).sha256() for one in (paper_geometry(), other, bicubic, 64)]
    assert len(set(hashes)) == 4 and hashes[0] == images.sha256()
    assert images.sha256(other) == hashes[1]  # for a network with that geometry
    assert images.sha256(other, paper_geometry()) == images.sha256(paper_geometry(), other)
    assert images.sha256(other, paper_geometry()) not in hashes


def test_a_run_on_photographs_skips_the_broken_ones_and_says_so_in_its_facts(
        run_here, photographs, tmp_path):
    result = run_here("train_sga.py", "--data_dir", photographs, "--model_name", "squeezenet1_1",
                      "--weights", "random", "--image_size", 32, "--epochs", 1, "--iter", 1,
                      "--amp", "off", "--layout", "contiguous", "--uaps_save", tmp_path / ".run")
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / ".run" / "sga_squeezenet1_1.json").read_text())
    assert (facts["num_images"], facts["skipped"], facts["kind"]) == (67, list(BROKEN), "folder")
    assert facts["shape"] == [3, 32, 32] and facts["eps"] == pytest.approx(10 / 255)
    listing = (tmp_path / ".run" / "images.txt").read_bytes()
    assert facts["images_sha256"] == hashlib.sha256(listing).hexdigest()
    assert listing.startswith(b"# 32 pixels\n") and len(listing.splitlines()) == 1 + 67


def test_imagenette_as_torchvision_extracts_it_has_true_imagenet_indices(tmp_path, picture,
                                                                         monkeypatch):
    monkeypatch.setattr("utils.named.IMAGENETTE", {"train": 2, "val": 2})
    root = tmp_path / "imagenette2-320"
    for split in ("train", "val"):
        for wnid in ("n01440764", "n03888257"):  # tench 0, parachute 701
            picture(root / split / wnid / f"{split}_0.JPEG")
    images = open_images("imagenette", split="test", data_root=tmp_path)
    assert images.kind == "imagenet" and images.labels.tolist() == [0, 701]
    assert images.names[0] == "n01440764/val_0.JPEG"


def test_an_incomplete_imagenette_is_refused(tmp_path, picture):
    picture(tmp_path / "imagenette2-320" / "train" / "n01440764" / "a.JPEG")
    for split in ("train", "test"):  # there is no val/ yet
        with pytest.raises(UserError, match="imagenette2-320' is damaged .*; remove it"):
            open_images("imagenette", split=split, data_root=tmp_path)


def test_a_second_process_waits_for_the_one_that_downloads(tmp_path, monkeypatch):
    there = []

    @contextmanager
    def waits(path):
        assert path == tmp_path / "Imagenette"
        there.append("by another process")
        yield

    class Imagenette(list):
        def __init__(self, root, *, download, size, split):
            assert not download
            if not there:
                raise RuntimeError("Dataset not found.")
            super().__init__(range(9469))
    monkeypatch.setattr(torchvision.datasets, "Imagenette", Imagenette)
    monkeypatch.setattr("utils.named.alone", waits)
    assert imagenette_folder("train", tmp_path) == tmp_path / "imagenette2-320"


def test_an_old_mnist_file_without_tensors_is_refused(tmp_path):
    for name in ("training.pt", "test.pt"):
        path = tmp_path / "MNIST" / "processed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(([[0]], [1]), path)
    with pytest.raises(UserError, match="MNIST in .* is damaged"):
        open_images("mnist", split="train", data_root=tmp_path)


def test_a_failed_imagenette_download_gives_one_line_that_says_what_to_type(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.datasets.imagenette, "download_and_extract_archive", offline)
    with pytest.raises(UserError, match="download failed.*no route.*--data_root"):
        open_images("imagenette", split="train", data_root=tmp_path)


def test_more_photographs_than_memory_holds_are_refused_with_what_to_type(
        tmp_path, picture, monkeypatch):
    for i in range(2):
        picture(tmp_path / "val" / "n01440764" / f"{i}.jpg", seed=i)
    images = open_images(tmp_path / "val", split="test").prepared(paper_geometry(224), None)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 300}.get)
    with pytest.raises(UserError, match="2 images of 224 pixels take 0.000301 GB, .* type --cache"):
        load(images, workers=0)
