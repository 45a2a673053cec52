"""ImageNet's 1000 classes: their WordNet ids, names and indices, and the names of its files."""

import difflib
import re
from functools import cache
from pathlib import Path

import torchvision

from utils.errors import UserError

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")  # of a file, without .JPEG
VAL_IMAGES = 50_000
SHARED = {"crane": [134, 517], "maillot": [638, 639]}  # ImageNet's names; torchvision's differ


@cache
def wnids():
    """{wnid: class index} of the 1000 ImageNet classes: their WordNet ids, sorted."""
    lines = (Path(__file__).parent / "imagenet_wnids.txt").read_text().split()
    return {wnid: i for i, wnid in enumerate(lines)}


def imagenet_classes():
    return torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]


def val_number(name):
    """Number, 1 to 50,000, of the validation image with this file name; None for other names."""
    found = VAL_NAME.fullmatch(Path(name).stem)
    return int(found[1]) if found and 0 < int(found[1]) <= VAL_IMAGES else None


def wnid_of(name):
    """The wnid that a file's name begins with, as in n01440764_10026.JPEG, or None."""
    start = re.split(r"[_.]", Path(name).name)[0]
    return start if start in wnids() else None


def class_index(text, where):
    """Class index 0-999 of an index, a wnid, or a class name in any case, with spaces or hyphens.

    where: the start of a UserError's message. UserError: unknown class, or a name of two classes.
    """
    text = text.strip()
    if re.fullmatch(r"[0-9]+", text):
        if len(text.lstrip("0")) <= 3:
            return int(text)
        raise UserError(f"{where}: class {text[:20]}; ImageNet's indices are 0 to 999 (those of "
                        "the devkit, 1 to 1000, go with its meta.mat)")
    if text in wnids():
        return wnids()[text]
    names, found = _by_name(), _named(text)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{where}: '{text}' is the name of {len(found)} classes, "
                        f"{' and '.join(map(str, found))}; use the index or the wnid instead")
    near = difflib.get_close_matches(_plain(text), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{where}: '{text[:60]}' is none of ImageNet's 1000 classes{hint}; wanted "
                    "an index 0-999, a wnid such as n01440764, or a class name such as tench")


def is_in_order(names):
    """Whether these are the 1000 classes' names in order; at least 900 must be recognised."""
    known = [(i, _named(name)) for i, name in enumerate(names)]
    return len(names) == 1000 and sum([i] == found for i, found in known) >= 900


def _named(text):
    """Indices of the classes with this name, or with its first part: 'tench, Tinca tinca'."""
    names, first = _by_name(), text.partition(",")[0]
    return names.get(_plain(text.replace(",", " "))) or names.get(_plain(first)) or []


@cache
def _by_name():
    """{plain name: class indices}"""
    found = {}
    for i, name in enumerate(imagenet_classes()):
        found.setdefault(_plain(name), []).append(i)
    return found | SHARED


def _plain(name):
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
