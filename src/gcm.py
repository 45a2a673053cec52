"""GCM: robustness behind the Gradient Concealment Module (Pei et al., 2022, arXiv:2205.10617).

    paper                            here
    x + epsilon sin(w x), w = 1e20   GradientConcealment, in utils/defenses.py
    random resize and pad            ResizePad, drawn anew for every image and forward pass
    robustness table                 the rows "vanilla" and "naive attacker"
    -                                the row "adaptive attacker"

The layer moves a pixel by at most epsilon = 1e-8, so predictions do not change. Its derivative,
1 + epsilon w cos(w x), is as large as 1e12, with either sign, and differs from pixel to pixel. A
naive attacker follows the gradient through the layer and finds little. An adaptive attacker
replaces the layer's backward pass with the identity (BPDA, arXiv:1802.00420).

    python gcm.py                                            # digits, offline
    python gcm.py --data_dir /data/imagenet/val              # the paper's six networks
    python gcm.py --audit ...                                # signs of gradient masking, a verdict
    python gcm.py --w_sweep ...                              # robustness against w, both attackers

The attacks are those of RobustART, whose columns the paper prints: FGSM, and PGD with 20 steps of
3/40 eps from a random start, on 224 x 224 pixels. No source gives the settings of "C&W" with a
radius eps: here it is PGD on the C&W margin loss. `cw_l2` (--attacks) is the original C&W search;
it fails where its norm exceeds eps. The paper's rows show only figures of the same attack at the
same size. Every cell (network, row, attack) is saved when done, with partial results on the way;
the same command continues where it stopped. torchrun shares the images among processes.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import attacks as per_image
from attacks import apgd, cw_l2, fgsm, pgd, square
from utils import data, defenses, measure, papers, report, report_gcm, run
from utils.attack import adaptive, balls
from utils.cells import Progress
from utils.cli import Parser, at_least, fraction, radius, run_script
from utils.defended import open_networks, open_targets
from utils.errors import UserError
from utils.team import join_to_count

# --------------------------------------------------------- naive and adaptive attackers

def seen_by(attacker, defended, vanilla, draws):
    """The model whose gradient the attacker follows; the result is measured on `defended`.

    With GCM, defended(x) = f(x + epsilon sin(w x)), where f is the vanilla network, and the
    gradient is
        naive       f'(x) (1 + epsilon w cos(w x)), a random factor up to 1e12 for every pixel
        adaptive    f'(x): the layer's backward pass is the identity (bpda); with a random defence,
                    its mean over `draws` forward passes (eot)
        vanilla     f'(x) of the network without its defence: a transfer attack
    """
    if attacker == "vanilla":
        return vanilla
    return defenses.adaptive(defended, draws) if attacker == "adaptive" else defended


@dataclass(frozen=True)
class Cell:
    """One attack by one attacker on one network behind one defence."""
    model: str     # name of the network
    defense: str
    attacker: str  # naive, adaptive or vanilla: seen_by
    attack: str    # a key of robustart_attacks
    w: float       # of gcm

    def key(self, s):
        """The key in results.json, with the settings that only some cells depend on."""
        words = [self.model, self.defense]
        if "gcm" in self.defense:
            words += [f"w={self.w:g}", f"epsilon={s.epsilon:g}"]
        if defenses.is_random(self.defense):
            words += [f"low={s.low}", f"draws={s.draws}"]
        words += [self.attacker, self.attack.removesuffix("_quick")]  # as older tables have it
        if self.attack in ("square", "strongest_quick"):
            words.append(str(s.queries))
        return " ".join(words)


def measure_cell(cell, network, s, progress):
    """Attacks `network` (utils/defended.py) as the cell says. -> its entry in results.json

    The published protocol has only naive attackers; for the others, fooled images leave PGD.
    """
    defended = network.behind(cell.defense, cell.w)
    seen = seen_by(cell.attacker, network.behind(cell.defense, cell.w, fast=True), network.fast,
                   s.draws)
    judge = seen_by(cell.attacker, defended, network.model, s.draws) if s.amp != "off" else None
    eps = radii(network.images, network.size, s.eps, s.eps_l2, s.eps_l1)
    attack = robustart_attacks(eps, s.queries, network.classes, judge=judge,
                               draws=defenses.is_random(cell.defense) * adaptive.draws_of(seen),
                               stop_early=s.stop_early or cell.attacker != "naive")[cell.attack]
    counts = measure.run_cell(
        attack, seen, defended, network.images, network.right(cell.defense, cell.w, progress),
        draws=network.draws(cell.defense), batch_size=s.batch_size, chance=network.chance,
        device=network.device, desc=cell.key(s), workers=s.workers, progress=progress)
    return {**asdict(cell), "title": attack.title, **counts}


# --------------------------------------------------------------------- the attacks

STEPS, RELATIVE = 20, 3 / 40  # RobustART's PGD: steps, and step size over eps
FARTHER = (4, 8)              # times eps, in the audit: robustness should fall to zero
MORE = ("pgd_l1_exact", "cw_l2", "apgd", "square", "strongest_quick", "autoattack")  # our columns


def robustart_attacks(eps, queries, classes=1000, *, stop_early=False, draws=0, judge=None):
    """{name: Attack}; eps {norm: radius}; classes: number of classes of the network.

    draws: forward passes averaged by the attacker of a random defence; 0: not random. stop_early:
    fooled images leave PGD. At the larger radii they always do; behind a random defence they never
    do. The loss of pgd_linf is recorded where all images take all steps. judge: for cw_l2, whose
    images lie on the decision boundary of the network that it attacks.
    """
    def steps(title, norm, scale=1, early=stop_early and not draws, follow=False, **settings):
        """RobustART's PGD with these settings; scale: multiplies eps."""
        at = eps[norm] * scale if norm != "linf" else min(1.0, eps[norm] * scale)
        return measure.Attack(f"{title}={report.eps_text(at, norm)}", norm, at, partial(
            pgd, norm=norm, eps=at, alpha=RELATIVE * at, steps=STEPS, stop_early=early,
            **{"projection": "rescale", **settings}), follow)

    linf, l2 = eps["linf"], eps["l2"]
    shown = f"Linf {report.eps_text(linf, 'linf')}"
    return {
        "fgsm": measure.Attack(f"FGSM {shown}", "linf", linf, partial(fgsm, eps=linf)),
        "pgd_l1": steps("PGD L1", "l1", step="dense"),
        "pgd_l2": steps("PGD L2", "l2"),
        "pgd_linf": steps("PGD Linf", "linf", follow=not stop_early),
        "cw_pgd_l2": steps("C&W L2", "l2", loss="margin"),
        "pgd_l1_exact": steps("PGD sparse L1", "l1", step="sparse", projection="exact"),
        "cw_l2": measure.Attack(f"C&W (search) L2={report.eps_text(l2, 'l2')}", "l2", l2,
                                partial(cw_within, eps=l2, judge=judge)),
        "apgd": measure.Attack(f"APGD {shown}", "linf", linf, partial(apgd, eps=linf)),
        "square": measure.Attack(f"Square {queries} {shown}", "linf", linf,
                                 partial(square, eps=linf, queries=queries)),
        "strongest_quick": measure.Attack(
            f"{per_image.quick_title(classes, queries)} {shown}", "linf", linf,
            partial(per_image.strongest_quick, eps=linf, queries=queries)),
        "autoattack": measure.Attack(
            f"{per_image.autoattack_title(classes, draws)} {shown}", "linf", linf,
            partial(per_image.autoattack, eps=linf, version="rand" if draws else "standard")),
        **{f"pgd_linf x{k}": steps("PGD Linf", "linf", k, early=not draws) for k in FARTHER}}


def cw_within(model, x, y, *, eps, generator, report, judge=None):
    """The C&W images where the perturbation's L2 norm is at most eps, else the clean ones."""
    x_adv, _ = cw_l2(model, x, y, binary_steps=5, steps=40, c=0.01, judge=judge,
                     generator=generator, report=report)
    return torch.where(balls.column(balls.norm_of(x_adv - x, "l2") <= eps, x), x_adv, x)


def radii(images, size, linf=None, l2=None, l1=None):
    """{norm: eps}: RobustART's 8/255, 8, 1600 at 224 pixels, the same per pixel at other sizes.

    On digits, which are easy, linf is the data set's own eps, with l2 and l1 in proportion.
    """
    own = images.kind in ("digits", "mnist")
    linf = linf or (data.PRESETS[images.kind].eps if own else 8 / 255)
    part = images.channels * size * size / (3 * 224 * 224)
    return {"linf": linf, "l2": 255 * linf * part ** 0.5 if l2 is None else l2,
            "l1": 51000 * linf * part if l1 is None else l1}


# -------------------------------------------------------------- table, audit, sweep

AUDITED = ("fgsm", "pgd_linf", "square", *(f"pgd_linf x{k}" for k in FARTHER))
SWEEP = (1e2, 1e4, 1e6, 1e7, 1e8, 2e8, 5e8, 1e9, 1e12, 1e16, 1e20)


def cells_of(s, model):
    """The cells of one network that this command needs, in order."""
    if s.w_sweep:
        return [Cell(model, s.defense, attacker, "pgd_linf", w) for w in SWEEP
                for attacker in ("naive", "adaptive")]
    if s.audit:
        return [Cell(model, s.defense, "naive", attack, s.w) for attack in AUDITED] + [
            Cell(model, s.defense, attacker, "pgd_linf", s.w)
            for attacker in ("vanilla", "adaptive") if s.defense != "none"]
    rows = [("none", "naive")]
    if s.defense != "none":
        rows += [(s.defense, "naive"), (s.defense, "adaptive")]
    return [Cell(model, defense, attacker, attack, s.w) for defense, attacker in rows
            for attack in s.attacks]


def shown(settings, found, networks, s):
    """This command's cells {Cell: its result, or None}, and the line above their tables."""
    cells = {cell: found.get(cell.key(s)) for name in networks for cell in cells_of(s, name)}
    return cells, report.protocol(report_gcm.facts(settings, s, STEPS, cells))


def save_report(folder, settings, found, networks, s, progress):
    """Writes this command's tables. -> the tables, and where they are"""
    cells, head = shown(settings, found, networks, s)
    twins = {name: network.differences(s.defense, s.w, progress) for name, network
             in networks.items()} if s.audit and s.defense != "none" else {}  # by all processes
    if not s.team.first:
        return ""
    if s.w_sweep:
        return report_gcm.save_sweep(folder, head, cells, s)
    if s.audit:
        return report_gcm.save_audit(folder, head, cells, twins, s)
    return report_gcm.save_table(folder, head, cells, s)


# -------------------------------------------------------------------------- a run

def get_args():
    parser = Parser("Robustness of networks behind a defence, under naive and adaptive attackers.")
    parser.shared("data_dir", "data_root", "labels", "classes", "num_images")
    add = parser.add_argument
    parser.shared("model_name", "weights", "geometry")
    add("--image_size", type=at_least(8), help="side; None: 224, --geometry's; small images: own")
    parser.shared("defense", "low", defense={"default": "gcm"})
    add("--w", type=at_least(0, float), default=1e20, help="of gcm")
    add("--epsilon", type=at_least(0, float), default=1e-8, help="of gcm")
    add("--draws", type=at_least(1), default=10, help="for a random defence: forward passes that "
        "the adaptive attacker averages (AutoAttack: at least 20), and that classify each image")
    add("--attacks", nargs="+", choices=(*papers.GCM_COLUMNS, *MORE),
        default=list(papers.GCM_COLUMNS), help="columns of the table")
    add("--eps", type=radius, help="Linf radius; None: 8/255, on digits and mnist 0.2")
    add("--eps_l2", type=fraction, help="L2 radius; None: 255 eps at 224 pixels, the same "
        "per pixel at other sizes")
    add("--eps_l1", type=fraction, help="L1 radius; None: 51000 eps, likewise")
    parser.shared("queries")
    add("--metric", choices=("attack_robustness", "robust_acc"),
        default="attack_robustness", help="shown in the table; the files hold both")
    add("--audit", action="store_true", help="instead of the table: signs of gradient masking")
    add("--w_sweep", action="store_true", help="instead of the table: pgd_linf against w")
    add("--stop_early", action="store_true", help="fooled images leave PGD: faster and stronger "
        "than the published protocol, where the last step counts")
    add("--amp", choices=("off", "bf16"), default="off", help="precision of the attackers' "
        "gradients; their images are measured in float32")
    parser.shared("batch_size", "seed", "device", "workers", "cache", "overwrite")
    add("--save", "--results", type=Path, default=Path("runs/gcm"), help="output folder")
    return parser.parse_args()


def settle(args, team):
    """The settings, and the images (names only). UserError for what cannot work."""
    targets, images, note = open_targets(args, imagenet=papers.GCM_TABLE)
    if args.audit and args.w_sweep:
        raise UserError("--audit --w_sweep: one at a time; they share a folder")
    if args.audit and args.stop_early:
        raise UserError("--audit --stop_early: the audit needs all steps; leave out --stop_early")
    if args.w_sweep and "gcm" not in args.defense:
        raise UserError(f"--w_sweep --defense {args.defense}: there is no w; type --defense gcm")
    attacks = [name for name in (*papers.GCM_COLUMNS, *MORE) if name in args.attacks]
    return run.settled(args, targets=targets, attacks=attacks, kind=images.kind, note=note,
                       team=team), images


def stated(target, images, s):
    """What all cells of a network depend on, as stored in results.json."""
    found = {"size": target.size, "eps": radii(images, target.size, s.eps, s.eps_l2, s.eps_l1),
             "weights": target.described}
    if target.geometry != data.paper_geometry(target.size):  # absent from older tables
        found["geometry"] = str(target.geometry)
    return found


def main(args):
    team, device = join_to_count(run.resolve_device(args.device))
    s, images = team.in_turn(lambda: settle(args, team))
    folder = team.in_turn(lambda: run.RunFolder(args.save, lock=team.first))
    networks = open_networks(s, images, device)
    about, first = run.provenance(device), next(iter(networks.values()))
    wanted = {
        "script": "gcm.py", "data": str(s.data_dir), "n": len(first.images), "seed": s.seed,
        "images_sha256": first.images.sha256(images.geometry), "labels": first.labels_digest,
        "stop_early": s.stop_early, "amp": s.amp, "device": about["device"], "torch":
        about["torch"], "note": s.note,
        **{f"network {target.name}": stated(target, images, s) for target in s.targets}}
    settings, found = team.from_first(lambda: folder.load_cells(wanted, overwrite=s.overwrite))
    progress = Progress(team, folder / "partial.json", wanted, device)
    cells, head = shown(settings, found, networks, s)
    for network in networks.values():
        network.recall(cells, progress)
    print(head, flush=True)
    for key, cell in [(cell.key(s), cell) for cell, counts in cells.items() if counts is None]:
        found[key] = measure_cell(cell, networks[cell.model], s, progress) | {
            "commit": about["commit"], "processes": team.size, "batch_size": s.batch_size}
        if team.first:
            run.save_json(folder / "results.json", {"settings": settings, "cells": found})
        progress.clear()
        if not (s.audit or s.w_sweep):
            save_report(folder, settings, found, networks, s, progress)
        tqdm.write(report_gcm.line(found[key]))
    text = save_report(folder, settings, found, networks, s, progress)
    progress.clear()
    print(text.removeprefix(head), end="", flush=True)
    team.leave()


if __name__ == "__main__":
    run_script(get_args, main)
