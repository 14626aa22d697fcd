"""Tests of ppo.py: the mathematics by hand and by brute force, then one rollout and one update,
then main's loop."""

import json
import math
import os
import signal
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import data
import eval
import model
import ppo
import sft
from conftest import save_tiny, tiny_gpt, tiny_scalar


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=atol, rtol=0)


def ones(rows):
    return torch.ones_like(rows, dtype=torch.bool)


# L9: a response of four tokens, the running example of the first sections
LOGPROBS = f64([-1.2, -0.7, -2.0, -0.3])
REF_LOGPROBS = f64([-1.0, -0.9, -1.5, -0.4])
REWARDS = f64([0.004, -0.004, 0.010, 1.498])
VALUES = f64([0.5, 0.6, 0.8, 1.0])


def ragged(seed=0, B=6, T=12):
    """Random rewards and values, and masks that begin and end at different columns,
    as behind prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    starts, ends = [0, 2, 5, 3, 0, 11], [12, 9, 6, 12, 1, 12]
    mask = torch.zeros(B, T, dtype=torch.bool)
    for b in range(B):
        mask[b, starts[b] : ends[b]] = True
    noise = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    return noise[0] * mask, noise[1] * mask, mask


# ------------------------------------------------------------------------------------------------------------
# rewards


def test_kl_shaped_rewards_by_hand():
    """L9: -0.02 * (-1.2 + 1.0) = 0.004, -0.02 * 0.2 = -0.004, -0.02 * -0.5 = 0.010,
    -0.02 * 0.1 + 1.5 = 1.498."""
    close(ppo.kl_shaped_rewards(f64(1.5), LOGPROBS, REF_LOGPROBS, ones(LOGPROBS), 0.02), REWARDS)


def test_rewards_sum_to_score_minus_beta_kl():
    """J15. The response ends at different columns; what the padded columns hold must not count."""
    logprobs, ref_logprobs, mask = ragged()
    scores, beta = f64(1.5, -2.0, 0.3, 0.0, 4.0, 1.0), 0.1
    junk = 7.0 * ~mask
    rewards = ppo.kl_shaped_rewards(scores, logprobs + junk, ref_logprobs, mask, beta)
    close(rewards.sum(1), scores - beta * ((logprobs - ref_logprobs) * mask).sum(1), 1e-12)
    assert (rewards[~mask] == 0).all()


def test_score_stands_on_the_last_action_alone():
    """J15: with policy == ref there is nothing but the score, at one column: the last unmasked one."""
    logprobs, _, mask = ragged()
    rewards = ppo.kl_shaped_rewards(torch.full((6,), 5.0).double(), logprobs, logprobs, mask, 0.1)
    last_columns = [11, 8, 5, 11, 0, 11]
    expected = torch.zeros_like(rewards)
    expected[range(6), last_columns] = 5.0
    close(rewards, expected, 0)


def test_moving_away_from_the_reference_costs_reward():
    """The sign of the KL: a token that the policy likes more than the reference does is punished."""
    rewards = ppo.kl_shaped_rewards(f64(0.0), f64([-0.1, -1.0]), f64([-1.1, -1.0]), ones(f64([0, 0])), 0.5)
    close(rewards, [[-0.5, 0.0]])


def test_kl_shaped_rewards_leave_their_arguments_alone():
    scores, logprobs = f64(1.5), LOGPROBS.clone()
    ppo.kl_shaped_rewards(scores, logprobs, REF_LOGPROBS, ones(logprobs), 0.02)
    assert torch.equal(logprobs, LOGPROBS) and torch.equal(scores, f64(1.5))


# ------------------------------------------------------------------------------------------------------------
# advantages


def test_gae_by_hand():
    """L10: delta = [0.004 + 0.6 - 0.5, -0.004 + 0.8 - 0.6, 0.010 + 1.0 - 0.8, 1.498 - 1.0]
    = [0.104, 0.196, 0.210, 0.498];
    from the end: 0.498, 0.210 + 0.95 * 0.498 = 0.6831, 0.196 + 0.95 * 0.6831 = 0.844945,
    0.104 + 0.95 * 0.844945 = 0.906698."""
    advantages, returns = ppo.gae(REWARDS, VALUES, ones(VALUES), 1.0, 0.95)
    close(advantages, [[0.906698, 0.844945, 0.683100, 0.498000]])
    close(returns, [[1.406698, 1.444945, 1.483100, 1.498000]])


def test_gae_with_lambda_1_is_the_sum_of_future_rewards_minus_the_value():
    """L11."""
    advantages, returns = ppo.gae(REWARDS, VALUES, ones(VALUES), 1.0, 1.0)
    close(advantages, [[1.008, 0.904, 0.708, 0.498]])
    close(returns, [[1.508, 1.504, 1.508, 1.498]])


def test_gae_with_lambda_0_is_the_one_step_error():
    """L11."""
    close(ppo.gae(REWARDS, VALUES, ones(VALUES), 1.0, 0.0)[0], [[0.104, 0.196, 0.210, 0.498]])


def test_gae_with_a_fifth_action_that_takes_the_score():
    """L12: the score 1.5 one column later, where the value is 1.4: the fifth advantage is 0.1, the fourth
    -0.002 + 1.4 - 1.0 + 0.95 * 0.1 = 0.493; and where the value is 1.5, the first four are those of L10."""
    rewards = f64([0.004, -0.004, 0.010, -0.002, 1.5])
    values = f64([0.5, 0.6, 0.8, 1.0, 1.4])
    advantages, _ = ppo.gae(rewards, values, ones(values), 1.0, 0.95)
    close(advantages, [[0.902411, 0.840433, 0.678350, 0.493000, 0.1]])
    values[0, 4] = 1.5
    advantages, _ = ppo.gae(rewards, values, ones(values), 1.0, 0.95)
    close(advantages, [[0.906698, 0.844945, 0.683100, 0.498000, 0.0]])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_gae_as_the_sum_of_its_definition(gamma, lam):
    """GAE eq. 16: A_t = sum over l of (gamma * lam)^l * delta_{t+l}, in O(T^2), on the response alone."""
    rewards, values, mask = ragged()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    expected = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        columns = mask[b].nonzero().flatten().tolist()
        # no value after the last action
        r, v = rewards[b, columns].tolist(), values[b, columns].tolist() + [0.0]
        for t in range(len(r)):
            for l in range(len(r) - t):
                delta = r[t + l] + gamma * v[t + l + 1] - v[t + l]
                expected[b, columns[t]] += (gamma * lam) ** l * delta
    close(advantages, expected, 1e-12)
    close(returns, (expected + values) * mask, 1e-12)


def test_prompt_and_padding_columns_leak_nothing_into_gae():
    """J16: whatever stands in the masked columns of rewards and values."""
    rewards, values, mask = ragged()
    clean = ppo.gae(rewards, values, mask)
    for column_filler in (1e3, -5.0):
        dirty = ppo.gae(rewards + column_filler * ~mask, values + column_filler * ~mask, mask)
        close(dirty[0], clean[0], 1e-12)
        close(dirty[1], clean[1], 1e-12)


def test_more_padding_changes_no_advantage():
    """J16."""
    rewards, values, mask = ragged()
    clean = torch.stack(ppo.gae(rewards, values, mask))
    wider = torch.stack(ppo.gae(*(torch.nn.functional.pad(x, (0, 12)) for x in (rewards, values, mask))))
    close(wider[:, :, :12], clean, 0)
    assert (wider[:, :, 12:] == 0).all()


# ------------------------------------------------------------------------------------------------------------
# whitening


def test_whiten_by_hand():
    """L13, J18: population variance. The unbiased one would give 0.948387 first."""
    advantages, _ = ppo.gae(REWARDS, VALUES, ones(VALUES))
    close(ppo.whiten(advantages, ones(advantages)), [[1.095103, 0.705357, -0.316111, -1.484350]])


def test_whiten_without_shift_keeps_the_mean():
    """L14, J17: mean 1.6, population std 0.258199; 1.6 + (1.2 - 1.6) / 0.258199 = 0.050807."""
    x = f64([1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0])
    whitened = ppo.whiten(x, ones(x), shift_mean=False)
    close(
        whitened.flatten(),
        [0.050807, 0.438105, 0.825403, 1.212702, 1.6, 1.987298, 2.374597, 2.761895, 3.149193],
    )


def test_whiten_does_not_count_padding():
    """L15: 1, 2, 3, 4 have mean 2.5 and variance 1.25.
    With the two pads as zeros the first would be -0.447214."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for pads in (0.0, 99.0):
        x = f64([1, 2, 3], [4, pads, pads])
        close(ppo.whiten(x, mask), [[-1.341641, -0.447214, 0.447214], [1.341641, 0, 0]])


def test_whiten_of_equal_numbers_is_zero_and_not_nan():
    x = f64([3.0, 3.0, 3.0])
    close(ppo.whiten(x, ones(x)), [[0.0, 0.0, 0.0]])


# ------------------------------------------------------------------------------------------------------------
# the clipped surrogate


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [(1, 1.3, -1.2, 0), (1, 0.7, -0.7, -1), (-1, 1.3, 1.3, 1)]
    + [(-1, 0.7, 0.8, 0), (2, 1.1, -2.2, -2), (-0.5, 1, 0.5, 0.5)],
)
def test_policy_loss_by_hand(advantage, ratio, loss, slope):
    """L16, cliprange 0.2: only a move that has already gone 0.2 the favourable way stops being rewarded.

    slope is d loss / d ratio; the derivative by the log-probability is ratio times that.
    """
    new_logprobs = f64([math.log(ratio)]).requires_grad_()
    found, _ = ppo.policy_loss(new_logprobs, f64([0.0]), f64([advantage]), ones(f64([0])), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-9)
    assert new_logprobs.grad.item() == pytest.approx(slope * ratio, abs=1e-9)


def four_tokens():
    """The first four cases of L16 in one row -> new_logprobs, logprobs, advantages."""
    return f64([1.3, 0.7, 1.3, 0.7]).log(), f64([0.0] * 4), f64([1.0, 1.0, -1.0, -1.0])


def test_clipfrac_is_the_share_of_tokens_where_the_clip_binds():
    """L16: the first and the last of the four; the other two are outside the range too,
    but on the side that is not clipped."""
    new_logprobs, logprobs, advantages = four_tokens()
    _, clipfrac = ppo.policy_loss(new_logprobs, logprobs, advantages, ones(logprobs), 0.2)
    assert clipfrac.item() == pytest.approx(0.5)


def test_policy_loss_is_a_mean_over_unmasked_tokens():
    """(-1.2 - 0.7 + 1.3) / 3 = -0.2; clipped: one of three."""
    mask = torch.tensor([[True, True, True, False]])
    loss, clipfrac = ppo.policy_loss(*four_tokens(), mask, 0.2)
    assert loss.item() == pytest.approx(-0.2, abs=1e-9)
    assert clipfrac.item() == pytest.approx(1 / 3)


def test_a_masked_token_has_no_gradient():
    new_logprobs, logprobs, advantages = four_tokens()
    new_logprobs.requires_grad_()
    mask = torch.tensor([[True, False, False, True]])
    ppo.policy_loss(new_logprobs, logprobs, advantages, mask, 0.2)[0].backward()
    assert (new_logprobs.grad[0, 1:3] == 0).all()


def test_a_clipped_token_has_no_gradient_but_its_neighbours_do():
    new_logprobs, logprobs, advantages = four_tokens()
    new_logprobs.requires_grad_()
    ppo.policy_loss(new_logprobs, logprobs, advantages, ones(logprobs), 0.2)[0].backward()
    assert (new_logprobs.grad[0] != 0).tolist() == [False, True, True, False]


def test_raising_the_probability_of_a_good_action_lowers_the_loss():
    """At ratio 1 the gradient is -advantages / N: the policy gradient."""
    new_logprobs = f64([0.0, 0.0]).requires_grad_()
    ppo.policy_loss(new_logprobs, f64([0.0, 0.0]), f64([3.0, -1.0]), ones(f64([0, 0])), 0.2)[0].backward()
    close(new_logprobs.grad, [[-1.5, 0.5]])


def test_doubling_the_padding_changes_no_loss():
    """J16."""
    pad = lambda x: torch.nn.functional.pad(x, (0, 4))
    new_logprobs, logprobs, advantages = four_tokens()
    args, mask = (new_logprobs, logprobs, advantages), ones(logprobs)
    assert ppo.policy_loss(*map(pad, args), pad(mask), 0.2) == ppo.policy_loss(*args, mask, 0.2)
    assert ppo.value_loss(*map(pad, args), pad(mask), 0.2) == ppo.value_loss(*args, mask, 0.2)


# ------------------------------------------------------------------------------------------------------------
# the value loss


def value_loss(new, old, target):
    return ppo.value_loss(f64([new]), f64([old]), f64([target]), ones(f64([0])), 0.2).item()


def test_value_loss_by_hand():
    """L17: old 0.5, new 1.0 is kept to 0.7; errors (1.0 - 1.2)^2 = 0.04 and (0.7 - 1.2)^2 = 0.25;
    half the larger: 0.125."""
    assert value_loss(1.0, 0.5, 1.2) == pytest.approx(0.125, abs=1e-9)


def test_value_loss_takes_the_unclipped_error_where_that_is_larger():
    """Old 0.5, new 1.0, return 0.6: errors (1.0 - 0.6)^2 = 0.16 and (0.7 - 0.6)^2 = 0.01; half of 0.16."""
    assert value_loss(1.0, 0.5, 0.6) == pytest.approx(0.08, abs=1e-9)


def test_value_loss_within_the_range_is_half_the_squared_error():
    """New 0.4 is within 0.2 of old 0.5: 0.5 * (0.4 - 1.0)^2 = 0.18."""
    assert value_loss(0.4, 0.5, 1.0) == pytest.approx(0.18, abs=1e-9)


def test_value_loss_is_a_mean_over_unmasked_tokens():
    """0.125 and 0.18 from above, and a masked token that is far off: (0.125 + 0.18) / 2."""
    mask = torch.tensor([[True, True, False]])
    loss = ppo.value_loss(f64([1.0, 0.4, 50.0]), f64([0.5, 0.5, 0.0]), f64([1.2, 1.0, -50.0]), mask, 0.2)
    assert loss.item() == pytest.approx(0.1525, abs=1e-9)


def test_a_value_that_left_the_range_towards_the_return_has_no_gradient():
    """L17: there the clipped error is the larger, and it does not depend on the new value."""
    new = f64([1.0]).requires_grad_()
    ppo.value_loss(new, f64([0.5]), f64([1.2]), ones(f64([0])), 0.2).backward()
    assert new.grad.item() == 0


def test_explained_variance_of_perfect_constant_and_opposite_values():
    returns, mask = f64([1.0, 2.0, 3.0, 77.0]), torch.tensor([[True, True, True, False]])
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert ppo.explained_variance(f64([5.0, 5.0, 5.0, 0.0]), returns, mask) == pytest.approx(0)
    # errors -2, 0, 2: 4 times
    assert ppo.explained_variance(f64([3.0, 2.0, 1.0, 0.0]), returns, mask) == pytest.approx(-3)


# ------------------------------------------------------------------------------------------------------------
# estimates of the KL


def test_kl_estimates_by_hand():
    """L18: k1 = [-0.2, 0.2, -0.5, 0.1], sum -0.4. k3 with r = e^0.2, e^-0.2, e^0.5, e^-0.1:
    [0.021403, 0.018731, 0.148721, 0.004837], sum 0.193692."""
    k1, k3 = ppo.kl_estimates(LOGPROBS, REF_LOGPROBS, ones(LOGPROBS))
    close(k1, [-0.4])
    close(k3, [0.193692])


def test_kl_estimates_are_unbiased():
    """L19, by enumeration: the mean over the policy's own actions of k1 and of k3
    is KL(policy || ref) = 0.025267.
    k3 with r upside down has the mean 0.024733, and KL(ref || policy) is 0.025815."""
    policy, ref = f64([0.5], [0.3], [0.2]), f64([0.4], [0.4], [0.2])  # one action a row
    exact = (policy * (policy / ref).log()).sum().item()
    assert exact == pytest.approx(0.025267, abs=1e-6)
    for estimate in ppo.kl_estimates(policy.log(), ref.log(), ones(policy)):
        assert (policy.flatten() * estimate).sum().item() == pytest.approx(exact, abs=1e-9)


def test_kl_estimates_ignore_padding_and_sum_over_the_response():
    logprobs, ref_logprobs, mask = ragged()
    k1, k3 = ppo.kl_estimates(logprobs + 3.0 * ~mask, ref_logprobs, mask)
    close(k1, ((logprobs - ref_logprobs) * mask).sum(1), 1e-12)
    assert (k3 >= 0).all()


def test_kl_of_equal_policies_is_exactly_zero():
    logprobs, _, mask = ragged()
    for estimate in ppo.kl_estimates(logprobs, logprobs, mask):
        assert (estimate == 0).all()


# ------------------------------------------------------------------------------------------------------------
# schedules and the moving average


def test_warmup_is_linear_from_a_tenth():
    """L23."""
    found = [ppo.warmup(i, 10) for i in (0, 1, 5, 9, 10, 500)]
    assert found == pytest.approx([0.10, 0.19, 0.55, 0.91, 1.0, 1.0])


def test_ema_by_hand():
    """L24: 1 toward 2 with decay 0.992: 1.008 after one step, 1.008 * 0.992 + 0.016 = 1.015936 after two,
    2 - 0.992^125 after 125."""
    ema, weights = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()
    for parameter in ema.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    for parameter in weights.parameters():
        torch.nn.init.constant_(parameter, 2.0)
    found = []
    for _ in range(125):
        ppo.update_ema(ema, weights, 0.992)
        found.append(ema.weight.item())
    assert (found[0], found[1], found[124]) == pytest.approx((1.008, 1.015936, 1.633597), abs=1e-6)
    assert weights.weight.item() == 2.0


# ------------------------------------------------------------------------------------------------------------
# one rollout

EOT = 3
TOKENIZER = SimpleNamespace(eot=EOT)
PROMPTS = [[1, 2], [4, 5, 6, 7], [8], [3, 9], [1, 2], [10, 10, 10]] * 3


def networks(**more):
    """policy, ref, reward_model, value_model: four different random networks."""
    return tiny_gpt(1, **more), tiny_gpt(2, **more), tiny_scalar(3, **more), tiny_scalar(4, **more)


@pytest.fixture(autouse=True)
def several_forwards():
    """Of the 18 rows of a rollout, and of the eight rows of an update."""
    with mock.patch.dict(model.MICROBATCH_TOKENS, cpu=30):  # monkeypatch is undone by run_main
        yield


def roll(nets, seed=0, **flags):
    """One rollout of PROMPTS -> batch, config. max_new_tokens 6 lets some of the responses end and cuts the
    others."""
    config = ppo.Config(**{"max_new_tokens": 6, "eot_penalty": 0.0, **flags})
    generator = torch.Generator().manual_seed(seed)
    batch = ppo.rollout(*nets, PROMPTS, TOKENIZER, config, generator)
    # both kinds are there, or the tests below see nothing
    assert 3 < int(batch["ended"].sum()) < len(PROMPTS) - 3
    return batch, config


def response_columns(batch, b):
    """The columns of row b that are actions, from its lengths:
    the token at index i is the action of column i - 1."""
    return range(int(batch["prompt_lengths"][b]) - 1, int(batch["lengths"][b]) - 1)


def test_rollout_mask_holds_the_response_with_its_eot():
    """J5: the stop token is an action."""
    batch, _ = roll(networks())
    for b in range(len(PROMPTS)):
        columns = batch["mask"][b].nonzero().flatten().tolist()
        assert columns == list(response_columns(batch, b))
        actions = batch["tokens"][b, 1:][batch["mask"][b]].tolist()
        assert (actions[-1] == EOT) == bool(batch["ended"][b])
        assert EOT not in actions[:-1]


def test_rollout_scores_the_last_token_of_each_response():
    """J4, J13: the score of prompt and response up to eot, as if the row were alone."""
    nets = networks()
    batch, _ = roll(nets)
    for b, (row, length) in enumerate(zip(batch["tokens"], batch["lengths"])):
        close(batch["scores"][b], nets[2](row[None, :length])[0, -1].detach(), 1e-5)


def test_values_judge_the_state_before_the_action():
    """values[:, t] has read tokens[:, :t + 1] and not the action tokens[:, t + 1]; 0 outside the response."""
    nets = networks()
    batch, _ = roll(nets)
    assert (batch["values"][~batch["mask"]] == 0).all()
    for b in range(6):
        for t in response_columns(batch, b):
            close(batch["values"][b, t], nets[3](batch["tokens"][b : b + 1, : t + 1])[0, -1].detach(), 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(temperature):
    """J9, J12: policy and reference, both at the sampling temperature, from a full forward."""
    nets = networks()
    batch, _ = roll(nets, temperature=temperature)
    for network, name in ((nets[0], "logprobs"), (nets[1], "ref_logprobs")):
        for b in range(len(PROMPTS)):
            log_pi = (network(batch["tokens"][b : b + 1]).detach()[0] / temperature).log_softmax(-1)
            for t in response_columns(batch, b):
                close(batch[name][b, t], log_pi[t, batch["tokens"][b, t + 1]], 1e-4)


def test_responses_are_sampled_at_the_temperature_of_the_config():
    """J9: near temperature 0 sampling is greedy."""
    nets = networks()
    config = ppo.Config(max_new_tokens=6, temperature=1e-4)
    batch = ppo.rollout(*nets, PROMPTS, TOKENIZER, config, torch.Generator().manual_seed(0))
    assert torch.equal(batch["tokens"], model.generate(nets[0], PROMPTS, 6, 0, EOT)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_of_a_policy_with_itself_is_exactly_zero(temperature):
    """J26, J30: and then all the reward is the score."""
    policy, _, reward_model, value_model = networks()
    batch, config = roll(
        (policy, policy, reward_model, value_model), temperature=temperature, beta=10.0, lam=1.0
    )
    assert torch.equal(batch["logprobs"], batch["ref_logprobs"])
    for b in range(len(PROMPTS)):
        close(batch["returns"][b, response_columns(batch, b)[0]], batch["scores"][b], 1e-4)


def test_returns_are_taken_before_whitening():
    """J18: with lambda 1 and no discount a return is the plain sum of the rewards from there on,
    on the scale of the score."""
    batch, _ = roll(networks(), beta=0.1, lam=1.0)
    kl = batch["logprobs"] - batch["ref_logprobs"]
    for b in range(len(PROMPTS)):
        for t in response_columns(batch, b):
            expected = batch["scores"][b] - 0.1 * kl[b, t:].sum()
            close(batch["returns"][b, t], expected, 1e-4)


def test_advantages_are_whitened_over_the_response_tokens_of_the_rollout():
    """J18: returns - values, then zero mean and unit population variance over unmasked tokens."""
    batch, _ = roll(networks())
    mask, raw = batch["mask"], batch["returns"] - batch["values"]
    expected = (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0)
    close(batch["advantages"][mask], expected, 1e-4)
    assert (batch["advantages"][~mask] == 0).all()


def test_a_response_without_eot_loses_the_penalty_and_the_others_do_not():
    """J14: the return of the first action falls by exactly that constant;
    the logged score stays the reward model's."""
    nets = networks()
    without, _ = roll(nets, lam=1.0, eot_penalty=0.0)
    penalised, _ = roll(nets, lam=1.0, eot_penalty=5.0)
    assert torch.equal(without["scores"], penalised["scores"])
    for b in range(len(PROMPTS)):
        t = response_columns(without, b)[0]
        fall = without["returns"][b, t] - penalised["returns"][b, t]
        assert fall.item() == pytest.approx(0.0 if without["ended"][b] else 5.0, abs=1e-4)


def test_what_stands_behind_eot_does_not_matter(monkeypatch):
    """J13: fill everything behind the responses with other tokens, before it is scored."""
    nets, generate = networks(), model.generate
    clean, _ = roll(nets)

    def with_junk(*args):
        tokens, lengths = generate(*args)
        behind = torch.arange(tokens.size(1)) >= lengths[:, None]
        return tokens.masked_fill(behind, 7), lengths

    monkeypatch.setattr(model, "generate", with_junk)
    dirty, _ = roll(nets)
    assert (dirty["tokens"] == 7).sum() > (clean["tokens"] == 7).sum()
    for name in ("scores", "ended", "logprobs", "ref_logprobs", "values", "advantages", "returns"):
        close(dirty[name].double(), clean[name].double(), 1e-5)


def test_gold_scores_take_the_place_of_the_reward_model():
    gold = lambda tokens, prompt_lengths, lengths: (lengths - prompt_lengths).float()
    config = ppo.Config(max_new_tokens=6)
    batch = ppo.rollout(*networks(), PROMPTS, TOKENIZER, config, torch.Generator().manual_seed(0), gold)
    assert batch["scores"].tolist() == batch["mask"].sum(1).tolist()


def test_a_rollout_needs_no_gradient():
    """J26: what the update is measured against is a constant."""
    batch, _ = roll(networks())
    assert not any(x.requires_grad for x in batch.values() if torch.is_tensor(x))


# ------------------------------------------------------------------------------------------------------------
# rows of similar length at a time

# tokens of a forward, for rows of 3, 4, 7, 7, 9 and 12: from each row alone to all six together
PIECES = [1, 8, 14, 24, 72, 1000]


def six_rows():
    """Random tokens (6, 12) in no order of length, two of equal length, junk behind each
    -> tokens, lengths, mask."""
    tokens = torch.randint(11, (6, 12), generator=torch.Generator().manual_seed(0))
    # the order of these lengths is not its own inverse
    lengths, prompt_lengths = torch.tensor([7, 12, 3, 9, 4, 7]), torch.tensor([2, 5, 2, 1, 1, 6])
    return tokens, lengths, model.response_mask(prompt_lengths, lengths, 12)


def masked_logprobs(gpt):
    return lambda tokens, mask: model.masked_logprobs(gpt, tokens, mask, 0.7)


def masked_values(scalar):
    return lambda tokens, mask: model.masked_values(scalar, tokens, mask)


@pytest.mark.parametrize("size", PIECES)
@pytest.mark.parametrize("function, network", [(masked_logprobs, tiny_gpt), (masked_values, tiny_scalar)])
def test_by_length_equals_one_padded_batch(function, network, size, monkeypatch):
    """Numbers and gradients: a loss that weighs every response token differently goes back equally."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", size)
    network = network().double()
    function, (tokens, lengths, mask) = function(network), six_rows()
    weighing = torch.randn(6, 11, generator=torch.Generator().manual_seed(1)) * mask
    padded, pieces = function(tokens, mask), model.by_length(function, tokens, lengths, mask)
    assert pieces.shape == padded.shape and padded[mask].abs().min() > 1e-3
    close(pieces, padded.detach(), 1e-6)
    found, expected = (gradient((x * weighing).sum(), network) for x in (pieces, padded))
    for name in expected:
        close(found[name], expected[name], 1e-5)
    assert max(float(g.abs().max()) for g in expected.values()) > 1


@pytest.mark.parametrize("size", PIECES)
def test_by_length_returns_each_row_in_its_place(size, monkeypatch):
    """The tokens come back as the numbers, exactly, up to the length of their row."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", size)
    tokens, lengths, mask = six_rows()
    found = model.by_length(lambda t, m: t[:, 1:].float(), tokens, lengths, mask)
    inside = torch.arange(1, 12) < lengths[:, None]
    assert torch.equal(found[inside], tokens[:, 1:][inside].float())


@pytest.mark.parametrize("lengths, pieces", [
    ([7, 6], [[1, 0]]),  # 14 of 14 tokens
    ([7, 8], [[0], [1]]),  # 16
    ([15, 20], [[0], [1]]),  # a row alone may be longer
    ([3, 4], [[0], [1]]),  # 4 > 1.25 * 3, and row 0 would take more than a quarter of 14
    ([2, 3], [[0, 1]]),  # 3 > 1.25 * 2, but less than that
    ([], [[]]),
])
def test_rows_of_a_microbatch_fit_and_are_of_similar_length(lengths, pieces, monkeypatch):
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", 14)
    assert model.microbatches(lengths, torch.device("cpu")) == pieces


def test_by_length_cuts_each_piece_to_its_longest_row(monkeypatch):
    """Lengths 3, 4 | 7, 7 | 9 | 12: short rows are not computed as long ones, and nothing of a row is cut off."""
    tokens, lengths, mask = six_rows()
    shapes, actions = [], []
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", 40)

    def spy(t, m):
        shapes.append((tuple(t.shape), tuple(m.shape)))
        actions.extend(t[:, 1:][m].tolist())
        return torch.ones(m.shape)

    model.by_length(spy, tokens, lengths, mask)
    assert shapes == [((2, 4), (2, 3)), ((2, 7), (2, 6)), ((1, 9), (1, 8)), ((1, 12), (1, 11))]
    assert sorted(actions) == sorted(tokens[:, 1:][mask].tolist())


# ------------------------------------------------------------------------------------------------------------
# one update

PTX = (torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]), torch.tensor([[True, True, True], [True, True, False]]))


def rows_of(batch, rows):
    """A minibatch: these rows of every tensor of the rollout."""
    return {name: x[list(rows)] for name, x in batch.items() if torch.is_tensor(x)}


def learner(nets, **flags):
    """The moving parts of main around the four networks, and a function for one update of the first rows."""
    policy, _, _, value_model = nets
    defaults = dict(grad_clip=1e9, lr=1e-3, value_lr=1e-3, max_new_tokens=6)
    config = ppo.Config(**{**defaults, **flags})
    ema = tiny_gpt(1)
    optimizers = model.adamw(policy, config.lr), model.adamw(value_model, config.value_lr)

    def step(batch, ptx=None, rows=range(8), factor=1.0):
        return ppo.update(policy, value_model, ema, *optimizers, rows_of(batch, rows), ptx, factor, config)

    return SimpleNamespace(
        step=step, ema=ema, optimizer=optimizers[0], value_optimizer=optimizers[1], config=config
    )


def weights(network):
    return {name: weight.clone() for name, weight in network.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def gradient(loss, network):
    """d loss / d parameters, by name; zero where loss does not depend on one."""
    names, parameters = zip(*network.named_parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(temperature):
    """J9, J11: the log-probabilities of rollout and update agree before anything is learnt."""
    nets = networks()
    batch, _ = roll(nets, temperature=temperature)
    stats = learner(nets, temperature=temperature).step(batch)
    assert abs(stats["max_ratio"] - 1) < 1e-5
    assert abs(stats["approx_kl"]) < 1e-9 and stats["clipfrac"] == 0


def test_bfloat16_activations_hold_the_first_ratio_near_one(dtypes):
    """Rows that stand in another forward than in the rollout may round otherwise: eight of 18 are updated."""
    nets = networks()
    batch, _ = roll(nets, dtype="bfloat16")
    assert not torch.equal(batch["logprobs"], batch["logprobs"].bfloat16().float())
    stats = learner(nets, dtype="bfloat16").step(batch, PTX)
    assert dtypes == ["bfloat16"] * 4  # rollout; policy, pretraining text, value model
    assert abs(stats["max_ratio"] - 1) < 0.1 and all(math.isfinite(x) for x in stats.values())
    assert all(p.dtype == torch.float32 for net in nets for p in net.parameters())


def test_the_second_ratio_is_not_one():
    """The number of the test above can move."""
    nets = networks()
    batch, _ = roll(nets)
    learn = learner(nets)
    learn.step(batch)
    stats = learn.step(batch)
    assert stats["max_ratio"] > 1.001 and stats["approx_kl"] > 1e-8


def test_one_step_with_the_sum_of_both_gradients():
    """J28, eq. 2: Adam sees g_ppo + ptx_coef * g_ptx, once."""
    nets = networks()
    policy = nets[0]
    batch, _ = roll(nets)
    learn = learner(nets, ptx_coef=2.5)
    tokens, mask, logprobs, advantages = (
        batch[name][:8] for name in ("tokens", "mask", "logprobs", "advantages")
    )
    new_logprobs = model.token_logprobs(policy(tokens), tokens) * mask
    g_ppo = gradient(ppo.policy_loss(new_logprobs, logprobs, advantages, mask, 0.2)[0], policy)
    g_ptx = gradient(sft.lm_loss(policy, *PTX), policy)
    seen = []
    capture = lambda *_: seen.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    learn.optimizer.register_step_pre_hook(capture)
    learn.step(batch, PTX)
    assert len(seen) == 1
    for name, found in seen[0].items():
        close(found, g_ppo[name] + 2.5 * g_ptx[name], 1e-4)
    assert max(float(g.abs().max()) for g in g_ptx.values()) > 0.01


def test_each_network_steps_once_per_minibatch():
    """J28."""
    nets = networks()
    batch, _ = roll(nets)
    learn, steps = learner(nets), []
    learn.optimizer.register_step_post_hook(lambda *_: steps.append("policy"))
    learn.value_optimizer.register_step_post_hook(lambda *_: steps.append("value"))
    learn.step(batch, PTX)
    assert sorted(steps) == ["policy", "value"]


def test_no_gradient_is_left_over_for_the_next_minibatch():
    nets = networks()
    batch, _ = roll(nets)
    learner(nets).step(batch, PTX)
    for network in nets:
        assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_the_value_loss_gives_the_policy_no_gradient():
    """J20: with advantages 0 and no pretraining text the policy stays as it was, to the bit,
    while the value model learns."""
    nets = networks()
    batch, _ = roll(nets)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    policy_before, value_before = weights(nets[0]), weights(nets[3])
    learner(nets).step(batch)
    assert same(policy_before, weights(nets[0]))
    assert not same(value_before, weights(nets[3]))


def test_an_update_leaves_reference_and_reward_model_alone():
    """J26, to the bit."""
    nets = networks()
    batch, _ = roll(nets)
    before = [weights(network) for network in nets]
    learner(nets).step(batch, PTX)
    unchanged = [same(old, weights(network)) for old, network in zip(before, nets)]
    assert unchanged == [False, True, True, False]


def test_the_value_model_moves_towards_the_returns():
    """J19: one hundred steps on one rollout."""
    nets = networks()
    batch, _ = roll(nets)
    learn = learner(nets, value_lr=3e-3, cliprange_value=1e9)
    first = learn.step(batch)["value_loss"]
    for _ in range(100):
        last = learn.step(batch)["value_loss"]
    assert last < 0.2 * first


def test_new_values_are_read_in_the_columns_of_the_old():
    """Before any step the value loss is half the mean squared error of the rollout's own values."""
    nets = networks()
    batch, _ = roll(nets)
    stats = learner(nets).step(batch)
    mask = batch["mask"][:8]
    expected = 0.5 * ((batch["values"] - batch["returns"])[:8][mask] ** 2).mean()
    assert stats["value_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_moving_average_follows_the_policy_by_one_minus_the_decay():
    """J24, L24: after one update, ema = 0.992 * before + 0.008 * the new weights."""
    nets = networks()
    batch, _ = roll(nets)
    before = weights(nets[0])  # ema starts equal
    learn = learner(nets)
    learn.step(batch)
    after = weights(nets[0])
    for name, average in learn.ema.state_dict().items():
        close(average, 0.992 * before[name] + 0.008 * after[name], 1e-6)


def test_learning_rates_are_the_peak_times_the_factor():
    nets = networks()
    batch, _ = roll(nets)
    learn = learner(nets, lr=1e-3, value_lr=2e-3)
    learn.step(batch, factor=0.1)
    assert {group["lr"] for group in learn.optimizer.param_groups} == {1e-4}
    assert {group["lr"] for group in learn.value_optimizer.param_groups} == {2e-4}


def test_an_update_makes_good_actions_likelier():
    """Give one token advantage 1 wherever it was chosen, all others -1: its log-probability rises."""
    nets = networks()
    batch, _ = roll(nets)
    is_good = (batch["tokens"][:, 1:] == EOT) & batch["mask"]
    batch["advantages"] = (2.0 * is_good - 1.0) * batch["mask"]
    learn = learner(nets)
    for _ in range(5):
        learn.step(batch, rows=range(len(PROMPTS)))
    after = model.masked_logprobs(nets[0], batch["tokens"], batch["mask"]).detach()
    assert after[is_good].mean() > batch["logprobs"][is_good].mean() + 0.01


# ------------------------------------------------------------------------------------------------------------
# main's loop, on the untrained checkpoints of `chain`


def run_main(chain, out, monkeypatch, **flags):
    """ppo.main without its last table -> what its rollouts and updates were given."""
    seen = SimpleNamespace(rollouts=[], rows=[], factors=[])
    rollout, update = ppo.rollout, ppo.update

    def spy_rollout(*args):
        seen.rollouts.append([weights(network) for network in args[:4]])
        assert len({id(network) for network in args[:4]}) == 4
        assert not any(network.training for network in args[:4])
        seen.batch = rollout(*args)
        seen.size = len(seen.batch["tokens"])
        seen.batch["row"] = torch.arange(seen.size)  # travels with the other tensors into the minibatches
        return seen.batch

    def spy_update(*args):
        minibatch, _, factor, _ = args[-4:]
        seen.rows.append(minibatch["row"].tolist())
        seen.factors.append(factor)
        for name in ("tokens", "lengths", "mask", "logprobs", "values", "advantages", "returns"):
            assert torch.equal(minibatch[name], seen.batch[name][minibatch["row"]])
        return update(*args)

    monkeypatch.setattr(ppo, "rollout", spy_rollout)
    monkeypatch.setattr(ppo, "update", spy_update)
    monkeypatch.setattr(eval, "last_table", lambda *_: None)
    given = {name: str(chain / f"{name}.pt") for name in ("sft", "ppo_init", "reward")}
    os.makedirs(out, exist_ok=True)
    if not os.path.exists(os.path.join(out, "base.pt")):
        os.symlink(chain / "base.pt", os.path.join(out, "base.pt"))
    defaults = dict(episodes=32, rollout_size=16, minibatch_size=4, max_new_tokens=8, warmup=2, log_every=1)
    flags = {**defaults, **flags}
    config = ppo.Config(scale="tiny", data=str(chain), out=str(out), **given, **flags)
    try:
        ppo.main(config)
    finally:
        monkeypatch.undo()
    return seen


def log_rows(out):
    return [json.loads(line) for line in (out / "ppo.jsonl").read_text().splitlines()]


def test_every_response_is_used_exactly_once_per_pass(chain, tmp_path, monkeypatch):
    """J27: two iterations of two passes over 16 responses in minibatches of 4, in another order each time."""
    seen = run_main(chain, tmp_path, monkeypatch, ppo_epochs=2)
    assert seen.size == 16 and len(seen.rows) == 2 * 2 * 4
    passes = [sum(seen.rows[i : i + 4], []) for i in range(0, 16, 4)]
    assert all(sorted(rows) == list(range(16)) for rows in passes)
    assert len(set(map(tuple, passes))) == 4


def test_only_policy_and_value_model_change_over_a_run(chain, tmp_path, monkeypatch):
    """J26, to the bit; and J3: the value model starts as a copy of the reward model."""
    seen = run_main(chain, tmp_path, monkeypatch)
    (policy, ref, reward_model, value_model), second = seen.rollouts
    assert same(policy, ref) and same(reward_model, value_model)
    assert [same(a, b) for a, b in zip(seen.rollouts[0], second)] == [False, True, True, False]


def test_another_reference_is_only_what_the_kl_is_measured_against(chain, tmp_path, monkeypatch):
    """--ref: the policy starts from the PPO initialisation all the same, and its first ratio is 1."""
    tokenizer = data.Tokenizer.from_state(torch.load(chain / "base.pt", weights_only=True)["tokenizer"])
    other = tiny_gpt(5, vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    save_tiny(tmp_path / "other.pt", "policy", other, tokenizer)
    seen = run_main(chain, tmp_path / "out", monkeypatch, ref=str(tmp_path / "other.pt"))
    policy, ref, *_ = seen.rollouts[0]
    init = model.load_policy(str(chain / "ppo_init.pt"), "", "cpu")[0].state_dict()
    assert same(policy, init) and same(ref, other.state_dict())
    first = json.loads((tmp_path / "out" / "ppo.jsonl").read_text().splitlines()[0])
    assert first["kl"] != 0 and first["first_ratio"] == pytest.approx(1, abs=1e-5)


def test_the_first_iteration_has_ratio_one_and_kl_zero(chain, tmp_path, monkeypatch):
    """J11: in the log that every run writes, also when the sampling temperature is not 1."""
    run_main(chain, tmp_path, monkeypatch, temperature=0.7)
    first, second = log_rows(tmp_path)
    assert first["kl"] == 0 and first["kl3"] == 0
    assert abs(first["first_ratio"] - 1) < 1e-5 and abs(second["first_ratio"] - 1) < 1e-5
    assert second["kl3"] > 0


def test_the_learning_rate_is_constant_after_the_warmup(chain, tmp_path, monkeypatch):
    """J24, L23 with a warm-up of 2 iterations: 0.1, 0.1 + 0.9 / 2, 1, 1; four minibatches each."""
    seen = run_main(chain, tmp_path, monkeypatch, episodes=64)
    assert seen.factors == pytest.approx([0.1] * 4 + [0.55] * 4 + [1.0] * 8)


def test_a_persistently_negative_kl_is_reported(chain, tmp_path, monkeypatch, capsys):
    """J30: make the reference log-probabilities wrong by one nat; the warning comes after iteration 5."""
    masked_logprobs = model.masked_logprobs

    def wrong_for_the_reference(gpt, tokens, mask, temperature):
        is_reference = not gpt.lm_head.weight.requires_grad  # the frozen one
        return masked_logprobs(gpt, tokens, mask, temperature) + mask * is_reference

    monkeypatch.setattr(model, "masked_logprobs", wrong_for_the_reference)
    run_main(chain, tmp_path, monkeypatch, episodes=16 * 6, ptx_coef=0.0)
    assert capsys.readouterr().out.count("is negative") == 1


def test_a_run_that_was_stopped_and_started_again_gives_the_same_bits(chain, tmp_path, monkeypatch):
    """Ctrl-C in the second of three iterations; the log has each iteration once."""
    run_main(chain, tmp_path / "whole", monkeypatch, episodes=48)
    update, calls = ppo.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(ppo, "update", interrupted)
    with pytest.raises(SystemExit, match="stopped after step 2"):
        run_main(chain, tmp_path / "parts", monkeypatch, episodes=48)
    run_main(chain, tmp_path / "parts", monkeypatch, episodes=48)
    whole, parts = (torch.load(tmp_path / name / "ppo.pt") for name in ("whole", "parts"))
    for key in ("weights", "policy", "value_model"):
        assert same(whole[key], parts[key])
    assert [row["step"] for row in log_rows(tmp_path / "parts")] == [1, 2, 3]


def test_the_checkpoint_holds_the_moving_average(chain, tmp_path, monkeypatch):
    """The paper evaluates the average; the raw policy is kept beside it for going on."""
    seen = run_main(chain, tmp_path, monkeypatch, episodes=16, ema=0.0)
    checkpoint = torch.load(tmp_path / "ppo.pt")
    assert same(checkpoint["weights"], checkpoint["policy"])  # decay 0: the average is the last policy
    run_main(chain, tmp_path / "slow", monkeypatch, episodes=16, ema=1.0)
    checkpoint = torch.load(tmp_path / "slow" / "ppo.pt")
    assert same(checkpoint["weights"], seen.rollouts[0][0])  # decay 1: it never left the start
    assert not same(checkpoint["policy"], seen.rollouts[0][0])


def test_dropout_is_off_in_policy_and_reference(tmp_path, chain):
    """J10: even for a checkpoint trained with dropout, and even if someone calls train()."""
    gpt = tiny_gpt(dropout=0.5)
    tokenizer = SimpleNamespace(state=lambda: {})
    save_tiny(tmp_path / "p.pt", "policy", gpt, tokenizer)
    loaded, _ = model.load_policy(str(tmp_path / "p.pt"), "", torch.device("cpu"))
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert not loaded.training
    torch.testing.assert_close(loaded(tokens), gpt(tokens))
    assert torch.equal(loaded.train()(tokens), loaded(tokens))


def test_a_rollout_may_be_a_single_response(chain, tmp_path, monkeypatch):
    run_main(chain, tmp_path, monkeypatch, rollout_size=1, minibatch_size=1, episodes=2)
    assert [row["episodes"] for row in log_rows(tmp_path)] == [1, 2]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(chain, tmp_path, monkeypatch):
    """A learning rate of 1e30 spoils the weights in the first iteration,
    after which a checkpoint would be due."""
    with pytest.raises(SystemExit, match="the loss is (nan|inf|-inf) at step 1"):
        run_main(chain, tmp_path, monkeypatch, lr=1e30, save_seconds=0.0)
    assert not (tmp_path / "ppo.pt").exists()


@pytest.mark.parametrize("flags, message", [
    (dict(rollout_size=30, minibatch_size=8), "--rollout_size=30 is not a multiple of --minibatch_size=8"),
    (dict(episodes=10, rollout_size=16), "--episodes=10 is less than one rollout of 16"),
    (dict(reward="gold"), "--reward=gold needs the miniature world"),
])
def test_flags_that_do_not_go_together_end_in_one_line(chain, tmp_path, flags, message):
    flags = {"rollout_size": 16, "minibatch_size": 8, "episodes": 64, **flags}
    with pytest.raises(SystemExit, match=message):
        ppo.main(ppo.Config(scale="tiny", data=str(chain), out=str(tmp_path), **flags))
