// Small charts in SVG, drawn at the width they have on the screen.

const SVG = "http://www.w3.org/2000/svg";
const ROUTES = ["local", "cloud", "split", "speculative"];

export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function canvas(place, height, label) {
  const width = Math.max(60, place.clientWidth);
  const chart = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  place.replaceChildren(chart);
  return [chart, width];
}

// Words for numbers

const SIZES = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];

export function bytes(count) {
  const [unit, name] = SIZES.find(([size]) => Math.abs(count) >= size) ?? [1, "B"];
  return `${short(count / unit)} ${name}`;
}

export function rate(perSecond) {
  return `${bytes(perSecond)}/s`;
}

export function time(ms) {
  return ms >= 1000 ? `${short(ms / 1000)} s` : `${short(ms)} ms`;
}

export function share(fraction) {
  return `${Math.round(100 * fraction)} %`;
}

function short(number) {
  const size = Math.abs(number);
  if (size >= 100 || Number.isInteger(number)) return Math.round(number).toLocaleString("en");
  return number.toFixed(size >= 10 ? 1 : 2).replace(/\.?0+$/, "") || "0";
}

/** The least of 1, 2, 5 times a power of ten that is not below. */
function round(most) {
  if (!(most > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return power * [1, 2, 5, 10].find((step) => step * power >= most * 0.999);
}

// Lines over time

/**
 * `series`: [{name, of: sample => number | null}], drawn as steps over `samples` (by `at`, seconds) up to `until`;
 * `unit` makes a number into words, `top` is the least top of the axis.
 */
export function lines(place, title, samples, series, { unit, top = 0, from, until }) {
  const values = series.map(({ of }) => samples.map(of));
  const most = round(Math.max(top, ...values.flat().filter((value) => value !== null)));
  const height = 80, left = 2, bottom = 16, above = 16;
  const told = series.map(({ name }, index) => [name, latest(values[index])].filter(Boolean).join(" ")).join(", ");
  const words = `${title} over ${span(until - from)}: now ${told}, axis to ${unit(most)}`;
  const [chart, width] = canvas(place, height, words);
  const x = (at) => left + ((width - 2 * left) * (at - from)) / (until - from);
  const y = (value) => height - bottom - ((height - bottom - above) * value) / most;
  for (const value of [0, most]) {
    chart.append(shape("line", { class: "grid", x1: 0, x2: width, y1: y(value), y2: y(value) }));
  }
  chart.append(
    shape("text", { class: "tick", x: 0, y: y(most) - 3 }, unit(most)),
    shape("text", { class: "tick", x: 0, y: height - 3 }, `${span(until - from)} ago`),
    shape("text", { class: "tick", x: width, y: height - 3, "text-anchor": "end" }, "now"),
  );
  series.forEach((_, index) => {
    const path = steps(samples, values[index], x, y, until);
    chart.append(shape("path", { class: `line series-${index}`, d: path }));
  });
  pointed(chart, place, (at) => {
    const seen = from + ((at - left) * (until - from)) / (width - 2 * left);
    const index = samples.findLastIndex((sample) => sample.at <= seen);
    if (index < 0) return null;
    const then = series.map(({ name }, one) => [name, said(values[one][index])].filter(Boolean).join(" "));
    return [x(Math.max(from, samples[index].at)), `${then.join(", ")} · ${clock(samples[index].at)}`];
  });

  function latest(column) {
    return said(column.at(-1));
  }
  function said(value) {
    return value === null || value === undefined ? "unknown" : unit(value);
  }
}

function steps(samples, values, x, y, until) {
  let path = "", before = null;
  samples.forEach((sample, index) => {
    const value = values[index];
    if (value !== null) {
      const [across, up] = [x(sample.at).toFixed(1), y(value).toFixed(1)];
      path += before === null ? `M${across} ${up}` : `H${across}V${up}`;
    }
    before = value;
  });
  return before === null ? path : `${path}H${x(until).toFixed(1)}`;
}

function span(seconds) {
  return seconds < 100 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

export function clock(at) {
  return new Date(1000 * at).toLocaleTimeString("en-GB");
}

// Predicted against measured

/** `points`: [{x, y, route, words}] in ms on logarithmic axes; the band is 15 % to either side. */
export function scatter(place, title, points) {
  const height = 190, left = 46, bottom = 18, edge = 6;
  const [chart, width] = canvas(place, height, `${title}: ${points.length} answers, predicted across and measured up`);
  const sizes = points.flatMap(({ x, y }) => [x, y]).filter((value) => value > 0).map(Math.log10);
  const low = sizes.length ? Math.floor(Math.min(...sizes) * 2 - 0.1) / 2 : 0;
  const high = sizes.length ? Math.max(low + 1, Math.ceil(Math.max(...sizes) * 2 + 0.1) / 2) : 3;
  const at = (value) => (Math.log10(Math.max(value, 1e-3)) - low) / (high - low);
  const x = (value) => left + (width - left - edge) * Math.max(0, at(value));
  const y = (value) => height - bottom - (height - bottom - edge) * Math.max(0, at(value));
  const [first, last] = [10 ** low, 10 ** high];
  const band = [[first, first / 1.15], [last, last / 1.15], [last, last * 1.15], [first, first * 1.15]];
  const inside = `M${left} ${edge}H${width - edge}V${height - bottom}H${left}Z`;
  const clip = `inside-${place.id}`;
  chart.append(
    shape("clipPath", { id: clip }, shape("path", { d: inside })),
    shape("path", { class: "frame", d: inside }),
    shape("polygon", { class: "band", "clip-path": `url(#${clip})`,
                       points: band.map(([a, b]) => `${x(a)},${yFree(b)}`).join(" ") }),
    shape("line", { class: "equal", x1: x(first), y1: y(first), x2: x(last), y2: y(last) }),
  );
  for (let power = Math.ceil(low); power <= high; power++) {
    const words = time(10 ** power), across = x(10 ** power);
    const anchor = across > width - 24 ? "end" : across < left + 16 ? "start" : "middle";
    chart.append(
      shape("text", { class: "tick", x: left - 5, y: y(10 ** power) + 4, "text-anchor": "end" }, words),
      shape("text", { class: "tick", x: across, y: height - 4, "text-anchor": anchor }, words),
    );
  }
  chart.append(
    shape("text", { class: "tick", x: left + 5, y: edge + 12 }, "measured"),
    shape("text", { class: "tick", x: width - edge - 5, y: height - bottom - 5, "text-anchor": "end" }, "predicted"),
  );
  for (const { x: across, y: up, route, words } of points) {
    chart.append(mark(route, x(across), y(up), shape("title", {}, words)));
  }

  function yFree(value) {
    return height - bottom - (height - bottom - edge) * at(value);
  }
}

/** One point; each route has a shape and a colour. */
export function mark(route, x, y, ...children) {
  const paths = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7Z", "M0-4.5 4.5 3.5h-9Z", "M0-5 5 0 0 5-5 0Z"];
  const kind = Math.max(0, ROUTES.indexOf(route));
  return shape("path", { class: `mark route-${kind}`, d: paths[kind], transform: `translate(${x} ${y})` }, ...children);
}

/** Which mark is which. */
export function marks(place, routes) {
  place.replaceChildren(...ROUTES.filter((route) => routes.has(route)).map((route) => {
    const sign = shape("svg", { width: 12, height: 12, "aria-hidden": true }, mark(route, 6, 6));
    return make("span", {}, sign, ` ${route}`);
  }));
}

/** A line that goes up and down from nought, such as a running sum. */
export function running(place, title, values, unit) {
  const height = 56, edge = 6;
  const [chart, width] = canvas(place, height, `${title}: from ${unit(values[0] ?? 0)} to ${unit(values.at(-1) ?? 0)}`);
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const x = (index) => (width * index) / Math.max(1, values.length - 1);
  const y = (value) => height - edge - ((height - 2 * edge) * (value - low)) / (high - low || 1);
  const path = values.map((value, index) => `${index ? "L" : "M"}${x(index)} ${y(value)}`).join("");
  chart.append(
    shape("line", { class: "grid", x1: 0, x2: width, y1: y(0), y2: y(0) }),
    shape("path", { class: "line series-0", d: path }),
  );
  pointed(chart, place, (at) => {
    const index = Math.round((at / width) * Math.max(1, values.length - 1));
    return values[index] === undefined ? null : [x(index), `${unit(values[index])} after ${index + 1} answers`];
  });
}

/** Shows what is under the pointer. */
function pointed(chart, place, look) {
  const line = shape("line", { class: "cursor", y1: 0, y2: chart.getAttribute("height") });
  const note = make("output", { class: "note", "aria-hidden": true });
  chart.onpointermove = (event) => {
    const found = look(event.offsetX);
    if (!found) return;
    line.setAttribute("x1", found[0]);
    line.setAttribute("x2", found[0]);
    note.textContent = found[1];
    chart.append(line);
    place.append(note);
  };
  chart.onpointerleave = () => {
    line.remove();
    note.remove();
  };
}
