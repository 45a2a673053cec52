"""Fooling ratios: many perturbations x many target networks in one pass over the images.

    python eval_uap.py --uaps runs/digits_sga_cnn/sga_cnn.pth
    python eval_uap.py --uaps A.pth B.npy --data_dir /data/imagenet/val \\
        --model_name alexnet googlenet vgg16 vgg19 resnet152
    python eval_uap.py --defense gcm+resizepad         # target networks behind a defence

Each image is decoded once and each target's clean prediction computed once, however many
perturbations there are. Metrics: utils/measure.py. Perturbation files are never unpickled. A run
leaves results.json, results.csv, results.md, images.txt, heatmap.png (for two perturbations or
more), and examples.npz and examples.png: images before and after the first perturbation. The same
command continues a run that was stopped. torchrun shares the images among processes.
"""

import io
from pathlib import Path

import numpy as np
import torch

from utils import data, defenses, draw, finished, report_uaps, run
from utils.cells import Progress
from utils.cli import Parser, at_least, radius, run_script
from utils.halving import Halving
from utils.measure import UapCounts, class_name, logits_under
from utils.models import describe_geometry, num_classes, targets_of
from utils.precision import Fast
from utils.team import join_to_count
from utils.uaps import find_uaps, fit_size, read_uaps, rounded

SHOWN = 4  # networks whose predictions are shown in examples.png


@torch.no_grad()
def count(models, deltas, images, aims, s, device, progress):
    """One pass over the images. models {name: network}, deltas {name: perturbation (C, H, W)}, aims
    {name: target class, or None} -> {(perturbation, network): UapCounts}
    """
    pairs = {u: [None if d is None else d.to(device) for d in (delta, rounded(delta))]
             for u, delta in deltas.items()}

    def counted(index, x):
        x, y = data.to_float(x.to(device, non_blocking=True)), images.labels[index].to(device)
        found = {u: {m: UapCounts(aims[u]) for m in models} for u in deltas}
        for m, model in models.items():
            clean, again, logits = logits_under(model, x, pairs.values(), seed=s.seed, index=index,
                                                again=defenses.is_random(s.defense))
            for u, (adv, adv8) in zip(pairs, logits, strict=True):
                found[u][m].add(clean, adv, adv8, y, again)
        return {u: {m: counts.state() for m, counts in own.items()} for u, own in found.items()}
    state = progress.count(
        images, torch.arange(len(images)), counted, batch_size=s.batch_size,
        cell=str(images.geometry), workers=s.workers, desc="evaluate", whole=False)
    return {(u, m): UapCounts(aims[u], **state[u][m]) for u in deltas for m in models}


def count_all(s, images, networks, fitted, aims, device, progress):
    """Counts for all networks {Geometry: {name: network}}; images are decoded once per Geometry.
    -> {(perturbation, network): UapCounts}, names of images that were skipped in any geometry
    """
    counts, skipped = {}, {}
    for geometry, models in networks.items():
        counts |= count(models, fitted[geometry.size], read_in(geometry, images, s), aims, s,
                        device, progress)
        skipped |= dict.fromkeys(images.names[i] for i in progress.skipped)
    return counts, list(skipped)


def read_in(geometry, images, s):
    """The images as read in this Geometry, from the cache if there is one."""
    return data.cached(images.prepared(geometry, None), s.cache, workers=s.workers)


@torch.no_grad()
def examples(models, delta, images, names_of, number, device):
    """A few evenly spaced images (n, C, H, W), before and after; None if none can be decoded.

    models {name: network}, names_of {name: its class names}. before, after: classes predicted by
    the first network; clean, seen: the same for the first SHOWN, {name: classes}
    """
    chosen = torch.linspace(0, len(images) - 1, min(number, len(images))).long().tolist()
    found = [p for p in (images[i] for i in chosen) if p is not None]
    if not found:
        return None
    x = data.to_float(torch.stack(found)).to(device)
    x_adv = (x + delta.to(device)).clamp(0, 1)

    def predicted(name, z):
        return [class_name(names_of[name], k) for k in models[name](z).argmax(1).tolist()]
    shown = list(models)[:SHOWN]
    clean, seen = ({name: predicted(name, z) for name in shown} for z in (x, x_adv))
    return {"x": x.cpu(), "x_adv": x_adv.cpu(), "delta": delta, "before": clean[shown[0]],
            "after": seen[shown[0]], "clean": clean, "seen": seen}


# --------------------------------------------------------------------- the command

def get_args():
    parser = Parser("Measure universal perturbations on target networks.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "labels", "classes", "num_images")
    parser.shared("model_name", "weights", "geometry", "defense")
    add("--image_size", type=at_least(8), help="side in pixels; None: 224, or as --geometry says; "
        "small images and networks trained here: their own")
    add("--uaps", "--uaps_save", nargs="+", default=["runs"], help="perturbations: .pth, .npy or "
        ".png files, or folders; from folders, only those made on this kind of data")
    add("--eps", type=radius, help="largest |delta| allowed, in [0, 1] pixels; None: the data "
        "set's preset, 10/255 on ImageNet")
    add("--scale", choices=("auto", "1", "255"), default="auto", help="scale of the values in "
        "files whose NAME.json does not give it; auto: from their size, refused if unclear")
    add("--resize", action="store_true", help="resize a perturbation of another size to the target")
    add("--save", "--results", type=Path, default=Path("runs/eval"), help="folder for tables and "
        "pictures")
    add("--show", type=at_least(0), default=4, help="images in examples.png: clean, "
        "perturbed, and predictions of up to four networks")
    add("--amp", choices=("off", "bf16"), default="off", help="off: float32, as published")
    parser.shared("batch_size", "seed", "device", "workers", "cache")
    return parser.parse_args()


def settle(args):
    """Settings with the data set's presets, images (names only), a note on them for the reader,
    targets, perturbations, and these at each input size {size: {name: (C, size, size)}}. UserError
    for what cannot be measured.
    """
    images = data.opened(args, "test")
    preset = data.PRESETS[images.kind]
    s = run.settled(args, eps=args.eps or preset.eps)
    targets = targets_of(s.model_name, s.weights, preset.targets, images, s.image_size,
                         s.geometry)
    images, note = finished.images_for(finished.named(targets, s.data_dir, s.data_root,
                                                      s.labels, s.classes))
    uaps = read_uaps(find_uaps(s.uaps, images.kind), scale=s.scale, eps=s.eps)
    note = finished.said_of(uaps, images, s.num_images, note)
    images = images.prepared(images.size, s.num_images)
    fitted = {}
    for size in sorted({target.size for target in targets}):
        images.prepared(size, None)  # small images: refuses any size but theirs
        fitted[size] = {uap.name: fit_size(uap, size, images.channels, s.eps, s.resize)
                        for uap in uaps}
    return s, images, note, targets, uaps, fitted


def load_networks(s, targets, images, device):
    """{Geometry: {name: network behind its defence}}"""
    networks = {}
    for target in targets:
        model = target.load(images, data_dir=s.data_dir, data_root=s.data_root, device=device)
        model = model if s.amp == "off" else Fast(model, s.amp, "contiguous")
        networks.setdefault(target.geometry, {})[target.name] = defenses.defend(
            Halving(model, target.name), s.defense, size=target.size)
    return networks


def aim(uap, kind):
    """The target class of a perturbation, from its facts, or None."""
    target = uap.facts.get("target")
    return target if type(target) is int and 0 <= target < num_classes(kind) else None


def facts(s, images, note, targets, device):
    """What all figures depend on; most of it is printed once above the tables."""
    sizes = sorted({target.size for target in targets})
    return {
        "data": str(s.data_dir), "n": len(images), "skipped": [],
        **({"note": note} if note else {}),
        "images_sha256": images.sha256(*(target.geometry for target in targets)),
        "clamp": "x + delta to [0, 1]",
        "defense": " / ".join(dict.fromkeys(defenses.describe(s.defense, size=z) for z in sizes)),
        "sizes": sizes, "geometry": describe_geometry(targets), "eps": s.eps,
        "precision": "float32" if s.amp == "off" else s.amp,
        "targets": {target.name: target.described for target in targets}, **run.provenance(device)}


def depends(s, about, images, fitted, aims):
    """What the counts depend on, so that partial counts of another run are never added to them."""
    return {key: value for key, value in about.items() if key != "commit"} | {
        "seed": s.seed, "labels": run.digest(images.labels), "aims": aims,
        "uaps": {f"{name} {size}": run.digest(delta) for size, deltas in fitted.items()
                 for name, delta in deltas.items()}}


def save_pictures(folder, rows, uaps, targets, shown):
    """Writes examples.png, examples.npz and heatmap.png; removes those of an earlier evaluation."""
    for name in ("examples.png", "examples.npz", "heatmap.png"):
        (folder / name).unlink(missing_ok=True)
    if shown:
        clean, seen = (shown.pop(key) for key in ("clean", "seen"))
        run.write_atomic(folder / "examples.png", draw.examples(
            **shown, title=uaps[0].name, clean=clean, seen=seen))
        buffer = io.BytesIO()
        np.savez(buffer, **{key: np.asarray(value) for key, value in shown.items()},
                 networks=list(seen), clean=list(clean.values()), seen=list(seen.values()),
                 target=targets[0].name, uap=uaps[0].name)
        run.write_atomic(folder / "examples.npz", buffer.getvalue())
    if len(uaps) > 1:
        run.write_atomic(folder / "heatmap.png", draw.heatmap(
            [[row["fooling_ratio"]["value"] for row in rows if row["uap"] == uap.name]
             for uap in uaps], [uap.name for uap in uaps], [target.name for target in targets]))


def save(folder, rows, about, uaps, targets, images, networks, s):
    """Writes the tables and the list of images. -> the Markdown"""
    text = report_uaps.report(rows, about, uaps, [target.name for target in targets])
    run.save_json(folder / "results.json", {"protocol": about, "rows": rows, "uaps": {
        uap.name: {"path": str(uap.path.resolve()), "scale": s.scale, "largest": uap.largest,
                   "facts": uap.facts} for uap in uaps}})
    run.save_csv(folder / "results.csv", [report_uaps.flat(row) for row in rows])
    run.write_atomic(folder / "results.md", text.encode())
    run.write_atomic(folder / "images.txt", images.listing(*networks).encode())
    return text


def main(args):
    team, device = join_to_count(run.resolve_device(args.device))
    s, images, note, targets, uaps, fitted = team.in_turn(lambda: settle(args))
    folder = team.in_turn(lambda: run.RunFolder(s.save, lock=team.first))
    networks = load_networks(s, targets, images, device)
    about, aims = facts(s, images, note, targets, device), {
        uap.name: aim(uap, images.kind) for uap in uaps}
    progress = Progress(team, folder / "partial.json", depends(s, about, images, fitted, aims),
                        device)
    counts, skipped = count_all(s, images, networks, fitted, aims, device, progress)
    about |= {"n": len(images) - len(skipped), "skipped": skipped, "processes": team.size}
    classes, first = images.known_classes, targets[0]
    rows = [{"uap": uap.name, "target": target.name, "n": counts[uap.name, target.name].n,
             **counts[uap.name, target.name].figures(
                 images.has_labels and bool(images.labelled or target.classes),
                 target.classes or classes)} for uap in uaps for target in targets]
    if team.first:
        shown = examples(networks[first.geometry], fitted[first.size][uaps[0].name],
                         read_in(first.geometry, images, s),
                         {target.name: target.classes or classes for target in targets}, s.show,
                         device) if s.show else None
        text = save(folder, rows, about, uaps, targets, images, networks, s)
        save_pictures(folder, rows, uaps, targets, shown)
        progress.clear()
        print(text + f"saved {folder.path}/results.json (.csv, .md)", flush=True)
    team.leave()


if __name__ == "__main__":
    run_script(get_args, main)
