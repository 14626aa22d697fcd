"""On a GPU, and on a pretended one (fake_cuda.py): every stage runs, and goes on where it was stopped."""

import contextlib
import functools
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from conftest import python, rows_of, tiny_gpt, weights_of  # first: it puts the repository on the path
import data
import model
import ppo
import reward
import sft

FAKE = str(Path(__file__).with_name("fake_cuda.py"))
CAN_PRETEND = sys.platform == "linux" and shutil.which("g++") and not torch.backends.cuda.is_built()
pretended = pytest.mark.skipif(not CAN_PRETEND, reason="needs Linux, g++ and a CPU build of torch")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FEW_STEPS = {
    sft: ("--base_steps=4", "--sft_epochs=1", "--ppo_init_epochs=1"),
    reward: ("--epochs=1",), ppo: ("--episodes=64",),
}


def every_stage(*flags):
    """The whole chain; each stage stopped, as by Ctrl-C, in its second optimizer step, and called again."""
    step, calls = sft.optimizer_step, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    sft.optimizer_step = interrupted
    data.World, data.make_labelers = functools.cache(data.World), functools.cache(data.make_labelers)
    for stage, few_steps in FEW_STEPS.items():
        calls.clear()
        config = sft.parse(stage.Config, stage.SCALES, [*flags, *few_steps])
        with contextlib.suppress(SystemExit):
            stage.main(config)
        stage.main(config)


@pytest.mark.parametrize("dtype", ["float32", ""])  # '': as a run on a GPU takes it, bfloat16
@pytest.mark.parametrize("prefix", [
    pytest.param((), id="gpu", marks=on_gpu), pytest.param((FAKE,), id="pretended", marks=pretended),
])
def test_the_chain(tmp_path, prefix, dtype):
    flags = ("--scale=tiny", "--device=cuda", "--max_new_tokens=8", f"--dtype={dtype}")
    done = python(*prefix, __file__, f"--out={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on from step") == 3
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    assert {"GPT", "SFT", "PPO-ptx"} <= {row["model"] for row in table}
    weights = weights_of(tmp_path / "ppo.pt").values()
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights)
    # J11. A GPU rounds to bfloat16, or TF32, in kernels that depend on the number of rows
    tolerance = 1e-5 if prefix and dtype == "float32" else 0.1
    rows = rows_of(tmp_path / "ppo.jsonl")
    assert len(rows) == 2 and all(abs(row["first_ratio"] - 1) < tolerance for row in rows)


@pretended
def test_pretending_finds_device_errors_and_takes_what_a_gpu_takes(tmp_path):
    (tmp_path / "script.py").write_text("""
import torch
x, y, luck = torch.arange(3, device="cuda"), torch.arange(3), torch.Generator()
for wrong in ("y[x]", "torch.cat([x, y])", "x.numpy()", "torch.rand(3, device='cuda', generator=luck)"):
    try:
        eval(wrong)
    except RuntimeError:
        continue
    raise SystemExit(f"not found: {wrong}")
assert (x[y] + x.where(x > 1, torch.tensor(5)) + 1).tolist() == [6, 7, 5]
x + y
""")
    done = python(FAKE, str(tmp_path / "script.py"))
    assert done.returncode != 0 and "Expected all tensors to be on the same device" in done.stderr


# float32: sums in another order, 2e-6 from float64 on a CPU. bfloat16: 8 bits in every activation, 0.02 from
# float64 on a CPU. Log-probabilities are -8 to -4
@on_gpu
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 0.1)])
def test_cpu_and_gpu_have_the_same_log_probabilities(dtype, tolerance):
    torch.set_float32_matmul_precision("highest")  # the default: no TF32
    gpt, lengths = tiny_gpt(vocab_size=300, n_embd=64, std=0.1, lookup=True), torch.arange(8, 24)
    tokens, mask = torch.randint(300, (16, 24)), model.response_mask(torch.full((16,), 3), lengths, 24)
    expected = model.by_length(model.masked_logprobs, gpt, tokens, mask).detach()
    with sft.autocast(torch.device("cuda"), dtype):
        found = model.by_length(model.masked_logprobs, gpt.cuda(), tokens.cuda(), mask.cuda())
    torch.testing.assert_close(found.detach().cpu(), expected, atol=tolerance, rtol=0)


if __name__ == "__main__":
    every_stage(*sys.argv[1:])
