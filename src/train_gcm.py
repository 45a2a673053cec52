"""The challenge's classifier, trained in two stages (Pei et al., 2022, arXiv:2205.10617).

    published (paper and code)           here
    clean + MixUp + CutMix + FGSM loss   weighted_loss; --w_clean --w_mixup --w_cutmix --w_fgsm
    34 augmentations, p of each          PUBLISHED in utils/augment.py; --augment
    ConvNeXt-T, FC or ML-Decoder head    --model_name, --head; utils/nets.py
    Adamax, two learning rates           --lr_head, --lr_backbone
    stage 1 without random resizing      --stage 1, behind GCM
    stage 2 with it, from stage 1        --stage 2, behind GCM and ResizePad

    python train_gcm.py --stage 1                                    # digits, offline, seconds
    python train_gcm.py --stage 2
    torchrun --nproc_per_node 5 train_gcm.py --stage 1 --data_dir /data/train_phase1/label.txt

A run leaves NAME.pth (the state dict of the best epoch, which every script takes as --weights, with
its head), NAME.json, log.csv, curve.png and checkpoint.pth. A run that was killed continues with
--resume; on a CPU it ends with the same bytes. eval_net.py and gcm.py measure the network;
train_gcm.sh runs both stages and both scripts.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from attacks import fgsm
from utils import data, draw, models, nets, passes, run
from utils.augment import PUBLISHED, augment
from utils.challenge import STAGES, settle
from utils.cli import Parser, at_least, names, run_script
from utils.defenses import adaptive, defend
from utils.errors import UserError
from utils.loop import Trainer, loop
from utils.run import make_generator
from utils.team import in_parallel, join_team, joint_batch_norm


def weighted_loss(model, x, y, attack, *, classes, w_clean, w_mixup, w_cutmix, w_fgsm):
    """The loss of a minibatch x (n, C, H, W), y (n,), summed over images; and model(x).

    attack(x, y) -> adversarial images. A term of weight 0 is not computed; without the clean one
    the second result is None. MixUp and CutMix draw from the global generator.
    """
    def loss(x, y):
        return F.cross_entropy(model(x).float(), y, reduction="sum")

    total, logits = 0.0, None
    if w_clean:
        logits = model(x).float()
        total = total + w_clean * F.cross_entropy(logits, y, reduction="sum")
    if w_mixup:
        mixed, soft_labels = v2.MixUp(alpha=1.0, num_classes=classes)(x, y)
        total = total + w_mixup * loss(mixed, soft_labels)
    if w_cutmix:
        mixed, soft_labels = v2.CutMix(alpha=1.0, num_classes=classes)(x, y)
        total = total + w_cutmix * loss(mixed, soft_labels)
    if w_fgsm:
        total = total + w_fgsm * loss(attack(x, y), y)
    return total, None if logits is None else logits.detach()


class ChallengeTraining(Trainer):
    """model: Sequential(Normalize, net); defended: the model behind the defence."""
    advice = "the last checkpoint is kept; type a smaller --lr_head, --lr_backbone"

    def __init__(self, s, images, held, team, device):
        if images.pixels is not None:
            images = replace(images, pixels=images.pixels_on(device))
        self.s, self.images, self.held = s, images, held
        self.generator = make_generator(s.seed)  # of all processes
        self.own_generator = make_generator(0)  # of this process: augmentations and ResizePad
        model = models.trainable(s.model_name, kind=images.kind, weights=s.pretrained, seed=s.seed,
                                 head=s.head, classes=len(s.classes), data_dir=s.data_dir,
                                 data_root=s.data_root)
        model = model.to(device, memory_format=torch.channels_last)
        self.model = joint_batch_norm(model, device, team)
        self.mean = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(s.ema),
                                  use_buffers=True) if s.ema else None
        self.defended = self.behind_defense(self.model)
        self.parallel = in_parallel(self.defended, team)
        head = nets.head_parameters(self.model[1])
        body = [p for p in self.model.parameters() if all(p is not q for q in head)]
        self.optimizer = torch.optim.Adamax([{"params": head}, {"params": body}],  # rates: one_pass
                                            weight_decay=s.weight_decay)
        self.best = {"score": -1.0, "epoch": 0, "net": None}
        self.smallest = max(2, team.size)  # BatchNorm needs two images, every process needs one
        whole, last = divmod(len(images), s.batch_size)
        kept = {"net": self.model, "optimizer": self.optimizer, "generator": self.generator}
        super().__init__(device, team=team, steps=whole + (last >= self.smallest),
                         keep=kept | ({"mean": self.mean} if s.ema else {}))

    def behind_defense(self, model):
        return defend(model, self.s.defense, size=self.s.image_size, generator=self.own_generator,
                      low=self.s.low)

    def step(self, x, y, joint):
        """One weight step on x, y, this process's part of a minibatch of `joint` images.

        -> summed loss, how many clean images were classified correctly, how many images
        """
        s = self.s
        radii = torch.linspace(*s.fgsm_eps, 20)
        eps = radii[torch.randint(20, (), generator=self.generator)].item()
        attacked = adaptive(self.defended)  # unlike the published training, which attacks GCM
        amp = torch.autocast(self.device.type, torch.bfloat16) if s.amp == "bf16" else nullcontext()
        with amp:
            loss, logits = weighted_loss(
                self.parallel, x, y, partial(fgsm, attacked, eps=eps), classes=len(s.classes),
                w_clean=s.w_clean, w_mixup=s.w_mixup, w_cutmix=s.w_cutmix, w_fgsm=s.w_fgsm)
        self.optimizer.zero_grad()
        (loss * (self.team.size / joint)).backward()  # gradients are averaged over processes
        self.optimizer.step()
        if self.mean:
            self.mean.update_parameters(self.model)
        right = 0 if logits is None else (logits.argmax(1) == y).sum()
        return torch.stack([loss.detach(), loss.new_tensor(0.0) + right, loss.new_tensor(len(y))])

    def one_pass(self, bar):
        """One epoch; each image is augmented anew. train_acc: on the images of the clean loss."""
        s, start, sums = self.s, time.perf_counter(), torch.zeros(3, device=self.device)
        self.parallel.train()
        seed = int(torch.randint(2 ** 62, (), generator=self.generator)) + self.team.rank
        self.own_generator.manual_seed(seed)
        head, body = self.optimizer.param_groups
        factor = s.gamma ** (len(self.rows) // s.step_epochs)
        head["lr"], body["lr"] = s.lr_head * factor, s.lr_backbone * factor
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout, MixUp and CutMix take no generator
            for joint, index, x in passes.one_pass(
                    self.images, s.batch_size, self.generator, self.team, workers=s.workers,
                    vary=bool(s.chances), smallest=self.smallest):
                x = augment(x.to(self.device), s.chances, generator=self.own_generator)
                y = self.images.labels[index].to(self.device)
                sums += self.step(data.to_float(x), y, joint)
                bar.update()
        loss, right, count = self.team.total(sums.tolist())
        return {"loss": loss / count, "train_acc": right / count if s.w_clean else "",
                "lr_head": head["lr"],
                "images_per_s": len(self.images) / (time.perf_counter() - start)}

    def after(self):
        """Validation; the network of the best epoch is kept."""
        plain, augmented = self.validate()
        if (plain + augmented) / 2 > self.best["score"]:
            net = {k: v.cpu().clone() for k, v in self.final()[1].state_dict().items()}
            self.best = {"score": (plain + augmented) / 2, "epoch": len(self.rows) + 1, "net": net}
        return {"val_acc": plain, "val_aug_acc": augmented}

    def final(self):
        """What is validated and saved: the model, or the running mean of its weights."""
        return self.mean.module if self.mean else self.model

    @torch.no_grad()
    def validate(self):
        """Accuracy on the held-out images, plain and augmented; every time in the same way."""
        state, generator = self.own_generator.get_state(), make_generator(self.s.seed)
        self.own_generator.manual_seed(self.s.seed)
        model = self.final()
        mode, defended, right = model.training, self.behind_defense(model).eval(), [0, 0, 0]
        for index, x in data.batches(self.held, 100, workers=self.s.workers, skipped=[]):
            x = data.to_float(x.to(self.device))
            augmented = augment(x, PUBLISHED, generator=generator)
            mine = slice(self.team.rank, None, self.team.size)
            y = self.held.labels[index].to(self.device)[mine]
            for k, z in enumerate((x[mine], augmented[mine])):
                right[k] += int((defended(z).argmax(1) == y).sum()) if len(z) else 0
            right[2] += len(y)
        model.train(mode)
        self.own_generator.set_state(state)
        plain, augmented, n = self.team.total(right)
        return plain / n, augmented / n

    def state(self):
        return super().state() | {"best": self.best}

    def restore(self, state):
        super().restore(state)
        self.best = state["best"]


# ------------------------------------------------------------------- command line

def get_args():
    parser = Parser("Train the challenge's classifier on any image folder.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "num_images", data_dir={
        "help": "folder of class folders, an image list such as label.txt, or "
                + ", ".join(data.NAMED)}, num_images={
        "type": at_least(4), "help": "training images, evenly over the classes; None: all"})
    add("--image_size", type=at_least(16), help="side in pixels; None: the network's, 224")
    add("--hold_out", type=at_least(0.001, float, 0.5), default=0.05, help="share of the training "
        "images that is held out to choose the best epoch")
    add("--model_name", help="network; None: convnext_tiny, for small images that of the data set")
    add("--head", choices=nets.HEADS, help="own: the network's; None: that of --pretrained, or fc")
    add("--pretrained", help="weights to start from: V1 or another of torchvision's, the path of a "
        "state dict, or random; None: random, in stage 2 those in ../stage1 of the run folder")
    parser.shared("defense", "low", defense={
        "default": None, "help": "layers in front; None: gcm, in stage 2 gcm+resizepad"})
    add("--augment", type=names, default=["published"], help="published, all, names of operations "
        "in utils/augment.py (rain,rotation), or none: no random crops either")
    add("--p", type=at_least(0, float, 1), default=0.1, help="probability of every operation of "
        "--augment; published has its own")
    add("--w_clean", type=at_least(0, float), default=1.0, help="weight of the clean loss")
    add("--w_mixup", type=at_least(0, float), default=1.0, help="weight of the loss on MixUp")
    add("--w_cutmix", type=at_least(0, float), default=1.0, help="weight of the loss on CutMix")
    add("--w_fgsm", type=at_least(0, float), default=0.02, help="weight of the loss on FGSM")
    add("--fgsm_eps", type=at_least(0, float, 1), nargs=2, default=[0.01, 0.08], help="range of "
        "FGSM's eps, on the [0, 1] scale; one of 20 values is drawn for every minibatch")
    add("--stage", type=int, choices=tuple(STAGES), default=1, help="stage of the training")
    add("--epochs", type=at_least(1), help="passes over the images; None: that of the data set")
    add("--batch_size", type=at_least(2), help="images of a weight step over all processes; None: "
        "that of the data set")
    add("--lr_head", type=at_least(0, float), help="learning rate of the head; None: that of the "
        "data set, a tenth of it in stage 2")
    add("--lr_backbone", type=at_least(0, float), help="the same for all other layers")
    add("--weight_decay", type=at_least(0, float), default=1e-3, help="of Adamax")
    add("--step_epochs", type=at_least(1), help="epochs after which the learning rates are "
        "multiplied by --gamma; None: that of the data set")
    add("--gamma", type=at_least(0, float), default=0.5, help="factor of the learning rates")
    add("--ema", type=at_least(0, float, 0.99999), default=0.0, help="decay of the running mean of "
        "the weights that is validated and saved, such as 0.999; 0: the weights themselves")
    add("--amp", choices=("auto", "off", "bf16"), default="auto", help="precision of training; "
        "auto: bf16 on a GPU that has it, else float32; validation is float32")
    add("--save", type=Path, help="run folder; None: runs/gcm_DATA_MODEL/stage1 or stage2")
    add("--tensorboard", action="store_true", help="also log for TensorBoard, if it is installed")
    parser.shared("seed", "device", "workers", "resume", "overwrite")
    return parser.parse_args()


# --------------------------------------------------------------------- a run

def tensorboard():
    """TensorBoard's SummaryWriter; UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: it is not installed; type pip install tensorboard, or "
                        "leave out the flag (log.csv has the same)") from None
    return SummaryWriter


def finish(training, folder):
    """Saves the network of the best epoch, what made it, and the curve. -> path of the network"""
    s, name = training.s, f"stage{training.s.stage}_{training.s.model_name}"
    facts = {"name": name, "kind": training.images.kind, "data_dir": str(s.data_dir),
             **run.result_flags(s, "num_images", "device", "tensorboard", "chances"),
             "given_images": s.num_images, "best_epoch": training.best["epoch"],
             "best_score": training.best["score"], "processes": training.team.size,
             "num_images": len(training.images), "held_out": len(training.held),
             "images_sha256": training.images.sha256(), "seconds": training.seconds,
             **run.provenance(training.device)}
    run.save_pth(folder / f"{name}.pth", training.best["net"])
    run.save_json(folder / f"{name}.json", facts)
    run.write_atomic(folder / "curve.png", draw.training(
        training.rows, name, val_acc="held-out images", val_aug_acc="the same, augmented"))
    return folder / f"{name}.pth"


def main(args):
    team, device = join_team(run.resolve_device(args.device))
    s, images, held = settle(args, team, device)
    writer = tensorboard() if s.tensorboard else None  # fails before an old run is overwritten
    folder = run.RunFolder(s.save, lock=team.first)
    flags = run.result_flags(s, "tensorboard", "chances", images=images.sha256()[:16],
                             processes=team.size, device=device.type)
    state = folder.load_checkpoint(flags, resume=s.resume, overwrite=s.overwrite)
    if images.kind in nets.RECIPES or not s.chances:  # else every epoch has crops of its own
        images = data.load(images, workers=s.workers)
    training = ChallengeTraining(s, images, held, team, device)
    models.check_takes(training.final().eval(), s.model_name, images.channels, s.image_size, device)
    training.resume(state, folder)
    if team.first:
        print(f"{len(images)} images of {s.data_dir} in {len(s.classes)} classes, {len(held)} held "
              f"out; stage {s.stage}: {s.model_name}, head {s.head}, from {s.pretrained}, behind "
              f"{s.defense}", flush=True)
    board = writer(str(folder / "tensorboard")) if writer and team.first else None
    loop(training, s.epochs, folder, flags, board=board)
    if board:
        board.close()
    if team.first:
        print(f"saved {finish(training, folder)}; to measure it: python eval_net.py --runs "
              f"{folder.path}")
    team.leave()


if __name__ == "__main__":
    run_script(get_args, main)
