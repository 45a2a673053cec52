"""Weights from a file: a state dict in .pth or .safetensors, in any of the usual wrappings.

    mean_std = load_state(net, path, "resnet50")

A state dict may be nested under state_dict, model, net, model_ema or ema; its names may have the
prefixes module., model. and _orig_mod. in any combination; normalizer or normalize entries become
mean and std of the network's first layer; the attacker's copy of a network, which the `robustness`
library writes, is left out. One line reports what was done. Loading never runs pickled code.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.errors import UserError
from utils.nets import HEADS, last_layer, with_head
from utils.run import is_plain, load_json, load_pth
from utils.sources import label_of, sha256

WRAPPED = ("state_dict", "model", "net", "model_ema", "ema", "state_dict_ema")  # the first wins
PREFIXES = ("module.", "model.", "_orig_mod.")
NORMALIZER = re.compile(r"(?:normalizer|normalize)\.(?:new_)?(mean|std)")
LEFT_OUT = ("attacker.", "aux", "AuxLogits")  # a second copy of the network, auxiliary heads
UNUSED = ("n_averaged", "num_batches_tracked")
SUFFIXES = (".pth", ".safetensors")
WORDS = ("V1", "V2", "random")  # of --weights, even if a file or a folder has this name


# ------------------------------------------------------------------------ which file

def weights_path(name, weights, flag="--weights"):
    """The file that the flag names (in a folder: NAME.pth), or None if it is not a path."""
    path, label = Path(weights), label_of(name)
    if weights in WORDS:
        return None
    if path.is_dir():
        found = [path / f"{label}{suffix}" for suffix in SUFFIXES]
        path = next((file for file in found if file.is_file()), found[0])
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"{flag} {weights}: no file {path}; type the path of a state dict of "
                        f"{name}, {', '.join(WORDS[:-1])} or {WORDS[-1]}")
    return None


def trained(path):
    """The facts in NAME.json next to NAME.pth, weights that one of our scripts trained; else {}."""
    beside = path.with_suffix(".json")
    facts = load_json(beside) if beside.is_file() else {}
    return facts if isinstance(facts, dict) else {}


def head_of(path):
    """(head, number of classes) of a network trained here; None: the network's own head."""
    facts = trained(path)
    if not {"head", "classes"} <= facts.keys():
        return None
    head, classes = facts["head"], facts["classes"]
    if head not in HEADS or not isinstance(classes, list) or not classes:
        raise UserError(f"{path.with_suffix('.json')}: its head or classes are not as train_gcm.py "
                        "writes them; restore it, or remove it if the network has its own head")
    return head, len(classes)


def image_size_of(path):
    """Side in pixels of the images that one of our scripts trained these weights on, or None."""
    size = trained(path).get("image_size") if path else None
    return size if type(size) is int and size > 0 else None


def described(path):
    return f"{path.name} sha256 {sha256(path)}"


# ------------------------------------------------------------------- what is in the file

@dataclass(frozen=True)
class Found:
    """The tensors of a file under one interpretation of their names."""
    state: dict                # {name: tensor}
    prefix: str = ""           # stripped from the names
    norm: dict = field(default_factory=dict)  # {"mean": tensor, "std": tensor} of a normalizer
    left_out: tuple = ()       # names of the attacker's copy

    def fits(self, wanted):
        """How many tensors of `wanted`, {name: tensor}, are here in the same shape."""
        return sum(name in self.state and self.state[name].shape == value.shape
                   for name, value in wanted.items())


def read_state(path, name):
    """-> the file's state dict, names unchanged, and remarks on the file for the report line."""
    state, said = _open(path), []
    for _ in range(2):  # {"state_dict": {"model": ...}}
        there = [key for key in WRAPPED if isinstance(state, dict)
                 and isinstance(state.get(key), dict)]
        if there:
            others = [key for key in WRAPPED if key != there[0]
                      and isinstance(state.get(key), dict)]
            said.append(f"'{there[0]}' of it" + f", not its '{', '.join(others)}'" * bool(others))
            state = state[there[0]]
    if not isinstance(state, dict) or not all(isinstance(key, str) and is_plain(value)
                                              for key, value in state.items()):
        raise UserError(f"{path}: not a state dict; wanted the tensors of {name} by name")
    broken = [key for key, value in state.items() if not value.float().isfinite().all()]
    if broken:
        raise UserError(f"{path}: {len(broken)} of its tensors are not finite (first: {broken[0]})"
                        "; type other weights")
    return state, said


def _open(path):
    if path.suffix != ".safetensors":
        return load_pth(path)
    try:
        from safetensors.torch import load  # optional
    except ImportError:
        raise UserError(f"{path}: safetensors is not installed; type pip install safetensors, or "
                        "give the weights as a .pth file") from None
    try:
        return load(path.read_bytes())
    except Exception as error:  # safetensors' own errors, and torch's on unknown types
        raise UserError(f"{path}: truncated, or not a safetensors file "
                        f"({str(error)[:80]})") from None


def readings(state, wanted):
    """Yields Found, each with one more prefix stripped."""
    prefix, norm, left_out = "", {}, ()
    while True:
        state, more, dropped = _apart(state, wanted)
        norm, left_out = norm | more, (*left_out, *dropped)
        yield Found(state, prefix, norm, left_out)
        common = [p for p in PREFIXES if 2 * sum(key.startswith(p) for key in state) > len(state)]
        if not common:
            return
        prefix += common[0]
        state = {key.removeprefix(common[0]): value for key, value in state.items()}


def _apart(state, wanted):
    """-> the network's tensors, the normalizer's {"mean", "std"}, names left out."""
    kept, norm, left_out = {}, {}, []
    for key, value in state.items():
        part = NORMALIZER.fullmatch(key)
        if key not in wanted and part:
            norm[part[1]] = value.float().flatten()
        elif key not in wanted and key.startswith(LEFT_OUT):
            left_out.append(key)
        else:
            kept[key] = value
    return kept, norm, tuple(left_out)


# --------------------------------------------------------------------- into a network

def fit(net, path, name, *, any_classes=False):
    """-> the network with the file's weights and the head that one of our scripts gave it;
    (mean, std) of its first layer if the file has them, else None.

    any_classes: the last layer gets as many outputs as in the file.
    """
    head = head_of(path)
    if head is None and any_classes:
        state, _ = read_state(path, name)
        wanted = net.state_dict()
        layer = f"{last_layer(net)[0]}.weight"
        value = max(readings(state, wanted), key=lambda one: one.fits(wanted)).state.get(layer)
        if value is not None and value.shape[1:] == wanted[layer].shape[1:]:
            head = "own", len(value)
    if head:
        with torch.random.fork_rng(devices=[]):
            net = with_head(net, *head, name)
    return net, load_state(net, path, name)


def load_state(net, path, name):
    """Loads the weights of a file, fp16 or fp32, into `net`; UserError if they do not fit.

    -> (mean, std) of the file's normalizer, each (C,), or None.
    """
    state, said = read_state(path, name)
    wanted = {key: value for key, value in net.state_dict().items()
              if not key.endswith("num_batches_tracked")}
    found = max(readings(state, net.state_dict()), key=lambda one: one.fits(wanted))
    matched = f"{found.fits(wanted)} of {len(wanted)} tensors match"
    if found.prefix:
        said.append(f"prefix {found.prefix} stripped")
    _check(found, wanted, path, name, ", ".join([matched, *said]))
    net.load_state_dict({key: value for key, value in found.state.items()
                         if key in net.state_dict()}, strict=False)
    norm = _normalizer(found.norm, path)
    if norm:
        said.append("its normalizer is the first layer, mean {} std {}".format(
            *(" ".join(f"{x:.3f}" for x in value.tolist()) for value in norm)))
    copies = [key for key in found.left_out if key.startswith("attacker.")]
    if copies:
        said.append(f"{len(copies)} tensors of attacker. left out")
    if said:
        print(f"{path}: {', '.join([matched, *said])}", flush=True)
    return norm


def _check(found, wanted, path, name, said):
    state = found.state
    extra = [key for key in state if key not in wanted and not key.endswith(UNUSED)]
    missing = [key for key in wanted if key not in state]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if extra or missing or wrong:
        raise UserError(f"{path}: not the weights of {name}: {said}; {len(missing)} tensors "
                        f"missing, {len(extra)} unknown, {len(wrong)} of another shape (first: "
                        f"{(wrong + missing + extra)[0]}); type the --model_name they belong to")


def _normalizer(norm, path):
    """(mean, std) of the entries, or None if there are none; UserError if they are unusable."""
    if not norm:
        return None
    mean, std = norm.get("mean"), norm.get("std")
    if mean is None or std is None or not (
            mean.shape == std.shape and len(mean) in (1, 3) and (std > 0).all()
            and mean.abs().max() <= 1):
        raise UserError(f"{path}: its normalizer has no mean and std of [0, 1] pixels, one or "
                        "three of each; remove its entries from the file, or give others")
    return mean, std
