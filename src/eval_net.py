"""Networks in one table: accuracy, accuracy under attack, corruptions, universal perturbations.

    --attacks         column                          attack within eps, of --norm
    fgsm              FGSM                            one signed step, arXiv:1412.6572
    pgd20             PGD-20                          steps of eps / 4, random start, 1706.06083
    pgd50x10          PGD-50-10                       the same, from ten random starts
    cw50              CW-50                           the same on the C&W margin, 1608.04644
    strongest_quick   APGD-CE + APGD-T + Square 1000  each on images not fooled so far, 2003.01690
    autoattack        AutoAttack                      the same in full, with FAB-T and Square 5000

    python eval_net.py                                                   # digits, offline
    python eval_net.py --runs runs/free/natural runs/free/free8 --save runs/free
    python eval_net.py --runs runs/challenge/stage1 --attacks none --corruptions
    python eval_net.py --data_dir /data/imagenet/val --model_name resnet50 vit_b_16 --num_images 500
    python eval_net.py --model_name mlp cnn --attacks none --eps_curve --transfer --diverse
    python eval_net.py --attacks pgd20 --save_images saved         # PNG, for --from_images
    python eval_net.py --norm l2 --eps 0.5 --attacks autoattack  # not fgsm, strongest_quick
    python eval_net.py --runs runs/challenge/stage1 --data_dir /data/test --predict  # no labels

--runs takes runs of free_at.py, train_gcm.py and fgsm_mnist.py; data, radius and defence come from
NAME.json. A defended network is measured behind its defence and attacked by the adaptive attacker.
Every cell is saved when done, with partial results on the way; the same command continues where it
stopped. torchrun shares the images among processes.
"""

from functools import cache, partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

import attacks
from utils import curves, data, finished, measure, predictions, report_nets, run, transfer, uaps
from utils.cells import Progress, decode_once
from utils.cli import Parser, at_least, fraction, run_script
from utils.errors import UserError
from utils.saved import check_folders, made_with
from utils.team import join_to_count
from utils.tested import fitting, missing_cells, named_networks, open_all, where

QUICK = ("fgsm", "pgd20", "pgd50x10", "cw50", "strongest_quick")
ATTACKS = (*QUICK, "autoattack")
LINF_ONLY = ("fgsm", "strongest_quick")


# ---------------------------------------------------------------- what is measured

def attacks_in(norm, eps, queries, classes=10, draws=0):
    """{name: Attack}. Images leave PGD once fooled, unless the network is random.

    draws: forward passes averaged by the attacker of a random network; 0: not random.
    """
    steps = partial(attacks.pgd, norm=norm, eps=eps, alpha=eps / 4, stop_early=not draws)
    made = {"FGSM": partial(attacks.fgsm, eps=eps), "PGD-20": partial(steps, steps=20),
            "PGD-50-10": partial(steps, steps=50, restarts=10),
            "CW-50": partial(steps, steps=50, loss="margin"),
            attacks.quick_title(classes, queries): partial(attacks.strongest_quick, eps=eps,
                                                           queries=queries),
            attacks.autoattack_title(classes, draws, norm): partial(
                attacks.autoattack, norm=norm, eps=eps, version="rand" if draws else "standard")}
    ball = "" if norm == "linf" else f" {norm.title()}"
    return {name: measure.Attack(title + ball, norm, eps, attack)
            for name, (title, attack) in zip(ATTACKS, made.items(), strict=True)
            if norm == "linf" or name not in LINF_ONLY}


# ---------------------------------------------------------------------- a run

def get_args():
    parser = Parser("Measure networks, several in one table: accuracy, attacks, corruptions, "
                    "universal perturbations.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "num_images", data_dir={
        "default": None, "help": "data set by name, or folder of class folders; None: what the "
        "--runs were trained on, else digits"}, data_root={"default": None, "help": "where named "
        "data sets are kept or downloaded to; None: where the --runs found them, else data"})
    parser.shared("labels", "classes", "defense", "low", defense={
        "help": "layers in front of every network of --model_name; a run has its own"})
    add("--runs", type=Path, nargs="+", help="networks: run folders or NAME.pth files of "
        "free_at.py, train_gcm.py or fgsm_mnist.py; one from FILE.py:FUNCTION, whose code is run, "
        "only if --model_name names it too")
    parser.shared("model_name", "geometry", "weights", weights={"default": None, "help":
        "of --model_name: V1, V2, random, a state dict (.pth, .safetensors) or a folder with "
        "NAME.pth; one for all or for each; None: V1"})
    add("--attacks", nargs="+", choices=(*ATTACKS, "none"), help="columns of the table; None: all "
        "but autoattack; in L2 and L1 only those of PGD")
    add("--norm", choices=("linf", "l2", "l1"), default="linf", help="of the attacks and of --eps")
    add("--eps", type=fraction, help="radius in [0, 1] pixels; None: in Linf that of the runs' "
        "training, for other networks 8/255, on digits and mnist 0.2; in L2 and L1 none")
    parser.shared("queries")
    add("--eps_curve", action="store_true", help="also robust accuracy at ten radii, from 0 to "
        "where FAB fools every image, or to 4 eps: curve.png, curve.csv")
    add("--transfer", action="store_true", help="also every network's MI-FGSM images on every "
        "other network")
    add("--diverse", action="store_true", help="with --transfer: DI and TI as well")
    add("--save_images", type=Path, help="folder for the attacked images: 8-bit PNG inside the "
        "ball, listed in images.csv and measured again")
    add("--from_images", type=Path, nargs="+", help="also accuracy on images saved by "
        "--save_images: folders DIR/NETWORK/ATTACK")
    add("--draws", type=at_least(1), default=10, help="for a random defence: forward passes that "
        "the adaptive attacker averages (AutoAttack: at least 20), and that classify each image "
        "afterwards")
    add("--corruptions", action="store_true", help="also accuracy under every operation of "
        "utils/augment.py")
    add("--uaps", nargs="+", help="also fooling ratios of these universal perturbations: files "
        "or folders")
    add("--predict", action="store_true", help="only write predictions.csv: the predicted class "
        "of every image, which needs no labels")
    parser.shared("batch_size", "seed", "device", "workers", "cache", batch_size={"default": 250})
    add("--save", type=Path, default=Path("runs/eval_net"), help="folder for tables and pictures")
    parser.shared("overwrite", overwrite={"help": "measure again what is in --save, "
        "and replace what is in --save_images"})
    return parser.parse_args()


def settle(args, device):
    """The flags, filled in. UserError: flags that contradict each other."""
    asked = args.attacks or [one for one in QUICK if args.norm == "linf" or one not in LINF_ONLY]
    _check_norm(args, asked)
    if args.runs and args.weights:
        raise UserError("--runs with --weights: type --runs alone, or networks by name alone")
    if args.runs and (args.defense != "none" or args.low):
        raise UserError("--runs with --defense or --low: a run has its own; leave them out")
    if args.predict and (args.corruptions or args.uaps or args.eps_curve or args.transfer
                         or args.save_images or args.from_images):
        raise UserError("--predict with --corruptions, --uaps, --eps_curve, --transfer or saved "
                        "images: type it alone")
    if "none" in asked and len(set(asked)) > 1:
        raise UserError(f"--attacks {' '.join(asked)}: type none alone, or leave it out")
    if args.save_images and asked == ["none"]:
        raise UserError("--save_images with --attacks none: there is nothing to save; type an "
                        "attack")
    if args.overwrite and args.save_images and any(
            folder.resolve().is_relative_to(args.save_images.resolve())
            for folder in args.from_images or []):
        raise UserError(f"--overwrite --save_images {args.save_images}: removes the images of "
                        "--from_images before they are measured; type two commands")
    if args.diverse and not args.transfer:
        raise UserError("--diverse without --transfer: type both")
    attacked = [name for name in ATTACKS if name in asked]
    return run.settled(args, device=device, attacks=attacked,
                       judged=bool(attacked or args.eps_curve or args.transfer or args.from_images),
                       data_dir=args.data_dir or (None if args.runs else "digits"))


def _check_norm(args, asked):
    """UserError for a radius or an attack that --norm does not support."""
    if args.norm == "linf":
        if args.eps and args.eps > 1:
            raise UserError(f"--eps {args.eps:g}: outside (0, 1], where pixels live; type --eps "
                            "8/255, or --norm l2")
        return
    if args.eps is None:
        raise UserError(f"--norm {args.norm} without --eps: type the radius as well, as --norm l2 "
                        "--eps 0.5 for CIFAR-10")
    for flag, given in (("--attacks " + " ".join(asked), set(asked) & set(LINF_ONLY)),
                        ("--eps_curve", args.eps_curve), ("--transfer", args.transfer)):
        if given:
            raise UserError(f"{flag} --norm {args.norm}: works only in Linf; leave one of them out")


def depends(s, about, images, note, networks, perturbations):
    """What the cells depend on, except saved images; note: from finished.images_for."""
    return {
        "script": "eval_net.py", "data": str(s.data_dir or networks[0].facts["data_dir"]),
        "n": len(images), "images_sha256": images.sha256(), "note": note, "seed": s.seed,
        "labels": run.digest(images.labels), "device": about["device"], "torch": about["torch"],
        **({"eps": networks[0].eps} if s.judged else {}),
        **{f"network {net.name}": net.described(s) for net in networks},
        **{f"uap {uap.name}": run.digest(uap.delta) for uap in perturbations}}


def main(args):
    team, device = join_to_count(run.resolve_device(args.device))
    s = settle(args, device)
    made, named = partial(attacks_in, s.norm), team.in_turn(lambda: named_networks(s))
    folder = team.in_turn(lambda: run.RunFolder(s.save, lock=team.first))
    asked = [(name, facts, *where(facts, s)) for name, _, _, facts, _ in named]
    if s.predict:
        shown = team.in_turn(lambda: [predictions.images_of(*network[1:], s.num_images)
                                      for network in asked])
        networks = [open_all([one], x, s, made)[0]
                    for one, x in zip(named, shown, strict=True)]
        predictions.save_predictions(folder, networks, shown, s, team)
        team.leave()
        return
    images, note = team.in_turn(lambda: finished.images_for(asked))
    finished.check_images(asked, images, s.num_images)
    perturbations = uaps.read_uaps(uaps.find_uaps(s.uaps or [], images.kind), scale="auto", eps=1.0)
    networks = open_all(named, images, s, made)  # trains small ones asked for by name
    perturbations = fitting(perturbations, networks, images)
    other = next((net for net in networks if net.eps != networks[0].eps), None)
    if s.judged and other:
        raise UserError(f"{networks[0].name} has Linf eps {networks[0].eps:.4g}, {other.name} "
                        f"{other.eps:.4g}; type --eps to attack them at one radius")
    shown = finished.said_of(perturbations, images, s.num_images, note)
    images, about = images.prepared(images.size, s.num_images), run.provenance(s.device)
    transfer.check(networks, s)
    wanted = depends(s, about, images, note, networks, perturbations) | team.from_first(
        lambda: made_with(s.from_images, networks))
    settings, done = team.from_first(lambda: folder.load_cells(wanted, overwrite=s.overwrite))
    ready = cache(lambda at: decode_once(
        data.cached(images.prepared(at, None), s.cache, workers=s.workers), workers=s.workers,
        team=team))
    check_folders(networks, ready, s, team)
    progress = Progress(team, folder / "partial.json", wanted, device)
    missing = [missing_cells(net, ready, perturbations, done, s, progress) for net in networks]
    missing += [curves.missing_cells(net, ready, done, s, progress) for net in networks
                if s.eps_curve]
    if s.transfer:
        missing.append(transfer.missing_cells(networks, attacks.mim, ready, done, s, progress))
    for key, cell in chain(*missing):
        done[key] = cell | {"commit": about["commit"], "processes": team.size,
                            "batch_size": s.batch_size}
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
