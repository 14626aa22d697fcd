"""Tests of ppo.py: the mathematics, one rollout and one update, the loop."""

import copy
import inspect
import shutil
from types import SimpleNamespace

import pytest
import torch

import model
import ppo
import reward
import sft
from conftest import close, load, rows_of, same, save_tiny, tiny_gpt, tiny_scalar, weights_of


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def ones(rows):
    return torch.ones_like(rows, dtype=torch.bool)


# L9: a response of four tokens, the running example of the first sections
LOGPROBS = f64([-1.2, -0.7, -2.0, -0.3])
REF_LOGPROBS = f64([-1.0, -0.9, -1.5, -0.4])
REWARDS = f64([0.004, -0.004, 0.010, 1.498])
VALUES = f64([0.5, 0.6, 0.8, 1.0])
# the example in two rows of a batch: behind prompts of one token and of three, before padding
MASK = torch.tensor([[True] * 4 + [False] * 3, [False] * 2 + [True] * 4 + [False]])


def in_rows(example, filler=-1e3):
    """The example where MASK is True, elsewhere what must not count -> (2, 7)."""
    return torch.full(MASK.shape, filler, dtype=torch.float64).masked_scatter(MASK, example.repeat(2, 1))


# -- the mathematics, by hand --------------------------------------------------------------------------------


def test_kl_shaped_rewards_by_hand():
    """L9: -0.02 * (-1.2 + 1.0) = 0.004, -0.02 * 0.2 = -0.004, -0.02 * -0.5 = 0.010,
    -0.02 * 0.1 + 1.5 = 1.498. J15: the score stands on the last action alone, whose column differs; rewards
    sum to score - beta * kl."""
    scores, given = f64(1.5, -2.0), (in_rows(LOGPROBS), in_rows(REF_LOGPROBS, 0.0), MASK)
    rewards, expected = ppo.kl_shaped_rewards(scores, *given, 0.02), in_rows(REWARDS, 0.0)
    expected[1, 5] -= 1.5 + 2.0
    close(rewards, expected, 1e-9)
    close(rewards.sum(1), scores - 0.02 * -0.4, 1e-9)
    # of eot alone, behind a prompt of one token
    alone = ppo.kl_shaped_rewards(f64(1.5), f64([-1, 9]), f64([-1, 0]), torch.tensor([[True, False]]), 0.02)
    close(alone, [[1.5, 0.0]])


@pytest.mark.parametrize("gamma, lam, expected", [
    # L10: delta = [0.004 + 0.6 - 0.5, -0.004 + 0.8 - 0.6, 0.010 + 1.0 - 0.8, 1.498 - 1.0]
    # = [0.104, 0.196, 0.210, 0.498]; from the end: 0.498, 0.210 + 0.95 * 0.498 = 0.6831,
    # 0.196 + 0.95 * 0.6831 = 0.844945, 0.104 + 0.95 * 0.844945 = 0.906698
    (1.0, 0.95, [0.906698, 0.844945, 0.683100, 0.498000]),
    (1.0, 1.0, [1.008, 0.904, 0.708, 0.498]),  # L11: the sum of future rewards minus the value
    (1.0, 0.0, [0.104, 0.196, 0.210, 0.498]),  # L11: the one-step error
    # delta = [0.004 + 0.9 * 0.6 - 0.5, -0.004 + 0.9 * 0.8 - 0.6, 0.010 + 0.9 * 1.0 - 0.8, 1.498 - 1.0]
    # = [0.044, 0.116, 0.110, 0.498]; 0.498, 0.110 + 0.45 * 0.498 = 0.3341,
    # 0.116 + 0.45 * 0.3341 = 0.266345, 0.044 + 0.45 * 0.266345 = 0.163855
    (0.9, 0.5, [0.163855, 0.266345, 0.334100, 0.498000]),
])
def test_gae_by_hand(gamma, lam, expected):
    """GAE eq. 16. J16: on the response alone, whatever stands in the masked columns, which are 0 at last."""
    advantages, returns = ppo.gae(in_rows(REWARDS), in_rows(VALUES), MASK, gamma, lam)
    close(advantages, in_rows(f64(expected), 0.0), 1e-6)
    close(returns, in_rows(f64(expected) + VALUES, 0.0), 1e-6)


@pytest.mark.parametrize("rows, shift_mean, expected", [
    # L13, J18: the advantages of L10, population variance. The unbiased one would give 0.948387 first
    ([[0.90669775, 0.844945, 0.6831, 0.498]], True, [[1.095103, 0.705357, -0.316111, -1.484350]]),
    # L14, J17: mean 1.6, population std 0.258199; 1.6 + (1.2 - 1.6) / 0.258199 = 0.050807
    ([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], False,
     [[0.050807, 0.438105, 0.825403], [1.212702, 1.6, 1.987298], [2.374597, 2.761895, 3.149193]]),
    # L15: 1, 2, 3, 4 have mean 2.5 and variance 1.25. With the two pads as zeros the first would be -0.447214
    ([[1, 2, 3], [4]], True, [[-1.341641, -0.447214, 0.447214], [1.341641, 0, 0]]),
    ([[3, 3, 3], [3]], True, [[0, 0, 0], [0, 0, 0]]),  # and not nan
])
def test_whiten_by_hand(rows, shift_mean, expected):
    for pad in (0.0, 99.0):
        pads = [[pad] * (len(rows[0]) - len(row)) for row in rows]
        x = f64(*(row + more for row, more in zip(rows, pads)))
        mask = torch.tensor([[True] * len(row) + [False] * len(more) for row, more in zip(rows, pads)])
        close(ppo.whiten(x, mask, shift_mean), expected, 1e-6)


@pytest.mark.parametrize("advantages, ratios, masked, expected, share, slopes", [
    ([1], [1.3], [], -1.2, 1, [0]), ([1], [0.7], [], -0.7, 0, [-1]), ([-1], [1.3], [], 1.3, 0, [1]),
    ([-1], [0.7], [], 0.8, 1, [0]), ([2], [1.1], [], -2.2, 0, [-2]), ([-0.5], [1], [], 0.5, 0, [0.5]),
    # the first four in one row: (-1.2 - 0.7 + 1.3 + 0.8) / 4; the first and the last are clipped
    ([1, 1, -1, -1], [1.3, 0.7, 1.3, 0.7], [], 0.05, 1 / 2, [0, -1, 1, 0]),
    # (-1.2 - 0.7 + 1.3) / 3; the third is outside the range too, but on the side that is not clipped
    ([1, 1, -1, -1], [1.3, 0.7, 1.3, 0.7], [3], -0.2, 1 / 3, [0, -1, 1, 0]),
    ([1, 1, -1, -1], [1.3, 0.7, 1.3, 0.7], [1], 0.3, 2 / 3, [0, 0, 1, 0]),  # (-1.2 + 1.3 + 0.8) / 3
])
def test_policy_loss_and_clipfrac_by_hand(advantages, ratios, masked, expected, share, slopes):
    """L16, cliprange 0.2: only a move that has already gone 0.2 the favourable way stops being rewarded. Both
    are means over unmasked tokens. slopes are d loss / d ratio of a token alone; the derivative by its
    log-probability is ratio times that."""
    new_logprobs, mask = f64(ratios).log().requires_grad_(), ones(f64(ratios))
    mask[:, masked] = False
    loss, clipfrac = ppo.policy_loss(new_logprobs, f64([0.0] * len(ratios)), f64(advantages), mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    assert clipfrac.item() == pytest.approx(share, abs=1e-6)
    close(new_logprobs.grad, f64(slopes) * f64(ratios) / mask.sum(), 1e-9)


@pytest.mark.parametrize("new, target, expected, slopes", [
    # L17: 1.0 is kept to 0.7; errors (1.0 - 1.2)^2 = 0.04 and (0.7 - 1.2)^2 = 0.25, half the larger: 0.125; it
    # left the range towards the return, and the clipped error does not depend on it
    ([1.0], [1.2], 0.125, [0]),
    ([1.0], [0.6], 0.08, [0.4]),  # errors (1.0 - 0.6)^2 = 0.16 and (0.7 - 0.6)^2 = 0.01; half of 0.16
    ([0.4], [1.0], 0.18, [-0.6]),  # within 0.2 of the old value: 0.5 * (0.4 - 1.0)^2
    # a mean: (0.125 + 0.18) / 2, without a masked token that is far off
    ([1.0, 0.4, 50.0], [1.2, 1.0, -50.0], 0.1525, [0, -0.3, 0]),
])
def test_value_loss_by_hand(new, target, expected, slopes):
    """The old value is 0.5; slopes: d loss / d new value."""
    new = f64(new).requires_grad_()
    loss = ppo.value_loss(new, torch.full_like(new, 0.5), f64(target), new < 50, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    close(new.grad, [slopes], 1e-9)


def test_explained_variance_of_perfect_constant_and_opposite_values():
    returns, mask = f64([1.0, 2.0, 3.0, 77.0]), torch.tensor([[True, True, True, False]])
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert ppo.explained_variance(f64([5.0, 5.0, 5.0, 0.0]), returns, mask) == pytest.approx(0)
    # errors -2, 0, 2: 4 times
    assert ppo.explained_variance(f64([3.0, 2.0, 1.0, 0.0]), returns, mask) == pytest.approx(-3)


def test_kl_estimates_by_hand_and_unbiased():
    """L18: k1 = [-0.2, 0.2, -0.5, 0.1], sum -0.4. k3 with r = e^0.2, e^-0.2, e^0.5, e^-0.1: [0.021403, 0.018731,
    0.148721, 0.004837], sum 0.193692. L19, by enumeration: the mean over the policy's own actions of k1 and of k3
    is KL(policy || ref) = 0.025267. k3 with r upside down has the mean 0.024733, KL(ref || policy) is 0.025815."""
    estimates = ppo.kl_estimates(in_rows(LOGPROBS), in_rows(REF_LOGPROBS, 0.0), MASK)
    for found, one in zip(estimates, (-0.4, 0.193692)):
        close(found, [one, one], 1e-6)
    policy, ref = f64([0.5], [0.3], [0.2]), f64([0.4], [0.4], [0.2])  # one action a row
    exact = (policy * (policy / ref).log()).sum().item()
    assert exact == pytest.approx(0.025267, abs=1e-6)
    for estimate in ppo.kl_estimates(policy.log(), ref.log(), ones(policy)):
        assert (policy.flatten() * estimate).sum().item() == pytest.approx(exact, abs=1e-9)


def test_ema_by_hand():
    """L24: 1 toward 2 with decay 0.992: 1.008 after one step, 1.008 * 0.992 + 0.016 = 1.015936 after two,
    2 - 0.992^125 after 125."""
    ema, weights = (torch.nn.ParameterList([f64(x)]) for x in (1.0, 2.0))
    found = []
    for _ in range(125):
        ppo.update_ema(ema, weights, 0.992)
        found.append(ema[0].item())
    assert (found[0], found[1], found[124]) == pytest.approx((1.008, 1.015936, 1.633597), abs=1e-6)
    assert weights[0].item() == 2.0


# -- one iteration: the next three functions call it; the tests behind them do not know what it is given -----

EOT = 3
TOKENIZER = SimpleNamespace(eot=EOT)
PROMPTS = [[1, 2], [4, 5, 6, 7], [8], [3, 9], [1, 2], [10, 10, 10]] * 3
PTX = (torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]), torch.tensor([[True, True, True], [True, True, False]]))


def roll(is_mixed=True, **flags):
    """One rollout of PROMPTS by tiny_gpt(1) beside the reference tiny_gpt(2), judged by tiny_scalar(3) ->
    batch. Some of the responses end, the others are cut, or tests see nothing."""
    config, luck = ppo.Config(max_new_tokens=6, **flags), torch.Generator().manual_seed(2)
    judge = reward.model_judge(tiny_scalar(3))
    batch, _ = ppo.rollout(tiny_gpt(1), tiny_gpt(2), judge, PROMPTS, TOKENIZER, config, luck)
    assert 3 < int(batch["ended"].sum()) < len(PROMPTS) - 3 or not is_mixed
    return batch


def earn(batch, **flags):
    """The batch of a rollout, and what its actions earned, of which tiny_scalar(4) has the values."""
    return {**batch, **ppo.credit(batch, tiny_scalar(4), ppo.Config(**flags))}


def learner(**flags):
    """The moving parts of an update: step() learns from the first eight rows of a batch -> numbers."""
    config = ppo.Config(**{"grad_clip": 1e9, "lr": 1e-3, "value_lr": 1e-3, **flags})
    policy, ema, value_model = tiny_gpt(1), tiny_gpt(1), tiny_scalar(4)
    optimizer, value_optimizer = sft.adamw(policy, config.lr), sft.adamw(value_model, config.value_lr)

    def step(batch, ptx=None, factor=1.0):
        minibatch = {name: x[:8] for name, x in batch.items()}
        numbers = ppo.update_policy(policy, ema, optimizer, minibatch, ptx, factor, config)
        numbers.update(ppo.update_value(value_model, value_optimizer, minibatch, factor, config))
        return {name: x.item() for name, x in numbers.items()}

    networks = dict(policy=policy, ema=ema, value_model=value_model)
    return SimpleNamespace(step=step, optimizer=optimizer, value_optimizer=value_optimizer, **networks)


@pytest.fixture(autouse=True)
def several_forwards(monkeypatch):
    """Of the 18 rows of a rollout, and of the eight rows of an update."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", 30)


@pytest.mark.parametrize("temperature, filler", [(1.0, 0), (0.7, 7)])
def test_rollout_by_full_forwards_of_each_row_alone(monkeypatch, temperature, filler):
    """J5: the mask holds the response with its eot. J1, J4, J13: the score is read at the last token of
    prompt and response, and neither what stands behind nor a penalty moves it. J9, J12: log-probabilities of
    policy and reference are those of the distribution that was sampled. J26: all is constant for the update."""
    generate, reward_model = model.generate, tiny_scalar(3)

    def filled(*args):
        tokens, lengths = generate(*args)
        return tokens.masked_fill(torch.arange(tokens.size(1)) >= lengths[:, None], filler), lengths

    monkeypatch.setattr(model, "generate", filled)
    batch = earn(roll(temperature=temperature), eot_penalty=5.0)
    for b, prompt in enumerate(PROMPTS):
        row = batch["tokens"][b : b + 1, : batch["lengths"][b]]
        columns, actions = list(range(len(prompt) - 1, row.size(1) - 1)), row[0, len(prompt) :].tolist()
        assert batch["mask"][b].nonzero().flatten().tolist() == columns
        assert (actions[-1] == EOT) == bool(batch["ended"][b]) and EOT not in actions[:-1]
        close(batch["scores"][b], reward_model(row)[0, -1], 1e-5)
        for network, name in ((tiny_gpt(1), "logprobs"), (tiny_gpt(2), "ref_logprobs")):
            log_pi = (network(row)[0] / temperature).log_softmax(-1)
            close(batch[name][b, columns], log_pi[columns, actions], 1e-5)
    assert not any(x.requires_grad for x in batch.values())


def test_responses_are_sampled_at_the_temperature_of_the_config():
    """J9: near temperature 0 sampling is greedy."""
    batch = roll(temperature=1e-4, is_mixed=False)
    assert torch.equal(batch["tokens"], model.generate(tiny_gpt(1), PROMPTS, 6, 0, EOT)[0])


def test_returns_are_taken_before_whitening_and_advantages_after():
    """J18: with lambda 1 and no discount a return is the plain sum of the rewards from there on, on the scale
    of the score; J14: minus the penalty where there is no eot. Advantages are returns - values, then zero mean
    and unit population variance over the response tokens of the rollout."""
    batch = earn(roll(), beta=0.1, lam=1.0, eot_penalty=5.0)
    mask, raw = batch["mask"], batch["returns"] - batch["values"]
    kl = (batch["logprobs"] - batch["ref_logprobs"]) * mask
    expected = (batch["scores"] - 5.0 * ~batch["ended"])[:, None] - 0.1 * kl.flip(1).cumsum(1).flip(1)
    close(batch["returns"][mask], expected[mask], 1e-4)
    close(batch["advantages"][mask], (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0), 1e-4)


# -- one update ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(temperature):
    """J9, J11: the log-probabilities of rollout and update agree before anything is learnt. The second time,
    they do not: the number can move."""
    batch, learn = earn(roll(temperature=temperature)), learner(temperature=temperature)
    first, second = learn.step(batch), learn.step(batch)
    assert abs(first["max_ratio"] - 1) < 1e-5
    assert abs(first["approx_kl"]) < 1e-9 and first["clipfrac"] == 0
    assert second["max_ratio"] > 1.001 and second["approx_kl"] > 1e-8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_step_with_the_sum_of_both_gradients(temperature):
    """J28, eq. 2: Adam sees g_ppo + ptx_coef * g_ptx, once, at the peak of the learning rate times the factor,
    and no gradient is kept. J9: g_ppo at the sampling temperature."""
    learn = learner(ptx_coef=2.5, lr=1e-3, temperature=temperature)
    batch, policy, seen, rates = earn(roll(temperature=temperature)), learn.policy, [], []
    parameters = list(policy.parameters())
    tokens, mask, logprobs, advantages = (
        batch[name][:8] for name in ("tokens", "mask", "logprobs", "advantages")
    )
    new_logprobs = model.token_logprobs(policy(tokens), tokens, temperature) * mask
    loss, _ = ppo.policy_loss(new_logprobs, logprobs, advantages, mask, 0.2)
    g_ppo, g_ptx = (torch.autograd.grad(x, parameters) for x in (loss, sft.lm_loss(policy, *PTX)))
    learn.optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in parameters]))
    learn.optimizer.register_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    learn.step(batch, PTX, factor=0.1)
    assert len(seen) == 1 and rates == [1e-4]
    for found, of_ppo, of_ptx in zip(seen[0], g_ppo, g_ptx):
        close(found, of_ppo + 2.5 * of_ptx, 1e-4)
    for network in (policy, learn.ema):
        assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_the_value_model_moves_towards_the_returns_and_the_policy_does_not_notice():
    """values[:, t] has read tokens[:, :t + 1] and not the action tokens[:, t + 1]. J19: one hundred steps on one
    rollout, at half the learning rate. The first loss is half the mean squared error of its values: new values
    are read in the columns of the old. J20: with advantages 0 and no text the policy stays, to the bit."""
    batch, learn = earn(roll()), learner(value_lr=6e-3, cliprange_value=1e9)
    for b, t in batch["mask"].nonzero().tolist():
        close(batch["values"][b, t], learn.value_model(batch["tokens"][b : b + 1, : t + 1])[0, -1], 1e-5)
    assert not any(batch[name][~batch["mask"]].any() for name in ("values", "advantages", "returns"))
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    losses = [learn.step(batch, factor=0.5)["value_loss"] for _ in range(101)]
    assert learn.value_optimizer.param_groups[0]["lr"] == 3e-3
    assert all(p.grad is None or not p.grad.any() for p in learn.value_model.parameters())
    assert same(learn.policy.state_dict(), tiny_gpt(1).state_dict())
    expected = 0.5 * ((batch["values"] - batch["returns"])[:8][batch["mask"][:8]] ** 2).mean()
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4) and losses[-1] < 0.2 * losses[0]


# -- the loop, on the untrained checkpoints of `chain` -------------------------------------------------------


def config_of(chain, out, **flags):
    defaults = dict(episodes=32, rollout_size=16, minibatch_size=4, max_new_tokens=8, warmup=2, log_every=1)
    flags = dict(data=str(chain), out=str(out), from_=str(chain)) | defaults | flags
    return ppo.Config(scale="tiny", device="cpu", **flags)


def train(chain, out, **flags):
    """One run of the loop -> its log, and what each call of its parts was given: copies, by name."""
    seen = SimpleNamespace(rollout=[], credit=[], update_policy=[])
    copied = lambda x: copy.deepcopy(x) if isinstance(x, torch.nn.Module) else x

    def watch(name):
        function = getattr(ppo, name)

        def watched(*args):
            getattr(seen, name).append(dict(zip(inspect.signature(function).parameters, map(copied, args))))
            returned = function(*args)
            if name == "rollout":  # a number that goes with its row into the minibatches
                returned[0]["row"] = torch.arange(len(returned[0]["tokens"]))
            return returned

        return watched

    out.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in vars(seen):
            patch.setattr(ppo, name, watch(name))
        ppo.train(config_of(chain, out, **flags))
    seen.log = rows_of(out / "ppo.jsonl")
    return seen


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    """Four iterations of two passes over 16 responses in minibatches of 4."""
    return train(chain, tmp_path_factory.mktemp("run"), episodes=64, ppo_epochs=2)


def test_every_response_is_used_once_per_pass_and_every_prompt_before_any_comes_again(run):
    """J27: in another order each time."""
    minibatches, passes = [given["minibatch"] for given in run.update_policy], []
    for i in range(0, 32, 4):
        batch, four = run.credit[i // 8]["batch"], minibatches[i : i + 4]
        rows = torch.cat([m["row"] for m in four])
        assert all(torch.equal(torch.cat([m[name] for m in four]), batch[name][rows]) for name in batch)
        passes.append(tuple(rows.tolist()))
    assert all(sorted(rows) == list(range(16)) for rows in passes) and len(set(passes)) == 8
    assert {len(m["row"]) for m in minibatches} == {4} and len(minibatches) == 32
    prompts = [tuple(prompt) for given in run.rollout for prompt in given["prompts"]]
    n = len(set(prompts))
    assert 16 < len(prompts) - n and all(len(set(prompts[i : i + n])) == n for i in range(0, 65 - n, n))


def test_reference_and_judge_stay_over_a_run(chain, run):
    """J26, to the bit."""
    states = lambda calls, name: [given[name].state_dict() for given in calls]
    (policy, *_, new_policy), refs = states(run.rollout, "policy"), states(run.rollout, "ref")
    assert all(same(x, weights_of(chain / "ppo_init.pt")) for x in (policy, *refs))
    assert not same(policy, new_policy)
    assert not any(given[name].training for given in run.rollout for name in ("policy", "ref"))
    reward_model, _ = load(chain, "reward", "reward")
    row = torch.tensor([[5, 6, 7]]), torch.tensor([1]), torch.tensor([3])
    assert run.rollout[-1]["judge"](*row) == reward.model_judge(reward_model)(*row)


def test_the_value_model_starts_as_a_copy_of_the_reward_model(chain, run):
    """J3, to the bit, and it learns."""
    first, *_, last = (given["value_model"].state_dict() for given in run.credit)
    assert same(first, weights_of(chain / "reward.pt")) and not same(first, last)
    assert "explained_variance" in run.log[0]


def test_the_learning_rate_is_constant_after_the_warmup(run):
    """J24, L23 with a warm-up of 2 iterations: 0.1, 0.1 + 0.9 / 2, 1, 1; eight minibatches each."""
    factors = [given["factor"] for given in run.update_policy]
    assert factors == pytest.approx([0.1] * 8 + [0.55] * 8 + [1.0] * 16)


def test_another_reference_is_only_what_the_kl_is_measured_against(chain, tmp_path):
    """--ref: the policy starts from the PPO initialisation all the same, and its first ratio is 1 (J11), also
    when the sampling temperature is not."""
    tokenizer = load(chain, "base")[1]
    other = tiny_gpt(5, vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    save_tiny(tmp_path / "other.pt", "policy", other, tokenizer)
    seen = train(chain, tmp_path, ref=str(tmp_path / "other.pt"), temperature=0.7)
    assert same(seen.rollout[0]["policy"].state_dict(), weights_of(chain / "ppo_init.pt"))
    assert same(seen.rollout[0]["ref"].state_dict(), other.state_dict())
    assert seen.log[0]["kl"] != 0 and seen.log[0]["first_ratio"] == pytest.approx(1, abs=1e-5)


def test_bfloat16_activations_hold_the_first_ratio_near_one(chain, tmp_path, dtypes):
    """Rows that stand in another forward than in the rollout may round otherwise."""
    seen = train(chain, tmp_path, dtype="bfloat16")
    assert len(dtypes) == 2 * (1 + 3 * 4) and set(dtypes) == {"bfloat16"}  # rollout; policy, text, value model
    logprobs = seen.credit[-1]["batch"]["logprobs"]
    assert logprobs.dtype == torch.float32 and not torch.equal(logprobs, logprobs.bfloat16().float())
    assert all(abs(row["first_ratio"] - 1) < 0.1 for row in seen.log)
    found = torch.load(tmp_path / "ppo.pt")
    assert all(w.dtype == torch.float32 for name in ("policy", "value_model") for w in found[name].values())


def test_a_persistently_negative_kl_is_reported(chain, tmp_path, monkeypatch, capsys):
    """J30: a mean of -1 nat a response; the warning comes after iteration 5."""
    monkeypatch.setattr(ppo, "kl_estimates", lambda *_: (torch.tensor([-1.0]), torch.tensor([0.5])))
    train(chain, tmp_path, episodes=16 * 6, ptx_coef=0.0)
    assert capsys.readouterr().out.count("is negative") == 1


def test_the_checkpoint_holds_the_moving_average(chain, tmp_path):
    """The paper evaluates the average; the raw policy is kept beside it for going on. A rollout may be a
    single response."""
    start = weights_of(chain / "ppo_init.pt")
    for ema, name in ((0.0, "quick"), (1.0, "slow")):
        log = train(chain, tmp_path / name, rollout_size=1, minibatch_size=1, episodes=2, ema=ema).log
        assert [row["episodes"] for row in log] == [1, 2]
        found = torch.load(tmp_path / name / "ppo.pt")
        # decay 0: the average is the last policy; decay 1: it never left the start
        assert same(found["weights"], found["policy"] if name == "quick" else start)
        assert not same(found["policy"], start)


def test_a_reward_of_your_own(chain, tmp_path, capsys):
    """--reward=FILE.py: whole numbers of texts; no reward model is needed or made, from chain to table. The
    value model has a head of its own, a function of the seed. A file that has changed since is noticed."""
    (tmp_path / "mine.py").write_text("def reward(prompts, responses):\n    return list(map(len, responses))\n")
    shutil.copytree(chain, tmp_path / "earlier", ignore=shutil.ignore_patterns("reward.pt"))
    flags = dict(reward=str(tmp_path / "mine.py"), from_=str(tmp_path / "earlier"))
    for name in ("a", "b"):
        torch.rand(5)
        ppo.main(config_of(chain, tmp_path / name, **flags))
        assert (tmp_path / name / "table.json").exists() and not (tmp_path / name / "reward.pt").exists()
    assert same(weights_of(tmp_path / "a" / "ppo.pt"), weights_of(tmp_path / "b" / "ppo.pt"))
    row = rows_of(tmp_path / "a" / "ppo.jsonl")[0]
    assert row["score"] * 16 == round(row["score"] * 16) > 16  # a mean of 16 lengths
    ppo.train(config_of(chain, tmp_path / "a", **flags))
    assert "warning" not in capsys.readouterr().out
    (tmp_path / "mine.py").write_text("def reward(prompts, responses):\n    return [0.0] * len(prompts)\n")
    ppo.train(config_of(chain, tmp_path / "a", **flags))
    assert "ppo.pt was made by other code: --fresh makes it anew" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(chain, tmp_path):
    """A learning rate of 1e30 spoils the weights in the first iteration,
    after which a checkpoint would be due."""
    with pytest.raises(SystemExit, match="the loss is (nan|inf|-inf) at step 1"):
        train(chain, tmp_path, lr=1e30, save_seconds=0.0)
    assert not (tmp_path / "ppo.pt").exists()
