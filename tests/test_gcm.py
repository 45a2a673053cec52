"""gcm.py and gen_gcm_eval.sh: table, audit, sweep, resuming; defences in the UAP scripts."""

import csv
import gc
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SRC

from attacks import fgsm
from utils import data, measure, models, report_gcm, run
from utils.attack import several
from utils.cells import Progress
from utils.data import paper_geometry
from utils.halving import Halving
from utils.precision import Fast
from utils.run import save_pth

FEW = ("--model_name", "mlp", "--num_images", 30, "--device", "cpu")
COLUMNS = ("fgsm", "pgd_linf")
SHORT = (*FEW, "--attacks", *COLUMNS)


def saved(folder):
    return json.loads((folder / "results.json").read_text())


def plain(folder):
    """The cells without the fields that differ between equal runs."""
    return {key: {k: v for k, v in cell.items() if k not in ("seconds", "commit")}
            for key, cell in saved(folder)["cells"].items()}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of one whole table, made by the shell script, and what it printed."""
    folder = tmp_path_factory.mktemp("gcm")
    done = subprocess.run(
        ["sh", str(SRC / "gen_gcm_eval.sh"), "--num_images", "30", "--device", "cpu"], cwd=folder,
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "MODELS": "mlp"})
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "gcm", done.stdout


# ------------------------------------------------------------------- the table

@pytest.mark.slow
def test_the_table_has_a_row_for_every_attacker_and_a_column_for_every_attack(made):
    folder, said = made
    lines = [line for line in said.splitlines() if line.startswith("| mlp")]
    assert [line.split(" | ")[1] for line in lines] == [
        "vanilla", "gcm, naive attacker", "gcm, adaptive attacker (BPDA)"]
    head = next(line for line in said.splitlines() if line.startswith("| network"))
    assert [title.split()[0] for title in head.split(" | ")[3:-1]] == [
        "FGSM", "PGD", "PGD", "PGD", "C&W", "worst"]
    assert "Protocol: data: digits; n: 30;" in said and "20 steps of 3/40 eps" in said
    assert said.count("Protocol: ") == 1
    assert (folder / "results.md").read_text().count("\n| mlp") == 3
    assert len(rows(folder / "results.csv")) == 3 * 6
    assert said.endswith(f"saved {os.path.join('runs', 'gcm')}/results.json (and .csv, .md)\n")


@pytest.mark.slow
def test_an_adaptive_attacker_does_as_well_as_without_the_layer_and_a_naive_one_far_worse(made):
    right = {"none naive": 0, "gcm naive": 0, "gcm adaptive": 0}
    cells = plain(made[0])
    for cell in cells.values():
        right[f"{cell['defense']} {cell['attacker']}"] += sum(cell["after"])
    assert len(cells) == 15
    assert abs(right["gcm adaptive"] - right["none naive"]) <= 2
    assert right["gcm naive"] > right["none naive"] + 60


@pytest.mark.slow
def test_the_figures_in_the_files_equal_those_of_the_cells_counted_by_hand(made):
    cells = saved(made[0])["cells"]
    names = {"vanilla": "none naive", "gcm, naive attacker": "gcm naive"}
    checked = 0
    for row in rows(made[0] / "results.csv"):
        own = {cell["attack"]: cell for cell in cells.values()
               if f"{cell['defense']} {cell['attacker']}" == names.get(row["row"])}
        if not own:
            continue
        used = own.values() if row["attack"] == "worst case" else [own[row["attack"]]]
        before = next(iter(used))["before"]
        after = [min(each) for each in zip(*(cell["after"] for cell in used), strict=True)]
        both = sum(b and a for b, a in zip(before, after, strict=True))
        assert float(row["robust_acc"]) == pytest.approx(both / 30)
        assert float(row["attack_robustness"]) == pytest.approx(both / sum(before))
        assert float(row["clean_acc"]) == pytest.approx(sum(before) / 30)
        checked += 1
    assert checked == 12


@pytest.mark.slow
def test_a_naive_attackers_loss_is_kept_for_pgd_in_linf_only(made):
    followed = {key for key, cell in plain(made[0]).items() if "losses" in cell}
    assert followed == {"mlp none naive pgd_linf", "mlp gcm w=1e+20 epsilon=1e-08 naive pgd_linf"}
    cells = plain(made[0])
    assert {len(cells[key]["losses"]) for key in followed} == {20}


def test_the_other_metric_is_shown_on_request_and_nothing_is_attacked_again(
        made, run_here, monkeypatch):
    monkeypatch.setattr(measure, "run_cell", None)
    done = run_here("gcm.py", *FEW, "--results", made[0], "--metric", "robust_acc")
    assert done.returncode == 0, done.stderr
    assert "robust_acc, % (95 % Wilson interval)" in done.stdout
    assert done.stdout.count("| mlp | ") == 3


def test_the_strongest_attack_is_a_column_that_names_its_members(run_here, tmp_path):
    done = run_here("gcm.py", *FEW, "--num_images", 10, "--attacks", "apgd", "strongest_quick",
                    "--queries", 20, "--defense", "none")
    assert done.returncode == 0, done.stderr
    assert " | APGD Linf 51/255 | APGD-CE + APGD-T + Square 20 Linf 51/255 | " in done.stdout
    cells = saved(tmp_path / "runs" / "gcm")["cells"]
    weak, strong = (cells[f"mlp none naive {name}"] for name in ("apgd", "strongest 20"))
    assert all(s <= w for s, w in zip(strong["after"], weak["after"], strict=True))


def test_each_attack_has_the_radius_of_its_norm_and_square_names_its_queries(run_here, tmp_path):
    done = run_here("gcm.py", *FEW, "--num_images", 10, "--attacks", "fgsm", "pgd_l1", "pgd_l2",
                    "cw_pgd_l2", "square", "--queries", 7, "--eps", 0.1, "--eps_l2", 1.5,
                    "--eps_l1", "25/2", "--defense", "none")
    assert done.returncode == 0, done.stderr
    assert (" | FGSM Linf 25.5/255 | PGD L1=12.5 | PGD L2=1.5 | C&W L2=1.5 | Square 7 Linf 25.5/255"
            " | ") in done.stdout
    eps = {"linf": 0.1, "l2": 1.5, "l1": 12.5}
    cells = saved(tmp_path / "runs" / "gcm")["cells"]
    assert [cell["norm"] for cell in cells.values()] == ["linf", "l1", "l2", "l2", "linf"]
    assert "mlp none naive square 7" in cells
    for cell in cells.values():  # what is scaled to the ball and then clipped is a little nearer
        assert cell["eps"] == eps[cell["norm"]] == pytest.approx(cell["largest"], rel=0.01)
        assert cell["outside"] == 0


def test_images_made_with_bf16_gradients_are_measured_in_float32(run_here, tmp_path, monkeypatch):
    measured, real = [], measure.count_right

    def watched(model, x, y, draws, chance):
        right = real(model, x, y, draws, chance)
        measured.append((model(x), x, y, right))
        return right
    monkeypatch.setattr(measure, "count_right", watched)
    done = run_here("gcm.py", *FEW, "--attacks", "fgsm", "--defense", "none", "--amp", "bf16")
    assert "; gradients: bf16; measured in: float32;" in done.stdout, done.stderr
    (_, x, y, _), (logits, x_adv, y_adv, right) = measured
    model = models.load_model("mlp", kind="digits", data_dir="digits")
    assert torch.equal(logits, model(x_adv))
    assert not torch.equal(logits, Fast(model, "bf16", "channels_last")(x_adv))
    cell, = saved(tmp_path / "runs" / "gcm")["cells"].values()
    before = torch.tensor(cell["before"])
    assert before.tolist() == (model(x).argmax(1) == y).long().tolist()
    assert torch.tensor(cell["after"])[before > 0].tolist() == right.tolist() == (
        model(x_adv).argmax(1) == y_adv).long().tolist()
    with torch.no_grad():
        exact = fgsm(model, x[before > 0], y_adv, eps=cell["eps"])
    assert not torch.equal(exact, x_adv)  # the gradients were not in float32


def test_the_table_says_what_autoattack_did_in_every_row_and_what_looks_wrong(
        run_here, monkeypatch, tmp_path):
    monkeypatch.setattr(several, "QUERIES", 40)
    for name in ("apgd", "fab"):
        monkeypatch.setattr(several, name, partial(getattr(several, name), steps=4))
    done = run_here("gcm.py", *FEW, "--attacks", "autoattack")
    assert done.returncode == 0, done.stderr
    text = done.stdout.split("\nAutoAttack, images\n\n")[1]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["network", "row", "attack", "tried", "fooled", "zero gradient",
                        "loss never rose"]
    members = ["APGD-CE", "APGD-T", "FAB-T", "Square 40"]
    labels = ("vanilla", "gcm, naive attacker", "gcm, adaptive attacker (BPDA)")
    assert [line[:3] for line in lines[2:]] == [["mlp", row, name] for row in labels
                                                for name in members]
    tables = saved(tmp_path / "runs" / "gcm")["cells"].values()
    assert [line[3:5] for line in lines[2:]] == [
        [str(cell["parts"][name][key]) for key in ("tried", "fooled")] for cell in tables
        for name in members]
    flags = [line for line in text.splitlines() if line.startswith("mlp, ")]
    assert flags and all(line.startswith("mlp, gcm, naive attacker: Square fooled ")
                         and line.endswith("they may be masked") for line in flags)
    assert text.rpartition("saved ")[0] in (tmp_path / "runs" / "gcm" / "results.md").read_text()


# ------------------------------------------------------------- the paper's rows, geometry

EPS = {"fgsm": ("linf", 8 / 255), "pgd_l2": ("l2", 8.0), "square": ("linf", 8 / 255)}


def paper_rows(network="resnet50", size=224, kind="imagenet", eps=EPS, **settings):
    """The paper's rows beside cells of these attacks, and why figures are left out."""
    target = SimpleNamespace(name=network, geometry=paper_geometry(size))
    s = SimpleNamespace(**{"kind": kind, "amp": "off", "stop_early": False, "w": 1e20,
                           "epsilon": 1e-8, **settings})
    cells = {name: {"norm": norm, "eps": value} for name, (norm, value) in eps.items()}
    lines, reasons = report_gcm.paper_rows(target, cells, s)
    return [line[2:6] for line in lines], "; ".join(reasons)


def test_the_papers_rows_are_shown_beside_cells_of_the_same_attack_and_size():
    assert paper_rows() == ([["77.89", "31.77", "0.01", "-"], ["78.57", "95.18", "94.41", "-"]], "")
    assert paper_rows("vgg16") == ([], "")


@pytest.mark.parametrize(("changed", "vanilla", "gcm", "reason"), [
    ({"size": 380}, "----", "----", "centre crop 380 instead of"),
    ({"kind": "folder"}, "----", "----", "other classes"),
    ({"eps": EPS | {"pgd_l2": ("l2", 4.0)}}, "++--", "++--", "L2 eps 4 instead of 8"),
    ({"eps": EPS | {"fgsm": ("linf", 4 / 255)}}, "+-+-", "+-+-", "Linf eps 4/255 instead of 8/255"),
    ({"stop_early": True}, "++--", "++--", "fooled images leave PGD"),
    ({"amp": "bf16"}, "+---", "+---", "bf16"),
    ({"w": 1e6}, "+++-", "+---", "w=1e+06"), ({"epsilon": 1e-3}, "+++-", "+---", "epsilon=0.001")],
    ids=str)
def test_the_papers_figures_are_left_out_beside_another_measurement(changed, vanilla, gcm, reason):
    lines, why = paper_rows(**changed)
    assert ["".join("-" if cell == "-" else "+" for cell in line) for line in lines] \
        == [vanilla, gcm]
    assert reason in why


@pytest.fixture
def photographs(tmp_path, picture, monkeypatch):
    """Flags for two photographs; every torchvision network is replaced by a tiny one.

    It predicts class 0 for every image, which is right for both photographs.
    """
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(3, 1000)
            torch.nn.init.zeros_(self.out.bias)
            torch.nn.init.zeros_(self.out.weight)
            self.out.weight.data[0] = 1.0

        def forward(self, x):
            return self.out(x.mean((2, 3)) + 2.2)

    for i in range(2):
        picture(tmp_path / "val" / "n01440764" / f"{i}.jpg", 431, 500, seed=i)
    monkeypatch.setattr("torchvision.models.get_model", lambda name, **options: Tiny())
    return ("--data_dir", tmp_path / "val", "--weights", "random", "--device", "cpu", "--workers",
            0, "--model_name")


ONE = ("--attacks", "fgsm", "pgd_l2", "--save", "t")


def test_efficientnet_b4_takes_224_pixels_beside_the_papers_rows(run_here, photographs, tmp_path):
    done = run_here("gcm.py", *photographs, "efficientnet_b4", *ONE)
    assert done.returncode == 0, done.stderr
    network = saved(tmp_path / "t")["settings"]["network efficientnet_b4"]
    assert network == {"size": 224, "eps": {"linf": 8 / 255, "l2": 8.0, "l1": 1600.0},
                       "weights": "random"}
    assert "geometry: shorter side to 256 (bilinear), centre crop 224;" in done.stdout
    assert "| efficientnet_b4 | paper: vanilla | 71.52 | 1.23 | 0.28 | - | - |" in done.stdout
    assert "paper: '-'" not in done.stdout


def test_a_network_at_the_size_of_its_weights_has_no_figures_of_the_paper_beside_it(
        run_here, photographs, tmp_path):
    done = run_here("gcm.py", *photographs, "efficientnet_b4", "resnet50", *ONE, "--geometry",
                    "weights")
    assert done.returncode == 0, done.stderr
    there = saved(tmp_path / "t")["settings"]
    network = there["network efficientnet_b4"]
    assert network["geometry"] == "shorter side to 384 (bicubic), centre crop 380"
    assert network["size"] == 380 and network["eps"] == pytest.approx(
        {"linf": 8 / 255, "l2": 8 * 380 / 224, "l1": 1600 * (380 / 224) ** 2})
    assert "geometry" not in there["network resnet50"]  # the same under both
    assert "| PGD L2=13.57 / PGD L2=8 |" in done.stdout
    assert "| efficientnet_b4 | paper: GCM | - | - | - | - | - |" in done.stdout
    assert "| resnet50 | paper: GCM | 78.57 | 95.18 | 94.41 | - | - |" in done.stdout
    assert ("paper: '-' where it measured something else: efficientnet_b4: shorter side to 384 "
            "(bicubic), centre crop 380 instead of shorter side to 256 (bilinear), centre crop "
            "224\n") in done.stdout


def test_image_size_applies_to_all_networks(run_here, photographs, tmp_path):
    done = run_here("gcm.py", *photographs, "efficientnet_b4", "resnet50", *ONE, "--image_size", 96)
    assert done.returncode == 0, done.stderr
    there = saved(tmp_path / "t")["settings"]
    for name in ("efficientnet_b4", "resnet50"):
        assert there[f"network {name}"]["size"] == 96
        assert there[f"network {name}"]["eps"]["l2"] == pytest.approx(8 * 96 / 224)
    assert "geometry: shorter side to 110 (bilinear), centre crop 96;" in done.stdout


def test_images_are_decoded_once_per_geometry(run_here, photographs, monkeypatch):
    decoded, real = [], data.decode
    monkeypatch.setattr("utils.images.decode", lambda path, g: decoded.append(g) or real(path, g))
    flags = ("resnet50", "wide_resnet50_2", "swin_s", *ONE, "--geometry", "weights")
    assert run_here("gcm.py", *photographs, *flags).returncode == 0
    assert decoded == 2 * [data.Geometry(224, 256)] + 2 * [data.Geometry(224, 246, "bicubic")]


@pytest.mark.parametrize("script", ["gcm.py", "eval_net.py"])
def test_cells_of_one_geometry_are_never_taken_for_those_of_another(
        run_here, refused, photographs, tmp_path, script):
    flags = (*photographs, "swin_s", "--attacks", "fgsm", "--save", "t")
    assert run_here(script, *flags).returncode == 0
    before = (tmp_path / "t" / "results.json").read_bytes()
    refused(run_here(script, *flags, "--geometry", "weights"), "network swin_s",
            "shorter side to 246 (bicubic)", "choose another folder")
    assert (tmp_path / "t" / "results.json").read_bytes() == before


def test_a_table_made_before_geometry_was_a_flag_is_continued_or_refused(
        run_here, refused, photographs, tmp_path):
    flags = (*photographs, "resnet50", *ONE)
    assert run_here("gcm.py", *flags).returncode == 0
    state = saved(tmp_path / "t")
    state["settings"]["network efficientnet_b4"] = {  # as gcm.py wrote it then
        **state["settings"]["network resnet50"], "size": 380}
    (tmp_path / "t" / "results.json").write_text(json.dumps(state))
    refused(run_here("gcm.py", *photographs, "efficientnet_b4", *ONE), "'size': 380",
            "choose another folder")
    refused(run_here("gcm.py", *photographs, "efficientnet_b4", *ONE, "--image_size", 380),
            "'l2': 8.0", "choose another folder")
    assert run_here("gcm.py", *flags).returncode == 0
    assert saved(tmp_path / "t") == state


def test_a_perturbation_of_224_pixels_is_measured_on_every_network(run_here, photographs, tmp_path):
    save_pth(tmp_path / "u.pth", torch.full((3, 224, 224), 10 / 255))
    flags = (*photographs, "efficientnet_b4", "inception_v3", "--uaps", "u.pth", "--save", "e")
    for more, words in (((), "shorter side to 256 (bilinear), centre crop 224"),
                        (("--geometry", "weights", "--resize"), "efficientnet_b4 shorter side to")):
        done = run_here("eval_uap.py", *flags, *more)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout and words in saved(tmp_path / "e")["protocol"]["geometry"]
    assert saved(tmp_path / "e")["protocol"]["sizes"] == [299, 380]


def test_variables_of_the_shell_script_become_flags(tmp_path):
    """Python is replaced by a script that prints its arguments."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$@"\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["sh", str(SRC / "gen_gcm_eval.sh"), "--audit"], cwd=tmp_path, capture_output=True,
        text=True, check=True, env={**os.environ, "PYTHON": str(stub), "DATA": "mnist",
                                    "MODELS": "mlp cnn", "DEFENSE": "resizepad"})
    assert done.stdout.split()[1:] == ["--data_dir", "mnist", "--defense", "resizepad",
                                       "--model_name", "mlp", "cnn", "--audit"]


# -------------------------------------------------------------------- resuming

class Killed(BaseException):
    """Stands for SIGKILL: the script must not catch it."""


def test_a_killed_and_resumed_table_equals_the_uninterrupted_one(made, run_here, tmp_path,
                                                                 monkeypatch):
    real = measure.run_cell
    for at in (0, 1, 4):
        done = []

        def killing(*args, at=at, done=done, **more):
            if len(done) == at:
                raise Killed
            done.append(more["desc"])
            return real(*args, **more)
        flags = (*SHORT, "--save", f"killed{at}")
        with monkeypatch.context() as patch:
            patch.setattr(measure, "run_cell", killing)
            with pytest.raises(Killed):
                run_here("gcm.py", *flags)
        gc.collect()
        again = []
        with monkeypatch.context() as patch:
            patch.setattr(measure, "run_cell",
                          lambda *a, again=again, **k: again.append(k["desc"]) or real(*a, **k))
            assert run_here("gcm.py", *flags).returncode == 0
        assert len(again) == 6 - at and not set(again) & set(done)
        whole = {key: cell for key, cell in plain(made[0]).items() if cell["attack"] in COLUMNS}
        assert plain(tmp_path / f"killed{at}") == whole


@pytest.fixture
def classified(monkeypatch):
    """Batch sizes of the forward passes without gradients, except the probe with one zero image."""
    seen, real = [], Halving.forward

    def forward(self, x):
        if not torch.is_grad_enabled() and len(x) > 1:
            seen.append(len(x))
        return real(self, x)
    monkeypatch.setattr(Halving, "forward", forward)
    return seen


RANDOM = ("--defense", "gcm+resizepad", "--draws", 3, "--low", 14, "--save", "t")


def test_finished_cells_are_not_classified_again(run_here, tmp_path, classified):
    assert run_here("gcm.py", *SHORT, *RANDOM).returncode == 0
    whole = plain(tmp_path / "t")
    classified.clear()
    done = run_here("gcm.py", *SHORT, *RANDOM)
    assert "| mlp | vanilla |" in done.stdout and not classified
    state = saved(tmp_path / "t")
    key, cell = state["cells"].popitem()
    (tmp_path / "t/results.json").write_text(json.dumps(state))
    assert run_here("gcm.py", *SHORT, *RANDOM).returncode == 0
    attacked = sum(count > 0 for count in cell["before"])
    assert classified == 3 * [attacked]  # after the attack, in each draw
    assert plain(tmp_path / "t") == whole


def test_a_killed_pass_over_clean_images_resumes_even_after_a_commit(run_here, classified,
                                                                     monkeypatch):
    flags, real = (*SHORT, "--batch_size", 7, "--save", "t"), Progress._keep
    about = run.provenance(torch.device("cpu"))

    def killing(self, key, now):
        real(self, key, now)
        if now["done"] == 14:
            raise Killed

    def attacking(*args, **more):
        raise Killed
    monkeypatch.setattr("utils.cells.EVERY", 0)
    monkeypatch.setattr(measure, "run_cell", attacking)
    for keep in (killing, real):
        monkeypatch.setattr(Progress, "_keep", keep)
        monkeypatch.setattr(run, "provenance", lambda *_, keep=keep: about | {"commit": str(keep)})
        with pytest.raises(Killed):
            run_here("gcm.py", *flags)
        gc.collect()
    assert classified == [7, 7, 7, 7, 2]


def test_a_random_defence_repeats_with_its_seed_even_when_resumed(run_here, tmp_path):
    flags = (*SHORT, "--defense", "gcm+resizepad", "--draws", 3, "--low", 14)
    done = run_here("gcm.py", *flags, "--save", "whole")
    assert "gcm+resizepad, adaptive attacker (BPDA, EOT of 3)" in done.stdout
    state = saved(tmp_path / "whole")
    assert len(state["cells"]) == 6
    state["cells"] = dict(list(state["cells"].items())[2:3])
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "results.json").write_text(json.dumps(state))
    assert run_here("gcm.py", *flags, "--save", "part").returncode == 0
    assert plain(tmp_path / "part") == plain(tmp_path / "whole")
    assert run_here("gcm.py", *flags, "--save", "other", "--seed", 1).returncode == 0
    assert plain(tmp_path / "other") != plain(tmp_path / "whole")
    random = [cell for cell in plain(tmp_path / "whole").values() if "resizepad" in cell["defense"]]
    assert {cell["draws"] for cell in random} == {3}
    assert any(set(cell["before"]) - {0, 3} for cell in random)


def test_defences_with_different_settings_share_a_folder_without_mixing(run_here, tmp_path):
    counts = []
    for more in ((), ("--w", 100), ("--defense", "resizepad", "--draws", 2),
                 ("--defense", "resizepad", "--draws", 2, "--low", 20), ("--defense", "none")):
        done = run_here("gcm.py", *FEW, "--attacks", "fgsm", *more)
        assert done.returncode == 0, done.stderr
        counts.append(len(saved(tmp_path / "runs" / "gcm")["cells"]))
    assert counts == [3, 5, 7, 9, 9]  # the vanilla cell is shared


@pytest.mark.parametrize(("more", "words"), [
    (("--num_images", 31), "n 30, given 31"), (("--seed", 1), "seed 0, given 1"),
    (("--eps", "0.1"), "network mlp"), (("--amp", "bf16"), "amp off, given bf16"),
    (("--stop_early",), "stop_early False, given True")])
def test_other_settings_in_the_same_folder_are_refused_and_nothing_is_lost(
        made, run_here, refused, more, words):
    before = (made[0] / "results.json").read_bytes()
    refused(run_here("gcm.py", *FEW, *more, "--save", made[0]), words, "choose another folder")
    assert (made[0] / "results.json").read_bytes() == before


def test_overwrite_replaces_a_table_made_with_other_settings(run_here, tmp_path):
    flags = ("gcm.py", *FEW, "--attacks", "fgsm", "--save", "out")
    assert run_here(*flags).returncode == 0
    (tmp_path / "out" / "partial.json").write_text("{}")
    done = run_here(*flags, "--seed", 1, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "out")["settings"]["seed"] == 1
    assert len(saved(tmp_path / "out")["cells"]) == 3
    assert not (tmp_path / "out" / "partial.json").exists()


@pytest.mark.parametrize("older", [False, True])
def test_a_table_continues_with_another_batch_size_and_says_so(run_here, tmp_path, older):
    one = ("gcm.py", *FEW, "--save", "out", "--batch_size")
    done = run_here(*one, 30, "--attacks", "fgsm")
    assert done.returncode == 0 and "; batch size: 30;" in done.stdout, done.stderr
    first = saved(tmp_path / "out")
    assert "batch_size" not in first["settings"]
    if older:  # one size for the whole table, not recorded in the cells
        cells = {key: {k: v for k, v in cell.items() if k != "batch_size"}
                 for key, cell in first["cells"].items()}
        (tmp_path / "out" / "results.json").write_text(json.dumps(
            {"settings": first["settings"] | {"batch_size": 30}, "cells": cells}))
    done = run_here(*one, 7, "--attacks", *COLUMNS)
    assert done.returncode == 0 and "; batch size: 7 and 30;" in done.stdout, done.stderr
    assert done.stdout.count("Protocol: ") == 1
    assert "; batch size: 7 and 30;" in (tmp_path / "out" / "results.md").read_text()
    second = saved(tmp_path / "out")
    assert "batch_size" not in second["settings"]
    assert {key: second["cells"][key] for key in first["cells"]} == first["cells"]
    assert {cell["batch_size"] for key, cell in second["cells"].items()
            if key not in first["cells"]} == {7}
    assert run_here("gcm.py", *SHORT, "--save", "whole").returncode == 0
    out, whole = ({key: (cell["before"], cell["after"]) for key, cell in plain(path).items()}
                  for path in (tmp_path / "out", tmp_path / "whole"))  # losses differ by rounding
    assert out == whole


# --------------------------------------------------------------- audit and sweep

@pytest.mark.parametrize(("defense", "said"), [("none", "no sign of gradient masking"),
                                               ("gcm", "gradient masking")])
def test_the_audit_flags_the_defended_network_and_not_the_plain_one(
        run_here, tmp_path, defense, said):
    done = run_here("gcm.py", *FEW, "--audit", "--defense", defense, "--queries", 150)
    assert done.returncode == 0, done.stderr
    assert f"\nVerdict: {said}.\n" in done.stdout
    lines = rows(tmp_path / "runs" / "gcm" / f"audit_{defense}.csv")
    assert {line["verdict"] for line in lines} == {said}
    flagged = {line["sign"] for line in lines if line["flagged"] == "True"}
    wanted = {"a transfer attack beats white-box attacks", "an adaptive attacker does better",
              "gradients have another length", "the loss does not rise"}
    assert (wanted <= flagged) if defense == "gcm" else not flagged
    report = (tmp_path / "runs" / "gcm" / f"audit_{defense}.md").read_text()
    assert "flagged if" in report and "Protocol: data: digits" in report
    assert done.stdout.endswith(f"saved {os.path.join('runs', 'gcm')}/results.json, "
                                f"audit_{defense}.json (and .csv, .md)\n")
    assert not (tmp_path / "runs" / "gcm" / "results.md").exists()


def test_the_sweep_shows_from_which_w_on_a_naive_attacker_fails(run_here, tmp_path):
    done = run_here("gcm.py", *FEW, "--w_sweep")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "gcm"
    lines = rows(folder / "w_sweep.csv")
    left = {(row["attacker"], float(row["w"])): float(row["attack_robustness"]) for row in lines}
    assert left["naive", 1e2] == left["adaptive", 1e2] < 0.2
    assert left["naive", 1e20] > 0.7 and left["adaptive", 1e20] < 0.2
    assert (folder / "w_sweep.png").read_bytes().startswith(b"\x89PNG")
    text, last = (folder / "w_sweep.md").read_text(), done.stdout.splitlines()[-1]
    assert text.startswith("Protocol: data: digits;") and text.count("\n| mlp | ") == 2
    assert text.partition("\n")[2] in done.stdout
    assert last == f"saved {os.path.join('runs', 'gcm')}/results.json, w_sweep.csv (and .png, .md)"
    drawn = run_here("figures.py", "--w_sweep", folder, "--out", "w.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("flags", "words"), [
    (("--defense", "jpeg"), ("--defense", "jpeg", "resizepad")),
    (("--num_images", 1000), ("--num_images 1000", "has 355", "type --num_images 355")),
    (("--audit", "--w_sweep"), ("one at a time",)),
    (("--audit", "--stop_early"), ("leave out --stop_early",)),
    (("--w_sweep", "--defense", "resizepad"), ("there is no w",)),
    (("--defense", "resizepad", "--low", 29), ("--low 29", "28 pixels")),
    (("--w", 0), ("wanted w above 0",)), (("--epsilon", 2), ("epsilon in (0, 1)",)),
    (("--attacks", "fgsm", "deepfool"), ("deepfool",)),
    (("--model_name", "resnet50"), ("resnet50", "wanted one of cnn")),
    (("--image_size", 32), ("--image_size 32", "28 pixels")),
    (("--geometry", "own"), ("--geometry", "paper", "weights")),
    (("--metric", "adv_acc"), ("adv_acc", "robust_acc")),
    (("--weights", "nowhere.pth"), ("nowhere.pth",)),
    (("--eps_l2", "0"), ("--eps_l2", "wanted a number above 0")),
    (("--eps_l1", "0"), ("--eps_l1", "wanted a number above 0")),
    (("--eps", "8"), ("--eps", "outside (0, 1]"))], ids=str)
def test_bad_input_gives_one_line(run_here, refused, flags, words, tmp_path):
    refused(run_here("gcm.py", *FEW, *flags), *words)
    assert not (tmp_path / "runs" / "gcm" / "results.json").exists()


def test_folders_that_are_not_classes_of_the_networks_are_refused(
        run_here, refused, picture, tmp_path):
    picture(tmp_path / "val" / "mine" / "a.jpg")
    refused(run_here("gcm.py", "--data_dir", "val", "--model_name", "squeezenet1_1"),
            "not those of the network", "n01440764")


def test_a_network_that_classifies_nothing_correctly_is_refused(run_here, refused, picture,
                                                                tmp_path):
    picture(tmp_path / "val" / "n01440764" / "a.jpg")
    refused(run_here("gcm.py", "--data_dir", "val", "--model_name", "squeezenet1_1", "--weights",
                     "random", "--workers", 0), "none of these images right", "--weights")


@pytest.mark.parametrize("text", ["[]", '{"rows": []}', "half a fi"])
def test_a_foreign_results_file_is_refused_and_kept(run_here, refused, tmp_path, text):
    folder = tmp_path / "runs" / "gcm"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
    refused(run_here("gcm.py", *SHORT), "results.json")
    assert (folder / "results.json").read_text() == text


def test_gcm_and_eval_net_do_not_mix_their_cells(run_here, refused, tmp_path):
    flags = (*FEW, "--attacks", "fgsm", "--save", "both")
    for first, second in (("gcm.py", "eval_net.py"), ("eval_net.py", "gcm.py")):
        assert run_here(first, *flags).returncode == 0
        before = (tmp_path / "both" / "results.json").read_bytes()
        refused(run_here(second, *flags), f"script {first}, given {second}")
        assert (tmp_path / "both" / "results.json").read_bytes() == before
        shutil.rmtree(tmp_path / "both")


def test_a_table_of_an_older_version_whose_counts_are_strings_is_refused(
        made, run_here, refused, tmp_path):
    state = saved(made[0])
    state["cells"] = {"a": {"before": "1 1 0", "after": "0 1 0"}}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text(json.dumps(state))
    refused(run_here("gcm.py", *FEW, "--attacks", "fgsm", "--save", "old"), "older version",
            "choose another folder")


# ------------------------------------------- universal perturbations and defences

TRAIN = ("--model_name", "mlp", "--num_images", 100, "--batch_size", 50, "--device", "cpu",
         "--amp", "off", "--layout", "contiguous")


def uap(tmp_path, name):
    found = list((tmp_path / name).glob("*.pth"))
    return torch.load(next(p for p in found if p.name != "checkpoint.pth"), weights_only=True)


def test_an_adaptive_attacker_behind_gcm_makes_the_plain_perturbation_and_a_naive_one_does_not(
        run_here, tmp_path):
    for name, more in (("plain", ()), ("naive", ("--defense", "gcm")),
                       ("adaptive", ("--defense", "gcm", "--bpda"))):
        done = run_here("train_sga.py", *TRAIN, "--epochs", 2, "--save", name, *more)
        assert done.returncode == 0, done.stderr
    plain_one, naive, adaptive = (uap(tmp_path, name) for name in ("plain", "naive", "adaptive"))
    assert (plain_one == adaptive).float().mean() > 0.99
    assert (plain_one == naive).float().mean() < 0.9
    facts = json.loads((tmp_path / "adaptive" / "sga_mlp_gcm_bpda.json").read_text())
    assert facts["defense"] == "gcm" and facts["bpda"] is True


def test_a_killed_run_behind_a_random_defence_resumes_to_the_same_bytes(run_here, tmp_path,
                                                                        monkeypatch):
    import train_sga

    flags = (*TRAIN, "--epochs", 3, "--defense", "gcm+resizepad")
    assert run_here("train_sga.py", *flags, "--save", "whole").returncode == 0
    real, calls = train_sga.SgaTraining.one_pass, []

    def killing(*args):
        if len(calls) == 1:
            raise Killed
        calls.append(1)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train_sga.SgaTraining, "one_pass", killing)
        with pytest.raises(Killed):
            run_here("train_sga.py", *flags, "--save", "killed")
    gc.collect()
    assert run_here("train_sga.py", *flags, "--save", "killed", "--resume").returncode == 0
    name = "sga_mlp_gcm+resizepad.pth"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_bpda_without_a_gcm_layer_is_refused(run_here, refused):
    for defense in ("none", "resizepad"):
        refused(run_here("train_sga.py", *TRAIN, "--bpda", "--defense", defense),
                "--bpda", "type --defense gcm")


def test_the_evaluation_names_the_defence_and_counts_predictions_that_change_by_chance(
        run_here, tmp_path):
    assert run_here("train_sga.py", *TRAIN, "--epochs", 1, "--save", "u").returncode == 0
    found = {}
    for defense in ("none", "gcm", "resizepad"):
        done = run_here("eval_uap.py", "--uaps", "u", "--model_name", "mlp",
                        "--defense", defense, "--save", defense, "--show", 0)
        assert done.returncode == 0, done.stderr
        assert ("defence: " in done.stdout) == (defense != "none")
        found[defense] = saved(tmp_path / defense)["rows"]
    same = ("fooling_ratio", "clean_acc", "adv_acc")
    for plain_row, row in zip(found["none"], found["gcm"], strict=True):
        assert [plain_row[m]["k"] for m in same] == [row[m]["k"] for m in same]
        assert "changed_by_chance" not in row
    for row in found["resizepad"]:
        assert 0 <= row["changed_by_chance"]["value"] <= row["changed_by_chance"]["high"] < 0.2
    assert any(row["changed_by_chance"]["k"] for row in found["resizepad"])
