"""Robust accuracy over the radius: eval_net.py --eps_curve.

FAB's nearest adversarial images give a curve at all radii at once and show where it reaches zero;
if FAB does not fool every image, the last radius is at least 4 eps. APGD on cross-entropy covers
ten radii from 0 to there: the adaptive attacker, and for a defended network also the naive one. An
image fooled within a radius counts as fooled within all larger ones. Behind a random defence FAB
only sets the radii.
"""

from functools import partial

import torch

from utils import draw, measure
from utils.attack.apgd import apgd
from utils.attack.balls import norm_of
from utils.attack.chance import numbered
from utils.attack.fab import fab
from utils.cells import Progress
from utils.data import to_float
from utils.defenses import adaptive, is_random
from utils.report import interval, markdown
from utils.run import save_csv, write_atomic

RADII = 10
FAB_STEPS, FAB_TARGETS = 50, 3
BEYOND = 1.02     # last radius over the largest of FAB's norms
FARTHEST = 4      # times eps, where FAB found nothing


def attackers(net, s):
    """{name: the model that the attacker differentiates}"""
    found = {"adaptive": adaptive(net.defended, s.draws)}
    return found if net.defense == "none" else found | {"naive": net.defended}


def missing_cells(net, ready, done, s, progress):
    """Yields (key, cell) for each cell not yet in `done`, to which the caller adds it."""
    own, images = f"{net.name} | ", ready(net.target.geometry)
    clean = done[own + "clean"]["before"]
    if own + "norms" not in done:
        yield own + "norms", norm_cell(net, images, torch.tensor(clean), s, progress)
    for attacker, model in attackers(net, s).items():
        left = clean
        for eps in radii(done[own + "norms"], net.eps)[1:]:
            key = own + key_of(attacker, eps)
            if key not in done:
                cell = measure.run_cell(
                    measure.Attack(key, "linf", eps, partial(apgd, eps=eps)), model, net.defended,
                    images, torch.tensor(left), draws=net.draws(s), batch_size=s.batch_size,
                    chance=numbered(s.seed, len(images)), device=s.device, desc=key,
                    workers=s.workers, progress=progress)
                yield key, cell | {"before": clean}
            left = done[key]["after"]


def key_of(attacker, eps):
    return f"APGD-CE {attacker} {eps:.6g}"


def norm_cell(net, images, before, s, progress):
    """Norms of FAB's perturbations (n,), None if it found none or the clean image is wrong."""
    chance, targets = numbered(s.seed, len(images)), min(FAB_TARGETS, net.classes - 1)

    def nearest(index, x):
        x, y = to_float(x.to(s.device)), images.labels[index].to(s.device)
        own = chance[index]
        x_adv, found = fab(adaptive(net.defended, s.draws), x, y, steps=FAB_STEPS, targets=targets,
                           generator=own.fold(measure.ATTACK))
        right = measure.count_right(net.defended, x_adv, y, net.draws(s), own.fold(measure.AFTER))
        size = norm_of(x_adv - x, "linf").cpu()
        return {"norms": [value if ok else None for value, ok in zip(
            size.tolist(), (found.cpu() & (right == 0)).tolist(), strict=True)]}
    tried = (before > 0).nonzero()[:, 0]
    found = (progress or Progress()).count(
        images, tried, nearest, batch_size=s.batch_size,
        cell=[f"{net.name} norms", before.tolist()], workers=s.workers, desc=f"{net.name} FAB")
    norms = dict(zip(tried.tolist(), found.get("norms", []), strict=True))
    return {"n": len(images), "draws": net.draws(s), "before": before.tolist(),
            "norms": [norms.get(i) for i in range(len(images))]}


def radii(cell, eps):
    """Ten, from 0 to just beyond the largest of FAB's norms; 4 eps stands in for a missing one."""
    found = [size for right, size in zip(cell["before"], cell["norms"], strict=True) if right]
    last = max((FARTHEST * eps if size is None else size for size in found),
               default=FARTHEST * eps)
    return [min(1.0, BEYOND * last) * k / (RADII - 1) for k in range(RADII)]


def cells_of(net, cells):
    """{attacker: the cells of all radii but 0}"""
    every = radii(cells[f"{net.name} | norms"], net.eps)[1:]
    return {attacker: [cells[f"{net.name} | {key_of(attacker, eps)}"] for eps in every]
            for attacker in ("adaptive", "naive")[:1 + (net.defense != "none")]}


def rows_of(net, cells):
    """[{network, attacker, eps, value, k, n, low, high}], the attackers of `cells` and FAB."""
    norms, rows = cells[f"{net.name} | norms"], []
    clean = measure.figures(cells[f"{net.name} | clean"])["clean_acc"]
    every = radii(norms, net.eps)
    for attacker, own in cells_of(net, cells).items():
        found = [clean, *(measure.figures(cell)["robust_acc"] for cell in own)]
        rows += [_row(net, f"APGD-CE, {attacker}", *one) for one in zip(every, found, strict=True)]
    if is_random(net.defense):  # FAB's images lie on the boundary: another draw, another class
        return rows
    return rows + [_row(net, "FAB, adaptive", eps, _beyond(norms, eps)) for eps in every]


def _beyond(cell, eps):
    """The share of images that are classified correctly and not fooled by FAB within eps."""
    left = [right for right, size in zip(cell["before"], cell["norms"], strict=True)
            if size is None or size > eps]
    return measure.share(measure.divide(sum(left), cell["draws"]), cell["n"])


def _row(net, attacker, eps, found):
    return {"network": net.name, "attacker": attacker, "eps": eps, **found}


def save(folder, networks, cells):
    """Writes curve.csv and curve.png; -> the Markdown."""
    rows = [row for net in networks for row in rows_of(net, cells)]
    save_csv(folder / "curve.csv", rows)
    write_atomic(folder / "curve.png", draw.eps_curves(rows))
    return "\nrobust_acc over the Linf radius, %; of FAB by the norms of its images\n\n" + markdown(
        ["network", "attacker", "eps x 255", "robust_acc"],
        [[row["network"], row["attacker"], f"{255 * row['eps']:.3g}", interval(row)]
         for row in rows])
