// Shows one picture's way through the exits, from POST /classify/stream.

import { badge, byId, calm, element, pause, tint } from "./element.js";
import { classifyStream } from "./server.js";
import { aboutScore, className, millions, needs, percent, score, whyItLeft } from "./words.js";

const STEP_MS = 450; // shown slowly: the server takes milliseconds per step

export class Journey {
  constructor(model) {
    this.costs = model.exits.map((exit) => exit.executed_mflops);
    this.thresholds = this.costs.map(() => null);
    this.shares = this.costs.map(() => 0);
    byId("about-score").textContent = aboutScore(model.score);
    this.rows = this.costs.map((cost, i) => this.#row(i + 1, cost));
    byId("exits").replaceChildren(...this.rows.map((row) => row.element));
    this.running = null;
  }

  #row(exit, cost) {
    const cell = (...children) => element("td", { role: "cell" }, ...children);
    const row = {
      guess: element("span", { class: "guess" }),
      fill: element("span", { class: "fill" }),
      mark: element("span", { class: "mark" }),
      numbers: element("span", { class: "against" }),
      then: element("span", { class: "then" }),
    };
    const gauge = element("div", { class: "gauge", "aria-hidden": "true" }, row.fill, row.mark);
    row.element = element(
      "tr",
      { role: "row", class: "tinted", "--t": tint(exit, this.costs.length) },
      element("th", { role: "rowheader", scope: "row" }, badge(exit, this.costs.length)),
      cell(row.guess),
      cell(gauge, row.numbers),
      cell(element("span", { class: "so-far" }, `${millions(cost)} `, element("small", {}, this.#share(cost)))),
      cell(row.then),
    );
    return row;
  }

  #share(cost) {
    return percent(cost / this.costs.at(-1));
  }

  // The thresholds in force, from GET /budget; shown while no picture is being classified.
  setBudget({ thresholds, expected }) {
    this.thresholds = thresholds;
    this.shares = expected.exit_shares;
    if (!this.running && !this.shown) this.#clear();
  }

  #clear() {
    this.shown = false;
    // One scale for all exits makes their thresholds comparable.
    const known = this.thresholds.filter(Number.isFinite);
    this.scale = [Math.min(0, ...known.map((x) => x * 1.5)), Math.max(0.5, ...known.map((x) => x * 1.6))];
    this.rows.forEach((row, i) => {
      row.element.dataset.state = "waiting";
      row.guess.textContent = row.then.textContent = "";
      this.#gauge(row, null, this.thresholds[i], i + 1 === this.rows.length || this.shares[i] > 0);
    });
    byId("cost").hidden = true;
    byId("timing").textContent = "";
  }

  #gauge(row, value, threshold, takesAll) {
    const [low, high] = this.scale;
    const place = (x) => `${(100 * Math.min(1, Math.max(0, (x - low) / (high - low)))).toFixed(1)}%`;
    row.fill.style.width = Number.isFinite(value) ? place(value) : "0%";
    row.mark.hidden = !Number.isFinite(threshold);
    if (!row.mark.hidden) row.mark.style.left = place(threshold);
    const needed = `needs ${needs(threshold, takesAll)}`;
    row.numbers.textContent = value === null ? needed : `${score(value)}, ${needed}`;
  }

  // Clears the display for another picture, and cancels one that is still being classified.
  expect() {
    this.running?.abort();
    this.running = null;
    this.#clear();
    byId("answer").replaceChildren(element("p", { class: "hint" }, "On its way …"));
  }

  // Classifies a picture and shows each exit as its result arrives.
  async run(blob, truth = null) {
    this.expect();
    const { signal } = (this.running = new AbortController());
    try {
      let told = 0;
      for await (const line of classifyStream(blob, signal)) {
        if (line.exit > told) {
          this.#pass(line);
          told = line.exit;
          if (!calm()) await pause(STEP_MS, signal);
        }
        if (line.final) this.#arrive(line, truth);
      }
    } catch (error) {
      if (signal.aborted) return;
      this.#clear();
      throw error;
    } finally {
      if (this.running?.signal === signal) this.running = null;
    }
  }

  #pass(line) {
    this.shown = true;
    const row = this.rows[line.exit - 1];
    const before = this.rows[line.exit - 2];
    if (before) this.#leave(before, "passed", "not sure: goes on ↓");
    row.element.dataset.state = "here";
    row.guess.replaceChildren(className(line.label), " ", element("small", {}, percent(line.confidence)));
    this.#gauge(row, line.score, line.threshold, line.final);
  }

  #leave(row, state, then) {
    row.element.dataset.state = state;
    row.then.textContent = then;
  }

  #arrive(answer, truth) {
    this.rows.forEach((row, i) => {
      if (i + 1 === answer.exit) this.#leave(row, "left", answer.reason === "confident" ? "sure: leaves ✓" : "leaves");
      if (i + 1 > answer.exit) {
        this.#leave(row, "saved", "never run");
        row.numbers.textContent = "";
      }
    });
    const share = answer.mflops / answer.full_mflops;
    const right = truth && (truth === answer.label ? "✓ right" : `✗ it shows: ${className(truth)}`);
    byId("answer").replaceChildren(
      element(
        "p",
        { class: "label" },
        element("b", {}, className(answer.label)),
        ` ${percent(answer.confidence)} confident `,
        right ? element("span", { class: `truth ${truth === answer.label ? "right" : "wrong"}` }, right) : "",
      ),
      element("p", {}, `Left at exit ${answer.exit} of ${answer.exits}. `, whyItLeft(answer)),
    );
    byId("cost").hidden = false;
    byId("cost-bar").style.width = `${(share * 100).toFixed(1)}%`;
    const saved = answer.exit < answer.exits ? `${percent(1 - share)} saved` : "nothing saved";
    byId("cost-note").textContent =
      `${millions(answer.mflops)} of the full network's ${millions(answer.full_mflops)}: ${saved}`;
    const slowed = calm() ? "" : " The steps are shown slowed down.";
    byId("timing").textContent = `The server took ${answer.timings.total_ms.toFixed(1)} ms.${slowed}`;
  }
}
