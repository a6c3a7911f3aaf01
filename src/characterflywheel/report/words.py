"""Numbers as people read them: shares, signed lifts, durations, and an estimate with its interval and n."""

from collections.abc import Callable

from ..records import Estimate

Form = Callable[[float], str]


def share(value: float) -> str:
    """0.624 is 62%; below 10% and above 90% one decimal, which is where it matters."""
    percent = 100 * value
    near_edge = 0 < abs(percent) < 9.95 or 90 < percent < 100
    return (f"{percent:.1f}%" if near_edge else f"{percent:.0f}%").replace("-", "−")


def signed_share(value: float) -> str:
    """0.062 is +6.2%; the minus is a real minus sign."""
    text = f"{abs(100 * value):.1f}%"
    if text == "0.0%":
        return text
    return ("+" if value > 0 else "−") + text


def signed_round(value: float) -> str:
    """0.05 is +5%, for axes."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(100 * value):g}%"


def score(value: float) -> str:
    """A standardised score: +0.42."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def times(value: float) -> str:
    """A ratio: 2.4×."""
    return f"{value:.3g}×"


def number(value: float) -> str:
    """Three significant digits, thousands separated, a real minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def count(value: int) -> str:
    """Thousands separated."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8.4 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def name(identifier: str) -> str:
    """`false_refusal` is "False refusal"."""
    text = identifier.replace("_", " ").strip()
    if text in ("sft", "dpo", "rl"):
        return text.upper()
    return text[:1].upper() + text[1:]


def interval(estimate: Estimate, form: Form) -> str:
    """The interval alone, or an empty string where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{form(estimate.low)} to {form(estimate.high)}"


def value(estimate: Estimate, form: Form) -> str:
    """The value alone; a missing one says so."""
    return "not known" if estimate.value is None else form(estimate.value)


def sentence(text: str) -> str:
    """With a capital and one full stop."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")
