"""Precision: exact float32 where figures are measured, what --amp chooses, fp16 with its scale."""

import argparse
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_free import digits, options
from torch import nn

import attacks
import free_at
import train_gcm
import train_sga
from utils import loop as loops
from utils import precision, run
from utils.cli import run_script
from utils.data import SMALL
from utils.errors import UserError
from utils.loop import Trainer, loop
from utils.models import load_model
from utils.run import load_pth, provenance, result_flags
from utils.team import Team

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CALLS = {  # script: small flags
    "train_sga.py": ("--num_images", 40, "--epochs", 1, "--weights", "random", "--model_name",
                     "mlp", "--amp", "off", "--layout", "contiguous"),
    "free_at.py": ("--num_images", 70, "--epochs", 2, "--replays", 2, "--model_name", "mlp"),
    "train_gcm.py": ("--num_images", 80, "--epochs", 1, "--model_name", "mlp", "--head", "own",
                     "--augment", "none"),
    "fgsm_mnist.py": ("--num_images", 40, "--epochs", 1, "--eval_images", 4, "--queries", 2),
    "eval_net.py": ("--num_images", 4, "--model_name", "mlp", "--weights", "random", "--attacks",
                    "fgsm"),
    "gcm.py": ("--num_images", 60, "--model_name", "mlp", "--weights", "random", "--attacks",
               "fgsm"),
    "eval_uap.py": ("--num_images", 10, "--model_name", "mlp", "--weights", "random", "--uaps",
                    "delta.pth", "--scale", "1", "--show", 0)}
TRAININGS = {"train_sga.py": train_sga, "free_at.py": free_at, "train_gcm.py": train_gcm}


def by_hand():
    """The arithmetic settings, read from torch itself."""
    cudnn = torch.backends.cudnn
    return (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark,
            cudnn.deterministic)


EXACT, QUICK = ("highest", False, False, True), ("high", True, True, False)


@pytest.fixture(autouse=True)
def quick_before():
    """Every test begins as if something else had allowed TF32, and leaves torch as it was."""
    before = precision.arithmetic()
    precision.set_arithmetic(precision.QUICK)
    yield
    precision.set_arithmetic(before)


# ------------------------------------------------------------- float32 on a GPU

def test_measuring_is_exact_and_restores_the_settings_even_after_an_error():
    assert by_hand() == QUICK
    with pytest.raises(KeyError), precision.measuring():
        assert by_hand() == EXACT
        raise KeyError
    assert by_hand() == QUICK


@pytest.mark.parametrize(("device", "deterministic", "wanted"), [
    (CUDA, False, QUICK), (CUDA, True, EXACT), (CPU, False, EXACT), (CPU, True, EXACT)])
def test_trainings_may_use_tf32_on_a_gpu_only_and_not_under_deterministic(device, deterministic,
                                                                          wanted):
    for before in (precision.QUICK, precision.EXACT):
        precision.set_arithmetic(before)
        with precision.training(device, deterministic):
            assert by_hand() == wanted
        assert precision.arithmetic() == before


class Watched(Trainer):
    """Records the arithmetic settings in the epoch and in the measurement after it."""

    def __init__(self, device):
        super().__init__(device, steps=1, keep={})
        self.seen = []

    def one_pass(self, bar):
        self.seen.append(by_hand())
        return {"loss": 0.0}

    def after(self):
        self.seen.append(by_hand())
        return {}


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_epoch_on_a_gpu_may_use_tf32_and_the_measurement_after_it_is_exact(monkeypatch,
                                                                              deterministic):
    monkeypatch.setattr(loops, "synchronize", lambda device: None)  # there is no GPU
    trainer = Watched(CUDA)
    loop(trainer, 2, deterministic=deterministic)
    assert trainer.seen == [EXACT if deterministic else QUICK, EXACT] * 2
    assert by_hand() == QUICK  # as before


@pytest.mark.parametrize("script", CALLS)
def test_every_forward_pass_of_a_script_on_a_cpu_is_exact(script, run_here, tmp_path):
    torch.save(torch.full((1, 28, 28), 0.05), tmp_path / "delta.pth")
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(by_hand()))
    try:
        result = run_here(script, *CALLS[script], "--save", "run", "--device", "cpu")
    finally:
        hook.remove()
    assert result.returncode == 0, result.stderr
    assert len(seen) > 10 and set(seen) == {EXACT}


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_provenance_of_a_training_records_its_arithmetic(monkeypatch, deterministic):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    wanted = precision.EXACT if deterministic else precision.QUICK
    assert provenance(CUDA, deterministic)["arithmetic"] == wanted
    assert provenance(CUDA)["arithmetic"] == provenance(CPU, False)["arithmetic"] == {
        "float32_matmul": "highest", "cudnn_tf32": False, "cudnn_benchmark": False,
        "cudnn_deterministic": True}


@pytest.mark.parametrize("script", TRAININGS)
def test_trainings_apply_deterministic_to_their_epochs_and_their_provenance(script, run_here,
                                                                            tmp_path, monkeypatch):
    given = []

    def asked(where):
        real = where.training

        def spy(device, deterministic):
            given.append((where.__name__, deterministic))
            return real(device, deterministic)
        monkeypatch.setattr(where, "training", spy)

    for where in (loops, run, precision):
        asked(where)
    for flags, wanted in ((("--save", "a"), False), (("--save", "b", "--deterministic"), True)):
        given.clear()
        more = ("--amp", "auto") if script == "train_sga.py" else ()  # it times, too
        result = run_here(script, *CALLS[script], *more, *flags, "--device", "cpu")
        assert result.returncode == 0, result.stderr
        places = {"utils.loop", "utils.run"} | ({"utils.precision"} if more else set())
        assert set(given) == {(place, wanted) for place in places}
    facts = next(path for path in (tmp_path / "b").glob("*.json"))
    assert json.loads(facts.read_text())["arithmetic"] == precision.EXACT


def test_deterministic_affects_a_result_on_a_gpu_only():
    s = argparse.Namespace(deterministic=True, eps=0.1)
    assert result_flags(s, device="cuda") == {"deterministic": True, "eps": 0.1, "device": "cuda"}
    assert result_flags(s, device="cpu") == {"eps": 0.1, "device": "cpu"}


def test_a_run_on_a_cpu_resumes_with_or_without_deterministic(run_here):
    flags = (*CALLS["free_at.py"], "--save", "run", "--device", "cpu")
    assert run_here("free_at.py", *flags).returncode == 0
    again = run_here("free_at.py", *flags, "--resume", "--deterministic")
    assert again.returncode == 0, again.stderr


# ------------------------------------------------------------- what --amp auto chooses

PAIRS = [(amp, layout) for amp in ("off", "bf16") for layout in precision.LAYOUTS]


class Machine:
    """A step that takes as long as the table says, and the clock that shows it.

    cost {(amp, layout): seconds, or an error to raise}; busy(call) multiplies, calls from 0.
    """

    def __init__(self, cost, busy=lambda call: 1.0):
        self.cost, self.busy, self.now, self.calls = cost, busy, 0.0, []

    def clock(self):
        return self.now

    def step(self, models, x):
        pair = models[0].amp, "contiguous" if x.is_contiguous() else "channels_last"
        cost = self.cost[pair]
        if isinstance(cost, Exception):
            raise cost
        self.now += cost * self.busy(len(self.calls))
        self.calls.append(pair)

    def choice(self, **given):
        return precision.fastest([nn.Conv2d(3, 2, 1)], self.step, torch.rand(2, 3, 4, 4), **given,
                                 clock=self.clock)


def costs(*seconds):
    return dict(zip(PAIRS, seconds, strict=True))


@pytest.fixture
def hardware(monkeypatch):
    """hardware(True): this processor has bf16."""
    def has(answer):
        monkeypatch.setattr(precision, "has_bf16", lambda device: answer)
    has(False)
    return has


def test_given_choices_are_kept_and_nothing_is_timed():
    for amp, layout in PAIRS:
        machine = Machine({})
        assert machine.choice(amp=amp, layout=layout) == (amp, layout) and not machine.calls


@pytest.mark.parametrize(("given", "wanted"), [
    ({}, ("bf16", "channels_last")), ({"amp": "bf16"}, ("bf16", "channels_last")),
    ({"amp": "off"}, ("off", "contiguous")),  # 0.9 is too close to 1.0
    ({"layout": "contiguous"}, ("off", "contiguous"))])
def test_the_fastest_candidate_is_chosen(hardware, given, wanted):
    assert Machine(costs(1.0, 0.9, 2.0, 0.5)).choice(**given) == wanted


def test_the_candidates_take_turns_after_a_warm_up(hardware):
    machine = Machine(costs(1.0, 0.9, 2.0, 0.5))
    machine.choice()
    assert machine.calls == PAIRS * 4  # one to warm up, three that count
    quick = Machine(costs(*[1e-9] * 4))
    quick.choice()
    assert quick.calls == PAIRS * 21  # no more than twenty, however short


@pytest.mark.parametrize("free", [1, 2, 3])  # the one round in which nothing else runs
def test_a_busy_machine_does_not_change_the_choice(hardware, free):
    machine = Machine(costs(1.0, 1.0, 0.25, 0.25),
                      busy=lambda call: 1.0 if call // 4 == free else 50.0 * (1 + call % 4))
    assert machine.choice() == ("bf16", "contiguous")


def test_a_busy_spell_in_one_candidates_turns_does_not_decide(hardware):
    slow = {6, 10}  # two of the three turns of bf16, contiguous, which is the fastest
    machine = Machine(costs(1.0, 1.0, 0.25, 0.9), busy=lambda call: 100.0 if call in slow else 1.0)
    assert machine.choice() == ("bf16", "contiguous")


@pytest.mark.parametrize(("has", "half", "wanted"), [
    (True, 0.95, "bf16"), (True, 1.1, "bf16"), (True, 1.2, "off"),
    (False, 0.95, "off"), (False, 1.1, "off"), (False, 0.8, "bf16")])
def test_a_tie_goes_to_bf16_where_the_processor_has_it_and_to_float32_elsewhere(hardware, has, half,
                                                                               wanted):
    hardware(has)
    assert Machine(costs(1.0, 1.0, half, half)).choice() == (wanted, "contiguous")


def test_candidates_are_timed_as_the_training_will_compute(hardware, monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "training", lambda *given: asked.append(given)
                        or precision.measuring())
    Machine(costs(1, 1, 1, 1)).choice(deterministic=False)
    assert asked == [(CPU, False)]


NO_KERNEL = RuntimeError("\"conv\" not implemented for 'BFloat16'")


def test_a_device_without_bf16_kernels_takes_float32_or_refuses_bf16(hardware):
    cost = costs(1.0, 0.5, NO_KERNEL, NO_KERNEL)
    assert Machine(cost).choice() == ("off", "channels_last")
    with pytest.raises(UserError, match="--amp bf16: this device cannot; type --amp off"):
        Machine(cost).choice(amp="bf16")
    with pytest.raises(RuntimeError, match="not implemented"):  # float32 must work
        Machine(costs(NO_KERNEL, 1.0, 1.0, 1.0)).choice()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_is_not_taken_for_a_lack_of_bf16(hardware, error):
    for given in ({}, {"amp": "bf16"}):
        with pytest.raises(type(error)) as caught:
            Machine(costs(1.0, 1.0, error, 1.0)).choice(**given)
        assert caught.value is error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_running_out_of_memory_while_timing_gives_one_line(run_here, monkeypatch, error):
    def gradient(models, x, delta, y, loss, generator=None):
        if models[0].amp == "bf16":
            raise error
        return real(models, x, delta, y, loss)

    real = train_sga.input_gradient
    monkeypatch.setattr(train_sga, "input_gradient", gradient)
    flags = (*CALLS["train_sga.py"], "--save", "run", "--device", "cpu", "--amp", "auto")
    result = run_here("train_sga.py", *flags)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: out of memory on the device; type a smaller --batch_size, --minibatch"]


def test_running_out_of_memory_is_not_taken_for_a_damaged_checkpoint(tmp_path):
    class Large(Watched):
        def restore(self, state):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        Large(CPU).resume({"rows": []}, tmp_path)


@pytest.mark.parametrize(("words", "wanted"), [
    ("The operator 'aten::x' is not currently implemented for the MPS device. Please open", True),
    ("a method of a subclass", False)])
def test_a_device_that_lacks_an_operation_gives_one_line(words, wanted, capsys):
    def main(_):
        raise NotImplementedError(words)

    with pytest.raises(SystemExit if wanted else NotImplementedError):
        run_script(lambda: None, main)
    assert ("error: this device lacks an operation (The operator 'aten::x'...); type --device cpu"
            in capsys.readouterr().err) == wanted


def test_without_half_precision_a_device_needs_no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: pytest.fail("no autocast for it"))
    with precision.Mixed("off", torch.device("mps")).autocast():
        pass


def test_another_runtime_error_keeps_its_traceback(run_here, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train_sga, "input_gradient", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_here("train_sga.py", *CALLS["train_sga.py"], "--save", "run", "--device", "cpu")


@pytest.mark.parametrize(("asks", "wanted"), [((False, False), False), ((True, False), True),
                                              ((False, True), True)])
def test_a_cpu_has_bf16_by_avx512_bf16_or_amx(monkeypatch, asks, wanted):
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name, answer in zip(names, asks, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert precision.has_bf16(CPU) is wanted
    for name in names:
        monkeypatch.delattr(torch.cpu, name)
    assert precision.has_bf16(CPU) is False  # a version of torch that cannot say


def test_emulated_bf16_does_not_count_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        including_emulation)  # as a T4 answers
    assert precision.has_bf16(CUDA) is False
    assert precision.training_amp("auto", CUDA) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision.training_amp("auto", CUDA) == "bf16"
    assert precision.training_amp("auto", CPU) == "off"
    for amp in ("off", "bf16", "fp16"):
        assert precision.training_amp(amp, CUDA) == precision.training_amp(amp, CPU) == amp


# ------------------------------------------------------------- half precision of frozen models

@pytest.mark.parametrize("layout", precision.LAYOUTS)
@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_logits_are_near_those_of_float32_and_the_model_is_untouched(name, layout):
    model = load_model(name, weights="random", kind="cifar10")
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = precision.to_layout(x, layout)
    with precision.measuring():
        wanted = model(x)
        half, whole = (precision.Fast(model, amp, layout)(x) for amp in ("bf16", "off"))
    assert half.dtype == whole.dtype == torch.float32
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    assert 0 < (half - wanted).abs().max() < 0.05 * wanted.abs().max()
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])
        assert value.is_contiguous()


# ------------------------------------------------------------- fp16 with a scaled loss

class Product(nn.Module):
    """w * sum(x), in the precision of autocast."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.full((1, 4), w))

    def forward(self, x):
        return F.linear(x, self.w)


def test_a_gradient_too_small_for_fp16_reaches_the_weights_and_float32_is_the_plain_step():
    moved = {}
    for amp in ("off", "bf16", "fp16"):
        layer, mixed = Product(1.0), precision.Mixed(amp, CPU)
        optimizer = torch.optim.SGD(layer.parameters(), 1e8)
        with mixed.autocast():
            out = layer(torch.ones(1, 4))
        assert out.dtype == {"off": torch.float32, "bf16": torch.bfloat16,
                             "fp16": torch.float16}[amp]
        mixed.backward(out.float().sum() * 1e-8)  # fp16's smallest number is 6e-8
        mixed.step(optimizer)
        moved[amp] = (1 - layer.w.detach()).flatten()
    assert torch.equal(moved["off"], torch.ones(4))
    for amp in ("bf16", "fp16"):
        torch.testing.assert_close(moved[amp], moved["off"], rtol=0.01, atol=0)


def test_a_step_that_overflows_is_skipped_and_the_scale_is_halved():
    layer, mixed = Product(1.0), precision.Mixed("fp16", CPU)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for scale, factor, left_out in ((65536, 1e6, True), (32768, 1e-3, False)):
        before = layer.w.detach().clone()
        assert mixed.scaler.get_scale() == scale
        optimizer.zero_grad()
        with mixed.autocast():
            out = layer(torch.ones(1, 4))
        mixed.backward(out.float().sum() * factor)
        mixed.step(optimizer)
        assert torch.equal(layer.w.detach(), before) == left_out
    assert mixed.scaler.get_scale() == 32768


def test_the_scale_is_kept_in_the_state():
    mixed, other = precision.Mixed("fp16", CPU), precision.Mixed("fp16", CPU)
    mixed.scaler.scale(torch.ones(()))  # the scale is made at its first use
    mixed.scaler.update(128.0)
    other.load_state_dict(mixed.state_dict())
    assert other.scaler.get_scale() == 128.0 and other.state_dict() == mixed.state_dict()
    for amp in ("off", "bf16"):
        precision.Mixed(amp, CPU).load_state_dict(precision.Mixed(amp, CPU).state_dict())


def test_free_trainings_delta_stays_finite_where_gradients_overflow():
    x, delta = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[0.0, 0.1], [0.0, 0.0]]]])
    slopes = torch.tensor([[[[float("nan"), float("nan")], [float("inf"), -1.0]]]])
    free_at.free_minibatch(lambda z, _: z.backward(slopes), x, None, delta, eps=0.1, alpha=0.1, m=1)
    assert torch.equal(delta, torch.tensor([[[[0.0, 0.1], [0.1, -0.1]]]]))


class Bar:
    def update(self):
        pass


def trained(method, amp, scale=2.0 ** 16):
    """How far free_at.py's weights moved in four passes, and the training itself."""
    s = options(amp=amp, method=method, epochs=12, lr=0.02)
    training = free_at.FreeTraining(s, digits(), Team(), CPU)
    training.mixed.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=amp == "fp16")
    before = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(4):
        training.one_pass(Bar())
    moved = [p.detach() - b for p, b in zip(training.model.parameters(), before, strict=True)]
    return torch.cat([m.flatten() for m in moved]), training


@pytest.mark.parametrize("method", ["natural", "free", "pgd", "fast"])
def test_training_in_fp16_equals_float32_training_up_to_rounding(method):
    exact, rounded = trained(method, "off")[0], trained(method, "fp16")[0]
    assert 0 < (exact - rounded).abs().max() < 0.5 * exact.abs().max()


@pytest.mark.parametrize("method", ["natural", "free", "pgd", "fast"])
def test_a_training_in_fp16_recovers_from_its_overflows(method):
    moved, training = trained(method, "fp16", scale=2.0 ** 24)
    assert 2.0 ** 10 < training.mixed.scaler.get_scale() < 2.0 ** 20
    assert moved.isfinite().all() and training.delta.isfinite().all()
    assert moved.abs().max() > 0.001


@pytest.mark.parametrize(("script", "training"), [
    ("free_at.py", free_at.FreeTraining), ("train_gcm.py", train_gcm.ChallengeTraining)])
def test_a_run_in_fp16_that_is_stopped_resumes_to_the_same_bytes(script, training, run_here,
                                                                tmp_path, monkeypatch):
    def stop(self):
        if len(self.rows) == 2:
            raise KeyboardInterrupt
        return real(self)

    real, scaler = training.after, torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *given, **options: scaler(
        *given, **options, init_scale=2.0 ** 24))  # a resumed run must not begin there again
    flags = (*CALLS[script], "--amp", "fp16", "--device", "cpu", "--epochs", 8)
    assert run_here(script, *flags, "--save", "whole").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(training, "after", stop)
        assert run_here(script, *flags, "--save", "part").returncode == 130
    resumed = run_here(script, *flags, "--save", "part", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole, part = ([load_pth(path) for path in sorted((tmp_path / name).glob("*.pth"))]
                   for name in ("whole", "part"))
    assert whole[0]["mixed"] == part[0]["mixed"] and whole[0]["mixed"]["scale"] < 2.0 ** 24
    assert len(whole) == len(part) >= 2
    for one, other in zip(whole[1:], part[1:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("margin", [0.0, 12.0, 40.0, 80.0])
def test_the_loss_that_attacks_maximize_in_fp16_has_a_level_gradient_of_the_same_sign(margin):
    logits = torch.tensor([[0.3, -0.2, 0.1], [0.0, 1.0, 0.5]], dtype=torch.float64)
    logits[:, 1] += margin
    y = torch.tensor([1, 1])
    found, wanted = logits.float().requires_grad_(), logits.clone().requires_grad_()
    g, = torch.autograd.grad(precision.level_cross_entropy(found, y).sum(), found)
    h, = torch.autograd.grad(F.cross_entropy(wanted, y, reduction="sum"), wanted)
    others = [0, 2]
    torch.testing.assert_close(g[:, 1], -g[:, others].sum(1))
    assert torch.equal(g[:, others].sign().double(), h[:, others].sign())
    assert (g[:, others].sum(1) - precision.LEVEL).abs().max() < 0.01 * precision.LEVEL
    torch.testing.assert_close(g[:, 0] / g[:, 2], (h[:, 0] / h[:, 2]).float())


class Sure(nn.Module):
    """A linear network whose logits lie `margin` apart."""

    def __init__(self, margin):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[.1, -.2, .3, -.4], [.4, .3, -.2, .1],
                                                  [-.3, .1, .2, .2]]))
            self.layer.bias.copy_(torch.tensor([0.0, margin, 0.0]))

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_attacks_under_fp16_move_images_that_the_network_is_sure_of():
    x, y, model = torch.full((2, 1, 2, 2), 0.5), torch.tensor([1, 1]), Sure(20.0)
    wanted = attacks.fgsm(model, x, y, eps=0.1)
    assert (wanted != x).all()
    mixed = precision.Mixed("fp16", CPU)
    with mixed.autocast():
        lost = attacks.fgsm(model, x, y, eps=0.1)
        found = attacks.fgsm(model, x, y, eps=0.1, loss=mixed.attack_loss)
        u = torch.full_like(x, 0.5)
        one, plain = (free_at.fast_start(model, x, y, u, eps=0.1, alpha=0.1, **loss)
                      for loss in ({"loss": mixed.attack_loss}, {}))
    assert torch.equal(lost, x) and torch.equal(plain, x)  # their gradients are zero in fp16
    assert torch.equal(found, wanted) and torch.equal(one, wanted)


@pytest.mark.parametrize(("script", "more"), [
    ("free_at.py", ("--method", "pgd", "--steps", 2)), ("free_at.py", ("--method", "fast")),
    ("train_gcm.py", ())])
def test_the_attacks_of_trainings_maximize_the_level_loss_in_fp16_only(script, more, run_here,
                                                                       monkeypatch):
    asked, real = [], precision.level_cross_entropy
    monkeypatch.setattr(precision, "level_cross_entropy",
                        lambda *given: asked.append(1) or real(*given))
    for amp in ("off", "fp16"):
        asked.clear()
        result = run_here(script, *CALLS[script], *more, "--amp", amp, "--save", amp, "--device",
                          "cpu")
        assert result.returncode == 0, result.stderr
        assert bool(asked) == (amp == "fp16")


def test_attacks_outside_fp16_maximize_the_plain_cross_entropy():
    logits, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4
    for amp in ("off", "bf16"):
        found = precision.Mixed(amp, CPU).attack_loss(logits, y)
        assert torch.equal(found, F.cross_entropy(logits, y, reduction="none"))


@pytest.mark.parametrize(("kind", "layout"), [("mps", "contiguous"), ("cuda", "channels_last"),
                                              ("cpu", "channels_last")])
def test_networks_are_contiguous_on_apples_gpus(kind, layout):
    assert precision.layout_for(torch.device(kind)) == layout
    net = nn.Conv2d(3, 4, 3)
    placed = precision.placed(net, torch.device("cpu"))
    assert placed.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kind", "waits"), [("mps", False), ("cuda", True), ("cpu", False)])
def test_only_copies_to_a_cuda_device_do_not_wait(kind, waits):
    class Sent:
        def to(self, device, non_blocking):
            return device.type, non_blocking
    assert precision.moved(Sent(), torch.device(kind)) == (kind, waits)
