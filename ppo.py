"""
Stage 3: PPO-ptx against the reward model (InstructGPT, sec. 3.5 and App. C.4).

    objective = E[ r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)) ]
                + ptx_coef * E[ log pi(pretraining text) ]                                         eq. 2

Four networks: the policy; its frozen reference, the PPO initialisation; the frozen reward model; the
value model, a copy of the reward model with its own learning rate. One iteration: sample responses,
score them, spread the KL penalty over the tokens, estimate advantages, then one pass over eight
minibatches of clipped policy gradient, value regression and language modelling. The weights of ppo.pt
are the moving average, which is what the paper evaluates.

Differs from the paper in:
    1. lambda of GAE, Adam's epsilon, gradient clipping, whitening, value clipping and the penalty for a
       missing eot are not in the paper: the values here are those of its predecessors (Stiennon et al.
       2020, Ziegler et al. 2019);
    2. beta, ptx_coef and the learning rates fit a small model and its reward scale; the paper's stand
       in the comments.

    python ppo.py                  trains what is missing before it; 8 minutes on two CPU cores; ppo.pt
    python ppo.py --scale=tiny     the whole chain in seconds; its numbers mean nothing
    python ppo.py --ptx_coef=0     plain PPO
    python ppo.py --reward=gold    the world's gold preference in place of the reward model: the bound
"""

import copy
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

import data
import eval
import model
import reward
import sft
from model import check


@dataclass
class Config:
    # where and what
    scale: str = "cpu"  # tiny, cpu, gpu, gpt2: the defaults of SCALES below
    out: str = "out"
    seed: int = 1
    data: str = ""  # folder of dataset files; '' is the miniature world
    device: str = ""
    dtype: str = ""  # of activations, float32 or bfloat16; '' is bfloat16 on a GPU
    encoding: str = "bpe"
    base: str = ""  # '' is out/base.pt; also gpt2 or a Hugging Face folder
    sft: str = ""  # the baseline, for the last table; '' is out/sft.pt
    ppo_init: str = ""  # start of the policy; '' is out/ppo_init.pt
    ref: str = ""  # reference of the KL; '' is the PPO initialisation, as the paper
    reward: str = ""  # '' is out/reward.pt; gold scores by the world's gold preference

    # rollouts
    episodes: int = 24_576  # responses in all (paper: 256k)
    rollout_size: int = 256  # responses per iteration (paper: 512)
    max_new_tokens: int = 28  # (paper: 1k)
    temperature: float = 1.0  # as the paper

    # reward
    # KL coefficient, score units per nat of kl; eq. 2 (paper: 0.02, on the scale of its reward model).
    # At 0.04 the score rises faster and the gold preference less (eval.py, finding 12)
    beta: float = 0.2
    # subtracted from the score of a response that did not end (lm-human-preferences set it to -1)
    eot_penalty: float = 1.0

    # ppo
    minibatch_size: int = 32  # responses per optimizer step: 8 minibatches to a rollout (paper: 64)
    ppo_epochs: int = 1  # passes over a rollout, as the paper
    gamma: float = 1.0  # no discount, as the paper
    lam: float = 0.95  # GAE lambda; not in the paper, 0.95 in its predecessors and successors
    cliprange: float = 0.2  # as the paper
    cliprange_value: float = 0.2  # not in the paper
    # weight of the pretraining loss, mean per token: the paper's gamma in eq. 2, 27.8; 0 is plain PPO
    ptx_coef: float = 0.1
    ptx_ratio: int = 1  # pretraining documents per response (paper: 8, which doubles the time)

    # optimisation
    lr: float = 3e-4  # constant after warm-up (paper: 2.55e-6 to 8.05e-6)
    value_lr: float = 5e-4  # (paper: 9e-6)
    warmup: int = 10  # iterations, from a tenth of lr, as the paper
    grad_clip: float = 1.0
    ema: float = 0.992  # decay of the moving average of the weights, per step, as the paper

    # logging
    log_every: int = 5  # iterations between two printed lines and samples; the file has them all
    save_seconds: float = 15.0


SCALES = dict(
    tiny=dict(episodes=256, rollout_size=32, minibatch_size=8, max_new_tokens=24, save_seconds=5.0),
    cpu=dict(),
    gpu=dict(episodes=256_000, rollout_size=512, minibatch_size=64, ptx_ratio=8),
    gpt2=dict(
        encoding="gpt2", base="gpt2", episodes=25_600, rollout_size=128, max_new_tokens=128, lr=5e-6,
        value_lr=9e-6, beta=0.02,
    ),
)


# --------------------------------------------------------------------------------------------------
# the mathematics: pure functions on tensors whose columns are actions (model.py, the alignment rule)


def kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """Reward per token: -beta * (logprobs - ref_logprobs), plus the score on the last action (eq. 2).

    scores (B,), logprobs, ref_logprobs (B, T-1) in nats, mask (B, T-1) -> rewards (B, T-1) in score
    units, whose sum over a row is score - beta * kl of the response. 0 where masked.
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask
    columns = torch.arange(mask.size(1), device=mask.device)
    last = (columns * mask).argmax(1)  # the action of eot, or of the last token if the response was cut
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16).

    delta_t = rewards_t + gamma * values_{t+1} - values_t        values are 0 after the last action
    advantages_t = delta_t + gamma * lam * advantages_{t+1}      returns = advantages + values

    rewards, values, mask (B, T-1) -> advantages, returns (B, T-1), score units, 0 where masked.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # padding lies behind the response, and before it the prompt: a masked column hands on nothing
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def masked_mean(x, mask):
    """Mean over the unmasked tokens of the batch: x, mask (B, T-1) -> scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """Unit variance over the unmasked tokens of the batch (population variance), and zero mean unless
    shift_mean is False: x, mask (B, T-1) -> (B, T-1), 0 where masked."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def policy_loss(new_logprobs, logprobs, advantages, mask, cliprange):
    """The clipped surrogate (PPO eq. 7), ratio = pi / pi_at_sampling per token, all inputs (B, T-1).

    loss = mean over unmasked tokens of max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange))
    -> loss, clipfrac (share of the unmasked tokens where the clipped term is the larger)
    """
    ratio = (new_logprobs - logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    clipfrac = masked_mean((clipped > unclipped).float(), mask)
    return masked_mean(torch.maximum(unclipped, clipped), mask), clipfrac


def value_loss(new_values, values, returns, mask, cliprange_value):
    """Half the squared error to the returns, of the new value or of the new value kept
    within cliprange_value of the old, whichever is larger: all (B, T-1) -> mean over
    unmasked tokens, scalar."""
    clipped = values + (new_values - values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * masked_mean(torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_estimates(logprobs, ref_logprobs, mask):
    """KL(policy || ref) in nats per response, from the policy's own actions (Schulman, "Approximating
    KL divergence"): logprobs, ref_logprobs, mask (B, T-1) -> k1 (B,), k3 (B,)

    k1 = -log r        k3 = (r - 1) - log r        with r = ref / policy per token

    Both are unbiased; k3 is never negative.
    """
    log_r = (ref_logprobs - logprobs) * mask
    return -log_r.sum(1), (log_r.exp() - 1 - log_r).sum(1)


def explained_variance(values, returns, mask):
    """1 - var(returns - values) / var(returns) over unmasked tokens: 1 is perfect, 0 no better than a
    constant. values, returns, mask (B, T-1) -> float."""
    error, spread = (returns - values)[mask], returns[mask]
    return float(1 - error.var(correction=0) / spread.var(correction=0).clamp(min=1e-8))


def warmup(iteration, iterations):
    """Factor of the learning rate, linear over the first `iterations`: 0.1 at iteration
    0 (App. C.4)."""
    return min(1.0, 0.1 + 0.9 * iteration / iterations)


def update_ema(ema, gpt, decay):
    """ema <- decay * ema + (1 - decay) * weights, after every step."""
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), gpt.parameters()):
            average.lerp_(weight, 1 - decay)


# --------------------------------------------------------------------------------------------------
# one iteration


@torch.no_grad()
def rollout(policy, ref, reward_model, value_model, prompts, tokenizer, config, generator, gold=None):
    """Sample a response to each prompt (list of B lists of ids) and judge it, without gradients.

    gold(tokens, prompt_lengths, lengths) -> scores (B,) replaces the reward model's scores. Returns a
    dict: tokens (B, T), lengths, prompt_lengths, scores, ended (B,), and mask, logprobs, ref_logprobs,
    values, advantages (whitened), returns (B, T-1); seconds_generate, seconds_score.
    """
    device = policy.lm_head.weight.device
    started = time.monotonic()
    with model.autocast(device, config.dtype):
        # 1. sample; eot is an action like any other, what would follow it is never made
        tokens, lengths = model.generate(
            policy, prompts, config.max_new_tokens, config.temperature, tokenizer.eot, generator
        )
        generated = time.monotonic()
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = model.response_mask(prompt_lengths, lengths, tokens.size(1))
        # 2. score prompt and response at the last token; a response that did not end loses a constant
        if gold:
            scores = gold(tokens, prompt_lengths, lengths)  # (B,)
        else:
            rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
            scores = reward.score_rows(reward_model, rows, device).float()  # (B,)
        ended = tokens.gather(1, lengths[:, None] - 1).squeeze(1) == tokenizer.eot
        penalised = scores - config.eot_penalty * ~ended
        # 3. log-probabilities, in the numerics of the update so that its first ratio is 1, and those
        #    of the reference; values of the states before each action
        logprobs, ref_logprobs = (
            model.by_length(
                lambda t, m: model.masked_logprobs(gpt, t, m, config.temperature), tokens, lengths, mask
            )
            for gpt in (policy, ref)
        )
        values = model.by_length(
            lambda t, m: model.masked_values(value_model, t, m), tokens, lengths, mask
        )
    # 4. the reward of each token
    rewards = kl_shaped_rewards(penalised, logprobs, ref_logprobs, mask, config.beta)
    # 5. advantages and returns, then whitening: returns keep the scale of the rewards
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    advantages = whiten(advantages, mask)
    return dict(
        tokens=tokens, lengths=lengths, prompt_lengths=prompt_lengths, mask=mask, scores=scores,
        ended=ended, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, advantages=advantages,
        returns=returns, seconds_generate=generated - started,
        seconds_score=time.monotonic() - generated,
    )


def print_samples(tokenizer, batch, count=2):
    """The first responses of a rollout in full, with score and kl: chosen by index, not by taste."""
    for i in range(min(count, len(batch["tokens"]))):
        start, end = int(batch["prompt_lengths"][i]), int(batch["lengths"][i])
        ids = batch["tokens"][i].tolist()
        kl = float((batch["logprobs"][i] - batch["ref_logprobs"][i]).sum())
        print(
            f"    score {float(batch['scores'][i]):.2f}  kl {kl:.2f}  "
            f"{tokenizer.decode(ids[:start])!r} -> {tokenizer.decode(ids[start:end])!r}"
        )


def ensure(config):
    """Train the defaults that are missing before PPO, each by its own stage, with this run's
    shared flags."""
    names = ("scale", "out", "seed", "data", "device", "dtype", "encoding")
    shared = {name: getattr(config, name) for name in names}
    given = dict(base=config.base) if config.base else {}
    wanted = [name for name in ("base", "sft", "ppo_init") if not getattr(config, name)]
    if not all(model.is_finished(os.path.join(config.out, f"{name}.pt")) for name in wanted):
        sft.main(sft.Config(**{**sft.SCALES[config.scale], **shared, **given}))
    if config.reward in ("", "gold") and not model.is_finished(os.path.join(config.out, "reward.pt")):
        given = {name: getattr(config, name) for name in ("base", "sft")}
        given = {name: path for name, path in given.items() if path.endswith(".pt")}
        reward.main(reward.Config(**{**reward.SCALES[config.scale], **shared, **given}))


def main(config):
    """Train ppo.pt in config.out, or go on with it, after what it needs; then print the last table."""
    check_config(config)
    ensure(config)
    train(config)
    eval.last_table(config, model.get_device(config.device))  # did it work?


def check_config(config):
    """Raises SystemExit for flags that do not fit together and for given files that are not there."""
    model.check_values(config)
    check(
        config.rollout_size % config.minibatch_size == 0,
        f"--rollout_size={config.rollout_size} is not a multiple of "
        f"--minibatch_size={config.minibatch_size}: change one of them",
    )
    check(
        config.episodes >= config.rollout_size,
        f"--episodes={config.episodes} is less than one rollout of {config.rollout_size}: raise it",
    )
    check(
        config.reward != "gold" or not config.data,
        "--reward=gold needs the miniature world: leave out --data",
    )
    for name in ("base", "sft", "ppo_init", "ref", "reward"):
        given = getattr(config, name)
        other = {"reward": ("gold",), "base": (given,)}.get(name, ())  # sft.py knows gpt2 and folders
        there = not given or os.path.exists(given) or (given in other and not given.endswith(".pt"))
        check(there, f"{given} not found: correct --{name}, or leave it out to have it trained")


def train(config):
    """Make ppo.pt in config.out from finished earlier checkpoints, or go on with it."""
    check_config(config)
    device = model.get_device(config.device)
    path, settings = os.path.join(config.out, "ppo.pt"), asdict(config)

    # 1. four networks
    init_path = config.ppo_init or os.path.join(config.out, "ppo_init.pt")
    reward_path = (
        os.path.join(config.out, "reward.pt") if config.reward in ("", "gold") else config.reward
    )
    policy, checkpoint = model.load_policy(
        init_path, 'run "python sft.py" first, or pass --ppo_init=PATH', device
    )
    ref, ref_checkpoint = model.load_policy(config.ref or init_path, "correct --ref", device)
    reward_model, reward_checkpoint = model.load_reward(
        reward_path, 'run "python reward.py" first, or pass --reward=PATH', device
    )
    for other, path_of in ((reward_checkpoint, reward_path), (ref_checkpoint, config.ref)):
        check(
            checkpoint["tokenizer"] == other["tokenizer"],
            f"{init_path} and {path_of} have different encodings: train one of them again",
        )
    tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
    value_model, ema = copy.deepcopy(reward_model), copy.deepcopy(policy)
    ref.requires_grad_(False), reward_model.requires_grad_(False)
    optimizer = model.adamw(policy, config.lr)
    value_optimizer = model.adamw(value_model, config.value_lr)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (policy, value_model)]
    print(f"policy {sizes[0]:,} parameters, reward and value model {sizes[1]:,}")

    stopped = model.resume(path, "policy", settings)
    if stopped and stopped["finished"]:
        print(f"{path} is there and finished")
        return

    # 2. prompts that leave room for a response, and pretraining text
    datasets = data.load(config.data, config.scale, config.seed)
    rows = [dict(row, ids=tokenizer.encode(row["prompt"])) for row in datasets["prompts"]]
    rows = data.fitting(
        rows, lambda row: len(row["ids"]), policy.config.block_size - config.max_new_tokens, "prompts"
    )
    texts, length = datasets["pretrain"], min(128, policy.config.block_size)
    documents = data.encode_documents(tokenizer, texts, length) if config.ptx_coef else None
    world = None if config.data else data.World()

    # 3. where a run that was stopped goes on
    iterations = config.episodes // config.rollout_size
    if stopped:
        policy.load_state_dict(stopped["policy"])
        ema.load_state_dict(stopped["weights"])
        value_model.load_state_dict(stopped["value_model"])
        optimizer.load_state_dict(stopped["optimizer"])
        value_optimizer.load_state_dict(stopped["value_optimizer"])
        print(f"{path}: going on from iteration {stopped['step']}")
    begin = stopped["step"] if stopped else 0

    def state(iteration):
        return dict(
            kind="policy", config=asdict(policy.config), weights=ema.state_dict(), epochs={},
            step=iteration, finished=iteration == iterations, settings=settings,
            tokenizer=tokenizer.state(), policy=policy.state_dict(),
            value_model=value_model.state_dict(), optimizer=optimizer.state_dict(),
            value_optimizer=value_optimizer.state_dict(),
        )

    log = model.Log(path.replace(".pt", ".jsonl"), begin)
    started = time.monotonic()
    with (
        model.Saver(path, config.save_seconds) as saver,
        tqdm(total=iterations, initial=begin, disable=None) as bar,
    ):
        for iteration in range(begin + 1, iterations + 1):
            # 4. prompts, each once before any comes again; everything random is a function of seed and
            #    iteration
            generator = model.seed_step(config.seed, iteration, device)
            rng = np.random.default_rng([config.seed, 3, iteration])
            chosen = [
                rows[i]
                for i in data.every_row(len(rows), iteration - 1, config.rollout_size, config.seed)
            ]
            gold = gold_scores(world, chosen, tokenizer) if world else None
            batch = rollout(
                policy, ref, reward_model, value_model, [row["ids"] for row in chosen], tokenizer,
                config, generator, gold if config.reward == "gold" else None,
            )

            # 5. the update: minibatches in random order, every response once per pass
            updating = time.monotonic()
            factor = warmup(iteration - 1, config.warmup)
            passes = [rng.permutation(config.rollout_size) for _ in range(config.ppo_epochs)]
            minibatches = np.concatenate(passes).reshape(-1, config.minibatch_size)
            count = config.ptx_ratio * config.minibatch_size
            ptx = [
                data.document_batch(data.draw(documents, count, rng)) if config.ptx_coef else None
                for _ in minibatches
            ]
            tensors = {name: x for name, x in batch.items() if torch.is_tensor(x)}
            stats = []
            for rows_of, ptx_batch in zip(minibatches, ptx):
                picked = torch.from_numpy(rows_of).to(device)
                minibatch = {name: x[picked] for name, x in tensors.items()}
                stats.append(update(
                    policy, value_model, ema, optimizer, value_optimizer, minibatch, ptx_batch, factor,
                    config,
                ))
            model.check_finite(
                sum(s["policy_loss"] + s["value_loss"] + s["ptx_loss"] for s in stats), iteration, path
            )

            # 6. log; save
            bar.update()
            if gold:  # what the reward model stands for: score up and gold down is over-optimisation
                batch["golds"] = gold(batch["tokens"], batch["prompt_lengths"], batch["lengths"])
            row = measure(batch, stats, iteration, config)
            row.update(seconds_update=time.monotonic() - updating, memory_gb=model.peak_memory_gb())
            row["tokens_s"] = float(batch["mask"].sum()) / (
                row["seconds_generate"] + row["seconds_score"] + row["seconds_update"]
            )
            log.write(row, show=iteration % config.log_every == 0 or iteration in (1, iterations))
            if iteration % (4 * config.log_every) == 0 or iteration == 1:
                print_samples(tokenizer, batch)
            if iteration > 5 and row["kl"] < -0.1:
                print(
                    f"warning: mean kl {row['kl']:.2f} per response is negative: "
                    "sampling and log-probabilities disagree"
                )
            saver.save_if_due(iteration, lambda: state(iteration))
    if begin < iterations:
        model.save_checkpoint(path, **state(iterations))
        seconds, memory = time.monotonic() - started, model.peak_memory_gb()
        print(f"wrote {path}: {iterations} iterations, {seconds:.0f} s, peak memory {memory:.2f} GB")


def update(policy, value_model, ema, optimizer, value_optimizer, minibatch, ptx_batch, factor, config):
    """One minibatch: gradients of the PPO and of the pretraining term add up, then one step (App. C.4),
    and one step of the value model. minibatch: rows of rollout()'s tensors; ptx_batch: tokens, mask, or
    None for plain PPO; factor: that of warmup(). -> dict of numbers."""
    tokens, lengths, mask, logprobs = (
        minibatch[name] for name in ("tokens", "lengths", "mask", "logprobs")
    )
    device = tokens.device
    # policy: eq. 2, first term
    with model.autocast(device, config.dtype):
        new_logprobs = model.by_length(
            lambda t, m: model.masked_logprobs(policy, t, m, config.temperature), tokens, lengths, mask
        )
    loss, clipfrac = policy_loss(
        new_logprobs, logprobs, minibatch["advantages"], mask, config.cliprange
    )
    loss.backward()
    # policy: eq. 2, second term, into the same gradients
    ptx_loss = torch.zeros(())
    if ptx_batch is not None:
        with model.autocast(device, config.dtype):
            ptx_loss = sft.lm_loss(policy, *(x.to(device) for x in ptx_batch))
        (config.ptx_coef * ptx_loss).backward()
    model.optimizer_step(optimizer, policy, config.lr * factor, config.grad_clip)
    update_ema(ema, policy, config.ema)
    # value: its own network, its own step
    with model.autocast(device, config.dtype):
        new_values = model.by_length(
            lambda t, m: model.masked_values(value_model, t, m), tokens, lengths, mask
        )
    v_loss = value_loss(
        new_values, minibatch["values"], minibatch["returns"], mask, config.cliprange_value
    )
    v_loss.backward()
    model.optimizer_step(value_optimizer, value_model, config.value_lr * factor, config.grad_clip)

    log_ratio = ((new_logprobs - logprobs) * mask).detach()
    return dict(
        policy_loss=float(loss.detach()),
        value_loss=float(v_loss.detach()),
        ptx_loss=float(ptx_loss.detach()),
        clipfrac=float(clipfrac),
        approx_kl=float(masked_mean(0.5 * log_ratio**2, mask)),
        max_ratio=float(log_ratio.abs().max().exp()),
    )


def measure(batch, stats, iteration, config):
    """The numbers of one iteration, for the log. README says what each looks like in a good run."""
    mask = batch["mask"]
    k1, k3 = kl_estimates(batch["logprobs"], batch["ref_logprobs"], mask)
    mean = lambda name: sum(s[name] for s in stats) / len(stats)
    return dict(
        step=iteration,
        episodes=iteration * config.rollout_size,
        score=float(batch["scores"].mean()),  # before the penalty for a missing eot
        **({"gold": float(batch["golds"].mean())} if "golds" in batch else {}),  # in the world only
        kl=float(k1.mean()),  # nats per response
        kl3=float(k3.mean()),
        entropy=float(-masked_mean(batch["logprobs"], mask)),  # nats per token: mean -log pi
        length=float(mask.sum(1).float().mean()),  # tokens
        eot_rate=float(batch["ended"].float().mean()),
        clipfrac=mean("clipfrac"),
        approx_kl=mean("approx_kl"),  # new against old policy, k2, nats per token
        # the largest of the first minibatch: 1, or log-probabilities differ between rollout and update
        first_ratio=stats[0]["max_ratio"],
        explained_variance=explained_variance(batch["values"], batch["returns"], mask),
        policy_loss=mean("policy_loss"),
        value_loss=mean("value_loss"),
        ptx_loss=mean("ptx_loss"),  # nats per token of pretraining text
        seconds_generate=batch["seconds_generate"],
        seconds_score=batch["seconds_score"],
    )


def gold_scores(world, tasks, tokenizer):
    """The gold preference of the world: the reward with --reward=gold, else only a column of the log.

    -> a function of tokens (B, T), prompt_lengths (B,), lengths (B,) that returns scores (B,).
    """

    def scores(tokens, prompt_lengths, lengths):
        texts = [
            data.response_text(tokenizer, task["ids"], row[start:end])
            for task, row, start, end in zip(
                tasks, tokens.tolist(), prompt_lengths.tolist(), lengths.tolist()
            )
        ]
        return torch.tensor(
            [world.gold(task, text)["gold"] for task, text in zip(tasks, texts)], device=tokens.device
        )

    return scores


if __name__ == "__main__":
    model.run(main, Config, SCALES)
