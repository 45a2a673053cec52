"""Predictions for every image, labelled or not: predictions.csv of eval_net.py --predict."""

import torch

from utils.attack.chance import Chance, chance_of
from utils.attack.random_layers import drawing_from
from utils.cells import Progress
from utils.data import CIFAR10, DIGITS, cached, open_images, to_float
from utils.run import save_csv

NAMES = {"cifar10": CIFAR10, "mnist": DIGITS, "digits": DIGITS}  # classes of unlabelled images


def images_of(facts, data_dir, data_root, labels, classes, num):
    """All test images, names only; unlabelled ones get the kind in the facts of NAME.json."""
    images = open_images(data_dir, split="test", data_root=data_root, labels=labels,
                         classes=classes).taken_for(facts.get("kind"))
    return images.prepared(images.geometry, num)


def save_predictions(folder, networks, shown, s, team):
    """Write predictions.csv to the folder: a row for each network (tested.Tested) and each of its
    images, in the list `shown`.
    """
    rows = []
    for net, images in zip(networks, shown, strict=True):
        read = cached(images.prepared(net.target.geometry, None), s.cache, workers=s.workers)
        found = classified(net.defended, read, s, net.name, team)
        names = net.facts.get("classes") or net.target.classes or images.known_classes \
            or NAMES.get(images.kind, ())
        rows += rows_of(net.name, images, *found, names if len(names) == net.classes else ())
    if team.first:
        save_csv(folder / "predictions.csv", rows)
    print(f"saved {folder.path}/predictions.csv: {len(rows)} predictions by "
          + ", ".join(net.name for net in networks), flush=True)


@torch.no_grad()
def classified(model, images, s, desc, team):
    """Predicted class (N,) int64, -1 for an image that cannot be decoded, and probability (N,).

    s: batch_size, seed, workers, device.
    """
    def top(index, x):
        x = to_float(x.to(s.device, non_blocking=True))
        with drawing_from(chance_of(Chance(s.seed, index), x)):
            found = model(x).softmax(1).max(1)
        return {"index": index.tolist(), "classes": found.indices.tolist(),
                "shares": found.values.tolist()}
    found = Progress(team, device=s.device).count(
        images, torch.arange(len(images)), top, batch_size=s.batch_size, workers=s.workers,
        desc=desc, whole=False)
    classes, shares = torch.full((len(images),), -1), torch.zeros(len(images))
    classes[found["index"]] = torch.tensor(found["classes"])
    shares[found["index"]] = torch.tensor(found["shares"])
    return classes, shares


def rows_of(network, images, classes, shares, names):
    """A row for each image; empty where it cannot be decoded. names: class names, or ().

    The label is the index of the image's class name in `names`, empty if it is not there.
    """
    rows, index = [], {name: k for k, name in enumerate(names)}
    for file, label, k, share in zip(images.names, images.labels.tolist(), classes.tolist(),
                                     shares.tolist(), strict=True):
        row = {"network": network, "file": file, "class": "", "name": "", "probability": ""}
        if k >= 0:
            row |= {"class": k, "name": names[k] if names else "", "probability": f"{share:.4f}"}
        rows.append(row | ({"label": index.get(images.classes[label], "")} if images.has_labels
                           else {}))
    return rows
