"""Runs killed (kill -9) at random moments and started again, compared with undisturbed runs.

    PYTHONPATH=src python benchmarks/kill_test.py --kills 20        # of every command

Every trial starts a command in an empty folder and kills its process group at a moment drawn
uniformly from the undisturbed run's duration, counted from when its folder exists. It then runs the
same command again (trainings with --resume) to its end. Networks and perturbations must then have
the same bytes, and log.csv and results.json the same content except for times. Trainings write a
checkpoint after every minibatch, so that many kills fall into a write. With --results it continues
where it stopped.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from bench import show
from utils.cli import Parser, at_least, run_script
from utils.run import load_json, save_json

SRC = Path(__file__).resolve().parents[1] / "src"
CLOCKS = {"seconds", "images_per_s", "minutes", "commit"}  # what differs between two equal runs
STAGES = ("before anything was saved", "when a part was saved", "when the result was saved")
OFTEN = ("--checkpoint_minutes", 1e-9, "--resume")         # after every minibatch
COMMANDS = {  # name: a command, without its folder; eval_net and gcm take the network of free_at
    "train_sga": ("train_sga.py", "--model_name", "mlp", "--weights", "random", "--amp", "off",
                  "--num_images", 150, "--epochs", 4, *OFTEN),
    "free_at": ("free_at.py", "--model_name", "mlp", "--replays", 2, "--num_images", 700,
                "--epochs", 8, *OFTEN),
    "train_gcm": ("train_gcm.py", "--num_images", 100, "--batch_size", 25, "--epochs", 3,
                  "--workers", 0, *OFTEN),
    "gcm": ("gcm.py", "--model_name", "mlp", "--weights", "net/free2_mlp.pth", "--batch_size", 25,
            "--queries", 100),
    "eval_net": ("eval_net.py", "--runs", "net", "--batch_size", 25, "--queries", 300)}
NETWORK = ("free_at.py", "--model_name", "mlp", "--replays", 2, "--epochs", 8)


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--kills", type=at_least(1), default=20, help="trials of every command")
    add("--commands", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS),
        help="which commands")
    add("--seed", type=at_least(0), default=0, help="seed of the moments")
    add("--results", type=Path, help="JSON file to write, with .md and .csv beside it")
    return parser.parse_args()


def start(words, save, cwd):
    """The command in a process group of its own, which can be killed as a whole."""
    script, *flags = words
    return subprocess.Popen(
        [sys.executable, SRC / script, *map(str, flags), "--save", str(save)], cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    """Waits for the command. -> its stderr; RuntimeError unless it succeeded."""
    said = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"{process.args[1]}: exit status {process.returncode}: {said[-500:]}")
    return said


def moment_of_folder(process, folder):
    """Waits until the run's folder exists. -> the time"""
    while not (folder / ".lock").exists() and process.poll() is None:
        time.sleep(0.005)
    return time.monotonic()


def timeless(value):
    """JSON without clocks."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def outcome(folder):
    """{file: content without clocks}; checkpoints, pictures and tables by name only."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, content = str(path.relative_to(folder)), ""
        if path.name == "log.csv":
            with open(path, newline="") as file:
                content = [timeless(row) for row in csv.DictReader(file)]
        elif path.suffix == ".json":
            content = timeless(json.loads(path.read_text()))
        elif path.suffix == ".pth" and path.stem != "checkpoint":
            content = path.read_bytes()
        found[name] = content
    return found


def stage_of(folder):
    """The one of STAGES that a kill belongs to, by the files in the run's folder."""
    names = {path.name for path in folder.rglob("*") if not path.name.startswith(".")}
    results = {name for name in names if name.endswith((".md", ".pth"))} - {"checkpoint.pth"}
    if results:
        return STAGES[2]
    return STAGES[1 if names else 0]


def trial(words, cwd, whole, draw):
    """One kill and the restart; a run that ends before it is killed is repeated with another
    moment. -> {stage, differs: names of files}
    """
    folder, killed = cwd / "killed", False
    while not killed:
        shutil.rmtree(folder, ignore_errors=True)
        process = start(words, folder, cwd)
        began = moment_of_folder(process, folder)
        time.sleep(max(0.0, began + draw.uniform(0, whole["seconds"]) - time.monotonic()))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed = process.returncode == -signal.SIGKILL
    stage = stage_of(folder)
    finish(start(words, folder, cwd))
    found, wanted = outcome(folder), whole["outcome"]
    shutil.rmtree(folder)
    return {"stage": stage, "differs": sorted(
        name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))}


def undisturbed(words, cwd):
    """{seconds: from when its folder exists, outcome} of the command."""
    folder = cwd / "whole"
    process = start(words, folder, cwd)
    began = moment_of_folder(process, folder)
    finish(process)
    whole = {"seconds": time.monotonic() - began, "outcome": outcome(folder)}
    shutil.rmtree(folder)
    return whole


def table(done, seed, results):
    """Prints and writes the table of {name: [results of trial()]}."""
    lines = []
    for name, trials in done.items():
        stages = [one["stage"] for one in trials]
        lines.append([f"{name}.py", len(trials), *map(stages.count, STAGES),
                      sum(not one["differs"] for one in trials)])
    show(["command", "kills", *STAGES, "ended as the undisturbed run"], lines,
         f"kill -9 of the process group at random moments, seed {seed}; digits, one thread. The "
         "same bytes of networks and perturbations, the same log.csv and results.json but for "
         "times.", results, seed=seed, trials=done)


def main(args):
    done = {name: [] for name in args.commands}
    if args.results and args.results.is_file():
        done |= load_json(args.results)["trials"]
    with tempfile.TemporaryDirectory() as folder:
        cwd, whole = Path(folder), {}
        if {"gcm", "eval_net"} & set(args.commands):
            finish(start(NETWORK, "net", cwd))
        for k in tqdm(range(args.kills), unit="kill of each", disable=None):
            for name in args.commands:  # in turn, so that all have some if stopped
                if k < len(done[name]):
                    continue
                if name not in whole:
                    whole[name] = undisturbed(COMMANDS[name], cwd)
                draw = random.Random(f"{args.seed} {name} {k}")
                done[name].append(trial(COMMANDS[name], cwd, whole[name], draw))
                if args.results:
                    args.results.parent.mkdir(parents=True, exist_ok=True)
                    save_json(args.results, {"seed": args.seed, "trials": done})
    table(done, args.seed, args.results)


if __name__ == "__main__":
    run_script(get_args, main)
