"""What a network is worth under attack, in cells: one attack by one attacker on one network.

A library, no script: gcm.py and benchmarks/attack_table.py stand on it. What an attack returns is
measured again, by the network that it was meant for: an image counts as fooled if that network errs
and the image lies in the ball and in [0, 1]. Networks that draw at every look are asked several
times. A cell keeps, image by image, in how many of its `draws` looks the network was right before
and after; all figures, and worst cases, are made from that:

    clean_acc            mean over images of the share of looks that are right before: b
    adv_acc              ... after: a
    attack_robustness    sum of a b over sum of b: right after, of those right before
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from attacks import apgd, cw_l2, fgsm, pgd, square
from utils.audit import Trace, ascent
from utils.balls import column, norm_of
from utils.data import PRESETS, Images, to_float
from utils.defenses import adaptive, defend, is_random
from utils.metrics import share
from utils.precision import Fast, synchronize
from utils.run import make_generator

STEPS, RELATIVE = 20, 3 / 40  # RobustART's pgds: steps, and step size over eps
FARTHER = (4, 8)  # times eps: whether robustness falls to zero

COUNTED = ("zero_gradient", "gradients", "queries")  # of the attacks' reports


@dataclass(frozen=True)
class Attack:
    """run(model, x, y, generator=, report=) -> images, and the ball that they must lie in."""
    title: str
    norm: str
    eps: float
    run: Callable


@torch.no_grad()
def looks(model, x, y, draws):
    """In how many of `draws` looks at x (n, C, H, W) the model says y: (n,) int64, on the CPU."""
    return sum((model(x).argmax(1) == y).long() for _ in range(draws)).cpu()


def looks_at(model, images, *, draws, batch_size, device):
    """The same of all images in memory."""
    return torch.cat([
        looks(model, to_float(images.pixels[index].to(device)), images.labels[index].to(device),
              draws) for index in torch.arange(len(images)).split(batch_size)])


def run_cell(attack, attacker, model, images, before, *, draws, batch_size, generator, device,
             desc):
    """The attack through `attacker`, measured on `model`, on the images with before (n,) > 0.

    -> what results.json keeps: before and after as one string of counts each, seconds of the
    attack alone, the reports' counts, the largest norm and how many images were not allowed (they
    count as not attacked).
    """
    after, seconds = torch.zeros_like(before), 0.0
    audit, counts = {"largest": 0.0, "outside": 0}, dict.fromkeys(COUNTED, 0)
    with tqdm(total=int((before > 0).sum()), desc=desc, unit="img", leave=False,
              disable=None) as bar:
        for index in (before > 0).nonzero()[:, 0].split(batch_size):
            x, y = to_float(images.pixels[index].to(device)), images.labels[index].to(device)
            report = {}
            synchronize(device)
            start = time.perf_counter()
            x_adv = attack.run(attacker, x, y, generator=generator, report=report)
            synchronize(device)
            seconds += time.perf_counter() - start
            allowed = in_ball(x, x_adv, attack, audit)
            after[index] = torch.where(allowed, looks(model, x_adv, y, draws), before[index])
            for key in COUNTED:
                counts[key] += int(torch.as_tensor(report.get(key, 0)).sum())
            bar.update(len(index))
    return {"norm": attack.norm, "eps": attack.eps, "n": len(before), "draws": draws,
            "before": pack(before), "after": pack(after), "seconds": seconds, **counts, **audit}


def in_ball(x, x_adv, attack, audit):
    """Which images (n,) bool lie in the ball and in [0, 1], on the CPU; counted in `audit`."""
    size = norm_of(x_adv.cpu().double() - x.cpu().double(), attack.norm)
    boxed = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1).cpu()  # NaN is neither
    allowed = boxed & (size <= attack.eps * (1 + 1e-5) + 1e-6)  # float32 rounds x + delta
    audit["largest"] = max(audit["largest"], size.max().item())
    audit["outside"] += int((~allowed).sum())
    return allowed


# -------------------------------------------------------------------- figures

def pack(counts):
    return " ".join(map(str, counts.tolist()))


def unpack(text):
    return list(map(int, text.split()))


def figures(cell):
    """{metric: share}; of a random network k and n may be fractions."""
    before, after, draws = unpack(cell["before"]), unpack(cell["after"]), cell["draws"]
    right = _divide(sum(before), draws)
    both = sum(b * a for b, a in zip(before, after, strict=True))
    return {"clean_acc": share(right, cell["n"]),
            "adv_acc": share(_divide(sum(after), draws), cell["n"]),
            "attack_robustness": share(_divide(both, draws * draws), right)}


def _divide(total, by):
    return total // by if total % by == 0 else total / by


def worst_case(cells):
    """The cell of what every image was worth under the attack that was worst for it."""
    after = zip(*(unpack(cell["after"]) for cell in cells), strict=True)
    return {**{key: cells[0][key] for key in ("n", "draws", "before")},
            "after": " ".join(str(min(counts)) for counts in after),
            "seconds": sum(cell["seconds"] for cell in cells)}


# ----------------------------------------------------------------- the attacks

def catalogue(eps, queries, stop_early=False, random=False):
    """{name: Attack}; eps {norm: radius}. Call it for every cell: pgd_linf's loss has a memory.

    stop_early: of the pgds; at the larger radii always, but never where the network is random.
    """
    def steps(title, norm, scale=1, early=stop_early and not random, **settings):
        """RobustART's pgd with our settings; scale: times eps."""
        at = eps[norm] * scale if norm != "linf" else min(1.0, eps[norm] * scale)
        return Attack(f"{title}={show(at, norm)}", norm, at, partial(
            pgd, norm=norm, eps=at, alpha=RELATIVE * at, steps=STEPS, stop_early=early,
            **{"projection": "rescale", **settings}))

    linf = f"Linf {show(eps['linf'], 'linf')}"
    return {
        "fgsm": Attack(f"FGSM {linf}", "linf", eps["linf"], partial(fgsm, eps=eps["linf"])),
        "pgd_l1": steps("PGD L1", "l1", step="dense"),
        "pgd_l2": steps("PGD L2", "l2"),
        "pgd_linf": steps("PGD Linf", "linf", loss=Trace()),
        "cw_pgd_l2": steps("C&W L2", "l2", loss="margin"),
        "pgd_l1_exact": steps("PGD L1 sparse, exact", "l1", step="sparse", projection="exact"),
        "cw_l2": Attack(f"C&W (search) L2={show(eps['l2'], 'l2')}", "l2", eps["l2"],
                        partial(cw_within, eps=eps["l2"])),
        "apgd": Attack(f"APGD {linf}", "linf", eps["linf"], partial(apgd, eps=eps["linf"])),
        "square": Attack(f"Square {linf}", "linf", eps["linf"],
                         partial(square, eps=eps["linf"], queries=queries)),
        **{f"pgd_linf x{k}": steps("PGD Linf", "linf", k, early=not random) for k in FARTHER}}


def cw_within(model, x, y, *, eps, generator, report):
    """C&W's images where their L2 norm is at most eps, and the clean ones elsewhere."""
    x_adv, _ = cw_l2(model, x, y, binary_steps=5, steps=40, c=0.01, generator=generator,
                     report=report)
    return torch.where(column(norm_of(x_adv - x, "l2") <= eps, x), x_adv, x)


def show(eps, norm):
    return f"{255 * eps:.4g}/255" if norm == "linf" else f"{eps:.4g}"


def radii(images, size, linf=None, l2=None, l1=None):
    """{norm: eps}: RobustART's 8/255, 8, 1600 on photographs, as much per pixel on small images.

    Digits, which are easy, take their preset in linf, and l2 and l1 in proportion.
    """
    linf = linf or (PRESETS[images.kind].eps if images.kind in ("digits", "mnist") else 8 / 255)
    part = min(1.0, images.channels * size * size / (3 * 224 * 224))
    return {"linf": linf, "l2": 255 * linf * part ** 0.5 if l2 is None else l2,
            "l1": 51000 * linf * part if l1 is None else l1}


# ------------------------------------------------------------------ a network

@dataclass(eq=False)
class Network:
    """A network with its images in memory, to be put behind defences and attacked.

    eps {norm: radius}; epsilon, low: of the defences; draws: looks at a random one; amp: precision
    of the attackers' gradients ('off', 'bf16').
    """
    name: str
    model: nn.Module
    images: Images
    size: int
    eps: dict
    epsilon: float
    low: int
    draws: int
    queries: int
    stop_early: bool
    amp: str
    batch_size: int
    seed: int
    device: torch.device
    before: dict = field(default_factory=dict)

    def __post_init__(self):
        self.model = self.model.to(memory_format=torch.channels_last)  # the faster on photographs
        self.fast = self.model if self.amp == "off" else Fast(self.model, self.amp, "channels_last")

    def behind(self, defense, w, generator=None, fast=False):
        """The network, or its fast copy, behind a defence that draws from the generator."""
        return defend(self.fast if fast else self.model, defense, size=self.size, w=w,
                      generator=generator or make_generator(self.seed), epsilon=self.epsilon,
                      low=self.low)

    def looks(self, defense):
        return self.draws if is_random(defense) else 1

    def right(self, defense, w):
        """In how many looks the defended network is right about every image, (N,) int64."""
        if (defense, w) not in self.before:
            self.before[defense, w] = looks_at(
                self.behind(defense, w), self.images, draws=self.looks(defense),
                batch_size=self.batch_size, device=self.device)
        return self.before[defense, w]

    def cell(self, defense, attacker, attack, w):
        """The cell of one attack. attacker: 'naive', who takes the defended network's gradient;
        'adaptive', who knows the defence; 'vanilla', who attacks the network without it. These two
        are no part of the published protocol: their pgds stop at success.
        """
        generator = make_generator(self.seed)  # one for the attack and the defence
        model = self.behind(defense, w, generator)
        seen = self.fast if attacker == "vanilla" else self.behind(defense, w, generator, fast=True)
        if attacker == "adaptive":
            seen = adaptive(seen, self.draws)
        early = self.stop_early or attacker != "naive"
        one = catalogue(self.eps, self.queries, early, is_random(defense))[attack]
        cell = run_cell(one, seen, model, self.images, self.right(defense, w),
                        draws=self.looks(defense), batch_size=self.batch_size, generator=generator,
                        device=self.device, desc=f"{self.name} {defense} {attacker} {attack}")
        trace = one.run.keywords.get("loss")
        if isinstance(trace, Trace) and trace.calls and not early:
            losses = trace.losses(STEPS)
            cell |= {"losses": losses.mean(1).tolist(), "ascent": ascent(losses)}
        return {"model": self.name, "defense": defense, "w": w, "attacker": attacker,
                "attack": attack, "title": one.title, **cell}
