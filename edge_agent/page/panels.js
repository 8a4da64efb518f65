// What the agent tells, made visible. Every panel is drawn anew from the state.

import { bytes, clock, lines, make, marks, rate, running, scatter, share, time } from "./draw.js";

const FEW = 8; // plans shown before all are asked for
const MINUTES = 5;
const RECENT = 12; // answers in the table
const ENDED = new Set(["stop", "length"]);
const place = (id) => document.getElementById(id);

/** A plan in words; its draft is the longest there may be. */
export function named(plan) {
  return [plan.route, more(plan, "≤ ")].filter(Boolean).join(" ");
}

/** What a plan's route leaves open. */
function more({ route, split, draft, model }, most = "") {
  if (route === "local") return model ?? "";
  const at = split ? (route === "split" ? String(split) : `split ${split}`) : "";
  return [at, draft ? `draft ${most}${draft}` : ""].filter(Boolean).join(", ");
}

function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

// Running

export function showLive(live) {
  place("live-count").textContent = live.length ? `(${live.length})` : "";
  const items = live.map(liveItem);
  place("live-list").replaceChildren(...(items.length ? items : [make("li", { class: "quiet" }, "Nothing runs now.")]));
}

function liveItem({ id, max_tokens, prompt_tokens, quality, plan, so_far }) {
  const decoding = so_far.first_token_ms === null ? 0 : so_far.total_ms - so_far.first_token_ms;
  const speed = so_far.tokens > 1 && decoding > 0 ? (1000 * (so_far.tokens - 1)) / decoding : null;
  const facts = [
    speed ? `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s` : "waiting for the first token",
    `${count(prompt_tokens, "token")} asked`,
    so_far.transport && `${so_far.transport} to ${so_far.replica}`,
    `quality ${quality}`,
    ...made(so_far),
  ];
  const now = { ...plan, route: so_far.route, split: so_far.split, model: so_far.model };
  const name = make("strong", {}, named(now));
  const done = make("span", {}, `${so_far.tokens} of at most ${max_tokens} tokens`);
  const head = make("span", { class: "head" }, name, done);
  const bar = make("progress", { value: so_far.tokens, max: max_tokens, "aria-label": `tokens of ${named(now)}` });
  return make("li", { "data-id": id }, head, bar, make("span", { class: "quiet" }, facts.filter(Boolean).join(" · ")));
}

/** What drafting and moving came to, where there was any. */
function made({ drafted, accepted, moves, legs, attempts }) {
  const parts = (legs ?? []).map((leg) => `${count(leg.tokens, "token")} by ${named(leg)}`);
  return [
    drafted && `${accepted} of ${drafted} drafted tokens accepted`,
    moves && `moved ${count(moves, "time")}${parts.length > 1 ? ` (${parts.join(", then ")})` : ""}`,
    attempts > 1 && count(attempts, "attempt"),
  ].filter(Boolean);
}

// An answer of this page

/** What the plan of a finished answer says, as a list of terms. */
export function showRan(plan) {
  const facts = [
    ["plan", named(plan)],
    ["why", plan.reason],
    ["first token", plan.first_token_ms == null ? null : time(plan.first_token_ms)],
    ["whole", plan.total_ms == null ? null : `${time(plan.total_ms)}, ${time(plan.predicted.total_ms)} predicted`],
    ["link", plan.transport && `${plan.transport}, ${bytes(plan.bytes_up)} up, ${bytes(plan.bytes_down)} down`],
    ["text", plan.exact ? "the full model's own" : `not exactly the full model's${plan.degraded ? ", degraded" : ""}`],
    ["on the way", made(plan).join(", ")],
  ];
  place("ran").replaceChildren(
    ...facts.filter(([, said]) => said).flatMap(([name, said]) => [make("dt", {}, name), make("dd", {}, said)]),
  );
}

// The last decision

let all = false;

export function showDecision(decision) {
  if (!decision) return;
  const { plan, measured } = decision;
  const chosen = plan.candidates.find((one) => one.chosen);
  place("decision-why").textContent =
    `${named(plan)}: ${plan.reason}. Predicted ${time(plan.predicted.total_ms)}, measured ${time(measured.total_ms)}.`;
  place("decision-legend").hidden = false;
  const ranked = plan.candidates.toSorted((a, b) => !!a.refused - !!b.refused || a.cost - b.cost);
  const shown = all ? ranked : ranked.filter((one, index) => index < FEW || one === chosen);
  const scaled = shown.filter((one) => !one.refused || one === chosen);
  const most = Math.max(...(scaled.length ? scaled : shown).map((one) => one.total_ms), 1e-3);
  const items = shown.map((one, at) => barItem(one, one === chosen, most, one.refused === shown[at - 1]?.refused));
  place("bars").replaceChildren(...items);
  const button = place("bars-all");
  button.hidden = ranked.length <= FEW;
  button.textContent = all ? "Show fewer" : `Show all ${ranked.length}`;
  button.setAttribute("aria-expanded", String(all));
  button.onclick = () => {
    all = !all;
    showDecision(decision);
  };
}

/** `again`: the row above is refused for the same reason. */
function barItem(one, chosen, most, again) {
  const words = `network ${time(one.network_ms)}, compute ${time(one.compute_ms)}, ` +
    `${bytes(one.bytes_up + one.bytes_down)}, cost ${one.cost.toFixed(3)} s`;
  const network = make("span", { class: "bar network" });
  const compute = make("span", { class: "bar compute" });
  network.style.width = `${Math.min(100, (100 * one.network_ms) / most)}%`;
  compute.style.width = `${Math.min(100, (100 * one.compute_ms) / most)}%`;
  const track = make("span", { class: "track", role: "img", "aria-label": words }, network, compute);
  const rest = make("span", { class: "quiet" }, more(one));
  const name = make("span", { class: "name" }, chosen ? "✓ " : "", `${one.route} `, rest);
  const value = make("data", { value: one.total_ms }, time(one.total_ms));
  const item = make("li", { title: words }, name, track, value);
  if (one.refused) item.append(make("span", { class: again ? "unseen" : "reason" }, one.refused));
  if (chosen) item.className = "chosen";
  else if (one.refused) item.className = "refused";
  return item;
}

// Bytes

export function showSaved(answers) {
  const compared = answers.filter((one) => one.cloud_bytes !== null);
  if (!compared.length) return;
  let sum = 0;
  const sums = compared.map((one) => (sum += one.cloud_bytes - one.bytes));
  const always = compared.reduce((total, one) => total + one.cloud_bytes, 0);
  place("saved-sum").textContent = sum < 0 ? `${bytes(-sum)} more` : `${bytes(sum)} saved`;
  place("saved-why").textContent =
    `The last ${count(compared.length, "answer")} moved ${bytes(always - sum)}; always-cloud would have moved ` +
    `${bytes(always)}, as predicted.`;
  running(place("saved-chart"), "Bytes saved, summed up", sums, bytes);
}

// Link and phone

const single = (of) => [{ name: "", of }];
const CHARTS = [
  { title: "Round trip", unit: time, series: single((one) => one.rtt_ms) },
  { title: "Rates", unit: rate, series: [{ name: "up", of: ({ up }) => up }, { name: "down", of: ({ down }) => down }] },
  { title: "Wait in the cloud", unit: time, top: 10, series: single((one) => one.wait_ms) },
  { title: "CPU taken by others", unit: share, top: 1, series: single((one) => one.cpu_load) },
  {
    title: "Governor", unit: share, top: 1,
    series: [{ name: "leaves", of: (one) => one.leaves }, { name: "at", of: (one) => one.level }],
  },
  { title: "Battery", unit: share, top: 1, series: single((one) => one.battery) },
];

export function showLinks(samples) {
  if (!samples.length) return;
  const last = samples.at(-1), until = last.at;
  const within = samples.filter((one) => one.at > until - 60 * MINUTES);
  const from = Math.min(within[0].at, until - 60);
  place("replica").textContent = last.replica ?? "no cloud";
  place("trouble").textContent = last.trouble ?? "";
  place("governor").textContent = last.leaves === null
    ? "Nothing to read of power and heat: the governor is off."
    : `The governor goes by ${last.governor}.`;
  const charts = CHARTS.filter(({ series }) => within.some((one) => series.some(({ of }) => of(one) !== null)));
  const panels = charts.map((chart) => linePanel(chart, last));
  const frame = place("lines");
  for (const gone of frame.querySelectorAll("figure")) {
    if (!panels.some(([figure]) => figure === gone)) gone.remove();
  }
  for (const [figure, body, { title, unit, top, series }] of panels) {
    if (figure.parentNode !== frame) frame.append(figure);
    lines(body, title, within, series, { unit, top, from, until });
  }
}

const figures = new Map();

/** The figure of a chart, kept from one drawing to the next. */
function linePanel(chart, last) {
  if (!figures.has(chart)) {
    const caption = make("figcaption"), body = make("div", { class: "chart" });
    figures.set(chart, [make("figure", {}, caption, body), body, chart, caption]);
  }
  const [, , , caption] = figures.get(chart);
  const now = chart.series.map(({ name, of }, index) => {
    const value = of(last);
    const key = chart.series.length > 1 ? [make("span", { class: `key series-${index}` })] : [];
    return make("span", {}, ...key, `${name} ${value === null ? "–" : chart.unit(value)}`.trim());
  });
  caption.replaceChildren(make("span", { class: "title" }, chart.title), ...now);
  return figures.get(chart);
}

// Predicted and measured

export function showErrors(answers) {
  const known = answers.filter((one) => one.first_token_ms !== null);
  marks(place("scatter-legend"), new Set(known.map((one) => one.route)));
  compare("first", "First token", known, "first_token_ms");
  compare("total", "Whole answer", known.filter((one) => ENDED.has(one.finish)), "total_ms");
  place("answers").replaceChildren(...answers.slice(-RECENT).reverse().map(row));
}

function compare(name, title, answers, key) {
  scatter(place(`scatter-${name}`), title, answers.map((one) => point(one, key)));
  const errors = answers.map((one) => Math.abs(one.predicted[key] - one[key]) / one[key]).sort((a, b) => a - b);
  const middle = errors[Math.floor(errors.length / 2)];
  place(`error-${name}`).textContent = errors.length ? `half are less than ${share(middle)} off` : "";
}

function point(one, key) {
  const words = `${named(one)} at ${clock(one.at)}: ${time(one.predicted[key])} predicted, ${time(one[key])} measured`;
  return { x: one.predicted[key], y: one[key], route: one.route, words };
}

function row(one) {
  const cells = [
    clock(one.at), named(one), one.tokens,
    time(one.predicted.first_token_ms), one.first_token_ms === null ? one.finish : time(one.first_token_ms),
    time(one.predicted.total_ms), time(one.total_ms),
  ];
  return make("tr", {}, ...cells.map((cell) => make("td", {}, String(cell))));
}
