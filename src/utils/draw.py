"""Pictures as PNG bytes: perturbations, curves, bars, examples. It draws what it is given.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.augment import FAMILIES
from utils.data import read_image
from utils.errors import UserError
from utils.measure import share

COLOURS = BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
BLACK = "#000000"


def _figure(width, height):
    from matplotlib.figure import Figure  # half a second, needed only when something is drawn

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure):
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # class and file names are not formulas
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's, about letters missing from its font
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def encode_delta(delta):
    """A perturbation (C, H, W) on the [0, 1] scale as an 8-bit PNG that can be read back.

    Grey level 128 is zero. A step of 1/255 is `delta_gain` levels, a number stored in the file's
    text. The picture is easy to see and, up to 127/255, only rounded to 8 bits.
    """
    steps = (delta * 255).round()
    gain = max(1, int(127 // max(1, steps.abs().max().item())))
    array = (steps * gain + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    text = PngInfo()
    text.add_text("delta_gain", str(gain))
    buffer = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(
        buffer, "png", pnginfo=text)
    return buffer.getvalue()


def decode_delta(path):
    """The PNG of encode_delta -> (delta (C, H, W), True); any other 8-bit image -> (delta, False).

    Without `delta_gain` in the file one grey level is read as 1/255.
    """
    image = read_image(path, "L")
    gain = image.info.get("delta_gain")
    if gain is not None and gain not in map(str, range(1, 128)):
        raise UserError(f"{path}: its delta_gain is {str(gain)[:20]}; wanted 1 to 127")
    array = torch.from_numpy(np.array(image))
    array = array[None] if array.ndim == 2 else array.permute(2, 0, 1)
    return (array.float() - 128) / (255 * int(gain or 1)), gain is not None


def curves(rows, title):
    """Loss and fooling ratio over the epochs, from the rows of log.csv."""
    figure = _figure(6, 3.4)
    left = figure.add_subplot()
    right = left.twinx()
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["loss"] for row in rows], color=BLUE, marker="o", ms=3)
    left.set(xlabel="epoch", title=title)
    left.set_ylabel("loss (maximised)", color=BLUE)
    right.plot(epochs, [100 * row["fooling_ratio"] for row in rows], color=ORANGE, marker="s", ms=3)
    right.set_ylabel("fooling ratio, % (monitored images)", color=ORANGE)
    right.set_ylim(0, 100)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    return _png(figure)


def training_curve(rows, title, **also):
    """Loss and accuracy over the epochs of a log.csv; also: a label for each further column.

    Older rows may lack columns; all columns but the loss may be missing.
    """
    figure = _figure(6, 3.4)
    left = figure.add_subplot()
    right = left.twinx()
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["loss"] for row in rows], color=BLUE, marker="o", ms=3)
    left.set(xlabel="epoch", title=title)
    left.set_ylabel("training loss", color=BLUE)
    if "val_loss" in rows[-1]:
        there = [(row["epoch"], row["val_loss"]) for row in rows if "val_loss" in row]
        left.plot(*zip(*there, strict=True), color=BLUE, marker="o", ms=3, ls=":")
        left.set_ylabel("training loss; dotted: held-out images", color=BLUE)
    columns = {"train_acc": "accuracy on the training batches", **also}
    for (column, label), colour, marker in zip(columns.items(), (*COLOURS[1:], BLACK), "s^vD",
                                               strict=False):
        there = [(row["epoch"], 100 * row[column]) for row in rows if row.get(column, "") != ""]
        if there:
            right.plot(*zip(*there, strict=True), color=colour, marker=marker, ms=3, label=label)
    right.set(ylim=(0, 100), ylabel="accuracy, %")
    right.legend(fontsize=8, loc="center right")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    return _png(figure)


def family_accuracies(found):
    """{operation: share of n images} -> {family: the mean share over its operations}.

    All operations change the same n images, so the interval of a mean is that of n images.
    """
    every = [name for names in FAMILIES.values() for name in names]
    families = {"clean": ("clean",), **FAMILIES, f"all {len(every)}": every}
    means = {}
    for family, operations in families.items():
        there = [found[name] for name in operations if name in found]
        if there:
            means[family] = share(sum(one["k"] for one in there) / len(there), there[0]["n"])
    return means


def corruptions(runs, title="", *, minus_first=False):
    """Accuracy by family of corruption, from {run: {operation: share}}, with intervals.

    minus_first: instead the difference between each run and the first, in points, with Newcombe's
    interval.
    """
    means = {run: family_accuracies(found) for run, found in runs.items()}
    first, *others = means
    lines = {run: {family: _difference(one, means[first][family]) if minus_first else
                   [100 * one[key] for key in ("value", "low", "high")]
                   for family, one in means[run].items()}
             for run in (others if minus_first else means)}
    families = list(means[first])[::-1]
    figure = _figure(6.4, 1.1 + (0.25 + 0.12 * len(lines)) * len(families))
    axes = figure.add_subplot()
    for k, (run, found) in enumerate(lines.items()):
        at = [i - 0.6 * ((k + 0.5) / len(lines) - 0.5) for i in range(len(families))]
        value, low, high = np.array([found[family] for family in families]).T
        axes.errorbar(value, at, xerr=(value - low, high - value), fmt="os^vDP"[k % 6], ms=5,
                      lw=1.4, capsize=2, color=COLOURS[k % len(COLOURS)], label=run)
    axes.set_yticks(range(len(families)), families)
    what = "accuracy, %"
    if minus_first:  # the legend names several others
        what = f"gain in accuracy{f' of {others[0]}' * (len(others) == 1)} over {first}, points"
    axes.set(title=title, ylim=(-0.6, len(families) - 0.4), xlabel=f"{what} (95 % intervals)")
    if minus_first:
        axes.axvline(0, color="black", lw=0.8)
    axes.grid(alpha=0.3, axis="x")
    if len(lines) > 1 or not minus_first:
        axes.legend(fontsize=8)
    return _png(figure)


def _difference(one, other):
    """One share minus another, in points: value, low, high (Newcombe 1998, method 10)."""
    value = one["value"] - other["value"]
    down, up = (np.hypot(one["value"] - one[a], other[b] - other["value"])
                for a, b in (("low", "high"), ("high", "low")))
    return 100 * value, 100 * (value - down), 100 * (value + up)


def variations(logs):
    """Accuracies over the epochs, a panel for each {variation: [rows of log.csv of each seed]}.

    The line is the mean over the seeds, the band spans the lowest to the highest. Older logs have
    no PGD-40.
    """
    columns = min(4, len(logs))
    lines = -(-len(logs) // columns)
    figure = _figure(1 + 2.9 * columns, 0.6 + 2.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(logs):]:
        axes.axis("off")
    for axes, (name, seeds) in zip(panels.flat, logs.items(), strict=False):
        for key, label, colour in (("clean", "clean", BLUE), ("fgs", "FGS", ORANGE),
                                   ("fgv", "FGV", GREEN), ("pgd40", "PGD-40", PINK)):
            if key not in seeds[0][0]:
                continue
            values = 100 * np.array([[row[key] for row in rows] for rows in seeds])
            epochs = [row["epoch"] for row in seeds[0]]
            axes.plot(epochs, values.mean(0), color=colour, label=label, lw=1.4)
            axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        axes.set(title=name, ylim=(-2, 102))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy, %")
    fullest = max(panels.flat, key=lambda axes: len(axes.lines))
    fullest.legend(fontsize=8, loc="center right")
    return _png(figure)


def exercise(shown, title="", most=4):
    """Images that all networks classify correctly: clean once, then attacked for each network.

    shown: {what it was trained on: {x (3, n, C, H, W) clean, FGS, FGV; seen (3, n); y (n,); and
    labels, for FGS and FGV}} -> PNG, or None if they have no image in common
    """
    where = [{x.tobytes(): i for i, x in enumerate(one["x"][0])} for one in shown.values()]
    common = [image for image in where[0] if all(image in other for other in where)][:most]
    if not common:
        return None
    lines = [[(f"trained on\n{name}\n{one['labels'][kind - 1]}", one, index, kind)
              for kind in (1, 2)] for (name, one), index in zip(shown.items(), where, strict=True)]
    clean, columns = ("clean", next(iter(shown.values())), where[0], 0), -(-len(lines) // 4)
    each = -(-len(lines) // columns)  # networks in a column
    figure = _figure((0.9 + 1.05 * len(common)) * columns + 0.3, 0.4 + 1.2 * (1 + 2 * each))
    figure.suptitle(title, fontsize=8)
    for k, column in enumerate(figure.subfigures(1, columns, squeeze=False)[0]):
        own = [clean, *sum(lines[k * each:(k + 1) * each], [])]
        for panels, line in zip(column.subplots(1 + 2 * each, len(common), squeeze=False),
                                own + [None] * (1 + 2 * each - len(own)), strict=True):
            _exercise_line(panels, line, common)
    return _png(figure)


def _exercise_line(panels, line, common):
    if line is None:
        for axes in panels:
            axes.axis("off")
        return
    label, one, index, kind = line
    panels[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    for axes, image in zip(panels, common, strict=True):
        i = index[image]
        _show(axes, torch.from_numpy(one["x"][kind, i]))
        _name(axes, one["seen"][kind, i], one["y"][i])


def gallery(pictures, columns=7):
    """{name: (C, H, W) in [0, 1]} as a grid."""
    lines = -(-len(pictures) // columns)
    figure = _figure(1.5 * columns, 1.7 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(pictures):]:
        axes.axis("off")
    for axes, (name, picture) in zip(panels.flat, pictures.items(), strict=False):
        _show(axes, picture)
        axes.set_title(name.replace("_", " "), fontsize=8, pad=3)
    return _png(figure)


def heatmap(values, rows, columns):
    """Fooling ratios in [0, 1], a row for each perturbation, a column for each target."""
    figure = _figure(3.5 + 0.9 * len(columns), 2 + 0.45 * len(rows))
    axes = figure.add_subplot()
    image = axes.imshow(100 * np.array(values), vmin=0, vmax=100, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center",
                      color="black" if value > 0.6 else "white")
    figure.colorbar(image, label="fooling ratio, %")
    return _png(figure)


def uaps(deltas, ratios, photograph=None, credit=""):
    """A photograph clean and perturbed, perturbations amplified; below, their fooling ratios.

    deltas {name: (C, H, W)}; ratios {name: {target: share}}; photograph: None, or x and x_adv
    (C, H, W), seen {network: (class before, after)}, uap (what was added).
    """
    squares, lines = len(deltas) + 2 * bool(photograph), len((photograph or {}).get("seen", ()))
    width = max(7, 2.1 * squares)
    heights = width / squares + 0.4 + 0.14 * lines, 2.6
    figure = _figure(width, sum(heights))
    top, bottom = figure.subfigures(2, height_ratios=heights)
    panels = top.subplots(1, squares, squeeze=False)[0]
    if photograph:
        for k, x, what in ((0, "x", "clean photograph"), (1, "x_adv", f"with {photograph['uap']}")):
            _show(panels[k], photograph[x])
            panels[k].set_title(what, fontsize=8, pad=3)
            _predictions(panels[k], {name: (classes[k], classes[0])
                                     for name, classes in photograph["seen"].items()}, size=7)
    for axes, (name, delta) in zip(panels[squares - len(deltas):], deltas.items(), strict=True):
        gain = _show_delta(axes, delta)
        axes.set_title(f"{name}\nat most {127.5 / gain:.0f}/255, shown × {gain:.3g}", fontsize=8,
                       pad=3)
    _bars(bottom.add_subplot(), ratios)
    if credit:
        figure.supxlabel(credit, fontsize=7)
    return _png(figure)


def _bars(axes, ratios):
    """{name: {target: share}} as a group of bars for each target, with intervals and n."""
    targets, width = list(next(iter(ratios.values()))), 0.8 / len(ratios)
    for k, (name, shares) in enumerate(ratios.items()):
        x = np.arange(len(targets)) + (k - (len(ratios) - 1) / 2) * width
        value, low, high = (100 * np.array([shares[t][key] for t in targets])
                            for key in ("value", "low", "high"))
        axes.bar(x, value, 0.92 * width, label=name, color=COLOURS[k % len(COLOURS)])
        axes.errorbar(x, value, [value - low, high - value], fmt="none", ecolor="black", capsize=3)
    n = sorted({one["n"] for shares in ratios.values() for one in shares.values()})
    axes.set_xticks(range(len(targets)), targets, fontsize=9)
    axes.set(ylim=(0, 100))
    axes.set_ylabel("fooling ratio, %", fontsize=9)
    axes.set_title(f"n = {' / '.join(map(str, n))} test images, 95 % intervals", fontsize=9)
    axes.legend(fontsize=8, ncols=len(ratios), loc="upper right")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def against(curves, names, x):
    """Fooling ratio over gradients or images (log scale), a panel for each network.

    curves {method: {number: [{network: (share, whether the perturbation was made on it)}]}}, one
    entry per seed. Lines join the means; dashed: the perturbation was not made on that network.
    """
    figure = _figure(3.1 * len(names) + 0.6, 3.2)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, network in zip(panels, names, strict=True):
        for k, (method, points) in enumerate(curves.items()):
            numbers = sorted(points)
            found = [[100 * one[network][0]["value"] for one in points[number]]
                     for number in numbers]
            white = points[numbers[0]][0][network][1]
            colour = COLOURS[k % len(COLOURS)]
            axes.plot(numbers, [np.mean(values) for values in found], color=colour,
                      ls="-" if white else "--", label=method)
            axes.plot([number for number, values in zip(numbers, found, strict=True)
                       for _ in values], sum(found, []), ".", color=colour, ms=5)
        n = sorted({one[network][0]["n"] for points in curves.values() for seeds in points.values()
                    for one in seeds})
        axes.set(xscale="log", ylim=(0, 100), xlabel=x)
        axes.set_title(f"{network} (n={' / '.join(map(str, n))})", fontsize=9)
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers], rotation=30, fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("fooling ratio, %")
    panels[-1].legend(fontsize=8, loc="best")
    return _png(figure)


def sweep(rows):
    """Robustness against GCM's w, a panel for each network, from the rows of w_sweep.csv."""
    networks = list(dict.fromkeys(row["model"] for row in rows))
    figure = _figure(3.6 * len(networks) + 0.6, 3.2)
    panels = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    styles = {"naive": (ORANGE, "o", "naive"), "adaptive": (BLUE, "s", "adaptive (BPDA)")}
    for axes, name in zip(panels, networks, strict=True):
        for attacker, (colour, marker, label) in styles.items():
            own = [r for r in rows if (r["model"], r["attacker"]) == (name, attacker)]
            w, value, low, high = (np.array([float(row[key]) for row in own]) for key in (
                "w", "attack_robustness", "attack_robustness_low", "attack_robustness_high"))
            axes.plot(w, 100 * value, color=colour, marker=marker, ms=4, label=label)
            axes.fill_between(w, 100 * low, 100 * high, color=colour, alpha=0.2, lw=0)
        axes.axvline(1 / float(rows[0]["epsilon"]), color="black", lw=0.8, ls=":",
                     label="epsilon w = 1")
        n = float(own[0]["attack_robustness_n"])
        axes.set(xscale="log", ylim=(-2, 102), xlabel="w", title=f"{name} (n={n:.6g})")
        axes.xaxis.set_major_formatter("{x:.0e}")  # not as a formula
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("attack robustness, PGD Linf, %")
    panels[0].legend(fontsize=8)
    return _png(figure)


def eps_curves(rows):
    """Robust accuracy over the Linf radius, a panel for each network, from rows of curve.csv."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = _figure(3.6 * len(networks) + 0.6, 3.2)
    panels = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    styles = {"APGD-CE, adaptive": (BLUE, "s", "-"), "APGD-CE, naive": (ORANGE, "o", "-"),
              "FAB, adaptive": (BLACK, ".", ":")}
    for axes, name in zip(panels, networks, strict=True):
        for attacker, (colour, marker, line) in styles.items():
            own = [row for row in rows if (row["network"], row["attacker"]) == (name, attacker)]
            if own:
                eps, value, low, high = (np.array([row[key] for row in own], dtype=float)
                                         for key in ("eps", "value", "low", "high"))
                axes.plot(255 * eps, 100 * value, color=colour, marker=marker, ms=4, ls=line,
                          label=attacker)
                axes.fill_between(255 * eps, 100 * low, 100 * high, color=colour, alpha=0.15, lw=0)
        n = next(row["n"] for row in rows if row["network"] == name)
        axes.set(ylim=(-2, 102), xlabel="Linf radius x 255", title=f"{name} (n={n})")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("robust accuracy, %")
    max(panels, key=lambda axes: len(axes.lines)).legend(fontsize=8)  # the fullest panel
    return _png(figure)


def examples(x, x_adv, delta, before, after, title, clean=None, seen=None):
    """Three rows: images (n, C, H, W), the perturbation (C, H, W), perturbed; with classes.

    clean, seen: {network: n classes} of the clean and the perturbed images, shown below them.
    """
    clean, seen = (clean, seen) if seen and len(seen) > 1 else ({}, {})
    figure = _figure(max(4, 1.7 * len(x) + 0.4), 5.9 + 0.28 * len(seen))
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(3, len(x), squeeze=False)
    for i, (top, mid, bottom) in enumerate(panels.T):
        gain = _show_delta(mid, delta)
        for axes, picture, label, under in ((top, x, before, clean), (bottom, x_adv, after, seen)):
            _show(axes, picture[i])
            _name(axes, label[i], before[i])
            _predictions(axes, {name: (classes[i], clean[name][i])
                                for name, classes in under.items()}, size=6)
    rows = ("clean", f"perturbation × {gain:.3g}", "perturbed")
    for axes, name in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(name, fontsize=9)
    return _png(figure)


def _show(axes, x):
    """(C, H, W) in [0, 1], without ticks."""
    array = x.expand(3, *x.shape[1:]).permute(1, 2, 0).numpy()
    axes.imshow(array, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _name(axes, seen, wanted, prefix="", size=8):
    """The predicted class above a picture, orange if it is not the wanted one."""
    axes.set_title(f"{prefix}{str(seen)[:22]}", fontsize=size, pad=3,
                   color="black" if seen == wanted else ORANGE)


def _predictions(axes, classes, size):
    """{network: (class, wanted one)} below a picture, orange where they differ."""
    for line, (name, (one, wanted)) in enumerate(classes.items()):
        axes.annotate(f"{name[:16]}: {str(one)[:18]}", (0.5, 0), (0, -2 - 1.3 * size * line),
                      "axes fraction", "offset points", ha="center", va="top", fontsize=size,
                      color="black" if one == wanted else ORANGE)


def _show_delta(axes, delta):
    """A perturbation amplified as far as possible, zero as grey. -> the gain"""
    gain = 0.5 / (delta.abs().max().item() or 0.5)
    _show(axes, delta * gain + 0.5)
    return gain


def scene(size):
    """(3, size, size) uint8: sun, hills, a house and a fence, drawn by these lines."""
    t = (torch.arange(size) + 0.5) / size
    y, x = t[:, None], t[None]
    image = torch.stack([0.45 + 0.4 * y + 0 * x, 0.65 + 0.2 * y + 0 * x, 0.95 - 0.1 * y + 0 * x])

    def paint(where, *colour):
        image[:, where] = torch.tensor(colour)[:, None]
    paint((x - 0.78) ** 2 + (y - 0.2) ** 2 < 0.01, 1.0, 0.85, 0.2)
    paint(y > 0.62 + 0.07 * (9 * x).sin(), 0.35, 0.6, 0.3)
    paint(y > 0.78 + 0.03 * (14 * x).cos(), 0.2, 0.45, 0.2)
    paint((x > 0.2) & (x < 0.5) & (y > 0.45) & (y < 0.8), 0.8, 0.35, 0.25)
    paint((y > 0.28) & (y < 0.45) & ((x - 0.35).abs() < 1.2 * (y - 0.28)), 0.4, 0.2, 0.2)
    paint((x > 0.25) & (x < 0.33) & (y > 0.52) & (y < 0.62), 0.9, 0.9, 0.6)
    paint((x > 0.38) & (x < 0.45) & (y > 0.6) & (y < 0.8), 0.3, 0.2, 0.15)
    paint((y > 0.86) & (y < 0.88) & (x > -1), 0.95, 0.95, 0.9)
    paint(((x * 16) % 1 < 0.3) & (y > 0.82) & (y < 0.95), 0.95, 0.95, 0.9)
    return (image * 255).round().to(torch.uint8)
