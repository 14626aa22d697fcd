"""Several processes (torchrun): samples and gradients as of one, files by the first, a run that goes on."""

import itertools
import os
import signal
import sys

import torch
import torch.distributed as dist

from conftest import TINY, python, rows_of, same, tiny_gpt, tiny_scalar, weights_of  # first: it sets the path
import model
import ppo
import reward
import sft


def torchrun(*command):
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    return python(*torchrun, *command, env=dict(os.environ, OMP_NUM_THREADS="1"))


def computed():
    """Greedy responses to ragged prompts; and for one batch of ragged rows, fewer unmasked tokens in some,
    what the optimizers are given: by both updates of PPO, beside pretraining text, and by eq. 1 -> {name:
    tensors}. `rows`: 7, so that no share is like another; and 1, which leaves a second process none."""
    found, config = {}, ppo.Config(temperature=0.7, ptx_coef=1.0, grad_clip=1e9)
    for rows in (7, 1):
        prompts = [[1 + i] * (1 + i % 3) for i in range(rows)]
        shared = model.generate_shared(tiny_gpt(std=0.2), prompts, 6, 0.0, 3, None)
        found[f"responses {rows}"] = [x.float() for x in shared]
        torch.manual_seed(1)
        prompts, ends = torch.randint(1, 5, (rows,)), torch.randint(7, 15, (rows,))
        tokens = torch.randint(1, 11, (rows, 14))
        mask = model.response_mask(prompts, ends, 14)
        old, advantages = torch.randn(mask.shape) * mask, ppo.whiten(torch.randn(mask.shape), mask)
        batch = dict(tokens=tokens, mask=mask, logprobs=old - 2, advantages=advantages)
        batch |= dict(values=old, returns=old + 1)

        def rank(scalar, optimizer):
            scores = reward.score(scalar, tokens, ends).view(1, -1)
            reward.ranking_loss(scores, torch.arange(1, rows + 1).view(1, -1)).backward()
            sft.optimizer_step(scalar, [optimizer], 1.0, 1e9)

        text = tokens, mask
        policy = lambda gpt, optimizer: ppo.update_policy(gpt, gpt, optimizer, batch, text, 1.0, config)
        value = lambda scalar, optimizer: ppo.update_value(scalar, optimizer, batch, 1.0, config)
        for name, make, update in (
            ("policy", tiny_gpt, policy), ("value", tiny_scalar, value), ("ranking", tiny_scalar, rank),
        ):
            network, given = make(std=0.1), []
            optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
            take = lambda *_: given.extend(p.grad.clone() for p in network.parameters())
            optimizer.register_step_pre_hook(take)
            update(network, optimizer)
            found[f"{name} {rows}"] = given
    return found


def test_two_processes_have_the_responses_and_the_gradients_of_one(tmp_path):
    done = torchrun(__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr
    alone, first, second = computed(), *(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert alone.keys() == first.keys()
    for name, expected in alone.items():
        assert same(first[name], second[name]), name  # to the bit, so that weights stay equal
        largest = max(float(gradient.abs().max()) for gradient in expected)
        assert largest > 0 or name == "ranking 1"  # one response has nothing to be ranked with
        for found, gradient in zip(first[name], expected):
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_a_run_of_two_that_was_killed_goes_on_and_the_first_alone_writes(tmp_path):
    flags = [*TINY, "--base_steps=4", "--log_every=1", "--save_seconds=0"]
    killed, whole = f"--out={tmp_path}/killed", f"--out={tmp_path}/whole"
    assert torchrun(__file__, *flags, killed).returncode != 0  # in its third step
    again, unbroken = torchrun("sft.py", *flags, killed), torchrun("sft.py", *flags, whole)
    assert again.returncode == unbroken.returncode == 0, again.stderr + unbroken.stderr
    assert "base.pt: going on from step" in again.stdout
    for name in ("base", "sft", "ppo_init"):
        assert same(*(weights_of(tmp_path / folder / f"{name}.pt") for folder in ("killed", "whole"))), name
    for folder in ("killed", "whole"):
        assert [row["step"] for row in rows_of(tmp_path / folder / "base.jsonl")] == [0, 1, 2, 3, 4]
    assert unbroken.stdout.count("wrote") == 3  # by the first alone
    done = torchrun("ppo.py", *TINY, "--episodes=64", whole)  # what they sampled apart they learn together
    assert done.returncode == 0, done.stderr
    assert [round(row["first_ratio"], 3) for row in rows_of(tmp_path / "whole" / "ppo.jsonl")] == [1, 1]


def test_bad_input_is_one_line_of_one_process(tmp_path):
    done = torchrun("sft.py", *TINY, "--n_head=3", f"--out={tmp_path}")
    assert done.returncode != 0 and done.stderr.count("--n_head=3 does not divide") == 1


def sft_that_is_killed():
    """`python sft.py`, whose first process is killed in the middle of its third step."""
    step, calls = sft.optimizer_step, itertools.count(1)

    def killing(*arguments):
        if next(calls) == 3 and sft.is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    sft.optimizer_step = killing
    sft.start(sft.main, sft.Config, sft.SCALES)


if __name__ == "__main__":  # in each process that torchrun starts: with a folder, or with flags
    if sys.argv[1].startswith("--"):
        sft_that_is_killed()
    else:
        dist.init_process_group("gloo")
        torch.save(computed(), f"{sys.argv[1]}/{dist.get_rank()}.pt")
