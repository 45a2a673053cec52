"""Makes the tables of results.md from the output of run.sh, and those of gcm_audit.

    python docs/results/gcm_photographs/table.py runs/gcm_photographs
"""

import csv
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "src"))

from utils.report import markdown  # noqa: E402

NETWORKS = ("squeezenet1_0", "squeezenet1_1", "mobilenet_v2")


def of_networks(runs):
    """[head, rows ...]: the tables of the three networks, one below the other."""
    rows = []
    for name in NETWORKS:
        lines = [line.strip("| ").split(" | ") for line in
                 (runs / name / "results.md").read_text().splitlines() if line.startswith("| ")]
        head, rows = lines[0], rows + [line for line in lines if line[0] == name]
    return [head, *rows]


def of_audit(runs, defense):
    """[head, rows ...]: the checklists of the three networks side by side."""
    lists = [json.loads((runs / name / f"audit_{defense}.json").read_text()) for name in NETWORKS]
    rows = [[one[0]["sign"], one[0]["flagged_if"],
             *(f"**{each['figure']}**" if each["flagged"] else each["figure"] for each in one)]
            for one in zip(*lists, strict=True)]
    return [["sign", "flagged if", *NETWORKS], *rows,
            ["**verdict**", "", *(f"**{found[0]['verdict']}**" for found in lists)]]


if __name__ == "__main__":
    runs, audit = Path(sys.argv[1]), HERE.parent / "gcm_audit"
    for path, rows in ((HERE / "results.csv", of_networks(runs)),
                       (audit / "results.csv", of_audit(runs, "gcm")),
                       (audit / "vanilla.csv", of_audit(runs, "none"))):
        with open(path, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        print(markdown(rows[0], rows[1:]))
