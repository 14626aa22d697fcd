"""
The Transformer: GPT-2 (Radford et al. 2019), the architecture of GPT-3 and of InstructGPT (App. C).

One network in two roles. `GPT` predicts the next token: the policy, the frozen reference. `ScalarGPT`
has the same body with the unembedding replaced by a projection to one number per position: the reward
model reads it at the last response token, the value model before every one.

The alignment rule, for every file of this project: `logits[:, t]` predicts `tokens[:, t + 1]`.
`token_logprobs` is that shift; its column t belongs to the action `tokens[:, t + 1]`, and what training
uses (`by_length` of `masked_logprobs`), values, kl, rewards, advantages, returns and `mask` share its index.
Rows are right-padded: under causal attention a real token never sees the padding behind it, so nothing
here needs an attention mask but the cache of `generate`, whose prompts end at different places.

Shapes: B sequences, T tokens in the padded row, C channels, nh heads, hs head size, V vocabulary,
P longest prompt, R tokens of a response at most, S slots of the cache, N unmasked tokens.
"""

import json
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

# Adam's moments of words that never occur shrink towards 0; on a CPU arithmetic on denormal numbers is
# up to 100 times slower, and after some 1,700 steps most of a step was that
torch.set_flush_denormal(True)


@dataclass
class GPTConfig:
    """The sizes of a network; n_embd is a multiple of n_head, block_size the context in tokens."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0  # residual, on what attention and MLP add to the stream (paper's SFT: 0.2)
    bias: bool = True
    # False is GPT-2. True, for models trained from scratch on little text: rotary positions in place of
    # learned ones, larger initial weights, and one head per layer that starts with key = query: equal
    # tokens meet. Without it no reward model here learns to tell whether a word of the reply is in the prompt
    lookup: bool = False


def rotate(x, angles):
    """Rotary positions (Su et al. 2021) on the first half of each head; the rest carries content.
    x (B, nh, T, hs), angles (B or 1, 1, T, hs // 4): position * frequency, by which each pair of channels
    turns -> (B, nh, T, hs)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    quarter = angles.size(-1)
    a, b, rest = x.split([quarter, quarter, x.size(-1) - 2 * quarter], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention, x (B, T, C) -> (B, T, C). angles are those of rotate(), or None. With a
    cache, x is prompts, or one token that continues each row."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.store(self, k, v)
        if cache is None or cache.slot is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        else:  # one query over all slots: on a CPU two matmuls are twice as quick as the fused kernel
            scores = q @ k.transpose(2, 3) / math.sqrt(q.size(-1)) + cache.bias  # (B, nh, 1, S)
            y = scores.softmax(-1).to(v.dtype) @ v  # (B, nh, 1, hs)
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Two layers with GPT-2's tanh form of GELU between them, x (.., C) -> (.., C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """x (B, T, C) -> (B, T, C): attention, then MLP, each reading through a LayerNorm, added to x."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, angles, cache, where=None):
        x = x + self.attn(self.ln_1(x), angles, cache)
        if where is not None:
            x = x[where]  # (N, C): what nobody reads is not computed
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 under its own parameter names, so that loading its weights is a copy."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        if config.lookup:
            quarter = config.n_embd // config.n_head // 4
            # base 1000, not the usual 10,000: the contexts here are some hundred tokens long
            frequencies = 1000.0 ** (-torch.arange(quarter) / quarter)
            self.register_buffer("frequencies", frequencies, persistent=False)
        else:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # input and output embeddings are one matrix
        for name, weight in self.named_parameters():  # LayerNorm begins at one, all biases at zero
            if weight.dim() == 2:
                # the residual stream is a sum of 2 * n_layer terms
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(weight, std=(0.06 if config.lookup else 0.02) / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            if config.lookup and name.endswith("c_attn.weight"):  # head 0: key = query
                head = weight.detach()[: config.n_embd // config.n_head]
                weight.detach()[config.n_embd : config.n_embd + len(head)] = head

    def hidden(self, tokens, cache=None, where=None):
        """tokens (B, T) -> what the heads read (B, T, C), or (N, C) where the bool mask (B, T) is True.
        With a cache, tokens are prompts, or one token (T = 1) that continues each row."""
        positions = torch.arange(tokens.size(1), device=tokens.device)  # (T,)
        if cache is not None and cache.slot is not None:
            positions = cache.positions  # (B, 1)
        x, angles = self.transformer.wte(tokens), None  # (B, T, C)
        if self.config.lookup:
            positions = positions.view(-1, 1, tokens.size(1), 1)  # (1 or B, 1, T, 1)
            angles = positions * self.frequencies  # (1 or B, 1, T, hs // 4), radians
        else:
            x = x + self.transformer.wpe(positions)
        *blocks, last = self.transformer.h
        for block in blocks:
            x = block(x, angles, cache)
        return self.transformer.ln_f(last(x, angles, cache, where))

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V); logits[:, t] predicts tokens[:, t + 1]."""
        return self.lm_head(self.hidden(tokens))

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """GPT-2's weights, from a folder in the Hugging Face layout or by name: see load_gpt2."""
        return load_gpt2(cls, name_or_folder)


class ScalarGPT(nn.Module):
    """A GPT with a scalar per position in place of the unembedding (InstructGPT, sec. 3.5)."""

    def __init__(self, gpt):
        super().__init__()
        self.body, self.config = gpt, gpt.config  # the body is shared, from_gpt() copies it first
        self.head = nn.Linear(gpt.config.n_embd, 1)
        # std 1/sqrt(C+1): after the last LayerNorm first scores are of order 1 (lm-human-preferences)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(gpt.config.n_embd + 1))
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_gpt(cls, gpt):
        """A new scalar model that starts from a copy of gpt's body, on gpt's device."""
        body = GPT(gpt.config)
        body.load_state_dict(gpt.state_dict())
        return cls(body).to(gpt.lm_head.weight.device)

    def forward(self, tokens, where=None):
        """tokens (B, T) -> one scalar per position (B, T), or (N,) where the bool mask (B, T) is True;
        position t has read tokens[:, :t + 1]."""
        hidden = self.body.hidden(tokens, where=where)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 would round scores to 1%
            return self.head(hidden).squeeze(-1)


# --------------------------------------------------------------------------------------------------
# rows of tokens


def pad(rows, device="cpu"):
    """Lists of ids -> tokens (B, T) right-padded with 0, lengths (B,)."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return tokens.to(device), torch.tensor(lengths, device=device)


def response_mask(prompt_lengths, lengths, T):
    """prompt_lengths (B,), lengths (B,) -> mask (B, T-1) bool: True where the action of column t,
    tokens[:, t + 1], belongs to the response, eot included."""
    action = torch.arange(1, T, device=lengths.device)  # the index in tokens of each column's action
    return (action >= prompt_lengths[:, None]) & (action < lengths[:, None])


# tokens of one forward: on a CPU what its caches hold, on a GPU enough to keep it busy
MICROBATCH_TOKENS = dict(cpu=512, cuda=65_536)


def microbatches(lengths):
    """Which rows share a forward: those of similar length, at most MICROBATCH_TOKENS when padded to the
    longest, or one row. lengths (B,) -> lists of row numbers, shortest rows first."""
    pieces, size = [[]], MICROBATCH_TOKENS[lengths.device.type]
    order = lengths.argsort(stable=True)
    for row, length in zip(order.tolist(), lengths[order].tolist()):
        if pieces[-1] and (len(pieces[-1]) + 1) * length > size:
            pieces.append([])
        pieces[-1].append(row)
    return pieces


def by_length(function, network, tokens, mask, *arguments):
    """function(network, tokens (b, T), mask (b, T-1), *arguments) -> (N,), a number for each unmasked
    action, on rows of similar length at a time, cut behind their last such action -> (B, T-1), 0 where
    masked. The numbers of one padded batch; on texts of 15 to 128 tokens nearly twice as quickly.

    Under torchrun each process computes its share of the rows and is told the numbers of the others: all
    go on with the same (B, T-1), in whose backward each has the gradients of its own rows
    (sft.optimizer_step adds them up). So every mean is one over the whole batch.
    """
    columns = torch.arange(2, tokens.size(1) + 1, device=mask.device)
    lengths = (mask * columns).amax(1).clamp(min=2)  # (B,), up to the last action that counts
    (rank, size), order, results = rank_and_size(), lengths.argsort(stable=True), []
    # every process gets short and long rows; one without any computes another's, times zero
    mine, is_needed = order[rank % len(order) :: size], rank < len(order)
    for piece in microbatches(lengths[mine]):
        rows = mine[piece]
        T = int(lengths[rows[-1]])
        results.append(function(network, tokens[rows, :T], mask[rows, : T - 1], *arguments))  # (N,)
    whole = torch.zeros(mask.shape, device=mask.device, dtype=results[0].dtype)
    whole[mine] = whole[mine].masked_scatter(mask[mine], torch.cat(results)) * is_needed
    if size > 1:
        told = whole.detach().clone()
        dist.all_reduce(told)
        whole = whole + (told - whole.detach())
    return whole


# --------------------------------------------------------------------------------------------------
# log-probabilities and values


def token_logprobs(logits, tokens, temperature=1.0):
    """log pi(tokens[:, t+1] | tokens[:, :t+1]): logits (B, T, V), tokens (B, T) -> (B, T-1), nats: column t
    belongs to the action tokens[:, t + 1]. To read and to test by; masked_logprobs is what is trained."""
    logprobs = F.log_softmax(logits[:, :-1].float() / temperature, dim=-1)  # (B, T-1, V)
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def masked_logprobs(gpt, tokens, mask, temperature=1.0):
    """token_logprobs(gpt(tokens), tokens, temperature) where mask is True, nats: tokens (B, T),
    mask (B, T-1) -> (N,). Logits are made at the unmasked positions only: with a small model the
    vocabulary is most of the work."""
    hidden = gpt.hidden(tokens, where=F.pad(mask, (0, 1)))  # (N, C)
    logits = gpt.lm_head(hidden / temperature).float()  # (N, V): dividing C numbers in place of V
    return -F.cross_entropy(logits, tokens[:, 1:][mask], reduction="none")


def masked_values(value_model, tokens, mask):
    """The value of the state before each unmasked action, score units: tokens (B, T), mask (B, T-1)
    -> (N,); that of column t has read tokens[:, :t + 1]."""
    return value_model(tokens, where=F.pad(mask, (0, 1)))


# --------------------------------------------------------------------------------------------------
# sampling


class Cache:
    """Keys and values of every token so far, in one buffer for each layer (2, B, nh, S, hs).

    Slots 0 to P-1 hold the prompts, right-padded; the token of step s stands in slot P + s of every
    row. `bias` is what a single query adds to its scores: -inf where a slot is padding or empty. `slot`
    is where the next tokens go, None while prompts are read.
    """

    def __init__(self, prompt_lengths, slots):
        self.buffers, self.slot = {}, None
        self.positions = prompt_lengths[:, None] - 1  # (B, 1), of the last token of each row
        empty = torch.arange(slots, device=prompt_lengths.device) > self.positions  # (B, S)
        self.bias = torch.where(empty, -math.inf, 0.0)[:, None, None]  # (B, 1, 1, S)

    def advance(self, slot):
        """The next tokens, one for every row, go to this slot."""
        self.slot, self.positions = slot, self.positions + 1
        self.bias[..., slot] = 0.0

    def store(self, layer, k, v):
        """k, v (B, nh, T, hs) -> the keys and values to attend to: of the prompts themselves while
        prompts are read (those of `rows`), else of all slots (B, nh, S, hs)."""
        if layer not in self.buffers:
            (B, _, _, S), (_, nh, _, hs) = self.bias.shape, k.shape
            self.buffers[layer] = k.new_zeros(2, B, nh, S, hs)
        buffer = self.buffers[layer]
        if self.slot is None:
            buffer[0, self.rows, :, : k.size(2)], buffer[1, self.rows, :, : k.size(2)] = k, v
            return k, v
        buffer[0, :, :, self.slot], buffer[1, :, :, self.slot] = k.squeeze(2), v.squeeze(2)
        return buffer

    def select(self, rows):
        """Keep these rows (b,), in this order."""
        self.positions, self.bias = self.positions[rows], self.bias[rows]
        self.buffers = {layer: buffer[:, rows] for layer, buffer in self.buffers.items()}


def sample(logits, temperature, generator):
    """logits (B, V) -> tokens (B,), at temperature 0 the likeliest, else drawn by inverting the cdf."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = F.softmax(logits.float() / temperature, dim=-1).cumsum(-1)  # (B, V)
    u = torch.rand(len(logits), 1, device=logits.device, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, u, right=True).squeeze(-1).clamp_(max=logits.size(-1) - 1)


@torch.no_grad()
def generate(gpt, prompts, max_new_tokens, temperature=1.0, eot=None, generator=None):
    """Sample a response to each prompt, without top-k or top-p: the policy is the distribution.

    prompts: list of B lists of ids, ragged. Returns tokens (B, T), prompts with their responses,
    right-padded with 0, and lengths (B,). A row ends after its eot, which is kept; with eot None no row
    ends early. Temperature 0 is greedy. gpt must be in eval mode if it has dropout. Raises ValueError
    if a prompt is empty or does not fit the context together with its response.
    """
    longest = max(map(len, prompts))
    if not all(prompts):
        raise ValueError("a prompt is empty: give at least one token, for example eot")
    if longest + max_new_tokens > gpt.config.block_size:
        counts = f"prompt has {longest} tokens and {max_new_tokens} are to follow"
        advice = "shorten the prompt or lower --max_new_tokens"
        raise ValueError(f"{counts}, but the context is {gpt.config.block_size}: {advice}")
    # 1. read the prompts, those of similar length together
    tokens, lengths = pad(prompts, gpt.lm_head.weight.device)  # (B, P), (B,)
    cache, pieces, ends = Cache(lengths, longest + max_new_tokens), microbatches(lengths), []
    for cache.rows in pieces:  # store() puts what is read there
        T = int(lengths[cache.rows[-1]])
        last = torch.arange(T, device=lengths.device) == lengths[cache.rows, None] - 1  # (b, T)
        ends.append(gpt.lm_head(gpt.hidden(tokens[cache.rows, :T], cache, last)))  # (b, V)
    logits = torch.cat(ends)[torch.tensor(sum(pieces, []), device=lengths.device).argsort()]  # (B, V)
    tokens = F.pad(tokens, (0, max_new_tokens))  # (B, P+R)

    # 2. one token for every row at a time
    rows = torch.arange(len(prompts), device=lengths.device)  # the rows still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)  # which of these have ended
    for step in range(max_new_tokens):
        new = sample(logits, temperature, generator).masked_fill(ended, 0)
        tokens[rows, lengths[rows]] = new  # an ended row goes on writing padding behind its eot
        lengths[rows] += ~ended
        if eot is not None:
            ended = ended | (new == eot)
            stay = (~ended).nonzero().squeeze(1)
            if len(stay) == 0:
                break
            if len(stay) <= 0.9 * len(rows):
                rows, new, ended = rows[stay], new[stay], ended[stay]
                cache.select(stay)
        if step + 1 < max_new_tokens:
            cache.advance(longest + step)
            logits = gpt.lm_head(gpt.hidden(new[:, None], cache)[:, -1])
    return tokens[:, : int(lengths.max())], lengths


# ==================================================================================================
# The bar: below it, GPT-2's files, and what several processes need.
# ==================================================================================================


GPT2 = dict(  # what other models of the same layout do differently
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
)


def load_gpt2(cls, name_or_folder):
    """GPT-2 weights -> GPT on the CPU, in train mode, with GPT-2's sizes and without dropout. From a
    folder (config.json beside model.safetensors or pytorch_model.bin, both read without executing code),
    or by name through transformers, if that is installed. Raises SystemExit, in one line, for whatever is
    not a GPT-2 checkpoint."""
    try:
        raw, weights = _read(name_or_folder)
        for key, value in GPT2.items():
            if raw.get(key, value) != value:
                raise ValueError(f"{key} is {raw[key]!r}, this GPT needs {value!r}")
        sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
        gpt = cls(GPTConfig(*(raw[size] for size in sizes)))
        weights = {key.removeprefix("transformer."): weight for key, weight in weights.items()}
        with torch.no_grad():
            for key, ours in gpt.transformer.named_parameters():
                # GPT-2's Conv1D keeps its matrices (in, out); nn.Linear keeps (out, in)
                is_conv = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                theirs = weights[key].t() if is_conv else weights[key]
                if theirs.shape != ours.shape:
                    raise ValueError(f"{key} is {[*theirs.shape]}, config.json says {[*ours.shape]}")
                ours.copy_(theirs)
    except KeyError as why:
        raise SystemExit(f"{name_or_folder}: {why} is missing: is this a GPT-2 checkpoint?")
    except Exception as why:  # a damaged file, no network, another model: they fail in many ways
        reason = str(why).partition("\n")[0]
        raise SystemExit(f"{name_or_folder} cannot be used as GPT-2 weights: {reason}")
    return gpt


def _read(name_or_folder):
    """-> config.json as a dict, {name: weight}."""
    if not os.path.isdir(name_or_folder):
        try:
            from transformers import GPT2LMHeadModel  # optional: only to download weights by name
        except ImportError:
            raise ValueError("no such folder; fetching it by name needs: pip install transformers")
        theirs = GPT2LMHeadModel.from_pretrained(name_or_folder)
        return theirs.config.to_dict(), theirs.state_dict()
    with open(os.path.join(name_or_folder, "config.json")) as file:
        raw = json.load(file)
    path = os.path.join(name_or_folder, "model.safetensors")
    if not os.path.exists(path):
        path = os.path.join(name_or_folder, "pytorch_model.bin")
        return raw, torch.load(path, map_location="cpu", weights_only=True)
    # safetensors: 8 bytes with the header's length, a JSON header, then the raw tensors
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        content = bytearray(file.read())
    weights = {}
    for name, entry in header.items():
        if entry.get("dtype") in dtypes:  # neither __metadata__ nor the causal masks of GPT-2
            begin, end = entry["data_offsets"]
            weight = torch.frombuffer(content[begin:end], dtype=dtypes[entry["dtype"]])
            weights[name] = weight.view(entry["shape"])
    return raw, weights


def rank_and_size():
    """Which process this is, and of how many: 0 and 1, but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Is this the process that writes and prints? Under torchrun the others do not."""
    return rank_and_size()[0] == 0


def generate_shared(gpt, prompts, *arguments):
    """generate(); under torchrun each process continues its share of the prompts -> the same for all."""
    rank, size = rank_and_size()
    if size == 1:
        return generate(gpt, prompts, *arguments)
    tokens, lengths = generate(gpt, prompts[rank::size] or prompts[:1], *arguments)
    rows = [None] * size
    dist.all_gather_object(rows, [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())])
    return pad([rows[i % size][i // size] for i in range(len(prompts))], tokens.device)
