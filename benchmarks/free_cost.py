"""Cost of a weight step: natural, free-m, pgd-K and fast compared with a plain loop of free-m.

    PYTHONPATH=src python benchmarks/free_cost.py --data_dir cifar10 --data_root DATA \\
        --model_name resnet_small

One process, in turns, the same network and images: seconds per weight step and per
epoch-equivalent (as many weight steps as natural training takes for one pass over all the training
images). Nothing else may run on the machine meanwhile. The plain loop works like published PyTorch
code of free training: images go through PIL and a DataLoader, the network is contiguous float32,
and loss and two accuracies are read back from the device at every replay. It also runs in our
layout and precisions, to separate their effect from the rest.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

import free_at
from bench import flags_of, show
from utils.cli import Parser, at_least, run_script
from utils.data import NAMED, load, open_images
from utils.errors import UserError
from utils.models import trainable
from utils.precision import LAYOUTS, synchronize, training
from utils.recipes import settle
from utils.run import make_generator, provenance, resolve_device
from utils.team import Team


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    parser.shared("data_dir", "data_root",
                  data_dir={"help": "small images: " + ", ".join(NAMED[:3])})
    add("--model_name", help="network; None: the data set's preset")
    add("--replays", type=at_least(1), default=8, help="m of free")
    add("--steps", type=at_least(1), default=7, help="K of pgd")
    add("--batch_size", type=at_least(2), default=128, help="images of a weight step")
    add("--minibatches", type=at_least(1), default=4, help="minibatches of a turn")
    add("--turns", type=at_least(1), default=3, help="turns of each loop; the median counts")
    add("--bf16", action="store_true", help="also time each of our loops in bf16")
    parser.shared("device", "workers", workers={
        "default": 2, "help": "processes that load images for the plain loop"})
    add("--results", type=Path, help="JSON file to write, with .csv and .md beside it")
    return parser.parse_args()


class Silent:
    """Replaces a progress bar, whose time would be measured too."""

    def update(self):
        pass


# ------------------------------------------------------- loops: () -> weight steps

def settings(args, method, amp, device):
    """-> free_at.py's settings for these flags, with a low learning rate, and its images"""
    words = {"method": method, "amp": amp, "guard": "off", "epochs": 10 ** 6, "workers": 0,
             "num_images": args.batch_size * args.minibatches,
             **{name: getattr(args, name) for name in ("data_dir", "data_root", "model_name",
                                                       "replays", "steps", "batch_size")}}
    s, images = settle(flags_of(free_at, *(
        word for name, value in words.items() if value is not None
        for word in (f"--{name}", value))), Team(), device)
    return replace(s, lr=s.lr / 100), images


def ours(s, images, device):
    """-> turn(): free_at.py's own training"""
    training = free_at.FreeTraining(s, images, Team(), device)

    def turn():
        before = training.done
        training.one_pass(Silent())
        return training.done - before
    return turn


class Pictures(torch.utils.data.Dataset):
    """The images as PIL images with a transform, as in torchvision's data sets."""

    def __init__(self, images):
        self.images = images
        crop = images.kind not in ("digits", "mnist")
        self.transform = v2.Compose([
            *([v2.RandomCrop(images.size, 4), v2.RandomHorizontalFlip()] if crop else []),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        pixels = self.images.pixels[i].permute(1, 2, 0).squeeze(2).numpy()
        return self.transform(Image.fromarray(pixels)), int(self.images.labels[i])


class Mean:
    """A running mean of Python numbers."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, value, n):
        self.total, self.count = self.total + value * n, self.count + n


def accuracies(logits, y, ks):
    """Top-k accuracies, in percent."""
    best = logits.topk(max(ks), 1).indices.t()
    right = best == y[None]
    return [right[:k].reshape(-1).float().sum() * (100 / len(y)) for k in ks]


def plain(s, images, device, workers, layout):
    """-> turn(): free-m written without regard to speed, in the precision of s"""
    model = trainable(s.model_name, kind=images.kind).to(device, memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay)
    loader = torch.utils.data.DataLoader(
        Pictures(images), s.batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda",
        generator=make_generator(s.seed))
    delta = torch.zeros((s.batch_size, images.channels, images.size, images.size), device=device)

    def turn():
        losses, top1, top5 = Mean(), Mean(), Mean()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            for _ in range(s.replays):
                noise = delta[:len(x)].clone().requires_grad_(True)
                with torch.autocast(device.type, torch.bfloat16, enabled=s.amp == "bf16"):
                    logits = model((x + noise).clamp(0, 1)).float()
                loss = F.cross_entropy(logits, y)
                one, five = accuracies(logits.detach(), y, (1, 5))
                for mean, value in ((losses, loss), (top1, one), (top5, five)):
                    mean.add(value.item(), len(x))
                optimizer.zero_grad()
                loss.backward()
                delta[:len(x)] += s.eps * noise.grad.sign()
                delta.clamp_(-s.eps, s.eps)
                optimizer.step()
        return len(loader) * s.replays
    return turn


# ------------------------------------------------------------------- measuring

def timed(turns, count, device):
    """{loop: seconds per weight step in each of `count` turns}, after an uncounted first turn."""
    seconds = {name: [] for name in turns}
    with tqdm(total=(count + 1) * len(turns), disable=None) as bar:
        for number in range(count + 1):
            for name, turn in turns.items():
                synchronize(device)
                start = time.perf_counter()
                steps = turn()
                synchronize(device)
                if number:
                    seconds[name].append((time.perf_counter() - start) / steps)
                bar.update()
    return seconds


HEAD = ["training", "ms per weight step", "range", "s per epoch-equivalent",
        "times natural, float32", "speed-up over the plain loop",
        "over the plain loop in our layout and precision"]


def line(name, seconds, free, epoch):
    """A line of the table for the loop `name`; epoch: weight steps per epoch; free: free-m."""
    median = {loop: statistics.median(values) for loop, values in seconds.items()}
    s, (loop, precision) = median[name], name.rsplit(", ", 1)
    slow = [f"plain loop of {free}, contiguous, float32",
            f"plain loop of {free}, channels_last, {precision}"]
    return [name, f"{1000 * s:.1f}", f"{1000 * min(seconds[name]):.1f}-"
            f"{1000 * max(seconds[name]):.1f}", f"{s * epoch:.1f}",
            f"{s / median['natural, float32']:.2f}",
            *(f"{median[other] / s:.2f}" if loop == free else "" for other in slow)]


def main(args):
    device = resolve_device(args.device)
    whole = open_images(args.data_dir, split="train", data_root=args.data_root)
    if whole.kind not in ("digits", "mnist", "cifar10"):
        raise UserError(f"--data_dir {args.data_dir}: wanted digits, mnist or cifar10")
    free, turns = f"free-{args.replays}", {}
    for amp, precision in (("off", "float32"), ("bf16", "bf16"))[:1 + args.bf16]:
        for name, method in (("natural", "natural"), (free, "free"), (f"pgd-{args.steps}", "pgd"),
                             ("fast", "fast")):
            s, images = settings(args, method, amp, device)
            images = load(images, workers=0)
            turns[f"{name}, {precision}"] = ours(s, images, device)
        for layout in ("contiguous", "channels_last")[amp == "bf16":]:
            turns[f"plain loop of {free}, {layout}, {precision}"] = plain(
                s, images, device, args.workers, layout)
    with training(device, deterministic=False):
        seconds = timed(turns, args.turns, device)
    run, epoch = provenance(device, deterministic=False), -(-len(whole) // args.batch_size)
    flags = {k: str(v) for k, v in vars(args).items()} | {"model_name": s.model_name}
    show(HEAD, [line(name, seconds, free, epoch) for name in seconds],
         f"{s.model_name}, {args.data_dir}, batch {args.batch_size}, {args.minibatches} "
         f"minibatches a turn, median of {args.turns} turns, {run['device']}, torch "
         f"{run['torch']}, {args.workers} loading processes for the plain loop, commit "
         f"{run['commit']}", args.results, args=flags, seconds_per_weight_step=seconds, **run)


if __name__ == "__main__":
    run_script(get_args, main)
