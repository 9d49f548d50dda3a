"""The paper's evaluation (Sec. 5.1): six benchmarks, or problems of yours, K samples each.

    python -m lab.evaluate Qwen/Qwen3-8B aime24,math500                  # a model: hub id or folder
    python -m lab.evaluate out/RUN/step_100 mine.jsonl --samples 8       # a snapshot, or any PEFT adapter
    torchrun --nproc_per_node 8 -m lab.evaluate out/RUN aime24,aime25    # a run: all its snapshots in turn

Each rank answers its share and writes a line as a sample is done; the same command again goes on where it
stopped, on any number of ranks. With vLLM no other model is loaded.
"""
import argparse, hashlib, itertools, json, math, re, sys, warnings
from pathlib import Path
import torch
from pandas import DataFrame
import egrsd
from egrsd import blamed_on, gather, ranks, require

BENCHMARKS = {  # in the paper's column order: hub id, subset, split
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("yentinglin/aime_2025", None, "train"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test")}
REPEATS = {"aime24": 5}  # the paper's five runs of it; also of a local copy that is called so
SAMPLING = dict(temperature=1.0, top_p=0.95, top_k=0)
SEQUENCES = 256  # decoded together by a rank

def parse_flags(argv):
    parser = egrsd.Parser("lab.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False,
                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("what", help="model (hub id or folder), snapshot or other PEFT adapter, or run folder")
    add("names", help=f"by commas: {', '.join(BENCHMARKS)}, .jsonl or .parquet files, hub ids")
    add("--out", default="", help="folder; empty = WHAT/eval, for a model out/eval-MODEL")
    add("--samples", type=int, default=4, help="K, of each problem; aime24 takes five times as many")
    add("--max_completion_length", type=int, default=32768, help="in tokens")
    add("--thinking", action=argparse.BooleanOptionalAction, default=True, help="Qwen3's thinking mode")
    add("--seed", type=int, default=0, help="of all samples")
    add("--engine", choices=["auto", "vllm", "hf"], default="auto", help="auto: vllm on a GPU")
    add("--engine_memory", type=float, default=0.9, help="vllm's share of each GPU")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: bfloat16 on a GPU")
    flags = parser.parse_args(argv)
    for name, lowest in dict(samples=1, max_completion_length=1, seed=0).items():
        require(getattr(flags, name) >= lowest, f"--{name} {getattr(flags, name)}: must be at least {lowest}")
    return flags

def load_benchmarks(names):
    """"aime24, mine.jsonl" -> {name: problems}, in the paper's order, then yours."""
    chosen, benchmarks = [name.strip() for name in names.split(",")], {}
    for name in chosen:
        require(name in BENCHMARKS or "/" in name or name.endswith((".jsonl", ".parquet")),
                f"{name!r}: none of {', '.join(BENCHMARKS)}, and no .jsonl or .parquet file")
    for name in sorted(chosen, key=lambda name: [*BENCHMARKS, name].index(name)):
        title = re.sub(r"\.(jsonl|parquet)$", "", Path(name).name)
        require(title not in benchmarks, f"{names}: the name {title} twice")
        benchmarks[title] = egrsd.load_problems(*BENCHMARKS.get(name, (name,)), solved=False)
    return benchmarks

def resolve(what, vllm):
    """WHAT -> base model, its adapter folders (none: the model itself), their largest LoRA rank.
    Raises UserError for an adapter that is broken, or that the engine would sample wrongly from."""
    from peft import PeftConfig, load_peft_weights
    folders = [Path(what)] if Path(what, "adapter_config.json").exists() else egrsd.snapshots(what)
    require(folders or not Path(what, "metrics.jsonl").exists(), f"{what}: a run without a snapshot")
    base, lora_rank = what, 0
    for folder in folders:
        require(any(folder.glob("adapter_model.*")), f"{folder}: no adapter_model.safetensors in it")
        with blamed_on(f"{folder}: no adapter as PEFT saves it"), warnings.catch_warnings(action="ignore"):
            config, weights = PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), "cpu")
        base, kind = config.base_model_name_or_path, config.peft_type.value
        require(base, f"{folder}: its adapter_config.json names no base model")
        require(weights and all(weight.isfinite().all() for weight in weights.values()),
                f"{folder}: its weights are empty or not finite")
        require(not config.is_prompt_learning, f"{folder}: {kind} is not supported")
        plain = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
        require(not vllm or plain and kind == "LORA",  # vLLM ignores some of what it cannot do
                f"{folder}: vLLM serves plain LoRA alone; --engine hf serves this adapter")
        lora_rank = max([lora_rank, *(len(w) for name, w in weights.items() if "lora_A" in name)])
    return base, folders, lora_rank

def put_on(engine, base, folder, prompt):
    """The engine samples from now on with the adapter in a folder, of whatever kind, on its base."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM
    vllm = isinstance(engine, egrsd.VllmEngine)
    with blamed_on(f"{folder}: does not fit its base or engine"), warnings.catch_warnings(action="ignore"):
        if vllm:  # passes over what does not fit; a model without weights tells
            with torch.device("meta"), egrsd.VllmEngine.spared():
                bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        else:
            bare = engine.model.unload() if isinstance(engine.model, PeftModel) else engine.model
        model = PeftModel.from_pretrained(bare, str(folder))
        loaded = model.load_adapter(str(folder), "default")  # again, to be told what did not fit
        odd = ", ".join([*loaded.missing_keys, *loaded.unexpected_keys])
        require(not odd, f"{folder}: does not fit its base: {odd[:200]}")
        if vllm:
            engine.use(folder)
            engine.llm.llm_engine.add_lora(engine.adapter)  # else it loads, and complains, amid sampling
            return
        engine.model = model.eval()
        prove_sampling(engine, folder, prompt)

@torch.no_grad()
def prove_sampling(engine, folder, prompt):
    """Raises UserError unless log-probs token by token are those of one pass: not so of every adapter."""
    (_, ids, stepwise), = engine.generate([prompt], [0], 16, **SAMPLING)
    together = torch.tensor([[*prompt, *ids]], device=engine.model.device)
    with egrsd.autocast(engine.model):
        logits = engine.model(input_ids=together, use_cache=False).logits[0, len(prompt) - 1:-1].float()
    whole = logits.log_softmax(1).gather(1, together[0, len(prompt):, None])[:, 0]
    gap = (whole - stepwise.to(whole)).abs().mean().item()
    require(gap < egrsd.rounding_limit(engine.model),
            f"{folder}: its samples are {gap:.2g} nats off its log-probs")

def identity(path):
    """Which weights a folder holds, every byte of them, wherever it lies; a hub id stays what it is."""
    folder, digest = Path(path), hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    if (folder / "adapter_config.json").exists():  # alpha counts, the place of the base does not
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        digest.update(json.dumps({**config, "base_model_name_or_path": ""}, sort_keys=True).encode())
    return digest.hexdigest() if folder.is_dir() else str(path)

def check_folder(folder, settings, problems):
    """Raises UserError where a folder holds another evaluation -> settings, with all problems it holds."""
    file, stored = folder / "settings.json", {**settings, "problems": problems}
    if file.exists():
        with blamed_on(f"{file}: not the settings of an evaluation"):
            stored = json.loads(file.read_text(encoding="utf-8"))
            stored["problems"] = {**problems, **stored["problems"]}
    odd = [f"{name} {stored.get(name)}" for name, x in settings.items() if stored.get(name) != x]
    require(not odd, f"{folder}: holds an evaluation of other settings or weights: {', '.join(odd)}")
    odd = [name for name, digest in problems.items() if stored["problems"][name] != digest]
    require(not odd, f"{folder}: holds an evaluation of other problems as {', '.join(odd)}")
    return stored

def read_lines(file):
    """The rows of a .jsonl, one at a time, none without the file; a torn last line is not there."""
    if file.exists():
        with blamed_on(f"{file}: cannot be read"), open(file, encoding="utf-8", errors="replace") as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))

def stored_samples(folder):
    """{(benchmark, problem, sample): its line} of an evaluation folder."""
    rows = itertools.chain(*map(read_lines, sorted(folder.glob("rank_*.jsonl"))))
    return {(row["benchmark"], row["problem_id"], row["sample"]): row for row in rows}

def evaluate(flags, engine, tokenizer, benchmarks, prompts, folder, settings):
    """Answers what is missing in a folder, each rank its share -> the rows of results.json, on every rank."""
    from tqdm import tqdm
    (rank, _, world), done = ranks(), stored_samples(folder)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        egrsd.write_json(folder / "settings.json", settings)
    gather(None)  # everyone has read what is there
    jobs = [(name, p, k) for name, problems in benchmarks.items() for p in range(len(problems))
            for k in range(flags.samples * REPEATS.get(name, 1))]
    mine = [job for job in jobs if job not in done][rank::world]  # neighbours share a problem: even shares
    some = SEQUENCES if isinstance(engine, egrsd.HfEngine) else len(mine) + 1  # hf decodes all at once
    bar = tqdm(total=len(mine), unit="sample", desc=str(folder), disable=None if rank == 0 else True)
    with bar, open(folder / f"rank_{rank}.jsonl", "a+b") as log:
        log.seek(0)
        log.truncate(log.read().rfind(b"\n") + 1)  # a torn line
        for part in [mine[start:start + some] for start in range(0, len(mine), some)]:
            asked = [prompts[name][p] for name, p, _ in part]
            seeds = [egrsd.rollout_seed(flags.seed, p, k) for _, p, k in part]
            for i, ids, _ in engine.generate(asked, seeds, flags.max_completion_length, **SAMPLING):
                name, p, k = part[i]
                gold, text = benchmarks[name][p]["gold"], tokenizer.decode(ids, skip_special_tokens=True)
                egrsd.write_lines(log, [dict(
                    benchmark=name, problem_id=p, sample=k, completion=text, gold=gold,
                    extracted=egrsd.last_boxed(text), correct=egrsd.grade(text, gold), tokens=len(ids),
                    finish="stop" if ids[-1] in engine.ends else "length")])
                bar.update()
    gather(None)
    done = stored_samples(folder)
    return summarise([done[job] for job in jobs])

def summarise(samples):
    """Lines of samples -> the rows of results.json: a benchmark each, in percent and tokens, and their means.
    se is the standard error of avg@K over problems; eff in the row Avg. is the ratio of the macro means."""
    frame = DataFrame(samples).assign(right=[100.0 * row["correct"] for row in samples])
    problems = frame.groupby(["benchmark", "problem_id"], sort=False).agg(
        accuracy=("right", "mean"), solved=("right", "max"), length=("tokens", "mean"))
    table = problems.groupby("benchmark", sort=False).agg(**{
        "avg@K": ("accuracy", "mean"), "se": ("accuracy", "sem"), "pass@K": ("solved", "mean"),
        "length": ("length", "mean")}).fillna(0)  # the se of a single problem
    if len(table) > 1:
        table.loc["Avg."] = {**table.mean(), "se": math.hypot(*table["se"]) / len(table)}
    table["eff"] = table["avg@K"] / (table["length"] / 1000)
    return table.rename_axis("name").reset_index().to_dict("records")

def print_table(title, rows):
    print(f"\n{title}\n{DataFrame(rows).to_string(index=False, float_format='{:.2f}'.format)}", flush=True)

def plan(flags, base, adapters, benchmarks):
    """-> [(adapter or None, its evaluation folder, the settings that identify it)], checked on all ranks."""
    settings = {name: getattr(flags, name) for name in "samples seed thinking max_completion_length".split()}
    settings["model"] = gather(identity(base) if ranks()[0] == 0 else None)[0]
    asked = {name: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for name, rows in benchmarks.items()}
    plans = []
    for adapter in adapters or [None]:
        folder = adapter / "eval" if adapter else Path("out", f"eval-{Path(base).resolve().name}")
        if flags.out:
            folder = Path(flags.out, adapter.name if len(adapters) > 1 else "")
        settings["adapter"] = identity(adapter) if adapter else ""
        plans.append((adapter, folder, check_folder(folder, settings, asked)))
    return plans

def run(argv):
    flags = parse_flags(argv)
    vllm, summary = egrsd.wants_vllm(flags.engine), []
    base, adapters, lora_rank = resolve(flags.what, vllm)
    benchmarks = load_benchmarks(flags.names)
    device = egrsd.start_distributed()
    plans = plan(flags, base, adapters, benchmarks)
    tokenizer, ends = egrsd.load_tokenizer(base)
    prompts = {name: [egrsd.encode(tokenizer, egrsd.student_prompt(row), flags.thinking) for row in rows]
               for name, rows in benchmarks.items()}
    every = sum(prompts.values(), [])
    if vllm:
        context = max(map(len, every)) + flags.max_completion_length
        engine = egrsd.VllmEngine(base, ends, flags.dtype, context, SEQUENCES, flags.engine_memory, lora_rank,
                                  prefix_caching=True, logprobs=False)
    else:
        engine = egrsd.HfEngine(egrsd.load_base(base, flags.dtype, device), ends)
    for adapter, folder, settings in plans:
        if adapter:
            put_on(engine, base, adapter, every[0])
        rows = evaluate(flags, engine, tokenizer, benchmarks, prompts, folder, settings)
        name = adapter.name if adapter else "base"
        summary.append({"": name, **{row["name"]: row["avg@K"] for row in rows},
                        "AvgLen": rows[-1]["length"], "Eff": rows[-1]["eff"]})
        if ranks()[0] == 0:
            egrsd.write_json(folder / "results.json", rows)
            print_table(f"{name}, {folder}", rows)
    if ranks()[0] == 0 and len(plans) * len(benchmarks) > 1:
        print_table("avg@K of all", summary)
    return 0

def main(argv=None):
    return egrsd.as_program("lab.evaluate", run, argv)

if __name__ == "__main__":
    sys.exit(main())
