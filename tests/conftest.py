"""What the tests share: the repository on the path, one thread, tiny networks, and a chain of untrained
checkpoints.

A mark like "J12" or "L30" in a test points to a line of this list. J are details of InstructGPT that are easy
to get wrong:

    J1   reward model and value model read the prompt too, not the response alone
    J2   a fresh scalar head has std 1/sqrt(C+1) and bias 0: first scores are of order 1
    J3   the value model begins as a copy of the reward model, not with a random head
    J4   the score is read at the last real token; more padding changes nothing
    J5   padding is not eot: were both masked, no model would learn to stop
    J6   padding shifts no position and is never attended to
    J7   positions in the cache are those of a full forward, for ragged prompts too
    J8   sampling cuts nothing from the distribution (no top-k, no top-p); each row ends at its own eot
    J9   the temperature divides the logits in every log-probability, when sampling and when learning
    J10  no dropout in rollout, reference and PPO update
    J11  the first minibatch of every iteration has ratio 1, clip fraction 0 and, in the first iteration, kl 0
    J12  logits[:, t] predicts tokens[:, t + 1]: one shift, in one place
    J13  nothing stands behind the first eot; the judge reads the text cut there
    J14  a response without eot pays a penalty
    J15  the score is added at one index; rewards sum to score - beta * kl
    J16  masks: policy terms on actions only, padding adds 0 to every sum and every count
    J17  whitening of rewards keeps the mean
    J18  whitening of advantages removes it: population variance, real tokens only, after returns are taken
    J19  the value target is fixed, and the value is clipped by the larger of two losses
    J20  policy and value model are two networks: no gradient flows from one loss to the other's network
    J23  Adam's eps is 1e-5, added after the bias correction
    J24  the learning rate is constant behind its warm-up
    J25  the reward model is shifted so that demonstrations score 0 on average
    J26  kl is detached and measured against a reference that never changes
    J27  each row once in a pass, each prompt once before any comes again
    J28  the gradients of PPO and pretraining text add up to one optimizer step
    J30  kl may be negative on a token; a mean below 0 over many batches is a bug

L are worked examples, L2 to L30: the arithmetic stands at the mark, where one is first computed.
"""

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)

import data
import model
import sft

torch.set_num_threads(1)
# a shell that starts the tests in the background has Ctrl-C ignored, which the processes they start inherit
signal.signal(signal.SIGINT, signal.default_int_handler)
CPU = torch.device("cpu")
TINY = ("--scale=tiny", "--device=cpu")


def close(found, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found.detach(), expected.detach(), atol=atol, rtol=0)


def same(a, b):
    """Are two checkpoints, or parts of them, equal to the bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def write(path, rows):
    """A file of JSON lines, packed if its name says so. rows: dicts, or lines as they shall stand -> path."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    raw = "".join(line + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return str(path)


def weights_of(path):
    """The weights in a checkpoint."""
    return torch.load(path, weights_only=True)["weights"]


def rows_of(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def python(*command, **more):
    """`python COMMAND` in the repository, to its end -> returncode, stdout, stderr."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, **more)


def started(*command):
    """`python COMMAND` in the repository behind pipes, with strict UTF-8 as on a desktop -> the process."""
    env, pipe = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, subprocess.PIPE
    env.pop("COLUMNS", None)  # the width of a terminal
    pipes = dict(stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes)


def fails(call, *arguments, **flags):
    """-> the one line of the SystemExit that the call must raise: exit status 1, and that line on stderr."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments, **flags)
    assert isinstance(stop.value.code, str) and stop.value.code and "\n" not in stop.value.code
    return stop.value.code


class Trap:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def pickled(content):
    """-> the bytes of the file that torch would write."""
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def tiny_gpt(seed=0, vocab_size=11, block_size=24, n_layer=2, n_head=2, n_embd=16, std=0.4, **more):
    """A GPT whose every weight, biases and LayerNorms too, is random and large:
    no mistake hides behind a zero."""
    torch.manual_seed(seed)
    gpt = model.GPT(model.GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, **more))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return gpt.eval()


def tiny_scalar(seed=0, **more):
    """A reward or value model with a random body and head."""
    scalar = model.ScalarGPT.from_gpt(tiny_gpt(seed, **more))
    torch.nn.init.normal_(scalar.head.bias)
    return scalar.eval()


def load(folder, name, kind="policy"):
    """-> the network of a checkpoint, its tokenizer."""
    return sft.load_network(kind, f"{folder}/{name}.pt", CPU)[:2]


def save_tiny(path, kind, network, tokenizer, **more):
    """A finished checkpoint of an untrained network."""
    checkpoint = {
        "kind": kind, "config": asdict(network.config), "weights": network.state_dict(), "epochs": {},
        "tokenizer": tokenizer.state(), "step": 1, "finished": True, "settings": {}, "code": 0, **more,
    }
    data.write_file(str(path), lambda temporary: torch.save(checkpoint, temporary))


@pytest.fixture(scope="session")
def world():
    return data.World()


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """A copy of assets/world to write into -> a function of a file's name, what stands there, what shall."""
    folder = tmp_path / "world"
    shutil.copytree(data.WORLD, folder)
    monkeypatch.setattr(data, "WORLD", str(folder))

    def replace(name, old, new):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return replace


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A --data folder with 20 ranked prompts, and beside it base, sft, ppo_init and reward checkpoints,
    all untrained."""
    folder = tmp_path_factory.mktemp("chain")
    rng = random.Random(0)
    words = "red blue green cat dog sun moon tree".split()
    line = lambda: " ".join(rng.choice(words) for _ in range(rng.randint(2, 5)))
    more = lambda: dict(responses=[line() for _ in range(4)], ranks=[1, 2, 2, 3])
    rows = [dict(prompt=f"say {line()}\n", user=f"user{i}", **more()) for i in range(20)]
    write(folder / "comparisons.jsonl", rows)
    tokenizer = data.Tokenizer.train([row["prompt"] + " ".join(row["responses"]) for row in rows], 280)
    gpt = tiny_gpt(1, vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    for name in ("base", "sft", "ppo_init"):
        save_tiny(folder / f"{name}.pt", "policy", gpt, tokenizer)
    reward_model = tiny_scalar(2, vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    save_tiny(folder / "reward.pt", "reward", reward_model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of one whole tiny run, made by `python ppo.py --scale=tiny`, and what it printed."""
    out = tmp_path_factory.mktemp("made") / "out"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}  # as narrow as a pipe may be
    done = python("ppo.py", *TINY, f"--out={out}", env=ascii_only)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    return out, done.stdout


@pytest.fixture
def dtypes(monkeypatch):
    """What --dtype each forward of a stage was given, in their order."""
    seen, autocast = [], sft.autocast

    def watched(device, dtype=""):
        seen.append(dtype)
        return autocast(device, dtype)

    monkeypatch.setattr(sft, "autocast", watched)
    return seen
