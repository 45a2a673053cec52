"""AutoAttack, ours and pyautoattack's, on small networks trained against each norm.

    pip install pyautoattack==0.2.0
    PYTHONPATH=src python benchmarks/autoattack.py                       # digits, three networks
    PYTHONPATH=src python benchmarks/autoattack.py --norms l1 --seeds 3
    PYTHONPATH=src python benchmarks/autoattack.py --data_dir sample/val --num_images 30 \\
        --model_name squeezenet1_0 --weights V1 --norms linf --eps 4/255   # not trained here

Each network of --model_name is trained on --data_dir against PGD in the norm, and 200 test images
are attacked at the training radius; with --weights it is not trained. Both sides attack the same
network, in one batch; what they return is classified again. One row per network, norm and seed.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from attack_others import installed, positive
from attacks import autoattack, pgd
from bench import show
from utils.attack.balls import norm_of
from utils.cli import Parser, at_least, run_script
from utils.data import load, open_images, to_float
from utils.errors import UserError
from utils.models import freeze, input_size, load_model
from utils.run import make_generator, provenance, resolve_device

EPS = {"linf": 0.12, "l2": 1.5, "l1": 12.0}  # on digits
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", default="digits", help="data set by name, or class folders with --weights")
    add("--model_name", nargs="+", default=["mlp"], help="networks")
    add("--weights", help="V1, a folder of NAME.pth, or the path of a state dict; None: "
        "networks of ours, trained here")
    add("--norms", nargs="+", choices=list(EPS), default=list(EPS), help="one network for each")
    add("--eps", nargs="+", type=positive, help="radius of each of the norms; None: 0.12, 1.5, 12")
    add("--epochs", type=at_least(0), default=15, help="epochs of training against PGD, 10 steps")
    add("--num_images", type=at_least(1), default=200, help="test images, evenly over the classes")
    add("--seeds", type=at_least(1), default=1, help="runs of each side")
    add("--version", choices=("standard", "plus", "rand"), default="standard", help="variant")
    add("--results", type=Path, help="JSON file to write, with .csv and .md beside it")
    return parser.parse_args()


def trained(name, images, norm, eps, epochs):
    """The network after PGD training (Madry et al., 1706.06083) on all images, in memory."""
    torch.manual_seed(0)
    model = load_model(name, weights="random", kind=images.kind, data_dir=images.kind)
    g = make_generator(0)
    model.requires_grad_(True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=g).split(64):
            x, y = to_float(images.pixels[index]), images.labels[index]
            x = pgd(model, x, y, norm=norm, eps=eps, alpha=eps / 4, steps=10, generator=g)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return freeze(model)


def attacked(name, test, norm, eps, args):
    """The network to attack: with --weights, or trained here."""
    if args.weights:
        return load_model(name, weights=args.weights, kind=test.kind, data_dir=args.data_dir)
    return trained(name, open_images(args.data_dir, split="train"), norm, eps, args.epochs)


@dataclass
class Found:
    """What one side returned, measured again."""
    robust: torch.Tensor  # (N,) bool
    largest: float
    seconds: float

    @classmethod
    def of(cls, attack, model, x, y, norm):
        start = time.perf_counter()
        x_adv = attack()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            return cls(model(x_adv).argmax(1) == y, norm_of(x_adv - x, norm).max().item(), seconds)


def theirs(model, x, y, norm, eps, version, seed):
    from pyautoattack.autoattack import AutoAttack

    with torch.random.fork_rng():
        attack = AutoAttack(model, norm=THEIRS[norm], eps=eps, version=version, seed=seed)
        return attack.run_standard_evaluation(x, y, batch_size=len(x))[0]


def row_of(name, model, x, y, norm, eps, seed, args):
    """A line of the table."""
    report = {}
    ours = Found.of(lambda: autoattack(model, x, y, norm=norm, eps=eps, version=args.version,
                                       generator=make_generator(seed), report=report),
                    model, x, y, norm)
    other = Found.of(lambda: theirs(model, x, y, norm, eps, args.version, seed), model, x, y, norm)
    with torch.no_grad():
        right = int((model(x).argmax(1) == y).sum())
    fooled = ", ".join(f"{name} {one['fooled']}" for name, one in report.items()
                       if isinstance(one, dict))
    return [name, norm, f"{eps:.4g}", seed, len(x), right, int(ours.robust.sum()),
            int(other.robust.sum()), int((ours.robust != other.robust).sum()), fooled,
            "; ".join(report["flags"]) or "-", f"{ours.largest:.6g}", f"{other.largest:.6g}",
            f"{ours.seconds:.0f}", f"{other.seconds:.0f}"]


def main(args):
    if "pyautoattack" not in installed():
        raise UserError("pyautoattack is not installed; type pip install pyautoattack==0.2.0")
    radii = dict(zip(args.norms, args.eps or [EPS[norm] for norm in args.norms], strict=False))
    if len(radii) < len(args.norms):
        raise UserError(f"--eps {' '.join(map(str, args.eps))}: wanted {len(args.norms)} radii")
    lines, bar = [], tqdm(total=len(args.model_name) * len(radii) * args.seeds, unit="pair",
                          desc="AutoAttack, ours and theirs", disable=None)
    for name in args.model_name:
        test = open_images(args.data_dir, split="test")
        test = load(test.prepared(input_size(name, test.kind, test.size, args.weights or "random"),
                                  args.num_images), workers=0)
        x, y = to_float(test.pixels), test.labels
        for norm, eps in radii.items():
            model = attacked(name, test, norm, eps, args)
            for seed in range(args.seeds):
                lines.append(row_of(name, model, x, y, norm, eps, seed, args))
                bar.update()
    bar.close()
    about = provenance(resolve_device("cpu"))
    head = ["network", "norm", "eps", "seed", "n", "right", "robust, ours", "robust, pyautoattack",
            "images that differ", "fooled by ours", "flags", "largest norm", "theirs", "s",
            "s, theirs"]
    show(head, lines, f"{args.data_dir}, {args.version}; CPU, "
         f"{torch.get_num_threads()} threads, torch {about['torch']}, commit {about['commit']}",
         args.results, rows=lines, about=about)


if __name__ == "__main__":
    run_script(get_args, main)
