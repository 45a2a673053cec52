"""Mean and standard deviation over the seeds of free8, from the results.csv of an evaluation.

    python docs/results/free_mnist/table.py runs/free_mnist        # prints the second table
"""

import csv
import sys
from pathlib import Path
from statistics import mean, stdev

rows = list(csv.DictReader((Path(sys.argv[1]) / "results.csv").open()))
columns = ["clean_acc", *dict.fromkeys(row["under"] for row in rows if row["under"] != "none")]
print(f"| training | seeds | {' | '.join(columns)} |")
print("| --- " * (2 + len(columns)) + "|")
for name in ("free8", "free8 (box)"):
    shown = []
    for column in columns:
        metric, under = ("clean_acc", "none") if column == "clean_acc" else ("robust_acc", column)
        found = [100 * float(row["value"]) for row in rows if row["metric"] == metric
                 and row["under"] == under and row["network"].startswith(f"{name}, seed ")]
        shown.append(f"{mean(found):.1f} ± {stdev(found):.1f}")
    print(f"| {name} | {len(found)} | {' | '.join(shown)} |")
