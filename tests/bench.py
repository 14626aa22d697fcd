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
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
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
PROMPT, RESPONSE = 32, 32  # tokens
NEW = 64  # tokens sampled in generation, in place of RESPONSE
EPISODES, MINIBATCHES = 64, 4  # of PPO
K, GROUPS = 9, 2  # responses to a prompt, prompts a step, of the reward model
SFT_ROWS = 16
TURNS = 5


def times(step, count):
    """Seconds of each of `count` calls."""
    wait, seconds = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None, []
    for _ in range(count):
        wait()
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds


def random_rows(config, rows, tokens):
    """Lists of ids, the last two left out: eos and padding of the peers."""
    return torch.randint(config.vocab_size - 2, (rows, tokens)).tolist()


def generation_rows(config):
    return 8 if config is SIZES["C"] else 64


# --------------------------------------------------------------------------------------------------
# arithmetic


def forward_flops(config, tokens, logits):
    """Multiplications and additions of the matmuls of one row's forward: all tokens through the blocks,
    each attending half of them on average, and logits at `logits` positions."""
    C = config.n_embd
    return tokens * config.n_layer * (24 * C * C + 2 * C * tokens) + logits * 2 * C * config.vocab_size


def sampling_flops(config, new):
    """The same for a prefill with the last logits only, then `new` tokens one by one."""
    C, attended = config.n_embd, PROMPT + new / 2
    one = config.n_layer * (24 * C * C + 4 * C * attended) + 2 * C * config.vocab_size
    return forward_flops(config, PROMPT, 1) + new * one


def work(config):
    """-> {benchmark: unit, items of a step, arithmetic of ours}. A backward costs two forwards."""
    rows, sampled = generation_rows(config), sampling_flops(config, RESPONSE)
    judged, scored = (forward_flops(config, PROMPT + RESPONSE, logits) for logits in (0, RESPONSE))
    # PPO: reward and value model judge, policy and reference score; value model and policy are updated
    episode = sampled + 2 * judged + 2 * scored + 3 * (judged + scored)
    return dict(
        generation=("new tokens", rows * NEW, rows * sampling_flops(config, NEW)),
        ppo=("episodes", EPISODES, EPISODES * episode),
        reward=("comparisons", GROUPS * math.comb(K, 2), 3 * GROUPS * K * judged),
        sft=("tokens", SFT_ROWS * (PROMPT + RESPONSE), 3 * SFT_ROWS * scored),
    )


# --------------------------------------------------------------------------------------------------
# ours: functions of GPTConfig, device, dtype -> one that makes some steps and returns the seconds of each


def generation_ours(config, device, dtype):
    """Prompts of PROMPT tokens, NEW tokens each."""
    gpt = GPT(config).to(device).eval()
    prompts = random_rows(config, generation_rows(config), PROMPT)
    generator = torch.Generator(device).manual_seed(0)
    step = sft.autocast(device, dtype)(lambda: model.generate(gpt, prompts, NEW, 1.0, None, generator))
    return lambda: times(step, 1)


def generation_without_cache(config, device, dtype):
    """As nanoGPT does it: all tokens again for every new one, logits of the last, multinomial."""
    gpt = GPT(config).to(device).eval()
    prompts = torch.tensor(random_rows(config, generation_rows(config), PROMPT), device=device)

    @torch.no_grad()
    def step():
        tokens = prompts
        for _ in range(NEW):
            with sft.autocast(device, dtype):
                logits = gpt.lm_head(gpt.hidden(tokens)[:, -1]).float()
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)

    return lambda: times(step, 1)


def ppo_ours(config, device, dtype):
    """One rollout of EPISODES, then one pass in MINIBATCHES steps, without the pretraining term."""
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
    tokenizer = argparse.Namespace(eot=-1)  # which no row ever samples

    def step():
        with sft.autocast(device, dtype):
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


def optimizer_steps(network, loss_of, device, dtype, count):
    """Steps on a loss, as the stages make them."""
    optimizer = sft.adamw(network, 1e-5)

    def step():
        with sft.autocast(device, dtype):
            loss = loss_of()
        loss.item()  # a stage looks at each loss
        loss.backward()
        sft.optimizer_step(network, [optimizer], 1.0, 1.0)

    return lambda: times(step, count)


def random_groups(config):
    """GROUPS prompts with K responses each, from best to worst."""
    return [random_rows(config, K, PROMPT + RESPONSE) for _ in range(GROUPS)]


def reward_ours(config, device, dtype):
    """C(K, 2) comparisons of a prompt in K forwards."""
    network = ScalarGPT.from_gpt(GPT(config).to(device))
    groups = [(rows, list(range(1, K + 1))) for rows in random_groups(config)]
    loss_of = lambda: reward.ranking_loss(*reward.score_groups(network, groups, device))
    return optimizer_steps(network, loss_of, device, dtype, 6)


def sft_ours(config, device, dtype):
    """SFT_ROWS demonstrations, loss on the responses; the tokens of prompts count as well."""
    gpt = GPT(config).to(device).train()
    pairs = [(row[:PROMPT], row[PROMPT:]) for row in random_rows(config, SFT_ROWS, PROMPT + RESPONSE)]
    loss_of = lambda: sft.lm_loss(gpt, *(x.to(device) for x in data.demonstration_batch(pairs)))
    return optimizer_steps(gpt, loss_of, device, dtype, 20)


# --------------------------------------------------------------------------------------------------
# the peers, in the same form


def load_peers():
    """Bind transformers, trl and datasets: only in the process of a peer, for they take memory."""
    global datasets, tokenizers, transformers, trl
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import transformers

    with contextlib.suppress(ImportError):  # transformers alone can generate
        import datasets
        import tokenizers
        import trl
        import trl.experimental.ppo


def hf_config(config):
    return transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, pad_token_id=config.vocab_size - 1, num_labels=1,
    )


def trl_steps(trl, kind, config, device, dtype, rows, settings, **networks):
    """Steps of a trainer of TRL, each from the end of the one before: with its loop, logging and data
    loading, without its start."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(config.vocab_size)})
    tokenizer = transformers.PreTrainedTokenizerFast(  # it asks for one; the data is in ids
        tokenizer_object=tokenizers.Tokenizer(words), eos_token=f"w{config.vocab_size - 2}",
        pad_token=f"w{config.vocab_size - 1}",
    )
    args = getattr(trl, f"{kind}Config")(
        output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=device.type == "cpu", bf16=dtype == "bfloat16", logging_steps=10**6,
        learning_rate=1e-5, **settings,
    )
    rows, ends = datasets.Dataset.from_list(rows), []

    class Stopwatch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    trainer = getattr(trl, f"{kind}Trainer")(
        args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        callbacks=[Stopwatch()], **networks,
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def run():
        ends.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return [after - before for before, after in itertools.pairwise(ends)]

    return run


def generation_transformers(config, device, dtype):
    theirs = transformers.GPT2LMHeadModel(hf_config(config)).to(device, getattr(torch, dtype)).eval()
    prompts = torch.tensor(random_rows(config, generation_rows(config), PROMPT), device=device)
    sampling = dict(do_sample=True, top_k=0, max_new_tokens=NEW, attention_mask=torch.ones_like(prompts))
    return lambda: times(lambda: theirs.generate(prompts, **sampling), 1)


def ppo_trl(config, device, dtype):
    policy = transformers.GPT2LMHeadModel(hf_config(config))
    judge, critic = (transformers.GPT2ForSequenceClassification(hf_config(config)) for _ in range(2))
    settings = dict(
        per_device_train_batch_size=EPISODES, num_mini_batches=MINIBATCHES, num_ppo_epochs=1,
        total_episodes=3 * EPISODES, response_length=RESPONSE, temperature=1.0, num_sample_generations=0,
    )
    rows = [dict(input_ids=row) for row in random_rows(config, EPISODES, PROMPT)]
    return trl_steps(
        trl.experimental.ppo, "PPO", config, device, dtype, rows, settings,
        model=policy, ref_model=copy.deepcopy(policy), reward_model=judge, value_model=critic,
    )


def reward_trl(config, device, dtype):
    """The same comparisons, one by one: two forwards each."""
    pairs = [pair for rows in random_groups(config) for pair in itertools.combinations(rows, 2)]
    rows = [dict(chosen_ids=better, rejected_ids=worse) for better, worse in pairs]
    settings = dict(per_device_train_batch_size=len(pairs), max_steps=4, gradient_checkpointing=False)
    network = transformers.GPT2ForSequenceClassification(hf_config(config))
    return trl_steps(trl, "Reward", config, device, dtype, rows * 4, settings, model=network)


def sft_trl(config, device, dtype, checkpointing=False):
    settings = dict(per_device_train_batch_size=SFT_ROWS, max_steps=20, gradient_checkpointing=checkpointing)
    rows = random_rows(config, 20 * SFT_ROWS, PROMPT + RESPONSE)
    rows = [dict(input_ids=row, labels=[-100] * PROMPT + row[PROMPT:]) for row in rows]
    network = transformers.GPT2LMHeadModel(hf_config(config))
    return trl_steps(trl, "SFT", config, device, dtype, rows, settings, model=network)


BENCHMARKS = dict(  # name: sizes, contestants
    generation=("ABC", {
        "ours": generation_ours, "transformers": generation_transformers,
        "without a cache": generation_without_cache,
    }),
    ppo=("AB", {"ours": ppo_ours, "TRL": ppo_trl}),
    reward=("A", {"ours": reward_ours, "TRL": reward_trl}),
    sft=("A", {
        "ours": sft_ours, "TRL": sft_trl,
        "TRL, with its default checkpointing": lambda *at: sft_trl(*at, checkpointing=True),
    }),
)
OWN = ("ours", "without a cache")  # need no peer


# --------------------------------------------------------------------------------------------------
# measuring


def matmul_peak(device, dtype):
    """Floating-point operations a second of a matmul of 2048 x 2048: best of seven."""
    x = torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype))
    return 2 * 2048**3 / min(times(lambda: x @ x, 7))


def contestant(name, size, who, args):
    """Yields the median seconds of a step and the peak memory in GB, turn by turn, of one contestant in a
    process of its own: what it sets or allocates is not the others'."""
    flags = [f"--{flag}={getattr(args, flag)}" for flag in ("threads", "device", "dtype")]
    command = [sys.executable, __file__, name, f"--sizes={size}", f"--alone={who}", *flags]
    # by way of a shell that stays: Linux counts the memory of the parent as a child's peak
    shell, pipe = shlex.join(command) + "; exit $?", subprocess.PIPE
    with subprocess.Popen(shell, shell=True, text=True, stdin=pipe, stdout=pipe) as process:
        while True:
            print("turn", file=process.stdin, flush=True)
            yield tuple(map(float, process.stdout.readline().split()))


def alone(args):
    """The other side of contestant: an answer to every line that comes."""
    if args.alone not in OWN:
        load_peers()
    torch.manual_seed(0)
    _, contestants = BENCHMARKS[args.benchmarks[0]]
    run = contestants[args.alone](SIZES[args.sizes], sft.get_device(args.device), args.dtype)
    for _ in sys.stdin:
        print(statistics.median(run()), sft.peak_memory_gb(), flush=True)


def compare(name, size, args, installed):
    """Run the contestants of a benchmark in turns -> rows of the table."""
    unit, items, flops = work(SIZES[size])[name]
    contestants = {
        who: contestant(name, size, who, args)
        for who in BENCHMARKS[name][1]
        if who == "ours" or (args.only in who and who.lower().startswith((*OWN, *installed)))
    }
    turns, peaks = {who: [] for who in contestants}, []
    for _ in range(1 + TURNS):  # the first warms up: thread pools, allocator, kernels
        peaks.append(matmul_peak(args.device, args.dtype))
        for who, turn in contestants.items():
            turns[who].append(next(turn))
    rows, median = [], statistics.median
    for who in contestants:
        seconds, ours = ([turn[0] for turn in turns[some][1:]] for some in (who, "ours"))
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours)]
        rows.append(dict(
            benchmark=name, size=size, dtype=args.dtype, unit=unit, who=who,
            rate=items / median(seconds), ratio=median(ratios), lowest=min(ratios), highest=max(ratios),
            share_of_peak=flops / median(ours) / median(peaks[1:]) if who == "ours" else None,
            memory_gb=turns[who][-1][1],
        ))
    return rows


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}"


def table(rows):
    """Rows of compare -> lines of markdown, one for each that is beside ours."""
    head = "| | size | ours, a second | share of peak | memory | beside | a second | memory | ours is |"
    lines = [head, "|---" * 9 + "|"]
    for row in rows:
        if row["who"] == "ours":
            ours = row
            continue
        cells = [
            row["benchmark"], row["size"] + ", bf16" * (row["dtype"] == "bfloat16"),
            f"{number(ours['rate'])} {row['unit']}", f"{ours['share_of_peak']:.0%}",
            f"{ours['memory_gb']:.2f} GB", row["who"], number(row["rate"]), f"{row['memory_gb']:.2f} GB",
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
    if args.alone:
        return alone(args)
    installed = [package for package in ("transformers", "trl") if importlib.util.find_spec(package)]
    if len(installed) < 2:
        print("to compare with both peers: pip install transformers==5.23.0 trl==1.12.0")
    rows = []
    for name in args.benchmarks or BENCHMARKS:
        for size in sorted(set(args.sizes) & set(BENCHMARKS[name][0])):
            found = compare(name, size, args, installed)
            rate = f"{name} {size}: {number(found[0]['rate'])} {found[0]['unit']} a second"
            print("\n".join(table(found)[2:]) or rate, flush=True)
            rows += found
    print("\n".join(table(rows)))
    versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ["torch", *installed])
    peak = matmul_peak(args.device, args.dtype) / 1e9
    print(f"{args.threads} thread, {peak:,.0f} GFLOP/s in a large matmul of {args.dtype}; {versions}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
