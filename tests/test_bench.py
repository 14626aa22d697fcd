"""Tests of bench.py: our side of every benchmark runs, and what it prints is what it measured."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import model

TINY = model.GPTConfig(vocab_size=40, block_size=128, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_our_contestants_run(name, dtype):
    _, work, contestants = bench.BENCHMARKS[name]
    unit, items, flops = work(TINY)
    assert unit and items > 0 and flops > 0
    for who in {"ours", "without a cache"} & set(contestants):
        assert min(contestants[who](TINY, "cpu", dtype)()) > 0


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


def test_the_table_says_how_many_times_as_quick_ours_is():
    row = dict(benchmark="ppo", size="A", dtype="float32", unit="episodes", memory_gb=0.5, share_of_peak=0.6)
    ours = dict(row, who="ours", rate=60.0, ratio=1.0, lowest=1.0, highest=1.0)
    peer = dict(row, who="TRL", rate=30.0, ratio=2.0, lowest=1.9, highest=2.1, share_of_peak=None)
    last = bench.table([ours, peer])[-1]
    assert last == (
        "| ppo | A | 60.0 episodes | 60% | 0.50 GB | TRL | 30.0 | 0.50 GB | **2.00x** (1.90 to 2.10) |"
    )
