"""`flywheel memory` prints a plan and says what does not fit; `flywheel doctor` says what training together lacks."""

import json
from pathlib import Path

import pytest

from characterflywheel import cli, doctor
from characterflywheel.config import ParallelConfig
from characterflywheel.training.plan import StagePlan
from tiny_model import tiny_llama

SMALL = """
[models]
base = "{base}"
{more}
[sft]
max_prompt_tokens = 64
max_reply_tokens = 32
micro_batch_tokens = 96
[dpo]
max_prompt_tokens = 64
max_reply_tokens = 32
micro_batch_tokens = 128
[rl]
max_prompt_tokens = 64
max_tokens = 32
micro_batch_tokens = 256
"""


def workspace(folder: Path, base: Path | str, more: str = "") -> str:
    folder.mkdir()
    (folder / "characters").mkdir()
    (folder / "flywheel.toml").write_text(SMALL.format(base=base, more=more), "utf-8")
    return str(folder)


def test_a_plan_for_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        cli.main(["memory", workspace(tmp_path / "w", tmp_path / "model"), "--json"])
    assert ended.value.code == 0
    plans = [StagePlan.model_validate(one) for one in json.loads(capsys.readouterr().out)]
    assert [plan.stage for plan in plans] == ["sft", "dpo", "rl"]
    assert all(plan.fits and plan.remedy is None for plan in plans)
    assert plans[0].parameters == plans[0].trained_parameters


@pytest.mark.slow
def test_what_does_not_fit_is_an_error_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = workspace(tmp_path / "w", "/nowhere/Llama-3.1-8B-Instruct", 'device = "cuda"')
    with pytest.raises(SystemExit) as ended:
        cli.main(["memory", folder, "--gpu-memory", "80"])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert "8,030,261,248 parameters; 1 x GPU, 80.0 GiB each" in said.out
    assert "NO" in said.out
    assert "sft does not fit: set parallel.gradient_checkpointing = true, " in said.err
    assert "sft.lora_rank = 16" in said.err
    assert "is not on this machine; planned with the shape of llama-3.1-8b" in said.err


def test_the_doctor_looks_for_what_starts_workers() -> None:
    assert doctor.workers(ParallelConfig(processes=2), "cpu").state == "ok"
    ours = doctor.workers(ParallelConfig(processes=2, launch=("no-such-srun",)), "cuda")
    assert (ours.state, "'no-such-srun', which is absent" in ours.found) == ("missing", True)
    assert doctor.workers(ParallelConfig(processes=2, launch=("env",)), "cuda").state == "ok"


def test_the_doctor_counts_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: PLC0415

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    few = doctor.workers(ParallelConfig(processes=4), "cuda")
    assert few.state == "missing"
    assert few.remedy.startswith("set parallel.processes = 1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert doctor.workers(ParallelConfig(processes=4), "cuda").state == "ok"
