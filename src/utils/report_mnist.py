"""Results of one or several runs of fgsm_mnist.py: tables, files, and suspicious figures."""

import csv
import statistics

import numpy as np

from utils import draw
from utils.errors import UserError, reading
from utils.report import interval, markdown, protocol
from utils.run import RunFolder, load_json, refuse_bomb, save_csv, save_json, write_atomic

COLUMNS = {"clean": "clean", "fgs": "FGS", "fgv": "FGV", "pgd40": "PGD-40",
           "strongest_quick": "strongest_quick"}
OLDER = {"strongest_quick": "APGD-CE + APGD-DLR + Square",  # for runs whose facts lack it
         "optimizer": "adam, lr 0.001", "batch_size": 128, "curve_images": 0}
HIGH, LOW = 0.5, 0.1  # catastrophic overfitting: above HIGH under FGS, below LOW under PGD or APGD
SAME = ("kind", "epochs", "optimizer", "batch_size", "images_sha256", "alpha_fgs", "alpha_fgv",
        "test_images", "attacked", "strongest_quick", "curve_images")  # equal in a summary


def called(facts):
    """The name in tables of the run with these facts."""
    return facts["variation"] + " (predicted)" * (facts.get("label") == "predicted")


def titles(facts):
    """{figure: its column}, with the quick mixture named by its parts."""
    return COLUMNS | {"strongest_quick": facts["strongest_quick"]}


def suspicions(found, named):
    """[(name of the suspicion, figures as text)] for {clean, fgs, fgv, fgs_adv_acc, fgv_adv_acc,
    pgd40, strongest_quick: value}; named: their titles. Runs of older versions have no adv_acc.
    """
    said, percent = [], {name: f"{100 * value:.1f} %" for name, value in found.items()}
    for name in ("fgs", "fgv"):
        if found.get(f"{name}_adv_acc", 0) > found["clean"]:
            said.append(("label leaking", f"of all images, {percent[f'{name}_adv_acc']} are right "
                         f"under {named[name]}, {percent['clean']} without it"))
    if found["fgs"] > HIGH and min(found["pgd40"], found["strongest_quick"]) < LOW:
        said.append(("catastrophic overfitting", "accuracy " + ", ".join(
            f"under {named[name]} {percent[name]}"
            for name in ("fgs", "pgd40", "strongest_quick"))))
    return said


def mean_of(found, name):
    """'98.5 ± 0.2' over the seeds, or the interval of a single seed."""
    values = [100 * one[name]["value"] for one in found]
    if len(values) == 1:
        return interval(found[0][name])
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def settings(runs):
    """{name: value} that all figures of the table depend on."""
    facts, labels = runs[0][0], dict.fromkeys(facts["label"] for facts, _ in runs)
    return {
        "data": facts["kind"], "training images": facts["num_images"], "epochs": facts["epochs"],
        "optimizer": facts["optimizer"],
        "one step": f"FGS {facts['alpha_fgs']:g}, FGV {facts['alpha_fgv']:g}, "
                    f"n={facts['test_images']} test images",
        "many steps": f"Linf {facts['alpha_fgs']:g}, n={facts['attacked']}",
        "label in training": " or ".join(labels), "device": facts["device"]}


def table(runs):
    """Markdown: protocol, a line for every (facts, figures of its seeds), and the suspicions."""
    named, seeds = titles(runs[0][0]), {len(found) for _, found in runs}
    mixed, single = len(seeds) > 1, "95 % Wilson interval"
    spread = single if seeds == {1} else "mean ± standard deviation of " + (
        f"the seeds, of one seed its {single}" if mixed else f"{min(seeds)} seeds")
    lines = [[called(facts), *[len(found)] * mixed, *(mean_of(found, name) for name in COLUMNS),
              f"{statistics.mean(one['seconds'] for one in found):.0f}"] for facts, found in runs]
    said = [f"\n{what}: {called(facts)}, seed {one['seed']}: {figures}\n"
            for facts, found in runs for one in found
            for what, figures in suspicions({name: part["value"] for name, part in one.items()
                                             if isinstance(part, dict)}, named)]
    return (protocol(settings(runs))
            + "clean_acc, then attack_robustness (of the images right before the attack, those "
            f"right after it), %, {spread}; s: training\n\n"
            + markdown(["trained on", *["seeds"] * mixed, *named.values(), "s"], lines)
            + "".join(said))


def over_epochs(runs, logs):
    """Markdown: PGD-40's highest and last accuracy for every seed of the runs, as for table.

    logs: {name of the run: [rows of log.csv of each seed]}; '' if no epoch was attacked.
    """
    lines = []
    for facts, found in runs:
        for one, rows in zip(found, logs[called(facts)], strict=True):
            if "pgd40" in rows[0]:
                best = max(rows, key=lambda row: row["pgd40"])
                lines.append([called(facts), one["seed"], f"{100 * best['pgd40']:.1f}",
                              f"{best['epoch']:.0f}", f"{100 * rows[-1]['pgd40']:.1f}"])
    if not lines:
        return ""
    curve = runs[0][0]["curve_images"]
    return (f"\nattack_robustness under PGD-40 after each epoch, %, n={curve} test images\n\n"
            + markdown(["trained on", "seed", "highest", "after epoch", "after the last"], lines))


def save_results(folder, facts, found):
    """Save results and curve of one variation in its RunFolder; found: a dict for each seed."""
    logs = [_read_log(folder / f"seed{one['seed']}") for one in found]
    write_atomic(folder / "curve.png", draw.variations({called(facts): logs}))
    save_json(folder / "results.json", {"facts": facts, "seeds": found})
    save_csv(folder / "results.csv", _rows(facts, found))
    runs = [(facts, found)]
    text = table(runs) + over_epochs(runs, {called(facts): logs})
    write_atomic(folder / "results.md", text.encode())
    print(text + f"saved {folder.path}/results.json (.csv, .md), curve.png")


def summarise(folders, out):
    """Save table, curves and examples of several finished runs in the folder `out`."""
    with reading(f"--summary {' '.join(map(str, folders))}", "fgsm_mnist.py"):
        runs = [_read_run(path) for path in folders]
        _check_same(folders, [facts for facts, _ in runs])
        logs = {called(facts): [_read_log(path / f"seed{one['seed']}") for one in found]
                for path, (facts, found) in zip(folders, runs, strict=True)}
        shown = {called(facts): read_examples(path, found[0])
                 for path, (facts, found) in zip(folders, runs, strict=True)
                 if (path / "examples.npz").is_file()}
        rows = [{"variation": called(facts), **row}
                for facts, found in runs for row in _rows(facts, found)]
        text, curves = table(runs) + over_epochs(runs, logs), draw.variations(logs)
        picture = draw.exercise(shown) if shown else None
    folder = RunFolder(out)
    write_atomic(folder / "summary.md", text.encode())
    save_csv(folder / "summary.csv", rows)
    write_atomic(folder / "curves.png", curves)
    if picture:
        write_atomic(folder / "examples.png", picture)
    print(text + f"saved {out}/summary.md (.csv), curves.png" + ", examples.png" * bool(picture))


def _check_same(folders, runs):
    """UserError unless the facts of these runs agree where a table needs it, and no two runs have
    the same name.
    """
    names = [called(facts) for facts in runs]
    for path, facts in zip(folders, runs, strict=True):
        if names.count(called(facts)) > 1:
            raise UserError(f"--summary {path}: another of these runs is called {called(facts)} "
                            "too; type one at a time")
        for key in SAME:
            if facts[key] != runs[0][key]:
                raise UserError(f"--summary {path}: has {key} {facts[key]}, {folders[0]} has "
                                f"{runs[0][key]}; wanted runs on the same")


def _read_run(path):
    """Facts, and the figures of every seed."""
    saved = load_json(path / "results.json") if (path / "results.json").is_file() else None
    if not isinstance(saved, dict) or "variation" not in (saved.get("facts") or {}):
        raise UserError(f"--summary {path}: no finished run; wanted a folder that fgsm_mnist.py "
                        "left, with results.json in it")
    return OLDER | _renamed(saved["facts"]), [_renamed(one) for one in saved["seeds"]]


def _renamed(found):
    """Older runs call the quick mixture `strongest`."""
    return {{"strongest": "strongest_quick"}.get(name, name): part for name, part in found.items()}


def _rows(facts, found):
    named = titles(facts) | {"clean": "none"}
    return [{"seed": one["seed"], "metric": "clean_acc" if name == "clean" else "attack_robustness",
             "under": under, **one[name]} for one in found for name, under in named.items()]


def _read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value}  # '': older version
                for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f"{folder / 'log.csv'}: no rows in it; train again")
    return rows


def read_examples(folder, found):
    """{x (3, n, C, H, W) clean, FGS, FGV; seen (3, n); y (n,); labels} of a run's examples.npz.

    found: the figures of its first seed, whose network was attacked.
    """
    labels = [f"{COLUMNS[name]}: {100 * found[name]['value']:.1f} %" for name in ("fgs", "fgv")]
    refuse_bomb(folder / "examples.npz")
    with np.load(folder / "examples.npz", allow_pickle=False) as file:
        return {"labels": labels, **{key: file[key] for key in file}}
