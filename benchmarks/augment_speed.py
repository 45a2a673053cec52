"""Cost of the augmentations, compared with torchvision's on PIL images and with a training step.

    PYTHONPATH=src python benchmarks/augment_speed.py
    PYTHONPATH=src python benchmarks/augment_speed.py --model_name convnext_tiny --batch_size 64
    PYTHONPATH=src python benchmarks/augment_speed.py --batch_size 2 --image_size 32 --turns 1

Ours take and return a batch of uint8 images; torchvision's take and return one PIL image at a time.
Both draw their parameters for every image, from about the same ranges. The operations are timed in
turns; the median counts.
"""

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from utils.augment import OPS, PRESETS, augment
from utils.cli import Parser, at_least, run_script
from utils.data import to_float
from utils.draw import scene
from utils.models import trainable
from utils.precision import synchronize
from utils.report import markdown
from utils.run import make_generator, resolve_device, save_json


def get_args():
    parser = Parser("Time our augmentations, torchvision's, and a training step.")
    add = parser.add_argument
    add("--model_name", default="convnext_tiny", help="network whose training step is timed")
    add("--batch_size", type=at_least(2), default=32, help="images at a time")
    add("--image_size", type=at_least(32), default=224, help="side in pixels")
    add("--turns", type=at_least(1), default=5, help="timings of each operation; the median counts")
    add("--bf16", action="store_true", help="train in bf16")
    add("--threads", type=at_least(1), help="CPU threads; None: as torch chooses")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--out", type=Path, default=Path("runs/augment_speed.json"), help="file of the results")
    return parser.parse_args()


def uniform(low, high):
    return low + (high - low) * torch.rand(()).item()


def theirs(size):
    """{our name: torchvision's on one PIL image}"""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    elastic = v2.ElasticTransform(alpha=50.0, sigma=5.0)

    def cut(image):
        side = int(size * uniform(0.5, 0.95))
        top, left = (int(uniform(0, size - side)) for _ in range(2))
        return TF.resized_crop(image, top, left, side, side, [size, size])

    def padding(image):
        side = int(size * uniform(0.65, 0.95))
        top, left = (int(uniform(0, size - side)) for _ in range(2))
        return TF.pad(TF.resize(image, [side, side], InterpolationMode.BICUBIC),
                      [left, top, size - side - left, size - side - top], fill=128)

    def rotation(image):
        return TF.rotate(image, uniform(-5, 5), InterpolationMode.NEAREST)
    return {
        "horizontal_flip": TF.horizontal_flip, "vertical_flip": TF.vertical_flip,
        "rotation": rotation, "random_cut": cut, "random_padding": padding,
        "brightness": lambda image: TF.adjust_brightness(image, uniform(1.1, 1.5)),
        "contrast": lambda image: TF.adjust_contrast(image, uniform(0.05, 0.4)),
        "saturation": lambda image: TF.adjust_saturation(image, uniform(0, 20)),
        "colour_jitter": jitter, "elastic": elastic,
        "gaussian_blur": lambda image: TF.gaussian_blur(image, 11, uniform(1, 2)),
        "jpeg": lambda image: TF.jpeg(image, int(uniform(7, 25)))}


def seconds(work, device):
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def medians(works, turns, device):
    """{name: median seconds of work()}, timed in turns; the first turn does not count."""
    taken = {name: [] for name in works}
    for turn in tqdm(range(turns + 1), leave=False, disable=None):
        for name, work in works.items():
            one = seconds(work, device)
            if turn:
                taken[name].append(one)
    return {name: statistics.median(values) for name, values in taken.items()}


def per_operation(args, device):
    """Rows of milliseconds per image: ours, torchvision's, their ratio."""
    pixels = scene(args.image_size)[None].repeat(args.batch_size, 1, 1, 1)
    pictures, other = [TF.to_pil_image(one) for one in pixels], theirs(args.image_size)
    on_device, generator = pixels.to(device), make_generator(0)
    works = {name: lambda op=op: op(on_device, generator=generator) for name, op in OPS.items()}
    works |= {f"PIL {name}": lambda op=op: [op(one) for one in pictures]
              for name, op in other.items()}
    works["released pipeline"] = lambda: augment(on_device, PRESETS["released"],
                                                 generator=generator)
    found = medians(works, args.turns, device)
    rows = []
    for name in [*OPS, "released pipeline"]:
        ours, pil = found[name], found.get(f"PIL {name}")
        rows.append({"operation": name, "ours_ms": 1000 * ours / args.batch_size,
                     "pil_ms": 1000 * pil / args.batch_size if pil else "",
                     "ratio": pil / ours if pil else ""})
    return rows


def per_step(args, device):
    """{name: seconds} of a training step, and of one with the released augmentations before it."""
    model = trainable(args.model_name, kind="imagenet", head="own", classes=100).to(
        device, memory_format=torch.channels_last)
    optimizer, generator = torch.optim.Adamax(model.parameters(), 1e-4), make_generator(0)
    x = scene(args.image_size)[None].repeat(args.batch_size, 1, 1, 1).to(device)
    y = torch.arange(args.batch_size, device=device) % 100

    def step(images):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(to_float(images))
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    return medians({"step": lambda: step(x), "with augmentation": lambda: step(
        augment(x, PRESETS["released"], generator=generator))}, args.turns, device)


def main(args):
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = per_operation(args, device)
    text = markdown(["operation", "ours, ms per image", "torchvision on PIL", "times as fast"], [
        [row["operation"].replace("_", " "), f"{row['ours_ms']:.3f}",
         *(f"{row[k]:.3f}" if row[k] != "" else "-" for k in ("pil_ms", "ratio"))] for row in rows])
    found = per_step(args, device)
    speeds = {name: args.batch_size / value for name, value in found.items()}
    more = 100 * (found["with augmentation"] / found["step"] - 1)
    text += (f"\n{args.model_name}, one loss, {'bf16' if args.bf16 else 'float32'}: "
             f"{speeds['step']:.1f} images/s, {speeds['with augmentation']:.1f} with the released "
             f"augmentations, which take {more:.1f} % of a step\n\nbatch {args.batch_size}, "
             f"{args.image_size} pixels, median of {args.turns}, {device.type}, "
             f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_json(args.out, {"operations": rows, "step_s": found, "batch_size": args.batch_size,
                         "threads": torch.get_num_threads(), "torch": torch.__version__})
    print(text, end="")


if __name__ == "__main__":
    run_script(get_args, main)
