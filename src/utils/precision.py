"""Numerical precision and memory layout: true float32, half precision, channels-last.

    measuring, training     contexts: true float32 for figures, TF32 for training on a GPU
    training_amp, Mixed     bf16 or fp16 in training, fp16 with gradient scaling
    Fast, fastest           a copy of a frozen model; the fastest precision and layout, timed
                            (channels-last bf16 is 2 to 5 times as fast as contiguous float32 on
                            some CPUs, slower on others)
"""

import copy
import time
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError

# ------------------------------------------------------------- float32 on a GPU

EXACT = {"float32_matmul": "highest", "cudnn_tf32": False, "cudnn_benchmark": False,
         "cudnn_deterministic": True}
QUICK = {"float32_matmul": "high", "cudnn_tf32": True, "cudnn_benchmark": True,
         "cudnn_deterministic": False}


def arithmetic():
    """The current settings of this process, in the form of EXACT."""
    cudnn = torch.backends.cudnn
    return {"float32_matmul": torch.get_float32_matmul_precision(),
            "cudnn_tf32": cudnn.allow_tf32, "cudnn_benchmark": cudnn.benchmark,
            "cudnn_deterministic": cudnn.deterministic}


def set_arithmetic(state):
    """state: EXACT, QUICK, or what arithmetic() returned."""
    cudnn = torch.backends.cudnn  # torch's newer fp32_precision must not be mixed with these
    torch.set_float32_matmul_precision(state["float32_matmul"])
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = (
        state[key] for key in ("cudnn_tf32", "cudnn_benchmark", "cudnn_deterministic"))


@contextmanager
def _computing(state):
    before = arithmetic()
    set_arithmetic(state)
    try:
        yield
    finally:
        set_arithmetic(before)


def measuring():
    """Context for measuring: true float32 (convolutions on a GPU default to TF32, which keeps 10
    bits), and cuDNN kernels that give the same result in every run."""
    return _computing(EXACT)


def training(device, deterministic):
    """Context for weight steps and for a perturbation's gradients: on a GPU, TF32 and cuDNN's
    fastest kernels unless `deterministic`. Not run on a GPU."""
    return _computing(QUICK if device.type == "cuda" and not deterministic else EXACT)


# ------------------------------------------------------------- half precision in training

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device):
    """Whether the device has hardware for bf16 (where it has none, torch emulates it slowly)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if device.type == "cpu" else ()
    return any(getattr(torch.cpu, ask, bool)() for ask in asks)  # bool() is False


def training_amp(amp, device):
    """'off', 'bf16' or 'fp16' for the --amp of a training; values other than auto are kept.

    auto: bf16 on a GPU with hardware for it, fp16 on an older one, else float32.
    """
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    return "bf16" if has_bf16(device) else "fp16"


class Mixed:
    """Half precision for the layers in training; weights, losses and images stay float32.

    amp: 'off', 'bf16' or 'fp16'. Small gradients underflow in fp16, so there the loss is scaled:
    a step whose gradients overflow is skipped and the scale is halved.
    """

    def __init__(self, amp, device):
        self.amp, self.device = amp, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self):
        return (nullcontext() if self.amp == "off" else  # not every device has autocast
                torch.autocast(self.device.type, DTYPES[self.amp]))

    def backward(self, loss):
        """Add the loss's gradients, times the scale until step(), to those of the weights."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer):
        self.scaler.step(optimizer)
        self.scaler.update()

    def attack_loss(self, logits, y):
        """Loss (n,) for sign-gradient attacks under autocast(); in fp16 level_cross_entropy."""
        if self.amp == "fp16":
            return level_cross_entropy(logits, y)
        return F.cross_entropy(logits.float(), y, reduction="none")

    def state_dict(self):
        return self.scaler.state_dict()

    def load_state_dict(self, state):
        self.scaler.load_state_dict(state)


LEVEL = 256.0  # far from fp16's largest, 65504, and from its smallest, 6e-8


def level_cross_entropy(logits, y):
    """A loss (n,) whose gradient is that of the cross-entropy, times a constant for each image that
    makes all images' gradients equally large: in fp16 the gradient of an image that the network is
    sure of would be zero. The value of the loss itself means nothing.
    """
    logits = logits.float()
    p = logits.detach().softmax(1).scatter(1, y[:, None], 0)
    wrong = p.sum(1, keepdim=True)  # 1 - p_y, without cancellation
    slope = p.scatter(1, y[:, None], -wrong) * (LEVEL / wrong.clamp_min(1e-36))
    return (slope * logits).sum(1)


# ------------------------------------------------------------- frozen models

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MARGIN = 1.15       # times within this factor are a tie, not left to noise
TURNS = (3, 20)     # each candidate's turns, at least and at most
ENOUGH = 0.5        # seconds of all turns together, after which none are added


class Fast(nn.Module):
    """A fast copy of a frozen model: (N, C, H, W) in [0, 1] -> float32 logits.

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


def layout_for(device):
    """Memory layout in which networks on photographs are fastest. With 'channels_last', Apple's
    GPUs have given wrong gradients (pytorch issue 175189) and are slow today.
    """
    return "contiguous" if device.type == "mps" else "channels_last"


def placed(model, device):
    """The model on the device, in layout_for(device)."""
    return model.to(device, memory_format=LAYOUTS[layout_for(device)])


def moved(x, device):
    """x on the device. Only copies to CUDA do not block: Apple's GPUs have read memory that was
    freed meanwhile (pytorch issue 139550).
    """
    return x.to(device, non_blocking=device.type == "cuda")


def to_layout(x, layout):
    """x (N, C, H, W) in the memory layout `layout`."""
    return x.contiguous(memory_format=LAYOUTS[layout])


def fastest(models, step, x, *, amp="auto", layout="auto", deterministic=True,
            clock=time.perf_counter):
    """(amp, layout) in which step(fast_models, x) is fastest, by timing; any but 'auto' is kept.

    step: the real work on one real batch x (N, C, H, W), in training(). The candidates take turns,
    so that other load on the machine slows all of them; the shortest turn of each counts. Ties go
    to bf16 if the device has hardware for it, else to float32; and to contiguous.
    """
    amps = [amp] if amp != "auto" else ["bf16", "off"] if has_bf16(x.device) else ["off", "bf16"]
    layouts = [layout] if layout != "auto" else list(LAYOUTS) if x.device.type != "mps" else [
        layout_for(x.device)]
    pairs = [(a, b) for a in amps for b in layouts]
    if len(pairs) == 1:
        return pairs[0]
    work = {(a, b): partial(step, [Fast(model, a, b) for model in models], to_layout(x, b))
            for a, b in pairs}
    with training(x.device, deterministic):
        work = {pair: turn for pair, turn in work.items() if _warms_up(pair[0], turn)}
        if not work:
            raise UserError(f"--amp {amp}: this device cannot; type --amp off")
        seconds = _take_turns(work, x.device, clock)
    return next(pair for pair, least in seconds.items() if least <= MARGIN * min(seconds.values()))


def _warms_up(amp, turn):
    """Take one turn. -> whether the device has kernels for it"""
    try:
        turn()
    except (RuntimeError, NotImplementedError) as error:
        if amp == "off" or out_of_memory(error):
            raise
        return False
    return True


def _take_turns(work, device, clock):
    """{candidate: seconds of its shortest turn}"""
    taken = {candidate: [] for candidate in work}
    for number in range(1, TURNS[1] + 1):
        for candidate, turn in work.items():
            synchronize(device)
            start = clock()
            turn()
            synchronize(device)
            taken[candidate].append(clock() - start)
        if number >= TURNS[0] and sum(map(sum, taken.values())) >= ENOUGH:
            break
    return {candidate: min(times) for candidate, times in taken.items()}


def out_of_memory(error):
    """Whether an error says that memory ran out; torch words it in several ways."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED"))


def synchronize(device):
    """Waits for the device to finish, so that a clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
