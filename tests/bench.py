"""
Benchmarks: how fast is this, beside transformers and TRL? Not a test: nothing here passes or fails.

    python tests/bench.py                            everything; 35 minutes
    python tests/bench.py generation ppo --sizes=A   some of it
    python tests/bench.py ppo --dtype=bfloat16       all contestants in bfloat16

Ours and the peers that are installed (pip install transformers==5.23.0 trl==1.12.0) take turns, each in
a process of its own on one thread (--threads): untrained networks of equal shape on random tokens. A
figure is the median of five turns, a ratio the median of the five turns' ratios. All rows have one
length and none ends early: what we save on real text by not computing padding is not in it. The share
of peak is our arithmetic / time / the speed of a large matmul on this machine; it counts logits where
they are read, the last block everywhere. Memory is the peak of the process, libraries included.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import model
import ppo
import reward
import sft
from model import GPT, GPTConfig, ScalarGPT

SIZES = dict(
    A=GPTConfig(vocab_size=1024, block_size=128, n_layer=4, n_head=4, n_embd=128),
    B=GPTConfig(vocab_size=50257, block_size=256, n_layer=6, n_head=6, n_embd=384),
    C=GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),  # GPT-2
)
PROMPT = 32  # tokens, in every benchmark
NEW = 64  # tokens sampled, in generation; RESPONSE elsewhere
RESPONSE = 32
EPISODES, MINIBATCHES = 64, 4  # of PPO
K, GROUPS = 9, 2  # responses to a prompt, prompts a step, of the reward model
SFT_ROWS = 16
TURNS = 5


def times(step, count):
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def forward_flops(config, tokens, logits):
    """Multiplications and additions of the matmuls of one row's forward: all tokens through the blocks,
    each attending half of them on average, and logits at `logits` positions."""
    C = config.n_embd
    return tokens * config.n_layer * (24 * C * C + 2 * C * tokens) + logits * 2 * C * config.vocab_size


def decode_flops(config, new):
    """The same for `new` tokens one by one behind a prompt of PROMPT."""
    C, attended = config.n_embd, PROMPT + new / 2
    return new * (config.n_layer * (24 * C * C + 4 * C * attended) + 2 * C * config.vocab_size)


# --------------------------------------------------------------------------------------------------
# generation: prompts of PROMPT tokens, NEW tokens each


def generation_rows(config):
    return 8 if config is SIZES["C"] else 64


def generation_work(config):
    """-> unit, items of a step, arithmetic of ours: a prefill with the last logits only, then one token
    at a time."""
    rows, prefill = generation_rows(config), forward_flops(config, PROMPT, 1)
    return "new tokens", rows * NEW, rows * (prefill + decode_flops(config, NEW))


def generation_ours(config, device, dtype):
    gpt = GPT(config).to(device).eval()
    prompts = random_rows(config, generation_rows(config), PROMPT)
    generator = torch.Generator(device).manual_seed(0)

    def step():
        with sft.autocast(torch.device(device), dtype):
            model.generate(gpt, prompts, NEW, 1.0, None, generator)

    return lambda: times(step, 1)


def generation_without_cache(config, device, dtype):
    """As nanoGPT does it: all tokens again for every new one, logits of the last, multinomial."""
    gpt = GPT(config).to(device).eval()
    prompts = torch.tensor(random_rows(config, generation_rows(config), PROMPT), device=device)

    @torch.no_grad()
    def step():
        tokens = prompts
        for _ in range(NEW):
            with sft.autocast(torch.device(device), dtype):
                logits = gpt.lm_head(gpt.hidden(tokens)[:, -1]).float()
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)

    return lambda: times(step, 1)


def generation_transformers(config, device, dtype):
    theirs = transformers.GPT2LMHeadModel(hf_config(config)).to(device, getattr(torch, dtype)).eval()
    prompts = torch.tensor(random_rows(config, generation_rows(config), PROMPT), device=device)
    sampling = dict(do_sample=True, top_k=0, max_new_tokens=NEW)

    def step():
        theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)

    return lambda: times(step, 1)


# --------------------------------------------------------------------------------------------------
# PPO: one rollout of EPISODES, then one pass in MINIBATCHES steps, without the pretraining term


def ppo_work(config):
    judged = forward_flops(config, PROMPT + RESPONSE, 0)
    scored = forward_flops(config, PROMPT + RESPONSE, RESPONSE)
    sampled = forward_flops(config, PROMPT, 1) + decode_flops(config, RESPONSE)
    # reward and value model judge, policy and reference score; value model and policy are updated
    return "episodes", EPISODES, EPISODES * (sampled + 2 * judged + 2 * scored + 3 * (judged + scored))


def ppo_ours(config, device, dtype):
    settings = ppo.Config(
        rollout_size=EPISODES, minibatch_size=EPISODES // MINIBATCHES, max_new_tokens=RESPONSE,
        ptx_coef=0.0, dtype=dtype,
    )
    policy = GPT(config).to(device).eval()
    reward_model = ScalarGPT.from_gpt(policy).eval()
    ref, value_model, ema = (copy.deepcopy(x) for x in (policy, reward_model, policy))
    ref.requires_grad_(False), reward_model.requires_grad_(False)
    optimizer, value_optimizer = (sft.adamw(x, 1e-5) for x in (policy, value_model))
    judge = reward.model_judge(reward_model)
    prompts = random_rows(config, EPISODES, PROMPT)
    generator = torch.Generator(device).manual_seed(0)
    tokenizer = types.SimpleNamespace(eot=-1)  # which no row ever samples

    def step():
        with sft.autocast(torch.device(device), dtype):
            batch, _ = ppo.rollout(policy, ref, judge, prompts, tokenizer, settings, generator)
            batch.update(ppo.credit(batch, value_model, settings))
        stats = []
        for rows in torch.randperm(EPISODES, device=device).chunk(MINIBATCHES):
            minibatch = {name: x[rows] for name, x in batch.items()}
            stats.append({
                **ppo.update_policy(policy, ema, optimizer, minibatch, None, 1.0, settings),
                **ppo.update_value(value_model, value_optimizer, minibatch, 1.0, settings),
            })
        ppo.measure(batch, stats, 1, settings)

    return lambda: times(step, 2)


def ppo_trl(config, device, dtype):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy = transformers.GPT2LMHeadModel(hf_config(config))
    judges = [transformers.GPT2ForSequenceClassification(hf_config(config, num_labels=1)) for _ in "rv"]
    rows = datasets.Dataset.from_list([
        dict(input_ids=row) for row in random_rows(config, EPISODES, PROMPT)
    ])
    args = PPOConfig(
        per_device_train_batch_size=EPISODES, num_mini_batches=MINIBATCHES, num_ppo_epochs=1,
        total_episodes=3 * EPISODES, response_length=RESPONSE, temperature=1.0,
        num_sample_generations=0, **hf_arguments(dtype),
    )
    trainer = PPOTrainer(
        args, hf_tokenizer(config), policy, copy.deepcopy(policy), judges[0], rows, judges[1],
        eval_dataset=rows, callbacks=[Stopwatch()],
    )
    return lambda: Stopwatch.of(trainer)


# --------------------------------------------------------------------------------------------------
# the reward model: GROUPS prompts a step with K responses, C(K, 2) comparisons each


def reward_work(config):
    forwards = GROUPS * K * forward_flops(config, PROMPT + RESPONSE, 0)
    return "comparisons", GROUPS * K * (K - 1) // 2, 3 * forwards


def random_groups(config):
    rows = random_rows(config, GROUPS * K, PROMPT + RESPONSE)
    return [rows[i * K : (i + 1) * K] for i in range(GROUPS)]


def reward_ours(config, device, dtype):
    network = ScalarGPT.from_gpt(GPT(config).to(device))
    optimizer = sft.adamw(network, 1e-5)
    groups = [(rows, list(range(1, K + 1))) for rows in random_groups(config)]

    def step():
        with sft.autocast(torch.device(device), dtype):
            scores, ranks = reward.score_groups(network, groups, torch.device(device))
        loss = reward.ranking_loss(scores, ranks)
        loss.item()  # a stage looks at each loss
        loss.backward()
        sft.optimizer_step(network, [optimizer], 1.0, 1.0)

    return lambda: times(step, 6)


def reward_trl(config, device, dtype):
    """The same comparisons, one by one: two forwards each."""
    better = [(i, j) for i in range(K) for j in range(i + 1, K)]
    pairs = [
        dict(chosen_ids=rows[i], rejected_ids=rows[j])
        for rows in random_groups(config) for i, j in better
    ]
    args = trl.RewardConfig(
        per_device_train_batch_size=len(pairs), max_steps=4, gradient_checkpointing=False,
        **hf_arguments(dtype),
    )
    trainer = trl.RewardTrainer(
        transformers.GPT2ForSequenceClassification(hf_config(config, num_labels=1)), args,
        train_dataset=datasets.Dataset.from_list(pairs * 4), processing_class=hf_tokenizer(config),
        callbacks=[Stopwatch()],
    )
    return lambda: Stopwatch.of(trainer)


# --------------------------------------------------------------------------------------------------
# SFT: SFT_ROWS demonstrations a step, loss on the responses; the tokens of prompts count as well


def sft_work(config):
    forwards = SFT_ROWS * forward_flops(config, PROMPT + RESPONSE, RESPONSE)
    return "tokens", SFT_ROWS * (PROMPT + RESPONSE), 3 * forwards


def sft_ours(config, device, dtype):
    gpt = GPT(config).to(device).train()
    optimizer = sft.adamw(gpt, 1e-5)
    rows = random_rows(config, SFT_ROWS, PROMPT + RESPONSE)
    pairs = [(row[:PROMPT], row[PROMPT:]) for row in rows]

    def step():
        tokens, mask = (x.to(device) for x in data.demonstration_batch(pairs))
        with sft.autocast(torch.device(device), dtype):
            loss = sft.lm_loss(gpt, tokens, mask)
        loss.item()  # a stage looks at each loss
        loss.backward()
        sft.optimizer_step(gpt, [optimizer], 1.0, 1.0)

    return lambda: times(step, 20)


def sft_trl(config, device, dtype, checkpointing=False):
    args = trl.SFTConfig(
        per_device_train_batch_size=SFT_ROWS, max_steps=20, gradient_checkpointing=checkpointing,
        **hf_arguments(dtype),
    )
    rows = [
        dict(input_ids=row, labels=[-100] * PROMPT + row[PROMPT:])
        for row in random_rows(config, 20 * SFT_ROWS, PROMPT + RESPONSE)
    ]
    trainer = trl.SFTTrainer(
        transformers.GPT2LMHeadModel(hf_config(config)), args,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=hf_tokenizer(config),
        callbacks=[Stopwatch()],
    )
    return lambda: Stopwatch.of(trainer)


def sft_trl_checkpointing(config, device, dtype):
    return sft_trl(config, device, dtype, checkpointing=True)


# name: sizes, work, contestants: each a function of GPTConfig, device, dtype that returns one without
# arguments, which makes some steps and returns the seconds of each
BENCHMARKS = dict(
    generation=("ABC", generation_work, {
        "ours": generation_ours, "transformers": generation_transformers,
        "without a cache": generation_without_cache,
    }),
    ppo=("AB", ppo_work, {"ours": ppo_ours, "TRL": ppo_trl}),
    reward=("A", reward_work, {"ours": reward_ours, "TRL": reward_trl}),
    sft=("A", sft_work, {
        "ours": sft_ours, "TRL": sft_trl, "TRL, with its default checkpointing": sft_trl_checkpointing,
    }),
)


# --------------------------------------------------------------------------------------------------
# the peers


def load_peers():
    """Bind transformers, trl and datasets, or None where they are not installed."""
    global transformers, trl, datasets, Stopwatch
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers = trl = datasets = None
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        import datasets
        import trl

        datasets.disable_progress_bars()
    except ImportError as missing:
        print(f"no {missing.name}: pip install transformers==5.23.0 trl==1.12.0 to compare with it")
        return

    class Stopwatch(transformers.TrainerCallback):
        """The seconds between the ends of a trainer's steps: its loop, logging and data loading, not
        its start."""

        def on_step_end(self, args, state, control, **_):
            self.ends.append(time.perf_counter())

        @classmethod
        def of(cls, trainer):
            watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, cls))
            trainer.remove_callback(transformers.PrinterCallback)
            watch.ends = []
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
            return [b - a for a, b in zip(watch.ends, watch.ends[1:])]

    globals()["Stopwatch"] = Stopwatch


def hf_config(config, **more):
    return transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=config.vocab_size - 1, **more,
    )


def hf_tokenizer(config):
    """Words w0, w1, ...: the trainers ask for one, the data is in ids already."""
    import tokenizers

    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token=f"w{config.vocab_size - 2}",
        pad_token=f"w{config.vocab_size - 1}",
    )


def hf_arguments(dtype):
    return dict(
        output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), bf16=dtype == "bfloat16", logging_steps=10**6,
        learning_rate=1e-5,
    )


def random_rows(config, rows, tokens):
    """Lists of ids, the last two left out: eos and padding of the peers."""
    return torch.randint(config.vocab_size - 2, (rows, tokens)).tolist()


# --------------------------------------------------------------------------------------------------
# measuring


def matmul_peak(device, dtype):
    """Floating-point operations a second of a matmul of 2048 x 2048: best of seven."""
    x = torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype))
    return 2 * 2048**3 / min(times(lambda: x @ x, 7))


class Contestant:
    """One contestant in a process of its own: what it sets or allocates is not the others'."""

    def __init__(self, name, size, who, args):
        flags = [f"--sizes={size}"]
        flags += [f"--{name}={getattr(args, name)}" for name in ("threads", "device", "dtype")]
        # by way of a shell that stays: Linux counts the memory of the parent as a child's peak
        command = shlex.join([sys.executable, __file__, name, *flags, f"--alone={who}"]) + "; exit $?"
        self.process = subprocess.Popen(
            command, shell=True, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.turns = []
        self.turn()  # warm up: thread pools, allocator, kernels
        self.turns.clear()

    def turn(self):
        print("turn", file=self.process.stdin, flush=True)
        self.turns.append(float(self.process.stdout.readline()))

    def memory_gb(self):
        self.process.stdin.close()
        return float(self.process.stdout.readline())


def alone(name, size, who, device, dtype):
    """The other side of Contestant: seconds for every line that comes, then the peak memory."""
    torch.manual_seed(0)
    build = BENCHMARKS[name][2][who]
    run = build(SIZES[size], device, dtype)
    for _ in sys.stdin:
        print(statistics.median(run()), flush=True)
    print(sft.peak_memory_gb())


def compare(name, size, args):
    """Run the contestants of a benchmark in turns -> rows of the table."""
    unit, items, flops = BENCHMARKS[name][1](SIZES[size])
    missing = [peer for peer, there in (("transformers", transformers), ("TRL", trl)) if not there]
    contestants = {
        who: Contestant(name, size, who, args)
        for who in BENCHMARKS[name][2]
        if who == "ours" or (args.only in who and not who.startswith(tuple(missing)))
    }
    peaks = []
    for _ in range(TURNS):
        peaks.append(matmul_peak(args.device, args.dtype))
        for contestant in contestants.values():
            contestant.turn()
    ours = contestants["ours"].turns
    share = flops / statistics.median(ours) / statistics.median(peaks)
    rows = []
    for who, contestant in contestants.items():
        ratios = [theirs / mine for theirs, mine in zip(contestant.turns, ours)]
        rows.append(dict(
            benchmark=name, size=size, dtype=args.dtype, unit=unit, who=who,
            rate=items / statistics.median(contestant.turns), ratio=statistics.median(ratios),
            lowest=min(ratios), highest=max(ratios), share_of_peak=share if who == "ours" else None,
            memory_gb=contestant.memory_gb(),
        ))
    return rows


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}"


def table(rows):
    head = "| | size | ours, a second | share of peak | memory | beside | a second | memory | ours is |"
    lines, bf16 = [head, "|---" * 9 + "|"], ", bf16"
    for row in rows:
        if row["who"] == "ours":
            ours = row
            continue
        cells = [
            row["benchmark"], row["size"] + bf16 * (row["dtype"] == "bfloat16"),
            f"{number(ours['rate'])} {row['unit']}",
            f"{ours['share_of_peak']:.0%}", f"{ours['memory_gb']:.2f} GB", row["who"],
            number(row["rate"]), f"{row['memory_gb']:.2f} GB",
            f"**{row['ratio']:.2f}x** ({row['lowest']:.2f} to {row['highest']:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--sizes", default="ABC", help="letters of A, B, C")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32 or bfloat16, of all; as the stages choose it")
    parser.add_argument("--only", default="", help="peers with this in their name")
    parser.add_argument("--json", default="", help="write the rows there too")
    parser.add_argument("--alone", default="", help="one contestant, asked by the main process")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    torch.set_num_threads(args.threads)
    if args.alone not in ("ours", "without a cache"):
        load_peers()
    if args.alone:
        alone(args.benchmarks[0], args.sizes, args.alone, args.device, args.dtype)
        return
    rows = []
    for name in args.benchmarks or BENCHMARKS:
        for size in sorted(set(args.sizes) & set(BENCHMARKS[name][0])):
            found = compare(name, size, args)
            rate = f"{name} {size}: {number(found[0]['rate'])} {found[0]['unit']} a second"
            print("\n".join(table(found)[2:]) or rate, flush=True)
            rows += found
    print("\n".join(table(rows)))
    packages = [x for x, there in (("transformers", transformers), ("trl", trl)) if there]
    versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ["torch", *packages])
    peak = matmul_peak(args.device, args.dtype) / 1e9
    print(f"{args.threads} thread, {peak:,.0f} GFLOP/s in a large matmul of {args.dtype}; {versions}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
