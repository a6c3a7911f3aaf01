"""A step's memory is bounded by its micro-batches, not by its examples; measured in processes of their own.

Examples have one length, so micro-batches have one shape: for every new one oneDNN keeps its kernels (at most 1,024).
"""

from multiprocessing.connection import Connection
from pathlib import Path

from processes import FORKS
from training_fixture import example

from characterflywheel.pipeline import peak_memory_mb, reset_peak_memory
from characterflywheel.training.learner import Learner
from characterflywheel.training.paths import of_examples
from characterflywheel.training.sft import accumulate
from tiny_model import tiny_llama, tiny_tokenizer

WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
WORDS = "the sea is cold tonight and the stars are out "


def _peak(answer: Connection, folder: Path, examples: int, limit: int) -> None:
    """The most memory (MiB) that a step holds above what the model takes."""
    learner = Learner(folder, learning_rate=1e-3, steps=1, max_prompt_tokens=192, threads=1)
    rows = [example(10 + i, f"{10 + i} {WORDS * 2}", asked=0) for i in range(examples)]
    lessons = list(of_examples(learner.format, rows, "last", 99).lessons.values())
    accumulate(learner, lessons[:12], limit)  # gradients and kernels are there before
    reset_peak_memory()
    before = peak_memory_mb()
    accumulate(learner, lessons, limit)
    answer.send(peak_memory_mb() - before)


def peak(folder: Path, examples: int, limit: int) -> float:
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_peak, args=(theirs, folder, examples, limit))
    process.start()
    assert ours.poll(60)
    process.join()
    return float(ours.recv())


def test_three_times_the_examples_take_no_more_memory(tmp_path: Path) -> None:
    tiny_llama(**WIDE).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    few, many, whole = (peak(tmp_path, *case) for case in ((24, 560), (84, 560), (84, 10**6)))
    assert whole > 40, "the measure sees what a step takes"
    assert many < 1.5 * few + 5
    assert many < whole / 3
