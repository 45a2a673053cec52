"""Adversarial training for free (Shafahi et al., NeurIPS 2019, arXiv:1904.12843), and its rivals.

    natural   trains on clean images
    pgd       on images attacked by K steps of PGD                (Madry et al., arXiv:1706.06083)
    free      m times in a row on each minibatch; one backward pass gives the gradients of the
              weights and of delta, which is never reset          (Alg. 1: free_minibatch, step)
    fast      on images attacked by one step from a random start  (Wong et al., arXiv:2001.03994)

    python free_at.py --method free --replays 8                       # digits, offline, seconds
    python free_at.py --method pgd --data_dir cifar10 --model_name preact_resnet18
    python free_at.py --recipe free --data_dir cifar10                # as the paper (recipes.py)
    torchrun --nproc_per_node 4 free_at.py --recipe free --data_dir /data/imagenet
    python free_at.py --data_dir CLASS_FOLDERS --image_size 64 --model_name preact_resnet18
    python eval_net.py --runs runs/digits_natural_mlp runs/digits_free8_mlp runs/digits_pgd_mlp

Natural and free training take the same number of weight steps for the same --epochs: free training
passes over the images ceil(epochs / m) times. A run leaves NAME.pth (the network's state dict,
which every script takes as --weights), NAME_best.pth (of the pass that --validate found best),
their .json, log.csv, curve.png and checkpoint.pth. A killed run continues with --resume.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from attacks import pgd
from utils import free_run, models, precision, recipes, run
from utils.attack.balls import cut
from utils.attack.chance import Chance
from utils.cli import TRAINING, Parser, at_least, radius, run_script
from utils.data import NAMED, cached, load, to_float
from utils.loop import Trainer, loop
from utils.passes import one_pass
from utils.sources import label_of
from utils.team import in_parallel, join_team, joint_batch_norm

PROBED = 200  # training images that --guard attacks after every pass


# ---------------------------------------------------------------- the methods

def free_minibatch(step, x, y, delta, *, eps, alpha, m, box=False):
    """Alg. 1, lines 6 to 12: m weight steps on one minibatch x (n, C, H, W); delta in place.

    step(x, y) takes a weight step on the images x with one backward pass, which also leaves the
    gradient in the tensor x came from. box: x + delta stays in [0, 1]; otherwise only the input of
    the network is clipped, and delta has no gradient where x + delta is outside.
    """
    low, high = ((-x).clamp(min=-eps), (1 - x).clamp(max=eps)) if box else (-eps, eps)
    delta.clamp_(low, high)  # box: it came from other images
    for _ in range(m):
        noise = delta.clone().requires_grad_()
        step(cut(x + noise), y)
        delta.add_(alpha * noise.grad.sign()).clamp_(low, high)  # if fp16 overflows: sign(NaN) is 0


def fast_start(model, x, y, u, *, eps, alpha, loss=F.cross_entropy):
    """One signed step from x + eps (2 u - 1), first clipped to [0, 1]; u (n, C, H, W) in [0, 1)."""
    start = (x + eps * (2 * u - 1)).clamp(0, 1).requires_grad_()
    g, = torch.autograd.grad(loss(model(start), y).mean(), start)
    return (x + (start.detach() - x + alpha * g.sign()).clamp(-eps, eps)).clamp(0, 1)


class FreeTraining(Trainer):
    """Network, optimiser and delta; s: from recipes.settle; held: the images of --validate."""

    def __init__(self, s, images, team, device, held=None):
        if images.pixels is not None:
            images = replace(images, pixels=images.pixels_on(device))
        model = models.trainable(s.model_name, kind=images.kind, weights=s.pretrained, seed=s.seed,
                                 classes=len(images.classes), image_size=s.image_size,
                                 data_dir=s.data_dir, data_root=s.data_root)
        self.model = joint_batch_norm(precision.placed(model, device), device, team)
        self.optimizer = torch.optim.SGD(recipes.decayed(self.model, s), s.lr, s.momentum,
                                         weight_decay=s.weight_decay)
        self.generator = run.make_generator(s.seed)
        shape = (s.batch_size, images.channels, s.image_size, s.image_size)
        self.delta = torch.zeros(shape)[team.rank::team.size].to(device)
        self.smallest = max(2, team.size)  # BatchNorm needs two images, every process needs one
        whole, last = divmod(len(images), s.batch_size)
        steps = (whole + (last >= self.smallest)) * (s.replays if s.method == "free" else 1)
        self.mixed = precision.Mixed(s.amp, device)
        super().__init__(device, steps=steps, team=team, keep={
            "net": self.model, "optimizer": self.optimizer, "generator": self.generator,
            "mixed": self.mixed})
        self.s, self.images, self.net = s, images, in_parallel(self.model, team, shape[1:])
        self.passes = recipes.passes(s, steps)
        self.done, self.total = 0, s.weight_steps or self.passes * steps  # weight steps
        self.best, self.probed = {"probe": 0.0, "net": None}, None  # of --guard
        self.held, self.chosen = held, {"score": [], "net": None}   # of --validate

    def start(self):
        """Seed the global generator, used by dropout; checkpoints hold its state."""
        torch.manual_seed(self.s.seed + self.team.rank)

    def one_pass(self, bar):
        s = self.s
        self.net.train()
        self.bar, self.sums = bar, torch.zeros(3, device=self.device)  # loss, right, images
        for joint, index, x in self.minibatches(one_pass(
                self.images, s.batch_size, self.generator, self.team, vary=s.augment == "auto",
                smallest=self.smallest, workers=s.workers, shift=s.shift, skip=self.skip,
                device=self.device)):
            if self.done == self.total:
                break
            self.joint = joint  # images of the minibatch over all processes
            self.minibatch(to_float(x), precision.moved(self.images.labels[index], x.device))
        loss, right, count = self.team.total(self.sums.tolist())
        return {"loss": loss / count, "train_acc": right / count, "weight_steps": self.done}

    def minibatch(self, x, y):
        """All weight steps on this process's part x (n, C, H, W), y (n,) of a joint minibatch."""
        s, ball = self.s, {"eps": self.s.eps, "alpha": self.s.alpha}
        attacking = {**ball, "loss": self.mixed.attack_loss}
        if s.method == "free":
            free_minibatch(self.step, x, y, self.delta[:len(x)], **ball,
                           m=min(s.replays, self.total - self.done), box=s.clip_delta == "box")
        elif s.method == "pgd":
            own = self.chances(x)
            with self.mixed.autocast():
                x_adv = pgd(self.model, x, y, **attacking, steps=s.steps, generator=own)
            self.step(x_adv, y)
        elif s.method == "fast":
            u = self.chances(x).uniform(*x.shape[1:])
            with self.mixed.autocast():
                x_adv = fast_start(self.model, x, y, u, **attacking)
            self.step(x_adv, y)
        else:
            self.step(x, y)

    def step(self, x, y):
        """One backward pass and one weight step on x, y; the processes share the minibatch."""
        rate = recipes.rate(self.done, self.total, self.s.schedule, self.passes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.s.lr * rate
        with self.mixed.autocast():
            logits = self.net(x)
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        self.optimizer.zero_grad()
        self.mixed.backward(loss * (self.team.size / self.joint))  # processes are averaged
        self.mixed.step(self.optimizer)
        self.done += 1
        self.sums += torch.stack([loss.detach(), (logits.argmax(1) == y).sum(),
                                  torch.full_like(loss, len(y))])  # no wait for the device
        self.bar.update()

    def chances(self, x):
        """The random numbers for x, this process's part of the joint minibatch."""
        seed = int(torch.randint(2 ** 63 - 1, (), generator=self.generator))  # for all processes
        place = torch.arange(len(x), device=x.device) * self.team.size + self.team.rank
        return Chance(seed, place)

    def after(self):
        """--validate; --guard warns or stops when probe_adv_acc falls below half its best."""
        found = self.validate()
        if self.s.method == "natural" or self.s.guard == "off":
            return {"probe_adv_acc": "", **found}
        value, best, stop = self.probe(), self.best["probe"], self.s.guard == "stop"
        net = self.model[1]
        if value >= best:
            saved = {k: v.clone() for k, v in net.state_dict().items()} if stop else None
            self.best = {"probe": value, "net": saved, "pass": len(self.rows) + 1}
        elif best > 0.1 and value < best / 2:
            if self.team.first:
                print(f"warning: accuracy under PGD-10 on training images fell from "
                      f"{100 * best:.1f} % to {100 * value:.1f} %: catastrophic overfitting"
                      + "; the run ends with the better weights" * stop, flush=True)
            if stop:
                self.stopped = True
                net.load_state_dict(self.best["net"])
        return {"probe_adv_acc": value, **found}

    def probe(self):
        """Accuracy under PGD-10 on the same few training images."""
        if self.probed is None:
            count = min(PROBED, len(self.images))
            index = torch.linspace(0, len(self.images) - 1, count).long()
            self.probed = load(self.images.select(index), workers=0)
        return self.measured(self.probed)[2]

    def validate(self):
        """Columns of --validate. Keeps the network best under PGD-10, then on clean images."""
        if self.held is None:
            return {}
        (loss, clean, robust), natural = self.measured(self.held), self.s.method == "natural"
        score = [clean] if natural else [robust, clean]
        if score > self.chosen["score"]:
            net = {k: v.cpu().clone() for k, v in self.model[1].state_dict().items()}
            self.chosen = {"score": score, "pass": len(self.rows) + 1, "images": len(self.held),
                           "net": net}
        return {"val_loss": loss, "val_acc": clean, "val_adv_acc": "" if natural else robust}

    def measured(self, images):
        """Mean loss, accuracy, and accuracy under PGD-10 except in natural training."""
        attack = None if self.s.method == "natural" else partial(
            pgd, eps=self.s.eps, alpha=self.s.eps / 4, steps=10, stop_early=True)
        return free_run.measured(self.model, images, attack, self.team, self.device, self.halves)

    def state(self):
        return super().state() | {"done": self.done, "best": self.best, "chosen": self.chosen,
                                  "delta": self.team.gather(self.delta).cpu()}

    def restore(self, state):
        super().restore(state)
        self.done, self.best = state["done"], state["best"]
        self.chosen = state.get("chosen", self.chosen)  # not in checkpoints of older versions
        free_run.check_same(self.chosen, self.held)
        self.delta.copy_(state["delta"][self.team.rank::self.team.size])


# --------------------------------------------------------------------- a run

def get_args():
    parser = Parser("Train a network naturally or adversarially.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "labels", "classes", "num_images")
    add("--image_size", type=at_least(28, high=4096), help="side in pixels of photographs; None: "
        "that of --pretrained, or the network's, 224 for most")
    add("--model_name", help="network: torchvision's, timm/NAME, FILE.py:FUNCTION (which is run) "
        "or one of utils/nets.py; None: the data set's preset")
    add("--pretrained", default="random", help="weights to start from: random, V1 or another of "
        "torchvision's, or the path of a state dict")
    add("--recipe", choices=tuple(recipes.OF_PAPERS), help="a paper's settings "
        "(utils/recipes.py) for flags that are not typed; None: the data set's preset")
    add("--method", choices=("natural", "pgd", "free", "fast"), help="training method; None: free")
    add("--replays", type=at_least(1), help="m of free: steps on each minibatch; None: 8")
    add("--eps", type=radius, help="Linf radius, in [0, 1] pixels; None: the data set's preset")
    add("--alpha", type=radius, help="step size; None: free eps, fast 1.25 eps, pgd eps / 4, "
        "on mnist eps / 6")
    add("--clip_delta", choices=("ball", "box"), help="free: ball, delta stays within eps, as in "
        "the paper; box: x + delta also stays in [0, 1], as in fast_adversarial; None: ball")
    add("--steps", type=at_least(1), help="K of pgd; None: 7")
    add("--epochs", type=at_least(1), help="passes; free divides them by m; None: preset")
    add("--weight_steps", type=at_least(1), help="steps after which training ends, instead of "
        "--epochs; None: as many as --epochs takes")
    add("--batch_size", type=at_least(2), help="images in a step, over all processes; None: preset")
    add("--lr", type=at_least(0, float), help="learning rate of SGD; None: preset")
    add("--momentum", type=at_least(0, float), default=0.9, help="momentum of SGD")
    add("--weight_decay", type=at_least(0, float), help="weight decay of SGD; None: preset")
    add("--decay", choices=("all", "weights"), help="which parameters decay; weights: all "
        "but BatchNorm and biases; None: all")
    add("--schedule", choices=(*recipes.FALLS, *recipes.PEAKS), help="step: x 0.1 after half "
        "and again after three quarters of the weight steps; thirds: after a third and two thirds "
        "of the passes; onecycle: up for 40 %%, down to 0; triangle: up for half; None: step")
    add("--augment", choices=("auto", "off"), default="auto", help="auto: random crops and flips, "
        "except for digits and mnist")
    add("--shift", type=at_least(0, high=32), help="largest shift of CIFAR's random crops, in "
        "pixels; None: 4")
    add("--hold_out", type=at_least(0.001, float, 0.5), default=0.1, help="share of the images "
        "held out for eval_net.py where there is no test split")
    add("--validate", type=at_least(0), help="images that training does not see, measured after "
        "each pass, also under PGD-10 unless training is natural; NAME_best.pth is the best "
        "network on them; None: 500, at most a tenth of the training images")
    add("--guard", choices=("stop", "warn", "off"), default="warn", help="what to do when accuracy "
        "under PGD on training images collapses; stop: end with the best weights so far")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="precision; auto: "
        "bf16 on a GPU that has it, fp16 on an older one, off on a CPU")
    add("--save", type=Path, help="run folder; None: runs/DATA_METHOD_MODEL")
    parser.shared(*TRAINING, "cache", cache={"help": "folder that keeps decoded photographs: those "
        "of --validate, or all with --augment off; random crops are always cut from the files"})
    return parser.parse_args()


def main(args):
    team, device = join_team(run.resolve_device(args.device))
    s, images = team.in_turn(lambda: recipes.settle(args, team, device))
    method = f"free{s.replays}" if s.method == "free" else s.method
    name = f"{method}_{label_of(s.model_name)}"
    data = s.data_dir if s.data_dir in NAMED else images.kind
    folder = run.RunFolder(s.save or Path("runs") / f"{data}_{name}", lock=team.first)
    flags = run.result_flags(s, "classes", "validate", images=images.sha256()[:16],
                             processes=team.size, device=device.type)
    state = folder.load_checkpoint(flags, resume=s.resume, overwrite=s.overwrite, name=name)
    if images.kind not in ("imagenet", "folder") or s.augment == "off":  # else decoded in each pass
        images = load(cached(images, s.cache, workers=s.workers), workers=s.workers,
                      aloud=team.first)
    held = free_run.validation(s, images, team)
    training = FreeTraining(s, images, team, device, held)
    recipes.check_network(training.model, s, images.channels, device)
    training.resume(state, folder)
    if team.first:
        rounded = " (rounded up)" * bool(training.total % training.steps if s.weight_steps else
                                         s.method == "free" and s.epochs % s.replays)
        print(f"{len(images)} images of {s.data_dir} in {len(s.classes)} classes, {s.model_name}, "
              f"{s.method}: {training.passes} pass{'es' * (training.passes > 1)}{rounded}, "
              f"{training.total} weight steps", flush=True)
    loop(training, training.passes, folder, flags, deterministic=s.deterministic,
         minutes=s.checkpoint_minutes)
    if team.first:
        free_run.finish(training, folder, name)
    team.leave()


if __name__ == "__main__":
    run_script(get_args, main)
