"""What is measured, one name each, always with n; and the tables that show it.

    fooling_ratio       share of ALL images whose predicted class changes; no labels needed
    clean_acc, adv_acc  top-1 accuracy against the labels, before and after (top-5: _top5)
    attack_robustness   correct before and after / correct before
    changed_by_chance   share of the images that two looks of a random defence see differently
    targeted_success    share of the images not predicted as the target before that are after
"""

import math

import torch

from utils.data import to_float

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


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


def percent(s):
    """A share with its interval: '66.0 % (60.5-71.1, n=300)'."""
    return (f"{100 * s['value']:.1f} % ({100 * s['low']:.1f}-{100 * s['high']:.1f}, "
            f"n={s['n']:.6g})")


def interval(s):
    """A share with its interval in a table whose head says %: '66.0 (60.5-71.1)'."""
    return f"{100 * s['value']:.1f} ({100 * s['low']:.1f}-{100 * s['high']:.1f})"


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


def markdown(head, rows):
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
