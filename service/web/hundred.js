// Sends a hundred pictures and places each at the exit where it left; or a stream, of which the last hundred are shown.

import { badge, byId, element, pause, problem, tint } from "./element.js";
import { SAMPLES, sampleBlob } from "./samples.js";
import { classify } from "./server.js";
import { toBlob, vary } from "./variation.js";
import { className, millions, percent } from "./words.js";

const IMAGES = 100;
const WORKERS = 4;
const BUSY_TRIES = 5;
const STREAM_PAUSE_MS = 60; // at most about fifty a second: enough to watch, and the server may have other users

export class Hundred {
  // sent() is called when pictures have been answered.
  constructor(model, sent) {
    Object.assign(this, { sent, known: new Set(model.class_names), answers: [], budget: null });
    this.costs = model.exits.map((exit) => exit.executed_mflops);
    this.rows = this.costs.map((_, i) => this.#row(i + 1));
    byId("tiles").replaceChildren(...this.rows.map((row) => row.element));
    this.meters = ["full network", "budget", "these pictures"].map((name) => this.#meter(name));
    byId("meters").append(...this.meters.map((meter) => meter.element));
    this.once = byId("hundred");
    this.on = byId("stream");
    this.once.addEventListener("click", () => this.stop || this.#start(IMAGES));
    this.on.addEventListener("click", () => (this.stop ? this.stop.abort() : this.#start(Infinity)));
    this.once.disabled = this.on.disabled = false;
  }

  #row(exit) {
    const row = { tiles: element("div", { class: "set" }), count: element("td", { class: "count" }, "0") };
    row.element = element(
      "tr",
      { class: "tinted", "--t": tint(exit, this.costs.length) },
      element("th", { scope: "row" }, badge(exit, this.costs.length)),
      element("td", {}, row.tiles),
      row.count,
    );
    return row;
  }

  #meter(name) {
    const meter = { bar: element("span"), value: element("b") };
    const bar = element("div", { class: "bar", "aria-hidden": "true" }, meter.bar);
    meter.element = element("div", { class: "meter" }, element("span", {}, name), bar, meter.value);
    return meter;
  }

  setBudget(state) {
    this.budget = state;
    if (this.answers.length) this.#measure();
  }

  async #start(images) {
    const { signal } = (this.stop = new AbortController());
    const endless = images === Infinity;
    this.#busy(true);
    byId("hundred-result").textContent = endless ? "Sending …" : "Sending a hundred …";
    this.#clear();
    let left = images;
    const work = async () => {
      while (left-- > 0 && !signal.aborted) {
        await this.#send(signal);
        if (endless) await pause(STREAM_PAUSE_MS * (0.5 + Math.random()), signal);
      }
    };
    let failed;
    try {
      this.pictures ??= await Promise.all(SAMPLES.map(async (name) => createImageBitmap(await sampleBlob(name))));
      await Promise.all(Array.from({ length: WORKERS }, work));
    } catch (error) {
      const stopped = signal.aborted;
      this.stop.abort();
      if (!stopped) failed = error;
    }
    this.stop = null;
    this.#busy(false);
    byId("hundred-result").replaceChildren(...(failed ? [problem(failed)] : []), ...this.#summary());
    await this.sent();
  }

  // The buttons stay enabled so that they keep the keyboard focus: one waits, the other stops what is running.
  #busy(busy) {
    this.once.setAttribute("aria-disabled", String(busy));
    this.on.textContent = busy ? "Stop" : "Keep sending";
  }

  async #send(signal) {
    const i = Math.floor(Math.random() * SAMPLES.length);
    const canvas = vary(this.pictures[i]);
    const body = await toBlob(canvas);
    for (let tries = 1; ; tries++) {
      try {
        this.#lay(canvas, SAMPLES[i], await classify(body, signal));
        return;
      } catch (error) {
        if (error.kind !== "overloaded" || tries === BUSY_TRIES) throw error;
        await pause(1000 * Math.max(1, error.retryAfterS), signal);
      }
    }
  }

  #lay(canvas, truth, answer) {
    const right = answer.label === truth;
    const wrong = !right && this.known.has(truth);
    const title = className(wrong ? `${truth}, taken for ${answer.label}` : truth);
    const tile = element("span", { class: wrong ? "tile wrong" : "tile", title }, canvas);
    this.rows[answer.exit - 1].tiles.append(tile);
    this.answers.push({ ...answer, right, tile });
    if (this.answers.length > IMAGES) this.answers.shift().tile.remove();
    this.#measure();
  }

  #clear() {
    this.answers = [];
    this.rows.forEach((row) => row.tiles.replaceChildren());
    this.#measure();
  }

  #measure() {
    const { answers } = this;
    this.rows.forEach((row, i) => {
      row.count.textContent = String(answers.filter((answer) => answer.exit === i + 1).length);
    });
    const full = this.costs.at(-1);
    this.mean = answers.reduce((sum, answer) => sum + answer.mflops, 0) / answers.length;
    const values = [full, this.budget?.average_mflops, answers.length ? this.mean : undefined];
    byId("meters").hidden = !answers.length;
    this.meters.forEach((meter, i) => {
      meter.bar.style.width = `${(((values[i] ?? 0) / full) * 100).toFixed(1)}%`;
      meter.value.textContent = values[i] === undefined ? "–" : `${millions(values[i])} (${percent(values[i] / full)})`;
    });
  }

  #summary() {
    const { answers, budget, mean } = this;
    const n = answers.length;
    if (!n) return [];
    const full = this.costs.at(-1);
    const early = answers.filter((answer) => answer.exit < this.costs.length).length;
    const right = answers.filter((answer) => answer.right).length;
    const told = [
      `${early} of ${n} pictures left early. They cost ${millions(mean)} on average, ` +
        `${percent(1 - mean / full)} less than the full network.`,
    ];
    if (SAMPLES.every((name) => this.known.has(name))) told.push(` ${right} were answered right.`);
    const above = budget && mean > budget.average_mflops * (1 + 1e-6); // a smaller excess is rounding
    const why = above
      ? `That is above the budget of ${millions(budget.average_mflops)}, and may be for a while: the server lets hard ` +
        `images use what easy ones have saved, up to ${budget.ledger.burst_images.toFixed(0)} images' budgets. Keep it ` +
        "sending, and the average settles at the budget."
      : "";
    return [element("p", {}, element("b", {}, told[0]), ...told.slice(1)), ...(why ? [element("p", {}, why)] : [])];
  }
}
