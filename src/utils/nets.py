"""Our own networks for small images, the training of the five small ones, and heads.

    cnn, cnn_bn, mlp, vgg_small, resnet_small   for digits, MNIST and CIFAR-10; trained on first use
    lenet, lenet_bn    the exercise's: two convolutions of stride 2 and two linear layers; lenet_bn
                       has BatchNorm after every layer but the last
    preact_resnet18    He et al. 2016 (arXiv:1603.05027), widths 64 to 512
    wrn_32_10          as in the TensorFlow code of Madry et al. and of free training: five units a
                       stage, widths 160, 320, 640, leaky ReLU, no weights in shortcuts; each image
                       is standardised by itself (Standardize)

Heads for the feature map of any convolutional network, with_head(net, head, classes, name):

    own          the network's own, with its last layer resized to the number of classes
    fc           pool, 512, 256, classes, with GELU, dropout and LayerNorm between
    ml_decoder   queries that attend to the positions of the feature map   arXiv:2111.12933
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import nn

from utils.data import default_workers, load, open_both, to_float
from utils.errors import UserError
from utils.loop import Trainer, loop

# training of a small network: epochs, shift of the crops in pixels (with flips), noise (without it,
# any pattern on the black of digits changes the predictions of networks with BatchNorm)
RECIPES = {"digits": (12, 0, 0.1), "mnist": (3, 0, 0.1), "cifar10": (12, 4, 0.0)}
RECIPE_VERSION = 1  # part of the cached file's name: a new recipe trains anew
HEADS = ("own", "fc", "ml_decoder")
ANOTHER = "type --head own, or another network, such as convnext_tiny, resnet50, cnn_bn"


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


class PreAct(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), with a 1 x 1 convolution where the shape changes."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), _conv3(cin, cout, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), _conv3(cout, cout, 1)
        self.shortcut = None if cin == cout and stride == 1 else nn.Conv2d(cin, cout, 1, stride,
                                                                           bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


def _conv3(cin, cout, stride):
    return nn.Conv2d(cin, cout, 3, stride, 1, bias=False)


def _network(channels, first, widths, blocks, classes):
    layers, cin = [_conv3(channels, first, 1)], first
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(PreAct(cin, width, 2 if stage and not block else 1))
            cin = width
    return nn.Sequential(*layers, nn.BatchNorm2d(cin), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(cin, classes))


class WideUnit(nn.Module):
    """x + conv(act(bn(conv(act(bn(x)))))) of TensorFlow's ResNet, act: leaky ReLU of slope 0.1.

    Where the shape changes, the shortcut is average pooling and zero channels on both sides.
    first: the shortcut starts after the first activation.
    """

    def __init__(self, cin, cout, stride, first=False):
        super().__init__()
        self.stride, self.first, self.more = stride, first, (cout - cin) // 2
        self.bn1, self.bn2 = (nn.BatchNorm2d(width, eps=1e-3) for width in (cin, cout))
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, padding=2 - stride, bias=False)
        self.conv2 = _conv3(cout, cout, 1)

    def forward(self, x):
        out = F.leaky_relu(self.bn1(x), 0.1)
        x = out if self.first else x
        if self.stride == 2:  # TensorFlow's padding "SAME": right and bottom only
            out, x = F.pad(out, (0, 1, 0, 1)), F.avg_pool2d(x, 2)
        out = self.conv2(F.leaky_relu(self.bn2(self.conv1(out)), 0.1))
        return out + F.pad(x, (0, 0, 0, 0, self.more, self.more))


class Normalize(nn.Module):
    """(x - mean) / std per channel, so that everything before it, also eps, is in [0, 1] pixels."""

    def __init__(self, mean, std):
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x):  # (N, C, H, W)
        return (x - self.mean) / self.std


class Standardize(nn.Module):
    """(x - mean) / max(std, 1 / sqrt(D)) over the D numbers of each image, on the scale 0 to 255.

    Like tf.image.per_image_standardization, but inside the network.
    """

    def forward(self, x):  # (N, C, H, W) in [0, 1]
        x = 255 * x
        x = x - x.mean((1, 2, 3), keepdim=True)
        return x / x.square().mean((1, 2, 3), keepdim=True).clamp_min(1 / x[0].numel()).sqrt()


def _wide(channels, classes):
    layers, cin = [_conv3(channels, 16, 1)], 16
    for stage, width in enumerate((160, 320, 640)):
        for unit in range(5):
            layers.append(WideUnit(cin, width, 2 if stage and not unit else 1, cin == 16))
            cin = width
    net = nn.Sequential(*layers, nn.BatchNorm2d(cin, eps=1e-3), nn.LeakyReLU(0.1),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, classes))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    nn.init.uniform_(net[-1].weight, -(3 / cin) ** 0.5, (3 / cin) ** 0.5)
    nn.init.zeros_(net[-1].bias)
    return net


def _lenet(channels, size, classes, norm):
    layers, widths = [], ((channels, 16), (16, 32))
    for cin, cout in widths:
        layers += [nn.Conv2d(cin, cout, 4, 2, 1), *([nn.BatchNorm2d(cout)] if norm else []),
                   nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 100),
        *([nn.BatchNorm1d(100)] if norm else []), nn.ReLU(), nn.Linear(100, classes))


def _conv(cin, cout, *, norm, stride=1):
    layers = [nn.Conv2d(cin, cout, 3, stride, 1, bias=not norm)]
    return layers + ([nn.BatchNorm2d(cout)] if norm else []) + [nn.ReLU()]


NETWORKS = {  # name: (channels, pixels, classes) -> network
    "lenet": partial(_lenet, norm=False),
    "lenet_bn": partial(_lenet, norm=True),
    "preact_resnet18": lambda channels, _, classes: _network(channels, 64, (64, 128, 256, 512), 2,
                                                             classes),
    "wrn_32_10": lambda channels, _, classes: _wide(channels, classes)}


def build_small(name, channels, size, classes=10):
    """One of our networks with random weights, for images (N, channels, size, size)."""
    if name in NETWORKS:
        return NETWORKS[name](channels, size, classes)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if name == "cnn":
        layers = [*_conv(channels, 32, norm=False), nn.MaxPool2d(2), *_conv(32, 64, norm=False),
                  nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 128), nn.ReLU(),
                  nn.Linear(128, classes)]
    elif name == "cnn_bn":
        layers = [*_conv(channels, 32, norm=True), *_conv(32, 64, norm=True, stride=2),
                  *_conv(64, 128, norm=True, stride=2), *pool, nn.Linear(128, classes)]
    elif name == "mlp":
        layers = [nn.Flatten(), nn.Linear(channels * size * size, 256), nn.ReLU(),
                  nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes)]
    elif name == "vgg_small":
        layers = [*_conv(channels, 32, norm=False), *_conv(32, 32, norm=False), nn.MaxPool2d(2),
                  *_conv(32, 64, norm=False), *_conv(64, 64, norm=False), nn.MaxPool2d(2),
                  *_conv(64, 128, norm=False), *pool, nn.Linear(128, classes)]
    else:
        layers = [*_conv(channels, 16, norm=True), Residual(16, 16, 1), Residual(16, 32, 2),
                  Residual(32, 64, 2), *pool, nn.Linear(64, classes)]
    return nn.Sequential(*layers)


# ------------------------------------------------------- training the small networks

class SmallTraining(Trainer):
    """Adam, one-cycle, cross-entropy; whole minibatches only."""
    advice = "type --weights with the path of a state dict"

    def __init__(self, model, kind, images):
        self.model, self.images, self.device = model, images, next(model.parameters()).device
        epochs, self.shift, self.noise = RECIPES[kind]
        self.batch = 64 if kind == "digits" else 128
        super().__init__(self.device, steps=len(images) // self.batch, keep={"net": model})
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 4e-3, total_steps=epochs * self.steps)

    def one_pass(self, bar):
        total = torch.zeros((), device=self.device)
        order = torch.randperm(len(self.images), generator=self.generator)
        for index in order[:self.steps * self.batch].split(self.batch):
            x = _jitter(to_float(self.images.pixels[index]), self.shift, self.noise, self.generator)
            y = self.images.labels[index].to(self.device)
            loss = F.cross_entropy(self.model(x.to(self.device)), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach()
            bar.update()
        return {"loss": float(total) / self.steps}


def train_small(model, name, kind, data_dir, data_root):
    """Trains in place; prints the accuracy on the test split. The model ends in eval mode."""
    start = time.time()
    train, test = (load(images, workers=default_workers())
                   for images in open_both(_parent(data_dir), data_root))
    if len(train) < (64 if kind == "digits" else 128):
        raise UserError(f"--data_dir {data_dir}: {len(train)} training images are too few to train "
                        f"{name} on; type --weights PATH")
    training = SmallTraining(model.train(), kind, train)
    loop(training, RECIPES[kind][0], desc=f"train {name}, epoch")
    with torch.inference_mode():
        model.eval()
        right = sum((model(to_float(x).to(training.device)).argmax(1).cpu() == y).sum().item()
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
    """One random flip and shift (zero padding) for the batch, and noise for every pixel."""
    if noise:
        x = (x + noise * torch.randn(x.shape, generator=generator)).clamp_(0, 1)
    if not shift:
        return x
    dy, dx = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
    x = F.pad(x, (shift,) * 4)[..., shift + dy:x.shape[-2] + shift + dy,
                               shift + dx:x.shape[-1] + shift + dx]
    return x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x


# ------------------------------------------------------------------------------ heads

class MLDecoder(nn.Module):
    """Ridnik et al. 2021, Sec. 3: a transformer's decoder layer without its self-attention.

    A feature map (n, C, H, W) -> logits (n, classes). One query per class, or at most `queries`,
    each for a group of classes (group decoding). The queries are random and fixed; the layers are
    learnt.
    """

    def __init__(self, channels, classes, *, queries=100, width=768, hidden=2048, attention_heads=8,
                 dropout=0.1):
        super().__init__()
        groups = min(queries, classes)
        self.classes, each = classes, math.ceil(classes / groups)
        self.embed = nn.Linear(channels, width)
        self.register_buffer("queries", torch.randn(groups, width))
        self.norm_query, self.norm_seen, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, attention_heads, dropout, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout),
                                    nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(groups, width, each))  # of the group's classes
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x):
        places = F.relu(self.embed(x.flatten(2).transpose(1, 2)))  # (n, H W, width)
        q = self.queries.expand(len(x), -1, -1)
        q = self.norm_query(q + self.dropout(q))  # where self-attention would be
        seen = self.attention(q, places, places, need_weights=False)[0]
        q = self.norm_seen(q + self.dropout(seen))
        q = self.norm_out(q + self.dropout(self.hidden(q)))
        logits = torch.einsum("ngd,gdk->ngk", q, self.weight).flatten(1)
        return logits[:, :self.classes] + self.bias


def fc_head(channels, classes, dropout=0.2):
    """A feature map (n, C, H, W) -> logits (n, classes)."""
    layers, widths = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(channels)], (512, 256)
    for width in widths:
        layers += [nn.Linear(channels, width), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(width)]
        channels = width
    return nn.Sequential(*layers, nn.Linear(channels, classes))


class TimmBody(nn.Module):
    """A timm network without its head; most give a feature map (n, C, H, W)."""

    def __init__(self, net):
        super().__init__()
        net.reset_classifier(0)
        self.net = net

    def forward(self, x):
        return self.net.forward_features(x)


class WithHead(nn.Sequential):
    """Sequential(body, head): the body's feature map has `channels` channels."""

    def __init__(self, body, head, channels):
        super().__init__(body, head)
        self.channels = channels


def with_head(net, head, classes, name):
    """The network with another head; 'own' replaces only its last layer, and only if needed."""
    if head == "own":
        if isinstance(net, WithHead):
            raise UserError(f"these weights of {name} have another head than its own; give others, "
                            "or leave out --head")
        last, layer = last_layer(net)
        if layer.weight.shape[0] == classes:
            return net
        if hasattr(net, "reset_classifier"):  # timm's
            net.reset_classifier(classes)
        else:
            setattr(net.get_submodule(last.rpartition(".")[0]), last.rpartition(".")[2],
                    _with_outputs(layer, classes))
        return net
    body, channels = _body(net, name)
    return WithHead(body, {"fc": fc_head, "ml_decoder": MLDecoder}[head](channels, classes),
                    channels)


def head_parameters(net):
    """The head's parameters: all of an added head, or those of the network's own last layer."""
    return list((net[1] if isinstance(net, WithHead) else last_layer(net)[1]).parameters())


def last_layer(net):
    """Name and layer of the network's last linear layer, which in SqueezeNet is a convolution."""
    layers = [(name, layer) for name, layer in net.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if not layers:
        raise UserError("the network has no linear layer and no convolution to give other outputs")
    named = net.get_classifier() if hasattr(net, "get_classifier") else None  # timm says which
    return next((pair for pair in layers if pair[1] is named), layers[-1])


def _with_outputs(layer, classes):
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, classes, layer.kernel_size)
    return nn.Linear(layer.in_features, classes)


def _body(net, name):
    """The part that makes the feature map (n, C, H, W), and C; UserError if it is not known."""
    if isinstance(net, WithHead):
        return net[0], net.channels
    if hasattr(net, "forward_features") and hasattr(net, "reset_classifier"):
        body = TimmBody(net)
    elif isinstance(net, zoo.ResNet):
        body = nn.Sequential(*list(net.children())[:-2])
    elif isinstance(net, zoo.DenseNet):
        body = nn.Sequential(net.features, nn.ReLU())
    elif hasattr(net, "features") and not isinstance(net, zoo.SwinTransformer):
        body = net.features
    else:
        pools = [i for i, layer in enumerate(net.children())
                 if isinstance(layer, nn.AdaptiveAvgPool2d)]
        if not isinstance(net, nn.Sequential) or not pools:
            raise UserError(f"--head: {name} has no feature map that is known here; {ANOTHER}")
        body = net[:pools[0]]
    return body, _channels(body, name)


def _channels(body, name):
    """Number of channels of the feature map, by a dry run."""
    first = next(layer for layer in body.modules() if isinstance(layer, nn.Conv2d))
    was = body.training
    try:
        with torch.no_grad():
            found = body.eval()(torch.zeros((1, first.in_channels, 64, 64)))
    except (RuntimeError, AssertionError):  # from a transformer that takes only one size
        found = None
    if found is None or found.ndim != 4 or found.shape[2] != found.shape[3]:
        raise UserError(f"--head: {name} has no feature map (n, C, H, W); {ANOTHER}")
    body.train(was)
    return found.shape[1]
