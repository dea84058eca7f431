// The budget: reads it, shows it as a point on the frontier, and sets it if the server allows this browser to.

import { badge, byId, element, problem, tint } from "./element.js";
import { Curve } from "./curve.js";
import { readAccess, setBudget } from "./server.js";
import { aboutLatency, count, millions, needs, percent } from "./words.js";

const FINGER_PX = 8; // a shorter movement is a tap
// Matches what cannot be a token; a header field cannot even hold some of it.
const UNFIT = /[^\x21-\x7e]/;

export class BudgetPanel {
  // changed(state) is called with every new GET /budget document.
  constructor(model, frontier, { changed }) {
    Object.assign(this, { frontier, changed, editable: false, token: "", changes: 0, live: { answers: 0, shares: null } });
    this.full = model.exits.at(-1).executed_mflops;
    this.slider = byId("budget");
    this.slider.min = String((model.exits[0].executed_mflops / this.full) * 100);
    this.rows = model.exits.map((_, i) => this.#row(i + 1, model.exits.length));
    byId("shares").replaceChildren(...this.rows.map((row) => row.element));
    byId("fact-full").textContent = millions(this.full);
    this.curve = new Curve(model, frontier, (fraction) => this.#choose(fraction), () => this.#chosen());
    this.slider.addEventListener("input", () => this.#choose(Number(this.slider.value) / 100));
    this.slider.addEventListener("change", () => this.#chosen());
    this.slider.addEventListener("keydown", (event) => this.#step(event));
    for (const place of [byId("curve"), byId("slider")]) this.#mindFingers(place);
    byId("unlock").addEventListener("submit", (event) => this.#unlock(event));
  }

  #row(exit, exits) {
    const row = {
      threshold: element("td", { class: "threshold" }),
      expected: element("span", { class: "expected" }),
      live: element("span", { class: "live" }),
      numbers: element("span", { class: "numbers" }),
    };
    const bars = element("div", { class: "bars", "aria-hidden": "true" }, row.expected, row.live);
    row.element = element(
      "tr",
      { class: "tinted", "--t": tint(exit, exits) },
      element("th", { scope: "row" }, badge(exit, exits)),
      row.threshold,
      element("td", {}, element("div", { class: "share" }, bars, row.numbers)),
    );
    return row;
  }

  // Takes a GET /budget document, unless a budget was set (`changes`) since the request. A slider that is being moved
  // has priority.
  setState(state) {
    this.state = state;
    if (this.wanted === undefined && !this.sending) this.#show(state.fraction, state.expected, state.thresholds);
    this.changed(state);
  }

  // Takes the live exit shares: {answers, shares by exit or null}; null if they are not available.
  setLive(live) {
    this.live = live ?? { answers: 0, shares: null, hidden: true };
    ({ live } = this);
    this.rows.forEach((row, i) => {
      row.live.style.width = width(live.shares?.[i]);
      const expected = percent(this.expected?.exit_shares[i] ?? 0);
      row.numbers.textContent = live.shares ? `${expected}, live ${percent(live.shares[i])}` : expected;
    });
    byId("shares-note").textContent = live.answers
      ? `Expected: on held-out images like those it was trained on. Live: the last ${count(live.answers, "answer")}, anyone's.`
      : "Expected: on held-out images like those it was trained on. " +
        (live.hidden ? "Live: unknown, /metrics cannot be read from here." : "Live: nothing yet, send some pictures.");
  }

  async readAccess() {
    const { may_set: editable, kind, detail } = await readAccess(this.token);
    this.editable = editable;
    this.slider.disabled = !editable;
    byId("unlock").hidden = kind !== "token-required";
    byId("budget-note").textContent = editable
      ? "Drag the point or the slider. It takes effect from the next image, for everyone who uses this server."
      : kind === "token-required"
        ? "Read-only: setting the budget needs this server's admin token."
        : `Read-only from here. ${detail}`;
    if (editable) this.#tell(null);
    if (this.state) this.setState(this.state);
    return editable;
  }

  async #unlock(event) {
    event.preventDefault();
    const token = byId("token").value.trim();
    byId("token-note").textContent = "";
    try {
      this.token = UNFIT.test(token) ? "" : token;
      if (await this.readAccess()) this.slider.focus();
      else byId("token-note").textContent = "That is not this server's token.";
    } catch (error) {
      byId("token-note").textContent = `${error.title}. ${error.message}`;
    }
  }

  // Shows why the last change failed, next to the control in use; the next change that succeeds clears it.
  #tell(error) {
    byId("budget-problem").replaceChildren(...(error ? [problem(error)] : []));
  }

  // Arrow keys move by whole percents: the step "any" makes the pointer smooth, but arrow keys jump.
  #step(event) {
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.#choose((Math.round(Number(this.slider.value)) + steps[event.key]) / 100);
  }

  #choose(fraction) {
    if (!this.editable || !this.state) return;
    const { lowest, highest } = this.state.allowed.fraction;
    this.wanted = Math.min(highest, Math.max(lowest, fraction));
    this.changes++;
    this.#show(this.wanted, ...this.#expect(this.wanted));
    this.#send();
  }

  #chosen() {
    this.#send();
  }

  // A finger or pen that touches down may be about to scroll the page: nothing is set before it has moved along the
  // control, or is lifted.
  #mindFingers(place) {
    const on = (name, act) => place.addEventListener(name, act, { capture: true }); // before chart and slider
    const gone = ({ clientX, clientY }) => [clientX - this.finger.clientX, clientY - this.finger.clientY].map(Math.abs);
    const end = (meant) => {
      this.finger = null;
      if (meant) return this.#send();
      this.wanted = undefined;
      this.setState(this.state);
    };
    on("pointerdown", (event) => {
      if (event.pointerType !== "mouse" && this.state) this.finger = event;
    });
    on("pointermove", (event) => {
      if (!this.finger) return;
      const [along, across] = gone(event);
      if (along > FINGER_PX && along > across) end(true);
    });
    on("pointerup", (event) => this.finger && end(Math.max(...gone(event)) <= FINGER_PX));
    on("pointercancel", () => this.finger && end(false));
  }

  // One request at a time, then the latest value: the server gets the final value without a flood of requests.
  async #send() {
    if (this.sending) return;
    this.sending = true;
    try {
      while (this.wanted !== undefined && !this.finger) {
        const asked = this.wanted;
        const state = await setBudget(asked, this.state.latency?.target_ms, this.token);
        if (this.wanted === asked) this.wanted = undefined;
        this.state = state;
        this.changes++;
        this.#tell(null);
      }
    } catch (error) {
      this.wanted = undefined;
      const refused = error.kind === "token-required" || error.kind === "not-local";
      if (refused) await this.readAccess().catch(() => {});
      if (error.kind === "token-required") error.message = "The budget is unchanged. Unlock it with the token, below.";
      this.#tell(error);
    } finally {
      this.sending = false;
      this.setState(this.state);
    }
  }

  // The frontier at a budget, interpolated as the server does: shown until the server answers.
  #expect(fraction) {
    const { fraction: fractions, accuracy, average_mflops: costs, exit_shares: shares, thresholds } = this.frontier;
    const after = fractions.findIndex((x) => x >= fraction);
    if (after <= 0) {
      const end = after === 0 ? 0 : fractions.length - 1;
      return [{ average_mflops: costs[end], accuracy: accuracy[end], exit_shares: shares[end] }, thresholds[end]];
    }
    const weight = (fraction - fractions[after - 1]) / (fractions[after] - fractions[after - 1] || 1);
    const mix = (a, b) => a + (b - a) * weight;
    const expected = {
      average_mflops: mix(costs[after - 1], costs[after]),
      accuracy: mix(accuracy[after - 1], accuracy[after]),
      exit_shares: shares[after].map((share, i) => mix(shares[after - 1][i], share)),
    };
    return [expected, thresholds[after]];
  }

  #show(fraction, expected, thresholds) {
    this.expected = expected;
    const value = String(fraction * 100);
    if (this.slider.value !== value) this.slider.value = value;
    this.slider.setAttribute(
      "aria-valuetext",
      `${percent(fraction)} of the full network, ${percent(expected.accuracy, 1)} expected to be right`,
    );
    byId("budget-share").textContent = percent(fraction);
    byId("budget-accuracy").textContent = percent(expected.accuracy, 1);
    byId("fact-budget").textContent = millions(fraction * this.full);
    const { rolling } = this.state;
    byId("fact-rolling").textContent = rolling.average_mflops === null ? "–" : millions(rolling.average_mflops);
    byId("rolling-images").textContent = rolling.images ? `last ${count(rolling.images, "answer")}` : "no answers yet";
    const end = expected.average_mflops / this.full;
    byId("budget-limit").hidden = end > fraction - 0.005;
    byId("budget-limit").textContent =
      `For this network, going deeper stops paying at ${percent(end)}: the rest of the budget is not spent.`;
    byId("latency-note").hidden = !this.state.latency;
    byId("latency-note").textContent = this.state.latency ? aboutLatency(this.state.latency) : "";
    this.rows.forEach((row, i) => {
      const takesAll = i + 1 === this.rows.length || expected.exit_shares[i] > 0;
      row.threshold.textContent = needs(thresholds[i], takesAll);
      row.expected.style.width = width(expected.exit_shares[i]);
    });
    this.curve.show({
      fraction,
      expectedFraction: expected.average_mflops / this.full,
      accuracy: expected.accuracy,
      spentFraction: rolling.average_mflops === null ? null : rolling.average_mflops / this.full,
      editable: this.editable,
    });
    this.setLive(this.live);
  }
}

const width = (share) => `${((share ?? 0) * 100).toFixed(1)}%`;
