"""Speed and memory of the inner step of SGA, three implementations that take turns in one process.

    (a) ours      train_sga.sga_gradient
    (b) plain     the step as the published code runs it: weights that require gradients, float32,
                  contiguous, one copy of delta per image and a gradient for each, then averaged;
                  clean labels recomputed every epoch (their share of the forward passes included)
    (c) bare      forward and backward pass to the input, precision and layout of (a): the limit

    PYTHONPATH=src python benchmarks/uap_speed.py --model_name squeezenet1_0 vgg16 --weights random

Nothing else may run on the machine meanwhile. Images/s count gradients of one image.
"""

import copy
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from train_sga import clamped_ce, input_gradient, sga_gradient
from utils.cli import Parser, at_least, run_script
from utils.models import input_size, load_model
from utils.precision import Fast, fastest, synchronize, to_layout
from utils.report import markdown
from utils.run import provenance, resolve_device, save_json

EPS, ALPHA, BETA, K = 10 / 255, 1 / 255, 9.0, 4
LOSS = partial(clamped_ce, beta=BETA)


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_name", nargs="+", default=["squeezenet1_0", "vgg16"], help="networks")
    add("--weights", default="random", help="random, or a folder of NAME.pth")
    add("--minibatch", type=at_least(1), default=10, help="images of an inner step")
    add("--steps", type=at_least(1), default=4, help="inner steps a turn")
    add("--rounds", type=at_least(1), default=5, help="turns of each; the median counts")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where")
    add("--results", type=Path, help="JSON file to write")
    return parser.parse_args()


def ours(fast, x, y, delta, draws):
    gradient = partial(input_gradient, [fast], loss=LOSS)
    return sga_gradient(gradient, x, y[None], delta, draws, eps=EPS, alpha=ALPHA)[1]


def plain(model, x, y, delta, draws):
    with torch.no_grad():  # the clean labels, of which an epoch needs one for K gradients
        y[:len(draws) * len(draws[0]) // K] = model(
            x[:len(draws) * len(draws[0]) // K]).argmax(1)
    inner, gradients = delta.clone(), []
    for index in draws:
        batch_delta = inner.repeat(len(index), 1, 1, 1).requires_grad_()
        loss = clamped_ce(model((x[index] + batch_delta).clamp(0, 1)), y[index], BETA)
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


def memory(device, reset=False):
    """Peak memory since the last reset in MB: of tensors on CUDA, of the process on Linux."""
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


def measure(name, amp, args, device):
    """A row: images/s of the three, medians of the ratios of their turns, precision and layout."""
    model = load_model(name, weights=args.weights, device=device)
    size = input_size(name, "imagenet", None, args.weights)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((max(50, args.minibatch), 3, size, size), generator=generator).to(device)
    y = model(x[:1]).argmax(1).repeat(len(x))
    delta = torch.zeros((1, 3, size, size), device=device)
    draws = torch.stack([torch.randperm(len(x), generator=generator)[:args.minibatch]
                         for _ in range(args.steps)]).to(device)
    step = partial(input_gradient, delta=delta, y=y[None, :args.minibatch], loss=LOSS)
    _, layout = fastest([model], step, x[:args.minibatch], amp=amp)
    fast, trainable = Fast(model, amp, layout), copy.deepcopy(model).requires_grad_()
    laid, laid_delta = to_layout(x, layout), to_layout(delta, layout)
    runs = {"ours": lambda: ours(fast, laid, y, laid_delta, draws),
            "plain": lambda: plain(trainable, x, y, delta, draws),
            "bare": lambda: bare(fast, laid, y, laid_delta, draws)}
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
            peak[key] = memory(device)
    per_s = {key: args.steps * args.minibatch / statistics.median(s) for key, s in seconds.items()}

    def ratio(other):
        return statistics.median(b / a for a, b in zip(seconds["ours"], seconds[other],
                                                       strict=True))
    return {"model": name, "precision": "float32" if amp == "off" else amp, "layout": layout,
            "images_per_s": per_s, "ours/plain": ratio("plain"), "ours/bare": ratio("bare"),
            "peak_mb": peak}


def main(args):
    device = resolve_device(args.device)
    rows = [measure(name, amp, args, device) for name in args.model_name
            for amp in ("off", "bf16")]
    head = ["model", "precision, layout", "(a) ours, img/s", "(b) plain, img/s", "(c) bare, img/s",
            "(a)/(b)", "(a)/(c)", "peak MB a", "peak MB b"]
    print(markdown(head, [[
        row["model"], f"{row['precision']}, {row['layout']}",
        *(f"{row['images_per_s'][key]:.1f}" for key in ("ours", "plain", "bare")),
        f"{row['ours/plain']:.2f}", f"{row['ours/bare']:.2f}",
        *(f"{row['peak_mb'][key]:.0f}" for key in ("ours", "plain"))] for row in rows]), end="")
    about = {"minibatch": args.minibatch, "rounds": args.rounds, "steps": args.steps,
             **provenance(device)}
    print(f"minibatch {args.minibatch}, median of {args.rounds} turns of {args.steps} steps; "
          f"{about['device']}, torch {about['torch']}, commit {about['commit']}")
    if args.results:
        save_json(args.results, {"about": about, "rows": rows})


if __name__ == "__main__":
    run_script(get_args, main)
