"""The mask of banned ids: which bit is whose, and what is refused when it is made."""

from __future__ import annotations

import pytest
import torch

from simsd_kernels import banned_mask
from simsd_kernels.banned import is_banned


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33, 64, 1000, 151_936])
def test_mask_bans_what_was_given_and_no_other(vocabulary):
    ids = sorted({0, vocabulary // 2, vocabulary - 1})[: vocabulary - 1]
    mask = banned_mask(ids, vocabulary)
    assert mask.dtype == torch.int32 and mask.shape == (-(-vocabulary // 32),)
    found = is_banned(mask, vocabulary, mask.device)
    assert found.shape == (vocabulary,) and found.nonzero().flatten().tolist() == ids


def test_bit_of_an_id_is_its_remainder_in_its_word():
    assert banned_mask([0, 33, 65, 95], 100).tolist() == [1, 2, 2 - 2**31, 0]


@pytest.mark.parametrize("given", [[7, 3, 7], (3, 7), {3, 7}, range(3, 8, 4), torch.tensor([[3, 7]]).int()], ids=repr)
def test_ids_may_come_as_any_sequence_of_integers(given):
    assert banned_mask(given, 40).tolist() == [2**3 + 2**7, 0]


def test_no_ids_ban_nothing():
    for nothing in ([], torch.tensor([], dtype=torch.int64)):
        assert not is_banned(banned_mask(nothing, 40), 40, torch.device("cpu")).any()
    assert not is_banned(None, 40, torch.device("cpu")).any()


@pytest.mark.parametrize(
    "ids, vocabulary, error, message",
    [
        ([1, 5], 5, ValueError, r"banned_mask: ids must be in \[0, 5\), got 5"),
        ([-1], 5, ValueError, r"banned_mask: ids must be in \[0, 5\), got -1"),
        (torch.tensor([2**40]), 5, ValueError, r"ids must be in \[0, 5\), got 1099511627776"),
        (range(5), 5, ValueError, "ids must leave one to draw, got all 5 of them"),
        ([1.0], 5, TypeError, "ids must be integers, got 1.0"),
        (["</s>"], 5, TypeError, "ids must be integers, got '</s>'"),
        ([True], 5, TypeError, "ids must be integers, got True"),
        (torch.zeros(5, dtype=torch.bool), 5, TypeError, "ids must be integers, got torch.bool"),
        (torch.zeros(5), 5, TypeError, "ids must be integers, got torch.float32"),
        ([], 0, ValueError, "vocabulary must be at least 1, got 0"),
        ([], 5.0, TypeError, "vocabulary must be an integer, got 5.0"),
    ],
)
def test_what_makes_no_mask_is_refused(ids, vocabulary, error, message):
    with pytest.raises(error, match=message):
        banned_mask(ids, vocabulary)
