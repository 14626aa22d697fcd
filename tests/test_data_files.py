"""Tokenizer, dataset files, importers. Tests of real data skip without INSTRUCTGPT_TEST_DATA, its folder."""

import gzip
import json
import os
import random
import re
from collections import Counter

import pytest

from conftest import fails, write  # first: it puts the repository on the path
import data
from data import FORMATS, Tokenizer, import_files, import_main, import_rows, read_folder, read_jsonl

DATA = os.environ.get("INSTRUCTGPT_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="INSTRUCTGPT_TEST_DATA is unset: no real data")
TEXTS = [
    "the cat sat on the mat, didn't it?\nthe dog sat too.\n\n  'the end' in 2024!",
    "a fox and a hen\n\ta hen",
]
CHOICE = {"prompt": "p\n", "responses": ["a", "b"], "ranks": [1, 2]}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(TEXTS, 600)


def used(format, *paths):
    """-> files (of pretrain.txt the texts), places of the unused rows (lines, or in an array "row 3")."""
    made, unused = import_rows(format, paths)
    made["pretrain.txt"] = [row["text"] for row in made.get("pretrain.txt", [])]
    return made, [re.search(r":([^:]*): unusable row", line)[1] for line in unused]


def imported(tmp_path, format, rows, name="source.jsonl"):
    return used(format, write(tmp_path / name, rows))


def ranking(row):
    return dict(zip(row["responses"], row["ranks"]))


CODES = [*[10] * 60_000, *range(0xD7FF), *range(0xE000, 0x20000)]  # a third are new lines


@pytest.mark.parametrize("text", [
    pytest.param("x".join(map(chr, random.Random(0).choices(CODES, k=9000))), id="many"),
    *TEXTS, "", " ", "\n", "\n\n  x", "two  spaces", "end ", "tab\t\r\n  y", "a<|endoftext|>b",
    "\u00e9\u0301\u00b2_\u203f\x1c\x85\u2028 \u65e5\u672c\u8a9e \U0001f98a", "it's 'the' don't -- _a_ 3.14"])
def test_bpe_round_trip_is_lossless(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_a_word_is_one_id_wherever_it_stands(bpe):
    [cat] = bpe.encode("cat")
    for text in ("the cat", "cat, dog", "a hen\ncat\n", "(a cat)", "\n\ncat", "fox cat."):
        assert bpe.encode(text).count(cat) == 1, text
    assert all(len(bpe.encode(word)) == 1 for word in "the cat sat on mat dog fox and hen".split())
    assert bpe.encode(" cat\n dog") == bpe.encode("cat\ndog")  # one leading space of a line tells nothing


def test_merges_are_the_most_frequent_pairs_counted_anew_each_time():
    # " ab" x2 (one at the start) and " b": pairs " a" 2, "ab" 2, " b" 1; of a tie the smaller bytes
    assert Tokenizer.train(["ab ab b"], 600).tokens[256:] == [b" a", b" ab", b" b"]  # stops when none is left
    rng = random.Random(1)
    counts = {"".join(rng.choices("abc", k=rng.randint(1, 9))): rng.randint(1, 50) for _ in range(60)}
    words = {w: [bytes([b]) for b in w.encode()] for w in counts}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 330:
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens += [best[0] + best[1]] * (best[0] + best[1] not in tokens)
        for parts in words.values():
            for i in range(len(parts)):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
    assert data.train_bpe(counts, 330) == tokens


def test_eot_unknown_ids_state_and_errors(bpe, monkeypatch):
    assert bpe.eot == bpe.n_vocab - 1 and bpe.decode([bpe.eot]) == "<|endoftext|>"
    assert bpe.eot not in bpe.encode("a <|endoftext|> b\n<|endoftext|>")
    assert bpe.decode([10**6, -1, *bpe.encode("x")]) == "\ufffd\ufffd x"
    again = Tokenizer(**bpe.state())
    assert again.state() == bpe.state() != Tokenizer.train(TEXTS, 270).state()
    assert [again.encode(text) for text in TEXTS] == [bpe.encode(text) for text in TEXTS]
    assert "257" in fails(Tokenizer.train, TEXTS, 100) and "bpe" in fails(Tokenizer, "gtp2")
    monkeypatch.setattr("tiktoken.get_encoding", None)  # as if offline
    assert "TIKTOKEN_CACHE_DIR" in fails(Tokenizer, "gpt2")


def test_jsonl_is_read_plain_and_packed(tmp_path):
    row = {"prompt": "line\u2028separator \u00e9"}
    raw = ("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n{}").encode()  # BOM, CRLF, no last newline
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(raw)
    packed.write_bytes(gzip.compress(raw))
    assert read_jsonl(str(plain)) == read_jsonl(str(packed)) == [row, {}]
    for broken in (b"no gzip", gzip.compress(raw * 99)[:-20]):
        packed.write_bytes(broken)
        assert str(packed) in fails(read_jsonl, str(packed))
    assert "nowhere" in fails(read_jsonl, str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("name, change, word", [
    *(("prompts", line, "not JSON") for line in (b'{"a": 1', b"nonsense", b"[" * 100000)),
    *(("prompts", line, "must be a JSON object") for line in (b"[1]", b'"text"', b"3")),
    ("prompts", b'{"a": "\xe9"}', "UTF-8"),
    ("demonstrations", {"response": None}, '"response"'),
    ("demonstrations", {"response": "\ud800"}, "surrogate"),
    ("prompts", {"prompt": 3}, "must be text"), ("prompts", {"prompt": " \n"}, "empty"),
    ("prompts", {"user": ["x"]}, '"user"'),
    ("comparisons", {"responses": "ab"}, '"responses"'), ("comparisons", {"responses": ["a"]}, "two or more"),
    ("comparisons", {"responses": ["a", ""]}, "empty"), ("comparisons", {"ranks": None}, '"ranks"'),
    ("comparisons", {"ranks": [1, 2, 3]}, "3 ranks"), ("comparisons", {"ranks": [0, 1]}, "whole numbers"),
    ("comparisons", {"ranks": [True, 2]}, "true"), ("comparisons", {"ranks": ["1", 2]}, '"1"')])
def test_bad_rows_of_a_folder_name_file_and_line(tmp_path, name, change, word):
    good = {"prompt": "p", "response": "r", **CHOICE}
    bad = change if isinstance(change, bytes) else json.dumps({**good, **change}).encode()
    write(tmp_path / "comparisons.jsonl", [good])
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n" + bad + b"\n")
    message = fails(read_folder, str(tmp_path))
    assert message.startswith(f"{path}:2: ") and word in message


def test_folder_errors(tmp_path):
    folder = str(tmp_path)
    assert "nowhere" in fails(read_folder, str(tmp_path / "nowhere"))
    assert "comparisons.jsonl" in fails(read_folder, folder)
    write(tmp_path / "comparisons.jsonl", [{**CHOICE, "ranks": [1, 1]}] * 3)
    assert "tied" in fails(read_folder, folder)
    write(tmp_path / "pretrain.txt", ["<|endoftext|>"])
    assert "pretrain.txt is empty" in fails(read_folder, folder)


def test_complete_folder_is_read_as_it_stands_but_for_the_join_rule(tmp_path, capsys):
    pairs, prompts = (("a", "b"), ("a\n", "b"), ("a", " b")), [{"prompt": "q", "category": "qa"}]
    comparisons = [{**CHOICE, "ranks": [1, 1]}, CHOICE]  # a tie is legal
    write(tmp_path / "pretrain.txt", ["one", "", "two", "<|endoftext|>", " three <|endoftext|>"])
    write(tmp_path / "demonstrations.jsonl.gz", [{"prompt": p, "response": r, "user": 7} for p, r in pairs])
    # with ids of another run's encoding
    write(tmp_path / "comparisons.jsonl", [{**row, "tokens": [[5, 1], [6, 1]]} for row in comparisons])
    write(tmp_path / "prompts.jsonl", prompts)
    folder = read_folder(str(tmp_path))
    assert [row["response"] for row in folder["demonstrations"]] == ["\nb", "b", " b"]
    assert folder["pretrain"] == ["one\n\ntwo", " three <|endoftext|>"]
    assert (folder["comparisons"], folder["prompts"]) == (comparisons, prompts)
    assert capsys.readouterr().out == ""


def test_what_is_missing_is_made_from_comparisons(tmp_path, capsys):
    row = {"prompt": "p", "responses": ["a", " b", "c"], "ranks": [3, 1, 1], "user": "u"}
    write(tmp_path / "comparisons.jsonl", [row])
    folder = read_folder(str(tmp_path))
    assert folder["demonstrations"] == [{"prompt": "p", "response": " b", "user": "u"}]
    assert folder["prompts"] == [{"prompt": "p", "user": "u"}]
    assert set(folder["pretrain"]) == {"p\na", "p b", "p\nc"}
    missing = re.findall("has no (.*?):", capsys.readouterr().out)
    assert missing == ["demonstrations", "pretraining text", "prompts"]


def test_split_keeps_users_whole():
    rng, split = random.Random(0), lambda seed: data.split_by_user(rows, (0.8, 0.1, 0.1), seed)
    rows = [{"prompt": i} | ({"user": rng.randrange(20)} if i % 3 else {}) for i in range(300)]
    parts = split(1)
    assert sorted(row["prompt"] for part in parts for row in part) == list(range(300))
    users = [user for part in parts for user in {row["user"] for row in part if "user" in row}]
    assert len(users) == len(set(users)) == 20
    assert all(abs(len(p) - n) < 15 for p, n in zip(parts, (240, 30, 30)))
    assert split(1) == parts != split(2)


@pytest.mark.parametrize("rows, says", [
    ([CHOICE | {"user": "u"}] * 20, "too few users to split 20 demonstrations by user: split by row"),
    ([CHOICE], "only 1 demonstrations: those for training are used for validation and tests, too"),
])
def test_no_part_of_a_small_folder_is_empty(tmp_path, capsys, rows, says):
    write(tmp_path / "comparisons.jsonl", rows)
    write(tmp_path / "prompts.jsonl", rows)
    split = data.load(str(tmp_path), "tiny", 1)
    assert all(split[name] for name in split if name != "primer")
    assert says in capsys.readouterr().out.splitlines()


def test_hh_dialogues_part_at_a_turn(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    same = start + " Sure, yes.\n\nHuman: go on\n\nAssistant:"
    made, unused = imported(tmp_path, "hh-rlhf", [
        {"chosen": same + " Sure, A", "rejected": same + " Sure, B"},  # shared words, own replies
        {"chosen": start + " x\n\nHuman: y\n\nAssistant: z", "rejected": start + " w"},
        {"chosen": same + " ", "rejected": same + " B"},  # an empty reply
        {"chosen": "\n\nHuman: other\n\nAssistant: a", "rejected": start + " b"},
        {"chosen": start + " a", "rejected": start + " a"}, {"chosen": start + " a"}])
    first, second = made["comparisons.jsonl"]
    assert first["prompt"] == same.lstrip() and ranking(first) == {" Sure, A": 1, " Sure, B": 2}
    assert second["prompt"] == start.lstrip()
    assert ranking(second) == {" x\n\nHuman: y\n\nAssistant: z": 1, " w": 2}
    assert unused == ["3", "4", "5", "6"] and "demonstrations.jsonl" not in made  # of a model
    assert made["prompts.jsonl"] == [{"prompt": first["prompt"]}, {"prompt": second["prompt"]}]
    assert made["pretrain.txt"][0] == (same + " Sure, A").lstrip()


def test_oasst_ranks_demonstrations_and_dialogues(tmp_path):
    def message(text, role="assistant", replies=(), **more):
        return {"text": text, "role": role, "replies": list(replies), **more}
    follow = message("and?", "prompter", [message("only", synthetic=True)])
    tree = {"message_tree_id": "t1", "prompt": message("q", "prompter", [
        message("good", rank=0), message("fair", rank=1, replies=[follow]),
        message("poor", rank=2), message("unranked")])}
    made, unused = imported(tmp_path, "oasst", [tree, '"lone prompt"', {"x": 1}])
    [group], prompt = made["comparisons.jsonl"], "Human: q\n\nAssistant:"
    assert group["user"] == "t1" and ranking(group) == {" good": 1, " fair": 2, " poor": 3}
    assert made["demonstrations.jsonl"] == [{"prompt": prompt, "response": " good", "user": "t1"}]
    assert [row["prompt"] for row in made["prompts.jsonl"]] == [
        prompt, prompt + " fair\n\nHuman: and?\n\nAssistant:", "Human: lone prompt\n\nAssistant:"]
    assert unused == ["3"]


@pytest.mark.parametrize("format, row", [
    ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}),
    ("self-instruct", {"instruction": "add", "instances": [{"input": "1 2", "output": "3"}]}),
    ("dolly", {"instruction": "add", "context": "1 2", "response": "3", "category": "qa"}),
    ("dolly", {"instruction": "add\n1 2", "text": "3", "decoded": "machine text"})])
def test_instruction_formats_write_the_same_prompt(tmp_path, format, row):
    made, unused = imported(tmp_path, format, [row, {"instruction": "add"}])
    category = {"category": "qa"} if "category" in row else {}
    assert made["demonstrations.jsonl"] == [{"prompt": "add\n1 2", "response": "3", **category}]
    assert made["prompts.jsonl"] == [{"prompt": "add\n1 2", **category}]
    assert made["pretrain.txt"] == ["add\n1 2\n3"] and unused == ["2"]


def test_rows_may_stand_in_an_array_and_text_in_jsonl_or_on_lines(tmp_path):
    made, unused = imported(tmp_path, "pairs", [json.dumps([PAIR, {"x": 1}, PAIR], indent=1)], "a.json")
    assert len(made["comparisons.jsonl"]) == 2 and unused == ["row 2"]
    made, unused = imported(tmp_path, "text", [{"text": "one\n"}, {"title": "none"}, "7", {"text": "two"}])
    assert made["pretrain.txt"] == ["one", "two"] and unused == ["2", "3"]
    sentences = [data.read_rows(write(tmp_path / name, ["", "x"])) for name in ("r.neg", "r.pos")]
    assert sentences == [[(2, {"text": "x", "rating": rating})] for rating in (1, 10)]


def test_best_response_does_not_always_come_first(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(200)]
    groups, again = (imported(tmp_path, "pairs", rows)[0]["comparisons.jsonl"] for _ in range(2))
    assert all(ranking(row) == {"good": 1, "bad": 2} for row in groups) and groups == again
    assert 70 < sum(row["responses"][0] == "good" for row in groups) < 130


def reviews(n):
    """Every word tells its place and its review: w7no12."""
    rng, rows = random.Random(0), []
    for i in range(n):
        words = [f"w{j}no{i}" for j in range(rng.randint(6, 90))]
        rows.append({"text": "<br />".join(words[:2]) + " " + " ".join(words[2:]), "rating": 1 + i % 10})
    return rows


def places(rows):
    """-> of each row (place, review) of its words."""
    return [tuple((int(j), int(i)) for j, i in re.findall(r"w(\d+)no(\d+)", str(row))) for row in rows]


def test_reviews_are_cut_into_windows_of_equal_length_all_of_a_review_in_one_part(tmp_path):
    """20 words one behind the other, without what is left at the end; of a shorter review all its words.
    Openings are the first 5 of a window."""
    made, expected = imported(tmp_path, "imdb", reviews(400))[0], []
    files = "demonstrations.jsonl", "prompts.jsonl", "judge.jsonl"
    demonstrations, openings, judge = (places(made[name]) for name in files)
    for i, row in enumerate(reviews(400)):
        length = row["text"].count("no")
        starts = range(0, length - 19, 20) if length > 20 else [0]
        expected += [tuple((j, i) for j in range(start, min(start + 20, length))) for start in starts]
    opened = [window for window in expected if window[:5] in openings]
    assert openings == [window[:5] for window in opened] and places(made["pretrain.txt"]) == demonstrations
    assert sorted(demonstrations + judge + opened) == sorted(expected) and "<br" not in json.dumps(made)
    parts = [{i for window in windows for _, i in window} for windows in (demonstrations, openings, judge)]
    assert set.union(*parts) == set(range(400)) and sum(map(len, parts)) == 400
    assert all(abs(len(part) - share * 400) < 40 for part, share in zip(parts, (0.45, 0.1, 0.45)))
    # a review stays in its part when more are added
    bad = [{"text": "<br />", "rating": 1}, {"text": "a b c d e f"}, {"text": "a b c d e", "rating": 1}]
    few, unused = imported(tmp_path, "imdb", [*reviews(100), *bad])
    assert few["judge.jsonl"] == made["judge.jsonl"][: len(few["judge.jsonl"])]
    assert unused == ["101", "102", "103"]


def test_compared_windows_are_those_of_demonstrations_ranked_by_their_stars(tmp_path):
    made = imported(tmp_path, "imdb", reviews(400))[0]
    for group in made["comparisons.jsonl"]:
        stars = [int(re.search(r"no(\d+)", text)[1]) % 10 for text in group["responses"]]
        assert group["ranks"] == [1 + sum(other > star for other in stars) for star in stars]
        assert group["prompt"] == "review:"
    *sizes, last = [len(group["ranks"]) for group in made["comparisons.jsonl"]]
    assert set(sizes) == {6} and 2 <= last <= 6
    compared = set(places(text for row in made["comparisons.jsonl"] for text in row["responses"]))
    learned = set(places(made["demonstrations.jsonl"]))
    assert compared <= learned and len(learned - compared) <= 1


def test_importing_again_adds_and_never_repeats(tmp_path, capsys):
    out, one = tmp_path / "out", write(tmp_path / "1.jsonl", [PAIR, {"x": 1}])
    two = write(tmp_path / "2.jsonl", [{"instruction": "i", "output": "o"}, {"instruction": "j", "instances": []}])
    write(out / "comparisons.jsonl.gz", [CHOICE])  # a packed file is added to
    import_main(["import", "pairs", one, f"--out={out}"])
    printed = capsys.readouterr().out
    assert f"{one}:2: " in printed and f"{out}/comparisons.jsonl.gz: 2 rows, 1 of them new" in printed
    import_main(["import", "alpaca", two, f"--out={out}"])
    assert f"{two}:2: unusable row (nothing in it)" in capsys.readouterr().out
    assert set(os.listdir(out)) == {"comparisons.jsonl.gz", *data.DATASETS} - {"comparisons.jsonl"}
    folder = read_folder(str(out))
    assert [row["prompt"] for row in folder["prompts"]] == ["p", "i"]
    assert folder["pretrain"] == ["p\na", "i\no"]
    import_main(["import", "pairs", one, f"--out={out}"])
    assert "2 rows, 0 of them new" in capsys.readouterr().out and read_folder(str(out)) == folder


@pytest.mark.parametrize("format, row", [
    ("pairs", {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}),
    ("text", {"text": "one\r\ntwo"}), ("text", {"text": "a long text\n" * 300}),
])
def test_pretraining_text_is_read_as_it_was_written(tmp_path, capsys, format, row):
    for _ in range(2):
        import_main(["import", format, write(tmp_path / "1.jsonl", [row]), f"--out={tmp_path / 'out'}"])
    assert "pretrain.txt: 1 rows, 0 of them new" in capsys.readouterr().out


def test_a_failed_import_changes_nothing(tmp_path):
    path, out = write(tmp_path / "out" / "prompts.jsonl", [{"prompt": "mine"}]), str(tmp_path / "out")
    one, bad = write(tmp_path / "1.jsonl", [PAIR]), write(tmp_path / "2.jsonl", [PAIR, "{"])
    assert fails(import_files, "pairs", [bad], out).startswith(f"{bad}:2: ")
    assert fails(import_files, "alpaca", [one], out).startswith(f"{one}:1: ")
    assert fails(import_files, "pairs", [one + "x"], out).startswith(f"{one}x: ")
    assert "--out" in fails(import_files, "pairs", [one], one)  # out is a file
    assert os.listdir(out) == ["prompts.jsonl"] and read_jsonl(path) == [{"prompt": "mine"}]


@pytest.mark.parametrize("line, word", [
    ("", "import FORMAT"), ("import hh 1.jsonl --out=x", "import hh 1.jsonl"), ("import pairs --out=x", "FILE"),
    ("import pairs 1.jsonl", "--out=DIR"), ("import pairs 1.jsonl --out=", "--out=DIR"),
    ("import pairs 1.jsonl --out=x --x=1", "--x=1")])
def test_an_incomplete_command_line_is_told_the_formats(line, word):
    message = fails(import_main, line.split())
    assert word in message and all(format in message for format in FORMATS)


@real
def test_real_text(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.join(DATA, "tiktoken_cache"))
    path = os.path.join(DATA, "pretrain/tinyshakespeare/input.txt")
    gpt2, text = Tokenizer("gpt2"), data.read_text(path)
    assert len(gpt2.encode(text)) == 338025 and gpt2.eot == 50256  # the numbers known for this file
    bpe = Tokenizer.train([text[:100000]], 400)
    assert bpe.n_vocab == 400 and bpe.decode(bpe.encode(text)) == text
    assert Tokenizer(**gpt2.state()).encode(text[:1000]) == gpt2.encode(text[:1000])
    documents = used("text", path)[0]["pretrain.txt"]
    lines = [line for line in text.split("\n") if line]
    assert [line for d in documents for line in d.split("\n") if line] == lines
    assert all(len(d) <= 2000 for d in documents) and len(documents) > 500


@real
@pytest.mark.parametrize("format, count, unusable, names", [
    ("hh-rlhf", 1800, 4, ["comparisons/hh_rlhf/harmless_base_test_first1800.jsonl"]),  # empty replies
    ("oasst", 75, 0, ["comparisons/oasst_trees/en_tree_first75.jsonl"]),
    ("self-instruct", 175, 0, ["sft/self_instruct/seed_tasks.jsonl"]),
    ("dolly", 4800, 0, ["sft/dolly_human/rows_0000_4799.jsonl"]),
    ("imdb", 5000, 0, ["sentiment/imdb/train_2500pos_2500neg.jsonl"]),
    ("sentence-polarity", 8662, 254, [  # of five words or less
        f"sentiment/sentence_polarity/rt-polarity_first4331.{end}" for end in ("neg", "pos")]),
])
def test_real_rows_are_used_but_for_those_known_to_be_empty(format, count, unusable, names):
    paths = [os.path.join(DATA, name) for name in names]
    made, unused = used(format, *paths)
    assert sum(len(data.read_rows(path)) for path in paths) == count and len(unused) == unusable
    if format == "oasst":  # counted by hand: 88 groups of 3, and one of 4 whose last reply has no rank
        sizes = Counter(len(row["ranks"]) for row in made["comparisons.jsonl"])
        assert sizes == {3: 89, 2: 45, 4: 19, 6: 4, 5: 2, 8: 1, 9: 1} and len(made["prompts.jsonl"]) == 350
