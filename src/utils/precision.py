"""How numbers are computed: float32 that is float32, half precision, memory layout.

    measuring, training     contexts: exact float32 for figures; TF32 for trainings on a GPU
    training_amp, Mixed     bf16 or fp16 of a training, the latter with its scaled gradients
    Fast, fastest           a copy of a frozen model, and what it runs fastest in, by timing
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
    """How this process computes now, in the form of EXACT."""
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
    """Context in which figures are measured: float32 is float32 (convolutions on a GPU default to
    TF32, which keeps 10 bits), and cuDNN's kernels give the same result at every run."""
    return _computing(EXACT)


def training(device, deterministic):
    """Context of weight steps and of a perturbation's gradients: TF32, and the kernels that cuDNN
    finds fastest, on a GPU unless `deterministic`. Not run on a GPU."""
    return _computing(QUICK if device.type == "cuda" and not deterministic else EXACT)


# ------------------------------------------------------------- half precision of trainings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device):
    """Whether the device has hardware for bf16 (where it has none, torch emulates it slowly)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if device.type == "cpu" else ()
    return any(getattr(torch.cpu, ask, bool)() for ask in asks)  # bool() is False


def training_amp(amp, device):
    """'off', 'bf16' or 'fp16' for a training's --amp: auto, or one of these, which is kept.

    auto: bf16 on a GPU that has it in hardware, fp16 on an older one, else float32.
    """
    if amp != "auto":
        return amp
    if device.type != "cuda":
        return "off"
    return "bf16" if has_bf16(device) else "fp16"


class Mixed:
    """The half precision of a training's layers; weights, losses and images stay float32.

    amp: 'off', 'bf16' or 'fp16'. Small gradients are zero in fp16, so there the loss is scaled:
    a step whose gradients overflow is left out and the scale is halved.
    """

    def __init__(self, amp, device):
        self.amp, self.device = amp, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self):
        return (nullcontext() if self.amp == "off" else  # not every device has autocast
                torch.autocast(self.device.type, DTYPES[self.amp]))

    def backward(self, loss):
        """Adds the gradients of the loss to the weights', times the scale until step()."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer):
        self.scaler.step(optimizer)
        self.scaler.update()

    def attack_loss(self, logits, y):
        """The loss (n,) that signed attacks climb under autocast(): cross-entropy, or level."""
        if self.amp == "fp16":
            return level_cross_entropy(logits, y)
        return F.cross_entropy(logits.float(), y, reduction="none")

    def state_dict(self):
        return self.scaler.state_dict()

    def load_state_dict(self, state):
        self.scaler.load_state_dict(state)


LEVEL = 256.0  # far from fp16's largest, 65504, and from its smallest, 6e-8


def level_cross_entropy(logits, y):
    """A loss (n,) whose gradient is that of the cross-entropy, of each image times a constant that
    makes it as large as any other's: that of an image which the network is sure of would be zero in
    fp16. The value itself means nothing.
    """
    logits = logits.float()
    p = logits.detach().softmax(1).scatter(1, y[:, None], 0)
    wrong = p.sum(1, keepdim=True)  # 1 - p_y, not rounded
    slope = p.scatter(1, y[:, None], -wrong) * (LEVEL / wrong.clamp_min(1e-36))
    return (slope * logits).sum(1)


# ------------------------------------------------------------- frozen models

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MARGIN = 1.15       # nearer than that is a tie, which noise must not decide
TURNS = (3, 20)     # each candidate's turns, at least and at most
ENOUGH = 0.5        # seconds of all turns together, after which there are no more than needed


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


def layout_for(device):
    """Memory order in which networks on photographs are fastest; of 'channels_last' Apple's GPUs
    have given wrong gradients (pytorch issue 175189), and compute it slowly today.
    """
    return "contiguous" if device.type == "mps" else "channels_last"


def placed(model, device):
    """The model on the device, in layout_for it."""
    return model.to(device, memory_format=LAYOUTS[layout_for(device)])


def moved(x, device):
    """x on the device; nothing waits for that on a CUDA device. Apple's GPUs have read memory that
    was freed meanwhile (pytorch issue 139550).
    """
    return x.to(device, non_blocking=device.type == "cuda")


def to_layout(x, layout):
    """x (N, C, H, W) in the memory order of `layout`."""
    return x.contiguous(memory_format=LAYOUTS[layout])


def fastest(models, step, x, *, amp="auto", layout="auto", deterministic=True,
            clock=time.perf_counter):
    """(amp, layout) under which step(fast_models, x) is fastest, by timing; a given one is kept.

    step: the real work on one real batch x (N, C, H, W), in training(). The candidates take turns,
    so that other work on the machine slows all of them, and the shortest turn of each counts. In a
    tie bf16 is taken where the device has hardware for it, else float32; and contiguous.
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
    """Takes a turn; whether the device has kernels for it."""
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
    """Whether an error says that memory ran out, which torch says in several ways."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED"))


def synchronize(device):
    """Waits for the device to finish, so that a clock measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
