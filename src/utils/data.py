"""Images by path or by name: uint8 on disk and in memory, labels that are true ImageNet indices.

    images = open_images("/data/imagenet/val", split="test")     # names and labels
    images = images.prepared(224, 1000)                          # pixels, how many
    for index, x in batches(images, 100, workers=4, skipped=[]): ...  # x (n, C, H, W) uint8
    images = load(images, workers=4)                             # all in memory

Geometry of photographs: shorter side to 256 pixels (bilinear, PIL, antialiased), then the central
224 x 224 crop, as in the papers' tables and in proportion at other sizes. Up to 64 pixels: shorter
side to the size of the crop, because networks see such images whole.
"""

import difflib
import hashlib
import os
import sys
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as TF
from tqdm import tqdm

from utils.errors import UserError
from utils.lists import find_list, read_list

NAMED = ("digits", "mnist", "cifar10", "imagenette")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")
DIGITS = tuple("0123456789")
THINNEST = 100  # longer side of a photograph, over the shorter one
SPLITS = {"train": ("train",), "test": ("val", "test")}


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
PRESETS = {
    "imagenet": IMAGENET,
    "folder": IMAGENET,  # class folders with names of their own
    "cifar10": Preset(10 / 255, 1 / 255, "resnet_small", SMALL, 32, 10_000),
    "mnist": Preset(0.2, 0.02, "cnn", SMALL, 28, 10_000),
    "digits": Preset(0.2, 0.02, "cnn", SMALL, 28, 10_000),
}


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
    """That of the papers' tables: shorter side to 256/224 of `size`."""
    return Geometry(size, round(size * 256 / 224) if size > 64 else size)


@dataclass(frozen=True, eq=False)
class Images(torch.utils.data.Dataset):
    """A list of labelled images; item i is (C, H, W) uint8, or None if it cannot be decoded."""
    kind: str                       # a key of PRESETS
    names: tuple                    # relative file names, or "train/17"
    labels: torch.Tensor            # (N,) int64
    classes: tuple                  # class names, by index
    geometry: Geometry              # in which files are read
    root: Path = None               # of the files, or
    pixels: torch.Tensor = None     # (N, C, H, W) uint8, all in memory
    skipped: tuple = ()             # names that could not be decoded

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if self.pixels is not None:
            return self.pixels[i]
        return decode(self.root / self.names[i], self.geometry)

    @property
    def size(self):
        return self.geometry.size

    @property
    def channels(self):
        return 3 if self.pixels is None else self.pixels.shape[1]

    @property
    def labelled(self):
        """Whether the labels are classes of the networks that `kind` goes with."""
        return self.kind != "folder"

    @property
    def known_classes(self):
        """Names of the classes that the networks of this kind of data know."""
        return self.classes if self.labelled else imagenet_classes()

    def listing(self):
        """The image list as saved with a run, one relative name a line."""
        return "".join(f"{name}\n" for name in self.names)

    def sha256(self):
        return hashlib.sha256(self.listing().encode()).hexdigest()

    def prepared(self, geometry, num):
        """At most `num` of them, spread evenly over the classes, to be read in this Geometry.

        A number of pixels means the papers' geometry at that size.
        """
        if isinstance(geometry, int):
            geometry = paper_geometry(geometry)
        if self.pixels is not None and geometry.size != self.size:
            raise UserError(f"--image_size {geometry.size}: {self.kind} images are {self.size} "
                            "pixels")
        images = self if num is None or num >= len(self) else self.select(
            spread(self.labels.tolist(), num))
        return replace(images, geometry=geometry)

    def pixels_on(self, device):
        """The pixels, on a CUDA device if they take at most half of its free memory."""
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        return self.pixels.to(device) if self.pixels.nbytes < free / 2 else self.pixels

    def without(self, names):
        """Those with other names."""
        names = set(names)
        return self.select([i for i, name in enumerate(self.names) if name not in names]) \
            if names else self

    def select(self, index):
        return replace(self, names=tuple(self.names[i] for i in index), labels=self.labels[index],
                       pixels=None if self.pixels is None else self.pixels[index])


# -------------------------------------------------------------------- opening

def open_images(data_dir, *, split, data_root="data"):
    """The images of a path or of a named data set; reads names and labels, no pixels of files.

    data_dir: 'digits', 'mnist', 'cifar10', 'imagenette', or a folder: of class folders, of
    train/ and val/ with class folders, or one that holds torchvision's MNIST or CIFAR-10, or an
    image list (utils/lists.py) or the folder of one.
    split: 'train' or 'test'; without test images the training images are those of both, see
    `unseen`. UserError: no such data, no images in it, a failed download.
    """
    if data_dir in NAMED:
        return _open_named(data_dir, split, data_root)
    return _open_path(data_dir, split)


def _open_named(name, split, data_root):
    train = split == "train"
    if name == "digits":
        return _digits(split)
    if name == "mnist":
        data = _torchvision(torchvision.datasets.MNIST, data_root, train=train)
        if data.data.shape != (len(data.targets), 28, 28) or not 0 <= data.targets.max() < 10:
            raise UserError(f"MNIST in '{data_root}': {tuple(data.data.shape)} images, "
                            f"{len(data.targets)} labels up to {data.targets.max()}; wanted "
                            "digits of 28 pixels, a label for each")
        return _arrays("mnist", data.data.unsqueeze(1), data.targets, DIGITS, split)
    if name == "cifar10":
        data = _torchvision(torchvision.datasets.CIFAR10, data_root, train=train)
        x = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return _arrays("cifar10", x, torch.tensor(data.targets), CIFAR10, split)
    _torchvision(torchvision.datasets.Imagenette, data_root, size="320px",
                 split="train" if train else "val")
    return _open_path(Path(data_root) / "imagenette2-320", split)


def _torchvision(dataset, root, **kwargs):
    """A torchvision data set, downloaded into `root` if it is not there."""
    try:
        return dataset(root, download=False, **kwargs)
    except Exception as error:  # torchvision's readers raise nearly anything on a damaged file
        if "not found" not in str(error):
            raise UserError(f"{dataset.__name__} in '{root}' is damaged ({type(error).__name__} "
                            f"{error}); remove it, or type --data_root FOLDER of a whole one"
                            ) from None
    try:
        return dataset(root, download=True, **kwargs)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{dataset.__name__} is not in '{root}' and its download failed ({error});"
                        " type --data_root FOLDER that holds it, or --data_dir digits") from None


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


def _open_path(data_dir, split):
    root = Path(data_dir)
    sorted_already = any(entry.is_dir() for sub in SPLITS[split] for entry in root.glob(f"{sub}/*"))
    listed = find_list(root, split) if root.exists() and not sorted_already else None
    if listed:
        root, names, labels, classes = read_list(listed)
        return Images("folder", names, torch.tensor(labels), classes,
                      paper_geometry(PRESETS["folder"].size), root=root)
    if not root.is_dir():
        near = difflib.get_close_matches(str(data_dir), NAMED, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--data_dir {data_dir}: no such folder or data set; {hint}type a folder "
                        f"of class folders, or one of {', '.join(NAMED)}")
    if (root / "MNIST" / "raw").is_dir():
        return _open_named("mnist", split, root)
    if (root / "cifar-10-batches-py").is_dir():
        return _open_named("cifar10", split, root)
    root = _folder_of(root, split)
    folders = sorted(entry.name for entry in os.scandir(root)
                     if entry.is_dir() and not entry.name.startswith("."))
    kind, classes, index = _classes(root, folders)
    names, labels = [], []
    for folder in folders:
        files = sorted(name for name in os.listdir(root / folder)
                       if name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".")
        names += [f"{folder}/{name}" for name in files]
        labels += [index[folder]] * len(files)
    if not names:
        raise UserError(f"{root}: no images there; wanted class folders that hold them, such as "
                        "n01440764/*.JPEG (a flat folder must be sorted into class folders first)")
    return Images(kind, tuple(names), torch.tensor(labels), tuple(classes),
                  paper_geometry(PRESETS[kind].size), root=root)


def _folder_of(root, split):
    """Where the split's class folders are. Of .../train the test images are beside it."""
    found = next((root / sub for sub in SPLITS[split] if (root / sub).is_dir()), None)
    if split == "test" and found is None:
        if root.absolute().name == "train":
            found = next((folder for sub in SPLITS[split]
                          if (folder := root.parent / sub).is_dir()), None)
        elif any(entry.is_dir() for entry in root.glob("train/*")):  # and no class of that name
            found = root / "train"
    return found or root


def _classes(root, folders):
    """Kind of data, class names and {folder: class index}, from the names of the folders."""
    known = wnids()
    if set(folders) & known.keys():
        stray = sorted(set(folders) - known.keys())
        if stray:
            raise UserError(f"{root}: '{stray[0]}' is among ImageNet class folders but is not one "
                            "of the 1000 classes; move it elsewhere")
        return "imagenet", imagenet_classes(), known
    if set(folders) == set(CIFAR10):
        return "cifar10", CIFAR10, {name: i for i, name in enumerate(CIFAR10)}
    return "folder", folders, {name: i for i, name in enumerate(folders)}


@cache
def wnids():
    """{wnid: class index} of the 1000 ImageNet classes: their WordNet ids, sorted."""
    lines = (Path(__file__).parent / "imagenet_wnids.txt").read_text().split()
    return {wnid: i for i, wnid in enumerate(lines)}


def imagenet_classes():
    return torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]


def hold_out(labels, share):
    """Mask (N,) of a share of the labels (N,), taken evenly over the classes: True is held out.

    Of n images of a class share * n are held out, rounded up or down.
    """
    p, q = Fraction(share).limit_denominator(10 ** 6).as_integer_ratio()
    before = (torch.arange(len(labels) + 1) * p + (q - 1) // 2) // q  # held out of the first ones
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.argsort(labels, stable=True)[before.diff() > 0]] = True
    return held


def open_both(data_dir, data_root):
    """-> training images, test images. UserError if these are the same."""
    train, test = (open_images(data_dir, split=split, data_root=data_root)
                   for split in ("train", "test"))
    if (test.root, test.names) == (train.root, train.names):
        raise UserError(f"--data_dir {data_dir}: there are no test images; wanted a folder with "
                        "train/ and val/ or test/")
    return train, test


def unseen(data_dir, data_root, share, num):
    """The test images; without a test split, those that hold_out(share) kept out of training.

    share, num: --hold_out and --num_images of the training. -> images, whether they are held out.
    """
    test, train = (open_images(data_dir, split=split, data_root=data_root)
                   for split in ("test", "train"))
    if (test.root, test.names) != (train.root, train.names):
        return test, False
    train = train.prepared(train.geometry, num)
    return train.select(hold_out(train.labels, share).nonzero()[:, 0].tolist()), True


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
        left = min(num - len(chosen), len(members))
        chosen += [members[j * len(members) // left] for j in range(left)]
    return sorted(chosen)


# -------------------------------------------------------------------- reading

def read_image(path, *modes):
    """An image file as a PIL image, in RGB or in one of these modes. UserError if it cannot be."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large pictures and of damaged EXIF data
            with Image.open(path) as file:
                image = file.convert(file.mode if file.mode in modes else "RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise UserError(f"{path}: truncated, or no image ({error})") from None
    if max(image.size) > THINNEST * min(image.size):  # resized, it could fill the memory
        raise UserError(f"{path}: {image.width} x {image.height} pixels; wanted a picture, not a "
                        "line")
    return image


def read_rgb(path):
    """An image file as a PIL image in RGB, or None if it cannot be decoded."""
    try:
        return read_image(path)
    except UserError:
        return None


def decode(path, geometry):
    """An image file as (3, size, size) uint8, or None if it cannot be decoded."""
    image = read_rgb(path)
    if image is None:
        return None
    image = TF.resize(image, geometry.resize, TF.InterpolationMode(geometry.interpolation))
    return TF.pil_to_tensor(TF.center_crop(image, geometry.size))


def stack(items):
    """A batch and the positions in it that could be decoded."""
    good = [k for k, x in enumerate(items) if x is not None]
    return good, torch.stack([items[k] for k in good]) if good else None


def batches(images, batch_size, *, workers, skipped):
    """Yields (index (n,), x (n, C, H, W) uint8) in order; decodes in `workers` processes.

    A file that cannot be decoded is named on stderr, appended to the list `skipped` and left out.
    UserError at the end if no file could be decoded.
    """
    loader = torch.utils.data.DataLoader(
        images, batch_size, collate_fn=stack, num_workers=0 if images.pixels is not None
        else workers, generator=torch.Generator())  # its own: the global one is not touched
    for start, (good, x) in zip(range(0, len(images), batch_size), alive(loader), strict=True):
        for k in sorted(set(range(min(batch_size, len(images) - start))) - set(good)):
            skipped.append(images.names[start + k])
            tqdm.write(f"warning: {images.root / images.names[start + k]}: cannot be decoded, "
                       "skipped", file=sys.stderr)
        if good:
            yield start + torch.tensor(good), x
    if len(skipped) == len(images):
        raise UserError(f"{images.root}: none of its {len(images)} images can be decoded")


def alive(loader):
    """The loader's batches; UserError if a worker dies (a container with a small /dev/shm)."""
    try:
        yield from loader
    except RuntimeError as error:
        raise UserError(f"the processes that decode images died ({error}); type --workers 0, or "
                        "give the container more shared memory") from None


def load(images, *, workers):
    """The same list with all pixels in memory (10,000 of 224 x 224: 1.5 GB), without broken files.
    """
    if images.pixels is not None:
        return images
    pixels = torch.empty((len(images), 3, images.size, images.size), dtype=torch.uint8)
    keep, skipped = [], []
    with tqdm(total=len(images), desc="decode", unit="img", disable=None) as bar:
        for index, x in batches(images, 32, workers=workers, skipped=skipped):
            pixels[len(keep):len(keep) + len(x)] = x  # in place: never twice in memory
            keep += index.tolist()
            bar.update(len(x))
    return replace(images.select(keep), pixels=pixels[:len(keep)], skipped=tuple(skipped))


def to_float(x):
    """uint8 -> float32 in [0, 1], exactly k/255."""
    return x.to(torch.float32).div_(255)


def default_workers():
    """One process for each processor that this one may use, at most eight."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return min(8, len(mine))
