"""Image lists in the challenge's formats: file names and classes in a file next to the images.

    label.txt               one image a line, FILE CLASS, such as `images/17.JPEG 3`
    train.json, val.json    {CLASS: [FILE, ...], ...} or [[FILE, CLASS], ...]

Files are relative to the list's folder, or to images/, train/ or val/ in it. Classes are indices,
or names, which get indices in alphabetical order.
"""

import json

from utils.errors import UserError

LISTS = {"train": ("train.json", "train.txt", "label.txt"),
         "test": ("val.json", "test.json", "val.txt", "test.txt", "test_label.txt")}
MOST_DIGITS = 6  # of a class index: every class up to the last one has an output of the network
FOLDERS = ("", "images", "train", "val", "test")


def find_list(path, split):
    """The list of a path: the file itself, or the one for this split in the folder; None if none.

    A folder that only has a training list is also tested on that list.
    """
    if path.is_file():
        return path if path.suffix in (".txt", ".json") else None
    order = LISTS[split] + (LISTS["train"] if split == "test" else ())
    return next((path / name for name in order if (path / name).is_file()), None)


def read_list(path):
    """(folder of the files, names, class indices, class names); UserError for a bad line."""
    pairs = _json(path) if path.suffix == ".json" else _lines(path)
    if not pairs:
        raise UserError(f"{path}: no images in it; wanted lines FILE CLASS, or JSON "
                        '{"CLASS": ["FILE", ...]}')
    names = tuple(name for name, _ in pairs)
    root = next((path.parent / folder for folder in FOLDERS
                 if (path.parent / folder / names[0]).is_file()), None)
    missing = next((name for name in names if not (root / name).is_file()), None) if root \
        else names[0]
    if missing is not None:
        raise UserError(f"{path}: no file {missing} in {root or path.parent}; wanted names "
                        "relative to the list's folder, or to images, train, val or test in it")
    found = {label for _, label in pairs}
    if all(label.isdecimal() for label in found):
        longest = max(found, key=len)
        if len(longest) > MOST_DIGITS:
            raise UserError(f"{path}: class {longest[:20]}; wanted names, or indices of at most "
                            f"{MOST_DIGITS} digits")
        classes = tuple(map(str, range(max(map(int, found)) + 1)))
        return root, names, [int(label) for _, label in pairs], classes
    classes = tuple(sorted(found))
    index = {name: i for i, name in enumerate(classes)}
    return root, names, [index[label] for _, label in pairs], classes


def _lines(path):
    pairs = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name.strip() or not label:
            if line.strip():
                raise UserError(f"{path}, line {number}: '{line.strip()[:60]}'; wanted FILE CLASS")
            continue
        pairs.append((name.strip(), label))
    return pairs


def _json(path):
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; restore it, or type another --data_dir") from None
    if isinstance(found, dict):
        found = [(name, label) for label, names in found.items()
                 for name in (names if isinstance(names, list) else [None])]
    if not isinstance(found, list) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
            and isinstance(pair[1], (str, int)) for pair in found):
        raise UserError(f'{path}: not an image list; wanted {{"CLASS": ["FILE", ...]}} or '
                        '[["FILE", CLASS], ...]')
    return [(name, str(label)) for name, label in found]


def _text(path):
    try:
        return path.read_text()
    except ValueError:
        raise UserError(f"{path}: not text; wanted lines FILE CLASS") from None
