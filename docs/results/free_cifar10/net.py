"""The network of run.sh: 0.7 million weights, small enough for PGD training on a CPU."""

from torch import nn

from utils.nets import Residual


class Small(nn.Sequential):
    """(N, 3, 32, 32) -> logits; 32, 64, 128, 256 channels, one residual block at 8 x 8."""
    mean = std = [0.5, 0.5, 0.5]

    def __init__(self, num_classes):
        super().__init__(*conv(3, 32), *conv(32, 64, 2), *conv(64, 128, 2), Residual(128, 128, 1),
                         *conv(128, 256, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(256, num_classes))


def conv(cin, cout, stride=1):
    """Convolution, BatchNorm, ReLU."""
    return nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()


def small(num_classes):
    """Small with random weights."""
    return Small(num_classes)
