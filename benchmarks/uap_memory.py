"""Memory that training data costs besides the model: 10,000 photographs of 224 pixels, one epoch.

    PYTHONPATH=src python benchmarks/uap_memory.py

Reads --num_images files (links to one generated JPEG, so it needs no data set) through the code
that train_sga.py runs; the gradient is a stand-in that costs nothing, so what is left is the data.
Linux: resident memory of this process and its decoders' shared pages, above that before reading.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import train_sga
from utils.data import default_workers, load, open_images, wnids
from utils.run import Parser, at_least, make_generator, run_script


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=at_least(1), default=10_000, help="photographs")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"),
                        default="channels_last", help="memory order of the batches")
    return parser.parse_args()


def resident(peak):
    """MB of memory this process holds, or held at most."""
    key = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


def no_gradient(x, delta, y):
    return torch.zeros(()), torch.zeros_like(delta)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        Image.effect_noise((500, 375), 80).convert("RGB").save(photo)
        names = list(wnids())
        for i in range(args.num_images):
            parent = Path(folder) / "train" / names[i % len(names)]
            parent.mkdir(parents=True, exist_ok=True)
            os.link(photo, parent / f"{i:05d}.jpg")
        before = resident(peak=False)
        images = open_images(str(Path(folder) / "train"), split="train").prepared(224, None)
        images = load(images, workers=default_workers())
    flags = argparse.Namespace(method="sga", batch_size=250, minibatch=10, iter=1, augment=True,
                               momentum=0.9, eps=10 / 255, alpha=1 / 255)
    state = {"delta": torch.zeros(1, 3, 224, 224), "v": torch.zeros(1, 3, 224, 224),
             "labels": torch.zeros((1, len(images)), dtype=torch.long), "layout": args.layout}
    with tqdm(desc="epoch", disable=None) as bar:
        train_sga.run_epoch(flags, no_gradient, state, images.pixels, make_generator(0),
                            torch.device("cpu"), bar)
    print(f"{len(images)} images of 224 pixels: {images.pixels.nbytes / 1e6:.0f} MB of pixels, "
          f"{resident(peak=True) - before:.0f} MB in all at the peak")


if __name__ == "__main__":
    run_script(get_args, main)
