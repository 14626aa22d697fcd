"""
Stage 2: the reward model, from rankings of K responses (InstructGPT, sec. 3.5 and App. C.2).

    loss = - 1 / C(K,2) * sum over pairs (w better than l) of log sigmoid(r(x, y_w) - r(x, y_l))   eq. 1

All pairs of a prompt come from K forward passes and are one element of a batch: they are strongly
correlated, and a model that met them shuffled would meet every response K-1 times. At last the head's
bias is shifted so that the demonstrations score 0 on average.

In the world the responses are sampled and ranked here first (out/comparisons.jsonl, the format of
--data); with --data=DIR they are read from DIR/comparisons.jsonl.

Differs from the paper in:
    1. the loss divides by the pairs that are kept when ties are dropped; the paper does not say;
    2. the responses of a prompt come from several sources (COLLECTED below), not from supervised models
       only: a small reward model that never saw a reply to another question gives such replies full
       marks.

    python reward.py                  after python sft.py; 2.5 minutes on two CPU cores; writes reward.pt
    python reward.py label --out=DIR  rank responses yourself, for --data; --demonstrate: write some
    python reward.py agreement FILE FILE      of two labelers who ranked the same responses
"""

import json
import math
import os
import random
import runpy
import shutil
import sys
import textwrap
import time
import traceback
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import data
import model
import sft
from data import Checkpoint, Common, Count, Rate, check
from model import ScalarGPT
from sft import Run


@dataclass
class Config(Common):
    sft: Checkpoint = ""  # what the reward model starts from, its last epoch; '' is sft.pt

    # collecting comparisons (the world only)
    k_min: Count = 4  # responses to a prompt: k_min to k_max, as the paper
    k_max: Count = 9

    # optimisation
    epochs: Count = 2  # (paper: 1, of 33k prompts; more overfit a model with 6B parameters)
    batch: Count = 4  # prompts a step (paper: 64)
    lr: Rate = 5e-4  # peak, cosine to 10% (paper: 9e-6)
    grad_clip: Rate = 1.0


SCALES = dict(tiny=dict(lr=1e-3), cpu=dict(), gpu=dict(batch=64), gpt2=dict(batch=8, lr=9e-6))


def ranking_loss(scores, ranks):
    """InstructGPT eq. 1: scores (B, K), ranks (B, K) -> scalar, nats per pair.

    Rank 1 is best; equal ranks are a tie, whose pair is dropped; rank 0 is an empty slot. Mean over a
    prompt's kept pairs, then over the prompts that have any: a prompt with 36 pairs weighs as much as
    one with 6. Without any pair the loss is 0. A model that cannot tell the responses apart stays at
    ln 2 = 0.693.
    """
    better = pairs_of(ranks)
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * better  # (B, K, K)
    pairs = better.sum((1, 2))  # (B,)
    per_prompt = losses.sum((1, 2)) / pairs.clamp(min=1)  # (B,)
    return per_prompt.sum() / (pairs > 0).sum().clamp(min=1)


def pairs_of(ranks):
    """ranks (B, K) -> (B, K, K) bool: True at [:, w, l] where response w is ranked above response l."""
    return (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)


def score(reward_model, tokens, lengths):
    """The scalar at the last real token of each row, which is eot if the response ended: tokens (B, T),
    lengths (B,) -> (B,), score units. Computed on rows of similar length at a time."""
    last = model.response_mask(lengths - 1, lengths, tokens.size(1))  # (B, T-1)
    read = lambda network, tokens, mask: network(tokens, where=F.pad(mask, (1, 0)))  # after the action
    return model.by_length(read, reward_model, tokens, last).sum(1)


def score_groups(reward_model, groups, device):
    """B groups of K rows -> scores (B, K) of all responses, ranks (B, K), 0 in empty slots."""
    tokens, lengths = model.pad([row for rows, _ in groups for row in rows], device)
    ranks, counts = model.pad([ranks for _, ranks in groups], device)  # (B, K), (B,)
    scores = score(reward_model, tokens, lengths).split(counts.tolist())
    return torch.nn.utils.rnn.pad_sequence(scores, batch_first=True), ranks


@torch.no_grad()
def evaluate(reward_model, groups, device):
    """-> dict of valid_loss, nats per pair as ranking_loss averages, and accuracy, the share of untied
    pairs ordered as the labeler did."""
    scores, ranks = score_groups(reward_model, groups, device)  # (B, K)
    better = pairs_of(ranks)
    right = better & (scores[:, :, None] > scores[:, None, :])
    accuracy = int(right.sum()) / max(1, int(better.sum()))
    return dict(valid_loss=float(ranking_loss(scores, ranks)), accuracy=accuracy)


@torch.no_grad()
def shift_to_demonstrations(reward_model, pairs, device):
    """Demonstrations, pairs of (prompt ids, response ids), score 0 on average from now on (sec. 3.5):
    eq. 1 leaves a constant free, but beta's scale and a penalty need it. It is the head's bias, so that
    the value model inherits it."""
    tokens, lengths = model.pad([prompt + response for prompt, response in pairs], device)
    reward_model.head.bias -= score(reward_model, tokens, lengths).mean()


def main(config):
    """Collect the comparisons if there are none, then make reward.pt in config.out or go on with it."""
    sft.check_config(config)
    sizes = f"--k_min={config.k_min} --k_max={config.k_max}"
    check(2 <= config.k_min <= config.k_max, f"{sizes}: expected 2 or more, and no k_max below k_min")
    run = Run("reward", "reward", config)
    if run.finished:
        return
    start, tokenizer, _ = sft.load_network("policy", sft.where(config, "sft"), run.device)
    if tokenizer.name != config.encoding:
        print(f"--encoding={config.encoding} is not used: the supervised model has {tokenizer.name}")

    # 1. comparisons: read, or sampled and ranked here
    datasets = data.load(config.data, config.scale, config.seed)
    rows, rows_valid = datasets["comparisons"], datasets["comparisons_valid"]
    if rows is None:
        rows, rows_valid = collect_for_world(config, start, tokenizer, datasets)
    encode = lambda part: data.encode_comparisons(tokenizer, part, start.config.block_size)
    pairs = data.encode_pairs(tokenizer, datasets["demonstrations"], start.config.block_size)
    train(run, start, tokenizer, encode(rows), encode(rows_valid), pairs, config)


def train(run, start, tokenizer, groups, groups_valid, pairs, config):
    """Make reward.pt from comparisons, or go on with it. start: the GPT it starts from; groups,
    groups_valid: of data.encode_comparisons; pairs: the demonstrations, which score 0 at last."""
    # 2. the model starts from the supervised one, its unembedding replaced by a scalar head
    torch.manual_seed(config.seed)
    reward_model = ScalarGPT.from_gpt(start)
    optimizer = sft.adamw(reward_model, config.lr)
    steps = -(-len(groups) // config.batch) * config.epochs
    batches = data.bucketed([len(rows[0]) for rows, _ in groups], config.batch, config.seed, steps)
    run.begin(steps, tokenizer, weights=reward_model, optimizer=optimizer)
    if run.step == 0:
        run.log(**evaluate(reward_model, groups_valid, run.device))
    seen = 0
    for step in run:
        # 3. K forwards for each prompt of the batch, all its pairs in the loss, one step
        batch = [groups[i] for i in batches[step - 1]]
        with sft.autocast(run.device, config.dtype):
            scores, ranks = score_groups(reward_model, batch, run.device)  # (B, K)
        loss = ranking_loss(scores, ranks)
        run.check_finite(loss.item())
        loss.backward()
        sft.optimizer_step(reward_model, [optimizer], sft.cosine(step, steps), config.grad_clip)
        seen += sum(len(ranks) for _, ranks in batch)
        # 4. log
        if step % config.log_every == 0 or step == steps:
            numbers = evaluate(reward_model, groups_valid, run.device)
            run.log(loss=loss.item(), **numbers, responses_s=seen / run.seconds())
    shift_to_demonstrations(reward_model, pairs, run.device)
    run.finish()
    return reward_model.eval()


# ==================================================================================================
# The bar: below it, what judges responses, and where comparisons come from: programs, or people.
# ==================================================================================================


def load_judge(config, tokenizer, rows, device):
    """What scores responses, by --reward -> judge, the reward model or None. judge: a function of
    tokens (B, T), prompt_lengths (B,), lengths (B,) that returns scores (B,). rows: the prompts."""
    if config.reward.endswith(".py"):
        return partial(judge_texts, own_reward(config.reward), tokenizer), None
    path = sft.where(config, "reward")
    reward_model, of_reward, _ = sft.load_network("reward", path, device)
    check(of_reward == tokenizer, f"{path} has another encoding than the policy: train one of them again")
    is_gold = config.reward == "gold"
    return gold_judge(tokenizer, rows) if is_gold else model_judge(reward_model), reward_model


def model_judge(reward_model):
    """A reward model as a judge."""
    return lambda tokens, prompt_lengths, lengths: score(reward_model, tokens, lengths)


def gold_judge(tokenizer, rows):
    """The gold preference of the world as a judge of responses to these prompts."""
    world, tasks = data.World(), {tokenizer.decode(row["ids"]): row for row in rows}
    gold = lambda prompt, text: world.gold(tasks[prompt], text)["gold"]
    golds = lambda prompts, responses: map(gold, prompts, responses)
    return partial(judge_texts, golds, tokenizer)


def judge_texts(function, tokenizer, tokens, prompt_lengths, lengths):
    """function(prompts, responses), lists of texts, -> numbers; with these two given, a judge."""
    rows = list(zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist()))
    prompts = [tokenizer.decode(row[:start]) for row, start, _ in rows]
    texts = [data.response_text(tokenizer, row[:start], row[start:end]) for row, start, end in rows]
    scores = [float(x) for x in function(prompts, texts)]
    check(len(scores) == len(texts), f"reward gave {len(scores)} numbers for {len(texts)} responses")
    bad = [text for text, score in zip(texts, scores) if not math.isfinite(score)]
    check(not bad, f"reward gave nan or inf for {bad[:1]}")
    return torch.tensor(scores, device=tokens.device)


def own_reward(path):
    """The function of --reward=FILE.py: an error of somebody else's code is one line."""
    def called(function, *given):
        try:
            return function(*given)
        except Exception as why:
            lines = [at.lineno for at in traceback.extract_tb(why.__traceback__) if at.filename == path]
            place = f" (line {lines[-1]} of it)" if lines else ""  # none: a SyntaxError, or what it returned
            raise SystemExit(f"{path}: {why!r}{place}") from why

    function = called(runpy.run_path, path).get("reward")
    check(callable(function), f"{path} defines no function reward(prompts, responses)")
    return lambda *texts: called(lambda: list(map(float, function(*texts))))


COLLECTED = dict(  # where the responses to a prompt come from, and how often
    sft=0.4,  # the supervised model at temperature 1
    hot=0.08,  # the same at temperature 1.3
    base=0.06,  # the base model, which knows no instructions
    labeler=0.14,  # a demonstration written for this prompt
    other=0.12,  # a good reply to another prompt
    spoiled=0.2,  # a good reply with one mistake: a word changed, something left out, an insult, ...
)
CHUNK = 256  # prompts sampled and labeled together


def collect_for_world(config, start, tokenizer, datasets):
    """-> rows of comparisons, and of some for validation: samples of the supervised model only, ranked
    by labelers who gave no training data."""
    base, _, _ = sft.load_network("policy", sft.where(config, "base"), sft.get_device(config.device))
    world, policies = data.World(), dict(sft=start, hot=start, base=base)
    labelers, heldout = data.make_labelers(world, config.seed)
    limit, rows = start.config.block_size - config.max_new_tokens, []
    for name, prompts, who, mixture in (
        ("comparisons", "comparison_prompts", labelers, COLLECTED),
        ("comparisons_valid", "valid", heldout, dict(sft=1.0)),
    ):
        tasks = data.encode_prompts(tokenizer, datasets[prompts], limit)
        rows.append(collect(name, tasks, policies, tokenizer, world, who, config, mixture))
    return rows


def collect(name, tasks, policies, tokenizer, world, labelers, config, mixture):
    """Sample K responses to each task from the mixture {source: weight}; one labeler ranks them -> rows
    of prompt, responses, ranks, labeler, user, category, and per response its source, rating and sampled
    ids (a text encoded again may fall into other tokens); they are the log of a run, out/NAME.jsonl."""
    sources = sft.checksum(*(policies[source] for source in mixture if source in policies))
    others = dict(mixture=str(mixture), weights_of_the_sources=sources)  # make other rows
    run = Run(name, "comparisons", config, ignore=("epochs", "batch", "lr", "grad_clip"), **others)
    if run.finished:
        return data.read_jsonl(run.log_path)
    run.begin(-(-len(tasks) // CHUNK))
    for step in run:
        rng = random.Random(f"{name} {config.seed} {step}")
        chunk, rows = tasks[(step - 1) * CHUNK : step * CHUNK], []
        sampled = respond(chunk, tasks, policies, tokenizer, world, config, mixture, rng, run.generator)
        for task, responses in sampled:
            texts, labeler = list(responses), rng.choice(labelers)
            kept, ids = zip(*responses.values())
            judged = data.label(world, labeler, task, texts, rng)
            rows.append(dict(
                step=step, prompt=task["prompt"], responses=texts, ranks=judged["ranks"],
                labeler=labeler["id"], user=task["user"], category=task["category"],
                sources=kept, ratings=judged["ratings"], tokens=ids,
            ))
        run.write(rows)
    run.finish()
    return data.read_jsonl(run.log_path)


def respond(chunk, tasks, policies, tokenizer, world, config, mixture, rng, generator):
    """Yields some of the tasks, a chunk, each with its K responses {text: (source, sampled ids)}: every
    different one once, none empty, for noise would rank equal ones; so fewer, and below 2 no task."""
    count = lambda: rng.randint(config.k_min, config.k_max)
    sources = [rng.choices(list(mixture), mixture.values(), k=count()) for _ in chunk]
    sampled = {}  # by models: (task, place among its sources): (text, ids)
    for source, temperature in (("sft", 1.0), ("hot", 1.3), ("base", 1.0)):
        slots = [(i, j) for i, s in enumerate(sources) for j in range(len(s)) if s[j] == source]
        prompts, length = [chunk[i]["ids"] for i, _ in slots], config.max_new_tokens
        responses = data.sample(policies.get(source), tokenizer, prompts, length, temperature, generator)
        sampled.update(zip(slots, responses))
    for i, task in enumerate(chunk):
        responses = {}
        for j, source in enumerate(sources[i]):
            text, ids = sampled.get((i, j)) or written(world, source, task, tasks, tokenizer, rng)
            responses.pop(text, None)
            if text.strip():
                responses[text] = source, ids
        if len(responses) > 1:
            yield task, responses


def written(world, source, task, tasks, tokenizer, rng):
    """A response that no model wrote -> text, ids."""
    if source in ("labeler", "spoiled"):
        text = (data.imperfect if source == "labeler" else data.spoiled)(world, task, rng)
    else:
        others = rng.sample(tasks, min(40, len(tasks)))
        same = [other for other in others if other["category"] == task["category"]]
        text = rng.choice(same if same and rng.random() < 0.6 else tasks)["reply"]
    return text, tokenizer.encode(text) + [tokenizer.eot]


FIELDS = "fails_to_follow inappropriate hallucination satisfies_constraint sexual violent"
FIELDS += " encourages_harm denigrates harmful_advice opinion moral_judgement"  # of Table 3
FIELDS = dict(zip(map(str, range(1, 12)), FIELDS.split()))  # by the number that is typed


@dataclass
class LabelConfig(Config):
    out: str = "labels"  # the folder of what people write
    from_: str = "out"  # the models; --sft is the one that responds
    prompts: str = ""  # a file of rows with prompt; '' is prompts.jsonl of --data, or the world
    labeler: str = "me"
    demonstrate: bool = False  # write responses in place of ranking some
    fields: bool = False  # ask for a rating of the best response and for Table 3


def parse_ranking(text, count, fields=False):
    """What people write of responses a, b, .. -> dict: "d > c > a = b" has ranks [3, 3, 2, 1]; fields:
    "b > a; 6 2 11" has rating 6 of the best too, and the FIELDS that hold. ValueError for a slip."""
    ranking, _, best = text.lower().partition(";")
    letters = [chr(ord("a") + i) for i in range(count)]
    groups = [[letter.strip() for letter in tied.split("=")] for tied in ranking.split(">")]
    if sorted(sum(groups, [])) != letters:
        raise ValueError(f'"{ranking}": write each of {" ".join(letters)} once, as in b > a = c')
    ranks = {letter: rank for rank, tied in enumerate(groups, 1) for letter in tied}
    rating, *numbers = best.split() or [""]
    if fields and (rating not in list("1234567") or not FIELDS.keys() >= set(numbers)):
        raise ValueError(f'"{best}": rate the best 1 to 7, then what holds for it, as in b > a; 6 2 11')
    more = dict(rating=int(rating), fields=[FIELDS[number] for number in numbers]) if fields else {}
    return dict(ranks=[ranks[letter] for letter in letters], **more)


def ask(head, row, fields):
    """Show a row, ask for the ranking of its responses, or if it has none for a response; a slip gets
    one line and the question again -> what to add to the row; or s, u or q, as typed."""
    responses, started = row.get("responses", []), time.monotonic()
    show(head, row["prompt"])
    for i, response in enumerate(responses):
        show(f"  {chr(ord('a') + i)}  ", response)
    if fields:
        show("     ", "  ".join(map(" ".join, FIELDS.items())))
    while True:
        try:
            text = input("\nranking:\n" if responses else "\nresponse:\n").strip()
            if text in ("s", "u", "q"):
                return text
            answer = parse_ranking(text, len(responses), fields) if responses else dict(response=text)
            if text:
                return dict(answer, seconds=round(time.monotonic() - started, 1))
        except ValueError as slip:
            print(slip)
        except (EOFError, KeyboardInterrupt):
            return "q"


def show(head, text):
    """Prints a text of any lines behind a head, in the width of the terminal; 80 in a pipe."""
    width = shutil.get_terminal_size().columns - len(head)
    lines = [textwrap.wrap(line, width) or [""] for line in text.expandtabs(4).splitlines()]
    print(head + f"\n{' ' * len(head)}".join(sum(lines, [])))


def label(config):
    """Ask a person for rankings, into comparisons.jsonl in --out, or with --demonstrate for responses,
    into demonstrations.jsonl. Goes on behind the last row of this labeler."""
    sft.check_config(config)
    name = "demonstrations" if config.demonstrate else "comparisons"
    path, device = os.path.join(config.out, f"{name}.jsonl"), sft.get_device(config.device)
    for other in (f"{path}.gz", f"{config.out}/{name}.pt"):  # --data reads it instead; of a run
        check(not os.path.exists(other), f"{other} is there: choose another --out for what people write")
    sys.stdin.reconfigure(errors="replace")  # bytes that are no text
    # 1. prompts, and who responds: in the world as in training, elsewhere the model alone
    given = config.prompts or config.data and os.path.join(config.data, "prompts.jsonl")
    of_world = lambda: data.load("", config.scale, config.seed)["comparison_prompts"]
    tasks = data.read_jsonl(given, "prompt") if given else of_world()
    tasks = list({task["prompt"]: task for task in tasks}.values())  # the world repeats some
    if not config.demonstrate:
        load = lambda name: sft.load_network("policy", sft.where(config, name), device)
        (policy, tokenizer, _), model_path, world = load("sft"), sft.where(config, "sft"), data.World()
        policies = dict(sft=policy, hot=policy, base=policy if given else load("base")[0])
        mixture = {source: COLLECTED[source] for source in ("sft", "hot")} if given else COLLECTED
        tasks = data.encode_prompts(tokenizer, tasks, policy.config.block_size - config.max_new_tokens)
    # 2. go on behind the last row
    is_mine = lambda row: row.get("labeler") == config.labeler
    so_far = lambda: data.read_jsonl(path, "prompt") if os.path.exists(path) else []
    places = {task["prompt"]: i for i, task in enumerate(tasks)}
    place = max((places.get(row["prompt"], -1) + 1 for row in filter(is_mine, so_far())), default=0)
    print(f"{path}: {len(tasks) - place} prompts are left; s skips, u takes the last row back, q ends")
    answer = ""
    while answer != "q" and place < len(tasks):
        # 3. show, and ask; all labelers get the same responses, each in an order of his own
        row = dict(data.different_prompts([tasks[place]])[0], labeler=config.labeler)
        if not config.demonstrate:
            luck = random.Random(place), torch.Generator(device).manual_seed(place)
            found = respond([tasks[place]], tasks, policies, tokenizer, world, config, mixture, *luck)
            _, found = next(found, (None, {}))
            texts = random.Random(f"{config.labeler} {place}").sample(list(found), len(found))
            row.update(responses=texts, sources=[found[text][0] for text in texts], model=model_path)
        to_rank = row.get("responses", True)  # without two different ones there is nothing
        answer = ask(f"[{place + 1} of {len(tasks)}] ", row, config.fields) if to_rank else "s"
        # 4. keep the row, or take one back; the file is written anew: a kill leaves the old or the new
        rows = so_far()  # another labeler may write there, too
        if answer == "u" and any(map(is_mine, rows[-1:])):
            place = places.get(rows.pop()["prompt"], place)
        elif isinstance(answer, dict):
            rows.append({**row, **answer})
        place += answer != "u"
        if answer not in ("s", "q"):
            data.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def agreement(*paths):
    """Of the pairs of responses that neither of two files of comparisons ties, the share that both rank
    alike -> that, half of its 95% interval over prompts; printed (InstructGPT, sec. 3.4)."""
    check(len(paths) == 2, "say agreement FILE FILE: comparisons.jsonl of two labelers")
    rows = [data.read_jsonl(path, *data.DATASETS["comparisons.jsonl"]) for path in paths]
    one, two = ({row["prompt"]: dict(zip(row["responses"], row["ranks"])) for row in of} for of in rows)
    counts = []  # of a prompt: pairs ranked alike, pairs without a tie
    for prompt in one.keys() & two.keys():
        texts = one[prompt].keys() & two[prompt].keys()
        a, b = (pairs_of(torch.tensor([[of[prompt][text] for text in texts]])) for of in (one, two))
        counts.append((int((a & b).sum()), int((a & (b | b.mT)).sum())))
    pairs = sum(n for _, n in counts)
    check(pairs, f"{' and '.join(paths)}: no pair of responses that both rank, without a tie")
    share = sum(k for k, _ in counts) / pairs
    half = 1.96 * sum((k - share * n) ** 2 for k, n in counts) ** 0.5 / pairs
    print(f"agreement {share:.3f} ± {half:.3f} of {pairs} pairs (the paper's labelers: 0.726 ± 0.015)")
    return share, half


if __name__ == "__main__":
    if sys.argv[1:2] == ["agreement"]:
        agreement(*sys.argv[2:])
    elif sys.argv[1:2] == ["label"]:
        sys.argv.pop(1)
        sft.start(label, LabelConfig, SCALES)
    else:
        sft.start(main, Config, SCALES)
