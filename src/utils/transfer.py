"""MI-FGSM images of every network, measured on every network: eval_net.py --transfer."""

import torch

from utils import measure
from utils.attack.chance import numbered
from utils.data import to_float
from utils.defenses import adaptive
from utils.errors import UserError
from utils.report import interval, markdown

STEPS, DIVERSE = 10, 0.5  # as published: steps of eps / 10; share of images that DI changes


def check(networks, s):
    """UserError if the networks' inputs have different geometry."""
    other = next((net for net in networks if net.target.geometry != networks[0].target.geometry),
                 None)
    if s.transfer and other:
        raise UserError(f"--transfer: {networks[0].name} takes images {networks[0].target.geometry}"
                        f", {other.name} {other.target.geometry}; wanted the same for all")


def key_of(source, target, s):
    return f"{source.name} -> {target.name}" + ", DI and TI" * s.diverse


def missing_cells(networks, mim, ready, done, s, progress):
    """Yields (key, cell) for every key missing from `done`; a source's images are made once."""
    for source in networks:
        left = {key_of(source, target, s): target for target in networks
                if key_of(source, target, s) not in done}
        if left:
            yield from source_cells(source, left, mim, ready(source.target.geometry), done, s,
                                    progress)


def source_cells(source, left, mim, images, done, s, progress):
    """[(key, cell)] of `left`, {key: target}. All images are attacked, also misclassified ones."""
    eps, chance = source.eps, numbered(s.seed, len(images))
    attack = measure.Attack("MI-FGSM", "linf", eps, None)
    more = {"diverse": DIVERSE, "blur": blur_for(source.target.size)} if s.diverse else {}

    def attacked(index, x):
        x, y = to_float(x.to(s.device)), images.labels[index].to(s.device)
        own, report, audit = chance[index], {}, {"largest": 0.0, "outside": 0}
        x_adv = mim(adaptive(source.defended, s.draws), x, y, eps=eps, alpha=eps / STEPS,
                    steps=STEPS, generator=own.fold(measure.ATTACK), report=report, **more)
        allowed = measure.in_ball(x, x_adv, attack, audit)
        x_adv[~allowed.to(x.device)] = x[~allowed.to(x.device)]
        audit["zero_gradient"] = int(report["zero_gradient"].sum())
        return audit | {"after": {key: measure.count_right(
            net.defended, x_adv, y, net.draws(s), own.fold(measure.AFTER)).tolist()
            for key, net in left.items()}}
    found = progress.count(
        images, torch.arange(len(images)), attacked, batch_size=s.batch_size, cell=list(left),
        workers=s.workers, desc=f"{source.name} MI-FGSM")
    return [(key, {"norm": "linf", "eps": eps, "n": len(images), "draws": net.draws(s),
                   "before": done[f"{net.name} | clean"]["before"], "after": found["after"][key],
                   **{name: found[name] for name in ("zero_gradient", "largest", "outside")}})
            for key, net in left.items()]


def blur_for(size):
    """Side of TI's kernel: 15 at 224 pixels, in proportion, odd, at least 3."""
    return max(3, 15 * size // 224 | 1)


def onto(net, networks, cells, s):
    """{title: cell} of the images of every network, measured on this one; {} without --transfer."""
    return {f"MI-FGSM from {source.name}" + ", DI and TI" * s.diverse:
            cells[key_of(source, net, s)] for source in networks if s.transfer}


def table(networks, cells, s):
    """Markdown: a row per source; the diagonal is white-box."""
    name = "MI-FGSM" + ", DI and TI" * s.diverse
    return (f"\nrobust_acc under transfer, %: {name}, {STEPS} steps of eps/{STEPS}, mu 1; made "
            "with the network of the row, measured on that of the column\n\n") + markdown(
        ["made with", *(net.name for net in networks)],
        [[source.name, *(interval(measure.figures(cells[key_of(source, net, s)])["robust_acc"])
                         for net in networks)] for source in networks])
