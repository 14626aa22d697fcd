"""
Did it work? The table at the end of `python ppo.py`, and talking to what was trained.

    python eval.py                   the table of whatever is in --out; also --ppo=PATH, --ref=PATH, ..
    python eval.py chat              talk to --model=base, sft, ppo_init or ppo, or to the path of one
    python eval.py compare "TEXT"    every model in --out on one prompt: response, score, kl, length

Every measure is made of three things: `respond` (sample), `scores` (the reward) and `response_logprobs`
(of a response); in the world of `data.World.gold` and `data.label` too. A response is a pair
(text, ids) everywhere; ids end with eot if the response ended by itself. What the paper claims of such
numbers is tested by `python tests/findings.py`.
"""

import contextlib
import itertools
import json
import math
import os
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass

import torch

import data
import model
import reward
import sft
from data import Amount, Checkpoint, Common, Count, Judge, Seed, check, words_of

# --------------------------------------------------------------------------------------------------
# measures


def interval(values):
    """Numbers, one a prompt -> mean, half-width of its normal 95% interval."""
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), 1.96 * spread / math.sqrt(len(values))


def win_rate(outcomes):
    """Outcomes 1 (won), 0.5 (tie), 0 (lost), one a prompt -> rate, half-width of its 95% interval."""
    return interval(outcomes)


def entropy_bits(logprobs):
    """Entropy over paired completions, as bias is measured (InstructGPT, sec. 4.2): total log-probability
    of each choice, (N, choices) in nats -> (N,) in bits. 1 bit for a pair means no preference."""
    logprobs = torch.log_softmax(logprobs, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1) / math.log(2)


def respond(policy, tokenizer, prompts, max_new_tokens, temperature, seed, device):
    """-> a response to each prompt (text), sampled from a generator of its own: the same seed gives every
    policy the same luck. Raises ValueError if a prompt does not fit the context with its response."""
    generator = torch.Generator(device).manual_seed(seed)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    return data.sample(policy, tokenizer, ids, max_new_tokens, temperature, generator)


def as_response(tokenizer, text):
    """What somebody wrote -> (text, ids), ended by eot."""
    return text, tokenizer.encode(text) + [tokenizer.eot]


@torch.no_grad()
def scores(judge, tokenizer, prompts, responses, device):
    """The judge's score of each response -> list of floats, one a prompt."""
    pairs, given = [(tokenizer.encode(prompt), ids) for prompt, (_, ids) in zip(prompts, responses)], []
    for batch in data.cut(pairs, 512):
        starts = torch.tensor([len(prompt) for prompt, _ in batch], device=device)
        tokens, lengths = model.pad([prompt + ids for prompt, ids in batch], device)
        given += judge(tokens, starts, lengths).tolist()
    return given


@torch.no_grad()
def response_logprobs(policy, pairs, device):
    """log pi(response | prompt) of N pairs of ids -> totals in nats, numbers of tokens, both (N,)."""
    totals, counts = [], []
    for batch in data.cut(pairs, 128):
        tokens, mask = (x.to(device) for x in data.demonstration_batch(batch))
        totals.append(model.by_length(model.masked_logprobs, policy, tokens, mask).sum(1))
        counts.append(mask.sum(1))
    return torch.cat(totals), torch.cat(counts)


def mean_kl(policy, ref, tokenizer, prompts, responses, device):
    """KL(policy || ref), nats per response -> float: k1 on the policy's own samples (temperature 1)."""
    pairs = [(tokenizer.encode(prompt), ids) for prompt, (_, ids) in zip(prompts, responses)]
    (new, _), (old, _) = (response_logprobs(gpt, pairs, device) for gpt in (policy, ref))
    return float((new - old).mean())


def compare(golds, baseline):
    """Gold scores of two models on the same prompts -> outcomes 1, 0.5 (less than 1e-6 apart), 0."""
    return [0.5 if abs(a - b) < 1e-6 else float(a > b) for a, b in zip(golds, baseline)]


def untied(outcomes):
    """The outcomes that are no ties; one tie if there is none."""
    return [outcome for outcome in outcomes if outcome != 0.5] or [0.5]


def compare_by_labelers(world, labelers, tasks, responses, baseline):
    """Each pair of responses is ranked by one of the labelers -> outcomes 1, 0.5, 0."""
    rng, outcomes = random.Random(0), []
    for task, (text, _), (other, _) in zip(tasks, responses, baseline):
        first, second = data.label(world, rng.choice(labelers), task, [text, other], rng)["ranks"]
        outcomes.append(0.5 if first == second else float(first < second))
    return outcomes


def agreement(world, labelers, judge, tokenizer, tasks, responses, device):
    """How often two judges order two samples of one prompt alike, among the pairs that neither ties:
    tasks, and for each a list of responses -> dict of shares: labelers with each other, the reward model
    (judge) with labelers, and each with the gold preference; 0.5 without any pair."""
    rng, agree = random.Random(0), defaultdict(list)
    for task, samples in zip(tasks, responses):
        texts = [text for text, _ in samples]
        first, second = (
            [-rank for rank in data.label(world, labeler, task, texts, rng)["ranks"]]
            for labeler in rng.sample(labelers, 2)
        )
        given = scores(judge, tokenizer, [task["prompt"]] * len(samples), samples, device)
        gold = [world.gold(task, text)["gold"] for text in texts]
        for name, a, b in (
            ("labelers", first, second), ("reward model", given, first),
            ("gold and labelers", gold, first), ("gold and reward model", gold, given),
        ):
            agree[name] += [
                float((a[i] > a[j]) == (b[i] > b[j]))
                for i, j in itertools.combinations(range(len(texts)), 2)
                if abs(a[i] - a[j]) > 1e-6 and abs(b[i] - b[j]) > 1e-6
            ]
    return {name: statistics.mean(outcomes or [0.5]) for name, outcomes in agree.items()}


READ = ("name", "animal", "color", "object", "town")  # the classes of words that prompts ask for


def reading(world, tasks, responses):
    """Can it read? -> {class: share of the words of this class that prompts ask for and replies have}.
    In the words that a reply must take from its prompt a base model that cannot copy shows."""
    met = defaultdict(list)
    for task, (text, _) in zip(tasks, responses):
        for word in (demand.removeprefix("has ") for demand in task["demands"]):
            if world.word_class.get(word) in READ:
                met[world.word_class[word]].append(word in words_of(text))
    return {kind: statistics.mean(met[kind]) for kind in READ if met[kind]}


def questions(world, count, rng):
    """Different questions on facts, as test users put them -> tasks. For the share of false claims: the
    test prompts alone hold too few."""
    blocks, tasks = [block for block in world.blocks["open_qa"] if "answers" in block["demands"]], {}
    while len(tasks) < count:
        block = rng.choice(blocks)
        task = world.instance(block, rng.choice(block["prompts"]), rng)
        if data.split_of(task) == "test":
            tasks[task["prompt"]] = task
    return list(tasks.values())


# --------------------------------------------------------------------------------------------------
# the models of a run, and their table


@dataclass
class Config(Common):
    sft: Checkpoint = ""  # a path; '' is sft.pt, of which the epoch with the best score is taken
    ppo_init: Checkpoint = ""
    ref: Checkpoint = ""  # reference of the KL; '' is the PPO initialisation
    reward: Judge = ""  # as in ppo.py
    ppo: Checkpoint = ""  # the policy to measure; '' is ppo.pt
    ptx_coef: Amount = 0.1  # 0 names the policy PPO, else PPO-ptx


SCALES = dict(tiny=dict(), cpu=dict(), gpu=dict(), gpt2=dict())


class Models:
    """The models of a run, its test prompts, and what was already sampled. Names: GPT, GPT prompted (in
    the world), SFT, PPO init, PPO-ptx or PPO, demonstrator (in the world: who wrote the demonstrations)."""

    def __init__(self, config):
        self.config, self.device = config, sft.get_device(config.device)
        self.datasets = data.load(config.data, config.scale, config.seed)
        self.last = "PPO-ptx" if config.ptx_coef else "PPO"
        self.tuned = {"SFT": "sft", "PPO init": "ppo_init", self.last: "ppo"}  # and their files
        paths = {name: sft.where(config, file) for name, file in {"GPT": "base", **self.tuned}.items()}
        self.policies, encodings = {}, []
        for name, path in paths.items():
            self.policies[name], self.tokenizer, made = sft.load_network("policy", path, self.device)
            encodings.append(self.tokenizer)
        for flag in ("data", "seed", "max_new_tokens"):  # of the last, PPO's
            if (was := made["settings"].get(flag)) not in (None, getattr(config, flag)):
                print(f"warning: {path} was made with --{flag}={was}")
        differ = f"{', '.join(paths.values())} have different encodings: take models of one run"
        check(encodings.count(encodings[0]) == len(encodings), differ)
        self.ref = self.policies["PPO init"]
        if config.ref:
            self.ref, _, _ = sft.load_network("policy", config.ref, self.device)
        self.limit = min(gpt.config.block_size for gpt in self.policies.values()) - config.max_new_tokens
        encode = lambda part: data.encode_prompts(self.tokenizer, self.datasets[part], self.limit)
        self.tasks, valid = encode("test"), encode("valid")
        self.prompts, self.sampled = [task["prompt"] for task in self.tasks], {}
        self.judge, _ = reward.load_judge(config, self.tokenizer, self.tasks + valid, self.device)
        self.valid_prompts = [row["prompt"] for row in valid[:200]]
        best, self.by_epoch = self.best_epoch(paths["SFT"])
        self.policies["SFT"] = best or self.policies["SFT"]
        self.world = None if config.data else data.World()
        if self.world:
            self.labelers, self.heldout = data.make_labelers(self.world, config.seed)
            rng = random.Random(0)
            texts = [data.imperfect(self.world, task, rng) for task in self.tasks]
            self.sampled["demonstrator", 1.0] = [as_response(self.tokenizer, text) for text in texts]
            # the few-shot prefix with the highest score on validation prompts, as the paper's (sec. 3.5)
            texts = "\n".join(data.content("prefixes.txt")).split("---")
            score = lambda prefix: self.score_of(self.policies["GPT"], prefix)
            self.prefix = max([text.strip("\n") + "\n" for text in texts], key=score)

    def scores(self, prompts, responses):
        return scores(self.judge, self.tokenizer, prompts, responses, self.device)

    def score_of(self, policy, prefix=""):
        """Mean score of a policy's samples on validation prompts; with a prefix before each prompt that
        leaves room for it, of their first lines."""
        responses = self.respond(policy, self.valid_prompts, seed=0, prefix=prefix)
        return statistics.mean(self.scores(self.valid_prompts, responses))

    def best_epoch(self, path):
        """Of the epochs kept in a checkpoint, the one with the highest score on validation prompts: the
        paper selects the SFT baseline by it, not by loss (App. C.1) -> policy, {epoch: score}."""
        policies, by_epoch = {}, {}
        for epoch in sft.load_checkpoint("policy", path).get("epochs", {}):
            policies[epoch], _, _ = sft.load_network("policy", path, self.device, epoch)
            by_epoch[epoch] = self.score_of(policies[epoch])
        return policies.get(max(by_epoch, key=by_epoch.get, default=None)), by_epoch

    def respond(self, policy, prompts, temperature=1.0, seed=1, prefix=""):
        """Responses of a policy, or of the model of this name, to any prompts -> list of (text, ids)."""
        if policy == "GPT prompted":
            return self.respond("GPT", prompts, temperature, seed, self.prefix)
        policy = self.policies[policy] if isinstance(policy, str) else policy
        if prefix:  # a small context leaves no room for it before the longest prompts
            size = len(self.tokenizer.encode(prefix))
            fits = [len(self.tokenizer.encode(prompt)) + size <= self.limit for prompt in prompts]
            prompts = [prefix * fit + prompt for fit, prompt in zip(fits, prompts)]
        responses = respond(
            policy, self.tokenizer, prompts, self.config.max_new_tokens, temperature, seed, self.device
        )
        if prefix:  # up to the first line break: a model that only saw pages does not know to stop
            lines = (text.lstrip("\n").split("\n")[0] for text, _ in responses)
            responses = [as_response(self.tokenizer, line) for line in lines]
        return responses

    def responses(self, name, temperature=1.0):
        """Responses to the test prompts, sampled once."""
        if (name, temperature) not in self.sampled:
            self.sampled[name, temperature] = self.respond(name, self.prompts, temperature)
        return self.sampled[name, temperature]

    def golds(self, name, temperature=1.0):
        """The gold preference of the responses to the test prompts -> list of floats."""
        pairs = zip(self.tasks, self.responses(name, temperature))
        return [self.world.gold(task, text)["gold"] for task, (text, _) in pairs]


def table_row(models, name, temperature):
    """What is known of a model's responses to the test prompts -> dict of means over prompts."""
    responses, world = models.responses(name, temperature), models.world
    row = dict(model=name, T=temperature)
    if world:
        golds, baseline = models.golds(name, temperature), models.responses("SFT", temperature)
        row["gold"], row["±"] = interval(golds)
        # against the baseline at the same temperature: ties half, without ties, by held-out labelers
        outcomes = compare(golds, models.golds("SFT", temperature))
        by_labelers = compare_by_labelers(world, models.heldout, models.tasks, responses, baseline)
        kinds = dict(win=outcomes, untied=untied(outcomes), held_out=untied(by_labelers))
        row.update((kind, win_rate(some)[0]) for kind, some in kinds.items())
        # against who wrote the demonstrations: the gain in gold, paired by prompt
        row["teacher"], row["±t"] = interval(a - b for a, b in zip(golds, models.golds("demonstrator")))
        parts = [world.gold(task, text) for task, (text, _) in zip(models.tasks, responses)]
        for key in ("follows", "constraint", "rude", "fluent", "padded"):
            row[key] = statistics.mean([p[key] for p in parts if p[key] is not None] or [0.0])
    row["score"] = statistics.mean(models.scores(models.prompts, responses))
    if name in models.tuned and temperature == 1:
        arguments = models.ref, models.tokenizer, models.prompts, responses, models.device
        row["kl"] = mean_kl(models.policies[name], *arguments)
    row["length"] = statistics.mean(len(ids) for _, ids in responses)
    return row


def world_report(models):
    """What only a world can tell, beside the table -> dict, printed."""
    world, tasks, last, report = models.world, models.tasks, models.last, {}
    for name in ("GPT prompted", "SFT", last):  # greedy
        report[f"reading {name}"] = reading(world, tasks, models.respond(name, models.prompts, 0.0))
    asked = questions(world, 400, random.Random(0))
    for temperature, name in itertools.product((1.0, 0.0), ("SFT", last)):
        # false claims, among the answers that claim something
        replies = models.respond(name, [task["prompt"] for task in asked], temperature)
        parts = [world.gold(task, text) for task, (text, _) in zip(asked, replies)]
        false = [part["false"] for part in parts if part["claims"]]
        share, half = interval(false or [0.0])
        report[f"false claims {name} T={temperature:g}"] = dict(share=share, half=half, claims=len(false))
        by = defaultdict(list)  # category of the prompt
        for task, gold in zip(tasks, models.golds(name, temperature)):
            by[task["category"]].append(gold)
        means = {category: statistics.mean(by[category]) for category in world.shares if by[category]}
        report[f"gold {name} T={temperature:g}"] = means
    # what is sharpening: sampled PPO against greedy SFT; and has it outgrown who taught it?
    teacher = "the demonstrator", models.golds("demonstrator")
    for temperature, (other, golds) in (
        (1.0, ("SFT T=0", models.golds("SFT", 0.0))), (1.0, teacher), (0.0, teacher),
    ):
        outcomes = compare(models.golds(last, temperature), golds)
        of_all = dict(zip(("win", "half"), win_rate(outcomes)), untied=win_rate(untied(outcomes))[0])
        report[f"{last} T={temperature:g} against {other}"] = of_all
    # held-out labelers and the reward model on four samples of SFT to each prompt
    prompts = [prompt for prompt in models.prompts[:300] for _ in range(4)]
    four = data.cut(models.respond("SFT", prompts, seed=2), 4)
    judges = models.heldout, models.judge, models.tokenizer
    report["agreement"] = agreement(world, *judges, tasks, four, models.device)
    for name, numbers in report.items():
        print(f"{name}: " + "  ".join(f"{key} {value:.3g}" for key, value in numbers.items()))
    return report


def main(config):
    """The table of the models in config.out: printed, and written to table.json; every response to a
    test prompt to responses.jsonl."""
    sft.check_config(config)
    models = Models(config)
    if models.by_epoch:
        by_epoch = "  ".join(f"{epoch}: {score:.2f}" for epoch, score in models.by_epoch.items())
        best = max(models.by_epoch, key=models.by_epoch.get)
        print(f"SFT epoch {best} has the highest score on validation prompts: {by_epoch}")
    tuned, world = models.tuned, models.world
    at_1 = ["GPT", "GPT prompted", *tuned, "demonstrator"] if world else ["GPT", *tuned]
    shown = [(name, 1.0) for name in at_1] + [(name, 0.0) for name in tuned]
    table = [table_row(models, name, temperature) for name, temperature in shown]
    _, documents = sft.documents_of(config, models.datasets, models.tokenizer, models.ref)
    for row in table:
        if row["model"] in models.policies and row["T"] == 1:
            row["pretrain_loss"] = sft.valid_loss(models.policies[row["model"]], *documents)
    print_table(table)
    report = world_report(models) if world else {}
    contents = dict(table=table, report=report, prompts=len(models.prompts), sft_epochs=models.by_epoch)
    data.write_text(os.path.join(config.out, "table.json"), json.dumps(contents, indent=1))
    rows = [{key: task[key] for key in ("prompt", "category") if key in task} for task in models.tasks]
    for name, temperature in shown:
        for row, (text, _) in zip(rows, models.responses(name, temperature)):
            row[f"{name} T={temperature:g}"] = text
        for row, gold in zip(rows, models.golds(name, temperature) if world else []):
            row[f"gold {name} T={temperature:g}"] = gold
    data.write_text(os.path.join(config.out, "responses.jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
    for i, row in enumerate(rows[:8]):  # the first test prompts, whatever they show
        print(f"\n[{i}] {row['prompt']!r}")
        for name in at_1:
            print(f"    {name + ' T=1':18s} {row[name + ' T=1']!r}")
    if config.scale == "tiny":
        print("\nscale tiny: a test of the plumbing, the numbers above mean nothing")
    return table


def print_table(table):
    """Rows (dicts) -> one line each under the names of their keys, missing cells empty."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    text = lambda x, key: x if isinstance(x, str) else f"{x:.{0 if key == 'T' else 3}f}"
    for row in [{key: key for key in columns}, *table]:
        cells = (f"{text(row.get(key, ''), key):>{max(len(key), 6)}}" for key in columns[1:])
        print("  ".join([f"{row['model']:14}", *cells]))


# ==================================================================================================
# The bar: below it, talking to what was trained: python eval.py chat, python eval.py compare.
# ==================================================================================================


@dataclass
class TalkConfig:
    """What chat and compare take. A model is as large as its checkpoint says, at every scale."""

    scale: str = "cpu"  # changes nothing here
    out: str = "out"
    seed: Seed = 1
    device: str = ""
    temperature: Amount = 1.0  # 0 is greedy
    max_new_tokens: Count = 28
    model: str = "ppo"  # chat: base, sft (its last epoch), ppo_init or ppo in --out; or a path
    template: str = "chat"  # chat; plain: every line by itself, a prompt as most of the world's are
    verbose: bool = False  # chat: show the text that the model is given
    samples: Count = 1  # compare: responses of each model to a prompt


def plain_prompt(line):
    """What was typed -> prompt, ended as the world's are: by a new line, or by a colon that it has.
    A backslash and an n stand for a new line, so that a dialogue fits a line."""
    text = line.replace("\\n", "\n")
    return text if text.endswith((":", "\n")) else text + "\n"


def typed(marker):
    """Yields the lines of stdin that are not empty. No marker in a pipe: what it gets is responses only."""
    marker = marker if sys.stdin.isatty() and sys.stdout.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            if line := input(marker).strip():
                yield line
    print(end="\n" if marker else "")


def fits(tokenizer, prompt, context, max_new_tokens):
    """Is there room for the prompt and its response in `context` tokens? If not, one line says so."""
    count = len(tokenizer.encode(prompt))
    if count + max_new_tokens > context:
        counts = f"this prompt has {count} tokens and {max_new_tokens} are to follow"
        advice = f"the context is {context}: shorten it or lower --max_new_tokens"
        print(f"{counts}, but {advice}", file=sys.stderr)
    return count + max_new_tokens <= context


def stream(policy, tokenizer, prompt, max_new_tokens, temperature, generator):
    """Yields a response in pieces of text, one a token: joined they are the text that one call of
    model.generate gives. The prompt (text) and its response fit the context."""
    prompt_ids, ids, shown, text = tokenizer.encode(prompt), [], 0, ""
    while len(ids) < max_new_tokens and ids[-1:] != [tokenizer.eot]:
        # one token a call reads the dialogue anew each time: some milliseconds here, and generate
        # stays the only decode loop
        tokens, _ = model.generate(policy, [prompt_ids + ids], 1, temperature, None, generator)
        ids.append(int(tokens[0, -1]))
        text = data.response_text(tokenizer, prompt_ids, ids)
        # half a character (U+FFFD) and a space that may open a line can change with the next token
        settled = len(text.rstrip(" \ufffd"))
        yield text[shown:settled]
        shown = settled
    yield text[shown:]


def chat(config):
    """A dialogue with one model, in the world's template: "human: {text}\\nai:" and a response, which
    begins with a space; the next turn on a new line. Nothing a model writes is cut: a raw GPT goes on
    with the human's next turn."""
    path = config.model if config.model.endswith(".pt") else os.path.join(config.out, f"{config.model}.pt")
    device = sft.get_device(config.device)
    policy, tokenizer, _ = sft.load_network("policy", path, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    context, size, turns = policy.config.block_size, config.max_new_tokens, []
    in_dialogue = config.template == "chat"
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print(f"talking to {path}: /reset forgets the dialogue, Ctrl-D ends")
    for line in typed("human: " if in_dialogue else "> "):
        if line == "/reset":
            turns = []
            continue
        turn = f"human: {line}\nai:" if in_dialogue else plain_prompt(line)
        if not fits(tokenizer, turn, context, size):
            continue
        kept = turns
        while len(tokenizer.encode("".join(kept) + turn)) + size > context:
            kept = kept[1:]
        if len(kept) < len(turns):
            left_out = f"oldest turns left out, {len(turns) - len(kept)} of {len(turns)}"
            print(f"the context of {context} tokens is full: {left_out}", file=sys.stderr)
        prompt = "".join(kept) + turn
        if config.verbose:
            print(f"{prompt!r}, {len(tokenizer.encode(prompt))} tokens", file=sys.stderr)
        if terminal and in_dialogue:
            print("ai:", end="")
        response = ""
        for piece in stream(policy, tokenizer, prompt, size, config.temperature, generator):
            print(piece, end="", flush=True)
            response += piece
        print(flush=True)
        if in_dialogue:
            turns = kept + [turn + response + ("" if response.endswith("\n") else "\n")]


def side_by_side(config, lines):
    """Every model in --out on each of the typed lines, with the same luck. kl: log pi - log ref of this
    response at temperature 1, ref the PPO initialisation, nats; length in tokens with eot."""
    device = sft.get_device(config.device)
    path = lambda name: os.path.join(config.out, f"{name}.pt")
    loaded = {}
    for name in ("base", "sft", "ppo_init", "ppo", "reward"):
        kind = "reward" if name == "reward" else "policy"
        if sft.is_finished(kind, path(name)):
            loaded[name] = sft.load_network(kind, path(name), device)[:2]
    policies = {name: network for name, (network, _) in loaded.items() if name != "reward"}
    check(policies, f"{config.out} holds no finished model: run python ppo.py --out={config.out} first")
    tokenizer, *others = (tokenizer for _, tokenizer in loaded.values())
    differ = f"the models in {config.out} have different encodings: train them again in one --out"
    check(all(other == tokenizer for other in others), differ)
    score = lambda policy, *given: scores(reward.model_judge(loaded["reward"][0]), *given)[0]
    kl = lambda policy, *given: mean_kl(policy, policies["ppo_init"], *given)
    measures = {}
    for name, column, measure in (("reward", "score", score), ("ppo_init", "kl", kl)):
        if name in loaded:
            measures[column] = measure
        else:
            print(f"no finished {path(name)}: {column} left out", file=sys.stderr)
    context = min(network.config.block_size for network, _ in loaded.values())
    for prompt in (plain_prompt(line) for line in lines if line.strip()):
        if not fits(tokenizer, prompt, context, config.max_new_tokens):
            continue
        print(repr(prompt))
        print(" " * 12 + "  ".join(f"{column:>6}" for column in (*measures, "length", "response")))
        for name, policy in policies.items():
            prompts, luck = [prompt] * config.samples, (config.temperature, config.seed, device)
            for response in respond(policy, tokenizer, prompts, config.max_new_tokens, *luck):
                given = tokenizer, [prompt], [response], device
                row = [f"{measure(policy, *given):6.3f}" for measure in measures.values()]
                print(f"  {name:10}" + "  ".join([*row, f"{len(response[1]):6d}", repr(response[0])]))
        print(flush=True)


def talk(command, arguments):
    """chat or compare with the arguments behind it. Status 0 at the end of the input, at Ctrl-C, and
    when whoever reads our output goes away."""
    prompts = [a for a in arguments if command == "compare" and not a.startswith("--") and a != "-h"]
    try:
        for file in (sys.stdin, sys.stdout):
            file.reconfigure(errors="replace")  # bytes that are no text
        config = sft.parse(TalkConfig, SCALES, [a for a in arguments if a not in prompts])
        sft.check_flags(config)
        check(config.template in ("chat", "plain"), f"--template={config.template}: expected chat or plain")
        if command == "chat":
            chat(config)
        else:
            side_by_side(config, prompts or typed("> "))
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:  # as in `python eval.py chat | head -1`; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    if sys.argv[1:2] in (["chat"], ["compare"]):
        talk(sys.argv[1], sys.argv[2:])
    else:
        sft.start(main, Config, SCALES)
