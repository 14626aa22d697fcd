"""Tests of sft.py: the loss and what is mixed into a batch; then what every stage stands on: optimizers,
a run that goes on where it was stopped, checkpoints, flags."""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

import data
import eval
import model
import ppo
import reward
import sft
from conftest import CPU, Trap, fails, load, pickled, rows_of, same, save_tiny, tiny_gpt, tiny_scalar, write

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
TOKENIZER = data.Tokenizer.train(["say cat"], 280)


# -- the stage and its optimizers ----------------------------------------------------------------------------


def config_of(chain, out, **flags):
    """One epoch of each model from the untrained base of chain, whose context is 64 tokens."""
    flags = dict(data=str(chain), base=str(chain / "base.pt"), sft_epochs=1, ppo_init_epochs=1) | flags
    return sft.Config(scale="tiny", out=str(out), device="cpu", **flags)


@pytest.mark.parametrize("size", [1, 12, 1024])  # rows one by one, two together, all
def test_losses_are_means_over_unmasked_tokens_however_they_are_cut(size, monkeypatch):
    """valid_loss: without dropout."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", size)
    gpt = tiny_gpt()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0], [4, 4, 0, 0, 0, 0], [3, 1, 2, 5, 0, 0]])
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 1:] = mask[1, :2] = mask[3, 0] = True  # row 2 has nothing that counts, row 3 stops counting early
    expected = -model.token_logprobs(gpt(tokens), tokens)[mask].mean().item()
    assert sft.lm_loss(gpt, tokens, mask).item() == pytest.approx(expected, abs=1e-5)
    assert sft.valid_loss(tiny_gpt(dropout=0.5).train(), tokens, mask) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("share, documents", [(0.0, 0), (0.01, 1), (0.5, 8)])
def test_pretrain_share_of_the_rows_of_a_batch_are_documents(chain, tmp_path, monkeypatch, share, documents):
    """8 demonstrations: share / (1 - share) of them on top, at least one, but none for share 0. Each of them
    once in every epoch, in another order."""
    seen = []
    monkeypatch.setattr(sft, "train", lambda run, gpt, tokenizer, optimizers, batches, *_: seen.append(batches))
    sft.main(config_of(chain, tmp_path, pretrain_share=share, sft_batch=8, sft_epochs=2))
    of_sft, of_ppo_init = seen
    rows = [str(row) for batch in of_sft for row in batch]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert len(of_sft[0]) == 8 and len(of_ppo_init[0]) == 8 + documents
    assert sorted(first) == sorted(second) and first != second


def test_rows_are_cut_to_the_context_of_a_given_base(chain, tmp_path, capsys):
    long = "cat dog " * 20  # 100 tokens and more
    rows = [dict(prompt="say cat\n", response=text) for text in ["cat"] * 100 + [long]]
    (tmp_path / "comparisons.jsonl").write_text((chain / "comparisons.jsonl").read_text())
    write(tmp_path / "demonstrations.jsonl", rows)
    write(tmp_path / "pretrain.txt", [long, "<|endoftext|>", long])
    sft.main(config_of(chain, tmp_path, data=str(tmp_path)))
    assert "dropped 1 of 91 demonstrations: longer than 64 tokens" in capsys.readouterr().out
    assert load(tmp_path, "ppo_init")[0].config.block_size == 64


@pytest.mark.parametrize("encoding", ["gpt2", "bpe"])
def test_what_a_run_prints_logs_computes_in_and_keeps(chain, tmp_path, capsys, dtypes, encoding):
    """The baseline: the weights of several epochs, the last of which are its own."""
    sft.main(config_of(chain, tmp_path, encoding=encoding, dtype="bfloat16", sft_epochs=5))
    assert ("--encoding=gpt2 is not used" in capsys.readouterr().out) == (encoding == "gpt2")
    rows = rows_of(tmp_path / "ppo_init.jsonl")
    assert len(rows) > 1 and all(row["memory_gb"] > 0 for row in rows)
    assert len(dtypes) > 2 and set(dtypes) == {"bfloat16"}  # every step
    load = lambda epoch: sft.load_network("policy", f"{tmp_path}/sft.pt", CPU, epoch)[0].state_dict()
    assert list(torch.load(tmp_path / "sft.pt")["epochs"]) == [1, 2, 4, 5]
    assert same(load(None), load(5)) and not same(load(4), load(5))


def test_cosine_decays_to_a_tenth():
    """L22: 0.1 + 0.9 * 0.5 * (1 + cos(pi * t / 1000)); the paper's peak 9.65e-6 at half time: 5.3075e-6."""
    factors = [sft.cosine(t, 1000) for t in (0, 250, 500, 750, 1000)]
    assert factors == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert 9.65e-6 * factors[2] == pytest.approx(5.3075e-6)
    # behind a warm-up of 200 steps the same cosine over the 1000 that are left
    rising = [sft.cosine(t, 1200, warmup=200) for t in (1, 100, 200, 700, 1200)]
    assert rising == pytest.approx([0.005, 0.5, 1.0, 0.55, 0.1])
    assert sft.cosine(5, 5, warmup=5) == 1.0  # --primer_share=1


def test_the_primer_is_the_warm_up_of_pretraining_and_a_row_a_piece_of_a_document(tmp_path, monkeypatch):
    factors, rows, train = [], [], sft.train
    step = lambda network, optimizers, factor, grad_clip: factors.append(factor)
    monkeypatch.setattr(sft, "train", lambda *x, **y: rows.extend(sum(x[4], [])) or train(*x, **y))  # batches
    monkeypatch.setattr(sft, "optimizer_step", step)
    monkeypatch.setattr(sft, "fine_tune", lambda *_: None)
    flags = "--scale=tiny --device=cpu --base_steps=10 --primer_share=0.5 --document_length=10".split()
    sft.main(sft.parse(sft.Config, sft.SCALES, [*flags, f"--out={tmp_path}"]))
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True) and factors[-1] == pytest.approx(0.1)
    assert {len(first) for first, _ in rows} == {1}  # every token counts but the first
    assert max(len(rest) for _, rest in rows) == 9


@pytest.mark.parametrize("gradient, decay, moves", [
    # J23: with gradient g = eps = 1e-5 the first step is lr * g / (|g| + eps); with eps 1e-8 it would be 0.999 lr
    (1e-5, 0.0, (0.05, 0.05)),
    (0.0, 0.5, (0.05, 0.0)),  # decay is for matrices only: 0.1 * 0.5
])
def test_first_step_of_adam_at_a_rate_of_a_tenth(gradient, decay, moves):
    layer = torch.nn.Linear(1, 1).double()
    for parameter in layer.parameters():
        parameter.data, parameter.grad = torch.ones_like(parameter), torch.full_like(parameter, gradient)
    sft.adamw(layer, 0.1, weight_decay=decay).step()
    assert (1 - layer.weight.item(), 1 - layer.bias.item()) == pytest.approx(moves, abs=1e-7)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_the_rest():
    """Each parameter once, also the embedding, which is the unembedding too."""
    gpt = tiny_gpt(n_layer=3)
    muon, adamw = (
        sorted(id(p) for group in optimizer.param_groups for p in group["params"])
        for optimizer in sft.muon_and_adamw(gpt, 0.02, 1e-3, 0.1).values()
    )
    is_matrix = lambda name: name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    assert muon == sorted(id(p) for name, p in gpt.named_parameters() if is_matrix(name))
    assert adamw == sorted(id(p) for name, p in gpt.named_parameters() if not is_matrix(name))


def test_optimizer_step_clips_one_norm_scales_each_peak_and_clears():
    """Gradients 3 and 4 of two optimizers have one norm, 5; clipped to 1 they are 0.6 and 0.8. With plain SGD
    at peaks 1 and 10, half of each: moves of 0.3 and 4. Then a tenth of the peaks, not of the halves."""
    layer = torch.nn.Linear(1, 1)
    optimizers = [torch.optim.SGD([layer.weight], lr=1.0), torch.optim.SGD([layer.bias], lr=10.0)]
    for factor, moves in ((0.5, (0.3, 4.0)), (0.1, (0.06, 0.8))):
        before = layer.weight.item(), layer.bias.item()
        layer.weight.grad, layer.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
        sft.optimizer_step(layer, optimizers, factor, 1.0)
        found = before[0] - layer.weight.item(), before[1] - layer.bias.item()
        assert found == pytest.approx(moves, abs=1e-5)
        assert layer.weight.grad is None and layer.bias.grad is None


# -- a run ---------------------------------------------------------------------------------------------------


@dataclass
class Config(data.Common):
    batch: data.Count = 8
    lr: data.Rate = 1e-3
    ptx_coef: data.Amount = 0.5
    shuffle: bool = False
    shift: int = 0


def begin(out, steps=3, **flags):
    """A run of so many steps, which begins or goes on where a run in this folder was stopped."""
    out.mkdir(exist_ok=True)
    run = sft.Run("x", "policy", Config(**{"out": str(out), "device": "cpu", "data": "a folder", **flags}))
    run.begin(steps, TOKENIZER, weights=tiny_gpt())
    return run


def refused(out, **flags):
    """The one line that a run with these flags ends in; what was there is left as it is."""
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    message = fails(lambda: begin(out, **flags))
    assert before == [path.read_bytes() for path in sorted(out.iterdir())]
    assert "choose another --out, or --fresh" in message
    return message


def test_every_draw_is_a_function_of_seed_and_step(tmp_path):
    """Torch's own state, which dropout uses, and the run's generator, and numpy's numbers."""
    def draws(name, **flags):
        run, on_cpu = begin(tmp_path / name, **flags), lambda **given: torch.rand(1, **given).item()
        return [(on_cpu(), on_cpu(generator=run.generator), run.rng.random()) for _ in run]

    first, again, other = draws("first"), draws("again"), draws("other", seed=2)
    assert first == again and all(len(set(column)) == 6 for column in zip(*first, *other))


def test_ctrl_c_waits_for_the_end_of_a_step_and_a_second_one_does_not(tmp_path):
    before, seen = signal.getsignal(signal.SIGINT), []
    for stop, says, strokes in ((SystemExit, "the same command goes on", 1), (KeyboardInterrupt, None, 2)):
        with pytest.raises(stop, match=says):
            for step in begin(tmp_path):
                for _ in range(strokes):
                    os.kill(os.getpid(), signal.SIGINT)
                seen.append(step)
    assert seen == [1] and torch.load(tmp_path / "x.pt")["step"] == 1
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("seconds, writing, found", [
    (2.5, 0, [0, 0, 0, 3, 3, 3, 6]), (0, 0, [0, 1, 2, 3, 4, 5, 6]), (1e9, 0, [0] * 7),
    (0, 0.125, [0, 1, 1, 1, 4, 4, 4]),  # 20 times the seconds that writing takes
])
def test_what_a_kill_leaves_is_not_older_than_save_seconds(tmp_path, monkeypatch, seconds, writing, found):
    """The checkpoint's step, 0 without one, in each of seven steps that take a second."""
    clock, save, path, there = [0.0], torch.save, tmp_path / "x.pt", []

    def slowly(*args):
        clock[0] += writing
        save(*args)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch, "save", slowly)
    for _ in begin(tmp_path, 7, save_seconds=seconds):
        there.append(torch.load(path)["step"] if path.exists() else 0)
        clock[0] += 1.0
    assert there == found


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path, capsys):
    """What was logged after it, and a line that a kill cut short, are written again by the run that goes on."""
    run, path = begin(tmp_path), tmp_path / "x.jsonl"
    for step in run:
        run.log(show=step == 3, loss=step + 0.12345)
        if step == 2:
            run.save()
    path.write_text(path.read_text() + '{"step": 4, "lo')
    begin(tmp_path)
    assert [row["loss"] for row in rows_of(path)] == [1.12345, 2.12345]
    assert re.findall("loss +([0-9.]+)", capsys.readouterr().out) == ["3.123"]
    begin(tmp_path, fresh=True)
    assert path.read_text() == "" and not (tmp_path / "x.pt").exists()  # a kill leaves no half of the old run
    path.write_text('{"step": 1}\n{"prompt": "mine"}\n')  # what people wrote
    assert "x.jsonl is not the log of a run" in fails(lambda: begin(tmp_path)) and "mine" in path.read_text()


def test_other_flags_are_named_and_nothing_is_overwritten(tmp_path):
    begin(tmp_path, lr=0.1, seed=1).finish()
    assert begin(tmp_path, lr=0.1, log_every=7, save_seconds=9.0, from_="elsewhere").finished
    message = refused(tmp_path, lr=0.2, seed=3)
    assert "--seed=1 there, 3 now, --lr=0.1 there, 0.2 now" in message and "batch" not in message
    run = begin(tmp_path, lr=0.2, seed=3, fresh=True)
    assert not run.finished and list(run) == [1, 2, 3]


def test_a_checkpoint_of_other_code_is_one_line_of_warning(tmp_path, capsys):
    """And a flag that it does not know was at its default."""
    begin(tmp_path).finish()
    assert begin(tmp_path).finished and "warning" not in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "x.pt")
    del checkpoint["settings"]["batch"]
    torch.save({**checkpoint, "code": 1}, tmp_path / "x.pt")
    assert begin(tmp_path).finished
    [warning] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "made by other code" in warning and "--fresh" in warning
    assert "--batch=8 there, 16 now" in refused(tmp_path, batch=16)


def test_another_text_of_the_world_or_a_folder_is_refused(tmp_path, edit, capsys):
    """And who takes such a checkpoint for an earlier stage is warned."""
    out = tmp_path / "out"
    begin(out, data="").finish()
    edit("pages.txt", "#", "0.1 | a new page.\n#")
    assert "--texts=" in refused(out, data="") and sft.is_finished("policy", f"{out}/x.pt")
    assert "another text" in capsys.readouterr().out
    begin(tmp_path / "of-data", data=str(tmp_path)).finish()
    write(tmp_path / "prompts.jsonl.gz", [dict(prompt="one more")])
    assert "--texts=" in refused(tmp_path / "of-data", data=str(tmp_path))


def test_where_an_earlier_stage_is_found(tmp_path):
    """The path given, else the file in --out, else the one in --from."""
    out, earlier = tmp_path / "out", tmp_path / "earlier"
    find = lambda **flags: sft.where(ppo.Config(out=str(out), from_=str(earlier), **flags), "reward")
    out.mkdir(), earlier.mkdir()
    assert find() == f"{out}/reward.pt"
    for folder in (earlier, out):
        (folder / "reward.pt").touch()
        assert find() == find(reward="gold") == f"{folder}/reward.pt" and find(reward="my.pt") == "my.pt"
    assert sft.where(ppo.Config(out=str(out), base="gold"), "base") == "gold"  # a folder with GPT-2's weights


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, network", [("policy", tiny_gpt(dropout=0.5)), ("reward", tiny_scalar())])
def test_a_network_comes_back_as_it_was_if_it_is_finished_and_of_its_kind(tmp_path, kind, network):
    """J10: in eval mode, and without dropout even if someone calls train()."""
    path, other = str(tmp_path / "p.pt"), dict(policy="reward", reward="policy")[kind]
    for given, says in ((other, f"{other} model, expected a {kind}"), (kind, "is not finished: the command")):
        save_tiny(path, given, network, TOKENIZER, finished=False)
        assert says in fails(sft.load_network, kind, path, CPU)
    assert not sft.is_finished(kind, path) and not sft.is_finished(kind, path + "x")
    save_tiny(path, kind, network, TOKENIZER, step=7)
    assert sft.is_finished(kind, path)
    loaded, tokenizer, checkpoint = sft.load_network(kind, path, CPU)
    assert torch.equal(loaded(TOKENS), network(TOKENS)) and not loaded.training
    assert torch.equal(loaded.train()(TOKENS), network(TOKENS))
    assert tokenizer.state() == TOKENIZER.state() and checkpoint["step"] == 7


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "p.pt"
    save_tiny(path, "policy", tiny_gpt(), TOKENIZER)
    old = path.read_bytes()

    def half(_, temporary):
        Path(temporary).write_bytes(old[: len(old) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    message = fails(save_tiny, path, "policy", tiny_gpt(1), TOKENIZER)
    assert message.startswith(f"cannot write {path} (No space left on device)")
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["p.pt"]


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:5000], lambda raw: b"PK a zip that is none", lambda raw: b"",
    lambda raw: pickled(tiny_gpt().state_dict()), lambda raw: pickled(dict(kind="policy", trap=Trap())),
])
def test_a_damaged_or_foreign_file_ends_in_one_line_is_left_alone_and_runs_no_code(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.pt"
    save_tiny(path, "policy", tiny_gpt(), TOKENIZER)
    path.write_bytes(raw := damage(path.read_bytes()))
    message = "p.pt is damaged or is not a checkpoint of this project: delete it"
    assert fails(sft.is_finished, "policy", "p.pt").startswith(message)
    assert path.read_bytes() == raw and os.listdir(tmp_path) == ["p.pt"]


# -- flags, checks, devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, expected", [  # by the type of a field; dashes are underscores; a switch
    (["--lr=3e-4", "--batch=16", "--shuffle=yes"], dict(lr=3e-4, batch=16, shuffle=True)),
    (["--out=a=b", "--from=c", "--data="], dict(out="a=b", from_="c", data="")),
    (["--shuffle", "--ptx-coef=2", "--shift=-3"], dict(shuffle=True, ptx_coef=2.0, shift=-3)),
    (["--scale=tiny", "--lr=5"], dict(data.COMMON_SCALES["tiny"], scale="tiny", batch=2, lr=5.0)),
])
def test_flags_become_a_config(argv, expected):
    scales = dict(tiny=dict(batch=2, lr=1e-2), cpu=dict())
    assert sft.parse(Config, scales, ["--scale=cpu", *argv]) == Config(**expected)


@pytest.mark.parametrize("stage", [sft, reward, ppo, eval])
@pytest.mark.parametrize("scale", ["tiny", "cpu", "gpu", "gpt2"])
def test_the_defaults_of_every_scale_are_in_range(stage, scale):
    config = sft.parse(stage.Config, stage.SCALES, [f"--scale={scale}"])
    sft.check_flags(config)
    assert config.encoding == ("gpt2" if scale == "gpt2" else "bpe")


@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16"])
def test_on_a_cpu_activations_are_float32_unless_asked_for(dtype):
    with sft.autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, dtype or "float32")


@pytest.mark.parametrize("platform, gigabytes", [("linux", 2.048), ("darwin", 0.002), ("win32", 0.0)])
def test_memory_is_counted_in_kb_on_linux_in_bytes_on_macos(monkeypatch, platform, gigabytes):
    resource = mock.Mock(**{"getrusage.return_value.ru_maxrss": 2_000_000})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "resource", None if platform == "win32" else resource)  # as if missing
    monkeypatch.setattr(sys, "platform", platform)
    assert sft.peak_memory_gb() == pytest.approx(gigabytes)
