"""Random numbers per image: Philox compared with its published answers and with a loop over Python
integers; even, independent, the same in any batch. Limits are five standard deviations.
"""

import math
from functools import partial

import pytest
import torch

import attacks
from attack_toys import chances, operations, pictures, toy
from utils.attack import balls, square
from utils.attack.chance import WORD, Chance, below, chance_of, philox
from utils.attack.random_layers import drawing_from
from utils.defenses import ResizePad
from utils.errors import UserError

SIGMAS = 5
NORMS = ("linf", "l2", "l1")


def naive_philox(counter, key):
    """One block of four words, as in the paper, with unbounded integers."""
    c, (k0, k1) = list(counter), key
    for number in range(10):
        if number:
            k0, k1 = (k0 + 0x9E3779B9) % 2 ** 32, (k1 + 0xBB67AE85) % 2 ** 32
        high0, low0 = divmod(0xD2511F53 * c[0], 2 ** 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2 ** 32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
    return c


def hexadecimal(text):
    return [int(word, 16) for word in text.split()]


# --------------------------------------------------------------------------- the function

@pytest.mark.parametrize(("counter", "key", "answer"), [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1")], ids=["zeros", "ones", "pi"])
def test_philox_gives_the_answers_of_random123(counter, key, answer):
    """From its file tests/kat_vectors: philox4x32 with 10 rounds."""
    counter, key, answer = hexadecimal(counter), hexadecimal(key), hexadecimal(answer)
    assert list(philox(counter, key)) == naive_philox(counter, key) == answer
    words = philox([torch.tensor([word]) for word in counter], key)
    assert [word.item() for word in words] == answer


def test_numbers_equal_those_of_a_loop_over_seed_image_turn_and_position():
    images, turns = [0, 7, 2 ** 32 + 5, 2 ** 62], [0, 1, 2 ** 31, WORD]
    for seed in (0, 1, 2 ** 63 + 12345, 2 ** 64 - 1):
        found = Chance(seed, torch.tensor(images), torch.tensor(turns)).words(3, 3)
        assert found.shape == (4, 3, 3) and found.dtype == torch.int64
        wanted = [sum((naive_philox((block, turn, image % 2 ** 32, image // 2 ** 32),
                                    (seed % 2 ** 32, seed // 2 ** 32)) for block in range(3)), [])
                  for image, turn in zip(images, turns, strict=True)]
        assert found.flatten(1).tolist() == [row[:9] for row in wanted]
        assert torch.equal(Chance(seed, torch.tensor(images), 3).words(2),
                           Chance(seed, torch.tensor(images), torch.full((4,), 3)).words(2))


def test_the_seed_of_another_stream_is_computed_by_philox():
    for seed, k in ((0, 0), (5, 1), (2 ** 64 - 1, 2 ** 40 + 3)):
        low, high, *_ = naive_philox((k % 2 ** 32, k // 2 ** 32, WORD, WORD),
                                     (seed % 2 ** 32, seed // 2 ** 32))
        assert chances(2, seed).fold(k).seed == low + 2 ** 32 * high


def test_all_kinds_of_numbers_are_made_from_the_same_words():
    own = chances(5, 3)
    words = own.words(7)
    assert torch.equal(own.uniform(7).double(), (words // 256).double() / 2 ** 24)
    assert torch.equal(own.signs(7), torch.where(words < 2 ** 31, 1.0, -1.0))
    for high in (1, 2, 10, 2 ** 31):
        assert below(own.words(7), high).tolist() == [[word * high // 2 ** 32 for word in row]
                                                  for row in words.tolist()]
    highs = torch.tensor([1, 5, 9, 2, 7])[:, None]
    assert torch.equal(below(words, highs), torch.cat([
        below(words[i:i + 1], int(highs[i])) for i in range(5)]))
    assert own.uniform().shape == (5,) and own.normal(3, 3).shape == (5, 3, 3)
    assert own.uniform(0, 4).shape == (5, 0, 4) and own[:0].normal(3).shape == (0, 3)
    for made in (own.uniform, own.normal, own.signs):
        assert made(4).dtype == torch.float32 and torch.equal(made(4), made(4))


def test_normal_numbers_follow_box_and_muller():
    own = chances(3, 8)
    u, v = own.uniform(2, 5).double().unbind(1)
    length = (-2 * (1 - u).log()).sqrt()
    wanted = torch.cat([length * (2 * math.pi * v).cos(), length * (2 * math.pi * v).sin()], 1)
    torch.testing.assert_close(own.normal(9).double(), wanted[:, :9], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available() and not torch.backends.mps.is_available(),
                    reason="there is only one device")
def test_every_device_gives_the_same_numbers():
    device = "cuda" if torch.cuda.is_available() else "mps"
    here, there = chances(9, 2 ** 63 + 5), chances(9, 2 ** 63 + 5).to(device)
    for kind in ("words", "uniform", "signs"):
        assert torch.equal(getattr(here, kind)(100), getattr(there, kind)(100).cpu())
    torch.testing.assert_close(here.normal(100), there.normal(100).cpu(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------- even and independent

def evenness(counts):
    """Distance of the chi square of these counts from its mean, in standard deviations."""
    expected = counts.sum() / len(counts)
    free = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


def related(a, b):
    """Distance of the correlation of two samples from zero, in standard deviations."""
    a, b = (t.flatten().double() for t in (a, b))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()
                 * math.sqrt(len(a)))


def distance(sample, cdf):
    """Kolmogorov-Smirnov distance of a sample (n,) times sqrt(n): above 1.95 once in a thousand."""
    n, seen = len(sample), cdf(sample.double().sort().values)
    steps = torch.arange(n + 1) / n
    return float(torch.maximum(steps[1:] - seen, seen - steps[:-1]).max() * math.sqrt(n))


@pytest.mark.parametrize("seed", [0, 1, 2 ** 40])
def test_bytes_bits_and_uniform_numbers_are_evenly_distributed(seed):
    words = chances(8, seed).words(1 << 15).flatten()
    for shift in (0, 8, 16, 24):
        assert abs(evenness(torch.bincount(words >> shift & 255, minlength=256))) < SIGMAS
    ones = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
    assert (ones - 0.5).abs().max() < SIGMAS * 0.5 / math.sqrt(len(words))
    u = chances(8, seed).uniform(1 << 15).flatten()
    assert 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert abs(evenness(torch.bincount((u * 1000).long(), minlength=1000))) < SIGMAS
    for high in (3, 7, 100):
        drawn = below(chances(8, seed).words(1 << 12), high)
        counts = torch.bincount(drawn.flatten(), minlength=high)
        assert len(counts) == high and abs(evenness(counts)) < SIGMAS


PAIRS = {
    "images side by side": lambda own: (own[:-1].uniform(1 << 13), own[1:].uniform(1 << 13)),
    "positions side by side": lambda own: (own.uniform(1 << 13)[:, :-1],
                                           own.uniform(1 << 13)[:, 1:]),
    "positions a block apart": lambda own: (own.uniform(1 << 13)[:, :-4],
                                            own.uniform(1 << 13)[:, 4:]),
    "streams": lambda own: (own.fold(0).uniform(1 << 13), own.fold(1).uniform(1 << 13)),
    "a stream and its parent": lambda own: (own.uniform(1 << 13), own.fold(0).uniform(1 << 13)),
    "turns": lambda own: tuple(Chance(own.seed, own.images, turn).uniform(1 << 13)
                               for turn in (0, 1)),
    "seeds": lambda own: tuple(Chance(own.seed + k, own.images).uniform(1 << 13) for k in (0, 1)),
    "seeds far apart": lambda own: tuple(Chance(own.seed + k, own.images).uniform(1 << 13)
                                         for k in (0, 1 << 32)),
    "both halves of normal numbers": lambda own: own.normal(2, 1 << 12).unbind(1)}


@pytest.mark.parametrize("pair", PAIRS)
def test_numbers_are_independent(pair):
    """Values and squares are uncorrelated, and pairs fall evenly into 32 x 32 cells."""
    a, b = PAIRS[pair](chances(9, 12))
    assert not torch.equal(a, b)
    assert abs(related(a, b)) < SIGMAS
    a, b = ((t.flatten() + 6) / 12 for t in (a, b)) if "normal" in pair else (a, b)
    assert abs(related((a - 0.5) ** 2, (b - 0.5) ** 2)) < SIGMAS
    if "normal" not in pair:
        cell = (a * 32).long() * 32 + (b * 32).long()
        assert abs(evenness(torch.bincount(cell.flatten(), minlength=1024))) < SIGMAS


def test_normal_numbers_have_the_right_moments_and_distribution():
    z = chances(6, 1).normal(1 << 14).flatten().double()
    n, normal = len(z), torch.distributions.Normal(0.0, 1.0)
    for power, wanted, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z ** power).mean() - wanted) < SIGMAS * math.sqrt(variance / n), power
    assert distance(z, normal.cdf) < 1.95 and z.isfinite().all() and 3.5 < z.abs().max() < 5.8
    assert distance(chances(n, 1).normal(), normal.cdf) < 1.95  # one per image


# ------------------------------------------------------------------------------ the ball

@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball_evenly(norm):
    """(r / eps)^D of the norms r is uniform; in two dimensions every coordinate follows its CDF."""
    x, eps = torch.zeros(3000, 3, 2, 2), 0.3
    delta = balls.random_point(x, eps, norm, chances(3000, 4))
    r = balls.norm_of(delta.double(), norm) / eps
    assert r.max() <= 1 + 1e-6 and distance(r ** 12, lambda t: t) < 1.95
    sign = torch.bincount((delta > 0).flatten(1).long() @ (2 ** torch.arange(12)), minlength=4096)
    assert abs(evenness(sign)) < SIGMAS
    flat = balls.random_point(torch.zeros(6000, 2), 1.0, norm, chances(6000, 5)).double()
    cdf = {"linf": lambda t: t, "l1": lambda t: 1 - (1 - t) ** 2, "l2": lambda t: 2 / math.pi * (
        t * (1 - t ** 2).clamp_min(0).sqrt() + t.asin())}[norm]
    for coordinate in flat.unbind(1):
        assert distance(coordinate.abs(), cdf) < 1.95
    assert abs(related(flat[:, 0], flat[:, 1])) < SIGMAS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_random_points_have_the_type_of_the_images_and_lie_in_the_ball(norm, dtype):
    x = torch.zeros((4, 3, 60, 60), dtype=dtype)
    delta = balls.random_point(x, 8.0, norm, chances(4))
    assert delta.shape == x.shape and delta.dtype == dtype
    assert (balls.norm_of(delta.double(), norm) <= 8 * (1 + 1e-5)).all()
    assert (balls.norm_of(delta.double(), norm) > 7.9).all()  # most volume is near the surface
    assert not balls.random_point(x, 0.0, norm, chances(4)).any()


# ------------------------------------------------- any batch, any order, no loop over images

KINDS = {"words": lambda own: own.words(5, 7), "uniform": lambda own: own.uniform(5, 7),
         "normal": lambda own: own.normal(5, 7), "signs": lambda own: own.signs(3),
         "integers": lambda own: below(own.words(3), 9), "fold": lambda own: own.fold(3).words(5)}
KINDS |= {f"point {norm}": lambda own, norm=norm: balls.random_point(
    torch.zeros(len(own), 3, 4, 4), 0.1, norm, own) for norm in NORMS}
KINDS |= {"stripes": lambda own: square._stripes(torch.full((len(own), 3, 9, 9), 0.5), 0.1, own),
          "tiles": lambda own: square._tiles(
              torch.full((len(own), 3, 15, 15), 0.5), 0.1, own, norm="l2")}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_the_same_numbers_in_any_batch_order_and_subset(kind):
    make, own = KINDS[kind], Chance(6, torch.tensor([3, 1, 4, 15, 9, 2, 65]))
    whole = make(own)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 7 or kind in (
        "signs", "integers")
    for rows in ([2], [6, 0, 3], slice(1, 7, 2), torch.tensor([5, 5, 1]),
                 torch.arange(7) % 3 == 0):
        part = own[rows]
        assert torch.equal(make(part), whole[rows]) and len(part) == len(whole[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_for_fifty_images_take_as_many_operations_as_for_one(kind):
    one, many = (operations(lambda n=n: KINDS[kind](chances(n))) for n in (1, 50))
    assert one == many > 10


ALL_STEPS = {
    "pgd": partial(attacks.pgd, eps=1e-6, alpha=1e-7, steps=3, restarts=2),
    "apgd": partial(attacks.apgd, eps=1e-6, steps=8, restarts=2),
    "square": partial(attacks.square, eps=1e-6, queries=4, restarts=2),
    "worst_case": partial(attacks.worst_case, attacks={
        "pgd": partial(attacks.pgd, eps=1e-6, alpha=1e-7, steps=2),
        "square": partial(attacks.square, eps=1e-6, queries=3)})}


@pytest.mark.parametrize("name", ALL_STEPS)
def test_attacks_do_not_loop_over_images(name):
    """Nothing is fooled, so all images take all steps; behind a random layer."""
    model = attacks.eot(torch.nn.Sequential(ResizePad(8, 8), toy()), 2)
    counts = []
    for n in (3, 50):
        x = pictures(n)
        y = toy()(x).argmax(1)
        counts.append(operations(lambda x=x, y=y: ALL_STEPS[name](model, x, y)))
    assert counts[0] == counts[1]


def test_a_random_layer_does_not_loop_over_images():
    layer, counts = ResizePad(20, 24), []
    for n in (1, 50):
        x = torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(n))
        with drawing_from(chances(n)):
            counts.append(operations(lambda x=x: layer(x)))
    assert counts[0] == counts[1]


# ------------------------------------------------------------------- where they come from

def test_a_generator_gives_a_seed_and_images_are_numbered():
    x = torch.zeros(3, 2)
    own = chance_of(torch.Generator().manual_seed(4), x)
    seed = int(torch.randint(2 ** 63 - 1, (), generator=torch.Generator().manual_seed(4)))
    assert own.seed == seed and own.images.tolist() == [0, 1, 2]
    assert chance_of(None, x).seed == 0 and chance_of(None, x).images.tolist() == [0, 1, 2]
    generator = torch.Generator().manual_seed(4)
    assert chance_of(generator, x).seed != chance_of(generator, x).seed
    kept = Chance(9, torch.tensor([5, 6, 7]))
    assert chance_of(kept, x).seed == 9 and chance_of(kept, x).images.tolist() == [5, 6, 7]


@pytest.mark.parametrize("given", [5, "5", [torch.Generator()] * 3, chances(2)])
def test_an_unsuitable_source_of_random_numbers_is_refused(given):
    with pytest.raises(UserError, match=r"type torch\.Generator|type chance\[rows\]"):
        chance_of(given, torch.zeros(3, 2))
