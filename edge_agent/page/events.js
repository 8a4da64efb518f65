// Server-sent events over fetch, since EventSource can send no key.

const FIRST_WAIT = 500;
const MOST_WAIT = 5000;
const SILENCE = 10000; // ms: an agent that lives says something every second

/** The JSON of each event of a response; `heard` is called for every piece that came. */
export async function* messages(response, heard = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.startsWith("data: ") ? event.slice(6) : "";
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

/** What a refusal says. */
export async function refusal(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the agent answered ${response.status}`;
}

/** Follows the agent's events for as long as the page is seen, over restarts of the agent. */
export class Feed {
  constructor(headers, onEvent, onState) {
    Object.assign(this, { headers, onEvent, onState });
    this.running = false;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
    addEventListener("online", () => this.wake?.());
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.#follow(this.control = new AbortController());
  }

  stop() {
    this.running = false;
    this.control?.abort();
    this.wake?.();
  }

  async #follow(control) {
    let wait = FIRST_WAIT;
    while (!control.signal.aborted) {
      const watch = new Watch();
      try {
        await this.#once(AbortSignal.any([control.signal, watch.signal]), watch, () => (wait = FIRST_WAIT));
        this.onState("lost", "the agent has ended");
      } catch (error) {
        if (control.signal.aborted) return;
        if (error instanceof Locked) {
          this.running = false;
          this.onState("locked", "");
          return;
        }
        this.onState("lost", error instanceof TypeError ? "no agent is there" : error.message);
      } finally {
        watch.end();
      }
      await new Promise((done) => {
        this.wake = done;
        setTimeout(done, wait);
      });
      wait = Math.min(2 * wait, MOST_WAIT);
    }
  }

  async #once(signal, watch, connected) {
    const response = await fetch("v1/events", { headers: this.headers(), signal, cache: "no-store" });
    if (response.status === 401) throw new Locked();
    if (!response.ok) throw new Error(await refusal(response));
    connected();
    this.onState("connected", "");
    for await (const event of messages(response, () => watch.heard())) this.onEvent(event);
  }
}

class Locked extends Error {}

/** Ends a connection on which nothing comes any more. */
class Watch {
  constructor() {
    this.control = new AbortController();
    this.signal = this.control.signal;
    this.heard();
  }

  heard() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.control.abort(new Error("the agent fell silent")), SILENCE);
  }

  end() {
    clearTimeout(this.timer);
  }
}
