"""Speed of attacks compared with other libraries, in one process, alternating.

    ours         on a copy of the network in the layout that is faster here: float32 and bf16, each
                 also with fooled images leaving the batch (stop early; C&W: abort_early)
    the others   torchattacks 3.5.1, foolbox 3.3.4, ART 1.20.1 and for C&W adv-lib 0.2.8, on the
                 frozen float32 network itself; those not installed are left out (attack_others.py)

    PYTHONPATH=src python benchmarks/attack_speed.py \\
        --data_dir ../shared/data/imagenet_sample/val --weights ../shared/data/weights

Nothing else may run on the machine meanwhile. Every implementation attacks the same images, all of
which the network gets right, and what it returns is measured again by the float32 network. Images/s
counts attacked images, passes counts forward passes of an image. Ratios are to the fastest other
library that took every step. C&W takes binary_steps x cw_steps steps from c = 1 without early
aborts; that of torchattacks takes them all with one c and may stop early. That of ART is left out:
each step costs it a backward pass for each class among the labels.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from attack_others import (
    ALPHA,
    EPS,
    adv_lib,
    art,
    foolbox,
    installed,
    positive,
    torchattacks,
)
from attacks import cw_l2, fgsm, pgd
from utils.cli import Parser, at_least, run_script
from utils.data import batches, default_workers, open_images, to_float
from utils.errors import UserError
from utils.measure import share
from utils.models import describe_weights, input_size, load_model
from utils.precision import Fast, fastest, synchronize, to_layout
from utils.report import markdown
from utils.run import provenance, resolve_device, save_json

ATTACKS = ("fgsm", "pgd_linf", "pgd_l2", "cw_l2")
C, LR = 1.0, 0.01  # C&W: first constant, step size of Adam


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", help="photographs in class folders, or a data set by name; None: random "
        "pixels, labelled by the network itself")
    add("--model_name", nargs="+", default=["squeezenet1_0", "mobilenet_v2"], help="networks")
    add("--weights", default="random", help="random, V1, or a folder of NAME.pth")
    add("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS, help="which attacks")
    add("--eps_scale", type=positive, default=1.0, help="times every eps and alpha, such as 1/16")
    add("--steps", type=at_least(1), default=20, help="steps of PGD")
    add("--binary_steps", type=at_least(1), default=3, help="values of c that C&W tries")
    add("--cw_steps", type=at_least(1), default=20, help="steps of C&W for each of them")
    add("--batch_size", type=at_least(1), default=50, help="images attacked, in one batch")
    add("--turns", type=at_least(1), default=3, help="turns of each; the median counts")
    add("--seed", type=at_least(0), default=0, help="random starts")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    add("--results", type=Path, help="JSON file to write")
    return parser.parse_args()


# ------------------------------------------------- {attack: (model, x, y) -> x_adv}

def ours(args, early=False, judge=None):
    def cw(model, x, y):
        return cw_l2(model, x, y, steps=args.cw_steps, binary_steps=args.binary_steps, c=C, lr=LR,
                     abort_early=early, judge=judge)[0]
    found = {} if early else {"fgsm": partial(fgsm, eps=args.eps["linf"])}
    return found | {f"pgd_{norm}": partial(
        pgd, norm=norm, eps=args.eps[norm], alpha=args.alpha[norm], steps=args.steps,
        projection="rescale", stop_early=early) for norm in ("linf", "l2")} | {"cw_l2": cw}


def others(args, classes):
    """{library: {attack: ...}} of those that are installed."""
    eps, alpha, steps = args.eps, args.alpha, args.steps
    found = {"torchattacks": {
        "fgsm": partial(torchattacks, name="FGSM", eps=eps["linf"]),
        "cw_l2": partial(torchattacks, name="CW", c=C, lr=LR,
                         steps=args.binary_steps * args.cw_steps)}, "foolbox": {
        "fgsm": partial(foolbox, name="LinfFastGradientAttack", eps=eps["linf"]),
        "cw_l2": partial(foolbox, name="L2CarliniWagnerAttack", steps=args.cw_steps, stepsize=LR,
                         binary_search_steps=args.binary_steps, initial_const=C,
                         abort_early=False)}, "ART": {
        "fgsm": partial(art, name="FastGradientMethod", classes=classes, eps=eps["linf"])},
        "adv-lib": {"cw_l2": partial(
            adv_lib, name="carlini_wagner_l2", learning_rate=LR, initial_const=C,
            binary_search_steps=args.binary_steps, max_iterations=args.cw_steps,
            abort_early=False)}}
    for norm, ta, fb, p in (("linf", "PGD", "Linf", "inf"), ("l2", "PGDL2", "L2", 2)):
        found["torchattacks"][f"pgd_{norm}"] = partial(
            torchattacks, name=ta, eps=eps[norm], alpha=alpha[norm], steps=steps)
        found["foolbox"][f"pgd_{norm}"] = partial(
            foolbox, name=f"{fb}ProjectedGradientDescentAttack", eps=eps[norm],
            abs_stepsize=alpha[norm], steps=steps)
        found["ART"][f"pgd_{norm}"] = partial(
            art, name="ProjectedGradientDescent", classes=classes, norm=p, eps=eps[norm],
            eps_step=alpha[norm], max_iter=steps, num_random_init=1, verbose=False)
    return {name: attacks for name, attacks in found.items() if name in args.installed}


# ------------------------------------------------------------------- measuring

@torch.no_grad()
def attackable(model, images, count, args, device):
    """The first `count` images that the network gets right, from the list's start -> x, y."""
    found = []
    for index, pixels in batches(images, count, workers=args.workers, skipped=[]):
        x, y = to_float(pixels.to(device)), images.labels[index].to(device)
        right = model(x).argmax(1) == y
        found.append((x[right], y[right]))
        if sum(len(y) for _, y in found) >= count:
            break
    x, y = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
    if not len(y):
        raise UserError("the network gets none of these images right: nothing to attack; type "
                        "--weights of a trained network, or no --data_dir")
    return x, y


def open_batch(name, args, device):
    """The network and what is attacked: model, x, y."""
    images = open_images(args.data_dir, split="test") if args.data_dir else None
    kind = images.kind if images else "imagenet"
    if images and not images.labelled:
        raise UserError(f"--data_dir {args.data_dir}: its folders are not classes of the networks")
    model = load_model(name, weights=args.weights, kind=kind, data_dir=args.data_dir,
                       device=device)
    size = input_size(name, kind, images.size if images else None, args.weights)
    if images:
        return model, *attackable(model, images.prepared(size, None), args.batch_size, args, device)
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.rand((args.batch_size, 3, size, size), generator=generator).to(device)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def implementations(model, x, y, args):
    """{implementation: {attack: () -> x_adv}}, ours first; and all networks that they call."""
    found, networks, judge = {}, [model], None
    for amp, name in (("off", "float32"), ("bf16", "bf16")):
        _, layout = fastest([model], lambda fast, batch: fgsm(
            fast[0], batch, y, eps=args.eps["linf"]), x, amp=amp)
        fast, laid = Fast(model, amp, layout), to_layout(x, layout)
        networks.append(fast.model)
        for early in (False, True):
            found[f"ours, {name}, {layout}" + ", stop early" * early] = {
                key: partial(attack, fast, laid, y)
                for key, attack in ours(args, early, judge).items()}
        judge = fast  # C&W in bf16 asks the float32 copy whether an image is adversarial
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    return found | {name: {key: partial(attack, model, x, y) for key, attack in attacks.items()}
                    for name, attacks in others(args, classes).items()}, networks


def timed(works, passed, turns, warm, device, desc):
    """{name: (seconds of every turn, images that passed the network, x_adv)} of works {name: work}.

    passed: the list to which the networks add the size of every batch; warm: turns before those
    that count.
    """
    seconds, last = {name: [] for name in works}, {}
    with tqdm(total=(turns + warm) * len(works), desc=desc, leave=False, disable=None) as bar:
        for turn in range(turns + warm):
            for name, work in works.items():
                passed.clear()
                synchronize(device)
                start = time.perf_counter()
                x_adv = work()
                synchronize(device)
                if turn >= warm:
                    seconds[name].append(time.perf_counter() - start)
                last[name] = (seconds[name], sum(passed), x_adv)
                bar.update()
    return last


@torch.no_grad()
def outcome(model, x, y, x_adv):
    """What the float32 network says: attack_robustness, the mean L2 norm where it was fooled."""
    fooled = model(x_adv.contiguous()).argmax(1) != y
    norms = (x_adv.double() - x.double()).flatten(1).norm(dim=1)[fooled]
    return {"attack_robustness": share(int((~fooled).sum()), len(y)), "fooled": int(fooled.sum()),
            "mean_l2": norms.mean().item() if len(norms) else None}


def measure(name, args, device):
    """Rows of one network."""
    model, x, y = open_batch(name, args, device)
    (made, networks), passed, rows = implementations(model, x, y, args), [], []
    for network in networks:  # at Normalize, since ART calls the layers one by one
        network[0].register_forward_hook(lambda module, inputs, out: passed.append(len(out)))
    asked = {"fgsm": 1, "cw_l2": args.binary_steps * args.cw_steps}
    for attack in args.attacks:
        works = {key: attacks[attack] for key, attacks in made.items() if attack in attacks}
        found = timed(works, passed, args.turns, not rows, device, f"{name} {attack}")
        own = [{"model": name, "attack": attack, "implementation": key, "n": len(y),
                "images_per_s": len(y) / statistics.median(seconds), "seconds": seconds,
                "passes": passes / len(y), **outcome(model, x, y, x_adv)}
               for key, (seconds, passes, x_adv) in found.items()]
        full = [row for row in own if not row["implementation"].startswith("ours")
                and row["passes"] >= asked.get(attack, args.steps)]  # took every step
        best = max(full, key=lambda row: row["images_per_s"], default=None)
        rows += [{**row, "ratio": best and statistics.median(
            b / a for a, b in zip(row["seconds"], best["seconds"], strict=True))} for row in own]
    return rows


def line(row):
    """A row of the Markdown table."""
    fooled = f"{row['fooled']} of {row['n']}"
    if row["attack"] == "cw_l2" and row["fooled"]:
        fooled += f", mean L2 {row['mean_l2']:.3f}"
    return [row["model"], row["attack"], row["implementation"], f"{row['images_per_s']:.1f}",
            f"{row['ratio']:.2f}" if row["ratio"] else "-", f"{row['passes']:.1f}",
            f"{100 * row['attack_robustness']['value']:.1f}", fooled]


def main(args):
    device = resolve_device(args.device)
    args.eps = {norm: args.eps_scale * eps for norm, eps in EPS.items()}
    args.alpha = {norm: args.eps_scale * alpha for norm, alpha in ALPHA.items()}
    args.installed = installed()
    torch.manual_seed(args.seed)  # the other libraries start from the global state
    rows = [row for name in args.model_name for row in measure(name, args, device)]
    print(markdown(["model", "attack", "implementation", "img/s", "ratio to the fastest other",
                    "passes an image", "attack_robustness, %", "fooled"], map(line, rows)), end="")
    kind = open_images(args.data_dir, split="test").kind if args.data_dir else "imagenet"
    about = {"data": args.data_dir or "random pixels, labelled by the network", "weights": {
        name: describe_weights(name, args.weights, kind) for name in args.model_name},
        **{key: getattr(args, key) for key in ("eps", "alpha", "steps", "binary_steps", "cw_steps",
                                               "batch_size", "turns", "seed", "installed")},
        **provenance(device)}
    print(f"{about['data']}; weights {', '.join(map(': '.join, about['weights'].items()))}; eps "
          f"{args.eps['linf'] * 255:g}/255 and L2 {args.eps['l2']:g}, PGD {args.steps} steps of "
          f"{args.alpha['linf'] * 255:g}/255 and {args.alpha['l2']:g} from a random start, C&W "
          f"{args.binary_steps} x {args.cw_steps}; median of {args.turns} turns; "
          f"{about['device']}, torch {about['torch']}, commit {about['commit']}")
    if args.results:
        save_json(args.results, {"about": about, "rows": rows})


if __name__ == "__main__":
    run_script(get_args, main)
