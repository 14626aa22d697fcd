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
    3. pretraining uses Muon (Jordan et al. 2024) for the matrices of the blocks, and begins with a
       primer. The paper was given its base model; SFT, reward model and PPO use Adam, as there.

    python sft.py                     4 minutes on two CPU cores
    python sft.py --scale=tiny        seconds; its numbers mean nothing
"""

import contextlib
import difflib
import json
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model
from data import Amount, Base, Checkpoint, Common, Count, Dtype, Folder, Judge, Rate, Seed, Share, check
from model import GPT, GPTConfig, ScalarGPT, is_first


@dataclass
class Config(Common):
    # model
    vocab_size: Count = 1024  # at most, for bpe
    n_layer: Count = 3
    n_head: Count = 4
    n_embd: Count = 128

    # pretraining
    base_steps: Count = 3600
    base_tokens: Count = 512  # a step, about (GPT-3 1.3B: 1M): many small steps teach sooner than few
    base_lr: Rate = 2e-3  # AdamW, of embeddings and vectors: peak, cosine to 10% (GPT-3 1.3B: 2.0e-4)
    muon_lr: Rate = 0.0075  # Muon, of the matrices of the blocks: peak, the same cosine
    base_weight_decay: Amount = 0.1  # as GPT-3
    primer_share: Share = 0.22  # of the steps, the warm-up: these see roll-calls only; 0 for none
    lookup: bool = True  # GPTConfig.lookup; False is plain GPT-2

    # the supervised baseline
    sft_epochs: Count = 16  # as the paper
    sft_batch: Count = 16  # demonstrations a step (paper: 32, of 13k)
    sft_lr: Rate = 5e-4  # peak, cosine to 10% (paper: 9.65e-6)
    sft_dropout: Share = 0.2  # residual, as the paper; for ppo_init.pt too, whose samples it betters
    train_on_prompts: bool = False

    # the start of PPO
    ppo_init_epochs: Count = 16  # (paper: 2, of 50 times the demonstrations)
    ppo_init_lr: Rate = 5e-4  # (paper: 5e-6 for 1.3B)
    pretrain_share: Share = 0.1  # of the rows of a batch, as the paper

    # optimisation
    grad_clip: Rate = 1.0


SCALES = dict(
    tiny=dict(
        vocab_size=512, n_layer=2, n_embd=32, base_steps=60, sft_epochs=4, sft_lr=1e-3, ppo_init_epochs=4,
    ),
    cpu=dict(),
    gpu=dict(
        n_layer=6, n_head=6, n_embd=384, base_steps=12_000, base_tokens=16_000, base_lr=1e-3,
        sft_batch=32,
    ),
    gpt2=dict(n_layer=12, n_head=12, n_embd=768, sft_batch=32, sft_lr=1e-5, ppo_init_lr=5e-6),
)


def lm_loss(gpt, tokens, mask):
    """Mean over unmasked tokens of -log pi: tokens (B, T), mask (B, T-1) -> scalar, nats per token."""
    return -model.by_length(model.masked_logprobs, gpt, tokens, mask).sum() / mask.sum()


@torch.no_grad()
def valid_loss(gpt, tokens, mask):
    """lm_loss of held-out rows, without dropout -> float, nats per token."""
    device = gpt.lm_head.weight.device
    return float(lm_loss(gpt.eval(), tokens.to(device), mask.to(device)))


def train(run, gpt, tokenizer, optimizers, batches, valid, config, keep={}, warmup=0):
    """The loop of every stage, in its simplest form: one step is batch, loss, backward, update, log.

    run: a Run, below the bar. optimizers: by name. batches: for each step its rows, pairs of (prompt ids,
    response ids). valid: {name: (tokens, mask)}, losses to log. keep: {step: epoch}, weights to keep.
    """
    run.begin(len(batches), tokenizer, weights=gpt, **optimizers)
    losses = lambda: {name: valid_loss(gpt, *held_out) for name, held_out in valid.items()}
    if run.step == 0:
        run.log(**losses())  # the untrained number is the baseline
    seen = 0
    for step in run:
        # 1. a batch
        tokens, mask = data.demonstration_batch(batches[step - 1], config.train_on_prompts)
        seen += int(mask.sum())
        tokens, mask = tokens.to(run.device), mask.to(run.device)
        # 2. the loss and its gradients, one step
        gpt.train()
        with autocast(run.device, config.dtype):
            loss = lm_loss(gpt, tokens, mask)
        run.check_finite(loss.item())
        loss.backward()
        factor = cosine(step, len(batches), warmup)
        optimizer_step(gpt, optimizers.values(), factor, config.grad_clip)
        # 3. log
        if step % config.log_every == 0 or step == len(batches) or step in keep:
            run.log(loss=loss.item(), **losses(), tokens_s=seen / run.seconds())
        if step in keep:
            weights = {name: w.detach().cpu().clone() for name, w in gpt.state_dict().items()}
            run.state.setdefault("epochs", {})[keep[step]] = weights
    run.finish()


def main(config):
    """Make base.pt, sft.pt and ppo_init.pt in config.out, or go on with those that are not finished."""
    check_config(config)
    check(config.pretrain_share < 1, f"--pretrain_share={config.pretrain_share}: expected less than 1")
    heads = f"--n_head={config.n_head} does not divide --n_embd={config.n_embd}: change one of them"
    check(config.n_embd % config.n_head == 0, heads)
    room = f"--max_new_tokens={config.max_new_tokens} leaves no room for a prompt in --block_size"
    check(config.base or config.max_new_tokens < config.block_size, f"{room}={config.block_size}")
    datasets = data.load(config.data, config.scale, config.seed)

    # 1. the base model: GPT-2, a checkpoint of ours, or pretrained here
    path = where(config, "base")
    if path == os.path.join(config.out, "base.pt"):  # neither given nor only in --from
        pretrain(config, datasets)
    base, tokenizer, _ = load_network("policy", path, "cpu")
    parameters = sum(p.numel() for p in base.parameters())
    print(f"base: {parameters:,} parameters, vocabulary {tokenizer.n_vocab}")
    if tokenizer.name != config.encoding:
        print(f"--encoding={config.encoding} is not used: {config.base} has {tokenizer.name}")

    # 2. the baseline, and 3. the start of PPO: two models, two recipes (App. C.1 and C.3)
    for name in ("sft", "ppo_init"):
        fine_tune(name, config, base, tokenizer, datasets)


def pretrain(config, datasets):
    """base.pt from nothing, or from where it was stopped."""
    run = Run("base", "policy", config, ignore=("sft_", "ppo_init_", "train_on", "pretrain_share"))
    if run.finished:
        return
    if config.encoding == "bpe":
        texts = datasets["pretrain"][:20_000]
        texts += [row["prompt"] + row["response"] for row in datasets["demonstrations"]]
        texts += [row["prompt"] for row in datasets["prompts"]]
        tokenizer = data.Tokenizer.train(texts, config.vocab_size)
    else:
        tokenizer = data.Tokenizer(config.encoding)
    torch.manual_seed(config.seed)
    vocab_size = -(-tokenizer.n_vocab // 64) * 64  # a round number of rows: quicker matmuls
    sizes = config.block_size, config.n_layer, config.n_head, config.n_embd
    gpt = GPT(GPTConfig(vocab_size, *sizes, lookup=config.lookup)).to(run.device)
    documents, valid = documents_of(config, datasets, tokenizer, gpt)
    primer = data.encode_documents(tokenizer, tuple(datasets["primer"]), config.document_length)
    primer_steps = int(config.primer_share * config.base_steps) if primer else 0
    batches = []
    for part, steps in ((primer, primer_steps), (documents, config.base_steps - primer_steps)):
        lengths = [1 + len(rest) for _, rest in part]
        rows = max(1, config.base_tokens * len(part) // max(1, sum(lengths)))  # a step
        for chosen in data.bucketed(lengths, rows, config.seed, steps):
            batches.append([part[i] for i in chosen])
    optimizers = muon_and_adamw(gpt, config.muon_lr, config.base_lr, config.base_weight_decay)
    # the primer is the warm-up: at the full rate some seeds never learn to answer the calls
    train(run, gpt, tokenizer, optimizers, batches, dict(valid_loss=valid), config, warmup=primer_steps)


def fine_tune(name, config, base, tokenizer, datasets):
    """sft.pt or ppo_init.pt from the base model, or from where it was stopped."""
    if name == "sft":
        epochs, lr, share = config.sft_epochs, config.sft_lr, 0.0
        kept_epochs, others = {1, 2, 4, 8, 16, epochs}, ("ppo_init_", "pretrain_share")
    else:
        epochs, lr, share = config.ppo_init_epochs, config.ppo_init_lr, config.pretrain_share
        kept_epochs, others = {}, ("sft_epochs", "sft_lr")
    run = Run(name, "policy", config, ignore=others, weights_of_base=checksum(base))
    if run.finished:
        return
    gpt = GPT(replace(base.config, dropout=config.sft_dropout))
    gpt.load_state_dict(base.state_dict())
    gpt.to(run.device)
    documents, valid_documents = documents_of(config, datasets, tokenizer, gpt)
    encode = lambda part: data.encode_pairs(tokenizer, datasets[part], gpt.config.block_size)
    pairs, valid = encode("demonstrations"), encode("demonstrations_valid")
    batches = []
    for epoch in range(epochs):
        rng = np.random.default_rng([config.seed, 100 + epoch])
        for chosen in data.cut(rng.permutation(len(pairs)), config.sft_batch):
            batch = [pairs[i] for i in chosen]
            rows = math.ceil(len(batch) * share / (1 - share))
            batches.append(batch + data.draw(documents, rows, rng))
    keep = {len(batches) // epochs * epoch: epoch for epoch in kept_epochs}
    valid = data.demonstration_batch(valid, config.train_on_prompts)
    held_out = dict(valid_loss=valid, pretrain_loss=valid_documents)
    train(run, gpt, tokenizer, dict(adamw=adamw(gpt, lr)), batches, held_out, config, keep)


def documents_of(config, datasets, tokenizer, gpt):
    """-> the pretraining documents as pairs of ids, and of those held out 16k tokens as (tokens, mask), the
    same for every stage and the last table, so that the pretraining losses of all models compare."""
    length = min(config.document_length, gpt.config.block_size)
    check(length > 1, f"--document_length={length}: expected 2 or more, a token and what follows it")
    encode = lambda part: data.encode_documents(tokenizer, tuple(datasets[part]), length)
    documents, valid = encode("pretrain"), encode("pretrain_valid")
    totals = np.cumsum([1 + len(rest) for _, rest in valid])
    return documents, data.demonstration_batch(valid[: max(1, int((totals <= 16_384).sum()))])


# ==================================================================================================
# The bar: what follows is the plumbing of every stage, not needed to follow the algorithm.
# ==================================================================================================


def adamw(network, lr, weight_decay=0.0, but=()):
    """The paper's Adam, eps as in the original RLHF code; only matrices decay, `but` is left out."""
    left = [p for p in network.parameters() if not any(p is other for other in but)]
    groups = [
        dict(params=[p for p in left if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in left if p.dim() < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


def muon_and_adamw(gpt, muon_lr, lr, weight_decay):
    """Muon (Jordan et al. 2024) for the matrices of the blocks: each step is the momentum with all its
    singular values made equal, so that rare directions, such as copying a rare word, are learnt as
    quickly as common ones. AdamW for embeddings and vectors -> both, by name."""
    matrices = [p for p in gpt.transformer.h.parameters() if p.dim() >= 2]
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, momentum=0.95)
    return dict(muon=muon, adamw=adamw(gpt, lr, weight_decay, but=matrices))


def optimizer_step(network, optimizers, factor, grad_clip):
    """Add up the gradients of all processes, clip them, step with `factor` times the peak of the
    learning rate, clear them."""
    if dist.is_initialized():  # in one message: each has those of its own rows (model.by_length)
        grads = [p.grad for p in network.parameters()]
        dist.all_reduce(flat := torch.nn.utils.parameters_to_vector(grads))
        torch.nn.utils.vector_to_parameters(flat, grads)
    torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak", group["lr"])
        optimizer.step()
        optimizer.zero_grad()


def cosine(step, steps, warmup=0):
    """Factor of the learning rate: linear in the warm-up (App. C.1: none), then a cosine to 10%."""
    if step < warmup:
        return step / warmup
    gone = (step - warmup) / max(1, steps - warmup)  # a run may be all warm-up
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * gone))


# --------------------------------------------------------------------------------------------------
# flags and devices

is_fit = lambda path, *ends: path == "" or (path.endswith(ends) and os.path.isfile(path))  # '': not given
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
KINDS = {  # type of a flag -> what reads its text, its range, both in words
    str: (str, lambda v: True, "text"),
    bool: (lambda text: BOOLEANS[text.lower()], lambda v: True, "true or false"),
    int: (int, lambda v: True, "a whole number"),
    float: (float, math.isfinite, "a number"),
    Count: (int, lambda v: v >= 1, "a whole number, at least 1"),
    Seed: (int, lambda v: v >= 0, "a whole number, not below 0"),
    Rate: (float, lambda v: 0 < v < math.inf, "a number above 0"),
    Share: (float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    Amount: (float, lambda v: 0 <= v < math.inf, "a number, not below 0"),
    Folder: (str, lambda v: not v or os.path.isdir(v), "a folder that is there"),
    Dtype: (str, lambda v: v in ("", "float32", "bfloat16"), "float32 or bfloat16"),
    Base: (str, lambda v: not v.endswith(".pt") or os.path.isfile(v), "a .pt file that is there, or GPT-2"),
    Checkpoint: (str, lambda v: is_fit(v, ".pt"), "a .pt file that is there"),
    Judge: (str, lambda v: is_fit(v, ".pt", ".py") or v == "gold", "a .pt or .py file there, or gold"),
}


def parse(Config, scales, argv):
    """Command line -> Config: the defaults of the scale (gpu if a GPU is used, else cpu), then --name=value
    flags. Raises SystemExit for an unknown flag, with its near misses, or an ill-typed value."""
    known, flags = {field.name.rstrip("_"): field for field in fields(Config)}, {}
    if {"-h", "--help"} & set(argv):
        flags = (f"--{name}={field.default}" for name, field in known.items())
        print(sys.modules[Config.__module__].__doc__, *flags, sep="\n")
        raise SystemExit(0)
    for argument in argv:
        name, has_value, text = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["help"]
        is_flag = argument.startswith("--") and name in known
        check(is_flag, f"{sys.argv[0]} has no {argument}: did you mean {', '.join('--' + n for n in near)}?")
        field = known[name]
        check(has_value or field.type is bool, f"--{name} needs a value: write --{name}=VALUE")
        read, _, wanted = KINDS[field.type]
        try:
            flags[field.name] = read(text if has_value else "true")
        except (ValueError, KeyError):
            raise SystemExit(f"--{name}={text}: expected {wanted}") from None
    on_gpu = torch.cuda.is_available() and flags.get("device") != "cpu"
    scale = flags.setdefault("scale", "gpu" if on_gpu else "cpu")
    check(scale in scales, f"--scale={scale} is unknown: choose one of {', '.join(scales)}")
    defaults = {**data.COMMON_SCALES[scale], **scales[scale]}
    return Config(**{**{name: v for name, v in defaults.items() if name in known}, **flags})


def check_flags(config):
    """Every flag in its range, else SystemExit."""
    for field in fields(config):
        value, (_, holds, wanted) = getattr(config, field.name), KINDS[field.type]
        check(holds(value), f"--{field.name.rstrip('_')}={value}: expected {wanted}")


def check_config(config):
    """Before anything trains: every flag in its range, given files and the device there, the output
    folder made and writable. Raises SystemExit."""
    check_flags(config)
    is_gold = getattr(config, "reward", "") == "gold"
    check(not (is_gold and config.data), "--reward=gold needs the miniature world: leave out --data")
    get_device(config.device)
    with contextlib.suppress(OSError):
        os.makedirs(config.out, exist_ok=True)
    is_writable = os.path.isdir(config.out) and os.access(config.out, os.W_OK)
    check(is_writable, f"--out={config.out}: cannot write there: choose another folder")


def get_device(name):
    """'' picks cuda if it is there, else cpu -> torch.device. Raises SystemExit if it is not there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    name = name or there[0]
    check(name in there, f"--device={name} is not there: use one of {', '.join(there)}")
    if name != "cpu":
        torch.cuda.set_device(int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # what autocast leaves in fp32 may use TF32
        # cuDNN's attention builds a plan, up to a second, for each new shape: ours are ragged
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def autocast(device, dtype=""):
    """bfloat16 activations, fp32 weights (paper: fp16). '': bfloat16 on a GPU that has it."""
    if not dtype and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


# --------------------------------------------------------------------------------------------------
# a run: goes on where it was stopped


def settings_of(config, ignore=()):
    """What bears on a result: the flags, but what begins with a word of `ignore`, and the texts."""
    ignore = ("out", "from_", "fresh", "device", "log_every", "save_seconds", *ignore)
    flags = {name: v for name, v in asdict(config).items() if not name.startswith(ignore)}
    return dict(flags, texts=data.checksum(config.data))


def checksum(*networks):
    """A number that changes with the weights of these networks, of which some may be None."""
    weights = (w for network in filter(None, networks) for w in network.state_dict().values())
    return zlib.crc32(b"".join(w.cpu().numpy().tobytes() for w in weights))


class Run:
    """What a training loop needs beside the method: `for step in run` begins behind the last saved step,
    seeds each step, shows a bar, saves in time, and ends in order at Ctrl-C. run.state: the checkpoint.

    Everything random is a function of seed and step (run.rng of numpy, run.generator and torch's own
    state, for dropout): a checkpoint needs no random states, and a run that was killed and started
    again draws what the unbroken run draws. Raises SystemExit, naming the flags, if the checkpoint in
    --out was made with others: it is neither retrained nor overwritten.
    """

    def __init__(self, name, kind, config, ignore=(), **more):
        self.config, self.device = config, get_device(config.device)
        self.path, self.log_path = (os.path.join(config.out, name + end) for end in (".pt", ".jsonl"))
        files = model.__file__, data.__file__, __file__, sys.modules[type(config).__module__].__file__
        files = [open(f, "rb").read() for f in (*files, getattr(config, "reward", "")) if f.endswith(".py")]
        now, code = {**settings_of(config, ignore), **more}, zlib.crc32(b"".join(files))
        self.state = dict(step=0, finished=False)
        if os.path.exists(self.path) and not config.fresh:
            self.state = load_checkpoint(kind, self.path)
            # a flag that the checkpoint does not know was at its default
            then = {**now, **asdict(type(config)()), **self.state["settings"]}
            differ = [f"--{k}={then[k]} there, {now[k]} now" for k in now if then[k] != now[k]]
            flags = f"{self.path} was made with other flags ({', '.join(differ)})"
            check(not differ, f"{flags}: choose another --out, or --fresh")
            if self.state["code"] != code:
                print(f"warning: {self.path} was made by other code: --fresh makes it anew")
        self.state.update(kind=kind, settings=now, code=code)
        self.step, self.finished = self.state["step"], self.state["finished"]
        if self.finished:
            print(f"{self.path} is there and finished")

    def begin(self, steps, tokenizer=None, **parts):
        """parts: networks and optimizers, which are saved; weights: the network that has the tokenizer."""
        self.steps, self.parts, self.started = steps, parts, time.monotonic()
        if tokenizer:
            self.state.update(config=asdict(parts["weights"].config), tokenizer=tokenizer.state())
        if self.step:
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
            print(f"{self.path}: going on from step {self.step}")
        if dist.is_initialized():
            dist.barrier()  # all have read what the first will write over
        # the log is cut behind that step; its last line may have no end
        is_kept = lambda row: self.step and row.endswith(b"\n") and json.loads(row)["step"] <= self.step
        if is_first():
            with open(self.log_path, "a+b") as file:
                file.seek(0)
                rows = file.readlines()
                is_log = all(b'{"step": '.startswith(row[:9]) for row in rows)
                check(is_log, f"{self.log_path} is not the log of a run: choose another --out")
                if self.config.fresh and os.path.exists(self.path):  # it speaks of rows that go now
                    os.remove(self.path)
                file.truncate(sum(len(row) for row in rows if is_kept(row)))

    def __iter__(self):
        self.due, self.interrupted = time.monotonic() + self.config.save_seconds, False
        previous = signal.signal(signal.SIGINT, self.interrupt)
        left, no_bar = range(self.step + 1, self.steps + 1), None if is_first() else True
        try:
            for self.step in tqdm(left, initial=self.step, total=self.steps, disable=no_bar):
                seed = self.config.seed * 1_000_003 + self.step
                seed += 500_009 * model.rank_and_size()[0]  # each process samples for itself
                torch.manual_seed(seed)
                self.generator = torch.Generator(self.device).manual_seed(seed)
                self.rng = np.random.default_rng([self.config.seed, self.step])
                yield self.step
                if self.interrupted or time.monotonic() > self.due:
                    self.save()
                saved = f"stopped after step {self.step}, saved in {self.path}"
                check(not self.interrupted, f"{saved}: the same command goes on, without --fresh")
        finally:
            signal.signal(signal.SIGINT, previous)

    def interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one does not wait

    def seconds(self):
        """Since this process began with the run."""
        return time.monotonic() - self.started

    def log(self, show=True, **row):
        """One JSON object a line in the file, and one line on the console."""
        row = dict(step=self.step, **row, seconds=self.seconds(), memory_gb=peak_memory_gb())
        self.write([row])
        if show:
            cells = (f"{k} {v:>{7 if isinstance(v, float) else 5}.4g}" for k, v in row.items())
            print("  ".join(cells), flush=True)

    def write(self, rows):
        """Rows with their step -> the log."""
        if is_first():
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def check_finite(self, loss):
        """Raises SystemExit at the first loss that is not a number, before it reaches the checkpoint."""
        check(math.isfinite(loss), f"the loss is {loss} at step {self.step}: lower the learning rate")

    def save(self, finished=False):
        begun = time.monotonic()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        self.state.update(parts, step=self.step, finished=finished)
        data.write_file(self.path, lambda temporary: torch.save(self.state, temporary))
        now = time.monotonic()
        # writing gigabytes takes its time: at most a twentieth of the run
        self.due = now + max(self.config.save_seconds, 20 * (now - begun))

    def finish(self):
        """After the last step."""
        self.save(finished=True)
        if dist.is_initialized():
            dist.barrier()  # the file is there for all
        spent = f"{self.seconds():.0f} s, {peak_memory_gb():.2f} GB"
        print(f"wrote {self.path}: {self.steps} steps, {spent}", flush=True)


def where(config, name):
    """Where an earlier model is: as given (a base by GPT-2's name, too), else in --out, else in --from."""
    paths = [os.path.join(folder, f"{name}.pt") for folder in (config.out, config.from_) if folder]
    given = getattr(config, name, "")
    is_given = given and (name, given) != ("reward", "gold")  # gold has no file
    return given if is_given else next(filter(os.path.exists, paths), paths[0])


def load_checkpoint(kind, path):
    """-> what Run.save wrote. Raises SystemExit unless it is of this kind."""
    advice = 'run "python ppo.py" with this --out, which makes what is missing'
    check(os.path.exists(path), f"{path} not found: {advice}, or say where it is")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["kind"]
    except Exception:  # torch.load fails in many ways on what is cut short or was never a checkpoint
        message = f"{path} is damaged or is not a checkpoint of this project: delete it, then {advice}"
        raise SystemExit(message) from None
    check(found == kind, f"{path} holds a {found} model, expected a {kind} model: did you mix up two paths?")
    return checkpoint


def load_network(kind, path, device, epoch=None):
    """-> GPT or ScalarGPT in eval mode, its tokenizer, its checkpoint, {} for GPT-2's weights. epoch: one of
    the kept ones of sft.pt; None is the last. Raises SystemExit as load_checkpoint, or if not finished."""
    if not path.endswith(".pt"):  # GPT-2's weights, by name or in a folder
        return GPT.from_pretrained(path).to(device).eval(), data.Tokenizer("gpt2"), {}
    checkpoint = load_checkpoint(kind, path)
    check(checkpoint["finished"], f"{path} is not finished: the command that began it goes on with it")
    network = GPT(GPTConfig(**{**checkpoint["config"], "dropout": 0.0}))  # dropout is for SFT only
    network = ScalarGPT(network) if kind == "reward" else network
    network.load_state_dict(checkpoint["epochs"][epoch] if epoch else checkpoint["weights"])
    return network.to(device).eval(), data.Tokenizer(**checkpoint["tokenizer"]), checkpoint


def is_finished(kind, path):
    """Is there a finished checkpoint at path? Prints a warning if its texts have changed since.
    Raises SystemExit if the file is damaged or holds another kind."""
    if not os.path.exists(path):
        return False
    checkpoint = load_checkpoint(kind, path)
    settings, folder = checkpoint["settings"], checkpoint["settings"].get("data")
    if settings.get("texts", now := data.checksum(folder)) != now:
        texts = f"another text of {folder or 'assets/world'}"
        print(f"warning: {path} was made from {texts}: delete it to make it anew")
    return checkpoint["finished"]


def peak_memory_gb():
    """Peak memory in GB: of the GPU if one is used, else of this process; 0 on Windows."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return 0.0
    import resource  # which Windows has not
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def start(main, Config, scales):
    """What stands under `if __name__ == "__main__"` of every stage: errors of the user in one line. As one
    of the processes of torchrun it joins the others first, and leaves talking to the first."""
    if hasattr(sys.stdout, "reconfigure"):  # not in every editor
        sys.stdout.reconfigure(errors="replace")  # a pipe's encoding may lack what a model writes
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    first = is_first()
    if not first:
        sys.stdout = open(os.devnull, "w")
    try:
        return main(parse(Config, scales, sys.argv[1:]))
    except SystemExit as stop:
        why = stop.code
    except KeyboardInterrupt:
        why = "interrupted: the same command goes on from the last checkpoint"
    except ValueError as problem:  # raised by our functions for what a caller got wrong
        why = str(problem)
    except RuntimeError as problem:
        if "by peer" not in str(problem) and not isinstance(problem, dist.DistError):
            raise
        why = "another of the processes ended: the same command goes on from the last checkpoint"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    raise SystemExit(why if first or not why else 1)


if __name__ == "__main__":
    start(main, Config, SCALES)
