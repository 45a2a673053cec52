"""Bad and hostile input to every command: exit status 2, one clear line, nothing run or written.

The bad flags of train_sga.py are in test_bad_input_train.py. A case damages one file of finished
runs, or names a bad one, and calls the command in this process.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SRC
from PIL import Image

from utils import named
from utils.cli import run_script as entry
from utils.nets import build_small

QUIET = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)  # ignored by Python too

SGA = ("train_sga.py", "--epochs", 1, "--num_images", 20, "--weights", "random", "--model_name",
       "mlp", "--amp", "off", "--layout", "contiguous", "--save", "new")
UAP = ("eval_uap.py", "--uaps", "sga", "--model_name", "mlp", "--weights", "free/natural_mlp.pth",
       "--num_images", 20, "--save", "new")
GCM = ("gcm.py", "--model_name", "mlp", "--weights", "free/natural_mlp.pth", "--num_images", 40,
       "--attacks", "fgsm", "--batch_size", 50, "--save", "new")
FREE = ("free_at.py", "--method", "natural", "--model_name", "mlp", "--epochs", 1, "--num_images",
        100, "--batch_size", 64, "--save", "new")
STAGE = ("train_gcm.py", "--epochs", 1, "--num_images", 60, "--batch_size", 50, "--workers", 0,
         "--augment", "rain", "--save", "new")
TASK = ("fgsm_mnist.py", "--train", "fgs", "--epochs", 1, "--num_images", 40, "--eval_images", 4,
        "--queries", 2, "--save", "new")
NETS = ("eval_net.py", "--runs", "free", "--num_images", 40, "--attacks", "fgsm", "--save", "new")
DRAW = ("figures.py", "--out", "new.png")
OWN = ("train_gcm.py", "--data_dir", "list", "--model_name", "squeezenet1_1", "--image_size", 32,
       "--epochs", 1, "--batch_size", 2, "--workers", 0, "--augment", "none", "--head", "own",
       "--hold_out", 0.3, "--save", "new")


def again(command, folder, *more):
    """The same command in the folder of its finished run."""
    return (*command[:-1], folder, *more)


# ------------------------------------------------------------------------------ content

class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved(value, **options):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for deprecated formats
        torch.save(value, buffer, **options)
    return buffer.getvalue()


def script_module():
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_of(descr, shape, body=b""):
    """A .npy file with this header and any body."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npz_of_terabytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for key in ("x", "x_adv", "delta"):
            file.writestr(f"{key}.npy", npy_of("<f4", (3, 1 << 20, 1 << 20)))
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=28, height=28, text=b"", pixels=None):
    """A grey picture; it need not have as many pixels as its header claims."""
    pixels = bytes(height * (width + 1)) if pixels is None else pixels
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0,
                                                              0))
            + (chunk(b"tEXt", b"delta_gain\0" + text) if text else b"")
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def text_bomb():
    bomb = chunk(b"zTXt", b"delta_gain\0\0" + zlib.compress(b"1" * 100_000_000))
    return png()[:33] + bomb + png()[33:]


BOMB = png(30_000, 30_000, pixels=b"0" * 1000)
MLP = build_small("mlp", 1, 28).state_dict()
HOLDS_MORE = ("holds more than tensors", "not executed")
def zipped(compression=zipfile.ZIP_STORED, **entries):
    """A zip archive; entry names need not be Python identifiers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def deflated(archive):
    """The same zip archive, compressed; torch can open it."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return zipped(zipfile.ZIP_DEFLATED, **{name: file.read(name) for name in file.namelist()})


PICKLES = {f"protocol {k}": pickle.dumps(Bomb(), k) for k in range(6)}
FOREIGN = {  # content of a .pth that is refused: words of the line
    **{name: (content, HOLDS_MORE) for name, content in PICKLES.items()},
    "archive of protocol 4": (saved({"a": torch.zeros(3)}, pickle_protocol=4), HOLDS_MORE),
    "archive with code": (saved({"a": Bomb()}), HOLDS_MORE),
    "archive of protocol 4 with code": (saved({"a": Bomb()}, pickle_protocol=4), HOLDS_MORE),
    "old format of protocol 4": (saved({"a": torch.zeros(3)}, pickle_protocol=4,
                                       _use_new_zipfile_serialization=False), HOLDS_MORE),
    "old format with code": (saved({"a": Bomb()}, _use_new_zipfile_serialization=False),
                             HOLDS_MORE),
    "TorchScript": (script_module(), HOLDS_MORE),
    "zip with a pickle": (zipped(**{"archive/data.pkl": PICKLES["protocol 2"],
                                    "archive/version": b"3"}), HOLDS_MORE),
    "zip of a pickle elsewhere": (zipped(**{"../../data.pkl": PICKLES["protocol 2"]}),
                                  ("truncated",)),
    "bomb of zeros": (deflated(saved({"a": torch.zeros(10 ** 6)})), ("unpacks to 4000",)),
    "web page": (b"<!DOCTYPE html><html>not found</html>", ("not a .pth file", "torch.save")),
    "pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", ("not a .pth file",)),
    "empty": (b"", ("truncated",)), "cut off": (saved(MLP)[:5000], ("truncated",)),
    "cut off pickle": (PICKLES["protocol 4"][:9], ("not a .pth file",))}

# ------------------------------------------------------------------------------ the table

CASES = {}  # name: (command, {file: content}, words of the line)


def case(name, command, words, **files):
    """files: {path: content}; content is bytes, text, or a function of the path."""
    assert name not in CASES, name
    CASES[name] = (command, files, words)


PTH = {  # reader of a .pth: (command, file)
    "weights": ((*SGA, "--weights", "x.pth"), "x.pth"),
    "pretrained, free": ((*FREE, "--pretrained", "x.pth"), "x.pth"),
    "pretrained, challenge": ((*STAGE, "--pretrained", "x.pth"), "x.pth"),
    "uaps": ((*UAP, "--uaps", "x.pth"), "x.pth"),
    "uaps of networks": ((*NETS, "--uaps", "x.pth"), "x.pth"),
    "gcm": ((*GCM, "--weights", "x.pth"), "x.pth"),
    "runs": (NETS, "free/natural_mlp.pth"),
    "resume sga": (again(SGA, "sga", "--resume"), "sga/checkpoint.pth"),
    "resume free": (again(FREE, "free", "--resume"), "free/checkpoint.pth"),
    "resume challenge": (again(STAGE, "stage1", "--resume"), "stage1/checkpoint.pth"),
    "resume exercise": (again(TASK, "task", "--resume"), "task/seed0/checkpoint.pth")}
for place, (command, file) in PTH.items():
    everywhere = ("protocol 0", "protocol 4", "protocol 5")
    for content in FOREIGN if place in ("weights", "uaps") else everywhere:
        case(f"{content} as {place}", command, (file, *FOREIGN[content][1]),
             **{file: FOREIGN[content][0]})

for name, value, words in (
        ("sparse", torch.eye(28).to_sparse(), "plain tensor"),
        ("meta", torch.zeros((1, 28, 28), device="meta"), "plain tensor"),
        ("complex", torch.zeros((1, 28, 28), dtype=torch.complex64), "complex64"),
        ("endless", torch.zeros(1).expand(3, 10 ** 6, 10 ** 6), "4096 pixels a side"),
        ("none of a side", torch.zeros((1, 28, 0)), "shape (1, 28, 0)"),
        ("beyond float32", torch.full((1, 28, 28), 1e300, dtype=torch.float64), "infinite")):
    case(f"{name} tensor as uaps", (*UAP, "--uaps", "x.pth"), ("x.pth", words),
         **{"x.pth": saved(value)})
for name, value, words in (
        ("numbered", {1: torch.zeros(2)}, "not a state dict"),
        ("sparse", {k: v.to_sparse() for k, v in MLP.items()}, "not a state dict"),
        ("NaN", {k: v * float("nan") for k, v in MLP.items()}, "not finite"),
        ("a list", [torch.zeros(2)], "not a state dict"), ("a number", 3, "not a state dict")):
    case(f"{name} weights", (*SGA, "--weights", "x.pth"), ("x.pth", words),
         **{"x.pth": saved(value)})

CHW = np.zeros((1, 28, 28), np.float32)
for name, content, words in (
        ("of 17 TiB", npy_of("<f4", (3, 1_300_000, 1_300_000)), "truncated"),
        ("of more bytes than there are numbers", npy_of("<f4", (1 << 40, 1 << 40, 3)), "truncated"),
        ("of negative sides", npy_of("<f4", (3, -28, -28), bytes(9408)), "truncated"),
        ("of a side of -1", npy_of("<f4", (-1, 28, 28), bytes(3136)), "truncated"),
        ("of no side", npy_of("<f4", (0, 10 ** 18, 10 ** 18)), "truncated"),
        ("of sides that are no integers", npy_of("<f4", (1.0, 28, 28), bytes(3136)), "truncated"),
        ("of objects", npy(np.array([Bomb()], object)), "more than numbers"),
        ("of code in its header", npy_of("<f4", "__import__('os').mkdir('ran')"), "truncated"),
        ("of a nested header", npy_of("<f4", "(" * 60), "truncated"),
        ("of a header of 4 GiB", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "truncated"),
        ("of complex numbers", npy(CHW.astype(complex)), "complex128"),
        ("of dates", npy(CHW.astype("M8[s]")), "datetime64"),
        ("of bytes", npy(CHW.astype(np.uint8)), "uint8"),
        ("of records", npy(np.zeros((1, 28, 28), [("a", "f4"), ("b", "f4")])), "type"),
        ("beyond float32", npy(np.full((1, 28, 28), 1e300)), "infinite"),
        ("that is an .npz", npz(a=CHW), "truncated"), ("cut off", npy(CHW)[:1000], "truncated"),
        ("that is empty", b"", "truncated"),
        ("that is a pickle", PICKLES["protocol 4"], "truncated"),
        ("of another shape", npy(CHW[0]), "shape (28, 28)")):
    case(f".npy {name}", (*UAP, "--uaps", "x.npy"), ("x.npy", words), **{"x.npy": content})

for name, content, words in (
        ("bomb", BOMB, "decompression bomb"), ("bomb of text", text_bomb(), "too large"),
        ("cut off", png()[:45], "truncated"), ("that is empty", b"", "cannot identify"),
        ("that is a line", png(3000, 2), "not a line"), ("that is text", b"hello", "identify")):
    case(f"picture {name} to --augmentations", (*DRAW, "--augmentations", "--image", "x.png"),
         ("x.png", words), **{"x.png": content})
    case(f"picture {name} as uaps", (*UAP, "--uaps", "x.png", "--scale", 255), ("x.png", words),
         **{"x.png": content})
for gain in (b"0", b"-1", b"9" * 400, b"many"):
    case(f"a gain of {gain[:4].decode()}", (*UAP, "--uaps", "x.png"), ("x.png", "delta_gain"),
         **{"x.png": png(text=gain)})
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) (w) file\n"
case("PostScript as a picture", (*DRAW, "--augmentations", "--image", "x.png"),
     ("x.png", "cannot identify"), **{"x.png": POSTSCRIPT})
case("no image", (*DRAW, "--augmentations", "--image", "none.png"), ("none.png", "no such file"))
case("a folder as image", (*DRAW, "--augmentations", "--image", "free"), ("free", "no such file"))
case("a terabyte of contact sheet", (*DRAW, "--augmentations", "--image_size", 10 ** 6),
     ("--image_size", "at most 2048"))

for place, suffixes in (("uaps", ("pth", "npy", "png")), ("weights", ("pth",))):
    command = UAP if place == "uaps" else SGA
    for suffix in suffixes:
        file = f"x.{suffix}"
        for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir),
                           ("loop", lambda path: os.symlink(os.path.basename(path), path)),
                           ("endless device", lambda path: os.symlink("/dev/zero", path))):
            case(f"{name} as .{suffix} {place}", (*command, f"--{place}", file), (file,),
                 **{file: make})

for script, command in (("sga", SGA), ("uap", UAP), ("gcm", GCM), ("free", FREE), ("stage", STAGE),
                        ("task", TASK), ("nets", NETS)):
    case(f"--save in a file, {script}", (*command, "--save", "free/log.csv/run"),
         ("free/log.csv/run", "cannot write there"))
    case(f"--data_dir of bad bytes, {script}", (*command, "--data_dir", os.fsdecode(b"\xff")),
         ("--data_dir",))
    case(f"a stray word of two lines, {script}", (*command, "stray\nword"), ("stray word",))
    case(f"--batch_size beyond a tensor, {script}", (*command, "--batch_size", 10 ** 30),
         ("--batch_size", "at most 1000000000"))
    if script not in ("gcm", "nets", "stage"):
        flag = "--alpha_fgs" if script == "task" else "--eps"
        case(f"{flag} beyond floats, {script}", (*command, flag, "1e400"), (flag, "outside (0, 1]"))
case("labels without end", (*NETS[:1], "--model_name", "squeezenet1_1", "--weights", "random",
                            "--data_dir", "list/images", "--labels", "/dev/zero"),
     ("--labels /dev/zero", "no such file"))
for flags, words in ((("--eps", 2), ("--eps 2", "8/255")), (("--norm", "l2"), ("without --eps",)),
                     (("--norm", "l2", "--eps", 1), ("--attacks fgsm --norm l2", "only in Linf")),
                     (("--norm", "l1", "--eps", 1, "--attacks", "none", "--eps_curve"),
                      ("--eps_curve --norm l1", "only in Linf"))):
    case(f"a norm with {' '.join(map(str, flags))}", (*NETS, *flags), words)
case("eps of a hundred million digits", (*NETS, "--eps", "1e-99999999999"), ("--eps",))
case("--lr beyond float32", (*FREE, "--lr", 1e39), ("--lr", "at most 1e+30"))
case("--beta inf", (*SGA, "--beta", "inf"), ("--beta", "at most 1e+30"))
case("--shift beyond the image", (*FREE, "--shift", 33), ("--shift", "at most 32"))
for chosen in ("phase1,rain", "rain,all"):
    case(f"--augment {chosen}", (*STAGE, "--augment", chosen),
         (f"--augment {chosen}: ", "cannot be combined", "names of operations"))
for chosen in ("phase1", "released"):
    case(f"--p beside {chosen}", (*STAGE, "--augment", chosen, "--p", 0.1),
         ("--p 0.1", f"{chosen} has probabilities of its own"))
case("--p of no operation", (*STAGE, "--augment", "none", "--p", 0.1),
     ("--p 0.1", "--augment none has no operations"))
case("--shift of images that are not cropped", (*FREE, "--shift", 2), ("--shift 2", "digits"))
for flag in (("--defense", "gcm"), ("--low", 20)):
    case(f"{flag[0]} beside --runs", (*NETS, *flag), ("--runs", "a run has its own"))
case("--momentum nan", (*SGA, "--momentum", "nan"), ("--momentum",))
case("--out that is no PNG", ("figures.py", "--augmentations", "--out", "free/log.csv"), ("PNG",))

# NAME.json, results.json and the other files of a run
for name, content in (("cut off", '{"a": 1'), ("empty", ""), ("nested", "[" * 100_000),
                      ("binary", bytes(range(256))),
                      ("of a huge number", '{"scale": ' + "9" * 5000)):
    for place, (command, file) in {
            "a perturbation": ((*UAP, "--uaps", "sga/sga_mlp.pth"), "sga/sga_mlp.json"),
            "a run": (NETS, "free/natural_mlp.json"),
            "weights": ((*SGA, "--weights", "free/natural_mlp.pth"), "free/natural_mlp.json"),
            "a table of gcm": (again(GCM, "gcm"), "gcm/results.json"),
            "a table of networks": (again(NETS, "nets"), "nets/results.json"),
            "a picture": ((*DRAW, "--uaps", "eval"), "eval/results.json")}.items():
        case(f"JSON {name} of {place}", command, (file, "not JSON"), **{file: content})


def edited(*keys, value):
    """A function that puts `value` into a JSON file; int k stands for the k-th key of a dict."""
    def write(path):
        whole = part = json.loads(Path(path).read_text())
        for i, key in enumerate(keys):
            key = list(part)[key] if isinstance(part, dict) and isinstance(key, int) else key
            if i == len(keys) - 1:
                part[key] = value
            part = part[key]
        Path(path).write_text(json.dumps(whole))
    return write


def changed(**new):
    """A function that puts these values into a checkpoint."""
    def write(path):
        torch.save({**torch.load(path, weights_only=True), **new}, path)
    return write


STAGE1 = "stage1/stage1_cnn_bn.json"
for key, value in (("head", None), ("head", []), ("head", "wall"), ("classes", 3), ("classes", []),
                   ("classes", None)):
    for place, command in {
            "weights": (*SGA, "--model_name", "cnn_bn", "--weights", "stage1/stage1_cnn_bn.pth"),
            "pretrained": (*STAGE, "--pretrained", "stage1/stage1_cnn_bn.pth"),
            "runs": (*NETS, "--runs", "stage1")}.items():
        case(f"{key} {value} of {place}", command, (STAGE1, key), **{STAGE1: edited(
            key, value=value)})
for key, value in (("eps", "x"), ("eps", float("nan")), ("alpha", -1), ("steps", 10 ** 30),
                   ("kind", []), ("data_dir", None), ("image_size", True), ("model_name", {})):
    case(f"{key} {value} of a run", NETS, ("free/natural_mlp.json", key),
         **{"free/natural_mlp.json": edited(key, value=value)})
for key, value in (("hold_out", 10 ** 30), ("given_images", 10 ** 30), ("augment", [3]),
                   ("w_fgsm", float("inf")), ("stage", "1"), ("low", -5), ("image_size", 10 ** 9)):
    case(f"{key} {value} of a stage", (*NETS, "--runs", "stage1"), (STAGE1, key),
         **{STAGE1: edited(key, value=value)})
case("a device as the data of a run", NETS, ("/dev/zero", "no such folder"),
     **{"free/natural_mlp.json": edited("data_dir", value="/dev/zero")})
for value in (None, [], "x", -1, 1e400, 2.5, {}):
    for key in ("n", "draws", "before", "after", "seconds", "queries", "title"):
        if (key, value) in (("title", "x"), ("seconds", 2.5)):
            continue
        case(f"{key} {value} of a cell of gcm", again(GCM, "gcm"),
             ("gcm/results.json", "older" if (key, value) == ("before", "x") else "damaged"),
             **{"gcm/results.json": edited("cells", 0, key, value=value)})
for keys, value in ((("cells",), 3), (("settings",), []), (("cells", 0), "x")):
    case(f"{keys} {value} of a table", again(NETS, "nets"), ("nets/results.json", "not a table"),
         **{"nets/results.json": edited(*keys, value=value)})
case("n of a cell of networks", again(NETS, "nets"), ("nets/results.json", "damaged"),
     **{"nets/results.json": edited("cells", 0, "n", value=41)})

for flag, folder in (("--uaps", "eval"), ("--examples", "eval"), ("--exercise", "task"),
                     ("--corruptions", "nets")):
    for content in ("[]", "{}", "null", '{"cells": 3, "rows": 3, "uaps": 3, "facts": 3}'):
        case(f"{content} for {flag}", (*DRAW, flag, folder), (flag, folder),
             **{f"{folder}/results.json": content})
for name, content in (("junk", b"junk"), ("empty", b""),
                      ("zeros without end", zipped(zipfile.ZIP_DEFLATED, **{
                          f"{key}.npy": npy(np.zeros(10 ** 6)) for key in ("x", "seen", "y")})),
                      ("objects", npz(x=np.array([Bomb()], object))), ("others", npz(a=CHW)),
                      ("terabytes", npz_of_terabytes()),
                      ("shapes", npz(x=CHW[0], x_adv=CHW[0], delta=CHW[0], before=[1], after=[1],
                                     target="a", uap="b", seen=[[1]], y=[1]))):
    case(f"examples.npz of {name}", (*DRAW, "--examples", "eval"), ("eval",),
         **{"eval/examples.npz": content})
    case(f"examples.npz of {name} in an exercise", (*DRAW, "--exercise", "task"), ("task",),
         **{"task/examples.npz": content})
    case(f"examples.npz of {name} in a summary", (*TASK[:1], "--summary", "task", "--save", "new"),
         ("task",), **{"task/examples.npz": content})
for name, content in (("empty", ""), ("other columns", "a,b\n1,x\n"),
                      ("binary", bytes(range(256)))):
    case(f"log.csv {name}", (*TASK[:1], "--summary", "task", "--save", "new"), ("task",),
         **{"task/seed0/log.csv": content})
for name, keys, value in (
        ("no facts", ("facts",), None), ("facts that are a text", ("facts",), "variation"),
        ("no seeds", ("seeds",), []), ("seeds that are a number", ("seeds",), 3),
        ("a number for a figure", ("seeds", 0, "fgs"), 3),
        ("a text for a value", ("seeds", 0, "fgs", "value"), "x"),
        ("a seed elsewhere", ("seeds", 0, "seed"), "../../../etc")):
    case(f"an exercise with {name}", (*TASK[:1], "--summary", "task", "--save", "new"), ("task",),
         **{"task/results.json": edited(*keys, value=value)})

# checkpoints of other runs, and with the right flags but wrong content
case("a perturbation resumed as a network", again(FREE, "sga", "--resume"), ("--resume", "sga"))
case("a network resumed as a perturbation", again(SGA, "free", "--resume"), ("--resume", "free"))
case("more epochs of free training", again(FREE, "free", "--resume", "--epochs", 2),
     ("--epochs", "size of its steps depends on it"))
for key, value in (("rows", None), ("rows", "x"), ("rows", [3]), ("rows", torch.zeros(3)),
                   ("generator", 3), ("generator", torch.zeros(3)), ("flags", 3), ("flags", None)):
    for command, folder in ((SGA, "sga"), (FREE, "free"), (STAGE, "stage1"), (TASK, "task")):
        file = f"{folder}/seed0/checkpoint.pth" if folder == "task" else f"{folder}/checkpoint.pth"
        case(f"{key} {value} in the checkpoint of {folder}", again(command, folder, "--resume"),
             (file,), **{file: changed(**{key: value})})
for key, value in (("delta", None), ("delta", [3]), ("delta", torch.zeros(3)), ("v", {}),
                   ("labels", None), ("labels", torch.zeros(3))):
    case(f"{key} {value} in the checkpoint of a perturbation", again(SGA, "sga", "--resume"),
         ("sga/checkpoint.pth",), **{"sga/checkpoint.pth": changed(**{key: value})})
for key, value in (("net", {}), ("optimizer", None), ("delta", None)):
    case(f"{key} {value} in the checkpoint of a network", again(FREE, "free", "--resume"),
         ("free/checkpoint.pth",), **{"free/checkpoint.pth": changed(**{key: value})})

# image lists
for name, content, words in (
        ("empty", "", "no images"), ("without a class", "0.jpg\n", "line 1"),
        ("of a missing file", "9.jpg 0\n", "no file 9.jpg"),
        ("of a folder", "images 0\n", "no file"),
        ("that leaves its folder", "0.jpg 0\n../../free/x.png 1\n", "leads out of the folder"),
        ("that leaves it in the middle", "a/../../../x.png 1\n",
         "leads out of the folder"),
        ("of an absolute path", "0.jpg 0\n/etc/x.png 1\n", "leads out of the folder"),
        ("of a pipe", "pipe.jpg 0\n", "no file"), ("binary", bytes(range(256)), "not text"),
        ("of a huge class", "0.jpg 1000000000\n1.jpg 0\n", "at most 6 digits"),
        ("of a class of 5000 digits", f"0.jpg {'9' * 5000}\n1.jpg 0\n", "at most 6 digits"),
        ("of a name that is too long", "a" * 300 + " 0\n", "too long"),
        ("of a superscript", "0.jpg \u00b2\n" * 9, "one class"),
        ("of one class", "0.jpg 0\n" * 9, "one class")):
    case(f"image list {name}", OWN, (words,), **{"list/label.txt": content})
for name, content, words in (
        ("nested", "[" * 100_000, "not JSON"), ("of numbers", '{"a": 3}', "not an image list"),
        ("that leaves its folder", '[["0.jpg", 0], ["../x.png", 1]]', "leads out of the folder"),
        ("empty", "{}", "no images"), ("of a surrogate", '[["\\udcff.jpg", 0]]', "no file"),
        ("of zero bytes", '[["0\\u0000.jpg", 0]]', "no file")):
    case(f"JSON list {name}", OWN, (words,), **{"list/train.json": content})
case("an image whose name is no UTF-8", OWN, ("\\udcff.jpg", "not UTF-8"),
     **{"list/a/0.jpg": png(), "list/b/1.jpg": png(), os.fsdecode(b"list/b/\xff.jpg"): png()})


def idx(*sides, body=b""):
    """A file in MNIST's format."""
    return struct.pack(f">HBB{len(sides)}I", 0, 8, len(sides), *sides) + body


IMAGES, LABELS = idx(20, 28, 28, body=bytes(20 * 784)), idx(20, body=bytes(20))
for name, images, labels, words in (
        ("junk", b"junk", LABELS, "damaged"), ("empty", b"", LABELS, "damaged"),
        ("cut off", IMAGES[:999], LABELS, "damaged"),
        ("huge", idx(2 ** 31, 2 ** 31, 28, body=bytes(99)), LABELS, "damaged"),
        ("without images", idx(0, 28, 28), idx(0), "damaged"),
        ("of 5 pixels", idx(20, 5, 5, body=bytes(500)), LABELS, "(20, 5, 5)"),
        ("of class 99", IMAGES, idx(20, body=bytes([99] * 20)), "labels up to 99"),
        ("of fewer labels", IMAGES, idx(10, body=bytes(10)), "10 labels")):
    case(f"MNIST {name}", (*TASK, "--data_dir", "raw"), ("raw", words), **{
        f"raw/MNIST/raw/{split}-{kind}-ubyte": content for split in ("train", "t10k")
        for kind, content in (("images-idx3", images), ("labels-idx1", labels))})

# ------------------------------------------------------------------------------ the tests

def call(folder, name, *args):
    """Run a command in `folder`, in this process. -> exit status, stderr, warnings for users"""
    module, out, err = importlib.import_module(Path(name).stem), io.StringIO(), io.StringIO()
    before, argv, code = os.getcwd(), sys.argv, 0
    try:
        os.chdir(folder)
        sys.argv = [name, *map(str, args)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            entry(module.get_args, module.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return code, err.getvalue(), [w for w in warned if not issubclass(w.category, QUIET)]


def finish_runs(folder):
    """Create a finished run of every command, and images for lists, in this empty folder."""
    for command in (again(FREE, "free"), again(SGA, "sga"), again(STAGE, "stage1"),
                    again(TASK, "task"), again(UAP, "eval"),
                    again(GCM, "gcm"), again(NETS, "nets")):
        code, err, _ = call(folder, *command)
        assert code == 0, err
    (folder / "list/images").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (40, 40)).save(folder / f"list/images/{i}.jpg")
    os.mkfifo(folder / "list/images/pipe.jpg")


def place(files, folder):
    """Write the files of a case into the folder."""
    for file, content in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of every command, and its contents; digits are read once."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "_digits", cache(named._digits))
        finish_runs(folder)
        yield folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(finished):
    """That folder, which a test may damage; it is restored afterwards."""
    folder, contents = finished
    before = state_of(folder)
    yield folder
    for lock in folder.rglob(".lock"):  # an error's traceback may still hold it
        lock.unlink()
    after = state_of(folder)
    for path in sorted(after.keys() - before.keys(), reverse=True):  # contents before folders
        path.rmdir() if stat.S_ISDIR(after[path][0]) else path.unlink()
    for path in before:
        if after.get(path) != before[path] and path in contents:
            path.unlink(missing_ok=True)
            path.write_bytes(contents[path])


def state_of(folder):
    """{path: mode, and for files inode, modification time and size}; without locks."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            about = path.lstat()
            found[path] = (about.st_mode,) if name in folders else (
                about.st_mode, about.st_ino, about.st_mtime_ns, about.st_size)
    return {path: about for path, about in found.items() if path.name != ".lock"}


def written(folder):
    """The same for files only: a command may create its run folder before it stops."""
    return {path: about for path, about in state_of(folder).items() if not stat.S_ISDIR(about[0])}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_one_clear_line_and_runs_and_writes_nothing(name, here):
    command, files, words = CASES[name]
    place(files, here)
    before = written(here)
    code, err, warned = call(here, *command)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err[-2000:]
    assert len(lines) == 1 and lines[0].startswith("error: "), err[-2000:]
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert not warned, warned[0]
    assert written(here) == before
    assert not list(here.rglob("ran"))


@pytest.mark.parametrize("name", ["protocol 4 as uaps", "picture bomb to --augmentations"])
def test_bad_input_gives_one_clear_line_in_a_separate_process(name, finished, tmp_path, run_script,
                                                              refused):
    """Where Python itself prints its warnings."""
    command, files, words = CASES[name]
    shutil.copytree(finished[0] / "free", tmp_path / "free")
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    lines = refused(run_script(*command), *words)
    assert "Warning" not in lines


@pytest.mark.parametrize("kind", [">f4", ">f8", "<f2", ">i2", "longdouble"])
def test_an_npy_file_of_any_signed_type_is_read_as_float32(kind, tmp_path):
    from utils.uaps import read_uap

    values = np.arange(784).reshape(1, 28, 28) % 20 - 9.0
    (tmp_path / "x.npy").write_bytes(npy(values.astype(kind)))
    delta = read_uap(tmp_path / "x.npy", scale="255", eps=1).delta
    assert torch.equal(delta, torch.from_numpy(values).float() / 255)


@pytest.mark.parametrize(("name", "content"), [
    ("bomb.png", BOMB), ("line.png", png(3000, 2)), ("text.png", text_bomb()),
    ("cut.png", png()[:45])], ids=str)
def test_a_decompression_bomb_among_photographs_is_skipped_like_a_broken_file(name, content,
                                                                              tmp_path):
    for label in "ab":
        for i in range(3):
            path = tmp_path / f"data/{label}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (i * 40, 0, 0)).save(path)
    (tmp_path / "data/a" / name).write_bytes(content)
    code, err, warned = call(tmp_path, "train_sga.py", "--data_dir", "data", "--model_name",
                             "squeezenet1_1", "--weights", "random", "--image_size", 32, "--epochs",
                             1, "--workers", 0, "--amp", "off", "--layout", "contiguous", "--save",
                             "run")
    assert code == 0 and not warned, err
    lines = [line for line in err.splitlines() if line.strip() and "\r" not in line]
    assert lines == [f"warning: data/a/{name}: cannot be decoded, skipped"]


def test_a_large_photograph_is_read_without_a_warning(tmp_path, monkeypatch):
    from utils.data import read_image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "x.png").size == (40, 40)


def test_class_names_are_drawn_verbatim(tmp_path):
    """LaTeX syntax is not rendered, and letters that the font lacks give no warning."""
    from utils import draw

    x = torch.rand((1, 1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw.examples(x, x, x[0], ["$\\frac{"], ["\U0001f600$ $x"], "$\\a{ title $")


@pytest.mark.parametrize("script", ["train.sh", "train_gcm.sh", "gen_gcm_eval.sh"])
@pytest.mark.parametrize("processes", ["abc", "2x", "0", "-1"])
def test_the_number_of_processes_must_be_a_number(script, processes, tmp_path):
    result = subprocess.run(["sh", str(SRC / script)], cwd=tmp_path, capture_output=True,
                            text=True, check=False, env={**os.environ, "PROCESSES": processes})
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert result.stderr == (f"error: PROCESSES={processes}: wanted a number, 1 or more; type "
                             "PROCESSES=4\n")
