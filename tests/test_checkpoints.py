"""Checkpoints within a pass: when they are taken, and that a run killed after any of them ends with
the bytes of an uninterrupted one: all trainings, all kinds of random numbers, several processes."""

import csv
import gc
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import SRC
from torch import nn

from utils import loop, passes
from utils.data import load, open_images
from utils.errors import UserError
from utils.loop import Trainer
from utils.run import RunFolder, load_pth
from utils.team import Team

CPU = torch.device("cpu")
ALWAYS = ("--checkpoint_minutes", 1e-9)  # after every minibatch


class Killed(BaseException):
    """Stands for SIGKILL: the script must not catch it."""


def rows(path):
    """log.csv without timings."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")}
                for row in csv.DictReader(file)]


class Walk(Trainer):
    """Eight minibatches per pass, four minutes each; each of them is a random step."""

    def __init__(self, now=None, **more):
        self.layer, self.generator = nn.Linear(1, 1, bias=False), torch.Generator().manual_seed(5)
        self.now = now or SimpleNamespace(minutes=0)
        nn.init.zeros_(self.layer.weight)
        super().__init__(CPU, steps=8, keep={
            "net": self.layer, "generator": self.generator}, **more)

    def one_pass(self, bar):
        self.sums = torch.zeros(2)
        order = torch.randperm(8, generator=self.generator)
        for k in self.minibatches(order[self.skip:]):
            with torch.no_grad():
                self.layer.weight += k * torch.randn((), generator=self.generator)
                self.layer.weight += torch.rand(())
            self.sums += torch.stack([self.layer.weight.detach().sum(), torch.ones(())])
            self.now.minutes += 4
            bar.update()
        loss, count = self.sums.tolist()
        return {"loss": loss, "count": count}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def saved(monkeypatch):
    """(rows, minibatches done in the current pass) of every checkpoint, in order."""
    found, real = [], loop.save_pth
    monkeypatch.setattr(loop, "save_pth", lambda path, value: (
        found.append((len(value["rows"]), value.get("inside", {}).get("at", 0))),
        real(path, value)))
    return found


def walked(walk, folder, epochs=2, minutes=10):
    now = walk.now
    loop.loop(walk, epochs, folder, {}, minutes=minutes, clock=lambda: 60 * now.minutes)
    return walk


# ------------------------------------------------------------------------- when

def test_a_checkpoint_follows_the_first_minibatch_after_the_given_minutes(folder, saved):
    walked(Walk(), folder)
    assert saved == [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]


def test_zero_minutes_mean_checkpoints_only_after_each_pass(folder, saved):
    walked(Walk(), folder, minutes=0)
    assert saved == [(1, 0), (2, 0)]


def test_without_a_folder_no_checkpoint_is_taken(saved):
    assert len(walked(Walk(), None).rows) == 2 and not saved


def test_several_processes_ask_the_first_one_now_and_then(folder, saved, monkeypatch):
    asked = []
    monkeypatch.setattr(Team, "everyone", lambda self, value: [value] * 2)
    monkeypatch.setattr(Team, "first_says", lambda self, flag: asked.append(flag) or flag)
    monkeypatch.setattr(Walk, "asked", 4)
    walked(Walk(team=Team(0, 2)), folder)
    assert asked == [True] * 4 and saved == [(0, 4), (0, 8), (1, 0), (1, 4), (1, 8), (2, 0)]


def test_only_the_clock_of_the_first_process_decides(folder, saved, monkeypatch):
    monkeypatch.setattr(Team, "everyone", lambda self, value: [value] * 2)
    monkeypatch.setattr(Team, "first_says", lambda self, flag: False)
    monkeypatch.setattr(Walk, "asked", 1)
    walked(Walk(team=Team(0, 2)), folder)
    assert saved == [(1, 0), (2, 0)]


def test_the_seconds_of_a_pass_exclude_its_checkpoints(folder, monkeypatch):
    seconds, real = SimpleNamespace(now=0.0), loop.save_pth
    monkeypatch.setattr(loop.time, "perf_counter", lambda: seconds.now)

    def slow(path, value):
        real(path, value)
        seconds.now += 1000
    monkeypatch.setattr(loop, "save_pth", slow)
    assert [row["seconds"] for row in walked(Walk(), folder).rows] == [0, 0]


# ------------------------------------------------------------------------- resuming

def killed_at(monkeypatch, count):
    """Kill the run once it has written the count-th checkpoint within a pass."""
    real, left = loop.save_pth, [count]

    def save(path, value):
        real(path, value)
        left[0] -= "inside" in value
        if "inside" in value and not left[0]:
            raise Killed
    monkeypatch.setattr(loop, "save_pth", save)


def test_a_run_killed_after_any_checkpoint_takes_the_same_steps(tmp_path, monkeypatch):
    torch.manual_seed(3)
    whole = walked(Walk(), RunFolder(tmp_path / "whole"), minutes=4)
    for at in range(1, 17):
        torch.manual_seed(3)
        part = RunFolder(tmp_path / f"killed{at}")
        with monkeypatch.context() as patch:
            killed_at(patch, at)
            with pytest.raises(Killed):
                walked(Walk(), part, minutes=4)
        torch.manual_seed(99)  # another process has other random numbers
        again = Walk()
        again.resume(part.load_checkpoint({}, resume=True, overwrite=False), part)
        assert (len(again.rows), again.skip) == ((at - 1) // 8, (at - 1) % 8 + 1)
        walked(again, part)
        assert torch.equal(again.layer.weight, whole.layer.weight)
        assert rows(part / "log.csv") == rows(tmp_path / "whole" / "log.csv")


def test_the_seconds_of_a_pass_include_those_before_a_kill(folder, monkeypatch):
    seconds = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: seconds.now)

    class Timed(Walk):
        def minibatches(self, left):
            for one in super().minibatches(left):
                seconds.now += 2
                yield one
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(Killed):
            walked(Timed(), folder, 1)
    seconds.now += 500
    again = Timed()
    again.resume(folder.load_checkpoint({}, resume=True, overwrite=False), folder)
    assert walked(again, folder, 1).rows[0]["seconds"] == 16


def test_a_checkpoint_from_an_older_version_can_be_resumed(folder):
    whole = walked(Walk(), folder, 1)
    state = load_pth(folder / "checkpoint.pth")
    del state["random"]
    again = Walk()
    again.resume(state, folder)
    assert torch.equal(again.layer.weight, whole.layer.weight)
    assert torch.equal(again.generator.get_state(), whole.generator.get_state())


def stopped(folder, at=1):
    """The checkpoint of a run killed after its at-th checkpoint within a pass."""
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, at)
        with pytest.raises(Killed):
            walked(Walk(), folder)
    return load_pth(folder / "checkpoint.pth")


@pytest.mark.parametrize(("key", "value"), [
    ("at", None), ("at", 0), ("at", -1), ("at", 2.0), ("seconds", "x"), ("seconds", -1.0),
    ("sums", []), ("sums", [3]), ("begun", {}), ("begun", {"generator": torch.zeros(3)})], ids=str)
def test_damaged_progress_within_a_pass_is_refused(folder, key, value):
    state = stopped(folder)
    state["inside"][key] = value
    with pytest.raises(UserError, match="checkpoint.pth: damaged"):
        Walk().resume(state, folder)


def test_a_loss_that_is_not_finite_is_never_saved_in_a_checkpoint(folder):
    class Broken(Walk):
        def minibatches(self, left):
            for one in super().minibatches(left):
                yield one
                self.sums[0] += float("nan") if self.at == 3 else 0
    with pytest.raises(UserError, match="epoch 1: the loss is nan.*last checkpoint is kept"):
        walked(Broken(), folder)
    assert load_pth(folder / "checkpoint.pth")["inside"]["at"] == 3


def test_a_run_cannot_end_before_the_pass_that_it_has_begun(folder):
    stopped(folder, 3)
    flags = {"epochs": 1}
    state = load_pth(folder / "checkpoint.pth")
    assert len(state["rows"]) == 1
    loop.save_pth(folder / "checkpoint.pth", state | {"flags": {"epochs": 2}})
    with pytest.raises(UserError, match="has begun 2; type --epochs 2"):
        folder.load_checkpoint(flags, resume=True, overwrite=False, grows=True)
    assert folder.load_checkpoint({"epochs": 3}, resume=True, overwrite=False, grows=True)


# ------------------------------------------------------------- minibatches of images

def test_skipped_minibatches_draw_the_same_numbers_and_are_not_decoded(tmp_path, picture,
                                                                       monkeypatch):
    for k in range(9):
        picture(tmp_path / "abc"[k % 3] / f"{k}.png", 40, 40, seed=k)
    images, read = open_images(str(tmp_path), split="train").prepared(32, None), []
    real = passes.read_rgb
    monkeypatch.setattr(passes, "read_rgb", lambda path: read.append(path) or real(path))

    def found(skip):
        generator = torch.Generator().manual_seed(1)
        read.clear()
        got = list(passes.one_pass(images, 2, generator, Team(), vary=True, smallest=1, workers=0,
                                   skip=skip))
        return got, len(read), generator.get_state()
    whole, _, after = found(0)
    for skip in (1, 4, 5):
        left, decoded, state = found(skip)
        assert torch.equal(state, after) and decoded == max(0, 9 - 2 * skip)
        assert len(left) == len(whole[skip:]) == 5 - skip
        for mine, theirs in zip(left, whole[skip:], strict=True):
            assert mine[0] == theirs[0] and all(map(torch.equal, mine[1:], theirs[1:]))


def test_a_pass_draws_everything_before_its_first_minibatch():
    images, generator = load(open_images("digits", split="train").prepared(28, 20),
                             workers=0), torch.Generator()
    made = passes.one_pass(images, 5, generator, Team(), vary=True, smallest=1, workers=0)
    after = generator.get_state()
    list(made)
    assert torch.equal(generator.get_state(), after)


# ------------------------------------------------------------------------- the scripts

SGA = ("--num_images", 60, "--batch_size", 25, "--epochs", 2, "--weights", "random", "--model_name",
       "mlp", "--amp", "off", "--layout", "contiguous", "--device", "cpu")
FREE = ("--model_name", "mlp", "--num_images", 150, "--replays", 2, "--device", "cpu", "--workers",
        0)
STAGE = ("--num_images", 80, "--epochs", 2, "--batch_size", 30, "--device", "cpu", "--workers", 0)
TASK = ("--num_images", 120, "--batch_size", 50, "--epochs", 2, "--eval_images", 20, "--queries", 5,
        "--device", "cpu")
PHOTOS = ("--data_dir", "photos", "--image_size", 32, "--model_name", "cnn_bn", "--num_images", 20,
          "--batch_size", 8, "--device", "cpu")
RUNS = {
    "sga": ("train_sga.py", *SGA),
    "sga, momentum, diversity": ("train_sga.py", *SGA, "--momentum", 0.9, "--augment"),
    "sga, features": ("train_sga.py", *SGA, "--model_name", "cnn", "--loss", "feature"),
    "sga, features, random defence": (
        "train_sga.py", *SGA, "--model_name", "cnn", "--preset", "transfer", "--iter", 2,
        "--defense", "resizepad"),
    "spgd": ("train_sga.py", *SGA, "--method", "spgd"),
    "adam": ("train_sga.py", *SGA, "--method", "adam", "--loss", "cosine"),
    "dm": ("train_sga.py", *SGA, "--method", "dm"),
    "sga, random defence": ("train_sga.py", *SGA, "--defense", "gcm+resizepad", "--bpda"),
    "free": ("free_at.py", *FREE, "--epochs", 4, "--guard", "stop"),
    "free in an odd number of steps": ("free_at.py", *FREE, "--weight_steps", 9),
    "natural": ("free_at.py", *FREE, "--method", "natural", "--epochs", 2),
    "pgd": ("free_at.py", *FREE, "--method", "pgd", "--epochs", 2),
    "fast": ("free_at.py", *FREE, "--method", "fast", "--epochs", 2),
    "dropout": ("free_at.py", *FREE, "--model_name", "drop.py:network", "--method", "natural",
                "--epochs", 2),
    "fp16": ("free_at.py", *FREE, "--epochs", 4, "--amp", "fp16", "--model_name", "cnn_bn",
             "--guard", "off"),
    "crops": ("free_at.py", *PHOTOS, "--epochs", 2, "--replays", 1, "--workers", 1),
    "stage 1": ("train_gcm.py", *STAGE, "--ema", 0.9),
    "stage 2": ("train_gcm.py", *STAGE, "--stage", 2, "--pretrained", "random", "--augment",
                "impulse_noise,rotation,glass_blur", "--p", 0.3, "--head", "ml_decoder"),
    "stage 1, crops": ("train_gcm.py", *PHOTOS, "--epochs", 2, "--workers", 0),
    "noise": ("fgsm_mnist.py", *TASK, "--train", "noise", "--batch_norm"),
    "fgv": ("fgsm_mnist.py", *TASK, "--train", "fgv", "--label", "predicted")}
DROP = """
from torch import nn


def network(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Dropout(0.5),
                         nn.Linear(50, num_classes))
"""


def result(folder):
    """What a run writes, without timings: networks, perturbations and the rows of log.csv."""
    return {str(path.relative_to(folder)): rows(path) if path.suffix == ".csv" else
            path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.name == "log.csv" or path.suffix == ".pth" and path.stem != "checkpoint"}


@pytest.fixture
def photos(tmp_path, picture):
    (tmp_path / "drop.py").write_text(DROP)
    for k in range(24):
        picture(tmp_path / "photos" / "abcd"[k % 4] / f"{k}.png", 40, 40, seed=k)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_after_every_minibatch_ends_with_the_same_bytes(run_here, tmp_path, photos,
                                                                     name):
    script, *flags = RUNS[name]
    torch.manual_seed(1)
    done = run_here(script, *flags, "--save", "whole")
    assert done.returncode == 0, done.stderr
    torch.manual_seed(2)  # another process has other random numbers for dropout
    flags, kills, more = (*flags, *ALWAYS, "--save", "killed"), 0, ()
    while True:
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, 1)
            try:
                done = run_here(script, *flags, *more)
                break
            except Killed:
                kills += 1
        gc.collect()
        more = ("--resume",)
        torch.manual_seed(kills)
    assert done.returncode == 0, done.stderr
    assert kills >= 4 and len(rows(next((tmp_path / "killed").rglob("log.csv")))) == 2
    whole = result(tmp_path / "whole")
    assert len(whole) >= 2 and result(tmp_path / "killed") == whole


KILLS_ITSELF = """
import os, runpy, signal, sys
sys.path.insert(0, sys.argv[1])
from utils import loop
real = loop.save_pth


def save(path, value):
    real(path, value)
    if value.get("inside", {}).get("at") == 2 and len(value["rows"]) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


loop.save_pth = save
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["sga, random defence", "dropout"])
def test_a_run_killed_by_signal_9_within_a_pass_can_be_resumed(run_script, tmp_path, photos, name):
    script, *flags = RUNS[name]
    assert run_script(script, *flags, "--save", "whole").returncode == 0
    killed = subprocess.run(
        [sys.executable, "-c", KILLS_ITSELF, str(SRC), str(SRC / script),
         *map(str, (*flags, *ALWAYS, "--save", "killed"))],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(rows(tmp_path / "killed" / "log.csv")) == 1
    done = run_script(script, *flags, "--save", "killed", "--resume")
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


# Run by two processes in one launch; arguments: src, a list of [script, flags].
TOGETHER = """
import gc, importlib, json, sys
import torch

sys.path.insert(0, sys.argv[1])
from utils import loop
from utils.team import Team, join_team

team, cpu = join_team(torch.device("cpu"))
leave, Team.leave = Team.leave, lambda self: None  # one group of processes for all runs
loop.Trainer.asked, real, kept = 1, loop.Between.__call__, []


def train(script, *flags):
    module = importlib.import_module(script)
    module.join_team = lambda device: (team, device)
    sys.argv = [script, *map(str, flags)]
    try:
        module.main(module.get_args())
    except KeyboardInterrupt:
        pass
    gc.collect()
    torch.distributed.barrier()


def dies(self):
    real(self)
    kept.append(1)
    if len(kept) == 4:
        raise KeyboardInterrupt


for script, flags in json.loads(sys.argv[2]):
    train(script, *flags, "--save", script + "/whole")
    loop.Between.__call__ = dies
    train(script, *flags, "--save", script + "/killed", "--checkpoint_minutes", "1e-9")
    loop.Between.__call__ = real
    kept.clear()
    train(script, *flags, "--save", script + "/killed", "--resume")
leave(team)
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    (folder / "together.py").write_text(TOGETHER)
    runs = [["free_at", [*FREE, "--method", "fast", "--epochs", 2]],
            ["train_gcm", [*STAGE, "--defense", "gcm+resizepad", "--head", "ml_decoder"]]]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "together.py", str(SRC), json.dumps(runs)], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", ["free_at", "train_gcm"])
def test_two_processes_resume_within_a_pass_each_with_its_own_random_numbers(together, script):
    whole, killed = (result(together / script / name) for name in ("whole", "killed"))
    assert len(whole) >= 2 and whole == killed
