"""What only a GPU shows: the bytes of a graph, and that no step waits. Not run on a GPU so far."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

import attacks
import train_sga
from attack_toys import chances, greys, predicted, toy
from utils import graphs, passes
from utils.attack.universal import draw_maps, make_loss
from utils.augment import PRESETS, augment
from utils.data import load, open_images
from utils.models import load_model
from utils.precision import Fast
from utils.team import Team

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="there is no CUDA device")]
CUDA = torch.device("cuda")


@contextmanager
def nothing_waits():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Between(nn.Module):
    """Wraps the model; nothing may wait from its second forward pass to the last but one."""

    def __init__(self, model, passes):
        super().__init__()
        self.model, self.passes, self.count = model, passes, 0

    def forward(self, x):
        self.count += 1
        torch.cuda.set_sync_debug_mode("error" if 2 <= self.count < self.passes else "default")
        return self.model(x)


STEPS = {"bim": partial(attacks.bim, alpha=0.001, steps=6), "mim": partial(
             attacks.mim, alpha=0.001, steps=6),
         "pgd": partial(attacks.pgd, alpha=0.001, steps=6),
         "pgd l2": partial(attacks.pgd, norm="l2", alpha=0.001, steps=6)}


@pytest.mark.parametrize("name", STEPS)
def test_no_step_of_an_attack_waits(name):
    x = greys(3).to(CUDA)
    model = Between(toy().to(CUDA), 6)
    try:
        STEPS[name](model, x, predicted(toy(), x.cpu()).to(CUDA), eps=0.002)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.count >= 6


def sga(amp, layout, method="sga"):
    """A gradient of a small network, and the arguments of a large batch."""
    model = load_model("cnn", weights="random", kind="digits", data_dir="digits", device="cuda")
    fast = Fast(model, amp, layout)
    gradient = partial(train_sga.input_gradient, [fast], loss=make_loss("ce", 9.0, None))
    x = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(CUDA)
    draws = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(k))[:10]
                         for k in range(8)])
    maps = draw_maps(draws.shape, torch.Generator().manual_seed(1)).to(CUDA)
    return gradient, x, fast(x).argmax(1)[None], draws.to(CUDA), maps


AGGREGATE = {"sga": partial(train_sga.sga_gradient, eps=0.2, alpha=0.02),
             "spgd": train_sga.spgd_gradient}


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", AGGREGATE)
def test_a_graph_gives_the_bytes_of_a_step_without_one_and_no_step_waits(method, amp, layout,
                                                                         augmented):
    gradient, x, y, draws, maps = sga(amp, layout)
    delta, more = torch.zeros_like(x[:1]), {"augment": maps if augmented else None}
    graphed = graphs.Graphed(gradient)
    plain = AGGREGATE[method](gradient, x, y, delta, draws, **more)
    first = AGGREGATE[method](graphed, x, y, delta, draws, **more)  # records
    assert graphed.like is not None and not graphed.failed
    with nothing_waits():
        again = AGGREGATE[method](graphed, x, y, delta, draws, **more)
    for found in (first, again):
        assert all(map(torch.equal, found, plain)) and plain[1].abs().max() > 0


def test_minibatches_come_without_waiting_and_are_augmented_as_on_the_cpu():
    images = load(open_images("digits", split="train").prepared(28, 60), workers=0)
    made = passes.one_pass(images, 20, torch.Generator(), Team(), vary=True, smallest=1, workers=0,
                           device=CUDA)
    with nothing_waits():
        found = [x for _, _, x in made]
    assert len(found) == 3 and all(x.is_cuda for x in found)
    here = augment(found[0].cpu(), PRESETS["released"], generator=chances(20))
    there = augment(found[0], PRESETS["released"], generator=chances(20)).cpu()
    assert (here.int() - there.int()).abs().float().mean() < 0.05  # sums in another order
