"""Draws the pictures in imgs/ from files of finished runs; trains and evaluates nothing.

    python figures.py --uaps runs/eval --rows sga_0:SGA spgd_0:SPGD --examples runs/photo   uaps.png
    python figures.py --examples runs/eval                                               digits.png
    python figures.py --curves runs/eval --over gradients --rows 'sga_*:SGA'      uap_gradients.png
    python figures.py --w_sweep runs/w_vgg16 runs/w_resnet50                              gcm_w.png
    python figures.py --eps_curves runs/eval_net --rows mlp cnn:CNN                  eps_curves.png
    python figures.py --corruptions runs/eval_net --rows plain stage1:augmented       challenge.png
    python figures.py --exercise runs/mnist/clean runs/mnist/fgs                 mnist_examples.png
    python figures.py --augmentations                                                   augment.png

Every picture is written to --out, by default under the name above in imgs/.
"""

import csv
import fnmatch
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF

from utils import draw
from utils.augment import OPS
from utils.cli import Parser, at_least, run_script
from utils.data import read_image, to_float
from utils.errors import DAMAGE, UserError, reading
from utils.measure import share
from utils.report import percent
from utils.report_mnist import called, read_examples
from utils.run import load_json, make_generator, refuse_bomb, write_atomic
from utils.sources import label_of
from utils.uaps import read_uap

OVER = {"gradients": "image gradients", "num_images": "images"}  # facts of a perturbation


def get_args():
    parser = Parser("Draw one picture of imgs/ from the files of finished runs.")
    add = parser.add_argument
    add("--uaps", "--results", type=Path, help="folder of eval_uap.py: perturbations, and their "
        "fooling ratios as bars; None: runs/eval, if no other picture is asked for")
    add("--examples", type=Path, help="folder with examples.npz of eval_uap.py: clean and "
        "perturbed images; with --uaps, the picture starts with the first of them")
    add("--curves", type=Path, help="folder of eval_uap.py: fooling ratio against --over; each "
        "pattern of --rows, such as 'sga_*:SGA', is a curve")
    add("--over", choices=tuple(OVER), default="gradients", help="horizontal axis of --curves")
    add("--w_sweep", type=Path, nargs="+", help="folders with w_sweep.csv of gcm.py: robustness "
        "against GCM's w")
    add("--eps_curves", type=Path, nargs="+", help="folders of eval_net.py --eps_curve: robust "
        "accuracy against the radius")
    add("--corruptions", type=Path, help="folder of eval_net.py --corruptions: accuracy by "
        "family of corruption, minus that of the first of --rows")
    add("--exercise", type=Path, nargs="+", help="run folders of fgsm_mnist.py: the same images "
        "attacked for each network")
    add("--augmentations", action="store_true", help="every operation of utils/augment.py")
    add("--rows", nargs="+", help="perturbations or networks to show, as NAME or NAME:LABEL; "
        "None: all")
    add("--credit", default="", help="line below the picture of --uaps, to credit the photograph")
    add("--image", type=Path, help="image file for --augmentations; None: a drawn scene")
    add("--image_size", type=at_least(16, high=2048), default=160, help="image side in pixels")
    parser.shared("seed", seed={"help": "of the augmentations"})
    add("--out", type=Path, help="PNG file to write; None: the usual name in imgs/")
    return parser.parse_args()


# ------------------------------------------------------------------- the pictures

def uaps_picture(args):
    """A perturbed photograph, amplified perturbations, and their fooling ratios with n."""
    folder = args.uaps or Path("runs/eval")
    results = _results(folder, "--uaps", "eval_uap.py")
    deltas, ratios = {}, {}
    for name, label in _chosen(args.rows, results["uaps"], folder):
        saved = results["uaps"][name]
        deltas[label] = read_uap(saved["path"], scale=saved["scale"], eps=1).delta
        ratios[label] = {row["target"]: row["fooling_ratio"] for row in results["rows"]
                         if row["uap"] == name}
    if not deltas:
        raise UserError(f"--uaps {folder}: no perturbation in its results.json; run eval_uap.py")
    if not args.examples:
        return draw.uaps(deltas, ratios)
    saved = _examples(args.examples)
    labels = dict(_chosen(args.rows, results["uaps"], folder))
    seen = zip(saved["networks"], saved["clean"], saved["seen"], strict=True)
    photograph = {"x": saved["x"][0], "x_adv": saved["x_adv"][0],
                  "seen": {name: (before[0], after[0]) for name, before, after in seen},
                  "uap": next((label for name, label in labels.items()
                               if name.split("/")[-1] == saved["uap"].split("/")[-1]),
                              saved["uap"])}
    return draw.uaps(deltas, ratios, photograph, args.credit)


def examples_picture(args):
    """Clean images, the perturbation, and the perturbed images."""
    saved = _examples(args.examples)
    rows = _results(args.examples, "--examples", "eval_uap.py")["rows"]
    found = next(row["fooling_ratio"] for row in rows
                 if (row["uap"], row["target"]) == (saved["uap"], saved["target"]))
    return draw.examples(saved["x"], saved["x_adv"], saved["delta"], saved["before"],
                         saved["after"], f"{saved['uap']}, predictions of {saved['target']}\n"
                         f"fooling ratio {percent(found)}")


def curves_picture(args):
    """Fooling ratios against the gradients or images used to make the perturbations."""
    results = _results(args.curves, "--curves", "eval_uap.py")
    about, curves = results["protocol"]["targets"], {}  # about: target -> weights
    for pattern, _, label in (row.partition(":") for row in args.rows or ["*"]):
        names = fnmatch.filter(results["uaps"], pattern)
        if not names:
            raise UserError(f"--rows {pattern}: not in {args.curves}, which has "
                            f"{', '.join(results['uaps'])}")
        for name in names:
            facts = results["uaps"][name]["facts"]
            if args.over not in facts:
                raise UserError(f"--curves {args.curves}: {name} has no facts; leave it out with "
                                "--rows")
            own = {target for target in about if _made_on(target, facts, about)}
            shares = {row["target"]: (row["fooling_ratio"], row["target"] in own)
                      for row in results["rows"] if row["uap"] == name}
            curves.setdefault(label or pattern, {}).setdefault(facts[args.over], []).append(shares)
    return draw.against(curves, list(about), OVER[args.over])


def _made_on(target, facts, about):
    """Whether the perturbation was made on this target with these weights."""
    return about[target] in facts.get("weights", about.values()) and target in {
        *map(label_of, facts.get("model_name", ())), *facts.get("on_training_images", ())}


def w_sweep_picture(args):
    """Robustness against w, a panel for each network."""
    return draw.sweep(_table("--w_sweep", args.w_sweep, "w_sweep.csv", "gcm.py with --w_sweep",
                             ("model", "attacker", "w")))


def eps_curves_picture(args):
    """Robust accuracy against the Linf radius, a panel for each network."""
    rows = _table("--eps_curves", args.eps_curves, "curve.csv", "eval_net.py with --eps_curve",
                  ("network", "attacker", "eps"))
    there = dict.fromkeys(row["network"] for row in rows)
    return draw.eps_curves([row | {"network": label} for name, label in _chosen(
        args.rows, there, args.eps_curves[-1]) for row in rows if row["network"] == name])


def corruptions_picture(args):
    """Accuracy by family of corruption, minus that of the first network."""
    results = _results(args.corruptions, "--corruptions", "eval_net.py")
    cells, settings = results["cells"], results["settings"]
    there = {key.removesuffix(" | corruptions"): cell for key, cell in cells.items()
             if key.endswith(" | corruptions")}
    chosen = _chosen(args.rows, there, args.corruptions)
    if len(chosen) < 2:
        raise UserError(f"--corruptions {args.corruptions}: {len(chosen)} networks measured with "
                        "--corruptions; wanted two or more, the first to compare with")
    n = " / ".join(dict.fromkeys(str(there[name]["n"]) for name, _ in chosen))
    title = f"{Path(settings['data']).name}, n={n} test images"
    return draw.corruptions({label: {
        operation: share(k, there[name]["n"]) for operation, k in there[name]["right"].items()}
        for name, label in chosen}, title, minus_first=True)


def exercise_picture(args):
    """The same digits attacked for each network of the exercise."""
    shown, n = {}, []
    for folder in args.exercise:
        results = _results(folder, "--exercise", "fgsm_mnist.py")
        if not (folder / "examples.npz").is_file():
            raise UserError(f"--exercise {folder}: no examples.npz there; run fgsm_mnist.py first")
        first = results["seeds"][0]
        name = called(results["facts"])
        if name in shown:
            raise UserError(f"--exercise {folder}: another of these networks is called {name} too; "
                            "draw one of them")
        shown[name] = read_examples(folder, first)
        n.append(first["fgs"]["n"])
    picture = draw.exercise(shown, "Predictions are above the images, orange where wrong.\n%: "
                            f"accuracy under the attack (n={' / '.join(map(str, n))} test images)")
    if not picture:
        raise UserError(f"--exercise {args.exercise[0]}: no example is right for all of these "
                        "networks; draw fewer of them")
    return picture


def augmentations_picture(args):
    """Every operation of utils/augment.py on one image."""
    if args.image:
        image = TF.pil_to_tensor(read_image(args.image))
        image = TF.center_crop(TF.resize(image, args.image_size), args.image_size)
    else:
        image = draw.scene(args.image_size)
    generator = make_generator(args.seed)
    shown = {"original": image} | {
        name: operation(image[None], generator=generator)[0] for name, operation in OPS.items()}
    return draw.gallery({name: to_float(x) for name, x in shown.items()})


# ------------------------------------------------------------------------ reading

def _results(folder, flag, script):
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{flag} {folder}: no results.json there; run {script} first")
    return load_json(path)


def _table(flag, folders, name, command, points):
    """The rows of the CSV file `name` in these folders, one table after another.

    UserError if two rows agree in `points`, the columns that identify a point of a line.
    """
    rows = []
    for folder in folders:
        if not (folder / name).is_file():
            raise UserError(f"{flag} {folder}: no {name} there; run {command} first")
        with open(folder / name, newline="") as file:
            rows += csv.DictReader(file)
        there = [tuple(row.get(column) for column in points) for row in rows]
        if len(set(there)) < len(there):
            raise UserError(f"{flag} {folder}: has a {points[0]} that another table has, so their "
                            "lines would merge; draw them in two pictures")
        if not rows:
            raise UserError(f"{flag} {folder}: no rows in its {name}; run {command} again")
    return rows


def _chosen(rows, there, folder):
    """[(name, label)] of --rows, or of all in `there`."""
    chosen = [row.partition(":") for row in rows or there]
    for name, _, _ in chosen:
        if name not in there:
            raise UserError(f"--rows {name}: not in {folder}, which has {', '.join(there)}")
    return [(name, label or name) for name, _, label in chosen]


def _examples(folder):
    """examples.npz of eval_uap.py: x, x_adv, delta as tensors; classes; target, uap, networks."""
    path = folder / "examples.npz"
    if not path.is_file():
        raise UserError(f"--examples {folder}: no examples.npz there; run eval_uap.py with --show")
    try:
        refuse_bomb(path)
        with np.load(path, allow_pickle=False) as file:
            tensors = {key: torch.from_numpy(file[key]) for key in ("x", "x_adv", "delta")}
            return tensors | {key: file[key].tolist() for key in (
                "before", "after", "target", "uap", "networks", "clean", "seen")}
    except (*DAMAGE, OSError):
        raise UserError(f"--examples {folder}: its examples.npz is not one of eval_uap.py; run it "
                        "with --show again") from None


PICTURES = {  # flag: how it is drawn, its name in imgs/, the script whose files it reads
    "w_sweep": (w_sweep_picture, "gcm_w", "gcm.py"),
    "eps_curves": (eps_curves_picture, "eps_curves", "eval_net.py"),
    "corruptions": (corruptions_picture, "challenge", "eval_net.py"),
    "exercise": (exercise_picture, "mnist_examples", "fgsm_mnist.py"),
    "augmentations": (augmentations_picture, "augment", None),
    "curves": (curves_picture, "uap_gradients", "eval_uap.py"),
    "uaps": (uaps_picture, "uaps", "eval_uap.py"),
    "examples": (examples_picture, "digits", "eval_uap.py")}
OF = {"rows": ("uaps", "curves", "eps_curves", "corruptions"), "credit": ("uaps",),
      "image": ("augmentations",)}


def main(args):
    asked = [flag for flag in PICTURES if getattr(args, flag)] or ["uaps"]
    if len(asked) > 1 and asked != ["uaps", "examples"]:
        raise UserError(f"--{asked[0]} and --{asked[1]}: one picture at a time")
    for flag, pictures in OF.items():
        if getattr(args, flag) and asked[0] not in pictures:
            raise UserError(f"--{flag} --{asked[0]}: wanted with --{' or --'.join(pictures)}; "
                            f"leave out --{flag}")
    picture, name, script = PICTURES[asked[0]]
    out = args.out or Path("imgs") / f"{name}.png"
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: wanted the name of a PNG file, such as {name}.png")
    given = getattr(args, asked[0]) or "runs/eval"
    folders = " ".join(map(str, given if isinstance(given, list) else [given]))
    with reading(f"--{asked[0]} {folders}", script) if script else nullcontext():
        png = picture(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, png)
    print(f"drew {out}")


if __name__ == "__main__":
    run_script(get_args, main)
