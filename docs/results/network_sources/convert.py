"""Weight files in other libraries' formats, for run.sh; the logits are compared after saving.

    PYTHONPATH=src python convert.py timm WEIGHTS OUT.safetensors     torchvision's MobileNetV2
                                                                      under timm's names
    PYTHONPATH=src python convert.py robust FREE.pth OUT.pth          a network of free_at.py
                                                                      under the names of the
                                                                      robustness library
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from utils.models import load_model


def tensors(net):
    return {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


def to_timm(weights, out):
    """Matches tensors by their order, which is that of the layers, and checks their shapes."""
    theirs = load_model("mobilenet_v2", weights=weights)
    ours = load_model("timm/mobilenetv2_100", weights="random")
    was, new = tensors(theirs[1]), tensors(ours[1])
    for (a, value), (b, place) in zip(was.items(), new.items(), strict=True):
        assert value.shape == place.shape, (a, b)
    save_file(dict(zip(new, (v.contiguous() for v in was.values()), strict=True)), out)
    again = load_model("timm/mobilenetv2_100", weights=out)
    x = torch.rand(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    print("largest difference of a logit:", float((again(x) - theirs(x)).abs().max()))
    assert torch.allclose(again(x), theirs(x), atol=1e-4)


def to_robust(path, out):
    """Writes the names of a DataParallel(AttackerModel), with our normalizer."""
    model = load_model("mlp", weights=path, kind="digits")
    state = {f"module.{part}.{k}": v for part in ("model", "attacker.model")
             for k, v in model[1].state_dict().items()}
    for part in ("normalizer", "attacker.normalize"):
        state |= {f"module.{part}.new_{k}": v for k, v in model[0].state_dict().items()}
    torch.save({"model": state, "epoch": 0}, out)
    again = load_model("mlp", weights=out, kind="digits")
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model(x))


if __name__ == "__main__":
    what, given, out = sys.argv[1:]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    {"timm": to_timm, "robust": to_robust}[what](given, out)
