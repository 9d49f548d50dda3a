"""Tests of egrsd.py: the maths against slow loops, the loop from outside, ranks, resume, faults. The README has the command.

The model of the end-to-end tests is a real Qwen3ForCausalLM with random weights, too small to earn a reward: their runs go
through a five-line driver with a reward of its own (the fork the README describes), everything else is the real command.
"""
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

HERE = Path(__file__).parent
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", PYTHONPATH=str(HERE))

import torch
import torch.nn.functional as F

import egrsd


# ------------------------------------------------------------------------------------------------- the method, in slow

def test_lookahead_agrees_with_a_slow_loop_for_every_window():
    torch.manual_seed(0)
    for length in (0, 1, 2, 7):
        entropy = torch.rand(length)
        for window in (0, 1, 3, 6, 7, 100):
            slow = [min(entropy[t:t + window + 1].tolist()) for t in range(length)]
            assert egrsd.lookahead_min(entropy, window).tolist() == slow, (length, window)
    assert egrsd.lookahead_min(torch.tensor([3.0, 1.0, 2.0, 0.5]), 1).tolist() == [1.0, 1.0, 0.5, 0.5]  # by hand


def test_gate_agrees_with_a_slow_loop_and_stays_between_floor_and_one():
    torch.manual_seed(1)
    entropy = torch.rand(50) * 6
    for gamma, window, h_max in ((0.3, 0, 6.0), (1.0, 5, 6.0), (0.95, 2, 7.5), (1.0, 0, 0.2), (5.0, 0, 3.0)):
        gate = egrsd.confidence_gate(entropy, h_max, gamma, window)
        for t in range(50):
            lowest = min(entropy[t:t + window + 1].tolist())
            expected = min(1.0, max(0.1, 1 - gamma * lowest / max(h_max, 1.0)))
            assert gate[t].item() == pytest.approx(expected, abs=1e-6), (gamma, window, t)
    assert egrsd.confidence_gate(torch.tensor([2.0]), 2.0, 1.0).item() == pytest.approx(0.1)  # the floor
    assert egrsd.confidence_gate(torch.tensor([0.0]), 2.0, 1.0).item() == 1.0  # the ceiling
    assert egrsd.confidence_gate(torch.tensor([0.5]), 0.5, 0.3).item() == pytest.approx(0.85)  # H_max counts as 1 nat


def test_gamma_0_is_rlsd_and_window_0_is_egrsd_exactly():
    torch.manual_seed(2)
    entropy, w = torch.rand(40) * 3, torch.rand(40) + 0.5
    gate = egrsd.confidence_gate(entropy, 3.0, 0.0, 5)
    r = egrsd.Rollout(0, {}, [], [], advantage=-0.7, magnitude=w, gate=gate)
    assert torch.equal(egrsd.TOKEN_WEIGHT["egrsd"](r), egrsd.TOKEN_WEIGHT["rlsd"](r))
    assert torch.equal(egrsd.confidence_gate(entropy, 3.0, 0.3, 0), (1 - 0.3 * entropy / 3.0).clamp(0.1, 1))
    assert torch.equal(egrsd.lookahead_min(entropy, 0), entropy)
    assert egrsd.TOKEN_WEIGHT["grpo"](r) == -0.7


def test_dasd_pulls_to_the_teacher_below_tau_and_pushes_away_above_in_a_slow_loop():
    torch.manual_seed(21)
    entropy, delta = torch.rand(31) * 3, torch.randn(31)
    r = egrsd.Rollout(0, {}, [], [], advantage=0.4, delta=delta, student_entropy=entropy)
    ranked = sorted(entropy.tolist())
    tau = ranked[24]  # 0.8 * 30: no interpolation needed
    scale = sum(abs(h - tau) for h in ranked) / 31
    for t, weight in enumerate(egrsd.TOKEN_WEIGHT["dasd"](r).tolist()):
        assert weight == pytest.approx(0.4 + 0.1 * math.tanh((tau - entropy[t].item()) / scale) * math.tanh(delta[t].item()), abs=1e-5)
        assert (weight - 0.4) * delta[t].item() * (tau - entropy[t].item()) >= 0
    assert egrsd.entropy_routing(torch.tensor([1.0]), torch.tensor([0.3])).tolist() == [0.0]  # one token: no below, no above


def test_magnitude_agrees_with_a_slow_loop_in_both_directions():
    delta = torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0])
    for direction in (-1, 0, 1):
        slow = [min(1.2, max(0.8, math.exp(direction * d))) for d in delta.tolist()]
        assert egrsd.magnitude(delta, direction).tolist() == pytest.approx(slow, abs=1e-6), direction
    assert egrsd.magnitude(torch.tensor([0.1]), 1).item() == pytest.approx(1.10517, abs=1e-5)  # by hand


def test_reward_falls_linearly_with_length_and_is_0_when_wrong():
    assert egrsd.length_shaped_reward(True, 0, 1024) == 1.5
    assert egrsd.length_shaped_reward(True, 256, 1024) == 1.375
    assert egrsd.length_shaped_reward(True, 1024, 1024) == 1.0
    assert egrsd.length_shaped_reward(False, 10, 1024) == 0.0


def test_welford_equals_torch_in_one_shot_and_in_chunks_and_survives_a_round_trip():
    values = torch.tensor([0.0, 1.5, 1.25, 0.0, 1e6, 1e6 + 1, 3.0], dtype=torch.float64)
    whole, chunks = egrsd.Welford(), egrsd.Welford()
    assert (whole.count, whole.mean, whole.std) == (0, 0.0, 0.0)
    whole.update(values)
    chunks.update(values[:1])
    assert (chunks.count, chunks.mean, chunks.std) == (1, 0.0, 0.0)
    chunks.update(values[1:3].tolist())
    again = egrsd.Welford()
    again.load_state_dict(json.loads(json.dumps(chunks.state_dict())))
    again.update(values[3:])
    for stats in (whole, again):
        assert stats.count == 7
        assert stats.mean == pytest.approx(values.mean().item(), rel=1e-14)
        assert stats.std == pytest.approx(values.std().item(), rel=1e-14)


def test_advantages_follow_equation_9_the_warm_up_the_floor_and_the_group():
    stats, rewards = egrsd.Welford(), torch.tensor([0.0, 1.2], dtype=torch.float64)
    assert egrsd.running_advantage(rewards, stats, True).tolist() == pytest.approx([-0.5, 0.7])
    stats.update([1.0, 2.0, 3.0])
    assert egrsd.running_advantage(rewards, stats, False).tolist() == pytest.approx([-2.0, -0.8])
    equal = egrsd.Welford()
    equal.update([0.0] * 50)
    assert egrsd.running_advantage(rewards, equal, False).tolist() == pytest.approx([0.0, 12.0])  # D2, not infinite
    groups = egrsd.group_advantage(torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64), 2)
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert groups.tolist() == pytest.approx([-expected, expected, 0.0, 0.0])


# ----------------------------------------------------------------------------------------------- log p and its gradient

def naive(hidden, head, targets):
    log_p = (hidden @ head.T).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("length", [1, 511, 512, 1300])
def test_logp_entropy_and_gradient_equal_the_full_logits_formula(length):
    torch.manual_seed(3)
    hidden, head = torch.randn(length, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
    targets, weights = torch.randint(50, (length,)), torch.randn(length, dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logp, entropy = egrsd.logp_and_entropy(ours, head, targets)
    naive_logp, naive_entropy = naive(theirs, head, targets)
    assert torch.allclose(logp, naive_logp, atol=1e-12) and torch.allclose(entropy, naive_entropy, atol=1e-12)
    (weights * logp).sum().backward()
    (weights * naive_logp).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12), (ours.grad - theirs.grad).abs().max()
    assert not entropy.requires_grad


@pytest.mark.parametrize("method, clip", [("opsd", 0.0), ("opsd", 0.02), ("crisp", 0.0)])
def test_divergence_and_gradient_equal_the_full_vocabulary_formula(method, clip):
    torch.manual_seed(22)
    hidden, teacher, head = (torch.randn(n, 16, dtype=torch.float64) for n in (300, 300, 50))  # three chunks
    targets, weights = torch.randint(50, (300,)), torch.randn(300, dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    function = egrsd.functools.partial(egrsd.DIVERGENCE[method], **dict(clip=clip) if clip else {})
    value, logp, entropy = egrsd.head_terms(ours, head, targets, teacher, function)
    log_p, log_q = (theirs @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1)
    entries = F.kl_div(log_p, log_q, reduction="none", log_target=True) if method == "opsd" else \
        F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if clip:
        assert 0.01 < (entries > clip).double().mean() < 0.99
        entries = entries.clamp(max=clip)
    assert torch.allclose(value, entries.sum(-1), atol=1e-12)
    (weights * value).sum().backward()
    (weights * entries.sum(-1)).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12), (ours.grad - theirs.grad).abs().max()
    assert not logp.requires_grad and torch.allclose(logp, naive(hidden, head, targets)[0], atol=1e-12)
    half, half_head = hidden.float().requires_grad_(), head.float()  # and in float32, as it runs
    egrsd.head_terms(half, half_head, targets, teacher.float(), function)[0].mul(weights.float()).sum().backward()
    if not clip:  # which entries are clipped may differ by rounding
        assert (half.grad - theirs.grad).abs().max() < 1e-5 * max(1.0, theirs.grad.abs().max().item())


def test_finite_differences_confirm_the_gradient():
    torch.manual_seed(4)
    hidden, head, targets = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(9, 4).double(), torch.arange(5)
    assert torch.autograd.gradcheck(lambda h: egrsd.logp_and_entropy(h, head, targets)[0], hidden)


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_bf16_gradient_stays_close_to_float64_for_confident_tokens(p):
    torch.manual_seed(5)
    head = (torch.randn(2000, 64) / 8).bfloat16()
    hidden = torch.randn(16, 64).bfloat16()
    targets = torch.randint(2000, (16,))
    for t in range(16):  # push each hidden state along its target's row until the target has about probability p
        direction, base = head[targets[t]].double(), hidden[t].double()
        low, high = 0.0, 60.0
        for _ in range(40):
            middle = (low + high) / 2
            reached = ((base + middle * direction) @ head.double().T).softmax(-1)[targets[t]].item()
            low, high = (middle, high) if reached < p else (low, middle)
        hidden[t] = (base + high * direction).bfloat16()
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    logp, entropy = egrsd.logp_and_entropy(ours, head, targets)
    exact_logp, exact_entropy = naive(exact, head.double(), targets)
    assert 0.3 * (1 - p) < (1 - exact_logp.exp()).mean().item() < 3 * (1 - p)
    assert logp.dtype == torch.float32
    assert (logp - exact_logp).abs().max() < 1e-5 and (entropy - exact_entropy).abs().max() < 1e-4
    logp.sum().backward()
    exact_logp.sum().backward()
    error = (ours.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.max() < 0.05, error.max()


def test_autocast_does_not_reach_log_p():
    torch.manual_seed(6)
    hidden, head, targets = torch.randn(9, 16), torch.randn(50, 16), torch.randint(50, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = egrsd.logp_and_entropy(hidden, head, targets)
    exact, exact_entropy = naive(hidden, head, targets)
    assert (logp - exact).abs().max() < 1e-5 and (entropy - exact_entropy).abs().max() < 1e-5


def test_nothing_flows_through_teacher_gate_magnitude_or_advantage(tiny):
    model = egrsd.load_model(egrsd.Config(model=str(tiny), lora_rank=4), torch.device("cpu"))
    rollouts = [egrsd.Rollout(i, {}, [5, 6, 7], [5, 6, 8, 9, 7], [20 + i, 30, 40, 50][:3 + i], advantage=a)
                for i, a in enumerate((0.8, -0.4))]
    cfg = egrsd.Config(gamma=0.7, window=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    egrsd.teach(model, rollouts, cfg)
    assert all(p.grad is None for p in model.parameters())
    assert not any(r.teacher_logp.requires_grad or r.teacher_entropy.requires_grad for r in rollouts)
    h_max = max(r.teacher_entropy.max().item() for r in rollouts)
    egrsd.learn(model, rollouts, cfg, h_max, 7)
    weights = [(r.advantage * r.magnitude * r.gate).tolist() for r in rollouts]  # constants from here on
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {name for name, _ in model.named_parameters() if "lora_" in name}
    model.zero_grad()
    loss = 0
    for r, weight in zip(rollouts, weights):
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        for t, token in enumerate(r.completion_ids):
            loss = loss - weight[t] * log_p[len(r.prompt_ids) - 1 + t, token] / 7
    loss.backward()
    for name, p in model.named_parameters():
        if name in grads:
            assert torch.allclose(p.grad, grads[name], atol=1e-6), (name, (p.grad - grads[name]).abs().max())


@pytest.mark.parametrize("method", ["sft", "opsd", "crisp", "dasd", "grpo"])
def test_loss_and_gradient_of_a_method_equal_a_slow_twin_on_the_whole_model(tiny, method):
    cfg = egrsd.Config(model=str(tiny), lora_rank=4, method=method, tokens_per_pass=12)
    model = egrsd.load_model(cfg, torch.device("cpu"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    rollouts = [egrsd.Rollout(i, {}, [5, 6, 7], [5, 6, 8, 9, 7], [20 + i, 30, 40, 50][:3 + i], advantage=a)
                for i, a in enumerate((0.8, -0.4))]

    def full(key):
        return [model(input_ids=torch.tensor([getattr(r, key) + r.completion_ids])).logits[0, len(getattr(r, key)) - 1:-1]
                .log_softmax(-1) for r in rollouts]

    h_max = egrsd.teach(model, rollouts, cfg) if method != "sft" else 0.0
    loss = egrsd.learn(model, rollouts, cfg, h_max, 7)
    assert all(r.teacher_hidden is None for r in rollouts)  # or they would travel to every rank
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        teacher = full("teacher_ids")
    slow = 0
    for r, log_p, log_q in zip(rollouts, full("prompt_ids"), teacher):
        targets = torch.tensor(r.completion_ids)
        if method == "opsd":
            slow = slow + F.kl_div(log_p, log_q, reduction="sum", log_target=True) / 7
        elif method == "crisp":
            slow = slow + F.kl_div(log_q, log_p, reduction="sum", log_target=True) / 7
        elif method == "sft":
            slow = slow + F.nll_loss(log_p, targets, reduction="sum") / 7
        else:
            chosen, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1).detach()
            gap = log_q.gather(1, targets[:, None])[:, 0] - chosen.detach()
            tau = entropy.sort().values[:].quantile(0.8)
            routing = ((tau - entropy) / (entropy - tau).abs().mean()).tanh() * gap.tanh()
            slow = slow - ((r.advantage + 0.1 * routing * (method == "dasd")) * chosen).sum() / 7
    slow.backward()
    assert loss == pytest.approx(slow.item(), abs=1e-5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert torch.allclose(p.grad, grads[name], atol=1e-5), (name, (p.grad - grads[name]).abs().max())


def test_a_following_teacher_starts_as_the_student_and_moves_as_far_as_it_is_told(tiny):
    cfg = egrsd.Config(model=str(tiny), lora_rank=4, teacher="ema")
    model = egrsd.load_model(cfg, torch.device("cpu"))
    student, teacher = egrsd.adapter_params(model, "default"), egrsd.adapter_params(model, "teacher")
    assert set(student) == set(teacher) and len(student) == 28
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    with torch.no_grad():
        for p in student.values():
            p.normal_(std=0.1)
    rollouts = [egrsd.Rollout(0, {}, [5, 6, 7], [5, 6, 7], [20, 30, 40], advantage=1.0)]  # no privilege

    def delta():
        egrsd.learn(model, rollouts, cfg, egrsd.teach(model, rollouts, cfg), 3)
        return rollouts[0].delta.abs().max().item()

    assert delta() > 1e-2
    assert all(p.grad is None for p in teacher.values()) and all(p.grad is not None for p in student.values())
    before = {name: p.clone() for name, p in teacher.items()}
    egrsd.follow(model, 0.25)
    for name, p in teacher.items():
        assert torch.allclose(p, 0.75 * before[name] + 0.25 * student[name], atol=1e-6)
    egrsd.follow(model, 0.0)
    egrsd.follow(model, 1.0)
    assert delta() < 1e-5


def test_a_tokenizer_without_an_end_of_turn_token_is_refused(tmp_path):
    tokenizer = egrsd.toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(egrsd.UserError, match="eos_token"):
        egrsd.load_tokenizer(str(tmp_path))


def test_only_crisp_hides_the_solution_and_asks_to_be_concise():
    row = dict(problem="What is 1+1?", solution="It is \\boxed{2}.", gold="2")
    for method in egrsd.TOKEN_WEIGHT:
        prompt = egrsd.teacher_prompt(row, method)
        assert (row["solution"] in prompt) == (method != "crisp") == (egrsd.CONCISE not in prompt)
        assert prompt.startswith(row["problem"]) and prompt.endswith(egrsd.INSTRUCTION)


# ------------------------------------------------------------------------------------------------------ a tiny real model

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
            "<|assistant|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}")
DRIVER = """
import sys, egrsd
egrsd.score_answer = lambda completion, row: sum(map(ord, completion)) % 2 == 0  # a reward that varies
{patch}
sys.exit(egrsd.main())
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", seed=7)


def make_tiny(path, seed):
    """A random Qwen3 with varied entropies and seven end tokens, so that completions have uneven lengths."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    tokenizer = egrsd.toy_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.3))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(40, 46)]
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.7)  # must not be inherited
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """Forty GSM8K-like rows of uneven length."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rng = random.Random(0)
    rows = []
    for _ in range(40):
        a, b = rng.randrange(100), rng.randrange(100)
        story = "Tom counts his stamps. " * rng.randrange(4)
        rows.append(dict(question=f"{story}What is {a} plus {b}?", answer=f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*flags, ranks=1, driver=HERE / "egrsd.py"):
    """The real command line, under torchrun where there are several ranks."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(driver), *map(str, flags)]


def launched(*flags, **options):
    return subprocess.run(command(*flags, **options), capture_output=True, text=True, timeout=600)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # there is no file to register marks in
    bench, slow = pytest.mark.bench, pytest.mark.slow


@pytest.fixture(autouse=True)
def left_out(request):
    """Tests marked bench or slow run with -m bench or -m slow only."""
    for name in ("bench", "slow"):
        if request.node.get_closest_marker(name) and name not in request.config.option.markexpr:
            pytest.skip(f"only with -m {name}")


needs_vllm = pytest.mark.skipif(egrsd.importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch", "transformers.models.qwen3.modeling_qwen3", "transformers.generation", "peft", "pandas.plotting._matplotlib", "datasets", "matplotlib.figure", "vllm"])
FORKED = """
import os, runpy, sys
os.environ.update({env!r})
os.chdir({cwd!r})
sys.argv = {argv!r}
for fd in 1, 2:
    os.dup2(os.open("{log}." + str(fd), os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Forked:
    """The same command in processes forked from one that holds the libraries, which take longer to import than most of
    these runs. Its environment is what torchrun would set."""
    def __init__(self, *flags, ranks=1, driver=HERE / "egrsd.py", cwd=".", **env):
        with socket.create_server(("127.0.0.1", 0)) as server:
            env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]), WORLD_SIZE=str(ranks))
        self.log, self.processes = tempfile.mktemp(), []
        for rank in range(ranks):
            env.update(RANK=str(rank), LOCAL_RANK=str(rank))
            code = FORKED.format(argv=[str(driver), *map(str, flags)], env=env, cwd=str(Path(cwd).absolute()), log=self.log)
            self.processes.append(forks.Process(target=exec, args=(code, {})))
            self.processes[-1].start()

    def kill(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def read(self, fd):
        return Path(f"{self.log}.{fd}").read_text() if Path(f"{self.log}.{fd}").exists() else ""

    def wait(self, timeout=120):
        end = time.perf_counter() + timeout
        for process in self.processes:
            process.join(end - time.perf_counter())
            if process.is_alive():
                self.kill(signal.SIGKILL)
                raise TimeoutError(self.read(2))
        codes = [process.exitcode for process in self.processes]
        return subprocess.CompletedProcess(self.log, next(filter(None, codes), 0), self.read(1), self.read(2))


def run(*flags, **options):
    return Forked(*flags, **options).wait()


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    def write(patch=""):
        path = tmp_path_factory.mktemp("driver") / "driver.py"
        path.write_text(DRIVER.format(patch=patch))
        return path
    return write


@pytest.fixture(scope="session")
def small(tiny, problems):
    """The flags of a 12-step run whose warm-up ends after step 4."""
    return ["--model", tiny, "--data", problems, "--batch_size", 8, "--steps", 12, "--warmup_steps", 4, "--save_every", 1,
            "--max_completion_length", 24, "--lora_rank", 4, "--lr", "2e-3", "--gamma", 0.8, "--window", 2,
            "--tokens_per_pass", 300, "--engine", "hf"]  # so few tokens that a step takes several passes


def made_once(*names):
    """A session fixture whose tests xdist keeps on one worker, so that it is not made twice."""
    params = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]
    return pytest.fixture(scope="session", params=params)


@made_once("whole")
def whole(small, driver, tmp_path_factory):
    """The folder of that run, uninterrupted, on one rank."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*small, "--out", out, driver=driver())
    assert done.returncode == 0, done.stderr
    return out


SNAPSHOT = ["adapter_config.json", "adapter_model.safetensors", "trainer.pt"]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def reproducible(metrics):
    return {k: v for k, v in metrics.items() if not k.endswith(("_s", "tok/s", "_gib"))}


def adapter(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("step", [1, 9])
def test_a_step_recomputed_from_outside_with_plain_transformers_and_peft(whole, tiny, step):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Qwen3ForCausalLM
    base = Qwen3ForCausalLM.from_pretrained(tiny)
    torch.manual_seed(0)
    if step == 1:
        student = get_peft_model(Qwen3ForCausalLM.from_pretrained(tiny), LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
    else:
        student = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(tiny), whole / f"step_{step - 1}", is_trainable=True)
    rollouts = [r for r in read(whole / "rollouts.jsonl") if r["step"] == step]
    earlier = torch.tensor([r["reward"] for r in read(whole / "rollouts.jsonl") if r["step"] < step], dtype=torch.float64)
    logged = read(whole / "metrics.jsonl")[step - 1]

    def padded(model, key):
        rows = [r[key] + r["completion_ids"] for r in rollouts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        log_p = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        return [log_p[i, len(r[key]) - 1:len(rows[i]) - 1] for i, r in enumerate(rollouts)]

    with torch.no_grad():
        teacher = padded(base, "teacher_ids")
    learner = padded(student, "prompt_ids")
    entropy = [-(log_p.exp() * log_p).sum(-1) for log_p in teacher]
    h_max, tokens = max(h.max().item() for h in entropy), sum(len(h) for h in entropy)
    loss, omegas, clipped = 0.0, [], 0
    for i, r in enumerate(rollouts):
        correct = sum(map(ord, r["completion"])) % 2 == 0
        assert r["correct"] == correct
        assert r["reward"] == pytest.approx(correct * (1 + 0.5 * (1 - len(r["completion_ids"]) / 24)), abs=1e-12)
        advantage = r["reward"] - 0.5 if step <= 4 else (r["reward"] - earlier.mean().item()) / max(earlier.std().item(), 0.1)
        assert r["advantage"] == pytest.approx(advantage, abs=1e-9)
        for t, token in enumerate(r["completion_ids"]):
            delta = (teacher[i][t, token] - learner[i][t, token]).item()
            w = min(1.2, max(0.8, math.exp((1 if advantage > 0 else -1) * delta)))
            omega = min(1.0, max(0.1, 1 - 0.8 * min(entropy[i][t:t + 3].tolist()) / max(h_max, 1.0)))
            omegas.append(omega)
            clipped += not 0.8 < math.exp((1 if advantage > 0 else -1) * delta) < 1.2
            loss = loss - advantage * w * omega * learner[i][t, token] / tokens
    loss.backward()
    norm = math.sqrt(sum(p.grad.norm().item() ** 2 for p in student.parameters() if p.grad is not None))
    assert logged["tokens"] == tokens
    assert logged["h_max"] == pytest.approx(h_max, abs=1e-4)
    assert logged["omega"] == pytest.approx(sum(omegas) / tokens, abs=1e-4)
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert logged["grad_norm"] == pytest.approx(norm, abs=1e-4, rel=1e-4)
    assert logged["w_clipped"] == pytest.approx(clipped / tokens, abs=1e-6)
    if step > 1:  # the update: clip to norm 0.1, then AdamW as the stored state has it
        params = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.999), weight_decay=0.0)
        optimizer.load_state_dict(torch.load(whole / f"step_{step - 1}" / "trainer.pt", weights_only=True)["optimizer"])
        torch.nn.utils.clip_grad_norm_(params, 0.1)
        optimizer.step()
        updated = adapter(whole / f"step_{step}")
        for name, p in student.named_parameters():
            if p.requires_grad:
                assert torch.allclose(p, updated[name.replace(".default", "")], atol=2e-6), name
        group = torch.load(whole / f"step_{step}" / "trainer.pt", weights_only=True)["optimizer"]["param_groups"][0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-3, (0.9, 0.999), 0.0)
    assert len(set(len(r["completion_ids"]) for r in rollouts)) > 2  # the lengths are uneven, else this shows little


def test_every_token_is_the_argmax_of_filtered_logits_and_the_rollouts_own_noise(whole, tiny):
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM
    model = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(tiny), whole / "step_4").eval()
    for r in [r for r in read(whole / "rollouts.jsonl") if r["step"] == 5][:4]:
        noise = torch.Generator().manual_seed(egrsd.rollout_seed(0, 5, r["index"]))
        for t, token in enumerate(r["completion_ids"]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([r["prompt_ids"] + r["completion_ids"][:t]])).logits[0, -1] / 1.1
            ranked = logits.argsort(descending=True)[:20]
            p = logits[ranked].softmax(0)
            kept = ranked[p.cumsum(0) - p < 0.95]
            drawn = logits - torch.empty_like(logits).exponential_(generator=noise).log()
            assert token == kept[drawn[kept].argmax()].item(), (r["index"], t)


def test_an_evaluation_samples_at_temperature_1_from_the_upper_95_percent_of_the_whole_vocabulary(tiny, problems, tmp_path):
    from transformers import AutoTokenizer, Qwen3ForCausalLM
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), Qwen3ForCausalLM.from_pretrained(tiny).eval()
    short = tmp_path / "short.jsonl"
    short.write_text("".join(problems.read_text().splitlines(True)[:2]))
    done = run("--eval", short, "--model", tiny, "--samples", 2, "--max_completion_length", 12, "--seed", 3, "--engine", "hf", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows, asked = read(tmp_path / "out" / "rank_0.jsonl"), egrsd.load_problems(str(short))
    assert len(rows) == 4
    for r in rows:
        prompt, drawn = egrsd.encode(tokenizer, egrsd.student_prompt(asked[r["problem_id"]]), thinking=True), []
        noise = torch.Generator().manual_seed(egrsd.rollout_seed(3, r["problem_id"], r["sample"]))
        for _ in range(r["tokens"]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + drawn])).logits[0, -1]
            ranked = logits.argsort(descending=True)
            p = logits[ranked].softmax(0)
            kept = ranked[p.cumsum(0) - p < 0.95]
            noisy = logits - torch.empty_like(logits).exponential_(generator=noise).log()
            drawn.append(kept[noisy[kept].argmax()].item())
        assert tokenizer.decode(drawn, skip_special_tokens=True) == r["completion"], r


def test_no_two_rollouts_share_a_seed():
    seeds = {egrsd.rollout_seed(seed, step, index) for seed in range(3) for step in range(50) for index in range(32)}
    assert len(seeds) == 3 * 50 * 32


MANY = """
import json, sys, egrsd
egrsd.score_answer = lambda completion, row: sum(map(ord, completion)) % 2 == 0
device, interrupt = egrsd.start_distributed(), egrsd.Interrupt()
egrsd.start_distributed = lambda: device
egrsd.write_report = lambda *a: None  # takes longer than a run of these
for flags in json.load(open(sys.argv[1])):  # many runs in one process: importing transformers takes longer than they do
    cfg = egrsd.configure(egrsd.parse_flags(flags))
    egrsd.validate(cfg)
    egrsd.run_training(cfg, interrupt)
"""
SETTINGS = {**{method: ["--method", method] for method in egrsd.TOKEN_WEIGHT}, "ema": ["--teacher", "ema"],
            "grouped": ["--method", "grpo", "--rollouts_per_prompt", "4", "--length_bonus", "0.9", "--batch_size", "12"],
            "clipped": ["--method", "opsd", "--kl_clip", "0.01"], "copy_2": ["--teacher", "copy", "--teacher_every", "2"],
            # these three are compared with others only:
            "ema_0": ["--teacher", "ema", "--teacher_decay", "0"], "ema_1": ["--teacher", "ema", "--teacher_decay", "1"],
            "copy_1": ["--teacher", "copy", "--teacher_every", "1"]}


@pytest.fixture(scope="session")
def other_models(tiny, tmp_path_factory):
    """Random Llama, Qwen2 and Olmo-3 models, the last without a chat template."""
    import transformers
    folder, tokenizer = tmp_path_factory.mktemp("others"), egrsd.toy_tokenizer()
    for name in ("Llama", "Qwen2", "Olmo3"):
        torch.manual_seed(8)
        if name == "Olmo3":
            tokenizer.chat_template = None
        getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@made_once("many")
def many(small, other_models, tmp_path_factory):
    """Folders of three-step runs of all settings: one rank without a stop (`one`), stopped after two (`cut`), two ranks."""
    base = tmp_path_factory.mktemp("many")
    (base / "many.py").write_text(MANY)
    common = [*map(str, small), "--steps", "3", "--warmup_steps", "1", "--save_every", "3", "--max_completion_length", "12",
              "--tokens_per_pass", "4096"]

    def runs(kind, names, *extra):
        return [[*common, *SETTINGS[name], *extra, "--out", f"{base}/{kind}/{name}"] for name in names]

    names = list(SETTINGS)[:-3]
    plans = {1: [*runs("one", SETTINGS), *runs("cut", names, "--steps", "2"),
                 *([f"--resume={base}/cut/{name}", "--steps=3"] for name in names),
                 *([*common, "--steps", "2", "--model", str(model), "--out", f"{base}/{model.name}"] for model in other_models.iterdir())],
             2: runs("two", names)}
    for ranks, plan in plans.items():
        (base / "plan.json").write_text(json.dumps(plan))
        done = run(base / "plan.json", ranks=ranks, driver=base / "many.py")
        assert done.returncode == 0, done.stderr[-3000:]
    return base


@pytest.mark.parametrize("setting", list(SETTINGS)[:-3])
def test_every_method_and_schedule_gives_the_same_on_two_ranks_and_after_a_resume(many, setting):
    one, cut, two = (read(many / kind / setting / "metrics.jsonl") for kind in ("one", "cut", "two"))
    assert list(map(reproducible, one)) == list(map(reproducible, cut)) and len(one) == 3
    for (name, left), right in zip(adapter(many / "one" / setting / "step_3").items(),
                                   adapter(many / "cut" / setting / "step_3").values(), strict=True):
        assert torch.equal(left, right), name
    for single, double in zip(one, two, strict=True):
        assert set(single) == set(double)
        for key in reproducible(single).keys() - {"engine_gap_mean", "engine_gap_p95", "engine_gap_max"}:
            assert single[key] == pytest.approx(double[key], rel=1e-4, abs=1e-5), (single["step"], key)
    weights = adapter(many / "one" / setting / "step_3")
    assert len(weights) == 28 and not any("teacher" in name for name in weights)
    assert sorted(p.name for p in (many / "one" / setting / "step_3").iterdir()) == SNAPSHOT
    assert all(x.abs().max() > 0 for name, x in weights.items() if "lora_B" in name)


def test_decay_0_is_a_copy_every_step_and_decay_1_is_frozen_exactly(many):
    metrics = {name: list(map(reproducible, read(many / "one" / name / "metrics.jsonl"))) for name in SETTINGS}
    assert metrics["ema_0"] == metrics["copy_1"] and metrics["ema_1"] == metrics["egrsd"]
    different = ("egrsd", "copy_1", "copy_2", "ema")
    assert len({str([m["delta_abs"] for m in metrics[name]]) for name in different}) == 4
    assert metrics["copy_2"][:2] == metrics["egrsd"][:2] and metrics["copy_2"][2] != metrics["egrsd"][2]
    assert metrics["clipped"][0]["loss"] < metrics["opsd"][0]["loss"]


def test_sft_trains_on_the_reference_solution_and_logs_nothing_it_has_not_measured(many):
    rows, metrics = read(many / "one" / "sft" / "rollouts.jsonl"), read(many / "one" / "sft" / "metrics.jsonl")
    assert all(row["completion"].endswith(row["gold"]) and row["completion"].strip() for row in rows)
    assert all(row["completion_ids"][-1] == 3 and len(row["completion_ids"]) > 3 for row in rows)  # 3: the end-of-turn token
    assert not {"reward", "correct", "advantage"} & set(rows[0])
    assert not {"reward", "accuracy", "truncated", "entropy", "delta_abs", "omega", "engine_gap_max"} & set(metrics[0])
    assert metrics[0]["tokens"] == sum(len(row["completion_ids"]) for row in rows if row["step"] == 1)


def finished(folder, before, after, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(config=config)))
    (folder / "metrics.jsonl").write_text("")
    rows = [{"avg@K": accuracy, "length": length, "eff": accuracy / (length / 1000)} for accuracy, length in (before, after)]
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def test_the_table_of_several_runs_holds_mean_and_spread_in_the_papers_order_or_the_grid(tmp_path):
    runs = [dict(method="egrsd", window=5, seed=1), dict(method="egrsd", window=5), dict(method="grpo"), dict(method="egrsd")]
    after = [(60.0, 50.0), (50.0, 40.0), (30.0, 60.0), (40.0, 50.0)]
    folders = [finished(tmp_path / f"{k}", (20.0 + 10 * run.get("seed", 0), 80.0), each, **run) for k, (run, each) in enumerate(zip(runs, after))]
    lines = egrsd.results_table(egrsd.load_runs(folders)[2]).splitlines()
    assert lines == ["| method | avg@K | gain | length | eff |", "| --- | --- | --- | --- | --- |",
                     "| baseline | 25.0 ± 7.1 |  | 80.0 ± 0.0 | 312.5 ± 88.4 |", "| grpo | 30.0 | 10.0 | 60.0 | 500.0 |",
                     "| egrsd, gamma 0.3, window 5 | 55.0 ± 7.1 | 30.0 ± 0.0 | 45.0 ± 7.1 | 1225.0 ± 35.4 |",
                     "| egrsd, gamma 0.3, window 0 | 40.0 | 20.0 | 50.0 | 800.0 |"]
    folders = [finished(tmp_path / f"{gamma} {window}", (20.0, 80.0), (gamma * 10 + window, 50.0), gamma=gamma, window=window, method="egrsd")
               for gamma in (0.3, 1.0) for window in (0, 5)]
    lines = egrsd.results_table(egrsd.load_runs(folders)[2]).splitlines()
    assert lines == ["| gamma | W = 0 | W = 5 |", "| --- | --- | --- |", "| 0.3 | 3.0 | 8.0 |", "| 1.0 | 10.0 | 15.0 |"]
    lines = egrsd.results_table(egrsd.load_runs(folders[1:])[2]).splitlines()
    assert lines[2:] == ["| 0.3 |  | 8.0 |", "| 1.0 | 10.0 | 15.0 |"]  # a grid with a hole
    other = finished(tmp_path / "other", (20.0, 80.0), (50.0, 50.0), gamma=0.3, window=0, method="egrsd", lr=1e-3)
    lines = egrsd.results_table(egrsd.load_runs([*folders[1:], other])[2]).splitlines()
    assert len(lines) == 7 and lines[0].startswith("| method") and any("lr 0.001" in line for line in lines)  # no grid: lr differs
    assert egrsd.results_table(egrsd.load_runs([])[2]) == ""


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Olmo3"])
def test_other_decoders_train_also_without_a_chat_template(many, name):
    metrics, weights = read(many / name / "metrics.jsonl"), adapter(many / name / "step_2")
    assert len(metrics) == 2 and all(0 < m["grad_norm"] and m["engine_gap_max"] < 1e-4 for m in metrics)
    assert len(weights) == 28 and all(x.abs().max() > 0 for key, x in weights.items() if "lora_B" in key)


def test_grpo_groups_are_neighbours_of_one_problem_also_across_ranks(many):
    rows = read(many / "two" / "grouped" / "rollouts.jsonl")
    assert len(rows) == 36
    for start in range(0, 36, 4):  # groups 0-3, 4-7, 8-11; ranks 0-5, 6-11
        group = rows[start:start + 4]
        rewards = torch.tensor([r["reward"] for r in group], dtype=torch.float64)
        assert len({r["problem"] for r in group}) == 1 and len({str(r["completion_ids"]) for r in group}) > 1
        for r in group:
            assert r["reward"] == pytest.approx(r["correct"] * (1 + 0.9 * (1 - len(r["completion_ids"]) / 12)))
            assert r["advantage"] == pytest.approx(((r["reward"] - rewards.mean()) / (rewards.std() + 1e-4)).item())


def test_two_ranks_give_what_one_gives(whole, small, driver, tmp_path):
    done = launched(*small, "--out", tmp_path / "two", ranks=2, driver=driver())
    assert done.returncode == 0, done.stderr
    for one, two in zip(read(whole / "metrics.jsonl"), read(tmp_path / "two" / "metrics.jsonl"), strict=True):
        for key in ("tokens", "h_max", "welford_mean", "welford_std", "advantage_mean", "advantage_std", "reward", "truncated"):
            assert one[key] == pytest.approx(two[key], rel=1e-5), (one["step"], key)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5), one["step"]
    for one, two in zip(read(whole / "rollouts.jsonl"), read(tmp_path / "two" / "rollouts.jsonl"), strict=True):
        assert one["completion_ids"] == two["completion_ids"] and one["advantage"] == pytest.approx(two["advantage"], abs=1e-9)


KILLER = """
import os, signal, itertools
calls, target = itertools.count(1), os.environ["KILL"]
def dying(name, function):
    def wrapper(*a, **k):
        if target.startswith(name) and next(calls) == int(target.split(":")[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*a, **k)
    return wrapper
egrsd.Path.rename = dying("rename", egrsd.Path.rename)
egrsd.teach = dying("teach", egrsd.teach)
"""


def test_a_killed_run_resumed_equals_the_uninterrupted_one_bit_for_bit(whole, small, driver, tmp_path):
    """kill -9 in the middle of step 3 and, resumed, just before the rename that ends the save of step 6 (config: rename 1)."""
    out, killer = tmp_path / "killed", driver(KILLER)
    flags = [*small, "--out", out]
    for kill, last in (("teach:3", 2), ("rename:5", 5)):
        done = run(*flags, driver=killer, KILL=kill)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert egrsd.snapshots(out)[-1].name == f"step_{last}"
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "rew')  # a torn last line
        flags = ["--resume", out]
    done = run("--resume", out, driver=driver())
    assert done.returncode == 0, done.stderr
    assert list(map(reproducible, read(whole / "metrics.jsonl"))) == list(map(reproducible, read(out / "metrics.jsonl")))
    assert read(whole / "rollouts.jsonl") == read(out / "rollouts.jsonl")
    for (name, one), two in zip(adapter(whole / "step_12").items(), adapter(out / "step_12").values(), strict=True):
        assert torch.equal(one, two), name


def test_every_lora_b_moves_in_step_1_and_the_snapshot_loads_in_peft(whole, tiny):
    weights = adapter(whole / "step_1")
    b = {name: x for name, x in weights.items() if "lora_B" in name}
    assert len(b) == 14 and len(weights) == 28
    assert all(x.abs().max() > 0 for x in b.values()), [name for name, x in b.items() if not x.any()]
    assert sorted(p.name for p in (whole / "step_1").iterdir()) == SNAPSHOT


def test_changed_base_weights_stop_the_next_save(small, driver, tmp_path):
    patch = """
real = egrsd.learn
def learn(model, *a):
    with egrsd.torch.no_grad():
        next(p for n, p in model.named_parameters() if "q_proj.base_layer" in n)[0, 0] += 1e-3
    return real(model, *a)
egrsd.learn = learn
"""
    done = run(*small, "--out", tmp_path / "run", driver=driver(patch))
    assert done.returncode == 1 and "base weights" in done.stderr, done.stderr
    assert not egrsd.snapshots(tmp_path / "run")


def test_a_run_resumed_on_another_base_is_refused(whole, tmp_path):
    (tmp_path / "run").mkdir()
    stored = json.loads((whole / "config.json").read_text())
    stored["config"]["model"] = str(make_tiny(tmp_path / "tiny", seed=8))
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    shutil.copytree(whole / "step_12", tmp_path / "run" / "step_12")
    done = run("--resume", tmp_path / "run", "--steps", 13)
    assert done.returncode == 2 and "not the base that" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run" / "step_13").exists()


def test_rollouts_are_cut_at_the_first_end_token_which_is_kept_and_trained(whole, tiny):
    ends = set(egrsd.load_tokenizer(str(tiny))[1])
    assert len(ends) == 7
    for r in read(whole / "rollouts.jsonl"):
        assert not ends & set(r["completion_ids"][:-1])
        assert r["completion_ids"][-1] in ends or len(r["completion_ids"]) == 24
    logged = read(whole / "metrics.jsonl")
    assert any(0 < m["truncated"] < 100 for m in logged)
    assert max(m["engine_gap_max"] for m in logged) < 1e-4


def test_config_and_logs_hold_what_the_readme_lists(whole):
    stored = json.loads((whole / "config.json").read_text())["config"]
    assert stored["gamma"] == 0.8 and set(stored) == {f.name for f in egrsd.dataclasses.fields(egrsd.Config)}
    metrics = read(whole / "metrics.jsonl")[-1]
    wanted = ("step reward accuracy length truncated advantage_mean advantage_std welford_mean welford_std h_max entropy "
              "delta_abs w w_clipped omega loss grad_norm tokens skipped engine_gap_mean engine_gap_p95 engine_gap_max lr")
    assert set(wanted.split()) <= set(metrics)
    assert list(read(whole / "rollouts.jsonl")[0]) == ("step index problem gold prompt_ids teacher_ids completion_ids "
                                                      "completion correct reward advantage").split()


# ------------------------------------------------------------------------------------------------------- data and prompts

def test_both_prompts_end_with_the_same_header_and_carry_the_solution_only_for_the_teacher(tiny):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    row = dict(problem="What is 2+2?", solution="2+2=4, so \\boxed{4}", gold="4")
    for thinking, header in ((False, "<|assistant|><think></think>"), (True, "<|assistant|>")):
        student, teacher = (tokenizer.decode(egrsd.encode(tokenizer, turn(row), thinking))
                            for turn in (egrsd.student_prompt, egrsd.teacher_prompt))
        assert student.endswith(header) and teacher.endswith(header)
        assert row["solution"] in teacher and row["solution"] not in student
        assert row["problem"] in teacher and row["problem"] in student
    tokenizer.chat_template = None  # a base model
    assert tokenizer.decode(egrsd.encode(tokenizer, egrsd.student_prompt(row), False)) == egrsd.student_prompt(row) + "\n\n"


@pytest.mark.parametrize("row, gold", [
    (dict(answer="So 3.\n#### 1,234"), "1,234"), (dict(answer=33), "33"), (dict(Answer=0), "0"), (dict(answer=2.5), "2.5"),
    (dict(answer="", Answer="x"), "x"), (dict(solution=r"so \boxed{\frac{1}{2}}"), r"\frac{1}{2}"),
    (dict(answer=None, solution=r"\boxed{1} or \boxed{{2}}"), "{2}"), (dict(problem="x"), None), (dict(answer="#### "), None),
    (dict(answer=float("nan"), solution=r"\boxed{7}"), "7"), (dict(solution=None), None),
    (dict(Answer="4", answer="so\n#### 5"), "5"), (dict(Answer=float("nan"), answer="5"), "5"), (dict(Answer="  ", answer=[1]), None),
    (dict(answer=True, solution=r"\boxed{7}"), "7")])
def test_gold_answer(row, gold):
    assert egrsd.gold_answer(row) == gold


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    import datasets
    for name, problem in (("train[2].parquet", "mine"), ("train2.parquet", "another")):
        datasets.Dataset.from_dict(dict(problem=[problem], solution=["s"], answer=["1"])).to_parquet(tmp_path / name)
    assert [row["problem"] for row in egrsd.load_problems(str(tmp_path / "train[2].parquet"))] == ["mine"]


def test_the_identity_of_a_model_takes_in_every_byte_of_every_weight_file(tmp_path):
    seen = {egrsd.identity(str(tmp_path))}
    for name in ("model.safetensors", "pytorch_model.bin"):
        content = bytearray(3 * 2**20)
        for place in (0, 10, 3 * 2**20 - 1):
            content[place] = 7
            (tmp_path / name).write_bytes(content)
            seen.add(egrsd.identity(str(tmp_path)))
    assert len(seen) == 7 and egrsd.identity("hub/id") == "hub/id"


def test_an_adapter_folder_given_as_the_model_is_refused(whole, problems, tmp_path):
    done = run("--model", whole / "step_1", "--data", problems, "--engine", "hf", "--out", tmp_path / "run")
    assert done.returncode == 2 and "holds an adapter" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_dropout_in_a_models_config_stays_off_also_under_gradient_checkpointing(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "dropout")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "dropout" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    gradients = []
    for checkpoint in (False, True):
        cfg = egrsd.Config(model=str(tmp_path / "dropout"), lora_rank=4, method="sft", grad_checkpoint=checkpoint)
        model = egrsd.load_model(cfg, torch.device("cpu"))
        egrsd.learn(model, [egrsd.Rollout(0, {}, [5, 6, 7], [], [20, 30, 40, 50])], cfg, 0.0, 4)
        gradients.append(torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_B" in name]))
    assert torch.allclose(*gradients, atol=1e-7), (gradients[0] - gradients[1]).abs().max()


def test_every_kind_of_local_file_loads(problems, tmp_path):
    import datasets
    rows = egrsd.load_problems(str(problems))
    assert len(rows) == 40 and all(row["gold"] == row["solution"].split("#### ")[1] for row in rows)
    table = datasets.Dataset.from_dict(dict(problem=["a", "b", ""], solution=["s", "t", "u"], Answer=[1, 2, 3], source=["x"] * 3))
    table.to_parquet(tmp_path / "t.parquet")
    assert [row["gold"] for row in egrsd.load_problems(str(tmp_path / "t.parquet"))] == ["1", "2"]
    odd = [dict(problem="a\u2028b", solution="s", answer=1), dict(problem="half \ud800", solution="s", answer=1)]
    (tmp_path / "odd.jsonl").write_bytes(b"\r\n".join(json.dumps(row, ensure_ascii=row is odd[1]).encode() for row in odd))
    assert [row["problem"] for row in egrsd.load_problems(str(tmp_path / "odd.jsonl"))] == ["a\u2028b"]


@pytest.mark.parametrize("content, message", [
    (None, "no .jsonl or .parquet"), ("", "none of its 0 rows"), ('{"problem": 1}\n{"a', "line 2: cannot be read as JSON"), ("[1]", "line 1: not a JSON object"),
    ('{"text": "x", "answer": "y"}', "columns: answer, text"), ('{"problem": "x", "solution": "no box"}', "gold answer")])
def test_a_bad_data_file_is_named_with_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    done = run("--data", path)
    assert done.returncode == 2 and "bad.jsonl" in done.stderr and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_draw_gives_each_epoch_once_straddles_epochs_and_counts_long_rows():
    class Words:
        chat_template = None

        def __call__(self, text):
            return type("ids", (), dict(input_ids=text.split()))

    rows = [dict(problem=f"p{i} " + "long " * 100 * (i == 3), solution="s", gold="1") for i in range(7)]
    cfg, state = egrsd.Config(max_length=80, max_completion_length=10), dict(position=0, too_long=0)
    seen = [egrsd.draw(rows, Words(), cfg, state, 4) for _ in range(6)]
    names = [row["problem"].split()[0] for batch in seen for row, _, _ in batch]
    for epoch in range(4):
        assert sorted(names[epoch * 6:epoch * 6 + 6]) == ["p0", "p1", "p2", "p4", "p5", "p6"]
    assert names[:6] != names[6:12] and state["too_long"] in (3, 4)
    other = egrsd.draw(rows, Words(), egrsd.Config(max_length=80, max_completion_length=10, seed=1), dict(position=0, too_long=0), 6)
    assert [row["problem"].split()[0] for row, _, _ in other] != names[:6]
    later = dict(position=state["position"], too_long=0)
    assert egrsd.draw(rows, Words(), cfg, state, 3) == egrsd.draw(rows, Words(), cfg, later, 3)
    with pytest.raises(egrsd.UserError, match="max_length"):
        egrsd.draw(rows, Words(), egrsd.Config(max_length=12, max_completion_length=10), state, 1)


# ---------------------------------------------------------------------------------------------------------------- grading
# (completion, gold, what a fair grader says, why math-verify says otherwise or None)

N400 = "1234567890" * 40
M400 = N400[:-1] + "1"
F400 = "0." + "1234567890" * 40
G400 = F400[:-1] + "1"
PAIRS = [
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
    (r"so \boxed{2 1/2}", "2.5", True, "a space multiplies nothing, it reads 3/2"),
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
    (r"\fbox{42}", "42", False, None),
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
    (r"\boxed{12~\mathrm{m/s}}", "12", True, "cut to the text 12~, which does not parse"),
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
    (r"\boxed{4.5 \times 10^{33} \text{ erg/s}}", "4.5e33", True, "read as 4.5*E*33: `e` is Euler's number"),
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
    (r"\boxed{\approx 3.2}", "3.2", True, "a leading relation does not parse"),
    (r"\boxed{x \approx 3.2}", "3.2", True, None),
    (r"\boxed{\approx 3.3}", "3.2", False, None),
    (r"\boxed{\sim 100}", "100", True, "a leading relation does not parse"),
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
    (r"\boxed{-2 \le x \le 7}", "[-2,7]", True, "relation against set needs allow_set_relation_comp=True"),
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
    (r"\boxed{east}", "seat", False, "bare words are products of letters, and products commute"),
    (r"\boxed{\text{Monday}}", r"\text{Sunday}", False, None),
    (r"\boxed{2516_8}", "2516_8", True, None),
    (r"\boxed{2516_{8}}", "2516_8", True, None),
    (r"\boxed{2516}", "2516_8", True, None),
    (r"\boxed{2516_7}", "2516_8", False, "the base subscript is dropped"),
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
    (r"\boxed{2x+3y=5}", "2x+3y-5=0", True, None),
    (r"\boxed{4x+6y=10}", "2x+3y=5", True, None),
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
    (r"\boxed{10\,000}", "10000", True, "read as 10*0, which is 0"),
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
]
HOSTILE = [r"9^{9^{9^{9}}}", r"10^{10^{10}}", "100000000!", "(" * 2000 + ")" * 2000, r"\frac{1}{0}", "1" * 100_000, "1e999999999",
           "3^{100000000}", r"2^{2^{40}}", r"\binom{10^9}{10^8}", r"\sum_{k=1}^{10^9} \frac{1}{k}", r"\prod_{k=1}^{10^8} k",
           "(x+1)^{100000}", r"\sqrt{" * 300 + "2" + "}" * 300, r"\int_0^{10^9} x^x dx", r"\sin(10^{10^{8}})", "((9!)!)!",
           "0.5^{2^{36}}", "(x+y+z+w)^{200}", r"\log_2 3^{100000000}", "7^{77777777}", r"\{" + "1," * 400 + r"1\}",
           "__import__('os').abort()", "\x00\ud800", "{" * 900, r"\frac" * 180, r"10^{-10^{10}}", "x^{1000000000}=1",
           r"\lfloor 10^{10^{9}} / 7 \rfloor", r"\left[0,10^{10^{9}}\right]", r"\gcd(3^{10000000},2)", r"e^{e^{e^{25}}}"]


def test_263_answers_are_graded_fairly_or_the_disagreement_is_known():
    wrong = []
    for completion, gold, fair, reason in PAIRS:
        verdict = egrsd.grade(completion, gold)
        if verdict != (fair if reason is None else not fair):
            wrong.append((completion, gold, verdict))
    assert not wrong
    assert len(PAIRS) == 263 and sum(fair for _, _, fair, _ in PAIRS) == 153 and sum(bool(r) for *_, r in PAIRS) == 13


def test_32_hostile_answers_are_bounded_and_wrong_and_leave_the_grader_well():
    assert len(HOSTILE) == 32
    start = time.perf_counter()
    for answer in HOSTILE:
        assert egrsd.grade(rf"so \boxed{{{answer}}}", "42x") is False, answer[:60]
    assert time.perf_counter() - start < 40
    assert egrsd.grade(r"\boxed{\frac12}", "0.5") is True


def test_32_ordinary_answers_cost_under_a_tenth_of_a_second():
    egrsd.grade(r"\boxed{\frac12}", "0.5")
    ordinary = [(f"{n}", f"{n}.0") for n in range(26)] + [(rf"\frac{{{n}}}{{7}}", rf"\frac{{{n}}}{{7}}") for n in range(4)]
    ordinary += [(r"\frac12", "0.5"), (r"2\sqrt{2}", r"\sqrt{8}")]
    start = time.perf_counter()
    assert all(egrsd.grade(rf"\boxed{{{answer}}}", gold) for answer, gold in ordinary)
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("text, box", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}} \boxed{3", r"\frac{1}{2}"), (r"\boxed{a\}b}", r"a\}b"), ("none", None),
    (r"\boxed {x}", "x"), (r"\boxed{}", ""), (r"\boxed{1 \boxed{2}}", "2"), ("}}" + r"\boxed{{{7}}}", "{{7}}"), ("", None)])
def test_last_boxed(text, box):
    assert egrsd.last_boxed(text) == box


def test_a_long_text_costs_linear_time():
    start = time.perf_counter()
    assert egrsd.last_boxed(r"\boxed{" * 100_000) is None
    assert egrsd.grade("\\boxed{" + "1" * 1_000_000 + "}", "2") is False
    assert time.perf_counter() - start < 2


# ------------------------------------------------------------------------------------------------- evaluation

GSM8K = """---
configs:
- config_name: main
  data_files:
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: test, path: socratic/test-*}
---
"""
# benchmark: its files, the gold answers they hold, and a right and a wrong way to answer the last of them
LAYOUTS = {
    "aime24": ({"HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet": [
        dict(id=60, problem="Every morning Aya walks.", solution=r"so \boxed{204}", answer="204", url="u", year="2024"),
        dict(id=61, problem="Find x.", solution=r"\boxed{025}", answer="025", url="u", year="2024")]}, ["204", "025"], "25", "26"),
    "aime25": ({"yentinglin/aime_2025/data/train-00000-of-00001.parquet": [
        dict(id=1, problem="Find the sum.", answer=70, solution="70", url="u", year=2025),
        dict(id=2, problem="Find n.", answer=588, solution="588", url="u", year=2025)]}, ["70", "588"], "588", "589"),
    "hmmt25": ({"MathArena/hmmt_feb_2025/data/train-00000-of-00001.parquet": [
        dict(problem_idx=1, problem="Compute.", answer="103", problem_type=["Number Theory"]),
        dict(problem_idx=2, problem="Find it.", answer=r"\frac{9 \sqrt{23}}{23}", problem_type=["Geometry"])]},
        ["103", r"\frac{9 \sqrt{23}}{23}"], r"\frac{9}{\sqrt{23}}", r"\frac{9}{23}"),
    "math500": ({"HuggingFaceH4/MATH-500/test.jsonl": [
        dict(problem="Convert.", solution=r"\boxed{\left( 3, \frac{\pi}{2} \right)}", answer=r"\left( 3, \frac{\pi}{2} \right)",
             subject="Precalculus", level=2, unique_id="test/1")]}, [r"\left( 3, \frac{\pi}{2} \right)"], r"(3, \pi/2)", r"(3, \pi)"),
    "minerva": ({"math-ai/minervamath/test.jsonl": [
        dict(question="A star?", answer="6e33"), dict(question="How hot?", answer="5.47e5")]}, ["6e33", "5.47e5"], r"5.47 \times 10^5", "5.47"),
    "gsm8k": ({"openai/gsm8k/README.md": GSM8K, "openai/gsm8k/socratic/test-00000-of-00001.parquet": [dict(question="no", answer="no")],
               "openai/gsm8k/main/test-00000-of-00001.parquet": [
        dict(question="Eggs?", answer="16 - 3 = <<16-3=13>>13\n#### 13"), dict(question="Cost?", answer="much\n#### 1,080")]},
        ["13", "1,080"], "1080", "108")}


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder in which the benchmarks' hub ids are folders, in the layout the hub has."""
    from datasets import Dataset
    base = tmp_path_factory.mktemp("hub")
    for files, *_ in LAYOUTS.values():
        for name, rows in files.items():
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                Dataset.from_list(rows).to_parquet(base / name)
            else:
                (base / name).write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return base


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_each_benchmarks_layout_loads_and_grades(name, hub, monkeypatch):
    monkeypatch.chdir(hub)
    _, gold, right, wrong = LAYOUTS[name]
    problems = egrsd.load_problems(*egrsd.BENCHMARKS[name], solved=False)
    assert [row["gold"] for row in problems] == gold and all(row["problem"] for row in problems)
    assert egrsd.grade(rf"so \boxed{{{right}}}", gold[-1]) and not egrsd.grade(rf"so \boxed{{{wrong}}}", gold[-1])


def evaluation(tiny, out, *flags):
    return ["--model", tiny, "--out", out, "--samples", 2, "--max_completion_length", 16, "--eval", ",".join(LAYOUTS), *flags]


def samples(folder):
    rows = [row for file in folder.glob("rank_*.jsonl") for row in read(file)]
    return sorted(rows, key=lambda row: (row["benchmark"], row["problem_id"], row["sample"]))


GRADED = "egrsd.grade = lambda completion, gold: sum(map(ord, completion)) % 3 == 0"  # the tiny model is never right
STOPPED = GRADED + """
import os, signal
lines, real = iter(range(1, 99)), egrsd.write_lines
def write_lines(file, rows):
    real(file, rows)
    if next(lines) == 7:
        file.write(b'{"benchmark": "aime24", "probl')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
egrsd.write_lines = write_lines
"""


@made_once("hf", "vllm")
def evaluated(request, tiny, hub, driver, tmp_path_factory):
    """The evaluation of all six benchmarks on one rank without a stop; and on two ranks, killed, then run again."""
    if request.param == "vllm" and not egrsd.importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed")
    base, flags = tmp_path_factory.mktemp("evaluated"), ["--engine", request.param]
    done = run(*evaluation(tiny, base / "whole", *flags), driver=driver(GRADED), cwd=hub)
    assert done.returncode == 0, done.stderr
    killed = run(*evaluation(tiny, base / "killed", *flags), driver=driver(STOPPED), cwd=hub, ranks=2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = [(base / "killed" / f"rank_{rank}.jsonl").read_bytes() for rank in (0, 1)]
    assert [text.count(b"\n") for text in first] == [7, 7] and not any(text.endswith(b"\n") for text in first)
    again = run(*evaluation(tiny, base / "killed", *flags), driver=driver(GRADED), cwd=hub, ranks=2)
    assert again.returncode == 0, again.stderr
    for rank, text in enumerate(first):
        assert (base / "killed" / f"rank_{rank}.jsonl").read_bytes().startswith(text[:text.rfind(b"\n") + 1])
    return base, done.stdout


def test_an_evaluation_killed_on_two_ranks_and_run_again_loses_nothing_and_counts_nothing_twice(evaluated):
    base, _ = evaluated
    one, two = samples(base / "whole"), samples(base / "killed")
    assert one == two and len(one) == 2 * 10 + 2 * (2 + 2 + 1 + 2 + 2)
    assert len({(row["benchmark"], row["problem_id"], row["sample"]) for row in one}) == len(one)
    assert len({row["completion"] for row in one}) > 0.9 * len(one)
    assert json.loads((base / "whole" / "results.json").read_text()) == json.loads((base / "killed" / "results.json").read_text())


def test_the_table_is_what_the_lines_say(evaluated):
    base, printed = evaluated
    table = {row["name"]: row for row in json.loads((base / "whole" / "results.json").read_text())}
    assert list(table) == [*LAYOUTS, "Avg."]
    rows, accuracies, lengths = samples(base / "whole"), [], []
    for name in LAYOUTS:
        mine = [row for row in rows if row["benchmark"] == name]
        right = {}
        for row in mine:
            right.setdefault(row["problem_id"], []).append(row["correct"])
        k = 10 if name == "aime24" else 2
        assert all(len(verdicts) == k for verdicts in right.values())
        n, means = len(right), [sum(verdicts) / k for verdicts in right.values()]
        mean = sum(means) / n
        accuracies.append(100 * mean)
        lengths.append(sum(row["tokens"] for row in mine) / len(mine))
        assert table[name]["avg@K"] == pytest.approx(100 * mean) and table[name]["length"] == pytest.approx(lengths[-1])
        assert table[name]["pass@K"] == pytest.approx(100 * sum(any(verdicts) for verdicts in right.values()) / n)
        error = 100 * math.sqrt(sum((x - mean) ** 2 for x in means) / (n - 1) / n) if n > 1 else 0
        assert table[name]["se"] == pytest.approx(error)
        assert table[name]["eff"] == pytest.approx(1000 * accuracies[-1] / lengths[-1])
        assert [name, f"{100 * mean:.2f}", f"{error:.2f}"] in [line.split()[:3] for line in printed.splitlines()]
    assert 10 < sum(accuracies) / 6 < 60 and len({round(x, 3) for x in accuracies}) > 1
    average = table["Avg."]
    assert average["avg@K"] == pytest.approx(sum(accuracies) / 6) and average["length"] == pytest.approx(sum(lengths) / 6)
    assert average["eff"] == pytest.approx(sum(accuracies) / (sum(lengths) / 1000))
    assert average["se"] == pytest.approx(math.sqrt(sum(table[name]["se"] ** 2 for name in LAYOUTS)) / 6)
    assert printed.splitlines()[-1].split() == ["base", *(f"{x:.2f}" for x in (*accuracies, sum(accuracies) / 6)),
                                                f"{sum(lengths) / 6:.2f}", f"{average['eff']:.2f}"]
    assert {row["finish"] for row in rows} == {"stop", "length"}
    assert all((row["finish"] == "length") <= (row["tokens"] == 16) for row in rows)


def test_all_snapshots_of_a_run_are_evaluated_each_with_its_weights_and_other_settings_are_refused(whole, problems, driver, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text("".join(problems.read_text().splitlines(True)[:3]))
    shutil.copytree(whole, tmp_path / "run")
    for step in [path for path in (tmp_path / "run").glob("step_*") if path.name not in ("step_1", "step_12")]:
        shutil.rmtree(step)
    flags = ["--eval", short, "--adapter", tmp_path / "run", "--max_completion_length", 16, "--engine", "hf"]
    done = run(*flags, driver=driver(GRADED))
    assert done.returncode == 0, done.stderr
    first, last = (samples(tmp_path / "run" / f"step_{n}" / "eval") for n in (1, 12))
    assert len(first) == len(last) == 3 * 4 and [row["completion"] for row in first] != [row["completion"] for row in last]
    assert done.stdout.index("step_1,") < done.stdout.index("step_12,")
    done = run(*flags[:2], "--adapter", tmp_path / "run" / "step_12", *flags[4:], "--out", tmp_path / "alone", driver=driver(GRADED))
    assert done.returncode == 0 and samples(tmp_path / "alone" / "step_12") == last, done.stderr
    done = run(*flags, "--samples", 3)
    assert done.returncode == 2 and "--samples 3: the evaluation in" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run(*flags, "--model", make_tiny(tmp_path / "tiny", seed=8))
    assert done.returncode == 2 and "has another" in done.stderr, done.stderr
    row = json.loads(short.read_text().splitlines()[0])
    short.write_text(json.dumps({**row, "question": "again"}))  # the same gold answer
    done = run(*flags)
    assert done.returncode == 2 and "of other problems as short" in done.stderr, done.stderr
    assert len(samples(tmp_path / "run" / "step_1" / "eval")) == 12


def test_report_pairs_two_evaluations_by_problem(tmp_path, capsys):
    verdicts = {"base": {"a": ["10", "00", "11"], "b": ["00", "11"]}, "trained": {"a": ["11", "00", "11"], "b": ["00", "10"]}}
    for name, benchmarks in verdicts.items():
        (tmp_path / name).mkdir()
        rows = [dict(benchmark=benchmark, problem_id=p, sample=k, correct=x == "1", tokens=5)
                for benchmark, problems in benchmarks.items() for p, word in enumerate(problems) for k, x in enumerate(word)]
        (tmp_path / name / "rank_0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / "settings.json").write_text(json.dumps(dict(problems=dict(a="1", b="2"))))
    egrsd.compare([tmp_path / "base", tmp_path / "trained"])
    a, b = (50 + 0 + 0) / 3, (0 - 50) / 2
    error_a = math.sqrt(((50 - a) ** 2 + a ** 2 * 2) / 2 / 3)
    error_b = math.sqrt((b ** 2 + (-50 - b) ** 2) / 1 / 2)
    title, _, *lines = capsys.readouterr().out.splitlines()[1:]
    assert title.endswith("trained minus " + str(tmp_path / "base") + ", points, 5 problems in pairs")
    assert [line.split() for line in lines] == [["a", f"{a:.2f}", f"{error_a:.2f}"], ["b", f"{b:.2f}", f"{error_b:.2f}"],
                                                ["Avg.", f"{(a + b) / 2:.2f}", f"{math.hypot(error_a, error_b) / 2:.2f}"]]
    (tmp_path / "base" / "settings.json").write_text(json.dumps(dict(problems=dict(a="3", b="4"))))
    with pytest.raises(egrsd.UserError, match="no problems in common"):
        egrsd.compare([tmp_path / "base", tmp_path / "trained"])


# ------------------------------------------------------------------------------------------------- pictures

def page_data(page):
    text = page.read_text()
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def check_figures(metrics, data):
    """The decile and regime figures of metrics, recomputed from a trace page that holds the whole step -> regimes seen."""
    peak, gamma, tokens = max(data["h_max"], 1), data["gamma"], []
    for r in data["rollouts"]:
        for t, h in enumerate(r["H"]):
            ahead = min(r["H"][t:t + data["window"] + 1])
            gates = [min(1, max(0.1, 1 - gamma * x / peak)) for x in (h, ahead)]
            kind = "lock" if h <= 0.08 * peak else "mid" if h < 0.2 * peak else "fork" if ahead >= 0.2 * peak else (
                "pivot" if ahead <= 0.08 * peak else "mid")
            tokens.append((h, abs(r["delta"][t]), *gates, kind))
    tokens.sort(key=lambda token: token[0])
    size, more = divmod(len(tokens), 10)
    start = 0
    for k in range(1, 11):
        part = tokens[start:start + size + (k <= more)]
        start += len(part)
        assert metrics[f"delta_d{k}"] == pytest.approx(sum(token[1] for token in part) / len(part), rel=1e-3)
        assert metrics[f"omega_d{k}"] == pytest.approx(sum(token[3] for token in part) / len(part), rel=1e-3)
    for name in ("lock", "mid", "fork", "pivot"):
        those = [token for token in tokens if token[4] == name]
        assert metrics[f"share_{name}"] == pytest.approx(100 * len(those) / len(tokens))
        if those:
            assert metrics[f"restored_{name}"] == pytest.approx(sum(token[3] - token[2] for token in those) / len(those), abs=1e-4)
    return len(tokens), {token[4] for token in tokens}


@pytest.mark.parametrize("step", [1, 12])
def test_decile_and_regime_figures_recomputed_from_the_trace_page(whole, step):
    data, metrics = page_data(whole / f"trace_{step}.html"), read(whole / "metrics.jsonl")[step - 1]
    assert data["step"] == step and data["window"] == 2 and data["gamma"] == 0.8 and len(data["rollouts"]) == data["count"] == 8
    assert check_figures(metrics, data)[0] == metrics["tokens"]
    assert "restored_lock" not in metrics  # the random model is never sure: without meaning, so left out


def test_regimes_of_varied_entropies_recomputed_from_the_trace_page(tmp_path):
    generator, rollouts, cfg = torch.Generator().manual_seed(3), [], egrsd.Config(gamma=0.7, window=3)
    for i, length in enumerate((1, 50, 333)):
        entropy = torch.rand(length, generator=generator) ** 6 * 2.5
        rollouts.append(egrsd.Rollout(i, dict(problem="", gold=""), [], [], [5] * length, teacher_entropy=entropy,
                                      delta=torch.randn(length, generator=generator)))
    peak = max(r.teacher_entropy.max().item() for r in rollouts)
    for r in rollouts:
        r.gate = egrsd.confidence_gate(r.teacher_entropy, peak, 0.7, 3)
    egrsd.write_trace(tmp_path / "page.html", 1, rollouts, egrsd.toy_tokenizer(), cfg)
    metrics = {name: float(x) for name, x in egrsd.gate_figures(rollouts, cfg).items()}
    assert check_figures(metrics, page_data(tmp_path / "page.html")) == (384, {"lock", "mid", "fork", "pivot"})
    assert metrics["restored_pivot"] > 0.1 and metrics["restored_fork"] < metrics["restored_pivot"]


def test_the_page_shows_what_the_run_logged(whole):
    rows = [row for row in read(whole / "rollouts.jsonl") if row["step"] == 12]
    for row, r in zip(rows, page_data(whole / "trace_12.html")["rollouts"], strict=True):
        assert r["ids"] == row["completion_ids"] and r["reward"] == row["reward"] and r["problem"] == row["problem"]
        assert len(r["text"]) == len(r["H"]) == len(r["delta"]) == len(r["ids"])


def byte_tokenizer():
    """Byte-level, as Qwen's, without merges: every emoji is four tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_hostile_and_broken_text_stays_text_on_a_page_under_2_mb(tmp_path):
    tokenizer = byte_tokenizer()
    hostile = "</script><script>alert(1)</script><!-- \U0001f600 \u05e9\u05dc\u05d5\u05dd <img src=x onerror=alert(2)> & \u2028"
    ids = tokenizer(hostile).input_ids
    broken = [*ids, *tokenizer("\U0001f600").input_ids[:3], *ids, tokenizer("\U0001f600").input_ids[0]]
    for each in (ids, broken):
        texts = egrsd.token_texts(tokenizer, each)
        assert len(texts) == len(each) and "".join(texts).replace("\ufffd", "") == tokenizer.decode(each).replace("\ufffd", "")
    assert "\U0001f600" in egrsd.token_texts(tokenizer, ids)  # at its last byte
    rng = torch.Generator().manual_seed(0)
    rollouts = []
    for i in range(64):  # more than the page takes
        length = 1024 if i else len(broken)
        row = dict(problem=hostile, gold="</script>")
        rollouts.append(egrsd.Rollout(i, row, [], [], (torch.randint(100, 256, (length,), generator=rng) if i else torch.tensor(broken)).tolist(),
            reward=1.5, advantage=-0.123456789, teacher_entropy=torch.rand(length, generator=rng), delta=torch.randn(length, generator=rng)))
    egrsd.write_trace(tmp_path / "trace.html", 7, rollouts, tokenizer, egrsd.Config(window=5))
    text, data = (tmp_path / "trace.html").read_text(), page_data(tmp_path / "trace.html")
    assert (tmp_path / "trace.html").stat().st_size < 2e6 and data["count"] == 64
    assert text.count("<script") == 2 and "<img" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert 30 < len(data["rollouts"]) < 64 and data["rollouts"][0]["problem"] == hostile


def test_a_full_page_of_a_real_vocabulary_stays_below_2_mb(tmp_path):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({f" token{i}": i for i in range(151936)}, unk_token=" token0"))
    core.decoder = decoders.Fuse()
    tokenizer, rng, rollouts = PreTrainedTokenizerFast(tokenizer_object=core), torch.Generator().manual_seed(0), []
    for i in range(40):
        rollouts.append(egrsd.Rollout(i, dict(problem="x" * 500, gold="1"), [], [], torch.randint(100000, 151936, (1024,), generator=rng).tolist(),
                                      teacher_entropy=torch.rand(1024, generator=rng), delta=-torch.rand(1024, generator=rng)))
    egrsd.write_trace(tmp_path / "trace.html", 1, rollouts, tokenizer, egrsd.Config())
    assert 1e6 < (tmp_path / "trace.html").stat().st_size < 2e6 and len(page_data(tmp_path / "trace.html")["rollouts"]) == 35


def test_a_run_ends_with_its_report(whole):
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG") and (whole / "report.png").stat().st_size < 300e3


def test_report_draws_several_runs_and_a_grid(many, tmp_path):
    folders = [many / "one" / name for name in ("egrsd", "grpo", "sft", "ema", "copy_2")]
    egrsd.report(egrsd.Config(report=folders, out=str(tmp_path / "all")))
    assert (tmp_path / "all" / "report.png").read_bytes().startswith(b"\x89PNG")
    labels = list(egrsd.load_runs(folders)[0])
    assert [label.split(",")[0] for label in labels] == ["sft", "grpo", "egrsd", "egrsd", "egrsd"]
    assert labels[2].startswith("egrsd, gamma 0.8, window 2, ")
    configs, steps, _ = egrsd.load_runs([many / "one" / "egrsd", many / "cut" / "egrsd"])  # as two seeds of one setting
    assert len(configs) == 1 and len(steps) == 2 * steps["step"].nunique()
    for gamma in (0.3, 1.0):
        for window in (0, 5):
            folder = tmp_path / f"{gamma}-{window}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(dict(config=dict(gamma=gamma, window=window, method="egrsd"))))
            (folder / "metrics.jsonl").write_text((many / "one" / "egrsd" / "metrics.jsonl").read_text())
            (folder / "results.json").write_text(json.dumps([{"avg@K": 10.0, "length": 9.0, "eff": 1}, {"avg@K": 20.0 + window, "length": 8.0, "eff": 1}]))
    from matplotlib.axes import Axes
    texts, real = [], Axes.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "text", lambda self, x, y, text, *a, **k: texts.append((x, y, text)) or real(self, x, y, text, *a, **k))
        egrsd.write_report(tmp_path / "grid.png", [tmp_path / f"{gamma}-{window}" for gamma in (0.3, 1.0) for window in (0, 5)])
    assert [each for each in texts if each[2] in ("20.0", "25.0")] == [(0, 0, "20.0"), (1, 0, "25.0"), (0, 1, "20.0"), (1, 1, "25.0")]
    egrsd.write_report(tmp_path / "sft.png", [many / "one" / "sft"])  # without teacher, reward and engine gap
    assert (tmp_path / "sft.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(egrsd.UserError, match="no run, or"):
        egrsd.report(egrsd.Config(report=[tmp_path]))


def test_a_picture_that_fails_costs_a_line_and_not_the_run(small, driver, tmp_path):
    patch = """
sys.modules["matplotlib"] = None
def write_trace(*a):
    raise ValueError("no trace")
egrsd.write_trace = write_trace
"""
    done = run(*small, "--steps", 2, "--save_every", 2, "--out", tmp_path / "run", driver=driver(patch))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("picture")]
    assert len(lines) == 2 and "no trace" in lines[0] and "matplotlib" in lines[1] and "report.png not drawn" in lines[1], done.stdout


# ------------------------------------------------------------------------------------------------- the command line, errors

@pytest.mark.parametrize("flags, message", [
    ("--gama 0.3", "--gama"), ("--gam 0.3", "--gam"), ("--gamma nan", "finite"), ("--gamma inf", "finite"), ("--gamma -0.1", "not below 0"),
    ("--window -1", "not below 0"), ("--lr -1e-6", "not below 0"), ("--window 1.5", "invalid int"), ("--method egsrd", "one of sft, grpo, rlsd, opsd, crisp, dasd, egrsd"),
    ("--engine cuda", "one of auto"), ("--batch_size 32 --method grpo --rollouts_per_prompt 5", "divisible"), ("--steps 0", "above 0"),
    ("--rollouts_per_prompt 4", "only --method grpo"), ("--max_length 1000", "--max_completion_length"), ("--model=", "must not be empty"),
    ("--tensor_parallel 0", "above 0"), ("--tensor_parallel 2", "must divide the 1 ranks"), ("--rollouts_per_prompt 0", "above 0"), ("--data nothing.jsonl", "nothing.jsonl"),
    ("--resume nowhere", "nowhere"), ("--teacher old", "one of frozen"), ("--kl_clip 0.1", "only --method opsd"),
    ("--method sft --teacher ema", "has no teacher"), ("--teacher_decay 1.1", "not be above 1"), ("--lab", "needs --toy"),
    ("--toy --lab --method egrsd,nope", "nope"), ("--toy --lab --seed 0,x", "--seed"),
    ("--adapter nowhere --eval x", "no snapshot there"), ("--eval aime24,,x", "empty name"), ("--toy --eval x", "needs --model"),
    ("--eval nothing.jsonl", "nothing.jsonl"), ("--report nowhere", "nowhere: no run, or"), ("--toy --lab --eval x", "no --data"),
    ("--toy --out test_egrsd.py", "is a file")])
def test_a_user_error_is_one_line_and_exit_code_2(flags, message):
    done = run(*flags.split())
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_user_errors_of_the_real_command_come_before_any_model_is_loaded(whole, problems, tmp_path):
    done = launched("--out", whole, "--data", problems)
    assert done.returncode == 2 and "--resume" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    with pytest.raises(egrsd.UserError, match="none: no model there"):
        egrsd.load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(egrsd.UserError, match="--gamma 0.5: this run has 0.8"):
        egrsd.configure(dict(resume=str(whole), gamma=0.5))
    done = launched("--batch_size", 9, ranks=2)
    assert done.returncode != 0 and done.stderr.count("egrsd.py: --batch_size 9: must be divisible by the 2 ranks") == 1


def test_help_names_every_knob_and_import_needs_torch_alone():
    done = launched("--help")
    assert done.returncode == 0
    for field in egrsd.dataclasses.fields(egrsd.Config):
        assert f"--{field.name}" in done.stdout
    code = ("import sys; before = set(sys.modules); import torch; import egrsd; "
            "print([m for m in ('transformers', 'peft', 'vllm', 'datasets', 'matplotlib', 'math_verify') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout.strip() == "[]"


def test_two_runs_started_in_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(egrsd, "gather", lambda value: [value])
    with pytest.raises(FileExistsError, match="out/egrsd-2"):
        for _ in range(3):  # they lie in two seconds at most
            egrsd.choose_folder(egrsd.Config())


def test_a_broken_config_is_named(tmp_path, monkeypatch, capsys):
    for content in ('{"config', "{}", '{"config": {"gamme": 1}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(egrsd.UserError, match="config.json: not the configuration"):
            egrsd.configure(dict(resume=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").touch()
    for content in ("{", "{}", '{"base_model_name_or_path": "x"}'):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(egrsd.UserError, match="no adapter as PEFT saves it"):
            egrsd.configure(dict(adapter=str(tmp_path), eval="x"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_the_last_completed_step_and_leaves_quickly(number, code, small, whole, driver, tmp_path):
    flags = [*small, "--out", tmp_path / "run"]
    flags[flags.index("--save_every") + 1], flags[flags.index("--steps") + 1] = 1000, 1000
    process = subprocess.Popen(command(*flags, driver=driver()), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    start = time.perf_counter()
    assert process.wait(timeout=30) == code
    assert time.perf_counter() - start < 10
    assert "Traceback" not in process.stderr.read()
    last = read(metrics)[-1]["step"]
    assert egrsd.snapshots(tmp_path / "run")[-1].name == f"step_{last}"
    if number == signal.SIGTERM:  # the abandoned step left no trace: the next ones are those of the uninterrupted run
        done = run("--resume", tmp_path / "run", "--steps", last + 2, driver=driver())
        assert done.returncode == 0, done.stderr
        assert read(tmp_path / "run" / "rollouts.jsonl") == read(whole / "rollouts.jsonl")[:8 * (last + 2)]


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run_after_five(small, driver, tmp_path):
    patch = """
real, steps = egrsd.teach, iter(range(1, 99))
def teach(model, rollouts, cfg):
    real(model, rollouts, cfg)
    step = next(steps)
    if step in (2, 4) or step > 6:
        rollouts[0].teacher_entropy[0] = float("inf" if step % 2 else "nan")
    return egrsd.torch.cat([r.teacher_entropy for r in rollouts]).max().item()
egrsd.teach = teach
"""
    done = run(*small, "--teacher", "copy", "--teacher_every", 4, "--out", tmp_path / "run", driver=driver(patch))
    assert done.returncode == 1 and "5 steps in a row" in done.stderr and "Traceback" not in done.stderr, done.stderr
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    before, after = adapter(tmp_path / "run" / "step_3"), adapter(tmp_path / "run" / "step_4")
    assert all(torch.equal(before[name], after[name]) for name in before)  # step 4 was skipped
    assert metrics[4]["welford_mean"] != metrics[3]["welford_mean"]  # but its rewards count
    teacher = torch.load(tmp_path / "run" / "step_4" / "trainer.pt", weights_only=True)["teacher"]
    assert all(torch.equal(teacher[name], after[name]) for name in after)  # and the copy that was due was made
    assert (tmp_path / "run" / "trace_3.html").exists() and not (tmp_path / "run" / "trace_4.html").exists()  # nothing to show


@pytest.mark.parametrize("kilobytes, rank, refused", [(75, 4, "File too large"), (100, 32, "step_1 cannot be saved; is the disk full? "), (250, 32, "step_1 cannot be saved; is the disk full? ")],
                         ids=["rollouts.jsonl", "adapter", "trainer.pt"])
def test_a_file_that_cannot_grow_ends_the_run_with_a_line_and_keeps_the_last_snapshot(kilobytes, rank, refused, small, driver, tmp_path):
    """The system refuses to make a file longer, as on a full disk."""
    patch = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, {kilobytes << 10}))"
    done = run(*small, "--lora_rank", rank, "--out", tmp_path / "run", driver=driver(patch))
    assert done.returncode == 1 and refused in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert bool(egrsd.snapshots(tmp_path / "run")) == (rank == 4)
    assert [path.name for path in (tmp_path / "run" / "step_1.tmp").glob("*.safetensors")] == ["adapter_model.safetensors"] * (kilobytes == 250)
    done = run("--resume", tmp_path / "run", driver=driver())
    assert done.returncode == 0 and len(read(tmp_path / "run" / "rollouts.jsonl")) == 96, done.stderr


@pytest.mark.parametrize("keep, ranks", [([], 1), ([1, 6], 2), (range(1, 13), 1)])
def test_a_run_goes_on_without_a_snapshot_on_other_ranks_and_beyond_its_end(keep, ranks, whole, driver, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run").glob("step_*"):
        if int(path.name[5:]) not in keep:
            shutil.rmtree(path)
    done = run("--resume", tmp_path / "run", "--steps", 14, ranks=ranks, driver=driver())
    assert done.returncode == 0, done.stderr
    old, new = read(whole / "rollouts.jsonl"), read(tmp_path / "run" / "rollouts.jsonl")
    assert [row["completion_ids"] for row in new[:96]] == [row["completion_ids"] for row in old] and len(new) == 8 * 14
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 15))
    for one, two in zip(read(whole / "metrics.jsonl"), metrics):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_checkpointed_activations_change_nothing(whole, small, driver, tmp_path):
    done = run(*small, "--steps", 3, "--grad_checkpoint", "--out", tmp_path / "run", driver=driver())
    assert done.returncode == 0, done.stderr
    for one, two in zip(read(whole / "metrics.jsonl")[:3], read(tmp_path / "run" / "metrics.jsonl"), strict=True):
        assert two["engine_gap_max"] < 1e-4
        assert one["tokens"] == two["tokens"] and one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


@slow
def test_the_laboratory_runs_what_is_missing_and_draws_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(egrsd, "TOY_PRETRAIN_STEPS", 2)
    egrsd.pretrain_toy(tmp_path / "model", seed=5)
    flags = ["--toy", "--lab", "--model", tmp_path / "model", "--method", "grpo,egrsd", "--window", "0,2", "--steps", 1,
             "--max_completion_length", 8, "--samples", 1, "--out", tmp_path / "lab"]
    done = launched(*flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "lab" / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["baseline", "grpo", "egrsd, gamma 0.3, window 0", "egrsd, gamma 0.3, window 2"]
    assert table in done.stdout and (tmp_path / "lab" / "report.png").exists()
    lost, kept = tmp_path / "lab" / "grpo-frozen-0.3-0-0", tmp_path / "lab" / "egrsd-frozen-0.3-2-0" / "metrics.jsonl"
    shutil.rmtree(lost)
    before = kept.stat().st_mtime_ns
    done = launched(*flags)
    assert done.returncode == 0 and (lost / "results.json").exists() and kept.stat().st_mtime_ns == before, done.stderr
    done = launched(*flags, "--lr", "1e-3")
    assert done.returncode == 2 and "other settings" in done.stderr, done.stderr
    (lost / "results.json").unlink()
    (lost / "config.json").write_text("{}")
    done = launched(*flags)
    assert done.returncode == 2 and f"{lost}.log: this run failed" in done.stderr, done.stderr


def test_all_wrong_all_cut_off_and_empty_completions_train_on(small, driver, tmp_path):
    patch = """
egrsd.score_answer = lambda completion, row: 0
real = egrsd.HfEngine.generate
def generate(*a, **k):
    for i, ids, logp in real(*a, **k):
        yield (i, [3], logp[:1]) if i == 0 else (i, ids, logp)  # nothing but the end of the turn
egrsd.HfEngine.generate = generate
"""
    done = run(*small, "--max_completion_length", 1, "--steps", 8, "--save_every", 8, "--out", tmp_path / "run", driver=driver(patch))
    assert done.returncode == 0, done.stderr
    metrics, rows = read(tmp_path / "run" / "metrics.jsonl"), read(tmp_path / "run" / "rollouts.jsonl")
    assert len(metrics) == 8 and all(m["reward"] == 0 and m["skipped"] == 0 and math.isfinite(m["loss"]) for m in metrics)
    assert {m["length"] for m in metrics} == {1} and max(m["truncated"] for m in metrics) > 50
    assert sum(row["completion"] == "" for row in rows) >= 8
    assert metrics[-1]["advantage_std"] == metrics[-1]["welford_std"] == 0


def test_a_dead_rank_ends_the_others(small, driver, tmp_path):
    patch = """
real, calls = egrsd.learn, iter(range(1, 99))
def learn(*a):
    if egrsd.RANK == 1 and next(calls) == 3:
        raise ValueError("rank 1 breaks here")
    return real(*a)
egrsd.learn = learn
"""
    start = time.perf_counter()
    done = launched(*small, "--out", tmp_path / "run", ranks=2, driver=driver(patch))
    assert done.returncode != 0 and "rank 1 breaks here" in done.stderr
    assert time.perf_counter() - start < 60
    assert egrsd.snapshots(tmp_path / "run")[-1].name == "step_2"


def test_a_rank_killed_in_the_middle_of_a_step_ends_the_other_with_a_line(small, driver, tmp_path):
    patch = KILLER.replace("egrsd.teach = ", "if egrsd.RANK == 1:\n    egrsd.teach = ").replace("egrsd.Path.rename = ", "unused = ")
    start = time.perf_counter()
    processes = Forked(*small, "--out", tmp_path / "run", ranks=2, driver=driver(patch), KILL="teach:3")
    done = processes.wait(60)
    assert time.perf_counter() - start < 60 and [process.exitcode for process in processes.processes] == [1, -signal.SIGKILL]
    assert done.stderr == "egrsd.py: another rank is gone; its own message says why\n"
    assert egrsd.snapshots(tmp_path / "run")[-1].name == "step_2"


def test_the_toy_model_is_a_function_of_the_seed_and_its_run_leaves_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(egrsd, "TOY_PRETRAIN_STEPS", 2)
    for name in ("a", "b"):
        egrsd.pretrain_toy(tmp_path / name, seed=5)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two
    done = run("--toy", "--model", tmp_path / "a", "--out", tmp_path / "run", "--steps", 2, "--max_completion_length", 16)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads((tmp_path / "run" / "results.json").read_text())] == ["before", "after"]
    assert "avg@K" in done.stdout and "step    2" in done.stdout


def test_toy_solutions_are_right_unless_a_slip_goes_unnoticed():
    rng = random.Random(0)
    for row in egrsd.toy_problems(rng, 50):
        assert egrsd.grade(row["solution"], row["gold"])
        a, b = map(int, row["problem"].split("+"))
        assert egrsd.grade(egrsd.toy_solution(rng, a, b, 0, 1), row["gold"])
    slips = [egrsd.grade(egrsd.toy_solution(rng, 345, 678, 0.3, 0.7), "1023") for _ in range(500)]
    assert 0.5 < sum(slips) / 500 < 0.75  # (1 - 0.3 / 2) ** 3 = 0.61


def test_base_weights_fingerprint_sees_a_single_bit():
    model = torch.nn.Linear(4, 4)
    before = egrsd.fingerprint(model)
    model.weight.data.view(torch.int32)[2, 1] ^= 1
    assert egrsd.fingerprint(model) != before


def test_a_head_that_scales_its_logits_is_refused(tiny):
    model = egrsd.load_model(egrsd.Config(model=str(tiny), lora_rank=4), torch.device("cpu"))
    egrsd.check_head(model, [5, 6, 7, 8])
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, inputs, output: 30 * torch.tanh(output / 30))
    with pytest.raises(egrsd.UserError, match="soft-cap"):
        egrsd.check_head(model, [5, 6, 7, 8])


@slow
def test_more_than_50_saves_survive_kill_9_at_random_moments(small, driver, tmp_path):
    flags, rng = [*small, "--steps", 80], random.Random()
    done = run(*flags, "--save_every", 80, "--out", tmp_path / "whole", driver=driver())
    assert done.returncode == 0, done.stderr
    kills, newest, torn, again = 0, 0, 0, ["--out", tmp_path / "run"]
    while newest < 60:
        process = Forked(*(flags if "--out" in again else []), *again, driver=driver())
        metrics = tmp_path / "run" / "metrics.jsonl"
        seen = metrics.read_text().count("\n") if metrics.exists() else 0
        end = time.perf_counter() + 60
        while not metrics.exists() or metrics.read_text().count("\n") in (0, seen):  # until it makes steps
            assert time.perf_counter() < end
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        kills, torn = kills + 1, torn + len(list((tmp_path / "run").glob("*.tmp")))
        found = egrsd.snapshots(tmp_path / "run")
        steps = [int(path.name[5:]) for path in found]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= newest  # nothing that was saved is lost
        assert metrics.read_text().count("\n") - len(steps) <= 1  # and no more than the step after it
        for path in found[newest:]:
            assert torch.load(path / "trainer.pt", weights_only=True)["step"] == int(path.name[5:]) and len(adapter(path)) == 28
        newest = len(steps)
        if found:
            again = ["--resume", tmp_path / "run"]
        else:
            shutil.rmtree(tmp_path / "run")
    done = run("--resume", tmp_path / "run", driver=driver())
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run" / "rollouts.jsonl") == read(tmp_path / "whole" / "rollouts.jsonl")
    assert list(map(reproducible, read(metrics))) == list(map(reproducible, read(tmp_path / "whole" / "metrics.jsonl")))
    for (name, one), two in zip(adapter(tmp_path / "run" / "step_80").items(), adapter(tmp_path / "whole" / "step_80").values(), strict=True):
        assert torch.equal(one, two), name
    print(f"\n{kills} kills, {torn} of them in the middle of a save, over {newest} saves")


@slow
def test_1000_steps_keep_memory_and_file_handles(tmp_path, monkeypatch, driver):
    monkeypatch.setattr(egrsd, "TOY_PRETRAIN_STEPS", 2)
    egrsd.pretrain_toy(tmp_path / "toy", seed=0)
    patch = f"""
import os
real, log = egrsd.step_metrics, open({str(tmp_path / "log")!r}, "w")
def step_metrics(*a):
    pages = int(open("/proc/self/statm").read().split()[1])
    print(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), file=log, flush=True)
    return real(*a)
egrsd.step_metrics = step_metrics
"""
    process = Forked("--toy", "--model", tmp_path / "toy", "--steps", 1000, "--save_every", 50, "--batch_size", 8, "--samples", 1,
                     "--max_completion_length", 24, "--out", tmp_path / "run", driver=driver(patch))
    done = process.wait(timeout=900)
    assert done.returncode == 0, done.stderr
    memory, handles = zip(*(map(float, line.split()) for line in (tmp_path / "log").read_text().splitlines()))
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    print(f"\n1,000 steps: {memory[49]:.0f} MiB after 50, {memory[-1]:.0f} MiB at the end, {max(memory[50:]):.0f} MiB at most; "
          f"file handles {handles[49]:.0f} and {handles[-1]:.0f}")
    assert len(memory) == len(metrics) == 1000 and max(memory[50:]) - memory[49] < 25 and set(handles[49:]) == {handles[49]}
    assert all(math.isfinite(x) for m in metrics for x in m.values()) and metrics[-1]["skipped"] == 0


# ------------------------------------------------------------------------------------------------- fuzzing

def fuzz(cases):
    return hypothesis.settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))


some_json = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3)
                         | st.dictionaries(st.sampled_from(["problem", "question", "solution", "answer", "Answer", "x"]), inner, max_size=5), max_leaves=4)
latex = st.lists(st.sampled_from(r"\frac \sqrt \boxed \left( \right) \pi \text \cdot \times \pm \{ \} \infty \begin{pmatrix} \end{pmatrix} \\ { } ( ) [ ] , = + - "
                                 r"/ ^ _ ! % $ 0 1 2 7 10 3.5 1e9 x y \sum \int \log".split() + [" "]), max_size=14).map("".join)


@fuzz(1000)
@hypothesis.given(st.binary(max_size=60) | st.lists(some_json.map(json.dumps), max_size=3).map("\n".join).map(str.encode) | st.builds(
    lambda text, at, new: text[:at] + new + text[at + 1:], some_json.map(json.dumps).map(str.encode), st.integers(0, 40), st.binary(max_size=2)))
def test_fuzzed_data_files_load_or_are_refused(content):
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(content)
        file.flush()
        try:
            problems = egrsd.load_problems(file.name)
        except egrsd.UserError as error:
            assert file.name in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(text, str) and text.strip() and text.encode() for row in problems for text in row.values())


@fuzz(3000)
@hypothesis.given(st.text(max_size=80) | latex, st.text(max_size=20) | latex)
def test_fuzzed_texts_have_a_box_or_none(text, other):
    box = egrsd.last_boxed(text)
    assert box is None or f"{{{box}}}" in text
    assert egrsd.last_boxed(rf"{text}\boxed{{7}}") == "7" or "{" in text or "\\" in text
    gold = egrsd.gold_answer(dict(answer=text, solution=other))
    assert gold is None or (isinstance(gold, str) and gold == gold.strip() and gold)
    assert egrsd.grade(text, other) in (True, False) or box


@fuzz(1000)
@hypothesis.given(st.dictionaries(st.sampled_from(["answer", "Answer", "solution"]), some_json))
def test_fuzzed_rows_have_a_gold_answer_or_none(row):
    gold = egrsd.gold_answer(row)
    assert gold is None or isinstance(gold, str) and gold


@fuzz(300)
@hypothesis.given(latex.filter(str.strip), latex.filter(str.strip))
def test_fuzzed_latex_is_graded_within_bounds(answer, gold):
    start = time.perf_counter()
    assert egrsd.math_verify_agrees(gold, answer) in (True, False)
    assert time.perf_counter() - start < 10  # of wall time: the limit is 1.2 s of processor time


@fuzz(5000)
@hypothesis.given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=30), st.integers(0, 40), st.floats(0, 1e6), st.floats(0, 2.0**127))
def test_fuzzed_gates_stay_between_a_tenth_and_one(entropies, window, gamma, max_entropy):
    entropy = torch.tensor(entropies)
    ahead, gate = egrsd.lookahead_min(entropy, window), egrsd.confidence_gate(entropy, max_entropy, gamma, window)
    assert ahead.shape == gate.shape == entropy.shape and bool((ahead <= entropy).all())
    assert bool(((gate >= 0.1) & (gate <= 1)).all())
    assert ahead.tolist() == [min(entropy[t:t + window + 1].tolist()) for t in range(len(entropy))]


# ------------------------------------------------------------------------------------------- vLLM, the real one, on the CPU

@made_once("vllm_run")
def vllm_run(small, driver, tmp_path_factory):
    """The 12-step run again, sampled by vLLM on one rank."""
    out = tmp_path_factory.mktemp("vllm") / "one"
    done = run(*small[:-1], "vllm", "--out", out, driver=driver())
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_vllm_was_not_skipped_where_it_must_not_be():
    assert os.environ.get("EGRSD_NEEDS_VLLM") != "1" or egrsd.importlib.util.find_spec("vllm")


@needs_vllm
def test_vllm_samples_from_the_trainers_weights_while_the_adapter_moves(vllm_run):
    out, printed = vllm_run
    metrics = read(out / "metrics.jsonl")
    assert len(metrics) == 12
    assert max(m["engine_gap_max"] for m in metrics) < 1e-3 and max(m["engine_gap_mean"] for m in metrics) < 1e-5
    first, last = adapter(out / "step_1"), adapter(out / "step_12")
    assert all((first[name] - last[name]).abs().max() > 1e-3 for name in first if "lora_B" in name)
    assert "WARNING" not in printed


@needs_vllm
def test_vllm_with_a_disabled_hand_over_shows_in_the_gap_at_once(small, driver, tmp_path):
    patch = """
real = egrsd.VllmEngine.sync
egrsd.VllmEngine.sync = lambda self, model, step: real(self, model, step) if step == 1 else None
"""
    flags = [*small[:-1], "vllm", "--out", tmp_path / "run"]
    flags[flags.index("--steps") + 1] = 3
    done = run(*flags, driver=driver(patch))
    assert done.returncode == 0, done.stderr
    gaps = [m["engine_gap_max"] for m in read(tmp_path / "run" / "metrics.jsonl")]
    assert gaps[0] < 1e-3 < min(gaps[1:]), gaps
    kinds = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("step ", "WARNING"))]
    assert kinds == ["step", "step", "WARNING", "step", "WARNING"], done.stdout


@needs_vllm
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_vllm_on_two_ranks_alone_or_decoding_together_draws_what_one_rank_draws(tensor_parallel, vllm_run, small, driver, tmp_path):
    done = run(*small[:-1], "vllm", "--steps", 6, "--out", tmp_path / "two", "--tensor_parallel", tensor_parallel, ranks=2, driver=driver())
    assert done.returncode == 0, done.stderr
    for one, two in zip(read(vllm_run[0] / "metrics.jsonl")[:6], read(tmp_path / "two" / "metrics.jsonl"), strict=True):
        for key in reproducible(one):
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-4), (one["step"], key)
        assert two["engine_gap_max"] < 1e-3
    for one, two in zip(read(vllm_run[0] / "rollouts.jsonl")[:48], read(tmp_path / "two" / "rollouts.jsonl"), strict=True):
        assert one["completion_ids"] == two["completion_ids"]


@needs_vllm
def test_vllm_takes_long_prompts_of_a_whole_batch(small, tiny, tmp_path):
    rows = [dict(problem=f"{k} " + "word " * 80, solution="s", answer="1") for k in range(32)]  # 400 characters, a token each
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*small[:-1], "vllm", "--steps", 1, "--batch_size", 32, "--max_completion_length", 8, "--out", tmp_path / "run"]
    flags[flags.index("--data") + 1] = tmp_path / "long.jsonl"
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run" / "metrics.jsonl")[0]["engine_gap_max"] < 1e-3


FRESH = """
import sys, json, torch, egrsd
egrsd.start_distributed()
cfg = egrsd.Config(model=sys.argv[1], engine="vllm", lora_rank=4, batch_size=8, max_completion_length=256)
engine = egrsd.start_vllm(cfg, egrsd.load_tokenizer(sys.argv[1])[0], [0], [dict(problem="long " * 50)])
engine.use(sys.argv[2], 1)
prompts = [json.loads(line)["prompt_ids"] for line in open(sys.argv[3])][-4:]
drawn = sorted(engine.generate(prompts, [1, 2, 3, 4], 24, 1.0, 1.0, 0))
print("DRAWN", json.dumps([(ids, logp.tolist()) for _, ids, logp in drawn]))
"""


@needs_vllm
def test_a_snapshot_loads_in_plain_peft_and_in_a_fresh_vllm_and_they_agree(whole, tiny, tmp_path):
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM
    (tmp_path / "fresh.py").write_text(FRESH)
    rows = [r for r in read(whole / "rollouts.jsonl")][-4:]
    done = run(tiny, whole / "step_12", whole / "rollouts.jsonl", driver=tmp_path / "fresh.py")
    assert done.returncode == 0, done.stderr
    drawn = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("DRAWN"))[5:])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), whole / "step_12").eval()
    trainer = egrsd.load_model(egrsd.Config(model=str(tiny), lora_rank=4), torch.device("cpu"))
    set_peft_model_state_dict(trainer, load_peft_weights(whole / "step_12"))
    for r, (completion, from_vllm) in zip(rows, drawn, strict=True):
        ids = torch.tensor([r["prompt_ids"] + completion])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            hidden = egrsd.completion_hidden(trainer.get_base_model(), [r["prompt_ids"]], [completion])
            ours = egrsd.logp_and_entropy(hidden, trainer.get_output_embeddings().weight.detach(), torch.tensor(completion))[0]
        start = len(r["prompt_ids"])
        from_peft = torch.stack([log_p[start - 1 + t, token] for t, token in enumerate(completion)])
        assert (from_peft - torch.tensor(from_vllm)).abs().max() < 1e-3
        assert (from_peft - ours).abs().max() < 1e-3


@needs_vllm
def test_a_vllm_that_cannot_start_ends_all_ranks_with_a_readable_line(small, driver, tmp_path):
    done = run(*small[:-1], "vllm", "--out", tmp_path / "run", ranks=2, driver=driver("import os; os.environ['VLLM_CPU_KVCACHE_SPACE'] = '100000'"))
    lines = [line for line in done.stderr.splitlines() if "egrsd.py: vLLM does not start" in line]
    assert done.returncode != 0 and lines and "Traceback" not in done.stderr.split("egrsd.py:")[0], done.stderr


@needs_vllm
def test_ctrl_c_while_vllm_generates_leaves_the_last_step_saved(small, driver, tmp_path):
    patch = """
real = egrsd.VllmEngine.generate
def generate(self, *a, **k):
    if self.adapter.lora_int_id == 4:
        print("GENERATING", flush=True)
        for _ in range(1000):
            list(real(self, *a, **k))
    yield from real(self, *a, **k)
egrsd.VllmEngine.generate = generate
"""
    process = subprocess.Popen(command(*small[:-1], "vllm", "--out", tmp_path / "run", ranks=2, driver=driver(patch)), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if "GENERATING" in line:
            break
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    error = process.communicate(timeout=60)[1]
    assert time.perf_counter() - start < 30
    assert error.count("egrsd.py: stopped") == 1, error
    assert egrsd.snapshots(tmp_path / "run")[-1].name == "step_3"


# -------------------------------------------------------- benchmarks, which print and judge nothing: pytest -m bench -s

SCORING = """
import sys, time, torch, torch.nn.functional as F, egrsd
torch.manual_seed(0)
hidden, targets = torch.randn(4096, 1024, requires_grad=True), torch.randint(151936, (4096,))
head, weight = torch.randn(151936, 1024) / 32, torch.randn(4096)

def naive():
    log_p = (hidden @ head.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    return log_p.gather(1, targets[:, None])[:, 0], entropy

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 2**20

open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
start = time.perf_counter()
logp, entropy = naive() if sys.argv[1] == "naive" else egrsd.logp_and_entropy(hidden, head, targets)
(weight * logp).sum().backward()
seconds = time.perf_counter() - start
print(seconds, status("VmHWM") - before, logp.sum().item(), hidden.grad.norm().item())
"""


@bench
def test_bench_scoring(tmp_path):
    (tmp_path / "scoring.py").write_text(SCORING)
    rows = {}
    for name in ("naive", "ours"):
        done = subprocess.run([sys.executable, tmp_path / "scoring.py", name], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
        rows[name] = list(map(float, done.stdout.split()))
    assert rows["ours"][2:] == pytest.approx(rows["naive"][2:], rel=1e-3)
    print("\nscoring 4 x 1,024 tokens, d = 1,024, V = 151,936, float32, two threads, forward and backward")
    for name, (seconds, gib, *_) in rows.items():
        print(f"{name:6} {seconds:6.1f} s {gib:6.2f} GiB more at the peak")
    print(f"ratio  {rows['ours'][0] / rows['naive'][0]:6.2f}   {rows['ours'][1] / rows['naive'][1]:6.2f}")


@bench
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=needs_vllm)])
def test_bench_toy_step(engine, tmp_path_factory):
    model = tmp_path_factory.getbasetemp() / "bench-toy"
    if not model.exists():
        egrsd.pretrain_toy(model, 0)
    out = tmp_path_factory.mktemp("bench")
    done = launched("--toy", "--model", model, "--out", out / "run", "--steps", 25, "--engine", engine)
    assert done.returncode == 0, done.stderr
    rows = read(out / "run" / "metrics.jsonl")[5:]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name.endswith("_s") or name == "tokens"}
    print(f"\na toy step with {engine}: {mean['step_s']:.3f} s, {mean['tokens'] / 32:.1f} tokens a completion, "
          f"{mean['tokens'] / mean['sample_s']:.0f} tokens/s sampled")
    print("  ".join(f"{name[:-2]} {1000 * x:.0f} ms ({100 * x / mean['step_s']:.1f} %)" for name, x in mean.items()
                    if name.endswith("_s") and name != "step_s"))
