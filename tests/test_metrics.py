"""Are the metrics of findings.py the paper's? From the samples that it published of its own models they
give what its Table 14 reports (`pytest -s tests/test_metrics.py` prints both). Skipped without
INSTRUCTGPT_TEST_DATA.

A figure of the paper is a mean over a benchmark, ours over the 60 contexts at hand: the two differ by our
standard error, which the jackknife tells. Hence two tolerances, the same for every metric:
    each figure      3.6 standard errors: of 72 normal errors none is larger in 97 of 100 cases
    their mean       3 standard errors of the mean over models and ways of prompting, which share contexts
A wrong definition that moves all figures by less is not seen here; single texts are below.
"""

import csv
import functools
import itertools
import math
import os
import random
import re
import statistics
from pathlib import Path

import pytest

import findings

DATA = os.environ.get("INSTRUCTGPT_TEST_DATA")
FOLDER = os.path.join(DATA or "", "eval", "instructgpt_samples")
real = pytest.mark.skipif(
    not DATA or not os.path.isdir(FOLDER),
    reason="INSTRUCTGPT_TEST_DATA is unset or lacks eval/instructgpt_samples: no samples of the paper's models",
)
MODELS = [f"{kind}-{size}" for kind in ("gpt", "sft", "ppo-noptx", "ppo-ptx") for size in ("xl", "6b", "175b")]
# Table 14, in the order of MODELS; the second key is the file's name of the prompt. Not summarisation: the table
# has one row for two tasks, and the samples of one were not published; what ROUGE-L is, rouge-score says below
PAPER = {
    "squadv2": dict(
        zeroshot="51.97 58.66 64.30 36.88 46.53 57.67 45.37 47.42 43.68 45.46 47.23 59.85",
        fewshot="58.86 62.33 69.75 46.62 53.91 65.90 48.11 52.34 51.95 58.33 63.78 69.93",
    ),
    "drop": dict(
        zeroshot="17.68 19.96 27.53 13.29 13.23 15.79 14.70 12.34 13.08 14.71 10.64 15.23",
        fewshot="25.43 30.08 35.27 23.84 30.99 35.85 21.61 27.11 27.78 23.89 29.39 33.34",
    ),
    "fr_to_en": dict(
        zeroshot="30.65 34.99 38.92 25.56 33.25 36.90 19.85 25.22 24.16 25.77 30.41 34.28",
        fewshot="31.37 35.49 39.93 24.73 31.76 35.07 21.65 29.96 26.58 27.67 33.56 36.76",
    ),
}
# DROP: of the 60 published contexts 18 have a number for an answer, of the benchmark's 9,536 about 62 in 100 (as
# others report), and the models are right on few numbers. So the two kinds are weighed as there; unweighed all 24
# figures are above the paper's, by four errors of their mean. The tests hold for shares from 0.45 to 0.77.
NUMBERS = 0.62


@functools.cache
def rows_of(name):
    [path] = Path(FOLDER).glob(f"{name}*")
    csv.field_size_limit(10**9)
    with open(path, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def best_f1(row):
    return 100 * max(findings.f1(row["sample"], reference) for reference in row["ref_text"].split("|"))


def weighted_f1(rows):
    parts = [], []
    for row in rows:
        parts[bool(re.fullmatch(r"[\d.,]+", row["ref_text"].split("|")[0].strip()))].append(best_f1(row))
    return (1 - NUMBERS) * statistics.mean(parts[0]) + NUMBERS * statistics.mean(parts[1])


METRICS = {  # the samples of one model to one kind of prompt -> its figure
    "squadv2": lambda rows: statistics.mean(map(best_f1, rows)),
    "drop": weighted_f1,
    "fr_to_en": lambda rows: 100 * findings.bleu(*([row[key] for row in rows] for key in ("sample", "ref_text"))),
}


@real
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_samples_give_the_papers_figures(name, monkeypatch):
    """Prints every figure beside the paper's."""
    for slow in ("f1", "mteval_words"):
        monkeypatch.setattr(findings, slow, functools.cache(getattr(findings, slow)))
    error_of = lambda without: math.sqrt(59 * statistics.pvariance(without))  # the jackknife, of 60 contexts
    errors, gaps = [], []  # gaps: of each figure, without one context after the other, at last with all
    print(f"\n{name}: prompt, model, ours, the paper's, their difference in standard errors")
    for prompt, model in itertools.product(PAPER[name], MODELS):
        theirs = float(PAPER[name][prompt].split()[MODELS.index(model)])
        rows = [row for row in rows_of(name) if (row["prompt_type"], row["model_type"]) == (prompt, model)]
        assert len(rows) == 60
        *without, ours = (METRICS[name]([row for row in rows if row is not but]) for but in [*rows, None])
        errors.append((ours - theirs) / error_of(without))
        gaps.append([figure - theirs for figure in (*without, ours)])
        print(f"  {prompt:10} {model:15} {ours:8.3f} {theirs:8.3f} {errors[-1]:6.1f}")
    *without, gap = map(statistics.mean, zip(*gaps))
    print(f"  mean difference {gap:.3f} ± {error_of(without):.3f}")
    assert max(map(abs, errors)) < 3.6 and abs(gap) < 3 * error_of(without)


def texts():
    """Pairs of texts: some of signs at random, some by hand."""
    rng, signs = random.Random(0), "ab 12.,-'\"&;<>[]`~{}()!/:@é٣\n_$%A"
    drawn = ["".join(rng.choices(signs, k=rng.randint(0, 40))) for _ in range(400)]
    drawn += ["He said: &quot;1,000.5&quot; - 3-4 ...", "a-\nb 3.a .3 <skipped>x", "İstanbul's naïve café", "", "the"]
    drawn += ["The cat sat on the mat.", "the cat sat on a mat, and slept.", "On the mat, the cat sat on the mat."] * 9
    return list(itertools.pairwise(drawn))


def test_bleu_is_that_of_sacrebleu():
    """Its default: the tokenisation 13a, case counts; the smoothing of texts too short for BLEU is left out."""
    sacrebleu = pytest.importorskip("sacrebleu")
    pairs = texts()
    for said, right in ([*zip(*pairs)], [*zip(*pairs[::-3])], *(([a], [b]) for a, b in pairs)):
        theirs = sacrebleu.corpus_bleu(said, [right], smooth_method="none", use_effective_order=False).score
        assert 100 * findings.bleu(said, right) == pytest.approx(theirs, abs=1e-9)
        assert theirs > 0.5 or len(said) == 1


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for said, right in texts():
        theirs = scorer.score(right, said)["rougeL"].fmeasure
        assert findings.rouge_l(said, right) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("said, right, expected", [  # by hand, as SQuAD's own script normalises
    # L28: 3 words (articles left out) against 2, 2 shared: 2 * 2 / (3 + 2)
    ("in the North Sea", "North Sea", 0.8),
    ("tom tom", "tom.", 2 / 3),  # the second tom has no partner: 2 * 1 / (2 + 1)
    ("$49,570", "49570", 1.0),  # signs go, without a space in their place
    ("Thirty-three", "thirty three", 0.0),
    ("Not in background.", "not in the background", 1.0),
    ("1912", "In 1912", 2 / 3),  # a number is one word, not four digits
    ("Bürgi", "burgi", 0.0), ("naïve café", "Naïve Café!", 1.0),  # letters of any language
    ("theory", "the ory", 0.0),  # an article is a whole word
    ("The", "", 1.0), ("", "x", 0.0),  # nothing left on both sides: the same
])
def test_f1_is_squads(said, right, expected):
    assert findings.f1(said, right) == findings.f1(right, said) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure, said, right, expected", [
    # 5/6 words (the second "the" has no partner), 3/5 pairs, 2/4, 1/3: (1/12)^(1/4)
    ("bleu", "the cat sat on the mat", "the cat sat on a mat", (1 / 12) ** 0.25),
    # clipping: the second a is no hit, 4/5, 3/4, 2/3, 1/2; and no prize for length
    ("bleu", "a b c d a", "a b c d", 0.2 ** 0.25),
    # brevity penalty: every word is right, but 4 of 5 are there: exp(1 - 5/4)
    ("bleu", "a b c d", "a b c d e", math.exp(-0.25)),
    ("bleu", "a b c", "a b c", 0.0), ("bleu", "", "a b c d", 0.0),  # no four words in a row
    # two answers together: 4 + 3 of 8 words, 3 + 1 of 6 pairs, 2 of 4, 1 of 2; each alone has 1 and 0
    ("bleu", ["a b c d", "a x c d"], ["a b c d", "a b c d"], (7 / 8 * 4 / 6 * 2 / 4 * 1 / 2) ** 0.25),
    # 6 and 7 words, signs are none, and "tom a fox in alba" stands in both in this order: 2 * 5 / (6 + 7)
    ("rouge_l", "Tom saw a fox in alba.", "tom found a red fox in alba", 10 / 13),
    ("rouge_l", "a b", "b a", 0.5), ("rouge_l", "a", "a a", 2 / 3),  # a word stands for one
])
def test_bleu_and_rouge_l_by_hand(measure, said, right, expected):
    assert getattr(findings, measure)(said, right) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("text, words", [  # by hand, from WMT's mteval-v13a
    ("Great article, thanks!", "Great article , thanks !"), ("1,000.5 or .5, and 3-4", "1,000.5 or . 5 , and 3 - 4"),
    ("don't, well-known U.S.", "don't , well-known U . S ."), ("&quot;a&quot; &amp; (b)", '" a " & ( b )'),
    ("Café...\nÉté", "Café . . . Été"), ("a-\nb", "ab"),
])
def test_the_words_of_bleu(text, words):
    assert findings.mteval_words(text) == words.split()
