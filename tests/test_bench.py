"""Tests of bench.py: our side of every benchmark runs, and what it prints is what it measured."""

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import model

TINY = model.GPTConfig(vocab_size=40, block_size=128, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_our_contestants_run(name, dtype):
    _, contestants = bench.BENCHMARKS[name]
    for who in set(bench.OWN) & set(contestants):
        assert min(contestants[who](TINY, torch.device("cpu"), dtype)()) > 0


def test_forward_flops_are_those_that_torch_counts():
    """Torch counts the whole square of attention, 4 T C a token and layer, where half is needed: 2 T C."""
    gpt, T = model.GPT(TINY), 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gpt(torch.zeros(1, T, dtype=torch.long))
    attention = sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(op)
    )
    matmuls = counter.get_total_flops() - attention
    assert bench.forward_flops(TINY, T, logits=T) - 2 * 2 * T * T * 16 == matmuls


def test_ours_is_as_many_times_as_quick_as_the_median_of_the_ratios_of_the_turns(monkeypatch):
    """Ratios 2, 1, 4, 3, 2 and not 9, of the turn that warms up; memory is that of the last turn."""
    turns = {"ours": [(1, 0)] + [(s, 0.25) for s in (1, 2, 1, 1, 2)]}
    turns["TRL"] = [(9, 0)] + [(s, 0.5) for s in (2, 2, 4, 3, 4)]
    monkeypatch.setattr(bench, "contestant", lambda name, size, who, args: iter(turns[who]))
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 2 * bench.work(bench.SIZES["A"])["ppo"][2])
    args = argparse.Namespace(only="", device="cpu", dtype="float32")
    rows = bench.compare("ppo", "A", args, ["transformers", "trl"])  # 64 episodes in 1 s, in 3 s
    assert bench.table(rows)[-1] == (
        "| ppo | A | 64.0 episodes | 50% | 0.25 GB | TRL | 21.3 | 0.50 GB | **2.00x** (1.00 to 4.00) |"
    )
    assert [row["who"] for row in bench.compare("ppo", "A", args, [])] == ["ours"]
