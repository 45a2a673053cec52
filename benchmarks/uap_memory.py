"""Memory that training data needs besides the model: 10,000 photographs of 224 pixels, one epoch.

    PYTHONPATH=src python benchmarks/uap_memory.py

Reads --num_images files (links to one generated JPEG, so no data set is needed) with the code of
train_sga.py. The gradient is a stand-in that needs no memory, so that only the data counts. Linux:
resident memory of this process and pages shared with its decoders, minus that before reading.
"""

import os
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import train_sga
from bench import flags_of
from utils import sga_run
from utils.cli import Parser, at_least, run_script
from utils.data import default_workers, load, wnids
from utils.run import make_generator
from utils.sga_team import jobs_of
from utils.team import Team


def get_args():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=at_least(1), default=10_000, help="photographs")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"),
                        default="channels_last", help="memory layout of the batches")
    return parser.parse_args()


def resident(peak):
    """MB of resident memory of this process, now or at its peak."""
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
        job, = jobs_of(sga_run.plans(flags_of(
            train_sga, "--data_dir", Path(folder) / "train", "--weights", "random", "--augment",
            "--iter", 1)), Team())
        images = load(job.images, workers=default_workers())
    training = train_sga.SgaTraining(job.s, [], images, make_generator(0), torch.device("cpu"))
    training.labels = torch.zeros((1, len(images)), dtype=torch.long)
    training.delta = training.v = torch.zeros(1, 3, 224, 224)
    training.layout, training.gradient = args.layout, no_gradient
    with tqdm(desc="epoch", disable=None) as bar:
        training.one_pass(bar)
    print(f"{len(images)} images of 224 pixels: {images.pixels.nbytes / 1e6:.0f} MB of pixels, "
          f"{resident(peak=True) - before:.0f} MB in all at the peak")


if __name__ == "__main__":
    run_script(get_args, main)
