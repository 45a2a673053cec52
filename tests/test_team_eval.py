"""Evaluations by several processes: the same results as one, even when killed and continued."""

import csv
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SRC
from PIL import Image

from utils import cells, measure, models
from utils.attack.chance import numbered
from utils.cache import cached
from utils.cells import Progress, added, decode_once, shared
from utils.data import open_images
from utils.errors import UserError
from utils.nets import build_small
from utils.reading import stack
from utils.run import save_json, save_pth
from utils.team import Team, join_team

CPU = torch.device("cpu")
JOBS = {  # folder: script and flags; 5 batches, 4, 4, 3, 5, one alone, and 4
    "gcm": ("gcm.py", "--model_name", "mlp", "--num_images", 30, "--batch_size", 7, "--attacks",
            "fgsm", "pgd_linf", "--defense", "gcm+resizepad", "--draws", 2, "--low", 14),
    "audit": ("gcm.py", "--model_name", "mlp", "--num_images", 16, "--batch_size", 5, "--audit",
              "--queries", 20),
    "net": ("eval_net.py", "--model_name", "mlp", "--num_images", 20, "--batch_size", 6,
            "--attacks", "fgsm", "pgd20", "strongest_quick", "--queries", 10, "--uaps", "a.pth"),
    "extras": ("eval_net.py", "--data_dir", "photos", "--model_name", "mlp", "lenet", "--weights",
               "mlp.pth", "lenet.pth", "--batch_size", 3, "--attacks", "fgsm", "--eps_curve",
               "--transfer", "--diverse", "--save_images", "kept", "--corruptions", "--cache",
               "cache"),
    "predict": ("eval_net.py", "--model_name", "mlp", "--num_images", 30, "--batch_size", 7,
                "--predict"),
    "one batch": ("gcm.py", "--model_name", "mlp", "--num_images", 8, "--attacks", "pgd_linf"),
    "uap": ("eval_uap.py", "--model_name", "mlp", "--num_images", 30, "--batch_size", 8,
            "--defense", "resizepad", "--uaps", "a.pth", "b.pth"),
}
KILLED = {"gcm": 14, "net": 7, "uap": 2}  # after how many saved batches
VARIES = ("seconds", "commit", "processes", "path")  # between equal runs

# Run by the processes of one launch: every job of a list, one after another.
TOGETHER = """
import gc, importlib, json, sys, threading
import torch

src, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, src)
from utils.team import Team, join_to_count

team, cpu = join_to_count(torch.device("cpu"))
leave, Team.leave = Team.leave, lambda self: None  # one group of processes for all jobs
for name, (script, *flags) in jobs.items():
    module = importlib.import_module(script.removesuffix(".py"))
    module.join_to_count = lambda device: (team, device)
    sys.argv = [script, *flags, "--save", name]
    module.main(module.get_args())
    gc.collect()
    torch.distributed.barrier()
leave(team)
"""


def text(job):
    return [*map(str, job), "--device", "cpu", "--workers", "0"]


def leave_uaps(folder):
    for seed, name in enumerate("ab"):
        coarse = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(seed)) - 0.5
        blocks = coarse.sign().repeat_interleave(4, 1).repeat_interleave(4, 2)
        save_pth(folder / f"{name}.pth", 0.19 * blocks)


def leave_photographs(folder):
    """Photographs of two classes, and networks that get half of them right."""
    for i in range(8):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        path = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((32, 32), Image.BICUBIC).save(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("mlp", "lenet"):
            save_pth(folder / f"{name}.pth", build_small(name, 3, 32, 2).state_dict())
            save_json(folder / f"{name}.json", {  # as after a training at that size
                "image_size": 32, "head": "own", "classes": ["a", "b"]})


def launch(folder, processes, jobs):
    """Run the jobs by torchrun, in the folder."""
    (folder / "together.py").write_text(TOGETHER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(processes), "together.py", str(SRC),
         json.dumps({name: text(job) for name, job in jobs.items()})],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def bare(value):
    """A value of results.json without the fields that differ between equal runs."""
    if isinstance(value, dict):
        return {key: bare(part) for key, part in value.items() if key not in VARIES}
    return [bare(part) for part in value] if isinstance(value, list) else value


def left(folder):
    """{file: content} of an evaluation, without the seconds in tables of attacks."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            found[path.name] = bare(json.loads(path.read_text()))
        elif path.suffix in (".md", ".csv", ".txt", ".npz"):
            found[path.name] = path.read_bytes()
    if b"seconds" in found.get("results.csv", b""):
        with open(folder / "results.csv", newline="") as file:
            found["results.csv"] = bare(list(csv.DictReader(file)))
        found["results.md"] = [line.rpartition(" | ")[0] if line.startswith("| mlp") else line
                               for line in (folder / "results.md").read_text().splitlines()]
    return found


class Killed(BaseException):
    """Stands for SIGKILL: the script must not catch it."""


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder with the results of one process, and of runs that were killed halfway."""
    from utils.cli import run_script as entry

    folder, patch = tmp_path_factory.mktemp("one"), pytest.MonkeyPatch()
    leave_uaps(folder)
    leave_photographs(folder)
    patch.chdir(folder)
    for name, job in JOBS.items():
        _run(patch, entry, job, name)
    patch.setattr(cells, "EVERY", 0)
    real = Progress._keep
    for name, after in KILLED.items():
        kept = []

        def killing(self, key, now, after=after, kept=kept):
            real(self, key, now)
            kept.append(key)
            if len(kept) - kept.count(None) == after:
                raise Killed
        patch.setattr(Progress, "_keep", killing)
        with pytest.raises(Killed):
            _run(patch, entry, JOBS[name], f"killed {name}")
        assert (folder / f"killed {name}" / "partial.json").is_file()
    patch.undo()
    return folder


def _run(patch, entry, job, save):
    import importlib

    script, *flags = text(job)
    module = importlib.import_module(script.removesuffix(".py"))
    patch.setattr(sys, "argv", [script, *flags, "--save", save])
    try:
        entry(module.get_args, module.main)
    finally:
        gc.collect()  # frees the lock on the run's folder


@pytest.fixture(scope="module", params=[2, 3])
def many(request, one, tmp_path_factory):
    """The same by two and three processes, which also continue the killed runs of one."""
    folder = tmp_path_factory.mktemp(f"by{request.param}")
    leave_uaps(folder)
    leave_photographs(folder)
    for name in KILLED:
        shutil.copytree(one / f"killed {name}", folder / f"killed {name}")
    done = launch(folder, request.param, JOBS | {f"killed {k}": JOBS[k] for k in KILLED})
    return folder, done, request.param


# ------------------------------------------------------------------ the same results

@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_several_processes_give_the_same_results_as_one(one, many, name):
    folder, _, _ = many
    assert left(folder / name) == left(one / name)
    assert {path.name for path in (folder / name).iterdir()} == {
        path.name for path in (one / name).iterdir()}


@pytest.mark.slow
def test_several_processes_save_the_same_images_as_one(one, many):
    saved = [{path.relative_to(folder): path.read_bytes() for path in folder.glob("kept/*/*/*")}
             for folder in (one, many[0])]
    assert saved[0] == saved[1] and len(saved[0]) >= 8
    assert len(list(many[0].glob("cache/*.pixels"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_run_of_one_process_is_continued_by_several(one, many, name):
    folder, _, _ = many
    assert left(folder / f"killed {name}") == left(one / name)
    assert not (folder / f"killed {name}" / "partial.json").exists()


@pytest.mark.parametrize(("rank", "local", "size"), [
    (None, None, ""), (None, None, "1"), ("", "", ""), ("3", "0", None), ("0", "0", "1")])
def test_without_torchrun_a_process_is_alone(rank, local, size, monkeypatch):
    started_with(monkeypatch, rank, local, size)
    assert join_team(torch.device("cpu")) == (Team(), torch.device("cpu"))


@pytest.mark.parametrize(("rank", "local", "size"), [
    (None, None, "2"), ("0", None, "2"), ("a", "0", "2"), (None, None, "many")])
def test_incomplete_variables_of_torchrun_are_refused(rank, local, size, monkeypatch):
    started_with(monkeypatch, rank, local, size)
    with pytest.raises(UserError, match=f"WORLD_SIZE is {size}, .*or unset WORLD_SIZE"):
        join_team(torch.device("cpu"))


def started_with(monkeypatch, *values):
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_the_number_of_processes_is_recorded_and_only_the_first_prints(many):
    folder, done, processes = many
    for cell in json.loads((folder / "gcm" / "results.json").read_text())["cells"].values():
        assert cell["processes"] == processes
    about = json.loads((folder / "uap" / "results.json").read_text())["protocol"]
    assert about["processes"] == processes
    for name in JOBS:
        assert done.stdout.count(f"saved {name}/") == 1


@pytest.mark.slow
def test_the_compared_results_are_not_trivial(one):
    found = json.loads((one / "gcm" / "results.json").read_text())["cells"]
    assert len(found) == 6
    assert any(0 < sum(cell["after"]) < sum(cell["before"]) for cell in found.values())
    assert {0, 1, 2} == {right for cell in found.values() for right in cell["before"]}
    row = json.loads((one / "uap" / "results.json").read_text())["rows"][0]
    assert 0 < row["fooling_ratio"]["k"] < 30 and row["changed_by_chance"]["k"] < 30


# ------------------------------------------------------------------ killed and continued

@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_halfway_resumes_there_and_gives_the_same_results(one, name, tmp_path,
                                                                       monkeypatch):
    from utils.cli import run_script as entry

    shutil.copytree(one / f"killed {name}", tmp_path / name)
    leave_uaps(tmp_path)
    monkeypatch.chdir(tmp_path)
    counted, real = [], Progress._keep
    monkeypatch.setattr(Progress, "_keep", lambda self, key, now: counted.append(key)
                        or real(self, key, now))
    _run(monkeypatch, entry, JOBS[name], name)
    assert left(tmp_path / name) == left(one / name)
    assert not (tmp_path / name / "partial.json").exists()
    again = len(counted) - counted.count(None)
    counted.clear()
    _run(monkeypatch, entry, JOBS[name], "anew")
    assert again + KILLED[name] == len(counted) - counted.count(None)


@pytest.mark.slow
def test_progress_on_other_perturbations_is_not_continued(one, tmp_path, monkeypatch):
    from utils.cli import run_script as entry

    shutil.copytree(one / "killed uap", tmp_path / "uap")
    leave_uaps(tmp_path)
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    monkeypatch.chdir(tmp_path)
    _run(monkeypatch, entry, JOBS["uap"], "uap")
    _run(monkeypatch, entry, JOBS["uap"], "anew")
    assert left(tmp_path / "uap") == left(tmp_path / "anew")


# Run by two processes; one dies at its sixth batch, which for the second is in the second cell.
DYING = """
import os, sys

sys.path.insert(0, sys.argv[1])
from utils import cells
import gcm
from utils.cli import run_script

cells.EVERY, cells.ROUND, real, worked, who = 0, 1, cells._worked, [], sys.argv[2]


def dying(*args):
    worked.append(1)
    if len(worked) == 6 and os.environ["RANK"] == who:
        os._exit(9)
    return real(*args)


cells._worked = dying
sys.argv = ["gcm.py", *sys.argv[3:]]
run_script(gcm.get_args, gcm.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_if_a_process_dies_the_others_say_so_in_one_line_and_the_same_command_continues(
        one, tmp_path, monkeypatch, who):
    from utils.cli import run_script as entry

    (tmp_path / "dying.py").write_text(DYING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [subprocess.Popen(
        [sys.executable, "dying.py", str(SRC), str(who), *text(JOBS["gcm"])[1:], "--save", "gcm"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(2)]
    said = [job.communicate(timeout=300) for job in jobs]
    assert [job.returncode for job in jobs] == [9 if rank == who else 2 for rank in range(2)]
    lines = [line for line in said[1 - who][1].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "a process of this run died" in lines[0]
    assert "Traceback" not in said[1 - who][1]
    assert (tmp_path / "gcm" / "partial.json").is_file()
    if who == 1:  # it died in the second cell; the first is whole
        assert len(json.loads((tmp_path / "gcm" / "results.json").read_text())["cells"]) == 1
    monkeypatch.chdir(tmp_path)
    _run(monkeypatch, entry, JOBS["gcm"], "gcm")
    assert left(tmp_path / "gcm") == left(one / "gcm")


def test_a_damaged_partial_file_is_reported_and_measured_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cells, "EVERY", 0)
    images, path = Numbers(6), tmp_path / "partial.json"

    def work(index, x):
        return {"sum": int(x.sum())}

    def count(progress, work=work, cell="a"):
        return progress.count(images, torch.arange(6), work, batch_size=2, cell=cell)
    count(Progress(path=path, settings={}))
    whole = path.read_text()
    for text_ in (whole.replace('"sum": ', '"sum": 1'), whole[:-9], "[]", "{}", "\\xff",
                  whole.replace('"done"', '"batches"')):
        path.write_text(text_)
        assert Progress(path=path, settings={}).kept == {}
        assert "partial.json: damaged" in capsys.readouterr().out
    key, = json.loads(whole)["kept"]
    for kept in ([], {key: 3}, {key: {"done": "3", "skipped": [], "state": {}}},
                 {key: {"done": 2, "skipped": [-1], "state": {}}},
                 {key: {"done": 2, "skipped": [], "state": []}}):  # intact, but of another form
        text = json.dumps(kept)
        path.write_text(json.dumps({"sha256": cells._hash(text), "kept": kept}))
        assert Progress(path=path, settings={}).kept == {}
        assert "partial.json: damaged" in capsys.readouterr().out
    for part in ({"done": 9, "skipped": []}, {"done": 2, "skipped": [6]}):  # for other images
        path.write_text(whole)
        one = Progress(path=path, settings={})
        one.kept = {key: part | {"state": {"sum": 7}}}
        assert count(one) == {"sum": 15}
    path.write_text(whole)
    assert count(Progress(path=path, settings={}), None) == {"sum": 15}
    for other in (Progress(path=path, settings={"seed": 1}), Progress(path=path, settings={})):
        key = "a" if other.settings else "b"
        assert count(other, cell=key) == {"sum": 15}  # work is called
    Progress(path=path, settings={}).clear()
    assert not path.exists()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_killed_pass_resumes_with_another_batch_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(cells, "EVERY", 0)
    images, index, path = Numbers(20, broken=(7, 11)), torch.arange(1, 20), tmp_path / "partial"

    seen = []

    def work(index, x):
        seen.append(index.tolist())
        return {"index": index.tolist()}

    def killed(index, x):
        if 9 in index:
            raise Killed
        return {"index": index.tolist()}
    with pytest.raises(Killed):
        Progress(path=path, settings={}).count(images, index, killed, batch_size=4, cell="",
                                               whole=False)

    def goes_on(team):
        progress = Progress(team, path, {})
        found = progress.count(images, index, work, batch_size=3, cell="", whole=False)
        return found["index"], progress.skipped
    wanted = [i for i in range(1, 20) if i not in (7, 11)]
    assert together(size, goes_on) == [(wanted, [7, 11])] * size
    assert sorted(seen) == [[9, 10], [12, 13, 14], [15, 16, 17], [18, 19]]


# ------------------------------------------------------------------ one round after another

class Numbers:
    """n images of one pixel, whose value is their position; those in `broken` cannot be decoded."""
    size, geometry, skipped, root, labels = 1, None, (), SRC, torch.zeros(99, dtype=torch.int64)
    stored = None

    def __init__(self, n, broken=()):
        self.n, self.broken = n, broken
        self.pixels = None if broken else torch.arange(n, dtype=torch.uint8)[:, None, None, None]
        self.names = list(map(str, range(n)))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return None if i in self.broken else torch.full((1, 1, 1), i, dtype=torch.uint8)

    def sha256(self):
        return str(self.n)


class Threads(Team):
    """A team whose processes are threads of this one."""

    def everyone(self, value):
        said, barrier = self.__dict__["shared"]
        said[self.rank] = value
        barrier.wait(10)
        found = list(said)
        barrier.wait(10)
        return found


def together(size, task):
    """The results of task(team) in each of `size` threads."""
    state, found = ([None] * size, threading.Barrier(size)), [None] * size

    def work(rank):
        team = Threads(rank, size)
        team.__dict__["shared"] = state
        found[rank] = task(team)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def named(index, x):
    return index.tolist(), int(x)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("each", [1, 2, 3])
def test_every_process_gets_the_results_of_all_batches_in_order(size, each):
    for n in (1, 6, 7, 12, 15):
        def task(team, n=n):
            return list(shared(Numbers(n), torch.arange(n).split(1), named, team=team, each=each))
        assert together(size, task) == [[([], ([b], b)) for b in range(n)]] * size


@pytest.mark.parametrize("size", [1, 2, 3])
def test_files_that_cannot_be_decoded_are_known_to_every_process(size, capsys):
    images, index = Numbers(7, broken=(1, 2, 3)), torch.arange(7)

    def counted(team):
        progress = Progress(team)
        found = progress.count(images, index, lambda index, x: {"x": x.flatten().tolist()},
                               batch_size=2, whole=False)
        return found["x"], progress.skipped
    assert together(size, counted) == [([0, 4, 5, 6], [1, 2, 3])] * size
    assert capsys.readouterr().err.count("cannot be decoded, skipped") == 3
    with pytest.raises(UserError, match="cannot now"):
        Progress().count(images, index, lambda index, x: {}, batch_size=2)
    with pytest.raises(UserError, match="none of its 2 images"):
        Progress().count(Numbers(2, broken=(0, 1)), torch.arange(2), None, batch_size=2,
                         whole=False)


def test_results_are_added_by_type():
    one = {"n": 1, "after": [1], "largest": 0.5, "by": {"3": 1}}
    two = {"n": 2, "after": [2, 3], "largest": 0.2, "by": {"3": 4, "5": 1}}
    assert added(added({}, one), two) == {"n": 3, "after": [1, 2, 3], "largest": 0.5,
                                          "by": {"3": 5, "5": 1}}
    assert one["n"] == 1 and one["after"] == [1]


def test_a_refusal_by_the_first_process_reaches_all():
    def refusing(team):
        def make():
            raise UserError("no")
        try:
            team.from_first(make)
        except UserError as error:
            return str(error)
    assert together(3, refusing) == ["no"] * 3
    assert together(3, lambda team: team.from_first(lambda: team.rank + 5)) == [5] * 3


# ------------------------------------------------------------------ images that stream

@pytest.fixture
def photographs(tmp_path, picture):
    for i in range(12):
        picture(tmp_path / "val" / "n01440764" / f"{i:02}.png", 32, 32, seed=i)
    (tmp_path / "val" / "n01440764" / "05.png").write_bytes(b"no picture")
    return open_images(str(tmp_path / "val"), split="test").prepared(32, None)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", ["list", "disk"])
def test_a_short_list_is_decoded_once_and_a_long_one_is_only_checked(
        photographs, size, limit, monkeypatch, capsys):
    small = together(size, lambda team: decode_once(photographs, workers=0, team=team))
    assert "are too many" not in capsys.readouterr().out
    if limit == "list":
        monkeypatch.setattr(cells, "KEPT", 11 * 3 * 32 * 32)
    else:  # a process too many
        monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(
            1, 1, size * 12 * 3 * 32 * 32 - 1))
    long = together(size, lambda team: decode_once(photographs, workers=0, team=team))
    assert "12 images of 32 pixels are too many" in capsys.readouterr().out
    wanted = [name for name in photographs.names if "05" not in name]
    for images in (*small, *long):
        assert list(images.names) == wanted and len(images.labels) == 11
        assert images.skipped == ("n01440764/05.png",)
        assert images.sha256() == small[0].sha256()
    assert all(images.pixels is None for images in long)
    for images in small:
        assert torch.equal(images.pixels, torch.stack([long[0][i] for i in range(11)]))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("how", ["short", "long", "cached"])
def test_only_the_first_of_several_processes_names_broken_files(photographs, tmp_path, monkeypatch,
                                                                capsys, size, how):
    if how == "long":
        monkeypatch.setattr(cells, "KEPT", 0)
    if how == "cached":
        photographs = cached(photographs, tmp_path / "cache", workers=0)
    capsys.readouterr()
    found = together(size, lambda team: decode_once(photographs, workers=0, team=team))
    assert [images.skipped for images in found] == [("n01440764/05.png",)] * size
    assert capsys.readouterr().err.count("05.png: cannot be decoded, skipped") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoded_images_are_mapped_from_a_file_without_a_name(photographs):
    images = decode_once(photographs, workers=0, team=Team())
    at = images.pixels.data_ptr()
    found = [line for line in Path("/proc/self/maps").read_text().splitlines()
             if int(line.split("-")[0], 16) <= at < int(line.split("-")[1].split()[0], 16)]
    assert len(found) == 1 and found[0].endswith("(deleted)")


class Mean(torch.nn.Module):
    """Logits that depend on the colours of the image."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), 1 - x.mean((2, 3))], 1)


def test_a_streamed_list_gives_the_cells_of_one_in_memory_and_never_holds_more_than_two_batches(
        photographs, monkeypatch):
    made, most = [], [0]

    def tracked(items):
        good, x = stack(items)
        made.append(weakref.ref(x))
        most[0] = max(most[0], sum(batch() is not None for batch in made))
        return good, x
    small = decode_once(photographs, workers=0, team=Team())
    monkeypatch.setattr(cells, "KEPT", 0)
    monkeypatch.setattr(cells, "stack", tracked)
    streamed = decode_once(photographs, workers=0, team=Team())
    attack = measure.Attack("", "linf", 0.1, lambda model, x, y, generator, report: (
        x + 0.1 * generator.uniform(*x.shape[1:])).clamp(0, 1))
    found = []
    for images in (small, streamed):
        same = {"draws": 1, "batch_size": 2, "chance": numbered(0, len(images)), "device": CPU}
        before = measure.count_right_on(Mean(), images, **same)
        before[::2] = 1
        cell = measure.run_cell(attack, Mean(), Mean(), images, before, **same, desc="")
        found.append(cell | {"seconds": 0})
    assert found[0] == found[1]
    assert len(made) > 8 and 1 <= most[0] <= 2


@pytest.mark.parametrize(("device", "workers", "pinned"), [
    ("cuda", 2, True), ("cuda", 0, False), ("cpu", 2, False), (None, 2, False)])
def test_decoded_batches_are_pinned_for_a_gpu(device, workers, pinned, photographs, monkeypatch):
    made, real = [], torch.utils.data.DataLoader

    def loader(*args, pin_memory, **options):
        made.append(pin_memory)
        return real(*args, **options)
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    progress = Progress(device=device and torch.device(device))
    found = progress.count(photographs, torch.arange(len(photographs)),
                           lambda index, x: {"n": len(x)}, batch_size=2, workers=workers,
                           whole=False)
    assert found["n"] >= 8 and made == [pinned]


# ------------------------------------------------------------------ networks of ours

def _train(home):
    torch.hub.set_dir(home)

    def train(model, *args):
        with open(f"{home}/trained", "a") as file:
            file.write("once\n")
        time.sleep(0.5)
    models.train_small = train
    models.load_model("mlp", kind="digits", data_dir="digits")


def test_only_one_of_several_processes_trains_a_missing_network(tmp_path):
    fork = get_context("fork")
    processes = [fork.Process(target=_train, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "trained").read_text() == "once\n"
