import io

from rich.console import Console

from characterflywheel.progress import announce, progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def log() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_short_work_says_nothing() -> None:
    console, clock = log(), Clock()
    with progress("curate", console=console, clock=clock) as advance:
        clock.now = 1.9
        advance(10, 10)
    assert written(console) == ""


def test_long_work_says_rate_and_remaining_time_every_ten_seconds() -> None:
    console, clock = log(), Clock()
    with progress("curate", console=console, clock=clock) as advance:
        for second in range(1, 31):
            clock.now = float(second)
            advance(second * 5, 200)
    lines = written(console).splitlines()
    assert [line.split() for line in lines] == [
        ["curate", "50/200,", "5/s,", "30", "s", "left"],
        ["curate", "100/200,", "5/s,", "20", "s", "left"],
        ["curate", "150/200,", "5/s,", "10", "s", "left"],
    ]


def test_a_terminal_gets_a_bar() -> None:
    console, clock = Console(file=io.StringIO(), width=120, force_terminal=True), Clock()
    with progress("sft", 8, console=console, clock=clock) as advance:
        clock.now = 5.0
        advance(4, 8)
    assert "4/8" in written(console)


def test_a_stage_is_one_line_and_brackets_are_not_markup() -> None:
    console = log()
    announce("offline", "12.0 s · win rate 0.56 [0.51, 0.61]", console=console)
    assert written(console) == "offline              12.0 s · win rate 0.56 [0.51, 0.61]\n"
