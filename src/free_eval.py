"""What networks that free_at.py trained are worth: their attacks, and runs beside each other.

    evaluate   NAME.pth under FGSM, PGD, PGD on the margin, Auto-PGD with Square, and given UAPs
    compare    finished runs in one table, beside the paper's, and its claims in their figures
"""

import csv
from functools import partial

import torch

from attacks import apgd, fgsm, pgd, square, worst_case
from robustness import Attack, figures, looks_at, run_cell
from robustness import worst_case as worst_of
from utils.data import load, open_images
from utils.metrics import interval, markdown, percent, predictions, share
from utils.models import describe_weights, load_model
from utils.run import (
    UserError,
    finished_run,
    load_json,
    make_generator,
    provenance,
    save_csv,
    save_json,
    write_atomic,
)
from utils.uaps import find_uaps, fit_size, read_uaps

PAPER = {  # CIFAR-10, WRN-32-10, eps 8/255: clean, PGD-20 with 10 restarts, minutes (Table 1)
    "natural": (95.01, 0.00, 780), "free2": (91.45, 33.41, 816), "free4": (87.83, 40.73, 800),
    "free8": (85.96, 46.33, 785), "free10": (83.94, 45.94, 785), "pgd": (87.25, 45.53, 5418)}
BACKWARD = {"natural": lambda a: 1, "free": lambda a: 1, "fast": lambda a: 2,
            "pgd": lambda a: a["steps"] + 1}  # backward passes of a weight step
INTERVAL = ("n", "low", "high")
EVAL_BATCH = 250


# ---------------------------------------------------------------- evaluation

def catalogue(eps, queries):
    """{column: Attack} in Linf, steps of eps / 4, from a random start; fooled images leave."""
    steps = partial(pgd, eps=eps, alpha=eps / 4, stop_early=True)
    strongest = partial(worst_case, attacks={
        "apgd_ce": partial(apgd, eps=eps), "apgd_dlr": partial(apgd, eps=eps, loss="dlr_targeted"),
        "square": partial(square, eps=eps, queries=queries)})
    return {name: Attack(name, "linf", eps, run) for name, run in {
        "FGSM": partial(fgsm, eps=eps), "PGD-20": partial(steps, steps=20),
        "PGD-50-10": partial(steps, steps=50, restarts=10),
        "CW-50": partial(steps, steps=50, loss="margin"),
        f"APGD + Square {queries}": strongest}.items()}


def test_images(data_dir, data_root, eval_images):
    """The test split; UserError if there is none, or not as many images as asked for."""
    images = open_images(data_dir, split="test", data_root=data_root)
    if eval_images and eval_images > len(images):
        raise UserError(f"--eval_images {eval_images}: {data_dir} has {len(images)}; type "
                        f"--eval_images {len(images)}, or leave it out")
    return images


def evaluate(path, folder, device, *, data_dir, data_root, eval_images, eps, queries, uaps, seed,
             workers):
    """The network of NAME.pth, by its NAME.json, under every attack; tables into the folder.

    data_dir, eps: None for those of the training; eval_images: None for all; uaps: files, folders.
    """
    facts = load_json(path.with_suffix(".json"))
    if not isinstance(facts, dict) or not {"kind", "model_name", "eps", "image_size"} <= set(facts):
        raise UserError(f"--evaluate {path}: {path.stem}.json beside it does not say how it was "
                        "trained; wanted what free_at.py writes")
    data_dir = data_dir or facts["data_dir"]
    images = test_images(data_dir, data_root, eval_images)
    if images.kind != facts["kind"]:
        raise UserError(f"--data_dir {data_dir}: {images.kind} images; {path} was trained on "
                        f"{facts['kind']}")
    images = load(images.prepared(facts["image_size"], eval_images), workers=workers)
    eps = eps or facts["eps"]
    model = load_model(facts["model_name"], weights=str(path), kind=images.kind,
                       device=device).to(memory_format=torch.channels_last)
    run = provenance(device)
    settings, cells = folder.load_cells({
        "network": describe_weights(facts["model_name"], str(path), images.kind), "eps": eps,
        "data": data_dir, "n": len(images), "images_sha256": images.sha256(), "seed": seed,
        "device": run["device"], "torch": run["torch"]}, flag="--save")
    before = looks_at(model, images, draws=1, batch_size=EVAL_BATCH, device=device)
    for name, attack in catalogue(eps, queries).items():
        if name not in cells and before.any():
            cells[name] = run_cell(attack, model, model, images, before, draws=1, device=device,
                                   batch_size=EVAL_BATCH, generator=make_generator(seed),
                                   desc=name) | {"commit": run["commit"]}
            save_json(folder / "results.json", {"settings": settings, "cells": cells})
    ratios = fooling_ratios(uaps, model, images, device)
    text = report(folder, settings, facts, before, cells, ratios)
    print(text + f"saved {folder.path}/results.json (.csv, .md)", flush=True)


def given_uaps(uaps, kind):
    """The perturbations of the files and folders `uaps`; UserError if one cannot be read."""
    return read_uaps(find_uaps(uaps, kind), scale="auto", eps=1.0) if uaps else []


def fooling_ratios(uaps, model, images, device):
    """{perturbation: share} of the files and folders `uaps` on this network."""
    if not uaps:
        return {}
    before, found = predictions([model], images.pixels, device), {}
    for uap in given_uaps(uaps, images.kind):
        delta = fit_size(uap, images.size, images.channels, 1.0, False)
        after = predictions([model], images.pixels, device, delta=delta)
        found[uap.name] = share(int((after != before).sum()), len(images))
    return found


def report(folder, settings, facts, before, cells, ratios):
    """Writes results.md and results.csv; -> the Markdown"""
    clean = share(int(before.sum()), len(before))
    shares = {name: figures(cell)["adv_acc"] for name, cell in cells.items()}
    if cells:
        shares["worst case"] = figures(worst_of(list(cells.values())))["adv_acc"]
    rows = [{"attack": "none", "clean_acc": clean["value"], **{k: clean[k] for k in INTERVAL}},
            *({"attack": name, "adv_acc": s["value"], **{k: s[k] for k in INTERVAL}}
              for name, s in shares.items()),
            *({"uap": name, "fooling_ratio": s["value"], **{k: s[k] for k in INTERVAL}}
              for name, s in ratios.items())]
    table = markdown(["clean_acc", *(f"adv_acc, {name}" for name in shares)],
                     [[percent(clean), *map(percent, shares.values())]])
    text = (f"{facts['name']}, trained on {facts['data_dir']}: {facts['weight_steps']} weight "
            f"steps, {facts['seconds']:.0f} s; tested on n={settings['n']}, list sha256 "
            f"{settings['images_sha256'][:16]}, Linf eps {255 * settings['eps']:.4g}/255, float32, "
            f"BatchNorm in eval mode, {settings['device']}, torch {settings['torch']}\n\n" + table)
    if ratios:
        text += "\n" + markdown(["UAP", "fooling_ratio"], [[k, percent(s)]
                                                           for k, s in ratios.items()])
    save_csv(folder / "results.csv", rows)
    write_atomic(folder / "results.md", text.encode())
    return text


# ---------------------------------------------------------------- comparison

def finished(folder):
    """(name of the method, facts, {attack: row of results.csv}) of a run folder."""
    facts = finished_run(folder, "weight_steps", "results.csv", "free_at.py")
    with open(folder / "results.csv", newline="") as file:
        rows = {row["attack"]: row for row in csv.DictReader(file) if row.get("attack")}
    name = facts["method"]
    if name == "free":
        share = facts["alpha"] / facts["eps"]
        name += str(facts["replays"]) + f" (alpha {share:.3g} eps)" * (share != 1)
    return name, facts, rows


def compare(folders):
    """The table of some runs on the same data, and what it says of the paper's claims."""
    runs = [finished(folder) for folder in folders]
    first = runs[0][1]
    for name, facts, rows in runs:
        for key in ("kind", "eps", "images_sha256", "device"):
            if facts[key] != first[key]:
                raise UserError(f"--compare: {name} has {key} {facts[key]}, {runs[0][0]} "
                                f"{first[key]}; wanted runs on the same")
        tested, wanted = ((", ".join(of), of["none"]["n"]) for of in (rows, runs[0][2]))
        if tested != wanted:
            raise UserError(f"--compare: {name} is tested by {tested[0]} on n={tested[1]}, "
                            f"{runs[0][0]} by {wanted[0]} on n={wanted[1]}; wanted the same")
    attacks = [name for name in runs[0][2] if name != "none"]
    lines = []
    for name, facts, rows in runs:
        steps = facts["weight_steps"]
        lines.append([name, steps, steps * BACKWARD[facts["method"]](facts),
                      f"{facts['seconds'] / 60:.1f}", _cell(rows["none"], "clean_acc"),
                      *(_cell(rows[attack], "adv_acc") for attack in attacks),
                      *(PAPER.get(name, ("-",) * 3) if first["kind"] == "cifar10" else ())])
    paper = ["paper: clean", "paper: PGD-20-10", "paper: minutes"]
    head = ["training", "weight steps", "backward passes", "minutes", "clean_acc", *attacks,
            *(paper if first["kind"] == "cifar10" else ())]
    names = sorted({facts["model_name"] for _, facts, _ in runs})
    return (f"{first['kind']}, {' and '.join(names)}, Linf eps {255 * first['eps']:.4g}/255, n="
            f"{runs[0][2]['none']['n']} test images; adv_acc, %, with 95 % Wilson intervals; "
            f"{first['device']}\n\n" + markdown(head, lines) + claims(runs))


def _cell(row, key):
    return interval({"value": float(row[key]), **{k: float(row[k]) for k in ("low", "high")}})


def claims(runs):
    """What the paper says of natural and of free-8 beside pgd, in the figures of these runs."""
    by = {name: (facts, 100 * float(rows["worst case"]["adv_acc"]))
          for name, facts, rows in runs}
    text = ""
    if "natural" in by:
        text += f"\nnatural: {by['natural'][1]:.1f} % are left by the worst case (paper: 0)\n"
    if {"free8", "pgd"} <= by.keys():
        (free, left), (pgd_facts, other) = by["free8"], by["pgd"]
        text += (f"\nfree8 against pgd-{pgd_facts['steps']}: {left - other:+.1f} points under the "
                 f"worst case, at 1/{pgd_facts['seconds'] / free['seconds']:.1f} of its time "
                 "(paper: +0.8 under PGD-20-10, at 1/6.9)\n")
    return text
