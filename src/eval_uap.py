"""Fooling ratios: many perturbations x many target models in one pass over the images.

    python eval_uap.py --uaps_save runs/digits_sga_cnn/sga_cnn.pth
    python eval_uap.py --uaps_save A.pth B.npy --data_dir /data/imagenet/val \\
        --model_name alexnet googlenet vgg16 vgg19 resnet152

Every image is decoded once and every target's clean prediction computed once, however many
perturbations there are. Names of the figures: utils/metrics.py. Files are never unpickled.
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from utils import draw
from utils.data import (
    NAMED,
    PRESETS,
    batches,
    default_workers,
    imagenet_classes,
    open_images,
    to_float,
)
from utils.defenses import DEFENSES, defend, describe, is_random
from utils.metrics import interval, markdown, share
from utils.models import (
    check_name,
    check_takes,
    describe_weights,
    input_size,
    load_model,
    num_classes,
    one_each,
)
from utils.precision import Fast
from utils.run import (
    Parser,
    RunFolder,
    at_least,
    make_generator,
    names,
    provenance,
    radius,
    resolve_device,
    run_script,
    save_csv,
    save_json,
    write_atomic,
)
from utils.uaps import find_uaps, fit_size, read_uaps, rounded


def get_args():
    parser = Parser("Measure universal perturbations on target models.")
    add = parser.add_argument
    add("--data_dir", default="digits", help="folder of class folders, or " + ", ".join(NAMED))
    add("--data_root", default="data", help="where named data sets are kept or downloaded to")
    add("--num_images", type=at_least(1), help="evenly over the classes; None: all")
    add("--model_name", type=names, nargs="+", help="targets; None: the data set's preset, on "
        "ImageNet the paper's five")
    add("--weights", type=names, nargs="+", default=[["V1"]],
        help="V1, V2, random, a .pth state dict or a folder of NAME.pth; one, or one per target")
    add("--image_size", type=at_least(8), help="side in pixels; None: each target's own")
    add("--defense", choices=DEFENSES, default="none", help="layers in front of every target")
    add("--uaps_save", nargs="+", default=["runs"], help=".pth, .npy or .png files, or folders, "
        "of which the perturbations made on this kind of data are taken")
    add("--eps", type=radius, help="no perturbation may be larger, in [0, 1] pixels; None: the "
        "data set's preset, 10/255 on ImageNet")
    add("--scale", choices=("auto", "1", "255"), default="auto", help="scale of the files' values; "
        "auto: by their facts or their size, refused when in doubt")
    add("--resize", action="store_true", help="scale a perturbation of another size to the target")
    add("--results", type=Path, default=Path("runs/eval"), help="folder for tables and pictures")
    add("--show", type=at_least(0), default=4, help="images in the picture of examples")
    add("--batch_size", type=at_least(1), default=50, help="images at a time")
    add("--seed", type=at_least(0, high=2 ** 63 - 1), default=0, help="of a random defence")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--amp", choices=("off", "bf16"), default="off", help="off: float32, as figures should be")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    return parser.parse_args()


@dataclass
class Tally:
    """Counts of one perturbation on one target, summed over batches."""
    classes: int
    target: int = None              # class that a targeted perturbation steers to
    n: int = 0
    counts: dict = field(default_factory=dict)
    became: torch.Tensor = None     # how often a fooled image became each class

    def add(self, clean, adv, adv8, y, again=None):
        """Logits (N, K) before, after, and after 8-bit rounding (None: same); labels (N,).

        again: of a random defence, a second look at the clean images.
        """
        before, after = clean.argmax(1), adv.argmax(1)
        fooled = after != before
        right, still = before == y, after == y
        found = {"fooled": fooled, "clean": right, "adv": still, "both": right & still,
                 "clean_top5": top5(clean, y), "adv_top5": top5(adv, y),
                 "fooled_rounded": fooled if adv8 is None else adv8.argmax(1) != before}
        if again is not None:
            found["by_chance"] = again.argmax(1) != before
        if self.target is not None:
            found["others"] = before != self.target
            found["hit"] = found["others"] & (after == self.target)
        for key, value in found.items():
            self.counts[key] = self.counts.get(key, 0) + int(value.sum())
        became = torch.bincount(after[fooled].cpu(), minlength=self.classes)
        self.became = became if self.became is None else self.became + became
        self.n += len(y)

    def figures(self, labelled, class_names):
        """{metric: share}; accuracies only where the labels mean something to the target."""
        c, n = self.counts, self.n
        result = {"fooling_ratio": share(c["fooled"], n)}
        if "by_chance" in c:
            result["changed_by_chance"] = share(c["by_chance"], n)
        if self.target is not None:
            result["targeted_success"] = share(c["hit"], c["others"])
        if labelled:
            result.update(
                clean_acc=share(c["clean"], n), adv_acc=share(c["adv"], n),
                attack_robustness=share(c["both"], c["clean"]),
                clean_acc_top5=share(c["clean_top5"], n), adv_acc_top5=share(c["adv_top5"], n))
        most = int(self.became.argmax())
        result["dominant_class"] = {"class": most, "name": class_names[most],
                                    **share(int(self.became[most]), c["fooled"])}
        result["fooling_ratio_rounded"] = share(c["fooled_rounded"], n)
        return result


def top5(logits, y):
    return (logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]).any(1)


@torch.no_grad()
def evaluate(models, deltas, images, *, targets, args, device, skipped):
    """One pass over the images. models {name: model}, deltas {name: (delta, rounded or None)},
    targets {name: class or None} -> {(uap, model): Tally}
    """
    tallies = {(u, m): Tally(num_classes(images.kind), targets[u]) for u in deltas for m in models}
    deltas = {name: [None if d is None else d.to(device) for d in pair]
              for name, pair in deltas.items()}
    with tqdm(total=len(images), desc="evaluate", unit="img", disable=None) as bar:
        for index, pixels in batches(images, args.batch_size, workers=args.workers,
                                     skipped=skipped):
            x, y = to_float(pixels.to(device)), images.labels[index].to(device)
            for m, model in models.items():
                clean = model(x)
                again = model(x) if is_random(args.defense) else None
                for u, (delta, delta8) in deltas.items():
                    adv = model((x + delta).clamp_(0, 1))
                    adv8 = None if delta8 is None else model((x + delta8).clamp_(0, 1))
                    tallies[u, m].add(clean, adv, adv8, y, again)
            bar.update(len(x))
    return tallies


# -------------------------------------------------------------------- tables

def audit(uap, figures, resized):
    """One line that a reader can check a perturbation by; figures {target: row}."""
    if rounded(uap.delta) is None and not resized:
        rounding = "8-bit rounding changes nothing (it is on the grid k/255)"
    else:
        pairs = [f"{100 * f['fooling_ratio']['value']:.1f} -> "
                 f"{100 * f['fooling_ratio_rounded']['value']:.1f} % on {m}"
                 for m, f in figures.items()
                 if f["fooling_ratio"]["k"] != f["fooling_ratio_rounded"]["k"]]
        rounding = "8-bit rounding " + ("changes fooling_ratio " + ", ".join(pairs) if pairs
                                        else "changes no fooling_ratio (measured)")
    return (f"{uap.name}: largest |delta| {uap.largest:.2f}/255"
            f"{' (before resizing)' if resized else ''}, 0 NaN of {uap.delta.numel()}, {rounding}")


def fooling_table(rows, uaps, targets, metric="fooling_ratio"):
    """Markdown: rows UAP, columns target, '66.0 (60.5-71.1)'."""
    cells = {(row["uap"], row["target"]): row[metric] for row in rows}
    return markdown(["UAP", *targets], [[u, *(interval(cells[u, t]) for t in targets)]
                                        for u in uaps])


def detail_table(rows):
    """Markdown: a row for every UAP on every target, with all the other figures."""
    apart = ("uap", "target", "n", "fooling_ratio", "dominant_class", "fooling_ratio_rounded")
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row)
               if key not in apart]
    head = ["UAP", "target", *metrics, "most frequent wrong class, % of the fooled"]
    return markdown(head, [[row["uap"], row["target"],
                            *(interval(row[m]) if m in row else "-" for m in metrics),
                            f"{row['dominant_class']['name']}, "
                            f"{100 * row['dominant_class']['value']:.1f}"] for row in rows])


SETTINGS = ("epochs", "amp", "method", "model_name", "weights", "defense", "bpda", "eps", "alpha",
            "loss", "beta", "batch_size", "minibatch", "iter", "momentum", "target", "augment",
            "images_sha256")


def same_but_seed(uaps):
    """{label: perturbations} for those whose facts differ in the seed alone, two or more."""
    groups = {}
    for uap in uaps:
        if {"seed", "name"} <= uap.facts.keys():
            facts = {"defense": "none", "bpda": False, **uap.facts}  # what older runs do not say
            groups.setdefault(str([facts.get(k) for k in SETTINGS]), []).append(uap)
    groups = [list({u.facts["seed"]: u for u in group}.values()) for group in groups.values()]
    groups = [group for group in groups if len(group) > 1]
    labelled = {}
    for group in groups:
        facts = group[0].facts
        alike = [g[0].facts for g in groups if g[0].facts["name"] == facts["name"]]
        label = " ".join([facts["name"], *(f"{k}={facts.get(k)}" for k in SETTINGS if len(
            {str(other.get(k)) for other in alike}) > 1)])
        labelled[label] = group
    return labelled


def seed_table(rows, groups, targets):
    """Markdown: mean and standard deviation of the fooling ratio over seeds, rows settings."""
    cell = {(row["uap"], row["target"]): 100 * row["fooling_ratio"]["value"] for row in rows}
    lines = []
    for label, group in groups.items():
        values = [[cell[uap.name, t] for uap in group] for t in targets]
        lines.append([label, len(group), *(f"{mean(v):.1f} ± {stdev(v):.1f}" for v in values)])
    return markdown(["UAP", "seeds", *targets], lines)


def flat(row):
    """A row of results.csv: every figure with its n and interval."""
    result = {"uap": row["uap"], "target": row["target"], "n": row["n"]}
    for key, value in row.items():
        if isinstance(value, dict):
            result.update({key: value["value"], f"{key}_n": value["n"],
                           f"{key}_low": value["low"], f"{key}_high": value["high"]})
    result["dominant_class_name"] = row["dominant_class"]["name"]
    return result


# --------------------------------------------------------------------- a run

def settle(args):
    """Fills in what the data set presets, refuses what cannot work; -> images, perturbations."""
    images = open_images(args.data_dir, split="test", data_root=args.data_root)
    preset = PRESETS[images.kind]
    args.eps = args.eps or preset.eps
    args.model_name = list(dict.fromkeys(sum(args.model_name or [], []) or preset.targets))
    for name in args.model_name:
        check_name(name, images.kind)
    args.weights = one_each(args.model_name, sum(args.weights, []))
    args.weights_are = [describe_weights(name, weights, images.kind)
                        for name, weights in zip(args.model_name, args.weights, strict=True)]
    uaps = read_uaps(find_uaps(args.uaps_save, images.kind), scale=args.scale, eps=args.eps)
    return images, uaps


def target_sizes(args, images):
    """Input sizes of all targets, each once."""
    return sorted({args.image_size or input_size(name, images.kind, images.size, weights)
                   for name, weights in zip(args.model_name, args.weights, strict=True)})


def load_targets(args, images, device):
    """{input size: {name: model}}; the images are decoded once for every size."""
    by_size = {}
    for name, weights in zip(args.model_name, args.weights, strict=True):
        model = load_model(name, weights=weights, kind=images.kind, data_dir=args.data_dir,
                           data_root=args.data_root, device=device)
        size = args.image_size or input_size(name, images.kind, images.size, weights)
        check_takes(model, name, images.channels, size, device)
        by_size.setdefault(size, {})[name] = defend(
            model if args.amp == "off" else Fast(model, args.amp, "contiguous"), args.defense,
            size=size, generator=make_generator(args.seed))
    return by_size


def examples(args, images, model, uap, delta, device):
    """PNG of a few images, evenly spaced, before and after on one target."""
    chosen = torch.linspace(0, len(images) - 1, min(args.show, len(images))).long().tolist()
    found = [p for p in (images[i] for i in chosen) if p is not None]
    if not found:
        return None
    x = to_float(torch.stack(found)).to(device)
    x_adv = (x + delta.to(device)).clamp(0, 1)
    with torch.no_grad():
        before, after = (model(z).argmax(1).tolist() for z in (x, x_adv))
    named = class_names(images)
    return draw.examples(x.cpu(), x_adv.cpu(), delta, [named[i] for i in before],
                         [named[i] for i in after], uap.name)


def aim(uap, kind):
    """Class that the facts say a perturbation was made towards, or None."""
    target = uap.facts.get("target")
    return target if type(target) is int and 0 <= target < num_classes(kind) else None


def class_names(images):
    """What the targets' output classes are called."""
    return images.classes if images.labelled else imagenet_classes()


def measure(args, images, uaps, device):
    """-> list of rows {uap, target, n, metric: share ...}, names of skipped files, PNG or None"""
    sizes = target_sizes(args, images)
    lists = {size: images.prepared(size, args.num_images) for size in sizes}
    fitted = {size: {uap.name: fit_size(uap, size, images.channels, args.eps, args.resize)
                     for uap in uaps} for size in sizes}  # refused before anything slow starts
    by_size, tallies, skipped, picture = load_targets(args, images, device), {}, [], None
    for size, models in by_size.items():
        sized, deltas = lists[size], {}
        for uap in uaps:
            delta = fitted[size][uap.name]
            deltas[uap.name] = (delta, rounded(delta))
        lost = []
        tallies |= evaluate(models, deltas, sized, args=args, device=device, skipped=lost,
                            targets={uap.name: aim(uap, images.kind) for uap in uaps})
        skipped = lost  # the same files at every size
        if picture is None and args.show:
            picture = examples(args, sized, next(iter(models.values())), uaps[0],
                               deltas[uaps[0].name][0], device)
    named = class_names(images)
    rows = [{"uap": uap.name, "target": name, "n": tallies[uap.name, name].n,
             **tallies[uap.name, name].figures(images.labelled, named)}
            for uap in uaps for name in args.model_name]
    return rows, skipped, picture


def protocol(args, images, skipped, device):
    """What every figure stands on, said once above the tables."""
    images = images.prepared(images.size, args.num_images)
    sizes = target_sizes(args, images)
    crop = "" if min(sizes) <= 64 else "shorter side to 256/224, centre crop "
    return {
        "data": str(args.data_dir), "n": len(images) - len(skipped), "skipped": skipped,
        "images_sha256": images.sha256(), "clamp": "x + delta to [0, 1]",
        "defense": " / ".join(dict.fromkeys(describe(args.defense, size=s) for s in sizes)),
        "sizes": sizes, "geometry": f"{crop}{'/'.join(map(str, sizes))} pixels", "eps": args.eps,
        "precision": "float32" if args.amp == "off" else args.amp,
        "targets": dict(zip(args.model_name, args.weights_are, strict=True)), **provenance(device)}


def report(rows, about, uaps, targets):
    """The Markdown that is printed and kept."""
    metrics = [m for m in ("fooling_ratio", "targeted_success") if all(m in row for row in rows)]
    text = (f"Protocol: {about['data']}, n={about['n']} ({len(about['skipped'])} skipped), list "
            f"sha256 {about['images_sha256'][:16]}; {about['geometry']}; {about['clamp']}; eps at "
            f"most {about['eps'] * 255:g}/255; {about['precision']}"
            + f"; defence: {about['defense']}" * (about['defense'] != "none") + "\n"
            f"Targets: {', '.join(f'{k} ({v})' for k, v in about['targets'].items())}\n")
    for metric in metrics:
        text += (f"\n{metric}, % of {'all ' if metric == 'fooling_ratio' else ''}images "
                 "(95 % Wilson interval)\n\n"
                 + fooling_table(rows, [uap.name for uap in uaps], targets, metric))
    groups = same_but_seed(uaps)
    if groups:
        text += ("\nfooling_ratio, %, mean ± standard deviation over seeds\n\n"
                 + seed_table(rows, groups, targets))
    text += "\nAll figures, % (95 % Wilson interval)\n\n" + detail_table(rows) + "\n"
    for uap in uaps:
        resized = any(size != uap.delta.shape[-1] for size in about["sizes"])
        text += audit(uap, {r["target"]: r for r in rows if r["uap"] == uap.name}, resized) + "\n"
    return text


def main(args):
    device = resolve_device(args.device)
    images, uaps = settle(args)
    folder = RunFolder(args.results)
    rows, skipped, picture = measure(args, images, uaps, device)
    about = protocol(args, images, skipped, device)
    text = report(rows, about, uaps, args.model_name)
    save_json(folder / "results.json", {"protocol": about, "rows": rows, "uaps": {
        uap.name: {"path": str(uap.path.resolve()), "scale": args.scale, "largest": uap.largest,
                   "facts": uap.facts} for uap in uaps}})
    save_csv(folder / "results.csv", [flat(row) for row in rows])
    write_atomic(folder / "results.md", text.encode())
    write_atomic(folder / "images.txt", images.prepared(images.size, args.num_images)
                 .listing().encode())
    for name in ("examples.png", "heatmap.png"):  # of an earlier evaluation
        (folder / name).unlink(missing_ok=True)
    if picture:
        write_atomic(folder / "examples.png", picture)
    if len(uaps) > 1:
        write_atomic(folder / "heatmap.png", draw.heatmap(
            [[row["fooling_ratio"]["value"] for row in rows if row["uap"] == uap.name]
             for uap in uaps], [uap.name for uap in uaps], args.model_name))
    print(text + f"saved {folder.path}/results.json (.csv, .md)", flush=True)


if __name__ == "__main__":
    run_script(get_args, main)
