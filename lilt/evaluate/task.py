"""A task: data and one verb, which yields what it found out about a model as (name, value) pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from lilt.build import manifest_path, read_split
from lilt.data import Sample
from lilt.dual import DualEncoder
from lilt.evaluate.subject import Setting, Subject
from lilt.registry import Registry, construct, options_of, parse_call, split_top
from lilt.towers import expand

Values = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Task(ABC):
    """Something to find out about a model. Subclasses are frozen dataclasses registered under their name.

    Shares are in percent, counts have names that start with num_.
    """

    name: ClassVar[str]

    def __call__(self, model: DualEncoder | Subject, setting: Setting | None = None) -> Values:
        """Yield (name, value); what was yielded before an error stands."""
        return self.measure(model if isinstance(model, Subject) else Subject(model, setting))

    @abstractmethod
    def measure(self, subject: Subject) -> Values:
        """Yield (name, value) for a model in one state."""


tasks: Registry[type[Task]] = Registry("task")


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """File a task class under its name."""

    def file(cls: type[Task]) -> type[Task]:
        cls.name = name
        return tasks.register(name)(cls)

    return file


def parse_task(spec: str) -> Task:
    """Build a task from `knn(k=20,data=FOLDER)`."""
    call = parse_call(spec)
    return construct(tasks[call.name], call, options_of(tasks[call.name]))


@dataclass(frozen=True)
class Tasks:
    """Several tasks in one option, written `knn(k=5)+probe`; each goes by its name, or by its spec if two share one."""

    items: tuple[tuple[str, Task], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Tasks:
        """Parse tasks that are joined by +."""
        specs = [spec for spec in split_top(text, "+") if spec]
        built = [parse_task(spec) for spec in specs]
        names = [task.name for task in built]
        labels = [n if names.count(n) == 1 else s for n, s in zip(names, specs, strict=True)]
        return cls(tuple(zip(labels, built, strict=True)))


@dataclass(frozen=True)
class OnData(Task):
    """A task on a manifest or a folder: by default what the run was trained on, at the place that the setting names."""

    data: str | None = None
    image_root: str | None = None
    expected: int | None = None  # how many images there must be; fewer is an error

    def given(self, subject: Subject) -> tuple[str, str | None]:
        """Return the data and the image root of this task, or else of the setting."""
        given = self.data or subject.setting.data
        if not given:
            raise ValueError(
                f"{self.name} has no data; expected a manifest or a folder of images; give {self.name}(data=…)"
            )
        # a root goes with the data it was given for
        root = self.image_root or (subject.setting.image_root if self.data is None else None)
        return given, root

    def source(self, subject: Subject) -> tuple[Path, str | None]:
        """Return the manifest or folder, and the folder that image paths are relative to."""
        given, root = self.given(subject)
        folder = Path(expand(given))
        return folder if folder.is_dir() else manifest_path(given), expand(root) if root else None

    def read_samples(self, subject: Subject, split: str | None) -> list[Sample]:
        """Return the images of a split with their captions; by default the split of the setting."""
        given, root = self.given(subject)
        samples = read_split(given, split or subject.setting.split, root)
        self.check_count(len(samples), f"images in {given}")
        return samples

    def check_count(self, found: int, what: str) -> None:
        """Raise ValueError where fewer were found than expected."""
        if self.expected is not None and found < self.expected:
            raise ValueError(
                f"{self.name}: {what}: found {found}, expected {self.expected}; complete the data, or leave expected "
                "out"
            )


class Finished(NamedTuple):
    """What came of one task: the values it yielded, and the error that ended it, if one did."""

    spec: str
    values: dict[str, float]
    error: str | None


def evaluate(model: DualEncoder, wanted: Mapping[str, Task], setting: Setting | None = None) -> Iterator[Finished]:
    """Do task after task, each given with its spec; one that fails keeps what it had found and stops no other."""
    subject = Subject(model, setting)
    for spec, task in wanted.items():
        values: dict[str, float] = {}
        error = None
        try:
            for name, value in task.measure(subject):
                values[name] = float(value)
        except (ValueError, OSError, RuntimeError) as reason:
            error = str(reason) if isinstance(reason, (ValueError, OSError)) else f"{type(reason).__name__}: {reason}"
        yield Finished(spec, values, error)
