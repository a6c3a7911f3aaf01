"""The `flywheel` command (DESIGN section 10). Everything heavy is imported by the command that needs it.

Exit status: 0 done, 1 an error one can act on (one sentence on standard error), 2 wrong usage, 3 waiting for people.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .errors import FlywheelError, Waiting

if TYPE_CHECKING:
    from .workspace import Workspace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make the language model behind AI characters better company, generation after generation.",
)
characters_app = typer.Typer(no_args_is_help=True, help="List, show and check the workspace's characters.")
experiment_app = typer.Typer(no_args_is_help=True, help="Start, ramp, stop and read experiments on users.")
keys_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke the chat service's API keys.")
annotate_app = typer.Typer(no_args_is_help=True, help="Carry tasks to annotators and their judgements back.")
app.add_typer(characters_app, name="characters")
app.add_typer(experiment_app, name="experiment")
app.add_typer(annotate_app, name="annotate")
app.add_typer(keys_app, name="keys")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the workspace's folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error with a remedy is one sentence, not a traceback."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(arguments, prog_name="flywheel")
    except FlywheelError as error:
        sys.stderr.write(f"flywheel: {error}\n")
        sys.exit(1)
    except OSError as error:  # a full disk, a missing permission
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"flywheel: {error.strerror or error}{where}: mend it and give the command again.\n")
        sys.exit(1)
    except Waiting as waiting:
        sys.stderr.write(f"waiting: {waiting}\n")
        sys.exit(3)


def _open(folder: Path) -> "Workspace":
    from .workspace import Workspace  # noqa: PLC0415

    return Workspace.open(folder)


@app.command()
def init(
    folder: Folder,
    preset: Annotated[str, typer.Option(help="sizes to start from: tiny, quick, gpu or cluster")] = "quick",
) -> None:
    """Create a workspace with a dozen characters."""
    from . import workspace  # noqa: PLC0415

    made = workspace.init(folder, preset)
    count = len(list(made.characters.glob("*.toml")))
    typer.echo(f"{folder}: preset {preset}, {count} characters. Next: flywheel run {folder}")


@app.command()
def run(
    folder: Folder,
    generations: Annotated[int, typer.Option(min=1, help="turn until so many are complete")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="print the stages and stop")] = False,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="stop after this stage")] = None,
) -> None:
    """Turn the flywheel. Stages that are complete are not run again; after a kill, run the same command."""
    from . import commands, worlds  # noqa: PLC0415

    workspace = _open(folder)
    if plan:
        commands.plan(workspace, generations)
    else:
        commands.run(workspace, generations, until, commands.Meet(worlds.people_of, worlds.oracle_of))


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Generations so far, the model in service, and what comes next."""
    workspace = _open(folder)
    from .status import print_status, status  # noqa: PLC0415

    found = status(workspace)
    typer.echo(found.model_dump_json(indent=1)) if as_json else print_status(found)


@app.command()
def report(
    folder: Folder,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures' numbers")] = None,
) -> None:
    """Write the report, one HTML page that works offline."""
    workspace = _open(folder)
    from .report import write_report  # noqa: PLC0415

    typer.echo(write_report(workspace.root, json_file))


@app.command("import")
def import_(
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what to import; `package` for chitchat-dataset's own")],
    format: Annotated[
        Literal["openai", "sillytavern", "chitchat"], typer.Option(help="how FILE is written")
    ] = "openai",
) -> None:
    """Bring conversations of real people into the event store. Bad lines are kept aside, the rest comes in."""
    workspace = _open(folder)
    from .characters import load_characters  # noqa: PLC0415
    from .importers import import_file  # noqa: PLC0415
    from .progress import progress  # noqa: PLC0415
    from .store import EventStore  # noqa: PLC0415

    characters = load_characters(workspace.characters).values()
    with workspace.locked(), EventStore.open(workspace.events) as store, progress(f"import {file.name}") as advance:
        store.add_characters(characters)
        found = import_file(store, file, format, workspace.rejected, advance)
    typer.echo(f"{found.conversations} conversations, {found.messages} messages, {found.added} of them new")
    _say_rejected(found.rejected, [f"line {bad.line}: {bad.reason}" for bad in found.bad_lines], found.rejected_path)


@characters_app.command("list")
def list_characters(folder: Folder) -> None:
    """One line a character: id, name, category, how many instructions a program can verify, whether it is published."""
    from . import character_commands  # noqa: PLC0415

    character_commands.list_characters(_open(folder))


@characters_app.command("show")
def show_character(folder: Folder, character: Annotated[str, typer.Argument(help="the character's id")]) -> None:
    """A character as the model is told of it, and its greeting."""
    from . import character_commands  # noqa: PLC0415

    character_commands.show(_open(folder), character)


@characters_app.command("check")
def check_characters(folder: Folder) -> None:
    """Read every character; the first that cannot be read is an error that names its file."""
    from .characters import load_characters  # noqa: PLC0415

    typer.echo(f"{len(load_characters(_open(folder).characters))} characters, all readable")


@characters_app.command("import")
def import_cards(
    folder: Folder,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="character cards, JSON or PNG")],
    id: Annotated[str | None, typer.Option(help="the character's id; from its name if not said")] = None,
) -> None:
    """Bring in character cards. What safety finds clean is published, the rest waits for `review`."""
    from . import character_commands  # noqa: PLC0415

    character_commands.import_cards(_open(folder), files, id)


@characters_app.command("export")
def export_card(
    folder: Folder,
    character: Annotated[str, typer.Argument(help="the character's id")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="where to write it")],
    format: Annotated[Literal["v2", "v3"], typer.Option(help="the card's version; a picture holds both")] = "v3",
    form: Annotated[Literal["json", "png"], typer.Option("--as", help="JSON, or inside a picture")] = "json",
) -> None:
    """Write a character as a character card."""
    from . import character_commands  # noqa: PLC0415

    character_commands.export_card(_open(folder), character, format, form, output)


@characters_app.command("publish")
def publish_characters(
    folder: Folder, character: Annotated[str | None, typer.Argument(help="one id; the folder's if not said")] = None
) -> None:
    """Have safety check characters, so that people can talk to them. `serve` does so for the folder's."""
    from . import character_commands  # noqa: PLC0415

    character_commands.publish(_open(folder), character)


@characters_app.command("retire")
def retire_character(
    folder: Folder,
    character: Annotated[str, typer.Argument(help="the character's id")],
    reason: Annotated[str, typer.Option(help="why; kept with the decision")],
) -> None:
    """Take a character out of service."""
    from . import character_commands  # noqa: PLC0415

    character_commands.retire(_open(folder), character, reason)


@characters_app.command("review")
def review_characters(
    folder: Folder,
    character: Annotated[str | None, typer.Argument(help="the character's id; the queue if not said")] = None,
    approve: Annotated[bool | None, typer.Option("--approve/--refuse", help="the decision")] = None,
    reason: Annotated[str, typer.Option(help="why; kept with the decision")] = "",
) -> None:
    """Decide about a character that waits for a person, or print the queue."""
    from . import character_commands  # noqa: PLC0415

    decision: Literal["approved", "refused"] | None = None if approve is None else "approved" if approve else "refused"
    character_commands.review(_open(folder), character, decision, reason)


@experiment_app.command("show")
def show_experiment(
    folder: Folder,
    generation: Annotated[int | None, typer.Option(help="which generation's; the newest if not said")] = None,
    as_json: AsJson = False,
) -> None:
    """An experiment's lifts in breadth and depth with their intervals, and the verdict."""
    from . import commands  # noqa: PLC0415

    commands.show_experiment(_open(folder), generation, as_json)


@experiment_app.command("start")
def start_experiment(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="a name that no experiment had before")],
    arm: Annotated[list[str], typer.Option(metavar="ARM=MODEL:SHARE", help="control and treatment: control=base:0.1")],
) -> None:
    """Assign a share of users to each arm, whose model answers them from now on."""
    from . import service_commands  # noqa: PLC0415

    service_commands.start_experiment(_open(folder), name, arm)


@experiment_app.command("ramp")
def ramp_experiment(
    folder: Folder,
    name: Annotated[str, typer.Argument()],
    share: Annotated[list[str], typer.Option(metavar="ARM=SHARE", help="the arm's new share of all users")],
) -> None:
    """Raise arms' shares; users stay in the arms they are in."""
    from . import service_commands  # noqa: PLC0415

    service_commands.ramp_experiment(_open(folder), name, share)


@experiment_app.command("stop")
def stop_experiment(folder: Folder, name: Annotated[str, typer.Argument()]) -> None:
    """End an experiment for good: everybody meets the model in service again."""
    from . import service_commands  # noqa: PLC0415

    service_commands.stop_experiment(_open(folder), name)


@experiment_app.command("list")
def list_experiments(folder: Folder, as_json: AsJson = False) -> None:
    """The experiments of the chat service, one a line."""
    from . import service_commands  # noqa: PLC0415

    service_commands.list_experiments(_open(folder), as_json)


@keys_app.command("create")
def create_key(
    folder: Folder,
    scope: Annotated[list[str], typer.Option(help="what the key opens: chat, characters, review, experiments, admin")],
    name: Annotated[str, typer.Option(help="what it is for")] = "",
    user: Annotated[str | None, typer.Option(help="the one user it speaks for; any user if not said")] = None,
    days: Annotated[float | None, typer.Option(help="days until it expires; never if not said")] = None,
) -> None:
    """Print a new API key, the only time that it is shown."""
    from . import service_commands  # noqa: PLC0415

    service_commands.create(_open(folder), name, scope, user, days)


@keys_app.command("list")
def list_keys(folder: Folder, as_json: AsJson = False) -> None:
    """The keys by id, what they open, and whether they still do."""
    from . import service_commands  # noqa: PLC0415

    service_commands.list_keys(_open(folder), as_json)


@keys_app.command("revoke")
def revoke_key(folder: Folder, key: Annotated[str, typer.Argument(help="the key's id")]) -> None:
    """Take a key out of use; a running service refuses it within seconds."""
    from . import service_commands  # noqa: PLC0415

    service_commands.revoke(_open(folder), key)


@annotate_app.command("export")
def export_tasks(folder: Folder, file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Write the tasks that await judgement as JSON lines."""
    from . import desk  # noqa: PLC0415

    typer.echo(f"{desk.export(_open(folder).annotation, file)} tasks in {file}")


@annotate_app.command("import")
def import_judgements(folder: Folder, file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Take in judgements, one as JSON on each line. Bad lines are kept aside, the rest comes in."""
    from . import desk  # noqa: PLC0415

    workspace = _open(folder)
    with workspace.locked():
        intake = desk.take_in(workspace.annotation, file, workspace.rejected)
    left = len(desk.open_tasks(workspace.annotation))
    typer.echo(f"{intake.accepted} judgements accepted, {intake.known} known before, {left} tasks still open")
    _say_rejected(len(intake.rejected), intake.rejected, intake.rejected_file)


@app.command()
def serve(
    folder: Folder,
    backend: Annotated[
        Literal["native", "endpoint", "echo"] | None,
        typer.Option(help="who writes the replies; as configured if absent"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; default: as configured")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free one")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="an OpenAI-compatible server to ask")] = None,
) -> None:
    """Let people talk to the characters: OpenAI's API, feedback, and the web page."""
    workspace = _open(folder)
    config = workspace.config()
    given = {"backend": backend or ("endpoint" if endpoint else None), "host": host, "port": port, "endpoint": endpoint}
    server = config.server.model_copy(update={name: value for name, value in given.items() if value is not None})
    from .serving.serve import serve  # noqa: PLC0415

    serve(workspace, config.model_copy(update={"server": server}))


@app.command()
def score(
    folder: Folder,
    generation: Annotated[int | None, typer.Option(min=1, help="whose reward models; the newest if not said")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; a public one needs a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8766,
    max_replies: Annotated[int | None, typer.Option(min=2, help="replies in one request")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(min=1024, help="size of one request")] = None,
    max_waiting: Annotated[int | None, typer.Option(min=1, help="requests that may wait")] = None,
    max_wait_s: Annotated[float | None, typer.Option(min=0.001, help="who would wait longer is sent away")] = None,
    max_joined: Annotated[
        int | None, typer.Option(min=1, help="replies of several requests scored in one pass")
    ] = None,
) -> None:
    """Serve reward models to runs that name the address in reward.server. The key: FLYWHEEL_SCORE_KEY."""
    workspace = _open(folder)
    given = {"max_replies": max_replies, "max_body_bytes": max_body_bytes, "max_waiting": max_waiting,
             "max_wait_s": max_wait_s, "max_joined": max_joined}  # fmt: skip
    from . import score_commands  # noqa: PLC0415
    from .reward.wire import Limits  # noqa: PLC0415

    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    score_commands.score(workspace, generation, host, port, limits)


@app.command()
def promote(
    folder: Folder,
    generation: Annotated[int, typer.Argument(min=1, help="whose model to put into service")],
    reason: Annotated[str, typer.Option(help="why; kept in the registry")],
    against_gate: Annotated[bool, typer.Option("--against-gate", help="even if the gate did not say ship")] = False,
) -> None:
    """Put a generation's model into service by hand."""
    from . import commands  # noqa: PLC0415

    commands.promote(_open(folder), generation, reason, against_gate)


@app.command()
def rollback(folder: Folder, reason: Annotated[str, typer.Option(help="why; kept in the registry")]) -> None:
    """Put the model that served before back into service."""
    from . import commands  # noqa: PLC0415

    commands.rollback(_open(folder), reason)


@app.command()
def forget(
    folder: Folder, user: Annotated[str, typer.Argument(metavar="USER", help="the user's id")], as_json: AsJson = False
) -> None:
    """Erase a user from the store and from everything derived, and prove it. Models cannot unlearn; they are named."""
    workspace = _open(folder)
    from . import erase  # noqa: PLC0415

    known = {one.id for one in erase.erasures(workspace)}
    done = erase.forget(workspace, user)
    before = "erased before: " * (done.id in known)
    typer.echo(done.model_dump_json(indent=1) if as_json else before + done.text())


@app.command()
def retain(
    folder: Folder,
    days: Annotated[int | None, typer.Option(min=1, help="instead of server.retention_days in flywheel.toml")] = None,
) -> None:
    """Erase conversations that nobody has touched for so many days, from the store and from everything derived."""
    workspace = _open(folder)
    from . import erase  # noqa: PLC0415

    done = erase.retain(workspace, days)
    typer.echo(done.text() if done else "no conversation has been untouched for so long")


@app.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="a workspace to look at too")] = None,
) -> None:
    """Tell what this machine has, and what it lacks."""
    from .doctor import examine  # noqa: PLC0415

    checks = examine(folder)
    for check in checks:
        remedy = f" -> {check.remedy}" if check.remedy else ""
        typer.echo(f"{check.state:<8} {check.name:<15} {check.found}{remedy}")
    missing = sum(check.state == "missing" for check in checks)
    if missing:
        raise FlywheelError(f"{missing} of {len(checks)} checks failed: see `missing` above.")


@app.command()
def memory(
    folder: Folder,
    gpus: Annotated[int | None, typer.Option(min=1, help="processes, one a GPU; as configured if absent")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB of each; this machine's or 80 GB if absent")
    ] = None,
    gpu: Annotated[str, typer.Option(help="whose peak the hours are of: H100, H200, A100 or L40S")] = "H100",
    local: Annotated[int, typer.Option(min=1, help="GPUs of one machine")] = 8,
    as_json: AsJson = False,
) -> None:
    """Whether SFT, DPO and RL fit, how their steps are cut and how long they may take. Nothing is loaded or run."""
    from . import memory_commands  # noqa: PLC0415

    memory_commands.memory(_open(folder), gpus, gpu_memory, gpu, local, as_json)


@app.command()
def version() -> None:
    """Print the version."""
    from . import __version__  # noqa: PLC0415

    typer.echo(__version__)


def _say_rejected(count: int, reasons: Sequence[str], aside: object) -> None:
    """Bad lines do not stop an import, yet nobody should overlook them."""
    if not count:
        return
    sys.stderr.write(f"{count} lines were not read and are kept in {aside}:\n")
    sys.stderr.writelines(f"  {reason}\n" for reason in reasons[:10])
    if count > 10:
        sys.stderr.write(f"  and {count - 10} more\n")


if __name__ == "__main__":
    main()
