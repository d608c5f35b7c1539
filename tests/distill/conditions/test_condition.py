"""Conditions are taken apart and put together alike, whatever they are."""

import pytest
import torch

from distill.conditions.condition import Classes, Embeddings, joined


def prompts(*lengths, width=3, pooled=True):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(*mask.shape, width) * mask[..., None]
    return Embeddings(tokens, mask, torch.randn(len(lengths), 2) if pooled else None)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    fields = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(a is b or torch.equal(a, b) for a, b in fields)


@pytest.mark.parametrize(
    "condition", [torch.tensor([4, -1, 2]), prompts(2, 5, 1), prompts(2, 5, 1, pooled=False)]
)
def test_apart_and_together_again(condition):
    rows = torch.tensor([2, 0])
    assert len(condition) == 3 and len(condition[rows]) == 2
    assert same(condition[rows], joined([condition[2:], condition[:1]]))
    assert same(condition.repeat(3), joined([condition] * 3))
    assert same(condition.to("cpu"), condition)


def test_prompts_of_other_lengths_get_room_and_their_masks_stay():
    short, long = prompts(2, 1), prompts(4)
    both = joined([short, long])
    assert both.mask.sum(dim=1).tolist() == [2, 1, 4] and both.tokens.shape == (3, 4, 3)
    assert torch.equal(both.tokens[:2, :2], short.tokens) and not both.tokens[:2, 2:].any()


def test_a_class_is_its_number():
    numbers = torch.tensor([1, -1])
    assert Classes(3).at(numbers) is numbers
