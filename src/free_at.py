"""Adversarial training for free (Shafahi et al., NeurIPS 2019, arXiv:1904.12843), and its rivals.

    natural   trains on clean images
    pgd       on images attacked by K steps of PGD                (Madry et al., arXiv:1706.06083)
    free      on each minibatch m times in a row; one backward pass gives the gradients of the
              weights and of delta, which is never reset          (Alg. 1: free_minibatch, step)
    fast      on images attacked by one step from a random start  (Wong et al., arXiv:2001.03994)

    python free_at.py --method free --replays 8                       # digits, offline, seconds
    python free_at.py --method pgd --data_dir cifar10 --model_name preact_resnet18
    torchrun --nproc_per_node 4 free_at.py --method free --replays 4 --data_dir /data/imagenet \\
        --model_name resnet50
    python eval_net.py --runs runs/digits_natural_mlp runs/digits_free8_mlp runs/digits_pgd_mlp

Natural and free training take the same number of weight steps for the same --epochs: free training
passes over the images ceil(epochs / m) times. A run leaves NAME.pth (the network's state dict,
which every script takes as --weights), NAME.json, log.csv, curve.png and checkpoint.pth. A run that
was killed continues with --resume, on a CPU to the same bytes.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from attacks import pgd
from utils import draw, models, run
from utils.attack.core import own_generators
from utils.cli import Parser, at_least, radius, run_script
from utils.data import NAMED, load, open_images, to_float
from utils.errors import UserError
from utils.loop import Trainer, loop
from utils.passes import one_pass
from utils.team import in_parallel, join_team, joint_batch_norm

PROBED = 200  # training images that --guard attacks after every pass


# ---------------------------------------------------------------- the methods

def free_minibatch(step, x, y, delta, *, eps, alpha, m):
    """Alg. 1, lines 6 to 12: m weight steps on one minibatch x (n, C, H, W); delta, in place.

    step(x, y) takes a weight step on the images x by one backward pass, which also leaves the
    gradient in what x was computed from.
    """
    for _ in range(m):
        noise = delta.clone().requires_grad_()
        step((x + noise).clamp(0, 1), y)  # only what the network sees is cut to [0, 1]
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


def passes(s):
    """Passes over the images: free training takes as many weight steps as the other methods."""
    return math.ceil(s.epochs / s.replays) if s.method == "free" else s.epochs


class FreeTraining(Trainer):
    """A network, its optimiser and delta; s: the settings that settle returns."""

    def __init__(self, s, images, team, device):
        if images.pixels is not None:
            images = replace(images, pixels=images.pixels_on(device))
        model = models.trainable(s.model_name, kind=images.kind, weights=s.pretrained, seed=s.seed,
                                 data_dir=s.data_dir, data_root=s.data_root)
        self.model = joint_batch_norm(model.to(device, memory_format=torch.channels_last), device,
                                      team)
        self.optimizer = torch.optim.SGD(self.model.parameters(), s.lr, s.momentum,
                                         weight_decay=s.weight_decay)
        self.generator = run.make_generator(s.seed)
        shape = (s.batch_size, images.channels, s.image_size, s.image_size)
        self.delta = torch.zeros(shape)[team.rank::team.size].to(device)
        self.smallest = max(2, team.size)  # BatchNorm needs two images, every process needs one
        whole, last = divmod(len(images), s.batch_size)
        steps = (whole + (last >= self.smallest)) * (s.replays if s.method == "free" else 1)
        super().__init__(device, steps=steps, team=team, keep={
            "net": self.model, "optimizer": self.optimizer, "generator": self.generator})
        self.s, self.images, self.net = s, images, in_parallel(self.model, team)
        self.done, self.total = 0, passes(s) * steps  # weight steps
        self.best = {"probe": 0.0, "net": None}       # of --guard

    def one_pass(self, bar):
        s = self.s
        self.net.train()
        self.bar, self.sums = bar, torch.zeros(3, device=self.device)  # loss, right, images
        for joint, index, x in one_pass(self.images, s.batch_size, self.generator, self.team,
                                        vary=s.augment == "auto", smallest=self.smallest,
                                        workers=s.workers):
            self.joint = joint  # images of the minibatch over all processes
            self.minibatch(to_float(x.to(self.device)), self.images.labels[index].to(self.device))
        loss, right, count = self.team.total(self.sums.tolist())
        return {"loss": loss / count, "train_acc": right / count, "weight_steps": self.done}

    def minibatch(self, x, y):
        """All weight steps on this process's part x (n, C, H, W), y (n,) of a joint minibatch."""
        s, ball = self.s, {"eps": self.s.eps, "alpha": self.s.alpha}
        if s.method == "free":
            free_minibatch(self.step, x, y, self.delta[:len(x)], **ball, m=s.replays)
        elif s.method == "pgd":
            own = self.part(own_generators(self.generator, self.joint), x)
            with self.precision():
                x_adv = pgd(self.model, x, y, **ball, steps=s.steps, generator=own)
            self.step(x_adv, y)
        elif s.method == "fast":
            u = torch.rand((self.joint, *x.shape[1:]), generator=self.generator)
            with self.precision():
                x_adv = fast_start(self.model, x, y, self.part(u, x).to(x), **ball)
            self.step(x_adv, y)
        else:
            self.step(x, y)

    def step(self, x, y):
        """One backward pass and one weight step on x, y; the processes share the minibatch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.s.lr * rate(self.done, self.total, self.s.schedule)
        with self.precision():
            logits = self.net(x)
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        self.optimizer.zero_grad()
        (loss * (self.team.size / self.joint)).backward()  # processes are averaged
        self.optimizer.step()
        self.done += 1
        self.sums += torch.stack([loss.detach(), (logits.argmax(1) == y).sum(),  # no wait for a GPU
                                  loss.new_tensor(len(y))])
        self.bar.update()

    def part(self, drawn, x):
        """Of what was drawn for every image of the joint minibatch, what belongs to x."""
        return drawn[self.team.rank::self.team.size][:len(x)]

    def precision(self):
        """bf16 for the network's layers under --amp bf16; losses and images stay float32."""
        amp = self.s.amp == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if amp else nullcontext()

    def after(self):
        """probe_adv_acc; --guard warns or stops when it falls below half of its best value."""
        if self.s.method == "natural" or self.s.guard == "off":
            return {"probe_adv_acc": ""}
        value, best, stop = self.probe(), self.best["probe"], self.s.guard == "stop"
        net = self.model[1]
        if value >= best:
            self.best = {"probe": value, "net": {k: v.clone() for k, v in net.state_dict().items()}
                         if stop else None}
        elif best > 0.1 and value < best / 2:
            if self.team.first:
                print(f"warning: accuracy under PGD-10 on training images fell from "
                      f"{100 * best:.1f} % to {100 * value:.1f} %: catastrophic overfitting"
                      + "; the run ends with the better weights" * stop, flush=True)
            if stop:
                self.stopped = True
                net.load_state_dict(self.best["net"])
        return {"probe_adv_acc": value}

    def probe(self):
        """Accuracy under PGD-10 on the same few training images; leaves the model in eval mode."""
        s, right, count = self.s, 0, min(PROBED, len(self.images))
        index = torch.linspace(0, len(self.images) - 1, count).long()
        few = load(self.images.select(index), workers=0)
        self.model.eval()
        for k in torch.arange(len(few)).split(50):
            x, y = to_float(few.pixels[k].to(self.device)), few.labels[k].to(self.device)
            x_adv = pgd(self.model, x, y, eps=s.eps, alpha=s.eps / 4, steps=10, stop_early=True)
            with torch.no_grad():
                right += int((self.model(x_adv).argmax(1) == y).sum())
        return right / len(few)

    def state(self):
        return super().state() | {"done": self.done, "best": self.best,
                                  "delta": self.team.gather(self.delta).cpu()}

    def restore(self, state):
        super().restore(state)
        self.done, self.best = state["done"], state["best"]
        self.delta.copy_(state["delta"][self.team.rank::self.team.size])


# --------------------------------------------------------------------- a run

FREE_PRESETS = {  # eps, alpha of pgd, network, epochs, batch, learning rate, weight decay
    "digits": (0.1, 0.025, "mlp", 80, 64, 0.03, 0.0),
    "mnist": (0.3, 0.05, "cnn", 16, 128, 0.03, 0.0),
    "cifar10": (8 / 255, 2 / 255, "preact_resnet18", 80, 128, 0.1, 5e-4),
    "imagenet": (4 / 255, 1 / 255, "resnet50", 90, 256, 0.1, 1e-4)}


def get_args():
    parser = Parser("Train a network naturally or adversarially.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "num_images")
    add("--model_name", help="network; None: the data set's preset")
    add("--pretrained", default="random", help="weights to start from: random, V1 or another of "
        "torchvision's, or the path of a state dict")
    add("--method", choices=("natural", "pgd", "free", "fast"), default="free", help="training")
    add("--replays", type=at_least(1), default=8, help="m of free: steps on each minibatch")
    add("--eps", type=radius, help="Linf radius, in [0, 1] pixels; None: the data set's preset")
    add("--alpha", type=radius, help="step size; None: free eps, fast 1.25 eps, pgd the preset")
    add("--steps", type=at_least(1), default=7, help="K of pgd")
    add("--epochs", type=at_least(1), help="passes; free divides them by m; None: preset")
    add("--batch_size", type=at_least(2), help="of all processes together; None: preset")
    add("--lr", type=at_least(0, float), help="learning rate of SGD; None: preset")
    add("--momentum", type=at_least(0, float), default=0.9, help="momentum of SGD")
    add("--weight_decay", type=at_least(0, float), help="weight decay of SGD; None: preset")
    add("--schedule", choices=("step", "onecycle"), default="step", help="step: a tenth after half "
        "and again after three quarters of the weight steps; onecycle: up for 40 %%, down to 0")
    add("--augment", choices=("auto", "off"), default="auto", help="auto: random crops and flips, "
        "except for digits and mnist")
    add("--guard", choices=("stop", "warn", "off"), default="warn", help="what to do when accuracy "
        "under PGD on training images collapses; stop: end with the best weights so far")
    add("--amp", choices=("auto", "off", "bf16"), default="auto", help="precision; auto: bf16 on a "
        "GPU that has it, else float32")
    add("--save", type=Path, help="run folder; None: runs/DATA_METHOD_MODEL")
    parser.shared("seed", "device", "workers", "resume", "overwrite")
    return parser.parse_args()


def settle(args, team, device):
    """The settings, with the data set's presets filled in, and the images, none decoded yet."""
    images = open_images(args.data_dir, split="train", data_root=args.data_root)
    if not images.labelled:
        raise UserError(f"--data_dir {args.data_dir}: its folders are not classes of the networks; "
                        "wanted folders named by wnid, such as n01440764")
    eps, alpha, name, epochs, batch, lr, decay = FREE_PRESETS[images.kind]
    eps, name, batch = args.eps or eps, args.model_name or name, args.batch_size or batch
    models.check_name(name, images.kind)
    size = models.input_size(name, images.kind, images.size, "random")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    s = run.settled(
        args, model_name=name, image_size=size, eps=eps, batch_size=batch,
        alpha=args.alpha or {"free": eps, "fast": 1.25 * eps}.get(args.method, alpha),
        epochs=args.epochs or epochs, lr=lr if args.lr is None else args.lr,
        weight_decay=decay if args.weight_decay is None else args.weight_decay,
        amp=args.amp if args.amp != "auto" else "bf16" if bf16 else "off")
    images = images.prepared(size, args.num_images)
    if not team.size <= batch <= len(images):
        raise UserError(f"--batch_size {batch}: there are {len(images)} training images and "
                        f"{team.size} processes; wanted an image for each process, and no more "
                        "than there are (two at least)")
    return s, images


def main(args):
    team, device = join_team(run.resolve_device(args.device))
    s, images = settle(args, team, device)
    name = (f"free{s.replays}" if s.method == "free" else s.method) + f"_{s.model_name}"
    data = s.data_dir if s.data_dir in NAMED else images.kind
    folder = run.RunFolder(s.save or Path("runs") / f"{data}_{name}", lock=team.first)
    flags = run.result_flags(s, images=images.sha256()[:16], processes=team.size,
                             device=device.type)
    state = folder.load_checkpoint(flags, resume=s.resume, overwrite=s.overwrite)
    if images.kind != "imagenet" or s.augment == "off":  # else decoded anew in every pass
        images = load(images, workers=s.workers)
    training = FreeTraining(s, images, team, device)
    training.resume(state, folder)
    if team.first:
        rounded = " (rounded up)" * (s.method == "free" and s.epochs % s.replays > 0)
        print(f"{len(images)} images of {s.data_dir}, {s.model_name}, {s.method}: "
              f"{passes(s)} passes{rounded}, {training.total} weight steps", flush=True)
    loop(training, passes(s), folder, flags)
    if team.first:
        finish(training, folder, name)
    team.leave()


def finish(training, folder, name):
    """The network, its facts and its curve."""
    s, images = training.s, training.images
    facts = {"name": name, "kind": images.kind, "data_dir": str(s.data_dir),
             "data_root": str(s.data_root), **run.result_flags(s), "passes": len(training.rows),
             "weight_steps": training.done, "processes": training.team.size,
             "num_images": len(images), "images_sha256": images.sha256(),
             "seconds": training.seconds, **run.provenance(training.device)}
    path, weights = folder / f"{name}.pth", training.model[1].state_dict()
    run.save_pth(path, {k: v.cpu() for k, v in weights.items()})
    run.save_json(folder / f"{name}.json", facts)
    run.write_atomic(folder / "curve.png", draw.training(
        training.rows, name, probe_adv_acc="PGD-10, some training images"))
    print(f"saved {path}; python eval_net.py --runs {folder.path} attacks it")


if __name__ == "__main__":
    run_script(get_args, main)
