"""Tests of sft.py: the loss, what a given base decides, and what is mixed into a batch."""

import json

import numpy as np
import pytest
import torch

import model
import sft
from conftest import tiny_gpt


def config_of(chain, out, **flags):
    """A run of two epochs from the untrained base of chain, whose context is 64 tokens."""
    flags = dict(data=str(chain), base=str(chain / "base.pt"), sft_epochs=1, ppo_init_epochs=1) | flags
    return sft.Config(scale="tiny", out=str(out), device="cpu", **flags)


@pytest.mark.parametrize("size", [1, 12, 1024])  # rows one by one, two together, all
def test_lm_loss_is_a_mean_over_unmasked_tokens_however_it_is_cut(size, monkeypatch):
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", size)
    gpt = tiny_gpt()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0], [4, 4, 0, 0, 0, 0], [3, 1, 2, 5, 0, 0]])
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 1:] = mask[1, :2] = mask[3, 0] = True  # row 2 has nothing that counts, row 3 stops counting early
    expected = -model.token_logprobs(gpt(tokens), tokens)[mask].mean()
    assert sft.lm_loss(gpt, tokens, mask).item() == pytest.approx(expected.item(), abs=1e-5)


def test_rows_are_cut_to_the_context_of_a_given_base(chain, tmp_path, capsys):
    long = "cat dog " * 20  # 100 tokens and more
    rows = [dict(prompt="say cat\n", response=text) for text in ["cat"] * 20 + [long]]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "comparisons.jsonl").write_text((chain / "comparisons.jsonl").read_text())
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pretrain.txt").write_text(f"{long}\n<|endoftext|>\n{long}\n")
    sft.main(config_of(chain, tmp_path, data=str(folder)))
    assert "demonstrations: longer than 64 tokens" in capsys.readouterr().out
    assert model.load_policy(str(tmp_path / "ppo_init.pt"), "", "cpu")[0].config.block_size == 64


@pytest.mark.parametrize("encoding, said", [("gpt2", True), ("bpe", False)])
def test_the_encoding_of_a_given_base_is_named_if_it_differs(chain, tmp_path, capsys, encoding, said):
    sft.main(config_of(chain, tmp_path, encoding=encoding))
    assert ("--encoding=gpt2 is not used" in capsys.readouterr().out) == said


@pytest.mark.parametrize("share, rows", [(0.0, 8), (0.01, 9), (0.2, 10)])
def test_pretrain_share_of_the_rows_of_a_batch_are_documents(chain, tmp_path, monkeypatch, share, rows):
    """8 demonstrations: share / (1 - share) of them on top, at least one, but none for share 0."""
    batches = {}

    def train(gpt, path, settings, tokenizer, steps, batch_at, *_, **__):
        batches[path.rsplit("/")[-1]] = batch_at(1, np.random.default_rng(0))

    monkeypatch.setattr(sft, "train", train)
    sft.main(config_of(chain, tmp_path, pretrain_share=share, sft_batch=8))
    assert len(batches["sft.pt"][0]) == 8 and len(batches["ppo_init.pt"][0]) == rows


def test_every_logged_step_has_the_memory(chain, tmp_path):
    sft.main(config_of(chain, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "ppo_init.jsonl").read_text().splitlines()]
    assert len(rows) > 1 and all(row["memory_gb"] > 0 for row in rows[1:])  # the first row is step 0


def test_dtype_reaches_every_step(chain, tmp_path, dtypes):
    sft.main(config_of(chain, tmp_path, dtype="bfloat16"))
    assert dtypes and set(dtypes) == {"bfloat16"}
