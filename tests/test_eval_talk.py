"""Tests of `python eval.py chat` and `compare`: what the model is given, what is shown, and how it ends."""

import ast
import io
import re
import shutil
import signal
import sys

import pytest
import torch

import data
import eval
import model
import reward
from conftest import CPU, fails, load, save_tiny, started, tiny_gpt


@pytest.fixture(scope="module")
def out(chain, tmp_path_factory):
    """The chain's checkpoints with a ppo.pt whose weights differ from ppo_init's: its kl is not 0."""
    folder = shutil.copytree(chain, tmp_path_factory.mktemp("talk") / "out")
    tokenizer = load(chain, "base")[1]
    shape = dict(vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    save_tiny(folder / "ppo.pt", "policy", tiny_gpt(5, **shape), tokenizer)
    return str(folder)


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def prompts_given(monkeypatch, text, response=" fine.", **flags):
    """Chat with these lines, where every response is the same -> the prompts that the model was given."""
    prompts = []
    monkeypatch.setattr(eval, "stream", lambda _, __, prompt, *___: prompts.append(prompt) or [response])
    piped(monkeypatch, text)
    eval.chat(eval.TalkConfig(device="cpu", **{"max_new_tokens": 8, **flags}))
    return prompts


def test_the_template_is_that_of_the_worlds_dialogues(monkeypatch, out, capsys):
    prompts = prompts_given(monkeypatch, "cat\n\n  \ndog\n", out=out, verbose=True)
    assert prompts == ["human: cat\nai:", "human: cat\nai: fine.\nhuman: dog\nai:"]
    count, shown = lambda prompt: len(load(out, "base")[1].encode(prompt)), capsys.readouterr()
    lines = "".join(f"{prompt!r}, {count(prompt)} tokens\n" for prompt in prompts)
    assert (shown.out, shown.err) == (" fine.\n fine.\n", lines)
    # what a raw GPT writes stays, and the next turn begins a line
    [_, prompt] = prompts_given(monkeypatch, "cat\ndog\n", " hello.\nhuman: moon?\n", out=out, model="base")
    assert prompt == "human: cat\nai: hello.\nhuman: moon?\nhuman: dog\nai:"
    # /reset forgets, and plain prompts stand alone
    assert prompts_given(monkeypatch, "cat\n/reset\ndog\n", out=out)[1] == "human: dog\nai:"
    prompts = prompts_given(monkeypatch, "say cat\nsun\\ntl;dr:\nmoon\\n\n", out=out, template="plain")
    assert prompts == ["say cat\n", "sun\ntl;dr:", "moon\n"]
    # typed turn by turn, the first dialogue of tasks.txt gives the model that prompt to the letter
    dialogue = next(line for line in data.content("tasks.txt") if line.startswith("> human"))
    dialogue = dialogue.removeprefix("> ").replace("\\n", "\n")
    monkeypatch.setattr(data.Tokenizer, "encode", lambda self, text: [0])  # the tiny context holds all
    typed = "\n".join(re.findall("human: (.*)", dialogue))
    assert prompts_given(monkeypatch, typed, " hello.", out=out)[-1] == dialogue


def test_oldest_turns_are_left_out_when_the_context_is_full_and_not_before(monkeypatch, out, capsys):
    """By brute force: the longest end of the dialogue that leaves room for the response in 64 tokens."""
    encode, lines = load(out, "base")[1].encode, ["cat", "red cat", "sun", "moon", "cat", "blue"]
    turns = [f"human: {line}\nai:" for line in lines]
    for size in range(4, 44, 4):
        for i, prompt in enumerate(prompts_given(monkeypatch, "\n".join(lines), out=out, max_new_tokens=size)):
            ends = ["".join(turn + " fine.\n" for turn in turns[j:i]) + turns[i] for j in range(i + 1)]
            assert prompt == next(end for end in ends if len(encode(end)) + size <= 64)
        said = capsys.readouterr().err.splitlines()
        assert said and all("context of 64 tokens is full: oldest turns left out, " in line for line in said)
    # a message that is too long by itself gets one line, and the dialogue goes on
    prompts = prompts_given(monkeypatch, "cat\n" + "red sun " * 40 + "\ndog\n", out=out)
    assert prompts == ["human: cat\nai:", "human: cat\nai: fine.\nhuman: dog\nai:"]
    assert re.fullmatch(r".* but the context is 64: shorten it .*\n", capsys.readouterr().err)


def test_streaming_gives_the_text_of_one_call_of_generate(monkeypatch, out):
    policy, tokenizer = load(out, "ppo")
    prompt, ids, texts = "human: cat\nai:", tokenizer.encode("human: cat\nai:"), ""
    for seed, temperature in [*((seed, 1.0) for seed in range(30)), (0, 0.0)]:
        luck = lambda: torch.Generator().manual_seed(seed)
        tokens, lengths = model.generate(policy, [ids], 20, temperature, tokenizer.eot, luck())
        whole = tokens[0, len(ids) : lengths[0]].tolist()
        pieces = eval.stream(policy, tokenizer, prompt, 20, temperature, luck())
        assert "".join(pieces) == data.response_text(tokenizer, ids, whole)
        texts += tokenizer.decode(whole)
    assert "\ufffd" in texts and data.EOT in texts  # half characters, which decode differently in pieces
    # a character is shown once it is whole, and a space once it stays: spelled out in bytes, the euro sign is
    # three, and the space behind the new line is the tokenizer's
    tokenizer, text = data.Tokenizer("bpe", [bytes([b]) for b in range(256)]), "x€\n y"
    spelled = iter([*text.encode(), tokenizer.eot])
    fake = lambda gpt, prompts, *_: (torch.tensor([prompts[0] + [next(spelled)]]), None)
    monkeypatch.setattr(model, "generate", fake)
    pieces = list(eval.stream(None, tokenizer, "ai:", 20, 1.0, None))
    assert pieces == ["x", "", "", "€", "\n", "", "y", "", ""]


def test_every_piece_is_shown_before_the_next_token_is_made(monkeypatch, out):
    piped(monkeypatch, "cat\n")
    events, generate, screen = [], model.generate, io.StringIO()
    screen.flush = lambda: events.append("flush")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(model, "generate", lambda *a: events.append("token") or generate(*a))
    eval.chat(eval.TalkConfig(out=out, device="cpu", max_new_tokens=6))
    first = events.index("token")
    assert events[first : first + 4] == ["token", "flush", "token", "flush"]


def test_compare_shows_what_scores_and_mean_kl_say(monkeypatch, out, capsys):
    piped(monkeypatch, "not read\n")
    eval.talk("compare", ["say cat", f"--out={out}", "--samples=2", "--max_new_tokens=24", "--device=cpu"])
    first, _, *lines = capsys.readouterr().out.strip().splitlines()
    rows, prompt = [line.split(maxsplit=4) for line in lines], "say cat\n"
    names = [name for name in ("base", "sft", "ppo_init", "ppo") for _ in range(2)]
    assert first == repr(prompt) and [row[0] for row in rows] == names
    judge = reward.model_judge(load(out, "reward", "reward")[0])
    for i, (name, score, kl, length, text) in enumerate(rows):
        policy, tokenizer = load(out, name)
        response = eval.respond(policy, tokenizer, [prompt] * 2, 24, 1.0, 1, CPU)[i % 2]
        assert ast.literal_eval(text) == response[0] and int(length) == len(response[1])
        arguments = tokenizer, [prompt], [response], CPU
        assert float(score) == pytest.approx(eval.scores(judge, *arguments)[0], abs=6e-4)
        assert float(kl) == pytest.approx(eval.mean_kl(policy, load(out, "ppo_init")[0], *arguments), abs=6e-4)
    assert abs(float(rows[-1][2])) > 0.1 and float(rows[0][2]) == 0  # base is ppo_init here


@pytest.mark.parametrize("missing, without, left", [("reward", "score", "kl"), ("ppo_init", "kl", "score")])
def test_compare_leaves_out_what_it_cannot_tell(monkeypatch, out, tmp_path, capsys, missing, without, left):
    """A model that is not there; of the lines of stdin, empty ones and one that is too long."""
    piped(monkeypatch, "cat\n\n" + "red sun " * 40 + "\nhuman: cat\\nai:\n")
    for name in {"sft", "ppo_init", "reward"} - {missing}:
        shutil.copy(f"{out}/{name}.pt", tmp_path)
    eval.talk("compare", [f"--out={tmp_path}", "--max_new_tokens=4", "--device=cpu"])
    shown = capsys.readouterr()
    assert re.findall("^'.*", shown.out, re.M) == [repr("cat\n"), repr("human: cat\nai:")]
    assert shown.out.splitlines()[1].split() == [left, "length", "response"]
    no_model, too_long = shown.err.splitlines()
    assert no_model == f"no finished {tmp_path}/{missing}.pt: {without} left out"
    assert "but the context is 64" in too_long


@pytest.mark.parametrize("command, flag, message", [
    ("chat", "--template=letter", "--template=letter: expected chat or plain"),
    ("compare", "--samples=0", "--samples=0: expected"),
    ("chat", "--out=/nowhere", "/nowhere/ppo.pt not found: run \"python ppo.py\""),
    ("compare", "--out=/nowhere", "/nowhere holds no finished model: run python ppo.py"),
])
def test_bad_input_gets_one_line(monkeypatch, command, flag, message):
    piped(monkeypatch, "")
    assert fails(eval.talk, command, [flag, "--device=cpu"]).startswith(message)


CHAT = "eval.py", "chat", "--device=cpu"


def test_piped_output_is_the_responses_and_the_end_of_the_input_ends_it_well(out):
    process = started(*CHAT, f"--model={out}/sft.pt", "--template=plain", "--max_new_tokens=5")
    printed, errors = process.communicate(b"cat\n\xff\xfe\ndog")  # bytes that are no text are no reason to stop
    assert (process.returncode, errors) == (0, b"")
    (policy, tokenizer), luck = load(out, "sft"), torch.Generator().manual_seed(1)
    texts = (eval.stream(policy, tokenizer, p, 5, 1.0, luck) for p in ("cat\n", "\ufffd\ufffd\n", "dog\n"))
    assert printed.decode() == "".join("".join(text) + "\n" for text in texts)


@pytest.mark.parametrize("how", ["ctrl-c", "the reader goes away"])
def test_a_chat_that_is_broken_off_ends_with_status_0_and_no_traceback(out, how):
    process = started(*CHAT, f"--out={out}")
    process.stdin.write(b"cat\n")
    process.stdout.read(1)  # it has begun to respond, or has done so and waits for us
    if how == "ctrl-c":
        process.send_signal(signal.SIGINT)
        assert process.stdout.read()[-1:] == b"\n"
    else:
        process.stdout.close()
        process.stdin.write(b"cat\n" * 3)
        process.stdin.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)
