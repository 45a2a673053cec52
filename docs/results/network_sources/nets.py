"""A network given by a function, for run.sh: the mean logits of two torchvision networks."""

import os

from torch import nn

from utils.models import load_model


class Mean(nn.Module):
    """Networks on [0, 1] pixels -> the mean of their logits."""

    def __init__(self, *nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x):
        return sum(net(x) for net in self.nets) / len(self.nets)


def both():
    """SqueezeNet 1.0 and MobileNetV2, with the weights named by $WEIGHTS."""
    return Mean(*(load_model(name, weights=os.environ.get("WEIGHTS", "V1"))
                  for name in ("squeezenet1_0", "mobilenet_v2")))
