"""Tests of `python eval.py chat` and `python eval.py compare`: what the model is given, what is shown, and
how it ends."""

import ast
import io
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import data
import eval
import model
from conftest import save_tiny, tiny_gpt, tiny_scalar

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def out(chain, tmp_path_factory):
    """The chain's checkpoints with a ppo.pt whose weights differ from ppo_init's: its kl is not 0."""
    folder = tmp_path_factory.mktemp("talk")
    for path in chain.glob("*.pt"):
        shutil.copy(path, folder)
    tokenizer = tokenizer_of(folder)
    policy = tiny_gpt(5, vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    save_tiny(folder / "ppo.pt", "policy", policy, tokenizer)
    return str(folder)


def tokenizer_of(folder):
    checkpoint = model.load_policy(f"{folder}/base.pt", "", CPU)[1]
    return data.Tokenizer.from_state(checkpoint["tokenizer"])


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def prompts_given(monkeypatch, text, response=" fine.", **flags):
    """Chat with these lines, where every response is the same -> the prompts that the model was given."""
    prompts = []

    def stream(policy, tokenizer, prompt, *_):
        prompts.append(prompt)
        yield response

    monkeypatch.setattr(eval, "stream", stream)
    piped(monkeypatch, text)
    eval.chat(eval.ChatConfig(device="cpu", **{"max_new_tokens": 8, **flags}))
    return prompts


# ------------------------------------------------------------------------------------------------------------
# what the model is given


def test_the_template_is_that_of_the_worlds_dialogues(monkeypatch, out, capsys):
    prompts = prompts_given(monkeypatch, "cat\n\n  \ndog\n", out=out, verbose=True)
    assert prompts == ["human: cat\nai:", "human: cat\nai: fine.\nhuman: dog\nai:"]
    shown = capsys.readouterr()
    assert shown.out == " fine.\n fine.\n"
    count = [len(tokenizer_of(out).encode(prompt)) for prompt in prompts]
    assert shown.err == f"{prompts[0]!r}, {count[0]} tokens\n{prompts[1]!r}, {count[1]} tokens\n"


def test_the_template_agrees_with_assets_world(monkeypatch, out):
    """Typed turn by turn, the first dialogue of tasks.txt gives the model that prompt to the letter."""
    lines = data.content("tasks.txt")
    dialogue = lines[lines.index("[chat]") + 1].removeprefix("> ").replace("\\n", "\n")
    typed = "\n".join(re.findall("human: (.*)", dialogue))
    monkeypatch.setattr(eval, "fits", lambda *_: True)
    monkeypatch.setattr(data.Tokenizer, "encode", lambda self, text: [0])  # the tiny context holds all
    assert prompts_given(monkeypatch, typed, " hello.", out=out)[-1] == dialogue


def test_what_a_raw_gpt_writes_stays_and_the_next_turn_begins_a_line(monkeypatch, out, capsys):
    response = " hello.\nhuman: moon?\n"
    prompts = prompts_given(monkeypatch, "cat\ndog\n", response, out=out, model="base")
    assert prompts[1] == "human: cat\nai: hello.\nhuman: moon?\nhuman: dog\nai:"
    assert capsys.readouterr().out == (response + "\n") * 2


def test_plain_prompts_stand_alone_and_end_as_the_worlds_do(monkeypatch, out):
    prompts = prompts_given(monkeypatch, "say cat\nsun\\ntl;dr:\nmoon\\n\n", out=out, template="plain")
    assert prompts == ["say cat\n", "sun\ntl;dr:", "moon\n"]


def test_reset_forgets(monkeypatch, out):
    assert prompts_given(monkeypatch, "cat\n/reset\ndog\n", out=out)[1] == "human: dog\nai:"


def test_oldest_turns_are_left_out_when_the_context_is_full_and_not_before(monkeypatch, out, capsys):
    """By brute force: the longest end of the dialogue that leaves room for the response in 64 tokens."""
    encode = tokenizer_of(out).encode
    lines = ["cat", "red cat", "sun", "moon", "cat", "blue"]
    turns = [f"human: {line}\nai:" for line in lines]
    for size in range(4, 44, 4):
        prompts = prompts_given(monkeypatch, "\n".join(lines), out=out, max_new_tokens=size)
        for i, prompt in enumerate(prompts):
            ends = ["".join(turn + " fine.\n" for turn in turns[j:i]) + turns[i] for j in range(i + 1)]
            assert prompt == next(end for end in ends if len(encode(end)) + size <= 64)
        said = capsys.readouterr().err.splitlines()
        assert said and all("context of 64 tokens is full: oldest turns left out, " in line for line in said)


def test_a_message_that_is_too_long_gets_one_line_and_the_dialogue_goes_on(monkeypatch, out, capsys):
    prompts = prompts_given(monkeypatch, "cat\n" + "red sun " * 40 + "\ndog\n", out=out)
    assert prompts == ["human: cat\nai:", "human: cat\nai: fine.\nhuman: dog\nai:"]
    [line] = capsys.readouterr().err.splitlines()
    assert "but the context is 64: shorten it" in line


# ------------------------------------------------------------------------------------------------------------
# streaming


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_streaming_gives_the_text_of_one_call_of_generate(out, temperature):
    """An untrained model writes half characters and stray spaces, which decode differently in pieces."""
    policy, tokenizer = model.load_policy(f"{out}/ppo.pt", "", CPU)[0], tokenizer_of(out)
    prompt, ended, texts = "human: cat\nai:", 0, set()
    ids = tokenizer.encode(prompt)
    for seed in range(30 if temperature else 2):
        tokens, lengths = model.generate(
            policy, [ids], 20, temperature, tokenizer.eot, torch.Generator().manual_seed(seed)
        )
        whole = tokens[0, len(ids) : lengths[0]].tolist()
        pieces = eval.stream(
            policy, tokenizer, prompt, 20, temperature, torch.Generator().manual_seed(seed)
        )
        assert "".join(pieces) == data.response_text(tokenizer, ids, whole)
        ended += whole[-1] == tokenizer.eot
        texts.add(tokenizer.decode(ids + whole))
    if temperature:
        assert ended and any("\ufffd" in text for text in texts)
    else:
        assert len(texts) == 1


def test_a_character_is_shown_once_it_is_whole_and_a_space_once_it_stays(monkeypatch):
    """Spelled out in bytes: the euro sign is three, and the space behind the new line is the tokenizer's."""
    tokenizer, text = data.Tokenizer("bpe", [bytes([b]) for b in range(256)]), "x€\n y"
    spelled = iter([*text.encode(), tokenizer.eot])
    fake = lambda gpt, prompts, *_: (torch.tensor([prompts[0] + [next(spelled)]]), None)
    monkeypatch.setattr(model, "generate", fake)
    pieces = list(eval.stream(None, tokenizer, "ai:", 20, 1.0, None))
    assert pieces == ["x", "", "", "€", "\n", "", "y", "", ""]


def test_every_piece_is_shown_before_the_next_token_is_made(monkeypatch, out):
    piped(monkeypatch, "cat\n")
    events, generate = [], model.generate

    class Screen(io.StringIO):
        def flush(self):
            events.append("flush")

    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setattr(model, "generate", lambda *a: events.append("token") or generate(*a))
    eval.chat(eval.ChatConfig(out=out, device="cpu", max_new_tokens=6))
    first = events.index("token")
    assert events[first : first + 4] == ["token", "flush", "token", "flush"]


# ------------------------------------------------------------------------------------------------------------
# compare


def rows_of(printed):
    """What compare printed -> the prompts, rows of cells (name, then numbers, then the response)."""
    lines = [line for line in printed.splitlines() if line]
    rows = [line.split(maxsplit=line.split("'")[0].split('"')[0].count(".") + 2) for line in lines
            if line.startswith("  ") and not line.startswith("     ")]
    return [ast.literal_eval(line) for line in lines if not line.startswith(" ")], rows


def test_compare_shows_what_scores_and_mean_kl_say(monkeypatch, out, capsys):
    piped(monkeypatch, "not read\n")
    prompt, tokenizer = "say cat\n", tokenizer_of(out)
    eval.main(["compare", "say cat", f"--out={out}", "--samples=2", "--max_new_tokens=24", "--device=cpu"])
    prompts, rows = rows_of(capsys.readouterr().out)
    assert prompts == [prompt]
    assert [row[0] for row in rows] == [n for n in ("base", "sft", "ppo_init", "ppo") for _ in range(2)]
    load = lambda name: model.load_policy(f"{out}/{name}.pt", "", CPU)[0]
    reward_model, _ = model.load_reward(f"{out}/reward.pt", "", CPU)
    for i, (name, score, kl, length, text) in enumerate(rows):
        policy = load(name)
        response = eval.respond(policy, tokenizer, [prompt] * 2, 24, 1.0, 1, CPU)[i % 2]
        assert ast.literal_eval(text) == response[0] and int(length) == len(response[1])
        [expected] = eval.scores(reward_model, tokenizer, [prompt], [response], CPU)
        assert float(score) == pytest.approx(expected, abs=6e-4)
        expected = eval.mean_kl(policy, load("ppo_init"), tokenizer, [prompt], [response], CPU)
        assert float(kl) == pytest.approx(expected, abs=6e-4)
    assert any(int(length) != len(ast.literal_eval(text)) for *_, length, text in rows)
    assert abs(float(rows[-1][2])) > 0.1 and float(rows[0][2]) == 0  # base is ppo_init here


def test_compare_reads_lines_and_goes_on_behind_one_that_is_too_long(monkeypatch, out, capsys):
    piped(monkeypatch, "cat\n\n" + "red sun " * 40 + "\nhuman: cat\\nai:\n")
    eval.main(["compare", f"--out={out}", "--max_new_tokens=4", "--device=cpu"])
    shown = capsys.readouterr()
    assert rows_of(shown.out)[0] == ["cat\n", "human: cat\nai:"]
    [line] = shown.err.splitlines()
    assert "but the context is 64" in line


@pytest.mark.parametrize("missing, header", [
    ("reward", ["kl", "length", "response"]), ("ppo_init", ["score", "length", "response"]),
])
def test_compare_leaves_out_what_needs_a_missing_model(monkeypatch, out, tmp_path, capsys, missing, header):
    piped(monkeypatch, "")
    for name in {"sft", "ppo_init", "reward"} - {missing}:
        shutil.copy(f"{out}/{name}.pt", tmp_path)
    eval.main(["compare", "cat", f"--out={tmp_path}", "--max_new_tokens=4", "--device=cpu"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].split() == header
    [line] = shown.err.splitlines()
    assert line == f"no finished {tmp_path}/{missing}.pt: {'score' if missing == 'reward' else 'kl'} left out"


def test_compare_refuses_models_of_different_encodings(monkeypatch, out, tmp_path):
    piped(monkeypatch, "")
    shutil.copy(f"{out}/ppo.pt", tmp_path)
    other = data.Tokenizer.train(["another text, another text"], 260)
    save_tiny(tmp_path / "reward.pt", "reward", tiny_scalar(vocab_size=other.n_vocab), other)
    with pytest.raises(SystemExit, match="different encodings"):
        eval.main(["compare", "cat", f"--out={tmp_path}", "--device=cpu"])


# ------------------------------------------------------------------------------------------------------------
# what bad input gets, and how it ends


@pytest.mark.parametrize("argv, message", [
    (["nonsense"], '"nonsense" is unknown: say chat, compare "PROMPT", or only flags'),
    (["chat", "--temprature=1"], "unknown flag --temprature=1: did you mean --temperature"),
    (["chat", "--samples=1"], "unknown flag --samples=1"),
    (["chat", "hello"], "unknown flag hello"),
    (["compare", "hello", "--model=ppo"], "unknown flag --model=ppo"),
    (["chat", "--temperature=-1"], "--temperature=-1.0: expected"),
    (["chat", "--temperature=nan"], "--temperature=nan: expected"),
    (["chat", "--max_new_tokens=0"], "--max_new_tokens=0: expected"),
    (["chat", "--seed=-1"], "--seed=-1: expected"),
    (["chat", "--template=letter"], "--template=letter: expected chat or plain"),
    (["compare", "hello", "--samples=0"], "--samples=0: expected"),
    (["chat", "--out=/nowhere"], "/nowhere/ppo.pt not found: run python ppo.py --out=/nowhere first"),
    (["compare", "hello", "--out=/nowhere"], "/nowhere holds no finished model: run python ppo.py"),
])
def test_bad_input_gets_one_line(monkeypatch, argv, message):
    piped(monkeypatch, "")
    monkeypatch.setattr(model, "run", lambda *_: pytest.fail("went on to the report"))
    with pytest.raises(SystemExit) as stop:
        eval.main(argv)
    assert stop.value.code.startswith(message) and "\n" not in stop.value.code


def test_temperature_zero_is_greedy(monkeypatch, out, capsys):
    shown = []
    for seed in (1, 2):
        piped(monkeypatch, "cat\n")
        eval.main(["chat", f"--out={out}", "--temperature=0", f"--seed={seed}", "--device=cpu"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_only_flags_go_to_the_report(monkeypatch):
    seen = []
    monkeypatch.setattr(model, "run", lambda main, Config, scales: seen.append(Config.__name__))
    eval.main([])
    eval.main(["--scale=tiny"])
    assert seen == ["Config", "Config"]


def test_ctrl_c_ends_compare_with_a_new_line(monkeypatch, out, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    piped(monkeypatch, "")
    monkeypatch.setattr(eval, "respond", interrupted)
    eval.main(["compare", "cat", f"--out={out}", "--device=cpu"])
    assert capsys.readouterr().out.endswith("\n")


def start(out, *flags):
    command = [sys.executable, "eval.py", "chat", f"--out={out}", "--device=cpu", *flags]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as on a desktop; containers replace
    return subprocess.Popen(command, cwd=ROOT, env=strict, **pipes)


def test_piped_output_is_the_responses_and_the_end_of_the_input_ends_it_well(out):
    """Bytes that are no text are no reason to stop."""
    process = start(out, f"--model={out}/sft.pt", "--template=plain", "--max_new_tokens=5")
    printed, errors = process.communicate(b"cat\n\xff\xfe\ndog")
    assert (process.returncode, errors) == (0, b"")
    policy, tokenizer = model.load_policy(f"{out}/sft.pt", "", CPU)[0], tokenizer_of(out)
    generator = torch.Generator().manual_seed(1)
    expected = [
        "".join(eval.stream(policy, tokenizer, prompt, 5, 1.0, generator))
        for prompt in ("cat\n", "\ufffd\ufffd\n", "dog\n")
    ]
    assert printed.decode() == "".join(text + "\n" for text in expected)


def test_ctrl_c_ends_a_chat_with_status_0_and_no_traceback(out):
    process = start(out)
    process.stdin.write(b"cat\n")
    process.stdin.flush()
    begun = process.stdout.read(1)  # it has begun to respond, or has done so and waits for us
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert (begun + printed).endswith(b"\n")


def test_a_reader_that_goes_away_is_no_error(out):
    process = start(out)
    process.stdout.close()
    process.stdin.write(b"cat\n" * 3)
    process.stdin.close()
    errors = process.stderr.read()
    assert (process.wait(timeout=60), errors) == (0, b"")
