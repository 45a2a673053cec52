"""Counts the operations at which the host would wait for a GPU, on a machine without one.

The host waits wherever it needs a value: where the shape of a result depends on values (a boolean
mask as an index), and where it copies numbers to the device or tensors back.
"""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BACK = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # not operations on a CPU


class Waits:
    """with Waits() as waits: ...; waits.seen: {operation: count}"""

    def __init__(self):
        self.seen = Counter()
        self.modes = _Operations(self.seen), _Methods(self.seen)

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    @property
    def total(self):
        return sum(self.seen.values())


class _Methods(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in BACK:
            self.seen[function.__name__] += 1
        return function(*args, **kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        if _waits(function, args, found):
            self.seen[function.overloadpacket.__name__] += 1
        return found


def _waits(function, args, found):
    name = function.overloadpacket.__name__
    if name.strip("_").startswith("index"):  # a mask as an index must be searched for its places
        masks = [part for part in args[1] if torch.is_tensor(part)] if name.strip("_") in (
            "index", "index_put", "index_put_impl") else []
        return any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)
    if name == "lift_fresh":  # torch.tensor(numbers)
        return True
    if name in ("_to_copy", "copy_"):
        here = found if name == "_to_copy" else args[1]
        return here.device != args[0].device
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
                & set(function.tags))
