"""For adaptive attackers: a stand-in for a layer's gradient, and the mean over random draws.

Athalye et al., arXiv:1802.00420.
"""

import math
from numbers import Integral

import torch
from torch import nn

from utils.errors import UserError


class bpda(nn.Module):  # noqa: N801  # lower case because it is used like a function
    """`layer` in the forward pass, `backward` in the backward pass (None: the identity).

    backward: a differentiable stand-in for the layer; its Jacobian at x is used. The layer's own
    weights get no gradient. UserError if the stand-in's output and the layer's differ in shape.
    """

    def __init__(self, layer, backward=None):
        super().__init__()
        self.layer, self.backward = layer, backward

    def forward(self, x):
        return _StandIn.apply(x, self.layer, self.backward)


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, backward):
        out = layer(x.clone())  # a copy: the layer may work in place
        if backward is None and out.shape != x.shape:
            raise UserError(f"bpda: the layer turns {tuple(x.shape)} into {tuple(out.shape)}, so "
                            "the identity cannot stand in for its backward pass; type bpda(layer, "
                            "backward=function)")
        ctx.save_for_backward(x)
        ctx.stand_in = backward
        return out

    @staticmethod
    def backward(ctx, g):
        if ctx.stand_in is None:
            return g, None, None
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.stand_in(x)
            if out.shape != g.shape:
                raise UserError(f"bpda: the layer gives {tuple(g.shape)}, its stand-in "
                                f"{tuple(out.shape)}; wanted the same shape")
            return torch.autograd.grad(out, x, g)[0], None, None


class eot(nn.Module):  # noqa: N801  # lower case because it is used like a function
    """Expectation over transformation: a random model whose gradient the attacks average.

    One call is one draw of the model. The attacks average logits, losses and gradients over
    `draws` calls, even if this module is part of another; the mean logits decide which images are
    fooled. The model must draw anew at every call. Layers that use utils/attack/random_layers.py
    give an image the same draws in any batch; others draw from their own generator.
    """

    def __init__(self, model, draws):
        super().__init__()
        if not isinstance(draws, Integral) or draws < 1:
            raise UserError(f"draws={draws!r}; wanted a whole number of at least 1")
        self.model, self.draws = model, draws

    def forward(self, x):
        return self.model(x)


def draws_of(model):
    """Number of forward passes that the attacks average: the product over the model's eots."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return math.prod(part.draws for part in parts if isinstance(part, eot))
