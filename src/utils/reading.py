"""From files to pixels: uint8 on disk and in memory, float32 in [0, 1] on the device."""

import io
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF
from tqdm import tqdm

from utils import parquet
from utils.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none runs another program
MOST = 0.8      # share of the memory for decoded images
THINNEST = 100  # most that a photograph's longer side may be, over the shorter one


def read_image(path, *modes):
    """An image file as a PIL image, in RGB or one of these modes. UserError if it cannot be read.

    path: a file, or a row of a parquet file, 'shard.parquet/17'.
    """
    path = Path(path)
    row = parquet.is_row(path)
    if not row and not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about large pictures and damaged EXIF data
            opened = io.BytesIO(parquet.image_bytes(path)) if row else path
            with Image.open(opened, formats=FORMATS) as file:
                image = _eight_bit(file)
                image = image.convert(image.mode if image.mode in modes else "RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise UserError(f"{path}: truncated, or no image ({error})") from None
    if max(image.size) > THINNEST * min(image.size):  # resized, it could fill the memory
        raise UserError(f"{path}: {image.width} x {image.height} pixels; wanted a picture, not a "
                        "line")
    return image


def _eight_bit(file):
    """The opened image with at most 8 bits a channel; convert() would clip larger values."""
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))  # as Pillow does in colour
    if file.mode in ("I", "F"):
        raise ValueError(f"pixels of Pillow's mode {file.mode}; wanted 8 or 16 bits a channel")
    return file


def read_rgb(path):
    """An image file as a PIL image in RGB, or None if it cannot be decoded."""
    try:
        return read_image(path)
    except UserError:
        return None


def decode(path, geometry):
    """An image file as (3, size, size) uint8, or None if it cannot be decoded."""
    image = read_rgb(path)
    if image is None:
        return None
    image = TF.resize(image, geometry.resize, TF.InterpolationMode(geometry.interpolation))
    return TF.pil_to_tensor(TF.center_crop(image, geometry.size))


def stack(items):
    """The positions in a batch that could be decoded, and the batch of these."""
    good = [k for k, x in enumerate(items) if x is not None]
    return good, torch.stack([items[k] for k in good]) if good else None


def batches(images, batch_size, *, workers, skipped, device=None, aloud=True):
    """Yields (index (n,), x (n, C, H, W) uint8) in order; decodes in `workers` processes.

    device: where x goes; None: the CPU. Copies to a GPU are from pinned memory, while the processes
    decode the next batches. A file that cannot be decoded is named on stderr if `aloud`, appended
    to the list `skipped` and left out. UserError at the end if no file could be decoded.
    """
    gpu = device is not None and device.type == "cuda"
    for index, x, broken in decoded(images, batch_size, workers=workers, pinned=gpu):
        skipped += warned(images, broken, aloud)
        if x is not None:
            yield index, x if device is None else x.to(device, non_blocking=gpu)
    if len(skipped) == len(images):
        raise none_decoded(images)


def decoded(images, batch_size, *, workers, pinned=False):
    """Yields (index (n,), x (n, C, H, W) uint8 or None, positions that cannot be decoded) in order.

    A worker prepares two batches ahead, which is DataLoader's default.
    """
    there = images.pixels is not None or images.stored is not None
    loader = torch.utils.data.DataLoader(
        images, batch_size, collate_fn=stack, num_workers=0 if there else workers,
        pin_memory=pinned and not there and workers > 0,
        generator=torch.Generator())  # its own: the global one is not touched
    for start, (good, x) in zip(range(0, len(images), batch_size), alive(loader), strict=True):
        broken = set(range(min(batch_size, len(images) - start))) - set(good)
        yield torch.tensor(good, dtype=torch.long) + start, x, [start + k for k in sorted(broken)]


def warned(images, broken, aloud=True):
    """The names of images that cannot be decoded; each is named on stderr if `aloud`."""
    names = [images.names[i] for i in broken]
    for name in names if aloud else ():
        tqdm.write(f"warning: {images.root / name}: cannot be decoded, skipped", file=sys.stderr)
    return names


def none_decoded(images):
    return UserError(f"{images.root}: none of its {len(images)} images can be decoded")


def alive(loader):
    """The loader's batches; UserError if a worker dies (a container with a small /dev/shm)."""
    try:
        yield from loader
    except RuntimeError as error:
        raise UserError(f"the processes that decode images died ({error}); type --workers 0, or "
                        "give the container more shared memory") from None


def load(images, *, workers, aloud=True):
    """The same list with all pixels in memory (10,000 of 224 x 224: 1.5 GB), without broken files.

    Images of cache.cached stay on disk and are memory-mapped. aloud: name broken files on stderr;
    of several processes that load the same list, only the first one should.
    """
    if images.pixels is not None:
        return images
    if images.stored is not None:
        return _mapped(images, aloud)
    needed = len(images) * 3 * images.size ** 2
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 0 < MOST * there < needed:  # -1 where the system does not say
        raise UserError(f"{len(images)} images of {images.size} pixels take {needed / 1e9:.3g} GB, "
                        f"of {there / 1e9:.3g} GB of memory; type --cache DIR, which keeps them on "
                        "disk, or a smaller --num_images")
    pixels = torch.empty((len(images), 3, images.size, images.size), dtype=torch.uint8)
    keep, skipped = [], []
    with tqdm(total=len(images), desc="decode", unit="img", disable=None if aloud else True) as bar:
        for index, x in batches(images, 32, workers=workers, skipped=skipped, aloud=aloud):
            pixels[len(keep):len(keep) + len(x)] = x  # in place: never twice in memory
            keep += index.tolist()
            bar.update(len(x))
    return replace(images.select(keep), pixels=pixels[:len(keep)], skipped=tuple(skipped))


def _mapped(images, aloud):
    """Images stored on disk, without broken files; their pixels are memory-mapped."""
    skipped = warned(images, (images.stored.rows < 0).nonzero()[:, 0].tolist(), aloud)
    if len(skipped) == len(images):
        raise none_decoded(images)
    images = images.select((images.stored.rows >= 0).nonzero()[:, 0].tolist())
    return replace(images, pixels=images.stored.together(), stored=None, skipped=tuple(skipped))


def to_float(x):
    """uint8 -> float32 in [0, 1], exactly k/255."""
    return x.to(torch.float32).div_(255)


def default_workers():
    """One process for each processor that this one may use, at most eight.

    The processes that torchrun started on this machine share its processors.
    """
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    started = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    sharing = max(1, int(started)) if started.isdecimal() else 1
    return max(1, min(8, len(mine) // sharing))
