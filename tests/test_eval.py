"""Tests of eval.py: the numbers that say whether training worked."""

import math

import pytest
import torch

import eval
from conftest import tiny_gpt


def test_win_rate_and_its_interval():
    """L29: 340 of 400 is 0.85; 1.96 * sqrt(0.85 * 0.15 / 400) = 1.96 * 0.0178536 = 0.034993."""
    rate, half_width = eval.win_rate([1] * 340 + [0] * 60)
    assert rate == pytest.approx(0.85, abs=1e-12)
    assert half_width == pytest.approx(0.034993, abs=1e-6)


def test_a_tie_is_half_a_win():
    """L29: 50 wins, 20 ties, 30 losses: (50 + 10) / 100."""
    assert eval.win_rate([1] * 50 + [0.5] * 20 + [0] * 30)[0] == pytest.approx(0.60, abs=1e-12)


def test_interval_shrinks_with_the_root_of_the_number_of_prompts():
    narrow, wide = eval.win_rate([1, 1, 1, 0] * 400)[1], eval.win_rate([1, 1, 1, 0] * 100)[1]
    assert wide == pytest.approx(2 * narrow)


def test_entropy_bits_of_pairs():
    """L28: P(first of -20, -21) = 1 / (1 + e^-1) = 0.731059,
    so -0.731059 log2 0.731059 - 0.268941 log2 0.268941 = 0.839942."""
    pairs = torch.tensor([[-20.0, -21.0], [-20.0, -20.0], [-20.0, -25.0]], dtype=torch.float64)
    expected = torch.tensor([0.839942, 1.0, 0.057967], dtype=torch.float64)
    torch.testing.assert_close(eval.entropy_bits(pairs), expected, atol=1e-6, rtol=0)


def test_entropy_bits_of_four_equal_choices_is_two():
    torch.testing.assert_close(eval.entropy_bits(torch.full((3, 4), -7.0)), torch.full((3,), 2.0))


def test_compare_wins_ties_and_losses_in_order():
    assert eval.compare([0.9, 0.5, 0.1, 0.3], [0.2, 0.5, 0.8, 0.3 + 1e-9]) == [1.0, 0.5, 0.0, 0.5]


def test_compare_with_itself_is_all_ties():
    golds = [0.1, 0.7, -3.0]
    assert eval.win_rate(eval.compare(golds, golds))[0] == 0.5


class Letters:
    """A tokenizer by hand: a = 1, b = 2, ..."""

    def encode(self, text):
        return [ord(letter) - 96 for letter in text]


def test_mean_kl_of_a_policy_with_itself_is_exactly_zero():
    gpt = tiny_gpt()
    responses = [("cd", [3, 4]), ("b", [2])]
    assert eval.mean_kl(gpt, gpt, Letters(), ["ab", "c"], responses, torch.device("cpu")) == 0.0


def test_mean_kl_counts_response_tokens_only_and_is_positive_for_what_the_policy_prefers():
    """By hand, from the two models' full forwards:
    sum over the response of log pi - log ref, over 1 prompt."""
    policy, ref = tiny_gpt(0), tiny_gpt(1)
    tokens = torch.tensor([[1, 2, 3, 4]])  # prompt "ab", response 3 4
    log_ratio = policy(tokens).log_softmax(-1) - ref(tokens).log_softmax(-1)
    by_hand = log_ratio[0, 1, 3] + log_ratio[0, 2, 4]  # logits[t] predicts tokens[t + 1]
    found = eval.mean_kl(policy, ref, Letters(), ["ab"], [("", [3, 4])], torch.device("cpu"))
    assert found == pytest.approx(by_hand.item(), abs=1e-5)


def test_scores_read_prompt_and_response_up_to_the_last_token():
    # a reward model by hand: position t scores the id it stands on
    last_id = lambda tokens, where: tokens[where].float()
    responses = [("", [3, 4]), ("", [9]), ("", [5, 6, 7])]
    found = eval.scores(last_id, Letters(), ["ab", "c", "a"], responses, torch.device("cpu"))
    assert found == [4.0, 9.0, 7.0]


def test_document_loss_is_a_mean_over_tokens_not_over_documents():
    """A model that finds every token equally likely loses ln 11 nats on each, whatever the lengths."""
    gpt = tiny_gpt()
    with torch.no_grad():
        gpt.lm_head.weight.zero_()
    loss = eval.document_loss(gpt, [[1, 2, 3, 4, 5], [6, 7]], torch.device("cpu"))
    assert loss == pytest.approx(math.log(11), abs=1e-6)


def test_document_loss_weighs_every_token_alike():
    gpt = tiny_gpt()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    long = -gpt(tokens).log_softmax(-1)[0, range(4), [2, 3, 4, 5]]
    short = -gpt(torch.tensor([[6, 7]])).log_softmax(-1)[0, 0, 7]
    by_hand = ((long.sum() + short) / 5).item()  # 4 + 1 predicted tokens
    found = eval.document_loss(gpt, [[1, 2, 3, 4, 5], [6, 7]], torch.device("cpu"))
    assert found == pytest.approx(by_hand, abs=1e-5)
