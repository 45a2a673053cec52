"""The attacks compared with those of foolbox, ART, torchattacks, adv-lib and pyautoattack.

Where two libraries implement the same algorithm, the images must be equal; where they draw
different random numbers or search differently, ours must be about as strong. Tests against a
library that is not installed are skipped: `sh tests/run.sh` installs all five.
"""

import copy
import functools
import sys
import types
from functools import cache
from statistics import mean, variance

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn

import attacks
from attack_toys import Watched, greys, pictures
from utils import data, models
from utils.attack import balls

K, N, SHAPE = 10, 16, (3, 32, 32)
LINF = {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10}
L2 = {"eps": 1.0, "alpha": 0.25, "steps": 10}
L1 = {"eps": 20.0, "alpha": 4.0, "steps": 10}


def library(name):
    """A module of another library; skips the test if it is missing."""
    if name.startswith("adv_lib"):  # imports visdom, a plotting server, which is not used here
        sys.modules.setdefault("visdom", types.SimpleNamespace(Visdom=None))
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} is not installed; type "
                               "sh tests/run.sh, which installs it")


@pytest.fixture(scope="module")
def toy():
    """Curved and smooth, (N, 3, 32, 32) -> (N, 10)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(),
                              nn.Conv2d(8, 16, 3, stride=2), nn.Softplus(), nn.Flatten(),
                              nn.Linear(16 * 7 * 7, K))
        for weight in model.parameters():
            weight.data *= 2
    return models.freeze(model)


@pytest.fixture(scope="module")
def x():
    images = pictures(N, shape=SHAPE)
    assert (images == 0).any()
    assert (images == 1).any()
    return images


@pytest.fixture(scope="module")
def grey():
    return greys(N, shape=SHAPE)


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def apart(a, b):
    """Largest difference between two batches of images."""
    return (a - b).abs().max().item()


# ------------------------------------------------------------ the other libraries

def by_torchattacks(model, x, y, norm, *, eps, alpha, steps, targeted=False):
    torchattacks = library("torchattacks")
    kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    attack = kind(model, eps=eps, alpha=alpha, steps=steps, random_start=False)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack(x, y)


def foolbox_run(attack, model, x, y, eps, targeted=False):
    foolbox = library("foolbox")
    criterion = foolbox.criteria.TargetedMisclassification if targeted \
        else foolbox.criteria.Misclassification
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, criterion(y), epsilons=eps)


def by_foolbox(model, x, y, norm, *, eps, alpha, steps, targeted=False):
    fa = library("foolbox.attacks")
    kind = {"linf": fa.LinfProjectedGradientDescentAttack,
            "l2": fa.L2ProjectedGradientDescentAttack,
            "l1": fa.L1ProjectedGradientDescentAttack}[norm]
    attack = kind(abs_stepsize=alpha, steps=steps, random_start=False)
    return foolbox_run(attack, model, x, y, eps, targeted)[1]


def by_art(model, x, y, norm, *, eps, alpha, steps, targeted=False, decay=None):
    library("art")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), x.shape[1:], K,
                                   clip_values=(0.0, 1.0), device_type="cpu")
    attack = ProjectedGradientDescentPyTorch(
        classifier, norm={"linf": np.inf, "l2": 2}[norm], eps=eps, eps_step=alpha, max_iter=steps,
        decay=decay, targeted=targeted, batch_size=len(x), verbose=False)
    return torch.from_numpy(attack.generate(x.numpy(), np.eye(K, dtype=np.float32)[y]))


THREE = {"torchattacks": by_torchattacks, "foolbox": by_foolbox, "art": by_art}


# ------------------------------------------------------------- equal, step for step

@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", THREE)
def test_pgd_in_linf_equals_that_of_other_libraries(name, targeted, toy, x):
    y = (predicted(toy, x) + targeted) % K
    theirs = THREE[name](toy, x, y, "linf", targeted=targeted, **LINF)
    ours = attacks.pgd(toy, x, y, random_start=False, targeted=targeted, **LINF)
    assert apart(ours, theirs) <= 1e-6
    assert apart(ours, attacks.bim(toy, x, y, targeted=targeted, **LINF)) == 0


@pytest.mark.parametrize(("loss", "name"), [("ce", "ce"), ("margin", "dl"), ("dlr", "dlr")])
def test_pgd_on_every_loss_equals_that_of_adv_lib(loss, name, toy, x):
    """adv-lib returns the last image that was adversarial before a step, so its eleventh step sees
    our image after ten. Images that are not adversarial then are left out. In float64: the two
    compute DLR differently, and a float32 gradient of zero can have either sign."""
    pgd_linf = library("adv_lib.attacks").pgd_linf
    toy, x = copy.deepcopy(toy).double(), x.double()
    y = predicted(toy, x)
    theirs = pgd_linf(toy, x, y, LINF["eps"], steps=LINF["steps"] + 1, random_init=False,
                      loss_function=name, absolute_step_size=LINF["alpha"])
    ours = attacks.pgd(toy, x, y, random_start=False, loss=loss, **LINF)
    fooled = predicted(toy, ours) != y
    assert fooled.sum() >= N // 2
    assert apart(ours[fooled], theirs[fooled]) <= 1e-6


def test_pgd_from_the_same_random_start_equals_that_of_foolbox(toy, x):
    """Our start is the result of an attack with a single, negligible step."""
    y = predicted(toy, x)
    foolbox_attack = library("foolbox.attacks").LinfProjectedGradientDescentAttack
    ours, start = (attacks.pgd(toy, x, y, eps=LINF["eps"], alpha=alpha, steps=steps,
                               generator=torch.Generator().manual_seed(3))
                   for alpha, steps in ((LINF["alpha"], LINF["steps"]), (1e-12, 1)))
    attack = foolbox_attack(abs_stepsize=LINF["alpha"], steps=LINF["steps"], random_start=True)
    attack.get_random_start = lambda x0, epsilon: type(x0)(start)
    assert apart(start, x) > LINF["eps"] / 2
    assert apart(ours, foolbox_run(attack, toy, x, y, LINF["eps"])[1]) <= 1e-6


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_fgsm_equals_that_of_torchattacks_and_foolbox(targeted, toy, x):
    y = (predicted(toy, x) + targeted) % K
    eps = LINF["eps"]
    ours = attacks.fgsm(toy, x, y, eps=eps, targeted=targeted)
    attack = library("torchattacks").FGSM(toy, eps=eps)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    else:  # foolbox has no targeted one
        one_step = library("foolbox.attacks").LinfFastGradientAttack(random_start=False)
        assert apart(ours, foolbox_run(one_step, toy, x, y, eps)[1]) <= 1e-6
    assert apart(ours, attack(x, y)) <= 1e-6
    assert apart(ours, x) == pytest.approx(eps)


@pytest.mark.parametrize("mu", [1.0, 0.5])
def test_mim_equals_that_of_torchattacks_and_art(mu, toy, x):
    """torchattacks divides the gradient by its mean instead of its sum: the signs are the same.
    foolbox is left out: its momentum method averages signs."""
    y = predicted(toy, x)
    ours = attacks.mim(toy, x, y, mu=mu, **LINF)
    theirs = library("torchattacks").MIFGSM(toy, decay=mu, **LINF)(x, y)
    assert apart(ours, theirs) <= 1e-6
    assert apart(ours, by_art(toy, x, y, "linf", decay=mu, **LINF)) <= 1e-6
    assert apart(ours, attacks.bim(toy, x, y, **LINF)) > LINF["alpha"]  # the momentum matters


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", ["torchattacks", "foolbox"])
def test_pgd_in_l2_with_rescale_equals_that_of_other_libraries(name, targeted, toy, x):
    y = (predicted(toy, x) + targeted) % K
    theirs = THREE[name](toy, x, y, "l2", targeted=targeted, **L2)
    ours = attacks.pgd(toy, x, y, norm="l2", projection="rescale", random_start=False,
                       targeted=targeted, **L2)
    assert apart(ours, theirs) <= 1e-5


@pytest.mark.parametrize("projection", ["exact", "rescale"])
def test_pgd_in_l2_equals_that_of_art_where_the_box_does_not_bind(projection, toy, grey):
    """ART clips to the box and then scales to the ball; the others do the reverse."""
    y = predicted(toy, grey)
    ours = attacks.pgd(toy, grey, y, norm="l2", projection=projection, random_start=False, **L2)
    assert 0 < ours.min() < ours.max() < 1
    assert apart(ours, by_art(toy, grey, y, "l2", **L2)) <= 1e-5


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_pgd_in_l1_with_dense_steps_and_rescale_equals_that_of_foolbox(targeted, toy, x):
    """Equal whether or not the box binds: foolbox also scales to the ball and then clips."""
    y = (predicted(toy, x) + targeted) % K
    ours = attacks.pgd(toy, x, y, norm="l1", step="dense", projection="rescale",
                       random_start=False, targeted=targeted, **L1)
    assert apart(ours, by_foolbox(toy, x, y, "l1", targeted=targeted, **L1)) <= 1e-5
    assert apart(ours, x) > 0.01


@pytest.mark.parametrize(("norm", "options"), [("l2", L2), ("l1", {**L1, "step": "dense"})])
def test_the_exact_projection_reaches_a_higher_loss_than_scaling_and_clipping(norm, options, toy,
                                                                              x):
    """At pixels of 0 and 1 clipping after scaling wastes part of the radius."""
    y = predicted(toy, x)
    exact, rescale = (
        attacks.pgd(toy, x, y, norm=norm, projection=projection, random_start=False, **options)
        for projection in ("exact", "rescale"))
    with torch.no_grad():
        reached, less = (F.cross_entropy(toy(z), y, reduction="none") for z in (exact, rescale))
    assert (reached >= less).all()


# --------------------------------------------------------- the smallest L2 that fools

CW = {"steps": 200, "binary_steps": 5, "lr": 0.01, "c": 0.1}


@cache
def digits(count):
    """A trained network and test digits that it gets right; most pixels are exactly 0."""
    model = models.load_model("mlp", kind="digits", data_dir="digits")
    images = data.open_images("digits", split="test").prepared(28, count + 10)
    x = data.to_float(images.pixels)
    right = predicted(model, x) == images.labels
    return model, x[right][:count], images.labels[right][:count]


def cw_by_adv_lib(model, x, y, targeted):
    x_adv = library("adv_lib.attacks").carlini_wagner_l2(
        model, x, y, targeted, learning_rate=CW["lr"], initial_const=CW["c"],
        binary_search_steps=CW["binary_steps"], max_iterations=CW["steps"])
    return x_adv, (predicted(model, x_adv) == y) == targeted


def cw_by_foolbox(model, x, y, targeted):
    """foolbox returns a black image where it fails, so its success mask is used."""
    attack = library("foolbox.attacks").L2CarliniWagnerAttack(
        CW["binary_steps"], CW["steps"], stepsize=CW["lr"], initial_const=CW["c"])
    return foolbox_run(attack, model, x, y, None, targeted)[1:]


@pytest.fixture(scope="module", params=[
    pytest.param(("toy", False), id="toy"), pytest.param(("toy", True), id="toy targeted"),
    pytest.param(("digits", False), id="digits", marks=pytest.mark.slow)])
def cw_case(request, toy, x):
    """model, x, y, targeted, and the result of cw_l2: images, success."""
    where, targeted = request.param
    model, x, y = (toy, x, predicted(toy, x)) if where == "toy" else digits(24)
    y = (y + targeted) % K
    return model, x, y, targeted, *attacks.cw_l2(model, x, y, targeted=targeted, **CW)


@pytest.mark.slow
@pytest.mark.parametrize("by", [cw_by_adv_lib, cw_by_foolbox])
def test_cw_needs_no_larger_norm_and_fails_no_more_often_than_other_libraries(by, cw_case):
    """At the same budget; on images where both succeed, the mean norm is at most 3 % larger. Not
    equal: ours searches in coordinates that also move pixels at 0 and 1."""
    model, x, y, targeted, ours, ok = cw_case
    theirs, their_ok = by(model, x, y, targeted)
    assert (((predicted(model, ours) == y) == targeted) == ok).all()
    assert ok.sum() >= their_ok.sum() > len(x) // 2
    both = ok & their_ok
    size, their_size = (balls.norm_of(z - x, "l2")[both].mean() for z in (ours, theirs))
    assert size <= 1.03 * their_size


# --------------------------------------------------- APGD and Square of AutoAttack's authors

PYAUTOATTACK = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def robust(model, x_adv, y):
    """Number of images still classified as y."""
    return (predicted(model, x_adv) == y).sum().item()


def their_apgd(model, eps, norm, loss, steps, seed=0):
    return library("pyautoattack.autopgd_base").APGDAttack(
        model, n_iter=steps, norm=PYAUTOATTACK[norm], eps=eps, loss=loss, seed=seed)


def their_square(model, x, y, *, eps, norm, queries, seed):
    """Theirs does not count the query of the start."""
    attack = library("pyautoattack.square").SquareAttack(
        model, norm=PYAUTOATTACK[norm], eps=eps, n_queries=queries - 1, seed=seed)
    with torch.random.fork_rng():  # it seeds the global one
        return attack.perturb(x, y)


def from_the_same_start(monkeypatch, model, x, y, eps, norm, loss):
    """25 steps of both APGDs: our images, which images theirs fools, their losses, the loss
    function, the points that each visited. At its first check pyautoattack compares the loss with
    zero instead of the start, so DLR is made positive; it must also not store losses in float32."""
    projection = library("pyautoattack.autopgd_base").L1_projection
    watched, theirs_watched = Watched(model), Watched(model)
    attack = their_apgd(theirs_watched, eps, norm, loss, 25)
    attack.init_hyperparam(x)
    dlr = attack.dlr_loss
    value = {"ce": functools.partial(F.cross_entropy, reduction="none"),
             "dlr": lambda logits, y: dlr(logits, y) + 10}[loss]
    attack.dlr_loss = value
    monkeypatch.setattr("torch.zeros", functools.partial(torch.zeros, dtype=x.dtype))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, held, highest, _ = attack.attack_single_run(x, y)
        torch.manual_seed(0)
        drawn = 2 * torch.rand(x.shape) - 1 if norm == "linf" else torch.randn(x.shape)
    start = drawn + projection(x, drawn, eps) if norm == "l1" else eps * attack.normalize(drawn)
    monkeypatch.undo()
    monkeypatch.setattr("utils.attack.apgd.random_point", lambda *_: start.to(x))
    ours = attacks.apgd(watched, x, y, eps=eps, norm=norm, steps=25, loss=loss)
    return ours, held == 0, highest, value, watched.points, theirs_watched.points


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps", "same", "near"), [
    ("linf", 1 / 255, 9, 1e-6), ("l2", 0.1, 9, 1e-6), ("l1", 1.0, 5, 1e-4)])
def test_apgd_follows_the_path_of_pyautoattack_from_the_same_start(
        norm, eps, same, near, loss, toy, x, grey, monkeypatch):
    """No image is fooled at these radii. The points are equal up to the second change of the step
    size: from then on, pyautoattack counts gains over the point that it left when it halved the
    step, while ours, as in Alg. 1, counts them over the point it returned to. L1 is in float32,
    like their projection, so rounding soon decides which coordinates have moved and hence how wide
    a step is. Grey images in L2, where pyautoattack scales and clips."""
    model, x = copy.deepcopy(toy), (grey if norm == "l2" else x)[1:]  # the first is fooled at once
    if norm != "l1":
        model, x = model.double(), x.double()
    y = predicted(model, x)
    ours, fooled, highest, value, points, their_points = from_the_same_start(
        monkeypatch, model, x, y, eps, norm, loss)
    assert not fooled.any()
    assert len(points) == len(their_points) == 26
    assert max(map(apart, points[:same + 1], their_points)) <= near
    with torch.no_grad():
        assert apart(value(model(ours), y), highest) <= 100 * near


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 4 / 255), ("l2", 0.5), ("l1", 6.0)])
def test_apgd_fools_the_same_images_as_pyautoattack_from_the_same_start(norm, eps, loss, toy, x,
                                                                        grey, monkeypatch):
    """The loss on the others is about the same."""
    x = grey if norm == "l2" else x
    y = predicted(toy, x)
    ours, fooled, highest, value, *_ = from_the_same_start(monkeypatch, toy, x, y, eps, norm, loss)
    assert ((predicted(toy, ours) != y) == fooled).all()
    assert 0 < fooled.sum() < N
    with torch.no_grad():
        assert apart(value(toy(ours), y)[~fooled], highest[~fooled]) <= 0.01


@cache
def photographs(shared):
    """A network and those of 50 photographs that it gets right, at 128 pixels to save time."""
    folder = shared / "data"
    model = models.load_model("squeezenet1_0", weights=folder / "weights").to(
        memory_format=torch.channels_last)  # twice as fast
    images = data.open_images(folder / "imagenet_sample" / "val", split="test")
    images = data.load(images.prepared(128, 50), workers=0)
    x = data.to_float(images.pixels)
    right = predicted(model, x) == images.labels
    return model, x[right], images.labels[right]


@pytest.mark.parametrize(("norm", "eps", "loss"), [
    ("linf", 0.15 / 255, "ce"), ("linf", 0.15 / 255, "dlr"), ("l2", 0.06, "ce"), ("l1", 8.0, "ce")])
def test_apgd_on_photographs_is_as_strong_as_pyautoattack(norm, eps, loss, shared):
    """At radii where about half of the images are robust under pyautoattack, chosen before ours was
    run; random starts differ. The counts differ by at most one image, except in L1, where a start
    from the whole ball is stronger than theirs, which has few large coordinates."""
    model, x, y = photographs(shared)
    with torch.random.fork_rng():
        theirs = robust(model, their_apgd(model, eps, norm, loss, 10).perturb(x, y), y)
    ours = robust(model, attacks.apgd(model, x, y, eps=eps, norm=norm, steps=10, loss=loss), y)
    assert 0.2 * len(x) <= theirs <= 0.8 * len(x)
    assert ours <= theirs + 1
    assert norm == "l1" or ours >= theirs - 1


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 1.2), ("l1", 8.0)])
def test_apgd_on_digits_is_as_strong_as_pyautoattack(norm, eps, loss):
    """20 steps from different random starts; the seed changes either count by one or two."""
    model, x, y = digits(100)
    with torch.random.fork_rng():
        theirs = robust(model, their_apgd(model, eps, norm, loss, 20).perturb(x, y), y)
    ours = robust(model, attacks.apgd(model, x, y, eps=eps, norm=norm, steps=20, loss=loss), y)
    assert 50 <= theirs <= 90
    assert abs(ours - theirs) <= 2


class Recorder(nn.Module):
    """Always predicts class 0 and records its inputs."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(x.clone())
        return F.one_hot(torch.zeros(len(x), dtype=torch.int64), K).to(x)

    def sides(self, x, norm):
        """Side of the changed square at every query after the start, the largest in the batch.

        In L2 a second square is emptied: only pixels that are changed and perturbed count.
        """
        _, start, *trials = self.asked
        for trial in trials:
            if len(trial) == len(x):
                changed = (((trial - start).abs() > 1e-5) & ((trial - x).abs() > 1e-5)).any(1)
                yield changed.any(2).sum(1).max().item() if norm == "linf" \
                    else changed.sum((1, 2)).max().item() ** 0.5


@pytest.mark.parametrize("queries", [60, 400])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 1.0)])
def test_square_changes_squares_of_the_same_sizes_as_pyautoattack(norm, eps, queries, grey):
    """Query by query; no image is fooled and no change kept, so every square can be seen."""
    y = torch.zeros(N, dtype=torch.int64)
    ours, theirs = Recorder(), Recorder()
    attacks.square(ours, grey, y, eps=eps, norm=norm, queries=queries)
    their_square(theirs, grey, y, eps=eps, norm=norm, queries=queries + 1, seed=0)
    sides = list(ours.sides(grey, norm))
    assert len(sides) >= queries - 2
    assert sides == pytest.approx(list(theirs.sides(grey, norm))[:len(sides)])


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 4.0)])
def test_square_on_digits_is_as_strong_as_pyautoattack(norm, eps):
    """60 queries, six seeds. They place squares once per batch, we once per image, so only means
    can agree: within three standard errors over the seeds."""
    model, x, y = digits(100)
    theirs, ours = [], []
    for seed in range(6):
        theirs.append(sum(robust(model, their_square(
            model, part, y[i:i + 20], eps=eps, norm=norm, queries=60, seed=100 * seed + i),
            y[i:i + 20]) for i, part in zip(range(0, 100, 20), x.split(20), strict=True)))
        generator = torch.Generator().manual_seed(seed)
        ours.append(robust(model, attacks.square(model, x, y, eps=eps, norm=norm, queries=60,
                                                 generator=generator), y))
    assert 20 <= mean(theirs) <= 90
    error = ((variance(theirs) + variance(ours)) / len(ours)) ** 0.5
    assert abs(mean(ours) - mean(theirs)) <= 3 * error
    assert error <= 4


@pytest.mark.parametrize(("norm", "eps"), [("linf", 4 / 255), ("l2", 2.0)])
def test_square_on_photographs_is_as_strong_as_pyautoattack(norm, eps, shared):
    """100 queries, one seed; about 40 % of the images are robust under pyautoattack."""
    model, x, y = photographs(shared)
    theirs = robust(model, their_square(model, x, y, eps=eps, norm=norm, queries=100, seed=0), y)
    ours = robust(model, attacks.square(model, x, y, eps=eps, norm=norm, queries=100), y)
    assert 0.2 * len(x) <= theirs <= 0.8 * len(x)
    assert abs(ours - theirs) <= 4  # three standard deviations over seeds


# --------------------------------------------------------------- exact projections

def nearest_by_scipy(delta, x, eps, norm):
    """The allowed perturbation nearest to delta, by a general solver, to about 1e-6; float64."""
    n, scale = len(delta), max(1, np.abs(delta).max())
    if norm == "l2":
        parts, bounds = np.eye(n), list(zip(-x, 1 - x, strict=True))
        room = {"fun": lambda d: eps - d @ d / eps, "jac": lambda d: -2 * d / eps}
    else:  # a difference of two positive parts: the L1 norm is their sum, and smooth
        parts, bounds = np.hstack([np.eye(n), -np.eye(n)]), [(0, r) for r in (*(1 - x), *x)]
        room = {"fun": lambda d: eps - d.sum(), "jac": lambda d: -np.ones(2 * n)}
    found = minimize(
        lambda d: ((parts @ d - delta) ** 2).sum() / scale, np.zeros(parts.shape[1]),
        jac=lambda d: 2 * parts.T @ (parts @ d - delta) / scale, bounds=bounds, method="SLSQP",
        constraints=[{"type": "ineq", **room}], options={"maxiter": 1000, "ftol": 1e-10})
    assert found.status in (0, 8), found.message  # 8: nothing lower along the last direction
    return parts @ found.x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [0.05, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_projections_equal_those_of_a_general_solver(norm, eps, dtype):
    """Onto ball and box together; images with pixels at 0 and 1, perturbations of many sizes."""
    x = pictures(12, shape=(1, 3, 3), dtype=dtype)
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(x.shape, generator=g, dtype=dtype) * torch.logspace(-2, 1, 12).to(dtype)[
        :, None, None, None]
    ours = balls.project(delta, x, eps, norm)
    assert (balls.norm_of(ours, norm) > 0.999 * eps).sum() >= 2  # some are on the sphere
    for mine, d, image in zip(ours, delta, x, strict=True):
        d, image = d.double().flatten().numpy(), image.double().flatten().numpy()
        theirs = nearest_by_scipy(d, image, eps, norm)
        assert mine.flatten().numpy() == pytest.approx(theirs, abs=1e-5)
