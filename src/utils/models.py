"""Networks on [0, 1] pixels: Sequential(first layer, net), in eval mode, frozen, float32.

    model = load_model("vgg16")                                   # torchvision, IMAGENET1K_V1
    model = load_model("vgg16", weights="/weights/vgg16.pth")     # a local state dict
    model = load_model("timm/seresnet50.a1_in1k")                 # timm's published weights
    model = load_model("mine.py:network", kind="folder")          # what network() returns
    model = load_model("cnn", kind="digits", data_dir="digits")   # trained on first use and cached

The first layer is Normalize, Standardize (wrn_32_10), or nothing where a function's network takes
[0, 1] pixels itself. Names: utils/sources.py; files of weights: utils/weights.py.
"""

import copy
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from utils.data import NAMED, PRESETS, Geometry, paper_geometry
from utils.errors import DAMAGE, UserError
from utils.nets import RECIPE_VERSION, RECIPES, Normalize, train_small, with_head
from utils.run import alone, save_pth
from utils.sources import Factory, Ours, source
from utils.weights import (
    SUFFIXES,
    described,
    fit,
    head_of,
    image_size_of,
    trained,
    weights_path,
)


def load_model(name, *, weights="V1", kind="imagenet", data_dir=None, data_root="data",
               device="cpu", classes=None, image_size=None):
    """Sequential(first layer, net) that takes [0, 1] pixels and gives logits; eval mode, frozen.

    name: as in utils/sources.py; networks of SMALL are trained on the images of data_dir for kind
    'digits', 'mnist', 'cifar10' if not yet cached.
    weights: 'V1', 'V2', 'random', another name of torchvision's, or the path of a state dict
    NAME.pth or of a folder that holds one.
    classes: number of classes of a folder with its own names, for networks that take any number.
    image_size: for our own networks, whose layers depend on it. None: that of the weights, or of
    the kind. UserError: unknown name, unknown weights, or weights that do not fit.
    """
    origin, path, norm = source(name, kind), weights_path(name, weights), None
    outputs = None if kind == "folder" else num_classes(kind)
    size = image_size_of(path) or image_size
    if path:  # the last layer takes its shape from the file
        net, norm = fit(origin.build(outputs or classes, size=size), path, name,
                        any_classes=kind == "folder")
    elif weights == "random" and not isinstance(origin, Factory):  # a function decides itself
        net = origin.build(outputs or (classes if isinstance(origin, Ours) else None), size=size)
    elif isinstance(origin, Ours) and origin.ready and weights == "V1":
        net = _trained_here(origin, data_dir, data_root, device)
    elif origin.outputs not in (None, outputs or origin.outputs or 1):
        raise UserError(f"--weights {weights}: {name} was published for {origin.outputs or 'no'} "
                        f"classes; wanted {outputs or 'some'} for {kind} data: type --weights PATH "
                        "of a state dict for these")
    else:
        net = origin.pretrained(weights, outputs or classes)
    return freeze(nn.Sequential(_first_layer(origin, net, weights, path, norm), net)).to(device)


def _first_layer(origin, net, weights, path, norm):
    """The layer before the network; norm: (mean, std) from the file of its weights, or None."""
    if norm and any(torch.is_tensor(getattr(net, key, None)) for key in ("mean", "std")):
        raise UserError(f"--weights {path}: has a normalizer, and the network of {origin.name} has "
                        "mean and std of its own; wanted one of them: remove the file's entries")
    return Normalize(*norm) if norm else origin.first_layer(net, "random" if path else weights)


def trainable(name, *, kind, weights="random", seed=0, head="own", classes=None, image_size=None,
              data_dir=None, data_root="data"):
    """Sequential(first layer, net) in training mode; its [1], the net, is what is saved.

    weights: 'random' (drawn from the seed), or the weights to start from, as in load_model.
    head, classes: a head of utils/nets.py and its number of classes; initialised at random unless
    the weights have this head.
    """
    origin, path, norm = source(name, kind), weights_path(name, weights, "--pretrained"), None
    classes, image_size = classes or num_classes(kind), image_size or image_size_of(path)
    try:
        if path:
            net, norm = fit(origin.build(classes, seed, image_size), path, name, any_classes=True)
        elif weights == "random":
            net = origin.build(classes, seed, image_size)
        elif isinstance(origin, Ours) and origin.ready:
            net = load_model(name, weights=weights, kind=kind, data_dir=data_dir or kind,
                             data_root=data_root)[1]
        else:
            net = origin.pretrained(weights, classes)
    except UserError as error:
        raise UserError(str(error).replace("--weights", "--pretrained")) from None
    if (head, classes) != (path and head_of(path)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = with_head(net, head, classes, name)
    first = origin.first_layer(net, "random" if path else weights)
    _same_first_layer(first, norm, path, name)
    return nn.Sequential(first, net).train().requires_grad_(True)


def _same_first_layer(first, norm, path, name):
    """UserError if the file's (mean, std) are not those that the saved network is read with."""
    if norm and not (isinstance(first, Normalize) and all(
            torch.allclose(a.flatten(), b, atol=1e-3) for a, b in
            zip((first.mean, first.std), norm, strict=True))):
        raise UserError(f"--pretrained {path}: its normalizer is not that of {name}, which the "
                        "trained network would be loaded with; type other weights, or a "
                        "function FILE.py:FUNCTION whose network has this mean and std")


# ------------------------------------------------------------------- what is measured

@dataclass(frozen=True, eq=False)
class Target:
    """A network to be measured.

    name: its name in tables and files; typed: as given by --model_name; described: its weights, as
    tables print them; classes: names of its outputs, () if they are those of the kind of data.
    """
    name: str
    typed: str
    weights: str
    geometry: Geometry
    described: str
    classes: tuple = ()

    @property
    def size(self):
        return self.geometry.size

    def load(self, images, *, data_dir, data_root, device):
        """Its Sequential(first layer, net); UserError if it cannot take images of this size, or
        does not return logits of their classes.
        """
        model = load_model(self.typed, weights=self.weights, kind=images.kind, data_dir=data_dir,
                           data_root=data_root, device=device, classes=len(images.classes),
                           image_size=self.size)
        found = check_takes(model, self.typed, images.channels, self.size, device,
                            input_size(self.typed, images.kind, images.size, self.weights))
        path = weights_path(self.typed, self.weights)
        if images.kind != "folder" and found != num_classes(images.kind) and not (
                path and head_of(path)):
            raise UserError(f"--model_name {self.typed}: gives {found} numbers for an image; wanted"
                            f" logits of the {num_classes(images.kind)} classes of {images.kind} "
                            "data")
        return model


def targets_of(model_name, weights, preset, images, image_size=None, geometry="paper"):
    """[Target] of the flags --model_name and --weights, each a list of lists.

    preset: names if --model_name is not given; image_size, geometry: as in geometry_of. The name of
    a network given several times, with different weights, includes these. UserError: unknown
    network, or weights that are neither one for all nor one for each.
    """
    names = sum(model_name or [], []) or list(preset)
    pairs = list(dict.fromkeys(zip(names, one_each(names, sum(weights, [])), strict=True)))
    found = []
    for (name, one), label in zip(pairs, _labels(pairs, images.kind), strict=True):
        at = geometry_of(name, one, images, image_size, geometry)
        found.append(Target(label, name, one, at, describe_weights(name, one, images.kind),
                            _as_folders(name, one, at.size, images)))
    return found


def _labels(pairs, kind):
    """Name of each (name, weights) in tables; UserError if two would have the same name."""
    plain = [source(name, kind).label for name, _ in pairs]
    names = [name for name, _ in pairs]
    found = [label if names.count(name) == 1 else f"{label}_{_called(weights, label)}"
             for label, (name, weights) in zip(plain, pairs, strict=True)]
    first = {}
    for label, name in zip(found, names, strict=True):
        if label in first:
            raise UserError(f"--model_name {first[label]} {name}: a table would call both of them "
                            f"{label}; type one at a time, or give their weights other file names")
        first[label] = name
    return found


def _called(weights, label):
    """The weights as part of a name: the file's name, or that of the folder with NAME.pth."""
    path = Path(weights)
    if path.suffix not in SUFFIXES:
        return path.resolve().name
    return path.stem if path.stem != label else path.resolve().parent.name


def _as_folders(name, weights, size, images):
    """Classes of the network's outputs, for a folder with its own class names; () if unknown.

    They are those in its NAME.json if it was trained here, or the folder's if the network, which is
    loaded to find out, has as many outputs; those of published networks with 1000 are ImageNet's.
    """
    path = weights_path(name, weights)
    published = not path and source(name, images.kind).outputs == 1000
    if images.kind != "folder" or not images.classes or published:
        return ()
    if path and head_of(path):
        taught = tuple(trained(path)["classes"])
        return taught if taught[:len(images.classes)] == images.classes else ()
    found = _counted(name, weights, describe_weights(name, weights, "folder"), size,
                     len(images.classes))
    return images.classes if found == len(images.classes) != 1000 else ()


@cache
def _counted(name, weights, about, size, folders):
    """Number of the network's outputs; prints a line if they are taken as a data set's folders."""
    model = load_model(name, weights=weights, kind="folder", classes=folders, image_size=size)
    found = check_takes(model, name, 3, size, "cpu")
    if found == folders != 1000:
        print(f"{name}: its {found} outputs are taken as the {found} folders in alphabetical "
              "order", flush=True)
    return found


def describe_geometry(targets):
    """How the images of these networks are read, for the line above a table."""
    by = {}
    for target in targets:
        by.setdefault(str(target.geometry), []).append(target.name)
    return next(iter(by)) if len(by) == 1 else " / ".join(
        f"{', '.join(dict.fromkeys(names))} {geometry}" for geometry, names in by.items())


def freeze(model):
    return model.eval().requires_grad_(False)


def check_name(name, kind):
    """UserError unless `name` is a network for this kind of data."""
    source(name, kind)


def one_each(models, weights):
    """--weights, given once for all networks or once for each -> one for each; else UserError."""
    if len(weights) not in (1, len(models)):
        raise UserError(f"--weights: {len(weights)} given for {len(models)} networks; type one for "
                        "all, or one for each")
    return weights * (len(models) // len(weights))


def num_classes(kind):
    """Number of classes of the networks for this kind of data; for 'folder' the usual 1000."""
    return 10 if kind in RECIPES else {"cifar100": 100}.get(kind, 1000)


def describe_weights(name, weights, kind):
    """A network's weights as tables print them: the enum, 'random', or file and SHA-256."""
    origin, path = source(name, kind), weights_path(name, weights)
    if path and isinstance(origin, Factory):
        return f"{described(path)} in {origin.described('V1')}"
    return described(path) if path else origin.described(weights)


# ---------------------------------------------------------------- the size of the images

def _fixed(kind):
    """Whether all images of this kind have the same size."""
    return PRESETS[kind].size <= 64


def input_size(name, kind, size, weights):
    """Side in pixels that the weights were trained for; `size` for data sets of a fixed size."""
    if _fixed(kind):
        return size
    path = weights_path(name, weights)
    return image_size_of(path) or source(name, kind).geometry("random" if path else weights).size


def geometry_of(name, weights, images, image_size=None, geometry="paper"):
    """Geometry of the images that a network is measured on.

    geometry: 'paper', the same for all networks, at image_size pixels (None: 224, or the training
    size of networks trained here); 'weights', as published with the weights. Small images are not
    resized. UserError: an image_size other than that of the published weights.
    """
    if _fixed(images.kind):
        return paper_geometry(image_size or images.size)
    path = weights_path(name, weights)
    own = image_size_of(path)
    if own or geometry == "paper":
        return paper_geometry(image_size or own or 224)
    found = source(name, images.kind).geometry("random" if path else weights)
    if image_size and image_size != found.size:
        raise UserError(f"--geometry weights --image_size {image_size}: the weights of {name} are "
                        f"for {found.size} pixels; type one of the two flags")
    return found


def outputs(model, channels, size, device, name="the network"):
    """Number of logits per image, by a dry run. UserError: the model returns no logits."""
    x = torch.zeros((1, channels, size, size), device=device)
    with torch.no_grad():
        found = model(x)
    if not torch.is_tensor(found):
        hint = ("return its .logits" if hasattr(found, "logits") else
                "return the tensor of logits alone")
        raise UserError(f"--model_name {name}: gives {type(found).__name__} instead of a tensor; "
                        f"wrap the network in a module that calls it: {hint} (docs/attacks.md)")
    if found.ndim != 2 or len(found) != 1 or not found.is_floating_point() or found.shape[1] < 2:
        raise UserError(f"--model_name {name}: gives {tuple(found.shape)} for one image, which are "
                        "not logits; wanted (1, number of classes): add the network's classifier")
    return found.shape[1]


def check_takes(model, name, channels, size, device, trained_for=None):
    """Number of the network's logits. UserError, before anything slow starts, if it returns none,
    or cannot take images of this size.
    """
    try:
        return outputs(model, channels, size, device, name)
    except (*DAMAGE, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:80]
        hint = "" if trained_for in (None, size) else (
            f"; its weights are for {trained_for} pixels: type --image_size {trained_for}, or "
            "--geometry weights")
        raise UserError(f"--image_size {size}: {name} cannot take such images ({reason}){hint}"
                        ) from None


# -------------------------------------------------------------- small networks, on first use

def _trained_here(origin, data_dir, data_root, device):
    """The network with weights trained on the images of data_dir, now or earlier.

    A user's folder without cached weights uses those of the named data set if they are cached,
    never the other way round.
    """
    folder = Path(torch.hub.get_dir()) / "small"
    cached = folder / f"{origin.kind}_{origin.name}_{RECIPE_VERSION}.pth"
    if data_dir not in (None, *NAMED):
        path = hashlib.sha256(os.fsencode(Path(data_dir).resolve())).hexdigest()[:8]
        own = cached.with_stem(f"{cached.stem}_{path}")
        cached = cached if cached.is_file() and not own.is_file() else own
    net = origin.build()
    if not cached.is_file():
        with alone(cached):  # one process trains it, the others wait
            if not cached.is_file():
                model = nn.Sequential(origin.first_layer(net, "V1"), net).to(device)
                train_small(model, origin.name, origin.kind, data_dir, data_root)
                save_pth(cached, copy.deepcopy(net).cpu().state_dict())
                return net
    return fit(net, cached, origin.name)[0]
