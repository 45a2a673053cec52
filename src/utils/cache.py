"""Photographs that are decoded once: --cache DIR keeps their pixels for the next command.

    images = cached(images.prepared(224, None), folder, workers=4)   # folder None: unchanged
    for index, x in batches(images, 100, workers=4, skipped=[]): ... # decodes nothing
    images = load(images, workers=4)                                 # pixels are mapped, not read

A file KIND_NxSIZE_HASH.pixels in the folder holds, one after another:

    pixels    (M, 3, size, size) uint8 of the M images that can be decoded, in the list's order
    facts     JSON: what the pixels were made of, and which images of the list are missing
    end       8 bytes, length of the facts; 8 bytes, CRC-32 of pixels and facts

HASH covers the image list, its geometry and its folder. On opening, a process reads the file once
and checks its length, its checksum and what it was made of: the list, the size and times of every
photograph (or shard), and the versions of the decoders. If anything differs, the file is made
again. It is never modified in place.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from tqdm import tqdm

from utils import parquet
from utils.errors import DAMAGE, UserError
from utils.reading import decoded, none_decoded
from utils.run import whole_file

AT_ONCE = 2 ** 24  # bytes


@dataclass(frozen=True, eq=False)
class Stored:
    """The pixels of a list, mapped from a file, which must not be written to."""
    pixels: torch.Tensor  # (M, 3, size, size) uint8
    rows: torch.Tensor    # (N,) int64: each listed image's row in `pixels`; -1: it is broken

    def __getitem__(self, i):
        row = int(self.rows[i])
        return None if row < 0 else self.pixels[row].clone()

    def select(self, index):
        return replace(self, rows=self.rows[index])

    def together(self):
        """(N, 3, size, size) if none is broken: mapped if the rows are evenly spaced, as for a
        whole list or a process's share, else a copy in memory.
        """
        steps = self.rows.diff()
        step = int(steps[0]) if len(steps) else 1
        if step < 1 or not (steps == step).all():
            return self.pixels[self.rows]
        return self.pixels[int(self.rows[0]):int(self.rows[-1]) + 1:step]


def cached(images, folder, *, workers):
    """The same list with its pixels in a file in the folder, which is made if necessary.

    folder None, or images in memory: unchanged. UserError: the folder cannot be written to, or has
    too little space.
    """
    if folder is None or images.pixels is not None:
        return images
    made_of = _made_of(images)
    where = json.dumps([made_of[key] for key in ("the image list", "the folder")])
    path = Path(folder) / (f"{images.kind}_{len(images)}x{images.size}_"
                           f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.pixels")
    stored, _ = _opened(path, made_of, images)
    if stored is None:
        with _alone(path):
            stored, why = _opened(path, made_of, images)  # perhaps another process has made it
            if why:
                tqdm.write(f"warning: {path}: {why}; decoded again", file=sys.stderr)
            if stored is None:
                _make(path, made_of, images, workers)
                stored, why = _opened(path, made_of, images)
    if stored is None:
        raise UserError(f"{path}: {why or 'gone'} although just written; choose another --cache")
    return replace(images, stored=stored)


def _made_of(images):
    """What determines the pixels, apart from the photographs' bytes, which are not read."""
    state, names = hashlib.sha256(), map(Path, images.names)
    files = dict.fromkeys(name.parent if parquet.is_row(name) else name for name in names)
    for file in files:
        try:
            about = os.stat(images.root / file)
            found = (about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        except (OSError, ValueError):  # it may come later
            found = ()
        state.update(repr((str(file), found)).encode())
    return {"the image list": images.sha256(), "the folder": str(images.root.resolve()),
            "the photographs": state.hexdigest(), "Pillow": PIL.__version__,
            "torchvision": torchvision.__version__.partition("+")[0]}


# ---------------------------------------------------------------------- the file

def _opened(path, made_of, images):
    """-> Stored or None, and what is wrong with the existing file, or ''."""
    try:
        about = path.stat()
    except OSError:
        return None, ""
    try:
        return _read(path, json.dumps(made_of), len(images), images.size,
                     (about.st_ino, about.st_size, about.st_mtime_ns)), ""
    except (OSError, *DAMAGE) as error:
        return None, str(error) if isinstance(error, _Other) else "damaged"


class _Other(ValueError):
    """An intact file, made of something else."""


@cache  # a process checks a file once per `state`: its inode, size and time
def _read(path, made_of, n, size, state):
    """Stored, for n images of this size; any error of DAMAGE if the file is damaged."""
    with open(path, "rb") as file:
        end = file.seek(-16, os.SEEK_END)
        length, crc32 = (int.from_bytes(file.read(8), "little") for _ in range(2))
        start = file.seek(end - length)
        facts = json.loads(file.read(length))
        other = [key for key, value in json.loads(made_of).items()
                 if facts["made of"].get(key) != value]
        if other:
            raise _Other(f"{' and '.join(other)} changed")
        good = sorted(set(range(n)) - set(facts["broken"]))
        shape = (len(good), 3, size, size)
        if (not good or len(good) + len(facts["broken"]) != n or start != np.prod(shape)
                or _crc32(file, end) != crc32):
            raise ValueError("not whole")
        pixels = np.memmap(file, np.uint8, "r", shape=shape)
    rows = torch.full((n,), -1)
    rows[good] = torch.arange(len(good))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about read-only memory
        return Stored(torch.from_numpy(pixels), rows)


def _crc32(file, length):
    """Of the first `length` bytes: read, as mapped ones would count as this process's memory."""
    file.seek(0)
    value = 0
    for at in range(0, length, AT_ONCE):
        value = zlib.crc32(file.read(min(AT_ONCE, length - at)), value)
    return value


def _make(path, made_of, images, workers):
    """Decodes the images into the file; UserError if none of them can be decoded."""
    needed = len(images) * 3 * images.size ** 2
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise UserError(f"--cache {path.parent}: {len(images)} images need {needed / 1e9:.1f} GB, "
                        f"{free / 1e9:.1f} GB are free; choose another folder, or leave it out")
    broken, value = [], 0
    with (whole_file(path) as file,
          tqdm(total=len(images), desc="decode", unit="img", disable=None) as bar):
        for _, x, bad in decoded(images, 32, workers=workers):
            broken += bad
            if x is not None:
                pixels = x.numpy()
                value = zlib.crc32(pixels, value)
                file.write(pixels)
                bar.update(len(x))
        if len(broken) == len(images):
            raise none_decoded(images)
        facts = json.dumps({"made of": made_of, "broken": broken}).encode()
        for number in (len(facts), zlib.crc32(facts, value)):
            facts += number.to_bytes(8, "little")
        file.write(facts)


@contextmanager
def _alone(path):
    """Lets one process at a time make the file. UserError, before decoding, if none can."""
    import fcntl  # POSIX, like the shell scripts

    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{path.name}.lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--cache {folder}: cannot write there ({error.strerror}); choose another "
                        "folder, or leave it out") from None
    with lock:
        left_by_a_kill = folder.glob(f".{path.name}.*.tmp")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"{path}: another process is making it; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: each process makes it, the last one wins
            left_by_a_kill = ()
        for temporary in left_by_a_kill:
            temporary.unlink()
        yield
