"""Makes the tables of results.md from the output of run.sh: perturbations, figures, hashes.

    python docs/results/uaps/table.py runs/uaps/eval imgs/uaps
"""

import csv
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "src"))

from utils.report import interval, markdown  # noqa: E402
from utils.run import digest  # noqa: E402
from utils.uaps import read_uap  # noqa: E402


def rows(results, uaps):
    """[head, rows ...] of strings."""
    networks, table = list(results["protocol"]["targets"]), []
    for name, uap in results["uaps"].items():
        shares = {row["target"]: row["fooling_ratio"] for row in results["rows"]
                  if row["uap"] == name}
        path = uaps / f"{name}.png"
        table.append([name, f"{uap['facts']['gradients']:,}",
                      *(interval(shares[network]) for network in networks),
                      digest(read_uap(path, scale="auto", eps=1).delta)])
    return [["UAP", "gradients", *networks, "hash"], *table]


if __name__ == "__main__":
    for kind, name in (("imagenet", "results"), ("digits", "digits"), ("cifar10", "cifar10")):
        path = Path(sys.argv[1]) / kind / "results.json"
        if not path.is_file():
            continue
        head, *body = rows(json.loads(path.read_text()), Path(sys.argv[2]))
        with open(HERE / f"{name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([head, *body])
        print(markdown(head, body))
