"""Ground truth for flat folders: ImageNet's validation images as unpacked.

    val.txt                                    lines FILE CLASS; a class is 0-999, a wnid or a name
    LOC_val_solution.csv                       Kaggle's: ImageId, wnid and boxes
    ILSVRC2012_validation_ground_truth.txt     the devkit's: line i is image i, ids 1-1000 in
                                               the devkit's own order; meta.mat maps them
    imagenet_2012_validation_synset_labels.txt the same with wnids

All become class indices 0-999 in the order of the wnids, as in the networks' outputs.
"""

import csv
import re
from pathlib import Path

from utils.errors import DAMAGE, UserError
from utils.imagenet import class_index, val_number, wnid_of, wnids
from utils.lists import read_pairs, text_of

IN_ORDER = ("ILSVRC2012_validation_ground_truth.txt", "imagenet_2012_validation_synset_labels.txt")
DEVKIT = ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "data")  # where it unpacks to
LEVELS = 5  # in Kaggle's layout the list is four folders above the images
WANTED = ("val.txt with lines FILE CLASS, the devkit's ILSVRC2012_validation_ground_truth.txt with "
          "meta.mat, or LOC_val_solution.csv")


def find_labels(folder, names):
    """The ground-truth file for a flat folder of images, in it or above it; None if none."""
    if not all(val_number(name) for name in names):
        return next(iter(_there(folder, ["val.txt"])), None)
    near = [folder, folder.absolute().parent]
    above = [folder, *folder.absolute().parents][:LEVELS]
    found = [*(path for one in near for path in _there(one, ["val.txt"])),
             *(path for one in above for path in _in_devkit(one))]
    return next(iter(found), None)


def _there(folder, names):
    return [folder / name for name in names if (folder / name).is_file()]


def _in_devkit(folder):
    files = ["LOC_val_solution.csv", *(f"{sub}{name}" for name in IN_ORDER
                                       for sub in ("", *(f"{one}/" for one in DEVKIT)))]
    return _there(folder, files)


def given_labels(path):
    """The file given by --labels; for a folder, such as the devkit's, the ground truth in it."""
    path = Path(path)
    if path.is_dir():
        found = _there(path, ["val.txt"]) + _in_devkit(path)
        if found:
            return found[0]
    if not path.is_file():
        raise UserError(f"--labels {path}: no such file; wanted {WANTED}")
    return path


def is_imagenet(path, names):
    """Whether a label file gives ImageNet's classes to these images: by the images' names, or
    because the CLASS in every line FILE CLASS agrees with the wnid at the start of FILE.
    """
    if not names:
        return False
    if path.suffix == ".csv" or all(val_number(name) for name in names):
        return True
    if not all(wnid_of(name) for name in names) or path.suffix != ".txt":
        return False
    pairs = read_pairs(path)
    return all(label in (wnid_of(name), str(wnids().get(wnid_of(name)))) for name, label in pairs)


def imagenet_labels(path, names):
    """Class indices 0-999 of the images `names` (in one folder), from the label file.

    UserError: an image without a label, a label without an image, an unknown class.
    """
    found, numbered = _read(path)
    if numbered:
        return [_of_number(path, found, name) for name in names]
    wanted = {_key(name): name for name in names}
    stray = next((name for name in found if _key(name) not in wanted and not val_number(name)),
                 None)  # only some of the 50,000 may be there
    if stray:
        raise UserError(f"{path}: no image {stray} in {len(names)} images; wanted labels of the "
                        "images in the folder")
    labels = {_key(name): label for name, label in found.items()}
    missing = [name for key, name in wanted.items() if key not in labels]
    if missing:
        raise UserError(f"{path}: {len(labels)} labels for {len(names)} images; {len(missing)} "
                        f"have none, such as {missing[0]}; wanted one for each")
    return [labels[_key(name)] for name in names]


def _key(name):
    """A file name without its folder and, for validation images of ImageNet, without .JPEG."""
    name = Path(name)
    return name.stem if val_number(name) else name.name


def _of_number(path, labels, name):
    number = val_number(name)
    if number is None:
        raise UserError(f"{path}: has no names of files, and {name} is not ILSVRC2012_val_*.JPEG; "
                        "wanted lines FILE CLASS")
    if number > len(labels):
        raise UserError(f"{path}: {len(labels)} labels, none for {name}; wanted one for each image")
    return labels[number - 1]


# ------------------------------------------------------------------------ the files

def _read(path):
    """-> {name: index}, False; for a file without names: [index], True."""
    if path.suffix == ".csv":
        return _kaggle(path), False
    lines = [line.strip() for line in text_of(path).splitlines()]
    if lines and not any(re.search(r"\s", line) for line in lines):  # no names in it
        return _in_order(path, [line for line in lines if line]), True
    found = {}
    for number, (name, label) in enumerate(read_pairs(path), 1):
        index = class_index(label, f"{path}, label {number}")
        if found.setdefault(name, index) != index:
            raise UserError(f"{path}: {name} has the labels {found[name]} and {index}; wanted one")
    return found, False


def _kaggle(path):
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != ["ImageId", "PredictionString"]:
        raise UserError(f"{path}: not Kaggle's list; wanted the columns ImageId,PredictionString")
    found = {}
    for number, row in enumerate(rows[1:], 2):
        wnid = row[1].split(" ")[0] if len(row) == 2 else ""
        if wnid not in wnids():
            raise UserError(f"{path}, line {number}: '{','.join(row)[:60]}'; wanted a file, and a "
                            "wnid such as n01440764 with boxes")
        found[row[0]] = wnids()[wnid]
    return found


def _in_order(path, lines):
    """Class indices of a file with one wnid, or one of the devkit's ids, on each line."""
    if all(line in wnids() for line in lines):
        return [wnids()[line] for line in lines]
    wrong = next((line for line in lines if not re.fullmatch("[0-9]{1,9}", line)), None)
    if wrong is not None:
        raise UserError(f"{path}: '{wrong[:60]}'; wanted one of the devkit's ids, 1 to 1000, or a "
                        f"wnid, on each line; or {WANTED}")
    by_id = devkit_classes(path.parent / "meta.mat")
    unknown = next((line for line in lines if int(line) not in by_id), None)
    if unknown is not None:
        raise UserError(f"{path}: id {unknown} is not in meta.mat beside it; wanted ids 1 to 1000, "
                        "as in the devkit of 2012")
    return [by_id[int(line)] for line in lines]


def devkit_classes(path):
    """{the devkit's id: class index} from meta.mat; UserError if it is from another year."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the ids of the ground truth beside it are in "
                        "the devkit's own order; wanted the devkit's meta.mat there")
    try:
        from scipy.io import loadmat  # slow to import, needed for these labels alone
    except ImportError:
        raise UserError(f"{path}: reading it needs scipy, which is not installed; type pip install "
                        "scipy, or --labels with val.txt or LOC_val_solution.csv") from None
    try:
        synsets = loadmat(str(path), squeeze_me=True)["synsets"].reshape(-1)
        ids, found = synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist()
        by_id = {int(i): str(wnid).strip()  # ids beyond 1000 are groups of classes
                 for i, wnid in zip(ids, found, strict=True) if int(i) <= 1000}
    except (*DAMAGE, NotImplementedError, OSError) as error:
        raise UserError(f"{path}: not the devkit's mapping of 2012 ({type(error).__name__} "
                        f"{str(error)[:60]}); wanted meta.mat of ILSVRC2012_devkit_t12") from None
    other = next((wnid for wnid in by_id.values() if wnid not in wnids()), None)
    if other:
        raise UserError(f"{path}: its class {other} is none of the 1000 of 2012; wanted meta.mat "
                        "of ILSVRC2012_devkit_t12, not that of another year")
    return {i: wnids()[wnid] for i, wnid in by_id.items()}
