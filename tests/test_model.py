"""Tests of model.py: the network, log-probabilities, sampling, weights from outside, checkpoints, flags."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass

import pytest
import torch

import model
from conftest import tiny_gpt, tiny_scalar

CPU = torch.device("cpu")
BOTH_POSITIONS = pytest.mark.parametrize("rotary", [False, True], ids=["learned", "rotary"])
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 1]])


def close(found, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found.detach(), expected.detach(), atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------------------
# GPT and ScalarGPT


def forward_by_definition(gpt, ids):
    """GPT-2 for one row of ids, with attention as a loop over heads and positions, and rotary positions as
    complex numbers that turn -> logits (T, V)."""
    w = dict(gpt.state_dict())
    C, nh = gpt.config.n_embd, gpt.config.n_head
    hs = C // nh

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def turn(vector, t):
        if not gpt.config.rotary:
            return vector
        quarter = hs // 4
        angles = torch.tensor([t * 1000 ** (-i / quarter) for i in range(quarter)], dtype=torch.float64)
        turned = torch.complex(vector[:quarter], vector[quarter : 2 * quarter]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag, vector[2 * quarter :]])

    x = w["transformer.wte.weight"][ids]
    if not gpt.config.rotary:
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


@BOTH_POSITIONS
def test_forward_equals_the_definition(rotary):
    gpt = tiny_gpt(rotary=rotary).double()
    # the frequencies are made in float32
    close(gpt(TOKENS[:1])[0], forward_by_definition(gpt, TOKENS[0].tolist()), 1e-5)


@BOTH_POSITIONS
def test_a_future_token_cannot_change_an_earlier_logit(rotary):
    """And the token itself does change its own."""
    gpt = tiny_gpt(rotary=rotary).double()
    before = gpt(TOKENS)
    for t in range(TOKENS.size(1)):
        changed = TOKENS.clone()
        changed[:, t] = (changed[:, t] + 3) % 11
        after = gpt(changed)
        close(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@BOTH_POSITIONS
def test_more_right_padding_changes_no_logit(rotary):
    """J6: rows are right-padded, so a real token never sees padding and keeps its position;
    whatever the padding holds."""
    gpt = tiny_gpt(rotary=rotary).double()
    for filler in (0, 9):
        padded = torch.nn.functional.pad(TOKENS, (0, 5), value=filler)
        close(gpt(padded)[:, :6], gpt(TOKENS))


@BOTH_POSITIONS
def test_the_order_of_earlier_tokens_matters(rotary):
    gpt = tiny_gpt(rotary=rotary).double()
    difference = gpt(torch.tensor([[1, 2, 3]]))[0, -1] - gpt(torch.tensor([[2, 1, 3]]))[0, -1]
    assert difference.abs().max() > 1e-3


def test_rotary_attention_sees_distances_only():
    """The product of a query at position m and a key at n depends on m - n; and position 0 turns nothing."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)  # (B, nh, T, hs)
    frequencies = torch.tensor([[[[1.0, 0.3, 0.1, 0.01]]]], dtype=torch.float64)  # (1, 1, 1, hs // 4)
    at = lambda position: ((position * frequencies).cos(), (position * frequencies).sin())
    product = lambda m, n: (model.rotate(q, at(m)) * model.rotate(k, at(n))).sum()
    close(product(7, 3), product(24, 20))
    assert abs(product(7, 3) - product(7, 4)) > 1e-3
    close(model.rotate(q, at(0)), q)


def test_gpt2_small_has_124_million_parameters():
    """50257 * 768 + 1024 * 768 + 12 * (12 * 768^2 + 13 * 768) + 2 * 768 = 124,439,808; the head adds none,
    it is the embedding."""
    with torch.device("meta"):
        gpt = model.GPT(model.GPTConfig(50257, 1024, 12, 12, 768))
    assert sum(p.numel() for p in gpt.parameters()) == 124_439_808
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


def test_initial_weights_are_gpt2s():
    """std 0.02; what is added to the residual stream 0.02 / sqrt(2 * n_layer) = 0.01 for two layers."""
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(100, 50, n_layer=2, n_head=2, n_embd=128))
    for name, weight in gpt.state_dict().items():
        if name.endswith("bias"):
            assert (weight == 0).all()
        elif "ln_" in name:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(0.01 if "c_proj" in name else 0.02, rel=0.05)


def test_match_head_starts_with_keys_equal_to_queries_in_head_0():
    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(11, 8, n_layer=2, n_head=2, n_embd=16, match_head=True))
    for block in gpt.transformer.h:
        queries, keys, _ = block.attn.c_attn.weight.split(16)  # heads of 8 rows
        assert torch.equal(queries[:8], keys[:8]) and not torch.equal(queries[8:], keys[8:])


def test_dropout_acts_in_training_only():
    """J10: in eval mode two forwards are identical."""
    gpt = tiny_gpt(dropout=0.5)
    assert torch.equal(gpt(TOKENS), gpt(TOKENS))
    assert not torch.equal(gpt.train()(TOKENS), gpt(TOKENS))


def test_scalar_gpt_starts_from_a_copy_of_the_body():
    gpt = tiny_gpt()
    scalar = model.ScalarGPT.from_gpt(gpt)
    assert torch.equal(scalar.body.hidden(TOKENS), gpt.hidden(TOKENS))
    with torch.no_grad():
        scalar.body.transformer.wte.weight.add_(1)
    assert not torch.equal(scalar.body.hidden(TOKENS), gpt.hidden(TOKENS))


def test_scalar_head_std():
    """J2, L8: 1 / sqrt(4096 + 1) = 0.015623, bias 0."""
    torch.manual_seed(0)
    scalar = model.ScalarGPT(model.GPT(model.GPTConfig(2, 2, n_layer=0, n_head=1, n_embd=4096)))
    assert scalar.head.weight.std().item() == pytest.approx(0.015623, rel=0.05)
    assert scalar.head.bias.item() == 0


def test_the_scalar_at_a_position_has_read_the_tokens_up_to_it():
    scalar = tiny_scalar().double()
    before = scalar(TOKENS)
    assert before.shape == TOKENS.shape
    changed = TOKENS.clone()
    changed[:, 3] = 0
    moved = (scalar(changed) - before).abs() > 1e-9
    assert moved.tolist() == [[False] * 3 + [True] * 3] * 2


# ------------------------------------------------------------------------------------------------------------
# log-probabilities


def test_token_logprobs_of_a_uniform_model():
    """J12: -ln V."""
    close(model.token_logprobs(torch.zeros(2, 6, 11), TOKENS), torch.full((2, 5), -math.log(11)), 1e-6)


def test_token_logprobs_of_a_model_that_knows_the_next_token():
    """J12: logits[:, t] points at tokens[:, t + 1], so every action is certain;
    a shift by one would cost 40 nats."""
    logits = torch.zeros(2, 6, 11)
    logits[:, :-1].scatter_(-1, TOKENS[:, 1:, None], 40.0)
    close(model.token_logprobs(logits, TOKENS), torch.zeros(2, 5), 1e-6)


def test_token_logprobs_by_hand():
    """L30: logits 2, 1, 0: log softmax is -0.407606, -1.407606, -2.407606 at temperature 1;
    at 0.7 -0.260118, -1.688690, -3.117261."""
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(1, 4, 3)
    tokens = torch.tensor([[2, 0, 1, 2]])  # the first token is conditioned on, never predicted
    close(model.token_logprobs(logits, tokens), [[-0.407606, -1.407606, -2.407606]], 1e-6)
    close(model.token_logprobs(logits, tokens, 0.7), [[-0.260118, -1.688690, -3.117261]], 1e-6)


MASK = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masked_logprobs_equal_token_logprobs_on_the_mask(temperature):
    gpt = tiny_gpt()
    expected = model.token_logprobs(gpt(TOKENS), TOKENS, temperature) * MASK
    close(model.masked_logprobs(gpt, TOKENS, MASK, temperature), expected, 1e-5)


def test_masked_logprobs_have_the_gradient_of_token_logprobs():
    gpt = tiny_gpt()
    (model.token_logprobs(gpt(TOKENS), TOKENS) * MASK).sum().backward()
    expected = {name: p.grad.clone() for name, p in gpt.named_parameters()}
    gpt.zero_grad()
    model.masked_logprobs(gpt, TOKENS, MASK).sum().backward()
    for name, p in gpt.named_parameters():
        close(p.grad, expected[name], 1e-4)


@pytest.mark.parametrize("held", [54, 55])  # made again for the gradient, or held
@pytest.mark.parametrize("piece", [1, 11, 33, 55])  # 1, 1, 3 and all 5 rows of logits at a time
def test_action_logprobs_and_their_gradients_are_autograds(monkeypatch, piece, held):
    """However few logits are made or held at a time: beside a plain log_softmax, in numbers and gradients."""
    monkeypatch.setattr(model.ActionLogprobs, "PIECE", piece)
    monkeypatch.setattr(model.ActionLogprobs, "HELD", held)
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    actions, weighing = torch.tensor([0, 10, 3, 3, 7]), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    found = model.ActionLogprobs.apply(hidden, weight, actions)
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), actions]
    close(found, expected.detach(), 1e-5)
    gradients = [torch.autograd.grad((x * weighing).sum(), (hidden, weight)) for x in (found, expected)]
    for mine, autograds in zip(*gradients):
        close(mine, autograds, 1e-5)


def test_the_logprob_of_an_action_that_never_happens_is_finite():
    """exp(-200) is 0 in float32; a KL of -inf would end the run."""
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)
    logprob = model.ActionLogprobs.apply(logits, torch.eye(2), torch.tensor([0]))
    assert logprob.item() == -200 and torch.autograd.grad(logprob, logits)[0].tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("piece", [11, 55])
def test_bfloat16_rounds_logprobs_and_gradients_but_keeps_their_type(monkeypatch, piece):
    monkeypatch.setattr(model.ActionLogprobs, "PIECE", piece)
    weighing = torch.linspace(-1, 1, 15).view(3, 5)
    results = {}
    for dtype in ("float32", "bfloat16"):
        gpt = tiny_gpt(std=0.1)
        with model.autocast(torch.device("cpu"), dtype):
            found = model.masked_logprobs(gpt, TOKENS[:, :6].repeat(2, 1)[:3], weighing.abs() > 0.2)
        (found * weighing).sum().backward()
        results[dtype] = [found.detach(), *(p.grad for p in gpt.parameters())]
    for rounded, exact in zip(results["bfloat16"], results["float32"]):
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_bfloat16_does_not_round_scores():
    scalar = tiny_scalar()
    with model.autocast(torch.device("cpu"), "bfloat16"):
        scores = scalar(TOKENS)
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())
    close(scores, scalar(TOKENS), 0.1)


def test_unembed_is_a_matmul_at_a_large_vocabulary_too():
    for vocab_size in (7, 5000):
        hidden, weight = torch.randn(3, 8), torch.randn(vocab_size, 8)
        close(model.unembed(hidden, weight), hidden @ weight.T, 1e-5)
        with model.autocast(CPU, "bfloat16"):
            close(model.unembed(hidden, weight).float(), hidden @ weight.T, 1e-5)


def test_gelu_is_torchs_tanh_form_and_so_is_its_gradient():
    x = torch.linspace(-9, 9, 181, dtype=torch.double, requires_grad=True)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    close(model.GELU.apply(x), expected.detach(), 1e-7)
    close(model.GELU.apply(x.detach()), expected.detach(), 1e-7)  # no gradient wanted: made in place
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (model.GELU.apply(x), expected)]
    close(*slopes, 1e-7)


def test_hidden_at_some_positions_is_all_of_it_there():
    gpt, scalar = tiny_gpt(), tiny_scalar()
    where = torch.tensor([[True, False, False, True, False, True], [False] * 5 + [True]])
    close(gpt.hidden(TOKENS, where=where), gpt.hidden(TOKENS)[where], 1e-5)
    close(scalar(TOKENS, where), scalar(TOKENS)[where], 1e-5)


def test_masked_values_are_those_of_the_states_before_the_actions():
    scalar = tiny_scalar()
    close(model.masked_values(scalar, TOKENS, MASK), scalar(TOKENS)[:, :-1] * MASK, 1e-5)


def test_response_mask_by_hand():
    """J5: prompt 2, length 5, padded to 6. Column t is the action tokens[:, t + 1]: index 2, 3 and 4,
    the last one eot."""
    mask = model.response_mask(torch.tensor([2, 1]), torch.tensor([5, 6]), 6)
    assert mask.tolist() == [[False, True, True, True, False], [True] * 5]


def test_response_mask_holds_the_stop_token_and_never_padding():
    """J5: also where padding has the same id as the stop token, since masks come from lengths."""
    eot = 0
    tokens, lengths = model.pad([[5, 6, 7, eot], [5, 8, eot]])
    mask = model.response_mask(torch.tensor([2, 1]), lengths, tokens.size(1))
    assert tokens[:, 1:][mask].tolist() == [7, eot, 8, eot]


def test_pad_by_hand():
    tokens, lengths = model.pad([[1, 2, 3], [4]])
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0]] and lengths.tolist() == [3, 1]


# ------------------------------------------------------------------------------------------------------------
# sampling

RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2], [10, 9]]


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


def rows_of(tokens, lengths):
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]


@pytest.mark.parametrize("size", [1, 6, 1024])  # tokens of a forward: prompts one by one, some, all
@BOTH_POSITIONS
def test_cached_logits_equal_a_full_forward_at_every_step(rotary, size, monkeypatch):
    """J7: with ragged prompts, in float64."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", size)
    gpt = tiny_gpt(rotary=rotary).double()
    seen = watch_logits(monkeypatch)
    tokens, _ = model.generate(gpt, RAGGED, 8, generator=torch.Generator().manual_seed(0))
    assert len(seen) == 8
    for step, logits in enumerate(seen):
        for b, prompt in enumerate(RAGGED):
            close(logits[b], gpt(tokens[b : b + 1, : len(prompt) + step])[0, -1])


@BOTH_POSITIONS
def test_dropping_finished_rows_changes_nothing_for_greedy(rotary, monkeypatch):
    """J7: forty rows that end at different steps and leave the batch;
    each equals its own uncached decoding."""
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", 30)
    gpt, eot = tiny_gpt(0, rotary=rotary, std=0.2).double(), 7
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(11, (n % 5 + 1,), generator=generator).tolist() for n in range(40)]
    seen = watch_logits(monkeypatch)
    tokens, lengths = model.generate(gpt, prompts, 12, temperature=0, eot=eot)
    expected = [greedy_by_definition(gpt, prompt, 12, eot) for prompt in prompts]
    assert rows_of(tokens, lengths) == expected
    # they end at different steps
    assert len({len(row) - len(prompt) for row, prompt in zip(expected, prompts)}) >= 4
    assert len({len(logits) for logits in seen}) >= 3  # and leave


@pytest.mark.parametrize("eot", [0, 3])
def test_a_row_ends_after_its_eot_which_is_kept(eot):
    """J8, J13: at most one eot, at the end; only padding behind;
    a row without one has all the tokens it may have."""
    gpt = tiny_gpt()
    prompts = RAGGED * 20
    tokens, lengths = model.generate(gpt, prompts, 10, eot=eot, generator=torch.Generator().manual_seed(0))
    ended = 0
    for prompt, row, length in zip(prompts, tokens.tolist(), lengths.tolist()):
        response = row[len(prompt) : length]
        assert row[: len(prompt)] == prompt and not any(row[length:])
        assert eot not in response[:-1]
        assert response[-1] == eot or len(response) == 10
        ended += response[-1] == eot
    assert 10 < ended < 100
    assert tokens.size(1) == lengths.max()


def test_a_prompt_that_holds_eot_goes_on():
    tokens, lengths = model.generate(
        tiny_gpt(), [[3, 3]], 5, eot=None, generator=torch.Generator().manual_seed(0)
    )
    with_eot, lengths_with = model.generate(
        tiny_gpt(), [[3, 3]], 5, eot=3, generator=torch.Generator().manual_seed(0)
    )
    shared = int(lengths_with[0])
    assert shared > 2 and with_eot[0].tolist() == tokens[0, :shared].tolist() and lengths.tolist() == [7]


def test_without_eot_no_row_ends_early():
    _, lengths = model.generate(tiny_gpt(), RAGGED * 20, 10, generator=torch.Generator().manual_seed(0))
    assert lengths.tolist() == [len(prompt) + 10 for prompt in RAGGED * 20]


def test_generation_stops_when_every_row_has_ended(monkeypatch):
    """A model whose next token is always eot needs one step, not twenty."""
    gpt = tiny_gpt()
    seen = watch_logits(monkeypatch)
    always = lambda hidden, weight: torch.eye(11)[3].expand(len(hidden), 11) * 99
    monkeypatch.setattr(model, "unembed", always)
    tokens, lengths = model.generate(gpt, RAGGED, 15, eot=3)
    assert len(seen) == 1 and lengths.tolist() == [len(prompt) + 1 for prompt in RAGGED]


def test_equal_prompts_are_continued_each_in_its_place(monkeypatch):
    monkeypatch.setitem(model.MICROBATCH_TOKENS, "cpu", 4)
    gpt = tiny_gpt().double()
    prompts = [[1, 2], [3, 4, 5], [1, 2], [6], [3, 4, 5], [1, 2]]
    found = rows_of(*model.generate(gpt, prompts, 6, temperature=0))
    assert found == [greedy_by_definition(gpt, prompt, 6, None) for prompt in prompts]


def test_equal_prompts_get_different_samples():
    tokens, _ = model.generate(
        tiny_gpt(std=0.2), [[1, 2]] * 8, 10, generator=torch.Generator().manual_seed(0)
    )
    assert len(set(map(tuple, tokens.tolist()))) == 8


def test_the_same_generator_gives_the_same_samples():
    generator = lambda seed: torch.Generator().manual_seed(seed)
    draw = lambda seed: model.generate(tiny_gpt(), RAGGED, 10, generator=generator(seed))[0]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_sampled_tokens_have_the_frequencies_of_softmax(temperature):
    """J8: chi-square over the 16 pairs of a four-word vocabulary, beside rows of another prompt; 37.70 is the
    0.1% point of 15 degrees of freedom. Nothing is cut from the distribution: no top-k, no top-p."""
    gpt, n = tiny_gpt(3, vocab_size=4, std=0.25), 4000
    tokens, _ = model.generate(
        gpt, [[1, 2, 3], [2]] * n, 2, temperature, generator=torch.Generator().manual_seed(0)
    )
    for prompt, pairs in (([1, 2, 3], tokens[::2, 3:5]), ([2], tokens[1::2, 1:3])):
        counts = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).double()
        first = (gpt(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)  # (4,)
        # (4, 4)
        second = (gpt(torch.tensor([prompt + [a] for a in range(4)]))[:, -1] / temperature).softmax(-1)
        expected = n * (first[:, None] * second).flatten().detach().double()
        assert expected.min() > 5  # else the approximation is none
        assert ((counts - expected) ** 2 / expected).sum() < 37.70


def test_sample_never_draws_a_token_of_probability_zero():
    """Inverting a cumulative distribution goes wrong at its steps:
    the first, a middle and the last token have none here."""
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(20_000, 5)
    drawn = model.sample(logits, 1.0, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}


def test_sample_at_the_edge_of_a_step(monkeypatch):
    """The random number 0 comes once in 16 million draws,
    and must not give the first token if that has probability zero."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))
    assert model.sample(torch.tensor([[-torch.inf, 0.0, 0.0]]), 1.0, None).tolist() == [1]


def test_a_response_may_fill_the_context_but_not_overflow_it():
    gpt = tiny_gpt(block_size=8)
    tokens, _ = model.generate(gpt, [[1, 2, 3], [4]], 5, temperature=0)
    assert tokens.size(1) == 8
    with pytest.raises(ValueError, match="prompt has 3 tokens and 6 are to follow, but the context is 8"):
        model.generate(gpt, [[1, 2, 3], [4]], 6)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        model.generate(tiny_gpt(), [[1], []], 3)


# ------------------------------------------------------------------------------------------------------------
# weights from outside

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
        header[name] = dict(
            dtype=kinds[weight.dtype],
            shape=list(weight.shape),
            data_offsets=[len(data), len(data) + len(raw)],
        )
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


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_from_pretrained_reads_a_hugging_face_folder(tmp_path, prefix, file):
    gpt = tiny_gpt()
    loaded = model.GPT.from_pretrained(write_hf_folder(tmp_path, hf_weights(gpt, prefix), file))
    assert torch.equal(loaded(TOKENS), gpt(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_pretrained_reads_half_precision(tmp_path, dtype):
    gpt = tiny_gpt()
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in hf_weights(gpt, "").items()}
    loaded = model.GPT.from_pretrained(write_hf_folder(tmp_path, weights))
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, gpt.state_dict()[name].to(dtype).float())


def test_from_pretrained_names_a_missing_weight(tmp_path):
    weights = hf_weights(tiny_gpt(), "transformer.")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(SystemExit, match="weight transformer.h.1.mlp.c_fc.bias is missing"):
        model.GPT.from_pretrained(write_hf_folder(tmp_path, weights))


def test_from_pretrained_refuses_another_architecture(tmp_path):
    folder = write_hf_folder(tmp_path, hf_weights(tiny_gpt(), ""), activation_function="relu")
    with pytest.raises(SystemExit, match="activation_function is 'relu', this GPT needs 'gelu_new'"):
        model.GPT.from_pretrained(folder)


def test_from_pretrained_says_what_a_folder_lacks(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    with pytest.raises(SystemExit, match="neither model.safetensors nor pytorch_model.bin"):
        model.GPT.from_pretrained(str(tmp_path))


def without(key):
    config = {**HF_CONFIG}
    del config[key]
    return json.dumps(config)


@pytest.mark.parametrize("file, damaged", [
    ("model.safetensors", lambda raw: raw[: len(raw) // 2]),
    ("model.safetensors", lambda raw: b""),
    ("config.json", lambda raw: b"{"),
    ("config.json", lambda raw: without("n_positions").encode()),
    ("config.json", lambda raw: json.dumps({**HF_CONFIG, "vocab_size": 12}).encode()),
], ids=["truncated", "empty", "no JSON", "no context length", "another vocabulary"])
def test_a_damaged_hugging_face_folder_ends_in_one_line(tmp_path, file, damaged):
    write_hf_folder(tmp_path, hf_weights(tiny_gpt(), "transformer."))
    (tmp_path / file).write_bytes(damaged((tmp_path / file).read_bytes()))
    with pytest.raises(SystemExit, match=str(tmp_path)):
        model.GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "pytorch_model.bin"])
def test_a_hugging_face_folder_without_config_or_with_a_damaged_bin_ends_in_one_line(tmp_path, file):
    write_hf_folder(tmp_path, hf_weights(tiny_gpt(), ""), "pytorch_model.bin")
    (tmp_path / file).unlink() if file == "config.json" else (tmp_path / file).write_bytes(b"junk")
    with pytest.raises(SystemExit, match=str(tmp_path)):
        model.GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "key, value", [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True)]
)
def test_from_pretrained_refuses_another_attention(tmp_path, key, value):
    """The weights would fit, and the logits be wrong."""
    folder = write_hf_folder(tmp_path, hf_weights(tiny_gpt(), ""), **{key: value})
    with pytest.raises(SystemExit, match=f"{key} is {value}"):
        model.GPT.from_pretrained(folder)


def test_from_pretrained_by_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="pip install transformers"):
        model.GPT.from_pretrained("gpt2")


@pytest.fixture
def theirs(tmp_path):
    """A random GPT-2 of the transformers library, and our copy of it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_layer=3, n_head=4, n_embd=32, initializer_range=0.2
    )
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    gpt2.save_pretrained(tmp_path)
    return gpt2, model.GPT.from_pretrained(str(tmp_path)).eval()


def test_logits_equal_those_of_transformers(theirs):
    tokens = torch.randint(60, (3, 32))
    close(theirs[1](tokens), theirs[0](tokens).logits, 2e-4)


def test_greedy_text_equals_that_of_transformers(theirs):
    prompts = torch.randint(60, (3, 8))
    kwargs = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs[0].generate(prompts, attention_mask=torch.ones_like(prompts), **kwargs)
    assert torch.equal(model.generate(theirs[1], prompts.tolist(), 20, temperature=0)[0], expected)


# ------------------------------------------------------------------------------------------------------------
# checkpoints


def save(path, gpt, **more):
    model.save_checkpoint(str(path), **{
        "kind": "policy", "config": asdict(gpt.config), "weights": gpt.state_dict(), "epochs": {}, "step": 7,
        "finished": True, **more,
    })


def test_a_policy_comes_back_as_it_was(tmp_path):
    gpt = tiny_gpt(rotary=True)
    save(tmp_path / "p.pt", gpt)
    loaded, checkpoint = model.load_policy(str(tmp_path / "p.pt"), "", CPU)
    assert torch.equal(loaded(TOKENS), gpt(TOKENS)) and checkpoint["step"] == 7 and not loaded.training


def test_a_reward_model_comes_back_as_it_was(tmp_path):
    scalar = tiny_scalar()
    save(tmp_path / "r.pt", scalar, kind="reward")
    loaded, _ = model.load_reward(str(tmp_path / "r.pt"), "", CPU)
    assert torch.equal(loaded(TOKENS), scalar(TOKENS)) and not loaded.training


def test_one_of_the_kept_epochs_can_be_loaded(tmp_path):
    last, second = tiny_gpt(0), tiny_gpt(1)
    save(tmp_path / "p.pt", last, epochs={2: second.state_dict()})
    load = lambda epoch: model.load_policy(str(tmp_path / "p.pt"), "", CPU, epoch)[0]
    assert torch.equal(load(2)(TOKENS), second(TOKENS)) and torch.equal(load(None)(TOKENS), last(TOKENS))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """Half of the bytes, then a full disk: the old checkpoint is whole, no rest is left,
    and one line says what to do."""
    path = tmp_path / "p.pt"
    save(path, tiny_gpt())
    old = path.read_bytes()

    def full_disk(_, temporary):
        with open(temporary, "wb") as file:
            file.write(old[: len(old) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(SystemExit, match=r"cannot write .*p.pt \(No space left on device\)"):
        save(path, tiny_gpt(1))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["p.pt"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.pt"
    save(path, tiny_gpt())
    old = path.read_bytes()

    def killed(_, temporary):
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, tiny_gpt(1))
    assert path.read_bytes() == old


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"not a checkpoint"],
    ids=["truncated", "empty", "text"],
)
def test_a_damaged_file_ends_in_one_line(tmp_path, damage):
    path = tmp_path / "p.pt"
    save(path, tiny_gpt())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        SystemExit, match="p.pt is damaged or is not a checkpoint of this project: delete it, then run sft"
    ):
        model.load_checkpoint(str(path), "policy", "run sft")
    with pytest.raises(SystemExit, match="damaged"):
        model.is_finished(str(path))


def test_a_foreign_file_is_not_a_checkpoint(tmp_path):
    """A file of torch's that holds plain weights, as other projects write them."""
    torch.save(tiny_gpt().state_dict(), tmp_path / "p.pt")
    with pytest.raises(SystemExit, match="not a checkpoint of this project"):
        model.load_checkpoint(str(tmp_path / "p.pt"), "policy", "run sft")


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_loading_runs_no_code_from_the_file(tmp_path):
    torch.save(dict(kind="policy", trap=Trap(str(tmp_path / "trapped"))), tmp_path / "p.pt")
    with pytest.raises(SystemExit, match="damaged"):
        model.load_checkpoint(str(tmp_path / "p.pt"), "policy", "run sft")
    assert not (tmp_path / "trapped").exists()


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(SystemExit, match='sft.pt not found: run "python sft.py" first'):
        model.load_checkpoint(str(tmp_path / "sft.pt"), "policy", 'run "python sft.py" first')


def test_the_wrong_kind_is_named(tmp_path):
    save(tmp_path / "r.pt", tiny_scalar(), kind="reward")
    with pytest.raises(SystemExit, match="r.pt holds a reward model, expected a policy"):
        model.load_policy(str(tmp_path / "r.pt"), "", CPU)


@pytest.mark.parametrize("kind, load", [("policy", model.load_policy), ("reward", model.load_reward)])
def test_an_unfinished_checkpoint_is_no_input_for_the_next_stage(tmp_path, kind, load):
    save(tmp_path / "p.pt", tiny_gpt(), kind=kind, finished=False)
    with pytest.raises(SystemExit, match="p.pt is not finished: run sft"):
        load(str(tmp_path / "p.pt"), "run sft", CPU)


def test_is_finished(tmp_path):
    path = str(tmp_path / "p.pt")
    assert not model.is_finished(path)
    save(path, tiny_gpt(), finished=False)
    assert not model.is_finished(path)
    save(path, tiny_gpt())
    assert model.is_finished(path)


def test_resume_with_the_same_flags(tmp_path):
    path = str(tmp_path / "p.pt")
    assert model.resume(path, "policy", dict(lr=0.1)) is None
    save(path, tiny_gpt(), settings=dict(lr=0.1, log_every=5))
    # how often to log changes no result
    assert model.resume(path, "policy", dict(lr=0.1, log_every=50))["step"] == 7


def test_resume_names_the_flags_that_differ(tmp_path):
    path = tmp_path / "p.pt"
    save(path, tiny_gpt(), settings=dict(lr=0.1, beta=0.02, seed=1))
    old = path.read_bytes()
    with pytest.raises(SystemExit) as stop:
        model.resume(str(path), "policy", dict(lr=0.2, beta=0.02, seed=3))
    assert "(--lr=0.1 there, 0.2 now, --seed=1 there, 3 now): choose another --out" in str(stop.value)
    assert "beta" not in str(stop.value) and path.read_bytes() == old


# ------------------------------------------------------------------------------------------------------------
# stopping, logging


def test_saver_saves_on_ctrl_c_and_ends_between_two_steps(tmp_path):
    path, steps = tmp_path / "p.pt", []
    with pytest.raises(
        SystemExit, match="stopped after step 3, saved in .*: the same command goes on from there"
    ):
        with model.Saver(str(path), seconds=1e9) as saver:
            for step in range(1, 10):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                steps.append(step)  # the step under way comes to its end
                saver.save_if_due(step, lambda: dict(kind="policy", step=step))
    assert steps == [1, 2, 3] and torch.load(path)["step"] == 3


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with model.Saver(str(tmp_path / "p.pt"), seconds=1e9):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_saver_gives_the_signal_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with model.Saver(str(tmp_path / "p.pt"), seconds=1e9):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("seconds, saved", [(0.0, [1, 2, 3]), (1e9, [])])
def test_saver_saves_when_its_time_is_up(tmp_path, seconds, saved):
    found = []
    with model.Saver(str(tmp_path / "p.pt"), seconds) as saver:
        for step in (1, 2, 3):
            saver.save_if_due(step, lambda: found.append(step) or {})
    assert found == saved


def test_log_is_cut_back_to_a_step(tmp_path):
    """What was logged after the last checkpoint, and a line that a kill cut short,
    are written again by the run that goes on."""
    path = str(tmp_path / "sft.jsonl")
    log = model.Log(path, 0)
    for step in range(6):
        log.write(dict(step=step, loss=step / 2), show=False)
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    log = model.Log(path, 3)
    log.write(dict(step=4, loss=9.0), show=False)
    with open(path) as file:
        expected = [dict(step=s, loss=s / 2) for s in range(4)] + [dict(step=4, loss=9.0)]
        assert [json.loads(line) for line in file] == expected


def test_log_shows_its_rows_on_the_console(tmp_path, capsys):
    log = model.Log(str(tmp_path / "sft.jsonl"), 0)
    log.write(dict(step=3, loss=1.23456))
    log.write(dict(step=4, loss=7.0), show=False)
    assert capsys.readouterr().out.split() == ["step", "3", "loss", "1.235"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    model.check_finite(1.0, 12, "out/p.pt")
    with pytest.raises(SystemExit, match=f"the loss is {loss} at step 12"):
        model.check_finite(loss, 12, "out/p.pt")


# ------------------------------------------------------------------------------------------------------------
# flags


@dataclass
class Config:
    scale: str = "cpu"
    out: str = "out"
    data: str = ""
    device: str = ""
    dtype: str = ""
    seed: int = 1
    batch: int = 8
    lr: float = 1e-3
    ptx_coef: float = 0.5
    shuffle: bool = False


SCALES = dict(tiny=dict(batch=2, lr=1e-2), cpu=dict())


def configure(*argv):
    return model.configure(Config, SCALES, argv)


def test_flags_are_converted_by_the_type_of_their_field():
    assert configure("--scale=cpu", "--lr=3e-4", "--batch=16", "--shuffle=yes", "--out=a=b") == Config(
        scale="cpu", out="a=b", lr=3e-4, batch=16, shuffle=True)


def test_a_scale_sets_defaults_that_flags_override():
    assert configure("--scale=tiny", "--lr=5") == Config(scale="tiny", batch=2, lr=5.0)


def test_a_switch_needs_no_value_and_dashes_are_underscores():
    assert configure("--scale=cpu", "--shuffle", "--ptx-coef=2") == Config(shuffle=True, ptx_coef=2.0)


@pytest.mark.parametrize("argv, message", [
    (["--learning_rat=1", "--scale=cpu"], "unknown flag --learning_rat=1: did you mean"),
    (["--bacth=3"], "unknown flag --bacth=3: did you mean --batch"),
    (["--ptx_coeff=3"], "did you mean --ptx_coef"),
    (["batch=3"], "unknown flag batch=3: did you mean --batch"),
    (["--batch"], "--batch needs a value: write --batch=VALUE"),
    (["--batch=2.5"], "--batch=2.5: expected a whole number"),
    (["--lr=fast"], "--lr=fast: expected a number"),
    (["--shuffle=maybe"], "--shuffle=maybe: expected true or false"),
    (["--scale=huge"], "--scale=huge is unknown: choose one of tiny, cpu"),
])
def test_a_wrong_flag_ends_in_one_line(argv, message):
    with pytest.raises(SystemExit) as stop:
        configure(*argv)
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_an_empty_value_is_empty():
    """--data= takes back what a scale or a script has set."""
    assert configure("--scale=cpu", "--data=").data == ""


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        configure("--help")
    assert stop.value.code == 0 and "--ptx_coef=0.5" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (dict(batch=0), "--batch=0: expected at least 1"),
    (dict(lr=0.0), "--lr=0.0: expected a number above 0"),
    (dict(lr=math.nan), "--lr=nan: expected a number above 0"),
    (dict(ptx_coef=-1.0), "--ptx_coef=-1.0: expected a finite number, not below 0"),
    (dict(ptx_coef=math.inf), "--ptx_coef=inf: expected a finite number"),
    (dict(device="tpu"), "--device=tpu is unknown: use cpu or cuda"),
    (dict(dtype="float16"), "--dtype=float16 is unknown: use float32 or bfloat16"),
])
def test_values_are_checked_before_anything_trains(tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        model.check_values(Config(**{"out": str(tmp_path), **flags}))
    assert message in str(stop.value)


def test_good_values_pass_and_leave_the_output_folder_empty(tmp_path):
    out = tmp_path / "new" / "folder"
    model.check_values(Config(out=str(out), seed=0, ptx_coef=0.0, device="cpu"))
    assert out.is_dir() and not os.listdir(out)


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out=.*file/out: cannot write there .*: choose another folder"):
        model.check_values(Config(out=str(tmp_path / "file" / "out")))


def test_a_wrong_argument_of_the_user_ends_in_one_line(monkeypatch):
    def main(config):
        raise ValueError("prompt has 9 tokens but the context is 8")

    monkeypatch.setattr(sys, "argv", ["sft.py", "--scale=cpu"])
    with pytest.raises(SystemExit, match="prompt has 9 tokens"):
        model.run(main, Config, SCALES)


# ------------------------------------------------------------------------------------------------------------
# optimisation


def test_cosine_decays_to_a_tenth():
    """L22: 0.1 + 0.9 * 0.5 * (1 + cos(pi * t / 1000)); the paper's peak 9.65e-6 at half time: 5.3075e-6."""
    factors = [model.cosine(t, 1000) for t in (0, 250, 500, 750, 1000)]
    assert factors == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)
    assert 9.65e-6 * factors[2] == pytest.approx(5.3075e-6)


def test_first_step_of_adam():
    """J23: with gradient g = eps = 1e-5 the first step is lr * g / (|g| + eps) = lr / 2;
    with eps 1e-8 it would be 0.999 lr."""
    layer = torch.nn.Linear(1, 1, bias=False).double()
    before = layer.weight.item()
    layer.weight.grad = torch.full((1, 1), 1e-5).double()
    model.adamw(layer, 1.0).step()
    assert before - layer.weight.item() == pytest.approx(0.5, abs=1e-6)


def test_weight_decay_is_for_matrices_only():
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(layer.weight), torch.nn.init.ones_(layer.bias)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.adamw(layer, 0.1, weight_decay=0.5).step()
    close(layer.weight, torch.full((2, 2), 0.95), 1e-6)  # 1 - 0.1 * 0.5
    close(layer.bias, torch.ones(2))


def test_optimizer_step_clips_the_norm_sets_the_rate_and_clears():
    """Gradient (3, 4) has norm 5; clipped to 1 it is (0.6, 0.8).
    Plain SGD with rate 0.5 moves by (0.3, 0.4)."""
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = model.optimizer_step(torch.optim.SGD(layer.parameters(), lr=99.0), layer, 0.5, 1.0)
    assert norm.item() == pytest.approx(5.0)
    close(layer.weight, [[-0.3, -0.4]], 1e-5)
    assert layer.weight.grad is None


def test_random_draws_are_a_function_of_seed_and_step():
    """Both torch's own state, which dropout uses, and the generator that is returned."""
    draw = lambda seed, step: torch.cat(
        [torch.rand(3, generator=model.seed_step(seed, step, CPU)), torch.rand(3)]
    )
    assert torch.equal(draw(1, 5), draw(1, 5))
    assert len({tuple(draw(seed, step).tolist()) for seed in (1, 2) for step in (5, 6)}) == 4


def test_memory_is_counted_in_bytes_on_macos_and_in_kb_on_linux(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    usage = types.SimpleNamespace(ru_maxrss=2_000_000)
    monkeypatch.setattr(model.resource, "getrusage", lambda who: usage)
    for platform, gigabytes in (("linux", 2.048), ("darwin", 0.002)):
        monkeypatch.setattr(sys, "platform", platform)
        assert model.peak_memory_gb() == pytest.approx(gigabytes)


def test_without_the_module_resource_as_on_windows_memory_is_zero():
    code = "import sys; sys.modules['resource'] = None; import model; print(model.peak_memory_gb())"
    folder = os.path.dirname(model.__file__)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "0.0\n", done.stderr
