"""Runs: one-line errors, devices, seeds, files that are whole or not there, folders that resume.

A run is a folder (design of the repo: README, "What a run leaves"). Everything in it is written
to a temporary file, flushed to disk and renamed, so that a kill at any moment leaves either the
old file or the new one. Everything is read without ever executing a pickle.
"""

import argparse
import csv
import io
import json
import os
import pickle
import platform
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torchvision


class UserError(Exception):
    """Bad input: one line that says what was given, what was wanted and what to type."""


def run_script(get_args, main):
    """main(get_args()), where bad input or a full disk is one line on stderr and exit status 2."""
    try:
        main(get_args())
    except UserError as error:
        sys.exit(_complain(error))
    except torch.OutOfMemoryError:
        sys.exit(_complain("out of memory on the device; type a smaller --batch_size, --minibatch"))
    except OSError as error:  # disk full, permission denied: what is on disk is whole
        sys.exit(_complain(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")))
    except KeyboardInterrupt:
        print("\ninterrupted; a training run goes on with --resume", file=sys.stderr)
        sys.exit(130)


def _complain(message):
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, and of a bad flag one line instead of the whole usage."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message} (all flags: --help)\n")


def radius(text):
    """argparse type: '10/255' or '0.3', as the paper prints it; pixels live in [0, 1]."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"'{text}' is no number: type a fraction such as 10/255, or 0.04") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is outside (0, 1]: pixels are on the [0, 1] scale, for 10 of 255 levels "
            "type 10/255 (what the published SGA script calls alpha is eps)")
    return value


def at_least(low, kind=int, high=float("inf")):
    """argparse type: a number from `low` to `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is neither
            most = "" if high == float("inf") else f", at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low}{most}")
        return value
    number.__name__ = kind.__name__  # argparse prints it when kind(text) fails
    return number


def names(text):
    """argparse type: 'a,b' -> ['a', 'b']."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' names nothing: type a name, or several: a,b")
    return found


# ------------------------------------------------------------ device and seed

def resolve_device(name):
    """'auto' -> cuda, mps or cpu, whichever is there first; an absent one is a UserError."""
    torch.backends.cudnn.allow_tf32 = False  # "float32" in a table means float32
    torch.backends.cudnn.deterministic = True
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, ok in there.items() if ok))
    if not there[name]:
        raise UserError(f"--device {name}: this machine has none; type --device auto")
    return torch.device(name)


def make_generator(seed):
    """The one source of randomness of a run: on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed(seed)


def provenance(device):
    """What else decides a figure: versions, device, threads, commit."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    name = (torch.cuda.get_device_name() if device.type == "cuda"
            else f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)")
    return {"device": name, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "python": platform.python_version(), "commit": commit}


# ---------------------------------------------------------------------- files

def write_atomic(path, content):
    """Writes the bytes beside `path`, flushes them to disk, renames: old file or new, never half.

    OSError (disk full, no permission) leaves the old file as it was and no temporary one.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private, open() would not
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_pth(path, value):
    """torch.save; the same value gives the same bytes, whatever the file is called."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def load_pth(path):
    """torch.load of tensors and plain containers; a pickle with code in it is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, wanted a .pth file") from None
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # not even a pickle
            raise UserError(f"{path}: no .pth file; wanted tensors saved by torch.save") from None
        raise UserError(f"{path}: holds more than tensors (code or a whole module) and was not "
                        "executed; save it again as a plain tensor or state dict") from None
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, TypeError, IndexError,
            AssertionError, struct.error) as error:
        reason = str(error).strip().split("\n")[0][:80] or type(error).__name__
        raise UserError(f"{path}: truncated, or no .pth file ({reason})") from None


def save_json(path, value):
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def load_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise UserError(f"{path}: not JSON; remove it or restore it") from None


def save_csv(path, rows):
    """rows: list of dicts; the columns are their keys in order, empty where a row has none."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


# ---------------------------------------------------------------- run folders

class RunFolder:
    """A folder that one process at a time may write; a kill frees it."""

    def __init__(self, path, lock=True):
        import fcntl  # POSIX, like the shell scripts

        self.path = Path(path)
        if not lock:  # another process of the same run holds it
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
            raise UserError(f"{path}: another run is writing this folder; wait for it or choose "
                            "another one") from None
        for left_by_a_kill in self.path.glob(".*.tmp"):
            left_by_a_kill.unlink()

    def __truediv__(self, name):
        return self.path / name

    def load_checkpoint(self, flags, *, resume, overwrite):
        """The checkpoint to go on from, or None; refuses to lose a run or to mix two.

        flags: dict of what decides the result; with `resume` they must equal the saved ones.
        """
        path = self.path / "checkpoint.pth"
        if not path.exists() or (overwrite and not resume):
            return None  # the old one stays until the new run has something to keep
        if not resume:
            raise UserError(f"{self.path}: holds a run already; type --resume to go on with it, "
                            "--overwrite to start again, or choose another folder")
        saved = load_pth(path)
        if not isinstance(saved, dict) or "flags" not in saved:
            raise UserError(f"{path}: not a checkpoint of this script; choose another folder")
        either = sorted(flags.keys() | saved["flags"].keys())
        # data_dir last: its image list changes with num_images too
        for name in sorted(either, key=lambda name: name == "data_dir"):
            was, now = saved["flags"].get(name), flags.get(name)
            if was != now:
                raise UserError(f"--resume with another --{name}: the run in {self.path} has "
                                f"{was}, given {now}; give the same flags or another folder")
        return saved

    def load_cells(self, settings, flag="--results"):
        """Settings and cells of the table in results.json, to go on with; no cells: none yet.

        settings: dict of what every cell stands on; UserError if the table was made with others.
        flag: what chooses the folder.
        """
        path = self.path / "results.json"
        if not path.exists():
            return settings, {}
        saved = load_json(path)
        if not isinstance(saved, dict) or not {"settings", "cells"} <= saved.keys():
            raise UserError(f"{path}: not a table of cells; choose another folder")
        was = saved["settings"]
        for key in [key for key in settings if key in was and settings[key] != was[key]]:
            raise UserError(f"{flag} {self.path}: holds a table made with {key} {was[key]}, "
                            f"given {settings[key]}; choose another folder")
        return was | settings, saved["cells"]


def finished_run(folder, key, results, script):
    """The facts NAME.json of a finished run of `script`: the one in the folder that has `key`.

    results: name of the file that its evaluation left. UserError: no such run, or several.
    """
    found = [facts for path in sorted(folder.glob("*.json"))
             if isinstance(facts := load_json(path), dict) and key in facts]
    if len(found) != 1 or not (folder / results).is_file():
        raise UserError(f"--compare {folder}: no finished run; wanted a folder that {script} left, "
                        f"with {results} in it")
    return found[0]


# ------------------------------------------------------------------- processes

@dataclass(frozen=True)
class Team:
    """The processes that torchrun started for one run; one alone where it did not."""
    rank: int = 0
    size: int = 1

    @property
    def first(self):
        """Whether this process writes files and prints."""
        return self.rank == 0

    def gather(self, x):
        """The tensors x (n, ...) of all processes, of which position p was held by p % size."""
        if self.size == 1:
            return x
        parts = [None] * self.size
        torch.distributed.all_gather_object(parts, x.cpu())
        whole = x.new_zeros((sum(map(len, parts)), *x.shape[1:]))
        for rank, part in enumerate(parts):
            whole[rank::self.size] = part.to(x)
        return whole

    def total(self, values):
        """The numbers of all processes, each summed."""
        if self.size == 1:
            return values
        parts = [None] * self.size
        torch.distributed.all_gather_object(parts, list(values))
        return [sum(column) for column in zip(*parts, strict=True)]


def join_team(device):
    """Team, and this process's own device; ends with the process."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Team(), device
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(rank, size), device
