"""Tests of reward.py: eq. 1, and the scores it is computed from."""

import json
import math
import random

import pytest
import torch

import data
import model
import reward
from conftest import tiny_gpt, tiny_scalar

# L2: scores of four responses, best to worst. Differences and their -log sigmoid(d) = log(1 + e^-d):
#   (1,2) 0.8 -> 0.371101   (1,3) 1.5 -> 0.201413   (1,4) 2.3 -> 0.095545
#   (2,3) 0.7 -> 0.403186   (2,4) 1.5 -> 0.201413   (3,4) 0.8 -> 0.371101   sum 1.643759, mean 0.273960
SCORES = [1.2, 0.4, -0.3, -1.1]


def loss(scores, ranks):
    """ranking_loss of one prompt, in float64."""
    return float(reward.ranking_loss(torch.tensor([scores], dtype=torch.float64), torch.tensor([ranks])))


# ------------------------------------------------------------------------------------------------------------
# eq. 1


def test_ranking_loss_by_hand():
    assert loss(SCORES, [1, 2, 3, 4]) == pytest.approx(0.273960, abs=1e-6)


def test_ranking_loss_of_the_reversed_ranking():
    """L2: log(1 + e^d) = d + log(1 + e^-d), so the mean grows by the mean difference 7.6 / 6:
    0.273960 + 1.266667."""
    assert loss(SCORES, [4, 3, 2, 1]) == pytest.approx(1.540627, abs=1e-6)


def test_ranking_loss_falls_when_right_scores_are_spread():
    assert loss([2 * s for s in SCORES], [1, 2, 3, 4]) == pytest.approx(0.115899, abs=1e-6)


def test_ranking_loss_gradient_by_hand():
    """L2: d loss / d s1 = -(sigmoid(-0.8) + sigmoid(-1.5) + sigmoid(-2.3)) / 6 = -0.583575 / 6."""
    scores = torch.tensor([SCORES], dtype=torch.float64, requires_grad=True)
    reward.ranking_loss(scores, torch.tensor([[1, 2, 3, 4]])).backward()
    expected = torch.tensor([[-0.097262, -0.034035, 0.034035, 0.097262]], dtype=torch.float64)
    torch.testing.assert_close(scores.grad, expected, atol=1e-6, rtol=0)


def test_gradient_sums_to_zero():
    """Only differences count, so nothing pushes all scores of a prompt up or down."""
    torch.manual_seed(0)
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[1, 2, 3, 4, 5, 6], [2, 2, 1, 3, 0, 0], [3, 1, 2, 4, 0, 0]])
    reward.ranking_loss(scores, ranks).backward()
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (scores.grad.abs().sum(1) > 0.01).all()


def test_adding_a_constant_to_all_scores_changes_nothing():
    """L3."""
    assert loss([s + 10 for s in SCORES], [1, 2, 3, 4]) == pytest.approx(0.273960, abs=1e-6)


def test_tied_pairs_are_dropped_from_the_sum_and_from_the_divisor():
    """L4: without (2,3), 1.643759 - 0.403186 = 1.240573,
    over the 5 pairs that are left (over 6 it would be 0.206762)."""
    assert loss(SCORES, [1, 2, 2, 3]) == pytest.approx(0.248115, abs=1e-6)


def test_eq_1_is_not_the_cross_entropy_of_the_best():
    """L5: Ziegler's loss for the best of four, -log softmax(scores)[0] = 0.572514, is another one."""
    ziegler = -torch.log_softmax(torch.tensor(SCORES, dtype=torch.float64), 0)[0]
    assert float(ziegler) == pytest.approx(0.572514, abs=1e-6)
    assert abs(loss(SCORES, [1, 2, 3, 4]) - float(ziegler)) > 0.1


def test_every_prompt_weighs_the_same_however_many_pairs_it_has():
    """L6: 0.273960 with 6 pairs and 0.232432 with 36: mean over prompts 0.253196;
    over the 42 pairs it would be 0.238364."""
    scores = torch.zeros(2, 9, dtype=torch.float64)
    scores[0, :4] = torch.tensor(SCORES)
    scores[1] = torch.linspace(2, -2, 9, dtype=torch.float64)
    ranks = torch.tensor([[1, 2, 3, 4, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert float(reward.ranking_loss(scores[1:], ranks[1:])) == pytest.approx(0.232432, abs=1e-6)
    assert float(reward.ranking_loss(scores, ranks)) == pytest.approx(0.253196, abs=1e-6)


@pytest.mark.parametrize("K", range(2, 10))
def test_equal_scores_cost_ln_2_for_every_k(K):
    """The mean over the pairs is taken once: divided twice, or not at all, it would depend on K."""
    assert loss([0.7] * K, list(range(1, K + 1))) == pytest.approx(math.log(2), abs=1e-12)


def test_ranking_loss_as_a_double_loop():
    rng = random.Random(0)
    torch.manual_seed(0)
    scores = torch.randn(40, 6, dtype=torch.float64)
    ranks = [[rng.randint(0, 4) for _ in range(6)] for _ in range(40)]  # ties, and empty slots anywhere
    per_prompt = []
    for row, row_ranks in zip(scores.tolist(), ranks):
        pairs = []
        for w in range(6):
            for l in range(6):
                if 0 < row_ranks[w] < row_ranks[l]:
                    pairs.append(math.log(1 + math.exp(-(row[w] - row[l]))))
        if pairs:
            per_prompt.append(sum(pairs) / len(pairs))
    expected = sum(per_prompt) / len(per_prompt)
    assert float(reward.ranking_loss(scores, torch.tensor(ranks))) == pytest.approx(expected, abs=1e-12)


def test_an_empty_slot_is_never_compared():
    alone = loss(SCORES[:2], [1, 2])
    assert loss(SCORES[:2] + [100.0, -100.0], [1, 2, 0, 0]) == pytest.approx(alone, abs=1e-12)


def test_the_order_of_the_slots_does_not_matter():
    shuffled = [SCORES[i] for i in (2, 0, 3, 1)]
    assert loss(shuffled, [3, 1, 4, 2]) == pytest.approx(loss(SCORES, [1, 2, 3, 4]), abs=1e-12)


def test_a_prompt_of_ties_only_is_left_out_of_the_mean():
    scores = torch.tensor([SCORES, [5.0, 1.0, 0.0, 2.0]], dtype=torch.float64)
    both = reward.ranking_loss(scores, torch.tensor([[1, 2, 3, 4], [1, 1, 1, 1]]))
    assert float(both) == pytest.approx(0.273960, abs=1e-6)


def test_a_batch_of_ties_only_has_loss_and_gradient_zero():
    scores = torch.tensor([SCORES], dtype=torch.float64, requires_grad=True)
    tied = reward.ranking_loss(scores, torch.tensor([[1, 1, 1, 1]]))
    tied.backward()
    assert tied.item() == 0 and (scores.grad == 0).all()


# ------------------------------------------------------------------------------------------------------------
# scores


def fresh_reward_model():
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(50, 32, n_layer=2, n_head=2, n_embd=64))
    return model.ScalarGPT.from_gpt(gpt)


def test_a_fresh_reward_model_scores_of_order_one():
    """J2: head std 1/sqrt(C+1) on C channels of unit variance (after the last LayerNorm)."""
    tokens = torch.randint(50, (200, 20))
    scores = reward.score(fresh_reward_model(), tokens, torch.full((200,), 20))
    assert 0.05 < scores.abs().mean().item() < 3


def test_a_fresh_reward_model_loses_about_ln_2():
    """J2: it cannot tell responses apart yet; a saturated sigmoid would cost several nats."""
    torch.manual_seed(1)
    tokens = torch.randint(50, (400, 20))
    scores = reward.score(fresh_reward_model(), tokens, torch.full((400,), 20)).view(100, 4)
    found = reward.ranking_loss(scores, torch.tensor([[1, 2, 3, 4]]).expand(100, 4)).item()
    assert abs(found - math.log(2)) < 0.3


def test_score_is_read_at_the_last_real_token():
    """J4: not at the end of the padded row, not one token early."""
    scalar = tiny_scalar()
    tokens, lengths = model.pad([[1, 2, 3, 4, 5], [6, 7, 8]])
    everywhere = scalar(tokens)
    torch.testing.assert_close(
        reward.score(scalar, tokens, lengths), torch.stack([everywhere[0, 4], everywhere[1, 2]])
    )
    alone = scalar(torch.tensor([[6, 7, 8]]))[0, -1]
    torch.testing.assert_close(reward.score(scalar, tokens, lengths)[1], alone)


def test_more_padding_leaves_the_score_unchanged():
    """J4."""
    scalar = tiny_scalar().double()
    tokens, lengths = model.pad([[1, 2, 3, 4, 5], [6, 7, 8]])
    padded = torch.nn.functional.pad(tokens, (0, 7), value=9)
    torch.testing.assert_close(
        reward.score(scalar, padded, lengths), reward.score(scalar, tokens, lengths), atol=1e-12, rtol=0
    )


def test_the_same_response_after_two_prompts_scores_differently():
    """J1: the reward model reads prompt and response."""
    first, second = reward.score_rows(tiny_scalar(), [[1, 2, 7, 8, 9], [3, 4, 7, 8, 9]], torch.device("cpu"))
    assert abs((first - second).item()) > 1e-3


def test_score_rows_keeps_the_order_of_its_rows(monkeypatch):
    """Rows are scored in pieces of similar length; each must come back to its place."""
    scalar, rng = tiny_scalar().double(), random.Random(0)
    rows = [[rng.randrange(1, 11) for _ in range(rng.randint(1, 20))] for _ in range(23)]
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", 60)  # some four rows
    alone = torch.stack([scalar(torch.tensor([row]))[0, -1] for row in rows])
    torch.testing.assert_close(
        reward.score_rows(scalar, rows, torch.device("cpu")), alone, atol=1e-12, rtol=0
    )


# ------------------------------------------------------------------------------------------------------------
# comparisons in batches


class LastId(torch.nn.Module):
    """A reward model by hand: position t scores the id it stands on, so a row scores its last id."""

    def forward(self, tokens, where):
        return tokens[where].float()


GROUPS = [([[1, 5], [1, 3], [1, 1, 1, 4]], [1, 3, 2]), ([[2, 9], [2, 2, 8]], [2, 1])]


def test_comparisons_of_different_k_share_a_batch_with_empty_slots():
    scores, ranks = reward.score_groups(LastId(), GROUPS, torch.device("cpu"))
    assert scores.tolist() == [[5, 3, 4], [9, 8, 0]]
    assert ranks.tolist() == [[1, 3, 2], [2, 1, 0]]


def test_the_loss_of_a_batch_is_the_mean_of_its_prompts_alone():
    scalar = tiny_scalar()
    one = lambda groups: reward.ranking_loss(*reward.score_groups(scalar, groups, torch.device("cpu"))).item()
    assert one(GROUPS) == pytest.approx((one(GROUPS[:1]) + one(GROUPS[1:])) / 2, abs=1e-5)


def test_accuracy_is_the_share_of_untied_pairs_in_the_labelers_order():
    """First group: 5 > 4 > 3 as ranked, 3 of 3. Second: 9 scores above 8 but is ranked below, 0 of 1.
    A tie adds no pair."""
    tied = ([[1, 7], [1, 6]], [1, 1])
    assert reward.evaluate(LastId(), GROUPS + [tied], torch.device("cpu"))["accuracy"] == 3 / 4


def test_valid_loss_is_a_mean_over_prompts():
    """32 prompts with score difference 2 as ranked, log(1 + e^-2) = 0.126928 each, and one that is the wrong
    way round, log(1 + e^2) = 2.126928; (32 * 0.126928 + 2.126928) / 33 = 0.187534. A tied prompt counts
    nowhere."""
    right, wrong, tied = ([[1, 5], [1, 3]], [1, 2]), ([[1, 3], [1, 5]], [1, 2]), ([[1, 5], [1, 3]], [1, 1])
    for groups in ([right] * 32 + [wrong], [right] * 31 + [wrong, right] + [tied] * 40):
        found = reward.evaluate(LastId(), groups, torch.device("cpu"))
        assert found["valid_loss"] == pytest.approx(0.187534, abs=1e-6)


def tokenizer_of(chain):
    return data.Tokenizer.from_state(torch.load(chain / "sft.pt")["tokenizer"])


def test_comparisons_are_encoded_as_prompt_response_and_eot(chain):
    row = json.loads((chain / "comparisons.jsonl").read_text().splitlines()[0])
    tokenizer = tokenizer_of(chain)
    ((rows, ranks),) = reward.encode_comparisons(tokenizer, [row], 64)
    assert ranks == row["ranks"] and len(rows) == 4
    for ids, response in zip(rows, row["responses"]):
        assert ids == tokenizer.encode(row["prompt"]) + tokenizer.encode(response) + [tokenizer.eot]


def test_sampled_ids_are_not_encoded_again(chain):
    """A sampled text may fall into other tokens than those that were sampled;
    and one cut by the limit has no eot."""
    tokenizer = tokenizer_of(chain)
    row = dict(prompt="say cat\n", responses=["a", "b"], ranks=[1, 2], tokens=[[70, 71], [72, tokenizer.eot]])
    ((rows, _),) = reward.encode_comparisons(tokenizer, [row], 64)
    prompt = tokenizer.encode("say cat\n")
    assert rows == [prompt + [70, 71], prompt + [72, tokenizer.eot]]


# ------------------------------------------------------------------------------------------------------------
# what comparisons were collected with


def collected(tmp_path, seed=0, mixture={"sft": 0.4}, **flags):
    policies = dict(sft=tiny_gpt(seed), base=tiny_gpt(1))
    reward.check_collected(reward.Config(out=str(tmp_path), **flags), policies, mixture)


@pytest.mark.parametrize("other, named", [
    (dict(k_min=3), "--k_min: 4 there, 3 now"), (dict(seed=2), "weights of sft"),
    (dict(mixture={"sft": 0.5}), "mixture"),
])
def test_comparisons_of_other_flags_weights_or_mixture_are_refused(tmp_path, other, named):
    collected(tmp_path)
    (tmp_path / "comparisons.jsonl").write_text("")
    collected(tmp_path, lr=0.1)  # has no part in collecting
    with pytest.raises(SystemExit, match=named):
        collected(tmp_path, **other)


def test_comparisons_are_collected_anew_after_they_are_deleted(tmp_path):
    collected(tmp_path)
    collected(tmp_path, k_min=3)
    (tmp_path / "comparisons.jsonl").write_text("")
    collected(tmp_path, k_min=3)


def test_comparisons_without_a_note_of_their_flags_are_taken_as_they_are(tmp_path):
    (tmp_path / "comparisons_valid.jsonl").write_text("")
    collected(tmp_path)
    assert not (tmp_path / "comparisons.json").exists()


# ------------------------------------------------------------------------------------------------------------
# the whole stage, on untrained checkpoints


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    """reward.main on the 20 prompts of chain -> (folder, reward model, its tokenizer)."""
    out = tmp_path_factory.mktemp("reward")
    config = reward.Config(
        scale="tiny", data=str(chain), out=str(out), sft=str(chain / "sft.pt"), batch=4, log_every=1, epochs=3
    )
    reward.main(config)
    network, checkpoint = model.load_reward(str(out / "reward.pt"), "", torch.device("cpu"))
    return out, network, data.Tokenizer.from_state(checkpoint["tokenizer"])


def test_demonstrations_score_zero_on_average_after_the_shift(chain, trained):
    """J25, L7: the shift is the mean of the demonstrations' scores, taken from the head's bias."""
    _, network, tokenizer = trained
    demonstrations = data.load(str(chain), "tiny", 1)["demonstrations"]
    pairs = data.encode_pairs(tokenizer, demonstrations, 64)
    scores = [network(torch.tensor([prompt + response]))[0, -1].item() for prompt, response in pairs]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=2e-6)
    assert max(map(abs, scores)) > 0.01


def test_every_logged_step_has_the_memory(trained):
    rows = [json.loads(line) for line in (trained[0] / "reward.jsonl").read_text().splitlines()]
    assert len(rows) > 1 and all(row["memory_gb"] > 0 for row in rows[1:])  # the first row is step 0


def test_the_shift_changes_no_comparison(chain, trained):
    """J25: accuracy and loss of the finished model are those of the last step before the shift."""
    out, network, tokenizer = trained
    valid = data.load(str(chain), "tiny", 1)["comparisons_valid"]
    after = reward.evaluate(network, reward.encode_comparisons(tokenizer, valid, 64), torch.device("cpu"))
    before = json.loads((out / "reward.jsonl").read_text().splitlines()[-1])
    assert after["accuracy"] == before["accuracy"]
    assert after["valid_loss"] == pytest.approx(before["valid_loss"], abs=1e-5)


def test_prompts_that_leave_no_room_for_a_response_are_dropped(chain, tmp_path, monkeypatch, capsys):
    tasks = [dict(prompt=prompt) for prompt in ["say cat\n"] * 3 + ["say cat dog sun moon\n" * 4]]
    datasets = data.load(str(chain), "tiny", 1) | dict(comparisons=None, comparison_prompts=tasks, valid=tasks)
    monkeypatch.setattr(data, "load", lambda *_: datasets)
    passed_on = []

    def collect(path, tasks, *_):
        passed_on.append(tasks)
        return [dict(row, prompt="say cat\n", responses=["a", "b"], ranks=[1, 2]) for row in tasks]

    monkeypatch.setattr(reward, "collect", collect)
    paths = dict(sft=str(chain / "sft.pt"), base=str(chain / "base.pt"))
    reward.main(reward.Config(scale="tiny", out=str(tmp_path), encoding="gpt2", max_new_tokens=40, **paths))
    assert passed_on == [tasks[:3], tasks[:3]]
    printed = capsys.readouterr().out
    assert "dropped 1 of 4 prompts: longer than 24 tokens" in printed
    assert "--encoding=gpt2 is not used" in printed


def test_the_reward_model_learns_a_simple_preference():
    """One response ends in 9, the other in 3; after 60 steps of eq. 1 the first scores higher,
    on prompts never seen."""
    network = model.ScalarGPT.from_gpt(tiny_gpt(std=0.05))
    optimizer, rng = model.adamw(network, 1e-2), random.Random(0)

    def group():
        prompt = [rng.randrange(1, 11), rng.randrange(1, 11)]
        return [prompt + [9], prompt + [3]], [1, 2]

    for _ in range(60):
        groups = [group() for _ in range(8)]
        reward.ranking_loss(*reward.score_groups(network, groups, torch.device("cpu"))).backward()
        model.optimizer_step(optimizer, network, 1e-2, 1.0)
    assert reward.evaluate(network, [group() for _ in range(50)], torch.device("cpu"))["accuracy"] > 0.95


def test_dtype_reaches_every_step(dtypes):
    scalar, config = tiny_scalar(), reward.Config(dtype="bfloat16")
    reward.train_step(scalar, model.adamw(scalar, 1e-3), GROUPS, 1e-3, config, torch.device("cpu"))
    assert dtypes == ["bfloat16"]
