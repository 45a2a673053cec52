"""Networks on [0, 1] pixels: Sequential(Normalize, net), in eval mode, frozen, float32.

    model = load_model("vgg16")                                   # torchvision, IMAGENET1K_V1
    model = load_model("vgg16", weights="/weights/vgg16.pth")     # a local state dict
    model = load_model("cnn", kind="digits", data_dir="digits")   # trained on first use, kept

For digits, MNIST and CIFAR-10 there are five small networks of different kinds, so that a
surrogate and five targets exist without a download.
"""

import copy
import difflib
import hashlib
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import nn
from tqdm import tqdm

from utils.data import SMALL, default_workers, load, open_images, to_float
from utils.heads import with_head
from utils.networks import NETWORKS
from utils.run import UserError, load_json, load_pth, save_pth

# how a small network is trained: epochs, shift of the crops in pixels (with flips), noise, without
# which the networks with BatchNorm change their mind at any pattern on the black of digits
RECIPES = {"digits": (12, 0, 0.1), "mnist": (3, 0, 0.1), "cifar10": (12, 4, 0.0)}
RECIPE_VERSION = 1  # part of the cached file's name: a new recipe trains anew


class Normalize(nn.Module):
    """(x - mean) / std per channel, so that everything before it, eps too, is in [0, 1] pixels."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):  # (N, C, H, W)
        return (x - self.mean) / self.std


def load_model(name, *, weights="V1", kind="imagenet", data_dir=None, data_root="data",
               device="cpu"):
    """Sequential(Normalize, net) that takes [0, 1] pixels and gives logits; eval mode, frozen.

    name: a torchvision classification network (kind 'imagenet' or 'folder'), or one of SMALL
    (kind 'digits', 'mnist', 'cifar10', trained on the images of data_dir if not yet cached).
    weights: 'V1', 'V2', 'random', another name of torchvision's, or a path: a state dict
    NAME.pth or a folder that holds one. UserError: no such name, no such weights, no fit.
    """
    check_name(name, kind)
    path = weights_path(name, weights)
    if kind in RECIPES:
        net, mean, std = _small(name, kind, weights, path, data_dir, data_root, device)
    else:
        net, mean, std = _torchvision(name, weights, path)
    return freeze(nn.Sequential(Normalize(mean, std), net)).to(device)


def trainable(name, *, kind, weights="random", seed=0, head="own", classes=None, data_dir=None,
              data_root="data"):
    """Sequential(Normalize, net) to be trained, in training mode; its net[1] is what is saved.

    weights: 'random' (drawn from the seed), or as in load_model where they start from others.
    head, classes: of utils/heads.py, and how many; drawn anew unless the weights have such a one.
    """
    check_name(name, kind)
    path = weights_path(name, weights, "--pretrained")
    if kind in RECIPES:
        channels, size = (3, 32) if kind == "cifar10" else (1, 28)
        mean = std = (0.5,) * channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build_small(name, channels, size)
        net = _fit(net, path, name) if path else net
    else:
        net, mean, std = _local(name, path, seed), _transforms(name).mean, _transforms(name).std
    if not path and weights != "random":
        try:
            net = load_model(name, weights=weights, kind=kind, data_dir=data_dir or kind,
                             data_root=data_root)[1]
        except UserError as error:
            raise UserError(str(error).replace("--weights", "--pretrained")) from None
    classes = classes or num_classes(kind)
    if (head, classes) != (path and head_of(path)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = with_head(net, head, classes, name)
    return nn.Sequential(Normalize(mean, std), net).train().requires_grad_(True)


class JointSum(torch.autograd.Function):
    """The sum of a tensor over all processes; every one asks for its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return JointSum.apply(g)


class JointBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Statistics over the images of all processes, on devices that SyncBatchNorm is not for."""

    def _check_input_dim(self, x):
        """(N, C, ...) of any dimension"""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.to(self.running_mean.dtype)
        z = x.transpose(0, 1).flatten(1)  # (C, everything else)
        total, n = JointSum.apply(torch.stack([z.sum(1), torch.full_like(z[:, 0], z.shape[1])]))
        mean = total / n
        var = JointSum.apply((z - mean[:, None]).square().sum(1)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        channel = [1, -1] + [1] * (x.dim() - 2)
        shift = self.bias - mean * scale
        return (x * scale.view(channel) + shift.view(channel)).to(dtype)


def joint_batch_norm(model, device):
    """The same model, its batch statistics taken over all processes of the run."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
            layer.__class__ = JointBatchNorm  # the same parameters and buffers, summed elsewhere
    return model


def freeze(model):
    return model.eval().requires_grad_(False)


def check_name(name, kind):
    """UserError unless `name` is a network that goes with this kind of data."""
    wanted = (*SMALL, *NETWORKS) if kind in RECIPES else zoo.list_models(module=zoo)
    if name in wanted:
        return
    near = difflib.get_close_matches(name, wanted, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    some = ", ".join(wanted) if kind in RECIPES else "torchvision's classifiers, such as vgg16"
    raise UserError(f"--model_name {name}: no network for {kind} data; {hint}wanted one of {some}")


def one_each(models, weights):
    """--weights given once for all networks, or once for each -> one for each; UserError if not."""
    if len(weights) not in (1, len(models)):
        raise UserError(f"--weights: {len(weights)} given for {len(models)} networks; type one for "
                        "all, or one for each")
    return weights * (len(models) // len(weights))


def num_classes(kind):
    """How many classes the networks for this kind of data tell apart."""
    return 10 if kind in RECIPES else 1000


def input_size(name, kind, size, weights):
    """Side in pixels that the weights were trained for; `size` where the data decides."""
    if kind in RECIPES:
        return size
    path = weights_path(name, weights)
    if path and head_of(path):
        return trained(path)["image_size"]
    if path or weights == "random":
        return _transforms(name).crop_size[0]
    return _enum(name, weights).transforms().crop_size[0]


def check_takes(model, name, channels, size, device):
    """UserError if the network cannot take images of that size, before anything slow starts."""
    try:
        with torch.no_grad():
            model(torch.zeros((1, channels, size, size), device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:80]
        raise UserError(f"--image_size {size}: {name} cannot take such images ({reason})") from None


# ----------------------------------------------------------------- torchvision

def _torchvision(name, weights, path):
    if path or weights == "random":
        about = _transforms(name)
        return _local(name, path), about.mean, about.std
    enum = _enum(name, weights)
    try:
        net = zoo.get_model(name, weights=enum, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, EOFError) as error:  # no network, or half a file in the cache
        raise UserError(f"{name}: its weights {enum.name} are not cached whole and cannot be "
                        f"downloaded ({error}); type --weights PATH of a state dict, or --weights "
                        f"random; downloads are kept in {torch.hub.get_dir()}") from None
    return net, enum.transforms().mean, enum.transforms().std


def _enum(name, weights):
    """'V1', 'IMAGENET1K_V1', 'DEFAULT' ... -> torchvision's weights; UserError if there are none.
    """
    members = zoo.get_model_weights(name).__members__
    found = members.get(weights) or members.get(f"IMAGENET1K_{weights}")
    if found is None:
        there = [w.removeprefix("IMAGENET1K_") for w in members]
        raise UserError(f"--weights {weights}: {name} has {', '.join(there)}; type one of these, "
                        "random, or the path of a state dict")
    return found


def _transforms(name):
    """Size and normalisation of the network's first published weights, V1 for nearly all."""
    return next(iter(zoo.get_model_weights(name))).transforms()


def _local(name, path, seed=0):
    """A torchvision architecture with random weights, or with those of the file."""
    options = {}
    if name in ("googlenet", "inception_v3"):  # as torchvision builds them for its own weights:
        # input shifted to the weights' own normalisation, no auxiliary heads
        options = {"transform_input": True, "aux_logits": False, "init_weights": path is None}
    with torch.random.fork_rng(devices=[]):  # random weights are the same every time
        torch.manual_seed(seed)
        net = zoo.get_model(name, weights=None, **options)
    return _fit(net, path, name) if path else net


def weights_path(name, weights, flag="--weights"):
    """The file that the flag names (for a folder: NAME.pth in it), None if it names none."""
    path = Path(weights)
    if path.is_dir():
        path = path / f"{name}.pth"
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"{flag} {weights}: no file {path}; type the path of a state dict of "
                        f"{name}, V1, V2 or random")
    return None


def trained(path):
    """What stands in NAME.json beside weights NAME.pth that a script of ours trained, else {}."""
    beside = path.with_suffix(".json")
    facts = load_json(beside) if beside.is_file() else {}
    return facts if isinstance(facts, dict) else {}


def head_of(path):
    """(head, classes) of a network that train_gcm.py trained; None: the network's own."""
    facts = trained(path)
    return (facts["head"], len(facts["classes"])) if "head" in facts else None


def _fit(net, path, name):
    """The network with the weights of the file, its head as train_gcm.py changed it."""
    found = head_of(path)
    if found:
        with torch.random.fork_rng(devices=[]):
            net = with_head(net, *found, name)
    return load_state(net, path, name)


def load_state(net, path, name):
    """The weights of a local file, fp16 or fp32, into `net`; UserError if they do not fit."""
    state = load_pth(path)
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: no state dict; wanted the tensors of {name} by name")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = net.state_dict()
    extra = [k for k in state if k not in wanted and not k.startswith(("aux", "AuxLogits"))]
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if extra or missing or wrong:
        raise UserError(f"{path}: not the weights of {name}: {len(missing)} tensors missing, "
                        f"{len(extra)} unknown, {len(wrong)} of another shape (first: "
                        f"{(wrong + missing + extra)[0]}); type the --model_name they belong to")
    net.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
    return net


def describe_weights(name, weights, kind):
    """What a table says of a network's weights: the enum, 'random', or file and SHA-256."""
    path = weights_path(name, weights)
    if path:
        return f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    if weights == "random":
        return "random"
    return f"trained on {kind}, recipe {RECIPE_VERSION}" if kind in RECIPES \
        else _enum(name, weights).name


# -------------------------------------------------------------- small networks

class Residual(nn.Module):
    """Basic block of a pre-2016 ResNet: two 3 x 3 convolutions and a shortcut."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout))
        self.shortcut = nn.Identity() if cin == cout and stride == 1 else nn.Sequential(
            nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def _conv(cin, cout, *, norm, stride=1):
    layers = [nn.Conv2d(cin, cout, 3, stride, 1, bias=not norm)]
    return layers + ([nn.BatchNorm2d(cout)] if norm else []) + [nn.ReLU()]


def build_small(name, channels, size):
    """A network of ours with random weights; 10 classes, (N, channels, size, size)."""
    if name in NETWORKS:
        return NETWORKS[name](channels, size)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if name == "cnn":
        layers = [*_conv(channels, 32, norm=False), nn.MaxPool2d(2), *_conv(32, 64, norm=False),
                  nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 128), nn.ReLU(),
                  nn.Linear(128, 10)]
    elif name == "cnn_bn":
        layers = [*_conv(channels, 32, norm=True), *_conv(32, 64, norm=True, stride=2),
                  *_conv(64, 128, norm=True, stride=2), *pool, nn.Linear(128, 10)]
    elif name == "mlp":
        layers = [nn.Flatten(), nn.Linear(channels * size * size, 256), nn.ReLU(),
                  nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    elif name == "vgg_small":
        layers = [*_conv(channels, 32, norm=False), *_conv(32, 32, norm=False), nn.MaxPool2d(2),
                  *_conv(32, 64, norm=False), *_conv(64, 64, norm=False), nn.MaxPool2d(2),
                  *_conv(64, 128, norm=False), *pool, nn.Linear(128, 10)]
    else:
        layers = [*_conv(channels, 16, norm=True), Residual(16, 16, 1), Residual(16, 32, 2),
                  Residual(32, 64, 2), *pool, nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def _small(name, kind, weights, path, data_dir, data_root, device):
    channels, size = (3, 32) if kind == "cifar10" else (1, 28)
    half = (0.5,) * channels
    cached = Path(torch.hub.get_dir()) / "small" / f"{kind}_{name}_{RECIPE_VERSION}.pth"
    with torch.random.fork_rng(devices=[]):  # nn.Module draws from the global RNG: lend it one
        torch.manual_seed(0)
        net = build_small(name, channels, size)
    if weights == "random":
        return net, half, half
    if not path and (weights != "V1" or name in NETWORKS):
        ready = "" if name in NETWORKS else "V1 (trained here on first use), "
        raise UserError(f"--weights {weights}: {name} has {ready}random, or the path of a state "
                        "dict, such as free_at.py makes")
    if path or cached.is_file():
        return _fit(net, path or cached, name), half, half
    model = nn.Sequential(Normalize(half, half), net).to(device)
    _train_small(model, name, kind, data_dir, data_root)
    cached.parent.mkdir(parents=True, exist_ok=True)
    save_pth(cached, copy.deepcopy(net).cpu().state_dict())
    return net, half, half


def _train_small(model, name, kind, data_dir, data_root):
    """Trains in place: Adam, one-cycle, cross-entropy; prints accuracy on the test split."""
    start = time.time()
    epochs, shift, noise = RECIPES[kind]
    train, test = (load(open_images(_parent(data_dir), split=split, data_root=data_root),
                        workers=default_workers()) for split in ("train", "test"))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    batch = 64 if kind == "digits" else 128
    if len(train) < batch:
        raise UserError(f"--data_dir {data_dir}: {len(train)} training images are too few to train "
                        f"{name} on; type --weights PATH")
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc=f"train {name}", leave=False, disable=None) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator)
            for index in order[:len(order) // batch * batch].split(batch):
                x = _jitter(to_float(train.pixels[index]), shift, noise, generator)
                loss = F.cross_entropy(model(x.to(device)), train.labels[index].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    freeze(model)
    with torch.inference_mode():
        right = sum((model(to_float(x).to(device)).argmax(1).cpu() == y).sum().item()
                    for x, y in zip(test.pixels.split(500), test.labels.split(500), strict=True))
    print(f"trained {name} on {kind}: accuracy {100 * right / len(test):.1f} % "
          f"(n={len(test)}), {time.time() - start:.0f} s", flush=True)


def _parent(data_dir):
    """.../test or .../val -> the folder that holds it and train/ beside it."""
    path = Path(data_dir)
    if path.name in ("train", "val", "test") and path.is_dir():
        if not (path.parent / "train").is_dir():
            raise UserError(f"--data_dir {data_dir}: no train/ beside it to train a network on")
        return path.parent
    return data_dir


def _jitter(x, shift, noise, generator):
    """One random flip and shift (zeros come in) for the batch, and noise for every pixel."""
    if noise:
        x = (x + noise * torch.randn(x.shape, generator=generator)).clamp_(0, 1)
    if not shift:
        return x
    dy, dx = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
    x = F.pad(x, (shift,) * 4)[..., shift + dy:x.shape[-2] + shift + dy,
                               shift + dx:x.shape[-1] + shift + dx]
    return x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x
