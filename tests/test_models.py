"""Networks: [0, 1] pixels in, logits out, frozen; weights from files that are never executed."""

import os
import pickle
import shutil

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms as T

from utils import models
from utils.data import SMALL, Geometry, open_images, paper_geometry, to_float
from utils.errors import UserError
from utils.models import Normalize, load_model
from utils.nets import build_small
from utils.run import save_pth
from utils.sources import source

KINDS = {"digits": (1, 28, 28), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def pixels(n, *shape, seed=0):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))
    x[:, :, 0], x[:, :, 1] = 0, 1  # exactly black and exactly white rows
    return x


@pytest.fixture
def state():
    """The state dict of a small network with BatchNorm that has seen data."""
    net = build_small("cnn_bn", 1, 28)
    net(torch.rand(8, 1, 28, 28))
    return net.state_dict()


def load_small(path, name="cnn_bn"):
    return load_model(name, weights=str(path), kind="digits")


# ------------------------------------------------------------------------- the model

@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_a_torchvision_model_is_normalize_then_net_frozen_in_eval_mode(name):
    model = load_model(name, weights="random")
    assert len(model) == 2 and isinstance(model[0], Normalize)
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    x = pixels(2, 3, 64, 64)
    normalised = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    assert torch.equal(model(x), model[1](normalised))
    assert model(x).shape == (2, 1000) and model(x).dtype == torch.float32
    assert not torch.equal(model(x), model[1](x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_the_small_networks_take_the_images_of_each_kind_and_have_ten_classes(name, kind):
    rng = torch.get_rng_state()
    model = load_model(name, weights="random", kind=kind)
    assert torch.equal(torch.get_rng_state(), rng)
    x = pixels(2, *KINDS[kind])
    assert model(x).shape == (2, 10)
    assert torch.equal(model(x), model[1](2 * x - 1))  # [-1, 1] inside
    assert not any(p.requires_grad or m.training for m in model.modules() for p in m.parameters())


def test_the_five_small_networks_have_different_architectures():
    built = {name: build_small(name, 1, 28) for name in SMALL}
    kinds = {name: {type(m).__name__ for m in net.modules()} for name, net in built.items()}
    assert "Conv2d" not in kinds["mlp"] and "BatchNorm2d" not in kinds["cnn"]
    assert "BatchNorm2d" in kinds["cnn_bn"] and "Residual" in kinds["resnet_small"]
    assert len({sum(p.numel() for p in net.parameters()) for net in built.values()}) == 5


@pytest.mark.slow
def test_a_small_network_is_trained_on_first_use_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    first = load_model("mlp", kind="digits", data_dir="digits")
    said = capsys.readouterr().out
    assert "trained mlp on digits" in said
    assert float(said.split("accuracy ")[1].split(" %")[0]) > 95
    monkeypatch.setattr(models, "train_small", lambda *a: pytest.fail("trained again"))
    again = load_model("mlp", kind="digits", data_dir="digits")
    x = pixels(4, 1, 28, 28)
    assert torch.equal(first(x), again(x))
    kept = list(tmp_path.rglob("*.pth"))
    assert [path.name for path in kept] == [f"digits_mlp_{models.RECIPE_VERSION}.pth"]


def test_a_network_trained_on_a_folder_never_stands_in_for_that_of_the_data_set(
        tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trained = []
    monkeypatch.setattr(models, "train_small",
                        lambda model, name, kind, data_dir, root: trained.append(data_dir))
    for data_dir in ("a", "a/../a", "b", "digits", "digits", "b", "c"):
        load_model("mlp", kind="digits", data_dir=data_dir)
    assert trained == ["a", "b", "digits"]  # c: that of the data set is there


def test_inception_is_for_299_pixels_and_the_others_for_224():
    sizes = [models.input_size(name, "imagenet", 224, "V1")
             for name in ("inception_v3", "vgg16", "googlenet")]
    assert sizes == [299, 224, 224]


# ------------------------------------------------------------------- how images are read

PUBLISHED = {  # (network, weights): evaluation transforms on torchvision's pages
    ("resnet50", "V1"): (256, 224, "bilinear"), ("resnet50", "V2"): (232, 224, "bilinear"),
    ("wide_resnet50_2", "V1"): (256, 224, "bilinear"),
    ("densenet121", "V1"): (256, 224, "bilinear"), ("vit_b_16", "V1"): (256, 224, "bilinear"),
    ("efficientnet_b4", "V1"): (384, 380, "bicubic"), ("swin_s", "V1"): (246, 224, "bicubic"),
    ("convnext_tiny", "V1"): (236, 224, "bilinear"),
    ("inception_v3", "random"): (342, 299, "bilinear")}


@pytest.fixture
def photograph(tmp_path, picture):
    """One photograph of ImageNet's first class: its path, and the images of its folder."""
    path = picture(tmp_path / "val" / "n01440764" / "a.jpg", 431, 500)
    return path, open_images(tmp_path / "val", split="test")


def target_of(images, name, weights="V1", **flags):
    target, = models.targets_of([[name]], [[weights]], None, images, **flags)
    return target


@pytest.mark.parametrize(("name", "weights"), PUBLISHED, ids=str)
def test_with_geometry_weights_pixels_equal_those_of_the_published_transforms(photograph, name,
                                                                              weights):
    path, images = photograph
    target = target_of(images, name, weights, geometry="weights")
    pixels = images.prepared(target.geometry, None)[0]
    resize, crop, interpolation = PUBLISHED[name, weights]
    image = Image.open(path).convert("RGB")
    by_hand = T.Compose([T.Resize(resize, T.InterpolationMode(interpolation)), T.CenterCrop(crop)])
    assert target.size == crop
    assert torch.equal(pixels, T.functional.pil_to_tensor(by_hand(image)))
    key = "IMAGENET1K_" + weights.replace("random", "V1")
    whole = torchvision.models.get_model_weights(name)[key].transforms()
    ours = Normalize(whole.mean, whole.std)(to_float(pixels))
    assert torch.equal(ours, whole(image))


@pytest.mark.parametrize(("name", "weights"), PUBLISHED, ids=str)
def test_with_the_papers_geometry_every_network_gets_the_same_pixels(photograph, name, weights):
    path, images = photograph
    wanted = T.Compose([T.Resize(256), T.CenterCrop(224), T.PILToTensor()])(
        Image.open(path).convert("RGB"))
    target = target_of(images, name, weights)
    assert torch.equal(images.prepared(target.geometry, None)[0], wanted)
    assert target_of(images, name, weights, image_size=380).geometry == Geometry(380, 434)


@pytest.mark.parametrize("geometry", ["paper", "weights"])
def test_a_network_trained_here_is_measured_at_its_own_size(tmp_path, photograph, geometry):
    save_pth(tmp_path / "mine.pth", {})
    (tmp_path / "mine.json").write_text('{"image_size": 96}')
    mine = str(tmp_path / "mine.pth")
    assert target_of(photograph[1], "resnet50", mine, geometry=geometry).geometry \
        == paper_geometry(96)
    (tmp_path / "mine.json").write_text('{"image_size": "large"}')
    assert target_of(photograph[1], "resnet50", mine, geometry=geometry).size == 224


@pytest.mark.parametrize("geometry", ["paper", "weights"])
def test_small_images_are_never_scaled(geometry):
    images = open_images("digits", split="test")
    assert target_of(images, "cnn", geometry=geometry).geometry == Geometry(28, 28)


def test_a_size_that_does_not_fit_the_weights_is_refused_with_geometry_weights(photograph):
    with pytest.raises(UserError) as error:
        target_of(photograph[1], "efficientnet_b4", image_size=224, geometry="weights")
    one_line(error, "--geometry weights --image_size 224", "efficientnet_b4", "380 pixels")
    assert target_of(photograph[1], "efficientnet_b4", image_size=380, geometry="weights").size \
        == 380


def test_a_network_of_a_fixed_size_refuses_others_in_one_line(photograph, monkeypatch):
    def tiny(name, **options):
        return torchvision.models.VisionTransformer(image_size=224, patch_size=112, num_layers=1,
                                                    num_heads=1, hidden_dim=8, mlp_dim=8)

    monkeypatch.setattr(torchvision.models, "get_model", tiny)
    images = photograph[1]
    more = {"data_dir": None, "data_root": None, "device": "cpu"}
    target_of(images, "vit_b_16", "random").load(images, **more)
    with pytest.raises(UserError) as error:
        target_of(images, "vit_b_16", "random", image_size=256).load(images, **more)
    one_line(error, "--image_size 256", "vit_b_16", "type --image_size 224")


def test_geometries_are_listed_once_or_with_their_networks(photograph):
    def said(**flags):
        return models.describe_geometry(models.targets_of(
            [["resnet50", "swin_s", "vit_b_16"]], [["V1"]], None, photograph[1], **flags))

    assert said() == "shorter side to 256 (bilinear), centre crop 224"
    assert said(geometry="weights") == (
        "resnet50, vit_b_16 shorter side to 256 (bilinear), centre crop 224 / "
        "swin_s shorter side to 246 (bicubic), centre crop 224")


# ------------------------------------------------------------------ weights of a file

def test_half_precision_weights_load_as_float32(tmp_path, state):
    save_pth(tmp_path / "w.pth", {k: v.half() if v.is_floating_point() else v
                                  for k, v in state.items()})
    net = load_small(tmp_path / "w.pth")[1]
    for name, value in net.state_dict().items():
        assert value.dtype == state[name].dtype
        if value.is_floating_point():
            assert torch.equal(value, state[name].half().float())


@pytest.mark.parametrize("form", ["plain", "module", "state_dict", "model", "both", "no batches"])
def test_a_state_dict_loads_from_every_known_wrapping(tmp_path, state, form):
    prefixed = {f"module.{k}": v for k, v in state.items()}
    save_pth(tmp_path / "w.pth", {
        "plain": state, "module": prefixed, "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state}, "both": {"state_dict": prefixed},
        "no batches": {k: v for k, v in state.items() if "num_batches" not in k}}[form])
    net = load_small(tmp_path / "w.pth")[1]
    reference = build_small("cnn_bn", 1, 28)
    reference.load_state_dict(state)
    x = pixels(2, 1, 28, 28)
    assert torch.equal(net(x), reference.eval()(x))


def test_a_folder_of_weights_holds_one_file_for_each_network(tmp_path, state):
    save_pth(tmp_path / "cnn_bn.pth", state)
    assert torch.equal(load_small(tmp_path)[1][0].weight, state["0.weight"])
    with pytest.raises(UserError, match="cnn.pth"):
        load_small(tmp_path, "cnn")


def test_googlenet_from_a_local_file_is_built_as_torchvision_builds_it(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    theirs.transform_input = True  # what torchvision sets when it loads its own weights
    save_pth(tmp_path / "googlenet.pth", theirs.state_dict())
    ours = load_model("googlenet", weights=str(tmp_path))
    assert ours[1].transform_input and ours[1].aux1 is None and ours[1].aux2 is None
    x = pixels(2, 3, 64, 64)
    wanted = theirs.eval()((x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    torch.testing.assert_close(ours(x), wanted)
    theirs.transform_input = False
    assert not torch.allclose(ours(x), theirs((x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)))


# ---------------------------------------------------------------------------- refused

@pytest.mark.parametrize(("name", "kind", "near"), [
    ("vgg_16", "imagenet", "vgg16"), ("resnet-50", "folder", "resnet50"),
    ("cnn_bm", "digits", "cnn_bn")])
def test_an_unknown_name_suggests_the_nearest(name, kind, near):
    with pytest.raises(UserError, match=f"{name}.*did you mean {near}"):
        load_model(name, weights="random", kind=kind)


def test_networks_that_are_not_classifiers_of_this_kind_are_unknown():
    for name, kind in (("fcn_resnet50", "imagenet"), ("vgg16", "digits"), ("cnn_50", "imagenet")):
        with pytest.raises(UserError, match=name):
            load_model(name, weights="random", kind=kind)


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def test_weights_of_another_architecture_give_one_clear_line(tmp_path, state):
    save_pth(tmp_path / "w.pth", state)
    for name in ("mlp", "resnet_small", "vgg_small"):
        with pytest.raises(UserError) as error:
            load_small(tmp_path / "w.pth", name)
        one_line(error, "w.pth", name, "--model_name")
    wider = build_small("mlp", 3, 32).state_dict()  # same names, other shapes
    save_pth(tmp_path / "wider.pth", wider)
    with pytest.raises(UserError) as error:
        load_small(tmp_path / "wider.pth", "mlp")
    one_line(error, "1 of another shape")


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", ["torch", "legacy", "pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path, save, state):
    bad, path = {**state, "0.bias": Bomb(tmp_path / "ran")}, tmp_path / "w.pth"
    if save == "pickle":
        path.write_bytes(pickle.dumps(bad, protocol=2))
    else:
        torch.save(bad, path, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(UserError) as error:
        load_small(path)
    one_line(error, "w.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False) if save != "pickle" else pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


def test_a_whole_module_a_bare_tensor_and_a_list_are_refused_as_state_dicts(tmp_path):
    for value in (nn.Linear(2, 2), torch.zeros(3), [1, 2], {"a": {"b": 1}}):
        torch.save(value, tmp_path / "w.pth")
        with pytest.raises(UserError) as error:
            load_small(tmp_path / "w.pth")
        one_line(error, "w.pth")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_gives_one_clear_line(tmp_path, state, share):
    path = tmp_path / "w.pth"
    save_pth(path, state)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(UserError) as error:
        load_small(path)
    one_line(error, "w.pth")


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["imagenet", "digits"])
def test_missing_and_unknown_weights_give_one_clear_line(tmp_path, monkeypatch,
                                                                         kind, cached):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "cnn" if kind == "digits" else "squeezenet1_1"
    if cached:  # V1, trained before, must not stand in for what was asked for
        folder = tmp_path / "hub" / "small"
        folder.mkdir(parents=True)
        save_pth(folder / f"digits_cnn_{models.RECIPE_VERSION}.pth",
                 build_small("cnn", 1, 28).state_dict())
    for weights in (tmp_path / "none.pth", "V2", "none.pth", "V3"):
        with pytest.raises(UserError) as error:
            load_model(name, weights=str(weights), kind=kind, data_dir="digits")
        one_line(error, "--weights", weights, name)


def test_one_network_with_several_weights_is_named_after_them(tmp_path):
    images = open_images("digits", split="test")
    paths = []
    for seed, name in enumerate(("a/mlp.pth", "b/mlp.pth", "robust.pth")):
        paths.append(str(tmp_path / name))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_pth(tmp_path / name, models.trainable("mlp", kind="digits", seed=seed)[1].state_dict())
    many = [*paths, "random"]
    found = models.targets_of([4 * ["mlp"], ["cnn"]], [[*many, "V1"]], None, images)
    assert [one.name for one in found] == ["mlp_a", "mlp_b", "mlp_robust", "mlp_random", "cnn"]
    assert [one.weights for one in found] == [*many, "V1"]
    found = models.targets_of([["mlp", "cnn", "mlp"]], [["V1"]], None, images)
    assert [one.name for one in found] == ["mlp", "cnn"]
    (tmp_path / "c" / "a").mkdir(parents=True)
    shutil.copy(paths[1], tmp_path / "c" / "a")
    with pytest.raises(UserError, match="both of them mlp_a; type one at a time, or give their"):
        models.targets_of([2 * ["mlp"]], [[paths[0], str(tmp_path / "c" / "a")]], None, images)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_published_networks_with_auxiliary_heads_are_built_without_them(monkeypatch, name):
    """In training mode the heads give a second output."""
    asked = {}
    monkeypatch.setattr(torchvision.models, "get_model",
                        lambda name, **options: asked.update(options) or nn.Identity())
    source(name, "imagenet").pretrained("V1")
    assert asked["aux_logits"] is False and asked["weights"] is not None
