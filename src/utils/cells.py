"""Passes over images: shared by any number of processes, streamed, resumed where they stopped.

    progress = Progress(team, folder / "partial.json", settings)
    state = progress.count(images, index, work, batch_size=50, cell=key)  # same in all processes
    progress.clear()                                                      # when the result is saved

Process r takes every size-th of the remaining batches, and random numbers belong to the images. So
every batch holds the same images and draws the same numbers whatever the number of processes.
Results are added in batch order: the sums are the same, to the last bit. The processes work in
rounds. After each round every process has all results, and the first one saves the sum so far. The
same command resumes from it, even with another number of processes or another batch size; only the
rounding in the networks changes then. Where memory runs out, even during an attack, the rest of the
pass splits its batches into smaller parts, which again changes only rounding.
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError
from utils.halving import Halves
from utils.reading import alive, load, none_decoded, stack, warned
from utils.run import compared, write_atomic
from utils.team import Team

ROUND = 200                         # images of a process in a round, before results are gathered
NOTHING = {"done": 0, "skipped": [], "state": {}}  # a pass: images done, their results
EVERY = 5.0                         # minimum seconds between two saves
KEPT = 10_000 * 3 * 224 * 224       # bytes of pixels; larger lists are decoded again in every pass


def added(total, part):
    """Sums numbers, joins lists, adds dicts key by key; `largest` takes the maximum."""
    if not isinstance(part, dict):
        return total + part
    return total | {key: value if key not in total else max(total[key], value)
                    if key == "largest" and not isinstance(value, dict)
                    else added(total[key], value) for key, value in part.items()}


# ------------------------------------------------------------------- the images of a pass

def pixels_of(images, parts, *, workers, pinned=False):
    """Yields (positions (n,), x (n, C, H, W) uint8) for every tensor of positions in `parts`,
    without those whose files cannot be decoded; x is None if none can. pinned: decoded images go
    into pinned memory, from which a GPU copies asynchronously.
    """
    if images.pixels is not None:
        yield from ((index, images.pixels[index]) for index in parts)
        return
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=[index.tolist() for index in parts], collate_fn=stack,
        num_workers=0 if images.stored is not None else workers,
        pin_memory=pinned and images.stored is None and workers > 0,
        generator=torch.Generator())  # its own: the global one is not touched
    for index, (good, x) in zip(parts, alive(loader), strict=True):
        yield index[good], x


def shared(images, parts, work, *, team, workers=0, each=1, pinned=False):
    """Yields (positions that cannot be decoded, work(index, x)) for every batch, in order, in every
    process; the result is None if nothing in a batch can be decoded.

    parts: tensors of positions; each: batches per process and round; pinned: as in pixels_of.
    """
    own = parts[team.rank::team.size]
    made = (_worked(part, index, x, work) for part, (index, x) in zip(
        own, pixels_of(images, own, workers=workers, pinned=pinned), strict=True))
    for start in range(0, len(parts), each * team.size):
        found = team.everyone(list(islice(made, each)))
        for k in range(min(each * team.size, len(parts) - start)):
            yield found[k % team.size][k // team.size]


def _worked(wanted, index, x, work):
    broken = sorted(set(wanted.tolist()) - set(index.tolist()))
    return broken, None if x is None else work(index, x)


def decode_once(images, *, workers, team):
    """The same list without broken files: all pixels mapped from a temporary file, or, if they
    exceed KEPT or the free space, checked once and decoded again in every pass. The processes
    share this work.
    """
    if images.pixels is not None or images.stored is not None:
        found = load(images, workers=workers, aloud=team.first)
        if len(set(team.everyone(found.sha256()))) > 1:
            raise UserError("the processes have different images in their caches; delete the "
                            "folders of --cache")
        return found
    shape = (3, images.size, images.size)
    most = min(KEPT, shutil.disk_usage(tempfile.gettempdir()).free // team.size)
    small = team.first_says(len(images) * math.prod(shape) <= most)
    if not small and team.first:
        print(f"{len(images)} images of {images.size} pixels are too many to keep: they are "
              "checked now and decoded again in every pass; --cache DIR decodes them once",
              flush=True)
    keep, skipped, parts = [], [], torch.arange(len(images)).split(32)
    with tempfile.TemporaryFile() as file, team.bar(len(images), "decode") as bar:
        for part, (broken, x) in zip(parts, shared(
                images, parts, lambda index, x: x if small else (), team=team,
                workers=workers), strict=True):
            skipped += warned(images, broken, team.first)
            good = [i for i in part.tolist() if i not in broken]
            if small and good:
                file.write(x.numpy())
            keep += good
            bar.update(len(part))
        if not keep:
            raise none_decoded(images)
        file.flush()
        pixels = np.memmap(file, np.uint8, "c", shape=(len(keep), *shape)) if small else None
    return replace(images.select(keep), pixels=torch.from_numpy(pixels) if small else None,
                   skipped=tuple(skipped))


# ------------------------------------------------------------------------ passes

class Progress:
    """The passes of a run over its images. Progress is saved to a file until clear() is called.

    path, settings: that file, and what all passes depend on; without them nothing is saved.
    device: where `work` computes. skipped: positions whose files could not be decoded in the last
    pass.
    """

    def __init__(self, team=None, path=None, settings=None, device=None):
        self.team, self.path, self.settings, self.kept = team or Team(), path, None, {}
        if path is not None:  # from the first: device names may differ elsewhere
            self.settings, self.kept = self.team.from_first(
                lambda: (compared(settings), self._read()))
        self.skipped, self.saved = [], time.monotonic()
        self.pinned = device is not None and device.type == "cuda"

    def count(self, images, index, work, *, batch_size, cell=None, workers=0, desc="", whole=True):
        """The sum, by `added`, of work(index, x) over batches of the positions `index` (N,).

        work: takes positions (n,) and pixels (n, C, H, W) uint8, returns a dict that JSON can hold.
        cell: what the pass depends on besides the settings; None: it is not saved. whole: a file
        that cannot be decoded raises UserError.
        """
        key = self._key(images, cell)
        now = self.kept.get(key, NOTHING)
        if now["done"] > len(index) or max([-1, *now["skipped"]]) >= len(images):
            now = NOTHING
        work = partial(Halves(desc), work, added)  # its batch limit holds for this pass
        left = index[now["done"]:]
        parts = left.split(batch_size) if len(left) else ()
        each = max(1, ROUND // batch_size) if self.team.size > 1 else 1
        with self.team.bar(len(index), desc, now["done"]) as bar:
            for part, (broken, found) in zip(parts, shared(
                    images, parts, work, team=self.team, workers=workers, each=each,
                    pinned=self.pinned), strict=True):
                self._check(images, broken, whole)
                bar.update(len(part))
                now = {"done": now["done"] + len(part), "skipped": now["skipped"] + broken,
                       "state": now["state"] if found is None else added(now["state"], found)}
                self._keep(key, now)
        self.skipped = now["skipped"]
        if len(self.skipped) == len(images):
            raise none_decoded(images)
        return now["state"]

    def clear(self):
        """Delete the saved progress, once the result itself is saved."""
        self.kept = {}
        if self.path is not None and self.team.first:
            self.path.unlink(missing_ok=True)

    def _check(self, images, broken, whole):
        if broken and whole:
            raise UserError(f"{images.root / images.names[broken[0]]}: could be decoded when this "
                            "command started, and cannot now; restore it, or choose another --save")
        warned(images, broken, self.team.first)

    def _key(self, images, cell):
        """A pass's key in the file: a hash of all that it depends on, including the code."""
        if self.path is None or cell is None:
            return None
        return _hash(json.dumps([_code(), self.settings, images.sha256(), cell], sort_keys=True))

    def _keep(self, key, now):
        if key is None:
            return
        self.kept[key] = now
        if self.team.first and time.monotonic() - self.saved >= EVERY:
            text = json.dumps(self.kept)
            write_atomic(self.path, f'{{"sha256": "{_hash(text)}", "kept": {text}}}\n'.encode())
            self.saved = time.monotonic()

    def _read(self):
        """Progress of an earlier run; {} if there is none, or if it is damaged, with a message."""
        if not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_bytes())
            if found["sha256"] == _hash(json.dumps(found["kept"])) and all(
                    map(_is_state, found["kept"].values())):
                return found["kept"]
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            pass
        print(f"{self.path}: damaged; what it held is measured again", flush=True)
        return {}


def _is_state(entry):
    """Whether it has the form of NOTHING."""
    return (isinstance(entry, dict) and entry.keys() == NOTHING.keys()
            and isinstance(entry["state"], dict)
            and all(type(k) is int and k >= 0 for k in (entry["done"], *entry["skipped"])))


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code():
    """A hash of the source files, so that changed code does not resume a pass."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
