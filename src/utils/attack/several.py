"""Several attacks in turn: worst_case, the quick mixture of most tables, and full AutoAttack.

    paper                                      here
    2003.01690, Sec. 6, AutoAttack             _parts
    2103.01208, the same in L1                 _parts, `stages`
    flags_doc.md of the authors' repository    flags_of
"""

from functools import partial
from math import ceil

import torch

from utils.attack.adaptive import draws_of, eot
from utils.attack.apgd import apgd
from utils.attack.balls import NORMS
from utils.attack.chance import chance_of
from utils.attack.core import attack, forward, margin, measure, one_of, two_or_more
from utils.attack.fab import fab
from utils.attack.random_layers import drawing_from, rows_passing
from utils.attack.square import images_only, square
from utils.errors import UserError

TARGETS, ENOUGH = 9, 4  # of APGD-T, as published; classes that the targeted DLR loss needs
VERSIONS = ("standard", "plus", "rand")
QUERIES, DRAWS = 5000, 20          # of AutoAttack's Square; of `rand`, at least
LOOKED_AT = 50                     # images that are passed through the network twice
SAME = 1e-4                        # logits that differ by less, relative to their norm, are equal
SQUARE_GAIN, BLIND = 0.002, 0.05   # shares of the images above which a flag is raised


@attack
def worst_case(model, x, y, attacks, *, targeted=False, generator=None, report=None):
    """Run each attack on the images not fooled so far; x where none succeeds.

    attacks: {name: attack(model, x, y, generator=, report=)}, such as functools.partial(pgd,
    eps=...); with targeted=True they are called with targeted=True. For each attack the report
    counts the images `tried` and `fooled`, and those not fooled whose gradient was zero
    (`zero_gradient`) or whose loss never rose (`flat`): they may only look robust.
    """
    if not isinstance(attacks, dict):
        raise UserError("worst_case takes attacks by name; type {'pgd': partial(pgd, eps=...)}")
    result, found, _ = _in_turn(model, x, y, attacks, targeted, generator)
    if report is not None:
        report.update(found)
    return result


def _in_turn(model, x, y, attacks, targeted, generator):
    """-> worst_case's result, its report, whether all gradients of all attacks were zero (N,)."""
    own, result, found = chance_of(generator, x), x.clone(), {}
    more = {"targeted": True} if targeted else {}
    alive = ~measure(model, x, y, margin, targeted)[1] if len(x) else torch.zeros(0).bool()
    seen, moved = torch.zeros_like(alive), torch.zeros_like(alive)
    for k, (name, run) in enumerate(attacks.items()):
        who, one = alive.nonzero()[:, 0], {}
        fooled = alive[who]
        if len(who):
            with rows_passing(who):
                x_adv = run(model, x[who], y[who], generator=own[who].fold(k), report=one, **more)
            x_adv = x_adv[0] if isinstance(x_adv, tuple) else x_adv  # cw_l2 and fab give a mask too
            fooled = measure(model, x_adv, y[who], margin, targeted, index=who)[1]
            result[who[fooled]], alive[who[fooled]] = x_adv[fooled], False
        blind = one.pop("zero_gradient", torch.zeros_like(fooled))
        if one.get("gradients"):
            seen[who], moved[who] = True, moved[who] | ~blind
        if "flat" in one:
            one["flat"] = int((one["flat"] & ~fooled).sum())
        found[name] = {**one, "tried": len(who), "fooled": int(fooled.sum()),
                       "zero_gradient": int((blind & ~fooled).sum())}
    return result, found, seen & ~moved


def _classes(model, x, y):
    with torch.no_grad(), drawing_from(chance_of(None, x[:1])):  # not counted as a draw
        return forward(model, x[:1], y[:1]).shape[1]


def _totals(found, blind):
    """The report of attacks that are called as one: each attack's, and the totals."""
    return found | {"zero_gradient": blind} | {
        key: sum(one.get(key, 0) for one in found.values()) for key in ("gradients", "queries")}


def _nothing(x):
    return x, {}, torch.zeros(len(x), dtype=torch.bool, device=x.device)


# ------------------------------------------------------------------------ the quick mixture

@attack
def strongest_quick(model, x, y, *, eps, queries=1000, targeted=False, generator=None,
                    report=None):
    """The quick mixture, within Linf eps: APGD-CE, APGD-T, Square, as in worst_case.

    APGD-T runs on the targeted DLR loss towards each of the nine most likely wrong classes, or all
    if there are fewer. For two and three classes, where that loss is not defined, it uses the
    margin loss. quick_title says what is run. The report is worst_case's, plus the totals.
    """
    images_only(x)
    result, found, blind = _nothing(x)
    if len(x):
        result, found, blind = _in_turn(model, x, y, _quick(_classes(model, x, y), eps, queries),
                                        targeted, generator)
    if report is not None:
        report.update(_totals(found, blind))
    return result


def quick_title(classes, queries):
    """What strongest_quick runs for `classes` classes: 'APGD-CE + APGD-T + Square 1000'."""
    return " + ".join(_quick(classes, 0, queries))


def _quick(classes, eps, queries):
    """{name: attack} of strongest_quick; the name says how APGD-T differs from the paper's."""
    return {"APGD-CE": partial(apgd, eps=eps), **_targeted_apgd(classes, TARGETS, eps=eps),
            f"Square {queries}": partial(square, eps=eps, queries=queries)}


def _targeted_apgd(classes, published, **options):
    """{name: APGD-T}, as far as the number of classes allows."""
    two_or_more(classes)
    targets, enough = min(published, classes - 1), classes >= ENOUGH
    less = _less(classes, published) + ["margin loss"] * (not enough)
    return {_named("APGD-T", less): partial(
        apgd, loss="dlr_targeted" if enough else "margin_targeted", targets=targets, **options)}


def _less(classes, published):
    """['4 targets'] if there are fewer (here 4) than published, else []."""
    wrong = classes - 1
    return [f"{wrong} target{'s' * (wrong > 1)}"] * (wrong < published)


def _named(name, less):
    return name + (f" ({', '.join(less)})" if less else "")


# ------------------------------------------------------------------------ AutoAttack

@attack
def autoattack(model, x, y, *, eps, norm="linf", version="standard", targeted=False,
               generator=None, report=None):
    """AutoAttack: APGD-CE, APGD-T, FAB-T and Square, each on the images not fooled so far.

    norm: 'linf', 'l2', 'l1'; in L1, APGD starts with larger radii, APGD-CE runs five times, APGD-T
    towards five classes. version: 'plus' runs APGD-CE and APGD-DLR five times, then Square, APGD-T,
    and FAB-T five times; 'rand', for random defences, APGD-CE and APGD-DLR on the mean gradient of
    20 draws or more: a model's own eot is repeated. Fewer classes: as in strongest_quick.
    The report is worst_case's, with `flat`, plus the totals; `random`, how many of the first 50
    images got different logits in a second pass (0 under 'rand'); and `flags`, a line for each sign
    that the result may be wrong.
    """
    one_of("norm", norm, NORMS)
    one_of("version", version, VERSIONS)
    if version != "rand":
        images_only(x)
    result, found, blind = _nothing(x)
    changed = 0
    if len(x):
        parts = _parts(_classes(model, x, y), norm, eps, version)
        if version == "rand":
            model = eot(model, _times(draws_of(model)))
        else:
            changed = _changed(model, x, y)
        result, found, blind = _in_turn(model, x, y, parts, targeted, generator)
    if report is not None:
        report.update(_totals(found, blind), random=changed,
                      flags=flags_of(found, changed, len(x)))
    return result


def autoattack_title(classes, draws=0, norm="linf"):
    """'AutoAttack', with its parts where few classes change them; or 'AutoAttack rand (EOT of 20)'.

    draws: those of a random model's own eot, 1 without one; 0 if the model is not random.
    """
    if draws:
        return f"AutoAttack rand (EOT of {draws * _times(draws)})"
    parts = " + ".join(_parts(classes, norm, 0, "standard"))
    return "AutoAttack" + (f": {parts}" if "(" in parts else "")


def _times(draws):
    """How often `rand` repeats a model that averages `draws` draws itself."""
    return ceil(DRAWS / draws)


def _parts(classes, norm, eps, version):
    """{name: attack}, with the settings of the authors' code."""
    same, l1 = {"eps": eps, "norm": norm}, norm == "l1"
    climb = partial(apgd, stages=l1, **same)
    towards = _targeted_apgd(classes, 5 if l1 else TARGETS, stages=l1, **same)
    border = partial(fab, targets=min(TARGETS, classes - 1), **same)
    border_name = _named("FAB-T", _less(classes, TARGETS))
    queries = {f"Square {QUERIES}": partial(square, queries=QUERIES, rescale=False, **same)}
    dlr = {"APGD-DLR": partial(climb, loss="dlr")} if classes > 2 else {
        "APGD-margin": partial(climb, loss="margin")}  # two classes have no DLR
    if version == "rand":
        return {"APGD-CE": climb} | dlr
    if version == "plus":
        again = {name: partial(one, restarts=5) for name, one in ({"APGD-CE": climb} | dlr).items()}
        # unlike the authors' code: targeted FAB, five times, also in place of untargeted FAB
        return again | queries | towards | {border_name: partial(border, restarts=5)}
    return {"APGD-CE": partial(climb, restarts=5 if l1 else 1), **towards, border_name: border,
            **queries}


@torch.no_grad()
def _changed(model, x, y):
    """How many of the first LOOKED_AT images get different logits in two passes."""
    x, y, draws = x[:LOOKED_AT], y[:LOOKED_AT], chance_of(None, x[:LOOKED_AT])
    with drawing_from(draws):  # not counted as draws
        one, two = (forward(model, x, y) for _ in range(2))
    return int(((one - two).norm(dim=1) > SAME * one.norm(dim=1)).sum())


def flags_of(found, changed, n):
    """One line for each sign that robust accuracy may be overestimated.

    found: {attack: its report}, on n images; changed: how many had random logits.
    """
    flags = [f"random defence: the logits of {changed} images differed in two passes; type "
             "version='rand'"] * (changed > 0)
    for name, one in found.items():
        share = f"{{}} of {one['tried']} images under {name}"
        if one["zero_gradient"] > BLIND * one["tried"]:
            flags.append("zero gradient: " + share.format(one["zero_gradient"]))
        elif one.get("flat", 0) > BLIND * one["tried"]:
            flags.append("the loss never rose: " + share.format(one["flat"]))
        if name.startswith("Square") and one["fooled"] > SQUARE_GAIN * n:
            flags.append(f"Square fooled {one['fooled']} of {one['tried']} images that gradients "
                         "had left: they may be masked")
    return flags
