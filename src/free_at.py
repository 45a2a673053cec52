"""Adversarial training for free (Shafahi et al., NeurIPS 2019, arXiv:1904.12843), and beside it.

    natural   clean images
    pgd       K steps of PGD, then one step of the weights    Madry et al., arXiv:1706.06083
    free      Alg. 1: every minibatch m times in a row; one backward pass serves the weights and
              delta, which is never reset
    fast      one step from a random start                    Wong et al., arXiv:2001.03994

    python free_at.py --method free --replays 8                       # digits, offline, seconds
    python free_at.py --method pgd --data_dir cifar10 --model_name preact_resnet18
    torchrun --nproc_per_node 4 free_at.py --method free --replays 4 --data_dir /data/imagenet \\
        --model_name resnet50
    python free_at.py --evaluate runs/digits_free8_mlp/free8_mlp.pth
    python free_at.py --compare runs/digits_natural_mlp runs/digits_free8_mlp runs/digits_pgd_mlp

Natural and free training take the same number of weight steps for the same --epochs: free passes
over the images ceil(epochs / m) times. A run leaves NAME.pth (the network's state dict, which every
script takes as --weights), NAME.json, log.csv, curve.png, results.* and checkpoint.pth; killed, it
goes on with --resume, on a CPU to the same bytes.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attacks import pgd
from free_eval import compare, evaluate, given_uaps, test_images
from utils import draw
from utils.attacking import own_generators
from utils.data import NAMED, default_workers, load, open_images, to_float
from utils.models import (
    check_name,
    input_size,
    joint_batch_norm,
    trainable,
)
from utils.passes import one_pass
from utils.precision import synchronize
from utils.run import (
    Parser,
    RunFolder,
    UserError,
    at_least,
    join_team,
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

PRESETS = {  # eps, alpha of pgd, network, epochs, batch, learning rate, weight decay
    "digits": (0.1, 0.025, "mlp", 80, 64, 0.03, 0.0),
    "mnist": (0.3, 0.05, "cnn", 16, 128, 0.03, 0.0),
    "cifar10": (8 / 255, 2 / 255, "preact_resnet18", 80, 128, 0.1, 5e-4),
    "imagenet": (4 / 255, 1 / 255, "resnet50", 90, 256, 0.1, 1e-4)}
NOT_THE_RESULT = {"workers", "resume", "overwrite", "save", "data_root", "data_dir", "evaluate",
                  "compare", "uaps_save", "eval_images", "queries", "device"}
PROBED = 200       # training images on which PGD looks every epoch


def get_args():
    parser = Parser("Train a network naturally or adversarially, and evaluate it.")
    add = parser.add_argument
    add("--data_dir", help="folder of class folders, or " + ", ".join(NAMED) + "; None: digits, "
        "or what --evaluate was trained on")
    add("--data_root", default="data", help="where named data sets are kept or downloaded to")
    add("--num_images", type=at_least(1), help="training images, evenly over the classes; None: "
        "all")
    add("--model_name", help="network; None: the data set's preset")
    add("--pretrained", default="random", help="weights to start from: V1 or another of "
        "torchvision's, the path of a state dict, or random")
    add("--method", choices=("natural", "pgd", "free", "fast"), default="free", help="training")
    add("--replays", type=at_least(1), default=8, help="m of free: how often in a row a minibatch "
        "is trained on")
    add("--eps", type=radius, help="of Linf, in [0, 1] pixels; None: the data set's preset")
    add("--alpha", type=radius, help="step size; None: free eps, fast 1.25 eps, pgd preset")
    add("--steps", type=at_least(1), default=7, help="K of pgd")
    add("--epochs", type=at_least(1), help="passes over the images, for free divided by m; None: "
        "preset")
    add("--batch_size", type=at_least(2), help="images of a weight step over all processes; None: "
        "preset")
    add("--lr", type=at_least(0, float), help="of SGD; None: preset")
    add("--momentum", type=at_least(0, float), default=0.9, help="of SGD")
    add("--weight_decay", type=at_least(0, float), help="of SGD; None: preset")
    add("--schedule", choices=("step", "onecycle"), default="step", help="step: a tenth after half "
        "and again after three quarters of the weight steps; onecycle: up for 40 %%, down to 0")
    add("--augment", choices=("auto", "off"), default="auto", help="auto: crop and flip, but for "
        "digits and mnist")
    add("--guard", choices=("stop", "warn", "off"), default="warn", help="when a PGD on training "
        "images finds that robustness has collapsed; stop: end with the best weights so far")
    add("--amp", choices=("auto", "off", "bf16"), default="auto", help="precision of training; "
        "auto: bf16 on a GPU that has it, else float32; evaluation is float32")
    add("--evaluate", type=Path, help="only evaluate this NAME.pth of an earlier run")
    add("--compare", nargs="+", type=Path, help="only put these finished run folders into one "
        "table, beside the paper's")
    add("--eval_images", type=at_least(1), help="test images attacked, evenly over the classes; "
        "None: all")
    add("--queries", type=at_least(1), default=1000, help="of Square in the evaluation")
    add("--uaps_save", nargs="+", help="universal perturbations to measure on the network "
        "too")
    add("--save", type=Path, help="run folder; None: runs/DATA_METHOD_MODEL; with --evaluate: "
        "where its tables go, None: beside the network")
    add("--seed", type=at_least(0, high=2 ** 63 - 1), default=0, help="fixes everything random")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    add("--resume", action="store_true", help="go on with the run in --save")
    add("--overwrite", action="store_true", help="start again over the run in --save")
    return parser.parse_args()


# ---------------------------------------------------------------- the methods

def free_minibatch(update, x, delta, *, eps, alpha, m):
    """Alg. 1, lines 6 to 12: m weight steps on one minibatch x (n, C, H, W); delta, in place.

    update(x) takes a step of the weights on the images x by one backward pass, which also leaves
    the gradient in what x was computed from.
    """
    for _ in range(m):
        noise = delta.clone().requires_grad_()
        update((x + noise).clamp(0, 1))  # only what the network sees is cut to [0, 1]
        delta.add_(alpha * noise.grad.sign()).clamp_(-eps, eps)


def fast_start(model, x, y, u, *, eps, alpha):
    """One signed step from the random point x + eps (2 u - 1); u (n, C, H, W) in [0, 1)."""
    delta = (eps * (2 * u - 1)).requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model((x + delta).clamp(0, 1)), y), delta)
    return (x + (delta + alpha * g.sign()).clamp(-eps, eps).detach()).clamp(0, 1)


def rate(done, total, schedule):
    """Learning rate after `done` of `total` weight steps, over the highest."""
    t = done / total
    if schedule == "onecycle":
        return t / 0.4 if t < 0.4 else (1 - t) / 0.6
    return 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01


def passes(args):
    """How often the images are gone through; the same weight steps for free as for the others."""
    return math.ceil(args.epochs / args.replays) if args.method == "free" else args.epochs


# ------------------------------------------------------------------ an epoch

class Training:
    """Network, optimiser, delta and generator of a run: what lives between two steps."""

    def __init__(self, args, images, team, device):
        if images.pixels is not None:
            images = replace(images, pixels=images.pixels_on(device))
        self.args, self.images, self.team, self.device = args, images, team, device
        self.model = trainable(args.model_name, kind=images.kind, weights=args.pretrained,
                               seed=args.seed, data_dir=args.data_dir, data_root=args.data_root
                               ).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), args.lr, args.momentum,
                                         weight_decay=args.weight_decay)
        shape = (args.batch_size, images.channels, args.image_size, args.image_size)
        self.delta = torch.zeros(shape)[team.rank::team.size].to(device)
        self.generator, self.rows, self.epoch, self.done = make_generator(args.seed), [], 0, 0
        self.best, self.stopped = {"probe": 0.0, "net": None}, False
        self.smallest = max(2, team.size)  # BatchNorm has no statistics of one image; one for each
        last = len(images) % args.batch_size
        batches = len(images) // args.batch_size + (last >= self.smallest)
        self.total = passes(args) * batches * (args.replays if args.method == "free" else 1)
        self.net = self.model if team.size == 1 else self.in_parallel()

    def in_parallel(self):
        self.model = joint_batch_norm(self.model, self.device)
        return DistributedDataParallel(self.model, broadcast_buffers=False)

    def state(self):
        """All that decides what comes next; every process calls it."""
        delta = self.team.gather(self.delta)
        return {"epoch": self.epoch, "done": self.done, "net": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "delta": delta.cpu(), "best": self.best,
                "stopped": self.stopped, "generator": self.generator.get_state(), "rows": self.rows}

    def restore(self, state):
        self.model.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.delta.copy_(state["delta"][self.team.rank::self.team.size])
        self.generator.set_state(state["generator"])
        self.epoch, self.done = state["epoch"], state["done"]
        self.rows, self.best, self.stopped = (state[k] for k in ("rows", "best", "stopped"))

    def minibatches(self):
        """(images of the joint batch, this process's x (n, C, H, W) in [0, 1], y (n,))"""
        images, args = self.images, self.args
        for joint, index, x in one_pass(images, args.batch_size, self.generator, self.team,
                                        vary=args.augment == "auto", smallest=self.smallest,
                                        workers=args.workers):
            yield joint, to_float(x.to(self.device)), images.labels[index].to(self.device)

    def run_epoch(self, bar):
        """One pass over the shuffled images. -> mean loss, accuracy on what was trained on"""
        args, sums = self.args, torch.zeros(3, device=self.device)
        for joint, x, y in self.minibatches():
            update = partial(self.update, y=y, joint=joint, sums=sums, bar=bar)
            if args.method == "free":
                free_minibatch(update, x, self.delta[:len(x)], eps=args.eps, alpha=args.alpha,
                               m=args.replays)
            else:
                with self.precision():
                    x = self.attacked(x, y, joint)
                update(x)
        loss, right, count = self.team.total(sums.tolist())
        return loss / count, right / count

    def precision(self):
        """bf16 for the network's layers where asked for; losses and images stay float32."""
        amp = self.args.amp == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if amp else nullcontext()

    def attacked(self, x, y, joint):
        """What the weights step on: x itself, or its worst by pgd or fast."""
        args, team = self.args, self.team
        if args.method == "pgd":
            own = own_generators(self.generator, joint)[team.rank::team.size]
            return pgd(self.model, x, y, eps=args.eps, alpha=args.alpha, steps=args.steps,
                       generator=own)
        if args.method == "fast":
            u = torch.rand((joint, *x.shape[1:]), generator=self.generator)
            return fast_start(self.model, x, y, u[team.rank::team.size].to(x), eps=args.eps,
                              alpha=args.alpha)
        return x

    def update(self, x, *, y, joint, sums, bar):
        """One weight step on the joint batch of `joint` images, of which x, y are ours."""
        lr = self.args.lr * rate(self.done, self.total, self.args.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.precision():
            logits = self.net(x)
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        self.optimizer.zero_grad()
        (loss * (self.team.size / joint)).backward()  # processes are averaged
        self.optimizer.step()
        self.done += 1
        sums += torch.stack([loss.detach(), (logits.argmax(1) == y).sum(),  # no wait for a GPU
                             loss.new_tensor(len(y))])
        bar.update()


# --------------------------------------------------------------------- a run

def settle(args):
    """Fills in what the data set presets, refuses what cannot work; -> training images."""
    images = open_images(args.data_dir, split="train", data_root=args.data_root)
    if not images.labelled:
        raise UserError(f"--data_dir {args.data_dir}: its folders are no classes of the networks; "
                        "wanted folders named by wnid, such as n01440764")
    eps, alpha, name, epochs, batch, lr, decay = PRESETS[images.kind]
    args.model_name, args.eps = args.model_name or name, args.eps or eps
    args.alpha = args.alpha or {"free": args.eps, "fast": 1.25 * args.eps}.get(args.method, alpha)
    args.epochs, args.batch_size = args.epochs or epochs, args.batch_size or batch
    args.lr = lr if args.lr is None else args.lr
    args.weight_decay = decay if args.weight_decay is None else args.weight_decay
    check_name(args.model_name, images.kind)
    args.image_size = input_size(args.model_name, images.kind, images.size, "random")
    images = images.prepared(args.image_size, args.num_images)
    if args.batch_size > len(images):
        raise UserError(f"--batch_size {args.batch_size}: there are {len(images)} training images; "
                        "type a smaller --batch_size")
    return images


def probe(training):
    """adv_acc under PGD of 10 steps on a fixed few of the training images, in eval mode."""
    args, images, device, right = training.args, training.images, training.device, 0
    index = torch.linspace(0, len(images) - 1, min(PROBED, len(images))).long()
    few = load(images.select(index), workers=0)
    mode = training.model.training
    for k in torch.arange(len(few)).split(50):
        x, y = to_float(few.pixels[k].to(device)), few.labels[k].to(device)
        x_adv = pgd(training.model, x, y, eps=args.eps, alpha=args.eps / 4, steps=10,
                    stop_early=True)
        with torch.no_grad():
            right += int((training.model.eval()(x_adv).argmax(1) == y).sum())
        training.model.train(mode)
    return right / len(few)


def train(training, folder, flags):
    """The epochs that are left; after each a line, a row of log.csv and a checkpoint."""
    args, team, device = training.args, training.team, training.device
    count = passes(args)
    while training.epoch < count and not training.stopped:
        synchronize(device)
        start = time.perf_counter()
        training.net.train()
        with tqdm(total=training.total // count, desc=f"epoch {training.epoch + 1}", leave=False,
                  disable=None if team.first else True) as bar:
            loss, acc = training.run_epoch(bar)
        synchronize(device)
        broken = sum(not p.isfinite().all() for p in training.model.parameters())
        if not math.isfinite(loss) or broken:
            raise UserError(f"epoch {training.epoch + 1}: the loss is {loss:g}, {broken} layers "
                            "have weights that are not finite; the last checkpoint is kept; type "
                            "a smaller --lr")
        training.epoch += 1
        row = {"epoch": training.epoch, "weight_steps": training.done, "loss": round(loss, 6),
               "train_acc": round(acc, 6), "seconds": round(time.perf_counter() - start, 3),
               "probe_adv_acc": ""}
        if args.method != "natural" and args.guard != "off":
            row["probe_adv_acc"] = watch(training)
        training.rows.append(row)
        state = training.state()
        if team.first:
            save_pth(folder / "checkpoint.pth", {**state, "flags": flags})
            save_csv(folder / "log.csv", training.rows)
            print(f"epoch {training.epoch:3d}/{count}  " + "  ".join(
                f"{key} {value:.4g}" for key, value in row.items() if key != "epoch" and value != ""
            ), flush=True)


def watch(training):
    """The probe's value; --guard's word or deed where half of its best is lost. -> value"""
    value, best = probe(training), training.best
    stop = training.args.guard == "stop"
    if value >= best["probe"]:
        net = {k: v.clone() for k, v in training.model[1].state_dict().items()} if stop else None
        training.best = {"probe": value, "net": net}
    elif best["probe"] > 0.1 and value < best["probe"] / 2:
        if training.team.first:
            print(f"warning: PGD-10 on training images leaves {100 * value:.1f} % after "
                  f"{100 * best['probe']:.1f} %: catastrophic overfitting"
                  + "; the run ends with the better weights" * stop, flush=True)
        if stop:
            training.stopped = True
            training.model[1].load_state_dict(best["net"])
    return value


def run_name(args):
    method = f"free{args.replays}" if args.method == "free" else args.method
    return f"{method}_{args.model_name}"


def main(args):
    if args.compare:
        print(compare(args.compare), end="")
        return
    device = resolve_device(args.device)
    team, device = join_team(device)
    if args.amp == "auto":
        args.amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    if args.evaluate:
        if team.first:
            measure(args, args.evaluate, RunFolder(args.save or args.evaluate.parent), device)
    else:
        run(args, team, device)
    if team.size > 1:
        torch.distributed.destroy_process_group()


def run(args, team, device):
    """Trains, and evaluates what came out."""
    args.data_dir = args.data_dir or "digits"
    images = settle(args)
    name = run_name(args)
    data = args.data_dir if args.data_dir in NAMED else images.kind
    path = args.save or Path("runs") / f"{data}_{name}"
    if args.batch_size < team.size:
        raise UserError(f"--batch_size {args.batch_size}: there are {team.size} processes; wanted "
                        "an image for each")
    test_images(args.data_dir, args.data_root, args.eval_images)  # what is missing is said now
    given_uaps(args.uaps_save, images.kind)
    folder = RunFolder(path, lock=team.first)
    flags = {key: value for key, value in vars(args).items() if key not in NOT_THE_RESULT}
    flags.update(images=images.sha256()[:16], processes=team.size, device=device.type)
    state = folder.load_checkpoint(flags, resume=args.resume, overwrite=args.overwrite)
    if images.kind != "imagenet" or args.augment == "off":  # else decoded anew in every pass
        images = load(images, workers=args.workers)
    training = Training(args, images, team, device)
    if state is not None:
        training.restore(state)
    elif team.first:
        for left_over in ("checkpoint.pth", "results.json"):  # --overwrite: the old run ends here
            (folder / left_over).unlink(missing_ok=True)
    if team.first:
        rounded = " (rounded up)" * (args.method == "free" and args.epochs % args.replays > 0)
        print(f"{len(images)} images of {args.data_dir}, {args.model_name}, {args.method}: "
              f"{passes(args)} passes{rounded}, {training.total} weight steps", flush=True)
    train(training, folder, flags)
    if team.first:
        measure(args, finish(training, folder, name), folder, device)


def measure(args, path, folder, device):
    """The attacks of --evaluate, and of the end of a training, on the network at `path`."""
    evaluate(path, folder, device, data_dir=args.data_dir, data_root=args.data_root,
             eval_images=args.eval_images, eps=args.eps, queries=args.queries,
             uaps=args.uaps_save, seed=args.seed, workers=args.workers)


def finish(training, folder, name):
    """The network, its facts and its curve; -> path of the network"""
    args = training.args
    facts = {"name": name, "kind": training.images.kind, "data_dir": str(args.data_dir), **{
        key: getattr(args, key) for key in (
            "model_name", "pretrained", "method", "replays", "eps", "alpha", "steps", "epochs",
            "batch_size", "lr", "momentum", "weight_decay", "schedule", "augment", "guard", "amp",
            "seed", "image_size")},
        "passes": training.epoch, "weight_steps": training.done, "processes": training.team.size,
        "num_images": len(training.images), "images_sha256": training.images.sha256(),
        "seconds": round(sum(row["seconds"] for row in training.rows), 3),
        **provenance(training.device)}
    save_csv(folder / "log.csv", training.rows)
    save_pth(folder / f"{name}.pth", {k: v.cpu() for k, v in
                                      training.model[1].state_dict().items()})
    save_json(folder / f"{name}.json", facts)
    write_atomic(folder / "curve.png", draw.training(
        training.rows, name, probe_adv_acc="PGD-10, some training images"))
    return folder / f"{name}.pth"


if __name__ == "__main__":
    run_script(get_args, main)
