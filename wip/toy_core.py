"""The toy: 3-digit sums worked column by column, and a tiny Qwen3 that is trained on them from scratch.

The paper's three regimes exist by construction. Digits are locks. After each column one token decides: done, or doubt
it and work it again; after the last, box or check: pivots, uncertain and settled one token later. Every pass over the
columns opens with idle words that mean nothing: forks, uncertain again and again.
"""
import json
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from egrsd import CONCISE, INSTRUCTION, REFERENCE_BEGIN, REFERENCE_END, TRANSITION
from egrsd import encode, student_prompt, teacher_prompt

COLUMNS = ("ones", "tens", "hundreds")  # naming them lets two layers find the digits
IDLE = "and fine good hmm let look me now okay right see so then think well yes".split()
IDLE_RUN = 8  # words; always as many: a run of random length would be trained away by the length reward
DONE, DOUBTS = ". ", (", wait: ", ", no: ")  # after a column; two doubts, so that the decision is worth more nats
BOX, CHECKS = "\\boxed{", ("Check", "Again")  # after the last column

# How to solve: the chance of a slip in a column, of doubting it (what is worked again is right), of a check. Doubt is
# blind: it mends a slip, else it is needless. A check is always needless, as it slips no less.
PLAIN = dict(slip=0.4, doubt=0.4, check=0.6)
BRIEF = dict(slip=0.4, doubt=0.25, check=0.3)  # the prompt asks to be concise
INFORMED = dict(slip=0.02, doubt=0.3, check=0.35)  # the prompt holds a solution: this view really knows better
CLEAN = dict(slip=0, doubt=0, check=0)  # the solutions themselves

TRAIN_PROBLEMS, TEST_PROBLEMS = 4000, 128
STEPS, BATCH = 270, 24  # of the pre-training
INNER_LR, OUTER_LR = 0.02, 6e-3  # of the matrices; of embedding and norms

# what egrsd is run with, where it differs from egrsd's own defaults
TOY = dict(lr=2e-4, max_completion_length=192, max_length=512)

def work(rng, a, b, slip, doubt):
    """One pass over the columns, right to left -> text, the sum it comes to."""
    text, total, carry = "".join(f"{word} " for word in rng.choices(IDLE, k=IDLE_RUN)), 0, 0
    for k, column in enumerate(COLUMNS):
        x, y = a // 10**k % 10, b // 10**k % 10
        right = x + y + carry
        result = rng.choice((right + 1, abs(right - 1))) if rng.random() < slip else right
        while rng.random() < doubt:
            text += f"{column} {x}+{y}+{carry}={result}{rng.choice(DOUBTS)}"
            result = right
        text += f"{column} {x}+{y}+{carry}={result}{DONE}"
        carry = result // 10
        total += result % 10 * 10**k
    return text, total + carry * 10**len(COLUMNS)

def solve(rng, a, b, slip, doubt, check):
    """A worked sum that ends in its box."""
    text, total = work(rng, a, b, slip, doubt)
    if rng.random() < check:
        again, total = work(rng, a, b, slip, doubt)
        text += f"{rng.choice(CHECKS)}: {again}"
    return f"{text}{BOX}{total}}}"

def make_problems(rng, count):
    """`count` different sums as rows of the data."""
    pairs = [divmod(n, 900) for n in rng.sample(range(900**2), count)]
    pairs = [(100 + x, 100 + y) for x, y in pairs]
    return [dict(problem=f"{a}+{b}", solution=solve(rng, a, b, **CLEAN), answer=str(a + b)) for a, b in pairs]

def make_tokenizer():
    """A token for each word and decision above, each sentence of the prompts and each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
    sentences = [INSTRUCTION, REFERENCE_BEGIN, REFERENCE_END, TRANSITION, CONCISE]
    words = [*(f"{word} " for word in (*COLUMNS, *IDLE)), DONE, *DOUBTS, *CHECKS, ": ", BOX]
    vocabulary = [*special, *sentences, *words, "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens(sentences + words)
    template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>",
                                   pad_token="<|end|>", chat_template=template)

def make_model(tokenizer):
    """A Qwen3 of 0.3 M parameters, not trained."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    end = tokenizer.eos_token_id
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=end, pad_token_id=end, bos_token_id=None))

def make_batch(rng, tokenizer):
    """Token ids of prompts with a way to solve that fits, by length: of six three are plain, two hold a solution."""
    views = [(student_prompt, PLAIN)] * 3 + [(teacher_prompt, INFORMED)] * 2
    views += [(lambda row: teacher_prompt(row, "crisp"), BRIEF)]
    rows = []
    for k, row in enumerate(make_problems(rng, BATCH)):
        prompt, way = views[k % 6]
        text = solve(rng, *map(int, row["problem"].split("+")), **way)
        ids = encode(tokenizer, prompt(row), False) + tokenizer(text).input_ids + [tokenizer.eos_token_id]
        rows.append(torch.tensor(ids))
    return sorted(rows, key=len)

def orthogonalised(gradient):
    """Muon's update, by three Newton-Schulz steps; AdamW alone needs several times as long to learn to copy.
    torch.optim.Muon does them in bf16, on most CPUs 40 times slower."""
    x = gradient / gradient.norm()
    for _ in range(3):
        gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
        gram = 2.0315 * gram @ gram - 4.7750 * gram
        x = 3.4445 * x + (gram @ x if len(gram) == len(x) else x @ gram)
    return x * max(1, len(x) / x.shape[1])**0.5

def pretrain(model, tokenizer, rng):
    """Trains on all tokens, those of the prompts, too: the solution in a prompt is one more example."""
    from tqdm import tqdm
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    momentum = [torch.zeros_like(p) for p in inner]
    optimizers = [torch.optim.SGD(inner, INNER_LR), torch.optim.AdamW(outer, OUTER_LR)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(each, each.param_groups[0]["lr"], STEPS, pct_start=0.1,
                                                     cycle_momentum=False) for each in optimizers]
    for _ in tqdm(range(STEPS), "pre-training the toy", disable=None):
        rows = make_batch(rng, tokenizer)
        for part in rows[:BATCH // 2], rows[BATCH // 2:]:  # by length: less padding
            ids = pad_sequence(part, batch_first=True)
            targets = pad_sequence(part, batch_first=True, padding_value=-100)[:, 1:]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            (loss / sum(map(len, rows))).backward()
        for p, average in zip(inner, momentum):
            average.lerp_(p.grad, 0.05)
            p.grad = orthogonalised(p.grad.lerp(average, 0.95))
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()

def make_toy(folder, seed=0):
    """Writes folder/model, train.jsonl and test.jsonl, whole or not at all."""
    from transformers import utils
    utils.logging.disable_progress_bar()
    folder, unfinished = Path(folder), Path(f"{folder}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    rng, tokenizer = random.Random(seed), make_tokenizer()
    problems = make_problems(rng, TRAIN_PROBLEMS + TEST_PROBLEMS)
    torch.manual_seed(seed)
    model, threads = make_model(tokenizer), torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it: one toy for everybody, however it is launched
    pretrain(model, tokenizer, rng)
    torch.set_num_threads(threads)
    model.save_pretrained(unfinished / "model")
    tokenizer.save_pretrained(unfinished / "model")
    for name, part in dict(train=problems[TEST_PROBLEMS:], test=problems[:TEST_PROBLEMS]).items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (unfinished / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    unfinished.rename(folder)
