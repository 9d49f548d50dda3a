"""Tests of egrsd.py: the maths against slow loops, the loop from outside, ranks, resume, faults, user errors.

The tiny model is a real Qwen3ForCausalLM with random weights. It earns no reward, so its runs get one that
varies in place of egrsd.grade. Most runs are egrsd.main in this very process; where a process has to die or
two ranks have to meet, they are forked from one that holds the libraries. lab/ has tests of its own.

    python -m pytest -q -n 2 --dist loadgroup test_egrsd.py     # under 3 minutes on two cores
    python -m pytest -q -n 2 -m slow test_egrsd.py              # kill -9 over 60 saves; 1,000 steps
"""
import copy, hashlib, importlib.util, json, math, multiprocessing, os, random, re, resource, shutil, signal, socket
import shlex, subprocess, sys, tempfile, time, types, warnings
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).parent
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
                  PYTHONPATH=str(HERE))

import hypothesis, pytest, torch
import hypothesis.strategies as st
import torch.distributed as dist
import torch.nn.functional as F
import egrsd

torch.set_num_threads(1)
CPU, VLLM = torch.device("cpu"), importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not VLLM, reason="vllm is not installed")

def only_with(name):
    """A mark whose tests run with -m NAME only; else they are skipped before any fixture is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no file to register marks in
        mark = getattr(pytest.mark, name)
    skip = pytest.mark.skipif(f"'{name}' not in config.option.markexpr", reason=f"only with -m {name}")
    return lambda test: mark(skip(test))

slow, gpu = map(only_with, ("slow", "gpu"))

def close(ours, theirs, atol):
    """Two tensors or lists agree; if not, the two numbers furthest apart are printed."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach().flatten() for x in (ours, theirs))
    assert ours.shape == theirs.shape
    if len(ours):
        worst = (ours - theirs).abs().nan_to_num(math.inf).argmax()
        assert abs(ours[worst] - theirs[worst]) <= atol, (ours[worst].item(), theirs[worst].item())

# ---------------------------------------------------------------------------------- the method, in slow loops

def test_lookahead_and_gate_agree_with_slow_loops_for_every_window_and_stay_between_floor_and_one():
    by_hand = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert egrsd.lookahead_min(by_hand, 1).tolist() == [1.0, 1.0, 0.5, 0.5]
    for length in (0, 1, 2, 7, 50):
        entropy = 6 * torch.rand(length, generator=torch.Generator().manual_seed(length))
        for window in (0, 1, 3, 6, 7, 100):
            lowest = [min(entropy[t:t + window + 1].tolist()) for t in range(length)]
            assert egrsd.lookahead_min(entropy, window).tolist() == lowest, (length, window)
            for gamma, h_max in ((0.3, 6.0), (1.0, 6.0), (0.95, 7.5), (1.0, 0.2), (5.0, 3.0)):
                slow_twin = [min(1.0, max(0.1, 1 - gamma * h / max(h_max, 1.0))) for h in lowest]
                close(egrsd.confidence_gate(entropy, h_max, gamma, window), slow_twin, 1e-6)
    for h, h_max, gamma, omega in ((2.0, 2.0, 1.0, 0.1), (0.0, 2.0, 1.0, 1.0), (0.5, 0.5, 0.3, 0.85)):
        close(egrsd.confidence_gate(torch.tensor([h]), h_max, gamma), [omega], 1e-6)  # floor, ceiling, 1 nat

def test_magnitude_agrees_with_a_slow_loop_in_both_directions():
    delta = torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0])
    for direction in (-1, 0, 1):
        slow_twin = [min(1.2, max(0.8, math.exp(direction * d))) for d in delta.tolist()]
        close(egrsd.magnitude(delta, direction), slow_twin, 1e-6)
    close(egrsd.magnitude(torch.tensor([0.1]), 1), [1.10517], 1e-5)  # by hand
    assert egrsd.magnitude(delta, 1, 0).tolist() == [1.0] * 5  # a clip of 0 is no magnitude

def test_reward_falls_linearly_with_length_and_is_0_when_wrong():
    cases = (True, 0, 0.5), (True, 256, 0.5), (True, 1024, 0.5), (False, 10, 0.5), (True, 256, 0.0)
    rewards = [egrsd.length_shaped_reward(correct, length, 1024, beta) for correct, length, beta in cases]
    assert rewards == [1.5, 1.375, 1.0, 0.0, 1.0]

def test_welford_equals_torch_in_one_shot_and_in_chunks_and_survives_a_round_trip():
    values = torch.tensor([0.0, 1.5, 1.25, 0.0, 1e6, 1e6 + 1, 3.0], dtype=torch.float64)
    whole, chunks, again = egrsd.Welford(), egrsd.Welford(), egrsd.Welford()
    assert (whole.count, whole.mean, whole.std) == (0, 0.0, 0.0)
    whole.update(values)
    chunks.update(values[:1])
    assert (chunks.count, chunks.mean, chunks.std) == (1, 0.0, 0.0)
    chunks.update(values[1:3].tolist())
    again.load_state_dict(json.loads(json.dumps(chunks.state_dict())))
    again.update(values[3:])
    for stats in (whole, again):
        expected = 7, values.mean().item(), values.std().item()
        assert (stats.count, stats.mean, stats.std) == pytest.approx(expected, rel=1e-14)

def test_advantages_follow_equation_9_the_warm_up_the_floor_and_the_group():
    stats, equal = egrsd.Welford(), egrsd.Welford()
    rewards = torch.tensor([0.0, 1.2], dtype=torch.float64)
    close(egrsd.running_advantage(rewards, stats, True), [-0.5, 0.7], 1e-12)
    stats.update([1.0, 2.0, 3.0])
    close(egrsd.running_advantage(rewards, stats, False), [-2.0, -0.8], 1e-12)
    equal.update([0.0] * 50)
    close(egrsd.running_advantage(rewards, equal, False), [0.0, 12.0], 1e-12)  # D2, not infinite
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    groups = egrsd.group_advantage(torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64), 2)
    close(groups, [-expected, expected, 0.0, 0.0], 1e-12)

# --------------------------------------------------------------------------- log p, divergences and gradients

def random_head(length):
    """Student's and teacher's hidden states (T, 16), a head (50, 16), targets (T,), a weight a token."""
    torch.manual_seed(length)
    hidden, teacher, head = (torch.randn(n, 16, dtype=torch.float64) for n in (length, length, 50))
    return hidden, teacher, head, torch.randint(50, (length,)), torch.randn(length, dtype=torch.float64)

def naive(hidden, head, targets):
    """The formula as one writes it: log p over the vocabulary, log p(y_t), entropy."""
    log_p = (hidden @ head.T).log_softmax(-1)
    return log_p, log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

@pytest.mark.parametrize("length", [0, 1, 511, 512, 1300])
@pytest.mark.parametrize("clip", [0, 0.02])
@pytest.mark.parametrize("method", ["", "opsd", "crisp"])
def test_value_entropy_and_gradient_equal_the_full_logits_formula(method, clip, length):
    hidden, teacher, head, targets, weights = random_head(length)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    divergence = egrsd.DIVERGENCE.get(method)  # none: the value is log p, and nothing is clipped
    value, logp, entropy = egrsd.head_terms(ours, head, targets, teacher, divergence, clip)
    log_p, expected, naive_entropy = naive(theirs, head, targets)
    log_q = naive(teacher, head, targets)[0]
    close(logp, expected, 1e-12)
    close(entropy, naive_entropy, 1e-12)
    assert not logp.requires_grad and not entropy.requires_grad
    if method:
        one, other = (log_p, log_q) if method == "opsd" else (log_q, log_p)  # kl_div(a, b) is KL(b || a)
        entries = F.kl_div(one, other, reduction="none", log_target=True)
        assert not clip or length < 2 or 0.01 < (entries > clip).double().mean() < 0.99
        expected = entries.clamp(max=clip or math.inf).sum(-1)
    close(value, expected, 1e-12)
    (weights * value).sum().backward()
    (weights * expected).sum().backward()
    close(ours.grad, theirs.grad, 1e-12)
    if length == 1300 and not clip:  # in float32, as it runs; what is clipped may differ by rounding
        half = hidden.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):  # which does not reach it
            value = egrsd.head_terms(half, head.float(), targets, teacher.float(), divergence)[0]
        (weights.float() * value).sum().backward()
        close(half.grad, theirs.grad, 1e-5 * max(1.0, theirs.grad.abs().max().item()))
    at_2 = egrsd.head_terms(hidden, head, targets, temperature=2)[0]
    close(at_2, naive(hidden / 2, head, targets)[1], 1e-12)

def test_logits_of_no_more_than_a_chunk_of_tokens_exist_at_a_time(monkeypatch):
    seen, real = [], egrsd.log_probs
    monkeypatch.setattr(egrsd, "log_probs", lambda *a: seen.append(len(a[0])) or real(*a))
    hidden, _, head, targets, _ = random_head(1300)
    egrsd.logp_and_entropy(hidden, head, targets)
    assert seen == [512, 512, 276]

def test_finite_differences_confirm_all_gradients():
    hidden, teacher, head, targets, _ = random_head(5)
    for divergence in (None, *egrsd.DIVERGENCE.values()):
        assert torch.autograd.gradcheck(
            lambda h: egrsd.head_terms(h, head, targets, teacher, divergence)[0], hidden.requires_grad_())

@pytest.mark.parametrize("p, logit", [(0.9, 10.7), (0.99, 13.6), (0.999, 16.6)])
def test_bf16_gradient_stays_close_to_float64_for_confident_tokens(p, logit):
    torch.manual_seed(5)
    head, targets = (torch.randn(2000, 64) / 8).bfloat16(), torch.randint(2000, (16,))
    along = head[targets].float()  # with such states the target has this logit, and so about probability p
    hidden = (logit * along / along.square().sum(1, keepdim=True)).bfloat16()
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    logp, entropy = egrsd.logp_and_entropy(ours, head, targets)
    _, exact_logp, exact_entropy = naive(exact, head.double(), targets)
    assert 0.3 * (1 - p) < (1 - exact_logp.exp()).mean().item() < 3 * (1 - p)
    assert logp.dtype == torch.float32
    close(logp, exact_logp, 1e-5)
    close(entropy, exact_entropy, 1e-4)
    logp.sum().backward()
    exact_logp.sum().backward()
    error = (ours.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.max() < 0.05, error.max()

# -------------------------------------------------------------------------- a tiny real model, and runs of it

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>"
            "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}")
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
             num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=3,
             initializer_range=0.3, pad_token_id=None, bos_token_id=None)
SPECIAL = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
ENDS = [3, *range(40, 46)]

def make_tokenizer(template=TEMPLATE):
    """A token a character; the sentences of the prompts are one each, so that prompts stay short."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    sentences = [getattr(egrsd, name) for name in
                 ("INSTRUCTION", "REFERENCE_BEGIN", "REFERENCE_END", "TRANSITION", "CONCISE")]
    words = [*SPECIAL, *sentences, "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    core.add_tokens(sentences)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>",
                                   pad_token="<|end|>", chat_template=template)

def make_model(path, kind="Qwen3", seed=7, template=TEMPLATE, **changes):
    """A random model of one of transformers' kinds, with seven end tokens, so that lengths are uneven."""
    import transformers
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(path)
    head = dict(T5="ForConditionalGeneration", GPT2="LMHeadModel").get(kind, "ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "vocab_size": len(tokenizer), **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, kind + head)(config)
    model.generation_config.eos_token_id = ENDS
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.7)  # must not be inherited
    model.save_pretrained(path)
    return path

def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")

@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """Forty GSM8K-like rows of uneven length."""
    rng, rows = random.Random(0), []
    for _ in range(40):
        a, b, story = rng.randrange(100), rng.randrange(100), "Tom counts his stamps. " * rng.randrange(4)
        rows.append(dict(question=f"{story}What is {a} plus {b}?", answer=f"{a}+{b}={a + b}\n#### {a + b}"))
    return write_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)

@pytest.fixture(scope="session")
def small(tiny, problems):
    """The flags of a 12-step run whose warm-up ends after step 4; a step takes several passes."""
    flags = ("--engine hf --batch_size 8 --steps 12 --warmup_steps 4 --save_every 1 "
             "--max_completion_length 24 --lora_rank 4 --lr 2e-3 --gamma 0.8 --window 2 --micro_batch 3")
    return ["--model", str(tiny), "--data", str(problems), *flags.split()]

def varies(completion, gold):
    """A reward that varies, for a model that earns none."""
    return sum(map(ord, completion)) % 2 == 0

def train(*flags, program=egrsd, **patches):
    """egrsd.main in this process, with that reward and further replacements in egrsd -> exit code."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"grade": varies, **patches}.items():
            patch.setattr(program, name, value)
        return program.main([*map(str, flags)])

def trained(*flags, **patches):
    """The same, which must succeed -> the run's folder."""
    assert train(*flags, **patches) == 0
    return Path(flags[flags.index("--out" if "--out" in flags else "--resume") + 1])

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch", "transformers.models.qwen3.modeling_qwen3", "transformers.generation",
                              "peft", *["vllm"] * VLLM])
FORKED = """
import os, runpy, sys
os.environ.update({env!r})
sys.argv = {argv!r}
for fd in 1, 2:
    os.dup2(os.open("{log}." + str(fd), os.O_WRONLY | os.O_APPEND), fd)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DRIVER = """
import os, signal, sys, time, egrsd
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
egrsd.grade = lambda completion, gold: sum(map(ord, completion)) % 2 == 0
def hang():  # in slices: a signal that comes just before a long sleep would be seen after it
    for _ in range(600):
        time.sleep(0.1)
{patch}
sys.exit(egrsd.main())
"""

class Forked:
    """The command in processes forked from one that holds the libraries, which take longer to import than
    most of these runs. `patch` are lines that run before main; further arguments are environment."""
    def __init__(self, *flags, ranks=1, patch="", driver=DRIVER, **env):
        self.log, self.processes = tempfile.mktemp(), []
        for name, text in (("py", driver.replace("{patch}", patch)), ("1", ""), ("2", "")):
            Path(f"{self.log}.{name}").write_text(text)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks))
        for rank in range(ranks):
            env.update(RANK=str(rank), LOCAL_RANK=str(rank))
            code = FORKED.format(argv=[f"{self.log}.py", *map(str, flags)], env=env, log=self.log)
            self.processes.append(forks.Process(target=exec, args=(code, {})))
            self.processes[-1].start()

    out, err = (property(lambda self, fd=fd: Path(f"{self.log}.{fd}").read_text()) for fd in (1, 2))

    def kill(self, number, processes=slice(None)):
        for process in self.processes[processes]:
            os.kill(process.pid, number)

    def until(self, condition, timeout=120):
        end = time.perf_counter() + timeout
        while not condition():
            alive = all(process.is_alive() for process in self.processes)
            assert alive and time.perf_counter() < end, self.err
            time.sleep(0.01)

    def wait(self, timeout=120):
        """-> exit codes; what does not end is killed, and the test fails."""
        end = time.perf_counter() + timeout
        for process in self.processes:
            process.join(max(0, end - time.perf_counter()))
            if process.is_alive():
                self.kill(signal.SIGKILL)
                raise TimeoutError(self.err)
        return [process.exitcode for process in self.processes]

def forked(*flags, **options):
    """The same, which must succeed."""
    run = Forked(*flags, **options)
    assert not any(run.wait()), run.err[-3000:]
    return run

@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The folder of that 12-step run, uninterrupted, on one rank."""
    return trained(*small, "--out", tmp_path_factory.mktemp("runs") / "whole")

def reproducible(folder):
    """metrics.jsonl without times, rates and memory."""
    return [{name: x for name, x in row.items() if not name.endswith(("_s", "tok/s", "_gib"))}
            for row in read(folder / "metrics.jsonl")]

def adapter(snapshot):
    from safetensors.torch import load_file
    return load_file(snapshot / "adapter_model.safetensors")

def newest(folder):
    return egrsd.snapshots(folder)[-1].name

def same_run(one, two, step):
    """Metrics, rollouts and the adapter of a step are the same bit for bit."""
    assert reproducible(one) == reproducible(two)
    assert read(one / "rollouts.jsonl") == read(two / "rollouts.jsonl")
    left, right = adapter(one / f"step_{step}"), adapter(two / f"step_{step}")
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]

def log_probs(model, prompt, ids):
    """By the model as it is: log p over the vocabulary at each token behind a prompt, (T, V)."""
    return model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1:-1].log_softmax(-1)

def lora_model(tiny, **settings):
    """The trainer's model with an adapter that does something."""
    model = egrsd.load_model(egrsd.Config(model=str(tiny), lora_rank=4, **settings), CPU)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)
    return model

# ----------------------------------------------------------------------- loss and gradient on the whole model

@pytest.mark.parametrize("method", [*egrsd.TOKEN_WEIGHT, "clipped", "lookahead"])
def test_loss_and_gradient_of_each_method_equal_a_slow_twin_on_the_whole_model(tiny, method):
    """The twin's weights are plain numbers: nothing flows through teacher, gate, magnitude or advantage."""
    flags = dict(clipped=dict(method="opsd", kl_clip=0.02), lookahead=dict(gamma=0.9, window=1))
    cfg = egrsd.Config(micro_batch=2, **flags.get(method, dict(method=method)))
    model = lora_model(tiny)
    rollouts = [egrsd.Rollout(i, {}, [5, 6, 7], [5, 6, 8, 9, 7], [20 + i, 30, 40, 50][:3 - i], advantage=a,
                              sampler_logp=torch.zeros(3 - i)) for i, a in enumerate((0.8, -0.4, 0.0))]

    h_max = egrsd.teach(model, rollouts, cfg) if method != "sft" else 0.0
    assert all(p.grad is None for p in model.parameters())
    loss = egrsd.learn(model, rollouts, cfg, h_max, 7)
    assert all(r.teacher_hidden is None for r in rollouts)  # or they would travel to every rank
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    model.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        teacher = [log_probs(model, r.teacher_ids, r.completion_ids) for r in rollouts]
    twin = 0
    for r, log_q in zip(rollouts, teacher):
        log_p = log_probs(model, r.prompt_ids, r.completion_ids)
        ahead, own = ((-each.exp() * each).sum(-1).tolist() for each in (log_q, log_p))  # entropies
        tau = torch.tensor(own).quantile(0.8).item()
        scale = max(sum(abs(h - tau) for h in own) / len(own), 1e-6)
        if method in ("opsd", "clipped"):
            entries = F.kl_div(log_p, log_q, reduction="none", log_target=True)
            twin = twin + entries.clamp(max=0.02 if method == "clipped" else math.inf).sum() / 7
        elif method == "crisp":
            twin = twin + F.kl_div(log_q, log_p, reduction="sum", log_target=True) / 7
        elif method == "sft":
            twin = twin + F.nll_loss(log_p, torch.tensor(r.completion_ids), reduction="sum") / 7
        else:
            for t, token in enumerate(r.completion_ids):
                delta = (log_q[t, token] - log_p[t, token]).item()
                w = min(1.2, max(0.8, math.exp(math.copysign(bool(r.advantage), r.advantage) * delta)))
                omega = max(0.1, 1 - cfg.gamma * min(ahead[t:t + cfg.window + 1]) / max(h_max, 1.0))
                routed = 0.1 * math.tanh((tau - own[t]) / scale) * math.tanh(delta)
                weight = dict(grpo=r.advantage, rlsd=r.advantage * w, dasd=r.advantage + routed)
                twin = twin - weight.get(method, r.advantage * w * omega) * log_p[t, token] / 7
    twin.backward()
    assert loss == pytest.approx(twin.item(), abs=1e-5)
    for name, p in model.named_parameters():
        if name in ours:
            close(ours[name], p.grad, 1e-5)

def test_a_following_teacher_starts_as_the_student_and_moves_as_far_as_it_is_told(tiny):
    cfg = egrsd.Config(model=str(tiny), lora_rank=4, teacher="ema")
    model = egrsd.load_model(cfg, CPU)
    student, teacher = egrsd.adapter_params(model, "default"), egrsd.adapter_params(model, "teacher")
    assert student.keys() == teacher.keys() and len(student) == 28
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    for p in student.values():
        p.data.normal_(std=0.1)
    r = egrsd.Rollout(0, {}, [5, 6, 7], [5, 6, 7], [20, 30, 40], advantage=1.0,  # a teacher without privilege
                      sampler_logp=torch.zeros(3))

    def delta():
        egrsd.learn(model, [r], cfg, egrsd.teach(model, [r], cfg), 3)
        return r.delta.abs().max().item()

    assert delta() > 1e-2
    assert all(p.grad is None for p in teacher.values()) and all(p.grad is not None for p in student.values())
    before = {name: p.clone() for name, p in teacher.items()}
    egrsd.follow(model, 0.25)
    for name, p in teacher.items():
        close(p, 0.75 * before[name] + 0.25 * student[name], 1e-6)
    egrsd.follow(model, 1.0)
    assert delta() < 1e-5

def test_dropout_in_a_config_is_off_and_checkpointed_activations_change_nothing(tiny, tmp_path):
    dropout, gradients = make_model(tmp_path / "model", attention_dropout=0.5), []
    for path, checkpoint in ((tiny, False), (dropout, False), (dropout, True)):  # of the same weights
        cfg = egrsd.Config(model=str(path), lora_rank=4, method="sft", grad_checkpoint=checkpoint)
        model, calls = egrsd.load_model(cfg, CPU), []
        model.get_base_model().model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        egrsd.learn(model, [egrsd.Rollout(0, {}, [5, 6, 7], [], [20, 30, 40, 50])], cfg, 0.0, 4)
        assert len(calls) == 1 + checkpoint  # recomputed
        names = [name for name, _ in model.named_parameters() if "lora_B" in name]
        gradients.append(torch.cat([model.get_parameter(name).grad.flatten() for name in names]))
    close(gradients[0], gradients[1], 1e-7)
    close(gradients[0], gradients[2], 1e-7)

# ------------------------------------------------------------------------------------- the loop, from outside

@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_step_recomputed_from_outside_with_plain_transformers_and_peft(step, whole, tiny):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Qwen3ForCausalLM
    base, student = (Qwen3ForCausalLM.from_pretrained(tiny) for _ in range(2))
    if step == 1:
        torch.manual_seed(0)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        student = get_peft_model(student, LoraConfig(
            r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    else:
        student = PeftModel.from_pretrained(student, whole / f"step_{step - 1}", is_trainable=True)
    rows, logged = read(whole / "rollouts.jsonl"), read(whole / "metrics.jsonl")[step - 1]
    rollouts = [r for r in rows if r["step"] == step]
    earlier = torch.tensor([r["reward"] for r in rows if r["step"] < step], dtype=torch.float64)

    with torch.no_grad():
        teacher = [log_probs(base, r["teacher_ids"], r["completion_ids"]) for r in rollouts]
    learner = [log_probs(student, r["prompt_ids"], r["completion_ids"]) for r in rollouts]
    entropy = [(-log_p.exp() * log_p).sum(-1).tolist() for log_p in teacher]
    h_max, tokens, loss, omegas, clipped = max(map(max, entropy)), sum(map(len, entropy)), 0.0, [], 0
    for i, r in enumerate(rollouts):
        reward = varies(r["completion"], "") * (1 + 0.5 * (1 - len(r["completion_ids"]) / 24))
        advantage = reward - 0.5
        if step > 4:
            advantage = (reward - earlier.mean().item()) / max(earlier.std().item(), 0.1)
        assert (r["reward"], r["advantage"]) == pytest.approx((reward, advantage), abs=1e-9)
        deltas = [(teacher[i][t, y] - learner[i][t, y]).item() for t, y in enumerate(r["completion_ids"])]
        own = -(learner[i].exp() * learner[i]).sum(-1)
        for name, values in (("teacher_entropy", entropy[i]), ("student_entropy", own), ("delta", deltas)):
            close(r[name], values, 2e-3)  # four digits
        for t, y in enumerate(r["completion_ids"]):
            ratio = math.exp((1 if advantage > 0 else -1) * deltas[t])
            clipped += not 0.8 < ratio < 1.2
            omegas.append(min(1.0, max(0.1, 1 - 0.8 * min(entropy[i][t:t + 3]) / max(h_max, 1.0))))
            loss = loss - advantage * min(1.2, max(0.8, ratio)) * omegas[-1] * learner[i][t, y] / tokens
    loss.backward()
    params = [p for p in student.parameters() if p.requires_grad]
    expected = dict(tokens=tokens, h_max=h_max, omega=sum(omegas) / tokens, loss=loss.item(), lr=2e-3,
                    grad_norm=math.sqrt(sum(p.grad.norm().item() ** 2 for p in params)),
                    w_clipped=clipped / tokens, length=tokens / 8, skipped=0)
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert len({len(r["completion_ids"]) for r in rollouts}) > 2  # else this shows little
    # the update: the gradient down to norm 0.1, then AdamW as the stored state has it
    optimizer = torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.0)
    if step > 1:
        stored = torch.load(whole / f"step_{step - 1}" / "trainer.pt", weights_only=True)["optimizer"]
        optimizer.load_state_dict(stored)
        group = stored["param_groups"][0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-3, (0.9, 0.999), 0.0)
    torch.nn.utils.clip_grad_norm_(params, 0.1)
    optimizer.step()
    updated = adapter(whole / f"step_{step}")
    for name, p in student.named_parameters():
        if p.requires_grad:  # Adam's first step is a sign, and a gradient near 0 has any
            sure = p.grad.abs() > (1e-6 if step == 1 else -1)
            close(p[sure], updated[name.replace(".default", "")][sure], 2e-6)

def transformers_sample(model, prompt, seed, limit, temperature, top_p, top_k):
    """transformers' own generate, its warpers and the rollout's noise, one prompt at a time: no padding."""
    from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    generator = torch.Generator().manual_seed(seed)

    def gumbel(ids, scores):  # the largest then is a sample
        return scores - torch.empty_like(scores[0]).exponential_(generator=generator).log()

    warpers = TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k or 10**9), TopPLogitsWarper(top_p)
    model.generation_config = GenerationConfig()
    ids = model.generate(torch.tensor([prompt]), logits_processor=[*warpers, gumbel], do_sample=False,
                         max_new_tokens=limit, eos_token_id=ENDS, pad_token_id=0)
    return ids[0, len(prompt):].tolist()

def test_every_rollout_of_a_step_is_what_transformers_generate_draws_from_the_last_snapshot(whole, tiny):
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM
    model = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(tiny), whole / "step_4").eval()
    rollouts = [r for r in read(whole / "rollouts.jsonl") if r["step"] == 5]
    assert [r["index"] for r in rollouts] == list(range(8))
    assert len({len(r["prompt_ids"]) for r in rollouts}) > 1  # padded on the left, then
    for r in rollouts:
        seed = egrsd.rollout_seed(0, 5, r["index"])
        drawn = transformers_sample(model, r["prompt_ids"], seed, 24, temperature=1.1, top_p=0.95, top_k=20)
        assert r["completion_ids"] == drawn, r["index"]  # its end token, the first, included: D12
        assert r["truncated"] == (drawn[-1] not in ENDS)

@pytest.mark.parametrize("setting", [(1.0, 0.95, 0), (0.7, 1.0, 5), (1.3, 0.5, 3), (1.0, 1.0, 1)])
def test_the_hf_engine_draws_what_transformers_generate_draws_at_any_setting(setting, tiny):
    """temperature, top_p, top_k"""
    model, prompts, seeds = lora_model(tiny), [[5, 6, 7], [9] * 20, [11]], [1, 2, 3]
    engine = egrsd.HfEngine(model, ENDS)
    engine.sync(model, 1)
    drawn = {i: (ids, logp) for i, ids, logp in engine.generate(prompts, seeds, 16, *setting)}
    for i, prompt in enumerate(prompts):
        ids, logp = drawn[i]
        assert ids == transformers_sample(model, prompt, seeds[i], 16, *setting)
        with torch.no_grad():
            log_p = log_probs(model, prompt, ids)
        close(logp, log_p.gather(1, torch.tensor(ids)[:, None]), 1e-4)  # raw: at temperature 1, unfiltered

def test_seeds_and_prompts_stay_what_they_were():
    """As in the first version (e310423), so that runs of then and now can be compared token for token."""
    seeds = {egrsd.rollout_seed(seed, step, i) for seed in range(3) for step in range(50) for i in range(32)}
    assert len(seeds) == 3 * 50 * 32 and egrsd.rollout_seed(0, 1, 2) == 50402195975666066
    row = dict(problem="What is 1+1?", solution="It is \\boxed{2}.", gold="2")
    texts = egrsd.student_prompt(row), egrsd.teacher_prompt(row), egrsd.teacher_prompt(row, "crisp")
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    assert hashes == ["e4793e1f48fe0cec", "3c6d8c086ba02d16", "d9d8461b19e18090"]
    for method in egrsd.TOKEN_WEIGHT:  # only crisp hides the solution and asks to be concise
        prompt = egrsd.teacher_prompt(row, method)
        assert (row["solution"] in prompt) == (method != "crisp") == (egrsd.CONCISE not in prompt)

# ----------------------------------------------------------- every method and schedule: two ranks, and resume

SETTINGS = {  # the flags of three-step runs; the last four are compared with others only
    **{method: f"--method {method}" for method in egrsd.TOKEN_WEIGHT},
    "ema": "--teacher ema", "copy": "--teacher copy --teacher_every 2",
    "crisp copy": "--method crisp --teacher copy --teacher_every 2",
    "grouped": "--method grpo --rollouts_per_prompt 4 --length_bonus 0.9 --batch_size 12 --magnitude_clip 0",
    "clipped": "--method opsd --kl_clip 0.01", "linear": "--lr_schedule linear",
    "checkpointed": "--grad_checkpoint", "bfloat16": "--dtype bfloat16",
    "thinking teacher": "--teacher_thinking on", "ema 0": "--teacher ema --teacher_decay 0",
    "ema 1": "--teacher ema --teacher_decay 1", "copy 1": "--teacher copy --teacher_every 1",
    "gamma 0": "--gamma 0"}
COMPARED = list(SETTINGS)[:-4]
THREE = "--steps 3 --warmup_steps 1 --save_every 2 --max_completion_length 12".split()
MANY = DRIVER.replace("sys.exit(egrsd.main())", """
import json
egrsd.start_distributed()  # main joins this group, run after run, and leaves it
for flags in json.load(open(sys.argv[1])):
    assert egrsd.main(flags) == 0 and egrsd.dist.is_initialized(), flags
""")

def made_once(name):
    """A session fixture whose tests xdist keeps on one worker, so that it is not made twice."""
    return pytest.fixture(scope="session", params=[pytest.param(name, marks=pytest.mark.xdist_group(name))])

@made_once("many")
def many(small, tmp_path_factory):
    """Runs of all settings: on one rank (`one`), these resumed after step 2 (`cut`), on two ranks (`two`)."""
    base = tmp_path_factory.mktemp("many")

    def flags(kind, name):
        return [*small, *THREE, *SETTINGS[name].split(), "--out", f"{base}/{kind}/{name}"]

    (base / "plan.json").write_text(json.dumps([flags("two", name) for name in COMPARED]))
    two = Forked(base / "plan.json", ranks=2, driver=MANY)
    for name in SETTINGS:
        trained(*flags("one", name))
    for name in COMPARED:
        shutil.copytree(base / "one" / name, base / "cut" / name)
        shutil.rmtree(base / "cut" / name / "step_3")
        trained("--resume", base / "cut" / name)
    assert two.wait() == [0, 0], two.err[-3000:]
    return base

@pytest.mark.parametrize("setting", COMPARED)
def test_every_method_and_schedule_gives_the_same_after_a_resume_and_on_two_ranks(setting, many):
    one, cut, two = (many / kind / setting for kind in ("one", "cut", "two"))
    same_run(one, cut, 3)
    weights, others = adapter(one / "step_3"), adapter(two / "step_3")
    assert len(weights) == 28 and not [name for name in weights if "teacher" in name]
    assert not [name for name, x in weights.items() if "lora_B" in name and not x.any()]  # all have moved
    exact = setting != "bfloat16"  # whose kernels depend on the batch: another share, another sample
    for a, b in zip(reproducible(one), reproducible(two), strict=True):
        assert a.keys() == b.keys() and a["skipped"] == b["skipped"] == 0
        assert max(row.get("engine_gap_mean", 0) for row in (a, b)) < (1e-5 if exact else 0.1)
        for name in a.keys() - {"engine_gap_mean", "engine_gap_p95", "engine_gap_max"}:
            assert not exact or a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    if exact:
        rows = [read(run / "rollouts.jsonl") for run in (one, two)]
        assert [row["completion_ids"] for row in rows[0]] == [row["completion_ids"] for row in rows[1]]
        for name in weights:
            close(weights[name], others[name], 1e-4)

def test_limits_of_schedules_and_gate_are_exact(many):
    metrics = {name: reproducible(many / "one" / name) for name in SETTINGS}
    assert metrics["ema 0"] == metrics["copy 1"]
    assert metrics["ema 1"] == metrics["egrsd"] == metrics["checkpointed"]
    for a, b in zip(metrics["gamma 0"], metrics["rlsd"], strict=True):  # omega is logged for rlsd, not used
        assert {**a, "omega": b["omega"]} == b
    left, right = (adapter(many / "one" / name / "step_3") for name in ("gamma 0", "rlsd"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    differing = [str([m["delta_abs"] for m in metrics[name]]) for name in ("egrsd", "copy 1", "copy", "ema")]
    assert len(set(differing)) == 4
    assert metrics["copy"][:2] == metrics["egrsd"][:2]  # copied behind step 2
    assert metrics["clipped"][0]["loss"] < metrics["opsd"][0]["loss"]
    close([m["lr"] for m in metrics["linear"]], [2e-3, 2e-3 * 2 / 3, 2e-3 / 3], 1e-12)  # down to lr / steps
    assert {m["lr"] for m in metrics["egrsd"]} == {2e-3}

def test_sft_trains_on_the_reference_solution_and_logs_nothing_it_has_not_measured(many):
    rows, metrics = read(many / "one" / "sft" / "rollouts.jsonl"), reproducible(many / "one" / "sft")
    assert all(row["completion"].endswith(row["gold"]) and row["completion"].strip() for row in rows)
    assert all(row["completion_ids"][-1] == 3 and len(row["completion_ids"]) > 3 for row in rows)
    assert not {"reward", "correct", "advantage", "truncated", "teacher_entropy", "delta"} & rows[0].keys()
    assert metrics[0].keys() == set("step length tokens loss grad_norm lr skipped too_long".split())
    assert metrics[0]["tokens"] == sum(len(row["completion_ids"]) for row in rows if row["step"] == 1)

def test_grpo_groups_are_neighbours_of_one_problem_also_across_ranks(many):
    rows = read(many / "two" / "grouped" / "rollouts.jsonl")
    for start in range(0, 36, 4):  # groups 0-3, 4-7, 8-11; ranks 0-5, 6-11
        group = rows[start:start + 4]
        rewards = torch.tensor([r["reward"] for r in group], dtype=torch.float64)
        assert len({r["problem"] for r in group}) == 1 and len({str(r["completion_ids"]) for r in group}) > 1
        for r in group:
            reward = r["correct"] * (1 + 0.9 * (1 - len(r["completion_ids"]) / 12))
            advantage = (r["reward"] - rewards.mean()) / (rewards.std() + 1e-4)
            assert (r["reward"], r["advantage"]) == pytest.approx((reward, advantage.item()))
    assert len(rows) == 36
    assert "w_clipped" not in reproducible(many / "two" / "grouped")[0]  # --magnitude_clip 0: no meaning

def test_a_thinking_teacher_changes_the_teachers_header_alone(many, tiny):
    tokenizer = egrsd.load_tokenizer(str(tiny))[0]
    for name, header in (("egrsd", "<|assistant|><think></think>"), ("thinking teacher", "<|assistant|>")):
        for row in read(many / "one" / name / "rollouts.jsonl"):
            student, teacher = tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["teacher_ids"])
            assert teacher.endswith(header) and student.endswith("<|assistant|><think></think>")
            assert egrsd.REFERENCE_BEGIN in teacher and egrsd.REFERENCE_BEGIN not in student
            assert row["problem"] in teacher and row["problem"] in student

@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Olmo3"])
def test_other_decoders_train_also_without_a_chat_template(kind, small, tmp_path):
    make_model(tmp_path / "model", kind, template=None if kind == "Olmo3" else TEMPLATE, head_dim=8)
    out = trained(*small, "--model", tmp_path / "model", "--steps", 2, "--out", tmp_path / "run")
    assert all(m["grad_norm"] > 0 and m["engine_gap_max"] < 1e-4 for m in read(out / "metrics.jsonl"))
    weights = adapter(out / "step_2")
    assert len(weights) == 28 and all(x.any() for name, x in weights.items() if "lora_B" in name)

def test_the_temperature_of_log_p_is_changed_in_one_place_and_the_gap_stays_at_1(small, whole, tmp_path):
    source = (HERE / "egrsd.py").read_text(encoding="utf-8")
    fork = source.replace("LOGP_TEMPERATURE = 1.0", "LOGP_TEMPERATURE = 1.1")
    (tmp_path / "fork.py").write_text(fork, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fork", tmp_path / "fork.py")
    sys.modules["fork"] = fork = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fork)
    assert train(*small, "--steps", 1, "--out", tmp_path / "run", program=fork) == 0
    warm, cold = (read(run / "metrics.jsonl")[0] for run in (tmp_path / "run", whole))
    assert warm["engine_gap_max"] < 1e-4 and warm["entropy"] > cold["entropy"] + 1e-3

# ---------------------------------------------------------------------------- faults: killed, stopped, broken

KILLER = """
import itertools
calls, target, rank = itertools.count(1), os.environ["KILL"], os.environ.get("OF", "0")
def dying(name, function):
    def wrapper(*a, **k):
        mine = target.startswith(name) and os.environ["RANK"] == rank
        if mine and next(calls) == int(target.split(":")[1]):
            if os.environ.get("RAISE"):
                raise ValueError("this rank breaks here")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*a, **k)
    return wrapper
egrsd.Path.rename = dying("rename", egrsd.Path.rename)
egrsd.teach, egrsd.learn = dying("teach", egrsd.teach), dying("learn", egrsd.learn)
"""

def test_a_killed_run_resumed_equals_the_uninterrupted_one_bit_for_bit(whole, small, tmp_path):
    """kill -9 in step 3 and, resumed, just before the rename that ends the save of step 6; torn lines."""
    out, flags = tmp_path / "run", [*small, "--out", tmp_path / "run"]
    for kill, last in (("teach:3", 2), ("rename:5", 5)):  # config.json is the first to be renamed
        assert Forked(*flags, patch=KILLER, KILL=kill).wait() == [-signal.SIGKILL]
        assert newest(out) == f"step_{last}"
        for name in ("metrics", "rollouts"):
            with open(out / f"{name}.jsonl", "a") as file:
                file.write('{"step": 99, "rew')
        flags = ["--resume", out]
    assert (out / "step_6.tmp").exists()
    same_run(whole, trained("--resume", out), 12)

@pytest.mark.parametrize("how", [{}, dict(RAISE="1")], ids=["killed", "raises"])
def test_a_rank_that_dies_ends_the_other_with_a_line(how, small, tmp_path):
    run = Forked(*small, "--out", tmp_path / "run", ranks=2, patch=KILLER, KILL="learn:3", OF="1", **how)
    assert run.wait(60) == [1, 1 if how else -signal.SIGKILL]
    assert run.err.count("egrsd.py: another rank is gone; its own message says why\n") == 1, run.err
    assert ("ValueError: this rank breaks here" in run.err) == ("Traceback" in run.err) == bool(how), run.err
    assert newest(tmp_path / "run") == "step_2"

@pytest.mark.parametrize("number, ranks, code", [(signal.SIGTERM, 1, 0), (signal.SIGINT, 2, 130)])
def test_a_signal_to_any_rank_ends_all_after_the_step_under_way_which_is_saved(
        number, ranks, code, small, whole, tmp_path):
    patch = ("real = egrsd.teach\n"
             "egrsd.teach = lambda *a: (print('teaching', flush=True), time.sleep(0.1), real(*a))[2]")
    out = tmp_path / "run"
    run = Forked(*small, "--save_every", 1000, "--out", out, ranks=ranks, patch=patch)
    run.until(lambda: run.out.count("teaching") >= 3 * ranks)
    run.kill(number, slice(-1, None))  # the last rank alone
    assert run.wait(30) == [code] * ranks
    last = read(out / "metrics.jsonl")[-1]["step"]
    assert run.err == f"egrsd.py: stopped after step {last}; go on by --resume {out}\n", run.err
    assert 3 <= last < 12 and newest(out) == f"step_{last}"
    if ranks == 1:
        same_run(trained("--resume", out), whole, 12)

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_ends_at_once_without_a_traceback(number, code, small, tmp_path):
    patch = "egrsd.load_model = lambda *a: (print('loading', flush=True), hang())"
    run = Forked(*small, "--out", tmp_path / "run", patch=patch)
    run.until(lambda: "loading" in run.out)
    run.kill(number)
    assert run.wait(10) == [code] and not (tmp_path / "run").exists()
    assert run.err == ("egrsd.py: stopped\n" if code == 130 else ""), run.err

def test_a_second_ctrl_c_ends_at_once_and_the_last_snapshot_stays_usable(small, tmp_path):
    hang = """
real, calls = egrsd.teach, []
def teach(*a):
    calls.append(1)
    if len(calls) == 3:
        print('hangs', flush=True)
        hang()
    return real(*a)
egrsd.teach = teach
"""
    run = Forked(*small, "--out", tmp_path / "run", patch=hang)
    run.until(lambda: "hangs" in run.out)
    for pause in (0.3, 1.5):  # torchrun hands one Ctrl-C on twice: within a second two count as one
        run.kill(signal.SIGINT)
        time.sleep(pause)
    assert run.processes[0].is_alive()
    run.kill(signal.SIGINT)
    assert run.wait(10) == [130] and "Traceback" not in run.err, run.err
    assert newest(trained("--resume", tmp_path / "run", "--steps", 3)) == "step_3"

@pytest.mark.parametrize("kib, rank, line", [
    pytest.param(75, 4, "File too large", id="rollouts.jsonl"),
    pytest.param(100, 32, "step_1 cannot be saved; is the disk full?", id="adapter"),
    pytest.param(250, 32, "step_1 cannot be saved; is the disk full?", id="trainer.pt")])
def test_a_full_disk_ends_the_run_with_a_line_and_keeps_the_last_snapshot(kib, rank, line, small, tmp_path):
    patch = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({kib << 10}, {kib << 10}))"
    out = tmp_path / "run"
    run = Forked(*small, "--lora_rank", rank, "--out", out, patch=patch)
    assert run.wait() == [1]
    assert run.err.startswith("egrsd.py: ") and line in run.err and run.err.count("\n") == 1, run.err
    assert bool(egrsd.snapshots(out)) == (rank == 4)
    written = [path.name for path in (out / "step_1.tmp").glob("*.safetensors")]
    assert written == ["adapter_model.safetensors"] * (kib == 250)
    trained("--resume", out, "--steps", 8)
    assert len(read(out / "rollouts.jsonl")) == 64

def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run_after_five(small, tmp_path, capsys):
    """Not finite are: an entropy in step 2, the gradient alone in step 4, an entropy from step 7 on."""
    calls = []

    def teach(model, rollouts, cfg, real=egrsd.teach):
        real(model, rollouts, cfg)
        calls.append(1)
        if len(calls) == 2 or len(calls) > 6:
            rollouts[0].teacher_entropy[0] = math.nan if len(calls) % 2 else math.inf
        return torch.cat([r.teacher_entropy for r in rollouts]).max().item()

    def learn(model, *a, real=egrsd.learn):
        loss = real(model, *a)
        if len(calls) == 4:
            next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = math.nan
        return loss

    flags = [*small, "--teacher", "copy", "--teacher_every", 4, "--out", tmp_path / "run"]
    assert train(*flags, teach=teach, learn=learn) == 1
    printed = capsys.readouterr()
    assert "5 steps in a row" in printed.err and printed.err.count("\n") == 1
    assert printed.out.count("SKIPPED, not finite") == 7
    out, metrics = tmp_path / "run", read(tmp_path / "run" / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7]
    assert not re.search("NaN|Infinity", (out / "metrics.jsonl").read_text())
    before, after = adapter(out / "step_3"), adapter(out / "step_4")
    assert all(torch.equal(before[name], after[name]) for name in before)  # step 4 was skipped
    assert metrics[4]["welford_mean"] != metrics[3]["welford_mean"]  # but its rewards count
    teacher = torch.load(out / "step_4" / "trainer.pt", weights_only=True)["teacher"]
    assert all(torch.equal(teacher[name], after[name]) for name in after)  # and the copy due was made

def test_changed_base_weights_stop_the_next_save(small, tmp_path, capsys):
    def learn(model, *a, real=egrsd.learn):
        next(p for name, p in model.named_parameters() if "q_proj.base_layer" in name).data[0, 0] += 1e-3
        return real(model, *a)

    assert train(*small, "--out", tmp_path / "run", learn=learn) != 0
    assert "changed the base weights" in capsys.readouterr().err and not egrsd.snapshots(tmp_path / "run")
    model = torch.nn.Linear(4, 4)
    before = egrsd.fingerprint(model)
    model.weight.data.view(torch.int32)[2, 1] ^= 1
    assert egrsd.fingerprint(model) != before  # a single bit

def test_all_wrong_all_cut_off_and_empty_completions_train_on(small, tmp_path, monkeypatch, capsys):
    def generate(self, *a, real=egrsd.HfEngine.generate, **k):
        for i, ids, logp in real(self, *a, **k):
            yield (i, [3], logp[:1]) if i == 0 else (i, ids, logp)  # nothing but the end of the turn

    monkeypatch.setattr(egrsd.HfEngine, "generate", generate)
    out = trained(*small, "--max_completion_length", 1, "--steps", 8, "--out", tmp_path / "run",
                  grade=lambda *_: False, prove_handover=lambda *_: None)
    metrics, rows = read(out / "metrics.jsonl"), read(out / "rollouts.jsonl")
    assert len(metrics) == 8 and all(m["reward"] == m["skipped"] == 0 for m in metrics)
    assert {m["length"] for m in metrics} == {1} and max(m["truncated"] for m in metrics) > 50
    assert sum(row["completion"] == "" for row in rows) >= 8
    assert metrics[-1]["advantage_std"] == metrics[-1]["welford_std"] == 0
    assert "WARNING" in capsys.readouterr().out  # those log-probs are not of the token [3]

def test_main_leaves_no_process_group_and_no_signal_handler_behind(small, tmp_path):
    """That it joins a group which exists is seen in `many`, where two ranks make run after run."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trained(*small, "--steps", 1, "--out", tmp_path / "run")
    assert not dist.is_initialized()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

def test_out_of_memory_is_a_line_with_what_helps_and_a_programming_error_a_traceback(
        small, tmp_path, capsys, monkeypatch):
    def learn(*a):
        monkeypatch.setenv("LOCAL_RANK", "3")  # whichever rank it is: the others only see it gone
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert train(*small, "--out", tmp_path / "run", learn=learn) == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert re.fullmatch("egrsd.py: out of GPU memory.*--micro_batch.*--grad_checkpoint.*--engine_memory\n",
                        capsys.readouterr().err)
    with pytest.raises(TypeError):
        train(*small, "--out", tmp_path / "other", learn=lambda: 0)
    assert not dist.is_initialized()

@pytest.mark.parametrize("keep, ranks", [([], 1), ([1, 6], 2), (range(1, 13), 1)])
def test_a_run_goes_on_without_a_snapshot_on_other_ranks_and_beyond_its_end(keep, ranks, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    for path in egrsd.snapshots(out):
        if int(path.name[5:]) not in keep:
            shutil.rmtree(path)
    forked("--resume", out, "--steps", 14, ranks=ranks)
    old, new = read(whole / "rollouts.jsonl"), read(out / "rollouts.jsonl")
    assert [row["completion_ids"] for row in new[:96]] == [row["completion_ids"] for row in old]
    assert len(new) == 8 * 14 and [m["step"] for m in read(out / "metrics.jsonl")] == list(range(1, 15))
    norms = [[m["grad_norm"] for m in read(run / "metrics.jsonl")[:12]] for run in (whole, out)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)

# ------------------------------------------------------------------------------ the command line, user errors

def refused(flags, message, capsys, out):
    """Exit code 2, one line that begins with our name and holds the message, and nothing is written."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("egrsd.py: ") and error.count("\n") == 1 and message in error, error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

BAD_FLAGS = [
    ("--gama 0.3", "--gama"), ("--gam 0.3", "--gam"), ("stray", "stray"), ("--toy", "--toy"),
    ("--gamma", "expected one argument"), ("--gamma nan", "--gamma nan: must be a finite number not below 0"),
    ("--gamma -inf", "finite"), ("--lr inf", "--lr inf"), ("--gamma -0.1", "below"), ("--lr -1e-6", "below"),
    ("--window -1", "--window -1: must be a finite number not below 0"), ("--window 1.5", "invalid int"),
    *[(f"--{name} 0", f"--{name} 0: must be a finite number above 0") for name in (
        "steps", "save_every", "micro_batch", "lora_rank", "batch_size", "rollouts_per_prompt")],
    *[(f"--{name} other", "invalid choice: 'other'") for name in (
        "engine", "dtype", "teacher", "lr_schedule", "teacher_thinking")],
    ("--method egrsd2", "one of sft, grpo, rlsd, opsd, crisp, dasd, egrsd"),
    ("--method grpo --rollouts_per_prompt 3", "divisible by --rollouts_per_prompt"),
    ("--rollouts_per_prompt 4", "only --method grpo"), ("--tensor_parallel 2", "must divide the 1 ranks"),
    ("--max_length 24", "--max_completion_length"), ("--kl_clip 0.1", "only --method opsd"),
    ("--method sft --teacher ema", "sft has no teacher"), ("--teacher_decay 1.1", "not be above 1"),
    ("--magnitude_clip 1", "below 1"), ("--engine_args {", "not a JSON"), ("--engine_args [1]", "not a JSON"),
    ("--out {file}", "is a file"), ("--resume {file}", "no run"), ("--resume nowhere --out x", "no run"),
    ("--tensor_parallel 0", "above 0"),
    ("--data nothing.jsonl", "nothing.jsonl: no such"), ("--data {file}", "problems.txt: no such"),
    ("--data no[1]*/x", "no such"), ("--data a/b", "a/b: cannot be read"), ("--model=", "no model there"),
    ("--model nowhere/x", "nowhere/x: no model"), ("--model nowhere --data x.jsonl", "x.jsonl: no such"),
    *[("--engine vllm", "not installed")] * (not VLLM)]

@pytest.mark.parametrize("flags, message", BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_a_bad_flag_is_a_line_before_a_model_is_loaded(flags, message, small, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(egrsd, "load_base")  # the error is found before a model is loaded
    (tmp_path / "problems.txt").write_text("{}")
    given = [word.replace("{file}", f"{tmp_path}/problems.txt") for word in flags.split()]
    others = [] if "--resume" in flags else [*small, "--out", tmp_path / "run"]
    refused([*others, *given], message, capsys, tmp_path)

BAD_DATA = {
    "empty": (b"", "none of its 0 rows"), "torn": (b'{"problem": 1}\n\n{"a', "line 3"),
    "list": (b"[1]", "line 1"), "lfs": (b"version https://git-lfs.github.com/spec/v1", "line 1"),
    "latin-1": (b'{"problem": "\xe9"}', "cannot be read"), "utf-16": ("{}".encode("utf-16"), "bad.jsonl"),
    "columns": (b'{"text": "x", "answer": "y"}', "columns: answer, text; accepted: problem or question"),
    "no gold": (b'{"problem": "x", "solution": "no box"}', "1 rows has problem, solution and gold answer"),
    "parquet": (b"PAR1", "bad.parquet: cannot be read")}

@pytest.mark.parametrize("name", BAD_DATA)
def test_a_bad_data_file_is_named_with_what_is_wrong(name, small, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(egrsd, "load_base")
    content, message = BAD_DATA[name]
    path = tmp_path / ("bad.parquet" if name == "parquet" else "bad.jsonl")
    path.write_bytes(content)
    for part in (path.name, message):
        refused([*small, "--data", path, "--out", tmp_path / "run"], part, capsys, tmp_path)

def edit(file, **changes):
    """Changes a JSON file's entries; None takes one away."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: x for name, x in content.items() if x is not None}))

def reweigh(folder, change):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))

def cut(file, share=0.5):
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])

def template(text):
    return lambda folder: make_tokenizer(text).save_pretrained(folder)

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 14528\n"
BAD_MODELS = {  # how a good model's folder is spoilt, or the sizes of another kind; what the line says
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "lfs pointer": (lambda f: (f / "model.safetensors").write_text(LFS), "cannot be loaded"),
    "truncated": (lambda f: cut(f / "model.safetensors"), "cannot be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "a gap": (lambda f: reweigh(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), "lack weights"),
    "other sizes": (lambda f: edit(f / "config.json", intermediate_size=64), "cannot be loaded"),
    "nan weights": (lambda f: reweigh(f, lambda w: w["model.norm.weight"].fill_(math.nan)), "not finite"),
    "unknown kind": (lambda f: edit(f / "config.json", model_type="qwen9"), "no model there"),
    "no config": (lambda f: (f / "config.json").unlink(), "no model there"),
    "torn config": (lambda f: cut(f / "config.json"), "no model there"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "makes nothing of"),
    "torn tokenizer": (lambda f: cut(f / "tokenizer.json"), "no model there"),
    "no eos": (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no eos_token"),
    "Qwen3": (dict(vocab_size=99), "105 tokens in its tokenizer, but 99 in the model"),
    "template raises": (template("{{ raise_exception('system turn!') }}"), "template fails (system turn!"),
    "mute template": (template("{% for m in messages %}<|user|>{% endfor %}"), "does not show the problem"),
    "T5": (dict(d_model=32, d_kv=8, d_ff=48, num_heads=4, decoder_start_token_id=0), "cannot be loaded"),
    "GPT2": (dict(n_embd=32, n_head=4, n_layer=2, n_positions=512), "lacking, or more"),
    "Phi3": ({}, "gate_up_proj"), "Qwen3Moe": (dict(moe_intermediate_size=16, num_experts=4), "experts"),
    "Gemma2": (dict(final_logit_softcapping=2.0, query_pre_attn_scalar=32), "soft-caps its logits"),
    "Granite": (dict(logits_scaling=8.0), "scales or soft-caps")}

@pytest.mark.parametrize("name", BAD_MODELS)
def test_an_unusable_model_is_a_line_and_a_second_try_succeeds(name, small, tiny, tmp_path, capsys):
    spoil, message = BAD_MODELS[name]
    if isinstance(spoil, dict):
        make_model(tmp_path / "model", name, **spoil)
    else:
        spoil(shutil.copytree(tiny, tmp_path / "model"))
    flags = [*small, "--steps", 1, "--out", tmp_path / "run"]
    refused([*flags, "--model", tmp_path / "model"], message, capsys, tmp_path)
    if name in ("no eos", "truncated", "Granite"):  # found before, while and after loading
        trained(*flags)

def set_config(run, **changes):
    edit(run / "config.json", config={**json.loads((run / "config.json").read_text())["config"], **changes})

def rewrite(run, change):
    """The newest adapter of a run again, every matrix changed."""
    from safetensors.torch import save_file
    weights = {name: change(p).contiguous() for name, p in adapter(run / "step_12").items()}
    save_file(weights, run / "step_12/adapter_model.safetensors")

BAD_RESUMES = {  # further flags; what happens to a copy of a run before; what the line says
    "flag": ("--gamma 0.5", None, "--gamma 0.5: this run has 0.8; a resumed run may only change steps"),
    "seed": ("--seed 1", None, "--seed 1: this run has 0"), "out": ("--out elsewhere", None, "this run has"),
    "linear": ("--steps 13", lambda run: set_config(run, lr_schedule="linear"), "--steps 13: this run"),
    "data": ("", lambda run: cut(run.parent / "problems.jsonl"), "problems.jsonl"),
    "rows": ("", lambda run: write_rows(f := run.parent / "problems.jsonl", read(f)[1:]), "not the problems"),
    "base": ("", lambda run: make_model(run.parent / "model", seed=8), "not the base of"),
    "torn config": ("", lambda run: cut(run / "config.json"), "config.json: not the configuration of a run"),
    "foreign": ("", lambda run: (run / "config.json").write_text("{}"), "not the configuration of a run"),
    "gone": ("", lambda run: (run / "config.json").unlink(), "no run there"),
    "older": ("", lambda run: set_config(run, tokens_per_pass=9), "of another version of this program"),
    "torn state": ("", lambda run: cut(run / "step_12/trainer.pt"), "step_12: cannot be read"),
    "torn adapter": ("", lambda run: cut(run / "step_12/adapter_model.safetensors"), "step_12: cannot be"),
    "no adapter": ("", lambda run: (run / "step_12/adapter_model.safetensors").unlink(), "step_12: cannot"),
    "one row": ("", lambda run: rewrite(run, lambda p: p[:1]), "its adapter does not fit the model")}

@pytest.fixture
def moved(whole, tiny, problems, tmp_path):
    """A copy of the run under another name, of its model and data; the flags that resume it there."""
    run = shutil.copytree(whole, tmp_path / "a run, renamed")
    model, data = shutil.copytree(tiny, tmp_path / "model"), shutil.copy(problems, tmp_path)
    return run, ["--resume", run, "--model", model, "--data", data]

@pytest.mark.parametrize("name", BAD_RESUMES)
def test_a_run_that_cannot_be_resumed_is_refused_and_stays_as_it_is(name, moved, capsys):
    (run, resume), (flags, spoil, message) = moved, BAD_RESUMES[name]
    spoil and spoil(run)
    refused([*resume, *flags.split()], message, capsys, run)

def test_a_run_resumes_with_model_data_and_folder_moved_and_with_less_memory(moved, whole, capsys):
    run, resume = moved
    for step in (11, 12):
        shutil.rmtree(run / f"step_{step}")
    edit(run / "config.json", versions=dict(peft="0.1"))
    same_run(trained(*resume), whole, 12)
    assert "'peft': '0.1'" in capsys.readouterr().out  # other library versions are said
    trained("--resume", run, "--micro_batch", 1, "--grad_checkpoint", "--steps", 13, "--save_every", 5)
    stored = json.loads((run / "config.json").read_text())["config"]
    assert (stored["model"], stored["micro_batch"], stored["save_every"]) == (str(resume[3]), 1, 5)

def test_a_run_folder_that_is_taken_is_refused_and_resume_named(whole, small, tmp_path, capsys, monkeypatch):
    refused([*small, "--out", whole], f"holds a run already; --resume {whole}", capsys, whole)
    monkeypatch.chdir(tmp_path)
    moment = egrsd.datetime.datetime(2026, 1, 2, 3, 4, 5)
    clock = types.SimpleNamespace(datetime=types.SimpleNamespace(now=lambda: moment),
                                  timedelta=egrsd.datetime.timedelta)
    codes = [train(*small, "--steps", 1, datetime=clock) for _ in range(2)]
    assert codes == [0, 2] and [path.name for path in Path("out").iterdir()] == ["egrsd-20260102-030405"]
    (tmp_path / "new").mkdir()  # by another run, between the look and the writing
    assert train(*small, choose_folder=lambda cfg: tmp_path / "new") == 1
    assert not [*(tmp_path / "new").iterdir()]

def test_errors_of_all_ranks_are_one_line(small, tiny, tmp_path):
    gap = shutil.copytree(tiny, tmp_path / "gap")
    reweigh(gap, lambda weights: weights.pop("lm_head.weight"))
    for flags, line in (("--batch_size 9", "--batch_size 9: must be divisible by the 2 ranks\n"),
                        ("--model nowhere", "model nowhere: no model there"),
                        (f"--model {gap}", f"model {gap}: its files lack weights: lm_head.weight\n")):
        run = Forked(*small, *flags.split(), "--out", tmp_path / "run", ranks=2)
        assert run.wait() == [2, 2] and not (tmp_path / "run").exists()
        assert run.err.startswith(f"egrsd.py: {line}") and run.err.count("\n") == 1, run.err

def test_help_names_every_knob_with_its_comment_and_import_needs_torch_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        egrsd.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "1 +- epsilon, Eq. (2); 0 = no magnitude (default 0.2)" in printed
    assert not [f.name for f in egrsd.dataclasses.fields(egrsd.Config) if f"--{f.name}" not in printed]
    code = ("import sys, egrsd; print([m for m in ('transformers', 'peft', 'vllm', 'datasets', 'matplotlib', "
            "'math_verify', 'sympy', 'lab') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done

def test_the_real_command_works_in_a_locale_that_is_not_utf_8(small, tmp_path):
    text = "Wie groß ist 1+1? \U0001f600"
    row = json.dumps(dict(problem=text, solution="\\boxed{2} ✓", answer="2"), ensure_ascii=False)
    (tmp_path / "emoji.jsonl").write_text(row, encoding="utf-8")
    flags = [*small, "--data", tmp_path / "emoji.jsonl", "--steps", 1, "--out", tmp_path / "run"]
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, HERE / "egrsd.py", *map(str, flags)], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode("ascii")
    assert "step    1" in printed and "Wie gro\\xdf ist 1+1? \\U0001f600" in printed and "wrong" in printed
    assert read(tmp_path / "run" / "rollouts.jsonl")[0]["problem"] == text

# ------------------------------------------------------------------------------------------- data and prompts

def test_no_end_token_stands_behind_the_plain_prompt_of_a_base_model():
    from tokenizers.processors import TemplateProcessing
    tokenizer = make_tokenizer(None)
    bare = egrsd.encode(tokenizer, "What?", False)
    assert tokenizer.decode(bare) == "What?\n\n"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 3)])
    assert tokenizer("x").input_ids[-1] == 3
    assert egrsd.encode(tokenizer, "What?", False) == bare
    assert egrsd.reference_ids(tokenizer, dict(solution="x")) == [tokenizer.vocab["x"], 3]

@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_turn_ends_by_the_word_of_tokenizer_template_and_configs(where, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    tokenizer = make_tokenizer("{% for m in messages %}<|user|>{{ m.content }}<im_end>\n{% endfor %}")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<im_end>"]))
    tokenizer.save_pretrained(tmp_path)
    im_end = tokenizer.convert_tokens_to_ids("<im_end>")
    if where == "config.json":
        (tmp_path / "generation_config.json").unlink()
    edit(tmp_path / where, eos_token_id=[33, 50])
    assert {*egrsd.load_tokenizer(str(tmp_path))[1]} == {3, 33, 50, im_end}
    assert egrsd.reference_ids(tokenizer, dict(solution="x"))[-1] == im_end  # which sft trains

def test_every_kind_of_local_file_loads_and_brackets_in_a_path_are_no_pattern(problems, tmp_path):
    import pyarrow
    from pyarrow import parquet
    rows = egrsd.load_problems(str(problems))
    assert len(rows) == 40 and all(row["gold"] == row["solution"].split("#### ")[1] for row in rows)
    answers = pyarrow.array([0.1, 2.5, None], pyarrow.float32())
    for name, first in (("train[2].parquet", "mine"), ("train2.parquet", "another")):
        table = pyarrow.table(dict(problem=[first, "b", "c"], solution=["s", "t", "u"], answer=answers))
        parquet.write_table(table, tmp_path / name)
    loaded = egrsd.load_problems(str(tmp_path / "train[2].parquet"))
    assert [(row["problem"], row["gold"]) for row in loaded] == [("mine", "0.1"), ("b", "2.5")]
    odd = [dict(problem=text, solution="s", answer=1) for text in ("a\u2028b", "half \ud800")]
    lines = [json.dumps(row, ensure_ascii=row is odd[1]).encode() for row in odd]
    (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))  # BOM, CRLF, empty line
    assert [row["problem"] for row in egrsd.load_problems(str(tmp_path / "odd.jsonl"))] == ["a\u2028b"]
    test = write_rows(tmp_path / "test.jsonl", [dict(problem="x", answer="1")])
    assert egrsd.load_problems(str(test), solved=False)[0]["gold"] == "1"

def test_draw_gives_each_epoch_once_straddles_epochs_and_counts_long_rows():
    rows = [dict(problem=f"p{i} " + "long " * 100 * (i == 3), solution="s", gold="1") for i in range(7)]
    tokenizer, cfg = make_tokenizer(None), egrsd.Config(max_length=80, max_completion_length=10)

    def draw(state, count, **changes):
        changed = egrsd.dataclasses.replace(cfg, **changes)
        return [row["problem"].split()[0] for row, *_ in egrsd.draw(rows, tokenizer, changed, state, count)]

    fresh = dict(position=0, too_long=0)
    state = dict(fresh)
    names = [name for _ in range(6) for name in draw(state, 4)]
    for epoch in range(4):
        assert sorted(names[epoch * 6:epoch * 6 + 6]) == ["p0", "p1", "p2", "p4", "p5", "p6"]
    assert names[:6] != names[6:12] and state["too_long"] in (3, 4)
    torch.manual_seed(5)  # the order depends on no global state
    assert draw(dict(fresh), 6) == names[:6] != draw(dict(fresh), 6, seed=1)
    assert draw(dict(state), 3) == draw(state, 3)
    rows[2]["solution"] = "s" * 100  # sft skips a reference that is too long, too
    assert sorted(draw(dict(fresh), 5, method="sft")) == ["p0", "p1", "p4", "p5", "p6"]
    with pytest.raises(egrsd.UserError, match="too short for every problem"):
        draw(state, 1, max_length=12)
    for row in rows[1:]:  # one row in seven fits: sparse, but no error
        row["problem"] += " long" * 100
    assert draw(dict(fresh), 50) == ["p0"] * 50

# ------------------------------------------------------------------------------------------------- grading

def boxed(answer):
    return rf"So \boxed{{{answer}}}."

def test_graded_pairs_get_the_verdict_of_a_fair_grader_or_the_disagreement_is_known():
    unfair = [(completion, gold, fair) for completion, gold, fair, _ in PAIRS if egrsd.grade(completion, gold) != fair]
    assert unfair == [(completion, gold, fair) for completion, gold, fair, reason in PAIRS if reason]

@pytest.mark.parametrize("words", [
    "or more", "if n is even", "when x", "not", "nonzero", "less", "at least", "most", "than that", "over", "under 6", "above", "below", "after noon",
    "before noon", "even", "odd", "p.m.", "AM", "BC", "AD", "left", "right", "up", "down", "half", "pair", "remainder 2", "remainder", "digit", "base",
    "mod", "hundred", "thousand", "Million", "dozen", "north", "southwards", "due east", "west", "backward", "clockwise", "fifth", "third", "is", "or so",
    "negative", "minus", "loss", "squared", "pi", "to", "to 7", "plus", "sines", "cosine", "tangent", "logs",
    "root two", "sqrt", "tenfold", "i", "y", "z", "e-3", "x^2",
    "and rising", "if any", "under"])
def test_words_behind_a_number_that_say_more_than_a_unit_are_not_dropped(words):
    assert egrsd.grade(boxed(rf"5\text{{ {words}}}"), "5") is False
    assert egrsd.grade(boxed("5"), rf"5\text{{ {words}}}") is False
    assert egrsd.grade(boxed(rf"5\text{{ {words}}}"), rf"5\text{{ {words}}}") is True

def test_32_hostile_answers_are_bounded_and_wrong_and_leave_the_grader_well():
    def spent():  # processor time in seconds, peak memory in KiB
        return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert len(HOSTILE) == 32
    start, peak = spent()
    for answer in HOSTILE:
        assert egrsd.grade(boxed(answer), "42x") is False, answer[:60]
    end, higher_peak = spent()
    assert end - start < 40 and higher_peak - peak < 2**20, (end - start, higher_peak - peak)
    assert egrsd.grade(r"\boxed{\frac12}", "0.5") is True

def test_32_ordinary_answers_cost_under_a_tenth_of_a_second():
    egrsd.grade(r"\boxed{\frac12}", "0.5")
    ordinary = [(f"{n}", f"{n}.0") for n in range(30)] + [(r"\frac12", "0.5"), (r"2\sqrt{2}", r"\sqrt{8}")]
    start = time.process_time()
    assert all(egrsd.grade(boxed(answer), gold) for answer, gold in ordinary)
    assert time.process_time() - start < 0.1

def test_a_busy_machine_refuses_no_right_answer(monkeypatch):
    egrsd.grade(r"\boxed{\frac12}", "0.5")
    real = egrsd.same
    monkeypatch.setattr(egrsd, "same", lambda *texts: time.sleep(1.5) or real(*texts))  # the clock runs, the processor not
    assert egrsd.grade(r"\boxed{\frac12}", "0.5") is True

def test_an_alarm_of_the_callers_survives_grading():
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 100)
    egrsd.grade(r"\boxed{\frac12}", "0.5")
    assert 90 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 100
    assert signal.signal(signal.SIGALRM, before).__name__ == "<lambda>"

def test_grading_from_another_thread_is_an_error_not_a_verdict():
    from concurrent.futures import ThreadPoolExecutor
    with pytest.raises(RuntimeError, match="main thread"):
        ThreadPoolExecutor(1).submit(egrsd.grade, r"\boxed{5}", "5").result()

@pytest.mark.parametrize("text, box", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}} \boxed{3", r"\frac{1}{2}"), (r"\boxed{a\}b}", r"a\}b"), ("none", None),
    (r"\boxed {x}", "x"), (r"\boxed{}", ""), (r"\boxed{1 \boxed{2}}", "2"), ("}}" + r"\boxed{{{7}}}", "{{7}}"), ("", None),
    (r"\boxed 5 apples", "5"), (r"\fbox{\boxed{6}}", "6")])
def test_last_boxed(text, box):
    assert egrsd.last_boxed(text) == box

def test_a_long_text_costs_linear_time():
    start = time.process_time()
    assert egrsd.last_boxed(r"\boxed{" * 100_000) is None
    assert egrsd.grade("\\boxed{" + "1" * 1_000_000 + "}", "2") is False
    assert time.process_time() - start < 2

@pytest.mark.parametrize("row, gold", [
    (dict(answer="So 3.\n#### 1,234"), "1,234"), (dict(answer=33), "33"), (dict(Answer=0), "0"), (dict(answer=2.5), "2.5"),
    (dict(answer="", Answer="x"), "x"), (dict(solution=r"so \boxed{\frac{1}{2}}"), r"\frac{1}{2}"), (dict(problem="x"), None),
    (dict(answer=None, solution="\\boxed{1} or\nso \\boxed{{2}}"), "{2}"), (dict(answer="#### "), None), (dict(solution=None), None),
    (dict(answer=float("nan"), solution=r"\boxed{7}"), "7"), (dict(Answer="4", answer="so\n#### 5"), "5"),
    (dict(Answer=float("nan"), answer="5"), "5"), (dict(Answer="  ", answer=[1]), None), (dict(answer=True, solution=r"\boxed{7}"), "7"),
    (dict(answer="proof", solution=r"\boxed{3}"), "3"), (dict(answer="proof", solution="Clearly."), None), (dict(answer="N/A"), None),
    (dict(answer="not found"), None), (dict(answer="Proof."), None), (dict(answer=0.10000000149011612), "0.1"),
    (dict(answer=0.30000000000000004), "0.3"), (dict(solution=r"so $x=\boxed{1}, y=\boxed{2}$"), "1, 2"),
    (dict(solution=r"\boxed{5} = \boxed{5}"), "5")])
def test_gold_answer(row, gold):
    assert egrsd.gold_answer(row) == gold

def written(rng, q):
    """One of the ways to write a rational number."""
    sign, n, d, k = "-" if q < 0 else "", abs(q.numerator), q.denominator, rng.randint(2, 5)
    if d > 1:
        decimals = [f"{float(q):.3f}"] if 1000 % d == 0 else []
        return rng.choice([rf"{sign}\frac{{{n}}}{{{d}}}", f"{sign}{n}/{d}", rf"\dfrac{{{sign}{n}}}{{{d}}}",
                           rf"{sign}\tfrac{{{n * k}}}{{{d * k}}}", rf"{sign}\left(\frac{{{n}}}{{{d}}}\right)", *decimals])
    return rng.choice([f"{q}", f"{q}.0", f"{n * k * (-1 if q < 0 else 1)}/{k}", rf"\text{{{q}}}", f"{int(q):,}".replace(",", "{,}"),
                       f"{int(q):,}".replace(",", r"\,")])

def constructed(rng):
    """(answer, gold, are they equal?), known by construction: some rationals in some form, one of them perhaps another."""
    numbers = rng.sample([Fraction(rng.randint(-99, 999_999 if rng.random() < 0.2 else 99), rng.choice([1, 1, 2, 4, 7, 25])) for _ in range(30)], 3)
    equal, changed = rng.random() < 0.5, list(numbers)
    if not equal:
        changed[0] = rng.choice([changed[0] + 1, changed[0] - Fraction(1, 1000), 10 * changed[0] + 7])
    form = rng.choice(["{0}", "x={0}", "({0}, {1})", r"\{{{0}, {1}\}}", "{0}, {1}, {2}", r"{0}\text{{ cm}}", r"({0})\sqrt{{2}}", "[{0}, {1})",
                       r"x={0}, y={1}", r"{0}\text{{ cm}}, {1}\text{{ kg}}", r"{0}+{1}i", r"\frac{{{0}}}{{3}}"])
    answer, gold = ([written(rng, q) for q in values] for values in (changed, numbers))
    if rng.random() < 0.15 and form in ("({0}, {1})", "{0}, {1}, {2}", r"\{{{0}, {1}\}}"):  # one element more
        return form.replace("{1}", "{1}, 5000000").format(*answer), form.format(*gold), False
    if rng.random() < 0.15 and form in ("({0}, {1})", r"x={0}, y={1}", r"{0}\text{{ cm}}, {1}\text{{ kg}}"):
        return form.format(answer[1], answer[0], answer[2]), form.format(*gold), False
    return form.format(*answer), form.format(*gold), equal

def test_answers_that_are_equal_or_not_by_construction():
    rng = random.Random(1)
    pairs = [constructed(rng) for _ in range(300)]
    verdicts = [egrsd.grade(boxed(answer), gold) for answer, gold, _ in pairs]
    assert not [pair for pair, verdict in zip(pairs, verdicts) if verdict and not pair[2]]
    refused = [pair for pair, verdict in zip(pairs, verdicts) if pair[2] and not verdict]
    assert len(refused) <= 3, refused

def test_exercises_are_right_against_themselves_rewritten_and_wrong_against_each_other():
    for i, (gold, _) in enumerate(EXERCISES):
        for j, (_, again) in enumerate(EXERCISES):
            if i == j or (i + j) % 5 == 0:
                assert egrsd.grade(boxed(again), gold) == (i == j), (again, gold)

# --------------------------------------------------------------------------------- the proof of the hand-over

def first_for_ever(real, self, model, step):
    if self.merged is None:
        real(self, model, step)

def attention_forgotten(real, self, model, step):
    real(self, model, step)
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight") and "self_attn" in name:
            self.merged.get_submodule(name).weight.copy_(layer.base_layer.weight)

def another_base(real, self, model, step):
    real(self, model, step)
    self.merged.lm_head.weight.copy_(model.get_base_model().lm_head.weight.flip(0))

@pytest.mark.parametrize("fault", [first_for_ever, attention_forgotten, another_base])
def test_an_engine_that_does_not_sample_from_what_is_trained_is_refused(
        fault, small, tmp_path, capsys, monkeypatch):
    real = egrsd.HfEngine.sync
    monkeypatch.setattr(egrsd.HfEngine, "sync", torch.no_grad()(lambda *a: fault(real, *a)))
    refused([*small, "--out", tmp_path / "run"], "does not sample from the trained weights", capsys, tmp_path)

# ----------------------------------------------------------------------------------------- snapshots and logs

def test_a_snapshot_holds_adapter_state_and_a_card_whose_command_can_be_typed_again(whole, tiny):
    """That plain PEFT makes of it what the trainer had is seen where steps are recomputed from outside."""
    from huggingface_hub import ModelCard
    folder = whole / "step_12"
    assert [path.name for path in egrsd.snapshots(whole)] == [f"step_{n}" for n in range(1, 13)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "trainer.pt"]
    assert all(x.dtype == torch.float32 for x in adapter(folder).values())
    card, last = ModelCard.load(folder / "README.md"), read(whole / "metrics.jsonl")[-1]
    assert card.data.library_name == "peft" and "egrsd" in card.data.tags and card.data.base_model is None
    for text in (str(tiny), "--gamma=0.8", f"reward {last['reward']:.4g}"):
        assert text in card.text
    odd = egrsd.Config(thinking=True, grad_checkpoint=True, engine_args='{"a": "b c"}', out="my run", lr=1e-5)
    command, = [line for line in egrsd.model_card(odd, {}).splitlines() if "    egrsd.py " in line]
    assert egrsd.configure(egrsd.parse_flags(shlex.split(command)[1:])) == odd  # it can be typed again
    hub = ModelCard(egrsd.model_card(egrsd.Config(), dict(reward=1.0)))
    assert (hub.data.base_model, hub.data.pipeline_tag) == ("Qwen/Qwen3-8B", "text-generation")

COLUMNS = """
step index problem gold prompt_ids teacher_ids completion_ids completion truncated correct reward advantage
tokens teacher_entropy student_entropy delta""".split()

def test_config_and_logs_hold_what_is_promised_and_agree_with_each_other(whole):
    stored = json.loads((whole / "config.json").read_text())
    assert stored["config"].keys() == vars(egrsd.Config()).keys() and stored["config"]["gamma"] == 0.8
    assert stored["ranks"] == 1 and {"torch", "transformers", "peft"} < stored["versions"].keys()
    metrics, rows = read(whole / "metrics.jsonl"), read(whole / "rollouts.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 13)) and len(rows) == 96
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    for m in metrics:
        mine = [row for row in rows if row["step"] == m["step"]]
        assert m["engine_gap_max"] < 1e-4
        figures = dict(reward=[r["reward"] for r in mine], accuracy=[100 * r["correct"] for r in mine],
                       truncated=[100 * r["truncated"] for r in mine],
                       length=[len(r["tokens"]) for r in mine], advantage_mean=[r["advantage"] for r in mine],
                       entropy=[h for r in mine for h in r["teacher_entropy"]],
                       student_entropy=[h for r in mine for h in r["student_entropy"]],
                       delta_abs=[abs(d) for r in mine for d in r["delta"]])
        means = {name: sum(values) / len(values) for name, values in figures.items()}
        assert {name: m[name] for name in means} == pytest.approx(means, rel=1e-3)
        earlier = torch.tensor([r["reward"] for r in rows if r["step"] < m["step"]], dtype=torch.float64)
        expected = (earlier.mean().item(), earlier.std().item()) if len(earlier) else (0, 0)
        assert (m["welford_mean"], m["welford_std"]) == pytest.approx(expected)
        for r in mine:
            assert list(r) == COLUMNS
            lists = "completion_ids", "tokens", "teacher_entropy", "student_entropy", "delta"
            assert len({len(r[name]) for name in lists}) == 1, {name: len(r[name]) for name in lists}
            assert special.sub("", "".join(r["tokens"])) == r["completion"]

def test_texts_of_tokens_join_to_the_text_where_a_character_is_several_tokens():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # as Qwen's, without merges: emoji are 4 tokens
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    emoji, ids = tokenizer("\U0001f600").input_ids, tokenizer("a \U0001f600 \u05e9 & \u2028.").input_ids
    texts = egrsd.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids) and "\U0001f600" in texts
    broken = [*ids, *emoji[:3], *ids, emoji[0]]
    left, right = (text.replace("\ufffd", "") for text in (
        "".join(egrsd.token_texts(tokenizer, broken)), tokenizer.decode(broken)))
    assert left == right and len(egrsd.token_texts(tokenizer, broken)) == len(broken)

def test_flags_metrics_decisions_and_functions_named_in_the_readme_exist(whole):
    source, readme = ((HERE / name).read_text(encoding="utf-8") for name in ("egrsd.py", "README.md"))
    acting = set(re.findall(r"\bD\d+\b", source.split('"""', 2)[2])) - {"D7"}  # D7: the paper's tables
    assert set(re.findall(r"\*\*(D\d+)\*\*", readme)) - {"D7"} == acting
    given = re.findall(r"egrsd\.py ([^\n#`|]*)", readme)
    fields = {field.name for field in egrsd.dataclasses.fields(egrsd.Config)}
    assert given and not {flag for flags in given for flag in re.findall(r"--(\w+)", flags)} - fields
    rows = re.search(r"\| metric \|.*\n.*\n((\|.*\n)+)", readme)[1].splitlines()
    named = {name for row in rows for name in re.findall(r"`(.+?)`", row.split(" | ")[0])}
    assert named == read(whole / "metrics.jsonl")[-1].keys()
    rows = re.search(r"in `egrsd.py` \|\n.*\n((\|.*\n)+)", readme)[1].splitlines()
    functions = [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[-1])]
    assert len(functions) > 8 and not [name for name in functions if not hasattr(egrsd, name)]

# ---------------------------------------------------------------------------------------------------- fuzzing

def fuzz(cases):
    return hypothesis.settings(max_examples=cases, deadline=None, database=None,
                               suppress_health_check=list(hypothesis.HealthCheck))

latex = st.lists(st.sampled_from(
    r"\frac \sqrt \boxed \left( \right) \pi \text \cdot \times \pm \{ \} \infty \begin{pmatrix} \end{pmatrix} \\ { } ( ) [ ] , = + - "
    r"/ ^ _ ! % $ 0 1 2 7 10 3.5 1e9 x y \sum \int \log".split() + [" "]), max_size=14).map("".join)

@fuzz(700)
@hypothesis.given(st.text(max_size=80) | latex, st.text(max_size=20) | latex)
def test_fuzzed_texts_are_graded_and_have_a_box_or_none(text, other):
    box = egrsd.last_boxed(text)
    assert box is None or box in text
    assert egrsd.grade(text, other) in (True, False) and egrsd.grade(boxed(text), other) in (True, False)
    gold = egrsd.gold_answer(dict(answer=text, solution=other))
    assert gold is None or gold

columns = st.sampled_from(["problem", "question", "solution", "answer", "Answer", "x"])
some_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(columns, inner, max_size=5), max_leaves=4)
some_bytes = some_json.map(json.dumps).map(str.encode)
one_byte_off = st.builds(lambda text, at, new: text[:at] + new + text[at + 1:],
                         some_bytes, st.integers(0, 40), st.binary(max_size=2))

@fuzz(600)
@hypothesis.given(st.binary(max_size=60) | st.lists(some_bytes, max_size=3).map(b"\n".join) | one_byte_off)
def test_fuzzed_data_files_load_or_are_refused(content):
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        Path(file.name).write_bytes(content)
        try:
            rows = egrsd.load_problems(file.name)
        except egrsd.UserError as error:
            assert file.name in str(error) and "\n" not in str(error)
        else:
            texts = [text for row in rows for text in row.values()]
            assert all(type(text) is str and text.strip() and text.encode() for text in texts)

# -------------------------------------------------------------------------------- slow: minutes, with -m slow

@slow
def test_more_than_50_saves_survive_kill_9_at_random_moments(small, tmp_path):
    out, rng = tmp_path / "run", random.Random()
    whole = trained(*small, "--steps", 80, "--save_every", 80, "--out", tmp_path / "whole")
    kills, saved, torn, flags = 0, 0, 0, [*small, "--steps", 80, "--out", out]
    while saved < 60:
        run, metrics = Forked(*flags), out / "metrics.jsonl"
        seen = metrics.read_text().count("\n") if metrics.exists() else 0
        run.until(lambda: metrics.exists() and metrics.read_text().count("\n") not in (0, seen))  # it steps
        time.sleep(rng.uniform(0, 0.5))
        run.kill(signal.SIGKILL)
        assert run.wait() == [-signal.SIGKILL]
        kills, torn, found = kills + 1, torn + len(list(out.glob("*.tmp"))), egrsd.snapshots(out)
        assert [path.name for path in found] == [f"step_{n}" for n in range(1, len(found) + 1)]
        assert len(found) >= saved  # nothing that was saved is lost
        assert metrics.read_text().count("\n") - len(found) <= 1  # and no more than the step after it
        for path in found[saved:]:
            state = torch.load(path / "trainer.pt", weights_only=True)
            assert f"step_{state['step']}" == path.name and len(adapter(path)) == 28
        saved = len(found)
        if found:
            flags = ["--resume", out]
        else:
            shutil.rmtree(out)
    same_run(trained("--resume", out), whole, 80)
    print(f"\n{kills} kills, {torn} of them in the middle of a save, over {saved} saves")

@slow
def test_1000_steps_keep_memory_and_file_handles(small, tmp_path):
    patch = f"""
real, log = egrsd.step_metrics, open({str(tmp_path / "log")!r}, "w")
def step_metrics(*a):
    pages = int(open("/proc/self/statm").read().split()[1])
    print(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), file=log, flush=True)
    return real(*a)
egrsd.step_metrics = step_metrics
"""
    flags = "--steps 1000 --save_every 50 --teacher ema --lr 1e-5".split()
    run = Forked(*small, *flags, "--out", tmp_path / "run", patch=patch)
    assert run.wait(timeout=900) == [0], run.err
    memory, handles = zip(*(map(float, line.split()) for line in (tmp_path / "log").read_text().splitlines()))
    print(f"\n1,000 steps: {memory[49]:.0f} MiB after 50, {memory[-1]:.0f} at the end, "
          f"{max(memory[50:]):.0f} at most; file handles {handles[49]:.0f} and {handles[-1]:.0f}")
    assert len(memory) == 1000 and max(memory[50:]) - memory[49] < 25 and set(handles[49:]) == {handles[49]}
    assert read(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"] == 0

# -------------------------------------------------------------------- vLLM, the real one, on the CPU: -k vllm

def test_vllm_was_not_skipped_where_it_must_not_be():
    assert os.environ.get("EGRSD_NEEDS_VLLM") != "1" or VLLM

@made_once("vllm")
def vllm_run(small, tmp_path_factory):
    """The 12-step run again, sampled by vLLM on one rank."""
    out = tmp_path_factory.mktemp("vllm") / "one"
    return out, forked(*small, "--engine", "vllm", "--out", out).out

@needs_vllm
def test_vllm_samples_from_the_trainers_weights_while_the_adapter_moves(vllm_run):
    out, printed = vllm_run
    metrics = read(out / "metrics.jsonl")
    assert len(metrics) == 12 and "WARNING" not in printed
    assert max(m["engine_gap_max"] for m in metrics) < 1e-3
    assert max(m["engine_gap_mean"] for m in metrics) < 1e-5
    first, last = adapter(out / "step_1"), adapter(out / "step_12")
    assert all((first[name] - last[name]).abs().max() > 1e-3 for name in first if "lora_B" in name)

@needs_vllm
@pytest.mark.parametrize("together", [1, 2])
def test_vllm_on_two_ranks_alone_or_together_draws_what_one_rank_draws(together, vllm_run, small, tmp_path):
    one, two = vllm_run[0], tmp_path / "two"
    for left in Path("/dev/shm").glob("-tp*cpushm*"):  # of a group that was killed; vLLM on a CPU would not start
        left.unlink()
    forked(*small, "--engine", "vllm", "--steps", 6, "--out", two, "--tensor_parallel", together, ranks=2)
    for left, right in zip(reproducible(one)[:6], reproducible(two), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-3)
    left, right = ([row["completion_ids"] for row in read(out / "rollouts.jsonl")][:48] for out in (one, two))
    assert left == right

@needs_vllm
def test_vllm_in_bfloat16_passes_the_proof_and_trains(small, tmp_path):
    forked(*small, "--engine", "vllm", "--dtype", "bfloat16", "--steps", 4, "--out", tmp_path / "run")
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 4 and all(m["skipped"] == 0 and 0 < m["engine_gap_mean"] < 0.1 for m in metrics)

@needs_vllm
def test_vllm_takes_long_prompts_of_a_whole_batch(small, tmp_path):
    rows = [dict(problem=f"{k} " + "word " * 80, solution="s", answer="1") for k in range(32)]  # 400 tokens
    rows += 2 * [dict(rows[0], problem="word " * 2000)]  # beyond --max_length and what the model can take
    shape = "--steps 1 --batch_size 32 --max_completion_length 8 --max_length 1000"
    data = write_rows(tmp_path / "long.jsonl", rows)
    forked(*small, *shape.split(), "--data", data, "--engine", "vllm", "--out", tmp_path / "run")
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert max(m["engine_gap_max"] for m in metrics) < 1e-3 and metrics[-1]["too_long"] > 0

@needs_vllm
def test_a_vllm_that_cannot_start_ends_all_ranks_with_a_line(small, tmp_path):
    flags = [*small, "--engine", "vllm", "--out", tmp_path / "run"]
    run = Forked(*flags, ranks=2, VLLM_CPU_KVCACHE_SPACE="100000")
    assert run.wait() == [2, 2] and not (tmp_path / "run").exists()
    assert run.err.count("egrsd.py: vLLM does not start") == 1, run.err

@needs_vllm
def test_vllm_runs_beside_a_model_whose_class_in_transformers_it_has_patched(small, tmp_path):
    model = make_model(tmp_path / "model", "SmolLM3")  # for which vLLM has no code of its own
    forked(*small, "--model", model, "--engine", "vllm", "--steps", 2, "--out", tmp_path / "run")
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 2 and max(m["engine_gap_max"] for m in metrics) < 1e-3

@needs_vllm
def test_further_arguments_reach_vllm(small, tmp_path, capsys):
    flags = [*small, "--engine", "vllm", "--out", tmp_path / "run"]
    assert train(*flags, "--engine_args", '{"no_such_argument": 1}') == 2
    assert "vLLM does not start" in (error := capsys.readouterr().err) and "no_such_argument" in error, error

@needs_vllm
def test_a_stale_vllm_is_refused_by_the_proof_of_the_hand_over(small, tmp_path):
    patch = """
real = egrsd.VllmEngine.sync
egrsd.VllmEngine.sync = lambda self, *a: real(self, *a) if self.number == 0 else None
"""
    run = Forked(*small, "--engine", "vllm", "--out", tmp_path / "run", patch=patch)
    assert run.wait() == [2] and not (tmp_path / "run").exists()
    assert run.err.count("egrsd.py:") == 1 and "does not sample from the trained weights" in run.err, run.err

@needs_vllm
def test_ctrl_c_while_vllm_generates_finishes_and_saves_the_step(small, tmp_path):
    patch = """
real = egrsd.VllmEngine.generate
def generate(self, *a, **k):
    if self.number == 5:  # two hand-overs are the proof's
        print("GENERATING", flush=True)
        for _ in range(20):
            list(real(self, *a, **k))
    yield from real(self, *a, **k)
egrsd.VllmEngine.generate = generate
"""
    flags = [*small, "--engine", "vllm", "--save_every", 100, "--out", tmp_path / "run"]
    run = Forked(*flags, ranks=2, patch=patch)
    run.until(lambda: run.out.count("GENERATING") == 2)
    run.kill(signal.SIGINT)
    assert run.wait(60) == [130, 130]
    assert run.err.count("egrsd.py: stopped after step 3") == 1 and "Traceback" not in run.err, run.err
    assert newest(tmp_path / "run") == "step_3"

# ------------------------------------------- a new machine with a GPU: pytest -m gpu -s, under 10 minutes on one of 80 GB

GIB = 2**30
SHAPE = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
             head_dim=128, vocab_size=151936, tie_word_embeddings=False)  # Qwen3-8B
CALCULATED = {False: 11.0 + 2.3, True: 1.6 + 2.3}  # GiB of a student pass by grad_checkpoint, with the head's float32 copy


@pytest.fixture(scope="session")
def big(request):
    """A model of the real shape with random weights, its adapter as after some tens of steps -> model, config, device."""
    from transformers import AutoModelForCausalLM, Qwen3Config
    if "gpu" not in request.config.option.markexpr or not torch.cuda.is_available():  # comes before left_out
        pytest.skip("only with -m gpu, on a GPU")
    device = egrsd.start_distributed()

    def load_base(path, dtype, device):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), dtype=getattr(torch, egrsd.resolved(dtype)))
        model.model.norm.weight.data.fill_(5.0)  # logits of a spread of 6: some tokens sure, some not
        return model.eval()

    cfg, real = egrsd.Config(gamma=1.0, window=5), egrsd.load_base
    egrsd.load_base = load_base
    model = egrsd.load_model(cfg, device)
    egrsd.load_base = real
    for name, p in egrsd.adapter_params(model, "default").items():
        if "lora_B" in name:
            p.data.normal_(0, 2e-4)
    yield model, cfg, device
    egrsd.leave_group()


def random_rollouts(count, prompt, completion, reference):
    ids = torch.Generator().manual_seed(0)
    draw = [torch.randint(SHAPE["vocab_size"], (n,), generator=ids).tolist() for n in (prompt, completion, reference) * count]
    return [egrsd.Rollout(i, {}, draw[3 * i], draw[3 * i + 2] + draw[3 * i], draw[3 * i + 1], advantage=(0.5, -0.5)[i % 2],
                          sampler_logp=torch.zeros(completion)) for i in range(count)]


def peak(call):
    """GiB above what was allocated before, seconds; the second of two calls."""
    for _ in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB, time.perf_counter() - start


@gpu
def test_gpu_process_group_carries_figures_by_gloo_and_gradients_by_nccl(big):
    ones = torch.ones(8, device=big[2])
    torch.distributed.all_reduce(ones)
    assert egrsd.gather(dict(a=1)) == [dict(a=1)] and ones.tolist() == [1.0] * 8


@gpu
@pytest.mark.parametrize("rows", [1, 7, 511, 1300])
def test_gpu_head_in_bf16_under_tf32_agrees_with_float64(rows, big):
    torch.set_float32_matmul_precision("highest")  # as vLLM leaves it
    weight = big[0].get_output_embeddings().weight.detach()
    hidden = (5 * torch.randn(rows, weight.shape[1], device=big[2])).to(weight.dtype).requires_grad_()
    targets = torch.randint(len(weight), (rows,), device=big[2])
    logp, entropy = egrsd.logp_and_entropy(hidden, weight, targets)
    logp.sum().backward()
    some = slice(0, 32)
    log_p = (hidden[some].detach().double() @ weight.double().T).log_softmax(-1)
    gradient = weight.double()[targets[some]] - log_p.exp() @ weight.double()
    error = (logp[some] - log_p.gather(1, targets[some, None])[:, 0]).abs().max().item()
    slope = ((hidden.grad[some].double() - gradient).norm() / gradient.norm()).item()
    print(f"\nhead, {rows} rows: log p {error:.1e} nats, entropy {(entropy[some] + (log_p.exp() * log_p).sum(-1)).abs().max():.1e}, "
          f"gradient {slope:.1e} off float64")
    assert error < 2e-3 and slope < 0.02 and torch.get_float32_matmul_precision() == "highest"


@gpu
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gpu_memory_and_seconds_of_teacher_and_student_pass_at_the_real_shape(checkpoint, big):
    model, cfg, _ = big
    cfg = egrsd.dataclasses.replace(cfg, grad_checkpoint=checkpoint)
    model.gradient_checkpointing_enable({"use_reentrant": False}) if checkpoint else model.gradient_checkpointing_disable()
    for p in egrsd.adapter_params(model, "default").values():
        p.grad = torch.zeros_like(p)
    rollouts = random_rollouts(4, 250, 1024, 2000)
    teacher, student = peak(lambda: egrsd.teach(model, rollouts, cfg)), peak(lambda: egrsd.learn(model, rollouts, cfg, 5.0, 4096))
    print(f"\n{torch.cuda.get_device_name()}, checkpointing {checkpoint}: teacher +{teacher[0]:.1f} GiB {teacher[1]:.2f} s, "
          f"student +{student[0]:.1f} GiB {student[1]:.2f} s (calculated +{CALCULATED[checkpoint]:.1f})")
    assert student[0] < 1.15 * CALCULATED[checkpoint]
    alone, together = ([], [])
    for logps, micro_batch in ((alone, 1), (together, 4)):
        egrsd.teach(model, rollouts, egrsd.dataclasses.replace(cfg, micro_batch=micro_batch))
        logps += [r.teacher_logp for r in rollouts]
    assert (torch.cat(alone) - torch.cat(together)).abs().mean() < 0.1  # nats: rounding of bf16


@gpu
def test_gpu_snapshot_restores_bit_for_bit(big, tmp_path):
    model, cfg, device = big
    params = list(egrsd.adapter_params(model, "default").values())
    optimizer = torch.optim.AdamW(params, lr=5e-6)
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    state = egrsd.restore(tmp_path, model, optimizer, egrsd.Welford())  # of an empty folder: where a run begins
    start = time.perf_counter()
    egrsd.save_snapshot(tmp_path, model, optimizer, egrsd.Welford(), {**state, "step": 1}, {}, "card")
    print(f"\nsnapshot in {time.perf_counter() - start:.1f} s")
    kept = [p.detach().clone() for p in params]
    for p in params:
        p.data.zero_()
    again = torch.optim.AdamW(params, lr=5e-6)
    assert egrsd.restore(tmp_path, model, again, egrsd.Welford())["step"] == 1
    assert all(torch.equal(a, p) for a, p in zip(kept, params))
    assert {x.device for entry in again.state.values() for name, x in entry.items() if name != "step"} == {device}


@gpu
def test_gpu_hf_engine_passes_the_proof_and_samples(big):
    model, engine = big[0], egrsd.HfEngine(big[0], [151645])
    egrsd.prove_handover(model, engine, [1, 2, 3])
    drawn = dict((i, ids) for i, ids, _ in engine.generate([[1, 2, 3], [4]], [5, 6], 8, **egrsd.SAMPLING))
    assert sorted(drawn) == [0, 1] and all(drawn.values())


@gpu
@needs_vllm
@pytest.mark.parametrize("cards", [1, 2])
def test_gpu_vllm_trains_with_graphs_and_lora_and_on_two_cards_tensor_parallel(cards, small, tmp_path):
    if torch.cuda.device_count() < cards:
        pytest.skip("one card")
    flags = [*small, "--engine", "vllm", "--steps", 6, "--tensor_parallel", cards, "--engine_memory", 0.2, "--out", tmp_path / "run"]
    forked(*flags, ranks=cards)
    assert max(m["engine_gap_mean"] for m in read(tmp_path / "run" / "metrics.jsonl")) < 0.2


# ------------------------------------------- tables of the grading tests
# (completion, gold, what a fair grader says, why ours says otherwise or None)

N400 = "1234567890" * 40
M400 = N400[:-1] + "1"
F400 = "0." + "1234567890" * 40
G400 = F400[:-1] + "1"
PAIRS = [
    # the 263 pairs of before: plain answers, units, physics, MATH and Minerva layouts
    (r"So the answer is \boxed{42}.", "42", True, None),
    (r"So the answer is \boxed{43}.", "42", False, None),
    (r"\boxed{042}", "42", True, None),
    (r"\boxed{+7}", "7", True, None),
    (r"\boxed{-7}", "7", False, None),
    (r"\boxed{-7}", "-7", True, None),
    (r"\boxed{-0}", "0", True, None),
    (r"\boxed{ 18 }", "18", True, None),
    (r"\boxed{$18$}", "18", True, None),
    (r"\boxed{\$18}", "18", True, None),
    (r"\boxed{\$1,234.50}", "1234.5", True, None),
    (r"\boxed{3.50}", "3.5", True, None),
    (r"\boxed{3.05}", "3.5", False, None),
    (r"\boxed{18.0}", "18", True, None),
    (r"\boxed{.5}", "0.5", True, None),
    (r"\boxed{1,234}", "1234", True, None),
    (r"\boxed{1234}", "1,234", True, None),
    (r"\boxed{1,234,567.25}", "1234567.25", True, None),
    (r"\boxed{12,34}", "1234", False, None),
    (r"\boxed{1{,}234}", "1234", True, None),
    (r"\boxed{0.1}", "0.10000000001", False, None),
    (r"so \boxed{\frac{1}{2}}", "1/2", True, None),
    (r"so \boxed{\frac{1}{2}}", "0.5", True, None),
    (r"so \boxed{0.5}", r"\frac12", True, None),
    (r"so \boxed{\dfrac{2}{4}}", r"\frac{1}{2}", True, None),
    (r"so \boxed{\tfrac{1}{3}}", "0.5", False, None),
    (r"so \boxed{-\frac{3}{4}}", r"\frac{-3}{4}", True, None),
    (r"so \boxed{\frac{3}{4}}", r"-\frac{3}{4}", False, None),
    (r"so \boxed{2\frac{1}{2}}", "2.5", True, None),
    (r"so \boxed{2 1/2}", "2.5", True, "a mixed number with a plain fraction is not read"),
    (r"so \boxed{\frac{22}{7}}", r"\pi", False, None),
    (r"so \boxed{0.333}", r"\frac13", False, None),
    (r"\boxed{25\%}", "25", True, None),
    (r"\boxed{25\%}", r"25\%", True, None),
    (r"\boxed{25\%}", "0.25", True, None),
    (r"\boxed{25\%}", r"52\%", False, None),
    (r"\boxed{25\%}", "2.5", False, None),
    (r"\boxed{12\text{ cm}}", "12", True, None),
    (r"\boxed{12}", r"12\text{ cm}", True, None),
    (r"\boxed{12\ \mathrm{m}}", "13", False, None),
    (r"\boxed{60^\circ}", "60", True, None),
    (r"\boxed{60^{\circ}}", r"60^\circ", True, None),
    (r"\boxed{60^\circ}", "30", False, None),
    (r"\boxed{5\text{ dollars}}", "5", True, None),
    (r"\boxed{10 \text{ apples}}", "10", True, None),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True, None),
    (r"\boxed{2\sqrt2}", r"2\sqrt{2}", True, None),
    (r"\boxed{\sqrt{2}}", r"2\sqrt{2}", False, None),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt2}{2}", True, None),
    (r"\boxed{\pi/2}", r"\frac{\pi}{2}", True, None),
    (r"\boxed{3.14159}", r"\pi", False, None),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", True, None),
    (r"\boxed{(x+1)^2}", "x^2+2x", False, None),
    (r"\boxed{x=5}", "5", True, None),
    (r"\boxed{x=6}", "5", False, None),
    (r"\boxed{2^{10}}", "1024", True, None),
    (r"\boxed{\{1,2,3\}}", r"\{3,2,1\}", True, None),
    (r"\boxed{\{1,2\}}", r"\{1,2,3\}", False, None),
    (r"\boxed{1,2}", "2,1", True, None),
    (r"\boxed{[2,3)}", "[2,3)", True, None),
    (r"\boxed{[2,3]}", "[2,3)", False, None),
    (r"\boxed{(-\infty, 2] \cup (3, \infty)}", r"(-\infty,2]\cup(3,\infty)", True, None),
    (r"\boxed{(1, 2)}", "(1,2)", True, None),
    (r"\boxed{(2,1)}", "(1,2)", False, None),
    (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True, None),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True, None),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", True, None),
    (r"\boxed{\text{Alice}}", r"\text{Evelyn}", False, None),
    (r"\boxed{\text{(B)}}", "B", True, None),
    (r"\boxed{C}", r"\text{(B)}", False, None),
    (r"First \boxed{1}, no: \boxed{2}.", "2", True, None),
    (r"First \boxed{2}, no: \boxed{1}.", "2", False, None),
    (r"\boxed{\boxed{5}}", "5", True, None),
    (r"First \boxed{7}, then \boxed{\frac{1}{", "7", True, None),
    (r"\boxed{1 and then \boxed{2}", "2", True, None),
    (r"\boxed {9}", "9", True, None),
    (r"{ stray \boxed{9}", "9", True, None),
    (r"} stray \boxed{9} }", "9", True, None),
    (r"\boxed{\left\{ \frac{1}{2} \right\}}", r"\{0.5\}", True, None),
    (r"The answer is 42.", "42", False, None),
    ("", "42", False, None),
    (r"\boxed{}", "42", False, None),
    (r"\boxed{}", "", False, None),
    (r"\boxed{ }", " ", False, None),
    (r"\boxed{42", "42", False, None),
    (r"\fbox{42}", "42", True, None),
    (r"\boxed{\frac{}{}{{}}}", "42", False, None),
    (r"\boxed{asdf 42 qwer}", "42", False, None),
    (r"\boxed{42 or 43}", "42", False, None),
    (r"\boxed{41, 42, 43}", "42", False, None),
    (r"\boxed{\text{the answer is } 41}", "42", False, None),
    (r"\boxed{\frac{1}{0}}", "0", False, None),
    (r"\boxed{\frac{1}{0}}", r"\infty", False, None),
    (r"\boxed{1e999999999}", "1", False, None),
    (r"\boxed{10^{10^{10}}}", "10", False, None),
    (r"\boxed{10^{10^{9}}\%}", r"10\%", False, None),
    (r"\boxed{9^{9^{9^{9}}}}", "9", False, None),
    (r"\boxed{100000000!}", "1", False, None),
    (r"\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}", "1", False, None),
    (r"\boxed{" + N400 + "}", N400, True, None),
    (r"\boxed{" + M400 + "}", N400, False, None),
    (r"\boxed{" + F400 + "}", F400, True, None),
    (r"\boxed{" + G400 + "}", F400, False, None),
    (r"\boxed{" + "7" * 100_000 + "}", "7", False, None),
    (r"\boxed{12 \text{ m/s}}", "12", True, None),
    (r"\boxed{12~\mathrm{m/s}}", "12", True, None),
    (r"\boxed{12 m/s}", "12", True, "a bare unit is the variables m and s"),
    (r"\boxed{13 \text{ m/s}}", "12", False, None),
    (r"\boxed{0.45 \text{ kg}}", "0.45", True, None),
    (r"\boxed{45 \text{ g}}", "0.45", False, None),
    (r"\boxed{3.7 \mathrm{~eV}}", "3.7", True, None),
    (r"\boxed{7.3 \mathrm{~eV}}", "3.7", False, None),
    (r"\boxed{250 \text{ nm}}", "250", True, None),
    (r"\boxed{205 \text{ nm}}", "250", False, None),
    (r"\boxed{1.50 \text{ Angstroms}}", "1.5", True, None),
    (r"\boxed{300 \text{ K}}", "300", True, None),
    (r"\boxed{27^{\circ}\mathrm{C}}", "27", True, None),
    (r"\boxed{72^\circ}", "27", False, None),
    (r"\boxed{8.5 \times 10^{3} \text{ J/mol}}", "8500", True, None),
    (r"\boxed{5 \Omega}", "5", True, "Omega is a variable"),
    (r"\boxed{5 \text{ hours}}", "5", True, None),
    (r"\boxed{6 \text{ hours}}", "5", False, None),
    (r"\boxed{20 \text{ parsecs}}", "20", True, None),
    (r"\boxed{-13.6 \text{ eV}}", "-13.6", True, None),
    (r"\boxed{13.6 \text{ eV}}", "-13.6", False, None),
    (r"\boxed{4.5e33}", "4.5e33", True, None),
    (r"\boxed{4.5e33}", r"4.5 \times 10^{33}", True, None),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33", True, None),
    (r"\boxed{4.5 \cdot 10^{33}}", "4.5e33", True, None),
    (r"\boxed{4.5 \times 10^{33} \text{ erg/s}}", "4.5e33", True, None),
    (r"\boxed{4.5 \times 10^{32}}", "4.5e33", False, None),
    (r"\boxed{5.4 \times 10^{33}}", "4.5e33", False, None),
    (r"\boxed{4.6e33}", "4.5e33", False, None),
    (r"\boxed{1.6 \times 10^{-19}}", r"1.6 \times 10^{-19}", True, None),
    (r"\boxed{1.6 \times 10^{-19}}", "1.6e-19", True, None),
    (r"\boxed{1.60 \cdot 10^{-19} \text{ C}}", r"1.6 \times 10^{-19}", True, None),
    (r"\boxed{1.7 \times 10^{-19}}", r"1.6 \times 10^{-19}", False, None),
    (r"\boxed{1.6 \times 10^{-18}}", r"1.6 \times 10^{-19}", False, None),
    (r"\boxed{-1.6 \times 10^{-19}}", r"1.6 \times 10^{-19}", False, None),
    (r"\boxed{0}", r"1.6 \times 10^{-19}", False, None),
    (r"\boxed{2e-8}", "3e-8", False, None),
    (r"\boxed{0.00000002}", "0.00000003", False, None),
    (r"\boxed{2 \times 10^{-8}}", "0.00000002", True, None),
    (r"\boxed{3 \times 10^{-8}}", "0.00000002", False, None),
    (r"\boxed{1e3}", "1000", True, None),
    (r"\boxed{1.0e3}", "1001", False, None),
    (r"\boxed{6.02 \times 10^{23}}", r"6.02 \times 10^{23}", True, None),
    (r"\boxed{6.02 \times 10^{22}}", r"6.02 \times 10^{23}", False, None),
    (r"\boxed{2.5 \times 10^5}", "250000", True, None),
    (r"\boxed{2.5 \times 10^5}", "25000", False, None),
    (r"\boxed{10^{-3}}", "0.001", True, None),
    (r"\boxed{x = 3}", "3", True, None),
    (r"\boxed{x = 3}", "x=3", True, None),
    (r"\boxed{3}", "x=3", True, None),
    (r"\boxed{x = 4}", "x = 3", False, None),
    (r"\boxed{y = 3}", "x = 3", False, None),
    (r"\boxed{v = 12 \text{ m/s}}", "12", True, None),
    (r"\boxed{\approx 3.2}", "3.2", True, None),
    (r"\boxed{x \approx 3.2}", "3.2", True, None),
    (r"\boxed{\approx 3.3}", "3.2", False, None),
    (r"\boxed{\sim 100}", "100", True, None),
    (r"\boxed{\pm 2}", r"\{2,-2\}", True, None),
    (r"\boxed{\pm 2}", "2", False, None),
    (r"\boxed{3 \pm \sqrt{5}}", r"3+\sqrt5, 3-\sqrt5", True, None),
    (r"\boxed{3 \pm \sqrt{5}}", r"3 \pm \sqrt{6}", False, None),
    (r"\boxed{\frac{m g}{k}}", r"\frac{mg}{k}", True, None),
    (r"\boxed{\frac{k}{mg}}", r"\frac{mg}{k}", False, None),
    (r"\boxed{\sqrt{2 g h}}", r"\sqrt{2gh}", True, None),
    (r"\boxed{\sqrt{g h}}", r"\sqrt{2gh}", False, None),
    (r"\boxed{v=\sqrt{2gh}}", r"\sqrt{2gh}", True, None),
    (r"\boxed{I_0 e^{-t/\tau}}", r"I_{0} e^{-\frac{t}{\tau}}", True, None),
    (r"\boxed{I_0 e^{t/\tau}}", r"I_{0} e^{-\frac{t}{\tau}}", False, None),
    (r"\boxed{\frac{1}{2} m v^2}", r"\frac{m v^{2}}{2}", True, None),
    (r"\boxed{\omega_0 t}", r"\omega_{0} t", True, None),
    (r"\boxed{\omega_1 t}", r"\omega_{0} t", False, None),
    (r"\boxed{e^{-t}\cos(2t)}", r"\cos(2t) e^{-t}", True, None),
    (r"\boxed{e^{-t}\sin(2t)}", r"\cos(2t) e^{-t}", False, None),
    (r"\boxed{\ln 2}", r"\ln(2)", True, None),
    (r"\boxed{\ln 3}", r"\ln(2)", False, None),
    (r"\boxed{\arctan(2)}", r"\tan^{-1}(2)", True, None),
    (r"\boxed{y' = 2y}", r"y'=2y", True, None),
    (r"\boxed{[-2,7]}", "[-2,7]", True, None),
    (r"\boxed{[-2,7)}", "[-2,7]", False, None),
    (r"\boxed{x \in [-2,7]}", "[-2,7]", True, None),
    (r"\boxed{-2 \le x \le 7}", "[-2,7]", True, "a relation is not an interval"),
    (r"\boxed{-2 < x < 7}", "[-2,7]", False, None),
    (r"\boxed{(-\infty, 0) \cup (0, \infty)}", r"(-\infty,0)\cup(0,\infty)", True, None),
    (r"\boxed{(-\infty, \infty)}", r"(-\infty,0)\cup(0,\infty)", False, None),
    (r"\boxed{\left[\frac{1}{2}, 1\right)}", r"[0.5,1)", True, None),
    (r"\boxed{\left(\frac{1}{2}, 1\right)}", r"\left[\frac{1}{2},1\right]", False, None),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True, None),
    (r"\boxed{\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True, None),
    (r"\boxed{\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False, None),
    (r"\boxed{\begin{pmatrix} 1/2 \\ -1 \end{pmatrix}}", r"\begin{pmatrix} \frac{1}{2} \\ -1 \end{pmatrix}", True, None),
    (r"\boxed{\begin{pmatrix} 1/2 & -1 \end{pmatrix}}", r"\begin{pmatrix} \frac{1}{2} \\ -1 \end{pmatrix}", False, None),
    (r"\boxed{\begin{pmatrix} 1/2 \\ 1 \end{pmatrix}}", r"\begin{pmatrix} \frac{1}{2} \\ -1 \end{pmatrix}", False, None),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True, None),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", True, None),
    (r"\boxed{\textbf{Evelyn}}", r"\text{Evelyn}", True, None),
    (r"\boxed{\text{Briana}}", r"\text{Evelyn}", False, None),
    (r"\boxed{\text{even}}", r"\text{odd}", False, None),
    (r"\boxed{\text{Even}}", r"\text{even}", True, None),
    (r"\boxed{\text{(C)}}", "C", True, None),
    (r"\boxed{\text{C}}", r"\text{(C)}", True, None),
    (r"\boxed{\text{(D)}}", r"\text{(C)}", False, None),
    (r"\boxed{\text{east}}", r"\text{seat}", False, None),
    (r"\boxed{east}", r"\text{seat}", False, None),
    (r"\boxed{east}", "seat", False, None),
    (r"\boxed{\text{Monday}}", r"\text{Sunday}", False, None),
    (r"\boxed{2516_8}", "2516_8", True, None),
    (r"\boxed{2516_{8}}", "2516_8", True, None),
    (r"\boxed{2516}", "2516_8", True, "a base is compared as text"),
    (r"\boxed{2516_7}", "2516_8", False, None),
    (r"\boxed{2561_8}", "2516_8", False, None),
    (r"\boxed{6r^2-4r-24}", "6r^2 - 4r - 24", True, None),
    (r"\boxed{-24-4r+6r^2}", "6r^2-4r-24", True, None),
    (r"\boxed{2(3r^2-2r-12)}", "6r^2-4r-24", True, None),
    (r"\boxed{6r^2-4r+24}", "6r^2-4r-24", False, None),
    (r"\boxed{6s^2-4s-24}", "6r^2-4r-24", False, None),
    (r"\boxed{(x-3)(x+3)}", "x^2-9", True, None),
    (r"\boxed{(x-3)^2}", "x^2-9", False, None),
    (r"\boxed{\frac{x+2}{7}}", r"\frac{1}{7}x+\frac{2}{7}", True, None),
    (r"\boxed{p - q}", "q-p", False, None),
    (r"\boxed{2x+3y=5}", "2x+3y-5=0", True, "equations side by side, never rearranged"),
    (r"\boxed{4x+6y=10}", "2x+3y=5", True, "equations side by side, never rearranged"),
    (r"\boxed{2x+3y=6}", "2x+3y=5", False, None),
    (r"\boxed{y=2x+3}", "2x+3", True, None),
    (r"\boxed{11\sqrt{2}}", r"\sqrt{242}", True, None),
    (r"\boxed{12\sqrt{2}}", r"\sqrt{242}", False, None),
    (r"\boxed{3+4i}", "4i+3", True, None),
    (r"\boxed{3-4i}", "3+4i", False, None),
    (r"\boxed{(3, -1, 2)}", "(3,-1,2)", True, None),
    (r"\boxed{(3, 2, -1)}", "(3,-1,2)", False, None),
    (r"\boxed{(3, -1)}", "(3,-1,2)", False, None),
    (r"\boxed{\left(\frac{8}{5}, -\frac{35}{2}\right)}", r"(1.6,-17.5)", True, None),
    (r"\boxed{1, -2, 4}", "4,1,-2", True, None),
    (r"\boxed{1, -2}", "4,1,-2", False, None),
    (r"\boxed{(1,2),(3,4)}", "(3,4),(1,2)", True, None),
    (r"\boxed{(1,2),(4,3)}", "(1,2),(3,4)", False, None),
    (r"\boxed{x = 1 \text{ or } x = 2}", "1,2", True, None),
    (r"\boxed{1 \text{ and } 2}", "1,2", True, None),
    (r"\boxed{70^\circ}", "70", True, None),
    (r"\boxed{70 \text{ degrees}}", r"70^\circ", True, None),
    (r"\boxed{70^\circ}", r"80^\circ", False, None),
    (r"\boxed{\$18.90}", r"\$18.90", True, None),
    (r"\boxed{18.90}", r"\$18.90", True, None),
    (r"\boxed{18.9}", r"\$18.90", True, None),
    (r"\boxed{\$18.09}", r"\$18.90", False, None),
    (r"\boxed{15\%}", "15", True, None),
    (r"\boxed{15\%}", r"51\%", False, None),
    (r"\boxed{10{,}000}", "10,000", True, None),
    (r"\boxed{10\,000}", "10000", True, None),
    (r"\boxed{1{,}000}", "10,000", False, None),
    (r"\boxed{\frac34}", r"\frac{3}{4}", True, None),
    (r"\boxed{\frac{3}{4}}", "75", False, None),
    (r"\boxed{0.\overline{3}}", r"\frac{1}{3}", True, "repeating decimals do not parse"),
    (r"\boxed{\sqrt[3]{27}}", "3", True, None),
    (r"\boxed{\binom{5}{2}}", "10", True, None),
    (r"\boxed{5!}", "120", True, None),
    (r"\boxed{\log_2 8}", "3", True, None),
    (r"\boxed{\infty}", r"\infty", True, None),
    (r"\boxed{-\infty}", r"\infty", False, None),
    (r"\boxed{n \equiv 3 \pmod 7}", "3", True, "congruences do not parse"),
    # found by thinking like a policy that looks for holes
    (r"\boxed{3}", r"3\text{ cm}, 4\text{ cm}", False, None),
    (r"\boxed{3\text{ km}}", r"3\text{ m}", False, None),
    (r"\boxed{5\text{ km}}", r"5", True, None),
    (r"\boxed{5}", r"5 \text{ km}", True, None),
    (r"\boxed{5\text{ mW}}", r"5\text{ MW}", False, None),
    (r"\boxed{1\text{ h }20\text{ min}}", r"1\text{ h }40\text{ min}", False, None),
    (r"\boxed{1\text{ h }20\text{ min}}", r"1\text{ h } 20\text{ min}", True, None),
    (r"\boxed{4\text{ red},5\text{ blue}}", r"4\text{ blue},5\text{ red}", False, None),
    (r"\boxed{5\text{ blue},4\text{ red}}", r"4\text{ red},5\text{ blue}", True, None),
    (r"\boxed{5,4}", r"4\text{ red},5\text{ blue}", False, None),
    (r"\boxed{4,5}", r"4\text{ red},5\text{ blue}", True, None),
    (r"\boxed{12\text{ m/s}}", r"12\,\mathrm{m}/\mathrm{s}", True, None),
    (r"\boxed{12\text{ m/s}^2}", r"12\text{ m/s}", False, None),
    (r"\boxed{9.8\ \mathrm{m/s^2}}", r"9.8", True, None),
    (r"\boxed{9.8\,\mathrm{m}\cdot\mathrm{s}^{-2}}", r"9.8", True, None),
    (r"\boxed{5\text{ square feet}}", r"5\text{ feet}", False, None),
    (r"\boxed{10\text{ cm}^2}", r"10\text{ cm}^3", False, None),
    (r"\boxed{10\text{ cm}^2}", r"10\text{ cm}^{2}", True, None),
    (r"\boxed{10\text{ cm}^2}", r"10", True, None),
    (r"\boxed{6 \text{ feet } 2 \text{ inches}}", r"6", False, None),
    (r"\boxed{\$5}", r"5\text{ dollars}", True, None),
    (r"\boxed{\$5}", r"5\text{ cents}", False, None),
    (r"\boxed{5 \text{ thousand}}", r"5", False, None),
    (r"\boxed{5\text{ million}}", r"5", False, None),
    (r"\boxed{5\text{ hundred}}", r"5", False, None),
    (r"\boxed{2\text{ dozen}}", r"2", False, None),
    (r"\boxed{5\text{ billion dollars}}", r"5\text{ dollars}", False, None),
    (r"\boxed{\$5 \text{ million}}", r"5", False, None),
    (r"\boxed{5 million}", r"5", False, None),
    (r"\boxed{3\;000}", r"3000", True, None),
    (r"\boxed{3\:000\:000}", r"3000000", True, None),
    (r"\boxed{3~000}", r"3000", True, None),
    (r"\boxed{3\ 000}", r"0", False, None),
    (r"\boxed{0}", r"3\!000", False, None),
    (r"\boxed{12\,345.5}", r"12345.5", True, None),
    (r"\boxed{0.123\,456}", r"56.088", False, None),
    (r"\boxed{1\,2}", r"2", False, None),
    (r"\boxed{1\,2}", r"12", False, None),
    (r"\boxed{12 34}", r"1234", False, None),
    (r"\boxed{12 34}", r"408", False, None),
    (r"\boxed{2 3}", r"5", False, None),
    (r"\boxed{2 3}", r"6", False, None),
    (r"\boxed{7 000}", r"0", False, None),
    (r"\boxed{10\,000}", r"10\,001", False, None),
    (r"\boxed{10\,000\text{ m}}", r"10000", True, None),
    (r"\boxed{(1\,000, 2)}", r"(1000,2)", True, None),
    (r"\boxed{n\text{ is prime}}", r"n\text{ is composite}", False, None),
    (r"\boxed{n}", r"n\text{ is prime}", False, None),
    (r"\boxed{x\text{ is odd}}", r"x\text{ is even}", False, None),
    (r"\boxed{8\text{ a.m.}}", r"8\text{ p.m.}", False, None),
    (r"\boxed{8\text{ AM}}", r"8\text{ PM}", False, None),
    (r"\boxed{8}", r"8\text{ p.m.}", False, None),
    (r"\boxed{3\text{ km north}}", r"3\text{ km south}", False, None),
    (r"\boxed{3}", r"3\text{ km north}", False, None),
    (r"\boxed{20\text{ BC}}", r"20\text{ AD}", False, None),
    (r"\boxed{5\text{ more}}", r"5", False, None),
    (r"\boxed{5\text{ or more}}", r"5", False, None),
    (r"\boxed{\text{at least }5}", r"5", False, None),
    (r"\boxed{\text{at most }5}", r"\text{at least }5", False, None),
    (r"\boxed{\text{not }5}", r"5", False, None),
    (r"\boxed{5\text{ if }n>2}", r"5", False, None),
    (r"\boxed{\text{minus }5}", r"5", False, None),
    (r"\boxed{\text{True}}", r"\text{False}", False, None),
    (r"\boxed{\text{Yes}}", r"\text{No}", False, None),
    (r"\boxed{Yes}", r"\text{Yes}", True, None),
    (r"\boxed{yes}", r"no", False, None),
    (r"\boxed{odd}", r"\text{odd}", True, None),
    (r"\boxed{5\text{ north}}", r"5", False, None),
    (r"\boxed{50\text{ m left}}", r"50\text{ m right}", False, None),
    (r"\boxed{\text{increasing}}", r"\text{decreasing}", False, None),
    (r"\boxed{5^\circ\text{ above}}", r"5^\circ\text{ below}", False, None),
    (r"\boxed{3\text{ clockwise}}", r"3\text{ counterclockwise}", False, None),
    (r"\boxed{3}", r"3\text{ clockwise}", False, None),
    (r"\boxed{2\text{ remainder }1}", r"2", False, None),
    (r"\boxed{4\text{ digits}}", r"4", False, None),
    (r"\boxed{5\text{ pairs}}", r"5", False, None),
    (r"\boxed{\frac12\text{ of }x}", r"\frac12", False, None),
    (r"\boxed{20\text{ percent}}", r"20", True, None),
    (r"\boxed{20\text{ percent}}", r"20\%", True, None),
    (r"\boxed{20%}", r"20\%", True, None),
    (r"\boxed{0.2}", r"20\%", True, None),
    (r"\boxed{2000}", r"20\%", False, None),
    (r"\boxed{20\%}", r"2", False, None),
    (r"\boxed{10\%, 20\%}", r"10, 20", True, None),
    (r"\boxed{10\%, 20\%}", r"0.1, 0.2", True, None),
    (r"\boxed{10\%, 20\%}", r"10\%, 25\%", False, None),
    (r"\boxed{10^{-300}}", r"10^{-301}", False, None),
    (r"\boxed{\frac{1}{10^{50}}}", r"0", False, None),
    (r"\boxed{2^{-500}}", r"2^{-501}", False, None),
    (r"\boxed{\frac{1}{100!}}", r"\frac{1}{101!}", False, None),
    (r"\boxed{e^{-1000}}", r"e^{-2000}", False, None),
    (r"\boxed{1+10^{-60}}", r"1", False, None),
    (r"\boxed{\sqrt{2}+10^{-60}}", r"\sqrt{2}", False, None),
    (r"\boxed{3^{-100}}", r"\frac{1}{3^{100}}", True, None),
    (r"\boxed{2.50\times10^{-40}}", r"2.5\times 10^{-40}", True, None),
    (r"\boxed{2.5\times10^{-40}}", r"2.6\times10^{-40}", False, None),
    (r"\boxed{1 - 2^{-64}}", r"\frac{2^{64}-1}{2^{64}}", True, None),
    (r"\boxed{0.3333333333333333}", r"\frac13", False, None),
    (r"\boxed{1e-400}", r"0", False, None),
    (r"\boxed{\frac{2}{3}}", r"0.6667", False, None),
    (r"\boxed{\sin(10^{-50})}", r"0", False, None),
    (r"\boxed{I=2}", r"I=3", False, None),
    (r"\boxed{5=5}", r"7=8", False, None),
    (r"\boxed{x=x}", r"y=2x", False, None),
    (r"\boxed{0=0}", r"y=2x", False, None),
    (r"\boxed{42=42}", r"42", True, None),
    (r"\boxed{0=1}", r"1", False, None),
    (r"\boxed{x=1}", r"x=2", False, None),
    (r"\boxed{x=x}", r"5", False, None),
    (r"\boxed{x=5=6}", r"6", False, None),
    (r"\boxed{y=2x+1}", r"y=2x+2", False, None),
    (r"\boxed{2x-y+1=0}", r"y=2x+1", True, "equations side by side, never rearranged"),
    (r"\boxed{x+y=1}", r"x+y=2", False, None),
    (r"\boxed{x^2+1=0}", r"x^2+2=0", False, None),
    (r"\boxed{x=1,y=2}", r"2,1", False, None),
    (r"\boxed{x=1,y=2}", r"1,2", True, None),
    (r"\boxed{x=1,y=2}", r"(1,2)", True, None),
    (r"\boxed{x=1,y=2}", r"(2,1)", False, None),
    (r"\boxed{x=1,y=2}", r"y=2,x=1", True, None),
    (r"\boxed{x=2,y=1}", r"x=1,y=2", False, None),
    (r"\boxed{(x,y)=(1,2)}", r"(1,2)", True, None),
    (r"\boxed{(x,y)=(2,1)}", r"(1,2)", False, None),
    (r"\boxed{f(x)=x^2}", r"x^2", True, None),
    (r"\boxed{f(x)=x^2=4}", r"4", False, None),
    (r"\boxed{1=2=3}", r"3", False, None),
    (r"\boxed{a=b=3}", r"3", True, None),
    (r"\boxed{\frac12=0.5}", r"0.5", True, None),
    (r"\boxed{x=3}", r"y=3", False, None),
    (r"\boxed{3=x}", r"x=3", True, "equations side by side, never rearranged"),
    (r"\boxed{x=2y}", r"y=2x", False, None),
    (r"\boxed{x=0}", r"0=0", False, None),
    (r"\boxed{2=x=3}", r"3", False, None),
    (r"\boxed{2x=6}", r"3", False, None),
    (r"\boxed{2x=6}", r"6", False, None),
    (r"\boxed{x>3}", r"(3,\infty)", True, "a relation is not an interval"),
    (r"\boxed{x\ge3}", r"(3,\infty)", False, None),
    (r"\boxed{x\ge 3}", r"[3,\infty)", True, "a relation is not an interval"),
    (r"\boxed{x<3}", r"x>3", False, None),
    (r"\boxed{3<x}", r"x>3", True, "a relation read from the right"),
    (r"\boxed{1<x<2}", r"(1,2)", True, "a relation is not an interval"),
    (r"\boxed{1<x\le2}", r"(1,2)", False, None),
    (r"\boxed{1<2}", r"\emptyset", False, None),
    (r"\boxed{1<2}", r"3<4", False, None),
    (r"\boxed{2<1}", r"\emptyset", False, None),
    (r"\boxed{x<x}", r"\emptyset", True, "no variable is left in it"),
    (r"\boxed{x\ne3}", r"x\ne 4", False, None),
    (r"\boxed{x \neq 3}", r"x\ne 3", True, None),
    (r"\boxed{x>3}", r"3", False, None),
    (r"\boxed{x>3}", r"x=3", False, None),
    (r"\boxed{x<1 \text{ or } x>2}", r"x<1 \text{ and } x>2", False, None),
    (r"\boxed{x<1 \text{ or } x>2}", r"x<1\text{ or }x>2", True, None),
    (r"\boxed{[1,2]}", r"(1,2)", False, None),
    (r"\boxed{[1,2]}", r"1,2", False, None),
    (r"\boxed{(1,2)\cup(3,4)}", r"(3,4)\cup(1,2)", True, None),
    (r"\boxed{(1,2)\cup(3,4)}", r"(1,4)", False, None),
    (r"\boxed{(1,2)\cup(3,4)}", r"(1,2)\cap(3,4)", False, None),
    (r"\boxed{\mathbb{R}}", r"(-\infty,\infty)", True, "a set named against an interval: another number of parts"),
    (r"\boxed{(-\infty, 1)}", r"(1,\infty)", False, None),
    (r"\boxed{x>0}", r"y>0", False, None),
    (r"\boxed{x \in (1,2)}", r"(1,2)", True, None),
    (r"\boxed{x \in (1,2)}", r"y \in (1,2)", False, None),
    (r"\boxed{(0.5,1)}", r"(\frac12,1)", True, None),
    (r"\boxed{x^2<0}", r"x^2<-1", False, None),
    (r"\boxed{1,2,3}", r"1,2", False, None),
    (r"\boxed{1,2}", r"1,2,3", False, None),
    (r"\boxed{1,1,2}", r"1,2,2", False, None),
    (r"\boxed{1,1}", r"1", False, None),
    (r"\boxed{1,1}", r"1,2", False, None),
    (r"\boxed{\{1,2\}}", r"(1,2)", False, None),
    (r"\boxed{\{2,1\}}", r"1,2", True, None),
    (r"\boxed{(2,1)}", r"1,2", False, None),
    (r"\boxed{(1,2)}", r"1,2", True, None),
    (r"\boxed{\{1\}}", r"1", True, "a set of one is not its element"),
    (r"\boxed{[1,2,3]}", r"(1,2,3)", False, None),
    (r"\boxed{(1,2,3)}", r"(1,3,2)", False, None),
    (r"\boxed{((1,2),3)}", r"(1,2,3)", False, None),
    (r"\boxed{\{(1,2),(3,4)\}}", r"\{(3,4),(1,2)\}", True, None),
    (r"\boxed{\{(1,2),(3,4)\}}", r"\{(2,1),(3,4)\}", False, None),
    (r"\boxed{(1,2),(3,4)}", r"(1,2)", False, None),
    (r"\boxed{42 or 43}", r"42", False, None),
    (r"\boxed{42,43}", r"42", False, None),
    (r"\boxed{42;43}", r"42", False, None),
    (r"\boxed{42 and 43}", r"42", False, None),
    (r"\boxed{42\text{ or }43}", r"42", False, None),
    (r"\boxed{42/43}", r"42", False, None),
    (r"\boxed{42\pm1}", r"42", False, None),
    (r"\boxed{\pm42}", r"42", False, None),
    (r"\boxed{\pm 1}", r"1,-1", True, None),
    (r"\boxed{\pm1\pm2}", r"3,-3", False, None),
    (r"\boxed{x=\pm 3}", r"3,-3", True, None),
    (r"\boxed{2\pm\sqrt3}", r"2+\sqrt3,2-\sqrt3", True, None),
    (r"\boxed{1,3,5,...}", r"1,3,5", False, None),
    (r"\boxed{1,3,5,\ldots}", r"1,3,5", False, None),
    (r"\boxed{\emptyset}", r"0", False, None),
    (r"\boxed{\emptyset}", r"\{\}", True, None),
    (r"\boxed{\{\}}", r"0", False, None),
    (r"\boxed{\{\emptyset\}}", r"\emptyset", False, None),
    (r"\boxed{\{0\}}", r"\emptyset", False, None),
    (r"\boxed{}", r"\emptyset", False, None),
    (r"\boxed{1,2}", r"12", False, None),
    (r"\boxed{1.2}", r"1,2", False, None),
    (r"\boxed{101;103}", r"101,103", True, None),
    (r"\boxed{101,104}", r"101,103", False, None),
    (r"\boxed{123,456}", r"456,123", True, None),
    (r"\boxed{123, 456}", r"123456", False, None),
    (r"\boxed{1,234}", r"1, 234", True, None),
    (r"\boxed{(1,234)}", r"1234", False, None),
    (r"\boxed{\{1,234\}}", r"1234", False, None),
    (r"\boxed{1,234, 5,678}", r"1234, 5678", True, None),
    (r"\boxed{(1,234, 5,678)}", r"(1234, 5678)", True, "commas between brackets part"),
    (r"\boxed{5,678, 1,234}", r"1234, 5678", True, None),
    (r"\boxed{1,234, 5,679}", r"1234, 5678", False, None),
    (r"\boxed{2020-05-06}", r"2021-06-06", False, None),
    (r"\boxed{3/4/2020}", r"6/8/2020", False, None),
    (r"\boxed{3:45}", r"3:46", False, None),
    (r"\boxed{3:45}", r"3:45", True, None),
    (r"\boxed{4:2}", r"2", False, None),
    (r"\boxed{12:30}", r"0.4", False, None),
    (r"\boxed{2-3-4}", r"-5", False, None),
    (r"\boxed{1:2}", r"0.5", False, None),
    (r"\boxed{10³}", r"103", False, None),
    (r"\boxed{10³}", r"1000", True, None),
    (r"\boxed{2½}", r"\frac{5}{2}", True, None),
    (r"\boxed{2½}", r"\frac{21}{2}", False, None),
    (r"\boxed{½}", r"0.5", True, None),
    (r"\boxed{2516₈}", r"25168", False, None),
    (r"\boxed{2516₈}", r"2516_8", True, None),
    (r"\boxed{5\mbox{ cm}}", r"5", True, None),
    (r"\boxed{⅓}", r"\frac13", True, None),
    (r"\boxed{x\leqslant3}", r"x\le 3", True, None),
    (r"\boxed{x\geqslant3}", r"x\ge 3", True, None),
    (r"\boxed{x=1,\quad y=2}", r"x=1, y=2", True, None),
    (r"\boxed{2 and 3}", r"3, 2", True, None),
    (r"\boxed{2 or 3}", r"2, 3", True, None),
    (r"\boxed{6E3}", r"6000", True, None),
    (r"\boxed{5\mathrm{i}}", r"5", False, None),
    (r"\boxed{5≈4}", r"5", False, None),
    (r"\boxed{5≅4}", r"5", False, None),
    (r"\boxed{5\approxeq 4}", r"5", False, None),
    (r"\boxed{2\frac12\pi}", r"\pi", False, None),
    (r"\boxed{100, 0}", r"100,000", False, None),
    (r"\boxed{1,1}", r"1,001", False, None),
    (r"\boxed{5\text{e-3}}", r"5", False, None),
    (r"\boxed{5\text{x^2}}", r"5", False, None),
    (r"\boxed{6\text{ m},5}", r"5\text{ m},6", False, None),
    (r"\boxed{√1.44}", r"0.44", False, None),
    (r"\boxed{√1.44}", r"1.2", True, None),
    (r"\boxed{101 _2}", r"101", False, None),
    (r"\boxed{5 sinx}", r"5", False, None),
    (r"\boxed{5\text{ root two}}", r"5", False, None),
    (r"\boxed{5 cos}", r"5", False, None),
    (r"\boxed{100,000}", r"100000", True, None),
    (r"\boxed{1,001}", r"1001", True, None),
    (r"\boxed{2e3}", r"2000", True, None),
    (r"\boxed{2\frac12}", r"2.5", True, None),
    (r"\boxed{3\text{ cm}, 5\text{ cm}}", r"5\text{ cm},3\text{ cm}", True, None),
    (r"\boxed{x=3, y=5}", r"y=5,x=3", True, None),
    (r"\boxed{3π}", r"3\pi", True, None),
    (r"\boxed{\sqrt5\mathrm{i}}", r"\sqrt5", False, None),
    (r"\boxed{5\text{ i}}", r"5", False, None),
    (r"\boxed{5\mathrm{\pi}}", r"5", False, None),
    (r"\boxed{5\text{ pi}}", r"5", False, None),
    (r"\boxed{100,0}", r"100,000", False, None),
    (r"\boxed{5,12}", r"12,005", False, None),
    (r"\boxed{2\frac12\sqrt3}", r"\sqrt3", False, None),
    (r"\boxed{\frac\pi2}", r"\frac{\pi}{2}", True, None),
    (r"\boxed{\frac{\sqrt3}2}", r"\frac{\sqrt{3}}{2}", True, None),
    (r"\boxed{4+3\mathrm{i}}", r"4+3i", True, None),
    (r"\boxed{\mathrm{e}^2}", r"e^2", True, None),
    (r"\boxed{\text{No solution}}", r"\text{no solution}", True, None),
    (r"\boxed{yes}", r"Yes", True, None),
    (r"\boxed{0x10}", r"0", False, None),
    (r"\boxed{\left|\begin{matrix}1&2\\3&4\end{matrix}\right|}", r"\begin{matrix}1&2\\3&4\end{matrix}", False, None),
    (r"\boxed{5\text{ m}}", r"5", True, None),
    (r"\boxed{5\text{ N}}", r"5", True, None),
    (r"\boxed{3\text{ mW}}", r"3\text{ MW}", False, None),
    (r"\boxed{5 tenfold}", r"5", False, None),
    (r"\boxed{30\%,20}", r"20\%,30", False, None),
    (r"\boxed{3,5}", r"5,3", True, None),
    (r"\boxed{7\text{ to }9}", r"7", False, None),
    (r"\boxed{10^{-2}}", r".01", True, None),
    (r"\boxed{x_1+x_2}", r"x_2+x_1", True, None),
    (r"\boxed{16,800,000}", r"16800000", True, None),
    (r"\boxed{1,000,500}", r"1000500", True, None),
    (r"\boxed{cats,dogs}", r"cats,gods", False, None),
    (r"\boxed{a\leftarrow b}", r"aarrow b", False, None),
    (r"\boxed{x=\mathbf{5}}", r"5", True, None),
    (r"\boxed{\mathbf{15}}", r"5", False, None),
    (r"\boxed{2①}", r"21", False, None),
    (r"\boxed{①}", r"1", False, None),
    (r"\boxed{x²}", r"x^2", True, None),
    (r"\boxed{10⁻³}", r"0.001", True, None),
    (r"\boxed{2ˣ}", r"2x", False, None),
    (r"\boxed{2ⁿ}", r"2n", False, None),
    (r"\boxed{10⁽²⁾}", r"20", False, None),
    (r"\boxed{５０}", r"50", True, None),
    (r"\boxed{𝟓}", r"5", True, None),
    (r"\boxed{−5}", r"-5", True, None),
    ('\\boxed{—5}', r"-5", True, None),
    ('\\boxed{5\u200b0}', r"50", True, None),
    (r"\boxed{√2}", r"\sqrt2", True, None),
    (r"\boxed{2√3}", r"2\sqrt{3}", True, None),
    (r"\boxed{√12}", r"2\sqrt3", True, None),
    (r"\boxed{√(x+1)}", r"\sqrt{x+1}", True, None),
    (r"\boxed{3 × 10⁵}", r"300000", True, None),
    (r"\boxed{3·5}", r"15", True, None),
    (r"\boxed{x ≤ 3}", r"x \le 3", True, None),
    (r"\boxed{x≥3}", r"x \geq 3", True, None),
    (r"\boxed{x ≠ 3}", r"x\neq 3", True, None),
    (r"\boxed{±2}", r"2,-2", True, None),
    (r"\boxed{∅}", r"\varnothing", True, None),
    (r"\boxed{(−∞,2]∪(3,∞)}", r"(-\infty,2]\cup(3,\infty)", True, None),
    (r"\boxed{x∈[1,2]}", r"[1,2]", True, None),
    (r"\boxed{2π}", r"2\pi", True, None),
    (r"\boxed{90°}", r"90^\circ", True, None),
    (r"\boxed{90°}", r"90^{\circ}", True, None),
    (r"\boxed{５，６}", r"5,6", True, None),
    ('\\boxed{1⁄2}', r"0.5", True, "the fraction slash outside of ½"),
    (r"\boxed{٤٢}", r"42", False, None),
    ('\\boxed{4\u202e2}', r"24", False, None),
    (r"\boxed{5㎡}", r"52", False, None),
    (r"\boxed{5²}", r"52", False, None),
    (r"\boxed{5²}", r"25", True, None),
    (r"\boxed{\boldsymbol{5}}", r"5", True, None),
    (r"\boxed{\mathbf{5}}", r"5", True, None),
    (r"\boxed{{5}}", r"5", True, None),
    (r"\boxed{\left\{1,2\right\}}", r"\{1,2\}", True, None),
    (r"\boxed{\dfrac{1}{2}}", r"\frac12", True, None),
    (r"\boxed{\displaystyle\frac12}", r"0.5", True, None),
    (r"\boxed{5\text{}}", r"5", True, None),
    (r"\boxed{\text{5}}", r"5", True, None),
    (r"\boxed{\text{5 apples}}", r"5", True, "a number within \\text{} with words"),
    (r"\boxed{\textbf{5}}", r"5", True, None),
    (r"\boxed{$5$}", r"5", True, None),
    (r"\boxed{\(5\)}", r"5", True, None),
    (r"\boxed{5.\,}", r"5", True, None),
    (r"\boxed{5\text{ cm}.}", r"5\text{ cm}", True, None),
    (r"\boxed{5;}", r"5", True, None),
    (r"\boxed{5,}", r"5", True, None),
    (r"\boxed{5.$}", r"5", True, None),
    (r"\boxed{-5.}", r"-5", True, None),
    (r"\boxed{(1, 2).}", r"(1,2)", True, None),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"(1,2)", True, "a column is not a tuple"),
    (r"\boxed{\begin{pmatrix}1&2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, None),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}2\\1\end{pmatrix}", False, None),
    (r"\boxed{\langle1,2\rangle}", r"\langle 1, 2\rangle", True, "unknown brackets are compared as text"),
    (r"\boxed{\frac{R}{r}}", r"1", False, None),
    (r"\boxed{X}", r"x", False, None),
    (r"\boxed{y'=2y}", r"y=2y", False, None),
    (r"\boxed{f'}", r"f", False, None),
    (r"\boxed{A^T}", r"A", False, None),
    (r"\boxed{1+2+\ldots+n}", r"1+2+n", False, None),
    (r"\boxed{1+\cdots+n}", r"1+n", False, None),
    (r"\boxed{\overline{AB}}", r"AB", False, None),
    (r"\boxed{\vec{a}}", r"a", False, None),
    (r"\boxed{\hat{x}}", r"x", False, None),
    (r"\boxed{0.\overline{3}}", r"0.3", False, None),
    (r"\boxed{\frac10}", r"\frac20", False, None),
    (r"\boxed{\frac{1}{0}}", r"\frac{2}{0}", False, None),
    (r"\boxed{0/0}", r"0", False, None),
    (r"\boxed{\infty}", r"-\infty", False, None),
    (r"\boxed{2\infty}", r"\infty", False, None),
    (r"\boxed{\infty-\infty}", r"0", False, None),
    (r"\boxed{4\sqrt{2}}", r"4", False, None),
    (r"\boxed{3\frac12}", r"3.5", True, None),
    (r"\boxed{3\cdot\frac12}", r"3.5", False, None),
    (r"\boxed{3(\frac12)}", r"1.5", True, None),
    (r"\boxed{3(\frac12)}", r"3.5", False, None),
    (r"\boxed{3\left(\frac{1}{2}\right)}", r"3.5", False, None),
    (r"\boxed{3!}", r"6", True, None),
    (r"\boxed{3!!}", r"720", False, None),
    (r"\boxed{|x|}", r"x", False, None),
    (r"\boxed{\xi}", r"xi", False, None),
    (r"\boxed{\sin 30}", r"\sin 30^\circ", False, None),
    (r"\boxed{\cos 60^\circ}", r"0.5", True, "a degree is a unit, not pi/180"),
    (r"\boxed{180^\circ}", r"\pi", True, "a degree is a unit, not pi/180"),
    (r"\boxed{180^\circ}", r"\pi/2", False, None),
    (r"\boxed{\tan45^\circ}", r"1", True, "a degree is a unit, not pi/180"),
    (r"\boxed{2(x+1)}", r"2x+2", True, None),
    (r"\boxed{\ln(2)}", r"\log(2)", False, None),
    (r"\boxed{\log_2 8}", r"3", True, None),
    (r"\boxed{\log_{2}{8}}", r"4", False, None),
    (r"\boxed{a/b}", r"b/a", False, None),
    (r"\boxed{x^10}", r"x^{10}", True, None),
    (r"\boxed{3+4i}", r"3-4i", False, None),
    (r"\boxed{4+3\mathrm{i}}", r"4+3i", True, None),
    (r"\boxed{2516_8}", r"2516_7", False, None),
    (r"\boxed{101_2}", r"101", True, "a base is compared as text"),
    (r"\boxed{101_2}", r"101_3", False, None),
    (r"\boxed{\boxed{5}}", r"5", True, None),
    (r"\boxed{n \equiv 1 \pmod 5}", r"n \equiv 2 \pmod 5", False, None),
    (r"\boxed{k\in\mathbb{Z}}", r"k\in\mathbb{R}", False, None),
    (r"\boxed{\forall x}", r"x", False, None),
    (r"\boxed{x\mid 3}", r"3x", False, None),
    (r"\boxed{5 x}", r"5", False, None),
    (r"\boxed{5x}", r"5", False, None),
    (r"\boxed{5?}", r"5", False, None),
    (r"\boxed{~5}", r"5", True, None),
    (r"\boxed{5#}", r"5", False, None),
    (r"\boxed{5 5}", r"5", False, None),
    (r"\boxed{5+}", r"5", False, None),
    (r"\boxed{(5}", r"5", False, None),
    (r"\boxed{5)}", r"5", False, None),
    (r"\boxed{+5}", r"5", True, None),
    (r"\boxed{--5}", r"5", True, None),
    (r"\boxed{=5}", r"5", True, None),
    (r"\boxed{\approx5}", r"5", True, None),
    (r"\boxed{5\approx 6}", r"6", False, None),
    (r"\boxed{\pi\approx3.14}", r"3.14", False, None),
    (r"\boxed{x\approx3.14}", r"3.14", True, None),
    (r"\boxed{5\pm0.1}", r"5", False, None),
    (r"\boxed{\text{A and B}}", r"\text{A or B}", False, None),
    (r"\boxed{A, B}", r"B, A", True, None),
    (r"\boxed{\text{(B)}}", r"(C)", False, None),
    (r"\boxed{(B)}", r"\text{B}", True, None),
    (r"\boxed{\text{Monday}}", r"Monday", True, None),
    (r"\boxed{\text{blue, red}}", r"\text{red, blue}", False, None),
    (r"\boxed{1,000,000}", r"1000000", True, None),
    (r"\boxed{1,00}", r"100", False, None),
    (r"\boxed{1,0000}", r"10000", False, None),
    (r"\boxed{1 000,5}", r"1000", False, None),
    (r"\boxed{1,000.5}", r"1000.5", True, None),
    (r"\boxed{1.000}", r"1000", False, None),
    (r"\boxed{x=1\text{ m}}", r"x=1\text{ s}", False, None),
    # more of the same kinds
    (r"\boxed{x1}", r"x", False, None),
    (r"\boxed{x2}", r"2x", False, None),
    (r"\boxed{x_1}", r"x1", False, None),
    (r"\boxed{\frac{x}{0}}", r"\frac{y}{0}", False, None),
    (r"\boxed{\frac{x}{0}}", r"0", False, None),
    (r"\boxed{\infty x}", r"\infty y", False, None),
    (r"\boxed{x^2>-1}", r"x^2>-2", False, None),
    (r"\boxed{x^2>-1}", r"\mathbb{R}", True, "a relation that always holds is not solved"),
    (r"\boxed{a<b}", r"b>a", True, "a relation read from the right"),
    (r"\boxed{a<b}", r"a>b", False, None),
    (r"\boxed{x>3}", r"x>3.0", True, None),
    (r"\boxed{x\ge 2}", r"x\le 2", False, None),
    (r"\boxed{1<x<3}", r"1<x<4", False, None),
    (r"\boxed{1<x<3}", r"1<y<3", False, None),
    (r"\boxed{1<x}", r"1<x<3", False, None),
    (r"\boxed{3>x>1}", r"1<x<3", True, "a chain turned round"),
    (r"\boxed{\{x: x>3\}}", r"x>3", False, None),
    (r"\boxed{x<1, x>2}", r"x<1", False, None),
    (r"\boxed{x\neq 0}", r"x=0", False, None),
    (r"\boxed{x\neq 0}", r"\mathbb{R}\setminus\{0\}", True, "a relation is not a set"),
    (r"\boxed{0<1}", r"x>0", False, None),
    (r"\boxed{x=y}", r"x=y=z", False, None),
    (r"\boxed{x=1}", r"y=1", False, None),
    (r"\boxed{1}", r"1=1=1", True, None),
    (r"\boxed{x+1=2}", r"1", False, None),
    (r"\boxed{x+1=2}", r"2", False, None),
    (r"\boxed{x+1}", r"x+1=0", False, None),
    (r"\boxed{x}", r"x=x", True, None),
    (r"\boxed{y}", r"x=y", True, None),
    (r"\boxed{x=y}", r"y=x", True, "equations side by side, never rearranged"),
    (r"\boxed{i=2}", r"i=3", False, None),
    (r"\boxed{e=2}", r"e=3", False, None),
    (r"\boxed{\pi=3}", r"\pi=4", False, None),
    (r"\boxed{2=2}", r"x=x", False, None),
    (r"\boxed{0x=0}", r"0y=0", False, "two equations that always hold"),
    (r"\boxed{0x=0}", r"x=0", False, None),
    (r"\boxed{x-x=0}", r"y-y=0", False, "two equations that always hold"),
    (r"\boxed{x=0}", r"2x=0", True, "equations side by side, never rearranged"),
    (r"\boxed{x=0}", r"x^2=0", False, None),
    (r"\boxed{xy=0}", r"x=0", False, None),
    (r"\boxed{y=2x}", r"y=2x,x=1", False, None),
    (r"\boxed{(1,2],[3,4)}", r"(1,2]", False, None),
    (r"\boxed{(1,2)}", r"[1,2]", False, None),
    (r"\boxed{(1,2]}", r"(1,2)", False, None),
    (r"\boxed{[1,2]\cup[3,4]}", r"[1,4]", False, None),
    (r"\boxed{[1,2]\cup[2,3]}", r"[1,3]", True, "touching intervals are not joined"),
    (r"\boxed{(1,1)}", r"[1,1]", False, None),
    (r"\boxed{(1,1)}", r"\emptyset", False, None),
    (r"\boxed{(2,1)}", r"(3,1)", False, None),
    (r"\boxed{\{1,2,2\}}", r"\{1,1,2\}", False, None),
    (r"\boxed{\{1,2\},\{3\}}", r"\{3\},\{1,2\}", True, None),
    (r"\boxed{\{1,2\},\{3\}}", r"\{1\},\{2,3\}", False, None),
    (r"\boxed{1;2}", r"1,2", True, None),
    (r"\boxed{[1;2]}", r"[1,2]", True, None),
    (r"\boxed{1e5}", r"100000", True, None),
    (r"\boxed{1E5}", r"100000", True, None),
    (r"\boxed{2e}", r"2", False, None),
    (r"\boxed{5e3x}", r"5000x", True, None),
    (r"\boxed{1,5}", r"1.5", False, None),
    (r"\boxed{3,14}", r"3.14", False, None),
    (r"\boxed{1.234,5}", r"1234.5", False, None),
    (r"\boxed{1'000}", r"1000", False, None),
    (r"\boxed{1_000}", r"1000", False, None),
    (r"\boxed{0x10}", r"16", False, None),
    (r"\boxed{0b1}", r"1", False, None),
    (r"\boxed{1000}", r"1k", False, None),
    (r"\boxed{5k}", r"5000", False, None),
    (r"\boxed{5K}", r"5", False, None),
    (r"\boxed{5 K}", r"5", False, None),
    (r"\boxed{1/2/3}", r"1/6", True, "it may be a date"),
    (r"\boxed{1/2}", r"2/4", True, None),
    (r"\boxed{1/2}", r"0.50", True, None),
    (r"\boxed{-1/2}", r"-\frac12", True, None),
    (r"\boxed{1/-2}", r"-0.5", True, None),
    (r"\boxed{5/0}", r"0", False, None),
    (r"\boxed{2^3}", r"8", True, None),
    (r"\boxed{2**3}", r"8", False, None),
    (r"\boxed{2^-3}", r"0.125", False, None),
    (r"\boxed{2^{-3}}", r"0.125", True, None),
    (r"\boxed{-2^2}", r"4", False, None),
    (r"\boxed{(-2)^2}", r"4", True, None),
    (r"\boxed{-2^2}", r"-4", True, None),
    (r"\boxed{2^3^2}", r"64", False, None),
    (r"\boxed{10!}", r"3628800", True, None),
    (r"\boxed{\sqrt{-1}}", r"i", False, None),
    (r"\boxed{\sqrt{4}}", r"2", True, None),
    (r"\boxed{\sqrt{4}}", r"-2", False, None),
    (r"\boxed{\sqrt[3]{8}}", r"2", True, None),
    (r"\boxed{\sqrt[3]{-8}}", r"-2", False, None),
    (r"\boxed{\binom{4}{2}}", r"6", True, None),
    (r"\boxed{\binom42}", r"6", True, None),
    (r"\boxed{\lfloor 2.7\rfloor}", r"2", True, None),
    (r"\boxed{\lceil 2.1\rceil}", r"3", True, None),
    (r"\boxed{|-3|}", r"3", True, None),
    (r"\boxed{\gcd(12,18)}", r"6", True, "functions of two numbers"),
    (r"\boxed{\frac{\Delta}{2}}", r"\frac{\delta}{2}", False, None),
    (r"\boxed{\Delta}", r"\delta", False, None),
    (r"\boxed{\text{DNA}}", r"\text{RNA}", False, None),
    (r"\boxed{\text{the answer is }42}", r"42", False, None),
    (r"\boxed{\text{42 is wrong}}", r"42", False, None),
    (r"\boxed{42\text{ is wrong}}", r"42", False, None),
    (r"\boxed{42\text{ is not the answer}}", r"42", False, None),
    (r"\boxed{42\text{ or }43}", r"43", False, None),
    (r"\boxed{\text{either }42}", r"42", False, None),
    (r"\boxed{42\text{ ish}}", r"42", True, None),
    (r"\boxed{42?}", r"42", False, None),
    (r"\boxed{4\text{2}}", r"42", True, None),
    (r"\boxed{\text{4}2}", r"42", True, None),
    (r"\boxed{\phantom{4}2}", r"2", False, None),
    (r"\boxed{\not=5}", r"5", False, None),
    (r"\boxed{\neq5}", r"5", False, None),
    (r"\boxed{>5}", r"5", False, None),
    (r"\boxed{<5}", r"5", False, None),
    (r"\boxed{\le 5}", r"5", False, None),
    (r"\boxed{\sim5}", r"5", True, None),
    (r"\boxed{5^{\text{th}}}", r"5", False, None),
    (r"\boxed{5\text{th}}", r"5", False, None),
    (r"\boxed{5\text{ thirds}}", r"5", False, None),
    (r"\boxed{5\text{ hundredths}}", r"5", False, None),
    (r"\boxed{50\text{ cents}}", r"0.50", False, None),
    (r"\boxed{5\text{ times}}", r"5", True, None),
    (r"\boxed{5\%}", r"5\text{ dollars}", False, None),
    (r"\boxed{5^\circ}", r"5\text{ cm}", False, None),
    (r"\boxed{5^\circ C}", r"5", False, None),
    (r"\boxed{27^{\circ}\mathrm{C}}", r"27^\circ\mathrm{F}", False, None),
    (r"\boxed{27^{\circ}\mathrm{C}}", r"27^\circ", False, None),
    (r"\boxed{5\text{ x}}", r"5", True, None),
    (r"\boxed{5\text{ cm}\text{ or 6}}", r"5", False, None),
    (r"\boxed{5\text{ cm or }6\text{ cm}}", r"5", False, None),
    (r"\boxed{3\text{ and }4\text{ cm}}", r"3, 4\text{ cm}", True, None),
    (r"\boxed{1\text{ to }3}", r"1", False, None),
    (r"\boxed{3:2}", r"2:3", False, None),
    (r"\boxed{3\text{ to }2}", r"2\text{ to }3", False, None),
    (r"\boxed{3\text{ out of }5}", r"3", False, None),
    (r"\boxed{\frac35\text{ of the cake}}", r"\frac35", True, None),
    (r"\boxed{7\text{ left over}}", r"7", False, None),
    (r"\boxed{\text{Monday, Tuesday}}", r"\text{Monday}", False, None),
    (r"\boxed{\text{Monday},\text{Tuesday}}", r"\text{Tuesday},\text{Monday}", True, None),
    (r"\boxed{\text{A},\text{B}}", r"A,B", True, "a letter in \\text{} is opened only when alone"),
    (r"\boxed{A}", r"B", False, None),
    (r"\boxed{\text{(A)}}", r"\text{A}", True, None),
    (r"\boxed{(A)}", r"A", True, None),
    (r"\boxed{A.}", r"A", True, None),
    (r"\boxed{A)}", r"A", False, None),
    (r"\boxed{\text{A and B}}", r"\text{B}", False, None),
    (r"\boxed{\boxed{1}}", r"1", True, None),
    (r"\boxed{\fbox{3}}", r"3", True, None),
    (r"\boxed{3\\4}", r"3", False, None),
    (r"\boxed{3\\4}", r"34", False, None),
    (r"\boxed{3 4}", r"34", False, None),
    ('\\boxed{3\n4}', r"34", False, None),
    ('\\boxed{3\n}', r"3", True, None),
    (r"\boxed{3&4}", r"34", False, None),
    (r"\boxed{3%4}", r"34", False, None),
    (r"\boxed{%5}", r"5", False, None),
    (r"\boxed{3\%4}", r"12", False, None),
    (r"\boxed{100%}", r"1", True, None),
    (r"\boxed{100\%}", r"100", True, None),
    (r"\boxed{1}", r"100\%", True, None),
    (r"\boxed{10000}", r"100\%", False, None),
    (r"\boxed{5\%}", r"5.0\%", True, None),
    (r"\boxed{-5\%}", r"-0.05", True, None),
    (r"\boxed{\frac12\%}", r"0.005", True, None),
    (r"\boxed{50\%}", r"\frac12", True, None),
    (r"\boxed{5\%}", r"0.5", False, None),
    (r"\boxed{3+2\%}", r"5", False, None),
    (r"\boxed{x\%}", r"x", False, None),
    (r"\boxed{١}", r"1", False, None),
    ('\\boxed{1̅}', r"1", False, None),
    ('\\boxed{5̸}', r"5", False, None),
    ('\\boxed{1⃣}', r"1", False, None),
    (r"\boxed{4²}", r"42", False, None),
    (r"\boxed{4²}", r"16", True, None),
    (r"\boxed{x₁}", r"x_1", True, None),
    (r"\boxed{x₁}", r"x1", False, None),
    ('\\boxed{4⁄2}', r"42", False, None),
    (r"\boxed{⑤}", r"5", False, None),
    (r"\boxed{Ⅴ}", r"5", False, None),
    (r"\boxed{五}", r"5", False, None),
    ('\\boxed{5️}', r"5", False, None),
    (r"\boxed{−−5}", r"5", True, None),
    ('\\boxed{5‰}', r"5", False, None),
    ('\\boxed{5′}', r"5", False, None),
    ('\\boxed{5″}', r"5", False, None),
    (r"\boxed{¼}", r"0.25", True, None),
    (r"\boxed{1¼}", r"1.25", True, None),
    (r"\boxed{1¼}", r"11/4", False, None),
    (r"\boxed{3¼}", r"13/4", True, None),
    (r"\boxed{㏒}", r"log", False, None),
    (r"\boxed{2㏑}", r"2", False, None),
    (r"\boxed{½½}", r"1", False, None),
    (r"\boxed{x⁻¹}", r"1/x", True, None),
    (r"\boxed{10⁺²}", r"100", True, None),
    (r"\boxed{1０}", r"10", True, None),
    (r"\boxed{１，０００}", r"1000", True, None),
    (r"\boxed{€5}", r"5", False, None),
    (r"\boxed{£5}", r"5", False, None),
    (r"\boxed{5€}", r"5", False, None),
    (r"\boxed{#5}", r"5", False, None),
    (r"\boxed{№5}", r"5", False, None),
    (r"\boxed{}", r"", False, None),
    (r"\boxed{ }", r" ", False, None),
    (r"\boxed{$}", r"$", True, None),
    (r"\boxed{?}", r"?", True, None),
    (r"\boxed{" + '1' * 1001 + "}", '1' * 1001, True, None),
    (r"\boxed{" + "1" * 1001 + "}", "1" * 1000 + "2", False, None),
    (r"\boxed{ 5}", r"5", True, None),
    (r"\boxed{1,2,}", r"1,2", True, None),
    (r"\boxed{,1,2}", r"1,2", True, None),
    (r"\boxed{1,,2}", r"1,2", False, None),
    (r"\boxed{(1,2}", r"(1,2)", False, None),
    (r"\boxed{1,2)}", r"(1,2)", False, None),
    (r"\boxed{((1,2))}", r"(1,2)", True, "doubled brackets"),
    (r"\boxed{(1),(2)}", r"1,2", True, None),
    (r"\boxed{{1,2}}", r"1,2", True, "braces that show nothing around a list"),
    (r"\boxed{{1,2}}", r"\{1,2\}", False, None),
    (r"\boxed{<1,2>}", r"(1,2)", False, None),
    (r"\boxed{\langle1,2\rangle}", r"(1,2)", False, None),
    (r"\boxed{\langle 2,1\rangle}", r"\langle 1,2\rangle", False, None),
    # reported by users of neighbouring projects (shared/cases)
    (r"\boxed{3}", r"3\text{ cm},4\text{ cm},5\text{ cm}", False, None),
    (r"\boxed{2}", r"2 \text{ hours } 30 \text{ minutes}", False, None),
    (r"\boxed{2 \text{ hours } 45 \text{ minutes}}", r"2 \text{ hours } 30 \text{ minutes}", False, None),
    (r"\boxed{5}", r"5\text{ feet }6\text{ inches}", False, None),
    (r"\boxed{3\text{ boys},2\text{ girls}}", r"3\text{ girls},2\text{ boys}", False, None),
    (r"\boxed{x=3\text{ m}}", r"x=3\text{ m},y=4\text{ m}", False, None),
    (r"\boxed{0}", r"25\,000", False, None),
    (r"\boxed{12\,000}", r"25\,000", False, None),
    (r"\boxed{10\,000}", r"0", False, None),
    (r"\boxed{25000}", r"25\,000", True, None),
    (r"\boxed{1 000}", r"1000", True, None),
    (r"\boxed{1\,500}", r"1500", True, None),
    (r"\boxed{n \text{ is odd}}", r"n \text{ is even}", False, None),
    (r"\boxed{n}", r"n \text{ even}", False, None),
    (r"\boxed{10\text{ a.m.}}", r"10\text{ p.m.}", False, None),
    (r"\boxed{5\text{ north}}", r"5\text{ south}", False, None),
    (r"\boxed{\frac{1}{2006!}}", r"\frac{1}{2004!}", False, None),
    (r"\boxed{\left(\frac12\right)^{200}}", r"\left(\frac12\right)^{201}", False, None),
    (r"\boxed{10^{-40}}", r"10^{-50}", False, None),
    (r"\boxed{1-\frac{1}{2^{200}}}", r"1-\frac{1}{2^{201}}", False, None),
    (r"\boxed{\frac{2^{2005}+1}{3\cdot2^{2006}}}", r"\frac{1}{3\cdot2^{2006}}", False, None),
    (r"\boxed{6.6\times10^{-34}\text{ J s}}", r"6.7\times10^{-34}\text{ J s}", False, None),
    (r"\boxed{(2,1)}", r"\{1,2\}", False, None),
    (r"\boxed{\{1,2\}}", r"(1,2)", False, None),
    (r"\boxed{2022-01-01}", r"2023-01-02", False, None),
    (r"\boxed{1/2/2024}", r"2/4/2024", False, None),
    (r"\boxed{18.}", r"18", True, None),
    (r"\boxed{\frac34.}", r"0.75", True, None),
    (r"\boxed{(1,2).}", r"(1,2)", True, None),
    (r"\boxed{5}", r"5.", True, None),
    (r"\boxed{x = 3.}", r"3", True, None),
    (r"\boxed{101,103}", r"101, 103", True, None),
    (r"\boxed{103,101}", r"101,103", True, None),
    (r"\boxed{60^\circ}", r"60°", True, None),
    (r"\boxed{\sqrt{3}}", r"√3", True, None),
    (r"\boxed{１８}", r"18", True, None),
    ('\\boxed{–3}', r"-3", True, None),
    (r"\boxed{\infty}", r"∞", True, None),
    ('\\boxed{5\u200b}', r"5", True, None),
    (r"\boxed{x>3}", r"(3,\infty)", True, "a relation is not an interval"),
    (r"\boxed{\emptyset}", r"\varnothing", True, None),
    (r"\boxed{(-7,16,5)}", r"\begin{pmatrix}-7\\16\\5\end{pmatrix}", True, "a column is not a tuple"),
    (r"\boxed{\sin 30^\circ}", r"\frac12", True, "a degree is a unit, not pi/180"),
    (r"\boxed{\frac{\pi}{2}}", r"90^\circ", True, "a degree is a unit, not pi/180"),
    (r"\boxed{4+3\mathrm{i}}", r"4+3i", True, None),
    (r"\boxed{\sqrt{1/n}}", r"\frac{1}{\sqrt n}", True, "equal for positive n only"),
    (r"\boxed{\text{12 cm}}", r"12", True, "a number within \\text{} with words"),
    (r"\boxed{\frac{1}{3}=0.333}", r"\frac13", True, "0.333 is not 1/3"),
    (r"\boxed{3.14}", r"\approx 3.14", True, None),
    ('So $x=\\boxed{1}$ or $x=\\boxed{-3}$.', r"1,-3", True, None),
    ('\\boxed{3}, \\boxed{5}, \\boxed{7}', r"3, 5, 7", True, None),
    ('\\boxed 5', r"5", True, None),
    ('\\fbox{5}', r"5", True, None),
    ('\\boxed{\n\\begin{aligned}\nx &= 5\n\\end{aligned}\n}', r"5", True, None),
    # each for a rule, an entry or an alternative of the grading that no other pair would miss
    (r"\boxed{\dfrac12}", r"0.5", True, None),
    (r"\boxed{\tfrac12}", r"0.5", True, None),
    (r"\boxed{x=1,\quad y=2}", r"x=1,y=2", True, None),
    (r"\boxed{(-\infty,+\infty)}", r"(-\infty,\infty)", True, None),
    (r"\boxed{\text{Area}=5}", r"5", True, None),
    (r"\boxed{AB=5}", r"5", True, None),
    (r"\boxed{a_{10}=5}", r"5", True, None),
    (r"\boxed{f(10)=5}", r"5", True, None),
    (r"\boxed{(x,y,z)=(1,2,3)}", r"(1,2,3)", True, None),
    (r"\boxed{3\sqrt{2}\text{ cm}}", r"3\sqrt2", True, None),
    (r"\boxed{4\pi\text{ cm}^2}", r"4\pi", True, None),
    (r"\boxed{N\text{ prime}}", r"N", False, None),
    (r"\boxed{10-5\%}", r"5", False, None),
    (r"\boxed{3\text{ per floor}}", r"3", True, None),
    (r"\boxed{5abc}", r"5", False, None),
    (r"\boxed{5abcd}", r"5", False, None),
    (r"\boxed{5}", r"5 xyz", False, None),
    (r"\boxed{5 apples}", r"5", True, None),
    (r"\boxed{1.2.3}", r"0.36", False, None),
    (r"\boxed{2^{3}^{2}}", r"64", False, None),
    (r"\boxed{X2}", r"2X", False, None),
    (r"\boxed{1 2345}", r"12345", False, None),
    (r"\boxed{1, 2, \text{ and } 3}", r"3,2,1", True, None),
    (r"\boxed{x>2 \text{ or } x<1}", r"x>2 \text{ and } x<1", False, None),
    (r"\boxed{x\ge2 \text{ or } x\le1}", r"x\ge2 \text{ and } x\le1", False, None),
    (r"\boxed{x\le1 \text{ or } x\ge2}", r"x\le1 \text{ and } x\ge2", False, None),
    (r"\boxed{x\ne1 \text{ or } x\ne2}", r"x\ne1 \text{ and } x\ne2", False, None),
    (r"\boxed{[1,234]}", r"[1234]", False, None),
    (r"\boxed{\{1,234\}}", r"\{1234\}", False, None),
    (r"\boxed{(12,345)}", r"12345", False, None),
    (r"\boxed{\frac12,100}", r"50", False, None),
    (r"\boxed{1e+5}", r"100000", True, None),
    (r"\boxed{xe5}", r"x\times10^5", False, None),
    (r"\boxed{[1,2]}", r"[2,1]", False, None),
    (r"\boxed{3>x>1}", r"3>x>1.0", True, None),
    (r"\boxed{x\le 2}", r"x\le2.0", True, None),
    (r"\boxed{x\ge 2\ge y}", r"x\ge2.0\ge y", True, None),
    (r"\boxed{x\ne 3}", r"x\neq 3.0", True, None),
    (r"\boxed{x<3}", r"3", False, None),
    (r"\boxed{z=y}", r"x=y=z", False, None),
    (r"\boxed{\emptyset}", r"\{\emptyset\}", False, None),
    (r"\boxed{a<b>c}", r"c<a<b", False, None),
    (r"\boxed{a<b\ge c}", r"c\le a<b", False, None),
]
EXERCISES = [  # in the style of college and physics; each with a rewriting
    (r"v(t) = 3e^{-2t} + 4", r"v(t)=4+3e^{-2t}"),
    (r"9.81\text{ m/s}^2", r"9.81\ \mathrm{m/s}^{2}"),
    (r"6.63\times10^{-34}\text{ J s}", r"6.63 \times 10^{-34}\,\mathrm{J\,s}"),
    (r"6.62\times10^{-34}\text{ J s}", r"6.62\cdot 10^{-34}\text{ J s}"),
    (r"\frac{mv^2}{r}", r"\frac{m v^2}{r}"),
    (r"\frac{mv^2}{2r}", r"\frac{1}{2}\frac{mv^2}{r}"),
    (r"T = 2\pi\sqrt{\frac{L}{g}}", r"T=2\pi\sqrt{L/g}"),
    (r"T = 2\pi\sqrt{\frac{g}{L}}", r"T=2\pi\sqrt{g/L}"),
    (r"(-\infty, -2) \cup [3, \infty)", r"[3,\infty)\cup(-\infty,-2)"),
    (r"(-\infty, -2] \cup [3, \infty)", r"[3,\infty)\cup(-\infty,-2]"),
    (r"x \ge 3", r"x\geq3"),
    (r"x > 3", r"x>3.0"),
    (r"x = 2 \text{ or } x = -5", r"x=-5 \text{ or } x=2"),
    (r"x = 2, y = -5", r"y=-5, x=2"),
    (r"x=-5, y=2", r"y=2,\ x=-5"),
    (r"\{1, 2, 3\}", r"\{3,2,1\}"),
    (r"(1, 2, 3)", r"\left(1,2,3\right)"),
    (r"(1,3,2)", r"(1, 3, 2)"),
    (r"n \text{ is even}", r"n\text{ is even}"),
    (r"n \text{ is odd}", r"n\text{ is odd}"),
    (r"\text{diverges}", r"\text{Diverges}"),
    (r"\text{converges}", r"converges"),
    (r"12\text{ V}, 3\text{ A}", r"3\text{ A}, 12\text{ V}"),
    (r"3\text{ V}, 12\text{ A}", r"12\text{ A}, 3\text{ V}"),
    (r"y = Ce^{x} - x - 1", r"y = -1 - x + Ce^x"),
    (r"y = Ce^{-x} - x - 1", r"y=-x-1+Ce^{-x}"),
    (r"\begin{pmatrix} 1 & 0 \\ 2 & 1 \end{pmatrix}", r"\begin{bmatrix}1&0\\2&1\end{bmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \\ 0 & 1 \end{pmatrix}", r"\begin{bmatrix}1&2\\0&1\end{bmatrix}"),
    (r"30^\circ \text{ north of east}", r"30^{\circ}\text{ north of east}"),
    (r"30^\circ \text{ south of east}", r"30°\text{ south of east}"),
]

HOSTILE = [r"9^{9^{9^{9}}}", r"10^{10^{10}}", "100000000!", "(" * 2000 + ")" * 2000, r"\frac{1}{0}", "1" * 100_000, "1e999999999",
           "3^{100000000}", r"2^{2^{40}}", r"\binom{10^9}{10^8}", r"\sum_{k=1}^{10^9} \frac{1}{k}", r"\prod_{k=1}^{10^8} k",
           "(x+1)^{100000}", r"\sqrt{" * 300 + "2" + "}" * 300, r"\int_0^{10^9} x^x dx", r"\sin(10^{10^{8}})", "((9!)!)!",
           "0.5^{2^{36}}", "(x+y+z+w)^{200}", r"\log_2 3^{100000000}", "7^{77777777}", r"\{" + "1," * 400 + r"1\}",
           "__import__('os').abort()", "\x00\ud800", "{" * 900, r"\frac" * 180, r"10^{-10^{10}}", "x^{1000000000}=1",
           r"\lfloor 10^{10^{9}} / 7 \rfloor", r"\left[0,10^{10^{9}}\right]", r"\gcd(3^{10000000},2)", r"e^{e^{e^{25}}}"]
