"""DM-UAP's inner minimisation against a naive loop, with the departures that maximin.py names."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_sga import options, training_of
from torch import nn

import train_sga
from utils.attack import maximin
from utils.attack.universal import adam_step, draw_maps, make_loss, warp
from utils.precision import Fast

N, SIDE, K = 7, 8, 5
RHO, RADIUS = 4.0, 25.0 * math.sqrt(SIDE * SIDE / (224 * 224))
LOSS = make_loss("ce", 9.0, None)


def network(dtype=torch.float64):
    """Frozen, in eval mode, with BatchNorm and an unused weight."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(),
                            nn.Dropout(0.5), nn.Linear(6 * 36, K))
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return net.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((N, 3, SIDE, SIDE), generator=generator, dtype=torch.float64)
    model = network()
    return model, x, model(x).argmax(1), torch.full((1, 3, SIDE, SIDE), 0.02, dtype=x.dtype)


def naive(model, x, y, delta, share, rho=RHO, radius=RADIUS):
    """Loss and gradient of delta, one image at a time where images are moved."""
    model = copy.deepcopy(model).requires_grad_(True)
    for _ in range(10):
        model.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.2).backward()
        parts = [p for p in model.parameters() if p.grad is not None]
        length = sum(p.grad.square().sum() for p in parts).sqrt()
        for p in parts:
            p.data -= share * rho / 10 * p.grad / length
    moved = []
    for image, label in zip(x, y, strict=True):
        at = image.clone()
        for _ in range(10):
            at.requires_grad_(True)
            g, = torch.autograd.grad(F.cross_entropy(model(at[None]), label[None]), at)
            at = at.detach() - share * radius / 8 * g / g.norm()
            step = at - image
            at = (image + step * min(1, share * radius / float(step.norm()))).clamp(0, 1)
        moved.append(at)
    delta = delta.clone().requires_grad_(True)
    loss = LOSS(model((torch.stack(moved) + delta).clamp(0, 1)), y)
    return loss.detach(), torch.autograd.grad(loss, delta)[0]


def ours(model, x, y, delta, share, parts=(N,), augment=None):
    gradient = partial(train_sga.input_gradient, [model], loss=LOSS)
    return maximin.maximin_gradient(
        train_sga.spgd_gradient, model, share, gradient, x, y[None], delta,
        torch.arange(N).split(list(parts)), augment=augment, eps=0.1, alpha=0.1)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("parts", [(N,), (4, 3)], ids=str)
def test_the_gradient_equals_that_of_the_published_loop_in_any_chunks(world, share, parts):
    model, x, y, delta = world
    loss, g = ours(*world, share, parts)
    naive_loss, naive_g = naive(*world, share)
    torch.testing.assert_close(loss, naive_loss)
    torch.testing.assert_close(g, naive_g, rtol=1e-5, atol=1e-6 * float(g.abs().max()))
    assert not torch.allclose(g, ours(*world, 1e-9)[1], rtol=1e-2)  # the moves matter


def test_images_are_warped_before_they_are_moved(world):
    model, x, y, delta = world
    maps = draw_maps((N,), torch.Generator().manual_seed(2)).double()
    loss, g = ours(*world, 0.02, (4, 3), augment=maps.split([4, 3]))
    naive_loss, naive_g = naive(model, warp(x, maps), y, delta, 0.02)
    torch.testing.assert_close(loss, naive_loss)
    torch.testing.assert_close(g, naive_g, rtol=1e-5, atol=1e-6 * float(g.abs().max()))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_network_is_restored_to_the_last_bit(amp, fails):
    model = Fast(network(torch.float32), amp, "contiguous")
    before = copy.deepcopy(model.state_dict())
    x = torch.rand((N, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    y, seen = model(x).argmax(1), []

    def outer(gradient, x, y, delta, draws, **options):
        seen.append([k for k, v in model.state_dict().items() if not torch.equal(v, before[k])])
        if fails:
            raise KeyboardInterrupt
        return torch.zeros(()), delta

    def run():
        maximin.maximin_gradient(outer, model, 1.0, None, x, y[None], torch.zeros(1, 3, SIDE, SIDE),
                                 [torch.arange(N)])
    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert len(seen[0]) == 6  # weights and biases of three layers; BatchNorm's buffers are not
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_both_moves_make_the_network_more_confident_and_stay_within_their_radii(world):
    model, x, y, _ = world
    kept = [p.clone() for p in model.parameters()]
    with maximin._surer_weights(model, x, y, 0.5, [torch.arange(N)]):
        away = sum((p - k).square().sum() for p, k in zip(model.parameters(), kept, strict=True))
        assert 0.4 < away.sqrt() <= 0.5 + 1e-9
        surer = F.cross_entropy(model(x), y, label_smoothing=0.2)
    assert surer < F.cross_entropy(model(x), y, label_smoothing=0.2)
    moved = maximin._surer_images(model, x, y, 0.5)
    assert (moved - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-9
    assert moved.min() >= 0 and moved.max() <= 1
    assert F.cross_entropy(model(moved), y) < F.cross_entropy(model(x), y)


def test_two_epochs_equal_those_of_the_naive_oracle_and_both_radii_grow(monkeypatch):
    monkeypatch.setattr(maximin, "RHO", RHO / 50)  # with larger radii float32 is chaotic
    monkeypatch.setattr(maximin, "RADIUS", 25.0 / 50)
    model = network(torch.float32)
    pixels = torch.randint(0, 256, (N, 3, SIDE, SIDE), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(3))
    s = options(method="dm", batch_size=4, epochs=2, alpha=0.01, image_size=SIDE)
    training = training_of(s, [model], pixels)
    for _ in range(2):
        found = training.one_pass(Bar())
        training.rows.append(found)
    g, exact, x = torch.Generator().manual_seed(0), network(), pixels.double() / 255
    y = exact(x).argmax(1)
    delta, v, steps = torch.zeros_like(x[:1]), torch.zeros_like(x[:2]), 0
    for share in (0.5, 1.0):
        for large in torch.randperm(N, generator=g).split(4):
            total = naive(exact, x[large], y[large], delta, share, RHO / 50, RADIUS / 50)[1]
            steps += 1
            delta, v = adam_step(delta, total, v, eps=s.eps, alpha=s.alpha, step=steps)
    near = (training.delta.double() - delta).abs() < 2e-4  # of steps of 1e-2
    assert near.float().mean() > 0.95  # float32 rounding decides the sign of gradients near zero
    assert (delta.abs() > 0.009).float().mean() > 0.5


class Bar:
    def update(self, n=1):
        pass


def test_a_run_records_its_number_of_gradients_and_its_rate(run_here, tmp_path):
    flags = ("--data_dir", "digits", "--num_images", 20, "--model_name", "mlp", "--method", "dm",
             "--epochs", 2, "--batch_size", 8, "--device", "cpu", "--save", "run")
    done = run_here("train_sga.py", *flags)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run/dm_mlp.json").read_text())
    assert facts["gradients"] == 2 * 20 * 21
    assert facts["alpha"] == pytest.approx(2.55 * facts["eps"])
    assert facts["amp"] == "off" and facts["momentum"] == 0
    done = run_here("train_sga.py", *flags, "--epochs", 3, "--resume")
    assert done.returncode == 2 and "size of its steps depends on it" in done.stderr
