"""What networks say of every image, labelled or not: predictions.csv of eval_net.py --predict."""

import torch
from tqdm import tqdm

from utils.attack.chance import Chance, chance_of
from utils.attack.telling import telling
from utils.data import CIFAR10, DIGITS, batches, open_images, to_float
from utils.run import save_csv

NAMES = {"cifar10": CIFAR10, "mnist": DIGITS, "digits": DIGITS}  # of unlabelled images


def images_of(facts, data_dir, data_root, labels, classes, num):
    """All test images, names only; unlabelled ones as of the kind that NAME.json's facts say."""
    images = open_images(data_dir, split="test", data_root=data_root, labels=labels,
                         classes=classes).taken_for(facts.get("kind"))
    return images.prepared(images.geometry, num)


def save_predictions(folder, networks, shown, s):
    """predictions.csv in the folder, a row for each network, an eval_net.Tested, and each of its
    images, which stand in the list `shown`.
    """
    rows = []
    for net, images in zip(networks, shown, strict=True):
        found = predicted(net.defended, images.prepared(net.target.geometry, None), s, net.name)
        names = net.facts.get("classes") or net.target.classes or images.known_classes \
            or NAMES.get(images.kind, ())
        rows += rows_of(net.name, images, *found, names if len(names) == net.classes else ())
    save_csv(folder / "predictions.csv", rows)
    print(f"saved {folder.path}/predictions.csv: {len(rows)} predictions by "
          + ", ".join(net.name for net in networks), flush=True)


@torch.no_grad()
def predicted(model, images, s, desc):
    """Class (N,) int64 and its probability (N,) of every image; -1 where it cannot be decoded.

    s: batch_size, seed, workers, device.
    """
    classes, shares = torch.full((len(images),), -1), torch.zeros(len(images))
    with tqdm(total=len(images), desc=desc, unit="img", leave=False, disable=None) as bar:
        for index, x in batches(images, s.batch_size, workers=s.workers, skipped=[]):
            x = to_float(x.to(s.device))
            with telling(chance_of(Chance(s.seed, index), x)):
                top = model(x).softmax(1).max(1)
            classes[index], shares[index] = top.indices.cpu(), top.values.cpu()
            bar.update(len(index))
    return classes, shares


def rows_of(network, images, classes, shares, names):
    """A row for each image; empty where it cannot be decoded. names: of the classes, or ()."""
    rows = []
    for file, label, k, share in zip(images.names, images.labels.tolist(), classes.tolist(),
                                     shares.tolist(), strict=True):
        row = {"network": network, "file": file, "class": "", "name": "", "probability": ""}
        if k >= 0:
            row |= {"class": k, "name": names[k] if names else "", "probability": f"{share:.4f}"}
        rows.append(row | ({"label": label} if images.has_labels else {}))
    return rows
