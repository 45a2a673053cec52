"""Data sets by name: scikit-learn's digits, and those that torchvision downloads and reads."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

from utils.errors import UserError
from utils.images import Images, paper_geometry
from utils.run import alone

NAMED = ("digits", "mnist", "cifar10", "cifar100", "imagenette")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")
DIGITS = tuple("0123456789")
IMAGENETTE = {"train": 9469, "val": 3925}  # images
IN_FOLDERS = {"MNIST/raw": "mnist", "cifar-10-batches-py": "cifar10",
              "cifar-100-python": "cifar100"}  # as torchvision stores them


def kept_in(root):
    """The name of the data set that torchvision stored in a folder, or None."""
    return next((name for sub, name in IN_FOLDERS.items() if (root / sub).is_dir()), None)


def open_arrays(name, split, root):
    """Digits, MNIST or CIFAR, all pixels in memory."""
    train = split == "train"
    if name == "digits":
        return _digits(split)
    if name == "mnist":
        data = _torchvision(torchvision.datasets.MNIST, root, train=train)
        x, y = data.data, data.targets
        if not torch.is_tensor(x) or not torch.is_tensor(y) or not len(y):  # of a processed/*.pt
            raise UserError(f"MNIST in '{root}' is damaged: no tensors of images and labels; "
                            "remove it, or type --data_root FOLDER of a whole one")
        if x.shape != (len(y), 28, 28) or not 0 <= y.max() < 10:
            raise UserError(f"MNIST in '{root}': {tuple(x.shape)} images, {len(y)} labels up to "
                            f"{y.max()}; wanted digits of 28 pixels, a label for each")
        return _arrays("mnist", x.unsqueeze(1), y, DIGITS, split)
    dataset = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[name]
    data = _torchvision(getattr(torchvision.datasets, dataset), root, train=train)
    x = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    classes = CIFAR10 if name == "cifar10" else data.classes
    return _arrays(name, x, torch.tensor(data.targets), classes, split)


def imagenette_folder(split, root):
    """Downloads Imagenette if it is not there. -> its folder"""
    split = "train" if split == "train" else "val"
    _torchvision(torchvision.datasets.Imagenette, root, "imagenette2-320", IMAGENETTE[split],
                 size="320px", split=split)
    return Path(root) / "imagenette2-320"


def _torchvision(dataset, root, folder="", images=None, **kwargs):
    """A torchvision data set, downloaded into `root` if it is not there, by one process at a time.

    folder: its place in `root`; images: how many it has, for sets that open even if incomplete.
    """
    half = None
    try:
        if (data := _kept(dataset, root, folder, images, **kwargs)) is not None:
            return data
    except UserError as error:
        if not images:
            raise
        half = error  # perhaps another process is unpacking it
    try:
        with alone(Path(root) / dataset.__name__):
            data = _kept(dataset, root, folder, images, **kwargs)
            return dataset(root, download=True, **kwargs) if data is None else data
    except (OSError, RuntimeError) as error:
        raise half or UserError(
            f"{dataset.__name__} is not in '{root}' and its download failed ({error}); type "
            "--data_root FOLDER that holds it, or --data_dir digits") from None


def _kept(dataset, root, folder, images, **kwargs):
    """The data set in `root`; None if it is not there. UserError: it is damaged."""
    try:
        data = dataset(root, download=False, **kwargs)
        if images and len(data) != images:
            raise ValueError(f"{len(data)} of {images} images")
    except Exception as error:  # torchvision's readers raise almost anything on a damaged file
        if "not found" in str(error):
            return None
        raise UserError(f"{dataset.__name__} in '{Path(root, folder)}' is damaged "
                        f"({type(error).__name__} {error}); remove it, or type --data_root FOLDER "
                        "of a whole one") from None
    return data


@cache
def _digits(split):
    """scikit-learn's 1797 digits, 8 x 8 grey, upscaled to 28; a fifth of each is for testing."""
    from sklearn.datasets import load_digits  # slow to import, needed for this data set alone

    data = load_digits()
    x = torch.from_numpy(data.images / 16).float().unsqueeze(1)
    x = F.interpolate(x, size=28, mode="bilinear", align_corners=False)
    x = (x * 255).round().to(torch.uint8)
    y = torch.from_numpy(data.target)
    held_out = torch.zeros(len(x), dtype=torch.bool)
    for digit in range(10):
        held_out[(y == digit).nonzero().squeeze(1)[4::5]] = True
    chosen = ~held_out if split == "train" else held_out
    return _arrays("digits", x[chosen], y[chosen], DIGITS, split)


def _arrays(kind, x, y, classes, split):
    return Images(kind, tuple(f"{split}/{i}" for i in range(len(x))), y.long(), tuple(classes),
                  paper_geometry(x.shape[-1]), pixels=x)


