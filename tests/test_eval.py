"""eval_uap.py: its figures compared with naive loops, its files, what it refuses."""

import csv
import gc
import json
import math
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import eval_uap
from utils import data, draw, measure, models, report_uaps, uaps
from utils.cells import Progress
from utils.errors import UserError
from utils.run import save_json, save_pth

EPS = 0.3
FEW = ("--num_images", 40, "--eps", EPS, "--device", "cpu")


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    """Two perturbations for digits as files: `grid`, on the 8-bit grid, and `free`."""
    folder = tmp_path_factory.mktemp("uaps")
    generator = torch.Generator().manual_seed(0)
    free = (torch.rand((1, 28, 28), generator=generator) * 2 - 1) * EPS
    grid = (torch.randint(-70, 71, (1, 28, 28), generator=generator)) / 255
    save_pth(folder / "free.pth", free)
    save_pth(folder / "grid.pth", grid)
    return {"free": free, "grid": grid, "folder": folder}


def naive(name, delta, count):
    """Each count by a loop over single images, written from the definitions."""
    model = models.load_model(name, kind="digits", data_dir="digits")
    images = data.open_images("digits", split="test").prepared(28, count)
    n = {key: 0 for key in ("fooled", "clean", "adv", "both", "clean5", "adv5")}
    for i in range(len(images)):
        x, label = images[i][None] / 255, int(images.labels[i])
        before, after = model(x)[0], model((x + delta).clamp(0, 1))[0]
        n["fooled"] += int(before.argmax() != after.argmax())
        n["clean"] += int(before.argmax() == label)
        n["adv"] += int(after.argmax() == label)
        n["both"] += int(before.argmax() == label and after.argmax() == label)
        n["clean5"] += label in before.argsort(descending=True)[:5].tolist()
        n["adv5"] += label in after.argsort(descending=True)[:5].tolist()
    return n


@pytest.fixture(scope="module")
def table(deltas, tmp_path_factory):
    """The folder of one evaluation of both perturbations on two networks."""
    folder = tmp_path_factory.mktemp("eval")
    flags = ("--uaps", deltas["folder"] / "free.pth", deltas["folder"] / "grid.pth",
             "--model_name", "cnn", "mlp", *FEW, "--save", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval_uap.py", *map(str, flags)])
        eval_uap.main(eval_uap.get_args())
    gc.collect()  # frees the lock on the folder
    return folder


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_every_figure_equals_a_loop_over_single_images(table, deltas):
    rows = rows_of(table)
    assert [(r["uap"], r["target"]) for r in rows] == [
        ("free", "cnn"), ("free", "mlp"), ("grid", "cnn"), ("grid", "mlp")]
    for row in rows:
        n = naive(row["target"], deltas[row["uap"]], 40)
        got = {k: row[k]["k"] for k in ("fooling_ratio", "clean_acc", "adv_acc", "robust_acc",
                                        "attack_robustness", "clean_acc_top5", "adv_acc_top5")}
        assert list(got.values()) == [
            n[k] for k in ("fooled", "clean", "adv", "both", "both", "clean5", "adv5")]
        assert row["n"] == row["fooling_ratio"]["n"] == row["robust_acc"]["n"] == 40
        assert row["attack_robustness"]["n"] == n["clean"]


@pytest.mark.slow
def test_an_evaluation_writes_json_csv_markdown_and_pictures(table):
    rows = list(csv.DictReader((table / "results.csv").open()))
    assert len(rows) == 4
    assert float(rows[0]["fooling_ratio_low"]) <= float(rows[0]["fooling_ratio"])
    assert "| UAP | cnn | mlp |" in (table / "results.md").read_text()
    for picture in ("examples.png", "heatmap.png"):
        assert (table / picture).read_bytes().startswith(b"\x89PNG")
    assert (table / "images.txt").read_text().count("\n") == 1 + 40


def test_the_examples_show_what_up_to_four_networks_see_in_the_perturbed_images():
    images = data.open_images("digits", split="test").prepared(28, 12)
    nets = {f"net {k}": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
            for k in range(5)}
    delta = 0.3 * torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0)).sign()
    names_of = {name: [f"{name} says {k}" for k in range(10)] for name in nets}
    shown = eval_uap.examples(nets, delta, images, names_of, 3, torch.device("cpu"))
    x = images.pixels[[0, 5, 11]] / 255
    for name, found in shown["seen"].items():
        assert found == [f"{name} says {k}" for k in
                         nets[name]((x + delta).clamp(0, 1)).argmax(1).tolist()]
    assert list(shown["seen"]) == list(nets)[:4]
    assert shown["after"] == shown["seen"]["net 0"]
    assert shown["before"] == [f"net 0 says {k}" for k in nets["net 0"](x).argmax(1).tolist()]
    assert shown["clean"]["net 3"] == [
        f"net 3 says {k}" for k in nets["net 3"](x).argmax(1).tolist()]
    plain = {key: value for key, value in shown.items() if key not in ("clean", "seen")}
    heights = [int.from_bytes(draw.examples(**one, title="t")[20:24], "big")
               for one in (plain, shown)]
    assert heights[0] < heights[1]


@pytest.mark.slow
def test_the_examples_are_saved_as_arrays_that_need_no_pickle(table, deltas):
    with np.load(table / "examples.npz", allow_pickle=False) as saved:
        shown = dict(saved)
    x, x_adv, delta = (torch.from_numpy(shown[key]) for key in ("x", "x_adv", "delta"))
    assert x.shape == x_adv.shape == (4, 1, 28, 28) and x.dtype == torch.float32
    images = data.open_images("digits", split="test").prepared(28, 40)
    assert torch.equal(x, images.pixels[[0, 13, 26, 39]] / 255)
    assert torch.equal(delta, deltas["free"])
    assert torch.equal(x_adv, (x + delta).clamp(0, 1))
    assert (shown["target"], shown["uap"]) == ("cnn", "free")
    model = models.load_model("cnn", kind="digits", data_dir="digits")
    for key, pixels in (("before", x), ("after", x_adv)):
        assert shown[key].tolist() == [str(k) for k in model(pixels).argmax(1).tolist()]


@pytest.mark.slow
def test_the_audit_says_whether_rounding_to_8_bits_changes_the_ratio(table, deltas):
    lines = (table / "results.md").read_text().splitlines()
    assert any(line.startswith("grid: largest |delta| 70.00/255, 0 NaN of 784, 8-bit rounding "
                               "changes nothing") for line in lines)
    assert any(line.startswith("free: ") and "8-bit rounding changes" in line for line in lines)
    rounded = naive("cnn", (deltas["free"] * 255).round() / 255, 40)
    assert rows_of(table)[0]["fooling_ratio_rounded"]["k"] == rounded["fooled"]


def logits(*classes):
    return torch.eye(10)[list(classes)] - 0.01 * torch.arange(10)  # the runners-up: 0, 1, 2, 3


def test_the_counts_of_four_images_equal_those_by_hand():
    counts = measure.UapCounts(target=3)
    # before 0 1 2 3, after 3 1 3 3, labels 0 1 5 3
    counts.add(logits(0, 1, 2, 3), logits(3, 1, 3, 3), logits(3, 1, 2, 3),
               torch.tensor([0, 1, 5, 3]))
    figures = counts.figures(True, "abcdefghij")
    assert {k: (v["k"], v["n"]) for k, v in figures.items()} == {
        "fooling_ratio": (2, 4), "targeted_success": (2, 3), "clean_acc": (3, 4),
        "adv_acc": (2, 4), "robust_acc": (2, 4), "attack_robustness": (2, 3),
        "clean_acc_top5": (3, 4), "adv_acc_top5": (3, 4), "dominant_class": (2, 2),
        "fooling_ratio_rounded": (1, 4)}
    assert figures["dominant_class"]["name"] == "d"


def test_an_image_that_the_perturbation_repairs_counts_in_adv_acc_and_not_in_robust_acc():
    counts = measure.UapCounts()
    # before 0 1 2 3, after 0 7 5 5, labels 0 1 5 5: one stays right, one is lost, two are repaired
    counts.add(logits(0, 1, 2, 3), logits(0, 7, 5, 5), None, torch.tensor([0, 1, 5, 5]))
    figures = counts.figures(True, "abcdefghij")
    assert {name: (figures[name]["k"], figures[name]["n"]) for name in (
        "clean_acc", "adv_acc", "robust_acc", "attack_robustness")} == {
            "clean_acc": (2, 4), "adv_acc": (3, 4), "robust_acc": (1, 4),
            "attack_robustness": (1, 2)}
    row = {"uap": "u", "target": "t", "n": 4, **figures}
    head, _, line = report_uaps.detail_table([row]).splitlines()
    shown = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert (shown["adv_acc"][:4], shown["robust_acc"][:4]) == ("75.0", "25.0")
    assert report_uaps.flat(row)["robust_acc"] == 0.25


def test_without_fooled_images_there_is_no_dominant_class():
    rows = []
    for name, after in (("zero", [0, 1]), ("one", [0, 2])):
        counts = measure.UapCounts()
        counts.add(logits(0, 1), logits(*after), None, torch.tensor([0, 1]))
        rows.append({"uap": name, "target": "t", "n": 2, **counts.figures(
            True, ["tench", *"bcdefghij"])})
    assert rows[0]["dominant_class"] is None
    lines = report_uaps.detail_table(rows).splitlines()
    assert lines[2].endswith("| - |") and lines[3].endswith("| c, 100.0 |")
    flat = [report_uaps.flat(row) for row in rows]
    assert list(flat[0]) == list(flat[1])  # the same columns, in the same order
    assert {flat[0][key] for key in flat[0] if key.startswith("dominant_class")} == {None}
    assert (flat[1]["dominant_class"], flat[1]["dominant_class_name"]) == (1.0, "c")


def test_wilson_intervals_follow_the_formula():
    assert measure.wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert measure.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    low, high = measure.wilson(198, 300)
    for bound in (low, high):  # its defining property: p lies z standard errors from the bound
        assert abs(0.66 - bound) == pytest.approx(
            1.959964 * math.sqrt(bound * (1 - bound) / 300), rel=1e-5)


def test_a_zero_perturbation_fools_nothing_and_old_pictures_are_removed(run_here, tmp_path):
    save_pth(tmp_path / "zero.pth", torch.zeros(1, 28, 28))
    (tmp_path / "table").mkdir()
    for name in ("examples.png", "examples.npz", "heatmap.png"):
        (tmp_path / "table" / name).write_text("of an earlier evaluation")
    done = run_here("eval_uap.py", "--uaps_save", "zero.pth", "--results", "table",  # older names
                    "--model_name", "cnn", "--show", 0, *FEW)
    assert (tmp_path / "table/results.md").read_text() in done.stdout
    row = rows_of(tmp_path / "table")[0]
    assert row["fooling_ratio"]["k"] == 0 and row["dominant_class"] is None
    assert row["clean_acc"] == row["adv_acc"] == row["robust_acc"]
    assert done.stdout.count(" | - |\n") == 1 and "| 0, 0.0 |" not in done.stdout
    assert "Protocol: data: digits; n: 40; list sha256: " in done.stdout
    saved, = csv.DictReader((tmp_path / "table/results.csv").open())
    assert saved["dominant_class"] == saved["dominant_class_name"] == ""
    assert sorted(path.name for path in (tmp_path / "table").iterdir()) == [
        ".lock", "images.txt", "results.csv", "results.json", "results.md"]


def test_images_are_decoded_once_and_clean_predictions_computed_once(
        monkeypatch, tmp_path, picture):
    for i in range(6):
        picture(tmp_path / "val" / "n01440764" / f"{i}.jpg", 48, 40, seed=i)
    decoded, calls = [], []
    real = data.decode
    monkeypatch.setattr("utils.images.decode",
                        lambda path, size: decoded.append(path) or real(path, size))

    class Counted(torch.nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return torch.cat([x.mean((2, 3)), torch.zeros(len(x), 997)], 1)
    images = data.open_images(str(tmp_path / "val"), split="test").prepared(32, None)
    fitted = {32: {name: torch.full((3, 32, 32), value / 255)  # on the 8-bit grid
                   for name, value in (("a", 25), ("b", -25), ("c", 10))}}
    s = Namespace(batch_size=4, workers=0, defense="none", cache=None, seed=0)
    eval_uap.count_all(s, images, {images.geometry: {"one": Counted(), "two": Counted()}}, fitted,
                       dict.fromkeys(fitted[32]), torch.device("cpu"), Progress())
    assert len(decoded) == 6
    assert len(calls) == 2 * 2 * (1 + 3)  # batches x targets x (clean + perturbations)


def test_a_pass_resumes_after_a_commit_but_not_after_a_torch_update():
    images, s = data.open_images("digits", split="test"), Namespace(seed=0)
    first, second, third = (
        eval_uap.depends(s, {"data": "digits", "commit": commit, "torch": torch_}, images, {}, {})
        for commit, torch_ in (("a", "2"), ("b", "2"), ("b", "3")))
    assert first == second != third


def test_broken_images_are_named_counted_and_left_out(run_here, tmp_path, picture):
    for i in range(3):
        picture(tmp_path / "val" / "n01440764" / f"{i}.jpg", seed=i)
    (tmp_path / "val" / "n01440764" / "1.jpg").write_bytes(b"\xff\xd8 not a picture")
    save_pth(tmp_path / "u.pth", torch.full((3, 64, 64), 2 / 255))
    done = run_here("eval_uap.py", "--uaps", "u.pth", "--data_dir", "val", "--workers", 0,
                    "--model_name", "squeezenet1_1", "--weights", "random", "--image_size", 64)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 1
    assert "1.jpg" in done.stderr
    result = json.loads((tmp_path / "runs/eval/results.json").read_text())
    assert result["protocol"]["skipped"] == ["n01440764/1.jpg"]
    assert result["rows"][0]["n"] == 2


def test_folders_of_other_classes_give_no_accuracies(run_here, tmp_path, picture):
    picture(tmp_path / "mine" / "cats" / "0.jpg")
    save_pth(tmp_path / "u.pth", torch.full((3, 64, 64), 2 / 255))
    done = run_here("eval_uap.py", "--uaps", "u.pth", "--data_dir", "mine", "--workers", 0,
                    "--model_name", "squeezenet1_1", "--weights", "random", "--image_size", 64)
    assert done.returncode == 0, done.stderr
    row = rows_of(tmp_path / "runs/eval")[0]
    assert "fooling_ratio" in row
    assert "clean_acc" not in row


# ------------------------------------------------------------------ reading files

DELTA = torch.linspace(-10, 10, 3 * 6 * 7).round().view(3, 6, 7) / 255
READ = {"scale": "auto", "eps": 10 / 255}


@pytest.mark.parametrize("write", [
    lambda p: save_pth(p / "u.pth", DELTA),
    lambda p: save_pth(p / "u.pth", DELTA[None].half()),
    lambda p: save_pth(p / "u.pth", {"uap": DELTA.double(), "eps": torch.tensor(0.04)}),
    lambda p: save_pth(p / "u.pth", DELTA * 255),
    lambda p: np.save(p / "u.npy", DELTA.numpy()[None]),
    lambda p: np.save(p / "u.npy", (DELTA * 255).round().numpy().astype(np.int8)),
    lambda p: np.save(p / "u.npy", (DELTA * 255).permute(1, 2, 0)[None].numpy()),
    lambda p: (p / "u.png").write_bytes(draw.encode_delta(DELTA)),
], ids=["plain", "batch of one, fp16", "in a dict", "0-255", "npy", "npy int8", "npy HWC", "png"])
def test_every_format_reads_as_the_same_perturbation(write, tmp_path):
    write(tmp_path)
    path = next(tmp_path.glob("u.*"))
    delta = uaps.read_uap(path, **READ).delta
    assert delta.shape == (3, 6, 7)
    assert delta.dtype == torch.float32
    assert torch.allclose(delta, DELTA, atol=2e-5)


def test_the_facts_decide_the_scale_if_the_values_are_ambiguous(tmp_path):
    save_pth(tmp_path / "u.pth", DELTA * 25.5)  # up to 1: on either scale
    with pytest.raises(UserError, match="--scale 1 or --scale 255"):
        uaps.read_uap(tmp_path / "u.pth", **READ)
    assert uaps.read_uap(tmp_path / "u.pth", scale="255", eps=1).largest == pytest.approx(1)
    save_json(tmp_path / "u.json", {"scale": 255})
    for scale in ("auto", "1", "255"):  # typed for other files
        found = uaps.read_uap(tmp_path / "u.pth", scale=scale, eps=10 / 255)
        assert found.largest == pytest.approx(1)


class Dangerous:
    def __reduce__(self):
        return (exec, ("open('executed', 'w')",))


def truncated(path, content):
    np.save(path, content)
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(("name", "write", "words"), [
    ("gone.pth", lambda p: None, "no such file"),
    ("gone.npy", lambda p: None, "no such file"),
    ("a.txt", lambda p: p.write_text("x"), "not a perturbation format"),
    ("a.pth", lambda p: p.write_bytes(b"PK\x03\x04 cut"), "truncated"),
    ("a.pth", lambda p: p.write_bytes(b""), "truncated"),
    ("a.npy", lambda p: truncated(p, DELTA.numpy()), "truncated"),
    ("a.png", lambda p: p.write_bytes(draw.encode_delta(DELTA)[:60]), "truncated"),
    ("a.pth", lambda p: torch.save(Dangerous(), p), "not executed"),
    ("a.npy", lambda p: np.save(p, np.array([Dangerous()]), allow_pickle=True), "more than num"),
    ("a.pth", lambda p: save_pth(p, torch.zeros(4, 6, 7)), "wanted (3, H, W)"),
    ("a.pth", lambda p: save_pth(p, torch.zeros(2, 3, 6, 7)), "wanted (3, H, W)"),
    ("a.pth", lambda p: save_pth(p, torch.full((3, 6, 7), math.nan)), "126 of 126 values are NaN"),
    ("a.pth", lambda p: save_pth(p, DELTA * 1.6), "over --eps 10/255; type --eps 16/255"),
    ("a.pth", lambda p: save_pth(p, {"a": DELTA, "b": DELTA}), "2 tensors"),
    ("a.pth", lambda p: save_pth(p, [DELTA]), "holds list"),
    ("a.npy", lambda p: np.save(p, np.full((3, 6, 7), 200, np.uint8)), "wanted signed"),
])
def test_a_bad_file_gives_one_clear_line_and_is_never_executed(name, write, words, tmp_path,
                                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(UserError) as refusal:
        uaps.read_uap(tmp_path / name, **READ)
    assert words in str(refusal.value)
    assert not (tmp_path / "executed").exists()


def test_a_bad_perturbation_stops_the_script_before_anything_is_measured(
        run_script, refused, tmp_path, deltas):
    torch.save(Dangerous(), tmp_path / "evil.pth")
    done = run_script("eval_uap.py", "--uaps", deltas["folder"] / "grid.pth", "evil.pth", *FEW)
    refused(done, "evil.pth", "not executed")
    assert "|" not in done.stdout
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (("--eps", "0.2"), "over --eps"),
    (("--model_name", "cnm"), "did you mean cnn"),
    (("--model_name", "vgg16"), "no network for digits data"),
    (("--data_dir", "digit"), "did you mean digits"),
    (("--uaps", "nowhere"), "not a perturbation format"),
    (("--uaps", "."), "no perturbation for digits images"),
    (("--weights", "a.pth"), "no file a.pth"),
    (("--weights", "V1", "V1", "V1"), "3 given for 1"),
    (("--image_size", "32"), "digits images are 28 pixels"),
])
def test_bad_flags_give_one_clear_line(flags, words, run_here, refused, deltas):
    refused(run_here("eval_uap.py", "--uaps", deltas["folder"] / "grid.pth", "--model_name",
                     "cnn", *FEW, *flags), words)


def test_another_size_is_refused_unless_resized_within_eps(run_here, refused, tmp_path, deltas):
    save_pth(tmp_path / "small.pth", torch.full((1, 14, 14), 0.25))
    flags = ("--uaps", "small.pth", "--model_name", "cnn", *FEW)
    refused(run_here("eval_uap.py", *flags), "14 x 14", "28 x 28", "--resize")
    assert run_here("eval_uap.py", *flags, "--resize").returncode == 0
    uap = uaps.read_uap(deltas["folder"] / "free.pth", scale="auto", eps=EPS)
    larger = uaps.fit_size(uap, 57, 1, EPS, True)
    assert larger.shape == (1, 57, 57)
    assert larger.abs().max() <= EPS


def test_a_folder_stands_for_its_perturbations_for_this_kind_of_data(tmp_path, deltas):
    for kind in ("digits", "imagenet"):
        (tmp_path / kind).mkdir()
        save_pth(tmp_path / kind / "sga.pth", deltas["grid"])
        save_pth(tmp_path / kind / "checkpoint.pth", {})
        save_json(tmp_path / kind / "sga.json", {"kind": kind, "scale": 1})
        (tmp_path / kind / "sga.png").write_bytes(b"")  # of the same run
    assert uaps.find_uaps([tmp_path], "digits") == [tmp_path / "digits" / "sga.pth"]
    (tmp_path / "ready").mkdir()
    (tmp_path / "ready" / "sga.png").write_bytes(draw.encode_delta(deltas["grid"]))
    save_json(tmp_path / "ready" / "sga.json", {"kind": "digits", "scale": 1})
    assert uaps.find_uaps([tmp_path / "ready"], "digits") == [tmp_path / "ready" / "sga.png"]
    for end in ("npy", "pt"):
        (tmp_path / end).mkdir()
        (tmp_path / end / f"other.{end}").write_bytes(b"")
        save_json(tmp_path / end / "other.json", {"kind": "digits", "scale": 1})
        assert uaps.find_uaps([tmp_path / end], "digits") == [tmp_path / end / f"other.{end}"]
    both = uaps.read_uaps([tmp_path / k / "sga.pth" for k in ("digits", "imagenet")],
                          scale="auto", eps=EPS)
    np.save(tmp_path / "digits" / "sga.npy", deltas["free"].numpy())
    same = uaps.read_uaps([tmp_path / "digits" / f"sga.{end}" for end in ("pth", "npy")],
                          scale="auto", eps=EPS)
    assert len({uap.name for uap in same}) == 2  # one folder and one stem, but two rows
    assert [uap.name for uap in both] == ["digits/sga", "imagenet/sga"]


@pytest.mark.parametrize(("made", "measured", "said"), [
    ((), (), "n: 6 (these are the images that u was made on);"),
    ((), ("--num_images", 4), "n: 4 (these are the images that u was made on);"),
    (("--num_images", 4), (), "n: 6 (some of these are the images that u was made on);")])
def test_a_perturbation_measured_on_its_training_images_is_reported_as_such(
        run_here, tmp_path, picture, made, measured, said):
    for k in range(2):
        for i in range(3):
            picture(tmp_path / "flat" / f"c{k}" / f"{i}.png", 32, 32, seed=3 * k + i)
            picture(tmp_path / "both/val" / f"c{k}" / f"{i}.png", 32, 32, seed=9 + 3 * k + i)
    where = ("--data_dir", "flat", "--model_name", "squeezenet1_1", "--weights", "random",
             "--device", "cpu", "--workers", 0)
    done = run_here("train_sga.py", *where, *made, "--image_size", 64, "--epochs", 1, "--save", "u")
    assert done.returncode == 0, done.stderr
    (tmp_path / "u.pth").write_bytes(next((tmp_path / "u").glob("sga*.pth")).read_bytes())
    (tmp_path / "u.json").write_bytes(next((tmp_path / "u").glob("sga*.json")).read_bytes())
    flags = (*where, *measured, "--image_size", 64, "--uaps", "u.pth", "--show", 0)
    assert said in run_here("eval_uap.py", *flags).stdout
    others = run_here("eval_uap.py", *flags, "--data_dir", "both")  # files of the same names
    assert others.returncode == 0 and "made on" not in others.stdout


def test_eval_net_says_that_a_perturbation_was_made_on_these_images(run_here, tmp_path):
    images = data.open_images("digits", split="test")
    for name, found in (("a", images.prepared(28, 20)), ("b", images.prepared(28, 20)),
                        ("c", images.prepared(28, 30).select(range(9)))):
        save_pth(tmp_path / f"{name}.pth", torch.zeros(1, 28, 28))
        save_json(tmp_path / f"{name}.json", {
            "kind": "digits", "scale": 1, "num_images": 20, "skipped": [], "data_dir": "digits",
            "images_sha256": found.sha256()})
    flags = ("--model_name", "mlp", "--num_images", 20, "--attacks", "none", "--device", "cpu",
             "--workers", 0, "--save", "t", "--uaps")
    first = run_here("eval_net.py", *flags, "c.pth")
    assert "n: 20 test images;" in first.stdout, first.stderr
    done = run_here("eval_net.py", *flags, "a.pth", "b.pth", "c.pth")  # into the same table
    assert "n: 20 test images (these are the images that a, b were made on);" in done.stdout


def made_with(name, **facts):
    return uaps.Uap(name, None, torch.zeros(1, 2, 2),
                    {"name": "sga_cnn", "method": "sga", "epochs": 20, **facts})


def test_only_runs_that_differ_only_in_the_seed_are_averaged():
    found = [made_with("a", seed=0), made_with("b", seed=1), made_with("again", seed=1),
             made_with("c", seed=0, epochs=80), made_with("d", seed=5, epochs=80),
             made_with("alone", seed=0, epochs=5), uaps.Uap("foreign", None, torch.zeros(1, 2, 2))]
    groups = report_uaps.same_but_seed(found)
    assert {label: [u.name for u in group] for label, group in groups.items()} == {
        "sga_cnn epochs=20": ["a", "again"], "sga_cnn epochs=80": ["c", "d"]}
    rows = [{"uap": name, "target": "t", "fooling_ratio": {"value": value}}
            for name, value in (("a", 0.5), ("again", 0.7), ("c", 0.2), ("d", 0.2))]
    table = report_uaps.seed_table(rows, groups, ["t"])
    assert "| sga_cnn epochs=20 | 2 | 60.0 ± 14.1 |" in table  # sqrt(2 * 10^2 / (2 - 1))
    assert "| sga_cnn epochs=80 | 2 | 20.0 ± 0.0 |" in table


def test_runs_on_different_layers_are_not_averaged_as_seeds():
    found = [made_with(f"{layer}{seed}", seed=seed, layers=[layer]) for layer in "ab"
             for seed in (0, 1)]
    found += [made_with("c", seed=2, layers=["c"]), made_with("older", seed=3)]
    groups = report_uaps.same_but_seed(found)
    assert {label: [u.name for u in group] for label, group in groups.items()} == {
        "sga_cnn layers=['a']": ["a0", "a1"], "sga_cnn layers=['b']": ["b0", "b1"]}


def test_a_network_that_cannot_take_the_size_gives_one_clear_line(run_here, refused, tmp_path,
                                                               picture):
    picture(tmp_path / "val" / "n01440764" / "0.jpg")
    save_pth(tmp_path / "u.pth", torch.full((3, 16, 16), 2 / 255))
    refused(run_here("eval_uap.py", "--uaps", "u.pth", "--data_dir", "val", "--workers", 0,
                     "--model_name", "squeezenet1_1", "--weights", "random", "--image_size", 16),
            "--image_size 16", "squeezenet1_1 cannot take")
