"""The processes that torchrun started: joining, gathering, BatchNorm over all of them."""

import inspect
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils.errors import DAMAGE, UserError

DIED = ("a process of this run died; saved work is kept: repeat the command to continue an "
        "evaluation, add --resume to continue a training")
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LONGEST = timedelta(days=1)  # how long processes wait for the slowest, such as for a download


@dataclass(frozen=True)
class Team:
    """The processes that torchrun started for one run; a single one without torchrun."""
    rank: int = 0
    size: int = 1

    @property
    def first(self):
        """Whether this process writes files and prints."""
        return self.rank == 0

    def gather(self, x):
        """The tensors x (n, ...) of all processes as one; process p % size held position p."""
        if self.size == 1:
            return x
        parts = self.everyone(x.cpu())
        whole = x.new_zeros((sum(map(len, parts)), *x.shape[1:]))
        for rank, part in enumerate(parts):
            whole[rank::self.size] = part.to(x)
        return whole

    def total(self, values):
        """Each of the numbers, summed over all processes."""
        return [sum(column) for column in zip(*self.everyone(list(values)), strict=True)]

    def first_says(self, flag):
        """The first process's flag, in every process."""
        return self.everyone(flag)[0]

    def everyone(self, value):
        """The values of all processes, by rank; UserError if one of them has died."""
        parts = [value] * self.size
        if self.size > 1:
            try:
                torch.distributed.all_gather_object(parts, value)
            except RuntimeError as error:
                raise UserError(DIED) from error
        return parts

    def all(self, x):
        """The tensors x of all processes, of equal shape and type, on the device of x."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        try:
            torch.distributed.all_gather(parts, x)
        except RuntimeError as error:
            raise UserError(DIED) from error
        return parts

    def from_first(self, make):
        """Runs make() in the first process; all return its result or raise its UserError."""
        if self.size == 1:
            return make()
        try:
            found = (make() if self.first else None), None
        except UserError as error:
            found = None, str(error)
        value, error = self.everyone(found)[0]
        if error:
            raise UserError(error)
        return value

    def in_turn(self, make):
        """Runs make() in the first process, then in the others, which find its downloads done.
        -> each process's own result
        """
        found = []
        self.from_first(lambda: found.append(make()))
        return found[0] if self.first else make()

    def bar(self, total, desc, initial=0):
        """A progress bar over images, shown by the first process."""
        return tqdm(total=total, desc=desc, initial=initial, unit="img", leave=False,
                    disable=None if self.first else True)

    def leave(self):
        """Ends the process group, if there is one."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def _started():
    """(rank, rank on this machine, size) as torchrun sets them, else (0, 0, 1)."""
    found = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if all(map(str.isdecimal, found)):
        return map(int, found)
    if found[2] in ("", "1"):
        return 0, 0, 1
    raise UserError(f"WORLD_SIZE is {found[2]}, RANK '{found[0]}' and LOCAL_RANK '{found[1]}'; "
                    "wanted three numbers, as torchrun sets them: type torchrun, or unset "
                    "WORLD_SIZE")


def join_team(device, backend=None):
    """-> Team, this process's device. backend None: gloo, with NCCL for tensors on GPUs."""
    rank, local, size = _started()
    if size == 1:
        return Team(), device
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.distributed.init_process_group(backend, timeout=LONGEST)
    return Team(rank, size), device


def join_to_count(device):
    """join_team for evaluations. They gather counts, so any device uses gloo, which notices at once
    that a process died. Only the first process prints.
    """
    team, device = join_team(device, "gloo")
    if team.size > 1:
        signal.signal(signal.SIGTERM, _stopped)  # from torchrun, when another process died
    if not team.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return team, device


def _stopped(*_):
    print(f"error: {DIED}", file=sys.stderr)  # a UserError would pass for a broken photograph
    sys.exit(2)


class JointSum(torch.autograd.Function):
    """The sum of a tensor over all processes; every process takes its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return JointSum.apply(g)


class JointBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Statistics over the images of all processes, on devices without SyncBatchNorm."""

    def _check_input_dim(self, x):
        """(N, C, ...), any number of dimensions"""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.to(self.running_mean.dtype)
        z = x.transpose(0, 1).flatten(1)  # (C, everything else)
        total, n = JointSum.apply(torch.stack([z.sum(1), torch.full_like(z[:, 0], z.shape[1])]))
        mean = total / n
        var = JointSum.apply((z - mean[:, None]).square().sum(1)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        channel = [1, -1] + [1] * (x.dim() - 2)
        shift = self.bias - mean * scale
        return (x * scale.view(channel) + shift.view(channel)).to(dtype)


def joint_batch_norm(model, device, team):
    """The same model; with several processes, its batch statistics cover the images of all.

    UserError: a BatchNorm that does more than torch's, such as timm's with its activation.
    """
    if team.size == 1:
        return model
    for layer in model.modules():
        if (isinstance(layer, nn.modules.batchnorm._BatchNorm)
                and type(layer) not in (*PLAIN, nn.SyncBatchNorm)):
            raise UserError(f"--model_name: its layers {type(layer).__name__} cannot share their "
                            f"statistics among {team.size} processes; start one process, or choose "
                            "a network with torch's own BatchNorm")
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if type(layer) in PLAIN:
            layer.__class__ = JointBatchNorm  # same parameters and buffers
    return model


def in_parallel(model, team, shape):
    """The model wrapped for joint training by a team's processes; unchanged for one process.

    shape: (C, H, W) of its images.
    """
    if team.size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters  # renamed after torch 2.11
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, find_unused_parameters=has_unused(model, shape),
                                   **{sync: False})


def has_unused(model, shape):
    """Whether some weights do not affect the logits: the original head of timm's networks under
    another head, layers that are never called. DistributedDataParallel must be told of them.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    x, training = torch.zeros((1, *shape), device=weights[0].device), model.training
    try:
        logits = model.eval()(x)
        return None in torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    except (*DAMAGE, AssertionError, NotImplementedError):  # models.check_takes says what is wrong
        return False
    finally:
        model.train(training)


def without_sync(model):
    """Context in which backward passes of an in_parallel model add only to this process's
    gradients; the first one outside it averages them over the processes.
    """
    return getattr(model, "no_sync", nullcontext)()
