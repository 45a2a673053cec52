"""A function in a user's Python file that returns a network: running it, reading what it declares.

The file is the user's own code and is run as such, once per process. name: PATH.py:FUNCTION.
"""

import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path

import torch

from utils.errors import UserError
from utils.nets import Normalize


def file_of(name):
    return Path(name.rpartition(":")[0] or name)


def function_of(name):
    """The function. UserError: no such file, no such function, the file raises."""
    path, function = file_of(name), name.rpartition(":")[2]
    if name.endswith(".py") or not function.isidentifier():
        raise UserError(f"--model_name {name}: which function of the file? type {path}:FUNCTION")
    if not path.is_file():
        raise UserError(f"--model_name {name}: no file {path}; type the path of a Python file, and "
                        "the function in it that returns the network")
    found = getattr(calling(name, _run, path.resolve()), function, None)
    if not callable(found):
        raise UserError(f"--model_name {name}: {function} is not a function in {path}; wanted one "
                        "that returns the network")
    calling(name, inspect.signature, found)  # fails now if it has none
    return found


@cache
def _run(path):
    """The module of a Python file."""
    spec = importlib.util.spec_from_file_location(f"_network_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle in the file need this
    spec.loader.exec_module(module)
    return module


def calling(name, function, *args, **options):
    """What the user's code returns; UserError with what it raises."""
    try:
        return function(*args, **options)
    except UserError:  # of this repository's own functions
        raise
    except (Exception, SystemExit) as error:  # anything
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"--model_name {name}: the file raised {type(error).__name__} ({reason}); "
                        "correct it, or set PYTHONPATH to what it imports") from error


def takes_classes(function):
    """Whether the function has a parameter num_classes, and whether it can be left out."""
    parameter = inspect.signature(function).parameters.get("num_classes")
    return parameter is not None, parameter is None or parameter.default is not parameter.empty


def normalize_of(name, net):
    """Normalize with the network's mean and std, None if it has none. UserError: unfit for pixels.

    Tensors are assumed to be applied by the network itself, as many networks do.
    """
    found = [getattr(net, key, None) for key in ("mean", "std")]
    if any(map(torch.is_tensor, found)):
        print(f"{name}: mean and std are tensors, so the network is taken to use them itself; "
              "numbers or lists of numbers would be used here", flush=True)
    given = [value is not None and not callable(value) for value in found]
    if given[0] != given[1]:
        raise UserError(f"--model_name {name}: its network has a {'mean' if given[0] else 'std'} "
                        "alone; wanted both of mean and std, or neither")
    if not all(given) or any(map(torch.is_tensor, found)):
        return None
    layer = calling(name, Normalize, *found)
    if not (layer.mean.abs().max() <= 1 and layer.std.min() > 0 and layer.std.max() < 1e6
            and {layer.mean.numel(), layer.std.numel()} <= {1, 3}):
        raise UserError(f"--model_name {name}: its mean and std are {found[0]} and {found[1]}; "
                        "wanted those of [0, 1] pixels, one number or three")
    return layer


def kind_of(value):
    """How a message describes a value that is not a network."""
    return "nothing" if value is None else f"an object of type {type(value).__name__}"
