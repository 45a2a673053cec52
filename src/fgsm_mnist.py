"""The exercise: FGS, FGV and adversarial training on MNIST, every task a flag.

    task                             here
    1  a small network               --batch_norm; lenet, lenet_bn in utils/networks.py
    2  FGS and FGV                   fgs_step and fgv_step of attacks.py; --alpha_fgs, --alpha_fgv
    3  evaluation                    accuracies: clean, and adversarial of what was right before
    4  adversarial training          joint_gradient; --train fgs; (b) curve.png
    5  variations                    --train clean | noise | fgs | fgv, each with --batch_norm
    beyond the sheet                 PGD-40, and Auto-PGD with Square; hollow()

    python fgsm_mnist.py --train fgs                                # digits, offline, seconds
    python fgsm_mnist.py --train fgs --data_dir mnist --batch_norm --seeds 3
    python fgsm_mnist.py --summary runs/mnist/clean runs/mnist/fgs --save runs/mnist

Papers: FGS arXiv:1412.6572, FGV arXiv:1605.01775, label leaking arXiv:1611.01236. A run holds a
folder for each seed, with NAME.pth (a state dict that every script takes as --weights), log.csv and
checkpoint.pth, and the figures over all seeds; killed, it goes on with --resume, on a CPU to the
same bytes.
"""

import csv
import io
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attacks import apgd, fgs_step, fgv_step, pgd, square, worst_case
from robustness import Attack, figures, looks_at, run_cell
from utils import draw
from utils.data import NAMED, load, open_images, to_float
from utils.metrics import interval, markdown, share
from utils.models import freeze, trainable
from utils.run import (
    Parser,
    RunFolder,
    UserError,
    at_least,
    load_json,
    make_generator,
    provenance,
    radius,
    resolve_device,
    run_script,
    save_csv,
    save_json,
    save_pth,
    write_atomic,
)

TRAIN = ("clean", "noise", "fgs", "fgv")
COLUMNS = ("clean", "fgs", "fgv", "pgd40", "strongest")
HIGH, LOW = 0.5, 0.1  # hollow: FGS leaves more than the one, PGD or APGD less than the other
NOT_THE_RESULT = {"save", "data_dir", "data_root", "resume", "overwrite", "summary", "seeds",
                  "seed", "device", "eval_images", "queries"}
EVAL_BATCH = 500
SHOWN = 6  # example images


def get_args():
    parser = Parser("Train a small network on clean, noisy or adversarial images, and attack it.")
    add = parser.add_argument
    add("--data_dir", default="digits", help="digits, mnist (downloads), cifar10, or a folder that "
        "holds MNIST")
    add("--data_root", default="data", help="where named data sets are kept or downloaded to")
    add("--num_images", type=at_least(1), help="training images, evenly over the classes; None: "
        "all")
    add("--batch_norm", action="store_true", help="BatchNorm after all layers but the last")
    add("--train", choices=TRAIN, default="fgs", help="what every batch is joined by")
    add("--alpha_fgs", type=radius, default=0.3, help="strength of FGS, of noise and of the "
        "attacks beyond the sheet")
    add("--alpha_fgv", type=radius, default=0.6, help="strength of FGV: its largest change")
    add("--label", choices=("true", "predicted"), default="true", help="whose loss the attack of "
        "the training climbs; with the true one the network may learn to read the label off the "
        "perturbation (label leaking); predicted costs one more backward pass")
    add("--epochs", type=at_least(1), help="passes over the training images; None: 50, of digits "
        "30")
    add("--batch_size", type=at_least(2), default=128, help="clean images of a step")
    add("--lr", type=at_least(0, float), default=1e-3, help="of Adam")
    add("--seed", type=at_least(0, high=2 ** 62), default=0, help="the first seed")
    add("--seeds", type=at_least(1), default=1, help="how many, one after the other")
    add("--eval_images", type=at_least(1), default=1000, help="test images for the attacks beyond "
        "the sheet, evenly over the classes, or all there are")
    add("--queries", type=at_least(1), default=500, help="of Square")
    add("--summary", nargs="+", type=Path, help="only put these finished run folders into one "
        "table and two figures, in --save")
    add("--save", type=Path, help="run folder; None: runs/DATA_TRAIN[_bn]")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--resume", action="store_true", help="go on with the run in --save")
    add("--overwrite", action="store_true", help="start again over the run in --save")
    return parser.parse_args()


# -------------------------------------------------------------- tasks 2 and 4

def noise_step(x, alpha, generator):
    """x + alpha * {-1, +1}^D, in [0, 1]."""
    signs = 2 * torch.randint(0, 2, x.shape, generator=generator) - 1
    return (x + alpha * signs.to(x)).clamp_(0, 1)


def joint_gradient(model, x, y, adversary, *, label="true"):
    """Adds the gradients of the loss on x (n, C, H, W) and on adversary(x, g) to the weights'.

    g (n, C, H, W), the gradient by the image, comes out of the backward pass of the clean batch;
    the weights are the same for both. Both losses are means. -> clean loss, adversarial loss
    """
    images = x.clone().requires_grad_()
    logits = model(images)
    loss = F.cross_entropy(logits, y)
    if label == "predicted":  # another loss: a backward pass of its own
        g, = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), images,
                                 retain_graph=True)
        loss.backward()
    else:
        loss.backward()
        g = images.grad
    loss_adv = F.cross_entropy(model(adversary(x, g)), y)
    loss_adv.backward()
    return loss.detach(), loss_adv.detach()


def clean_gradient(model, x, y):
    """The same of the clean batch alone."""
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach(), torch.zeros_like(loss)


# ---------------------------------------------------------------------- task 3

def accuracies(model, images, *, alpha_fgs, alpha_fgv, device):
    """{clean, fgs, fgv: share}: of all images; of those right before, how many are right after.

    The adversarial images are made with the true labels; both attacks share one gradient.
    """
    right, left = 0, {"fgs": 0, "fgv": 0}
    for index in torch.arange(len(images)).split(EVAL_BATCH):
        x, y = to_float(images.pixels[index].to(device)), images.labels[index].to(device)
        x.requires_grad_()
        logits = model(x)
        g, = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
        with torch.no_grad():
            good = logits.argmax(1) == y
            right += int(good.sum())
            for name, step, alpha in (("fgs", fgs_step, alpha_fgs), ("fgv", fgv_step, alpha_fgv)):
                x_adv = step(x.detach()[good], g[good], alpha)
                left[name] += int((model(x_adv).argmax(1) == y[good]).sum()) if len(x_adv) else 0
    return {"clean": share(right, len(images)),
            **{name: share(count, right) for name, count in left.items()}}


def beyond(model, images, args, device):
    """{pgd40, strongest: share}: the same under iterated attacks of the strength of FGS."""
    eps = args.alpha_fgs
    strongest = partial(worst_case, attacks={
        "apgd_ce": partial(apgd, eps=eps), "apgd_dlr": partial(apgd, eps=eps, loss="dlr"),
        "square": partial(square, eps=eps, queries=args.queries)})
    forty = partial(pgd, eps=eps, alpha=eps / 30, steps=40, stop_early=True)
    before = looks_at(model, images, draws=1, batch_size=EVAL_BATCH, device=device)
    found = {}
    for name, run in (("pgd40", forty), ("strongest", strongest)):
        cell = run_cell(Attack(name, "linf", eps, run), model, model, images, before, draws=1,
                        batch_size=EVAL_BATCH, generator=make_generator(0), device=device,
                        desc=name)
        found[name] = figures(cell)["attack_robustness"]
    return found


def hollow(found):
    """What is suspicious in {clean, fgs, fgv, pgd40, strongest: value in [0, 1]}, as sentences."""
    said = []
    for name in ("fgs", "fgv"):
        if found[name] > found["clean"]:
            said.append(f"{name} leaves {100 * found[name]:.1f} %, more than the clean accuracy of "
                        f"{100 * found['clean']:.1f} %: label leaking")
    if found["fgs"] > HIGH and min(found["pgd40"], found["strongest"]) < LOW:
        said.append(f"fgs leaves {100 * found['fgs']:.1f} %, pgd40 {100 * found['pgd40']:.1f} %, "
                    f"the strongest {100 * found['strongest']:.1f} %: robust against the one step "
                    "alone (catastrophic overfitting)")
    return said


# ------------------------------------------------------------------------ a run

class Training:
    """One seed: what lives between two epochs."""

    def __init__(self, args, images, seed, device):
        self.args, self.images, self.device = args, images, device
        name = "lenet_bn" if args.batch_norm else "lenet"
        self.model = trainable(name, kind=images.kind, seed=seed).to(
            device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr)
        self.generator, self.rows = make_generator(seed), []

    def state(self):
        return {"net": self.model[1].state_dict(), "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(), "rows": self.rows}

    def restore(self, state):
        self.model[1].load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.rows = state["rows"]

    def gradient(self, x, y):
        """Of the clean batch and of what --train joins to it, in .grad -> the two losses"""
        args = self.args
        if args.train == "clean":
            return clean_gradient(self.model, x, y)
        steps = {"fgs": lambda x, g: fgs_step(x, g, args.alpha_fgs),
                 "fgv": lambda x, g: fgv_step(x, g, args.alpha_fgv),
                 "noise": lambda x, _: noise_step(x, args.alpha_fgs, self.generator)}
        return joint_gradient(self.model, x, y, steps[args.train], label=args.label)

    def epoch(self, bar):
        """One pass over the shuffled images. -> mean losses, clean and joined"""
        self.model.train()
        sums, steps = torch.zeros(2, device=self.device), 0
        order = torch.randperm(len(self.images), generator=self.generator)
        for index in order.split(self.args.batch_size):
            if len(index) < 2:
                continue  # BatchNorm has no statistics of one image
            x = to_float(self.images.pixels[index].to(self.device))
            self.optimizer.zero_grad()
            sums += torch.stack(self.gradient(x, self.images.labels[index].to(self.device)))
            self.optimizer.step()
            steps += 1
            bar.update(len(index))
        return (sums / steps).tolist()


def train(training, test, folder, flags, desc):
    """The epochs that are left; after each a line, a row of log.csv and a checkpoint."""
    args, rows = training.args, training.rows
    while len(rows) < args.epochs:
        start = time.perf_counter()
        with tqdm(total=len(training.images), desc=f"{desc}, epoch {len(rows) + 1}", unit="img",
                  leave=False, disable=None) as bar:
            loss, joined = training.epoch(bar)
        if not loss + joined < float("inf"):
            raise UserError(f"epoch {len(rows) + 1}: the losses are {loss} and {joined}; the last "
                            "checkpoint is kept; type a smaller --lr")
        found = accuracies(training.model.eval(), test, alpha_fgs=args.alpha_fgs,
                           alpha_fgv=args.alpha_fgv, device=training.device)
        rows.append({"epoch": len(rows) + 1, "loss": round(loss, 6),
                     "loss_joined": round(joined, 6),
                     **{name: round(found[name]["value"], 6) for name in found},
                     "seconds": round(time.perf_counter() - start, 3)})
        save_pth(folder / "checkpoint.pth", training.state() | {"flags": flags})
        save_csv(folder / "log.csv", rows)
        print(f"{desc}, epoch {len(rows):3d}/{args.epochs}  " + "  ".join(
            f"{key} {value:.4g}" for key, value in rows[-1].items() if key != "epoch"), flush=True)


def one_seed(args, seed, images, test, few, path, device):
    """Trains and measures one seed in its folder -> its figures"""
    flags = {key: value for key, value in vars(args).items() if key not in NOT_THE_RESULT}
    flags |= {"seed": seed, "images": images.sha256()[:16], "device": device.type}
    folder = RunFolder(path / f"seed{seed}")
    state = folder.load_checkpoint(flags, resume=args.resume, overwrite=args.overwrite)
    training = Training(args, images, seed, device)
    if state is not None:
        training.restore(state)
    name = variation(args)
    train(training, test, folder, flags, f"{name}, seed {seed}")
    model = freeze(training.model)
    found = accuracies(model, test, alpha_fgs=args.alpha_fgs, alpha_fgv=args.alpha_fgv,
                       device=device) | beyond(model, few, args, device)
    save_pth(folder / f"{name}.pth", {k: v.cpu() for k, v in model[1].state_dict().items()})
    save_json(folder / f"{name}.json", {
        "name": name, "kind": images.kind, "data_dir": str(args.data_dir), **flags,
        "model_name": "lenet_bn" if args.batch_norm else "lenet", "num_images": len(images),
        "seconds": round(sum(row["seconds"] for row in training.rows), 1), **provenance(device)})
    if seed == args.seed:
        save_examples(model, test, args, path / "examples.npz", device)
    return {"seed": seed, "seconds": sum(row["seconds"] for row in training.rows), **found}


def save_examples(model, images, args, path, device):
    """The first test images that are right before: clean, FGS, FGV, and what is seen in them."""
    before = looks_at(model, images.select(torch.arange(min(200, len(images)))), draws=1,
                      batch_size=EVAL_BATCH, device=device)
    index = before.nonzero()[:SHOWN, 0]
    if not len(index):
        return
    x, y = to_float(images.pixels[index].to(device)), images.labels[index].to(device)
    x.requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    x = x.detach()
    kinds = [x, fgs_step(x, g, args.alpha_fgs), fgv_step(x, g, args.alpha_fgv)]
    with torch.no_grad():
        seen = np.stack([model(kind).argmax(1).cpu().numpy() for kind in kinds])
    buffer = io.BytesIO()
    np.savez(buffer, x=torch.stack(kinds).cpu().numpy(), seen=seen, y=y.cpu().numpy())
    write_atomic(path, buffer.getvalue())


def variation(args):
    return args.train + "_bn" * args.batch_norm


def run(args, device):
    """Every seed, then the figures over all of them."""
    images = open_images(args.data_dir, split="train", data_root=args.data_root)
    if images.kind not in ("digits", "mnist", "cifar10"):
        raise UserError(f"--data_dir {args.data_dir}: wanted digits, mnist or cifar10, or a folder "
                        "that holds one of the last two")
    test = open_images(args.data_dir, split="test", data_root=args.data_root)
    test, images = (load(part, workers=0) for part in (test, images.prepared(images.size,
                                                                             args.num_images)))
    if len(images) < 2:
        raise UserError(f"--num_images {len(images)}: BatchNorm has no statistics of one image; "
                        "wanted two at least")
    args.epochs = args.epochs or (30 if images.kind == "digits" else 50)
    few = test.prepared(test.size, args.eval_images)
    data = args.data_dir if args.data_dir in NAMED else images.kind
    folder = RunFolder(args.save or Path("runs") / f"{data}_{variation(args)}")
    found = [one_seed(args, seed, images, test, few, folder.path, device)
             for seed in range(args.seed, args.seed + args.seeds)]
    logs = [read_log(folder.path / f"seed{one['seed']}") for one in found]
    write_atomic(folder / "curve.png", draw.variations({variation(args): logs}))
    facts = {"variation": variation(args), "kind": images.kind, "epochs": args.epochs,
             "alpha_fgs": args.alpha_fgs, "alpha_fgv": args.alpha_fgv, "label": args.label,
             "num_images": len(images), "test_images": len(test), "attacked": len(few),
             "images_sha256": images.sha256(), **provenance(device)}
    save_json(folder / "results.json", {"facts": facts, "seeds": found})
    text = table([(facts, found)])
    save_csv(folder / "results.csv", [
        {"seed": one["seed"], "metric": name, **one[name]} for one in found for name in COLUMNS])
    write_atomic(folder / "results.md", text.encode())
    print(text + f"saved {folder.path}/results.json (.csv, .md), curve.png")


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# --------------------------------------------------------------- over variations

def mean_of(found, name):
    """'98.5 +- 0.2' over the seeds, or of one seed its interval."""
    values = torch.tensor([one[name]["value"] for one in found], dtype=torch.float64) * 100
    if len(values) == 1:
        return interval(found[0][name])
    return f"{values.mean():.1f} ± {values.std():.1f}"


def table(runs):
    """Protocol, a line for every variation [(facts, its seeds' figures)], and what is hollow."""
    facts, found = runs[0]
    spread = (f"mean ± standard deviation of {len(found)} seeds" if len(found) > 1
              else "95 % Wilson interval")
    lines = [[facts["variation"], *(mean_of(found, name) for name in COLUMNS),
              f"{sum(one['seconds'] for one in found) / len(found):.0f}"] for facts, found in runs]
    said = [f"{facts['variation']}, seed {one['seed']}: {sentence}\n" for facts, found in runs
            for one in found for sentence in hollow({k: one[k]["value"] for k in COLUMNS})]
    return (f"{facts['kind']}: {facts['num_images']} training images, {facts['epochs']} epochs; "
            f"clean, FGS {facts['alpha_fgs']:g} and FGV {facts['alpha_fgv']:g} on "
            f"n={facts['test_images']} test images, PGD-40 and Auto-PGD + Square at Linf "
            f"{facts['alpha_fgs']:g} on n={facts['attacked']}; attack label {facts['label']}; "
            f"{facts['device']}\nclean_acc, then attack_robustness (of the images right before, "
            f"those right after), %, {spread}; s: training\n\n"
            + markdown(["trained on", "clean", "FGS", "FGV", "PGD-40", "APGD + Square", "s"], lines)
            + "".join(f"\nhollow: {line}" for line in said))


def summarise(folders, out):
    """The runs' table, curves and examples into the folder `out`."""
    runs, logs, shown = [], {}, {}
    for path in folders:
        saved = load_json(path / "results.json") if (path / "results.json").is_file() else None
        if not isinstance(saved, dict) or "variation" not in saved.get("facts", {}):
            raise UserError(f"--summary {path}: no finished run; wanted a folder that "
                            "fgsm_mnist.py left, with results.json in it")
        facts = saved["facts"]
        for key in ("kind", "epochs", "images_sha256", "alpha_fgs", "alpha_fgv"):
            if runs and facts[key] != runs[0][0][key]:
                raise UserError(f"--summary {path}: has {key} {facts[key]}, {folders[0]} "
                                f"{runs[0][0][key]}; wanted runs on the same")
        runs.append((facts, saved["seeds"]))
        logs[facts["variation"]] = [read_log(path / f"seed{one['seed']}")
                                    for one in saved["seeds"]]
        if (path / "examples.npz").is_file():
            with np.load(path / "examples.npz", allow_pickle=False) as file:
                shown[facts["variation"]] = {key: file[key] for key in file}
    text = table(runs)
    folder = RunFolder(out)
    write_atomic(folder / "summary.md", text.encode())
    save_csv(folder / "summary.csv", [
        {"variation": facts["variation"], "seed": one["seed"], "metric": name, **one[name]}
        for facts, found in runs for one in found for name in COLUMNS])
    write_atomic(folder / "curves.png", draw.variations(logs))
    if shown:
        write_atomic(folder / "examples.png", draw.attacked(shown))
    print(text + f"saved {out}/summary.md (.csv), curves.png, examples.png")


def main(args):
    if args.summary:
        summarise(args.summary, args.save or args.summary[0].parent)
    else:
        run(args, resolve_device(args.device))


if __name__ == "__main__":
    run_script(get_args, main)
