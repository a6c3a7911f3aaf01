"""Errors a user can act on, and the one way a run pauses for people."""


class FlywheelError(Exception):
    """Bad input or a missing piece. The message names the value, the bound and the remedy.

    The CLI prints the message alone, without a traceback, and exits with status 1.
    """


class RewardGone(FlywheelError):  # noqa: N818 - named by what has happened
    """The reward model that a stage asks is gone, and asking again did not help: run again when it is back."""


class SamplerGone(FlywheelError):  # noqa: N818 - named by what has happened
    """The sampler that draws a stage's replies is gone, and asking again did not help: run again when it is back."""


class Waiting(Exception):  # noqa: N818 - not an error
    """A stage cannot go on before people have done something (judged tasks, lived seven days).

    Not a failure: the CLI prints the message and exits with status 3; run again when they have.
    """
