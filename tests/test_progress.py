"""When the progress bar appears: by clocks that the tests turn, so that no machine is too busy for them."""

from typing import Any

import jax
import pytest
import tqdm.auto
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import jaxgen
from jaxgen.convert import progress

SMALL, LARGE = 6_000_000, 14_000_000_000


class Clocks:
    """Seconds that passed, and those of them that this process computed."""

    def __init__(self):
        self.passed = self.computed = 0.0

    def monotonic(self) -> float:
        return self.passed

    def process_time(self) -> float:
        return self.computed


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(progress, "time", clocks)
    return clocks


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that were made."""
    made = []

    class Recorder(tqdm.auto.tqdm):
        def __init__(self, **options: Any):
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Recorder)
    return made


def work(clocks: Clocks, total: int, passed: float, computed: float, steps: int = 20) -> None:
    """Do `total` bytes in equal steps, in so many seconds."""
    with progress.progress_bar(total, "Working") as bar:
        for _ in range(steps):
            clocks.passed += passed / steps
            clocks.computed += computed / steps
            bar.update(total // steps)


@pytest.mark.parametrize(
    ("total", "passed", "computed", "appears"),
    [
        (LARGE, 0.9, 0.9, False),
        (LARGE, 1.5, 1.5, False),  # at the first second, half of one is left
        (LARGE, 60, 5, True),
        (SMALL, 0.3, 0.3, False),
        (SMALL, 600, 0.5, False),  # a machine that is busy with something else
        (SMALL, 600, 580, True),  # a calibration
    ],
)
def test_it_appears_where_work_is_left(
    clocks: Clocks, bars: list[Any], total: int, passed: float, computed: float, appears: bool
):
    work(clocks, total, passed, computed)
    assert len(bars) == appears
    for bar in bars:
        assert (bar.n, bar.total, bar.unit) == (total, total, "B")
        assert bar.initial < total / 2  # not when all was over


def test_what_is_done_at_once_is_no_measure_of_what_is_left(clocks: Clocks, bars: list[Any]):
    """A conversion that goes on has nothing to wait for until it works."""
    with progress.progress_bar(LARGE, "Working") as bar:
        bar.update(LARGE // 2)
        assert not bars
        clocks.passed += 5
        bar.update(LARGE // 100)
        assert len(bars) == 1


def test_of_a_job_only_the_first_process_shows_it(
    clocks: Clocks, bars: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for process, shows in {1: False, 0: True}.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        work(clocks, LARGE, 60, 60)
        assert ("Working" in capsys.readouterr().err) == shows


def test_it_can_be_switched_off(clocks: Clocks, bars: list[Any], capsys: pytest.CaptureFixture[str]):
    disable_progress_bars()
    try:
        work(clocks, LARGE, 60, 60)
    finally:
        enable_progress_bars()
    assert all(bar.disable for bar in bars)
    assert capsys.readouterr().err == ""


def test_loading_counts_every_byte(monkeypatch: pytest.MonkeyPatch):
    made = []

    class Recorder(progress.ProgressBar):
        def __init__(self, total: int, text: str):
            super().__init__(total, text)
            made.append(self)

    monkeypatch.setattr(progress, "ProgressBar", Recorder)
    jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path())
    [bar] = made
    assert bar._done == bar._total > 2_000_000
