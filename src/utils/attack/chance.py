"""Random numbers tied to an image: Philox4x32-10 (Salmon et al., SC 2011), in tensors.

    paper                              here
    key, two words of 32 bits          seed
    counter, four words of 32 bits     block of four numbers, turn, image (two words)

    chance = Chance(5, torch.arange(8, device=device))    # a seed, and which images
    chance.uniform(3, 224, 224)                           # (8, 3, 224, 224), on that device
    chance[rows].uniform(3, 224, 224)                     # the same numbers, for some of the images
    chance.fold(1).uniform(3, 224, 224)                   # others, independent of these

A number is a function of seed, image, turn and position. The same call gives the same numbers, so
every use folds in its own constant. An image has the same numbers in any batch, in any order and
with any number of processes. Numbers are integers until the last step: uniform numbers and signs
are the same to the last bit on every device, normal ones up to rounding in log, sin and cos.
"""

import math
from dataclasses import dataclass, replace

import torch

from utils.errors import UserError

WORD = 0xFFFFFFFF                       # 32 bits
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85           # added to the key in every round


def philox(counter, key):
    """Four random words from a counter of four (Python ints or int64 tensors) and a key of two.

    If the counter's words are tensors, the first and the third must have the full shape. Products
    of two words wrap around in int64, but all 64 bits are right.
    """
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, c = q >> 32, p >> 32
        a ^= b  # in place: allocations would take half of the time
        a ^= k
        a &= WORD
        c ^= d
        c ^= m
        c &= WORD
        b, d = q, p  # their upper words are cut off above, in the next round
        k, m = (k + WEYL[0]) & WORD, (m + WEYL[1]) & WORD
    return a, b & WORD, c, d & WORD


def below(words, high):
    """Integers in 0 .. high - 1 from 32-bit words; high: at most 2^31, a number or a tensor."""
    return words * high >> 32


@dataclass(frozen=True, eq=False)
class Chance:
    """The random numbers of n images. uniform(), normal() and so on give (n, *shape)."""
    seed: int                      # 64 bits
    images: torch.Tensor           # (n,) int64: which images
    turn: torch.Tensor | int = 0   # (n,), or one for all: earlier draws of each image

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        turn = self.turn[rows] if torch.is_tensor(self.turn) else self.turn
        return replace(self, images=self.images[rows], turn=turn)

    def to(self, device):
        turn = self.turn.to(device) if torch.is_tensor(self.turn) else self.turn
        return replace(self, images=self.images.to(device), turn=turn)

    @property
    def key(self):
        return self.seed & WORD, self.seed >> 32 & WORD

    def fold(self, k):
        """Another stream for the same images; each whole number k gives an independent one."""
        low, high, *_ = philox((k & WORD, k >> 32 & WORD, WORD, WORD), self.key)  # no image is -1
        return replace(self, seed=high << 32 | low)

    def words(self, *shape):
        """32 random bits each, int64."""
        if self.images.device.type == "mps":  # where int64 products may not wrap around
            return self.to("cpu").words(*shape).to("mps")
        n, count = len(self), math.prod(shape)
        blocks = -(-count // 4)
        block = torch.arange(blocks, device=self.images.device).expand(n, blocks)
        turn = self.turn[:, None] if torch.is_tensor(self.turn) else self.turn
        image = self.images[:, None]
        four = philox((block, turn, (image & WORD).expand(n, blocks), image >> 32), self.key)
        return torch.stack(four, 2).view(n, 4 * blocks)[:, :count].reshape(n, *shape)

    def uniform(self, *shape):
        """In [0, 1), float32: multiples of 2^-24."""
        return (self.words(*shape) >> 8).to(torch.float32) / 2 ** 24

    def normal(self, *shape):
        """Standard normal, float32 (Box and Muller)."""
        count = math.prod(shape)
        u, v = self.uniform(2, -(-count // 2)).unbind(1)
        length, angle = (-2 * torch.log(1 - u)).sqrt(), 2 * math.pi * v  # 1 - u is exact, never 0
        both = torch.cat([length * angle.cos(), length * angle.sin()], 1)
        return both[:, :count].reshape(len(self), *shape)

    def signs(self, *shape):
        """-1 or 1, float32."""
        return (1 - 2 * (self.words(*shape) >> 31)).to(torch.float32)


def numbered(seed, n, device="cpu"):
    """The Chance of images 0 .. n - 1."""
    return Chance(seed, torch.arange(n, device=device))


def chance_of(generator, x):
    """The Chance of images x (n, ...), on their device.

    generator: a Chance of these images; or a torch.Generator, from which one seed is drawn, or
    None for seed 0: then images are numbered 0 .. n - 1.
    """
    if isinstance(generator, Chance):
        if len(generator) != len(x):
            raise UserError(f"a Chance of {len(generator)} images for {len(x)} images; type "
                            "chance[rows] where only some of them are attacked")
        return generator.to(x.device)
    if generator is None:
        seed = 0
    elif isinstance(generator, torch.Generator):
        seed = int(torch.randint(2 ** 63 - 1, (), generator=generator, device=generator.device))
    else:
        raise UserError(f"generator={generator!r}; type torch.Generator().manual_seed(5)")
    return numbered(seed, len(x), x.device)
