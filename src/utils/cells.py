"""Passes over images: shared by any number of processes, streamed, continued where they stopped.

    progress = Progress(team, folder / "partial.json", settings)
    state = progress.count(images, index, work, batch_size=50, cell=key)  # alike in every process
    progress.clear()                                                      # when the result is saved

Process r works on every size-th batch that is left; what is random in one belongs to its images. So
every batch holds the same images and draws the same numbers whatever the number of processes, and
their results are added in the order of the batches: the sums are the same, to the last bit. The
processes work in rounds. After a round every process has the results of all of them, and the first
one saves the sum so far, from which the same command goes on, also with another number of processes
or another batch size: networks round differently then, and nothing else changes. Where memory runs
out, also in an attack, the rest of the pass works on smaller parts of its batches, which again
changes no more than rounding.
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

ROUND = 200                         # images that a process works on before results are gathered
NOTHING = {"done": 0, "skipped": [], "state": {}}  # of a pass: images done, and what they gave
EVERY = 5.0                         # seconds from one save to the next, at least
KEPT = 10_000 * 3 * 224 * 224       # bytes of pixels; longer lists are decoded in every pass


def added(total, part):
    """Numbers are summed, lists continued, dicts added by their keys; `largest` is the largest."""
    if not isinstance(part, dict):
        return total + part
    return total | {key: value if key not in total else max(total[key], value)
                    if key == "largest" and not isinstance(value, dict)
                    else added(total[key], value) for key, value in part.items()}


# ------------------------------------------------------------------- the images of a pass

def pixels_of(images, parts, *, workers, pinned=False):
    """Yields (positions (n,), x (n, C, H, W) uint8) for every tensor of positions in `parts`,
    without those whose files cannot be decoded; x is None where none can. pinned: decoded ones in
    memory from which a GPU copies without waiting.
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
    """Yields (positions that cannot be decoded, work(index, x)) of every batch, in order, in every
    process; None where nothing of a batch can be decoded.

    parts: tensors of positions; each: batches of a process in a round; pinned: of pixels_of.
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


def at_hand(images, *, workers, team):
    """The same list without broken files: all pixels mapped from a temporary file, or, where there
    are more of them than KEPT or than fit there, checked once and decoded again in every pass.
    Processes share this work.
    """
    if images.pixels is not None or images.stored is not None:
        found = load(images, workers=workers, aloud=team.first)
        if len(set(team.everyone(found.sha256()))) > 1:
            raise UserError("the processes have other images in their caches; delete the folders "
                            "of --cache")
        return found
    shape = (3, images.size, images.size)
    most = min(KEPT, shutil.disk_usage(tempfile.gettempdir()).free // team.size)
    small = team.first_says(len(images) * math.prod(shape) <= most)
    if not small and team.first:
        print(f"{len(images)} images of {images.size} pixels are too many to be kept: they are "
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
    """The passes of a run. What is done of a pass is kept in a file until clear().

    path, settings: that file, and what all passes depend on; without them nothing is kept.
    device: where `work` computes. skipped: positions of the last pass whose files could not be
    decoded.
    """

    def __init__(self, team=None, path=None, settings=None, device=None):
        self.team, self.path, self.settings, self.kept = team or Team(), path, None, {}
        if path is not None:  # of the first: a device may be called otherwise elsewhere
            self.settings, self.kept = self.team.from_first(
                lambda: (compared(settings), self._read()))
        self.skipped, self.saved = [], time.monotonic()
        self.pinned = device is not None and device.type == "cuda"

    def count(self, images, index, work, *, batch_size, cell=None, workers=0, desc="", whole=True):
        """The sum, by `added`, of work(index, x) over batches of the positions `index` (N,).

        work: gets positions (n,) and pixels (n, C, H, W) uint8 and gives a dict that JSON can hold.
        cell: what the pass depends on besides the settings; None: it is not kept. whole: a file
        that cannot be decoded is a UserError.
        """
        key = self._key(images, cell)
        now = self.kept.get(key, NOTHING)
        if now["done"] > len(index) or max([-1, *now["skipped"]]) >= len(images):
            now = NOTHING
        work = partial(Halves(desc), work, added)  # images at a time: of this pass
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
        """Forgets what is kept: the result that it was for is saved."""
        self.kept = {}
        if self.path is not None and self.team.first:
            self.path.unlink(missing_ok=True)

    def _check(self, images, broken, whole):
        if broken and whole:
            raise UserError(f"{images.root / images.names[broken[0]]}: could be decoded when this "
                            "command started, and cannot now; restore it, or choose another --save")
        warned(images, broken, self.team.first)

    def _key(self, images, cell):
        """Of a pass in the file: a hash of all that it depends on, the code too."""
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
        """What an earlier run left; {} if there is nothing, or if it is damaged, which is said."""
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
    """A hash of the source files: a pass is not continued by other code."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
