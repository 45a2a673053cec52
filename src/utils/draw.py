"""Pictures as PNG bytes: perturbations, curves, heat maps, examples. Draws what it is given.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import io

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def _figure(width, height):
    from matplotlib.figure import Figure  # half a second, needed only when something is drawn

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def encode_delta(delta):
    """A perturbation (C, H, W) on the [0, 1] scale as an 8-bit PNG that can be read back.

    Grey level 128 is zero; one step of 1/255 is `delta_gain` levels, as the file's text says, so
    that the picture can be seen by eye and, up to 127/255, loses nothing but rounding to 8 bits.
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
    """The PNG of encode_delta -> (delta (C, H, W), True), or of any other 8-bit image, (.., False).

    Without `delta_gain` in the file one grey level is taken as 1/255.
    """
    with Image.open(path) as image:
        gain = image.text.get("delta_gain") if hasattr(image, "text") else None
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
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
    left.set_ylabel("loss (ascended)", color=BLUE)
    right.plot(epochs, [100 * row["fooling_ratio"] for row in rows], color=ORANGE, marker="s", ms=3)
    right.set_ylabel("fooling ratio, % (watched images)", color=ORANGE)
    right.set_ylim(0, 100)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    return _png(figure)


def training(rows, title, **also):
    """Loss and accuracy over the epochs of a log.csv; also: label of every further column."""
    figure = _figure(6, 3.4)
    left = figure.add_subplot()
    right = left.twinx()
    epochs = [row["epoch"] for row in rows]
    left.plot(epochs, [row["loss"] for row in rows], color=BLUE, marker="o", ms=3)
    left.set(xlabel="pass over the images", title=title)
    left.set_ylabel("training loss", color=BLUE)
    columns = {"train_acc": "accuracy on what was trained on", **also}
    for (column, label), colour, marker in zip(columns.items(), (ORANGE, GREEN, PINK), "s^v",
                                               strict=False):
        there = [(row["epoch"], 100 * row[column]) for row in rows if row[column] != ""]
        if there:
            right.plot(*zip(*there, strict=True), color=colour, marker=marker, ms=3, label=label)
    right.set(ylim=(0, 100), ylabel="accuracy, %")
    right.legend(fontsize=8, loc="center right")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    return _png(figure)


def corruptions(runs):
    """{run: {operation: share}}: accuracy with its interval, worst of the first run on top."""
    first = next(iter(runs.values()))
    order = sorted(first, key=lambda name: (name == "clean", first[name]["value"]), reverse=True)
    figure = _figure(6.4, 0.6 + 0.19 * len(order))
    axes = figure.add_subplot()
    for k, (run, found) in enumerate(runs.items()):
        at = [i + 0.7 * ((k + 0.5) / len(runs) - 0.5) for i in range(len(order))]
        value = np.array([100 * found[name]["value"] for name in order])
        low, high = (np.array([100 * found[name][side] for name in order])
                     for side in ("low", "high"))
        axes.errorbar(value, at, xerr=(value - low, high - value), fmt="os^v"[k % 4], ms=3, lw=0.8,
                      color=(BLUE, ORANGE, GREEN, PINK)[k % 4], label=run)
    axes.set_yticks(range(len(order)), [name.replace("_", " ") for name in order], fontsize=7)
    axes.set(xlabel="accuracy, %", ylim=(-0.7, len(order) - 0.3))
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
    return _png(figure)


def variations(logs):
    """Accuracies over the epochs, a panel for every {variation: [rows of log.csv, a list a seed]}.

    The line is the mean over the seeds, the band reaches from the lowest to the highest.
    """
    columns = min(4, len(logs))
    lines = -(-len(logs) // columns)
    figure = _figure(1 + 2.9 * columns, 0.6 + 2.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(logs):]:
        axes.axis("off")
    for axes, (name, seeds) in zip(panels.flat, logs.items(), strict=False):
        for key, label, colour in (("clean", "clean", BLUE), ("fgs", "FGS", ORANGE),
                                   ("fgv", "FGV", GREEN)):
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
    panels[0, 0].legend(fontsize=8, loc="center right")
    return _png(figure)


def attacked(shown):
    """Images clean, under FGS and under FGV with what is seen in them, for every variation.

    shown: {variation: {x (3, n, C, H, W) in [0, 1], seen (3, n), y (n,)}}
    """
    n = max(len(one["y"]) for one in shown.values())
    figure = _figure(0.9 + 0.85 * n * min(2, len(shown)), 0.3 + 2.9 * -(-len(shown) // 2))
    groups = figure.subfigures(-(-len(shown) // 2), min(2, len(shown)), squeeze=False)
    for group, (name, one) in zip(groups.flat, shown.items(), strict=False):
        group.suptitle(f"trained on {name}", fontsize=9)
        panels = group.subplots(3, n, squeeze=False)
        for line, kind in enumerate(("clean", "FGS", "FGV")):
            for axes in panels[line, len(one["y"]):]:
                axes.axis("off")
            for i, y in enumerate(one["y"]):
                _show(panels[line, i], torch.from_numpy(one["x"][line, i]))
                seen = one["seen"][line, i]
                panels[line, i].set_title(str(seen), fontsize=8, pad=2,
                                          color="black" if seen == y else ORANGE)
            panels[line, 0].set_ylabel(kind, fontsize=8)
    return _png(figure)


def named(pictures, columns=8):
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
    """Fooling ratios in [0, 1], a row for every perturbation, a column for every target."""
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


def compare(deltas, ratios, targets):
    """Perturbations {name: (C, H, W)} amplified, beside their fooling ratios with intervals.

    ratios {name: [share per target]}; the README's picture.
    """
    figure = _figure(3 * len(deltas) + 4.5, 3.2)
    axes = figure.subplots(1, len(deltas) + 1, width_ratios=[1] * len(deltas) + [1.6])
    for ax, (name, delta) in zip(axes, deltas.items(), strict=False):
        largest = delta.abs().max().item() or 1
        _show(ax, delta / (2 * largest) + 0.5)
        ax.set_title(f"{name}\n(at most {255 * largest:.0f}/255, shown amplified)", fontsize=9)
    width = 0.8 / len(deltas)
    for k, (name, shares) in enumerate(ratios.items()):
        x = np.arange(len(targets)) + (k - (len(deltas) - 1) / 2) * width
        y = 100 * np.array([s["value"] for s in shares])
        low, high = (100 * np.array([s[key] for s in shares]) for key in ("low", "high"))
        axes[-1].bar(x, y, 0.92 * width, label=name, color=(BLUE, ORANGE, GREEN)[k % 3])
        axes[-1].errorbar(x, y, [y - low, high - y], fmt="none", ecolor="black", capsize=3)
    axes[-1].set_xticks(range(len(targets)), targets)
    axes[-1].set(ylim=(0, 100), ylabel="fooling ratio, % of all images")
    axes[-1].legend(fontsize=8)
    axes[-1].grid(axis="y", alpha=0.3)
    return _png(figure)


def sweep(rows):
    """Robustness against GCM's w, a panel for every network, from the rows of w_sweep.csv."""
    networks = list(dict.fromkeys(row["model"] for row in rows))
    figure = _figure(3.6 * len(networks) + 0.6, 3.2)
    panels = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    styles = {"naive": (ORANGE, "o", "naive attacker"), "adaptive": (BLUE, "s", "one who knows")}
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
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("attack robustness, PGD Linf, %")
    panels[0].legend(fontsize=8)
    return _png(figure)


def examples(x, x_adv, delta, before, after, title):
    """Images (n, C, H, W) clean and perturbed, their classes, and the perturbation amplified."""
    largest = delta.abs().max().item() or 1
    amplified = delta / (2 * largest) + 0.5
    figure = _figure(1.8 * len(x) + 1.8, 4.2)
    axes = figure.subplots(2, len(x) + 1, squeeze=False)
    for i in range(len(x)):
        for line, picture, name in ((0, x[i], before[i]), (1, x_adv[i], after[i])):
            _show(axes[line, i], picture)
            axes[line, i].set_title(name[:22], fontsize=8,
                                    color=ORANGE if name != before[i] else "black")
    axes[0, 0].set_ylabel("clean")
    axes[1, 0].set_ylabel("perturbed")
    _show(axes[0, -1], amplified)
    axes[0, -1].set_title(f"{title}\n{0.5 / largest:.1f} times amplified", fontsize=8)
    axes[1, -1].axis("off")
    return _png(figure)


def _show(axes, x):
    """(C, H, W) in [0, 1], without ticks."""
    array = x.expand(3, *x.shape[1:]).permute(1, 2, 0).numpy()
    axes.imshow(array, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
