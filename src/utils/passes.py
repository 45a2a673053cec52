"""One pass over shuffled training images; any number of processes share each minibatch."""

import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF
from tqdm import tqdm

from utils.data import Images, alive, read_rgb, stack
from utils.errors import UserError
from utils.precision import moved


def one_pass(images, batch_size, generator, team, *, vary, smallest, workers, shift=4, skip=0,
             device=None):
    """Iterator over (size n of the joint minibatch, index (m,) of this process's images,
    x (m, C, H, W) uint8), without the first `skip`. All random numbers are drawn before the first.

    Process p takes images p, p + size, ... of every minibatch; a last minibatch of fewer than
    `smallest` images is dropped. vary: photographs are cropped by RandomResizedCrop and mirrored,
    CIFAR images are shifted by up to `shift` pixels and mirrored, digits are left as they are. An
    image's crop does not depend on the number of processes. device: where x goes; None: where it
    is made. Copies to a GPU are from pinned memory, while the workers crop the next minibatches.
    """
    gpu = device is not None and device.type == "cuda"
    order = torch.randperm(len(images), generator=generator)
    u = torch.rand((3, len(images)), generator=generator)
    seeds = torch.randint(2 ** 62, (len(images),), generator=generator)
    joint = [part for part in torch.arange(len(images)).split(batch_size)
             if len(part) >= smallest][skip:]
    own = [part[team.rank::team.size] for part in joint]
    if images.pixels is None and vary:
        plan = [list(zip(order[p].tolist(), seeds[p].tolist(), strict=True)) for p in own]
        found = random_crops(images, plan, workers=workers, pinned=gpu)
    else:
        found = ((order[p], _pixels(images, order[p], u[:, p], vary, shift)) for p in own)
    return ((len(part), index, x if device is None else sent(x, device))
            for part, (index, x) in zip(joint, found, strict=True))


def sent(x, device):
    """x on the device; a copy to a CUDA device does not block."""
    if x.device.type == "cpu" and device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return moved(x, device)


def _pixels(images, index, u, vary, shift):
    pixels = images.pixels[moved(index, images.pixels.device)]
    if not vary or images.kind in ("digits", "mnist"):
        return pixels
    return crop_flip(F.pad(pixels, (shift,) * 4), images.size, u)


@dataclass(frozen=True, eq=False)
class Crops(torch.utils.data.Dataset):
    """Item (i, seed): a random crop of photograph i, mirrored half of the time.

    (3, size, size) uint8, or None if it cannot be decoded; as torchvision's RandomResizedCrop.
    """
    images: Images

    def __getitem__(self, key):
        i, seed = key
        image = read_rgb(self.images.root / self.images.names[i])
        if image is None:
            return None
        size = [self.images.size] * 2
        with torch.random.fork_rng(devices=[]):  # get_params uses the global generator
            torch.default_generator.manual_seed(seed)  # not the GPUs' generators
            box = RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
            mirrored = torch.rand(()) < 0.5
        image = TF.pil_to_tensor(TF.resized_crop(image, *box, size))
        return image.flip(2) if mirrored else image


def random_crops(images, plan, *, workers, pinned=False):
    """Yields (index (n,), x (n, 3, H, W) uint8) for every list of (i, seed) in the list `plan`.

    A file that cannot be decoded is named on stderr and left out. UserError if no file of a
    list can be decoded.
    """
    loader = torch.utils.data.DataLoader(
        Crops(images), batch_sampler=plan, collate_fn=stack, num_workers=workers,
        pin_memory=pinned and workers > 0, generator=torch.Generator())
    for keys, (good, x) in zip(plan, alive(loader), strict=True):
        for k in sorted(set(range(len(keys))) - set(good)):
            tqdm.write(f"warning: {images.root / images.names[keys[k][0]]}: cannot be decoded, "
                       "left out", file=sys.stderr)
        if not good:
            raise UserError(f"{images.root}: no image of a minibatch can be decoded")
        yield torch.tensor([keys[k][0] for k in good]), x


def crop_flip(x, size, u):
    """uint8 (n, C, H, W) -> (n, C, size, size), position and flip of each image from u (3, n)."""
    n, channels, height, width = x.shape
    u, line = moved(u, x.device), partial(torch.arange, device=x.device)
    top, left = ((u[i] * (side - size + 1)).long().clamp_max(side - size)
                 for i, side in ((0, height), (1, width)))
    row, column = (corner[:, None] + line(size) for corner in (top, left))
    column = torch.where(u[2, :, None] < 0.5, column.flip(1), column)
    return x[line(n)[:, None, None, None], line(channels)[:, None, None],
             row[:, None, :, None], column[:, None, None, :]]
