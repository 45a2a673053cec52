"""What a weight step costs: natural, free-m, pgd-K and fast beside a plain loop of free-m.

    PYTHONPATH=src python benchmarks/free_cost.py --data_dir cifar10 --data_root DATA \\
        --model_name resnet_small

One process, in turns, the same network and images: seconds per weight step and per
epoch-equivalent (as many weight steps as natural training takes for one pass over all the training
images). Nothing else may run on the machine meanwhile. The plain loop runs as published PyTorch
code of free training does: images through PIL and a DataLoader, contiguous float32, loss and two
accuracies asked of the device at every replay, their running means kept in Python.
"""

import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from free_at import PRESETS, Training
from utils.data import NAMED, load, open_images
from utils.metrics import markdown
from utils.models import check_name, input_size, trainable
from utils.precision import synchronize
from utils.run import (
    Parser,
    Team,
    UserError,
    at_least,
    provenance,
    resolve_device,
    run_script,
    save_json,
)


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", default="digits", help="small images: " + ", ".join(NAMED[:3]))
    add("--data_root", default="data", help="where named data sets are kept or downloaded to")
    add("--model_name", help="network; None: the data set's preset")
    add("--replays", type=at_least(1), default=8, help="m of free")
    add("--steps", type=at_least(1), default=7, help="K of pgd")
    add("--batch_size", type=at_least(1), default=128, help="images of a weight step")
    add("--minibatches", type=at_least(1), default=4, help="minibatches of a turn")
    add("--turns", type=at_least(1), default=3, help="turns of each loop; the median counts")
    add("--bf16", action="store_true", help="also every loop of ours in bf16")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where")
    add("--workers", type=at_least(0), default=2, help="processes that load for the plain loop")
    add("--results", type=Path, help="JSON file to write")
    return parser.parse_args()


class Silent:
    """In the place of a progress bar, which would be measured too."""

    def update(self):
        pass


# ------------------------------------------------------- loops: () -> weight steps

def ours(images, args, device, method, amp):
    """A turn of free_at.py's own training."""
    eps, alpha, _, _, _, lr, decay = PRESETS[images.kind]
    alpha = {"free": eps, "fast": 1.25 * eps}.get(method, alpha)
    training = Training(SimpleNamespace(
        method=method, amp=amp, eps=eps, alpha=alpha, replays=args.replays, steps=args.steps,
        model_name=args.model_name, pretrained="random", seed=0, batch_size=args.batch_size,
        lr=lr / 100, momentum=0.9, weight_decay=decay, schedule="step", epochs=10 ** 6,
        image_size=images.size, augment="auto", workers=0), images, Team(), device)

    def turn():
        before = training.done
        training.net.train()
        training.run_epoch(Silent())
        return training.done - before
    return turn


class Pictures(torch.utils.data.Dataset):
    """The images as PIL images with a transform, as torchvision's data sets hand them out."""

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


def plain(images, args, device):
    """A turn of free-m written the straight way: read back and count at every replay."""
    eps, _, _, _, _, lr, decay = PRESETS[images.kind]
    model = trainable(args.model_name, kind=images.kind).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr / 100, 0.9, weight_decay=decay)
    loader = torch.utils.data.DataLoader(
        Pictures(images), args.batch_size, shuffle=True, num_workers=args.workers,
        persistent_workers=args.workers > 0, pin_memory=device.type == "cuda")
    delta = torch.zeros((args.batch_size, images.channels, images.size, images.size),
                        device=device)

    def turn():
        losses, top1, top5 = Mean(), Mean(), Mean()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            for _ in range(args.replays):
                noise = delta[:len(x)].clone().requires_grad_(True)
                logits = model((x + noise).clamp(0, 1))
                loss = F.cross_entropy(logits, y)
                one, five = accuracies(logits.detach(), y, (1, 5))
                for mean, value in ((losses, loss), (top1, one), (top5, five)):
                    mean.add(value.item(), len(x))
                optimizer.zero_grad()
                loss.backward()
                delta[:len(x)] += eps * noise.grad.sign()
                delta.clamp_(-eps, eps)
                optimizer.step()
        return len(loader) * args.replays
    return turn


# ------------------------------------------------------------------- measuring

def timed(turns, args, device):
    """{loop: seconds of a weight step in every turn}; a first turn of each does not count."""
    seconds = {name: [] for name in turns}
    with tqdm(total=(args.turns + 1) * len(turns), disable=None) as bar:
        for number in range(args.turns + 1):
            for name, turn in turns.items():
                synchronize(device)
                start = time.perf_counter()
                steps = turn()
                synchronize(device)
                if number:
                    seconds[name].append((time.perf_counter() - start) / steps)
                bar.update()
    return seconds


def main(args):
    device = resolve_device(args.device)
    images = open_images(args.data_dir, split="train", data_root=args.data_root)
    if images.kind not in ("digits", "mnist", "cifar10"):
        raise UserError(f"--data_dir {args.data_dir}: wanted digits, mnist or cifar10")
    args.model_name = args.model_name or PRESETS[images.kind][2]
    check_name(args.model_name, images.kind)
    size = input_size(args.model_name, images.kind, images.size, "random")
    whole, images = len(images), load(images.prepared(
        size, args.batch_size * args.minibatches), workers=0)
    free, pgd = f"free-{args.replays}", f"pgd-{args.steps}"
    turns = {}
    for amp in ("off", "bf16")[:1 + args.bf16]:
        for name, method in (("natural", "natural"), (free, "free"), (pgd, "pgd"),
                             ("fast", "fast")):
            turns[f"{name}, {'float32' if amp == 'off' else amp}"] = ours(
                images, args, device, method, amp)
    turns[f"plain loop of {free}, float32"] = plain(images, args, device)
    seconds = timed(turns, args, device)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    natural, slow = median["natural, float32"], median[f"plain loop of {free}, float32"]
    epoch = -(-whole // args.batch_size)
    lines = [[name, f"{1000 * s:.1f}", f"{1000 * min(seconds[name]):.1f}-"
              f"{1000 * max(seconds[name]):.1f}", f"{s * epoch:.1f}", f"{s / natural:.2f}",
              f"{slow / s:.2f}" if name.startswith(free) else ""] for name, s in median.items()]
    run = provenance(device)
    print(f"{args.model_name}, {args.data_dir}, batch {args.batch_size}, "
          f"{args.minibatches} minibatches a turn, median of {args.turns} turns, {run['device']}, "
          f"torch {run['torch']}, {args.workers} loading processes for the plain loop\n")
    print(markdown(["training", "ms per weight step", "range", "s per epoch-equivalent",
                    "over natural", "times as fast as the plain loop"], lines), end="")
    if args.results:
        save_json(args.results, {"args": {k: str(v) for k, v in vars(args).items()},
                                 "seconds_per_weight_step": seconds, **run})


if __name__ == "__main__":
    run_script(get_args, main)
