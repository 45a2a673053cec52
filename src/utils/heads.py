"""Heads of the challenge's classifier on the feature maps of ConvNeXt and of our small networks.

    fc           pool, 512, 256, classes, with GELU, dropout and LayerNorm between
    ml_decoder   queries that look at the places of the feature map   arXiv:2111.12933
"""

import math

import torch
import torch.nn.functional as F
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


def with_head(net, head, classes, name):
    """The network with another head: 'own' keeps it where it has as many classes."""
    body, channels = _body(net)
    if head == "own" and _last(net).out_features == classes:
        return net
    if body is None:
        raise UserError(f"head {head}: {name} has no feature map that is known here; wanted a "
                        "ConvNeXt, cnn_bn, vgg_small or resnet_small, or its own head with "
                        f"{_last(net).out_features} classes")
    if head == "own":
        top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    else:
        top = {"fc": fc_head, "ml_decoder": MLDecoder}[head](channels, classes)
    return nn.Sequential(body, top)


def _last(net):
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]


def _body(net):
    """What makes the feature map, and its channels; (None, None) where that is not known."""
    if hasattr(net, "features") and type(net).__name__ == "ConvNeXt":
        return net.features, net.classifier[-1].in_features
    if isinstance(net, nn.Sequential):
        pools = [i for i, layer in enumerate(net) if isinstance(layer, nn.AdaptiveAvgPool2d)]
        if pools:
            return net[:pools[0]], _last(net).in_features
    return None, None
