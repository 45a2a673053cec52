"""Hugging Face's parquet shards of an image data set: columns `image` (with bytes) and `label`.

An image is named SHARD.parquet/ROW. All labels are read at once, images one row group at a time.
"""

import json
import os
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from utils.errors import UserError

# prefixes of the shards' names; of several, the first that is found is used
SPLITS = {"train": (("train",),), "test": (("validation", "val"), ("test",))}
OPEN = 64  # shards open at a time in a process


def is_row(path):
    """Whether this path names an image in a shard, not a file."""
    return path.parent.suffix == ".parquet"


def shards(folder, split):
    """The split's shards in a folder, or in data/ in it, as Hugging Face lays them out; sorted.

    All shards, if their names do not tell the splits apart. UserError: no training shards.
    """
    found = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    for starts in SPLITS[split]:
        chosen = [path for path in found if path.name.startswith(starts)]
        if chosen:
            return chosen
    if split == "train" and any(path.name.startswith(sum(SPLITS["test"], ())) for path in found):
        raise UserError(f"{found[0].parent}: only test shards, such as {found[0].name}; "
                        "wanted train*.parquet to train on")
    return found


def read_shards(paths):
    """-> names relative to the shards' folder, labels (-1: none), class names or None.

    UserError: pyarrow is not installed, a truncated shard, wrong columns.
    """
    names, labels, classes = [], [], None
    for path in paths:
        found, own = _labels(path)
        if path != paths[0] and own != classes:
            raise UserError(f"{path}: other class names than in {paths[0].name}; wanted shards of "
                            "one data set in a folder")
        classes = own
        names += [f"{path.name}/{row}" for row in range(len(found))]
        labels += found
    return names, labels, classes


def image_bytes(path):
    """The bytes of the image file in a row, such as 'shard.parquet/17'."""
    shard, row, process = str(path.parent), int(path.name), os.getpid()
    starts = _starts(shard, process)
    group = bisect_right(starts, row) - 1
    return _read_group(shard, group, process)[row - starts[group]].as_py()


def _labels(path):
    """Labels of all rows, class names or None."""
    file = _open(path)
    schema = file.schema_arrow
    there = set(schema.names)
    if "image" not in there or "bytes" not in {field.name for field in _fields(schema)}:
        raise UserError(f"{path}: columns {', '.join(sorted(there))}; wanted Hugging Face's image "
                        "(with bytes) and label")
    if "label" not in there:
        return [-1] * file.metadata.num_rows, None
    try:
        labels = file.read(["label"], use_threads=False)["label"].to_pylist()
    except Exception as error:
        raise _damaged(path, error) from None
    if not all(isinstance(label, int) for label in labels if label is not None):
        raise UserError(f"{path}: labels such as {labels[0]!r}; wanted class indices")
    return [-1 if label is None else label for label in labels], _class_names(schema)


def _fields(schema):
    """The fields of the column `image`; none if it is not a struct."""
    kind = schema.field("image").type
    return [kind.field(i) for i in range(kind.num_fields)]


def _class_names(schema):
    """The class names that Hugging Face stores with the labels, or None."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _open(path):
    try:
        import pyarrow.parquet as pq  # optional, needed only for these data
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow, which is not installed; type pip "
                        "install pyarrow, or --data_dir with image files") from None
    try:
        return pq.ParquetFile(path)
    except Exception as error:  # pyarrow's, for a truncated file
        raise _damaged(path, error) from None


def _damaged(path, error):
    reason = str(error).strip().split("\n")[0][:80]
    return UserError(f"{path}: truncated, or not a parquet file ({reason}); download it again")


# The process is part of the key, so that a forked worker opens its own files.

@lru_cache(maxsize=OPEN)
def _file(path, process):
    return _open(Path(path))


@lru_cache(maxsize=OPEN)
def _starts(path, process):
    """The first row of every row group."""
    about = _file(path, process).metadata
    rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    return list(accumulate(rows[:-1], initial=0))


@lru_cache(maxsize=1)
def _read_group(path, group, process):
    """The bytes of the images of one row group, the only one in memory."""
    table = _file(path, process).read_row_group(group, ["image.bytes"], use_threads=False)
    return table["image"].combine_chunks().field("bytes")
