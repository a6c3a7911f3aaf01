"""Schemathesis over the whole OpenAPI document, against a service that is really started: no 5xx, no broken schema."""

from collections import Counter
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_service import Live, servers
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.core.failures import Failure

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
          response_schema_conformance]  # fmt: skip
EXAMPLES = 15


def known_things(base: str, session: requests.Session) -> dict[str, Any]:
    """Ids that exist, by the names that parameters and fields have: without them nearly every request ends at a 404."""
    body = {"model": "poet", "messages": [{"role": "user", "content": "hello"}]}
    answer = session.post(f"{base}/v1/chat/completions", json=body, timeout=20).json()
    return {
        "conversations": {"id": answer["flywheel_conversation"]}, "characters": {"id": "ghost"},
        "reviews": {"character_id": "ghost"}, "models": {"id": "pirate"}, "model": "pirate", "character": "pirate",
        "message_id": answer["id"], "reply_id": answer["id"], "trace_id": answer["id"], "id": answer["id"],
        "user": None, "messages": body["messages"], "greeting": 0,
        "flywheel_conversation": None, "flywheel_regenerate": None, "flywheel_parent": None,
    }  # fmt: skip


def made_real(case: schemathesis.Case, known: dict[str, Any]) -> None:
    """Put ids that exist in the place of made-up ones."""
    for part, ids in known.items():
        if isinstance(ids, dict) and f"/{part}/" in case.path:
            case.path_parameters |= {name: id for name, id in ids.items() if name in case.path_parameters}
        elif isinstance(case.body, dict) and part in case.body:
            case.body[part] = ids


def test_every_operation_keeps_its_word(live: Live) -> None:
    base = live.url.removesuffix("/v1")
    document = schemathesis.openapi.from_url(f"{base}/openapi.json")
    statuses: Counter[str] = Counter()
    failures: list[str] = []
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {servers.key(live.folder, 'admin')}"
        known = known_things(base, session)
        for found in document.get_all_operations():
            operation = found.ok()

            @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                      phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(case=operation.as_strategy(), real=st.booleans())
            def ask(case: schemathesis.Case, real: bool) -> None:
                if real:
                    made_real(case, known)
                response = case.call(base_url=base, session=session, timeout=20)
                statuses[f"{case.operation.label} {response.status_code}"] += 1
                case.validate_response(response, checks=CHECKS)

            try:
                ask()
            except* Failure as wrong:  # all operations are asked, then all failures told
                failures += [f"{operation.label}: {one.title}: {one.message}" for one in wrong.exceptions]
    print("\n".join(f"{count:4} {what}" for what, count in sorted(statuses.items())))
    assert not failures, "\n\n".join(failures)
    assert len({what.rpartition(" ")[0] for what in statuses}) == len(list(document.get_all_operations())) >= 25
