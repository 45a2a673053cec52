"""Networks that free_at.py and fgsm_mnist.py train, for 32 x 32 pixels and smaller.

    lenet, lenet_bn   two convolutions of stride 2 and two linear layers; with BatchNorm after all
                      but the last of them
    preact_resnet18   He et al. 2016 (arXiv:1603.05027), widths 64 to 512
    wrn_32_10         Zagoruyko and Komodakis 2016 (arXiv:1605.07146) as Madry et al. count: five
                      blocks a stage, widths 160, 320, 640 (elsewhere called WRN-34-10)
"""

import torch.nn.functional as F
from torch import nn


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


def _network(channels, first, widths, blocks):
    layers, cin = [_conv3(channels, first, 1)], first
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(PreAct(cin, width, 2 if stage and not block else 1))
            cin = width
    return nn.Sequential(*layers, nn.BatchNorm2d(cin), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(cin, 10))


def _lenet(channels, size, norm):
    layers, widths = [], ((channels, 16), (16, 32))
    for cin, cout in widths:
        layers += [nn.Conv2d(cin, cout, 4, 2, 1), *([nn.BatchNorm2d(cout)] if norm else []),
                   nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 100),
        *([nn.BatchNorm1d(100)] if norm else []), nn.ReLU(), nn.Linear(100, 10))


NETWORKS = {  # name: (channels, pixels) -> network of 10 classes
    "lenet": lambda channels, size: _lenet(channels, size, norm=False),
    "lenet_bn": lambda channels, size: _lenet(channels, size, norm=True),
    "preact_resnet18": lambda channels, _: _network(channels, 64, (64, 128, 256, 512), 2),
    "wrn_32_10": lambda channels, _: _network(channels, 16, (160, 320, 640), 5)}
