"""A disk that fills up during each kind of write: one error line, whole files, run continues.

    PYTHONPATH=src python benchmarks/full_disk.py                 # as root
    PYTHONPATH=src unshare -rm python benchmarks/full_disk.py     # as a user, if the kernel allows

Every trial runs a command of kill_test.py on a tmpfs that holds only part of what an undisturbed
run writes; its size, and so the first write that fails, varies between trials. A trial passes if
the command exits with status 2 and one line, every file there can be read, no temporary file is
left, and the same command on a larger disk then ends like the undisturbed run. With --results it
continues where it stopped.
"""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from bench import show
from kill_test import COMMANDS, NETWORK, finish, outcome, start
from utils.cli import Parser, at_least, run_script
from utils.errors import UserError
from utils.run import load_json, load_pth, save_json

PAGE = 4096
LARGE = 64 * 2 ** 20  # bytes, enough for every run


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sizes", type=at_least(1), default=8, help="disk sizes for each command")
    add("--commands", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS),
        help="which commands")
    add("--results", type=Path, help="JSON file to write, with .md and .csv beside it")
    return parser.parse_args()


@contextmanager
def disk(folder, size):
    """A tmpfs of `size` bytes at this folder. UserError if this process may not mount one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                          check=False, capture_output=True)
    if made.returncode:
        raise UserError("this user may not mount a tmpfs; type unshare -rm before python")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def written_by(words, cwd):
    """-> the command's outcome on a disk that is large enough, and the bytes it needs there"""
    folder = cwd / "whole"
    finish(start(words, folder, cwd))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    found = outcome(folder)
    shutil.rmtree(folder)
    return found, sum(-(-size // PAGE) * PAGE for size in sizes) + max(sizes)


def wrong_with(words, cwd, size, wanted):
    """What is wrong on a disk of this size, or ''; 'fits' if the disk did not fill up."""
    folder = cwd / "disk"
    with disk(folder, size):
        process = start(words, folder / "run", cwd)
        said = process.communicate()[1]
        if process.returncode == 0:
            return "fits"
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if process.returncode != 2 or len(lines) != 1 or "No space left" not in lines[0]:
            return f"exit status {process.returncode}: {said[-300:]}"
        left = sorted(folder.rglob("*"))
        if any(path.suffix == ".tmp" for path in left):
            return "a temporary file was left"
        for path in left:
            if path.suffix == ".pth":
                load_pth(path)
        outcome(folder)  # reads every .json and log.csv
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", folder], check=True)
        finish(start(words, folder / "run", cwd))
        found = outcome(folder / "run")
        differ = sorted(name for name in found.keys() | wanted.keys()
                        if found.get(name) != wanted.get(name))
        return f"differs in the end: {', '.join(differ)}" if differ else ""


def main(args):
    lines, found = [], {}
    if args.results and args.results.is_file():
        found = load_json(args.results)["sizes"]
    with tempfile.TemporaryDirectory() as top:
        cwd = Path(top)
        with disk(cwd / "disk", PAGE):
            pass  # fails now if mounting is not allowed
        if {"gcm", "eval_net"} & set(args.commands):
            finish(start(NETWORK, "net", cwd))
        for name in args.commands:
            wanted, needed = written_by(COMMANDS[name], cwd)
            own = found.setdefault(name, {})
            for k in tqdm(range(args.sizes), desc=name, unit="disk", disable=None):
                size = max(1, needed * k // args.sizes // PAGE) * PAGE
                if str(size) not in own:
                    own[str(size)] = wrong_with(COMMANDS[name], cwd, size, wanted)
                    if args.results:
                        args.results.parent.mkdir(parents=True, exist_ok=True)
                        save_json(args.results, {"sizes": found})
            said = list(own.values())
            lines.append([f"{name}.py", len(said) - said.count("fits"), said.count("")])
            for size, what in own.items():
                if what not in ("", "fits"):
                    print(f"{name}, {size} bytes: {what}")
    show(["command", "disks that were full", "one line, whole files, then the same result"], lines,
         "A tmpfs of growing size, from one page to nearly what the run needs; digits, one thread.",
         args.results, sizes=found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_script(get_args, main)
