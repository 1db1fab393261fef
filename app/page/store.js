import { useEffect, useReducer } from "./lib/hooks.js";

/** What the page shows. Components read it by `useStore`, everything else changes it by `set`. */
const state = {
  models: [], // as GET /v1/models lists them
  model: null, // the chosen one, with its fields
  values: {}, // what the form has, by field; what is absent is the model's default
  locked: false, // whether the seed stays for the next picture
  compare: null, // { field, values } where several requests are drawn side by side
  source: null, // { blob, name, mask } of a picture to start from
  runs: [], // what was started and is still shown, newest first
  pictures: [], // the gallery, newest first
  tally: null, // { images, forwards, alone } of the last time in which something was drawn
  asksKey: false,
  fault: "", // what went wrong outside of a run
  opened: null, // a picture of the gallery that is shown large
  dropped: null, // { blob, name, facts } of a file that was dropped or opened
};
const listeners = new Set();

/** The state now. */
export function get() {
  return state;
}

/** Change some of the state and draw the page anew. */
export function set(changes) {
  Object.assign(state, changes);
  for (const listener of [...listeners]) listener();
}

/** The state, for a component that is drawn again whenever it changes. */
export function useStore() {
  const [, again] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    listeners.add(again);
    return () => listeners.delete(again);
  }, []);
  return state;
}
