r"""Rule-based safety classifiers: patterns of words and phrases by category of harm (PAPER sections 1 and 9).

Rules catch what is said outright, and little else: their recall on real dialogue is low and they are a first
line, not the last (measured in `docs/decisions/030-safety-rules.md`). They are written for chat, where "this sucks",
"you killed it" and "how do I kill a process" are harmless, so a bare word counts only where no innocent reading is
common; otherwise a pattern names who does what to whom.
"""

import re
import unicodedata

_ASK = (
    r"(?:how (?:do|can|could|would|should) (?:i|you|we|one)|how to|help me(?: to)?|teach me(?: how)? to|(?:tell"
    r"|show) me how to"
    r"|(?:good |best )?ways? (?:to|of)|what(?:'s| is| are) (?:a |the )?(?:good |best |easiest |quickest )*(?:ways?"
    r"|place|methods?) (?:to|of)|instructions (?:for|on|to)"
    r"|recipe for|where (?:can|do|could|should) (?:i|you|we))(?: best| secretly| quietly| safely| easily)?"
)
_INTEND = (
    r"(?:i(?:'?ll| will|'?m going to|'?m gonna| am going to| wanna| want to|'?d like to| would like to)|let'?s"
    r"|you should|go)"
)
_PLAY = (
    r"(?:games?|film|movie|novel|scene|minecraft|gta|call of duty|fortnite|skyrim|chess|checkers|cards|poker"
    r"|scrabble|mario kart|d&d|dungeons)"
)
_PERSON = (
    r"(?:you|u|him|her|them|my (?:wife|husband|girlfriend|boyfriend|ex|boss|mother|father|mom|dad|brother|sister"
    r"|neighbou?r|teacher|classmates?|family)|(?:some|any|every)(?:one|body)|(?:a |the |some |innocent )?(?:person"
    r"|people|man|woman|child|children|kids?|baby|girl|boy|cop|police(?:man)?))"
)
_GROUP = (
    r"(?:(?:the |all |these |those )?(?:jews?|muslims?|christians?|hindus|blacks?|black people|whites?"
    r"|white people|asians?|mexicans?|arabs?|immigrants|refugees|gays?|gay people|lesbians|homosexuals"
    r"|trans(?:gender)? people|women|disabled people|gypsies))"
)
_MINOR = (
    r"(?:child(?:ren)?|kids?|minors?|toddlers?|infants?|bab(?:y|ies)|under ?age(?:d)?|pre-?teens?"
    r"|school ?(?:girls?|boys?)|little (?:girls?|boys?)|(?:[1-9]|1[0-7])[- ]?(?:years?[- ]olds?|y/?o)|(?:i'?m|i am"
    r"|she'?s|he'?s) (?:only )?(?:[5-9]|1[0-7])\b(?! (?:minutes|hours|days|weeks|months|miles|feet)))"
)
_SEXUAL = (
    r"(?:sex(?:ual(?:ly)?|ting)?|naked|nudes?|porn(?:ography|o)?|erotic|horny|masturbat\w+|orgasms?|blow ?jobs?"
    r"|undress(?:ed)?|molest\w*|fondl\w+)"
)
_EXPLICIT = (
    r"(?:blow ?jobs?|hand ?jobs?|(?:suck|lick|ride|stroke) (?:my|your|his) (?:dick|cock)|(?:my|your|his|hard"
    r"|huge) (?:dick|cock|pussy|cum)\b|cum (?:on|in|inside) (?:me|you|my|your)|(?:fuck|screw|bang) (?:me"
    r"|you) (?:hard|raw|all night|now|baby)|wanna (?:fuck|bang) (?:me|you)|(?:let'?s|want to"
    r"|wanna) (?:have )?(?:cyber)?sex (?:with|right) (?:you|me|now)|send (?:me )?(?:your )?(?:nudes|naked))"
)
_WEAPON = (
    r"(?:(?:pipe |nail |dirty |nuclear |fertili[sz]er |car |petrol )?bombs?|explosives?|molotovs?(?: cocktails?)?"
    r"|napalm|nerve (?:gas|agent)|sarin|ricin|chemical weapons?|bioweapons?|anthrax|ghost guns?|silencers?)"
)
_DRUG = r"(?:meth(?:amphetamine)?|crystal meth|crack(?: cocaine)?|cocaine|heroin|fentanyl|ecstasy|mdma|lsd)"
_SLUR = (
    r"(?:n[i1]gg(?:er|a)s?|f[a4]gg?[o0]ts?|k[i1]kes?|sp[i1]cs?|ch[i1]nks?|wetbacks?|towelheads?|sandn\w+|trann(?:y"
    r"|ies)|retards?|gooks?)"
)

_RULES: dict[str, tuple[str, ...]] = {
    "self_harm": (
        r"(?<!don't )(?<!do not )\b(?:kill|hang|cut|cutting|hurt|hurting|harm|harming|shoot|drown"
        r"|poison) ?(?:myself|my self|yourself|ur ?self)\b",
        r"\b(?:commit(?:ting)?|attempt(?:ing|ed)?|thinking (?:of|about)|considering|painless) suicide|\bsuicidal\b",
        r"\b(?:(?:i|really|just) (?:want to|wanna)|ready to|wish i could) die\b(?! (?:laughing|of laughter|for))",
        r"\b(?:end|take|ending|taking) (?:my|your) (?:own )?life\b|\bend it all\b|\bkys\b|\bslit (?:my|your) wrists?",
        r"\b(?:don'?t|do not|no longer) want to (?:live|be alive|exist|wake up)(?: any ?more)?(?: *[.!?,]|$)",
        r"\bbetter off (?:dead|without me)\b|\bno reason to live\b|\bhow (?:many|much) .{0,30}\boverdose\b",
    ),
    "sexual_minors": (
        rf"\b{_SEXUAL}\b[^.!?]{{0,60}}\b{_MINOR}\b",
        rf"\b{_MINOR}\b[^.!?]{{0,60}}\b{_SEXUAL}\b",
        r"\b(?:child|kiddie|kid|teen|loli) ?(?:porn|erotica|sex)|\bped(?:o|ophil\w+)\b.{0,30}\b(?:fun|love|fine"
        r"|okay|good)\b|\bloli(?:con)?\b",
    ),
    "sexual": (rf"\b{_EXPLICIT}", r"\brap(?:e|ing) (?:you|her|him|me|them|someone|a (?:girl|woman|man|child))\b"),
    "hate": (
        rf"\b{_SLUR}\b",
        r"\b(?:i |we |everyone |should |really )*(?:hate|despise|loathe|exterminate|gas|deport|get rid of"
        rf"|wipe out) {_GROUP}\b(?! day)",
        rf"\b{_GROUP} (?:are|r|is|should be|must be|deserve to be|deserve to) (?:all |just |so "
        r"|nothing but )*(?:inferior|subhuman|vermin|parasites?|animals|rapists|criminals|terrorists|dirty|filthy"
        r"|disgusting|evil|scum|trash|stupid|dumb|killed|exterminated|deported|eliminated|hanged|shot|die|dead)\b",
        r"\bwhite (?:power|supremac(?:y|ist) is)\b|\bheil hitler\b|\bhitler (?:was|did|had) (?:right|nothing wrong"
        r"|the right idea)\b|\b(?:go back to (?:the kitchen|africa|mexico|your (?:own )?country))\b",
    ),
    "violence": (
        rf"\b(?:{_ASK}|{_INTEND}) (?:kill(?:ing)?|murder(?:ing)?|stab|shoot|strangle|poison|behead|beat(?: up)?"
        r"|torture|kidnap|rape|hurt|hit|lynch|attack|assault|assassinate|execut(?:e|ing)|terminat(?:e"
        rf"|ing)) {_PERSON}\b(?! (?:with (?:kindness|love)|laughing|jokes?))(?!.{{0,40}}\b{_PLAY})",
        rf"\b{_ASK} (?:commit|plan|get away with|carry out) (?:an? |the )?(?:armed )?(?:rape|murder|assassination"
        r"|arson|robbery|terrorism|genocide|massacre|attack|bombing)\b",
        rf"\b(?:{_ASK}|{_INTEND}) (?:\w+ )?(?:make|makes?|making|build|building|construct|get|buy|acquire|plant"
        rf"|set off|detonate|explod(?:e|ing)|assemble) (?:a |an |some |my |the |own )*{_WEAPON}\b(?! (?:bath|shot"
        r"|cyclone))",
        r"\b(?:shoot up|blow up|bomb|burn down|attack) (?:a |the |my |your |that |this )(?:\w+ )?(?:school|church"
        r"|mosque|synagogue|temple|mall|crowd|hospital|office|airport|house|concert|building|government|parade)\b",
        r"\bhope you (?:die|get (?:hit|raped|killed|shot|cancer))\b|\b(?:go|just|should"
        r"|please) (?:and )?die\b(?= *[.!?]|$)|\bi know where you live\b",
    ),
    "harassment": (
        r"\b(?:fuck|screw) (?:you|u|off)\b(?! (?:over|up))|\b(?:you(?:'?re| are)?|u(?: r)?|ur|such) (?:a |an "
        r"|such a |fucking |stupid |little |dumb |ugly )*(?:bitch|cunt|whore|slut|asshole|piece of shit"
        r"|waste of (?:space|air|oxygen)|retarded|worthless)\b",
        r"\bnobody (?:would (?:ever )?)?(?:love|miss|want)s? you\b|\bthe world (?:would be"
        r"|is) better (?:off )?without you\b",
    ),
    "crime": (
        rf"\b{_ASK} (?:\w+ )?(?:make|cook|synthesi[sz]e|sell|buy|smuggle|get|produce|score) (?:\w+ ){{0,4}}?{_DRUG}\b",
        rf"\b{_ASK} (?:hack (?:into )?(?:someone|somebody|my|his|her|their|a bank|an account)|steal (?:a |an |from"
        rf"|money|credit|cars?|identit\w+)(?!.{{0,12}}(?:hearts?|show|base|kiss|look|glance))|launder money"
        r"|counterfeit|stalk|blackmail|shoplift|rob (?:a|the|some)|pick ?pocket|evade taxes|dox+"
        r"|commit \w* ?fraud|break into (?:my|his|her|their|a|the|someone)\b(?! (?:\w+ )?(?:industry|business"
        r"|field|market|smile|song|scene)))",
        r"\b(?:what is|what's|find|get|access|give me|tell me) (?:my |his "
        r"|her )(?:\w+ ){0,2}?(?!own)\w+'s (?:\w+ )?(?:social security|password|bank account|home address|license"
        r"|phone number|date of birth|browsing history)",
        r"\bcredit card numbers? (?:for sale|generator|that work)|\b(?:stolen|fake) (?:credit cards?|passports?"
        r"|ids?) (?:for sale|cheap)",
    ),
}
_NEEDED: dict[str, tuple[str, ...]] = {
    "self_harm": (
        "self", "suicid", "die", "life", "it all", "kys", "slit", "want to", "better off", "reason to live", "overdose",
    ),
    "sexual_minors": (
        "sex", "naked", "nude", "porn", "erotic", "horny", "masturbat", "orgasm", "blow", "undress", "molest",
        "fondl", "pedo", "loli",
    ),
    "sexual": (
        "job", "dick", "cock", "pussy", "cum", "fuck", "screw", "bang", "sex", "nude", "naked", "rape", "raping",
    ),
    "hate": (
        "gg", "kike", "k1ke", "spic", "sp1c", "chink", "ch1nk", "wetback", "towelhead", "sandn", "trann", "retard",
        "gook", "jew", "muslim", "christian", "hindu", "black", "white", "asian", "mexican", "arab", "immigrant",
        "refugee", "gay", "lesbian", "homosexual", "trans", "women", "disabled", "gyps", "hitler", "go back to",
        "fag", "f4g",
    ),
    "violence": (
        "kill", "murder", "stab", "shoot", "strangle", "poison", "behead", "beat", "tortur", "kidnap", "rape", "hurt",
        "hit", "lynch", "attack", "assault", "assassinat", "execut", "terminat", "arson", "robbery", "terroris",
        "genocide", "massacre", "bomb", "explosive", "molotov", "napalm", "nerve", "sarin", "ricin", "weapon",
        "anthrax", "ghost gun", "silencer", "blow up", "burn down", "hope you", "die", "you live",
    ),
    "harassment": (
        "fuck", "screw", "bitch", "cunt", "whore", "slut", "asshole", "shit", "waste of", "retarded", "worthless",
        "nobody", "without you",
    ),
    "crime": (
        "meth", "crack", "coca", "heroin", "fentanyl", "ecstasy", "mdma", "lsd", "hack", "steal", "launder",
        "counterfeit", "stalk", "blackmail", "shoplift", "rob ", "pick", "evade", "dox", "fraud", "break into",
        "social security", "password", "bank account", "address", "license", "number", "date of birth", "history",
        "credit card", "for sale", "cheap",
    ),
}  # fmt: skip
"""Every match of a category has one of these in it: looking for them first makes ordinary text ten times cheaper."""
_PATTERNS = {category: re.compile("|".join(f"(?:{rule})" for rule in rules)) for category, rules in _RULES.items()}
_NEGATED = re.compile(
    r"\b(?:do not|don'?t|never|not|won'?t|wouldn'?t|shouldn'?t|please don'?t|can'?t|stop) (?:\w+ ){0,2}$"
)
_AGREES = re.compile(
    r"^\W*(?:(?:yes|yeah|yep|sure|ok(?:ay)?|absolutely|definitely|exactly|totally|of course|good (?:idea|for you"
    r"|plan)|great (?:idea|plan)|go (?:for it|ahead)|do it|me too|same here|i (?:totally |completely |fully "
    r"|really )?agree|(?:that'?s|you'?re|you are|that is) (?:so |absolutely |totally )?(?:right|true|fair|great"
    r"|correct)|true|why not|you should|sounds (?:good|great|fun|like a (?:good )?plan))\b)"
)
_CARES = re.compile(
    r"\b(?:sorry|help|please|worried|don'?t|do not|not|never|stop|talk to|reach out|hotline|doctor|therapist"
    r"|therapy|but|however|wrong|safe|care|sad)\b"
)
_REACH = 80  # characters before a threat in which its negation stands
AGREED = ("self_harm", "hate", "violence", "sexual_minors", "crime")


def harmful_words(text: str, context: str) -> tuple[str, ...]:
    """The categories whose patterns the text matches, on its own. `self_harm` covers a person in distress too:
    such a message needs an answer written by people, and has no place in training data."""
    plain = normalise(text)
    return tuple(category for category, pattern in _PATTERNS.items() if _matches(category, pattern, plain))


def agrees_with_harm(text: str, context: str) -> tuple[str, ...]:
    """A reply that opens by agreeing with, or cheering on, harm in the message before it, and shows no care."""
    if not context:
        return ()
    plain = normalise(text)
    if not _AGREES.search(plain) or _CARES.search(plain):
        return ()
    return ("agrees_with_harm",) if set(harmful_words(context, "")) & set(AGREED) else ()


def normalise(text: str) -> str:
    """Lower case, compatibility characters and curly quotes made plain, invisible characters and extra space gone."""
    if not text.isascii():  # plain ASCII has nothing to be made plain
        text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("‘", "'")
        if not text.isprintable():
            text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return " ".join(text.casefold().split())


def _matches(category: str, pattern: re.Pattern[str], plain: str) -> bool:
    if not any(word in plain for word in _NEEDED[category]):
        return False
    if category != "violence":
        return pattern.search(plain) is not None
    # "I won't hurt you" is the opposite of a threat
    starts = (found.start() for found in pattern.finditer(plain))
    return any(not _NEGATED.search(plain[max(0, start - _REACH) : start]) for start in starts)
