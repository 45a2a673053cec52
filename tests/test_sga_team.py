"""train_sga.py in several processes: the bytes of one process, and seeds that processes share."""

import argparse
import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import SRC

from utils import sga_team
from utils.attack.chance import numbered
from utils.cli import numbers
from utils.errors import UserError
from utils.run import load_pth, settled
from utils.team import Team

PLAIN = ("--num_images", 130, "--batch_size", 60, "--epochs", 2, "--weights", "random", "--amp",
         "off", "--layout", "contiguous", "--device", "cpu", "--workers", 0)
TINY = (*PLAIN, "--minibatch", 20, "--iter", 2)  # of sga
JOBS = {  # of two processes; 130 images are batches of 60, 60, 10: two chunks, two, one
    "two": ("--model_name", "mlp,cnn", *TINY),
    "three": ("--model_name", "mlp,cnn,lenet", *TINY, "--momentum", 0.9, "--augment"),
    "compared": ("--model_name", "mlp,cnn", *TINY, "--loss", "cosine"),
    "spgd": ("--model_name", "mlp", *PLAIN, "--method", "spgd"),
    "adam": ("--model_name", "mlp", *PLAIN, "--method", "adam"),
    "spgd of two": ("--model_name", "cnn,mlp", *PLAIN, "--method", "spgd"),
    "resized": ("--model_name", "mlp,cnn", *TINY, "--defense", "resizepad"),
    "resized, spgd": ("--model_name", "mlp", *PLAIN, "--method", "spgd", "--loss", "cosine",
                     "--defense", "gcm+resizepad", "--bpda"),
    "seeds": ("--model_name", "mlp", *TINY, "--seed", "0,1,2")}
TOGETHER = """
import json, sys
import torch

src, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, src)
import train_sga
from utils.team import Team, join_team

team, device = join_team(torch.device("cpu"))
leave, Team.leave = Team.leave, lambda self: None  # one group of processes for all jobs
train_sga.join_team = lambda device: (team, device)


def train(name, flags):
    sys.argv = ["train_sga.py", *flags, "--save", name]
    train_sga.main(train_sga.get_args())


class Killed(Exception):
    pass


def killed(self, bar):
    if self.rows:
        raise Killed
    return real(self, bar)


for name, flags in jobs.items():
    train(name, flags)
real, train_sga.SgaTraining.one_pass = train_sga.SgaTraining.one_pass, killed
try:
    train("killed", jobs["two"])
except Killed:
    train_sga.SgaTraining.one_pass = real
import gc; gc.collect()  # the lock of the folder
train("killed", jobs["two"] + ["--resume"])
leave(team)
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder with the files of two processes."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "together.py").write_text(TOGETHER)
    jobs = {name: [str(flag) for flag in flags] for name, flags in JOBS.items()}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "together.py", str(SRC), json.dumps(jobs)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def left(folder):
    """The perturbation, the image list, and log.csv without timings."""
    path, = (path for path in folder.glob("*.pth") if path.stem != "checkpoint")
    assert load_pth(path).abs().max() > 0.1
    with open(folder / "log.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")}
                for row in csv.DictReader(file)]
    return path.name, path.read_bytes(), (folder / "images.txt").read_bytes(), rows


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if name != "seeds"])
def test_two_processes_give_the_same_bytes_as_one(name, together, run_here, tmp_path):
    done = run_here("train_sga.py", *JOBS[name], "--save", name)
    assert done.returncode == 0, done.stderr
    assert left(tmp_path / name) == left(together / name)
    if name == "two":
        assert left(tmp_path / name) == left(together / "killed")


@pytest.mark.slow
def test_processes_share_the_seeds_and_each_result_is_that_of_its_seed(together, run_here,
                                                                       tmp_path):
    found = [left(together / "seeds" / f"seed{k}") for k in range(3)]
    assert len({delta for _, delta, *_ in found}) == 3
    flags = JOBS["seeds"][:-1]
    done = run_here("train_sga.py", *flags, 1, "--save", "alone")
    assert done.returncode == 0, done.stderr
    assert left(tmp_path / "alone") == found[1]
    facts = json.loads(next((together / "seeds/seed2").glob("sga_*.json")).read_text())
    assert facts["seed"] == 2


def test_one_process_runs_several_seeds_in_turn(run_here, tmp_path):
    done = run_here("train_sga.py", "--model_name", "mlp", *TINY, "--epochs", 1, "--seed", "4,7",
                    "--save", "out")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"seed4", "seed7"}
    assert "seed7 epoch   1/1" in done.stdout
    again = run_here("train_sga.py", "--model_name", "mlp", *TINY, "--epochs", 1, "--seed", "4,7,8",
                     "--save", "out", "--resume")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out/seed8").exists()


def test_one_command_covers_surrogates_and_targets_each_as_if_alone(run_here, tmp_path):
    flags = (*TINY, "--loss", "logit")
    done = run_here("train_sga.py", "--model_name", "mlp", "cnn,mlp", *flags, "--target", "3,5",
                    "--save", "out")
    assert done.returncode == 0, done.stderr
    assert {str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.glob(
        "out/*/*/log.csv")} == {f"{name}/target{k}" for name in ("mlp", "cnn+mlp") for k in (3, 5)}
    assert "cnn+mlp target5 epoch   1/" in done.stdout
    late = run_here("train_sga.py", "--model_name", "cnn", "mlp", *TINY, "--loss", "feature",
                    "--save", "late")
    assert late.returncode == 2 and "mlp has no feature map" in late.stderr
    assert not list(tmp_path.glob("late/*/checkpoint.pth"))
    alone = run_here("train_sga.py", "--model_name", "cnn,mlp", *flags, "--target", 5, "--save",
                     "alone")
    assert alone.returncode == 0, alone.stderr
    assert left(tmp_path / "alone") == left(tmp_path / "out/cnn+mlp/target5")


def test_processes_share_the_perturbations_of_a_command():
    plans = [(settled(type("Args", (), {})(), seed=[0, 1], target=[3, 5], model_name=[name]),
              None, []) for name in "ab"]
    names = [name for rank in range(3) for name in (
        " ".join(job.apart.values()) for job in sga_team.jobs_of(plans, Team(rank, 3)))]
    assert sorted(names) == [f"{name} target{target} seed{seed}" for name in "ab"
                             for target in (3, 5) for seed in (0, 1)]


# ------------------------------------------------------------------ what is shared

class Part(Team):
    """One of several processes; `everything`: what all of them have, or None."""
    everything = None

    def all(self, x):
        self.__dict__["mine"] = x.clone()
        return self.everything or [x] * self.size


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_each_process_does_its_work_and_all_get_all_results_in_order(count):
    delta, done, parts = torch.zeros(1, 2, 2, 2), [], []

    def work(k):
        done.append(k)
        return torch.tensor(float(k)), torch.arange(8.0).view_as(delta) + k
    works = [lambda k=k: work(k) for k in range(count)]
    wanted = sga_team.gathered(Team(), works, delta)
    for rank in range(3):
        done.clear()
        sga_team.gathered(team := Part(rank, 3), works, delta)
        assert done == list(range(rank, count, 3))
        parts.append(team.mine)
    team.__dict__["everything"] = parts
    found = sga_team.gathered(team, works, delta)
    assert len(found) == count
    for one, other in zip(found, wanted, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_process_without_images_still_takes_part():
    x = torch.zeros(60, 1, 2, 2, dtype=torch.uint8)  # two blocks

    class Others(Team):
        def everyone(self, value):
            assert value.shape == (1, 0)
            return [torch.full((1, 50), 1), torch.full((1, 10), 2), value]
    found = sga_team.predicted(Others(2, 3), [torch.nn.Flatten()], x, torch.device("cpu"),
                               chance=numbered(0, len(x)))
    assert found.tolist() == [[1] * 50 + [2] * 10]


@pytest.mark.parametrize(("names", "method", "size", "words"), [
    (["a"], "sga", 2, "2 processes for one perturbation on 1 surrogate"),
    (["a"], "dm", 2, "2 processes for one perturbation on 1 surrogate"),
    (["a", "b"], "sga", 3, "3 processes for one perturbation on 2 surrogate"),
    (["a", "b"], "spgd", 3, "3 processes for one perturbation on 2 surrogate")])
def test_work_that_processes_cannot_share_is_refused(names, method, size, words):
    s = settled(type("Args", (), {})(), seed=[3], target=None, model_name=names, method=method)
    with pytest.raises(UserError, match=words):
        sga_team.jobs_of([(s, None, [])], Team(0, size))
    job, = sga_team.jobs_of([(s, None, [])], Team())
    assert job.s.seed == 3 and job.s.target is None and job.team.size == 1 and job.apart == {}


@pytest.mark.parametrize(("batch_size", "images", "size"), [(50, 400, 2), (250, 100, 3)])
def test_a_process_without_a_chunk_of_spgd_is_refused(batch_size, images, size):
    s = settled(type("Args", (), {})(), seed=[3], target=None, model_name=["a"], method="spgd",
                batch_size=batch_size)
    plan = (s, range(images), [])
    with pytest.raises(UserError, match=f"{size} processes for batches of {size - 1} chunk"):
        sga_team.jobs_of([plan], Team(0, size))
    assert sga_team.jobs_of([plan], Team(0, size - 1))[0].team.size == size - 1


@pytest.mark.parametrize("text", ["1,1", "-1", "a", "", "0,99999999999999999999"])
def test_seeds_and_targets_are_different_whole_numbers(text):
    assert numbers("3") == [3] and numbers("3, 1") == [3, 1]
    with pytest.raises(argparse.ArgumentTypeError, match="type|out of range"):
        numbers(text)
