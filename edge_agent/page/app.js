// Holds what the agent has told, and has it shown.

import { setUpAsking } from "./ask.js";
import { Feed } from "./events.js";
import { showDecision, showErrors, showLinks, showLive, showSaved } from "./panels.js";

const KEY = "tandem-key";
const ANSWERS = 256; // kept, as many as the agent keeps
const SAMPLES = 600;
const place = (id) => document.getElementById(id);

const state = { live: [], samples: [], answers: [], decision: null };
const PANELS = {
  live: () => showLive(state.live),
  decision: () => showDecision(state.decision),
  answers: () => (showSaved(state.answers), showErrors(state.answers)),
  samples: () => showLinks(state.samples),
};

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

// What is told

function told(event) {
  if (event.agent) greet(event.agent);
  if (event.live) state.live = event.live;
  if (event.decision) state.decision = event.decision;
  if (event.answers) state.answers = joined(event.agent ? [] : state.answers, event.answers).slice(-ANSWERS);
  if (event.samples) state.samples = [...(event.agent ? [] : state.samples), ...event.samples].slice(-SAMPLES);
  if (event.draining) say("draining", "the agent is shutting down");
  draw(Object.keys(PANELS).filter((name) => name in event));
}

/** An answer that is told of twice counts once. */
function joined(known, more) {
  const all = new Map([...known, ...more].map((one) => [one.id, one]));
  return [...all.values()];
}

function greet({ tiny, full, edge_layers, layers }) {
  place("about").textContent = `${tiny} and ${full}, ${edge_layers} of ${layers} layers on this phone`;
}

// What is shown

let waiting = new Set();

function draw(names) {
  if (!names.length) return;
  if (!waiting.size) requestAnimationFrame(drawn);
  waiting = new Set([...waiting, ...names]);
}

function drawn() {
  const names = waiting;
  waiting = new Set();
  for (const name of names) PANELS[name]();
}

function say(kind, words) {
  place("status").dataset.state = kind;
  place("status").textContent = words;
}

function changed(kind, why) {
  if (kind === "connected") {
    say(kind, "connected");
    place("key").hidden = true;
    return;
  }
  state.live = [];
  draw(["live"]);
  if (kind === "lost") say(kind, `${why}; trying again`);
  else locked();
}

function locked() {
  const tried = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  say("locked", "locked");
  place("key-wrong").textContent = tried ? "That is not its key." : "";
  place("key").hidden = false;
  place("key-text").focus();
}

const feed = new Feed(headers, told, changed);
place("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, place("key-text").value);
  place("key-text").value = "";
  feed.start();
});
setUpAsking(headers, () => {
  feed.stop();
  locked();
});
new ResizeObserver(() => draw(["answers", "samples"])).observe(document.body);
feed.start();
