"""Weights from files, as others wrap them: the network must compute what theirs computes."""

import copy
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from utils import weights
from utils.errors import UserError
from utils.models import load_model, trainable
from utils.nets import Normalize, build_small
from utils.run import save_pth

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def pixels(n=3, size=32):
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    x[:, :, 0], x[:, :, 1] = 0, 1
    return x


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and not [word for word in words if str(word) not in text], text


@pytest.fixture
def net():
    """A small network with BatchNorm that has seen data; 34 tensors without batch counts."""
    torch.manual_seed(0)
    net = build_small("resnet_small", 3, 32)
    net(pixels(8))
    return net.eval()


def read(path, name="resnet_small", **flags):
    return load_model(name, weights=str(path), kind="cifar10", **flags)


# -------------------------------------------------- stand-ins of other people's structures

class ImageNormalizer(nn.Module):
    """As in RobustBench: mean and std of shape (1, C, 1, 1)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class InputNormalize(nn.Module):
    """As in the `robustness` library: new_mean and new_std."""

    def __init__(self):
        super().__init__()
        self.register_buffer("new_std", torch.tensor(STD)[..., None, None])
        self.register_buffer("new_mean", torch.tensor(MEAN)[..., None, None])

    def forward(self, x):
        return (x.clamp(0, 1) - self.new_mean) / self.new_std


class Attacker(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.normalize, self.model = InputNormalize(), model


class AttackerModel(nn.Module):
    """As in the `robustness` library: two copies of the network in the state dict."""

    def __init__(self, net):
        super().__init__()
        self.normalizer, self.model, self.attacker = InputNormalize(), net, Attacker(net)

    def forward(self, x):
        return self.model(self.normalizer(x))


class Parallel(nn.Module):
    """The names that DataParallel gives."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


# ------------------------------------------------------------------------ what is loaded

def test_a_robustbench_network_saved_with_its_normalizer_computes_the_same(tmp_path, net, capsys):
    theirs = nn.Sequential(OrderedDict(normalize=ImageNormalizer(), model=net)).eval()
    save_pth(tmp_path / "w.pth", theirs.state_dict())
    ours = read(tmp_path / "w.pth")
    assert torch.equal(ours(pixels()), theirs(pixels()))
    assert isinstance(ours[0], Normalize)
    said = capsys.readouterr().out
    assert "prefix model. stripped" in said and "mean 0.491 0.482 0.447" in said
    tensors = sum(not key.endswith("num_batches_tracked") for key in net.state_dict())
    assert f"{tensors} of {tensors} tensors match" in said


def test_a_checkpoint_of_the_robustness_library_gives_the_network_not_the_attackers_copy(
        tmp_path, net, capsys):
    theirs = Parallel(AttackerModel(net)).eval()
    state = {key: value + 1 if ".attacker." in key and value.is_floating_point() else value
             for key, value in theirs.state_dict().items()}
    wanted = theirs(pixels())
    save_pth(tmp_path / "w.pth", {"model": state, "epoch": 3, "optimizer": {"state": {}}})
    assert torch.equal(read(tmp_path / "w.pth")(pixels()), wanted)
    said = capsys.readouterr().out
    copies = sum(".attacker." in key for key in state)
    assert "'model' of it" in said and "prefix module.model. stripped" in said
    assert f"{copies} tensors of attacker. left out" in said


PREFIXES = ["module.", "model.", "_orig_mod.", "module.model.", "module._orig_mod.",
            "_orig_mod.module.", "model._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_combination_of_prefixes_is_stripped_and_named(tmp_path, net, prefix, capsys):
    save_pth(tmp_path / "w.pth", {prefix + k: v for k, v in net.state_dict().items()})
    assert torch.equal(read(tmp_path / "w.pth")[1](pixels()), net(pixels()))
    assert f"prefix {prefix} stripped" in capsys.readouterr().out


def test_a_plain_file_is_read_silently(tmp_path, net, capsys):
    save_pth(tmp_path / "w.pth", net.state_dict())
    assert torch.equal(read(tmp_path / "w.pth")[1](pixels()), net(pixels()))
    assert capsys.readouterr().out == ""


def test_names_that_begin_with_a_prefix_of_their_own_are_kept(tmp_path, net):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.normalize = copy.deepcopy(net), ImageNormalizer()

        def forward(self, x):
            return self.model(self.normalize(x))

    theirs, mine = Own().eval(), Own()
    nn.init.zeros_(mine.model[-1].weight)
    mine.normalize.mean.zero_()
    for name, state in (("plain", theirs.state_dict()),
                        ("parallel", Parallel(theirs).state_dict())):
        save_pth(tmp_path / f"{name}.pth", state)
        assert weights.load_state(mine, tmp_path / f"{name}.pth", "own") is None
        assert torch.equal(mine.eval()(pixels()), theirs(pixels()))


def test_an_averaged_model_is_read_without_its_counter(tmp_path, net):
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    save_pth(tmp_path / "w.pth", averaged.state_dict())
    assert torch.equal(read(tmp_path / "w.pth")[1](pixels()), net(pixels()))


@pytest.mark.parametrize(("keys", "taken"), [
    (("state_dict", "model"), "state_dict"), (("model", "net"), "model"), (("net", "ema"), "net"),
    (("model_ema", "ema"), "model_ema"), (("ema",), "ema"), (("state_dict_ema",), "state_dict_ema"),
    (("ema", "model"), "model"),
    (("state_dict_ema", "state_dict"), "state_dict")])
def test_the_most_trusted_of_several_state_dicts_is_taken_and_the_others_are_named(
        tmp_path, net, capsys, keys, taken):
    other = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    save_pth(tmp_path / "w.pth", {key: net.state_dict() if key == taken else other
                                  for key in keys} | {"epoch": 3})
    assert torch.equal(read(tmp_path / "w.pth")[1](pixels()), net(pixels()))
    said = capsys.readouterr().out
    assert f"'{taken}' of it" in said
    assert all(key in said.partition("not its")[2] for key in keys if key != taken)


def test_safetensors_give_the_same_network_as_pth(tmp_path, net, capsys):
    from_numpy = pytest.importorskip("safetensors.torch")
    state = {f"module.{key}": value.contiguous() for key, value in net.state_dict().items()}
    from_numpy.save_file(state, tmp_path / "resnet_small.safetensors")
    for given in (tmp_path / "resnet_small.safetensors", tmp_path):  # a file, its folder
        assert torch.equal(read(given)[1](pixels()), net(pixels()))
    assert "prefix module. stripped" in capsys.readouterr().out


def test_the_file_decides_the_number_of_outputs_on_a_folder_of_classes(tmp_path):
    torch.manual_seed(0)
    net = load_model("squeezenet1_1", weights="random", kind="folder")[1]
    net.classifier[1] = nn.Conv2d(512, 7, 1)
    save_pth(tmp_path / "w.pth", {f"module.{k}": v for k, v in net.state_dict().items()})
    model = load_model("squeezenet1_1", weights=str(tmp_path / "w.pth"), kind="folder")
    assert torch.equal(model[1](pixels(2, 64)), net.eval()(pixels(2, 64)))
    with pytest.raises(UserError) as error:  # where there are 1000 classes
        load_model("squeezenet1_1", weights=str(tmp_path / "w.pth"))
    one_line(error, "2 of another shape", "prefix module. stripped")


def test_a_training_starts_from_weights_with_the_normalizer_it_will_be_read_with(tmp_path, net):
    theirs = nn.Sequential(OrderedDict(normalize=ImageNormalizer(), model=net))
    save_pth(tmp_path / "w.pth", theirs.state_dict())
    with pytest.raises(UserError) as error:  # ours is mean 0.5, std 0.5
        trainable("resnet_small", kind="cifar10", weights=str(tmp_path / "w.pth"))
    one_line(error, "--pretrained", "w.pth", "normalizer", "resnet_small")
    theirs.normalize.mean.fill_(0.5)
    theirs.normalize.std.fill_(0.5)
    save_pth(tmp_path / "w.pth", theirs.state_dict())
    started = trainable("resnet_small", kind="cifar10", weights=str(tmp_path / "w.pth"))
    assert torch.equal(started.eval()(pixels()), theirs.eval()(pixels()))


# ------------------------------------------------------------------------------- refused

def test_weights_that_hardly_match_are_refused_with_their_prefix_and_counts(tmp_path, net):
    state = list(net.state_dict().items())
    half = {f"module.{key}": value for key, value in state[:len(state) // 2]}
    save_pth(tmp_path / "w.pth", half)
    with pytest.raises(UserError) as error:
        read(tmp_path / "w.pth")
    tensors = [key for key, _ in state if not key.endswith("num_batches_tracked")]
    there = [key for key in tensors if f"module.{key}" in half]
    one_line(error, "w.pth", f"{len(there)} of {len(tensors)} tensors match",
             "prefix module. stripped", f"{len(tensors) - len(there)} tensors missing",
             "not the weights of resnet_small", "--model_name")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_match_almost_completely_are_refused_too(tmp_path, net, change):
    state = dict(net.state_dict())
    last = list(state)[-1]
    if change == "missing":
        del state[last]
    else:
        state[f"{last}_too" if change == "unknown" else last] = torch.zeros(3)
    save_pth(tmp_path / "w.pth", state)
    with pytest.raises(UserError) as error:
        read(tmp_path / "w.pth")
    one_line(error, last, {"missing": "1 tensors missing", "unknown": "1 unknown",
                           "shape": "1 of another shape"}[change])


def test_safetensors_that_cannot_be_read_give_one_line(tmp_path, net, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "w.safetensors"
    safetensors.save_file({key: value.contiguous() for key, value in net.state_dict().items()},
                          path)
    whole = path.read_bytes()
    for share in (0, 0.01, 0.5, 0.99):
        path.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(UserError) as error:
            read(path)
        one_line(error, "w.safetensors", "truncated")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    with pytest.raises(UserError) as error:
        read(path)
    one_line(error, "w.safetensors", "pip install safetensors")


@pytest.mark.parametrize(("mean", "std"), [
    (torch.zeros(3), torch.zeros(3)), (torch.zeros(3), -torch.ones(3)),
    (torch.zeros(5), torch.ones(5)), (torch.zeros(3), None),
    (torch.full((3,), 123.), torch.full((3,), 58.))],
    ids=["zero", "minus", "five", "none", "of 255"])
def test_an_invalid_normalizer_is_refused(tmp_path, net, mean, std):
    state = {f"model.{key}": value for key, value in net.state_dict().items()}
    entries = {"normalizer.mean": mean, "normalizer.std": std}
    save_pth(tmp_path / "w.pth", state | {k: v for k, v in entries.items() if v is not None})
    with pytest.raises(UserError) as error:
        read(tmp_path / "w.pth")
    one_line(error, "w.pth", "normalizer")


def test_a_normalizer_for_a_network_that_normalises_itself_is_refused(tmp_path, net):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom utils.nets import build_small\n"
        "class Own(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net, self.mean = build_small('resnet_small', 3, 32), torch.tensor(0.5)\n"
        "        self.std = torch.tensor(0.5)\n"
        "    def forward(self, x):\n        return self.net((x - self.mean) / self.std)\n"
        "def own():\n    return Own()\n")
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    save_pth(tmp_path / "w.pth", state)
    model = read(tmp_path / "w.pth", f"{tmp_path}/mine.py:own")
    assert torch.allclose(model(pixels()), net((pixels() - 0.5) / 0.5))
    save_pth(tmp_path / "w.pth", state | {"normalizer.mean": torch.tensor(MEAN),
                                          "normalizer.std": torch.tensor(STD)})
    with pytest.raises(UserError) as error:
        read(tmp_path / "w.pth", f"{tmp_path}/mine.py:own")
    one_line(error, "w.pth", "a normalizer", "mean and std of its own")


def test_a_folder_called_random_does_not_get_in_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    assert weights.weights_path("cnn", "random") is None
    with pytest.raises(UserError, match="no file random/cnn.pth; type"):
        weights.weights_path("cnn", "./random/cnn.pth")
