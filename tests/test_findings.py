"""Tests of findings.py: its measures by hand, its texts, its report, and every finding once at tiny scale."""

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
import findings
from findings import FINDINGS, NAMES, Chain


def test_folds_learn_from_no_labeler_whom_they_are_tested_on():
    rows, groups = [dict(labeler=f"labeler-{i % 7}") for i in range(70)], list(range(70))
    who, folds = (lambda part: {i % 7 for i in part}), list(findings.folds_of(rows, groups, 3))
    for learnt, held_out, of_others in folds:
        assert who(held_out) <= who(learnt) and not who(learnt) & who(of_others)
        assert sorted(learnt + held_out + of_others) == groups and len(held_out) >= 4
    assert sorted(i for *_, of_others in folds for i in of_others) == groups


@pytest.mark.parametrize("claim, a, b, margins, half", [
    # differences 1, 0, 1, 0: mean 0.5, sd sqrt(1/3), half-width 1.96 * 0.577350 / 2
    (findings.order, [0, 0, 1, 1], [1, 0, 2, 1], [0.5], 0.565803),
    # the same twice: sd sqrt(2/7), half-width 1.96 * 0.534522 / sqrt(8)
    (findings.order, [0, 0, 1, 1] * 2, [1, 0, 2, 1] * 2, [0.5], 0.370405),
    # the spread of both is 100 times the difference, but it is the same on each prompt
    (findings.order, [0, 10, 0, 10], [0.1, 10.1, 0.1, 10.1], [0.1], 0),
    # two means on different prompts: half-widths 0.565803 each, together sqrt(2) times that
    (findings.apart, [0, 0, 1, 1], [1, 1, 2, 2], [1.0], 0.800166),
    # equal is shown by a bound, below it and above, and not by a missing difference
    (lambda *of: findings.same(*of, 1.1), [0, 0, 1, 1], [1, 0, 2, 1], [0.6, 1.6], 0.565803),
])
def test_margins_of_two_rows_by_hand(claim, a, b, margins, half):
    found = claim(dict(a=dict(x=a), b=dict(x=b)), "x", "a", "b")
    assert [margin for margin, _ in found.values()] == pytest.approx(margins)
    assert [width for _, width in found.values()] == pytest.approx([half] * len(margins), abs=1e-6)
    assert findings.holds(found) == (min(margins) > half)


def test_all_claims_must_hold_and_numbers_stand_for_rows():
    holds = lambda *labels: findings.holds(findings.order(dict(a=dict(x=[1, 5])), "x", *labels))
    assert holds(-20, "a", 99) and not holds(-20, "a", 0) and not holds("a", "a")
    assert not holds(0, "a")  # 3 above, within 1.96 * 2.828427 / sqrt(2) = 3.92


def test_over_seeds_the_spread_of_the_seeds_counts_by_students_t():
    # mean 2, sd 1 over three seeds: 4.303 / sqrt(3) = 2.484338; of one seed its own interval
    assert findings.pooled([(1, 9), (2, 9), (3, 9)]) == pytest.approx((2, 2.484338), abs=1e-6)
    assert findings.pooled([(1, 0.5)]) == (1, 0.5)


def test_best_of_n_is_the_mean_over_all_subsets_and_its_kl_l26():
    for n, nats in ((1, 0), (2, 0.193147), (4, 0.636294), (64, 3.174508), (60_000, 10.002117)):
        assert findings.best_of_n_kl(n) == pytest.approx(nats, abs=1e-6)
    scores, golds = ([random.Random(seed).gauss(0, 1) for seed in range(i, i + 7)] for i in (0, 7))
    for n in range(1, 8):
        picks = [golds[max(some, key=lambda i: scores[i])] for some in itertools.combinations(range(7), n)]
        assert findings.best_of_n(scores, golds, n) == pytest.approx(sum(picks) / len(picks), abs=1e-12)
    # of equal scores each subset counts once: two of the pairs of 4, 4, 0 hold one 4 and one holds both
    assert findings.best_of_n([1, 1, 0], [4, 4, 0], 2) == pytest.approx(4.0, abs=1e-12)


def test_what_a_text_invents_and_states(world):
    prompt = "anna met a fox and a hen in alba. list the animals.\n"
    assert findings.invented(world, prompt, "fox, cow and tom. happy grass.") == [False, True, True]
    text = "tom says: i think that a fox eats cheese. yes, a hen lives in the barn. a cow eats?"
    assert set(findings.stated(world, text)) == {("fox", "eats", False), ("hen", "lives", True)}


def bench(world, category, **more):
    """A Chain with only what benchmark() needs, in a world of one NLP task."""
    blocks = [block for block in data.read_blocks("benchmarks.txt") if block["category"] == category]
    more |= dict(blocks=lambda *metrics: blocks, policies=dict(it=None), tokenizer=None, device=None)
    chain = Chain.__new__(Chain)
    vars(chain).update(world=world, items=6, **more)
    return chain


# L28: -6 over 3 tokens is -2.0 each, -7 over 4 is -1.75: the second; the answer is the first
@pytest.mark.parametrize("totals, counts, accuracy", [([-6.0, -7.0], [3, 4], 0.0), ([-7.0, -6.0], [4, 3], 1.0)])
def test_a_choice_goes_to_the_average_per_token(world, monkeypatch, totals, counts, accuracy):
    choose = lambda policy, tokenizer, prompts, *_: [torch.tensor([x] * len(prompts)) for x in (totals, counts)]
    monkeypatch.setattr(findings, "choice_logprobs", choose)
    assert bench(world, "entailment").benchmark("it", 0) == {"entailment": [accuracy] * 6}


def test_a_few_shot_prompt_is_examples_with_answers_and_a_reply_ends_at_the_new_line(world):
    example = r"passage: (?:\w+ has a \w+\. ){2}who has it\? (\w+)"

    def respond(name, prompts, temperature):
        owned = [re.fullmatch(rf"(?:{example} \w+\.\n){{2}}{example}", prompt)[2] for prompt in prompts]
        names = [re.findall(rf"(\w+) has a {thing}\.", prompt)[-1] for thing, prompt in zip(owned, prompts)]
        return [(f" {name}.\npassage: anna", []) for name in names]  # the second line would cost it words

    assert bench(world, "reading", respond=respond).benchmark("it", 2) == {"reading": [1.0] * 6}


def test_no_question_of_a_benchmark_is_asked_twice(world):
    chain = bench(world, "sentiment")  # it has some 190 questions
    prompts = [item["prompt"] for item in chain.distinct(chain.blocks(), 100, random.Random(1))]
    assert len(prompts) == len(set(prompts)) == 100


def test_no_user_ever_sends_a_held_out_instruction_or_a_benchmark(world):
    """Compared with every name, animal, ... taken as one, so that no lucky draw hides a shared pattern. But
    the truth probes "user" and "chat" are questions as users put them: those have been trained on."""
    skeleton = lambda text: " ".join(world.word_class.get(word, word) for word in data.words_of(text))
    rng = random.Random(0)
    of_users = {skeleton(world.task(rng)["prompt"]) for _ in range(3000)}
    for block in data.read_blocks("heldout.txt"):
        for pattern, _ in itertools.product(block["prompts"], range(20)):
            task = world.instance(block, pattern, rng)
            parts = world.gold(task, task["reply"])  # a perfect reply meets all demands
            assert skeleton(task["prompt"]) not in of_users and parts["follows"] == 1, task
    for block, kind in itertools.product(data.read_blocks("benchmarks.txt"), ("prompts", "flan", "t0")):
        items = [findings.item_of(world, block, kind, rng) for _ in range(30 * bool(block[kind]))]
        asked = kind == "prompts" and block["rest"] == ["truth"] and block["category"] in ("user", "chat")
        assert any(skeleton(item["prompt"]) in of_users for item in items) == asked, block
        for choices in ([item["answer"], *item["wrong"]] for item in items):  # none equals another
            assert len(set(choices)) == 1 + len(block["wrong"]), choices


def test_markdown_merges_the_rows_of_the_seeds_and_counts_those_that_hold():
    cell = lambda margin, **rows: dict(rows=rows, shown="true", claims={"a < b": [margin, 0.1], "b < c": [1, 0]})
    summary, *sections = findings.as_markdown(dict(cells={
        "4/2": cell(0.1, GPT=dict(true=[0.4, 0.04]), PPO=dict(true=[12345.6, 0])), "7/3": cell(0.2),
        "4/1": cell(0.3, GPT=dict(true=[0.2, 0.02], kl=[4, 0])),  # as two processes may leave them
    })).split("\n## ")
    lines = {int(line.split("|")[1]): line.split(" | ") for line in summary.splitlines()[4:]}
    assert sorted(lines) == sorted(FINDINGS) == list(range(1, 16))
    # 0.1 is within its interval; over two seeds 0.2 +- 12.706 * 0.1 * sqrt(2) / sqrt(2)
    assert lines[4][3:] == ["GPT 0.300 ± 0.030 (0.200 to 0.400); PPO 12,346", "1 of 2", "no |"]
    assert lines[12][3:] == ["not measured: python tests/findings.py --finding=12", "0 of 0", " |"]
    assert lines[7][4:] == ["1 of 1", "yes |"]
    assert all(title and paper for _, title, paper, *_ in lines.values())
    assert [section.split(".")[0] for section in sections] == ["4", "7"] and "Seeds 1, 2." in sections[0]
    assert "| a < b | 0.300 ± 0.100 | 0.100 ± 0.100 | 0.200 ± 1.271 |" in sections[0]
    rows = ["| GPT | 0.300 ± 0.030 (0.200 to 0.400) | 4 |", "| PPO | 12,346 |  |"]
    assert sections[0].splitlines()[9:] == ["| | true | kl |", "|---|---|---|", *rows]


@pytest.fixture
def measured(monkeypatch):
    """The findings give a cell by hand, and no chain is made -> list of (number, seed), as they are called."""
    calls, rows = [], {"GPT": {"win": [0.5, 1]}}
    monkeypatch.setattr(findings, "Chain", lambda config, seed: SimpleNamespace(seed=seed))
    monkeypatch.setattr(findings, "draw", lambda kept, out: None)
    for number, measure in list(FINDINGS.items()):
        by_hand = lambda c, number=number: calls.append((number, c.seed)) or (rows, "win", {"a": (1, 0)})
        by_hand.__doc__ = measure.__doc__
        monkeypatch.setitem(FINDINGS, number, by_hand)
    return calls


def report_of(out, **flags):
    findings.main(findings.Config(**{**dict(scale="tiny", out=str(out), device="cpu", seeds=1), **flags}))
    return json.loads((out / "report.json").read_text())["cells"]


def test_all_findings_are_measured_on_every_seed_and_quick_leaves_out_the_long(tmp_path, measured):
    cells = report_of(tmp_path, seed=3, seeds=2, finding="12, 4")
    assert measured == [(12, 3), (4, 3), (12, 4), (4, 4)]
    assert list(cells) == [f"{number}/{seed}" for number, seed in measured]
    assert cells["4/3"]["rows"]["GPT"]["win"] == pytest.approx([0.75, 0.49])  # 1.96 * sqrt(0.125) / sqrt(2)
    report_of(tmp_path, seed=3, seeds=2, quick=True)
    assert measured[4:] == [(n, 3) for n in FINDINGS if n not in (2, 3, 4, 8, 12, 13)]
    report_of(tmp_path, seed=3, seeds=1)
    assert sorted(n for n, seed in measured if seed == 3) == list(FINDINGS)


def test_a_killed_report_keeps_its_cells_and_those_that_others_wrote_meanwhile(tmp_path, measured, monkeypatch):
    def killed(seed):
        """5. title: how. Paper: none."""
        report_of(tmp_path, finding="6")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(FINDINGS, 5, killed)
        report_of(tmp_path, finding="4,5,7")
    assert sorted(report_of(tmp_path, finding="4,5,7,5")) == ["4/1", "5/1", "6/1", "7/1"]
    assert measured == [(4, 1), (6, 1), (5, 1), (7, 1)]


@pytest.mark.parametrize("flags, says", [
    *((dict(finding=x), f"--finding={x}: say numbers from 1 to 15") for x in ("16", "0", "-1", "four", "4,")),
    (dict(scale="cpu"), "scale: tiny there, cpu now"), (dict(data="folder"), "leave out --data")])
def test_bad_input_is_one_clear_line(tmp_path, measured, flags, says):
    report_of(tmp_path, finding="4")
    with pytest.raises(SystemExit, match=re.escape(says)):
        report_of(tmp_path, **flags)
    assert measured == [(4, 1)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")  # all fifteen at tiny scale: the folder, the cells
    return out, report_of(out)


def test_every_finding_has_rows_a_shown_column_and_a_verdict(report):
    shares, met = {"win", "share", "true", "both", "rude", "bits", "tasks", "met", "follows"}, set()
    for number, cell in report[1].items():
        assert cell["claims"] and all(math.isfinite(x) for margin in cell["claims"].values() for x in margin)
        assert any(cell["shown"] in row for row in cell["rows"].values())
        for column, (mean, half) in itertools.chain(*(row.items() for row in cell["rows"].values())):
            assert math.isfinite(mean) and 0 <= half < math.inf, (number, column)
            assert column not in shares or 0 <= mean <= 1 + 1e-6, (number, column)
            met.add(column)
    assert met >= shares and len(report[1]) == 15


def test_findings_have_the_rows_that_they_promise(report):
    rows = {number: report[1][f"{number}/1"]["rows"] for number in FINDINGS}
    assert [*rows[1]] == [*rows[15]] == [*NAMES, "demonstrator"] and [*rows[5]] == [*NAMES]
    assert [*rows[14]] == [f"{name}, {kind}" for kind in ("far", "near") for name in NAMES]
    untold = [f"{name}, new facts" for name in ("GPT", "SFT, untold", "PPO-ptx, untold")]
    assert [*rows[4]] == [*NAMES, *untold]
    assert [len(rows[number]) for number in (2, 6, 7, 8)] == [10, 12, 12, 14]
    for proxy in ("reward model", "weak", "small"):  # more samples to choose from: no lower score
        scores = [rows[12][f"best of n, {proxy}: {n}"]["score"][0] for n in (1, 2, 4, 8, 16, 32, 64)]
        assert scores == sorted(scores)
    episodes = [int(label.split(": ")[1]) for label in rows[12] if label.startswith("PPO, beta 0, weak: ")]
    assert episodes == sorted(set(episodes)) and len(episodes) in range(4, 13)  # at most twelfths of a run
    itself = rows[1]["SFT"]["win"], rows[9]["PPO-ptx"]["PPO-ptx wins against it"]
    assert itself == ([0.5, 0.0], [0.5, 0.0]) and rows[13]["weak"]["win against weak"] == [0.5, 0.0]


def test_what_findings_train_is_as_they_say(report):
    """Weak and small proxies, a second round as large as its control, an SFT with half the batch."""
    load = lambda path: torch.load(report[0] / f"{path}.pt", weights_only=True)
    groups = [load(f"{folder}/reward")["settings"]["groups"] for folder in ("weak", "more-of-round-1", "round-2")]
    assert groups[:2] == [20, 40] and 20 < groups[2] <= 40  # a prompt without two different responses is left out
    for proxy, judge in (("weak", "weak/reward"), ("small", "size-1x2x8/judge/reward")):
        assert load(f"{proxy},beta=0/ppo")["settings"]["reward"] == f"{report[0]}/{judge}.pt"
    assert [load(sft)["settings"]["sft_batch"] for sft in ("sft", "epochs/sft")] == [16, 8]
    assert load("weak/reward")["config"]["n_embd"] > load("size-1x2x8/judge/reward")["config"]["n_embd"] == 8


def test_the_second_training_is_never_told_of_the_new_facts(report):
    chain = Chain(findings.Config(scale="tiny", out=str(report[0]), device="cpu"), 1)
    facts, seen = [fact for fact in chain.world.facts if fact["myth"]][::2], {}
    trained = lambda config: seen.update(data.load("", "tiny", 1))
    with pytest.MonkeyPatch.context() as patch:
        for stage, name in ((findings.sft, "main"), (findings.reward, "main"), (findings.ppo, "train")):
            patch.setattr(stage, name, trained)
        chain.without(facts)
    told = ("demonstrations", "prompts", "comparisons", "comparisons_valid")
    for part, text in ((part, json.dumps(row)) for part in told for row in seen[part]):
        assert not any(q.format(subject=f["subject"]) in text for f in facts for q in f["questions"]), part
        assert not any(chain.world.say(f, f["truth"]) in text for f in facts), part
    full = data.load("", "tiny", 1)
    assert all(0 < len(seen[part]) < len(full[part]) for part in ("demonstrations", "prompts"))
    assert seen["pretrain"] == full["pretrain"]


def test_a_second_time_nothing_is_trained_and_a_cell_measured_anew_is_the_same(report, monkeypatch):
    out, cells = report
    stamps = lambda: {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    before = stamps()
    found, shown, claims = FINDINGS[5](Chain(findings.Config(scale="tiny", out=str(out), device="cpu"), 1))
    anew = {label: {c: list(eval.interval(x)) for c, x in row.items()} for label, row in found.items()}
    assert dict(rows=anew, shown=shown, claims={k: list(v) for k, v in claims.items()}) == cells["5/1"]
    monkeypatch.setattr(findings, "Chain", lambda *_: pytest.fail("nothing was missing"))
    assert report_of(out) == cells
    assert len(before) > 30 and stamps() == before


def test_models_of_another_seed_are_not_taken_for_these_nor_trained_on(report, tmp_path):
    shutil.copy(report[0] / "base.pt", tmp_path)
    with pytest.raises(SystemExit, match="--seed=1 there, 2 now"):
        Chain(findings.Config(scale="tiny", out=str(tmp_path), device="cpu", seed=2), 2)
    assert os.listdir(tmp_path) == ["base.pt"]


def test_figures_are_drawn_or_one_line_says_how(report, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.pyplot", None)
        findings.draw(dict(cells=report[1]), str(tmp_path))
    assert "pip install matplotlib" in capsys.readouterr().out and os.listdir(tmp_path) == []
    pytest.importorskip("matplotlib")
    findings.draw(dict(cells=report[1]), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(f"finding-{n}.png" for n in findings.FIGURES)


def test_reviews_are_judged_by_their_pairs_of_words(tmp_path):
    """Good, bad and not alone tell nothing. Of 3 continuations 2 are positive: half-width 1.96 * sqrt(1/9)."""
    texts = dict([("a good film", 9), ("a bad film", 2), ("not good", 1), ("Not bad", 10)])
    rows = [dict(prompt="review:", response=f" {text}", rating=stars) for text, stars in texts.items()] * 50
    said = [{"prompt": "review:", "PPO-ptx T=1": text} for text in ("good film", "not bad at all", "bad film")]
    for name, lines in (("judge", rows), ("responses", said)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    findings.reviews(findings.Config(out=str(tmp_path), data=str(tmp_path)))
    report = json.loads((tmp_path / "reviews.json").read_text())
    assert report["accuracy"] == [1.0, 0.0]
    assert report["positive, PPO-ptx T=1"] == pytest.approx([2 / 3, 0.653333], abs=1e-6)
