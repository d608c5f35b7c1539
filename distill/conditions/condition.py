"""What a network needs beside (x, t, s): a class, what encoders say of a prompt, or nothing.

Of a class it is the label itself, -1 for "none"; of a prompt the embeddings. Both are taken apart
and put together by the same words, so that nothing outside of this room asks which it is:
`condition[rows]`, `condition.repeat(n)`, `condition.to(device)`, `len(condition)`, and `joined`. A
sample carries neither, but its number (`Conditions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Embeddings:
    """What a pipeline's text encoders say of B prompts.

    Attributes:
        tokens: [B, L, D], zero behind a prompt's end; L is the longest of these prompts.
        mask: [B, L], which tokens are of the prompt.
        pooled: [B, P], one vector of the whole prompt, for networks that take it.
    """

    tokens: Float[Tensor, "B L D"]
    mask: Bool[Tensor, "B L"]
    pooled: Float[Tensor, "B P"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Int[Tensor, "R"] | slice) -> "Embeddings":
        pooled = None if self.pooled is None else self.pooled[rows]
        return Embeddings(self.tokens[rows], self.mask[rows], pooled)

    def repeat(self, times: int) -> "Embeddings":
        """All of them `times` times, one after another."""
        pooled = None if self.pooled is None else self.pooled.repeat(times, 1)
        return Embeddings(self.tokens.repeat(times, 1, 1), self.mask.repeat(times, 1), pooled)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Embeddings":
        """On `device`."""
        pooled = None if self.pooled is None else self.pooled.to(device, non_blocking=non_blocking)
        tokens = self.tokens.to(device, non_blocking=non_blocking)
        return Embeddings(tokens, self.mask.to(device, non_blocking=non_blocking), pooled)

    def padded(self, length: int) -> "Embeddings":
        """With room for `length` tokens a prompt, which is at least L."""
        more = length - self.tokens.shape[1]
        tokens = F.pad(self.tokens, (0, 0, 0, more))
        return Embeddings(tokens, F.pad(self.mask, (0, more)), self.pooled)


Condition: TypeAlias = Tensor | Embeddings  # [B] int64, or embeddings of B prompts

NO_CLASS = torch.tensor([-1])  # "none" of classes


def joined(parts: Sequence[Condition]) -> Condition:
    """Conditions of one kind, one after another."""
    if not isinstance(parts[0], Embeddings):
        return torch.cat(list(cast(Sequence[Tensor], parts)))
    given = cast(Sequence[Embeddings], parts)
    length = max(part.tokens.shape[1] for part in given)
    wide = [part.padded(length) for part in given]
    pooled = [part.pooled for part in wide if part.pooled is not None]
    return Embeddings(
        torch.cat([part.tokens for part in wide]),
        torch.cat([part.mask for part in wide]),
        torch.cat(pooled) if pooled else None,
    )


class Conditions(Protocol):
    """All conditions of a run, by their numbers.

    Attributes:
        count: how many there are, beside "none"; 0: nothing is conditional.
    """

    count: int

    def at(self, numbers: Int[Tensor, "B"]) -> Condition:
        """Those of `numbers`, on the CPU; -1 is "none"."""


@dataclass(frozen=True)
class Classes:
    """A class is its own number."""

    count: int

    def at(self, numbers: Int[Tensor, "B"]) -> Condition:
        """`numbers`."""
        return numbers
