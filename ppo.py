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
    1. the paper does not speak of lambda of GAE, Adam's epsilon, value clipping and whitening, which are
       as in its predecessors (Stiennon et al. 2020, Ziegler et al. 2019; we do not whiten rewards), nor of
       gradient clipping and the penalty for a missing eot;
    2. beta, ptx_coef and the learning rates fit a small model and its reward scale; the paper's stand
       in the comments.

    python ppo.py                  trains what is missing before it; 10 to 14 minutes on two CPU cores
    python ppo.py --scale=tiny     the whole chain in seconds; its numbers mean nothing
    python ppo.py --ptx_coef=0     plain PPO
    python ppo.py --reward=gold    the world's gold preference in place of the reward model: the bound
    python ppo.py --reward=FILE.py your own: the file defines reward(prompts, responses) -> numbers
"""

import copy
import time
from dataclasses import dataclass, fields

import numpy as np
import torch

import data
import eval
import model
import reward
import sft
from data import Amount, Checkpoint, Common, Count, Judge, Rate, Share, check
from model import ScalarGPT
from sft import Run


@dataclass
class Config(Common):
    sft: Checkpoint = ""  # the baseline, for the last table; '' is sft.pt
    ppo_init: Checkpoint = ""  # start of the policy; '' is ppo_init.pt
    ref: Checkpoint = ""  # reference of the KL; '' is the PPO initialisation, as the paper
    reward: Judge = ""  # '' is reward.pt; or the path of another, gold, FILE.py (see above)

    # rollouts
    episodes: Count = 24_576  # responses in all (paper: 256k)
    rollout_size: Count = 256  # responses per iteration (paper: 512)
    temperature: Rate = 1.0  # as the paper

    # reward
    beta: Amount = 0.2  # KL coefficient, score units per nat; eq. 2 (paper: 0.02 of its scores)
    eot_penalty: float = 1.0  # off the score without an eot (lm-human-preferences: the score is -1)

    # ppo
    minibatch_size: Count = 32  # responses per optimizer step: 8 minibatches to a rollout (paper: 64)
    ppo_epochs: Count = 1  # passes over a rollout, as the paper
    cliprange: Rate = 0.2  # as the paper
    ptx_coef: Amount = 0.1  # of the mean pretraining loss; the paper's gamma, 27.8; 0 is plain PPO
    ptx_ratio: Count = 1  # pretraining documents per response (paper: 8, which doubles the time)

    # optimisation
    lr: Rate = 3e-4  # constant after warm-up (paper: 2.55e-6 to 8.05e-6)
    warmup: Count = 10  # iterations, from a tenth of lr, as the paper
    grad_clip: Rate = 1.0
    ema: Share = 0.992  # decay of the moving average of the weights, per step, as the paper

    # value model
    value_lr: Rate = 5e-4  # (paper: 9e-6)
    cliprange_value: Rate = 0.2  # not in the paper
    gamma: Share = 1.0  # no discount, as the paper
    lam: Share = 0.95  # GAE lambda; not in the paper, 0.95 in its predecessors and successors

    log_every: Count = 5  # iterations between two printed lines; the file has them all


SCALES = dict(
    tiny=dict(episodes=512, rollout_size=32, minibatch_size=8, lr=1e-3, ema=0.9, log_every=4),
    cpu=dict(),
    gpu=dict(episodes=256_000, rollout_size=512, minibatch_size=64, ptx_ratio=8),
    gpt2=dict(episodes=25_600, rollout_size=128, lr=5e-6, value_lr=9e-6, beta=0.02),
)


# --------------------------------------------------------------------------------------------------
# the mathematics: functions of tensors whose columns are actions (model.py, the alignment rule)


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
    """Half the squared error to the returns, of the new value or of the new value kept within
    cliprange_value of the old, whichever is larger: all (B, T-1) -> mean over unmasked tokens."""
    clipped = values + (new_values - values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * masked_mean(torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2), mask)


def warmup(iteration, iterations):
    """Factor of the learning rate: 0.1 at iteration 0, linear to 1 (App. C.4)."""
    return min(1.0, 0.1 + 0.9 * iteration / iterations)


def update_ema(ema, gpt, decay):
    """ema <- decay * ema + (1 - decay) * weights, after every step. The average over the last
    1 / (1 - decay) steps takes the noise of single steps out of what is evaluated (App. C.4)."""
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), gpt.parameters()):
            average.lerp_(weight, 1 - decay)


# --------------------------------------------------------------------------------------------------
# one iteration


@torch.no_grad()
def rollout(policy, ref, judge, prompts, tokenizer, config, generator):
    """Sample a response to each prompt (list of B lists of ids) and judge it, without gradients.

    judge: a function of tokens (B, T), prompt_lengths (B,), lengths (B,) that returns scores (B,).
    Returns a dict: tokens (B, T), lengths, prompt_lengths, scores, ended (B,), and mask, logprobs,
    ref_logprobs (B, T-1); and the seconds that sampling took.
    """
    # a. sample: model.generate, by each process its share under torchrun; eot is an action like any
    #    other, what would follow it is never made
    started = time.monotonic()
    tokens, lengths = model.generate_shared(
        policy, prompts, config.max_new_tokens, config.temperature, tokenizer.eot, generator
    )
    seconds = time.monotonic() - started
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    mask = model.response_mask(prompt_lengths, lengths, tokens.size(1))
    # b. score prompt and response
    scores = judge(tokens, prompt_lengths, lengths).float()  # (B,)
    ended = tokens.gather(1, lengths[:, None] - 1).squeeze(1) == tokenizer.eot
    # c. log-probabilities, in the numerics of the update so that its first ratio is 1, and those of
    #    the reference; both in eval mode: dropout would make the kl of identical weights non-zero
    of = lambda gpt: model.by_length(model.masked_logprobs, gpt, tokens, mask, config.temperature)
    logprobs, ref_logprobs = of(policy), of(ref)  # (B, T-1)
    return dict(
        tokens=tokens, lengths=lengths, prompt_lengths=prompt_lengths, mask=mask, scores=scores,
        ended=ended, logprobs=logprobs, ref_logprobs=ref_logprobs,
    ), seconds


@torch.no_grad()
def credit(batch, value_model, config):
    """Which action earned it: rollout()'s dict -> dict of values, advantages (whitened), returns (B, T-1)."""
    mask = batch["mask"]
    # d. the reward of each token; a response that did not end loses a constant
    scores = batch["scores"] - config.eot_penalty * ~batch["ended"]
    rewards = kl_shaped_rewards(scores, batch["logprobs"], batch["ref_logprobs"], mask, config.beta)
    # e. advantages and returns, then whitening: returns keep the scale of the rewards
    values = model.by_length(model.masked_values, value_model, batch["tokens"], mask)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    return dict(values=values, advantages=whiten(advantages, mask), returns=returns)


def objective(new_logprobs, minibatch, config):
    """What the policy minimises beside the pretraining loss: new_logprobs (B, T-1), rows of what
    rollout() and credit() returned -> loss, dict of numbers for the log."""
    mask, logprobs = minibatch["mask"], minibatch["logprobs"]
    loss, clipfrac = policy_loss(new_logprobs, logprobs, minibatch["advantages"], mask, config.cliprange)
    log_ratio = ((new_logprobs - logprobs) * mask).detach()
    return loss, dict(
        policy_loss=loss, clipfrac=clipfrac,
        approx_kl=masked_mean(0.5 * log_ratio**2, mask),  # new against old policy, nats per token
        max_ratio=log_ratio.abs().max().exp(),
    )


def update_policy(policy, ema, optimizer, minibatch, ptx_batch, factor, config):
    """One step of the policy on the sum of both terms of eq. 2. minibatch: rows of what rollout() and
    credit() returned; ptx_batch: tokens, mask, or None for plain PPO; factor: of warmup() -> numbers.

    One step on the sum, not a step for each term: Adam divides a gradient by its own size, so that in
    a step of its own the coefficient of the pretraining loss would cancel out.
    """
    tokens, mask = minibatch["tokens"], minibatch["mask"]
    with sft.autocast(tokens.device, config.dtype):
        new_logprobs = model.by_length(model.masked_logprobs, policy, tokens, mask, config.temperature)
    loss, numbers = objective(new_logprobs, minibatch, config)
    loss.backward()
    if ptx_batch is not None:
        with sft.autocast(tokens.device, config.dtype):
            ptx_loss = sft.lm_loss(policy, *(x.to(tokens.device) for x in ptx_batch))
        (config.ptx_coef * ptx_loss).backward()
        numbers["ptx_loss"] = ptx_loss  # nats per token of pretraining text
    sft.optimizer_step(policy, [optimizer], factor, config.grad_clip)  # at factor * lr; then clears grads
    update_ema(ema, policy, config.ema)
    return numbers


def update_value(value_model, optimizer, minibatch, factor, config):
    """One step of the value model, a network of its own -> numbers."""
    tokens, mask, returns = minibatch["tokens"], minibatch["mask"], minibatch["returns"]
    with sft.autocast(tokens.device, config.dtype):
        new_values = model.by_length(model.masked_values, value_model, tokens, mask)
    loss = value_loss(new_values, minibatch["values"], returns, mask, config.cliprange_value)
    loss.backward()
    sft.optimizer_step(value_model, [optimizer], factor, config.grad_clip)
    return dict(value_loss=loss)


def minibatches(batch, documents, config, rng):
    """Minibatches of a rollout in random order, every response once per pass, each with pretraining
    documents beside it -> pairs of (rows of the rollout's tensors, (tokens, mask) or None)."""
    passes = [rng.permutation(config.rollout_size) for _ in range(config.ppo_epochs)]
    for picked in np.concatenate(passes).reshape(-1, config.minibatch_size):
        rows = torch.from_numpy(picked).to(batch["tokens"].device)
        ptx_batch, count = None, config.ptx_ratio * config.minibatch_size
        if config.ptx_coef:
            ptx_batch = data.demonstration_batch(data.draw(documents, count, rng))
        yield {name: x[rows] for name, x in batch.items()}, ptx_batch


# --------------------------------------------------------------------------------------------------
# the loop


def load_networks(config, datasets, device):
    """-> policy, its frozen reference (the same checkpoint, if --ref is not given), reward model (for the
    value model; with --reward=FILE.py None), judge (what scores responses: reward.score, or by --reward),
    tokenizer, PPO's prompts as rows with ids. All networks are in eval mode, without dropout."""
    path = sft.where(config, "ppo_init")
    policy, tokenizer, _ = sft.load_network("policy", path, device)
    ref, of_ref, _ = sft.load_network("policy", config.ref or path, device)
    check(of_ref == tokenizer, f"{config.ref} has another encoding than the policy")
    limit = policy.config.block_size - config.max_new_tokens  # prompts that leave room for a response
    encode = lambda part: data.encode_prompts(tokenizer, datasets[part], limit)
    rows, *_ = map(encode, ("prompts", "valid", "test"))  # too long for the last table: said now
    judge, reward_model = reward.load_judge(config, tokenizer, rows, device)
    return policy, ref, reward_model, judge, tokenizer, rows


def train(config):
    """Make ppo.pt in config.out from finished earlier checkpoints, or go on with it."""
    check_config(config)
    # 1. three networks, in eval mode as the value model below; the judge stands for the reward model
    datasets, device = data.load(config.data, config.scale, config.seed), sft.get_device(config.device)
    policy, ref, reward_model, judge, tokenizer, rows = load_networks(config, datasets, device)
    run = Run("ppo", "policy", config, weights_of_the_start=sft.checksum(policy, ref, reward_model))
    if run.finished:
        return
    documents, _ = sft.documents_of(config, datasets, tokenizer, policy)
    gold = None if config.data else reward.gold_judge(tokenizer, rows)
    ema = copy.deepcopy(policy)
    torch.manual_seed(config.seed)  # for a new value head, if there is no reward model
    value_model = copy.deepcopy(reward_model) if reward_model else ScalarGPT.from_gpt(policy).eval()
    sizes = [sum(p.numel() for p in network.parameters()) for network in (policy, value_model)]
    print(f"policy {sizes[0]:,} parameters, reward and value model {sizes[1]:,}")
    optimizer, value_optimizer = sft.adamw(policy, config.lr), sft.adamw(value_model, config.value_lr)
    left = config.ema ** (config.episodes // config.minibatch_size * config.ppo_epochs)
    if left > 0.1:
        print(f"--ema={config.ema}: the saved average keeps {left:.0%} of the start")
    run.begin(
        config.episodes // config.rollout_size, tokenizer, weights=ema, policy=policy, optimizer=optimizer,
        value_model=value_model, value_optimizer=value_optimizer,
    )
    for iteration in run:
        # 2. prompts, each once before any comes again; responses, and which action earned what
        started = time.monotonic()
        chosen = data.every_row(len(rows), iteration - 1, config.rollout_size, config.seed)
        prompts = [rows[i]["ids"] for i in chosen]
        with sft.autocast(run.device, config.dtype):
            batch, generating = rollout(policy, ref, judge, prompts, tokenizer, config, run.generator)
            batch.update(credit(batch, value_model, config))
        sampled = time.monotonic()

        # 3. the update
        factor, stats = warmup(iteration - 1, config.warmup), []
        for minibatch, ptx_batch in minibatches(batch, documents, config, run.rng):
            stats.append({
                **update_policy(policy, ema, optimizer, minibatch, ptx_batch, factor, config),
                **update_value(value_model, value_optimizer, minibatch, factor, config),
            })
        updated = time.monotonic()

        # 4. log
        if gold:  # what the reward model stands for: score up and gold down is over-optimisation
            batch["golds"] = gold(batch["tokens"], batch["prompt_lengths"], batch["lengths"])
        numbers = measure(batch, stats, iteration, config)
        run.check_finite(sum(numbers.values()))
        run.log(
            iteration % config.log_every == 0 or iteration in (1, run.steps), **numbers,
            seconds_generate=generating, seconds_score=sampled - started - generating,
            seconds_update=updated - sampled,
            tokens_s=int(batch["mask"].sum()) / (updated - started),
        )
        if iteration % (4 * config.log_every) == 0 or iteration == 1:
            print_samples(tokenizer, batch)
        if iteration > 5 and numbers["kl"] < -0.1:
            seen = f"mean kl {numbers['kl']:.2f} per response is negative"
            print(f"warning: {seen}: sampling and log-probabilities disagree")
    run.finish()


# ==================================================================================================
# The bar: below it, the log, checks of flags, and main.
# ==================================================================================================


def kl_estimates(logprobs, ref_logprobs, mask):
    """KL(policy || ref) in nats per response, from the policy's own actions (Schulman, "Approximating
    KL divergence"): logprobs, ref_logprobs, mask (B, T-1) -> k1 (B,), k3 (B,). With r = ref / policy of
    a token they sum -log r and (r - 1) - log r. Both are unbiased; k3 is never negative."""
    log_r = (ref_logprobs - logprobs) * mask
    return -log_r.sum(1), (log_r.exp() - 1 - log_r).sum(1)


def explained_variance(values, returns, mask):
    """1 - var(returns - values) / var(returns) over unmasked tokens: 1 is perfect, 0 no better than a
    constant. values, returns, mask (B, T-1) -> float."""
    error, spread = (returns - values)[mask], returns[mask]
    return float(1 - error.var(correction=0) / spread.var(correction=0).clamp(min=1e-8))


def measure(batch, stats, iteration, config):
    """The numbers of one iteration, for the log: means over its minibatches of what the updates
    returned, beside those of the rollout. README says what each looks like in a good run."""
    mask = batch["mask"]
    k1, k3 = kl_estimates(batch["logprobs"], batch["ref_logprobs"], mask)
    stats = [{name: x.item() for name, x in numbers.items()} for numbers in stats]
    return dict(
        episodes=iteration * config.rollout_size,
        score=float(batch["scores"].mean()),  # before the penalty for a missing eot
        **({"gold": float(batch["golds"].mean())} if "golds" in batch else {}),  # in the world only
        kl=float(k1.mean()),  # nats per response
        kl3=float(k3.mean()),
        entropy=float(-masked_mean(batch["logprobs"], mask)),  # nats per token: mean -log pi
        length=float(mask.sum(1).float().mean()),  # tokens
        eot_rate=float(batch["ended"].float().mean()),
        # of the first minibatch: 1, or log-probabilities differ between rollout and update
        first_ratio=stats[0]["max_ratio"],
        explained_variance=explained_variance(batch["values"], batch["returns"], mask),
        **{name: sum(s[name] for s in stats) / len(stats) for name in stats[0] if name != "max_ratio"},
    )


def print_samples(tokenizer, batch, count=2):
    """The first responses of a rollout in full, with score and kl: chosen by index, not by taste."""
    for i in range(min(count, len(batch["tokens"]))):
        start, end = int(batch["prompt_lengths"][i]), int(batch["lengths"][i])
        ids = batch["tokens"][i].tolist()
        kl = float((batch["logprobs"][i] - batch["ref_logprobs"][i]).sum())
        texts = f"{tokenizer.decode(ids[:start])!r} -> {tokenizer.decode(ids[start:end])!r}"
        print(f"    score {float(batch['scores'][i]):.2f}  kl {kl:.2f}  {texts}")


def check_config(config):
    """Raises SystemExit for flags that are out of range or do not fit together."""
    sft.check_config(config)
    size, minibatch_size = config.rollout_size, config.minibatch_size
    message = f"--rollout_size={size} is not a multiple of --minibatch_size={minibatch_size}"
    check(size % minibatch_size == 0, f"{message}: change one of them")
    message = f"--episodes={config.episodes} is less than one rollout of {size}: raise it"
    check(config.episodes >= size, message)


def ensure(config):
    """Train the defaults that are missing before PPO, each by its own stage, with this run's shared
    flags but those that speak of one stage only."""
    names = {field.name for field in fields(Common)} - {"fresh", "log_every"}
    scale, shared = config.scale, {name: getattr(config, name) for name in names}
    flags_of = lambda stage: {**data.COMMON_SCALES[scale], **stage.SCALES[scale], **shared}
    wanted = [name for name in ("base", "sft", "ppo_init") if not getattr(config, name)]
    if not all(sft.is_finished("policy", sft.where(config, name)) for name in wanted):
        sft.main(sft.Config(**flags_of(sft)))
    is_given = config.reward.endswith((".pt", ".py"))
    if not is_given and not sft.is_finished("reward", sft.where(config, "reward")):
        reward.main(reward.Config(**flags_of(reward), sft=config.sft))


def main(config):
    """Train ppo.pt in config.out, or go on with it, after what it needs; then print the last table."""
    check_config(config)
    ensure(config)
    train(config)
    flags = {field.name: getattr(config, field.name, field.default) for field in fields(eval.Config)}
    eval.main(eval.Config(**flags))  # did it work?


if __name__ == "__main__":
    sft.start(main, Config, SCALES)
