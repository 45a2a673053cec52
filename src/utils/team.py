"""The processes that torchrun started: joining, gathering, BatchNorm over all of them."""

import inspect
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Team:
    """The processes that torchrun started for one run; one alone where it did not."""
    rank: int = 0
    size: int = 1

    @property
    def first(self):
        """Whether this process writes files and prints."""
        return self.rank == 0

    def each(self, value):
        """[the value of every process, in order of rank]"""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def gather(self, x):
        """The tensors x (n, ...) of all processes, of which position p was held by p % size."""
        if self.size == 1:
            return x
        parts = self.each(x.cpu())
        whole = x.new_zeros((sum(map(len, parts)), *x.shape[1:]))
        for rank, part in enumerate(parts):
            whole[rank::self.size] = part.to(x)
        return whole

    def total(self, values):
        """The numbers of all processes, each summed."""
        return [sum(column) for column in zip(*self.each(list(values)), strict=True)]

    def first_says(self, flag):
        """The flag of the first process, in every process."""
        if self.size == 1:
            return flag
        said = [flag]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]

    def leave(self):
        """Ends the process group, if there is one."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


def join_team(device):
    """Team, and the device of this process."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Team(), device
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(rank, size), device


class JointSum(torch.autograd.Function):
    """The sum of a tensor over all processes; every one asks for its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return JointSum.apply(g)


class JointBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Statistics over the images of all processes, on devices that SyncBatchNorm is not for."""

    def _check_input_dim(self, x):
        """(N, C, ...) of any dimension"""

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
    """The same model; with several processes its batch statistics are taken over all of them."""
    if team.size == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
            layer.__class__ = JointBatchNorm  # the same parameters and buffers, summed elsewhere
    return model


def in_parallel(model, team):
    """The model as the processes of a team train it together; the model itself for one process."""
    if team.size == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters  # renamed after torch 2.11
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{sync: False})


def without_sync(model):
    """Context in which backward passes of a model of in_parallel only add to the gradients of this
    process; the first one outside it averages all of them over the processes.
    """
    return getattr(model, "no_sync", nullcontext)()
