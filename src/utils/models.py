"""Networks on [0, 1] pixels: Sequential(Normalize, net), in eval mode, frozen, float32.

    model = load_model("vgg16")                                   # torchvision, IMAGENET1K_V1
    model = load_model("vgg16", weights="/weights/vgg16.pth")     # a local state dict
    model = load_model("cnn", kind="digits", data_dir="digits")   # trained on first use, kept

For digits, MNIST and CIFAR-10 there are five small networks of different kinds (utils/nets.py), so
that a surrogate and five targets exist without a download.
"""

import copy
import difflib
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision.models as zoo
from torch import nn

from utils.data import SMALL, Geometry, paper_geometry
from utils.errors import UserError
from utils.nets import (
    HEADS,
    NETWORKS,
    RECIPE_VERSION,
    RECIPES,
    Standardize,
    build_small,
    train_small,
    with_head,
)
from utils.run import is_plain, load_json, load_pth, save_pth


class Normalize(nn.Module):
    """(x - mean) / std per channel, so that everything before it, eps too, is in [0, 1] pixels."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):  # (N, C, H, W)
        return (x - self.mean) / self.std


def first_layer(name, mean, std):
    """What a network sees of [0, 1] pixels; eps and gradients are those before it."""
    return Standardize() if name == "wrn_32_10" else Normalize(mean, std)


def load_model(name, *, weights="V1", kind="imagenet", data_dir=None, data_root="data",
               device="cpu"):
    """Sequential(Normalize, net) that takes [0, 1] pixels and gives logits; eval mode, frozen.

    name: a torchvision classification network (kind 'imagenet' or 'folder'), or one of SMALL
    (kind 'digits', 'mnist', 'cifar10', trained on the images of data_dir if not yet cached).
    weights: 'V1', 'V2', 'random', another name of torchvision's, or a path: a state dict
    NAME.pth or a folder that holds one. UserError: no such name, no such weights, no fit.
    """
    check_name(name, kind)
    path = weights_path(name, weights)
    if kind in RECIPES:
        net, mean, std = _small(name, kind, weights, path, data_dir, data_root, device)
    else:
        net, mean, std = _torchvision(name, weights, path)
    return freeze(nn.Sequential(first_layer(name, mean, std), net)).to(device)


def trainable(name, *, kind, weights="random", seed=0, head="own", classes=None, data_dir=None,
              data_root="data"):
    """Sequential(Normalize, net) to be trained, in training mode; its net[1] is what is saved.

    weights: 'random' (drawn from the seed), or the weights to start from, as in load_model.
    head, classes: a head of utils/nets.py and its number of classes; initialised at random unless
    the weights have this head.
    """
    check_name(name, kind)
    path = weights_path(name, weights, "--pretrained")
    if kind in RECIPES:
        channels, size = (3, 32) if kind == "cifar10" else (1, 28)
        mean = std = (0.5,) * channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build_small(name, channels, size)
        net = _fit(net, path, name) if path else net
    else:
        net, mean, std = _local(name, path, seed), _transforms(name).mean, _transforms(name).std
    if not path and weights != "random":
        try:
            net = load_model(name, weights=weights, kind=kind, data_dir=data_dir or kind,
                             data_root=data_root)[1]
        except UserError as error:
            raise UserError(str(error).replace("--weights", "--pretrained")) from None
    classes = classes or num_classes(kind)
    if (head, classes) != (path and head_of(path)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = with_head(net, head, classes, name)
    return nn.Sequential(first_layer(name, mean, std), net).train().requires_grad_(True)


@dataclass(frozen=True, eq=False)
class Target:
    """A network that is measured. described: what a table says of its weights."""
    name: str
    weights: str
    geometry: Geometry
    described: str

    @property
    def size(self):
        return self.geometry.size

    def load(self, images, *, data_dir, data_root, device):
        """Its Sequential(Normalize, net); UserError if it cannot take images of that size."""
        model = load_model(self.name, weights=self.weights, kind=images.kind, data_dir=data_dir,
                           data_root=data_root, device=device)
        check_takes(model, self.name, images.channels, self.size, device,
                    input_size(self.name, images.kind, images.size, self.weights))
        return model


def targets_of(model_name, weights, preset, images, image_size=None, geometry="paper"):
    """[Target] of the flags --model_name and --weights, each a list of lists; nothing is loaded.

    preset: names where --model_name is not given; image_size, geometry: as geometry_of. UserError:
    no such network, weights that are not one for all or one for each.
    """
    names = list(dict.fromkeys(sum(model_name or [], []) or preset))
    for name in names:
        check_name(name, images.kind)
    return [Target(name, one, geometry_of(name, one, images, image_size, geometry),
                   describe_weights(name, one, images.kind))
            for name, one in zip(names, one_each(names, sum(weights, [])), strict=True)]


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
    wanted = (*SMALL, *NETWORKS) if kind in RECIPES else zoo.list_models(module=zoo)
    if name in wanted:
        return
    near = difflib.get_close_matches(name, wanted, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    some = ", ".join(wanted) if kind in RECIPES else "torchvision's classifiers, such as vgg16"
    raise UserError(f"--model_name {name}: no network for {kind} data; {hint}wanted one of {some}")


def one_each(models, weights):
    """--weights, given once for all networks or once for each -> one for each; UserError if not."""
    if len(weights) not in (1, len(models)):
        raise UserError(f"--weights: {len(weights)} given for {len(models)} networks; type one for "
                        "all, or one for each")
    return weights * (len(models) // len(weights))


def num_classes(kind):
    """How many classes the networks for this kind of data have."""
    return 10 if kind in RECIPES else 1000


def input_size(name, kind, size, weights):
    """Side in pixels that the weights were trained for; `size` for data sets of a fixed size."""
    if kind in RECIPES:
        return size
    return _own_size(name, weights) or _published(name, weights).crop_size[0]


def geometry_of(name, weights, images, image_size=None, geometry="paper"):
    """How the images that a network is measured on are read.

    geometry: 'paper', the same for all networks, at image_size pixels (None: 224; networks that
    were trained here: as in their training); 'weights', as the weights were published. Small
    images are not scaled. UserError: an image_size that the published weights are not for.
    """
    if images.kind in RECIPES:
        return paper_geometry(image_size or images.size)
    own = _own_size(name, weights)
    if own or geometry == "paper":
        return paper_geometry(image_size or own or 224)
    about = _published(name, weights)
    found = Geometry(about.crop_size[0], about.resize_size[0], about.interpolation.value)
    if image_size and image_size != found.size:
        raise UserError(f"--geometry weights --image_size {image_size}: the weights of {name} are "
                        f"for {found.size} pixels; type one of the two flags")
    return found


def check_takes(model, name, channels, size, device, trained_for=None):
    """UserError if the network cannot take images of that size, before anything slow starts."""
    try:
        with torch.no_grad():
            model(torch.zeros((1, channels, size, size), device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:80]
        hint = "" if trained_for in (None, size) else (
            f"; its weights are for {trained_for} pixels: type --image_size {trained_for}, or "
            "--geometry weights")
        raise UserError(f"--image_size {size}: {name} cannot take such images ({reason}){hint}"
                        ) from None


# ----------------------------------------------------------------- torchvision

def _torchvision(name, weights, path):
    if path or weights == "random":
        about = _transforms(name)
        return _local(name, path), about.mean, about.std
    enum = _enum(name, weights)
    try:
        net = zoo.get_model(name, weights=enum, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, EOFError) as error:  # no connection, or half a file in the cache
        raise UserError(f"{name}: its weights {enum.name} are not in the cache and cannot be "
                        f"downloaded ({error}); type --weights PATH of a state dict, or --weights "
                        f"random; downloads are kept in {torch.hub.get_dir()}") from None
    return net, enum.transforms().mean, enum.transforms().std


def _enum(name, weights):
    """'V1', 'IMAGENET1K_V1', 'DEFAULT' ... -> torchvision's weights; UserError if there are none.
    """
    members = zoo.get_model_weights(name).__members__
    found = members.get(weights) or members.get(f"IMAGENET1K_{weights}")
    if found is None:
        there = [w.removeprefix("IMAGENET1K_") for w in members]
        raise UserError(f"--weights {weights}: {name} has {', '.join(there)}; type one of these, "
                        "random, or the path of a state dict")
    return found


def _transforms(name):
    """Size and normalisation of the network's first published weights, V1 for nearly all."""
    return next(iter(zoo.get_model_weights(name))).transforms()


def _published(name, weights):
    """torchvision's transforms of these weights; of a file or random weights, the first ones'."""
    first = weights == "random" or weights_path(name, weights)
    return _transforms(name) if first else _enum(name, weights).transforms()


def _own_size(name, weights):
    """Side in pixels of the images that a script of ours trained these weights on, or None."""
    path = weights_path(name, weights)
    size = trained(path).get("image_size") if path else None
    return size if type(size) is int and size > 0 else None


def _local(name, path, seed=0):
    """A torchvision architecture with random weights, or with those of the file."""
    options = {}
    if name in ("googlenet", "inception_v3"):  # as torchvision builds them for its own weights:
        # input shifted to the weights' own normalisation, no auxiliary heads
        options = {"transform_input": True, "aux_logits": False, "init_weights": path is None}
    with torch.random.fork_rng(devices=[]):  # random weights are the same in every run
        torch.manual_seed(seed)
        net = zoo.get_model(name, weights=None, **options)
    return _fit(net, path, name) if path else net


def weights_path(name, weights, flag="--weights"):
    """The file that the flag names (in a folder: NAME.pth), None if it is not a path."""
    path = Path(weights)
    if path.is_dir():
        path = path / f"{name}.pth"
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"{flag} {weights}: no file {path}; type the path of a state dict of "
                        f"{name}, V1, V2 or random")
    return None


def trained(path):
    """The facts NAME.json next to weights NAME.pth that a script of ours trained, else {}."""
    beside = path.with_suffix(".json")
    facts = load_json(beside) if beside.is_file() else {}
    return facts if isinstance(facts, dict) else {}


def head_of(path):
    """(head, classes) of a network that train_gcm.py trained; None: the network's own."""
    facts = trained(path)
    if not {"head", "classes"} <= facts.keys():
        return None
    head, classes = facts["head"], facts["classes"]
    if head not in HEADS or not isinstance(classes, list) or not classes:
        raise UserError(f"{path.with_suffix('.json')}: no head, or no classes, that train_gcm.py "
                        "writes; restore the file, or remove it if the network has its own head")
    return head, len(classes)


def _fit(net, path, name):
    """The network with the weights of the file, and the head that train_gcm.py gave it."""
    found = head_of(path)
    if found:
        with torch.random.fork_rng(devices=[]):
            net = with_head(net, *found, name)
    return load_state(net, path, name)


def load_state(net, path, name):
    """The weights of a local file, fp16 or fp32, into `net`; UserError if they do not fit."""
    state = load_pth(path)
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) and is_plain(value)
                                              for key, value in state.items()):
        raise UserError(f"{path}: not a state dict; wanted the tensors of {name} by name")
    broken = [key for key, value in state.items() if not value.float().isfinite().all()]
    if broken:
        raise UserError(f"{path}: {len(broken)} of its tensors are not finite (first: {broken[0]})"
                        "; type other weights")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = net.state_dict()
    extra = [k for k in state if k not in wanted and not k.startswith(("aux", "AuxLogits"))]
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if extra or missing or wrong:
        raise UserError(f"{path}: not the weights of {name}: {len(missing)} tensors missing, "
                        f"{len(extra)} unknown, {len(wrong)} of another shape (first: "
                        f"{(wrong + missing + extra)[0]}); type the --model_name they belong to")
    net.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
    return net


def describe_weights(name, weights, kind):
    """What a table says of a network's weights: the enum, 'random', or file and SHA-256."""
    path = weights_path(name, weights)
    if path:
        return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    if weights == "random":
        return "random"
    return f"trained on {kind}, recipe {RECIPE_VERSION}" if kind in RECIPES \
        else _enum(name, weights).name


# -------------------------------------------------------------- small networks

def _small(name, kind, weights, path, data_dir, data_root, device):
    channels, size = (3, 32) if kind == "cifar10" else (1, 28)
    half = (0.5,) * channels
    cached = Path(torch.hub.get_dir()) / "small" / f"{kind}_{name}_{RECIPE_VERSION}.pth"
    with torch.random.fork_rng(devices=[]):  # nn.Module uses the global RNG
        torch.manual_seed(0)
        net = build_small(name, channels, size)
    if weights == "random":
        return net, half, half
    if not path and (weights != "V1" or name in NETWORKS):
        ready = "" if name in NETWORKS else "V1 (trained here on first use), "
        raise UserError(f"--weights {weights}: {name} has {ready}random, or the path of a state "
                        "dict, such as free_at.py makes")
    if path or cached.is_file():
        return _fit(net, path or cached, name), half, half
    model = nn.Sequential(Normalize(half, half), net).to(device)
    train_small(model, name, kind, data_dir, data_root)
    cached.parent.mkdir(parents=True, exist_ok=True)
    save_pth(cached, copy.deepcopy(net).cpu().state_dict())
    return net, half, half
