"""Tests of model.py: the network, log-probabilities, sampling with a cache, weights from elsewhere."""

import json
import math
import os
import struct
import sys
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import model
from conftest import Trap, close, fails, pickled, same, tiny_gpt, tiny_scalar

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 1]])


# -- GPT and ScalarGPT ---------------------------------------------------------------------------------------


LOOKUP = pytest.mark.parametrize("lookup", [False, True], ids=["gpt2", "lookup"])


def forward_by_definition(gpt, ids):
    """GPT-2 for one row of ids, with attention as a loop over heads and positions, and rotary positions as
    complex numbers that turn -> logits (T, V)."""
    w = gpt.state_dict()
    C, nh = gpt.config.n_embd, gpt.config.n_head
    hs = C // nh
    weights_of = lambda name: (w[name + ".weight"], w.get(name + ".bias"))
    norm = lambda x, name: F.layer_norm(x, (C,), *weights_of(name), eps=1e-5)
    linear = lambda x, name: F.linear(x, *weights_of(name))

    def turn(vector, t):
        if not gpt.config.lookup:
            return vector
        quarter = hs // 4
        angles = torch.tensor([t * 1000 ** (-i / quarter) for i in range(quarter)], dtype=torch.float64)
        turned = torch.complex(vector[:quarter], vector[quarter : 2 * quarter]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag, vector[2 * quarter :]])

    x = w["transformer.wte.weight"][ids]
    if not gpt.config.lookup:
        x = x + w["transformer.wpe.weight"][: len(ids)]
    for layer in range(gpt.config.n_layer):
        name = f"transformer.h.{layer}."
        q, k, v = linear(norm(x, name + "ln_1"), name + "attn.c_attn").split(C, -1)  # (T, C) each
        y = torch.zeros_like(x)
        for head in range(nh):
            c = slice(head * hs, (head + 1) * hs)
            for t in range(len(ids)):
                scores = [turn(q[t, c], t) @ turn(k[s, c], s) / math.sqrt(hs) for s in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                y[t, c] = sum(weight * v[s, c] for s, weight in enumerate(weights))
        x = x + linear(y, name + "attn.c_proj")
        h = linear(norm(x, name + "ln_2"), name + "mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, name + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


@LOOKUP
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_the_definition_whatever_the_padding_holds(bias, lookup):
    """J6: rows are right-padded, so a real token never sees padding, as no later token, and keeps its
    position."""
    gpt = tiny_gpt(bias=bias, lookup=lookup).double()
    expected = torch.stack([forward_by_definition(gpt, ids) for ids in TOKENS.tolist()])
    for filler in (0, 9):
        found = gpt(F.pad(TOKENS, (0, 5), value=filler))[:, :6]
        close(found, expected, 1e-5 if lookup else 1e-10)  # the frequencies are made in float32


@pytest.mark.parametrize("lookup, std", [(False, 0.02), (True, 0.06)])
def test_initial_weights(lookup, std):
    """What is added to the residual stream has std / sqrt(2 * n_layer), half for two layers. With lookup,
    query and key matrices of head 0 are equal at first, so that a token attends most to itself earlier."""
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(100, 50, n_layer=2, n_head=2, n_embd=128, lookup=lookup))
    for name, weight in gpt.state_dict().items():
        if name.endswith("bias"):
            assert (weight == 0).all()
        elif "ln_" in name:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(std / 2 if "c_proj" in name else std, rel=0.05)
    for block in gpt.transformer.h:
        query, other_query, key = block.attn.c_attn.weight.split(64)[:3]
        assert torch.equal(query, key) == lookup and not torch.equal(other_query, key)


def test_dropout_is_residual_and_acts_in_training_only():
    """J10: in eval mode there is none. Where all of it is dropped, what attention and MLP add to the stream is
    gone, and the stream is not."""
    gpt = tiny_gpt(dropout=1.0)
    assert torch.equal(gpt(TOKENS), tiny_gpt()(TOKENS))
    embedded = gpt.transformer.wte(TOKENS) + gpt.transformer.wpe.weight[: TOKENS.size(1)]
    close(gpt.train()(TOKENS), gpt.lm_head(gpt.transformer.ln_f(embedded)), 1e-5)


def test_a_new_scalar_gpt_has_a_copy_of_the_body_and_a_head_that_gives_scores_of_order_one():
    """J2, L8: std 1 / sqrt(8 + 1) = 1/3 for 8 channels, over 2,000 heads; bias 0."""
    torch.manual_seed(0)
    gpt = tiny_gpt(n_layer=1, n_embd=8)
    heads = [model.ScalarGPT(gpt).head for _ in range(2000)]
    assert torch.cat([head.weight for head in heads]).std().item() == pytest.approx(1 / 3, rel=0.02)
    assert not any(head.bias.item() for head in heads)
    scalar = model.ScalarGPT.from_gpt(gpt)
    assert torch.equal(scalar.body.hidden(TOKENS), gpt.hidden(TOKENS))
    with torch.no_grad():
        scalar.body.transformer.wte.weight.add_(1)
    assert not torch.equal(scalar.body.hidden(TOKENS), gpt.hidden(TOKENS))


# -- log-probabilities ---------------------------------------------------------------------------------------


def test_token_logprobs_by_hand():
    """L30: logits 2, 1, 0: log softmax is -0.407606, -1.407606, -2.407606 at temperature 1;
    at 0.7 -0.260118, -1.688690, -3.117261. J12: the first token is conditioned on, never predicted, and what
    the last position predicts is not there; a shift would cost 40 nats."""
    logits = torch.tensor([[[2.0, 1.0, 0.0]] * 3 + [[0.0, 40.0, 0.0]]])
    tokens = torch.tensor([[2, 0, 1, 2]])
    close(model.token_logprobs(logits, tokens), [[-0.407606, -1.407606, -2.407606]], 1e-6)
    close(model.token_logprobs(logits, tokens, 0.7), [[-0.260118, -1.688690, -3.117261]], 1e-6)


def test_the_logprob_of_an_action_that_never_happens_is_finite():
    """exp(-200) is 0 in float32; a kl of -inf would end the run."""
    close(model.token_logprobs(torch.tensor([[[0.0, 200.0], [0.0, 0.0]]]), torch.tensor([[1, 0]])), [[-200.0]])
    gpt = tiny_gpt()
    with torch.no_grad():
        gpt.transformer.ln_f.weight *= 300
    logprobs = model.masked_logprobs(gpt, TOKENS, TOKENS[:, 1:] % 2 == 0)
    assert logprobs.min() < -200 and logprobs.isfinite().all()
    logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in gpt.parameters())


def test_bfloat16_rounds_what_the_head_of_a_reward_model_reads_but_not_what_it_says():
    """bfloat16 has 8 bits: a number is rounded by up to 0.4%, and some ten such errors add up."""
    scalar = tiny_scalar()
    with torch.autocast("cpu", torch.bfloat16):
        scores = scalar(TOKENS)
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())
    assert not torch.equal(scores, scalar(TOKENS))
    close(scores, scalar(TOKENS), 0.1)


@pytest.mark.parametrize("size", [1, 12, 512])  # tokens of a forward: one row each, some, all rows
def test_by_length_finds_the_lengths_in_the_mask(size, monkeypatch):
    """Rows of any lengths, one of them without an action: each number is that of one padded batch, in its
    place, and no forward is wider than the last action that it needs."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", size)
    gpt, tokens = tiny_gpt(), torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(5, 8, dtype=torch.bool)
    for row, columns in enumerate(([1, 2], [0, 3, 7], [], [0], [2, 4])):
        mask[row, columns] = True
    widths, logprobs = [], model.masked_logprobs
    function = lambda gpt, tokens, *given: widths.append(tokens.size(1)) or logprobs(gpt, tokens, *given)
    expected = model.token_logprobs(gpt(tokens), tokens, 0.7) * mask
    close(model.by_length(function, gpt, tokens, mask, 0.7), expected, 1e-5)
    assert widths == {1: [2, 2, 4, 6, 9], 12: [4, 6, 9], 512: [9]}[size]


# -- sampling ------------------------------------------------------------------------------------------------

RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2], [10, 9]]


def luck():
    return torch.Generator().manual_seed(0)


def watch_logits(monkeypatch):
    """The logits that generate samples from, step by step."""
    seen, sample = [], model.sample

    def watched(logits, *args):
        seen.append(logits.clone())
        return sample(logits, *args)

    monkeypatch.setattr(model, "sample", watched)
    return seen


def greedy_by_definition(gpt, prompt, max_new_tokens, eot):
    """argmax of a full forward, token by token, one row, no cache."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(gpt(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == eot:
            break
    return ids


@LOOKUP
@pytest.mark.parametrize("size, rounded", [(1, False), (6, False), (1024, False), (1024, True)])
def test_cached_logits_equal_a_full_forward_at_every_step(size, rounded, lookup, monkeypatch):
    """J7: with ragged prompts, one by one, some or all in a forward; in float64. In bfloat16 up to rounding:
    logits near 4 are 1/64 apart, and a cache rounds no more than a forward."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", size)
    gpt = tiny_gpt(lookup=lookup, std=0.1) if rounded else tiny_gpt(lookup=lookup).double()
    seen = watch_logits(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        tokens, _ = model.generate(gpt, RAGGED, 8, generator=luck())
        assert len(seen) == 8 and all((logits.dtype == torch.bfloat16) == rounded for logits in seen)
        for step, logits in enumerate(seen):
            for b, prompt in enumerate(RAGGED):
                full = gpt(tokens[b : b + 1, : len(prompt) + step])[0, -1]
                close(logits[b], full, 1 / 16 if rounded else 1e-10)


@pytest.mark.parametrize("eot", [0, 3])
def test_a_row_leaves_after_its_eot_which_is_kept_and_changes_nothing_for_greedy(monkeypatch, eot):
    """J7, J8, J13: forty rows that end at different steps, or not, some with a prompt that ends in eot; each
    equals its own uncached decoding, and only padding stands behind. When all have ended, no step follows."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", 30)
    gpt, generator, seen = tiny_gpt(61, std=0.2).double(), luck(), watch_logits(monkeypatch)
    prompts = [torch.randint(11, (n % 5 + 1,), generator=generator).tolist() for n in range(40)]
    tokens, lengths = model.generate(gpt, prompts, 12, temperature=0, eot=eot)
    expected = [greedy_by_definition(gpt, prompt, 12, eot) for prompt in prompts]
    assert same((tokens, lengths), model.pad(expected)) and any(prompt[-1] == eot for prompt in prompts)
    steps = [len(row) - len(prompt) for row, prompt in zip(expected, prompts)]
    assert len(set(steps)) >= 4 and len({len(logits) for logits in seen}) >= 3  # they end, and leave
    seen.clear()
    ending = [prompt for prompt, n in zip(prompts, steps) if n < 12]
    tokens, lengths = model.generate(gpt, ending, 12, temperature=0, eot=eot)
    assert len(seen) == max(n for n in steps if n < 12) and tokens.size(1) == lengths.max()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_sampled_tokens_have_the_frequencies_of_softmax(temperature):
    """J8: chi-square over the 16 pairs of a four-word vocabulary, beside rows of another prompt; 37.70 is the
    0.1% point of 15 degrees of freedom. Nothing is cut from the distribution, no top-k, no top-p; every row
    has luck of its own, and the same from the same generator."""
    gpt, n = tiny_gpt(11, vocab_size=4, std=0.25), 4000
    draw = lambda: model.generate(gpt, [[1, 2, 3], [2]] * n, 2, temperature, generator=luck())[0]
    tokens = draw()
    assert torch.equal(tokens, draw())
    for prompt, pairs in (([1, 2, 3], tokens[::2, 3:5]), ([2], tokens[1::2, 1:3])):
        counts = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).double()
        first = (gpt(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)  # (4,)
        # (4, 4)
        second = (gpt(torch.tensor([prompt + [a] for a in range(4)]))[:, -1] / temperature).softmax(-1)
        expected = n * (first[:, None] * second).flatten().detach().double()
        assert expected.min() > 5  # else the approximation is none
        assert ((counts - expected) ** 2 / expected).sum() < 37.70


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.5, 3), (1 - 2**-24, 3)])
def test_a_token_of_probability_zero_is_never_drawn(monkeypatch, u, token):
    """Inverting a cumulative distribution goes wrong at its steps: here the first, a middle and the last token
    have none, at the least random number, at one half and at the greatest."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, u))
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert model.sample(logits, 1.0, None).tolist() == [token]


def test_a_response_may_fill_the_context_but_not_overflow_it():
    gpt = tiny_gpt(block_size=8)
    assert model.generate(gpt, [[1, 2, 3], [4]], 5, temperature=0)[0].size(1) == 8
    with pytest.raises(ValueError, match="prompt has 3 tokens and 6 are to follow, but the context is 8"):
        model.generate(gpt, [[1, 2, 3], [4]], 6)
    with pytest.raises(ValueError, match="a prompt is empty"):
        model.generate(gpt, [[1], []], 3)


# -- weights from outside ------------------------------------------------------------------------------------

HF_CONFIG = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
                 vocab_size=11, n_positions=24, n_layer=2, n_head=2, n_embd=16)


def hf_weights(gpt, prefix):
    """Our weights as Hugging Face stores GPT-2: matrices of linear layers (in, out),
    and a boolean causal mask for each layer."""
    found = {}
    for name, weight in gpt.state_dict().items():
        if name == "lm_head.weight":
            continue
        is_linear = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        found[prefix + name.removeprefix("transformer.")] = (weight.t() if is_linear else weight).contiguous()
    for layer in range(gpt.config.n_layer):
        found[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
    if prefix:
        found["lm_head.weight"] = gpt.lm_head.weight.detach().clone()
    return found


def write_safetensors(path, weights):
    """By hand: the header's length in 8 bytes, a JSON header, the raw bytes."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, weight in weights.items():
        raw = bytes(weight.contiguous().view(torch.uint8).flatten().tolist())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = dict(dtype=kinds[weight.dtype], shape=list(weight.shape), data_offsets=offsets)
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def write_hf_folder(folder, weights, file="model.safetensors", **config):
    (folder / "config.json").write_text(json.dumps({**HF_CONFIG, **config}))
    if file == "model.safetensors":
        write_safetensors(folder / file, weights)
    else:
        torch.save(weights, folder / file)
    return str(folder)


@pytest.mark.parametrize("file, prefix, dtype", [
    ("model.safetensors", "transformer.", torch.float32), ("pytorch_model.bin", "transformer.", torch.float32),
    ("model.safetensors", "", torch.float16), ("model.safetensors", "", torch.bfloat16),
    ("pytorch_model.bin", "", torch.bfloat16),
])
def test_from_pretrained_reads_a_hugging_face_folder(tmp_path, file, prefix, dtype):
    gpt = tiny_gpt()
    weights = {k: w.to(dtype) if w.is_floating_point() else w for k, w in hf_weights(gpt, prefix).items()}
    loaded = model.GPT.from_pretrained(write_hf_folder(tmp_path, weights, file))
    assert same(loaded.state_dict(), {k: w.to(dtype).float() for k, w in gpt.state_dict().items()})


def replaced(old, new):
    return lambda raw: raw.replace(old, new)


@pytest.mark.parametrize("file, damaged, says", [
    ("model.safetensors", lambda raw: raw[: len(raw) // 2], "cannot be used"),
    ("model.safetensors", lambda raw: b"", "cannot be used"),
    ("model.safetensors", lambda raw: None, "pytorch_model.bin"),
    ("model.safetensors", replaced(b"h.1.mlp.c_fc.bias", b"h.1.mlp.c_fc.bios"),
     "'h.1.mlp.c_fc.bias' is missing: is this a GPT-2 checkpoint"),
    ("pytorch_model.bin", lambda raw: pickled(dict(trap=Trap())), "cannot be used"),  # nor run
    ("config.json", lambda raw: None, "config.json"),
    ("config.json", lambda raw: b"{", "cannot be used"),
    ("config.json", replaced(b"n_positions", b"n_ctx"), "'n_positions' is missing"),
    ("config.json", replaced(b'"vocab_size": 11', b'"vocab_size": 12'), "config.json says"),
    # another architecture: the weights would fit, and the logits be wrong
    ("config.json", replaced(b"gelu_new", b"relu"), "activation_function is 'relu', this GPT needs"),
    ("config.json", replaced(b'"gpt2"', b'"gpt_neo"'), "model_type is 'gpt_neo', this GPT needs"),
    ("config.json", replaced(b"1e-05", b"1e-06"), "layer_norm_epsilon is 1e-06, this GPT needs"),
    ("config.json", replaced(b"{", b'{"scale_attn_weights": false,'), "scale_attn_weights is False"),
    ("config.json", replaced(b"{", b'{"scale_attn_by_inverse_layer_idx": true,'), "layer_idx is True"),
])
def test_a_damaged_or_foreign_folder_ends_in_one_line(tmp_path, monkeypatch, file, damaged, says):
    monkeypatch.chdir(tmp_path)
    weights = file if file.endswith(".bin") else "model.safetensors"
    folder = write_hf_folder(tmp_path, hf_weights(tiny_gpt(), "transformer."), weights)
    content, files = damaged((tmp_path / file).read_bytes()), {"config.json", weights}
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    message = fails(model.GPT.from_pretrained, folder)
    assert message.startswith(folder) and says in message and set(os.listdir()) <= files


def test_from_pretrained_by_name_takes_what_transformers_fetches(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    assert "pip install transformers" in fails(model.GPT.from_pretrained, "gpt2")
    library, gpt = mock.Mock(), tiny_gpt()
    theirs = library.GPT2LMHeadModel.from_pretrained.return_value
    theirs.config.to_dict.return_value = HF_CONFIG
    theirs.state_dict.return_value = hf_weights(gpt, "transformer.")
    monkeypatch.setitem(sys.modules, "transformers", library)
    assert torch.equal(model.GPT.from_pretrained("gpt2")(TOKENS), gpt(TOKENS))
    library.GPT2LMHeadModel.from_pretrained.side_effect = OSError("gtp2 is not a model\nsecond line")
    assert fails(model.GPT.from_pretrained, "gtp2").endswith("gtp2 is not a model")


def test_logits_equal_those_of_transformers(tmp_path):
    """A random GPT-2 of the library, and our copy of it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_layer=3, n_head=4, n_embd=32, initializer_range=0.2
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, tokens = model.GPT.from_pretrained(str(tmp_path)).eval(), torch.randint(60, (3, 32))
    close(ours(tokens), theirs(tokens).logits, 2e-4)
