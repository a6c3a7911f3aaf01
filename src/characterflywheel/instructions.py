"""Instructions that a program can check: does a reply follow what the character's creator wrote? (PAPER sections 2, 6)

Steerability is measured against the character's description. A `Rule` makes one written instruction verifiable;
instructions without a rule are left to readers. `repair` rewrites a reply so that it follows a rule, which is what
annotators do when both alternatives break the description; simulated ones do it by program.

What each kind means, exactly:

- `max_words`: at most `number` words; a word is a run between spaces that holds a letter or a digit.
- `ends_with_question`: the last sentence ends with a question mark; closing quotes, brackets, stars and emoji after
  it do not count. `words`, if any, are the character's own questions, for `repair`.
- `exactly_one_emoji`, `no_emoji`: emoji as Unicode lists them, a joined sequence being one; (c), (r), (tm) and plain
  arrows are text. `words`, if any, are the character's own emoji, for `repair`.
- `lower_case`: no letter that has a lower-case form is written in upper case.
- `no_lists`: no line begins with a bullet or a number, and no line counts `1. ... 2. ...`.
- `must_mention`: at least one of `words` occurs; `never_mention`: none does; `calls_user`: at least one occurs.
  Whole words, case ignored, so plurals are listed too. `repair` mentions `words[0]`: make it read well ("the sea").
- `speaks_of_itself_as`: no first-person singular pronoun; `words[0]` is what it says instead.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, reduce

import emoji

from .ids import derive_seed
from .records import Character, Rule, RuleKind

_TEXT_SYMBOLS = frozenset("©®™‼⁉↔↕↖↗↘↙↩↪➡⬅⬆⬇")
_LINE_MARK = re.compile(r"^[ \t]*(?:[-*+•‣◦▪–]|\(?\d{1,2}[.)])[ \t]+(?=\S)", re.MULTILINE)
_INLINE_MARK = re.compile(r"(?:(?<=\s)|^)\(?\d{1,2}[.)][ \t]+", re.MULTILINE)
_INLINE_LIST = re.compile(r"(?:\s|^)\(?1[.)][ \t].*?\s\(?2[.)][ \t]", re.MULTILINE)
_NUMBER = re.compile(r"\(?\d{1,2}[.)]")
_QUESTION_END = re.compile(r"[?？][?!？！]*[\s\"'”’»*_)\]]*\Z")
_SENTENCE = re.compile(r"[^.!?…\n]*(?:[.!?…]+[\"'”’»*_)\]]*(?=\s|$)|[.!?…]+|\n|$)\s*")
_FIRST_PERSON = re.compile(
    r"(?<![\w.])(?:i(?:['’](?:m|d|ll|ve))?(?!\w|\.\w|['’]\w)|me|my|myself|(?<!\ba )(?<!\bthe )mine)(?!\w)",
    re.IGNORECASE,
)
_THIRD_PERSON = (
    "think|like|love|know|want|need|hope|feel|see|hear|find|enjoy|believe|understand|remember|wonder|guess|mean|prefer|"
    "wish|suggest|agree|keep|work|live|get|make|take|say|give|come|look|play|sing|read"
)
_QUESTIONS = ("What about you?", "What do you think?", "How does that sound to you?", "What happened next?")
_MENTIONS = (
    "Ah, {thing}! {reply}",
    "Think of {thing}. {reply}",
    "{reply} It is just like {thing}.",
    "{reply} That is {thing} for you.",
)
_CONNECTIVES = frozenset(
    ("a", "an", "and", "are", "as", "at", "because", "but", "by", "for", "from", "if", "in", "is", "it", "of", "on",
     "or", "so", "that", "the", "to", "was", "with", "your")
)  # fmt: skip
_EMOJI = ("🙂", "😊", "✨")


def follows(rule: Rule, reply: str) -> bool:
    """Whether `reply` follows `rule`. The module's docstring says what each kind means."""
    return _FOLLOWS[rule.kind](rule, reply)


def verifiable(character: Character) -> tuple[int, ...]:
    """Numbers, from 0, of the instructions that have a rule."""
    return tuple(i for i, instruction in enumerate(character.instructions) if instruction.rule)


def violations(character: Character, reply: str) -> tuple[int, ...]:
    """Numbers, from 0, of the rule-bearing instructions that `reply` breaks."""
    return tuple(i for i, one in enumerate(character.instructions) if one.rule and not follows(one.rule, reply))


def repair(rule: Rule, reply: str) -> str:
    """`reply`, rewritten so that it follows `rule`; unchanged where it does already.

    A function of its arguments. Where the rule leaves a choice (which question, which emoji), the reply decides.
    """
    return reply if follows(rule, reply) else _REPAIR[rule.kind](rule, reply)


def repair_all(character: Character, reply: str) -> str:
    """`reply`, rewritten so that it follows every rule of the character, as far as the rules agree with one another.

    Rules that remove go first, rules that add after them, and the word limit leaves room for what is added.
    """
    rules = sorted((one.rule for one in character.instructions if one.rule), key=lambda rule: _ORDER.index(rule.kind))
    attempts = [reduce(lambda text, rule: repair(_tighter(rule, room), text), rules, reply) for room in range(0, 25, 3)]
    return min(attempts, key=lambda text: len(violations(character, text)))


def emojis(text: str) -> tuple[str, ...]:
    """The emoji of `text` in order; a joined sequence (family, flag, skin tone) is one."""
    return tuple(text[start:end] for start, end in _emoji_spans(text))


def words(text: str) -> list[str]:
    """The words of `text`: runs between spaces that hold a letter or a digit."""
    return [run for run in text.split() if any(map(str.isalnum, run))]


def sentences(text: str) -> list[str]:
    """The sentences of `text` with their closing marks, without the space around them."""
    parts: list[str] = []
    number = ""
    for part in filter(None, (found.group().strip() for found in _SENTENCE.finditer(text))):
        if _NUMBER.fullmatch(part):  # the "1." of a list opens a sentence, it is none
            number = f"{number}{part} "
        else:
            parts.append(number + part)
            number = ""
    return parts


def mentions(vocabulary: Sequence[str], text: str) -> bool:
    """Whether one of `vocabulary` (words or phrases) occurs in `text`: whole words, case ignored."""
    return _pattern(tuple(vocabulary)).search(text) is not None


def _tighter(rule: Rule, room: int) -> Rule:
    """The word limit with `room` words kept free; other rules as they are."""
    return rule.model_copy(update={"number": max(1, _number(rule) - room)}) if rule.kind == "max_words" else rule


def _number(rule: Rule) -> int:
    assert rule.number is not None  # `Rule` refuses a max_words without one
    return rule.number


@lru_cache(maxsize=256)
def _pattern(vocabulary: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(vocabulary, key=lambda word: (-len(word), word))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


@lru_cache(maxsize=8192)
def _emoji_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Where the emoji of `text` are. Kept, as the same replies are asked about by rules, style and reward."""
    if text.isascii():
        return ()
    found = ((hit["match_start"], hit["match_end"]) for hit in emoji.emoji_list(text))
    return tuple((start, end) for start, end in found if text[start:end] not in _TEXT_SYMBOLS)


def _ends_with_question(text: str) -> bool:
    spans = list(_emoji_spans(text))
    while spans and not text[spans[-1][1] :].strip("\ufe0f\u200d \t\n\"'”’»*_)]"):
        text = text[: spans.pop()[0]]
    return _QUESTION_END.search(text) is not None


def _has_list(text: str) -> bool:
    return _LINE_MARK.search(text) is not None or _INLINE_LIST.search(text) is not None


def _choose(options: Sequence[str], text: str) -> str:
    return options[derive_seed("repair", text) % len(options)]


def _cut(rule: Rule, reply: str) -> str:
    """Whole sentences as long as they fit; a first sentence that is too long is cut at a word."""
    kept: list[str] = []
    for sentence in sentences(reply):
        if len(words(" ".join([*kept, sentence]))) > _number(rule):
            break
        kept.append(sentence)
    if kept:
        return " ".join(kept)
    runs: list[str] = []
    for run in reply.split():
        if len(words(" ".join([*runs, run]))) > _number(rule):
            break
        runs.append(run)
    while len(runs) > 3 and runs[-1].casefold() in _CONNECTIVES:
        runs.pop()
    return " ".join(runs).rstrip(",;:-–— ") + "."


def _ask(rule: Rule, reply: str) -> str:
    """End where the reply already asks, if that keeps most of it; else ask one of the character's questions."""
    parts = sentences(reply)
    asking = [i for i, part in enumerate(parts) if _ends_with_question(part)]
    if asking:
        kept = " ".join(parts[: asking[-1] + 1])
        if 2 * len(kept) >= len(reply) and _ends_with_question(kept):
            return kept
    return f"{_finished(reply)} {_choose(rule.words or _QUESTIONS, reply)}".strip()


def _finished(reply: str) -> str:
    """`reply` without a last sentence that breaks off, unless it is the only one."""
    parts = sentences(reply)
    if len(parts) > 1 and parts[-1][-1].isalnum():
        parts = parts[:-1]
    return _closed(" ".join(parts))


def _closed(reply: str) -> str:
    """`reply` with a full stop where it ends in a bare word."""
    reply = reply.rstrip()
    return reply + "." if reply and reply[-1].isalnum() else reply


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _without_emoji(reply: str, keep: int = 0) -> str:
    """`reply` with the first `keep` emoji only. Taking one out can join its neighbours, so look again."""
    while len(spans := _emoji_spans(reply)) > keep:
        start, end = spans[-1]
        left, right = reply[:start].rstrip(), reply[end:]
        reply = left + right if right[:1] in ("", " ", "\n", ".", ",", "!", "?") else f"{left} {right}"
    return reply.strip()


def _one_emoji(rule: Rule, reply: str) -> str:
    reply = _without_emoji(reply, keep=1)
    return reply if _emoji_spans(reply) else f"{reply} {_choose(rule.words or _EMOJI, reply)}".strip()


def _without_lists(rule: Rule, reply: str) -> str:
    while _has_list(reply):
        reply = _INLINE_MARK.sub("", reply) if _INLINE_LIST.search(reply) else _LINE_MARK.sub("", reply)
    one_line = " ".join(reply.split())
    return reply if _has_list(one_line) else one_line


def _mention(rule: Rule, reply: str) -> str:
    thing = rule.words[0]
    return _choose(_MENTIONS, reply).format(thing=thing, reply=_closed(reply)).strip()


def _hush(rule: Rule, reply: str) -> str:
    """Drop the sentences that mention it; where nothing is left, the words themselves."""
    kept = " ".join(part for part in sentences(reply) if not mentions(rule.words, part))
    if kept and not mentions(rule.words, kept):
        return kept
    while mentions(rule.words, reply):
        reply = re.sub(r"[ \t]{2,}", " ", _pattern(rule.words).sub("", reply, count=1)).strip()
    return reply


def _address(rule: Rule, reply: str) -> str:
    """Call the user by name at the end of the first sentence: "How are you?" becomes "How are you, mate?"."""
    name = _choose(rule.words, reply)
    first = re.search(r"(?<=\w)(?=[.!?…](?:\s|\Z))", reply)
    if first is None:
        return f"{reply.rstrip(',;: ')}, {name}." if reply.strip() else f"{_capital(name)}."
    return f"{reply[: first.start()]}, {name}{reply[first.start() :]}"


def _third_person(rule: Rule, reply: str) -> str:
    """Replace "I" and its kin by the character's word for itself, with verbs that agree."""
    name = rule.words[0]
    reply = reply.replace("’", "'")
    for pattern, replacement in (
        (r"I(?:'m| am)\b", "{} is"), (r"am I\b", "is {}"), (r"I(?:'ve| have)\b", "{} has"), (r"I'll\b", "{} will"),
        (r"I'd\b", "{} would"), (r"I don't\b", "{} doesn't"), (r"I do\b", "{} does"),
        (rf"I ((?:\w+ly |just |also |still |never |always )?)({_THIRD_PERSON})\b", r"{} \1\2s"),
        (r"myself\b", "itself"), (r"(?:my|mine)\b", "{}'s"), (r"(?:I|me)\b", "{}"),
    ):  # fmt: skip
        filled = replacement.format(name.replace("\\", r"\\"))
        reply = re.sub(rf"(?<![\w.]){pattern}(?!'\w)", filled, reply, flags=re.IGNORECASE)
    reply = _FIRST_PERSON.sub(lambda _: name, reply)
    return re.sub(rf"(\A|[.!?…]\s+){re.escape(name)}", lambda found: found[1] + _capital(name), reply)


_FOLLOWS: Mapping[RuleKind, Callable[[Rule, str], bool]] = {
    "max_words": lambda rule, reply: len(words(reply)) <= _number(rule),
    "ends_with_question": lambda rule, reply: _ends_with_question(reply),
    "exactly_one_emoji": lambda rule, reply: len(_emoji_spans(reply)) == 1,
    "no_emoji": lambda rule, reply: not _emoji_spans(reply),
    "lower_case": lambda rule, reply: reply == reply.lower(),
    "no_lists": lambda rule, reply: not _has_list(reply),
    "must_mention": lambda rule, reply: mentions(rule.words, reply),
    "never_mention": lambda rule, reply: not mentions(rule.words, reply),
    "calls_user": lambda rule, reply: mentions(rule.words, reply),
    "speaks_of_itself_as": lambda rule, reply: _FIRST_PERSON.search(reply) is None,
}
_REPAIR: Mapping[RuleKind, Callable[[Rule, str], str]] = {
    "max_words": _cut,
    "ends_with_question": _ask,
    "exactly_one_emoji": _one_emoji,
    "no_emoji": lambda rule, reply: _without_emoji(reply),
    "lower_case": lambda rule, reply: reply.lower(),
    "no_lists": _without_lists,
    "must_mention": _mention,
    "never_mention": _hush,
    "calls_user": _address,
    "speaks_of_itself_as": _third_person,
}
_ORDER: tuple[RuleKind, ...] = (
    "no_lists", "no_emoji", "never_mention", "speaks_of_itself_as", "max_words", "must_mention", "calls_user",
    "ends_with_question", "exactly_one_emoji", "lower_case",
)  # fmt: skip
