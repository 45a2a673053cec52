"""--cache: decoded once, the same pixels, never a wrong image; workers and pinned memory."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils import data
from utils.cache import cached
from utils.cli import SHARED
from utils.data import Geometry, batches, default_workers, load, open_images
from utils.errors import UserError
from utils.images import listed
from utils.run import save_pth

BROKEN = ("a/1.png", "b/3.png")  # the second is the last image


@pytest.fixture
def drawn(tmp_path, picture):
    """Two class folders of four pictures each; two of the eight cannot be decoded."""
    for k, name in enumerate(("a", "b")):
        for i in range(4):
            picture(tmp_path / "own" / name / f"{i}.png", 40 + i, 50, seed=4 * k + i)
    (tmp_path / "own" / BROKEN[0]).write_bytes(b"\x89PNG, cut off")
    (tmp_path / "own" / BROKEN[1]).write_bytes(b"")
    return tmp_path / "own"


@pytest.fixture
def images(drawn):
    return open_images(drawn, split="train").prepared(24, None)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """A list that collects the path of every photograph decoded from now on."""
    found, real = [], data.decode
    monkeypatch.setattr("utils.images.decode",
                        lambda path, geometry: (found.append(path), real(path, geometry))[1])
    return found


def read(images, folder, workers=0):
    return load(cached(images, folder, workers=workers), workers=workers)


def only(folder):
    """The only file in the folder, besides locks."""
    path, = (path for path in folder.iterdir() if not path.name.endswith(".lock"))
    return path


def same(one, other):
    return (torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
            and (one.names, one.skipped) == (other.names, other.skipped))


# ------------------------------------------------------------------------ the same images

@pytest.mark.parametrize("workers", [0, 2])
def test_the_pixels_equal_those_without_a_cache_and_are_decoded_once(images, folder, decoded,
                                                                     workers):
    plain = load(images, workers=0)
    decoded.clear()
    assert same(read(images, folder, workers), plain)
    assert len(decoded) == (0 if workers else 8)  # in this process
    decoded.clear()
    for again in (0, 2):
        assert same(read(images, folder, again), plain)
    assert not decoded and plain.skipped == BROKEN


def test_batches_equal_those_without_a_cache(images, folder, decoded):
    plain = list(batches(images, 3, workers=0, skipped=[]))
    decoded.clear()
    stored = cached(images, folder, workers=0)
    assert len(decoded) == 8
    skipped = []
    for (i, x), (j, z) in zip(batches(stored, 3, workers=2, skipped=skipped), plain, strict=True):
        assert torch.equal(i, j) and torch.equal(x, z)
    assert len(decoded) == 8 and tuple(skipped) == BROKEN
    assert stored[1] is None and torch.equal(stored[2], images[2])


def test_each_command_warns_of_a_broken_file_once(images, folder, capsys):
    for _ in range(2):
        read(images, folder)
        said = capsys.readouterr().err
        assert [said.count(f"{images.root / name}: cannot be decoded") for name in BROKEN] == [1, 1]
    list(batches(cached(images, folder, workers=0), 4, workers=0, skipped=[]))
    assert capsys.readouterr().err.count("cannot be decoded") == 2


def test_processes_other_than_the_first_load_silently(images, folder, capsys):
    stored = cached(images, folder, workers=0)
    capsys.readouterr()
    for own in (images, stored):
        assert same(load(own, workers=0, aloud=False), load(images, workers=0))
        assert capsys.readouterr().err.count("cannot be decoded") == 2  # by the second load


def test_a_folder_of_only_broken_files_is_an_error_and_leaves_nothing(tmp_path, folder):
    for i in range(3):
        (tmp_path / "own" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / "a" / f"{i}.png").write_text("no")
    images = open_images(tmp_path / "own", split="train").prepared(24, None)
    with pytest.raises(UserError, match="none of its 3 images"):
        read(images, folder)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_nothing_is_written_without_a_folder_or_with_pixels_in_memory(images, tmp_path, folder):
    assert cached(images, None, workers=0) is images
    digits = open_images("digits", split="test")
    assert cached(digits, folder, workers=0) is digits and not folder.exists()


def test_a_selection_has_the_right_images_and_stays_mapped_if_evenly_spaced(drawn, folder):
    for name in BROKEN:
        shutil.copy(drawn / "a/0.png", drawn / name)
    images = open_images(drawn, split="train").prepared(24, None)
    whole, stored = load(images, workers=0), cached(images, folder, workers=0)
    mapped = load(stored, workers=0).pixels
    ends = mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes
    for index, there in (([1, 3, 5, 7], True), ([4, 5, 6], True), ([2], True), ([0, 1, 5], False),
                         ([3, 2], False)):
        part = load(stored.select(index), workers=0)
        assert same(part, whole.select(index))
        assert (ends[0] <= part.pixels.data_ptr() < ends[1]) is there


def test_pixels_of_one_geometry_are_never_used_for_another(images, folder):
    stored = cached(images, folder, workers=0)
    other = Geometry(24, 30, "bicubic")
    assert stored.prepared(other, None).stored is None
    assert same(read(stored.prepared(other, None), folder),
                load(images.prepared(other, None), workers=0))
    assert same(read(images, folder), load(images, workers=0))
    assert len(list(folder.glob("*.pixels"))) == 2


def test_the_file_is_mapped_read_only_without_a_warning_and_stays_unchanged(images, folder):
    read(images, folder)
    before = only(folder).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read(images, folder).pixels
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(only(folder)))] if sys.platform == "linux" else []
    assert all(line.split()[1].startswith("r--") for line in maps)
    assert maps or sys.platform != "linux"
    data.to_float(pixels).add_(1)
    cached(images, folder, workers=0)[0].zero_()  # an image is a copy
    assert only(folder).read_bytes() == before
    assert len(before) > pixels.nbytes == 6 * 3 * 24 * 24


# ------------------------------------------------------------------------ never a wrong image

def ended(pixels, text):
    """A file of these pixels and facts, with the correct length and checksum."""
    return pixels + text + b"".join(number.to_bytes(8, "little") for number in (
        len(text), zlib.crc32(pixels + text)))


def with_facts(change):
    def damage(content):
        start = len(content) - 16 - int.from_bytes(content[-16:-8], "little")
        facts = json.loads(content[start:-16])
        change(facts)
        return ended(content[:start], json.dumps(facts).encode())
    return damage


def one_bit(where):
    def damage(content):
        return content[:where] + bytes([content[where] ^ 1]) + content[where:][1:]
    return damage


DAMAGE = {
    "empty": lambda content: b"",
    "cut off at its end": lambda content: content[:-1],
    "cut off in the pixels": lambda content: content[:1000],
    "one image missing": lambda content: content[3 * 24 * 24:],
    "a bit of a pixel": one_bit(999),
    "a bit of the facts": one_bit(-20),
    "a bit of the checksum": one_bit(-8),
    "another broken one": lambda content: content.replace(b'"broken": [1, 7]', b'"broken": [2, 7]'),
    "a byte too many": lambda content: b"\0" + content,
    "zeros": lambda content: bytes(len(content)),
    "the length is too much": lambda content: content[:-16] + b"\xff" * 8 + content[-8:],
    "the length is nothing": lambda content: content[:-16] + bytes(8) + content[-8:],
    "text": lambda content: b"<html>not found</html>",
    "a pickle": lambda content: pickle.dumps({"pixels": 1}),
    "no JSON": lambda content: ended(b"", b"}{"),
    "a list of facts": lambda content: ended(b"", b"[1]"),
    "nested too deep": lambda content: ended(b"", b"[" * 10 ** 6),
    "a pixel too many": lambda content: ended(b"\0", content[6 * 3 * 24 * 24:-16]),
    "fewer broken ones": with_facts(lambda facts: facts.update(broken=[1])),
    "all broken": with_facts(lambda facts: facts.update(broken=list(range(8)))),
    "broken ones beyond the list": with_facts(lambda facts: facts.update(broken=[1, 99])),
    "broken ones without a number": with_facts(lambda facts: facts.update(broken=["x", None])),
    "no broken ones": with_facts(lambda facts: facts.pop("broken")),
    "facts of something else": with_facts(lambda facts: facts.update({"made of": [1]})),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_rebuilt_with_one_warning(images, folder, capsys, decoded, what):
    plain, _ = load(images, workers=0), cached(images, folder, workers=0)
    path = only(folder)
    right = path.read_bytes()
    path.unlink()  # it is mapped
    path.write_bytes(DAMAGE[what](right))
    assert path.read_bytes() != right
    capsys.readouterr(), decoded.clear()
    found = read(images, folder)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line for line in said if "cannot be decoded" not in line] == [
        f"warning: {path}: damaged; decoded again"]
    assert same(found, plain) and len(decoded) == 8 and path.read_bytes() == right


def change_size(path):
    Image.open(path).convert("RGB").rotate(90).save(path, quality=50)


def change_with_the_same_times_and_size(path):
    was, about = path.read_bytes(), path.stat()
    path.write_bytes(was[:-20] + was[-20:][::-1])
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def remove(path):
    path.unlink()


def appear(path):
    shutil.copy(path, path.parent.parent / BROKEN[0])


@pytest.mark.parametrize("change", [change_size, change_with_the_same_times_and_size, remove,
                                    appear])
def test_changed_photographs_with_the_same_names_are_noticed(images, folder, drawn, capsys, change):
    read(images, folder)
    capsys.readouterr()
    change(drawn / "b" / "0.png")
    plain = load(images, workers=0)
    capsys.readouterr()
    assert same(read(images, folder), plain)
    assert capsys.readouterr().err.count("the photographs changed; decoded again") == 1
    assert len(list(folder.glob("*.pixels"))) == 1  # in place of the old one


def test_another_folder_with_the_same_names_has_its_own_file(images, folder, drawn, tmp_path):
    first = read(images, folder)
    shutil.copytree(drawn, tmp_path / "other")
    change_size(tmp_path / "other" / "a" / "0.png")
    others = open_images(tmp_path / "other", split="train").prepared(24, None)
    assert same(read(others, folder), load(others, workers=0))
    assert same(read(images, folder), first)
    one, two = folder.glob("*.pixels")
    two.unlink()
    shutil.copy(one, two)  # intact, but of another folder
    assert same(read(others, folder), load(others, workers=0))
    assert same(read(images, folder), first)


def test_a_link_to_the_folder_uses_the_same_pixels(images, folder, drawn, tmp_path, decoded):
    read(images, folder)
    decoded.clear()
    (tmp_path / "link").symlink_to(drawn)
    read(open_images(tmp_path / "link", split="train").prepared(24, None), folder)
    assert not decoded


@pytest.mark.parametrize("version", ["PIL.__version__", "torchvision.__version__"])
def test_pixels_of_another_decoder_version_are_rebuilt(images, folder, monkeypatch, capsys,
                                                       version):
    read(images, folder)
    monkeypatch.setattr(version, "1.0")
    capsys.readouterr()
    read(images, folder)
    assert capsys.readouterr().err.count("changed; decoded again") == 1


def test_a_shard_that_changed_is_noticed(tmp_path, picture, folder, decoded):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def shard(*seeds):
        rows = [{"bytes": picture(tmp_path / "x.png", seed=seed).read_bytes()} for seed in seeds]
        parquet.write_table(pyarrow.table({"image": rows, "label": list(range(len(seeds)))}),
                            tmp_path / "hf" / "val.parquet")
        images = open_images(tmp_path / "hf", split="test").prepared(24, None)
        from utils.parquet import _file, _read_group, _starts
        for kept in (_file, _read_group, _starts):  # as in a new process
            kept.cache_clear()
        return images
    (tmp_path / "hf").mkdir()
    first = read(shard(0, 1), folder)
    decoded.clear()
    images = open_images(tmp_path / "hf", split="test").prepared(24, None)
    assert same(read(images, folder), first) and not decoded
    images = shard(2, 1)
    found = read(images, folder)
    assert len(decoded) == 2
    assert torch.equal(found.pixels[0], images[0]) and torch.equal(found.pixels[1], first.pixels[1])
    assert not torch.equal(found.pixels[0], first.pixels[0])


# ------------------------------------------------------------------------ several processes

def slowly(images, folder, log, seconds):
    """Run by each process: log every path that is decoded, and decode slowly."""
    real = data.decode

    def decode(path, geometry):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        time.sleep(seconds)
        return real(path, geometry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.images.decode", decode)
        found = read(images, folder)
    np.save(f"{log}_{os.getpid()}.npy", found.pixels.numpy())


def started(*args):
    process = multiprocessing.get_context("fork").Process(target=slowly, args=args)
    process.start()
    return process


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("30 seconds have passed")


@pytest.mark.slow
def test_if_processes_start_at_once_one_decodes_and_all_get_the_images(images, folder, tmp_path):
    log = tmp_path / "log"
    three = [started(images, folder, log, 0.05) for _ in range(3)]
    for process in three:
        process.join(60)
    assert [process.exitcode for process in three] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 8
    plain = load(images, workers=0).pixels.numpy()
    assert all(np.array_equal(np.load(f"{log}_{process.pid}.npy"), plain) for process in three)


@pytest.mark.slow
def test_a_killed_process_leaves_no_partial_file_and_does_not_block_the_next(images, folder,
                                                                             tmp_path):
    process = started(images, folder, tmp_path / "log", 60)
    until(lambda: (tmp_path / "log").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not list(folder.glob("*.pixels")) and len(list(folder.glob(".*.tmp"))) == 1
    assert same(read(images, folder), load(images, workers=0))
    assert not list(folder.glob(".*.tmp"))


def test_the_cache_works_on_a_file_system_without_locks(images, folder, monkeypatch):
    def flock(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr("fcntl.flock", flock)
    assert same(read(images, folder), load(images, workers=0))


# ------------------------------------------------------------------------ no space, no permission

def test_an_unwritable_folder_gives_one_line_before_anything_is_decoded(images, tmp_path, decoded):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):  # root may write anywhere else
        with pytest.raises(UserError, match="--cache .*file.*cannot write there"):
            cached(images, path, workers=0)
    assert not decoded


def test_a_read_only_folder_still_serves_its_pixels(images, folder, decoded, monkeypatch):
    first = read(images, folder)
    decoded.clear()
    monkeypatch.setattr("utils.cache._alone", None)  # nothing is locked
    assert same(read(images, folder), first) and not decoded


def test_a_disk_that_is_too_small_is_reported_before_anything_is_decoded(images, folder, decoded,
                                                                         monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(UserError, match="8 images need 0.0 GB, 0.0 GB are free; choose another"):
        cached(images, folder, workers=0)
    assert not decoded and [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_disk_that_fills_up_leaves_no_partial_file(images, folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError) as error:
            cached(images, folder, workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.strerror and error.value.filename.endswith(".pixels")
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    assert same(read(images, folder), load(images, workers=0))


# ------------------------------------------------------------------------ every script

class Tiny(torch.nn.Module):
    """Replaces torchvision's networks; predicts class 0 for every image."""
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(3, 1000)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)
        self.out.weight.data[0], self.out.weight.data[1] = 1.0, -1.0

    def forward(self, x):
        return self.out(x.mean((2, 3)) + 2.2)


NAMED = ("--model_name", "resnet50", "--weights", "random")
OWN = ("--data_dir", "own", "--model_name", "cnn_bn", "--image_size", 32, "--epochs", 1,
       "--batch_size", 2)
SCRIPTS = {
    "train_sga.py": ("--data_dir", "val", *NAMED[:1], "resnet50", *NAMED[2:], "--epochs", 1,
                     "--amp", "off", "--layout", "contiguous"),
    "eval_uap.py": ("--data_dir", "val", *NAMED, "--uaps", "u.pth", "--show", 2),
    "eval_net.py": ("--data_dir", "val", *NAMED, "--attacks", "fgsm"),
    "eval_net.py accuracy": ("--data_dir", "val", *NAMED, "--attacks", "none"),
    "eval_net.py predict": ("--data_dir", "val", *NAMED, "--predict"),
    "gcm.py": ("--data_dir", "val", *NAMED, "--attacks", "fgsm", "--geometry", "weights"),
    "free_at.py": (*OWN, "--method", "natural", "--augment", "off", "--guard", "off", "--hold_out",
                   0.25),
    "train_gcm.py": (*OWN, "--augment", "none", "--hold_out", 0.5, "--head", "own"),
    "train_gcm.py augmented": (*OWN, "--augment", "rain", "--hold_out", 0.5, "--head", "own"),
}


def results(folder):
    """{name: content} of the files of a run, without times and provenance."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()
             if path.suffix == ".csv" or (path.suffix == ".pth" and path.stem != "checkpoint")}
    found.pop("log.csv", None)  # has seconds
    if (folder / "results.json").is_file():
        saved = json.loads((folder / "results.json").read_text())
        for cell in (saved.get("cells") or {}).values():
            cell.pop("seconds", None)
        found["results.json"] = saved.get("cells") or [
            saved["rows"], saved["protocol"]["n"], saved["protocol"]["skipped"]]
        found.pop("results.csv", None)  # too
    return found


@pytest.mark.parametrize("case", SCRIPTS)
def test_a_second_command_decodes_nothing_and_gives_the_same_results(run_here, drawn, tmp_path,
                                                                     picture, monkeypatch, case):
    for i in range(5):
        picture(tmp_path / "val" / "n01440764" / f"{i}.jpg", 300, 260, seed=i)
    (tmp_path / "val" / "n01440764" / "1.jpg").write_bytes(b"no")
    save_pth(tmp_path / "u.pth", torch.full((3, 224, 224), 2 / 255))
    monkeypatch.setattr("torchvision.models.get_model", lambda name, **options: Tiny())
    script, flags = case.split()[0], (*SCRIPTS[case], "--device", "cpu", "--workers", 0)

    def run(save, *more):
        done = run_here(script, *flags, "--save", save, *more)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("cannot be decoded") == plain_warnings
        return results(tmp_path / save)
    done = run_here(script, *flags, "--save", "plain")
    assert done.returncode == 0, done.stderr
    plain_warnings, plain = done.stderr.count("cannot be decoded"), results(tmp_path / "plain")
    assert plain_warnings and plain and not (tmp_path / "cache").exists()
    assert run("first", "--cache", "cache") == plain

    def decode(path, geometry):
        raise AssertionError(f"{path} is decoded")
    monkeypatch.setattr("utils.images.decode", decode)
    assert run("second", "--cache", "cache") == plain


def test_a_cache_that_cannot_be_written_ends_a_command_with_one_line(run_here, refused, drawn,
                                                                     tmp_path):
    (tmp_path / "file").write_text("")
    done = run_here("free_at.py", *SCRIPTS["free_at.py"], "--device", "cpu", "--workers", 0,
                    "--save", "run", "--cache", "file/cache")
    refused(done, "--cache file/cache", "cannot write there")


def test_a_run_begun_without_a_cache_can_resume_with_one(run_here, drawn, tmp_path):
    flags = (*SCRIPTS["free_at.py"], "--device", "cpu", "--workers", 0, "--save", "run")
    assert run_here("free_at.py", *flags).returncode == 0
    done = run_here("free_at.py", *flags, "--cache", "cache", "--resume")
    assert done.returncode == 0, done.stderr


def test_random_crops_are_cut_from_the_photographs_without_a_cache(run_here, drawn, tmp_path):
    done = run_here("free_at.py", *SCRIPTS["free_at.py"], "--augment", "auto", "--device", "cpu",
                    "--workers", 0, "--save", "run", "--cache", "cache")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------ workers, pinned memory

@pytest.mark.parametrize(("environment", "wanted"), [
    ({}, 6), ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, 3), ({"WORLD_SIZE": "3"}, 2),
    ({"LOCAL_WORLD_SIZE": "4"}, 1), ({"WORLD_SIZE": "100"}, 1), ({"WORLD_SIZE": ""}, 6),
    ({"LOCAL_WORLD_SIZE": "0"}, 6), ({"WORLD_SIZE": "many"}, 6)])
def test_the_processes_of_a_machine_share_its_processors(monkeypatch, environment, wanted):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert default_workers() == wanted


class Batch:
    """Stands for a CPU tensor that is copied to a device."""
    def __init__(self):
        self.copied = []

    def to(self, *args, **options):
        self.copied.append((args, options))
        return self


@pytest.mark.parametrize(("device", "workers", "stored", "pinned"), [
    ("cuda", 2, False, True), ("cuda", 0, False, False), ("cpu", 2, False, False),
    ("mps", 2, False, False), ("cuda", 2, True, False), (None, 2, False, False)])
def test_photographs_go_to_a_gpu_from_pinned_memory_without_waiting(
        monkeypatch, images, folder, device, workers, stored, pinned):
    images = cached(images, folder, workers=0) if stored else images
    given, made = [], []

    def loader(dataset, batch_size, **options):
        given.append(options)
        made.extend([Batch(), Batch()])
        return [([0, 1, 2, 3], x) for x in made]
    monkeypatch.setattr("torch.utils.data.DataLoader", loader)
    device = device and torch.device(device)
    found = list(batches(images, 4, workers=workers, skipped=[], device=device))
    assert [index.tolist() for index, _ in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert given[0]["pin_memory"] is pinned
    assert given[0]["num_workers"] == (0 if stored else workers)
    gpu = device is not None and device.type == "cuda"
    wanted = [] if device is None else [((device,), {"non_blocking": gpu})]
    assert all(x.copied == wanted for x in made)


def test_batches_are_on_the_requested_device(images):
    for _, x in batches(images, 4, workers=0, skipped=[], device=torch.device("cpu")):
        assert x.device.type == "cpu" and x.dtype == torch.uint8
    for _, x in batches(images, 4, workers=0, skipped=[], device=torch.device("meta")):
        assert x.device.type == "meta"


def test_the_size_of_an_image_in_the_help_and_on_the_page_is_right(tmp_path, folder, picture):
    picture(tmp_path / "own" / "a" / "0.png", 300, 260)
    images = listed("folder", ["a/0.png"], None, (), tmp_path / "own")
    assert load(cached(images, folder, workers=0), workers=0).pixels.nbytes == 150_528
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    assert "150,528 bytes" in page and "151 KB" in SHARED["cache"]["help"]
