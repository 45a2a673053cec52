"""Every bad input of the test suite's tables, through the real command line, a process for each.

    PYTHONPATH=src:tests python benchmarks/bad_input.py                # 450 processes
    PYTHONPATH=src:tests python benchmarks/bad_input.py --cases 90     # a part, of every kind

The cases are those of tests/test_bad_input.py and tests/test_bad_input_train.py. A case passes if
the process exits by itself with status 2, prints one line on stderr that begins with "error:" and
contains the expected words, runs nothing from the file, and leaves the files of finished runs
unchanged. With --results it continues where it stopped.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

import test_bad_input as table
import test_bad_input_train as train
from bench import show
from utils.cli import Parser, at_least, run_script
from utils.run import load_json, save_json

SRC = Path(__file__).resolve().parents[1] / "src"
LIMIT = 300  # seconds, after which a case counts as hung
KINDS = {    # kind: substrings of its cases' names; the first kind that matches counts
    "pipes, devices, folders, loops of links": ("pipe as", "folder as", "loop as", "device"),
    "image lists and MNIST files": ("image list", "JSON list", "MNIST ", "no UTF-8"),
    "pickles, zip archives and junk as .pth": tuple(f"{name} as " for name in table.FOREIGN),
    "checkpoints": ("checkpoint", "resumed as", "more epochs of"),
    "NAME.json, results.json, log.csv": (
        "JSON ", " of weights", " of pretrained", " of runs", " of a run", " of a stage",
        " of a cell", " of a table", " for --", "n of a cell", "log.csv", "an exercise with"),
    "tensors and weights that cannot be used": (" tensor as uaps", " weights"),
    ".npy and .npz": (".npy ", "examples.npz of"),
    "pictures": ("picture ", "PostScript", "a gain of"),
    "flags": ("",)}


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--cases", type=at_least(1), help="at most this many, spread over the kinds; None: all")
    add("--results", type=Path, help="JSON file to write, with .md and .csv beside it")
    return parser.parse_args()


def kind_of(name):
    return next(kind for kind, words in KINDS.items() if any(word in name for word in words))


def all_cases():
    """{name: (command, {file: content}, expected words, whether no file may be written)}"""
    cases = {name: (*case, True) for name, case in table.CASES.items()}
    for name, (args, words) in train.WRONG.items():
        cases[f"train_sga: {name}"] = (("train_sga.py", *train.QUICK, *args), {}, words, False)
    return cases


def chosen(cases, number):
    """Names of the cases, from each kind in turn."""
    left = {kind: [name for name in cases if kind_of(name) == kind] for kind in KINDS}
    names = []
    while any(left.values()):
        names += [one.pop(len(one) // 2) for one in left.values() if one]
    return names[:number]


def call(folder, command):
    """-> exit status (None if it hung), stderr"""
    script, *args = map(str, command)
    try:
        done = subprocess.run([sys.executable, SRC / script, *args], cwd=folder, timeout=LIMIT,
                              capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stderr.decode(errors="replace")


def wrong_with(case, folder):
    """What is wrong with the command's answer in this folder, or ''."""
    command, files, words, kept = case
    table.place(files, folder)
    before = table.written(folder)
    code, said = call(folder, command)
    lines = [line for line in said.splitlines()
             if line.strip() and not line.startswith("warning:")]
    if code != 2:
        return f"exit status {code}: {said[-300:]}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"{len(lines)} lines: {said[-300:]}"
    missing = [str(word) for word in words if str(word) not in lines[0]]
    if missing:
        return f"{', '.join(missing)} not in: {lines[0]}"
    if list(folder.rglob("ran")):
        return "something of the file was run"
    return "a file was written" if kept and table.written(folder) != before else ""


def make(folder):
    """A folder of finished runs, and one with the files that train.WRONG names."""
    (folder / "runs").mkdir()
    table.finish_runs(folder / "runs")
    (folder / "train").mkdir()
    train.make_files(folder / "train")


def main(args):
    cases, found = all_cases(), {}
    names = chosen(cases, args.cases)
    if args.results and args.results.is_file():
        found = load_json(args.results)["cases"]
    with tempfile.TemporaryDirectory() as top:
        top = Path(top)
        make(top)
        for name in tqdm([name for name in names if name not in found], unit="case", disable=None):
            start, here = top / ("runs" if cases[name][3] else "train"), top / "here"
            subprocess.run(["cp", "-a", start, here], check=True)  # pipes and links too
            found[name] = wrong_with(cases[name], here)
            subprocess.run(["rm", "-rf", here], check=True)
            if found[name]:
                print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
            if args.results:
                args.results.parent.mkdir(parents=True, exist_ok=True)
                save_json(args.results, {"cases": found})
    lines = []
    for kind in KINDS:
        own = [said for name, said in found.items() if kind_of(name) == kind]
        if own:
            lines.append([kind, len(own), own.count("")])
    lines.append(["all", len(found), list(found.values()).count("")])
    show(["bad input", "processes", "exit status 2 and one line"], lines,
         f"Of {len(cases)} cases in tests/test_bad_input.py and tests/test_bad_input_train.py.",
         args.results, cases=found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_script(get_args, main)
