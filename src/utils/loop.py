"""The epoch loop of every training here, and the interface of a training.

    class Mine(Trainer):
        def __init__(self, ...):
            super().__init__(device, steps=len(images) // 50, keep={
                "net": net, "optimizer": optimizer, "generator": generator})

        def one_pass(self, bar):              # one epoch
            self.sums = torch.zeros(1)
            order = torch.randperm(len(images), generator=generator).split(50)
            for index in self.minibatches(order[self.skip:]):
                self.sums += self.step(index)
                bar.update()
            return {"loss": ...}              # columns of log.csv

    trainer.resume(state, folder)             # state: from folder.load_checkpoint
    loop(trainer, epochs, folder, flags)

After each epoch the loop checks for NaN, replaces checkpoint.pth and log.csv, and prints a line.
With `minutes` it also replaces checkpoint.pth between two minibatches. Such a checkpoint holds the
random state at the start of the pass: a resumed one_pass repeats the draws before its first
minibatch, skips the minibatches that are done, and continues with the sums and the random state of
the checkpoint. On a CPU, a run that is killed and resumed leaves the same bytes.
"""

import math
import time

import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.halving import Halves
from utils.precision import measuring, out_of_memory, synchronize, training
from utils.run import save_csv, save_pth
from utils.team import Team


class Trainer:
    """The state of a training between two epochs.

    steps, unit: length and unit of the progress bar of an epoch. keep {name: module, optimizer or
    generator}: what a checkpoint holds, besides the rows of log.csv. `stopped` ends the loop.
    """
    advice = "the last checkpoint is kept; type a smaller --lr"  # when a loss is not finite
    asked = 10  # minibatches between two looks at the first process's clock, if there are several

    def __init__(self, device, *, steps, keep, team=None, unit="it"):
        self.device, self.team, self.steps, self.unit = device, team or Team(), steps, unit
        self.keep, self.rows, self.stopped = keep, [], False
        self.skip, self.inside = 0, None  # of a resumed pass: minibatches done, its checkpoint
        self.between = lambda: None       # what the loop does between two minibatches
        self.began = time.perf_counter()  # start of the pass, as if never interrupted
        self.halves = Halves("measuring after a pass")  # for the images that `after` measures

    def one_pass(self, bar):
        """One epoch -> {column: number}, the loss first."""
        raise NotImplementedError

    def minibatches(self, left):
        """Yields the minibatches `left` of a pass, all but the first `skip`.

        Before that, one_pass makes its draws for the whole pass and sets self.sums to zero.
        """
        self.at, self.skip = self.skip, 0
        if self.inside is not None:
            self.sums.copy_(self.inside["sums"])
            self._set_random(self.inside["random"])
            for name, state in self.inside["generators"].items():
                self.keep[name].set_state(state)
            self.inside = None
        for one in left:
            yield one
            self.at += 1
            self.between()

    def start(self):
        """Called once for a new run, before its first epoch."""

    def after(self):
        """{column: number} measured after an epoch, outside its training time."""
        return {}

    def tensors(self):
        """Tensors that must stay finite: the parameters of every module in `keep`."""
        return [p for part in self.keep.values() if isinstance(part, torch.nn.Module)
                for p in part.parameters()]

    def state(self):
        """All that determines the rest of the run. Every process calls it, the first saves it."""
        return {"rows": self.rows, "stopped": self.stopped,
                "random": self.team.everyone(self._random()), **{
                    name: part.get_state() if isinstance(part, torch.Generator)
                    else part.state_dict() for name, part in self.keep.items()}}

    def restore(self, state):
        self.rows = [dict(row) for row in state["rows"]]
        self.stopped = state.get("stopped", False)
        for name, part in self.keep.items():
            restore = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
            restore(state[name])
        if "random" in state:  # not in the checkpoints of older versions
            self._set_random(state["random"][self.team.rank])
        if "inside" in state:
            self._restore_inside(state, state["inside"])

    def begin(self):
        """Start or resume a pass: set its clock and record the random state that it starts from."""
        self.began = time.perf_counter() - (self.inside["seconds"] if self.inside else 0)
        self.begun = {name: generator.get_state() for name, generator in self._generators()}
        self.begun_random = self._random() if isinstance(self.between, Between) else None

    def state_inside(self):
        """The state in the middle of a pass."""
        return self.state() | {"inside": {
            "at": self.at, "seconds": self.pass_seconds, "begun": self.begun,
            "begun_random": self.team.everyone(self.begun_random),
            "sums": self.team.everyone(self.sums.cpu())}}

    def _restore_inside(self, state, inside):
        at, seconds, sums = inside["at"], inside["seconds"], inside["sums"][self.team.rank]
        if not (type(at) is int and at > 0 and seconds >= 0 and torch.is_tensor(sums)):
            raise ValueError("not the middle of a pass")
        self.skip, self.inside = at, {
            "seconds": seconds, "sums": sums, "random": state["random"][self.team.rank],
            "generators": {name: state[name] for name, _ in self._generators()}}
        for name, generator in self._generators():
            generator.set_state(inside["begun"][name])
        self._set_random(inside["begun_random"][self.team.rank])

    def _generators(self):
        return [(name, part) for name, part in self.keep.items()
                if isinstance(part, torch.Generator)]

    def _random(self):
        """States of this process's global generators, from which dropout draws."""
        found = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            found[self.device.type] = getattr(torch, self.device.type).get_rng_state()
        return found

    def _set_random(self, states):
        torch.set_rng_state(states["cpu"])
        if self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(states[self.device.type])

    def resume(self, state, folder):
        """Continue from a checkpoint; None: start anew and delete that of an overwritten run."""
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
        """Seconds of all epochs so far."""
        return round(sum(row["seconds"] for row in self.rows), 3)

    @property
    def pass_seconds(self):
        """Seconds of this pass so far."""
        return time.perf_counter() - self.began


def loop(trainer, epochs, folder=None, flags=None, *, desc="epoch", board=None,
         deterministic=True, minutes=0, clock=time.monotonic):
    """Run epochs until log.csv has `epochs` rows or the trainer has stopped.

    folder, flags: a RunFolder and the flags that decide the result; None: nothing is written or
    printed. board: a TensorBoard SummaryWriter. deterministic: no TF32 in one_pass on a GPU;
    `after` never uses TF32. minutes: between two checkpoints inside an epoch; 0: none.
    UserError if a loss or a weight is not finite.
    """
    first, between = trainer.team.first, Between(trainer, folder, flags, desc, minutes, clock)
    while len(trainer.rows) < epochs and not trainer.stopped:
        number = len(trainer.rows) + 1
        synchronize(trainer.device)
        trainer.begin()
        with (tqdm(total=trainer.steps, desc=f"{desc} {number}", unit=trainer.unit, leave=False,
                   disable=None if first else True) as bar,
              training(trainer.device, deterministic)):
            found = trainer.one_pass(bar)
        synchronize(trainer.device)
        seconds = trainer.pass_seconds
        _check_finite(trainer, f"{desc} {number}", found)
        with measuring():
            row = {"epoch": number, **found, "seconds": seconds, **trainer.after()}
        trainer.rows.append({k: round(v, 6) if isinstance(v, float) else v
                             for k, v in row.items()})
        if folder is not None:
            state = trainer.state()
            if first:
                _save(folder, {**state, "flags": flags}, trainer.rows, desc, epochs, board)
        between.last = clock()
    trainer.between = lambda: None  # it holds the trainer, whose memory the next one may need
    if folder is not None and first:
        save_csv(folder / "log.csv", trainer.rows)  # a kill may have come after the checkpoint


class Between:
    """Called between two minibatches; the first call after `minutes` replaces the checkpoint."""

    def __init__(self, trainer, folder, flags, desc, minutes, clock):
        self.trainer, self.folder, self.flags, self.desc = trainer, folder, flags, desc
        self.minutes, self.clock, self.last = minutes, clock, clock()
        trainer.between = self if folder is not None and minutes else lambda: None

    def __call__(self):
        trainer, team = self.trainer, self.trainer.team
        if trainer.at % (1 if team.size == 1 else trainer.asked):
            return
        if not team.first_says(self.clock() - self.last >= 60 * self.minutes):
            return
        start, state = time.perf_counter(), trainer.state_inside()
        loss = float(sum(sums.flatten()[0] for sums in state["inside"]["sums"]))
        _check_finite(trainer, f"{self.desc} {len(trainer.rows) + 1}", {"loss": loss})
        if team.first:
            save_pth(self.folder / "checkpoint.pth", {**state, "flags": self.flags})
        self.last = self.clock()
        trainer.began += time.perf_counter() - start  # not counted in the pass


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
