"""Of train_sga.py: the processes that torchrun started share jobs, or the work of one job.

    --seed 0,1,2            each process makes every size-th perturbation, alone
    several surrogates      process p differentiates surrogates p, p + size, ...
    --method spgd, adam     process p differentiates chunks p, p + size, ... of a batch

A job that is shared ends in the bytes of one process: every process holds all images, delta and the
random numbers; gradients are gathered and added by each, in the order of one process.
"""

import torch

from utils.errors import UserError
from utils.measure import predictions
from utils.run import settled
from utils.team import Team

BLOCK = 50  # images that are classified at a time


def jobs_of(s, team):
    """[(settings with one seed, Team)] of this process. UserError: nothing to share."""
    if len(s.seed) > 1:
        return [(settled(s, seed=seed), Team()) for seed in s.seed[team.rank::team.size]]
    if team.size > 1 and "resizepad" in s.defense:
        raise UserError(f"--defense {s.defense} in {team.size} processes: its draws follow one "
                        "another; start one process, or several seeds: --seed 0,1")
    if team.size > max(1, len(s.model_name)) and (len(s.model_name) > 1 or s.method == "sga"):
        raise UserError(f"{team.size} processes for {len(s.model_name)} surrogate(s) and one seed: "
                        "the inner steps of SGA follow one another; start a process for each "
                        "surrogate, or type several seeds: --seed 0,1")
    return [(settled(s, seed=s.seed[0]), team)]


def gathered(team, works, delta):
    """What each of `works`, functions of nothing, gives: a loss () and a gradient like delta.

    Process p does works p, p + size, ...; all of them get everything, in the order of the works.
    """
    if team.size == 1:
        return [work() for work in works]
    mine = delta.new_zeros((-(-len(works) // team.size), 1 + delta.numel()), dtype=torch.float32)
    for row, work in zip(mine, works[team.rank::team.size], strict=False):  # the last may be spare
        loss, g = work()
        row[0], row[1:] = loss, g.flatten()
    parts = team.all(mine)
    rows = [parts[k % team.size][k // team.size] for k in range(len(works))]
    return [(row[0], torch.empty_like(delta).copy_(row[1:].view(delta.shape))) for row in rows]


def predicted(team, models, pixels, device, delta=None):
    """Predicted classes (S, N) of S models for images pixels (N, C, H, W) at x + delta."""
    blocks = torch.arange(len(pixels)).split(BLOCK)

    def of(part):
        found = [predictions(models, pixels[index], device, delta=delta, batch_size=BLOCK)
                 for index in part]
        return torch.cat(found, 1) if found else torch.zeros((len(models), 0), dtype=torch.long)
    if team.size == 1:
        return of(blocks)
    whole = torch.zeros((len(models), len(pixels)), dtype=torch.long)
    for rank, part in enumerate(team.everyone(of(blocks[team.rank::team.size]))):
        if part.shape[1]:
            whole[:, torch.cat(blocks[rank::team.size])] = part
    return whole
