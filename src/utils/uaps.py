"""Universal perturbations read from files of any origin, which are never trusted:

    .pth    a plain tensor (C, H, W) or (1, C, H, W), or a dict that holds one
    .npy    the same, also (H, W, C)
    .png    grey level 128 is zero; 1/255 is `delta_gain` levels if the file says so
    folder  every perturbation below it that has a NAME.json
"""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils import draw
from utils.errors import UserError
from utils.run import (
    is_plain,
    load_json,
    load_pth,
)

LARGEST = 4096  # pixels per side
TOLERANCE = 0.01 / 255  # above eps: 1/100 of a grey level, more than fp16 rounding needs


@dataclass(frozen=True, eq=False)
class Uap:
    """A perturbation on the [0, 1] scale, float32 (C, H, W), with the facts saved by its run."""
    name: str
    path: Path
    delta: torch.Tensor
    facts: dict = field(default_factory=dict)

    @property
    def largest(self):
        """max |delta|, in steps of 1/255."""
        return self.delta.abs().max().item() * 255


def rounded(delta):
    """delta rounded to the 8-bit grid k/255, or None if it already lies on it."""
    grid = (delta * 255).round() / 255
    return None if torch.allclose(delta, grid, rtol=0, atol=1e-6) else grid


# --------------------------------------------------------------------- reading

def find_uaps(paths, kind):
    """The files as given; a folder stands for its perturbations made on this kind of data.

    Networks trained into the same folder are left out: their facts have no `scale`.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        below = [file for p in sorted(path.rglob("*.json")) if (file := _beside(p))
                 and _facts(p).get("kind") == kind and "scale" in _facts(p)]
        if not below:
            raise UserError(f"--uaps {path}: no perturbation for {kind} images in this folder; "
                            "make one with train_sga.py, or type the name of a file")
        found += below
    return list(dict.fromkeys(found))


def read_uaps(paths, *, scale, eps):
    """[Uap] with unique names; see read_uap."""
    uaps = [read_uap(path, scale=scale, eps=eps) for path in paths]
    for form in (lambda p: p.stem, lambda p: f"{p.parent.name}/{p.stem}", str):
        names = [form(path) for path in paths]
        if len(set(names)) == len(names):
            break
    return [replace(uap, name=name) for uap, name in zip(uaps, names, strict=True)]


def read_uap(path, *, scale, eps):
    """One perturbation. scale: 'auto', '1' or '255', used if NAME.json does not give it; eps in
    [0, 1].

    UserError: no file, truncated, holds code, wrong shape, NaN, unclear scale, over eps.
    """
    path = Path(path)
    facts = _facts(path.with_suffix(".json"))
    known = str(int(facts["scale"])) if facts.get("scale") in (1, 255) else None
    if path.suffix == ".npy":
        values = _load_npy(path)
    elif path.suffix == ".png":
        values, marked = draw.decode_delta(path)
        if not marked and scale != "255":
            raise UserError(f"{path}: a PNG that does not say what its grey levels mean; type "
                            "--scale 255 if 128 is zero and one level is 1/255")
        known = "1"  # already decoded to [0, 1]
    elif path.suffix in (".pth", ".pt"):
        values = _tensor_in(load_pth(path), path)
    else:
        raise UserError(f"{path}: not a perturbation format; wanted .pth, .npy or .png")
    values = _to_chw(values, path)
    bad = int((~values.isfinite()).sum())
    if bad:
        raise UserError(f"{path}: {bad} of {values.numel()} values are NaN or infinite")
    factor = _decide_scale(values, known or (None if scale == "auto" else scale), path)
    uap = Uap(path.stem, path, values / factor, facts)
    if uap.delta.abs().max() > eps + TOLERANCE:
        raise UserError(f"{path}: largest |delta| is {uap.largest:.2f}/255, over --eps "
                        f"{eps * 255:g}/255; type --eps {uap.largest:.4g}/255 to allow it")
    return uap


def _beside(facts):
    """The file that NAME.json describes: NAME.pth, .pt, .npy or .png, or None."""
    files = (facts.with_suffix(suffix) for suffix in (".pth", ".pt", ".npy", ".png"))
    return next((file for file in files if file.is_file()), None)


def _facts(path):
    """The facts in NAME.json; {} if there is no such file or it holds no dict."""
    facts = load_json(path) if path.is_file() else {}
    return facts if isinstance(facts, dict) else {}


def _load_npy(path):
    """The file's numbers as float32; type and shape are checked before any is read."""
    if not path.is_file():
        raise UserError(f"{path}: " + ("a folder, wanted a file" if path.is_dir() else
                                       "no such file"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about headers written by Python 2
            values = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises almost anything on a broken file
        reason = str(error).split("\n")[0][:80]
        raise UserError(f"{path}: truncated, or holds more than numbers ({reason})") from None
    if values.dtype.kind not in "fi":
        raise UserError(f"{path}: values of type {values.dtype}; wanted signed numbers")
    _check_shape(values.shape, path)
    with np.errstate(over="ignore"):  # float32 overflow becomes infinite, and is refused
        return torch.from_numpy(values.astype(np.float32))


def _tensor_in(value, path):
    """The tensor itself, or the only perturbation-shaped one in a dict."""
    if isinstance(value, dict):
        fit = {k: v for k, v in value.items()
               if torch.is_tensor(v) and v.ndim in (3, 4) and 1 not in v.shape[-2:]}
        if len(fit) != 1:
            raise UserError(f"{path}: a dict with {len(fit)} tensors that could be a perturbation "
                            f"({', '.join(map(str, fit)) or 'none'}); save the one as a tensor")
        value = next(iter(fit.values()))
    if not is_plain(value) or value.dtype in (torch.uint8, torch.bool):
        raise UserError(f"{path}: holds {getattr(value, 'dtype', type(value).__name__)}; wanted a "
                        "plain tensor of signed numbers (3, H, W)")
    return value


def _check_shape(shape, path):
    """UserError unless this is the shape of a perturbation."""
    inner = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    if len(inner) != 3 or not {inner[0], inner[-1]} & {1, 3} or min(inner) < 1 \
            or max(inner) > LARGEST:
        raise UserError(f"{path}: shape {tuple(shape)}; wanted (3, H, W) or (1, 3, H, W), of at "
                        f"most {LARGEST} pixels a side")


def _to_chw(values, path):
    _check_shape(values.shape, path)
    values = values[0] if values.ndim == 4 else values
    if values.shape[0] not in (1, 3):
        values = values.permute(2, 0, 1)  # TensorFlow's order
    return values.detach().float().contiguous()


def _decide_scale(values, scale, path):
    """The divisor of the values, 1 or 255; UserError if both are plausible."""
    largest = values.abs().max().item()
    if scale is None:  # over 1 is not in [0, 1]; half a grey level is no perturbation
        scale = "255" if largest > 1 else "1" if largest <= 0.5 else None
    if scale is None:
        raise UserError(f"{path}: largest |value| is {largest:.3g}, which may be on the [0, 1] or "
                        "on the 0-255 scale; type --scale 1 or --scale 255")
    return int(scale)


def fit_size(uap, size, channels, eps, resize):
    """delta as (C, size, size), resized if `resize`; UserError if it does not fit."""
    c, h, w = uap.delta.shape
    if c != channels:
        raise UserError(f"{uap.path}: {c} channels; these images have {channels}")
    if (h, w) == (size, size):
        return uap.delta
    if not resize:
        raise UserError(f"{uap.path}: {h} x {w} pixels, the target takes {size} x {size}; type "
                        "--resize to scale the perturbation, or --image_size to scale the images")
    delta = F.interpolate(uap.delta[None], size=(size, size), mode="bilinear",
                          align_corners=False, antialias=True)[0]
    return delta.clamp(-eps, eps)
