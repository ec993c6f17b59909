"""Knowledge conservation: the same tasks on the towers before and after, and on the way between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lilt.evaluate.subject import Subject
from lilt.evaluate.task import Task, Tasks, Values, register

COUNT = "num_"
NO_SHARE = ("penalty", "median_rank", "best_epoch")  # more of it is not more knowledge
NONE = Tasks()


@register("conserve")
@dataclass(frozen=True)
class Conserve(Task):
    """Do tasks on the base towers and on the tuned ones, `conserve(knn(label_from=([a-z]+)_)+classifier(data=FILE))`.

    Yields each value before and after, and of shares the kept part, after / before in percent. The heads stay as
    trained, so tasks on towers (knn, probe, classifier) are meant.
    """

    tasks: Tasks = NONE

    def measure(self, subject: Subject) -> Values:
        check_any(self.tasks, "conserve(knn+probe)")
        after: dict[str, dict[str, float]] = {}
        failed: Exception | None = None
        try:
            for name, task in self.tasks.items:
                after[name] = dict(task(subject))
        except (ValueError, OSError, RuntimeError) as error:
            failed = error  # what was finished is still compared
        with subject.at_base() as base:
            for name, task in self.tasks.items[: len(after)]:
                yield from compared(name, dict(task(base)), after[name])
        if failed is not None:
            raise failed


def compared(name: str, before: dict[str, float], after: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the values of a task before and after, and counts once."""
    for key, value in before.items():
        if key.startswith(COUNT):
            yield f"{COUNT}{name}/{key.removeprefix(COUNT)}", value
            continue
        yield f"{name}/{key}/before", value
        yield f"{name}/{key}/after", after[key]
        if value > 0 and key.rpartition("/")[2] not in NO_SHARE:
            yield f"{name}/{key}/kept", 100 * after[key] / value


@dataclass(frozen=True)
class Scales:
    """Places on the way from the base (0) to the tuned towers (1), written `0|0.5|1`."""

    values: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    @classmethod
    def parse(cls, text: str) -> Scales:
        """Parse and check them."""
        try:
            values = tuple(float(part) for part in text.split("|"))
        except ValueError:
            raise ValueError(f"scales={text}: expected numbers from 0 to 1; write 0|0.5|1") from None
        outside = next((value for value in values if not 0 <= value <= 1), None)
        if outside is not None:
            raise ValueError(f"scales={text}: {outside:g} is outside 0 to 1; write 0|0.5|1")
        return cls(values)


QUARTERS = Scales()


@register("curve")
@dataclass(frozen=True)
class Curve(Task):
    """Do tasks at base + scale * (tuned - base) for several scales, as `lilt merge --scale` would write them.

    Source: Wortsman et al. 2022, arXiv 2109.01903.
    """

    tasks: Tasks = NONE
    scales: Scales = QUARTERS

    def measure(self, subject: Subject) -> Values:
        check_any(self.tasks, "curve(retrieval)")
        for scale in self.scales.values:
            moved = subject if scale == 1 else subject.between(scale)
            for name, task in self.tasks.items:
                for key, value in task(moved):
                    prefix = COUNT if key.startswith(COUNT) else ""
                    yield f"{prefix}{scale:g}/{name}/{key.removeprefix(COUNT)}", value


def check_any(tasks: Tasks, example: str) -> None:
    """Raise ValueError where there is no task."""
    if not tasks.items:
        raise ValueError(f"{example.partition('(')[0]} has no task; expected one or more, joined by +; write {example}")
