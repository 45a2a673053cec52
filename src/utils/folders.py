"""Images of a path: class folders, flat folders, image lists, parquet shards."""

import difflib
import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError
from utils.imagenet import class_index, imagenet_classes, is_in_order, wnid_of, wnids
from utils.images import listed
from utils.labels import find_labels, given_labels, imagenet_labels, is_imagenet
from utils.lists import FOLDERS, LISTS, find_list, read_list, read_pairs
from utils.named import CIFAR10, NAMED, kept_in, open_arrays
from utils.parquet import read_shards, shards

SPLITS = {"train": ("train",), "test": ("val", "test")}


def open_path(data_dir, split, labels=None, classes=None):
    """The images of a path, as data.open_images describes it."""
    root = Path(data_dir)
    path = None if labels else _list_of(root, split)
    if path:
        return _open_list(path, classes)
    if root.is_file() and find_list(root, split):
        raise UserError(f"--labels {labels}: {root} is an image list, which holds its classes; "
                        "leave it out, or type --data_dir with the folder of the images")
    if not root.is_dir():
        near = difflib.get_close_matches(str(data_dir), NAMED, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--data_dir {data_dir}: no such folder or data set; {hint}type a folder "
                        f"of class folders, or one of {', '.join(NAMED)}")
    if kept_in(root):
        return open_arrays(kept_in(root), split, root)
    root = _folder_of(root, split)
    if found := shards(root, split):
        return _open_shards(root, found, labels, classes)
    flat = _images_in(root)
    if flat and not any(_images_in(folder) for folder in _folders_in(root)):
        return _open_flat(root, flat, labels, classes)
    if labels:
        raise UserError(f"--labels {labels}: {root} has class folders, which are the labels; "
                        "leave it out, or type --data_dir with a flat folder of images")
    return _open_class_folders(root, classes)


def _folders_in(root):
    return sorted(Path(entry.path) for entry in os.scandir(root)
                  if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder):
    return sorted(name for name in os.listdir(folder)
                  if name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".")


def _folder_of(root, split):
    """The folder of the split's images. For .../train the test images are beside it."""
    found = next((root / sub for sub in SPLITS[split] if (root / sub).is_dir()), None)
    if split == "test" and found is None:
        if root.absolute().name == "train":
            found = next((folder for sub in SPLITS[split]
                          if (folder := root.parent / sub).is_dir()), None)
        elif any(entry.is_dir() for entry in root.glob("train/*")):  # train is not a class
            found = root / "train"
    return found or root


# ---------------------------------------------------------------------- class folders

def _open_class_folders(root, classes):
    folders = [folder.name for folder in _folders_in(root)]
    kind, known, index = _classes(root, folders, classes)
    names, labels = [], []
    for folder in folders:
        files = _images_in(root / folder)
        names += [f"{folder}/{name}" for name in files]
        labels += [index[folder]] * len(files)
    if not names:
        raise UserError(f"{root}: no images there; wanted a folder of images, or class folders "
                        "that hold them, such as n01440764/*.JPEG")
    return listed(kind, names, labels, known, root)


def _classes(root, folders, classes):
    """Kind of data, class names and {folder: class index}, from the names of the folders."""
    known = wnids()
    if classes == "imagenet":
        return classes, imagenet_classes(), {name: class_index(name, f"{root / name}")
                                             for name in folders}
    if set(folders) & known.keys():
        stray = sorted(set(folders) - known.keys())
        if stray:
            raise UserError(f"{root}: '{stray[0]}' is among ImageNet class folders but is not one "
                            "of the 1000 classes; move it elsewhere")
        return "imagenet", imagenet_classes(), known
    if set(folders) == set(CIFAR10):
        return "cifar10", CIFAR10, {name: i for i, name in enumerate(CIFAR10)}
    return "folder", folders, {name: i for i, name in enumerate(folders)}


# --------------------------------------------------------------- flat folders and lists

def _open_flat(root, names, labels, classes):
    """Images in one folder, with labels from a file beside them or from --labels, or without."""
    path = given_labels(labels) if labels else find_labels(root, names)
    if path is None:
        known = classes == "imagenet" or all(name.startswith("ILSVRC2012_") for name in names)
        return listed("imagenet" if known else "folder", names, None,
                      imagenet_classes() if known else (), root)
    if classes == "imagenet" or is_imagenet(path, names):
        return listed("imagenet", names, imagenet_labels(path, names), imagenet_classes(), root)
    kind = "imagenet" if _of_imagenet(path) else "folder"  # the folder holds other images too
    _, names, indices, own = read_list(path, root, kind)
    return listed(kind, names, indices, own, root)


def _open_list(path, classes):
    if _of_imagenet(path):
        classes = "imagenet"
        for folder in (path.parent / sub for sub in FOLDERS):
            names = _images_in(folder) if folder.is_dir() else []
            if is_imagenet(path, names):  # perhaps a part of the 50,000
                return _open_flat(folder, names, path, classes)
    root, names, labels, own = read_list(path, classes=classes)
    return listed(classes or "folder", names, labels, own, root)


def _of_imagenet(path):
    """Whether a list is ImageNet's val.txt, or one whose classes are the wnids that its file names
    begin with."""
    names = [name for name, _ in read_pairs(path)] if path.suffix == ".txt" else []
    return is_imagenet(path, names) and (path.name == "val.txt" or wnid_of(names[0]) is not None)


def _list_of(root, split):
    """The image list of a path; None if the split's images are sorted into class folders, or if
    they have no list of their own and this one is for the training images."""
    if not root.exists() or any(entry.is_dir() for sub in SPLITS[split]
                                for entry in root.glob(f"{sub}/*")):
        return None
    path = find_list(root, split)
    apart = split == "test" and path is not None and path.name in LISTS["train"] and any(
        (root / sub).is_dir() and _images_in(root / sub) for sub in SPLITS["test"])
    return None if apart and root.is_dir() else path


# -------------------------------------------------------------------------- shards

def _open_shards(root, paths, labels, classes):
    if labels:
        raise UserError(f"--labels {labels}: {root} has parquet shards, which hold their labels; "
                        "leave it out")
    names, found, own = read_shards(paths)
    if not names:
        raise UserError(f"{root}: no images in its parquet files")
    kind, own, found = _classes_of_shards(paths[0].parent, own, found, classes)
    most = max(found)
    if most >= len(own):
        raise UserError(f"{paths[0].parent}: label {most}; wanted 0 to {len(own) - 1}, the "
                        f"{len(own)} classes, or -1 for no label")
    return listed(kind, names, found, own, paths[0].parent)


def _classes_of_shards(folder, own, found, classes):
    """-> kind of data, class names, labels. Shards without names hold indices of ImageNet."""
    if own is None or is_in_order(own):
        return "imagenet", imagenet_classes(), found
    if classes is None or max(found) >= len(own):  # an invalid label is refused later
        return "folder", own, found
    index = [class_index(name, f"{folder}, class {k}") for k, name in enumerate(own)]
    return "imagenet", imagenet_classes(), [index[k] if k >= 0 else k for k in found]
