"""utils/draw.py and figures.py: pictures from files on disk, and the intervals in them."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import figures
from utils import draw
from utils.augment import FAMILIES, OPS
from utils.measure import share, wilson

TARGETS = ("cnn", "mlp")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def size_of(png):
    with Image.open(io.BytesIO(png)) as image:
        return image.size


# ------------------------------------------------------------- perturbations as PNG

@pytest.mark.parametrize("shape", [(3, 8, 9), (1, 8, 9)])
@pytest.mark.parametrize("eps", [1, 4, 10, 76, 127])
def test_a_perturbation_on_the_grid_survives_its_png(tmp_path, shape, eps):
    steps = torch.randint(-eps, eps + 1, shape, generator=seeded(eps))
    steps.view(-1)[:2] = torch.tensor([-eps, eps])
    path = tmp_path / "delta.png"
    path.write_bytes(draw.encode_delta(steps / 255))
    delta, ours = draw.decode_delta(path)
    assert ours
    torch.testing.assert_close(delta, steps / 255, rtol=0, atol=1e-6)


def test_a_grey_level_of_a_foreign_png_is_one_step(tmp_path):
    grey = np.array([[128, 118], [138, 129]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "other.png")
    delta, ours = draw.decode_delta(tmp_path / "other.png")
    assert not ours and torch.allclose(255 * delta, torch.tensor([[[0., -10], [10, 1]]]))


# ------------------------------------------------------------------------ corruptions

def accuracies(clean, other, n=200):
    return {"clean": share(clean, n), **{name: share(other, n) for name in OPS}}


def test_a_family_has_the_mean_of_its_operations_and_the_interval_of_its_images():
    found = accuracies(180, 100)
    found["rain"], found["jpeg"] = share(150, 200), share(160, 200)
    means = draw.family_accuracies(found)
    assert list(means) == ["clean", *FAMILIES, "all 34"]
    assert means["clean"] == found["clean"] and means["noise"] == share(100, 200)
    assert means["weather"]["value"] == pytest.approx((4 * 100 + 150) / 5 / 200)
    assert (means["weather"]["low"], means["weather"]["high"]) == pytest.approx(wilson(110, 200))
    assert means["all 34"]["value"] == pytest.approx((32 * 100 + 150 + 160) / 34 / 200)


def test_the_interval_of_a_difference_is_the_one_in_newcombes_paper():
    """Newcombe 1998, Table II (a): 56 of 70 against 48 of 80, method 10."""
    found = draw._difference(share(56, 70), share(48, 80))
    assert found == pytest.approx((20.0, 5.24, 33.39), abs=0.005)


def test_corruptions_are_drawn_for_one_network_and_for_several():
    runs = {"plain": accuracies(190, 90), "one": accuracies(180, 120), "two": accuracies(180, 130)}
    one = size_of(draw.corruptions({"plain": runs["plain"]}))
    assert one[1] < size_of(draw.corruptions(runs, "title"))[1]
    assert size_of(draw.corruptions(runs, "title", minus_first=True))[0] == one[0]
    measured = {"plain": {"clean": share(3, 4)}}  # without --corruptions there is nothing else
    assert size_of(draw.corruptions(measured))


@pytest.mark.parametrize("name", ["$_$", "$"])
def test_dollar_signs_in_names_are_not_read_as_formulas(name):
    assert size_of(draw.heatmap([[0.1, 0.9]] * 2, [name, "b"], [name, "b"]))
    assert size_of(draw.curves([{"epoch": 1, "loss": 1.0, "fooling_ratio": 0.5}], name))


# ------------------------------------------------------------------------ figures.py

def drew(done, path):
    assert done.returncode == 0, done.stderr
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


@pytest.fixture
def evaluated(tmp_path):
    """What eval_uap.py writes: two perturbations on two networks, and three examples."""
    folder = tmp_path / "eval"
    folder.mkdir()
    deltas = {name: 0.2 * torch.randn(1, 28, 28, generator=seeded(k)).sign()
              for k, name in enumerate(("sga_cnn", "spgd_cnn"))}
    for name, delta in deltas.items():
        torch.save(delta, folder / f"{name}.pth")
    (folder / "results.json").write_text(json.dumps({
        "uaps": {name: {"path": str(folder / f"{name}.pth"), "scale": "auto"} for name in deltas},
        "rows": [{"uap": name, "target": target, "n": 50, "fooling_ratio": share(30, 50)}
                 for name in deltas for target in TARGETS]}))
    x = torch.rand(3, 1, 28, 28, generator=seeded())
    np.savez(folder / "examples.npz", x=x, x_adv=(x + deltas["sga_cnn"]).clamp(0, 1),
             delta=deltas["sga_cnn"], before=["3", "4", "5"], after=["8", "4", "8"],
             target="cnn", uap="sga_cnn", networks=["cnn", "mlp"], clean=[["3", "4", "5"]] * 2,
             seen=[["8", "4", "8"], ["3", "4", "1"]])
    return folder


def test_perturbations_are_drawn_with_their_fooling_ratios(run_here, refused, evaluated, tmp_path):
    plain = drew(run_here("figures.py", "--uaps", evaluated, "--rows", "sga_cnn:SGA", "--out",
                          "a.png"), tmp_path / "a.png")
    both = drew(run_here("figures.py", "--results", evaluated, "--examples", evaluated, "--credit",
                         "by nobody"), tmp_path / "imgs" / "uaps.png")
    assert both[0] > plain[0]
    refused(run_here("figures.py", "--uaps", evaluated, "--rows", "fgsm"), "--rows fgsm", "sga_cnn")
    refused(run_here("figures.py"), "runs/eval", "eval_uap.py")


def test_fooling_ratios_are_drawn_over_gradients_or_images(run_here, refused, tmp_path):
    facts = {f"sga_{seed}_{gradients}": {"model_name": ["cnn"], "gradients": gradients,
                                         "num_images": 10}
             for seed in (0, 1) for gradients in (100, 1000)}
    (tmp_path / "results.json").write_text(json.dumps({
        "protocol": {"targets": dict.fromkeys(TARGETS, "V1")},
        "uaps": {name: {"facts": of} for name, of in facts.items()} | {"signs": {"facts": {}}},
        "rows": [{"uap": name, "target": target, "fooling_ratio": share(30, 50)}
                 for name in (*facts, "signs") for target in TARGETS]}))
    flags = ("--curves", tmp_path, "--rows")
    drew(run_here("figures.py", *flags, "sga_*:SGA"), tmp_path / "imgs" / "uap_gradients.png")
    drew(run_here("figures.py", *flags, "sga_0_*", "sga_1_*", "--over", "num_images", "--out",
                  "b.png"), tmp_path / "b.png")
    refused(run_here("figures.py", *flags, "spgd_*:SPGD"), "--rows spgd_*", "sga_0_100")
    refused(run_here("figures.py", "--curves", tmp_path), "signs has no facts")


@pytest.mark.parametrize(("facts", "made"), [
    ({"model_name": ["timm/a.b"], "weights": ["V1"]}, True),
    ({"model_name": ["timm/a.b"], "weights": ["random"]}, False),
    ({"model_name": ["b"], "weights": ["V1"]}, False),
    ({"model_name": ["mlp"], "weights": ["V1"], "on_training_images": {"a.b": {}}}, True)])
def test_a_curve_is_solid_for_the_network_and_weights_that_it_was_made_on(facts, made):
    assert figures._made_on("a.b", facts, {"a.b": "V1"}) == made


@pytest.mark.parametrize(("flags", "words"), [
    (("--w_sweep", "x", "--rows", "a"), "--rows --w_sweep"),
    (("--examples", "x", "--credit", "me"), "--credit --examples"),
    (("--curves", "x", "--image", "a.png"), "--image --curves")])
def test_a_flag_of_another_picture_is_refused(run_here, refused, flags, words):
    refused(run_here("figures.py", *flags), words)


def test_examples_are_drawn_from_their_file(run_here, refused, evaluated, tmp_path):
    drew(run_here("figures.py", "--examples", evaluated), tmp_path / "imgs" / "digits.png")
    refused(run_here("figures.py", "--examples", tmp_path), "examples.npz", "eval_uap.py")


def test_a_sweep_is_drawn_from_its_csv(run_here, refused, tmp_path):
    lines = [f"cnn,{attacker},{w},1e-8,0.5,0.4,0.6,100"
             for attacker in ("naive", "adaptive") for w in (1e2, 1e8, 1e20)]
    (tmp_path / "w_sweep.csv").write_text("\n".join([
        "model,attacker,w,epsilon,attack_robustness,attack_robustness_low,attack_robustness_high,"
        "attack_robustness_n", *lines]))
    drew(run_here("figures.py", "--w_sweep", tmp_path), tmp_path / "imgs" / "gcm_w.png")
    refused(run_here("figures.py", "--w_sweep", tmp_path / "no"), "no w_sweep.csv", "gcm.py")


def test_tables_whose_lines_would_coincide_are_refused(run_here, refused, tmp_path):
    """For example a network and the same one behind a defence, which share a name."""
    for name, head, row in (
            ("w_sweep", "model,attacker,w,epsilon,attack_robustness,attack_robustness_low,"
             "attack_robustness_high,attack_robustness_n", "cnn,naive,1,1e-8,0.5,0.4,0.6,100"),
            ("curve", "network,attacker,eps,value,k,n,low,high", "cnn,naive,0,1,5,5,0,1")):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.csv").write_text(f"{head}\n{row}\n")
    for flag in ("--eps_curves", "--w_sweep"):
        refused(run_here("figures.py", flag, "a", "b"), flag, "two pictures")


def test_curves_without_fab_are_drawn():
    """FAB is not run behind a random defence."""
    rows = [{"network": "cnn", "attacker": f"APGD-CE, {name}", "eps": eps, "value": 0.5, "low": 0.4,
             "high": 0.6, "n": 10} for name in ("adaptive", "naive") for eps in (0, 0.1)]
    assert draw.eps_curves(rows).startswith(b"\x89PNG")


def test_curves_over_the_radius_from_several_tables_share_one_picture(run_here, refused, tmp_path,
                                                                      monkeypatch):
    head = "network,attacker,eps,value,k,n,low,high"
    for name, attackers in (("plain", ("APGD-CE, adaptive", "FAB, adaptive")),
                            ("small", ("APGD-CE, naive", "FAB, adaptive"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curve.csv").write_text("\n".join([head, *(
            f'{name},"{attacker}",{eps},{1 - eps},5,10,0,1'
            for attacker in attackers for eps in (0, 0.5))]))
    shown = []
    folders = [tmp_path / "plain", tmp_path / "small"]
    with monkeypatch.context() as patch:
        patch.setattr(draw, "eps_curves", lambda rows: shown.extend(rows) or b"")
        figures.eps_curves_picture(SimpleNamespace(eps_curves=folders, rows=["small:GCM", "plain"]))
    assert [row["network"] for row in shown] == 4 * ["GCM"] + 4 * ["plain"]
    assert {row["attacker"] for row in shown[:4]} == {"APGD-CE, naive", "FAB, adaptive"}
    drew(run_here("figures.py", "--eps_curves", *folders), tmp_path / "imgs" / "eps_curves.png")
    refused(run_here("figures.py", "--eps_curves", tmp_path), "no curve.csv", "eval_net.py")
    refused(run_here("figures.py", "--eps_curves", *folders, "--rows", "other"), "--rows other")
    (tmp_path / "curve.csv").write_text("a,b\n1,2\n")
    refused(run_here("figures.py", "--eps_curves", tmp_path), "--eps_curves", "eval_net.py")


def test_corruptions_are_compared_with_the_first_network(run_here, refused, tmp_path):
    cell = {"n": 50, "right": dict.fromkeys(("clean", *OPS), 40)}
    (tmp_path / "results.json").write_text(json.dumps({
        "settings": {"data": "digits", "n": 50},
        "cells": {"plain | corruptions": cell, "plain | clean": {},
                  "stage1 | corruptions": cell}}))
    flags = ("--corruptions", tmp_path, "--rows")
    drew(run_here("figures.py", *flags, "plain", "stage1:augmented"),
         tmp_path / "imgs" / "challenge.png")
    refused(run_here("figures.py", *flags, "plain"), "two or more")
    refused(run_here("figures.py", *flags, "plain", "stage2"), "stage2", "plain, stage1")


def exercise_run(folder, images):
    """What fgsm_mnist.py writes, with these examples (n, 1, 28, 28)."""
    folder.mkdir()
    np.savez(folder / "examples.npz", x=np.stack([images] * 3), y=np.arange(len(images)),
             seen=np.stack([np.arange(len(images)), *[np.ones(len(images), int)] * 2]))
    (folder / "results.json").write_text(json.dumps({
        "facts": {"variation": folder.name},
        "seeds": [{name: share(5, 10) for name in ("fgs", "fgv")}]}))


def test_the_exercise_shows_images_that_all_networks_classify_correctly(
        run_here, refused, tmp_path):
    images = torch.rand(6, 1, 28, 28, generator=seeded()).numpy()
    exercise_run(tmp_path / "clean", images[:4])
    exercise_run(tmp_path / "fgs", images[2:])
    exercise_run(tmp_path / "fgv", images[4:])
    two = drew(run_here("figures.py", "--exercise", "clean", "fgs"),
               tmp_path / "imgs" / "mnist_examples.png")
    one = drew(run_here("figures.py", "--exercise", "clean", "--out", "b.png"), tmp_path / "b.png")
    assert two[0] < one[0] and two[1] > one[1]  # two images instead of four, five rows for three
    refused(run_here("figures.py", "--exercise", "clean", "fgv"), "no example is right for all")
    refused(run_here("figures.py", "--exercise", "nowhere"), "fgsm_mnist.py")


def test_every_operation_is_drawn_in_seven_columns(run_here, refused, picture, tmp_path):
    size = drew(run_here("figures.py", "--augmentations", "--image_size", 24),
                tmp_path / "imgs" / "augment.png")
    assert size == (7 * 180, 5 * 204)  # the original and 34 operations fill five rows
    picture(tmp_path / "photo.jpg", 60, 40)
    drew(run_here("figures.py", "--augmentations", "--image", "photo.jpg", "--image_size", 24,
                  "--out", "b.png"), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "imgs/augment.png").read_bytes()
    refused(run_here("figures.py", "--augmentations", "--image", "nowhere.png"), "nowhere.png")


def test_only_one_picture_is_drawn_at_a_time(run_here, refused, evaluated):
    refused(run_here("figures.py", "--augmentations", "--uaps", evaluated), "one picture at a time")


# ------------------------------------------------------------- files of something else

def test_damaged_files_and_files_of_another_script_give_one_line(run_here, refused, evaluated,
                                                                 tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for text in ('{"settings": {}, "cells": {}}', "[]", '{"uaps": [], "rows": 3}', "{"):
        (other / "results.json").write_text(text)
        for flag in ("--uaps", "--exercise", "--corruptions", "--curves"):
            refused(run_here("figures.py", flag, other), "other")
    refused(run_here("figures.py", "--corruptions", evaluated), "--corruptions", "eval_net.py")
    for text in ("", "model,attacker,w,epsilon\n"):
        (other / "w_sweep.csv").write_text(text)
        refused(run_here("figures.py", "--w_sweep", other), "no rows", "gcm.py")
    (other / "w_sweep.csv").write_text("a,b\n1,2\n")
    refused(run_here("figures.py", "--w_sweep", other), "--w_sweep", "gcm.py")
    np.savez(tmp_path / "short.npz", x=np.zeros(3))
    for content in (b"", b"junk", b"PK\x03\x04junk", (tmp_path / "short.npz").read_bytes()):
        (evaluated / "examples.npz").write_bytes(content)
        refused(run_here("figures.py", "--examples", evaluated), "examples.npz", "eval_uap.py")
    assert not (tmp_path / "imgs").exists()


def test_the_corruption_figure_names_its_n_and_both_networks(run_here, monkeypatch, tmp_path):
    cell = {"n": 48, "right": dict.fromkeys(("clean", *OPS), 40)}
    (tmp_path / "results.json").write_text(json.dumps({
        "settings": {"data": "digits", "n": 50},
        "cells": {"plain | corruptions": cell, "stage1 | corruptions": cell}}))
    shown = []
    monkeypatch.setattr(draw, "_png", lambda figure: shown.append(figure.axes[0]) or b"")
    flags = ("--corruptions", tmp_path, "--rows", "plain", "stage1:augmented")
    assert run_here("figures.py", *flags).returncode == 0
    assert shown[0].get_title() == "digits, n=48 test images"
    assert shown[0].get_xlabel() == (
        "gain in accuracy of augmented over plain, points (95 % intervals)")
