"""Tests of reward.py: eq. 1, and the scores it is computed from."""

import math
import random

import pytest
import torch

import data
import model
import ppo
import reward
from conftest import CPU, close, fails, load, rows_of

# L2: scores of four responses, best to worst. Differences and their -log sigmoid(d) = log(1 + e^-d):
#   (1,2) 0.8 -> 0.371101   (1,3) 1.5 -> 0.201413   (1,4) 2.3 -> 0.095545
#   (2,3) 0.7 -> 0.403186   (2,4) 1.5 -> 0.201413   (3,4) 0.8 -> 0.371101   sum 1.643759, mean 0.273960
SCORES = [1.2, 0.4, -0.3, -1.1]


# -- eq. 1 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores, ranks, expected", [
    (SCORES, [1, 2, 3, 4], 0.273960), ([SCORES[i] for i in (2, 0, 3, 1)], [3, 1, 4, 2], 0.273960),  # any order
    # log(1 + e^d) = d + log(1 + e^-d): the mean grows by the mean difference 7.6 / 6 = 1.266667
    (SCORES, [4, 3, 2, 1], 1.540627),
    ([2 * s for s in SCORES], [1, 2, 3, 4], 0.115899),
    ([s + 10 for s in SCORES], [1, 2, 3, 4], 0.273960),  # L3
    # L4: without (2,3), 1.643759 - 0.403186 = 1.240573, over the 5 pairs that are left (over 6: 0.206762)
    (SCORES, [1, 2, 2, 3], 0.248115),
    ([1.2, 100.0, 0.4, -100.0], [1, 0, 2, 0], 0.371101),  # empty slots
    # the mean over the pairs is taken once: divided twice, or not at all, ln 2 would depend on K
    *(([0.7] * K, list(range(1, K + 1)), math.log(2)) for K in (2, 5, 9)),
])
def test_ranking_loss_by_hand(scores, ranks, expected):
    """Also beside a prompt of ties only, which is left out of the mean."""
    scores = torch.tensor([scores, [float(k) for k in range(len(scores))]], dtype=torch.float64)
    for rows in (slice(1), slice(2)):
        found = reward.ranking_loss(scores[rows], torch.tensor([ranks, [1] * len(ranks)])[rows])
        assert float(found) == pytest.approx(expected, abs=1e-6)


def test_ranking_loss_gradient_by_hand():
    """L2: d loss / d s1 = -(sigmoid(-0.8) + sigmoid(-1.5) + sigmoid(-2.3)) / 6 = -0.583575 / 6. Of a batch of
    ties only, loss and gradient are 0."""
    scores = torch.tensor([SCORES], dtype=torch.float64, requires_grad=True)
    reward.ranking_loss(scores, torch.tensor([[1, 2, 3, 4]])).backward()
    close(scores.grad, [[-0.097262, -0.034035, 0.034035, 0.097262]], 1e-6)
    scores.grad = None
    tied = reward.ranking_loss(scores, torch.tensor([[1, 1, 1, 1]]))
    tied.backward()
    assert tied.item() == 0 and (scores.grad == 0).all()


def test_every_prompt_weighs_the_same_however_many_pairs_it_has():
    """L6: 0.273960 with 6 pairs and 0.232432 with 36: mean over prompts 0.253196;
    over the 42 pairs it would be 0.238364."""
    scores = torch.tensor([SCORES + [0.0] * 5, [2 - k / 2 for k in range(9)]], dtype=torch.float64)
    ranks = torch.tensor([[1, 2, 3, 4, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert float(reward.ranking_loss(scores[1:], ranks[1:])) == pytest.approx(0.232432, abs=1e-6)
    assert float(reward.ranking_loss(scores, ranks)) == pytest.approx(0.253196, abs=1e-6)


# -- comparisons in batches ----------------------------------------------------------------------------------


class LastId(torch.nn.Module):
    """A reward model by hand: position t scores the id it stands on, so a row scores its last id."""

    def forward(self, tokens, where):
        return tokens[where].float()


GROUPS = [([[1, 5], [1, 3], [1, 1, 1, 4]], [1, 3, 2]), ([[2, 9], [2, 2, 8]], [2, 1])]


def test_accuracy_is_the_share_of_untied_pairs_in_the_labelers_order():
    """First group: 5 > 4 > 3 as ranked, 3 of 3. Second: 9 scores above 8 but is ranked below, 0 of 1. They
    share a batch, with an empty slot; J4: rows of other lengths, each read at its last token. A tie adds no
    pair."""
    scores, ranks = reward.score_groups(LastId(), GROUPS, CPU)
    assert scores.tolist() == [[5, 3, 4], [9, 8, 0]] and ranks.tolist() == [[1, 3, 2], [2, 1, 0]]
    tied = ([[1, 7], [1, 6]], [1, 1])
    assert reward.evaluate(LastId(), GROUPS + [tied], CPU)["accuracy"] == 3 / 4


def test_valid_loss_is_a_mean_over_prompts():
    """A prompt with score difference 2 as ranked, log(1 + e^-2) = 0.126928, and one of three responses all of
    whose pairs are the wrong way round, by 2, 2 and 4: (2 * 2.126928 + 4.018150) / 3 = 2.757335; the mean of the
    two is 1.442132, over the four pairs it would be 2.099733. A tied prompt counts nowhere."""
    right, wrong, tied = ([[1, 5], [1, 3]], [1, 2]), ([[1, 3], [1, 5], [1, 7]], [1, 2, 3]), ([[1, 5], [1, 3]], [1, 1])
    found = reward.evaluate(LastId(), [right, tied, wrong, tied], CPU)
    assert found["valid_loss"] == pytest.approx(1.442132, abs=1e-6)


def test_comparisons_are_encoded_as_prompt_response_and_eot(chain):
    """But sampled ids are not encoded again: a text may fall into others; one cut by the limit has no eot."""
    tokenizer, row = load(chain, "sft")[1], dict(prompt="say cat\n", responses=["a", "b"], ranks=[1, 2])
    prompt, eot, (a, b) = tokenizer.encode("say cat\n"), tokenizer.eot, map(tokenizer.encode, "ab")
    assert data.encode_comparisons(tokenizer, [row], 64) == [([prompt + a + [eot], prompt + b + [eot]], [1, 2])]
    [(sampled, _)] = data.encode_comparisons(tokenizer, [dict(row, tokens=[[70, 71], [72, eot]])], 64)
    assert sampled == [prompt + [70, 71], prompt + [72, eot]]


# -- judges, and the whole stage on untrained checkpoints ----------------------------------------------------


def scores_of(chain, flag, rows, responses):
    """What the judge of --reward=flag gives responses (texts) to the prompts of rows; the first has no eot."""
    tokenizer = load(chain, "sft")[1]
    rows = data.encode_prompts(tokenizer, rows, 10_000)
    judge, _ = reward.load_judge(ppo.Config(reward=flag, out=str(chain)), tokenizer, rows, CPU)
    ids = [tokenizer.encode(text) + [tokenizer.eot] for text in responses]
    ids[0].pop()
    tokens, lengths = model.pad([row["ids"] + response for row, response in zip(rows, ids)])
    return judge(tokens, torch.tensor([len(row["ids"]) for row in rows]), lengths).tolist()


def test_a_function_of_your_own_judges_prompts_and_responses_as_texts(chain, tmp_path):
    """--reward=FILE.py. Lengths without eot: 100 * 8 + 3, 100 * 8 + 4 (a space behind the colon), 600 + 5."""
    path, rows = tmp_path / "mine.py", [dict(prompt=prompt) for prompt in ("say cat\n", "say sun:", "say a\n")]
    path.write_text("reward = lambda prompts, texts: [100 * len(p) + len(t) for p, t in zip(prompts, texts)]")
    assert scores_of(chain, str(path), rows, ["cat", " red", "a dog"]) == [803, 804, 605]
    path.write_text("reward = lambda *_: [1]")
    assert "1 numbers for 3" in fails(scores_of, chain, str(path), rows, ["cat", " red", "a dog"])
    path.write_text("reward = lambda prompts, texts: [float('nan'), 2, 3]")
    assert "nan or inf for ['cat']" in fails(scores_of, chain, str(path), rows, ["cat", " red", "a dog"])


def test_the_gold_judge_gives_the_gold_preference_of_each_task(chain):
    world, rng = data.World(), random.Random(0)
    tasks = [world.task(rng) for _ in range(20)]
    responses = [rng.choice([task["reply"], data.spoiled(world, task, rng)]) for task in tasks]
    expected = [world.gold(task, text)["gold"] for task, text in zip(tasks, responses)]
    assert scores_of(chain, "gold", tasks, responses) == pytest.approx(expected)
    assert len({round(x, 3) for x in expected}) > 4


def run(chain, out, **flags):
    """reward.main on the 20 prompts of chain, if no flag says otherwise."""
    flags = dict(scale="tiny", device="cpu", data=str(chain), from_=str(chain), log_every=1) | flags
    return reward.main(reward.Config(out=str(out), **flags))


def test_demonstrations_score_zero_on_average_and_the_shift_changes_no_comparison(chain, tmp_path, dtypes):
    """J25, L7: the shift is the mean of the demonstrations' scores, taken from the head's bias; accuracy and
    loss are those of the last step before it. The loss falls from the first epoch to the
    third, on the same prompts."""
    run(chain, tmp_path, epochs=3, dtype="float32", lr=3e-3)
    assert len(dtypes) == 15 and set(dtypes) == {"float32"}  # every step
    network, tokenizer = load(tmp_path, "reward", "reward")
    datasets = data.load(str(chain), "tiny", 1)
    pairs = data.encode_pairs(tokenizer, datasets["demonstrations"], 64)
    scores = [network(torch.tensor([prompt + response]))[0, -1].item() for prompt, response in pairs]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=2e-6) and max(map(abs, scores)) > 0.01
    after = reward.evaluate(network, data.encode_comparisons(tokenizer, datasets["comparisons_valid"], 64), CPU)
    rows = rows_of(tmp_path / "reward.jsonl")
    losses = [row["loss"] for row in rows[1:]]
    assert sum(losses[10:]) < 0.95 * sum(losses[:5])
    assert after["accuracy"] == rows[-1]["accuracy"] and all(row["memory_gb"] > 0 for row in rows)
    assert after["valid_loss"] == pytest.approx(rows[-1]["valid_loss"], abs=1e-5)


def test_every_comparison_fits_and_has_different_responses(chain, tmp_path, capsys):
    """Collected in the world; with other flags, or another supervised model, they are neither used nor
    overwritten."""
    flags = dict(data="", k_min=3, k_max=4, max_new_tokens=6, encoding="gpt2")
    run(chain, tmp_path, **flags)
    printed, tokenizer = capsys.readouterr().out, load(chain, "sft")[1]
    assert "prompts: longer than 58 tokens" in printed and "--encoding=gpt2 is not used" in printed
    rows, valid = (data.read_jsonl(f"{tmp_path}/{name}.jsonl") for name in ("comparisons", "comparisons_valid"))
    for row in rows + valid:
        texts, prompt = [text.strip() for text in row["responses"]], tokenizer.encode(row["prompt"])
        assert 2 <= len(texts) == len(set(row["responses"])) <= 4 and all(texts)
        assert set(row["ranks"]) == set(range(1, max(row["ranks"]) + 1)) and len(row["ranks"]) == len(texts)
        assert [data.response_text(tokenizer, prompt, ids).strip() for ids in row["tokens"]] == texts
    assert {source for row in valid for source in row["sources"]} == {"sft"}
    assert {source for row in rows for source in row["sources"]} == set(reward.COLLECTED)
    assert not {row["labeler"] for row in rows} & {row["labeler"] for row in valid}
    (tmp_path / "reward.pt").unlink()
    said = fails(run, chain, tmp_path, **dict(flags, k_min=2))
    assert "comparisons.pt was made with other flags (--k_min=3 there, 2 now" in said
    run(chain, tmp_path, **flags, lr=0.1)  # has no part in collecting
    (tmp_path / "reward.pt").unlink()
    other = torch.load(chain / "sft.pt", weights_only=True)
    other["weights"]["transformer.ln_f.weight"] += 0.1
    torch.save(other, tmp_path / "sft.pt")  # --out comes before --from
    said = fails(run, chain, tmp_path, **flags)
    assert "comparisons.pt was made with other flags (--weights_of_the_sources=" in said
