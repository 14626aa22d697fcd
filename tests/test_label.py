"""People in the loop: labeling by hand in a pipe, agreement, and the recipes of the README as
they are printed."""

import io
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import reward
import sft
from conftest import ROOT, TINY, fails, load, rows_of, save_tiny, started, tiny_gpt, write
from test_model import hf_weights, write_hf_folder


@pytest.mark.parametrize("text, ranks", [
    ("d > c > a = b", [3, 3, 2, 1]), ("a>b>c>d", [1, 2, 3, 4]), ("  C=a  > B= d", [1, 2, 1, 2]), ("a=b=c=d", [1] * 4),
    *((slip, None) for slip in (
        "a > b", "a > b > c > d > a", "a = a > b > c > d", "a > b > c > e", "a b c d", "a >> b > c > d", "", "> a",
        "ab > c > d", "a > б > c > d", "d < c", "4 > 3",
    )),
])
def test_a_ranking_as_people_write_one(text, ranks):
    if ranks:
        assert reward.parse_ranking(text, 4) == dict(ranks=ranks)
    else:
        with pytest.raises(ValueError, match="^.*: write each of a b c d once, as in b > a = c$"):
            reward.parse_ranking(text, 4)


def test_rating_and_fields():
    found = [reward.parse_ranking(text, 2, True) for text in ("b > a; 6 2 11", "a=b;7 ")]
    best = dict(rating=6, fields=["inappropriate", "moral_judgement"])
    assert found == [dict(ranks=[2, 1], **best), dict(ranks=[1, 1], rating=7, fields=[])]
    for slip in ("", ";", "; 8", "; 0 1", "; 3 12", "; 3 0", "; six", "; 3 -1", "; 3.5", "; ²"):
        with pytest.raises(ValueError, match="rate the best 1 to 7"):
            reward.parse_ranking("b > a" + slip, 2, True)


def test_a_text_of_any_lines_keeps_its_letter(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    reward.show("  b  ", "\n\n  owl\n\tand a duck that swims")
    lines = "  b  ", "     ", "       owl", "         and a duck", "     that swims"
    assert capsys.readouterr().out == "\n".join(lines) + "\n"


def test_agreement_by_hand(tmp_path, capsys):
    """p: the first ranks a > b > c = d, the second b > a > d, has no c and has an e. They share ab (not alike), ad,
    bd (alike): 2 of 3. q: xy alike, 1 of 1; tied by one: none; r and s: one file only. 3 / 4, and over prompts
    1.96 * sqrt((2 - 3 * 0.75)^2 + (1 - 0.75)^2) / 4 = 0.173241."""
    row = lambda prompt, texts, ranks: dict(prompt=prompt, responses=list(texts), ranks=ranks)
    first = [row("p", "abcd", [1, 2, 3, 3]), row("q", "xyz", [1, 2, 1]), row("r", "ab", [1, 2])]
    second = [row("q", "zyx", [2, 2, 1]), row("p", "dbae", [3, 1, 2, 4]), row("s", "ab", [1, 2])]
    paths = [write(tmp_path / name, rows) for name, rows in (("one.jsonl", first), ("two.jsonl", second))]
    tied = write(tmp_path / "three.jsonl", [row("p", "ab", [1, 1])])
    for order in (paths, paths[::-1]):
        assert reward.agreement(*order) == pytest.approx((0.75, 0.173241), abs=1e-6)
        assert "0.750 ± 0.173 of 4 pairs" in capsys.readouterr().out
    for wrong in ([], paths[:1], paths + paths[:1], [paths[0], tied]):
        with pytest.raises(SystemExit, match="say agreement FILE FILE|no pair of responses that both rank"):
            reward.agreement(*wrong)


PROMPTS = [
    "say cat\n", "Größe? 中文 \u2028 🦊 'quoted' \"twice\"\n\n\tindented, and a line that is much longer than the eighty"
    " columns which a terminal has, so that it must be broken somewhere\n", "say red\n", "say moon\n", "say sun\n",
]


@pytest.fixture(scope="module")
def wide(chain, tmp_path_factory):
    """A folder of prompts.jsonl, and an untrained sft.pt with room for them."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = load(chain, "sft")[1]
    gpt = tiny_gpt(1, vocab_size=tokenizer.n_vocab, block_size=256, std=0.1)
    save_tiny(folder / "sft.pt", "policy", gpt, tokenizer)
    write(folder / "prompts.jsonl", [dict(prompt=prompt) for prompt in PROMPTS])
    return folder


def flags_of(folder, out, *more):
    return [f"--out={out}", f"--from={folder}", *TINY, "--max_new_tokens=6", "--k_max=5", *more]


def labeled(typed, monkeypatch, *flags):
    """`python reward.py label FLAGS` in this process, with this at its stdin, bytes or text."""
    typed = typed if isinstance(typed, bytes) else typed.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    reward.label(sft.parse(reward.LabelConfig, reward.SCALES, flags))


def test_killed_at_any_moment_every_finished_row_is_there(wide, tmp_path, monkeypatch, capsys):
    """And the next start goes on behind it, u takes it back, another labeler begins at the first prompt with
    the same responses in an order of his own. Rankings are b > a, or longer: any will do. Sources are not
    shown."""
    flags, path = flags_of(wide, tmp_path, f"--prompts={wide}/prompts.jsonl"), tmp_path / "comparisons.jsonl"
    process = started("reward.py", "label", *flags)

    def to_question():
        seen = b""
        while not seen.endswith(b"\nranking:\n"):
            byte = process.stdout.read(1)
            assert byte, seen.decode() + process.stderr.read().decode()
            seen += byte
        return seen.decode()

    def rank(shown):
        letters = re.findall(r"(?m)^  ([a-z])  ", shown)
        process.stdin.write(" > ".join(letters[::-1]).encode() + b"\n")

    rank(to_question())
    rank(second := to_question())
    third = to_question()
    process.kill()
    assert process.communicate()[1] == b""
    first, key = rows_of(path), lambda text: "".join(text.split())  # however the terminal breaks its lines
    assert [row["prompt"] for row in first] == PROMPTS[:2] and "[3 of 5]" in third
    assert all(max(map(len, text.splitlines())) <= 80 for text in (second, third))
    shown = re.split(r"(?m)^  [a-z]  ", second.removesuffix("ranking:\n"))[1:]
    assert list(map(key, shown)) == list(map(key, first[1]["responses"]))  # in the order of the terminal
    assert not re.search("sft|hot", second)
    for row in first:
        assert row["ranks"] == list(range(len(row["responses"]), 0, -1)) and row["labeler"] == "me"
        assert row["model"] == f"{wide}/sft.pt" and 0 <= row["seconds"] < 60
        assert len(row["sources"]) == len(row["responses"]) and set(row["sources"]) <= {"sft", "hot"}
    any_order = " > ".join("abcde"[: len(first[0]["responses"])])
    labeled(any_order, monkeypatch, *flags, "--labeler=Zoë")  # and the end of the input
    *others, row = rows_of(path)
    assert others == first and row["labeler"] == "Zoë" and row["prompt"] == PROMPTS[0]
    assert sorted(row["responses"]) == sorted(first[0]["responses"])
    labeled("u", monkeypatch, *flags)  # takes back no row of another
    assert rows_of(path) == [*first, row]
    labeled("u", monkeypatch, *flags, "--labeler=Zoë")
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    labeled("u\nu\nu\nq", monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert third.split("[", 1)[1] in printed  # the same prompt, responses and order
    assert re.findall(r"\[(\d) of 5\]", printed) == ["3", "2", "1", "1"] and rows_of(path) == []


def test_two_labelers_may_write_into_one_file(wide, tmp_path, monkeypatch):
    path, ask, theirs = tmp_path / "comparisons.jsonl", reward.ask, dict(prompt=PROMPTS[0], labeler="eve")
    meanwhile = lambda *question: (path.exists() or write(path, [theirs])) and ask(*question)
    monkeypatch.setattr(reward, "ask", meanwhile)
    flags = flags_of(wide, tmp_path, f"--prompts={wide}/prompts.jsonl", "--k_max=4")
    labeled("d > c > b > a\n", monkeypatch, *flags)
    assert [row["labeler"] for row in rows_of(path)] == ["eve", "me"]


def test_slips_skips_and_fields(wide, tmp_path, monkeypatch, capsys):
    """Each slip gets one line and the question again; an unfinished row is not written, whatever ends it."""
    flags = flags_of(wide, tmp_path, f"--prompts={wide}/prompts.jsonl", "--fields", "--k_max=4")
    path = tmp_path / "comparisons.jsonl"
    good = b"d > c > b > a; 6 2\n"
    labeled(b"a\n\xff\xfe\nd > c > b > a\nd > c > b > a; 9\n" + good + b"u\n" + good + b"s\nq\n", monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert printed.count("write each of a b c d") == 2 and printed.count("rate the best") == 2 and "\ufffd" in printed
    [row] = rows_of(path)
    assert (row["rating"], row["fields"], row["ranks"]) == (6, ["inappropriate"], [4, 3, 2, 1])
    for end in ("a = b = c > d\n", "a > b\nq", ""):
        labeled(end, monkeypatch, *flags)
        assert rows_of(path) == [row]
    labeled("s\ns\nb > a = c = d; 3 1 4\n", monkeypatch, *flags)
    [_, second] = rows_of(path)
    assert second["ranks"] == [2, 1, 2, 2] and second["prompt"] == PROMPTS[3]
    for last in ("a > b > c > d; 1\n", "q"):
        labeled(last, monkeypatch, *flags)
    assert "0 prompts are left" in capsys.readouterr().out and len(rows_of(path)) == 3


def test_demonstrations_need_no_model_and_are_read_by_data(tmp_path, monkeypatch, chain):
    """A prompt that the file repeats is asked once."""
    write(tmp_path / "twice.jsonl", [dict(prompt=prompt) for prompt in PROMPTS[:3] + PROMPTS])
    flags = [f"--out={tmp_path}/out", "--scale=tiny", f"--prompts={tmp_path}/twice.jsonl", "--demonstrate"]
    labeled("  owl and 🦉\n\ns\nmiau\nu\nMiau, 'ich'\nq", monkeypatch, *flags)
    labeled("moon", monkeypatch, *flags)
    rows, texts = rows_of(tmp_path / "out" / "demonstrations.jsonl"), ["owl and 🦉", "Miau, 'ich'", "moon"]
    assert [(row["prompt"], row["response"]) for row in rows] == [*zip((PROMPTS[i] for i in (0, 2, 3)), texts)]
    shutil.copy(chain / "comparisons.jsonl", tmp_path / "out")
    assert [row["response"] for row in data.read_folder(str(tmp_path / "out"))["demonstrations"]] == texts


@pytest.mark.parametrize("file, flags, says", [
    ("comparisons.pt", [], "comparisons.pt is there: choose another --out"),
    ("comparisons.jsonl.gz", [], "comparisons.jsonl.gz is there"),
    ("comparisons.jsonl", [], "comparisons.jsonl:1: not JSON"),
    ("other", ["--prompts=no/such.jsonl"], "no/such.jsonl: cannot be read"),
    ("other", ["--prompts=", "--data=."], "./prompts.jsonl: cannot be read"),
    ("other", ["--sft=no/such.pt"], "--sft=no/such.pt: expected a .pt file that is there"),
])
def test_bad_input_ends_in_one_line_and_nothing_is_lost(wide, tmp_path, monkeypatch, file, flags, says):
    (tmp_path / file).write_text('{"prom')
    flags = flags_of(wide, tmp_path, f"--prompts={wide}/prompts.jsonl", *flags)
    assert says in fails(labeled, "a > b\n", monkeypatch, *flags)
    assert (tmp_path / file).read_text() == '{"prom'


def test_the_recipes_run_as_printed(made, tmp_path):
    """Every command of the README's section on own data, beside out/, the models of a whole tiny run; to each
    of label many rankings are typed."""
    shutil.copytree(made[0], tmp_path / "out")
    rng, world = random.Random(0), data.World()
    tasks = [world.task(rng) for _ in range(12)]
    spoiled = [data.spoiled(world, task, rng) for task in tasks]
    write(tmp_path / "pairs.json", [
        dict(prompt=t["prompt"], chosen=t["reply"], rejected=text) for t, text in zip(tasks, spoiled)
    ])
    write(tmp_path / "reward_fn.py", ["def reward(_, responses):", "    return list(map(len, responses))"])
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(t["prompt"] + t["reply"] for t in tasks))
    section = Path(ROOT, "README.md").read_text("utf-8").split("\n## Your own data\n")[1].split("\n## ")[0]
    lines = re.findall(r"(?m)^(?:python|cat) .*", section)
    assert len(lines) == 10
    try:
        data.Tokenizer("gpt2")
        (tmp_path / "gpt2-folder").mkdir()
        shape = dict(n_layer=1, n_head=2, n_embd=8)
        weights = hf_weights(tiny_gpt(vocab_size=50_257, block_size=128, std=0.02, **shape), "")
        write_hf_folder(tmp_path / "gpt2-folder", weights, vocab_size=50_257, n_positions=128, **shape)
    except SystemExit:  # offline, all recipes but that of GPT-2
        lines = [line for line in lines if "gpt2" not in line]
    typed = "a > b > c > d\na > b > c\na > b\n" * 40  # those that do not fit are slips
    small = "--scale=tiny --device=cpu --max_new_tokens=6"  # before a line's own flags, which so prevail
    for line in lines:
        line = line.replace("ppo.py", f"ppo.py {small} --rollout_size=16 --minibatch_size=8 --episodes=16")
        line = re.sub(r"reward.py( label|(?= --))", rf"reward.py\1 {small} --k_max=4", line)
        line = re.sub(r"python (\w+\.py)", rf"{sys.executable} {ROOT}/\1", line)
        done = subprocess.run(line, shell=True, cwd=tmp_path, input=typed, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "agreement" not in line or re.search(r"agreement (1\.000|0\.)", done.stdout)
    outs = re.findall(r"ppo\.py .*--out=(\S+)", "\n".join(lines))
    assert len(outs) > 2 and all(sft.is_finished("policy", f"{tmp_path}/{out}/ppo.pt") for out in outs)
    rows = rows_of(tmp_path / "labels" / "comparisons.jsonl")
    assert {row.get("model") for row in rows} == {None, "out/ppo.pt", "out-2/ppo.pt"}
    of_people = [row for row in rows if "model" in row]  # who see what the world's labelers see
    assert {source for row in of_people for source in row["sources"]} == set(reward.COLLECTED)
    assert all(row["user"] and row["category"] for row in of_people)


@pytest.mark.parametrize("text, says", [
    ("reward = 1", "defines no function reward"), ("def reward(", "SyntaxError"), ("1 / 0", "ZeroDivisionError.*line 1 "),
    ("x = 1\ndef reward(p, r):\n    return [x.y for _ in r]", "AttributeError.*line 3 "),
    ("reward = lambda p, r: [None for _ in r]", "mine.py: TypeError"),
])
def test_an_error_in_your_reward_is_one_line(tmp_path, text, says):
    path = write(tmp_path / "mine.py", [text])
    message = fails(lambda: reward.own_reward(path)(["a"], ["b"]))
    assert message.startswith(path) and re.search(says, message)
