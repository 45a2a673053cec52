"""For train_sga.py: settings and presets, a run's own measurements, and its output files."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from utils import draw
from utils.attack.universal import ADAMS, COMPARING, layers_of
from utils.data import NAMED, PRESETS, opened
from utils.errors import UserError
from utils.measure import share
from utils.models import num_classes, one_each, targets_of
from utils.report import percent
from utils.run import (
    RunFolder,
    load_json,
    provenance,
    result_flags,
    save_json,
    save_pth,
    settled,
    write_atomic,
)
from utils.sga_team import predicted
from utils.sources import label_of

PRESET_FLAGS = {  # --preset: values for flags that are not typed
    "paper": {"augment": False, "loss": "ce", "batch_size": 250},
    "few_images": {"augment": True, "loss": "ce", "batch_size": 250},
    "transfer": {"augment": True, "loss": "feature", "batch_size": 50}}
INNER = {"minibatch": 10, "iter": 4}  # defaults, for sga only
MADE_BY = ("method", "model_name", "defense", "bpda", "eps", "alpha", "loss", "beta", "epochs",
           "batch_size", "minibatch", "iter", "momentum", "target", "augment", "seed")
RATES = {"adam": 0.51, "dm": 2.55}  # alpha / eps; FG-UAP's and DM-UAP's scripts: alpha 0.02, 0.1
WATCHED, PER_IMAGE = 100, 20  # watched images: at most; gradients of an epoch per image


# ------------------------------------------------------------------------ settings

def plans(args):
    """[(settings, images, surrogates)] of the command, one per word of --model_name."""
    words = args.model_name or [None]
    weights = one_each(words, args.weights) if len(words) > 1 else [sum(args.weights, [])]
    found = [settle(settled(args, model_name=word, weights=own))
             for word, own in zip(words, weights, strict=True)]
    called = ["+".join(map(label_of, s.model_name)) for s, *_ in found]
    for name in called:
        if called.count(name) > 1:
            raise UserError(f"--model_name: {name} twice, which would share a folder; type them in "
                            "two commands, with another --save")
    lists = {s.image_size: images for s, images, _ in found}  # each is decoded once
    return [(s, lists[s.image_size], surrogates) for s, _, surrogates in found]


def settle(args):
    """-> settings with the presets filled in, images (names only), surrogates as Targets.

    args: the flags, with the networks and weights of one perturbation.
    """
    method = PRESET_FLAGS[args.preset] | INNER
    for flag in [k for k in INNER if args.method != "sga" and getattr(args, k) is not None]:
        raise UserError(f"--method {args.method} --{flag} {getattr(args, flag)}: only sga has "
                        f"inner steps; leave --{flag} out")
    s = settled(args, **{k: v for k, v in method.items() if getattr(args, k) is None})
    images = opened(s, "train")
    preset, chosen = PRESETS[images.kind], s.model_name or [PRESETS[images.kind].surrogate]
    surrogates = surrogates_of(chosen, s.weights, images, s.image_size)
    _check(s, images.kind, len(surrogates[0].classes) or num_classes(images.kind))
    eps, adam = s.eps or preset.eps, s.method in ADAMS
    if (s.method, s.amp) == ("dm", "auto"):
        s = settled(s, amp="off")  # bf16 does not resolve its steps of the weights
    s = settled(s, eps=eps, alpha=s.alpha or (RATES[s.method] * eps if adam else preset.alpha),
                model_name=chosen,
                weights_are=[one.described for one in surrogates],
                num_images=s.num_images or preset.num_images, image_size=surrogates[0].size,
                momentum=_momentum(s) if s.momentum is None else s.momentum)
    return s, images.prepared(s.image_size, s.num_images), surrogates


def _momentum(s):
    """Default momentum: 0.9 unless the preset is `paper` without --augment; 0 with Adam."""
    return 0.9 * ((s.augment or s.preset != "paper") and s.method not in ADAMS)


def _check(s, kind, classes):
    """UserError for flags that cannot work together."""
    for target in s.target or ():
        if target >= classes:
            raise UserError(f"--target {target}: {kind} has classes 0 to {classes - 1}")
        if s.loss in COMPARING:
            raise UserError(f"--target {target} --loss {s.loss}: this loss has no classes to steer "
                            "to; type --loss ce or --loss logit")
    if s.layer and s.loss != "feature":
        raise UserError(f"--layer {','.join(s.layer)} --loss {s.loss}: this loss compares no "
                        "layer; type --loss feature")
    if s.momentum and s.method in ADAMS:
        raise UserError(f"--method {s.method} --momentum {s.momentum:g}: Adam has a momentum of "
                        "its own; leave --momentum out")
    if s.method == "dm":
        _check_maximin(s)
    if s.bpda and "gcm" not in s.defense:
        raise UserError(f"--bpda --defense {s.defense}: this defence has no gcm layer; type "
                        "--defense gcm")
    if s.method == "sga" and s.minibatch > s.batch_size:
        raise UserError(f"--minibatch {s.minibatch} --batch_size {s.batch_size}: a minibatch "
                        "is drawn from the batch; type a smaller --minibatch")


def _check_maximin(s):
    """UserError for what DM-UAP lacks: other losses, targets, defences, several networks."""
    networks, targets = s.model_name or [], s.target or []
    for typed, wrong, wanted in (
            (f"--loss {s.loss}", s.loss != "ce", "--loss ce"),
            (f"--target {','.join(map(str, targets))}", targets, "--method adam"),
            (f"--defense {s.defense}", s.defense != "none", "--defense none"),
            (f"--model_name {','.join(networks)}", len(networks) > 1, "one of them, or several "
             "words, for one perturbation each")):
        if wrong:
            raise UserError(f"--method dm {typed}: it lowers the cross-entropy of the labels of "
                            f"one undefended network first; type {wanted}")


def surrogates_of(names, weights, images, image_size=None):
    """[Target] of the networks that one perturbation is made on, all for one image size.

    A name may occur twice, with different weights. UserError: unknown names, or different sizes.
    """
    found = targets_of([names], [weights], (), images, image_size)
    if len(found) < len(names):
        raise UserError(f"--model_name {','.join(names)}: the same network with the same weights "
                        "twice; type it once, or with different --weights")
    sizes = sorted({surrogate.size for surrogate in found})
    if len(sizes) > 1:
        raise UserError(f"--model_name {','.join(names)}: trained for images of {sizes} pixels; "
                        "type the one to use, as --image_size 224")
    return found


def uap_name(s):
    """Name of a perturbation: method, networks, and loss, random transforms, defence and target
    where they are not the default. Runs that differ in other settings need their own --save.
    """
    extra = {"augment": s.augment, s.loss: s.loss != "ce", s.defense: s.defense != "none",
             "bpda": s.bpda, f"target{s.target}": s.target is not None}
    networks = "+".join(map(label_of, s.model_name))
    return "_".join([s.method, networks, *(k for k, on in extra.items() if on)])


# ------------------------------------------------------------------------ a run

@dataclass(frozen=True, eq=False)
class Run:
    """One perturbation to be made: its name, folder, flags and checkpoint."""
    name: str
    folder: RunFolder
    flags: dict
    saved: dict    # None: a new run
    desc: str      # label of an epoch
    images: str    # a line that describes them

    @classmethod
    def opened(cls, job, device):
        """The run of a Job (sga_team.py); several runs get a folder each inside --save."""
        s, images, team = job.s, job.images, job.team
        name, data = uap_name(s), s.data_dir if s.data_dir in NAMED else images.kind
        path = s.save.joinpath(*job.apart.values()) if s.save else Path(
            "runs", f"{data}_{name}", job.apart.get("seed", ""))
        folder = team.in_turn(lambda: RunFolder(path, lock=team.first))
        digest = images.sha256()[:16]
        flags = result_flags(s, "preset", device=device.type, weights=s.weights_are,
                             data_dir=f"image list {digest}",
                             **({"processes": team.size} if team.size > 1 else {}))
        saved = team.from_first(lambda: folder.load_checkpoint(
            flags, resume=s.resume, overwrite=s.overwrite, grows=s.method != "dm",
            name=name, what="perturbation"))
        return cls(name, folder, flags, saved, " ".join([*job.apart.values(), "epoch"]),
                   f"{len(images)} images of {s.data_dir}, {s.image_size} pixels, list sha256 "
                   f"{digest}; surrogate {', '.join(s.model_name)}")

    def begin(self, training):
        """Starts the training, or continues it from the checkpoint."""
        say = partial(print, flush=True) if training.team.first else lambda text: None
        say(self.images)
        training.resume(self.saved, self.folder)
        if self.saved is None:
            state = training.state()  # of all processes
            if training.team.first:
                write_atomic(self.folder / "images.txt", training.images.listing().encode())
                (self.folder / f"{self.name}.json").unlink(missing_ok=True)  # of an overwritten run
                save_pth(self.folder / "checkpoint.pth", {**state, "flags": self.flags})
        if training.layers:
            say(f"the loss compares the output of {', '.join(training.layers)}")
        say(f"gradients in {training.amp.replace('off', 'float32')}, {training.layout} (to repeat: "
            f"--amp {training.amp} --layout {training.layout}); fooling_ratio of each epoch: "
            f"n={len(training.watched)} of these images, in that precision")


def open_runs(jobs, device):
    """[(Job, its Run)] of a command. Bad input is refused before the first run starts."""
    runs = [(job, Run.opened(job, device)) for job in jobs]
    largest = sorted(jobs, key=lambda job: job.s.target or 0)  # largest class last, for all
    several = {id(job.surrogates): job for job in largest}.values() if len(jobs) > 1 else ()
    for job in several:  # once for all seeds and targets: checks weights and the compared layer
        size = job.s.image_size
        layers_of(job.models(device), job.s, torch.zeros((1, job.images.channels, size, size),
                                                         device=device))
    return runs


# ------------------------------------------------------------------------ figures, files

def check_count(was, now):
    """UserError if a resumed run can read fewer or more images than it began with."""
    if was != now:
        raise UserError(f"--resume: the run has {was} images, {now} can be read now; restore "
                        "the missing ones or start again (--overwrite)")


def watched(images, gradients):
    """Indices of the images whose fooling ratio is logged after each epoch of so many gradients.

    A forward pass costs about a third of a gradient, so these are about 2 % of an epoch's passes.
    """
    return torch.linspace(0, images - 1, min(
        WATCHED, images, max(1, gradients // PER_IMAGE))).long()


def fooled(training, models, index=slice(None)):
    """[{metric: share}], one dict per model, on the training images at `index`; the processes share
    the work.

    training: train_sga.SgaTraining; models: its surrogates, in the precision to measure in.
    """
    before, target, found = training.labels[:, index], training.s.target, []
    after = predicted(training.team, models, training.pixels[index], training.device,
                      delta=training.delta.contiguous(), chance=training.chance[index].fold(1))
    for b, a in zip(before, after, strict=True):
        found.append({"fooling_ratio": share((a != b).sum().item(), len(b))})
        if target is not None:
            others = b != target
            found[-1]["targeted_success"] = share((a[others] == target).sum().item(),
                                                  others.sum().item())
    return found


def save_perturbation(training, job, one):
    """Saves the perturbation of a Job and its Run, pictures, then the facts, and prints how well it
    fools. Leaves a run that was already finished as it is.
    """
    facts = training.team.from_first(lambda: _finished(one, job.s))
    if not facts:
        shares = fooled(training, training.measured)
        facts = {"on_training_images": {
            target.name: found for target, found in zip(job.surrogates, shares, strict=True)}}
        if training.team.first:
            _save(training, one.folder, one.name, facts)
    for surrogate, found in facts["on_training_images"].items() if training.team.first else ():
        for metric, value in found.items():
            print(f"{metric} {percent(value)} on the training images, {surrogate}")
    if training.team.first:
        print(f"saved {one.folder / one.name}.pth (.json, .png), {training.seconds:.0f} s")


def _finished(one, s):
    """The facts that an earlier command saved after the last epoch, else {}."""
    path, rows = one.folder / f"{one.name}.json", one.saved["rows"] if one.saved else ()
    files = (path, path.with_suffix(".pth"), path.with_suffix(".png"), one.folder / "curve.png")
    whole = len(rows) == s.epochs and all(file.is_file() for file in files)
    facts = load_json(path) if whole else {}
    there = isinstance(facts, dict) and isinstance(facts.get("on_training_images"), dict)
    return facts if there and facts.get("epochs") == s.epochs else {}


def _save(training, folder, name, shares):
    s, images, delta = training.s, training.images, training.delta[0].contiguous()
    save_pth(folder / f"{name}.pth", delta)
    write_atomic(folder / f"{name}.png", draw.encode_delta(delta))
    write_atomic(folder / "curve.png", draw.curves(training.rows, name))
    save_json(folder / f"{name}.json", {
        "name": name, "scale": 1, "shape": list(delta.shape), "kind": images.kind,
        **{key: getattr(s, key) for key in MADE_BY}, "weights": s.weights_are,
        **({"layers": training.layers} if training.layers else {}),
        "data_dir": str(s.data_dir), "labels": s.labels,
        "classes_are": s.classes, "num_images": len(images),
        "skipped": list(images.skipped), "images_sha256": images.sha256(),
        **shares,
        "gradients": len(s.model_name) * sum(training.uses) * s.epochs,
        "amp": training.amp, "layout": training.layout, "seconds": round(training.seconds, 1),
        **provenance(training.device, s.deterministic)})
