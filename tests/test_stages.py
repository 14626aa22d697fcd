"""The stages as a user meets them: the whole chain at tiny scale, stopping and going on,
and what bad input gets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import eval
import model
import ppo
import reward
import sft

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES = ("base", "sft", "ppo_init", "reward", "ppo")
STAGES = dict(sft=sft, reward=reward, ppo=ppo, eval=eval)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The folder of one whole tiny run, made by `python ppo.py --scale=tiny`, and what it printed."""
    out = str(tmp_path_factory.mktemp("chain") / "out")
    done = python("ppo.py", f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def python(stage, *flags, **kwargs):
    command = [sys.executable, stage, "--scale=tiny", "--device=cpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def weights(path):
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["finished"]
    return checkpoint["weights"]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------
# the chain


def test_one_command_trains_what_is_missing_and_ends_in_the_table(chain):
    out, printed = chain
    for name in NAMES:
        assert os.path.exists(os.path.join(out, f"{name}.pt"))
        rows = [json.loads(line) for line in open(os.path.join(out, f"{name}.jsonl"))]
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    table = json.load(open(os.path.join(out, "table.json")))["table"]
    models = {(row["model"], row["T"]) for row in table}
    assert models == {("GPT", 1), ("GPT prompted", 1), ("demonstrator", 1)} | {
        (name, T) for name in ("SFT", "PPO init", "PPO-ptx") for T in (0, 1)
    }
    assert "numbers above mean nothing" in printed


def test_ppo_log_has_every_number_and_its_first_ratio_is_one(chain):
    """J11, in the product: the first minibatch of every iteration."""
    rows = [json.loads(line) for line in open(os.path.join(chain[0], "ppo.jsonl"))]
    wanted = {"score", "kl", "kl3", "entropy", "clipfrac", "first_ratio", "explained_variance", "eot_rate",
              "length", "ptx_loss", "gold",
              "seconds_generate", "seconds_score", "seconds_update", "tokens_s", "memory_gb"}
    for row in rows:
        assert wanted <= row.keys()
        assert abs(row["first_ratio"] - 1) < 1e-5
    assert rows[0]["kl"] == 0  # before the first update the policy is the reference


def test_demonstrations_score_zero_on_average(chain):
    """The bias shift before RL, J25."""
    out = chain[0]
    reward_model, checkpoint = model.load_reward(f"{out}/reward.pt", "", "cpu")
    tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
    pairs = data.encode_pairs(tokenizer, data.load("", "tiny", 1)["demonstrations"], 256)
    assert abs(reward.mean_score(reward_model, pairs, "cpu")) < 1e-5


def test_a_finished_stage_is_left_alone(chain):
    before = {name: os.stat(os.path.join(chain[0], f"{name}.pt")).st_mtime_ns for name in NAMES}
    assert python("ppo.py", f"--out={chain[0]}").returncode == 0
    assert before == {name: os.stat(os.path.join(chain[0], f"{name}.pt")).st_mtime_ns for name in NAMES}


# ------------------------------------------------------------------------------------------------------------
# stopping and going on


def stop_and_go_on(stage, out, marker, how, *flags):
    """Start a stage, send it a signal as soon as `marker` is there and a moment has passed,
    start it again to the end."""
    command = [sys.executable, f"{stage}.py", "--scale=tiny", "--device=cpu", f"--out={out}"]
    command += ["--save_seconds=0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not os.path.exists(marker) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.15)
    process.send_signal(how)
    message = process.communicate()[1]
    stopped = process.returncode != 0
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return stopped, message, done.stdout


@pytest.mark.parametrize("stage, marker, makes", [
    ("sft", "base.pt", ("base", "sft", "ppo_init")),
    ("sft", "sft.pt", ("base", "sft", "ppo_init")),
    ("reward", "comparisons.jsonl", ("reward",)),
    ("reward", "reward.jsonl", ("reward",)),
    ("ppo", "ppo.pt", ("ppo",)),
])
def test_killed_and_started_again_gives_the_same_bits(chain, tmp_path, stage, marker, makes):
    """kill -9 at some moment of the stage; the weights then equal those of the run that was never stopped."""
    made_by_sft = ("base", "sft", "ppo_init")
    earlier = dict(sft=(), reward=made_by_sft, ppo=(*made_by_sft, "reward"))[stage]
    for name in earlier:
        shutil.copy(f"{chain[0]}/{name}.pt", tmp_path)
    stopped, _, printed = stop_and_go_on(stage, str(tmp_path), str(tmp_path / marker), signal.SIGKILL)
    assert stopped
    for name in makes:
        assert same_bits(weights(tmp_path / f"{name}.pt"), weights(f"{chain[0]}/{name}.pt"))
        steps = [json.loads(line)["step"] for line in open(tmp_path / f"{name}.jsonl")]
        assert steps == [json.loads(line)["step"] for line in open(f"{chain[0]}/{name}.jsonl")]


def test_ctrl_c_saves_and_says_how_to_go_on(chain, tmp_path):
    stopped, message, printed = stop_and_go_on("sft", str(tmp_path), str(tmp_path / "base.pt"), signal.SIGINT)
    assert stopped
    assert "the same command goes on" in message and message.count("\n") == 1
    assert "going on from step" in printed
    assert same_bits(weights(tmp_path / "base.pt"), weights(f"{chain[0]}/base.pt"))


# ------------------------------------------------------------------------------------------------------------
# bad input: one line, exit status 1, nothing overwritten


def fails(stage, *flags):
    """The message a stage ends with. SystemExit with a text is exit status 1 and that text on stderr."""
    module = STAGES[stage]
    with pytest.raises(SystemExit) as stop:
        config = model.configure(module.Config, module.SCALES, ["--scale=tiny", "--device=cpu", *flags])
        module.main(config)
    message = stop.value.code
    assert isinstance(message, str) and message.count("\n") == 0 and len(message) > 20
    return message


def test_an_error_is_one_line_on_stderr_and_status_1():
    done = python("ppo.py", "--bata=0.1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--beta" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stage, flags, says", [
    ("ppo", ["--learning_rat=1"], "unknown flag"),
    ("ppo", ["--episodes=many"], "expected a whole number"),
    ("ppo", ["--beta"], "needs a value"),
    ("ppo", ["--rollout_size=30"], "not a multiple of --minibatch_size"),
    ("ppo", ["--rollout_size=0"], "expected at least 1"),
    ("ppo", ["--lr=0"], "expected a number above 0"),
    ("ppo", ["--beta=nan"], "expected a finite number"),
    ("ppo", ["--episodes=1"], "less than one rollout"),
    ("ppo", ["--device=tpu"], "use cpu or cuda"),
    ("ppo", ["--scale=huge"], "choose one of"),
    ("sft", ["--encoding=bytes"], "no encoding"),
    ("reward", ["--k_min=1"], "at least 2"),
    ("reward", ["--k_min=5", "--k_max=4"], "--k_max"),
])
def test_bad_flags(tmp_path, stage, flags, says):
    assert says in fails(stage, f"--out={tmp_path}", *flags)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".pt")]


def test_missing_checkpoints_name_the_command(tmp_path):
    assert 'python sft.py' in fails("reward", f"--out={tmp_path}")
    assert "nowhere.pt not found" in fails("ppo", f"--out={tmp_path}", "--ppo_init=nowhere.pt")
    assert "nowhere.pt not found" in fails("sft", f"--out={tmp_path}", "--base=nowhere.pt")


def test_swapped_checkpoints(chain, tmp_path):
    out = chain[0]
    assert "holds a policy, expected a reward model" in fails("ppo", f"--out={out}", f"--reward={out}/sft.pt")
    said = fails("ppo", f"--out={out}", f"--ppo_init={out}/reward.pt")
    assert "holds a reward model, expected a policy" in said


@pytest.mark.parametrize("damage", ["cut short", "foreign", "empty"])
def test_damaged_checkpoints(chain, tmp_path, damage):
    for name in NAMES:
        shutil.copy(f"{chain[0]}/{name}.pt", tmp_path)
    path = tmp_path / "sft.pt"
    contents = {"cut short": path.read_bytes()[:5000], "foreign": b"PK a zip that is none", "empty": b""}
    content = contents[damage]
    path.write_bytes(content)
    assert "is damaged or is not a checkpoint" in fails("ppo", f"--out={tmp_path}")
    assert path.read_bytes() == content


def test_other_flags_are_named_and_the_finished_model_stays(chain):
    before = open(f"{chain[0]}/ppo.pt", "rb").read()
    message = fails("ppo", f"--out={chain[0]}", "--beta=0.3")
    assert f"--beta={ppo.Config.beta} there, 0.3 now" in message and "--out" in message
    assert open(f"{chain[0]}/ppo.pt", "rb").read() == before


@pytest.mark.parametrize("flag", ["--k_min=3", "--max_new_tokens=20", "--sft={out}/ppo_init.pt"])
def test_comparisons_collected_otherwise_are_not_used(chain, tmp_path, flag):
    """Without reward.pt nothing but comparisons.json holds the flags that they were collected with."""
    for name in ("base.pt", "sft.pt", "comparisons.json", "comparisons.jsonl", "comparisons_valid.jsonl"):
        shutil.copy(f"{chain[0]}/{name}", tmp_path)
    message = fails("reward", f"--out={tmp_path}", flag.format(out=chain[0]))
    assert f"{tmp_path}/comparisons.jsonl" in message and "delete them or choose another --out" in message
    assert not os.path.exists(tmp_path / "reward.pt")


def test_models_of_two_encodings(chain, tmp_path):
    for name in NAMES[:4]:
        shutil.copy(f"{chain[0]}/{name}.pt", tmp_path)
    checkpoint = torch.load(tmp_path / "reward.pt", weights_only=True)
    checkpoint["tokenizer"]["tokens"][300:302] = reversed(checkpoint["tokenizer"]["tokens"][300:302])
    torch.save(checkpoint, tmp_path / "reward.pt")
    assert "different encodings" in fails("ppo", f"--out={tmp_path}")


def test_a_folder_that_cannot_be_written(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    assert "cannot write there" in fails("sft", f"--out={blocker}/out")


def test_no_space_left_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "x.pt")
    model.save_checkpoint(path, kind="policy", step=1)

    def full(obj, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="No space left"):
        model.save_checkpoint(path, kind="policy", step=2)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["step"] == 1 and os.listdir(tmp_path) == ["x.pt"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_step(tmp_path):
    message = fails("sft", f"--out={tmp_path}", "--base_lr=1e30", "--save_seconds=0")
    assert "at step" in message and "base.pt" in message
    checkpoint = torch.load(tmp_path / "base.pt", weights_only=True)
    assert all(torch.isfinite(w).all() for w in checkpoint["weights"].values())


def write_folder(folder, **files):
    for name, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"--data={folder}"


GROUP = dict(prompt="say a", responses=["a", "b"], ranks=[1, 2])


@pytest.mark.parametrize("rows, says", [
    ([GROUP, "{not json"], "comparisons.jsonl:2"),
    ([GROUP, dict(GROUP, responses=["a"], ranks=[1])], "comparisons.jsonl:2"),
    ([dict(GROUP, ranks=[1, 1])], "tied"),
    ([], "empty"),
    ([dict(prompt="say a", responses=["a", "b"])], "comparisons.jsonl:1"),
])
def test_bad_data_names_file_and_line(tmp_path, rows, says):
    assert says in fails("sft", f"--out={tmp_path}/out", write_folder(tmp_path, comparisons=rows))


def test_data_that_is_not_utf8(tmp_path):
    (tmp_path / "comparisons.jsonl").write_bytes(json.dumps(GROUP).encode() + b"\n\xff\xfe\n")
    assert "UTF-8" in fails("sft", f"--out={tmp_path}/out", f"--data={tmp_path}")


def test_rows_longer_than_the_context(tmp_path, capsys):
    long = "word " * 400
    flag = write_folder(
        tmp_path, comparisons=[GROUP] * 20, demonstrations=[dict(prompt=long, response="a")] * 12
    )
    message = fails("sft", f"--out={tmp_path}/out", flag)
    assert "longer than 256 tokens" in message and "--block_size" in message
