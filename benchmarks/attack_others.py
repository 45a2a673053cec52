"""The attacks of other libraries, called as their manuals say, for comparison with ours.

    pip install foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1 adv-lib==0.2.8 \\
        pyautoattack==0.2.0
    pip install --no-deps torchattacks==3.5.1

Each function is (model, x, y, *, the library's settings) -> x_adv, for a network that takes [0, 1]
pixels, without the library's own preprocessing. They draw from the global random state.
"""

import argparse
import importlib
import sys
import types
from fractions import Fraction
from importlib.util import find_spec

import torch

EPS = {"linf": 8 / 255, "l1": 1600.0, "l2": 8.0}     # the settings of RobustART and GCM:
ALPHA = {"linf": 0.6 / 255, "l1": 120.0, "l2": 0.6}  # 20 steps of 3/40 eps
MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art",
           "adv-lib": "adv_lib", "pyautoattack": "pyautoattack"}


def positive(text):
    """argparse type: '1/16' or '2'."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0, such as 1/16")
    return value


def installed():
    """Names of the installed libraries; imports them now, so that no timing includes it."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))  # adv-lib's plots, unused
    found = [name for name, module in MODULES.items() if find_spec(module)]
    for name in found:
        importlib.import_module(MODULES[name])
    return found


def foolbox(model, x, y, *, name, eps=None, **settings):
    """eps None: a minimal perturbation, or the image itself if none was found."""
    import foolbox as fb

    boxed = fb.PyTorchModel(model, bounds=(0, 1), device=x.device)
    _, x_adv, success = getattr(fb.attacks, name)(**settings)(boxed, x, y, epsilons=eps)
    if eps is None:  # failures are returned as black images, which may be misclassified too
        found = success & (x_adv != 0).flatten(1).any(1)
        x_adv = torch.where(found.view(-1, 1, 1, 1), x_adv, x)
    return x_adv


def torchattacks(model, x, y, *, name, **settings):
    import torchattacks as ta

    if name == "PGDL2":  # it calls view() on images and gradients, which must be contiguous
        x, shape = x.contiguous(), x.shape[1:]
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Unflatten(1, shape), model).eval()
    return getattr(ta, name)(model, **settings)(x, y)


def art(model, x, y, *, name, classes, **settings):
    """classes: how many logits the network has."""
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, torch.nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu")
    attack = getattr(evasion, name)(classifier, batch_size=len(x), **settings)
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)


def adv_lib(model, x, y, *, name, **settings):
    from adv_lib import attacks

    return getattr(attacks, name)(model, x, y, **settings)


def pyautoattack(model, x, y, *, name, **settings):
    from pyautoattack import autopgd_base, square

    attack = getattr(autopgd_base, name, None) or getattr(square, name)
    with torch.no_grad():  # it seeds the global state, by default with 0
        return attack(model, seed=torch.initial_seed(), **settings).perturb(x, y)
