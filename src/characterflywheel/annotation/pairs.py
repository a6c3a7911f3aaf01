"""Preference pairs from rankings and rewrites, and the filters on them (PAPER section 2).

Filters on length and emoji keep the preference model from leaning on surface features.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from .. import ids
from ..config import AnnotateConfig
from ..instructions import emojis, words
from ..records import Candidate, ChatMessage, Dropped, Example, Judgement, Preference, Prompt
from .candidates import STAGE

REWRITE = "rewrite"


class Pairs(NamedTuple):
    """Pairs that passed the filters, those that did not with reasons, and the rewrites as examples to learn."""

    kept: tuple[Preference, ...]
    dropped: tuple[Dropped, ...]
    rewrites: tuple[Example, ...]


class Reviewed(NamedTuple):
    """A prompt with its candidates by id and all judgements of them."""

    prompt: Prompt
    candidates: Mapping[str, Candidate]
    judgements: Sequence[Judgement]


class Side(NamedTuple):
    """One side of a pair. `violates` are the instructions that most reviewers say it breaks."""

    policy: str
    text: str
    violates: frozenset[int] = frozenset()


class Choice(NamedTuple):
    """A pair before the filters: `label` is the share of `reviewers` who prefer `chosen`; `id` names where from.

    `strength`: by how many places `chosen` is ranked better, over the most that can be, as the reviewers' mean; from 0
    (they cancel out) to 1 (first against last for all of them, or rewritten).
    """

    id: str
    chosen: Side
    rejected: Side
    reviewers: int
    label: float
    strength: float


def make_pairs(reviewed: Sequence[Reviewed], config: AnnotateConfig, seed: int) -> Pairs:
    """All pairs of each prompt's candidates, labelled by the share of its reviewers, and every rewrite over the reply
    that its writer ranked best. Prompts that are held out are whole users' (`config.held_out_share` of the prompts).

    Ties are dropped, or kept for training with `config.keep_ties`; never held out, where they have no right answer.
    """
    held_out = held_out_users([one.prompt for one in reviewed], config.held_out_share, seed)
    kept: list[Preference] = []
    dropped: list[Dropped] = []
    rewrites: list[Example] = []
    for one in reviewed:
        out = one.prompt.user_id in held_out
        for choice in (*_ranked(one), *_rewritten(one)):
            reason = _reason(choice, one.prompt, config, keep_ties=config.keep_ties and not out)
            if reason:
                detail = f"{choice.chosen.policy} over {choice.rejected.policy}"
                dropped.append(
                    Dropped(id=choice.id, stage=STAGE, reason=reason, detail=detail, prompt_id=one.prompt.id)
                )
            else:
                kept.append(_preference(choice, one.prompt, out))
        if not out:
            rewrites += _examples(one)
    return Pairs(tuple(kept), tuple(dropped), tuple(rewrites))


def _ranked(one: Reviewed) -> list[Choice]:
    places = [{name: rank for rank, name in enumerate(j.ranking)} for j in one.judgements]
    choices = []
    for a, b in combinations(sorted(one.candidates), 2):
        steps = [(place[b] - place[a]) / (len(place) - 1) for place in places if a in place and b in place]
        if steps:
            share = sum(step > 0 for step in steps) / len(steps)
            first, second = (a, b) if share >= 0.5 else (b, a)
            towards = sum(steps) / len(steps) * ((share > 0.5) - (share < 0.5))
            name = ids.derive_id("pair", a, b, at=one.prompt.created_at)
            sides = _side(one, first), _side(one, second)
            choices.append(Choice(name, *sides, len(steps), max(share, 1 - share), max(0.0, towards)))
    return choices


def _rewritten(one: Reviewed) -> list[Choice]:
    return [
        Choice(
            ids.derive_id("rewrite", judgement.id, at=one.prompt.created_at),
            Side(REWRITE, judgement.rewrite.strip()),
            _side(one, judgement.ranking[0]),
            reviewers=1,
            label=1.0,
            strength=1.0,
        )
        for judgement in one.judgements
        if judgement.rewrite and judgement.rewrite.strip()
    ]


def _side(one: Reviewed, candidate_id: str) -> Side:
    marks = [set(a.violates) for j in one.judgements for a in j.answers if a.candidate_id == candidate_id]
    most = frozenset(n for n in sorted(set().union(*marks)) if 2 * sum(n in m for m in marks) > len(marks))
    candidate = one.candidates[candidate_id]
    return Side(candidate.policy, candidate.text, most)


def _reason(choice: Choice, prompt: Prompt, config: AnnotateConfig, *, keep_ties: bool) -> str:
    """Why a pair is not used; empty if it is.

    Where both sides break the description, a steerability pair (internal prompts) says something only if the chosen
    side breaks less: the annotator's rewrite takes its place. On user prompts the ranking is by engagement and stays;
    a small base model breaks an instruction nearly always, and little would be left otherwise.
    """
    chosen, rejected = choice.chosen, choice.rejected
    if _plain(chosen.text) == _plain(rejected.text):
        return "identical"
    if choice.label == 0.5 and not keep_ties:
        return "tie"
    lengths = sorted(max(1, len(words(side.text))) for side in (chosen, rejected))
    if lengths[1] > config.max_length_ratio * lengths[0]:
        return "length_ratio"
    if abs(len(emojis(chosen.text)) - len(emojis(rejected.text))) > config.max_emoji_difference:
        return "emoji_difference"
    both = bool(chosen.violates and rejected.violates)
    if prompt.source == "internal" and both and len(chosen.violates) >= len(rejected.violates):
        return "both_break_description"
    return ""


def _preference(choice: Choice, prompt: Prompt, held_out: bool) -> Preference:
    return Preference(
        id=choice.id,
        prompt_id=prompt.id,
        user_id=prompt.user_id,
        character_id=prompt.character_id,
        source=prompt.source,
        prompt=prompt.messages,
        chosen=(ChatMessage(role="assistant", content=choice.chosen.text),),
        rejected=(ChatMessage(role="assistant", content=choice.rejected.text),),
        chosen_policy=choice.chosen.policy,
        rejected_policy=choice.rejected.policy,
        reviewers=choice.reviewers,
        label=choice.label,
        strength=choice.strength,
        held_out=held_out,
    )


def _examples(one: Reviewed) -> list[Example]:
    """The rewrites of a prompt as supervised examples, each text once."""
    texts = {j.rewrite.strip(): j.id for j in reversed(one.judgements) if j.rewrite and j.rewrite.strip()}
    return [
        Example(
            id=ids.derive_id("example", judgement, at=one.prompt.created_at),
            prompt_id=one.prompt.id,
            user_id=one.prompt.user_id,
            character_id=one.prompt.character_id,
            source=REWRITE,
            messages=(*one.prompt.messages, ChatMessage(role="assistant", content=text)),
        )
        for text, judgement in sorted(texts.items(), key=lambda item: item[1])
    ]


def held_out_users(prompts: Sequence[Prompt], share: float, seed: int) -> set[str]:
    """Users whose pairs only evaluate: in each source by seeded order until `share` of its prompts is reached.

    At least one user of a source, where it has two; never all of them.
    """
    sizes: dict[str, dict[str, int]] = {}
    home: dict[str, str] = {}
    for prompt in prompts:
        source = home.setdefault(prompt.user_id, prompt.source)
        users = sizes.setdefault(source, {})
        users[prompt.user_id] = users.get(prompt.user_id, 0) + 1
    chosen: set[str] = set()
    for _, users in sorted(sizes.items()):
        order = sorted(users, key=lambda user: (ids.derive_seed(seed, "held_out", user), user))
        before, total = 0, sum(users.values())
        for user in order[:-1]:
            if before and before + users[user] / 2 > share * total:
                break
            chosen.add(user)
            before += users[user]
    return chosen


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
