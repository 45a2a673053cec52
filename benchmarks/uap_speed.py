"""Speed and memory of SGA's inner step: four loops that take turns in one process.

    (a) ours       train_sga.sga_gradient
    (b) published  the step as the published code runs it: weights that require gradients, float32,
                   contiguous, one copy of delta per image and a gradient for each, then averaged;
                   clean labels recomputed every epoch (their share of the forward passes included)
    (c) alike      (b) in the precision and layout of (a), which cancels their effect
    (d) bare       forward and backward pass to the input, precision and layout of (a): the limit

With --loss feature only (a) and (d) run, both with one more forward pass without gradient, of the
clean images, as in a run with --augment.

    PYTHONPATH=src python benchmarks/uap_speed.py --model_name squeezenet1_0 vgg16 --weights random

Nothing else may run on the machine meanwhile. Images/s counts gradients of single images.
"""

import statistics
import time
from functools import lru_cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

from bench import show, times_as_fast
from train_sga import input_gradient, sga_gradient
from utils.attack.balls import cut
from utils.attack.universal import Features, clamped_ce, cosine_loss, feature_layer
from utils.cli import Parser, at_least, run_script
from utils.graphs import Graphed
from utils.models import input_size, load_model
from utils.precision import LAYOUTS, Fast, fastest, synchronize, to_layout, training
from utils.run import provenance, resolve_device

EPS, ALPHA, BETA, K = 10 / 255, 1 / 255, 9.0, 4
LOSS = partial(clamped_ce, beta=BETA)
OTHERS = ("published", "alike", "bare")


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_name", nargs="+", default=["squeezenet1_0", "vgg16"], help="networks")
    add("--loss", nargs="+", choices=("ce", "feature"), default=["ce", "feature"], help="losses")
    add("--weights", default="random", help="random, or a folder of NAME.pth")
    add("--image_size", type=at_least(32), help="side in pixels; None: the network's own")
    add("--minibatch", type=at_least(1), default=10, help="images of an inner step")
    add("--steps", type=at_least(1), default=4, help="inner steps a turn")
    add("--rounds", type=at_least(1), default=5, help="turns of each; the median counts")
    add("--layout", choices=("auto", *LAYOUTS), default="auto", help="memory layout of (a), (c), "
        "(d); auto: the faster by timing")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--results", type=Path, help="JSON file to write, with .csv and .md beside it")
    return parser.parse_args()


@lru_cache(maxsize=1)
def gradient_of(fast):
    """gradient(x, delta, y) as train_sga.py computes it, on a GPU as one graph."""
    loss = cosine_loss if isinstance(fast, Features) else LOSS
    gradient = partial(input_gradient, [fast], loss=loss)
    return Graphed(gradient) if next(fast.parameters()).is_cuda else gradient


def ours(fast, x, y, delta, draws):
    wanted = [None] if isinstance(fast, Features) else y[None]
    return sga_gradient(gradient_of(fast), x, wanted, delta, draws, eps=EPS, alpha=ALPHA)[1]


def plain(model, x, y, delta, draws):
    with torch.no_grad():  # clean labels: an epoch needs one per K gradients
        y[:len(draws) * len(draws[0]) // K] = model(
            x[:len(draws) * len(draws[0]) // K]).argmax(1)
    inner, gradients = delta.clone(), []
    for index in draws:
        batch_delta = inner.repeat(len(index), 1, 1, 1).requires_grad_()
        loss = clamped_ce(model(cut(x[index] + batch_delta)), y[index], BETA)
        loss.backward()
        g = batch_delta.grad.mean(0, keepdim=True)
        gradients.append(g)
        inner = (inner + ALPHA * g.sign()).clamp(-EPS, EPS)
    model.zero_grad()
    return torch.stack(gradients).mean(0)


def bare(fast, x, y, delta, draws):
    batch, labels = x[draws[0]].clone(), y[draws[0]]
    for _ in draws:
        batch.requires_grad_()
        loss = clamped_ce(fast(batch), labels, BETA)
        torch.autograd.grad(loss, batch)
        batch = batch.detach()


def bare_features(features, x, y, delta, draws):
    batch = x[draws[0]].clone()
    for _ in draws:
        with torch.no_grad():
            clean = features(batch)
        batch.requires_grad_()
        torch.autograd.grad((features(batch) * clean).sum(), batch)
        batch = batch.detach()


def memory(device, reset=False):
    """Peak memory in MB since the last reset: of tensors on CUDA, of the process on Linux."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def loops(model, x, amp, loss, args):
    """-> {loop: () -> its gradient or None}, the layout of all but (b)"""
    generator = torch.Generator().manual_seed(0)
    y, delta = model(x[:1]).argmax(1).repeat(len(x)), torch.zeros_like(x[:1])
    draws = torch.stack([torch.randperm(len(x), generator=generator)[:args.minibatch]
                         for _ in range(args.steps)]).to(x.device)
    step = partial(input_gradient, delta=delta, y=y[None, :args.minibatch], loss=LOSS)
    _, layout = fastest([model], step, x[:args.minibatch], amp=amp, layout=args.layout)
    fast, alike = Fast(model, amp, layout), Fast(model, amp, layout).requires_grad_()
    published = Fast(model, "off", "contiguous").requires_grad_()
    laid, laid_delta = to_layout(x, layout), to_layout(delta, layout)
    if loss == "feature":
        features = Features(fast, f"model.1.{feature_layer(model[1], x[:2])}")
        return {"ours": partial(ours, features, laid, y, laid_delta, draws),
                "bare": partial(bare_features, features, laid, y, laid_delta, draws)}, layout
    return {"ours": partial(ours, fast, laid, y, laid_delta, draws),
            "published": partial(plain, published, x, y, delta, draws),
            "alike": partial(plain, alike, laid, y, laid_delta, draws),
            "bare": partial(bare, fast, laid, y, laid_delta, draws)}, layout


def measure(name, amp, loss, args, device):
    """A row: images/s of the loops, median ratios of their turns, precision, layout, peak MB."""
    model = load_model(name, weights=args.weights, device=device)
    size = args.image_size or input_size(name, "imagenet", None, args.weights)
    x = torch.rand((max(50, args.minibatch), 3, size, size),
                   generator=torch.Generator().manual_seed(0)).to(device)
    runs, layout = loops(model, x, amp, loss, args)
    seconds, peak = {key: [] for key in runs}, {}
    for turn in tqdm(range(args.rounds + 1), desc=f"{name} {amp}", leave=False, disable=None):
        for key, work in runs.items():
            memory(device, reset=True)
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if turn:  # the first one warms up
                seconds[key].append(time.perf_counter() - start)
            peak[key] = max(peak.get(key, 0), memory(device))  # replays of a graph allocate nothing
    return {"model": name if loss == "ce" else f"{name}, {loss}",
            "precision": "float32" if amp == "off" else amp, "layout": layout,
            "images_per_s": {key: args.steps * args.minibatch / statistics.median(taken)
                             for key, taken in seconds.items()},
            "ratios": {key: times_as_fast(seconds["ours"], taken)
                       for key, taken in seconds.items() if key != "ours"}, "peak_mb": peak}


def cell(values, key, form):
    return format(values[key], form) if key in values else "-"


def main(args):
    device = resolve_device(args.device)
    with training(device, deterministic=False):
        rows = [measure(name, amp, loss, args, device) for name in args.model_name
                for loss in args.loss for amp in ("off", "bf16")]
    head = ["model", "precision, layout", "(a) ours, img/s", "(b) published, img/s",
            "(c) alike, img/s", "(d) bare, img/s", "(a)/(b)", "(a)/(c)", "(a)/(d)", "peak MB a",
            "peak MB b"]
    about = {"minibatch": args.minibatch, "rounds": args.rounds, "steps": args.steps,
             **provenance(device, deterministic=False)}
    show(head, [[row["model"], f"{row['precision']}, {row['layout']}",
                 *(cell(row["images_per_s"], key, ".1f") for key in ("ours", *OTHERS)),
                 *(cell(row["ratios"], key, ".2f") for key in OTHERS),
                 *(cell(row["peak_mb"], key, ".0f") for key in ("ours", "published"))]
                for row in rows],
         f"minibatch {args.minibatch}, median of {args.rounds} turns of {args.steps} steps; "
         f"{about['device']}, torch {about['torch']}, commit {about['commit']}", args.results,
         about=about, rows=rows)


if __name__ == "__main__":
    run_script(get_args, main)
