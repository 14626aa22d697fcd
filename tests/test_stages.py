"""The stages as a user meets them: the whole chain at tiny scale, stopping and going on,
and what bad input gets."""

import contextlib
import functools
import shutil
import sys

import pytest
import torch

import data
import eval
import ppo
import reward
import sft
from conftest import TINY, fails, python, rows_of, same

NAMES = ("base", "sft", "ppo_init", "reward", "ppo")
STAGES = dict(sft=sft, reward=reward, ppo=ppo, eval=eval)


def configure(stage, *flags):
    return sft.parse(STAGES[stage].Config, STAGES[stage].SCALES, [*TINY, *flags])


# -- the chain -----------------------------------------------------------------------------------------------


def test_one_command_trains_what_is_missing_and_ends_in_the_table(made):
    out, printed = made
    for name in NAMES:
        rows = rows_of(out / f"{name}.jsonl")
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        assert name in ("reward", "ppo") or rows[-1]["valid_loss"] < rows[0]["valid_loss"] - 0.1  # it learns
        assert torch.load(out / f"{name}.pt")["finished"]
    assert (out / "table.json").exists() and "numbers above mean nothing" in printed


def test_ppo_log_has_every_number_and_its_first_ratio_is_one(made):
    """J11, in the product: the first minibatch of every iteration. J26: kl is 0 before the first update, when
    the policy is the reference."""
    rows = rows_of(made[0] / "ppo.jsonl")
    wanted = "score kl kl3 entropy clipfrac first_ratio eot_rate length ptx_loss gold "
    wanted += "seconds_generate seconds_score seconds_update tokens_s memory_gb"
    for row in rows:
        assert row.keys() >= set(wanted.split()) and abs(row["first_ratio"] - 1) < 1e-5
    assert rows[0]["kl"] == rows[0]["kl3"] == 0


def test_gold_takes_the_place_of_the_reward_model(made, tmp_path):
    flags = ("--reward=gold", "--episodes=64", f"--out={tmp_path}", f"--from={made[0]}")
    ppo.train(configure("ppo", *flags))
    golden, normal = rows_of(tmp_path / "ppo.jsonl"), rows_of(made[0] / "ppo.jsonl")
    assert all(row["score"] == row["gold"] for row in golden) and normal[0]["score"] != normal[0]["gold"]
    assert golden[0]["gold"] == normal[0]["gold"]  # the same policy, prompts and luck


def test_shared_flags_reach_every_stage_but_none_that_from_has_is_made_again(chain, tmp_path, monkeypatch):
    """The other flags of an earlier stage are at the defaults of its own scale, --log_every and --fresh too."""
    seen = {}
    for name, module in STAGES.items():
        part = "train" if name == "ppo" else "main"
        monkeypatch.setattr(module, part, lambda config, name=name: seen.update({name: config}))
    flags = f"--out={tmp_path} --max_new_tokens=9 --block_size=99 --document_length=33 --seed=5".split()
    ppo.main(configure("ppo", *flags, "--log_every=3", "--fresh"))
    own = dict(sft=(), reward=(), ppo=("--log_every=3", "--fresh"), eval=("--log_every=3", "--fresh"))
    assert seen == {name: configure(name, *flags, *own[name]) for name in STAGES}
    seen.clear()
    ppo.main(configure("ppo", *flags, f"--from={chain}", "--fresh"))
    assert list(seen) == ["ppo", "eval"]


# -- stopping and going on -----------------------------------------------------------------------------------


class Killed(BaseException):
    """As kill -9, but that what stands behind `finally` still runs."""


def run_to(line, function, *arguments):
    """Call the function, and kill it when it comes to this line of the stages' code, counted as they come; -1:
    let it live -> how many lines it came to."""
    count, files = 0, {module.__file__ for module in (sft, reward, ppo)}

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename in files:
            count += event == "line"
            if count == line:
                raise Killed
            return trace

    sys.settrace(trace)
    with contextlib.suppress(Killed):
        function(*arguments)
    sys.settrace(None)
    return count


SMALL = dict(
    sft=("--from=", "--base_steps=4", "--sft_epochs=2", "--ppo_init_epochs=1", "--n_layer=1"),
    reward=("--epochs=2",),
    comparisons=("--data=", "--max_new_tokens=6", "--k_max=4"),
    ppo=("--episodes=48", "--rollout_size=16", "--minibatch_size=8", "--max_new_tokens=6"),
)


@pytest.mark.parametrize("stage", SMALL)
def test_killed_at_any_line_and_started_again_gives_the_same_bits(chain, tmp_path, monkeypatch, capsys, stage):
    """All that is in the checkpoints, and the numbers of the logs. Every step is saved."""
    save, name = sft.Run.save, "reward" if stage == "comparisons" else stage
    monkeypatch.setattr(sft.Run, "save", lambda run, **given: [save(run, **given), setattr(run, "due", -1.0)])
    monkeypatch.setattr(reward, "CHUNK", 20)  # of 73 prompts
    for slow in ("World", "make_labelers"):
        monkeypatch.setattr(data, slow, functools.cache(getattr(data, slow)))

    def run(folder):
        flags = (f"--data={chain}", f"--out={folder}", f"--from={chain}", "--log_every=1", "--save_seconds=0")
        config = configure(name, *flags, *SMALL[stage])
        ppo.train(config) if stage == "ppo" else STAGES[name].main(config)

    def contents(folder):
        found = {path.name: torch.load(path) for path in folder.glob("*.pt")}
        for path in folder.glob("*.jsonl"):
            keys = ("step", "loss", "score", "tokens")
            found[path.name] = [[row.get(key) for key in keys] for row in rows_of(path)]
        return found

    lines, whole = run_to(-1, run, tmp_path / "whole"), contents(tmp_path / "whole")
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        run_to(int(share * lines), run, tmp_path / str(share))
        run(tmp_path / str(share))
        assert len(whole) > 1 and same(contents(tmp_path / str(share)), whole)
    assert "going on from step" in capsys.readouterr().out


# -- bad input: one line, exit status 1, nothing overwritten -------------------------------------------------


def test_an_error_is_one_line_on_stderr_and_status_1_but_help_is_none():
    done, help = python("ppo.py", "--bata=0.1"), python("ppo.py", "--help")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--beta" in done.stderr
    assert help.returncode == 0 and "--beta=0.2\n" in help.stdout and "--from=\n" in help.stdout


def refused(stage, *flags):
    return fails(lambda: STAGES[stage].main(configure(stage, *flags)))


@pytest.mark.parametrize("stage, flags, says", [
    ("ppo", "--episodes=2.5", "--episodes=2.5: expected a whole number"),
    ("sft", "--train_on_prompts=maybe", "--train_on_prompts=maybe: expected true or false"),
    ("ppo", "--beta", "--beta needs a value: write --beta=VALUE"),
    ("ppo", "--scale=huge", "--scale=huge is unknown: choose one of tiny, cpu"),
    ("ppo", "--rollout_size=30", "--rollout_size=30 is not a multiple of --minibatch_size=8"),
    ("ppo", "--seed=-1", "--seed=-1: expected a whole number, not below 0"),
    ("ppo", "--lr=nan", "--lr=nan: expected a number above 0"),
    ("ppo", "--beta=inf", "--beta=inf: expected a number, not below 0"),
    ("ppo", "--ema=1.5", "--ema=1.5: expected a number from 0 to 1"),
    ("ppo", "--episodes=0", "--episodes=0: expected a whole number, at least 1"),
    ("ppo", "--episodes=1", "--episodes=1 is less than one rollout of 32"),
    ("sft", "--device=cuda:99", "--device=cuda:99 is not there: use one of "),
    ("sft", "--dtype=float16", "--dtype=float16: expected float32 or bfloat16"),
    ("sft", "--encoding=bytes", "no encoding"),
    ("sft", f"--out={__file__}/out", "cannot write there"),
    ("reward", "--k_min=1", "--k_min=1 --k_max=9: expected 2 or more"),
    ("reward", "--k_max=3", "--k_min=4 --k_max=3: expected 2 or more, and no k_max below k_min"),
    ("reward", "--seed=1", 'sft.pt not found: run "python ppo.py"'),
    ("eval", "--reward=silver", "--reward=silver: expected a .pt or .py file there, or gold"),
    ("eval", "--reward=gold --data=.", "--reward=gold needs the miniature world"),
    ("sft", "--base=no/such.pt", "--base=no/such.pt: expected a .pt file that is there, or GPT-2"),
    ("ppo", "--ppo_init=no/such.pt", "--ppo_init=no/such.pt: expected a .pt file that is there"),
    ("ppo", "--sft=folder", "--sft=folder: expected a .pt file that is there"),  # it would be left unread
    ("sft", "--max_new_tokens=256", "--max_new_tokens=256 leaves no room for a prompt in --block_size=256"),
    ("sft", "--document_length=1", "--document_length=1: expected 2 or more"),
    ("ppo", "--from=no/such", "--from=no/such: expected a folder that is there"),
])
def test_bad_flags(tmp_path, stage, flags, says):
    assert says in refused(stage, f"--out={tmp_path}", *flags.split()) and not list(tmp_path.glob("*.pt"))


def test_test_prompts_that_are_all_too_long_are_told_before_ppo_trains(chain, tmp_path, monkeypatch):
    datasets = data.load(str(chain), "tiny", 1)
    monkeypatch.setattr(data, "load", lambda *_: dict(datasets, test=[dict(prompt="cat " * 99)]))
    flags = (f"--data={chain}", f"--out={tmp_path}", f"--from={chain}", *SMALL["ppo"])
    assert "all 1 prompts exceed 58 tokens" in fails(lambda: ppo.train(configure("ppo", *flags)))


def test_a_model_of_another_start_is_not_taken_for_this_one(made, tmp_path):
    """The flags are the same, but base.pt was trained anew, or what PPO starts from."""
    for name, start in (("sft", "base"), ("ppo", "ppo_init")):
        shutil.copy(made[0] / f"{name}.pt", tmp_path)
        checkpoint = torch.load(made[0] / f"{start}.pt")
        checkpoint["weights"]["transformer.ln_f.bias"] += 0.01
        torch.save(checkpoint, tmp_path / f"{start}.pt")
        said = refused(name, f"--out={tmp_path}", f"--from={made[0]}")
        assert f"{name}.pt was made with other flags (--weights_of_" in said


def test_models_of_two_encodings(made, tmp_path):
    checkpoint = torch.load(made[0] / "reward.pt", weights_only=True)
    checkpoint["tokenizer"]["tokens"][300:302] = reversed(checkpoint["tokenizer"]["tokens"][300:302])
    torch.save(checkpoint, tmp_path / "reward.pt")
    said = refused("ppo", f"--out={tmp_path}", f"--from={made[0]}")
    assert "reward.pt has another encoding than the policy" in said
