"""Image lists: names, labels, how the images are read, and which of them are used."""

import hashlib
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from utils.errors import UserError
from utils.imagenet import imagenet_classes
from utils.reading import decode


@dataclass(frozen=True)
class Preset:
    """Defaults of a data set; every field is a flag of the scripts. eps, alpha in [0, 1]."""
    eps: float
    alpha: float
    surrogate: str
    targets: tuple
    size: int
    num_images: int


SMALL = ("cnn", "cnn_bn", "mlp", "vgg_small", "resnet_small")  # utils/nets.py trains them
IMAGENET = Preset(10 / 255, 1 / 255, "vgg16",  # Liu et al. 2023, Table 1
                  ("alexnet", "googlenet", "vgg16", "vgg19", "resnet152"), 224, 10_000)
CIFAR = Preset(10 / 255, 1 / 255, "resnet_small", SMALL, 32, 10_000)
PRESETS = {
    "imagenet": IMAGENET,
    "folder": IMAGENET,  # photographs with their own classes, or with none
    "cifar10": CIFAR,
    "cifar100": CIFAR,   # networks for it are trained by free_at.py, or given by --weights
    "mnist": Preset(0.2, 0.02, "cnn", SMALL, 28, 10_000),
    "digits": Preset(0.2, 0.02, "cnn", SMALL, 28, 10_000),
}
NO_LABELS = "no labels: fooling ratios are measured, accuracies are not"


@dataclass(frozen=True)
class Geometry:
    """How a photograph becomes pixels: shorter side to `resize`, then the central crop."""
    size: int                       # H = W of the crop
    resize: int
    interpolation: str = "bilinear"  # or "bicubic"

    def __str__(self):
        if self == paper_geometry(self.size) and self.size == self.resize:
            return f"{self.size} pixels"
        return f"shorter side to {self.resize} ({self.interpolation}), centre crop {self.size}"


def paper_geometry(size=224):
    """Geometry of the papers' tables: shorter side to 256/224 of `size`."""
    return Geometry(size, round(size * 256 / 224) if size > 64 else size)


@dataclass(frozen=True, eq=False)
class Images(torch.utils.data.Dataset):
    """A list of images; item i is (C, H, W) uint8, or None if it cannot be decoded."""
    kind: str                       # a key of PRESETS
    names: tuple                    # relative file names, "shard.parquet/17", or "train/17"
    labels: torch.Tensor            # (N,) int64; -1: not known
    classes: tuple                  # class names, by index
    geometry: Geometry              # how files are read
    root: Path = None               # of the files, or
    pixels: torch.Tensor = None     # (N, C, H, W) uint8, all in memory, or mapped from a file
    skipped: tuple = ()             # names that could not be decoded
    stored: object = None           # cache.Stored: where they are on disk, decoded in this geometry

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if self.pixels is not None:
            return self.pixels[i]
        if self.stored is not None:
            return self.stored[i]
        return decode(self.root / self.names[i], self.geometry)

    @property
    def size(self):
        return self.geometry.size

    @property
    def channels(self):
        return 3 if self.pixels is None else self.pixels.shape[1]

    @property
    def has_labels(self):
        """Whether every image has a label."""
        return bool((self.labels >= 0).all())

    @property
    def labelled(self):
        """Whether the labels are classes of the networks for this `kind`."""
        return self.kind != "folder" and self.has_labels

    @property
    def known_classes(self):
        """Names of the classes that the networks of this kind of data know."""
        return imagenet_classes() if self.kind == "folder" else self.classes

    def listing(self, *geometries):
        """The image list as saved with a run: how the images are read, then a name on each line.

        geometries: those of the networks, if they are not the list's own.
        """
        read = " / ".join(sorted({str(one) for one in geometries or (self.geometry,)}))
        return f"# {read}\n" + "".join(f"{name}\n" for name in self.names)

    def sha256(self, *geometries):
        """SHA-256 of the listing."""
        return hashlib.sha256(self.listing(*geometries).encode()).hexdigest()

    def prepared(self, geometry, num):
        """At most `num` images, spread evenly over the classes, to be read in this Geometry.

        An int means the papers' geometry at that many pixels. Without labels, the images are
        spread evenly over the sorted list.
        """
        if isinstance(geometry, int):
            geometry = paper_geometry(geometry)
        if self.pixels is not None and geometry.size != self.size:
            raise UserError(f"--image_size {geometry.size}: {self.kind} images are {self.size} "
                            "pixels")
        images = self
        if num is not None and num < len(self):
            images = self.select(spread(self.labels.tolist(), num) if self.has_labels
                                 else [j * len(self) // num for j in range(num)])
        return replace(images, geometry=geometry, stored=None)

    def taken_for(self, kind):
        """Images without labels, as of the `kind` that a network was trained on."""
        if self.has_labels or kind in (None, self.kind):
            return self
        return replace(self, kind=kind, geometry=paper_geometry(PRESETS[kind].size), stored=None)

    def pixels_on(self, device):
        """The pixels, on a CUDA device if they take less than half of its free memory."""
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
        return self.pixels.to(device) if self.pixels.nbytes < free / 2 else self.pixels

    def without(self, names):
        """The images whose names are not in `names`."""
        names = set(names)
        return self.select([i for i, name in enumerate(self.names) if name not in names]) \
            if names else self

    def select(self, index):
        return replace(self, names=tuple(self.names[i] for i in index), labels=self.labels[index],
                       pixels=None if self.pixels is None else self.pixels[index],
                       stored=None if self.stored is None else self.stored.select(index))


def listed(kind, names, labels, classes, root):
    """Images in files, to be read in the papers' geometry. labels: a list of indices, or None."""
    labels = [-1] * len(names) if labels is None else labels
    return Images(kind, tuple(names), torch.tensor(labels, dtype=torch.long), tuple(classes),
                  paper_geometry(PRESETS[kind].size), root=root)


# ------------------------------------------------------------------ which are used

def spread(labels, num):
    """Indices of `num` items spread evenly over the classes, the first ones of each class.

    10,000 of ImageNet are the first ten of every class; 500 are the first of every second class.
    """
    rounds, seen = [], {}
    for i, label in enumerate(labels):
        rank = seen[label] = seen.get(label, -1) + 1
        if rank == len(rounds):
            rounds.append([])
        rounds[rank].append(i)
    chosen = []
    for members in rounds:
        members = sorted(members, key=labels.__getitem__)  # the order of the files has no effect
        left = min(num - len(chosen), len(members))
        chosen += [members[j * len(members) // left] for j in range(left)]
    return sorted(chosen)


def hold_out(labels, share):
    """Mask (N,), True for the `share` of the labels (N,) held out, evenly over the classes.

    Of n images of a class, share * n are held out, rounded up or down.
    """
    p, q = Fraction(share).limit_denominator(10 ** 6).as_integer_ratio()
    before = (torch.arange(len(labels) + 1) * p + (q - 1) // 2) // q  # held out among the first i
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.argsort(labels, stable=True)[before.diff() > 0]] = True
    return held
