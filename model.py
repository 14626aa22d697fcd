"""
The Transformer: GPT-2 (Radford et al. 2019), the architecture of GPT-3 and of InstructGPT (App. C).

One network in two roles. `GPT` predicts the next token: the policy, the frozen reference. `ScalarGPT`
has the same body with the unembedding replaced by a projection to one number per position: the reward
model reads it at the last response token, the value model reads it at every token.

The alignment rule, for every file of this project: `logits[:, t]` predicts `tokens[:, t + 1]`.
`token_logprobs` does that shift, once; its column t belongs to the action `tokens[:, t + 1]`, and
values, kl, rewards, advantages, returns and `mask` share its index (B, T-1). Rows are right-padded:
under causal attention a real token never sees the padding behind it, so nothing here needs an
attention mask but the cache of `generate`, whose rows end at different lengths.

Shapes: B sequences, T tokens in the padded row, C channels, nh heads, hs head size, V vocabulary,
P longest prompt, R longest response, U different prompts, S slots of the cache, N unmasked tokens.
The last section holds the small plumbing that every script shares: flags, checkpoints, log lines.
"""

import ctypes
import difflib
import json
import math
import os
import signal
import struct
import sys
import time
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F

try:
    import resource
except ImportError:  # Windows has none
    resource = None

# Large tensors, the logits above all, come and go at every step. glibc gives their memory back, and the
# system clears every page anew: a fifth of the time of PPO with a vocabulary of 50,257
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX: no mmap; M_TRIM_THRESHOLD: keep up to 2 GB

# Adam's moments of words that never occur shrink towards 0; on a CPU arithmetic on denormal numbers is
# up to 100 times slower, and after some 1,700 steps most of a step was that
torch.set_flush_denormal(True)

# --------------------------------------------------------------------------------------------------
# GPT


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

    # for models trained from scratch on little text; False, False and 0.02 are GPT-2
    rotary: bool = False  # rotary positions on half of each head in place of learned ones
    match_head: bool = False  # head 0 starts with equal key and query matrices: equal tokens meet
    init_std: float = 0.02


def rotate(x, angles):
    """Rotary positions (Su et al. 2021) on the first half of each head; the rest carries content.

    x (..., B, nh, T, hs), angles: cos, sin (B or 1, 1, T, hs // 4) of position * frequency, by which
    each pair of channels turns -> (..., B, nh, T, hs).
    """
    cos, sin = (a.to(x.dtype) for a in angles)
    quarter = cos.size(-1)
    a, b, rest = x.split([quarter, quarter, x.size(-1) - 2 * quarter], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def pick(x, where):
    """x (B, T, C), where (N,) indices into B * T, or None for all -> (N, C)."""
    return x if where is None else x.flatten(0, 1).index_select(0, where)  # x[where] takes 2x as long


class CausalSelfAttention(nn.Module):
    """Multi-head attention, x (B, T, C) -> (B, T, C), or with where (N,), indices into B * T, the rows
    of these positions (N, C). angles are those of rotate() or None; with a cache, x is prompts, or one
    token that continues each row."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles, cache, where):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, nh, T, hs) each
        if angles is not None:
            q, k = rotate(qkv[:2], angles)
        if cache is not None:
            keys, values = cache.extend(self, k, v)  # (B, nh, S, hs)
        if cache is None or cache.bias is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        else:
            # one query over all slots: twice as quick on a CPU as the fused kernel over the filled ones
            scores = (q * q.size(-1) ** -0.5) @ keys.transpose(2, 3) + cache.bias  # (B, nh, 1, S)
            y = scores.softmax(-1).to(v.dtype) @ values  # (B, nh, 1, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.c_proj(pick(y, where)))


class GELU(torch.autograd.Function):
    """GPT-2's GELU: 0.5 x (1 + tanh u) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).

    On a CPU, where tanh is slow, F.gelu(x, approximate="tanh") takes 1.9 times as long in float32.
    """

    A = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=torch.double)
    B = A.item() * 0.044715  # 2u = A x + B x^3

    @staticmethod
    def forward(ctx, x):
        s = torch.addcmul(GELU.A, x, x, value=GELU.B).mul_(x).sigmoid_()
        if not ctx.needs_input_grad[0]:
            return s.mul_(x)
        ctx.save_for_backward(x, s)
        return s * x

    @staticmethod
    def backward(ctx, gradient):
        x, s = ctx.saved_tensors
        slope = torch.addcmul(GELU.A, x, x, value=3 * GELU.B).mul_(x)  # x * d(2u)/dx
        return slope.addcmul_(slope, s, value=-1).add_(1).mul_(s).mul_(gradient)


class MLP(nn.Module):
    """Two layers with GPT-2's tanh form of GELU between them, x (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        plain = x.is_cuda or x.dtype == torch.bfloat16
        x = F.gelu(x, approximate="tanh") if plain else GELU.apply(x)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """x (B, T, C) -> (B, T, C): attention, then MLP, each reading through a LayerNorm, added to x.

    With where (N,), indices into B * T, what follows the attention runs there only -> (N, C).
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, angles, cache, where=None):
        attended = self.attn(self.ln_1(x), angles, cache, where)
        x = pick(x, where) + attended
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 under its own parameter names, so that loading its weights is a copy."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        if config.rotary:
            quarter = config.n_embd // config.n_head // 4
            # base 1000, not the usual 10,000: the contexts here are some hundred tokens long
            self.register_buffer(
                "frequencies", 1000.0 ** (-torch.arange(quarter) / quarter), persistent=False
            )
        else:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # input and output embeddings are one matrix
        self.apply(self._init)

    def _init(self, module):
        std = self.config.init_std
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):  # children are initialised first
            residual_std = std / math.sqrt(2 * self.config.n_layer)  # the stream sums 2 * n_layer terms
            nn.init.normal_(module.attn.c_proj.weight, std=residual_std)
            nn.init.normal_(module.mlp.c_proj.weight, std=residual_std)
            if self.config.match_head:
                C, hs = self.config.n_embd, self.config.n_embd // self.config.n_head
                with torch.no_grad():
                    module.attn.c_attn.weight[C : C + hs] = module.attn.c_attn.weight[:hs]

    def hidden(self, tokens, cache=None, where=None):
        """tokens (B, T) -> what the heads read (B, T, C). With a cache, tokens go where its fill() or
        advance() said: whole prompts, or one token (T = 1) that continues each row.

        With where (B, T) bool: at those positions only (N, C), which spares the others what follows the
        last attention.
        """
        config, device = self.config, tokens.device
        positions = (
            torch.arange(tokens.size(1), device=device)[None] if cache is None else cache.positions
        )  # (1 or B, T)
        x = self.transformer.wte(tokens)  # (B, T, C)
        if config.rotary:
            angles = positions[:, None, :, None] * self.frequencies  # (1 or B, 1, T, hs // 4), radians
            angles = angles.cos(), angles.sin()
        else:
            x, angles = x + self.transformer.wpe(positions), None
        *blocks, last = self.transformer.h
        for block in blocks:
            x = block(x, angles, cache)
        where = None if where is None else where.flatten().nonzero().squeeze(1)  # (N,)
        x = last(x, angles, cache, where)
        return self.transformer.ln_f(x)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V); logits[:, t] predicts tokens[:, t + 1]."""
        return self.lm_head(self.hidden(tokens))

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """GPT-2 weights -> GPT on the CPU, in train mode, with GPT-2's sizes and without dropout.

        From a folder in the Hugging Face layout (config.json beside model.safetensors or
        pytorch_model.bin, both read without executing code), or by name through transformers, if that
        is installed. Raises SystemExit, in one line, for whatever is not a GPT-2 checkpoint.
        """
        if os.path.isdir(name_or_folder):
            try:
                raw_config, weights = _read_hf_folder(name_or_folder)
            except Exception as problem:  # a missing or damaged file fails in many ways
                raise SystemExit(
                    f"{name_or_folder} is damaged or is not a GPT-2 folder: {problem}"
                ) from None
        else:
            raw_config, weights = _fetch_hf(name_or_folder)
        expected = dict(
            model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
            scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        )
        for key, value in expected.items():
            if raw_config.get(key, value) != value:
                raise SystemExit(
                    f"{name_or_folder}: {key} is {raw_config[key]!r}, "
                    f"this GPT needs {value!r}: use GPT-2 weights"
                )
        names = dict(
            vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head",
            n_embd="n_embd",
        )
        for key in names.values():
            check(
                key in raw_config,
                f"{name_or_folder}: config.json has no {key}: is this a GPT-2 checkpoint?",
            )
        gpt = cls(GPTConfig(**{ours: raw_config[theirs] for ours, theirs in names.items()}))
        ours = gpt.state_dict()
        weights = {
            "transformer." + k.removeprefix("transformer."): w
            for k, w in weights.items()
            if k != "lm_head.weight"
        }
        for key in ours.keys() - {"lm_head.weight"}:
            if key not in weights:
                raise SystemExit(
                    f"{name_or_folder}: weight {key} is missing: is this a GPT-2 checkpoint?"
                )
            # GPT-2's Conv1D keeps its matrices (in, out); nn.Linear keeps (out, in)
            is_conv = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            weight = weights[key].t() if is_conv else weights[key]
            check(
                weight.shape == ours[key].shape,
                f"{name_or_folder}: {key} is {tuple(weight.shape)}, "
                f"config.json says {tuple(ours[key].shape)}",
            )
            ours[key].copy_(weight)
        return gpt


def _read_hf_folder(folder):
    """-> config.json as a dict, {name: weight}. Tensors of other types than floats are left out."""
    with open(os.path.join(folder, "config.json")) as file:
        raw_config = json.load(file)
    path = os.path.join(folder, "model.safetensors")
    if not os.path.exists(path):
        path = os.path.join(folder, "pytorch_model.bin")
        if not os.path.exists(path):
            raise SystemExit(
                f"{folder}: neither model.safetensors nor pytorch_model.bin is there: "
                "point to a GPT-2 folder"
            )
        return raw_config, torch.load(path, map_location="cpu", weights_only=True)
    # safetensors: 8 bytes with the header's length, a JSON header, then the raw tensors
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = bytearray(file.read())
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in dtypes:  # GPT-2 stores causal masks too
            continue
        begin, end = entry["data_offsets"]
        weight = torch.frombuffer(data[begin:end], dtype=dtypes[entry["dtype"]])
        weights[name] = weight.view(entry["shape"])
    return raw_config, weights


def _fetch_hf(name):
    """-> config as a dict, {name: weight}, by name through transformers. Raises SystemExit."""
    try:
        from transformers import GPT2LMHeadModel  # optional: only to download weights by name
    except ImportError:
        raise SystemExit(
            f"{name} is not a folder, and fetching it by name needs: pip install transformers"
        ) from None
    try:
        theirs = GPT2LMHeadModel.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise SystemExit(
            f"{name}: transformers could not load it: {str(problem).splitlines()[0]}"
        ) from None
    return theirs.config.to_dict(), theirs.state_dict()


class ScalarGPT(nn.Module):
    """A GPT with the unembedding replaced by one scalar per position (InstructGPT, sec. 3.5)."""

    def __init__(self, gpt):
        super().__init__()
        self.body = gpt
        self.head = nn.Linear(gpt.config.n_embd, 1)
        # std 1/sqrt(C+1): after the last LayerNorm first scores are of order 1 (lm-human-preferences)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(gpt.config.n_embd + 1))
        nn.init.zeros_(self.head.bias)

    @property
    def config(self):
        return self.body.config

    @classmethod
    def from_gpt(cls, gpt):
        """A new scalar model that starts from a copy of gpt's body, on gpt's device."""
        body = GPT(gpt.config).to(gpt.lm_head.weight.device)
        body.load_state_dict(gpt.state_dict())
        return cls(body).to(gpt.lm_head.weight.device)

    def forward(self, tokens, where=None):
        """tokens (B, T) -> one scalar per position (B, T), or (N,) where the bool mask (B, T) is True;
        position t has read tokens[:, :t + 1]."""
        hidden = self.body.hidden(tokens, where=where)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 would round scores to 1%
            return self.head(hidden).squeeze(-1)


# --------------------------------------------------------------------------------------------------
# log-probabilities


def token_logprobs(logits, tokens, temperature=1.0):
    """log pi(tokens[:, t+1] | tokens[:, :t+1]): logits (B, T, V), tokens (B, T) -> (B, T-1), nats.

    The one shift of this project: column t belongs to the action tokens[:, t + 1].
    """
    logprobs = F.log_softmax(logits[:, :-1].float() / temperature, dim=-1)  # (B, T-1, V)
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def matmul_dtype(x):
    """The type a matmul of x computes in: that of autocast if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def unembed(hidden, weight):
    """hidden (N, C), weight (V, C) -> logits (N, V), without gradients."""
    plain = hidden.is_cuda or matmul_dtype(hidden) != torch.float32 or len(weight) < 4096
    if plain or not torch.backends.mkldnn.is_available():
        return F.linear(hidden, weight)
    # oneDNN in place of MKL: 1.5 times as quick for 64 rows and GPT-2's vocabulary
    return F.linear(hidden.to_mkldnn(), weight).to_dense()


class ActionLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[actions]: hidden (N, C), weight (V, C), actions (N,) -> (N,) nats.

    What autograd would do, but logits are made PIECE numbers at a time, and with more than HELD in all
    they are made again for the gradient: with a vocabulary of 50,257 they would be most of the memory.
    """

    PIECE = 2**23  # 167 rows of GPT-2's vocabulary
    HELD = 2**26  # 256 MB

    @staticmethod
    def pieces(weight, *tensors):
        rows = max(1, ActionLogprobs.PIECE // weight.size(0))
        return zip(*(tensor.split(rows) for tensor in tensors))

    @staticmethod
    def forward(ctx, hidden, weight, actions):
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(matmul_dtype(hidden)), weight.to(matmul_dtype(weight))
        logprobs, held = torch.empty(actions.shape, device=hidden.device), []
        for h, a, out in ActionLogprobs.pieces(weight, hidden, actions, logprobs):
            logits = unembed(h, weight).float()  # (n, V)
            softmax = F.softmax(logits, dim=-1)
            # logits - logsumexp, which the most probable token tells: the gradient needs no second exp
            logsumexp = logits.amax(1) - softmax.amax(1).log()
            torch.sub(logits.gather(1, a[:, None]).squeeze(1), logsumexp, out=out)
            if len(hidden) * len(weight) <= ActionLogprobs.HELD and any(ctx.needs_input_grad):
                held.append(softmax)
        ctx.save_for_backward(hidden, weight, actions, *held)
        return logprobs

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, actions, *held = ctx.saved_tensors
        to_hidden, to_weight = (
            torch.zeros(x.shape, dtype=dtype, device=x.device)
            for x, dtype in zip((hidden, weight), ctx.dtypes)
        )
        pieces = ActionLogprobs.pieces(weight, hidden, actions, gradient, to_hidden)
        for i, (h, a, g, out) in enumerate(pieces):
            # d logprob / d logits = onehot(action) - softmax(logits)
            softmax = held[i] if held else F.softmax(unembed(h, weight).float(), dim=-1)
            to_logits = (softmax * -g[:, None]).scatter_add_(1, a[:, None], g[:, None])  # (n, V)
            to_logits = to_logits.to(h.dtype)
            out.copy_(to_logits @ weight)
            if h.dtype == to_weight.dtype:
                to_weight.addmm_(to_logits.T, h)
            else:  # a sum over pieces in bf16 would round each of them
                to_weight += to_logits.T @ h
        return to_hidden, to_weight, None


def masked_logprobs(gpt, tokens, mask, temperature=1.0):
    """token_logprobs(gpt(tokens), tokens, temperature) where mask is True, 0 elsewhere, nats.

    tokens (B, T), mask (B, T-1) -> (B, T-1). Logits are made at the unmasked positions only: with a
    small model the vocabulary is most of the work.
    """
    hidden = gpt.hidden(tokens, where=F.pad(mask, (0, 1)))  # (N, C)
    # logits / temperature, dividing C numbers in place of V
    logprobs = ActionLogprobs.apply(hidden / temperature, gpt.lm_head.weight, tokens[:, 1:][mask])
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def masked_values(value_model, tokens, mask):
    """The value of the state before each unmasked action, 0 elsewhere, score units.

    tokens (B, T), mask (B, T-1) -> (B, T-1); column t has read tokens[:, :t + 1].
    """
    values = value_model(tokens, where=F.pad(mask, (0, 1))).float()  # (N,)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


# tokens of one forward: on a CPU what its caches hold, on a GPU enough to keep it busy
MICROBATCH_TOKENS = dict(cpu=1024, cuda=65_536)


def microbatches(lengths, device):
    """Which rows share a forward: those of similar length, at most MICROBATCH_TOKENS when padded to the
    longest, or one row. lengths: list of B -> lists of row numbers.

    A quarter of that suffices where the next row is a quarter longer than the shortest: small forwards
    cost less than padding.
    """
    pieces, size = [[]], MICROBATCH_TOKENS[torch.device(device).type]
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        count, length = len(pieces[-1]), lengths[row]
        is_full = (count + 1) * length > size
        is_long = 4 * count * length > size and length > 1.25 * lengths[pieces[-1][0]]
        if count and (is_full or is_long):
            pieces.append([])
        pieces[-1].append(row)
    return pieces


def in_row_order(results, pieces):
    """What microbatches gave, tensors of (b, ...), as one tensor (B, ...) in the order of the rows."""
    order = torch.tensor(sum(pieces, []), device=results[0].device)
    return torch.cat(results)[order.argsort()]


def by_length(function, tokens, lengths, mask):
    """function(tokens (b, T), mask (b, T-1)) -> (b, T-1) on each of the microbatches, cut to its
    longest row -> (B, T-1).

    The numbers of one padded batch; on the world's texts, of 15 to 128 tokens, nearly twice as quickly.
    """
    pieces, results = microbatches(lengths.tolist(), tokens.device), []
    for rows in pieces:
        T = int(lengths[rows[-1]])
        result = function(tokens[rows, :T], mask[rows, : T - 1])
        results.append(F.pad(result, (0, tokens.size(1) - T)))
    return in_row_order(results, pieces)


# --------------------------------------------------------------------------------------------------
# sampling


class Cache:
    """Keys and values of every token seen so far, in buffers made once: (B, nh, S, hs) for each layer.

    Rows stand at different lengths: the next tokens go to `rows` (b, 1) and the slots `positions`
    (1 or b, T). `bias` is what a single query adds to its scores, None while prompts are read.
    """

    def __init__(self, gpt, rows, slots):
        config, weight = gpt.config, gpt.lm_head.weight
        self.slots = slots
        shape = (rows, config.n_head, slots, config.n_embd // config.n_head)
        kind = dict(dtype=matmul_dtype(weight), device=weight.device)
        self.buffers = {
            block.attn: [torch.zeros(shape, **kind) for _ in "kv"] for block in gpt.transformer.h
        }

    def fill(self, rows, T):
        """The next tokens are prompts, of these rows (b,), T tokens each, padding included."""
        self.rows, self.bias = rows[:, None], None
        self.positions = torch.arange(T, device=rows.device)[None]

    def advance(self, positions):
        """The next tokens, one for every row, go to the slots positions (B, 1) and see all up to it."""
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.positions = positions
        unseen = torch.arange(self.slots, device=positions.device) > positions  # (B, S)
        bias = torch.zeros(unseen.shape, device=positions.device).masked_fill(unseen, -math.inf)
        self.bias = bias[:, None, None]  # (B, 1, 1, S)

    def extend(self, layer, k, v):
        """Write k, v (b, nh, T, hs) where fill() or advance() said -> keys, values of all rows and
        slots."""
        for buffer, x in zip(self.buffers[layer], (k, v)):
            buffer[self.rows, :, self.positions] = x.transpose(1, 2).to(buffer.dtype)  # (b, T, nh, hs)
        return self.buffers[layer]

    def select(self, rows):
        """Keep these rows, in this order; a row may be taken more than once."""
        for layer, buffers in self.buffers.items():
            self.buffers[layer] = [buffer.index_select(0, rows) for buffer in buffers]

    def drop(self, ended):
        """Forget the rows where ended (B,) is True -> which rows stay, in their new order: the last
        ones move to the places of those that go. select() would copy them all, 6% of generation."""
        count = int((~ended).sum())
        order = torch.arange(len(ended), device=ended.device)
        free = order[:count][ended[:count]]
        order[free] = order[count:][~ended[count:]]
        for layer, buffers in self.buffers.items():
            for buffer in buffers:
                buffer.index_copy_(0, free, buffer.index_select(0, order[free]))
            self.buffers[layer] = [buffer[:count] for buffer in buffers]
        return order[:count]


def sample(logits, temperature, generator):
    """One token for each row: logits (B, V) -> (B,). Argmax at temperature 0, else a draw by inverting
    the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    cumulative = F.softmax(logits, dim=-1).cumsum(-1)  # (B, V)
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
    device = gpt.lm_head.weight.device
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("a prompt is empty: give at least one token, for example eot")
    if longest + max_new_tokens > gpt.config.block_size:
        raise ValueError(
            f"prompt has {longest} tokens and {max_new_tokens} are to follow, "
            f"but the context is {gpt.config.block_size}: "
            "shorten the prompt or lower --max_new_tokens"
        )
    # prefill; equal prompts (K samples of one prompt) are read once
    unique = list(dict.fromkeys(map(tuple, prompts)))
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)
    tokens, lengths = pad(unique, device)  # (U, P), (U,)
    cache = Cache(gpt, len(unique), longest + max_new_tokens)
    ends = []
    pieces = microbatches(list(map(len, unique)), device)
    for piece in pieces:
        T = len(unique[piece[-1]])
        cache.fill(torch.tensor(piece, device=device), T)
        last = torch.arange(T, device=device) == lengths[piece, None] - 1  # (b, T)
        ends.append(gpt.hidden(tokens[piece, :T], cache, last))  # (b, C)
    logits = unembed(in_row_order(ends, pieces)[rows], gpt.lm_head.weight)  # (B, V)
    if len(unique) < len(prompts):
        cache.select(rows)
    tokens, lengths = F.pad(tokens[rows], (0, max_new_tokens)), lengths[rows]  # (B, P+R), (B,)

    rows = torch.arange(len(prompts), device=device)  # the rows still in the batch
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # which of these have ended
    for step in range(max_new_tokens):
        new = sample(logits, temperature, generator).masked_fill(ended, 0)
        tokens[rows, lengths[rows]] = new  # an ended row goes on writing padding behind its eot
        lengths[rows] += ~ended
        if eot is not None:
            ended = ended | (new == eot)
            running = int((~ended).sum())
            if running == 0:
                break
            if running <= 0.9 * len(rows):
                stay = cache.drop(ended)
                rows, new, ended = rows[stay], new[stay], ended[stay]
        if step + 1 < max_new_tokens:
            # an ended row may stand one slot behind; what it computes is thrown away
            cache.advance((lengths[rows] - 1)[:, None])
            logits = unembed(gpt.hidden(new[:, None], cache)[:, -1], gpt.lm_head.weight)
    return tokens[:, : int(lengths.max())], lengths


def pad(rows, device="cpu"):
    """Lists of ids -> tokens (B, T) right-padded with 0, lengths (B,)."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens.to(device), torch.tensor([len(row) for row in rows], device=device)


def response_mask(prompt_lengths, lengths, T):
    """prompt_lengths (B,), lengths (B,) -> mask (B, T-1) bool: True where the action of column t,
    tokens[:, t + 1], belongs to the response, eot included."""
    action = torch.arange(1, T, device=lengths.device)  # the index in tokens of each column's action
    return (action >= prompt_lengths[:, None]) & (action < lengths[:, None])


# --------------------------------------------------------------------------------------------------
# plumbing: flags, checkpoints, logs, devices


def configure(Config, scales, argv):
    """Command line -> Config: the defaults of the scale (beside each Config), then --name=value flags.

    Without --scale it is gpu if there is a GPU, else cpu. Raises SystemExit for an unknown flag (with
    its near misses) or scale, and for a value of the wrong type.
    """
    kinds = {field.name: field.type for field in fields(Config)}
    flags = {}
    for argument in argv:
        name, _, text = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if argument in ("-h", "--help"):
            print(sys.modules[Config.__module__].__doc__)
            print("\n".join(f"--{field.name}={field.default}" for field in fields(Config)))
            raise SystemExit(0)
        if not argument.startswith("--") or name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=3, cutoff=0.5) or sorted(kinds)
            raise SystemExit(
                f"unknown flag {argument}: did you mean {', '.join('--' + n for n in near)}?"
            )
        if "=" not in argument and kinds[name] is not bool:
            raise SystemExit(f"--{name} needs a value: write --{name}=VALUE")
        flags[name] = convert(name, text if "=" in argument else "true", kinds[name])
    scale = flags.get("scale") or ("gpu" if torch.cuda.is_available() else "cpu")
    if scale not in scales:
        raise SystemExit(f"--scale={scale} is unknown: choose one of {', '.join(scales)}")
    return Config(**{**scales[scale], **flags, "scale": scale})


def convert(name, text, kind):
    """The text of a flag as int, float, bool or str; SystemExit if it is none."""
    booleans = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return booleans[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise SystemExit(f"--{name}={text}: expected {wanted}") from None


def check(condition, message):
    """Raises SystemExit unless condition: bad input ends in one line on stderr and exit status 1."""
    if not condition:
        raise SystemExit(message)


def check_values(config):
    """Before anything trains: sizes at least 1, rates above 0, no other number below 0, the device
    there, the output folder made and writable. Raises SystemExit."""
    for name, value in asdict(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and name != "seed":
            check(value >= 1, f"--{name}={value}: expected at least 1")
        if isinstance(value, float) and name.endswith(
            ("lr", "temperature", "cliprange", "cliprange_value")
        ):
            check(value > 0, f"--{name}={value}: expected a number above 0")
        if isinstance(value, float):
            check(
                math.isfinite(value) and value >= 0,
                f"--{name}={value}: expected a finite number, not below 0",
            )
        if name in ("sft_dropout", "pretrain_share", "primer_share", "gamma", "lam", "ema"):
            check(value <= 1, f"--{name}={value}: expected at most 1")
        if name == "dtype":
            known = ("", "float32", "bfloat16")
            check(value in known, f"--dtype={value} is unknown: use float32 or bfloat16")
    check(config.seed >= 0, f"--seed={config.seed}: expected a whole number, not below 0")
    get_device(config.device)
    try:
        os.makedirs(config.out, exist_ok=True)
        probe = os.path.join(config.out, f".probe-{os.getpid()}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as problem:
        raise SystemExit(
            f"--out={config.out}: cannot write there ({problem.strerror}): choose another folder"
        ) from None


def get_device(name):
    """'' picks cuda if it is there, else cpu -> torch.device. Raises SystemExit if it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    check(name == "cpu" or name.startswith("cuda"), f"--device={name} is unknown: use cpu or cuda")
    check(
        name == "cpu" or torch.cuda.is_available(),
        f"--device={name}: no CUDA device is there: use --device=cpu",
    )
    if name != "cpu":
        torch.set_float32_matmul_precision("high")  # what autocast leaves in fp32 may use TF32
    return torch.device(name)


def autocast(device, dtype=""):
    """bfloat16: activations in bf16, master weights in fp32 (paper: fp16). '' is that on a GPU, float32
    on a CPU."""
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def adamw(model, lr, weight_decay=0.0):
    """Adam with the paper's betas (0.9, 0.95); eps 1e-5 as in the original RLHF code. Decay of
    matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


def optimizer_step(optimizer, model, lr, grad_clip):
    """Clip the gradients, step, clear them -> their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def cosine(step, steps, floor=0.1):
    """Factor of the learning rate: a cosine from 1 to `floor`, no warm-up (InstructGPT, App. C.1)."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


def seed_step(seed, step, device):
    """A generator for this step alone, and torch's own state (dropout) set to match.

    Every random draw of a stage is a function of (seed, step): a checkpoint needs no random states, and
    a run that was stopped and started again draws what the unbroken run draws.
    """
    torch.manual_seed(seed * 1_000_003 + step)
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


# flags that may change between a run and its continuation
NOT_RESULTS = {"out", "device", "log_every", "save_seconds"}


def save_checkpoint(path, **checkpoint):
    """Write to a temporary name, then rename: a reader, or a kill, meets the old file or the new one,
    never a part. Raises SystemExit if the file cannot be written; what was there before stays."""
    temporary = f"{path}.tmp"
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem).splitlines()[0]
        if os.path.exists(temporary):
            os.remove(temporary)
        raise SystemExit(
            f"cannot write {path} ({reason}): free some space or choose another --out"
        ) from None


def load_checkpoint(path, kind, made_by):
    """Read the dict that save_checkpoint wrote; kind is 'policy' or 'reward', made_by says what to do.

    Raises SystemExit if the file is missing, damaged, not ours, or holds the other kind.
    """
    check(os.path.exists(path), f"{path} not found: {made_by}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["kind"]
    except Exception:  # torch.load fails in many ways on what is cut short or was never a checkpoint
        raise SystemExit(
            f"{path} is damaged or is not a checkpoint of this project: delete it, then {made_by}"
        ) from None
    names = {"policy": "a policy", "reward": "a reward model"}
    check(
        found == kind,
        f"{path} holds {names.get(found, found)}, expected {names[kind]}: did you mix up two paths?",
    )
    return checkpoint


def resume(path, kind, settings):
    """The checkpoint at path if there is one, made with the same settings; else None.

    Raises SystemExit, naming the flags, if it was made with others: it is neither retrained nor
    overwritten.
    """
    if not os.path.exists(path):
        return None
    checkpoint = load_checkpoint(path, kind, "run the same command again")
    theirs = checkpoint["settings"]
    differ = [k for k in settings if k not in NOT_RESULTS and theirs.get(k) != settings[k]]
    flags = ", ".join(f"--{k}={theirs.get(k)} there, {settings[k]} now" for k in differ)
    check(not differ, f"{path} was made with other flags ({flags}): choose another --out, or delete it")
    return checkpoint


def is_finished(path):
    """Is there a finished checkpoint at path? Raises SystemExit if the file is damaged or not ours."""
    if not os.path.exists(path):
        return False
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["finished"]
    except Exception:
        raise SystemExit(
            f"{path} is damaged or is not a checkpoint of this project: "
            "delete it and run the same command again"
        ) from None


def load_policy(path, made_by, device, epoch=None):
    """-> GPT in eval mode, its checkpoint. epoch: one of the kept epochs of sft.pt; None is the last.

    Raises SystemExit as load_checkpoint does, and if the checkpoint is not finished.
    """
    checkpoint = load_checkpoint(path, "policy", made_by)
    check(checkpoint["finished"], f"{path} is not finished: {made_by}")
    gpt = GPT(GPTConfig(**{**checkpoint["config"], "dropout": 0.0}))  # dropout is for SFT only
    gpt.load_state_dict(checkpoint["epochs"][epoch] if epoch else checkpoint["weights"])
    return gpt.to(device).eval(), checkpoint


def load_reward(path, made_by, device):
    """-> ScalarGPT in eval mode, its checkpoint. Raises SystemExit as load_policy does."""
    checkpoint = load_checkpoint(path, "reward", made_by)
    check(checkpoint["finished"], f"{path} is not finished: {made_by}")
    model = ScalarGPT(GPT(GPTConfig(**checkpoint["config"])))
    model.load_state_dict(checkpoint["weights"])
    return model.to(device).eval(), checkpoint


class Saver:
    """Saves every `seconds`, and after Ctrl-C, which then ends the run between two steps."""

    def __init__(self, path, seconds):
        self.path, self.seconds, self.last, self.interrupted = path, seconds, time.monotonic(), False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)

    def _interrupt(self, *_):
        if self.interrupted:  # a second Ctrl-C does not wait for the end of the step
            raise KeyboardInterrupt
        self.interrupted = True

    def save_if_due(self, step, checkpoint):
        """checkpoint: a function without arguments that returns the dict to save. Raises SystemExit
        after Ctrl-C, once the step is saved."""
        if not self.interrupted and time.monotonic() - self.last < self.seconds:
            return
        save_checkpoint(self.path, **checkpoint())
        self.last = time.monotonic()
        check(
            not self.interrupted,
            f"stopped after step {step}, saved in {self.path}: the same command goes on from there",
        )


class Log:
    """One JSON object a line in a file, and one line on the console. Rows after `step`, and a last line
    that was cut short, are removed first."""

    def __init__(self, path, step):
        self.path, kept = path, []
        if os.path.exists(path):
            with open(path) as file:
                rows = [line for line in file if line.endswith("\n")]
            kept = [line for line in rows if step and json.loads(line)["step"] <= step]
        with open(path + ".tmp", "w") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)

    def write(self, row, show=True):
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if show:
            print(
                "  ".join(
                    f"{name} {value:>{7 if isinstance(value, float) else 5}.4g}"
                    for name, value in row.items()
                ),
                flush=True,
            )


def check_finite(loss, step, path):
    """Raises SystemExit at the first loss that is not a number, before it reaches the checkpoint."""
    check(
        math.isfinite(loss),
        f"the loss is {loss} at step {step}: lower the learning rate; "
        f"{path} keeps the last good step, if one was saved",
    )


def peak_memory_gb():
    """Peak memory in GB: of the GPU if there is one, else of this process; 0 on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9 if resource else 0.0


def run(main, Config, scales):
    """What stands under `if __name__ == "__main__"` of every stage: errors of the user in one line."""
    try:
        main(configure(Config, scales, sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on from the last checkpoint") from None
    except ValueError as problem:  # raised by our functions for what a caller got wrong
        raise SystemExit(str(problem)) from None
