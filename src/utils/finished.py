"""Networks trained by free_at.py, train_gcm.py and fgsm_mnist.py: finding them, reading their
NAME.json, and the images that they may be tested on.
"""

import hashlib
import math

from utils.data import (
    NAMED,
    NO_LABELS,
    PRESETS,
    hold_out,
    need_labels,
    open_images,
    paper_geometry,
    unseen,
)
from utils.defenses import DEFENSES
from utils.errors import UserError
from utils.nets import HEADS
from utils.run import load_json
from utils.weights import trained, weights_path

METHODS = ("natural", "free", "pgd", "fast")


def _number(low, high=math.inf, kind=(int, float)):
    return lambda value: (isinstance(value, kind) and not isinstance(value, bool)
                          and low <= value <= high)  # NaN is neither


def _one_of(names):
    return lambda value: isinstance(value, str) and value in names


def _or_none(valid):
    return lambda value: value is None or valid(value)


def _are_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _is_text(value):
    return isinstance(value, str)


COUNT, PIXELS = _number(1, 2 ** 53, int), _number(1e-12, 1)
VALID = {  # fact: whether its value can be used
    "kind": _one_of(PRESETS), "model_name": _is_text, "data_dir": _is_text,
    "data_root": _is_text, "seconds": _number(0, 1e12), "image_size": _number(1, 4096, int),
    "eps": PIXELS, "alpha": _number(1e-12, 2), "alpha_fgs": PIXELS, "method": _one_of(METHODS),
    "replays": COUNT, "clip_delta": _one_of(("ball", "box")), "steps": COUNT, "weight_steps": COUNT,
    "seed": _number(0, 2 ** 62, int), "stage": COUNT, "head": _one_of(HEADS),
    "classes": _are_texts, "labels": _or_none(_is_text),
    "classes_are": _or_none(_one_of(("imagenet",))), "defense": _one_of(DEFENSES),
    "low": _or_none(COUNT), "augment": _are_texts, "w_fgsm": _number(0, 1e12),
    "w_fgsm_target": _number(0, 1e12),
    "hold_out": _or_none(_number(1e-3, 0.5)), "held_out": COUNT, "validated": COUNT,
    "best_pass": COUNT, "given_images": _or_none(COUNT)}
NEEDED = {  # the fact that identifies a script's run: what else it must have
    "replays": ("method", "steps", "eps", "alpha", "weight_steps", "image_size"),
    "hold_out": ("given_images", "classes", "head", "defense", "low", "image_size", "stage",
                 "augment", "w_fgsm"),
    "alpha_fgs": ()}
ORIGIN = ("data_dir", "data_root", "labels", "classes_are", "hold_out", "given_images",
          "validated")  # images
OPTIONAL = {*ORIGIN, "held_out", "clip_delta", "seed", "w_fgsm_target",  # not in older runs
            "best_pass",        # only for the best network
            "head", "classes"}  # only for class folders and cifar100


# ---------------------------------------------------------------------- finding them

def read_runs(paths):
    """[(name, NAME.pth, facts)] of run folders or files, with distinct names."""
    files = list(dict.fromkeys(map(find_run, paths)))
    facts = [read_facts(file) for file in files]
    found = [name_of(one, file.parent) for file, one in zip(files, facts, strict=True)]
    found = [name if found.count(name) == 1 else f"{name}, seed {one.get('seed', 0)}"
             for name, one in zip(found, facts, strict=True)]
    if len(set(found)) < len(found):
        found = list(map(str, files))
    return list(zip(found, files, facts, strict=True))


def find_run(path):
    """NAME.pth of the one run that `path` is or holds; fgsm_mnist.py puts seeds in RUN/seedN."""
    if not path.is_dir():
        return path
    for pattern in ("*.json", "seed*/*.json"):
        found = [file.with_suffix(".pth") for file in sorted(path.glob(pattern))
                 if file.with_suffix(".pth").is_file() and _of_network(file)
                 and not _beside_the_last(file)]
        if len(found) > 1:
            raise UserError(f"--runs {path}: {len(found)} networks in it; name one of them: "
                            + ", ".join(str(file.relative_to(path)) for file in found))
        if found:
            return found[0]
    raise UserError(f"--runs {path}: no run there; wanted a folder that free_at.py, train_gcm.py "
                    "or fgsm_mnist.py left, with NAME.pth and NAME.json in it")


def _beside_the_last(path):
    """Whether it is NAME_best.json beside NAME.pth, which represents the run."""
    name = path.stem.removesuffix("_best")
    return name != path.stem and path.with_name(f"{name}.pth").is_file()


def _of_network(path):
    """Whether these are facts of a network; those of a perturbation have a scale."""
    facts = load_json(path)
    return isinstance(facts, dict) and "scale" not in facts


def read_facts(path):
    """What NAME.json says about NAME.pth. UserError: a file is missing, or the facts are invalid.
    """
    beside = path.with_suffix(".json")
    if not path.is_file() or not beside.is_file():
        raise UserError(f"--runs {path}: no such run; wanted a run folder, or NAME.pth with "
                        f"{beside.name} next to it")
    return checked(load_json(beside), beside)


def checked(facts, path):
    """The same facts. UserError unless they describe a run and have valid values."""
    facts = facts if isinstance(facts, dict) else {}
    kind = next((key for key in NEEDED if key in facts), None)
    if kind is None:
        raise UserError(f"{path}: does not say how the network was trained; wanted what "
                        "free_at.py, train_gcm.py or fgsm_mnist.py writes")
    needed = ("kind", "model_name", "data_dir", "seconds", kind, *NEEDED[kind])
    for key in (*needed, *sorted(facts.keys() & OPTIONAL)):
        if key not in facts or not VALID[key](facts[key]):
            there = f"{key} is {str(facts[key])[:60]}" if key in facts else f"{key} is missing"
            raise UserError(f"{path}: {there}; restore what the training wrote, or train again")
    return facts


def name_of(facts, folder):
    """natural, free8, 'free8 (alpha 0.25 eps, box)', 'pgd (best pass)'; for other runs the
    folder's name.
    """
    if "replays" not in facts:
        folder = folder.resolve()
        seed = folder.name.removeprefix("seed").isdigit()
        return f"{folder.parent.name}/{folder.name}" if seed else folder.name
    name, more = facts["method"], ["best pass"] * ("best_pass" in facts)
    if name == "free":
        part, box = facts["alpha"] / facts["eps"], facts.get("clip_delta") == "box"
        name = f"free{facts['replays']}"
        more = [f"alpha {part:.3g} eps"] * (part != 1) + ["box"] * box + more
    return name + f" ({', '.join(more)})" * bool(more)


# ----------------------------------------------------------------- how they are tested

def linf_radius(facts, kind):
    """Linf radius of the network's training, else 8/255, or the preset on digits and MNIST."""
    preset = PRESETS[kind].eps if kind in ("digits", "mnist") else 8 / 255
    return facts.get("eps", facts.get("alpha_fgs", preset))


def origin(path):
    """The facts in NAME.json next to weights that determine their test images; {}: none.

    UserError: a run of ours, but with invalid values.
    """
    facts = trained(path) if path else {}
    if not facts.keys() & NEEDED:
        return {}
    facts = checked(facts, path)
    kept = facts if "stage" in facts else (*ORIGIN, "classes")
    return {key: facts[key] for key in kept if key in facts}


def named(targets, *where):
    """What images_for takes, for networks given by name and --weights, [models.Target].

    where: data_dir, data_root, and --labels and --classes if they were typed.
    """
    return [(target.name, facts_of(target), *where) for target in targets]


def facts_of(target):
    """The facts that determine a models.Target's test images, and its output classes if these are
    the folders of a data set with its own class names.
    """
    found = origin(weights_path(target.typed, target.weights))
    return found | ({"classes": list(target.classes)} if target.classes else {})


def images_for(networks):
    """-> test images that no network was trained on, names only; what a reader must know, or ''.

    networks: [(name, facts, data_dir, data_root, labels, classes)], facts {} for one that is not a
    run of ours; the last two may be missing.
    UserError: there are no such images, or the networks would get different ones.
    """
    ours = [network for network in networks if "data_dir" in network[1]] or networks[:1]
    opened = {}
    for name, facts, *where in ours:
        key = str([where, *map(facts.get, (*ORIGIN, "held_out", "stage"))])
        images, _ = opened[key] = opened.get(key) or unseen_by(facts, *where)
        first = next(iter(opened.values()))[0]
        if (images.kind, images.sha256()) != (first.kind, first.sha256()):
            raise UserError(f"{name} is tested on {len(images)} {images.kind} images, "
                            f"{ours[0][0]} on {len(first)} other {first.kind} images; wanted "
                            "networks tested on the same images")
    notes = [note for _, note in opened.values() if note] + [
        f"the pass of {name} was chosen on {facts['validated']} test or held-out images"
        for name, facts, *_ in ours if "validated" in facts]
    return first, "; ".join(dict.fromkeys(notes))


def unseen_by(facts, data_dir, data_root, labels=None, classes=None):
    """-> the test images, without those that the network was trained on; a note for the reader."""
    images = open_images(data_dir, split="test", data_root=data_root, labels=labels,
                         classes=classes)
    if "data_dir" not in facts or facts["data_dir"] in NAMED:  # these have test images
        return images, ""
    note = "held out of the training images" + (
        ", and the best epoch was chosen on them" * ("stage" in facts))
    train = _trained_on(facts)
    if train is None and facts.get("hold_out"):  # perhaps trained on these
        images, held = unseen(data_dir, data_root, facts["hold_out"], facts.get("given_images"),
                              labels, classes)
        return images, note * held
    if train is None or None in (train.root, images.root) or (
            train.root.resolve() != images.root.resolve()) or (
            not set(train.names) & set(images.names)):  # lists of one folder, or parquet
        return images, ""
    train = train.prepared(train.geometry, facts.get("given_images"))
    if facts.get("hold_out"):
        held = hold_out(train.labels, facts["hold_out"]).nonzero()[:, 0].tolist()
        if len(held) != facts.get("held_out", len(held)):  # held out by an older version
            raise UserError(f"--data_dir {data_dir}: --hold_out {facts['hold_out']} holds out "
                            f"{len(held)} images today, {facts['held_out']} in the training; train "
                            "again, or type --data_dir with test images")
        return train.select(held), note
    left = images.without(train.names)
    if not len(left):
        raise UserError(f"--data_dir {data_dir}: the network was trained on all of these images; "
                        "type --data_dir with others, or train again: free_at.py holds some out")
    return left, "without those that a network was trained on"


def _trained_on(facts):
    """The images given to a run, including the held-out ones; None: they are gone."""
    labels, classes = (facts.get(key) if VALID[key](facts.get(key)) else None
                       for key in ("labels", "classes_are"))
    try:
        return open_images(facts["data_dir"], split="train", labels=labels, classes=classes)
    except UserError:
        return None


def said_of(uaps, images, num_images, note):
    """The note of images_for, and which of [uaps.Uap] were made on the images they are measured on.

    images: the whole list, names only; num_images: how many of these are measured, or None.
    """
    measured = set(images.prepared(images.geometry, num_images).names)
    opened, notes = {}, [note, NO_LABELS * (not images.has_labels)]
    made_on = {uap.name: measured & set(_made_on(uap, images, opened)) for uap in uaps}
    for whole, start in ((True, "these"), (False, "some of these")):
        found = [name for name, common in made_on.items()
                 if common and (common == measured) is whole]
        if found:
            notes.append(f"{start} are the images that {', '.join(found)} "
                         f"{'was' if len(found) == 1 else 'were'} made on")
    return "; ".join(filter(None, notes))


def _made_on(uap, images, opened):
    """The names of the images that a perturbation was made on, if they are in the same folder.

    opened {data_dir: Images}: lists opened so far, to which it adds.
    """
    facts = uap.facts
    num, skipped, where = (facts.get(key) for key in ("num_images", "skipped", "data_dir"))
    if not COUNT(num):
        return ()
    if _is_text(where) and where not in NAMED:
        opened[where] = opened.get(where) or _trained_on(facts)
    train = opened.get(where) if _is_text(where) else None
    if train is None or None in (train.root, images.root):
        train = images
    elif train.root.resolve() != images.root.resolve():
        return ()  # the files of train/ and val/ may have the same names
    skipped = list(map(str, skipped)) if isinstance(skipped, list) else []
    geometry = train.geometry if train.root is None else paper_geometry(uap.delta.shape[-1])
    taught = train.prepared(geometry, num + len(skipped)).without(skipped)
    names_alone = "".join(f"{name}\n" for name in taught.names)  # what older versions hashed
    hashes = taught.sha256(), hashlib.sha256(names_alone.encode()).hexdigest()
    return taught.names if facts.get("images_sha256") in hashes else ()


def check_images(networks, images, num_images):
    """UserError unless the labels are the networks' classes and there are enough images."""
    for _, facts, data_dir, *_ in networks:
        need_labels(images, data_dir)
        if images.kind != facts.get("kind", images.kind):
            raise UserError(f"--data_dir {data_dir}: {images.kind} images; the network was trained "
                            f"on {facts['kind']}")
        taught = facts.get("classes", list(images.classes) if images.labelled else [])
        if list(images.classes) != taught[:len(images.classes)]:
            raise UserError(f"--data_dir {data_dir}: its {len(images.classes)} classes are not "
                            f"those of the network ({len(taught) or 1000}); wanted those that it "
                            "was trained on, for torchvision's networks folders such as n01440764")
        if num_images and num_images > len(images):
            raise UserError(f"--num_images {num_images}: {data_dir} has {len(images)}; type "
                            f"--num_images {len(images)}, or leave it out")
