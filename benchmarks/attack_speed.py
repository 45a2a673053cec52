"""Speed of attacks compared with other libraries, in one process, in turns.

    ours         attacks.py; stop early: fooled images leave the batch (C&W: abort_early), as always
                 in APGD and Square
    the others   torchattacks 3.5.1, foolbox 3.3.4, ART 1.20.1, for C&W adv-lib 0.2.8, for APGD and
                 Square pyautoattack 0.2.0; those not installed are left out (attack_others.py)

    PYTHONPATH=src python benchmarks/attack_speed.py \\
        --data_dir ../shared/data/imagenet_sample/val --weights ../shared/data/weights

Every implementation attacks three forms of the network: as loaded (float32, contiguous), and
copies in float32 and bf16 in the layout that is faster here. The images are in the network's memory
order; torchattacks' L2 PGD takes only contiguous ones. The figure in brackets is the speed relative
to the fastest other library, in the same form, that took every step. Nothing else may run on the
machine meanwhile.

All attack the same images, which the network classifies correctly, and the results are measured
again by the float32 network. Images/s counts attacked images, passes counts forward passes per
image. C&W takes binary_steps x cw_steps steps from c = 1 without early aborts; torchattacks' takes
them all with one c and may stop early. ART's is left out: each of its steps costs a backward pass
for each class among the labels.
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
    pyautoattack,
    torchattacks,
)
from attacks import apgd, cw_l2, fgsm, mim, pgd, square
from bench import show, times_as_fast
from utils.cli import Parser, at_least, run_script
from utils.data import batches, default_workers, open_images, to_float
from utils.errors import UserError
from utils.measure import share
from utils.models import describe_weights, input_size, load_model
from utils.precision import LAYOUTS, Fast, fastest, synchronize, to_layout
from utils.run import provenance, resolve_device

ATTACKS = ("fgsm", "pgd_linf", "pgd_l2", "mim", "cw_l2", "apgd", "square")
C, LR = 1.0, 0.01  # C&W: first constant, step size of Adam


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", help="photographs in class folders, or a data set by name; None: random "
        "pixels, labelled by the network itself")
    add("--model_name", nargs="+", default=["squeezenet1_0", "mobilenet_v2"], help="networks")
    add("--weights", default="random", help="random, V1, or a folder of NAME.pth")
    add("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS, help="which attacks")
    add("--eps_scale", type=positive, default=1.0, help="factor for eps and alpha, such as 1/16")
    add("--steps", type=at_least(1), default=20, help="steps of PGD, MIM and APGD")
    add("--queries", type=at_least(1), default=100, help="queries of Square")
    add("--binary_steps", type=at_least(1), default=3, help="values of c that C&W tries")
    add("--cw_steps", type=at_least(1), default=20, help="steps of C&W for each of them")
    add("--batch_size", type=at_least(1), default=50, help="images attacked, in one batch")
    add("--turns", type=at_least(1), default=3, help="turns of each; the median counts")
    add("--seed", type=at_least(0), default=0, help="random starts")
    add("--layout", choices=("auto", *LAYOUTS), default="auto", help="memory layout of ours; auto: "
        "the faster by timing")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    add("--results", type=Path, help="JSON file to write, with .csv and .md beside it")
    return parser.parse_args()


# ------------------------------------------------- {attack: (model, x, y) -> x_adv}

def ours(args, early=False, judge=None):
    def cw(model, x, y):
        return cw_l2(model, x, y, steps=args.cw_steps, binary_steps=args.binary_steps, c=C, lr=LR,
                     abort_early=early, judge=judge)[0]
    eps = {"eps": args.eps["linf"]}
    found = {"apgd": partial(apgd, **eps, steps=args.steps, loss="ce"),
             "square": partial(square, **eps, queries=args.queries)} if early else {
        "fgsm": partial(fgsm, **eps)}
    found["mim"] = partial(mim, **eps, alpha=args.alpha["linf"], steps=args.steps, stop_early=early)
    return found | {f"pgd_{norm}": partial(
        pgd, norm=norm, eps=args.eps[norm], alpha=args.alpha[norm], steps=args.steps,
        projection="rescale", stop_early=early) for norm in ("linf", "l2")} | {"cw_l2": cw}


def others(args, classes):
    """{library: {attack: ...}} of the installed libraries."""
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
            abort_early=False)}, "pyautoattack": {
        "apgd": partial(pyautoattack, name="APGDAttack", n_iter=steps, norm="Linf", loss="ce",
                        eps=eps["linf"]),
        "square": partial(pyautoattack, name="SquareAttack", n_queries=args.queries, norm="Linf",
                          resc_schedule=True, eps=eps["linf"])}}
    found["torchattacks"]["mim"] = partial(torchattacks, name="MIFGSM", eps=eps["linf"],
                                           alpha=alpha["linf"], steps=steps, decay=1.0)
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
    """The first `count` images of the list that the network gets right. -> x, y"""
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
    """-> model, and the x and y to attack"""
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


def forms_of(model, x, y, args):
    """{(precision, layout): (network, x)}, the network as loaded first."""
    def step(networks, batch):
        return fgsm(networks[0], batch, y, eps=args.eps["linf"])

    found = {("float32", "contiguous"): (model, x)}
    for amp, precision in (("off", "float32"), ("bf16", "bf16")):
        _, layout = fastest([model], step, x, amp=amp, layout=args.layout)
        found[precision, layout] = Fast(model, amp, layout).eval(), to_layout(x, layout)
    return found


def implementations(forms, y, args):
    """{(implementation, precision, layout): {attack: () -> x_adv}}"""
    model, x = forms["float32", "contiguous"]
    with torch.no_grad():
        classes, found = model(x[:1]).shape[1], {}
    for (precision, layout), (network, laid) in forms.items():
        # C&W in bf16 asks a float32 network whether an image is adversarial
        judge = forms.get(("float32", layout), (model,))[0] if precision == "bf16" else None
        made = {"ours" + ", stop early" * early: ours(args, early, judge)
                for early in (False, True)}
        for name, attacks in {**made, **others(args, classes)}.items():
            found[name, precision, layout] = {
                key: partial(attack, network, laid, y) for key, attack in attacks.items()}
    return found


def timed(works, passed, turns, warm, device, desc):
    """{name: (seconds of each turn, images that passed the network, x_adv)} of works {name: work}.

    passed: the list to which the networks append the size of every batch; warm: uncounted turns
    before the others.
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
    """Measured on the float32 network: attack_robustness, mean L2 norm where it was fooled."""
    fooled = model(x_adv.contiguous()).argmax(1) != y
    norms = (x_adv.double() - x.double()).flatten(1).norm(dim=1)[fooled]
    return {"attack_robustness": share(int((~fooled).sum()), len(y)), "fooled": int(fooled.sum()),
            "mean_l2": norms.mean().item() if len(norms) else None}


def with_ratios(rows, steps):
    """The rows of one attack, each with `ratio`: its speed over the fastest other's in its form.

    steps: forward passes per image in a whole attack; implementations that took fewer do not count.
    """
    def yardstick(row):
        full = [one["seconds"] for one in rows if one["passes"] >= steps
                and not one["implementation"].startswith("ours")
                and (one["precision"], one["layout"]) == (row["precision"], row["layout"])]
        return min(full, key=statistics.median, default=None)

    def ratio(row):
        other = yardstick(row)
        return other and times_as_fast(row["seconds"], other)
    return [{**row, "ratio": ratio(row)} for row in rows]


def measure(name, args, device):
    """Rows of one network."""
    model, x, y = open_batch(name, args, device)
    forms, passed, rows = forms_of(model, x, y, args), [], []
    made = implementations(forms, y, args)
    for network in {network.model if isinstance(network, Fast) else network
                    for network, _ in forms.values()}:
        # at Normalize, because ART calls the layers one by one
        network[0].register_forward_hook(lambda module, inputs, out: passed.append(len(out)))
    whole = {"fgsm": 1, "cw_l2": args.binary_steps * args.cw_steps, "square": args.queries}
    for attack in args.attacks:
        works = {key: attacks[attack] for key, attacks in made.items() if attack in attacks}
        found = timed(works, passed, args.turns, not rows, device, f"{name} {attack}")
        rows += with_ratios([{
            "model": name, "attack": attack, "implementation": implementation,
            "precision": precision, "layout": layout, "n": len(y),
            "images_per_s": len(y) / statistics.median(seconds), "seconds": seconds,
            "passes": passes / len(y), **outcome(model, x, y, x_adv)}
            for (implementation, precision, layout), (seconds, passes, x_adv) in found.items()],
            whole.get(attack, args.steps))
    return rows


def table(rows):
    """Head and lines: a line per network, attack and implementation, a column per form.
    """
    forms = list(dict.fromkeys((row["precision"], row["layout"]) for row in rows))
    found, lines = {}, []
    for row in rows:
        key = row["model"], row["attack"], row["implementation"]
        found.setdefault(key, {})[row["precision"], row["layout"]] = row
    for key, own in found.items():
        def each(text, own=own):
            """One text if it is the same in every form, else one per form."""
            said = [text(row) for row in own.values()]
            return said[0] if len(set(said)) == 1 else " / ".join(said)
        speeds = [f"{own[form]['images_per_s']:.1f}" + (
            f" ({own[form]['ratio']:.2f})" if own[form]["ratio"] else "") if form in own else "-"
            for form in forms]
        lines.append([*key, *speeds, each(lambda row: f"{row['passes']:.1f}"),
                      each(lambda row: f"{row['fooled']} of {row['n']}"),
                      each(lambda row: f"{row['mean_l2']:.3f}" if row["fooled"] else "-")
                      if key[1] == "cw_l2" else "-"])
    speeds = [f"{precision}, {layout}: img/s (ratio)" for precision, layout in forms]
    return ["model", "attack", "implementation", *speeds, "passes per image", "fooled",
            "mean L2"], lines


def main(args):
    device = resolve_device(args.device)
    args.eps = {norm: args.eps_scale * eps for norm, eps in EPS.items()}
    args.alpha = {norm: args.eps_scale * alpha for norm, alpha in ALPHA.items()}
    args.installed = installed()
    torch.manual_seed(args.seed)  # the other libraries draw from the global state
    rows = [row for name in args.model_name for row in measure(name, args, device)]
    kind = open_images(args.data_dir, split="test").kind if args.data_dir else "imagenet"
    about = {"data": args.data_dir or "random pixels, labelled by the network", "weights": {
        name: describe_weights(name, args.weights, kind) for name in args.model_name},
        **{key: getattr(args, key) for key in (
            "eps", "alpha", "steps", "queries", "binary_steps", "cw_steps", "batch_size", "turns",
            "seed", "installed")},
        **provenance(device)}
    weights = ", ".join(map(": ".join, about["weights"].items()))
    eps, alpha = (f"{255 * one['linf']:g}/255 and L2 {one['l2']:g}"
                  for one in (args.eps, args.alpha))
    note = (f"{about['data']}; weights {weights}; eps {eps}, PGD and MIM {args.steps} "
            f"steps of {alpha}, PGD from a random start, C&W {args.binary_steps} x "
            f"{args.cw_steps}, APGD {args.steps} steps, Square {args.queries} queries; median of "
            f"{args.turns} turns; {about['device']}, torch {about['torch']}, commit "
            f"{about['commit']}")
    show(*table(rows), note, args.results, about=about, rows=rows)


if __name__ == "__main__":
    run_script(get_args, main)
