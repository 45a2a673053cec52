"""Every benchmark runs to the end at its smallest size and writes its table; what it compares is
comparable. No times are tested.
"""

import csv
import json
import re
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import ROOT

from attack_toys import pictures, predicted
from utils import models
from utils.precision import Fast

FOLDER = ROOT / "benchmarks"
SCRIPTS = {path.name for path in FOLDER.glob("*.py") if "def get_args()" in path.read_text()}
DIGITS = ["--data_dir", "digits", "--model_name", "cnn"]
SMALLEST = {  # script -> flags
    "attack_speed.py": [*DIGITS, "--batch_size", 2, "--steps", 1, "--binary_steps", 1, "--cw_steps",
                        1, "--turns", 1, "--queries", 2, "--layout", "channels_last", "--results",
                        "out.json"],
    "attack_table.py": [*DIGITS, "--weights", "random", "--num_images", 20, "--eps_scale", "1/32",
                        "--attacks", "fgsm", "pgd_l1_dense", "apgd_ce", "--results", "out"],
    "augment_speed.py": ["--model_name", "squeezenet1_0", "--batch_size", 2, "--image_size", 32,
                         "--turns", 1, "--out", "out.json"],
    "autoattack.py": ["--num_images", 4, "--epochs", 0, "--norms", "linf", "--results", "out.json"],
    "bad_input.py": ["--cases", 1, "--results", "out.json"],
    "full_disk.py": ["--sizes", 1, "--commands", "train_sga", "--results", "out.json"],
    "kill_test.py": ["--kills", 1, "--commands", "train_sga", "--results", "out.json"],
    "chance_speed.py": ["--batch_size", 2, "--image_size", 8, "--queries", 3, "--turns", 1,
                        "--results", "out.json"],
    "free_cost.py": [*DIGITS, "--batch_size", 8, "--minibatches", 1, "--turns", 1, "--replays", 2,
                     "--steps", 1, "--workers", 0, "--bf16", "--results", "out.json"],
    "gpu_table.py": ["--model_name", "squeezenet1_0", "--num_images", 3, "--image_size", 32,
                     "--turns", 1, "--device", "cpu", "--results", "out.json"],
    "scale_cost.py": ["--measure", "memory", "--sizes", 10, "--results", "out.json"],
    "uap_memory.py": ["--num_images", 4],
    "uap_speed.py": ["--model_name", "squeezenet1_0", "--steps", 1, "--rounds", 1, "--minibatch", 2,
                     "--image_size", 64, "--layout", "channels_last", "--results", "out.json"]}
LEAVES = {  # script -> files; the others print only
    "attack_speed.py": {"out.json", "out.csv", "out.md"},
    "attack_table.py": {"out/results.json", "out/results.csv", "out/results.md"},
    "augment_speed.py": {"out.json"}, **{name: {"out.json", "out.csv", "out.md"} for name in (
        "autoattack.py", "bad_input.py", "full_disk.py", "kill_test.py")},
    "chance_speed.py": {"out.json", "out.csv", "out.md"},
    "free_cost.py": {"out.json", "out.csv", "out.md"},
    "gpu_table.py": {"out.json", "out.csv", "out.md"},
    "scale_cost.py": {"out.json", "out.csv", "out.md"},
    "uap_speed.py": {"out.json", "out.csv", "out.md"}}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Put benchmarks/ on the path for one test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [name for name in sys.modules if (FOLDER / f"{name}.py").exists()]:
        del sys.modules[name]


def tables(text):
    """The Markdown tables of a text, each a list of rows, each a list of cells."""
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in table.splitlines()] for table in re.findall(r"(?:^\|.*\n)+", text, re.M)]


def test_every_benchmark_has_a_smallest_size():
    assert set(SMALLEST) == SCRIPTS


@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_a_benchmark_runs_and_writes_its_table(name, run_here, tmp_path):
    done = run_here(name, *SMALLEST[name])
    if name == "full_disk.py" and "may not mount" in done.stderr:
        pytest.skip("no tmpfs can be mounted by this user")
    assert done.returncode == 0, done.stderr
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {file for file in files if "lock" not in file} == LEAVES.get(name, set())
    if name == "uap_memory.py":
        assert re.fullmatch(r"4 images of 224 pixels: 1 MB of pixels, \d+ MB in all at the peak\n",
                            done.stdout)
        return
    (head, rule, *body), *_ = tables(done.stdout)
    assert set(rule) == {"---"} and body
    assert all(len(row) == len(head) and all(row[:2]) for row in body)
    if name in ("bad_input.py", "full_disk.py", "kill_test.py"):
        assert all(row[1] == row[-1] for row in body), done.stderr  # all of them are right
    for file in files:
        if file.endswith(".json"):
            assert json.loads((tmp_path / file).read_text())
        if file.endswith(".md"):
            assert tables((tmp_path / file).read_text())[0] == [head, rule, *body]
        if file == "out.csv":  # is copied to docs/results
            with open(tmp_path / file, newline="") as lines:
                assert list(csv.reader(lines)) == [head, *body]


def test_the_gpu_table_contains_the_figures_of_the_other_tables(run_here, tmp_path, refused):
    (tmp_path / "sga.csv").write_text("model,precision,img/s,peak MB\nvgg16,bf16,20.5,\n"
                                      "vgg16,float32,10.1 (0.5),300\n")
    flags = SMALLEST["gpu_table.py"]
    done = run_here("gpu_table.py", *flags, "--tables", "sga.csv")
    assert [row for row in tables(done.stdout)[0] if row[0].startswith("sga")] == [
        ["sga: vgg16, bf16", "img/s", "20.5"], ["sga: vgg16, float32", "img/s", "10.1 (0.5)"],
        ["sga: vgg16, float32", "peak MB", "300"]]
    refused(run_here("gpu_table.py", *flags, "--tables", "none.csv"), "none.csv")


def test_speed_and_cache_are_measured_on_the_same_photographs(run_here, tmp_path, monkeypatch):
    import scale_cost
    seen = []

    def run(folder, script, *flags, processes=1):
        flags = dict(zip(flags[::2], flags[1::2], strict=True))
        seen.append((processes, flags.get("--num_images"), "--cache" in flags))
        assert sum(path.suffix == ".jpg" for path in (folder / "photos").rglob("*")) == 20
        return flags.get("--num_images", 20) / processes, 7.0
    monkeypatch.setattr(scale_cost, "run", run)
    done = run_here("scale_cost.py", "--measure", "processes", "cache", "--photographs", 10)
    assert seen == [(1, 10, False), (1, 20, False), (2, 10, False), (2, 20, False),
                    (1, None, False), (1, None, True), (1, None, True)]
    values = [row[2] for row in tables(done.stdout)[0][2:]]
    assert values == ["1.0", "2.0", "20.0", "20.0", "20.0"]


# ------------------------------------------------------------- what is compared with what

def test_a_changed_byte_or_row_is_a_different_outcome_and_a_changed_time_is_not(tmp_path):
    import kill_test

    def left(weights=b"abc", loss="1.5", seconds="3", n=40):
        (tmp_path / "x.pth").write_bytes(weights)
        (tmp_path / "log.csv").write_text(f"epoch,loss,seconds\n1,{loss},{seconds}\n")
        cell = {"n": n, "seconds": seconds}
        (tmp_path / "results.json").write_text(json.dumps({"cells": [cell]}))
        return kill_test.outcome(tmp_path)
    whole = left()
    assert left(seconds="4") == whole
    assert all(other != whole for other in (left(weights=b"abd"), left(loss="1.6"), left(n=41)))
    (tmp_path / ".checkpoint.pth.x.tmp").write_bytes(b"")
    assert left() != whole


@pytest.mark.parametrize(("code", "said", "wrong"), [
    (2, "error: word of it\n", ""), (2, "warning: w\nerror: word\n", ""),
    (0, "", "exit status 0"), (None, "", "exit status None"), (1, "error: word\n", "exit status 1"),
    (2, "Traceback\nerror: word\n", "2 lines"), (2, "word\n", "1 lines"),
    (2, "error: other\n", "word not in")])
def test_an_answer_to_bad_input_is_judged_right_or_wrong(monkeypatch, tmp_path, code, said, wrong):
    import bad_input

    monkeypatch.setattr(bad_input, "call", lambda folder, command: (code, said))
    found = bad_input.wrong_with((("x.py",), {"a/x.pth": b"x"}, ("word",), True), tmp_path)
    assert found.startswith(wrong) and bool(found) == bool(wrong)


def test_an_answer_that_writes_a_file_is_wrong(monkeypatch, tmp_path):
    import bad_input

    monkeypatch.setattr(bad_input, "call", lambda folder, command: (
        (folder / "new").write_text(""), (2, "error: x"))[1])
    assert bad_input.wrong_with((("x.py",), {}, (), True), tmp_path) == "a file was written"
    (tmp_path / "ran").mkdir()
    assert "was run" in bad_input.wrong_with((("x.py",), {}, (), False), tmp_path)


def test_every_library_attacks_the_same_three_forms_of_the_network(monkeypatch):
    import attack_speed
    seen = []

    def note(name, model, x, y):
        seen.append((name, model, x))
        return x
    monkeypatch.setattr(attack_speed, "others", lambda args, classes: {
        "library": {"fgsm": partial(note, "library")}})
    monkeypatch.setattr(attack_speed, "ours", lambda args, early, judge: {
        "fgsm": partial(note, "ours")})
    model = models.load_model("cnn", weights="random", kind="digits", data_dir="digits")
    x = pictures(2, shape=(1, 28, 28))
    args = Namespace(layout="channels_last", eps={"linf": 0.1})
    forms = attack_speed.forms_of(model, x, predicted(model, x), args)
    assert list(forms) == [("float32", "contiguous"), ("float32", "channels_last"),
                           ("bf16", "channels_last")]
    for (name, precision, layout), work in attack_speed.implementations(
            forms, predicted(model, x), args).items():
        seen.clear()
        work["fgsm"]()
        (who, network, laid), = seen
        weight = next(layer.weight for layer in network.modules()
                      if isinstance(layer, torch.nn.Conv2d) and layer.weight.shape[1] > 1)
        assert who == ("library" if name == "library" else "ours")
        assert weight.dtype == {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert weight.is_contiguous(memory_format=torch.channels_last) == (
            layout == "channels_last") != weight.is_contiguous()
        assert laid.data_ptr() == forms[precision, layout][1].data_ptr()
        assert (network is model) == ((precision, layout) == ("float32", "contiguous"))


@pytest.mark.parametrize("attack", ["fgsm", "pgd_linf", "pgd_l2", "mim", "cw_l2", "apgd", "square"])
def test_every_library_takes_colour_images_in_channels_last_order(attack):
    import attack_speed

    from attack_others import ALPHA, EPS, installed
    args = Namespace(eps=EPS, alpha=ALPHA, steps=2, binary_steps=1, cw_steps=2, queries=2,
                     installed=installed())
    model = models.load_model("resnet_small", weights="random", kind="cifar10", data_dir="cifar10")
    x = pictures(2, shape=(3, 32, 32)).contiguous(memory_format=torch.channels_last)
    network, y = Fast(model, "off", "channels_last").eval(), predicted(model, x)
    for name, attacks in attack_speed.others(args, 10).items():
        if attack in attacks:
            assert attacks[attack](network, x, y).shape == x.shape, name
            assert not any(part.training for part in network.modules()), name


def row(implementation, precision, seconds, passes=20.0):
    return {"implementation": implementation, "precision": precision, "layout": "contiguous",
            "seconds": seconds, "passes": passes}


def test_a_ratio_compares_with_the_fastest_other_that_took_every_step_in_the_same_form():
    import attack_speed
    rows = [row("ours", "float32", [2, 2, 8]), row("ours, stop early", "float32", [1, 1, 1], 2),
            row("slow", "float32", [9, 9, 9]), row("fast", "float32", [3, 4, 5], 21),
            row("lazy", "float32", [0.1, 0.1, 0.1], 4), row("ours", "bf16", [1, 1, 1]),
            row("slow", "bf16", [2, 2, 2]), row("ours", "alone", [1, 1, 1])]
    ratios = [one["ratio"] for one in attack_speed.with_ratios(rows, 20)]
    assert ratios == pytest.approx([1.5, 4, 4 / 9, 1, 40, 2, 1, None])


def test_the_published_sga_step_gives_the_same_gradient_as_ours():
    import uap_speed
    model = models.load_model("cnn", weights="random", kind="digits", data_dir="digits")
    x, generator = pictures(8, shape=(1, 28, 28)), torch.Generator().manual_seed(0)
    y, delta = predicted(model, x), torch.zeros(1, 1, 28, 28)
    draws = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(3)])
    trainable = Fast(model, "off", "contiguous").requires_grad_()
    g = uap_speed.ours(model, x, y, delta, draws)
    assert g.abs().max() > 0
    torch.testing.assert_close(uap_speed.plain(trainable, x, y, delta, draws), g / draws.numel())
