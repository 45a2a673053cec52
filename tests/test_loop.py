"""The one loop over epochs: what it writes, how it resumes, when it refuses to go on."""

import csv
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.loop import Trainer, loop
from utils.run import RunFolder, load_pth
from utils.team import Team

CPU = torch.device("cpu")


class Walk(Trainer):
    """A weight that takes random steps in each epoch; `losses` may replace what it reports."""

    def __init__(self, team=None, losses=(), **keep):
        self.layer, self.generator = nn.Linear(1, 1, bias=False), torch.Generator().manual_seed(5)
        nn.init.zeros_(self.layer.weight)
        super().__init__(CPU, steps=3, team=team, keep={
            "net": self.layer, "generator": self.generator, **keep})
        self.losses, self.measured = list(losses), 0

    def one_pass(self, bar):
        with torch.no_grad():
            for _ in range(self.steps):
                self.layer.weight += torch.randn((), generator=self.generator)
                bar.update()
        return {"loss": self.losses.pop(0) if self.losses else self.layer.weight.item()}

    def after(self):
        self.measured += 1
        return {"measured": self.measured if self.measured > 1 else ""}


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_every_epoch_writes_a_row_a_printed_line_and_a_checkpoint(folder, capsys):
    walk = Walk()
    loop(walk, 3, folder, {"seed": 0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", f"{i}/3"] for i in (1, 2, 3)]
    assert "measured" not in lines[0] and "measured 2" in lines[1]  # empty columns are not printed
    assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3"]
    assert f"loss {float(rows(folder)[2]['loss']):.4g}" in lines[2]
    saved = load_pth(folder / "checkpoint.pth")
    assert saved["flags"] == {"seed": 0} and len(saved["rows"]) == 3
    assert torch.equal(saved["net"]["weight"], walk.layer.weight)
    assert walk.seconds == round(sum(row["seconds"] for row in walk.rows), 3)


def test_a_run_stopped_after_any_epoch_resumes_to_the_same_weights_and_rows(tmp_path):
    whole = Walk()
    loop(whole, 5, RunFolder(tmp_path / "whole"), {})
    for epochs in (1, 2, 4):
        part = RunFolder(tmp_path / f"part{epochs}")
        loop(Walk(), epochs, part, {})
        (part / "log.csv").unlink()  # as after a kill between the checkpoint and the log
        again = Walk()
        again.resume(part.load_checkpoint({}, resume=True, overwrite=False), part)
        again.measured = epochs
        loop(again, 5, part, {})
        assert torch.equal(again.layer.weight, whole.layer.weight)
        assert rows(part) == rows(RunFolder(tmp_path / "whole"))


def test_a_trainer_is_freed_with_its_last_reference(folder):
    walk = Walk()
    loop(walk, 1, folder, {}, minutes=10)
    gone = weakref.ref(walk)
    gc.disable()
    try:
        del walk
        assert gone() is None
    finally:
        gc.enable()


def test_resuming_a_finished_run_restores_a_lost_log(folder):
    loop(Walk(), 2, folder, {})
    (folder / "log.csv").unlink()
    again = Walk()
    again.resume(folder.load_checkpoint({}, resume=True, overwrite=False), folder)
    loop(again, 2, folder, {})
    assert len(rows(folder)) == 2


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(folder, loss):
    walk = Walk(losses=[1.0, loss])
    with pytest.raises(UserError, match="epoch 2: the loss is .*last checkpoint is kept.*--lr"):
        loop(walk, 5, folder, {})
    assert len(load_pth(folder / "checkpoint.pth")["rows"]) == len(rows(folder)) == 1


def test_a_weight_that_is_not_finite_also_stops_the_run(folder):
    walk = Walk(losses=[1.0, 1.0])
    loop(walk, 1, folder, {})
    walk.layer.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="1 tensors that are trained are not finite"):
        loop(walk, 2, folder, {})


def test_a_trainer_that_stops_ends_the_loop_and_stays_stopped(folder):
    walk = Walk()
    walk.after = lambda: setattr(walk, "stopped", len(walk.rows) == 1) or {}
    loop(walk, 9, folder, {})
    assert len(walk.rows) == 2
    again = Walk()
    again.resume(load_pth(folder / "checkpoint.pth"), folder)
    loop(again, 9, folder, {})
    assert len(again.rows) == 2


def test_only_the_first_process_writes_but_every_process_collects_the_state(folder, capsys):
    second = Walk(team=Team(rank=1, size=2))
    asked = []
    second.state = lambda: asked.append(1)
    loop(second, 2, folder, {})
    assert len(asked) == 2
    assert not (folder / "checkpoint.pth").exists() and not capsys.readouterr().out


def test_without_a_folder_nothing_is_written_or_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loop(Walk(), 2)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_new_run_removes_the_checkpoint_of_an_overwritten_one(folder):
    for name in ("checkpoint.pth", "mine.txt"):
        (folder / name).write_text("old")
    Walk(team=Team(rank=1, size=2)).resume(None, folder)
    assert (folder / "checkpoint.pth").exists()  # the first process does that
    Walk().resume(None, folder)
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "mine.txt"]


def test_the_board_gets_every_column_that_has_a_value(folder):
    seen = []
    board = SimpleNamespace(add_scalar=lambda *scalar: seen.append(scalar))
    loop(Walk(), 2, folder, {}, board=board)
    assert {(column, epoch) for column, _, epoch in seen} == {
        ("loss", 1), ("seconds", 1), ("loss", 2), ("seconds", 2), ("measured", 2)}
