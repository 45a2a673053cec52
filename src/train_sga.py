"""SGA: one image-agnostic perturbation for all images (Liu et al., ICCV 2023, arXiv:2308.06015).

    paper                                   here
    labels f(x) of the clean images         clean_predictions, once per run
    outer loop over large batches           run_epoch
    inner pre-search, gradient aggregation  sga_gradient: `inner`, `total`
    outer update of delta                   update
    SPGD (the baseline)                     spgd_gradient

    python train_sga.py                                            # digits, offline, seconds
    python train_sga.py --model_name vgg16 --data_dir /data/imagenet/train     # the paper's setting
    python train_sga.py --augment ...                              # ours: few images go further
    python train_sga.py --defense gcm --bpda ...    # through a defence, as one who knows it

The loss is ascended. A run leaves NAME.pth, NAME.json, NAME.png, log.csv, curve.png, images.txt and
checkpoint.pth in its folder; killed at any moment, it goes on with --resume to the same bytes.
"""

import math
import time
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import draw
from utils.data import NAMED, PRESETS, default_workers, load, open_images, to_float
from utils.defenses import DEFENSES, adaptive, defend
from utils.metrics import percent, predictions, share
from utils.models import (
    check_name,
    check_takes,
    describe_weights,
    input_size,
    load_model,
    num_classes,
    one_each,
)
from utils.precision import Fast, choose, synchronize, to_layout
from utils.run import (
    Parser,
    RunFolder,
    UserError,
    at_least,
    make_generator,
    names,
    provenance,
    radius,
    resolve_device,
    run_script,
    save_csv,
    save_json,
    save_pth,
    write_atomic,
)

WATCHED = 100     # images of the training set whose fooling ratio is logged every epoch
SPGD_CHUNK = 50   # images per backward pass of SPGD: 250 at once need 27 GB on VGG16
NOT_THE_RESULT = {"workers", "resume", "overwrite", "uaps_save", "data_root", "data_dir"}


def get_args():
    parser = Parser("Make a universal adversarial perturbation.")
    add = parser.add_argument
    add("--data_dir", default="digits", help="folder of class folders, or " + ", ".join(NAMED))
    add("--data_root", default="data", help="where named data sets are kept or downloaded to")
    add("--num_images", type=at_least(1), help="training images, evenly over the classes; "
        "None: the data set's preset, 10000 on ImageNet")
    add("--model_name", type=names, help="surrogate, or several: a,b; None: the data set's preset, "
        "vgg16 on ImageNet")
    add("--weights", type=names, default=["V1"],
        help="V1, V2, random, a .pth state dict or a folder of NAME.pth; one, or one per surrogate")
    add("--image_size", type=at_least(8), help="side in pixels; None: the surrogate's own")
    add("--defense", choices=DEFENSES, default="none", help="layers in front of every surrogate")
    add("--bpda", action="store_true", help="gradients as if the gcm layer were the identity: the "
        "attacker who knows it")
    add("--method", choices=("sga", "spgd"), default="sga", help="spgd: no inner pre-search")
    add("--loss", choices=("ce", "logit"), default="ce", help="ce: mean min(CE, beta)")
    add("--beta", type=at_least(0, float), default=9.0, help="where the cross-entropy is clamped")
    add("--eps", type=radius, help="radius of the Linf ball in [0, 1] pixels; None: the data set's "
        "preset, 10/255 on ImageNet")
    add("--alpha", type=radius, help="step size in [0, 1] pixels, inner and outer; None: preset, "
        "1/255 on ImageNet")
    add("--epochs", type=at_least(1), default=20, help="passes over the images")
    add("--batch_size", type=at_least(1), default=250, help="images of an outer step")
    add("--minibatch", type=at_least(1), default=10, help="images of an inner step")
    add("--iter", type=at_least(1), default=4, help="K: how often an epoch's inner steps see an "
        "image on average")
    add("--momentum", type=at_least(0, float), help="mu of the outer step, 0: no momentum; None: "
        "0, the paper's, and 0.9 with --augment")
    add("--target", type=at_least(0), help="class index to steer all images to; None: untargeted")
    add("--augment", action="store_true", help="flip, scale and shift every image of every inner "
        "step, with momentum; not in the paper, recommended when images are few")
    add("--uaps_save", type=Path, help="run folder; None: runs/DATA_METHOD_MODEL")
    add("--seed", type=at_least(0, high=2 ** 63 - 1), default=0,
        help="fixes everything random")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--amp", choices=("auto", "bf16", "off"), default="auto",
        help="precision of the gradients; auto: the faster by timing; figures are float32 always")
    add("--layout", choices=("auto", "contiguous", "channels_last"), default="auto",
        help="memory order of the images; auto: the faster by timing")
    add("--workers", type=at_least(0), default=default_workers(), help="processes that decode")
    add("--resume", action="store_true", help="go on with the run in --uaps_save")
    add("--overwrite", action="store_true", help="start again over the run in --uaps_save")
    return parser.parse_args()


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
        def towards(logits, y):
            goal = torch.full_like(y, target)
            return (-F.cross_entropy(logits, goal) if name == "ce" else -logit_loss(logits, goal))
        return towards
    return (lambda logits, y: clamped_ce(logits, y, beta)) if name == "ce" else logit_loss


def input_gradient(models, x, delta, y, loss):
    """Mean loss over models and images at clamp(x + delta, 0, 1), and its gradient.

    x (N, C, H, W), delta (1, C, H, W), y (S, N) for S models -> scalar, (1, C, H, W)
    """
    delta = delta.detach().requires_grad_()
    x_adv = (x + delta).clamp(0, 1)  # delta is broadcast: one gradient, not one per image
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

FLIP, SCALE, SHIFT, ROTATE = 0.5, (0.7, 1.3), 0.2, 0.0  # of --augment; README says what was tried


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


# --------------------------------------------------------------------- a run

def settle(args):
    """Fills in what the data set presets, refuses what cannot work; -> image list (names only)."""
    images = open_images(args.data_dir, split="train", data_root=args.data_root)
    preset = PRESETS[images.kind]
    args.eps, args.alpha = args.eps or preset.eps, args.alpha or preset.alpha
    args.model_name = args.model_name or [preset.surrogate]
    args.num_images = args.num_images or preset.num_images
    if args.momentum is None:
        args.momentum = 0.9 if args.augment else 0.0
    for name in args.model_name:
        check_name(name, images.kind)
    if args.target is not None and args.target >= num_classes(images.kind):
        raise UserError(f"--target {args.target}: {images.kind} has classes 0 to "
                        f"{num_classes(images.kind) - 1}")
    if args.bpda and "gcm" not in args.defense:
        raise UserError(f"--bpda --defense {args.defense}: there is no gcm layer to see through; "
                        "type --defense gcm")
    if args.minibatch > args.batch_size:
        raise UserError(f"--minibatch {args.minibatch} --batch_size {args.batch_size}: a minibatch "
                        "is drawn from the batch; type a smaller --minibatch")
    args.weights = one_each(args.model_name, args.weights)
    sizes = {input_size(name, images.kind, images.size, weights)
             for name, weights in zip(args.model_name, args.weights, strict=True)}
    if not args.image_size and len(sizes) > 1:
        raise UserError(f"--model_name {','.join(args.model_name)}: trained for images of "
                        f"{sorted(sizes)} pixels; type the one to use, as --image_size 224")
    args.image_size = args.image_size or sizes.pop()
    args.weights_are = [describe_weights(name, weights, images.kind)
                        for name, weights in zip(args.model_name, args.weights, strict=True)]
    return images.prepared(args.image_size, args.num_images)


def new_state(args, models, x, y, generator, device):
    """Everything that a checkpoint holds besides the flags that made it."""
    delta = torch.zeros((1, *x.shape[1:]))
    loss = make_loss(args.loss, args.beta, args.target)
    small = to_float(x[:args.minibatch if args.method == "sga" else SPGD_CHUNK].to(device))
    amp, layout = choose(
        models, lambda fast, batch: input_gradient(
            fast, batch, delta.to(device), y[:, :len(batch)].to(device), loss),
        small, amp=args.amp, layout=args.layout)
    return {"epoch": 0, "delta": delta, "v": torch.zeros_like(delta), "rows": [], "labels": y,
            "generator": generator.get_state(), "amp": amp, "layout": layout}


def index_draws(args, n, generator):
    """Which of a batch's n images every step uses: SGA (M, minibatch), SPGD a partition."""
    if args.method == "spgd":
        return torch.arange(n).split(SPGD_CHUNK)
    size = min(args.minibatch, n)
    steps = max(1, args.iter * n // args.minibatch)  # Sec. 3.3: M = K |LB| / |SB|
    return torch.stack([torch.randperm(n, generator=generator)[:size] for _ in range(steps)])


def run_epoch(args, gradient, state, pixels, generator, device, bar):
    """One pass over the shuffled images; updates state's delta and v. -> mean loss, gradients"""
    delta, v = (to_layout(state[key].to(device), state["layout"]) for key in ("delta", "v"))
    labels, losses, count = state["labels"].to(device), 0, 0
    aggregate = sga_gradient if args.method == "sga" else spgd_gradient
    for index in torch.randperm(len(pixels), generator=generator).split(args.batch_size):
        x = to_layout(to_float(pixels[index.to(pixels.device)].to(device)), state["layout"])
        draws = index_draws(args, len(x), generator)
        sizes = [len(d) for d in draws]
        flat = torch.cat(list(draws))  # to the device once per large batch, not once per step
        maps = draw_maps(flat.shape, generator).to(device).split(sizes) if args.augment else None
        loss, g = aggregate(gradient, x, labels[:, index.to(device)], delta,
                            flat.to(device).split(sizes), eps=args.eps, alpha=args.alpha,
                            augment=maps, tick=bar.update)
        delta, v = update(delta, g, v, eps=args.eps, alpha=args.alpha, mu=args.momentum)
        losses = losses + loss * len(x)
        count += len(flat)
    state["delta"], state["v"] = delta.cpu(), v.cpu()
    return float(losses) / len(pixels), count


def train(args, state, models, images, folder, flags, generator, device):
    """The epochs that are left; after each one a line, a row of log.csv and a checkpoint."""
    fast = [guarded(Fast(model, state["amp"], state["layout"]), args, generator)
            for model in models]
    if args.bpda:
        fast = [adaptive(model) for model in fast]
    models = [guarded(model, args, generator) for model in models]
    loss = make_loss(args.loss, args.beta, args.target)
    generator.set_state(state["generator"])
    pixels = images.pixels_on(device)
    watched = torch.linspace(0, len(images) - 1, min(WATCHED, len(images))).long()
    steps = sum(len(index_draws(args, len(index), torch.Generator()))
                for index in torch.arange(len(images)).split(args.batch_size))

    def gradient(x, delta, y):
        return input_gradient(fast, x, delta, y, loss)

    for epoch in range(state["epoch"] + 1, args.epochs + 1):
        synchronize(device)
        start = time.perf_counter()
        with tqdm(total=steps, desc=f"epoch {epoch}", leave=False, disable=None) as bar:
            mean_loss, count = run_epoch(args, gradient, state, pixels, generator, device, bar)
        synchronize(device)
        gradients_took = time.perf_counter() - start
        if not (state["delta"].isfinite().all() and math.isfinite(mean_loss)):
            raise UserError(f"epoch {epoch}: the gradient is not finite (loss {mean_loss}); the "
                            "last checkpoint is kept; look at the weights, or try --amp off")
        shares = fooled(args, models, images.select(watched), state["delta"],
                        state["labels"][:, watched], device)
        row = {"epoch": epoch, "loss": round(mean_loss, 6),
               **{metric: round(fmean(s[metric]["value"] for s in shares), 6)
                  for metric in shares[0]},
               "seconds": round(time.perf_counter() - start, 3),
               "images_per_s": round(count / gradients_took, 1)}
        state["rows"].append(row)
        state.update(epoch=epoch, generator=generator.get_state())
        save_pth(folder / "checkpoint.pth", {**state, "flags": flags})
        save_csv(folder / "log.csv", state["rows"])
        print(f"epoch {epoch:2d}/{args.epochs}  loss {mean_loss:.4f}  "
              + "".join(f"{m} {100 * row[m]:.1f} % (n={shares[0][m]['n']})  " for m in shares[0])
              + f"{row['seconds']:.1f} s  {row['images_per_s']:.0f} img/s", flush=True)


def fooled(args, models, images, delta, y, device):
    """[{metric: share}, one for each surrogate], in float32; y (S, N) clean predictions"""
    found = []
    for before, after in zip(y, predictions(models, images.pixels, device,
                                            delta=delta.contiguous()), strict=True):
        shares = {"fooling_ratio": share((after != before).sum().item(), len(before))}
        if args.target is not None:
            others = before != args.target
            shares["targeted_success"] = share((after[others] == args.target).sum().item(),
                                               others.sum().item())
        found.append(shares)
    return found


def guarded(model, args, generator):
    """The network behind --defense; what that draws, it draws from the run's generator."""
    return defend(model, args.defense, size=args.image_size, generator=generator)


def finish(args, state, models, images, folder, name, device):
    """The perturbation, its facts and its pictures."""
    delta = state["delta"][0].contiguous()
    shares = fooled(args, models, images, delta, state["labels"], device)
    facts = {
        "name": name, "scale": 1, "shape": list(delta.shape), "kind": images.kind,
        **{key: getattr(args, key) for key in (
            "method", "model_name", "defense", "bpda", "eps", "alpha", "loss", "beta", "epochs",
            "batch_size", "minibatch", "iter", "momentum", "target", "augment", "seed")},
        "weights": args.weights_are, "data_dir": str(args.data_dir), "num_images": len(images),
        "skipped": list(images.skipped), "images_sha256": images.sha256(),
        "on_training_images": dict(zip(args.model_name, shares, strict=True)),
        "amp": state["amp"], "layout": state["layout"],
        "seconds": round(sum(row["seconds"] for row in state["rows"]), 1), **provenance(device)}
    save_csv(folder / "log.csv", state["rows"])  # a kill may have come after the checkpoint
    save_pth(folder / f"{name}.pth", delta)
    save_json(folder / f"{name}.json", facts)
    write_atomic(folder / f"{name}.png", draw.encode_delta(delta))
    write_atomic(folder / "curve.png", draw.curves(state["rows"], name))
    for surrogate, found in zip(args.model_name, shares, strict=True):
        for metric, value in found.items():
            print(f"{metric} {percent(value)} on the training images, {surrogate}")
    print(f"saved {folder / name}.pth (.json, .png), {facts['seconds']:.0f} s")


def run_name(args):
    """What the perturbation is called: all that is not the default about how it was made."""
    extra = {"augment": args.augment, args.defense: args.defense != "none", "bpda": args.bpda,
             f"target{args.target}": args.target is not None}
    return "_".join([args.method, "+".join(args.model_name), *(k for k, on in extra.items() if on)])


def main(args):
    device = resolve_device(args.device)
    images = settle(args)
    name = run_name(args)
    data = args.data_dir if args.data_dir in NAMED else images.kind
    folder = RunFolder(args.uaps_save or Path("runs") / f"{data}_{name}")
    flags = {key: value for key, value in vars(args).items() if key not in NOT_THE_RESULT}
    flags.update(device=device.type, data_dir=f"image list {images.sha256()[:16]}",
                 weights=args.weights_are)
    state = folder.load_checkpoint(flags, resume=args.resume, overwrite=args.overwrite)
    models = [load_model(name, weights=weights, kind=images.kind, data_dir=args.data_dir,
                         data_root=args.data_root, device=device)
              for name, weights in zip(args.model_name, args.weights, strict=True)]
    for surrogate, model in zip(args.model_name, models, strict=True):
        check_takes(model, surrogate, images.channels, args.image_size, device)
    print(f"{len(images)} images of {args.data_dir}, {args.image_size} pixels, list sha256 "
          f"{images.sha256()[:16]}; surrogate {', '.join(args.model_name)}", flush=True)
    images, generator = load(images, workers=args.workers), make_generator(args.seed)
    defended = [guarded(model, args, generator) for model in models]
    if state is None:
        y = predictions(defended, images.pixels, device)
        state = new_state(args, models, images.pixels, y, generator, device)
        (folder / "checkpoint.pth").unlink(missing_ok=True)  # --overwrite: the old run ends here
        write_atomic(folder / "images.txt", images.listing().encode())
        save_pth(folder / "checkpoint.pth", {**state, "flags": flags})  # what auto chose holds
        print(f"gradients in {'float32' if state['amp'] == 'off' else state['amp']}, "
              f"{state['layout']} (to repeat: --amp {state['amp']} --layout {state['layout']})",
              flush=True)
    if state["labels"].shape[1] != len(images):
        raise UserError(f"--resume: the run has {state['labels'].shape[1]} images, {len(images)} "
                        "can be read now; bring the missing ones back or start again (--overwrite)")
    train(args, state, models, images, folder, flags, generator, device)
    finish(args, state, defended, images, folder, name, device)


if __name__ == "__main__":
    run_script(get_args, main)
