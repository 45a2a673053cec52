"""SGA: one image-agnostic perturbation for all images (Liu et al., ICCV 2023, arXiv:2308.06015).

    paper                                   here
    labels f(x) of the clean images         SgaTraining.start, once per run
    outer loop over large batches           SgaTraining.one_pass, large_batch
    inner pre-search, gradient aggregation  sga_gradient: `inner`, `total`; SPGD: spgd_gradient
    outer update of delta                   update, or universal.adam_step

    python train_sga.py                                            # digits, offline, a minute
    python train_sga.py --model_name vgg16 --data_dir /data/imagenet/train     # the paper's setting
    python train_sga.py --preset few_images ...      # ours, like transfer: docs/uap.md
    python train_sga.py --defense gcm --bpda ...    # through a defence, as the adaptive attacker

The loss is maximised. A run leaves NAME.pth, NAME.json, NAME.png, log.csv, curve.png, images.txt
and checkpoint.pth in its folder. --resume continues a killed run; on a CPU the bytes are the same.
"""

from argparse import BooleanOptionalAction
from functools import cache, cached_property, partial, reduce
from pathlib import Path
from statistics import fmean

import torch

from utils import cli, data, defenses, halving, precision, run, sga_run, sga_team
from utils.attack import maximin, universal
from utils.attack.balls import cut
from utils.attack.chance import numbered
from utils.attack.universal import draw_maps, make_loss
from utils.cli import at_least, radius
from utils.graphs import Graphed
from utils.loop import Trainer, loop
from utils.sga_team import SPGD_CHUNK
from utils.team import Team, join_team

ALONE = Team()    # one process
HELD = ("delta", "v", "labels", "amp", "layout")  # in a checkpoint, besides the generator


# ---------------------------------------------------------------- the method

def model_gradient(model, x, delta, y, loss, chance=None):
    """Mean loss of a model at x + delta, clipped to [0, 1], and its gradient with respect to delta.

    x (N, C, H, W), delta (1, C, H, W) -> scalar, (1, C, H, W). y: labels (N,), or outputs (N, D)
    for x, None: computed here. chance: random numbers of a defence, the same in both passes.
    """
    if y is None:
        with torch.no_grad(), universal.drawing(chance):
            y = model(x)
    delta = delta.detach().requires_grad_()
    with universal.drawing(chance):
        value = loss(model(cut(x + delta)), y)  # delta is broadcast: one gradient for all images
    return value.detach(), torch.autograd.grad(value, delta)[0]


def input_gradient(models, x, delta, y, chance=None, *, loss, team=ALONE):
    """Mean loss and mean gradient over the models, summed in the models' order.

    y: what model_gradient takes, one for each model. chance: each model has its own draws from it.
    team: processes that share the models.
    """
    works = [partial(model_gradient, model, x, delta, of_model, loss, chance and chance.fold(k))
             for k, (model, of_model) in enumerate(zip(models, y, strict=True))]
    found = sga_team.gathered(team, works, delta)
    return tuple(reduce(torch.add, one) / len(models) for one in zip(*found, strict=True))


def sga_gradient(gradient, x, y, delta, draws, *, eps, alpha, tick=lambda: None, **chosen):
    """Sum of the gradients along an inner pre-search, which starts at delta and is discarded.

    gradient(x, delta, y) -> loss, g; x (N, C, H, W); y: for each model and the N images; draws
    (M, n): indices into them; chosen: for universal.drawn. -> mean loss, (1, C, H, W)
    """
    inner, total, losses = delta, torch.zeros_like(delta), 0
    for j, index in enumerate(draws):
        value, g = gradient(*universal.drawn(j, index, x, inner, y, **chosen))
        inner = (inner + alpha * g.sign()).clamp(-eps, eps)
        total += g
        losses = losses + value
        tick()
    return losses / len(draws), total


def spgd_gradient(gradient, x, y, delta, draws, *, tick=lambda: None, team=ALONE, eps=None,
                  alpha=None, **chosen):
    """Gradient over the whole batch; draws (M, n) partition it, and the team shares them."""
    def chunk(j, index):
        tick()
        return gradient(*universal.drawn(j, index, x, delta, y, **chosen))
    total, losses = torch.zeros_like(delta), 0
    works = [partial(chunk, j, index) for j, index in enumerate(draws)]
    for index, (value, g) in zip(draws, sga_team.gathered(team, works, delta), strict=True):
        total += g * (len(index) / len(x))
        losses = losses + value * (len(index) / len(x))
    return losses, total


def update(delta, g, v, *, eps, alpha, mu):
    """One outer step along sign(g), or with momentum sign(v), v = mu v + g/||g||_1. -> delta, v"""
    if mu:
        v = mu * v + g / g.abs().sum().clamp_min(1e-30)
    return (delta + alpha * (v if mu else g).sign()).clamp(-eps, eps), v


# ------------------------------------------------------------------ the epochs

def index_draws(s, n, generator):
    """Indices into a batch's n images for each step: SGA (M, minibatch), others a partition."""
    if s.method != "sga":
        return torch.arange(n).split(SPGD_CHUNK)
    size, steps = min(s.minibatch, n), max(1, s.iter * n // s.minibatch)  # Sec. 3.3: K |LB| / |SB|
    return torch.stack([torch.randperm(n, generator=generator)[:size] for _ in range(steps)])


class SgaTraining(Trainer):
    """Trains a perturbation with settings s; models: the surrogates without their defence."""
    advice = "the last checkpoint is kept; look at the weights, or try --amp off"
    asked = 1  # a large batch of SGA takes a thousand gradients

    def __init__(self, s, models, images, generator, device, team=ALONE):
        parts = torch.arange(len(images)).split(s.batch_size)
        self.batches, self.moments = len(parts), 1 + (s.method in universal.ADAMS)
        self.uses = [len(d) * (maximin.GRADIENTS if s.method == "dm" else 1) for part in parts
                     for d in index_draws(s, len(part), torch.Generator())]
        super().__init__(device, steps=len(self.uses), team=team, keep={"generator": generator})
        self.s, self.models, self.images, self.generator = s, models, images, generator
        self.random, self.chance = defenses.is_random(s.defense), numbered(s.seed, len(images))
        self.behind = cache(lambda model: defenses.defend(  # Halving remembers how many images fit
            halving.Halving(model, "surrogate"), s.defense, size=s.image_size))
        self.measured = [self.behind(model) for model in models]
        self.pixels, self.loss = images.pixels_on(device), make_loss(s.loss, s.beta, s.target)
        self.layers = universal.layers_of(models, s, self.pixels[:1].to(device))
        self.watched = sga_run.watched(len(images), sum(self.uses))

    def start(self):
        """Fix, once per run, labels f(x) (S, N), precision and memory layout; set delta to zero."""
        s, n = self.s, self.s.minibatch if self.s.method == "sga" else SPGD_CHUNK
        self.labels = sga_team.predicted(self.team, self.measured, self.pixels, self.device,
                                         chance=self.chance.fold(0))  # 1: figures, from 2: passes
        self.delta, self.v = (torch.zeros((k, *self.pixels.shape[1:])) for k in (1, self.moments))
        x, y = data.to_float(self.pixels[:n].to(self.device)), self.labels[:, :n].to(self.device)
        y = [None] * len(y) if s.loss in universal.COMPARING else y
        self.amp, self.layout = self.team.from_first(lambda: precision.fastest(
            self.models, lambda fast, x: input_gradient(
                self.seen(fast), x, self.delta.to(x), y, loss=self.loss),
            x, amp=s.amp, layout=s.layout, deterministic=s.deterministic))

    def seen(self, fast):
        """What enters the loss: a layer of each Fast(Sequential(first, net)), or its logits."""
        if not self.layers:
            return fast
        return [universal.Features(model, f"model.1.{layer}")
                for model, layer in zip(fast, self.layers, strict=True)]

    @cached_property
    def fast(self):
        return [precision.Fast(model, self.amp, self.layout) for model in self.models]

    @cached_property
    def attacked(self):
        """The models to differentiate: those of `seen`, behind the defence."""
        models = [self.behind(model) for model in self.seen(self.fast)]
        return [defenses.adaptive(model) for model in models] if self.s.bpda else models

    @cached_property
    def gradient(self):
        """gradient(x, delta, y, chance) -> loss, g; chance only behind random defences"""
        team = self.team if len(self.models) > 1 else ALONE
        found = partial(input_gradient, self.attacked, loss=self.loss, team=team)
        still = self.device.type == "cuda" and team.size == 1 and not self.random
        return Graphed(found) if still else found

    def compared(self, x, index):
        """y for each model: labels, or clean outputs, None if these differ from step to step."""
        if self.s.loss not in universal.COMPARING:
            return self.labels[:, index].to(self.device)
        if self.s.augment or self.random:
            return [None] * len(self.attacked)
        with torch.no_grad():  # once for all K uses of each image
            return [torch.cat([model(part) for part in x.split(SPGD_CHUNK)])
                    for model in self.attacked]

    def large_batch(self, index):
        """x (N, C, H, W), y for each model, and indices and affine maps (or None) for each step."""
        x = data.to_float(self.pixels[index.to(self.pixels.device)].to(self.device))
        x = precision.to_layout(x, self.layout)
        draws = index_draws(self.s, len(x), self.generator)
        flat, sizes = torch.cat(list(draws)), [len(d) for d in draws]  # one copy to the device
        maps = draw_maps(flat.shape, self.generator).to(x).split(sizes) if self.s.augment else None
        return x, self.compared(x, index), flat.to(x.device).split(sizes), maps

    @property
    def step(self):
        """The next outer step."""
        if self.s.method not in universal.ADAMS:
            return partial(update, mu=self.s.momentum)
        return partial(universal.adam_step, step=1 + self.at + self.batches * len(self.rows))

    def one_pass(self, bar):
        """One outer step for each large batch."""
        s, self.sums = self.s, torch.zeros((), device=self.device)
        aggregate = sga_gradient if s.method == "sga" else partial(
            spgd_gradient, team=ALONE if len(self.models) > 1 else self.team)
        if s.method == "dm":
            share = (1 + len(self.rows)) / s.epochs
            aggregate = partial(maximin.maximin_gradient, aggregate, self.attacked[0], share)
        self.delta, self.v = (precision.to_layout(t.to(self.device), self.layout)
                              for t in (self.delta, self.v))
        order = torch.randperm(len(self.pixels), generator=self.generator).split(s.batch_size)
        for index in self.minibatches(order[self.skip:]):
            x, y, draws, maps = self.large_batch(index)
            own = self.chance.fold(2 + len(self.rows))[index].to(x.device) if self.random else None
            loss, g = aggregate(self.gradient, x, y, self.delta, draws, eps=s.eps, alpha=s.alpha,
                                augment=maps, chance=own, tick=bar.update)
            self.delta, self.v = self.step(self.delta, g, self.v, eps=s.eps, alpha=s.alpha)
            self.sums += loss * len(x)
        self.delta, self.v = self.delta.cpu(), self.v.cpu()
        return {"loss": float(self.sums) / len(self.pixels),
                "images_per_s": round(sum(self.uses) / self.pass_seconds, 1)}

    def after(self):
        found = sga_run.fooled(self, [self.behind(model) for model in self.fast], self.watched)
        return {metric: fmean(shares[metric]["value"] for shares in found) for metric in found[0]}

    def tensors(self):
        return [self.delta, self.v]

    def state(self):
        return super().state() | {name: getattr(self, name) for name in HELD}

    def restore(self, state):
        super().restore(state)
        self.delta, self.v = (state[name].view((k, *self.pixels.shape[1:]))
                              for name, k in (("delta", 1), ("v", self.moments)))
        self.labels, self.amp, self.layout = state["labels"], *(str(state[k]) for k in HELD[3:])
        sga_run.check_count(self.labels.shape[1], len(self.images))


# --------------------------------------------------------------------- the command

def get_args():
    parser = cli.Parser("Make a universal adversarial perturbation.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "labels", "classes", "num_images", num_images={
        "help": "training images, evenly over the classes; None: preset, 10000 on ImageNet"})
    parser.shared("model_name", "weights", "defense", model_name={"help": "surrogates, as for "
        "eval_uap.py; a,b: one run on both; a b: one on each; None: preset"})
    add("--image_size", type=at_least(8), help="side in pixels; None: 224, or that of small images")
    add("--bpda", action="store_true", help="adaptive attacker: gradients skip the gcm layer")
    add("--method", choices=("sga", "spgd", *universal.ADAMS), default="sga", help="spgd: no inner "
        "pre-search; adam: the same with Adam steps, as in FG-UAP; dm: as in DM-UAP")
    add("--preset", choices=tuple(sga_run.PRESET_FLAGS), default="paper", help="sets "
        "--augment, --momentum, --loss and --batch_size where they are not typed: docs/uap.md")
    add("--loss", choices=universal.LOSSES, help="ce: mean min(CE, beta); logit; cosine, feature: "
        "minus the cosine to the clean image's logits, or last feature map; None: preset, ce")
    add("--layer", type=cli.names, help="layer that --loss feature compares, one for all networks "
        "or one for each; None: the last feature map before pooling, found by a dry run")
    add("--beta", type=at_least(0, float), default=9.0, help="upper clamp of the cross-entropy")
    add("--eps", type=radius, help="Linf radius in [0, 1] pixels; None: preset, 10/255 on ImageNet")
    add("--alpha", type=radius, help="size of all steps; None: preset, 1/255 on ImageNet; adam "
        "and dm: learning rate, None: 0.51 and 2.55 eps, as published")
    add("--epochs", type=at_least(1), default=20, help="passes over the images")
    add("--batch_size", type=at_least(1), help="images in an outer step; None: preset, 250")
    add("--minibatch", type=at_least(1), help="images in an inner step of sga; None: 10")
    add("--iter", type=at_least(1), help="K of sga: mean uses of an image per epoch; None: 4")
    add("--momentum", type=at_least(0, float), help="mu; None: preset, 0; 0.9 with --augment")
    add("--target", type=cli.numbers, help="class to steer all images to; 3,5: one run each")
    add("--augment", action=BooleanOptionalAction, help="ours, for few images: random flips, "
        "scales and shifts; None: preset, no")
    add("--save", "--uaps_save", type=Path, help="run folder; for several perturbations, the "
        "parent of their folders; None: runs/DATA_METHOD_MODEL")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="precision of the "
        "gradients; auto: the faster, by timing both; figures are always float32")
    add("--layout", choices=("auto", *precision.LAYOUTS), default="auto", help="memory layout of "
        "the images; auto: the faster, by timing both")
    parser.shared(*cli.TRAINING, "cache", seed={"type": cli.numbers, "default": [0], "help":
        "fixes everything random; several, such as 0,1,2: one run each, shared by the processes"})
    return parser.parse_args()


def main(args):
    team, device = join_team(run.resolve_device(args.device))
    jobs = sga_team.jobs_of(team.in_turn(lambda: sga_run.plans(args)), team)
    ready = cache(lambda images: data.load(data.cached(images, args.cache, workers=args.workers),
                                           workers=args.workers, aloud=team.first))
    for job, one in sga_run.open_runs(jobs, device):
        s = job.s
        training = SgaTraining(s, job.models(device), ready(job.images),
                               run.make_generator(s.seed), device, job.team)
        one.begin(training)
        loop(training, s.epochs, one.folder, one.flags, deterministic=s.deterministic,
             desc=one.desc, minutes=s.checkpoint_minutes)
        sga_run.save_perturbation(training, job, one)
    team.leave()


if __name__ == "__main__":
    cli.run_script(get_args, main)
