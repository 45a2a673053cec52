"""Runs: device, seed, provenance, atomic file writes, resumable folders.

A run is a folder (README, "What a run leaves"). Every file in it is written to a temporary file,
flushed to disk and renamed, so that a kill at any moment leaves either the old file or the new one.
Loading a file never runs pickled code.
"""

import csv
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import platform
import re
import subprocess
import tarfile
import tempfile
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import make_dataclass
from pathlib import Path

import torch
import torchvision

from utils.errors import UserError
from utils.precision import EXACT, arithmetic, set_arithmetic, training

NAMED_BY = ("model", "defense", "attacker", "attack", "title", "norm")  # texts of a table's cell
BOMB = 20  # largest unpacked size of an archive over its file size; torch does not compress
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # names that whole_file uses
COUNTED = ("outside", "zero_gradient", "gradients", "queries")          # by the attack

# ------------------------------------------------------------ settings, device, seed

def settled(args, **filled):
    """The flags with the data set's presets filled in, as a frozen object."""
    values = {**vars(args), **filled}
    return make_dataclass("Settings", list(values), frozen=True)(**values)


def result_flags(settings, *without, **more):
    """{flag: value} of everything that affects the result; a resumed run must match the old one.

    without: more flags that do not affect it; more: other values that do. --deterministic counts
    only with device="cuda"; on a CPU it changes nothing.
    """
    without = {"data_dir", "data_root", "save", "workers", "cache", "checkpoint_minutes", "resume",
               "overwrite", *without}
    if more.get("device") != "cuda":
        without.add("deterministic")
    return {k: v for k, v in vars(settings).items() if k not in without} | more


def resolve_device(name):
    """'auto' -> the first available of cuda, mps, cpu. UserError if the named one is missing.

    Sets exact arithmetic for the process; weight steps may leave it (utils/loop.py).
    """
    set_arithmetic(EXACT)  # "float32" in a table means float32
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, ok in there.items() if ok))
    if not there[name]:
        raise UserError(f"--device {name}: this machine has none; type --device auto")
    return torch.device(name)


def make_generator(seed):
    """The only source of randomness of a run; on the CPU, so that all devices draw the same."""
    return torch.Generator().manual_seed(seed)


def provenance(device, deterministic=True):
    """What else a figure depends on: versions, device, threads, commit, arithmetic.

    deterministic: a training's flag; figures are always measured deterministically.
    """
    with training(device, deterministic):
        state = arithmetic()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    name = (torch.cuda.get_device_name() if device.type == "cuda"
            else f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)")
    return {"device": name, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "python": platform.python_version(), "commit": commit, "arithmetic": state}


# ---------------------------------------------------------------------- files

@contextmanager
def whole_file(path):
    """Opens a temporary binary file next to `path`; at the end flushes it to disk and renames it.

    After an OSError (disk full, no permission) the old file is unchanged and no temporary file is
    left.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # file systems of WSL, Samba and FUSE may have no modes
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private, open() would not
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_atomic(path, content):
    """Writes the bytes through whole_file."""
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def alone(path):
    """Context that lets one process at a time make the file `path`; the others wait."""
    import fcntl  # POSIX, like the shell scripts

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as file:
        with suppress(OSError):  # no locks on this file system: each process makes it
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_pth(path, value):
    """torch.save, but the bytes depend on the value alone, not on the file's name."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def load_pth(path):
    """torch.load of tensors and plain containers; a pickle with code is refused, not run."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: " + ("a folder, wanted a .pth file" if path.is_dir() else
                                       "no such file"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickle protocols and old formats
            refuse_bomb(path)
            if _runs_anyway(path):
                raise pickle.UnpicklingError("TorchScript")
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises almost anything on a broken file
        foreign = isinstance(error, pickle.UnpicklingError)
        if (foreign and _is_pickle(path)) or "TorchScript" in str(error):
            raise UserError(f"{path}: holds more than tensors (code, a whole module, a pickle that "
                            "is not torch's) and was not executed; save a plain tensor or state "
                            "dict with torch.save") from None
        reason = str(error).strip().split("\n")[0][:80] or type(error).__name__
        raise UserError(f"{path}: not a .pth file; wanted tensors saved by torch.save"
                        if foreign else
                        f"{path}: truncated, or not a .pth file ({reason})") from None


def refuse_bomb(path):
    """UserError if the file is a zip archive that unpacks to far more than its own size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > BOMB * Path(path).stat().st_size:
            raise UserError(f"{path}: unpacks to {size} bytes, more than {BOMB} times its size; "
                            "wanted a file that torch.save or numpy wrote")


def _runs_anyway(path):
    """Whether it is TorchScript or a tar file from 2016, which torch before 2.6 opens anyway."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return tarfile.is_tarfile(path)


def _is_pickle(path):
    """Whether the file is a pickle or torch's archive of one. Reads opcodes, executes none."""
    try:
        with open(path, "rb") as file:
            return zipfile.is_zipfile(path) or all(pickletools.genops(file))
    except Exception:  # not an opcode, truncated, too large a number
        return False


def is_plain(value):
    """Whether it is a dense tensor of real numbers: not sparse, quantised or meta."""
    return (torch.is_tensor(value) and value.layout is torch.strided and value.device.type == "cpu"
            and not (value.is_quantized or value.is_nested or value.is_complex()))


def digest(value):
    """First 16 hexadecimal digits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]


def save_json(path, value):
    """Readable JSON: one key per line, a list of numbers on one line."""
    text = re.sub(r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]",
                  json.dumps(value, indent=1))  # strings hold no raw line break
    write_atomic(path, (text + "\n").encode())


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; remove it or restore it") from None


def save_csv(path, rows):
    """rows: list of dicts; the columns are their keys in order, empty where a row lacks one."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


# ---------------------------------------------------------------- run folders

class RunFolder:
    """A folder that one process at a time may write to; the lock of a killed process is freed."""

    def __init__(self, path, lock=True):
        import fcntl  # POSIX, like the shell scripts

        self.path = Path(path)
        if not lock:  # another process of this run holds it
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held until exit)
        except OSError as error:
            raise UserError(f"{path}: cannot write there ({error.strerror}); "
                            "choose another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another run is writing to this folder; wait for it or choose "
                            "another folder") from None
        except OSError:
            return  # no locks on this file system: another run may be writing
        for path in self.path.glob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name) and path.is_file():  # left by a kill
                path.unlink()

    def __truediv__(self, name):
        return self.path / name

    def load_checkpoint(self, flags, *, resume, overwrite, grows=False, name=None,
                        what="network"):
        """The checkpoint to continue from, or None. Never overwrites a run unasked or mixes two.

        flags: result_flags; with `resume` they must equal the saved ones, except --epochs if
        `grows`: then no step depends on the number of epochs.
        name: the run saves its network or perturbation (`what`) as NAME.pth; with `overwrite` the
        folder may hold no other one.
        """
        path = self.path / "checkpoint.pth"
        for other in self._left(what) if name and overwrite and not resume else ():
            if other.removesuffix("_best") != name:
                raise UserError(f"--overwrite: {self.path} also holds another {what}, {other}.pth; "
                                f"remove it and its {other}.json, or choose another folder")
        if not path.exists() or (overwrite and not resume):
            return None  # the old checkpoint stays until the new run saves one
        if not resume:
            raise UserError(f"{self.path}: already holds a run; type --resume to continue it, "
                            "--overwrite to start again, or choose another folder")
        saved = load_pth(path)
        if not isinstance(saved, dict) or not isinstance(saved.get("flags"), dict):
            raise UserError(f"{path}: not a checkpoint of this script; choose another folder")
        begun = "inside" in saved  # then one more pass has begun than there are rows
        done = len(saved["rows"]) + begun if isinstance(saved.get("rows"), list) else 0
        if grows and flags["epochs"] < done:
            raise UserError(f"--resume --epochs {flags['epochs']}: the run in {self.path} has "
                            f"{'begun' if begun else 'done'} {done}; type --epochs {done} or more, "
                            "or choose another folder")
        either = sorted((flags.keys() | saved["flags"].keys()) - ({"epochs"} if grows else set()))
        # data_dir last: its image list changes with num_images too
        for name in sorted(either, key=lambda name: name == "data_dir"):
            was, now = saved["flags"].get(name), flags.get(name)
            if torch.is_tensor(was) or was != now:
                why = "the size of its steps depends on it; " * (name == "epochs")
                raise UserError(f"--resume with another --{name}: the run in {self.path} has "
                                f"{was}, given {now}; {why}give the same flags or another folder")
        return saved

    def _left(self, what):
        """Yields each NAME whose NAME.pth and NAME.json one of our scripts saved."""
        for path in sorted(self.path.glob("*.json")):
            facts = load_json(path) if path.with_suffix(".pth").is_file() else None
            if (isinstance(facts, dict) and facts.get("name") == path.stem
                    and ("scale" in facts) == (what == "perturbation")):
                yield path.stem

    def load_cells(self, settings, *, overwrite=False):
        """Settings and cells of the table in results.json; no cells if there is no table yet.

        settings: what every cell depends on; UserError if the table was made with other settings.
        overwrite: ignore the table and delete partial.json, the unfinished cell. Settings that are
        not compared are returned as this command gives them.
        """
        path = self.path / "results.json"
        if overwrite:
            (self.path / "partial.json").unlink(missing_ok=True)
        if overwrite or not path.exists():
            return settings, {}
        saved = load_json(path)
        parts = [saved.get("settings"), saved.get("cells")] if isinstance(saved, dict) else [None]
        if all(isinstance(part, dict) for part in parts):
            parts += parts[1].values()
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{path}: not a table of this script; choose another folder")
        was, cells = saved["settings"], saved["cells"]
        if any(isinstance(cell.get("before"), str) for cell in cells.values()):
            raise UserError(f"{path}: a table made by an older version; choose another folder")
        if "batch_size" in was and "batch_size" not in settings:  # older tables: one for all cells
            size = {"batch_size": was.pop("batch_size")}
            cells = {key: size | cell for key, cell in cells.items()}
        broken = next((key for key, cell in cells.items() if not _can_be_counted(cell)), None)
        if broken is not None:
            raise UserError(f"{path}: the cell '{broken}' is damaged; restore the file, or choose "
                            "another folder")
        old, new = compared(was), compared(settings)
        for key in [key for key in new if key in old and new[key] != old[key]]:
            raise UserError(f"--save {self.path}: holds a table made with {key} {was[key]}, "
                            f"given {settings[key]}; choose another folder, or type --overwrite "
                            "to measure everything again")
        return was | settings, cells


def compared(settings):
    """The settings that affect a figure, in comparable form: folders as absolute paths, without
    the note on how the images were chosen (their list is compared).
    """
    found = {key: value for key, value in settings.items() if key != "note"}
    if isinstance(found.get("data"), str) and Path(found["data"]).exists():
        found["data"] = str(Path(found["data"]).resolve())
    return found


def _can_be_counted(cell):
    """Whether a cell has the form that the scripts write: names, counts, lists of n, sizes."""
    def counts(*values, most=2 ** 53):
        return all(type(value) is int and 0 <= value <= most for value in values)

    n, draws, right = cell.get("n"), cell.get("draws", 1), cell.get("right", {})
    lists = [cell[key] for key in ("before", "after", "after8") if key in cell]
    sizes = [cell[key] for key in ("seconds", "largest", "eps", "w") if key in cell]
    steps = cell.get("losses", [])
    return (counts(n, draws) and n * draws > 0
            and counts(*(cell.get(key, 0) for key in ("fooled", "batch_size", *COUNTED)))
            and all(isinstance(cell.get(key, ""), str) for key in NAMED_BY)
            and all(isinstance(part, list) and len(part) == n and counts(*part, most=draws)
                    for part in lists)
            and isinstance(right, dict) and counts(*right.values(), most=n)
            and isinstance(steps, list)
            and all(type(value) in (int, float) and 0 <= value < math.inf for value in sizes)
            and all(type(value) in (int, float) for value in (*steps, cell.get("ascent", 0))))
