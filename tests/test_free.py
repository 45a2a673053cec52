"""free_at.py: its methods compared with naive algorithms, resuming, processes, bad input."""

import csv
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SRC
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import free_at
from attack_toys import pictures, toy
from utils import models, passes, recipes
from utils.data import CIFAR10, load, open_images
from utils.errors import UserError
from utils.finished import images_for
from utils.passes import crop_flip, random_crops
from utils.team import Team, has_unused, joint_batch_norm

CPU = torch.device("cpu")
METHODS = ("natural", "pgd", "free", "fast")
SMALL = ("--model_name", "mlp", "--num_images", 150, "--epochs", 4, "--replays", 2, "--guard",
         "stop", "--device", "cpu")


def options(**changed):
    return SimpleNamespace(**{
        "method": "free", "replays": 3, "eps": 0.1, "alpha": 0.1, "steps": 2, "epochs": 6,
        "batch_size": 16, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "step",
        "clip_delta": "ball", "decay": "all", "weight_steps": None, "shift": 4, "augment": "auto",
        "guard": "off", "amp": "off", "seed": 0,
        "model_name": "mlp", "pretrained": "random", "image_size": 28, "workers": 0,
        "data_dir": "digits", "data_root": "data"} | changed)


def digits(n=40):
    return load(open_images("digits", split="train").prepared(28, n), workers=0)


class Bar:
    def update(self):
        pass


def trained(passes=2, **changed):
    """Weights after some passes, as one vector, and the training itself."""
    training = free_at.FreeTraining(options(**changed), digits(), Team(), CPU)
    for _ in range(passes):
        training.one_pass(Bar())
    return torch.cat([p.detach().flatten() for p in training.model.parameters()]), training


def train(*flags):
    """Run free_at.py with these flags, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["free_at.py", *map(str, flags)])
        free_at.main(free_at.get_args())
    gc.collect()  # frees the lock on the run folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(method, flags=SMALL): the folder of a run with these flags, trained once."""
    @functools.cache
    def run(method, flags=SMALL):
        folder = tmp_path_factory.mktemp("finished") / method
        train(*flags, "--method", method, "--save", folder)
        return folder
    return run


# ------------------------------------------------------------------ the methods

def test_free_equals_algorithm_1_written_naively():
    """Weights and delta after two minibatches, the gradients taken one at a time."""
    x, m, eps, alpha, lr, mu = pictures(6, torch.float64), 3, 0.2, 0.15, 0.05, 0.9
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    ours, theirs = (toy(torch.float64).requires_grad_(True) for _ in range(2))
    optimizer, delta = torch.optim.SGD(ours.parameters(), lr, mu), torch.zeros_like(x)
    naive_delta = torch.zeros_like(x)
    velocity = [torch.zeros_like(p) for p in theirs.parameters()]
    for part in (slice(0, 6), slice(2, 6)):  # the second uses the first rows of delta
        images, labels = x[part], y[part]

        def step(z, labels):
            optimizer.zero_grad()
            F.cross_entropy(ours(z), labels).backward()
            optimizer.step()
        free_at.free_minibatch(step, images, labels, delta[:len(images)], eps=eps, alpha=alpha, m=m)
        for _ in range(m):
            d = naive_delta[:len(images)].clone()
            z = (images + d).clamp(0, 1).requires_grad_()
            g, *g_weights = torch.autograd.grad(F.cross_entropy(theirs(z), labels),
                                                [z, *theirs.parameters()])
            g = g * ((images + d >= 0) & (images + d <= 1))  # tf.clip_by_value
            naive_delta[:len(images)] = (d + alpha * g.sign()).clamp(-eps, eps)
            with torch.no_grad():
                for p, v, g in zip(theirs.parameters(), velocity, g_weights, strict=True):
                    v.mul_(mu).add_(g)
                    p.sub_(lr * v)
    assert torch.allclose(delta, naive_delta, rtol=0, atol=1e-7)
    assert (naive_delta.abs() == eps).any() and (naive_delta != 0).all(1).any()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-7)


def test_free_with_one_replay_and_no_radius_is_natural_training():
    free, _ = trained(method="free", replays=1, eps=0.0, alpha=0.0)
    natural, _ = trained(method="natural")
    assert torch.equal(free, natural)
    other, _ = trained(method="free", replays=1)
    assert not torch.equal(other, natural)


def test_delta_is_kept_from_minibatch_to_minibatch_within_the_radius():
    _, training = trained(passes=1)
    assert training.delta.shape == (16, 1, 28, 28)
    assert 0 < training.delta.abs().max() <= 0.1 + 1e-7
    before = training.delta.clone()
    x = torch.rand(8, 1, 28, 28)
    free_at.free_minibatch(lambda z, _: z.sum().backward(), x, None, training.delta[:8], eps=0.1,
                           alpha=0.01, m=1)
    assert torch.equal(training.delta[8:], before[8:])
    assert not torch.equal(training.delta[:8], before[:8])


def replayed(box, m=4, eps=0.3, alpha=0.3):
    """Free training on two minibatches of images k/255 with a black and a white edge.

    -> for every replay: x + delta before its step, x + delta after it, and which pixels of delta
    did not move although the gradient of the network's input asks for another allowed value
    """
    model, delta, found = toy().requires_grad_(True), torch.zeros(6, 3, 8, 8), []
    for seed in range(2):
        g, y, seen = torch.Generator().manual_seed(seed), torch.tensor([0, 1, 2, 3, 4, 0]), []
        x = torch.randint(0, 256, (6, 3, 8, 8), generator=g) / 255
        x[..., :3], x[..., 6:] = 0, 1

        def step(z, y, seen=seen):
            slope = torch.zeros_like(z)
            z.register_hook(slope.copy_)
            seen.append((delta.clone(), slope))
            F.cross_entropy(model(z), y).backward()
        free_at.free_minibatch(step, x, y, delta, eps=eps, alpha=alpha, m=m, box=box)
        assert delta.abs().max() <= eps
        ends = [*(d for d, _ in seen[1:]), delta.clone()]
        for (start, slope), end in zip(seen, ends, strict=True):
            wanted = (start + alpha * slope.sign()).clamp(-eps, eps)
            wanted = (x + wanted).clamp(0, 1) - x if box else wanted
            found.append((x + start, x + end, (end - wanted).abs() > 1e-6))
    return found


def test_under_box_x_plus_delta_stays_in_the_image_and_no_pixel_of_delta_is_dead():
    for before, after, dead in replayed(box=True):
        for z in (before, after):
            assert z.min() == 0 and z.max() == 1
        assert not dead.any()


def test_under_ball_delta_never_moves_where_x_plus_delta_is_outside_the_image():
    for k, (before, after, dead) in enumerate(replayed(box=False)):
        outside = (before < 0) | (before > 1)
        assert torch.equal(after[outside], before[outside])
        assert not dead[~outside].any()  # black and white pixels move while delta is zero
        assert k == 0 or (outside.float().mean() > 0.4 and dead.float().mean() > 0.05)


def test_clip_delta_changes_the_network_and_is_recorded(run_here, tmp_path, finished):
    assert run_here("free_at.py", *SMALL, "--clip_delta", "box", "--save", "box").returncode == 0
    ball, box = (network_of(folder) for folder in (finished("free"), tmp_path / "box"))
    assert json.loads(ball.with_suffix(".json").read_text())["clip_delta"] == "ball"
    assert json.loads(box.with_suffix(".json").read_text())["clip_delta"] == "box"
    assert box.read_bytes() != ball.read_bytes()
    delta = torch.load(box.parent / "checkpoint.pth", weights_only=True)["delta"]
    assert 0 < delta.abs().max() <= 0.1 + 1e-7


@pytest.mark.parametrize(("method", "m", "epochs", "passes"), [
    ("natural", 8, 24, 24), ("free", 8, 24, 3), ("free", 5, 24, 5), ("pgd", 8, 2, 2),
    ("free", 1, 7, 7)])
def test_the_budget_is_counted_in_weight_steps(method, m, epochs, passes):
    args = options(method=method, replays=m, epochs=epochs)
    training = free_at.FreeTraining(args, digits(40), Team(), CPU)  # 16 + 16 + 8
    assert training.passes == passes
    assert training.total == passes * 3 * (m if method == "free" else 1)


def test_the_schedules_follow_their_definitions():
    assert [recipes.rate(k, 80, "step", 7) for k in (0, 39, 40, 59, 60, 79)] == [
        1, 1, 0.1, 0.1, 0.01, 0.01]
    assert [recipes.rate(k, 70, "thirds", 7) for k in (0, 29, 30, 49, 50, 69)] == [  # 3, 5 passes
        1, 1, 0.1, 0.1, 0.01, 0.01]
    cycle = [recipes.rate(k, 100, "onecycle", 7) for k in (0, 20, 40, 70, 100)]
    assert cycle == pytest.approx([0, 0.5, 1, 0.5, 0])
    triangle = [recipes.rate(k, 100, "triangle", 7) for k in (0, 25, 50, 75, 100)]
    assert triangle == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_fast_takes_one_step_from_a_random_point():
    model, x = toy(torch.float64), pictures(4, torch.float64)
    y, u = torch.tensor([0, 1, 2, 3]), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    found = free_at.fast_start(model, x, y, u, eps=0.1, alpha=0.125)
    start = torch.minimum(torch.maximum(x + 0.1 * (2 * u - 1), torch.zeros(())), torch.ones(()))
    start.requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    delta = torch.where(g > 0, 0.125, -0.125) + (start - x)
    wanted = (x + delta.clamp(-0.1, 0.1)).clamp(0, 1)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert not found.requires_grad


def test_fast_moves_black_pixels_whatever_their_start():
    """Where the start is clipped, fast_adversarial's order still has a gradient."""
    model, y = toy(torch.float64), torch.tensor([1])
    black = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    u = torch.rand(black.shape, dtype=torch.float64)
    found = free_at.fast_start(model, black, y, u, eps=0.1, alpha=0.125)
    start = (0.1 * (2 * u - 1)).clamp(min=0).requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    assert torch.equal(found > 0, g > 0) and bool((g > 0)[u < 0.5].any())


@pytest.mark.parametrize("method", ["pgd", "fast"])
def test_weight_steps_are_taken_on_adversarial_images_within_the_radius(method, monkeypatch):
    seen = []
    real = free_at.FreeTraining.step
    monkeypatch.setattr(free_at.FreeTraining, "step",
                        lambda self, x, y: seen.append(x.detach()) or real(self, x, y))
    _, training = trained(passes=1, method=method, augment="off")
    clean = training.images.pixels.float() / 255
    for batch in seen:
        near = (batch[:, None] - clean[None]).flatten(2).abs().amax(2).amin(1)
        assert (near <= 0.1 + 1e-6).all() and (near > 0.05).all()


def test_bf16_training_equals_float32_training_up_to_rounding():
    (exact, _), (rounded, _) = trained(), trained(amp="bf16")
    assert 0 < (exact - rounded).abs().max() < 0.1


def test_crops_and_mirrors_equal_those_of_a_loop():
    x = torch.randint(0, 256, (5, 3, 12, 11), dtype=torch.uint8)
    u = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    u[:, 0] = torch.tensor([0.0, 0.999999, 0.4])
    found = crop_flip(x, 8, u)
    assert found.dtype == torch.uint8
    for i in range(5):
        top, left = int(u[0, i] * 5), int(u[1, i] * 4)
        one = x[i, :, top:top + 8, left:left + 8]
        assert torch.equal(found[i], one.flip(2) if u[2, i] < 0.5 else one)
    assert len(set((u[2] < 0.5).tolist())) == 2


# -------------------------------------------------- photographs, decoded in every pass

@pytest.fixture
def photographs(tmp_path, picture):
    """A folder with train/ and val/ of two ImageNet classes, three photographs each."""
    for split in ("train", "val"):
        for i, wnid in enumerate(("n01440764", "n02504458")):
            for k in range(3):
                picture(tmp_path / "net" / split / wnid / f"{k}.JPEG", 90 + k, 70, seed=3 * i + k)
    return tmp_path / "net"


def test_crops_equal_those_of_torchvision_with_the_given_seed(photographs, monkeypatch):
    images = open_images(photographs, split="train").prepared(32, None)
    plan = [[(0, 5), (4, 6)], [(0, 7)]]
    found = list(random_crops(images, plan, workers=0))
    assert [index.tolist() for index, _ in found] == [[0, 4], [0]]
    state, seeded = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    list(random_crops(images, plan, workers=0))
    assert not seeded and torch.equal(torch.get_rng_state(), state)
    ready = v2.Compose([v2.RandomResizedCrop(32), v2.PILToTensor()])
    for (_, x), keys in zip(found, plan, strict=True):
        for one, (i, seed) in zip(x, keys, strict=True):
            torch.manual_seed(seed)
            with Image.open(images.root / images.names[i]) as file:
                wanted = ready(file.convert("RGB"))
            same = (one.float() - wanted.float()).abs().max()
            assert min(same, (one.flip(2).float() - wanted.float()).abs().max()) == 0
    assert not torch.equal(found[0][1][0], found[1][1][0])
    torch.set_rng_state(state)
    for (_, x), (_, again) in zip(found, random_crops(images, plan, workers=1), strict=True):
        assert torch.equal(x, again) and torch.equal(torch.get_rng_state(), state)
    seeds = [list(enumerate(range(k, k + 6))) for k in range(0, 60, 6)]
    plain = [x for _, x in random_crops(images, seeds, workers=0)]
    assert len({x.sum().item() for x in torch.cat(plain)}) == 60


class Batch:
    """Stands for a minibatch on the CPU, pinned by the loader or not."""
    device = torch.device("cpu")

    def __init__(self, pinned):
        self.pinned, self.sent = pinned, []

    def is_pinned(self):
        return self.pinned

    def pin_memory(self):
        self.sent.append("pinned here")
        return self

    def to(self, device, **options):
        self.sent.append((str(device), options))
        return self


@pytest.mark.parametrize(("device", "workers", "pinned"), [
    ("cuda", 2, True), ("cuda", 0, False), ("cpu", 2, False), ("mps", 2, False)])
def test_crops_go_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch, photographs, device,
                                                              workers, pinned):
    images = open_images(photographs, split="train").prepared(32, None)
    given, made = [], []

    def loader(dataset, batch_sampler, **options):
        given.append(options)
        made.extend(Batch(options["pin_memory"]) for _ in batch_sampler)
        return [(list(range(len(keys))), x) for keys, x in zip(batch_sampler, made, strict=True)]
    monkeypatch.setattr("torch.utils.data.DataLoader", loader)
    found = list(passes.one_pass(
        images, 4, torch.Generator(), Team(), vary=True, smallest=1, workers=workers,
        device=torch.device(device)))
    assert [n for n, _, _ in found] == [4, 2] and len(made) == 2
    assert given[0]["pin_memory"] is pinned and given[0]["num_workers"] == workers
    sent = [(device, {"non_blocking": device == "cuda"})]
    assert all(x.sent == ["pinned here"] * (device == "cuda" and not pinned) + sent for x in made)


def test_minibatches_are_on_the_requested_device():
    images = load(open_images("digits", split="train").prepared(28, 20), workers=0)
    for device in ("cpu", "meta"):
        for _, _, x in passes.one_pass(images, 5, torch.Generator(), Team(), vary=True, smallest=1,
                                       workers=0, device=torch.device(device)):
            assert x.device.type == device and x.dtype == torch.uint8


def test_a_broken_photograph_is_left_out_of_its_minibatch(photographs, capsys):
    (photographs / "train" / "n01440764" / "1.JPEG").write_text("no image")
    images = open_images(photographs, split="train").prepared(32, None)
    (index, x), = random_crops(images, [[(0, 1), (1, 2), (5, 3)]], workers=0)
    assert index.tolist() == [0, 5] and len(x) == 2
    assert "n01440764/1.JPEG: cannot be decoded, left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="no image of a minibatch"):
        list(random_crops(images, [[(1, 2)]], workers=0))


PHOTOGRAPHS = ("--model_name", "squeezenet1_1", "--batch_size", 3, "--lr", 0.001, "--workers", 0,
               "--guard", "off", "--device", "cpu", "--save", "run")


def test_imagenet_networks_train_on_crops_of_photographs(run_here, tmp_path, photographs):
    done = run_here("free_at.py", "--data_dir", photographs, *PHOTOGRAPHS, "--replays", 2,
                    "--epochs", 2)
    assert done.returncode == 0, done.stderr
    assert "6 images of" in done.stdout and "1 pass, 4 weight steps" in done.stdout
    facts = json.loads((tmp_path / "run" / "free2_squeezenet1_1.json").read_text())
    assert facts["eps"] == 4 / 255 and facts["image_size"] == 224


@pytest.mark.parametrize("method", ["pgd", "fast"])
def test_a_broken_photograph_is_left_out_of_adversarial_training(run_here, photographs, method):
    (photographs / "train" / "n01440764" / "1.JPEG").write_text("no image")
    done = run_here("free_at.py", "--data_dir", photographs, *PHOTOGRAPHS, "--method", method,
                    "--steps", 1, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "1.JPEG: cannot be decoded, left out" in done.stderr


# --------------------------------------------------------------- a run, by flags

def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def network_of(folder):
    """The .pth of the last network in a run folder."""
    path, = set(folder.glob("*.pth")) - {folder / "checkpoint.pth", *folder.glob("*_best.pth")}
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_a_network_that_can_be_loaded_its_facts_and_its_curve(finished, method):
    folder, name = finished(method), {"free": "free2_mlp"}.get(method, f"{method}_mlp")
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        f"{name}.pth", f"{name}.json", f"{name}_best.pth", f"{name}_best.json", "log.csv",
        "curve.png", "checkpoint.pth"}
    facts = json.loads((folder / f"{name}.json").read_text())
    assert facts["method"] == method and facts["weight_steps"] == 4 * 3
    assert facts["passes"] == len(rows(folder / "log.csv")) == (2 if method == "free" else 4)
    assert {"kind", "data_dir", "data_root", "model_name", "eps", "image_size", "replays", "alpha",
            "steps", "seconds", "images_sha256", "device"} <= facts.keys()
    model = models.load_model("mlp", weights=str(folder / f"{name}.pth"), kind="digits")
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def airplanes(tmp_path, picture):
    """airplanes(folder, n): n small images of each of CIFAR-10's classes."""
    def draw(folder, n):
        for k, name in enumerate(CIFAR10):
            for i in range(n):
                picture(tmp_path / folder / name / f"{i}.png", 32, 32, seed=10 * i + k)
        return tmp_path / folder
    return draw


TINY = ("--model_name", "cnn_bn", "--epochs", 1, "--replays", 1, "--batch_size", 10, "--guard",
        "off", "--device", "cpu", "--workers", 0, "--save", "run")


@pytest.mark.parametrize(("flags", "n", "held"), [
    ((), 60, 6), (("--num_images", 40, "--hold_out", 0.25), 40, 10)])
def test_without_a_test_split_a_run_is_measured_on_unseen_images(run_here, tmp_path, airplanes,
                                                                 flags, n, held):
    folder = airplanes("sixty", 6)
    made = run_here("free_at.py", *TINY, "--data_dir", folder, *flags)
    assert made.returncode == 0, made.stderr
    assert f"{held} of {n} images are held out" in made.stdout
    assert f"{n - held} images of" in made.stdout
    done = run_here("eval_net.py", "--runs", "run", "--attacks", "none", "--save", "out",
                    "--device", "cpu", "--workers", 0)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "free1_cnn_bn.json").read_text())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (facts["num_images"], found["settings"]["n"]) == (n - held, held)
    assert found["settings"]["note"] == "held out of the training images"
    tested, _ = images_for([("run", facts, folder, "data")])
    assert tested.sha256() == found["settings"]["images_sha256"] != facts["images_sha256"]
    taught = open_images(folder, split="train").prepared(32, n).without(tested.names)
    assert taught.sha256() == facts["images_sha256"] and len(taught) == n - held
    by_name = run_here("eval_net.py", "--model_name", "cnn_bn", "--weights", network_of(
        tmp_path / "run"), "--data_dir", folder, "--attacks", "none", "--device", "cpu")
    assert f"n: {held} test images (held out of the training images)" in by_name.stdout


def test_a_run_on_train_is_tested_on_the_test_folder_beside_it(run_here, tmp_path, airplanes):
    airplanes("both/train", 2)
    test = airplanes("both/test", 3)
    made = run_here("free_at.py", *TINY, "--data_dir", "both/train")
    assert made.returncode == 0 and "held out" not in made.stdout, made.stderr
    facts = json.loads((tmp_path / "run" / "free1_cnn_bn.json").read_text())
    assert facts["hold_out"] is None and facts["num_images"] == 20
    tested, note = images_for([("run", facts, "both/train", "data")])
    assert (tested.root.resolve(), len(tested), note) == (test.resolve(), 30, "")


def test_test_images_that_are_missing_do_not_stop_a_training(run_here, tmp_path, airplanes):
    airplanes("both/train", 2)
    (tmp_path / "both" / "val").mkdir()
    made = run_here("free_at.py", *TINY, "--data_dir", "both")
    assert made.returncode == 0 and "held out" not in made.stdout, made.stderr


def test_a_held_out_share_of_no_images_is_refused(run_here, refused, airplanes):
    refused(run_here("free_at.py", *TINY, "--data_dir", airplanes("ten", 1), "--hold_out", 0.01),
            "no test split", "--hold_out 0.01", "none of 10")


class Killed(BaseException):
    """Stands for SIGKILL: the script must not catch it."""


@pytest.mark.parametrize("method", ["free", "fast", "pgd"])
def test_a_killed_run_resumes_to_the_same_bytes(run_here, tmp_path, monkeypatch, finished, method):
    whole, flags = finished(method), (*SMALL, "--method", method, "--save", "killed")
    real, calls = free_at.FreeTraining.one_pass, []

    def killing(self, bar):
        if len(calls) == 1:
            raise Killed
        calls.append(1)
        return real(self, bar)
    with monkeypatch.context() as patch:
        patch.setattr(free_at.FreeTraining, "one_pass", killing)
        with pytest.raises(Killed):
            run_here("free_at.py", *flags)
    gc.collect()
    assert len(rows(tmp_path / "killed" / "log.csv")) == 1
    assert run_here("free_at.py", *flags, "--resume").returncode == 0
    name = network_of(whole).name
    assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()
    keys = ("epoch", "weight_steps", "loss", "train_acc", "probe_adv_acc")
    assert [[row[k] for k in keys] for row in rows(tmp_path / "killed" / "log.csv")] == [
        [row[k] for k in keys] for row in rows(whole / "log.csv")]


# Run by two processes in one launch; arguments: src, a list of methods, a list of flags.
TOGETHER = """
import copy, gc, json, sys, traceback
import torch
from torch import nn

src, methods, flags = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, src)
import free_at
from utils import draw
from utils.team import Team, join_team, joint_batch_norm

team, cpu = join_team(torch.device("cpu"))
leave, Team.leave = Team.leave, lambda self: None  # one group of processes for all runs
free_at.join_team = lambda device: (team, device)
draw.training_curve = lambda *args, **more: b""  # takes longer than the training


def train(*more):
    sys.argv = ["free_at.py", *flags, *more]
    try:
        free_at.main(free_at.get_args())
    except KeyboardInterrupt:
        pass
    gc.collect()
    torch.distributed.barrier()


def batch_norm():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
                          nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2),
                          nn.Linear(2, 2)).double()
    part = joint_batch_norm(copy.deepcopy(whole), cpu, team)
    x = torch.randn(9, 3, 5, 5).double().requires_grad_()
    own = x.detach()[team.rank::2].requires_grad_()
    (whole(x) ** 3).sum().backward()
    (part(own) ** 3).sum().backward()
    for p in part.parameters():
        torch.distributed.all_reduce(p.grad)
    for p, q in zip(part.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-12)
    for a, b in zip(part.buffers(), whole.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)
    assert torch.allclose(own.grad, x.grad[team.rank::2], rtol=0, atol=1e-14)
    assert own.grad.abs().max() > 1e-3
    a, b = part.eval()(own.detach()), whole.eval()(own.detach())
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


try:
    batch_norm()
    said = "the same"
except AssertionError:
    said = traceback.format_exc()
open(f"batch_norm_{team.rank}.txt", "w").write(said)
torch.distributed.barrier()
for method in methods:
    train("--method", method, "--save", method)
train("--epochs", "4", "--save", "whole")
train("--model_name", "unused.py:net", "--save", "unused")
real, calls = free_at.FreeTraining.one_pass, []


def killed(self, bar):
    if calls:
        raise KeyboardInterrupt
    calls.append(1)
    return real(self, bar)


free_at.FreeTraining.one_pass = killed
train("--epochs", "4", "--save", "killed")
free_at.FreeTraining.one_pass = real
train("--epochs", "4", "--save", "killed", "--resume")
leave(team)
"""
UNUSED = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 10))
        self.never = nn.Linear(2, 3)

    def forward(self, x):
        return self[1](self[0](x))


def net():
    return Net()
"""
SHARED_STEPS = ("--model_name", "mlp", "--num_images", 135, "--batch_size", 50, "--epochs", 2,
                "--replays", 2, "--lr", 0.05, "--device", "cpu")  # 18 and 17 images at the end


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of two processes: a run of each method, and one that was resumed."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "together.py").write_text(TOGETHER)
    (folder / "unused.py").write_text(UNUSED)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "together.py", str(SRC), json.dumps(METHODS), json.dumps([str(f) for f in SHARED_STEPS])],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_the_same_network_as_one(finished, together, method):
    paths = [network_of(folder) for folder in (finished(method, SHARED_STEPS), together / method)]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    start = models.trainable("mlp", kind="digits")[1].state_dict()
    assert max((one[k] - start[k]).abs().max() for k in one) > 2e-3
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=0, atol=2e-4), key
    one, two = (rows(path.parent / "log.csv") for path in paths)
    assert [row["weight_steps"] for row in one] == [row["weight_steps"] for row in two]


@pytest.mark.slow
def test_two_processes_train_a_network_with_unused_layers(together):
    saved = torch.load(network_of(together / "unused"), weights_only=True)
    assert "never.weight" in saved and saved["1.weight"].shape == (10, 784)


@pytest.mark.parametrize("used", [True, False])
def test_unused_weights_are_detected_and_the_modes_are_kept(used):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    if not used:
        net.add_module("never", nn.Linear(2, 3))
        net.forward = lambda x: net[:4](x)
    assert has_unused(net, (1, 4, 4)) is not used
    assert net.training and net[1].num_batches_tracked == 0
    assert all(p.grad is None for p in net.parameters())
    assert has_unused(net, (3, 4, 4)) is False  # it cannot take such images


@pytest.mark.slow
def test_two_processes_resume_with_the_delta_of_both(together):
    whole, killed = (network_of(together / name) for name in ("whole", "killed"))
    assert len(rows(whole.parent / "log.csv")) == 2
    assert whole.read_bytes() == killed.read_bytes()
    delta = torch.load(killed.parent / "checkpoint.pth", weights_only=True)["delta"]
    assert delta.shape[0] == 50 and (delta != 0).flatten(1).any(1).all()


@pytest.mark.slow
def test_batch_statistics_of_two_processes_equal_those_of_the_joint_batch(together):
    for rank in range(2):
        assert (together / f"batch_norm_{rank}.txt").read_text() == "the same"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_several_processes_refuse_a_batch_norm_that_does_more_than_torchs(device):
    """SyncBatchNorm in its place would drop the activation."""
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()
    net, device = nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4)), torch.device(device)
    with pytest.raises(UserError, match="Activated.*2 processes; start one process"):
        joint_batch_norm(net, device, Team(0, 2))
    assert joint_batch_norm(net, device, Team()) is net and type(net[1]) is Activated
    plain = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2))
    joint = joint_batch_norm(plain, device, Team(0, 2))
    assert not {type(layer) for layer in joint} & {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


def test_the_guard_ends_the_run_with_the_better_weights(run_here, tmp_path, monkeypatch):
    values, weights = iter([0.5, 0.6, 0.1, 0.9]), []

    def probe(self):
        weights.append({k: v.clone() for k, v in self.model[1].state_dict().items()})
        return next(values)
    monkeypatch.setattr(free_at.FreeTraining, "probe", probe)
    flags = (*SMALL, "--method", "fast", "--save", "run")
    done = run_here("free_at.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "fell from 60.0 % to 10.0 %: catastrophic overfitting; the run ends" in done.stdout
    assert len(rows(tmp_path / "run" / "log.csv")) == 3
    saved = torch.load(tmp_path / "run" / "fast_mlp.pth", weights_only=True)
    assert all(torch.equal(saved[k], weights[1][k]) for k in saved)
    assert not all(torch.equal(saved[k], weights[2][k]) for k in saved)
    facts = json.loads((tmp_path / "run" / "fast_mlp.json").read_text())
    second = rows(tmp_path / "run" / "log.csv")[1]
    assert facts["guard_stopped"] is True and facts["passes"] == 2
    assert facts["weight_steps"] == int(second["weight_steps"])
    assert facts["seconds"] == pytest.approx(sum(
        float(row["seconds"]) for row in rows(tmp_path / "run" / "log.csv")[:2]), abs=2e-3)
    again = run_here("free_at.py", *flags, "--resume")
    assert again.returncode == 0, again.stderr
    assert len(rows(tmp_path / "run" / "log.csv")) == 3
    assert json.loads((tmp_path / "run" / "fast_mlp.json").read_text()) == facts


def test_the_guard_can_only_warn_or_be_off(run_here, tmp_path, monkeypatch):
    values = iter([0.5, 0.1, 0.2, 0.3])
    monkeypatch.setattr(free_at.FreeTraining, "probe", lambda self: next(values))
    done = run_here("free_at.py", *SMALL, "--method", "fast", "--guard", "warn", "--save", "warn")
    assert "warning: accuracy under PGD-10" in done.stdout and "the run ends" not in done.stdout
    found = [row["probe_adv_acc"] for row in rows(tmp_path / "warn" / "log.csv")]
    assert found == ["0.5", "0.1", "0.2", "0.3"]
    facts = json.loads((tmp_path / "warn" / "fast_mlp.json").read_text())
    assert facts["guard_stopped"] is False and facts["passes"] == 4
    done = run_here("free_at.py", *SMALL, "--method", "fast", "--guard", "off", "--save", "off")
    assert done.returncode == 0 and "warning" not in done.stdout


def test_training_starts_from_given_weights(run_here, tmp_path, finished):
    first = network_of(finished("natural"))
    done = run_here("free_at.py", *SMALL, "--method", "natural", "--pretrained", first, "--lr", 0,
                    "--save", "second")
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(path, weights_only=True)
            for path in (first, tmp_path / "second" / "natural_mlp.pth"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    start = models.trainable("mlp", kind="digits")[1].state_dict()
    assert not all(torch.equal(a[k], start[k]) for k in a)


def test_a_last_minibatch_of_one_image_is_left_out_and_not_counted(run_here, tmp_path):
    flags = (*SMALL, "--model_name", "lenet_bn", "--num_images", 65, "--batch_size", 32)
    done = run_here("free_at.py", *flags, "--method", "natural", "--save", "run")
    assert done.returncode == 0, done.stderr
    assert "4 passes, 8 weight steps" in done.stdout
    assert rows(tmp_path / "run" / "log.csv")[-1]["weight_steps"] == "8"


def test_a_rounded_up_number_of_passes_is_marked_in_the_output(run_here):
    done = run_here("free_at.py", *SMALL, "--replays", 3, "--save", "run")
    assert "2 passes (rounded up), 18 weight steps" in done.stdout


# ------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("flags", "words"), [
    (("--model_name", "resnet9000"), ("resnet9000", "wanted one of cnn")),
    (("--batch_size", 500), ("--batch_size 500", "150 training images")),
    (("--batch_size", 1), ("at least 2",)), (("--eps", 8), ("outside (0, 1]",)),
    (("--num_images", 1), ("1 training images", "two at least")),
    (("--pretrained", "nowhere.pth"), ("--pretrained nowhere.pth",)),
    (("--evaluate", "run"), ("--evaluate",))], ids=str)
def test_bad_input_gives_one_line_before_anything_is_trained(run_here, refused, tmp_path, flags,
                                                             words):
    refused(run_here("free_at.py", *SMALL, *flags), *words)
    assert not list(tmp_path.rglob("checkpoint.pth"))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
        run_here, refused, tmp_path, monkeypatch):
    real, calls = free_at.FreeTraining.one_pass, []

    def breaking(self, bar):
        calls.append(1)
        found = real(self, bar)
        return found | {"loss": float("nan")} if len(calls) == 2 else found
    monkeypatch.setattr(free_at.FreeTraining, "one_pass", breaking)
    refused(run_here("free_at.py", *SMALL, "--method", "natural", "--save", "run"), "epoch 2",
            "last checkpoint is kept")
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert len(saved["rows"]) == 1 and all(v.isfinite().all() for v in saved["net"].values())


def test_a_checkpoint_of_another_network_is_refused(run_here, refused, tmp_path, finished):
    shutil.copytree(finished("free"), tmp_path / "run")
    refused(run_here("free_at.py", *SMALL, "--save", "run", "--model_name", "cnn", "--resume"),
            "--model_name", "mlp")
