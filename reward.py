"""
Stage 2: the reward model, from rankings of K responses (InstructGPT, sec. 3.5 and App. C.2).

    loss = - 1 / C(K,2) * sum over pairs (w better than l) of log sigmoid(r(x, y_w) - r(x, y_l))   eq. 1

All pairs of a prompt come from K forward passes and are one element of a batch: they are strongly
correlated, and a model that met them shuffled would meet every response K-1 times. One epoch. At last
the head's bias is shifted so that the demonstrations score 0 on average.

In the world the responses are sampled and ranked here first (out/comparisons.jsonl, the format of
--data); with --data=DIR they are read from DIR/comparisons.jsonl.

Differs from the paper in:
    1. the loss divides by the pairs that are kept when ties are dropped; the paper does not say;
    2. the responses of a prompt come from several sources (COLLECTED below), not from supervised models
       only: a small reward model that never saw a reply to another question gives such replies full
       marks (README).

    python reward.py                  after python sft.py; 3 minutes on two CPU cores; writes reward.pt
    python reward.py --folds=5        only measures agreement with labelers it did not learn from
"""

import json
import math
import os
import random
import time
import zlib
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from model import ScalarGPT, check


@dataclass
class Config:
    # where and what
    scale: str = "cpu"  # tiny, cpu, gpu, gpt2
    out: str = "out"
    seed: int = 1
    data: str = ""  # folder of dataset files; '' is the miniature world
    device: str = ""
    dtype: str = ""  # of activations, float32 or bfloat16; '' is bfloat16 on a GPU
    encoding: str = "bpe"
    base: str = ""  # '' is out/base.pt
    sft: str = ""  # what the reward model starts from, its last epoch; '' is out/sft.pt

    # collecting comparisons (the world only)
    k_min: int = 4  # responses to a prompt: k_min to k_max, as the paper
    k_max: int = 9
    max_new_tokens: int = 28  # (paper: 1k)

    # optimisation
    epochs: int = 1  # as the paper: more overfit
    batch: int = 10  # prompts a step (paper: 64)
    lr: float = 1e-3  # peak, cosine to 10% (paper: 9e-6)
    grad_clip: float = 1.0
    folds: int = 1  # above 1: labelers in so many groups, train without one, test on it (App. E.2: 5)

    # logging
    log_every: int = 200  # steps
    save_seconds: float = 15.0


SCALES = dict(
    tiny=dict(log_every=5, save_seconds=5.0),
    cpu=dict(),
    gpu=dict(batch=64),
    gpt2=dict(batch=8, lr=9e-6, max_new_tokens=256),
)

# Where the responses to a prompt come from, and how often
COLLECTED = dict(
    sft=0.4,  # the supervised model at temperature 1
    hot=0.08,  # the same at temperature 1.3
    base=0.06,  # the base model, which knows no instructions
    labeler=0.14,  # a demonstration written for this prompt
    other=0.12,  # a good reply to another prompt
    # a good reply with one mistake: a word changed, something left out or said twice, an insult, ...
    spoiled=0.2,
)


def ranking_loss(scores, ranks):
    """InstructGPT eq. 1: scores (B, K), ranks (B, K) -> scalar, nats per pair.

    Rank 1 is best; equal ranks are a tie, whose pair is dropped; rank 0 is an empty slot. Mean over a
    prompt's kept pairs, then over the prompts that have any: a prompt with 36 pairs weighs as much as
    one with 6. Without any pair the loss is 0.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)  # (B, K, K): w, l
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * better  # (B, K, K)
    pairs = better.sum((1, 2))  # (B,)
    per_prompt = losses.sum((1, 2)) / pairs.clamp(min=1)  # (B,)
    return per_prompt.sum() / (pairs > 0).sum().clamp(min=1)


def score(reward_model, tokens, lengths):
    """The scalar at the last real token of each row, which is eot if the response ended.

    tokens (B, T), lengths (B,) -> (B,), score units.
    """
    last = torch.arange(tokens.size(1), device=tokens.device) == lengths[:, None] - 1  # (B, T)
    return reward_model(tokens, last)


def score_rows(reward_model, rows, device):
    """N lists of ids -> scores (N,), on rows of similar length at a time (model.microbatches)."""
    pieces = model.microbatches([len(row) for row in rows], device)
    scores = [score(reward_model, *model.pad([rows[i] for i in piece], device)) for piece in pieces]
    return model.in_row_order(scores, pieces)


def encode_comparisons(tokenizer, rows, block_size):
    """Rows with prompt, responses, ranks -> list of (list of K rows of ids, ranks).

    Sampled ids ("tokens") are taken as they are. Groups longer than the context are dropped and
    counted; raises SystemExit if none is left.
    """
    groups = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        responses = row.get("tokens") or [
            tokenizer.encode(r) + [tokenizer.eot] for r in row["responses"]
        ]
        groups.append(([prompt + response for response in responses], row["ranks"]))
    return data.fitting(groups, lambda group: max(map(len, group[0])), block_size, "comparisons")


def score_groups(reward_model, groups, device):
    """B groups of K rows -> scores (B, K) of all responses, ranks (B, K), 0 in empty slots."""
    scores = score_rows(reward_model, [row for rows, _ in groups for row in rows], device).float()
    per_prompt = scores.split([len(ranks) for _, ranks in groups])
    ranks = [torch.tensor(ranks, device=device) for _, ranks in groups]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(per_prompt, batch_first=True), pad(ranks, batch_first=True)


@torch.no_grad()
def evaluate(reward_model, groups, device):
    """-> dict of valid_loss, nats per pair as ranking_loss averages, and accuracy, the share of untied
    pairs ordered as the labeler did."""
    loss, prompts, right, pairs = 0.0, 0, 0, 0
    for i in range(0, len(groups), 32):
        scores, ranks = score_groups(reward_model, groups[i : i + 32], device)  # (B, K)
        better = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)  # (B, K, K)
        untied = int(better.any(2).any(1).sum())  # the prompts that ranking_loss averages over
        loss += float(ranking_loss(scores, ranks)) * untied
        prompts += untied
        right += int((better & (scores[:, :, None] > scores[:, None, :])).sum())
        pairs += int(better.sum())
    return dict(valid_loss=loss / max(1, prompts), accuracy=right / max(1, pairs))


@torch.no_grad()
def mean_score(reward_model, pairs, device):
    """Mean score of the demonstrations, pairs of (prompt ids, response ids with eot) -> float."""
    rows = [prompt + response for prompt, response in pairs]
    pieces = [score_rows(reward_model, rows[i : i + 256], device) for i in range(0, len(rows), 256)]
    return float(torch.cat(pieces).mean())


def train_step(reward_model, optimizer, batch, lr, config, device):
    """One optimizer step on a batch of groups: K forwards for each, all its pairs in the loss -> loss.

    If that is not finite, no step is made.
    """
    with model.autocast(device, config.dtype):
        scores, ranks = score_groups(reward_model, batch, device)  # (B, K)
    loss = ranking_loss(scores, ranks)
    if math.isfinite(loss.item()):  # else the caller stops, with the last good weights untouched
        loss.backward()
        model.optimizer_step(optimizer, reward_model, lr, config.grad_clip)
    return loss.item()


def cross_validate(sft, groups, rows, config, device):
    """Do reward models generalise to labelers they did not learn from? (InstructGPT, sec. 4.1, App.
    E.2: 69.6% against 72.4% on their own)

    Labelers are dealt into config.folds groups; a model learns from all but one, and is tested on that
    one and, with prompts it has not seen, on its own. Prints both accuracies for each fold -> list of
    (accuracy on its own labelers, on the others). Raises SystemExit if there are fewer labelers than
    folds.
    """
    names = sorted({row.get("labeler") for row in rows} - {None})
    check(
        len(names) >= config.folds,
        f"--folds={config.folds}: the comparisons name {len(names)} labelers, fewer than that",
    )
    check(
        len(rows) == len(groups),
        "some comparisons are longer than the context: remove them for --folds",
    )
    fold_of = {name: i % config.folds for i, name in enumerate(names)}
    results = []
    for fold in range(config.folds):
        mine = [i for i, row in enumerate(rows) if fold_of.get(row.get("labeler")) != fold]
        train, own = [groups[i] for i in mine if i % 10], [groups[i] for i in mine if i % 10 == 0]
        others = [groups[i] for i, row in enumerate(rows) if fold_of.get(row.get("labeler")) == fold]
        torch.manual_seed(config.seed)
        reward_model = ScalarGPT.from_gpt(sft)
        optimizer = model.adamw(reward_model, config.lr)
        batches = data.bucketed([len(rows[0]) for rows, _ in train], config.batch, config.seed)
        for step, batch in enumerate(tqdm(batches, desc=f"fold {fold + 1}", disable=None)):
            train_step(
                reward_model, optimizer, [train[i] for i in batch],
                config.lr * model.cosine(step, len(batches)), config, device,
            )
        accuracies = [evaluate(reward_model, part, device)["accuracy"] for part in (own, others)]
        results.append(accuracies)
        print(
            f"fold {fold + 1}: accuracy on its own labelers {accuracies[0]:.3f}, "
            f"on those it did not learn from {accuracies[1]:.3f}",
            flush=True,
        )
    return results


# --------------------------------------------------------------------------------------------------
# collecting comparisons


CHUNK = 256  # prompts sampled and labeled together; a killed run goes on from the last whole chunk


def collect(path, tasks, policies, tokenizer, world, labelers, config, device, mixture):
    """Sample K responses to each task from the mixture of sources; one labeler ranks them -> rows.

    policies: dict(sft=, base=); mixture: {source: weight}. Rows, returned and appended to path: prompt,
    responses, ranks, labeler, user, category, and per response its source, its rating and its sampled
    ids (a text encoded again may fall into other tokens than those that were sampled).
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
        sources = [
            rng.choices(list(mixture), mixture.values(), k=rng.randint(config.k_min, config.k_max))
            for _ in chunk
        ]
        responses = [[None] * len(s) for s in sources]
        for source, temperature in (("sft", 1.0), ("hot", 1.3), ("base", 1.0)):
            slots = [(i, j) for i, s in enumerate(sources) for j in range(len(s)) if s[j] == source]
            slots.sort(key=lambda slot: len(chunk[slot[0]]["prompt"]))
            policy = policies["base" if source == "base" else "sft"]
            if slots:
                sampled = data.sample(
                    policy, tokenizer, [chunk[i]["prompt"] for i, _ in slots], config.max_new_tokens,
                    temperature, generator,
                )
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
                prompt=task["prompt"], responses=texts, ranks=judged["ranks"], labeler=labeler["id"],
                user=task["user"], category=task["category"],
                sources=sources[i], ratings=judged["ratings"], tokens=ids,
            ))
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows[first:])
    return rows


def check_collected(config, policies, mixture):
    """Write beside the comparisons what they are collected with, out/comparisons.json.

    Raises SystemExit if comparisons are there that were collected with something else; some without
    such a file, made before there was one, are taken as they are.
    """
    names = ("k_min", "k_max", "max_new_tokens", "seed", "scale")
    now = {f"--{name}": getattr(config, name) for name in names} | dict(mixture=mixture)
    for name, policy in policies.items():
        checksum = 0
        for weight in policy.state_dict().values():
            checksum = zlib.crc32(weight.cpu().numpy().tobytes(), checksum)
        now[f"weights of {name}"] = checksum
    path = os.path.join(config.out, "comparisons.json")
    files = [os.path.join(config.out, f"comparisons{part}.jsonl") for part in ("", "_valid")]
    collected = [file for file in files if os.path.exists(file)]
    if collected and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            there = json.load(file)
        differ = [f"{k}: {there.get(k)} there, {now[k]} now" for k in now if there.get(k) != now[k]]
        check(
            not differ,
            f"{' and '.join(collected)}: collected with other settings ({'; '.join(differ)}): "
            "delete them or choose another --out",
        )
    elif not collected:
        rewrite_jsonl(path, [now])


def written(world, source, task, tasks, rng):
    """A response that no model wrote -> text."""
    if source == "labeler":
        return data.imperfect(world, task, rng)
    if source == "spoiled":
        return data.spoiled(world, task, rng)
    others = rng.sample(tasks, min(40, len(tasks)))
    same = [other for other in others if other["category"] == task["category"]]
    return rng.choice(same if same and rng.random() < 0.6 else tasks)["reply"]


def rewrite_jsonl(path, rows):
    """Write rows to a temporary name, then rename."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def main(config):
    """Collect the comparisons if there are none, then make reward.pt in config.out or go on with it."""
    model.check_values(config)
    check(config.k_min >= 2, f"--k_min={config.k_min}: a comparison needs at least 2 responses")
    check(
        config.k_max >= config.k_min,
        f"--k_max={config.k_max} is below --k_min={config.k_min}: raise it",
    )
    device = model.get_device(config.device)
    path = os.path.join(config.out, "reward.pt")
    checkpoint = model.resume(path, "reward", asdict(config)) if config.folds == 1 else None
    if checkpoint and checkpoint["finished"]:
        print(f"{path} is there and finished")
        return
    datasets = data.load(config.data, config.scale, config.seed)
    sft, checkpoint = model.load_policy(
        config.sft or os.path.join(config.out, "sft.pt"),
        'run "python sft.py" first, or pass --sft=PATH',
        device,
    )
    tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
    if tokenizer.name != config.encoding:
        print(f"--encoding={config.encoding} is not used: the supervised model has {tokenizer.name}")

    # 1. comparisons: read, or sampled and ranked here
    if datasets["comparisons"] is None:
        base, _ = model.load_policy(
            config.base or os.path.join(config.out, "base.pt"),
            'run "python sft.py" first, or pass --base=PATH',
            device,
        )
        world = data.World()
        labelers, heldout = data.make_labelers(world, config.seed)
        policies = dict(sft=sft, base=base)
        check_collected(config, policies, COLLECTED)
        limit = min(p.config.block_size for p in policies.values()) - config.max_new_tokens
        for name in ("comparison_prompts", "valid"):  # those that leave no room for a response go
            datasets[name] = data.fitting(
                datasets[name], lambda task: len(tokenizer.encode(task["prompt"])), limit, "prompts"
            )
        started = time.monotonic()
        file = os.path.join(config.out, "comparisons.jsonl")
        rows = collect(
            file, datasets["comparison_prompts"], policies, tokenizer, world, labelers, config, device,
            COLLECTED,
        )
        # for validation: samples of the supervised model only, ranked by labelers who gave no
        # training data
        file = os.path.join(config.out, "comparisons_valid.jsonl")
        rows_valid = collect(
            file, datasets["valid"], policies, tokenizer, world, heldout, config, device, dict(sft=1.0)
        )
        responses, seconds = sum(len(row["ranks"]) for row in rows), time.monotonic() - started
        print(f"{len(rows)} comparisons, {responses} responses, {seconds:.0f} s")
    else:
        rows, rows_valid = datasets["comparisons"], datasets["comparisons_valid"]
    groups = encode_comparisons(tokenizer, rows, sft.config.block_size)
    groups_valid = encode_comparisons(tokenizer, rows_valid, sft.config.block_size)
    pairs = data.encode_pairs(tokenizer, datasets["demonstrations"], sft.config.block_size)

    if config.folds > 1:
        folds = cross_validate(sft, groups, rows, config, device)
        own, others = (sum(column) / len(folds) for column in zip(*folds))
        print(f"mean: {own:.3f} and {others:.3f}")
        with open(os.path.join(config.out, "folds.json"), "w") as file:
            json.dump(dict(own=own, others=others, folds=folds), file)
        return
    train(config, sft, tokenizer, groups, groups_valid, pairs)


def train(config, sft, tokenizer, groups, groups_valid, pairs):
    """Make reward.pt in config.out from comparisons, or go on with it. sft: the GPT it starts from;
    groups, groups_valid: of encode_comparisons; pairs: the demonstrations, which score 0 at last."""
    device = model.get_device(config.device)
    path, settings = os.path.join(config.out, "reward.pt"), asdict(config)

    # 2. the model starts from the supervised one, its unembedding replaced by a scalar head
    torch.manual_seed(config.seed)
    reward_model = ScalarGPT.from_gpt(sft)
    optimizer = model.adamw(reward_model, config.lr)
    checkpoint = model.resume(path, "reward", settings)
    begin = checkpoint["step"] if checkpoint else 0
    if checkpoint and checkpoint["finished"]:
        print(f"{path} is there and finished")
        return
    if begin:
        reward_model.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        print(f"{path}: going on from step {begin}")

    def state(step, finished=False):
        return dict(
            kind="reward", config=asdict(reward_model.config), weights=reward_model.state_dict(),
            step=step, finished=finished, optimizer=optimizer.state_dict(), settings=settings,
            tokenizer=tokenizer.state(),
        )

    steps = -(-len(groups) // config.batch) * config.epochs
    batches = data.bucketed([len(rows[0]) for rows, _ in groups], config.batch, config.seed, steps)
    log = model.Log(path.replace(".pt", ".jsonl"), begin)
    started, seen = time.monotonic(), 0
    if begin == 0:
        log.write(dict(step=0, **evaluate(reward_model, groups_valid, device)))
    with (
        model.Saver(path, config.save_seconds) as saver,
        tqdm(total=steps, initial=begin, disable=None) as bar,
    ):
        for step in range(begin + 1, steps + 1):
            # 3. K forwards for each prompt of the batch, all its pairs in the loss, one step
            batch = [groups[i] for i in batches[step - 1]]
            loss = train_step(
                reward_model, optimizer, batch, config.lr * model.cosine(step, steps), config, device
            )
            model.check_finite(loss, step, path)
            seen += sum(len(group_ranks) for _, group_ranks in batch)
            # 4. log and save
            bar.update()
            if step % config.log_every == 0 or step == steps:
                seconds = time.monotonic() - started
                numbers = dict(step=step, loss=loss, **evaluate(reward_model, groups_valid, device))
                numbers.update(seconds=seconds, responses_s=seen / seconds)
                log.write(dict(**numbers, memory_gb=model.peak_memory_gb()))
            saver.save_if_due(step, lambda: state(step))

    # 5. the bias that makes demonstrations score 0 on average (sec. 3.5): eq. 1 leaves it free,
    # beta's scale and a penalty need it
    with torch.no_grad():
        reward_model.head.bias -= mean_score(reward_model, pairs, device)
    model.save_checkpoint(path, **state(steps, finished=True))
    seconds = time.monotonic() - started
    print(f"wrote {path}: {steps} steps, {seconds:.0f} s, peak memory {model.peak_memory_gb():.2f} GB")


if __name__ == "__main__":
    model.run(main, Config, SCALES)
