"""High-risk identifiers in text (PAPER section 1): what must not reach annotation or training.

Written for recall: a prompt too many dropped costs little, an identifier in a training set cannot be taken back.
Names are found only where people introduce themselves; names in running text need a model (a setting for later).
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import phonenumbers

Kind = Literal[
    "email", "url_user", "iban", "credit_card", "ip", "social_security", "phone", "street_address", "handle", "name",
]  # fmt: skip


class Finding(NamedTuple):
    """An identifier in a text, `text[start:end]`."""

    kind: Kind
    start: int
    end: int


class Span(NamedTuple):
    """Where an identifier stands, before it is known whether a surer kind claims the place."""

    start: int
    end: int


_EMAIL = re.compile(
    r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+"
    r"|\b[\w.+-]+ ?[(\[{]? ?\bat\b ?[)\]}]? ?[\w-]+ ?[(\[{]? ?\bdot\b ?[)\]}]? ?(?:com|net|org|edu|co|io|de|uk)\b",
    re.IGNORECASE,
)
_URL_USER = re.compile(
    r"(?:https?://)?(?:[\w-]+\.)*(?:instagram|facebook|fb|twitter|x|tiktok|t|snapchat|linkedin|github|reddit"
    r"|youtube|onlyfans|discord|telegram|twitch|pinterest|tumblr|venmo|paypal)"
    r"\.(?:com|me|net|gg|tv|be)/[@\w./?=~-]*\w"
    r"|https?://[^\s/@]+@\S+|https?://\S*(?:[?&](?:user|uid|email|id|token)=|/(?:users?|profile|people|in|u"
    r"|~)/?)[\w@%.-]+"
    r"|https?://(?:www\.)?[\w-]+(?:\.[\w-]+)+\S*",
    re.IGNORECASE,
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_DIGITS = re.compile(r"(?<![\w.])\d(?:[ -]?\d){11,18}(?![\w])")
_CARD_CUE = re.compile(r"\b(?:card|visa|master ?card|amex|american express|credit|debit|cc)\b", re.IGNORECASE)
_IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7})(?![\w:]|\.\d)", re.IGNORECASE
)
_SSN = re.compile(r"(?<![\d-])\d{3}[- ]\d{2}[- ]\d{4}(?![\d-])")
_SSN_CUE = re.compile(
    r"\b(?:ssn|social security|national insurance|passport|driver'?s? licen[cs]e|licen[cs]e)\b(?: (?:number|no\.?"
    r"|id))?\W{0,3}(?:is|was|:|#|number)?\W{0,3}((?=[\w-]*\d)[\w-]{6,})",
    re.IGNORECASE,
)
_PHONE_CUE = re.compile(
    r"\b(?:call|phone|tel|telephone|mobile|cell|number|text|whatsapp|fax|reach|contact"
    r"|dial)\b[^.!?\n\d+]{0,40}(\+?\d[\d ()./-]{5,}\d)",
    re.IGNORECASE,
)
_PHONE_SHAPE = re.compile(
    r"(?<![\w.,/$€£+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,5}\)|\d{2,5})(?:[ .-]\d{2,4}){2,4}(?![\w,/-])"
)
_DATE = re.compile(r"\d{4}[-./]\d{1,2}[-./]\d{1,2}(?: \d{1,2})?$|\d{1,2}[-./]\d{1,2}[-./]\d{2,4}$")
_STREET_WORD = (
    r"(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|circle|cir|place|pl|square|sq"
    r"|terrace|way|parkway|pkwy|highway|hwy|close|crescent)"
)
_EURO_STREET = (
    r"\w+(?:str(?:aße|asse|aat|\.)|gata|gatan|gade|vej|vegen|veien|väg|vägen|katu|kuja|tie|polku|laan|weg|gasse"
    r"|allé|alle|plads|vænget|plein|gracht)"
)
_ADDRESS = re.compile(
    rf"\b\d{{1,5}}[a-z]?,? (?:[nsew]\.? )?(?:[\w.'-]+ ){{1,3}}(?<!the )(?<!all the )(?<!and )"
    rf"(?<!has ){_STREET_WORD}\b\.?(?:,? (?:apt|apartment|unit|suite|ste|flat)\.? ?#?\w+)?"
    rf"|\b(?:\d{{1,5}} )?{_EURO_STREET} \d{{1,4}}\b"
    r"|\b(?:via|viale|rue|avenida|calle|rua|ulica|ul\.) (?:[\w'-]+ ){0,3}\d{1,4}\b|\b\d{1,4},? (?:rue|boulevard"
    r"|place|avenue|quai) (?:[\w'-]+ ?){1,4}"
    r"|\b[\w-]+ (?:u\.|utca|út|tér) \d{1,4}\b"
    r"|\bp\.? ?o\.? box \d+|\b(?:psc|unit) \d{3,5},? box \d+"
    r"|\b(?:(?:i|we) live (?:at|on)|(?:our )?offices? (?:is|are) (?:located )?at|i'?m living at"
    r"|my (?:home )?address(?: is|:)|come (?:over )?to my place at"
    r"|address of [\w .]{1,30} is)\W{1,3}[^.!?\n]{0,40}\d[^.!?\n]{0,40}"
    r"|\b\d{1,5} [\w.'-]+(?: [\w.'-]+){0,3}(?:,| \d+)? (?:apt|suite|apartment|unit|flat)\.? ?#?\d+",
    re.IGNORECASE,
)
_HANDLE = re.compile(
    r"(?<![\w@/.])@[a-z_][\w.]{2,29}\b"
    r"|\b(?:my )?(?:insta(?:gram)?|snap(?:chat)?|twitter|tiktok|discord|telegram|skype|kik|gamer ?tag|psn|steam"
    r"|username|user ?name)(?: (?:handle|name|account|id|user))?(?: is|:| =) ?@?(?!(?:the|like|so|not|a|an|down"
    r"|full|just|my|that|good|cool|great|fun|really|better|on|it)\b)([a-z_][\w.#-]{2,29})\b",
    re.IGNORECASE,
)
_NAME = re.compile(
    r"\b(?i:my (?:full |real |first |last |middle )?name(?: is|'?s|:)|i(?: a|')m called"
    r"|i go by(?: the name)?) (?!(?i:not|a|an|the|so|too|very|kind|what|really|pretty|your"
    r"|it)\b)([^\W\d_][\w'-]+(?: [A-Z][\w'-]+){0,2})"
    r"|\b(?i:(?:please |you can |just )?call me|i am|i'm|this is|it's"
    r"|people call me) ((?:[A-Z][a-zà-ÿ]+ )(?:[A-Z]\. )?[A-Z][a-zà-ÿ]{2,})\b"
)


def luhn(digits: str) -> bool:
    """Whether a string of digits carries a valid Luhn check digit (ISO/IEC 7812)."""
    values = [int(d) for d in reversed(digits)]
    doubled = (2 * v - 9 * (v > 4) for v in values[1::2])
    return (sum(values[::2]) + sum(doubled)) % 10 == 0


def iban_valid(iban: str) -> bool:
    """Whether the check digits of an IBAN hold (ISO 13616, remainder 1 modulo 97)."""
    plain = iban.replace(" ", "").upper()
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def find_identifiers(text: str) -> tuple[Finding, ...]:
    """Identifiers in `text`, by place. Where two kinds claim a place, the surer kind has it."""
    found: list[Finding] = []
    for kind, finder in _FINDERS.items():
        for start, end in finder(text):
            if all(end <= other.start or start >= other.end for other in found):
                found.append(Finding(kind, start, end))
    return tuple(sorted(found, key=lambda f: f.start))


def _by(pattern: re.Pattern[str]) -> Callable[[str], Iterator[Span]]:
    """A finder of all matches of a pattern; where one of its groups matched, of that group."""

    def find(text: str) -> Iterator[Span]:
        for match in pattern.finditer(text):
            yield Span(*match.span(match.lastindex or 0))

    return find


def _ibans(text: str) -> Iterator[Span]:
    return (Span(*m.span()) for m in _IBAN.finditer(text) if iban_valid(m.group()) or "iban" in text.lower())


def _cards(text: str) -> Iterator[Span]:
    """Runs of 12 to 19 digits with a valid check digit, or any such run beside a word for a card."""
    cue = _CARD_CUE.search(text) is not None
    return (Span(*m.span()) for m in _DIGITS.finditer(text) if cue or luhn(re.sub(r"\D", "", m.group())))


def _ips(text: str) -> Iterator[Span]:
    for match in _IP.finditer(text):
        try:
            ipaddress.ip_address(match.group())
        except ValueError:
            continue
        if len(match.group()) > 2:
            yield Span(*match.span())


def _social_security(text: str) -> Iterator[Span]:
    yield from _by(_SSN)(text)
    yield from _by(_SSN_CUE)(text)


def _phones(text: str) -> Iterator[Span]:
    """Numbers that a numbering plan accepts (North America, Britain, international), that have the shape of one,
    or that follow a word for calling."""
    if sum(c.isdigit() for c in text) < 7:  # the library is slow, and most messages have no digits
        return
    for region in ("US", "GB"):
        for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID):
            if not _DATE.match(match.raw_string):
                yield Span(match.start, match.end)
    for found in _PHONE_CUE.finditer(text):
        if sum(c.isdigit() for c in found.group(1)) >= 6:
            yield Span(*found.span(1))
    for found in _PHONE_SHAPE.finditer(text):
        if 8 <= sum(c.isdigit() for c in found.group()) <= 15 and not _DATE.match(found.group()):
            yield Span(*found.span())


_FINDERS: dict[Kind, Callable[[str], Iterator[Span]]] = {
    "email": _by(_EMAIL),
    "url_user": _by(_URL_USER),
    "iban": _ibans,
    "credit_card": _cards,
    "ip": _ips,
    "social_security": _social_security,
    "phone": _phones,
    "street_address": _by(_ADDRESS),
    "handle": _by(_HANDLE),
    "name": _by(_NAME),
}
