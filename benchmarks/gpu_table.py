"""The other benchmarks' tables in one, with images/s and peak memory of evaluation.

    sh benchmarks/gpu.sh                                        # runs them all on a GPU
    PYTHONPATH=src python benchmarks/gpu_table.py --tables runs/gpu/sga.csv runs/gpu/pgd.csv

Evaluation: a network's predictions for pixels in CPU memory, in float32, as in eval_net.py. Not run
on a GPU.
"""

import csv
import statistics
import time
from pathlib import Path

import torch

from bench import show
from utils.cli import Parser, at_least, run_script
from utils.errors import UserError
from utils.measure import predictions
from utils.models import load_model
from utils.precision import measuring, synchronize
from utils.run import provenance, resolve_device


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tables", type=Path, nargs="*", default=[], help="CSV files of other benchmarks: a row "
        "becomes a line for each of its figures")
    add("--model_name", nargs="+", default=["resnet50"], help="networks that are evaluated")
    add("--num_images", type=at_least(1), default=2000, help="images of an evaluation")
    add("--image_size", type=at_least(8), default=224, help="side in pixels")
    add("--turns", type=at_least(1), default=3, help="evaluations; the median counts")
    parser.shared("batch_size", "device", batch_size={"default": 250, "help": "images at a time"})
    add("--results", type=Path, help="JSON file to write, with .csv and .md beside it")
    return parser.parse_args()


def lines_of(path):
    """Yields (what, measured, value) for each figure of a table; a row's texts are its `what`."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tables {path}: cannot be read ({error})") from None
    for row in rows:
        what = ", ".join(value for value in row.values() if value and not _begins_with_digit(value))
        for name, value in row.items():
            if value and _begins_with_digit(value):
                yield f"{path.stem}: {what}", name, value


def _begins_with_digit(text):
    return text[0].isdigit()


def evaluation(name, args, device):
    """Yields lines for images/s and peak memory of a network's predictions."""
    model = load_model(name, weights="random", device=device).eval()
    model = model.to(memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (args.num_images, 3, args.image_size, args.image_size),
                           dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    taken = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with measuring():
        for turn in range(args.turns + 1):
            synchronize(device)
            start = time.perf_counter()
            predictions([model], pixels, device, batch_size=args.batch_size)
            taken += [time.perf_counter() - start] * (turn > 0)  # the first one warms up
    yield f"evaluation: {name}", "images/s", f"{len(pixels) / statistics.median(taken):.1f}"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e6
        yield f"evaluation: {name}", "peak MB", f"{peak:.0f}"


def main(args):
    device = resolve_device(args.device)
    lines = [line for path in args.tables for line in lines_of(path)]
    for name in args.model_name:
        lines += evaluation(name, args, device)
    about = provenance(device)
    show(["what", "measured", "value"], lines,
         f"evaluation of {args.num_images} images of {args.image_size} pixels, batch size "
         f"{args.batch_size}, median of {args.turns}; {about['device']}, torch {about['torch']}, "
         f"commit {about['commit']}", args.results, about=about, measured=lines)


if __name__ == "__main__":
    run_script(get_args, main)
