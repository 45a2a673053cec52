"""Makes the table of results.md from the output of run.sh: a row per setting, mean over its seeds.

    python docs/results/uap_transfer/table.py runs/uap_transfer/eval
"""

import csv
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

from utils.report import markdown  # noqa: E402

HEAD = ("name", "surrogate", "images", "method", "augment", "momentum", "loss", "batch_size",
        "gradients", "seeds", "seconds")


def settings(name, facts):
    """The cells of HEAD except the last two; for a floor without facts, only its name."""
    if "method" not in facts:
        return (name.rpartition("/")[-1], *("-" for _ in HEAD[1:-2]))
    untrained = "random" in facts["weights"]
    return (re.sub(r"_\d+_\d+/.*", "", name),
            " + ".join(facts["model_name"]) + (", random weights" if untrained else ""),
            facts["num_images"], facts["method"], "yes" if facts["augment"] else "no",
            f"{facts['momentum']:g}", facts["loss"], facts["batch_size"], facts["gradients"])


def table(results):
    """[head, rows ...] of strings."""
    networks, groups, seconds = list(results["protocol"]["targets"]), {}, {}
    for name, uap in results["uaps"].items():
        shares = {row["target"]: 100 * row["fooling_ratio"]["value"] for row in results["rows"]
                  if row["uap"] == name}
        made = settings(name, uap["facts"])
        groups.setdefault(made, []).append(shares)
        seconds.setdefault(made, []).append(uap["facts"].get("seconds"))
    rows = [[*(f"{cell:,}" if isinstance(cell, int) else cell for cell in made), str(len(seeds)),
             "-" if None in seconds[made] else f"{mean(seconds[made]):.0f}",
             *(spread([shares[network] for shares in seeds]) for network in networks)]
            for made, seeds in sorted(groups.items(), key=lambda one: place(one[0]))]
    return [[*HEAD, *networks], *rows]


def place(made):
    """Sort key of a row: the presets, the floors, then the others by name."""
    name, first = made[0], ("paper", "few_images", "transfer", "signs", "random_network")
    return first.index(name) if name in first else len(first), name, made[-1]


def spread(values):
    """'91.7 ± 1.2', for one seed '91.7'."""
    more = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{more}"


if __name__ == "__main__":
    head, *rows = table(json.loads((Path(sys.argv[1]) / "results.json").read_text()))
    with open(Path(__file__).parent / "results.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])
    print(markdown(head, rows))
