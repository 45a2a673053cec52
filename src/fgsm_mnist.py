"""An exercise: FGS, FGV and adversarial training on MNIST; each task is a flag.

    task                             here
    1  a small network               --batch_norm; lenet, lenet_bn in utils/nets.py
    2  FGS and FGV                   fgs_step and fgv_step of attacks.py; --alpha_fgs, --alpha_fgv
    3  evaluation                    accuracies: clean; under attack, of the images right before
    4  adversarial training          joint_gradient, step; --train fgs; (b) curve.png
       theta - eta (g_clean + g_adv) --optimizer sgd; adam, the default, gets the same sum
    5  variations                    --train clean | noise | fgs | fgv, each with --batch_norm
    beyond the sheet                 PGD-40, also after every epoch, and `strongest_quick` of
                                     attacks.py; suspicious figures: utils/report_mnist.py

    python fgsm_mnist.py --train fgs                                # digits, offline, seconds
    python fgsm_mnist.py --train fgs --data_dir mnist --batch_norm --seeds 3
    python fgsm_mnist.py --summary runs/mnist/clean runs/mnist/fgs --save runs/mnist

Papers: FGS arXiv:1412.6572, FGV arXiv:1605.01775, label leaking arXiv:1611.01236. A run has a
folder for each seed, with NAME.pth (a state dict that every script takes as --weights), log.csv and
checkpoint.pth, and above them the figures over all seeds. A killed run continues with
--resume; on a CPU it leaves the same bytes.
"""

import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import attacks
from utils import measure, models, precision
from utils.attack.chance import numbered
from utils.cells import Progress
from utils.cli import Parser, at_least, radius, run_script
from utils.data import to_float
from utils.exercise import OPTIMIZERS, settle
from utils.loop import Trainer, loop
from utils.report_mnist import save_results, summarise
from utils.run import (
    RunFolder,
    make_generator,
    provenance,
    resolve_device,
    result_flags,
    save_json,
    save_pth,
    write_atomic,
)

EVAL_BATCH = 500
SHOWN = 6  # example images


# -------------------------------------------------------------- tasks 2 and 4

def noise_step(x, alpha, generator):
    """x + alpha * {-1, +1}^D, in [0, 1]."""
    signs = 2 * torch.randint(0, 2, x.shape, generator=generator) - 1
    return (x + alpha * signs.to(x)).clamp_(0, 1)


def joint_gradient(model, x, y, adversary, *, label="true"):
    """Adds the weights' gradients of the loss on x (n, C, H, W) and on adversary(x, g) to .grad.

    g (n, C, H, W), the gradient with respect to the image, comes from the backward pass of the
    clean batch. Both losses are means, at the same weights.
    -> clean loss, adversarial loss
    """
    images = x.clone().requires_grad_()
    logits = model(images)
    loss = F.cross_entropy(logits, y)
    if label == "predicted":  # another loss: a separate backward pass
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
    """The same for the clean batch alone."""
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach(), torch.zeros_like(loss)


class ExerciseTraining(Trainer):
    """One seed of one variation: weight steps on the clean batch and on what --train adds to it.

    watched: test images that PGD-40 attacks after every epoch.
    """

    def __init__(self, s, images, test, watched, seed, device):
        self.s, self.images, self.test, self.watched = s, images, test, watched
        name = "lenet_bn" if s.batch_norm else "lenet"
        self.model = precision.placed(models.trainable(name, kind=images.kind, seed=seed), device)
        self.optimizer = OPTIMIZERS[s.optimizer].make(self.model.parameters(), s.lr)
        self.generator = make_generator(seed)
        self.adversary = {
            "fgs": lambda x, g: attacks.fgs_step(x, g, s.alpha_fgs),
            "fgv": lambda x, g: attacks.fgv_step(x, g, s.alpha_fgv),
            "noise": lambda x, _: noise_step(x, s.alpha_fgs, self.generator)}.get(s.train)
        super().__init__(device, steps=len(images), unit="img", keep={
            "net": self.model[1], "optimizer": self.optimizer, "generator": self.generator})

    def step(self, x, y):
        """A weight step along the sum of the gradients. -> clean loss, loss on the added images"""
        self.optimizer.zero_grad()
        if self.adversary is None:
            losses = clean_gradient(self.model, x, y)
        else:
            losses = joint_gradient(self.model, x, y, self.adversary, label=self.s.label)
        self.optimizer.step()
        return torch.stack(losses)

    def one_pass(self, bar):
        self.model.train()
        self.sums = torch.zeros(2, device=self.device)
        order = torch.randperm(len(self.images), generator=self.generator)
        parts = [index for index in order.split(self.s.batch_size)
                 if len(index) > 1]  # BatchNorm needs two images
        for index in self.minibatches(parts[self.skip:]):
            self.sums += self.step(*batch(self.images, index, self.device))
            bar.update(len(index))
        loss, loss_joined = (self.sums / len(parts)).tolist()
        return {"loss": loss, "loss_joined": loss_joined}

    def after(self):
        found = accuracies(self.model.eval(), self.test, self.s, self.device)
        if self.watched is not None:
            found |= stronger(self.model, self.watched, self.s, self.device, only="pgd40")
        return {name: one["value"] for name, one in found.items()}


def batch(images, index, device):
    """x (n, C, H, W) in [0, 1] and y (n,) of these images, on the device."""
    return to_float(images.pixels[index].to(device)), images.labels[index].to(device)


# ---------------------------------------------------------------------- task 3

def accuracies(model, images, s, device):
    """{clean, fgs, fgv: share}: clean accuracy; of the images right before, those right after.

    {fgs,fgv}_adv_acc: right after, of all. Both attacks use the true labels and the same gradient.
    """
    def counted(index, x):
        x, y = to_float(x.to(device, non_blocking=True)), images.labels[index].to(device)
        logits, g = image_gradient(model, x, y)
        with torch.no_grad():
            good = logits.argmax(1) == y
            found = {"clean": int(good.sum())}
            for name, step, alpha in (("fgs", attacks.fgs_step, s.alpha_fgs),
                                      ("fgv", attacks.fgv_step, s.alpha_fgv)):
                after = model(step(x, g, alpha)).argmax(1) == y
                found |= {name: int((good & after).sum()), f"{name}_adv_acc": int(after.sum())}
        return found
    robust = Progress().count(images, torch.arange(len(images)), counted, batch_size=EVAL_BATCH,
                              desc="FGS, FGV")
    right = robust.pop("clean")
    return {"clean": measure.share(right, len(images)),
            **{name: measure.share(count, right if name in ("fgs", "fgv") else len(images))
               for name, count in robust.items()}}


def image_gradient(model, x, y):
    """Logits, and the gradient of the summed loss with respect to the images."""
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    g, = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    return logits.detach(), g


def stronger(model, images, s, device, only=None):
    """{pgd40, strongest_quick: share}: under iterated attacks with FGS's eps; only: one of them."""
    eps = s.alpha_fgs
    runs = {
        "pgd40": partial(attacks.pgd, eps=eps, alpha=eps / 30, steps=40, stop_early=True),
        "strongest_quick": partial(attacks.strongest_quick, eps=eps, queries=s.queries)}
    same = {"draws": 1, "batch_size": EVAL_BATCH, "device": device,
            "chance": numbered(0, len(images))}
    before, found = measure.count_right_on(model, images, **same), {}
    for name, run in runs.items() if only is None else [(only, runs[only])]:
        cell = measure.run_cell(measure.Attack(name, "linf", eps, run), model, model, images,
                                before, **same, desc=name)
        found[name] = measure.figures(cell)["attack_robustness"]
    return found


def attacked_examples(model, images, s, device):
    """The first correctly classified test images: x (clean, FGS, FGV), seen (predictions), y."""
    first = images.select(torch.arange(min(200, len(images))))
    x, y = batch(first, torch.arange(len(first)), device)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right][:SHOWN], y[right][:SHOWN]
    if not len(x):
        return None
    _, g = image_gradient(model, x, y)
    kinds = [x, attacks.fgs_step(x, g, s.alpha_fgs), attacks.fgv_step(x, g, s.alpha_fgv)]
    with torch.no_grad():
        seen = np.stack([model(kind).argmax(1).cpu().numpy() for kind in kinds])
    return {"x": torch.stack(kinds).cpu().numpy(), "seen": seen, "y": y.cpu().numpy()}


# ------------------------------------------------------------------------ a run

def get_args():
    parser = Parser("Train a small network on clean, noisy or adversarial images, and attack it.")
    add, shared = parser.add_argument, parser.shared
    shared("data_dir", "data_root", data_dir={"help": "digits, mnist (downloaded), cifar10, or a "
                                              "folder that holds MNIST or CIFAR-10"})
    shared("num_images", num_images={"help": "training images, evenly over the classes; None: all"})
    add("--batch_norm", action="store_true", help="BatchNorm after all layers but the last")
    add("--train", choices=("clean", "noise", "fgs", "fgv"), default="fgs",
        help="what is added to every clean batch")
    add("--alpha_fgs", type=radius, default=0.3, help="strength of FGS, of noise and of the "
        "attacks beyond the sheet, on the [0, 1] scale")
    add("--alpha_fgv", type=radius, default=0.6, help="strength of FGV: its largest change")
    add("--label", choices=("true", "predicted"), default="true", help="label whose loss the "
        "training attack increases; with the true label the network may learn to read it off the "
        "perturbation (label leaking); predicted costs one more backward pass")
    add("--epochs", type=at_least(1), help="passes over the training images; None: 50, for digits "
        "30")
    add("--batch_size", type=at_least(2), default=128, help="clean images per step")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adam", help="adam; sgd: the sheet's "
        "theta - lr (g_clean + g_adv), without momentum")
    add("--lr", type=at_least(0, float), help="learning rate; None: adam 0.001, sgd 0.05")
    shared("seed", seed={"help": "the first seed"})
    add("--seeds", type=at_least(1), default=1, help="number of seeds, run one by one")
    add("--eval_images", type=at_least(1), default=1000, help="test images for the attacks beyond "
        "the sheet, evenly over the classes; at most all of them")
    add("--curve_images", type=at_least(0), help="test images that PGD-40 attacks after every "
        "epoch; None: 500, for digits 100")
    shared("queries")
    add("--summary", nargs="+", type=Path, help="train nothing; put these finished run folders "
        "into one table and two pictures, in --save")
    add("--save", type=Path, help="run folder; None: runs/DATA_TRAIN[_bn]")
    shared("device", "checkpoint_minutes", "resume", "overwrite")
    return parser.parse_args()


def one_seed(s, seed, images, test, few, watched, device):
    """Trains one seed in its folder and measures it. -> {seed, seconds, and its figures}"""
    flags = result_flags(s, "name", "summary", "seeds", "eval_images", "queries", seed=seed,
                         images=images.sha256()[:16], device=device.type)
    folder = RunFolder(s.save / f"seed{seed}")
    state = folder.load_checkpoint(flags, resume=s.resume, overwrite=s.overwrite, grows=True)
    trainer = ExerciseTraining(s, images, test, watched, seed, device)
    trainer.resume(state, folder)
    loop(trainer, s.epochs, folder, flags, desc=f"{s.name}, seed {seed}, epoch",
         minutes=s.checkpoint_minutes)
    model = models.freeze(trainer.model)
    found = accuracies(model, test, s, device) | stronger(model, few, s, device)
    save_pth(folder / f"{s.name}.pth", {k: v.cpu() for k, v in model[1].state_dict().items()})
    save_json(folder / f"{s.name}.json", {
        "name": s.name, "kind": images.kind, "data_dir": str(s.data_dir), **flags,
        "model_name": "lenet_bn" if s.batch_norm else "lenet", "num_images": len(images),
        "seconds": round(trainer.seconds, 1), **provenance(device)})
    shown = attacked_examples(model, test, s, device) if seed == s.seed else None
    if shown:
        buffer = io.BytesIO()
        np.savez(buffer, **shown)
        write_atomic(s.save / "examples.npz", buffer.getvalue())
    return {"seed": seed, "seconds": trainer.seconds, **found}


def train_all(args):
    """Every seed, then the figures over all of them."""
    device = resolve_device(args.device)
    s, images, test = settle(args)
    few = test.prepared(test.size, s.eval_images)
    watched = test.prepared(test.size, s.curve_images) if s.curve_images else None
    folder = RunFolder(s.save)
    found = [one_seed(s, seed, images, test, few, watched, device)
             for seed in range(s.seed, s.seed + s.seeds)]
    save_results(folder, {
        "variation": s.name, "kind": images.kind, "epochs": s.epochs, "alpha_fgs": s.alpha_fgs,
        "alpha_fgv": s.alpha_fgv, "label": s.label, "num_images": len(images),
        "optimizer": f"{s.optimizer}, lr {s.lr:g}", "batch_size": s.batch_size,
        "test_images": len(test), "attacked": len(few), "curve_images": s.curve_images,
        "images_sha256": images.sha256(),
        "strongest_quick": attacks.quick_title(models.num_classes(images.kind), s.queries),
        **provenance(device)}, found)


def main(args):
    if args.summary:
        summarise(args.summary, args.save or args.summary[0].parent)
    else:
        train_all(args)


if __name__ == "__main__":
    run_script(get_args, main)
