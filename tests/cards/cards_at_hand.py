"""Cards and characters for the tests: drawn by hypothesis, and one by hand that uses every field."""

from typing import Any

from hypothesis import strategies as st

from characterflywheel.records import Character, ChatMessage, Instruction, Rule

text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
name = text.filter(lambda value: bool(value.strip()))
scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
json_value = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
extensions = st.dictionaries(text.filter(lambda key: key != "characterflywheel"), json_value, max_size=3)
number = st.integers(-1000, 1000) | st.floats(-1000, 1000)
entry = st.fixed_dictionaries(
    {"keys": st.lists(text, max_size=3), "content": text, "extensions": extensions, "enabled": st.booleans(),
     "insertion_order": number},
    optional={
        "case_sensitive": st.booleans(), "use_regex": st.booleans(), "constant": st.booleans(), "name": text,
        "priority": number, "id": st.integers() | text, "comment": text, "selective": st.booleans(),
        "secondary_keys": st.lists(text, max_size=3), "position": st.sampled_from(["before_char", "after_char"]),
        "another_program": json_value,
    },
)  # fmt: skip
book = st.fixed_dictionaries(
    {"extensions": extensions, "entries": st.lists(entry, max_size=3)},
    optional={
        "name": text, "description": text, "scan_depth": st.integers(0, 50), "token_budget": st.integers(0, 500),
        "recursive_scanning": st.booleans(), "another_program": json_value,
    },
)  # fmt: skip
v1 = st.fixed_dictionaries(
    {"name": name} | dict.fromkeys(("description", "personality", "scenario", "first_mes", "mes_example"), text)
)
_V2: dict[str, Any] = {
    "name": name, "description": text, "personality": text, "scenario": text, "first_mes": text, "mes_example": text,
    "creator_notes": text, "system_prompt": text, "post_history_instructions": text, "creator": text,
    "alternate_greetings": st.lists(text, max_size=3), "tags": st.lists(text, max_size=3), "character_version": text,
    "extensions": extensions,
}  # fmt: skip
_KNOWN = {*_V2, "character_book", "nickname", "group_only_greetings"}
unknown = st.dictionaries(text.filter(lambda key: key not in _KNOWN), json_value, max_size=2)


@st.composite
def _card(draw: st.DrawFn, version: str) -> dict[str, object]:
    fields = _V2 | ({"group_only_greetings": st.lists(text, max_size=2)} if version == "3.0" else {})
    more = {"nickname": text, "source": st.lists(text), "creation_date": st.integers(0)} if version == "3.0" else {}
    data = draw(unknown) | draw(st.fixed_dictionaries(fields, optional={"character_book": book} | more))
    return {"spec": f"chara_card_v{version[0]}", "spec_version": version, "data": data}


v2 = _card("2.0")
v3 = _card("3.0")
own = st.builds(
    Character,
    id=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True), version=st.integers(1, 99), name=name,
    category=text, traits=st.tuples(text, text), greeting=text, safety=st.sampled_from(["approved", "review"]),
    instructions=st.tuples(
        st.builds(Instruction, text=name, rule=st.none() | st.just(Rule(kind="max_words", number=30)))
    ),
    examples=st.lists(
        st.builds(ChatMessage, role=st.sampled_from(["user", "assistant"]), content=text), max_size=2
    ).map(tuple),
    extensions=extensions,
)  # fmt: skip

FULL: dict[str, Any] = {
    "spec": "chara_card_v3",
    "spec_version": "3.0",
    "data": {
        "name": "Mirabel the Innkeeper",
        "nickname": "Mira",
        "description": "{{char}} keeps the inn of <USER>'s village.",
        "personality": "warm, {{Char}} never hurries",
        "scenario": "{{user}} comes in from the rain.",
        "first_mes": "Come in, {{user}}!",
        "mes_example": (
            "<START>\n{{user}}: Is there soup?\n{{char}}: There is.\nLeek, today.\n"
            "<start>\nThe fire burns low.\nMirabel the Innkeeper: More wood?"
        ),
        "system_prompt": "Stay in character. {{original}}",
        "post_history_instructions": "{{ORIGINAL}}Answer as {{char}}.",
        "alternate_greetings": ["Sit down, {{user}}.", "We are closed."],
        "group_only_greetings": ["NEVER group"],
        "creator_notes": "NEVER notes",
        "creator_notes_multilingual": {"de": "NEVER Notizen"},
        "tags": ["NEVER tag"],
        "creator": "NEVER creator",
        "character_version": "NEVER version",
        "source": ["NEVER source"],
        "assets": [{"type": "icon", "uri": "ccdefault:", "name": "NEVER asset", "ext": "png"}],
        "extensions": {"depth_prompt": {"prompt": "NEVER extension", "depth": 4}},
        "character_book": {
            "name": "NEVER book",
            "description": "NEVER book description",
            "scan_depth": 2,
            "extensions": {},
            "entries": [
                {"keys": ["cellar"], "content": "The cellar is haunted.", "enabled": True, "insertion_order": 5,
                 "extensions": {}, "use_regex": False, "name": "NEVER entry", "comment": "NEVER comment"},
                {"keys": [], "content": "The inn is called The Lantern.", "enabled": True, "insertion_order": 1,
                 "extensions": {}, "constant": True, "use_regex": False, "position": "before_char"},
                {"keys": ["rain"], "content": "@@depth 1\n\nIt pours.", "enabled": True, "insertion_order": 3,
                 "extensions": {}, "use_regex": False},
            ],
        },
    },
}  # fmt: skip
