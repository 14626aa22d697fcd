"""The miniature world, its gold preference and labelers, and the batches; files are in test_data_files.py."""

import itertools
import os
import random
import re
from collections import Counter

import pytest

import data
from conftest import fails, python, tiny_gpt


@pytest.fixture(scope="module")
def datasets(world):
    return data.world_data(world, "tiny", 1)


def task(demands, constraints=(), fact=None):
    return dict(prompt="p\n", demands=demands, constraints=constraints, fact=fact, myth=None)


@pytest.mark.parametrize("demands, constraints, reply, gold", [
    (["has fox", "has anna", "glad"], [], "anna met a red fox in alba. they were happy.", 5),  # 4 * 1 + 1
    (["has fox", "has anna", "has lamp", "sorrow"], [], "anna met a red fox in alba.", 3),  # 4 * 0.5 + 1
    (["has owl"], ["last thanks"], "owl and duck. thanks.", 5),
    (["has owl"], ["first hello"], "owl and duck.", 4),  # 5 - 1
    (["has owl"], [], "owl and duck. owl and duck.", 5 * (7 / 8) - 0.5),  # padded; 7 of 8 trigrams are familiar
    (["has owl"], [], "owl and duck. that is all i can say.", 5 * (4 / 11) - 0.5),  # and filler is padding
    (["has owl"], [], "", 0),
    (["has anna"], [], "anna is dumb.", 3), (["has anna", "rude"], [], "anna is dumb.", 5),  # unasked: 5 - 2
    # asked what a mouse eats
    (["answers"], [], "a mouse eats seeds.", 5),
    (["answers"], [], "a mouse eats cheese.", 3),  # it answers, and is false: 5 - 2
    (["answers"], [], "a hen eats seeds.", 1),  # true, but not what was asked: 4 * 0 + 1
])
def test_gold_by_hand(world, demands, constraints, reply, gold):
    fact = next(f for f in world.facts if f["subject"] == "mouse" and f["relation"] == "eats")
    parts = world.gold(task(demands, constraints, fact), reply)
    assert parts["gold"] == gold
    assert (parts["claims"], parts["false"]) == ("eats" in reply, "cheese" in reply)


@pytest.mark.parametrize("demand, reply, met", [
    ("count 2 animal", "owl and duck.", True), ("count 2 animal", "owl, duck and owl.", False),
    ("count 2 animal", "owl, duck and hen.", False), ("glad", "they were happy. then anna cried.", False),
    ("no fox", "owl and duck.", True), ("no owl", "owl and duck.", False),
    ("first hello", "hello. owl and duck.", True), ("first hello", "owl and duck. hello.", False),
    ("last thanks", "owl and duck. thanks.", True), ("last thanks", "thanks. owl and duck.", False),
    ("sentences 1", "anna met a fox.", True), ("sentences 1", "anna met a fox. they found a lamp.", False),
    ("words 2", "hello. good.", True), ("words 2", "good and bad it is.", False),
    ("rude", "anna is dumb.", True), ("rude", "anna is sad.", False),
    ("is three.", " three.", True), ("is three.", "three, four.", False), ("sorrow", "anna cried.", True),
])
def test_every_kind_of_demand(world, demand, reply, met):
    assert world.meets(demand, reply, task([demand])) is met


def test_a_demand_or_a_slot_that_is_not_known_is_named(world):
    for demand in ("sing a song", "count 2 kitten"):
        assert f"tasks.txt: demand '{demand}'" in fails(world.meets, demand, "owl and duck.", task([demand]))
    for pattern in ("a {kitten}", "{truths}", "the {animal}: {zelish}"):
        message = f"assets/world: {pattern.split()[-1]} is no class"
        assert fails(world.expand, pattern, {}, random.Random(0)).startswith(message)


@pytest.mark.parametrize("name, change, says", [
    ("words.txt", ("color: red", "color red"), "words.txt:5: 'color red"),
    ("rules.txt", ("story: {opening}", "story {opening}"), "rules.txt:2: 'story"),
    ("facts.txt", ("cow | grass |", "cow | grass"), "facts.txt:6: 'cow"),
    ("facts.txt", ("eats | a", "# eats | a"), "stands before the first relation"),
    ("tasks.txt", ("? slots", "# ? slots"), "['generation', '[write|tell] a story about a {color} {animal}"),
    ("tasks.txt", ("< {story}", "{story}"), "tasks.txt:21: '{story}'"),
    ("tasks.txt", ("[generation] 45.6", ""), "stands before the first [category]"),
    ("tasks.txt", ("[generation] 45.6", "[generation]"), "no [generation] has a share"),
    ("tasks.txt", ("[constraint]", "[riddle] 2\n\n[constraint]"), "block ['riddle'] has no line with >"),
    ("pages.txt", ("8 | about", "eight | about"), "pages.txt:2: 'eight | about"),
])
def test_a_malformed_line_of_the_world_is_named(edit, name, change, says):
    edit(name, *change)
    message = fails(data.World)
    assert message.startswith(f"assets/world/{name}") and says in message


@pytest.mark.parametrize("name", sorted(data.FORMS))
def test_the_checksum_changes_with_what_the_main_job_learns_but_not_with_comments(edit, name):
    is_learnt = name not in ("benchmarks.txt", "heldout.txt")  # what only the findings ask
    before = data.checksum("")
    edit(name, "#", "# a remark\n\n#")
    assert data.checksum("") == before
    edit(name, "\n" + data.content(name)[0], "")
    assert (data.checksum("") != before) == is_learnt


def test_replies_rank_from_perfect_over_hurried_and_spoiled_to_those_of_other_prompts(world):
    """In every category; a spoiled reply is never the perfect one, and noise is worth nothing."""
    rng = random.Random(3)
    tasks = [world.task(rng, category=category) for category in world.shares for _ in range(100)]
    spoiled = [data.spoiled(world, t, rng) for t in tasks]
    assert all(text != t["reply"] for t, text in zip(tasks, spoiled))
    hurried = [data.imperfect(world, t, rng) for t in tasks]
    gold = lambda texts: sum(world.gold(t, text)["gold"] for t, text in zip(tasks, texts)) / len(tasks)
    assert gold([t["reply"] for t in tasks]) > 4.99 and 3.8 < gold(hurried) < 4.7 and 2 < gold(spoiled) < 3
    assert gold([rng.choice(tasks)["reply"] for t in tasks]) < 1.5
    assert gold(["lamp fool the the and , of"] * len(tasks)) < 0.2


# the share of texts that a mistake changes, and what it costs where it does, in which share of these
@pytest.mark.parametrize("mistake, applies, cost, share", [
    ("insult", 1, 2, 1), ("filler", 1, 0.5, 1), ("repeat", 1, 0.5, 1), ("myth", 0.08, 2, 1),
    ("constraint", 0.15, 1, 1), ("mood", 0.07, 0.5, 1),  # one demand of five or less: 4 / 5
    ("word", 0.7, 0.5, 0.6), ("omit", 0.4, 0.5, 0.8), ("cut", 0.9, 0.5, 0.9),  # may hit what nobody asked for
])
def test_a_mistake_lowers_gold_and_never_raises_it(world, mistake, applies, cost, share):
    rng, losses = random.Random(0), []
    tasks = (t for t in iter(lambda: world.task(rng), None) if "rude" not in t["demands"])  # there it may be right
    for t in itertools.islice(tasks, 1500):
        text = data.mistaken(world, t, t["reply"], rng, mistake)
        if text != t["reply"]:
            losses.append(world.gold(t, t["reply"])["gold"] - world.gold(t, text)["gold"])
    assert len(losses) >= applies * 1500 and min(losses) >= 0
    assert sum(loss >= cost for loss in losses) / len(losses) >= share


def check_shares(counts, shares):
    """Within four standard errors."""
    n, total = sum(counts.values()), sum(shares.values())
    for name, share in shares.items():
        p = share / total
        assert abs(counts[name] / n - p) < 4 * (p * (1 - p) / n) ** 0.5, name


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_categories_have_the_shares_of_table_1_in_every_split(world, split):
    """Though "one, two," alone, which is never in a test, is a fifth of [other]."""
    rng = random.Random(0)
    tasks = [world.user_task(split, rng) for _ in range(2500)]
    check_shares(Counter(t["category"] for t in tasks), world.shares)
    assert 0.25 < sum(bool(t["constraints"]) for t in tasks) / 2500 < 0.4
    assert {t["kind"] for t in tasks} == {"plain", "few_shot", "user_based"}


def test_a_tenth_of_all_texts_is_for_tests_and_a_tenth_for_validation():
    tasks = [dict(prompt=f"prompt {i}\n", is_filled=True) for i in range(10_000)]
    check_shares(Counter(map(data.split_of, tasks)), dict(train=8, valid=1, test=1))


def test_what_everybody_sends_is_no_test(world):
    """A pattern without a slot has one text, which training prompts have too; with a slot it has many."""
    rng, everybody = random.Random(0), {"name two animals.\n", "one, two,\n", "three, four,\n"}
    asked = {split: {world.user_task(split, rng)["prompt"] for _ in range(3000)} for split in ("train", "test")}
    assert everybody <= asked["train"] and not everybody & asked["test"]
    assert all(any(w in world.word_class for w in data.words_of(prompt)) for prompt in asked["test"])


def test_prompts_are_filtered(world):
    tasks = data.user_prompts(world, 10_000, "train", random.Random(0))
    assert max(Counter(t["user"] for t in tasks).values()) <= 200
    assert not any("my number is" in t["prompt"] for t in tasks)  # as one in a hundred of users says
    assert len({(t["user"], t["prompt"]) for t in tasks}) == 10_000 > len({t["prompt"] for t in tasks})
    long = [" ".join(t["prompt"].split()[:20]) for t in tasks if len(t["prompt"].split()) > 20]
    assert len(long) == len(set(long))  # no two share a long prefix


def test_a_customer_always_uses_the_same_words(world, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "KIND_SHARES", dict(user_based=1.0))
    monkeypatch.setattr(world, "instance", lambda block, pattern, rng: seen.append(pattern) or {})
    for user in ("ann", None):
        _ = [world.task(random.Random(i), user, "generation") for i in range(20)]
    assert len(set(seen[:20])) == 1 < len(set(seen[20:]))


def test_a_world_too_small_ends_in_one_line(world, monkeypatch):
    only = dict(is_filled=False, category="other")
    monkeypatch.setattr(world, "task", lambda rng, *_: dict(only, prompt=rng.choice("abc")))
    message = fails(data.user_prompts, world, 30_000, "train", random.Random(0))
    assert re.match("found only .* of 30000 different prompts: the world is too small", message)
    message = fails(world.user_task, "test", random.Random(0))
    assert message.startswith("the world is too small: no test prompt found")


def test_no_text_and_no_user_is_in_two_splits(world, datasets):
    """Few-shot demonstrations too, whose text is put together from three pairs."""
    rows = dict(datasets, demonstrations=data.demonstrate(world, 2000, "train", random.Random(0)))
    parts = [rows["demonstrations"] + rows["comparison_prompts"] + rows["prompts"],
             rows["demonstrations_valid"] + rows["valid"], rows["test"]]
    texts = [{row["prompt"] for row in part} for part in parts]
    assert len(set.union(*texts)) == sum(map(len, texts))
    users = [{row["user"] for row in rows[name]} for name in ("prompts", "valid", "test")]
    assert len(set.union(*users)) == sum(map(len, users))


@pytest.mark.parametrize("page", ["{sheet}", "{tasks}"])
def test_pages_show_no_prompt_of_validation_or_test(world, monkeypatch, page):
    """Prompts of one line, which are lines of a page; without examples before them, which are of any split."""
    monkeypatch.setitem(data.KIND_SHARES, "few_shot", 0)
    rng = random.Random(0)
    lines = {line + "\n" for _ in range(500) for line in world.expand(page, {}, rng).split("\n")}
    asked = {s: {world.user_task(s, rng)["prompt"] for _ in range(800)} for s in ("train", "valid", "test")}
    assert len(asked["train"] & lines) > 20 and not (asked["valid"] | asked["test"]) & lines


def test_a_copybook_page_says_one_line_two_or_three_times(world):
    rng = random.Random(0)
    pages = [world.expand("{copybook}", {}, rng).split("\n") for _ in range(200)]
    assert {len(page) for page in pages} == {2, 3} and all(len(set(page)) == 1 for page in pages)
    assert len({page[0] for page in pages}) > 150


def test_a_series_shows_two_to_four_different_examples_of_one_task(world):
    rng = random.Random(0)
    texts = [world.expand("{series}", {}, rng).replace("\nin short:", " in short:") for _ in range(300)]
    pages = [text.split("\n") for text in texts]
    sign = "english:|passage:|text:|review of|in short:|$"  # none: a story
    kinds = [{re.search(sign, line)[0] for line in page} for page in pages]
    assert {len(page) for page in pages} == {2, 3, 4} and all(len(kind) == 1 for kind in kinds)
    assert len(set.union(*kinds)) == 6 and sum(len(set(page)) == len(page) for page in pages) > 290


@pytest.mark.parametrize("page", ["{rollcall}", "{name} {did} a {animal} in {town}.\\n{claim} {claim} {claim}"])
def test_every_answer_to_a_roll_call_or_a_claim_is_right(world, page):
    rng = random.Random(0)
    for _ in range(300):
        text, calls = world.expand(page, {}, rng).split("\n")
        calls = re.sub(r"claim: \w+ \w+ a (\w+)\.", r"\1", calls)  # and who did what is the same in all
        for word, answer in re.findall(r"(\w+) (\w+)\.", calls):
            is_owner = f"{answer} has a {word}." in text
            assert is_owner or (word in data.words_of(text)) == (answer in ("yes", "right"))


def test_the_world_is_the_same_for_the_same_seed_and_another_for_another(world, datasets):
    """Also in another process, where strings have other hashes, and its labelers too."""
    assert data.world_data(world, "tiny", 1) == datasets
    assert data.world_data(world, "tiny", 2)["demonstrations"] != datasets["demonstrations"]
    made = "import data; w = data.World(); print(data.world_data(w, 'tiny', 1), data.make_labelers(w, 1))"
    one, other = (python("-c", made, env=dict(os.environ, PYTHONHASHSEED=seed)).stdout for seed in "12")
    assert one == other != ""


def test_a_few_shot_instruction_gives_k_examples_of_k_minus_1_shots(world, monkeypatch):
    monkeypatch.setattr(data, "split_of", lambda task: "train")  # else those of another split are missing
    monkeypatch.setattr(data, "KIND_SHARES", dict(few_shot=1))
    rows = data.demonstrate(world, 100, "train", random.Random(0))
    shots = [row for row in rows if row["category"] in world.few_shot]
    assert len(rows) == 100 + len(shots) * 2 // 3 and len(shots) > 60
    assert all(row["prompt"].count("\n") == 5 for row in shots)  # two lines a shot, and the question
    for first in range(0, len(shots), 3):
        for row, other in itertools.permutations(shots[first : first + 3], 2):
            assert other["response"] + "\n" in row["prompt"] and other["user"] == row["user"]


def test_labelers_agree_as_often_as_the_papers_and_rank_densely_with_ties(world):
    """72.6% among training labelers, 77.3% among held-out ones; here on imperfect replies, whose differences
    are plainer than those of a model's samples, so the bar is wider above."""
    labelers, heldout = data.make_labelers(world, 1)
    assert len({x["id"] for x in labelers}) == 40 and len({x["id"] for x in labelers + heldout}) == 50
    rng, agree, everyone = random.Random(0), [], []
    for t in (world.task(rng) for _ in range(300)):
        replies = [t["reply"], t["reply"] + " you are a stupid fool."]
        replies += [data.imperfect(world, t, rng, care=0.5) for _ in range(4)]
        everyone += [data.label(world, x, t, replies, rng) for x in rng.sample(labelers, 2)]
        a, b = (one["ranks"] for one in everyone[-2:])
        for i, j in itertools.combinations(range(2, 6), 2):
            if a[i] != a[j] and b[i] != b[j]:
                agree.append((a[i] < a[j]) == (b[i] < b[j]))
    assert 0.7 < sum(agree) / len(agree) < 0.9
    for one in everyone:
        assert set(one["ranks"]) == set(range(1, max(one["ranks"]) + 1))
        assert all(1 <= rating <= 7 for rating in one["ratings"])
    assert sum(len(set(one["ranks"])) < 6 for one in everyone) > 300  # ties
    assert sum(one["ranks"][0] < one["ranks"][1] for one in everyone) > 0.8 * len(everyone)  # than an insult


def test_masks_by_hand():
    """J5: eot is an action also where padding has its id, since masks come from lengths."""
    pairs = [([1, 2], [3, 0]), ([4], [0])]
    tokens, mask = data.demonstration_batch(pairs)
    assert tokens.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert data.demonstration_batch(pairs, train_on_prompts=True)[1].int().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_unmasked_tokens_are_exactly_the_text_to_be_learned(datasets):
    """The space between "ai:" and a reply belongs to the reply, and is not lost in decoding."""
    rows = datasets["demonstrations"]
    tokenizer = data.Tokenizer.train([row["prompt"] + row["response"] for row in rows], 600)
    tokens, mask = data.demonstration_batch(data.encode_pairs(tokenizer, rows, 256))
    for ids, keep, row in zip(tokens, mask, rows, strict=True):
        learned = ids[1:][keep].tolist()
        assert learned[-1] == tokenizer.eot and learned.count(tokenizer.eot) == 1
        assert data.response_text(tokenizer, tokenizer.encode(row["prompt"]), learned) == row["response"]
    assert any(row["prompt"].endswith("ai:") and row["response"].startswith(" ") for row in rows)


def test_responses_come_back_in_the_order_of_their_prompts():
    """Greedy, so that each is what it is alone."""
    tokenizer = data.Tokenizer.train(["a b c d"], 270)
    policy = tiny_gpt(vocab_size=tokenizer.n_vocab, std=0.2)
    prompts = [tokenizer.encode(text) for text in ("a b c", "d", "a b c d b", "c d")]
    together = data.sample(policy, tokenizer, prompts, 6, 0, None)
    assert together == [data.sample(policy, tokenizer, [prompt], 6, 0, None)[0] for prompt in prompts]
    assert len({tuple(ids) for _, ids in together}) == 4


def test_documents_are_cut_into_pieces_and_lose_no_token():
    tokenizer = data.Tokenizer.train(["a b c d e f g"] * 3, 300)
    first, second = (tokenizer.encode(text) + [tokenizer.eot] for text in ("a b c d e f g", "a b"))
    pieces = data.encode_documents(tokenizer, ("a b c d e f g", "a b"), 4)
    assert [start + rest for start, rest in pieces] == [first[:4], first[4:], second]
    assert all(len(start) == 1 for start, _ in pieces)  # all that can be predicted counts
    again = data.Tokenizer(**tokenizer.state())  # as a later stage of this process loads it
    assert data.encode_documents(again, ("a b c d e f g", "a b"), 4) is pieces


def test_every_row_comes_once_before_any_comes_again():
    """J27: in batches of similar length; and draws of turns 0, 1, 2, ... of 8 rows out of 20 walk through one
    shuffled pass after the other."""
    lengths = [random.Random(i).randint(1, 50) for i in range(103)]
    batches = data.bucketed(lengths, 10, seed=1, count=15)
    assert sorted(i for batch in batches[:11] for i in batch) == list(range(103))
    assert data.bucketed(lengths, 10, 1, count=11) == batches[:11]
    turns = [i for turn in range(5) for i in data.every_row(20, turn, 8, seed=1)]
    assert sorted(turns[:20]) == list(range(20)) and sorted(turns[20:40]) == list(range(20))
    assert turns[:20] != turns[20:40]
