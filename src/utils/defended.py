"""Networks with their images, to be put behind defences and attacked."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from utils import finished
from utils.attack.chance import numbered
from utils.audit import twin_differences
from utils.cells import decode_once
from utils.data import PRESETS, Images, cached, opened
from utils.defenses import defend, is_random
from utils.errors import UserError
from utils.halving import Halving
from utils.measure import count_right_on
from utils.models import targets_of
from utils.precision import Fast, layout_for, placed
from utils.run import digest


@dataclass(eq=False)
class Network:
    """A network and its images; s: the run's settings. `fast` computes the attackers' gradients."""
    name: str
    model: nn.Module
    images: Images
    size: int
    s: object
    device: torch.device
    before: dict = field(default_factory=dict)

    def __post_init__(self):
        net = placed(self.model, self.device)
        self.model = self.fast = Halving(net, self.name)
        if self.s.amp != "off":
            self.fast = Halving(Fast(net, self.s.amp, layout_for(self.device)), self.name)

    @property
    def chance(self):
        """The random numbers of its images, on the CPU."""
        return numbered(self.s.seed, len(self.images))

    def behind(self, defense, w, fast=False):
        """The network, or its fast copy, behind a defence."""
        return defend(self.fast if fast else self.model, defense, size=self.size, w=w,
                      epsilon=self.s.epsilon, low=self.s.low)

    @cached_property
    def classes(self):
        """Number of classes."""
        x = torch.zeros((1, self.images.channels, self.size, self.size), device=self.device)
        with torch.no_grad():
            return self.model(x).shape[1]

    def draws(self, defense):
        """How many times each image is classified."""
        return self.s.draws if is_random(defense) else 1

    def right(self, defense, w, progress):
        """Number of correct draws for each clean image behind the defence: (N,) int64."""
        if (defense, w) not in self.before:
            self.before[defense, w] = count_right_on(
                self.behind(defense, w), self.images, draws=self.draws(defense),
                batch_size=self.s.batch_size, chance=self.chance, device=self.device,
                workers=self.s.workers, progress=progress, cell=self.cell_of("clean", defense, w))
        return self.before[defense, w]

    def recall(self, cells, progress):
        """Reuses the results of finished cells on the clean images.

        cells {Cell: its entry in results.json, or None}. UserError: there are none, and this
        network misclassifies every clean image.
        """
        for cell, counts in cells.items():
            if counts and cell.model == self.name and len(counts.get("before", ())) == len(
                    self.images):
                self.before[cell.defense, cell.w] = torch.tensor(counts["before"])
        if not self.before and not self.right("none", self.s.w, progress).any():
            raise UserError(f"{self.name} gets none of these images right: nothing to attack; "
                            "type --weights of a trained network")

    def differences(self, defense, w, progress):
        """What the defence changes in forward passes and gradients, from twin_differences."""
        return twin_differences(
            self.behind(defense, w), self.model, self.images, self.chance, self.s.batch_size,
            self.device, workers=self.s.workers, progress=progress,
            cell=self.cell_of("twin", defense, w))

    @property
    def labels_digest(self):
        return digest(self.images.labels)

    def cell_of(self, what, defense, w):
        """What a pass over the clean images depends on besides the settings of all cells."""
        return [self.name, what, defense, w, self.s.epsilon, self.s.low, self.draws(defense)]


def open_targets(args, *, imagenet):
    """-> [Target] of the flags, the test images, names only, and what a reader must know about
    them, or ''. UserError: flags that cannot work.

    imagenet: the networks on ImageNet if --model_name names none.
    """
    images = opened(args, "test")
    preset = imagenet if images.kind == "imagenet" else PRESETS[images.kind].targets
    targets = targets_of(args.model_name, args.weights, preset, images, args.image_size,
                         args.geometry)
    networks = finished.named(targets, args.data_dir, args.data_root, args.labels, args.classes)
    images, note = finished.images_for(networks)
    finished.check_images(networks, images, args.num_images)
    for target in targets:
        if args.low and args.low > target.size:
            raise UserError(f"--low {args.low}: {target.name} takes {target.size} pixels; type "
                            f"--low {target.size} or less")
    defend(nn.Identity(), args.defense, size=images.size, w=args.w, epsilon=args.epsilon)
    return targets, images, note


def open_networks(s, images, device):
    """{name: Network} of the run's targets; images that stay in memory are decoded once per
    geometry.
    """
    found, in_memory = {}, {}
    for target in s.targets:
        model = target.load(images, data_dir=s.data_dir, data_root=s.data_root, device=device)
        if target.geometry not in in_memory:
            shown = images.prepared(target.geometry, s.num_images)
            in_memory[target.geometry] = decode_once(
                cached(shown, s.cache, workers=s.workers), workers=s.workers, team=s.team)
        found[target.name] = Network(target.name, model, in_memory[target.geometry], target.size,
                                     s, device)
    return found
