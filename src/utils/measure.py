"""The measured figures: one name for each, always with n and a 95 % Wilson interval.

    fooling_ratio       share of ALL images whose predicted class changes; no labels needed
    clean_acc, adv_acc  top-1 accuracy before and after the attack (top-5: _top5); an image that
                        is right only with the perturbation counts as right in adv_acc
    robust_acc          share of all images that are right before and after the attack
    attack_robustness   the same, as a share of the images that are right before it
    changed_by_chance   share of images that two passes of a random defence classify differently
    targeted_success    of the images not predicted as the target before, the share that are after

A *cell* is one attack by one attacker on one network. The images that the attack returns are
measured again on the target network: an image counts as fooled if that network misclassifies it and
it lies in the ball and in [0, 1]. Networks with a random defence classify every image `draws`
times. For each image, a cell stores the number of correct draws before and after the attack; all
figures and worst cases are computed from these counts. An image's random numbers depend only on the
seed and its position in the list of images: `chance` is a Chance of all images.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from utils.attack.balls import norm_of
from utils.attack.chance import Chance, chance_of
from utils.attack.random_layers import drawing_from
from utils.audit import ascents
from utils.cells import Progress
from utils.data import to_float
from utils.precision import synchronize

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
COUNTED = ("zero_gradient", "gradients", "queries")  # summed from the attacks' reports
BEFORE, ATTACK, AFTER = range(3)  # independent streams of an image's random numbers


def wilson(k, n):
    """95 % Wilson score interval of k successes in n trials, as (low, high) in [0, 1]."""
    if n == 0:
        return (0.0, 1.0)
    p, z2 = k / n, Z95 ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (max(0.0, centre - half) if k else 0.0, min(1.0, centre + half) if k < n else 1.0)


def share(k, n):
    """k of n as {value, k, n, low, high}, the form of every figure in results.json."""
    low, high = wilson(k, n)
    return {"value": k / n if n else 0.0, "k": k, "n": n, "low": low, "high": high}


@torch.no_grad()
def predictions(models, pixels, device, *, delta=None, chance=None, batch_size=50):
    """Predicted classes (S, N) of S models at clamp(x + delta, 0, 1); pixels (N, C, H, W) uint8.

    chance: what random layers draw from; None: their own generators.
    """
    found = []
    for index in torch.arange(len(pixels)).split(batch_size):
        x = to_float(pixels[index].to(device))
        if delta is not None:
            x = (x + delta.to(device)).clamp_(0, 1)
        with nullcontext() if chance is None else drawing_from(chance_of(chance[index], x)):
            found.append(torch.stack([model(x).argmax(1) for model in models]).cpu())
    return torch.cat(found, 1)


# ------------------------------------------------------------- per-image attacks: cells

@dataclass(frozen=True)
class Attack:
    """run(model, x, y, generator=, report=) -> images, and the ball that they must lie in. The
    generator is a Chance.

    follow: whether the cell stores the mean loss at each step, from the attack's report.
    """
    title: str
    norm: str
    eps: float
    run: Callable
    follow: bool = False


@torch.no_grad()
def count_right(model, x, y, draws, chance):
    """Number of forward passes, out of `draws`, in which the model classifies x (n, C, H, W) as y.
    -> (n,) int64, on the CPU
    """
    with drawing_from(chance_of(chance, x)):
        return sum((model(x).argmax(1) == y).long() for _ in range(draws)).cpu()


def count_right_on(model, images, *, draws, batch_size, chance, device, workers=0, progress=None,
                   cell=None):
    """count_right of all images before an attack: (N,). progress: from utils/cells.py, saves how
    far the `cell` has got.
    """
    def counted(index, x):
        x, y = to_float(x.to(device, non_blocking=True)), images.labels[index].to(device)
        return {"right": count_right(model, x, y, draws, chance[index].fold(BEFORE)).tolist()}
    return torch.tensor((progress or Progress()).count(
        images, torch.arange(len(images)), counted, batch_size=batch_size, cell=cell,
        workers=workers, desc="clean")["right"])


def run_cell(attack, attacker, model, images, before, *, draws, batch_size, chance, device, desc,
             workers=0, progress=None, keep=None):
    """Run the attack on `attacker` and measure it on `model`, on the images with before (N,) > 0.

    progress: from utils/cells.py, saves how far this cell, `desc`, has got. keep(index, x, x_adv):
    rounds images to 8 bits, saves and reads them back (utils/saved.py); their counts are `after8`.
    -> the entry of results.json: before and after as lists of counts, seconds of the attack alone,
    summed over processes, the reports' counts, the largest norm, the number of images outside the
    ball or [0, 1] (they count as not attacked), and the loss at each step if attack.follow.
    """
    def attacked(index, x):
        x, y = to_float(x.to(device, non_blocking=True)), images.labels[index].to(device)
        own, report, audit = chance[index], {}, {"largest": 0.0, "outside": 0}
        synchronize(device)
        start = time.perf_counter()
        x_adv = attack.run(attacker, x, y, generator=own.fold(ATTACK), report=report)
        synchronize(device)
        seconds = time.perf_counter() - start
        allowed = in_ball(x, x_adv, attack, audit)
        right = count_right(model, x_adv, y, draws, own.fold(AFTER))
        eight = {}
        if keep is not None:
            x8 = keep(index, x, x_adv)
            right8 = count_right(model, x8, y, draws, own.fold(AFTER))
            eight["after8"] = torch.where(in_ball(x, x8, attack, audit), right8,
                                          before[index]).tolist()
        return {"after": torch.where(allowed, right, before[index]).tolist(), "seconds": seconds,
                **eight, **audit, **_parts_of(report),
                **{key: int(torch.as_tensor(report.get(key, 0)).sum()) for key in COUNTED},
                **(_followed(report) if attack.follow and "losses" in report else {})}
    tried = before > 0
    found = {"after": [], "seconds": 0.0, "largest": 0.0, "outside": 0, **dict.fromkeys(COUNTED, 0),
             **(progress or Progress()).count(
                images, tried.nonzero()[:, 0], attacked, batch_size=batch_size,
                cell=[desc, before.tolist()], workers=workers, desc=desc)}
    return {"norm": attack.norm, "eps": attack.eps, "n": len(before), "draws": draws,
            "before": before.tolist(), "after": _spread(found["after"], tried),
            "seconds": found["seconds"],
            **({} if keep is None else {"after8": _spread(found.get("after8", []), tried)}),
            **({"parts": found["parts"]} if "parts" in found else {}),
            **{key: found[key] for key in (*COUNTED, "largest", "outside")},
            **({} if "losses" not in found else {
                "losses": [value / found["followed"] for value in found["losses"].values()],
                "ascent": found["ascents"] / found["followed"]})}


def _spread(counts, tried):
    """The counts of the `tried` images in a list of all images; 0 for the others."""
    whole = torch.zeros(len(tried), dtype=torch.int64)
    whole[tried] = torch.tensor(counts, dtype=whole.dtype)
    return whole.tolist()


def _parts_of(report):
    """AutoAttack's report on its member attacks, to be summed over batches."""
    if "flags" not in report:
        return {}
    return {"parts": {"random": report["random"], **{
        name: one for name, one in report.items() if isinstance(one, dict)}}}


def _followed(report):
    """Sums over a batch of the images' losses at each step, and of their ascents."""
    losses = torch.stack(report["losses"]).cpu()  # (steps, images)
    return {"losses": {str(k): value for k, value in enumerate(losses.double().sum(1).tolist())},
            "ascents": ascents(losses).double().sum().item(), "followed": losses.shape[1]}


@torch.no_grad()
def accuracy_cell(model, images, operations, *, batch_size, chance, device, workers=0,
                  progress=None, cell=None):
    """Number of images classified correctly: clean, and under each of {name: operation}."""
    def counted(index, x):
        x, y = to_float(x.to(device, non_blocking=True)), images.labels[index].to(device)
        right = dict.fromkeys(("clean", *operations), 0)
        for k, name in enumerate(right):
            own = chance[index].fold(k)
            z = x if name == "clean" else operations[name](x, generator=own.fold(ATTACK))
            right[name] += int(count_right(model, z, y, 1, own.fold(AFTER)).sum())
        return {"n": len(y), "right": right}
    return (progress or Progress()).count(
        images, torch.arange(len(images)), counted, batch_size=batch_size, cell=cell,
        workers=workers, desc="accuracy")


@torch.no_grad()
def fooling_cell(model, images, delta, chance, device, *, batch_size=50, workers=0, progress=None,
                 cell=None):
    """Number of images whose predicted class a universal perturbation (C, H, W) changes."""
    def counted(index, x):
        before, after = (predictions([model], x, device, delta=d, chance=chance[index].fold(k),
                                     batch_size=batch_size)
                         for k, d in ((BEFORE, None), (AFTER, delta)))
        return {"n": len(x), "fooled": int((after != before).sum())}
    return (progress or Progress()).count(
        images, torch.arange(len(images)), counted, batch_size=batch_size, cell=cell,
        workers=workers, desc="fooling")


def in_ball(x, x_adv, attack, audit):
    """Whether each image lies in the ball and in [0, 1]: (n,) bool, on the CPU; fills `audit`."""
    if x.device.type == "mps":  # which has no float64
        x, x_adv = x.cpu(), x_adv.cpu()
    size = norm_of(x_adv.double() - x.double(), attack.norm)
    boxed = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)  # NaN is neither
    size, boxed = torch.stack([size, boxed.double()]).cpu()  # one wait for the device
    allowed = boxed.bool() & (size <= attack.eps * (1 + 1e-5) + 1e-6)  # float32 rounds x + delta
    audit["largest"] = max(audit["largest"], size.max().item())
    audit["outside"] += int((~allowed).sum())
    return allowed


def figures(cell):
    """{metric: share}; k and n may be fractions for a random network.

    Let b and a be the shares of an image's draws that are right before and after. robust_acc is
    the mean of a b over the images, attack_robustness the sum of a b over the sum of b.
    """
    before, after, draws = cell["before"], cell["after"], cell["draws"]
    right = divide(sum(before), draws)
    both = divide(sum(b * a for b, a in zip(before, after, strict=True)), draws * draws)
    return {"clean_acc": share(right, cell["n"]), "robust_acc": share(both, cell["n"]),
            "attack_robustness": share(both, right)}


def divide(total, by):
    """total / by, as an int if it is whole."""
    return total // by if total % by == 0 else total / by


def worst_of(cells):
    """One cell of several: for each image, the result of the attack that was strongest on it."""
    after = zip(*(cell["after"] for cell in cells), strict=True)
    return {**{key: cells[0][key] for key in ("n", "draws", "before")},
            "after": [min(counts) for counts in after],
            "seconds": sum(cell["seconds"] for cell in cells)}


# --------------------------------------------------------------- universal perturbations

def logits_under(model, x, pairs, *, seed, index, again):
    """Logits (n, K) of images x (n, C, H, W): clean; clean once more if `again`, else None; and
    [adv, adv8] for each pair of perturbations, None for a perturbation that is None.

    index (n,): positions of the images in the list. Random layers draw the same for every pair.
    """
    own, found = chance_of(Chance(seed, index), x), []
    with drawing_from(own.fold(BEFORE)):
        clean, once_more = model(x), model(x) if again else None
    for pair in pairs:
        with drawing_from(own.fold(AFTER)):
            found.append([None if d is None else model((x + d).clamp_(0, 1)) for d in pair])
    return clean, once_more, found


@dataclass
class UapCounts:
    """Counts of one perturbation on one target network, summed over batches."""
    target: int = None              # target class of a targeted perturbation
    n: int = 0
    counts: dict = field(default_factory=dict)
    became: dict = field(default_factory=dict)  # {class as text: images fooled into it}

    def add(self, clean, adv, adv8, y, again=None):
        """Logits (N, K) before, after, and after 8-bit rounding (None: same); labels (N,).

        again: for a random defence, a second forward pass of the clean images.
        """
        before, after = clean.argmax(1), adv.argmax(1)
        fooled = after != before
        right, still = before == y, after == y
        found = {"fooled": fooled, "clean": right, "adv": still, "both": right & still,
                 "clean_top5": _top5(clean, y), "adv_top5": _top5(adv, y),
                 "fooled_rounded": fooled if adv8 is None else adv8.argmax(1) != before}
        if again is not None:
            found["by_chance"] = again.argmax(1) != before
        if self.target is not None:
            found["others"] = before != self.target
            found["hit"] = found["others"] & (after == self.target)
        after, *read = torch.stack([after, *(value.long() for value in found.values())]).cpu()
        for key, value in zip(found, read, strict=True):  # read from the device once
            self.counts[key] = self.counts.get(key, 0) + int(value.sum())
        for k, count in zip(*after[read[0].bool()].unique(return_counts=True), strict=True):
            self.became[str(int(k))] = self.became.get(str(int(k)), 0) + int(count)
        self.n += len(y)

    def state(self):
        """A dict from which UapCounts(target, **state) is restored; such dicts can be added."""
        return {"n": self.n, "counts": self.counts, "became": self.became}

    def figures(self, labelled, class_names):
        """{metric: share}; accuracies only if the labels are classes of the target network.

        dominant_class, the most frequent prediction of fooled images, is None if there are none.
        """
        c, n = self.counts, self.n
        result = {"fooling_ratio": share(c["fooled"], n)}
        if "by_chance" in c:
            result["changed_by_chance"] = share(c["by_chance"], n)
        if self.target is not None:
            result["targeted_success"] = share(c["hit"], c["others"])
        if labelled:
            result.update(
                clean_acc=share(c["clean"], n), adv_acc=share(c["adv"], n),
                robust_acc=share(c["both"], n),
                attack_robustness=share(c["both"], c["clean"]),
                clean_acc_top5=share(c["clean_top5"], n), adv_acc_top5=share(c["adv_top5"], n))
        most = min(map(int, self.became), key=lambda k: (-self.became[str(k)], k), default=None)
        result["dominant_class"] = {
            "class": most, "name": class_name(class_names, most),
            **share(self.became[str(most)], c["fooled"])} if c["fooled"] else None
        result["fooling_ratio_rounded"] = share(c["fooled_rounded"], n)
        return result


def class_name(names, k):
    """Name of class k, or its number if it has none."""
    return names[k] if k < len(names) else str(k)


def _top5(logits, y):
    return (logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]).any(1)
