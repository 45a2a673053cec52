"""For train_sga.py: the perturbations that a command makes, and how the processes that torchrun
started share them, or the work on one.

    several perturbations   process p makes perturbations p, p + size, ... alone
    several surrogates      process p differentiates surrogates p, p + size, ...
    --method spgd, adam     process p differentiates chunks p, p + size, ... of a batch

A shared perturbation has the same bytes as one made by a single process: every process holds all
images, delta and the random numbers, and adds the gathered gradients in the same order.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch

from utils.data import Images
from utils.errors import UserError
from utils.measure import predictions
from utils.models import outputs
from utils.run import settled
from utils.sources import label_of
from utils.team import Team

BLOCK = 50       # images classified at a time
SPGD_CHUNK = 50  # images per backward pass of SPGD: 250 need 27 GB on VGG16


@dataclass(frozen=True, eq=False)
class Job:
    """A perturbation to be made. apart {flag: folder name}: what distinguishes it from the
    command's others.
    """
    s: object           # settings, with one seed and one target or None
    images: Images      # names only
    surrogates: list    # Targets
    apart: dict
    team: Team

    def models(self, device):
        """The surrogates, without their defence. UserError if one lacks the target class."""
        found = [target.load(self.images, data_dir=self.s.data_dir, data_root=self.s.data_root,
                             device=device) for target in self.surrogates]
        for target, model in zip(self.surrogates, found, strict=True):
            classes = self.s.target is not None and outputs(
                model, self.images.channels, self.s.image_size, device, target.name)
            if classes and self.s.target >= classes:
                raise UserError(f"--target {self.s.target}: {target.name} has classes 0 to "
                                f"{classes - 1}")
        return found


def jobs_of(plans, team):
    """[Job] of this process, one for each target and seed of each plan (settings, images,
    surrogates). UserError: more processes than can share the work.
    """
    jobs = []
    for s, images, surrogates in plans:
        for target, seed in product(s.target or [None], s.seed):
            apart = {"model_name": ("+".join(map(label_of, s.model_name)), len(plans) > 1),
                     "target": (f"target{target}", len(s.target or ()) > 1),
                     "seed": (f"seed{seed}", len(s.seed) > 1)}
            jobs.append(Job(settled(s, target=target, seed=seed), images, surrogates, {
                flag: name for flag, (name, several) in apart.items() if several}, Team()))
    if len(jobs) > 1:
        return jobs[team.rank::team.size]
    s = jobs[0].s
    if team.size > max(1, len(s.model_name)) and (len(s.model_name) > 1
                                                or s.method in ("sga", "dm")):
        raise UserError(f"{team.size} processes for one perturbation on {len(s.model_name)} "
                        "surrogate(s): the steps of sga and dm follow one another; start at most "
                        "one for each surrogate, or make several perturbations: --seed 0,1")
    if team.size > 1 and len(s.model_name) == 1:
        chunks = -(-min(s.batch_size, len(jobs[0].images)) // SPGD_CHUNK)
        if team.size > chunks:
            raise UserError(f"{team.size} processes for batches of {chunks} chunk(s) of "
                            f"{SPGD_CHUNK} images: some would have nothing to do; start at most "
                            "one for each chunk, or type a larger --batch_size")
    return [replace(jobs[0], team=team)]


def gathered(team, works, delta):
    """For each of `works`, functions without arguments: its loss () and a gradient like delta.

    Process p runs works p, p + size, ...; every process gets all results, in the order of `works`.
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


def predicted(team, models, pixels, device, *, chance, delta=None):
    """Predicted classes (S, N) of S models for pixels (N, C, H, W) at x + delta.

    chance: Chance of the N images, for a random defence.
    """
    blocks = torch.arange(len(pixels)).split(BLOCK)

    def of(part):
        found = [predictions(models, pixels[index], device, delta=delta, chance=chance[index],
                             batch_size=BLOCK) for index in part]
        return torch.cat(found, 1) if found else torch.zeros((len(models), 0), dtype=torch.long)
    if team.size == 1:
        return of(blocks)
    whole = torch.zeros((len(models), len(pixels)), dtype=torch.long)
    for rank, part in enumerate(team.everyone(of(blocks[team.rank::team.size]))):
        if part.shape[1]:
            whole[:, torch.cat(blocks[rank::team.size])] = part
    return whole
