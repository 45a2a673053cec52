"""Networks from torchvision, timm, a function in a file, and ours: the same four promises.

The stand-ins have the structure of RobustBench's networks and of Hugging Face's classifiers; those
libraries are not needed, and nothing is downloaded.
"""

import json
import os
import re
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

from utils import models, sources
from utils.data import SMALL, Geometry, open_images
from utils.errors import UserError
from utils.models import load_model, trainable
from utils.nets import NETWORKS, Normalize, head_parameters
from utils.run import save_pth
from utils.sources import label_of, source

TINY = "timm/test_resnet.r160_in1k"  # 160 pixels, mean and std 0.5, 0.5 million weights
MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])


def pixels(n=2, size=32, channels=3):
    x = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))
    x[:, :, 0], x[:, :, 1] = 0, 1
    return x


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and not [word for word in words if str(word) not in text], text


def small(classes=10):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


class Runs:
    """Creates a folder when it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def factory(tmp_path):
    """factory(text, function): the name of a function in a file that begins with our imports."""
    def write(text, function="net", file="mine.py"):
        (tmp_path / file).write_text("import torch\nfrom torch import nn\n"
                                     "from test_sources import *\n" + text)
        return f"{tmp_path / file}:{function}"
    return write


@pytest.fixture
def folders(tmp_path, picture):
    """folders(n): the images of a folder of n classes with names of its own."""
    def make(n):
        for i in range(n):
            picture(tmp_path / "val" / f"class{i}" / "a.png", 40, 40, seed=i)
        return open_images(tmp_path / "val", split="test")
    return make


def target_of(images, name, weights="V1", **flags):
    target, = models.targets_of([[name]], [[weights]], None, images, **flags)
    return target


def loaded(target, images):
    return target.load(images, data_dir=None, data_root=None, device="cpu")


# ------------------------------------------------------------------------------ names

@pytest.mark.parametrize(("name", "label"), [
    ("vgg16", "vgg16"), ("timm/seresnet50.a1_in1k", "seresnet50.a1_in1k"),
    ("timm/seresnet50", "seresnet50"), ("timm/resnet50", "timm_resnet50"),
    ("a/b.py:net", "net"), ("a/b.py:resnet50", "b_resnet50"), ("b.py:cnn", "b_cnn")])
def test_a_label_is_short_and_never_another_networks_name(name, label):
    assert label_of(name) == label
    assert not set("/:\\") & set(label_of(name))


@pytest.mark.parametrize("kind", ["imagenet", "folder", "cifar10", "cifar100", "digits", "mnist"])
@pytest.mark.parametrize("name", [*SMALL, *NETWORKS])
def test_our_networks_take_any_kind_of_data(name, kind):
    assert source(name, kind).label == name


def test_torchvision_networks_take_only_colour_images():
    assert source("resnet18", "cifar10").outputs == 1000
    for kind in ("digits", "mnist"):
        with pytest.raises(UserError) as error:
            source("resnet18", kind)
        one_line(error, "resnet18", kind, "resnet_small", "timm/NAME", "FILE.py:FUNCTION")


def test_two_networks_with_one_label_are_refused_in_one_table(factory, folders):
    text = "def net(): return small(3)\n"
    first, second = factory(text), factory(text, file="other.py")
    with pytest.raises(UserError) as error:
        models.targets_of([[first, second]], [["V1"]], None, folders(3))
    one_line(error, "mine.py:net", "other.py:net", "one at a time")


# ------------------------------------------------------------------------ torchvision

@pytest.mark.parametrize("content", ["junk", "code", "other tensors"])
def test_damaged_weights_in_the_cache_give_one_line_and_no_code_is_run(content, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    cached.parent.mkdir()
    if content == "junk":
        cached.write_bytes(b"<html>not found</html>")
    else:
        torch.save({"x": torch.zeros(1) if content == "other tensors" else Runs()}, cached)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        source("squeezenet1_1", "imagenet").pretrained("V1")
    one_line(error, "squeezenet1_1", "damaged", f"remove {cached}")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------- timm

@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def test_a_timm_network_computes_what_timm_computes(timm, tmp_path):
    theirs = timm.create_model("test_resnet.r160_in1k", pretrained=False).eval()
    save_pth(tmp_path / "w.pth", {"state_dict": theirs.state_dict(), "epoch": 1})
    ours = load_model(TINY, weights=str(tmp_path / "w.pth"))
    x = pixels(2, 64)
    assert torch.equal(ours(x), theirs((x - 0.5) / 0.5))
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "seresnet50.a1_in1k",
                                  "tf_efficientnet_b0.ns_jft_in1k", "mobilenetv2_100.ra_in1k"])
def test_with_geometry_weights_a_timm_network_sees_what_timms_transform_gives(timm, name, tmp_path,
                                                                              picture):
    path = picture(tmp_path / "val" / "n01440764" / "a.jpg", 431, 500)
    images = open_images(tmp_path / "val", split="test")
    about = timm.get_pretrained_cfg(name).to_dict()
    wanted = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=about))(
        Image.open(path).convert("RGB"))
    target = target_of(images, f"timm/{name}", "random", geometry="weights")
    ours = images.prepared(target.geometry, None)[0].float() / 255
    first = source(f"timm/{name}", "imagenet").first_layer(None, "V1")
    torch.testing.assert_close(first(ours), wanted, atol=1e-5, rtol=0)
    assert target_of(images, f"timm/{name}", "random").geometry == Geometry(224, 256)


def test_timms_published_weights_are_requested_once_and_offline_gives_one_line(timm, monkeypatch):
    asked, real = [], timm.create_model

    def create(model_name, pretrained, **more):
        asked.append((model_name, pretrained))
        return real(model_name, pretrained=False, **more)

    monkeypatch.setattr(timm, "create_model", create)
    assert load_model(TINY)(pixels()).shape == (2, 1000)
    assert asked == [("test_resnet.r160_in1k", True)]
    assert models.describe_weights(TINY, "V1", "imagenet") == "timm test_resnet.r160_in1k"

    for why, words in (("cannot reach the hub\nat all", "cannot reach the hub at all"),
                       ("", "(OSError)")):
        def offline(*names, why=why, **options):
            raise OSError(why)

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(UserError) as error:
            load_model(TINY)
        one_line(error, TINY, words, "--weights PATH")


def test_a_timm_network_is_trained_for_any_classes_with_any_head(timm):
    for head in ("own", "fc", "ml_decoder"):
        model = trainable("timm/seresnet18", kind="folder", head=head, classes=7)
        assert model(pixels(2, 64)).shape == (2, 7) and model.training
        own = {id(p) for p in head_parameters(model[1])}
        assert 0 < len(own) < len(list(model.parameters()))
        assert own <= {id(p) for p in model.parameters()}
    again = trainable("timm/seresnet18", kind="folder", head="ml_decoder", classes=7)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("head", ["own", "fc"])
def test_a_timm_network_that_was_trained_here_can_be_read_again(timm, tmp_path, head):
    made = trainable("timm/test_resnet", kind="folder", head=head, classes=3).eval()
    save_pth(tmp_path / "w.pth", made[1].state_dict())
    (tmp_path / "w.json").write_text(json.dumps(
        {"head": head, "classes": ["a", "b", "c"], "image_size": 64}))
    again = load_model("timm/test_resnet", weights=str(tmp_path / "w.pth"), kind="folder")
    assert torch.equal(again(pixels(2, 64)), made(pixels(2, 64)))


def test_a_head_for_feature_maps_is_refused_for_a_transformer_of_timm(timm):
    with pytest.raises(UserError) as error:
        trainable("timm/test_vit", kind="folder", head="fc", classes=7)
    one_line(error, "timm/test_vit", "--head own")
    assert trainable("timm/test_vit", kind="folder", classes=7)(pixels(2, 160)).shape == (2, 7)


def test_grey_images_become_three_channels_for_timm(timm):
    model = load_model(TINY, weights="random", kind="digits")
    x = pixels(2, 28, 1)
    assert torch.equal(model(x), model(x.expand(-1, 3, -1, -1))) and model(x).shape == (2, 10)


def test_a_missing_timm_gives_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError) as error:
        source("timm/seresnet50.a1_in1k", "imagenet")
    one_line(error, "timm/seresnet50.a1_in1k", "not installed", "pip install timm")


@pytest.mark.parametrize(("name", "words"), [
    ("timm/seresnet5O", ["did you mean timm/seresnet50?"]),
    ("timm/resnet18.nonsense", ["no weights of that tag", "a1_in1k"]), ("timm/", ["timm/"])])
def test_unknown_timm_names_give_one_line(timm, name, words):
    with pytest.raises(UserError) as error:
        source(name, "imagenet")
    one_line(error, "--model_name", name, *words)


def test_published_weights_are_refused_for_data_of_other_classes(timm):
    for name in ("resnet18", TINY):
        with pytest.raises(UserError) as error:
            load_model(name, kind="cifar10")
        one_line(error, name, "1000 classes", "wanted 10 for cifar10 data", "--weights PATH")
    features = "timm/vit_small_patch14_dinov2.lvd142m"  # has no classifier
    for kind, wanted in (("imagenet", "1000"), ("folder", "some")):
        with pytest.raises(UserError) as error:
            load_model(features, kind=kind)
        one_line(error, features, "for no classes", f"wanted {wanted} for {kind} data")


# -------------------------------------------------------------------- a function in a file

def test_a_function_is_called_without_arguments_and_sees_pixels(factory):
    name = factory("def net(): return small()\n")
    model = load_model(name, kind="cifar10")
    assert torch.equal(model(pixels()), small().eval()(pixels()))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_function_that_takes_num_classes_gets_those_of_the_data(factory, folders):
    name = factory("def net(num_classes): return small(num_classes)\n")
    assert load_model(name, kind="cifar10")(pixels()).shape == (2, 10)
    assert trainable(name, kind="folder", classes=7)(pixels()).shape == (2, 7)
    images = folders(4)
    assert loaded(target_of(images, name), images)(pixels()).shape == (2, 4)
    own = factory("def net(num_classes=6): return small(num_classes)\n", file="own.py")
    assert loaded(target_of(images, own), images)(pixels()).shape == (2, 6)  # fooling ratios alone
    assert load_model(own, kind="cifar10")(pixels()).shape == (2, 10)


@pytest.mark.parametrize("form", ["tuple", "list", "number"])
def test_mean_and_std_of_the_module_become_the_first_layer(factory, form):
    values = {"tuple": ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
              "list": ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]), "number": (0.5, 0.25)}[form]
    name = factory(f"def net():\n    found = small()\n    found.mean, found.std = {values}\n"
                   "    return found\n")
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in values)
    model = load_model(name, kind="cifar10")
    assert isinstance(model[0], Normalize)
    assert torch.equal(model(pixels()), small().eval()((pixels() - mean) / std))


class SelfNormalizing(nn.Module):
    """Like some networks of RobustBench: mean and std are tensors, used in forward."""

    def __init__(self):
        super().__init__()
        self.mean, self.std, self.net = MEAN.view(3, 1, 1), STD.view(3, 1, 1), small()

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


def test_a_network_that_normalises_by_tensors_of_its_own_is_not_normalised_twice(factory, capsys):
    model = load_model(factory("def net(): return SelfNormalizing()\n"), kind="cifar10")
    assert torch.equal(model(pixels()), SelfNormalizing().eval()(pixels()))
    assert "mean and std are tensors" in capsys.readouterr().out


def test_a_file_is_run_once_and_may_define_what_it_needs(factory, tmp_path):
    name = factory("from dataclasses import dataclass\n"
                   f"open({str(tmp_path / 'log')!r}, 'a').write('x')\n"
                   "@dataclass\nclass Width:\n    n: int = 10\n"
                   "def net(): return small(Width().n)\n")
    for _ in range(3):
        load_model(name, kind="cifar10")
    assert (tmp_path / "log").read_text() == "x"


def test_weights_of_a_file_go_into_the_functions_network(factory, tmp_path):
    theirs = small()
    nn.init.normal_(theirs[-1].weight)
    save_pth(tmp_path / "w.pth", {f"module.{k}": v for k, v in theirs.state_dict().items()})
    name = factory("def net(): return small()\n")
    model = load_model(name, weights=str(tmp_path / "w.pth"), kind="cifar10")
    assert torch.equal(model(pixels()), theirs.eval()(pixels()))
    assert "w.pth sha256" in models.describe_weights(name, str(tmp_path / "w.pth"), "cifar10")
    assert "mine.py sha256" in models.describe_weights(name, "V1", "cifar10")


BAD = {
    "no file": ("", "nowhere.py:net", ["no file"]),
    "no function named": ("def net(): return small()\n", "mine.py",
                          ["which function", ":FUNCTION"]),
    "no such function": ("def net(): return small()\n", "mine.py:other",
                         ["other", "not a function"]),
    "not a function": ("net = 3\n", "mine.py:net", ["net is not a function"]),
    "a module itself": ("net = small\nvalue = {}\n", "mine.py:value", ["not a function"]),
    "a syntax error": ("def net(:\n", "mine.py:net", ["SyntaxError"]),
    "an import": ("import no_such_thing\n", "mine.py:net", ["ModuleNotFoundError", "PYTHONPATH"]),
    "raises": ("def net(): raise ValueError('no\\nsuch')\n", "mine.py:net",
               ["ValueError", "no such"]),
    "wants more": ("def net(a, b): return small()\n", "mine.py:net", ["TypeError"]),
    "returns nothing": ("def net(): small()\n", "mine.py:net", ["returned nothing", "Module"]),
    "returns a dict": ("def net(): return {}\n", "mine.py:net", ["type dict", "Module"]),
    "returns a class": ("def net(): return nn.Linear\n", "mine.py:net", ["Module"]),
    "mean of 255": ("def net():\n    n = small()\n    n.mean, n.std = (123., 116., 103.), 58."
                    "\n    return n\n", "mine.py:net", ["[0, 1] pixels", "123"]),
    "std of zero": ("def net():\n    n = small()\n    n.mean, n.std = 0.5, 0.\n    return n\n",
                    "mine.py:net", ["[0, 1] pixels"]),
    "mean alone": ("def net():\n    n = small()\n    n.mean = 0.5\n    return n\n", "mine.py:net",
                   ["a mean alone", "both of mean and std"]),
    "leaves": ("import sys\ndef net(): sys.exit(3)\n", "mine.py:net", ["SystemExit", "(3)"]),
    "mean of two": ("def net():\n    n = small()\n    n.mean, n.std = (0.5, 0.5), 0.5\n"
                    "    return n\n", "mine.py:net", ["three"]),
    "mean of words": ("def net():\n    n = small()\n    n.mean, n.std = 'imagenet', 0.5\n"
                      "    return n\n", "mine.py:net", ["mine.py:net"])}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_gives_no_network_gives_one_line(factory, tmp_path, monkeypatch, case):
    text, name, words = BAD[case]
    factory(text)
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path / name), kind="cifar10")
    one_line(error, "--model_name", name.partition(":")[0], *words)


LOGITS = {
    "features": ("nn.Conv2d(3, 8, 3)", ["(1, 8, 222, 222)", "not logits", "classifier"]),
    "one number": ("nn.Sequential(nn.Flatten(), nn.Linear(150528, 1))", ["(1, 1)"]),
    "labels": ("Labels()", ["not logits"]),
    "no batch": ("Squeezed()", ["(1000,)", "not logits"]),
    "pooled features": ("small(2048)", ["gives 2048 numbers", "1000 classes of imagenet"]),
    "a tuple": ("Two()", ["gives tuple", "logits alone"]),
    "hugging face": ("VitForImageClassification()", ["ImageClassifierOutput", ".logits"]),
    "another size": ("nn.Sequential(nn.Flatten(), nn.Linear(3072, 1000))", ["--image_size 224"]),
    "a mistake": ("Wrong()", ["'Wrong' object has no attribute 'fc'"])}


class Labels(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :1000].argsort(1)


class Squeezed(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :1000].squeeze()


class Two(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :1000], x


class Wrong(nn.Module):
    def forward(self, x):
        return self.fc(x)


@dataclass
class ImageClassifierOutput:
    logits: torch.Tensor


class VitForImageClassification(nn.Module):
    """Like Hugging Face's: takes pixel_values, returns an object that holds the logits."""

    def __init__(self):
        super().__init__()
        self.vit = small(1000)

    def forward(self, pixel_values):
        return ImageClassifierOutput(self.vit(pixel_values))


@pytest.mark.parametrize("case", LOGITS)
def test_a_network_that_returns_no_logits_of_the_classes_gives_one_line(factory, tmp_path, picture,
                                                                        case):
    picture(tmp_path / "val" / "n01440764" / "a.jpg", 40, 40)
    images = open_images(tmp_path / "val", split="test")
    network, words = LOGITS[case]
    name = factory(f"def net(): return {network}\n")
    with pytest.raises(UserError) as error:
        loaded(target_of(images, name), images)
    one_line(error, "mine.py:net", *words)


# ----------------------------------------------------------- as the page shows them

@pytest.fixture
def page(tmp_path, monkeypatch):
    """page.block(word): the Python block of docs/attacks.md with the word, as FILE.py; its modules
    are stand-ins.
    """
    from_pretrained = types.SimpleNamespace
    network = VitForImageClassification().eval()
    processor = types.SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2])
    robust = nn.Sequential(OrderedDict(normalize=SelfNormalizing(), model=nn.Identity())).eval()
    stands = {
        "transformers": types.SimpleNamespace(
            AutoImageProcessor=from_pretrained(from_pretrained=lambda name: processor),
            AutoModelForImageClassification=from_pretrained(from_pretrained=lambda name: network)),
        "robustbench": types.ModuleType("robustbench"),
        "robustbench.utils": types.SimpleNamespace(load_model=lambda name, **options: robust)}
    for name, module in stands.items():
        monkeypatch.setitem(sys.modules, name, module)

    def block(word):
        text = (ROOT / "docs" / "attacks.md").read_text()
        found, = (block for block in re.findall(r"^```py\n(.*?)^```$", text, re.M | re.S)
                  if word in block)
        assert len(found.strip().splitlines()) <= 16
        (tmp_path / f"{word}.py").write_text(found)
        function = re.findall(r"^def (\w+)", found, re.M)[-1]
        return f"{tmp_path / word}.py:{function}"
    return types.SimpleNamespace(block=block, network=network, robust=robust)


def test_the_pages_robustbench_file_gives_the_network_as_robustbench_has_it(page):
    model = load_model(page.block("robustbench"), kind="cifar10")
    assert torch.equal(model(pixels()), page.robust(pixels()))


def test_the_pages_hugging_face_file_gives_the_logits_of_normalised_pixels(page):
    model = load_model(page.block("transformers"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]))
    assert torch.equal(model(pixels()), page.network((pixels() - mean) / std).logits)


# --------------------------------------------------------------- classes from the data

def test_a_functions_outputs_are_the_folders_in_order_if_their_numbers_match(factory, folders,
                                                                             capsys):
    images, name = folders(4), factory("def net(): return small(4)\n")
    assert target_of(images, name).classes == images.classes
    assert "its 4 outputs are taken as the 4 folders" in capsys.readouterr().out
    other = factory("def net(): return small(5)\n", file="other.py")
    assert target_of(images, other).classes == () and not capsys.readouterr().out


def test_an_accuracy_on_folders_needs_as_many_outputs_as_folders(factory, folders, run_here,
                                                                 refused):
    folders(4)
    four = factory("def net(): return small(4)\n", "net")
    more = ("--data_dir", "val", "--attacks", "none")
    done = run_here("eval_net.py", "--model_name", four, *more)
    assert done.returncode == 0, done.stderr
    assert "its 4 outputs are taken as the 4 folders" in done.stdout and "| net |" in done.stdout
    save_pth("uap.pth", torch.full((3, 224, 224), 10 / 255))
    five = factory("def five(): return small(5)\n", "five", file="five.py")
    done = run_here("eval_uap.py", "--model_name", four, five, "--uaps", "uap.pth", "--scale", 1,
                    "--data_dir", "val")
    assert done.returncode == 0, done.stderr
    accuracy = {row["target"]: row.get("clean_acc") for row in json.loads(
        Path("runs/eval/results.json").read_text())["rows"]}  # five: fooling ratios alone
    assert accuracy["net"] is not None and accuracy["five"] is None
    refused(run_here("eval_net.py", "--model_name", five, *more, "--save", "b"), "4 classes")


def test_every_script_takes_a_function_and_names_its_files_by_it(factory, run_here, tmp_path):
    name = factory("def net():\n"
                   "    class Half(nn.Sequential):\n"
                   "        mean, std = 0.5, 0.5\n"
                   "    torch.manual_seed(0)\n"
                   "    return Half(nn.Flatten(), nn.Linear(784, 10))\n")
    given = ("--model_name", name, "--num_images", 20)
    made = run_here("train_sga.py", *given, "--epochs", 1, "--layout", "contiguous", "--amp", "off")
    assert made.returncode == 0, made.stderr
    uap, = tmp_path.rglob("sga_net.pth")
    for script, more, table in (
            ("eval_uap.py", ("--uaps", uap), "| net |"),
            ("gcm.py", ("--attacks", "fgsm", "--save", "g"), "| net |"),
            ("eval_net.py", ("--attacks", "fgsm", "--save", "e"), "| net |")):
        done = run_here(script, *given, *more)
        assert done.returncode == 0, done.stderr
        assert table in done.stdout
        assert run_here(script, *given, *more, "--model_name", f"{name}er").returncode == 2
    started = run_here("free_at.py", *given, "--epochs", 1, "--method", "natural",
                       "--batch_size", 10, "--save", "f")
    assert started.returncode == 0, started.stderr
    assert (tmp_path / "f" / "natural_net.pth").is_file()
    again = run_here("eval_net.py", "--runs", "f", "--attacks", "fgsm", "--save", "r",
                     "--model_name", name)
    assert again.returncode == 0, again.stderr


def test_the_code_that_a_run_names_is_executed_only_if_the_user_names_it(run_here, refused,
                                                                         tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evil.py").write_text("open('ran', 'w')\n")
    (tmp_path / "run" / "net.json").write_text(json.dumps({
        "kind": "digits", "data_dir": "digits", "model_name": "run/evil.py:net", "seconds": 1,
        "alpha_fgs": 0.3}))
    save_pth(tmp_path / "run" / "net.pth", {"w": torch.zeros(1)})
    for more in ((), ("--predict",)):
        refused(run_here("eval_net.py", "--runs", "run", *more), "run/net.json",
                "type --model_name run/evil.py:net beside --runs")
    refused(run_here("eval_net.py", "--runs", "run", "--model_name", "run/evil.py:net", "mlp"),
            "--runs with --model_name mlp")
    for script in ("gcm.py", "eval_net.py", "eval_uap.py", "train_sga.py"):
        assert run_here(script, "--model_name", "net", "--weights", "run").returncode == 2
        assert run_here(script, "--model_name", "mlp", "--weights", "run/net.pth",
                        "--uaps" * (script == "eval_uap.py") or "--seed", 0).returncode == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [*SMALL, *NETWORKS])
@pytest.mark.parametrize(("kind", "size", "classes"), [("folder", 33, 3), ("cifar100", 32, 100)])
def test_our_networks_are_built_for_any_size_and_number_of_classes(name, kind, size, classes):
    if name == "wrn_32_10" and kind == "cifar100":
        pytest.skip("46 million weights, and the other kind shows the same")
    model = trainable(name, kind=kind, classes=classes, image_size=size)
    with torch.no_grad():
        assert model.eval()(pixels(2, size)).shape == (2, classes)


def test_our_network_is_read_again_at_the_size_and_classes_of_its_training(tmp_path):
    made = trainable("cnn", kind="folder", classes=3, image_size=40).eval()
    save_pth(tmp_path / "cnn.pth", made[1].state_dict())
    (tmp_path / "cnn.json").write_text(
        '{"head": "own", "classes": ["a", "b", "c"], "image_size": 40}')
    again = load_model("cnn", weights=str(tmp_path), kind="folder")
    assert torch.equal(again(pixels(2, 40)), made(pixels(2, 40)))
    assert models.input_size("cnn", "folder", 224, str(tmp_path)) == 40


def test_the_same_seed_gives_the_same_random_network_and_leaves_the_global_generator(factory):
    for name, kind in (("cnn", "cifar100"), ("squeezenet1_1", "folder"),
                       (factory("def net(): return nn.Sequential(nn.Flatten(), "
                                "nn.Linear(3072, 10))\n"), "cifar10")):
        state = torch.get_rng_state()
        first, again, other = (sources.source(name, kind).build(10, seed, 32) for seed in (5, 5, 6))
        assert torch.equal(torch.get_rng_state(), state)
        a, b, c = (next(net.parameters()) for net in (first, again, other))
        assert torch.equal(a, b) and not torch.equal(a, c)
