"""What the chat service costs: added time at 50 and 100 requests/s, the highest rate held, rows after the drain.

One mock model server is asked directly, through `flywheel serve` (everything logged: SQLite, fsync), and through
LiteLLM's proxy if `--litellm` names its program (one worker, nothing logged). In every round the contenders take turns
with the same arrivals: request i is due at the same moment for each. Added time is the difference to the direct
answer, of quantiles and (`paired_`) of request i to request i. Latency counts from when a request was due.

    python benchmarks/gateway.py --litellm VENV/bin/litellm --json gateway.json
"""

import argparse
import contextlib
import secrets
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import record
import servers
from load import Fired, Plan, fire

PACKAGES = ("characterflywheel", "fastapi", "uvicorn", "aiohttp", "SQLAlchemy")
QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}
HELD_MS = 1000.0
UNLIMITED = "key_requests_per_minute = 10000000\nuser_requests_per_minute = 10000000\n"


@dataclass(frozen=True)
class Contender:
    """Where requests are sent, how the model is named there, and the store that logs them, where there is one."""

    server: servers.Server
    model: str
    key: str
    store: Path | None = None

    def rows(self) -> dict[str, int]:
        """Messages in the store by role."""
        with contextlib.closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)) as store:
            return dict(store.execute("SELECT role, COUNT(*) FROM messages GROUP BY role").fetchall())


@dataclass(frozen=True)
class Measured:
    """One contender at one rate in one round; processor milliseconds a request."""

    fired: Fired
    server_cpu_ms: float
    mock_cpu_ms: float
    rows_equal: bool | None

    def ms(self, what: str = "total") -> dict[str, float]:
        return quantiles(np.array(getattr(self.fired, what)))


def quantiles(seconds: "np.ndarray[Any, Any]") -> dict[str, float]:
    """In milliseconds; a request without an answer counts as slower than all others."""
    ordered = np.sort(np.where(np.isnan(seconds), np.inf, seconds)) * 1e3
    return {name: float(ordered[int(np.ceil(q / 100 * len(ordered))) - 1]) for name, q in QUANTILES.items()}


def measure(contender: Contender, mock: servers.Server, plan: Plan) -> Measured:
    """Fire a plan; see what processor time it cost whom, and whether each answer has its two rows."""
    before = contender.server.cpu(), mock.cpu()
    rows = contender.rows() if contender.store else {}
    fired = fire(plan)
    each = 1e3 / len(fired.due)
    cost = (contender.server.cpu() - before[0]) * each, (mock.cpu() - before[1]) * each
    equal = None
    if contender.store:
        time.sleep(1)
        after = contender.rows()
        equal = all(after.get(r, 0) - rows.get(r, 0) == len(fired.ids) for r in ("user", "assistant"))
        equal = equal and len(set(fired.ids)) == len(fired.ids)
    return Measured(fired, *cost, equal)


def added(over: Measured, direct: Measured, what: str) -> dict[str, float]:
    """Milliseconds on top of the direct answer."""
    mine, base = over.ms(what), direct.ms(what)
    paired = quantiles(np.array(getattr(over.fired, what)) - np.array(getattr(direct.fired, what)))
    return {name: mine[name] - base[name] for name in QUANTILES} | {f"paired_{k}": v for k, v in paired.items()}


def compare(contenders: Mapping[str, Contender], rate: float, stream: bool, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders at one rate, in turns: medians over the rounds, and every round's added time."""
    _say(f"{rate:g} requests/s for {args.seconds:g} s, {'streamed' if stream else 'whole'}")
    mock, rounds = contenders["direct"].server, []
    for number in range(args.repeats):
        turns = list(contenders.items())
        turns = turns[number % len(turns) :] + turns[: number % len(turns)]
        found = {}
        for name, one in turns:
            plan = Plan(one.server.url, rate, args.seconds, one.key, one.model, stream, seed=number + 1000 * int(rate))
            found[name] = measure(one, mock, plan)
            _say(f"  round {number + 1} {name:<9} {_told(found[name])}")
        rounds.append(found)
    return {name: _summary([r[name] for r in rounds], [r["direct"] for r in rounds]) for name in contenders}


def ramp(contender: Contender, mock: servers.Server, rates: Sequence[float], seconds: float) -> dict[str, Any]:
    """The highest rate at which every request was answered, 99% of them within a second; goes up until one is not."""
    steps: list[dict[str, Any]] = []
    for rate in rates:
        plan = Plan(contender.server.url, rate, seconds, contender.key, contender.model, seed=int(rate))
        found = measure(contender, mock, plan)
        _say(f"  {rate:g}/s {_told(found)}")
        held = found.fired.success == 1 and found.ms()["p99"] <= HELD_MS
        steps.append({"rate": rate, "held": held} | _summary([found], [found]))
        if not held:
            break
    return {"held_rps": max((s["rate"] for s in steps if s["held"]), default=None), "steps": steps}


def _summary(rounds: Sequence[Measured], direct: Sequence[Measured]) -> dict[str, Any]:
    def middle(rows: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
        medians = {name: record.median([row[name] for row in rows]) for name in rows[0]}
        return {name: value if np.isfinite(value) else None for name, value in medians.items()}

    pairs = list(zip(rounds, direct, strict=True))
    lags = [np.array(r.fired.lag)[~np.isnan(r.fired.lag)] for r in rounds]
    equal = [r.rows_equal for r in rounds if r.rows_equal is not None]
    return {
        "requests": sum(len(r.fired.due) for r in rounds),
        "success": sum(len(r.fired.ids) for r in rounds) / sum(len(r.fired.due) for r in rounds),
        "failures": [r.fired.failures for r in rounds],
        "ms": middle([r.ms() for r in rounds]),
        "first_ms": middle([r.ms("first") for r in rounds]),
        "added_ms": middle([added(r, d, "total") for r, d in pairs]),
        "added_first_ms": middle([added(r, d, "first") for r, d in pairs]),
        "added_ms_rounds": [middle([added(r, d, "total")]) for r, d in pairs],
        "added_first_ms_rounds": [middle([added(r, d, "first")]) for r, d in pairs],
        "cpu_ms": record.median([r.server_cpu_ms for r in rounds]),
        "mock_cpu_ms": record.median([r.mock_cpu_ms for r in rounds]),
        "generator_cpu_ms": record.median([r.fired.cpu * 1e3 / len(r.fired.due) for r in rounds]),
        "generator_lag_ms": middle([quantiles(lag) for lag in lags]),
        "rows_equal": all(equal) if equal else None,
    }


def ratios(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Our added time as a share of LiteLLM's; None where it was not measured, or failed too much for a quantile."""
    ours, theirs = found["flywheel"], found.get("litellm")
    shares: dict[str, float | None] = {}
    for what in ("added", "added_first"):
        for name in ours[f"{what}_ms"]:
            mine, peer = ours[f"{what}_ms"][name], theirs[f"{what}_ms"][name] if theirs else None
            shares[f"{what}_{name}_ratio"] = mine / peer if mine is not None and peer else None
    return shares


def mock_and_ours(args: argparse.Namespace, scratch: Path, stack: contextlib.ExitStack) -> dict[str, Contender]:
    """The mock and our service in front of it, listening."""
    mock = stack.enter_context(servers.running(servers.mock_upstream(scratch, "--first", str(args.delay))))
    folder = scratch / "product"
    upstream = f'backend = "endpoint"\nendpoint = "{mock.url}"\nendpoint_model = "mock"\n'
    key = servers.workspace(folder, f"[server]\n{upstream}{UNLIMITED}")
    ours = stack.enter_context(servers.running(servers.flywheel(folder)))
    return {
        "direct": Contender(mock, "mock", "none"),
        "flywheel": Contender(ours, servers.CHARACTER, key, folder / "flywheel.db"),
    }


def litellm(program: Path, scratch: Path, upstream: str) -> Contender:
    """LiteLLM's proxy as people start it: one worker, no database, no callbacks. Not started."""
    settings, port, key = scratch / "litellm.yaml", servers.free_port(), f"sk-{secrets.token_urlsafe(24)}"
    model = f'{{model: openai/mock, api_base: "{upstream}", api_key: none}}'
    settings.write_text(f"model_list:\n  - model_name: mock\n    litellm_params: {model}\n", encoding="utf-8")
    address = ("--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False")
    base = f"http://127.0.0.1:{port}"
    quiet = {"LITELLM_MASTER_KEY": key, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    server = servers.Server(
        "litellm", [str(program), "--config", str(settings), *address], f"{base}/v1", f"{base}/health/readiness",
        scratch / "litellm.log", quiet,
    )  # fmt: skip
    return Contender(server, "mock", key)


def echo(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The highest rate of the service itself, with the backend that only echoes."""
    folder = scratch / "echo"
    key = servers.workspace(folder, f"[server]\n{UNLIMITED}")
    with servers.running(servers.flywheel(folder, "--backend", "echo")) as server:
        return ramp(Contender(server, servers.CHARACTER, key, folder / "flywheel.db"), server, args.rates, args.ramp)


def main() -> None:
    args = _arguments()
    figures: dict[str, Any] = record.circumstances(args, PACKAGES)
    if args.litellm is None:
        _say("LiteLLM's proxy is left out: name its program with --litellm to measure it too.")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        contenders = mock_and_ours(args, scratch, stack)
        mock, ours = contenders["direct"].server, contenders["flywheel"]
        with contextlib.ExitStack() as peers:
            if args.litellm:
                contenders["litellm"] = litellm(args.litellm, scratch, mock.url)
                peers.enter_context(servers.running(contenders["litellm"].server))
            for one in contenders.values():  # connections, caches, code that is loaded late
                for stream in (False, True):
                    warm = Plan(one.server.url, 20, min(3, args.seconds), one.key, one.model, stream, seed=7 + stream)
                    measure(one, mock, warm)
            figures["compared"] = []
            for rate, stream in [*((r, False) for r in args.at), *((r, True) for r in args.stream_at)]:
                found = compare(contenders, rate, stream, args)
                figures["compared"].append({"rate": rate, "stream": stream} | ratios(found) | {"contenders": found})
        _say("the highest rate held, all logged, the mock behind")
        figures["ramp"] = ramp(ours, mock, args.rates, args.ramp)
        figures["litellm_version"] = _version_of(args.litellm)
    with tempfile.TemporaryDirectory() as folder:
        _say("the highest rate held, all logged, the echo backend")
        figures["echo"] = echo(args, Path(folder))
    held = [s for part in ("ramp", "echo") for s in figures[part]["steps"] if s["held"]]
    logged = [c["contenders"]["flywheel"] for c in figures["compared"]]
    figures |= {"held_rps": figures["ramp"]["held_rps"], "echo_held_rps": figures["echo"]["held_rps"]}
    figures["rows_equal"] = all(one["rows_equal"] for one in (*held, *logged))
    for part in figures["compared"][:1]:
        figures |= {name: value for name, value in part.items() if name.endswith("_ratio")}
    _print(figures)
    record.write(args.json, figures)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = [200, 300, 400, 500, 600, 700, 800, 1000, 1200, 1500]
    parser.add_argument("--litellm", type=Path, help="the `litellm` program of an environment with litellm[proxy]")
    parser.add_argument("--at", type=float, nargs="*", default=[50, 100], help="requests a second to compare at")
    parser.add_argument("--stream-at", type=float, nargs="*", default=[50], help="the same, streamed")
    parser.add_argument("--rates", type=float, nargs="+", default=steps, help="requests a second, until one fails")
    parser.add_argument("--seconds", type=float, default=30, help="length of one measurement")
    parser.add_argument("--ramp", type=float, default=10, help="seconds at each rate of --rates")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the contenders take turns in each")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds the mock waits before it answers")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def _print(figures: Mapping[str, Any]) -> None:
    rows = []
    for part in figures["compared"]:
        for name, one in part["contenders"].items():
            what = f"{part['rate']:g}/s {'stream' if part['stream'] else 'whole'} {name}"
            extra, first = one["added_ms"], one["added_first_ms"]
            rows.append([what, one["success"], *(one["ms"][q] for q in QUANTILES), *(extra[q] for q in QUANTILES),
                         extra["paired_p99"], first["p50"], first["p99"], one["cpu_ms"]])  # fmt: skip
    header = ["ms", "success", "p50", "p90", "p99", "+p50", "+p90", "+p99", "+p99 paired", "+first p50", "+first p99",
              "cpu/request"]  # fmt: skip
    record.show(figures, header, rows)
    shares = {k: round(v, 3) for k, v in figures.items() if k.endswith("_ratio") and v is not None}
    print(f"\nheld {figures['held_rps']} requests/s, echo {figures['echo_held_rps']}; rows equal requests: "
          f"{figures['rows_equal']}\nour share of LiteLLM's added time: {shares or 'not measured'}")  # fmt: skip


def _told(found: Measured) -> str:
    total, first = found.ms(), found.ms("first")
    return (
        f"success {found.fired.success:.4f} p50 {total['p50']:.1f} p99 {total['p99']:.1f} first p50 {first['p50']:.1f} "
        f"ms, cpu {found.server_cpu_ms:.2f} ms, rows equal {found.rows_equal} {found.fired.failures or ''}"
    )


def _version_of(program: Path | None) -> str | None:
    if program is None:
        return None
    ask = "import importlib.metadata as m; print(m.version('litellm'))"
    return subprocess.run(
        [str(program.with_name("python")), "-c", ask], capture_output=True, text=True, check=False
    ).stdout.strip()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
