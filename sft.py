"""
Stage 1: the language-model loss, three times (InstructGPT, sec. 3.5 and App. C.1, C.3).

    loss = - mean over unmasked tokens of log pi(tokens[t+1] | tokens[:t+1])

    base.pt      a GPT pretrained on the world's text, one document a row: every token counts
                 (or GPT-2's weights, --base=gpt2)
    sft.pt       the supervised baseline: 16 epochs on the demonstrations, loss on the responses only;
                 keeps the weights of several epochs
    ppo_init.pt  where PPO starts and what its KL is measured against: another recipe, with 10%
                 pretraining documents mixed in (paper: 2 epochs)

Differs from the paper in:
    1. the loss counts response tokens only (--train_on_prompts=true: all); the paper does not say;
    2. learning rates are those of a model a thousand times smaller; the paper's stand in the comments;
    3. pretraining begins with a primer (README, "What made the difference").

    python sft.py                     3.5 minutes on two CPU cores
    python sft.py --scale=tiny        seconds; its numbers mean nothing
"""

import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

import data
import model
from model import GPT, GPTConfig


@dataclass
class Config:
    # where and what
    scale: str = "cpu"  # tiny, cpu, gpu, gpt2: the defaults of SCALES below
    out: str = "out"  # folder for checkpoints and logs
    seed: int = 1
    data: str = ""  # folder of dataset files; '' is the miniature world
    device: str = ""  # cpu or cuda; '' takes cuda if it is there
    dtype: str = ""  # of activations, float32 or bfloat16; '' is bfloat16 on a GPU
    encoding: str = "bpe"  # bpe: trained on the data at hand; gpt2
    base: str = ""  # start from a checkpoint, a Hugging Face folder or gpt2; '' pretrains out/base.pt

    # model
    vocab_size: int = 1024  # at most, for bpe
    block_size: int = 256  # context, tokens (paper: 2048)
    n_layer: int = 3
    n_head: int = 2
    n_embd: int = 128

    # pretraining
    base_steps: int = 2400
    base_tokens: int = 1024  # a step, about (GPT-3 1.3B: 1M): many small steps teach sooner than few
    base_length: int = 128  # tokens; longer documents are cut into pieces
    base_lr: float = 2e-3  # peak, cosine to 10% (GPT-3 1.3B: 2.0e-4)
    base_weight_decay: float = 0.1
    primer_share: float = 0.1  # of the steps: the first ones see roll-calls only; 0 for none

    # the supervised baseline
    sft_epochs: int = 16  # as the paper
    sft_batch: int = 16  # demonstrations a step (paper: 32, of 13k)
    sft_lr: float = 5e-4  # peak, cosine to 10% (paper: 9.65e-6)
    sft_dropout: float = 0.2  # residual, as the paper; for ppo_init.pt too, whose samples it betters
    train_on_prompts: bool = False

    # the start of PPO
    ppo_init_epochs: int = 16  # (paper: 2, of 50 times the demonstrations)
    ppo_init_lr: float = 5e-4  # (paper: 5e-6 for 1.3B)
    pretrain_share: float = 0.1  # of the rows of a batch, as the paper

    # optimisation and logging
    grad_clip: float = 1.0
    log_every: int = 200  # steps
    save_seconds: float = 15.0  # a killed run loses at most this much


SCALES = dict(
    tiny=dict(
        vocab_size=512, n_layer=2, n_embd=32, base_steps=60, sft_epochs=4, log_every=20,
        save_seconds=5.0,
    ),
    cpu=dict(),
    gpu=dict(
        n_layer=6, n_head=6, n_embd=384, base_steps=12_000, base_tokens=16_000, base_lr=1e-3,
        sft_batch=32,
    ),
    gpt2=dict(
        encoding="gpt2", base="gpt2", block_size=1024, n_layer=12, n_head=12, n_embd=768, sft_batch=32,
        sft_lr=1e-5, ppo_init_lr=5e-6, primer_share=0.0,
    ),
)


def lm_loss(gpt, tokens, mask):
    """Mean over unmasked tokens of -log pi: tokens (B, T), mask (B, T-1) -> scalar, nats per token.

    Computed on rows of similar length at a time (model.by_length).
    """
    columns = torch.arange(2, tokens.size(1) + 1, device=mask.device)
    lengths = (mask * columns).amax(1).clamp(min=2)  # (B,), up to the last action that counts
    logprobs = model.by_length(lambda t, m: model.masked_logprobs(gpt, t, m), tokens, lengths, mask)
    return -(logprobs.sum() / mask.sum())


def demonstration_batch(pairs, train_on_prompts=False):
    """Pairs of (prompt ids, response ids with eot) -> tokens (B, T), mask (B, T-1): True on the
    response, eot included; with train_on_prompts on the prompt as well."""
    tokens, lengths = model.pad([prompt + response for prompt, response in pairs])  # (B, T), (B,)
    starts = torch.tensor([1 if train_on_prompts else len(prompt) for prompt, _ in pairs])
    return tokens, model.response_mask(starts, lengths, tokens.size(1))


def train(
    gpt, path, settings, tokenizer, steps, batch_at, lr, evaluate, config, weight_decay=0.0, keep=()
):
    """The loop of every stage, in its simplest form: one step is batch, loss, backward,
    update, log, save.

    batch_at(step, rng) -> tokens (B, T), mask (B, T-1), for step 1 to steps; evaluate() -> dict of
    numbers; lr is the peak of the cosine; keep: {step: epoch}, the steps whose weights are kept. Goes
    on from `path` if that holds the same run unfinished, does nothing if it is finished. Raises
    SystemExit if the loss is not finite or `path` was made with other flags.
    """
    device = model.get_device(config.device)
    gpt.to(device)
    optimizer = model.adamw(gpt, lr, weight_decay)
    begin, kept = 0, {}
    checkpoint = model.resume(path, "policy", settings)
    if checkpoint:
        if checkpoint["finished"]:
            print(f"{path} is there and finished")
            return
        gpt.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        begin, kept = checkpoint["step"], checkpoint["epochs"]
        print(f"{path}: going on from step {begin}")

    def state(step):
        return dict(
            kind="policy", config=asdict(gpt.config), weights=gpt.state_dict(), epochs=kept, step=step,
            finished=step == steps, optimizer=optimizer.state_dict(), settings=settings,
            tokenizer=tokenizer.state(),
        )

    log = model.Log(path.replace(".pt", ".jsonl"), begin)
    started, seen = time.monotonic(), 0
    if begin == 0:
        log.write(dict(step=0, **evaluate()))  # the untrained number is the baseline
    with (
        model.Saver(path, config.save_seconds) as saver,
        tqdm(total=steps, initial=begin, disable=None) as bar,
    ):
        for step in range(begin + 1, steps + 1):
            # 1. a batch; everything random is a function of seed and step: a resumed run draws the same
            model.seed_step(config.seed, step, device)
            tokens, mask = batch_at(step, np.random.default_rng([config.seed, step]))
            tokens, mask = tokens.to(device), mask.to(device)
            # 2. the loss and its gradients
            gpt.train()
            with model.autocast(device, config.dtype):
                loss = lm_loss(gpt, tokens, mask)
            model.check_finite(loss.item(), step, path)
            loss.backward()
            model.optimizer_step(optimizer, gpt, lr * model.cosine(step, steps), config.grad_clip)
            seen += int(mask.sum())
            # 3. log and save
            bar.update()
            if step % config.log_every == 0 or step == steps or step in keep:
                seconds = time.monotonic() - started
                numbers = dict(step=step, loss=loss.item(), **evaluate())
                numbers.update(seconds=seconds, tokens_s=seen / seconds)
                log.write(dict(**numbers, memory_gb=model.peak_memory_gb()))
            if step in keep:
                kept[keep[step]] = {
                    name: w.detach().cpu().clone() for name, w in gpt.state_dict().items()
                }
            saver.save_if_due(step, lambda: state(step))
    model.save_checkpoint(path, **state(steps))
    seconds = time.monotonic() - started
    print(f"wrote {path}: {steps} steps, {seconds:.0f} s, peak memory {model.peak_memory_gb():.2f} GB")


def settings_of(config, stage):
    """The flags that bear on one of the three models, so that another --sft_lr does
    not disown base.pt."""
    others = {
        "base": ("sft_", "ppo_init_", "train_on", "pretrain_share"),
        "sft": ("ppo_init_", "pretrain_share"),
        "ppo_init": ("sft_epochs", "sft_lr"),
    }[stage]
    return {name: value for name, value in asdict(config).items() if not name.startswith(others)}


def main(config, stages=("sft", "ppo_init")):
    """Make base.pt, sft.pt and ppo_init.pt in config.out, or go on with those that are not finished."""
    model.check_values(config)
    share = config.pretrain_share
    model.check(share < 1, f"--pretrain_share={share}: expected less than 1")
    heads = f"--n_head={config.n_head} does not divide --n_embd={config.n_embd}: change one of them"
    model.check(config.n_embd % config.n_head == 0, heads)
    datasets = data.load(config.data, config.scale, config.seed)
    paths = {name: os.path.join(config.out, f"{name}.pt") for name in ("base", "sft", "ppo_init")}

    # 1. the base model: GPT-2, a checkpoint of ours, or pretrained here
    if config.base and not config.base.endswith(".pt"):
        base, tokenizer = GPT.from_pretrained(config.base), data.Tokenizer.load("gpt2")
    elif config.base:
        base, checkpoint = model.load_policy(config.base, "pass another --base", "cpu")
        tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
    else:
        base, tokenizer = pretrain(paths["base"], datasets, config)
    parameters = sum(p.numel() for p in base.parameters())
    print(f"base: {parameters:,} parameters, vocabulary {tokenizer.n_vocab}")
    if tokenizer.name != config.encoding:
        print(f"--encoding={config.encoding} is not used: {config.base} has {tokenizer.name}")

    block_size = base.config.block_size  # of a given base: not --block_size
    length = min(config.base_length, block_size)
    documents = data.encode_documents(tokenizer, datasets["pretrain"], length)
    documents_valid = data.encode_documents(tokenizer, datasets["pretrain_valid"], length)
    valid_batches = data.document_batches(data.valid_documents(documents_valid))
    pairs = data.encode_pairs(tokenizer, datasets["demonstrations"], block_size)
    pairs_valid = data.encode_pairs(tokenizer, datasets["demonstrations_valid"], block_size)

    # 2. the baseline, and 3. the start of PPO: two models, two recipes (App. C.1 and C.3)
    for name in stages:
        torch.manual_seed(config.seed)
        is_baseline = name == "sft"
        epochs = config.sft_epochs if is_baseline else config.ppo_init_epochs
        gpt = GPT(GPTConfig(**{**asdict(base.config), "dropout": config.sft_dropout}))
        gpt.load_state_dict(base.state_dict())
        epoch_steps = -(-len(pairs) // config.sft_batch)

        def batch_at(step, rng):
            epoch, number = divmod(step - 1, epoch_steps)
            order = np.random.default_rng([config.seed, 100 + epoch]).permutation(len(pairs))
            chosen = order[number * config.sft_batch : (number + 1) * config.sft_batch]
            batch = [pairs[i] for i in chosen]
            # pretraining documents too, as pairs whose prompt is their first token
            if not is_baseline and config.pretrain_share:
                rows = max(1, round(len(batch) * config.pretrain_share / (1 - config.pretrain_share)))
                batch += [(document[:1], document[1:]) for document in data.draw(documents, rows, rng)]
            return demonstration_batch(batch, config.train_on_prompts)

        def evaluate():
            valid = demonstration_batch(pairs_valid, config.train_on_prompts)
            return dict(
                valid_loss=valid_loss(gpt, [valid]), pretrain_loss=valid_loss(gpt, valid_batches)
            )

        kept_epochs = [e for e in (1, 2, 4, 8, 16, epochs) if e <= epochs] if is_baseline else []
        keep = {epoch * epoch_steps: epoch for epoch in kept_epochs}
        lr = config.sft_lr if is_baseline else config.ppo_init_lr
        train(
            gpt, paths[name], settings_of(config, name), tokenizer, epochs * epoch_steps, batch_at, lr,
            evaluate, config, keep=keep,
        )


def pretrain(path, datasets, config):
    """base.pt from nothing, or from where it was stopped -> GPT in eval mode on the CPU, tokenizer."""
    checkpoint = model.resume(path, "policy", settings_of(config, "base"))
    if checkpoint:
        tokenizer = data.Tokenizer.from_state(checkpoint["tokenizer"])
    elif config.encoding == "bpe":
        texts = datasets["pretrain"][:20_000]
        texts += [row["prompt"] + row["response"] for row in datasets["demonstrations"]]
        texts += [row["prompt"] for row in datasets["prompts"]]
        tokenizer = data.Tokenizer.train(texts, config.vocab_size)
    else:
        tokenizer = data.Tokenizer.load(config.encoding)
    torch.manual_seed(config.seed)
    vocab_size = -(-tokenizer.n_vocab // 64) * 64  # a round number of rows: quicker matmuls
    gpt = GPT(GPTConfig(
        vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd,
        rotary=True, match_head=True, init_std=0.06,
    ))
    documents, primer, valid = (
        data.encode_documents(tokenizer, datasets[name], min(config.base_length, config.block_size))
        for name in ("pretrain", "primer", "pretrain_valid")
    )
    primer_steps = int(config.primer_share * config.base_steps) if primer else 0
    rows = max(1, config.base_tokens * len(documents) // sum(map(len, documents)))  # documents a step
    steps = config.base_steps - primer_steps
    order = data.bucketed(list(map(len, documents)), rows, config.seed, steps)
    primer_order = data.bucketed(list(map(len, primer)), rows, config.seed, primer_steps)
    valid_batches = data.document_batches(data.valid_documents(valid))

    def batch_at(step, rng):
        if step <= primer_steps:
            return data.document_batch([primer[i] for i in primer_order[step - 1]])
        return data.document_batch([documents[i] for i in order[step - 1 - primer_steps]])

    def evaluate():
        return dict(valid_loss=valid_loss(gpt, valid_batches))

    train(
        gpt, path, settings_of(config, "base"), tokenizer, config.base_steps, batch_at, config.base_lr,
        evaluate, config, config.base_weight_decay,
    )
    return model.load_policy(path, "run python sft.py", "cpu")[0], tokenizer


@torch.no_grad()
def valid_loss(gpt, batches):
    """Mean loss over all unmasked tokens of the batches, nats per token, without dropout."""
    gpt.eval()
    device = gpt.lm_head.weight.device
    total = sum(
        float(lm_loss(gpt, tokens.to(device), mask.to(device))) * int(mask.sum())
        for tokens, mask in batches
    )
    return total / sum(int(mask.sum()) for _, mask in batches)


if __name__ == "__main__":
    model.run(main, Config, SCALES)
