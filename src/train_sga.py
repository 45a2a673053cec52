"""SGA: one image-agnostic perturbation for all images (Liu et al., ICCV 2023, arXiv:2308.06015).

    paper                                   here
    labels f(x) of the clean images         SgaTraining.start, once per run
    outer loop over large batches           SgaTraining.one_pass, large_batch
    inner pre-search, gradient aggregation  sga_gradient: `inner`, `total`; SPGD: spgd_gradient
    outer update of delta                   update

    python train_sga.py                                            # digits, offline, seconds
    python train_sga.py --model_name vgg16 --data_dir /data/imagenet/train     # the paper's setting
    python train_sga.py --augment ...                              # ours: better with few images
    python train_sga.py --defense gcm --bpda ...    # through a defence, as the adaptive attacker

The loss is ascended. A run leaves NAME.pth, NAME.json, NAME.png, log.csv, curve.png, images.txt and
checkpoint.pth in its folder. A killed run continues with --resume and ends in the same bytes.
"""

import math
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

from utils import precision, run
from utils.attack.balls import cut
from utils.cli import TRAINING, Parser, at_least, radius, run_script
from utils.data import NAMED, PRESETS, cached, load, opened, to_float
from utils.defenses import adaptive, defend
from utils.errors import UserError
from utils.loop import Trainer, loop
from utils.measure import predictions
from utils.models import num_classes
from utils.uaps import fooled, save_perturbation, surrogates_of, uap_name

WATCHED = 100     # images of the training set whose fooling ratio is logged every epoch
SPGD_CHUNK = 50   # images per backward pass of SPGD: 250 at once need 27 GB on VGG16
HELD = ("delta", "v", "labels", "amp", "layout")  # by a checkpoint, besides the generator


# ---------------------------------------------------------------- the method

def clamped_ce(logits, y, beta):
    """mean(min(CE, beta)); an image past beta counts as fooled and gives no gradient. Sec. 3.1"""
    return F.cross_entropy(logits, y, reduction="none").clamp(max=beta).mean()


def logit_loss(logits, y):
    """Minus the mean logit of the label."""
    return -logits.gather(1, y[:, None]).mean()


def make_loss(name, beta, target):
    """loss(logits (N, K), y (N,)) to ascend; with a target: minus the loss towards it."""
    if target is not None:  # y is ignored; no clamp, which would silence the far images
        plain = F.cross_entropy if name == "ce" else logit_loss
        return lambda logits, y: -plain(logits, torch.full_like(y, target))
    return (lambda logits, y: clamped_ce(logits, y, beta)) if name == "ce" else logit_loss


def input_gradient(models, x, delta, y, loss):
    """Mean loss over models and images at x + delta, cut to [0, 1], and its gradient.

    x (N, C, H, W), delta (1, C, H, W), y (S, N) for S models -> scalar, (1, C, H, W)
    """
    delta = delta.detach().requires_grad_()
    x_adv = cut(x + delta)  # delta is broadcast: one gradient, not one per image
    value = sum(loss(model(x_adv), labels) for model, labels in zip(models, y, strict=True))
    value = value / len(models)
    return value.detach(), torch.autograd.grad(value, delta)[0]


def sga_gradient(gradient, x, y, delta, draws, *, eps, alpha, augment=None, tick=lambda: None):
    """Gradients summed along an inner pre-search that starts at delta and is thrown away.

    gradient(x, delta, y) -> loss, g; x (N, C, H, W), y (S, N), draws (M, n) indices into them;
    augment (M, n, 2, 3): an affine map for every drawn image. -> mean loss, (1, C, H, W)
    """
    inner, total, losses = delta, torch.zeros_like(delta), 0
    for j, index in enumerate(draws):
        batch = x[index] if augment is None else warp(x[index], augment[j])
        value, g = gradient(batch, inner, y[:, index])
        inner = (inner + alpha * g.sign()).clamp(-eps, eps)
        total += g
        losses = losses + value
        tick()
    return losses / len(draws), total


def spgd_gradient(gradient, x, y, delta, draws, *, augment=None, tick=lambda: None, **_):
    """The gradient of the whole batch; draws (M, n) partition it, to bound memory."""
    total, losses = torch.zeros_like(delta), 0
    for j, index in enumerate(draws):
        batch = x[index] if augment is None else warp(x[index], augment[j])
        value, g = gradient(batch, delta, y[:, index])
        total += g * (len(index) / len(x))
        losses = losses + value * (len(index) / len(x))
        tick()
    return losses, total


def update(delta, g, v, *, eps, alpha, mu):
    """One outer step: sign of g, or with momentum of v = mu v + g/||g||_1. -> delta, v"""
    if mu:
        v = mu * v + g / g.abs().sum().clamp_min(1e-30)
    return (delta + alpha * (v if mu else g).sign()).clamp(-eps, eps), v


# ------------------------------------------------------------- input diversity

FLIP, SCALE, SHIFT, ROTATE = 0.5, (0.7, 1.3), 0.2, 0.0  # of --augment: docs/uap.md


def draw_maps(shape, generator):
    """Affine maps (*shape, 2, 3): flip, scale, shift (share of the side) and rotation by chance."""
    u = torch.rand((5, *shape), generator=generator)
    flip = torch.where(u[0] < FLIP, -1.0, 1.0)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * u[1]
    angle = math.radians(ROTATE) * (2 * u[2] - 1)
    dx, dy = 2 * SHIFT * (2 * u[3:] - 1)  # affine_grid's side is 2 long
    cos, sin = angle.cos() / scale, angle.sin() / scale
    return torch.stack([torch.stack([flip * cos, -sin, dx], -1),
                        torch.stack([flip * sin, cos, dy], -1)], -2)


def warp(x, maps):
    """Every image through its own affine map, reflected at the borders. (N,C,H,W), (N,2,3)"""
    grid = F.affine_grid(maps, x.shape, align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.empty_like(x).copy_(moved)  # grid_sample forgets the memory order of x


# ------------------------------------------------------------------ the epochs

def index_draws(s, n, generator):
    """Which of a batch's n images each step uses: SGA (M, minibatch), SPGD a partition."""
    if s.method == "spgd":
        return torch.arange(n).split(SPGD_CHUNK)
    size, steps = min(s.minibatch, n), max(1, s.iter * n // s.minibatch)  # Sec. 3.3: K |LB| / |SB|
    return torch.stack([torch.randperm(n, generator=generator)[:size] for _ in range(steps)])


class SgaTraining(Trainer):
    """The epochs of SGA or SPGD with settings s; models: the surrogates without their defence."""
    advice = "the last checkpoint is kept; look at the weights, or try --amp off"

    def __init__(self, s, models, images, generator, device):
        parts = torch.arange(len(images)).split(s.batch_size)
        self.uses = [len(d) for part in parts for d in index_draws(s, len(part), torch.Generator())]
        super().__init__(device, steps=len(self.uses), keep={"generator": generator})
        self.s, self.models, self.images, self.generator = s, models, images, generator
        self.behind = partial(defend, name=s.defense, size=s.image_size, generator=generator)
        self.measured = [self.behind(model) for model in models]
        self.pixels, self.loss = images.pixels_on(device), make_loss(s.loss, s.beta, s.target)
        self.watched = torch.linspace(0, len(images) - 1, min(WATCHED, len(images))).long()

    def start(self):
        """What a new run keeps to: labels f(x) (S, N), precision, memory order; delta is zero."""
        s, n = self.s, self.s.minibatch if self.s.method == "sga" else SPGD_CHUNK
        self.labels = predictions(self.measured, self.pixels, self.device)
        self.delta = self.v = torch.zeros((1, *self.pixels.shape[1:]))
        x, y = to_float(self.pixels[:n].to(self.device)), self.labels[:, :n].to(self.device)
        step = partial(input_gradient, delta=self.delta.to(x), y=y, loss=self.loss)
        self.amp, self.layout = precision.fastest(
            self.models, step, x, amp=s.amp, layout=s.layout, deterministic=s.deterministic)

    @cached_property
    def gradient(self):
        """gradient(x, delta, y) -> loss, g"""
        fast = [self.behind(precision.Fast(model, self.amp, self.layout)) for model in self.models]
        return partial(input_gradient, [adaptive(model) for model in fast] if self.s.bpda else fast,
                       loss=self.loss)

    def large_batch(self, index):
        """x (N, C, H, W), y (S, N), and indices and affine maps (or None) of each step."""
        x = to_float(self.pixels[index.to(self.pixels.device)].to(self.device))
        x, y = precision.to_layout(x, self.layout), self.labels[:, index].to(self.device)
        draws = index_draws(self.s, len(x), self.generator)
        flat, sizes = torch.cat(list(draws)), [len(d) for d in draws]  # one copy to the device
        maps = draw_maps(flat.shape, self.generator).to(x).split(sizes) if self.s.augment else None
        return x, y, flat.to(x.device).split(sizes), maps

    def one_pass(self, bar):
        """One outer step for each large batch."""
        s, self.sums = self.s, torch.zeros((), device=self.device)
        aggregate = sga_gradient if s.method == "sga" else spgd_gradient
        self.delta, self.v = (precision.to_layout(t.to(self.device), self.layout)
                              for t in (self.delta, self.v))
        order = torch.randperm(len(self.pixels), generator=self.generator).split(s.batch_size)
        for index in self.minibatches(order[self.skip:]):
            x, y, draws, maps = self.large_batch(index)
            loss, g = aggregate(self.gradient, x, y, self.delta, draws, eps=s.eps, alpha=s.alpha,
                                augment=maps, tick=bar.update)
            self.delta, self.v = update(self.delta, g, self.v, eps=s.eps, alpha=s.alpha,
                                        mu=s.momentum)
            self.sums += loss * len(x)
        self.delta, self.v = self.delta.cpu(), self.v.cpu()
        return {"loss": float(self.sums) / len(self.pixels),
                "images_per_s": round(sum(self.uses) / self.pass_seconds, 1)}

    def after(self):
        found = fooled(self, self.watched)  # for each surrogate
        return {metric: fmean(shares[metric]["value"] for shares in found) for metric in found[0]}

    def tensors(self):
        return [self.delta, self.v]

    def state(self):
        return super().state() | {name: getattr(self, name) for name in HELD}

    def restore(self, state):
        super().restore(state)
        self.delta, self.v = (state[name].view_as(self.pixels[:1]) for name in HELD[:2])
        self.labels, self.amp, self.layout = state["labels"], *(str(state[k]) for k in HELD[3:])
        if (was := self.labels.shape[1]) != (now := len(self.images)):
            raise UserError(f"--resume: the run has {was} images, {now} can be read now; bring the "
                            "missing ones back or start again (--overwrite)")


# --------------------------------------------------------------------- the command

def get_args():
    parser = Parser("Make a universal adversarial perturbation.")
    add = parser.add_argument
    parser.shared("data_dir", "data_root", "labels", "classes", "num_images", num_images={
        "help": "training images, evenly over the classes; None: preset, 10000 on ImageNet"})
    parser.shared("model_name", "weights", "defense", model_name={"nargs": None})  # a or a,b
    add("--image_size", type=at_least(8), help="side in pixels; None: 224, or that of small images")
    add("--bpda", action="store_true", help="adaptive attacker: gradients skip the gcm layer")
    add("--method", choices=("sga", "spgd"), default="sga", help="spgd: no inner pre-search")
    add("--loss", choices=("ce", "logit"), default="ce", help="ce: mean min(CE, beta)")
    add("--beta", type=at_least(0, float), default=9.0, help="where the cross-entropy is clamped")
    add("--eps", type=radius, help="Linf radius in [0, 1] pixels; None: preset, 10/255 on ImageNet")
    add("--alpha", type=radius, help="size of all steps; None: preset, 1/255 on ImageNet")
    add("--epochs", type=at_least(1), default=20, help="passes over the images")
    add("--batch_size", type=at_least(1), default=250, help="images of an outer step")
    add("--minibatch", type=at_least(1), default=10, help="images of an inner step")
    add("--iter", type=at_least(1), default=4, help="K: uses of each image per epoch, on average")
    add("--momentum", type=at_least(0, float), help="mu; None: 0 (the paper's), 0.9 with --augment")
    add("--target", type=at_least(0), help="class index to steer all images to; None: untargeted")
    add("--augment", action="store_true", help="ours, for few images: flip, scale, shift them")
    add("--save", "--uaps_save", type=Path, help="run folder; None: runs/DATA_METHOD_MODEL")
    add("--amp", choices=("auto", "bf16", "off"), default="auto", help="precision of the "
        "gradients; auto: the faster by timing; figures are float32 always")
    add("--layout", choices=("auto", "contiguous", "channels_last"), default="auto",
        help="memory order of the images; auto: the faster by timing")
    parser.shared(*TRAINING, "cache")
    return parser.parse_args()


def settle(args):
    """Settings with the data set's presets, images (names only), surrogates as Targets."""
    images = opened(args, "train")
    preset = PRESETS[images.kind]
    chosen = args.model_name or [preset.surrogate]
    surrogates = surrogates_of(chosen, sum(args.weights, []), images, args.image_size)
    classes = len(surrogates[0].classes) or num_classes(images.kind)
    if args.target is not None and args.target >= classes:
        raise UserError(f"--target {args.target}: {images.kind} has classes 0 to {classes - 1}")
    if args.bpda and "gcm" not in args.defense:
        raise UserError(f"--bpda --defense {args.defense}: no gcm layer there; type --defense gcm")
    if args.minibatch > args.batch_size:
        raise UserError(f"--minibatch {args.minibatch} --batch_size {args.batch_size}: a minibatch "
                        "is drawn from the batch; type a smaller --minibatch")
    s = run.settled(args, eps=args.eps or preset.eps, alpha=args.alpha or preset.alpha,
                    model_name=chosen, weights_are=[one.described for one in surrogates],
                    num_images=args.num_images or preset.num_images, image_size=surrogates[0].size,
                    momentum=0.9 * args.augment if args.momentum is None else args.momentum)
    return s, images.prepared(s.image_size, s.num_images), surrogates


def main(args):
    device = run.resolve_device(args.device)
    s, images, surrogates = settle(args)
    name, data = uap_name(s), s.data_dir if s.data_dir in NAMED else images.kind
    folder = run.RunFolder(s.save or Path("runs") / f"{data}_{name}")
    flags = run.result_flags(s, device=device.type, weights=s.weights_are,
                             data_dir=f"image list {images.sha256()[:16]}")
    saved = folder.load_checkpoint(flags, resume=s.resume, overwrite=s.overwrite, grows=True)
    models = [one.load(images, data_dir=s.data_dir, data_root=s.data_root, device=device)
              for one in surrogates]
    print(f"{len(images)} images of {s.data_dir}, {s.image_size} pixels, list sha256 "
          f"{images.sha256()[:16]}; surrogate {', '.join(s.model_name)}", flush=True)
    images = load(cached(images, s.cache, workers=s.workers), workers=s.workers)
    training = SgaTraining(s, models, images, run.make_generator(s.seed), device)
    training.resume(saved, folder)
    if saved is None:
        run.write_atomic(folder / "images.txt", images.listing().encode())
        run.save_pth(folder / "checkpoint.pth", {**training.state(), "flags": flags})
    print(f"gradients in {training.amp.replace('off', 'float32')}, {training.layout} (to repeat: "
          f"--amp {training.amp} --layout {training.layout}); fooling_ratio of each epoch: "
          f"n={len(training.watched)} of these images", flush=True)
    loop(training, s.epochs, folder, flags, deterministic=s.deterministic,
         minutes=s.checkpoint_minutes)
    save_perturbation(training, folder, name)


if __name__ == "__main__":
    run_script(get_args, main)
