"""Random numbers per second: utils/attack/chance.py compared with a torch.Generator per image.

    old     a CPU generator for each image, in a loop, then copied to the device
    new     Philox in tensor arithmetic, for all images at once, on the device

    PYTHONPATH=src python benchmarks/chance_speed.py
    PYTHONPATH=src python benchmarks/chance_speed.py --device cuda --batch_size 250

Times random starts of PGD in the three norms, and Square's draws, in turns; the median counts.
"""

import statistics
import time
from pathlib import Path

import torch

from bench import show
from utils.attack.balls import random_point
from utils.attack.chance import Chance
from utils.cli import Parser, at_least, run_script
from utils.precision import synchronize
from utils.run import resolve_device


def get_args():
    parser = Parser("Time the random numbers of attacks, old and new.")
    add = parser.add_argument
    add("--batch_size", type=at_least(1), default=50, help="images at a time")
    add("--image_size", type=at_least(1), default=224, help="side in pixels")
    add("--queries", type=at_least(1), default=1000, help="queries of Square")
    add("--turns", type=at_least(1), default=5, help="timings of each; the median counts")
    add("--threads", type=at_least(1), help="CPU threads; None: as torch chooses")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--results", type=Path, help="JSON file to write, with .csv and .md beside it")
    return parser.parse_args()


def old_point(shape, norm, g):
    """A random point of the unit ball, drawn from the generator g."""
    if norm == "linf":
        return 2 * torch.rand(shape, generator=g) - 1
    if norm == "l2":
        z = torch.randn(shape, generator=g)
        return torch.rand((), generator=g) ** (1 / z.numel()) * z / z.norm()
    sign = 2.0 * torch.randint(2, shape, generator=g) - 1
    share = torch.empty(sign.numel() + 1).exponential_(generator=g)
    return sign * (share[:-1] / share.sum()).view(shape)


def works_of(args, device):
    """{(what, old or new): (numbers per image, function)}"""
    x = torch.zeros((args.batch_size, 3, args.image_size, args.image_size), device=device)
    own, shape = Chance(0, torch.arange(len(x), device=device)), (args.queries, 8)

    def old(make):
        return torch.stack([make(torch.Generator().manual_seed(i)) for i in range(len(x))]).to(x)
    found = {}
    for norm in ("linf", "l2", "l1"):
        count = x[0].numel()
        found[f"start, {norm}", "old"] = (
            count, lambda norm=norm: old(lambda g: old_point(x.shape[1:], norm, g)))
        found[f"start, {norm}", "new"] = count, lambda norm=norm: random_point(x, 1.0, norm, own)
    what, count = f"Square, {args.queries} queries", args.queries * 8
    found[what, "old"] = count, lambda: old(lambda g: torch.rand(shape, generator=g))
    found[what, "new"] = count, lambda: own.uniform(*shape)
    return found


def medians(works, turns, device):
    """{key: median seconds}, timed in turns; the first turn does not count."""
    taken = {key: [] for key in works}
    for turn in range(turns + 1):
        for key, (_, work) in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            taken[key] += [time.perf_counter() - start] * (turn > 0)
    return {key: statistics.median(times) for key, times in taken.items()}


def main(args):
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    works, lines = works_of(args, device), []
    seconds = medians(works, args.turns, device)
    for (what, which), (count, _) in works.items():
        spent = seconds[what, which]
        lines.append([what, which, f"{1000 * spent / args.batch_size:.3f}",
                      f"{args.batch_size * count / spent / 1e6:.1f}",
                      f"{seconds[what, 'old'] / spent:.2f}"])
    show(["numbers", "which", "ms per image", "million numbers/s", "times as fast as old"], lines,
         f"{args.batch_size} images of {args.image_size} pixels, median of {args.turns}, "
         f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}",
         args.results, seconds={" ".join(key): value for key, value in seconds.items()})


if __name__ == "__main__":
    run_script(get_args, main)
