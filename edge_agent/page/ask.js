// The box that asks: one question at a time, its answer as it comes, and how it was made.

import { messages, refusal } from "./events.js";
import { showRan } from "./panels.js";

const place = (id) => document.getElementById(id);

/** `headers` gives those of every request; `locked` is called when the key is refused. */
export function setUpAsking(headers, locked) {
  let control = null;

  async function ask() {
    if (control || !place("question").reportValidity()) return;
    control = new AbortController();
    const answer = place("answer");
    answer.textContent = "";
    answer.setAttribute("aria-busy", "true"); // read out as a whole, not word by word
    place("ask-wrong").textContent = "";
    place("ran").replaceChildren();
    place("send").disabled = true;
    place("stop").disabled = false;
    try {
      await stream(control.signal, answer);
    } catch (error) {
      const stopped = control.signal.aborted;
      const lost = error instanceof TypeError ? "the agent is not there" : error.message;
      place("ask-wrong").textContent = stopped ? "stopped" : lost;
    } finally {
      control = null;
      answer.removeAttribute("aria-busy");
      place("send").disabled = false;
      place("stop").disabled = true;
    }
  }

  async function stream(signal, answer) {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json" },
      body: JSON.stringify(question()),
      signal,
    });
    if (response.status === 401) locked();
    if (!response.ok) throw new Error(await refusal(response));
    for await (const chunk of messages(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      answer.append(chunk.choices[0]?.delta.content ?? "");
      if (chunk.plan) showRan(chunk.plan);
    }
  }

  place("question").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  place("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  place("stop").addEventListener("click", () => control?.abort());
}

function question() {
  return {
    model: "tandem",
    messages: [{ role: "user", content: place("prompt").value }],
    stream: true,
    temperature: 0,
    max_tokens: place("limit").valueAsNumber,
    plan: { route: place("route").value, quality: place("quality").value },
  };
}
