"""The tables of eval_net.py: results.md, results.csv, and the picture of corruptions."""

from dataclasses import dataclass, field
from math import isclose
from pathlib import Path

from utils import curves, draw, transfer
from utils.defenses import is_random, means
from utils.measure import figures, share, worst_of
from utils.papers import FREE_TABLE
from utils.report import (
    audit_line,
    batch_sizes,
    eps_text,
    interval,
    markdown,
    parts_table,
    protocol,
    with_note,
)
from utils.report_gcm import worst_cases
from utils.run import save_csv, write_atomic
from utils.saved import read_about, title_of

WORST, SECONDS = "worst case", "s"
ROBUST = ("robust_acc", "attack_robustness")
BACKWARD = {"natural": lambda facts: 1, "free": lambda facts: 1, "fast": lambda facts: 2,
            "pgd": lambda facts: facts["steps"] + 1}  # backward passes per weight step
TRAINING = ("weight steps", "backward passes", "stage", "defence", "augmentations", "w_fgsm",
            "w_fgsm_target", "minutes", "clean_acc")  # the first columns


def save_tables(folder, networks, settings, cells, s):
    """Writes results.md, results.csv and the pictures; -> the Markdown.

    networks: tested.Tested; settings: of this command; cells: of results.json; s: the flags.
    """
    found = [measured(net, networks, settings, cells, s) for net in networks]
    attacked = [cell for net in found for cell in net.attacked]
    text = protocol(stated(networks, settings, found, cells, s)) + "\n"
    text += tables(found)
    if s.eps_curve:
        text += curves.save(folder, networks, cells)
        attacked += [cell for net in networks for own in curves.cells_of(net, cells).values()
                     for cell in own]
    if s.transfer:
        text += transfer.table(networks, cells, s)
    text += audit_line(attacked) if attacked else ""
    save_csv(folder / "results.csv", csv_rows(found))
    write_atomic(folder / "results.md", text.encode())
    if s.corruptions:
        write_atomic(folder / "corruptions.png",
                     draw.corruptions({net.name: net.corruptions for net in found}))
    return text


def stated(networks, settings, found, cells, s):
    """What all figures have in common, for the line above the table; found: [Measured]."""
    nets = [f"{net.name} (" + f"{net.target.name}, " * (net.name != net.target.name)
            + f"{net.target.geometry}, {net.target.described})" for net in networks]
    behind = [net for net in networks if net.defense != "none"]
    defences = [f"{net.name} behind {net.front}" for net in behind]
    random = any(is_random(net.defense) for net in behind)
    made = {}
    for net in found:
        made.setdefault(net.ar_made, []).append(net.name)
    made = [text + f" ({', '.join(names)})" * (len(made) > 1) for text, names in made.items()
            if text]
    attacks = {
        "attacks": "on the images that are classified correctly; PGD from a random start in steps "
                   "of eps/4, until the image is fooled"
                   + ", behind a random defence always to the end" * random,
        "attacker": f"adaptive ({means([net.defense for net in behind], s.draws)})" * bool(behind),
        "under attack": "robust_acc, right before and still right after",
        "s": "seconds of computing in the attacks of the line"} if s.attacks else {}
    attacks = {f"{s.norm.title()} eps": eps_text(settings["eps"], s.norm),
               **attacks} if s.attacks or s.eps_curve or s.transfer else {}
    if s.from_images:
        attacks["saved images"] = "those that were not attacked are clean"
    if s.save_images:
        attacks["8 bit"] = "the same images rounded to 8 bit inside the ball, saved, and read again"
    return {
        "data": settings["data"],
        "n": with_note(f"{found[0].clean['n']} test images", settings["note"]),
        "list sha256": settings["images_sha256"][:16], "networks": ", ".join(nets),
        "defences": ", ".join(defences), **attacks,
        "accuracy": "of all images, in %, with 95 % Wilson intervals",
        "AR": "attack_robustness in gcm.py's worst case, " * bool(made) + " / ".join(made),
        "float32, BatchNorm in eval mode; seed": s.seed, "batches of": batch_sizes(cells, s),
        "device": settings["device"], "torch": settings["torch"]}


def headline(cell):
    """The figure of one cell, for the line that is printed when it is done."""
    if "norms" in cell:
        return f"{sum(size is not None for size in cell['norms'])} of {cell['n']} images fooled"
    if "fooled" in cell:
        return "fooling_ratio " + interval(share(cell["fooled"], cell["n"]))
    if "right" in cell:
        return "clean_acc " + interval(share(cell["right"]["clean"], cell["n"]))
    metric = "robust_acc" if "eps" in cell else "clean_acc"
    return f"{metric} {interval(figures(cell)[metric])}"


# --------------------------------------------------------------------------- the tables

@dataclass(frozen=True, eq=False)
class Measured:
    """A network with its figures: attacks, saved, moved (the images of --transfer) {title: cell};
    corruptions, uaps {name: share}.

    facts: NAME.json of its run in `folder`; {} and None for other networks. ar, ar_made: from
    report_gcm.worst_cases.
    """
    name: str
    facts: dict
    folder: Path
    clean: dict
    attacks: dict
    corruptions: dict
    uaps: dict
    saved: dict = field(default_factory=dict)
    moved: dict = field(default_factory=dict)
    ar: dict = field(default_factory=dict)
    ar_made: str | None = ""

    @property
    def worst(self):
        return figures(worst_of(list(self.attacks.values())))["robust_acc"]

    @property
    def attacked(self):
        """Every attack's cell, once: those rounded to 8 bits belong to one of `attacks`."""
        return [*self.attacks.values(), *self.moved.values(),
                *(cell for cell in self.saved.values() if "after8" not in cell)]

    @property
    def mean(self):
        """Mean accuracy over the operations; the interval is that of all augmented images."""
        found = [s for name, s in self.corruptions.items() if name != "clean"]
        return share(sum(s["k"] for s in found), sum(s["n"] for s in found))


def measured(net, networks, settings, cells, s):
    """The figures of one of the networks."""
    def own(name):
        return cells[f"{net.name} | {name}"]

    plain = {}
    if s.corruptions or not s.judged:
        cell = own("corruptions" if s.corruptions else "accuracy")
        plain = {name: share(k, cell["n"]) for name, k in cell["right"].items()}
    fooled = {key: own(key) for key in settings if key.startswith("uap ")}
    saved = {f"{title}, 8 bit": own(title) | {"after": own(title)["after8"]}
             for title in net.attacks(s) if s.save_images}
    saved |= {title: own(title) for title in map(title_of, map(read_about, s.from_images or []))}
    ar, ar_made = (worst_cases(net.folder / "gcm", net.target.described) if "stage" in net.facts
                   else ({}, ""))
    return Measured(
        net.name, net.facts, net.folder,
        clean=figures(own("clean"))["clean_acc"] if s.judged else plain["clean"],
        attacks={title: own(title) for title in net.attacks(s)},
        corruptions=plain if s.corruptions else {},
        uaps={key.removeprefix("uap "): share(cell["fooled"], cell["n"])
              for key, cell in fooled.items()},
        saved=saved, moved=transfer.onto(net, networks, cells, s), ar=ar, ar_made=ar_made)


def tables(networks):
    """The Markdown of everything that was measured on these networks [Measured]."""
    other = [net.name for net in networks if net.ar_made is None]
    text = main_table(networks) + claims(networks)
    text += (f"\nAR left out of {', '.join(other)}: the folder gcm there holds a table of other "
             "weights, or an incomplete one; make it again with gcm.py --overwrite\n") * bool(other)
    text += parts_table(["network"], [((net.name,), cell) for net in networks
                                      for cell in net.attacks.values()])
    if networks[0].corruptions:
        names = sorted(networks[0].corruptions, key=lambda name: (
            name != "clean", networks[0].corruptions[name]["value"]))
        text += "\nAccuracy under each operation, %, in one forward pass each\n\n" + markdown(
            ["operation", *(net.name for net in networks)],
            [[name.replace("_", " "), *(interval(net.corruptions[name]) for net in networks)]
             for name in names])
    if networks[0].uaps:
        text += "\nfooling_ratio, %\n\n" + markdown(
            ["perturbation", *(net.name for net in networks)],
            [[name, *(interval(net.uaps[name]) for net in networks)]
             for name in networks[0].uaps])
    return text


def main_table(networks):
    """A line for every network; a column is shown if any network has it."""
    lines = [columns_of(net) for net in networks]
    every = dict.fromkeys(title for found in lines for title in found)
    columns = [title for title in TRAINING if title in every]
    columns += sorted(every.keys() - TRAINING, key=lambda title: (
        title.startswith("paper: "), title == SECONDS, list(every).index(title)))
    free = all("replays" in net.facts for net in networks)
    first = "training" if free else "run" if all(net.facts for net in networks) else "network"
    return markdown([first, *columns], [
        [net.name, *(found.get(title, "-") for title in columns)]
        for net, found in zip(networks, lines, strict=True)])


def columns_of(net):
    """{column: text} of one network, in the order of the columns."""
    facts, found = net.facts, {}
    if "replays" in facts:
        steps = facts["weight_steps"]
        found = {"weight steps": steps,
                 "backward passes": steps * BACKWARD[facts["method"]](facts)}
    if "stage" in facts:
        found = {"stage": facts["stage"], "defence": facts["defense"],
                 "augmentations": " ".join(facts["augment"]), "w_fgsm": f"{facts['w_fgsm']:g}"}
        if "w_fgsm_target" in facts:  # before it, w_fgsm was for x + eps sign(g) only
            found["w_fgsm_target"] = f"{facts['w_fgsm_target']:g}"
    if facts:
        found["minutes"] = f"{facts['seconds'] / 60:.1f}"
    found["clean_acc"] = interval(net.clean)
    found |= {title: interval(figures(cell)["robust_acc"]) for title, cell in net.attacks.items()}
    if len(net.attacks) > 1:
        found[WORST] = interval(net.worst)
    found |= {title: interval(figures(cell)["robust_acc"]) for title, cell in net.saved.items()}
    if net.attacks:
        found[SECONDS] = f"{sum(cell['seconds'] for cell in net.attacks.values()):.0f}"
    if net.corruptions:
        title = f"mean of {len(net.corruptions) - 1} augmentations"
        found[title] = f"{100 * net.mean['value']:.1f}"
    found |= net.ar
    if net.name in FREE_TABLE and as_in_the_paper(net):
        titles = ("paper: clean", "paper: PGD-20-10", "paper: minutes")
        found |= dict(zip(titles, FREE_TABLE[net.name], strict=True))
    return found


def as_in_the_paper(net):
    """Whether it was trained like the networks of FREE_TABLE, and is attacked at their radius."""
    facts = net.facts
    return ("replays" in facts and facts["kind"] == "cifar10"
            and facts["model_name"] == "wrn_32_10" and facts["weight_steps"] == 80_000
            and facts.get("given_images") is None
            and (facts["method"] != "pgd" or facts.get("steps", 7) == 7)
            and all(isclose(eps, 8 / 255) for eps in (
                facts["eps"], *(cell.get("eps", 0) for cell in net.attacks.values())))
            and all(cell.get("norm", "linf") == "linf" for cell in net.attacks.values()))


def claims(networks):
    """The paper's claims about natural training, free-8 and pgd, with our figures."""
    by = {net.name: net for net in networks if "replays" in net.facts and len(net.attacks) > 1}
    said = []

    def paper(name, figure):
        return f" (paper: {figure})" * (by[name].facts["kind"] == "cifar10")

    if any(cell.get("norm", "linf") != "linf" for net in networks for cell in net.attacks.values()):
        return ""
    if "natural" in by:
        said.append(f"Natural training: robust_acc {100 * by['natural'].worst['value']:.1f} % in "
                    "the worst case" + paper("natural", "0") + ".")
    if {"free8", "pgd"} <= by.keys():
        free, pgd = by["free8"], by["pgd"]
        points = 100 * (free.worst["value"] - pgd.worst["value"])
        alike = all(free.facts.get(key) == pgd.facts.get(key)
                    for key in ("device", "images_sha256", "eps"))
        times = pgd.facts["seconds"] / max(free.facts["seconds"], 1e-3)
        said.append(f"free8 compared with pgd-{pgd.facts['steps']}: {points:+.1f} points in the "
                    "worst case" + f", in 1/{times:.1f} of its training time" * alike
                    + paper("free8", "+0.8 under PGD-20-10, in 1/6.9") + ".")
    return "\n" + " ".join(said) + "\n" if said else ""


def csv_rows(networks):
    """results.csv: a row for every figure."""
    def row(net, metric, under, s):
        return {"network": net.name, "metric": metric, "under": under,
                **{key: s[key] for key in ("value", "k", "n", "low", "high")}}
    found = []
    for net in networks:
        cells = net.attacks | ({WORST: worst_of(list(net.attacks.values()))}
                               if len(net.attacks) > 1 else {})
        found += [row(net, "clean_acc", "none", net.clean)]
        found += [row(net, metric, title, figures(cell)[metric]) | {"seconds": cell["seconds"]}
                  for title, cell in cells.items() for metric in ROBUST]
        found += [row(net, metric, title, figures(cell)[metric])
                  for title, cell in (net.saved | net.moved).items() for metric in ROBUST]
        found += [row(net, "adv_acc", name, s) for name, s in net.corruptions.items()
                  if name != "clean"]
        found += [row(net, "fooling_ratio", name, s) for name, s in net.uaps.items()]
    return found
