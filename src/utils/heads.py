"""Heads of the challenge's classifier on the feature maps of ConvNeXt and of other networks.

    own          the network's own, its last layer for as many classes as there are
    fc           pool, 512, 256, classes, with GELU, dropout and LayerNorm between
    ml_decoder   queries that look at the places of the feature map   arXiv:2111.12933
"""

import math

import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import nn

from utils.run import UserError

HEADS = ("own", "fc", "ml_decoder")


class MLDecoder(nn.Module):
    """Ridnik et al. 2021, Sec. 3: a transformer's decoder layer without its self-attention.

    Features (n, C, H, W) -> logits (n, classes). As many queries as classes, or `queries` of them,
    each of which answers for a group of classes (group decoding). The queries are fixed and random;
    what they pass through is learnt.
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
    """Features (n, C, H, W) -> logits (n, classes)."""
    layers, widths = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(channels)], (512, 256)
    for width in widths:
        layers += [nn.Linear(channels, width), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(width)]
        channels = width
    return nn.Sequential(*layers, nn.Linear(channels, classes))


class WithHead(nn.Sequential):
    """Sequential(body, head): the body's feature map has `channels` channels."""

    def __init__(self, body, head, channels):
        super().__init__(body, head)
        self.channels = channels


def with_head(net, head, classes, name):
    """The network with another head: 'own' changes its last layer alone, and only where it must."""
    if head == "own":
        if isinstance(net, WithHead):
            raise UserError(f"these weights of {name} have another head than its own; give others, "
                            "or leave out --head")
        last, layer = _last(net)
        if layer.weight.shape[0] != classes:
            setattr(net.get_submodule(last.rpartition(".")[0]), last.rpartition(".")[2],
                    _with_outputs(layer, classes))
        return net
    body, channels = _body(net, name)
    return WithHead(body, {"fc": fc_head, "ml_decoder": MLDecoder}[head](channels, classes),
                    channels)


def head_parameters(net):
    """The parameters of the head: of another one all, of the network's own the last layer's."""
    return list((net[1] if isinstance(net, WithHead) else _last(net)[1]).parameters())


def _last(net):
    """Name and layer of the network's last linear layer, which in SqueezeNet is a convolution."""
    return [(name, layer) for name, layer in net.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]


def _with_outputs(layer, classes):
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, classes, layer.kernel_size)
    return nn.Linear(layer.in_features, classes)


def _body(net, name):
    """What makes the feature map (n, C, H, W), and C; UserError where that is not known."""
    if isinstance(net, WithHead):
        return net[0], net.channels
    if isinstance(net, zoo.ResNet):
        body = nn.Sequential(*list(net.children())[:-2])
    elif isinstance(net, zoo.DenseNet):
        body = nn.Sequential(net.features, nn.ReLU())
    elif hasattr(net, "features") and not isinstance(net, zoo.SwinTransformer):
        body = net.features
    else:
        pools = [i for i, layer in enumerate(net.children())
                 if isinstance(layer, nn.AdaptiveAvgPool2d)]
        if not isinstance(net, nn.Sequential) or not pools:
            raise UserError(f"--head: {name} has no feature map that is known here; type --head "
                            "own, or another network, such as convnext_tiny, resnet50, cnn_bn")
        body = net[:pools[0]]
    return body, _channels(body)


def _channels(body):
    """Of the feature map, by looking at one."""
    first = next(layer for layer in body.modules() if isinstance(layer, nn.Conv2d))
    was = body.training
    with torch.no_grad():
        found = body.eval()(torch.zeros((1, first.in_channels, 64, 64))).shape[1]
    body.train(was)
    return found
