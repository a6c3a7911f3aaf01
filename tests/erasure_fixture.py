"""A made-up workspace that holds what every stage leaves of what people said, for tests of erasure.

The store, its export, prompts' ids and all records are the real ones; replies and judgements are made up, and weights
are a few bytes.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from characterflywheel import desk, ids, tables, workspace
from characterflywheel.ledger import Sample, SampleReply
from characterflywheel.pipeline import ArtifactRecord, output_hashes
from characterflywheel.records import (
    Answers,
    Candidate,
    Character,
    ChatMessage,
    Conversation,
    Dropped,
    Example,
    Exposure,
    Instruction,
    Judgement,
    Message,
    Preference,
    Prompt,
    Record,
    Signal,
    Task,
    User,
)
from characterflywheel.service_records import ApiKey, Events, Moderation, Remembered, Tip
from characterflywheel.store import EventStore, Position
from characterflywheel.workspace import Workspace

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MO = Character(
    id="mo", name="Mo", category="test", traits=("dry",), greeting="Well?", instructions=(Instruction(text="Be dry."),)
)
FOLDERS = {
    "traffic": "traffic-00000000000a", "curate": "curate-00000000000b", "annotate": "annotate-00000000000c",
    "reward": "reward-00000000000d", "rejection_sampling": "rejection_sampling-00000000000e",
    "sft": "sft-00000000000f", "dpo": "dpo-0000000000a0", "offline": "offline-0000000000a1",
    "release": "release-0000000000a2", "other_sft": "sft-0000000000a3",
}  # fmt: skip
INPUTS = {
    "traffic": (), "curate": ("traffic",), "annotate": ("curate",), "reward": ("annotate", "traffic", "curate"),
    "rejection_sampling": ("curate", "reward"), "sft": ("rejection_sampling", "annotate"), "dpo": ("sft", "annotate"),
    "offline": ("dpo", "curate", "reward"), "release": ("dpo", "curate"), "other_sft": (),
}  # fmt: skip


def build(root: Path, said: Mapping[str, Sequence[str]], where: str | None = None, split: str = "train") -> Workspace:
    """A workspace in which each user said these texts, each in a conversation of its own and with all that follows.

    Every odd text's prompt was dropped by curation. `split` is that of all prompts.
    """
    space = workspace.init(root, "tiny")
    if where:
        space.config_file.write_text(f'preset = "tiny"\n[store]\nurl = "{where}"\n')
    with EventStore.open(where or space.database) as store:
        store.append_events(Events(characters=(MO,)))
        for user, texts in said.items():
            speak(store, user, texts, NOW)
        folders = {name: space.artifacts / folder for name, folder in FOLDERS.items()}
        for folder in folders.values():
            folder.mkdir(parents=True)
        store.export(folders["traffic"], Position(), store.position())
    derive(space, folders, split)
    for name, folder in folders.items():
        finish(name, folder)
    (folders["traffic"].with_name("rl-0000000000ff") / ".partial").mkdir(parents=True)
    (folders["traffic"].with_name("rl-0000000000ff") / "half.parquet").write_bytes(b"PAR1 torn")
    space.report.mkdir()
    first = next(iter(said.values()))
    (space.report / "index.html").write_text(f"<p>{first[0] if first else ''}</p>", encoding="utf-8")
    space.rejected.mkdir()
    lines = [json.dumps({"user": user, "messages": [text]}) for user, texts in said.items() for text in texts]
    (space.rejected / "old-12345678.rejected").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    reasons = [f"line {number}: bad\n" for number, _ in enumerate(lines)]
    (space.rejected / "old-12345678.errors.txt").write_text("".join(reasons))
    return space


def speak(store: EventStore, user: str, texts: Sequence[str], at: datetime) -> None:
    """What the chat service would store of these texts."""
    key = ids.derive_id("key", user, at=at)
    happened = [
        Events(
            users=(User(id=user, population="user", created_at=at),),
            exposures=(Exposure(id=ids.derive_id("e", user), experiment="x", arm="a", user_id=user, created_at=at),),
        )
    ]
    store.add_key(ApiKey(id=key, name="own", digest=key, scopes=("chat",), user_id=user, created_at=at))
    for number, text in enumerate(texts):
        talk = ids.derive_id("conversation", user, number, at=at)
        first, second = (ids.derive_id("message", talk, n, at=at) for n in range(2))
        happened.append(
            Events(
                conversations=(
                    Conversation(id=talk, user_id=user, character_id="mo", character_version=1, source="user",
                                 created_at=at),
                ),
                messages=(
                    Message(id=first, conversation_id=talk, user_id=user, role="user", content=text, created_at=at),
                    Message(id=second, conversation_id=talk, user_id=user, role="assistant", content="I see.",
                            model="base", parent_id=first, created_at=at + timedelta(seconds=1)),
                ),
                signals=(
                    Signal(id=ids.derive_id("signal", talk), message_id=second, user_id=user, kind="feedback",
                           text=f"I said: {text}", created_at=at + timedelta(seconds=2)),
                ),
                moderations=(
                    Moderation(id=ids.derive_id("moderation", talk), message_id=first, conversation_id=talk,
                               user_id=user, subject="prompt", allowed=True, withheld=None, created_at=at),
                ),
                tips=(Tip(id=ids.derive_id("tip", talk), conversation_id=talk, message_id=second, user_id=user),),
                remembered=(
                    Remembered(id=ids.derive_id("remembered", talk), user_id=user, body="b", status=200,
                               response=json.dumps({"said": text}), created_at=at),
                ),
            )
        )  # fmt: skip
    store.append_all(happened)


def derive(space: Workspace, folders: Mapping[str, Path], split: str) -> None:
    """What the stages would leave of the export, with their own ids and columns."""
    messages = [m for m in tables.read(folders["traffic"] / "messages.parquet", Message) if m.role == "user"]
    prompts = [
        Prompt(
            id=ids.prompt_id(m.id, m.created_at), conversation_id=m.conversation_id, user_id=m.user_id, source="user",
            character_id="mo", messages=(ChatMessage(role="user", content=m.content),), split=split, cluster=0, turn=1,
            created_at=m.created_at,
        )
        for m in messages
    ]  # fmt: skip
    turns = {user: [p for p in prompts if p.user_id == user] for user in dict.fromkeys(p.user_id for p in prompts)}
    kept, lost = ([p for theirs in turns.values() for p in theirs[first::2]] for first in (0, 1))
    drawn = [
        Candidate(id=ids.derive_id("candidate", p.id, n), prompt_id=p.id, policy="base", finish_reason="stop",
                  text=f"You say {p.messages[0].content}? {n}")
        for p in kept
        for n in range(2)
    ]  # fmt: skip
    tasks = [
        Task(id=ids.derive_id("task", p.id), kind="static", prompt_id=p.id, character=MO, history=p.messages,
             candidates=tuple(c for c in drawn if c.prompt_id == p.id), reviewer="ann")
        for p in kept
    ]  # fmt: skip
    judgements = [
        Judgement(id=ids.derive_id("judgement", t.id), task_id=t.id, prompt_id=t.prompt_id, reviewer="ann", seconds=1,
                  answers=tuple(Answers(candidate_id=c.id, false_refusal=False, templated=False) for c in t.candidates),
                  ranking=tuple(c.id for c in t.candidates), rewrite=f"Better: {t.history[0].content}", created_at=NOW)
        for t in tasks
    ]  # fmt: skip
    pairs = [
        Preference(id=ids.derive_id("pair", p.id), prompt_id=p.id, user_id=p.user_id, character_id="mo", source="user",
                   prompt=p.messages, chosen=p.messages, rejected=p.messages, chosen_policy="a", rejected_policy="b",
                   reviewers=1, label=1.0)
        for p in kept
    ]  # fmt: skip
    examples = [
        Example(id=ids.derive_id("example", p.id), prompt_id=p.id, user_id=p.user_id, character_id="mo", source="user",
                messages=p.messages)
        for p in kept
    ]  # fmt: skip
    dropped = [Dropped(id=ids.derive_id("lost", p.id), stage="s", reason="r", prompt_id=p.id) for p in kept]
    samples = [
        Sample(prompt_id=p.id, source="user", character="Mo", history=p.messages, old=SampleReply(text="o"),
               new=SampleReply(text="n"))
        for p in kept
    ]  # fmt: skip
    also = [Dropped(id=p.id, stage="curate", reason="duplicate", detail=f"of {p.id}") for p in lost]
    written: list[tuple[str, str, Any, Sequence[Record]]] = [
        ("curate", "prompts", Prompt, kept), ("curate", "dropped", Dropped, also),
        ("annotate", "candidates", Candidate, drawn), ("annotate", "pairs", Preference, pairs),
        ("annotate", "rewrites", Example, examples), ("annotate", "dropped", Dropped, dropped),
        ("rejection_sampling", "accepted", Candidate, drawn), ("rejection_sampling", "examples", Example, examples),
        ("release", "contexts", Prompt, kept), ("release", "replies_control", Candidate, drawn),
    ]  # fmt: skip
    for stage, name, kind, rows in written:
        tables.write(folders[stage] / f"{name}.parquet", kind, rows)
    tables.write_jsonl(folders["annotate"] / "tasks.jsonl", tasks)
    tables.write_jsonl(folders["annotate"] / "judgements.jsonl", judgements)
    tables.write_jsonl(folders["offline"] / "samples.jsonl", samples)
    desk.post(space.annotation, tasks)
    space.annotation.mkdir(exist_ok=True)
    tables.write_jsonl(space.annotation / "judgements.jsonl", judgements)
    for model in ("reward", "sft", "dpo", "other_sft"):
        (folders[model] / "model.safetensors").write_bytes(b"weights")


def finish(name: str, folder: Path) -> None:
    """Write `artifact.json`, as the runner does."""
    record = ArtifactRecord(
        stage=name, hash=folder.name.rpartition("-")[2], version=1, config={}, seed=1, summary={}, code_version="0",
        inputs={source: FOLDERS[source].rpartition("-")[2] for source in INPUTS[name]}, outputs=output_hashes(folder),
        packages={}, device="cpu", seconds=1, peak_memory_mb=1,
    )  # fmt: skip
    (folder / "artifact.json").write_text(record.model_dump_json())


def rows(root: Path) -> dict[str, list[Any]]:
    """Every row of every table of the workspace, read without the program's own lineage."""
    found = {}
    for path in sorted([*root.rglob("*.parquet"), *root.glob("*/*.jsonl"), *root.glob("*/*/*.jsonl")]):
        if "rl-" not in str(path):
            content = (
                pq.read_table(path).to_pylist() if path.suffix == ".parquet"
                else map(json.loads, path.read_bytes().splitlines())
            )  # fmt: skip
            found[path.relative_to(root).as_posix()] = list(content)
    return found


def stored(space: Workspace) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the store but for their numbers."""
    from characterflywheel.store import schema  # noqa: PLC0415

    with EventStore.open(space.config().store.url or space.database) as store, store.read() as connection:
        return {
            name: sorted(map(tuple, connection.execute(table.select().with_only_columns(
                *(column for column in table.columns if column.name != "seq")))), key=repr)
            for name, table in schema.METADATA.tables.items()
        }  # fmt: skip
