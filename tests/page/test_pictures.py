"""The gallery's store, app/page/pictures.js."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page

from tests.page.modules import opened, run

pytestmark = pytest.mark.slow

RECORD = """
const record = (id, created, size = 8) => ({
  id, created, blob: new Blob([new Uint8Array(size)], { type: "image/png" }), facts: { prompt: "<b>" + id },
  path: "v1/images/generations", reply: { seed: 7 }, source: null, mask: null,
});
const ids = async () => (await m.all()).map(({ id }) => id).join(" ");
"""


def store(page: Page, words: str) -> Any:
    return run(page, "pictures", RECORD + words)


def test_the_gallery_survives_a_reload_newest_first(tab: Page) -> None:
    words = """
      for (const [id, created] of [["b", 2], ["c", 3], ["a", 1]]) await m.add(record(id, created));
      return [await ids(), m.lasting()];
    """
    assert store(tab, words) == ["c b a", True]
    tab.reload()
    assert store(tab, "const [one] = await m.all(); return [await ids(), one.blob.size, one.facts]") == [
        "c b a",
        8,
        {"prompt": "<b>c"},
    ]
    assert store(tab, "await m.remove('b'); await m.remove('none'); return ids()") == "c a"
    assert store(tab, "await m.clear(); return ids()") == ""


def test_the_same_record_again_replaces_the_first(tab: Page) -> None:
    assert store(tab, "await m.add(record('a', 1)); await m.add(record('a', 5, 9)); return (await m.all()).length") == 1


def test_the_oldest_of_more_than_300_leave_and_never_the_new_one(tab: Page) -> None:
    words = """
      for (let one = 0; one < 303; one++) await m.add(record("n" + one, 1000 + one));
      await m.add(record("clock-set-back", 5));
      const kept = (await m.all()).map(({ id }) => id);
      return [kept.length, kept[0], kept.at(-2), kept.at(-1)];
    """
    assert store(tab, words) == [300, "n302", "n4", "clock-set-back"]


def test_a_record_without_a_picture_is_none(tab: Page) -> None:
    words = "await m.add({ id: 'odd', created: 9 }); await m.add(record('a', 1)); return ids()"
    assert store(tab, words) == "a"


def test_two_tabs_share_one_gallery(tab: Page, site: str) -> None:
    other = opened(tab.context, site)
    store(tab, "await m.add(record('first', 1))")
    store(other, "await m.add(record('second', 2))")
    assert store(tab, "return ids()") == store(other, "return ids()") == "second first"
    store(other, "await m.clear()")
    assert store(tab, "await m.add(record('third', 3)); return ids()") == "third"


def test_a_database_that_another_tab_deletes_is_opened_again(tab: Page, site: str) -> None:
    other = opened(tab.context, site)
    store(tab, "await m.add(record('first', 1))")
    deleted = "() => new Promise((done) => (indexedDB.deleteDatabase('instep').onsuccess = () => done(true)))"
    assert other.evaluate(deleted)
    assert store(tab, "await m.add(record('second', 2)); return [await ids(), m.lasting()]") == ["second", True]


@pytest.mark.parametrize(
    "refusal",
    [
        "indexedDB.open = () => { throw new DOMException('no', 'SecurityError') }",
        "Object.defineProperty(window, 'indexedDB', { value: undefined })",
        "indexedDB.open = () => ({})",
    ],
    ids=["it throws", "there is none", "it never opens"],
)
def test_a_refused_database_leaves_the_pictures_to_this_tab(tab: Page, refusal: str) -> None:
    tab.add_init_script(refusal)
    tab.reload()
    words = """
      await m.add(record("a", 1)); await m.add(record("b", 2)); await m.add(record("c", 3)); await m.remove("b");
      return [await ids(), m.lasting()];
    """
    assert store(tab, words) == ["c a", False]
    assert store(tab, "await m.clear(); return ids()") == ""


def test_a_full_quota_drops_the_oldest_ten(tab: Page, site: str) -> None:
    tab.add_init_script("""
      let room = 25;
      const put = IDBObjectStore.prototype.put;
      IDBObjectStore.prototype.put = function (value) {
        const request = put.call(this, value);
        this.count().onsuccess = ({ target }) => {
          if (target.result > room) this.transaction.full = true, this.transaction.abort();
        };
        return request;
      };
      const error = Object.getOwnPropertyDescriptor(IDBTransaction.prototype, "error").get;
      Object.defineProperty(IDBTransaction.prototype, "error", {
        get() { return this.full ? new DOMException("full", "QuotaExceededError") : error.call(this); },
      });
    """)
    tab.reload()
    words = """
      for (let one = 0; one < 26; one++) await m.add(record("n" + one, one));
      const kept = (await m.all()).map(({ id }) => id);
      return [kept.length, kept[0], kept.at(-1), m.lasting()];
    """
    assert store(tab, words) == [16, "n25", "n10", True]


def test_a_picture_that_never_fits_stays_in_memory(tab: Page, site: str) -> None:
    tab.context.new_cdp_session(tab).send("Storage.overrideQuotaForOrigin", {"origin": site, "quotaSize": 100_000})
    words = "await m.add(record('small', 1)); await m.add(record('huge', 2, 5e6)); return [await ids(), m.lasting()]"
    kept, lasting = store(tab, words)
    assert kept.split()[0] == "huge" and not lasting
