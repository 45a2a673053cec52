"""GCM: what the Gradient Concealment Module is worth (Pei et al., 2022, arXiv:2205.10617).

    paper                            here
    x + epsilon sin(w x), w = 1e20   GradientConcealment, in utils/defenses.py
    random resize and pad            ResizePad, drawn anew for every image and look
    robustness table                 the rows "vanilla" and "naive attacker"
    -                                the row "attacker who knows": the layer's backward pass is the
                                     identity (bpda); of a random defence the mean gradient (eot)

    python gcm.py                                            # digits, offline
    python gcm.py --data_dir /data/imagenet/val              # the paper's six networks
    python gcm.py --audit ...                                # signs of gradient masking, a verdict
    python gcm.py --w_sweep ...                              # robustness against w, both attackers

Attacks as in RobustART, whose table the paper fills: FGSM, then PGD of 20 steps of 3/40 eps from a
random start; "C&W" of radius eps, whose settings no source gives, is PGD on C&W's margin, and
`cw_l2` (--attacks) the attack itself, where a norm above eps is a failure. Every cell (network,
row, attack) is saved when it is done; the same command goes on where it was stopped. Attacks,
cells, names of the figures: robustness.py.
"""

from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from robustness import FARTHER, STEPS, Network, catalogue, figures, radii, show, worst_case
from utils import draw
from utils.audit import checklist, compare, verdict
from utils.data import NAMED, PRESETS, default_workers, load, open_images, unseen
from utils.defenses import (
    DEFENSES,
    GradientConcealment,
    ResizePad,
    defend,
    describe,
    is_random,
)
from utils.metrics import interval, markdown
from utils.models import (
    check_name,
    check_takes,
    describe_weights,
    input_size,
    load_model,
    one_each,
    trained,
    weights_path,
)
from utils.run import (
    Parser,
    RunFolder,
    UserError,
    at_least,
    names,
    provenance,
    radius,
    resolve_device,
    run_script,
    save_csv,
    save_json,
    write_atomic,
)

__all__ = ["GradientConcealment", "ResizePad"]

COLUMNS = ("fgsm", "pgd_l1", "pgd_l2", "pgd_linf", "cw_pgd_l2")
MORE = ("pgd_l1_exact", "cw_l2", "apgd", "square")
WORST, NETWORK = "worst case", "network "
SWEEP = (1e2, 1e4, 1e6, 1e7, 1e8, 2e8, 5e8, 1e9, 1e12, 1e16, 1e20)

# README of the authors' repository: top-1, then AR of the five columns, in %
PAPER = {
    "resnet50": ((77.89, 31.77, 0.01, 0.01, 0.00, 0.21),
                 (78.57, 95.18, 94.82, 94.41, 97.38, 95.11)),
    "wide_resnet50_2": ((78.21, 20.88, 0.36, 0.61, 0.50, 0.21),
                        (78.08, 96.06, 94.46, 94.51, 97.69, 95.66)),
    "densenet121": ((74.86, 16.82, 0.04, 0.05, 0.06, 0.12),
                    (74.71, 94.98, 94.31, 94.08, 97.16, 95.49)),
    "efficientnet_b4": ((71.52, 1.23, 0.36, 0.28, 0.20, 1.88),
                        (71.76, 94.68, 89.95, 90.87, 97.97, 93.07)),
    "vit_b_16": ((79.46, 15.86, 0.00, 0.00, 0.00, 0.90),
                 (79.47, 92.24, 94.94, 95.07, 98.24, 93.31)),
    "swin_s": ((82.93, 16.93, 0.20, 0.00, 0.00, 0.76), (82.79, 94.38, 90.71, 91.04, 98.77, 92.31)),
}


def get_args():
    parser = Parser("Robustness of networks behind a defence, against attackers who do and do not "
                    "know it.")
    add = parser.add_argument
    add("--data_dir", default="digits", help="folder of class folders, or " + ", ".join(NAMED))
    add("--data_root", default="data", help="where named data sets are kept or downloaded to")
    add("--num_images", type=at_least(1), help="evenly over the classes; None: all")
    add("--model_name", type=names, nargs="+", help="networks; None: the data set's preset, on "
        "ImageNet the paper's six")
    add("--weights", type=names, nargs="+", default=[["V1"]],
        help="V1, V2, random, a .pth state dict or a folder of NAME.pth; one, or one per network")
    add("--defense", choices=DEFENSES, default="gcm", help="layers in front of every network")
    add("--w", type=at_least(0, float), default=1e20, help="of gcm")
    add("--epsilon", type=at_least(0, float), default=1e-8, help="of gcm")
    add("--low", type=at_least(1), help="smallest side that resizepad draws, in pixels; None: 218 "
        "of 224")
    add("--draws", type=at_least(1), default=10, help="of a random defence: looks that the "
        "attacker who knows it averages, and looks at every image afterwards")
    add("--attacks", nargs="+", choices=(*COLUMNS, *MORE), default=list(COLUMNS), help="columns")
    add("--eps", type=radius, help="of linf, in [0, 1] pixels; None: 8/255, on digits and "
        "mnist 0.2")
    add("--eps_l2", type=at_least(0, float), help="of l2; None: 255 eps, less on small images")
    add("--eps_l1", type=at_least(0, float), help="of l1; None: 51000 eps, less on small images")
    add("--queries", type=at_least(1), default=1000, help="of square")
    add("--metric", choices=("attack_robustness", "adv_acc"), default="attack_robustness",
        help="what the table shows; the files hold both")
    add("--audit", action="store_true", help="instead of the table: the signs of gradient masking")
    add("--w_sweep", action="store_true", help="instead of the table: robustness to pgd_linf "
        "against w")
    add("--stop_early", action="store_true", help="fooled images leave a pgd: faster, and stronger "
        "than the published protocol, which judges the last step")
    add("--amp", choices=("off", "bf16"), default="off", help="precision of the attackers' "
        "gradients; what they make is measured in float32")
    add("--batch_size", type=at_least(1), default=50, help="images at a time")
    add("--seed", type=at_least(0, high=2 ** 63 - 1), default=0, help="fixes everything random")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    add("--results", type=Path, default=Path("runs/gcm"), help="folder for tables and pictures")
    return parser.parse_args()


def rows_of(defense, draws):
    """[(defence, attacker, what the table calls the row)]"""
    if defense == "none":
        return [("none", "naive", "vanilla")]
    means = [f"{'BPDA' * ('gcm' in defense)}", f"EOT of {draws}" * is_random(defense)]
    return [("none", "naive", "vanilla"), (defense, "naive", f"{defense}, naive attacker"),
            (defense, "adaptive",
             f"{defense}, attacker who knows ({', '.join(filter(None, means))})")]


def wanted(args):
    """[(defence, attacker, attack, w)] of the cells that this command needs, in order."""
    w, defense = args.w, args.defense
    if args.w_sweep:
        return [(defense, attacker, "pgd_linf", w) for w in SWEEP
                for attacker in ("naive", "adaptive")]
    if args.audit:
        own = [(defense, "naive", attack, w) for attack in AUDITED]
        extra = [(defense, "vanilla", "pgd_linf", w), (defense, "adaptive", "pgd_linf", w)]
        return own + (extra if defense != "none" else [])
    return [(row_defense, attacker, attack, w) for row_defense, attacker, _ in
            rows_of(defense, args.draws) for attack in args.attacks]


AUDITED = ("fgsm", "pgd_linf", "square", *(f"pgd_linf x{k}" for k in FARTHER))


def key_of(model, args, defense, attacker, attack, w):
    """What a cell is called in results.json; settings that are not of the whole table included."""
    settings = [f"{f'w={w:g} epsilon={args.epsilon:g}' * ('gcm' in defense)}",
                f"low={args.low} draws={args.draws}" * is_random(defense)]
    queries = f" {args.queries}" * (attack == "square")
    return " ".join(filter(None, [model, defense, *settings, attacker, attack + queries]))


# ------------------------------------------------------------------ the table

def table(found, networks, args):
    """Markdown, CSV rows: for every network the three rows, the paper's below where it has them."""
    attacks = catalogue(next(iter(networks.values())).eps, args.queries)
    order = [name for name in attacks if name in args.attacks]
    titles = [attacks[name].title for name in order]
    lines, rows = [], []
    for name in networks:
        for defense, attacker, label in rows_of(args.defense, args.draws):
            cells = {a: found.get(key_of(name, args, defense, attacker, a, args.w)) for a in order}
            done = [cell for cell in cells.values() if cell]
            if not done:
                continue
            cells[WORST] = worst_case(done) if len(done) == len(order) else None
            shown = [interval(figures(c)[args.metric]) if c else "-" for c in cells.values()]
            lines.append([name, label, interval(figures(done[0])["clean_acc"]), *shown,
                          f"{sum(cell['seconds'] for cell in done):.0f}"])
            rows += [{"model": name, "row": label, "attack": a, **flat(cell)}
                     for a, cell in cells.items() if cell]
        lines += paper_lines(name, order, args)
    return markdown(["network", "row", "clean_acc", *titles, WORST, "s"], lines), rows


def paper_lines(name, order, args):
    """The paper's two rows of this network, where it prints these columns."""
    if name not in PAPER or args.defense != "gcm" or args.metric != "attack_robustness":
        return []
    return [[name, f"paper: {label}", f"{top1:.2f}", *(
        f"{dict(zip(COLUMNS, ar, strict=True))[a]:.2f}" if a in COLUMNS else "-" for a in order),
        "-", "-"] for label, (top1, *ar) in zip(("vanilla", "GCM"), PAPER[name], strict=True)]


def flat(cell):
    """A row of results.csv: every figure with its n and interval, and how the cell came about."""
    result = {k: cell[k] for k in ("norm", "eps", "seconds", "gradients", "queries",
                                   "zero_gradient", "largest", "outside") if k in cell}
    for name, value in figures(cell).items():
        result |= {name: value["value"], **{f"{name}_{k}": value[k] for k in ("n", "low", "high")}}
    return result


def protocol(settings, args):
    """What every figure stands on, printed above it."""
    about = {name: settings[NETWORK + name] for name in args.model_name}
    nets = "; ".join(f"{name} {one['size']} pixels ({one['weights']})"
                     for name, one in about.items())
    sizes = sorted({one["size"] for one in about.values()})
    defense = " / ".join(dict.fromkeys(describe(
        args.defense, size=s, w=args.w, epsilon=args.epsilon, low=args.low) for s in sizes))
    early = ("" if settings["stop_early"] else " whose attacker knows the defence or transfers") \
        + ", but for random defences" * is_random(args.defense)
    return (
        f"Protocol: {settings['data']}, n={settings['n']}, list sha256 "
        f"{settings['images_sha256'][:16]}; {nets}; defence: {defense}; attacks on the images "
        f"that are right before, untargeted, on cross-entropy but for C&W's margin; FGSM from "
        f"the image, PGD {STEPS} steps of 3/40 eps from a random start, scaled to the ball and cut "
        f"to [0, 1], the last step counts; fooled images leave a PGD{early}; gradients in "
        f"{'float32' if settings['amp'] == 'off' else settings['amp']}, measured in float32; seed "
        f"{settings['seed']}; batches of {settings['batch_size']}; {settings['device']}, torch "
        f"{settings['torch']}\n")


def report_table(folder, settings, found, networks, args):
    """Writes results.md and results.csv; -> the Markdown"""
    body, rows = table(found, networks, args)
    text = (protocol(settings, args) + f"\n{args.metric}, % (95 % Wilson interval); clean_acc of "
            f"all {settings['n']} images; the worst case is over the columns, image by image\n\n"
            + body + audit_line(found, networks, args))
    save_csv(folder / "results.csv", rows)
    write_atomic(folder / "results.md", text.encode())
    return text


def audit_line(found, networks, args):
    """By which a reader can check what the attacks of this table returned."""
    keys = [key_of(name, args, *cell) for name in networks for cell in wanted(args)]
    cells = [found[key] for key in keys if key in found]
    outside = sum(cell["outside"] for cell in cells)
    blind = sum(cell["zero_gradient"] for cell in cells)
    largest = max((cell["largest"] / cell["eps"] for cell in cells), default=0)
    return (f"\n{len(cells)} cells: largest norm {largest:.6f} of its eps, {outside} images "
            f"outside the ball or [0, 1], {blind} without any gradient\n")


# ------------------------------------------------------------------- the audit

def report_audit(folder, settings, found, networks, args):
    """Writes audit.md, audit.json, audit.csv; -> the Markdown"""
    reports = {name: audit(network, found, args) for name, network in networks.items()}
    text = protocol(settings, args)
    for name, (lines, said) in reports.items():
        text += f"\n{name}, {args.defense}\n\n" + markdown(
            ["sign", "figure", "flagged if", "flagged"],
            [[line["sign"], line["figure"], line["flagged_if"],
              {True: "yes", False: "no", None: "does not apply"}[line["flagged"]]]
             for line in lines]) + f"\nVerdict: {said}.\n"
    rows = [{"model": name, "defense": args.defense, **line, "verdict": said}
            for name, (lines, said) in reports.items() for line in lines]
    save_csv(folder / f"audit_{args.defense}.csv", rows)
    save_json(folder / f"audit_{args.defense}.json", rows)
    write_atomic(folder / f"audit_{args.defense}.md", text.encode())
    return text


def audit(network, found, args):
    """-> lines of the checklist, verdict"""
    def cell(attacker, attack):
        return found[key_of(network.name, args, args.defense, attacker, attack, args.w)]

    def ar(attacker, attack):
        return figures(cell(attacker, attack))["attack_robustness"]["value"]

    own, twin = cell("naive", "pgd_linf"), None
    left = {"fgsm": ar("naive", "fgsm"), "pgd": ar("naive", "pgd_linf"),
            "square": ar("naive", "square")}
    growing = {show(cell("naive", attack)["eps"], "linf"): ar("naive", attack)
               for attack in AUDITED if attack.startswith("pgd_linf")}
    if args.defense != "none":
        left |= {"transfer": ar("vanilla", "pgd_linf"), "adaptive": ar("adaptive", "pgd_linf")}
        twin = compare(network.behind(args.defense, args.w), network.model, network.images,
                       args.batch_size, network.device)
    attacked = sum(count != "0" for count in own["before"].split())
    lines = checklist(
        left, radii=growing, queries=args.queries, blind=own["zero_gradient"] / max(1, attacked),
        losses={"mean": own["losses"], "ascent": own["ascent"]}, twin=twin)
    return lines, verdict(lines)


# ------------------------------------------------------------------- the sweep

def report_sweep(folder, settings, found, networks, args):
    """Writes w_sweep.csv and w_sweep.png; -> the Markdown"""
    lines, rows = [], []
    for name, attacker in product(networks, ("naive", "adaptive")):
        cells = [found[key_of(name, args, args.defense, attacker, "pgd_linf", w)] for w in SWEEP]
        lines.append([name, attacker, *(interval(figures(cell)["attack_robustness"])
                                        for cell in cells)])
        rows += [{"model": name, "attacker": attacker, "w": w, "epsilon": args.epsilon,
                  **flat(cell)} for w, cell in zip(SWEEP, cells, strict=True)]
    save_csv(folder / "w_sweep.csv", rows)
    write_atomic(folder / "w_sweep.png", draw.sweep(rows))
    return (protocol(settings, args) + "\nattack_robustness under PGD Linf, % (95 % Wilson "
            "interval), against w\n\n"
            + markdown(["network", "attacker", *(f"{w:.0e}" for w in SWEEP)], lines))


# ---------------------------------------------------------------------- a run

def settle(args):
    """Fills in what the data set presets, refuses what cannot work; -> images (names only)."""
    images = open_images(args.data_dir, split="test", data_root=args.data_root)
    preset = PAPER if images.kind == "imagenet" else PRESETS[images.kind].targets
    args.model_name = list(dict.fromkeys(sum(args.model_name or [], []) or preset))
    for name in args.model_name:
        check_name(name, images.kind)
    args.weights = one_each(args.model_name, sum(args.weights, []))
    images = attacked_images(args, images)
    if args.num_images and args.num_images > len(images):
        raise UserError(f"--num_images {args.num_images}: {args.data_dir} has {len(images)}; type "
                        f"--num_images {len(images)}, or leave it out")
    if args.audit and args.w_sweep:
        raise UserError("--audit --w_sweep: one at a time; they share a folder")
    if args.audit and args.stop_early:
        raise UserError("--audit --stop_early: the audit follows the loss over all steps; leave "
                        "out --stop_early")
    if args.w_sweep and "gcm" not in args.defense:
        raise UserError(f"--w_sweep --defense {args.defense}: there is no w; type --defense gcm")
    defend(torch.nn.Identity(), args.defense, size=images.size, w=args.w, epsilon=args.epsilon)
    return images


def attacked_images(args, images):
    """The test images; for networks of train_gcm.py none that they were trained on."""
    paths = map(weights_path, args.model_name, args.weights)
    ours = [facts for path in paths if path and "hold_out" in (facts := trained(path))]
    if ours:
        images, _ = unseen(args.data_dir, args.data_root, ours[0]["hold_out"],
                           ours[0]["given_images"])
    taught = [one for one in ours if one["classes"] == list(images.classes)]
    if not images.labelled and len(taught) < len(args.model_name):
        raise UserError(f"--data_dir {args.data_dir}: its folders are no classes of the networks; "
                        "wanted folders named by wnid, such as n01440764, or --weights that "
                        "train_gcm.py trained on them")
    return images


def open_networks(args, images, device):
    """{name: Network} and what results.json says of each; images decoded once for every size."""
    found, about, in_memory = {}, {}, {}
    for name, weights in zip(args.model_name, args.weights, strict=True):
        size = input_size(name, images.kind, images.size, weights)
        model = load_model(name, weights=weights, kind=images.kind, data_dir=args.data_dir,
                           data_root=args.data_root, device=device)
        check_takes(model, name, images.channels, size, device)
        if args.low and args.low > size:
            raise UserError(f"--low {args.low}: {name} takes {size} pixels; type --low {size} or "
                            "less")
        if size not in in_memory:
            in_memory[size] = load(images.prepared(size, args.num_images), workers=args.workers)
        found[name] = network = Network(
            name, model, in_memory[size], size, radii(images, size, args.eps, args.eps_l2,
                                                      args.eps_l1),
            epsilon=args.epsilon, low=args.low, draws=args.draws, queries=args.queries,
            stop_early=args.stop_early, amp=args.amp, batch_size=args.batch_size, seed=args.seed,
            device=device)
        if not network.right("none", args.w).any():
            raise UserError(f"{name} gets none of these images right: nothing to attack; type "
                            "--weights of a trained network")
        about[NETWORK + name] = {"size": size, "eps": network.eps,
                                 "weights": describe_weights(name, weights, images.kind)}
    return found, about


def main(args):
    device = resolve_device(args.device)
    images, folder = settle(args), RunFolder(args.results)
    networks, about = open_networks(args, images, device)
    run, listed = provenance(device), next(iter(networks.values())).images
    settings, found = folder.load_cells({
        "data": str(args.data_dir), "n": len(listed), "images_sha256": listed.sha256(),
        "stop_early": args.stop_early, "amp": args.amp, "batch_size": args.batch_size,
        "seed": args.seed, "device": run["device"], "torch": run["torch"], **about})
    report = report_audit if args.audit else report_sweep if args.w_sweep else report_table
    print(protocol(settings, args), flush=True)
    for name, network in networks.items():
        for defense, attacker, attack, w in wanted(args):
            key = key_of(name, args, defense, attacker, attack, w)
            if key in found:
                continue
            found[key] = network.cell(defense, attacker, attack, w) | {"commit": run["commit"]}
            save_json(folder / "results.json", {"settings": settings, "cells": found})
            if report is report_table:
                report_table(folder, settings, found, networks, args)
            left = figures(found[key])["attack_robustness"]
            tqdm.write(f"{name} | {defense} | {attacker} | {found[key]['title']}: "
                       f"attack_robustness {interval(left)}, {found[key]['seconds']:.0f} s")
    text = report(folder, settings, found, networks, args)
    print("\n" + text.removeprefix(protocol(settings, args)) + f"saved {folder.path}/results.json "
          "(and .csv, .md beside it)", flush=True)


if __name__ == "__main__":
    run_script(get_args, main)
