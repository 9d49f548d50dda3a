"""A laptop experiment: a tiny Qwen3, trained here from scratch to add numbers, improved by egrsd.py.

    python -m lab.toy                                            # under 3 minutes on two slow cores
    python -m lab.toy --method grpo --rollouts_per_prompt 4      # any flag of egrsd.py

Pre-training shows texts with slips and second passes; behind a reference, hardly a slip and fewer second
passes: the privileged view really knows better. The paper's regimes exist by construction: the teacher is
sure of digits (locks), unsure of idle words (forks), and unsure for one token whether to work a column or the
sum again (pivots). The same command goes on where the run stopped; all seeds share one model and problems.
"""
import json, os, random, re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
import torch.nn.functional as F
import egrsd
from lab import evaluate

PROBLEMS, HELD_OUT, PRETRAIN_STEPS, PRETRAIN_BATCH = 4000, 128, 650, 12
FLAGS = dict(lr=1.4e-3, batch_size=24, lora_rank=16, max_completion_length=104, micro_batch=8)  # yours win
START = ("model", "thinking", "max_completion_length", "dtype")  # flags that the first evaluation depends on

# ===================================== Problems and their solutions ======================================

# Words are a token each. IDLE_RUN idle ones open a pass; the length reward would unlearn a longer run.
IDLE = [f"{word} " for word in
        "alright first good here hmm let look next now okay right see then us we well".split()]
IDLE_RUN = 6
COLUMNS, DOUBTS = ("ones ", " tens ", " hundreds "), (", wait: ", ", no: ", ", or: ")
CHECKS, BOX = (" Check: ", " Again: ", " Verify: "), " \\boxed{"
REDONE = " is "  # the "=" of a column worked again; in these texts the sum behind it is right

# (chance of a slip in a column, of a second pass), by the kind of prompt.
PLAIN, BRIEF, WITH_REFERENCE = (0.4, 0.7), (0.4, 0.25), (0.01, 0.25)
NOTICED, NEEDLESS = 0.5, 0.2  # chance that a column is worked again: while it is wrong, while right

def columns(rng, a, b, slip, idle=IDLE_RUN):
    """Idle words, then columns from the right; by chance one slips, or is worked again -> text, result."""
    text, result, carry = "".join(rng.choices(IDLE, k=idle)), "", 0
    for k, name in enumerate(COLUMNS):
        x, y = a // 10**k % 10, b // 10**k % 10
        work, right = f"{x}+{y}+{carry}", x + y + carry
        written = abs(right + rng.choice((-1, 1))) if rng.random() < slip else right  # 1 instead of -1
        text += f"{name}{work}={written:02}"
        while rng.random() < (NEEDLESS if written == right else NOTICED):
            written = right
            text += f"{rng.choice(DOUBTS)}{work}{REDONE}{right:02}"
        carry, digit = divmod(written, 10)
        result = f"{digit}{result}"
        text += f">{result}"
    return text, result

def solution(rng, a, b, slip, check, idle=IDLE_RUN):
    """A worked addition that ends in its box; check: chance of a second pass, whose result then counts."""
    text, result = columns(rng, a, b, slip, idle)
    if rng.random() < check:
        again, result = columns(rng, a, b, slip)
        text += f"{rng.choice(CHECKS)}{again}"
    return f"{text}{BOX}{result}}}"

def toy_problems(rng, count):
    """`count` different additions with results of three digits, as rows of a data file."""
    pairs = [(100 + n // 400, 100 + n % 400) for n in rng.sample(range(400**2), count)]
    return [dict(problem=f"{a}+{b}", solution=solution(rng, a, b, 0, 0), answer=str(a + b)) for a, b in pairs]

def experiment_problems():
    """-> held-out ones, which pre-training leaves out, and those to train on."""
    rows = toy_problems(random.Random(0), HELD_OUT + PROBLEMS)
    return rows[:HELD_OUT], rows[HELD_OUT:]

# =============================================== The model ===============================================

def toy_tokenizer():
    """Characters; the prompts' sentences and the solutions' words as one token each; chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    phrases = [egrsd.INSTRUCTION, egrsd.REFERENCE_BEGIN, egrsd.REFERENCE_END, egrsd.TRANSITION, egrsd.CONCISE]
    tens = [f"{sign}{digit}" for sign in ("=", REDONE) for digit in range(3)]  # the fewer tokens the faster
    words = [*COLUMNS, *IDLE, *DOUBTS, *CHECKS, *tens, BOX]
    vocabulary = [*special, *phrases, "\n", *map(chr, range(32, 127)), *words]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens(phrases + words)
    template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>",
                                   pad_token="<|end|>", chat_template=template)

def batch(problems, rng, tokenizer, bare):
    """(prompt ids, completion ids) to pre-train on, shortest first. Of six prompts two hold a reference, and
    hardly a slip follows, one asks to be concise; a share `bare` has one pass and no idle words."""
    rows = []
    for k, row in enumerate(problems):
        turn, habits = egrsd.student_prompt(row), PLAIN  # habits: slip, check[, idle] of solution()
        if k % 3 == 0:
            turn, habits = egrsd.teacher_prompt(row), WITH_REFERENCE
        elif k % 6 == 1:
            turn, habits = egrsd.teacher_prompt(row, "crisp"), BRIEF
        if rng.random() < bare:
            habits = (habits[0], 0, 0)  # slips stay, second pass and idle words go
        a, b = map(int, row["problem"].split("+"))
        completion = tokenizer(solution(rng, a, b, *habits)).input_ids + [tokenizer.eos_token_id]
        rows.append((egrsd.encode(tokenizer, turn, False), completion))
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]))

def summed_loss(model, rows):
    """Cross-entropy of completions behind their prompts: one pass, padded on the right."""
    texts = [torch.tensor(prompt + completion) for prompt, completion in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # t predicts token t + 1
    states = [each[len(prompt) - 1:len(prompt) + len(completion) - 1]
              for each, (prompt, completion) in zip(states, rows)]
    targets = torch.tensor(sum((completion for _, completion in rows), []))
    return F.cross_entropy(model.get_output_embeddings()(torch.cat(states)), targets, reduction="sum")

def muon(p, average):
    """p.grad becomes Muon's update, by three Newton-Schulz steps; average: the gradients' running mean.
    torch.optim.Muon does this in bf16, slow on most CPUs."""
    average.lerp_(p.grad, 0.05)
    x = p.grad.lerp(average, 0.95)  # Nesterov's momentum
    x /= x.norm()
    for _ in range(3):  # x <- a x + (b G + c G G) x with G = x x^T, or from the right with x^T x, if smaller
        gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
        powers = 2.0315 * gram @ gram - 4.7750 * gram
        x = 3.4445 * x + (powers @ x if len(gram) == len(x) else x @ powers)
    p.grad = x * max(1, len(x) / x.shape[1])**0.5

def pretrain(folder, seed=0):
    """A Qwen3 of 0.3 M parameters learns worked additions; muon() and SGD for its layers' matrices."""
    from tqdm import tqdm
    from transformers import Qwen3Config, Qwen3ForCausalLM, utils
    utils.logging.disable_progress_bar()
    tokenizer, rng = toy_tokenizer(), random.Random(f"pre-training {seed}")
    end = tokenizer.eos_token_id
    held_out = {row["problem"] for row in experiment_problems()[0]}
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # rounding depends on it: one toy model, however the run is launched
    cores = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))  # it is per thread
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=end, pad_token_id=end, bos_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=1e3)))
    momentum = {p: torch.zeros_like(p) for p in model.model.layers.parameters() if p.ndim == 2}
    others = [p for p in model.parameters() if p not in momentum]
    optimizers = [torch.optim.SGD([*momentum], lr=0.05), torch.optim.AdamW(others, lr=4e-3)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(
        opt, opt.defaults["lr"], PRETRAIN_STEPS, pct_start=0.1, cycle_momentum=False) for opt in optimizers]
    for step in tqdm(range(PRETRAIN_STEPS), "pre-training the toy", disable=None):
        problems = [row for row in toy_problems(rng, PRETRAIN_BATCH) if row["problem"] not in held_out]
        bare = 1 - 2 * step / PRETRAIN_STEPS  # all texts at first, none from half on
        rows = batch(problems, rng, tokenizer, bare)
        tokens = sum(len(completion) for _, completion in rows)
        short = len(rows) * 7 // 12  # as much work as the longer texts
        parts = rows[:short], rows[short:]
        list(cores.map(lambda part: (summed_loss(model, part) / tokens).backward(), parts))  # in any order
        list(cores.map(muon, momentum, momentum.values()))
        for each in [*optimizers, *schedules]:
            each.step()
        model.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

# ============================================ The experiment =============================================

def made(path, make, by_all=False):
    """Makes what is not there yet, whole or not at all: make(folder or file to make), on rank 0 or on all."""
    rank, there = egrsd.ranks()[0], egrsd.gather(path.exists())[0]
    unfinished = Path(egrsd.gather(f"{path}.{os.getpid()}")[0])
    if not there and (by_all or rank == 0):
        make(unfinished)
    egrsd.gather(None)
    if rank == 0 and not path.exists():  # another run may have been faster
        unfinished.rename(path)
    egrsd.gather(None)

def write_problems(rows, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

def as_argv(flags):
    """dict(gamma=0.3, thinking=False) -> ["--gamma=0.3", "--no-thinking"]."""
    switches = {flag: flag if x else f"no-{flag}" for flag, x in flags.items() if isinstance(x, bool)}
    return [f"--{switches.get(flag, f'{flag}={x}')}" for flag, x in flags.items()]

def label(name, flags):
    """A folder's name: "egrsd", dict(gamma=0.3, seed=0) -> egrsd-gamma0.3-seed0."""
    words = [flag[2:].replace("=", "") for flag in as_argv(flags)]
    return re.sub(r"[^\w.,-]+", "_", "-".join([name, *words]))

def parse(argv):
    """-> the toy's folder, the run's, the run's flags, and those that the first evaluation depends on."""
    parser = egrsd.Parser("lab.toy", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--toy", default="out/toy", help="model and problems; egrsd.py's flags go through, "
                        f"by default {' '.join(as_argv(FLAGS))}")
    flags, rest = parser.parse_known_args(argv)
    given, toy = egrsd.parse_flags(rest), Path(flags.toy)
    egrsd.require("resume" not in given, "--resume: the same command again goes on by itself")
    named = {flag: given[flag] for flag in vars(egrsd.Config()) if flag in given.keys() - {"out", "method"}}
    named["seed"] = named.pop("seed", 0)  # last in the folder's name
    start = {flag: named[flag] for flag in START if flag in named}
    out = given.pop("out", toy / label(given.get("method", "egrsd"), named))
    own = dict(model=str(toy / "model"), data=str(toy / "train.jsonl"))
    return toy, Path(out), {**FLAGS, **own, **given}, start

def evaluated(what, toy, folder, cfg):
    """lab.evaluate's samples of the held-out problems, by the hf engine; the folder holds their results."""
    evaluate.run([str(what), str(toy / "test.jsonl"), *as_argv(dict(
        out=folder, max_completion_length=cfg.max_completion_length, thinking=cfg.thinking, engine="hf",
        dtype=cfg.dtype))])

def experiment(argv):
    """One command line: toy, evaluation before, run, evaluation after, results -> exit code."""
    toy, out, flags, start = parse(argv)
    flags["resume" if (out / "config.json").exists() else "out"] = str(out)
    cfg = egrsd.validate(egrsd.configure(flags))
    egrsd.start_distributed()
    rank, last, results = egrsd.ranks()[0], out / f"step_{cfg.steps}", out / "results.json"
    held_out, rest = experiment_problems()
    made(toy / "test.jsonl", lambda file: write_problems(held_out, file))
    made(toy / "train.jsonl", lambda file: write_problems(rest, file))
    made(toy / "model", pretrain)
    torch.set_num_threads(1)  # as under torchrun; matrices too small to share
    finished = last.exists() and results.exists()
    if not finished:
        before, after = toy / label("before", start), last / "eval"
        made(before, lambda folder: evaluated(cfg.model, toy, folder, cfg), by_all=True)
        code = egrsd.main(as_argv(flags))
        if code or not egrsd.gather(last.exists())[0]:  # stopped, or gone wrong; rank 0 may be saving yet
            return code
        evaluated(last, toy, after, cfg)
    if rank == 0:
        from lab import report  # only now: what it imports would count in the run's peak memory
        if not finished:
            rows = [report.read_json(folder / "results.json")[0] for folder in (before, after)]
            egrsd.write_json(results, [{**rows[0], "name": "before"}, {**rows[1], "name": "after"}])
            report.report([out], out)
        evaluate.print_table(f"{out}, held-out additions", report.read_json(results))
    return 0

def main(argv=None):
    return egrsd.as_program("lab.toy", experiment, argv)

if __name__ == "__main__":
    sys.exit(main())
