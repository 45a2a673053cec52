"""Where a network comes from: torchvision, timm, a function in a file, or utils/nets.py.

    net = source("vgg16", "imagenet")                          from torchvision
    net = source("timm/seresnet50.a1_in1k", "imagenet")        from timm, if it is installed
    net = source("nets/mine.py:network", "folder")             what network() returns
    net = source("preact_resnet18", "cifar100")                ours

    net.label                        short name in tables and file names: 'seresnet50.a1_in1k'
    net.outputs                      number of logits of its published weights, or None
    net.geometry("V1")               how images are resized and cropped for these weights
    net.build(classes, seed, size)   the module with random weights, for images of `size` pixels
    net.pretrained("V1", classes)    the module with its published weights
    net.first_layer(module, "V1")    the layer between [0, 1] pixels and the module
    net.described("V1")              description of these weights in tables
"""

import difflib
import hashlib
import math
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torchvision.models as zoo
from torch import nn

from utils import factory
from utils.data import PRESETS, SMALL, Geometry, paper_geometry
from utils.errors import UserError
from utils.nets import NETWORKS, RECIPE_VERSION, RECIPES, Normalize, Standardize, build_small
from utils.precision import out_of_memory
from utils.run import load_pth

OURS = (*SMALL, *NETWORKS)
GREY = ("digits", "mnist")
OTHERS = "timm/NAME, FILE.py:FUNCTION"


def source(name, kind):
    """The network `name` for this kind of data. UserError if there is none. Runs FILE.py."""
    if name.startswith("timm/"):
        return Timm(name, kind)
    if in_file(name):
        return Factory(name, kind)
    if name in OURS:
        return Ours(name, kind)
    theirs = [] if kind in GREY else zoo.list_models(module=zoo)
    if name in theirs:
        return Torchvision(name, kind)
    near = difflib.get_close_matches(name, (*OURS, *theirs), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    some = ", ".join(OURS if PRESETS[kind].size <= 64 else ("torchvision's, such as vgg16",))
    raise UserError(f"--model_name {name}: no network for {kind} data; {hint}wanted one of {some}, "
                    f"{OTHERS}")


def label_of(name):
    """A network's name in tables and file names, without slash or colon."""
    if name.startswith("timm/"):
        stem, label = "timm", name.removeprefix("timm/")
    elif in_file(name):
        stem, label = Path(name.rpartition(":")[0]).stem, name.rpartition(":")[2]
    else:
        return name
    label = re.sub(r"[/:\\]", "_", label)
    return f"{stem}_{label}" if label in (*OURS, *zoo.list_models(module=zoo)) else label


def in_file(name):
    """Whether a network's name is FILE.py:FUNCTION."""
    return name.endswith(".py") or ".py:" in name


class Source:
    """Base class of the four. name: as typed; kind: of data."""
    outputs = None

    @property
    def label(self):
        return label_of(self.name)

    def no_weights(self, weights, there):
        return UserError(f"--weights {weights}: {self.name} takes {there}, or the path of a "
                         "state dict")


def seeded(build, seed, **options):
    """build(**options) with random weights from the seed, the same in every run."""
    with torch.random.fork_rng(devices=[]):  # nn.Module draws from the global generator
        torch.manual_seed(seed)
        return build(**options)


# ----------------------------------------------------------------------- torchvision

@dataclass(frozen=True)
class Torchvision(Source):
    """A classification network of torchvision."""
    name: str
    kind: str
    outputs = 1000

    def published(self, weights):
        """torchvision's transforms for these weights; for random ones, those of the first entry."""
        if weights == "random":
            return next(iter(zoo.get_model_weights(self.name))).transforms()
        return self.enum(weights).transforms()

    def enum(self, weights):
        """'V1', 'IMAGENET1K_V1', 'DEFAULT' ... -> torchvision's weights; UserError if none."""
        members = zoo.get_model_weights(self.name).__members__
        found = members.get(weights) or members.get(f"IMAGENET1K_{weights}")
        if found is None:
            there = [w.removeprefix("IMAGENET1K_") for w in members]
            raise self.no_weights(weights, f"{', '.join(there)}, random")
        return found

    def geometry(self, weights):
        about = self.published(weights)
        return Geometry(about.crop_size[0], about.resize_size[0], about.interpolation.value)

    def first_layer(self, net, weights):
        about = self.published(weights)
        return Normalize(about.mean, about.std)

    @property
    def no_auxiliary(self):
        """Options that remove heads with a second output in training mode."""
        return {"aux_logits": False} if self.name in ("googlenet", "inception_v3") else {}

    def build(self, classes=None, seed=0, size=None):
        options = {"num_classes": classes} if classes else {}
        if self.no_auxiliary:  # as torchvision builds them for its weights: the input is shifted
            # to the weights' own normalisation
            options |= {"transform_input": True, "init_weights": True, **self.no_auxiliary}
        return seeded(zoo.get_model, seed, name=self.name, weights=None, **options)

    def pretrained(self, weights, classes=None):
        enum = self.enum(weights)
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(enum.url).name)
        try:
            if cached.is_file():
                load_pth(cached)  # torchvision would run code in a pickle
            return zoo.get_model(self.name, weights=enum, progress=sys.stderr.isatty(),
                                 **self.no_auxiliary)
        except Exception as error:  # no connection, other tensors: torch raises almost anything
            if out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            if cached.is_file():
                raise UserError(f"{self.name}: its weights in the cache are damaged ({reason}); "
                                f"remove {cached}") from None
            raise UserError(
                f"{self.name}: its weights {enum.name} are not in the cache and cannot be "
                f"downloaded ({reason}); type --weights PATH of a state dict, or --weights random; "
                f"downloads are kept in {torch.hub.get_dir()}") from None

    def described(self, weights):
        return "random" if weights == "random" else self.enum(weights).name


# ------------------------------------------------------------------------------ timm

@dataclass(frozen=True)
class Timm(Source):
    """timm/NAME or timm/NAME.TAG; TAG selects the published weights."""
    name: str
    kind: str

    def __post_init__(self):
        self.about  # noqa: B018 (reports an unknown network now)

    @cached_property
    def about(self):
        """timm's facts about the network's published weights, or about the network."""
        timm, (name, _, tag) = self.timm, self.name.removeprefix("timm/").partition(".")
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=1)
            hint = f"did you mean timm/{near[0]}? " if near else ""
            raise UserError(f"--model_name {self.name}: timm {timm.__version__} has no such "
                            f"network; {hint}timm.list_models() lists them")
        known = [full.partition(".")[2] for full in timm.list_models(
            f"{name}.*", pretrained=True) if full.startswith(f"{name}.")]
        if tag and tag not in known:
            raise UserError(f"--model_name {self.name}: no weights of that tag; wanted one of "
                            f"{', '.join(known) or 'none'}: type timm/{name}"
                            + f".{known[0]}" * bool(known))
        about = timm.get_pretrained_cfg(self.name.removeprefix("timm/"))
        if about is None:
            raise UserError(f"--model_name {self.name}: timm does not say how it reads images; "
                            "type another, or FILE.py:FUNCTION with a function that returns it")
        return about

    @property
    def timm(self):
        try:
            import timm  # optional, and slow to import
        except ImportError:
            raise UserError(f"--model_name {self.name}: timm is not installed; type pip install "
                            "timm") from None
        return timm

    @property
    def outputs(self):
        return self.about.num_classes

    def geometry(self, weights):
        about = self.about
        size = about.input_size[-1]
        return Geometry(size, math.floor(size / about.crop_pct), about.interpolation)

    def first_layer(self, net, weights):
        return Normalize(self.about.mean, self.about.std)  # expands one grey channel to three

    def build(self, classes=None, seed=0, size=None):
        return seeded(self.timm.create_model, seed, model_name=self.name.removeprefix("timm/"),
                      pretrained=False, **({"num_classes": classes} if classes else {}))

    def pretrained(self, weights, classes=None):
        self.described(weights)
        try:
            return self.timm.create_model(self.name.removeprefix("timm/"), pretrained=True)
        except Exception as error:  # offline, the hub's clients raise almost anything
            reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
            raise UserError(f"{self.name}: its weights are not in the cache and cannot be "
                            f"downloaded ({reason}); type --weights PATH of a state dict or of "
                            "safetensors, or --weights random") from None

    def described(self, weights):
        if weights == "random":
            return "random"
        if weights != "V1" or not self.about.has_weights:
            raise self.no_weights(weights, "V1 (those of its tag), random"
                                  if self.about.has_weights else "random")
        return f"timm {self.about.architecture}.{self.about.tag}".rstrip(".")


# ------------------------------------------------------------------ a function in a file

@dataclass(frozen=True)
class Factory(Source):
    """PATH.py:FUNCTION, see utils/factory.py."""
    name: str
    kind: str

    def __post_init__(self):
        self.function  # noqa: B018 (reports a missing one now)

    @cached_property
    def function(self):
        return factory.function_of(self.name)

    def geometry(self, weights):
        return paper_geometry(PRESETS[self.kind].size)

    def first_layer(self, net, weights):
        return factory.normalize_of(self.name, net) or nn.Identity()

    def build(self, classes=None, seed=0, size=None):
        takes, _ = factory.takes_classes(self.function)
        net = seeded(factory.calling, seed, name=self.name, function=self.function,
                     **({"num_classes": classes} if takes and classes else {}))
        if not isinstance(net, nn.Module):
            raise UserError(f"--model_name {self.name}: returned {factory.kind_of(net)}; wanted a "
                            "torch.nn.Module that gives logits")
        return net

    def pretrained(self, weights, classes=None):
        self.described(weights)
        _, needs_none = factory.takes_classes(self.function)
        other = self.kind == "folder" and needs_none  # may be an ImageNet network
        return self.build(None if other else classes)

    def described(self, weights):
        if weights not in ("V1", "random"):
            raise self.no_weights(weights, "V1 (as the function returns it)")
        path = factory.file_of(self.name)
        return f"{path.name} sha256 {sha256(path)}"


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------ ours

@dataclass(frozen=True)
class Ours(Source):
    """A network of utils/nets.py, for images of any size from 28 pixels."""
    name: str
    kind: str

    @property
    def channels(self):
        return 1 if self.kind in GREY else 3

    def geometry(self, weights):
        return paper_geometry(PRESETS[self.kind].size)

    def first_layer(self, net, weights):
        half = (0.5,) * self.channels
        return Standardize() if self.name == "wrn_32_10" else Normalize(half, half)

    def build(self, classes=None, seed=0, size=None):
        return seeded(build_small, seed, name=self.name, channels=self.channels,
                      size=size or PRESETS[self.kind].size, classes=classes or 10)

    @property
    def ready(self):
        """Whether the network is trained on first use (utils/models.py)."""
        return self.kind in RECIPES and self.name in SMALL

    def pretrained(self, weights, classes=None):
        raise self.no_weights(weights, "V1 (trained here on first use), random" if self.ready
                              else "random")

    def described(self, weights):
        if weights == "random":
            return "random"
        if not self.ready or weights != "V1":
            self.pretrained(weights)
        return f"trained on {self.kind}, recipe {RECIPE_VERSION}"


def beside_runs(name):
    """The flag needed beside --runs: --model_name if the network comes from FILE.py:FUNCTION."""
    return f" --model_name {name}" if ".py:" in name else ""
