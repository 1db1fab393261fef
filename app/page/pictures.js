/**
 * The gallery's pictures: in IndexedDB, or in memory where the browser has no room or no database.
 *
 * A record is `{ id, created, blob, facts, path, reply, source, mask }`. No function here ever rejects.
 */

/** The most records that are kept. */
export const MOST = 300;

const STORE = "pictures";
const TRIES = 3; // to write into a store that is full, with DROPPED of the oldest records gone before each
const DROPPED = 10;
const PATIENCE = 3000; // ms; a database that another tab deletes just now opens later than that, or never

const memory = new Map(); // records by id that are not in the database
let refused = false;
let opened = null;

/** All records, the newest first. */
export async function all() {
  const stored = await attempt(async () => {
    const store = (await database()).transaction(STORE).objectStore(STORE);
    return settled(store.index("created").getAll());
  });
  const records = (stored ?? []).filter(({ id, blob }) => blob instanceof Blob && !memory.has(id));
  return [...records, ...memory.values()].sort((one, other) => other.created - one.created);
}

/** Keep a record. The oldest leave where there are more than 300, or where the browser has no room for this one. */
export async function add(record) {
  const written = await attempt(() => write(record));
  if (written) memory.delete(record.id);
  else memory.set(record.id, record);
  const oldest = [...memory.keys()].slice(0, -MOST);
  oldest.forEach((id) => memory.delete(id));
}

/** Forget a record. */
export async function remove(id) {
  memory.delete(id);
  await attempt(() => change((store) => store.delete(id)));
}

/** Forget all records. */
export async function clear() {
  memory.clear();
  await attempt(() => change((store) => store.clear()));
}

/** Whether the records survive a reload, as far as is known by now. */
export function lasting() {
  return !refused && memory.size === 0;
}

async function write(record) {
  for (let tries = TRIES; ; tries -= 1) {
    try {
      await change((store) => {
        store.put(record);
        store.count().onsuccess = ({ target }) => drop(store, target.result - MOST, record.id);
      });
      return true;
    } catch (error) {
      if (error?.name !== "QuotaExceededError" || !tries) throw error;
      await change((store) => drop(store, DROPPED));
    }
  }
}

/** Delete the oldest records. kept: one that stays, even if a clock that was set back made it the oldest. */
function drop(store, count, kept) {
  if (count <= 0) return;
  store.index("created").getAllKeys(null, count + 1).onsuccess = ({ target }) => {
    const oldest = target.result.filter((id) => id !== kept).slice(0, count);
    oldest.forEach((id) => store.delete(id));
  };
}

/** Do some work with the database; undefined if it fails. */
async function attempt(work) {
  try {
    return await work();
  } catch {
    return undefined;
  }
}

/** Do `work(store)` in a transaction and wait until it is written. */
async function change(work) {
  const transaction = (await database()).transaction(STORE, "readwrite");
  work(transaction.objectStore(STORE));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
}

/** The database, opened when it is first asked for, and again after the browser has closed it. */
function database() {
  opened ??= open();
  return opened;
}

async function open() {
  try {
    const request = indexedDB.open("instep", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(STORE, { keyPath: "id" }).createIndex("created", "created");
    };
    const late = new Promise((_, reject) => setTimeout(reject, PATIENCE, new Error("it does not open")));
    const db = await Promise.race([settled(request), late]);
    const forget = () => (opened = null);
    db.onclose = forget;
    db.onversionchange = () => {
      db.close();
      forget();
    };
    return db;
  } catch (error) {
    refused = true;
    throw error;
  }
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
