"""Command lines: the flags that scripts share, types for flags, one-line errors, the entry point.

    def get_args():
        parser = Parser("What the script does.")
        parser.shared("data_dir", "data_root")
        parser.add_argument("--eps", type=radius, help="...")
        return parser.parse_args()

    if __name__ == "__main__":
        run_script(get_args, main)
"""

import argparse
import sys
from pathlib import Path

from utils.data import NAMED, default_workers
from utils.defenses import DEFENSES
from utils.errors import UserError
from utils.precision import out_of_memory

LACKS = " is not currently implemented for the "  # torch: The operator 'x' ... MPS device


def run_script(get_args, main):
    """main(get_args()); bad input or a full disk gives one line on stderr and exit status 2."""
    try:
        main(get_args())
    except UserError as error:
        sys.exit(_complain(error))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, NotImplementedError) and LACKS in str(error):
            sys.exit(_complain(f"this device lacks an operation ({str(error).split(LACKS)[0]}...); "
                               "type --device cpu, or set PYTORCH_ENABLE_MPS_FALLBACK=1"))
        if not out_of_memory(error):
            raise
        sys.exit(_complain("out of memory on the device; type a smaller --batch_size, --minibatch"))
    except OSError as error:  # disk full, permission denied: no file is left half-written
        sys.exit(_complain(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")))
    except UnicodeEncodeError as error:
        start, end = error.object[:error.start], error.object[error.start:]  # a list: keep one line
        name = ascii(start.rpartition("\n")[2] + end.partition("\n")[0])
        sys.exit(_complain(f"{name}: a name that is not UTF-8; rename the file or folder"))
    except KeyboardInterrupt:
        print("\ninterrupted; continue a training run with --resume", file=sys.stderr)
        sys.exit(130)


def _complain(message):
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


class Help(argparse.HelpFormatter):
    """Help texts with their defaults. Where that is None, the text says after 'None: ' what takes
    its place.
    """

    def _get_help_string(self, action):
        text, default = action.help, action.default
        if default is None:
            return text.replace("None: ", "default: ")
        if default is False or default == argparse.SUPPRESS:
            return text
        if isinstance(default, list):
            default = " ".join(",".join(one) if isinstance(one, list) else str(one)
                               for one in default)
        return f"{text} (default: {default})"


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, and reports a bad flag in one line instead of a usage page."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help)

    def shared(self, *flags, **changed):
        """Adds flags of SHARED by name; changed: {flag: {option of add_argument: value}}."""
        for flag in flags:
            self.add_argument(f"--{flag}", **{**SHARED[flag], **changed.get(flag, {})})

    def error(self, message):
        self.exit(_complain(f"{message} (all flags: --help)"))


# ----------------------------------------------------------------- types of flags

def _quotient(text):
    top, slash, bottom = text.partition("/")
    try:
        return float(top) / (float(bottom) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number: type a fraction such as 10/255, or 0.04") from None


def fraction(text):
    """argparse type: '10/255' or '0.3', above 0."""
    value = _quotient(text)
    if not 0 < value < 1e30:  # NaN is neither
        raise argparse.ArgumentTypeError(f"{text}: wanted a number above 0; type 10/255")
    return value


def radius(text):
    """argparse type: '10/255' or '0.3', as the paper prints it; pixels live in [0, 1]."""
    value = _quotient(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is outside (0, 1]: pixels are on the [0, 1] scale, for 10 of 255 levels "
            "type 10/255 (what the published SGA script calls alpha is eps)")
    return value


def at_least(low, kind=int, high=None):
    """argparse type: a number from `low` to `high`; None: what sizes and float32 allow."""
    high = {int: 10 ** 9, float: 1e30}[kind] if high is None else high

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # NaN is neither
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: at least {low}, at most {high}")
        return value
    number.__name__ = kind.__name__  # argparse prints it when kind(text) fails
    return number


def names(text):
    """argparse type: 'a,b' -> ['a', 'b']."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' names nothing: type a name, or several: a,b")
    return found


def numbers(text):
    """argparse type: '0,1,2' -> [0, 1, 2], all different."""
    try:
        found = [at_least(0, high=2 ** 62)(one) for one in names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}': wanted whole numbers with commas; type 0,1,2") from error
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"'{text}' lists a number twice; type each once: 0,1,2")
    return found


# -------------------------------------------------------------------- shared flags

SHARED = {
    "data_dir": {"default": "digits", "help": "folder of class folders, of images, of parquet "
                 "shards, or an image list; or " + ", ".join(NAMED)},
    "data_root": {"default": "data", "help": "where named data sets are kept or downloaded to"},
    "labels": {"help": "classes of a flat folder of images: val.txt with lines FILE CLASS, the "
                       "devkit's ground truth beside its meta.mat, or LOC_val_solution.csv; None: "
                       "the one beside the images"},
    "classes": {"choices": ("imagenet",), "help": "imagenet: class folders, or the classes of a "
                "list, are indices 0-999 or class names of ImageNet; None: by the folders' names"},
    "num_images": {"type": at_least(1), "help": "images, evenly over the classes; None: all"},
    "model_name": {"type": names, "nargs": "+", "help": "networks: torchvision's, timm/NAME, "
                   "FILE.py:FUNCTION (your own code, which is run), or those of utils/nets.py; "
                   "None: the data set's preset"},
    "weights": {"type": names, "nargs": "+", "default": [["V1"]],
                "help": "V1, V2, random, a state dict (.pth, .safetensors) or a folder with "
                        "NAME.pth; one for all networks, or one for each"},
    "geometry": {"choices": ("paper", "weights"), "default": "paper",
                 "help": "of photographs: paper, shorter side to 256, centre crop 224, for all "
                         "networks; weights, as each network's weights were published"},
    "defense": {"choices": DEFENSES, "default": "none", "help": "layers in front of every network"},
    "low": {"type": at_least(1), "help": "smallest side that resizepad draws, in pixels; None: 218 "
                                         "of 224"},
    "batch_size": {"type": at_least(1), "default": 50, "help": "images at a time; where memory "
                   "runs out half as many"},
    "queries": {"type": at_least(1), "default": 1000, "help": "queries of the Square attack"},
    "seed": {"type": at_least(0, high=2 ** 62), "default": 0, "help": "fixes everything random"},
    "device": {"choices": ("auto", "cpu", "cuda", "mps"), "default": "auto",
               "help": "where to compute"},
    "deterministic": {"action": "store_true", "help": "training on a GPU: float32 without TF32 "
                      "and cuDNN's deterministic kernels, which is slower; on a CPU no change"},
    "workers": {"type": at_least(0), "default": default_workers(),
                "help": "processes that decode images"},
    "cache": {"type": Path, "help": "folder that keeps decoded photographs (151 KB each at 224 "
              "pixels) for the next command with the same images; None: decoded every time"},
    "checkpoint_minutes": {"type": at_least(0, float), "default": 10.0, "help": "minutes between "
                            "two checkpoints inside a pass; 0: only after each pass"},
    "resume": {"action": "store_true", "help": "continue the run in --save"},
    "overwrite": {"action": "store_true", "help": "start again over the run in --save"},
}
TRAINING = ("seed", "device", "deterministic", "workers", "checkpoint_minutes", "resume",
            "overwrite")  # of the long trainings
