"""Runs: the same bytes twice, whole files or none, kills at any moment, what may be resumed."""

import csv
import gc
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from conftest import SRC

from utils import draw, sga_run
from utils.data import PRESETS, open_images
from utils.errors import UserError
from utils.models import load_model
from utils.nets import build_small
from utils.run import RunFolder, load_pth, save_json, save_pth, write_atomic

SCRIPT = "train_sga.py"
TINY = ("--num_images", 60, "--epochs", 2, "--weights", "random", "--model_name", "mlp",
        "--amp", "off", "--layout", "contiguous", "--save", "run")


def rows(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def changed(args, **flags):
    """The command line with other values: the last of repeated arguments counts."""
    return (*args, *(part for name, value in flags.items() for part in (f"--{name}", value)))


# ------------------------------------------------------------------------- what is refused

class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_an_old_tar_file_is_refused_and_not_executed(tmp_path):
    """torch before 2.6 reads such files even when asked for weights only."""
    bomb, path = pickle.dumps(Bomb(str(tmp_path / "ran"))), tmp_path / "w.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(bomb)
            archive.addfile(entry, io.BytesIO(bomb))
    with pytest.raises(UserError, match="holds more than tensors"):
        load_pth(path)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------ same bytes

def test_two_runs_give_the_same_bytes_and_another_seed_gives_different_ones(run_here, run_script,
                                                                            tmp_path):
    flags = changed(TINY, momentum=0.9, model_name="cnn,mlp")
    made = []
    for i, run in enumerate((run_here, run_here, run_script)):
        result = run(SCRIPT, *changed(flags, save=i), "--augment")
        assert result.returncode == 0, result.stderr
        made.append((tmp_path / str(i) / "sga_cnn+mlp_augment.pth").read_bytes())
    assert made[0] == made[1] == made[2]
    assert run_here(SCRIPT, *changed(flags, save="other", seed=1), "--augment").returncode == 0
    assert (tmp_path / "other" / "sga_cnn+mlp_augment.pth").read_bytes() != made[0]


def test_the_choice_of_auto_is_printed_and_typing_it_repeats_the_bytes(run_here, tmp_path):
    result = run_here(SCRIPT, *changed(TINY, amp="auto", layout="auto"))
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "run" / "sga_mlp.json").read_text())
    assert f"--amp {facts['amp']} --layout {facts['layout']}" in result.stdout
    pinned = changed(TINY, amp=facts["amp"], layout=facts["layout"], save="pinned")
    assert run_here(SCRIPT, *pinned).returncode == 0
    same = [(tmp_path / folder / "sga_mlp.pth").read_bytes() for folder in ("run", "pinned")]
    assert same[0] == same[1]


# ------------------------------------------------------------------- kill and resume

@pytest.mark.parametrize("more", [(), ("--momentum", "0.9", "--augment")], ids=["paper", "both"])
def test_a_run_killed_by_signal_9_resumes_to_the_bytes_of_an_uninterrupted_run(
        run_here, run_script, tmp_path, more):
    flags = (*changed(TINY, epochs=10, model_name="cnn", save="whole"), *more)
    assert run_here(SCRIPT, *flags).returncode == 0
    killed = tmp_path / "killed"
    flags = tuple(map(str, (*flags, "--save", "killed")))
    process = subprocess.Popen([sys.executable, str(SRC / SCRIPT), *flags], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (killed / "log.csv").exists():
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert 1 <= len(rows(killed)) < 10
    (killed / ".checkpoint.pth.left1234.tmp").write_bytes(b"half")  # as left by a kill
    result = (run_here if more else run_script)(SCRIPT, *flags, "--resume")
    assert result.returncode == 0, result.stderr
    name = "sga_cnn_augment.pth" if more else "sga_cnn.pth"
    assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["epoch"] for row in rows(killed)] == [str(i) for i in range(1, 11)]
    for mine, whole in zip(rows(killed), rows(tmp_path / "whole"), strict=True):
        assert [mine[key] for key in ("loss", "fooling_ratio")] \
            == [whole[key] for key in ("loss", "fooling_ratio")]
    assert not list(killed.glob(".*.tmp"))


class Killed(BaseException):
    """Stands for SIGKILL between two writes: the script must not catch it."""


def test_a_kill_after_any_write_of_a_run_resumes_to_the_same_files(run_here, tmp_path,
                                                                   monkeypatch):
    assert run_here(SCRIPT, *TINY).returncode == 0
    whole = tmp_path / "run"
    real, names = os.replace, []
    for at in range(1, 30):
        count, folder = 0, tmp_path / f"killed{at}"

        def replace(old, new, at=at):
            nonlocal count
            count += 1
            real(old, new)
            names.append(os.path.basename(new))
            if count == at:
                raise Killed
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                run_here(SCRIPT, *changed(TINY, save=folder))
                break  # it wrote fewer than `at` files
            except Killed:
                pass
        gc.collect()
        result = run_here(SCRIPT, *changed(TINY, save=folder), "--resume")
        assert result.returncode == 0, (at, names[-1], result.stderr)
        assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))
        assert (folder / "sga_mlp.pth").read_bytes() == (whole / "sga_mlp.pth").read_bytes()
        assert [row["epoch"] for row in rows(folder)] == ["1", "2"], f"killed after {names[-1]}"
    assert {"checkpoint.pth", "log.csv", "sga_mlp.pth", "sga_mlp.json"} <= set(names)


def test_resuming_a_finished_run_changes_nothing_and_resuming_nothing_starts_a_run(run_here,
                                                                                   tmp_path):
    assert run_here(SCRIPT, *TINY, "--resume").returncode == 0
    before = (tmp_path / "run" / "sga_mlp.pth").read_bytes()
    assert run_here(SCRIPT, *TINY, "--resume").returncode == 0
    assert (tmp_path / "run" / "sga_mlp.pth").read_bytes() == before
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("more", [(), ("--momentum", 0.9), ("--augment",), ("--method", "spgd")],
                         ids=lambda more: "_".join(map(str, more)) or "paper")
def test_a_finished_run_can_be_extended_to_the_bytes_of_a_longer_run(run_here, tmp_path, more):
    assert run_here(SCRIPT, *changed(TINY, epochs=5, save="whole"), *more).returncode == 0
    for epochs in (2, 4, 5):
        result = run_here(SCRIPT, *changed(TINY, epochs=epochs), *more, "--resume")
        assert result.returncode == 0, result.stderr
        assert len(rows(tmp_path / "run")) == epochs
    run, whole = tmp_path / "run", tmp_path / "whole"
    name = next(whole.glob("s*.pth")).name
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    first, second = (torch.load(folder / "checkpoint.pth", weights_only=True)
                     for folder in (run, whole))
    assert first["flags"] == second["flags"] and first["flags"]["epochs"] == 5
    for key in ("delta", "v", "generator"):
        assert torch.equal(first[key], second[key])
    for mine, other in zip(rows(run), rows(whole), strict=True):
        assert [mine[key] for key in ("epoch", "loss", "fooling_ratio")] \
            == [other[key] for key in ("epoch", "loss", "fooling_ratio")]


@pytest.mark.parametrize(("script", "flags", "name"), [
    ("fgsm_mnist.py", ("--num_images", 100, "--eval_images", 5, "--queries", 2), "seed0/fgs.pth"),
    ("train_gcm.py", ("--num_images", 80, "--batch_size", 38, "--workers", 0, "--step_epochs", 1,
                      "--augment", "rain"), "stage1_cnn_bn.pth")])
def test_other_trainings_whose_steps_do_not_depend_on_the_epochs_can_be_extended_too(
        run_here, tmp_path, script, flags, name):
    for args in (("--epochs", 2, "--save", "whole"), ("--epochs", 1, "--save", "run"),
                 ("--epochs", 2, "--save", "run", "--resume")):
        result = run_here(script, *flags, *args)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_training_whose_learning_rate_depends_on_the_epochs_cannot_be_extended(run_here, refused):
    flags = ("--method", "natural", "--num_images", 100, "--save", "run")
    assert run_here("free_at.py", *flags, "--epochs", 1).returncode == 0
    refused(run_here("free_at.py", *flags, "--epochs", 2, "--resume"), "another --epochs",
            "the run in run has 1", "given 2", "size of its steps depends on it")


def test_fewer_epochs_than_a_run_has_done_are_refused(made, run_here, refused):
    refused(run_here(SCRIPT, *changed(TINY, epochs=1), "--resume"), "--epochs 1", "has done 2",
            "type --epochs 2 or more")


@pytest.fixture
def made(run_here, tmp_path):
    """A finished run in tmp_path/run."""
    result = run_here(SCRIPT, *TINY)
    assert result.returncode == 0, result.stderr
    return tmp_path / "run"


def test_resume_with_another_flag_is_refused_and_the_flag_is_named(made, run_here, refused,
                                                                   tmp_path):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    weights = tmp_path / "mlp.pth"
    save_pth(weights, build_small("mlp", 1, 28).state_dict())
    for name, value in {
            "eps": "0.11", "alpha": "0.011", "epochs": 1, "seed": 7, "minibatch": 5, "iter": 2,
            "momentum": 0.5, "method": "spgd", "loss": "logit", "beta": 4, "batch_size": 30,
            "target": 3, "amp": "bf16", "layout": "channels_last", "model_name": "cnn",
            "weights": weights, "num_images": 50}.items():
        refused(run_here(SCRIPT, *changed(TINY, **{name: value}), "--resume"), f"--{name}",
                "--resume")
    refused(run_here(SCRIPT, *TINY, "--resume", "--augment"), "--augment")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_flag_that_cannot_change_the_result_may_change_on_resume(made, run_here):
    assert run_here(SCRIPT, *TINY, "--workers", 1, "--resume").returncode == 0


def test_a_second_run_without_resume_is_refused_and_overwrite_starts_again(made, run_here, refused):
    before = (made / "sga_mlp.pth").read_bytes()
    refused(run_here(SCRIPT, *TINY), "--resume", "--overwrite", "run")
    assert run_here(SCRIPT, *changed(TINY, epochs=1), "--overwrite").returncode == 0
    assert len(rows(made)) == 1
    assert (made / "sga_mlp.pth").read_bytes() != before
    assert run_here(SCRIPT, *TINY, "--overwrite").returncode == 0
    assert (made / "sga_mlp.pth").read_bytes() == before


def test_overwrite_refuses_a_folder_with_another_perturbation(made, run_here, refused):
    kept = {path.name: path.read_bytes() for path in made.iterdir()}
    refused(run_here(SCRIPT, *TINY, "--augment", "--overwrite"), "another perturbation", "sga_mlp")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == kept


def test_a_finished_run_changes_only_if_it_is_extended(made, run_here):
    facts = json.loads((made / "sga_mlp.json").read_text()) | {"commit": "of then"}
    save_json(made / "sga_mlp.json", facts)
    kept = {path.name: path.read_bytes() for path in made.iterdir()}
    result = run_here(SCRIPT, *TINY, "--resume")
    assert result.returncode == 0 and "fooling_ratio" in result.stdout, result.stderr
    assert {path.name: path.read_bytes() for path in made.iterdir()} == kept
    assert run_here(SCRIPT, *changed(TINY, epochs=3), "--resume").returncode == 0
    facts = json.loads((made / "sga_mlp.json").read_text())
    assert facts["epochs"] == 3 and facts["commit"] != "of then"


def test_a_killed_run_that_was_overwriting_another_resumes_as_itself(made, run_here,
                                                                           tmp_path, monkeypatch):
    other = changed(TINY, seed=5)
    assert run_here(SCRIPT, *changed(other, save="whole")).returncode == 0
    real = os.replace

    def replace(old, new):  # the list of images is written before the first checkpoint
        real(old, new)
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace)
        run_here(SCRIPT, *other, "--overwrite")
    gc.collect()
    result = run_here(SCRIPT, *other, "--resume")
    assert result.returncode == 0, result.stderr
    assert (made / "sga_mlp.pth").read_bytes() \
        == (tmp_path / "whole" / "sga_mlp.pth").read_bytes()


def test_a_broken_checkpoint_gives_one_line_and_is_not_touched(made, run_here, refused):
    path = made / "checkpoint.pth"
    for content in (path.read_bytes()[:1000], b""):
        path.write_bytes(content)
        refused(run_here(SCRIPT, *TINY, "--resume"), "checkpoint.pth")
        assert path.read_bytes() == content


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_running(tmp_path, run_script,
                                                                          run_here, refused):
    first = RunFolder(tmp_path / "run")
    (tmp_path / "run" / ".x.abcd1234.tmp").write_text("the first one is writing this")
    refused(run_script(SCRIPT, *TINY), "another run", "run")
    refused(run_here(SCRIPT, *TINY, "--resume"), "another run", "run")
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", ".x.abcd1234.tmp"]
    del first
    gc.collect()
    assert run_here(SCRIPT, *TINY).returncode == 0
    assert not (tmp_path / "run" / ".x.abcd1234.tmp").exists()


# ------------------------------------------------------------------ whole files or none

@pytest.fixture
def disk_of():
    """disk_of(n): from now on files of more than n bytes cannot be written; None: no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if n is None else n, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_the_old_file_survives_and_no_temporary_file_is_left(tmp_path, disk_of):
    path = tmp_path / "checkpoint.pth"
    save_pth(path, torch.arange(10))
    before = path.read_bytes()
    disk_of(10_000)
    for write in (lambda: save_pth(path, torch.zeros(100_000)),
                  lambda: write_atomic(path, b"x" * 10_001)):
        with pytest.raises(OSError) as error:
            write()
        assert error.value.filename == str(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_run_on_a_full_disk_ends_with_one_line_and_resumes_when_there_is_room(
        run_here, refused, tmp_path, disk_of, monkeypatch):
    assert run_here(SCRIPT, *changed(TINY, save="whole")).returncode == 0
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    real = os.replace

    def replace(old, new):
        real(old, new)
        if os.path.basename(new) == "log.csv":
            disk_of(4000)  # after the first epoch; a checkpoint of this run takes more
    monkeypatch.setattr(os, "replace", replace)
    result = run_here(SCRIPT, *TINY)
    disk_of(None)
    monkeypatch.setattr(os, "replace", real)
    refused(result, "checkpoint.pth")
    assert len(torch.load(checkpoint, weights_only=True)["rows"]) == 1
    assert not list(checkpoint.parent.glob(".*.tmp"))
    assert run_here(SCRIPT, *TINY, "--resume").returncode == 0
    assert (tmp_path / "run" / "sga_mlp.pth").read_bytes() \
        == (tmp_path / "whole" / "sga_mlp.pth").read_bytes()


def test_a_write_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name),
                                                                        real(*a))[1])
    write_atomic(tmp_path / "file", b"content")
    assert done == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_files_of_a_run_have_the_permissions_of_the_umask(tmp_path):
    write_atomic(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_temporary_files_that_a_kill_left_are_removed_and_others_are_not(tmp_path):
    for name in (".checkpoint.pth.ab12_xyz.tmp", ".log.csv.x.tmp", "notes.tmp", "mine.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / ".a.12345678.tmp").mkdir()
    RunFolder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a.12345678.tmp", ".lock", ".log.csv.x.tmp",
                                            "mine.txt", "notes.tmp"]


def test_a_folder_that_cannot_be_written_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):  # root may write anywhere else
        with pytest.raises(UserError, match="cannot write there"):
            RunFolder(path)


# ---------------------------------------------------------------------- what a run writes

def test_the_facts_record_how_the_perturbation_was_made(made):
    facts, preset = json.loads((made / "sga_mlp.json").read_text()), PRESETS["digits"]
    wanted = {"method": "sga", "model_name": ["mlp"], "weights": ["random"], "eps": preset.eps,
              "alpha": preset.alpha, "loss": "ce", "beta": 9.0, "epochs": 2, "batch_size": 250,
              "minibatch": 10, "iter": 4, "momentum": 0.0, "target": None, "augment": False,
              "seed": 0, "num_images": 60, "skipped": [], "kind": "digits", "shape": [1, 28, 28],
              "amp": "off", "layout": "contiguous", "torch": torch.__version__}
    assert {key: facts[key] for key in wanted} == wanted
    listing = (made / "images.txt").read_bytes()
    assert facts["images_sha256"] == hashlib.sha256(listing).hexdigest()
    first, *names = listing.decode().splitlines()
    assert first == "# 28 pixels" and len(names) == 60 and names[0] == "train/0"
    assert {"device", "seconds", "commit", "torchvision", "python"} <= facts.keys()
    assert facts["device"].startswith("cpu") and facts["seconds"] >= 0
    assert facts["on_training_images"]["mlp"]["fooling_ratio"]["n"] == 60


def test_the_facts_name_the_weights_file_and_its_hash(run_here, tmp_path):
    save_pth(tmp_path / "own.pth", build_small("mlp", 1, 28).state_dict())
    assert run_here(SCRIPT, *changed(TINY, weights="own.pth")).returncode == 0
    digest = hashlib.sha256((tmp_path / "own.pth").read_bytes()).hexdigest()
    facts = json.loads((tmp_path / "run" / "sga_mlp.json").read_text())
    assert facts["weights"] == [f"own.pth sha256 {digest[:16]}"]


def test_the_log_has_a_header_and_one_row_per_epoch_with_the_printed_values(run_here, tmp_path):
    result = run_here(SCRIPT, *TINY, "--target", 3)
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert set(lines[0].split(",")) == {"epoch", "loss", "fooling_ratio", "targeted_success",
                                        "seconds", "images_per_s"}
    assert len(lines) == 3
    printed = [line for line in result.stdout.splitlines() if line.startswith("epoch")]
    for row, line in zip(rows(tmp_path / "run"), printed, strict=True):
        assert line.split()[1] == f"{row.pop('epoch')}/2"
        assert line.endswith("  ".join(f"{key} {float(row[key]):.4g}" for key in row))


def test_the_logged_fooling_ratio_belongs_to_the_saved_perturbation(made):
    delta = torch.load(made / "sga_mlp.pth", weights_only=True)
    model = load_model("mlp", weights="random", kind="digits")
    x = open_images("digits", split="train").prepared(28, 60).pixels / 255
    changed_class = model(x).argmax(1) != model((x + delta).clamp(0, 1)).argmax(1)
    share = json.loads((made / "sga_mlp.json").read_text())[
        "on_training_images"]["mlp"]["fooling_ratio"]
    assert share["k"] == changed_class.sum().item()
    watched = changed_class[sga_run.watched(60, 4 * 60)].float().mean().item()
    assert float(rows(made)[-1]["fooling_ratio"]) == pytest.approx(watched, abs=1e-6)


def test_the_targeted_success_counts_images_that_were_not_the_target_before(run_here, tmp_path):
    model = load_model("mlp", kind="digits", data_dir="digits")
    x = open_images("digits", split="train").prepared(28, 60).pixels / 255
    before, target = model(x).argmax(1), 3
    result = run_here(SCRIPT, *changed(TINY, weights="V1", epochs=8, target=target))
    assert result.returncode == 0, result.stderr
    folder, name = tmp_path / "run", f"sga_mlp_target{target}"
    after = model((x + torch.load(folder / f"{name}.pth", weights_only=True)).clamp(0, 1)).argmax(1)
    pairs = [(b, a) for b, a in zip(before.tolist(), after.tolist(), strict=True) if b != target]
    shares = json.loads((folder / f"{name}.json").read_text())["on_training_images"]["mlp"]
    assert 0 < len(pairs) < 60
    assert shares["targeted_success"]["n"] == len(pairs)
    assert shares["targeted_success"]["k"] == sum(a == target for _, a in pairs) > 0
    assert shares["fooling_ratio"]["n"] == 60


def test_the_perturbation_is_a_plain_tensor_within_eps_that_anybody_can_load(made):
    delta = torch.load(made / "sga_mlp.pth", weights_only=True)
    assert type(delta) is torch.Tensor and delta.dtype == torch.float32
    assert delta.shape == (1, 28, 28) and delta.is_contiguous() and not delta.requires_grad
    assert 0 < delta.abs().max() <= PRESETS["digits"].eps + 1e-7


def test_the_png_of_a_run_holds_its_perturbation_to_8_bits(made):
    delta = torch.load(made / "sga_mlp.pth", weights_only=True)
    again, _ = draw.decode_delta(made / "sga_mlp.png")
    assert again.shape == delta.shape
    assert (again - delta).abs().max() <= 0.5 / 255 + 1e-6


def test_a_folder_on_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", flock)
    assert RunFolder(tmp_path / "run").path.is_dir()
    (tmp_path / "run" / ".log.csv.abcdefgh.tmp").write_text("")
    assert "abcdefgh" in str(os.listdir(RunFolder(tmp_path / "run").path))  # may be another's


def test_a_file_is_written_where_modes_cannot_be_changed(tmp_path, monkeypatch):
    def chmod(*args):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "chmod", chmod)
    write_atomic(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
