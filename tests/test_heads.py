"""Heads of utils/nets.py: ML-Decoder compared with naive attention, heads on many networks."""

import pytest
import torch
from torchvision import models as zoo

from utils.errors import UserError
from utils.nets import MLDecoder, build_small, fc_head, head_parameters, with_head


def naive(head, x):
    """The decoder one image, query and attention head at a time, float64."""
    width, many = head.embed.out_features, head.attention.num_heads
    size, logits = width // many, []

    def norm(layer, v):
        v = (v - v.mean()) / (v.var(unbiased=False) + layer.eps).sqrt()
        return v * layer.weight + layer.bias
    for image in x:
        places = [torch.relu(head.embed.weight @ p + head.embed.bias)
                  for p in image.flatten(1).t()]
        wq, wk, wv = head.attention.in_proj_weight.split(width)
        bq, bk, bv = head.attention.in_proj_bias.split(width)
        answers = []
        for g, query in enumerate(head.queries):
            q = norm(head.norm_query, 2 * query)
            parts = []
            for h in range(many):
                own = slice(h * size, (h + 1) * size)
                a = (wq @ q + bq)[own]
                scores = torch.stack([a @ (wk @ p + bk)[own] for p in places]) / size ** 0.5
                share = scores.exp() / scores.exp().sum()
                parts.append(sum(s * (wv @ p + bv)[own]
                                 for s, p in zip(share, places, strict=True)))
            out = head.attention.out_proj
            q = norm(head.norm_seen, q + out.weight @ torch.cat(parts) + out.bias)
            first, _, _, last = head.hidden
            inner = torch.relu(first.weight @ q + first.bias)
            q = norm(head.norm_out, q + last.weight @ inner + last.bias)
            answers += [q @ head.weight[g, :, k] for k in range(head.weight.shape[2])]
        logits.append(torch.stack(answers)[:head.classes] + head.bias)
    return torch.stack(logits)


@pytest.mark.parametrize(("classes", "queries"), [(5, 100), (7, 3)])
def test_ml_decoder_equals_attention_written_naively(classes, queries):
    torch.manual_seed(0)
    head = MLDecoder(6, classes, queries=queries, width=8, hidden=10, attention_heads=2).double()
    torch.nn.init.normal_(head.bias)
    torch.nn.init.normal_(head.attention.in_proj_bias)
    x = torch.randn(3, 6, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = head.eval()(x), naive(head, x)
    assert found.shape == (3, classes) and found.std() > 0.1
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10)


def test_the_queries_are_fixed_and_all_parameters_have_gradients():
    head = MLDecoder(6, 5, width=8, hidden=10, attention_heads=2)
    head(torch.randn(2, 6, 2, 2)).square().sum().backward()
    assert "queries" not in dict(head.named_parameters()) and "queries" in head.state_dict()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("head", ["own", "fc", "ml_decoder"])
@pytest.mark.parametrize("name", ["resnet_small", "cnn_bn", "vgg_small"])
def test_small_networks_take_every_head(name, head):
    net = with_head(build_small(name, 3, 32), head, 7, name)
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("head", ["own", "fc", "ml_decoder"])
def test_convnext_takes_every_head(head):
    net = with_head(zoo.convnext_tiny(), head, 12, "convnext_tiny")
    assert net.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 12)
    if head == "fc":
        sizes = [layer.out_features for layer in net[1] if hasattr(layer, "out_features")]
        assert sizes == [512, 256, 12] and net[1][3].in_features == 768


def test_a_network_without_a_known_feature_map_takes_only_its_own_head():
    net = build_small("mlp", 1, 28)
    assert with_head(net, "own", 10, "mlp") is net
    assert with_head(net, "own", 7, "mlp")(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    for head in ("fc", "ml_decoder"):
        with pytest.raises(UserError, match="no feature map"):
            with_head(net, head, 10, "mlp")
    with pytest.raises(UserError, match="leave out --head"):
        with_head(with_head(build_small("cnn_bn", 1, 28), "fc", 7, "cnn_bn"), "own", 7, "cnn_bn")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "squeezenet1_1", "mobilenet_v2",
                                  "vit_b_16", "swin_t", "vgg11"])
def test_torchvision_networks_take_any_number_of_classes(name):
    net, size = zoo.get_model(name, weights=None).eval(), 224 if name == "vit_b_16" else 64
    x, own = torch.rand(1, 3, size, size), None
    with torch.no_grad():
        if name not in ("vit_b_16", "swin_t"):
            assert with_head(net, "fc", 7, name).eval()(x).shape == (1, 7)
        else:
            with pytest.raises(UserError, match="no feature map"):
                with_head(net, "fc", 7, name)
        own = with_head(net, "own", 7, name)
        assert own is net and own(x).shape == (1, 7)
    assert sum(p.numel() for p in head_parameters(own)) % 7 == 0


def test_the_fc_head_takes_feature_maps_of_any_size():
    head = fc_head(6, 4).eval()
    assert head(torch.rand(2, 6, 5, 3)).shape == (2, 4)
