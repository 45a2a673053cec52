"""Attacked images as PNG: rounded to 8 bit inside the ball, read again, measured on networks.

    DIR/NETWORK/ATTACK/000017.png    the image at place 17 of the list
    DIR/NETWORK/ATTACK/about.json    which list, which attack
    DIR/NETWORK/ATTACK/images.csv    of which image each file is, and its label; written last
"""

import io
import re
from functools import partial

import numpy as np
import torch
from PIL import Image

from utils import measure
from utils.attack.balls import norm_of
from utils.attack.chance import numbered
from utils.data import to_float
from utils.errors import UserError
from utils.run import load_json, save_csv, save_json, write_atomic

FACTS = {"attack": str, "network": str, "norm": str, "eps": float, "images_sha256": str,
         "size": int}


def rounded(x, x_adv, eps, norm):
    """uint8 images (n, C, H, W) near x_adv, within eps of x, whose pixels are multiples of 1/255.

    To the nearest level; in Linf of those inside the ball, in L2 and L1 towards x where the nearest
    levels lie outside.
    """
    clean, delta = (255 * x.double()).round(), 255 * (x_adv.double() - x.double())
    near = delta.round()
    if norm == "linf":
        most = int(255 * eps + 1e-4)  # 8/255 in float32 is a little less
        near = near.clamp(-most, most)
    else:
        outside = norm_of(near, norm) > 255 * eps
        near = torch.where(outside.view(-1, 1, 1, 1), delta.trunc(), near)
    return (clean + near).clamp(0, 255).to(torch.uint8)


def png_of(pixels):
    """An image (C, H, W) uint8 as the bytes of a file."""
    shown = pixels.permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(shown[:, :, 0] if shown.shape[2] == 1 else shown).save(buffer, "PNG")
    return buffer.getvalue()


def read_png(path, like):
    """(C, H, W) uint8, as large as `like`; UserError if the file is not such an image."""
    try:
        with Image.open(path) as image:
            found = np.asarray(image)
    except (OSError, SyntaxError, ValueError):
        raise UserError(f"{path}: cannot be read as an image; restore it, or save the images again"
                        ) from None
    found = torch.from_numpy(found.copy())
    found = found[None] if found.dim() == 2 else found.permute(2, 0, 1)
    if found.shape != like.shape or found.dtype != torch.uint8:
        raise UserError(f"{path}: of shape {tuple(found.shape)}; wanted {tuple(like.shape)} in 8 "
                        "bit; save the images again")
    return found


class Kept:
    """keep(index, x, x_adv) of measure.run_cell: the images of one attack on one network."""

    def __init__(self, net, attack, images, s):
        self.folder = s.save_images / _word(net.name) / _word(attack.title)
        self.attack, self.images = attack, images
        self.about = {
            "attack": attack.title, "network": net.name, "norm": attack.norm, "eps": attack.eps,
            "images_sha256": images.sha256(), "size": net.target.size, "n": len(images),
            "seed": s.seed}

    def begin(self, team):
        """about.json in the folder, and no images.csv until all images are there."""
        def made():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "images.csv").unlink(missing_ok=True)
            save_json(self.folder / "about.json", self.about)
        team.from_first(made)

    def __call__(self, index, x, x_adv):
        """Saves the images at these places of the list; -> what is read again."""
        pixels = rounded(x, x_adv, self.attack.eps, self.attack.norm).cpu()
        for i, one in zip(index.tolist(), pixels, strict=True):
            write_atomic(self.folder / f"{i:06}.png", png_of(one))
        return to_float(torch.stack([read_png(self.folder / f"{i:06}.png", one)
                                     for i, one in zip(index.tolist(), pixels, strict=True)])
                        .to(x.device))

    def finish(self, before, team):
        """images.csv: a row for each image that was right before, and so attacked."""
        names, labels = self.images.names, self.images.labels.tolist()
        if team.first:
            save_csv(self.folder / "images.csv", [
                {"file": f"{i:06}.png", "source": names[i], "label": labels[i],
                 "class_name": measure.class_name(self.images.classes, labels[i])}
                for i, right in enumerate(before) if right])


def _word(text):
    return re.sub(r"[^\w.+-]+", "_", text)


def read_about(folder):
    """about.json; UserError if the folder is none that --save_images left."""
    path = folder / "about.json"
    about = load_json(path) if path.is_file() else None
    if not isinstance(about, dict) or not all(
            isinstance(about.get(key), kind) for key, kind in FACTS.items()):
        raise UserError(f"--from_images {folder}: no about.json of saved images in it; wanted "
                        "DIR/NETWORK/ATTACK of --save_images DIR")
    return about


def check_saved(folders, networks):
    """UserError unless these are saved images, as large as the networks take them."""
    for folder in folders or []:
        about = read_about(folder)
        for net in networks:
            if about["size"] != net.target.size:
                raise UserError(f"--from_images {folder}: saved at {about['size']} pixels, but "
                                f"{net.name} takes {net.target.size}; type --geometry as then")


def title_of(about):
    return f"saved: {about['attack']} on {about['network']}"


def saved_cells(net, images, done, s, progress):
    """Yields (key, cell) of --from_images on one network; images that were not saved are clean."""
    for folder in s.from_images or []:
        about = read_about(folder)
        if about["images_sha256"] != images.sha256():
            raise UserError(f"--from_images {folder}: saved of another list of images; give the "
                            "--data_dir and --num_images that they were saved with")
        key = f"{net.name} | {title_of(about)}"
        if key in done:
            continue
        attack = measure.Attack(title_of(about), about["norm"], about["eps"],
                                partial(_from_disk, folder))
        before = torch.tensor(done[f"{net.name} | clean"]["before"])
        yield key, measure.run_cell(
            attack, net.defended, net.defended, images, before, draws=net.draws(s),
            batch_size=s.batch_size, chance=numbered(s.seed, len(images)), device=s.device,
            desc=key, workers=s.workers, progress=progress)


def _from_disk(folder, model, x, y, *, generator, report):
    """The saved images of x, which the generator, a Chance of places in the list, numbers."""
    found = (255 * x).round().to(torch.uint8)
    for k, i in enumerate(generator.images.tolist()):
        path = folder / f"{i:06}.png"
        if path.is_file():
            found[k] = read_png(path, found[k]).to(x.device)
    return to_float(found)
