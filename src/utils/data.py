"""Images by path or by name: uint8 on disk and in memory, labels that are true ImageNet indices.

    images = open_images("/data/imagenet/val", split="test")     # names and labels
    images = images.prepared(224, 1000)                          # side, how many
    for index, x in batches(images, 100, workers=4, skipped=[]): ...  # x (n, C, H, W) uint8
    images = load(images, workers=4)                             # all in memory
    images = cached(images, folder, workers=4)                   # before either: decode once

Geometry of photographs: shorter side to 256 pixels (bilinear, PIL, antialiased), then the central
224 x 224 crop, as in the papers' tables and in proportion at other sizes. Up to 64 pixels: shorter
side to the size of the crop, because networks see such images whole.

The other image modules are behind this one:
    images.py   what a list of images is        folders.py, lists.py   class folders, flat, lists
    reading.py  decoding                        labels.py, imagenet.py ground truth of ImageNet
    named.py    data sets by name               parquet.py             Hugging Face's shards
    cache.py    decoded images on disk
"""

from utils.cache import cached
from utils.errors import UserError
from utils.folders import open_path
from utils.imagenet import imagenet_classes, wnids
from utils.images import (
    NO_LABELS,
    PRESETS,
    SMALL,
    Geometry,
    Images,
    Preset,
    hold_out,
    paper_geometry,
    spread,
)
from utils.named import CIFAR10, DIGITS, NAMED, imagenette_folder, open_arrays
from utils.reading import (
    alive,
    batches,
    decode,
    default_workers,
    load,
    read_image,
    read_rgb,
    stack,
    to_float,
)

__all__ = [  # what the rest of the code uses, from any of these modules
    "CIFAR10", "DIGITS", "NAMED", "NO_LABELS", "PRESETS", "SMALL", "Geometry", "Images", "Preset",
    "alive", "batches", "cached", "decode", "default_workers", "hold_out", "imagenet_classes",
    "load", "need_labels", "open_both", "open_images", "opened", "paper_geometry", "read_image",
    "read_rgb", "spread", "stack", "to_float", "unseen", "wnids"]


def open_images(data_dir, *, split, data_root="data", labels=None, classes=None):
    """The images of a path or of a named data set; reads names and labels, no image files.

    data_dir: one of NAMED, or a folder: of class folders; of images, with or without labels
    (utils/labels.py); of train/ and val/ with either; of parquet shards; one that holds
    torchvision's MNIST or CIFAR; or an image list (utils/lists.py) or the folder of one.
    split: 'train' or 'test'; without test images both are the training images, see `unseen`.
    labels: --labels, a file of the flat folder's classes. classes: 'imagenet' if class
    folders or lists name ImageNet's classes by index or name. UserError: no such data, no images
    in it, labels that do not fit, a failed download.
    """
    if data_dir in NAMED:
        if labels or classes:
            flag = f"--labels {labels}" if labels else f"--classes {classes}"
            raise UserError(f"{flag}: {data_dir} has its own labels; leave it out, or type "
                            "--data_dir with a folder of images")
        if data_dir != "imagenette":
            return open_arrays(data_dir, split, data_root)
        data_dir = imagenette_folder(split, data_root)
    return open_path(data_dir, split, labels, classes)


def opened(args, split):
    """open_images with the command line's flags."""
    return open_images(args.data_dir, split=split, data_root=args.data_root or "data",
                       labels=args.labels, classes=args.classes)


def need_labels(images, data_dir):
    """UserError if the images have no labels."""
    if not images.has_labels:
        raise UserError(f"--data_dir {data_dir}: images without labels, which this needs; type "
                        "--labels FILE, put val.txt beside them, or sort them into class folders "
                        "(eval_net.py --predict needs none)")


def open_both(data_dir, data_root):
    """-> training images, test images. UserError if these are the same."""
    train, test = (open_images(data_dir, split=split, data_root=data_root)
                   for split in ("train", "test"))
    if (test.root, test.names) == (train.root, train.names):
        raise UserError(f"--data_dir {data_dir}: there are no test images; wanted a folder with "
                        "train/ and val/ or test/")
    return train, test


def unseen(data_dir, data_root, share, num, labels=None, classes=None):
    """The test images; without a test split, those that hold_out(share) kept out of training.

    share, num: --hold_out and --num_images of the training. -> images, whether they are held out.
    """
    where = {"data_root": data_root, "labels": labels, "classes": classes}
    test = open_images(data_dir, split="test", **where)
    try:
        train = open_images(data_dir, split="train", **where)
    except UserError:  # --labels of the test images do not fit those for training
        if not labels:
            raise
        return test, False
    if (test.root, test.names) != (train.root, train.names):
        return test, False
    train = train.prepared(train.geometry, num)
    return train.select(hold_out(train.labels, share).nonzero()[:, 0].tolist()), True
