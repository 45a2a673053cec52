"""Networks in one table: accuracy, accuracy under attack, corruptions, universal perturbations.

    --attacks    column                            attack within Linf eps
    fgsm         FGSM                              one signed step, arXiv:1412.6572
    pgd20        PGD-20                            steps of eps / 4 from a random start, 1706.06083
    pgd50x10     PGD-50-10                         the same, from ten random starts
    cw50         CW-50                             the same on C&W's margin, one start, 1608.04644
    strongest    APGD-CE + APGD-T + Square 1000    each on what is left, 2003.01690

    python eval_net.py                                                   # digits, offline
    python eval_net.py --runs runs/free/natural runs/free/free8 --save runs/free
    python eval_net.py --runs runs/challenge/stage1 --attacks none --corruptions
    python eval_net.py --data_dir /data/imagenet/val --model_name resnet50 vit_b_16 --num_images 500
    python eval_net.py --runs runs/challenge/stage1 --data_dir /data/test --predict  # no labels

--runs takes what free_at.py, train_gcm.py and fgsm_mnist.py left: data, radius and defence are
those of NAME.json. A network behind a defence is measured behind it and attacked by the adaptive
attacker. Every cell is saved when it is done; the same command continues where it was stopped.
"""

from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import attacks
from utils import data, finished, measure, models, predictions, report_nets, uaps
from utils.attack.chance import numbered
from utils.augment import OPS
from utils.cli import Parser, at_least, radius, run_script
from utils.defenses import adaptive, defend, describe, is_random
from utils.errors import UserError
from utils.run import RunFolder, make_generator, provenance, resolve_device, save_json, settled

ATTACKS = ("fgsm", "pgd20", "pgd50x10", "cw50", "strongest")
BLOCK = 100  # images that are corrupted at once: the random numbers of a corruption are theirs


# ---------------------------------------------------------------- what is measured

def linf_attacks(eps, queries, classes=10, random=False):
    """{name: Attack}. Images leave a PGD once they are fooled, unless the network is random."""
    steps = partial(attacks.pgd, eps=eps, alpha=eps / 4, stop_early=not random)
    runs = {"FGSM": partial(attacks.fgsm, eps=eps), "PGD-20": partial(steps, steps=20),
            "PGD-50-10": partial(steps, steps=50, restarts=10),
            "CW-50": partial(steps, steps=50, loss="margin"),
            attacks.strongest_title(classes, queries): partial(attacks.strongest, eps=eps,
                                                               queries=queries)}
    return {name: measure.Attack(title, "linf", eps, run)
            for name, (title, run) in zip(ATTACKS, runs.items(), strict=True)}


@torch.no_grad()
def accuracy_cell(model, images, operations, *, batch_size, chance, device, workers):
    """How many images are classified correctly: clean, and under each of {name: operation}."""
    right, n = dict.fromkeys(("clean", *operations), 0), 0
    with tqdm(total=len(images), desc="accuracy", unit="img", leave=False, disable=None) as bar:
        for index, x in data.batches(images, BLOCK, workers=workers, skipped=[]):
            x, y = data.to_float(x.to(device)), images.labels[index].to(device)
            for k, name in enumerate(right):
                own = chance[index].fold(k)
                drawn = make_generator(own.fold(int(index[0]) // BLOCK).seed)
                z = x if name == "clean" else operations[name](x, generator=drawn)
                right[name] += sum(
                    int(measure.times_right(model, z[part], y[part], 1, own[part]).sum())
                    for part in torch.arange(len(y)).split(batch_size))
            n += len(y)
            bar.update(len(y))
    return {"n": n, "right": right}


def fooling_cell(model, images, delta, chance, device):
    """Of how many images a universal perturbation (C, H, W) changes the predicted class."""
    before, after = (measure.predictions([model], images.pixels, device, delta=d,
                                         chance=chance.fold(k))
                     for k, d in ((measure.BEFORE, None), (measure.AFTER, delta)))
    return {"n": len(images), "fooled": int((after != before).sum())}


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

    def clean_cell(self, images, s):
        """The cell of no attack at all: in how many forward passes each image is right."""
        before = measure.times_right_on(
            self.defended, images, draws=self.draws(s), batch_size=s.batch_size,
            chance=numbered(s.seed, len(images)), device=s.device).tolist()
        return {"n": len(images), "draws": self.draws(s), "before": before, "after": before}

    def attack_cell(self, attack, images, before, s):
        """The cell of one attack by the adaptive attacker, measured behind the defence."""
        return measure.run_cell(
            attack, adaptive(self.defended, s.draws), self.defended, images, torch.tensor(before),
            draws=self.draws(s), batch_size=s.batch_size, chance=numbered(s.seed, len(images)),
            device=s.device, desc=f"{self.name} {attack.title}")


def missing_cells(net, images, in_memory, perturbations, done, s):
    """Yields (key, cell) of what is not yet in {key: cell} `done`, where the caller puts it.

    images: names only; in_memory(geometry): the same with their pixels.
    """
    own, at = f"{net.name} | ", net.target.geometry
    if s.attacks and "before" not in done.get(own + "clean", {}):
        yield own + "clean", net.clean_cell(in_memory(at), s)
    for title, attack in net.attacks(s).items():
        if own + title not in done:
            yield own + title, net.attack_cell(attack, in_memory(at),
                                               done[own + "clean"]["before"], s)
    key = own + ("corruptions" if s.corruptions else "accuracy")
    if key not in done and (s.corruptions or not s.attacks):
        shown = in_memory(at) if s.attacks or perturbations else images.prepared(at, None)
        yield key, accuracy_cell(
            net.defended, shown, OPS if s.corruptions else {}, batch_size=s.batch_size,
            chance=numbered(s.seed, len(shown)), device=s.device, workers=s.workers)
    for uap in perturbations:
        if own + f"uap {uap.name}" not in done:
            yield own + f"uap {uap.name}", fooling_cell(
                net.defended, in_memory(at), uap.delta, numbered(s.seed, len(in_memory(at))),
                s.device)


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
        model = model.to(memory_format=torch.channels_last)  # the faster on photographs
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
    add("--attacks", nargs="+", choices=(*ATTACKS, "none"), default=list(ATTACKS),
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
    parser.shared("batch_size", "seed", "device", "workers", batch_size={"default": 250})
    add("--save", type=Path, default=Path("runs/eval_net"), help="folder for tables and picture")
    parser.shared("overwrite", overwrite={"help": "measure again what is in --save"})
    return parser.parse_args()


def settle(args):
    """The flags, filled in. UserError: flags that contradict each other."""
    if args.runs and (args.model_name or args.weights):
        raise UserError("--runs with --model_name or --weights: type --runs alone, or networks by "
                        "name alone")
    if args.predict and (args.corruptions or args.uaps):
        raise UserError("--predict with --corruptions or --uaps: type it alone")
    if "none" in args.attacks and len(set(args.attacks)) > 1:
        raise UserError(f"--attacks {' '.join(args.attacks)}: type none alone, or leave it out")
    return settled(args, device=resolve_device(args.device),
                   attacks=[name for name in ATTACKS if name in args.attacks],
                   data_dir=args.data_dir or (None if args.runs else "digits"))


def main(args):
    s = settle(args)
    named, folder = named_networks(s), RunFolder(s.save)
    asked = [(name, facts, *where(facts, s)) for name, _, _, facts, _ in named]
    if s.predict:
        shown = [predictions.images_of(*network[1:], s.num_images) for network in asked]
        networks = [open_all([one], x, s)[0] for one, x in zip(named, shown, strict=True)]
        predictions.save_predictions(folder, networks, shown, s)
        return
    images, note = finished.images_for(asked)
    finished.check_images(asked, images, s.num_images)
    perturbations = uaps.read_uaps(uaps.find_uaps(s.uaps or [], images.kind), scale="auto", eps=1.0)
    networks = open_all(named, images, s)  # trains the small ones that are asked for by name
    perturbations = fitting(perturbations, networks, images)
    other = next((net for net in networks if net.eps != networks[0].eps), None)
    if s.attacks and other:
        raise UserError(f"{networks[0].name} has Linf eps {networks[0].eps:.4g}, {other.name} "
                        f"{other.eps:.4g}; type --eps to attack them at one radius")
    shown = finished.said_of(perturbations, images, s.num_images, note)
    images, run = images.prepared(images.size, s.num_images), provenance(s.device)
    wanted = {
        "script": "eval_net.py", "data": str(s.data_dir or networks[0].facts["data_dir"]),
        "n": len(images), "images_sha256": images.sha256(), "note": note, "seed": s.seed,
        "batch_size": s.batch_size, "device": run["device"], "torch": run["torch"],
        **({"eps": networks[0].eps} if s.attacks else {}),
        **{f"network {net.name}": net.described(s) for net in networks},
        **{f"uap {uap.name}": uaps.digest(uap.delta) for uap in perturbations}}
    settings, done = (wanted, {}) if s.overwrite else folder.load_cells(wanted)
    in_memory = cache(lambda at: data.load(images.prepared(at, None), workers=s.workers))
    for net in networks:
        for key, cell in missing_cells(net, images, in_memory, perturbations, done, s):
            done[key] = cell | {"commit": run["commit"]}
            save_json(folder / "results.json", {"settings": settings, "cells": done})
            tqdm.write(f"{key}: {report_nets.headline(cell)}")
    text = report_nets.save_tables(folder, networks, wanted | {"note": shown}, done, s)  # of --uaps
    print("\n" + text + f"saved {folder.path}/results.json (.csv, .md)", flush=True)


if __name__ == "__main__":
    run_script(get_args, main)
