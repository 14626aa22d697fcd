"""What the tests share: the repository on the path, one thread, tiny networks, and a chain of untrained
checkpoints.

A mark like "J12" or "L30" in a test names a detail of InstructGPT that is easy to get wrong: the number of a
trap, or of a worked example whose arithmetic stands beside it.
"""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import model

torch.set_num_threads(1)


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


def save_tiny(path, kind, network, tokenizer, **more):
    """A finished checkpoint of an untrained network."""
    model.save_checkpoint(
        str(path), kind=kind, config=asdict(network.config), weights=network.state_dict(), epochs={}, step=1,
        finished=True, settings={}, tokenizer=tokenizer.state(), **more,
    )


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A --data folder with 20 ranked prompts, and beside it base, sft, ppo_init and reward checkpoints,
    all untrained."""
    folder = tmp_path_factory.mktemp("chain")
    rng = random.Random(0)
    words = "red blue green cat dog sun moon tree".split()
    line = lambda: " ".join(rng.choice(words) for _ in range(rng.randint(2, 5)))
    rows = []
    for i in range(20):
        prompt = f"say {line()}\n"
        rows.append(
            dict(prompt=prompt, responses=[line() for _ in range(4)], ranks=[1, 2, 2, 3], user=f"user{i}")
        )
    (folder / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = data.Tokenizer.train([row["prompt"] + " ".join(row["responses"]) for row in rows], 280)
    gpt = tiny_gpt(1, vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    for name in ("base", "sft", "ppo_init"):
        save_tiny(folder / f"{name}.pt", "policy", gpt, tokenizer)
    reward_model = tiny_scalar(2, vocab_size=tokenizer.n_vocab, block_size=64, std=0.1)
    save_tiny(folder / "reward.pt", "reward", reward_model, tokenizer)
    return folder


@pytest.fixture
def dtypes(monkeypatch):
    """What --dtype each forward of a stage was given, in their order."""
    seen, autocast = [], model.autocast
    monkeypatch.setattr(model, "autocast", lambda device, dtype="": seen.append(dtype) or autocast(device, dtype))
    return seen
