"""Image lists in the challenge's formats: file names and classes in a file next to the images.

    label.txt               one image a line, FILE CLASS, such as `images/17.JPEG 3`
    train.json, val.json    {CLASS: [FILE, ...], ...} or [[FILE, CLASS], ...]
    test_label.txt          FILE CLASS; or FILE alone, for images without labels

Files are relative to the list's folder, or to images/, train/, val/, test/, train_p2/ or
track1_test1/ in it. Classes are indices, or names, which get indices in alphabetical order.
"""

import json
import os

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError
from utils.imagenet import class_index, imagenet_classes

LISTS = {"train": ("train.json", "train.txt", "label.txt"),
         "test": ("val.json", "test.json", "val.txt", "test.txt", "test_label.txt")}
MAY_LACK_LABELS = ("test.json", "test.txt", "test_label.txt")
MOST_DIGITS = 6  # of a class index: the network has an output for every class up to the last
FOLDERS = ("", "images", "train", "val", "test", "train_p2", "track1_test1")


def find_list(path, split):
    """The list at a path: the file itself, or the one for this split in the folder; None if none.

    A folder with only a training list is also tested on it.
    """
    if path.is_file():
        return path if path.suffix in (".txt", ".json") else None
    order = LISTS[split] + (LISTS["train"] if split == "test" else ())
    return next((path / name for name in order if (path / name).is_file()), None)


def read_list(path, folder=None, classes=None):
    """(folder of the files, names, class indices, class names); UserError for a bad line.

    Without labels in the list, indices are None and class names (). folder: where the files are,
    if not beside the list; classes: 'imagenet' if they are ImageNet's.
    """
    pairs = read_pairs(path)
    if not pairs:
        raise UserError(f"{path}: no images in it; wanted lines FILE CLASS, or JSON "
                        '{"CLASS": ["FILE", ...]}')
    names, labels = zip(*pairs, strict=True)
    away = next((name for name in names if _leads_away(name)), None)
    if away is not None:
        raise UserError(f"{path}: {away[:60]} leads out of the folder; wanted names relative to "
                        "the list's folder")
    root = folder or next((path.parent / sub for sub in FOLDERS
                           if (path.parent / sub / names[0]).is_file()), None)
    missing = next((name for name in names if not (root / name).is_file()), None) if root \
        else names[0]
    if missing is not None:
        raise UserError(f"{path}: no file {missing} in {root or path.parent}; wanted names "
                        "relative to the list's folder, or to images, train, val, test, train_p2 "
                        "or track1_test1 in it")
    if None in labels:
        return root, names, None, ()
    return root, names, *_indexed(path, labels, classes)


def _indexed(path, labels, classes):
    """Class indices and class names of a list's labels, given as text."""
    found = set(labels)
    if classes == "imagenet":
        index = {label: class_index(label, path) for label in found}
        return [index[label] for label in labels], imagenet_classes()
    if all(label.isdecimal() for label in found):
        longest = max(found, key=len)
        if len(longest) > MOST_DIGITS:
            raise UserError(f"{path}: class {longest[:20]}; wanted names, or indices of at most "
                            f"{MOST_DIGITS} digits")
        return [int(label) for label in labels], tuple(map(str, range(max(map(int, found)) + 1)))
    classes = tuple(sorted(found))
    index = {name: i for i, name in enumerate(classes)}
    return [index[label] for label in labels], classes


def read_pairs(path):
    """[(file name, class as text)] of a list; the class is None in a list without labels."""
    return _json(path) if path.suffix == ".json" else _lines(path)


def _lines(path):
    lines = [(number, line.strip()) for number, line in enumerate(text_of(path).splitlines(), 1)
             if line.strip()]
    if path.name in MAY_LACK_LABELS and all(_is_image(line) for _, line in lines):
        return [(line, None) for _, line in lines]
    pairs = []
    for number, line in lines:
        name, *label = line.rsplit(None, 1)
        if not label or _is_image(label[0]):
            raise UserError(f"{path}, line {number}: '{line[:60]}'; wanted FILE CLASS")
        pairs.append((name, *label))
    return pairs


def _json(path):
    try:
        found = json.loads(text_of(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; restore it, or type another --data_dir") from None
    if isinstance(found, dict):
        found = [(name, label) for label, names in found.items()
                 for name in (names if isinstance(names, list) else [None])]
    if (path.name in MAY_LACK_LABELS and isinstance(found, list)
            and all(isinstance(name, str) for name in found)):
        return [(name, None) for name in found]
    if not isinstance(found, list) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
            and isinstance(pair[1], (str, int)) for pair in found):
        raise UserError(f'{path}: not an image list; wanted {{"CLASS": ["FILE", ...]}} or '
                        '[["FILE", CLASS], ...]')
    return [(name, str(label)) for name, label in found]


def _leads_away(name):
    """Whether a file's path is absolute, or leads out of the folder."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def _is_image(name):
    return name.lower().endswith(IMG_EXTENSIONS)


def text_of(path):
    try:
        return path.read_text(encoding="utf-8-sig")  # with a mark or without
    except ValueError:
        raise UserError(f"{path}: not text; wanted lines FILE CLASS") from None
