"""Attacked images as PNG: rounded to 8 bits inside the ball, read back, measured on networks.

    DIR/NETWORK/ATTACK/000017.png    the image at position 17 of the list
    DIR/NETWORK/ATTACK/about.json    which list, which attack, which network
    DIR/NETWORK/ATTACK/images.csv    each file's source image and label; written last
"""

import csv
import hashlib
import io
import re
from functools import partial

import numpy as np
import torch
from PIL import Image

from utils import measure
from utils.attack.balls import norm_of
from utils.attack.chance import numbered
from utils.data import read_image, to_float
from utils.errors import DAMAGE, UserError
from utils.report import eps_text
from utils.run import digest, load_json, save_csv, save_json, write_atomic

FACTS = {"attack": str, "network": str, "model": str, "norm": str, "eps": float, "seed": int,
         "labels": str, "images_sha256": str, "size": int}


def rounded_inside(x, x_adv, eps, norm):
    """x_adv rounded to uint8 (n, C, H, W), on the CPU, within eps of x, whose pixels are multiples
    of 1/255.

    Rounds to the nearest level: in Linf to the nearest inside the ball, in L2 and L1 towards x
    where the nearest levels lie outside.
    """
    x, x_adv = x.cpu().double(), x_adv.cpu().double()  # Apple's GPUs have no float64
    clean, delta = (255 * x).round(), 255 * (x_adv - x)
    near = delta.round()
    if norm == "linf":
        most = int(255 * eps + 1e-4)  # 8/255 in float32 is a little less
        near = near.clamp(-most, most)
    else:
        outside = norm_of(near, norm) > 255 * eps
        near = torch.where(outside.view(-1, 1, 1, 1), delta.trunc(), near)
    return (clean + near).clamp(0, 255).to(torch.uint8)


def png_of(pixels):
    """An image (C, H, W) uint8 as the bytes of a PNG file."""
    shown = pixels.permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(shown[:, :, 0] if shown.shape[2] == 1 else shown).save(buffer, "PNG")
    return buffer.getvalue()


def read_png(path, like):
    """(C, H, W) uint8, in the shape of `like`; UserError if the file is not such an image."""
    try:
        found = np.asarray(read_image(path, "L"))
    except UserError:
        raise UserError(f"{path}: cannot be read as an image; restore it, or save the images again"
                        ) from None
    found = torch.from_numpy(found.copy())
    found = found[None] if found.dim() == 2 else found.permute(2, 0, 1)
    if found.shape != like.shape:
        raise UserError(f"{path}: of shape {tuple(found.shape)}; wanted {tuple(like.shape)}; save "
                        "the images again")
    return found


class Kept:
    """The `keep` of measure.run_cell: saves the images of one attack on one network.

    about: everything that they depend on; a folder holds images of one `about` only.
    """

    def __init__(self, net, attack, images, s):
        self.folder = s.save_images / _word(net.name) / _word(attack.title)
        self.attack, self.images = attack, images
        self.about = {
            "attack": attack.title, "network": net.name, "model": net.described(s),
            "norm": attack.norm, "eps": attack.eps, "size": net.target.size, "n": len(images),
            "seed": s.seed, "labels": digest(images.labels), "images_sha256": images.sha256()}

    def check(self):
        """UserError if the folder cannot be made or holds other images."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save_images: {self.folder}: cannot write there ({error.strerror}); "
                            "choose another folder") from None
        if not _files(self.folder) and not (self.folder / "about.json").is_file():
            return
        was = _about(self.folder)
        for key in [key for key in self.about if was.get(key) != self.about[key]]:
            raise UserError(f"--save_images: {self.folder} holds images made with {key} "
                            f"{was.get(key)}, given {self.about[key]}; type --overwrite to replace "
                            "them, or choose another folder")

    def whole(self):
        """Whether the folder holds all images of this attack."""
        return _about(self.folder) == self.about and _is_whole(self.folder)

    def remove(self):
        """Empties the folder; about.json is deleted last."""
        for name in ("images.csv", *_files(self.folder), "about.json"):
            (self.folder / name).unlink(missing_ok=True)

    def begin(self, before, progress):
        """Prepares the folder: writes about.json; deletes images.csv, which finish() writes, and
        images that were misclassified before the attack.
        """
        def made():
            self.check()
            (self.folder / "images.csv").unlink(missing_ok=True)
            for name in _files(self.folder) - {f"{i:06}.png" for i, b in enumerate(before) if b}:
                (self.folder / name).unlink()
            empty = not (self.folder / "about.json").is_file()
            save_json(self.folder / "about.json", self.about)
            return empty
        if progress.team.from_first(made):
            progress.clear()  # the images of the saved progress are gone

    def __call__(self, index, x, x_adv):
        """Saves the images at these positions of the list. -> the images as read back"""
        pixels = rounded_inside(x, x_adv, self.attack.eps, self.attack.norm)
        for i, one in zip(index.tolist(), pixels, strict=True):
            write_atomic(self.folder / f"{i:06}.png", png_of(one))
        return to_float(torch.stack([read_png(self.folder / f"{i:06}.png", one)
                                     for i, one in zip(index.tolist(), pixels, strict=True)])
                        .to(x.device))

    def finish(self, before, team):
        """Writes images.csv: a row for each attacked image, that is, each that was right before."""
        names, labels = self.images.names, self.images.labels.tolist()
        if team.first:
            save_csv(self.folder / "images.csv", [
                {"file": f"{i:06}.png", "source": names[i], "label": labels[i],
                 "class_name": measure.class_name(self.images.classes, labels[i])}
                for i, right in enumerate(before) if right])


def _word(text):
    return re.sub(r"[^\w.+-]+", "_", text)


def _files(folder):
    """Names of the saved images in a folder, which need not exist."""
    return {path.name for path in folder.glob("*.png") if path.stem.isdecimal()}


def _about(folder):
    """about.json, or {} if there is none."""
    path = folder / "about.json"
    about = load_json(path) if path.is_file() else {}
    return about if isinstance(about, dict) else {}


def _is_whole(folder):
    """Whether all files named in images.csv exist."""
    try:
        with open(folder / "images.csv", newline="", encoding="utf-8") as file:
            return {row["file"] for row in csv.DictReader(file)} <= _files(folder)
    except (OSError, *DAMAGE):
        return False


def check_folders(networks, ready, s, team):
    """Runs before any attack. UserError if --from_images come from another list, or if a folder of
    --save_images holds images of another command; --overwrite empties these folders.

    ready(geometry): the images, in every process.
    """
    if not (s.from_images or s.save_images):
        return
    lists = [ready(net.target.geometry) for net in networks]
    keeps = [Kept(net, attack, images, s) for net, images in zip(networks, lists, strict=True)
             for attack in net.attacks(s).values()] if s.save_images else []
    if len({keep.folder for keep in keeps}) < len(keeps):
        raise UserError("--save_images: two of these networks or attacks would share a folder; "
                        "type two commands, with another DIR")

    def made():
        for folder in s.from_images or []:
            about = read_about(folder)
            if any((about["images_sha256"], about["labels"]) != (one.sha256(), digest(one.labels))
                   for one in lists):
                raise UserError(f"--from_images {folder}: saved from another list of images; give "
                                "the --data_dir and --num_images that they were saved with")
        for keep in keeps:
            if s.overwrite:
                keep.remove()
            keep.check()
    team.from_first(made)


def read_about(folder):
    """about.json; UserError if --save_images did not write the folder."""
    about = _about(folder)
    if not all(isinstance(about.get(key), kind) for key, kind in FACTS.items()):
        raise UserError(f"--from_images {folder}: no about.json of saved images in it, or one "
                        "of an older version; wanted DIR/NETWORK/ATTACK of --save_images DIR")
    return about


def made_with(folders, networks):
    """{title: what the images were made with, and their digest} of the folders of --from_images.
    UserError unless all images are there and of the networks' input size, and no two folders share
    a title.
    """
    found = {}
    for folder in folders or []:
        about = read_about(folder)
        for net in networks:
            if about["size"] != net.target.size:
                raise UserError(f"--from_images {folder}: saved at {about['size']} pixels, but "
                                f"{net.name} takes {net.target.size}; give the --geometry that "
                                "they were saved with")
        if not _is_whole(folder):
            raise UserError(f"--from_images {folder}: not all of its images are there; type the "
                            "command with --save_images again")
        if title_of(about) in found:
            raise UserError(f"--from_images {folder}: a second folder of {about['attack']} on "
                            f"{about['network']}; type one at a time, with another --save")
        found[title_of(about)] = ", ".join(f"{key} {about[key]}" for key in (
            "model", "eps", "seed")) + f", images {_digest(folder)}"
    return found


def _digest(folder):
    """16 hexadecimal digits that identify the saved images in a folder."""
    whole = hashlib.sha256()
    for name in sorted(_files(folder)):
        whole.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return whole.hexdigest()[:16]


def title_of(about):
    radius = f"{about['norm'].title()} eps {eps_text(about['eps'], about['norm'])}"
    return f"saved: {about['attack']} on {about['network']}, {radius}"


def saved_cells(net, images, done, s, progress):
    """Yields (key, cell) of --from_images on one network; images without a file stay clean."""
    for folder in s.from_images or []:
        about = read_about(folder)
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
    """The saved images of x. generator: a Chance, which holds their positions in the list."""
    found = (255 * x).round().to(torch.uint8)
    for k, i in enumerate(generator.images.tolist()):
        path = folder / f"{i:06}.png"
        if path.is_file():
            found[k] = read_png(path, found[k]).to(x.device)
    return to_float(found)
