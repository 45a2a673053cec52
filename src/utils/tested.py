"""The networks of eval_net.py: loading them behind their defences, measuring missing cells."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from utils import data, finished, measure, models, uaps
from utils.attack.chance import numbered
from utils.augment import OPS
from utils.defenses import adaptive, defend, describe, is_random
from utils.errors import UserError
from utils.halving import Halving
from utils.precision import placed
from utils.saved import Kept, saved_cells
from utils.sources import in_file


@dataclass(frozen=True, eq=False)
class Tested:
    """A network in memory. facts: NAME.json of its run in `folder`; {} and None without a run.

    made(eps, queries, classes, draws): {name of --attacks: Attack}.
    """
    name: str
    target: models.Target
    model: nn.Module
    classes: int
    eps: float
    facts: dict
    folder: Path
    made: Callable = None
    defense: str = "none"
    low: int | None = None

    @cached_property
    def defended(self):
        """The network behind its defence."""
        return defend(self.model, self.defense, size=self.target.size, low=self.low).eval()

    @property
    def front(self):
        """The defence in words."""
        return describe(self.defense, size=self.target.size, low=self.low)

    def draws(self, s):
        return s.draws if is_random(self.defense) else 1

    def attacks(self, s):
        """{column: Attack} of --attacks."""
        every = self.made(self.eps, s.queries, self.classes, s.draws * is_random(self.defense))
        return {every[name].title: every[name] for name in s.attacks}

    def described(self, s):
        """Everything about the network that its cells depend on, as text."""
        return (f"{self.target.name} ({self.target.described}) behind {self.front}, "
                f"{self.draws(s)} draws" + f", {self.target.geometry}" * (self.target.size > 64))

    def clean_cell(self, images, s, progress):
        """The cell without an attack: in how many forward passes each image is right."""
        before = measure.count_right_on(
            self.defended, images, draws=self.draws(s), batch_size=s.batch_size,
            chance=numbered(s.seed, len(images)), device=s.device, workers=s.workers,
            progress=progress, cell=f"{self.name} clean").tolist()
        return {"n": len(images), "draws": self.draws(s), "before": before, "after": before}

    def kept(self, cell, attack, images, s, team):
        """Whether a cell needs nothing more for --save_images: figure and all images are there."""
        return not s.save_images or ("after8" in cell and team.from_first(
            Kept(self, attack, images, s).whole))

    def attack_cell(self, attack, images, before, s, progress):
        """The cell of one attack by the adaptive attacker, measured behind the defence."""
        keep = Kept(self, attack, images, s) if s.save_images else None
        if keep:
            keep.begin(before, progress)
        cell = measure.run_cell(
            attack, adaptive(self.defended, s.draws), self.defended, images, torch.tensor(before),
            draws=self.draws(s), batch_size=s.batch_size, chance=numbered(s.seed, len(images)),
            device=s.device, workers=s.workers, progress=progress, keep=keep,
            desc=f"{self.name} {attack.title}" + f", saved in {s.save_images}" * bool(keep))
        if keep:
            keep.finish(before, progress.team)
        return cell


def missing_cells(net, ready, perturbations, done, s, progress):
    """Yields (key, cell) for every key missing from `done`, to which the caller adds it.

    ready(geometry): the images, without broken files. UserError if their number has changed.
    """
    own, at = f"{net.name} | ", net.target.geometry
    if s.judged and "before" not in done.get(own + "clean", {}):
        yield own + "clean", net.clean_cell(ready(at), s, progress)
    for title, attack in net.attacks(s).items():
        if own + title not in done or not net.kept(done[own + title], attack, ready(at), s,
                                                   progress.team):
            clean = done[own + "clean"]
            if len(clean["before"]) != len(ready(at)):
                raise UserError(f"--save {s.save}: holds a table of {len(clean['before'])} images, "
                                f"{len(ready(at))} can be read now; choose another folder")
            yield own + title, net.attack_cell(attack, ready(at), clean["before"], s, progress)
    key = own + ("corruptions" if s.corruptions else "accuracy")
    if key not in done and (s.corruptions or not s.judged):
        yield key, measure.accuracy_cell(
            net.defended, ready(at), OPS if s.corruptions else {}, batch_size=s.batch_size,
            chance=numbered(s.seed, len(ready(at))), device=s.device, workers=s.workers,
            progress=progress, cell=key)
    yield from saved_cells(net, ready(at), done, s, progress)
    for uap in perturbations:
        if (key := own + f"uap {uap.name}") not in done:
            yield key, measure.fooling_cell(
                net.defended, ready(at), uap.delta, numbered(s.seed, len(ready(at))), s.device,
                batch_size=s.batch_size, workers=s.workers, progress=progress, cell=key)


def named_networks(s):
    """[(name, network's name, weights, facts of NAME.json, folder)] of --runs or --model_name."""
    if s.runs:
        return [(name, facts["model_name"], str(path), facts, path.parent)
                for name, path, facts in _runs(s)]
    images = data.opened(s, "test")
    found = []
    for target in models.targets_of(s.model_name, s.weights or [["V1"]],
                                    data.PRESETS[images.kind].targets, images):
        found.append((target.name, target.typed, target.weights, finished.facts_of(target), None))
    return found


def _runs(s):
    """finished.read_runs(--runs). UserError if NAME.json names code that the user did not type."""
    runs, typed = finished.read_runs(s.runs), sum(s.model_name or [], [])
    files = [facts["model_name"] for *_, facts in runs if in_file(facts["model_name"])]
    for (_, path, facts) in runs:
        name = facts["model_name"]
        if name in files and name not in typed:
            more = " ".join(map(shlex.quote, dict.fromkeys(files)))
            raise UserError(f"{path.with_suffix('.json')}: its network is {name}, code that would "
                            f"be run; if you trust it, type --model_name {more} beside --runs")
    other = next((name for name in typed if name not in files), None)
    if other:
        raise UserError(f"--runs with --model_name {other}: not a FILE.py:FUNCTION of these runs; "
                        "type --runs alone, or networks by name alone")
    return runs


def where(facts, s):
    """data_dir, data_root, labels and classes of a network's test images. The run's own --labels
    belong to its training images.
    """
    known = {} if s.data_dir else facts
    return (s.data_dir or facts["data_dir"], s.data_root or facts.get("data_root", "data"),
            s.labels, s.classes or known.get("classes_are"))


def open_all(named, images, s, made):
    """[Tested] of the list that named_networks returns; made: see Tested."""
    networks = []
    for name, model_name, weights, facts, folder in named:
        data_dir, data_root, *_ = where(facts, s)
        target, = models.targets_of([[model_name]], [[weights]], None, images, None, s.geometry)
        model = target.load(images, data_dir=data_dir, data_root=data_root, device=s.device)
        model = Halving(placed(model, s.device), name)
        zero = torch.zeros((1, images.channels, target.size, target.size), device=s.device)
        facts, defense, low = ((facts, facts.get("defense", "none"), facts.get("low")) if folder
                               else ({}, s.defense, s.low))
        eps = s.eps or finished.linf_radius(facts, images.kind)
        networks.append(Tested(name, target, model, model(zero).shape[1], eps, facts, folder, made,
                               defense, low))
        _ = networks[-1].defended  # reports now if the defence cannot be built
    return networks


def fitting(found, networks, images):
    """The perturbations to measure; with a random defence, the zero one first. UserError if one
    does not fit the images.
    """
    for net in networks:
        shape = (images.channels, net.target.size, net.target.size)
        for uap in found:
            if tuple(uap.delta.shape) != shape:
                raise UserError(f"--uaps {uap.path}: of shape {tuple(uap.delta.shape)}; wanted "
                                f"{shape}, as {net.name} takes images")
    if found and any(is_random(net.defense) for net in networks):
        zero = torch.zeros_like(found[0].delta)
        found = [uaps.Uap("none (changed by chance)", Path(), zero), *found]
    return found
