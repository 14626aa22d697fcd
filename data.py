"""data"""
import itertools
import math
import numpy as np
import model
import torch
from collections import Counter

import gzip
import heapq
import json
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict

import tiktoken

EOT = "<|endoftext|>"


# --------------------------------------------------------------------------------------------
# dataset files: the tokenizer, and a folder of JSONL files read with every row checked
# --------------------------------------------------------------------------------------------

# GPT-2's way to cut text into words, except that every digit is a word and that 'the in quotes is
# not 't + he. Letters are written [^\W\d_] because two engines read this pattern, Python's when
# training and tiktoken's when encoding, and only the second knows \p{L}. It matches any character.
WORD = r"'(?:[sdmt]|ll|ve|re)\b| ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s"


class Tokenizer:
    """
    Text <-> list of ids, over a tiktoken encoding: "gpt2", or "bpe" trained on the texts at hand.

    In "bpe" a word is one id wherever it stands: words carry the space before them, so encode()
    puts a space before the first word of the text and of every line, and decode() takes it away.
    Hence a single leading space of a line is not significant: " a" and "a" have the same ids. Also
    decode a prompt and its response together, else the response loses the space it begins with.
    """

    def __init__(self, name, encoding):
        self.name, self.encoding = name, encoding
        self.n_vocab, self.eot = encoding.n_vocab, encoding.eot_token    # eot is the last id
        self.unknown = encoding.encode_ordinary("\ufffd")   # stands for ids outside the vocabulary

    @classmethod
    def load(cls, name):
        if name != "gpt2":
            raise SystemExit(f'encoding "{name}" is not known: use bpe (trained here) or gpt2')
        try:
            return cls(name, tiktoken.get_encoding(name))
        except Exception as why:    # no network, proxy, hash mismatch: tiktoken raises many kinds
            raise SystemExit(f'the encoding "gpt2" could not be fetched ({type(why).__name__}): go '
                             "online once, or set TIKTOKEN_CACHE_DIR to a folder holding it")

    @classmethod
    def train(cls, texts, vocab_size):
        """Byte-level BPE: 256 bytes, the most frequent merges, and eot; fewer if pairs run out."""
        if vocab_size < 257:
            raise SystemExit(f"a vocabulary of {vocab_size} is too small: 256 bytes and {EOT} "
                             "need 257")
        counts = Counter()
        for text in texts:
            counts.update(re.findall(WORD, add_spaces(text)))
        tokens = train_bpe({word.encode("utf-8", "replace"): n for word, n in counts.items()},
                           vocab_size - 1)
        return cls.from_state({"name": "bpe", "tokens": tokens})

    def state(self):
        """Plain types for the checkpoint; two tokenizers are the same iff their states are."""
        if self.name == "gpt2":
            return {"name": "gpt2"}
        # not token_byte_values(), which is sorted by bytes; here a token's place is its id
        return {"name": "bpe", "tokens": [self.encoding.decode_single_token_bytes(i)
                                          for i in range(self.eot)]}

    @classmethod
    def from_state(cls, state):
        if state["name"] == "gpt2":
            return cls.load("gpt2")
        ranks = {token: i for i, token in enumerate(state["tokens"])}
        return cls("bpe", tiktoken.Encoding("bpe", pat_str=WORD, mergeable_ranks=ranks,
                                            special_tokens={EOT: len(ranks)}))

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.state() == other.state()

    def encode(self, text):
        """-> ids. The text "<|endoftext|>" is ordinary text: only our code can put in an eot."""
        return self.encoding.encode_ordinary(add_spaces(text) if self.name == "bpe" else text)

    def encode_batch(self, texts):
        if self.name == "bpe":
            texts = [add_spaces(text) for text in texts]
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=2)

    def decode(self, ids):
        """-> text; ids outside the vocabulary (a padded embedding has some) become U+FFFD."""
        known = [j for i in ids for j in ([i] if 0 <= i < self.n_vocab else self.unknown)]
        text = self.encoding.decode(known)
        return re.sub(r"(^|\n) (?=\S)", r"\1", text) if self.name == "bpe" else text


def add_spaces(text):
    return re.sub(r"(^|\n)(?=\S)", r"\1 ", text)


def train_bpe(counts, size):
    """
    counts: {word as bytes: how often it occurs} -> list of at most `size` tokens, as bytes.

    Merges the most frequent pair of neighbours until there are enough tokens or no pairs. Only the
    words that hold the merged pair are counted again: that is what makes this quick.
    """
    words, times = [[bytes([b]) for b in word] for word in counts], list(counts.values())
    pairs, holders = Counter(), defaultdict(set)    # pair -> how often; pair -> indices of words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += times[i]
            holders[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]    # most frequent first, ties by bytes
    heapq.heapify(heap)
    tokens = dict.fromkeys(bytes([b]) for b in range(256))  # an ordered set: "ab"+"c" = "a"+"bc"
    while heap and len(tokens) < size:
        n, best = heapq.heappop(heap)
        if pairs[best] != -n:
            continue                    # out of date: its new count is in the heap as well
        tokens[best[0] + best[1]] = None
        changed = set()
        for i in holders.pop(best):
            old, words[i] = words[i], merge(words[i], best)
            for pair in zip(old, old[1:]):
                pairs[pair] -= times[i]
                changed.add(pair)
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += times[i]
                holders[pair].add(i)
                changed.add(pair)
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
    return list(tokens)


def merge(word, pair):
    """["a", "b", "c"], ("a", "b") -> ["ab", "c"]"""
    merged = []
    for token in word:
        # the halves of a pair may be equal: a merged neighbour is longer than pair[0], no match
        if merged and token == pair[1] and merged[-1] == pair[0]:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def read_text(path):
    """A whole UTF-8 file, unpacked if its name ends in .gz, with "\\n" line ends and no BOM."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            data = f.read()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as why:
        line = data[:why.start].count(b"\n") + 1
        raise SystemExit(f"{path}:{line}: not UTF-8 text: convert the file to UTF-8")
    except (OSError, EOFError, zlib.error) as why:
        raise SystemExit(f"{path}: cannot be read ({getattr(why, 'strerror', None) or why}): "
                         "check the path and the file")


def numbered_rows(path):
    """-> (line number from 1, row) for each line of JSON; blank lines are skipped."""
    # not str.splitlines, which would also cut at U+2028, and that may stand within a JSON string
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as why:
                raise SystemExit(f"{path}:{number}: not JSON ({getattr(why, 'msg', why)}): "
                                 "put one object on each line")
            yield number, row


def read_jsonl(path, check=None):
    """-> list of rows (dicts). check(row) raises ValueError on a row that cannot be used."""
    rows = []
    for number, row in numbered_rows(path):
        try:
            (check or check_object)(row)
        except ValueError as why:
            raise SystemExit(f"{path}:{number}: {why}")
        rows.append(row)
    return rows


def check_object(row):
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {shown(row)}")


def check_text(row, key):
    check_object(row)
    if key not in row:
        raise ValueError(f'no "{key}": the row has {", ".join(row) or "no keys"}')
    return check_string(row[key], key)


def check_string(value, name):
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be text, not {shown(value)}')
    if not value.strip():
        raise ValueError(f'"{name}" is empty')
    if any("\ud800" <= c <= "\udfff" for c in value):      # JSON can say "\\ud800", UTF-8 cannot
        raise ValueError(f'"{name}" holds half a character (a lone surrogate)')
    return value


def check_prompt(row):
    check_text(row, "prompt")
    if not isinstance(row.get("user"), (str, int, type(None))):
        raise ValueError(f'"user" must be text or a number, not {shown(row["user"])}')


def check_demonstration(row):
    check_prompt(row)
    check_text(row, "response")


def check_comparison(row):
    check_prompt(row)
    for key in ("responses", "ranks"):
        if not isinstance(row.get(key), list):
            raise ValueError(f'"{key}" must be a list, not {shown(row.get(key))}')
    responses, ranks = row["responses"], row["ranks"]
    if len(responses) < 2:
        raise ValueError(f"{len(responses)} in responses: a comparison needs two or more")
    if len(ranks) != len(responses):
        raise ValueError(f"{len(responses)} responses but {len(ranks)} ranks: give one for each")
    for i in range(len(responses)):
        check_string(responses[i], f"responses[{i}]")
        if type(ranks[i]) is not int or ranks[i] < 1:       # type(): True is an int to isinstance
            raise ValueError(f"ranks[{i}] must be a whole number from 1 (best), not "
                             f"{shown(ranks[i])}")


def shown(value):
    """A value as it stands in the file, short enough for an error of one line."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."


CHECKS = {"demonstrations.jsonl": check_demonstration, "comparisons.jsonl": check_comparison,
          "prompts.jsonl": check_prompt}


def find_file(folder, name):
    """-> path of DIR/name or DIR/name.gz, None if neither is there."""
    found = [p for p in (os.path.join(folder, name), os.path.join(folder, name + ".gz"))
             if os.path.exists(p)]
    if len(found) == 2:
        raise SystemExit(f"{found[0]} and {found[1]} are both there: remove one of them")
    return found[0] if found else None


def read_rows(folder, name):
    """-> checked rows (for pretrain.txt: documents) of one file of the folder, [] if absent."""
    path = find_file(folder, name)
    if path is None:
        return []
    if name == "pretrain.txt":
        rows = split_documents(read_text(path))
    else:
        rows = read_jsonl(path, CHECKS.get(name))
    if not rows:
        raise SystemExit(f"{path} is empty: put at least one row into it, or remove the file")
    return rows


def split_documents(text):
    documents = re.split(r"^<\|endoftext\|>[ \t]*$", text, flags=re.MULTILINE)
    return [document.strip("\n") for document in documents if document.strip()]


def join(prompt, response):
    """The join rule -> the response, with a new line before it if nothing else parts the two."""
    return response if prompt[-1].isspace() or response[0].isspace() else "\n" + response


def prompt_row(row):
    return {key: row[key] for key in ("prompt", "user", "category") if key in row}


def best_demonstration(row):
    """A comparison -> a demonstration by its best-ranked response (the first, if several are)."""
    return {**prompt_row(row), "response": row["responses"][row["ranks"].index(min(row["ranks"]))]}


def all_prompts(rows):
    """-> the different prompts of these rows, as rows of prompts.jsonl."""
    return list({row["prompt"]: prompt_row(row) for row in rows}.values())


def read_folder(folder):
    """
    -> {"pretrain": [text, ..], "demonstrations": rows, "comparisons": rows, "prompts": rows}

    Every row is checked and the join rule applied. Only comparisons are indispensable: what is
    missing is made from the rest, and that is printed. A bad row ends the program (file and line).
    """
    if not os.path.isdir(folder):
        raise SystemExit(f"{folder} is not a folder: give --data the folder of the dataset files")
    pretrain = read_rows(folder, "pretrain.txt")
    demonstrations = read_rows(folder, "demonstrations.jsonl")
    comparisons = read_rows(folder, "comparisons.jsonl")
    prompts = read_rows(folder, "prompts.jsonl")
    if not comparisons:
        raise SystemExit(f"{folder} has no comparisons.jsonl (or .jsonl.gz), the one file that "
                         "cannot be made from the others: add it")
    if all(len(set(row["ranks"])) == 1 for row in comparisons):
        raise SystemExit(f"{find_file(folder, 'comparisons.jsonl')}: every group is tied, so there "
                         "is no preference to learn: give some responses different ranks")
    for row in demonstrations:
        row["response"] = join(row["prompt"], row["response"])
    for row in comparisons:
        row["responses"] = [join(row["prompt"], response) for response in row["responses"]]

    if not demonstrations:
        print(f"{folder} has no demonstrations: using the best-ranked responses of comparisons")
        demonstrations = [best_demonstration(row) for row in comparisons]
    if not pretrain:
        print(f"{folder} has no pretraining text: using all text of the other files")
        texts = [row["prompt"] + row["response"] for row in demonstrations]
        texts += [row["prompt"] + response for row in comparisons for response in row["responses"]]
        pretrain = list(dict.fromkeys(texts + [row["prompt"] for row in prompts]))
    if not prompts:
        print(f"{folder} has no prompts: using the prompts of demonstrations and comparisons")
        prompts = all_prompts(demonstrations + comparisons)
    return dict(pretrain=pretrain, demonstrations=demonstrations, comparisons=comparisons,
                prompts=prompts)


def split_by_user(rows, shares, seed):
    """
    -> tuple of lists of rows, as long as shares (fractions of the rows, e.g. (0.9, 0.1)).

    All rows of one user go to one list; a row without "user" is on its own. The units are drawn in
    an order fixed by the seed, each to the list that then lacks most rows. Rows keep their order.
    """
    units = defaultdict(list)       # user -> indices of rows
    for i, row in enumerate(rows):
        user = row.get("user")
        units[("row", i) if user is None else ("user", user)].append(i)
    order = list(units.values())
    random.Random(seed).shuffle(order)
    lacking, parts = [share * len(rows) for share in shares], [[] for _ in shares]
    for unit in order:
        part = lacking.index(max(lacking))
        parts[part] += unit
        lacking[part] -= len(unit)
    return tuple([rows[i] for i in sorted(part)] for part in parts)


# --------------------------------------------------------------------------------------------
# importers: python data.py import FORMAT FILE.. --out=DIR
# --------------------------------------------------------------------------------------------

# An importer takes one row of the source and yields (name of a dataset file, a row for it), or
# ("unused", reason), or raises ValueError if nothing of the row can be used. Two formats then need
# all rows together (pairs that become groups, reviews that are compared): see FORMATS.

def instruction_prompt(row):
    """Instruction, then on a new line the input it speaks of, if there is one."""
    context = row.get("input") or row.get("context") or ""
    if not isinstance(context, str):
        raise ValueError(f'"input" must be text, not {shown(context)}')
    return "\n".join(filter(None, [check_text(row, "instruction").strip(), context.strip()]))


def comparison(prompt, responses, scores, **more):
    """A row of comparisons.jsonl, rank 1 for the highest score. Shuffled, by a seed taken from the
    text, because the sources list the best first (hh-rlhf, oasst): place must not tell rank."""
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    pairs = list(zip(responses, ranks))
    random.Random(prompt + min(responses)).shuffle(pairs)
    return {"prompt": prompt, "responses": [response for response, _ in pairs],
            "ranks": [rank for _, rank in pairs], **more}


def import_hh(row):
    """chosen, rejected: whole dialogues of "Human:" and "Assistant:". The prompt is what they share
    up to an "Assistant:", the response all that follows, nearly always one reply. It gives no
    demonstrations: the replies were written by a model."""
    chosen, rejected = (re.split(r"(?<=\n\nAssistant:)", check_text(row, key).rstrip())
                        for key in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise ValueError("chosen and rejected do not begin with the same turns")
    yield pair("".join(chosen[:shared]).lstrip(), "".join(chosen[shared:]),
               "".join(rejected[shared:]))


def import_pairs(row):
    yield pair(*(check_text(row, key) for key in ("prompt", "chosen", "rejected")))


def pair(prompt, chosen, rejected):
    if not chosen.strip() or not rejected.strip():
        raise ValueError("empty reply: " + ("chosen" if not chosen.strip() else "rejected"))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return "comparisons.jsonl", comparison(prompt, [chosen, rejected], [1, 0])


def import_oasst(row):
    """A tree of messages, or a bare JSON string (a prompt). Dialogues are written as in hh-rlhf.
    Ranked siblings are compared; the best, or an only reply, is a demonstration if human."""
    if isinstance(row, str):
        yield "prompts.jsonl", {"prompt": f"Human: {row.strip()}\n\nAssistant:"}
        return
    check_object(row)
    if not isinstance(row.get("prompt"), dict):
        raise ValueError('no "prompt": not a message tree')
    yield from oasst_turn(row["prompt"], "", row.get("message_tree_id"))


def oasst_turn(message, dialogue, user):
    """One message of the user and, by recursion, all that follows it. dialogue: the text before."""
    prompt = f"{dialogue}Human: {check_text(message, 'text').strip()}\n\nAssistant:"
    replies = [r for r in message.get("replies") or [] if r.get("role") == "assistant"]
    owner = {"user": user} if user else {}
    yield "prompts.jsonl", {"prompt": prompt, **owner}

    ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda r: r["rank"])
    for _ in range(len(replies) - len(ranked) if len(replies) > 1 else 0):
        yield "unused", f"a reply without rank beside {len(replies) - 1} others: not compared"
    if len(ranked) > 1:
        texts = [" " + check_text(r, "text").strip() for r in ranked]
        yield "comparisons.jsonl", comparison(prompt, texts, [-r["rank"] for r in ranked], **owner)
    best = ranked[:1] or (replies if len(replies) == 1 else [])     # rank 0 is the best
    for reply in best:
        if reply.get("synthetic"):
            yield "unused", "the best reply is by a model: not a demonstration"
        else:
            response = " " + check_text(reply, "text").strip()
            yield "demonstrations.jsonl", {"prompt": prompt, "response": response, **owner}
    for reply in replies:
        for follow_up in reply.get("replies") or []:
            yield from oasst_turn(follow_up, f"{prompt} {reply['text'].strip()}\n\n", user)


def demonstration(prompt, response):
    return "demonstrations.jsonl", {"prompt": prompt, "response": response.strip()}


def import_alpaca(row):
    yield demonstration(instruction_prompt(row), check_text(row, "output"))


def import_self_instruct(row):
    """A task: one instruction with one or more instances (input, output) of it."""
    check_text(row, "instruction")
    for instance in row["instances"]:
        yield demonstration(instruction_prompt({**row, **instance}), check_text(instance, "output"))


ALPACA_TEMPLATE = re.compile(
    r"### Instruction:\n(.*?)\n\n(?:### Input:\n(.*?)\n\n)?### Response:", re.DOTALL)


def import_dolly(row):
    """Databricks' rows (instruction, context, response), a cleaned copy (instruction, text), or a
    copy in Alpaca's template (prompt, answer), which is taken apart: our prompts have none."""
    check_object(row)
    if "answer" in row:
        template = ALPACA_TEMPLATE.search(check_text(row, "prompt"))
        instruction, context = template.groups() if template else (row["prompt"], None)
        row = {"instruction": instruction, "context": context,
               "text": check_text(row, "answer").removesuffix("###eos_token###")}   # sic, each row
    name, made = demonstration(instruction_prompt(row),
                               check_text(row, "response" if "response" in row else "text"))
    yield name, {**made, **({"category": row["category"]} if "category" in row else {})}


def import_text(document):
    yield "pretrain.txt", document


def import_pandalm(row):
    """Two responses and three votes: 1 or 2 for the better one, 0 a tie; the majority decides."""
    prompt = instruction_prompt(row)
    responses = [check_text(row, "response1").strip(), check_text(row, "response2").strip()]
    votes = Counter(row.get(f"annotator{i}") for i in (1, 2, 3))
    if set(votes) - {0, 1, 2}:
        raise ValueError(f"annotators must say 0, 1 or 2, not {shown(list(votes))}")
    if responses[0] == responses[1]:
        raise ValueError("both responses are the same")
    vote, count = votes.most_common(1)[0]
    yield "pairs", (prompt, responses, vote if count > 1 else 0)


def group_pairs(files):
    """Pairs of one prompt -> one comparison: the more pairs a response won, the better."""
    wins = defaultdict(Counter)                 # prompt -> response -> pairs won
    for prompt, responses, better in files.pop("pairs", []):
        for i, response in enumerate(responses, 1):
            wins[prompt][response] += (i == better)
    files["comparisons.jsonl"] = [comparison(prompt, list(won), list(won.values()))
                                  for prompt, won in wins.items()]


# Reviews. One prompt for all of them; the text continues it with " ..".
REVIEW_PROMPT = "Review:"
REVIEW_WORDS = 60       # a response is cut to this, at the end of a sentence if one is near
# Parts of 100, drawn by the review's text, so that the same review is always in the same part:
# compared reviews teach style and reward, opening words are prompts for the policy, held-out
# reviews test the reward model, and a judge learns from those which neither has seen.
REVIEW_PARTS = (("compared", 50), ("openings", 20), ("heldout", 15), ("judge", 15))


def import_review(row):
    """text, and rating: any number, more is better."""
    words = re.sub(r"<br\s*/?>", " ", check_text(row, "text")).split()
    rating = row.get("rating")
    if type(rating) not in (int, float):
        raise ValueError(f'"rating" must be a number, not {shown(rating)}')
    if len(words) < 2:
        raise ValueError("a review of one word has no opening and continuation")
    yield "reviews", (" ".join(words), rating)


def compare_reviews(files):
    """
    Reviews -> the dataset files (70%), heldout.jsonl (15%) and judge.jsonl (15%), the last two
    with rows {"prompt", "response", "rating"}. No review stands in two of these three.

    Comparisons are groups of K = 4..9 reviews ranked by rating. Prompts are the first 4-8 words of
    reviews that are not compared. Demonstrations continue the opening of those that are, whatever
    the rating: SFT learns to write reviews, and only the reward model sees which are liked.
    """
    parts, rng = defaultdict(list), random.Random(0)     # part -> [(text, rating), ..]
    for text, rating in files.pop("reviews", []):
        parts[review_part(text)].append((text, rating))

    compared = parts["compared"]
    rng.shuffle(compared)
    for text, _ in compared:
        opening, rest = cut_opening(text, rng)
        files["demonstrations.jsonl"].append({"prompt": opening, "response": rest})
    while len(compared) > 1:
        k = len(compared) if len(compared) <= 9 else rng.randint(4, min(9, len(compared) - 4))
        group, compared = compared[:k], compared[k:]
        files["comparisons.jsonl"].append(comparison(
            REVIEW_PROMPT, [" " + cut(text) for text, _ in group], [rating for _, rating in group]))
    for text, _ in parts["openings"]:
        files["prompts.jsonl"].append({"prompt": cut_opening(text, rng)[0]})
    for text, _ in parts["compared"] + parts["openings"]:
        files["pretrain.txt"].append(f"{REVIEW_PROMPT} {text}")
    for part in ("heldout", "judge"):
        for text, rating in parts[part]:
            files[part + ".jsonl"].append(
                {"prompt": REVIEW_PROMPT, "response": " " + cut(text), "rating": rating})


def review_part(text):
    place = random.Random(text).randrange(100)      # by the text: the same in every run
    for part, share in REVIEW_PARTS:
        if place < share:
            return part
        place -= share


def cut(text):
    """At most REVIEW_WORDS words, ending a sentence where the last two thirds allow it."""
    words = text.split()
    if len(words) > REVIEW_WORDS:
        ends = [n for n in range(REVIEW_WORDS // 3, REVIEW_WORDS + 1)
                if re.search(r"[.!?][\"')]*$", words[n - 1])]
        words = words[:ends[-1] if ends else REVIEW_WORDS]
    return " ".join(words)


def cut_opening(text, rng):
    """-> "Review: its first words" (4 to 8, at most half), the rest of the cut text."""
    words = cut(text).split()
    n = min(rng.randint(4, 8), len(words) // 2)
    return f"{REVIEW_PROMPT} {' '.join(words[:n])}", " " + " ".join(words[n:])


# Readers of a source file -> (line number, row)

def read_json(path):
    """JSONL, or one JSON array of rows."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from numbered_rows(path)
        return
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, line = gap.match(text, text.index("[") + 1).end(), 1
    line += text.count("\n", 0, at)
    while text[at:at + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as why:
            raise SystemExit(f"{path}:{line}: not JSON ({getattr(why, 'msg', why)}): "
                             "mend the array from here on")
        yield line, row
        end = gap.match(text, end).end()
        at, line = end, line + text.count("\n", at, end)


def read_sentences(path):
    """One sentence a line; the rating is 1 in a file *.pos, 0 in a file *.neg."""
    name = path.removesuffix(".gz")
    if not name.endswith((".pos", ".neg")):
        raise SystemExit(f"{path}: its name tells the rating: it must end in .pos or .neg")
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, {"text": line, "rating": int(name.endswith(".pos"))}


BLOCK = 2000        # characters of a document cut from running text; at least half, if it can be


def read_documents(path):
    """Documents between lines of <|endoftext|>; without any, blocks of whole lines, about BLOCK
    characters each, that end at an empty line where there is one."""
    text = read_text(path)
    documents = split_documents(text)
    yield from enumerate(documents if len(documents) > 1 else cut_blocks(text), 1)


def cut_blocks(text):
    blocks, block, size = [], [], 0
    for line in text.split("\n"):
        block.append(line)
        size += len(line) + 1
        if size >= BLOCK or (size >= BLOCK // 2 and not line.strip()):
            blocks.append("\n".join(block))
            block, size = [], 0
    return [b.strip("\n") for b in blocks + ["\n".join(block)] if b.strip()]


# format -> reader of a file, importer of a row, what is made of all rows in the end (if anything)
FORMATS = {
    "hh-rlhf": (read_json, import_hh, None),
    "oasst": (read_json, import_oasst, None),
    "pandalm": (read_json, import_pandalm, group_pairs),
    "alpaca": (read_json, import_alpaca, None),
    "self-instruct": (read_json, import_self_instruct, None),
    "dolly": (read_json, import_dolly, None),
    "pairs": (read_json, import_pairs, None),
    "text": (read_documents, import_text, None),
    "imdb": (read_json, import_review, compare_reviews),
    "sentence-polarity": (read_sentences, import_review, compare_reviews),
}


IMPORT_USAGE = f"say import FORMAT FILE.. --out=DIR, with FORMAT one of {' '.join(FORMATS)}"


def import_rows(format, paths):
    """-> ({file name: rows}, [(path, line, reason)] for what cannot be used)."""
    if format not in FORMATS:
        raise SystemExit(f'format "{format}" is not known: {IMPORT_USAGE}')
    reader, importer, finish = FORMATS[format]
    files, unused = defaultdict(list), []
    for path in paths:
        for line, row in reader(path):
            for name, item in checked(importer, row):
                if name == "unused":
                    unused.append((path, line, item))
                else:
                    files[name].append(item)
    if not files:
        path, line, reason = (unused + [(paths[0], 1, "the file is empty")])[0]
        raise SystemExit(f"{path}:{line}: {reason}: no row can be used, is the file {format}?")
    if finish:
        finish(files)
    complete(files)
    return {name: rows for name, rows in files.items() if rows}, unused


def checked(importer, row):
    """-> all that the importer makes of a row or, if any of it is bad, only the reason."""
    try:
        made = list(importer(row))
        for name, item in made:
            CHECKS.get(name, lambda item: None)(item)
        return made
    except ValueError as why:
        return [("unused", str(why))]
    except (AttributeError, KeyError, TypeError) as why:    # nested otherwise than this format is
        return [("unused", f"not a row of this format ({type(why).__name__}: {why})")]


def complete(files):
    """What the source does not give by itself: its prompts, and its good texts as pretraining."""
    best = [best_demonstration(row) for row in files["comparisons.jsonl"]]
    rows = files["demonstrations.jsonl"] + best
    texts = [row["prompt"] + join(row["prompt"], row["response"]) for row in rows]
    files["prompts.jsonl"] = files["prompts.jsonl"] or all_prompts(rows)
    files["pretrain.txt"] = files["pretrain.txt"] or list(dict.fromkeys(texts))


def import_files(format, paths, out):
    """
    Adds to the folder out what the sources give; a row that is there already is not added again.

    All files are written under temporary names before the first is renamed. Prints the rows of each
    file, every row of the source that cannot be used, and how many there are for each reason.
    """
    files, unused = import_rows(format, paths)
    texts, messages = {}, []
    for name, rows in sorted(files.items()):
        path = find_file(out, name) or os.path.join(out, name)
        old = read_rows(out, name)
        known = {json.dumps(row) for row in old}
        new = [row for row in rows if json.dumps(row) not in known]
        texts[path] = file_text(name, old + new)
        messages.append(f"{path}: {len(old) + len(new)} rows, {len(new)} of them new"
                        + f", {len(rows) - len(new)} were there already" * (len(new) < len(rows)))
    try:
        os.makedirs(out, exist_ok=True)
        for path, text in texts.items():
            with (gzip.open if path.endswith(".gz") else open)(path + ".tmp", "wb") as f:
                f.write(text.encode())
        for path in texts:
            os.replace(path + ".tmp", path)
    except OSError as why:
        raise SystemExit(f"{out}: cannot be written ({why.strerror}): choose another --out")
    messages += [f"{path}:{line}: {reason}" for path, line, reason in unused]
    reasons = Counter(reason for _, _, reason in unused)
    messages += [f"not used: {count} x {reason}" for reason, count in reasons.most_common()]
    print("\n".join(messages))


def file_text(name, rows):
    if name == "pretrain.txt":
        return f"\n{EOT}\n".join(rows) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def import_main(arguments):
    """arguments: FORMAT FILE.. --out=DIR"""
    words = [a for a in arguments if not a.startswith("-")]
    flags = [a for a in arguments if a.startswith("-")]
    if len(words) < 2 or len(flags) != 1 or not re.fullmatch("--out=.+", flags[0]):
        raise SystemExit(f'"{" ".join(["import", *arguments])}" is not complete: {IMPORT_USAGE}')
    import_files(words[0], words[1:], flags[0].removeprefix("--out="))


if False:
    import_main(sys.argv[1:])
# ---------------------------------------------------------------------------------------------------------------------
# the miniature world: its content is plain text under assets/world, this is its engine

WORLD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "world")

# InstructGPT, Table 1: share of each use case among the prompts, per cent
CATEGORY_SHARES = dict(
    generation=45.6, open_qa=12.4, brainstorming=11.2, chat=8.4, rewrite=6.6,
    summarization=4.2, classification=3.5, other=3.5, closed_qa=2.6, extract=1.9,
)
# kinds of prompts: anything a labeler thinks of; an instruction with examples; a customer's own use case in the same words
KIND_SHARES = dict(plain=0.6, few_shot=0.08, user_based=0.32)
FEW_SHOT_CATEGORIES = {"open_qa", "rewrite", "classification", "closed_qa", "extract", "brainstorming"}


def content(name):
    """The lines of assets/world/NAME, without comments and blank lines."""
    with open(os.path.join(WORLD, name), encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file if line.strip() and not line.startswith("#")]


class World:
    """The content of assets/world, ready to expand. Every text comes from a `random.Random` that the caller passes."""

    def __init__(self):
        self.classes, self.rules, self.facts, self.blocks, self.pages = {}, {}, [], [], []
        for line in content("words.txt"):
            name, words = line.split(": ")
            self.classes[name] = words.split()
        for line in content("rules.txt"):
            name, pattern = line.split(": ", 1)
            self.rules.setdefault(name, []).append(pattern)
        for line in content("facts.txt"):
            first, second, third = (part.strip() for part in line.split("|"))
            if "{subject}" in second:
                relation, statement, questions = first, second, third.split(" / ")
                continue
            self.facts.append(dict(relation=relation, statement=statement, questions=questions,
                                   subject=first, truth=second, myth=third))
        for line in content("tasks.txt"):
            if line.startswith("["):
                self.blocks.append(dict(category=line.strip("[]"), prompts=[], replies=[], demands="", constraints=""))
            elif line.startswith("?"):
                self.blocks[-1]["demands"], _, self.blocks[-1]["constraints"] = line[2:].partition("!")
            else:
                self.blocks[-1]["prompts" if line.startswith(">") else "replies"].append(line[2:].replace("\\n", "\n"))
        self.suffixes = [block for block in self.blocks if block["category"] == "constraint"]
        self.by_category = {c: [b for b in self.blocks if b["category"] == c] for c in CATEGORY_SHARES}
        for line in content("pages.txt"):
            share, pattern = line.split(" | ", 1)
            self.pages.append((float(share), pattern.replace("\\n", "\n")))

        # what the gold preference reads: the class of each word, every claim that can be made, every familiar trigram
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
        return sorted({v for f in self.facts if f["relation"] == relation for v in (f["truth"], f["myth"]) if v})

    def expand(self, pattern, bound, rng):
        """Fill a pattern: [a|b] choices, {class} words, {rule} lines, {question} and its kin; `bound` keeps what was picked."""
        while match := re.search(r"\[([^\[\]]*)\]|\{([a-z_]+)(\d?)\}", pattern):
            filled = rng.choice(match[1].split("|")) if match[1] is not None else self.fill(match[2], match[3], bound, rng)
            pattern = pattern[: match.start()] + filled + pattern[match.end() :]
        return pattern

    def fill(self, name, digit, bound, rng):
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
            pairs = [self.task(rng) for _ in range(3)]
            return "\n".join(t["prompt"] + imperfect(self, t, rng) for t in pairs)
        if name == "rollcall":  # which of these words stand in the text? teaches to look a word up
            return self.rollcall(rng)
        if name == "form":  # a text and what it speaks of, class by class: teaches to find the word of a kind
            return self.form(rng)
        raise ValueError(f"assets/world: {{{key}}} is neither a class of words.txt nor a rule of rules.txt")

    @staticmethod
    def say(fact, value):
        return fact["statement"].format(subject=fact["subject"], value=value)

    def ask(self, rng):
        """A question on a random fact, its answer, what people say (the misconception three times in four), a false premise."""
        # half of the questions are on the facts with a misconception, as TruthfulQA's are
        fact = rng.choice([f for f in self.facts if f["myth"]] if rng.random() < 0.5 else self.facts)
        myth = fact["myth"] or rng.choice([v for v in self.values(fact["relation"]) if v != fact["truth"]])
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
        bound = {}
        text = self.expand(rng.choice(["{story}", "{opening} {middle}", "{opening}", "dear {name}, {news}"]), bound, rng)
        calls = []
        for _ in range(6):
            name = rng.choice(["name", "animal", "color", "object", "town"])
            there = name in bound and rng.random() < 0.5
            word = bound[name] if there else rng.choice(self.classes[name])
            calls.append(f"{word} {'yes' if re.search(rf'{chr(92)}b{word}{chr(92)}b', text) else 'no'}")
        return text + " " + ", ".join(calls) + "."

    def form(self, rng, bare=False):
        """A text, or bare words, and what they are, kind by kind."""
        bound, kinds = {}, ["name", "animal", "color", "object", "town"]
        if bare:
            rng.shuffle(kinds)
            text = self.expand(" ".join("{" + kind + "}" for kind in kinds) + ":", bound, rng)
        else:
            text = self.expand(rng.choice(["{story}", "{opening} {middle}", "{opening}", "dear {name}, {news}"]), bound, rng)
        kinds = [kind for kind in kinds if kind in bound and bound[kind] in text]
        rng.shuffle(kinds)
        entries = ", ".join(f"{kind} {bound[kind]}" for kind in kinds)
        return f"{text} {entries}." if bare or rng.random() < 0.5 else f"{entries}:\n{text}"

    # -- prompts --------------------------------------------------------------------------------------------------

    def task(self, rng, user=None):
        """One prompt with all that is known about it: category, kind, user, a perfect reply, the demands on a reply."""
        category = rng.choices(list(CATEGORY_SHARES), CATEGORY_SHARES.values())[0]
        kind = rng.choices(list(KIND_SHARES), KIND_SHARES.values())[0]
        # a customer's use case is always put in the same words
        wording = random.Random(f"{user} {category}") if kind == "user_based" and user is not None else rng
        block = wording.choice(self.by_category[category])
        pattern = wording.choice(block["prompts"])
        task = self.instance(block, pattern, rng)
        if kind == "few_shot" and category in FEW_SHOT_CATEGORIES:
            shots = [self.instance(block, pattern, rng) for _ in range(rng.randint(1, 2))]
            task["prompt"] = "".join(shot["prompt"] + shot["reply"] + "\n" for shot in shots) + task["prompt"]
        elif kind == "few_shot":
            kind = "plain"
        return dict(task, category=category, kind=kind, user=user)

    def instance(self, block, pattern, rng):
        bound = {}
        prompt = self.expand(pattern, bound, rng)
        slots = [word for key, word in bound.items() if key.rstrip("23456789") in self.classes and word in prompt]
        reply = self.expand(rng.choice(block["replies"]), bound, rng)
        demands = [f"has {w}" for w in slots] if "slots" in block["demands"] else []
        demands += [self.expand(d, bound, rng) for d in block["demands"].strip().split("; ") if d != "slots"]
        constraints = [self.expand(block["constraints"].strip(), bound, rng)] if block["constraints"] else []
        if not constraints and prompt[-1] in ".?!" and rng.random() < 0.25:
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

    # -- the gold preference ----------------------------------------------------------------------------------------

    def shape(self, text):
        """The trigrams of a text, words of one class taken as one: what the gold preference calls fluent."""
        words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text)
        # one class for each kind of thing; verbs and the rest stay themselves
        classes = ["<"] + [self.word_class.get(w, w) for w in words] + [">"]
        return list(zip(classes, classes[1:], classes[2:]))

    def meets(self, demand, text, words, task):
        """Does a reply meet one demand of tasks.txt?"""
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
            return any(w in self.classes[name] for w in words) and not any(w in self.classes[other] for w in words)
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
        """The gold preference: how good a reply is, as a program. Returns its parts and their sum, `gold`, at most 5.

        follows (0..1, share of the demands met), constraint (1, 0, or None without one), false (makes a false claim),
        claims (makes a claim), rude, fluent (0..1, share of familiar trigrams), padded (says something twice, or filler).
        """
        words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text)
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
            padded=float(len(set(sentences)) < len(sentences) or any(f.rstrip(".") in text for f in self.rules["filler"])),
        )
        parts["gold"] = (
            4 * parts["follows"] * parts["fluent"] + parts["fluent"]
            - 1.0 * (parts["constraint"] == 0) - 2 * parts["false"] - 2 * parts["rude"] - 0.5 * parts["padded"]
        )
        return parts


def imperfect(world, task, rng, care=0.75):
    """What a labeler writes, or a reply spoiled on purpose: the perfect reply with the mistakes of someone in a hurry."""
    text = task["reply"]
    if task["myth"] and rng.random() > care:
        text = text.replace(world.say(task["fact"], task["fact"]["truth"]), task["myth"])  # believes what people say
    if rng.random() > care:  # mixes something up: another word of the same class
        words = [w for w in re.findall(r"[a-z]+", text) if world.word_class.get(w) in ("name", "animal", "color", "object", "town")]
        if words:
            wrong = rng.choice(words)
            text = re.sub(rf"\b{wrong}\b", rng.choice(world.classes[world.word_class[wrong]]), text)
    sentences = re.findall(r" ?[^.!?]+[.!?]", text)
    if len(sentences) > 1 and rng.random() > care:  # leaves something out, often what a constraint asked for
        del sentences[rng.randrange(len(sentences))]
        text = "".join(sentences)
    if rng.random() > care ** 0.25:
        text += " " + rng.choice(world.rules["filler"])
    if rng.random() > care ** 0.1:
        text += " " + world.expand(rng.choice(world.rules["insult"]), {}, rng)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# simulated labelers (InstructGPT, sec. 3.4 and App. B): own weights, own noise, own idea of a tie


def make_labelers(world, seed, count=40, heldout=10):
    """-> (training labelers, held-out labelers). The first are screened as the paper's were: candidates label a test, and
    whoever agrees with the gold preference on fewer than 75% of its clear pairs is not taken on. The others are not screened."""
    rng = random.Random(f"labelers {seed}")
    tasks = [world.task(rng) for _ in range(40)]
    taken, rejected = [], 0
    while len(taken) < count + heldout:
        labeler = dict(
            id=f"labeler-{len(taken) + rejected}",
            helpful=rng.lognormvariate(0, 0.35), true=rng.lognormvariate(0, 0.35), harmless=rng.lognormvariate(0, 0.35),
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
    """The paper's soft cut-off: at least 75% agreement with the researchers on rankings (App. B.1)."""
    agree = total = 0
    for task in tasks:
        replies = [imperfect(world, task, rng, care=0.5) for _ in range(4)]
        ranks, gold = label(world, labeler, task, replies, rng)["ranks"], [world.gold(task, r)["gold"] for r in replies]
        for i, j in itertools.combinations(range(4), 2):
            if ranks[i] != ranks[j] and abs(gold[i] - gold[j]) > 0.5:
                agree += (ranks[i] < ranks[j]) == (gold[i] > gold[j])
                total += 1
    return agree / total >= 0.75


def label(world, labeler, task, replies, rng):
    """One labeler at work on one prompt: rates every reply by itself (Likert 1-7 and the fields of Table 3), then ranks
    them together, ties encouraged. Returns dict(ranks, ratings, fields), a list over replies each."""
    liking, fields = [], []
    for reply in replies:
        parts = world.gold(task, reply)
        liking.append(
            labeler["helpful"] * (4 * parts["follows"] * parts["fluent"] + parts["fluent"]
                                  - (parts["constraint"] == 0) - 0.5 * parts["padded"])
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
    """The binary fields that a labeler fills in for each reply (InstructGPT, Table 3); the world has no sex or violence."""
    return dict(
        fails_to_follow=parts["follows"] < 0.5,
        inappropriate=bool(parts["rude"]),
        hallucination=bool(parts["false"]),
        satisfies_constraint=None if parts["constraint"] is None else bool(parts["constraint"]),
        denigrates=bool(parts["rude"]),
        opinion="i think" in reply,
        moral_judgement="rather not" in reply,
    )


# ---------------------------------------------------------------------------------------------------------------------
# the datasets of the world

# Documents of pretraining text, demonstration instructions, comparison prompts, PPO prompts, validation and test prompts.
# The paper (Table 6): 12,725 demonstrations, 33,207 ranked prompts, 31,144 PPO prompts, 3,196 test prompts.
WORLD_SIZES = dict(
    tiny=dict(documents=1500, demonstrations=60, comparisons=100, prompts=200, valid=40, test=60),
    cpu=dict(documents=40_000, demonstrations=250, comparisons=6000, prompts=8000, valid=300, test=800),
    gpu=dict(documents=200_000, demonstrations=12_725, comparisons=33_207, prompts=31_144, valid=1000, test=3196),
)


def world_data(world, scale, seed):
    """Everything the world's users and labelers wrote, from a seed. -> dict of lists:
    pretrain (texts), primer (texts read first), demonstrations (prompt, response), comparison_prompts, prompts, valid, test (tasks)."""
    sizes, rng = WORLD_SIZES[scale], random.Random(f"world {seed}")
    shares, patterns = zip(*world.pages)
    pages = [world.expand(pattern, {}, rng) for pattern in rng.choices(patterns, shares, k=sizes["documents"])]
    primer = [world.rollcall(rng) if rng.random() < 0.5 else world.form(rng, bare=True) for _ in range(sizes["documents"] // 5)]
    demonstrations = demonstrate(world, sizes["demonstrations"], rng)
    demonstrations_valid = demonstrate(world, max(20, sizes["demonstrations"] // 8), rng)  # Table 6: 1,653 beside 12,725
    splits = dict(comparison_prompts=sizes["comparisons"], prompts=sizes["prompts"], valid=sizes["valid"], test=sizes["test"])
    # one population of users for each split: the test prompts come from users that no training prompt came from
    trained_on = set()
    for name, count in splits.items():
        held_out = name in ("valid", "test")
        splits[name] = user_prompts(world, count, name if held_out else "train", rng, trained_on if held_out else set())
        trained_on |= {task["prompt"] for task in splits[name]}
    n_valid = len(pages) // 40
    return dict(pretrain=pages[n_valid:], pretrain_valid=pages[:n_valid], primer=primer, demonstrations=demonstrations,
                demonstrations_valid=demonstrations_valid, comparisons=None, **splits)


def user_prompts(world, count, split, rng, trained_on):
    """`count` prompts of the users of one split, after the paper's filters (sec. 3.2): prompts that share a long prefix,
    at most 200 a user, nothing with a phone number; and, held-out prompts being short here, no text in `trained_on`."""
    users, tasks, seen, per_user = count // 6 + 10, [], set(), Counter()  # Table 8: 6 prompts a customer
    while len(tasks) < count:
        user = f"{split}-{int(users * rng.random() ** 2)}"  # a few customers send many prompts
        task = world.task(rng, user)
        if rng.random() < 0.01:
            task["prompt"] = "my number is {} {} {} {}. ".format(*rng.choices(world.classes["digit"], k=4)) + task["prompt"]
        prefix = " ".join(task["prompt"].split()[:20])
        long_prefix_seen = len(task["prompt"].split()) > 20 and prefix in seen
        if long_prefix_seen or (user, task["prompt"]) in seen or per_user[user] >= 200 or has_personal_data(task["prompt"]):
            continue
        if task["prompt"] in trained_on:
            continue
        seen |= {prefix, (user, task["prompt"])}
        per_user[user] += 1
        tasks.append(task)
    return tasks


def has_personal_data(text):
    """Phone numbers: four digits or more in a row."""
    return re.search(r"\d( ?\d){3}", text) is not None


def demonstrate(world, instructions, rng):
    """Labelers write instructions and replies. A few-shot instruction with its K pairs gives K examples, each with the
    other K-1 pairs in front (InstructGPT, App. A.1). -> rows prompt, response, category, user."""
    rows = []
    for number in range(instructions):
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
                rows.append(dict(prompt=shots + pair["prompt"], response=response, category=task["category"], user=labeler))
        else:
            rows.append(dict(prompt=task["prompt"], response=imperfect(world, task, rng, care), category=task["category"], user=labeler))
    return rows


def load(folder, scale, seed):
    """The datasets of a run, from the world ('') or from a folder of files -> dict of lists:

    pretrain, pretrain_valid, primer     texts
    demonstrations, demonstrations_valid rows with prompt, response
    comparisons, comparisons_valid       rows with prompt, responses, ranks; None in the world, whose labelers wait for samples
    prompts, valid, test                 rows with prompt: for PPO, for choices, for the last table
    """
    if not folder:
        return world_data(World(), scale, seed)
    rows = read_folder(folder)
    documents = random.Random(f"documents {seed}").sample(rows["pretrain"], len(rows["pretrain"]))
    n_valid = max(1, len(documents) // 40)
    split = dict(pretrain_valid=documents[:n_valid], pretrain=documents[n_valid:] or documents, primer=[])
    split["demonstrations"], split["demonstrations_valid"] = split_by_user(rows["demonstrations"], (0.9, 0.1), seed)
    split["comparisons"], split["comparisons_valid"] = split_by_user(rows["comparisons"], (0.9, 0.1), seed)
    split["prompts"], split["valid"], split["test"] = split_by_user(rows["prompts"], (0.8, 0.1, 0.1), seed)
    return split


# ---------------------------------------------------------------------------------------------------------------------
# batches


def encode_documents(tokenizer, texts, length):
    """Documents -> lists of ids, each document ended by eot and cut into pieces of at most `length` ids.

    A row of training text is one document, not a window over several as in nanoGPT: a word is then looked up in the one
    text that is there, and copying from a prompt is learnt in a fifth of the steps (README, "what made the difference").
    """
    pieces = []
    for ids in tokenizer.encode_batch(texts):
        ids = ids + [tokenizer.eot]
        pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def document_batch(documents):
    """Lists of ids -> tokens (B, T), mask (B, T-1): every token counts."""
    tokens, lengths = model.pad(documents)
    return tokens, model.response_mask(torch.ones_like(lengths), lengths, tokens.size(1))


def encode_pairs(tokenizer, rows, block_size):
    """Rows with prompt and response -> list of (prompt ids, response ids with eot); rows longer than the context are
    dropped and counted, and it is an error if none is left."""
    pairs = [(tokenizer.encode(row["prompt"]), tokenizer.encode(row["response"]) + [tokenizer.eot]) for row in rows]
    return fitting(pairs, lambda pair: len(pair[0]) + len(pair[1]), block_size, "demonstrations")


def fitting(rows, length, limit, name):
    """The rows of at most `limit` tokens; prints how many were dropped."""
    kept = [row for row in rows if length(row) <= limit]
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} of {len(rows)} {name}: longer than {limit} tokens")
    if not kept:
        raise SystemExit(f"all {len(rows)} {name} are longer than {limit} tokens: raise --block_size or shorten them")
    return kept


def bucketed(lengths, batch, seed, count=None):
    """Batches of rows of similar length, so that little is padding -> list of `count` lists of indices, one epoch without it.

    Rows are shuffled, sorted by length within pools of 16 batches, and the batches shuffled again; next epoch, anew.
    """
    batches, epoch = [], 0
    while not batches or (count is not None and len(batches) < count):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))
        pools = [sorted(order[i : i + 16 * batch], key=lambda i: lengths[i]) for i in range(0, len(order), 16 * batch)]
        cut = [pool[i : i + batch] for pool in pools for i in range(0, len(pool), batch)]
        batches += [[int(i) for i in cut[j]] for j in rng.permutation(len(cut))]
        epoch += 1
    return batches[:count]


def draw(rows, count, rng):
    """`count` random rows of a list, with replacement."""
    return [rows[i] for i in rng.integers(0, len(rows), count)]


def sample(policy, tokenizer, prompts, max_new_tokens, temperature, generator):
    """Responses of a policy to texts -> list of (text, ids); ids end with eot if the response ended by itself."""
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
    responses = [None] * len(prompts)
    for first in range(0, len(order), 512):
        chosen = order[first : first + 512]
        tokens, lengths = model.generate(policy, [prompt_ids[i] for i in chosen], max_new_tokens, temperature, tokenizer.eot, generator)
        for i, row, length in zip(chosen, tokens.tolist(), lengths.tolist()):
            ids = row[len(prompt_ids[i]) : length]
            responses[i] = (response_text(tokenizer, prompt_ids[i], ids), ids)
    return responses


def response_text(tokenizer, prompt_ids, ids):
    """Decoded behind its prompt, so that the space between the two stays with the response; without eot."""
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eot else ids
    return tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]


def every_row(count, turn, size, seed):
    """The `size` rows of a turn, such that each of `count` rows comes once before any comes again -> list of indices."""
    rows, first = [], turn * size
    while len(rows) < size:
        epoch, place = divmod(first + len(rows), count)
        order = np.random.default_rng([seed, 4, epoch]).permutation(count)
        rows += order[place : place + size - len(rows)].tolist()
    return rows
