"""eval_net.py's curves, saved images and transfer: cells compared with attacks called by hand."""

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import attacks
from attack_toys import K, chances, greys, pictures, predicted, toy
from utils import curves, measure, saved, tested, transfer
from utils.attack import balls
from utils.attack.chance import numbered
from utils.attack.diverse import Diverse, blurred
from utils.attack.random_layers import drawing_from
from utils.cells import Progress
from utils.data import to_float
from utils.defenses import GradientConcealment, ResizePad
from utils.errors import UserError
from utils.images import Images, paper_geometry
from utils.models import trainable
from utils.run import save_pth
from utils.team import Team

CPU, N = torch.device("cpu"), 12


@pytest.fixture
def images():
    pixels = (255 * pictures(N)).round().to(torch.uint8)
    y = predicted(toy(), pixels / 255)
    y[3] = (y[3] + 1) % K
    return Images("digits", tuple(map(str, range(N))), y, tuple("abcde"), paper_geometry(8),
                  pixels=pixels)


@pytest.fixture
def s(tmp_path):
    return SimpleNamespace(draws=1, batch_size=5, seed=2, device=CPU, workers=0, diverse=False,
                           save_images=tmp_path / "out", from_images=None)


def network(name, model=None, defense="none", eps=0.05):
    target = SimpleNamespace(name=name, size=8, geometry=paper_geometry(8), described="toy")
    return tested.Tested(name, target, model or toy(), K, eps, {}, None, defense=defense)


def clean_cells(nets, images, s):
    return {f"{net.name} | clean": net.clean_cell(images, s, Progress()) for net in nets}


def filled(found, cells):
    for key, cell in found:
        cells[key] = cell
    return cells


# ------------------------------------------------------------------------ curves

def test_a_curve_runs_the_attack_at_every_radius_on_the_surviving_images(images, s, monkeypatch):
    apgd = partial(attacks.apgd, steps=8)
    monkeypatch.setattr(curves, "apgd", apgd)
    monkeypatch.setattr(curves, "FAB_STEPS", 4)
    net = network("a")
    cells = clean_cells([net], images, s)
    filled(curves.missing_cells(net, lambda _: images, cells, s, Progress()), cells)
    radii = curves.radii(cells["a | norms"], net.eps)
    assert len(radii) == 10 and radii[0] == 0
    x, y = to_float(images.pixels), images.labels
    left = predicted(net.model, x) == y
    for eps in radii[1:]:
        who = left.nonzero()[:, 0]
        own, report = chances(N, 2)[who].fold(measure.ATTACK), {"gradients": 0}
        if len(who):
            x_adv = apgd(net.model, x[who], y[who], eps=eps, generator=own, report=report)
            left[who] = predicted(net.model, x_adv) == y[who]
        cell = cells[f"a | APGD-CE adaptive {eps:.6g}"]
        assert cell["after"] == left.long().tolist()
        assert cell["gradients"] == report["gradients"]
    rows = curves.rows_of(net, cells)
    assert [row["attacker"] for row in rows[::10]] == ["APGD-CE, adaptive", "FAB, adaptive"]
    assert [row["k"] for row in rows[:10]] == sorted((row["k"] for row in rows[:10]), reverse=True)
    assert rows[0]["k"] == rows[10]["k"] == 11 and rows[19]["k"] == 0
    assert len({row["k"] for row in rows[:10]}) > 3
    assert not list(curves.missing_cells(net, lambda _: images, cells, s, Progress()))


def test_the_curve_of_fab_counts_the_images_that_are_farther_away():
    cell = {"n": 5, "draws": 1, "before": [1, 1, 1, 0, 1], "norms": [0.1, 0.2, None, None, 0.3]}
    assert [curves._beyond(cell, eps)["k"] for eps in (0, 0.1, 0.25, 0.5)] == [4, 3, 2, 1]
    every = cell | {"norms": [0.1, 0.2, 0.25, None, 0.3]}
    assert curves.radii(every, 1.0)[9] == pytest.approx(0.3 * curves.BEYOND)
    for one in (cell, cell | {"norms": [None] * 5}):  # FAB found nothing for a right image
        assert curves.radii(one, 0.1)[9] == pytest.approx(0.408)


def test_a_random_defence_has_no_curve_of_fab(images, s):
    net = network("a", defense="resizepad")
    cell = {"n": 2, "draws": 1, "before": [1, 1], "after": [1, 0]}
    cells = {"a | clean": cell, "a | norms": cell | {"norms": [0.1, None]}} | {
        f"a | {curves.key_of(attacker, eps)}": cell for attacker in ("adaptive", "naive")
        for eps in curves.radii(cell | {"norms": [0.1, None]}, net.eps)}
    assert {row["attacker"] for row in curves.rows_of(net, cells)} == {
        "APGD-CE, adaptive", "APGD-CE, naive"}


def test_a_defended_network_has_an_adaptive_and_a_naive_curve(images, s):
    net = network("a", nn.Sequential(nn.Identity(), toy()), "gcm")
    found = curves.attackers(net, s)
    assert set(found) == {"adaptive", "naive"}
    assert any(isinstance(part, GradientConcealment) for part in found["naive"].modules())
    assert set(curves.attackers(network("b"), s)) == {"adaptive"}


# ------------------------------------------------------------------------ saved images

@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("linf", 8.9 / 255), ("l2", 0.5),
                                           ("l1", 3.0)])
@pytest.mark.parametrize("images", [greys, pictures])
def test_rounded_images_are_levels_inside_the_ball(images, norm, eps):
    x = (255 * images(20)).round() / 255
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x_adv = balls.nearest(x + delta, x, eps, norm)
    found = saved.rounded_inside(x, x_adv, eps, norm)
    moved = found.double() - (255 * x.double()).round()
    assert found.dtype == torch.uint8
    assert (balls.norm_of(moved, norm) <= 255 * eps * (1 + 1e-6)).all()
    assert (moved - 255 * (x_adv.double() - x.double())).abs().max() < 1
    if norm == "linf":  # the nearest levels inside
        wanted = np.clip(np.rint(255 * (x_adv - x).double().numpy()), -8, 8)
        assert (moved.numpy() == wanted).all() and moved.abs().max() == 8
    else:
        assert (moved != 0).any()


def test_images_are_rounded_on_the_cpu_as_some_gpus_have_no_float64():
    class OnGpu:
        def cpu(self):
            return torch.full((1, 1, 2, 2), 0.5)
    assert (saved.rounded_inside(OnGpu(), OnGpu(), 0.1, "linf") == 128).all()


def test_saved_images_are_measured_after_saving_and_again_by_from_images(images, s):
    net, attack = network("a/b"), measure.Attack("PGD (5)", "linf", 0.06, partial(
        attacks.pgd, eps=0.06, steps=5))
    cells = clean_cells([net], images, s)
    before = cells["a/b | clean"]["before"]
    cell = net.attack_cell(attack, images, before, s, Progress())
    folder = s.save_images / "a_b" / "PGD_5_"
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == [f"{i:06}.png" for i in range(N) if before[i]]
    x = to_float(images.pixels)
    own = chances(N, 2)[torch.tensor(before).nonzero()[:, 0]].fold(measure.ATTACK)
    kept = torch.tensor(before) > 0
    x_adv = x.clone()
    x_adv[kept] = attack.run(net.model, x[kept], images.labels[kept], generator=own)
    eight = saved.rounded_inside(x, x_adv, 0.06, "linf")
    for i in kept.nonzero()[:, 0].tolist():
        assert torch.equal(saved.read_png(folder / f"{i:06}.png", eight[i]), eight[i])
    rows = list(csv.DictReader((folder / "images.csv").open()))
    assert rows == [{"file": f"{i:06}.png", "source": str(i), "label": str(k),
                     "class_name": "abcde"[k]} for i, k in enumerate(images.labels.tolist())
                    if before[i]]
    right = ((predicted(net.model, eight / 255) == images.labels) & kept).long().tolist()
    assert cell["after8"] == right and cell["outside"] == 0
    assert 0 < sum(cell["after"]) <= sum(right) < sum(before)
    s.from_images, s.save_images = [folder], None
    (title, said), = saved.made_with([folder], [net]).items()
    assert title == "saved: PGD (5) on a/b, Linf eps 15.3/255"
    assert said.startswith("model a/b (toy) behind none, 1 draws, eps 0.06, seed 2, images ")
    saved.check_folders([net], lambda _: images, s, Team())
    (key, again), = saved.saved_cells(net, images, cells, s, Progress())
    assert key == f"a/b | {title}" and again["after"] == right
    assert not list(saved.saved_cells(net, images, cells | {key: again}, s, Progress()))
    for other in (images.select(range(5)), replace(images, labels=images.labels.flip(0))):
        with pytest.raises(UserError, match="another list"):
            saved.check_folders([net], lambda _, other=other: other, s, Team())
    (folder / names[0]).write_bytes((folder / names[1]).read_bytes())
    assert saved.made_with([folder], [net])[title] != said


def test_damaged_saved_images_are_refused_in_one_line(images, s, tmp_path, monkeypatch):
    attack = measure.Attack("FGSM", "linf", 0.1, None)
    s.save_images = tmp_path
    keep = saved.Kept(network("a"), attack, images, s)
    keep.begin([1, 1], Progress())
    x = to_float(images.pixels[:2])
    keep(torch.tensor([0, 1]), x, x)
    folder = tmp_path / "a" / "FGSM"
    larger = network("b")
    larger.target.size = 28
    with pytest.raises(UserError, match="saved at 8 pixels, but b takes 28"):
        saved.made_with([folder], [larger])
    (folder / "000000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read"):
        saved.read_png(folder / "000000.png", images.pixels[0])
    (folder / "000000.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(UserError, match="cannot be read"):
        saved.read_png(folder / "000000.png", images.pixels[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.raises(UserError, match="cannot be read"):
        saved.read_png(folder / "000001.png", images.pixels[0])
    monkeypatch.undo()
    with pytest.raises(UserError, match="of shape"):
        saved.read_png(folder / "000001.png", torch.zeros(1, 8, 8))
    (folder / "about.json").write_text(json.dumps({"attack": "FGSM"}))
    for bad in (folder, tmp_path):
        with pytest.raises(UserError, match="no about.json of saved images"):
            saved.read_about(bad)


SAVING = ("eval_net.py", "--model_name", "mlp", "--num_images", 100, "--device", "cpu", "--workers",
          0, "--attacks", "fgsm", "--save_images", "kept")


@pytest.fixture
def weights(tmp_path):
    """a.pth and b.pth: two networks with the same name."""
    for seed, name in enumerate("ab"):
        state = trainable("mlp", kind="digits", seed=seed)[1].state_dict()
        save_pth(tmp_path / f"{name}.pth", state)


def held(folder):
    """{file: content} of a folder of saved images."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def untimed(path):
    """The rows of a results.csv without their seconds."""
    with open(path, newline="") as file:
        return [row | {"seconds": None} for row in csv.DictReader(file)]


def test_images_of_another_command_are_refused_or_replaced(run_here, refused, weights, tmp_path):
    command, folder = (*SAVING, "--weights", "a.pth", "--save", "a"), tmp_path / "kept/mlp/FGSM"
    assert run_here(*command).returncode == 0
    first = held(folder)
    other = (*command[:-1], "b")
    refused(run_here(*other, "--save_images", "a.pth"), "a.pth/mlp/FGSM: cannot write there")
    assert not (tmp_path / "b/results.json").exists()
    for flags, word in ((("--weights", "b.pth"), "model mlp (a.pth"), (("--eps", 0.1), "eps 0.2"),
                        (("--num_images", 99), "n 100, given 99"), (("--seed", 1), "seed 0")):
        refused(run_here(*other, *flags), "kept/mlp/FGSM", word, "type --overwrite to replace")
        assert held(folder) == first
    assert run_here(*other).returncode == 0  # the same images
    assert held(folder) == first
    others = (*command[:-1], "c", "--weights", "b.pth")
    assert run_here(*others, "--overwrite").returncode == 0
    second = held(folder)
    assert first.keys() - second.keys() and second.keys() - first.keys()
    assert run_here(*others, "--save", "d", "--save_images", "new").returncode == 0
    assert held(tmp_path / "new/mlp/FGSM") == second
    (folder / "about.json").unlink()
    refused(run_here(*others), "kept/mlp/FGSM", "attack None, given FGSM")


@pytest.mark.parametrize("lost", ["elsewhere", "folder", "one image", "images.csv",
                                  "nothing"])
def test_missing_saved_images_are_made_again(run_here, weights, tmp_path, lost):
    command = (*SAVING, "--weights", "a.pth", "--save", "a")
    said = run_here(*command).stdout
    folder, table = tmp_path / "kept/mlp/FGSM", untimed(tmp_path / "a/results.csv")
    whole = held(folder)
    lost = min(whole) if lost == "one image" else lost
    if lost == "elsewhere":
        command, folder = (*command, "--save_images", "other"), tmp_path / "other/mlp/FGSM"
    elif lost == "folder":
        shutil.rmtree(tmp_path / "kept")
    elif lost != "nothing":
        (folder / lost).unlink()
        (folder / "000100.png").write_bytes(b"of an image that was wrong before")
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    line, = (line for line in said.splitlines() if line.startswith("mlp | FGSM: "))
    assert (line in done.stdout.splitlines()) == (lost != "nothing")
    assert held(folder) == whole and untimed(tmp_path / "a/results.csv") == table


def test_saved_images_that_do_not_fit_are_refused_before_any_attack(
        run_here, refused, weights, tmp_path, monkeypatch):
    command = (*SAVING, "--weights", "a.pth", "--save", "a")
    assert run_here(*command).returncode == 0
    measuring = (*SAVING[:-2], "--weights", "b.pth", "--from_images", "kept/mlp/FGSM")
    done = run_here(*measuring, "--save", "b")
    assert "; Linf eps: 51/255;" in done.stdout, done.stderr
    assert "; saved images: those that were not attacked are clean;" in done.stdout
    assert "| saved: FGSM on mlp, Linf eps 51/255 |" in done.stdout
    shutil.copytree(tmp_path / "kept", tmp_path / "copy")
    assert run_here(*command, "--eps", 0.1, "--overwrite").returncode == 0
    assert run_here(*measuring, "--save", "b").stdout.count(
        "| saved: FGSM on mlp, Linf eps 25.5/255 |") == 1  # beside FGSM at 51/255
    assert run_here(*command, "--seed", 1, "--overwrite", "--weights", "b.pth").returncode == 0
    monkeypatch.setattr(measure, "run_cell", lambda *_, **__: pytest.fail("an attack was run"))
    refused(run_here(*measuring, "--save", "c", "--num_images", 99), "another list of images")
    refused(run_here(*measuring, "copy/mlp/FGSM", "--save", "c"), "a second folder of FGSM on mlp")
    refused(run_here(*measuring, "--save", "b"), "saved: FGSM on mlp, Linf eps 51/255",
            "model mlp (a.pth", "model mlp (b.pth")
    refused(run_here(*measuring, "--save", "c", "--save_images", "kept", "--overwrite"),
            "--overwrite --save_images kept", "type two commands")
    min((tmp_path / "kept/mlp/FGSM").glob("*.png")).unlink()
    refused(run_here(*measuring, "--save", "c"), "not all of its images are there")
    assert not (tmp_path / "c/results.json").exists()


class Killed(BaseException):
    """Stands for SIGKILL: the script must not catch it."""


@pytest.mark.parametrize("deleted", [False, True])
def test_a_killed_cell_resumes_only_if_its_images_still_exist(run_here, weights, tmp_path,
                                                              monkeypatch, deleted):
    command, folder = (*SAVING, "--weights", "a.pth"), tmp_path / "kept/mlp/FGSM"
    real, saves = (saved.Kept.finish, saved.Kept.__call__), []

    def killed(*_):
        raise Killed
    monkeypatch.setattr("utils.cells.EVERY", 0)
    monkeypatch.setattr(saved.Kept, "finish", killed)
    with pytest.raises(Killed):
        run_here(*command, "--save", "a")
    first = held(folder)
    assert len(first) > 2 and "images.csv" not in first
    monkeypatch.setattr(saved.Kept, "finish", real[0])
    monkeypatch.setattr(saved.Kept, "__call__", lambda *a: saves.append(a) or real[1](*a))
    if deleted:
        shutil.rmtree(tmp_path / "kept")
    assert run_here(*command, "--save", "a").returncode == 0
    assert len(saves) == deleted
    assert {name: text for name, text in held(folder).items() if name != "images.csv"} == first


# ------------------------------------------------------------------------ transfer

@pytest.mark.parametrize("diverse", [False, True])
def test_a_transfer_measures_the_sources_images_on_the_target(diverse, images, s):
    s.diverse, nets = diverse, [network("a"), network("b", toy(seed=1))]
    cells = clean_cells(nets, images, s)
    filled(transfer.missing_cells(nets, attacks.mim, lambda _: images, cells, s, Progress()), cells)
    x, y = to_float(images.pixels), images.labels
    more = {"diverse": 0.5, "blur": 3} if diverse else {}
    for source in nets:
        x_adv = attacks.mim(source.model, x, y, eps=0.05, alpha=0.005, steps=10,
                            generator=numbered(2, N).fold(measure.ATTACK), **more)
        for target in nets:
            cell = cells[transfer.key_of(source, target, s)]
            assert cell["after"] == (predicted(target.model, x_adv) == y).long().tolist()
            assert cell["before"] == cells[f"{target.name} | clean"]["before"]
            assert cell["outside"] == 0
    text = transfer.table(nets, cells, s)
    assert "| made with | a | b |" in text and ("DI and TI" in text) == diverse
    assert not list(transfer.missing_cells(nets, attacks.mim, lambda _: images, cells, s,
                                           Progress()))


def test_networks_with_different_geometries_have_no_transfer_table(s):
    s.transfer, nets = True, [network("a"), network("b")]
    transfer.check(nets, s)
    nets[1].target.geometry = paper_geometry(9)
    with pytest.raises(UserError, match="wanted the same for all"):
        transfer.check(nets, s)


def test_blurred_gradients_equal_those_of_a_loop():
    g = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    line = np.exp(-np.linspace(-3, 3, 5) ** 2 / 2)
    kernel = np.outer(line, line) / np.outer(line, line).sum()
    wide = np.pad(g.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    wanted = sum(kernel[i, j] * wide[:, :, i:i + 7, j:j + 6] for i in range(5) for j in range(5))
    assert blurred(g, 5).numpy() == pytest.approx(wanted)


def test_diverse_inputs_change_about_the_given_share_of_images():
    seen, x = [], torch.ones(400, 1, 20, 20)
    model = Diverse(lambda z: seen.append(z) or z.flatten(1), 0.3)
    with drawing_from(chances(400)):
        model(x)
    changed = (seen[0] != x).flatten(1).any(1).sum().item()
    places = sum((ResizePad(18, 20).draw(x)[0] < 20).tolist()) / 400  # others keep their size
    assert 0.3 * 400 * places - 40 < changed < 0.3 * 400 * places + 40
    Diverse(lambda z: seen.append(z), 0.0)(x)
    assert torch.equal(seen[1], x)
