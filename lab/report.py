"""Pictures, tables and paired comparisons from the files of runs: no model, no tokenizer, on any machine.

    python -m lab.report RUN              # its report.png, mechanism.png and trace.html; a table
    python -m lab.report RUN --step 25    # the page of another step
    python -m lab.report RUN --window 5   # regimes, lookahead and gate as they would be with W = 5
    python -m lab.report RUN RUN ...      # out/report.png, seeds as their mean; the table of toy runs
    python -m lab.report EVAL EVAL ...    # accuracy minus that of the first evaluation, paired by problem

A setting is what runs share that differ in nothing but the seed. A part is the tokens of a step that are in a
decile of the teacher's entropy H (1 to 10), or in a regime. H^CL is H after the lookahead.
"""
import itertools, json, math, sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from pandas import DataFrame, Series, concat
import egrsd
from egrsd import ENTROPY_FLOOR, blamed_on, confidence_gate, lookahead_min, magnitude, require
from lab.evaluate import read_lines, stored_samples

REGIMES = ["lock", "mid", "fork", "pivot"]  # Sec. 5.5
TAU_LOW, TAU_HIGH = 0.08, 0.2  # of max(H_max, 1 nat); Figure A5 hints at the first, the second is ours
PAGE_TOKENS, PAGE_BYTES = 36_000, 1_950_000  # at most, on a trace page
CURVES = dict(reward="reward", accuracy="right answers, %", length="completion length, tokens",
              grad_norm="gradient norm before clipping", engine_gap_max="largest engine gap, nats")
PARTS = dict(gate="mean gate by entropy decile", delta="mean |delta| by entropy decile, nats",
             restored="gate restored by the lookahead")
UNSEEN = ("method", "out", "resume", "seed", "save_every", "micro_batch", "grad_checkpoint", "engine",
          "engine_memory", "engine_args", "tensor_parallel")  # flags that do not make another setting

def read_json(file):
    with blamed_on(f"{file}: cannot be read"):
        return json.loads(file.read_text(encoding="utf-8"))

def token_table(rows, h_max, view):
    """Rollouts of a step -> a row a token, end to end; ahead: H^CL, bare: the gate without lookahead."""
    peak, window = max(h_max, ENTROPY_FLOOR), view["window"]
    entropies = [torch.tensor(row["teacher_entropy"], dtype=torch.float64) for row in rows]
    rollout = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(each) for each in entropies]))
    direction = torch.tensor([row["advantage"] for row in rows]).sign()[rollout]
    delta = torch.tensor(sum((row["delta"] for row in rows), []), dtype=torch.float64)
    entropy, ahead = torch.cat(entropies), torch.cat([lookahead_min(each, window) for each in entropies])
    table = DataFrame(dict(
        rollout=rollout, H=entropy, ahead=ahead, delta=delta, w=magnitude(delta, direction, view["clip"]),
        gate=confidence_gate(ahead, peak, view["gamma"]), bare=confidence_gate(entropy, peak, view["gamma"])))
    unsure = table["H"] >= TAU_HIGH * peak
    regimes = dict(lock=table["H"] <= TAU_LOW * peak, fork=unsure & (table["ahead"] >= TAU_HIGH * peak),
                   pivot=unsure & (table["ahead"] <= TAU_LOW * peak))
    text = Series(sum((row["tokens"] for row in rows), []), dtype=object)  # may hold half a surrogate pair
    return table.assign(regime=np.select([*regimes.values()], [*regimes], "mid"), text=text)

def step_sums(tokens):
    """The token table of a step -> a row a part: its tokens, sums of |delta|, gate and bare."""
    decile = (tokens["H"].rank(method="first").astype(int) - 1) * 10 // len(tokens) + 1
    sums = tokens[["delta", "gate", "bare"]].abs().assign(tokens=1)
    parts = [sums.groupby(part).sum() for part in (decile, tokens["regime"])]
    return concat(parts).rename_axis("part").reset_index()

def token_means(sums, by):
    """Rows of step_sums() -> a row a (by, part): means over its tokens, what is restored, its share in %."""
    total = sums.groupby([by, "part"], sort=False)[["tokens", "delta", "gate", "bare"]].sum()
    means = total.div(total["tokens"], axis=0)
    tokens = total["tokens"].groupby(by).transform("sum") / 2  # each is in a decile and in a regime
    return means.assign(restored=means["gate"] - means["bare"], share=100 * total["tokens"] / tokens)

def load_run(folder, window, step):
    """-> config, view (what w and gate are made with), metrics (a row a step), results of a toy, sums of all
    steps, words ({(regime, text): count}), page (step, H_max, rollouts, tokens). Reads a step at a time."""
    config, results = read_json(folder / "config.json")["config"], folder / "results.json"
    metrics = DataFrame(read_lines(folder / "metrics.jsonl"))
    require(len(metrics), f"{folder}: no step is finished")
    view = dict(gamma=config["gamma"] if config["method"] == "egrsd" else 0.0,  # others have no gate
                clip=config["magnitude_clip"] if config["method"] in ("egrsd", "rlsd") else 0.0,  # nor w
                window=config["window"] if window is None else window)
    sums, words, page = [DataFrame()], Counter(), None
    for number, rows in itertools.groupby(read_lines(folder / "rollouts.jsonl"), lambda row: row["step"]):
        rows = [row for row in rows if row.get("delta")  # not empty, with a teacher, of no skipped step
                and math.isfinite(sum(row["delta"] + row["teacher_entropy"]))]
        if rows:
            h_max = max(max(row["teacher_entropy"]) for row in rows)  # that of the metrics, to 4 digits
            tokens = token_table(rows, h_max, view)
            sums.append(step_sums(tokens).assign(step=number))
            words.update(zip(tokens["regime"], tokens["text"]))
            page = (number, h_max, rows, tokens) if step in (number, None) else page
    return SimpleNamespace(config=config, view=view, metrics=metrics, sums=concat(sums), words=words,
                           page=page, results=read_json(results) if results.exists() else [])

def name_settings(runs):
    """Puts its `setting` into each run and its tables: the method, and the flags that differ between runs."""
    def flags(run):
        idle = UNSEEN if run.config["method"] == "egrsd" else (*UNSEEN, "gamma", "window")
        return {name: Path(str(value)).name for name, value in run.config.items() if name not in idle}

    every = [flags(run) for run in runs]
    for run, own in zip(runs, every):
        differs = [name for name in own if any(other.get(name, own[name]) != own[name] for other in every)]
        shown = [f"{name} {own[name]}" for name in own if name in (*differs, "gamma", "window")]
        if run.view["window"] != run.config["window"]:
            shown.append(f"seen with window {run.view['window']}")
        run.setting = run.metrics["setting"] = ", ".join([run.config["method"], *shown])
        run.sums["setting"] = run.setting

def toy_results(runs):
    """results.json of toy runs -> a row a run after training; above them those before, equal ones once."""
    columns, rows = ["setting", "seed", "gamma", "window", "avg@K", "gain", "length", "eff"], []
    for run in runs:
        if run.results:
            before, after = run.results
            rows.insert(0, {**before, "setting": "before"})
            gain = after["avg@K"] - before["avg@K"]
            rows.append({**run.config, **after, "setting": run.setting, "gain": gain})
    return DataFrame(rows, columns=columns).drop_duplicates()

def gamma_window_grid(results, cell):
    """avg@K, a row a gamma, a column a window; None unless several of both, and they alone, were tried."""
    after = results.dropna(subset="seed").astype({"window": int})
    alone = after["setting"].str.fullmatch("egrsd, gamma [^,]*, window [^,]*").all()
    if alone and after[["gamma", "window"]].nunique().min() > 1:
        return after.groupby(["gamma", "window"])["avg@K"].agg(cell).unstack()

def panels(runs):
    """{title: table}, a column a setting, a row a step, a decile or a regime; without what no run has."""
    metrics, sums = concat(run.metrics for run in runs), concat(run.sums for run in runs)
    tables = {title: metrics.pivot_table(name, "step", "setting")
              for name, title in CURVES.items() if name in metrics}
    if "part" in sums:
        means = token_means(sums, "setting").unstack("setting")
        means = means.loc[:, means.ne(0).any()]  # without lookahead nothing is restored
        for name in [name for name in PARTS if name in means]:
            tables[PARTS[name]] = means[name].reindex(REGIMES if name == "restored" else range(1, 11))
    return tables

def draw_panel(axis, title, table, colours, dashes):
    """Bars over regimes, lines over deciles; over steps the mean of the last ten (pale: a lone run)."""
    look = dict(ax=axis, title=title, color=colours, legend=False)
    if "lock" in table.index:
        table.dropna(axis=1, how="all").plot.bar(rot=0, xlabel="", width=0.8, **look)
    elif table.index.name == "step":
        smooth = table.rolling(10, min_periods=1).mean().where(table.notna())
        logarithmic = "gap" in title and bool((table > 0).any(axis=None))
        smooth.plot(style=dashes, marker="." if len(table) == 1 else "", logy=logarithmic, **look)
        if len(colours) == 1:
            table.plot(alpha=0.25, **look)
    else:
        table.plot(style=dashes, xlabel="decile of the teacher's entropy", xticks=table.index, **look)
        axis.set_ylim(0, 1.05 * table.max(axis=None))
    axis.grid(alpha=0.3)

def draw_results(axis, results, colours):
    """Accuracy against length (Figure 1) with standard deviations over seeds; of a grid the heat map."""
    grid = gamma_window_grid(results, "mean")
    axis.set(title="held-out avg@K, %", xlabel="mean length, tokens")
    if grid is not None:
        axis.imshow(grid, cmap="Blues", alpha=0.6, aspect="auto")
        for (i, j), mean in np.ndenumerate(grid):
            axis.text(j, i, f"{mean:.1f}".replace("nan", ""), ha="center", va="center")
        axis.set(xlabel="lookahead W, tokens", xticks=range(grid.shape[1]), xticklabels=grid.columns,
                 ylabel="gamma", yticks=range(grid.shape[0]), yticklabels=grid.index)
        return
    for name, rows in results.groupby("setting")[["length", "avg@K"]]:
        (x, y), (dx, dy) = rows.mean(), rows.std().fillna(0)
        axis.errorbar(x, y, dy, dx, fmt="o", color=colours.get(name, "0.5"))
        if name == "before":
            axis.annotate(name, (x, y), (0, 8), textcoords="offset points", ha="center")
    axis.margins(0.15, 0.2)
    axis.grid(alpha=0.3)

def draw(file, runs, tables, results):
    """A panel a table, and one of the results where there are some; a colour a setting."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    colours = {name: colormaps["tab20"]((2 * k + k // 10) % 20) for k, name in enumerate(settings)}
    dashes = {name: ("-", "--", ":", "-.")[k % 4] for k, name in enumerate(settings)}
    columns = max(1, 120 // (8 + max(map(len, settings))))  # of the legend
    rows = math.ceil((len(tables) + min(len(results), 1)) / 3)
    figure = Figure((13, 3.2 * rows + 0.25 * math.ceil(len(settings) / columns)), layout="constrained")
    for place, (title, table) in enumerate(tables.items(), 1):
        axis = figure.add_subplot(rows, 3, place)
        draw_panel(axis, title, table.reindex(columns=settings), colours, dashes)
        if title == CURVES["grad_norm"]:
            for norm in {run.config["max_grad_norm"] for run in runs}:
                axis.axhline(norm, color="black", linewidth=0.8, linestyle=(0, (8, 4)))
    if len(results):
        draw_results(figure.add_subplot(rows, 3, len(tables) + 1), results, colours)
    lines = figure.axes[0].lines[:len(settings)]  # of the first panel, one a setting
    figure.legend(lines, settings, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=100)

def print_markdown(table):
    table = table.reset_index().fillna("")
    for row in [table.columns, ["---"] * table.shape[1], *table.values]:
        print(f"| {' | '.join(map(str, row))} |")
    print()

def print_results(results):
    """Markdown: mean ± standard deviation over seeds; avg@K and length minus those of the first setting,
    paired by seed, ± standard error (number of pairs); the gamma x W grid (Table A3) where both vary."""
    def cell(values, spread=Series.std):
        values = values.dropna()
        return f"{values.mean():.1f}" * (len(values) > 0) + f" ± {spread(values):.1f}" * (len(values) > 1)

    settings = results.groupby("setting", sort=False)
    table = settings[["avg@K", "gain", "length", "eff"]].agg(cell)
    table.insert(0, "seeds", settings["seed"].nunique().replace(0, ""))
    for name in ("avg@K", "length"):
        by_seed = results.pivot_table(name, "seed", "setting", sort=False)
        first, *others = by_seed
        if others:
            gaps = by_seed[others].sub(by_seed[first], axis=0)
            table[f"{name} minus {first}"] = gaps.apply(lambda x: f"{cell(x, Series.sem)} ({x.count()})")
    print_markdown(table)
    grid = gamma_window_grid(results, cell)
    if grid is not None:
        print_markdown(grid.rename(columns="W = {}".format))

def print_mechanism(runs):
    """What the gate did, a row a setting; of one run at five steps, and what its locks, forks, pivots are."""
    sums, by = concat(run.sums for run in runs), "setting"
    if len(runs) == 1:
        steps, by = sums["step"].unique(), "step"
        near = [steps[abs(steps - part * steps.max()).argmin()] for part in (0, 0.25, 0.5, 0.75, 1)]
        sums = sums[sums["step"].isin(near)]
    columns = [(name, part) for name in ("share", "restored") for part in REGIMES]
    columns += [(name, decile) for name in ("delta", "gate") for decile in (1, 10)]
    table = token_means(sums, by).unstack("part").reindex(columns=columns)
    print("by regime: share of tokens, %, and gate restored; by entropy decile, 1 and 10: |delta| and gate")
    print(table.to_string(float_format="{:.3g}".format, na_rep="-"))
    if len(runs) == 1:
        for regime in ("lock", "fork", "pivot"):
            words = Counter({text: count for (kind, text), count in runs[0].words.items() if kind == regime})
            top = [f"{text!r} {100 * count / words.total():.1f} %" for text, count in words.most_common(8)]
            print(f"{regime:5}", *top, sep="  ")

def write_page(file, run):
    """lab/trace.html with the rollouts of a step in it, as many as fit; it shows numbers and makes none."""
    def block(content):  # JSON in which nothing can end a script
        return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

    step, h_max, rows, table = run.page
    means = token_means(run.sums, "step").loc[step].reindex(REGIMES)[["share", "gate", "bare"]].fillna(0)
    data = dict(run.view, trained=run.config["window"], step=step, method=run.config["method"], low=TAU_LOW,
                peak=max(h_max, ENTROPY_FLOOR), high=TAU_HIGH, count=len(rows),
                regimes=means.to_dict("index"), rollouts=[])
    names, tokens, size = ("problem", "gold", "correct", "truncated", "reward", "advantage"), 0, 0
    for row, (_, own) in zip(rows, table.round(3).groupby("rollout")):
        rollout = {**{name: row[name] for name in names}, **own.drop(columns="rollout").to_dict("list")}
        tokens, size = tokens + len(own), size + len(block(rollout))
        if tokens <= PAGE_TOKENS and size <= PAGE_BYTES:
            data["rollouts"].append(rollout)
    page, place = Path(__file__).with_name("trace.html").read_text(encoding="utf-8"), 'id="data">'
    file.write_text(page.replace(place, place + block(data), 1), encoding="utf-8")

def report(folders, out, step=None, window=None):
    """Prints and draws what runs have left; the trace page, too, of a single run that had a teacher."""
    runs = [load_run(folder, window, step) for folder in folders]
    require(step is None or runs[0].page, f"{folders[0]}: no rollouts of step {step} that a teacher has seen")
    name_settings(runs)
    results = toy_results(runs)
    if len(results):
        print_results(results)
    out.mkdir(parents=True, exist_ok=True)
    tables = panels(runs)
    draw(out / "report.png", runs, tables, results)
    mechanism = {title: tables[title] for title in PARTS.values() if title in tables}
    if mechanism:
        print_mechanism(runs)
        draw(out / "mechanism.png", runs, mechanism, results[:0])
    if len(runs) == 1 and runs[0].page:
        write_page(out / "trace.html", runs[0])
    print(f"\nreport.png and what goes with it: {out}")

def compare(folders):
    """Accuracy minus the first evaluation's, in points, paired by problem; Avg. weighs benchmarks alike."""
    def accuracies(folder):
        table = DataFrame(stored_samples(folder).values(), columns=["benchmark", "problem_id", "correct"])
        table["asked"] = table["benchmark"].map(read_json(folder / "settings.json")["problems"])
        problems = table.groupby(["benchmark", "asked", "problem_id"], sort=False)
        return 100 * problems["correct"].mean().astype(float)

    first = accuracies(folders[0])
    for folder in folders[1:]:
        gaps = (accuracies(folder) - first).dropna()
        require(len(gaps), f"{folders[0]} and {folder} have no problems in common")
        table = gaps.groupby("benchmark", sort=False).agg(gap="mean", se="sem", problems="count")
        if len(table) > 1:
            table.loc["Avg."] = [table["gap"].mean(), math.hypot(*table["se"]) / len(table), len(gaps)]
        print(f"{folder} minus {folders[0]}, points")
        print(table.astype({"problems": int}).to_string(float_format="{:.2f}".format, na_rep="-"), "\n")

def command(argv):
    parser = egrsd.Parser("lab.report", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="runs, or evaluations")
    parser.add_argument("--out", type=Path, help="folder to write to; default: the run's, out for several")
    parser.add_argument("--step", type=int, help="of the trace page; default: the last")
    parser.add_argument("--window", type=int, help="look with this lookahead W instead of the run's")
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(args.folders))
    evaluations = [folder for folder in folders if (folder / "settings.json").is_file()]
    for folder in folders:
        known = folder in evaluations or (folder / "metrics.jsonl").is_file()
        require(known, f"{folder}: neither the folder of a run nor of an evaluation")
    require(evaluations in ([], folders), "runs and evaluations cannot be mixed")
    require(len(folders) > 1 or not evaluations, f"{folders[0]}: an evaluation needs another beside it")
    require(args.window is None or args.window >= 0, f"--window {args.window}: must not be negative")
    require(args.step is None or len(folders) == 1, "--step: only one run has a trace page")
    if evaluations:
        compare(folders)
    else:
        out = args.out or (folders[0] if len(folders) == 1 else Path("out"))
        report(folders, out, args.step, args.window)
    return 0

def main(argv=None):
    return egrsd.as_program("lab.report", command, argv)

if __name__ == "__main__":
    sys.exit(main())
