"""Draws the pictures of imgs/ from what runs left on disk; trains and evaluates nothing.

    python figures.py --results runs/eval --rows sga_0:SGA spgd_0:SPGD --out imgs/uaps.png
    python figures.py --w_sweep runs/gcm --out imgs/gcm_w.png
"""

import csv
from pathlib import Path

from utils import draw
from utils.run import Parser, UserError, load_json, run_script, write_atomic
from utils.uaps import read_uap


def get_args():
    parser = Parser("Perturbations beside their fooling ratios; robustness against GCM's w.")
    add = parser.add_argument
    add("--results", type=Path, default=Path("runs/eval"), help="folder that eval_uap.py wrote")
    add("--rows", nargs="+", help="which of its perturbations, as NAME or NAME:LABEL; None: all")
    add("--w_sweep", type=Path, nargs="+", help="instead: folders with w_sweep.csv, of gcm.py")
    add("--out", type=Path, default=Path("imgs/uaps.png"), help="PNG file to write")
    return parser.parse_args()


def w_sweep(folders):
    """PNG of robustness against w, from one folder of gcm.py or several."""
    rows = []
    for path in (folder / "w_sweep.csv" for folder in folders):
        if not path.is_file():
            raise UserError(f"--w_sweep {path.parent}: no w_sweep.csv there; run gcm.py with "
                            "--w_sweep first")
        with open(path, newline="") as file:
            rows += csv.DictReader(file)
    return draw.sweep(rows)


def uaps(args):
    """PNG of perturbations beside their fooling ratios."""
    path = args.results / "results.json"
    if not path.is_file():
        raise UserError(f"--results {args.results}: no results.json there; run eval_uap.py first")
    results = load_json(path)
    targets = list(results["protocol"]["targets"])
    chosen = [row.partition(":") for row in args.rows or results["uaps"]]
    deltas, ratios = {}, {}
    for name, _, label in chosen:
        if name not in results["uaps"]:
            raise UserError(f"--rows {name}: not in {path}, which has {', '.join(results['uaps'])}")
        saved = results["uaps"][name]
        uap = read_uap(saved["path"], scale=saved["scale"], eps=1)
        deltas[label or name] = uap.delta
        ratios[label or name] = [row["fooling_ratio"] for row in results["rows"]
                                 if row["uap"] == name]
    return draw.compare(deltas, ratios, targets)


def main(args):
    picture = w_sweep(args.w_sweep) if args.w_sweep else uaps(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, picture)
    print(f"drew {args.out}")


if __name__ == "__main__":
    run_script(get_args, main)
