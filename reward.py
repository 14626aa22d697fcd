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
import os
import random
import runpy
import shutil
import sys
import textwrap
import time
import traceback
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import model
import sft
from data import Common, Count, Rate
from model import ScalarGPT
from sft import Run, check


@dataclass
class Config(Common):
    sft: str = ""  # what the reward model starts from, its last epoch; '' is sft.pt

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


def masked_scores(reward_model, tokens, mask):
    """The scalar that has read each unmasked action, 0 elsewhere: tokens (B, T), mask (B, T-1) ->
    (B, T-1), score units."""
    scores = reward_model(tokens, where=F.pad(mask, (1, 0)))  # (N,)
    return torch.zeros(mask.shape, device=mask.device, dtype=scores.dtype).masked_scatter(mask, scores)


def score(reward_model, tokens, lengths):
    """The scalar at the last real token of each row, which is eot if the response ended: tokens (B, T),
    lengths (B,) -> (B,), score units. Computed on rows of similar length at a time."""
    last = model.response_mask(lengths - 1, lengths, tokens.size(1))  # (B, T-1)
    return model.by_length(masked_scores, reward_model, tokens, last).sum(1)


def score_groups(reward_model, groups, device):
    """B groups of K rows -> scores (B, K) of all responses, ranks (B, K), 0 in empty slots."""
    tokens, lengths = model.pad([row for rows, _ in groups for row in rows], device)
    scores = score(reward_model, tokens, lengths).split([len(ranks) for _, ranks in groups])
    ranks = [torch.tensor(ranks) for _, ranks in groups]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(scores, batch_first=True), pad(ranks, batch_first=True).to(device)


@torch.no_grad()
def evaluate(reward_model, groups, device):
    """-> dict of valid_loss, nats per pair as ranking_loss averages, and accuracy, the share of untied
    pairs ordered as the labeler did."""
    loss, prompts, right, pairs = 0.0, 0, 0, 0
    for i in range(0, len(groups), 32):
        scores, ranks = score_groups(reward_model, groups[i : i + 32], device)  # (B, K)
        better = pairs_of(ranks)
        untied = int(better.any(2).any(1).sum())  # the prompts that ranking_loss averages over
        loss, prompts = loss + float(ranking_loss(scores, ranks)) * untied, prompts + untied
        right += int((better & (scores[:, :, None] > scores[:, None, :])).sum())
        pairs += int(better.sum())
    return dict(valid_loss=loss / max(1, prompts), accuracy=right / max(1, pairs))


@torch.no_grad()
def shift_to_demonstrations(reward_model, pairs, device):
    """Demonstrations, pairs of (prompt ids, response ids), score 0 on average from now on (sec. 3.5):
    eq. 1 leaves a constant free, but beta's scale and a penalty need it. It is the head's bias, so that
    the value model inherits it."""
    tokens, lengths = model.pad([prompt + response for prompt, response in pairs], device)
    reward_model.head.bias -= score(reward_model, tokens, lengths).mean()


def load_judge(config, tokenizer, rows, device):
    """What scores responses, by --reward -> judge, the reward model or None. judge: a function of
    tokens (B, T), prompt_lengths (B,), lengths (B,) that returns scores (B,). rows: the prompts."""
    if config.reward.endswith(".py"):
        return text_judge(own_reward(config.reward), tokenizer), None
    made_by, path = 'run "python reward.py" first, or pass --reward=PATH', sft.where(config, "reward")
    reward_model, of_reward, _ = sft.load_reward(path, made_by, device)
    message = f"{path} has another encoding than the policy: train one of them again"
    check(of_reward.state() == tokenizer.state(), message)
    is_gold = config.reward == "gold"
    return gold_judge(tokenizer, rows) if is_gold else model_judge(reward_model), reward_model


def model_judge(reward_model):
    """A reward model as a judge."""
    return lambda tokens, prompt_lengths, lengths: score(reward_model, tokens, lengths)


def gold_judge(tokenizer, rows):
    """The gold preference of the world as a judge of responses to these prompts."""
    world, tasks = data.World(), {tokenizer.decode(row["ids"]): row for row in rows}
    gold = lambda prompt, text: world.gold(tasks[prompt], text)["gold"]
    return text_judge(lambda prompts, responses: map(gold, prompts, responses), tokenizer)


def text_judge(function, tokenizer):
    """function(prompts, responses), lists of texts, -> numbers; as a judge."""
    def judge(tokens, prompt_lengths, lengths):
        rows = list(zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist()))
        prompts = [tokenizer.decode(row[:start]) for row, start, _ in rows]
        texts = [data.response_text(tokenizer, row[:start], row[start:end]) for row, start, end in rows]
        scores = [float(x) for x in function(prompts, texts)]
        check(len(scores) == len(texts), f"reward gave {len(scores)} numbers for {len(texts)} responses")
        return torch.tensor(scores, device=tokens.device)

    return judge


def main(config):
    """Collect the comparisons if there are none, then make reward.pt in config.out or go on with it."""
    sft.check_config(config)
    sizes = f"--k_min={config.k_min} --k_max={config.k_max}"
    check(2 <= config.k_min <= config.k_max, f"{sizes}: expected 2 or more, and no k_max below k_min")
    run = Run("reward", "reward", config)
    if run.finished:
        return
    made_by = 'run "python sft.py" first, or pass --sft=PATH'
    start, tokenizer, _ = sft.load_policy(sft.where(config, "sft"), made_by, run.device)
    if tokenizer.name != config.encoding:
        print(f"--encoding={config.encoding} is not used: the supervised model has {tokenizer.name}")

    # 1. comparisons: read, or sampled and ranked here
    datasets = data.load(config.data, config.scale, config.seed)
    rows, rows_valid = datasets["comparisons"], datasets.get("comparisons_valid")
    if rows is None:
        rows, rows_valid = collect_for_world(config, start, tokenizer, datasets)
    groups, groups_valid = (
        data.encode_comparisons(tokenizer, part, start.config.block_size) for part in (rows, rows_valid)
    )
    pairs = data.encode_pairs(tokenizer, datasets["demonstrations"], start.config.block_size)
    train(run, start, tokenizer, groups, groups_valid, pairs, config)


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
# The bar: below it, where comparisons come from: programs, or people.
# ==================================================================================================


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
CHUNK = 256  # prompts sampled and labeled together


def collect_for_world(config, start, tokenizer, datasets):
    """-> rows of comparisons, and of some for validation: samples of the supervised model only, ranked
    by labelers who gave no training data."""
    made_by = 'run "python sft.py" first, or pass --base=PATH'
    base, _, _ = sft.load_policy(sft.where(config, "base"), made_by, sft.get_device(config.device))
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
    """Sample K responses to each task from the mixture {source: weight}; one labeler ranks them -> rows,
    which are the log of a run of its own, out/NAME.jsonl.

    Rows: prompt, responses, ranks, labeler, user, category, and per response its source, its rating and
    its sampled ids (a text encoded again may fall into other tokens than those that were sampled).
    """
    models = [policies[source].state_dict() for source in mixture if source in policies]
    weights = b"".join(w.cpu().numpy().tobytes() for weights in models for w in weights.values())
    run = Run(
        name, "comparisons", config, ("epochs", "batch", "lr", "grad_clip"), mixture=str(mixture),
        weights_of_the_sources=zlib.crc32(weights),  # other samples, other comparisons
    )
    if run.finished:
        return data.read_jsonl(run.log_path)
    run.begin(-(-len(tasks) // CHUNK))
    for step in run:
        rng = random.Random(f"{name} {config.seed} {step}")
        chunk, rows = tasks[(step - 1) * CHUNK : step * CHUNK], []
        sampled = respond(chunk, tasks, policies, tokenizer, world, config, mixture, rng, run.generator)
        for task, responses in zip(chunk, sampled):
            if len(responses) < 2:
                continue
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
    """Yields for each of some tasks its K responses {text: (source, sampled ids)}: every different one
    once, none empty, for noise would rank equal ones; so there may be fewer. tasks: all there are."""
    count = lambda: rng.randint(config.k_min, config.k_max)
    sources = [rng.choices(list(mixture), mixture.values(), k=count()) for _ in chunk]
    sampled = sample_sources(policies, tokenizer, chunk, sources, config, generator)
    for i, task in enumerate(chunk):
        responses = {}
        for j, source in enumerate(sources[i]):
            text, ids = sampled.get((i, j)) or written(world, source, task, tasks, tokenizer, rng)
            responses.pop(text, None)
            if text.strip():
                responses[text] = source, ids
        yield responses


def sample_sources(policies, tokenizer, chunk, sources, config, generator):
    """The responses that models give -> {(task, place among its sources): (text, ids)}."""
    sampled = {}
    for source, temperature in (("sft", 1.0), ("hot", 1.3), ("base", 1.0)):
        slots = [(i, j) for i, s in enumerate(sources) for j in range(len(s)) if s[j] == source]
        if slots:
            responses = data.sample(
                policies[source], tokenizer, [chunk[i]["ids"] for i, _ in slots],
                config.max_new_tokens, temperature, generator,
            )
            sampled.update(zip(slots, responses))
    return sampled


def written(world, source, task, tasks, tokenizer, rng):
    """A response that no model wrote -> text, ids."""
    if source == "labeler":
        text = data.imperfect(world, task, rng)
    elif source == "spoiled":
        text = data.spoiled(world, task, rng)
    else:
        others = rng.sample(tasks, min(40, len(tasks)))
        same = [other for other in others if other["category"] == task["category"]]
        text = rng.choice(same if same and rng.random() < 0.6 else tasks)["reply"]
    return text, tokenizer.encode(text) + [tokenizer.eot]


def own_reward(path):
    """The function of --reward=FILE.py: the errors of somebody else's code in one line each."""
    def called(function, *given):
        try:
            return function(*given)
        except Exception as why:
            lines = [at.lineno for at in traceback.extract_tb(why.__traceback__) if at.filename == path]
            place, said = ":".join([path, *map(str, lines[-1:])]), " ".join(str(why).split())
            raise SystemExit(f"{place}: {type(why).__name__}: {said}") from why

    function = called(runpy.run_path, path).get("reward")
    check(callable(function), f"{path} defines no function reward(prompts, responses)")
    return lambda *texts: called(lambda: list(map(float, function(*texts))))


# --------------------------------------------------------------------------------------------------
# people in the loop

FIELDS = """fails_to_follow inappropriate hallucination satisfies_constraint sexual violent encourages_harm
denigrates harmful_advice opinion moral_judgement""".split()  # of Table 3


@dataclass
class LabelConfig(Config):
    out: str = "labels"  # the folder of what people write
    from_: str = "out"  # the models; --sft is the one that responds
    prompts: str = ""  # a file of rows with prompt; '' is prompts.jsonl of --data, or the world
    labeler: str = "me"
    demonstrate: bool = False  # write responses in place of ranking some
    fields: bool = False  # ask for a rating of the best response and for Table 3


def parse_ranking(text, count):
    """A ranking of responses a, b, .. as people write one -> ranks: "d > c > a = b" has [3, 3, 2, 1].
    Raises ValueError unless each of the `count` letters stands in it once."""
    letters, ranks = [chr(ord("a") + i) for i in range(count)], {}
    for rank, tied in enumerate(text.lower().split(">"), 1):
        for letter in map(str.strip, tied.split("=")):
            if letter not in letters or letter in ranks:
                raise ValueError(f'"{letter}": write each of {" ".join(letters)} once, as in b > a = c')
            ranks[letter] = rank
    if len(ranks) < count:
        raise ValueError(f"left out: {' '.join(x for x in letters if x not in ranks)}")
    return [ranks[letter] for letter in letters]


def parse_fields(text):
    """Numbers, "6 2 11" -> a rating, and which FIELDS hold: a dict. Raises ValueError for a slip."""
    rating, *places = [int(word) if word.isdecimal() else 0 for word in text.split()] or [0]
    if rating not in range(1, 8) or not all(place in range(1, len(FIELDS) + 1) for place in places):
        raise ValueError(f'"{text}": write a rating of 1 to 7, and the numbers of what holds, as in 6 2 11')
    return dict(rating=rating, fields=[FIELDS[place - 1] for place in places])


def ask(question, parse):
    """-> parse(what is typed), after one line on each slip (ValueError); s, u and q as they are."""
    while True:
        try:
            text = input(question + "\n" * (not sys.stdin.isatty())).strip()
            return text if text in ("s", "u", "q") else parse(text)
        except ValueError as slip:
            print(slip)
        except (EOFError, KeyboardInterrupt):
            return "q"


def show(head, text):
    """Prints a text of any lines behind a head, in the width of the terminal; 80 in a pipe."""
    for line in text.expandtabs(4).splitlines():
        line = "".join(c if c.isprintable() else "\ufffd" for c in line)  # a terminal obeys some
        margin = dict(initial_indent=head, subsequent_indent=" " * len(head))
        print(textwrap.fill(line, shutil.get_terminal_size().columns, **margin) or head)
        head = " " * len(head)


def label(config):
    """Ask a person for rankings, into comparisons.jsonl in --out, or with --demonstrate for responses, into
    demonstrations.jsonl. Goes on behind the last row of this labeler; all get the same responses, of
    COLLECTED in the world, elsewhere of the model alone."""
    config.from_ = "" if config.demonstrate else config.from_  # needs no model
    sft.check_config(config)
    name = "demonstrations.jsonl" if config.demonstrate else "comparisons.jsonl"
    path, device = os.path.join(config.out, name), sft.get_device(config.device)
    for other in (f"{path}.gz", path.replace(".jsonl", ".pt")):  # read in its place; of a run that logs there
        check(not os.path.exists(other), f"{other} is there: choose another --out for what people write")
    for file in (sys.stdin, sys.stdout):
        file.reconfigure(errors="replace")  # bytes that are no text

    # 1. prompts, and who responds
    prompts = config.prompts or config.data and os.path.join(config.data, "prompts.jsonl")
    of_world = lambda: data.load("", config.scale, config.seed)["comparison_prompts"]
    tasks, world, policies = data.read_jsonl(prompts, "prompt") if prompts else of_world(), data.World(), {}
    if not config.demonstrate:
        made_by = 'run "python ppo.py" first, or pass --from=DIR or --sft=PATH'
        for source in ("sft",) if prompts else ("base", "sft"):
            policy, tokenizer, _ = sft.load_policy(sft.where(config, source), made_by, device)
            policies[source] = policies["hot"] = policy  # the last is the supervised model
        tasks = data.encode_prompts(tokenizer, tasks, policy.config.block_size - config.max_new_tokens)
    mixture = {s: share for s, share in COLLECTED.items() if s in policies or not prompts}

    # 2. go on behind the last row. The file is written anew each time: a kill leaves the old or the new
    read = lambda: data.read_jsonl(path, *data.DATASETS[name]) if os.path.exists(path) else []
    write = lambda rows: sft.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    is_mine = lambda row: row.get("labeler") == config.labeler
    places = {task["prompt"]: i for i, task in enumerate(tasks)}
    place, answer = max((places.get(row["prompt"], -1) + 1 for row in filter(is_mine, read())), default=0), ""
    print(f"{path}: {len(tasks) - place} prompts are left; s skips, u takes the last row back, q ends")
    while answer != "q" and place < len(tasks):
        # 3. show and ask
        task, answer = tasks[place], "s"
        row = {key: task[key] for key in ("prompt", "user", "category") if key in task}
        of_text = lambda text: data.check_row(dict(response=text.replace("\\n", "\n")), "response")
        questions = [("response, \\n for a new line: ", of_text)]
        if policies:
            luck = random.Random(f"label {config.seed} {place}"), torch.Generator(device).manual_seed(place)
            [found] = respond([task], tasks, policies, tokenizer, world, config, mixture, *luck)
            texts = random.Random(f"{config.labeler} {place}").sample(list(found), len(found))
            sources, model_path = [found[text][0] for text in texts], sft.where(config, "sft")
            row.update(responses=texts, sources=sources, model=model_path)
            ranks = lambda text: dict(ranks=parse_ranking(text, len(texts)))
            questions = [("ranking: ", ranks)] if len(texts) > 1 else []  # nothing to rank
        if config.fields and questions:
            fields = "  ".join(f"{i} {field}" for i, field in enumerate(FIELDS, 1))
            question = f"{textwrap.fill(fields)}\nrating of the best, what holds for it: "
            questions.append((question, parse_fields))
        print()
        show(f"[{place + 1} of {len(tasks)}] ", row["prompt"])
        for i, text in enumerate(row.get("responses", ())):
            show(f"  {chr(ord('a') + i)}  ", text)
        started = time.monotonic()
        for question, parse in questions:
            answer = ask(question, parse)
            if isinstance(answer, str):
                break
            row.update(answer)
        # 4. keep the row, or take one back
        if answer == "u":
            rows = read()
            for i in [i for i, other in enumerate(rows) if is_mine(other)][-1:]:
                place = places.get(rows.pop(i)["prompt"], place)
                write(rows)
        elif answer != "q":
            place += 1
            row.update(labeler=config.labeler, seconds=round(time.monotonic() - started, 1))
            if answer != "s":
                write([*read(), row])


def agreement(*paths):
    """Two files of comparisons -> of the pairs of responses that neither ties, the share that both rank
    alike, half of its 95% interval; printed (InstructGPT, sec. 3.4)."""
    check(len(paths) == 2, "say agreement FILE FILE: comparisons.jsonl of two labelers")
    rows = [data.read_jsonl(path, *data.DATASETS["comparisons.jsonl"]) for path in paths]
    both = [{row["prompt"]: dict(zip(row["responses"], row["ranks"])) for row in of} for of in rows]
    counts = [[0, 0, 0]]  # of a prompt: pairs ranked alike, pairs without a tie, pairs
    for prompt in both[0].keys() & both[1].keys():
        texts = both[0][prompt].keys() & both[1][prompt].keys()
        first, second = (pairs_of(torch.tensor([[ranks[prompt][text] for text in texts]])) for ranks in both)
        alike, opposite = int((first & second).sum()), int((first & second.mT).sum())
        counts.append([alike, alike + opposite, len(texts) * (len(texts) - 1) // 2])
    alike, clear, pairs = map(sum, zip(*counts))
    check(clear, f"{' and '.join(paths)}: no pair of responses that both rank, without a tie")
    share = alike / clear
    half = 1.96 * sum((k - share * n) ** 2 for k, n, _ in counts) ** 0.5 / clear  # over prompts
    of = f"{clear} pairs in {len(counts) - 1} prompts, without {pairs - clear} that somebody ties"
    print(f"agreement {share:.3f} ± {half:.3f}: {of} (the paper's labelers: 0.726 ± 0.015)")
    return share, half


if __name__ == "__main__":
    if sys.argv[1:2] == ["agreement"]:
        agreement(*sys.argv[2:])
    elif sys.argv[1:2] == ["label"]:
        sys.argv.pop(1)
        sft.start(label, LabelConfig, SCALES)
    else:
        sft.start(main, Config, SCALES)
