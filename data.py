"""
The data: text in, batches of ids out (InstructGPT, sec. 3.2 to 3.4 and App. A, B).

Three datasets, one for each stage (rows of the folder formats below, here from the miniature world):

    SFT            demonstration  {"prompt": "name two animals.\n", "response": "owl and duck."}
    reward model   comparison     {"prompt": "name two animals.\n",
                                   "responses": ["owl.", "owl and duck."], "ranks": [2, 1]}
    PPO            prompt         {"prompt": "name two animals.\n"}

There is no template: a training row is the ids of prompt, response and the stop token eot, one behind
the other. If, in a file of --data, a prompt does not end in white space and its response does not begin
with it, a new line is put between the two. A padded batch of two, and the mask that says which tokens
are actions (column t belongs to tokens[:, t + 1], see model.py):

    tokens (B, T)      name  two  animals  .  \n  owl  and   duck  .    eot        T = 10
                       good  or   bad      ?  \n  bad  .     eot   pad  pad
    mask (B, T-1)          0    0        0  0    1    1     1     1    1
                           0    0        0  0    1    1     1     0    0

Which tokens are trained on? Pretraining: all but the first of a row, which is one document. SFT: mask.
Reward model: none is predicted, its scalar is read at the last real token. PPO: mask, and the same mask
for kl, rewards, values and advantages. eot is always an action, padding never: were padding eot too (as
where GPT-2's one special token serves as both) and all of it masked, no model would learn to stop.

Below the bar: the miniature world, simulated labelers, the tokenizer, dataset files, and importers
(`python data.py import FORMAT FILE.. --out=DIR`).
"""

import functools
import gzip
import itertools
import json
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

import numpy as np
import tiktoken
import torch

import model

# --------------------------------------------------------------------------------------------------
# the flags that all stages share; the type of a flag says its range (sft.KINDS)

Count, Seed = NewType("Count", int), NewType("Seed", int)
Rate, Share, Amount = NewType("Rate", float), NewType("Share", float), NewType("Amount", float)
Folder, Dtype = NewType("Folder", str), NewType("Dtype", str)
Base, Checkpoint, Judge = NewType("Base", str), NewType("Checkpoint", str), NewType("Judge", str)


@dataclass
class Common:
    # where and what
    scale: str = "cpu"  # tiny, cpu, gpu, gpt2: other defaults, COMMON_SCALES here and SCALES of a stage
    out: str = "out"  # folder for checkpoints and logs
    from_: Folder = ""  # --from=DIR: earlier models that --out lacks are taken from there
    fresh: bool = False  # make this stage anew, over what it left in --out
    seed: Seed = 1  # of the data, their split, weights, order and samples alike
    data: Folder = ""  # of dataset files; '' is the miniature world
    device: str = ""  # cpu or cuda; '' takes cuda if it is there
    dtype: Dtype = ""  # of activations, float32 or bfloat16; '' is bfloat16 on a GPU
    encoding: str = "bpe"  # bpe: trained on the data at hand; gpt2
    base: Base = ""  # a checkpoint, a Hugging Face folder or gpt2; '' is base.pt, pretrained here

    # lengths, tokens
    block_size: Count = 256  # the context (paper: 2048)
    document_length: Count = 128  # of pretraining text; longer documents are cut into pieces
    max_new_tokens: Count = 28  # of a response (paper: 1k)

    # logging
    log_every: Count = 500  # steps; PPO: iterations
    save_seconds: Amount = 15.0  # a killed run loses at most this much


COMMON_SCALES = dict(
    tiny=dict(log_every=20, save_seconds=5.0),
    cpu=dict(),
    gpu=dict(),
    gpt2=dict(encoding="gpt2", base="gpt2", block_size=1024, max_new_tokens=128),
)


# --------------------------------------------------------------------------------------------------
# the three datasets


def check(condition, message):
    """Raises SystemExit unless condition: bad input ends in one line on stderr and exit status 1."""
    if not condition:
        raise SystemExit(message)


@functools.cache
def load(folder, scale, seed):
    """The datasets of a run, from the world ('') or from a folder of files -> dict of lists:

    pretrain, pretrain_valid, primer      texts; the primer is read first, and empty for a folder
    demonstrations, demonstrations_valid  rows with prompt, response
    comparisons, comparisons_valid        rows with prompt, responses, ranks
    comparison_prompts                    the world has these instead: its labelers wait for samples,
                                          and comparisons, comparisons_valid are None
    prompts, valid, test                  rows with prompt: for PPO, for choices, for the last table

    Made once in a process; do not write into it. Raises SystemExit if a folder cannot be used.
    """
    if not folder:
        check(scale in WORLD_SIZES, f"--scale={scale} is for real text: pass a folder, --data=DIR")
        return world_data(World(), scale, seed)
    rows = read_folder(folder)
    documents = random.Random(f"documents {seed}").sample(rows["pretrain"], len(rows["pretrain"]))
    n_valid = max(1, len(documents) // 40)
    split = dict(pretrain_valid=documents[:n_valid], pretrain=documents[n_valid:] or documents, primer=[])
    for name in ("demonstrations", "comparisons"):
        split[name], split[f"{name}_valid"] = split_by_user(rows[name], (0.9, 0.1), seed, name)
    prompts = split_by_user(rows["prompts"], (0.8, 0.1, 0.1), seed, "prompts")
    split["prompts"], split["valid"], split["test"] = prompts
    return split


def cut(row, size):
    """A list -> pieces of `size`, the last of what is left."""
    return [row[i : i + size] for i in range(0, len(row), size)]


@functools.cache  # once in a process, not once a stage
def encode_documents(tokenizer, texts, length):
    """Documents (a tuple), each ended by eot and cut into pieces of at most `length` ids -> pairs (first
    id, the others), like demonstrations: every token counts that can be predicted.

    A row is one document (or a piece of a long one), not a window over several as in nanoGPT: a word is
    then looked up in the one text that is there, and copying from a prompt is learnt in 1/5 of the steps.
    """
    documents = [tokenizer.encode(text) + [tokenizer.eot] for text in texts]
    pieces = (piece for ids in documents for piece in cut(ids, length) if len(piece) > 1)
    return [(piece[:1], piece[1:]) for piece in pieces]


def encode_pairs(tokenizer, rows, block_size):
    """Rows with prompt and response -> list of (prompt ids, response ids with eot), those that fit."""
    encode = tokenizer.encode
    pairs = [(encode(row["prompt"]), encode(row["response"]) + [tokenizer.eot]) for row in rows]
    return fitting(pairs, lambda pair: len(pair[0]) + len(pair[1]), block_size, "demonstrations")


def encode_comparisons(tokenizer, rows, block_size):
    """Rows with prompt, responses, ranks -> list of (list of K rows of ids, ranks), those that fit.
    Sampled ids ("tokens") are taken as they are: encoded again, a text may fall into others."""
    encode, groups = tokenizer.encode, []
    for row in rows:
        prompt = encode(row["prompt"])
        responses = row.get("tokens") or [encode(text) + [tokenizer.eot] for text in row["responses"]]
        groups.append(([prompt + response for response in responses], row["ranks"]))
    return fitting(groups, lambda group: max(map(len, group[0])), block_size, "comparisons")


def encode_prompts(tokenizer, rows, limit):
    """Rows with prompt -> the same with "ids", those of at most `limit` tokens."""
    rows = [dict(row, ids=tokenizer.encode(row["prompt"])) for row in rows]
    return fitting(rows, lambda row: len(row["ids"]), limit, "prompts")


def fitting(rows, length, limit, name):
    """Rows of at most `limit` tokens; prints how many were dropped. Raises SystemExit if none is left."""
    kept = [row for row in rows if length(row) <= limit]
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} of {len(rows)} {name}: longer than {limit} tokens")
    check(kept, f"all {len(rows)} {name} exceed {limit} tokens: raise --block_size or cut them")
    return kept


# --------------------------------------------------------------------------------------------------
# batches


def demonstration_batch(pairs, train_on_prompts=False):
    """B pairs of (prompt ids, response ids with eot) -> tokens (B, T), mask (B, T-1): True on the
    response, eot included; with train_on_prompts on the prompt as well."""
    tokens, lengths = model.pad([prompt + response for prompt, response in pairs])  # (B, T), (B,)
    starts = torch.tensor([1 if train_on_prompts else len(prompt) for prompt, _ in pairs])
    return tokens, model.response_mask(starts, lengths, tokens.size(1))


def bucketed(lengths, batch, seed, count):
    """Batches of rows of similar length, so that little is padding -> `count` lists of indices. Each
    epoch is shuffled, sorted by length within pools of 16 batches, and shuffled by batches."""
    batches, epoch = [], 0
    while len(batches) < count:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths)).tolist()
        pools = [sorted(pool, key=lambda i: lengths[i]) for pool in cut(order, 16 * batch)]
        sorted_batches = [piece for pool in pools for piece in cut(pool, batch)]
        batches += [sorted_batches[j] for j in rng.permutation(len(sorted_batches))]
        epoch += 1
    return batches[:count]


def draw(rows, count, rng):
    """`count` random rows of a list, with replacement."""
    return [rows[i] for i in rng.integers(0, len(rows), count)]


def every_row(count, turn, size, seed):
    """The `size` rows of a turn, each of `count` rows once before any comes again -> indices."""
    order_of = functools.cache(lambda epoch: np.random.default_rng([seed, 4, epoch]).permutation(count))
    places = range(turn * size, (turn + 1) * size)
    return [int(order_of(place // count)[place % count]) for place in places]


def sample(policy, tokenizer, prompts, max_new_tokens, temperature, generator):
    """Responses of a policy to prompts (lists of ids), rows of similar length together -> list of
    (text, ids); ids end with eot if the response ended by itself."""
    order, responses = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for chosen in cut(order, 512):
        tokens, lengths = model.generate_shared(
            policy, [prompts[i] for i in chosen], max_new_tokens, temperature, tokenizer.eot, generator
        )
        for i, row, length in zip(chosen, tokens.tolist(), lengths.tolist()):
            ids = row[len(prompts[i]) : length]
            responses[i] = response_text(tokenizer, prompts[i], ids), ids
    return [responses[i] for i in range(len(prompts))]


def response_text(tokenizer, prompt_ids, ids):
    """ids of a response -> text without eot; decoded behind its prompt, or a first space is lost."""
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eot else ids
    return tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]


# ==================================================================================================
# The bar: what follows is not needed to follow the algorithm.
# ==================================================================================================


# --------------------------------------------------------------------------------------------------
# the miniature world: its content is plain text under assets/world, this is its engine

WORLD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "world")

# kinds of prompts: what a labeler thinks of; with examples; a customer's use case in the same words
KIND_SHARES = dict(plain=0.6, few_shot=0.08, user_based=0.32)

FORMS = {  # file of assets/world -> the form of its lines; the comments at its head say what they mean
    "words.txt": r"[a-z_]+: [^:]+",
    "rules.txt": r"[a-z_]+: .+",
    "facts.txt": r"[^|{}]+\|([^|{}]|\{(subject|value)\})+\|([^|{}]|\{subject\})*",
    "tasks.txt": r"\[[a-z_]+\]( \d+(\.\d+)?( few_shot)?)?|[><?] .+",
    "heldout.txt": r"\[[a-z]+\]( near)?|[><?] .+",
    "benchmarks.txt": r"\[[a-z]+\] [a-z0-9]+|([><!]|flan>|t0>) .+",
    "pages.txt": r"\d+(\.\d+)? \| .+",
}


def content(name):
    """The lines of assets/world/NAME but comments and blank ones. Raises SystemExit for a malformed one."""
    lines = []
    for number, line in enumerate(read_text(os.path.join(WORLD, name)).split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            lines.append(line)
            is_formed = re.fullmatch(FORMS.get(name, ".*"), line)
            check(is_formed, f"assets/world/{name}:{number}: {line!r} is malformed: see its comments")
    return lines


def checksum(folder):
    """A number that changes with the texts of --data; of the world with what the main job learns from, but
    not with comments."""
    if folder:
        files = [Path(folder, name + end) for name in DATASETS for end in ("", ".gz")]
        return zlib.crc32(b"".join(file.read_bytes() for file in files if file.exists()))
    learnt = sorted(set(FORMS) - {"heldout.txt", "benchmarks.txt"})
    return zlib.crc32("\n".join(sum(map(content, learnt), [])).encode())


def read_blocks(name):
    """The blocks of a file like tasks.txt -> dicts. Raises SystemExit for one that lacks a line."""
    parts = {">": "prompts", "<": "replies", "?": "demands", "!": "wrong", "flan>": "flan", "t0>": "t0"}
    needed, blocks = ">" if name == "benchmarks.txt" else "><?", []  # a probe has no answer
    for line in content(name):
        mark, _, text = line.partition(" ")
        if mark.startswith("["):
            blocks.append(defaultdict(list, category=mark[1:-1], rest=text.split()))
        elif not blocks:
            raise SystemExit(f"assets/world/{name}: {line!r} stands before the first [category]")
        elif mark == "?":
            for part, demands in zip(("demands", "constraints"), text.split("!", 1)):
                blocks[-1][part] = [d.strip() for d in demands.split(";") if d.strip()]
        else:
            blocks[-1][parts[mark]].append(text)
    for block, sign in itertools.product(blocks, needed):
        if not block[parts[sign]]:
            seen = [block["category"], *block["prompts"], *block["replies"]][:2]
            raise SystemExit(f"assets/world/{name}: block {seen} has no line with {sign}")
    return blocks


def words_of(text):
    """-> the words, digits and signs of a text."""
    return re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text)


def sentences_of(text):
    """-> the sentences of a text with their signs, and what is left behind the last sign."""
    return re.findall(r" ?[^.!?]+[.!?]?", text)


def split_of(task):
    """train, valid (a tenth of all texts) or test (a tenth), by a checksum of the prompt: no text is in two.
    One without a slot ("name two animals."), which everybody sends, is always among the training prompts."""
    place = zlib.crc32(task["prompt"].encode()) % 10 if task["is_filled"] else -1
    return ("test", "valid", *["train"] * 8)[place]


class World:
    """The content of assets/world. Raises SystemExit for a line that is malformed or not known."""

    def __init__(self):
        parted = lambda name, sign: [line.split(sign, 1) for line in content(name)]
        self.classes = {name: words.split() for name, words in parted("words.txt", ": ")}
        self.swapped = self.classes.pop("swapped")  # the classes whose words people mix up
        rules = parted("rules.txt", ": ")
        self.rules = {name: [pattern for key, pattern in rules if key == name] for name, _ in rules}
        self.pages = [(float(share), pattern) for share, pattern in parted("pages.txt", " | ")]
        self.facts, relation = [], None
        for line in content("facts.txt"):
            first, second, third = (part.strip() for part in line.split("|"))
            if "{subject}" in second:
                relation = dict(relation=first, statement=second, questions=third.split(" / "))
            else:
                check(relation, f"assets/world/facts.txt: {line!r} stands before the first relation")
                self.facts.append(dict(relation, subject=first, truth=second, myth=third))
        self.blocks, blocks = defaultdict(list), read_blocks("tasks.txt")
        self.shares = {block["category"]: float(block["rest"][0]) for block in blocks if block["rest"]}
        self.few_shot = {block["category"] for block in blocks if "few_shot" in block["rest"]}
        for block in blocks:
            has_share = block["category"] in (*self.shares, "constraint")
            check(has_share, f"assets/world/tasks.txt: no [{block['category']}] has a share behind it")
            self.blocks[block["category"]].append(block)

        # what the gold preference reads: the class of each word, every claim that can be made (sentence
        # -> subject, relation, is it true), every familiar trigram
        self.word_class = {w: name for name, words in reversed(self.classes.items()) for w in words}
        self.claims = {
            self.say(fact, value): (fact["subject"], fact["relation"], value == fact["truth"])
            for fact in self.facts for value in self.values(fact["relation"])
        }
        rng = random.Random(0)
        self.trigrams = {t for _ in range(6000) for t in self.shape(self.task(rng)["reply"])}

    def values(self, relation):
        """All values that some fact or myth gives to a relation."""
        facts = [fact for fact in self.facts if fact["relation"] == relation]
        return sorted({v for f in facts for v in (f["truth"], f["myth"]) if v})

    def expand(self, pattern, bound, rng):
        """Fill a pattern (tasks.txt says what may stand in one) -> text; `bound` keeps what was picked."""
        while match := re.search(r"\[([^\[\]]*)\]|\{([a-z_]+)(\d?)\}", pattern):
            choices, name, digit = match.groups()
            filled = self.fill(name, digit, bound, rng) if name else rng.choice(choices.split("|"))
            pattern = pattern.replace(match[0], filled, 1)
        return pattern.replace("\\n", "\n")

    def fill(self, name, digit, bound, rng):
        """What {name} with an optional digit stands for -> text; `bound` as in expand."""
        key = name + digit
        if key in bound:
            return bound[key]
        if name in self.rules:
            return rng.choice(self.rules[name])
        if name in self.classes:
            taken = {word for k, word in bound.items() if k.rstrip("23456789") == name}
            bound[key] = rng.choice([word for word in self.classes[name] if word not in taken])
            return bound[key]
        if name in ("question", "answer", "hearsay", "why"):
            bound.update(self.ask(rng))
            return bound[key]
        if name == "truths" and (about := [bound[c] for c in ("animal", "town", "trade") if c in bound]):
            return " ".join(self.say(f, f["truth"]) for f in self.facts if f["subject"] == about[0])
        if name == "zelish" and {"animal", "color"} <= set(bound):  # a language: every word turned round
            return " ".join(w[::-1] for w in ["the", bound["animal"], "is", bound["color"]]) + "."
        if name == "sheet":  # a page of instructions without answers: what a raw GPT takes a prompt for
            return "".join(self.user_task("train", rng)["prompt"] for _ in range(3)).rstrip("\n")
        if name == "tasks":  # the rare page where instructions are followed by replies
            tasks = [self.user_task("train", rng) for _ in range(rng.randint(2, 4))]
            return "\n".join(task["prompt"] + imperfect(self, task, rng) for task in tasks)
        if name == "series":  # examples in a row, as a few-shot prompt shows them
            line = rng.choice(self.rules["line"])
            return "\n".join(self.expand(line, {}, rng) for _ in range(rng.randint(2, 4)))
        if name == "copybook":  # a line, and the same again: teaches to copy any word
            kinds = ("name", "animal", "color", "object", "town")
            words = (rng.choice(self.classes[rng.choice(kinds)]) for _ in range(rng.randint(3, 9)))
            line = " ".join(words) if rng.random() < 0.5 else self.expand("[{story}|{news}]", {}, rng)
            return "\n".join([line] * rng.randint(2, 3))
        unknown = f"assets/world: {{{key}}} is no class of words.txt and no rule of rules.txt"
        raise SystemExit(f"{unknown}, or what it speaks of is not in the pattern before it")

    @staticmethod
    def say(fact, value):
        """The sentence that states a fact, with this value -> text."""
        return fact["statement"].format(subject=fact["subject"], value=value)

    def ask(self, rng):
        """A question on a random fact -> dict: question, answer, hearsay (what people say, the
        misconception three times in four), myth, why (a false premise), fact."""
        # half of the questions are on the facts with a misconception, as TruthfulQA's are
        fact = rng.choice([f for f in self.facts if f["myth"]] if rng.random() < 0.5 else self.facts)
        myth = fact["myth"] or rng.choice([v for v in self.values(fact["relation"]) if v != fact["truth"]])
        hearsay = myth if fact["myth"] and rng.random() < 0.75 else fact["truth"]
        return dict(
            question=rng.choice(fact["questions"]).format(subject=fact["subject"]),
            answer=self.say(fact, fact["truth"]), hearsay=self.say(fact, hearsay), myth=self.say(fact, myth),
            why="is it true that " + self.say(fact, myth).replace(".", "?"), fact=fact,
        )

    # -- prompts ------------------------------------------------------------

    def task(self, rng, user=None, category=None):
        """One prompt -> dict with all that is known about it: prompt, reply (a perfect one), demands and
        constraints on a reply, fact, myth, category, kind, user (InstructGPT, Table 1 and App. A.1)."""
        category = category or rng.choices(list(self.shares), self.shares.values())[0]
        kind = rng.choices(list(KIND_SHARES), KIND_SHARES.values())[0]
        if kind == "few_shot" and category not in self.few_shot:
            kind = "plain"
        # a customer always uses the same words
        wording = random.Random(f"{user} {category}") if kind == "user_based" and user else rng
        block = wording.choice(self.blocks[category])
        pattern = wording.choice(block["prompts"])
        task = self.instance(block, pattern, rng)
        if kind == "few_shot":
            shots = [self.instance(block, pattern, rng) for _ in range(rng.randint(1, 2))]
            task["prompt"] = "".join(s["prompt"] + s["reply"] + "\n" for s in shots) + task["prompt"]
        return dict(task, category=category, kind=kind, user=user)

    def user_task(self, split, rng, user=None):
        """A prompt whose text belongs to this split -> as task(). Every split has the categories' shares,
        though a prompt that many send is in one split only. Raises SystemExit if it finds none."""
        for attempt in range(20_000):
            # the same category until a prompt is found; a small one may have no text in this split
            task = self.task(rng, user, task["category"] if attempt % 1000 else None)
            if split_of(task) == split:
                return task
        raise SystemExit(f"the world is too small: no {split} prompt found, add to assets/world/tasks.txt")

    def instance(self, block, pattern, rng):
        """A prompt of this pattern -> dict: prompt, reply, demands, constraints, fact, myth, is_filled."""
        bound = {}
        prompt = self.expand(pattern, bound, rng)
        is_filled = bool(bound)
        slots = [w for key, w in bound.items() if key.rstrip("23456789") in self.classes and w in prompt]
        reply = self.expand(rng.choice(block["replies"]), bound, rng)
        demands = [f"has {w}" for w in slots] if "slots" in block["demands"] else []
        demands += [self.expand(d, bound, rng) for d in block["demands"] if d != "slots"]
        constraints = [self.expand(c, bound, rng) for c in block["constraints"]]
        exact = any(demand.startswith("is ") for demand in demands)  # leaves no room for a suffix
        if not constraints and not exact and prompt[-1] in ".?!" and rng.random() < 0.25:
            suffix = rng.choice(self.blocks["constraint"])
            prompt += " " + suffix["prompts"][0]
            reply = suffix["replies"][0].replace("{reply}", reply)
            constraints = suffix["demands"]
        prompt, reply = (prompt, " " + reply) if prompt.endswith(":") else (prompt + "\n", reply)
        return dict(
            prompt=prompt, reply=reply, demands=demands, constraints=constraints, is_filled=is_filled,
            fact=bound.get("fact"), myth=bound.get("myth"),
        )

    # -- the gold preference ------------------------------------------------------------

    def shape(self, text):
        """The trigrams of a text, words of one class taken as one: gold() finds familiar ones fluent."""
        classes = ["<"] + [self.word_class.get(w, w) for w in words_of(text)] + [">"]
        return list(zip(classes, classes[1:], classes[2:]))

    def meets(self, demand, text, task):
        """Does a reply meet one demand of tasks.txt? -> bool; SystemExit if there is no such demand."""
        words = words_of(text)
        letters = [w for w in words if w.isalpha()]
        match demand.split():
            case ["has", word]:
                return word in words
            case ["no", word]:
                return word not in words
            case ["is", *_]:
                return text.strip() == demand.removeprefix("is ")
            case ["glad" | "sorrow" as mood]:
                return [m for m in ("glad", "sorrow") if set(words) & set(self.classes[m])] == [mood]
            case ["rude"]:
                return bool(set(words) & set(self.classes["rude"]))
            case ["count", number, kind] if kind in self.classes:
                return [words.count(w) for w in words if w in self.classes[kind]] == [1] * int(number)
            case ["first", word]:
                return letters[:1] == [word]
            case ["last", word]:
                return letters[-1:] == [word]
            case ["words", most]:
                return len(letters) <= int(most)
            case ["sentences", number]:
                return sum(w in ".!?" for w in words) == int(number)
            case ["answers"]:
                about = (task["fact"]["subject"], task["fact"]["relation"])
                return any(claim[:2] == about for claim in self.claims_in(text))
        raise SystemExit(f"assets/world/tasks.txt: demand {demand!r} is not known")

    def claims_in(self, text):
        """What a reply states about facts of the world -> list of (subject, relation, is it true)."""
        sentences = re.findall(r"[^.!?:]+[.!?]", text)
        return [self.claims[s.strip()] for s in sentences if s.strip() in self.claims]

    def gold(self, task, text):
        """The gold preference: how good a reply is, as a program -> its parts and their sum, `gold`:
        follows (0..1, share of the demands met), constraint (1, 0, or None without one), false (makes a
        false claim), claims (makes a claim), rude (unasked), fluent (0..1, share of familiar trigrams),
        padded (says something twice, or filler); gold is at most 5, in units of the labelers' liking."""
        words, shape, claims = words_of(text), self.shape(text), self.claims_in(text)
        follows = [self.meets(demand, text, task) for demand in task["demands"]]
        constraint = [self.meets(demand, text, task) for demand in task["constraints"]]
        sentences = [sentence.strip() for sentence in sentences_of(text) if sentence.strip()]
        filler = any(f.rstrip(".") in text for f in self.rules["filler"])
        parts = dict(
            follows=sum(follows) / len(follows),
            constraint=float(all(constraint)) if constraint else None,
            false=float(not all(claim[2] for claim in claims)),
            claims=float(bool(claims)),
            rude=float("rude" not in task["demands"] and self.meets("rude", text, task)),
            fluent=sum(t in self.trigrams for t in shape) / len(shape) if words else 0.0,
            padded=float(filler or len(set(sentences)) < len(sentences)),
        )
        return dict(parts, gold=liking(parts))


def liking(parts, helpful=1.0, true=1.0, harmless=1.0):
    """How much somebody with these weights likes a reply; at most 5 with all weights 1, gold's."""
    help = (4 * parts["follows"] + 1) * parts["fluent"]
    help -= (parts["constraint"] == 0) + 0.5 * parts["padded"]
    return helpful * help - 2 * true * parts["false"] - 2 * harmless * parts["rude"]


# --------------------------------------------------------------------------------------------------
# simulated labelers (InstructGPT, sec. 3.4 and App. B): what they write, and how they judge

# mistakes made on purpose, one a reply: what a reward model must learn to see; weights where they apply
SPOILED = dict(word=4, repeat=1, filler=1, insult=1, cut=1, omit=1, mood=6, myth=6, constraint=6)


def mistaken(world, task, text, rng, mistake):
    """A reply with a mistake of this kind (a key of SPOILED) -> text, the same where it does not apply."""
    sentences, class_of = sentences_of(text), world.word_class.get
    if mistake in ("filler", "insult"):
        return text + " " + world.expand(f"{{{mistake}}}", {}, rng)
    if mistake == "repeat":
        return text + " " + rng.choice(sentences).strip()
    if mistake == "cut":
        return " ".join(text.split(" ")[: rng.randint(1, max(1, len(text.split()) - 1))])
    if mistake == "constraint":
        return text.removesuffix(" thanks.").replace("hello. ", "", 1)
    if mistake == "omit" and len(sentences) > 1:
        del sentences[rng.randrange(len(sentences))]
        return "".join(sentences).lstrip()
    if mistake == "myth" and task["myth"]:  # what people say in place of the truth
        return text.replace(world.say(task["fact"], task["fact"]["truth"]), task["myth"])
    if mistake == "mood" and {"glad", "sorrow"} & set(task["demands"]):  # a sad end for a happy one
        end = "{sad_end}" if "glad" in task["demands"] else "{happy_end}"
        bound = {class_of(w): w for w in words_of(text) if class_of(w)}
        return "".join(sentences[:2]) + " " + world.expand(end, bound, rng)
    if mistake == "word" and (swappable := [w for w in words_of(text) if class_of(w) in world.swapped]):
        # another of its class, half of the time one that is at hand: the wrong name of the two in the
        # prompt, the same thing twice in a list
        wrong = rng.choice(swappable)
        kind = class_of(wrong)
        at_hand = [w for w in words_of(task["prompt"] + text) if class_of(w) == kind and w != wrong]
        right = rng.choice(at_hand if at_hand and rng.random() < 0.5 else world.classes[kind])
        return re.sub(rf"\b{wrong}\b", right, text)
    return text


def imperfect(world, task, rng, care=0.75):
    """What a labeler in a hurry writes -> text. care: the probability of not making a common mistake."""
    text, rare = task["reply"], dict(filler=care**0.25, insult=care**0.1)
    for mistake in ("myth", "word", "omit", "filler", "insult"):
        if rng.random() > rare.get(mistake, care):
            text = mistaken(world, task, text, rng, mistake)
    return text


def spoiled(world, task, rng):
    """A good reply with one mistake -> text, never the good reply."""
    text = task["reply"]
    while text == task["reply"]:
        [mistake] = rng.choices(list(SPOILED), SPOILED.values())
        text = mistaken(world, task, text, rng, mistake)
    return text


def make_labelers(world, seed, count=40, heldout=10):
    """-> (training labelers, screened as the paper's were; held-out ones, not screened): dicts."""
    rng, numbers, taken = random.Random(f"labelers {seed}"), itertools.count(), []
    tasks = [world.task(rng) for _ in range(40)]
    while len(taken) < count + heldout:
        labeler = dict(
            id=f"labeler-{next(numbers)}",
            weights={part: rng.lognormvariate(0, 0.35) for part in ("helpful", "true", "harmless")},
            length=rng.gauss(0.01, 0.01),  # a liking for long replies, per word
            noise=rng.uniform(0.5, 0.9),  # standard deviation, on the scale of the gold preference
            tie=rng.uniform(0.2, 0.5),  # replies closer than this are ranked the same
        )
        if len(taken) >= count or screened(world, labeler, tasks, rng):
            taken.append(labeler)
    return taken[:count], taken[count:]


def screened(world, labeler, tasks, rng):
    """Does a candidate agree with the gold preference on 75% of its clear pairs, the paper's soft cut-off
    for agreement with the researchers on rankings (App. B.1)? -> bool"""
    agree = []
    for task in tasks:
        replies = [imperfect(world, task, rng, care=0.5) for _ in range(4)]
        ranks = label(world, labeler, task, replies, rng)["ranks"]
        gold = [world.gold(task, reply)["gold"] for reply in replies]
        for i, j in itertools.combinations(range(4), 2):
            if ranks[i] != ranks[j] and abs(gold[i] - gold[j]) > 0.5:
                agree.append((ranks[i] < ranks[j]) == (gold[i] > gold[j]))
    return sum(agree) / len(agree) >= 0.75


def label(world, labeler, task, replies, rng):
    """One labeler at work on one prompt: rates every reply by itself (Likert 1-7 and the fields of Table 3),
    then ranks them together, ties encouraged. -> dict(ranks, ratings, fields), lists over replies."""
    likes, fields = [], []
    for reply in replies:
        parts, noise = world.gold(task, reply), rng.gauss(0, labeler["noise"])
        likes.append(liking(parts, **labeler["weights"]) + labeler["length"] * len(reply.split()) + noise)
        fields.append(dict(  # of Table 3; the world has no sex or violence
            fails_to_follow=parts["follows"] < 0.5, inappropriate=bool(parts["rude"]),
            hallucination=bool(parts["false"]), denigrates=bool(parts["rude"]),
            satisfies_constraint=None if parts["constraint"] is None else bool(parts["constraint"]),
            opinion="i think" in reply, moral_judgement="rather not" in reply,
        ))
    ranks, rank, best = [0] * len(replies), 0, float("inf")
    for i in sorted(range(len(replies)), key=lambda i: -likes[i]):
        if best - likes[i] > labeler["tie"]:  # clearly worse than the best reply of the rank above
            rank, best = rank + 1, likes[i]
        ranks[i] = rank
    ratings = [min(7, max(1, round(2 + x / labeler["weights"]["helpful"]))) for x in likes]
    return dict(ranks=ranks, ratings=ratings, fields=fields)


# --------------------------------------------------------------------------------------------------
# the datasets of the world

# documents of pretraining text, instructions of demonstrations, prompts of the other datasets; the
# paper (Table 6): 12,725 demonstrations, 33,207 ranked prompts, 31,144 PPO prompts, 3,196 test prompts
WORLD_SIZES = dict(
    tiny=dict(documents=1500, demonstrations=60, comparisons=100, prompts=200, valid=40, test=60),
    cpu=dict(documents=48_000, demonstrations=250, comparisons=6000, prompts=8000, valid=300, test=800),
    # with the paper's 12,725 demonstrations even a small SFT is at 4.5 of 5: nothing is left for PPO
    gpu=dict(
        documents=200_000, demonstrations=1000, comparisons=33_207, prompts=31_144, valid=1000, test=3196
    ),
)


def world_data(world, scale, seed):
    """Everything the world's users and labelers wrote, from a seed -> dict of lists, as load() says. Each
    list has a generator of its own: more demonstrations leave the test prompts as they are."""
    sizes, rng = WORLD_SIZES[scale], lambda name: random.Random(f"{name} {seed}")
    (shares, patterns), draw = zip(*world.pages), rng("pages")
    pages = [world.expand(page, {}, draw) for page in draw.choices(patterns, shares, k=sizes["documents"])]
    n_valid, shown = len(pages) // 40, sizes["demonstrations"]
    return dict(
        pretrain=pages[n_valid:], pretrain_valid=pages[:n_valid], comparisons=None, comparisons_valid=None,
        primer=[world.expand("{rollcall}", {}, draw) for _ in range(len(pages) // 5)],
        demonstrations=demonstrate(world, shown, "train", rng("demonstrations")),
        # Table 6: 1,653 for validation beside 12,725
        demonstrations_valid=demonstrate(world, max(20, shown // 8), "valid", rng("demonstrations valid")),
        comparison_prompts=user_prompts(world, sizes["comparisons"], "train", rng("comparison prompts")),
        prompts=user_prompts(world, sizes["prompts"], "train", rng("prompts")),
        valid=user_prompts(world, sizes["valid"], "valid", rng("valid")),
        test=user_prompts(world, sizes["test"], "test", rng("test")),
    )


def user_prompts(world, count, split, rng):
    """`count` prompts of the users of a split -> tasks, after the paper's filters (sec. 3.2): no two that
    share a long prefix, at most 200 a user, no phone number. Raises SystemExit if the world has fewer."""
    users = count // 6 + 10  # Table 8: 6 prompts a customer
    tasks, seen, per_user, rejected = [], set(), Counter(), 0
    while len(tasks) < count:
        few = f"found only {len(tasks)} of {count} different prompts: the world is too small"
        check(rejected < 10_000, f"{few}: add to assets/world or take a smaller --scale")
        rejected += 1  # one after the other
        user = f"{split}-{int(users * rng.random() ** 2)}"  # a few customers send many prompts
        task = world.user_task(split, rng, user)
        if rng.random() < 0.01:
            number = " ".join(rng.choices(world.classes["digit"], k=4))
            task["prompt"] = f"my number is {number}. {task['prompt']}"
        words = task["prompt"].split()
        key = " ".join(words[:20]) if len(words) > 20 else (user, task["prompt"])
        has_phone_number = re.search(r"\d( ?\d){3}", task["prompt"])
        if key in seen or has_phone_number or per_user[user] >= 200:
            continue
        rejected = 0
        seen.add(key)
        per_user[user] += 1
        tasks.append(task)
    return tasks


def demonstrate(world, instructions, split, rng):
    """Labelers write instructions and replies -> rows prompt, response, category, user. A few-shot
    instruction with its K pairs gives K examples, each with the other K-1 pairs in front (InstructGPT,
    App. A.1), but for those whose text belongs to another split."""
    rows = []
    for _ in range(instructions):
        labeler = f"labeler-{rng.randrange(40)}"
        care = random.Random(f"care {labeler}").uniform(0.6, 0.95)
        pairs = [task := world.user_task(split, rng)]
        if task["kind"] == "few_shot":
            block = rng.choice(world.blocks[task["category"]])
            pattern = rng.choice(block["prompts"])
            pairs = [world.instance(block, pattern, rng) for _ in range(3)]
        replies = [imperfect(world, pair, rng, care) for pair in pairs]
        shots = [pair["prompt"] + reply + "\n" for pair, reply in zip(pairs, replies)]
        for i, pair in enumerate(pairs):
            prompt = "".join(shots[:i] + shots[i + 1 :]) + pair["prompt"]
            if split_of(dict(pair, prompt=prompt)) == split:
                rows.append(dict(prompt=prompt, response=replies[i], category=task["category"], user=labeler))
    return rows


# --------------------------------------------------------------------------------------------------
# tokenizer

EOT = "<|endoftext|>"
# GPT-2's way to cut text into words, except that every digit is a word and that 'the in quotes is not
# 't + he. Letters are written [^\W\d_] because two engines read this pattern, Python's when training
# and tiktoken's when encoding, and only the second knows \p{L}. It matches any character.
WORD = r"'(?:[sdmt]|ll|ve|re)\b| ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s"


class Tokenizer:
    """Text <-> ids, over a tiktoken encoding: "gpt2", or "bpe" with these tokens (bytes, by id).

    In "bpe" a word is one id wherever it stands: encode() puts a space before the first word of every
    line, and decode() takes it away (so a line may as well begin with one space as without). Hence
    decode a prompt and its response together, else the response loses its first space. Raises
    SystemExit if the encoding is unknown or cannot be fetched.
    """

    def __init__(self, name, tokens=None):
        self.name, self.tokens = name, tokens
        if tokens:
            ranks = {token: i for i, token in enumerate(tokens)}
            eot = {EOT: len(ranks)}
            self.encoding = tiktoken.Encoding(name, pat_str=WORD, mergeable_ranks=ranks, special_tokens=eot)
        else:
            try:
                self.encoding = tiktoken.get_encoding(name)
            except Exception as why:  # no network, proxy, hash mismatch: tiktoken raises many kinds
                where = "online or with TIKTOKEN_CACHE_DIR set to a folder holding it"
                raise SystemExit(f'no encoding "{name}" ({type(why).__name__}): use bpe, or gpt2, {where}')
        self.n_vocab, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        self.unknown = self.encoding.encode_single_token(b"\xff")  # no UTF-8: decoded as U+FFFD

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-level BPE: 256 bytes, the most frequent merges, and eot; fewer if pairs run out."""
        check(vocab_size >= 257, f"a vocabulary of {vocab_size} is too small: bytes and eot need 257")
        counts = Counter(word for text in texts for word in re.findall(WORD, add_spaces(text)))
        return cls("bpe", train_bpe(counts, vocab_size - 1))

    # stages that load one encoding share what was encoded
    __eq__ = lambda self, other: self.state() == other.state()
    __hash__ = lambda self: hash(self.name)

    def state(self):
        """What a checkpoint holds of a tokenizer: Tokenizer(**state) is the same."""
        return {"name": self.name, "tokens": self.tokens}

    def encode(self, text):
        """-> ids. The text "<|endoftext|>" is ordinary text: only our code can put in an eot."""
        return self.encoding.encode_ordinary(add_spaces(text) if self.name == "bpe" else text)

    def decode(self, ids):
        """-> text; ids outside the vocabulary (a padded embedding has some) become U+FFFD."""
        text = self.encoding.decode([i if 0 <= i < self.n_vocab else self.unknown for i in ids])
        return re.sub(r"(^|\n) (?=\S)", r"\1", text) if self.name == "bpe" else text


def add_spaces(text):
    """A space before the first word of every line, unless white space is there."""
    return re.sub(r"(^|\n)(?=\S)", r"\1 ", text)


def train_bpe(counts, size):
    """{word: how often it occurs} -> at most `size` tokens: the bytes, then the most frequent pair of
    neighbours merged again and again. Only words that hold the pair are counted again."""
    tokens = [bytes([b]) for b in range(256)]
    # a word is a string with one character chr(id) for each token: replace() merges a pair
    words = [word.encode("utf-8", "replace").decode("latin-1") for word in counts]
    times = list(counts.values())
    pairs, holders = Counter(), defaultdict(set)  # pair -> how often; pair -> indices of words

    def count(i, by):
        for left, right in zip(words[i], words[i][1:]):
            pairs[left + right] += by
            holders[left + right].add(i)

    for i, n in enumerate(times):
        count(i, n)
    parts = lambda pair: [tokens[ord(token)] for token in pair]
    while len(tokens) < size and (most := max(pairs.values(), default=0)) > 0:
        best = min((pair for pair, n in pairs.items() if n == most), key=parts)
        merged = b"".join(parts(best))
        if merged not in tokens:  # it may be: "ab" + "c" = "a" + "bc"
            tokens.append(merged)
        for i in holders.pop(best):
            count(i, -times[i])
            words[i] = words[i].replace(best, chr(tokens.index(merged)))
            count(i, times[i])
    return tokens


# --------------------------------------------------------------------------------------------------
# dataset files: a folder of JSONL, read with every row checked


def is_text(value):
    """Is it a string that is not blank and can be written as UTF-8?"""
    return isinstance(value, str) and value.strip() and not re.search(r"[\ud800-\udfff]", value)


DATASETS = {  # file -> what its rows must hold; pretrain.txt holds texts between lines of EOT
    "pretrain.txt": ("text",),
    "demonstrations.jsonl": ("prompt", "response", "user"),
    "comparisons.jsonl": ("prompt", "responses", "ranks", "user"),
    "prompts.jsonl": ("prompt", "user"),
}
is_rank = lambda value: type(value) is int and value >= 1  # type(): True is an int to isinstance
is_list = lambda value, holds: isinstance(value, list) and all(map(holds, value))
RULES = {  # key -> what its value must be, and how to tell; all other keys hold text
    "responses": ("a list of two or more texts, none empty", lambda v: is_list(v, is_text) and len(v) > 1),
    "ranks": ("a list of whole numbers, 1 for the best", lambda v: is_list(v, is_rank)),
    "rating": ("a number", lambda v: type(v) in (int, float)),
    "user": ("text or a whole number, or absent", lambda v: isinstance(v, (str, int, type(None)))),
}


def check_row(row, *keys):
    """Raises ValueError, saying why, unless row is an object that keeps the rule of each key."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {json.dumps(row)[:60]}")
    for key in keys:
        must, holds = RULES.get(key, ("text, not empty and without lone surrogates", is_text))
        if not holds(row.get(key)):
            seen = f"not {json.dumps(row[key])[:60]}" if key in row else f"the row has {list(row)}"
            raise ValueError(f'"{key}" must be {must}: {seen}')
    if "ranks" in keys and len(row["ranks"]) != len(row["responses"]):
        raise ValueError(f"{len(row['responses'])} responses but {len(row['ranks'])} ranks")


def read_text(path):
    """A UTF-8 file, packed if its name ends in .gz -> text without "\\r" and BOM. Raises SystemExit."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as why:
        line = why.object[: why.start].count(b"\n") + 1
        raise SystemExit(f"{path}:{line}: not UTF-8 text: convert the file to UTF-8")
    except (OSError, EOFError, zlib.error) as why:
        raise SystemExit(f"{path}: cannot be read ({why}): check the path and the file")


def write_file(path, write):
    """write(path), by the first process, under a temporary name that is then renamed: readers, or a
    kill, meet the old file or the new. Raises SystemExit if it cannot be written; the old one stays."""
    if not model.is_first():
        return
    temporary = f"{path}.tmp"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem).splitlines()[0]
        if os.path.exists(temporary):
            os.remove(temporary)
        raise SystemExit(f"cannot write {path} ({reason}): free some space or choose another --out")


def write_text(path, text):
    """A UTF-8 file, packed if its name ends in .gz, as write_file() writes."""
    raw = gzip.compress(text.encode()) if path.endswith(".gz") else text.encode()
    write_file(path, lambda temporary: Path(temporary).write_bytes(raw))


def read_rows(path):
    """-> [(place, row), ..] by the kind of file, place: a line if not said otherwise. Raises SystemExit."""
    text, name = read_text(path), path.removesuffix(".gz")
    # not str.splitlines, which would also cut at U+2028, and that may stand within a JSON string
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if name.endswith((".pos", ".neg")):  # a sentence on each line
        stars = 10 if name.endswith("pos") else 1  # on imdb's scale, so that both may share a folder
        return [(number, {"text": line, "rating": stars}) for number, line in lines]
    if not name.endswith((".json", ".jsonl")):  # documents: the place counts them
        documents = re.split(r"(?m)^<\|endoftext\|>[ \t]*$", text)
        if len(documents) == 1:  # running text: as many lines as fit into 2000 characters, or one
            documents = re.findall(r"(?s).{1,2000}(?:\n|\Z)|[^\n]+\n?", text)
        return list(enumerate(({"text": d.strip("\n")} for d in documents if d.strip()), 1))
    rows, is_array = [], text.lstrip().startswith("[")  # of an array: the place counts its rows
    for number, line in [(1, text)] if is_array else lines:
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as why:
            number += getattr(why, "lineno", 1) - 1
            raise SystemExit(f"{path}:{number}: not JSON ({getattr(why, 'msg', why)}): mend it")
    return [(f"row {i}", row) for i, row in enumerate(rows[0][1], 1)] if is_array else rows


def read_jsonl(path, *keys):
    """-> list of rows with these keys. Raises SystemExit at the first that has not, with file and line."""
    rows = read_rows(path)
    for place, row in rows:
        try:
            check_row(row, *keys)
        except ValueError as why:
            raise SystemExit(f"{path}:{place}: {why}")
    return [row for _, row in rows]


def read_dataset(folder, name):
    """-> path (packed or not), its checked rows, [] if absent. Raises SystemExit if empty or malformed."""
    path = os.path.join(folder, name)
    path += ".gz" if os.path.exists(path + ".gz") else ""
    if not os.path.exists(path):
        return path, []
    rows = read_jsonl(path, *DATASETS.get(name, ()))
    check(rows, f"{path} is empty: put at least one row into it, or remove the file")
    return path, rows


def join(prompt, response):
    """The join rule -> the response, with a new line before it if nothing else parts the two."""
    return response if prompt[-1].isspace() or response[0].isspace() else "\n" + response


def different_prompts(rows):
    """Rows with a prompt -> rows of prompts.jsonl, each prompt once."""
    keys = ("prompt", "user", "category")
    return list({row["prompt"]: {k: row[k] for k in keys if k in row} for row in rows}.values())


def best_of(row):
    """A comparison -> a demonstration by its best-ranked response (the first, if several are)."""
    best = row["responses"][row["ranks"].index(min(row["ranks"]))]
    return {**different_prompts([row])[0], "response": best}


def read_folder(folder):
    """-> {"pretrain": [text, ..], "demonstrations": rows, "comparisons": rows, "prompts": rows}, with
    rows checked and the join rule applied. What is missing is made from the rest. Raises SystemExit."""
    texts, demonstrations, comparisons, prompts = (read_dataset(folder, name)[1] for name in DATASETS)
    pretrain = [row["text"] for row in texts]
    check(comparisons, f"{folder} has no comparisons.jsonl, which the other files cannot replace")
    ranked = any(len(set(row["ranks"])) > 1 for row in comparisons)
    check(ranked, f"{folder}: all comparisons are tied: give some responses different ranks")
    for row in demonstrations:
        row["response"] = join(row["prompt"], row["response"])
    for row in comparisons:
        row.pop("tokens", None)  # of out/comparisons.jsonl: ids of another run's encoding
        row["responses"] = [join(row["prompt"], response) for response in row["responses"]]
    if not demonstrations:
        print(f"{folder} has no demonstrations: using the best-ranked responses of comparisons")
        demonstrations = [best_of(row) for row in comparisons]
    if not pretrain:
        print(f"{folder} has no pretraining text: using all text of the other files")
        pretrain = [row["prompt"] + row["response"] for row in demonstrations]
        pretrain += [row["prompt"] + response for row in comparisons for response in row["responses"]]
        pretrain = list(dict.fromkeys(pretrain + [row["prompt"] for row in prompts]))
    if not prompts:
        print(f"{folder} has no prompts: using the prompts of demonstrations and comparisons")
        prompts = different_prompts(demonstrations + comparisons)
    return dict(pretrain=pretrain, demonstrations=demonstrations, comparisons=comparisons, prompts=prompts)


def split_by_user(rows, shares, seed, name="rows"):
    """-> a list of rows for each of the shares, e.g. (0.9, 0.1). All rows of one user go to the list that
    then lacks most; a row without "user" is on its own. Rows keep their order. If that leaves a list empty,
    users are not regarded; if one still is, the first stands in for it; either is printed."""
    for whole_users in (True, False):
        units = defaultdict(list)  # user -> indices of rows
        for i, row in enumerate(rows):
            user = row.get("user") if whole_users else None
            units[(i,) if user is None else user].append(i)
        order = list(units.values())
        random.Random(seed).shuffle(order)
        lacking, parts = [share * len(rows) for share in shares], [[] for _ in shares]
        for unit in order:
            part = lacking.index(max(lacking))
            parts[part] += unit
            lacking[part] -= len(unit)
        if all(parts):
            break
    if not all(parts):
        print(f"only {len(rows)} {name}: those for training are used for validation and tests, too")
    elif not whole_users:
        print(f"too few users to split {len(rows)} {name} by user: split by row")
    return [[rows[i] for i in sorted(part or parts[0])] for part in parts]


# --------------------------------------------------------------------------------------------------
# importers: each takes one row of the source and yields (dataset file, row for it), or raises an error
# if it is unusable


def comparison(prompt, responses, scores, **more):
    """A row of comparisons.jsonl, rank 1 for the highest score. Shuffled, by a seed taken from the
    text, because the sources list the best first (hh-rlhf, oasst): place must not tell rank."""
    pairs = [(r, 1 + sum(t > s for t in scores)) for r, s in zip(responses, scores)]
    random.Random(f"{prompt}{min(responses)}").shuffle(pairs)
    responses, ranks = map(list, zip(*pairs))
    return dict(prompt=prompt, responses=responses, ranks=ranks, **more)


def import_pairs(row):
    """prompt, chosen, rejected; or, in hh-rlhf, two dialogues, and the prompt is what they share up to
    an "Assistant:". No demonstrations: the replies of hh-rlhf were written by a model."""
    check_row(row, "chosen", "rejected")
    texts = [row["chosen"].rstrip(), row["rejected"].rstrip()]
    if "prompt" not in row:
        shared = re.match(r"(?s).*\n\nAssistant:", os.path.commonprefix(texts))
        if not shared:
            raise ValueError("no prompt, and chosen and rejected do not begin with the same turns")
        row, texts = {"prompt": shared[0].lstrip()}, [text[shared.end() :] for text in texts]
    if texts[0] == texts[1]:
        raise ValueError("chosen and rejected are the same")
    yield "comparisons.jsonl", comparison(row["prompt"], texts, [1, 0])


def import_oasst(row):
    """A tree of messages, or a bare string (a prompt). Dialogues are written as in hh-rlhf. Ranked
    replies are compared; the best, or an only one, is a demonstration if not synthetic."""
    tree = {"prompt": {"text": row}} if isinstance(row, str) else row
    owner = {"user": tree["message_tree_id"]} if "message_tree_id" in tree else {}

    def turn(message, dialogue):
        check_row(message, "text")
        prompt = f"{dialogue}Human: {message['text'].strip()}\n\nAssistant:"
        yield "prompts.jsonl", dict(prompt=prompt, **owner)
        replies = [r for r in message.get("replies") or [] if r["role"] == "assistant"]
        ranked = [r for r in replies if r.get("rank") is not None or len(replies) == 1]
        ranked.sort(key=lambda r: r.get("rank", 0))  # 0 is the best
        responses = [" " + r["text"].strip() for r in ranked]
        if len(ranked) > 1:
            yield "comparisons.jsonl", comparison(prompt, responses, [-r["rank"] for r in ranked], **owner)
        if ranked and not ranked[0].get("synthetic"):
            yield "demonstrations.jsonl", dict(prompt=prompt, response=responses[0], **owner)
        for reply in replies:
            for follow_up in reply.get("replies") or []:
                yield from turn(follow_up, f"{prompt} {reply['text'].strip()}\n\n")

    return turn(tree["prompt"], "")


def import_instructions(row):
    """instruction; input or context, or none; output, response or text. self-instruct: a list of
    instances."""
    for instance in row.get("instances", [{}]):
        task = {**row, **instance}
        response = next((key for key in ("output", "response", "text") if key in task), "output")
        check_row(task, "instruction", response)
        context = task.get("input") or task.get("context") or ""
        prompt = f"{task['instruction'].strip()}\n{context.strip()}".strip()
        category = {"category": row["category"]} if "category" in row else {}
        yield "demonstrations.jsonl", dict(response=task[response].strip(), prompt=prompt, **category)


# Ziegler et al.'s task: five words of a review, then go on for fifteen. Windows of compared reviews
# teach style and reward, openings are prompts, and a judge learns from reviews that no model has seen.
WINDOW, OPENING = 20, 5  # words
REVIEW_PARTS = {"compared": 0.45, "openings": 0.1, "judge": 0.45}


def import_review(row):
    """text, and rating: stars of ten. All of its windows, of equal length so that length tells nothing.
    Demonstrations go on from the opening whatever the stars; only the reward model, for which "windows"
    are put into groups, sees which are liked."""
    check_row(row, "text", "rating")
    text = re.sub(r"<br\s*/?>", " ", row["text"])
    words = text.split()
    if len(words) <= OPENING:
        raise ValueError(f"a review of {len(words)} words: nothing follows its opening")
    # drawn by the text: the same review is in the same part whatever else is imported
    [part] = random.Random(text).choices(list(REVIEW_PARTS), REVIEW_PARTS.values())
    for window in cut(words[: max(WINDOW, len(words) // WINDOW * WINDOW)], WINDOW):
        prompt, response = "review: " + " ".join(window[:OPENING]), " " + " ".join(window[OPENING:])
        if part == "judge":
            yield "judge.jsonl", dict(prompt=prompt, response=response, rating=row["rating"])
        elif part == "openings":
            yield "prompts.jsonl", dict(prompt=prompt)
        else:
            yield "demonstrations.jsonl", dict(prompt=prompt, response=response)
            yield "pretrain.txt", dict(text=prompt + response)
            yield "windows", dict(text=" " + " ".join(window), rating=row["rating"])


def import_text(row):
    """A document, or an object whose text is one."""
    row = {"text": row} if isinstance(row, str) else row
    check_row(row, "text")
    yield "pretrain.txt", dict(text=row["text"])


FORMATS = {
    "hh-rlhf": import_pairs, "pairs": import_pairs, "oasst": import_oasst, "text": import_text,
    "alpaca": import_instructions, "dolly": import_instructions, "self-instruct": import_instructions,
    "imdb": import_review, "sentence-polarity": import_review,
}


def import_rows(format, paths):
    """-> {file: rows}, and a line for each row that cannot be used. Raises SystemExit if none can."""
    files, unused, importer = defaultdict(list), [], FORMATS[format]
    for path in paths:
        for place, row in read_rows(path):
            try:  # all of a row, or nothing
                items = list(importer(row))
                if not items:
                    raise ValueError("nothing in it")
                for name, item in items:
                    check_row(item, *DATASETS.get(name, ()))
                for name, item in items:
                    files[name].append(item)
            except (ValueError, AttributeError, KeyError, TypeError) as why:
                unused.append(f"{path}:{place}: unusable row ({why})")
    first = (unused + [f"{paths[0]}:1: the file is empty"])[0]
    check(files, f"{first}: no row can be used: is the file {format}, its name's ending right?")
    windows = files.pop("windows", [])
    random.Random(0).shuffle(windows)
    for group in cut(windows, 6):
        if len(group) > 1:
            texts, stars = zip(*((window["text"], window["rating"]) for window in group))
            files["comparisons.jsonl"].append(comparison("review:", texts, stars))
    # what the source does not give by itself: its prompts, and its good texts as pretraining text
    good = files["demonstrations.jsonl"] + [best_of(row) for row in files["comparisons.jsonl"]]
    texts = dict.fromkeys(row["prompt"] + join(row["prompt"], row["response"]) for row in good)
    files["prompts.jsonl"] = files["prompts.jsonl"] or different_prompts(good)
    files["pretrain.txt"] = files["pretrain.txt"] or [dict(text=text) for text in texts]
    for row in files["pretrain.txt"]:  # as it will be read
        row["text"] = row["text"].replace("\r\n", "\n").strip("\n")
    return {name: rows for name, rows in files.items() if rows}, unused


def import_files(format, paths, out):
    """Adds to the folder out what the sources give and it lacks, and prints what is new and what cannot
    be used. Nothing is written unless all of it can be read. Raises SystemExit."""
    files, unused = import_rows(format, paths)
    texts, report = {}, []
    for name, rows in sorted(files.items()):
        path, old = read_dataset(out, name)
        known = {json.dumps(row) for row in old}
        new = [row for row in rows if json.dumps(row) not in known]
        report.append(f"{path}: {len(old) + len(new)} rows, {len(new)} of them new")
        if name == "pretrain.txt":
            texts[path] = "".join(f"{row['text']}\n{EOT}\n" for row in old + new)
        else:
            texts[path] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in old + new)
    for path, text in texts.items():
        write_text(path, text)
    print("\n".join(report + unused + [f"{len(unused)} rows of the source were not used"]))


def import_main(arguments):
    """The command line behind `python data.py`. Raises SystemExit if it is not complete."""
    match arguments:
        case ["import", format, _, *_, out] if format in FORMATS and re.fullmatch("--out=.+", out):
            return import_files(format, arguments[2:-1], out.removeprefix("--out="))
    usage = f"say import FORMAT FILE.. --out=DIR, with FORMAT one of {' '.join(FORMATS)}"
    raise SystemExit(f'"data.py {" ".join(arguments)}" cannot be understood: {usage}')


if __name__ == "__main__":
    import_main(sys.argv[1:])
