"""Which precision and memory layout run a frozen model fastest.

float32 or bfloat16, contiguous or channels-last: that depends on network, batch and processor
(channels-last bf16 is 2 to 5 times as fast as contiguous float32 on some CPUs, slower on others),
so it is timed.
"""

import copy
import time

import torch
from torch import nn

from utils.errors import UserError

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MARGIN = 1.15  # a candidate must be this much faster: noise must not decide near ties


class Fast(nn.Module):
    """A copy of a frozen model for generating: (N, C, H, W) in [0, 1] -> float32 logits.

    amp: 'off' or 'bf16'. Frozen weights of convolutions and linear layers are cast once here;
    autocast alone would cast them at every call (it only caches weights that require gradients).
    """

    def __init__(self, model, amp, layout):
        super().__init__()
        self.amp = amp
        self.model = copy.deepcopy(model).to(memory_format=LAYOUTS[layout])
        if amp == "bf16":
            for layer in self.model.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(torch.bfloat16)

    def forward(self, x):
        if self.amp == "off":
            return self.model(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x).float()


def to_layout(x, layout):
    """x (N, C, H, W) in the memory order of `layout`."""
    return x.contiguous(memory_format=LAYOUTS[layout])


def fastest(models, step, x, *, amp="auto", layout="auto"):
    """(amp, layout) under which step(fast_models, x) is fastest, by timing; a given one is kept.

    step: the real work on one real batch x (N, C, H, W). Each candidate is timed twice after a
    warm-up call, fast ones until a tenth of a second is full.
    """
    amps = ["off", "bf16"] if amp == "auto" else [amp]
    layouts = list(LAYOUTS) if layout == "auto" else [layout]
    pairs = [(a, b) for a in amps for b in layouts]
    if len(pairs) == 1:
        return pairs[0]
    seconds = {}
    for a, b in pairs:
        fast = [Fast(model, a, b) for model in models]
        batch = to_layout(x, b)
        try:
            seconds[a, b] = _time(lambda fast=fast, batch=batch: step(fast, batch), x.device)
        except (RuntimeError, NotImplementedError):  # no bf16 kernel for this device
            if a == "off":
                raise
    if not seconds:
        raise UserError(f"--amp {amp}: this device cannot; type --amp off")
    best = next(iter(seconds))
    for pair, taken in seconds.items():
        if taken * MARGIN < seconds[best]:
            best = pair
    return best


def _time(work, device):
    """Seconds of the fastest of two or more calls, after a warm-up call."""
    def timed():
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start
    timed()
    taken = [timed(), timed()]
    while sum(taken) < 0.1:
        taken.append(timed())
    return min(taken)


def synchronize(device):
    """Waits for the device to finish, so that a clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
