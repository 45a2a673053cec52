"""What is measured, one name for each figure, always with n and a 95 % Wilson interval.

    fooling_ratio       share of ALL images whose predicted class changes; no labels needed
    clean_acc, adv_acc  top-1 accuracy against the labels, before and after (top-5: _top5); an image
                        that the perturbation repairs counts as right
    robust_acc          right before and still right after, of all images
    attack_robustness   the same, of the images right before
    changed_by_chance   share of images that two forward passes of a random defence see differently
    targeted_success    share of the images not predicted as the target before that are after

A *cell* is one attack by one attacker on one network. What the attack returns is measured again by
the network that it was meant for: an image counts as fooled if that network is wrong about it and
the image lies in the ball and in [0, 1]. Networks with a random defence classify every image
`draws` times. A cell keeps, image by image, in how many of these draws the network was right before
and after; all figures, and worst cases, are made from that.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from utils.attack.balls import norm_of
from utils.audit import ascent
from utils.data import to_float
from utils.precision import synchronize

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
COUNTED = ("zero_gradient", "gradients", "queries")  # of the attacks' reports


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
def predictions(models, pixels, device, *, delta=None, batch_size=50):
    """Predicted classes (S, N) of S models at clamp(x + delta, 0, 1); pixels (N, C, H, W) uint8."""
    found = []
    for batch in pixels.split(batch_size):
        x = to_float(batch.to(device))
        if delta is not None:
            x = (x + delta.to(device)).clamp_(0, 1)
        found.append(torch.stack([model(x).argmax(1) for model in models]).cpu())
    return torch.cat(found, 1)


# ------------------------------------------------------------- per-image attacks: cells

@dataclass(frozen=True)
class Attack:
    """run(model, x, y, generator=, report=) -> images, and the ball that they must lie in.

    follow: whether the cell keeps the mean of the loss at each step, from the attack's report.
    """
    title: str
    norm: str
    eps: float
    run: Callable
    follow: bool = False


@torch.no_grad()
def times_right(model, x, y, draws):
    """In how many of `draws` forward passes on x (n, C, H, W) the model says y: (n,) int64, CPU."""
    return sum((model(x).argmax(1) == y).long() for _ in range(draws)).cpu()


def times_right_on(model, images, *, draws, batch_size, device):
    """The same for all images in memory, (N,)."""
    return torch.cat([
        times_right(model, to_float(images.pixels[index].to(device)),
                    images.labels[index].to(device), draws)
        for index in torch.arange(len(images)).split(batch_size)])


def run_cell(attack, attacker, model, images, before, *, draws, batch_size, generator, device,
             desc):
    """The attack on `attacker`, measured on `model`, for the images with before (N,) > 0.

    -> what results.json keeps: before and after as lists of counts, seconds of the attack alone,
    the reports' counts, the largest norm and how many images were not allowed (they count as not
    attacked), and the loss over the steps if the attack is to be followed.
    """
    after, seconds, losses = torch.zeros_like(before), 0.0, []
    audit, counts = {"largest": 0.0, "outside": 0}, dict.fromkeys(COUNTED, 0)
    with tqdm(total=int((before > 0).sum()), desc=desc, unit="img", leave=False,
              disable=None) as bar:
        for index in (before > 0).nonzero()[:, 0].split(batch_size) if before.any() else ():
            x, y = to_float(images.pixels[index].to(device)), images.labels[index].to(device)
            report = {}
            synchronize(device)
            start = time.perf_counter()
            x_adv = attack.run(attacker, x, y, generator=generator, report=report)
            synchronize(device)
            seconds += time.perf_counter() - start
            allowed = in_ball(x, x_adv, attack, audit)
            after[index] = torch.where(allowed, times_right(model, x_adv, y, draws), before[index])
            for key in COUNTED:
                counts[key] += int(torch.as_tensor(report.get(key, 0)).sum())
            if attack.follow and "losses" in report:
                losses.append(torch.stack(report["losses"]).cpu())
            bar.update(len(index))
    followed = torch.cat(losses, 1) if losses else None  # (steps, images)
    return {"norm": attack.norm, "eps": attack.eps, "n": len(before), "draws": draws,
            "before": before.tolist(), "after": after.tolist(), "seconds": seconds, **counts,
            **audit, **({} if followed is None else {
                "losses": followed.mean(1).tolist(), "ascent": ascent(followed)})}


def in_ball(x, x_adv, attack, audit):
    """Which images (n,) bool lie in the ball and in [0, 1], on the CPU; counted in `audit`."""
    if x.device.type == "mps":  # which has no float64
        x, x_adv = x.cpu(), x_adv.cpu()
    size = norm_of(x_adv.double() - x.double(), attack.norm)
    boxed = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)  # NaN is neither
    size, boxed = torch.stack([size, boxed.double()]).cpu()  # waits once
    allowed = boxed.bool() & (size <= attack.eps * (1 + 1e-5) + 1e-6)  # float32 rounds x + delta
    audit["largest"] = max(audit["largest"], size.max().item())
    audit["outside"] += int((~allowed).sum())
    return allowed


def figures(cell):
    """{metric: share}; k and n may be fractions for a random network.

    With b and a the shares of an image's draws that are right before and after, robust_acc is the
    sum of a b over the images, attack_robustness that over the sum of b.
    """
    before, after, draws = cell["before"], cell["after"], cell["draws"]
    right = _divide(sum(before), draws)
    both = _divide(sum(b * a for b, a in zip(before, after, strict=True)), draws * draws)
    return {"clean_acc": share(right, cell["n"]), "robust_acc": share(both, cell["n"]),
            "attack_robustness": share(both, right)}


def _divide(total, by):
    return total // by if total % by == 0 else total / by


def worst_of(cells):
    """The cell that has, for every image, the result of the attack that was worst for it."""
    after = zip(*(cell["after"] for cell in cells), strict=True)
    return {**{key: cells[0][key] for key in ("n", "draws", "before")},
            "after": [min(counts) for counts in after],
            "seconds": sum(cell["seconds"] for cell in cells)}


# --------------------------------------------------------------- universal perturbations

@dataclass
class UapCounts:
    """Counts of one perturbation on one target, summed over batches."""
    target: int = None              # class that a targeted perturbation steers to
    n: int = 0
    counts: dict = field(default_factory=dict)
    became: torch.Tensor = None     # how often a fooled image became each class

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
        became = torch.bincount(after[read[0].bool()], minlength=clean.shape[1])
        self.became = became if self.became is None else self.became + became
        self.n += len(y)

    def figures(self, labelled, class_names):
        """{metric: share}; accuracies only where the labels mean something to the target.

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
        most = int(self.became.argmax())
        result["dominant_class"] = {
            "class": most, "name": class_name(class_names, most),
            **share(int(self.became[most]), c["fooled"])} if c["fooled"] else None
        result["fooling_ratio_rounded"] = share(c["fooled_rounded"], n)
        return result


def class_name(names, k):
    """Of class k; its number where it has no name."""
    return names[k] if k < len(names) else str(k)


def _top5(logits, y):
    return (logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]).any(1)
