"""Does a defence only hide the gradient? The field's checklist as figures, thresholds, a verdict.

The signs are those of Athalye et al. (arXiv:1802.00420, Sec. 3.1) and Carlini et al.
(arXiv:1902.06705, checklist). Each compares figures of a naive attacker, who follows the defended
network's own gradient, with those of attackers who should not do better. The thresholds below are
printed in every report; they were set before anything was measured.
"""

import torch

from utils.attack.balls import norm_of
from utils.attack.chance import chance_of
from utils.attack.core import Tally, cross_entropy, forward, gradient
from utils.attack.random_layers import drawing_from
from utils.cells import Progress
from utils.data import to_float

POINTS = 0.05      # in attack_robustness: by how much one attack must beat another
LEFT = 0.05        # highest attack_robustness allowed at the largest eps
AGREE = 0.75       # share of gradient signs that must agree where the forward passes do
SAME = 0.01        # forward passes agree: at most this share of predictions differs
FACTOR = 10        # by how much a gradient may be longer or shorter than the vanilla network's
ASCENT = 0.5       # net rise of the loss over its total variation
BLIND = 0.05       # share of images whose gradient may be zero

VERDICTS = ("no sign of gradient masking", "one sign of gradient masking: look closer",
            "gradient masking")


def ascents(losses):
    """Net rise over total variation for each image (N,): 1 always uphill, 0 a random walk.

    losses (steps, N) along the attack; images whose loss never changes count as 0.
    """
    change = losses.diff(dim=0)
    return change.sum(0) / change.abs().sum(0).clamp_min(1e-30)


def twin_differences(model, twin, images, chance, batch_size, device, *, workers=0, progress=None,
                     cell=None):
    """Forward passes and input gradients of a defended network and its undefended twin, compared.

    progress: Progress of utils/cells.py, which saves the pass as `cell`.

    -> {changed: share of predictions that differ, logits: largest difference of a logit,
    agree: share of equal gradient signs where both are nonzero, mean over images, factor: ratio of
    the largest gradient entries, median over images}; the last two over images with entries where
    both are nonzero, None if there are none
    """
    def compared(index, x):
        x, y = to_float(x.to(device, non_blocking=True)), images.labels[index].to(device)
        with drawing_from(chance_of(chance[index], x)):
            with torch.no_grad():
                ours, theirs = forward(model, x, y), forward(twin, x, y)
            g, h = (gradient(each, x, y, cross_entropy, Tally(x), slice(None))[2]
                    for each in (model, twin))
        both = ((g != 0) & (h != 0)).flatten(1)
        same = (both & (g.sign() == h.sign()).flatten(1)).sum(1) / both.sum(1)
        factor, there = norm_of(g, "linf") / norm_of(h, "linf"), both.any(1)
        return {"changed": int((ours.argmax(1) != theirs.argmax(1)).sum()),
                "largest": (ours - theirs).abs().max().item(), "agree": same[there].tolist(),
                "factor": factor[there].tolist()}
    found = (progress or Progress()).count(
        images, torch.arange(len(images)), compared, batch_size=batch_size, cell=cell,
        workers=workers, desc="twin")
    agree, factor = found["agree"], torch.tensor(found["factor"])
    return {"changed": found["changed"] / len(images), "logits": found["largest"],
            "agree": sum(agree) / len(agree) if agree else None,
            "factor": factor.median().item() if agree else None}


def checklist(ar, *, radii, queries, losses, blind, twin):
    """The report's lines [{sign, figure, flagged_if, flagged: True, False, None: does not apply}].

    ar {fgsm, pgd, square}, and {transfer, adaptive} for a defended network: attack_robustness in
    [0, 1]; radii {eps as text: the same under PGD}, ascending; losses: mean loss at each step and
    `ascent`; blind: share of images with a zero gradient; twin: from twin_differences(), None for
    an undefended network, which is its own twin.
    """
    def p(value):
        return f"{100 * value:.1f} %"

    white, points = min(ar["fgsm"], ar["pgd"]), f"lower by more than {100 * POINTS:g} points"
    stronger = f"under the stronger of FGSM and PGD {p(white)}"
    lines = [
        ("one step beats many steps", f"AR under FGSM {p(ar['fgsm'])}, under PGD {p(ar['pgd'])}",
         f"AR under FGSM {points}", ar["pgd"] - ar["fgsm"] > POINTS),
        ("a gradient-free attack beats gradient attacks",
         f"AR under Square ({queries} queries) {p(ar['square'])}, {stronger}",
         f"AR under Square {points}", white - ar["square"] > POINTS),
        ("a larger radius does not reach zero", "AR under PGD: " + ", ".join(
            f"{p(value)} at eps {eps}" for eps, value in radii.items()),
         f"AR above {p(LEFT)} at the largest", list(radii.values())[-1] > LEFT),
        ("the loss does not rise", f"mean loss {losses['mean'][0]:.2f} at the start of PGD, "
         f"{losses['mean'][-1]:.2f} at its last step; net rise / total variation "
         f"{losses['ascent']:.2f}", f"net rise below {ASCENT:g}", losses["ascent"] < ASCENT),
        ("the gradient is zero", f"{p(blind)} of the images", f"above {p(BLIND)}", blind > BLIND)]
    if twin is not None:
        same, there = twin["changed"] <= SAME, twin["agree"] is not None
        agree, length = (
            f"{p(twin['agree'])} of the signs agree with the vanilla twin's",
            f"median {twin['factor']:.3g} times the vanilla twin's") if there else 2 * (
            "no image with gradient entries that are nonzero here and of the vanilla twin",)
        lines += [
            ("a transfer attack beats white-box attacks",
             f"AR under a transfer from the vanilla twin {p(ar['transfer'])}, {stronger}",
             f"AR under transfer {points}", white - ar["transfer"] > POINTS),
            ("an adaptive attacker does better", f"AR under naive PGD {p(ar['pgd'])}, under "
             f"adaptive PGD {p(ar['adaptive'])}", f"AR under adaptive PGD {points}",
             ar["pgd"] - ar["adaptive"] > POINTS),
            ("gradients point in other directions",
             f"{agree}; forward pass: {p(twin['changed'])} of predictions differ, logits by at "
             f"most {twin['logits']:.2g}", f"fewer than {p(AGREE)} of signs agree though at most "
             f"{p(SAME)} of predictions differ", twin["agree"] < AGREE if same and there else None),
            ("gradients have another length", length, f"above {FACTOR} or below 1/{FACTOR}",
             not 1 / FACTOR <= twin["factor"] <= FACTOR if there else None)]
    return [dict(zip(("sign", "figure", "flagged_if", "flagged"), line, strict=True))
            for line in lines]


def verdict(lines):
    """In words: none, one, or more signs."""
    return VERDICTS[min(2, sum(line["flagged"] is True for line in lines))]
