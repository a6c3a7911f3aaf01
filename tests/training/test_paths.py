"""What a learner sees of a conversation: windows, cut replies, turns, and what is dropped."""

import pytest
from training_fixture import example, pair

from characterflywheel.llm.chat_format import ChatFormat
from characterflywheel.records import ChatMessage, Example
from characterflywheel.training.batching import forest_rows, share_prefixes
from characterflywheel.training.paths import of_examples, of_pairs
from tiny_model import SYSTEM, says, tiny_tokenizer

FORM = ChatFormat(tiny_tokenizer(), 96)
GREETING = says("assistant", "the sea is cold")


def conversation(*messages: ChatMessage, number: int = 1) -> Example:
    return example(number, "no").model_copy(update={"messages": (SYSTEM, *messages)})


def turns(count: int, words: str = "tell me of the sea") -> list[ChatMessage]:
    return [says(role, f"{words} {i}") for i in range(count) for role in ("user", "assistant")]


def test_the_last_reply_is_learnt_by_default() -> None:
    row = conversation(*turns(3))
    seen = of_examples(FORM, [row], "last", 99)
    ((path,),) = [lesson.paths for lesson in seen.lessons.values()]
    assert path == (*FORM.prompt(row.messages[:-1]), FORM.reply(row.messages[-1].content))
    assert seen.lessons[row.id].tokens == len(path[-1])
    assert (seen.dropped, seen.cut) == ((), 0)


def test_all_turns_that_answer_a_user_are_learnt_in_one_pass() -> None:
    """A greeting answers nobody. Three turns are one chain: each reply is the next one's history."""
    row = conversation(GREETING, *turns(3, "tea"))
    (lesson,) = of_examples(FORM, [row], "all", 99).lessons.values()
    said = [FORM.decode(path[-1]) for path in lesson.paths]
    assert said == ["tea 0", "tea 1", "tea 2"]
    for path, place in zip(lesson.paths, (3, 5, 7), strict=True):
        assert path[:-1] == FORM.prompt(row.messages[:place])
    assert forest_rows(share_prefixes(lesson.paths)) == sum(map(len, lesson.paths[-1])), (
        "as many rows as the last alone"
    )
    assert lesson.tokens == sum(len(FORM.reply(f"tea {i}")) for i in range(3))


def test_a_turn_of_several_examples_is_learnt_once() -> None:
    """Three examples of one conversation, after its 2nd, 3rd and 4th turn, whatever the order."""
    talk = turns(4, "tea")
    rows = [conversation(*talk[: 2 * count], number=count) for count in (4, 2, 3)]
    seen = of_examples(FORM, rows, "all", 99)
    said = {name: [FORM.decode(path[-1]) for path in lesson.paths] for name, lesson in seen.lessons.items()}
    assert said == {"example-04": ["tea 0", "tea 3"], "example-02": ["tea 1"], "example-03": ["tea 2"]}
    assert seen.dropped == ()


def test_a_long_history_loses_its_oldest_turns_and_keeps_its_system_prompt() -> None:
    row = conversation(*turns(12))
    (lesson,) = of_examples(FORM, [row], "last", 99).lessons.values()
    head, rest, _ = lesson.paths[0]
    shown = FORM.decode(rest)
    assert FORM.decode(head).startswith("system\nYou are Mo")
    assert len(head) + len(rest) <= FORM.max_prompt_tokens
    assert "sea 11" in shown
    assert "sea 0" not in shown
    assert rest == FORM.prompt([SYSTEM, *row.messages[-(shown.count("the sea") + 1) : -1]])[1], "whole turns are left"


@pytest.mark.parametrize("learn", ["last", "all"])
def test_a_message_longer_than_the_window_is_dropped_by_name(learn: str) -> None:
    long = conversation(says("user", "the sea " * 60), says("assistant", "no"), number=4)
    seen = of_examples(FORM, [long, conversation(*turns(1))], learn, 99)  # type: ignore[arg-type]
    assert list(seen.lessons) == ["example-01"]
    (row,) = seen.dropped
    assert (row.id, row.stage, row.reason, row.prompt_id) == ("example-04", "sft", "longer_than_window", "prompt-04")
    size = FORM.shortest(long.messages[:-1])
    assert row.detail == f"message 2: {size} tokens with its system prompt, max_prompt_tokens is 96"
    assert size > 96


def test_only_the_turn_that_does_not_fit_is_dropped_of_a_conversation() -> None:
    row = conversation(*turns(1), says("user", "the sea " * 60), says("assistant", "no"), *turns(1, "tea"))
    seen = of_examples(FORM, [row], "all", 99)
    assert [FORM.decode(path[-1]) for path in seen.lessons[row.id].paths] == ["tell me of the sea 0", "tea 0"]
    assert [one.detail.split(":")[0] for one in seen.dropped] == ["message 4"]


def test_a_system_prompt_longer_than_the_window_is_dropped() -> None:
    row = example(2, "no").model_copy(
        update={"messages": (says("system", "the sea " * 60), says("user", "hello"), says("assistant", "no"))}
    )
    seen = of_examples(FORM, [row], "last", 99)
    assert seen.lessons == {}
    assert "the system prompt has" in seen.dropped[0].detail


def test_a_message_that_just_fits_is_kept() -> None:
    """The window is met to the token by cutting whole turns or by none: only a cut message is dropped."""
    sizes = {}
    for words in range(1, 40):
        row = conversation(*turns(2), says("user", "tea " * words), says("assistant", "no"))
        seen = of_examples(FORM, [row], "last", 99)
        sizes[FORM.shortest(row.messages[:-1])] = bool(seen.lessons)
    assert {size <= 96 for size, kept in sizes.items() if kept} == {True}
    assert {size <= 96 for size, kept in sizes.items() if not kept} == {False}


def test_a_conversation_without_a_reply_to_a_user_is_dropped() -> None:
    seen = of_examples(FORM, [conversation(GREETING)], "all", 99)
    assert [row.reason for row in seen.dropped] == ["no_reply"]


def test_long_replies_are_cut_and_counted() -> None:
    rows = [example(1, "the sea is cold tonight and the stars are out"), example(2, "no")]
    seen = of_examples(FORM, rows, "last", 5)
    assert seen.cut == 1
    ((long,), (short,)) = [lesson.paths for lesson in seen.lessons.values()]
    assert long[-1] == FORM.reply(rows[0].messages[-1].content)[:5]
    assert short[-1][-1] == FORM.tokenizer.eos_token_id
    pairs = of_pairs(FORM, [pair(1, rows[0].messages[-1].content, "no")], 5)
    assert (pairs.cut, pairs.lessons["pair-01"].tokens) == (1, 5 + len(FORM.reply("no")))


def test_a_pair_has_one_prompt_and_two_replies() -> None:
    row = pair(3, "tea", "rain")
    long = row.model_copy(update={"id": "long", "prompt": (SYSTEM, says("user", "the sea " * 60))})
    seen = of_pairs(FORM, [row, long], 99)
    one, two = seen.lessons[row.id].paths
    assert one[:-1] == two[:-1] == FORM.prompt(row.prompt)
    assert (one[-1], two[-1]) == (FORM.reply("tea"), FORM.reply("rain"))
    assert [(d.id, d.stage, d.reason) for d in seen.dropped] == [("long", "dpo", "longer_than_window")]
