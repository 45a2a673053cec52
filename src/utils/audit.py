"""Does a defence only hide the gradient? The field's checklist as figures, thresholds, a verdict.

The signs are those of Athalye et al. (arXiv:1802.00420, Sec. 3.1) and Carlini et al.
(arXiv:1902.06705, checklist). Each compares figures of the attacker who follows the defended
network's own gradient with others that a sound evaluation could not lose to. The thresholds stand
below and in every report; they were set before anything was measured.
"""

import torch

from utils.attacking import Tally, cross_entropy, forward, gradient
from utils.balls import norm_of
from utils.data import to_float

POINTS = 0.05      # by how much of attack_robustness one attack must beat another
LEFT = 0.05        # attack_robustness that may be left at the largest eps
AGREE = 0.75       # share of gradient signs that must agree where the forward passes do
SAME = 0.01        # forward passes agree: at most this share of predictions differs
FACTOR = 10        # by how much a gradient may be longer or shorter than the vanilla network's
ASCENT = 0.5       # net rise of the loss over all that it went up and down
BLIND = 0.05       # share of images that may have no gradient at all

VERDICTS = ("no sign of gradient masking", "one sign of gradient masking: look closer",
            "gradient masking")


class Trace:
    """The cross-entropy, to be climbed by an attack, that remembers its values."""

    def __init__(self):
        self.calls = []

    def __call__(self, logits, y):
        value = cross_entropy(logits, y)
        self.calls.append(value.detach().cpu())
        return value

    def losses(self, steps):
        """(steps, N) over all batches; all must have been attacked with that many steps."""
        return torch.cat([torch.stack(self.calls[i:i + steps])
                          for i in range(0, len(self.calls), steps)], 1)


def ascent(losses):
    """Net rise over the sum of all rises and falls, mean over images: 1 uphill, 0 a random walk.

    losses (steps, N) along the attack; images whose loss never changes count as 0.
    """
    change = losses.diff(dim=0)
    return (change.sum(0) / change.abs().sum(0).clamp_min(1e-30)).mean().item()


def compare(model, twin, images, batch_size, device):
    """Forward passes and input gradients of a defended network and of its undefended twin.

    -> {changed: share of predictions that differ, logits: largest difference of a logit,
    agree: share of equal gradient signs where both have one, mean over images, factor: median
    over images of the ratio of largest gradient entries}
    """
    changed, logits, agree, factor = 0, 0.0, [], []
    for index in torch.arange(len(images)).split(batch_size):
        x, y = to_float(images.pixels[index].to(device)), images.labels[index].to(device)
        with torch.no_grad():
            ours, theirs = forward(model, x, y), forward(twin, x, y)
        changed += int((ours.argmax(1) != theirs.argmax(1)).sum())
        logits = max(logits, (ours - theirs).abs().max().item())
        g, h = (gradient(each, x, y, cross_entropy, Tally(x), slice(None))[2]
                for each in (model, twin))
        both = ((g != 0) & (h != 0)).flatten(1)
        same = (both & (g.sign() == h.sign()).flatten(1)).sum(1) / both.sum(1).clamp_min(1)
        agree += same.tolist()
        factor.append(norm_of(g, "linf") / norm_of(h, "linf").clamp_min(1e-38))
    return {"changed": changed / len(images), "logits": logits, "agree": sum(agree) / len(agree),
            "factor": torch.cat(factor).median().item()}


def checklist(ar, *, radii, queries, losses, blind, twin):
    """The report's lines [{sign, figure, flagged_if, flagged: True, False or None (no sign)}].

    ar {fgsm, pgd, square} and, of a defended network, {transfer, adaptive}: attack_robustness in
    [0, 1]; radii {eps as text: the same under PGD}, growing; losses: mean loss at each step and
    `ascent`; blind: share of images without a gradient; twin: of compare(), None for an
    undefended network, which is its own twin.
    """
    def p(value):
        return f"{100 * value:.1f} %"

    white, points = min(ar["fgsm"], ar["pgd"]), f"by more than {100 * POINTS:g} points"
    better = f"by the better of FGSM and PGD {p(white)}"
    lines = [
        ("one step beats many", f"left by FGSM {p(ar['fgsm'])}, by PGD {p(ar['pgd'])}",
         f"FGSM leaves less, {points}", ar["pgd"] - ar["fgsm"] > POINTS),
        ("no gradient beats the gradient", f"left by Square ({queries} queries) "
         f"{p(ar['square'])}, {better}",
         f"Square leaves less, {points}", white - ar["square"] > POINTS),
        ("a larger radius does not help", "left by PGD: " + ", ".join(
            f"{p(left)} at eps {eps}" for eps, left in radii.items()),
         f"more than {p(LEFT)} at the largest", list(radii.values())[-1] > LEFT),
        ("the loss does not rise", f"mean loss {losses['mean'][0]:.2f} at the start of PGD, "
         f"{losses['mean'][-1]:.2f} at its last step; net rise / ups and downs "
         f"{losses['ascent']:.2f}", f"net rise below {ASCENT:g}", losses["ascent"] < ASCENT),
        ("no gradient at all", f"{p(blind)} of the images", f"above {p(BLIND)}", blind > BLIND)]
    if twin is not None:
        same = twin["changed"] <= SAME
        lines += [
            ("transfer beats white-box", f"left by PGD on the vanilla twin {p(ar['transfer'])}, "
             f"{better}", f"transfer leaves less, {points}", white - ar["transfer"] > POINTS),
            ("who knows the defence gains", f"left by PGD {p(ar['pgd'])}, by PGD that knows "
             f"{p(ar['adaptive'])}", f"the latter less, {points}",
             ar["pgd"] - ar["adaptive"] > POINTS),
            ("gradients point elsewhere", f"signs that agree with the vanilla twin's "
             f"{p(twin['agree'])}; forward: {p(twin['changed'])} of predictions differ, logits by "
             f"at most {twin['logits']:.2g}", f"signs agree below {p(AGREE)} though at most "
             f"{p(SAME)} of predictions differ", twin["agree"] < AGREE if same else None),
            ("gradients of another length", f"{twin['factor']:.3g} times the vanilla twin's, "
             "median", f"above {FACTOR} or below 1/{FACTOR}",
             not 1 / FACTOR <= twin["factor"] <= FACTOR)]
    return [dict(zip(("sign", "figure", "flagged_if", "flagged"), line, strict=True))
            for line in lines]


def verdict(lines):
    """In words: none, one, or more signs."""
    return VERDICTS[min(2, sum(line["flagged"] is True for line in lines))]
