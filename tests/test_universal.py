"""Losses that compare a network's outputs with those for the clean image, their layer, presets:
against an oracle that goes image by image, without hooks, and normalises by hand.
"""

import json
from functools import partial

import pytest
import torch
from test_sga import (
    ALPHA,
    DRAWS,
    EPS,
    SIDE,
    Bar,
    naive_update,
    options,
    pictures,
    same,
    toy,
    trainable,
    training_of,
)
from torch import nn
from torchvision import models

import train_sga as sga
from utils import sga_run
from utils.attack.chance import numbered
from utils.attack.universal import Features, cosine_loss, feature_layer, warp
from utils.defenses import ResizePad
from utils.errors import UserError
from utils.nets import build_small
from utils.precision import Fast

LAYER = 3  # of toy(): the first linear layer


def naive_comparison(models, x, delta, cut_at):
    """Mean of -<a, b> / |a||b| over images and models, and its gradient; a, b: outputs of
    the first `cut_at` layers of a model for image + delta and for the image, image by image.
    """
    total, value = torch.zeros_like(delta), 0.0
    for model in map(trainable, models):
        for image in x:
            seen = (image[None] + delta).clamp(0, 1).requires_grad_(True)
            a, b = (model[:cut_at](z).flatten() for z in (seen, image[None]))
            b = b.detach()
            loss = -(a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt()
            loss.backward()
            inside = (image[None] + delta >= 0) & (image[None] + delta <= 1)
            total += seen.grad * inside / len(x) / len(models)
            value += loss.item() / len(x) / len(models)
    return value, total


def naive_sga(models, x, delta, draws, cut_at, maps=None):
    inner, total, losses = delta.clone(), torch.zeros_like(delta), []
    for j, draw in enumerate(draws):
        batch = [x[i] if maps is None else warp(x[i][None], maps[j][k][None])[0]
                 for k, i in enumerate(draw)]
        value, g = naive_comparison(models, torch.stack(batch), inner, cut_at)
        inner = (inner + ALPHA * g.sign()).clamp(-EPS, EPS)
        total += g
        losses.append(value)
    return sum(losses) / len(losses), total


@pytest.fixture
def world():
    x = pictures().double() / 255
    delta = (torch.randint(-10, 11, (1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
             .double() / 255)
    return [toy(0), toy(1)], x, delta


def gradient_of(seen):
    return lambda x, delta, y: sga.input_gradient(seen, x, delta, y, loss=cosine_loss)


# ------------------------------------------------------------------------ the losses

@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize("cut_at", [None, LAYER + 1])
def test_the_cosine_of_logits_or_features_equals_the_naive_oracle(world, cut_at, warped):
    nets, x, delta = world
    seen = nets if cut_at is None else [Features(net, str(LAYER)) for net in nets]
    maps = sga.draw_maps(DRAWS.shape, torch.Generator().manual_seed(5)).double() if warped else None
    value, g = sga.sga_gradient(gradient_of(seen), x, [None, None], delta, DRAWS, eps=EPS,
                                alpha=ALPHA, augment=maps)
    naive_value, naive = naive_sga(nets, x, delta, DRAWS, cut_at, maps)
    same(g, naive)
    assert float(value) == pytest.approx(naive_value, rel=1e-6)


def test_given_outputs_equal_those_that_would_be_computed(world):
    nets, x, delta = world
    clean = [net(x) for net in nets]
    for aggregate in (sga.sga_gradient, sga.spgd_gradient):
        kept, computed = (aggregate(gradient_of(nets), x, y, delta, DRAWS, eps=EPS, alpha=ALPHA)
                          for y in (clean, [None, None]))
        torch.testing.assert_close(kept[0], computed[0], rtol=1e-9, atol=0)
        same(kept[1], computed[1])


def test_each_member_is_compared_with_its_own_outputs(world):
    nets, x, delta = world
    value, g = sga.input_gradient(nets, x, delta, [net(x) for net in nets], loss=cosine_loss)
    naive_value, naive = naive_comparison(nets, x, delta, None)
    same(g, naive)
    assert float(value) == pytest.approx(naive_value, rel=1e-6)


def test_the_clean_side_has_no_gradient():
    """A weight that requires one would get it through both sides."""
    net, asked = toy(dtype=torch.float32), []

    def model(x):
        asked.append(torch.is_grad_enabled())
        return net(x)

    x = pictures(3).float() / 255
    sga.input_gradient([model], x, torch.full_like(x[:1], ALPHA), [None], loss=cosine_loss)
    assert asked == [False, True]


def test_the_gradient_of_an_ensemble_is_the_mean_of_its_members_own_gradients(world):
    nets, x, delta = world
    y = [None, None]
    value, g = sga.input_gradient(nets, x, delta, y, loss=cosine_loss)
    own = [sga.model_gradient(net, x, delta, None, cosine_loss) for net in nets]
    assert torch.equal(g, (own[0][1] + own[1][1]) / 2)
    assert torch.equal(value, (own[0][0] + own[1][0]) / 2)


@pytest.mark.parametrize("augment", [False, True])
def test_two_epochs_of_a_comparing_loss_equal_those_of_the_naive_oracle(augment):
    s = options(loss="cosine", augment=augment, momentum=0.5)
    net = toy(dtype=torch.float32)
    training = training_of(s, [net], pictures())
    # at delta = 0 the gradient of the cosine is zero up to rounding: both start beside it
    start = torch.full_like(training.delta, ALPHA)
    training.delta = start
    for _ in range(2):
        training.one_pass(Bar())
    x, g = pictures().float() / 255, torch.Generator().manual_seed(0)
    delta, v = start, torch.zeros_like(start)
    for _ in range(2):
        for large in torch.randperm(len(x), generator=g).split(s.batch_size):
            draws = sga.index_draws(s, len(large), g)
            maps = sga.draw_maps(draws.shape, g) if augment else None
            _, total = naive_sga([net], x[large], delta, draws, None, maps)
            delta, v = naive_update(delta, total, v, s.eps, s.alpha, s.momentum)
    torch.testing.assert_close(training.delta, delta, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["sga", "spgd"])
def test_a_perturbation_leaves_zero_where_the_gradient_is_zero_up_to_rounding(method):
    training = training_of(options(loss="cosine", method=method), [toy(dtype=torch.float32)],
                           pictures())
    losses = [training.one_pass(Bar())["loss"] for _ in range(3)]
    assert training.delta.abs().max() > 0 and losses[-1] > losses[0] >= -1 - 1e-6


# ------------------------------------------------------------------------ forward passes

class Counting(nn.Module):
    """A network that counts the images that it sees."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x)


@pytest.mark.parametrize(("augment", "passes"), [(False, 1 + 4), (True, 4 + 4)])
def test_clean_outputs_are_computed_once_per_batch_if_images_are_not_warped(augment, passes):
    """K = 4 uses of each of 12 images, in batches and minibatches that leave no rest."""
    s = options(loss="cosine", augment=augment, batch_size=6, minibatch=3)
    training = training_of(s, [toy(dtype=torch.float32)], pictures())
    counting = Counting(training.attacked[0])
    training.attacked = [counting]
    training.one_pass(Bar())
    assert counting.seen == passes * 12


def test_behind_a_random_defence_both_sides_draw_the_same_and_each_step_draws_anew(monkeypatch):
    drawn, real = [], ResizePad.draw
    monkeypatch.setattr(ResizePad, "draw", lambda self, x: drawn.append(real(self, x)) or drawn[-1])
    x = pictures(8).float() / 255
    model = nn.Sequential(ResizePad(3, SIDE), toy(dtype=torch.float32))

    def gradient(*given):
        value, g = sga.input_gradient([model, model], *given, loss=cosine_loss)
        assert float(value) == pytest.approx(-1, abs=1e-6)
        return value, g
    draws = torch.tensor([[0, 1, 2], [1, 2, 3]])
    for aggregate in (partial(sga.sga_gradient, eps=0.0, alpha=0.0), sga.spgd_gradient):
        drawn.clear()
        aggregate(gradient, x, [None, None], torch.zeros_like(x[:1]), draws, chance=numbered(0, 8))
        sides = torch.stack([torch.stack(part) for part in drawn])  # of step, model, image
        assert torch.equal(sides[::2], sides[1::2])
        steps = sides[::2].unflatten(0, (2, 2))
        assert not torch.equal(steps[:, 0], steps[:, 1])                     # each model its own
        assert not torch.equal(steps[0, :, :, 1:], steps[1, :, :, :2])       # each step anew


@pytest.mark.parametrize("loss", ["ce", "cosine"])
@pytest.mark.parametrize("method", ["sga", "spgd"])
def test_each_pass_through_a_random_defence_draws_anew_from_the_seed(monkeypatch, loss, method):
    def draws_of(seed, passes=1):
        drawn, real = [], ResizePad.draw
        with monkeypatch.context() as patch:
            patch.setattr("utils.defenses.PUBLISHED_LOW", 0.5)
            patch.setattr(ResizePad, "draw",
                          lambda self, x: drawn.append(real(self, x)) or drawn[-1])
            s = options(loss=loss, defense="resizepad", method=method, seed=seed)
            training = training_of(s, [toy(dtype=torch.float32)], pictures())
            for _ in range(passes):
                drawn.clear()
                training.rows.append(training.one_pass(Bar()))
        return torch.stack([torch.cat(part) for part in zip(*drawn, strict=True)], 1)
    once = draws_of(3)
    assert torch.equal(once, draws_of(3))
    assert not torch.equal(once, draws_of(4)) and not torch.equal(once, draws_of(3, passes=2))


# ------------------------------------------------------------------------ the layer

def test_features_are_the_layers_output_and_leave_no_hook():
    net, x = toy(), pictures(4).double() / 255
    features = Features(net, str(LAYER))
    later = Counting(net[LAYER + 1])
    net[LAYER + 1] = later
    torch.testing.assert_close(features(x), net[:LAYER + 1](x).float())
    assert later.seen == 0  # what comes after the layer is not computed
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(AssertionError, match="no part"):
        Features(Apart(), "unused")(x)


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Flatten()

    def forward(self, x):
        return x


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_features_of_a_fast_model_are_float32_and_near_those_of_the_model(layout):
    net = build_small("cnn_bn", 1, 28).eval()
    model = nn.Sequential(nn.Identity(), net).requires_grad_(False)
    x = torch.rand((4, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    layer = feature_layer(net, x)
    wanted = Features(model, f"1.{layer}")(x)
    fast = Features(Fast(model, "bf16", layout), f"model.1.{layer}")(x)
    assert fast.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(fast, wanted).min() > 0.99


FOUND = {  # the last feature map before pooling, or the last block's tokens
    "alexnet": "features.11", "vgg11_bn": "features.27", "squeezenet1_1": "features",
    "resnet18": "layer4", "densenet121": "features", "mobilenet_v2": "features",
    "mobilenet_v3_small": "features", "shufflenet_v2_x0_5": "conv5", "mnasnet0_5": "layers",
    "efficientnet_b0": "features", "googlenet": "inception5b", "convnext_tiny": "features",
    "swin_t": "permute", "vit_b_32": "encoder.layers", "inception_v3": "Mixed_7c",
    "maxvit_t": "blocks.3", "swin_v2_t": "permute", "regnet_x_400mf": "trunk_output"}


@pytest.mark.parametrize("name", FOUND)
def test_the_last_feature_map_of_torchvision_networks_is_found(name):
    """On the meta device, where nothing is computed; RegNet computes its widths."""
    more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        net = models.get_model(name, weights=None, **more).eval().to("meta")
    assert feature_layer(net, torch.rand(2, 3, 224, 224, device="meta")) == FOUND[name]


def test_a_layer_that_does_not_fit_gives_one_line():
    x = torch.rand(2, 1, 28, 28)
    mlp, cnn = build_small("mlp", 1, 28), build_small("cnn", 1, 28)
    with pytest.raises(UserError, match="no feature map before its classifier; type --layer"):
        feature_layer(mlp, x)
    with pytest.raises(UserError, match="--layer none: no such layer"):
        feature_layer(cnn, x, "none")
    block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    twice = nn.Sequential(block, nn.Sequential(block), nn.Flatten(), nn.Linear(784, 3))
    with pytest.raises(UserError, match="--layer 0.1: is called more than once"):
        feature_layer(twice, x, "0.1")
    assert feature_layer(twice, x) == "1"
    assert feature_layer(cnn, x, "0") == "0"


# ------------------------------------------------------------------------ settings

def settled(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["train_sga.py", *map(str, flags)])
    return sga_run.plans(sga.get_args())[0][0]


CASES = {  # flags: augment, momentum, loss, batch_size
    (): (False, 0, "ce", 250), ("--preset", "paper"): (False, 0, "ce", 250),
    ("--augment",): (True, 0.9, "ce", 250), ("--preset", "few_images"): (True, 0.9, "ce", 250),
    ("--preset", "transfer"): (True, 0.9, "feature", 50),
    ("--preset", "transfer", "--loss", "ce", "--batch_size", 20): (True, 0.9, "ce", 20),
    ("--preset", "transfer", "--no-augment"): (False, 0.9, "feature", 50),
    ("--preset", "transfer", "--momentum", 0): (True, 0, "feature", 50),
    ("--preset", "transfer", "--method", "adam"): (True, 0, "feature", 50)}


@pytest.mark.parametrize("flags", CASES, ids=" ".join(["{}"]).format)
def test_a_preset_sets_the_flags_that_are_not_typed(monkeypatch, flags):
    s = settled(monkeypatch, *flags)
    assert (s.augment, s.momentum, s.loss, s.batch_size) == CASES[flags]


@pytest.mark.parametrize("method", ["spgd", "adam"])
def test_methods_without_inner_steps_take_any_batch_size(monkeypatch, method):
    s = settled(monkeypatch, "--method", method, "--batch_size", 8)
    assert (s.minibatch, s.iter) == (10, 4)  # as in older runs, which can be resumed
    s = settled(monkeypatch, "--batch_size", 8, "--minibatch", 5, "--iter", 2)
    assert (s.minibatch, s.iter) == (5, 2)


def test_the_watched_images_cost_at_most_a_twentieth_of_an_epochs_gradients():
    for images, gradients in ((400, 1600), (250, 1000), (10_000, 40_000), (400, 400), (5, 20)):
        index = sga_run.watched(images, gradients)
        assert len(index) == max(1, min(100, images, gradients // 20))
        assert index[0] == 0 and index.unique().numel() == len(index)


def test_the_logged_fooling_ratio_is_computed_in_the_precision_of_the_gradients(monkeypatch):
    training = training_of(options(), [toy(dtype=torch.float32)], pictures())
    used = []
    monkeypatch.setattr(sga_run, "fooled", lambda training, models, index: used.extend(models) or [{
        "fooling_ratio": {"value": 0.5}}])
    training.after()
    assert [behind.model for behind in used] == training.fast  # in halves if memory runs out


def test_the_facts_name_the_layer_and_count_the_gradients(run_here, tmp_path):
    result = run_here("train_sga.py", "--num_images", 60, "--epochs", 2, "--preset", "transfer",
                      "--weights", "random", "--amp", "off", "--layout", "contiguous",
                      "--save", "r")
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "r/sga_cnn_augment_feature.json").read_text())
    assert facts["loss"] == "feature" and facts["batch_size"] == 50
    assert f"the loss compares the output of {facts['layers'][0]}" in result.stdout
    assert facts["gradients"] == 2 * (200 + 40)
