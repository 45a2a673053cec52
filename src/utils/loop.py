"""The loop of epochs that every training here runs in, and what it asks of a training.

    class Mine(Trainer):
        def __init__(self, ...):
            super().__init__(device, steps=len(loader), keep={"net": net, "optimizer": optimizer})

        def one_pass(self, bar):              # one epoch
            for x, y in loader:
                self.step(x, y)
                bar.update()
            return {"loss": ...}              # columns of log.csv

    trainer.resume(state, folder)             # state: of folder.load_checkpoint
    loop(trainer, epochs, folder, flags)

After each epoch the loop checks that nothing is NaN, replaces checkpoint.pth and log.csv, and
prints a line. A run that is killed and resumed leaves the same bytes on a CPU.
"""

import math
import time

import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.precision import measuring, out_of_memory, synchronize, training
from utils.run import save_csv, save_pth
from utils.team import Team


class Trainer:
    """What lives between two epochs.

    steps, unit: length and unit of the progress bar of an epoch. keep {name: module, optimizer or
    generator}: what a checkpoint holds, besides the rows of log.csv. `stopped` ends the loop.
    """
    advice = "the last checkpoint is kept; type a smaller --lr"  # when a loss is not finite

    def __init__(self, device, *, steps, keep, team=None, unit="it"):
        self.device, self.team, self.steps, self.unit = device, team or Team(), steps, unit
        self.keep, self.rows, self.stopped = keep, [], False

    def one_pass(self, bar):
        """One epoch -> {column: number}, the loss first."""
        raise NotImplementedError

    def start(self):
        """What a new run decides before its first epoch."""

    def after(self):
        """{column: number} of what is measured after an epoch; its time is not counted."""
        return {}

    def tensors(self):
        """What must stay finite: the parameters of everything that is kept."""
        return [p for part in self.keep.values() if isinstance(part, torch.nn.Module)
                for p in part.parameters()]

    def state(self):
        """All that decides what comes next. Every process calls it, the first one saves it."""
        return {"rows": self.rows, "stopped": self.stopped, **{
            name: part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
            for name, part in self.keep.items()}}

    def restore(self, state):
        self.rows = [dict(row) for row in state["rows"]]
        self.stopped = state.get("stopped", False)
        for name, part in self.keep.items():
            restore = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
            restore(state[name])

    def resume(self, state, folder):
        """Continues from a checkpoint; None: starts, and deletes that of an overwritten run."""
        if state is not None:
            try:
                self.restore(state)
                if not self.seconds >= 0:
                    raise ValueError("not the rows of a log.csv")
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError
                    ) as error:
                if out_of_memory(error):
                    raise
                raise UserError(f"{folder / 'checkpoint.pth'}: damaged, or not of this script; "
                                "choose another folder") from error
            return
        self.start()
        if self.team.first:
            (folder / "checkpoint.pth").unlink(missing_ok=True)

    @property
    def seconds(self):
        """Of all epochs so far."""
        return round(sum(row["seconds"] for row in self.rows), 3)


def loop(trainer, epochs, folder=None, flags=None, *, desc="epoch", board=None,
         deterministic=True):
    """Epochs until log.csv has `epochs` rows or the trainer has stopped.

    folder, flags: a RunFolder and what decides the result; None: nothing is written or printed.
    board: a TensorBoard SummaryWriter. deterministic: no TF32 in one_pass, on a GPU; what
    `after` measures never uses TF32. UserError where a loss or a weight is not finite.
    """
    first = trainer.team.first
    while len(trainer.rows) < epochs and not trainer.stopped:
        number = len(trainer.rows) + 1
        synchronize(trainer.device)
        start = time.perf_counter()
        with (tqdm(total=trainer.steps, desc=f"{desc} {number}", unit=trainer.unit, leave=False,
                   disable=None if first else True) as bar,
              training(trainer.device, deterministic)):
            found = trainer.one_pass(bar)
        synchronize(trainer.device)
        seconds = time.perf_counter() - start
        _check_finite(trainer, f"{desc} {number}", found)
        with measuring():
            row = {"epoch": number, **found, "seconds": seconds, **trainer.after()}
        trainer.rows.append({k: round(v, 6) if isinstance(v, float) else v
                             for k, v in row.items()})
        if folder is not None:
            state = trainer.state()
            if first:
                _save(folder, {**state, "flags": flags}, trainer.rows, desc, epochs, board)
    if folder is not None and first:
        save_csv(folder / "log.csv", trainer.rows)  # a kill may have come after the checkpoint


def _check_finite(trainer, where, found):
    loss = next(iter(found.values()))
    broken = sum(not bool(t.isfinite().all()) for t in trainer.tensors())
    if not math.isfinite(loss) or broken:
        raise UserError(f"{where}: the loss is {loss:g}, {broken} tensors that are trained are not "
                        f"finite; {trainer.advice}")


def _save(folder, state, rows, desc, epochs, board):
    """The checkpoint, log.csv, the printed line, and TensorBoard's scalars."""
    row = {column: value for column, value in rows[-1].items() if value != ""}
    save_pth(folder / "checkpoint.pth", state)
    save_csv(folder / "log.csv", rows)
    number = row.pop("epoch")
    print(f"{desc} {number:3d}/{epochs}  "
          + "  ".join(f"{column} {value:.4g}" for column, value in row.items()), flush=True)
    for column, value in row.items() if board else ():
        board.add_scalar(column, value, number)
