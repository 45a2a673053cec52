"""Evaluation at scale: images/s of several processes, peak memory by number of images, --cache.

    PYTHONPATH=src python benchmarks/scale_cost.py
    PYTHONPATH=src python benchmarks/scale_cost.py --measure memory --sizes 500 5000

Runs eval_uap.py, eval_net.py and gcm.py unchanged, on links to a few JPEG files made here, with one
CPU thread per process. Memory is the anonymous memory of a command plus its decoders, sampled 20
times a second; mapped files, which the system can reclaim, do not count. Linux. Images/s comes from
the extra time that twice as many photographs take. Waits of a step: tests/test_no_waiting.py.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from PIL import Image

import free_at
from bench import flags_of, show
from utils.cli import Parser, at_least, run_script
from utils.data import wnids
from utils.errors import UserError
from utils.run import save_pth

SRC = Path(__file__).resolve().parents[1] / "src"
PICTURES = 20  # distinct files; all others are links to them


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--measure", nargs="+", choices=tuple(MEASURES), default=list(MEASURES), help="quantities")
    add("--sizes", type=at_least(10), nargs="+", default=[500, 5000, 50_000], help="numbers of "
        "small images for which memory is measured")
    add("--image_size", type=at_least(16), default=32, help="their side in pixels")
    add("--photographs", type=at_least(10), default=300, help="number of them for speed, "
        "at 224 pixels: the extra time of twice as many")
    add("--model_name", default="squeezenet1_1", help="network that classifies the photographs")
    add("--processes", type=at_least(1), nargs="+", default=[1, 2], help="numbers of processes")
    add("--results", type=Path, help="JSON file to write, with .csv and .md beside it")
    return parser.parse_args()


def make_images(folder, classes, n, size):
    """n JPEG files, evenly over the class folders."""
    folder.mkdir()
    made = []
    for k in range(PICTURES):
        made.append(folder.parent / f"{folder.name}{k}.jpg")
        Image.effect_noise(size, 20 + 4 * k).convert("RGB").save(made[-1])
    for name in classes:
        (folder / name).mkdir()
    for i in range(n):
        os.link(made[i % PICTURES], folder / classes[i % len(classes)] / f"{i:06d}.jpg")


def anonymous(pid):
    """MB of anonymous memory of a process and its children."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        own = next((int(line.split()[1]) for line in status if line.startswith("RssAnon")), 0)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # the process has ended
        return 0.0
    return own / 1e3 + sum(map(anonymous, children))


def run(folder, script, *flags, processes=1):
    """Runs a command. -> seconds, peak MB; UserError if it failed."""
    start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone",
                                       "--nproc_per_node", processes]
    command = [sys.executable, *start, SRC / script, *flags]
    began, peak = time.perf_counter(), 0.0
    with open(folder / "said.txt", "w+") as said:
        running = subprocess.Popen(
            list(map(str, command)), cwd=folder, stdout=said, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        while running.poll() is None:
            peak = max(peak, anonymous(running.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        if running.returncode:
            said.seek(0)
            raise UserError(f"{script}: {(said.read().splitlines() or ['no output'])[-1]}")
    return seconds, peak


def memory(folder, args):
    """Yields lines of peak memory, by command and number of images."""
    make_images(folder / "train", "abcdefghij", 20, (40, 40))
    make_images(folder / "small", "abcdefghij", max(args.sizes), (40, 40))
    with redirect_stdout(sys.stderr):
        free_at.main(flags_of(
            free_at, "--data_dir", folder / "train", "--method", "natural", "--model_name",
            "cnn_bn", "--image_size", args.image_size, "--batch_size", 10, "--epochs", 1,
            "--workers", 0, "--device", "cpu", "--save", folder / "net"))
    weights = next((folder / "net").glob("*_cnn_bn.pth"))
    save_pth(folder / "uap.pth", torch.full((3, args.image_size, args.image_size), 0.01))
    network = ("--data_dir", "small", "--workers", 1, "--model_name", "cnn_bn", "--weights",
               weights, "--device", "cpu")
    commands = {
        "eval_uap.py": (*network, "--uaps", "uap.pth", "--show", 0),
        "eval_net.py": (*network, "--attacks", "fgsm"),
        "gcm.py": (*network, "--attacks", "fgsm")}
    for script, flags in commands.items():
        for n in args.sizes:
            seconds, peak = run(folder, script, *flags, "--num_images", n, "--save",
                                f"{script}{n}")
            yield f"{script}, {n} images", "peak anonymous memory, MB", f"{peak:.0f}"
            yield f"{script}, {n} images", "seconds", f"{seconds:.0f}"


def photographs(folder, args):
    """Flags of a command that classifies 2 * --photographs photographs, which are made here."""
    if not (folder / "photos").exists():
        make_images(folder / "photos", sorted(wnids())[:10], 2 * args.photographs, (500, 375))
    return ("--data_dir", "photos", "--model_name", args.model_name, "--weights", "random",
            "--attacks", "none", "--device", "cpu")


def processes(folder, args):
    """Yields lines of images/s by number of processes."""
    n, flags = args.photographs, photographs(folder, args)
    for count in args.processes:
        few, many = (run(folder, "eval_net.py", *flags, "--workers", 0, "--batch_size", 25,
                         "--num_images", k, "--save", f"by{count}of{k}", processes=count)[0]
                     for k in (n, 2 * n))
        yield (f"eval_net.py, {args.model_name}, processes: {count}", "images/s",
               f"{n / max(many - few, 1e-9):.1f}")


def cache(folder, args):
    """Yields lines of seconds with and without --cache."""
    n, flags = args.photographs, photographs(folder, args)
    for name, more in {"without --cache": (), "first with --cache": ("--cache", "cache"),
                       "second with --cache": ("--cache", "cache")}.items():
        seconds, _ = run(folder, "eval_net.py", *flags, "--workers", 1, *more, "--save", name)
        yield f"eval_net.py, {2 * n} photographs, {name}", "seconds", f"{seconds:.1f}"


MEASURES = {"memory": memory, "processes": processes, "cache": cache}


def main(args):
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.measure:
            for line in MEASURES[name](Path(folder), args):
                print(*line, file=sys.stderr, flush=True)
                lines.append(line)
    note = (f"small images of {args.image_size} pixels, cnn_bn, batch size 50 (eval_net.py: 250); "
            f"one thread a process, one decoding process; torch {torch.__version__}")
    show(["command", "measured", "value"], lines, note, args.results, measured=lines)


if __name__ == "__main__":
    run_script(get_args, main)
