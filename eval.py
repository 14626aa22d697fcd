"""
Did it work? Win rates, scores and the last table of `python ppo.py` (InstructGPT, sec. 4).

    python eval.py                     the table again, for the models in --out (trains what is missing)
    python eval.py chat                talk to --model=base, sft, ppo_init or ppo, or to the path of one
    python eval.py compare "PROMPT"    every model in --out on one prompt: response, score, kl, length

Functions here need only the models and the data. What every measurement is made of: `respond` (sample),
`scores` (reward model), and in the world `data.World.gold` and `data.label`. A response is a pair
(text, ids) everywhere; ids end with eot if the response ended by itself.
"""

import itertools
import json
import math
import os
import random
import statistics
import sys
from dataclasses import dataclass

import torch

import data
import model


def win_rate(outcomes):
    """Outcomes 1 (won), 0.5 (tie), 0 (lost), one a prompt -> rate, half-width of its normal
    95% interval."""
    rate = sum(outcomes) / len(outcomes)
    return rate, 1.96 * math.sqrt(rate * (1 - rate) / len(outcomes))


def entropy_bits(logprobs):
    """Entropy over paired completions, as bias is measured (InstructGPT, sec. 4.2).

    Total log-probability of each choice, (N, choices) in nats -> (N,) in bits. 1 bit for a pair
    means no preference.
    """
    logprobs = torch.log_softmax(logprobs, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1) / math.log(2)


def respond(policy, tokenizer, prompts, max_new_tokens, temperature, seed, device):
    """-> a response to each prompt (text), sampled from a generator of its own: the same seed
    gives every policy the same luck. Raises ValueError if a prompt does not fit the context
    with its response."""
    generator = torch.Generator(device).manual_seed(seed)
    return data.sample(policy, tokenizer, prompts, max_new_tokens, temperature, generator)


def prompted(responses, tokenizer):
    """What a few-shot prompted model said, up to the first line break: it does not know where to
    stop."""
    texts = [text.lstrip("\n").split("\n")[0] for text, _ in responses]
    return [(text, tokenizer.encode(text) + [tokenizer.eot]) for text in texts]


@torch.no_grad()
def scores(reward_model, tokenizer, prompts, responses, device):
    """The reward model's score of each response -> list of floats, one a prompt."""
    rows = [tokenizer.encode(prompt) + ids for prompt, (_, ids) in zip(prompts, responses)]
    result = []
    for i in range(0, len(rows), 128):
        tokens, lengths = model.pad(rows[i : i + 128], device)
        result += reward_model(tokens).gather(1, lengths[:, None] - 1).squeeze(1).tolist()
    return result


@torch.no_grad()
def mean_kl(policy, ref, tokenizer, prompts, responses, device):
    """KL(policy || ref), nats per response -> float: k1 on the policy's own samples (temperature 1)."""
    total = 0.0
    for i in range(0, len(prompts), 128):
        prompt_ids = [tokenizer.encode(prompt) for prompt in prompts[i : i + 128]]
        rows = [ids + response for ids, (_, response) in zip(prompt_ids, responses[i : i + 128])]
        tokens, lengths = model.pad(rows, device)
        mask = model.response_mask(
            torch.tensor([len(ids) for ids in prompt_ids], device=device), lengths, tokens.size(1)
        )
        total += float(
            (
                model.masked_logprobs(policy, tokens, mask) - model.masked_logprobs(ref, tokens, mask)
            ).sum()
        )
    return total / len(prompts)


@torch.no_grad()
def document_loss(gpt, documents, device):
    """Mean loss over all tokens of the documents (lists of ids), nats per token."""
    total = count = 0
    for batch in data.document_batches(documents):
        tokens, mask = (x.to(device) for x in batch)
        total -= float(model.masked_logprobs(gpt, tokens, mask).sum())
        count += int(mask.sum())
    return total / count


def best_epoch(path, checkpoint, reward_model, tokenizer, prompts, max_new_tokens, device):
    """The epoch of sft.pt whose samples score best on validation prompts -> epoch, {epoch: mean score}.

    The paper selects by the reward model's score, not by loss (App. C.1).
    """
    by_epoch = {}
    for epoch in checkpoint["epochs"]:
        policy, _ = model.load_policy(path, "", device, epoch)
        responses = respond(policy, tokenizer, prompts, max_new_tokens, 1.0, 0, device)
        by_epoch[epoch] = statistics.mean(scores(reward_model, tokenizer, prompts, responses, device))
    return max(by_epoch, key=by_epoch.get), by_epoch


def best_prefix(base, reward_model, tokenizer, prompts, max_new_tokens, device):
    """The few-shot prefix with the highest score on validation prompts, as the paper chose its own
    (sec. 3.5) -> prefix, mean score of each of the prefixes."""
    prefixes = [
        prefix.lstrip("\n") + "\n" for prefix in "\n".join(data.content("prefixes.txt")).split("---")
    ]
    means = []
    for prefix in prefixes:
        responses = prompted(
            respond(base, tokenizer, [prefix + p for p in prompts], max_new_tokens, 1.0, 0, device),
            tokenizer,
        )
        means.append(statistics.mean(scores(reward_model, tokenizer, prompts, responses, device)))
    return prefixes[means.index(max(means))], means


def compare(golds, baseline):
    """Gold scores of two models on the same prompts -> outcomes 1, 0.5, 0; a difference below a
    millionth is a tie."""
    return [0.5 if abs(a - b) < 1e-6 else float(a > b) for a, b in zip(golds, baseline)]


def compare_by_labelers(world, labelers, tasks, responses, baseline, seed=0):
    """Each pair of responses is ranked by one of the labelers -> outcomes 1, 0.5, 0."""
    rng, outcomes = random.Random(seed), []
    for task, (text, _), (other, _) in zip(tasks, responses, baseline):
        first, second = data.label(world, rng.choice(labelers), task, [text, other], rng)["ranks"]
        outcomes.append(0.5 if first == second else float(first < second))
    return outcomes


def agreement(world, labelers, reward_model, tokenizer, tasks, responses, device):
    """How often two judges order two samples of one prompt alike, among the pairs that neither ties.

    tasks, and for each a list of responses -> dict of shares: labelers with each other, the
    reward model with labelers, and (what only a world knows) each with the gold preference; 0.5
    without any pair.
    """
    rng = random.Random(0)
    agree = {"labelers": [], "reward model": [], "gold and labelers": [], "gold and reward model": []}
    for task, samples in zip(tasks, responses):
        texts = [text for text, _ in samples]
        first, second = (
            [-r for r in data.label(world, labeler, task, texts, rng)["ranks"]]
            for labeler in rng.sample(labelers, 2)
        )
        reward_scores = scores(
            reward_model, tokenizer, [task["prompt"]] * len(samples), samples, device
        )
        gold = [world.gold(task, text)["gold"] for text in texts]
        judges = {
            "labelers": (first, second), "reward model": (reward_scores, first),
            "gold and labelers": (gold, first), "gold and reward model": (gold, reward_scores),
        }
        for name, (a, b) in judges.items():
            for i, j in itertools.combinations(range(len(texts)), 2):
                if abs(a[i] - a[j]) > 1e-6 and abs(b[i] - b[j]) > 1e-6:
                    agree[name].append(float((a[i] > a[j]) == (b[i] > b[j])))
    return {name: statistics.mean(outcomes or [0.5]) for name, outcomes in agree.items()}


def last_table(config, device):
    """GPT, GPT prompted, SFT, PPO initialisation, PPO-ptx (and in the world the imperfect
    demonstrator) on the test prompts: printed, and written to out/table.json -> list of rows. config:
    that of ppo.py."""
    where = lambda name: getattr(config, name, "") or os.path.join(config.out, f"{name}.pt")
    load = lambda name, epoch=None: model.load_policy(
        where(name), f"run python ppo.py --out={config.out}", device, epoch
    )
    datasets = data.load(config.data, config.scale, config.seed)
    reward_path = (
        os.path.join(config.out, "reward.pt") if config.reward in ("", "gold") else config.reward
    )
    reward_model, _ = model.load_reward(reward_path, "run python reward.py", device)
    base_is_ours = not config.base or config.base.endswith(".pt")
    base = load("base")[0] if base_is_ours else model.GPT.from_pretrained(config.base).to(device).eval()
    sft_checkpoint = load("sft")[1]
    tokenizer = data.Tokenizer.from_state(sft_checkpoint["tokenizer"])
    world = None if config.data else data.World()
    limit, size = base.config.block_size, config.max_new_tokens
    fits = lambda row: len(tokenizer.encode(row["prompt"])) + size <= limit
    tasks, valid = ([row for row in datasets[name] if fits(row)] for name in ("test", "valid"))
    prompts, valid_prompts = [t["prompt"] for t in tasks], [t["prompt"] for t in valid[:200]]
    documents = data.encode_documents(tokenizer, datasets["pretrain_valid"], 128)
    documents = data.valid_documents(documents)

    epoch, by_epoch = best_epoch(
        where("sft"), sft_checkpoint, reward_model, tokenizer, valid_prompts, size, device
    )
    print(
        f"SFT epoch {epoch} has the highest score on validation prompts: "
        + "  ".join(f"{e}: {s:.2f}" for e, s in by_epoch.items())
    )
    policies = {
        "GPT": base, "SFT": load("sft", epoch)[0], "PPO init": load("ppo_init")[0],
        "PPO-ptx" if config.ptx_coef else "PPO": load("ppo")[0],
    }
    ref, last = policies["PPO init"], list(policies)[-1]
    answers = {}  # (model, temperature) -> responses
    for name, policy in policies.items():
        for temperature in (1.0,) if name == "GPT" else (1.0, 0.0):
            answers[name, temperature] = respond(
                policy, tokenizer, prompts, size, temperature, 1, device
            )
    if world:
        # a small context leaves no room for the prefix before the longest prompts: those go without it
        prefix, means = best_prefix(
            base, reward_model, tokenizer, [p for p in valid_prompts if len(p) < 200], size, device
        )
        print("GPT prompted: scores of the prefixes " + "  ".join(f"{m:.2f}" for m in means))
        room = limit - size - len(tokenizer.encode(prefix))
        with_prefix = [prefix + p if len(tokenizer.encode(p)) <= room else p for p in prompts]
        answers["GPT prompted", 1.0] = prompted(
            respond(base, tokenizer, with_prefix, size, 1.0, 1, device), tokenizer
        )
        rng = random.Random(0)
        written = [data.imperfect(world, task, rng) for task in tasks]
        answers["demonstrator", 1.0] = [
            (text, tokenizer.encode(text) + [tokenizer.eot]) for text in written
        ]
        _, heldout = data.make_labelers(world, config.seed)

        repeated = [p for p in prompts[:300] for _ in range(4)]
        four = respond(policies["SFT"], tokenizer, repeated, size, 1.0, 2, device)
        groups = [four[i : i + 4] for i in range(0, len(four), 4)]
        agree = agreement(world, heldout, reward_model, tokenizer, tasks[:300], groups, device)
        print(
            "agreement on pairs of SFT samples (held-out labelers): "
            + "  ".join(f"{name} {share:.3f}" for name, share in agree.items())
        )

    order = ["GPT", "GPT prompted", "SFT", "PPO init", last, "demonstrator"]
    table = []
    for name, temperature in sorted(answers, key=lambda key: (-key[1], order.index(key[0]))):
        responses = answers[name, temperature]
        row = dict(model=name, T=temperature)
        if world:
            parts = [world.gold(task, text) for task, (text, _) in zip(tasks, responses)]
            mean = lambda key: statistics.mean(p[key] for p in parts if p[key] is not None)
            claims = [p["false"] for p in parts if p["claims"]]
            golds = [p["gold"] for p in parts]
            baseline = [
                world.gold(task, text)["gold"]
                for task, (text, _) in zip(tasks, answers["SFT", temperature])
            ]
            outcomes = compare(golds, baseline)
            decided = [o for o in outcomes if o != 0.5]
            row.update(
                gold=mean("gold"), follows=mean("follows"), constraint=mean("constraint"),
                claims=mean("claims"), false=statistics.mean(claims) if claims else 0.0,
                rude=mean("rude"), fluent=mean("fluent"), padded=mean("padded"),
            )
            row["win"], row["±"] = win_rate(outcomes)
            row["win_untied"] = statistics.mean(decided) if decided else 0.5
            row["win_heldout"] = win_rate(
                compare_by_labelers(world, heldout, tasks, responses, answers["SFT", temperature])
            )[0]
        row["score"] = statistics.mean(scores(reward_model, tokenizer, prompts, responses, device))
        if name in ("SFT", "PPO init", last) and temperature == 1:
            row["kl"] = mean_kl(policies[name], ref, tokenizer, prompts, responses, device)
        row["length"] = statistics.mean(len(ids) for _, ids in responses)
        if name in policies and temperature == 1:
            row["pretrain_loss"] = document_loss(policies[name], documents, device)
        table.append(row)
    print_table(table)
    reviews = None
    if config.data and os.path.exists(os.path.join(config.data, "judge.jsonl")):
        reviews = review_table(config, base, reward_model, tokenizer, answers, prompts, device)
    shown = [(name, t) for name, t in answers if t == 1 and name != "demonstrator"]
    samples = [
        dict(prompt=prompts[i], **{f"{name} T={t:g}": answers[name, t][i][0] for name, t in shown})
        for i in range(min(8, len(prompts)))
    ]
    for i, sample in enumerate(samples):  # the first test prompts, whatever they show
        print(f"\n[{i}] {sample['prompt']!r}")
        for name in list(sample)[1:]:
            print(f"    {name:18s} {sample[name]!r}")
    if config.scale == "tiny":
        print("\nscale tiny: a test of the plumbing, the numbers above mean nothing")
    with open(os.path.join(config.out, "table.json"), "w") as file:
        contents = dict(
            table=table, prompts=len(prompts), sft_epoch=epoch, agreement=agree if world else None,
            reviews=reviews, samples=samples,
        )
        json.dump(contents, file, indent=1)
    return table


def review_table(config, base, reward_model, tokenizer, answers, prompts, device):
    """For a folder of imported reviews, where heldout.jsonl and judge.jsonl are: how well the reward
    model orders held-out human reviews, and how many continuations are positive, by a judge trained on
    reviews that no other model saw. Printed, and returned as {name: share}."""
    read = lambda name: data.read_jsonl(os.path.join(config.data, name))
    heldout, seen_by_judge = read("heldout.jsonl"), read("judge.jsonl")
    with_ids = lambda rows: [
        (row["response"], tokenizer.encode(row["response"]) + [tokenizer.eot]) for row in rows
    ]
    ratings = torch.tensor([float(row["rating"]) for row in heldout])
    positive = ratings > 5  # stars of ten
    score_of = lambda scalar, rows, responses: torch.tensor(
        scores(scalar, tokenizer, rows, responses, device)
    )
    heldout_prompts = [row["prompt"] for row in heldout]
    given = score_of(reward_model, heldout_prompts, with_ids(heldout))
    higher = given[:, None] > given[None, :]  # (N, N)
    untied = ratings[:, None] > ratings[None, :]
    opposite = positive[:, None] & ~positive[None, :]
    judge = train_judge(base, tokenizer, seen_by_judge, with_ids(seen_by_judge), config.seed, device)
    report = dict(
        reward_accuracy_opposite=float(higher[opposite].float().mean()),
        reward_accuracy_untied=float(higher[untied].float().mean()),
        judge_accuracy=float(
            ((score_of(judge, heldout_prompts, with_ids(heldout)) > 0) == positive).float().mean()
        ),
        heldout_reviews=len(heldout),
    )
    for (name, temperature), responses in answers.items():
        outcomes = (score_of(judge, prompts, responses) > 0).float().tolist()
        rate, half_width = win_rate(outcomes)
        report[f"positive {name} T={temperature:g}"] = rate
        report[f"± {name} T={temperature:g}"] = half_width
    print("\n" + "\n".join(f"{name:32} {value:.3f}" for name, value in report.items()))
    return report


def train_judge(base, tokenizer, rows, responses, seed, device, epochs=3, batch=32, lr=5e-4):
    """A classifier of reviews, positive above 0: the base model with a scalar head and the logistic
    loss -> ScalarGPT in eval mode."""
    torch.manual_seed(seed)
    judge = model.ScalarGPT.from_gpt(base)
    optimizer = model.adamw(judge, lr)
    ids = [tokenizer.encode(row["prompt"]) + response[1] for row, response in zip(rows, responses)]
    labels = torch.tensor([float(row["rating"] > 5) for row in rows])
    batches = [
        b for epoch in range(epochs) for b in data.bucketed(list(map(len, ids)), batch, seed + epoch)
    ]
    for step, chosen in enumerate(batches):
        tokens, lengths = model.pad([ids[i] for i in chosen], device)
        logits = judge(tokens).gather(1, lengths[:, None] - 1).squeeze(1)  # (B,)
        targets = labels[chosen].to(device)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
        model.optimizer_step(optimizer, judge, lr * model.cosine(step, len(batches)), 1.0)
    return judge.eval()


def print_table(table):
    """Rows (dicts) -> one line each under the names of their keys, missing cells empty."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    print("\n" + "  ".join(f"{c:>{max(len(c), 6)}}" if c != "model" else f"{c:14}" for c in columns))
    for row in table:
        cells = [row.get(c, "") for c in columns]
        cells = [
            f"{v:.3f}" if isinstance(v, float) and c != "T" else f"{v:g}" if c == "T" else v
            for c, v in zip(columns, cells)
        ]
        print(
            "  ".join(
                f"{v:>{max(len(c), 6)}}" if c != "model" else f"{v:14}" for c, v in zip(columns, cells)
            )
        )


# --------------------------------------------------------------------------------------------------
# talking to it: python eval.py chat, python eval.py compare

POLICIES = ("base", "sft", "ppo_init", "ppo")


@dataclass
class TalkConfig:
    """What chat and compare share. A model is as large as its checkpoint says, at every scale."""

    scale: str = "cpu"  # changes nothing here
    out: str = "out"
    seed: int = 1
    device: str = ""
    temperature: float = 1.0  # 0 is greedy
    max_new_tokens: int = 28


@dataclass
class ChatConfig(TalkConfig):
    model: str = "ppo"  # base, sft (its last epoch), ppo_init or ppo in --out; or the path of a policy
    template: str = "chat"  # plain: every line by itself, a prompt as most of the world's are
    verbose: bool = False  # show the text that the model is given


@dataclass
class CompareConfig(TalkConfig):
    samples: int = 1  # responses of each model to a prompt


def plain_prompt(line):
    """What was typed -> prompt, ended as the world's are: by a new line, or by a colon that it has.
    A backslash and an n stand for a new line, so that a dialogue fits a line."""
    text = line.replace("\\n", "\n")
    return text if text.endswith((":", "\n")) else text + "\n"


def typed(marker):
    """Yields the lines of stdin, empty ones left out. The marker is for a terminal: output that goes
    on to another program is responses only."""
    marker = marker if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(marker).strip()
        except EOFError:
            if marker:
                print()
            return
        if line:
            yield line


def fits(tokenizer, prompt, context, max_new_tokens):
    """Is there room for the prompt and its response in `context` tokens? If not, one line says so."""
    count = len(tokenizer.encode(prompt))
    if count + max_new_tokens > context:
        print(
            f"this prompt has {count} tokens and {max_new_tokens} are to follow, but the context is "
            f"{context}: shorten it or lower --max_new_tokens", file=sys.stderr,
        )
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
    in_out = os.path.join(config.out, f"{config.model}.pt")
    path = config.model if config.model.endswith(".pt") else in_out
    made_by = f"run python ppo.py --out={config.out} first, or choose another --model"
    device = model.get_device(config.device)
    policy, checkpoint = model.load_policy(path, made_by, device)
    tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
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
            print(
                f"the context of {context} tokens is full: oldest turns left out, "
                f"{len(turns) - len(kept)} of {len(turns)}", file=sys.stderr,
            )
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
    """Every model in --out on each prompt, with the same luck. kl: log pi - log ref of this response
    at temperature 1, ref the PPO initialisation, nats; length in tokens with eot. lines: text as typed,
    any iterable."""
    device = model.get_device(config.device)
    path = lambda name: os.path.join(config.out, f"{name}.pt")
    made_by = f"run python ppo.py --out={config.out}"
    found = [name for name in (*POLICIES, "reward") if model.is_finished(path(name))]
    loaded = {
        name: (model.load_reward if name == "reward" else model.load_policy)(
            path(name), made_by, device
        )
        for name in found
    }
    policies = {name: loaded[name][0] for name in found if name != "reward"}
    model.check(policies, f"{config.out} holds no finished model: {made_by} first")
    [state, *others] = [checkpoint["tokenizer"] for _, checkpoint in loaded.values()]
    model.check(
        all(other == state for other in others),
        f"the models in {config.out} have different encodings: train them again in one --out",
    )
    for name, without in (("reward", "score"), ("ppo_init", "kl")):
        if name not in found:
            print(f"no finished {path(name)}: {without} left out", file=sys.stderr)
    columns = ["score"] * ("reward" in found) + ["kl"] * ("ppo_init" in found) + ["length", "response"]
    tokenizer = data.Tokenizer.from_state(state)
    context = min(network.config.block_size for network, _ in loaded.values())
    for prompt in (plain_prompt(line) for line in lines if line.strip()):
        if not fits(tokenizer, prompt, context, config.max_new_tokens):
            continue
        print(repr(prompt))
        print(" " * 12 + "  ".join(f"{column:>6}" for column in columns))
        for name, policy in policies.items():
            for response in respond(
                policy, tokenizer, [prompt] * config.samples, config.max_new_tokens,
                config.temperature, config.seed, device,
            ):
                arguments, row = (tokenizer, [prompt], [response], device), []
                if "score" in columns:
                    row.append(f"{scores(loaded['reward'][0], *arguments)[0]:6.3f}")
                if "kl" in columns:
                    row.append(f"{mean_kl(policy, policies['ppo_init'], *arguments):6.3f}")
                row += [f"{len(response[1]):6d}", repr(response[0])]
                print(f"  {name:10}" + "  ".join(row))
        print(flush=True)


def talk(command, arguments):
    """chat or compare with the arguments behind it. Status 0 at the end of the input, at Ctrl-C, and
    when whoever reads our output goes away."""
    prompts = [a for a in arguments if command == "compare" and not a.startswith("--") and a != "-h"]
    try:
        for file in (sys.stdin, sys.stdout):
            file.reconfigure(errors="replace")  # bytes that are no text
        config = model.configure(
            ChatConfig if command == "chat" else CompareConfig,
            dict.fromkeys(("tiny", "cpu", "gpu", "gpt2"), {}),
            [a for a in arguments if a not in prompts],
        )
        # not model.check_values: temperature 0 is greedy here, and nothing is written to --out
        for name, least in (("max_new_tokens", 1), ("samples", 1), ("seed", 0), ("temperature", 0)):
            value = getattr(config, name, least)
            model.check(
                least <= value < 2**63, f"--{name}={value}: expected a finite number, at least {least}"
            )
        template = getattr(config, "template", "chat")
        model.check(template in ("chat", "plain"), f"--template={template}: expected chat or plain")
        if command == "chat":
            chat(config)
        else:
            side_by_side(config, prompts or typed("> "))
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:  # as in `python eval.py chat | head -1`; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv):
    """chat, compare, or only flags: the last table, after training what is missing."""
    if argv[:1] in (["chat"], ["compare"]):
        return talk(argv[0], argv[1:])
    model.check(
        not argv or argv[0].startswith("-"),
        f'"{" ".join(argv)}" is unknown: say chat, compare "PROMPT", or only flags such as --out=DIR',
    )
    import ppo  # only here: ppo.py itself uses this file for its last table

    model.run(ppo.main, ppo.Config, ppo.SCALES)


if __name__ == "__main__":
    main(sys.argv[1:])
