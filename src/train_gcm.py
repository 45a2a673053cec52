"""The challenge's classifier in two stages (Pei et al., 2022, arXiv:2205.10617, authors' code).

    published                            here
    34 augmentations, p of each          augment.py, PUBLISHED
    ConvNeXt-T, FC or ML-Decoder head    --model_name, --head; utils/heads.py
    clean + MixUp + CutMix + FGSM loss   losses(); --w_clean --w_mixup --w_cutmix --w_fgsm
    Adamax, a rate for head and body     --lr_head, --lr_backbone
    stage 1 without random resizing      --stage 1, behind GCM
    stage 2 with it, from stage 1        --stage 2, behind GCM and ResizePad

    python train_gcm.py --stage 1                                    # digits, offline, seconds
    python train_gcm.py --stage 2
    torchrun --nproc_per_node 5 train_gcm.py --stage 1 --data_dir /data/train_phase1/label.txt
    python train_gcm.py --evaluate runs/gcm_digits_cnn_bn/stage1/stage1_cnn_bn.pth

A run leaves NAME.pth of its best epoch (the network's state dict, which every script takes as
--weights, with its head), NAME.json, log.csv, curve.png, results.* (accuracy under every
augmentation) and checkpoint.pth; killed, it goes on with --resume, on a CPU to the same bytes.
gcm.py --weights NAME.pth makes the robustness table, train_gcm.sh all of it.
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from tqdm import tqdm

from attacks import fgsm
from augment import OPS, PUBLISHED, augment
from gcm_eval import compare, evaluate, test_images
from utils import draw
from utils.data import NAMED, batches, default_workers, hold_out, load, open_images, to_float
from utils.defenses import DEFENSES, adaptive, defend
from utils.heads import HEADS, head_parameters
from utils.models import (
    RECIPES,
    check_name,
    check_takes,
    head_of,
    input_size,
    joint_batch_norm,
    trainable,
    weights_path,
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
    names,
    provenance,
    resolve_device,
    run_script,
    save_csv,
    save_json,
    save_pth,
    write_atomic,
)

PRESETS = {  # network, epochs, batch, learning rates of head and backbone, epochs to a lower one
    "digits": ("cnn_bn", 20, 64, 5e-3, 5e-3, 15),
    "mnist": ("cnn_bn", 8, 128, 5e-3, 5e-3, 6),
    "cifar10": ("resnet_small", 30, 128, 5e-3, 5e-3, 20),
    "imagenet": ("convnext_tiny", 140, 320, 1e-3, 1e-4, 70),
    "folder": ("convnext_tiny", 140, 320, 1e-3, 1e-4, 70)}
STAGES = {1: "gcm", 2: "gcm+resizepad"}
LATER = 0.1  # of stage 1's learning rates in stage 2
NOT_THE_RESULT = {"workers", "resume", "overwrite", "save", "data_root", "data_dir", "evaluate",
                  "compare", "eval_images", "device", "tensorboard"}


def get_args():
    parser = Parser("Train the challenge's classifier on any image folder, and evaluate it.")
    add = parser.add_argument
    add("--data_dir", help="folder of class folders, an image list such as label.txt, or "
        + ", ".join(NAMED) + "; None: digits, or what --evaluate was trained on")
    add("--data_root", default="data", help="where named data sets are kept or downloaded to")
    add("--num_images", type=at_least(4), help="training images, evenly over the classes; None: "
        "all")
    add("--image_size", type=at_least(16), help="side in pixels; None: the network's, 224")
    add("--hold_out", type=at_least(0.001, float, 0.5), default=0.05, help="share of the training "
        "images that chooses the best epoch instead")
    add("--model_name", help="network; None: convnext_tiny, on small images the data set's preset")
    add("--head", choices=HEADS, help="own: the network's; None: that of --pretrained, else fc")
    add("--pretrained", help="weights to start from: V1 or another of torchvision's, the path of a "
        "state dict, or random; None: random, in stage 2 those of stage 1 in the folder beside")
    add("--defense", choices=DEFENSES, help="layers in front; None: gcm, in stage 2 gcm+resizepad")
    add("--low", type=at_least(1), help="smallest side that resizepad draws, in pixels; None: 218 "
        "of 224")
    add("--augment", type=names, default=["published"], help="published, all, names of "
        "augment.py's operations (rain,rotation), or none: no random crops either")
    add("--p", type=at_least(0, float, 1), default=0.1, help="chance of every operation of "
        "--augment, but for published")
    add("--w_clean", type=at_least(0, float), default=1.0, help="weight of the plain loss")
    add("--w_mixup", type=at_least(0, float), default=1.0, help="weight of the loss on MixUp")
    add("--w_cutmix", type=at_least(0, float), default=1.0, help="weight of the loss on CutMix")
    add("--w_fgsm", type=at_least(0, float), default=0.02, help="weight of the loss on FGSM")
    add("--fgsm_eps", type=at_least(0, float, 1), nargs=2, default=[0.01, 0.08], help="range of "
        "FGSM's eps, in [0, 1] pixels; one of 20 values is drawn for every minibatch")
    add("--stage", type=int, choices=tuple(STAGES), default=1, help="of the training")
    add("--epochs", type=at_least(1), help="passes over the images; None: preset")
    add("--batch_size", type=at_least(2), help="images of a weight step over all processes; None: "
        "preset")
    add("--lr_head", type=at_least(0, float), help="of Adamax; None: preset, a tenth in stage 2")
    add("--lr_backbone", type=at_least(0, float), help="likewise, of all but the head")
    add("--weight_decay", type=at_least(0, float), default=1e-3, help="of Adamax")
    add("--step_epochs", type=at_least(1), help="passes after which rates are cut; None: preset")
    add("--gamma", type=at_least(0, float), default=0.5, help="what they are cut to each time")
    add("--ema", type=at_least(0, float, 0.99999), default=0.0, help="decay of the running mean of "
        "the weights that is validated and saved, such as 0.999; 0: the weights themselves")
    add("--amp", choices=("auto", "off", "bf16"), default="auto", help="precision of training; "
        "auto: bf16 on a GPU that has it, else float32; evaluation is float32")
    add("--evaluate", type=Path, help="only evaluate this NAME.pth of an earlier run")
    add("--compare", nargs="+", type=Path, help="only put these finished run folders into one "
        "table")
    add("--eval_images", type=at_least(1), help="test images, evenly over the classes; None: all")
    add("--save", type=Path, help="run folder; None: runs/gcm_DATA_MODEL/stage1 or stage2; with "
        "--evaluate: where its tables go, None: beside the network; with --compare: where table "
        "and picture go")
    add("--tensorboard", action="store_true", help="also log for TensorBoard, if it is installed")
    add("--seed", type=at_least(0, high=2 ** 62), default=0, help="fixes everything random")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    add("--resume", action="store_true", help="go on with the run in --save")
    add("--overwrite", action="store_true", help="start again over the run in --save")
    return parser.parse_args()


# ------------------------------------------------------------------ the loss

def losses(net, x, y, *, weights, classes, attack, mixup=1.0, cutmix=1.0):
    """The weighted loss of a minibatch x (n, C, H, W), y (n,), summed over images; and net(x).

    weights {"clean", "mixup", "cutmix", "fgsm": number}, those of weight 0 are left out, and the
    second result is None without "clean". attack(x, y) -> images. MixUp and CutMix are
    torchvision's and draw from the global generator.
    """
    logits, total = None, 0.0
    for name, weight in weights.items():
        if not weight:
            continue
        if name in ("mixup", "cutmix"):
            mix = v2.MixUp(alpha=mixup, num_classes=classes) if name == "mixup" else \
                v2.CutMix(alpha=cutmix, num_classes=classes)
            inputs, wanted = mix(x, y)
        else:
            inputs, wanted = (attack(x, y) if name == "fgsm" else x), y
        found = net(inputs).float()
        logits = found.detach() if name == "clean" else logits
        total = total + weight * F.cross_entropy(found, wanted, reduction="sum")
    return total, logits


def chances(args):
    """{operation: p} of --augment and --p."""
    if args.augment == ["published"]:
        return PUBLISHED
    if args.augment == ["none"]:
        return {}
    chosen = list(OPS) if args.augment == ["all"] else args.augment
    for name in chosen:
        if name not in OPS:
            raise UserError(f"--augment {name}: wanted published, all, none, or some of "
                            + ", ".join(OPS))
    return dict.fromkeys(chosen, args.p)


# ------------------------------------------------------------------ an epoch

class Training:
    """Network, optimiser and generators of a run: what lives between two steps.

    core: Sequential(Normalize, net); model: behind the defence; net: the model in parallel.
    """

    def __init__(self, args, images, held, team, device):
        if images.pixels is not None:
            images = replace(images, pixels=images.pixels_on(device))
        self.args, self.images, self.held, self.team, self.device = args, images, held, team, device
        self.chances = chances(args)
        self.generator, self.own = make_generator(args.seed), make_generator(0)
        self.core = trainable(args.model_name, kind=images.kind, weights=args.pretrained,
                              seed=args.seed, head=args.head, classes=len(args.classes),
                              data_dir=args.data_dir, data_root=args.data_root).to(
                                  device, memory_format=torch.channels_last)
        if team.size > 1:
            self.core = joint_batch_norm(self.core, device)
        self.mean = None if not args.ema else AveragedModel(
            self.core, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        self.model = self.behind(self.core)
        self.net = self.model if team.size == 1 else DistributedDataParallel(
            self.model, broadcast_buffers=False)
        self.optimizer = torch.optim.Adamax(self.groups(), weight_decay=args.weight_decay)
        self.rows, self.epoch, self.best = [], 0, {"score": -1.0, "epoch": 0, "net": None}
        self.smallest = max(2, team.size)  # BatchNorm has no statistics of one image; one for each
        last = len(images) % args.batch_size
        self.batches = len(images) // args.batch_size + (last >= self.smallest)

    def behind(self, core):
        return defend(core, self.args.defense, size=self.args.image_size, generator=self.own,
                      low=self.args.low)

    def groups(self):
        """The parameters of the head and all others, with their learning rates."""
        head = head_parameters(self.core[1])
        known = set(map(id, head))
        body = [p for p in self.core.parameters() if id(p) not in known]
        return [{"params": head, "lr": self.args.lr_head},
                {"params": body, "lr": self.args.lr_backbone}]

    def state(self):
        """All that decides what comes next."""
        return {"epoch": self.epoch, "net": self.core.state_dict(), "best": self.best,
                "mean": self.mean.state_dict() if self.mean else None, "rows": self.rows,
                "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def restore(self, state):
        self.core.load_state_dict(state["net"])
        if self.mean:
            self.mean.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.epoch, self.rows, self.best = state["epoch"], state["rows"], state["best"]

    def run_epoch(self, bar):
        """One pass over the shuffled images. -> mean loss, accuracy on the plain images or ''"""
        args, sums = self.args, torch.zeros(3, device=self.device)
        seed = int(torch.randint(2 ** 62, (), generator=self.generator)) + self.team.rank
        self.own.manual_seed(seed)
        for group, rate in zip(self.optimizer.param_groups, (args.lr_head, args.lr_backbone),
                               strict=True):
            group["lr"] = rate * args.gamma ** (self.epoch // args.step_epochs)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout, MixUp and CutMix know no other generator
            for joint, index, x in one_pass(self.images, args.batch_size, self.generator, self.team,
                                            vary=bool(self.chances), smallest=self.smallest,
                                            workers=args.workers):
                x = augment(x.to(self.device), self.chances, generator=self.own)
                sums += self.step(to_float(x), self.images.labels[index].to(self.device), joint)
                bar.update()
        loss, right, count = self.team.total(sums.tolist())
        return loss / count, right / count if args.w_clean else ""

    def step(self, x, y, joint):
        """One weight step on the joint batch of `joint` images, of which x, y are ours."""
        args = self.args
        choices = torch.linspace(*args.fgsm_eps, 20)
        eps = choices[torch.randint(20, (), generator=self.generator)].item()
        seen = adaptive(self.model)  # unlike the published training, which attacks through GCM
        weights = {k: getattr(args, f"w_{k}") for k in ("clean", "mixup", "cutmix", "fgsm")}
        with self.precision():
            loss, logits = losses(self.net, x, y, weights=weights, classes=len(args.classes),
                                  attack=partial(fgsm, seen, eps=eps))
        self.optimizer.zero_grad()
        (loss * (self.team.size / joint)).backward()  # processes are averaged
        self.optimizer.step()
        if self.mean:
            self.mean.update_parameters(self.core)
        right = 0 if logits is None else (logits.argmax(1) == y).sum()
        return torch.stack([loss.detach(), loss.new_tensor(0.0) + right, loss.new_tensor(len(y))])

    def precision(self):
        """bf16 for the network's layers where asked for; losses and images stay float32."""
        amp = self.args.amp == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if amp else nullcontext()

    def final(self):
        """What is validated and saved: the network, or the running mean of its weights."""
        return self.mean.module if self.mean else self.core

    @torch.no_grad()
    def validate(self):
        """Accuracy on the images held out, as they are and augmented the same way every time."""
        own, generator = self.own.get_state(), make_generator(self.args.seed)
        self.own.manual_seed(self.args.seed)
        core = self.final()
        was = core.training
        model, right = self.behind(core).eval(), [0, 0, 0]
        for index, x in batches(self.held, 100, workers=self.args.workers, skipped=[]):
            x = to_float(x.to(self.device))
            hard = augment(x, PUBLISHED, generator=generator)
            mine = slice(self.team.rank, None, self.team.size)
            y = self.held.labels[index].to(self.device)[mine]
            for k, z in enumerate((x[mine], hard[mine])):
                right[k] += int((model(z).argmax(1) == y).sum()) if len(z) else 0
            right[2] += len(y)
        core.train(was)
        self.own.set_state(own)
        clean, hard, n = self.team.total(right)
        return clean / n, hard / n


# --------------------------------------------------------------------- a run

def settle(args):
    """Fills in what data set and stage preset, refuses what cannot work.

    -> training images, those held out of them, path of the run folder
    """
    images = open_images(args.data_dir, split="train", data_root=args.data_root)
    name, epochs, batch, head, body, step = PRESETS[images.kind]
    later = LATER if args.stage == 2 else 1.0
    args.model_name, args.defense = args.model_name or name, args.defense or STAGES[args.stage]
    args.epochs, args.batch_size = args.epochs or epochs, args.batch_size or batch
    args.lr_head = head * later if args.lr_head is None else args.lr_head
    args.lr_backbone = body * later if args.lr_backbone is None else args.lr_backbone
    args.step_epochs = args.step_epochs or step
    check_name(args.model_name, images.kind)
    data = args.data_dir if args.data_dir in NAMED else images.kind
    path = args.save or Path("runs") / f"gcm_{data}_{args.model_name}" / f"stage{args.stage}"
    start_from(args, path)
    args.image_size = args.image_size or input_size(args.model_name, images.kind, images.size,
                                                    args.pretrained)
    chances(args)
    if args.fgsm_eps[0] > args.fgsm_eps[1]:
        raise UserError(f"--fgsm_eps {args.fgsm_eps[0]} {args.fgsm_eps[1]}: the smaller one first")
    if not any((args.w_clean, args.w_mixup, args.w_cutmix, args.w_fgsm)):
        raise UserError("--w_clean 0 --w_mixup 0 --w_cutmix 0 --w_fgsm 0: nothing to train on")
    images = images.prepared(args.image_size, args.num_images)
    held = hold_out(images.labels, args.hold_out)
    if not held.any():
        raise UserError(f"--hold_out {args.hold_out}: none of {len(images)} images; type more")
    train, held = (images.select(k.nonzero()[:, 0].tolist()) for k in (~held, held))
    if args.batch_size > len(train):
        raise UserError(f"--batch_size {args.batch_size}: there are {len(train)} training images; "
                        "type a smaller --batch_size")
    args.classes = list(images.classes)
    return train, held, path


def start_from(args, path):
    """The weights and the head to start with, as flags and stage have it."""
    if args.pretrained is None:
        first = path.parent / "stage1" / f"stage1_{args.model_name}.pth"
        if args.stage == 2 and not first.is_file():
            raise UserError(f"--stage 2: no {first}; type --stage 1 first, or --pretrained PATH")
        args.pretrained = str(first) if args.stage == 2 else "random"
    file = weights_path(args.model_name, args.pretrained, "--pretrained")
    there = head_of(file) if file else None
    args.head = args.head or (there[0] if there else "fc")


def prepare(args, team, device):
    """Everything before the first step. -> training, its folder, its flags"""
    args.data_dir = args.data_dir or "digits"
    images, held, path = settle(args)
    if args.batch_size < team.size:
        raise UserError(f"--batch_size {args.batch_size}: there are {team.size} processes; wanted "
                        "an image for each")
    if len(args.classes) < 2:
        raise UserError(f"--data_dir {args.data_dir}: one class, '{args.classes[0]}'; wanted a "
                        "folder for each class, or an image list")
    if args.tensorboard:
        tensorboard()  # what is missing is said before an old run is lost
    test_images(args.data_dir, args.data_root, args.eval_images, args.hold_out, args.num_images,
                args.classes)
    folder = RunFolder(path, lock=team.first)
    flags = {key: value for key, value in vars(args).items() if key not in NOT_THE_RESULT}
    flags.update(images=images.sha256()[:16], processes=team.size, device=device.type)
    state = folder.load_checkpoint(flags, resume=args.resume, overwrite=args.overwrite)
    if images.kind in RECIPES or not chances(args):  # else decoded anew in every pass
        images = load(images, workers=args.workers)
    training = Training(args, images, held, team, device)
    check_takes(training.final().eval(), args.model_name, images.channels, args.image_size, device)
    training.core.train()
    if state is not None:
        training.restore(state)
    elif team.first:
        for left_over in ("checkpoint.pth", "results.json"):  # --overwrite: the old run ends here
            (folder / left_over).unlink(missing_ok=True)
    return training, folder, flags


def tensorboard():
    """TensorBoard's SummaryWriter; UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: it is not installed; type pip install tensorboard, or "
                        "leave out the flag (log.csv has the same)") from None
    return SummaryWriter


def train(training, folder, flags):
    """The epochs that are left; after each a line, a row of log.csv and a checkpoint."""
    args, team, device = training.args, training.team, training.device
    board = tensorboard()(str(folder / "tensorboard")) if args.tensorboard and team.first else None
    while training.epoch < args.epochs:
        synchronize(device)
        start = time.perf_counter()
        training.net.train()
        with tqdm(total=training.batches, desc=f"epoch {training.epoch + 1}", leave=False,
                  disable=None if team.first else True) as bar:
            loss, acc = training.run_epoch(bar)
        synchronize(device)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f"epoch {training.epoch + 1}: the loss is {loss:g}; the last "
                            "checkpoint is kept; type a smaller --lr_head, --lr_backbone")
        training.epoch += 1
        val, hard = training.validate()
        if (val + hard) / 2 > training.best["score"]:
            training.best = {"score": (val + hard) / 2, "epoch": training.epoch, "net": {
                k: v.cpu().clone() for k, v in training.final()[1].state_dict().items()}}
        row = {"epoch": training.epoch, "loss": loss, "train_acc": acc, "val_acc": val,
               "val_aug_acc": hard, "lr_head": training.optimizer.param_groups[0]["lr"],
               "seconds": seconds, "images_per_s": len(training.images) / seconds}
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        training.rows.append(row)
        if team.first:
            save_pth(folder / "checkpoint.pth", {**training.state(), "flags": flags})
            save_csv(folder / "log.csv", training.rows)
            print(f"epoch {training.epoch:3d}/{args.epochs}  " + "  ".join(
                f"{key} {value:.4g}" for key, value in row.items() if key != "epoch" and value != ""
            ), flush=True)
            if board:
                for key, value in row.items():
                    if value != "":
                        board.add_scalar(key, value, training.epoch)
    if board:
        board.close()


def finish(training, folder):
    """The best epoch's network, its facts and the curve; -> path of the network"""
    args, best = training.args, training.best
    name = f"stage{args.stage}_{args.model_name}"
    facts = {"name": name, "kind": training.images.kind, "data_dir": str(args.data_dir), **{
        key: getattr(args, key) for key in (
            "stage", "model_name", "head", "classes", "pretrained", "defense", "low", "augment",
            "p", "w_clean", "w_mixup", "w_cutmix", "w_fgsm", "fgsm_eps", "epochs", "batch_size",
            "lr_head", "lr_backbone", "weight_decay", "step_epochs", "gamma", "ema", "amp", "seed",
            "image_size", "hold_out")},
        "given_images": args.num_images, "best_epoch": best["epoch"], "best_score": best["score"],
        "processes": training.team.size, "num_images": len(training.images),
        "held_out": len(training.held), "images_sha256": training.images.sha256(),
        "seconds": round(sum(row["seconds"] for row in training.rows), 3),
        **provenance(training.device)}
    save_csv(folder / "log.csv", training.rows)
    save_pth(folder / f"{name}.pth", best["net"])
    save_json(folder / f"{name}.json", facts)
    write_atomic(folder / "curve.png", draw.training(
        training.rows, name, val_acc="images held out", val_aug_acc="the same, augmented"))
    return folder / f"{name}.pth"


def main(args):
    if args.compare:
        print(compare(args.compare, args.save), end="")
        return
    team, device = join_team(resolve_device(args.device))
    if args.amp == "auto":
        args.amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    measure = partial(evaluate, device=device, data_dir=args.data_dir, data_root=args.data_root,
                      eval_images=args.eval_images, seed=args.seed, workers=args.workers)
    if args.evaluate:
        if team.first:
            measure(args.evaluate, RunFolder(args.save or args.evaluate.parent))
    else:
        training, folder, flags = prepare(args, team, device)
        if team.first:
            print(f"{len(training.images)} images of {args.data_dir} in {len(args.classes)} "
                  f"classes, {len(training.held)} held out; stage {args.stage}: {args.model_name}, "
                  f"head {args.head}, from {args.pretrained}, behind {args.defense}", flush=True)
        train(training, folder, flags)
        if team.first:
            measure(finish(training, folder), folder)
    if team.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_script(get_args, main)
