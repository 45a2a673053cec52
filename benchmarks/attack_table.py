"""Accuracy of networks under eight attacks, compared with the same attack of another library.

    attack          ours (src/attacks.py)                       compared with
    fgsm            Linf 8/255, one step                        foolbox
    pgd_linf        Linf 8/255, 20 steps of 0.6/255             foolbox
    pgd_l2          L2 8, 20 steps of 0.6                       foolbox
    pgd_l1_dense    L1 1600, 20 steps of 120, g / ||g||_1       foolbox
    pgd_l1          L1 1600, 20 sparse steps of 120, exact      no other library has it
                    projection on ball and box together
    cw_pgd_l2       L2 8, pgd_l2 on the margin (in tables,      no other library has it
                    "C&W L2=8")
    apgd_ce         Linf 8/255, APGD, cross-entropy, 100 steps  pyautoattack 0.2.0
    square          Linf 8/255, 1000 queries                    pyautoattack 0.2.0
    worst case      fooled by any of them: the union, image by image

fgsm, the pgds with dense steps and cw_pgd_l2 are the columns of GCM's table (arXiv:2205.10617),
with the settings of RobustART. PGD starts at a random point and, except for pgd_l1, projects like
foolbox 3.3.4: rescaled to the ball, then clipped to the box. The other libraries (attack_others.py)
have fewer of these attacks, so their worst case is over fewer.

    PYTHONPATH=src python benchmarks/attack_table.py \\
        --data_dir ../shared/data/imagenet_sample/val --weights ../shared/data/weights
    ... --eps_scale 1/16 --save runs/attack_table_16     # radii at which undefended networks differ

Both sides attack the same float32 network, with weights in channels-last order, which is faster
here. Only images that the network gets right are attacked. What an attack returns is measured
again: it counts if the float32 network misclassifies it and it lies in the ball and in [0, 1].
Every finished cell is saved, and the same command continues where it stopped.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from attack_others import ALPHA, EPS, foolbox, installed, positive, pyautoattack
from attacks import apgd, fgsm, pgd, square
from utils.attack.chance import numbered
from utils.cli import Parser, at_least, run_script
from utils.data import default_workers, load, open_images
from utils.errors import UserError
from utils.measure import COUNTED, Attack, count_right_on, figures, run_cell, worst_of
from utils.models import describe_weights, input_size, load_model
from utils.report import csv_columns, markdown, percent, protocol
from utils.run import (
    RunFolder,
    provenance,
    resolve_device,
    save_csv,
    save_json,
    write_atomic,
)

PGD_STEPS, APGD_STEPS, QUERIES = 20, 100, 1000
WORST, NETWORK = "worst case", "network "
METRICS = ("robust_acc", "attack_robustness")


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", default="../shared/data/imagenet_sample/val",
        help="photographs in class folders, or a data set by name such as digits")
    add("--num_images", type=at_least(1), help="evenly over the classes; None: all")
    add("--model_name", nargs="+", default=["squeezenet1_0", "squeezenet1_1", "mobilenet_v2"],
        help="networks")
    add("--weights", default="V1", help="V1, random, or a folder of NAME.pth")
    add("--attacks", nargs="+", choices=list(attack_pairs(1)), default=list(attack_pairs(1)),
        help="which attacks")
    add("--eps_scale", type=positive, default=1.0, help="factor for eps and alpha, such as 1/16")
    add("--stop_early", action="store_true", help="in ours, fooled images leave PGD")
    add("--batch_size", type=at_least(1), default=50, help="images at a time")
    add("--seed", type=at_least(0), default=0, help="random starts and squares")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    add("--save", "--results", type=Path, default=Path("runs/attack_table"), help="output folder")
    return parser.parse_args()


# ----------------------------------------------------------------- the attacks

@dataclass(frozen=True)
class Pair:
    """One row: our attack and another library's."""
    ours: Attack
    library: str = None
    other: Attack = None


def seeded(attack, model, x, y, *, generator, report):
    """Another library's attack(model, x, y), which draws from the global generator: seeded from the
    random numbers of the batch's first image."""
    torch.manual_seed(int(generator[:1].words()))
    return attack(model, x, y)


def attack_pairs(scale, stop_early=False):
    """{name: Pair}, every eps and alpha times `scale`."""
    def row(ball, attack, other=None, name=None, given=None, **settings):
        """settings: ours; given: those of the other library's attack `name`."""
        eps = scale * EPS[ball]
        theirs = other and partial(seeded, partial(other, name=name, eps=eps, **(given or {})))
        return Pair(Attack("", ball, eps, partial(attack, eps=eps, **settings)),
                    other and other.__name__, other and Attack("", ball, eps, theirs))

    def steps(norm, name=None, projection="rescale", **settings):
        alpha = scale * ALPHA[norm]
        settings["stop_early"] = stop_early
        return row(norm, pgd, name and foolbox, name, {"abs_stepsize": alpha, "steps": PGD_STEPS},
                   norm=norm, alpha=alpha, steps=PGD_STEPS, projection=projection, **settings)

    return {
        "fgsm": row("linf", fgsm, foolbox, "LinfFastGradientAttack"),
        "pgd_linf": steps("linf", "LinfProjectedGradientDescentAttack"),
        "pgd_l2": steps("l2", "L2ProjectedGradientDescentAttack"),
        "pgd_l1_dense": steps("l1", "L1ProjectedGradientDescentAttack", step="dense"),
        "pgd_l1": steps("l1", projection="exact", step="sparse"),
        "cw_pgd_l2": steps("l2", loss="margin"),
        "apgd_ce": row("linf", apgd, pyautoattack, "APGDAttack",
                       {"n_iter": APGD_STEPS, "norm": "Linf", "loss": "ce"},
                       steps=APGD_STEPS, loss="ce"),
        "square": row("linf", square, pyautoattack, "SquareAttack",
                      {"n_queries": QUERIES, "norm": "Linf", "resc_schedule": True},
                      queries=QUERIES)}


# --------------------------------------------------------------------- a cell

def cell_of(model, images, right, pair, side, args, device, desc):
    """One attack by one side on the images with `right` (n,) -> its cell of results.json."""
    attack = pair.ours if side == "ours" else pair.other
    cell = run_cell(attack, model, model, images, right, draws=1, batch_size=args.batch_size,
                    chance=numbered(args.seed, len(images)), device=device, desc=desc)
    if side == "other":  # has no reports
        cell = {key: value for key, value in cell.items() if key not in COUNTED}
    return {"side": side, "library": "ours" if side == "ours" else pair.library, **cell}


def audit_line(cells):
    """An audit line for cells of one attack and one library: largest norm, images outside."""
    one, largest = cells[0], max(cell["largest"] for cell in cells)
    outside = sum(cell["outside"] for cell in cells)
    tried = sum(figures(cell)["clean_acc"]["k"] for cell in cells)
    return (f"{one['attack']}, {one['library']}: largest {one['norm']} norm {largest:.7g} of "
            f"{one['eps']:.7g}; {outside} of {tried} images outside the ball or [0, 1]")


# -------------------------------------------------------------------- figures

def worst_row(cells):
    """The row for images that none of these cells fooled."""
    return {"model": cells[0]["model"], "side": cells[0]["side"], "attack": WORST,
            "library": f"worst of {len(cells)}", **worst_of(cells)}


def rows_of(cells):
    """The cells of each network in order, then the worst case of each side."""
    rows, order = [], list(attack_pairs(1))
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = sorted((cell for cell in cells if cell["model"] == model),
                     key=lambda cell: order.index(cell["attack"]))
        sides = [[cell for cell in own if cell["side"] == side] for side in ("ours", "other")]
        rows += own + [worst_row(group) for group in sides if len(group) > 1]
    return rows


def table(rows):
    """Markdown: a line per network and attack, ours and then the other library's."""
    found = {(row["model"], row["attack"], row["side"]): row for row in rows}
    lines = []
    for key in dict.fromkeys((row["model"], row["attack"]) for row in rows):
        line = [*key]
        for side in ("ours", "other"):
            row = found.get((*key, side), {})
            line += [row.get("library", "-"),
                     *(percent(figures(row)[m]) if row else "-" for m in METRICS),
                     f"{row['seconds']:.1f}" if row else "-"]
            if side == "ours":
                line.append(row["zero_gradient"] if row.get("gradients") else "-")
        lines.append(line)
    kinds = [f"{METRICS[0]} (95 % Wilson)", METRICS[1], "s"]
    return markdown(["network", "attack", "implementation", *kinds, "zero gradient",
                     "other library", *(f"other: {kind}" for kind in kinds)], lines)


def flat(row):
    """A row of results.csv."""
    found = figures(row)
    return {key: value for key, value in row.items() if key not in ("before", "after")} \
        | csv_columns({name: found[name] for name in METRICS})


def facts(settings, cells):
    """{name: value} of everything that the figures depend on."""
    scale = settings["eps_scale"]
    return {
        "data": settings["data"], "n": settings["n"],
        "image list": f"sha256 {settings['images_sha256'][:16]}",
        "networks": ", ".join(
            f"{key.removeprefix(NETWORK)} {about['size']} pixels ({about['weights']}, "
            f"{about['right']} right)" for key, about in settings.items()
            if key.startswith(NETWORK)),
        "eps": f"Linf {8 * scale:g}/255, L1 {1600 * scale:g}, L2 {8 * scale:g}",
        "FGSM": "from the image",
        "PGD": f"{PGD_STEPS} steps of {0.6 * scale:g}/255, {120 * scale:g}, {0.6 * scale:g} from a "
               "random start",
        "APGD": f"{APGD_STEPS} steps", "Square": f"{QUERIES} queries",
        "fooled images leave our PGD": "yes" if settings["stop_early"] else "no",
        "gradients": "float32", "seed": settings["seed"], "batch size": settings["batch_size"],
        "device": settings["device"], "torch": settings["torch"],
        "commit": ", ".join(sorted({str(cell["commit"]) for cell in cells}))}


def save(folder, settings, cells):
    """Writes all three files, results.json last: the others hold all its cells. -> Markdown"""
    rows, groups = rows_of(cells.values()), {}
    for row in rows:
        groups.setdefault((row["attack"], row["library"]), []).append(row)
    text = (protocol(facts(settings, cells.values())) + "\n" + table(rows) + "\n" + "".join(
        audit_line(group) + "\n" for key, group in groups.items() if key[0] != WORST))
    save_csv(folder / "results.csv", list(map(flat, rows)))
    write_atomic(folder / "results.md", text.encode())
    save_json(folder / "results.json", {"settings": settings, "cells": cells})
    return text


# ---------------------------------------------------------------------- a run

def prepare(args, device):
    """Networks {name: (model, images in memory, right (n,))} and the settings of the run."""
    images = open_images(args.data_dir, split="test")
    if not images.labelled:
        raise UserError(f"--data_dir {args.data_dir}: its folders are not classes of the networks")
    found, about, in_memory = {}, {}, {}
    for name in dict.fromkeys(args.model_name):
        model = load_model(name, weights=args.weights, kind=images.kind, data_dir=args.data_dir,
                           device=device).to(memory_format=torch.channels_last)
        size = input_size(name, images.kind, images.size, args.weights)
        if size not in in_memory:
            in_memory[size] = load(images.prepared(size, args.num_images), workers=args.workers)
        sized = in_memory[size]
        right = count_right_on(model, sized, draws=1, batch_size=args.batch_size, device=device,
                               chance=numbered(args.seed, len(sized)))
        if not right.any():
            raise UserError(f"{name} gets none of these images right: nothing to attack; type "
                            "--weights of a trained network")
        found[name] = (model, sized, right)
        about[NETWORK + name] = {"weights": describe_weights(name, args.weights, images.kind),
                                 "size": size, "right": int(right.sum())}
    run = provenance(device)
    settings = {"data": args.data_dir, "n": len(sized), "images_sha256": sized.sha256(),
                "eps_scale": args.eps_scale, "stop_early": args.stop_early,
                "batch_size": args.batch_size, "seed": args.seed, "device": run["device"],
                "torch": run["torch"], **about}
    return found, settings, run["commit"]


def main(args):
    device = resolve_device(args.device)
    folder = RunFolder(args.save)
    networks, settings, commit = prepare(args, device)
    settings, cells = folder.load_cells(settings)
    attacks, there = attack_pairs(args.eps_scale, args.stop_early), installed()
    for model_name, name, side in product(networks, args.attacks, ("ours", "other")):
        attack, key = attacks[name], f"{model_name} {name} {side}"
        if key in cells or (side == "other" and attack.library not in there):
            continue
        cells[key] = {"model": model_name, "attack": name, "commit": commit,
                      **cell_of(*networks[model_name], attack, side, args, device, key)}
        save(folder, settings, cells)
        tqdm.write(f"{model_name} {audit_line([cells[key]])}")
    print(f"\n{save(folder, settings, cells)}saved {folder.path}/results.json (.csv, .md)")


if __name__ == "__main__":
    run_script(get_args, main)
