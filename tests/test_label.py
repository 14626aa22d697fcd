"""People in the loop: labeling by hand in a pipe, agreement, the way round, and the recipes of the README as
they are printed."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch

import data
import reward
import sft
from test_model import hf_weights, write_hf_folder
from conftest import save_tiny, tiny_gpt

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CPU = torch.device("cpu")


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------------
# what people write, by hand


@pytest.mark.parametrize("text, ranks", [
    ("d > c > a = b", [3, 3, 2, 1]), ("a>b>c>d", [1, 2, 3, 4]), ("  C=a  > B= d", [1, 2, 1, 2]), ("a=b=c=d", [1] * 4),
])
def test_a_ranking_as_people_write_one(text, ranks):
    assert reward.parse_ranking(text, 4) == ranks


@pytest.mark.parametrize("text, says", [
    ("a > b", "left out: c d"), ("a > b > c > d > a", '"a": write each of a b c d once'), ("a = a > b", '"a"'),
    ("a > e", '"e"'), ("a b c d", '"a b c d"'), ("a >> b", '""'), ("", '""'), ("> a", '""'), ("ab > c", '"ab"'),
    ("a > б", '"б"'), ("d < c", '"d < c"'), ("4 > 3", '"4"'),
])
def test_a_slip_is_named(text, says):
    with pytest.raises(ValueError) as slip:
        reward.parse_ranking(text, 4)
    assert str(slip.value).startswith(says) and "\n" not in str(slip.value)


def test_a_text_of_any_lines_keeps_its_letter(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    reward.show("  b  ", "\n\n  owl \x07\n\tand a duck that swims")
    assert capsys.readouterr().out == "  b  \n     \n       owl \ufffd\n         and a duck\n     that swims\n"


def test_rating_and_fields():
    assert reward.parse_fields("6 2 11") == dict(rating=6, fields=["inappropriate", "moral_judgement"])
    assert reward.parse_fields(" 7 ") == dict(rating=7, fields=[])
    for slip in ("", "8", "0 1", "3 12", "3 0", "six", "3 -1", "3.5", "²"):
        with pytest.raises(ValueError, match="write a rating of 1 to 7"):
            reward.parse_fields(slip)


def test_agreement_by_hand(tmp_path, capsys):
    """p: the first ranks a > b > c = d, the second b > a > d, has no c and has an e. They share ab (not alike), ad,
    bd (alike): 2 of 3. q: xy alike, 1 of 1; tied by one: none; r and s: one file only. 3 / 4, and over prompts
    1.96 * sqrt((2 - 3 * 0.75)^2 + (1 - 0.75)^2) / 4 = 0.173241. Ties: of q's other pairs xz and yz, one each."""
    row = lambda prompt, texts, ranks: dict(prompt=prompt, responses=list(texts), ranks=ranks)
    first = [row("p", "abcd", [1, 2, 3, 3]), row("q", "xyz", [1, 2, 1]), row("r", "ab", [1, 2])]
    second = [row("q", "zyx", [2, 2, 1]), row("p", "dbae", [3, 1, 2, 4]), row("s", "ab", [1, 2])]
    paths = [write(tmp_path / name, rows) for name, rows in (("one.jsonl", first), ("two.jsonl", second))]
    for order in (paths, paths[::-1]):
        assert reward.agreement(*order) == pytest.approx((0.75, 0.173241), abs=1e-6)
        printed = capsys.readouterr().out
        assert "0.750 ± 0.173: 4 pairs in 2 prompts, without 2 that somebody ties" in printed
    for wrong in ([], paths[:1], paths + paths[:1]):
        with pytest.raises(SystemExit, match="^say agreement FILE FILE"):
            reward.agreement(*wrong)
    other = write(tmp_path / "three.jsonl", [row("p", "ab", [1, 1])])
    with pytest.raises(SystemExit, match="no pair of responses that both rank"):
        reward.agreement(paths[0], other)


# ------------------------------------------------------------------------------------------------------------
# the terminal, by a pipe


PROMPTS = [
    "say cat\n", "Größe? 中文 \u2028 🦊 'quoted' \"twice\"\n\n\tindented, and a line that is much longer than the eighty"
    " columns which a terminal has, so that it must be broken somewhere\n", "say \x1b[31mred\n", "say moon\n", "say sun\n",
]


@pytest.fixture(scope="module")
def wide(chain, tmp_path_factory):
    """An untrained sft.pt with room for these prompts."""
    folder, (_, tokenizer, _) = tmp_path_factory.mktemp("wide"), sft.load_policy(f"{chain}/sft.pt", "", CPU)
    gpt = tiny_gpt(1, vocab_size=tokenizer.n_vocab, block_size=256, std=0.1)
    save_tiny(folder / "sft.pt", "policy", gpt, tokenizer)
    return folder


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "own prompts.jsonl", [dict(prompt=prompt) for prompt in PROMPTS])


def flags_of(chain, out, *more):
    flags = f"--out={out}", f"--from={chain}", "--scale=tiny", "--device=cpu", "--max_new_tokens=6", "--k_max=5"
    return [*flags, *more]


def labeled(typed, monkeypatch, *flags):
    """`python reward.py label FLAGS` in this process, with this at its stdin, bytes or text."""
    typed = typed if isinstance(typed, bytes) else typed.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    reward.label(sft.parse(reward.LabelConfig, reward.SCALES, flags))


def ranking_of(printed):
    """A ranking of the responses last shown, b > a > ..: any will do."""
    letters = re.findall(r"(?m)^  ([a-z])  ", printed.rsplit("\n[", 1)[1])
    return " > ".join(reversed(letters))


def start(*flags):
    """`python reward.py label` behind pipes -> the process, a function that reads up to the next question."""
    pipe, command = subprocess.PIPE, [sys.executable, "reward.py", "label", *flags]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    env.pop("COLUMNS", None)
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=env)

    def to_question():
        seen = b""
        while not seen.endswith((b"ranking: ", b"response, \\n for a new line: ", b"what holds for it: ")):
            byte = process.stdout.read(1)
            assert byte, seen.decode() + process.stderr.read().decode()
            seen += byte
        process.stdout.read(1)  # the new line
        return seen.decode()

    return process, to_question


def say(process, text):
    process.stdin.write(text.encode() + b"\n")


def test_killed_at_any_moment_every_finished_row_is_there(wide, tmp_path, prompts):
    """And the next start goes on behind it, u takes it back, another labeler begins at the first prompt with the
    same responses in an order of his own."""
    flags, path = flags_of(wide, tmp_path / "out", f"--prompts={prompts}"), tmp_path / "out" / "comparisons.jsonl"
    process, to_question = start(*flags)
    for _ in range(2):
        shown = to_question()
        say(process, ranking_of(shown))
    third = to_question()
    process.kill()
    process.wait()
    first = rows_of(path)
    assert [row["prompt"] for row in first] == PROMPTS[:2] and "[3 of 5]" in third and "\x1b" not in third
    assert all(max(map(len, text.splitlines())) <= 80 for text in (shown, third))
    for row in first:
        assert row["ranks"] == list(range(len(row["ranks"]), 0, -1)) and row["labeler"] == "me"
        assert row["model"] == f"{wide}/sft.pt" and 0 <= row["seconds"] < 60
        assert len(row["sources"]) == len(row["responses"]) and set(row["sources"]) <= {"sft", "hot"}
    process, to_question = start(*flags)
    assert to_question().split("[", 1)[1] == third.split("[", 1)[1]  # the same prompt, responses and order
    say(process, "u")
    assert "[2 of 5]" in to_question() and rows_of(path) == first[:1]
    say(process, "u")
    assert "[1 of 5]" in to_question() and rows_of(path) == []
    say(process, "u")
    assert "[1 of 5]" in to_question()
    say(process, "q")
    assert process.wait() == 0 and process.stderr.read() == b""
    process, to_question = start(*flags, "--labeler=Zoë")
    say(process, ranking_of(to_question()))
    to_question()
    process.stdin.close()  # the end of the input
    assert process.wait() == 0
    [row] = rows_of(path)
    assert row["labeler"] == "Zoë" and row["prompt"] == PROMPTS[0]
    assert sorted(row["responses"]) == sorted(first[0]["responses"])


def test_slips_skips_and_fields(wide, tmp_path, prompts, monkeypatch, capsys):
    """Each slip gets one line and the question again; an unfinished row is not written, whatever ends it."""
    flags = flags_of(wide, tmp_path / "out", f"--prompts={prompts}", "--fields", "--k_max=4")
    path = tmp_path / "out" / "comparisons.jsonl"
    labeled(b"a\n\xff\xfe\nd > c > b > a\n9\n6 2\ns\nb > a = c = d\nq\n", monkeypatch, *flags)
    printed = capsys.readouterr().out
    assert "\nleft out: b c d\n" in printed and '"9": write a rating' in printed and "\ufffd" in printed
    [row] = rows_of(path)
    assert (row["rating"], row["fields"], row["ranks"]) == (6, ["inappropriate"], [4, 3, 2, 1])
    for end in ("a = b = c > d\n", "a = b = c > d\ns\nq", "a > b\nq", ""):
        labeled(end, monkeypatch, *flags)
        assert rows_of(path) == [row]
    labeled("s\ns\nb > a = c = d\n3 1 4\n", monkeypatch, *flags)
    [_, second] = rows_of(path)
    assert second["ranks"] == [2, 1, 2, 2] and second["prompt"] == PROMPTS[3]
    labeled("a > b > c > d\n1\n", monkeypatch, *flags)
    capsys.readouterr()
    labeled("q", monkeypatch, *flags)
    assert "0 prompts are left" in capsys.readouterr().out and len(rows_of(path)) == 3


def test_demonstrations_need_no_model_and_are_read_by_data(tmp_path, prompts, monkeypatch, chain):
    flags = [f"--out={tmp_path}/out", "--from=no/such", "--scale=tiny", f"--prompts={prompts}", "--demonstrate"]
    labeled("  owl \\n and 🦉\n\ns\nmiau\nu\nMiau, 'ich'\nq", monkeypatch, *flags)
    rows, texts = rows_of(tmp_path / "out" / "demonstrations.jsonl"), ["owl \n and 🦉", "Miau, 'ich'"]
    assert [(row["prompt"], row["response"]) for row in rows] == [(PROMPTS[0], texts[0]), (PROMPTS[2], texts[1])]
    shutil.copy(chain / "comparisons.jsonl", tmp_path / "out")
    assert [row["response"] for row in data.read_folder(str(tmp_path / "out"))["demonstrations"]] == texts


def test_responses_of_the_world_come_from_every_source(chain, tmp_path, monkeypatch, capsys):
    """As in training: K and the mixture. The source is not shown."""
    flags = flags_of(chain, tmp_path / "a", "--k_min=9", "--k_max=9")
    labeled("x\n" + "".join(f"{ranking}\ns\n" for ranking in ["a > b"] * 25), monkeypatch, *flags)
    assert not re.search("sft|hot|base|spoiled|other", re.sub(r"(?m)^.*prompts are left.*", "", capsys.readouterr().out))
    everything = " > ".join("abcdefghi")
    lines = "".join(everything[: 4 * k - 3] + "\n" for k in range(9, 1, -1))  # the first that fits is taken
    typed = "".join(lines + "s\n" for _ in range(30))
    labeled(typed, monkeypatch, *flags_of(chain, tmp_path / "b", "--k_min=9", "--k_max=9"))
    rows = rows_of(tmp_path / "b" / "comparisons.jsonl")
    assert {source for row in rows for source in row["sources"]} == set(reward.COLLECTED) and len(rows) > 5
    assert all(len(set(row["responses"])) == len(row["responses"]) <= 9 for row in rows)
    assert all(row["user"] and row["category"] for row in rows)


@pytest.mark.parametrize("prepare, flags, says", [
    (lambda out: (out / "comparisons.pt").write_text(""), [], "comparisons.pt is there: choose another --out"),
    (lambda out: (out / "comparisons.jsonl.gz").write_text(""), [], "comparisons.jsonl.gz is there"),
    (lambda out: (out / "comparisons.jsonl").write_text('{"prompt": "p"}\n'), [], 'comparisons.jsonl:1: "responses" must'),
    (lambda out: (out / "comparisons.jsonl").write_text('{"prom'), [], "comparisons.jsonl:1: not JSON"),
    (lambda out: None, ["--prompts=no/such.jsonl"], "no/such.jsonl: cannot be read"),
    (lambda out: None, ["--prompts=", "--data=no/such"], "no/such/prompts.jsonl: cannot be read"),
    (lambda out: None, ["--sft=no/such.pt"], "no/such.pt not found"),
    (lambda out: None, ["--lebeler=me"], "unknown flag --lebeler=me: did you mean --labeler"),
])
def test_bad_input_ends_in_one_line_and_nothing_is_lost(chain, tmp_path, prompts, monkeypatch, prepare, flags, says):
    prepare(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=re.escape(says)) as stop:
        labeled("a > b\n", monkeypatch, *flags_of(chain, tmp_path, f"--prompts={prompts}", *flags))
    assert "\n" not in str(stop.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------
# the way round, and the recipes of the README


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with out/, the models of a whole tiny run."""
    folder = tmp_path_factory.mktemp("place")
    shell(folder, "python ppo.py --scale=tiny --device=cpu")
    return folder


def shell(folder, command, typed=""):
    """A command line as somebody in this folder types it -> what it printed. It must succeed."""
    line = re.sub(r"python (\w+\.py)", rf"{sys.executable} {ROOT}/\1", command)
    done = subprocess.run(line, shell=True, cwd=folder, input=typed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def key(text):
    """What the terminal shows of a text, however it breaks lines."""
    lines = ("".join(c if c.isprintable() else "\ufffd" for c in line) for line in text.expandtabs(4).splitlines())
    return "".join("".join(lines).split())


def person(folder, count, seed, *flags, noise=0.7):
    """Somebody who ranks what the terminal shows by gold and noise, through pipes -> {(prompt, response): rank}
    of what was typed."""
    world, rng, typed = data.World(), random.Random(seed), {}
    scale = dict(flag.split("=") for flag in flags if "=" in flag)["--scale"]
    tasks = {key(task["prompt"]): task for task in data.load("", scale, seed)["comparison_prompts"]}
    process, to_question = start(*flags, f"--seed={seed}", f"--out={folder}")
    for _ in range(count):
        shown = to_question().removesuffix("ranking: ").rsplit("\n[", 1)[1].split("] ", 1)[1]
        shown = re.split(r"(?m)^  ([a-z])  ", shown)  # prompt, letter, response, letter, ..
        task = tasks[key(shown[0])]
        texts = {letter: " ".join(text.split()) for letter, text in zip(shown[1::2], shown[2::2])}
        likes = {letter: world.gold(task, text)["gold"] + rng.gauss(0, noise) for letter, text in texts.items()}
        levels = {letter: round(like * 2) for letter, like in likes.items()}  # half a point apart, or tied
        ranked = sorted(set(levels.values()), reverse=True)
        groups = [" = ".join(letter for letter in texts if levels[letter] == level) for level in ranked]
        typed |= {(key(task["prompt"]), key(text)): ranked.index(levels[letter]) + 1 for letter, text in texts.items()}
        say(process, " > ".join(groups))
    to_question()
    say(process, "q")
    assert process.wait() == 0
    return typed


def accuracies(folder, labels, scale, seed):
    """Reward models of the labels alone and with those of the simulated labelers, beside that of these alone ->
    {which: accuracy on the rankings of labelers who gave none}, printed."""
    out, found = f"{folder}/out", {}
    rows = rows_of(f"{labels}/comparisons.jsonl")
    valid = data.read_jsonl(f"{out}/comparisons_valid.jsonl")
    for name, more in (("alone", []), ("with the simulated", rows_of(f"{out}/comparisons.jsonl")), ("simulated", None)):
        made = out
        if more is not None:
            made = os.path.join(folder, name.replace(" ", "-"))
            os.makedirs(f"{made}-data")
            with open(f"{made}-data/comparisons.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows + more)
            flags = f"--scale={scale}", f"--seed={seed}", "--device=cpu", f"--from={out}"
            flags = [*flags, f"--data={made}-data", f"--out={made}"]
            reward.main(sft.parse(reward.Config, reward.SCALES, flags))
        network, tokenizer, _ = sft.load_reward(f"{made}/reward.pt", "", CPU)
        groups = data.encode_comparisons(tokenizer, valid, network.config.block_size)
        found[name] = reward.evaluate(network, groups, CPU)["accuracy"]
    print(f"{len(rows)} comparisons by hand: " + ", ".join(f"{name} {x:.3f}" for name, x in found.items()))
    return found


def test_the_way_round(place):
    """30 comparisons through the terminal: the file holds what was typed, and trains reward models."""
    labels = place / "by-hand"
    typed = person(labels, 30, 1, "--scale=tiny", f"--from={place}/out", "--device=cpu")
    rows = rows_of(labels / "comparisons.jsonl")
    found = {(key(r["prompt"]), key(t)): rank for r in rows for t, rank in zip(r["responses"], r["ranks"])}
    assert found == typed and len(rows) == 30 and all(row["seconds"] >= 0 for row in rows)
    assert all(0.3 < x < 0.9 for x in accuracies(str(place), str(labels), "tiny", 1).values())


def blocks_of(title):
    """The command lines that the README prints in a section."""
    text = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"(?s)\n```\n(.*?)```", section) for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "cat "))]


SMALL = "--scale=tiny --device=cpu --max_new_tokens=6"
TINY = {  # what a command is given besides what is printed: to be small
    "label": f"{SMALL} --k_max=4", "reward.py": SMALL,
    "ppo.py": f"{SMALL} --rollout_size=16 --minibatch_size=8 --episodes=16",
}


def tiny(line):
    """A printed line with TINY before its flags, which so prevail."""
    line = re.sub(r"python (ppo\.py|reward\.py(?= --))", lambda m: f"{m[0]} {TINY[m[1]]}", line)
    return line.replace("reward.py label", f"reward.py label {TINY['label']}")


RANKINGS = "".join(" > ".join("abcd"[:k]) + "\n" for k in (4, 3, 2)) * 40  # those that do not fit are slips


def test_the_recipes_run_as_printed(place):
    rng, world = random.Random(0), data.World()
    tasks = [world.task(rng) for _ in range(12)]
    pair = lambda task: dict(prompt=task["prompt"], chosen=task["reply"], rejected=data.spoiled(world, task, rng))
    (place / "pairs.json").write_text(json.dumps([pair(task) for task in tasks]))
    (place / "reward_fn.py").write_text("def reward(prompts, responses):\n    return [-len(r) for r in responses]\n")
    (place / "text.txt").write_text("\n<|endoftext|>\n".join(task["prompt"] + task["reply"] for task in tasks))
    lines = blocks_of("Your own data")
    assert len(lines) == 10
    for line in lines:
        if "gpt2" in line:
            try:
                data.Tokenizer("gpt2")
            except SystemExit as why:
                pytest.skip(str(why))
            (place / "gpt2-folder").mkdir()
            shape = dict(n_layer=1, n_head=2, n_embd=8)
            gpt = tiny_gpt(vocab_size=50_257, block_size=128, std=0.02, **shape)
            write_hf_folder(place / "gpt2-folder", hf_weights(gpt, ""), vocab_size=50_257, n_positions=128, **shape)
        printed = shell(place, tiny(line), RANKINGS)
        assert "agreement" not in line or "agreement 1.000" in printed or "agreement 0." in printed
    for folder in ("out-mine", "out-r", "out-gpt2", "out-2"):
        assert sft.is_finished(f"{place}/{folder}/ppo.pt")
    models = {row.get("model") for row in rows_of(place / "labels" / "comparisons.jsonl")}
    assert models == {None, "out/ppo.pt", "out-2/ppo.pt"}


@pytest.mark.parametrize("text, says", [
    ("reward = 1", "defines no function reward"), ("def reward(", "SyntaxError"), ("1 / 0", ":1: ZeroDivisionError"),
    ("x = 1\ndef reward(p, r):\n    return [x.y for _ in r]", ":3: AttributeError"),
    ("reward = lambda p, r: [None for _ in r]", "mine.py: TypeError"),
])
def test_an_error_in_your_reward_is_one_line(tmp_path, text, says):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit, match=says) as stop:
        reward.own_reward(str(tmp_path / "mine.py"))(["a"], ["b"])
    assert "\n" not in str(stop.value) and str(stop.value).startswith(str(tmp_path))
