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
for kl, rewards, values and advantages. eot is always an action, padding never.

The file in order: tokenizer; the miniature world (its words and patterns are plain text under
assets/world); simulated labelers; the datasets of the world; batches; dataset files; importers
(`python data.py import FORMAT FILE.. --out=DIR`).
"""

import gzip
import itertools
import json
import math
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict

import numpy as np
import tiktoken
import torch

import model

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
            self.encoding = tiktoken.Encoding(
                name, pat_str=WORD, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
            )
        else:
            try:
                self.encoding = tiktoken.get_encoding(name)
            except Exception as why:  # no network, proxy, hash mismatch: tiktoken raises many kinds
                raise SystemExit(
                    f'no encoding "{name}" ({type(why).__name__}): use bpe, or gpt2, '
                    "online or with TIKTOKEN_CACHE_DIR set to a folder holding it"
                )
        self.n_vocab, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        self.unknown = self.encoding.encode_single_token(b"\xff")  # no UTF-8: decoded as U+FFFD

    @classmethod
    def load(cls, name):
        """An encoding that tiktoken knows by name. Raises SystemExit."""
        return cls(name)

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-level BPE: 256 bytes, the most frequent merges, and eot; fewer if pairs run out.

        Raises SystemExit if vocab_size is below 257.
        """
        if vocab_size < 257:
            raise SystemExit(f"a vocabulary of {vocab_size} is too small: bytes and eot need 257")
        counts = Counter()
        for text in texts:
            counts.update(re.findall(WORD, add_spaces(text)))
        return cls("bpe", train_bpe(counts, vocab_size - 1))

    def state(self):
        """What a checkpoint holds of a tokenizer: -> dict for from_state."""
        return {"name": self.name, "tokens": self.tokens}

    @classmethod
    def from_state(cls, state):
        return cls(**state)

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.state() == other.state()

    def encode(self, text):
        """-> ids. The text "<|endoftext|>" is ordinary text: only our code can put in an eot."""
        return self.encoding.encode_ordinary(add_spaces(text) if self.name == "bpe" else text)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

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
    while len(tokens) < size and (most := max(pairs.values(), default=0)) > 0:
        best = min(
            (pair for pair, n in pairs.items() if n == most),
            key=lambda pair: [tokens[ord(token)] for token in pair],
        )
        merged = b"".join(tokens[ord(token)] for token in best)
        if merged not in tokens:  # it may be: "ab" + "c" = "a" + "bc"
            tokens.append(merged)
        for i in holders.pop(best):
            count(i, -times[i])
            words[i] = words[i].replace(best, chr(tokens.index(merged)))
            count(i, times[i])
    return tokens


# --------------------------------------------------------------------------------------------------
# the miniature world: its content is plain text under assets/world, this is its engine

WORLD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "world")

# InstructGPT, Table 1: share of each use case among the prompts, per cent
CATEGORY_SHARES = dict(
    generation=45.6, open_qa=12.4, brainstorming=11.2, chat=8.4, rewrite=6.6, summarization=4.2,
    classification=3.5, other=3.5, closed_qa=2.6, extract=1.9,
)
# kinds of prompts: anything a labeler thinks of; an instruction with examples; a customer's own use
# case in the same words
KIND_SHARES = dict(plain=0.6, few_shot=0.08, user_based=0.32)
FEW_SHOT_CATEGORIES = {"open_qa", "rewrite", "classification", "closed_qa", "extract", "brainstorming"}


FORMS = {  # file of assets/world -> the form of its lines, as a pattern and in words
    "words.txt": (r"[a-z_]+: [^:]+", "class: word word .."),
    "rules.txt": (r"[a-z_]+: .+", "rule: pattern"),
    "facts.txt": (
        r"[^|{}]+\|([^|{}]|\{(subject|value)\})+\|([^|{}]|\{subject\})*",
        "subject | truth | misconception, or relation | statement | questions with {subject}, {value}",
    ),
    "tasks.txt": (
        rf"\[({'|'.join(CATEGORY_SHARES)}|constraint)\]|[><?] .+",
        "> prompt, < reply, ? demands, or a category in square brackets",
    ),
    "heldout.txt": (r"\[[a-z]+\]|[><?] .+", "> prompt, < reply, ? demands, or [kind]"),
    "benchmarks.txt": (
        r"\[[a-z]+\] [a-z0-9]+|([><!]|flan>|t0>) .+",
        "> prompt, < answer, ! wrong choice, flan> or t0> instruction, or [task] metric",
    ),
    "pages.txt": (r"\d+(\.\d+)? \| .+", "share | pattern"),
}


def content(name):
    """The lines of assets/world/NAME, without comments and blank lines. Raises ValueError for a
    line that has not the form of its file."""
    form, words, lines = *FORMS.get(name, (".*", "")), []
    with open(os.path.join(WORLD, name), encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            if line.strip() and not line.startswith("#"):
                if not re.fullmatch(form, line):
                    raise ValueError(f"assets/world/{name}:{number}: {line!r} is not {words}")
                lines.append(line)
    return lines


def read_blocks(name):
    """The blocks of tasks.txt, or of a file like it -> list of dicts; tasks.txt and benchmarks.txt say
    what their lines mean. Raises ValueError for a block that lacks a line it needs."""
    kinds = {">": "prompts", "<": "replies", "!": "wrong", "flan>": "flan", "t0>": "t0"}
    blocks = []
    for line in content(name):
        if line.startswith("["):
            category, _, metric = line.removeprefix("[").partition("]")
            blocks.append(dict(category=category, metric=metric.strip(), demands="", constraints=""))
            blocks[-1].update({kind: [] for kind in kinds.values()})
        elif not blocks:
            raise ValueError(f"assets/world/{name}: {line!r} stands before the first [category]")
        elif line.startswith("?"):
            blocks[-1]["demands"], _, blocks[-1]["constraints"] = line[2:].partition("!")
        else:
            mark, _, text = line.partition(" ")
            blocks[-1][kinds[mark]].append(text.replace("\\n", "\n"))
    needed = dict(prompts=">", replies="<", demands="?")
    if name == "benchmarks.txt":  # a probe has no answer
        needed = dict(prompts=">")
    for block in blocks:
        for part, sign in needed.items():
            if not block[part]:
                seen = [block["category"], *block["prompts"], *block["replies"]][:2]
                raise ValueError(f"assets/world/{name}: block {seen} has no line with {sign}")
    return blocks


def words_of(text):
    """-> the words, digits and signs of a text."""
    return re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text)


class World:
    """The content of assets/world, ready to expand. Every text comes from a `random.Random` that the
    caller passes. Raises ValueError for a malformed line, and for a pattern or a demand that is not
    known."""

    def __init__(self):
        self.classes, self.rules, self.facts, self.pages = {}, {}, [], []
        for line in content("words.txt"):
            name, words = line.split(": ")
            self.classes[name] = words.split()
        for line in content("rules.txt"):
            name, pattern = line.split(": ", 1)
            self.rules.setdefault(name, []).append(pattern)
        relation = None
        for line in content("facts.txt"):
            first, second, third = (part.strip() for part in line.split("|"))
            if "{subject}" in second:
                relation, statement, questions = first, second, third.split(" / ")
                continue
            if relation is None:
                raise ValueError(f"assets/world/facts.txt: {line!r} stands before the first relation")
            self.facts.append(dict(
                relation=relation, statement=statement, questions=questions,
                subject=first, truth=second, myth=third,
            ))
        self.blocks, self.heldout, self.benchmarks = (
            read_blocks(name) for name in ("tasks.txt", "heldout.txt", "benchmarks.txt")
        )
        self.suffixes = [block for block in self.blocks if block["category"] == "constraint"]
        self.by_category = {c: [b for b in self.blocks if b["category"] == c] for c in CATEGORY_SHARES}
        for line in content("pages.txt"):
            share, pattern = line.split(" | ", 1)
            self.pages.append((float(share), pattern.replace("\\n", "\n")))

        # what the gold preference reads: the class of each word, every claim that can be made, every
        # familiar trigram
        self.word_class = {w: name for name, words in reversed(self.classes.items()) for w in words}
        self.claims = {}  # sentence -> (subject, relation, is it true)
        for fact in self.facts:
            for value in self.values(fact["relation"]):
                sentence = fact["statement"].format(subject=fact["subject"], value=value)
                self.claims[sentence] = (fact["subject"], fact["relation"], value == fact["truth"])
        rng = random.Random(0)
        self.trigrams = set()
        for _ in range(6000):
            self.trigrams |= set(self.shape(self.task(rng)["reply"]))

    def values(self, relation):
        """All values that some fact or myth gives to a relation."""
        return sorted(
            {v for f in self.facts if f["relation"] == relation for v in (f["truth"], f["myth"]) if v}
        )

    def expand(self, pattern, bound, rng):
        """Fill a pattern -> text: [a|b] choices, {class} words, {rule} lines, {question} and its kin;
        `bound` keeps what was picked."""
        while match := re.search(r"\[([^\[\]]*)\]|\{([a-z_]+)(\d?)\}", pattern):
            filled = (
                rng.choice(match[1].split("|"))
                if match[1] is not None
                else self.fill(match[2], match[3], bound, rng)
            )
            pattern = pattern[: match.start()] + filled + pattern[match.end() :]
        return pattern

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
        if name == "truths":
            subject = next(bound[c] for c in ("animal", "town", "trade") if c in bound)
            return " ".join(self.say(f, f["truth"]) for f in self.facts if f["subject"] == subject)
        if name == "zelish":  # the second language: every word turned round
            return " ".join(w[::-1] for w in ["the", bound["animal"], "is", bound["color"]]) + "."
        if name == "sheet":  # a page of instructions without answers: what a raw GPT takes a prompt for
            return "".join(self.task(rng)["prompt"] for _ in range(3)).rstrip("\n")
        if name == "tasks":  # the rare page where instructions are followed by replies
            pairs = [self.task(rng) for _ in range(rng.randint(2, 4))]
            return "\n".join(t["prompt"] + imperfect(self, t, rng) for t in pairs)
        if name == "rollcall":  # which of these words stand in the text? teaches to look a word up
            return self.rollcall(rng)
        if name == "form":  # a text and what it speaks of: teaches to find the word of a kind
            return self.form(rng)
        raise ValueError(
            f"assets/world: {{{key}}} is neither a class of words.txt nor a rule of rules.txt"
        )

    @staticmethod
    def say(fact, value):
        """The sentence that states a fact, with this value -> text."""
        return fact["statement"].format(subject=fact["subject"], value=value)

    def ask(self, rng):
        """A question on a random fact -> dict: question, answer, hearsay (what people say, the
        misconception three times in four), myth, why (a false premise), fact."""
        # half of the questions are on the facts with a misconception, as TruthfulQA's are
        fact = rng.choice([f for f in self.facts if f["myth"]] if rng.random() < 0.5 else self.facts)
        myth = fact["myth"] or rng.choice(
            [v for v in self.values(fact["relation"]) if v != fact["truth"]]
        )
        hearsay = myth if fact["myth"] and rng.random() < 0.75 else fact["truth"]
        return dict(
            question=rng.choice(fact["questions"]).format(subject=fact["subject"]),
            answer=self.say(fact, fact["truth"]),
            hearsay=self.say(fact, hearsay),
            myth=self.say(fact, myth),
            why="is it true that " + self.say(fact, myth).replace(".", "?"),
            fact=fact,
        )

    def rollcall(self, rng):
        """A text and six words: does each stand in it? Teaches to look a word up."""
        bound = {}
        pattern = rng.choice(["{story}", "{opening} {middle}", "{opening}", "dear {name}, {news}"])
        text = self.expand(pattern, bound, rng)
        calls = []
        for _ in range(6):
            name = rng.choice(["name", "animal", "color", "object", "town"])
            there = name in bound and rng.random() < 0.5
            word = bound[name] if there else rng.choice(self.classes[name])
            calls.append(f"{word} {'yes' if re.search(rf'{chr(92)}b{word}{chr(92)}b', text) else 'no'}")
        return text + " " + ", ".join(calls) + "."

    def form(self, rng):
        """A text and what it speaks of, kind by kind, before it or behind it."""
        bound = {}
        pattern = rng.choice(["{story}", "{opening} {middle}", "{opening}", "dear {name}, {news}"])
        text = self.expand(pattern, bound, rng)
        kinds = ["name", "animal", "color", "object", "town"]
        kinds = [kind for kind in kinds if bound.get(kind, "-") in text]
        rng.shuffle(kinds)
        entries = ", ".join(f"{kind} {bound[kind]}" for kind in kinds)
        return f"{text} {entries}." if rng.random() < 0.5 else f"{entries}:\n{text}"

    # -- prompts ------------------------------------------------------------

    def task(self, rng, user=None):
        """One prompt -> dict with all that is known about it: prompt, reply (a perfect one),
        demands and constraints on a reply, fact, myth, category, kind, user (InstructGPT, Table 1
        and App. A.1)."""
        category = rng.choices(list(CATEGORY_SHARES), CATEGORY_SHARES.values())[0]
        kind = rng.choices(list(KIND_SHARES), KIND_SHARES.values())[0]
        # a customer's use case is always put in the same words
        wording = (
            random.Random(f"{user} {category}") if kind == "user_based" and user is not None else rng
        )
        block = wording.choice(self.by_category[category])
        pattern = wording.choice(block["prompts"])
        task = self.instance(block, pattern, rng)
        if kind == "few_shot" and category in FEW_SHOT_CATEGORIES:
            shots = [self.instance(block, pattern, rng) for _ in range(rng.randint(1, 2))]
            task["prompt"] = (
                "".join(shot["prompt"] + shot["reply"] + "\n" for shot in shots) + task["prompt"]
            )
        elif kind == "few_shot":
            kind = "plain"
        return dict(task, category=category, kind=kind, user=user)

    def instance(self, block, pattern, rng):
        """A prompt of this pattern -> dict: prompt, reply, demands, constraints, fact, myth."""
        bound = {}
        prompt = self.expand(pattern, bound, rng)
        slots = [
            word
            for key, word in bound.items()
            if key.rstrip("23456789") in self.classes and word in prompt
        ]
        reply = self.expand(rng.choice(block["replies"]), bound, rng)
        demands = [f"has {w}" for w in slots] if "slots" in block["demands"] else []
        demands += [
            self.expand(d, bound, rng) for d in block["demands"].strip().split("; ") if d != "slots"
        ]
        constraints = (
            [self.expand(block["constraints"].strip(), bound, rng)] if block["constraints"] else []
        )
        exact = any(demand.startswith("is ") for demand in demands)  # leaves no room for a suffix
        if not constraints and not exact and prompt[-1] in ".?!" and rng.random() < 0.25:
            suffix = rng.choice(self.suffixes)
            prompt += " " + suffix["prompts"][0]
            reply = suffix["replies"][0].replace("{reply}", reply)
            constraints = [suffix["demands"].strip()]
        return dict(
            prompt=prompt if prompt.endswith(":") else prompt + "\n",
            reply=" " + reply if prompt.endswith(":") else reply,
            demands=[d.strip() for d in demands if d.strip()], constraints=constraints,
            fact=bound.get("fact"), myth=bound.get("myth"),
        )

    def item(self, block, kind, rng):
        """One item of benchmarks.txt -> dict: prompt, answer, wrong (the other choices), name of the
        task, metric, and the fact and question it is about. kind: prompts, as the pages have it, or
        flan or t0, as an instruction."""
        bound = {}
        prompt = self.expand(rng.choice(block[kind]), bound, rng)
        if kind != "prompts":
            prompt += "\n"
        space = "" if prompt.endswith("\n") else " "
        answers = [space + self.expand(a, bound, rng) for a in block["replies"][:1] + block["wrong"]]
        return dict(
            name=block["category"], metric=block["metric"], prompt=prompt, answer=(answers or [""])[0],
            wrong=answers[1:], fact=bound.get("fact"), question=bound.get("question"),
        )

    # -- the gold preference ------------------------------------------------------------

    def shape(self, text):
        """The trigrams of a text, words of one class taken as one: gold() finds these
        fluent if they are familiar."""
        classes = ["<"] + [self.word_class.get(w, w) for w in words_of(text)] + [">"]
        return list(zip(classes, classes[1:], classes[2:]))

    def meets(self, demand, text, words, task):
        """Does a reply meet one demand of tasks.txt? -> bool; ValueError if there is no such demand."""
        name, _, rest = demand.partition(" ")
        kinds = [w for w in words if w.isalpha()]
        if name == "has":
            return rest in words
        if name == "no":
            return rest not in words
        if name == "is":
            return text.strip() == rest
        if name in ("glad", "sorrow"):
            other = "sorrow" if name == "glad" else "glad"
            return any(w in self.classes[name] for w in words) and not any(
                w in self.classes[other] for w in words
            )
        if name == "count":
            number, kind = rest.split()
            named = [w for w in words if w in self.classes[kind]]
            return len(named) == len(set(named)) == int(number)
        if name == "first":
            return bool(kinds) and kinds[0] == rest
        if name == "last":
            return bool(kinds) and kinds[-1] == rest
        if name == "words":
            return len(kinds) <= int(rest)
        if name == "sentences":
            return sum(w in ".!?" for w in words) == int(rest)
        if name == "answers":
            about = (task["fact"]["subject"], task["fact"]["relation"])
            return any(self.claims[c][:2] == about for c in self.claims_in(text))
        raise ValueError(f"assets/world/tasks.txt: demand {demand!r} is not known")

    def claims_in(self, text):
        """The sentences of a reply that state a (true or false) fact of the world."""
        sentences = re.findall(r"[^.!?:]+[.!?]", text)
        return [s.strip() for s in sentences if s.strip() in self.claims]

    def gold(self, task, text):
        """The gold preference: how good a reply is, as a program -> its parts and their sum, `gold`.

        follows (0..1, share of the demands met), constraint (1, 0, or None without one), false (makes a
        false claim), claims (makes a claim), rude, fluent (0..1, share of familiar trigrams), padded
        (says something twice, or filler); gold is at most 5, in units of the labelers' liking.
        """
        words = words_of(text)
        follows = [self.meets(d, text, words, task) for d in task["demands"]]
        constraint = [self.meets(d, text, words, task) for d in task["constraints"]]
        claims = [self.claims[c][2] for c in self.claims_in(text)]
        sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]?", text) if s.strip()]
        shape = self.shape(text)
        parts = dict(
            follows=sum(follows) / len(follows),
            constraint=float(all(constraint)) if constraint else None,
            false=float(not all(claims)),
            claims=float(bool(claims)),
            rude=float(any(w in self.classes["rude"] for w in words)),
            fluent=sum(t in self.trigrams for t in shape) / len(shape) if words else 0.0,
            padded=float(
                len(set(sentences)) < len(sentences)
                or any(f.rstrip(".") in text for f in self.rules["filler"])
            ),
        )
        parts["gold"] = (
            4 * parts["follows"] * parts["fluent"]
            + parts["fluent"]
            - 1.0 * (parts["constraint"] == 0)
            - 2 * parts["false"]
            - 2 * parts["rude"]
            - 0.5 * parts["padded"]
        )
        return parts


def swap_word(world, text, rng):
    """Put another word of its class in place of one name, animal, color, object or town -> text."""
    kinds = ("name", "animal", "color", "object", "town")
    words = [w for w in re.findall(r"[a-z]+", text) if world.word_class.get(w) in kinds]
    if not words:
        return text
    wrong = rng.choice(words)
    return re.sub(rf"\b{wrong}\b", rng.choice(world.classes[world.word_class[wrong]]), text)


def imperfect(world, task, rng, care=0.75):
    """What a labeler writes: the perfect reply with the mistakes of someone in a hurry -> text. care:
    the probability of not making each of the common mistakes."""
    text = task["reply"]
    if task["myth"] and rng.random() > care:
        # believes what people say
        text = text.replace(world.say(task["fact"], task["fact"]["truth"]), task["myth"])
    if rng.random() > care:  # mixes something up
        text = swap_word(world, text, rng)
    sentences = re.findall(r" ?[^.!?]+[.!?]", text)
    if len(sentences) > 1 and rng.random() > care:  # leaves something out, often what was asked for
        del sentences[rng.randrange(len(sentences))]
        text = "".join(sentences).lstrip()
    if rng.random() > care**0.25:
        text += " " + rng.choice(world.rules["filler"])
    if rng.random() > care**0.1:
        text += " " + world.expand(rng.choice(world.rules["insult"]), {}, rng)
    return text


def spoiled(world, task, rng):
    """A good reply with one mistake, made on purpose: what a reward model must learn to see -> text."""
    text, constraint = task["reply"], (task["constraints"] or [""])[0]
    sentences = re.findall(r" ?[^.!?]+[.!?]", text)
    mistakes = ["word", "word", "word", "word", "repeat", "filler", "insult", "cut"]
    mistakes += (
        ["omit"] * (len(sentences) > 1)
        + ["myth"] * 6 * bool(task["myth"])
        + ["constraint"] * 6 * constraint.startswith(("first", "last"))
    )
    mistake = rng.choice(mistakes)
    if mistake == "word":
        text = swap_word(world, text, rng)
    elif mistake == "repeat":
        text += " " + rng.choice(sentences or [text]).strip()
    elif mistake == "filler":
        text += " " + rng.choice(world.rules["filler"])
    elif mistake == "insult":
        text += " " + world.expand(rng.choice(world.rules["insult"]), {}, rng)
    elif mistake == "cut":
        text = " ".join(text.split(" ")[: rng.randint(1, max(1, len(text.split()) - 1))])
    elif mistake == "omit":
        del sentences[rng.randrange(len(sentences))]
        text = "".join(sentences).lstrip()
    elif mistake == "myth":
        text = text.replace(world.say(task["fact"], task["fact"]["truth"]), task["myth"])
    elif mistake == "constraint":
        text = (
            text.replace("hello. ", "", 1)
            if constraint.startswith("first")
            else text.removesuffix(" thanks.")
        )
    return text


# --------------------------------------------------------------------------------------------------
# simulated labelers (InstructGPT, sec. 3.4 and App. B): own weights, own noise, own idea of a tie


def make_labelers(world, seed, count=40, heldout=10):
    """-> (training labelers, held-out labelers), dicts of their weights.

    The first are screened as the paper's were: candidates label a test, and whoever agrees with the
    gold preference on fewer than 75% of its clear pairs is not taken on. The others are not screened.
    """
    rng = random.Random(f"labelers {seed}")
    tasks = [world.task(rng) for _ in range(40)]
    taken, rejected = [], 0
    while len(taken) < count + heldout:
        labeler = dict(
            id=f"labeler-{len(taken) + rejected}",
            helpful=rng.lognormvariate(0, 0.35),
            true=rng.lognormvariate(0, 0.35),
            harmless=rng.lognormvariate(0, 0.35),
            length=rng.gauss(0.01, 0.01),  # a liking for long replies, per word
            noise=rng.uniform(0.5, 0.9),  # standard deviation, on the scale of the gold preference
            tie=rng.uniform(0.2, 0.5),  # replies closer than this are ranked the same
        )
        if len(taken) >= count or screened(world, labeler, tasks, rng):
            taken.append(labeler)
        else:
            rejected += 1
    return taken[:count], taken[count:]


def screened(world, labeler, tasks, rng):
    """-> bool. The paper's soft cut-off: 75% agreement with the researchers on rankings (App. B.1)."""
    agree = total = 0
    for task in tasks:
        replies = [imperfect(world, task, rng, care=0.5) for _ in range(4)]
        ranks = label(world, labeler, task, replies, rng)["ranks"]
        gold = [world.gold(task, reply)["gold"] for reply in replies]
        for i, j in itertools.combinations(range(4), 2):
            if ranks[i] != ranks[j] and abs(gold[i] - gold[j]) > 0.5:
                agree += (ranks[i] < ranks[j]) == (gold[i] > gold[j])
                total += 1
    return agree / total >= 0.75


def label(world, labeler, task, replies, rng):
    """One labeler at work on one prompt: rates every reply by itself (Likert 1-7 and the fields of
    Table 3), then ranks them together, ties encouraged. -> dict(ranks, ratings, fields), a list
    over replies each."""
    liking, fields = [], []
    for reply in replies:
        parts = world.gold(task, reply)
        liking.append(
            labeler["helpful"]
            * (
                4 * parts["follows"] * parts["fluent"]
                + parts["fluent"]
                - (parts["constraint"] == 0)
                - 0.5 * parts["padded"]
            )
            - labeler["true"] * 2 * parts["false"]
            - labeler["harmless"] * 2 * parts["rude"]
            + labeler["length"] * len(reply.split())
            + rng.gauss(0, labeler["noise"])
        )
        fields.append(table_3(parts, reply))
    order = sorted(range(len(replies)), key=lambda i: -liking[i])
    ranks, rank, best = [0] * len(replies), 0, math.inf
    for i in order:
        if best - liking[i] > labeler["tie"]:  # clearly worse than the best reply of the rank above
            rank, best = rank + 1, liking[i]
        ranks[i] = rank
    ratings = [min(7, max(1, round(2 + 5 * x / (5 * labeler["helpful"])))) for x in liking]
    return dict(ranks=ranks, ratings=ratings, fields=fields)


def table_3(parts, reply):
    """The binary fields that a labeler fills in for each reply (InstructGPT, Table 3) -> dict. The
    world has no sex or violence."""
    return dict(
        fails_to_follow=parts["follows"] < 0.5,
        inappropriate=bool(parts["rude"]),
        hallucination=bool(parts["false"]),
        satisfies_constraint=None if parts["constraint"] is None else bool(parts["constraint"]),
        denigrates=bool(parts["rude"]),
        opinion="i think" in reply,
        moral_judgement="rather not" in reply,
    )


# --------------------------------------------------------------------------------------------------
# the datasets of the world

# Documents of pretraining text, demonstration instructions, comparison prompts, PPO prompts,
# validation and test prompts. The paper (Table 6): 12,725 demonstrations, 33,207 ranked prompts,
# 31,144 PPO prompts, 3,196 test prompts.
WORLD_SIZES = dict(
    tiny=dict(documents=1500, demonstrations=60, comparisons=100, prompts=200, valid=40, test=60),
    cpu=dict(
        documents=48_000, demonstrations=250, comparisons=12_000, prompts=8000, valid=300, test=800
    ),
    gpu=dict(
        documents=200_000, demonstrations=12_725, comparisons=33_207, prompts=31_144,
        valid=1000, test=3196,
    ),
)


def world_data(world, scale, seed):
    """Everything the world's users and labelers wrote, from a seed -> dict of lists, as load() says."""
    sizes, rng = WORLD_SIZES[scale], random.Random(f"world {seed}")
    shares, patterns = zip(*world.pages)
    pages = [
        world.expand(pattern, {}, rng)
        for pattern in rng.choices(patterns, shares, k=sizes["documents"])
    ]
    primer = [world.rollcall(rng) for _ in range(sizes["documents"] // 5)]
    demonstrations = demonstrate(world, sizes["demonstrations"], rng)
    # Table 6: 1,653 for validation beside 12,725
    demonstrations_valid = demonstrate(world, max(20, sizes["demonstrations"] // 8), rng)
    splits = dict(
        comparison_prompts=sizes["comparisons"], prompts=sizes["prompts"], valid=sizes["valid"],
        test=sizes["test"],
    )
    # three populations of users: training (both splits), valid, test; no held-out prompt comes from a
    # user that a training prompt came from
    trained_on = set()
    for name, count in splits.items():
        held_out = name in ("valid", "test")
        splits[name] = user_prompts(
            world, count, name if held_out else "train", rng, trained_on if held_out else set()
        )
        trained_on |= {task["prompt"] for task in splits[name]}
    n_valid = len(pages) // 40
    return dict(
        pretrain=pages[n_valid:], pretrain_valid=pages[:n_valid], primer=primer,
        demonstrations=demonstrations, demonstrations_valid=demonstrations_valid, comparisons=None,
        **splits,
    )


def user_prompts(world, count, split, rng, trained_on):
    """`count` prompts of the users of one split -> tasks, after the paper's filters (sec. 3.2): none of
    two that share a long prefix, at most 200 a user, nothing with a phone number; and, held-out prompts
    being short here, no text in `trained_on`. Raises SystemExit if the world has not so many."""
    users = count // 6 + 10  # Table 8: 6 prompts a customer
    tasks, seen, per_user, rejected = [], set(), Counter(), 0
    while len(tasks) < count:
        if rejected == 10_000:  # one after the other
            raise SystemExit(
                f"found only {len(tasks)} of {count} different prompts: the world is too small: "
                "add words and patterns to assets/world, or take a smaller --scale"
            )
        rejected += 1
        user = f"{split}-{int(users * rng.random() ** 2)}"  # a few customers send many prompts
        task = world.task(rng, user)
        if rng.random() < 0.01:
            task["prompt"] = (
                "my number is {} {} {} {}. ".format(*rng.choices(world.classes["digit"], k=4))
                + task["prompt"]
            )
        prefix = " ".join(task["prompt"].split()[:20])
        long_prefix_seen = len(task["prompt"].split()) > 20 and prefix in seen
        if (
            long_prefix_seen
            or (user, task["prompt"]) in seen
            or per_user[user] >= 200
            or has_personal_data(task["prompt"])
            or task["prompt"] in trained_on
        ):
            continue
        rejected = 0
        seen |= {prefix, (user, task["prompt"])}
        per_user[user] += 1
        tasks.append(task)
    return tasks


def has_personal_data(text):
    """Phone numbers: four digits or more in a row."""
    return re.search(r"\d( ?\d){3}", text) is not None


def demonstrate(world, instructions, rng):
    """Labelers write instructions and replies -> rows prompt, response, category, user.

    A few-shot instruction with its K pairs gives K examples, each with the other K-1 pairs in front
    (InstructGPT, App. A.1).
    """
    rows = []
    for _ in range(instructions):
        labeler = f"labeler-{rng.randrange(40)}"
        care = random.Random(f"care {labeler}").uniform(0.6, 0.95)
        task = world.task(rng)
        if task["kind"] == "few_shot":
            block = rng.choice(world.by_category[task["category"]])
            pattern = rng.choice(block["prompts"])
            pairs = [world.instance(block, pattern, rng) for _ in range(3)]
            texts = [pair["prompt"] + imperfect(world, pair, rng, care) + "\n" for pair in pairs]
            for i, pair in enumerate(pairs):
                shots = "".join(texts[:i] + texts[i + 1 :])
                response = texts[i][len(pair["prompt"]) : -1]
                row = dict(prompt=shots + pair["prompt"], response=response)
                rows.append(dict(row, category=task["category"], user=labeler))
        else:
            row = dict(prompt=task["prompt"], response=imperfect(world, task, rng, care))
            rows.append(dict(row, category=task["category"], user=labeler))
    return rows


def load(folder, scale, seed):
    """The datasets of a run, from the world ('') or from a folder of files -> dict of lists:

    pretrain, pretrain_valid, primer      texts; the primer is read first, and empty for a folder
    demonstrations, demonstrations_valid  rows with prompt, response
    comparisons, comparisons_valid        rows with prompt, responses, ranks
    comparison_prompts                    the world has these instead: its labelers wait for samples,
                                          and comparisons is None
    prompts, valid, test                  rows with prompt: for PPO, for choices, for the last table

    Raises SystemExit for a folder without comparisons and for the first malformed row.
    """
    if not folder:
        if scale not in WORLD_SIZES:
            raise SystemExit(f"--scale={scale} is for real text: pass a folder, --data=DIR")
        return world_data(World(), scale, seed)
    rows = read_folder(folder)
    documents = random.Random(f"documents {seed}").sample(rows["pretrain"], len(rows["pretrain"]))
    n_valid = max(1, len(documents) // 40)
    split = dict(
        pretrain_valid=documents[:n_valid], pretrain=documents[n_valid:] or documents, primer=[]
    )
    for name, shares, *parts in (
        ("demonstrations", (0.9, 0.1), "demonstrations", "demonstrations_valid"),
        ("comparisons", (0.9, 0.1), "comparisons", "comparisons_valid"),
        ("prompts", (0.8, 0.1, 0.1), "prompts", "valid", "test"),
    ):
        split.update(zip(parts, split_by_user(rows[name], shares, seed, name)))
    return split


# --------------------------------------------------------------------------------------------------
# batches


def encode_documents(tokenizer, texts, length):
    """Documents -> lists of ids, each ended by eot and cut into pieces of at most `length` ids.

    A row of training text is one document (or a piece of a long one), not a window over several as in
    nanoGPT: a word is then looked up in the one text that is there, and copying from a prompt is learnt
    in a fifth of the steps (README, "What made the difference").
    """
    pieces = []
    for ids in tokenizer.encode_batch(texts):
        ids = ids + [tokenizer.eot]
        pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def document_batch(documents):
    """B lists of ids -> tokens (B, T), mask (B, T-1): every token counts."""
    tokens, lengths = model.pad(documents)
    return tokens, model.response_mask(torch.ones_like(lengths), lengths, tokens.size(1))


def valid_documents(documents, rows=512, tokens=16_384):
    """The first documents, up to so many rows and tokens: the same for every stage and the last table,
    so that the pretraining losses of all models are comparable."""
    totals = itertools.accumulate(map(len, documents))
    return [d for d, total in zip(documents[:rows], totals) if total <= tokens] or documents[:1]


def document_batches(documents, size=32):
    """Lists of ids -> list of (tokens, mask), `size` documents each, in their order."""
    return [document_batch(documents[i : i + size]) for i in range(0, len(documents), size)]


def encode_pairs(tokenizer, rows, block_size):
    """Rows with prompt and response -> list of (prompt ids, response ids with eot). Rows longer than
    the context are dropped and counted; raises SystemExit if none is left."""
    pairs = [
        (tokenizer.encode(row["prompt"]), tokenizer.encode(row["response"]) + [tokenizer.eot])
        for row in rows
    ]
    return fitting(pairs, lambda pair: len(pair[0]) + len(pair[1]), block_size, "demonstrations")


def fitting(rows, length, limit, name):
    """The rows of at most `limit` tokens; prints how many were dropped. Raises SystemExit if
    none is left."""
    kept = [row for row in rows if length(row) <= limit]
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} of {len(rows)} {name}: longer than {limit} tokens")
    if not kept:
        raise SystemExit(
            f"all {len(rows)} {name} are longer than {limit} tokens: raise --block_size or shorten them"
        )
    return kept


def bucketed(lengths, batch, seed, count=None):
    """Batches of rows of similar length, so that little is padding -> list of `count` lists of indices,
    or of one epoch.

    Rows are shuffled, sorted by length within pools of 16 batches, and the batches shuffled again;
    next epoch, anew.
    """
    batches, epoch = [], 0
    while len(batches) < (1 if count is None else count):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))
        pools = [
            sorted(order[i : i + 16 * batch], key=lambda i: lengths[i])
            for i in range(0, len(order), 16 * batch)
        ]
        cut = [pool[i : i + batch] for pool in pools for i in range(0, len(pool), batch)]
        batches += [[int(i) for i in cut[j]] for j in rng.permutation(len(cut))]
        epoch += 1
    return batches[:count]


def draw(rows, count, rng):
    """`count` random rows of a list, with replacement."""
    return [rows[i] for i in rng.integers(0, len(rows), count)]


def sample(policy, tokenizer, prompts, max_new_tokens, temperature, generator):
    """Responses of a policy to texts -> list of (text, ids); ids end with eot if the response
    ended by itself."""
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
    responses = [None] * len(prompts)
    for first in range(0, len(order), 512):
        chosen = order[first : first + 512]
        tokens, lengths = model.generate(
            policy, [prompt_ids[i] for i in chosen], max_new_tokens, temperature, tokenizer.eot,
            generator,
        )
        for i, row, length in zip(chosen, tokens.tolist(), lengths.tolist()):
            ids = row[len(prompt_ids[i]) : length]
            responses[i] = (response_text(tokenizer, prompt_ids[i], ids), ids)
    return responses


def response_text(tokenizer, prompt_ids, ids):
    """ids of a response -> text without eot, decoded behind its prompt, so that the space between the
    two stays with the response."""
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eot else ids
    return tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]


def every_row(count, turn, size, seed):
    """The `size` rows of a turn, such that each of `count` rows comes once before any comes again ->
    list of indices."""
    rows, first = [], turn * size
    while len(rows) < size:
        epoch, place = divmod(first + len(rows), count)
        order = np.random.default_rng([seed, 4, epoch]).permutation(count)
        rows += order[place : place + size - len(rows)].tolist()
    return rows


# --------------------------------------------------------------------------------------------------
# dataset files: a folder of JSONL, read with every row checked


def is_text(value):
    """Is it a string that is not blank and can be written as UTF-8?"""
    return isinstance(value, str) and value.strip() and not re.search(r"[\ud800-\udfff]", value)


DATASETS = {  # file -> what its rows must hold; pretrain.txt holds documents between lines of EOT
    "demonstrations.jsonl": ("prompt", "response", "user"),
    "comparisons.jsonl": ("prompt", "responses", "ranks", "user"),
    "prompts.jsonl": ("prompt", "user"),
}
RULES = {  # key -> what its value must be, and how to tell; all other keys hold text
    "responses": (
        "a list of two or more texts, none of them empty",
        lambda v: isinstance(v, list) and len(v) >= 2 and all(map(is_text, v)),
    ),
    "ranks": (
        "a list of whole numbers, 1 for the best",  # type(): True is an int to isinstance
        lambda v: isinstance(v, list) and all(type(rank) is int and rank >= 1 for rank in v),
    ),
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
    """A whole UTF-8 file, unpacked if its name ends in .gz, with "\\n" line ends and no BOM. Raises
    SystemExit if it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as why:
        line = why.object[: why.start].count(b"\n") + 1
        raise SystemExit(f"{path}:{line}: not UTF-8 text: convert the file to UTF-8")
    except (OSError, EOFError, zlib.error) as why:
        raise SystemExit(f"{path}: cannot be read ({why}): check the path and the file")


def read_rows(path):
    """-> [(place, row), ..] by the kind of file; the place is the line, if not said otherwise. Raises
    SystemExit if the file cannot be read or is not JSON."""
    text, name = read_text(path), path.removesuffix(".gz")
    if name.endswith((".pos", ".neg")):  # a sentence on each line
        stars = 10 if name.endswith("pos") else 1  # on imdb's scale, so that both may share a folder
        rows = [{"text": line, "rating": stars} for line in text.split("\n")]
        return [(line, row) for line, row in enumerate(rows, 1) if row["text"].strip()]
    if not name.endswith((".json", ".jsonl")):  # documents: the place counts them
        documents = re.split(r"(?m)^<\|endoftext\|>[ \t]*$", text)
        if len(documents) == 1:  # running text: as many lines as fit into 2000 characters, or one
            documents = re.findall(r"(?s).{1,2000}(?:\n|\Z)|[^\n]+\n?", text)
        return list(enumerate((d.strip("\n") for d in documents if d.strip()), 1))
    rows, is_array = [], text.lstrip().startswith("[")  # of an array: the place counts its rows
    # not str.splitlines, which would also cut at U+2028, and that may stand within a JSON string
    for line, part in enumerate([text] if is_array else text.split("\n"), 1):
        try:
            rows += [(line, json.loads(part))] if part.strip() else []
        except (ValueError, RecursionError) as why:
            line += getattr(why, "lineno", 1) - 1
            raise SystemExit(f"{path}:{line}: not JSON ({getattr(why, 'msg', why)}): mend it")
    return [(f"row {i}", row) for i, row in enumerate(rows[0][1], 1)] if is_array else rows


def read_jsonl(path, *keys):
    """-> list of rows (dicts), each with these keys (see check_row). Raises SystemExit at the first
    that has not, with file and line."""
    rows = drop_empty(path, read_rows(path)) if "responses" in keys else read_rows(path)
    for place, row in rows:
        try:
            check_row(row, *keys)
        except ValueError as why:
            raise SystemExit(f"{path}:{place}: {why}")
    return [row for _, row in rows]


def drop_empty(path, rows):
    """Rows of out/comparisons.jsonl (they hold sampled "tokens") without the responses in which no text
    was sampled, and without groups that are left with one -> rows; prints how many. In a row that
    people wrote an empty response is a mistake, and refused."""
    kept, empty = [], 0
    for place, row in rows:
        keys = ("tokens", "responses", "ranks")
        if isinstance(row, dict) and all(isinstance(row.get(key), list) for key in keys):
            blank = [i for i, text in enumerate(row["responses"]) if not str(text).strip()]
            for i in reversed(blank):
                row["responses"][i : i + 1] = row["ranks"][i : i + 1] = []
            empty += len(blank)
            if blank and len(row["responses"]) < 2:
                continue
        kept.append((place, row))
    if empty:
        groups = len(rows) - len(kept)
        print(f"{path}: dropped {empty} empty responses, {groups} groups had no pair left")
    return kept


def read_dataset(folder, name):
    """-> path (packed or not), and its checked rows or documents: [] if the file is absent. Raises
    SystemExit if it is empty or malformed."""
    path = os.path.join(folder, name)
    path += ".gz" if os.path.exists(path + ".gz") else ""
    if not os.path.exists(path):
        return path, []
    if name == "pretrain.txt":
        rows = [document for _, document in read_rows(path)]
    else:
        rows = read_jsonl(path, *DATASETS.get(name, ()))
    if not rows:
        raise SystemExit(f"{path} is empty: put at least one row into it, or remove the file")
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
    """-> {"pretrain": [text, ..], "demonstrations": rows, "comparisons": rows, "prompts":
    rows}, with every row checked and the join rule applied. What is missing is made from the
    rest. Raises SystemExit."""
    if not os.path.isdir(folder):
        raise SystemExit(f"{folder} is not a folder: give --data the folder of the dataset files")
    (_, pretrain), (_, demonstrations), (path, comparisons), (_, prompts) = (
        read_dataset(folder, name) for name in ("pretrain.txt", *DATASETS)
    )
    if not comparisons:
        raise SystemExit(f"{path} is not there, the one file that cannot be made from the others")
    if all(len(set(row["ranks"])) == 1 for row in comparisons):
        raise SystemExit(f"{path}: every group is tied: give some responses different ranks")
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
        texts = [row["prompt"] + row["response"] for row in demonstrations]
        texts += [row["prompt"] + response for row in comparisons for response in row["responses"]]
        pretrain = list(dict.fromkeys(texts + [row["prompt"] for row in prompts]))
    if not prompts:
        print(f"{folder} has no prompts: using the prompts of demonstrations and comparisons")
        prompts = different_prompts(demonstrations + comparisons)
    return dict(
        pretrain=pretrain, demonstrations=demonstrations, comparisons=comparisons, prompts=prompts
    )


def split_by_user(rows, shares, seed, name="rows"):
    """-> as many lists of rows as there are shares, e.g. (0.9, 0.1). All rows of one user go to the
    list that then lacks most; a row without "user" is on its own. Rows keep their order. If that
    leaves a list empty, rows are split without regard to users; if one still is, the first list
    stands in for it; either is printed."""
    for whole_users in (True, False):
        units = defaultdict(list)  # user -> indices of rows
        for i, row in enumerate(rows):
            user = row.get("user") if whole_users else None
            units[("row", i) if user is None else ("user", user)].append(i)
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
    return tuple([rows[i] for i in sorted(part or parts[0])] for part in parts)


# --------------------------------------------------------------------------------------------------
# importers: python data.py import FORMAT FILE.. --out=DIR
#
# An importer takes one row of the source and yields (dataset file, row for it), or raises an error if
# it is unusable. Rows that belong together it yields as ("collected", item): see PUT_TOGETHER.


def checked(name, **row):
    """-> name, row, the item that an importer yields. Raises ValueError if the row breaks a rule."""
    check_row(row, *DATASETS[name])
    return name, row


def comparison(prompt, responses, scores, **more):
    """A row of comparisons.jsonl, rank 1 for the highest score. Shuffled, by a seed taken from the
    text, because the sources list the best first (hh-rlhf, oasst): place must not tell rank."""
    pairs = [(r, 1 + sum(t > s for t in scores)) for r, s in zip(responses, scores)]
    random.Random(prompt + min(responses)).shuffle(pairs)
    responses, ranks = map(list, zip(*pairs))
    return checked("comparisons.jsonl", prompt=prompt, responses=responses, ranks=ranks, **more)


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
    yield comparison(row["prompt"], texts, [1, 0])


def import_oasst(row):
    """A tree of messages, or a bare string (a prompt). Dialogues are written as in hh-rlhf. Ranked
    replies are compared; the best, or an only one, is a demonstration if not synthetic."""
    tree = {"prompt": {"text": row}} if isinstance(row, str) else row
    owner = {"user": tree["message_tree_id"]} if "message_tree_id" in tree else {}

    def turn(message, dialogue):
        check_row(message, "text")
        prompt = f"{dialogue}Human: {message['text'].strip()}\n\nAssistant:"
        yield checked("prompts.jsonl", prompt=prompt, **owner)
        replies = [r for r in message.get("replies") or [] if r["role"] == "assistant"]
        ranked = [r for r in replies if r.get("rank") is not None or len(replies) == 1]
        ranked.sort(key=lambda r: r.get("rank", 0))  # 0 is the best
        responses = [" " + r["text"].strip() for r in ranked]
        if len(ranked) > 1:
            yield comparison(prompt, responses, [-r["rank"] for r in ranked], **owner)
        if ranked and not ranked[0].get("synthetic"):
            yield checked("demonstrations.jsonl", prompt=prompt, response=responses[0], **owner)
        for reply in replies:
            for follow_up in reply.get("replies") or []:
                yield from turn(follow_up, f"{prompt} {reply['text'].strip()}\n\n")

    return turn(tree["prompt"], "")


def instruction_prompt(row):
    """-> the instruction, and its input or context, if any, on the next line."""
    context = row.get("input") or row.get("context") or ""
    return f"{row['instruction'].strip()}\n{context.strip()}".strip()


def import_instructions(row):
    """instruction; input or context, or none; output, response or text. self-instruct: a list of
    instances. A copy of dolly: prompt in Alpaca's template, which we take apart, and answer."""
    if "answer" in row:
        _, instruction, *context, _ = re.split(r"\s*### \w+:\s*", row["prompt"])
        row = {
            "instruction": instruction,
            "context": "\n".join(context),
            "response": row["answer"].removesuffix("###eos_token###"),  # sic, in each row
        }
    for instance in row.get("instances", [{}]):
        task = {**row, **instance}
        response = next((key for key in ("output", "response", "text") if key in task), "output")
        check_row(task, "instruction", response)
        category = {"category": row["category"]} if "category" in row else {}
        yield checked(
            "demonstrations.jsonl", prompt=instruction_prompt(task), response=task[response].strip(),
            **category,
        )


def import_pandalm(row):
    """Two responses and three votes: 1 or 2 for the better one, 0 a tie; the majority decides."""
    check_row(row, "instruction", "response1", "response2")
    responses = row["response1"].strip(), row["response2"].strip()
    votes = [row[f"annotator{i}"] for i in (1, 2, 3)]
    if not set(votes) <= {0, 1, 2} or responses[0] == responses[1]:
        raise ValueError(f"votes {votes} (0, 1 or 2 is expected), or twice the same response")
    better = max((0, 1, 2), key=votes.count)  # the first of equals: three different votes are a tie
    yield "collected", (instruction_prompt(row), responses, better)


def group_pairs(pairs):
    """Pairs of one prompt -> one comparison: the more pairs a response won, the better."""
    wins = defaultdict(Counter)  # prompt -> response -> pairs won
    for prompt, responses, better in pairs:
        for i, response in enumerate(responses, 1):
            wins[prompt][response] += i == better
    for prompt, won in wins.items():
        yield comparison(prompt, list(won), list(won.values()))


REVIEW_WORDS = 60  # a response is cut to this, at the end of a sentence if one is near
# Compared reviews teach style and reward, openings are prompts for the policy, held-out reviews test
# the reward model, and a judge learns from those which neither has seen.
REVIEW_PARTS = {"compared": 0.5, "openings": 0.2, "heldout": 0.15, "judge": 0.15}


def import_review(row):
    """text, and rating: stars of ten."""
    text = " ".join(re.sub(r"<br\s*/?>", " ", row["text"]).split())
    check_row({**row, "text": text}, "text", "rating")
    words = text.split()[:REVIEW_WORDS]
    ends = [n for n, word in enumerate(words, 1) if re.search(r"[.!?][\"')]*$", word)]
    if len(words) == REVIEW_WORDS and ends and ends[-1] >= REVIEW_WORDS // 3:
        words = words[: ends[-1]]
    yield "collected", (text, words, row["rating"])


def compare_reviews(reviews):
    """Demonstrations continue the opening of compared reviews, whatever the rating: SFT learns to write
    reviews, and only the reward model sees, in groups of K = 6, which of them are liked."""
    rng, compared = random.Random(0), []
    for text, words, rating in reviews:
        # drawn by the text: the same review is in the same part whatever else is imported
        [part] = random.Random(text).choices(list(REVIEW_PARTS), REVIEW_PARTS.values())
        n = min(rng.randint(4, 8), len(words) // 2)
        opening, rest = " ".join(["Review:", *words[:n]]), " " + " ".join(words[n:])
        review = {"prompt": "Review:", "response": " " + " ".join(words), "rating": rating}
        if part in ("heldout", "judge"):
            yield f"{part}.jsonl", review
        else:
            yield "pretrain.txt", f"Review: {text}"
        if part == "openings":
            yield checked("prompts.jsonl", prompt=opening)
        if part == "compared":
            yield checked("demonstrations.jsonl", prompt=opening, response=rest)
            compared.append(review)
    rng.shuffle(compared)
    for start in range(0, len(compared) - 1, 6):
        group = compared[start : start + 6]
        yield comparison("Review:", [r["response"] for r in group], [r["rating"] for r in group])


def import_text(row):
    """A document, or an object whose text is one."""
    row = {"text": row} if isinstance(row, str) else row
    check_row(row, "text")
    yield "pretrain.txt", row["text"].strip("\n")


FORMATS = {
    "hh-rlhf": import_pairs, "pairs": import_pairs,
    "pandalm": import_pandalm,
    "oasst": import_oasst,
    "alpaca": import_instructions, "dolly": import_instructions, "self-instruct": import_instructions,
    "imdb": import_review, "sentence-polarity": import_review,
    "text": import_text,
}
PUT_TOGETHER = {import_pandalm: group_pairs, import_review: compare_reviews}
IMPORT_USAGE = f"say import FORMAT FILE.. --out=DIR, with FORMAT one of {' '.join(FORMATS)}"


def import_rows(format, paths):
    """-> {file: rows}, [("path:line", reason)] for what cannot be used."""
    if format not in FORMATS:
        raise SystemExit(f'format "{format}" is not known: {IMPORT_USAGE}')
    importer, files, unused = FORMATS[format], defaultdict(list), []
    for path in paths:
        for place, row in read_rows(path):
            try:
                for name, item in list(importer(row)):  # list: all of a row, or nothing
                    files[name].append(item)
            except (ValueError, AttributeError, KeyError, TypeError) as why:
                unused.append((f"{path}:{place}", f"unusable row ({why})"))
    if not files:
        place, reason = (unused + [(f"{paths[0]}:1", "the file is empty")])[0]
        raise SystemExit(f"{place}: {reason}: no row can be used, is the file {format}?")
    if importer in PUT_TOGETHER:
        for name, row in PUT_TOGETHER[importer](files.pop("collected")):
            files[name].append(row)
    # what the source does not give by itself: its prompts, and its good texts as pretraining text
    good = files["demonstrations.jsonl"] + [best_of(row) for row in files["comparisons.jsonl"]]
    texts = [row["prompt"] + join(row["prompt"], row["response"]) for row in good]
    files["prompts.jsonl"] = files["prompts.jsonl"] or different_prompts(good)
    files["pretrain.txt"] = files["pretrain.txt"] or list(dict.fromkeys(texts))
    return {name: rows for name, rows in files.items() if rows}, unused


def import_files(format, paths, out):
    """Adds to the folder out what the sources give and it lacks, and prints what is new and what cannot
    be used. All files are written before the first is given its name. Raises SystemExit."""
    files, unused = import_rows(format, paths)
    texts, report = {}, []
    for name, rows in sorted(files.items()):
        path, old = read_dataset(out, name)
        known = {json.dumps(row) for row in old}
        new = [row for row in rows if json.dumps(row) not in known]
        if name == "pretrain.txt":
            texts[path] = f"\n{EOT}\n".join(old + new) + "\n"
        else:
            texts[path] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in old + new)
        report.append(f"{path}: {len(old) + len(new)} rows, {len(new)} of them new")
    try:
        os.makedirs(out, exist_ok=True)
        for path, text in texts.items():
            with (gzip.open if path.endswith(".gz") else open)(path + ".tmp", "wb") as file:
                file.write(text.encode())
        for path in texts:
            os.replace(path + ".tmp", path)
    except OSError as why:
        raise SystemExit(f"{out}: cannot be written ({why.strerror}): choose another --out")
    report += [f"{place}: {reason}" for place, reason in unused]
    print("\n".join(report + [f"{len(unused)} rows of the source were not used"]))


def import_main(arguments):
    """The command line behind `python data.py`. Raises SystemExit if it is not complete."""
    if len(arguments) < 3 or not re.fullmatch("--out=.+", arguments[-1]):
        raise SystemExit(f'"{" ".join(["import", *arguments])}" is not complete: {IMPORT_USAGE}')
    import_files(arguments[0], arguments[1:-1], arguments[-1].removeprefix("--out="))


if __name__ == "__main__":
    if sys.argv[1:2] != ["import"]:
        raise SystemExit(f"data.py {' '.join(sys.argv[1:])}: {IMPORT_USAGE}")
    import_main(sys.argv[2:])
