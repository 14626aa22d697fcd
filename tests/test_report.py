"""Tests of the report of eval.py: its measures by hand and by brute force, the texts that it measures on,
and every finding once at tiny scale."""

import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import eval
from conftest import tiny_gpt

CPU = torch.device("cpu")
MODELS = {"GPT", "GPT prompted", "SFT", "PPO", "PPO-ptx"}


class Letters:
    """A tokenizer by hand: a = 1, b = 2, ..."""

    def encode(self, text):
        return [ord(letter) - 96 for letter in text]


@pytest.fixture(scope="module")
def world():
    return data.World()


# ------------------------------------------------------------------------------------------------------------
# means, intervals, and when one is below another


def test_interval_is_the_mean_and_196_standard_errors():
    """Of 1, 2, 3, 4: mean 2.5, variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3 (one degree of freedom is
    the mean's), so 1.96 * sqrt(5/3) / sqrt(4) = 1.96 * 1.290994 / 2 = 1.265174."""
    assert eval.interval([1, 2, 3, 4]) == pytest.approx([2.5, 1.265174], abs=1e-6)


def test_interval_of_one_number_has_no_width():
    assert eval.interval([7.0]) == [7.0, 0.0]


def test_rate_is_win_rate_as_a_list_that_json_keeps():
    """2 wins, 1 tie, 1 loss: 2.5 / 4 = 0.625; 1.96 * sqrt(0.625 * 0.375 / 4) = 1.96 * 0.242061."""
    found = eval.rate([1, 1, 0.5, 0])
    assert found == pytest.approx([0.625, 0.474440], abs=1e-6)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([0.50, 0.03], [0.56, 0.04], True),  # 0.06 apart, sqrt(0.03^2 + 0.04^2) = 0.05; not 0.03 + 0.04
        ([0.50, 0.03], [0.54, 0.04], False),  # 0.04 apart
        ([0.56, 0.03], [0.50, 0.04], False),  # above
        ([0.50, 0.0], [0.50, 0.0], False),
        ([0.50, 0.0], [0.51, 0.0], True),  # without noise any difference counts
    ],
)
def test_below_wants_a_difference_larger_than_both_intervals_together(a, b, expected):
    assert eval.below(a, b) is expected


# ------------------------------------------------------------------------------------------------------------
# overlap of texts


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        # L28: 3 words (articles left out) against 2, 2 shared: 2 * 2 / (3 + 2)
        ("in the North Sea", "North Sea", 0.8),
        ("tom.", "tom", 1.0),  # signs do not count
        ("tom tom", "tom.", 2 / 3),  # the second tom has no partner: 2 * 1 / (2 + 1)
        ("anna.", "tom.", 0.0),
        ("", "tom.", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_f1_of_words(prediction, reference, expected):
    assert eval.f1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_by_hand():
    """The sign counts as a word: 7 words each, and "tom a fox in alba" (5) stands in both in this order:
    2 * 5 / (7 + 7)."""
    found = eval.rouge_l("tom saw a fox in alba.", "tom found a red fox in alba")
    assert found == pytest.approx(10 / 14, abs=1e-12)


def test_rouge_l_minds_the_order():
    assert eval.rouge_l("a b", "b a") == pytest.approx(2 * 1 / 4, abs=1e-12)


def test_rouge_l_is_the_longest_common_subsequence():
    """Against every subsequence of the prediction, longest first."""

    def brute_force(a, b):
        for size in range(len(a), 0, -1):
            for places in itertools.combinations(range(len(a)), size):
                rest = iter(b)
                if all(a[i] in rest for i in places):  # in: reads on up to the word, and past it
                    return 2 * size / (len(a) + len(b))
        return 0.0

    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 6))] for _ in range(2))
        assert eval.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(brute_force(a, b), abs=1e-12), (a, b)


@pytest.mark.parametrize(
    "predictions, references, expected",
    [
        (["a b c d", "e f g h"], ["a b c d", "e f g h"], 1.0),
        # 5/6 words (the second "the" has no partner), 3/5 pairs, 2/4, 1/3: (1/12)^(1/4)
        (["the cat sat on the mat"], ["the cat sat on a mat"], (1 / 12) ** 0.25),
        # clipping: the second a is no hit, 4/5, 3/4, 2/3, 1/2; and no prize for length
        (["a b c d a"], ["a b c d"], 0.2 ** 0.25),
        # brevity penalty: every word is right, but 4 of 5 are there: exp(1 - 5/4)
        (["a b c d"], ["a b c d e"], math.exp(-0.25)),
        # counted over the corpus: 4/6, 3/4, 2/2, 1/1, not the mean (1 + 0) / 2 of the sentences
        (["a b c d", "e f"], ["a b c d", "i j"], 0.5 ** 0.25),
        (["a b c"], ["a b c"], 0.0),  # no four words in a row
        ([""], ["a b c d"], 0.0),
    ],
)
def test_bleu_by_hand(predictions, references, expected):
    assert eval.bleu(predictions, references) == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------
# best of n


@pytest.mark.parametrize(
    "n, nats", [(1, 0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508), (60_000, 10.002117)]
)
def test_best_of_n_kl(n, nats):
    """L26."""
    assert eval.best_of_n_kl(n) == pytest.approx(nats, abs=1e-6)


def test_best_of_n_is_the_mean_over_all_subsets():
    """Gold and score disagree, so that sorting by the wrong one shows."""
    rng = random.Random(0)
    scores, golds = [rng.gauss(0, 1) for _ in range(7)], [rng.gauss(0, 1) for _ in range(7)]
    for n in range(1, 8):
        picks = [
            golds[max(subset, key=lambda i: scores[i])] for subset in itertools.combinations(range(7), n)
        ]
        assert eval.best_of_n(scores, golds, n) == pytest.approx(sum(picks) / len(picks), abs=1e-12)


def test_best_of_one_is_the_mean_and_best_of_all_is_the_gold_of_the_best_score():
    scores, golds = [0.3, 2.0, -1.0], [5.0, 1.0, 3.0]
    assert eval.best_of_n(scores, golds, 1) == pytest.approx(3.0, abs=1e-12)
    assert eval.best_of_n(scores, golds, 3) == pytest.approx(1.0, abs=1e-12)


def test_best_of_n_of_equal_scores_takes_each_subset_once():
    """The scores 1, 1, 0 of golds 4, 4, 0: two of the three pairs hold one best, the third holds both, and
    each gives 4. The weights of the subsets sum to one with ties too."""
    assert eval.best_of_n([1, 1, 0], [4, 4, 0], 2) == pytest.approx(4.0, abs=1e-12)
    assert eval.best_of_n([1, 1, 1, 1], [7.0] * 4, 3) == pytest.approx(7.0, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------
# multiple choice


def test_choice_logprobs_by_hand_from_a_full_forward():
    gpt = tiny_gpt()
    prompts, choices = ["ab", "c"], [["de", "f"], ["g", "hij"]]
    totals, counts = eval.choice_logprobs(gpt, Letters(), prompts, choices, CPU)
    assert counts.tolist() == [[2, 1], [1, 3]]
    for row, (prompt, texts) in enumerate(zip(prompts, choices)):
        for column, text in enumerate(texts):
            ids = Letters().encode(prompt + text)
            logprobs = gpt(torch.tensor([ids])).log_softmax(-1)[0]
            by_hand = sum(logprobs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
            assert totals[row, column].item() == pytest.approx(by_hand, abs=1e-4)


def test_choice_logprobs_of_many_prompts_are_those_of_each():
    """140 rows are more than one batch, and of several lengths."""
    gpt = tiny_gpt()
    prompts = ["abcdefghij"[: 1 + i % 5] for i in range(70)]
    choices = [["abcdefghij"[i % 7 : i % 7 + 2], "j"] for i in range(70)]
    totals, _ = eval.choice_logprobs(gpt, Letters(), prompts, choices, CPU)
    for i in (0, 40, 63, 64, 69):
        alone, _ = eval.choice_logprobs(gpt, Letters(), prompts[i : i + 1], choices[i : i + 1], CPU)
        torch.testing.assert_close(totals[i : i + 1], alone, atol=1e-4, rtol=0)


def bench(world, category, **more):
    """What benchmark() needs of a Chain, in a world of one NLP task."""
    blocks = [block for block in world.benchmarks if block["category"] == category]
    return SimpleNamespace(
        world=SimpleNamespace(benchmarks=blocks, item=world.item), tokenizer=None, device=CPU,
        config=SimpleNamespace(items=6), **more,
    )


@pytest.mark.parametrize(
    "totals, counts, accuracy",
    [
        # L28: -6 over 3 tokens is -2.0 each, -7 over 4 is -1.75: the second; the answer is the first
        ([-6.0, -7.0], [3, 4], 0.0),
        ([-7.0, -6.0], [4, 3], 1.0),
    ],
)
def test_a_choice_goes_to_the_average_per_token_not_to_the_total(
    world, monkeypatch, totals, counts, accuracy
):
    def choice_logprobs(policy, tokenizer, prompts, choices, device):
        return torch.tensor([totals] * len(prompts)), torch.tensor([counts] * len(prompts))

    monkeypatch.setattr(eval, "choice_logprobs", choice_logprobs)
    found = eval.benchmark(bench(world, "entailment"), None, shots=0)
    assert found["entailment"][0] == accuracy


def test_a_few_shot_prompt_is_examples_with_answers_and_a_reply_ends_at_the_new_line(world):
    """A reader by regular expression scores 1; the line after the answer would cost it words."""
    seen = []

    def respond(policy, prompts, temperature):
        seen.extend(prompts)
        assert temperature == 0
        last = [prompt.split("\n")[-1] for prompt in prompts]
        owners = [re.search(r"who has the (\w+)\?", text)[1] for text in last]
        names = [re.search(rf"(\w+) has a {owner}\.", text)[1] for text, owner in zip(last, owners)]
        return [(f" {name}.\npassage: anna", []) for name in names]

    found = eval.benchmark(bench(world, "reading", respond=respond), None, shots=2)
    assert found["reading"] == [1.0, 0.0]
    example = r"passage: (?:\w+ has a \w+\. ){2}question: who has the \w+\? answer:"
    for prompt in seen:
        assert re.fullmatch(rf"({example} \w+\.\n){{2}}{example}", prompt)


# ------------------------------------------------------------------------------------------------------------
# facts in a text


def test_invented_words_are_those_that_the_prompt_does_not_have(world):
    """Of the persons, animals, colors, objects and towns: fox is in the prompt; cow and tom are not;
    grass and happy are of other kinds."""
    prompt = "anna met a fox and a hen in alba. list the animals.\n"
    assert eval.invented(world, prompt, "fox, cow and tom. happy grass.") == [False, True, True]
    assert eval.invented(world, prompt, "i am happy.") == []


def test_claims_are_found_anywhere_in_a_text(world):
    text = "tom says: i think that a fox eats cheese. yes, a hen lives in the barn. a cow eats?"
    assert set(eval.stated(world, text)) == {("fox", "eats", False), ("hen", "lives", True)}
    assert eval.stated(world, "a fox eats a lamp. who?") == []


# ------------------------------------------------------------------------------------------------------------
# the texts of heldout.txt and benchmarks.txt


def skeleton(world, text):
    """A text with the class in place of each word that has one: what does not depend on the draw."""
    return " ".join(world.word_class.get(word, word) for word in data.words_of(text))


@pytest.fixture(scope="module")
def user_skeletons(world):
    rng = random.Random(1)
    return {skeleton(world, world.task(rng)["prompt"]) for _ in range(3000)}


def test_the_blocks_of_benchmarks_have_what_their_metric_needs():
    blocks = data.read_blocks("benchmarks.txt")
    assert {block["metric"] for block in blocks} == {*eval.NLP_METRICS, "entropy", "toxicity", "truth"}
    for block in blocks:
        graded = block["metric"] in eval.NLP_METRICS
        assert bool(block["flan"]) == bool(block["t0"]) == graded
        assert bool(block["wrong"]) == (block["metric"] in ("accuracy", "entropy"))
        assert len(block["replies"]) == (block["metric"] not in ("toxicity", "truth"))
        assert not any("\\n" in prompt for prompt in block["prompts"])  # new lines are new lines


def test_the_answer_comes_first_and_no_wrong_choice_equals_it(world):
    """Name and animal are bound in the prompt, so the answer is about them, and each choice differs."""
    rng = random.Random(0)
    for block, _ in itertools.product(world.benchmarks, range(40)):
        item = world.item(block, "prompts", rng)
        choices = [item["answer"], *item["wrong"]]
        assert len(set(choices)) == 1 + len(block["wrong"]), item
        assert item["metric"] == block["metric"] and item["name"] == block["category"]
        if block["metric"] in ("truth", "toxicity"):
            continue
        assert all(choice.startswith(" ") != item["prompt"].endswith("\n") for choice in choices)
        if block["category"] == "completion":
            assert eval.invented(world, item["prompt"], item["answer"]) == [False], item
            assert all(eval.invented(world, item["prompt"], wrong) == [True] for wrong in item["wrong"])
        if block["category"] == "reading":
            thing = re.search(r"who has the (\w+)\?", item["prompt"])[1]
            assert f"{item['answer'].strip(' .')} has a {thing}." in item["prompt"]
        if block["category"] == "translation":
            english = re.search(r"english: (.*)\. zelish:", item["prompt"])[1]
            assert item["answer"] == " " + " ".join(word[::-1] for word in english.split()) + "."


def test_an_instruction_ends_in_a_new_line_and_its_answer_begins_without_a_space(world):
    rng = random.Random(0)
    for block, kind in itertools.product(world.benchmarks, ("flan", "t0")):
        for _ in range(20 * bool(block[kind])):
            item = world.item(block, kind, rng)
            assert item["prompt"].endswith("\n") and not item["answer"].startswith(" ")


# sentiment leaves out a hint of the page, "i was happy."; two of the pronouns and user stand on no page
ON_NO_PAGE = ("the {trade} laughed.", "the {trade} said to {name}: hello.", "{question}\n")


def test_items_stand_on_the_pages_of_the_pretraining_text_word_for_word(world):
    rng = random.Random(2)
    of_tasks = ("{sheet}", "{tasks}", "{rollcall}", "{form}")
    patterns = [pattern for _, pattern in world.pages if not any(name in pattern for name in of_tasks)]
    pages = {skeleton(world, world.expand(p, {}, rng)) for p in patterns for _ in range(400)}
    for block in world.benchmarks:
        for _ in range(10 * (block["prompts"][0] not in ON_NO_PAGE)):
            item = world.item(block, "prompts", rng)
            prompt = item["prompt"]
            if block["category"] == "sentiment":
                mood = "happy" if item["answer"] == " good." else "sad"
                prompt = prompt.replace(" verdict:", f" i was {mood}. verdict:")
            text = skeleton(world, prompt + item["answer"])
            assert any(text in page for page in pages), prompt


def test_a_perfect_reply_to_a_held_out_instruction_meets_all_its_demands(world):
    rng = random.Random(0)
    for block, _ in itertools.product(world.heldout, range(60)):
        task = world.instance(block, rng.choice(block["prompts"]), rng)
        parts = world.gold(task, task["reply"])
        assert parts["follows"] == 1 and parts["constraint"] in (None, 1), task


def test_no_user_ever_sends_a_held_out_instruction(world, user_skeletons):
    """Compared with every name, animal, ... taken as one, so that no lucky draw hides a shared pattern."""
    rng = random.Random(0)
    for block, pattern in [(b, p) for b in world.heldout for p in b["prompts"]]:
        for _ in range(20):
            prompt = world.instance(block, pattern, rng)["prompt"]
            assert skeleton(world, prompt) not in user_skeletons, prompt


def test_no_user_ever_sends_a_benchmark_but_for_questions(world, user_skeletons):
    """The truth probes "user" and "chat" are questions as users put them: those have been trained on."""
    rng = random.Random(0)
    for block, kind in itertools.product(world.benchmarks, ("prompts", "flan", "t0")):
        shared = [
            skeleton(world, world.item(block, kind, rng)["prompt"]) in user_skeletons
            for _ in range(30 * bool(block[kind]))
        ]
        asked = block["metric"] == "truth" and block["category"] in ("user", "chat")
        assert any(shared) == (asked and kind == "prompts"), block


# ------------------------------------------------------------------------------------------------------------
# report.json and report.md, by hand


@pytest.mark.parametrize(
    "values, text",
    [
        ([0.5], "0.500"),
        ([[0.5, 0.03]], "0.500 ± 0.030"),
        ([[0.5, 0.0]], "0.500"),
        ([[0.6, 0.02], [0.7, 0.04]], "0.650 ± 0.030 (0.600 to 0.700)"),
        ([0.2, 0.1, 0.6], "0.300 (0.100 to 0.600)"),
        ([-0.25], "-0.250"),
        ([12345.6], "12,346"),
        ([3], "3"),  # a count
        ([4, 6], "5 (4 to 6)"),
    ],
)
def test_number_text_is_mean_half_width_and_range(values, text):
    assert eval.number_text(values) == text


def test_rows_of_two_seeds_are_merged_by_their_text_cells():
    """Seed 2 has the rows in another order, and one that seed 1 has not; kl is in one row only."""
    cells = [
        dict(rows=[
            {"model": "GPT", "T": "0", "win": [0.2, 0.02]},
            {"model": "GPT", "T": "1", "win": [0.4, 0.02]},
            {"model": "PPO", "T": "1", "win": [0.6, 0.02], "kl": 4},
        ]),
        dict(rows=[
            {"model": "PPO", "T": "1", "win": [0.7, 0.04], "kl": 6},
            {"model": "GPT", "T": "0", "win": [0.3, 0.04]},
            {"model": "round 2", "T": "1", "win": [0.9, 0.04]},
        ]),
    ]
    assert eval.table_lines(cells) == [
        "| model | T | win | kl |",
        "|---|---|---|---|",
        "| GPT | 0 | 0.250 ± 0.030 (0.200 to 0.300) |  |",
        "| GPT | 1 | 0.400 ± 0.020 |  |",
        "| PPO | 1 | 0.650 ± 0.030 (0.600 to 0.700) | 5 (4 to 6) |",
        "| round 2 | 1 | 0.900 ± 0.040 |  |",
    ]


def cell(value, holds, seconds=60.0):
    return dict(rows=[{"model": "GPT", "true": value}], here={"GPT": value}, holds=holds, seconds=seconds)


def test_markdown_counts_the_seeds_that_hold_and_names_the_command_for_the_rest():
    """Minutes: (60 + 120) seconds / 2 seeds."""
    text = eval.as_markdown(dict(cells={
        "4/1": cell([0.2, 0.02], True), "4/2": cell([0.4, 0.04], False, 120.0), "7/3": cell(0.5, True),
    }))
    summary, *sections = text.split("\n## ")
    lines = {int(line.split("|")[1]): line for line in summary.splitlines()[4:]}
    assert sorted(lines) == sorted(eval.FINDINGS)
    assert lines[4].endswith("| GPT 0.300 ± 0.030 (0.200 to 0.400) | 1 of 2 seeds |")
    assert lines[7].endswith("| GPT 0.500 | yes |")
    assert lines[12].endswith("| not measured: python eval.py --finding=12 | |")
    assert [int(section.split(".")[0]) for section in sections] == [4, 7]
    assert "Seeds 1, 2; 1.5 minutes a seed" in sections[0]
    assert "| GPT | 0.300 ± 0.030 (0.200 to 0.400) |" in sections[0]
    for number, line in lines.items():
        title, paper, _ = eval.FINDINGS[number]
        assert f"| {number} | {title} | {paper} |" in line


def test_a_single_seed_that_does_not_hold_says_no():
    summary = eval.as_markdown(dict(cells={"4/1": cell(0.2, False)})).splitlines()
    assert summary[7].endswith("| GPT 0.200 | no |")


def test_read_report_is_empty_without_a_file(tmp_path):
    config = eval.Config(out=str(tmp_path), items=5)
    kept = eval.read_report(config)
    assert kept["cells"] == {} and kept["settings"]["items"] == 5
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags", [dict(items=6), dict(groups=41), dict(sweep_episodes=33), dict(scale="tiny")]
)
def test_a_report_made_with_other_flags_is_refused(tmp_path, flags):
    config = eval.Config(out=str(tmp_path), items=5, groups=40, sweep_episodes=32)
    kept = dict(settings=eval.read_report(config)["settings"], cells={"4/1": cell(0.5, True)})
    (tmp_path / "report.json").write_text(json.dumps(kept))
    assert eval.read_report(config) == kept
    config.seeds = 7  # more seeds go on with it
    assert eval.read_report(config) == kept
    for name, value in flags.items():
        setattr(config, name, value)
    with pytest.raises(SystemExit, match="was made with other flags") as why:
        eval.read_report(config)
    assert "\n" not in str(why.value)


# ------------------------------------------------------------------------------------------------------------
# which cells are measured, and kept: findings by hand, no models


@pytest.fixture
def measured(monkeypatch):
    """The findings give a cell by hand, and no chain is made -> list of (number, seed), as they are called."""
    calls = []

    def stub(number):
        def measure(seed):
            """0. By hand."""
            calls.append((number, seed))
            return [{"model": "GPT", "win": 0.5}], {"GPT": 0.5}, 1

        return measure

    monkeypatch.setattr(eval, "Chain", lambda config, seed: seed)
    monkeypatch.setattr(eval, "draw", lambda kept, out: None)
    for number, (title, paper, _) in eval.FINDINGS.items():
        monkeypatch.setitem(eval.FINDINGS, number, (title, paper, stub(number)))
    return calls


def hand_report(out, **flags):
    eval.report(eval.Config(**{**dict(scale="tiny", out=str(out), device="cpu", seeds=1, groups=40), **flags}))
    return json.loads(open(os.path.join(out, "report.json"), encoding="utf-8").read())["cells"]


def test_without_finding_all_but_the_long_ones_are_measured_on_every_seed(tmp_path, measured):
    cells = hand_report(tmp_path, seed=3, seeds=2)
    short = [number for number in eval.FINDINGS if number not in (2, 3, 8, 11, 12, 13)]
    assert measured == [(number, seed) for seed in (3, 4) for number in short]
    assert set(cells) == {f"{number}/{seed}" for number, seed in measured}


def test_long_findings_are_measured_when_asked_for_and_on_the_first_seed_only(tmp_path, measured):
    hand_report(tmp_path, seeds=2, finding="12, 4")
    assert measured == [(12, 1), (4, 1), (4, 2)]


def test_only_missing_cells_are_measured(tmp_path, measured):
    hand_report(tmp_path, finding="4")
    assert list(hand_report(tmp_path, finding="4,5,4", seeds=2)) == ["4/1", "5/1", "4/2", "5/2"]
    assert measured == [(4, 1), (5, 1), (4, 2), (5, 2)]


def test_a_killed_report_keeps_its_cells(tmp_path, measured, monkeypatch):
    def killed(chain):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(eval.FINDINGS, 5, ("", "", killed))
        with pytest.raises(KeyboardInterrupt):
            hand_report(tmp_path, finding="4,5,6")
    kept = json.loads((tmp_path / "report.json").read_text())
    assert list(kept["cells"]) == ["4/1"] and kept["cells"]["4/1"]["holds"] is True
    hand_report(tmp_path, finding="4,5,6")
    assert measured == [(4, 1), (5, 1), (6, 1)]


def test_a_cell_that_was_written_meanwhile_is_kept(tmp_path, measured, monkeypatch):
    """Two reports at once, of different findings, in one folder."""
    title, paper, measure = eval.FINDINGS[4]

    def slow(seed):
        monkeypatch.setitem(eval.FINDINGS, 4, (title, paper, measure))
        hand_report(tmp_path, finding="5")
        return measure(seed)

    monkeypatch.setitem(eval.FINDINGS, 4, (title, paper, slow))
    assert set(hand_report(tmp_path, finding="4")) == {"4/1", "5/1"}


@pytest.mark.parametrize("finding", ["16", "0", "-1", "four", "4,", "4;5", ","])
def test_an_unknown_finding_is_one_clear_line(tmp_path, measured, finding):
    with pytest.raises(SystemExit) as why:
        hand_report(tmp_path, finding=finding)
    assert f"--finding={finding}" in str(why.value) and "1 to 15" in str(why.value)
    assert "\n" not in str(why.value) and measured == []


# ------------------------------------------------------------------------------------------------------------
# every finding once, at tiny scale


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The whole report at tiny scale, the long findings too -> its folder and its flags."""
    out = str(tmp_path_factory.mktemp("report"))
    flags = dict(scale="tiny", out=out, device="cpu", seeds=1, items=4, groups=40, sweep_episodes=32)
    eval.report(eval.Config(**flags))
    eval.report(eval.Config(**flags, finding=",".join(map(str, sorted(eval.ON_REQUEST)))))
    return out, flags


@pytest.fixture(scope="module")
def kept(report):
    with open(os.path.join(report[0], "report.json"), encoding="utf-8") as file:
        return json.load(file)


def rows_of(kept, number):
    return kept["cells"][f"{number}/1"]["rows"]


@pytest.mark.parametrize("number", eval.FINDINGS)
def test_every_finding_has_rows_figures_and_a_verdict(kept, number):
    found = kept["cells"][f"{number}/1"]
    assert found["rows"] and found["here"] and type(found["holds"]) is bool and found["seconds"] > 0
    numbers = [v for row in (*found["rows"], found["here"]) for v in row.values() if not isinstance(v, str)]
    assert numbers
    for value in numbers:
        if isinstance(value, list):
            assert len(value) == 2 and all(map(math.isfinite, value)) and value[1] >= 0
        else:
            assert math.isfinite(value)


SHARES = {
    1: {"win", "win untied", "win by labelers", "by held-out labelers"},
    2: {"win"},
    3: {"win of PPO-ptx", "accuracy"},
    4: {"true", "true and informative"},
    5: {"hallucinates", "invented share of what it names"},
    6: {"rude"},
    7: {"entropy in bits"},  # of a pair: at most one
    8: {"all tasks", "reading", "entailment", "sentiment", "translation", "summary", "completion"},
    9: {"win", "PPO-ptx wins against it"},
    11: {"valid accuracy"},
    13: {"win against SFT", "win against round 1", "with held-out labelers", "with gold"},
    14: {"follows", "win", "translation", "listing", "replacing", "reading", "extracting"},
    15: {"fails to follow", "inappropriate", "hallucination", "satisfies constraint", "denigrates", "opinion"},
}


@pytest.mark.parametrize("number", SHARES)
def test_shares_lie_between_0_and_1(kept, number):
    seen = set()
    for row in rows_of(kept, number):
        for column in SHARES[number] & row.keys():
            value = row[column][0] if isinstance(row[column], list) else row[column]
            assert 0 <= value <= 1 + 1e-6, (column, row)
            seen.add(column)
    assert seen == SHARES[number]


@pytest.mark.parametrize(
    "number, models",
    [
        (1, MODELS | {"demonstrator"}),
        (4, MODELS),
        (5, MODELS),
        (6, MODELS - {"GPT prompted"}),
        (7, MODELS - {"GPT prompted"}),
        (9, {"FLAN-like", "T0-like", "GPT prompted", "SFT", "PPO-ptx"}),
        (14, MODELS),
        (15, MODELS | {"demonstrator"}),
    ],
)
def test_a_finding_has_a_row_for_every_model_in_every_condition(kept, number, models):
    condition = {4: "prompt", 6: "instruction", 7: "instruction"}.get(number)
    pairs = [(row.get(condition), row["model"]) for row in rows_of(kept, number)]
    conditions = {
        "prompt": ["page", "user", "chat"], "instruction": list(eval.INSTRUCTIONS), None: [None]
    }[condition]
    assert sorted(map(str, pairs)) == sorted(str(pair) for pair in itertools.product(conditions, models))


def test_the_sweeps_have_their_runs(kept):
    sizes = {row["model"] for row in rows_of(kept, 2)}
    assert len(sizes) == 8 and sum("against" in name for name in sizes) == 2
    runs = [row["run"] for row in rows_of(kept, 8)]
    models = ("GPT", "SFT", "PPO init", "PPO", "PPO-ptx", "PPO, beta 0")
    assert sum(run in models for run in runs) == 12  # no and two shots
    for prefix, count in (("ptx=", 4), ("beta=", 3), ("ref=base,", 3)):
        assert sum(run.startswith(prefix) for run in runs) == count
    assert {(row["flags"], row["epoch"]) for row in rows_of(kept, 10)} == set(itertools.product(
        ("default", "sft_lr=0.002", "sft_lr=0.002, sft_dropout=0"), ("1", "2", "4")
    ))
    assert {row["batches"] for row in rows_of(kept, 11)} == {
        "K-wise", "shuffled pairs", "K-wise, more passes"
    }
    best = [row for row in rows_of(kept, 12) if row["policy"] == "best of n"]
    assert [row["n"] for row in best] == ["1", "2", "4", "8", "16", "32", "64"] * 2
    for proxy in ("reward model", "weak"):  # more samples to choose from: no lower score
        given = [row["score"][0] for row in best if row["proxy"] == proxy]
        assert given == sorted(given)


def test_a_model_against_itself_wins_half(kept):
    by = lambda number, name: next(row for row in rows_of(kept, number) if name in row.values())
    assert by(1, "SFT")["win"][0] == by(9, "SFT")["win"][0] == by(14, "SFT")["win"][0] == 0.5
    assert by(9, "PPO-ptx")["PPO-ptx wins against it"][0] == 0.5
    assert by(13, "round 1")["win against round 1"][0] == 0.5


def test_the_kl_of_the_start_is_zero_and_of_what_was_trained_is_not(kept):
    ladder = {row["model"]: row.get("kl") for row in rows_of(kept, 1)}
    assert {name for name, kl in ladder.items() if kl is not None} == {"SFT", "PPO", "PPO-ptx"}
    assert 0 not in (ladder["SFT"], ladder["PPO"], ladder["PPO-ptx"])
    assert rows_of(kept, 12)[0]["sqrt KL"] == 0  # the first rollout is the start's


def test_the_markdown_has_a_table_for_every_finding(report):
    with open(os.path.join(report[0], "report.md"), encoding="utf-8") as file:
        summary, *sections = file.read().split("\n## ")
    assert "not measured" not in summary
    assert sum(line.startswith("| ") for line in summary.splitlines()) == 1 + len(eval.FINDINGS)
    assert [int(section.split(".")[0]) for section in sections] == list(eval.FINDINGS)
    for section in sections:
        table = [line for line in section.splitlines() if line.startswith("|")]
        assert len(table) > 2 and len({line.count("|") for line in table}) == 1  # as many cells in each


def trained_files(out):
    """Path -> time of the last change, of all checkpoints and logs."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(out) for name in names]
    return {path: os.stat(path).st_mtime_ns for path in paths if path.endswith((".pt", ".jsonl"))}


def test_running_again_measures_and_trains_nothing(report, monkeypatch):
    out, flags = report

    def called(*_):
        raise AssertionError("nothing was missing")

    before = trained_files(out)
    monkeypatch.setattr(eval, "Chain", called)
    for number, (title, paper, measure) in eval.FINDINGS.items():
        called.__doc__ = measure.__doc__
        monkeypatch.setitem(eval.FINDINGS, number, (title, paper, called))
    eval.report(eval.Config(**flags, finding=",".join(map(str, eval.FINDINGS))))
    assert len(before) > 40 and trained_files(out) == before


def test_a_finding_measured_anew_trains_nothing_and_gives_the_same_cell(report, kept):
    """Its models are there, PPO without ptx among them, and its luck has a seed."""
    before = trained_files(report[0])
    rows, here, holds = eval.hallucination(eval.Chain(eval.Config(**report[1]), 1))
    # the second round was trained since: one more row
    assert [row for row in rows if row["model"] != "round 2"] == rows_of(kept, 5)
    assert [row["model"] for row in rows][-1] == "round 2"
    assert here == kept["cells"]["5/1"]["here"] and bool(holds) == kept["cells"]["5/1"]["holds"]
    assert trained_files(report[0]) == before


def test_figures_are_drawn_where_matplotlib_is(report):
    pytest.importorskip("matplotlib")
    for number in (1, 8, 12):
        with open(os.path.join(report[0], f"finding-{number}.png"), "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib_one_line_says_how_to_get_the_figures(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    eval.draw(kept, str(tmp_path))
    printed = capsys.readouterr().out
    assert "pip install matplotlib" in printed and printed.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_figures_of_missing_findings_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    eval.draw(dict(cells={}), str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags, differs",
    [
        (dict(seed=2), "--seed=1 there, 2 now"),
        (dict(scale="cpu", groups=3000), "--scale=tiny there, cpu now"),
    ],
)
def test_models_of_another_seed_or_scale_are_not_taken_for_these(report, tmp_path, flags, differs):
    """The test prompts of seed 2 may be among those that the models of seed 1 were trained on. Nothing is
    trained on top of them either."""
    for stage in ("base", "sft", "ppo_init", "reward"):
        shutil.copy(os.path.join(report[0], f"{stage}.pt"), tmp_path)
    before = sorted(os.listdir(tmp_path))
    config = eval.Config(**{**report[1], **flags, "out": str(tmp_path)})
    with pytest.raises(SystemExit) as why:
        eval.Chain(config, config.seed)
    assert differs in str(why.value) and "\n" not in str(why.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["sft.jsonl", "comparisons.jsonl"])
def test_files_that_findings_read_are_looked_for_before_any_is_measured(report, tmp_path, name):
    for file in os.listdir(report[0]):
        if file != name and os.path.isfile(os.path.join(report[0], file)):
            shutil.copy(os.path.join(report[0], file), tmp_path)
    config = eval.Config(**{**report[1], "out": str(tmp_path)})
    with pytest.raises(SystemExit, match=f"{name} not found"):
        eval.Chain(config, config.seed)


def test_a_damaged_report_is_named(tmp_path):
    (tmp_path / "report.json").write_text('{"settings": ')
    with pytest.raises(SystemExit, match="report.json is damaged"):
        eval.read_report(eval.Config(scale="tiny", out=str(tmp_path)))
