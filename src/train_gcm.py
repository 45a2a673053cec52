"""The challenge's classifier, trained in two stages (Pei et al., 2022, arXiv:2205.10617).

    published (paper and code)             here
    clean loss, or at random CutMix's      terms; --w_clean, --cutmix_prob, --w_cutmix
    MixUp                                  terms; --w_mixup
    FGSM, untargeted and targeted          both_signs; --w_fgsm, --w_fgsm_target, --fgsm_eps
    augmentations, p of each               PRESETS in utils/augment.py; --augment
    ConvNeXt-T, SE-ResNet; FC, ML-Decoder  --model_name, --head; utils/nets.py
    Adamax, two learning rates             --lr_head, --lr_backbone
    first stage, with FGSM                 --stage 1, behind GCM
    second, from the first, without FGSM   --stage 2, behind GCM and ResizePad

    python train_gcm.py --stage 1                                    # digits, offline, seconds
    python train_gcm.py --stage 2
    torchrun --nproc_per_node 5 train_gcm.py --stage 1 --data_dir /data/train_phase1/label.txt

A run leaves NAME.pth (the state dict of the best epoch, head included, which every script takes as
--weights), NAME.json, log.csv, curve.png and checkpoint.pth. A killed run continues with
--resume; on a CPU it ends with the same bytes. eval_net.py and gcm.py measure the network;
train_gcm.sh runs both stages and both scripts.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import attacks
from utils import challenge, data, models, nets, passes, precision, run
from utils.attack import core
from utils.attack.random_layers import drawing_from
from utils.augment import PRESETS, augment
from utils.cli import TRAINING, Parser, at_least, names, run_script
from utils.defenses import adaptive, defend
from utils.loop import Trainer, loop
from utils.team import in_parallel, join_team, joint_batch_norm, without_sync

BLOCK = 50  # held-out images validated at a time, fewer if memory runs out
AUGMENTED, DEFENDED = range(2)  # independent streams of an image's random numbers


@core.attack
def both_signs(model, x, y, *, eps, loss=core.cross_entropy):
    """x + eps sign(g) and x - eps sign(g), in [0, 1]; g: the gradient of the loss at y, (N,)."""
    _, _, g = core.gradient(model, x, y, loss, core.Tally(x), slice(None))
    return attacks.fgs_step(x, g, eps), attacks.fgs_step(x, g, -eps)


def terms(attacked, x, y, drawn, s, loss=core.cross_entropy):
    """Yields (weight, images, labels) for every term of the loss of x (n, C, H, W), y (n,).

    attacked, loss: what FGSM attacks; s: --w_clean and the other weights. The images of a term
    are made only when it is requested; terms of weight 0 are skipped. MixUp and CutMix draw from
    the global generator; their labels are (n, K).
    """
    labels, mixing = y, {"alpha": 1.0, "num_classes": len(s.classes)}
    if drawn.cutmix:
        x, labels = v2.CutMix(**mixing)(x, y)  # for all terms below, as published
    if s.w_clean:
        yield s.w_clean, x, labels
    if s.w_mixup:
        yield s.w_mixup, *v2.MixUp(**mixing)(x, y)
    if s.w_cutmix:
        yield s.w_cutmix, *v2.CutMix(**mixing)(x, y)
    for weight, eps, at in ((s.w_fgsm, drawn.eps, y),
                            (s.w_fgsm_target, drawn.eps_target, drawn.target)):
        for x_adv in both_signs(attacked, x, at, eps=eps, loss=loss) if weight else ():
            yield weight / 2, x_adv, y  # the published term is the mean over both signs


class ChallengeTraining(Trainer):
    """model: Sequential(Normalize, net); defended: the model behind the defence."""
    advice = "the last checkpoint is kept; type a smaller --lr_head, --lr_backbone"

    def __init__(self, s, images, held, team, device):
        if images.pixels is not None:
            images = replace(images, pixels=images.pixels_on(device))
        self.s, self.images, self.held = s, images, held
        self.generator = run.make_generator(s.seed)  # same in all processes
        model = models.trainable(s.model_name, kind=images.kind, weights=s.pretrained, seed=s.seed,
                                 head=s.head, classes=len(s.classes), image_size=s.image_size,
                                 data_dir=s.data_dir, data_root=s.data_root)
        self.model = joint_batch_norm(precision.placed(model, device), device, team)
        self.mean = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(s.ema),
                                  use_buffers=True) if s.ema else None
        self.defended = self.behind_defense(self.model)
        self.parallel = in_parallel(self.defended, team, (images.channels, *2 * [s.image_size]))
        head = nets.head_parameters(self.model[1])
        body = [p for p in self.model.parameters() if all(p is not q for q in head)]
        self.optimizer = torch.optim.Adamax([{"params": head}, {"params": body}],  # rates: one_pass
                                            weight_decay=s.weight_decay)
        self.best = {"score": -1.0, "epoch": 0, "net": None}
        self.smallest = max(2, team.size)  # BatchNorm needs two images, every process needs one
        whole, last = divmod(len(images), s.batch_size)
        self.mixed = precision.Mixed(s.amp, device)
        kept = {"net": self.model, "optimizer": self.optimizer, "generator": self.generator,
                "mixed": self.mixed}
        super().__init__(device, team=team, steps=whole + (last >= self.smallest),
                         keep=kept | ({"mean": self.mean} if s.ema else {}))

    def behind_defense(self, model):
        return defend(model, self.s.defense, size=self.s.image_size, low=self.s.low)

    def step(self, x, y, joint):
        """One weight step on x, y, this process's part of a minibatch of `joint` images.

        The terms are differentiated one at a time, so that only one graph is in memory.
        -> summed loss; numbers of correctly classified clean images, clean images, all images
        """
        s, team, sums = self.s, self.team, torch.zeros(4, device=self.device)
        drawn = challenge.draw_once(joint, s, self.generator)
        mine = drawn.target[team.rank::team.size][:len(x)].to(self.device)
        attacked = adaptive(self.defended)  # not through GCM, whose gradient is noise
        made = terms(attacked, x, y, replace(drawn, target=mine), s, self.mixed.attack_loss)
        self.optimizer.zero_grad()
        for left in reversed(range(challenge.number_of_terms(s))):
            with without_sync(self.parallel) if left else nullcontext():
                with self.mixed.autocast():
                    weight, images, labels = next(made)
                    logits = self.parallel(images).float()
                loss = weight * F.cross_entropy(logits, labels, reduction="sum")
                self.mixed.backward(loss * (team.size / joint))  # averaged over processes
            sums[0] += loss.detach()
            if images is x:
                sums[1] += (logits.argmax(1) == y).sum()
                sums[2] += len(x)
        self.mixed.step(self.optimizer)
        if self.mean:
            self.mean.update_parameters(self.model)
        sums[3] += len(x)
        return sums

    def one_pass(self, bar):
        """One epoch; each image is augmented anew. train_acc: on the images of the clean loss."""
        s, self.sums = self.s, torch.zeros(4, device=self.device)
        self.parallel.train()
        seed, mixing = torch.randint(2 ** 62, (2,), generator=self.generator).tolist()
        head, body = self.optimizer.param_groups
        factor = s.gamma ** (len(self.rows) // s.step_epochs)
        head["lr"], body["lr"] = s.lr_head * factor, s.lr_backbone * factor
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(mixing + self.team.rank)  # dropout, MixUp, CutMix take no generator
            for joint, index, x in self.minibatches(passes.one_pass(
                    self.images, s.batch_size, self.generator, self.team, workers=s.workers,
                    vary=bool(s.chances), smallest=self.smallest, skip=self.skip,
                    device=self.device)):
                own = attacks.Chance(seed, index)
                x = augment(x, s.chances, generator=own.fold(AUGMENTED))
                y = precision.moved(self.images.labels[index], self.device)
                with drawing_from(own.fold(DEFENDED).to(self.device)):
                    self.sums += self.step(data.to_float(x), y, joint)
                bar.update()
        loss, right, clean, count = self.team.total(self.sums.tolist())
        return {"loss": loss / count, "train_acc": right / clean if clean else "",
                "lr_head": head["lr"],
                "images_per_s": len(self.images) / self.pass_seconds}

    def after(self):
        """Validates; keeps the network of the best epoch."""
        plain, augmented = self.validate()
        if (plain + augmented) / 2 > self.best["score"]:
            net = {k: v.cpu().clone() for k, v in self.final()[1].state_dict().items()}
            self.best = {"score": (plain + augmented) / 2, "epoch": len(self.rows) + 1, "net": net}
        return {"val_acc": plain, "val_aug_acc": augmented}

    def final(self):
        """The network to validate and save: the model, or the running mean of its weights."""
        return self.mean.module if self.mean else self.model

    @torch.no_grad()
    def validate(self):
        """Accuracy on the held-out images, plain and augmented, with the same draws every time.

        Each process decodes its own blocks. The random numbers depend on the image alone.
        """
        team, model = self.team, self.final()
        mode, defended = model.training, self.behind_defense(model).eval()
        blocks = torch.arange(len(self.held)).split(BLOCK)[team.rank::team.size]
        mine = torch.cat(blocks) if blocks else ()
        held = self.held.select(mine.tolist()) if blocks else ()
        found = data.batches(held, BLOCK, workers=self.s.workers, skipped=[],
                             device=self.device) if blocks else ()
        def counted(index, x):
            own, x = attacks.Chance(self.s.seed, mine[index]), data.to_float(x)
            y = held.labels[index].to(self.device)
            augmented = augment(x, PRESETS["released"], generator=own.fold(AUGMENTED))
            with drawing_from(own.fold(DEFENDED).to(self.device)):
                right = [int((defended(z).argmax(1) == y).sum()) for z in (x, augmented)]
            return torch.tensor([*right, len(y)])
        right = torch.zeros(3, dtype=torch.long)
        for index, x in found:
            right += self.halves(counted, torch.add, index, x)
        model.train(mode)
        plain, augmented, n = team.total(right.tolist())
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
    parser.shared("data_dir", "data_root", "labels", "classes", "num_images", data_dir={
        "help": "folder of class folders, an image list such as label.txt, or "
                + ", ".join(data.NAMED)}, num_images={
        "type": at_least(4), "help": "training images, evenly over the classes; None: all"})
    add("--image_size", type=at_least(16), help="side in pixels; None: the network's, 224")
    add("--hold_out", type=at_least(0.001, float, 0.5), default=0.05, help="share of the training "
        "images held out to choose the best epoch")
    add("--model_name", help="network: torchvision's, timm/NAME (timm/seresnet50), "
        "FILE.py:FUNCTION (which is run), or one of utils/nets.py; None: convnext_tiny; for small "
        "images, that of the data set")
    add("--head", choices=nets.HEADS, help="own: the network's; None: that of --pretrained, or fc")
    add("--pretrained", help="weights to start from: V1 or another of torchvision's, the path of a "
        "state dict, or random; None: random, in stage 2 those in ../stage1 of the run folder")
    parser.shared("defense", "low", defense={
        "default": None, "help": "layers in front; None: gcm, in stage 2 gcm+resizepad"})
    add("--stage", type=int, choices=tuple(challenge.STAGES), default=1, help="training stage")
    add("--augment", type=names, help="phase1, released, all, names of operations in "
        "utils/augment.py (rain,rotation), or none, without random crops either; None: phase1, in "
        "stage 2 released")
    add("--p", type=at_least(0, float, 1), help="probability of every operation of --augment; "
        "phase1 and released have their own; None: 0.1")
    add("--w_clean", type=at_least(0, float), default=1.0, help="weight of the clean loss")
    add("--cutmix_prob", type=at_least(0, float, 1), help="probability that CutMix replaces "
        "the clean images of a minibatch; None: 0.3, in stage 2 0")
    add("--w_mixup", type=at_least(0, float), default=1.0, help="weight of the loss on MixUp")
    add("--w_cutmix", type=at_least(0, float), help="weight of a CutMix loss besides the clean "
        "one; None: 0, in stage 2 1")
    add("--w_fgsm", type=at_least(0, float), help="weight of the loss on FGSM, the mean over both "
        "signs; None: 1, in stage 2 0")
    add("--w_fgsm_target", type=at_least(0, float), help="the same for FGSM towards a random class")
    add("--fgsm_eps", type=at_least(0, float, 1), nargs=2, default=[0.001, 0.08], help="range of "
        "FGSM's eps, on the [0, 1] scale; one of 20 values is drawn for every minibatch and term")
    add("--epochs", type=at_least(1), help="passes over the images; None: that of the data set")
    add("--batch_size", type=at_least(2), help="images in a weight step, over all processes; None: "
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
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="precision of "
        "training; auto: bf16 on a GPU that has it, fp16 on an older one, off on a CPU")
    add("--save", type=Path, help="run folder; None: runs/gcm_DATA_MODEL/stage1 or stage2")
    add("--tensorboard", action="store_true", help="also log for TensorBoard, if it is installed")
    parser.shared(*TRAINING, "cache", cache={"help": "folder that keeps decoded photographs: the "
        "held-out ones, or all with --augment none; random crops are always cut from the files"})
    return parser.parse_args()


def main(args):
    team, device = join_team(run.resolve_device(args.device))
    s, images, held = team.in_turn(lambda: challenge.settle(args, team, device))
    writer = challenge.tensorboard() if s.tensorboard else None  # fails before an old run is lost
    folder = run.RunFolder(s.save, lock=team.first)
    flags = run.result_flags(s, "tensorboard", "chances", images=images.sha256()[:16],
                             processes=team.size, device=device.type)
    state = folder.load_checkpoint(flags, resume=s.resume, overwrite=s.overwrite, grows=True,
                                   name=challenge.name_of(s))
    if images.kind in nets.RECIPES or not s.chances:  # else every epoch has new crops
        images = data.load(data.cached(images, s.cache, workers=s.workers), workers=s.workers,
                           aloud=team.first)
    held = data.cached(held, s.cache, workers=s.workers)
    training = ChallengeTraining(s, images, held, team, device)
    models.check_takes(training.final().eval(), s.model_name, images.channels, s.image_size, device)
    training.resume(state, folder)
    if team.first:
        print(f"{len(images)} images of {s.data_dir} in {len(s.classes)} classes, {len(held)} held "
              f"out; stage {s.stage}: {s.model_name}, head {s.head}, from {s.pretrained}, behind "
              f"{s.defense}", flush=True)
    board = writer(str(folder / "tensorboard")) if writer and team.first else None
    loop(training, s.epochs, folder, flags, board=board, deterministic=s.deterministic,
         minutes=s.checkpoint_minutes)
    if board:
        board.close()
    if team.first:
        challenge.finish(training, folder)
    team.leave()


if __name__ == "__main__":
    run_script(get_args, main)
