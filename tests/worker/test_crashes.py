"""Which requests are remembered after a crash, and what is remembered of a model's states."""

from dataclasses import replace

from app.report import ModelState
from app.request import ClassLabel, ImageSpec, Prompt
from app.worker.admission import Backlog, best, merge
from app.worker.supervisor import CrashHistory
from tests.parts.requests import changed
from tests.parts.supervising import request


def test_two_deaths_condemn_and_a_success_clears():
    deaths, poison, bystander = CrashHistory(), request("boom"), request("calm")
    deaths.record([poison, bystander])
    assert not deaths.condemned(poison)
    deaths.clear(bystander)
    deaths.record([poison, bystander])
    assert deaths.condemned(poison)
    assert not deaths.condemned(bystander)


def test_another_try_is_the_same_request():
    deaths, first = CrashHistory(), request("boom", seeds=(1, 2))
    for _ in range(2):
        deaths.record([first])
    images = tuple(replace(spec, seed=5) for spec in first.images)
    again = changed(first, id="new", deadline=9.0, images=images, tenant="other key", weight=2.0)
    assert deaths.condemned(again)
    for other in (
        changed(first, steps=5),
        changed(first, width=64),
        replace(first, images=first.images[:1]),
        replace(first, images=(ImageSpec(Prompt("boom", "dark"), 1), first.images[1])),
        replace(first, images=(ImageSpec(ClassLabel(3), 1), first.images[1])),
    ):
        assert not deaths.condemned(other)


def test_twins_in_one_death_count_once():
    deaths = CrashHistory()
    deaths.record([request("boom"), request("boom")])
    assert not deaths.condemned(request("boom"))


def test_memory_of_deaths_is_bounded_and_fades():
    deaths = CrashHistory(memory=3)
    for _ in range(2):
        deaths.record([request("old")])
    assert deaths.condemned(request("old"))
    for index in range(3):
        deaths.record([request(f"new {index}")])
    assert not deaths.condemned(request("old"))
    fading = CrashHistory(seconds=0.0)
    for _ in range(3):
        fading.record([request("boom")])
    assert not fading.condemned(request("boom"))


def test_best_state_and_merged_rates():
    loading, failed = ModelState("m", "loading"), ModelState("m", "failed", "bad file")
    ready = ModelState("m", "ready", seconds=2.0, device_bytes=7, rates={"32x32": 1.0})
    assert best([failed, loading, ready]) is ready
    assert best([failed, loading]) is loading
    assert best([Backlog().state("m")]) == ModelState("m", "absent")
    later = merge(ready, ModelState("m", "ready", rates={"64x64": 4.0}))
    assert later == replace(ready, rates={"32x32": 1.0, "64x64": 4.0})
    assert merge(ready, failed) == replace(failed, rates={"32x32": 1.0}) and merge(Backlog().state("m"), ready) == ready
