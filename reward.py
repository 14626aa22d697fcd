"""
Stage 2: the reward model, from rankings of K responses (InstructGPT, sec. 3.5 and App. C.2).

    loss = - 1 / C(K,2) * sum over pairs (w better than l) of log sigmoid(r(x, y_w) - r(x, y_l))        eq. 1

All pairs of a prompt come from K forward passes and are one element of a batch: they are strongly correlated, and a
model that met them shuffled would meet every response K-1 times. One epoch. At last the head's bias is shifted so
that the demonstrations score 0 on average.

In the world the responses are sampled and ranked here first (out/comparisons.jsonl, the format of --data); with
--data=DIR they are read from DIR/comparisons.jsonl.

Differs from the paper in:
    1. the loss divides by the pairs that are kept when ties are dropped; the paper does not say;
    2. the responses of a prompt come from several sources (COLLECTED below), not from supervised models only: a small
       reward model that never saw a reply to another question gives such replies full marks (README).

    python reward.py                  after python sft.py; 4 minutes on two CPU cores; writes reward.pt
    python reward.py --folds=5        only measures how the model agrees with labelers it did not learn from
"""

import itertools
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from model import ScalarGPT


@dataclass
class Config:
    # where and what
    scale: str = "cpu"  # tiny, cpu, gpu, gpt2
    out: str = "out"
    seed: int = 1
    data: str = ""  # folder of dataset files; '' is the miniature world
    device: str = ""
    encoding: str = "bpe"
    base: str = ""  # '' is out/base.pt
    sft: str = ""  # what the reward model starts from, its last epoch; '' is out/sft.pt

    # collecting comparisons (the world only)
    k_min: int = 4  # responses to a prompt: k_min to k_max, as the paper
    k_max: int = 9
    max_new_tokens: int = 32  # (paper: 1k)

    # optimisation
    epochs: int = 1  # as the paper: more overfit
    batch: int = 10  # prompts a step (paper: 64)
    lr: float = 1e-3  # peak, cosine to 10% (paper: 9e-6)
    grad_clip: float = 1.0
    folds: int = 1  # above 1: labelers in so many groups, train without one, test on it (App. E.2: 5)

    # logging
    log_every: int = 100  # steps
    save_seconds: float = 15.0


SCALES = dict(
    tiny=dict(log_every=5, save_seconds=5.0),
    cpu=dict(),
    gpu=dict(batch=64),
    gpt2=dict(batch=8, lr=9e-6, max_new_tokens=256),
)

# Where the responses to a prompt come from, and how often
COLLECTED = dict(
    sft=0.45,  # the supervised model at temperature 1
    hot=0.1,  # the same at temperature 1.3
    base=0.08,  # the base model, which knows no instructions
    labeler=0.12,  # a demonstration written for this prompt
    other=0.13,  # a good reply to another prompt
    spoiled=0.12,  # a demonstration with a word changed, a part left out, filler or an insult added
)


def ranking_loss(scores, ranks):
    """InstructGPT eq. 1: scores (B, K), ranks (B, K) -> scalar, nats per pair.

    Rank 1 is best; equal ranks are a tie, whose pair is dropped; rank 0 is an empty slot. Mean over a prompt's kept
    pairs, then over the prompts that have any: a prompt with 36 pairs weighs as much as one with 6.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)  # (B, K, K): w, l
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * better  # (B, K, K)
    pairs = better.sum((1, 2))  # (B,)
    per_prompt = losses.sum((1, 2)) / pairs.clamp(min=1)  # (B,)
    return per_prompt.sum() / (pairs > 0).sum().clamp(min=1)


def score(reward_model, tokens, lengths):
    """The scalar at the last real token of each row, which is eot if the response ended: tokens (B, T) -> (B,)."""
    return reward_model(tokens).gather(1, lengths[:, None] - 1).squeeze(1)


def encode_comparisons(tokenizer, rows, block_size):
    """Rows with prompt, responses, ranks -> list of (list of K rows of ids, ranks); sampled ids are taken as they are."""
    groups = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        responses = row.get("tokens") or [tokenizer.encode(r) + [tokenizer.eot] for r in row["responses"]]
        groups.append(([prompt + response for response in responses], row["ranks"]))
    return data.fitting(groups, lambda group: max(map(len, group[0])), block_size, "comparisons")


def comparison_batch(groups, device):
    """Groups -> tokens (N, T) of all responses together, lengths (N,), slots (B, K) into them, ranks (B, K), 0 = empty."""
    tokens, lengths = model.pad([row for rows, _ in groups for row in rows], device)
    K = max(len(ranks) for _, ranks in groups)
    slots, ranks, first = torch.zeros(len(groups), K, dtype=torch.long), torch.zeros(len(groups), K, dtype=torch.long), 0
    for i, (rows, group_ranks) in enumerate(groups):
        slots[i, : len(rows)] = torch.arange(first, first + len(rows))
        ranks[i, : len(rows)] = torch.tensor(group_ranks)
        first += len(rows)
    return tokens, lengths, slots.to(device), ranks.to(device)


@torch.no_grad()
def evaluate(reward_model, groups, device):
    """Loss, accuracy over untied pairs (share ordered as the labeler did), mean and spread of the scores."""
    losses, right, pairs, scores = [], 0, 0, []
    for i in range(0, len(groups), 32):
        tokens, lengths, slots, ranks = comparison_batch(groups[i : i + 32], device)
        s = score(reward_model, tokens, lengths)
        losses.append(float(ranking_loss(s[slots], ranks)))
        scores.append(s)
        better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)
        right += int((better & (s[slots][:, :, None] > s[slots][:, None, :])).sum())
        pairs += int(better.sum())
    scores = torch.cat(scores)
    return dict(valid_loss=sum(losses) / len(losses), accuracy=right / max(1, pairs), score=float(scores.mean()), spread=float(scores.std()))


@torch.no_grad()
def mean_score(reward_model, pairs, device):
    """Mean score of the demonstrations, eot included."""
    total = 0.0
    for i in range(0, len(pairs), 64):
        tokens, lengths = model.pad([prompt + response for prompt, response in pairs[i : i + 64]], device)
        total += float(score(reward_model, tokens, lengths).sum())
    return total / len(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# collecting comparisons


CHUNK = 64  # prompts sampled and labeled together; a killed run goes on from the last whole chunk


def collect(path, tasks, policies, tokenizer, world, labelers, config, device, mixture):
    """Sample K responses to each task from the mixture of sources, have one labeler rank them, write a row to path.

    policies: dict(sft=, base=). Rows: prompt, responses, ranks, labeler, user, category, and per response its source, its
    sampled ids (a text encoded again may fall into other tokens than those that were sampled) and its rating.
    """
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.endswith("\n")]
        rows = rows[: len(rows) // CHUNK * CHUNK] if len(rows) < len(tasks) else rows
    if len(rows) == len(tasks):
        return rows
    rewrite_jsonl(path, rows)
    for first in tqdm(range(len(rows), len(tasks), CHUNK), desc="comparisons", disable=None):
        rng = random.Random(f"{path.rsplit('/')[-1]} {config.seed} {first}")
        generator = model.seed_step(config.seed, first, device)
        chunk = tasks[first : first + CHUNK]
        sources = [rng.choices(list(mixture), mixture.values(), k=rng.randint(config.k_min, config.k_max)) for _ in chunk]
        responses = [[None] * len(s) for s in sources]
        for source, temperature in (("sft", 1.0), ("hot", 1.3), ("base", 1.0)):
            slots = [(i, j) for i, s in enumerate(sources) for j in range(len(s)) if s[j] == source]
            slots.sort(key=lambda slot: len(chunk[slot[0]]["prompt"]))
            policy = policies["base" if source == "base" else "sft"]
            if slots:
                sampled = data.sample(policy, tokenizer, [chunk[i]["prompt"] for i, _ in slots], config.max_new_tokens,
                                      temperature, generator)
                for (i, j), response in zip(slots, sampled):
                    responses[i][j] = response
        for i, task in enumerate(chunk):
            for j, source in enumerate(sources[i]):
                if responses[i][j] is None:
                    text = written(world, source, task, tasks, rng)
                    responses[i][j] = (text, tokenizer.encode(text) + [tokenizer.eot])
            labeler = rng.choice(labelers)
            texts, ids = zip(*responses[i])
            judged = data.label(world, labeler, task, texts, rng)
            rows.append(dict(
                prompt=task["prompt"], responses=texts, ranks=judged["ranks"], labeler=labeler["id"], user=task["user"],
                category=task["category"], sources=sources[i], ratings=judged["ratings"], tokens=ids,
            ))
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[first:])
    return rows


def written(world, source, task, tasks, rng):
    """A response that no model wrote."""
    if source == "labeler":
        return data.imperfect(world, task, rng)
    if source == "spoiled":
        return data.imperfect(world, task, rng, care=0.3)
    same = [other for other in rng.sample(tasks, min(40, len(tasks))) if other["category"] == task["category"]]
    return rng.choice(same if same and rng.random() < 0.6 else tasks)["reply"]


def rewrite_jsonl(path, rows):
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def main(config):
    model.check_values(config)
    device = model.get_device(config.device)
    datasets = data.load(config.data, config.scale, config.seed)
    path = os.path.join(config.out, "reward.pt")
    settings = asdict(config)
    sft, checkpoint = model.load_policy(config.sft or os.path.join(config.out, "sft.pt"), 'run "python sft.py" first, or pass --sft=PATH', device)
    tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])

    # 1. comparisons: read, or sampled and ranked here
    if datasets["comparisons"] is None:
        base, _ = model.load_policy(config.base or os.path.join(config.out, "base.pt"), 'run "python sft.py" first, or pass --base=PATH', device)
        world = data.World()
        labelers, heldout = data.make_labelers(world, config.seed)
        policies = dict(sft=sft, base=base)
        started = time.monotonic()
        file = os.path.join(config.out, "comparisons.jsonl")
        rows = collect(file, datasets["comparison_prompts"], policies, tokenizer, world, labelers, config, device, COLLECTED)
        # for validation: samples of the supervised model only, ranked by labelers who gave no training data
        file = os.path.join(config.out, "comparisons_valid.jsonl")
        rows_valid = collect(file, datasets["valid"], policies, tokenizer, world, heldout, config, device, dict(sft=1.0))
        print(f"{len(rows)} comparisons, {sum(len(r['ranks']) for r in rows)} responses, {time.monotonic() - started:.0f} s")
    else:
        rows, rows_valid = datasets["comparisons"], datasets["comparisons_valid"]
    groups = encode_comparisons(tokenizer, rows, sft.config.block_size)
    groups_valid = encode_comparisons(tokenizer, rows_valid, sft.config.block_size)
    pairs = data.encode_pairs(tokenizer, datasets["demonstrations"], sft.config.block_size)

    # 2. the model starts from the supervised one, its unembedding replaced by a scalar head
    torch.manual_seed(config.seed)
    reward_model = ScalarGPT.from_gpt(sft)
    optimizer = model.adamw(reward_model, config.lr)
    steps = -(-len(groups) // config.batch) * config.epochs
    batches = data.bucketed([len(rows[0]) for rows, _ in groups], config.batch, config.seed, steps)
    begin, checkpoint = 0, model.resume(path, "reward", settings)
    if checkpoint:
        if checkpoint["finished"]:
            print(f"{path} is there and finished")
            return
        reward_model.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        begin = checkpoint["step"]
        print(f"{path}: going on from step {begin}")

    def state(step, finished=False):
        return dict(
            kind="reward", config=asdict(reward_model.config), weights=reward_model.state_dict(), step=step, finished=finished,
            optimizer=optimizer.state_dict(), settings=settings, tokenizer=tokenizer.state(),
        )

    log = model.Log(path.replace(".pt", ".jsonl"), begin)
    started, seen = time.monotonic(), 0
    if begin == 0:
        log.write(dict(step=0, **evaluate(reward_model, groups_valid, device)))
    with model.Saver(path, config.save_seconds) as saver, tqdm(total=len(batches), initial=begin, disable=None) as bar:
        for step in range(begin + 1, len(batches) + 1):
            # 3. K forwards for each prompt of the batch, all its pairs in the loss
            tokens, lengths, slots, ranks = comparison_batch([groups[i] for i in batches[step - 1]], device)
            with model.autocast(device):
                scores = score(reward_model, tokens, lengths)  # (N,)
            loss = ranking_loss(scores.float()[slots], ranks)
            model.check_finite(loss.item(), step, path)
            loss.backward()
            model.optimizer_step(optimizer, reward_model, config.lr * model.cosine(step, len(batches)), config.grad_clip)
            seen += len(tokens)
            # 4. log and save
            bar.update()
            if step % config.log_every == 0 or step == len(batches):
                seconds = time.monotonic() - started
                log.write(dict(step=step, loss=loss.item(), **evaluate(reward_model, groups_valid, device), seconds=seconds, responses_s=seen / seconds))
            saver.save_if_due(step, lambda: state(step))

    # 5. the bias that makes demonstrations score 0 on average (sec. 3.5): eq. 1 leaves it free, beta's scale and a penalty need it
    with torch.no_grad():
        reward_model.head.bias -= mean_score(reward_model, pairs, device)
    model.save_checkpoint(path, **state(len(batches), finished=True))
    print(f"wrote {path}: {len(batches)} steps, {time.monotonic() - started:.0f} s, peak memory {model.peak_memory_gb():.2f} GB")


if __name__ == "__main__":
    model.run(main, Config, SCALES)
