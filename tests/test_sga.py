"""SGA and SPGD compared with an oracle written from the text of the method: one copy of delta for
each image, weights that require gradients, Python loops; on a curved model, with pixels at 0 and 1.
"""

import argparse
import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import train_sga as sga
from utils import sga_run
from utils.attack.universal import adam_step, clamped_ce, warp
from utils.data import Images, open_images, to_float
from utils.models import load_model
from utils.nets import build_small
from utils.run import save_pth

EPS, ALPHA = 10 / 255, 1 / 255
N, K, SIDE = 12, 4, 6


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


def toy(seed=0, dtype=torch.float64):
    """Smooth and strongly curved, so that a gradient depends on the point where it is taken."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), Sine(), nn.Flatten(),
                          nn.Linear(5 * SIDE * SIDE, 8), Sine(), nn.Linear(8, K))
    for weight in model.parameters():
        weight.data *= 5
    return model.to(dtype).eval().requires_grad_(False)


def pictures(n=N, seed=1):
    """(n, 3, SIDE, SIDE) uint8, a third of the pixels exactly 0 and a third exactly 255."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 255, (n, 3, SIDE, SIDE), generator=g)
    kind = torch.randint(0, 3, x.shape, generator=g)
    return torch.where(kind == 0, 0, torch.where(kind == 1, 255, x)).to(torch.uint8)


def clean_labels(models, x):
    return torch.stack([model(x).argmax(1) for model in models])


def trainable(model):
    return copy.deepcopy(model).requires_grad_(True)


def naive_loss(logits, label, loss="ce", beta=9.0, target=None):
    """The loss to maximize for one image, (K,) -> scalar, from exponentials."""
    wanted = label if target is None else target
    ce = -(logits[wanted].exp() / logits.exp().sum()).log()
    if target is not None:
        return -ce if loss == "ce" else logits[target]
    if loss == "logit":
        return -logits[label]
    return ce if ce < beta else ce * 0 + beta


def naive_gradient(models, x, delta, y, **kind):
    """Mean over images and models of the gradient; each image has its own copy of delta, and no
    gradient where image + delta lies outside [0, 1].
    """
    total, value = torch.zeros_like(delta), 0.0
    for model, labels in zip(map(trainable, models), y, strict=True):
        for image, label in zip(x, labels, strict=True):
            moved = image[None] + delta
            seen = moved.clamp(0, 1).requires_grad_(True)
            loss = naive_loss(model(seen)[0], label, **kind)
            loss.backward()
            total += seen.grad * ((moved >= 0) & (moved <= 1)) / len(x) / len(models)
            value += loss.item() / len(x) / len(models)
    return value, total


def naive_sga(models, x, y, delta, draws, eps=EPS, alpha=ALPHA, maps=None, **kind):
    inner, total, losses = delta.clone(), torch.zeros_like(delta), []
    for j, draw in enumerate(draws):
        batch = [x[i] if maps is None else warp(x[i][None], maps[j][k][None])[0]
                 for k, i in enumerate(draw)]
        loss, g = naive_gradient(models, torch.stack(batch), inner, y[:, draw], **kind)
        inner = inner + alpha * torch.sign(g)
        edge = torch.tensor(eps, dtype=inner.dtype)
        inner = torch.maximum(torch.minimum(inner, edge), -edge)
        total = total + g
        losses.append(loss)
    return sum(losses) / len(losses), total


def naive_update(delta, g, v, eps, alpha, mu):
    v = mu * v + g / g.abs().sum() if mu else v
    moved = delta + alpha * torch.sign(v if mu else g)
    return torch.maximum(torch.minimum(moved, torch.tensor(eps)), torch.tensor(-eps)), v


def gradient_of(models, loss="ce", beta=9.0, target=None):
    made = sga.make_loss(loss, beta, target)
    return lambda x, delta, y: sga.input_gradient(models, x, delta, y, loss=made)


def same(ours, naive):
    scale = naive.abs().max()
    assert scale > 0
    assert (ours - naive).abs().max() <= 1e-6 * scale
    near_zero = naive.abs() < 1e-9 * scale  # pixels where clamp lets nothing through
    assert torch.equal(ours.sign()[~near_zero], naive.sign()[~near_zero])


@pytest.fixture
def world():
    """models, x with pixels at 0 and 1, clean labels (S, N), a delta inside the ball."""
    models = [toy()]
    x = pictures().double() / 255
    delta = (torch.randint(-10, 11, (1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
             .double() / 255)
    return models, x, clean_labels(models, x), delta


DRAWS = torch.tensor([[0, 3, 5], [2, 1, 7], [5, 6, 11], [8, 9, 10], [4, 3, 0]])


@pytest.mark.parametrize("kind", [
    {}, {"beta": 0.4}, {"loss": "logit"}, {"target": 2}, {"target": 1, "loss": "logit"}], ids=str)
def test_the_summed_gradient_of_sga_equals_the_naive_oracle(world, kind):
    models, x, y, delta = world
    value, g = sga.sga_gradient(gradient_of(models, **kind), x, y, delta, DRAWS, eps=EPS,
                                alpha=ALPHA)
    naive_value, naive = naive_sga(models, x, y, delta, DRAWS, **kind)
    same(g, naive)
    assert float(value) == pytest.approx(naive_value, rel=1e-6)


def test_the_pre_search_moves_starts_at_delta_and_is_clipped_to_eps(world):
    models, x, y, delta = world
    _, g = sga.sga_gradient(gradient_of(models), x, y, delta, DRAWS, eps=EPS, alpha=ALPHA)
    for wrong in (naive_sga(models, x, y, delta, DRAWS, alpha=0.0)[1],       # never moves
                  naive_sga(models, x, y, 0 * delta, DRAWS)[1],              # starts at zero
                  naive_sga(models, x, y, delta, DRAWS, eps=1.0)[1]):        # is not clipped
        assert (g - wrong).abs().max() > 0.01 * g.abs().max()


def test_the_pre_search_is_clipped_to_the_ball(world):
    models, x, y, _ = world
    edge = torch.full((1, 3, SIDE, SIDE), EPS, dtype=torch.float64)
    _, g = sga.sga_gradient(gradient_of(models), x, y, edge, DRAWS, eps=EPS, alpha=4 * ALPHA)
    same(g, naive_sga(models, x, y, edge, DRAWS, alpha=4 * ALPHA)[1])


def test_sga_changes_none_of_its_arguments(world):
    models, x, y, delta = world
    before = [t.clone() for t in (x, y, delta)]
    sga.sga_gradient(gradient_of(models), x, y, delta, DRAWS, eps=EPS, alpha=ALPHA)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, delta), strict=True))
    assert not delta.requires_grad and delta.grad is None


def test_spgd_gives_the_gradient_of_the_whole_batch_whatever_the_chunk_size(world):
    models, x, y, delta = world
    value, naive = naive_gradient(models, x, delta, y)
    for size in (N, 5, 1):  # 5 leaves a last part of 2
        ours_value, g = sga.spgd_gradient(gradient_of(models), x, y, delta,
                                          torch.arange(N).split(size), eps=EPS, alpha=ALPHA)
        same(g, naive)
        assert float(ours_value) == pytest.approx(value, rel=1e-6)


def test_black_and_white_pixels_have_a_gradient_until_delta_takes_them_outside(world):
    """torch.clamp stops it at exactly 0 and 1 since torch 2.15; earlier versions passed it on."""
    models, x, y, _ = world
    at_the_edge = torch.full_like(x[:1], 0.5)
    at_the_edge[0, 0, 0, 0], at_the_edge[0, 1, 2, 3] = 0.0, 1.0
    zero, out = torch.zeros_like(at_the_edge), torch.zeros_like(at_the_edge)
    out[0, 0, 0, 0], out[0, 1, 2, 3] = -ALPHA, ALPHA
    for delta, alive in ((zero, True), (out, False)):
        _, g = gradient_of(models)(at_the_edge, delta, y[:, :1])
        assert bool(g[0, 0, 0, 0]) is alive and bool(g[0, 1, 2, 3]) is alive


def test_several_surrogates_give_the_mean_of_their_losses_each_with_its_own_labels(world):
    _, x, _, delta = world
    models = [toy(0), toy(1), toy(2)]
    y = clean_labels(models, x)
    assert not torch.equal(y[0], y[1])
    value, g = sga.sga_gradient(gradient_of(models), x, y, delta, DRAWS, eps=EPS, alpha=ALPHA)
    naive_value, naive = naive_sga(models, x, y, delta, DRAWS)
    same(g, naive)
    assert float(value) == pytest.approx(naive_value, rel=1e-6)


def test_an_augmented_step_equals_the_naive_one_on_images_warped_one_by_one(world):
    models, x, y, delta = world
    maps = sga.draw_maps(DRAWS.shape, torch.Generator().manual_seed(5)).double()
    _, g = sga.sga_gradient(gradient_of(models), x, y, delta, DRAWS, eps=EPS, alpha=ALPHA,
                            augment=maps)
    same(g, naive_sga(models, x, y, delta, DRAWS, maps=maps)[1])
    whole = torch.arange(N).split(5)
    flat = sga.draw_maps((N,), torch.Generator().manual_seed(6)).double()
    _, g = sga.spgd_gradient(gradient_of(models), x, y, delta, whole, augment=flat.split(5))
    warped = torch.cat([warp(x[i:i + 1], flat[i:i + 1]) for i in range(N)])
    same(g, naive_gradient(models, warped, delta, y)[1])


def test_computing_gradients_changes_neither_the_global_rng_nor_weights_flags_grads_or_mode(world):
    models, x, y, delta = world
    model = models[0].train()  # the mode is the caller's
    model[0].weight.requires_grad_(True)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    weights, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sga.sga_gradient(gradient_of(models), x, y, delta, DRAWS, eps=EPS, alpha=ALPHA,
                     augment=sga.draw_maps(DRAWS.shape, torch.Generator()).double())
    sga.spgd_gradient(gradient_of(models), x, y, delta, torch.arange(N).split(5))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert model.training and model[0].weight.requires_grad and not model[3].weight.requires_grad
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


# ------------------------------------------------------------------------ losses

def test_an_image_past_beta_counts_beta_and_gives_no_gradient():
    logits = torch.tensor([[0.0, 20.0], [1.0, 0.0]], requires_grad=True)  # CE of label 0: 20, 0.31
    value = clamped_ce(logits, torch.tensor([0, 0]), 9.0)
    value.backward()
    near = -np.log(np.exp(1) / (np.exp(1) + 1))
    assert value.item() == pytest.approx((9 + near) / 2, rel=1e-6)
    assert torch.equal(logits.grad[0], torch.zeros(2))
    assert logits.grad[1].abs().min() > 0.1


def test_the_logit_loss_is_minus_the_mean_logit_of_the_label():
    logits = torch.tensor([[1.0, 5.0, 2.0], [7.0, -3.0, 0.0]])
    assert float(sga.make_loss("logit", 9, None)(logits, torch.tensor([1, 2]))) == -2.5


def test_a_targeted_loss_ignores_the_label_and_grows_towards_the_target():
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    for name in ("ce", "logit"):
        loss = sga.make_loss(name, 0.1, 2)  # beta does not silence images far from the target
        assert loss(logits, torch.tensor([0])) == loss(logits, torch.tensor([1]))
        more = logits + torch.tensor([0.0, 0.0, 1.0])
        assert loss(more, torch.tensor([0])) > loss(logits, torch.tensor([0]))
    assert float(sga.make_loss("logit", 9, 2)(logits, torch.tensor([0]))) == 2.0


# -------------------------------------------------------------------- outer step

def test_momentum_equals_mu_v_plus_g_over_its_l1_norm_computed_by_hand():
    delta, v = torch.zeros(1, 1, 1, 3), torch.tensor([0.3, -0.3, 0.0]).view(1, 1, 1, 3)
    g = torch.tensor([-1.0, 2.0, 1.0]).view(1, 1, 1, 3)  # ||g||_1 = 4
    new, v = sga.update(delta, g, v, eps=0.1, alpha=0.04, mu=0.9)
    torch.testing.assert_close(v.flatten(), torch.tensor([0.02, 0.23, 0.25]))
    torch.testing.assert_close(new.flatten(), torch.tensor([0.04, 0.04, 0.04]))
    new, _ = sga.update(delta, g, v, eps=0.1, alpha=0.04, mu=0.0)
    torch.testing.assert_close(new.flatten(), torch.tensor([-0.04, 0.04, 0.04]))


def test_a_zero_gradient_moves_nothing_and_momentum_stays_finite():
    delta, v = torch.full((1, 1, 2, 2), 0.02), torch.zeros(1, 1, 2, 2)
    for mu in (0.0, 0.9):
        new, velocity = sga.update(delta, v.clone(), v, eps=0.1, alpha=0.04, mu=mu)
        assert torch.equal(new, delta) and velocity.isfinite().all()


@pytest.mark.parametrize("steps", [1, 30])
def test_adam_takes_the_steps_of_torchs_adam_clipped_to_eps(steps):
    oracle = torch.zeros(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([oracle], lr=0.02, maximize=True)
    delta, v = torch.zeros(1, 3, 4, 4).double(), torch.zeros(2, 3, 4, 4).double()
    for step in range(1, steps + 1):
        g = torch.randn(delta.shape, generator=torch.Generator().manual_seed(step)).double() * 1e-3
        delta, v = adam_step(delta, g, v, eps=0.04, alpha=0.02, step=step)
        oracle.grad = g
        optimizer.step()
        with torch.no_grad():
            oracle.clamp_(-0.04, 0.04)
    torch.testing.assert_close(delta, oracle.detach(), rtol=0, atol=1e-12)
    assert (delta.abs() == 0.04).any() == (steps > 1)


def options(**changed):
    return argparse.Namespace(**{
        "method": "sga", "batch_size": 5, "minibatch": 3, "iter": 4, "eps": EPS, "alpha": ALPHA,
        "momentum": 0.0, "augment": False, "loss": "ce", "beta": 9.0, "target": None,
        "defense": "none", "bpda": False, "image_size": SIDE, "amp": "off", "layout": "contiguous",
        "deterministic": False, "layer": None, "seed": 0}
        | changed)


class Bar:
    def __init__(self):
        self.ticks = 0

    def update(self):
        self.ticks += 1


def training_of(s, models, pixels, seed=0):
    """A training on these images that has just started."""
    images = Images("folder", tuple(map(str, range(len(pixels)))), torch.zeros(len(pixels)).long(),
                    ("one",), SIDE, pixels=pixels)
    training = sga.SgaTraining(s, models, images, torch.Generator().manual_seed(seed),
                               torch.device("cpu"))
    training.start()
    return training


def epochs(s, model, pixels, count, seed=0):
    """`count` epochs of ours from zero; -> delta, v, last mean loss, deltas after each one"""
    training, trail = training_of(s, [model], pixels, seed), []
    for _ in range(count):
        bar = Bar()
        found = training.one_pass(bar)
        training.rows.append(found)
        assert bar.ticks == training.steps
        trail.append(training.delta.clone())
    return training.delta, training.v, found["loss"], trail


def naive_epochs(args, model, pixels, count, seed=0):
    """The same from the text of the method, with the same draws from the generator."""
    x = pixels.float() / 255
    y = clean_labels([model], x)
    delta, v = torch.zeros(1, *x.shape[1:]), torch.zeros(1, *x.shape[1:])
    g, steps = torch.Generator().manual_seed(seed), 0
    for _ in range(count):
        order, losses = torch.randperm(len(x), generator=g), 0.0
        for start in range(0, len(x), args.batch_size):
            large = order[start:start + args.batch_size]
            draws = sga.index_draws(args, len(large), g)
            if args.method == "sga":
                maps = sga.draw_maps(draws.shape, g) if args.augment else None
                loss, total = naive_sga([model], x[large], y[:, large], delta, draws, maps=maps)
            else:
                loss, total = naive_gradient([model], x[large], delta, y[:, large])
            if args.method == "adam":
                v, steps = v.expand(2, -1, -1, -1), steps + 1
                delta, v = adam_step(delta, total, v, eps=args.eps, alpha=args.alpha, step=steps)
            else:
                delta, v = naive_update(delta, total, v, args.eps, args.alpha, args.momentum)
            losses += loss * len(large)
    return delta, v, losses / len(x)


@pytest.mark.parametrize("changed", [
    {}, {"momentum": 0.9}, {"augment": True}, {"method": "spgd"}, {"batch_size": 100},
    {"batch_size": 11}, {"momentum": 0.5, "method": "spgd"}, {"method": "adam"}], ids=str)
def test_two_epochs_equal_those_of_the_naive_oracle(changed):
    """Batches of 5, 5, 2 (fewer than a minibatch); 12 (less than a batch); 11, 1 (one image)."""
    args, model, pixels = options(**changed), toy(dtype=torch.float32), pictures()
    delta, v, loss, _ = epochs(args, model, pixels, 2)
    naive, naive_v, naive_loss_value = naive_epochs(args, model, pixels, 2)
    torch.testing.assert_close(delta, naive, rtol=0, atol=1e-7)
    torch.testing.assert_close(v, naive_v, rtol=1e-4, atol=3e-8)  # entries of 0.01
    assert loss == pytest.approx(naive_loss_value, rel=1e-5)


def test_delta_never_leaves_eps_and_stays_on_the_grid_of_1_255():
    *_, trail = epochs(options(), toy(dtype=torch.float32), pictures(), 8)
    for delta in trail:
        assert delta.abs().max() <= EPS + 1e-8
        assert (delta * 255 - (delta * 255).round()).abs().max() < 1e-4
    assert (trail[-1].abs() > EPS - 1e-6).any()  # it reached the edge


def test_the_perturbation_raises_the_loss_that_is_maximized():
    model, pixels = toy(dtype=torch.float32), pictures()
    x = pixels.float() / 255
    y = clean_labels([model], x)[0]
    for method in ("sga", "spgd"):
        delta, *_ = epochs(options(method=method), model, pixels, 3)
        clean, after = (clamped_ce(model(z), y, 9.0) for z in (x, (x + delta).clamp(0, 1)))
        assert after > clean


# -------------------------------------------------------------------- index_draws

def test_there_are_k_n_over_minibatch_inner_steps_and_none_draws_an_image_twice():
    g = torch.Generator().manual_seed(0)
    for n, steps in ((250, 100), (7, 2), (10, 4), (251, 100)):  # 4 * n // 10
        draws = sga.index_draws(options(minibatch=10), n, g)
        assert draws.shape == (steps, min(10, n))
        assert all(len(set(row)) == len(row) and 0 <= min(row) <= max(row) < n
                   for row in draws.tolist())
    assert sga.index_draws(options(minibatch=10), 1, g).tolist() == [[0]]  # 4 * 1 // 10 = 0: one
    draws = sga.index_draws(options(minibatch=10), 250, g)
    assert not torch.equal(draws[0].sort()[0], draws[1].sort()[0])
    assert len(draws.unique()) > 240  # 100 fresh draws reach nearly everyone


def test_spgd_visits_every_image_once():
    assert torch.cat(sga.index_draws(options(method="spgd"), 123, torch.Generator())).tolist() \
        == list(range(123))


# --------------------------------------------------------------------- augmentation

IDENTITY = torch.tensor([[1.0, 0, 0], [0, 1, 0]])


def mapped(a, b=0.0, dx=0.0, dy=0.0):
    return torch.tensor([[a, b, dx], [-b, 1.0, dy]])[None]


def test_the_identity_map_returns_the_image():
    x = pictures(3).float() / 255
    torch.testing.assert_close(warp(x, IDENTITY.expand(3, 2, 3)), x, rtol=0, atol=1e-6)


def test_a_flip_map_gives_the_flipped_image():
    x = pictures(3).float() / 255
    torch.testing.assert_close(warp(x, mapped(-1.0).expand(3, 2, 3)), x.flip(-1), rtol=0,
                               atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, -2])
def test_a_shift_map_gives_the_shifted_image_with_reflected_borders(k):
    x = pictures(2).float() / 255
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 0), (3, 3)), mode="symmetric")
    wanted = torch.from_numpy(padded[..., 3 + k:3 + k + SIDE])
    ours = warp(x, mapped(1.0, dx=2 * k / SIDE).expand(2, 2, 3))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def naive_warp(image, matrix):
    """Bilinear sampling of one image (C, H, W) where the map says, mirrored at the edges."""
    channels, height, width = image.shape

    def pixel(c, i, j):
        while not 0 <= i < height:
            i = -1 - i if i < 0 else 2 * height - 1 - i
        while not 0 <= j < width:
            j = -1 - j if j < 0 else 2 * width - 1 - j
        return image[c, i, j]

    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            u, v = (2 * j + 1) / width - 1, (2 * i + 1) / height - 1
            fx, fy = (((row @ np.array([u, v, 1.0])) + 1) * side / 2 - 0.5
                      for row, side in zip(matrix, (width, height), strict=True))
            j0, i0 = int(np.floor(fx)), int(np.floor(fy))
            for c in range(channels):
                out[c, i, j] = sum(
                    (1 - abs(fy - a)) * (1 - abs(fx - b)) * pixel(c, a, b)
                    for a in (i0, i0 + 1) for b in (j0, j0 + 1))
    return out


def test_warping_by_drawn_maps_is_bilinear_sampling_with_mirrored_edges():
    x = pictures(6).double() / 255
    maps = sga.draw_maps((6,), torch.Generator().manual_seed(2)).double()
    wanted = torch.from_numpy(np.stack([naive_warp(image, m) for image, m in
                                        zip(x.numpy(), maps.numpy(), strict=True)]))
    torch.testing.assert_close(warp(x, maps), wanted, rtol=0, atol=1e-9)


def test_maps_differ_per_image_repeat_by_seed_and_keep_to_their_ranges():
    maps = sga.draw_maps((50, 40), torch.Generator().manual_seed(4))
    assert torch.equal(maps, sga.draw_maps((50, 40), torch.Generator().manual_seed(4)))
    assert not torch.equal(maps, sga.draw_maps((50, 40), torch.Generator().manual_seed(5)))
    assert maps.shape == (50, 40, 2, 3) and len(maps.view(-1, 6).unique(dim=0)) == 2000
    flipped = maps[..., 0, 0] < 0
    assert 0.45 < flipped.float().mean() < 0.55
    zoom = 1 / maps[..., 1, 1]
    assert 0.7 <= zoom.min() < 0.71 and 1.29 < zoom.max() <= 1.3 + 1e-6
    torch.testing.assert_close(maps[..., 0, 0].abs(), maps[..., 1, 1])  # the shape is kept
    for shift in (maps[..., 0, 2], maps[..., 1, 2]):  # 0.2 of a side that is 2 long
        assert -0.4 <= shift.min() < -0.39 and 0.39 < shift.max() <= 0.4


# --------------------------------------------------------------- what a run feeds it

def test_the_labels_of_a_run_are_clean_predictions_not_the_ground_truth(run_here, tmp_path):
    result = run_here("train_sga.py", "--num_images", 60, "--epochs", 1, "--model_name", "mlp,cnn",
                      "--weights", "random", "--amp", "off", "--layout", "contiguous",
                      "--uaps_save", "run")  # the older name of --save
    assert result.returncode == 0, result.stderr
    images = open_images("digits", split="train").prepared(28, 60)
    x = to_float(images.pixels)
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["labels"]
    for row, name in zip(saved, ("mlp", "cnn"), strict=True):
        model = load_model(name, weights="random", kind="digits")
        with torch.no_grad():
            predicted = model(x).argmax(1)
        assert torch.equal(row, predicted)
        assert not torch.equal(predicted, images.labels)


def test_the_logged_fooling_ratio_is_the_mean_over_the_surrogates_on_the_watched_images(
        monkeypatch):
    monkeypatch.setattr(sga_run, "WATCHED", 5)
    monkeypatch.setattr(sga_run, "PER_IMAGE", 1)
    models, pixels = [toy(seed, torch.float32) for seed in (0, 1)], pictures()
    training = training_of(options(target=1, eps=1.0), models, pixels)
    training.delta = torch.rand((1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    x, ratios, hits = pixels[[0, 2, 5, 8, 11]] / 255, [], []
    for model in models:
        before, after = model(x).argmax(1), model((x + training.delta).clamp(0, 1)).argmax(1)
        ratios.append((before != after).float().mean().item())
        hits.append((after == 1)[before != 1].float().mean().item())
    assert 0 < sum(ratios) < 2
    found = training.after()
    assert found["fooling_ratio"] == pytest.approx(sum(ratios) / 2)
    assert found["targeted_success"] == pytest.approx(sum(hits) / 2)


def test_a_restored_training_continues_with_the_same_draws_and_values():
    s, model, pixels = options(momentum=0.9), toy(dtype=torch.float32), pictures()
    first, second = (training_of(s, [model], pixels, seed) for seed in (0, 1))
    first.one_pass(Bar())
    state = first.state()
    del state["stopped"]  # as in a checkpoint of an older version
    second.restore(state)
    found = [training.one_pass(Bar())["loss"] for training in (first, second)]
    assert found[0] == found[1]
    assert torch.equal(first.delta, second.delta) and torch.equal(first.v, second.v)


def test_the_surrogates_may_be_one_network_with_two_files_of_weights(run_here, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_pth(tmp_path / f"{seed}.pth", build_small("mlp", 1, 28).state_dict())
    result = run_here("train_sga.py", "--num_images", 30, "--epochs", 1, "--model_name", "mlp,mlp",
                      "--weights", "0.pth,1.pth", "--amp", "off", "--layout", "contiguous",
                      "--save", "run")
    assert result.returncode == 0, result.stderr
    labels = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["labels"]
    assert len(labels) == 2 and not torch.equal(*labels)
    facts = json.loads((tmp_path / "run" / "sga_mlp+mlp.json").read_text())
    assert list(facts["on_training_images"]) == ["mlp_0", "mlp_1"]
