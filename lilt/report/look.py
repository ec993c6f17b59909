"""What a report shows beside the folder: the model is loaded, pictures are searched, tasks done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console
from rich.progress import Progress

from lilt import distributed
from lilt.build import manifest_path, read_split
from lilt.data import is_table, read_references
from lilt.dual import DualEncoder
from lilt.evaluate import Finished, Setting, Task, embed_split, evaluate
from lilt.evaluate.embed import distinct
from lilt.evaluate.folder import data_of, open_run
from lilt.evaluate.rows import Advance
from lilt.report.parameters import Places, count_trained
from lilt.report.past import Past
from lilt.report.retrievals import Gallery, search
from lilt.train.folder import CONFIG


@dataclass(frozen=True)
class Seen:
    """What was looked at for a report: what cannot be had is None, and missing says why, by part."""

    counts: dict[str, Places] | None
    gallery: Gallery | None
    done: Sequence[Finished]
    references: Mapping[str, float]
    missing: Mapping[str, str]


def look(past: Past, wanted: Mapping[str, Task], setting: Setting, console: Console, searches: int) -> Seen:
    """Load the model of a run and find out what its folder does not say."""
    data, root = data_of(past.folder / CONFIG, setting.data, setting.image_root)
    split = setting.split or past.split("test") or past.split("val") or ""
    missing: dict[str, str] = {}
    try:
        model = open_run(str(past.folder))
    except (ValueError, OSError) as error:
        failed = [Finished(spec, {}, "there is no model") for spec in wanted]
        return Seen(None, None, failed, {}, {"model": f"The model cannot be built here: {error}"})
    counts = count_trained(model.core)
    with Progress(console=console, disable=not distributed.is_main(), transient=True) as progress:
        whole = replace(setting, data=data, image_root=root, split=split or "test", bar=partial(_bar, progress))
        gallery = None
        if searches and not split:
            missing["gallery"] = "The run has no test and no validation split; name one with --split."
        elif searches:
            try:
                gallery = _gallery(model, whole, searches)
            except (ValueError, OSError) as error:
                missing["gallery"] = f"The pictures cannot be searched: {error}"
        done = list(evaluate(model, wanted, whole))
    # other data than that of the run has nothing to say of its results
    own = data if gallery is not None and setting.data is None else None
    references = read_references(manifest_path(own), past.split("test") or "test") if own and not is_table(own) else {}
    return Seen(counts, gallery, done, references, missing)


def _gallery(model: DualEncoder, setting: Setting, searches: int) -> Gallery:
    if not setting.data:
        raise ValueError("the run does not say which data it was trained on; name a manifest with --data")
    samples = read_split(setting.data, setting.split, setting.image_root)
    name, texts = f"gallery: {setting.split}", len(distinct(samples))
    with setting.bar(name, len(samples)) as advance, setting.bar(f"{name}, captions", texts) as advance_texts:
        embedded = embed_split(
            model.core,
            samples,
            batch_size=setting.batch_size,
            max_tokens=model.config.eval_tokens,
            workers=setting.workers,
            advance=advance,
            advance_texts=advance_texts,
        )
    if len(embedded.image) == 0:
        raise ValueError(f"none of {len(samples)} images could be read (first: {embedded.faults[0]}); check image_root")
    return search(embedded, samples, setting.split, searches)


@contextmanager
def _bar(progress: Progress, name: str, total: int) -> Iterator[Advance]:
    """Show a bar while something is done; it moves as if all ranks were as far as this one."""
    task = progress.add_task(name, total=total)
    try:
        yield lambda count: progress.advance(task, count * distributed.world_size())
    finally:
        progress.remove_task(task)
