"""Tests of eval.py: the numbers that say whether training worked, and the last table."""

import json
import random
import shutil

import pytest
import torch

import data
import eval
import findings
from conftest import CPU, fails, rows_of, save_tiny, tiny_gpt, tiny_scalar


class Letters:  # a tokenizer by hand: a = 1, b = 2, ...
    def encode(self, text):
        return [ord(letter) - 96 for letter in text]


@pytest.mark.parametrize("outcomes, rate, half_width", [
    # L29: 340 of 400 is 0.85; 1.96 * sqrt(0.85 * 0.15 / 399) = 1.96 * 0.0178759
    ([1] * 340 + [0] * 60, 0.85, 0.035037),
    # distances from 0.625, squared: 2 * 0.140625 + 0.015625 + 0.390625 = 0.6875; one degree of freedom is the
    # mean's: 1.96 * sqrt(0.6875 / 3) / sqrt(4). Wins and losses alone would spread more at this rate: 0.547836
    ([1, 1, 0.5, 0], 0.625, 0.469139),
    # L29: (50 * 0.16 + 20 * 0.01 + 30 * 0.36) / 99 = 0.191919; 1.96 * sqrt(0.191919 / 100)
    ([1] * 50 + [0.5] * 20 + [0] * 30, 0.6, 0.085865),
    ([0.5] * 30, 0.5, 0.0), ([1], 1.0, 0.0),  # a model against itself; one number has no width
])
def test_win_rate_and_its_interval(outcomes, rate, half_width):
    assert eval.win_rate(outcomes) == pytest.approx((rate, half_width), abs=1e-6)
    moved = eval.interval(3 + 2 * outcome for outcome in outcomes)  # of any numbers
    assert moved == pytest.approx((3 + 2 * rate, 2 * half_width), abs=2e-6)


def test_compare_in_order_and_untied_without_the_ties():
    assert eval.compare([0.9, 0.5, 0.1, 0.3], [0.2, 0.5, 0.8, 0.3 + 1e-9]) == [1.0, 0.5, 0.0, 0.5]
    assert eval.untied([1.0, 0.5, 0.0, 0.5, 1.0]) == [1.0, 0.0, 1.0]
    assert eval.untied([0.5, 0.5]) == [0.5]  # one tie if there is nothing else


def test_entropy_bits_of_pairs():
    """L28: P(first of -20, -21) = 1 / (1 + e^-1) = 0.731059, its entropy 0.839942; of four equal ones 2."""
    pairs = torch.tensor([[-20.0, -21.0], [-20.0, -20.0], [-20.0, -25.0]], dtype=torch.float64)
    assert eval.entropy_bits(pairs).tolist() == pytest.approx([0.839942, 1.0, 0.057967], abs=1e-6)
    assert eval.entropy_bits(torch.full((1, 4), -7.0)).tolist() == [2.0]


def test_labelers_without_noise_decide_as_gold_and_agree_with_who_does(world, monkeypatch):
    rng, golds = random.Random(0), {}
    exact = dict(id="exact", weights=dict(helpful=1, true=1, harmless=1), length=0, noise=0, tie=0)
    tasks = [world.task(rng) for _ in range(40)]
    good, bad = zip(*(((task["reply"], []), (data.spoiled(world, task, rng), [])) for task in tasks))
    for task, *pair in zip(tasks, good, bad):
        golds[task["prompt"]] = [world.gold(task, text)["gold"] for text, _ in pair]
    assert eval.compare_by_labelers(world, [exact], tasks, good, bad) == eval.compare(*zip(*golds.values()))
    monkeypatch.setattr(eval, "scores", lambda sign, _, prompts, *__: [sign * x for x in golds[prompts[0]]])
    for sign, share in ((1, 1.0), (-1, 0.0)):  # a judge that knows gold, and its opposite
        found = eval.agreement(world, [exact, exact], sign, None, tasks, list(zip(good, bad)), CPU)
        assert list(found.values()) == [1, share, 1, share]  # labelers, reward model; gold with either


def test_scores_hand_the_judge_prompt_and_response():
    # a judge by hand: the last id, and a hundred times the first of the response
    judge = lambda *batch: torch.tensor([row[end - 1] + 100.0 * row[start] for row, start, end in zip(*batch)])
    responses = [("", [3, 4]), ("", [9]), ("", [5, 6, 7])]
    assert eval.scores(judge, Letters(), ["ab", "c", "a"], responses, CPU) == [304.0, 909.0, 507.0]


def test_choice_logprobs_and_mean_kl_by_hand_from_full_forwards():
    """140 rows are more than one batch, and of several lengths. Only tokens of the response count."""
    policy, ref, text = tiny_gpt(0), tiny_gpt(1), "abcdefghij"
    prompts, choices = zip(*((text[: 1 + i % 5], [text[i % 7 : i % 7 + 2], "j"]) for i in range(70)))
    totals, counts = findings.choice_logprobs(policy, Letters(), prompts, choices, CPU)

    def by_hand(gpt, prompt, response):
        ids = Letters().encode(prompt + response)
        logprobs = gpt(torch.tensor([ids])).log_softmax(-1)[0]  # row t predicts ids[t + 1]
        return sum(logprobs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))

    assert counts.tolist() == [[2, 1]] * 70
    for row, column in ((0, 0), (40, 1), (63, 0), (64, 1), (69, 0)):
        expected = by_hand(policy, prompts[row], choices[row][column])
        assert totals[row, column].item() == pytest.approx(expected, abs=1e-4)
    kl = lambda ref: eval.mean_kl(policy, ref, Letters(), ["ab"], [("", [3, 4])], CPU)
    log_ratio = by_hand(policy, "ab", "cd") - by_hand(ref, "ab", "cd")
    assert kl(ref) == pytest.approx(log_ratio, abs=1e-5) and kl(policy) == 0.0


def test_reading_is_the_share_of_the_demanded_words_that_a_reply_has(world):
    """tom and not anna; no fox in foxy; "no hen" asks for no word, and "saw" is of no class that is counted."""
    tasks = [dict(demands=["has tom", "has fox", "no hen"]), dict(demands=["has anna", "has saw"])]
    given = [("tom has a foxy hen.", []), ("tom.", [])]
    assert eval.reading(world, tasks, given) == {"name": 0.5, "animal": 0.0}


def test_questions_are_different_test_prompts_on_facts(world):
    tasks = {task["prompt"]: task for task in eval.questions(world, 60, random.Random(0))}
    assert len(tasks) == 60 and all(data.split_of(t) == "test" and t["fact"] for t in tasks.values())


def table_of(out, **flags):
    """-> {(model, T): row}, table.json, the rows of responses.jsonl."""
    eval.main(eval.Config(scale="tiny", device="cpu", out=str(out), max_new_tokens=8, **flags))
    contents = json.loads((out / "table.json").read_text())
    table = {(row["model"], row["T"]): row for row in contents["table"]}
    return table, contents, rows_of(out / "responses.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The table of untrained models in the world, where gold tells texts of different lengths apart; the two
    epochs of sft.pt are ppo_init.pt and ppo.pt."""
    out, gold = tmp_path_factory.mktemp("table"), data.World.gold
    tokenizer = data.Tokenizer.train(data.load("", "tiny", 1)["pretrain"][:200], 512)
    shape = dict(vocab_size=tokenizer.n_vocab, block_size=128, std=0.1)
    gpts = {name: tiny_gpt(seed, **shape) for seed, name in enumerate(("base", "ppo_init", "ppo", "sft"))}
    epochs = {1: gpts["ppo_init"].state_dict(), 2: gpts["ppo"].state_dict()}
    for name, gpt in gpts.items():
        save_tiny(out / f"{name}.pt", "policy", gpt, tokenizer, epochs=epochs)
    save_tiny(out / "reward.pt", "reward", tiny_scalar(9, **shape), tokenizer)

    def telling(world, task, text):
        parts = gold(world, task, text)
        return dict(parts, gold=parts["gold"] + len(text) / 1000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.World, "gold", telling)
        return out, *table_of(out)


def test_the_numbers_of_the_table_are_those_of_the_responses(made, world):
    """Against SFT at the same temperature; against the demonstrator by the differences on each prompt."""
    _, table, contents, responses = made
    names = ("GPT", "GPT prompted", "SFT", "PPO init", "PPO-ptx", "demonstrator")
    assert list(table) == [*((name, 1) for name in names), *((name, 0) for name in names[2:5])]
    tasks = {task["prompt"]: task for task in data.load("", "tiny", 1)["test"]}
    assert len(responses) == contents["prompts"] > 40
    golds = {(name, T): [row[f"gold {name} T={T:g}"] for row in responses] for name, T in table}
    for (name, T), row in table.items():
        for response, gold in zip(responses, golds[name, T]):
            text = response[f"{name} T={T:g}"]
            by_world = world.gold(tasks[response["prompt"]], text)["gold"]
            assert gold == pytest.approx(by_world + len(text) / 1000)
        outcomes = eval.compare(golds[name, T], golds["SFT", T])
        gains = [ours - theirs for ours, theirs in zip(golds[name, T], golds["demonstrator", 1])]
        assert (row["gold"], row["±"]) == pytest.approx(eval.interval(golds[name, T]))
        assert (row["teacher"], row["±t"]) == pytest.approx(eval.interval(gains))
        rates = [sum(some) / len(some) for some in (outcomes, eval.untied(outcomes))]
        assert [row["win"], row["untied"]] == pytest.approx(rates)
    assert table["GPT", 1]["±t"] != pytest.approx(table["GPT", 1]["±"], rel=0.01)  # paired, not gold's own
    assert table["demonstrator", 1]["±t"] == table["PPO init", 1]["kl"] == 0 < 0.1 < table["PPO-ptx", 1]["kl"]
    best = "PPO-ptx" if contents["sft_epochs"]["2"] > contents["sft_epochs"]["1"] else "PPO init"
    assert all(row["SFT T=1"] == row[f"{best} T=1"] for row in responses)  # the epoch of the higher score


def test_a_policy_and_a_reference_are_taken_by_path_if_their_encoding_is_that_of_the_others(made, tmp_path, capsys):
    """What differs from the flags it was made with is told."""
    out, table, _, _ = made
    for name in ("base", "sft", "ppo_init", "reward"):
        shutil.copy(out / f"{name}.pt", tmp_path)
    of_ppo, elsewhere = torch.load(out / "ppo.pt"), str(tmp_path / "mine.pt")
    torch.save(dict(of_ppo, settings=dict(data="", seed=2)), elsewhere)
    other = data.Tokenizer.train(["another text, another text"], 260)
    given, _, _ = table_of(tmp_path, ppo=elsewhere, ref=elsewhere)
    assert "mine.pt was made with --seed=2" in capsys.readouterr().out
    assert given["PPO-ptx", 1]["kl"] == 0 and given["PPO init", 1]["kl"] > 0.1
    assert given["PPO-ptx", 1]["score"] == table["PPO-ptx", 1]["score"] != table["PPO init", 1]["score"]
    save_tiny(tmp_path / "ppo.pt", "policy", tiny_gpt(vocab_size=other.n_vocab, block_size=128), other)
    assert "have different encodings" in fails(table_of, tmp_path)
    talk = eval.TalkConfig(out=str(tmp_path), device="cpu")
    assert fails(eval.side_by_side, talk, []).startswith(f"the models in {tmp_path} have different encodings")


def test_a_folder_of_data_has_a_table_without_what_only_the_world_knows(chain, tmp_path):
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    shutil.copy(chain / "ppo_init.pt", tmp_path / "ppo.pt")
    table, contents, responses = table_of(tmp_path, data=str(chain), ptx_coef=0.0)
    keys = [("GPT", 1), *((name, T) for T in (1, 0) for name in ("SFT", "PPO init", "PPO"))]
    assert list(table) == keys and contents["report"] == {}
    assert set(table["PPO", 1]) == {"model", "T", "score", "kl", "length", "pretrain_loss"}
    prompts = [row["prompt"] for row in data.load(str(chain), "tiny", 1)["test"]]
    assert [row["prompt"] for row in responses] == prompts
    assert set(responses[0]) == {"prompt", *(f"{name} T={T}" for name, T in keys)}
