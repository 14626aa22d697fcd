"""The miniature world, its gold preference and labelers, and the batches:
data.py without its files and importers."""

import itertools
import random
import shutil
from collections import Counter

import pytest

import data
import sft


@pytest.fixture(scope="module")
def world():
    return data.World()


@pytest.fixture(scope="module")
def datasets(world):
    return data.world_data(world, "tiny", 1)


def task(demands, constraints=(), fact=None, prompt="p\n"):
    return dict(prompt=prompt, demands=list(demands), constraints=list(constraints), fact=fact, myth=None)


# ------------------------------------------------------------------------------------------------------------
# the gold preference, by hand


def test_gold_of_a_perfect_reply_is_five(world):
    parts = world.gold(task(["has fox", "has anna", "glad"]), "anna met a red fox in alba. they were happy.")
    assert parts["follows"] == 1 and parts["fluent"] == 1 and parts["constraint"] is None
    assert parts["gold"] == 5  # 4 * follows * fluent + fluent


def test_gold_counts_the_share_of_demands_met(world):
    parts = world.gold(
        task(["has fox", "has anna", "has lamp", "sorrow"]), "anna met a red fox in alba. they were happy."
    )
    assert parts["follows"] == 0.5 and parts["gold"] == 3  # 4 * 0.5 + 1


@pytest.mark.parametrize("demand, reply, met", [
    ("count 2 animal", "owl and duck.", True),
    ("count 2 animal", "owl and owl.", False),
    ("count 2 animal", "owl, duck and hen.", False),
    ("no fox", "owl and duck.", True),
    ("no owl", "owl and duck.", False),
    ("first hello", "hello. owl and duck.", True),
    ("first hello", "owl and duck. hello.", False),
    ("last thanks", "owl and duck. thanks.", True),
    ("last thanks", "thanks. owl and duck.", False),
    ("sentences 1", "anna met a red fox in alba.", True),
    ("sentences 1", "anna met a red fox in alba. they found a lamp.", False),
    ("words 2", "hello. good.", True),
    ("words 2", "good and bad it is.", False),
    ("is three.", " three.", True),
    ("is three.", "three, four.", False),
    ("glad", "they were happy. then anna cried.", False),
    ("sorrow", "then anna cried.", True),
])
def test_every_kind_of_demand(world, demand, reply, met):
    words = data.words_of(reply)
    assert world.meets(demand, reply, words, task([demand])) is met


def test_an_unknown_demand_names_the_file(world):
    with pytest.raises(ValueError, match="tasks.txt"):
        world.meets("sing a song", "la", ["la"], task([]))


@pytest.mark.parametrize("name, change, says", [
    ("words.txt", ("color: red", "color red"), "words.txt:4: 'color red"),
    ("rules.txt", ("story: {opening}", "story {opening}"), "is not rule: pattern"),
    ("facts.txt", ("cow | grass |", "cow | grass"), "is not subject | truth | misconception"),
    ("facts.txt", ("{value}.", "{food}."), "is not subject | truth | misconception"),
    ("facts.txt", ("eats | a", "# eats | a"), "stands before the first relation"),
    ("tasks.txt", ("? slots", "# ? slots"), "['generation', '[write|tell] a story about a {color} {animal}"),
    ("tasks.txt", ("< {story}", "{story}"), "tasks.txt:19: '{story}' is not > prompt, < reply"),
    ("tasks.txt", ("[generation]", "[genration]"), "is not > prompt, < reply"),
    ("tasks.txt", ("[generation]", ""), "stands before the first [category]"),
    ("pages.txt", ("8 | about", "eight | about"), "pages.txt:2: 'eight | about"),
])
def test_a_malformed_line_of_the_world_is_named(tmp_path, monkeypatch, name, change, says):
    shutil.copytree(data.WORLD, tmp_path / "world")
    text = (tmp_path / "world" / name).read_text()
    assert change[0] in text
    (tmp_path / "world" / name).write_text(text.replace(*change, 1))
    monkeypatch.setattr(data, "WORLD", str(tmp_path / "world"))
    with pytest.raises(ValueError) as stop:
        data.World()
    assert str(stop.value).startswith(f"assets/world/{name}") and "\n" not in str(stop.value)
    assert says in str(stop.value)


def test_truth_is_read_off_the_claims(world):
    fact = next(f for f in world.facts if f["subject"] == "mouse" and f["relation"] == "eats")
    question = task(["answers"], fact=fact)
    right, wrong = world.gold(question, "a mouse eats seeds."), world.gold(question, "a mouse eats cheese.")
    assert (right["claims"], right["false"], right["gold"]) == (1, 0, 5)
    assert (wrong["claims"], wrong["false"], wrong["gold"]) == (1, 1, 3)  # it answers, and is false: 5 - 2
    dodge = world.gold(question, "a hen eats seeds.")
    assert (dodge["follows"], dodge["false"]) == (0, 0)  # true, but not what was asked


@pytest.mark.parametrize("reply, part, loss", [
    ("owl and duck. you are a stupid fool.", "rude", 2),
    ("owl and duck. owl and duck.", "padded", 0.5),
])
def test_rude_and_padded(world, reply, part, loss):
    parts = world.gold(task(["has owl", "has duck"]), reply)
    assert parts[part] == 1
    assert parts["gold"] == pytest.approx(5 * parts["fluent"] - loss)


def test_a_violated_constraint_costs_one_point(world):
    parts = world.gold(task(["has owl"], ["first hello"]), "owl and duck.")
    assert parts["constraint"] == 0 and parts["gold"] == 4


def test_an_empty_reply_and_noise_are_worth_nothing(world):
    assert world.gold(task(["has owl"]), "")["gold"] == 0
    assert world.gold(task(["has owl"]), "lamp fool the the and , of")["gold"] < 0.5


def test_perfect_replies_score_five_and_imperfect_ones_less(world):
    rng = random.Random(3)
    tasks = [world.task(rng) for _ in range(500)]
    perfect = [world.gold(t, t["reply"])["gold"] for t in tasks]
    imperfect = [world.gold(t, data.imperfect(world, t, rng))["gold"] for t in tasks]
    other = [world.gold(t, rng.choice(tasks)["reply"])["gold"] for t in tasks]
    mean = lambda x: sum(x) / len(x)
    assert mean(perfect) > 4.97 and 3.8 < mean(imperfect) < 4.6 and mean(other) < 1.5


# ------------------------------------------------------------------------------------------------------------
# prompts, demonstrations, labelers (InstructGPT, sec. 3.2 to 3.4)


def test_categories_have_the_shares_of_table_1(world):
    rng = random.Random(0)
    counts = Counter(world.task(rng)["category"] for _ in range(8000))
    total = sum(data.CATEGORY_SHARES.values())
    for category, share in data.CATEGORY_SHARES.items():
        expected = share / total
        error = (expected * (1 - expected) / 8000) ** 0.5
        assert abs(counts[category] / 8000 - expected) < 4 * error, category


def test_about_a_quarter_of_the_prompts_has_a_constraint_and_all_three_kinds_occur(world):
    rng = random.Random(0)
    tasks = [world.task(rng, user="u") for _ in range(3000)]
    assert 0.2 < sum(bool(t["constraints"]) for t in tasks) / 3000 < 0.35
    assert set(Counter(t["kind"] for t in tasks)) == {"plain", "few_shot", "user_based"}


def test_prompts_are_filtered(world):
    rng = random.Random(0)
    tasks = data.user_prompts(world, 3000, "train", rng, set())
    assert max(Counter(t["user"] for t in tasks).values()) <= 200
    assert not any(data.has_personal_data(t["prompt"]) for t in tasks)
    assert len({(t["user"], t["prompt"]) for t in tasks}) == 3000
    long = [" ".join(t["prompt"].split()[:20]) for t in tasks if len(t["prompt"].split()) > 20]
    assert len(long) == len(set(long))  # no two share a long prefix


def test_a_world_too_small_for_so_many_prompts_ends_in_one_line(world, monkeypatch):
    [*tasks] = [world.task(random.Random(seed)) for seed in range(3)]
    monkeypatch.setattr(world, "task", lambda rng, user: dict(rng.choice(tasks)))
    with pytest.raises(SystemExit, match="the world is too small"):
        data.user_prompts(world, 300, "train", random.Random(0), set())


def test_personal_data_is_a_phone_number():
    assert data.has_personal_data("i am anna, my number is 5 3 4 2. name two animals.")
    assert not data.has_personal_data("name two animals.")


def test_no_user_and_no_text_of_training_is_in_the_test_prompts(datasets):
    train = datasets["prompts"] + datasets["comparison_prompts"]
    for split in ("valid", "test"):
        assert not {t["user"] for t in train} & {t["user"] for t in datasets[split]}
        assert not {t["prompt"] for t in train} & {t["prompt"] for t in datasets[split]}
    assert not {t["user"] for t in datasets["valid"]} & {t["user"] for t in datasets["test"]}


def test_the_world_is_the_same_for_the_same_seed_and_another_for_another(world, datasets):
    again = data.world_data(world, "tiny", 1)
    assert again["demonstrations"] == datasets["demonstrations"] and again["test"] == datasets["test"]
    assert data.world_data(world, "tiny", 2)["demonstrations"] != datasets["demonstrations"]


def test_a_few_shot_instruction_gives_k_examples_of_k_minus_1_shots(world):
    rows = data.demonstrate(world, 400, random.Random(0))
    shots = [row for row in rows if row["prompt"].count("\n") > 2 and row["category"] != "chat"]
    assert len(rows) > 400 and shots
    first = shots[0]
    siblings = [
        row for row in shots if row["response"] + "\n" in first["prompt"] and row["user"] == first["user"]
    ]
    assert len(siblings) >= 2  # its two shots are the replies of the two other examples


def test_labelers_agree_as_often_as_the_papers(world):
    """72.6% among training labelers, 77.3% among held-out ones; here on imperfect replies, whose differences
    are plainer than those of a model's samples, so the bar is wider above."""
    labelers, heldout = data.make_labelers(world, 1)
    assert (len(labelers), len(heldout)) == (40, 10)
    assert not {x["id"] for x in labelers} & {x["id"] for x in heldout}
    rng = random.Random(0)
    agree = total = 0
    for _ in range(300):
        t = world.task(rng)
        replies = [data.imperfect(world, t, rng, care=0.5) for _ in range(4)]
        a, b = (data.label(world, x, t, replies, rng)["ranks"] for x in rng.sample(labelers, 2))
        for i, j in itertools.combinations(range(4), 2):
            if a[i] != a[j] and b[i] != b[j]:
                agree += (a[i] < a[j]) == (b[i] < b[j])
                total += 1
    assert 0.7 < agree / total < 0.9


def test_ranks_are_dense_from_1_and_ties_occur(world):
    labelers, _ = data.make_labelers(world, 1)
    rng, tied = random.Random(0), 0
    for _ in range(100):
        t = world.task(rng)
        judged = data.label(
            world, rng.choice(labelers), t, [data.imperfect(world, t, rng) for _ in range(6)], rng
        )
        assert set(judged["ranks"]) == set(range(1, max(judged["ranks"]) + 1))
        assert all(1 <= rating <= 7 for rating in judged["ratings"])
        tied += len(set(judged["ranks"])) < 6
    assert tied > 50


def test_labelers_prefer_the_better_reply(world):
    labelers, _ = data.make_labelers(world, 1)
    rng = random.Random(0)
    wins = []
    for _ in range(300):
        t = world.task(rng)
        replies = [t["reply"], t["reply"] + " you are a stupid fool."]
        first, second = data.label(world, rng.choice(labelers), t, replies, rng)["ranks"]
        wins.append(first < second)
    assert sum(wins) / 300 > 0.8


def test_a_spoiled_reply_has_one_mistake(world):
    rng = random.Random(0)
    worse = [
        world.gold(t, data.spoiled(world, t, rng))["gold"] for t in (world.task(rng) for _ in range(400))
    ]
    assert sum(g < 5 for g in worse) / 400 > 0.6 and sum(worse) / 400 > 3


# ------------------------------------------------------------------------------------------------------------
# batches


def test_the_unmasked_tokens_are_exactly_the_text_to_be_learned(world, datasets):
    texts = [row["prompt"] + row["response"] for row in datasets["demonstrations"]]
    tokenizer = data.Tokenizer.train(texts, 600)
    pairs = data.encode_pairs(tokenizer, datasets["demonstrations"], 256)
    tokens, mask = sft.demonstration_batch(pairs[:16])
    for row, keep, demonstration in zip(tokens, mask, datasets["demonstrations"]):
        learned = row[1:][keep].tolist()
        assert learned[-1] == tokenizer.eot and learned.count(tokenizer.eot) == 1
        start = tokenizer.encode(demonstration["prompt"])
        assert data.response_text(tokenizer, start, learned) == demonstration["response"]


def test_sampled_text_joins_its_prompt_as_it_was_sampled(world):
    """The space between "ai:" and a reply belongs to the reply, and is not lost in decoding."""
    tokenizer = data.Tokenizer.train(["human: hello.\nai: you live in alba."] * 3, 400)
    prompt = tokenizer.encode("human: hello.\nai:")
    response = tokenizer.encode(" you live in alba.") + [tokenizer.eot]
    assert data.response_text(tokenizer, prompt, response) == " you live in alba."


def test_documents_are_cut_into_pieces_and_lose_no_token():
    tokenizer = data.Tokenizer.train(["a b c d e f g h i j"] * 3, 300)
    pieces = data.encode_documents(tokenizer, ["a b c d e f g h i j", "a b"], 4)
    assert max(map(len, pieces)) == 4
    whole = tokenizer.encode("a b c d e f g h i j") + [tokenizer.eot]
    assert sum(pieces[:3], []) == whole[: len(sum(pieces[:3], []))]


def test_bucketed_batches_use_every_row_once_an_epoch():
    lengths = [random.Random(i).randint(1, 50) for i in range(103)]
    batches = data.bucketed(lengths, 10, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(103))
    two = data.bucketed(lengths, 10, 1, count=15)
    assert len(two) == 15 and two[:11] == batches


def test_every_prompt_comes_once_before_any_comes_again():
    """J27: draws of turns 0, 1, 2, ... of 8 rows out of 20 walk through one shuffled pass after the other."""
    turns = [i for turn in range(5) for i in data.every_row(20, turn, 8, seed=1)]
    assert sorted(turns[:20]) == list(range(20)) and sorted(turns[20:40]) == list(range(20))
    assert turns[:20] != turns[20:40]


def test_rows_that_do_not_fit_are_dropped_and_counted(capsys):
    assert data.fitting(["ab", "abcdef"], len, 3, "prompts") == ["ab"]
    assert "dropped 1 of 2 prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="all 1 prompts"):
        data.fitting(["abcdef"], len, 3, "prompts")


def test_every_prefix_of_prompted_gpt_is_there(world):
    assert "\n".join(data.content("prefixes.txt")).count("---") == 3
