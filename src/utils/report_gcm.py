"""What gcm.py prints and saves: the robustness table, the audit, the sweep over w.

Each save_ function returns the Markdown that it saved and a last line that names the files.

The cells of a run are passed as {Cell: counts}, in the order of the rows; counts is None for a cell
that is not measured yet.
"""

import csv
from math import isclose

from utils import draw
from utils.audit import checklist, verdict
from utils.data import paper_geometry
from utils.defenses import describe, is_random, means
from utils.errors import UserError
from utils.measure import figures, worst_of
from utils.models import describe_geometry
from utils.papers import GCM_COLUMNS, GCM_LAYER, GCM_RADII, GCM_TABLE
from utils.report import (
    audit_line,
    batch_sizes,
    csv_columns,
    eps_text,
    interval,
    markdown,
    parts_table,
    with_note,
)
from utils.run import load_json, save_csv, save_json, write_atomic

WORST = "worst case"
KEPT = ("norm", "eps", "seconds", "gradients", "queries", "zero_gradient", "largest", "outside")
FLAGGED = {True: "yes", False: "no", None: "does not apply"}


def facts(settings, s, steps, cells):
    """{name: value} that every figure depends on, for the line above the tables of these cells."""
    sizes = sorted({target.size for target in s.targets})
    leave = "always" if s.stop_early else "where the attacker is adaptive or transfers"
    if s.audit:
        leave += ", and at the larger radii"
    if is_random(s.defense):
        leave += ", never behind a random defence"
    defence = " / ".join(dict.fromkeys(describe(
        s.defense, size=size, w=s.w, epsilon=s.epsilon, low=s.low) for size in sizes))
    return {
        "data": settings["data"], "n": with_note(settings["n"], settings.get("note")),
        "image list": f"sha256 {settings['images_sha256'][:16]}",
        "geometry": describe_geometry(s.targets),
        "networks": ", ".join(f"{t.name} ({t.described})" for t in s.targets),
        "defence": defence.replace(f"w={s.w:g} ", "") if s.w_sweep else defence,
        "attacked": "images that are right before, untargeted",
        "loss": "cross-entropy, for C&W its margin", "FGSM": "from the image",
        "PGD": f"{steps} steps of 3/40 eps from a random start, scaled to the ball and clipped to "
               "[0, 1], the last step counts", "fooled images leave PGD": leave,
        "gradients": "float32" if s.amp == "off" else s.amp, "measured in": "float32",
        "seed": s.seed, "batch size": batch_sizes(cells, s), "device": settings["device"],
        "torch": settings["torch"]}


def line(counts):
    """The line that is printed when a cell is done."""
    return (f"{counts['model']} | {counts['defense']} | {counts['attacker']} | {counts['title']}: "
            f"attack_robustness {interval(figures(counts)['attack_robustness'])}, "
            f"{counts['seconds']:.0f} s")


# ------------------------------------------------------------------------- the table

def label(cell, draws):
    """The name of a cell's row in the table."""
    if cell.defense == "none":
        return "vanilla"
    if cell.attacker == "naive":
        return f"{cell.defense}, naive attacker"
    return f"{cell.defense}, adaptive attacker ({means([cell.defense], draws)})"


def save_table(folder, head, cells, s):
    """results.md, results.csv"""
    rows, lines, saved, missing, titles = {}, [], [], {}, {}
    targets = {target.name: target for target in s.targets}
    for cell, counts in cells.items():
        rows.setdefault(cell.model, {}).setdefault(label(cell, s.draws), {})[cell.attack] = counts
        if counts:  # networks of other sizes are attacked at other radii
            titles.setdefault(cell.attack, {})[counts["title"]] = True
    for model, own in rows.items():
        for name, by_attack in own.items():
            done = [counts for counts in by_attack.values() if counts]
            if not done:
                continue
            shown = by_attack | {WORST: worst_of(done) if len(done) == len(by_attack) else None}
            lines.append([model, name, interval(figures(done[0])["clean_acc"]), *(
                interval(figures(counts)[s.metric]) if counts else "-"
                for counts in shown.values()), f"{sum(counts['seconds'] for counts in done):.0f}"])
            saved += [{"model": model, "row": name, "attack": attack, **_columns(counts)}
                      for attack, counts in shown.items() if counts]
        if s.defense == "gcm" and s.metric == "attack_robustness":
            papers, reasons = paper_rows(targets[model], own["vanilla"], s)
            lines, missing = lines + papers, missing | reasons
    text = (f"{head}\n{s.metric}, % (95 % Wilson interval); clean_acc of all images; worst case "
            "over the columns, image by image; s: seconds of computing in the row's attacks\n\n"
            + markdown(
                ["network", "row", "clean_acc",
                 *(" / ".join(titles.get(name, [name])) for name in s.attacks), WORST, "s"], lines))
    if missing:
        text += f"\npaper: '-' where it measured something else: {'; '.join(missing)}\n"
    text += parts_table(["network", "row"], [((cell.model, label(cell, s.draws)), counts)
                                             for cell, counts in cells.items() if counts])
    text += audit_line([counts for counts in cells.values() if counts])
    save_csv(folder / "results.csv", saved)
    write_atomic(folder / "results.md", text.encode())
    return f"{text}saved {folder.path}/results.json (and .csv, .md)\n"


def paper_rows(target, cells, s):
    """The paper's rows for this network, if any; reasons why figures are left out, as dict keys.

    cells {attack: counts or None}: our vanilla row.
    """
    lines, reasons = [], {}
    for name, numbers in zip(("vanilla", "GCM"), GCM_TABLE.get(target.name, ()), strict=False):
        printed = dict(zip(("clean_acc", *GCM_COLUMNS), numbers, strict=True))
        other = incomparable(name, target, cells, s)
        lines.append([target.name, f"paper: {name}", *(
            f"{printed[column]:.2f}" if column in printed and column not in other else "-"
            for column in ("clean_acc", *cells)), "-", "-"])
        reasons |= dict.fromkeys(other.values())
    return lines, reasons


def incomparable(name, target, cells, s):
    """{column: how our measurement differs from the paper's in this row}.

    name: 'vanilla' or 'GCM'; cells: as for paper_rows.
    """
    if s.kind != "imagenet" or target.geometry != paper_geometry():
        reason = (f"{target.name}: {target.geometry} instead of {paper_geometry()}"
                  if s.kind == "imagenet" else "images of other classes than ImageNet's")
        return dict.fromkeys(("clean_acc", *cells), reason)
    found = {}
    for attack, counts in cells.items():
        if attack not in GCM_COLUMNS or counts is None:
            continue
        norm, eps = counts["norm"], counts["eps"]
        if not isclose(eps, GCM_RADII[norm]):
            found[attack] = (f"{norm.capitalize()} eps {eps_text(eps, norm)} instead of "
                             f"{eps_text(GCM_RADII[norm], norm)}")
        elif s.stop_early and attack != "fgsm":
            found[attack] = "fooled images leave PGD"
        elif s.amp != "off":
            found[attack] = f"gradients in {s.amp}"
        elif name == "GCM" and (s.w, s.epsilon) != GCM_LAYER:
            found[attack] = "w={:g} epsilon={:g} instead of w={:g} epsilon={:g}".format(
                s.w, s.epsilon, *GCM_LAYER)
    return found


def _columns(counts):
    """Columns of results.csv: every figure with its n and interval, and facts of the attack."""
    return {k: counts[k] for k in KEPT if k in counts} | csv_columns(figures(counts))


def worst_cases(folder, weights):
    """From the table of gcm.py in a folder: {'AR, row': worst-case attack_robustness}, and images
    and radii as text; {} and "" if there is no table; {} and None if it is unfinished, has only
    naive attackers, or is not of the network with these `weights`, described by models.Target.
    """
    path, beside, found = folder / "results.csv", folder / "results.json", {}
    if not path.is_file():
        return found, ""
    if not beside.is_file():
        return found, None
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        state = load_json(beside)
        settings, names = state["settings"], ("model", "attack", "seconds")
        made = {tuple(str(cell[name]) for name in names) for cell in state["cells"].values()}
        rows = [row for row in rows if settings.get(f"network {row['model']}", {}).get("weights")
                == weights]
        tried = [row for row in rows if row["attack"] != WORST]
        worst = [row for row in rows if row["attack"] == WORST]
        alone = {cell["attacker"] for cell in state["cells"].values()
                 if cell["defense"] != "none"} == {"naive"}
        begun, whole = ({row["row"] for row in part} for part in (tried, worst))
        if alone or not tried or begun != whole or any(
                tuple(row[name] for name in names) not in made for row in tried):
            return found, None  # of other weights, unfinished, or older than the cells
        for row in worst:
            name = row["row"].partition(", ")[2].partition(" (")[0] or row["row"]
            found[f"AR, {name}"] = interval({
                "value": float(row["attack_robustness"]),
                **{k: float(row[f"attack_robustness_{k}"]) for k in ("low", "high")}})
        radii = dict.fromkeys(f"{row['norm'].title()} {eps_text(float(row['eps']), row['norm'])}"
                              for row in tried)
        return found, f"{settings['n']} images of {settings['data']} within {', '.join(radii)}"
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
        raise UserError(f"{path}: not the table of gcm.py; restore it, or move it elsewhere"
                        ) from None


# ------------------------------------------------------------------------- the audit

def save_audit(folder, head, cells, twins, s):
    """audit_DEFENSE.md, .json, .csv; twins {network: twin_differences}"""
    text, rows = f"{head}\nAR: attack_robustness\n", []
    for model in dict.fromkeys(cell.model for cell in cells):
        lines = audited({(cell.attacker, cell.attack): counts for cell, counts in cells.items()
                         if cell.model == model}, twins.get(model), s.queries)
        text += (f"\n{model}, {s.defense}\n\n" + markdown(
            ["sign", "figure", "flagged if", "flagged"],
            [[one["sign"], one["figure"], one["flagged_if"], FLAGGED[one["flagged"]]]
             for one in lines]) + f"\nVerdict: {verdict(lines)}.\n")
        rows += [{"model": model, "defense": s.defense, **one, "verdict": verdict(lines)}
                 for one in lines]
    name = f"audit_{s.defense}"
    save_csv(folder / f"{name}.csv", rows)
    save_json(folder / f"{name}.json", rows)
    write_atomic(folder / f"{name}.md", text.encode())
    return f"{text}saved {folder.path}/results.json, {name}.json (and .csv, .md)\n"


def audited(counts, twin, queries):
    """The audit's checklist, from {(attacker, attack): counts} of one network."""
    def ar(attacker, attack):
        return figures(counts[attacker, attack])["attack_robustness"]["value"]

    own = counts["naive", "pgd_linf"]
    robust = {"fgsm": ar("naive", "fgsm"), "pgd": ar("naive", "pgd_linf"),
              "square": ar("naive", "square")}
    if twin is not None:
        robust |= {"transfer": ar("vanilla", "pgd_linf"), "adaptive": ar("adaptive", "pgd_linf")}
    growing = {eps_text(one["eps"], "linf"): ar(*by) for by, one in counts.items()
               if by[0] == "naive" and by[1].startswith("pgd_linf")}
    attacked = sum(count > 0 for count in own["before"])
    return checklist(robust, radii=growing, queries=queries,
                     blind=own["zero_gradient"] / max(1, attacked),
                     losses={"mean": own["losses"], "ascent": own["ascent"]}, twin=twin)


# ------------------------------------------------------------------------- the sweep

def save_sweep(folder, head, cells, s):
    """w_sweep.md, w_sweep.csv, w_sweep.png"""
    by = {}
    for cell, counts in cells.items():
        by.setdefault((cell.model, cell.attacker), []).append((cell, counts))
    rows = [{"model": model, "attacker": attacker, "w": cell.w, "epsilon": s.epsilon,
             **_columns(counts)} for (model, attacker), own in by.items() for cell, counts in own]
    lines = [[*who, *(interval(figures(counts)["attack_robustness"]) for _, counts in own)]
             for who, own in by.items()]
    save_csv(folder / "w_sweep.csv", rows)
    write_atomic(folder / "w_sweep.png", draw.sweep(rows))
    columns = dict.fromkeys(f"{cell.w:.0e}" for cell in cells)
    text = (f"{head}\nattack_robustness under PGD Linf, % (95 % Wilson interval), against w\n\n"
            + markdown(["network", "attacker", *columns], lines))
    write_atomic(folder / "w_sweep.md", text.encode())
    return f"{text}saved {folder.path}/results.json, w_sweep.csv (and .png, .md)\n"
