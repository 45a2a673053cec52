"""Networks in one table: accuracy, accuracy under attack, corruptions, universal perturbations.

    --attacks    column                            attack within Linf eps
    fgsm         FGSM                              one signed step, arXiv:1412.6572
    pgd20        PGD-20                            steps of eps / 4 from a random start, 1706.06083
    pgd50x10     PGD-50-10                         the same, from ten random starts
    cw50         CW-50                             the same on C&W's margin, one start, 1608.04644
    strongest_quick  APGD-CE + APGD-T + Square 1000  each on what is left, 2003.01690
    autoattack   AutoAttack                        APGD-CE, APGD-T, FAB-T, Square 5000, 2003.01690

    python eval_net.py                                                   # digits, offline
    python eval_net.py --runs runs/free/natural runs/free/free8 --save runs/free
    python eval_net.py --runs runs/challenge/stage1 --attacks none --corruptions
    python eval_net.py --data_dir /data/imagenet/val --model_name resnet50 vit_b_16 --num_images 500
    python eval_net.py --runs runs/challenge/stage1 --data_dir /data/test --predict  # no labels

--runs takes what free_at.py, train_gcm.py and fgsm_mnist.py left: data, radius and defence are
those of NAME.json. A network behind a defence is measured behind it and attacked by the adaptive
attacker. Every cell is saved when it is done, and parts of it on the way; the same command
continues where it was stopped. torchrun shares the images among processes.
"""

from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import attacks
from utils import data, finished, measure, models, predictions, report_nets, run, uaps
from utils.attack.chance import numbered
from utils.augment import OPS
from utils.cells import Progress, at_hand
from utils.cli import Parser, at_least, radius, run_script
from utils.defenses import adaptive, defend, describe, is_random
from utils.errors import UserError
from utils.halving import Halving
from utils.team import join_to_count

QUICK = ("fgsm", "pgd20", "pgd50x10", "cw50", "strongest_quick")
ATTACKS = (*QUICK, "autoattack")


# ---------------------------------------------------------------- what is measured

def linf_attacks(eps, queries, classes=10, random=False):
    """{name: Attack}. Images leave a PGD once they are fooled, unless the network is random."""
    steps = partial(attacks.pgd, eps=eps, alpha=eps / 4, stop_early=not random)
    made = {"FGSM": partial(attacks.fgsm, eps=eps), "PGD-20": partial(steps, steps=20),
            "PGD-50-10": partial(steps, steps=50, restarts=10),
            "CW-50": partial(steps, steps=50, loss="margin"),
            attacks.quick_title(classes, queries): partial(attacks.strongest_quick, eps=eps,
                                                           queries=queries),
            attacks.autoattack_title(classes, random): partial(
                attacks.autoattack, eps=eps, version="rand" if random else "standard")}
    return {name: measure.Attack(title, "linf", eps, attack)
            for name, (title, attack) in zip(ATTACKS, made.items(), strict=True)}


# -------------------------------------------------------------------- the networks

@dataclass(frozen=True, eq=False)
class Tested:
    """A network in memory. facts: NAME.json of its run in `folder`; {} and None without a run."""
    name: str
    target: models.Target
    model: nn.Module
    classes: int
    eps: float
    facts: dict
    folder: Path

    @property
    def defense(self):
        return self.facts.get("defense", "none")

    @cached_property
    def defended(self):
        """The network behind its defence."""
        return defend(self.model, self.defense, size=self.target.size,
                      low=self.facts.get("low")).eval()

    def draws(self, s):
        return s.draws if is_random(self.defense) else 1

    def attacks(self, s):
        """{column: Attack} of --attacks."""
        every = linf_attacks(self.eps, s.queries, self.classes, is_random(self.defense))
        return {every[name].title: every[name] for name in s.attacks}

    def described(self, s):
        """What its cells depend on."""
        front = describe(self.defense, size=self.target.size, low=self.facts.get("low"))
        return (f"{self.target.name} ({self.target.described}) behind {front}, {self.draws(s)} "
                "draws" + f", {self.target.geometry}" * (self.target.size > 64))

    def clean_cell(self, images, s, progress):
        """The cell of no attack at all: in how many forward passes each image is right."""
        before = measure.times_right_on(
            self.defended, images, draws=self.draws(s), batch_size=s.batch_size,
            chance=numbered(s.seed, len(images)), device=s.device, workers=s.workers,
            progress=progress, cell=f"{self.name} clean").tolist()
        return {"n": len(images), "draws": self.draws(s), "before": before, "after": before}

    def attack_cell(self, attack, images, before, s, progress):
        """The cell of one attack by the adaptive attacker, measured behind the defence."""
        return measure.run_cell(
            attack, adaptive(self.defended, s.draws), self.defended, images, torch.tensor(before),
            draws=self.draws(s), batch_size=s.batch_size, chance=numbered(s.seed, len(images)),
            device=s.device, desc=f"{self.name} {attack.title}", workers=s.workers,
            progress=progress)


def missing_cells(net, ready, perturbations, done, s, progress):
    """Yields (key, cell) of what is not yet in {key: cell} `done`, where the caller puts it.

    ready(geometry): the images, without broken files. UserError: these are others than before.
    """
    own, at = f"{net.name} | ", net.target.geometry
    if s.attacks and "before" not in done.get(own + "clean", {}):
        yield own + "clean", net.clean_cell(ready(at), s, progress)
    for title, attack in net.attacks(s).items():
        if own + title not in done:
            clean = done[own + "clean"]
            if len(clean["before"]) != len(ready(at)):
                raise UserError(f"--save {s.save}: holds a table of {len(clean['before'])} images, "
                                f"{len(ready(at))} can be read now; choose another folder")
            yield own + title, net.attack_cell(attack, ready(at), clean["before"], s, progress)
    key = own + ("corruptions" if s.corruptions else "accuracy")
    if key not in done and (s.corruptions or not s.attacks):
        yield key, measure.accuracy_cell(
            net.defended, ready(at), OPS if s.corruptions else {}, batch_size=s.batch_size,
            chance=numbered(s.seed, len(ready(at))), device=s.device, workers=s.workers,
            progress=progress, cell=key)
    for uap in perturbations:
        if (key := own + f"uap {uap.name}") not in done:
            yield key, measure.fooling_cell(
                net.defended, ready(at), uap.delta, numbered(s.seed, len(ready(at))), s.device,
                batch_size=s.batch_size, workers=s.workers, progress=progress, cell=key)


def named_networks(s):
    """[(name, network's name, weights, NAME.json, folder)] of --runs, or of networks by name."""
    if s.runs:
        return [(name, facts["model_name"], str(path), facts, path.parent)
                for name, path, facts in finished.read_runs(s.runs)]
    images = data.opened(s, "test")
    found = []
    for target in models.targets_of(s.model_name, s.weights or [["V1"]],
                                    data.PRESETS[images.kind].targets, images):
        found.append((target.name, target.typed, target.weights, finished.facts_of(target), None))
    return found


def where(facts, s):
    """data_dir, data_root, labels and classes of the images that a network is tested on. The run's
    own --labels were those of its training images.
    """
    known = {} if s.data_dir else facts
    return (s.data_dir or facts["data_dir"], s.data_root or facts.get("data_root", "data"),
            s.labels, s.classes or known.get("classes_are"))


def open_all(named, images, s):
    """[Tested] of [(name, network's name, weights, NAME.json, folder)]."""
    networks = []
    for name, model_name, weights, facts, folder in named:
        data_dir, data_root, *_ = where(facts, s)
        target, = models.targets_of([[model_name]], [[weights]], None, images, None, s.geometry)
        model = target.load(images, data_dir=data_dir, data_root=data_root, device=s.device)
        model = Halving(model.to(memory_format=torch.channels_last), name)  # faster on photographs
        zero = torch.zeros((1, images.channels, target.size, target.size), device=s.device)
        facts = facts if folder else {}
        networks.append(Tested(name, target, model, model(zero).shape[1],
                               s.eps or finished.linf_radius(facts, images.kind), facts, folder))
        _ = networks[-1].defended  # says now if the defence cannot be built
    return networks


def fitting(found, networks, images):
    """The perturbations that are measured; UserError if one cannot be added to the images."""
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


# ---------------------------------------------------------------------- a run

def get_args():
    parser = Parser("Measure networks, several in one table: accuracy, attacks, corruptions, "
                    "universal perturbations.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "num_images", data_dir={
        "default": None, "help": "data set by name, or folder of class folders; None: what the "
        "--runs were trained on, else digits"}, data_root={"default": None, "help": "where named "
        "data sets are kept or downloaded to; None: where the --runs found them, else data"})
    parser.shared("labels", "classes")
    add("--runs", type=Path, nargs="+", help="networks: run folders or NAME.pth files that "
        "free_at.py, train_gcm.py or fgsm_mnist.py left")
    parser.shared("model_name", "geometry", "weights", weights={"default": None, "help":
        "of --model_name: V1, V2, random, a state dict (.pth, .safetensors) or a folder with "
        "NAME.pth; one for all or for each; None: V1"})
    add("--attacks", nargs="+", choices=(*ATTACKS, "none"), default=list(QUICK),
        help="columns of the table")
    add("--eps", type=radius, help="Linf radius in [0, 1] pixels; None: that of the runs' "
        "training, for other networks 8/255, on digits and mnist 0.2")
    parser.shared("queries")
    add("--draws", type=at_least(1), default=10, help="of a random defence: forward passes that "
        "the adaptive attacker averages, and in which each image is classified afterwards")
    add("--corruptions", action="store_true", help="also accuracy under every operation of "
        "utils/augment.py")
    add("--uaps", nargs="+", help="also fooling ratios of these universal perturbations: files, "
        "or folders that hold some")
    add("--predict", action="store_true", help="only write predictions.csv: the predicted class "
        "of every image, which needs no labels")
    parser.shared("batch_size", "seed", "device", "workers", "cache", batch_size={"default": 250})
    add("--save", type=Path, default=Path("runs/eval_net"), help="folder for tables and picture")
    parser.shared("overwrite", overwrite={"help": "measure again what is in --save"})
    return parser.parse_args()


def settle(args, device):
    """The flags, filled in. UserError: flags that contradict each other."""
    if args.runs and (args.model_name or args.weights):
        raise UserError("--runs with --model_name or --weights: type --runs alone, or networks by "
                        "name alone")
    if args.predict and (args.corruptions or args.uaps):
        raise UserError("--predict with --corruptions or --uaps: type it alone")
    if "none" in args.attacks and len(set(args.attacks)) > 1:
        raise UserError(f"--attacks {' '.join(args.attacks)}: type none alone, or leave it out")
    return run.settled(args, device=device,
                       attacks=[name for name in ATTACKS if name in args.attacks],
                       data_dir=args.data_dir or (None if args.runs else "digits"))


def main(args):
    team, device = join_to_count(run.resolve_device(args.device))
    s = settle(args, device)
    named = team.in_turn(lambda: named_networks(s))
    folder = team.in_turn(lambda: run.RunFolder(s.save, lock=team.first))
    asked = [(name, facts, *where(facts, s)) for name, _, _, facts, _ in named]
    if s.predict:
        shown = team.in_turn(lambda: [predictions.images_of(*network[1:], s.num_images)
                                      for network in asked])
        networks = [open_all([one], x, s)[0] for one, x in zip(named, shown, strict=True)]
        predictions.save_predictions(folder, networks, shown, s, team)
        team.leave()
        return
    images, note = team.in_turn(lambda: finished.images_for(asked))
    finished.check_images(asked, images, s.num_images)
    perturbations = uaps.read_uaps(uaps.find_uaps(s.uaps or [], images.kind), scale="auto", eps=1.0)
    networks = open_all(named, images, s)  # trains the small ones that are asked for by name
    perturbations = fitting(perturbations, networks, images)
    other = next((net for net in networks if net.eps != networks[0].eps), None)
    if s.attacks and other:
        raise UserError(f"{networks[0].name} has Linf eps {networks[0].eps:.4g}, {other.name} "
                        f"{other.eps:.4g}; type --eps to attack them at one radius")
    shown = finished.said_of(perturbations, images, s.num_images, note)
    images, about = images.prepared(images.size, s.num_images), run.provenance(s.device)
    wanted = {
        "script": "eval_net.py", "data": str(s.data_dir or networks[0].facts["data_dir"]),
        "n": len(images), "images_sha256": images.sha256(), "note": note, "seed": s.seed,
        "batch_size": s.batch_size, "device": about["device"], "torch": about["torch"],
        **({"eps": networks[0].eps} if s.attacks else {}),
        **{f"network {net.name}": net.described(s) for net in networks},
        **{f"uap {uap.name}": uaps.digest(uap.delta) for uap in perturbations}}
    settings, done = (wanted, {}) if s.overwrite else team.from_first(
        lambda: folder.load_cells(wanted))
    progress = Progress(team, folder / "partial.json", wanted | {
        "commit": about["commit"], "labels": uaps.digest(images.labels)})
    if s.overwrite:
        progress.clear()
    ready = cache(lambda at: at_hand(
        data.cached(images.prepared(at, None), s.cache, workers=s.workers), workers=s.workers,
        team=team))
    for net in networks:
        for key, cell in missing_cells(net, ready, perturbations, done, s, progress):
            done[key] = cell | {"commit": about["commit"], "processes": team.size}
            if team.first:
                run.save_json(folder / "results.json", {"settings": settings, "cells": done})
            progress.clear()
            tqdm.write(f"{key}: {report_nets.headline(cell)}")
    if team.first:
        text = report_nets.save_tables(folder, networks, wanted | {"note": shown}, done, s)
        print(f"\n{text}saved {folder.path}/results.json (.csv, .md)", flush=True)
    team.leave()


if __name__ == "__main__":
    run_script(get_args, main)
